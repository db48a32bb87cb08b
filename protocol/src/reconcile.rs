//! Range-based set reconciliation over everything that gossip may have lost.
//!
//! One turn with one peer: a question about all our items, its answer, and then the
//! items we lack; what the peer lacks it fetches in a turn of its own. The protocol is negentropy version 1 (crate `negentropy`); items
//! are told apart by BLAKE3 hash, all with timestamp 0.

use core::cell::OnceCell;
use std::collections::BTreeMap;

use negentropy::{Id, Negentropy, NegentropyStorageVector};
use serde::{Deserialize, Serialize};

use crate::message::Soft;

/// Longest reconciliation message we make, in bytes.
pub const FRAME_BYTES_MAX: u64 = 256 << 10;

/// An item's id: the BLAKE3 hash of its encoding.
pub type ItemId = [u8; 32];

/// What one answer taught us.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Items we have and the peer lacks.
    pub have: Vec<ItemId>,
    /// Items the peer has and we lack.
    pub need: Vec<ItemId>,
    /// The next question, where one frame was not enough.
    pub next_query: Option<Vec<u8>>,
}

/// Tells sets apart at once: the sum of their ids as numbers, lowest byte first, modulo 2²⁵⁶.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum([u8; 32]);

impl Sum {
    fn add(&mut self, id: &ItemId) {
        self.each(id, |a, b, carry| {
            let (sum, first) = a.overflowing_add(b);
            let (sum, second) = sum.overflowing_add(u8::from(carry));
            (sum, first || second)
        });
    }

    fn subtract(&mut self, id: &ItemId) {
        self.each(id, |a, b, borrow| {
            let (rest, first) = a.overflowing_sub(b);
            let (rest, second) = rest.overflowing_sub(u8::from(borrow));
            (rest, first || second)
        });
    }

    fn each(&mut self, id: &ItemId, step: impl Fn(u8, u8, bool) -> (u8, bool)) {
        let mut over = false;
        for (ours, theirs) in self.0.iter_mut().zip(id) {
            (*ours, over) = step(*ours, *theirs, over);
        }
    }
}

/// What is reconciled, by id. To be changed by its methods only: what follows from the ids is
/// worked out once between two changes.
#[derive(Debug, Clone, Default)]
pub struct Items {
    items: BTreeMap<ItemId, Soft>,
    sum: Sum,
    storage: OnceCell<Option<NegentropyStorageVector>>,
    query: OnceCell<Option<Vec<u8>>>,
}

impl Items {
    /// The item with this id.
    #[must_use]
    pub fn get(&self, id: &ItemId) -> Option<&Soft> {
        self.items.get(id)
    }

    /// Take an item in.
    pub fn insert(&mut self, item: Soft) {
        let id = item.id();
        if self.items.insert(id, item).is_none() {
            self.sum.add(&id);
            self.changed();
        }
    }

    /// Forget an item.
    pub fn remove(&mut self, id: &ItemId) {
        if self.items.remove(id).is_some() {
            self.sum.subtract(id);
            self.changed();
        }
    }

    fn changed(&mut self) {
        self.storage.take();
        self.query.take();
    }

    /// Which set this is.
    #[must_use]
    pub fn sum(&self) -> Sum {
        self.sum
    }

    /// The question that opens a turn.
    #[must_use]
    pub fn ask(&self) -> Option<Vec<u8>> {
        let initiate =
            || Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?.initiate().ok();
        self.query.get_or_init(initiate).clone()
    }

    /// The answer to the question of a peer whose set is `sum`, which is empty where the sets
    /// are alike; `None` where it is not a question.
    #[must_use]
    pub fn answer(&self, sum: Sum, query: &[u8]) -> Option<Vec<u8>> {
        if sum == self.sum {
            return Some(Vec::new());
        }
        Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?.reconcile(query).ok()
    }

    /// What a peer's answer says; `None` where it is not one.
    #[must_use]
    pub fn compare(&self, answer: &[u8]) -> Option<Difference> {
        if answer.is_empty() {
            return Some(Difference::default());
        }
        let mut negentropy = Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?;
        negentropy.set_initiator();
        let (mut have, mut need) = (Vec::new(), Vec::new());
        let next_query = negentropy.reconcile_with_ids(answer, &mut have, &mut need).ok()?;
        let bytes = |ids: Vec<Id>| ids.into_iter().map(|id| *id).collect();
        Some(Difference { have: bytes(have), need: bytes(need), next_query })
    }

    fn storage(&self) -> Option<&NegentropyStorageVector> {
        let storage = self.storage.get_or_init(|| {
            let mut storage = NegentropyStorageVector::with_capacity(self.items.len());
            for id in self.items.keys() {
                storage.insert(0, Id::from_byte_array(*id)).ok()?;
            }
            storage.seal().ok()?;
            Some(storage)
        });
        storage.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Domain, KeyPair, SignedBytes};

    fn items(range: core::ops::Range<u32>) -> Items {
        let key = KeyPair::from_seed(&[1; 32]);
        let item =
            |n: u32| Soft::head(SignedBytes::sign(&key, Domain::Head, n.to_be_bytes().to_vec()));
        let mut items = Items::default();
        for item in range.map(item) {
            items.insert(item);
        }
        items
    }

    #[test]
    fn a_peer_learns_exactly_what_it_lacks() {
        let (ours, theirs) = (items(0..300), items(20..310));
        let mut query = ours.ask();
        let (mut have, mut need) = (Vec::new(), Vec::new());
        while let Some(question) = query {
            let answer = theirs.answer(ours.sum(), &question).unwrap();
            let difference = ours.compare(&answer).unwrap();
            have.extend(difference.have);
            need.extend(difference.need);
            query = difference.next_query;
        }
        assert_eq!((have.len(), need.len()), (20, 10));
        assert!(need.iter().all(|id| theirs.get(id).is_some() && ours.get(id).is_none()));
    }

    #[test]
    fn peers_that_have_the_same_learn_so_also_after_changes() {
        let (mut ours, mut theirs) = (items(0..50), items(0..50));
        let same = |ours: &Items, theirs: &Items| {
            let answer = theirs.answer(ours.sum(), &ours.ask().unwrap()).unwrap();
            ours.compare(&answer).unwrap() == Difference::default()
        };
        assert!(same(&ours, &theirs));
        let id = *items(7..8).items.keys().next().unwrap();
        ours.remove(&id);
        assert!(!same(&ours, &theirs) && !same(&theirs, &ours));
        theirs.remove(&id);
        assert!(same(&ours, &theirs) && same(&theirs, &ours));
    }

    #[test]
    fn a_sum_is_that_of_numbers_of_32_bytes() {
        let (mut one, mut most) = ([0; 32], [255; 32]);
        one[0] = 1;
        let mut sum = Sum::default();
        sum.add(&most);
        sum.add(&one);
        assert_eq!(sum, Sum::default(), "modulo 2^256");
        sum.subtract(&one);
        assert_eq!(sum, Sum(most));
        most[0] = 0;
        sum.subtract(&most);
        assert_eq!(sum.0[..2], [255, 0]);
        // In whatever order they came and went.
        let (mut ours, theirs) = (items(0..50), items(10..50));
        for item in items(0..10).items.keys() {
            ours.remove(item);
        }
        assert_eq!(ours.sum(), theirs.sum());
        assert_ne!(ours.sum(), items(10..49).sum());
    }

    #[test]
    fn nonsense_is_refused_without_harm() {
        let ours = items(0..5);
        for length in 0..200_usize {
            let nonsense: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
            let _ = ours.answer(Sum::default(), &nonsense);
            let _ = ours.compare(&nonsense);
        }
    }
}
