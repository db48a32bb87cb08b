//! From submission to the end of a job, when nothing else is going on.
//!
//! A job is warm: its code is known, the client's daemon runs, and the log is followed, so
//! that the time of a whole `p2pit run … -l` is the time from submission to the end of the
//! job.

use std::{process::Stdio, time::Instant};

use anyhow::{Context as _, Result, ensure};
use p2pit_tests::{Node, Pool};

use crate::{Options, figures::Times};

/// Before they count: caches fill, connections are made.
pub(crate) const WARM_UPS: usize = 5;

const ONE_PROCESS_TARGET_MS: f64 = 60.0;
const GANG_TARGET_MS: f64 = 80.0;

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut pool = Pool::of(&["sim:1xv100", "sim:1xv100", "sim:1xv100"]);
    let client = pool.add_client("client");
    eprintln!("{} jobs of one process …", options.runs);
    let one_process = times(&client, "[]", options.runs)?;
    eprintln!("{} jobs of two processes …", options.runs);
    let gang = times(&client, "2:[v100]", options.runs)?;
    println!("| what | target | p50 | p90 | min | max |");
    println!("|---|---|---|---|---|---|");
    println!("{}", row(&one_process, "warm job of one process", ONE_PROCESS_TARGET_MS));
    println!("{}", row(&gang, "warm gang on two nodes", GANG_TARGET_MS));
    Ok(())
}

fn row(times: &Times, what: &str, target_ms: f64) -> String {
    let figures = [times.percentile(50), times.percentile(90), times.min(), times.percentile(100)];
    let figures = figures.map(|ms| format!("{ms:.0} ms"));
    format!("| {what} | p50 ≤ {target_ms} ms | {} |", figures.join(" | "))
}

/// Whole commands, one after the other.
pub(crate) fn times(client: &Node, request: &str, runs: usize) -> Result<Times> {
    for _ in 0..WARM_UPS {
        job(client, request)?;
    }
    let times: Result<Vec<f64>> = (0..runs).map(|_| job(client, request)).collect();
    Times::of(times?)
}

/// Milliseconds from the start of the command to its end.
pub(crate) fn job(client: &Node, request: &str) -> Result<f64> {
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
