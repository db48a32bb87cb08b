//! What peers say to each other: direct messages, soft state, and what users ask.

mod auction;
mod copies;
mod record;
mod soft;
mod user;

use serde::{Deserialize, Serialize};

pub use auction::{
    Bid, Call, CallFate, Commit, Decline, Key, Offer, PinRefusal, REST_MS_MAX, RankReport, Report,
    Start, Wanted, blinded,
};
pub use copies::{COPIES_MAX, CopyState};
pub use record::{
    Accept, Adopt, ClockReading, Install, LeaseAsk, LeaseGrant, Promise, Renewal, Watch,
};
pub use soft::{Advert, GpuState, Head, Piece, Soft};
pub use user::{
    AttemptView, Command, GpuView, HoldView, JobFilter, JobView, NodeView, RankView, Reply,
    Verdict, WaitView,
};

use crate::{
    BlobId, HoldId, JobId, StoreId,
    identity::SignedBytes,
    job::{Attempt, Rank},
    reconcile::Sum,
    record::{Ballot, Link},
};

/// One direct message. Each is idempotent: the network may repeat or lose it, and
/// whoever needs an answer asks again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Submitter or keeper → keeper: keep this job.
    Init {
        /// The job as its owner signed it.
        spec: SignedBytes,
        /// Of other keepers that keep it already: with one it may be older than a submission.
        receipts: Vec<SignedBytes>,
        /// The first keeper refused it, for this reason: unless you keep it already, never do.
        /// Only where too many refuse for it to be chosen has it been refused.
        refused: Option<String>,
    },
    /// Keeper → submitter or keeper: it is kept.
    Inited {
        /// The job.
        job: JobId,
        /// For the birth value, in [`crate::identity::Domain::Receipt`]: the sender's own, and
        /// those of others that it has.
        receipts: Vec<SignedBytes>,
        /// Of these, the stores whose nodes have the job's inputs.
        inputs: Vec<StoreId>,
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

    /// Keeper → keeper: accept nothing below this ballot, and say what you accepted.
    Prepare {
        /// The job.
        job: JobId,
        /// The configuration.
        epoch: u32,
        /// The proposal.
        ballot: Ballot,
    },
    /// The answer to [`Message::Prepare`].
    Promise(Box<Promise>),
    /// Keeper → keeper: accept this value.
    Accept(Box<Accept>),
    /// The answer to [`Message::Accept`].
    Accepted {
        /// The job.
        job: JobId,
        /// The configuration.
        epoch: u32,
        /// The proposal.
        ballot: Ballot,
        /// Signed in [`crate::identity::Domain::Receipt`].
        receipt: SignedBytes,
    },
    /// A higher ballot was promised.
    Nack {
        /// The job.
        job: JobId,
        /// The configuration.
        epoch: u32,
        /// The proposal that came too late.
        ballot: Ballot,
        /// What was promised.
        promised: Ballot,
    },
    /// This node keeps no record of this job in this epoch: it counts for nothing.
    NotInit {
        /// The job.
        job: JobId,
        /// The configuration asked for.
        epoch: u32,
    },
    /// The epoch asked for is over.
    Moved {
        /// The job.
        job: JobId,
        /// To the keepers of now.
        links: Vec<Link>,
    },
    /// Keeper → new or former keeper: the keepers changed.
    Install(Box<Install>),
    /// New or former keeper → who installed it: done.
    Installed {
        /// The job.
        job: JobId,
        /// The new configuration.
        epoch: u32,
    },
    /// Steward → node: would you keep records, in this store? What a board says of a store may
    /// be old, and a record whose keepers were chosen by it could not go on.
    WouldKeep {
        /// The store.
        store: StoreId,
    },
    /// Node → steward: in this one I do.
    WillKeep {
        /// The store.
        store: StoreId,
    },
    /// Steward → keeper: I am here, for all these jobs.
    Renew {
        /// The steward's clock as it sent this; the answer repeats it.
        clock: ClockReading,
        /// At most [`RENEWALS_MAX`].
        entries: Vec<Renewal>,
    },
    /// The answer to [`Message::Renew`].
    Renewed {
        /// The steward's clock as it asked.
        asked: ClockReading,
        /// Those it heard for.
        kept: Vec<JobId>,
        /// Those where another proposes, or that it does not keep in that epoch.
        refused: Vec<JobId>,
    },
    /// Keeper → keeper: how long have you not heard of this job's steward?
    Look {
        /// The job.
        job: JobId,
        /// The configuration.
        epoch: u32,
    },
    /// The answer to [`Message::Look`].
    Seen {
        /// The job.
        job: JobId,
        /// The configuration.
        epoch: u32,
        /// To be compared with what was seen before.
        watch: Watch,
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

    /// New steward → bidder: the job's ranks are mine to drive now.
    Adopt(Box<Adopt>),
    /// Bidder → steward: they are; reports follow.
    Adopted {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// The term accepted.
        term: u64,
    },
    /// Bidder → steward: let my processes of these attempts run on.
    AskLease {
        /// The bidder's clock as it sent this: what it gets counts from here.
        clock: ClockReading,
        /// Attempts with processes here; at most [`RENEWALS_MAX`].
        entries: Vec<LeaseAsk>,
    },
    /// Steward → bidder: they may. What is not named here is not granted.
    Lease {
        /// The bidder's clock as it asked.
        asked: ClockReading,
        /// What is granted.
        entries: Vec<LeaseGrant>,
    },

    /// Keeper → bidder: another drives this job.
    Elsewhere {
        /// The job.
        job: JobId,
        /// Who does, as far as the sender knows.
        steward: crate::PeerId,
    },

    /// Node → keepers: the process of this rank runs here, and this is its `keep/` as it is now:
    /// copy it. Repeated until enough of them said [`Message::SaveHeld`].
    Save {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: Rank,
        /// Counts the copies of this rank in this attempt.
        seq: u64,
        /// The directory, as a tree.
        tree: BlobId,
    },
    /// Keeper → node: that copy of `keep/`, or a later one, is complete and durable here.
    SaveHeld {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// The rank.
        rank: Rank,
        /// Which one.
        seq: u64,
    },
    /// Steward → keeper, or node of the attempt: what do you hold of this attempt?
    AskCopies {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// Keepers that the steward does not count on for copies: others are to make them.
        without: Vec<crate::PeerId>,
    },
    /// The answer to [`Message::AskCopies`]; to the steward also without being asked when it
    /// changes, and to all keepers of the job where something cannot be held.
    Copies {
        /// The job.
        job: JobId,
        /// The attempt.
        attempt: Attempt,
        /// The record's sequence number at the sender: a steward sees that it lacks the latest.
        seq: u64,
        /// Ranks that the sender holds something of, is to hold, or cannot; at most
        /// [`COPIES_MAX`].
        ranks: Vec<CopyState>,
    },

    /// Soft state handed over directly.
    Soft(Soft),
    /// A turn of range-based set reconciliation over soft state and statements.
    Reconcile {
        /// The sum of the asker's items.
        sum: Sum,
        /// A negentropy message (protocol version 1).
        query: Vec<u8>,
    },
    /// The answer to [`Message::Reconcile`].
    Reconciled {
        /// A negentropy message (protocol version 1); empty where both have the same.
        answer: Vec<u8>,
    },
    /// Send me the items with these ids.
    Want {
        /// BLAKE3 hashes of items; at most [`WANT_MAX`].
        ids: Vec<[u8; 32]>,
    },
}

/// Most records in one [`Message::Renew`] or [`Message::AskLease`].
pub const RENEWALS_MAX: usize = 4_096;

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
            Self::Prepare { .. } => "prepare",
            Self::Promise(_) => "promise",
            Self::Accept(_) => "accept",
            Self::Accepted { .. } => "accepted",
            Self::Nack { .. } => "nack",
            Self::NotInit { .. } => "not-init",
            Self::Moved { .. } => "moved",
            Self::Install(_) => "install",
            Self::Installed { .. } => "installed",
            Self::WouldKeep { .. } => "would-keep",
            Self::WillKeep { .. } => "will-keep",
            Self::Renew { .. } => "renew",
            Self::Renewed { .. } => "renewed",
            Self::Look { .. } => "look",
            Self::Seen { .. } => "seen",
            Self::Adopt(_) => "adopt",
            Self::Adopted { .. } => "adopted",
            Self::AskLease { .. } => "ask-lease",
            Self::Lease { .. } => "lease",
            Self::Elsewhere { .. } => "elsewhere",
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
            Self::Save { .. } => "save",
            Self::SaveHeld { .. } => "save-held",
            Self::AskCopies { .. } => "ask-copies",
            Self::Copies { .. } => "copies",
            Self::Soft(_) => "soft",
            Self::Reconcile { .. } => "reconcile",
            Self::Reconciled { .. } => "reconciled",
            Self::Want { .. } => "want",
        }
    }
}
