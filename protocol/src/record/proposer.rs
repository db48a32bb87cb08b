//! The proposer of one record: carries one operation at a time through a quorum.

use std::collections::{BTreeMap, BTreeSet};

use super::{Ballot, Keeper, Value, check_receipt, quorum_of};
use crate::{
    PeerId, StoreId,
    identity::SignedBytes,
    job::State,
    message::{Promise, Watch},
    sabotage::{Rule, Sabotage},
    wire,
};

/// Back-off after a refusal: uniform below this, doubled with each further one.
pub const BACKOFF_MS: u64 = 50;
/// Doublings of [`BACKOFF_MS`] at most.
pub const BACKOFFS_MAX: u32 = 6;

/// What is to be done to a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Make sure of what is chosen.
    Read,
    /// Choose this value, if the one before it is still in place.
    Set(Box<Value>),
    /// Drive the job from now on, if nobody has been heard of since.
    TakeOver {
        /// Who does.
        steward: PeerId,
        /// Keepers and what they had heard of others: only they count, and only if they have
        /// heard of nobody else since.
        watches: BTreeMap<StoreId, Watch>,
    },
}

/// What has to be said to keepers that have not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask<'a> {
    /// [`crate::message::Message::Prepare`].
    Prepare(Ballot),
    /// [`crate::message::Message::Accept`].
    Accept {
        /// The proposal.
        ballot: Ballot,
        /// To be promised with it.
        next: Ballot,
        /// The encoded value.
        value_bytes: &'a [u8],
    },
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The caller's number for the operation.
    pub op: u64,
    /// Whether it was done. A read always is.
    pub done: bool,
    /// What was chosen, with the receipts that prove it; receipts lack where the value is the
    /// record's birth. `None`: the operation was given up before anything was proposed.
    pub chosen: Option<(Value, Vec<u8>, Vec<SignedBytes>)>,
}

#[derive(Debug, Clone)]
enum Phase {
    Idle,
    BackingOff,
    Preparing {
        ballot: Ballot,
        promises: BTreeMap<StoreId, Promise>,
    },
    Accepting {
        ballot: Ballot,
        next: Ballot,
        value: Box<Value>,
        value_bytes: Vec<u8>,
        /// Whether it is what the operation asks for.
        wanted: bool,
        receipts: BTreeMap<StoreId, SignedBytes>,
        sent_ms: u64,
    },
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Proposer {
    me: StoreId,
    keepers: Vec<Keeper>,
    /// The highest counter seen or used.
    highest: u64,
    /// Promised to us by a quorum together with the value chosen last: the next proposal needs
    /// no Prepare.
    lead: Option<Ballot>,
    task: Option<(u64, Operation)>,
    phase: Phase,
    refusals: u32,
    /// Who refused the ballot under way.
    refusers: BTreeSet<StoreId>,
    sabotage: Sabotage,
}

impl Proposer {
    /// Nothing to do yet, among `keepers`.
    #[must_use]
    pub fn new(me: StoreId, keepers: Vec<Keeper>, sabotage: Sabotage) -> Self {
        let me = if sabotage.holds(Rule::BallotsDiffer) { me } else { Ballot::ZERO.store };
        Self {
            me,
            keepers,
            highest: 0,
            lead: None,
            task: None,
            phase: Phase::Idle,
            refusals: 0,
            refusers: BTreeSet::new(),
            sabotage,
        }
    }

    /// Whether an operation is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.task.is_some()
    }

    /// Whether it waits before it tries again.
    #[must_use]
    pub fn backs_off(&self) -> bool {
        matches!(self.phase, Phase::BackingOff)
    }

    /// Whether a keeper refused what is under way, so that [`Proposer::resume`] has an effect.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.backs_off() || !self.refusers.is_empty()
    }

    /// Refusals in a row.
    #[must_use]
    pub fn refusals(&self) -> u32 {
        self.refusals
    }

    /// The ballot that a quorum promised, while nobody is known to have proposed since, with
    /// the one promised along with the proposal under way; and who drives the job by that
    /// proposal. A stewardship may be renewed with these only: a keeper that promised anybody
    /// else a ballot above them refuses.
    #[must_use]
    pub fn held(&self) -> Option<(Ballot, Ballot, Option<PeerId>)> {
        match &self.phase {
            Phase::Preparing { .. } | Phase::BackingOff => None,
            Phase::Accepting { ballot, next, value, .. } => {
                Some((*ballot, *next, Some(value.body.steward)))
            }
            Phase::Idle => self.lead.map(|lead| (lead, lead, None)),
        }
    }

    /// When the proposal under way was first sent, on the boot clock, for `ballot`.
    #[must_use]
    pub fn sent_ms(&self, of: Ballot) -> Option<u64> {
        match &self.phase {
            Phase::Accepting { ballot, sent_ms, .. } if *ballot == of => Some(*sent_ms),
            _ => None,
        }
    }

    /// Carry out an operation. `known` is what was chosen last, as far as known here, with its
    /// hash; `promised` what the acceptor here has promised.
    ///
    /// # Errors
    /// Another is under way.
    pub fn begin(
        &mut self,
        op: u64,
        operation: Operation,
        known: Option<(&Value, [u8; 32])>,
        promised: Ballot,
        now_ms: u64,
    ) -> Result<(), Operation> {
        if self.task.is_some() {
            return Err(operation);
        }
        self.highest = self.highest.max(promised.counter);
        self.refusals = 0;
        let direct = match (&operation, self.lead, known) {
            (Operation::Set(value), Some(ballot), Some((_, hash))) if value.prev == hash => {
                Some((ballot, value.clone()))
            }
            (Operation::Read, Some(ballot), Some((value, _))) => {
                Some((ballot, Box::new(value.clone())))
            }
            _ => None,
        };
        self.task = Some((op, operation));
        match direct {
            // Somebody else has prepared since: the quorum would only say so.
            Some((ballot, value)) if promised <= ballot => {
                self.propose(ballot, value, true, now_ms);
            }
            _ => self.prepare(),
        }
        Ok(())
    }

    /// Give up what is under way, without a word.
    pub fn abandon(&mut self) -> Option<u64> {
        self.phase = Phase::Idle;
        self.task.take().map(|(op, _)| op)
    }

    /// Try again with a higher ballot, where somebody refused the last.
    pub fn resume(&mut self, promised: Ballot) {
        if self.is_refused() {
            self.highest = self.highest.max(promised.counter);
            self.prepare();
        }
    }

    /// What to say to whom: keepers that have not answered yet.
    #[must_use]
    pub fn ask(&self) -> Option<(Ask<'_>, Vec<Keeper>)> {
        let (ask, answered): (_, BTreeSet<StoreId>) = match &self.phase {
            Phase::Idle | Phase::BackingOff => return None,
            Phase::Preparing { ballot, promises } => {
                (Ask::Prepare(*ballot), promises.keys().copied().collect())
            }
            Phase::Accepting { ballot, next, value_bytes, receipts, .. } => {
                let (ballot, next) = (*ballot, *next);
                (Ask::Accept { ballot, next, value_bytes }, receipts.keys().copied().collect())
            }
        };
        let silent = self.keepers.iter().filter(|(_, store)| !answered.contains(store));
        Some((ask, silent.copied().collect()))
    }

    fn prepare(&mut self) {
        self.lead = None;
        self.highest = self.highest.saturating_add(1);
        self.refusers.clear();
        let ballot = Ballot { counter: self.highest, store: self.me };
        self.phase = Phase::Preparing { ballot, promises: BTreeMap::new() };
    }

    fn propose(&mut self, ballot: Ballot, value: Box<Value>, wanted: bool, now_ms: u64) {
        self.refusers.clear();
        let next = ballot.next_of(self.me);
        self.highest = self.highest.max(next.counter);
        self.lead = None;
        self.phase = Phase::Accepting {
            ballot,
            next,
            value_bytes: wire::encode(&*value),
            value,
            wanted,
            receipts: BTreeMap::new(),
            sent_ms: now_ms,
        };
    }

    fn store_of(&self, from: PeerId) -> Option<StoreId> {
        self.keepers.iter().find(|(peer, _)| *peer == from).map(|(_, store)| *store)
    }

    fn finish(
        &mut self,
        done: bool,
        chosen: Option<(Value, Vec<u8>, Vec<SignedBytes>)>,
    ) -> Option<End> {
        self.phase = Phase::Idle;
        self.refusals = 0;
        let (op, _) = self.task.take()?;
        Some(End { op, done, chosen })
    }

    /// A keeper promised.
    pub fn promised(&mut self, from: PeerId, promise: Promise, now_ms: u64) -> Option<End> {
        let store = self.store_of(from)?;
        let Phase::Preparing { ballot, promises } = &mut self.phase else { return None };
        if promise.ballot != *ballot {
            return None;
        }
        if let Some((_, Operation::TakeOver { watches, .. })) = &self.task {
            match watches.get(&store) {
                Some(seen) if *seen == promise.watch => {}
                // The steward was heard of: it is alive.
                Some(_) => return self.finish(false, None),
                None => return None,
            }
        }
        promises.insert(store, promise);
        if promises.len() < quorum_of(self.keepers.len()) {
            return None;
        }
        let (ballot, promises) = (*ballot, core::mem::take(promises));
        self.decide(ballot, &promises, now_ms)
    }

    /// A quorum promised: what is proposed follows from what they accepted last.
    fn decide(
        &mut self,
        ballot: Ballot,
        promises: &BTreeMap<StoreId, Promise>,
        now_ms: u64,
    ) -> Option<End> {
        let highest = if self.sabotage.holds(Rule::LastAcceptedWins) {
            promises.values().max_by_key(|promise| promise.accepted)?
        } else {
            promises.values().min_by_key(|promise| promise.accepted)?
        };
        let Ok(value) = wire::decode::<Value>(&highest.value_bytes) else {
            return self.finish(false, None);
        };
        let (_, operation) = self.task.as_ref()?;
        if value.sealed.is_some() && self.sabotage.holds(Rule::SealEndsEpoch) {
            self.propose(ballot, Box::new(value), false, now_ms);
            return None;
        }
        match operation {
            Operation::Read if highest.accepted == Ballot::ZERO && value.seq == 1 => {
                // A quorum was initialised, and that is the birth's being chosen.
                let bytes = highest.value_bytes.clone();
                self.lead = Some(ballot);
                self.finish(true, Some((value, bytes, Vec::new())))
            }
            Operation::Read => {
                self.propose(ballot, Box::new(value), true, now_ms);
                None
            }
            Operation::Set(wanted) => {
                let hash = value.hash();
                let wanted = (hash == wanted.prev || hash == wanted.hash()).then(|| wanted.clone());
                let applies = wanted.is_some();
                self.propose(ballot, wanted.unwrap_or(Box::new(value)), applies, now_ms);
                None
            }
            Operation::TakeOver { .. } if value.body.state() == State::Done => {
                self.propose(ballot, Box::new(value), false, now_ms);
                None
            }
            Operation::TakeOver { steward, .. } if value.body.steward == *steward => {
                self.propose(ballot, Box::new(value), true, now_ms);
                None
            }
            Operation::TakeOver { steward, .. } => {
                let mut body = value.body.clone();
                body.steward = *steward;
                if self.sabotage.holds(Rule::TermCounts) {
                    body.term += 1;
                }
                self.propose(ballot, Box::new(value.successor(body)), true, now_ms);
                None
            }
        }
    }

    /// A keeper accepted.
    pub fn accepted(&mut self, from: PeerId, of: Ballot, receipt: SignedBytes) -> Option<End> {
        let store = self.store_of(from)?;
        let quorum = quorum_of(self.keepers.len());
        let Phase::Accepting { ballot, value_bytes, receipts, .. } = &mut self.phase else {
            return None;
        };
        if of != *ballot || receipts.contains_key(&store) {
            return None;
        }
        let hash = *blake3::hash(value_bytes).as_bytes();
        let body = check_receipt(&receipt, &self.keepers)?;
        if body.store != store || body.ballot != of || body.value_hash != hash {
            return None;
        }
        receipts.insert(store, receipt);
        if receipts.len() < quorum {
            return None;
        }
        let phase = core::mem::replace(&mut self.phase, Phase::Idle);
        let Phase::Accepting { next, value, value_bytes, wanted, receipts, .. } = phase else {
            return None;
        };
        self.lead = Some(next);
        let receipts = receipts.into_values().collect();
        self.finish(wanted, Some((*value, value_bytes, receipts)))
    }

    /// A keeper refused: somebody proposes with a higher ballot. Whether to back off: as long as
    /// the others can make a quorum, they may.
    pub fn refused(&mut self, from: PeerId, of: Ballot, promised: Ballot) -> bool {
        let Some(store) = self.store_of(from) else { return false };
        let (current, next) = match &self.phase {
            Phase::Preparing { ballot, .. } => (*ballot, *ballot),
            Phase::Accepting { ballot, next, .. } => (*ballot, *next),
            Phase::Idle | Phase::BackingOff => {
                // To a proposal that a quorum accepted without this keeper.
                self.highest = self.highest.max(promised.counter);
                return false;
            }
        };
        self.highest = self.highest.max(promised.counter);
        // What was promised to this proposer refuses only a late copy of what it said before.
        if of != current || promised <= current || promised == next {
            return false;
        }
        self.refusers.insert(store);
        if self.refusers.len() <= self.keepers.len() - quorum_of(self.keepers.len()) {
            return false;
        }
        self.refusers.clear();
        self.phase = Phase::BackingOff;
        self.lead = None;
        self.refusals = self.refusals.saturating_add(1);
        true
    }

    /// The next proposal must ask first: somebody else has proposed.
    pub fn dethrone(&mut self, promised: Ballot) {
        self.highest = self.highest.max(promised.counter);
        self.lead = None;
    }
}
