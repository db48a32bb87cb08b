//! What is kept of one peer: where it may be, its connections, and what waits for it.

use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
};

use libp2p::swarm::ConnectionId;
use tokio::time::Instant;

use super::{ADDRESSES_MAX, Payload, behaviour::MESSAGE_TIMEOUT};

/// Messages that wait for one peer; beyond them, more are undeliverable.
pub(super) const WAITING_MAX: usize = 1_024;

pub(super) struct Peer {
    addrs: Vec<SocketAddr>,
    /// The newest last.
    links: Vec<Link>,
    waiting: VecDeque<(Payload, Instant)>,
    pub(super) in_flight: usize,
    /// When a message last came or went.
    pub(super) used: Instant,
}

struct Link {
    id: ConnectionId,
    addr: SocketAddr,
    /// Which start of the peer is at the other end; known a moment after the connection.
    boot: Option<u64>,
}

impl Peer {
    pub(super) fn new() -> Self {
        Self {
            addrs: Vec::new(),
            links: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: 0,
            used: Instant::now(),
        }
    }

    pub(super) fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// The newest first; the oldest are forgotten.
    pub(super) fn remember(&mut self, newest: &[SocketAddr]) {
        let mut seen = BTreeSet::new();
        let all = newest.iter().chain(&self.addrs);
        self.addrs = all.copied().filter(|addr| seen.insert(*addr)).take(ADDRESSES_MAX).collect();
    }

    pub(super) fn connected(&mut self, id: ConnectionId, addr: SocketAddr) {
        self.used = Instant::now();
        self.links.push(Link { id, addr, boot: None });
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
    pub(super) fn only_link(&self, id: ConnectionId) -> Option<SocketAddr> {
        match self.links.as_slice() {
            [link] if link.id == id => Some(link.addr),
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
    use crate::network::Budget;

    #[test]
    fn a_restart_leaves_only_the_connections_that_came_before_it_dead() {
        let [first, second, third] = [1, 2, 3].map(ConnectionId::new_unchecked);
        let addr = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let mut peer = Peer::new();
        peer.connected(first, addr(1));
        assert_eq!(peer.only_link(first), Some(addr(1)));
        peer.connected(second, addr(2));
        assert_eq!(peer.booted(first, 7), []);
        assert_eq!(peer.booted(second, 7), []);
        peer.connected(third, addr(3));
        assert_eq!(peer.only_link(third), None);
        assert_eq!(peer.booted(third, 8), [first, second]);
        assert_eq!(peer.only_link(third), Some(addr(3)));
        // It is said again from time to time.
        assert_eq!(peer.booted(third, 8), []);
        assert_eq!(peer.booted(first, 7), []);
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
