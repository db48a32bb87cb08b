//! X5: one accepted result. How a rank ended never changes within its attempt, and it is how
//! the process of that attempt on the node that the record names really ended.

use p2pit_protocol::{
    JobId,
    bidder::WorkId,
    copies::NOT_COPIED,
    job::{Ending, RankEnd, RankRecord, RankState},
    record::Body,
};

use super::{Broken, Checker, Scene};

#[derive(Debug)]
pub(super) struct OneResult;

impl Checker for OneResult {
    fn rule(&self) -> &'static str {
        "X5"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some(values) = scene.ledger.chosen.get(&job) else { continue };
            let from = values.len().saturating_sub(8);
            for pair in values.get(from..).unwrap_or_default().windows(2) {
                let [before, after] = pair else { continue };
                look_at_change(scene, job, &before.body, &after.body)?;
            }
        }
        Ok(())
    }
}

fn look_at_change(
    scene: &Scene<'_>,
    job: JobId,
    before: &Body,
    after: &Body,
) -> Result<(), Broken> {
    if before.outcome.is_some() && before.outcome != after.outcome {
        let text = format!("its outcome was {:?}, and then {:?}", before.outcome, after.outcome);
        return Err(Broken::of(job, text));
    }
    if after.ranks.is_empty() || before.attempt > after.attempt {
        return Ok(());
    }
    for rank in after.ranks.iter().filter(|rank| rank.state == RankState::Ended) {
        let of_rank = |old: &&RankRecord| old.assignment.rank == rank.assignment.rank;
        let old = before.ranks.iter().find(of_rank).filter(|_| before.attempt == after.attempt);
        match old.filter(|old| old.state == RankState::Ended) {
            Some(old) if !is_same(old, rank) => {
                let text = format!("the end of rank {} changed", rank.assignment.rank);
                return Err(Broken::of(job, text));
            }
            Some(_) => {}
            None => look_at_end(scene, job, after, rank)?,
        }
    }
    Ok(())
}

/// Whether nothing about the end of a rank changed, but that what it left was given up.
fn is_same(old: &RankRecord, new: &RankRecord) -> bool {
    let given_up = |end: &RankEnd| end.note.as_ref().is_some_and(|n| n.starts_with(NOT_COPIED));
    let plain = |end: &RankEnd| RankEnd { note: None, keep: None, ..end.clone() };
    let same_end = match (&old.end, &new.end) {
        (Some(old), Some(new)) if given_up(new) => plain(old) == plain(new),
        (old, new) => old == new,
    };
    same_end && old.assignment == new.assignment
}

/// What a process did by itself is known for certain; of what was lost, nothing is.
fn look_at_end(
    scene: &Scene<'_>,
    job: JobId,
    body: &Body,
    rank: &RankRecord,
) -> Result<(), Broken> {
    let ending = rank.end.as_ref().map(|end| &end.ending);
    let Some(ending) = ending.filter(|ending| {
        matches!(
            ending,
            Ending::Exited { .. } | Ending::Signaled { .. } | Ending::TimedOut | Ending::LeaseEnded
        )
    }) else {
        return Ok(());
    };
    let id = WorkId { job, attempt: body.attempt, rank: rank.assignment.rank };
    let runs = scene.ledger.executions.get(&(job, id.rank)).into_iter().flatten();
    let mut of_record =
        runs.filter(|run| run.id == id && scene.machines[run.machine].peer == rank.assignment.node);
    if of_record.any(|run| run.ending.as_ref() == Some(ending)) {
        return Ok(());
    }
    let text = format!("the record has that {id:?} ended, {ending}; its process did not");
    Err(Broken::of(job, text))
}
