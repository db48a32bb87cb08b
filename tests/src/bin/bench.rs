//! How fast p2pit is on this machine, as one Markdown table.
//!
//! Three daemons and a client node on loopback. A job is warm: its code is known, the
//! client's daemon runs, and the log is followed, so that the time of a whole
//! `p2pit run … -l` is the time from submission to the end of the job. Measured with the
//! release build:
//!
//! ```text
//! cargo build --release --bin p2pit
//! cargo run --release -p p2pit-tests --bin p2pit-bench
//! ```

use std::{
    env, fs,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use p2pit_tests::{Node, Pool};

const RUNS: usize = 50;
/// Before they count: caches fill, connections are made.
const WARM_UPS: usize = 5;
const IDLE: Duration = Duration::from_secs(30);
/// After the last job, until nothing is left to be done for it.
const SETTLE: Duration = Duration::from_secs(5);

const ONE_PROCESS_TARGET_MS: f64 = 60.0;
const GANG_TARGET_MS: f64 = 80.0;
const MEMORY_TARGET_MIB: f64 = 30.0;
const CPU_TARGET_PERCENT: f64 = 0.5;

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
fn main() -> Result<()> {
    if cfg!(debug_assertions) {
        eprintln!("a debug build, and so is the p2pit beside it: the figures say little");
    }
    let runs = match env::args().nth(1) {
        Some(text) => text.parse().context("usage: p2pit-bench [RUNS]")?,
        None => RUNS,
    };
    let mut pool = Pool::of(&["sim:1xv100", "sim:1xv100", "sim:1xv100"]);
    let client = pool.add_client("client");
    // Nobody works here, so that what follows is what it costs to be there.
    let idle = Idle::of(pool.node(3))?;
    eprintln!("{runs} jobs of one process …");
    let one_process = Times::of(&client, "[]", runs)?;
    eprintln!("{runs} jobs of two processes …");
    let gang = Times::of(&client, "2:[v100]", runs)?;
    thread::sleep(SETTLE);
    let after = Idle::of(pool.node(3))?;

    println!("| what | target | p50 | p90 | min | max |");
    println!("|---|---|---|---|---|---|");
    println!("{}", one_process.row("warm job of one process", ONE_PROCESS_TARGET_MS));
    println!("{}", gang.row("warm gang on two nodes", GANG_TARGET_MS));
    println!();
    println!("| an idle daemon | target | when new | after {} jobs |", 2 * (runs + WARM_UPS));
    println!("|---|---|---|---|");
    let memory = |idle: &Idle| format!("{:.1} MiB ({:.1} MiB)", idle.rss_mib, idle.pss_mib);
    println!("| RSS (PSS) | ≤ {MEMORY_TARGET_MIB} MiB | {} | {} |", memory(&idle), memory(&after));
    println!(
        "| CPU, of one core | ≤ {CPU_TARGET_PERCENT} % | {:.2} % | {:.2} % |",
        idle.cpu_percent, after.cpu_percent
    );
    println!();
    println!("{}", machine());
    Ok(())
}

/// Whole commands, sorted.
struct Times(Vec<f64>);

impl Times {
    fn of(client: &Node, request: &str, runs: usize) -> Result<Self> {
        for _ in 0..WARM_UPS {
            run(client, request)?;
        }
        let times: Result<Vec<f64>> = (0..runs).map(|_| run(client, request)).collect();
        let mut times = times?;
        times.sort_by(f64::total_cmp);
        ensure!(!times.is_empty(), "no runs, no figures");
        Ok(Self(times))
    }

    /// The value that `percent` of all do not exceed.
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0[rank - 1]
    }

    fn row(&self, what: &str, target_ms: f64) -> String {
        let figures = [self.percentile(50), self.percentile(90), self.0[0], self.percentile(100)];
        let figures = figures.map(|ms| format!("{ms:.0} ms"));
        format!("| {what} | p50 ≤ {target_ms} ms | {} |", figures.join(" | "))
    }
}

/// Milliseconds from the start of the command to its end.
fn run(client: &Node, request: &str) -> Result<f64> {
    let mut command = client.command();
    command.args(["run", "bench", request, "-d", "true", "-l"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let start = Instant::now();
    let ended = command.output().context("cannot start p2pit")?;
    let took = start.elapsed();
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "a job failed: {said}");
    Ok(took.as_secs_f64() * 1e3)
}

/// What a daemon that does nothing takes.
struct Idle {
    rss_mib: f64,
    /// Pages that it shares with others count in part.
    pss_mib: f64,
    cpu_percent: f64,
}

impl Idle {
    fn of(node: &Node) -> Result<Self> {
        let pid = node.daemon().pid();
        let before = cpu_seconds(pid)?;
        let start = Instant::now();
        thread::sleep(IDLE);
        let used = cpu_seconds(pid)? - before;
        Ok(Self {
            rss_mib: kib(pid, "Rss:")? / 1024.0,
            pss_mib: kib(pid, "Pss:")? / 1024.0,
            cpu_percent: used / start.elapsed().as_secs_f64() * 100.0,
        })
    }
}

fn kib(pid: u32, name: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("no {name} in {path}"))
}

/// By all threads so far, those that ended included, on any core.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name in parentheses may have anything in it; user and system time are the
    // 12th and 13th fields behind it.
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: Vec<u64> = fields.skip(11).take(2).filter_map(|it| it.parse().ok()).collect();
    ensure!(ticks.len() == 2, "no times in {path}");
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(ticks.iter().sum::<u64>() as f64 / per_second as f64)
}

fn machine() -> String {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cores} cores of {model}, Linux {}", kernel.trim())
}
