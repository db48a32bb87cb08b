//! X2: every process that exists is in a chosen record value: the one chosen last names
//! its rank on its node with its GPUs, told to start and not ended.

use p2pit_protocol::{
    JobId,
    job::{RankState, State},
};

use super::{Broken, Checker, Scene};
use crate::ledger::{Execution, Happening};

#[derive(Debug)]
pub(super) struct ProcessesAreChosen;

impl Checker for ProcessesAreChosen {
    fn rule(&self) -> &'static str {
        "X2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            match happening {
                Happening::Chosen(job) => look_at(scene, *job)?,
                Happening::Spawned(id) => look_at(scene, id.job)?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn look_at(scene: &Scene<'_>, job: JobId) -> Result<(), Broken> {
    // A machine that sleeps runs nothing, and ends what is overdue as it wakes.
    let mut awake = scene.ledger.live(job).filter(|run| !scene.sleeps(run.machine));
    match awake.find(|run| !is_chosen(scene, run)) {
        Some(run) => {
            let state = scene.ledger.current(job).map(|value| value.body.state());
            let text = format!("{run:?} is not in the record, which is at {state:?}");
            Err(Broken::of(job, text))
        }
        None => Ok(()),
    }
}

fn is_chosen(scene: &Scene<'_>, run: &Execution) -> bool {
    let Some(value) = scene.ledger.current(run.id.job) else { return false };
    let machine = &scene.machines[run.machine];
    let told_to_start = matches!(
        value.body.state(),
        State::Starting | State::Running | State::Stopping | State::Cleaning
    );
    let gpus = machine.executor.processes.get(&run.id).map(|process| &process.gpus);
    told_to_start
        && value.body.attempt == run.id.attempt
        && value.body.ranks.iter().any(|rank| {
            rank.assignment.rank == run.id.rank
                && rank.assignment.node == machine.peer
                && rank.state != RankState::Ended
                && gpus.is_none_or(|gpus| *gpus == rank.assignment.grant.gpus)
        })
}
