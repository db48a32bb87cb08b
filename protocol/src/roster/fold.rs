//! The fold: from a set of statements to one state, whatever order they came in.
//!
//! Statements are visited by (depth, id), so causes come before effects. One applies
//! iff its author and device were not suspended from its number on (two different
//! statements under one number: both void, and what follows on that device), and its
//! author had the right by statements that it had seen and that apply themselves.
//! Nothing looks at a clock, and nothing outside its past gives a statement a right,
//! so a statement made late with old parents gains nothing by its date. Accepts
//! beyond an invite's uses give nothing: earlier in this order wins.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Author, ClaimId, Genesis, Leave, NODE_CLAIMS_MAX, Name, Profile, Rights,
    graph::{Body, Entry, Grant, Graph, View},
    state::{InviteState, Node, State, User},
};
use crate::identity::{PeerId, UserId};

/// The outcome of a fold.
#[derive(Debug, Clone)]
pub(super) struct Folded {
    pub(super) state: State,
    /// By index in the graph: whether the statement applies.
    pub(super) live: Vec<bool>,
}

pub(super) fn fold(genesis: &Genesis, graph: &Graph) -> Folded {
    let mut building = Building::from_genesis(genesis);
    let mut live = vec![false; graph.len()];
    for index in graph.order() {
        let entry = graph.entry(index);
        let suspended = graph.suspended_from(entry.author, entry.device);
        let in_order = suspended.is_none_or(|from| entry.seq < from);
        let allowed =
            || View::folded(graph, &entry.past, &live).allows(entry.author, &entry.body).is_ok();
        if in_order && allowed() {
            live[index] = building.apply(graph, entry);
        }
    }
    Folded { state: building.state, live }
}

#[derive(Debug, Default)]
struct Building {
    state: State,
    usernames: Names,
    node_names: Names,
    /// Users let in, by invite.
    used: BTreeMap<usize, BTreeSet<UserId>>,
    /// Claims that count, by node, in the order they came.
    held: BTreeMap<PeerId, Vec<Held>>,
    ended: BTreeSet<ClaimId>,
}

#[derive(Debug)]
struct Held {
    id: ClaimId,
    owner: UserId,
    client: bool,
    name: Name,
    since_wall_ms: u64,
}

impl Building {
    fn from_genesis(genesis: &Genesis) -> Self {
        let mut building = Self::default();
        for founder in &genesis.founders {
            let username = building.usernames.take(&founder.username);
            let user = User {
                username,
                full_name: founder.full_name.clone(),
                email: None,
                admin: true,
                since_wall_ms: genesis.created_wall_ms,
            };
            building.state.users.insert(founder.user, user);
        }
        building
    }

    /// Carry out what a statement with the right to it says; `false` where it comes
    /// too late to give anything.
    fn apply(&mut self, graph: &Graph, entry: &Entry) -> bool {
        match (&entry.body, entry.author) {
            (Body::Invite(invite), Author::User(author)) => {
                let invite = InviteState {
                    key: invite.key,
                    rights: invite.rights,
                    uses: invite.uses,
                    used: 0,
                    expires_wall_ms: invite.expires_wall_ms,
                    author,
                };
                self.state.invites.insert(entry.id, invite);
                true
            }
            (Body::Accept { invite, grant }, _) => {
                self.has_room(grant) && self.accept(graph, *invite, grant, entry.not_before_ms)
            }
            (Body::AdmitNode(grant), _) => {
                self.has_room(grant) && {
                    self.grant(grant, entry.not_before_ms);
                    true
                }
            }
            (Body::Profile(profile), Author::User(user)) => {
                self.profile(user, profile);
                true
            }
            (Body::Leave(leave), _) => {
                self.leave(leave);
                true
            }
            (Body::Invite(_) | Body::Profile(_), Author::Node(_)) => false,
        }
    }

    fn has_room(&self, grant: &Grant) -> bool {
        self.held.get(&grant.claim.node).is_none_or(|held| {
            held.len() < NODE_CLAIMS_MAX || held.iter().any(|held| held.id == grant.id)
        })
    }

    fn accept(&mut self, graph: &Graph, invite: usize, grant: &Grant, wall_ms: u64) -> bool {
        let (user, terms) = (grant.claim.user, graph.invite(invite));
        let used = self.used.entry(invite).or_default();
        let has_use = terms.uses.is_none_or(|uses| used.len() < uses as usize);
        if !used.contains(&user) && !has_use {
            return false;
        }
        used.insert(user);
        let used = u32::try_from(used.len()).unwrap_or(u32::MAX);
        if let Some(state) = self.state.invites.get_mut(&graph.entry(invite).id) {
            state.used = used;
        }
        let admin = terms.rights == Rights::Admin;
        match self.state.users.get_mut(&user) {
            Some(known) => known.admin |= admin,
            None => {
                let user_state = User {
                    username: self.usernames.take(&grant.claim.username),
                    full_name: grant.claim.full_name.clone().filter(|name| !name.is_empty()),
                    email: None,
                    admin,
                    since_wall_ms: wall_ms,
                };
                self.state.users.insert(user, user_state);
            }
        }
        self.grant(grant, wall_ms);
        true
    }

    fn grant(&mut self, grant: &Grant, since_wall_ms: u64) {
        let node = grant.claim.node;
        let held = self.held.entry(node).or_default();
        // A claim that a concurrent leave ended stays ended, and counts only once.
        if self.ended.contains(&grant.id) || held.iter().any(|held| held.id == grant.id) {
            return;
        }
        held.push(Held {
            id: grant.id,
            owner: grant.claim.user,
            client: grant.claim.client,
            name: grant.node_name.clone(),
            since_wall_ms,
        });
        self.refresh(node);
    }

    fn leave(&mut self, leave: &Leave) {
        self.ended.extend(&leave.claims);
        if let Some(held) = self.held.get_mut(&leave.node) {
            held.retain(|held| !leave.claims.contains(&held.id));
            self.refresh(leave.node);
        }
    }

    /// A node is as its newest claim says.
    fn refresh(&mut self, peer: PeerId) {
        let held = self.held.get(&peer).map_or(&[][..], Vec::as_slice);
        let before = self.state.nodes.remove(&peer);
        if let Some(before) = &before {
            self.node_names.release(&before.name);
        }
        let Some(newest) = held.last() else { return };
        let keeps = before.filter(|before| before.name.is_variant_of(&newest.name));
        let name = self.node_names.take(keeps.as_ref().map_or(&newest.name, |node| &node.name));
        let mut claims: Vec<_> = held.iter().map(|held| held.id).collect();
        claims.sort_unstable();
        let node = Node {
            name,
            owner: newest.owner,
            client: newest.client,
            since_wall_ms: newest.since_wall_ms,
            claims,
        };
        self.state.nodes.insert(peer, node);
    }

    fn profile(&mut self, user: UserId, profile: &Profile) {
        let Some(known) = self.state.users.get_mut(&user) else { return };
        if let Some(wished) = &profile.username {
            self.usernames.release(&known.username);
            known.username = self.usernames.take(wished);
        }
        let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        if let Some(full_name) = &profile.full_name {
            known.full_name = given(full_name);
        }
        if let Some(email) = &profile.email {
            known.email = given(email);
        }
    }
}

/// Names in use. Of two that wish the same, the later gets a number.
#[derive(Debug, Default)]
struct Names {
    taken: BTreeSet<Name>,
    /// The number to try next for a name, so that a thousand of one name cost a
    /// thousand tries and not half a million.
    next: BTreeMap<Name, u32>,
}

impl Names {
    fn take(&mut self, wished: &Name) -> Name {
        let mut name = wished.clone();
        while self.taken.contains(&name) {
            let next = self.next.entry(wished.clone()).or_insert(2);
            name = wished.variant(*next);
            *next = next.saturating_add(1);
        }
        self.taken.insert(name.clone());
        name
    }

    fn release(&mut self, name: &Name) {
        self.taken.remove(name);
    }
}
