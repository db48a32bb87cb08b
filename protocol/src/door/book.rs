//! What the door remembers of those it refused.

use std::collections::BTreeMap;

use super::{Hello, Refusal, RefusalCode, Reply, judge};
use crate::{
    identity::{KeyPair, PeerId, SignedBytes},
    roster::{DeviceId, Roster},
    time::Now,
    wire,
};

/// For how long a refusal is remembered.
pub const REFUSAL_MS: u64 = 60_000;

/// How many peers' refusals are remembered; the one that ends first makes room.
pub const REFUSED_PEERS_MAX: usize = 1024;

/// How many different requests of one peer are refused on their merits within
/// [`REFUSAL_MS`]. More than one, so that a person who took the wrong ticket need not
/// wait a minute with the right one in hand.
pub const REFUSALS_PER_PEER_MAX: usize = 4;

/// Answers a request that was refused a moment ago without judging it again.
#[derive(Debug, Clone, Default)]
pub struct DoorBook {
    peers: BTreeMap<PeerId, Vec<Remembered>>,
}

#[derive(Debug, Clone)]
struct Remembered {
    /// Hash of what was asked.
    asked: [u8; 32],
    refusal: Refusal,
    until_boot_ms: u64,
}

impl DoorBook {
    /// A book with no entry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`judge`], but from memory where the same was refused within [`REFUSAL_MS`].
    pub fn judge(
        &mut self,
        roster: &mut Roster,
        me: &KeyPair,
        device: DeviceId,
        from: PeerId,
        hello: Hello,
        now: Now,
    ) -> (Reply, Vec<SignedBytes>) {
        let asked = fingerprint(&hello);
        if let Some(refusal) = self.recall(from, asked, now) {
            return (Reply::Refused(refusal), Vec::new());
        }
        let (reply, added) = judge(roster, me, device, from, hello, now);
        match &reply {
            Reply::Refused(refusal) => self.note(from, asked, refusal.clone(), now),
            Reply::Welcome(_) | Reply::Reconciled(_) => {
                self.peers.remove(&from);
            }
        }
        (reply, added)
    }

    /// How many peers are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether nobody is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    fn recall(&mut self, from: PeerId, asked: [u8; 32], now: Now) -> Option<Refusal> {
        let remembered = self.peers.get_mut(&from)?;
        remembered.retain(|r| r.until_boot_ms > now.boot_ms);
        if let Some(known) = remembered.iter().find(|r| r.asked == asked) {
            let mut refusal = known.refusal.clone();
            refusal.retry_after_ms = Some(known.until_boot_ms - now.boot_ms);
            return Some(refusal);
        }
        if remembered.len() < REFUSALS_PER_PEER_MAX {
            return None;
        }
        let until_boot_ms = remembered.iter().map(|r| r.until_boot_ms).min()?;
        let wait_ms = until_boot_ms - now.boot_ms;
        Some(Refusal {
            code: RefusalCode::TooMany,
            message: format!(
                "refused {REFUSALS_PER_PEER_MAX} times within a minute: try again in {} s",
                wait_ms.div_ceil(1000)
            ),
            retry_after_ms: Some(wait_ms),
        })
    }

    fn note(&mut self, from: PeerId, asked: [u8; 32], refusal: Refusal, now: Now) {
        if self.peers.len() >= REFUSED_PEERS_MAX && !self.peers.contains_key(&from) {
            self.make_room(now);
        }
        let until_boot_ms = now.after(REFUSAL_MS);
        self.peers.entry(from).or_default().push(Remembered { asked, refusal, until_boot_ms });
    }

    fn make_room(&mut self, now: Now) {
        let end = |remembered: &Vec<Remembered>| {
            remembered.iter().map(|r| r.until_boot_ms).max().unwrap_or(0)
        };
        self.peers.retain(|_, remembered| end(remembered) > now.boot_ms);
        if self.peers.len() >= REFUSED_PEERS_MAX {
            let first = self.peers.iter().min_by_key(|(_, r)| end(r)).map(|(&peer, _)| peer);
            first.and_then(|peer| self.peers.remove(&peer));
        }
    }
}

/// What is asked, whatever the clock and the run of the daemon that asks.
fn fingerprint(hello: &Hello) -> [u8; 32] {
    *blake3::hash(&wire::encode(&(hello.versions, hello.pool, &hello.purpose))).as_bytes()
}
