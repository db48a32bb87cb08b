//! G1: no GPU is pinned for, committed to or running two things at once.

use std::collections::BTreeMap;

use p2pit_protocol::{JobId, Peer, inventory::GpuUuid};

use super::{Broken, Checker, Scene};
use crate::machine::Machine;

#[derive(Debug)]
pub(super) struct OneJobPerGpu;

impl Checker for OneJobPerGpu {
    fn rule(&self) -> &'static str {
        "G1"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for (machine, peer) in scene.touched() {
            look_at_book(machine, peer)?;
        }
        Ok(())
    }
}

fn look_at_book(machine: &Machine, peer: &Peer) -> Result<(), Broken> {
    let mut taken: BTreeMap<&GpuUuid, (JobId, String)> = BTreeMap::new();
    let (holds, work) = peer.book();
    let pinned = holds
        .filter(|hold| hold.pinned)
        .map(|hold| (hold.key.job, format!("pin {:?}", hold.id), &hold.grant.gpus));
    let committed = work.map(|work| {
        let what = format!("rank {} of attempt {}", work.id.rank, work.id.attempt);
        (work.id.job, what, &work.assignment.grant.gpus)
    });
    for (job, what, gpus) in pinned.chain(committed) {
        for gpu in gpus {
            if let Some((other, had)) = taken.insert(gpu, (job, what.clone())) {
                let name = machine.name();
                let text = format!("{gpu} of {name} is {had} of {other:?} and {what} of {job:?}");
                return Err(Broken::of(job, text));
            }
        }
    }
    for (id, process) in machine.executor.running() {
        for gpu in &process.gpus {
            if let Some((other, had)) = taken.get(gpu).filter(|(other, _)| *other != id.job) {
                let name = machine.name();
                let text = format!("{id:?} computes on {gpu} of {name}, {had} of {other:?}");
                return Err(Broken::of(id.job, text));
            }
        }
    }
    Ok(())
}
