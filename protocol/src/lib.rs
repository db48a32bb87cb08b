//! What the peers of a p2pit pool say to each other and how they behave.
//!
//! Everything here is a plain state machine: no runtime, socket, file, clock,
//! ambient randomness or dependence on hash-map order. Time comes in with each
//! call, seeds at construction, and effects go out through `poll_*`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod bidder;
pub mod copies;
pub mod door;
pub mod identity;
pub mod inventory;
pub mod job;
pub mod message;
pub mod peer;
pub mod reconcile;
pub mod record;
pub mod request;
pub mod roster;
pub mod sabotage;
pub mod steward;
pub mod time;
pub mod timer;
pub mod wire;

pub use identity::{BlobId, BootId, HoldId, JobId, PeerId, PoolId, StatementId, StoreId, UserId};
pub use peer::Peer;
pub use time::Now;
