//! S2: a term has one steward, and terms only grow.

use super::{Broken, Checker, Scene};

#[derive(Debug)]
pub(super) struct TermsDiffer;

impl Checker for TermsDiffer {
    fn rule(&self) -> &'static str {
        "S2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some(values) = scene.ledger.chosen.get(&job) else { continue };
            let from = values.len().saturating_sub(8);
            for pair in values.get(from..).unwrap_or_default().windows(2) {
                let [before, after] = pair else { continue };
                let (old, new) = (&before.body, &after.body);
                let grows = old.term < new.term;
                if !grows && (old.term, old.steward) != (new.term, new.steward) {
                    let text = format!(
                        "{} was steward in term {}, and then {} in term {}",
                        old.steward, old.term, new.steward, new.term
                    );
                    return Err(Broken::of(job, text));
                }
            }
        }
        Ok(())
    }
}
