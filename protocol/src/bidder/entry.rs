//! Entries of the book: holds, and ranks this node is committed to.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    HoldId, JobId, PeerId,
    identity::SignedBytes,
    job::{Attempt, Rank, RankAssignment, VerifiedSpec},
    message::Key,
    peer::Slot,
    request::Grant,
};

/// Resources kept for a job for a short while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Its number.
    pub id: HoldId,
    /// The job and its place in the order.
    pub key: Key,
    /// Who may pin, renew and release it.
    pub steward: PeerId,
    /// The process group it is for.
    pub group: u32,
    /// What is held.
    pub grant: Grant,
    /// About to be assigned: cannot be wounded, will not be renewed.
    pub pinned: bool,
    /// Boot-clock milliseconds.
    pub expiry_ms: u64,
}

/// A rank of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WorkId {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// The rank.
    pub rank: Rank,
}

impl WorkId {
    pub(crate) const fn slot(self) -> Slot {
        Slot::Work(self.job, self.attempt, self.rank)
    }

    pub(crate) const fn end_slot(self) -> Slot {
        Slot::End(self.job, self.attempt, self.rank)
    }
}

/// How far a rank is on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Named in the record; prepares, or waits for its start.
    Committed {
        /// When it was committed, on the boot clock.
        since_ms: u64,
        /// When it is given up, on the boot clock.
        until_ms: u64,
    },
    /// Told to start: a process may exist from here on.
    Starting,
    /// Its process runs.
    Running,
    /// Its process ended; results are being gathered.
    Draining,
}

/// A rank this node is committed to, or runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The rank.
    pub id: WorkId,
    /// Who drives the job.
    pub steward: PeerId,
    /// What the record gives it.
    pub assignment: RankAssignment,
    /// How far it is.
    pub phase: Phase,
    /// The port and host it announced once its code and data were in place.
    pub prepared: Option<(u16, String)>,
    /// The job as its owner signed it.
    pub signed_spec: SignedBytes,
    /// The same, verified; always present once taken into the book.
    #[serde(skip)]
    pub spec: Option<Arc<VerifiedSpec>>,
}
