//! D3: where an attempt is given up and another follows, the record names for each rank what that
//! attempt left, or a copy of its `keep/` that is not older than any that a keeper had held for a
//! while that ran undisturbed, as did the steward. Only said where no message is lost and no link
//! is slow: a steward asks five times and waits no longer than ten seconds.

use p2pit_protocol::{PeerId, bidder::WorkId, job::RankState, record::Body};

use super::{Broken, Checker, Scene};
use crate::world::copies::keep_at_end;

/// For how long keeper and steward must have been undisturbed, and the copy been there.
const QUIET_MS: u64 = 40_000;

#[derive(Debug)]
pub(super) struct RetriesGoOn;

impl Checker for RetriesGoOn {
    fn rule(&self) -> &'static str {
        "D3"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        if scene.options.loss_permille > 0 || scene.options.slow_links > 0 {
            return Ok(());
        }
        for job in scene.chosen() {
            let Some([.., before, last]) = scene.ledger.chosen.get(&job).map(Vec::as_slice) else {
                continue;
            };
            if last.body.retried == before.body.retried || before.body.ranks.is_empty() {
                continue;
            }
            let keepers = scene.ledger.registers.get(&job).map(|register| register.keepers());
            let keepers: Vec<PeerId> =
                keepers.unwrap_or_default().iter().map(|(keeper, _)| *keeper).collect();
            look_at_retry(scene, job, &before.body, &last.body, &keepers)?;
        }
        Ok(())
    }
}

fn look_at_retry(
    scene: &Scene<'_>,
    job: p2pit_protocol::JobId,
    before: &Body,
    after: &Body,
    keepers: &[PeerId],
) -> Result<(), Broken> {
    let since_ms = scene.now_ms.saturating_sub(QUIET_MS);
    let is_quiet = |at: usize| {
        let machine = &scene.machines[at];
        machine.is_awake() && scene.troubles.of(&[at], since_ms).next().is_none()
    };
    let steward = scene.machines.iter().find(|machine| machine.peer == after.steward);
    if !steward.is_some_and(|machine| is_quiet(machine.index)) {
        return Ok(());
    }
    for record in before.ranks.iter().filter(|record| record.state == RankState::Ended) {
        let id = WorkId { job, attempt: before.attempt, rank: record.assignment.rank };
        let quiet = scene
            .machines
            .iter()
            .filter(|machine| keepers.contains(&machine.peer) && is_quiet(machine.index));
        let held = quiet.filter_map(|machine| machine.saves.get(&id));
        let held = held.filter(|save| save.at_ms <= since_ms).map(|save| save.seq).max();
        let Some(held) = held else { continue };
        let named = after.saved.iter().filter(|saved| saved.rank == id.rank);
        let good = named.into_iter().any(|saved| {
            let save = scene.ledger.saves.get(&saved.tree);
            saved.tree == keep_at_end(id) || save.is_some_and(|(of, seq)| *of == id && *seq >= held)
        });
        if !good {
            let text = format!(
                "a keeper holds copy {held} of keep/ of {id:?}, and the next attempt is given {:?}",
                after.saved
            );
            return Err(Broken::of(job, text));
        }
    }
    Ok(())
}
