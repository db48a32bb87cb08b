//! S1: at any true time at most one machine acts for a job.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct OneSteward;

impl Checker for OneSteward {
    fn rule(&self) -> &'static str {
        "S1"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Acts { job, at } = happening else { continue };
            let Some(machines) = scene.ledger.acting.get(job) else { continue };
            // A machine may have fallen silent since it last did anything.
            for other in machines.iter().filter(|other| *other != at) {
                let machine = &scene.machines[*other];
                let acts = machine.acting_at(scene.now_ms);
                if let Some((_, term)) = acts.iter().find(|(acted, _)| acted == job) {
                    let (name, this) = (machine.name(), scene.machines[*at].name());
                    let text = format!("{this} began to act, and {name} still does in term {term}");
                    return Err(Broken::of(*job, text));
                }
            }
        }
        Ok(())
    }
}
