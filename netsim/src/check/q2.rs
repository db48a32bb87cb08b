//! Q2: a pin is never wounded.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct PinsStay;

impl Checker for PinsStay {
    fn rule(&self) -> &'static str {
        "Q2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            if let Happening::Wounded { job, by, pinned: true } = happening {
                return Err(Broken::of(*job, format!("its pin was taken by {by:?}")));
            }
        }
        Ok(())
    }
}
