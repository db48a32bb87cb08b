//! Who holds copies of a job's inputs, logs and results, and what this node holds itself.
//!
//! A rule without state says who should: see [`holders`]. Every keeper applies it to every
//! record it keeps, by itself, also when the job is over; so that repair needs neither a leader
//! nor any traffic but the copy. The node around the peer carries out what
//! [`crate::Peer::copies_wanted`] says, and tells what came of it.

mod machine;

use std::sync::Arc;

pub(crate) use machine::{Copies, Scene, Standing};

use crate::{
    BlobId, PeerId,
    job::{Attempt, Rank, Saved, VerifiedSpec},
    record::Link,
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
/// How often it is looked whether others should hold something now.
pub const COPIES_CHECK_MS: u64 = 20_000;
/// How often a copy of `keep/` is announced until enough nodes hold it, at first; each time twice
/// as long, up to [`SAVE_RESEND_MS_MAX`].
pub const SAVE_RESEND_MS: u64 = 2_000;
/// See [`SAVE_RESEND_MS`].
pub const SAVE_RESEND_MS_MAX: u64 = 60_000;
/// How long a steward waits for what keepers hold before a job is tried again.
pub const SAVES_WAIT_MS: u64 = 10_000;
/// How the note of a rank begins whose results were given up: its node is gone, and nobody else
/// has all of them.
pub const NOT_COPIED: &str = "not copied before its node was gone";

/// On how many nodes the results of a job are that so many nodes keep.
#[must_use]
pub const fn copies_for(keepers: usize) -> usize {
    if keepers >= 5 { COPIES_OF_FIVE } else { COPIES }
}

/// Who may hold what the rank that ran on `node` left, the first before the others: that node,
/// unless it is none any more, then the keepers.
pub fn candidates(node: Option<PeerId>, keepers: &[PeerId]) -> impl Iterator<Item = PeerId> + '_ {
    node.into_iter().chain(keepers.iter().copied().filter(move |keeper| Some(*keeper) != node))
}

/// Who should hold what the rank that ran on `node` left: the first `should` candidates of whom
/// `is_present` says so; see [`copies_for`].
pub fn holders(
    node: Option<PeerId>,
    keepers: &[PeerId],
    should: usize,
    is_present: impl Fn(PeerId) -> bool,
) -> Vec<PeerId> {
    candidates(node, keepers).filter(|candidate| is_present(*candidate)).take(should).collect()
}

/// What this node has still to bring here of a job.
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

/// What this node has still to bring here of one rank.
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
