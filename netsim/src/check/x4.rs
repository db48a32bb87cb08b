//! X4: all ranks of an attempt start or none stays. The gang is told to start only when
//! every rank is prepared, it is called running only when every rank ran, and a gang that
//! did not start whole does not stay: a while after faults end nothing of it runs.

use std::collections::BTreeMap;

use p2pit_protocol::{
    JobId,
    bidder::WorkId,
    job::{Attempt, State},
    record::Body,
};

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

/// How long part of a gang may run, once nothing keeps it from being stopped.
const PART_MS_MAX: u64 = 5 * 60_000;

#[derive(Debug, Default)]
pub(super) struct WholeOrNothing {
    /// Attempts of which a part runs, with the time of its first process.
    parts: BTreeMap<(JobId, Attempt), u64>,
}

impl Checker for WholeOrNothing {
    fn rule(&self) -> &'static str {
        "X4"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some(value) = scene.ledger.current(job) else { continue };
            match value.body.state() {
                State::Starting => look_at_start(scene, job, &value.body)?,
                State::Running => look_at_running(scene, job, &value.body)?,
                _ => {}
            }
        }
        for happening in scene.happenings {
            if let Happening::Spawned(id) = happening {
                self.parts.entry((id.job, id.attempt)).or_insert(scene.now_ms);
            }
        }
        if !scene.happenings.is_empty() {
            self.look_at_parts(scene)?;
        }
        Ok(())
    }
}

impl WholeOrNothing {
    fn look_at_parts(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        self.parts.retain(|(job, attempt), _| {
            let live = scene.ledger.live(*job).any(|run| run.id.attempt == *attempt);
            live && !is_whole(scene, *job, *attempt)
        });
        let Some(healed_ms) = scene.healed_ms else { return Ok(()) };
        for ((job, attempt), since_ms) in &self.parts {
            if scene.now_ms > healed_ms.max(*since_ms) + PART_MS_MAX {
                let text = format!("only a part of attempt {attempt} runs, since {since_ms} ms");
                return Err(Broken::of(*job, text));
            }
        }
        Ok(())
    }
}

fn look_at_start(scene: &Scene<'_>, job: JobId, body: &Body) -> Result<(), Broken> {
    match ids(job, body).find(|id| !scene.ledger.prepared.contains(id)) {
        Some(id) => {
            Err(Broken::of(job, format!("told to start while rank {} is not prepared", id.rank)))
        }
        None => Ok(()),
    }
}

fn look_at_running(scene: &Scene<'_>, job: JobId, body: &Body) -> Result<(), Broken> {
    match ids(job, body).find(|id| !scene.ledger.ran(*id)) {
        Some(id) => Err(Broken::of(job, format!("running while rank {} never ran", id.rank))),
        None => Ok(()),
    }
}

fn is_whole(scene: &Scene<'_>, job: JobId, attempt: Attempt) -> bool {
    let Some(value) = scene.ledger.current(job) else { return false };
    value.body.attempt == attempt && ids(job, &value.body).all(|id| scene.ledger.ran(id))
}

fn ids(job: JobId, body: &Body) -> impl Iterator<Item = WorkId> + '_ {
    let attempt = body.attempt;
    body.ranks.iter().map(move |rank| WorkId { job, attempt, rank: rank.assignment.rank })
}
