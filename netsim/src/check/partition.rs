//! A partition shorter than 150 s kills no job: where links were cut and nothing else was
//! wrong, no process is ended by its lease.

use p2pit_protocol::{bidder::LEASE_MS, job::Ending};

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

/// How long links may be cut.
const PARTITION_MS: u64 = 150_000;
/// How far back something may be to blame: a lease, and finding a new steward.
const BLAME_MS: u64 = LEASE_MS + 120_000;
/// Of a thousand messages, how many may be lost for the promise to be held to.
const LOSS_PERMILLE_MAX: u64 = 20;

#[derive(Debug)]
pub(super) struct PartitionsKillNothing;

impl Checker for PartitionsKillNothing {
    fn rule(&self) -> &'static str {
        "partition"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        if scene.options.loss_permille > LOSS_PERMILLE_MAX {
            return Ok(());
        }
        for happening in scene.happenings {
            let Happening::Gone(id) = happening else { continue };
            let runs = scene.ledger.executions.get(&(id.job, id.rank));
            let run = runs.into_iter().flatten().rev().find(|run| run.id == *id);
            let Some(run) = run.filter(|run| run.ending == Some(Ending::LeaseEnded)) else {
                continue;
            };
            let since_ms = scene.now_ms.saturating_sub(BLAME_MS);
            let keepers = scene.ledger.registers.get(&id.job).map(|register| register.keepers());
            let mut machines: Vec<usize> = keepers
                .into_iter()
                .flatten()
                .filter_map(|(peer, _)| scene.machines.iter().position(|m| m.peer == *peer))
                .collect();
            machines.push(run.machine);
            let mut cut_ms = 0;
            let mut all_cuts = true;
            for trouble in scene.troubles.of(&machines, since_ms) {
                all_cuts &= trouble.is_cut;
                cut_ms += trouble.to_ms.min(scene.now_ms) - trouble.from_ms.min(scene.now_ms);
            }
            if all_cuts && cut_ms < PARTITION_MS {
                let text = format!(
                    "its lease ended {id:?} after links were cut for {cut_ms} ms, and nothing \
                     else was wrong"
                );
                return Err(Broken::of(id.job, text));
            }
        }
        Ok(())
    }
}
