//! The board: what a node last heard of every other. Soft state, never authority.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    JobId, Now, PeerId,
    inventory::Capacity,
    message::{Advert, GpuState, Soft, Wanted},
    request::fit_many,
};

/// How long an advert is believed.
pub const ADVERT_MS: u64 = 30 * 60_000;
/// How far two wall clocks may differ before adverts are not believed.
pub const CLOCK_TOLERANCE_MS: u64 = 120_000;
/// Most adverts kept: the largest pool we aim at.
pub const ADVERTS_MAX: usize = 10_000;
/// Longest advert, in bytes.
pub const ADVERT_BYTES_MAX: usize = 32 << 10;
/// How long a peer that could not be reached is left out.
pub const UNREACHABLE_MS: u64 = 30_000;

/// An advert that was believed.
#[derive(Debug, Clone)]
pub struct Posted {
    /// What the node said.
    pub advert: Arc<Advert>,
    /// As it signed it.
    pub item: Soft,
}

/// Adverts by node.
#[derive(Debug, Clone, Default)]
pub struct Board {
    posted: BTreeMap<PeerId, Posted>,
    connected: BTreeSet<PeerId>,
    unreachable: BTreeMap<PeerId, u64>,
}

impl Board {
    /// Take an advert. Whether it is news; `None` where it is not to be believed.
    pub fn post(&mut self, item: Soft, now: Now) -> Option<bool> {
        if item.signed().bytes.len() > ADVERT_BYTES_MAX {
            return None;
        }
        let advert = Arc::clone(item.verified_advert()?);
        let expired = advert.issued_at_ms.saturating_add(ADVERT_MS) < now.wall_ms;
        let future = advert.issued_at_ms > now.wall_ms.saturating_add(CLOCK_TOLERANCE_MS);
        if expired || future {
            return None;
        }
        if let Some(old) = self.posted.get(&advert.node).map(|old| &old.advert) {
            let order = |advert: &Advert| (advert.boot_count, advert.seq);
            // A node that lost its disk counts its starts anew, in another store.
            let later = if old.store == advert.store {
                order(&advert) > order(old)
            } else {
                advert.issued_at_ms > old.issued_at_ms
            };
            if !later {
                return Some(false);
            }
        }
        if self.posted.len() >= ADVERTS_MAX && !self.posted.contains_key(&advert.node) {
            return None;
        }
        self.posted.insert(advert.node, Posted { advert, item });
        Some(true)
    }

    /// Forget adverts that expired, and nodes `keep` says no to.
    pub fn expire(&mut self, now: Now, keep: impl Fn(PeerId) -> bool) {
        self.posted.retain(|node, posted| {
            posted.advert.issued_at_ms.saturating_add(ADVERT_MS) >= now.wall_ms && keep(*node)
        });
        self.unreachable.retain(|_, until_ms| *until_ms > now.boot_ms);
    }

    /// A connection to `peer` stands, or fell.
    pub fn set_connected(&mut self, peer: PeerId, connected: bool) {
        if connected {
            self.connected.insert(peer);
            self.unreachable.remove(&peer);
        } else {
            self.connected.remove(&peer);
        }
    }

    /// A message to `peer` could not be delivered.
    pub fn set_unreachable(&mut self, peer: PeerId, now: Now) {
        if !self.connected.contains(&peer) {
            self.unreachable.insert(peer, now.after(UNREACHABLE_MS));
        }
    }

    /// Peers a connection stands to.
    pub fn connected(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.connected.iter().copied()
    }

    /// Whether a connection to `peer` stands.
    #[must_use]
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.connected.contains(&peer)
    }

    /// Whether `peer` could not be reached a short while ago.
    #[must_use]
    pub fn is_unreachable(&self, peer: PeerId, now: Now) -> bool {
        self.unreachable.get(&peer).is_some_and(|until_ms| *until_ms > now.boot_ms)
    }

    /// The advert of `node`.
    #[must_use]
    pub fn get(&self, node: PeerId) -> Option<&Posted> {
        self.posted.get(&node)
    }

    /// Every advert, by node.
    pub fn iter(&self) -> impl Iterator<Item = (&PeerId, &Posted)> {
        self.posted.iter()
    }

    /// What the nodes have, in use or not; also what those have that offer nothing now.
    #[must_use]
    pub fn capacities(&self) -> Vec<Capacity> {
        self.posted.values().map(|posted| posted.advert.capacity.clone()).collect()
    }

    /// Nodes that have what at least one of the wanted processes needs, those with room
    /// first and those whose disks are full last, then in an order of the job's own, so that jobs spread.
    #[must_use]
    pub fn candidates(&self, job: JobId, wanted: &[Wanted], now: Now) -> Vec<PeerId> {
        let wanted: Vec<_> = wanted.iter().map(|w| (w.group, w.count, &w.process)).collect();
        let mut ranked = Vec::new();
        for (node, posted) in &self.posted {
            if posted.advert.client || self.is_unreachable(*node, now) {
                continue;
            }
            if fit_many(&wanted, &posted.advert.capacity).is_empty() {
                continue;
            }
            let fits_now = fit_many(&wanted, &free_of(&posted.advert)).len();
            let order = blake3::hash(&[&job.0[..], &node.0.0[..]].concat());
            ranked.push((posted.advert.full, usize::MAX - fits_now, *order.as_bytes(), *node));
        }
        ranked.sort_unstable();
        ranked.into_iter().map(|(.., node)| node).collect()
    }
}

/// What an advert says is free.
#[must_use]
pub fn free_of(advert: &Advert) -> Capacity {
    let taken = |gpu: &crate::inventory::Gpu| {
        advert.not_free.iter().any(|(uuid, state)| *uuid == gpu.uuid && *state != GpuState::Free)
    };
    Capacity {
        gpus: advert.capacity.gpus.iter().filter(|gpu| !taken(gpu)).cloned().collect(),
        cpu_cores: advert.free_cpu_cores.min(advert.capacity.cpu_cores),
        ram_mib: advert.free_ram_mib.min(advert.capacity.ram_mib),
    }
}
