//! Liveness: where nothing is wrong any more, a job has a steward within 90 s.
//!
//! A keeper counts while its daemon is up, goes on, and is linked both ways with the others
//! that count; it takes a quorum of the record's keepers, with the stores the record names.

use std::collections::BTreeMap;

use p2pit_protocol::{
    JobId,
    record::{Keeper, quorum_of},
};

use super::{Broken, Checker, Scene};

/// How long a job may be without a steward.
const STEWARD_MS: u64 = 90_000;

#[derive(Debug, Default)]
pub(super) struct JobsHaveStewards {
    /// Since when a job had nobody who acts for it though it could have.
    since_ms: BTreeMap<JobId, u64>,
}

impl Checker for JobsHaveStewards {
    fn rule(&self) -> &'static str {
        "steward"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        if !scene.surveys {
            return Ok(());
        }
        let quiet = scene.healed_ms.is_some() || scene.options.is_quiet();
        if !quiet {
            return Ok(());
        }
        self.since_ms.retain(|job, _| scene.ledger.open.contains(job));
        for job in &scene.ledger.open {
            let acted = scene.ledger.acting.get(job).into_iter().flatten().any(|at| {
                let acts = scene.machines[*at].acting_at(scene.now_ms);
                acts.iter().any(|(acted, _)| acted == job)
            });
            let Some(register) = scene.ledger.registers.get(job) else { continue };
            if acted || !has_quorum(scene, register.keepers()) {
                self.since_ms.remove(job);
                continue;
            }
            let since_ms = *self.since_ms.entry(*job).or_insert(scene.now_ms);
            if scene.now_ms > since_ms + STEWARD_MS {
                let text = format!("nobody acts for it since {since_ms} ms, though a quorum could");
                return Err(Broken::of(*job, text));
            }
        }
        Ok(())
    }
}

fn has_quorum(scene: &Scene<'_>, keepers: &[Keeper]) -> bool {
    let up: Vec<usize> = keepers
        .iter()
        .filter_map(|(peer, store)| {
            let named = |m: &&crate::machine::Machine| m.peer == *peer && m.member.store == *store;
            scene.machines.iter().find(named).filter(|m| m.is_awake()).map(|m| m.index)
        })
        .collect();
    let linked =
        |a: usize, b: usize| a == b || !scene.network.is_cut(a, b) && !scene.network.is_cut(b, a);
    up.len() >= quorum_of(keepers.len()) && up.iter().all(|a| up.iter().all(|b| linked(*a, *b)))
}
