//! What members say about the pool: statements, their bounds, and drafts of them.

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{ClaimError, ClaimId, Name, SignedClaim};
use crate::{
    identity::{Domain, KeyPair, PeerId, PoolId, PublicKey, SignedBytes, StatementId, UserId},
    wire::{self, DecodeError},
};

/// The longest encoding of one statement, in bytes.
pub const STATEMENT_BYTES_MAX: usize = 8 << 10;

/// The most parents a statement may name. More heads than that are merged by more
/// statements.
pub const PARENTS_MAX: usize = 16;

/// The most claims a node holds at a time, and so the most that one leave ends.
pub const NODE_CLAIMS_MAX: usize = 16;

/// The longest full name or e-mail address, in bytes.
pub const TEXT_BYTES_MAX: usize = 254;

/// One thing said about the pool by one of its members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// The pool it is about.
    pub pool: PoolId,
    /// Whose key signs it.
    pub author: Author,
    /// The home it was made in.
    pub device: DeviceId,
    /// Counts this author's statements from this device, from 1, without gap.
    pub seq: u64,
    /// The heads its author had seen, in ascending order. None: only the genesis.
    pub parents: Vec<StatementId>,
    /// What it says.
    pub kind: Kind,
    /// From when it is meant, by the author's wall clock. For people to read:
    /// neither order nor validity depends on it.
    pub not_before_ms: u64,
    /// Until when it is meant; as little binding as `not_before_ms`.
    pub not_after_ms: u64,
}

/// Who makes a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Author {
    /// A person, by a signature made in the CLI.
    User(UserId),
    /// A machine's daemon.
    Node(PeerId),
}

impl Author {
    /// The key that signs for this author.
    #[must_use]
    pub fn key(self) -> PublicKey {
        match self {
            Self::User(user) => user.0,
            Self::Node(node) => node.0,
        }
    }
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(user) => write!(f, "user {user}"),
            Self::Node(node) => write!(f, "node {node}"),
        }
    }
}

/// One home directory of an author. Sequences run per device, so that a second
/// laptop or a restored backup, being another device, contradicts nobody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceId(pub [u8; 16]);

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0[..4]))
    }
}

/// What a statement says. The order of the variants is part of the wire format:
/// new ones go to the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// An admin lets holders of a key in.
    Invite(Invite),
    /// A member node, asked at its door, let a user with a machine in by an invite.
    Accept(Accept),
    /// A member user brings a machine, without any invite: said by a member node at
    /// its door, or by the machine itself (the first of a pool has no door to go to).
    AdmitNode(AdmitNode),
    /// A user about itself.
    Profile(Profile),
    /// A machine leaves: said by itself, by the owner named in the ended claims, or
    /// by an admin.
    Leave(Leave),
}

/// An invitation, whose secret key travels in a ticket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// What a joiner must prove to hold the secret of.
    pub key: PublicKey,
    /// What who comes in by it may do.
    pub rights: Rights,
    /// How many users it lets in; `None` is any number.
    pub uses: Option<u32>,
    /// When doors stop taking it, by their wall clocks.
    pub expires_wall_ms: u64,
}

/// What a user may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Rights {
    /// Bring machines, run jobs.
    User,
    /// Also invite, and do to every job and machine what its owner may.
    Admin,
}

/// An invite being used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The invite.
    pub invite: StatementId,
    /// Who comes in, with which machine.
    pub claim: SignedClaim,
    /// By the invite's key, over pool, invite and claim.
    pub invite_proof: SignedBytes,
    /// The machine's name: as wished, or with the number the door put behind it.
    pub node_name: Name,
}

/// A member's machine coming in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmitNode {
    /// The owner and the machine.
    pub claim: SignedClaim,
    /// As in [`Accept`].
    pub node_name: Name,
}

/// Changes to a user's own entry; `None` leaves a field as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Another name in the pool.
    pub username: Option<Name>,
    /// The name in full; empty takes it away.
    pub full_name: Option<String>,
    /// The e-mail address; empty takes it away.
    pub email: Option<String>,
}

/// The end of some of a node's claims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// The machine.
    pub node: PeerId,
    /// The claims that end, as its entry in the state lists them. A node is a member
    /// while it has one that no leave ended.
    pub claims: Vec<ClaimId>,
}

/// Why a statement is not taken in.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Rejected {
    /// More than [`STATEMENT_BYTES_MAX`].
    #[error("statement of {got} bytes where at most {STATEMENT_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        got: usize,
    },
    /// The signature does not verify.
    #[error("signature of the statement does not verify")]
    Signature,
    /// Not the bytes of a statement.
    #[error("statement does not decode")]
    Malformed(#[source] DecodeError),
    /// Said about another pool.
    #[error("statement is about pool {0}")]
    OtherPool(PoolId),
    /// Signed by another key than its author's.
    #[error("statement of {0} is signed by another key")]
    NotItsAuthor(Author),
    /// A field beyond its bounds.
    #[error("statement breaks a bound: {0}")]
    Bounds(&'static str),
    /// The statement before it is not among those it was made after.
    #[error("statement {seq} of {author} was made without having seen its predecessor")]
    Sequence {
        /// Its author.
        author: Author,
        /// Its number.
        seq: u64,
    },
    /// It names something that is not in what its author had seen.
    #[error("statement names {0} that its author had not seen")]
    Unseen(&'static str),
    /// The claim in it does not hold.
    #[error("claim in the statement does not hold")]
    Claim(#[source] ClaimError),
    /// The proof in it is not by the invite's key over this claim.
    #[error("invite proof in the statement does not hold")]
    InviteProof,
    /// Its author has no right to say this, as far as it had seen.
    #[error("{author} may not say this: {why}")]
    NoRight {
        /// Its author.
        author: Author,
        /// The rule.
        why: &'static str,
    },
    /// The roster holds as many statements as it may.
    #[error("roster is full")]
    Full,
    /// Drafted here before another statement took its place: draft it again.
    #[error("the draft is out of date: make it again")]
    Stale,
}

impl Statement {
    /// The statement in `bytes`, within its bounds but not yet judged.
    ///
    /// # Errors
    /// [`Rejected`] where it does not decode or breaks a bound.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Rejected> {
        if bytes.len() > STATEMENT_BYTES_MAX {
            return Err(Rejected::TooLong { got: bytes.len() });
        }
        let statement: Self =
            wire::decode_limited::<_, STATEMENT_BYTES_MAX>(bytes).map_err(Rejected::Malformed)?;
        statement.check_bounds()?;
        Ok(statement)
    }

    /// The id of a signed statement: BLAKE3(signer ‖ signature ‖ bytes).
    ///
    /// The first two have fixed lengths wherever the signature verifies, so two
    /// statements never share the hashed text.
    #[must_use]
    pub fn id(signed: &SignedBytes) -> StatementId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&signed.signer.0);
        hasher.update(&signed.signature.0);
        hasher.update(&signed.bytes);
        StatementId(*hasher.finalize().as_bytes())
    }

    fn check_bounds(&self) -> Result<(), Rejected> {
        let ensure = |holds, what| if holds { Ok(()) } else { Err(Rejected::Bounds(what)) };
        ensure(self.seq >= 1, "sequences begin with 1")?;
        ensure(self.parents.len() <= PARENTS_MAX, "more than 16 parents")?;
        ensure(self.parents.is_sorted_by(|a, b| a < b), "parents out of order")?;
        ensure(self.not_before_ms <= self.not_after_ms, "ends before it begins")?;
        match &self.kind {
            Kind::Invite(invite) => ensure(invite.uses != Some(0), "invite without any use"),
            Kind::Profile(profile) => {
                let texts = [&profile.full_name, &profile.email];
                let plain = texts.into_iter().flatten().all(|text| is_plain_text(text));
                ensure(plain, "full name or e-mail is too long or not plain text")
            }
            Kind::Leave(leave) => {
                ensure(!leave.claims.is_empty(), "leave without a claim")?;
                ensure(leave.claims.len() <= NODE_CLAIMS_MAX, "leave with too many claims")?;
                ensure(leave.claims.is_sorted_by(|a, b| a < b), "claims out of order")
            }
            Kind::Accept(_) | Kind::AdmitNode(_) => Ok(()),
        }
    }
}

/// Whether a text from a peer may be shown in a terminal: bounded, and without
/// control or direction-changing characters.
pub(super) fn is_plain_text(text: &str) -> bool {
    let is_hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.len() <= TEXT_BYTES_MAX && !text.contains(is_hidden)
}

/// A statement to be signed: a daemon drafts it, the CLI shows and signs it. What
/// is signed is the very bytes that travelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    bytes: Vec<u8>,
    statement: Statement,
}

/// The key is not the author's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the draft is for the key of {0}, not for this one")]
pub struct WrongKey(pub Author);

impl Draft {
    pub(super) fn new(statement: Statement) -> Result<Self, Rejected> {
        Self::from_bytes(wire::encode(&statement))
    }

    /// The draft that a daemon sent as `bytes`.
    ///
    /// # Errors
    /// [`Rejected`] where they are not a statement within its bounds.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Rejected> {
        let statement = Statement::from_bytes(&bytes)?;
        Ok(Self { bytes, statement })
    }

    /// The bytes to be signed.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What they say.
    #[must_use]
    pub fn statement(&self) -> &Statement {
        &self.statement
    }

    /// Sign with the author's key.
    ///
    /// # Errors
    /// [`WrongKey`] where `key` is another's.
    pub fn sign(self, key: &KeyPair) -> Result<SignedBytes, WrongKey> {
        if self.statement.author.key() != key.public() {
            return Err(WrongKey(self.statement.author));
        }
        Ok(SignedBytes::sign(key, Domain::Statement, self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    fn invite(user: &KeyPair) -> Statement {
        Statement {
            pool: PoolId([1; 32]),
            author: Author::User(UserId(user.public())),
            device: DeviceId([2; 16]),
            seq: 1,
            parents: vec![StatementId([3; 32])],
            kind: Kind::Invite(Invite {
                key: PublicKey([4; 32]),
                rights: Rights::User,
                uses: Some(5),
                expires_wall_ms: 6,
            }),
            not_before_ms: 7,
            not_after_ms: 8,
        }
    }

    #[test]
    fn the_encoding_of_a_statement_stays_as_it_is() {
        let user = KeyPair::from_seed(&[9; 32]);
        let expected = [
            "01".repeat(32),
            "00".to_owned(),
            HEXLOWER.encode(&user.public().0),
            "02".repeat(16),
            "01".to_owned(),
            "01".to_owned(),
            "03".repeat(32),
            "00".to_owned(),
            "04".repeat(32),
            "00".to_owned(),
            "0105".to_owned(),
            "06".to_owned(),
            "0708".to_owned(),
        ];
        let draft = Draft::new(invite(&user)).unwrap();
        assert_eq!(HEXLOWER.encode(draft.bytes()), expected.concat());
    }

    #[test]
    fn a_draft_is_signed_as_it_came_and_only_by_its_author() {
        let user = KeyPair::from_seed(&[9; 32]);
        let draft = Draft::new(invite(&user)).unwrap();
        let sent = Draft::from_bytes(draft.bytes().to_vec()).unwrap();
        assert_eq!(sent.statement(), &invite(&user));
        let author = sent.statement().author;
        assert_eq!(sent.clone().sign(&KeyPair::from_seed(&[8; 32])), Err(WrongKey(author)));
        let signed = sent.sign(&user).unwrap();
        assert_eq!(signed.verify(Domain::Statement), Ok(draft.bytes()));
        let bytes = [&user.public().0[..], &signed.signature.0, &signed.bytes].concat();
        assert_eq!(Statement::id(&signed), StatementId::of(&bytes));
    }

    #[test]
    fn a_statement_beyond_its_bounds_is_refused() {
        let user = KeyPair::from_seed(&[9; 32]);
        let refused = |change: fn(&mut Statement)| {
            let mut statement = invite(&user);
            change(&mut statement);
            Statement::from_bytes(&wire::encode(&statement)).unwrap_err()
        };
        assert_eq!(refused(|s| s.seq = 0), Rejected::Bounds("sequences begin with 1"));
        assert_eq!(refused(|s| s.not_after_ms = 6), Rejected::Bounds("ends before it begins"));
        assert_eq!(
            refused(|s| s.parents = (0..17).map(|n| StatementId([n; 32])).collect()),
            Rejected::Bounds("more than 16 parents")
        );
        assert_eq!(
            refused(|s| s.parents = vec![StatementId([1; 32]); 2]),
            Rejected::Bounds("parents out of order")
        );
        let loud = |s: &mut Statement| {
            s.kind = Kind::Profile(Profile {
                full_name: Some("\u{1b}]0;x".to_owned()),
                ..Profile::default()
            });
        };
        assert!(matches!(refused(loud), Rejected::Bounds(_)));
        assert!(matches!(
            Statement::from_bytes(&vec![0; STATEMENT_BYTES_MAX + 1]),
            Err(Rejected::TooLong { .. })
        ));
    }
}
