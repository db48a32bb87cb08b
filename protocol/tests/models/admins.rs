//! Three admins, each with a replica of the roster: they remove each other's machines at the
//! same time, let people in by one invite, contradict themselves and back-date, and what they
//! say arrives everywhere in every order, later statements before earlier ones.

use core::hash::{Hash, Hasher};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use p2pit_protocol::{
    StatementId,
    identity::{Domain, KeyPair, SignedBytes},
    roster::{
        Accept, Author, Invite, Kind, Leave, Profile, Rights, Roster, Statement, prove_invite,
    },
    wire,
};
use stateright::{Model, Property};

use crate::{
    cast::{WALL_MS, device, name, node, node_key, user, user_key},
    members::{admission, claim, pool_of, say},
    search,
};

const INVITE_SEED: [u8; 32] = [0x50; 32];

/// One thing that is done at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Act {
    /// Admin 1 removes the machine of admin 2.
    OneRemovesTwo,
    /// Admin 2 removes the machine of admin 1.
    TwoRemovesOne,
    /// The machine of admin 2 admits itself once more by the claim that was ended, and says so
    /// as if it had not seen its removal, with a date from before.
    TwoReturnsBackDated,
    /// The machine of admin 1 lets somebody in, with the invite's only use.
    OneAdmits,
    /// The machine of admin 3 lets somebody else in with the same.
    ThreeAdmits,
    /// Admin 3 says two things under one number.
    ThreeContradicts,
}

/// All six at once would be millions of states. What removal has to do with:
const REMOVALS: [Act; 3] = [Act::OneRemovesTwo, Act::TwoRemovesOne, Act::TwoReturnsBackDated];

/// Two that compete, and one of whom is removed.
const RIVALS: [Act; 3] = [Act::TwoRemovesOne, Act::OneAdmits, Act::ThreeAdmits];

/// One that cannot be believed.
const CONTRADICTION: [Act; 3] = [Act::ThreeContradicts, Act::ThreeAdmits, Act::TwoRemovesOne];

impl Act {
    /// The replica it is done at.
    fn at(self) -> usize {
        match self {
            Self::OneRemovesTwo | Self::OneAdmits => 0,
            Self::TwoRemovesOne | Self::TwoReturnsBackDated => 1,
            Self::ThreeAdmits | Self::ThreeContradicts => 2,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Do(Act),
    /// The statement, by its place in [`World::said`], arrives at this replica.
    Deliver(usize, usize),
}

#[derive(Debug, Clone)]
struct World {
    rosters: [Arc<Roster>; 3],
    /// What was done, with what was said by it: empty where the roster did not let them.
    done: Vec<(Act, Vec<(StatementId, SignedBytes)>)>,
    /// What arrived at each replica, whether it is placed or waits.
    arrived: [BTreeSet<StatementId>; 3],
    /// What each replica makes of it: see [`outcome`].
    outcomes: [[u8; 32]; 3],
    fingerprint: [u8; 32],
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.fingerprint.hash(hasher);
    }
}

impl World {
    fn said(&self) -> Vec<&(StatementId, SignedBytes)> {
        self.done.iter().flat_map(|(_, said)| said).collect()
    }

    /// To be called after a change at `replica`. The fingerprint is also of what the replicas
    /// make of what arrived: were it to depend on the order, the search would meet both.
    fn stamp(mut self, replica: usize) -> Self {
        self.outcomes[replica] = outcome(&self.rosters[replica]);
        let mut hasher = blake3::Hasher::new();
        for (act, said) in &self.done {
            hasher.update(&[*act as u8, said.len() as u8]);
            said.iter().for_each(|(id, _)| _ = hasher.update(&id.0));
        }
        for (outcome, arrived) in self.outcomes.iter().zip(&self.arrived) {
            hasher.update(&[arrived.len() as u8]);
            arrived.iter().for_each(|id| _ = hasher.update(&id.0));
            hasher.update(outcome);
        }
        self.fingerprint = *hasher.finalize().as_bytes();
        self
    }
}

/// The hash of all that a roster says.
fn outcome(roster: &Roster) -> [u8; 32] {
    let (state, contradictions) = (roster.state(), roster.contradictions());
    let text = format!("{:?} {state:?} {contradictions:?} {}", roster.digest(), roster.waiting());
    *blake3::hash(text.as_bytes()).as_bytes()
}

struct Admins {
    base: Arc<Roster>,
    invite: StatementId,
    acts: [Act; 3],
    /// What follows from a set of statements, taken in the order of their ids.
    afresh: Mutex<BTreeMap<BTreeSet<StatementId>, [u8; 32]>>,
}

impl Admins {
    fn new(acts: [Act; 3]) -> Self {
        let mut base = pool_of(3, 3);
        let invite = Kind::Invite(Invite {
            key: KeyPair::from_seed(&INVITE_SEED).public(),
            rights: Rights::User,
            uses: Some(1),
            expires_wall_ms: u64::MAX,
        });
        let invite = say(&mut base, Author::User(user(1)), 1, invite).unwrap();
        let invite = Statement::id(&invite);
        Self { base: Arc::new(base), invite, acts, afresh: Mutex::default() }
    }

    fn accept(&self, roster: &Roster, newcomer: u8) -> Kind {
        let claim = claim(roster, newcomer);
        let key = KeyPair::from_seed(&INVITE_SEED);
        let invite_proof = prove_invite(&key, roster.pool(), self.invite, claim.id());
        let node_name = name(&format!("node{newcomer}"));
        Kind::Accept(Accept { invite: self.invite, claim, invite_proof, node_name })
    }

    fn removal(&self, n: u8) -> Kind {
        let claims = self.base.state().nodes[&node(n)].claims.clone();
        Kind::Leave(Leave { node: node(n), claims })
    }

    /// What is said, after what this replica knows; nothing where it must not be.
    fn said(&self, act: Act, roster: &mut Roster) -> Vec<SignedBytes> {
        let one = |said: Option<SignedBytes>| said.into_iter().collect();
        match act {
            Act::OneRemovesTwo => {
                let kind = self.removal(2);
                one(say(roster, Author::User(user(1)), 1, kind))
            }
            Act::TwoRemovesOne => {
                let kind = self.removal(1);
                one(say(roster, Author::User(user(2)), 2, kind))
            }
            Act::TwoReturnsBackDated => {
                let forged = self.forge(Author::Node(node(2)), 2, admission(&self.base, 2));
                roster.insert(forged.clone()).unwrap();
                vec![forged]
            }
            Act::OneAdmits => {
                let kind = self.accept(roster, 4);
                one(say(roster, Author::Node(node(1)), 1, kind))
            }
            Act::ThreeAdmits => {
                let kind = self.accept(roster, 5);
                one(say(roster, Author::Node(node(3)), 3, kind))
            }
            Act::ThreeContradicts => ["ann", "bea"]
                .map(|wished| {
                    let profile = Profile { username: Some(name(wished)), ..Profile::default() };
                    self.forge(Author::User(user(3)), 3, Kind::Profile(profile))
                })
                .map(|forged| {
                    roster.insert(forged.clone()).unwrap();
                    forged
                })
                .into(),
        }
    }

    /// Said around all checks, as if nothing since the beginning had been seen.
    fn forge(&self, author: Author, n: u8, kind: Kind) -> SignedBytes {
        let statement = Statement {
            pool: self.base.pool(),
            author,
            device: device(n),
            seq: self.base.next_seq(author, device(n)),
            parents: self.base.heads(),
            kind,
            not_before_ms: 0,
            not_after_ms: u64::MAX,
        };
        let key = if matches!(author, Author::User(_)) { user_key(n) } else { node_key(n) };
        SignedBytes::sign(&key, Domain::Statement, wire::encode(&statement))
    }

    fn afresh(&self, world: &World, replica: usize) -> [u8; 32] {
        let arrived = &world.arrived[replica];
        let mut known = self.afresh.lock().unwrap();
        let made = known.entry(arrived.clone()).or_insert_with(|| {
            let mut roster = Roster::clone(&self.base);
            for id in arrived {
                let said = world.said().into_iter().find(|(said, _)| said == id);
                roster.insert(said.unwrap().1.clone()).unwrap();
            }
            outcome(&roster)
        });
        *made
    }

    fn knows(&self, world: &World, replica: usize, act: Act) -> bool {
        let roster = &world.rosters[replica];
        let said = world.done.iter().find(|(done, _)| *done == act).map(|(_, said)| said);
        said.is_some_and(|said| !said.is_empty() && said.iter().all(|(id, _)| roster.contains(*id)))
    }
}

impl Model for Admins {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let world = World {
            rosters: [self.base.clone(), self.base.clone(), self.base.clone()],
            done: Vec::new(),
            arrived: Default::default(),
            outcomes: [outcome(&self.base); 3],
            fingerprint: [0; 32],
        };
        vec![world.stamp(0)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let is_done = |act| world.done.iter().any(|(done, _)| *done == act);
        steps.extend(self.acts.into_iter().filter(|act| !is_done(*act)).map(Step::Do));
        for (index, (id, _)) in world.said().into_iter().enumerate() {
            let lacking = (0..3).filter(|&replica| !world.arrived[replica].contains(id));
            steps.extend(lacking.map(|replica| Step::Deliver(index, replica)));
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut world = world.clone();
        let replica = match step {
            Step::Do(act) => {
                let replica = act.at();
                let roster = Arc::make_mut(&mut world.rosters[replica]);
                let said = self.said(act, roster);
                let said: Vec<_> = said.into_iter().map(|s| (Statement::id(&s), s)).collect();
                world.arrived[replica].extend(said.iter().map(|(id, _)| *id));
                world.done.push((act, said));
                // In what order things were done shows in what they were said after.
                world.done.sort_by_key(|(act, _)| *act);
                replica
            }
            Step::Deliver(index, replica) => {
                let (id, signed) = world.said()[index].clone();
                world.arrived[replica].insert(id);
                Arc::make_mut(&mut world.rosters[replica]).insert(signed).unwrap();
                replica
            }
        };
        Some(world.stamp(replica))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("same statements, same state", |model: &Self, world: &World| {
                (0..3).all(|replica| model.afresh(world, replica) == world.outcomes[replica])
            }),
            Property::always(
                "who was removed does not come back",
                |model: &Self, world: &World| {
                    (0..3).all(|replica| {
                        let removed = [(Act::OneRemovesTwo, 2), (Act::TwoRemovesOne, 1)];
                        removed.into_iter().all(|(act, n)| {
                            let gone = !world.rosters[replica].state().is_member_node(node(n));
                            !model.knows(world, replica, act) || gone
                        })
                    })
                },
            ),
            Property::always("who was removed has no say", |model: &Self, world: &World| {
                world.rosters.iter().all(|roster| {
                    [1, 2].into_iter().all(|n| {
                        let kind = model.accept(roster, 6);
                        let draft = roster.draft(Author::Node(node(n)), device(n), kind, WALL_MS);
                        roster.state().is_member_node(node(n)) || draft.is_err()
                    })
                })
            }),
            Property::always("an invite lets in as many as it may", |_, world: &World| {
                world.rosters.iter().all(|roster| roster.state().users.len() <= 4)
            }),
            Property::always(
                "who contradicts itself said nothing",
                |model: &Self, world: &World| {
                    (0..3).all(|replica| {
                        let roster = &world.rosters[replica];
                        let voided = || {
                            roster.contradictions().len() == 1
                                && roster.state().users[&user(3)].username == name("user3")
                        };
                        !model.knows(world, replica, Act::ThreeContradicts) || voided()
                    })
                },
            ),
            Property::always("founders stay admins", |_, world: &World| {
                let stay = |roster: &Arc<Roster>| (1..=3).all(|n| roster.state().is_admin(user(n)));
                world.rosters.iter().all(stay)
            }),
            Property::sometimes("everybody knows everything", |model: &Self, world: &World| {
                let all = world.said().len();
                world.done.len() == model.acts.len()
                    && world.arrived.iter().all(|arrived| arrived.len() == all)
            }),
            Property::sometimes("a statement waits for its parents", |_, world: &World| {
                world.rosters.iter().any(|roster| roster.waiting() > 0)
            }),
        ];
        let has = |act| self.acts.contains(&act);
        if has(Act::OneRemovesTwo) {
            properties.push(Property::sometimes("both are removed", |_, world: &World| {
                let gone = |roster: &Arc<Roster>, n| !roster.state().is_member_node(node(n));
                world.rosters.iter().all(|roster| gone(roster, 1) && gone(roster, 2))
            }));
        }
        if has(Act::OneAdmits) {
            properties.push(Property::sometimes(
                "a removal forestalls an accept",
                |_, world: &World| {
                    world.done.iter().any(|(act, said)| *act == Act::OneAdmits && said.is_empty())
                },
            ));
        }
        if has(Act::OneAdmits) && has(Act::ThreeAdmits) {
            properties.push(Property::sometimes(
                "two accepts compete for one use",
                |model: &Self, world: &World| {
                    (0..3).any(|replica| {
                        model.knows(world, replica, Act::OneAdmits)
                            && model.knows(world, replica, Act::ThreeAdmits)
                    })
                },
            ));
        }
        properties
    }
}

#[test]
fn three_admins_remove_each_other_and_come_to_one_roster() {
    search("three admins, removals", Admins::new(REMOVALS));
}

#[test]
fn three_admins_compete_and_come_to_one_roster() {
    search("three admins, rivals", Admins::new(RIVALS));
}

#[test]
fn three_admins_of_whom_one_contradicts_itself_come_to_one_roster() {
    search("three admins, a contradiction", Admins::new(CONTRADICTION));
}
