//! Many jobs at once: how many are done in a second, and what a queue costs that waits.

use std::{
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use p2pit_tests::{Node, Pool};

use crate::{
    Options,
    idle::Idle,
    submitter::{Submitter, wall_ms},
};

/// Jobs in flight at once.
const JOBS: usize = 200;
/// Bursts measured; the first is for the caches.
const BURSTS: usize = 4;
const WAITING: usize = 1_000;
/// Connections that submit the jobs that wait.
const WAITING_AT_ONCE: usize = 50;
const DONE_WITHIN: Duration = Duration::from_secs(300);
const DRAINED_WITHIN: Duration = Duration::from_secs(1_800);
/// Seldom enough to cost nothing; the times measured do not depend on it.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Longer than the longest pause between the tries of a steward.
const SETTLE: Duration = Duration::from_secs(60);

const PER_SECOND_TARGET: f64 = 100.0;
const WAITING_MEMORY_TARGET_MIB: f64 = 100.0;
const WAITING_CPU_TARGET_PERCENT: f64 = 2.0;

/// Jobs that run in one second of wall time.
struct Rate {
    what: String,
    per_second: Vec<f64>,
}

#[expect(clippy::print_stdout, reason = "it is what this program is for")]
pub(crate) fn run(_: &Options) -> Result<()> {
    throughput()?;
    println!();
    waiting()
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
fn throughput() -> Result<()> {
    // The most GPUs that can be simulated: a process that has one counts no core, so that
    // nearly all jobs of this kind run at once.
    let mut pool = Pool::of(&["sim:64xv100"; 3]);
    let client = pool.add_client("client");
    let code = pool.path().join("empty");
    // Its code is known from here on.
    client.p2pit(&["run", "first", "[]", "-d", "true", "-l"]).ended(0);
    let mut rates = Vec::new();
    for (request, what) in [
        ("[]", "one core each: 12 run at once"),
        ("[gpu]", "one simulated GPU each, no core: 192 run at once"),
    ] {
        let submitter = Submitter::new(&client, &code, request)?;
        let mut per_second = Vec::new();
        for n in 0..BURSTS {
            let burst = submitter.submit(JOBS, JOBS, request, "true")?;
            let done_wall_ms = submitter.wait(&burst, DONE_WITHIN, LOOK_EVERY)?;
            let took_s = seconds(burst.started_wall_ms, done_wall_ms);
            eprintln!(
                "{JOBS} jobs {request}: all submitted after {:.2} s, all done after {took_s:.2} s",
                burst.submitted_s
            );
            if n > 0 {
                per_second.push(JOBS as f64 / took_s);
            }
        }
        rates.push(Rate { what: format!("`{request}` by one program, {what}"), per_second });
        let took_s = commands(&client, request)?;
        eprintln!("{JOBS} commands `run {request} -l`: all ended after {took_s:.2} s");
        rates.push(Rate {
            what: format!("`{request}` by {JOBS} commands `p2pit run … -l`"),
            per_second: vec![JOBS as f64 / took_s],
        });
    }
    println!("| {JOBS} jobs of one process at once | target | jobs/s: best | median |");
    println!("|---|---|---|---|");
    for Rate { what, mut per_second } in rates {
        per_second.sort_by(f64::total_cmp);
        let best = per_second.last().context("nothing was measured")?;
        let median = per_second[per_second.len() / 2];
        println!("| {what} | ≥ {PER_SECOND_TARGET} | {best:.0} | {median:.0} |");
    }
    Ok(())
}

/// Seconds from the start of the first command to the end of the last.
fn commands(client: &Node, request: &str) -> Result<f64> {
    let start = Instant::now();
    let children: Result<Vec<_>> = (0..JOBS)
        .map(|_| {
            let mut command: Command = client.command();
            command.args(["run", "bench", request, "-d", "true", "-l"]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            command.spawn().context("cannot start p2pit")
        })
        .collect();
    for child in children? {
        let ended = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success(), "a job failed: {said}");
    }
    Ok(start.elapsed().as_secs_f64())
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
fn waiting() -> Result<()> {
    let mut pool = Pool::of(&["sim:1xv100", "none", "none"]);
    let client = pool.add_client("client");
    let code = pool.path().join("empty");
    client.p2pit(&["run", "first", "[v100]", "-d", "true", "-l"]).ended(0);
    let submitter = Submitter::new(&client, &code, "[v100]")?;
    let long = client.submit(&["long", "[v100]", "-d", "sleep 100000"]);
    client.wait_for_state(&long, "RUNNING");
    let before = Idle::of_all(&pids(&pool))?;
    let burst = submitter.submit(WAITING, WAITING_AT_ONCE, "[v100]", "true")?;
    eprintln!("{WAITING} jobs that wait: all submitted after {:.2} s", burst.submitted_s);
    thread::sleep(SETTLE);
    let after = Idle::of_all(&pids(&pool))?;
    println!("| {WAITING} jobs wait for one GPU: RSS, CPU of one core | target | without | with |");
    println!("|---|---|---|---|");
    let target = format!("≤ {WAITING_MEMORY_TARGET_MIB} MiB, ≤ {WAITING_CPU_TARGET_PERCENT} %");
    let steward = submitter.steward()?.to_string();
    for ((node, before), after) in pool.nodes().iter().zip(&before).zip(&after) {
        let me = node.me();
        let (has_gpu, keeps) = (node.name() == "n1", me["node"] == steward.as_str());
        let roles = [(has_gpu, "has the GPU"), (keeps, "drives the jobs")];
        let roles: Vec<&str> = roles.iter().filter(|(is, _)| *is).map(|(_, role)| *role).collect();
        let figures =
            |idle: &Idle| format!("{:.1} MiB, {:.2} %", idle.memory.rss_mib, idle.cpu_percent);
        println!(
            "| {} {} | {target} | {} | {} |",
            node.name(),
            roles.join(", "),
            figures(before),
            figures(after)
        );
    }
    let room_wall_ms = wall_ms()?;
    client.p2pit(&["stop", &long]).ended(0);
    let done_wall_ms = submitter.wait(&burst, DRAINED_WITHIN, LOOK_EVERY)?;
    let took_s = seconds(room_wall_ms, done_wall_ms);
    println!();
    println!("| {WAITING} jobs get the GPU one after the other | jobs/s |");
    println!("|---|---|");
    println!("| from the end of the job before them | {:.1} |", WAITING as f64 / took_s);
    Ok(())
}

fn seconds(from_ms: u64, to_ms: u64) -> f64 {
    to_ms.saturating_sub(from_ms) as f64 / 1e3
}

fn pids(pool: &Pool) -> Vec<u32> {
    pool.nodes().iter().map(|node| node.daemon().pid()).collect()
}
