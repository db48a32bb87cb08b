//! Arithmetic over what a node has and who has it.

use core::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use super::{Hold, Work, WorkId};
use crate::{
    BlobId, HoldId, JobId, PeerId,
    inventory::{Capacity, Gpu, GpuUuid},
    message::GpuState,
    request::Grant,
    sabotage::{Rule, Sabotage},
};

/// GPUs that are not free, free cores, free MiB.
pub(crate) type Usage = (Vec<(GpuUuid, GpuState)>, u32, u64);

/// Who has what of this node. To be changed by its methods only: what follows from it is
/// worked out once between two changes, since it is asked for after every message.
#[derive(Debug, Clone)]
pub(crate) struct Book {
    sabotage: Sabotage,
    /// What the node offers.
    pub(super) total: Capacity,
    /// GPUs that processes of others compute on.
    pub(super) foreign: BTreeSet<GpuUuid>,
    /// Held and pinned.
    pub(crate) holds: BTreeMap<HoldId, Hold>,
    /// Committed to, or running.
    pub(crate) work: BTreeMap<WorkId, Work>,
    /// Trees that are here, all blobs of them.
    pub(crate) local_trees: BTreeSet<BlobId>,
    /// The same as calls name them.
    pub(crate) blinded_trees: BTreeSet<BlobId>,
    free: OnceCell<Capacity>,
    usage: OnceCell<Usage>,
}

impl Book {
    pub(super) fn new(sabotage: Sabotage) -> Self {
        Self {
            sabotage,
            total: Capacity::default(),
            foreign: BTreeSet::new(),
            holds: BTreeMap::new(),
            work: BTreeMap::new(),
            local_trees: BTreeSet::new(),
            blinded_trees: BTreeSet::new(),
            free: OnceCell::new(),
            usage: OnceCell::new(),
        }
    }

    pub(super) fn set_total(&mut self, total: Capacity) {
        self.total = total;
        self.changed();
    }

    pub(super) fn set_foreign(&mut self, foreign: BTreeSet<GpuUuid>) {
        self.foreign = foreign;
        self.changed();
    }

    pub(super) fn put_hold(&mut self, hold: Hold) {
        self.holds.insert(hold.id, hold);
        self.changed();
    }

    /// To pin it or to renew it.
    pub(super) fn hold_mut(&mut self, id: HoldId) -> Option<&mut Hold> {
        self.changed();
        self.holds.get_mut(&id)
    }

    pub(super) fn remove_hold(&mut self, id: HoldId) -> Option<Hold> {
        self.changed();
        self.holds.remove(&id)
    }

    pub(super) fn put_work(&mut self, work: Work) {
        self.work.insert(work.id, work);
        self.changed();
    }

    pub(super) fn remove_work(&mut self, id: WorkId) -> Option<Work> {
        self.changed();
        self.work.remove(&id)
    }

    fn changed(&mut self) {
        self.free.take();
        self.usage.take();
    }

    /// What the node offers.
    pub(crate) fn total(&self) -> &Capacity {
        &self.total
    }

    /// What nobody has.
    pub(crate) fn free(&self) -> &Capacity {
        self.free.get_or_init(|| {
            let all = self.sabotage.holds(Rule::TakenIsNotFree);
            let held = self.holds.values().filter(|hold| !hold.pinned || all);
            let work = self.work.values().filter(|_| all);
            let grants: Vec<&Grant> =
                held.map(|h| &h.grant).chain(work.map(|w| &w.assignment.grant)).collect();
            let taken: BTreeSet<&GpuUuid> = grants.iter().flat_map(|grant| &grant.gpus).collect();
            let is_free =
                |gpu: &&Gpu| !self.foreign.contains(&gpu.uuid) && !taken.contains(&gpu.uuid);
            let cores = |left: u32, grant: &&Grant| left.saturating_sub(grant.cpu_cores);
            let ram = |left: u64, grant: &&Grant| left.saturating_sub(grant.ram_mib);
            Capacity {
                gpus: self.total.gpus.iter().filter(is_free).cloned().collect(),
                cpu_cores: grants.iter().fold(self.total.cpu_cores, cores),
                ram_mib: grants.iter().fold(self.total.ram_mib, ram),
            }
        })
    }

    /// What an advert says about use.
    pub(crate) fn usage(&self) -> &Usage {
        self.usage.get_or_init(|| {
            let free = self.free();
            let used: BTreeSet<&GpuUuid> =
                self.grants().flat_map(|(_, grant)| &grant.gpus).collect();
            let not_free = self.total.gpus.iter().filter_map(|gpu| {
                let state = if used.contains(&gpu.uuid) {
                    GpuState::Used
                } else if self.foreign.contains(&gpu.uuid) {
                    GpuState::Foreign
                } else {
                    return None;
                };
                Some((gpu.uuid.clone(), state))
            });
            (not_free.collect(), free.cpu_cores, free.ram_mib)
        })
    }

    /// What is given to whom, by work first.
    fn grants(&self) -> impl Iterator<Item = (JobId, &Grant)> {
        let work = self.work.values().map(|work| (work.id.job, &work.assignment.grant));
        work.chain(self.holds.values().map(|hold| (hold.key.job, &hold.grant)))
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
        self.grants().find(|(_, grant)| grant.gpus.contains(uuid)).map(|(job, _)| job)
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
