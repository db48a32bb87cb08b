//! R2: the values of a job form one chain, from its birth on.

use super::{Broken, Checker, Scene};

#[derive(Debug)]
pub(super) struct OneChain;

impl Checker for OneChain {
    fn rule(&self) -> &'static str {
        "R2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some(values) = scene.ledger.chosen.get(&job) else { continue };
            // Several values may have become durable in one event.
            for (index, value) in values.iter().enumerate().rev().take(8) {
                let (seq, prev) = match index.checked_sub(1).and_then(|i| values.get(i)) {
                    Some(before) => (before.seq + 1, before.hash()),
                    None => (1, [0; 32]),
                };
                if (value.seq, value.prev) != (seq, prev) {
                    let text = format!("value {} does not follow value {}", value.seq, seq - 1);
                    return Err(Broken::of(job, text));
                }
            }
        }
        Ok(())
    }
}
