//! Jobs beside Slurm's: how soon one is done, how many in a second, and what it
//! costs to be there.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use p2pit_tests::{Node, Pool};

use crate::{
    Options,
    idle::Idle,
    latency,
    slurm::{Setup, Slurm},
    submitter::Submitter,
    table::{Absent, Figures, Goal, Row, Unit},
    turns::{Runner, in_turns},
};

const TURNS: usize = 30;
/// Of bursts of jobs, which take long.
const BURSTS: usize = 2;
const JOBS: usize = 200;
const DONE_WITHIN: Duration = Duration::from_secs(300);
/// The times measured do not depend on it.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const WARM_UPS: usize = 3;

const ONE_PROCESS_GOAL_S: f64 = 0.060;
const GANG_GOAL_S: f64 = 0.080;
const RATE_GOAL: f64 = 100.0;
const MEMORY_GOAL_MIB: f64 = 30.0;
const CPU_GOAL_PERCENT: f64 = 0.5;

/// As many nodes on both sides, with one GPU and four cores each.
const NODES: [&str; 3] = ["sim:1xv100"; 3];

pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let scratch = tempfile::Builder::new().prefix("p2pit-bench-").tempdir()?;
    let mut pool = Pool::of(&NODES);
    let client = pool.add_client("client");
    let other = Other::start(&scratch.path().join("default"), Setup::Default)?;
    let mut rows = idle(&pool, &other)?;
    rows.extend(one_job(&client, &other, options)?);
    rows.extend(many_jobs(&pool, &client, &other, "Slurm as it comes", options)?);
    // Its ports are the same.
    drop(other);
    let tuned = Other::start(&scratch.path().join("tuned"), Setup::Tuned)?;
    rows.extend(many_jobs(&pool, &client, &tuned, "Slurm tuned for throughput", options)?);
    Ok(rows)
}

/// Slurm, or why it is not there.
struct Other(Result<Slurm, Absent>);

impl Other {
    fn start(dir: &Path, setup: Setup) -> Result<Self> {
        let there = Slurm::is_there().map(|()| Slurm::start(dir, NODES.len(), setup));
        Ok(Self(match there {
            Ok(started) => Ok(started?),
            Err(absent) => Err(absent),
        }))
    }

    fn there(&self) -> Result<(), Absent> {
        self.0.as_ref().map(|_| ()).map_err(|absent| *absent)
    }

    /// For those that only take turns where it is there.
    fn slurm(&self) -> Result<&Slurm> {
        self.0.as_ref().map_err(|absent| anyhow::anyhow!("Slurm: {absent}"))
    }
}

fn one_job(client: &Node, other: &Other, options: &Options) -> Result<Vec<Row>> {
    let submit = |request| Ok(latency::job(client, request)? / 1e3);
    let srun = |args: &[&str]| Ok(other.slurm()?.run(args)?.as_secs_f64());
    let unit = Unit::Seconds;
    let mut rows = Vec::new();
    for (what, request, args, goal_s) in [
        ("submit to done, one process", "[]", &["-n1"][..], ONE_PROCESS_GOAL_S),
        ("submit to done, gang on two nodes", "2:[v100]", &["-N2", "--gres=gpu:1"], GANG_GOAL_S),
    ] {
        let mut runners = [
            Runner::new("p2pit", unit, || submit(request)),
            Runner::new("Slurm, srun", unit, || srun(args)).if_there(other.there()),
        ];
        in_turns(&mut runners, WARM_UPS, options.turns.unwrap_or(TURNS))?;
        let found = Row::all(what, &runners).into_iter();
        rows.extend(found.map(|row| row.goal(Goal::Figure(goal_s))));
    }
    Ok(rows)
}

/// All submitted at once; as many run at once as the nodes have cores.
fn many_jobs(
    pool: &Pool,
    client: &Node,
    other: &Other,
    name: &'static str,
    options: &Options,
) -> Result<Vec<Row>> {
    let submitter = Submitter::new(client, &pool.path().join("empty"), "[]")?;
    let unit = Unit::JobsPerSecond;
    let mut runners = [
        Runner::new("p2pit", unit, || {
            let burst = submitter.submit(JOBS, JOBS, "[]", "true")?;
            let done_wall_ms = submitter.wait(&burst, DONE_WITHIN, LOOK_EVERY)?;
            let took_ms = done_wall_ms.saturating_sub(burst.started_wall_ms);
            Ok(JOBS as f64 / (took_ms as f64 / 1e3))
        }),
        Runner::new(name, unit, || Ok(JOBS as f64 / other.slurm()?.burst(JOBS)?))
            .if_there(other.there()),
    ];
    in_turns(&mut runners, 0, options.turns.unwrap_or(BURSTS))?;
    let rows = Row::all("200 jobs of one process at once", &runners).into_iter();
    Ok(rows.map(|row| row.goal(Goal::Figure(RATE_GOAL))).collect())
}

/// What a daemon takes while nothing is asked of it, all at the same time.
fn idle(pool: &Pool, other: &Other) -> Result<Vec<Row>> {
    let mut pids = vec![pool.node(NODES.len()).daemon().pid()];
    pids.extend(other.0.iter().flat_map(Slurm::pids));
    let mut idle = Idle::of_all(&pids)?.into_iter().map(|idle| {
        let memory = Figures::one(Unit::Mebibytes, idle.memory.rss_mib);
        (memory, Figures::one(Unit::PercentOfCore, idle.cpu_percent))
    });
    let (memory, cpu) = idle.next().context("no daemon was watched")?;
    let mut rows = [Vec::new(), Vec::new()];
    for name in ["slurmctld", "slurmd"] {
        let (other_memory, other_cpu) = match other.there() {
            Ok(()) => {
                let (memory, cpu) = idle.next().with_context(|| format!("no {name}"))?;
                (Ok(memory), Ok(cpu))
            }
            Err(absent) => (Err(absent), Err(absent)),
        };
        let row = Row::of("idle daemon, resident memory", memory.clone());
        rows[0].push(row.beside(name, other_memory).goal(Goal::Figure(MEMORY_GOAL_MIB)));
        let row = Row::of("idle daemon, processor", cpu.clone());
        rows[1].push(row.beside(name, other_cpu).goal(Goal::Figure(CPU_GOAL_PERCENT)));
    }
    Ok(rows.into_iter().flatten().collect())
}
