//! Founding a pool: people, machines, and the statements that make them members.

use p2pit_protocol::{
    PeerId, PoolId, StatementId, StoreId, UserId,
    identity::{KeyPair, SignedBytes},
    peer::Slot,
    roster::{
        Accept, AdmitNode, Author, DeviceId, Founder, Genesis, Invite, JoinClaim, Kind, Name,
        Rights, Roster, SignedClaim, Statement, prove_invite,
    },
    wire,
};

use crate::{clock::WALL_START_MS, options::Options, random::Random};

/// A pool on its first day.
#[derive(Debug)]
pub struct Pool {
    /// Its id.
    pub id: PoolId,
    /// How it began.
    pub genesis: Vec<u8>,
    /// What every member's journal has: the statements, by key.
    pub journal: Vec<(Vec<u8>, Vec<u8>)>,
    /// People; the first is the founder.
    pub users: Vec<KeyPair>,
    /// Machines: those that offer GPUs first, then clients.
    pub members: Vec<Member>,
}

/// A machine of the pool.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its key.
    pub key: KeyPair,
    /// Its journal's store.
    pub store: StoreId,
    /// Offers nothing and keeps nothing.
    pub client: bool,
}

impl Pool {
    /// The pool of `options`: every user but the founder came in by an invite, and
    /// machines belong to users in turn.
    ///
    /// # Errors
    /// The roster refuses a statement: a mistake here.
    pub fn found(options: &Options) -> anyhow::Result<Self> {
        let mut random = Random::of(options.seed, "pool");
        let mut key = || KeyPair::from_seed(&random.bytes());
        let users: Vec<KeyPair> = (0..options.people()).map(|_| key()).collect();
        let keys: Vec<KeyPair> = (0..options.nodes + options.clients).map(|_| key()).collect();
        let members: Vec<Member> = keys
            .into_iter()
            .enumerate()
            .map(|(index, key)| Member {
                key,
                store: StoreId(random.bytes()),
                client: index >= options.nodes,
            })
            .collect();
        let genesis = Genesis {
            name: Name::new("lab")?,
            founders: vec![Founder {
                user: UserId(users[0].public()),
                username: Name::new("user0")?,
                full_name: None,
            }],
            threshold: 1,
            created_wall_ms: WALL_START_MS,
            nonce: random.bytes(),
        }
        .to_bytes()?;
        let mut founding = Founding {
            roster: Roster::new(genesis.clone())?,
            statements: Vec::new(),
            device: DeviceId(members[0].store.0),
        };
        founding.admit_all(&users, &members, &KeyPair::from_seed(&random.bytes()))?;
        Ok(Self {
            id: founding.roster.pool(),
            genesis,
            journal: founding.journal(),
            users,
            members,
        })
    }
}

struct Founding {
    roster: Roster,
    statements: Vec<SignedBytes>,
    device: DeviceId,
}

impl Founding {
    fn admit_all(
        &mut self,
        users: &[KeyPair],
        members: &[Member],
        invite_key: &KeyPair,
    ) -> anyhow::Result<()> {
        let claims = members.iter().enumerate().map(|(index, member)| {
            let user = index % users.len();
            claim(self.roster.pool(), index, member, user, &users[user])
        });
        let claims = claims.collect::<anyhow::Result<Vec<SignedClaim>>>()?;
        let door = &members[0];
        let by_door = Author::Node(PeerId(door.key.public()));
        let mut invited = None;
        for (index, claim) in claims.into_iter().enumerate() {
            let node_name = Name::new(&format!("node{index}"))?;
            let kind = if index == 0 || index >= users.len() || users.len() == 1 {
                Kind::AdmitNode(AdmitNode { claim, node_name })
            } else {
                let invite = match invited {
                    Some(invite) => invite,
                    None => *invited.insert(self.invite(&users[0], invite_key)?),
                };
                let pool = self.roster.pool();
                let invite_proof = prove_invite(invite_key, pool, invite, claim.id());
                Kind::Accept(Accept { invite, claim, invite_proof, node_name })
            };
            self.say(by_door, &door.key, kind)?;
        }
        Ok(())
    }

    fn invite(&mut self, founder: &KeyPair, invite_key: &KeyPair) -> anyhow::Result<StatementId> {
        let kind = Kind::Invite(Invite {
            key: invite_key.public(),
            rights: Rights::User,
            uses: None,
            expires_wall_ms: u64::MAX,
        });
        self.say(Author::User(UserId(founder.public())), founder, kind)
    }

    fn say(&mut self, author: Author, key: &KeyPair, kind: Kind) -> anyhow::Result<StatementId> {
        let draft = self.roster.draft(author, self.device, kind, WALL_START_MS)?;
        let signed = draft.sign(key)?;
        let inserted = self.roster.insert_drafted(signed.clone())?;
        self.statements.push(signed);
        Ok(inserted.id)
    }

    fn journal(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let entry = |signed: &SignedBytes| {
            (Slot::Statement(Statement::id(signed)).to_bytes(), wire::encode(signed))
        };
        self.statements.iter().map(entry).collect()
    }
}

fn claim(
    pool: PoolId,
    index: usize,
    member: &Member,
    user: usize,
    user_key: &KeyPair,
) -> anyhow::Result<SignedClaim> {
    let claim = JoinClaim {
        pool,
        user: UserId(user_key.public()),
        username: Name::new(&format!("user{user}"))?,
        full_name: None,
        node: PeerId(member.key.public()),
        node_name: Name::new(&format!("node{index}"))?,
        client: member.client,
        wall_ms: WALL_START_MS,
        nonce: [0; 16],
    };
    let by_user = JoinClaim::sign(claim.to_bytes(), user_key)?;
    Ok(SignedClaim::countersign(by_user, &member.key)?)
}
