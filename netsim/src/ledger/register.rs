//! One job's register as the disks of its keepers have it: who voted for what, and what
//! follows from that.
//!
//! A value is chosen once a quorum of distinct stores of its epoch's keepers has made it
//! durable at one ballot, whether or not anybody noticed. What a store once accepted counts
//! for ever, also when its disk is gone.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

use p2pit_protocol::{
    PeerId, StoreId,
    job::VerifiedSpec,
    record::{Ballot, Keeper, LinkProof, Replica, Value, quorum_of},
    wire,
};

/// The BLAKE3 hash of a value's bytes.
pub type ValueHash = [u8; 32];

/// Votes and values of one job.
#[derive(Debug, Clone, Default)]
pub struct Register {
    /// Its configurations so far, by number.
    pub epochs: Vec<Epoch>,
    /// What each store promised last: epoch and ballot.
    pub promises: BTreeMap<StoreId, (u32, Ballot)>,
    /// Every value that any store accepted.
    values: BTreeMap<ValueHash, Arc<Value>>,
    /// Where in the chain a value is.
    places: BTreeMap<ValueHash, usize>,
    last: Option<ValueHash>,
}

/// One configuration.
#[derive(Debug, Clone)]
pub struct Epoch {
    /// Its keepers.
    pub keepers: Vec<Keeper>,
    /// Somebody gave the keepers before it up for lost.
    pub forced: bool,
    /// Who accepted what, by ballot.
    pub votes: BTreeMap<Ballot, Vec<Votes>>,
    /// The value that ended it, and was chosen.
    pub sealed: Option<ValueHash>,
}

/// The stores that accepted one value at one ballot.
#[derive(Debug, Clone)]
pub struct Votes {
    /// The value.
    pub value: ValueHash,
    /// Distinct stores of the epoch's keepers.
    pub stores: BTreeSet<StoreId>,
}

/// What one write to a disk changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// The store's promise before, where it is another now.
    pub promised: Option<((u32, Ballot), (u32, Ballot))>,
    /// The store voted, and had not voted so before.
    pub voted: Option<Vote>,
    /// The vote made a quorum.
    pub quorum: Option<Quorum>,
}

/// A vote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vote {
    /// The configuration.
    pub epoch: u32,
    /// The proposal.
    pub ballot: Ballot,
    /// The value.
    pub value: ValueHash,
}

/// A value for which a quorum voted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quorum {
    /// The configuration.
    pub epoch: u32,
    /// The proposal.
    pub ballot: Ballot,
    /// The value.
    pub value: ValueHash,
    /// Where it is in the chain.
    pub place: Place,
}

/// Where a chosen value is in its job's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// It was chosen before.
    Known,
    /// At the end, behind those before it in this list, which are thereby chosen too.
    End(Vec<Arc<Value>>),
    /// Nowhere: it does not follow from what was chosen last.
    Nowhere,
}

impl Register {
    /// Take in what a store now has; `None` where the entry cannot be read.
    pub fn take(&mut self, store: StoreId, replica: &Replica) -> Option<Change> {
        self.learn_epochs(replica)?;
        let epoch = u32::try_from(replica.links.len()).ok()?;
        let mut change = Change::default();
        let promise = (epoch, replica.promised);
        let before = self.promises.insert(store, promise);
        change.promised = before.filter(|before| *before != promise).map(|b| (b, promise));
        let keeps = self.epoch(epoch)?.keepers.iter().any(|(_, named)| *named == store);
        if replica.value_bytes.is_empty() || !keeps {
            return Some(change);
        }
        let value = *blake3::hash(&replica.value_bytes).as_bytes();
        if let Entry::Vacant(new) = self.values.entry(value) {
            new.insert(Arc::new(wire::decode(&replica.value_bytes).ok()?));
        }
        let vote = Vote { epoch, ballot: replica.accepted, value };
        let Some(count) = self.count(store, &vote) else { return Some(change) };
        let quorum = quorum_of(self.epoch(epoch)?.keepers.len());
        change.voted = Some(vote);
        if count == quorum {
            let place = self.place(value);
            let sealed = self.values.get(&value)?.sealed.is_some();
            if sealed && place != Place::Nowhere {
                self.epochs.get_mut(epoch as usize)?.sealed.get_or_insert(value);
            }
            change.quorum = Some(Quorum { epoch, ballot: replica.accepted, value, place });
        }
        Some(change)
    }

    /// A configuration by its number.
    #[must_use]
    pub fn epoch(&self, epoch: u32) -> Option<&Epoch> {
        self.epochs.get(epoch as usize)
    }

    /// A value that some store accepted.
    #[must_use]
    pub fn value(&self, hash: &ValueHash) -> Option<&Arc<Value>> {
        self.values.get(hash)
    }

    /// Whether a value is in the chain.
    #[must_use]
    pub fn is_chosen(&self, hash: &ValueHash) -> bool {
        self.places.contains_key(hash)
    }

    /// Who keeps the record now: of the epoch of the value chosen last, or of the next where
    /// that value ends its epoch. Before the first is chosen, whom the spec names.
    #[must_use]
    pub fn keepers(&self) -> &[Keeper] {
        let last = self.last.as_ref().and_then(|hash| self.values.get(hash));
        let Some(last) = last else {
            return self.epochs.first().map_or(&[], |epoch| &epoch.keepers);
        };
        match &last.sealed {
            Some(next) => next,
            None => self.epoch(last.epoch).map_or(&[], |epoch| &epoch.keepers),
        }
    }

    /// Whether `peer` keeps the record now.
    #[must_use]
    pub fn is_keeper(&self, peer: PeerId) -> bool {
        self.keepers().iter().any(|(keeper, _)| *keeper == peer)
    }

    fn learn_epochs(&mut self, replica: &Replica) -> Option<()> {
        if self.epochs.is_empty() {
            let spec = VerifiedSpec::verify(replica.spec.clone()).ok()?;
            self.epochs.push(Epoch::new(spec.spec.keepers, false));
        }
        for link in replica.links.iter().skip(self.epochs.len() - 1) {
            let forced = matches!(link.proof, LinkProof::Forced(_));
            self.epochs.push(Epoch::new(link.next.clone(), forced));
        }
        Some(())
    }

    /// How many stores voted so, where this one had not yet.
    fn count(&mut self, store: StoreId, vote: &Vote) -> Option<usize> {
        let votes = self.epochs.get_mut(vote.epoch as usize)?.votes.entry(vote.ballot).or_default();
        let index = votes.iter().position(|votes| votes.value == vote.value);
        let index = index.unwrap_or_else(|| {
            votes.push(Votes { value: vote.value, stores: BTreeSet::new() });
            votes.len() - 1
        });
        let stores = &mut votes.get_mut(index)?.stores;
        stores.insert(store).then_some(stores.len())
    }

    /// Put a chosen value into the chain, behind what it builds on and nobody chose alone.
    fn place(&mut self, hash: ValueHash) -> Place {
        if self.places.contains_key(&hash) {
            return Place::Known;
        }
        let mut added = Vec::new();
        let mut next = hash;
        loop {
            let Some(value) = self.values.get(&next) else { return Place::Nowhere };
            added.push((next, Arc::clone(value)));
            let recovers = self.epoch(value.epoch).is_some_and(|epoch| epoch.forced)
                && self.values.get(&value.prev).is_none_or(|prev| prev.epoch != value.epoch);
            if value.seq == 1 && self.last.is_none() || Some(value.prev) == self.last || recovers {
                break;
            }
            if value.seq <= 1 || self.places.contains_key(&value.prev) {
                return Place::Nowhere;
            }
            next = value.prev;
        }
        added.reverse();
        for (hash, _) in &added {
            self.places.insert(*hash, self.places.len());
            self.last = Some(*hash);
        }
        Place::End(added.into_iter().map(|(_, value)| value).collect())
    }
}

impl Epoch {
    fn new(keepers: Vec<Keeper>, forced: bool) -> Self {
        Self { keepers, forced, votes: BTreeMap::new(), sealed: None }
    }
}
