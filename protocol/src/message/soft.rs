//! Soft state: what gossip carries and reconciliation repairs. It expires.

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{
    BootId, JobId, PeerId, UserId,
    identity::SignedBytes,
    inventory::{Capacity, GpuUuid},
    job::State,
};

/// A piece of pool state, as its author signed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Soft {
    /// An [`Advert`].
    Advert(SignedBytes),
    /// A [`Head`].
    Head(SignedBytes),
    /// A roster statement.
    Statement(SignedBytes),
}

impl Soft {
    /// The signed bytes inside.
    #[must_use]
    pub const fn signed(&self) -> &SignedBytes {
        match self {
            Self::Advert(signed) | Self::Head(signed) | Self::Statement(signed) => signed,
        }
    }
}

/// Whether a GPU can be had, as seen when the advert was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GpuState {
    /// Nobody uses it.
    Free,
    /// A job of the pool uses or holds it.
    Used,
    /// A process that is not the pool's computes on it.
    Foreign,
}

/// A node's description of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advert {
    /// The node; its key signs the advert.
    pub node: PeerId,
    /// The daemon's boot.
    pub boot: BootId,
    /// Boots of this node so far: orders adverts of different boots.
    pub boot_count: u64,
    /// Counts adverts of one boot.
    pub seq: u64,
    /// When it was made, by the node's wall clock: only to let it expire.
    pub issued_at_ms: u64,
    /// The store a record kept here is kept in.
    pub store: crate::StoreId,
    /// Offers nothing and keeps nothing, for good or for now.
    pub client: bool,
    /// Runs only its owner's jobs, and why.
    pub owner_only: Option<String>,
    /// Everything it offers, in use or not; of a client, what it offers at other times.
    pub capacity: Capacity,
    /// GPUs that are not free.
    pub not_free: Vec<(GpuUuid, GpuState)>,
    /// Cores and MiB that are free.
    pub free_cpu_cores: u32,
    /// See above.
    pub free_ram_mib: u64,
    /// Where libp2p listens (QUIC and TCP on one port).
    pub control: Vec<SocketAddr>,
    /// Where the data plane and the door listen.
    pub data: Vec<SocketAddr>,
}

/// A keeper's announcement of a job: how a job is found from anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The job.
    pub job: JobId,
    /// The keeper that says so; its key signs the head.
    pub keeper: PeerId,
    /// All keepers of the record, the sender among them.
    pub keepers: Vec<PeerId>,
    /// The configuration.
    pub epoch: u32,
    /// The record value's sequence number.
    pub seq: u64,
    /// Its owner.
    pub owner: UserId,
    /// When it was submitted.
    pub submitted_at_ms: u64,
    /// Its state. Only birth, a change of keepers and [`State::Done`] are announced.
    pub state: State,
}
