//! The roster: signed statements about who belongs to the pool, and what they add
//! up to.
//!
//! A pool begins with a [`Genesis`], whose hash is its id. Everything after is a
//! [`Statement`] by a member, naming the statements that its author had seen. So
//! they form a graph of causes, and a replica is nothing but a set of them: to merge
//! is to unite, and a deterministic fold makes the same [`State`] of the same set in
//! whatever order it came (see `roster/fold.rs`). No clock takes part. What needs
//! one, the expiry of an invite above all, is checked at the [door](crate::door) by
//! the member node that then signs the accept.
//!
//! # Bounds
//! [`STATEMENTS_MAX`] statements of [`STATEMENT_BYTES_MAX`] each. Only members can
//! add: a statement whose author has no right by what it claims to have seen is not
//! kept. Statements whose parents are unknown wait, [`WAITING_MAX`] at most, the
//! oldest making room; reconciliation brings them again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
};

mod claim;
mod fold;
mod genesis;
mod graph;
mod name;
mod state;
mod statement;
mod ticket;
mod user_request;

pub(crate) use claim::invite_proof_holds;
pub use claim::{
    CLAIM_AGE_MS_MAX, CLAIM_BYTES_MAX, ClaimError, ClaimId, JoinClaim, SignedClaim, prove_invite,
};
pub use genesis::{FOUNDERS_MAX, Founder, GENESIS_BYTES_MAX, Genesis, GenesisError};
pub use name::{NAME_CHARS_MAX, Name, NameError};
pub use state::{InviteState, Node, State, User};
pub use statement::{
    Accept, AdmitNode, Author, DeviceId, Draft, Invite, Kind, Leave, NODE_CLAIMS_MAX, PARENTS_MAX,
    Profile, Rejected, Rights, STATEMENT_BYTES_MAX, Statement, TEXT_BYTES_MAX, WrongKey,
};
pub use ticket::{DOORS_MAX, Door, Ticket, TicketError};
pub use user_request::{
    AUDIENCE_MAX, Admitted, NONCES_MAX, NONCES_PER_USER_MAX, REQUEST_AHEAD_MS_MAX, RequestError,
    RequestGuard, UserRequest, WALL_TOLERANCE_MS,
};

use fold::{Folded, fold};
use graph::{Graph, Indices, View};

use crate::identity::{Domain, PoolId, SignedBytes, StatementId};

/// The most statements a roster holds.
pub const STATEMENTS_MAX: usize = 4096;

/// The most statements that wait for parents.
pub const WAITING_MAX: usize = 512;

/// One replica of a pool's statements.
#[derive(Debug, Clone)]
pub struct Roster {
    pool: PoolId,
    genesis_bytes: Arc<[u8]>,
    genesis: Arc<Genesis>,
    graph: Graph,
    waiting: Waiting,
    /// Made when first asked for after a change.
    folded: OnceLock<Folded>,
}

/// What became of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inserted {
    /// Its id.
    pub id: StatementId,
    /// Whether it was unknown until now.
    pub new: bool,
    /// What joined the roster by it, causes first: the statement itself and those
    /// that had waited for it. Empty where it waits for parents itself.
    pub added: Vec<StatementId>,
}

/// A number that an author used twice on one device: evidence against its key. None
/// of the statements applies, nor what followed on that device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contradiction {
    /// Who said both.
    pub author: Author,
    /// From which home.
    pub device: DeviceId,
    /// Under which number.
    pub seq: u64,
    /// The statements, ascending; at least two.
    pub statements: Vec<StatementId>,
}

/// Why a draft cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// Two statements under one number: this home's statements no longer count.
    #[error(
        "{0} said two different things under one number from this home, so its statements no \
         longer apply: use a fresh home"
    )]
    Suspended(Author),
    /// The statement would not be taken in.
    #[error(transparent)]
    Rejected(#[from] Rejected),
}

impl Roster {
    /// A roster with nothing in it but the genesis.
    ///
    /// # Errors
    /// [`GenesisError`] where the bytes are not one.
    pub fn new(genesis_bytes: Vec<u8>) -> Result<Self, GenesisError> {
        let (pool, genesis) = Genesis::from_bytes(&genesis_bytes)?;
        let founders = genesis.founders.iter().map(|founder| founder.user).collect();
        Ok(Self {
            pool,
            genesis_bytes: genesis_bytes.into(),
            genesis: Arc::new(genesis),
            graph: Graph::new(pool, founders),
            waiting: Waiting::default(),
            folded: OnceLock::new(),
        })
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    /// How it began.
    #[must_use]
    pub fn genesis(&self) -> &Genesis {
        &self.genesis
    }

    /// The very bytes whose hash is the pool's id.
    #[must_use]
    pub fn genesis_bytes(&self) -> &[u8] {
        &self.genesis_bytes
    }

    /// Take in a statement from anywhere. One that is known already changes nothing;
    /// one with unknown parents waits for them.
    ///
    /// # Errors
    /// [`Rejected`] where it can never become part of this roster, or has no room.
    pub fn insert(&mut self, signed: SignedBytes) -> Result<Inserted, Rejected> {
        let id = Statement::id(&signed);
        if self.contains(id) || self.waiting.contains(id) {
            return Ok(Inserted { id, new: false, added: Vec::new() });
        }
        let statement = self.verify(&signed)?;
        if let Some(missing) = self.graph.first_missing(&statement.parents) {
            self.waiting.put(missing, id, signed, statement);
            return Ok(Inserted { id, new: true, added: Vec::new() });
        }
        self.admit(id, signed, statement)?;
        let mut added = vec![id];
        let mut next = 0;
        while let Some(&parent) = added.get(next) {
            next += 1;
            self.release(parent, &mut added);
        }
        Ok(Inserted { id, new: true, added })
    }

    /// Take in a statement that was drafted from this roster, unless another has
    /// taken its number since: then nobody has seen it and it must not be published.
    ///
    /// # Errors
    /// [`Rejected::Stale`] in that case, else as [`Roster::insert`].
    pub fn insert_drafted(&mut self, signed: SignedBytes) -> Result<Inserted, Rejected> {
        let id = Statement::id(&signed);
        if !self.contains(id) {
            let statement = self.verify(&signed)?;
            let Statement { author, device, seq, parents, .. } = statement;
            let known = self.graph.first_missing(&parents).is_none();
            if !known || self.graph.is_taken(author, device, seq) {
                return Err(Rejected::Stale);
            }
        }
        self.insert(signed)
    }

    /// What all statements together say.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.folded().state
    }

    /// Whether the statement is known and applies.
    #[must_use]
    pub fn applies(&self, id: StatementId) -> bool {
        self.graph.index_of(id).is_some_and(|index| self.folded().live[index])
    }

    /// Whether the statement is part of the roster.
    #[must_use]
    pub fn contains(&self, id: StatementId) -> bool {
        self.graph.index_of(id).is_some()
    }

    /// The statement `id`.
    #[must_use]
    pub fn get(&self, id: StatementId) -> Option<&SignedBytes> {
        self.graph.get(id).map(|entry| &entry.signed)
    }

    /// How many statements there are, waiting ones not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.graph.len()
    }

    /// Whether there is nothing but the genesis.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many statements wait for parents.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.by_id.len()
    }

    /// The statements that no other has seen, ascending.
    #[must_use]
    pub fn heads(&self) -> Vec<StatementId> {
        self.graph.heads().collect()
    }

    /// The number of the next statement of `author` from `device`.
    #[must_use]
    pub fn next_seq(&self, author: Author, device: DeviceId) -> u64 {
        self.graph.last_seq(author, device).saturating_add(1)
    }

    /// All statements, causes first, in an order that depends on nothing else.
    #[must_use]
    pub fn statements(&self) -> Vec<&SignedBytes> {
        self.graph.order().into_iter().map(|index| &self.graph.entry(index).signed).collect()
    }

    /// What somebody with these heads lacks, causes first, as far as `bytes_max`
    /// allows; heads unknown here are passed over. Called again with the heads that
    /// result, it goes on.
    #[must_use]
    pub fn statements_unknown_to(
        &self,
        heads: &[StatementId],
        bytes_max: usize,
    ) -> Vec<SignedBytes> {
        let known = self.graph.closure(heads.iter().copied());
        let mut bytes = 0_usize;
        let unknown = self.graph.order().into_iter().filter(|&index| !known.contains(index));
        unknown
            .map(|index| &self.graph.entry(index).signed)
            .take_while(|signed| {
                bytes = bytes.saturating_add(sent_bytes(signed));
                bytes <= bytes_max
            })
            .cloned()
            .collect()
    }

    /// The last of [`Roster::statements`], as many as fit into `bytes_max`.
    #[must_use]
    pub fn newest_statements(&self, bytes_max: usize) -> Vec<SignedBytes> {
        let mut bytes = 0_usize;
        let newest = self.graph.order().into_iter().rev();
        let mut newest: Vec<SignedBytes> = newest
            .map(|index| &self.graph.entry(index).signed)
            .take_while(|signed| {
                bytes = bytes.saturating_add(sent_bytes(signed));
                bytes <= bytes_max
            })
            .cloned()
            .collect();
        newest.reverse();
        newest
    }

    /// One hash over all statements: equal on replicas that hold the same.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.pool.0);
        for id in self.graph.ids() {
            hasher.update(&id.0);
        }
        *hasher.finalize().as_bytes()
    }

    /// Every number that was used twice.
    #[must_use]
    pub fn contradictions(&self) -> Vec<Contradiction> {
        let said = self.graph.contradictions();
        said.map(|(author, device, seq, statements)| Contradiction {
            author,
            device,
            seq,
            statements,
        })
        .collect()
    }

    /// A statement for `author` to sign, after all that is known here.
    ///
    /// `wall_ms` is the date it will show. Sign and give it to
    /// [`Roster::insert_drafted`] before drafting the next for the same device.
    ///
    /// # Errors
    /// [`DraftError`] where it would not apply.
    pub fn draft(
        &self,
        author: Author,
        device: DeviceId,
        kind: Kind,
        wall_ms: u64,
    ) -> Result<Draft, DraftError> {
        if self.graph.suspended_from(author, device).is_some() {
            return Err(DraftError::Suspended(author));
        }
        if self.len() >= STATEMENTS_MAX {
            return Err(Rejected::Full.into());
        }
        let parents = self.parents_for(self.graph.needed(author, device, &kind));
        let past = self.graph.closure(parents.iter().copied());
        let seq = self.next_seq(author, device);
        self.graph.check_sequence(author, device, seq, &past)?;
        let body = self.graph.open(kind.clone(), &past)?;
        View::folded(&self.graph, &past, &self.folded().live)
            .allows(author, &body)
            .map_err(|why| Rejected::NoRight { author, why })?;
        let statement = Statement {
            pool: self.pool,
            author,
            device,
            seq,
            parents,
            kind,
            not_before_ms: wall_ms,
            not_after_ms: u64::MAX,
        };
        Ok(Draft::new(statement)?)
    }

    fn folded(&self) -> &Folded {
        self.folded.get_or_init(|| fold(&self.genesis, &self.graph))
    }

    fn verify(&self, signed: &SignedBytes) -> Result<Statement, Rejected> {
        let statement = Statement::from_bytes(&signed.bytes)?;
        if statement.pool != self.pool {
            return Err(Rejected::OtherPool(statement.pool));
        }
        if statement.author.key() != signed.signer {
            return Err(Rejected::NotItsAuthor(statement.author));
        }
        signed.verify(Domain::Statement).map_err(|_| Rejected::Signature)?;
        Ok(statement)
    }

    fn admit(
        &mut self,
        id: StatementId,
        signed: SignedBytes,
        statement: Statement,
    ) -> Result<(), Rejected> {
        if self.len() >= STATEMENTS_MAX {
            return Err(Rejected::Full);
        }
        self.graph.admit(id, signed, statement)?;
        self.folded = OnceLock::new();
        Ok(())
    }

    /// Take in those that waited for `parent` and now have all theirs.
    fn release(&mut self, parent: StatementId, added: &mut Vec<StatementId>) {
        for (id, Waiter { signed, statement, .. }) in self.waiting.take(parent) {
            if let Some(missing) = self.graph.first_missing(&statement.parents) {
                self.waiting.put(missing, id, signed, statement);
                continue;
            }
            match self.admit(id, signed, statement) {
                Ok(()) => added.push(id),
                Err(error) => {
                    tracing::debug!(?id, %error, "a statement that had waited is not taken in");
                }
            }
        }
    }

    /// All heads, or where there are too many: those that cover `needed`, then others.
    fn parents_for(&self, needed: Vec<usize>) -> Vec<StatementId> {
        let heads: BTreeSet<StatementId> = self.graph.heads().collect();
        if heads.len() <= PARENTS_MAX {
            return heads.into_iter().collect();
        }
        let mut chosen = BTreeSet::new();
        let mut covered = Indices::default();
        for index in needed {
            if !covered.contains(index) && chosen.len() < PARENTS_MAX {
                let covers = |head: &StatementId| self.graph.closure([*head]).contains(index);
                chosen.extend(heads.iter().copied().find(covers));
                covered = self.graph.closure(chosen.iter().copied());
            }
        }
        for head in heads {
            if chosen.len() < PARENTS_MAX {
                chosen.insert(head);
            }
        }
        chosen.into_iter().collect()
    }
}

/// What a statement takes in a message: its bytes, key, signature and their lengths.
fn sent_bytes(signed: &SignedBytes) -> usize {
    signed.bytes.len() + signed.signature.0.len() + 32 + 2 * 9
}

/// Statements whose parents are not all known, by the first that is missing.
#[derive(Debug, Clone, Default)]
struct Waiting {
    by_id: BTreeMap<StatementId, Waiter>,
    by_missing: BTreeMap<StatementId, BTreeSet<StatementId>>,
    /// By arrival, for making room.
    by_age: BTreeMap<u64, StatementId>,
    arrivals: u64,
}

#[derive(Debug, Clone)]
struct Waiter {
    signed: SignedBytes,
    statement: Statement,
    missing: StatementId,
    arrival: u64,
}

impl Waiting {
    fn contains(&self, id: StatementId) -> bool {
        self.by_id.contains_key(&id)
    }

    fn put(
        &mut self,
        missing: StatementId,
        id: StatementId,
        signed: SignedBytes,
        statement: Statement,
    ) {
        if self.by_id.len() >= WAITING_MAX
            && let Some((_, &oldest)) = self.by_age.first_key_value()
        {
            self.remove(oldest);
        }
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.by_age.insert(arrival, id);
        self.by_missing.entry(missing).or_default().insert(id);
        self.by_id.insert(id, Waiter { signed, statement, missing, arrival });
    }

    fn take(&mut self, parent: StatementId) -> Vec<(StatementId, Waiter)> {
        let ids = self.by_missing.get(&parent).cloned().unwrap_or_default();
        ids.into_iter().filter_map(|id| Some((id, self.remove(id)?))).collect()
    }

    fn remove(&mut self, id: StatementId) -> Option<Waiter> {
        let waiter = self.by_id.remove(&id)?;
        self.by_age.remove(&waiter.arrival);
        if let Some(others) = self.by_missing.get_mut(&waiter.missing) {
            others.remove(&id);
            if others.is_empty() {
                self.by_missing.remove(&waiter.missing);
            }
        }
        Some(waiter)
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
