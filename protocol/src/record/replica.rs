//! What a keeper has in its journal of one record.

use serde::{Deserialize, Serialize};

use super::{Ballot, Link};
use crate::identity::SignedBytes;

/// A keeper's journal entry: the acceptor of one record, in the latest epoch it knows.
///
/// An earlier epoch needs no entry of its own: the links prove that it is sealed, so that
/// whoever still proposes in it is shown them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The job as its owner signed it.
    pub spec: SignedBytes,
    /// From the spec's keepers to this epoch's; their number is the epoch.
    pub links: Vec<Link>,
    /// No proposal below this is accepted.
    pub promised: Ballot,
    /// The proposal that `value_bytes` was accepted in; [`Ballot::ZERO`] for the epoch's first.
    pub accepted: Ballot,
    /// The encoded [`super::Value`] accepted last; empty where this node keeps the record no
    /// more, and only tells who does.
    pub value_bytes: Vec<u8>,
}
