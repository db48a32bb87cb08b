//! The door: what a newcomer, or a member whose roster may be stale, says first, and
//! how a member node judges it.
//!
//! Judgement comes before anything else of the pool is spoken, and before it nothing
//! of the pool is shown: a refusal names a rule, never a member. One connection, one
//! [`Hello`], one [`Reply`]. A joiner is welcomed with statements enough to be a
//! member; whoever reconciles gives what it knows the other lacks and gets what it
//! lacks itself, and both repeat until their heads agree. The peer id that `from`
//! carries is the one the connection proved.

use serde::{Deserialize, Serialize};

use crate::{
    identity::{BootId, KeyPair, PeerId, PoolId, SignedBytes, StatementId, StoreId},
    roster::{
        Accept, AdmitNode, Author, CLAIM_AGE_MS_MAX, DeviceId, DraftError, GenesisError, JoinClaim,
        Kind, Name, Rejected, Rights, Roster, SignedClaim, WALL_TOLERANCE_MS, invite_proof_holds,
    },
    time::Now,
    wire::{MESSAGE_BYTES_MAX, WIRE_VERSION},
};

mod book;

pub use book::{DoorBook, REFUSAL_MS, REFUSALS_PER_PEER_MAX, REFUSED_PEERS_MAX};

/// How many bytes of statements one message carries; the rest of a message (genesis,
/// heads) stays below what this leaves of [`MESSAGE_BYTES_MAX`].
pub const STATEMENTS_BYTES_MAX: usize = MESSAGE_BYTES_MAX * 3 / 4;

/// The wire versions this program speaks, first and last.
pub const VERSIONS: (u16, u16) = (WIRE_VERSION, WIRE_VERSION);

/// The first message, from whoever comes to the door.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The wire versions it speaks, first and last.
    pub versions: (u16, u16),
    /// The pool it means.
    pub pool: PoolId,
    /// Its journal directory.
    pub store: StoreId,
    /// Its daemon's current run.
    pub boot: BootId,
    /// Its wall clock.
    pub wall_ms: u64,
    /// What it wants.
    pub purpose: Purpose,
}

/// What one comes to the door for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// To become a member.
    Join(JoinRequest),
    /// To bring two members' rosters together.
    Reconcile(Reconcile),
}

/// A newcomer's request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Who comes, with which machine.
    pub claim: SignedClaim,
    /// The invite; not needed where the user is a member already.
    pub invite: Option<InviteUse>,
}

/// An invite and the proof of holding its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteUse {
    /// The invite.
    pub invite: StatementId,
    /// By its key, over this claim.
    pub proof: SignedBytes,
}

/// A member's heads, and statements that the door may lack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconcile {
    /// All heads of the sender.
    pub heads: Vec<StatementId>,
    /// Statements, causes first. A member that the door does not know yet brings
    /// those that make it one.
    pub statements: Vec<SignedBytes>,
}

/// The door's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To a joiner: it is a member now.
    Welcome(Welcome),
    /// To a member.
    Reconciled(Reconciled),
    /// To anybody else.
    Refused(Refusal),
}

/// What makes a newcomer's roster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Hashes to the pool's id.
    pub genesis: Vec<u8>,
    /// Statements, causes first; the first part where not all fit.
    pub statements: Vec<SignedBytes>,
    /// All heads of the door.
    pub heads: Vec<StatementId>,
    /// What the newcomer's machine is called.
    pub node_name: Name,
}

/// What the other lacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// Statements, causes first; the first part where not all fit.
    pub statements: Vec<SignedBytes>,
    /// All heads of the door.
    pub heads: Vec<StatementId>,
}

/// A no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The rule.
    pub code: RefusalCode,
    /// For people, with what to do next.
    pub message: String,
    /// When asking again is answered anew, where it is not at once.
    pub retry_after_ms: Option<u64>,
}

/// Which rule refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RefusalCode {
    /// No wire version in common.
    Version,
    /// This node is not of that pool.
    OtherPool,
    /// The wall clocks are too far apart.
    Clock,
    /// The user is no member and brought no invite.
    InviteNeeded,
    /// The invite is not known here.
    InviteUnknown,
    /// The invite has ended.
    InviteExpired,
    /// The invite has let in as many as it may.
    InviteUsedUp,
    /// A signature does not hold, or is not for this.
    BadProof,
    /// The claim is too old, or admitted the machine once already.
    ClaimStale,
    /// Another user has that name.
    UsernameTaken,
    /// The machine belongs to another user.
    OtherOwner,
    /// The sender is not a member by what is known here.
    NotAMember,
    /// This node cannot admit anybody now.
    CannotAdmit,
    /// Too many different refused requests in a minute.
    TooMany,
}

/// Judge who came to the door of node `me`, of home `device`.
///
/// The second part is what joined the roster by it, causes first: to be made durable
/// before the reply is sent.
pub fn judge(
    roster: &mut Roster,
    me: &KeyPair,
    device: DeviceId,
    from: PeerId,
    hello: Hello,
    now: Now,
) -> (Reply, Vec<SignedBytes>) {
    if let Err(refusal) = check_hello(roster, &hello, now) {
        return (Reply::Refused(refusal), Vec::new());
    }
    match hello.purpose {
        Purpose::Join(request) => match join(roster, me, device, from, &request, now) {
            Ok((welcome, added)) => (Reply::Welcome(welcome), added),
            Err(refusal) => (Reply::Refused(refusal), Vec::new()),
        },
        Purpose::Reconcile(reconcile) => take_reconcile(roster, from, reconcile),
    }
}

/// The answer to a first message that is no [`Hello`] of this version.
#[must_use]
pub fn judge_unreadable() -> Reply {
    Reply::Refused(refusal(
        RefusalCode::Version,
        format!(
            "the node you came to speaks wire version {WIRE_VERSION} and cannot read what your \
             p2pit says: `p2pit --version` on both machines, then update the older one"
        ),
    ))
}

/// A newcomer's roster.
#[derive(Debug)]
pub struct Welcomed {
    /// Its first statements.
    pub roster: Roster,
    /// What its machine is called.
    pub node_name: Name,
    /// Whether it holds all that the door holds; else it goes on to reconcile.
    pub complete: bool,
}

/// Why a welcome or what a peer sent to reconcile is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WelcomeError {
    /// The genesis does not decode.
    #[error("the door's genesis is none")]
    Genesis(#[source] GenesisError),
    /// The genesis is another pool's.
    #[error("the door answered for pool {got}, not for {expected}: ask for a new ticket")]
    OtherPool {
        /// The pool of the ticket.
        expected: PoolId,
        /// The pool of the door.
        got: PoolId,
    },
    /// A statement of the door is not good.
    #[error("the door sent a statement that does not hold")]
    Statement(#[source] Rejected),
}

/// The newcomer's side: make a roster of the door's welcome to `pool`.
///
/// # Errors
/// [`WelcomeError`] where the door does not answer for that pool.
pub fn welcome(pool: PoolId, welcome: Welcome) -> Result<Welcomed, WelcomeError> {
    let got = PoolId::of(&welcome.genesis);
    if got != pool {
        return Err(WelcomeError::OtherPool { expected: pool, got });
    }
    let mut roster = Roster::new(welcome.genesis).map_err(WelcomeError::Genesis)?;
    for signed in welcome.statements {
        roster.insert(signed).map_err(WelcomeError::Statement)?;
    }
    let complete = welcome.heads.iter().all(|&head| roster.contains(head));
    Ok(Welcomed { roster, node_name: welcome.node_name, complete })
}

impl Reconcile {
    /// The first word to a member: asks for what this roster lacks.
    #[must_use]
    pub fn asking(roster: &Roster) -> Self {
        Self { heads: roster.heads(), statements: Vec::new() }
    }

    /// Asks, and brings what a member with these heads lacks, as far as it fits.
    #[must_use]
    pub fn bringing(roster: &Roster, their_heads: &[StatementId]) -> Self {
        let statements = roster.statements_unknown_to(their_heads, STATEMENTS_BYTES_MAX);
        Self { heads: roster.heads(), statements }
    }

    /// For a door that does not know this member yet and so tells it nothing: asks,
    /// and brings the newest statements that fit, its own admission among them.
    #[must_use]
    pub fn introducing(roster: &Roster) -> Self {
        let statements = roster.newest_statements(STATEMENTS_BYTES_MAX);
        Self { heads: roster.heads(), statements }
    }
}

impl Reconciled {
    /// Take in what the door sent; what was new, and whether nothing is left to
    /// exchange in either direction.
    ///
    /// # Errors
    /// [`Rejected`] at the first statement that does not hold; those before it stay.
    pub fn take(self, roster: &mut Roster) -> (Vec<SignedBytes>, Result<bool, Rejected>) {
        let mut added = Vec::new();
        for signed in self.statements {
            match roster.insert(signed) {
                Ok(inserted) => added.extend(inserted.added),
                Err(rejected) => return (signed_bytes(roster, &added), Err(rejected)),
            }
        }
        let mut theirs = self.heads;
        theirs.sort_unstable();
        (signed_bytes(roster, &added), Ok(theirs == roster.heads()))
    }
}

fn check_hello(roster: &Roster, hello: &Hello, now: Now) -> Result<(), Refusal> {
    let (first, last) = hello.versions;
    if !(first..=last).contains(&WIRE_VERSION) {
        let theirs = if first == last { last.to_string() } else { format!("{first} to {last}") };
        let next = if last < WIRE_VERSION {
            "update p2pit on your machine"
        } else {
            "update p2pit on that node, or take the version that it has"
        };
        return Err(refusal(
            RefusalCode::Version,
            format!(
                "your p2pit speaks wire version {theirs}, the node you came to speaks \
                 {WIRE_VERSION}: {next}"
            ),
        ));
    }
    if hello.pool != roster.pool() {
        return Err(refusal(
            RefusalCode::OtherPool,
            "this node is not in that pool: ask for a new ticket",
        ));
    }
    let apart_ms = hello.wall_ms.abs_diff(now.wall_ms);
    if apart_ms > WALL_TOLERANCE_MS {
        let side = if hello.wall_ms > now.wall_ms { "ahead of" } else { "behind" };
        let message = format!(
            "your clock is {} s {side} that of the node you came to, at most {} s is allowed: \
             `date -u` on both machines shows whose is wrong",
            apart_ms / 1000,
            WALL_TOLERANCE_MS / 1000
        );
        return Err(refusal(RefusalCode::Clock, message));
    }
    Ok(())
}

fn join(
    roster: &mut Roster,
    me: &KeyPair,
    device: DeviceId,
    from: PeerId,
    request: &JoinRequest,
    now: Now,
) -> Result<(Welcome, Vec<SignedBytes>), Refusal> {
    let claim = check_claim(roster, from, &request.claim)?;
    let by_invite = check_invite(roster, &claim, request, now)?;
    if let Some(node) = roster.state().nodes.get(&from) {
        if node.owner != claim.user {
            return Err(refusal(
                RefusalCode::OtherOwner,
                "this machine is in the pool under another user: that user says `p2pit leave` first",
            ));
        }
        if by_invite.is_none() {
            return Ok((make_welcome(roster, node.name.clone()), Vec::new()));
        }
    }
    if claim.wall_ms.abs_diff(now.wall_ms) > CLAIM_AGE_MS_MAX {
        return Err(refusal(
            RefusalCode::ClaimStale,
            "the request to join was signed too long ago: join again",
        ));
    }
    let taken = |name: &Name| roster.state().node_named(name).is_some_and(|other| other != from);
    let node_name = claim.node_name.first_free(taken);
    let signed_claim = request.claim.clone();
    let kind = match by_invite {
        Some(InviteUse { invite, proof }) => {
            Kind::Accept(Accept { invite, claim: signed_claim, invite_proof: proof, node_name })
        }
        None => Kind::AdmitNode(AdmitNode { claim: signed_claim, node_name }),
    };
    let added = admit(roster, me, device, kind, now)?;
    let node_name = match roster.state().nodes.get(&from) {
        Some(node) => node.name.clone(),
        None => {
            return Err(refusal(
                RefusalCode::ClaimStale,
                "this request to join admitted the machine before: join again",
            ));
        }
    };
    Ok((make_welcome(roster, node_name), added))
}

fn check_claim(roster: &Roster, from: PeerId, signed: &SignedClaim) -> Result<JoinClaim, Refusal> {
    let bad = |why: String| refusal(RefusalCode::BadProof, format!("{why}: join again"));
    let claim = signed.open().map_err(|error| bad(error.to_string()))?;
    if claim.pool != roster.pool() {
        return Err(bad("the request to join is for another pool".to_owned()));
    }
    if claim.node != from {
        return Err(bad("the request to join is of another machine".to_owned()));
    }
    Ok(claim)
}

/// The invite to be used, if the claim's user needs one and brought a good one.
fn check_invite(
    roster: &Roster,
    claim: &JoinClaim,
    request: &JoinRequest,
    now: Now,
) -> Result<Option<InviteUse>, Refusal> {
    let state = roster.state();
    let is_member = state.is_member_user(claim.user);
    let Some(invite_use) = &request.invite else {
        if is_member {
            return Ok(None);
        }
        return Err(refusal(
            RefusalCode::InviteNeeded,
            "you are not a user of this pool: join with a ticket, or with the key of the user you \
             are by `--identity`",
        ));
    };
    let Some(invite) = state.invites.get(&invite_use.invite) else {
        if is_member {
            return Ok(None);
        }
        return Err(refusal(
            RefusalCode::InviteUnknown,
            "this node does not know that ticket: try again in a minute, or ask for a new one",
        ));
    };
    let claim_id = request.claim.id();
    let (proof, id) = (&invite_use.proof, invite_use.invite);
    if !invite_proof_holds(proof, invite.key, roster.pool(), id, claim_id) {
        return Err(refusal(
            RefusalCode::BadProof,
            "the ticket's secret is not the invited one: ask for a new ticket",
        ));
    }
    // A member uses a ticket only for a right that it has not got.
    let gains = invite.rights == Rights::Admin && !state.is_admin(claim.user);
    if is_member && !gains {
        return Ok(None);
    }
    if now.wall_ms >= invite.expires_wall_ms {
        let ago_s = (now.wall_ms - invite.expires_wall_ms) / 1000;
        return Err(refusal(
            RefusalCode::InviteExpired,
            format!("the ticket expired {ago_s} s ago: ask an admin for a new one"),
        ));
    }
    if !invite.has_use_left() {
        return Err(refusal(
            RefusalCode::InviteUsedUp,
            "the ticket has been used as often as it may: ask an admin for a new one",
        ));
    }
    if !is_member && state.user_named(&claim.username).is_some() {
        return Err(refusal(
            RefusalCode::UsernameTaken,
            format!(
                "the pool has a user `{0}` with another key: if that is you, join with that key by \
                 `--identity`, else choose another user name",
                claim.username
            ),
        ));
    }
    Ok(Some(invite_use.clone()))
}

fn admit(
    roster: &mut Roster,
    me: &KeyPair,
    device: DeviceId,
    kind: Kind,
    now: Now,
) -> Result<Vec<SignedBytes>, Refusal> {
    let author = Author::Node(PeerId(me.public()));
    let cannot = |why: &dyn core::fmt::Display| {
        let message = format!("this node cannot admit anybody ({why}): try another door");
        refusal(RefusalCode::CannotAdmit, message)
    };
    if !roster.state().is_member_node(PeerId(me.public())) {
        return Err(cannot(&"it is not a member itself"));
    }
    let draft = roster.draft(author, device, kind, now.wall_ms).map_err(|error| match error {
        // All other rights were checked, so this is the claim's.
        DraftError::Rejected(Rejected::NoRight { why, .. }) => {
            refusal(RefusalCode::ClaimStale, format!("{why}: join again"))
        }
        other => cannot(&other),
    })?;
    let signed = draft.sign(me).map_err(|error| cannot(&error))?;
    let inserted = roster.insert_drafted(signed).map_err(|error| cannot(&error))?;
    Ok(signed_bytes(roster, &inserted.added))
}

fn take_reconcile(
    roster: &mut Roster,
    from: PeerId,
    reconcile: Reconcile,
) -> (Reply, Vec<SignedBytes>) {
    let added = if roster.state().is_member_node(from) {
        take_from_member(roster, reconcile.statements)
    } else {
        take_from_unknown(roster, from, reconcile.statements)
    };
    let added = signed_bytes(roster, &added);
    if !roster.state().is_member_node(from) {
        let message = "this machine is not a member by what this node knows: bring the statements \
                       that admit it, or join with a ticket";
        return (Reply::Refused(refusal(RefusalCode::NotAMember, message)), added);
    }
    let statements = roster.statements_unknown_to(&reconcile.heads, STATEMENTS_BYTES_MAX);
    (Reply::Reconciled(Reconciled { statements, heads: roster.heads() }), added)
}

fn take_from_member(roster: &mut Roster, statements: Vec<SignedBytes>) -> Vec<StatementId> {
    let mut added = Vec::new();
    for signed in statements {
        match roster.insert(signed) {
            Ok(inserted) => added.extend(inserted.added),
            Err(error) => tracing::debug!(%error, "a member's statement is not taken in"),
        }
    }
    added
}

/// From somebody unknown: either statements that make it a member, or nothing at all.
/// The first that does not hold ends it, so a stranger costs one verification.
fn take_from_unknown(
    roster: &mut Roster,
    from: PeerId,
    statements: Vec<SignedBytes>,
) -> Vec<StatementId> {
    if statements.is_empty() {
        return Vec::new();
    }
    let mut trial = roster.clone();
    let mut added = Vec::new();
    for signed in statements {
        match trial.insert(signed) {
            Ok(inserted) if inserted.new && inserted.added.is_empty() => return Vec::new(),
            Ok(inserted) => added.extend(inserted.added),
            Err(error) => {
                tracing::debug!(%error, "an unknown peer's statement is not taken in");
                return Vec::new();
            }
        }
    }
    if !trial.state().is_member_node(from) {
        return Vec::new();
    }
    *roster = trial;
    added
}

fn make_welcome(roster: &Roster, node_name: Name) -> Welcome {
    Welcome {
        genesis: roster.genesis_bytes().to_vec(),
        statements: roster.statements_unknown_to(&[], STATEMENTS_BYTES_MAX),
        heads: roster.heads(),
        node_name,
    }
}

fn signed_bytes(roster: &Roster, ids: &[StatementId]) -> Vec<SignedBytes> {
    ids.iter().filter_map(|&id| roster.get(id)).cloned().collect()
}

fn refusal(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal { code, message: message.into(), retry_after_ms: None }
}

#[cfg(test)]
mod tests;
