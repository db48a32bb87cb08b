//! Ballots: the order among proposals for one register.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::{PeerId, StoreId};

/// A member of a record's configuration: a node with the store it keeps the record in. The
/// same node with another store has promised nothing, and so is not a member.
pub type Keeper = (PeerId, StoreId);

/// A proposal's number: the counter first, then who proposes. No two proposers have the
/// same, since each uses its own store's id, and journals a counter before using it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ballot {
    /// Counts up.
    pub counter: u64,
    /// The proposer's store.
    pub store: StoreId,
}

impl Ballot {
    /// Below every proposal: what an epoch's first value is accepted at.
    pub const ZERO: Self = Self { counter: 0, store: StoreId([0; 16]) };

    /// The lowest ballot of `store` above this one.
    #[must_use]
    pub const fn next_of(self, store: StoreId) -> Self {
        Self { counter: self.counter.saturating_add(1), store }
    }
}

impl fmt::Debug for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:?}", self.counter, self.store)
    }
}
