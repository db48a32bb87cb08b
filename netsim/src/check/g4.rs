//! G4: no hold outlives its expiry, in true time: not even by a reboot, after which the
//! boot clock that the expiry is written in starts anew.

use super::{Broken, Checker, Scene};
use crate::machine::Machine;

/// What clocks of one machine may differ by over the time of one hold (0.1 %).
const DRIFT_MS: u64 = 20;

#[derive(Debug)]
pub(super) struct HoldsEnd;

impl Checker for HoldsEnd {
    fn rule(&self) -> &'static str {
        "G4"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        // Who stood still finds what was said to it first, and its timer among it.
        let late = |machine: &Machine| machine.went_on_ms == Some(scene.now_ms);
        for (machine, peer) in scene.touched().filter(|(machine, _)| !late(machine)) {
            for hold in peer.book().0 {
                let (name, id) = (machine.name(), hold.id);
                let Some(end_ms) = scene.ledger.hold_ends.get(&(machine.index, id)) else {
                    let text = format!("{name} has hold {id:?}, which it never wrote");
                    return Err(Broken::of(hold.key.job, text));
                };
                // At that very moment other events may come before the timer. After a reboot only
                // the wall clock knows the moment, and cannot be righter than it is.
                let slack_ms = DRIFT_MS + machine.clock.wall_error_ms();
                if scene.now_ms > end_ms + slack_ms {
                    let late_ms = scene.now_ms - end_ms;
                    let text = format!("{name} has hold {id:?} {late_ms} ms after its expiry");
                    return Err(Broken::of(hold.key.job, text));
                }
            }
        }
        Ok(())
    }
}
