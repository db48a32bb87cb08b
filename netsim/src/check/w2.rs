//! W2: what others can make a node grow keeps its stated bound.

use p2pit_protocol::{
    bidder::TOMBSTONES_MAX,
    record::{EPOCHS_MAX, HISTORY_MAX, RECORDS_MAX},
};

use super::{Broken, Checker, Scene};

#[derive(Debug)]
pub(super) struct BoundsHold;

impl Checker for BoundsHold {
    fn rule(&self) -> &'static str {
        "W2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some(value) = scene.ledger.current(job) else { continue };
            let history = value.body.history.len();
            if history > HISTORY_MAX || value.epoch as usize > EPOCHS_MAX {
                let text = format!("a history of {history} in epoch {}", value.epoch);
                return Err(Broken::of(job, text));
            }
        }
        if !scene.surveys {
            return Ok(());
        }
        for (machine, peer) in scene.daemons() {
            let bounds = [
                ("records", peer.records().count(), RECORDS_MAX),
                ("tombstones", machine.tombstones, TOMBSTONES_MAX),
            ];
            for (what, got, max) in bounds {
                if got > max {
                    let name = machine.name();
                    return Err(Broken { job: None, text: format!("{name} has {got} {what}") });
                }
            }
        }
        Ok(())
    }
}
