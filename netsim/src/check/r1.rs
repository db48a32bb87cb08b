//! R1: at one ballot of one epoch all keepers accept one value.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct OneValuePerBallot;

impl Checker for OneValuePerBallot {
    fn rule(&self) -> &'static str {
        "R1"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Voted { job, vote } = happening else { continue };
            let epoch = scene.ledger.registers.get(job).and_then(|r| r.epoch(vote.epoch));
            let votes = epoch.and_then(|epoch| epoch.votes.get(&vote.ballot));
            if votes.is_some_and(|votes| votes.len() > 1) {
                let text = format!(
                    "epoch {}: {} values at ballot {:?}",
                    vote.epoch,
                    votes.map_or(0, Vec::len),
                    vote.ballot
                );
                return Err(Broken::of(*job, text));
            }
        }
        Ok(())
    }
}
