//! How a job stands: states with time and reason, attempts, ranks, outcome.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::{BlobId, HoldId, PeerId, StoreId, UserId, request::Grant};

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// Submitted; nothing has been tried yet.
    New,
    /// Being auctioned, or waiting for room.
    Waiting,
    /// Assigned; its nodes fetch code and data.
    Preparing,
    /// Every rank is prepared and told to start.
    Starting,
    /// Every rank has started.
    Running,
    /// Being ended before its time.
    Stopping,
    /// Processes have ended; results are gathered and directories removed.
    Cleaning,
    /// Over; the outcome says how.
    Done,
}

impl State {
    /// snakepit's three letters.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::New => "NEW",
            Self::Waiting => "WAI",
            Self::Preparing => "PRE",
            Self::Starting => "STA",
            Self::Running => "RUN",
            Self::Stopping => "STO",
            Self::Cleaning => "CLN",
            Self::Done => "FIN",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "NEW",
            Self::Waiting => "WAITING",
            Self::Preparing => "PREPARING",
            Self::Starting => "STARTING",
            Self::Running => "RUNNING",
            Self::Stopping => "STOPPING",
            Self::Cleaning => "CLEANING",
            Self::Done => "DONE",
        })
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Every process exited with 0.
    Succeeded,
    /// The first process to fail did so with this exit code (128 + n for signal n).
    Failed {
        /// The exit code.
        code: i32,
    },
    /// A person ended it.
    Stopped {
        /// Who.
        by: UserId,
    },
    /// It ran into its time limit.
    TimedOut,
    /// What became of it cannot be known any more.
    Lost {
        /// What was lost.
        reason: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Succeeded => f.write_str("succeeded"),
            Self::Failed { code } => write!(f, "failed({code})"),
            Self::Stopped { .. } => f.write_str("stopped"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Lost { .. } => f.write_str("lost"),
        }
    }
}

/// A state entered, when and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The state.
    pub state: State,
    /// Milliseconds since the Unix epoch, by the steward's clock.
    pub at_ms: u64,
    /// Why, for people.
    pub reason: String,
}

/// A process of a job: its number among all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rank(pub u32);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A start of all ranks of a job: its number from 1; 0 before the first.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Attempt(pub u32);

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a rank runs and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankAssignment {
    /// The rank.
    pub rank: Rank,
    /// Its process group's index.
    pub group: u32,
    /// Its index within the group.
    pub process: u32,
    /// The node.
    pub node: PeerId,
    /// The hold this closes.
    pub hold: HoldId,
    /// The GPUs, cores and memory.
    pub grant: Grant,
}

/// Where one rank of the current attempt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RankState {
    /// Named in the record; its node prepares.
    Assigned,
    /// Its node has code and data.
    Prepared,
    /// Its process runs.
    Running,
    /// Its process ended and its results are kept.
    Ended,
}

impl fmt::Display for RankState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Assigned => "assigned",
            Self::Prepared => "prepared",
            Self::Running => "running",
            Self::Ended => "ended",
        })
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// By itself, with this exit code.
    Exited {
        /// 0 to 255.
        code: i32,
    },
    /// By a signal nobody of us sent.
    Signaled {
        /// Its number.
        signal: i32,
    },
    /// Ended because the job was being stopped.
    Stopped,
    /// Ended by its time limit.
    TimedOut,
    /// It was told to start, and nothing came to run.
    FailedToStart {
        /// Why.
        reason: String,
    },
    /// It ran, or may have; nobody saw how it ended.
    Lost {
        /// What happened.
        reason: String,
    },
    /// Its attempt was given up before it started, and it never will.
    NeverStarted,
    /// Ended by its supervisor, because its lease ran out.
    LeaseEnded,
    /// Its node was silent for longer than the job allows. It may still run there, and so is
    /// never run again.
    Silent,
}

impl Ending {
    /// The exit code a shell would report: 128 + n for signal n, 124 for a time
    /// limit (as `timeout(1)`), 126 where nothing could be started.
    #[must_use]
    pub const fn code(&self) -> i32 {
        match self {
            Self::Exited { code } => *code,
            Self::Signaled { signal } => 128 + *signal,
            Self::Stopped => 143,
            Self::TimedOut => 124,
            Self::FailedToStart { .. } => 126,
            Self::Lost { .. } | Self::NeverStarted | Self::LeaseEnded | Self::Silent => 125,
        }
    }

    /// Whether the process did what it was to do.
    #[must_use]
    pub const fn is_success(&self) -> bool {
        matches!(self, Self::Exited { code: 0 })
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { code } => write!(f, "exit code {code}"),
            Self::Signaled { signal } => write!(f, "killed by signal {signal}"),
            Self::Stopped => f.write_str("stopped"),
            Self::TimedOut => f.write_str("ended by its time limit"),
            Self::FailedToStart { reason } => write!(f, "could not start: {reason}"),
            Self::Lost { reason } => write!(f, "lost: {reason}"),
            Self::NeverStarted => f.write_str("never started"),
            Self::LeaseEnded => f.write_str("ended by its lease: its node was cut off"),
            Self::Silent => f.write_str("its node has been silent for too long"),
        }
    }
}

/// How a rank ended and what it left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankEnd {
    /// How the process ended.
    pub ending: Ending,
    /// The text it wrote to `$RESULT_FILE`, cut to 4 KiB.
    pub result: Option<String>,
    /// Its `keep/`, as a tree.
    pub keep: Option<BlobId>,
    /// Its artifacts, as a tree.
    pub artifacts: Option<BlobId>,
    /// What of its results could not be kept, and why.
    pub note: Option<String>,
    /// How long its log was, in bytes: what a copy of it must have.
    pub log_bytes: u64,
    /// Milliseconds since the Unix epoch, by its node's clock.
    pub at_ms: u64,
}

impl RankEnd {
    /// An ending without results.
    #[must_use]
    pub fn bare(ending: Ending, at_ms: u64) -> Self {
        Self { ending, result: None, keep: None, artifacts: None, note: None, log_bytes: 0, at_ms }
    }
}

impl RankEnd {
    /// Whether the rank left anything that is to be copied to other nodes.
    #[must_use]
    pub const fn has_results(&self) -> bool {
        self.log_bytes > 0 || self.keep.is_some() || self.artifacts.is_some()
    }
}

/// A copy of a rank's `keep/` from an earlier attempt: what the next one begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The rank.
    pub rank: Rank,
    /// The attempt that wrote it.
    pub attempt: Attempt,
    /// A node that has it, as far as was known.
    pub node: PeerId,
    /// The directory, as a tree.
    pub tree: BlobId,
}

/// Most copies of one rank's `keep/` that a record names.
pub const SAVED_MAX: usize = 2;

/// Somebody gave up what a job left: logs, `keep/` and artifacts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Who: the owner or an admin.
    pub by: UserId,
    /// Milliseconds since the Unix epoch, by the clock of the keeper that was asked.
    pub at_ms: u64,
}

/// One rank of the current attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRecord {
    /// Where and with what.
    pub assignment: RankAssignment,
    /// How far it is.
    pub state: RankState,
    /// How it ended.
    pub end: Option<RankEnd>,
    /// The store its node had when it said so, as far as was known: with another it has nothing
    /// any more of what the rank left.
    pub store: Option<StoreId>,
}

/// Why a job is being ended before its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopCause {
    /// A person asked.
    By(UserId),
    /// A rank failed, and a gang lives whole or not at all.
    RankFailed(Rank),
    /// A rank could not be started, so that the others must not stay.
    StartFailed(String),
}
