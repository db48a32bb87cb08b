//! R2: the chosen values of a job form one chain from its birth on, which only grows at its
//! end.

use super::{Broken, Checker, Scene};
use crate::ledger::{Happening, Place, Quorum};

#[derive(Debug)]
pub(super) struct OneChain;

impl Checker for OneChain {
    fn rule(&self) -> &'static str {
        "R2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            match happening {
                Happening::Quorum { job, quorum: Quorum { epoch, ballot, value, place } }
                    if *place == Place::Nowhere =>
                {
                    let register = scene.ledger.registers.get(job);
                    let seq = register.and_then(|r| r.value(value)).map_or(0, |v| v.seq);
                    let last = scene.ledger.current(*job).map_or(0, |value| value.seq);
                    let text = format!(
                        "value {seq}, chosen in epoch {epoch} at {ballot:?}, does not follow \
                             from value {last}, which was chosen before"
                    );
                    return Err(Broken::of(*job, text));
                }
                Happening::Chosen(job) => look_at_chain(scene, *job)?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn look_at_chain(scene: &Scene<'_>, job: p2pit_protocol::JobId) -> Result<(), Broken> {
    let Some(values) = scene.ledger.chosen.get(&job) else { return Ok(()) };
    let recovered = |epoch| {
        let epoch = scene.ledger.registers.get(&job).and_then(|register| register.epoch(epoch));
        epoch.is_some_and(|epoch| epoch.forced)
    };
    // Several values may have become chosen in one event.
    for (index, value) in values.iter().enumerate().rev().take(8) {
        let before = index.checked_sub(1).and_then(|i| values.get(i));
        let (seq, prev, epoch) = match before {
            Some(before) => {
                let ends = u32::from(before.sealed.is_some());
                (before.seq + 1, before.hash(), before.epoch + ends)
            }
            None => (1, [0; 32], 0),
        };
        let follows = (value.seq, value.prev, value.epoch) == (seq, prev, epoch);
        if !follows && !recovered(value.epoch) {
            let text = format!("value {} does not follow value {}", value.seq, seq - 1);
            return Err(Broken::of(job, text));
        }
    }
    Ok(())
}
