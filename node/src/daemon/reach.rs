//! Reaching other nodes: knocking at doors, keeping connections, asking on the data plane.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures::FutureExt as _;
#[cfg(debug_assertions)]
use p2pit_protocol::wire::WIRE_VERSION;
use p2pit_protocol::{
    BlobId, PeerId, PoolId,
    door::{Hello, Purpose, Reconcile, Refusal, RefusalCode, Reply},
    job::VerifiedSpec,
    message::{Reach, Soft},
    record::Certificate,
    roster::Roster,
};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{
    Shared, clock,
    fetch::{Blobs, Fetch, FetchError, fetch},
    push,
    serve::{self, MANIFEST_BYTES_MAX, Request},
};
use crate::{
    network::{Announcement, Lan, LanEvent, Network, RELAYS_MAX, Relay, Route},
    transfer::{
        endpoint::{Connection, DATA, DOOR},
        frame, store,
        stream::{self, RecvStream, SendStream},
    },
};

/// Turns of one roster reconciliation at a door.
pub(crate) const ROUNDS_MAX: u32 = 16;
/// Connections to members this node strives for; beyond that, others dial.
const CONNECTIONS_WANTED: usize = 48;
/// How long a door may take to answer.
const DOOR_TIMEOUT: Duration = Duration::from_secs(10);
/// The same, before a member is dialled without it.
const DOOR_BRIEFLY: Duration = Duration::from_secs(5);
/// How long a node may take to answer a request that is not a stream.
pub(crate) const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// The same of one that is thought to be off: others are asked instead.
const OFFLINE_TIMEOUT: Duration = Duration::from_secs(2);
/// Between tries to reach the same member, at first and at most.
const RETRY_MS: (u64, u64) = (500, 60_000);
/// How often members out of reach are looked at.
const TEND_EVERY: Duration = Duration::from_secs(2);
/// Lanes of a node's connections: for what is short or looked at, for what jobs need, and
/// for what people copy; the last below.
const TALK: u8 = 0;
const BULK: u8 = 1;
const COPY: u8 = 2;
/// For logs that are followed: they stay open, and a connection has only so many.
const LOGS: u8 = 3;
/// How long a connection of the data plane is waited for where there is another way: for what
/// is short, and for what takes long.
const OWN_WITHIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(4));
/// How long it is not tried again then.
const SHUT_FOR: Duration = Duration::from_secs(30);
/// Before a member that may well be dialled is asked to dial.
const BACK_AFTER: Duration = Duration::from_secs(1);

/// Before a member that could not be dialled back is dialled for its asking again.
const BACK_PAUSE: Duration = Duration::from_secs(2);

/// Why a node could not be asked; the text is what it is called.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReachError {
    #[error("{0} cannot be reached")]
    Unreachable(String, #[source] anyhow::Error),
    #[error("{0} does not answer")]
    Silent(String),
    #[error("the answer of {0} cannot be read")]
    Answer(String, #[source] frame::Error),
}

/// A door said no.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(crate) struct ShutOut(pub(crate) Refusal);

/// What this daemon says it speaks; in debug builds, tests may have it say something else.
pub(super) fn versions() -> (u16, u16) {
    #[cfg(debug_assertions)]
    {
        use crate::config::env;
        let offset = i16::try_from(env::for_tests(env::WIRE_OFFSET)).unwrap_or_default();
        let said = WIRE_VERSION.saturating_add_signed(offset);
        (said, said)
    }
    #[cfg(not(debug_assertions))]
    p2pit_protocol::door::VERSIONS
}

/// Say hello at a door and hear the answer.
pub(super) async fn knock(
    shared: &Shared,
    peer: PeerId,
    addrs: &[SocketAddr],
    hello: &Hello,
) -> anyhow::Result<Reply> {
    let talk = async {
        let connection = shared.endpoint.connect(peer, addrs, DOOR.alpn).await?;
        let (mut send, mut receive) = connection.open_bi().await?;
        frame::write_message(&mut send, hello).await?;
        send.finish()?;
        frame::read_message(&mut receive, usize::MAX).await.context(
            "what it answers cannot be read: is its p2pit of another version? `p2pit --version`",
        )
    };
    let label = shared.label(peer);
    timeout(DOOR_TIMEOUT, talk).await.with_context(|| format!("the door of {label} is silent"))?
}

/// One turn of bringing our roster and a member's together; whether they agree.
pub(super) async fn reconcile_roster(
    shared: &Shared,
    roster: &mut Roster,
    peer: PeerId,
    addrs: &[SocketAddr],
) -> anyhow::Result<bool> {
    let pool = roster.pool();
    let hello = |reconcile| Hello {
        versions: versions(),
        pool,
        store: shared.store_id,
        boot: shared.boot,
        wall_ms: clock::now().wall_ms,
        purpose: Purpose::Reconcile(reconcile),
    };
    let mut reply = knock(shared, peer, addrs, &hello(Reconcile::asking(roster))).await?;
    if let Reply::Refused(refusal) = &reply
        && refusal.code == RefusalCode::NotAMember
    {
        reply = knock(shared, peer, addrs, &hello(Reconcile::introducing(roster))).await?;
    }
    match reply {
        Reply::Reconciled(reconciled) => {
            let heads = reconciled.heads.clone();
            let (_, agreed) = reconciled.take(roster);
            if agreed.context("the member's statements are not in order")? {
                return Ok(true);
            }
            let bringing = hello(Reconcile::bringing(roster, &heads));
            match knock(shared, peer, addrs, &bringing).await? {
                Reply::Reconciled(reconciled) => {
                    let (_, agreed) = reconciled.take(roster);
                    Ok(agreed.context("the member's statements are not in order")?)
                }
                Reply::Refused(refusal) => bail!(ShutOut(refusal)),
                Reply::Welcome(_) => bail!("the door misunderstood"),
            }
        }
        Reply::Refused(refusal) => bail!(ShutOut(refusal)),
        Reply::Welcome(_) => bail!("the door misunderstood"),
    }
}

/// Keep connections to members: whoever is not connected and has a known address is called
/// at its door, so that both rosters agree, and then dialled.
pub(super) async fn tend(shared: Arc<Shared>) {
    let mut tries: BTreeMap<PeerId, Try> = BTreeMap::new();
    let statics = resolve_static(&shared).await;
    let mut moves = 0;
    loop {
        let now_ms = clock::now().boot_ms;
        let wanted = match shared.act(|peer, _| unconnected(peer)).await {
            Ok((connected, wanted)) if connected < CONNECTIONS_WANTED => wanted,
            Ok(_) => Vec::new(),
            Err(super::NoPeer::NoPool) => Vec::new(),
            Err(super::NoPeer::Ending) => return,
        };
        let names: BTreeSet<PeerId> = wanted.iter().map(|wanted| wanted.peer).collect();
        tries.retain(|peer, _| names.contains(peer));
        // Who is connected lets this node in, whoever dialled.
        super::lock(&shared.shut_out).retain(|peer, _| names.contains(peer));
        // What could not be reached from the network before may be from this one.
        let moved = shared.moves.load(Ordering::Relaxed);
        if std::mem::replace(&mut moves, moved) != moved {
            tries.clear();
        }
        for wanted in wanted {
            let pause_ms = match tries.get(&wanted.peer) {
                Some(last) if last.of != wanted => RETRY_MS.0,
                Some(last) if last.next_ms > now_ms => continue,
                Some(last) => last.pause_ms,
                None => RETRY_MS.0,
            };
            let next_ms = now_ms + pause_ms;
            let pause_ms = (pause_ms * 2).min(RETRY_MS.1);
            tries.insert(wanted.peer, Try { of: wanted.clone(), next_ms, pause_ms });
            let mut wanted = wanted;
            let cached = cached_addresses(&shared, wanted.peer);
            wanted.data.extend(cached.1.iter().chain(&statics));
            wanted.data.dedup();
            if wanted.control.is_empty() {
                wanted.control = cached.0;
            }
            if wanted.data.is_empty() && wanted.relays.is_empty() {
                continue;
            }
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                let peer = wanted.peer;
                let met = meet(&shared, wanted).await;
                shared.note_met(peer, met.as_ref().err());
                if let Err(reason) = met {
                    debug!(%peer, reason = format!("{reason:#}"), "not reached");
                }
            });
        }
        // Woken by news; otherwise look again soon.
        let _ = timeout(TEND_EVERY, shared.reach_changed.notified()).await;
    }
}

/// A member that is not connected, and what is known of where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    peer: PeerId,
    control: Vec<SocketAddr>,
    data: Vec<SocketAddr>,
    reach: Reach,
    relays: Vec<Relay>,
}

/// The last try to reach it.
struct Try {
    of: Wanted,
    next_ms: u64,
    pause_ms: u64,
}

/// How many are connected, and those that are not.
fn unconnected(peer: &p2pit_protocol::Peer) -> (usize, Vec<Wanted>) {
    let board = peer.board();
    let nodes = peer.roster().state().nodes.keys();
    let wanted = nodes.filter(|node| **node != peer.id() && !board.is_connected(**node));
    let with_addresses = wanted.map(|node| {
        let advert = board.get(*node).map(|posted| &posted.advert);
        Wanted {
            peer: *node,
            control: advert.map(|advert| advert.control.clone()).unwrap_or_default(),
            data: advert.map(|advert| advert.data.clone()).unwrap_or_default(),
            reach: advert.map(|advert| advert.reach).unwrap_or_default(),
            relays: relays_of(peer, *node),
        }
    });
    (board.connected().count(), with_addresses.collect())
}

/// Those that pass on for a node, by its advert, and where they are, by theirs.
fn relays_of(peer: &p2pit_protocol::Peer, node: PeerId) -> Vec<Relay> {
    let board = peer.board();
    let Some(posted) = board.get(node) else { return Vec::new() };
    let relays = posted.advert.relays.iter().filter(|relay| **relay != peer.id());
    let with_addresses = relays.filter_map(|relay| {
        let addrs = board.get(*relay)?.advert.control.clone();
        (!addrs.is_empty()).then_some(Relay { node: *relay, addrs })
    });
    with_addresses.take(RELAYS_MAX).collect()
}

fn cached_addresses(shared: &Shared, peer: PeerId) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
    match shared.index.peers() {
        Ok(peers) => peers
            .into_iter()
            .find(|(known, _)| *known == peer)
            .map(|(_, entry)| (entry.control, entry.data))
            .unwrap_or_default(),
        Err(reason) => {
            warn!(%reason, "the peer cache cannot be read");
            (Vec::new(), Vec::new())
        }
    }
}

async fn resolve_static(shared: &Shared) -> Vec<SocketAddr> {
    let mut addrs = Vec::new();
    for peer in &shared.settings.peers {
        match tokio::net::lookup_host((peer.host.as_str(), peer.port)).await {
            Ok(found) => addrs.extend(found),
            Err(reason) => warn!(host = peer.host, %reason, "static peer not found"),
        }
    }
    addrs
}

/// Agree on the roster at the member's door, then let libp2p connect.
async fn meet(shared: &Arc<Shared>, wanted: Wanted) -> anyhow::Result<()> {
    let Wanted { peer, control, data, reach, relays } = wanted;
    let dial = |control| {
        if let Some(network) = shared.network() {
            network.dial(peer, control, relays.clone());
        }
    };
    // Nobody knocks where hardly anybody can: who passes on for it brings the roster, too.
    if reach == Reach::Behind && !relays.is_empty() {
        dial(control);
        return Ok(());
    }
    // Where there is another way, that is tried soon.
    let patience = if control.is_empty() { DOOR_TIMEOUT } else { DOOR_BRIEFLY };
    let door = timeout(patience, shared.endpoint.connect(peer, &data, DOOR.alpn));
    let agreed = match door.await {
        Ok(Ok(_)) => agree(shared, peer, &data).await,
        Ok(Err(reason)) => Err(reason.into()),
        Err(_elapsed) => Err(anyhow::anyhow!("its door is silent")),
    };
    if let Err(reason) = agreed {
        // The door is UDP alone. By TCP it may be there, and it judges for itself.
        if !reason.is::<ShutOut>() && !control.is_empty() {
            dial(control);
        }
        return Err(reason);
    }
    let control =
        if control.is_empty() { ask_control(shared, peer, &data).await? } else { control };
    dial(control);
    Ok(())
}

/// Brings the rosters together at the member's door.
async fn agree(shared: &Arc<Shared>, peer: PeerId, data: &[SocketAddr]) -> anyhow::Result<()> {
    let mut roster = super::roster(shared).await?;
    let before: BTreeSet<_> = roster.heads().into_iter().collect();
    for _ in 0..ROUNDS_MAX {
        if reconcile_roster(shared, &mut roster, peer, data).await? {
            break;
        }
    }
    if roster.heads().into_iter().collect::<BTreeSet<_>>() != before {
        let statements: Vec<_> = roster.statements().into_iter().cloned().collect();
        shared
            .act(move |peer, now| {
                for signed in statements {
                    peer.handle_gossip(Soft::statement(signed), now);
                }
            })
            .await?;
    }
    Ok(())
}

/// Where a member's control plane listens: the first time, only its door is known.
async fn ask_control(
    shared: &Shared,
    peer: PeerId,
    data: &[SocketAddr],
) -> anyhow::Result<Vec<SocketAddr>> {
    let connection = shared.endpoint.connect(peer, data, DATA.alpn).await?;
    let (send, receive) = connection.open_bi().await?;
    let mut streams = (send.into(), receive.into());
    let listens: Vec<SocketAddr> = request(&mut streams, &Request::Addresses).await?;
    if listens.is_empty() {
        bail!("{} does not say where it listens", shared.label(peer));
    }
    Ok(listens)
}

impl Shared {
    /// Where a member's data plane is, and whether others can dial it there.
    async fn whereabouts(&self, peer: PeerId) -> Result<(Vec<SocketAddr>, Reach), super::NoPeer> {
        let advertised = self
            .act(move |p, _| {
                p.board().get(peer).map(|posted| (posted.advert.data.clone(), posted.advert.reach))
            })
            .await?;
        let (addrs, reach) = advertised.unwrap_or_default();
        let addrs = if addrs.is_empty() { cached_addresses(self, peer).1 } else { addrs };
        Ok((addrs, reach))
    }

    /// How a question of this lane goes to a member: on a connection of the data plane that is
    /// there, that is dialled, or that the member is asked to dial; else through a connection
    /// of the control plane, whatever carries that.
    async fn path(&self, peer: PeerId, lane: u8) -> Result<Path, ReachError> {
        if let Some(connection) = self.endpoint.pooled(peer, DATA.alpn, lane) {
            return Ok(Path::Own(connection));
        }
        let unreachable = |e: anyhow::Error| ReachError::Unreachable(self.label(peer), e);
        let (addrs, reach) = self.whereabouts(peer).await.map_err(|e| unreachable(e.into()))?;
        let dialled = self.endpoint.connect_lane(peer, &addrs, DATA.alpn, lane);
        let network = self.network();
        let route = network.as_ref().and_then(|network| network.route(peer));
        let Some((network, route)) = network.zip(route) else {
            // It is mostly off.
            let dialled = timeout(OFFLINE_TIMEOUT, dialled).await;
            let dialled = dialled.map_err(|_| ReachError::Silent(self.label(peer)))?;
            return dialled.map(Path::Own).map_err(|e| unreachable(e.into()));
        };
        debug!(%peer, ?route, "no connection of its own yet");
        let tunnel = Path::Tunnel(network);
        let patience = self.shut.patience(peer, lane, Instant::now());
        if patience.is_zero() {
            return Ok(tunnel);
        }
        let asked = async {
            if self.standing.reach() == Reach::Behind {
                bail!("neither side can be dialled");
            }
            if reach != Reach::Behind {
                tokio::time::sleep(BACK_AFTER).await;
            }
            self.ask_back(peer, lane).await
        };
        let dialled = async { dialled.await.map_err(anyhow::Error::from) };
        let either = futures::future::select_ok([dialled.boxed(), asked.boxed()]);
        match timeout(patience, either).await {
            Ok(Ok((connection, _))) => Ok(Path::Own(connection)),
            failed => {
                if let Ok(Err(reason)) = failed {
                    debug!(%peer, reason = format!("{reason:#}"), "no connection of its own");
                }
                // What goes on may still come through, and is used then.
                self.shut.note(peer, Instant::now());
                Ok(tunnel)
            }
        }
    }

    /// Has a member that cannot be dialled dial this node.
    async fn ask_back(&self, peer: PeerId, lane: u8) -> anyhow::Result<Connection> {
        let network = self.network().context("there is no network")?;
        let (mut send, mut receive) = stream::tunnel(network.open_tunnel(peer).await?);
        frame::write_message(&mut send, &Request::ConnectBack { lane }).await?;
        send.finish()?;
        let connected: Result<(), String> = frame::read_message(&mut receive, usize::MAX).await?;
        connected.map_err(anyhow::Error::msg)?;
        self.endpoint.pooled(peer, DATA.alpn, lane).context("the connection came and went")
    }

    /// Whether what a member sends goes through another one, at the pace of that.
    pub(crate) fn is_passed_on(&self, peer: PeerId) -> bool {
        let is_own = self.endpoint.pooled(peer, DATA.alpn, BULK).is_some();
        let route = self.network().and_then(|network| network.route(peer));
        // Where this side can be dialled the other is asked to.
        !is_own
            && self.standing.reach() == Reach::Behind
            && matches!(route, Some(Route::Relayed(_)))
    }

    /// What carries questions to a member now; `None` where nothing does.
    pub(crate) fn carried(&self, peer: PeerId) -> Option<Carried> {
        if let Some(connection) = self.endpoint.pooled(peer, DATA.alpn, TALK) {
            let path = connection.stats().path;
            return Some(Carried::Own {
                addr: connection.addr(),
                rtt: connection.rtt(),
                mtu: path.current_mtu,
                black_holes: path.black_holes_detected,
            });
        }
        let relay = match self.network()?.route(peer)? {
            Route::Direct(_) => None,
            Route::Relayed(relay) => Some(relay),
        };
        Some(Carried::Tunnel { relay })
    }

    /// A stream to a member.
    async fn stream(&self, peer: PeerId, lane: u8) -> Result<(SendStream, RecvStream), ReachError> {
        let unreachable = |e: anyhow::Error| ReachError::Unreachable(self.label(peer), e);
        match self.path(peer, lane).await? {
            Path::Own(connection) => {
                let (send, receive) =
                    connection.open_bi().await.map_err(|e| unreachable(e.into()))?;
                Ok((send.into(), receive.into()))
            }
            Path::Tunnel(network) => {
                let opened = network.open_tunnel(peer).await;
                Ok(stream::tunnel(opened.map_err(|e| unreachable(e.into()))?))
            }
        }
    }

    /// Ask one question and read one answer.
    pub(crate) async fn ask<R: serde::de::DeserializeOwned>(
        &self,
        peer: PeerId,
        question: &Request,
    ) -> Result<R, ReachError> {
        self.ask_within(peer, question, ASK_TIMEOUT).await
    }

    /// As [`Self::ask`], of somebody who has this long to answer.
    pub(crate) async fn ask_within<R: serde::de::DeserializeOwned>(
        &self,
        peer: PeerId,
        question: &Request,
        within: Duration,
    ) -> Result<R, ReachError> {
        let talk = async {
            let mut streams = self.stream(peer, TALK).await?;
            request(&mut streams, question).await.map_err(|e| match e.downcast::<frame::Error>() {
                Ok(e) => ReachError::Answer(self.label(peer), e),
                Err(e) => ReachError::Unreachable(self.label(peer), e),
            })
        };
        let silent = |_| Err(ReachError::Silent(self.label(peer)));
        let answer = timeout(within.min(ASK_TIMEOUT), talk).await.unwrap_or_else(silent);
        // What else goes on with it is not cut for want of patience.
        if answer.is_err() && within >= ASK_TIMEOUT {
            self.endpoint.forget(&peer);
        }
        answer
    }

    /// Open a stream of answers to one question.
    pub(crate) async fn open(
        &self,
        peer: PeerId,
        question: &Request,
    ) -> Result<(SendStream, RecvStream), ReachError> {
        self.open_in(TALK, peer, question).await
    }

    /// As [`Self::open`], for what a person copies: in a connection of its own, so that copies
    /// that nobody reads just now hold up nothing else.
    pub(crate) async fn open_copy(
        &self,
        peer: PeerId,
        question: &Request,
    ) -> Result<(SendStream, RecvStream), ReachError> {
        self.open_in(COPY, peer, question).await
    }

    /// As [`Self::open`], for what jobs need and takes long: in a connection of its own.
    pub(crate) async fn open_bulk(
        &self,
        peer: PeerId,
        question: &Request,
    ) -> Result<(SendStream, RecvStream), ReachError> {
        self.open_in(BULK, peer, question).await
    }

    /// As [`Self::open`], for a keeper that follows a log.
    pub(super) async fn open_tail(
        &self,
        peer: PeerId,
        question: &Request,
    ) -> Result<(SendStream, RecvStream), ReachError> {
        self.open_in(LOGS, peer, question).await
    }

    async fn open_in(
        &self,
        lane: u8,
        peer: PeerId,
        question: &Request,
    ) -> Result<(SendStream, RecvStream), ReachError> {
        let talk = async {
            let unreachable = |e: anyhow::Error| ReachError::Unreachable(self.label(peer), e);
            let (mut send, receive) = self.stream(peer, lane).await?;
            frame::write_message(&mut send, question).await.map_err(|e| unreachable(e.into()))?;
            Ok((send, receive))
        };
        let silent = |_| Err(ReachError::Silent(self.label(peer)));
        let opened = timeout(ASK_TIMEOUT, talk).await.unwrap_or_else(silent);
        if opened.is_err() {
            self.endpoint.forget(&peer);
        }
        opened
    }

    /// Have every blob of an input tree of a job here: from its keepers, from the other
    /// nodes of its ranks, and where none of them has it from any other that can be reached.
    pub(crate) async fn fetch_tree<W: Future<Output = bool> + Send>(
        self: &Arc<Self>,
        spec: &VerifiedSpec,
        certificate: &Certificate,
        root: BlobId,
        is_wanted: impl Fn() -> W + Sync,
    ) -> Result<(), FetchError> {
        // Those of now, before those that the inputs were brought to at first.
        let newest = certificate.links.last().map(|link| &link.next);
        let keepers = newest.into_iter().flatten().chain(&spec.spec.keepers);
        let mut sources: Vec<PeerId> = keepers.map(|(keeper, _)| *keeper).collect();
        // A value that cannot be read gives nobody else; the keepers will say so.
        sources.extend(certificate.value().map(|value| value.body.nodes()).unwrap_or_default());
        let request =
            Request::Inputs { spec: spec.signed.clone(), certificate: certificate.clone() };
        self.bring_tree(&request, (sources, true), root, |_| {}, is_wanted).await?;
        // The daemon is ending if nobody listens.
        let _ = self.act(move |peer, _| peer.tree_stored(root)).await;
        Ok(())
    }

    /// Have every blob of a tree here, as this request lets us: from the `named` nodes, and,
    /// where so, where none of them has it from any other that can be reached. `on_bytes` hears of
    /// content as it arrives.
    pub(super) async fn bring_tree<W: Future<Output = bool> + Send>(
        self: &Arc<Self>,
        request: &Request,
        (named, everybody): (Vec<PeerId>, bool),
        root: BlobId,
        on_bytes: impl Fn(u64) + Clone + Send + 'static,
        is_wanted: impl Fn() -> W + Sync,
    ) -> Result<(), FetchError> {
        let named = self.others(named);
        let connected = self.act(|peer, _| peer.board().connected().collect::<Vec<_>>()).await;
        let connected = connected.ok().filter(|_| everybody);
        let others: Vec<PeerId> = self
            .others(connected.unwrap_or_default())
            .into_iter()
            .filter(|node| !named.contains(node))
            .collect();
        let from = |sources: &[PeerId], blobs: Blobs| Fetch {
            request: request.clone(),
            gated: true,
            sources: sources.to_vec(),
            blobs,
        };
        let bring = async |blobs: Blobs| {
            match fetch(self, from(&named, blobs.clone()), on_bytes.clone(), &is_wanted).await {
                Err(FetchError::Nowhere { from: why, blob }) if !others.is_empty() => {
                    match fetch(self, from(&others, blobs), on_bytes.clone(), &is_wanted).await {
                        // Those that should have it are those whose reasons count.
                        Err(FetchError::Nowhere { .. }) => {
                            Err(FetchError::Nowhere { from: why, blob })
                        }
                        result => result,
                    }
                }
                result => result,
            }
        };
        bring(Blobs::UpTo(root, MANIFEST_BYTES_MAX)).await?;
        if matches!(self.check_blob(root).await, Err(store::Error::Corrupt(_))) {
            bring(Blobs::UpTo(root, MANIFEST_BYTES_MAX)).await?;
        }
        let store = self.store.clone();
        let blobs = tokio::task::spawn_blocking(move || push::blobs_of(&store, root)).await;
        let blobs = blobs.map_err(|e| FetchError::Here(e.into()))?.map_err(FetchError::Here)?;
        bring(Blobs::Known(blobs)).await?;
        Ok(())
    }

    /// Reads a blob that is here; it is removed if it has gone bad.
    async fn check_blob(&self, id: BlobId) -> Result<(), store::Error> {
        let store = self.store.clone();
        let checked = tokio::task::spawn_blocking(move || store.check(&id)).await;
        // What the thread broke of, the next to read it will meet.
        checked.unwrap_or(Ok(()))
    }

    /// Each once and in this order, without this node.
    fn others(&self, nodes: Vec<PeerId>) -> Vec<PeerId> {
        let mut seen = BTreeSet::from([self.id()]);
        nodes.into_iter().filter(|node| seen.insert(*node)).collect()
    }
}

/// One question, one answer.
async fn request<R: serde::de::DeserializeOwned>(
    (send, receive): &mut (SendStream, RecvStream),
    question: &Request,
) -> anyhow::Result<R> {
    frame::write_message(send, question).await?;
    send.finish()?;
    Ok(frame::read_message(receive, usize::MAX).await?)
}

/// Dial a member that asked for it, and answer it on that connection.
pub(super) async fn connect_back(
    shared: &Arc<Shared>,
    peer: PeerId,
    lane: u8,
) -> anyhow::Result<()> {
    if lane > LOGS {
        bail!("there is no lane {lane}");
    }
    let turn = shared.shut.backs.turn(peer, lane);
    let mut failed_at = turn.lock().await;
    if failed_at.is_some_and(|at| at.elapsed() < BACK_PAUSE) {
        bail!("it was tried a moment ago, and failed");
    }
    let connected = dial_back(shared, peer, lane).await;
    *failed_at = connected.is_err().then(Instant::now);
    connected
}

async fn dial_back(shared: &Arc<Shared>, peer: PeerId, lane: u8) -> anyhow::Result<()> {
    let (addrs, _) = shared.whereabouts(peer).await?;
    let connection = shared.endpoint.connect_lane(peer, &addrs, DATA.alpn, lane).await?;
    let (send, receive) = connection.open_bi().await?;
    let () = request(&mut (send.into(), receive.into()), &Request::Connected { lane }).await?;
    let id = connection.stable_id();
    if super::lock(&shared.shut.backs.answered).insert(id) {
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            serve::data_back(Arc::clone(&shared), connection).await;
            super::lock(&shared.shut.backs.answered).remove(&id);
        });
    }
    Ok(())
}

/// Connections that others ask this node for.
#[derive(Debug, Default)]
struct Backs {
    /// One is tried at a time for each lane of a member; when one last failed.
    turns: Mutex<BTreeMap<(PeerId, u8), Turn>>,
    /// Connections that have a task that answers on them.
    answered: Mutex<BTreeSet<usize>>,
}

type Turn = Arc<tokio::sync::Mutex<Option<Instant>>>;

impl Backs {
    fn turn(&self, peer: PeerId, lane: u8) -> Turn {
        Arc::clone(super::lock(&self.turns).entry((peer, lane)).or_default())
    }
}

/// What carries questions to a member.
#[derive(Debug, Clone)]
pub(crate) enum Carried {
    /// A connection of the data plane, of either side.
    Own { addr: SocketAddr, rtt: Duration, mtu: u16, black_holes: u64 },
    /// The control plane's connection, which may go through a relay.
    Tunnel { relay: Option<PeerId> },
}

/// How a question goes to a member.
enum Path {
    Own(Connection),
    /// Through a connection of the control plane.
    Tunnel(Network),
}

/// Members with whom no connection of the data plane comes about, and since when.
#[derive(Debug, Default)]
pub(crate) struct Shut {
    since: Mutex<BTreeMap<PeerId, Instant>>,
    backs: Backs,
}

impl Shut {
    fn note(&self, peer: PeerId, now: Instant) {
        let mut shut = super::lock(&self.since);
        shut.retain(|_, since| now.saturating_duration_since(*since) < SHUT_FOR);
        shut.insert(peer, now);
    }

    /// This node has moved: it may be otherwise from here.
    pub(super) fn forget(&self) {
        super::lock(&self.since).clear();
    }

    /// How long such a connection is waited for where there is another way.
    fn patience(&self, peer: PeerId, lane: u8, now: Instant) -> Duration {
        let since = super::lock(&self.since).get(&peer).copied();
        match since {
            Some(since) if now.saturating_duration_since(since) < SHUT_FOR => Duration::ZERO,
            _ if lane == TALK => OWN_WITHIN.0,
            _ => OWN_WITHIN.1,
        }
    }
}

/// Announce this node on the local network and take up what is found there.
pub(super) fn announce_on_lan(shared: &Arc<Shared>, pool: PoolId) {
    if !shared.settings.mdns {
        return;
    }
    let Some(network) = shared.network() else { return };
    // A node that only this machine can reach is nobody else's business.
    if network.listen_addrs().iter().all(|addr| addr.ip().is_loopback()) {
        return;
    }
    let announcement = Announcement {
        peer: shared.id(),
        control_port: network.listen_addrs().first().map_or(0, SocketAddr::port),
        data_port: shared.endpoint.local_addr().map_or(0, |addr| addr.port()),
    };
    match Lan::start(announcement) {
        Ok((lan, mut found)) => {
            info!(%pool, "looking for members on the local network");
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                let _lan = lan;
                while let Some(LanEvent::Found { peer, control, data }) = found.recv().await {
                    if shared.is_member(peer) && peer != shared.id() {
                        shared.hint(peer, control, data);
                    }
                }
            });
        }
        Err(reason) => warn!(reason = format!("{reason:#}"), "no discovery on the local network"),
    }
}

impl Shared {
    /// Keep for the owner what only the owner can mend: a clock, or a version.
    fn note_met(&self, peer: PeerId, failure: Option<&anyhow::Error>) {
        let refusal = failure.and_then(|reason| reason.downcast_ref::<ShutOut>());
        let mut shut_out = super::lock(&self.shut_out);
        match (failure, refusal) {
            (
                _,
                Some(ShutOut(Refusal {
                    code: RefusalCode::Clock | RefusalCode::Version,
                    message,
                    ..
                })),
            ) => {
                if shut_out.insert(peer, message.clone()).is_none() {
                    warn!(node = self.label(peer), message, "this node is not let in");
                }
            }
            (None, _) | (_, Some(_)) => {
                shut_out.remove(&peer);
            }
            // Out of reach: what it said last may still be so.
            (Some(_), None) => {}
        }
    }

    /// Addresses that a member may have.
    fn hint(&self, peer: PeerId, control: Vec<SocketAddr>, data: Vec<SocketAddr>) {
        let entry =
            crate::store::PeerEntry { control, data, last_seen_wall_ms: clock::now().wall_ms };
        self.addresses.put(peer, entry, None);
        self.reach_changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::PublicKey;

    use super::*;

    #[test]
    fn each_lane_of_a_member_has_a_turn_of_its_own() {
        let (peer, other) = (PeerId(PublicKey([1; 32])), PeerId(PublicKey([2; 32])));
        let backs = Backs::default();
        let held = backs.turn(peer, TALK);
        let _held = held.try_lock().unwrap();
        assert!(backs.turn(peer, TALK).try_lock().is_err());
        assert!(backs.turn(peer, BULK).try_lock().is_ok());
        assert!(backs.turn(other, TALK).try_lock().is_ok());
    }

    #[test]
    fn where_no_connection_came_about_it_is_not_waited_for_again_for_a_while() {
        let (peer, other) = (PeerId(PublicKey([1; 32])), PeerId(PublicKey([2; 32])));
        let (shut, now) = (Shut::default(), Instant::now());
        assert_eq!(shut.patience(peer, TALK, now), OWN_WITHIN.0);
        assert_eq!(shut.patience(peer, BULK, now), OWN_WITHIN.1);
        shut.note(peer, now);
        let later = now + SHUT_FOR - Duration::from_millis(1);
        assert_eq!(shut.patience(peer, BULK, later), Duration::ZERO);
        assert_eq!(shut.patience(other, BULK, later), OWN_WITHIN.1);
        assert_eq!(shut.patience(peer, BULK, now + SHUT_FOR), OWN_WITHIN.1);
        shut.forget();
        assert_eq!(shut.patience(peer, TALK, later), OWN_WITHIN.0);
        // What is over is not remembered.
        shut.note(peer, now);
        shut.note(other, now + SHUT_FOR);
        assert_eq!(super::super::lock(&shut.since).len(), 1);
    }
}
