//! What holders of a job's logs and results say of their copies.

use serde::{Deserialize, Serialize};

use crate::{BlobId, job::Rank};

/// Most ranks in one [`super::Message::Copies`].
pub const COPIES_MAX: usize = 4_096;

/// How a node stands to the copy of one rank of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyState {
    /// The rank.
    pub rank: Rank,
    /// What the rank left (log, `keep/`, artifacts, as the record names them) is all here and
    /// durable.
    pub complete: bool,
    /// The newest copy of `keep/` that is here, from while the process ran: its number within
    /// the attempt, and the tree.
    pub save: Option<(u64, BlobId)>,
    /// It is to be copied here and is being copied.
    pub under_way: bool,
    /// Why it cannot be copied here now, for people.
    pub cannot: Option<String>,
}
