//! The auction and what follows from it: calls, bids, commits, starts, reports.

use serde::{Deserialize, Serialize};

use super::ClockReading;
use crate::{
    HoldId, JobId, PeerId, StoreId,
    identity::SignedBytes,
    inventory::GpuUuid,
    job::{Attempt, Rank, RankEnd, RankState},
    record::Certificate,
    request::{Grant, Process},
};

/// The one order among jobs: the lower, the higher its priority.
///
/// Until fair share exists it is the time of submission, then the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// From the spec.
    pub submitted_at_ms: u64,
    /// The job.
    pub job: JobId,
}

impl Key {
    /// Whether this job goes before `other`.
    #[must_use]
    pub fn is_higher_than(&self, other: &Self) -> bool {
        self < other
    }
}

/// How many processes of one group are still wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The group's index in the request.
    pub group: u32,
    /// How many processes.
    pub count: u32,
    /// What each needs.
    pub process: Process,
}

/// A call for bids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The job and its place in the order.
    pub key: Key,
    /// Its owner: some nodes run only their owner's jobs.
    pub owner: crate::UserId,
    /// What is wanted.
    pub wanted: Vec<Wanted>,
    /// Trees the job needs, with their bytes: a node that has them bids lower. Each by the
    /// hash of its id ([`blinded`]), since knowing an id is as good as being allowed to
    /// read the tree.
    pub inputs: Vec<(crate::BlobId, u64)>,
    /// Leave the call standing where there is no room now.
    pub standing: bool,
}

/// The hash of a tree's id.
#[must_use]
pub fn blinded(tree: crate::BlobId) -> crate::BlobId {
    crate::BlobId::of(&tree.0)
}

/// One process a bidder holds resources for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The hold: short-lived, and only its job's.
    pub hold: HoldId,
    /// The process group it is for.
    pub group: u32,
    /// What would be given.
    pub grant: Grant,
    /// Cost: the steward takes the cheapest.
    pub score: u32,
}

/// A bidder's answer to a call, or to room that appeared under a standing one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bid {
    /// The job.
    pub job: JobId,
    /// The holds.
    pub offers: Vec<Offer>,
    /// How long the holds last from now, in milliseconds.
    pub hold_ms: u64,
    /// The call was left standing for what is missing.
    pub standing: bool,
    /// Why fewer were offered than wanted; `None` where all were.
    pub decline: Option<Decline>,
}

/// Why a bidder offers nothing, or less than was wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decline {
    /// The node does not have what one process needs, busy or not.
    Unsuitable {
        /// What is missing, for people.
        missing: String,
    },
    /// It has it, in use by these jobs.
    Busy {
        /// At most eight of them.
        jobs: Vec<JobId>,
    },
    /// A higher job holds or waits for it.
    HigherJob {
        /// That job.
        job: JobId,
    },
    /// A process that is not ours computes on these GPUs.
    ForeignUse {
        /// The GPUs.
        gpus: Vec<GpuUuid>,
    },
    /// The node runs only its owner's jobs.
    OwnerOnly {
        /// Why, for people.
        reason: String,
    },
    /// The node offers nothing to anybody.
    NotOffering,
}

/// What becomes of a standing call when holds under it are given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallFate {
    /// It stands as before.
    Stand,
    /// It stands, unanswered for this many milliseconds: others may use the room.
    Rest {
        /// At most [`REST_MS_MAX`].
        ms: u64,
    },
    /// It is withdrawn.
    Forget,
}

/// The longest a standing call may rest.
pub const REST_MS_MAX: u64 = 120_000;

/// A pin that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinRefusal {
    /// The job.
    pub job: JobId,
    /// Of those asked for, the holds that are not here.
    pub missing: Vec<HoldId>,
}

/// The record names this node: the certificate proves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The job as its owner signed it.
    pub spec: SignedBytes,
    /// The attempt the value assigns.
    pub attempt: Attempt,
    /// The chosen record value with the receipts of a quorum.
    pub certificate: Certificate,
}

/// Start your ranks: every rank of the attempt is prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// Each rank's node, in rank order.
    pub nodes: Vec<PeerId>,
    /// The address of each rank's node, in rank order.
    pub hosts: Vec<String>,
    /// A port free on rank 0's node and the job's own.
    pub port: u16,
    /// The bidder's clock as it last said that it is prepared.
    pub asked: ClockReading,
    /// Whether the processes must end when the lease that starts there runs out.
    pub binding: bool,
}

/// How far a rank is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RankReport {
    /// Alive, in this state.
    At(RankState),
    /// Code and data are here. The port is free here and reserved for the job.
    Prepared {
        /// For rank 0: what [`Start::port`] shall be.
        port: u16,
        /// The address other nodes reach this one by.
        host: String,
        /// The bidder's clock as it said so: the first lease counts from here.
        clock: ClockReading,
    },
    /// The process ended; its results are being gathered.
    Cleaning,
    /// The process ended, or never was.
    Ended(RankEnd),
}

/// Bidder → steward: how one rank stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// The rank.
    pub rank: Rank,
    /// The node that says so. It is checked against the sender.
    pub node: PeerId,
    /// Its store, in which is what the rank leaves.
    pub store: StoreId,
    /// How it stands.
    pub report: RankReport,
}
