//! Answers to people hold: what was refused never exists, what is submitted does, and a
//! job that is being stopped is never started anew.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct AnswersHold;

impl Checker for AnswersHold {
    fn rule(&self) -> &'static str {
        "answers"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            match happening {
                Happening::Refused(job) | Happening::Chosen(job)
                    if scene.ledger.refused.contains(job)
                        && scene.ledger.chosen.contains_key(job) =>
                {
                    return Err(Broken::of(*job, "it was refused, and exists"));
                }
                Happening::Submitted(job) if !scene.ledger.chosen.contains_key(job) => {
                    return Err(Broken::of(*job, "it was submitted, and does not exist"));
                }
                _ => {}
            }
        }
        for job in scene.chosen() {
            let stopped_at = scene.ledger.stops.get(&job);
            let attempt = scene.ledger.current(job).map(|value| value.body.attempt);
            if let (Some(stopped_at), Some(attempt)) = (stopped_at, attempt)
                && attempt > *stopped_at
            {
                let text = format!("stopped at attempt {stopped_at}, started as {attempt}");
                return Err(Broken::of(job, text));
            }
        }
        Ok(())
    }
}
