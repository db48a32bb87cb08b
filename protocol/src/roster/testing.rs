//! Members for tests: keys from small numbers, and one roster each.

use zeroize::Zeroizing;

use super::{
    Accept, AdmitNode, Author, ClaimId, DeviceId, DraftError, Founder, Genesis, Invite, JoinClaim,
    Kind, Name, Rights, Roster, SignedClaim, Statement, Ticket,
};
use crate::identity::{Domain, KeyPair, PeerId, PoolId, SignedBytes, UserId};

/// The wall clock of tests.
pub(crate) const WALL_MS: u64 = 1_700_000_000_000;

/// One person with one machine and what it knows.
#[derive(Debug, Clone)]
pub(crate) struct Replica {
    pub(crate) n: u8,
    pub(crate) user: KeyPair,
    pub(crate) node: KeyPair,
    pub(crate) device: DeviceId,
    pub(crate) roster: Roster,
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(crate) fn user_key(n: u8) -> KeyPair {
    KeyPair::from_seed(&[n; 32])
}

pub(crate) fn node_key(n: u8) -> KeyPair {
    KeyPair::from_seed(&[n | 0x80; 32])
}

pub(crate) fn genesis_by(founders: &[u8]) -> Vec<u8> {
    let founder = |&n: &u8| Founder {
        user: UserId(user_key(n).public()),
        username: name(&format!("user{n}")),
        full_name: None,
    };
    Genesis {
        name: name("lab"),
        founders: founders.iter().map(founder).collect(),
        threshold: 1,
        created_wall_ms: WALL_MS,
        nonce: [7; 16],
    }
    .to_bytes()
    .unwrap()
}

/// A claim of person `user` with machine `node`; another `nonce`, another claim.
pub(crate) fn claim(pool: PoolId, user: u8, node: u8, nonce: u8) -> SignedClaim {
    claim_as(pool, user, node, nonce, &format!("user{user}"), &format!("node{node}"))
}

pub(crate) fn claim_as(
    pool: PoolId,
    user: u8,
    node: u8,
    nonce: u8,
    username: &str,
    node_name: &str,
) -> SignedClaim {
    let claim = JoinClaim {
        pool,
        user: UserId(user_key(user).public()),
        username: name(username),
        full_name: None,
        node: PeerId(node_key(node).public()),
        node_name: name(node_name),
        client: false,
        wall_ms: WALL_MS,
        nonce: [nonce; 16],
    };
    let by_user = JoinClaim::sign(claim.to_bytes(), &user_key(user)).unwrap();
    SignedClaim::countersign(by_user, &node_key(node)).unwrap()
}

impl Replica {
    /// Person and machine `n` with a roster.
    pub(crate) fn new(n: u8, roster: Roster) -> Self {
        let (user, node) = (user_key(n), node_key(n));
        Self { n, user, node, device: DeviceId([n; 16]), roster }
    }

    /// The founder of a pool of one: person 1 with machine 1.
    pub(crate) fn founder() -> Self {
        let mut founder = Self::new(1, Roster::new(genesis_by(&[1])).unwrap());
        let claim = claim(founder.roster.pool(), 1, 1, 0);
        founder.as_node(admit_node(claim, "node1")).unwrap();
        founder
    }

    pub(crate) fn user_id(&self) -> UserId {
        UserId(self.user.public())
    }

    pub(crate) fn peer(&self) -> PeerId {
        PeerId(self.node.public())
    }

    /// Say something with the person's key, here first.
    pub(crate) fn as_user(&mut self, kind: Kind) -> Result<SignedBytes, DraftError> {
        let (author, key) = (Author::User(self.user_id()), self.user.clone());
        self.say(author, &key, kind)
    }

    /// Say something with the machine's key, here first.
    pub(crate) fn as_node(&mut self, kind: Kind) -> Result<SignedBytes, DraftError> {
        let (author, key) = (Author::Node(self.peer()), self.node.clone());
        self.say(author, &key, kind)
    }

    fn say(
        &mut self,
        author: Author,
        key: &KeyPair,
        kind: Kind,
    ) -> Result<SignedBytes, DraftError> {
        let draft = self.roster.draft(author, self.device, kind, WALL_MS)?;
        let signed = draft.sign(key).unwrap();
        let inserted = self.roster.insert_drafted(signed.clone())?;
        assert_eq!(inserted.added, [inserted.id]);
        Ok(signed)
    }

    /// Make a ticket whose secret is `seed`, good for a day.
    pub(crate) fn invite(&mut self, seed: u8, rights: Rights, uses: Option<u32>) -> Ticket {
        self.try_invite(seed, rights, uses).unwrap()
    }

    pub(crate) fn try_invite(
        &mut self,
        seed: u8,
        rights: Rights,
        uses: Option<u32>,
    ) -> Result<Ticket, DraftError> {
        let seed = [seed; 32];
        let expires_wall_ms = WALL_MS + 86_400_000;
        let key = KeyPair::from_seed(&seed).public();
        let kind = Kind::Invite(Invite { key, rights, uses, expires_wall_ms });
        let signed = self.as_user(kind)?;
        Ok(Ticket {
            pool: self.roster.pool(),
            pool_name: name("lab"),
            invite: Statement::id(&signed),
            invite_seed: Zeroizing::new(seed),
            doors: Vec::new(),
            expires_wall_ms,
        })
    }

    /// Admit person and machine `n` by `ticket`, as a door does.
    pub(crate) fn accept(&mut self, ticket: &Ticket, n: u8) -> Result<SignedBytes, DraftError> {
        let claim = claim(ticket.pool, n, n, 0);
        self.as_node(accept(ticket, claim, &format!("node{n}")))
    }

    /// Take over all that another replica knows.
    pub(crate) fn pull(&mut self, other: &Roster) {
        for signed in other.statements() {
            self.roster.insert(signed.clone()).unwrap();
        }
    }
}

pub(crate) fn accept(ticket: &Ticket, claim: SignedClaim, node_name: &str) -> Kind {
    let invite_proof = ticket.prove(claim.id());
    let node_name = name(node_name);
    Kind::Accept(Accept { invite: ticket.invite, claim, invite_proof, node_name })
}

pub(crate) fn admit_node(claim: SignedClaim, node_name: &str) -> Kind {
    Kind::AdmitNode(AdmitNode { claim, node_name: name(node_name) })
}

/// The claims by which machine `n` is a member of `roster`.
pub(crate) fn claims_of(roster: &Roster, n: u8) -> Vec<ClaimId> {
    roster.state().nodes[&PeerId(node_key(n).public())].claims.clone()
}

/// A statement made around all checks that a draft goes through.
pub(crate) fn forge(
    roster: &Roster,
    author: Author,
    key: &KeyPair,
    device: DeviceId,
    change: impl FnOnce(&mut Statement),
    kind: Kind,
) -> SignedBytes {
    let mut statement = Statement {
        pool: roster.pool(),
        author,
        device,
        seq: roster.next_seq(author, device),
        parents: roster.heads(),
        kind,
        not_before_ms: 0,
        not_after_ms: u64::MAX,
    };
    change(&mut statement);
    SignedBytes::sign(key, Domain::Statement, crate::wire::encode(&statement))
}
