//! R3: once a value that seals its epoch is chosen, no other is chosen in that epoch.

use super::{Broken, Checker, Scene};
use crate::ledger::{Happening, Place, Quorum};

#[derive(Debug)]
pub(super) struct SealsEnd;

impl Checker for SealsEnd {
    fn rule(&self) -> &'static str {
        "R3"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Quorum { job, quorum: Quorum { epoch, value, place, .. } } = happening
            else {
                continue;
            };
            let sealed = scene.ledger.registers.get(job).and_then(|r| r.epoch(*epoch)?.sealed);
            if sealed.is_some_and(|sealed| sealed != *value) && *place != Place::Known {
                let text = format!("another value was chosen in epoch {epoch}, which is sealed");
                return Err(Broken::of(*job, text));
            }
        }
        Ok(())
    }
}
