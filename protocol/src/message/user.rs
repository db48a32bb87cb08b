//! What users ask of nodes, and what they are answered.

use serde::{Deserialize, Serialize};

use super::{CopyState, Decline, GpuState, Key};
use crate::{
    BlobId, JobId, PeerId, UserId,
    inventory::Gpu,
    job::{
        Attempt, Change, Command as JobCommand, Outcome, Policy, Rank, RankEnd, RankState, Removed,
        Saved, Source, State,
    },
    request::{Grant, Request},
};

/// The command inside a signed user request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Describe the jobs whose records you keep.
    Jobs(JobFilter),
    /// Describe one job.
    Job(JobId),
    /// Say why a job waits.
    Why(JobId),
    /// Stop a job.
    Stop(JobId),
    /// Describe yourself: your book and what computes on your GPUs.
    Node,
    /// Read the log lines you hold of this job.
    Log(JobId),
    /// Read files of this job.
    Files(JobId),
    /// Give up what a job that is over left: logs, `keep/` and artifacts, everywhere. To be asked
    /// of any of its keepers.
    Remove {
        /// The job.
        job: JobId,
        /// Take that back: what has not been deleted yet is held again.
        undo: bool,
    },
}

/// Which jobs are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFilter {
    /// Only this user's.
    pub owner: Option<UserId>,
    /// Finished ones, too: at most this many, the newest.
    pub done_max: u32,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Command::Jobs`] and [`Command::Job`].
    Jobs(Vec<JobView>),
    /// To [`Command::Why`].
    Why(Box<WaitView>),
    /// To [`Command::Stop`]: it is being stopped, or was over.
    Stopping {
        /// The state it is in now.
        state: State,
        /// Whether the record says so yet: only then is it sure. Else ask again.
        recorded: bool,
    },
    /// To [`Command::Remove`].
    Removed {
        /// What the record says now; `None`: the data is kept.
        removed: Option<Removed>,
        /// Whether the record says what was asked for and a majority of the keepers has it: only
        /// then is it sure. Else ask again.
        recorded: bool,
    },
    /// Another node drives the job: ask there.
    Elsewhere {
        /// Who drives it, as far as known here.
        steward: Option<PeerId>,
        /// Who keeps it.
        keepers: Vec<PeerId>,
    },
    /// To [`Command::Node`].
    Node(Box<NodeView>),
    /// To [`Command::Log`] and [`Command::Files`]: allowed.
    Granted(Box<JobView>),
    /// Not carried out.
    Denied {
        /// Why, with the next step.
        reason: String,
    },
    /// This node knows no such job.
    UnknownJob,
}

/// A job as its keeper describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobView {
    /// Its id.
    pub job: JobId,
    /// The title; empty where the reader may not see it.
    pub title: String,
    /// Its owner.
    pub owner: UserId,
    /// Only the owner and admins see more than that it exists.
    pub private: bool,
    /// What it asks for.
    pub request: Request,
    /// What it runs; `None` where the reader may not see it.
    pub command: Option<JobCommand>,
    /// Where its code came from.
    pub source: Source,
    /// Its code, as a tree; `None` where the reader may not see it. Whoever knows the id
    /// could submit it as their own and read it.
    pub code: Option<BlobId>,
    /// The job it continues.
    pub continues: Option<JobId>,
    /// Submission time.
    pub submitted_at_ms: u64,
    /// Every state so far, the current one last.
    pub history: Vec<Change>,
    /// The record's sequence number.
    pub seq: u64,
    /// Whether this is known to be what a majority of the keepers has. Else it may come to
    /// nothing yet, also where it says that the job is over.
    pub chosen: bool,
    /// Which keepers those are: counts their changes.
    pub epoch: u32,
    /// Who keeps the record.
    pub keepers: Vec<PeerId>,
    /// Who drives it.
    pub steward: PeerId,
    /// Counts stewardships from 1.
    pub term: u64,
    /// The majority of its keepers was lost, and somebody said so: it may have missed changes.
    pub recovered: bool,
    /// Attempts after the first that it may have, should one fail.
    pub retries: u32,
    /// Attempts that failed and were followed by another.
    pub retried: u32,
    /// What becomes of a process whose node is cut off.
    pub policy: Policy,
    /// How long a node may be silent before its ranks count as lost, in milliseconds.
    pub lost_after_ms: u64,
    /// How often `keep/` is copied off its node, in milliseconds; 0: when the process has ended.
    pub keep_every_ms: u64,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// The current attempt.
    pub attempt: AttemptView,
    /// What the current attempt began with, or the next will; empty where the reader may not see
    /// it.
    pub saved: Vec<Saved>,
    /// What the job left was given up.
    pub removed: Option<Removed>,
    /// What the node that answers holds itself of the current attempt, as a keeper.
    pub holds: Vec<CopyState>,
}

impl JobView {
    /// The current state.
    #[must_use]
    pub fn state(&self) -> State {
        self.history.last().map_or(State::New, |change| change.state)
    }

    /// Whether the job is over, and nothing of it changes any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.chosen && self.state() == State::Done
    }
}

/// The current attempt of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptView {
    /// Its number.
    pub number: Attempt,
    /// Its ranks; empty while unassigned.
    pub ranks: Vec<RankView>,
}

/// One rank of the current attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankView {
    /// The rank.
    pub rank: Rank,
    /// Its process group.
    pub group: u32,
    /// Its place in the group.
    pub process: u32,
    /// Its node.
    pub node: PeerId,
    /// What it was given.
    pub grant: Grant,
    /// How far it is.
    pub state: RankState,
    /// How it ended. In a box, since most of what is shown has none.
    pub end: Option<Box<RankEnd>>,
}

/// Why a job waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitView {
    /// The job.
    pub job: JobId,
    /// Its state.
    pub state: State,
    /// In a sentence.
    pub summary: String,
    /// Processes it needs.
    pub need: u32,
    /// Processes held for it now.
    pub held: u32,
    /// Every node asked or considered, by id.
    pub nodes: Vec<(PeerId, Verdict)>,
}

/// What a node said to the last call, or why it was not called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It holds this many processes for the job.
    Holds(u32),
    /// The call stands there, for this reason.
    Standing(Option<Decline>),
    /// It declined.
    Declined(Decline),
    /// It was called and has not answered.
    NoAnswer,
    /// It cannot be reached.
    Unreachable,
    /// It was not called: enough others were.
    NotCalled,
    /// Of a job whose results are being copied: it has those of this many ranks.
    Has(u32),
    /// It is copying those of so many ranks.
    Copies(u32),
    /// It cannot hold copies now, for this reason.
    CannotHold(String),
}

/// A node as it describes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// The node.
    pub node: PeerId,
    /// Its GPUs and what holds them.
    pub gpus: Vec<GpuView>,
    /// Cores offered and free.
    pub cpu_cores: (u32, u32),
    /// MiB offered and free.
    pub ram_mib: (u64, u64),
    /// Why it runs only its owner's jobs.
    pub owner_only: Option<String>,
    /// Holds, by id.
    pub holds: Vec<HoldView>,
    /// Standing calls, highest first.
    pub standing: Vec<Key>,
}

/// A GPU and its use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuView {
    /// The GPU.
    pub gpu: Gpu,
    /// Its use.
    pub state: GpuState,
    /// The job that has it.
    pub job: Option<JobId>,
}

/// A hold in a bidder's book.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldView {
    /// The job.
    pub job: JobId,
    /// What is held.
    pub grant: Grant,
    /// Being assigned.
    pub pinned: bool,
}
