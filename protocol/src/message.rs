//! What peers say to each other: direct messages, soft state, and what users ask.

mod auction;
mod soft;
mod user;

use serde::{Deserialize, Serialize};

pub use auction::{
    Bid, Call, CallFate, Commit, Decline, Key, Offer, PinRefusal, REST_MS_MAX, RankReport, Report,
    Start, Wanted, blinded,
};
pub use soft::{Advert, GpuState, Head, Soft};
pub use user::{
    AttemptView, Command, GpuView, HoldView, JobFilter, JobView, NodeView, RankView, Reply,
    Verdict, WaitView,
};

use crate::{
    HoldId, JobId,
    identity::SignedBytes,
    job::{Attempt, Rank},
};

/// One direct message. Each is idempotent: the network may repeat or lose it, and
/// whoever needs an answer asks again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Submitter → keeper: keep this job.
    Init {
        /// The job as its owner signed it.
        spec: SignedBytes,
    },
    /// Keeper → submitter: it is kept; the receipt is for the birth value.
    Inited {
        /// The job.
        job: JobId,
        /// Signed in [`crate::identity::Domain::Receipt`].
        receipt: SignedBytes,
    },
    /// Keeper → submitter: it is not kept.
    InitRefused {
        /// The job.
        job: JobId,
        /// Why, for people.
        reason: String,
        /// Asking again can succeed.
        retry: bool,
    },

    /// Steward → bidder: offer processes for this job.
    Call(Call),
    /// Bidder → steward: offers, or none and why.
    Bid(Bid),
    /// Steward → bidder: these holds are about to be assigned.
    Pin {
        /// The job.
        job: JobId,
        /// The holds.
        holds: Vec<HoldId>,
    },
    /// Bidder → steward: pinned.
    Pinned {
        /// The job.
        job: JobId,
        /// The holds.
        holds: Vec<HoldId>,
    },
    /// Bidder → steward: one of these holds is not here any more; none was pinned.
    PinRefused(PinRefusal),
    /// Bidder → steward: a higher job took these holds, or they expired.
    HoldsLost {
        /// The job.
        job: JobId,
        /// The holds.
        holds: Vec<HoldId>,
        /// Whose key was higher; `None` where they expired.
        higher: Option<JobId>,
    },
    /// Steward → bidder: give these holds back.
    Release {
        /// The job.
        job: JobId,
        /// The holds.
        holds: Vec<HoldId>,
        /// What becomes of the standing call.
        call: CallFate,
    },

    /// Steward → bidder: the record names you.
    Commit(Box<Commit>),
    /// Bidder → steward: committed to every rank the record names me for.
    Committed {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
    },
    /// Bidder → steward: not committed; and never will be, for this attempt.
    CommitRefused {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// Why, for people.
        reason: String,
    },
    /// Steward → bidder: the attempt is off. Never start it; if it runs, stop it.
    Withdraw {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// Why, for people.
        reason: String,
    },
    /// Steward → bidder: every rank is prepared; start yours.
    Start(Start),
    /// Steward → bidder: end your ranks of this attempt.
    Stop {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// Why, for people.
        reason: String,
    },
    /// Steward → bidder: say how your ranks of this attempt stand.
    Ask {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
    },
    /// Bidder → steward: how a rank stands. An ending is repeated until acknowledged.
    Report(Box<Report>),
    /// Steward → bidder: the ending is in the record.
    EndRecorded {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: Rank,
    },

    /// Soft state handed over directly.
    Soft(Soft),
    /// A turn of range-based set reconciliation over soft state and statements.
    Reconcile {
        /// A negentropy message (protocol version 1).
        query: Vec<u8>,
    },
    /// The answer to [`Message::Reconcile`].
    Reconciled {
        /// A negentropy message (protocol version 1).
        answer: Vec<u8>,
    },
    /// Send me the items with these ids.
    Want {
        /// BLAKE3 hashes of items; at most [`WANT_MAX`].
        ids: Vec<[u8; 32]>,
    },
}

/// Most items asked for in one [`Message::Want`].
pub const WANT_MAX: usize = 256;

impl Message {
    /// A constant name for logs and statistics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Init { .. } => "init",
            Self::Inited { .. } => "inited",
            Self::InitRefused { .. } => "init-refused",
            Self::Call(_) => "call",
            Self::Bid(_) => "bid",
            Self::Pin { .. } => "pin",
            Self::Pinned { .. } => "pinned",
            Self::PinRefused(_) => "pin-refused",
            Self::HoldsLost { .. } => "holds-lost",
            Self::Release { .. } => "release",
            Self::Commit(_) => "commit",
            Self::Committed { .. } => "committed",
            Self::CommitRefused { .. } => "commit-refused",
            Self::Withdraw { .. } => "withdraw",
            Self::Start(_) => "start",
            Self::Stop { .. } => "stop",
            Self::Ask { .. } => "ask",
            Self::Report(_) => "report",
            Self::EndRecorded { .. } => "end-recorded",
            Self::Soft(_) => "soft",
            Self::Reconcile { .. } => "reconcile",
            Self::Reconciled { .. } => "reconciled",
            Self::Want { .. } => "want",
        }
    }
}
