//! Where nodes are, on its way into the index.
//!
//! The index is a database on a disk, which may take its time. Whoever learns of an address
//! only leaves it here, the core among them; one task writes, of each node the newest.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, Mutex},
};

use p2pit_protocol::PeerId;
use tokio::sync::Notify;
use tracing::warn;

use super::{Shared, lock};
use crate::store::{PEERS_MAX, PeerEntry, Store};

/// What waits to be written.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    waiting: Mutex<BTreeMap<PeerId, Address>>,
    /// Held by whoever writes, so that nothing older overtakes.
    writing: Mutex<()>,
    changed: Notify,
}

#[derive(Debug)]
struct Address {
    entry: PeerEntry,
    /// As it goes on the board, where it came with an advert.
    advert: Option<Vec<u8>>,
}

impl Addresses {
    /// Returns at once. Of a node only the newest is kept; of more new nodes than the index
    /// takes the last are left out, and heard of again.
    pub(crate) fn put(&self, node: PeerId, entry: PeerEntry, advert: Option<Vec<u8>>) {
        let mut waiting = lock(&self.waiting);
        let is_full = waiting.len() >= PEERS_MAX;
        match waiting.entry(node) {
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.entry = entry;
                if advert.is_some() {
                    known.advert = advert;
                }
            }
            Entry::Vacant(free) if !is_full => {
                free.insert(Address { entry, advert });
            }
            Entry::Vacant(_) => {}
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Writes all that waits. Blocks for as long as the disk does.
    pub(super) fn write(&self, index: &Store) {
        let _writing = lock(&self.writing);
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        for (node, Address { entry, advert }) in waiting {
            let kept = index.put_peer(&node, &entry).and_then(|()| match advert {
                Some(advert) => index.put_board(&node, &advert),
                None => Ok(()),
            });
            if let Err(reason) = kept {
                warn!(%node, %reason, "addresses are not remembered");
            }
        }
    }
}

/// Writes whatever comes, for as long as the daemon runs.
pub(super) async fn keep_writing(shared: Arc<Shared>) {
    loop {
        shared.addresses.changed.notified().await;
        let writer = Arc::clone(&shared);
        let written = tokio::task::spawn_blocking(move || writer.addresses.write(&writer.index));
        if let Err(reason) = written.await {
            warn!(%reason, "addresses are not remembered");
        }
        // It looks into the index for whom to reach.
        shared.reach_changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::PublicKey;

    use super::*;

    fn node(n: u32) -> PeerId {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        PeerId(PublicKey(key))
    }

    fn entry(port: u16) -> PeerEntry {
        let data = vec![([127, 0, 0, 1], port).into()];
        PeerEntry { control: Vec::new(), data, last_seen_wall_ms: u64::from(port) }
    }

    #[test]
    fn of_each_node_the_newest_is_written_and_nobody_waits_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let index = Store::open(&dir.path().join("index")).unwrap();
        let addresses = Addresses::default();
        {
            // As while the disk takes its time.
            let _writing = lock(&addresses.writing);
            addresses.put(node(1), entry(1), Some(b"old".to_vec()));
            addresses.put(node(2), entry(5), None);
            addresses.put(node(1), entry(2), Some(b"new".to_vec()));
            // A hint says nothing of the board.
            addresses.put(node(1), entry(3), None);
        }
        assert_eq!(index.peers().unwrap(), []);
        addresses.write(&index);
        assert_eq!(index.peers().unwrap(), [(node(2), entry(5)), (node(1), entry(3))]);
        assert_eq!(index.board().unwrap(), [(node(1), b"new".to_vec())]);
        assert!(lock(&addresses.waiting).is_empty());
    }

    #[test]
    fn what_waits_is_bounded_by_what_the_index_takes() {
        let addresses = Addresses::default();
        for n in 0..=u32::try_from(PEERS_MAX).unwrap() {
            addresses.put(node(n), entry(1), None);
        }
        addresses.put(node(0), entry(2), None);
        let waiting = lock(&addresses.waiting);
        assert_eq!(waiting.len(), PEERS_MAX);
        assert_eq!(waiting[&node(0)].entry, entry(2));
    }
}
