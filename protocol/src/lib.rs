//! What the peers of a p2pit pool say to each other and how they behave.
//!
//! Everything here is a plain state machine: no runtime, socket, file, clock,
//! ambient randomness or dependence on hash-map order. Time comes in with each
//! call, seeds at construction, and effects go out through `poll_*`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod identity;
pub mod inventory;
pub mod request;
pub mod time;
pub mod wire;

pub use identity::{BlobId, BootId, HoldId, JobId, PeerId, PoolId, StatementId, StoreId, UserId};
pub use time::Now;
