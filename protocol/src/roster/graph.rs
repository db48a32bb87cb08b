//! The causal graph of statements, and who has which right as seen from a place in it.
//!
//! Two questions are kept apart. *May it be stored?* depends on nothing but the
//! statement's own causal past: every replica answers alike, whatever else it knows,
//! and strangers cannot make a roster grow. *Does it apply?* is answered by the fold
//! over all that is known, in which things can be void (see `fold`). The first asks
//! for the rights that the past grants at best, the second for those that hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Accept, AdmitNode, Author, ClaimId, DeviceId, Invite, JoinClaim, Kind, Leave, Name, Profile,
    Rejected, Rights, SignedClaim, Statement, claim::invite_proof_holds,
};
use crate::identity::{PeerId, PoolId, SignedBytes, StatementId, UserId};

/// Statements by arrival; an index into them is what all the maps hold.
#[derive(Debug, Clone)]
pub(super) struct Graph {
    pool: PoolId,
    founders: BTreeSet<UserId>,
    entries: Vec<Arc<Entry>>,
    by_id: BTreeMap<StatementId, usize>,
    heads: BTreeSet<StatementId>,
    slots: BTreeMap<(Author, DeviceId, u64), Vec<usize>>,
    /// From which number on an author's device is suspended, for having said two
    /// things under that number.
    suspended: BTreeMap<(Author, DeviceId), u64>,
    accepts: BTreeMap<UserId, Vec<usize>>,
    claims: BTreeMap<PeerId, BTreeMap<ClaimId, ClaimUse>>,
}

/// The statements about one claim.
#[derive(Debug, Clone, Default)]
struct ClaimUse {
    grants: Vec<usize>,
    leaves: Vec<usize>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: StatementId,
    pub(super) signed: SignedBytes,
    pub(super) author: Author,
    pub(super) device: DeviceId,
    pub(super) seq: u64,
    /// The longest way to the genesis; part of the fold's order.
    pub(super) depth: u32,
    /// All that its author had seen.
    pub(super) past: Indices,
    pub(super) body: Body,
    pub(super) not_before_ms: u64,
}

/// What a statement says, with its references looked up and its proofs verified.
#[derive(Debug)]
pub(super) enum Body {
    Invite(Invite),
    Accept { invite: usize, grant: Grant },
    AdmitNode(Grant),
    Profile(Profile),
    Leave(Leave),
}

/// A node's way in.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) id: ClaimId,
    pub(super) claim: JoinClaim,
    pub(super) node_name: Name,
}

impl Graph {
    pub(super) fn new(pool: PoolId, founders: BTreeSet<UserId>) -> Self {
        Self {
            pool,
            founders,
            entries: Vec::new(),
            by_id: BTreeMap::new(),
            heads: BTreeSet::new(),
            slots: BTreeMap::new(),
            suspended: BTreeMap::new(),
            accepts: BTreeMap::new(),
            claims: BTreeMap::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, id: StatementId) -> Option<&Entry> {
        self.by_id.get(&id).map(|&index| &*self.entries[index])
    }

    pub(super) fn entry(&self, index: usize) -> &Entry {
        &self.entries[index]
    }

    pub(super) fn index_of(&self, id: StatementId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = StatementId> {
        self.by_id.keys().copied()
    }

    pub(super) fn heads(&self) -> impl Iterator<Item = StatementId> {
        self.heads.iter().copied()
    }

    pub(super) fn first_missing(&self, parents: &[StatementId]) -> Option<StatementId> {
        parents.iter().copied().find(|parent| !self.by_id.contains_key(parent))
    }

    /// The fold's order: by depth, then by id. Both are properties of the statement
    /// itself, so the order of a part never depends on the rest; parents come first.
    pub(super) fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        order.sort_unstable_by_key(|&index| (self.entries[index].depth, self.entries[index].id));
        order
    }

    pub(super) fn last_seq(&self, author: Author, device: DeviceId) -> u64 {
        let slots = self.slots.range((author, device, 0)..=(author, device, u64::MAX));
        slots.last().map_or(0, |(&(_, _, seq), _)| seq)
    }

    pub(super) fn is_taken(&self, author: Author, device: DeviceId, seq: u64) -> bool {
        self.slots.contains_key(&(author, device, seq))
    }

    pub(super) fn suspended_from(&self, author: Author, device: DeviceId) -> Option<u64> {
        self.suspended.get(&(author, device)).copied()
    }

    /// Numbers under which more than one thing was said, with the statements.
    pub(super) fn contradictions(
        &self,
    ) -> impl Iterator<Item = (Author, DeviceId, u64, Vec<StatementId>)> {
        self.slots.iter().filter(|(_, said)| said.len() > 1).map(
            |(&(author, device, seq), said)| {
                let mut ids: Vec<_> = said.iter().map(|&index| self.entries[index].id).collect();
                ids.sort_unstable();
                (author, device, seq, ids)
            },
        )
    }

    /// All that is at or before the statements `ids`, as far as they are known.
    pub(super) fn closure(&self, ids: impl IntoIterator<Item = StatementId>) -> Indices {
        let mut all = Indices::default();
        for index in ids.into_iter().filter_map(|id| self.index_of(id)) {
            all.union(&self.entries[index].past);
            all.insert(index);
        }
        all
    }

    /// Take in a statement whose signature holds and whose parents are all here.
    pub(super) fn admit(
        &mut self,
        id: StatementId,
        signed: SignedBytes,
        statement: Statement,
    ) -> Result<(), Rejected> {
        let past = self.closure(statement.parents.iter().copied());
        let (author, device, seq) = (statement.author, statement.device, statement.seq);
        let body = self.open(statement.kind, &past)?;
        self.check_sequence(author, device, seq, &past)?;
        View::at_best(self, &past)
            .allows(author, &body)
            .map_err(|why| Rejected::NoRight { author, why })?;

        let parents = statement.parents.iter();
        let depth = parents.filter_map(|&p| self.get(p)).map(|p| p.depth + 1).max().unwrap_or(0);
        for parent in &statement.parents {
            self.heads.remove(parent);
        }
        let not_before_ms = statement.not_before_ms;
        self.add(Entry { id, signed, author, device, seq, depth, past, body, not_before_ms });
        Ok(())
    }

    pub(super) fn check_sequence(
        &self,
        author: Author,
        device: DeviceId,
        seq: u64,
        past: &Indices,
    ) -> Result<(), Rejected> {
        let in_past = |seq| {
            self.slots
                .get(&(author, device, seq))
                .is_some_and(|said| said.iter().any(|&index| past.contains(index)))
        };
        // Exactly the next: its predecessor was seen, and nothing with its own number.
        if (seq == 1 || in_past(seq - 1)) && !in_past(seq) {
            Ok(())
        } else {
            Err(Rejected::Sequence { author, seq })
        }
    }

    /// Look up what `kind` refers to within `past` and verify its proofs.
    pub(super) fn open(&self, kind: Kind, past: &Indices) -> Result<Body, Rejected> {
        Ok(match kind {
            Kind::Invite(invite) => Body::Invite(invite),
            Kind::Accept(accept) => self.open_accept(accept, past)?,
            Kind::AdmitNode(AdmitNode { claim, node_name }) => {
                Body::AdmitNode(self.open_claim(&claim, node_name)?)
            }
            Kind::Profile(profile) => Body::Profile(profile),
            Kind::Leave(leave) => {
                let known = self.claims.get(&leave.node);
                let seen = leave.claims.iter().all(|claim| {
                    known
                        .and_then(|claims| claims.get(claim))
                        .is_some_and(|c| c.grants.iter().any(|&index| past.contains(index)))
                });
                if !seen {
                    return Err(Rejected::Unseen("a claim"));
                }
                Body::Leave(leave)
            }
        })
    }

    fn open_accept(&self, accept: Accept, past: &Indices) -> Result<Body, Rejected> {
        let index = self.index_of(accept.invite).filter(|&index| past.contains(index));
        let index = index.ok_or(Rejected::Unseen("an invite"))?;
        let Body::Invite(invite) = &self.entries[index].body else {
            return Err(Rejected::Unseen("an invite"));
        };
        let grant = self.open_claim(&accept.claim, accept.node_name)?;
        if !invite_proof_holds(&accept.invite_proof, invite.key, self.pool, accept.invite, grant.id)
        {
            return Err(Rejected::InviteProof);
        }
        Ok(Body::Accept { invite: index, grant })
    }

    fn open_claim(&self, signed: &SignedClaim, node_name: Name) -> Result<Grant, Rejected> {
        let claim = signed.open().map_err(Rejected::Claim)?;
        if claim.pool != self.pool {
            return Err(Rejected::OtherPool(claim.pool));
        }
        if !node_name.is_variant_of(&claim.node_name) {
            return Err(Rejected::Bounds("node name is not the one in the claim"));
        }
        Ok(Grant { id: signed.id(), claim, node_name })
    }

    fn add(&mut self, entry: Entry) {
        let index = self.entries.len();
        self.by_id.insert(entry.id, index);
        self.heads.insert(entry.id);
        let said = self.slots.entry((entry.author, entry.device, entry.seq)).or_default();
        said.push(index);
        if said.len() > 1 {
            let from = self.suspended.entry((entry.author, entry.device)).or_insert(entry.seq);
            *from = (*from).min(entry.seq);
        }
        match &entry.body {
            Body::Accept { grant, .. } => {
                self.accepts.entry(grant.claim.user).or_default().push(index);
                self.claim_use(grant.claim.node, grant.id).grants.push(index);
            }
            Body::AdmitNode(grant) => {
                self.claim_use(grant.claim.node, grant.id).grants.push(index);
            }
            Body::Leave(leave) => {
                for &claim in &leave.claims {
                    self.claim_use(leave.node, claim).leaves.push(index);
                }
            }
            Body::Invite(_) | Body::Profile(_) => {}
        }
        self.entries.push(Arc::new(entry));
    }

    fn claim_use(&mut self, node: PeerId, claim: ClaimId) -> &mut ClaimUse {
        self.claims.entry(node).or_default().entry(claim).or_default()
    }
}

/// The rights that follow from a part of the graph, closed under causality.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    graph: &'a Graph,
    past: &'a Indices,
    /// Which statements apply; without it, all count and no leave does.
    live: Option<&'a [bool]>,
}

impl<'a> View<'a> {
    pub(super) fn at_best(graph: &'a Graph, past: &'a Indices) -> Self {
        Self { graph, past, live: None }
    }

    pub(super) fn folded(graph: &'a Graph, past: &'a Indices, live: &'a [bool]) -> Self {
        Self { graph, past, live: Some(live) }
    }

    /// Whether `author` may say `body`; the rule that forbids it otherwise.
    pub(super) fn allows(self, author: Author, body: &Body) -> Result<(), &'static str> {
        let ensure = |holds, why| if holds { Ok(()) } else { Err(why) };
        match (author, body) {
            (Author::User(user), Body::Invite(_)) => {
                ensure(self.is_admin(user), "only admins invite")
            }
            (Author::Node(node), Body::Accept { invite, grant }) => {
                ensure(self.is_member(node), "only member nodes admit others")?;
                ensure(self.holds(*invite), "the invite does not hold")?;
                ensure(!self.has_ended(grant), "the claim was used before: it takes a new one")
            }
            (Author::Node(node), Body::AdmitNode(grant)) => {
                let own = node == grant.claim.node;
                ensure(own || self.is_member(node), "only member nodes admit others")?;
                ensure(self.is_user(grant.claim.user), "its owner is not a member")?;
                ensure(!self.has_ended(grant), "the claim was used before: it takes a new one")
            }
            (Author::User(user), Body::Profile(_)) => {
                ensure(self.is_user(user), "only members have a profile")
            }
            (Author::User(user), Body::Leave(leave)) => {
                let owns = || self.is_user(user) && self.owns_claims(user, leave);
                ensure(self.is_admin(user) || owns(), "only its owner or an admin removes a node")
            }
            (Author::Node(node), Body::Leave(leave)) => {
                let own = node == leave.node && self.is_member(node);
                ensure(own, "a node leaves only for itself")
            }
            (Author::Node(_), Body::Invite(_) | Body::Profile(_)) => Err("this takes a user's key"),
            (Author::User(_), Body::Accept { .. } | Body::AdmitNode(_)) => {
                Err("this takes a node's key")
            }
        }
    }

    fn holds(self, index: usize) -> bool {
        self.past.contains(index) && self.live.is_none_or(|live| live[index])
    }

    fn is_user(self, user: UserId) -> bool {
        self.graph.founders.contains(&user) || self.accepts(user).next().is_some()
    }

    fn is_admin(self, user: UserId) -> bool {
        self.graph.founders.contains(&user)
            || self.accepts(user).any(|index| match &self.graph.entries[index].body {
                Body::Accept { invite, .. } => self.graph.invite(*invite).rights == Rights::Admin,
                Body::Invite(_) | Body::AdmitNode(_) | Body::Profile(_) | Body::Leave(_) => false,
            })
    }

    fn accepts(self, user: UserId) -> impl Iterator<Item = usize> {
        let accepts = self.graph.accepts.get(&user).into_iter().flatten();
        accepts.copied().filter(move |&index| self.holds(index))
    }

    fn is_member(self, node: PeerId) -> bool {
        self.graph.claims.get(&node).is_some_and(|claims| {
            claims
                .values()
                .any(|c| c.grants.iter().any(|&index| self.holds(index)) && !self.is_ended(c))
        })
    }

    fn has_ended(self, grant: &Grant) -> bool {
        let claims = self.graph.claims.get(&grant.claim.node);
        claims.and_then(|claims| claims.get(&grant.id)).is_some_and(|c| self.is_ended(c))
    }

    fn is_ended(self, claim: &ClaimUse) -> bool {
        self.live.is_some() && claim.leaves.iter().any(|&index| self.holds(index))
    }

    fn owns_claims(self, user: UserId, leave: &Leave) -> bool {
        let Some(claims) = self.graph.claims.get(&leave.node) else { return false };
        leave.claims.iter().all(|claim| {
            let grants = claims.get(claim).into_iter().flat_map(|c| &c.grants);
            // Every grant of one claim carries the same claim, so the first tells.
            grants.take(1).any(|&index| match &self.graph.entries[index].body {
                Body::Accept { grant, .. } | Body::AdmitNode(grant) => grant.claim.user == user,
                Body::Invite(_) | Body::Profile(_) | Body::Leave(_) => false,
            })
        })
    }
}

impl Graph {
    /// The invite at `index`, which an accept refers to.
    pub(super) fn invite(&self, index: usize) -> &Invite {
        match &self.entries[index].body {
            Body::Invite(invite) => invite,
            Body::Accept { .. } | Body::AdmitNode(_) | Body::Profile(_) | Body::Leave(_) => {
                unreachable!("an accept is admitted only if its invite is one")
            }
        }
    }

    /// Statements that a draft of `author` needs among what it has seen: its own
    /// last, what lets it in, and what `kind` refers to.
    pub(super) fn needed(&self, author: Author, device: DeviceId, kind: &Kind) -> Vec<usize> {
        let mut needed = Vec::new();
        if let Some(said) = self.slots.get(&(author, device, self.last_seq(author, device))) {
            needed.extend(said);
        }
        let mut person = |user: &UserId| {
            needed.extend(self.accepts.get(user).into_iter().flatten().take(PROOFS_MAX));
        };
        match author {
            Author::User(user) => person(&user),
            Author::Node(node) => needed.extend(self.grants_of(node)),
        }
        match kind {
            Kind::Accept(accept) => needed.extend(self.index_of(accept.invite)),
            Kind::AdmitNode(admit) => {
                let owner = admit.claim.open().map(|claim| claim.user);
                let accepts = owner.ok().and_then(|user| self.accepts.get(&user));
                needed.extend(accepts.into_iter().flatten().take(PROOFS_MAX));
            }
            Kind::Leave(leave) => needed.extend(self.grants_of(leave.node)),
            Kind::Invite(_) | Kind::Profile(_) => {}
        }
        needed
    }

    fn grants_of(&self, node: PeerId) -> impl Iterator<Item = usize> {
        let claims = self.claims.get(&node).into_iter().flat_map(BTreeMap::values);
        claims.flat_map(|claim| &claim.grants).copied().take(PROOFS_MAX)
    }
}

/// How many grants of one member a draft makes sure to have seen.
const PROOFS_MAX: usize = 4;

/// A set of indices, one bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Indices(Vec<u64>);

impl Indices {
    pub(super) fn contains(&self, index: usize) -> bool {
        self.0.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    pub(super) fn insert(&mut self, index: usize) {
        if self.0.len() <= index / 64 {
            self.0.resize(index / 64 + 1, 0);
        }
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn union(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_or_joined() {
        let (mut low, mut high) = (Indices::default(), Indices::default());
        low.insert(3);
        high.insert(200);
        low.union(&high);
        assert!(low.contains(3) && low.contains(200));
        assert!(!low.contains(4) && !low.contains(4000));
    }
}
