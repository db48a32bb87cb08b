//! Range-based set reconciliation over everything that gossip may have lost.
//!
//! One turn with one peer: a question about all our items, its answer, and then the
//! items each lacks. The protocol is negentropy version 1 (crate `negentropy`); items
//! are told apart by BLAKE3 hash, all with timestamp 0.

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

/// The question that opens a turn.
#[must_use]
pub fn ask(items: &BTreeMap<ItemId, Soft>) -> Option<Vec<u8>> {
    let storage = storage(items)?;
    Negentropy::owned(storage, FRAME_BYTES_MAX).ok()?.initiate().ok()
}

/// The answer to a peer's question; `None` where it is not one.
#[must_use]
pub fn answer(items: &BTreeMap<ItemId, Soft>, query: &[u8]) -> Option<Vec<u8>> {
    let storage = storage(items)?;
    Negentropy::owned(storage, FRAME_BYTES_MAX).ok()?.reconcile(query).ok()
}

/// What a peer's answer says; `None` where it is not one.
#[must_use]
pub fn compare(items: &BTreeMap<ItemId, Soft>, answer: &[u8]) -> Option<Difference> {
    let mut negentropy = Negentropy::owned(storage(items)?, FRAME_BYTES_MAX).ok()?;
    negentropy.set_initiator();
    let (mut have, mut need) = (Vec::new(), Vec::new());
    let next_query = negentropy.reconcile_with_ids(answer, &mut have, &mut need).ok()?;
    let bytes = |ids: Vec<Id>| ids.into_iter().map(|id| *id).collect();
    Some(Difference { have: bytes(have), need: bytes(need), next_query })
}

fn storage(items: &BTreeMap<ItemId, Soft>) -> Option<NegentropyStorageVector> {
    let mut storage = NegentropyStorageVector::new();
    for id in items.keys() {
        storage.insert(0, Id::from_byte_array(*id)).ok()?;
    }
    storage.seal().ok()?;
    Some(storage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Domain, KeyPair, SignedBytes};

    fn items(range: core::ops::Range<u32>) -> BTreeMap<ItemId, Soft> {
        let key = KeyPair::from_seed(&[1; 32]);
        let item =
            |n: u32| Soft::Head(SignedBytes::sign(&key, Domain::Head, n.to_be_bytes().to_vec()));
        range.map(item).map(|item| (item_id(&item), item)).collect()
    }

    #[test]
    fn two_peers_learn_exactly_what_each_lacks() {
        let (ours, theirs) = (items(0..300), items(20..310));
        let mut query = ask(&ours);
        let (mut have, mut need) = (Vec::new(), Vec::new());
        while let Some(question) = query {
            let answer = answer(&theirs, &question).unwrap();
            let difference = compare(&ours, &answer).unwrap();
            have.extend(difference.have);
            need.extend(difference.need);
            query = difference.next_query;
        }
        assert_eq!((have.len(), need.len()), (20, 10));
        assert!(have.iter().all(|id| ours.contains_key(id) && !theirs.contains_key(id)));
        assert!(need.iter().all(|id| theirs.contains_key(id) && !ours.contains_key(id)));
    }

    #[test]
    fn nonsense_is_refused_without_harm() {
        let ours = items(0..5);
        for length in 0..200_usize {
            let nonsense: Vec<u8> = (0..length).map(|i| (i * 37 % 251) as u8).collect();
            let _ = answer(&ours, &nonsense);
            let _ = compare(&ours, &nonsense);
        }
    }
}
