//! What it costs to be there: a daemon that does nothing.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use p2pit_tests::{Node, Pool};

use crate::{
    Options,
    figures::{Memory, cpu_seconds},
    latency::{WARM_UPS, times},
};

const WATCHED: Duration = Duration::from_secs(30);
/// After the last job, until nothing is left to be done for it.
const SETTLE: Duration = Duration::from_secs(5);

const MEMORY_TARGET_MIB: f64 = 30.0;
const CPU_TARGET_PERCENT: f64 = 0.5;

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut pool = Pool::of(&["sim:1xv100", "sim:1xv100", "sim:1xv100"]);
    let client = pool.add_client("client");
    // Nobody works here, so that what follows is what it costs to be there.
    let idle = Idle::of(pool.node(3))?;
    for request in ["[]", "2:[v100]"] {
        eprintln!("{} jobs {request} …", options.runs);
        times(&client, request, options.runs)?;
    }
    thread::sleep(SETTLE);
    let after = Idle::of(pool.node(3))?;

    let jobs = 2 * (options.runs + WARM_UPS);
    println!("| an idle daemon | target | when new | after {jobs} jobs |");
    println!("|---|---|---|---|");
    let memory =
        |idle: &Idle| format!("{:.1} MiB ({:.1} MiB)", idle.memory.rss_mib, idle.memory.pss_mib);
    println!("| RSS (PSS) | ≤ {MEMORY_TARGET_MIB} MiB | {} | {} |", memory(&idle), memory(&after));
    println!(
        "| CPU, of one core | ≤ {CPU_TARGET_PERCENT} % | {:.2} % | {:.2} % |",
        idle.cpu_percent, after.cpu_percent
    );
    Ok(())
}

/// What a daemon takes while nothing is asked of it.
pub(crate) struct Idle {
    pub(crate) memory: Memory,
    pub(crate) cpu_percent: f64,
}

impl Idle {
    pub(crate) fn of(node: &Node) -> Result<Self> {
        Ok(Self::of_all(&[node.daemon().pid()])?.remove(0))
    }

    /// Of several daemons in the same time.
    pub(crate) fn of_all(pids: &[u32]) -> Result<Vec<Self>> {
        let before: Result<Vec<f64>> = pids.iter().map(|pid| cpu_seconds(*pid)).collect();
        let before = before?;
        let start = Instant::now();
        thread::sleep(WATCHED);
        let of = |(pid, before): (&u32, f64)| {
            let used = cpu_seconds(*pid)? - before;
            let cpu_percent = used / start.elapsed().as_secs_f64() * 100.0;
            Ok(Self { memory: Memory::of(*pid)?, cpu_percent })
        };
        pids.iter().zip(before).map(of).collect()
    }
}
