//! What is stored about a peer.

use std::net::SocketAddr;

use p2pit_protocol::wire::decode_limited;
use serde::{Deserialize, Serialize};

/// Where a peer was found last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerEntry {
    /// Of its control plane, the most promising first.
    pub control: Vec<SocketAddr>,
    /// Of its data plane, the most promising first.
    pub data: Vec<SocketAddr>,
    pub last_seen_wall_ms: u64,
}

/// Addresses kept per peer and plane.
pub const ADDRESSES_MAX: usize = 16;

/// Both lists full of IPv6 addresses, with room to spare.
const ENTRY_BYTES_MAX: usize = 4096;

impl PeerEntry {
    pub(super) fn bounded(&self) -> Self {
        let first = |addresses: &[SocketAddr]| -> Vec<SocketAddr> {
            addresses.iter().take(ADDRESSES_MAX).copied().collect()
        };
        Self { control: first(&self.control), data: first(&self.data), ..*self }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        decode_limited::<Self, ENTRY_BYTES_MAX>(bytes).ok()
    }

    /// Whether only the time differs.
    pub(super) fn same_place(&self, other: &Self) -> bool {
        let other = other.bounded();
        self.control == other.control && self.data == other.data
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::wire::encode;

    use super::*;

    #[test]
    fn the_stored_form_is_pinned() {
        let entry = PeerEntry {
            control: vec!["10.0.0.7:4001".parse().unwrap()],
            data: vec!["[::1]:4002".parse().unwrap()],
            last_seen_wall_ms: 1_700_000_000_000,
        };
        let bytes = encode(&entry);
        assert_eq!(
            data_encoding::HEXLOWER.encode(&bytes),
            "01000a000007fba10f010100000000000000000000000000000001fba20ffd0068e5cf8b010000"
        );
        assert_eq!(PeerEntry::decode(&bytes), Some(entry));
    }

    #[test]
    fn the_largest_entry_fits_and_longer_lists_are_cut() {
        let many = vec!["[2001:db8::ffff]:65535".parse().unwrap(); ADDRESSES_MAX + 5];
        let entry = PeerEntry { control: many.clone(), data: many, last_seen_wall_ms: u64::MAX };
        let stored = PeerEntry::decode(&encode(&entry.bounded())).unwrap();
        assert_eq!(stored.control.len(), ADDRESSES_MAX);
        assert!(stored.same_place(&entry));
    }
}
