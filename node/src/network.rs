//! The control plane: libp2p between members.
//!
//! One task owns the swarm; a [`Network`] sends it commands and never blocks, and what
//! happens comes back as [`Event`]s. Both ways are bounded: what does not fit on the way
//! out is [`Event::Undeliverable`], and while the daemon leaves events lying, messages
//! are not acknowledged and their senders wait.
//!
//! Only members may connect or be dialled ([`Network::set_members`]). Others are refused
//! once their key is proved and before any protocol is spoken, so that nothing of the pool
//! is shown; how a newcomer becomes a member is the door's matter, not this module's.
//!
//! A member that cannot be dialled has a few others pass on for it (relays), and is reached
//! through them; where both NATs allow it, a hole is punched and the relay left out again.
//! [`Network::set_standing`] says which of it this node does.
//!
//! A direct message is a request whose answer is one byte, sent when the daemon has the
//! message in its queue. Gossip is not signed again here: each item carries its author's
//! signature, the daemon judges it, and its id is its BLAKE3 hash, so that an item is one
//! item whoever passes it on.

mod address;
mod behaviour;
mod codec;
mod driver;
mod lan;
mod peers;
mod relays;
mod seen;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::SocketAddr,
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
};

use futures::StreamExt as _;
use p2pit_protocol::{PeerId, PoolId, identity::KeyPair};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tracing::debug;

use self::{behaviour::TUNNEL_PROTOCOL, driver::Driver};
use crate::{
    daemon::bundle::BUNDLE_BYTES_MAX,
    transfer::endpoint::{from_libp2p, to_libp2p},
};

pub use self::lan::{Announcement, Found, Lan, LanEvent, browse_once};

/// Events that wait for the daemon. Gossip gets half of it: it can be had again.
pub const EVENTS_MAX: usize = 1_024;
/// Commands that wait for the swarm.
pub const COMMANDS_MAX: usize = 4_096;
/// Addresses of one peer that are remembered and tried.
pub const ADDRESSES_MAX: usize = 16;
/// Members that pass on for one that cannot be dialled.
pub const RELAYS_MAX: usize = 3;
/// The largest piece of gossip, in bytes. What the protocol sends is far smaller.
pub const GOSSIP_BYTES_MAX: usize = 64 << 10;

/// What a network needs to start.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Proves who this node is.
    pub key: KeyPair,
    /// Names the gossip's topic.
    pub pool: PoolId,
    /// For QUIC (UDP) and TCP alike; port 0 is one that is free for both. `[::]` serves
    /// IPv4 as well.
    pub listen: SocketAddr,
}

/// A handle; clones share the swarm, which ends when the last of them is gone.
#[derive(Clone)]
pub struct Network {
    commands: mpsc::Sender<Command>,
    /// Apart from the commands, because a change of members must never be lost.
    members: Arc<watch::Sender<BTreeSet<PeerId>>>,
    outbound: Budget,
    shared: Arc<Shared>,
    streams: libp2p_stream::Control,
}

/// How a member is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Direct(SocketAddr),
    /// Another member passes on.
    Relayed(PeerId),
}

/// A member that passes on for another, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    pub node: PeerId,
    pub addrs: Vec<SocketAddr>,
}

/// What the daemon found out about how others reach this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Others can dial it at these: it passes on for those that cannot be dialled.
    pub public: Vec<SocketAddr>,
    /// It cannot be dialled: these are to pass on for it.
    pub relays: Vec<Relay>,
}

/// How the last try to be connected directly with a member behind a relay ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Punch {
    Open,
    Shut(String),
}

/// A stream of a connection of the control plane, for requests of the data plane.
#[derive(Debug)]
pub struct Tunnel {
    pub stream: libp2p::Stream,
    /// It may go through a relay.
    pub relayed: bool,
    /// To be kept with the stream.
    pub in_use: InUse,
}

/// While it lives no connection to the peer is let go of for a better one.
pub struct InUse {
    shared: Arc<Shared>,
    peer: PeerId,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut tunnels = lock(&self.shared.tunnels);
        if let Some(count) = tunnels.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                tunnels.remove(&self.peer);
            }
        }
    }
}

impl fmt::Debug for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InUse").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Tunnels as others open them.
pub struct Tunnels {
    incoming: libp2p_stream::IncomingStreams,
    network: Network,
}

impl fmt::Debug for Tunnels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnels").finish_non_exhaustive()
    }
}

impl Tunnels {
    /// Who opened the next one; `None` once the network has ended.
    pub async fn next(&mut self) -> Option<(PeerId, Tunnel)> {
        loop {
            let (peer, stream) = self.incoming.next().await?;
            if let Some(peer) = from_libp2p(&peer) {
                let in_use = self.network.in_use(peer);
                return Some((peer, self.network.tunnel(in_use, stream)));
            }
        }
    }
}

/// What the network has to say.
#[derive(Debug)]
pub enum Event {
    /// A member is connected: now, or again after a restart of it.
    Connected(PeerId, Route),
    /// The last connection to a member is gone.
    Disconnected(PeerId),
    /// No address of a member answers as that member.
    DialFailed(PeerId, String),
    /// A direct message. It may have come before.
    Message { from: PeerId, bytes: Payload },
    /// Gossip that waits for [`Network::report_gossip`]. `from` passed it on; who made it
    /// is known from its signature alone.
    Gossip { from: PeerId, bytes: Payload, id: GossipId },
    /// One or more messages to a member were not acknowledged; it may have them all the
    /// same.
    Undeliverable { to: PeerId },
    /// Where this node listens has changed.
    ListenAddrs(Vec<SocketAddr>),
    /// These members pass on for this node now.
    Relays(Vec<PeerId>),
}

/// Bytes from another node. While it lives it counts against what may wait here.
pub struct Payload {
    bytes: Vec<u8>,
    _permit: OwnedSemaphorePermit,
}

/// Names a piece of gossip as it came from one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GossipId {
    hash: [u8; 32],
    from: PeerId,
}

/// What the daemon thinks of a piece of gossip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptance {
    /// Passed on.
    Accept,
    /// Not passed on, and nobody's fault: old, or not understood yet.
    Ignore,
    /// Nothing that an honest node passes on; counts against whoever did.
    Reject,
}

impl Network {
    /// Listens, and returns once the addresses are known.
    ///
    /// # Errors
    /// The address is taken, or not this machine's.
    pub async fn start(config: NetworkConfig) -> anyhow::Result<(Self, mpsc::Receiver<Event>)> {
        let (commands, command_receiver) = mpsc::channel(COMMANDS_MAX);
        let (events, event_receiver) = mpsc::channel(EVENTS_MAX);
        let (members, member_receiver) = watch::channel(BTreeSet::new());
        let shared = Arc::new(Shared::default());
        let mut driver = Driver::new(&config, events, Arc::clone(&shared))?;
        driver.listen(config.listen).await?;
        let streams = driver.streams();
        tokio::spawn(driver.run(command_receiver, member_receiver));
        let members = Arc::new(members);
        let outbound = Budget::new();
        Ok((Self { commands, members, outbound, shared, streams }, event_receiver))
    }

    /// Where this node listens, each for QUIC and TCP; an unspecified address as those of
    /// the interfaces.
    pub fn listen_addrs(&self) -> Vec<SocketAddr> {
        lock(&self.shared.listen).clone()
    }

    /// Sends an encoded message, dialling where there is no connection but an address.
    /// Either it is acknowledged, or [`Event::Undeliverable`] follows: at once, after 5 s
    /// without a connection, or 5 s after it was sent.
    pub fn send(&self, to: PeerId, message: Vec<u8>) {
        let fits = message.len() <= BUNDLE_BYTES_MAX;
        let payload = if fits { self.outbound.try_take(message) } else { None };
        let Some(payload) = payload else {
            debug!(%to, fits, "message not queued");
            return self.refuse(to);
        };
        if self.commands.try_send(Command::Send { to, payload }).is_err() {
            self.refuse(to);
        }
    }

    /// Gossips in the pool. Where nobody listens, or too much waits, it is lost: whoever
    /// gossips has another way to make the state known.
    pub fn publish(&self, bytes: Vec<u8>) {
        if self.commands.try_send(Command::Publish(bytes)).is_err() {
            debug!("gossip not queued");
        }
    }

    /// Who may connect and be dialled from now on; connections with others are closed.
    pub fn set_members(&self, members: BTreeSet<PeerId>) {
        self.members.send_replace(members);
    }

    /// Remembers where a member may be, the newest first, and connects to it unless that
    /// is done or under way. QUIC is preferred; TCP follows a moment later, and then those of
    /// `relays`, who pass on for it.
    pub fn dial(&self, peer: PeerId, addrs: Vec<SocketAddr>, relays: Vec<Relay>) {
        if self.commands.try_send(Command::Dial { peer, addrs, relays }).is_err() {
            self.refuse(peer);
        }
    }

    /// How others reach this node, as far as is known now. To be said again from time to time:
    /// where too much waits it is not heard.
    pub fn set_standing(&self, standing: Standing) {
        if self.commands.try_send(Command::Stand(standing)).is_err() {
            debug!("how this node is reached was not heard");
        }
    }

    /// How a member is connected, directly where there is a choice; `None` where it is not.
    pub fn route(&self, peer: PeerId) -> Option<Route> {
        lock(&self.shared.routes).get(&peer).copied()
    }

    /// The members that pass on for this node.
    pub fn relays(&self) -> Vec<PeerId> {
        lock(&self.shared.relays).clone()
    }

    /// How tries ended to be connected directly with members behind relays.
    pub fn punches(&self) -> BTreeMap<PeerId, Punch> {
        lock(&self.shared.punches).clone()
    }

    /// A stream to a connected member, as it comes in at [`Self::take_tunnels`] there.
    ///
    /// # Errors
    /// It is not connected, or does not answer.
    pub async fn open_tunnel(&self, peer: PeerId) -> io::Result<Tunnel> {
        if self.route(peer).is_none() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "no connection"));
        }
        let in_use = self.in_use(peer);
        let mut streams = self.streams.clone();
        let opened = streams.open_stream(to_libp2p(peer), TUNNEL_PROTOCOL).await;
        let stream = opened.map_err(io::Error::other)?;
        Ok(self.tunnel(in_use, stream))
    }

    /// What members open with [`Self::open_tunnel`]; once.
    pub fn take_tunnels(&self) -> Option<Tunnels> {
        let incoming = self.streams.clone().accept(TUNNEL_PROTOCOL).ok()?;
        Some(Tunnels { incoming, network: self.clone() })
    }

    fn tunnel(&self, in_use: InUse, stream: libp2p::Stream) -> Tunnel {
        // Which of several connections carries a stream cannot be seen.
        let relayed = !matches!(self.route(in_use.peer), Some(Route::Direct(_)))
            || lock(&self.shared.relayed).contains(&in_use.peer);
        Tunnel { stream, relayed, in_use }
    }

    fn in_use(&self, peer: PeerId) -> InUse {
        *lock(&self.shared.tunnels).entry(peer).or_default() += 1;
        InUse { shared: Arc::clone(&self.shared), peer }
    }

    /// The daemon's judgement, within seconds: later, gossip is forgotten unjudged.
    pub fn report_gossip(&self, id: GossipId, acceptance: Acceptance) {
        if self.commands.try_send(Command::Report { id, acceptance }).is_err() {
            debug!("judgement of gossip not queued");
        }
    }

    /// Closes all connections and returns once the peers have been told, or do not
    /// listen.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.commands.send(Command::Close(done)).await.is_ok() {
            // Without an answer it is closed, too.
            let _ = closed.await;
        }
    }

    /// The swarm tells of it, in order with everything else.
    fn refuse(&self, peer: PeerId) {
        lock(&self.shared.refused).insert(peer);
        self.shared.refusal.notify_one();
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("listen", &self.listen_addrs()).finish_non_exhaustive()
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes.len())
    }
}

enum Command {
    Send { to: PeerId, payload: Payload },
    Publish(Vec<u8>),
    Dial { peer: PeerId, addrs: Vec<SocketAddr>, relays: Vec<Relay> },
    Stand(Standing),
    Report { id: GossipId, acceptance: Acceptance },
    Close(oneshot::Sender<()>),
}

/// What the handle and the swarm's task both touch.
#[derive(Default)]
struct Shared {
    listen: Mutex<Vec<SocketAddr>>,
    /// Peers with a command that was not queued. They are ones that the daemon named.
    refused: Mutex<BTreeSet<PeerId>>,
    refusal: Notify,
    routes: Mutex<BTreeMap<PeerId, Route>>,
    /// Who has a connection through a relay, if besides others.
    relayed: Mutex<BTreeSet<PeerId>>,
    relays: Mutex<Vec<PeerId>>,
    punches: Mutex<BTreeMap<PeerId, Punch>>,
    /// How many go on with each peer.
    tunnels: Mutex<BTreeMap<PeerId, usize>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that may wait in one direction, from all peers together. Small messages have a
/// share of their own, which one peer cannot use up: it may have 4 connections of 128
/// messages of 64 KiB in flight.
#[derive(Clone)]
struct Budget {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

const SMALL_BYTES_MAX: usize = 64 << 10;
const SMALL_KIB: usize = 48 << 10;
const LARGE_KIB: usize = 65 << 10;

impl Budget {
    fn new() -> Self {
        Self {
            small: Arc::new(Semaphore::new(SMALL_KIB)),
            large: Arc::new(Semaphore::new(LARGE_KIB)),
        }
    }

    /// `None` where the budget is spent.
    fn try_take(&self, bytes: Vec<u8>) -> Option<Payload> {
        let (share, permits) = self.share(bytes.len());
        let permit = Arc::clone(share).try_acquire_many_owned(permits).ok()?;
        Some(Payload { bytes, _permit: permit })
    }

    /// Waits for room, and only then allocates.
    async fn reserve(&self, len: usize) -> Payload {
        let (share, permits) = self.share(len);
        #[expect(clippy::expect_used, reason = "these semaphores are never closed")]
        let permit = Arc::clone(share).acquire_many_owned(permits).await.expect("open");
        Payload { bytes: vec![0; len], _permit: permit }
    }

    /// For at most [`BUNDLE_BYTES_MAX`].
    fn share(&self, len: usize) -> (&Arc<Semaphore>, u32) {
        let share = if len <= SMALL_BYTES_MAX { &self.small } else { &self.large };
        // An empty message costs its queue entry.
        let kib = len.div_ceil(1024).max(1);
        (share, u32::try_from(kib).unwrap_or(u32::MAX))
    }
}
