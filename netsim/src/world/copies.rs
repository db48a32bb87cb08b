//! Copies as nodes make them: what ranks leave and save, what holders fetch, and what is lost.
//!
//! A tree or a log is here or it is not; how it travels is not simulated, only that it takes
//! time, needs a source that has it and can be reached, and room.

use p2pit_protocol::{
    BlobId, JobId,
    bidder::WorkId,
    copies::{CopyOrder, RankOrder},
    job::{Ending, RankEnd},
};

use super::{Occurrence, World};
use crate::machine::{ProcessState, Save};

/// Bytes that every simulated log has in the end.
const LOG_BYTES: u64 = 4_096;
/// Between two tries to copy what could not be copied.
const RETRY_MS: (u64, u64) = (1_000, 3_000);
/// Why a machine without room makes no copies.
const NO_ROOM: &str = "no room";

/// The tree that a rank left when it ended.
#[must_use]
pub fn keep_at_end(id: WorkId) -> BlobId {
    tree_of(id, u64::MAX)
}

/// The tree of a copy of a rank's `keep/`.
fn tree_of(id: WorkId, seq: u64) -> BlobId {
    let WorkId { job, attempt, rank } = id;
    let numbers = [u64::from(attempt.0), u64::from(rank.0), seq].map(u64::to_le_bytes).concat();
    BlobId::of(&[&job.0[..], &numbers].concat())
}

impl World {
    // ---- the machine that runs a rank ---------------------------------------------------

    /// A process began: its `keep/` is copied now and then.
    pub(super) fn plan_save(&mut self, at: usize, id: WorkId) {
        let every_ms = self.behaviour_of(id).keep_every_ms;
        if every_ms > 0 {
            self.after(every_ms, Occurrence::Save { at, id });
        }
    }

    pub(super) fn save(&mut self, at: usize, id: WorkId) {
        let process = self.machines[at].executor.processes.get(&id);
        if process.is_none_or(|process| process.state != ProcessState::Running) {
            return;
        }
        self.plan_save(at, id);
        let now_ms = self.now_ms;
        let machine = &mut self.machines[at];
        if !machine.is_awake() || machine.disk_full || machine.no_room {
            return;
        }
        let seq = machine.saves.get(&id).map_or(1, |save| save.seq + 1);
        let tree = tree_of(id, seq);
        machine.saves.insert(id, Save { seq, tree, at_ms: now_ms, own: true });
        self.ledger.saves.insert(tree, (id, seq));
        self.mix("save", at, &[&tree.0]);
        self.with_daemon(at, |peer, now| peer.saved(id, seq, tree, now));
    }

    /// What a process left is gathered on the disk of its machine.
    pub(super) fn leave_results(
        &mut self,
        at: usize,
        id: WorkId,
        ending: Ending,
        wall_ms: u64,
    ) -> RankEnd {
        self.machines[at].left.insert(id);
        RankEnd {
            log_bytes: LOG_BYTES,
            keep: Some(keep_at_end(id)),
            ..RankEnd::bare(ending, wall_ms)
        }
    }

    // ---- holders --------------------------------------------------------------------------

    pub(super) fn plan_copy(&mut self, at: usize, job: JobId) {
        if self.machines[at].copying.insert(job) {
            let ms = self.copies.between(5, self.options.copy_ms_max.max(5));
            let start = self.machines[at].starts;
            self.after(ms, Occurrence::Copy { at, start, job });
        }
    }

    pub(super) fn copy(&mut self, at: usize, start: u64, job: JobId) {
        if self.machines[at].starts != start {
            return;
        }
        self.machines[at].copying.remove(&job);
        let wanted = self.machines[at].daemon.as_ref().and_then(|peer| peer.copies_wanted(job));
        let Some(order) = wanted else { return };
        let (now_ms, name) = (self.now_ms, self.machines[at].name());
        self.trace.say(now_ms, Some(job), || format!("{name} copies: {:?}", order.ranks));
        self.mix("copy", at, &[&job.0]);
        if self.machines[at].no_room || self.machines[at].disk_full {
            self.cannot_copy(at, job, NO_ROOM);
            return;
        }
        self.copy_inputs(at, &order);
        let mut lacking = false;
        for rank in &order.ranks {
            lacking |= !self.copy_rank(at, job, rank);
        }
        let hopeless = order.ranks.iter().any(|rank| {
            let id = WorkId { job, attempt: rank.attempt, rank: rank.rank };
            rank.end.is_some() && self.is_nowhere(at, id, rank)
        });
        if hopeless {
            self.cannot_copy(at, job, "no source has it");
        } else if lacking && self.machines[at].copying.insert(job) {
            let ms = self.copies.between(RETRY_MS.0, RETRY_MS.1);
            self.after(ms, Occurrence::Copy { at, start, job });
        }
    }

    fn cannot_copy(&mut self, at: usize, job: JobId, reason: &str) {
        let (now_ms, name) = (self.now_ms, self.machines[at].name());
        self.trace.say(now_ms, Some(job), || format!("{name} cannot copy: {reason}"));
        self.ledger.refusals.insert((at, job), now_ms);
        self.with_daemon(at, |peer, now| peer.cannot_copy(job, reason.to_owned(), now));
    }

    fn copy_inputs(&mut self, at: usize, order: &CopyOrder) {
        for tree in order.spec.inputs().filter(|_| order.inputs) {
            let sources = 0..self.machines.len();
            let has = |source: usize| self.machines[source].trees.contains(&tree);
            let source =
                sources.into_iter().find(|source| has(*source) && self.is_linked(at, *source));
            if source.is_some() && self.machines[at].trees.insert(tree) {
                self.with_daemon(at, |peer, _| peer.tree_stored(tree));
            }
        }
    }

    /// Whether all of it that can be had now is here.
    fn copy_rank(&mut self, at: usize, job: JobId, order: &RankOrder) -> bool {
        let (attempt, rank) = (order.attempt, order.rank);
        let id = WorkId { job, attempt, rank };
        let sources = order.sources.iter().filter_map(|source| self.machine_of(*source));
        let sources: Vec<usize> = sources.filter(|source| self.is_linked(at, *source)).collect();
        let mut all = true;
        if order.end.is_some() {
            let here = self.machines[at].left.contains(&id)
                || sources.iter().any(|source| self.machines[*source].left.contains(&id));
            if here {
                self.machines[at].left.insert(id);
                self.counts.copies += 1;
                self.moved_ms = self.now_ms;
                let (now_ms, name) = (self.now_ms, self.machines[at].name());
                self.trace.say(now_ms, Some(job), || format!("{name} copied {attempt}.{rank}"));
                self.with_daemon(at, |peer, now| peer.copied(job, attempt, rank, now));
            }
            all &= here;
        }
        if let Some(wanted) = order.save {
            let of = |source: &usize| self.machines[*source].saves.get(&id).copied();
            let found = sources.iter().filter_map(of).find(|save| save.seq >= wanted.seq);
            if let Some(Save { seq, tree, .. }) = found {
                let save = Save { seq, tree, at_ms: self.now_ms, own: false };
                self.machines[at].saves.insert(id, save);
                self.counts.saves += 1;
                self.with_daemon(at, |peer, now| {
                    peer.save_held(job, attempt, rank, seq, tree, now);
                });
            }
            all &= found.is_some();
        }
        all
    }

    /// Whether every source can be reached and lacks what a rank left.
    fn is_nowhere(&self, at: usize, id: WorkId, order: &RankOrder) -> bool {
        let mut sources = order.sources.iter().filter_map(|source| self.machine_of(*source));
        sources
            .all(|source| self.is_linked(at, source) && !self.machines[source].left.contains(&id))
            && !self.machines[at].left.contains(&id)
    }

    /// A daemon that starts tells what is on its disk.
    pub(super) fn tell_what_is_held(&mut self, at: usize) {
        let machine = &self.machines[at];
        let left: Vec<WorkId> = machine.left.iter().copied().collect();
        let saves: Vec<(WorkId, Save)> = machine.saves.iter().map(|(id, s)| (*id, *s)).collect();
        for id in left {
            let WorkId { job, attempt, rank } = id;
            self.with_daemon(at, |peer, now| peer.copied(job, attempt, rank, now));
        }
        for (id, Save { seq, tree, own, .. }) in saves {
            let WorkId { job, attempt, rank } = id;
            self.with_daemon(at, |peer, now| {
                if own {
                    peer.saved(id, seq, tree, now);
                } else {
                    peer.save_held(job, attempt, rank, seq, tree, now);
                }
            });
        }
    }

    // ---- what goes wrong ------------------------------------------------------------------

    /// There is no room for copies on a machine for some time.
    pub fn take_room(&mut self, at: usize, for_ms: u64) {
        if self.healed_ms.is_some() {
            return;
        }
        self.machines[at].no_room = true;
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, None, || format!("{name}: no room for copies, {for_ms} ms"));
        self.after(for_ms, Occurrence::GiveRoom { at });
    }

    /// Copies on a machine's disk go bad, and its daemon notices.
    pub fn lose_copies(&mut self, at: usize) {
        if self.healed_ms.is_some() || self.machines[at].still.is_some() {
            return;
        }
        // While a job still waits for its copies a loss may come too late for its steward.
        let own = self.machines[at].peer;
        let ran = |id: &WorkId| {
            let runs = self.ledger.executions.get(&(id.job, id.rank)).into_iter().flatten();
            runs.into_iter().any(|run| run.id == *id && self.machines[run.machine].peer == own)
        };
        let elsewhere = |id: &WorkId| {
            let mut others = self.machines.iter().filter(|machine| machine.index != at);
            others.any(|machine| machine.left.contains(id))
        };
        let done = |id: &&WorkId| !ran(id) && elsewhere(id) && self.ledger.is_done(id.job);
        let lost: Vec<WorkId> = self.machines[at].left.iter().filter(done).copied().collect();
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, None, || format!("{name} loses {} copies", lost.len()));
        for id in lost {
            self.machines[at].left.remove(&id);
            self.machines[at].saves.remove(&id);
            let WorkId { job, attempt, rank } = id;
            self.with_daemon(at, |peer, now| peer.copy_lost(job, attempt, rank, now));
        }
    }
}
