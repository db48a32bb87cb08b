//! Whose turn it is to be reconciled with: one peer at a time.
//!
//! In a turn a node fetches what a peer has and it lacks; the peer does the same in a turn of
//! its own. Whoever starts, or comes back from a cut, meets many peers at once, all with the
//! same news: asked together, each would send all of it.

use std::collections::{BTreeSet, VecDeque};

use crate::{Now, PeerId, reconcile::ItemId};

/// How long a turn may take before the next peer is asked.
pub(super) const TURN_MS: u64 = 1_000;
/// How often a peer is asked that does not answer: its first connection may fall at once.
const TRIES_MAX: u8 = 3;
/// Most peers that wait for their turn; any others are met in the regular ones.
const WAITING_MAX: usize = 64;

/// The turn that is on, and who comes after it.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns {
    current: Option<Turn>,
    /// Who waits, and how often it was asked already.
    waiting: VecDeque<(PeerId, u8)>,
}

#[derive(Debug, Clone)]
struct Turn {
    peer: PeerId,
    until_ms: u64,
    tries: u8,
    /// What the peer was asked for and has not sent yet.
    lacking: BTreeSet<ItemId>,
    /// The peer's last answer is outstanding.
    asked: bool,
}

impl Turns {
    /// Let `peer` have a turn when those before it had theirs.
    pub(super) fn enqueue(&mut self, peer: PeerId) {
        self.push(peer, 0);
    }

    fn push(&mut self, peer: PeerId, tries: u8) {
        let waits = self.waiting.iter().any(|(waiting, _)| *waiting == peer);
        if !waits && tries < TRIES_MAX && self.waiting.len() < WAITING_MAX {
            self.waiting.push_back((peer, tries));
        }
    }

    /// Who is to be asked now, if somebody is; its turn begins. `stands` says whether there is
    /// a connection to a peer.
    pub(super) fn next(&mut self, stands: impl Fn(PeerId) -> bool, now: Now) -> Option<PeerId> {
        if self.current.as_ref().is_some_and(|turn| now.boot_ms < turn.until_ms) {
            return None;
        }
        if let Some(Turn { peer, tries, .. }) = self.current.take() {
            self.push(peer, tries);
        }
        while let Some((peer, tries)) = self.waiting.pop_front() {
            if stands(peer) {
                let until_ms = now.after(TURN_MS);
                let lacking = BTreeSet::new();
                let tries = tries + 1;
                self.current = Some(Turn { peer, until_ms, tries, lacking, asked: true });
                return Some(peer);
            }
        }
        None
    }

    /// `peer` answered: we lack `need`, and whether there is a further question to it. Whether
    /// this was its turn, and is its end.
    pub(super) fn answered(&mut self, peer: PeerId, need: &[ItemId], further: bool) -> bool {
        let Some(turn) = self.current.as_mut().filter(|turn| turn.peer == peer) else {
            return false;
        };
        turn.lacking.extend(need);
        turn.asked = further;
        self.ends()
    }

    /// An item arrived, from whomever. Whether this ended the turn.
    pub(super) fn arrived(&mut self, item: &ItemId) -> bool {
        let lacked = self.current.as_mut().is_some_and(|turn| turn.lacking.remove(item));
        lacked && self.ends()
    }

    fn ends(&mut self) -> bool {
        let over = |turn: &Turn| !turn.asked && turn.lacking.is_empty();
        let ends = self.current.as_ref().is_some_and(over);
        if ends {
            self.current = None;
        }
        ends
    }

    /// When the turn that is on is given up (boot clock).
    pub(super) fn due_ms(&self) -> Option<u64> {
        self.current.as_ref().map(|turn| turn.until_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::KeyPair;

    fn peer(n: u8) -> PeerId {
        PeerId(KeyPair::from_seed(&[n; 32]).public())
    }

    fn at(boot_ms: u64) -> Now {
        Now { boot_ms, wall_ms: boot_ms }
    }

    #[test]
    fn peers_are_asked_one_after_another() {
        let mut turns = Turns::default();
        for n in [1, 2, 1, 3] {
            turns.enqueue(peer(n));
        }
        let stands = |id| id != peer(2);
        assert_eq!(turns.next(stands, at(0)), Some(peer(1)));
        assert_eq!(turns.next(stands, at(1)), None, "its turn is on");

        assert!(!turns.answered(peer(3), &[], false), "not its turn");
        assert!(!turns.answered(peer(1), &[[1; 32]], true));
        assert!(!turns.arrived(&[1; 32]), "there was a further question");
        assert!(!turns.answered(peer(1), &[[2; 32], [3; 32]], false));
        assert!(!turns.arrived(&[2; 32]) && !turns.arrived(&[2; 32]));
        assert!(turns.arrived(&[3; 32]));
        assert_eq!(turns.next(stands, at(2)), Some(peer(3)), "2 is not connected");
        assert_eq!(turns.next(stands, at(3)), None);
    }

    #[test]
    fn a_peer_that_does_not_answer_loses_its_turn() {
        let mut turns = Turns::default();
        turns.enqueue(peer(1));
        assert_eq!(turns.next(|_| true, at(0)), Some(peer(1)));
        assert_eq!(turns.due_ms(), Some(TURN_MS));
        turns.enqueue(peer(2));
        assert_eq!(turns.next(|_| true, at(TURN_MS - 1)), None);
        assert_eq!(turns.next(|_| true, at(TURN_MS)), Some(peer(2)));
        assert!(!turns.answered(peer(1), &[], false), "too late to end another's turn");
        assert!(turns.answered(peer(2), &[], false));

        // It is asked again, but not for ever.
        assert_eq!(turns.next(|_| true, at(2 * TURN_MS)), Some(peer(1)));
        assert_eq!(turns.next(|_| true, at(3 * TURN_MS)), Some(peer(1)));
        assert_eq!(turns.next(|_| true, at(4 * TURN_MS)), None);
        assert_eq!(turns.due_ms(), None);
    }
}
