//! Content and how it travels: blobs by their hash, directories as trees of blobs,
//! and the QUIC data plane between nodes.
//!
//! A directory becomes a [`tree::Tree`] by [`snapshot()`] (what a user submits, ignore
//! rules applied) or [`ingest()`] (what a job left behind, taken as it is). Its manifest
//! is itself a blob, so one [`BlobId`](p2pit_protocol::BlobId) names a whole directory.
//! [`exchange`] moves the blobs that the other side is missing over a stream of an
//! [`endpoint::Endpoint`], and [`materialize()`] writes a tree back to a disk.
//!
//! Nothing here decides who may have what: callers ask `protocol` first.

pub mod endpoint;
pub mod exchange;
pub mod frame;
pub mod ingest;
pub mod materialize;
pub mod pace;
pub mod snapshot;
pub mod store;
pub mod stream;
pub mod tree;
pub mod verified;

mod beneath;
mod holes;
mod tls;
mod workers;

pub use endpoint::{Connection, Endpoint};
pub use ingest::{IngestOptions, ingest};
pub use materialize::{MaterializeOptions, materialize};
pub use pace::Pace;
pub use snapshot::{Snapshot, SnapshotOptions, snapshot};
pub use store::BlobStore;
pub use tree::{Tree, TreePath};
