//! What is kept of one peer: where it may be, its connections, and what waits for it.

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use libp2p::swarm::ConnectionId;
use tokio::time::Instant;

use super::{
    ADDRESSES_MAX, Payload, RELAYS_MAX, Relay, Route, address, behaviour::MESSAGE_TIMEOUT,
};

/// Messages that wait for one peer; beyond them, more are undeliverable.
pub(super) const WAITING_MAX: usize = 1_024;

/// How long a connection through a relay stays beside a direct one: what is under way in it
/// ends by then.
const RELAYED_LINGERS: Duration = Duration::from_secs(3);
/// Both sides dialled at once where the second connection comes so soon after the first.
const AT_ONCE: Duration = Duration::from_secs(5);

pub(super) struct Peer {
    addrs: Vec<SocketAddr>,
    relays: Vec<Relay>,
    /// The newest last.
    links: Vec<Link>,
    waiting: VecDeque<(Payload, Instant)>,
    pub(super) in_flight: usize,
    /// When a message last came or went.
    pub(super) used: Instant,
}

struct Link {
    id: ConnectionId,
    route: Route,
    /// The address of this machine that its packets left from at first.
    source: Option<IpAddr>,
    since: Instant,
    /// Which start of the peer is at the other end; known a moment after the connection.
    boot: Option<u64>,
}

impl Peer {
    pub(super) fn new() -> Self {
        Self {
            addrs: Vec::new(),
            relays: Vec::new(),
            links: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: 0,
            used: Instant::now(),
        }
    }

    pub(super) fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    pub(super) fn relays(&self) -> &[Relay] {
        &self.relays
    }

    /// Those that pass on for it are those it said last.
    pub(super) fn remember_relays(&mut self, newest: Vec<Relay>) {
        if !newest.is_empty() {
            self.relays = newest;
            self.relays.truncate(RELAYS_MAX);
        }
    }

    /// The newest first; the oldest are forgotten.
    pub(super) fn remember(&mut self, newest: &[SocketAddr]) {
        let mut seen = BTreeSet::new();
        let all = newest.iter().chain(&self.addrs);
        self.addrs = all.copied().filter(|addr| seen.insert(*addr)).take(ADDRESSES_MAX).collect();
    }

    pub(super) fn connected(&mut self, id: ConnectionId, route: Route, now: Instant) {
        self.used = now;
        let source = match route {
            Route::Direct(addr) => address::source_towards(addr),
            Route::Relayed(_) => None,
        };
        self.links.push(Link { id, route, source, since: now, boot: None });
    }

    /// The connections whose packets left from an address that this machine has no more.
    pub(super) fn leaving_from(&self, lost: IpAddr) -> impl Iterator<Item = ConnectionId> {
        self.links.iter().filter(move |link| link.source == Some(lost)).map(|link| link.id)
    }

    /// Directly, if it is so; the newest of several.
    pub(super) fn route(&self) -> Option<Route> {
        let mut routes = self.links.iter().rev().map(|link| link.route);
        let direct = routes.clone().find(|route| matches!(route, Route::Direct(_)));
        direct.or_else(|| routes.next())
    }

    /// Whether any connection goes through a relay.
    pub(super) fn is_relayed(&self) -> bool {
        self.links.iter().any(|link| matches!(link.route, Route::Relayed(_)))
    }

    /// Connections through relays that a direct one has made needless for long enough.
    pub(super) fn needless(&self, now: Instant) -> Vec<ConnectionId> {
        let is_direct = |link: &&Link| matches!(link.route, Route::Direct(_));
        let direct = self.links.iter().filter(is_direct).map(|link| link.since).min();
        match direct {
            Some(since) if now.saturating_duration_since(since) >= RELAYED_LINGERS => {
                self.links.iter().filter(|link| !is_direct(link)).map(|link| link.id).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The connections that are dead since the peer moved to another network: it dials only
    /// where it has no connection any more, and now did, from another address. They are
    /// forgotten.
    pub(super) fn moved(&mut self, id: ConnectionId) -> Vec<ConnectionId> {
        let Some((newest, older)) = self.links.split_last() else { return Vec::new() };
        let Route::Direct(addr) = newest.route else { return Vec::new() };
        if newest.id != id {
            return Vec::new();
        }
        let is_elsewhere = |link: &&Link| {
            matches!(link.route, Route::Direct(other) if other.ip() != addr.ip())
                && newest.since.saturating_duration_since(link.since) > AT_ONCE
        };
        let stale: Vec<_> = older.iter().filter(is_elsewhere).map(|link| link.id).collect();
        self.links.retain(|link| !stale.contains(&link.id));
        stale
    }

    pub(super) fn closed(&mut self, id: ConnectionId) {
        self.links.retain(|link| link.id != id);
    }

    /// The connections that the peer's restart has left dead: those older than `id` whose
    /// other end was another start of it. They are forgotten.
    pub(super) fn booted(&mut self, id: ConnectionId, boot: u64) -> Vec<ConnectionId> {
        let Some(position) = self.links.iter().position(|link| link.id == id) else {
            return Vec::new();
        };
        self.links[position].boot = Some(boot);
        let is_stale = |link: &Link| link.boot.is_some_and(|other| other != boot);
        let older = self.links[..position].iter();
        let stale: Vec<_> = older.filter(|link| is_stale(link)).map(|link| link.id).collect();
        self.links.retain(|link| !stale.contains(&link.id));
        stale
    }

    /// Where the connection `id` leads, if it is the only one.
    pub(super) fn only_link(&self, id: ConnectionId) -> Option<Route> {
        match self.links.as_slice() {
            [link] if link.id == id => Some(link.route),
            _ => None,
        }
    }

    /// Gives the message back where too many wait.
    pub(super) fn wait(&mut self, payload: Payload) -> Result<(), Payload> {
        if self.waiting.len() >= WAITING_MAX {
            return Err(payload);
        }
        self.waiting.push_back((payload, Instant::now() + MESSAGE_TIMEOUT));
        Ok(())
    }

    pub(super) fn next_waiting(&mut self) -> Option<Payload> {
        self.waiting.pop_front().map(|(payload, _)| payload)
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Drops what has waited too long, and says whether there was any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let before = self.waiting.len();
        while self.waiting.front().is_some_and(|(_, deadline)| *deadline <= now) {
            self.waiting.pop_front();
        }
        self.waiting.len() < before
    }

    /// Drops all that waits, and says whether there was any.
    pub(super) fn give_up(&mut self) -> bool {
        let any = self.has_waiting();
        self.waiting = VecDeque::new();
        any
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.in_flight == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use p2pit_protocol::{PeerId, identity::KeyPair};

    use crate::network::Budget;

    #[test]
    fn a_restart_leaves_only_the_connections_that_came_before_it_dead() {
        let [first, second, third] = [1, 2, 3].map(ConnectionId::new_unchecked);
        let addr = |port| Route::Direct(SocketAddr::from(([10, 0, 0, 1], port)));
        let (mut peer, now) = (Peer::new(), Instant::now());
        peer.connected(first, addr(1), now);
        assert_eq!(peer.only_link(first), Some(addr(1)));
        peer.connected(second, addr(2), now);
        assert_eq!(peer.booted(first, 7), []);
        assert_eq!(peer.booted(second, 7), []);
        peer.connected(third, addr(3), now);
        assert_eq!(peer.only_link(third), None);
        assert_eq!(peer.booted(third, 8), [first, second]);
        assert_eq!(peer.only_link(third), Some(addr(3)));
        // It is said again from time to time.
        assert_eq!(peer.booted(third, 8), []);
        assert_eq!(peer.booted(first, 7), []);
    }

    #[test]
    fn a_relay_is_left_out_a_while_after_there_is_a_direct_connection() {
        let [relayed, direct] = [1, 2].map(ConnectionId::new_unchecked);
        let through = Route::Relayed(PeerId(KeyPair::from_seed(&[7; 32]).public()));
        let at = Route::Direct(SocketAddr::from(([10, 0, 0, 1], 1)));
        let (mut peer, now) = (Peer::new(), Instant::now());
        peer.connected(direct, at, now);
        peer.connected(relayed, through, now);
        assert_eq!(peer.route(), Some(at));
        assert_eq!(peer.needless(now), []);
        let later = now + RELAYED_LINGERS;
        assert_eq!(peer.needless(later), [relayed]);
        assert!(peer.is_relayed(), "until it is closed");
        peer.closed(direct);
        assert_eq!((peer.route(), peer.needless(later)), (Some(through), vec![]));
    }

    #[test]
    fn connections_from_an_address_that_is_lost_are_known() {
        let [first, second] = [1, 2].map(ConnectionId::new_unchecked);
        let (mut peer, now) = (Peer::new(), Instant::now());
        peer.connected(first, Route::Direct(SocketAddr::from(([127, 0, 0, 1], 1))), now);
        let through = Route::Relayed(PeerId(KeyPair::from_seed(&[7; 32]).public()));
        peer.connected(second, through, now);
        assert_eq!(peer.leaving_from([127, 0, 0, 1].into()).collect::<Vec<_>>(), [first]);
        assert_eq!(peer.leaving_from([10, 0, 0, 1].into()).count(), 0);
    }

    #[test]
    fn who_dials_again_from_another_address_has_moved() {
        let [first, second, third, fourth] = [1, 2, 3, 4].map(ConnectionId::new_unchecked);
        let at = |host| Route::Direct(SocketAddr::from(([10, 0, 0, host], 1)));
        let (mut peer, now) = (Peer::new(), Instant::now());
        peer.connected(first, at(1), now);
        peer.connected(second, at(2), now);
        assert_eq!(peer.moved(second), [], "both dialled at once");
        let now = now + 2 * AT_ONCE;
        peer.connected(third, at(2), now);
        assert_eq!(peer.moved(third), [first]);
        assert_eq!(peer.moved(third), []);
        peer.connected(fourth, Route::Relayed(PeerId(KeyPair::from_seed(&[7; 32]).public())), now);
        assert_eq!(peer.moved(fourth), [], "a relay says nothing of where it is");
    }

    #[test]
    fn the_newest_addresses_are_kept() {
        let addr = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let mut peer = Peer::new();
        peer.remember(&[addr(1), addr(2), addr(1)]);
        peer.remember(&[addr(3), addr(2)]);
        assert_eq!(peer.addrs(), [addr(3), addr(2), addr(1)]);
        peer.remember(&(100..200).map(addr).collect::<Vec<_>>());
        assert_eq!(peer.addrs().len(), ADDRESSES_MAX);
        assert_eq!(peer.addrs()[0], addr(100));
    }

    #[test]
    fn what_waits_for_a_peer_is_bounded_in_number_and_time() {
        let budget = Budget::new();
        let mut peer = Peer::new();
        let message = || budget.try_take(vec![1]).unwrap();
        for _ in 0..WAITING_MAX {
            peer.wait(message()).unwrap();
        }
        assert!(peer.wait(message()).is_err());
        assert!(!peer.expire(Instant::now()));
        assert!(peer.expire(Instant::now() + MESSAGE_TIMEOUT));
        assert!(peer.is_idle());
        peer.wait(message()).unwrap();
        assert!(peer.give_up());
        assert!(!peer.give_up());
    }
}
