//! D1: what is called submitted is kept by a quorum, and its inputs are on two nodes that
//! are not clients; on one where it has but one keeper, or where its keepers changed before the
//! submitter heard of it: that shows that it was born, and where it ran is a copy.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

/// Copies of the inputs.
const COPIES: usize = 2;

#[derive(Debug)]
pub(super) struct SubmittedIsSafe;

impl Checker for SubmittedIsSafe {
    fn rule(&self) -> &'static str {
        "D1"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Submitted(job) = happening else { continue };
            let Some(value) = scene.ledger.current(*job) else {
                return Err(Broken::of(*job, "submitted, and no quorum keeps it"));
            };
            let task = scene.workload.by_job.get(job).and_then(|t| scene.workload.tasks.get(*t));
            let Some(code) = task.map(|task| task.code) else { continue };
            let named = scene.ledger.registers.get(job).and_then(|register| register.epoch(0));
            let wanted = named.map_or(1, |epoch| epoch.keepers.len()).min(COPIES);
            let wanted = if value.epoch > 0 { 1 } else { wanted };
            let nodes = scene.machines.iter().filter(|machine| !machine.member.client);
            let copies = nodes.filter(|machine| machine.trees.contains(&code)).count();
            if copies < wanted {
                let text = format!("submitted with {copies} copies of its inputs, not {wanted}");
                return Err(Broken::of(*job, text));
            }
        }
        Ok(())
    }
}
