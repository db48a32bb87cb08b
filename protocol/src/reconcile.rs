//! Range-based set reconciliation over everything that gossip may have lost.
//!
//! One turn with one peer: a question about all our items, its answer, and then the
//! items each lacks. The protocol is negentropy version 1 (crate `negentropy`); items
//! are told apart by BLAKE3 hash, all with timestamp 0.

use core::cell::OnceCell;
use std::collections::BTreeMap;

use negentropy::{Id, Negentropy, NegentropyStorageVector};

use crate::{message::Soft, wire};

/// Longest reconciliation message we make, in bytes.
pub const FRAME_BYTES_MAX: u64 = 256 << 10;

/// An item's id: the BLAKE3 hash of its encoding.
pub type ItemId = [u8; 32];

/// The id of a piece of soft state.
#[must_use]
pub fn item_id(item: &Soft) -> ItemId {
    *blake3::hash(&wire::encode(item)).as_bytes()
}

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

/// What is reconciled, by id. To be changed by its methods only: what follows from the ids is
/// worked out once between two changes, since peers whose sets are alike ask all the time.
#[derive(Debug, Clone, Default)]
pub struct Items {
    items: BTreeMap<ItemId, Soft>,
    storage: OnceCell<Option<NegentropyStorageVector>>,
    query: OnceCell<Option<Vec<u8>>>,
    /// What a peer with the same items answers.
    agreed: OnceCell<Option<Vec<u8>>>,
}

impl Items {
    /// The item with this id.
    #[must_use]
    pub fn get(&self, id: &ItemId) -> Option<&Soft> {
        self.items.get(id)
    }

    /// Take an item in.
    pub fn insert(&mut self, id: ItemId, item: Soft) {
        if self.items.insert(id, item).is_none() {
            self.changed();
        }
    }

    /// Forget an item.
    pub fn remove(&mut self, id: &ItemId) {
        if self.items.remove(id).is_some() {
            self.changed();
        }
    }

    fn changed(&mut self) {
        self.storage.take();
        self.query.take();
        self.agreed.take();
    }

    /// The question that opens a turn.
    #[must_use]
    pub fn ask(&self) -> Option<Vec<u8>> {
        self.query().clone()
    }

    /// The answer to a peer's question; `None` where it is not one.
    #[must_use]
    pub fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        if self.query().as_deref() == Some(query) {
            return self.agreed().clone();
        }
        Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?.reconcile(query).ok()
    }

    /// What a peer's answer says; `None` where it is not one.
    #[must_use]
    pub fn compare(&self, answer: &[u8]) -> Option<Difference> {
        if self.agreed().as_deref() == Some(answer) {
            return Some(Difference::default());
        }
        let mut negentropy = Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?;
        negentropy.set_initiator();
        let (mut have, mut need) = (Vec::new(), Vec::new());
        let next_query = negentropy.reconcile_with_ids(answer, &mut have, &mut need).ok()?;
        let bytes = |ids: Vec<Id>| ids.into_iter().map(|id| *id).collect();
        Some(Difference { have: bytes(have), need: bytes(need), next_query })
    }

    fn query(&self) -> &Option<Vec<u8>> {
        self.query.get_or_init(|| {
            Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?.initiate().ok()
        })
    }

    fn agreed(&self) -> &Option<Vec<u8>> {
        self.agreed.get_or_init(|| {
            let query = self.query().as_deref()?;
            Negentropy::borrowed(self.storage()?, FRAME_BYTES_MAX).ok()?.reconcile(query).ok()
        })
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
            |n: u32| Soft::Head(SignedBytes::sign(&key, Domain::Head, n.to_be_bytes().to_vec()));
        let mut items = Items::default();
        for item in range.map(item) {
            items.insert(item_id(&item), item);
        }
        items
    }

    #[test]
    fn two_peers_learn_exactly_what_each_lacks() {
        let (ours, theirs) = (items(0..300), items(20..310));
        let mut query = ours.ask();
        let (mut have, mut need) = (Vec::new(), Vec::new());
        while let Some(question) = query {
            let answer = theirs.answer(&question).unwrap();
            let difference = ours.compare(&answer).unwrap();
            have.extend(difference.have);
            need.extend(difference.need);
            query = difference.next_query;
        }
        assert_eq!((have.len(), need.len()), (20, 10));
        assert!(have.iter().all(|id| ours.get(id).is_some() && theirs.get(id).is_none()));
        assert!(need.iter().all(|id| theirs.get(id).is_some() && ours.get(id).is_none()));
    }

    #[test]
    fn peers_that_have_the_same_learn_so_also_after_changes() {
        let (mut ours, mut theirs) = (items(0..50), items(0..50));
        let same = |ours: &Items, theirs: &Items| {
            let answer = theirs.answer(&ours.ask().unwrap()).unwrap();
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
    fn nonsense_is_refused_without_harm() {
        let ours = items(0..5);
        for length in 0..200_usize {
            let nonsense: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
            let _ = ours.answer(&nonsense);
            let _ = ours.compare(&nonsense);
        }
    }
}
