//! The job as its owner signed it. Its id is the hash of the signed bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    BlobId, JobId, PeerId, PoolId, StoreId, UserId,
    identity::{Domain, SignedBytes},
    request::Request,
    wire,
};

/// Longest title, in characters.
pub const TITLE_CHARS_MAX: usize = 120;
/// Longest `-d` command, in bytes.
pub const DIRECT_BYTES_MAX: usize = 64 << 10;
/// Most environment variables a submitter may set.
pub const ENV_ENTRIES_MAX: usize = 256;
/// Most artifact paths.
pub const ARTIFACTS_MAX: usize = 256;
/// Longest artifact path, environment name or value, in bytes.
pub const TEXT_BYTES_MAX: usize = 16 << 10;
/// Longest signed spec, in bytes.
pub const SPEC_BYTES_MAX: usize = 256 << 10;
/// Longest grace, in milliseconds: an hour to write a checkpoint.
pub const GRACE_MS_MAX: u64 = 3_600_000;
/// Most keepers a job may name.
pub const KEEPERS_MAX: usize = 5;
/// Most further attempts a job may ask for.
pub const RETRIES_MAX: u32 = 100;
/// How long a rank's node may be silent before the rank counts as lost, where the job does
/// not say: 24 hours.
pub const LOST_AFTER_MS: u64 = 24 * 3_600_000;
/// The least [`JobSpec::lost_after_ms`]: ten minutes, longer than any lease.
pub const LOST_AFTER_MS_MIN: u64 = 600_000;
/// The most [`JobSpec::lost_after_ms`]: thirty days.
pub const LOST_AFTER_MS_MAX: u64 = 30 * 24 * 3_600_000;
/// How often `keep/` is copied off the node while its process runs, where the job does not say.
pub const KEEP_EVERY_MS: u64 = 60_000;
/// The least [`JobSpec::keep_every_ms`] other than 0.
pub const KEEP_EVERY_MS_MIN: u64 = 1_000;
/// The most [`JobSpec::keep_every_ms`]: thirty days.
pub const KEEP_EVERY_MS_MAX: u64 = 30 * 24 * 3_600_000;

/// How long a process has between SIGTERM and SIGKILL, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grace(pub u64);

impl Default for Grace {
    /// 30 seconds: enough for a framework to write a checkpoint.
    fn default() -> Self {
        Self(30_000)
    }
}

/// What becomes of a running process that its steward cannot see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// Its supervisor ends it when its lease runs out, so that it may run elsewhere.
    Restart,
    /// It runs on. It is never run again without word from its node.
    Continue,
}

impl Policy {
    /// What a job that does not say gets: one that may be run again is.
    #[must_use]
    pub const fn for_retries(retries: u32) -> Self {
        if retries > 0 { Self::Restart } else { Self::Continue }
    }
}

impl core::fmt::Display for Policy {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Restart => "restart",
            Self::Continue => "continue",
        })
    }
}

/// What each process runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The file `.compute` of the submitted directory.
    Script,
    /// A text handed to a shell.
    Direct(String),
}

/// Where the submitted directory came from; shown, never used to fetch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The tracked remote's URL without credentials.
    pub remote: Option<String>,
    /// The checked-out commit.
    pub commit: Option<String>,
    /// Lines added and removed against that commit.
    pub diff_lines: u64,
    /// Files git does not track.
    pub untracked: u64,
}

/// The job whose `keep/` the processes start with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continued {
    /// That job.
    pub job: JobId,
    /// The union of its ranks' `keep/`, as a tree.
    pub keep: BlobId,
}

/// All that defines a job. Signed by its owner; never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The pool it may run in.
    pub pool: PoolId,
    /// Who submitted it, and whose signature it bears.
    pub owner: UserId,
    /// For people; at most [`TITLE_CHARS_MAX`] characters.
    pub title: String,
    /// The processes and what each needs.
    pub request: Request,
    /// What each process runs.
    pub command: Command,
    /// The submitted directory, as a tree.
    pub code: BlobId,
    /// Bytes of that tree's files.
    pub code_bytes: u64,
    /// Where it came from.
    pub source: Source,
    /// The job it continues.
    pub continues: Option<Continued>,
    /// Paths below the work directory kept when a process ends.
    pub artifacts: Vec<String>,
    /// Additional environment.
    pub env: BTreeMap<String, String>,
    /// Not shown to anybody but its owner and admins.
    pub private: bool,
    /// Ended after this long.
    pub time_limit_ms: Option<u64>,
    /// Between SIGTERM and SIGKILL.
    pub grace: Grace,
    /// Attempts after the first, should one fail; at most [`RETRIES_MAX`].
    pub retries: u32,
    /// What becomes of a process whose node is cut off.
    pub policy: Policy,
    /// How long a rank's node may be silent before the rank counts as lost, in milliseconds.
    pub lost_after_ms: u64,
    /// How often `keep/` is copied to other nodes while a process runs, in milliseconds; 0: only
    /// when the process has ended.
    pub keep_every_ms: u64,
    /// Makes equal submissions different jobs.
    pub nonce: [u8; 16],
    /// Milliseconds since the Unix epoch, by the submitter's clock.
    pub submitted_at_ms: u64,
    /// The first keepers of its record, each with the store it keeps it in.
    pub keepers: Vec<(PeerId, StoreId)>,
}

/// Why a spec is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// Not signed by its owner.
    #[error("the job is not signed by its owner")]
    Signature,
    /// Bytes that are no spec.
    #[error("the job cannot be read: {0}")]
    Malformed(String),
    /// A field is larger than allowed.
    #[error("{what} of {got} where at most {max} is allowed")]
    TooLarge {
        /// The field.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The bound.
        max: usize,
    },
    /// More time than any process gets.
    #[error("a job's grace is at most {} s", GRACE_MS_MAX / 1000)]
    Grace,
    /// More attempts than a job gets.
    #[error("a job may be retried at most {RETRIES_MAX} times")]
    Retries,
    /// A silence that is too short to mean anything, or too long.
    #[error(
        "a rank may count as lost after {} s to {} s of silence",
        LOST_AFTER_MS_MIN / 1000,
        LOST_AFTER_MS_MAX / 1000
    )]
    LostAfter,
    /// Copies of `keep/` that follow each other too closely, or hardly ever.
    #[error(
        "`keep/` may be copied off its node every {} s to {} s, or not at all",
        KEEP_EVERY_MS_MIN / 1000,
        KEEP_EVERY_MS_MAX / 1000
    )]
    KeepEvery,
    /// No keeper, or more than a job may have.
    #[error("a job names 1 to {KEEPERS_MAX} keepers, each once")]
    Keepers,
    /// A path that leaves the work directory.
    #[error("artifact path `{0}` is not below the work directory")]
    ArtifactPath(String),
    /// A name no process environment can have.
    #[error("`{0}` is no name for an environment variable")]
    EnvName(String),
}

/// A spec whose signature and bounds were checked, with its id and original bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedSpec {
    /// The id: the hash of the signed bytes.
    pub job: JobId,
    /// The decoded content.
    pub spec: JobSpec,
    /// What was received.
    pub signed: SignedBytes,
}

impl JobSpec {
    /// The bytes to sign.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// Ranks the request flattens to.
    #[must_use]
    pub fn rank_count(&self) -> u32 {
        self.request.groups.iter().map(|group| group.count).sum()
    }

    /// The (group, process) of each rank, in rank order.
    pub fn ranks(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        (0_u32..)
            .zip(&self.request.groups)
            .flat_map(|(index, group)| (0..group.count).map(move |process| (index, process)))
    }

    fn check(&self) -> Result<(), SpecError> {
        let bound = |what, got, max| {
            if got <= max { Ok(()) } else { Err(SpecError::TooLarge { what, got, max }) }
        };
        bound("title", self.title.chars().count(), TITLE_CHARS_MAX)?;
        if let Command::Direct(text) = &self.command {
            bound("command", text.len(), DIRECT_BYTES_MAX)?;
        }
        bound("environment", self.env.len(), ENV_ENTRIES_MAX)?;
        for (name, value) in &self.env {
            bound("environment value", value.len(), TEXT_BYTES_MAX)?;
            if name.is_empty() || name.len() > 256 || name.contains(['=', '\0']) {
                return Err(SpecError::EnvName(name.chars().take(80).collect()));
            }
        }
        bound("artifacts", self.artifacts.len(), ARTIFACTS_MAX)?;
        for path in &self.artifacts {
            bound("artifact path", path.len(), TEXT_BYTES_MAX)?;
            let outside = path.starts_with('/')
                || path.contains('\0')
                || path.split('/').any(|part| part == "..")
                || path.split('/').all(|part| part.is_empty() || part == ".");
            if outside {
                return Err(SpecError::ArtifactPath(path.chars().take(200).collect()));
            }
        }
        if self.grace.0 > GRACE_MS_MAX {
            return Err(SpecError::Grace);
        }
        if self.retries > RETRIES_MAX {
            return Err(SpecError::Retries);
        }
        if !(LOST_AFTER_MS_MIN..=LOST_AFTER_MS_MAX).contains(&self.lost_after_ms) {
            return Err(SpecError::LostAfter);
        }
        let keep_every = KEEP_EVERY_MS_MIN..=KEEP_EVERY_MS_MAX;
        if self.keep_every_ms != 0 && !keep_every.contains(&self.keep_every_ms) {
            return Err(SpecError::KeepEvery);
        }
        let distinct = crate::record::are_distinct(&self.keepers);
        if self.keepers.is_empty() || self.keepers.len() > KEEPERS_MAX || !distinct {
            return Err(SpecError::Keepers);
        }
        self.request.check().map_err(|e| SpecError::Malformed(e.to_string()))
    }
}

impl VerifiedSpec {
    /// Check what was received: signature by the owner named inside, and every bound.
    ///
    /// # Errors
    /// [`SpecError`] naming what is wrong.
    pub fn verify(signed: SignedBytes) -> Result<Self, SpecError> {
        if signed.bytes.len() > SPEC_BYTES_MAX {
            let got = signed.bytes.len();
            return Err(SpecError::TooLarge { what: "spec", got, max: SPEC_BYTES_MAX });
        }
        let bytes = signed.verify(Domain::JobSpec).map_err(|_| SpecError::Signature)?;
        let spec: JobSpec = wire::decode(bytes).map_err(|e| SpecError::Malformed(e.to_string()))?;
        if spec.owner.0 != signed.signer {
            return Err(SpecError::Signature);
        }
        spec.check()?;
        Ok(Self { job: JobId::of(&signed.bytes), spec, signed })
    }

    /// Trees that must be on a node before a process of the job can start there.
    pub fn inputs(&self) -> impl Iterator<Item = BlobId> + '_ {
        core::iter::once(self.spec.code).chain(self.spec.continues.iter().map(|c| c.keep))
    }
}
