//! Reservations at members that pass on for this node.

use std::collections::BTreeMap;

use libp2p::{Swarm, core::transport::ListenerId};
use p2pit_protocol::PeerId;
use tracing::{debug, info};

use super::{Relay, address, behaviour::Behaviour};
use crate::transfer::endpoint::to_libp2p;

/// A reservation is a listener of the swarm: it has an address once the relay granted it, and
/// ends with the connection to the relay.
#[derive(Default)]
pub(super) struct Reservations {
    wanted: Vec<Relay>,
    listeners: BTreeMap<PeerId, Reservation>,
}

struct Reservation {
    id: ListenerId,
    granted: bool,
}

impl Reservations {
    /// Lets go of those that are not wanted any more.
    pub(super) fn want(&mut self, swarm: &mut Swarm<Behaviour>, relays: Vec<Relay>) {
        let is_wanted = |node: &PeerId| relays.iter().any(|relay| relay.node == *node);
        for (node, reservation) in &self.listeners {
            if !is_wanted(node) {
                swarm.remove_listener(reservation.id);
            }
        }
        self.wanted = relays;
        self.keep(swarm);
    }

    /// Asks for those that are wanted and neither there nor asked for, of relays that are
    /// connected.
    pub(super) fn keep(&mut self, swarm: &mut Swarm<Behaviour>) {
        for Relay { node, addrs } in &self.wanted {
            let id = to_libp2p(*node);
            if self.listeners.contains_key(node) || !swarm.is_connected(&id) {
                continue;
            }
            let Some(addr) = addrs.first() else { continue };
            match swarm.listen_on(address::circuit(id, address::quic(*addr), None)) {
                Ok(id) => {
                    self.listeners.insert(*node, Reservation { id, granted: false });
                }
                Err(error) => debug!(relay = %node, %error, "no reservation"),
            }
        }
    }

    /// Whether a listener is one of these, which the relay has granted now.
    pub(super) fn granted(&mut self, id: ListenerId) -> bool {
        let found = self.listeners.iter_mut().find(|(_, reservation)| reservation.id == id);
        let Some((relay, reservation)) = found else { return false };
        if !reservation.granted {
            info!(%relay, "passes on for this node");
        }
        reservation.granted = true;
        true
    }

    /// Whether a listener was one of these, and has ended.
    pub(super) fn ended(&mut self, id: ListenerId) -> bool {
        let before = self.listeners.len();
        self.listeners.retain(|_, reservation| reservation.id != id);
        self.listeners.len() < before
    }

    pub(super) fn all_granted(&self) -> Vec<PeerId> {
        let granted = self.listeners.iter().filter(|(_, reservation)| reservation.granted);
        granted.map(|(relay, _)| *relay).collect()
    }

    pub(super) fn is_at(&self, node: PeerId) -> bool {
        self.listeners.contains_key(&node)
    }
}
