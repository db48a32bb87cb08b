//! What keepers of a record say to each other.

use serde::{Deserialize, Serialize};

use crate::{
    BootId, JobId,
    identity::SignedBytes,
    job::Attempt,
    record::{Ballot, Certificate, Link},
};

/// A node's boot clock as it stood when a message left it: what the answer is good for counts
/// from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockReading {
    /// The boot the clock counts from.
    pub boot: BootId,
    /// Milliseconds.
    pub boot_ms: u64,
}

/// How often a keeper has heard from whoever proposes for a record. It changes with every
/// renewal, and with every start of the keeper's daemon, which forgets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Watch {
    /// The daemon's boot.
    pub boot: BootId,
    /// Counts up.
    pub heard: u64,
}

/// A promise not to accept below a ballot, with what was accepted so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// The job.
    pub job: JobId,
    /// The configuration.
    pub epoch: u32,
    /// What is promised.
    pub ballot: Ballot,
    /// The proposal accepted last.
    pub accepted: Ballot,
    /// The encoded value accepted in it.
    pub value_bytes: Vec<u8>,
    /// As it stood before.
    pub watch: Watch,
}

/// A proposal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The job.
    pub job: JobId,
    /// The configuration.
    pub epoch: u32,
    /// The proposal's number, which was promised.
    pub ballot: Ballot,
    /// To be promised once this is accepted, so that the next proposal of the same node
    /// needs no [`super::Message::Prepare`] of its own; not below `ballot`.
    pub next: Ballot,
    /// The encoded value.
    pub value_bytes: Vec<u8>,
}

/// The record's keepers changed: whoever gets this is one, or was one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    /// The job as its owner signed it.
    pub spec: SignedBytes,
    /// From the spec's keepers to the new ones.
    pub links: Vec<Link>,
    /// The proposal of the new epoch that the sender accepted last; [`Ballot::ZERO`] where that
    /// is the epoch's first value.
    pub accepted: Ballot,
    /// The encoded value of the new epoch accepted in it.
    pub value_bytes: Vec<u8>,
}

/// One record in a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The job.
    pub job: JobId,
    /// The configuration.
    pub epoch: u32,
    /// What a quorum promised the steward.
    pub ballot: Ballot,
    /// What its proposal under way asks to be promised; else the same.
    pub next: Ballot,
}

/// A new steward's proof that it is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopt {
    /// The job as its owner signed it.
    pub spec: SignedBytes,
    /// The attempt the record is at.
    pub attempt: Attempt,
    /// The record's value, which names the steward and its term.
    pub certificate: Certificate,
}

/// One attempt in a bidder's request for leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseAsk {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// The stewardship the bidder knows of: a steward of a later one shows that it is first.
    pub term: u64,
}

/// Permission for the processes of an attempt on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseGrant {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// Whether the processes must end when it runs out.
    pub binding: bool,
}
