//! Soft state: what gossip carries and reconciliation repairs. It expires.

use core::{fmt, net::SocketAddr};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize, Serializer};

use crate::{
    BootId, JobId, PeerId, UserId,
    identity::{Domain, SignedBytes},
    inventory::{Capacity, GpuUuid},
    job::State,
    reconcile::ItemId,
    wire,
};

/// A piece of pool state, as its author signed it.
///
/// A copy is another reference to the same bytes: it lies on the board, among what is
/// reconciled and in what is to be sent, and its hash and its advert are worked out once.
#[derive(Clone, Deserialize)]
#[serde(from = "Piece")]
pub struct Soft(Arc<Inner>);

struct Inner {
    piece: Piece,
    id: OnceLock<ItemId>,
    advert: OnceLock<Option<Arc<Advert>>>,
}

/// What a [`Soft`] is, and what it is on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Piece {
    /// An [`Advert`].
    Advert(SignedBytes),
    /// A [`Head`].
    Head(SignedBytes),
    /// A roster statement.
    Statement(SignedBytes),
}

impl From<Piece> for Soft {
    fn from(piece: Piece) -> Self {
        Self(Arc::new(Inner { piece, id: OnceLock::new(), advert: OnceLock::new() }))
    }
}

impl Serialize for Soft {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.piece().serialize(serializer)
    }
}

impl Soft {
    /// A signed [`Advert`].
    #[must_use]
    pub fn advert(signed: SignedBytes) -> Self {
        Piece::Advert(signed).into()
    }

    /// A signed [`Head`].
    #[must_use]
    pub fn head(signed: SignedBytes) -> Self {
        Piece::Head(signed).into()
    }

    /// A signed roster statement.
    #[must_use]
    pub fn statement(signed: SignedBytes) -> Self {
        Piece::Statement(signed).into()
    }

    /// What it is.
    #[must_use]
    pub fn piece(&self) -> &Piece {
        &self.0.piece
    }

    /// The signed bytes inside.
    #[must_use]
    pub fn signed(&self) -> &SignedBytes {
        match self.piece() {
            Piece::Advert(signed) | Piece::Head(signed) | Piece::Statement(signed) => signed,
        }
    }

    /// The BLAKE3 hash of its encoding.
    #[must_use]
    pub fn id(&self) -> ItemId {
        *self.0.id.get_or_init(|| *blake3::hash(&wire::encode(self.piece())).as_bytes())
    }

    /// The advert inside; `None` where it is none, or not signed by the node it is about.
    #[must_use]
    pub fn verified_advert(&self) -> Option<&Arc<Advert>> {
        let verify = || {
            let Piece::Advert(signed) = self.piece() else { return None };
            let advert: Advert = wire::decode(signed.verify(Domain::Advert).ok()?).ok()?;
            (advert.node.0 == signed.signer).then(|| Arc::new(advert))
        };
        self.0.advert.get_or_init(verify).as_ref()
    }
}

impl fmt::Debug for Soft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.piece().fmt(f)
    }
}

impl PartialEq for Soft {
    fn eq(&self, other: &Self) -> bool {
        self.piece() == other.piece()
    }
}

impl Eq for Soft {}

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
    /// Has no room for more content: inputs, copies and results are better brought elsewhere.
    pub full: bool,
    /// Where libp2p listens (QUIC and TCP on one port).
    pub control: Vec<SocketAddr>,
    /// Where the data plane and the door listen.
    pub data: Vec<SocketAddr>,
    /// Whether others can dial it there.
    pub reach: Reach,
    /// Members that pass on for it while they cannot.
    pub relays: Vec<PeerId>,
}

/// Whether other nodes can dial a node, as those that tried have told it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// Nobody has tried.
    #[default]
    Unknown,
    /// They can.
    Open,
    /// Not all can: it is behind a NAT or a firewall.
    Behind,
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
    /// Whether the sender knows that this value was chosen, and has not only accepted it.
    pub chosen: bool,
}

impl Head {
    /// What tells which of two heads of a job says more.
    pub(crate) const fn version(&self) -> (u32, u64, bool) {
        (self.epoch, self.seq, self.chosen)
    }
}
