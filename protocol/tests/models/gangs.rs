//! Two gangs on three bidders: each job wants two GPUs on two nodes, each node has one, so each
//! gang can come to hold half of what it needs while the other holds the rest.
//!
//! Whole peers are driven: two stewards, each the only keeper of its job's record (what several
//! keepers do is the model of a record), and three bidders. Gossip is left out: boards stay as
//! they are at the start.
//!
//! Messages travel in hops: what was sent in one arrives in the next, at each node in any
//! order, but that two from the same node keep theirs. Within a budget one is lost; or comes
//! later than that, when nothing else is on its way; or comes twice, then also; or a bidder's
//! daemon dies at any moment and comes back from its journal. Time passes when nothing is on
//! its way, in steps of half a second. A process runs for five seconds.
//!
//! What a node does follows from its state, the input and the time, and is worked out once for
//! each; a state of the model is five numbers of such states and what is between the nodes.
//! States that follow without a choice, once nothing may go wrong any more, are looked at
//! like all others but not counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use p2pit_protocol::{
    BlobId, BootId, HoldId, JobId, Now, Peer, PeerId,
    bidder::WorkId,
    identity::{Domain, KeyPair, SignedBytes},
    inventory::{Capacity, Gpu, GpuUuid},
    job::{Attempt, Ending, JobSpec, Outcome, Rank, RankEnd, State},
    message::{Advert, Message, Reach, Soft},
    peer::{Config, Event, Slot, Transmit},
    roster::{Roster, Statement},
    sabotage::Sabotage,
    wire,
};
use stateright::{Model, Property};

use crate::{
    cast::{WALL_MS, keeper, node, node_key, sign_job, small_job_spec, store},
    members::pool_of,
    search,
};

/// Nodes by number: the stewards of the two jobs, then the bidders.
type Who = u8;
const STEWARDS: [Who; 2] = [0, 1];
const BIDDERS: [Who; 3] = [2, 3, 4];

/// When the search begins, on every node's boot clock.
const BEGIN_MS: u64 = 1_000_000;
/// Time passes in such steps: what is due within one happens at its end.
const STEP_MS: u64 = 500;
/// How long each process runs.
const RUN_MS: u64 = 5_000;
/// By when the second job is submitted at the latest.
const LATEST_MS: u64 = 8_000;
/// By when both jobs must be over, whatever went wrong.
const PATIENCE_MS: u64 = 90_000;

/// None of the rules below is broken.
const HOLDS: &str = "every rule holds";
const GPU: &str = "a GPU is one job's";
const WOUNDED: &str = "a wounded hold is not used";
const EXPIRY: &str = "no hold outlives its expiry";
const COMMITMENT: &str = "a commitment is named by its record";
const PREPARED: &str = "a gang is started when all of it is prepared";
const NAMED: &str = "a process is started only where its record names it";
const ONCE: &str = "a rank of an attempt is started once";
const WHOLE: &str = "a gang that runs is whole";
const END: &str = "both end well in time";
const LEFT: &str = "when both are over nothing runs";

fn now_at(ms: u64) -> Now {
    Now { boot_ms: BEGIN_MS + ms, wall_ms: WALL_MS + ms }
}

fn key_of(who: Who) -> KeyPair {
    node_key(who + 1)
}

fn peer_of(who: Who) -> PeerId {
    node(who + 1)
}

fn who_is(peer: PeerId) -> Who {
    (0..5).find(|who| peer_of(*who) == peer).unwrap()
}

fn capacity(who: Who) -> Capacity {
    let gpu = Gpu {
        uuid: GpuUuid(format!("GPU-{who}")),
        model: "v100".to_owned(),
        full_name: "V100".to_owned(),
        memory_bytes: 1 << 35,
        simulated: true,
    };
    Capacity::new(vec![gpu], 4, 4_096)
}

/// What may go wrong, and how often in all.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    budget: u8,
    /// A message never arrives.
    loss: bool,
    /// A copy of a message stays behind and comes at any time later, if ever.
    copies: bool,
    /// A message comes only when time has passed.
    late: bool,
    /// A bidder's daemon dies and is started again; its processes live on.
    crash: bool,
    /// The higher job is submitted at any time after the lower.
    higher_later: bool,
    /// What arrives at a steward in one hop comes in the order of the nodes' numbers.
    stewards_in_turn: bool,
}

/// When a message arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum When {
    /// Before anything that is sent from now on.
    Now,
    /// After what arrives now.
    Next,
    /// When nothing else is on its way, if ever: time does not wait for it.
    Late,
}

/// A message on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Letter {
    when: When,
    to: Who,
    from: Who,
    /// Its number in [`Tables::messages`].
    message: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Deliver(Letter, &'static str),
    Lose(Letter, &'static str),
    /// It arrives, and once more later.
    Copy(Letter, &'static str),
    Delay(Letter, &'static str),
    /// Time passes until something is due.
    Tick(u64),
    Crash(Who),
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, letter, name) = match self {
            Self::Deliver(letter, name) => ("deliver", letter, name),
            Self::Lose(letter, name) => ("lose", letter, name),
            Self::Copy(letter, name) => ("deliver and keep a copy of", letter, name),
            Self::Delay(letter, name) => ("delay", letter, name),
            Self::Tick(ms) => return write!(f, "it is {ms} ms"),
            Self::Crash(who) => return write!(f, "crash {who}"),
        };
        write!(f, "{verb} {name} {} from {} to {}", letter.message, letter.from, letter.to)
    }
}

/// What a node is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Input {
    Message(Who, u32),
    Deadline,
    Crash,
}

/// A node: its daemon, its disk and its processes.
#[derive(Clone)]
struct Node {
    who: Who,
    peer: Peer,
    journal: BTreeMap<Vec<u8>, Vec<u8>>,
    /// When each process ends, and its GPUs.
    processes: BTreeMap<WorkId, (u64, Vec<GpuUuid>)>,
    starts: u64,
}

/// What a node did that its state does not show for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Note {
    Prepared(WorkId),
    Executed(WorkId),
    Wounded(HoldId),
}

/// What is looked at of a node's state.
struct Seen {
    /// Its next deadline.
    due_ms: Option<u64>,
    /// A GPU that two jobs have.
    shared: Option<GpuUuid>,
    /// The earliest expiry of a hold.
    expiry_ms: Option<u64>,
    /// What it is committed to or runs, each with the hold it had.
    work: Vec<(WorkId, HoldId)>,
    /// Processes that live.
    live: Vec<WorkId>,
    /// Whether holds or ranks are here, by job.
    has: Vec<JobId>,
    /// A steward's record.
    record: Option<Record>,
}

/// What a record says, as chosen.
struct Record {
    attempt: Attempt,
    state: State,
    /// Rank, node and hold.
    ranks: Vec<(Rank, Who, HoldId)>,
    succeeded: bool,
}

/// Of a job that is not submitted yet.
static UNBORN: Record =
    Record { attempt: Attempt(0), state: State::New, ranks: Vec::new(), succeeded: false };

/// What was worked out so far.
#[derive(Default)]
struct Tables {
    nodes: Vec<(Node, Seen)>,
    node_numbers: BTreeMap<[u8; 32], u32>,
    messages: Vec<Message>,
    message_numbers: BTreeMap<Vec<u8>, u32>,
    /// What follows in a node's state from an input at a time.
    followed: BTreeMap<(u32, Input, u64), Followed>,
}

#[derive(Clone)]
struct Followed {
    node: u32,
    letters: Vec<Letter>,
    notes: Vec<Note>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    now_ms: u64,
    /// Their numbers in [`Tables::nodes`].
    nodes: [u32; 5],
    /// In order; the same may be there twice.
    letters: Vec<Letter>,
    faults_left: u8,
    crashed: bool,
    prepared: BTreeSet<WorkId>,
    executed: BTreeSet<WorkId>,
    wounded: BTreeSet<HoldId>,
    /// A rule that was broken by what was done.
    broken: Option<&'static str>,
}

impl World {
    /// Put what is on its way in order, and begin the next hop where one is over.
    fn arrange(&mut self) {
        if self.letters.iter().all(|letter| letter.when != When::Now) {
            let next = self.letters.iter_mut().filter(|letter| letter.when == When::Next);
            next.for_each(|letter| letter.when = When::Now);
        }
        // On one way first what was sent first.
        self.letters.sort_by_key(|letter| {
            let late = if letter.when == When::Late { letter.message } else { 0 };
            (letter.when, letter.to, letter.from, late)
        });
    }
}

impl Tables {
    fn number_of_message(&mut self, message: Message) -> u32 {
        let bytes = wire::encode(&message);
        *self.message_numbers.entry(bytes).or_insert_with(|| {
            self.messages.push(message);
            u32::try_from(self.messages.len() - 1).unwrap()
        })
    }

    fn number_of_node(&mut self, node: Node) -> u32 {
        let fingerprint = node.fingerprint();
        *self.node_numbers.entry(fingerprint).or_insert_with(|| {
            let seen = node.seen();
            self.nodes.push((node, seen));
            u32::try_from(self.nodes.len() - 1).unwrap()
        })
    }

    fn seen(&self, number: u32) -> &Seen {
        &self.nodes[number as usize].1
    }
}

/// Takes what a node's state says of itself, but for what does not tell two states apart.
struct Sink {
    hasher: blake3::Hasher,
    /// Numbers to leave out.
    skip: u32,
}

impl fmt::Write for Sink {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Any draw of random numbers is as good as any other, and when a node was last
        // called matters only where clocks jump.
        match text {
            "index" => self.skip = 1,
            "last_now" => self.skip = 2,
            _ => {}
        }
        let Ok(number) = text.parse::<u64>() else {
            self.hasher.update(text.as_bytes());
            return Ok(());
        };
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(());
        }
        // Nothing happens between two steps of time.
        let is_time = (BEGIN_MS..2 * BEGIN_MS).contains(&number);
        let number = if is_time { number.next_multiple_of(STEP_MS) } else { number };
        self.hasher.update(&number.to_le_bytes());
        Ok(())
    }
}

impl Node {
    /// Of all that the future follows from. The journal says no more than the daemon knows.
    fn fingerprint(&self) -> [u8; 32] {
        let mut sink = Sink { hasher: blake3::Hasher::new(), skip: 0 };
        let rest = (self.who, &self.processes, self.starts);
        fmt::write(&mut sink, format_args!("{:?} {rest:?}", self.peer)).unwrap();
        *sink.hasher.finalize().as_bytes()
    }

    fn seen(&self) -> Seen {
        let (holds, work) = self.peer.book();
        let (holds, work): (Vec<_>, Vec<_>) = (holds.collect(), work.collect());
        let mut users: BTreeMap<&GpuUuid, BTreeSet<JobId>> = BTreeMap::new();
        let pinned = holds.iter().filter(|hold| hold.pinned);
        let taken = pinned.map(|hold| (hold.key.job, &hold.grant.gpus));
        let taken = taken.chain(work.iter().map(|w| (w.id.job, &w.assignment.grant.gpus)));
        let taken = taken.chain(self.processes.iter().map(|(id, (_, gpus))| (id.job, gpus)));
        for (job, gpus) in taken {
            for gpu in gpus {
                users.entry(gpu).or_default().insert(job);
            }
        }
        let exits = self.processes.values().map(|(at_ms, _)| *at_ms);
        let peer_due = self.peer.poll_timeout().map(|(at_ms, _)| at_ms.saturating_sub(BEGIN_MS));
        let record = self.peer.records().next().map(|(_, kept)| {
            let body = &kept.value.body;
            let rank = |rank: &p2pit_protocol::job::RankRecord| {
                let of = &rank.assignment;
                (of.rank, who_is(of.node), of.hold)
            };
            Record {
                attempt: body.attempt,
                state: body.state(),
                ranks: body.ranks.iter().map(rank).collect(),
                succeeded: body.outcome == Some(Outcome::Succeeded),
            }
        });
        Seen {
            due_ms: exits.chain(peer_due).min(),
            shared: users.iter().find(|(_, jobs)| jobs.len() > 1).map(|(gpu, _)| (*gpu).clone()),
            expiry_ms: holds.iter().map(|hold| hold.expiry_ms.saturating_sub(BEGIN_MS)).min(),
            work: work.iter().map(|work| (work.id, work.assignment.hold)).collect(),
            live: self.processes.keys().copied().collect(),
            has: holds
                .iter()
                .map(|hold| hold.key.job)
                .chain(work.iter().map(|w| w.id.job))
                .collect(),
            record,
        }
    }

    /// Carry out what the daemon wants, and answer it as executor, until it is quiet.
    fn settle(&mut self, ms: u64) -> (Vec<(Who, Message)>, Vec<Note>) {
        let (mut sent, mut notes) = (Vec::new(), Vec::new());
        let now = now_at(ms);
        loop {
            while let Some(write) = self.peer.poll_write() {
                match write.value {
                    Some(value) => self.journal.insert(write.key, value),
                    None => self.journal.remove(&write.key),
                };
            }
            while let Some(transmit) = self.peer.poll_transmit() {
                match transmit {
                    Transmit::Gossip(_)
                    | Transmit::Direct {
                        message: Message::Soft(_) | Message::Reconcile { .. },
                        ..
                    } => {}
                    Transmit::Direct { to, message } => {
                        if let Message::HoldsLost { holds, higher: Some(_), .. } = &message {
                            notes.extend(holds.iter().copied().map(Note::Wounded));
                        }
                        sent.push((who_is(to), message));
                    }
                }
            }
            let Some(event) = self.peer.poll_event() else { break };
            match event {
                Event::Prepare { id, .. } => {
                    notes.push(Note::Prepared(id));
                    let host = format!("host{}", self.who);
                    self.peer.prepared(id, Ok((4_000, host)), now);
                }
                Event::Execute { id, assignment, .. } => {
                    notes.push(Note::Executed(id));
                    self.processes.insert(id, (ms + RUN_MS, assignment.grant.gpus));
                    self.peer.started(id, now);
                }
                Event::StopProcess { id, .. } if self.processes.remove(&id).is_some() => {
                    let end = RankEnd::bare(Ending::Stopped, now.wall_ms);
                    self.peer.ended(id, end, now);
                }
                _ => {}
            }
        }
        (sent, notes)
    }

    fn deadline(&mut self, ms: u64) {
        let now = now_at(ms);
        let over = self.processes.iter().filter(|(_, (at_ms, _))| *at_ms <= ms);
        for id in over.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.processes.remove(&id);
            self.peer.draining(id, now);
            let end = RankEnd::bare(Ending::Exited { code: 0 }, now.wall_ms);
            self.peer.ended(id, end, now);
        }
        if self.peer.poll_timeout().is_some_and(|(at_ms, _)| at_ms <= now.boot_ms) {
            self.peer.handle_timeout(now);
        }
    }
}

struct Gangs {
    faults: Faults,
    sabotage: Sabotage,
    roster: Roster,
    /// The same with no machines but the stewards'.
    stewards: Roster,
    jobs: [JobId; 2],
    specs: [SignedBytes; 2],
    tables: Mutex<Tables>,
    /// Whether each gang had half at some time, also between two counted states.
    halved: AtomicBool,
}

impl Gangs {
    fn new(faults: Faults, sabotage: Sabotage) -> Self {
        let (roster, stewards) = (pool_of(5, 5), pool_of(5, 2));
        let spec = |steward: Who| {
            let spec = JobSpec {
                request: "2:[v100]".parse().unwrap(),
                // The first job goes before the second.
                submitted_at_ms: WALL_MS - 2_000 + 1_000 * u64::from(steward),
                ..small_job_spec(roster.pool(), vec![keeper(steward + 1)])
            };
            sign_job(&spec)
        };
        let specs = STEWARDS.map(spec);
        let jobs = [0, 1].map(|job: usize| JobId::of(&specs[job].bytes));
        let (tables, halved) = (Mutex::default(), AtomicBool::new(false));
        Self { faults, sabotage, roster, stewards, jobs, specs, tables, halved }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap()
    }

    fn daemon(&self, who: Who, starts: u64) -> Peer {
        let mut seed = [who; 32];
        seed[0] = u8::try_from(starts).unwrap();
        let mut peer = Peer::new(Config {
            key: key_of(who),
            store: store(who + 1),
            boot: BootId(seed[..16].try_into().unwrap()),
            boot_count: starts,
            genesis: self.roster.genesis_bytes().to_vec(),
            client: false,
            seed,
            sabotage: self.sabotage,
        })
        .unwrap();
        // Bidders know the stewards alone, not each other nor themselves as members: so they
        // advertise nothing, which would only be deadlines at which nothing happens.
        let known = if BIDDERS.contains(&who) { &self.stewards } else { &self.roster };
        let now = now_at(0);
        for signed in known.statements() {
            let slot = Slot::Statement(Statement::id(signed)).to_bytes();
            peer.restore(&slot, &wire::encode(signed), now).unwrap();
        }
        peer
    }

    fn crash(&self, node: &mut Node, ms: u64) {
        let now = now_at(ms);
        node.starts += 1;
        node.peer = self.daemon(node.who, node.starts);
        for (key, value) in &node.journal {
            node.peer.restore(key, value, now).unwrap();
        }
        node.peer.restored().unwrap();
        let alive: Vec<WorkId> = node.processes.keys().copied().collect();
        node.peer.set_offer(capacity(node.who), None, now);
        node.peer.resume(&alive, now);
    }

    fn advert(who: Who) -> Soft {
        let capacity = capacity(who);
        let advert = Advert {
            node: peer_of(who),
            boot: BootId([who; 16]),
            boot_count: 1,
            seq: 1,
            issued_at_ms: WALL_MS,
            store: store(who + 1),
            client: false,
            owner_only: None,
            free_cpu_cores: capacity.cpu_cores,
            free_ram_mib: capacity.ram_mib,
            capacity,
            not_free: Vec::new(),
            full: false,
            control: Vec::new(),
            data: Vec::new(),
            reach: Reach::Unknown,
            relays: Vec::new(),
        };
        Soft::advert(SignedBytes::sign(&key_of(who), Domain::Advert, wire::encode(&advert)))
    }

    /// What follows in a node from an input.
    fn follow(&self, tables: &mut Tables, number: u32, input: Input, ms: u64) -> Followed {
        if let Some(followed) = tables.followed.get(&(number, input, ms)) {
            return followed.clone();
        }
        let mut node = tables.nodes[number as usize].0.clone();
        match input {
            Input::Message(from, message) => {
                let message = tables.messages[message as usize].clone();
                node.peer.handle_message(peer_of(from), message, now_at(ms));
            }
            Input::Deadline => node.deadline(ms),
            Input::Crash => self.crash(&mut node, ms),
        }
        let followed = Self::settled(tables, node, ms);
        tables.followed.insert((number, input, ms), followed.clone());
        followed
    }

    fn settled(tables: &mut Tables, mut node: Node, ms: u64) -> Followed {
        let (sent, notes) = node.settle(ms);
        let from = node.who;
        let letters = sent.into_iter().map(|(to, message)| {
            let message = tables.number_of_message(message);
            Letter { when: When::Next, from, to, message }
        });
        let letters = letters.collect();
        Followed { node: tables.number_of_node(node), letters, notes }
    }

    fn give(&self, world: &mut World, who: Who, input: Input) {
        let mut tables = self.tables();
        let number = world.nodes[usize::from(who)];
        let followed = self.follow(&mut tables, number, input, world.now_ms);
        world.nodes[usize::from(who)] = followed.node;
        world.letters.extend(followed.letters);
        for note in followed.notes {
            match note {
                Note::Prepared(id) => _ = world.prepared.insert(id),
                Note::Wounded(hold) => _ = world.wounded.insert(hold),
                Note::Executed(id) => self.note_executed(&tables, world, who, id),
            }
        }
    }

    /// A process was started: was it to be?
    fn note_executed(&self, tables: &Tables, world: &mut World, who: Who, id: WorkId) {
        if !world.executed.insert(id) {
            world.broken = Some(ONCE);
        }
        let gang = [0, 1].map(|rank| WorkId { rank: Rank(rank), ..id });
        if !gang.iter().all(|id| world.prepared.contains(id)) {
            world.broken = Some(PREPARED);
        }
        let steward = self.number_of_job(id.job);
        let record = tables.seen(world.nodes[steward]).record.as_ref().unwrap_or(&UNBORN);
        let named = record.ranks.iter().any(|(rank, node, _)| *rank == id.rank && *node == who);
        if record.attempt < id.attempt || (record.attempt == id.attempt && !named) {
            world.broken = Some(NAMED);
        }
    }

    fn records<'a>(&self, tables: &'a Tables, world: &World) -> [&'a Record; 2] {
        STEWARDS.map(|who| {
            tables.seen(world.nodes[usize::from(who)]).record.as_ref().unwrap_or(&UNBORN)
        })
    }

    fn both_done(&self, tables: &Tables, world: &World) -> bool {
        self.records(tables, world).iter().all(|record| record.state == State::Done)
    }

    fn may_fail(&self, tables: &Tables, world: &World) -> bool {
        world.faults_left > 0 && !self.both_done(tables, world)
    }

    /// What may happen where nothing goes wrong.
    fn plain_steps(&self, tables: &Tables, world: &World) -> Vec<Step> {
        let mut steps = Vec::new();
        // What arrives at other nodes in the same hop is independent of it.
        let first = world.letters.first().filter(|letter| letter.when == When::Now);
        let mut known: Option<Letter> = None;
        for letter in world.letters.iter().copied() {
            let name = tables.messages[letter.message as usize].name();
            let same_way = known
                .is_some_and(|k| (k.when, k.to, k.from) == (letter.when, letter.to, letter.from));
            let offered = match letter.when {
                When::Now => {
                    let in_turn = self.faults.stewards_in_turn && STEWARDS.contains(&letter.to);
                    let is_first = known.is_none();
                    first.is_some_and(|first| first.to == letter.to)
                        && !same_way
                        && (is_first || !in_turn)
                }
                When::Next => false,
                // Copies alike are one choice.
                When::Late => {
                    let comes = first.is_none_or(|first| {
                        self.faults.higher_later && letter.message == 0 && first.to >= letter.to
                    });
                    comes && known != Some(letter)
                }
            };
            known = Some(letter);
            if offered {
                steps.push(Step::Deliver(letter, name));
            }
        }
        let unborn = self.records(tables, world).iter().any(|record| record.state == State::New);
        let latest = unborn && world.now_ms >= LATEST_MS;
        let late = world.now_ms > PATIENCE_MS;
        if first.is_some() || self.both_done(tables, world) || late || latest {
            return steps;
        }
        let due = |who: Who| tables.seen(world.nodes[usize::from(who)]).due_ms;
        let next_ms = (0..5).filter_map(due).min().map(|due_ms| due_ms.max(world.now_ms + 1));
        steps.extend(next_ms.map(|next_ms| Step::Tick(next_ms.next_multiple_of(STEP_MS))));
        steps
    }

    fn take_step(&self, world: &mut World, step: Step) {
        let mut take = |letter: Letter| {
            let at = world.letters.iter().position(|other| *other == letter).unwrap();
            world.letters.remove(at);
        };
        match step {
            Step::Deliver(letter, _) => {
                take(letter);
                self.give(world, letter.to, Input::Message(letter.from, letter.message));
            }
            Step::Lose(letter, _) => {
                take(letter);
                world.faults_left -= 1;
            }
            Step::Copy(letter, _) => {
                take(letter);
                world.faults_left -= 1;
                world.letters.push(Letter { when: When::Late, ..letter });
                self.give(world, letter.to, Input::Message(letter.from, letter.message));
            }
            Step::Delay(letter, _) => {
                take(letter);
                world.faults_left -= 1;
                world.letters.push(Letter { when: When::Late, ..letter });
            }
            Step::Tick(ms) => {
                world.now_ms = ms;
                for who in STEWARDS.into_iter().chain(BIDDERS) {
                    let number = world.nodes[usize::from(who)];
                    let due_ms = self.tables().seen(number).due_ms;
                    if due_ms.is_some_and(|due_ms| due_ms <= ms) {
                        self.give(world, who, Input::Deadline);
                    }
                }
            }
            Step::Crash(who) => {
                world.faults_left -= 1;
                world.crashed = true;
                self.give(world, who, Input::Crash);
            }
        }
        world.arrange();
        let broken = self.broken_rule(&self.tables(), world);
        world.broken = world.broken.or(broken);
    }

    /// A rule that does not hold.
    fn broken_rule(&self, tables: &Tables, world: &World) -> Option<&'static str> {
        let records = self.records(tables, world);
        let bidders = BIDDERS.map(|who| (who, tables.seen(world.nodes[usize::from(who)])));
        let over = records.iter().all(|record| record.state == State::Done);
        let mut work =
            bidders.iter().flat_map(|(who, seen)| seen.work.iter().map(move |w| (who, w)));
        let has = |job| bidders.iter().filter(|(_, seen)| seen.has.contains(&job)).count();
        if self.jobs.iter().all(|job| has(*job) == 1) {
            self.halved.store(true, Ordering::Relaxed);
        }
        let mut named = records.iter().flat_map(|record| &record.ranks);
        if bidders.iter().any(|(_, seen)| seen.shared.is_some()) {
            return Some(GPU);
        }
        if work.clone().any(|(_, (_, hold))| world.wounded.contains(hold))
            || named.any(|(_, _, hold)| world.wounded.contains(hold))
        {
            return Some(WOUNDED);
        }
        if bidders.iter().any(|(_, seen)| seen.expiry_ms.is_some_and(|ms| ms < world.now_ms)) {
            return Some(EXPIRY);
        }
        // What is over for the record may not have heard so.
        let is_named = |(who, (id, hold)): (&Who, &(WorkId, HoldId))| {
            let record = records[self.number_of_job(id.job)];
            id.attempt < record.attempt
                || (id.attempt == record.attempt
                    && (record.ranks.is_empty() || record.ranks.contains(&(id.rank, *who, *hold))))
        };
        if !work.all(is_named) {
            return Some(COMMITMENT);
        }
        let part = records.iter().zip(self.jobs).any(|(record, job)| {
            let id = |rank| WorkId { job, attempt: record.attempt, rank };
            record.state == State::Running
                && record.ranks.iter().any(|(rank, ..)| !world.executed.contains(&id(*rank)))
        });
        if part {
            return Some(WHOLE);
        }
        let failed = records.iter().any(|r| r.state == State::Done && !r.succeeded);
        if failed || (!over && world.now_ms > PATIENCE_MS) {
            return Some(END);
        }
        let live = bidders.iter().any(|(_, seen)| !seen.live.is_empty());
        (over && world.letters.is_empty() && live).then_some(LEFT)
    }

    fn number_of_job(&self, job: JobId) -> usize {
        self.jobs.iter().position(|known| *known == job).unwrap()
    }
}

impl Model for Gangs {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let now = now_at(0);
        let mut world = World {
            now_ms: 0,
            nodes: [0; 5],
            letters: Vec::new(),
            faults_left: self.faults.budget,
            crashed: false,
            prepared: BTreeSet::new(),
            executed: BTreeSet::new(),
            wounded: BTreeSet::new(),
            broken: None,
        };
        let mut tables = self.tables();
        for who in STEWARDS.into_iter().chain(BIDDERS) {
            let mut peer = self.daemon(who, 1);
            peer.restored().unwrap();
            if BIDDERS.contains(&who) {
                peer.set_offer(capacity(who), None, now);
            }
            peer.resume(&[], now);
            peer.handle_timeout(now);
            if let Some(spec) = self.specs.get(usize::from(who)) {
                for bidder in BIDDERS {
                    assert!(peer.handle_gossip(Self::advert(bidder), now));
                }
                peer.tree_stored(BlobId([0xc0; 32]));
                if who == 0 && self.faults.higher_later {
                    let (spec, receipts) = (spec.clone(), Vec::new());
                    let init = Message::Init { spec, receipts, refused: None };
                    let message = tables.number_of_message(init);
                    assert_eq!(message, 0, "it is known by its number");
                    world.letters.push(Letter { when: When::Late, from: 1, to: 0, message });
                } else {
                    peer.submit(spec.clone(), now).unwrap();
                }
            }
            let (journal, processes) = (BTreeMap::new(), BTreeMap::new());
            let node = Node { who, peer, journal, processes, starts: 1 };
            let followed = Self::settled(&mut tables, node, 0);
            world.nodes[usize::from(who)] = followed.node;
            world.letters.extend(followed.letters);
        }
        world.arrange();
        vec![world]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let tables = self.tables();
        let plain = self.plain_steps(&tables, world);
        if self.may_fail(&tables, world) {
            for step in &plain {
                let Step::Deliver(letter, name) = *step else { continue };
                if letter.when == When::Now {
                    let faults = &self.faults;
                    steps.extend(faults.loss.then_some(Step::Lose(letter, name)));
                    steps.extend(faults.copies.then_some(Step::Copy(letter, name)));
                    steps.extend(faults.late.then_some(Step::Delay(letter, name)));
                }
            }
            if self.faults.crash && !world.crashed {
                steps.extend(BIDDERS.map(Step::Crash));
            }
        }
        steps.extend(plain);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut world = world.clone();
        self.take_step(&mut world, step);
        // What is to come by itself is no state of its own.
        loop {
            let tables = self.tables();
            if world.broken.is_some() || self.may_fail(&tables, &world) {
                break;
            }
            let [step] = self.plain_steps(&tables, &world)[..] else { break };
            drop(tables);
            self.take_step(&mut world, step);
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(HOLDS, |_, world: &World| world.broken.is_none()),
            Property::sometimes("both gangs get to run", |model: &Self, world: &World| {
                let tables = model.tables();
                model.records(&tables, world).iter().all(|record| record.succeeded)
            }),
            Property::sometimes("a hold is wounded", |_, world: &World| !world.wounded.is_empty()),
        ];
        if !self.faults.higher_later {
            properties.push(Property::sometimes("each gang has half", |model: &Self, _| {
                model.halved.load(Ordering::Relaxed)
            }));
        }
        properties
    }
}

fn gangs(faults: Faults) -> Gangs {
    Gangs::new(faults, Sabotage::default())
}

/// One fault of some kind; between faults stewards hear their bidders in turn.
const ONE_FAULT: Faults = Faults {
    budget: 1,
    loss: false,
    copies: false,
    late: false,
    crash: false,
    higher_later: false,
    stewards_in_turn: true,
};

const HIGHER_LATER: Faults = Faults { budget: 0, higher_later: true, ..ONE_FAULT };

#[test]
fn two_gangs_in_every_order() {
    search("gangs, every order", gangs(Faults::default()));
}

/// The lower job may have pins, or run, when the higher is first heard of.
#[test]
fn two_gangs_and_the_higher_comes_later() {
    search("gangs, the higher later", gangs(HIGHER_LATER));
}

#[test]
fn two_gangs_and_a_lost_message() {
    search("gangs, a message lost", gangs(Faults { loss: true, ..ONE_FAULT }));
}

#[test]
fn two_gangs_and_a_late_message() {
    search("gangs, a message late", gangs(Faults { late: true, ..ONE_FAULT }));
}

#[test]
fn two_gangs_and_a_message_that_comes_twice() {
    search("gangs, a message twice", gangs(Faults { copies: true, ..ONE_FAULT }));
}

#[test]
fn two_gangs_and_a_bidder_that_starts_again() {
    search("gangs, a bidder starts again", gangs(Faults { crash: true, ..ONE_FAULT }));
}

/// The model is worth something: it finds what goes wrong without each rule.
#[cfg(feature = "sabotage")]
mod without {
    use p2pit_protocol::sabotage::Rule;
    use stateright::{Checker, HasDiscoveries};

    use super::*;

    /// Every way in which a run without `rule` is first found to go wrong must be one of `expected`.
    fn breaks(rule: Rule, faults: Faults, expected: &[&str]) {
        let model = Gangs::new(faults, Sabotage::remove(rule));
        let search = model.checker().finish_when(HasDiscoveries::AnyFailures);
        let checker = search.spawn_bfs().join();
        let found = checker.assert_any_discovery(HOLDS);
        let broken = found.last_state().broken.unwrap();
        println!("without {rule:?}: {broken}, after {} states", checker.unique_state_count());
        assert!(expected.contains(&broken), "without {rule:?}: {broken}");
    }

    #[test]
    fn what_is_taken_is_not_free() {
        breaks(Rule::TakenIsNotFree, Faults::default(), &[GPU]);
    }

    #[test]
    fn a_commitment_needs_its_certificate() {
        breaks(Rule::CommitNeedsCertificate, Faults::default(), &[COMMITMENT]);
    }

    #[test]
    fn pins_are_not_wounded() {
        breaks(Rule::PinsAreNotWounded, HIGHER_LATER, &[WOUNDED]);
    }

    #[test]
    fn holds_expire() {
        breaks(Rule::HoldsExpire, Faults { loss: true, ..ONE_FAULT }, &[EXPIRY]);
    }

    #[test]
    fn a_gang_starts_whole() {
        breaks(Rule::GangStartsWhole, Faults { loss: true, ..ONE_FAULT }, &[PREPARED]);
    }
}
