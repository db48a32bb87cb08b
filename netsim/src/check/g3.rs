//! G3: every commit in a book is named by a chosen record value, in every particular; and
//! what is shown to a bidder as chosen is.

use p2pit_protocol::bidder::Work;

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct CommitsAreChosen;

impl Checker for CommitsAreChosen {
    fn rule(&self) -> &'static str {
        "G3"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Shown { job, value } = happening else { continue };
            let register = scene.ledger.registers.get(job);
            if !register.is_some_and(|register| register.is_chosen(value)) {
                return Err(Broken::of(*job, "a value was shown that was never chosen"));
            }
        }
        for (machine, peer) in scene.touched() {
            for work in peer.book().1 {
                if work.assignment.node != machine.peer || !is_chosen(scene, work) {
                    let (name, id) = (machine.name(), work.id);
                    let text = format!("{name} is committed to {id:?}, which was never chosen");
                    return Err(Broken::of(id.job, text));
                }
            }
        }
        Ok(())
    }
}

fn is_chosen(scene: &Scene<'_>, work: &Work) -> bool {
    let values = scene.ledger.chosen.get(&work.id.job).into_iter().flatten();
    values
        .rev()
        .filter(|value| value.body.attempt == work.id.attempt)
        .any(|value| value.body.ranks.iter().any(|rank| rank.assignment == work.assignment))
}
