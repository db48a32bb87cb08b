//! What the statements amount to, and who may do what.

use std::collections::BTreeMap;

use super::{ClaimId, Name, Rights};
use crate::identity::{PeerId, PublicKey, StatementId, UserId};

/// Users, nodes and invites of a pool, as all known statements together say.
///
/// Names are labels: unique here, but a merge may put a number behind the later of
/// two that were taken at the same time. Whatever decides something goes by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// Members.
    pub users: BTreeMap<UserId, User>,
    /// Their machines.
    pub nodes: BTreeMap<PeerId, Node>,
    /// Invites, expired and used-up ones included.
    pub invites: BTreeMap<StatementId, InviteState>,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Unique in this state.
    pub username: Name,
    /// The name in full, as the user gave it.
    pub full_name: Option<String>,
    /// The e-mail address, as the user gave it.
    pub email: Option<String>,
    /// Whether the user may invite and act on everybody's jobs and machines.
    pub admin: bool,
    /// When the user came in, by the clock of who admitted them.
    pub since_wall_ms: u64,
}

/// A member's machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Unique in this state.
    pub name: Name,
    /// Whose it is.
    pub owner: UserId,
    /// Whether it offers nothing.
    pub client: bool,
    /// When it came in, by the clock of who admitted it.
    pub since_wall_ms: u64,
    /// The claims it is a member by, ascending: a leave names them.
    pub claims: Vec<ClaimId>,
}

/// An invite and how far it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InviteState {
    /// The key whose holder it lets in.
    pub key: PublicKey,
    /// What they may do.
    pub rights: Rights,
    /// How many users it lets in; `None` is any number.
    pub uses: Option<u32>,
    /// How many it has let in.
    pub used: u32,
    /// When doors stop taking it.
    pub expires_wall_ms: u64,
    /// Who invited.
    pub author: UserId,
}

impl InviteState {
    /// Whether another user may come in by it, its expiry apart.
    #[must_use]
    pub fn has_use_left(&self) -> bool {
        self.uses.is_none_or(|uses| self.used < uses)
    }
}

impl State {
    /// Whether `user` is a member.
    #[must_use]
    pub fn is_member_user(&self, user: UserId) -> bool {
        self.users.contains_key(&user)
    }

    /// Whether `peer` is a member's machine.
    #[must_use]
    pub fn is_member_node(&self, peer: PeerId) -> bool {
        self.nodes.contains_key(&peer)
    }

    /// Whether `user` is an admin.
    #[must_use]
    pub fn is_admin(&self, user: UserId) -> bool {
        self.users.get(&user).is_some_and(|user| user.admin)
    }

    /// Whether `user` may invite others: admins only, since a user who comes in can
    /// bring machines and read what is shared.
    #[must_use]
    pub fn may_invite(&self, user: UserId) -> bool {
        self.is_admin(user)
    }

    /// Whether `user` may see status, log and files of a job of `owner`.
    #[must_use]
    pub fn may_read_job(&self, user: UserId, owner: UserId) -> bool {
        self.may_control_job(user, owner)
    }

    /// Whether `user` may stop or change a job of `owner`.
    #[must_use]
    pub fn may_control_job(&self, user: UserId, owner: UserId) -> bool {
        self.is_admin(user) || (user == owner && self.is_member_user(user))
    }

    /// The member called `name`.
    #[must_use]
    pub fn user_named(&self, name: &Name) -> Option<UserId> {
        self.users.iter().find(|(_, user)| user.username == *name).map(|(&id, _)| id)
    }

    /// The machine called `name`.
    #[must_use]
    pub fn node_named(&self, name: &Name) -> Option<PeerId> {
        self.nodes.iter().find(|(_, node)| node.name == *name).map(|(&id, _)| id)
    }
}
