//! The task that owns the swarm.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use libp2p::{
    Multiaddr, Swarm,
    core::{ConnectedPoint, transport::ListenerId},
    dcutr, gossipsub, identify,
    multiaddr::Protocol,
    ping, relay,
    request_response::{self, ResponseChannel},
    swarm::{
        ConnectionId, DialError, SwarmEvent,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use p2pit_protocol::PeerId;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tracing::{debug, trace, warn};

use super::{
    Acceptance, Budget, Command, Event, GossipId, NetworkConfig, Payload, Punch, Relay, Route,
    Shared, Standing, address,
    behaviour::{self, Behaviour, BehaviourEvent},
    lock,
    peers::Peer,
    relays::Reservations,
};
use crate::transfer::endpoint::{from_libp2p, libp2p_keypair, to_libp2p};

/// Members that stay connected. Above it those that nothing was heard of for
/// [`IDLE_AFTER`] are let go of, the longest silent first; not neighbours in gossip.
pub(super) const CONNECTED_WANTED: usize = 64;
const IDLE_AFTER: Duration = Duration::from_secs(60);
/// Messages to one peer that are not acknowledged yet.
pub(super) const IN_FLIGHT_MAX: usize = 64;
/// Events for which the daemon has no room yet. Then the swarm stands still: whoever does
/// not hear is not heard.
const BACKLOG_MAX: usize = 1_024;
/// Deadlines of waiting messages, idle connections; and gossip's heartbeat, whose timer
/// does not wake the swarm again by itself.
const TICK: Duration = Duration::from_secs(1);
/// For the first addresses; interfaces are listed within milliseconds.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// For ports that were free a moment before.
const BIND_TRIES: usize = 8;
/// To say good-bye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

type SwarmTask = Swarm<Behaviour>;
type Ack = ResponseChannel<()>;

pub(super) struct Driver {
    swarm: SwarmTask,
    topic: gossipsub::TopicHash,
    me: PeerId,
    members: BTreeSet<PeerId>,
    /// Members that something is known of.
    peers: BTreeMap<PeerId, Peer>,
    events: mpsc::Sender<Event>,
    backlog: VecDeque<(Event, Option<Ack>)>,
    /// The same as the messages', so that gossip cannot add to what they may take.
    inbound: Budget,
    shared: Arc<Shared>,
    reservations: Reservations,
    /// Members that this node passes on for.
    passed_on_for: BTreeSet<PeerId>,
    /// Where others can dial this node, as libp2p was told.
    public: BTreeSet<SocketAddr>,
}

impl Driver {
    pub(super) fn new(
        config: &NetworkConfig,
        events: mpsc::Sender<Event>,
        shared: Arc<Shared>,
    ) -> anyhow::Result<Self> {
        let inbound = Budget::new();
        let swarm =
            behaviour::swarm(libp2p_keypair(&config.key), config.pool, agent()?, inbound.clone())?;
        Ok(Self {
            swarm,
            topic: behaviour::topic(config.pool).hash(),
            me: PeerId(config.key.public()),
            members: BTreeSet::new(),
            peers: BTreeMap::new(),
            events,
            backlog: VecDeque::new(),
            inbound,
            shared,
            reservations: Reservations::default(),
            passed_on_for: BTreeSet::new(),
            public: BTreeSet::new(),
        })
    }

    pub(super) fn streams(&self) -> libp2p_stream::Control {
        self.swarm.behaviour().streams.new_control()
    }

    /// Returns once every listener has an address.
    pub(super) async fn listen(&mut self, addr: SocketAddr) -> anyhow::Result<()> {
        let mut silent: HashSet<ListenerId> = self.bind(addr)?.into_iter().collect();
        let listening = async {
            while !silent.is_empty() {
                // Nobody is a member yet, so nothing else of interest happens.
                match self.swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr { listener_id, .. } => {
                        silent.remove(&listener_id);
                    }
                    SwarmEvent::ListenerClosed { reason: Err(reason), .. } => {
                        return Err(reason).context("a listener has ended");
                    }
                    _ => {}
                }
            }
            Ok(())
        };
        match timeout(LISTEN_TIMEOUT, listening).await {
            Ok(result) => result.with_context(|| format!("cannot listen on {addr}"))?,
            Err(_) => warn!("some interfaces have no address to listen on"),
        }
        *lock(&self.shared.listen) = self.listen_addrs();
        Ok(())
    }

    fn bind(&mut self, addr: SocketAddr) -> anyhow::Result<Vec<ListenerId>> {
        if addr.port() != 0 {
            return self.bind_port(addr);
        }
        let mut tries = 0;
        loop {
            let port = address::free_port(addr.ip())
                .with_context(|| format!("no port of {} is free", addr.ip()))?;
            let bound = self.bind_port(SocketAddr::new(addr.ip(), port));
            tries += 1;
            if bound.is_ok() || tries == BIND_TRIES {
                return bound;
            }
        }
    }

    fn bind_port(&mut self, addr: SocketAddr) -> anyhow::Result<Vec<ListenerId>> {
        let mut addrs = vec![addr];
        if addr.ip() == Ipv6Addr::UNSPECIFIED {
            addrs.push((Ipv4Addr::UNSPECIFIED, addr.port()).into());
        }
        let mut listeners = Vec::new();
        for multiaddr in addrs.into_iter().flat_map(address::both) {
            match self.swarm.listen_on(multiaddr.clone()) {
                Ok(listener) => listeners.push(listener),
                Err(reason) => {
                    for listener in listeners {
                        self.swarm.remove_listener(listener);
                    }
                    // The steps between say nothing, or the same again.
                    let reason = anyhow::Error::from(reason);
                    bail!("cannot listen on {addr}, {multiaddr}: {}", reason.root_cause());
                }
            }
        }
        Ok(listeners)
    }

    fn listen_addrs(&self) -> Vec<SocketAddr> {
        // QUIC and TCP are one address here.
        let addrs: BTreeSet<_> = self.swarm.listeners().filter_map(address::socket).collect();
        addrs.into_iter().collect()
    }

    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut members: watch::Receiver<BTreeSet<PeerId>>,
    ) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (events, shared) = (self.events.clone(), Arc::clone(&self.shared));
        let done = loop {
            tokio::select! {
                biased;
                room = events.reserve(), if !self.backlog.is_empty() => {
                    let (Ok(room), Some((event, ack))) = (room, self.backlog.pop_front()) else {
                        break None;
                    };
                    room.send(event);
                    acknowledge(&mut self.swarm, ack);
                }
                () = events.closed() => break None,
                changed = members.changed() => {
                    if changed.is_err() {
                        break None;
                    }
                    self.set_members(members.borrow_and_update().clone());
                }
                command = commands.recv() => match command {
                    None => break None,
                    Some(Command::Close(done)) => break Some(done),
                    Some(command) => {
                        // A change that was asked for before the command comes first.
                        if members.has_changed().unwrap_or(false) {
                            self.set_members(members.borrow_and_update().clone());
                        }
                        self.on_command(command);
                    }
                },
                () = shared.refusal.notified() => self.on_refusal(),
                event = self.swarm.select_next_some(), if self.backlog.len() < BACKLOG_MAX => {
                    self.on_swarm_event(event);
                }
                _ = tick.tick() => self.on_tick(),
            }
        };
        self.close(done).await;
    }

    async fn close(mut self, done: Option<oneshot::Sender<()>>) {
        let connected: Vec<_> = self.swarm.connected_peers().copied().collect();
        for peer in connected {
            // It may just have gone by itself.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closing = async {
            while self.swarm.network_info().num_peers() > 0 {
                self.swarm.select_next_some().await;
            }
        };
        if timeout(CLOSE_TIMEOUT, closing).await.is_err() {
            debug!("some peers were not told of the end");
        }
        drop(self);
        if let Some(done) = done {
            // Nobody may be waiting for the end.
            let _ = done.send(());
        }
    }

    // ---- commands -------------------------------------------------------------------------

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Send { to, payload } => self.send(to, payload),
            Command::Publish(bytes) => self.publish(bytes),
            Command::Dial { peer, addrs, relays } => self.dial(peer, &addrs, relays),
            Command::Stand(standing) => self.stand(standing),
            Command::Report { id, acceptance } => self.report(id, acceptance),
            // The loop ends with it.
            Command::Close(_) => {}
        }
    }

    fn send(&mut self, to: PeerId, payload: Payload) {
        if !self.members.contains(&to) {
            debug!(%to, "no message to who is not a member");
            return self.emit(Event::Undeliverable { to });
        }
        let is_connected = self.is_connected(to);
        let peer = self.peers.entry(to).or_insert_with(Peer::new);
        peer.used = Instant::now();
        if peer.wait(payload).is_err() {
            debug!(%to, "too many messages wait");
            return self.emit(Event::Undeliverable { to });
        }
        if is_connected {
            self.flush(to);
        } else {
            self.connect(to);
        }
    }

    fn publish(&mut self, bytes: Vec<u8>) {
        let len = bytes.len();
        let published = self.swarm.behaviour_mut().gossip.publish(self.topic.clone(), bytes);
        if let Err(reason) = published {
            debug!(len, %reason, "gossip not published");
        }
    }

    fn dial(&mut self, to: PeerId, addrs: &[SocketAddr], relays: Vec<Relay>) {
        if !self.members.contains(&to) {
            return self.emit(Event::DialFailed(to, "not a member".to_owned()));
        }
        let peer = self.peers.entry(to).or_insert_with(Peer::new);
        peer.remember(addrs);
        peer.remember_relays(relays);
        if !self.is_connected(to) {
            self.connect(to);
        }
    }

    fn stand(&mut self, Standing { public, relays }: Standing) {
        let public: BTreeSet<SocketAddr> = public.into_iter().collect();
        for addr in self.public.difference(&public).copied().flat_map(address::both) {
            self.swarm.remove_external_address(&addr);
        }
        // A relay tells those it passes on for where they are found then.
        for addr in public.difference(&self.public).copied().flat_map(address::both) {
            self.swarm.add_external_address(addr);
        }
        let status = if public.is_empty() { relay::Status::Disable } else { relay::Status::Enable };
        self.swarm.behaviour_mut().relay.set_status(Some(status));
        self.public = public;
        self.reservations.want(&mut self.swarm, relays);
    }

    fn report(&mut self, id: GossipId, acceptance: Acceptance) {
        let acceptance = match acceptance {
            Acceptance::Accept => gossipsub::MessageAcceptance::Accept,
            Acceptance::Ignore => gossipsub::MessageAcceptance::Ignore,
            Acceptance::Reject => gossipsub::MessageAcceptance::Reject,
        };
        let message = gossipsub::MessageId::new(&id.hash);
        let from = to_libp2p(id.from);
        let gossip = &mut self.swarm.behaviour_mut().gossip;
        if !gossip.report_message_validation_result(&message, &from, acceptance) {
            debug!("gossip was judged too late");
        }
    }

    fn set_members(&mut self, mut members: BTreeSet<PeerId>) {
        members.remove(&self.me);
        for gone in self.members.difference(&members) {
            self.swarm.behaviour_mut().allowed.disallow_peer(to_libp2p(*gone));
        }
        for new in members.difference(&self.members) {
            self.swarm.behaviour_mut().allowed.allow_peer(to_libp2p(*new));
        }
        self.members = members;
        let is_member = |peer: &PeerId| self.members.contains(peer);
        let known = std::mem::take(&mut self.peers);
        let (kept, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            known.into_iter().partition(|(peer, _)| is_member(peer));
        self.peers = kept;
        for (to, mut peer) in gone {
            if peer.give_up() {
                self.emit(Event::Undeliverable { to });
            }
        }
    }

    fn on_refusal(&mut self) {
        let refused = std::mem::take(&mut *lock(&self.shared.refused));
        for to in refused {
            self.emit(Event::Undeliverable { to });
        }
    }

    // ---- the swarm ------------------------------------------------------------------------

    fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Messages(event)) => self.on_message(event),
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(event)) => self.on_gossip(event),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                connection_id,
                peer_id,
                info,
            })) => {
                self.on_seen(connection_id, &info.observed_addr);
                let boot = boot(&info.agent_version);
                if let (Some(peer), Some(boot)) = (from_libp2p(&peer_id), boot) {
                    self.on_boot(peer, connection_id, boot);
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event {
                connection,
                result: Err(ping::Failure::Timeout | ping::Failure::Other { .. }),
                ..
            })) => {
                debug!(%connection, "no answer to a ping");
                self.swarm.close_connection(connection);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Relay(event)) => self.on_relay(&event),
            SwarmEvent::Behaviour(BehaviourEvent::Punch(event)) => self.on_punch(&event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                if let (Some(peer), Some(route)) = (from_libp2p(&peer_id), route(&endpoint)) {
                    self.on_connected(peer, connection_id, route, endpoint.is_listener());
                }
            }
            SwarmEvent::ConnectionClosed {
                peer_id, connection_id, num_established, cause, ..
            } => {
                if let Some(peer) = from_libp2p(&peer_id) {
                    debug!(%peer, ?cause, "connection closed");
                    self.on_closed(peer, connection_id, num_established == 0);
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer_id), error, .. } => {
                if let Some(peer) = from_libp2p(&peer_id)
                    && !self.swarm.is_connected(&peer_id)
                {
                    self.dial_failed(peer, describe(&error));
                }
            }
            SwarmEvent::IncomingConnectionError { error, .. } => {
                debug!(%error, "incoming connection refused or broken");
            }
            SwarmEvent::NewListenAddr { listener_id, .. }
                if self.reservations.granted(listener_id) =>
            {
                self.on_relays();
            }
            SwarmEvent::NewListenAddr { .. } => self.on_listen_addrs(),
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.on_listen_addrs();
                self.on_address_lost(&address);
            }
            SwarmEvent::ListenerClosed { listener_id, reason, .. }
                if self.reservations.ended(listener_id) =>
            {
                debug!(?reason, "a reservation at a relay has ended");
                self.on_relays();
            }
            SwarmEvent::ListenerClosed { reason, .. } => {
                warn!(?reason, "a listener has ended");
                self.on_listen_addrs();
            }
            SwarmEvent::ListenerError { error, .. } => warn!(%error, "a listener has trouble"),
            other => trace!(?other, "of no interest"),
        }
    }

    fn on_connected(&mut self, to: PeerId, id: ConnectionId, route: Route, came_in: bool) {
        if !self.members.contains(&to) {
            // Its membership ended while it connected; the allow-list closes it.
            return;
        }
        let peer = self.peers.entry(to).or_insert_with(Peer::new);
        peer.connected(id, route, Instant::now());
        let is_first = peer.only_link(id).is_some();
        let moved = if came_in && !is_first { peer.moved(id) } else { Vec::new() };
        self.note_route(to);
        if is_first {
            self.emit(Event::Connected(to, route));
        } else if !moved.is_empty() {
            // gossip tells its topics once, with the first connection: the peer, which knows
            // of this one alone, would never hear them. So both begin anew.
            debug!(peer = %to, "moved to another address: it may dial again");
            for id in moved.into_iter().chain([id]) {
                self.swarm.close_connection(id);
            }
            return;
        }
        self.flush(to);
    }

    /// How a peer is connected is known to who asks.
    fn note_route(&self, to: PeerId) {
        let mut routes = lock(&self.shared.routes);
        match self.peers.get(&to).and_then(Peer::route) {
            Some(route) => routes.insert(to, route),
            None => routes.remove(&to),
        };
        drop(routes);
        let mut relayed = lock(&self.shared.relayed);
        if self.peers.get(&to).is_some_and(Peer::is_relayed) {
            relayed.insert(to);
        } else {
            relayed.remove(&to);
        }
    }

    /// Closes connections that are dead, though this side has not noticed. Where no other but
    /// `id` is left the daemon hears of a new connection, since what was sent may be lost.
    fn close_stale(&mut self, to: PeerId, id: ConnectionId, stale: Vec<ConnectionId>) {
        let only_link = self.peers.get(&to).and_then(|peer| peer.only_link(id));
        for id in stale {
            self.swarm.close_connection(id);
        }
        if let Some(route) = only_link {
            self.emit(Event::Disconnected(to));
            self.emit(Event::Connected(to, route));
        }
    }

    /// A peer says from where it sees this node.
    fn on_seen(&mut self, id: ConnectionId, addr: &Multiaddr) {
        let quic = addr.iter().any(|part| matches!(part, Protocol::QuicV1));
        if quic && address::socket(addr).is_some() {
            trace!(%id, %addr, "seen");
            self.swarm.behaviour_mut().seen.add(addr.clone());
        }
    }

    fn on_relay(&mut self, event: &relay::Event) {
        match event {
            relay::Event::ReservationReqAccepted { src_peer_id, renewed } => {
                if let Some(peer) = from_libp2p(src_peer_id) {
                    if !renewed {
                        debug!(%peer, "this node passes on for it");
                    }
                    self.passed_on_for.insert(peer);
                }
            }
            relay::Event::ReservationClosed { src_peer_id }
            | relay::Event::ReservationTimedOut { src_peer_id } => {
                if let Some(peer) = from_libp2p(src_peer_id) {
                    self.passed_on_for.remove(&peer);
                }
            }
            other => debug!(?other, "as a relay"),
        }
    }

    fn on_punch(&mut self, event: &dcutr::Event) {
        let Some(peer) = from_libp2p(&event.remote_peer_id) else { return };
        let punch = match &event.result {
            Ok(_) => Punch::Open,
            Err(reason) => Punch::Shut(reason.to_string()),
        };
        debug!(%peer, ?punch, "tried to do without a relay");
        lock(&self.shared.punches).insert(peer, punch);
    }

    fn on_relays(&mut self) {
        let relays = self.reservations.all_granted();
        let before = std::mem::replace(&mut *lock(&self.shared.relays), relays.clone());
        if before != relays {
            self.emit(Event::Relays(relays));
        }
    }

    /// The machine left a network: connections from there are dead, and nobody would notice
    /// for a while.
    fn on_address_lost(&mut self, addr: &Multiaddr) {
        let Some(addr) = address::socket(addr) else { return };
        if addr.ip().is_loopback() || self.listen_addrs().iter().any(|a| a.ip() == addr.ip()) {
            return;
        }
        debug!(%addr, "this machine has lost an address: connecting anew");
        let dead: Vec<_> =
            self.peers.values().flat_map(|peer| peer.leaving_from(addr.ip())).collect();
        for id in dead {
            self.swarm.close_connection(id);
        }
    }

    /// The peer says which start of it is at the other end of a connection.
    fn on_boot(&mut self, to: PeerId, id: ConnectionId, boot: u64) {
        let Some(peer) = self.peers.get_mut(&to) else { return };
        let stale = peer.booted(id, boot);
        if stale.is_empty() {
            return;
        }
        debug!(peer = %to, "restarted");
        self.note_route(to);
        self.close_stale(to, id, stale);
    }

    fn on_closed(&mut self, to: PeerId, id: ConnectionId, was_last: bool) {
        let waits = self.peers.get_mut(&to).is_some_and(|peer| {
            peer.closed(id);
            peer.has_waiting()
        });
        self.note_route(to);
        if was_last {
            self.emit(Event::Disconnected(to));
            if waits {
                self.connect(to);
            }
        }
    }

    fn on_message(&mut self, event: request_response::Event<Payload, ()>) {
        match event {
            request_response::Event::Message { peer, message, .. } => {
                let Some(from) = from_libp2p(&peer) else { return };
                match message {
                    request_response::Message::Request { request, channel, .. } => {
                        if let Some(peer) = self.peers.get_mut(&from) {
                            peer.used = Instant::now();
                        }
                        self.emit_acknowledged(
                            Event::Message { from, bytes: request },
                            Some(channel),
                        );
                    }
                    request_response::Message::Response { .. } => self.landed(from),
                }
            }
            request_response::Event::OutboundFailure { peer, error, .. } => {
                let Some(to) = from_libp2p(&peer) else { return };
                debug!(%to, %error, "message not acknowledged");
                self.emit(Event::Undeliverable { to });
                self.landed(to);
            }
            request_response::Event::InboundFailure { peer, error, .. } => {
                debug!(%peer, %error, "message not received or not acknowledged");
            }
            request_response::Event::ResponseSent { .. } => {}
        }
    }

    /// A message is not in flight any more, whatever became of it.
    fn landed(&mut self, to: PeerId) {
        if let Some(peer) = self.peers.get_mut(&to) {
            peer.in_flight = peer.in_flight.saturating_sub(1);
            self.flush(to);
        }
    }

    fn on_gossip(&mut self, event: gossipsub::Event) {
        match event {
            gossipsub::Event::Message { propagation_source, message_id, message } => {
                let id = from_libp2p(&propagation_source)
                    .zip(message_id.0.try_into().ok())
                    .map(|(from, hash)| GossipId { hash, from });
                let Some(id) = id else { return };
                let has_room = self.backlog.is_empty()
                    && self.events.capacity() > self.events.max_capacity() / 2;
                let payload = if has_room { self.inbound.try_take(message.data) } else { None };
                match payload {
                    Some(bytes) => self.emit(Event::Gossip { from: id.from, bytes, id }),
                    None => {
                        debug!("no room for gossip");
                        self.report(id, Acceptance::Ignore);
                    }
                }
            }
            gossipsub::Event::SlowPeer { peer_id, .. } => debug!(%peer_id, "slow in gossip"),
            gossipsub::Event::GossipsubNotSupported { peer_id } => {
                debug!(%peer_id, "does not gossip");
            }
            gossipsub::Event::Subscribed { .. } | gossipsub::Event::Unsubscribed { .. } => {}
        }
    }

    fn on_listen_addrs(&mut self) {
        let addrs = self.listen_addrs();
        let before = std::mem::replace(&mut *lock(&self.shared.listen), addrs.clone());
        if before != addrs {
            self.emit(Event::ListenAddrs(addrs));
        }
    }

    // ---- time -----------------------------------------------------------------------------

    fn on_tick(&mut self) {
        let now = Instant::now();
        let late: Vec<_> = self
            .peers
            .iter_mut()
            .filter_map(|(to, peer)| peer.expire(now).then_some(*to))
            .collect();
        for to in late {
            debug!(%to, "a message has waited too long");
            self.emit(Event::Undeliverable { to });
        }
        let tunnels = lock(&self.shared.tunnels).clone();
        let free = self.peers.iter().filter(|(peer, _)| !tunnels.contains_key(*peer));
        let needless: Vec<_> = free.flat_map(|(_, peer)| peer.needless(now)).collect();
        for id in needless {
            self.swarm.close_connection(id);
        }
        self.reservations.keep(&mut self.swarm);
        self.prune(now);
    }

    /// Lets go of connections that are not needed, politely: the other side may well dial
    /// again when it needs us.
    fn prune(&mut self, now: Instant) {
        let connected = self.swarm.network_info().num_peers();
        let surplus = connected.saturating_sub(CONNECTED_WANTED);
        if surplus == 0 {
            return;
        }
        let gossip = &self.swarm.behaviour().gossip;
        let neighbours: BTreeSet<_> =
            gossip.mesh_peers(&self.topic).filter_map(from_libp2p).collect();
        let mut idle: Vec<_> = self
            .swarm
            .connected_peers()
            .filter_map(from_libp2p)
            .filter(|peer| !neighbours.contains(peer))
            .filter(|peer| !self.reservations.is_at(*peer) && !self.passed_on_for.contains(peer))
            .filter_map(|id| self.peers.get(&id).map(|peer| (peer, id)))
            .filter(|(peer, _)| peer.is_idle() && now - peer.used >= IDLE_AFTER)
            .map(|(peer, id)| (peer.used, id))
            .collect();
        idle.sort_unstable();
        for (_, peer) in idle.into_iter().take(surplus) {
            debug!(%peer, "one connection too many");
            // It may just have gone by itself.
            let _ = self.swarm.disconnect_peer_id(to_libp2p(peer));
        }
    }

    // ---- inside ---------------------------------------------------------------------------

    fn is_connected(&self, peer: PeerId) -> bool {
        self.swarm.behaviour().messages.is_connected(&to_libp2p(peer))
    }

    /// Dials unless that is under way.
    fn connect(&mut self, to: PeerId) {
        let Some(peer) = self.peers.get(&to) else { return };
        if peer.addrs().is_empty() && peer.relays().is_empty() {
            return self.dial_failed(to, "no address is known".to_owned());
        }
        let direct = peer.addrs().iter().copied().flat_map(address::both);
        let relayed =
            peer.relays().iter().filter(|relay| relay.node != self.me).flat_map(|relay| {
                let via = relay.addrs.iter().copied().flat_map(address::both);
                via.map(|addr| address::circuit(to_libp2p(relay.node), addr, Some(to_libp2p(to))))
            });
        let addrs = direct.chain(relayed).collect();
        let opts = DialOpts::peer_id(to_libp2p(to))
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addrs)
            .build();
        match self.swarm.dial(opts) {
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => self.dial_failed(to, describe(&error)),
        }
    }

    fn dial_failed(&mut self, to: PeerId, reason: String) {
        let gives_up = self.peers.get_mut(&to).is_some_and(Peer::give_up);
        self.emit(Event::DialFailed(to, reason));
        if gives_up {
            self.emit(Event::Undeliverable { to });
        }
    }

    /// Sends what waits, as far as it may be in flight.
    fn flush(&mut self, to: PeerId) {
        if !self.is_connected(to) {
            return;
        }
        let Some(peer) = self.peers.get_mut(&to) else { return };
        while peer.in_flight < IN_FLIGHT_MAX
            && let Some(payload) = peer.next_waiting()
        {
            peer.in_flight += 1;
            self.swarm.behaviour_mut().messages.send_request(&to_libp2p(to), payload);
        }
    }

    fn emit(&mut self, event: Event) {
        self.emit_acknowledged(event, None);
    }

    fn emit_acknowledged(&mut self, event: Event, ack: Option<Ack>) {
        if self.backlog.is_empty() {
            match self.events.try_send(event) {
                Ok(()) => acknowledge(&mut self.swarm, ack),
                Err(mpsc::error::TrySendError::Full(event)) => self.backlog.push_back((event, ack)),
                // The loop is about to end.
                Err(mpsc::error::TrySendError::Closed(_)) => {}
            }
            return;
        }
        // These are asked for by the daemon, which has no bound to its asking.
        let is_said = self.backlog.iter().any(|(said, _)| match (said, &event) {
            (Event::Undeliverable { to: a }, Event::Undeliverable { to: b })
            | (Event::DialFailed(a, _), Event::DialFailed(b, _)) => a == b,
            _ => false,
        });
        if !is_said {
            self.backlog.push_back((event, ack));
        }
    }
}

/// `None` where the other side is at no IP address.
fn route(endpoint: &ConnectedPoint) -> Option<Route> {
    let through = match endpoint {
        ConnectedPoint::Dialer { address, .. } => address,
        ConnectedPoint::Listener { local_addr, .. } => local_addr,
    };
    match address::relay(through) {
        Some(relay) => from_libp2p(&relay).map(Route::Relayed),
        None => address::socket(endpoint.get_remote_address()).map(Route::Direct),
    }
}

fn acknowledge(swarm: &mut SwarmTask, ack: Option<Ack>) {
    if let Some(ack) = ack
        && swarm.behaviour_mut().messages.send_response(ack, ()).is_err()
    {
        debug!("the sender of a message has given up on it");
    }
}

/// What this start of this node calls itself. The number tells peers which of two
/// connections belongs to a process that is no more.
fn agent() -> anyhow::Result<String> {
    let mut boot = [0; 8];
    getrandom::fill(&mut boot).context("no randomness")?;
    Ok(format!("p2pit/{} {:016x}", env!("CARGO_PKG_VERSION"), u64::from_be_bytes(boot)))
}

fn boot(agent: &str) -> Option<u64> {
    let (_, boot) = agent.rsplit_once(' ')?;
    u64::from_str_radix(boot, 16).ok()
}

fn describe(error: &DialError) -> String {
    match error {
        DialError::Transport(attempts) => {
            let lines = attempts.iter().map(|(addr, error)| {
                let mut cause: &dyn std::error::Error = error;
                while let Some(deeper) = cause.source() {
                    cause = deeper;
                }
                format!("{}: {cause}", without_peer(addr))
            });
            lines.collect::<Vec<_>>().join("; ")
        }
        DialError::WrongPeerId { obtained, address } => {
            format!("at {} is {obtained}", without_peer(address))
        }
        other => other.to_string(),
    }
}

fn without_peer(addr: &Multiaddr) -> Multiaddr {
    addr.iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect()
}
