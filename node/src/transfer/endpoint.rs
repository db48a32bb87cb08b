//! The data plane's QUIC endpoint.
//!
//! Both sides of a connection show a certificate that binds the TLS key to their libp2p
//! identity, so the [`PeerId`] at the other end is proved before anything is said. Any
//! identity may connect; the caller's `is_allowed` decides, by peer and protocol, who is
//! served. A protocol is an ALPN; each has its own bounds, so that strangers at the door
//! take nothing from members.
//!
//! Outgoing connections are pooled by peer, protocol and lane: whoever connects while
//! another is connecting gets the same connection, a dead one is dialled again, and one
//! that nobody asked for in a minute is let go of once its streams have ended. One that came
//! in can be pooled, too ([`Endpoint::adopt`]): a peer that cannot be dialled is asked to dial,
//! and streams go both ways.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures::{
    FutureExt, StreamExt,
    future::{BoxFuture, Shared},
    stream::FuturesUnordered,
};
use p2pit_protocol::{PeerId, identity::KeyPair};
use quinn::{
    ClientConfig, ConnectionError, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, TransportErrorCode, VarInt,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
    rustls::pki_types::CertificateDer,
};
use rustix::net::sockopt::{
    set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, set_socket_send_buffer_size,
};
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use thiserror::Error;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep_until, timeout},
};

use super::tls;

/// Where a newcomer, or a member with an old roster, speaks first.
pub const DOOR: Protocol =
    Protocol { alpn: b"p2pit/door/1", connections_max: 256, window_bytes: 2 << 20 };
/// Blobs and logs between members.
pub const DATA: Protocol =
    Protocol { alpn: b"p2pit/data/2", connections_max: 1024, window_bytes: 32 << 20 };

/// Incoming connections of one peer under one protocol: a few for bulk, and those that
/// have not noticed yet that they are dead.
pub const CONNECTIONS_PER_PEER_MAX: usize = 16;
/// Connections of one peer under one protocol that [`Endpoint::connect_lane`] tells apart.
pub const LANES_MAX: u8 = 4;
/// Streams that a peer may have open in one connection, each way.
pub const STREAMS_MAX: u32 = 256;
/// Handshakes in progress. Beyond half of them, newcomers prove their address first.
pub const HANDSHAKES_MAX: usize = 128;
/// Addresses of one peer that are tried.
pub const ADDRESSES_MAX: usize = 16;

/// A peer that is there answers a ping in time even when it is busy; three are missed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(8);
/// For all addresses of a peer together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// The head start of an address over the next, as in RFC 8305.
const DIAL_STAGGER: Duration = Duration::from_millis(150);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connections are waited for that were told of the end.
const CLOSE_WAIT: Duration = Duration::from_millis(500);
/// How long the pool holds a connection that nobody asks for.
const POOL_IDLE: Duration = Duration::from_secs(60);
/// Accepted connections that wait for the caller of [`Endpoint::accept`].
const ACCEPT_QUEUE: usize = 64;
/// For the kernel's buffers; what it does not grant is done without.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// Of one stream: the product of 10 Gbit/s and 10 ms.
const STREAM_WINDOW_BYTES: u32 = 12 << 20;
/// Before the peer is known, and for peers of the door.
const FIRST_WINDOW_BYTES: u32 = 1 << 20;
/// Jumbo frames where the path has them. Beyond 6400, a virtual network on top of this
/// one collapses.
const MTU_MAX: u16 = 6000;
/// Not looked up or verified by anybody: identities are in the certificates.
const SERVER_NAME: &str = "p2pit";

/// Spoken by nobody.
const PROBE_ALPN: &[u8] = b"p2pit/probe";
/// TLS's alert `no_application_protocol`.
const NO_SUCH_PROTOCOL: u8 = 120;

const CLOSE_DONE: VarInt = VarInt::from_u32(0);
const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);
const CLOSE_WRONG_PEER: VarInt = VarInt::from_u32(2);

/// What is spoken on a connection, and how much of it at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    pub alpn: &'static [u8],
    /// Incoming connections under this protocol.
    pub connections_max: usize,
    /// Bytes of one connection that arrived and have not been read.
    pub window_bytes: u32,
}

/// Decides whether a proved peer is served under an ALPN.
pub type IsAllowed = Arc<dyn Fn(&PeerId, &[u8]) -> bool + Send + Sync>;

/// Why there is no endpoint.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("cannot bind UDP {addr}")]
    Socket { addr: SocketAddr, source: io::Error },
    #[error("no TLS configuration for this identity: {0}")]
    Tls(String),
}

/// Why a peer was not reached. Shared by all who waited for the same attempt.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    #[error("no address of {0} is known")]
    NoAddress(PeerId),
    #[error("`{}` is not spoken here", .0.escape_ascii())]
    UnknownProtocol(Vec<u8>),
    /// Somebody answers, and it is somebody else.
    #[error("at {addr} is {found}, not {expected}")]
    WrongPeer { expected: PeerId, found: PeerId, addr: SocketAddr },
    #[error("{peer} does not answer: {}", join_attempts(.attempts))]
    Unreachable { peer: PeerId, attempts: Vec<(SocketAddr, String)> },
    #[error("the endpoint is closed")]
    Closed,
}

/// An endpoint; clones share it.
#[derive(Clone)]
pub struct Endpoint {
    shared: Arc<SharedState>,
    incoming: Arc<tokio::sync::Mutex<mpsc::Receiver<Incoming>>>,
}

struct SharedState {
    quinn: quinn::Endpoint,
    local: PeerId,
    identity: libp2p_identity::Keypair,
    protocols: Vec<(Protocol, ClientConfig)>,
    pool: Mutex<Pool>,
    slots: Arc<Slots>,
}

/// A connection that came in, from a peer that is allowed.
#[derive(Debug)]
pub struct Incoming {
    pub peer: PeerId,
    pub alpn: &'static [u8],
    pub connection: Connection,
}

/// A connection to a proved peer. It closes when its last clone and stream are gone.
#[derive(Clone)]
pub struct Connection {
    quinn: quinn::Connection,
    peer: PeerId,
    /// Counts an incoming connection against its bounds.
    _slot: Option<Arc<Slot>>,
}

impl Endpoint {
    /// Binds UDP `addr` and serves `protocols` to whom `is_allowed` lets in. An address of
    /// `[::]` serves IPv4 as well where the system can. Must be called within a runtime.
    pub fn bind(
        keypair: &KeyPair,
        addr: SocketAddr,
        protocols: &[Protocol],
        is_allowed: IsAllowed,
    ) -> Result<Self, BindError> {
        let in_bind = |source| BindError::Socket { addr, source };
        let identity = libp2p_keypair(keypair);
        let transport = Arc::new(transport());
        let server = server_config(&identity, protocols, Arc::clone(&transport))?;
        let protocols = client_configs(&identity, protocols, &transport)?;
        let socket = udp_socket(addr).map_err(in_bind)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let quinn = quinn::Endpoint::new(endpoint_config(), Some(server), socket, runtime)
            .map_err(in_bind)?;
        let shared = Arc::new(SharedState {
            quinn: quinn.clone(),
            local: PeerId(keypair.public()),
            identity,
            protocols,
            pool: Mutex::default(),
            slots: Arc::default(),
        });
        let (sender, incoming) = mpsc::channel(ACCEPT_QUEUE);
        let gate = Gate {
            protocols: shared.protocols.iter().map(|(protocol, _)| *protocol).collect(),
            is_allowed,
            slots: Arc::clone(&shared.slots),
            sender,
        };
        tokio::spawn(accept_all(quinn, Arc::new(gate)));
        tokio::spawn(sweep_pool(Arc::downgrade(&shared)));
        Ok(Self { shared, incoming: Arc::new(tokio::sync::Mutex::new(incoming)) })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.quinn.local_addr()
    }

    pub fn local_peer(&self) -> PeerId {
        self.shared.local
    }

    /// A connection to `peer` under `alpn`: the pooled one while it lives, else a new one
    /// by whichever of `addrs` answers first as that peer. A peer that does not want us
    /// closes the connection right after; the first use of it shows that.
    pub async fn connect(
        &self,
        peer: PeerId,
        addrs: &[SocketAddr],
        alpn: &[u8],
    ) -> Result<Connection, ConnectError> {
        self.connect_lane(peer, addrs, alpn, 0).await
    }

    /// As [`Self::connect`], with one connection per lane (modulo [`LANES_MAX`]): bulk
    /// is faster over several, and does not hold up the others.
    pub async fn connect_lane(
        &self,
        peer: PeerId,
        addrs: &[SocketAddr],
        alpn: &[u8],
        lane: u8,
    ) -> Result<Connection, ConnectError> {
        let known = self.shared.protocols.iter().find(|(protocol, _)| protocol.alpn == alpn);
        let Some((protocol, config)) = known else {
            return Err(ConnectError::UnknownProtocol(alpn.to_vec()));
        };
        let key = (peer, protocol.alpn, lane % LANES_MAX);
        let dialling = {
            let mut pool = self.shared.pool();
            match pool.usable(&key) {
                Some(dialling) => dialling,
                None if addrs.is_empty() => return Err(ConnectError::NoAddress(peer)),
                None => {
                    let dial = Dial {
                        endpoint: self.shared.quinn.clone(),
                        config: config.clone(),
                        protocol: *protocol,
                        peer,
                        addrs: addrs.iter().take(ADDRESSES_MAX).copied().collect(),
                        patience: DIAL_TIMEOUT,
                    };
                    // Its own task, so that it goes on for the others when the first to
                    // ask gives up.
                    let task = tokio::spawn(dial.run());
                    let dialling: Dialling =
                        async move { task.await.unwrap_or(Err(ConnectError::Closed)) }
                            .boxed()
                            .shared();
                    pool.insert(key, dialling.clone());
                    dialling
                }
            }
        };
        dialling.await
    }

    /// The pooled connection with `peer`, if there is one that lives: nothing is dialled or
    /// waited for.
    pub fn pooled(&self, peer: PeerId, alpn: &[u8], lane: u8) -> Option<Connection> {
        let known = self.shared.protocols.iter().find(|(protocol, _)| protocol.alpn == alpn)?;
        let key = (peer, known.0.alpn, lane % LANES_MAX);
        self.shared.pool().usable(&key)?.peek()?.clone().ok()
    }

    /// Pools a connection that came in: it is as good as one that was dialled. One that is in
    /// the pool and lives stays.
    pub fn adopt(&self, connection: Connection, alpn: &[u8], lane: u8) {
        let known = self.shared.protocols.iter().find(|(protocol, _)| protocol.alpn == alpn);
        let Some((protocol, _)) = known else { return };
        let key = (connection.peer(), protocol.alpn, lane % LANES_MAX);
        let mut pool = self.shared.pool();
        let lives = |known: &Dialling| matches!(known.peek(), Some(Ok(_)));
        if !pool.usable(&key).is_some_and(|known| lives(&known)) {
            let ready = std::future::ready(Ok(connection)).boxed().shared();
            // So that it can be seen without being waited for.
            let _ = ready.clone().now_or_never();
            pool.insert(key, ready);
        }
    }

    /// Whether `peer` answers at the address of its door to one who comes from a port that
    /// nothing was sent from before: so no NAT lets it through for old times' sake. The
    /// connection is closed again.
    ///
    /// # Errors
    /// Why not.
    pub async fn probe(
        &self,
        peer: PeerId,
        addr: SocketAddr,
        patience: Duration,
    ) -> Result<(), String> {
        match self.knock_anew(addr, DOOR.alpn, patience).await {
            Ok(Some(found)) if found == peer => Ok(()),
            Ok(_) => Err("somebody else answers there".to_owned()),
            Err(Knocked::NotSpoken) => Err("it is no door".to_owned()),
            Err(Knocked::Failed(reason)) => Err(reason),
        }
    }

    /// As [`Self::probe`], of the control plane: whether anybody answers there who speaks QUIC.
    /// It is asked for a protocol that nobody has, so that it is no connection to them.
    ///
    /// # Errors
    /// Why not.
    pub async fn probe_control(&self, addr: SocketAddr, patience: Duration) -> Result<(), String> {
        match self.knock_anew(addr, PROBE_ALPN, patience).await {
            Ok(_) | Err(Knocked::NotSpoken) => Ok(()),
            Err(Knocked::Failed(reason)) => Err(reason),
        }
    }

    async fn knock_anew(
        &self,
        addr: SocketAddr,
        alpn: &[u8],
        patience: Duration,
    ) -> Result<Option<PeerId>, Knocked> {
        let mut tls = tls::client(&self.shared.identity).map_err(Knocked::failed)?;
        tls.alpn_protocols = vec![alpn.to_vec()];
        let crypto = QuicClientConfig::try_from(tls).map_err(Knocked::failed)?;
        let config = ClientConfig::new(Arc::new(crypto));
        let local = match addr {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let endpoint = quinn::Endpoint::client(local).map_err(Knocked::failed)?;
        let connecting =
            endpoint.connect_with(config, addr, SERVER_NAME).map_err(Knocked::failed)?;
        let quinn = match timeout(patience, connecting).await {
            Ok(Ok(quinn)) => quinn,
            Ok(Err(ConnectionError::ConnectionClosed(closed)))
                if closed.error_code == TransportErrorCode::crypto(NO_SUCH_PROTOCOL) =>
            {
                return Err(Knocked::NotSpoken);
            }
            Ok(Err(reason)) => return Err(Knocked::failed(reason)),
            Err(_elapsed) => return Err(Knocked::failed("no answer")),
        };
        let found = peer_of(&quinn);
        quinn.close(CLOSE_DONE, b"probed");
        // It has been told, or does not listen.
        let _ = timeout(CLOSE_WAIT, endpoint.wait_idle()).await;
        Ok(found)
    }

    /// The next connection from outside; `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<Incoming> {
        self.incoming.lock().await.recv().await
    }

    /// Closes all connections with `peer`, as after its revocation.
    pub fn disconnect(&self, peer: &PeerId) {
        for connection in self.shared.pool().remove_peer(peer) {
            connection.close(CLOSE_REFUSED, b"not allowed");
        }
        for connection in self.shared.slots.of_peer(peer) {
            connection.close(CLOSE_REFUSED, b"not allowed");
        }
    }

    /// Takes the pooled connections with `peer` out of the pool, as after it fell silent:
    /// the next use dials anew. What still goes on in them goes on.
    pub fn forget(&self, peer: &PeerId) {
        drop(self.shared.pool().remove_peer(peer));
    }

    /// Closes all connections and returns once the peers have been told. A connection with a
    /// peer that does not answer lingers for thrice its retransmission time-out, which has
    /// grown with every loss: nobody waits for that.
    pub async fn close(&self) {
        self.shared.pool().connections.clear();
        self.shared.quinn.close(CLOSE_DONE, b"bye");
        if timeout(CLOSE_WAIT, self.shared.quinn.wait_idle()).await.is_err() {
            tracing::debug!("connections with silent peers were left to themselves");
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("local", &self.shared.local).finish_non_exhaustive()
    }
}

impl SharedState {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        // A pool is whole between any two of its statements.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Who is at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Where it is, an IPv4 address as such.
    pub fn addr(&self) -> SocketAddr {
        canonical(self.quinn.remote_address())
    }
}

impl Deref for Connection {
    type Target = quinn::Connection;

    fn deref(&self) -> &quinn::Connection {
        &self.quinn
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("addr", &self.addr())
            .finish_non_exhaustive()
    }
}

/// The same peer in libp2p's type.
#[expect(clippy::expect_used, reason = "to_multihash gives a valid multihash of 38 bytes")]
pub fn to_libp2p(peer: PeerId) -> libp2p_identity::PeerId {
    libp2p_identity::PeerId::from_bytes(&peer.to_multihash()).expect("a peer id's multihash")
}

/// The same peer in our type; `None` where its key is not ed25519.
pub fn from_libp2p(peer: &libp2p_identity::PeerId) -> Option<PeerId> {
    PeerId::from_multihash(&peer.to_bytes())
}

/// The same key in libp2p's type.
#[expect(clippy::expect_used, reason = "any 32 bytes are an ed25519 secret")]
pub fn libp2p_keypair(keypair: &KeyPair) -> libp2p_identity::Keypair {
    libp2p_identity::Keypair::ed25519_from_bytes(*keypair.seed()).expect("32 bytes")
}

type Key = (PeerId, &'static [u8], u8);
type Dialling = Shared<BoxFuture<'static, Result<Connection, ConnectError>>>;

#[derive(Default)]
struct Pool {
    connections: HashMap<Key, Pooled>,
}

struct Pooled {
    dialling: Dialling,
    asked: Instant,
}

impl Pool {
    /// A live connection, or one on its way.
    fn usable(&mut self, key: &Key) -> Option<Dialling> {
        let pooled = self.connections.get_mut(key)?;
        if pooled.dialling.peek().is_some_and(is_dead) {
            self.connections.remove(key);
            return None;
        }
        pooled.asked = Instant::now();
        Some(pooled.dialling.clone())
    }

    fn insert(&mut self, key: Key, dialling: Dialling) {
        self.connections.insert(key, Pooled { dialling, asked: Instant::now() });
    }

    fn remove_peer(&mut self, peer: &PeerId) -> Vec<Connection> {
        let gone = self.connections.extract_if(|(pooled, ..), _| pooled == peer);
        gone.filter_map(|(_, pooled)| pooled.dialling.peek().cloned()?.ok()).collect()
    }

    /// Forgets what is dead or idle. Streams in use keep their connection alive.
    fn sweep(&mut self) {
        self.connections.retain(|_, pooled| match pooled.dialling.peek() {
            Some(result) => !is_dead(result) && pooled.asked.elapsed() < POOL_IDLE,
            None => true,
        });
    }
}

fn is_dead(result: &Result<Connection, ConnectError>) -> bool {
    result.as_ref().map_or(true, |connection| connection.close_reason().is_some())
}

async fn sweep_pool(shared: Weak<SharedState>) {
    let mut interval = tokio::time::interval(POOL_IDLE / 2);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        shared.pool().sweep();
    }
}

/// One attempt at reaching a peer by several addresses.
struct Dial {
    endpoint: quinn::Endpoint,
    config: ClientConfig,
    protocol: Protocol,
    peer: PeerId,
    addrs: Vec<SocketAddr>,
    /// For all addresses together.
    patience: Duration,
}

impl Dial {
    async fn run(self) -> Result<Connection, ConnectError> {
        let mut failures = Failures::default();
        let outcome = timeout(self.patience, self.race(&mut failures)).await;
        match outcome {
            Ok(Some(connection)) => Ok(connection),
            Ok(None) => Err(failures.into_error(&self, "")),
            Err(_elapsed) => Err(failures.into_error(&self, "no answer")),
        }
    }

    /// The first connection that succeeds; the others are dropped. An address gets its
    /// turn when the one before has failed or had its head start.
    async fn race(&self, failures: &mut Failures) -> Option<Connection> {
        let mut waiting = self.addrs.iter();
        let mut running = FuturesUnordered::new();
        loop {
            let next_turn = Instant::now() + DIAL_STAGGER;
            match waiting.next() {
                Some(addr) => running.push(async move { (*addr, self.attempt(*addr).await) }),
                None if running.is_empty() => return None,
                None => {}
            }
            let has_next = waiting.len() > 0;
            tokio::select! {
                Some((addr, result)) = running.next() => match result {
                    Ok(connection) => return Some(connection),
                    Err(failure) => failures.add(addr, failure),
                },
                () = sleep_until(next_turn), if has_next => {}
            }
        }
    }

    async fn attempt(&self, addr: SocketAddr) -> Result<Connection, Failure> {
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), addr, SERVER_NAME)
            .map_err(|error| Failure::Unreachable(error.to_string()))?;
        let quinn = connecting.await.map_err(|error| Failure::Unreachable(error.to_string()))?;
        match peer_of(&quinn) {
            Some(peer) if peer == self.peer => {
                open_up(&quinn, &self.protocol);
                Ok(Connection { quinn, peer, _slot: None })
            }
            found => {
                quinn.close(CLOSE_WRONG_PEER, b"another peer was expected");
                Err(found.map_or_else(
                    || Failure::Unreachable("no ed25519 identity".to_owned()),
                    Failure::WrongPeer,
                ))
            }
        }
    }
}

/// Why a probe ended without a connection.
enum Knocked {
    /// Somebody answers, who does not speak the protocol.
    NotSpoken,
    Failed(String),
}

impl Knocked {
    fn failed(reason: impl fmt::Display) -> Self {
        Self::Failed(reason.to_string())
    }
}

enum Failure {
    Unreachable(String),
    WrongPeer(PeerId),
}

#[derive(Default)]
struct Failures {
    attempts: BTreeMap<SocketAddr, String>,
    wrong_peer: Option<(SocketAddr, PeerId)>,
}

impl Failures {
    fn add(&mut self, addr: SocketAddr, failure: Failure) {
        match failure {
            Failure::Unreachable(reason) => {
                self.attempts.insert(addr, reason);
            }
            Failure::WrongPeer(found) => self.wrong_peer = Some((addr, found)),
        }
    }

    fn into_error(self, dial: &Dial, unfinished: &str) -> ConnectError {
        if let Some((addr, found)) = self.wrong_peer {
            return ConnectError::WrongPeer { expected: dial.peer, found, addr };
        }
        let reason = |addr| self.attempts.get(addr).map_or(unfinished, String::as_str).to_owned();
        let attempts = dial.addrs.iter().map(|addr| (*addr, reason(addr))).collect();
        ConnectError::Unreachable { peer: dial.peer, attempts }
    }
}

fn join_attempts(attempts: &[(SocketAddr, String)]) -> String {
    let shown: Vec<String> =
        attempts.iter().map(|(addr, reason)| format!("{addr}: {reason}")).collect();
    shown.join("; ")
}

/// What decides about connections from outside.
struct Gate {
    protocols: Vec<Protocol>,
    is_allowed: IsAllowed,
    slots: Arc<Slots>,
    sender: mpsc::Sender<Incoming>,
}

async fn accept_all(endpoint: quinn::Endpoint, gate: Arc<Gate>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            // The last clone of our endpoint is gone.
            () = gate.sender.closed() => None,
        };
        let Some(incoming) = incoming else { return };
        let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let is_busy = handshakes.available_permits() < HANDSHAKES_MAX / 2;
        if is_busy && !incoming.remote_address_validated() && incoming.may_retry() {
            // Fails only where `may_retry` is false.
            let _: Result<(), quinn::RetryError> = incoming.retry();
            continue;
        }
        tokio::spawn(Arc::clone(&gate).admit(incoming, permit));
    }
}

impl Gate {
    /// The permit is held until the caller has taken the connection, so that what nobody
    /// takes is bounded as well.
    async fn admit(self: Arc<Self>, incoming: quinn::Incoming, _permit: OwnedSemaphorePermit) {
        let addr = incoming.remote_address();
        let Ok(connecting) = incoming.accept() else { return };
        let quinn = match timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(quinn)) => quinn,
            Ok(Err(error)) => return tracing::debug!(%addr, %error, "handshake failed"),
            Err(_elapsed) => return tracing::debug!(%addr, "handshake too slow"),
        };
        let Some((peer, protocol)) = peer_of(&quinn).zip(self.protocol_of(&quinn)) else {
            return quinn.close(CLOSE_REFUSED, b"no identity or protocol");
        };
        if !(self.is_allowed)(&peer, protocol.alpn) {
            tracing::debug!(%peer, "connection refused");
            return quinn.close(CLOSE_REFUSED, b"not allowed");
        }
        let Some(slot) = Slots::take(&self.slots, peer, &protocol, &quinn) else {
            tracing::debug!(%peer, "too many connections");
            return quinn.close(CLOSE_REFUSED, b"too many connections");
        };
        open_up(&quinn, &protocol);
        let connection = Connection { quinn, peer, _slot: Some(Arc::new(slot)) };
        let incoming = Incoming { peer, alpn: protocol.alpn, connection };
        // Nobody accepts any more: the connection closes as it is dropped.
        let _: Result<(), _> = self.sender.send(incoming).await;
    }

    fn protocol_of(&self, connection: &quinn::Connection) -> Option<Protocol> {
        let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
        let alpn = data.protocol?;
        self.protocols.iter().find(|protocol| protocol.alpn == alpn).copied()
    }
}

/// The incoming connections, by protocol and peer.
#[derive(Default)]
struct Slots {
    taken: Mutex<HashMap<SlotKey, Vec<quinn::Connection>>>,
}

type SlotKey = (&'static [u8], PeerId);

/// The place of one incoming connection. With it goes the handle kept in [`Slots`], so
/// that this is no reason for a connection to stay.
struct Slot {
    slots: Arc<Slots>,
    key: SlotKey,
    connection_id: usize,
}

impl Slots {
    fn take(
        slots: &Arc<Self>,
        peer: PeerId,
        protocol: &Protocol,
        connection: &quinn::Connection,
    ) -> Option<Slot> {
        let key = (protocol.alpn, peer);
        let mut taken = slots.taken();
        let of_protocol = taken.iter().filter(|((alpn, _), _)| *alpn == protocol.alpn);
        let total: usize = of_protocol.map(|(_, connections)| connections.len()).sum();
        let of_peer = taken.get(&key).map_or(0, Vec::len);
        if total >= protocol.connections_max || of_peer >= CONNECTIONS_PER_PEER_MAX {
            return None;
        }
        taken.entry(key).or_default().push(connection.clone());
        Some(Slot { slots: Arc::clone(slots), key, connection_id: connection.stable_id() })
    }

    fn of_peer(&self, peer: &PeerId) -> Vec<quinn::Connection> {
        let taken = self.taken();
        let of_peer = taken.iter().filter(|((_, taken_by), _)| taken_by == peer);
        of_peer.flat_map(|(_, connections)| connections.clone()).collect()
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<SlotKey, Vec<quinn::Connection>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken();
        let Some(connections) = taken.get_mut(&self.key) else { return };
        connections.retain(|connection| connection.stable_id() != self.connection_id);
        if connections.is_empty() {
            taken.remove(&self.key);
        }
    }
}

/// The identity that the other side proved.
fn peer_of(connection: &quinn::Connection) -> Option<PeerId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let [certificate] = &chain[..] else { return None };
    let certificate = libp2p_tls::certificate::parse(certificate).ok()?;
    from_libp2p(&certificate.peer_id())
}

/// Gives a peer that is known now the windows and streams of its protocol.
fn open_up(connection: &quinn::Connection, protocol: &Protocol) {
    connection.set_receive_window(protocol.window_bytes.into());
    connection.set_send_window(protocol.window_bytes.into());
    connection.set_max_concurrent_bi_streams(STREAMS_MAX.into());
    connection.set_max_concurrent_uni_streams(STREAMS_MAX.into());
}

#[expect(clippy::expect_used, reason = "the bound is a constant between quinn's own")]
fn endpoint_config() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MTU_MAX).expect("1200 to 65,527 bytes");
    config
}

fn transport() -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_MAX);
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(FIRST_WINDOW_BYTES.into())
        .max_concurrent_bidi_streams(1_u32.into())
        .max_concurrent_uni_streams(0_u32.into())
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu));
    transport
}

fn server_config(
    identity: &libp2p_identity::Keypair,
    protocols: &[Protocol],
    transport: Arc<TransportConfig>,
) -> Result<ServerConfig, BindError> {
    let mut tls = tls::server(identity).map_err(tls_error)?;
    tls.alpn_protocols = protocols.iter().map(|protocol| protocol.alpn.to_vec()).collect();
    let mut config =
        ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(tls_error)?));
    config.transport_config(transport).max_incoming(HANDSHAKES_MAX);
    Ok(config)
}

fn client_configs(
    identity: &libp2p_identity::Keypair,
    protocols: &[Protocol],
    transport: &Arc<TransportConfig>,
) -> Result<Vec<(Protocol, ClientConfig)>, BindError> {
    let tls = tls::client(identity).map_err(tls_error)?;
    let for_protocol = |protocol: &Protocol| {
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![protocol.alpn.to_vec()];
        let crypto = QuicClientConfig::try_from(tls).map_err(tls_error)?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(transport));
        Ok((*protocol, config))
    };
    protocols.iter().map(for_protocol).collect()
}

fn tls_error(error: impl fmt::Display) -> BindError {
    BindError::Tls(error.to_string())
}

fn udp_socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(SocketProtocol::UDP))?;
    if addr.ip() == IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    }
    // The kernel grants what its limits allow; without more we are slower, not broken.
    let granted = set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES))
        .and_then(|()| set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES));
    if let Err(error) = granted {
        tracing::debug!(%error, "default socket buffers");
    }
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::transfer::{
        Pace,
        exchange::{Wanted, receive_blobs, send_blobs},
        frame::{read_message, write_message},
        store::BlobStore,
    };

    #[tokio::test]
    async fn both_sides_know_each_other_and_talk() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let (alice, bob) = (bind(1, addr), bind(2, addr));
            let to = bob.local_addr().unwrap();
            let serving = async {
                let incoming = bob.accept().await.unwrap();
                assert_eq!((incoming.peer, incoming.alpn), (peer(1), DATA.alpn));
                let (mut send, mut receive) = incoming.connection.accept_bi().await.unwrap();
                let word: String = read_message(&mut receive, 100).await.unwrap();
                write_message(&mut send, &format!("{word} yourself")).await.unwrap();
                send.finish().unwrap();
                incoming.connection.closed().await;
            };
            let asking = async {
                let connection = alice.connect(peer(2), &[to], DATA.alpn).await.unwrap();
                assert_eq!((connection.peer(), connection.addr()), (peer(2), to));
                let (mut send, mut receive) = connection.open_bi().await.unwrap();
                write_message(&mut send, &"hello".to_owned()).await.unwrap();
                let answer: String = read_message(&mut receive, 100).await.unwrap();
                assert_eq!(answer, "hello yourself");
                connection.close(CLOSE_DONE, b"");
            };
            tokio::join!(serving, asking);
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_not_the_expected_one_is_refused() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let addr = bob.local_addr().unwrap();
        let error = alice.connect(peer(3), &[addr], DATA.alpn).await.unwrap_err();
        assert_eq!(error, ConnectError::WrongPeer { expected: peer(3), found: peer(2), addr });
    }

    #[tokio::test]
    async fn a_foreign_protocol_is_refused() {
        const FOREIGN: Protocol = Protocol { alpn: b"other/1", ..DATA };
        let alice = bind_with(1, LOCAL, &[FOREIGN], allow_all());
        let bob = bind(2, LOCAL);
        let to = [bob.local_addr().unwrap()];
        let error = alice.connect(peer(2), &to, FOREIGN.alpn).await.unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
        let unknown = alice.connect(peer(2), &to, b"never/1").await.unwrap_err();
        assert_eq!(unknown, ConnectError::UnknownProtocol(b"never/1".to_vec()));
    }

    #[tokio::test]
    async fn a_client_without_an_identity_is_refused() {
        let bob = bind(2, LOCAL);
        let mut tls = libp2p_tls::make_client_config(&libp2p_keypair(&key(1)), None).unwrap();
        tls.alpn_protocols = vec![DATA.alpn.to_vec()];
        tls.client_auth_cert_resolver = Arc::new(NoCertificate);
        let crypto = QuicClientConfig::try_from(tls).unwrap();
        let endpoint = quinn::Endpoint::client(LOCAL.parse().unwrap()).unwrap();
        let connecting = endpoint
            .connect_with(ClientConfig::new(Arc::new(crypto)), bob.local_addr().unwrap(), "x")
            .unwrap();
        // The client learns of it only after its own side of the handshake.
        if let Ok(connection) = connecting.await {
            assert!(matches!(connection.closed().await, ConnectionError::ConnectionClosed(_)));
        }
    }

    #[tokio::test]
    async fn who_is_not_allowed_is_closed_and_may_be_allowed_later() {
        let allowed = Arc::new(AtomicUsize::new(0));
        let gate = Arc::clone(&allowed);
        let is_allowed: IsAllowed = Arc::new(move |who, alpn| {
            *who == peer(1) && alpn == DATA.alpn && gate.load(Ordering::Relaxed) > 0
        });
        let (alice, bob) = (bind(1, LOCAL), bind_with(2, LOCAL, &[DOOR, DATA], is_allowed));
        let to = [bob.local_addr().unwrap()];
        let connection = alice.connect(peer(2), &to, DATA.alpn).await.unwrap();
        assert_refused(&connection.closed().await);
        allowed.store(1, Ordering::Relaxed);
        let again = alice.connect(peer(2), &to, DATA.alpn).await.unwrap();
        assert_ne!(again.stable_id(), connection.stable_id());
        assert_eq!(bob.accept().await.unwrap().peer, peer(1));
        assert!(again.close_reason().is_none());
    }

    #[tokio::test]
    async fn connections_are_shared_until_they_die() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let to = [bob.local_addr().unwrap()];
        let connect = || alice.connect(peer(2), &to, DATA.alpn);
        let (first, second) = tokio::join!(connect(), connect());
        let first = first.unwrap();
        assert_eq!(first.stable_id(), second.unwrap().stable_id());
        // The pool needs no address for what it has.
        let pooled = alice.connect(peer(2), &[], DATA.alpn).await.unwrap();
        assert_eq!(first.stable_id(), pooled.stable_id());
        let door = alice.connect(peer(2), &to, DOOR.alpn).await.unwrap();
        let lane = alice.connect_lane(peer(2), &to, DATA.alpn, 1).await.unwrap();
        assert_ne!(first.stable_id(), door.stable_id());
        assert_ne!(first.stable_id(), lane.stable_id());

        bob.accept().await.unwrap().connection.close(CLOSE_DONE, b"");
        first.closed().await;
        let error = alice.connect(peer(2), &[], DATA.alpn).await.unwrap_err();
        assert_eq!(error, ConnectError::NoAddress(peer(2)));
        let fresh = connect().await.unwrap();
        assert_ne!(first.stable_id(), fresh.stable_id());
    }

    #[tokio::test]
    async fn a_connection_that_came_in_is_used_to_ask_whoever_opened_it() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let out = alice.connect(peer(2), &[bob.local_addr().unwrap()], DATA.alpn).await.unwrap();
        let taken_in = bob.accept().await.unwrap().connection;
        assert!(bob.pooled(peer(1), DATA.alpn, 1).is_none());
        bob.adopt(taken_in.clone(), DATA.alpn, 1);
        // Nobody knows where Alice is, and nobody has to.
        let back = bob.connect_lane(peer(1), &[], DATA.alpn, 1).await.unwrap();
        assert_eq!(back.stable_id(), taken_in.stable_id());
        assert_eq!(bob.pooled(peer(1), DATA.alpn, 1).unwrap().stable_id(), back.stable_id());
        assert!(bob.pooled(peer(1), DATA.alpn, 0).is_none(), "of this lane alone");
        let (mut send, _receive) = back.open_bi().await.unwrap();
        write_message(&mut send, &"hello".to_owned()).await.unwrap();
        let (_send, mut receive) = out.accept_bi().await.unwrap();
        assert_eq!(read_message::<String>(&mut receive, 100).await.unwrap(), "hello");
        out.close(CLOSE_DONE, b"");
        back.closed().await;
        assert!(bob.pooled(peer(1), DATA.alpn, 1).is_none());
    }

    #[tokio::test]
    async fn a_probe_finds_who_answers_and_nobody_else() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let at = bob.local_addr().unwrap();
        let patience = Duration::from_millis(300);
        alice.probe(peer(2), at, patience).await.unwrap();
        let other = alice.probe(peer(3), at, patience).await.unwrap_err();
        assert_eq!(other, "somebody else answers there");
        alice.probe_control(at, patience).await.unwrap();
        for _ in 0..2 {
            assert!(bob.accept().now_or_never().flatten().is_some(), "a door was knocked at");
        }
        assert!(bob.accept().now_or_never().is_none(), "what is not spoken is no connection");
        let silent = UdpSocket::bind(LOCAL).unwrap();
        let silent = silent.local_addr().unwrap();
        assert_eq!(alice.probe(peer(2), silent, patience).await.unwrap_err(), "no answer");
        assert_eq!(alice.probe_control(silent, patience).await.unwrap_err(), "no answer");
    }

    #[tokio::test]
    async fn a_connection_closes_when_the_caller_lets_go_of_it() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let out = alice.connect(peer(2), &[bob.local_addr().unwrap()], DATA.alpn).await.unwrap();
        drop(bob.accept().await.unwrap());
        assert!(matches!(out.closed().await, ConnectionError::ApplicationClosed(_)));
        assert!(bob.shared.slots.taken().is_empty());
    }

    #[tokio::test]
    async fn a_peer_that_is_disconnected_loses_what_it_opened_and_what_we_opened() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let out = alice.connect(peer(2), &[bob.local_addr().unwrap()], DATA.alpn).await.unwrap();
        let taken_in = bob.accept().await.unwrap();
        bob.disconnect(&peer(1));
        assert_refused(&out.closed().await);
        assert!(matches!(taken_in.connection.closed().await, ConnectionError::LocallyClosed));
        drop(taken_in);
        assert!(bob.shared.slots.taken().is_empty());

        let again = alice.connect(peer(2), &[bob.local_addr().unwrap()], DATA.alpn).await.unwrap();
        alice.disconnect(&peer(2));
        assert!(matches!(again.closed().await, ConnectionError::LocallyClosed));
        assert!(alice.shared.pool().connections.is_empty());
    }

    #[tokio::test]
    async fn one_dead_address_does_not_hide_a_live_one() {
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let silent = UdpSocket::bind(LOCAL).unwrap();
        let other = bind(3, LOCAL);
        let addrs = [
            "[::1]:9".parse().unwrap(),
            silent.local_addr().unwrap(),
            other.local_addr().unwrap(),
            bob.local_addr().unwrap(),
        ];
        let connection = alice.connect(peer(2), &addrs, DATA.alpn).await.unwrap();
        assert_eq!(connection.addr(), bob.local_addr().unwrap());
    }

    #[tokio::test]
    async fn a_silent_address_is_given_up_and_named() {
        let alice = bind(1, LOCAL);
        let silent = UdpSocket::bind(LOCAL).unwrap();
        let addr = silent.local_addr().unwrap();
        let (protocol, config) = alice.shared.protocols[0].clone();
        let dial = Dial {
            endpoint: alice.shared.quinn.clone(),
            config,
            protocol,
            peer: peer(2),
            addrs: vec![addr],
            patience: Duration::from_millis(50),
        };
        let attempts = vec![(addr, "no answer".to_owned())];
        let expected = ConnectError::Unreachable { peer: peer(2), attempts };
        assert_eq!(dial.run().await.unwrap_err(), expected);
    }

    #[tokio::test]
    async fn a_peer_gets_only_its_share_of_connections() {
        let bob = bind(2, LOCAL);
        let to = [bob.local_addr().unwrap()];
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS_PER_PEER_MAX {
            // Another endpoint of the same identity, so that the pool does not share.
            let alice = bind(1, LOCAL);
            let connection = alice.connect(peer(2), &to, DATA.alpn).await.unwrap();
            held.push((alice, connection, bob.accept().await.unwrap()));
        }
        let more = bind(1, LOCAL);
        let refused = more.connect(peer(2), &to, DATA.alpn).await.unwrap();
        assert_refused(&refused.closed().await);
        let other = bind(3, LOCAL);
        let _other = other.connect(peer(2), &to, DATA.alpn).await.unwrap();
        assert_eq!(bob.accept().await.unwrap().peer, peer(3));
        held.pop();
        let _again = more.connect(peer(2), &to, DATA.alpn).await.unwrap();
        assert_eq!(bob.accept().await.unwrap().peer, peer(1));
    }

    #[tokio::test]
    async fn blobs_travel_between_endpoints() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [from, to] = dirs.each_ref().map(|dir| BlobStore::open(dir.path()).unwrap());
        let contents: Vec<Vec<u8>> = (0..100_u32).map(|i| vec![i as u8; 9_000]).collect();
        let ids: Vec<_> = contents.iter().map(|c| from.put_bytes(c).unwrap()).collect();
        let (alice, bob) = (bind(1, LOCAL), bind(2, LOCAL));
        let addr = bob.local_addr().unwrap();
        let wanted: Vec<_> = ids.iter().map(|id| Wanted::whole(*id, 9_000)).collect();
        let asks: Vec<_> = wanted.iter().map(|wanted| wanted.ask.clone()).collect();
        let pace = Pace::unlimited();
        let sending = async {
            let connection = alice.connect(peer(2), &[addr], DATA.alpn).await.unwrap();
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            let source = Arc::new(from.clone());
            send_blobs(source, asks.clone(), &mut send, &pace, |_| {}).await.unwrap();
            read_message::<bool>(&mut receive, 10).await.unwrap()
        };
        let receiving = async {
            let Incoming { peer, connection, .. } = bob.accept().await.unwrap();
            let (mut send, mut receive) = connection.accept_bi().await.unwrap();
            let received = receive_blobs(&to, &wanted, peer, &mut receive, &pace, |_| {});
            let received = received.await.unwrap();
            write_message(&mut send, &true).await.unwrap();
            send.finish().unwrap();
            connection.closed().await;
            received
        };
        let sending = async {
            let done = sending.await;
            alice.close().await;
            done
        };
        let (done, received) = tokio::join!(sending, receiving);
        assert!(done);
        assert_eq!(received.bytes, 900_000);
        assert_eq!(to.read(&ids[99], 9_000).unwrap(), contents[99]);
        assert!(alice.accept().await.is_none());
    }

    #[test]
    fn identities_are_the_same_in_libp2ps_types() {
        let ours = peer(9);
        let theirs = libp2p_keypair(&key(9)).public().to_peer_id();
        assert_eq!(to_libp2p(ours), theirs);
        assert_eq!(from_libp2p(&theirs), Some(ours));
        assert_eq!(theirs.to_base58(), ours.to_string());
    }

    const LOCAL: &str = "127.0.0.1:0";

    fn key(seed: u8) -> KeyPair {
        KeyPair::from_seed(&[seed; 32])
    }

    fn peer(seed: u8) -> PeerId {
        PeerId(key(seed).public())
    }

    fn allow_all() -> IsAllowed {
        Arc::new(|_, _| true)
    }

    fn bind(seed: u8, addr: &str) -> Endpoint {
        bind_with(seed, addr, &[DOOR, DATA], allow_all())
    }

    fn bind_with(seed: u8, addr: &str, protocols: &[Protocol], is_allowed: IsAllowed) -> Endpoint {
        Endpoint::bind(&key(seed), addr.parse().unwrap(), protocols, is_allowed).unwrap()
    }

    fn assert_refused(reason: &ConnectionError) {
        assert!(
            matches!(reason, ConnectionError::ApplicationClosed(close)
                if close.error_code == CLOSE_REFUSED),
            "{reason}"
        );
    }

    #[derive(Debug)]
    struct NoCertificate;

    impl quinn::rustls::client::ResolvesClientCert for NoCertificate {
        fn resolve(
            &self,
            _: &[&[u8]],
            _: &[quinn::rustls::SignatureScheme],
        ) -> Option<Arc<quinn::rustls::sign::CertifiedKey>> {
            None
        }

        fn has_certs(&self) -> bool {
            false
        }
    }
}
