//! R5: what one store promises never decreases, and a keeper says only what its disk has.

use super::{Broken, Checker, Scene};
use crate::ledger::{Happening, Votes};

#[derive(Debug)]
pub(super) struct PromisesStay;

impl Checker for PromisesStay {
    fn rule(&self) -> &'static str {
        "R5"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            match happening {
                Happening::Promised { job, store, before, after } if after < before => {
                    let text = format!("{store:?} promised {before:?}, and then only {after:?}");
                    return Err(Broken::of(*job, text));
                }
                Happening::SaidPromise { job, store, promise } => {
                    let register = scene.ledger.registers.get(job);
                    let durable = register.and_then(|register| register.promises.get(store));
                    if durable.is_none_or(|durable| durable < promise) {
                        let text = format!(
                            "{store:?} says that it promised {promise:?}, and its disk has {durable:?}"
                        );
                        return Err(Broken::of(*job, text));
                    }
                }
                Happening::SaidVote { job, store, vote } => {
                    let of_value = |votes: &&Votes| votes.value == vote.value;
                    let epoch = scene.ledger.registers.get(job).and_then(|r| r.epoch(vote.epoch));
                    let votes = epoch.and_then(|epoch| epoch.votes.get(&vote.ballot));
                    let votes = votes.and_then(|votes| votes.iter().find(of_value));
                    if !votes.is_some_and(|votes| votes.stores.contains(store)) {
                        let text = format!(
                            "{store:?} gives a receipt for what its disk does not have: epoch {} \
                             at {:?}",
                            vote.epoch, vote.ballot
                        );
                        return Err(Broken::of(*job, text));
                    }
                }
                Happening::Garbled(job) => {
                    return Err(Broken::of(*job, "a keeper's entry cannot be read"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
