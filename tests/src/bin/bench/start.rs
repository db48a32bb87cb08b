//! From nothing to a daemon that answers, with what it has kept.

use std::time::Instant;

use anyhow::{Context as _, Result};
use p2pit_tests::Pool;

use crate::{
    Options,
    slurm::{Setup, Slurm},
    table::{Goal, Row, Unit, timed},
    turns::{Runner, in_turns},
};

const TURNS: usize = 10;
const WARM_UPS: usize = 1;
const GOAL_S: f64 = 0.5;

const NODES: [&str; 3] = ["sim:1xv100"; 3];

pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let scratch = tempfile::Builder::new().prefix("p2pit-bench-").tempdir()?;
    let there = Slurm::is_there();
    let slurm = there.map(|()| Slurm::start(scratch.path(), NODES.len(), Setup::Default));
    let mut slurm = slurm.ok().transpose()?;
    let pool = Pool::of(&NODES);
    let mut runners = [
        Runner::new("p2pit", Unit::Seconds, || {
            let node = pool.node(NODES.len());
            node.shut_down();
            let start = Instant::now();
            timed(node.command().args(["join", "--detach"]))?;
            timed(node.command().args(["show", "me"]))?;
            Ok(start.elapsed().as_secs_f64())
        }),
        Runner::new("slurmd, until it listens", Unit::Seconds, || {
            let slurm = slurm.as_mut().context("Slurm does not run")?;
            Ok(slurm.restart_node()?.as_secs_f64())
        })
        .if_there(there),
    ];
    in_turns(&mut runners, WARM_UPS, options.turns.unwrap_or(TURNS))?;
    let rows = Row::all("start of a node's daemon until it answers", &runners).into_iter();
    Ok(rows.map(|row| row.goal(Goal::Figure(GOAL_S))).collect())
}
