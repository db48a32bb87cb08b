//! X6: nothing runs past its lease and the time for ending it.
//!
//! The lease is what stewards granted, as the messages say that reached the node, not what
//! its daemon made of them.

use super::{Broken, Checker, Scene};
use crate::ledger::{Execution, Happening};

/// From the end of a lease to when nothing may be left, with a little for clocks of 0.1 %.
const GRACE_MS: u64 = p2pit_protocol::bidder::LEASE_GRACE_MS + 1_000;

#[derive(Debug)]
pub(super) struct LeasesEnd;

impl Checker for LeasesEnd {
    fn rule(&self) -> &'static str {
        "X6"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Gone(id) = happening else { continue };
            let runs = scene.ledger.executions.get(&(id.job, id.rank));
            let run = runs.into_iter().flatten().rev().find(|run| run.id == *id);
            run.map_or(Ok(()), |run| look_at(scene, run, run.to_ms.unwrap_or(scene.now_ms)))?;
        }
        if scene.surveys {
            for job in &scene.ledger.open {
                for run in scene.ledger.live(*job) {
                    // A machine that sleeps ends nothing, and runs nothing either.
                    if scene.machines[run.machine].still.is_none() {
                        look_at(scene, run, scene.now_ms)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn look_at(scene: &Scene<'_>, run: &Execution, to_ms: u64) -> Result<(), Broken> {
    // A neighbour's reboot must not end a healthy job: so few keepers lift every lease.
    let register = scene.ledger.registers.get(&run.id.job);
    if register.is_none_or(|register| register.keepers().len() <= 2) {
        return Ok(());
    }
    let granted = scene.ledger.grants.get(&(run.id.job, run.id.attempt, run.machine));
    let until_ms = granted.copied().unwrap_or(run.from_ms);
    // Asleep, it could not be ended; it ends as soon as it is awake.
    let awake_ms = scene.woke_ms(run.machine).unwrap_or(0);
    let end_ms = until_ms.max(awake_ms).saturating_add(GRACE_MS);
    if to_ms > end_ms {
        let name = scene.machines[run.machine].name();
        let text = format!("{:?} runs on {name} at {to_ms} ms, granted to {until_ms} ms", run.id);
        return Err(Broken::of(run.id.job, text));
    }
    Ok(())
}
