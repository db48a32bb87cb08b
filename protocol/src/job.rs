//! A job: what its owner signed, and the words for how it stands.

mod spec;
mod state;

pub use spec::{
    ARTIFACTS_MAX, Command, Continued, DIRECT_BYTES_MAX, ENV_ENTRIES_MAX, GRACE_MS_MAX, Grace,
    JobSpec, KEEP_EVERY_MS, KEEP_EVERY_MS_MAX, KEEP_EVERY_MS_MIN, KEEPERS_MAX, LOST_AFTER_MS,
    LOST_AFTER_MS_MAX, LOST_AFTER_MS_MIN, Policy, RETRIES_MAX, SPEC_BYTES_MAX, Source, SpecError,
    TEXT_BYTES_MAX, TITLE_CHARS_MAX, VerifiedSpec,
};
pub use state::{
    Attempt, Change, Ending, Outcome, Rank, RankAssignment, RankEnd, RankRecord, RankState,
    Removed, SAVED_MAX, Saved, State, StopCause,
};
