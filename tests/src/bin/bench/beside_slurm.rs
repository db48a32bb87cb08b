//! Jobs beside Slurm's: how soon one is done, and what it costs to be there.

use anyhow::{Context as _, Result};
use p2pit_tests::Pool;

use crate::{
    Options,
    idle::Idle,
    latency,
    slurm::{Setup, Slurm},
    table::{Absent, Figures, Goal, Row, Unit},
    turns::{Runner, in_turns},
};

const TURNS: usize = 30;
const WARM_UPS: usize = 3;

const ONE_PROCESS_GOAL_S: f64 = 0.060;
const GANG_GOAL_S: f64 = 0.080;
const MEMORY_GOAL_MIB: f64 = 30.0;
const CPU_GOAL_PERCENT: f64 = 0.5;

/// As many nodes on both sides, with one GPU and four cores each.
const NODES: [&str; 3] = ["sim:1xv100"; 3];

pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let turns = options.turns.unwrap_or(TURNS);
    let scratch = tempfile::Builder::new().prefix("p2pit-bench-").tempdir()?;
    let there = Slurm::is_there();
    let slurm = there.map(|()| Slurm::start(scratch.path(), NODES.len(), Setup::Default));
    let slurm = slurm.ok().transpose()?;
    let mut pool = Pool::of(&NODES);
    let client = pool.add_client("client");

    let mut rows = idle(&pool, slurm.as_ref(), there)?;
    let run = |args: &[&str]| {
        let slurm = slurm.as_ref().context("Slurm does not run")?;
        Ok(slurm.run(args)?.as_secs_f64())
    };
    let submit = |request| Ok(latency::job(&client, request)? / 1e3);
    let unit = Unit::Seconds;
    let mut one_process = [
        Runner::new("p2pit", unit, || submit("[]")),
        Runner::new("Slurm, srun", unit, || run(&["-n1"])).if_there(there),
    ];
    let mut gang = [
        Runner::new("p2pit", unit, || submit("2:[v100]")),
        Runner::new("Slurm, srun", unit, || run(&["-N2", "--gres=gpu:1"])).if_there(there),
    ];
    for (what, runners, goal) in [
        ("submit to done, one process", &mut one_process, ONE_PROCESS_GOAL_S),
        ("submit to done, two processes on two nodes", &mut gang, GANG_GOAL_S),
    ] {
        in_turns(runners, WARM_UPS, turns)?;
        let found = Row::all(what, runners).into_iter();
        rows.extend(found.map(|row| row.goal(Goal::Figure(goal))));
    }
    Ok(rows)
}

/// What a daemon takes while nothing is asked of it, all at the same time.
fn idle(pool: &Pool, slurm: Option<&Slurm>, there: Result<(), Absent>) -> Result<Vec<Row>> {
    let mut pids = vec![pool.node(NODES.len()).daemon().pid()];
    pids.extend(slurm.map(Slurm::pids).into_iter().flatten());
    let mut idle = Idle::of_all(&pids)?.into_iter().map(|idle| {
        let memory = Figures::one(Unit::Mebibytes, idle.memory.rss_mib);
        (memory, Figures::one(Unit::PercentOfCore, idle.cpu_percent))
    });
    let (memory, cpu) = idle.next().context("no daemon was watched")?;
    let mut rows = [Vec::new(), Vec::new()];
    for name in ["slurmctld", "slurmd"] {
        let (other_memory, other_cpu) = match there {
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
