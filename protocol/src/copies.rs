//! Who holds copies of a job's inputs, logs and results, and what this node holds itself.
//!
//! A rule without state says who should: see [`holders`]. Every keeper applies it to every
//! record it keeps, by itself, also when the job is over; so that repair needs neither a leader
//! nor any traffic but the copy. The node around the peer carries out what
//! [`crate::Peer::copies_wanted`] says, and tells what came of it.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    BlobId, JobId, Now, PeerId,
    bidder::WorkId,
    job::{Attempt, Rank, Saved, VerifiedSpec},
    message::CopyState,
    record::{KEEP_MS, Link},
};

/// On how many nodes the log and the results of each rank are before the job is done, where so
/// many can hold them.
pub const COPIES: usize = 2;
/// The same, of a job that five nodes keep.
pub const COPIES_OF_FIVE: usize = 3;
/// Nodes that hold the inputs of a job that is not over.
pub const INPUT_HOLDERS: usize = 2;
/// How long a node that said it cannot hold something is left out.
pub const CANNOT_MS: u64 = 10 * 60_000;

/// On how many nodes the results of a job are that so many nodes keep.
#[must_use]
pub const fn copies_for(keepers: usize) -> usize {
    if keepers >= 5 { COPIES_OF_FIVE } else { COPIES }
}

/// Who may hold what the rank that ran on `node` left, the first before the others: that node,
/// then the keepers.
pub fn candidates(node: PeerId, keepers: &[PeerId]) -> impl Iterator<Item = PeerId> + '_ {
    core::iter::once(node).chain(keepers.iter().copied().filter(move |keeper| *keeper != node))
}

/// Who should hold what the rank that ran on `node` left: the first candidates of whom
/// `is_present` says so, as many as [`copies_for`] says.
pub fn holders(
    node: PeerId,
    keepers: &[PeerId],
    is_present: impl Fn(PeerId) -> bool,
) -> Vec<PeerId> {
    candidates(node, keepers)
        .filter(|candidate| is_present(*candidate))
        .take(copies_for(keepers.len()))
        .collect()
}

/// What this node is to hold of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOrder {
    /// The job.
    pub spec: Arc<VerifiedSpec>,
    /// From the spec's keepers to those of now: they show that this node is one of them.
    pub links: Vec<Link>,
    /// The trees of [`VerifiedSpec::inputs`] are to be here.
    pub inputs: bool,
    /// What the next attempt begins with, to be here like the inputs; empty where `inputs` is
    /// not set.
    pub saved: Vec<Saved>,
    /// Ranks of the current attempt that ran elsewhere, or do.
    pub ranks: Vec<RankOrder>,
}

/// What this node is to hold of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankOrder {
    /// The rank.
    pub rank: Rank,
    /// The attempt.
    pub attempt: Attempt,
    /// The node that runs or ran it.
    pub node: PeerId,
    /// Whom to ask: that node, then the other keepers.
    pub sources: Vec<PeerId>,
    /// What it left, once it ended: when all of it is here and durable,
    /// [`crate::Peer::copied`] is to be said.
    pub end: Option<EndOrder>,
    /// The newest copy of its `keep/` from while its process runs: when it is here and durable,
    /// [`crate::Peer::save_held`] is to be said.
    pub save: Option<SaveOrder>,
    /// Its log may still grow: it is to be followed.
    pub follow: bool,
}

/// What a rank left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOrder {
    /// How many bytes of its log there must be at the least.
    pub log_bytes: u64,
    /// Its `keep/`, as a tree.
    pub keep: Option<BlobId>,
    /// Its artifacts, as a tree.
    pub artifacts: Option<BlobId>,
}

/// A copy of `keep/` from while the process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOrder {
    /// Its number within the attempt.
    pub seq: u64,
    /// The directory, as a tree.
    pub tree: BlobId,
}

/// What is here of one rank, durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    complete: bool,
    save: Option<(u64, BlobId)>,
}

/// What this node is to hold of a job; see [`CopyOrder`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Duty {
    pub(crate) inputs: bool,
    pub(crate) saved: Vec<Saved>,
    pub(crate) ranks: Vec<RankOrder>,
}

/// What this node knows of copies.
#[derive(Debug, Clone)]
pub(crate) struct Copies {
    /// See [`crate::Peer::set_keep_done`].
    pub(crate) keep_done_ms: u64,
    /// What is to be here.
    duties: BTreeMap<JobId, Duty>,
    /// What is here, as the node around the peer says.
    held: BTreeMap<JobId, BTreeMap<(Attempt, Rank), Held>>,
    /// What cannot be copied here, and why.
    cannot: BTreeMap<JobId, Cannot>,
    /// Copies of `keep/` that processes here made.
    saves: BTreeMap<WorkId, (u64, BlobId)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Cannot {
    reason: String,
    until_ms: u64,
}

impl Default for Copies {
    fn default() -> Self {
        Self {
            keep_done_ms: KEEP_MS,
            duties: BTreeMap::new(),
            held: BTreeMap::new(),
            cannot: BTreeMap::new(),
            saves: BTreeMap::new(),
        }
    }
}

impl Copies {
    /// What is to be here of a job.
    pub(crate) fn duty(&self, job: JobId) -> Option<&Duty> {
        self.duties.get(&job)
    }

    pub(crate) fn copied(&mut self, job: JobId, attempt: Attempt, rank: Rank) {
        self.held_mut(job, attempt, rank).complete = true;
    }

    pub(crate) fn save_held(
        &mut self,
        job: JobId,
        attempt: Attempt,
        rank: Rank,
        seq: u64,
        tree: BlobId,
    ) {
        let held = self.held_mut(job, attempt, rank);
        if held.save.is_none_or(|(known, _)| known < seq) {
            held.save = Some((seq, tree));
        }
    }

    pub(crate) fn lost(&mut self, job: JobId, attempt: Attempt, rank: Rank) {
        if let Some(of_job) = self.held.get_mut(&job) {
            of_job.remove(&(attempt, rank));
        }
    }

    pub(crate) fn cannot(&mut self, job: JobId, reason: String, now: Now) {
        self.cannot.insert(job, Cannot { reason, until_ms: now.after(CANNOT_MS) });
    }

    pub(crate) fn can(&mut self, job: JobId) {
        self.cannot.remove(&job);
    }

    pub(crate) fn saved(&mut self, id: WorkId, seq: u64, tree: BlobId) {
        self.saves.insert(id, (seq, tree));
    }

    fn held_mut(&mut self, job: JobId, attempt: Attempt, rank: Rank) -> &mut Held {
        self.held.entry(job).or_default().entry((attempt, rank)).or_default()
    }

    /// What is held here of an attempt.
    pub(crate) fn held(&self, job: JobId, attempt: Attempt) -> Vec<CopyState> {
        let cannot = self.cannot.get(&job).map(|cannot| cannot.reason.clone());
        let of_job = self.held.get(&job).into_iter().flatten();
        let state = |((_, rank), held): (&(Attempt, Rank), &Held)| CopyState {
            rank: *rank,
            complete: held.complete,
            save: held.save,
            under_way: false,
            cannot: cannot.clone(),
        };
        of_job.filter(|((at, _), _)| *at == attempt).map(state).collect()
    }
}
