//! One record, three keepers, two proposers, one change of keepers.
//!
//! Keeper 1 seals the epoch for keepers 2, 3 and 4, while keeper 2 changes the record; or it
//! does so alone, and keeper 2 changes the record in the next epoch. Or keeper 2 seals it, too,
//! for other keepers; or 2 and 3 both change the record in the next epoch. Acceptors and proposers
//! are the real ones. Messages are never used up: each may arrive at any time, in
//! any order, again and again, or not at all; except that a node hears itself at once.

use core::hash::{Hash, Hasher};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use p2pit_protocol::{
    BootId, PoolId,
    identity::SignedBytes,
    job::VerifiedSpec,
    message::{Promise, Watch},
    record::{
        Acceptor, Ask, Ballot, Certificate, End, Keeper, Link, LinkProof, Operation, Proposer,
        Refused, Value, follow, quorum_of, sign_receipt,
    },
    sabotage::Sabotage,
    wire,
};
use stateright::{Model, Property};

use crate::{
    cast::{keeper, node_key, sign_job, small_job_spec, store},
    search,
};

/// Keepers, by number from 1.
type Who = u8;

const NEXT: [Who; 3] = [2, 3, 4];
/// Whom keeper 2 would have instead.
const OTHERS: [Who; 3] = [1, 2, 4];

/// What is said. A message to a proposer names the epoch it is of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Said {
    Prepare { epoch: u32, ballot: Ballot },
    Accept { epoch: u32, ballot: Ballot, next: Ballot, value: Hashed },
    Promise { epoch: u32, ballot: Ballot, accepted: Ballot, value: Hashed },
    Accepted { epoch: u32, ballot: Ballot, value: Hashed },
    Nack { epoch: u32, ballot: Ballot, promised: Ballot },
    NotInit { epoch: u32 },
    Install { accepted: Ballot, value: Hashed },
}

/// A value's bytes, by their hash.
type Hashed = [u8; 32];

/// From whom, to whom, what.
type Letter = (Who, Who, Said);

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Deliver(Letter),
    /// A proposer that was refused tries once more: the higher keeper of two.
    Retry(Who),
}

#[derive(Debug, Clone)]
struct Node {
    acceptor: Option<Acceptor>,
    proposer: Option<Proposer>,
    /// Whether it has tried once more after it was refused.
    retried: bool,
    /// The highest counter it was told of, which the proposer does not show.
    told: u64,
    /// How its operations ended, by epoch.
    ended: BTreeMap<u32, bool>,
}

#[derive(Debug, Clone)]
struct World {
    nodes: BTreeMap<Who, Arc<Node>>,
    /// The hash of each node.
    shown: BTreeMap<Who, [u8; 32]>,
    letters: BTreeSet<Letter>,
    /// Every acceptance ever: epoch, ballot, value, by whom.
    accepted: BTreeSet<(u32, Ballot, Hashed, Who)>,
    /// The keepers' change, once a seal is known to be chosen.
    link: Option<Arc<Link>>,
    /// What must never be.
    broken: Option<String>,
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

impl Node {
    /// The proposal that is under way.
    fn current(&self) -> Option<(u32, Ballot)> {
        let node = self;
        let (ask, _) = node.proposer.as_ref()?.ask()?;
        let (Ask::Prepare(ballot) | Ask::Accept { ballot, .. }) = ask;
        Some((node.acceptor.as_ref()?.epoch(), ballot))
    }

    fn shown(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[u8::from(self.retried)]);
        if let Some(acceptor) = &self.acceptor {
            let shown = (acceptor.epoch(), acceptor.promised(), acceptor.accepted());
            hasher.update(&wire::encode(&shown));
            hasher.update(acceptor.value_bytes());
        }
        // What it was answered follows from whom it still asks: a keeper promises and accepts
        // one ballot once.
        if let Some(proposer) = &self.proposer {
            let ask = proposer.ask().map(|(ask, silent)| {
                let (kind, ballot, bytes) = match ask {
                    Ask::Prepare(ballot) => (0_u8, ballot, &[][..]),
                    Ask::Accept { ballot, value_bytes, .. } => (1, ballot, value_bytes),
                };
                (kind, ballot, *blake3::hash(bytes).as_bytes(), silent)
            });
            let held = proposer.held().map(|(ballot, next, _)| (ballot, next));
            hasher.update(&wire::encode(&(ask, held, proposer.is_refused(), self.told)));
        }
        hasher.update(&wire::encode(&self.ended));
        *hasher.finalize().as_bytes()
    }
}

impl World {
    fn node_mut(&mut self, who: Who) -> &mut Node {
        Arc::make_mut(self.nodes.get_mut(&who).unwrap())
    }

    /// Whether a letter may still do anything, now or later; else it need not be told apart
    /// whether it is on its way.
    fn matters(
        &self,
        (from, to, said): &Letter,
        current: &BTreeMap<Who, Option<(u32, Ballot)>>,
    ) -> bool {
        let acceptor = self.nodes[to].acceptor.as_ref();
        let is_past = |epoch: u32| acceptor.is_some_and(|acceptor| acceptor.epoch() > epoch);
        let is_promised = |least: Ballot| acceptor.is_some_and(|a| a.promised() >= least);
        let awaited = |who: &Who, epoch, ballot| current[who] == Some((epoch, ballot));
        match said {
            Said::Prepare { epoch, ballot } => {
                !is_past(*epoch) && (awaited(from, *epoch, *ballot) || !is_promised(*ballot))
            }
            Said::Accept { epoch, ballot, next, .. } => {
                // Whoever promised a higher one refuses it, and nobody waits for that.
                !is_past(*epoch) && (awaited(from, *epoch, *ballot) || !is_promised(*next))
            }
            Said::Promise { epoch, ballot, .. }
            | Said::Accepted { epoch, ballot, .. }
            | Said::Nack { epoch, ballot, .. } => awaited(to, *epoch, *ballot),
            Said::NotInit { epoch } => {
                let lacks = |node: &Node| node.acceptor.as_ref().is_none_or(|a| a.epoch() < *epoch);
                lacks(&self.nodes[from])
            }
            Said::Install { .. } => !is_past(0),
        }
    }

    /// To be called on what followed from `before`.
    fn stamp(mut self, before: Option<&Self>) -> Self {
        for (who, node) in &self.nodes {
            if before.is_none_or(|before| !Arc::ptr_eq(&before.nodes[who], node)) {
                self.shown.insert(*who, node.shown());
            }
        }
        let current = self.nodes.iter().map(|(who, node)| (*who, node.current())).collect();
        let letters = core::mem::take(&mut self.letters);
        self.letters =
            letters.into_iter().filter(|letter| self.matters(letter, &current)).collect();
        let mut hasher = blake3::Hasher::new();
        self.shown.values().for_each(|shown| _ = hasher.update(shown));
        let mut text = std::hash::DefaultHasher::new();
        (&self.letters, &self.accepted).hash(&mut text);
        hasher.update(&text.finish().to_le_bytes());
        hasher.update(&[u8::from(self.link.is_some()), u8::from(self.broken.is_some())]);
        self.fingerprint = *hasher.finalize().as_bytes();
        self
    }

    /// What a quorum accepted at one ballot of this epoch, by ballot.
    fn chosen(&self, epoch: u32) -> BTreeMap<Ballot, BTreeSet<Hashed>> {
        let mut chosen: BTreeMap<Ballot, BTreeSet<Hashed>> = BTreeMap::new();
        for &(of, ballot, value, _) in &self.accepted {
            let alike =
                |&&(o, b, v, _): &&(u32, Ballot, Hashed, Who)| (o, b, v) == (of, ballot, value);
            if of == epoch && self.accepted.iter().filter(alike).count() >= quorum_of(3) {
                chosen.entry(ballot).or_default().insert(value);
            }
        }
        chosen
    }
}

struct Record {
    spec: Arc<VerifiedSpec>,
    /// Who proposes in the first epoch, and who in the next.
    proposers: [&'static [Who]; 2],
    /// Whether keeper 2 ends the first epoch, too, for other keepers.
    two_seals: bool,
    /// Whether who was refused tries once more.
    retries: bool,
    /// Every value met.
    values: Mutex<BTreeMap<Hashed, Value>>,
    receipts: Mutex<BTreeMap<(Who, Ballot, Hashed), SignedBytes>>,
}

impl Record {
    fn new(proposers: [&'static [Who]; 2]) -> Self {
        Self::with(proposers, false, true)
    }

    fn with(proposers: [&'static [Who]; 2], two_seals: bool, retries: bool) -> Self {
        let spec = small_job_spec(PoolId([7; 32]), [1, 2, 3].map(keeper).into());
        let spec = Arc::new(VerifiedSpec::verify(sign_job(&spec)).unwrap());
        Self {
            spec,
            proposers,
            two_seals,
            retries,
            values: Mutex::default(),
            receipts: Mutex::default(),
        }
    }

    fn note(&self, value: Value) -> Hashed {
        let hash = value.hash();
        self.values.lock().unwrap().entry(hash).or_insert(value);
        hash
    }

    fn value(&self, hash: Hashed) -> Value {
        self.values.lock().unwrap()[&hash].clone()
    }

    fn receipt(&self, who: Who, ballot: Ballot, hash: Hashed) -> SignedBytes {
        let value = self.value(hash);
        let mut receipts = self.receipts.lock().unwrap();
        let made = receipts
            .entry((who, ballot, hash))
            .or_insert_with(|| sign_receipt(&node_key(who), store(who), ballot, &value, hash));
        made.clone()
    }

    /// What this keeper wants in this epoch, after `known`.
    fn wish(&self, who: Who, known: &Value) -> Value {
        match who {
            1 => known.seal(NEXT.map(keeper).into()),
            2 if self.two_seals && known.epoch == 0 => known.seal(OTHERS.map(keeper).into()),
            _ => {
                let mut body = known.body.clone();
                body.failed_starts += u32::from(who);
                known.successor(body)
            }
        }
    }

    /// Begin what this keeper wants; `chosen` where the value its acceptor has is known to be.
    fn begin(&self, world: &mut World, who: Who) {
        let node = world.node_mut(who);
        let Some(acceptor) = &node.acceptor else { return };
        let Some(value) = acceptor.value() else { return };
        let mut proposer =
            Proposer::new(store(who), acceptor.keepers().to_vec(), Sabotage::default());
        let wish = Operation::Set(Box::new(self.wish(who, value)));
        proposer.begin(1, wish, None, acceptor.promised(), 0).unwrap();
        node.proposer = Some(proposer);
        self.pursue(world, who);
    }

    /// Write to every keeper that has not answered.
    fn pursue(&self, world: &mut World, who: Who) {
        let node = &world.nodes[&who];
        let (Some(proposer), Some(acceptor)) = (&node.proposer, &node.acceptor) else { return };
        let Some((ask, silent)) = proposer.ask() else { return };
        let epoch = acceptor.epoch();
        let said = match ask {
            Ask::Prepare(ballot) => Said::Prepare { epoch, ballot },
            Ask::Accept { ballot, next, value_bytes } => {
                let value = self.note(wire::decode(value_bytes).unwrap());
                Said::Accept { epoch, ballot, next, value }
            }
        };
        let to = silent.into_iter().map(|(_, store)| store.0[0]);
        let letters: Vec<Letter> = to.map(|to| (who, to, said.clone())).collect();
        world.letters.extend(letters);
    }

    /// A node hears itself before anybody else does.
    fn settle(&self, world: &mut World) {
        while let Some(letter) = world.letters.iter().find(|(from, to, _)| from == to).cloned() {
            world.letters.remove(&letter);
            self.deliver(world, letter);
        }
    }

    fn deliver(&self, world: &mut World, (from, to, said): Letter) {
        match said {
            Said::Prepare { epoch, ballot } => self.on_prepare(world, from, to, epoch, ballot),
            Said::Accept { epoch, ballot, next, value } => {
                self.on_accept(world, from, to, epoch, (ballot, next), value);
            }
            Said::Promise { epoch, ballot, accepted, value } => {
                let promise = Promise {
                    job: self.spec.job,
                    epoch,
                    ballot,
                    accepted,
                    value_bytes: wire::encode(&self.value(value)),
                    watch: Watch { boot: BootId([0; 16]), heard: 0 },
                };
                let from = keeper(from).0;
                self.answer(world, to, epoch, |proposer| proposer.promised(from, promise, 0));
            }
            Said::Accepted { epoch, ballot, value } => {
                let receipt = self.receipt(from, ballot, value);
                let from = keeper(from).0;
                self.answer(world, to, epoch, |proposer| proposer.accepted(from, ballot, receipt));
            }
            Said::Nack { epoch, ballot, promised } => {
                let node = world.node_mut(to);
                node.told = node.told.max(promised.counter);
                // What is to be said again is said by the clock.
                let epoch_now = node.acceptor.as_ref().map(Acceptor::epoch);
                if let Some(proposer) = node.proposer.as_mut().filter(|_| epoch_now == Some(epoch))
                {
                    proposer.refused(keeper(from).0, ballot, promised);
                }
            }
            Said::NotInit { epoch } => self.on_not_init(world, from, to, epoch),
            Said::Install { accepted, value } => self.on_install(world, to, accepted, value),
        }
    }

    fn on_prepare(&self, world: &mut World, from: Who, to: Who, epoch: u32, ballot: Ballot) {
        let node = Arc::make_mut(world.nodes.get_mut(&to).unwrap());
        let Some(acceptor) = &mut node.acceptor else {
            world.letters.insert((to, from, Said::NotInit { epoch }));
            return;
        };
        let before = acceptor.promised();
        let answer = match acceptor.prepare(epoch, ballot) {
            Ok(()) => {
                if acceptor.promised() < before {
                    world.broken = Some(format!("{to} promised {ballot:?} after {before:?}"));
                }
                let accepted = acceptor.accepted();
                let value = *blake3::hash(acceptor.value_bytes()).as_bytes();
                if from != to
                    && let Some(proposer) = &mut node.proposer
                {
                    proposer.dethrone(ballot);
                    node.told = node.told.max(ballot.counter);
                }
                Said::Promise { epoch, ballot, accepted, value }
            }
            Err(Refused::Promised(promised)) => Said::Nack { epoch, ballot, promised },
            Err(Refused::NotInit) => Said::NotInit { epoch },
            Err(Refused::Moved | Refused::Malformed) => return,
        };
        world.letters.insert((to, from, answer));
    }

    fn on_accept(
        &self,
        world: &mut World,
        from: Who,
        to: Who,
        epoch: u32,
        (ballot, next): (Ballot, Ballot),
        value: Hashed,
    ) {
        let bytes = wire::encode(&self.value(value));
        let node = Arc::make_mut(world.nodes.get_mut(&to).unwrap());
        let Some(acceptor) = &mut node.acceptor else {
            world.letters.insert((to, from, Said::NotInit { epoch }));
            return;
        };
        let before = acceptor.promised();
        let answer = match acceptor.accept(epoch, ballot, next, &bytes) {
            Ok(changed) => {
                if acceptor.promised() < before {
                    world.broken = Some(format!("{to} accepted {ballot:?} after {before:?}"));
                }
                world.accepted.insert((epoch, ballot, value, to));
                if changed
                    && from != to
                    && let Some(proposer) = &mut node.proposer
                {
                    proposer.dethrone(next);
                    node.told = node.told.max(next.counter);
                }
                Said::Accepted { epoch, ballot, value }
            }
            Err(Refused::Promised(promised)) => Said::Nack { epoch, ballot, promised },
            Err(Refused::NotInit) => Said::NotInit { epoch },
            Err(Refused::Moved | Refused::Malformed) => return,
        };
        world.letters.insert((to, from, answer));
    }

    /// Hand an answer to the proposer of `to`, and go on from there.
    fn answer(
        &self,
        world: &mut World,
        to: Who,
        epoch: u32,
        hear: impl FnOnce(&mut Proposer) -> Option<End>,
    ) {
        let node = world.node_mut(to);
        let (Some(acceptor), Some(proposer)) = (&node.acceptor, &mut node.proposer) else { return };
        if acceptor.epoch() != epoch {
            return;
        }
        let Some(End { done, chosen, .. }) = hear(proposer) else {
            self.pursue(world, to);
            return;
        };
        node.ended.insert(epoch, done);
        let Some((value, value_bytes, receipts)) = chosen else { return };
        let certificate = Certificate {
            links: acceptor.links().to_vec(),
            value_bytes,
            receipts: receipts.clone(),
        };
        if certificate.verify(&self.spec, |_| false).as_ref() != Ok(&value) {
            world.broken = Some(format!("{to} believes chosen what its receipts do not prove"));
        }
        if value.sealed.is_some() {
            self.succeed(world, to, &value, receipts);
        }
    }

    /// A seal is chosen: bring the next keepers its body.
    fn succeed(&self, world: &mut World, who: Who, sealed: &Value, receipts: Vec<SignedBytes>) {
        let next: Vec<Keeper> = sealed.sealed.clone().unwrap();
        let link = Link { next: next.clone(), proof: LinkProof::Sealed(receipts) };
        let links = core::slice::from_ref(&link);
        if follow(&self.spec, links, |_| false).as_ref() != Ok(&next) {
            world.broken = Some(format!("{who}'s link does not hold"));
        }
        world.link.get_or_insert_with(|| Arc::new(link));
        let value = self.note(sealed.first_of_next_epoch());
        let install = Said::Install { accepted: Ballot::ZERO, value };
        let next: Vec<Who> = next.iter().map(|(_, store)| store.0[0]).collect();
        if self.proposers[1].len() > 1 {
            // Rivals begin together, and what is left of the first epoch is lost: all else is
            // in the other searches, and would be too much in one.
            world.letters.clear();
            for to in next {
                self.on_install(world, to, Ballot::ZERO, value);
            }
            return;
        }
        for to in next.iter().filter(|to| **to != who) {
            world.letters.insert((who, *to, install.clone()));
        }
        if next.contains(&who) {
            self.on_install(world, who, Ballot::ZERO, value);
        }
    }

    fn on_not_init(&self, world: &mut World, from: Who, to: Who, epoch: u32) {
        let Some(acceptor) = &world.nodes[&to].acceptor else { return };
        // In the first epoch all were there from the start.
        if epoch == 1 && acceptor.epoch() == 1 {
            let (accepted, value) =
                (acceptor.accepted(), self.note(acceptor.value().unwrap().clone()));
            world.letters.insert((to, from, Said::Install { accepted, value }));
        }
    }

    fn on_install(&self, world: &mut World, to: Who, accepted: Ballot, value: Hashed) {
        let link = world.link.clone().unwrap();
        let node = world.node_mut(to);
        if node.acceptor.as_ref().is_some_and(|acceptor| acceptor.epoch() == 1) {
            return;
        }
        let acceptor = Acceptor::installed(
            Arc::clone(&self.spec),
            vec![Link::clone(&link)],
            link.next.clone(),
            accepted,
            Some(self.value(value)),
            Sabotage::default(),
        );
        node.acceptor = Some(acceptor);
        (node.proposer, node.retried, node.told) = (None, false, 0);
        world.accepted.insert((1, accepted, value, to));
        if self.proposers[1].contains(&to) {
            self.begin(world, to);
        }
    }
}

impl Model for Record {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let birth = self.note(Value::birth(&self.spec));
        let node = |n: Who| Node {
            acceptor: (n < 4).then(|| Acceptor::born(Arc::clone(&self.spec), Sabotage::default())),
            proposer: None,
            retried: false,
            told: 0,
            ended: BTreeMap::new(),
        };
        let mut world = World {
            nodes: (1..=4).map(|n| (n, Arc::new(node(n)))).collect(),
            shown: BTreeMap::new(),
            letters: BTreeSet::new(),
            accepted: (1..4).map(|n| (0, Ballot::ZERO, birth, n)).collect(),
            link: None,
            broken: None,
            fingerprint: [0; 32],
        };
        for who in self.proposers[0] {
            self.begin(&mut world, *who);
        }
        self.settle(&mut world);
        vec![world.stamp(None)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        steps.extend(world.letters.iter().cloned().map(Step::Deliver));
        let retries = |who: &Who| {
            let node = &world.nodes[who];
            self.retries
                && !node.retried
                && node.proposer.as_ref().is_some_and(|proposer| proposer.is_refused())
        };
        let last = self.proposers.iter().filter_map(|of| of.last()).copied();
        steps.extend(last.filter(retries).map(Step::Retry));
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut after = world.clone();
        match step {
            Step::Deliver(letter) => self.deliver(&mut after, letter),
            Step::Retry(who) => {
                let node = after.node_mut(who);
                node.retried = true;
                let promised = node.acceptor.as_ref().unwrap().promised();
                node.proposer.as_mut().unwrap().resume(promised);
                self.pursue(&mut after, who);
            }
        }
        self.settle(&mut after);
        let after = after.stamp(Some(world));
        (after != *world).then_some(after)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("nothing breaks", |_, world: &World| world.broken.is_none()),
            Property::always("one value per ballot", |_, world: &World| {
                let mut values = BTreeMap::new();
                let alone = |&(epoch, ballot, value, _): &(u32, Ballot, Hashed, Who)| {
                    *values.entry((epoch, ballot)).or_insert(value) == value
                };
                world.accepted.iter().all(alone)
            }),
            Property::always("what is chosen is one chain", |model: &Self, world: &World| {
                [0, 1].into_iter().all(|epoch| {
                    let chosen = world.chosen(epoch);
                    let values: Vec<Hashed> = chosen.values().flatten().copied().collect();
                    chosen.values().all(|values| values.len() == 1)
                        && values.is_sorted_by(|a, b| a == b || model.value(*b).prev == *a)
                })
            }),
            Property::always("nothing is chosen after the seal", |model: &Self, world: &World| {
                let values: Vec<Hashed> = world.chosen(0).values().flatten().copied().collect();
                let seal = values.iter().position(|v| model.value(*v).sealed.is_some());
                seal.is_none_or(|at| values[at..].iter().all(|value| *value == values[at]))
            }),
            Property::always(
                "an epoch begins with the sealed body",
                |model: &Self, world: &World| {
                    let firsts = world
                        .accepted
                        .iter()
                        .filter(|(epoch, ballot, ..)| *epoch == 1 && *ballot == Ballot::ZERO);
                    let chosen = world.chosen(0);
                    let mut sealed = chosen.values().flatten().map(|v| model.value(*v));
                    let first =
                        sealed.find(|v| v.sealed.is_some()).map(|v| v.first_of_next_epoch());
                    firsts.into_iter().all(|(_, _, value, _)| {
                        first.as_ref().is_some_and(|first| first.hash() == *value)
                    })
                },
            ),
            Property::sometimes("the seal is chosen", |_, world: &World| world.link.is_some()),
        ];
        if self.two_seals {
            properties.push(Property::sometimes("the other seal is chosen", |_, world: &World| {
                world.link.as_ref().is_some_and(|link| link.next == OTHERS.map(keeper))
            }));
        }
        if !self.proposers[1].is_empty() {
            properties.push(Property::sometimes("the next epoch goes on", |_, world: &World| {
                world.nodes[&2].ended.get(&1) == Some(&true)
            }));
            if self.proposers[1].len() > 1 {
                properties.push(Property::sometimes(
                    "rivals meet in the next epoch",
                    |_, world: &World| {
                        let refused = |node: &Arc<Node>| {
                            let epoch = node.acceptor.as_ref().map(Acceptor::epoch);
                            epoch == Some(1)
                                && node.proposer.as_ref().is_some_and(|p| p.is_refused())
                        };
                        world.nodes.values().any(refused)
                    },
                ));
            }
            if self.proposers[1].len() == 1 {
                properties.push(Property::sometimes(
                    "a keeper begins with what another accepted",
                    |_, world: &World| {
                        world.letters.iter().any(|(_, _, said)| {
                        matches!(said, Said::Install { accepted, .. } if *accepted > Ballot::ZERO)
                    })
                    },
                ));
            }
        }
        if self.proposers[0].len() > 1 {
            if self.retries {
                properties.push(Property::sometimes(
                    "who comes second carries on",
                    |_, world: &World| {
                        world.nodes.values().any(|node| node.ended.get(&0) == Some(&false))
                    },
                ));
            }
            properties.push(Property::sometimes("a proposer is refused", |_, world: &World| {
                world
                    .nodes
                    .values()
                    .any(|node| node.proposer.as_ref().is_some_and(|p| p.is_refused()))
            }));
        } else {
            properties.push(Property::always(
                "who proposes alone is not refused",
                |_, world: &World| {
                    !world.nodes[&1].proposer.as_ref().is_some_and(|p| p.is_refused())
                },
            ));
        }
        properties
    }
}

/// The seal and a change, in one epoch.
#[test]
fn a_seal_and_a_change_at_once() {
    search("record, a seal and a change", Record::new([&[1, 2], &[]]));
}

/// The seal, and a change in the epoch after it, whose keepers begin it one by one.
#[test]
fn a_change_after_a_seal() {
    search("record, a change after a seal", Record::new([&[1], &[2]]));
}

/// Two seals in one epoch, each for other keepers: one of them is chosen.
#[test]
fn two_seals_at_once() {
    search("record, two seals", Record::with([&[1, 2], &[]], true, false));
}

/// Two rivals in the epoch after a seal.
#[test]
fn rivals_after_a_seal() {
    search("record, rivals after a seal", Record::with([&[1], &[2, 3]], false, false));
}
