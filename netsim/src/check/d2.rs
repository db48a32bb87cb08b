//! D2: what a job that is done left is on as many disks as it should be: two, of a job that five
//! nodes keep three; fewer only where fewer can hold it, and none only where the record says that
//! it was lost.
//!
//! A node can hold it that runs a daemon of the pool, did not say lately that it cannot, and was
//! not away or cut off for so long that a steward gives it up. A node whose disk was emptied counts
//! as having what it had until everybody can know.

use p2pit_protocol::{
    JobId, PeerId,
    bidder::WorkId,
    copies::{CANNOT_MS, NOT_COPIED, candidates, copies_for},
    job::{RankRecord, State},
    peer::Slot,
    record::{Body, Keeper},
    steward::AWAY_MS,
};

use super::{Broken, Checker, Scene};
use crate::machine::Machine;

/// How much shorter than [`AWAY_MS`] a trouble is after which a node may have been given up:
/// clocks differ, and a cut is noticed late or early.
const AWAY_SLACK_MS: u64 = 90_000;

/// After how long everybody has heard that a machine came back with another disk.
const NOTICED_MS: u64 = 120_000;

#[derive(Debug)]
pub(super) struct DoneIsSafe;

impl Checker for DoneIsSafe {
    fn rule(&self) -> &'static str {
        "D2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some([.., before, last]) = scene.ledger.chosen.get(&job).map(Vec::as_slice) else {
                continue;
            };
            let body = &last.body;
            if body.state() != State::Done || before.body.state() == State::Done {
                continue;
            }
            if let Some((id, have, wanted)) = lacking(scene, job, body) {
                let text =
                    format!("done, and what {id:?} left is on {have} disks, not on {wanted}");
                return Err(Broken::of(job, text));
            }
        }
        Ok(())
    }
}

/// A rank of a job whose results are on too few disks: on how many, and on how many they should
/// be.
pub(crate) fn lacking(
    scene: &Scene<'_>,
    job: JobId,
    body: &Body,
) -> Option<(WorkId, usize, usize)> {
    let keepers = scene.ledger.registers.get(&job).map_or(&[][..], |register| register.keepers());
    body.ranks.iter().find_map(|rank| lacking_of_rank(scene, job, body, rank, keepers))
}

fn lacking_of_rank(
    scene: &Scene<'_>,
    job: JobId,
    body: &Body,
    record: &RankRecord,
    keepers: &[Keeper],
) -> Option<(WorkId, usize, usize)> {
    let end = record.end.as_ref().filter(|end| end.has_results())?;
    if end.note.as_ref().is_some_and(|note| note.starts_with(NOT_COPIED)) {
        return None;
    }
    let id = WorkId { job, attempt: body.attempt, rank: record.assignment.rank };
    let node = record.assignment.node;
    let (mut have, mut can) = (0, 0);
    let peers: Vec<PeerId> = keepers.iter().map(|(keeper, _)| *keeper).collect();
    for candidate in candidates(Some(node), &peers) {
        let machines = scene.machines.iter().filter(|machine| machine.peer == candidate);
        for machine in machines {
            let keeps = keepers.contains(&(machine.peer, machine.member.store))
                && machine.journal.contains_key(&Slot::Record(job).to_bytes());
            let has = machine.left.contains(&id) || is_emptied(scene, machine);
            have += usize::from(has);
            can += usize::from(has || (keeps && may_hold(scene, machine.index, job)));
        }
    }
    let wanted = copies_for(keepers.len()).min(can).max(1);
    (have < wanted).then_some((id, have, wanted))
}

/// Whether a machine lost its disk so lately that not everybody may know.
fn is_emptied(scene: &Scene<'_>, machine: &Machine) -> bool {
    let known_ms = machine.started_ms + NOTICED_MS;
    machine.wipes > 0 && (machine.daemon.is_none() || known_ms > scene.now_ms)
}

/// Whether a steward had no reason to give this machine up.
fn may_hold(scene: &Scene<'_>, at: usize, job: JobId) -> bool {
    let refused_ms = scene.ledger.refusals.get(&(at, job));
    let refused = refused_ms.is_some_and(|at_ms| at_ms + 2 * CANNOT_MS > scene.now_ms);
    let long_ms = AWAY_MS - AWAY_SLACK_MS;
    let since_ms = scene.now_ms.saturating_sub(AWAY_SLACK_MS);
    let away =
        scene.troubles.of(&[at], since_ms).any(|trouble| trouble.from_ms + long_ms <= scene.now_ms);
    !scene.machines[at].member.client && !refused && !away
}
