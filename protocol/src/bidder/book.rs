//! Arithmetic over what a node has and who has it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Hold, Work, WorkId};
use crate::{
    BlobId, HoldId, JobId, PeerId,
    inventory::{Capacity, GpuUuid},
    message::GpuState,
    sabotage::{Rule, Sabotage},
};

/// Who has what of this node.
#[derive(Debug, Default)]
pub(crate) struct Book {
    /// What the node offers.
    pub(crate) total: Capacity,
    /// GPUs that processes of others compute on.
    pub(crate) foreign: BTreeSet<GpuUuid>,
    /// Held and pinned.
    pub(crate) holds: BTreeMap<HoldId, Hold>,
    /// Committed to, or running.
    pub(crate) work: BTreeMap<WorkId, Work>,
    /// Trees that are here, all blobs of them.
    pub(crate) local_trees: BTreeSet<BlobId>,
    /// The same as calls name them.
    pub(crate) blinded_trees: BTreeSet<BlobId>,
}

impl Book {
    /// What nobody has.
    pub(crate) fn free(&self, sabotage: Sabotage) -> Capacity {
        let mut free = self.total.clone();
        free.gpus.retain(|gpu| !self.foreign.contains(&gpu.uuid));
        for hold in self.holds.values() {
            if !hold.pinned || sabotage.holds(Rule::TakenIsNotFree) {
                free = free.without(&hold.grant);
            }
        }
        if sabotage.holds(Rule::TakenIsNotFree) {
            for work in self.work.values() {
                free = free.without(&work.assignment.grant);
            }
        }
        free
    }

    pub(crate) fn used_cores(&self) -> u32 {
        self.work.values().map(|work| work.assignment.grant.cpu_cores).sum()
    }

    pub(crate) fn holds_of(&self, job: JobId, steward: PeerId) -> Vec<HoldId> {
        let ours = |hold: &&Hold| hold.key.job == job && hold.steward == steward;
        self.holds.values().filter(ours).map(|hold| hold.id).collect()
    }

    /// Jobs that have something here, each once.
    pub(crate) fn jobs(&self) -> Vec<JobId> {
        let work = self.work.keys().map(|id| id.job);
        let held = self.holds.values().map(|hold| hold.key.job);
        work.chain(held).collect::<BTreeSet<_>>().into_iter().collect()
    }

    pub(crate) fn gpu_job(&self, uuid: &GpuUuid) -> Option<JobId> {
        let work = self.work.values().map(|work| (&work.assignment.grant, work.id.job));
        let held = self.holds.values().map(|hold| (&hold.grant, hold.key.job));
        work.chain(held).find(|(grant, _)| grant.gpus.contains(uuid)).map(|(_, job)| job)
    }

    pub(crate) fn gpu_state(&self, uuid: &GpuUuid) -> GpuState {
        if self.gpu_job(uuid).is_some() {
            GpuState::Used
        } else if self.foreign.contains(uuid) {
            GpuState::Foreign
        } else {
            GpuState::Free
        }
    }
}
