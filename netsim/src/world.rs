//! The world: machines, links and people, moved on one event at a time.
//!
//! Events are ordered by true time, then by the order in which they arose. Carrying one
//! out hands something to one daemon, makes durable what the daemon wants written, and
//! only then lets its messages and requests leave, as the contract of
//! [`p2pit_protocol::Peer`] says. A crash may cut in at every entry of the journal: what
//! was not written is lost, and so is everything that would have left afterwards. After
//! every event the checkers look at what it touched.

pub mod copies;
mod faults;
mod notes;
mod people;
mod processes;

use core::fmt;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use p2pit_protocol::{
    JobId, Now, Peer, PeerId, StoreId,
    bidder::{Hold, WorkId},
    identity::simulate_signatures,
    job::{Ending, State},
    message::{Message, Soft},
    peer::{Event, Slot, Transmit, Write},
    record::{Replica, Value},
    wire,
};

pub use faults::Down;
pub(crate) use faults::Troubles;

use crate::{
    check::{self, Checker, Scene, Violation, d2},
    clock::{Clock, WALL_START_MS},
    ledger::{Happening, Ledger},
    machine::{Machine, Still},
    network::Network,
    options::Options,
    pool::Pool,
    random::Random,
    trace::Trace,
    workload::{Workload, draw_capacity},
};

/// Events at one moment before the world is called stuck: a daemon wants to be woken
/// again and again without time passing.
const EVENTS_AT_ONCE_MAX: u64 = 200_000;

/// How often checkers look at what no event touched.
const SURVEY_MS: u64 = 5_000;

/// Machines, links, people and what watches them.
#[derive(Debug)]
pub struct World {
    /// What it was made of.
    pub options: Options,
    /// Every machine; those that offer GPUs first.
    pub machines: Vec<Machine>,
    /// What people want.
    pub workload: Workload,
    /// What truly happened.
    pub ledger: Ledger,
    /// Its hash, and lines where kept.
    pub trace: Trace,
    /// How often what happened.
    pub counts: Counts,
    pool: Pool,
    network: Network,
    by_peer: BTreeMap<PeerId, usize>,
    now_ms: u64,
    queue: BTreeMap<(u64, u64), Occurrence>,
    sequence: u64,
    events_at_once: u64,
    timer_plans: u64,
    faults: Random,
    executors: Random,
    copies: Random,
    people: Random,
    healed_ms: Option<u64>,
    moved_ms: u64,
    happenings: Vec<Happening>,
    touched: BTreeSet<usize>,
    checkers: Vec<Box<dyn Checker>>,
    interceptor: Option<Interceptor>,
    /// The message that the last event brought to a daemon, if it was one.
    pub delivered: Option<Delivery>,
    /// What waits for a machine that stands still.
    waiting: BTreeMap<usize, VecDeque<Occurrence>>,
    survey_ms: u64,
    /// Machines that stand in for another with the same identity.
    clones: BTreeMap<usize, usize>,
    /// What was done to the machines, for checkers that ask what might explain a loss.
    pub(crate) troubles: Troubles,
}

/// A direct message that reached a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The sending machine.
    pub from: usize,
    /// The receiving machine.
    pub to: usize,
    /// As [`Message::name`] calls it.
    pub name: &'static str,
    /// The job it is about, if it is about one.
    pub job: Option<JobId>,
}

/// How often what happened in a run: a search in which nothing happened proves nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Events carried out.
    pub events: u64,
    /// Messages sent.
    pub messages: u64,
    /// Messages that were lost.
    pub lost: u64,
    /// Messages that came more than once.
    pub duplicates: u64,
    /// Holds taken by higher jobs.
    pub wounds: u64,
    /// Attempts assigned.
    pub assigns: u64,
    /// Attempts taken back before they ran.
    pub unassigns: u64,
    /// Daemons that died.
    pub crashes: u64,
    /// Of those, while they wrote.
    pub write_crashes: u64,
    /// Jobs that another keeper took up, by a new term.
    pub takeovers: u64,
    /// Configurations of a record that ended.
    pub seals: u64,
    /// Stewards that fell silent because nobody confirmed them in time.
    pub silences: u64,
    /// Processes that their lease ended.
    pub lease_ends: u64,
    /// Machines that died.
    pub reboots: u64,
    /// Of those, with everything on their disk.
    pub wipes: u64,
    /// Stores that daemons gave up, since others knew of another life of them.
    pub stores_refused: u64,
    /// Daemons that stopped because nothing could be written.
    pub full_disks: u64,
    /// Daemons that stood still.
    pub pauses: u64,
    /// Machines that slept.
    pub suspends: u64,
    /// Links and parts that were cut.
    pub cuts: u64,
    /// Wall clocks that jumped.
    pub wall_steps: u64,
    /// Daemons started again.
    pub restarts: u64,
    /// Processes started.
    pub processes: u64,
    /// Jobs submitted.
    pub jobs: u64,
    /// Copies made of what ranks left.
    pub copies: u64,
    /// Copies made of `keep/` while ranks ran.
    pub saves: u64,
}

/// A message on its way.
#[derive(Debug)]
pub struct Letter<'a> {
    /// The sending machine.
    pub from: usize,
    /// The receiving machine.
    pub to: usize,
    /// What it says.
    pub message: &'a Message,
    /// True time.
    pub at_ms: u64,
}

/// What a story does to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Treatment {
    /// What the network does anyway.
    AsDrawn,
    /// It never arrives.
    Lose,
    /// It arrives as drawn, and again after each of these milliseconds.
    Repeat(Vec<u64>),
}

/// A story's hand on the network.
pub struct Interceptor(Box<dyn FnMut(&Letter<'_>) -> Treatment + Send>);

impl fmt::Debug for Interceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interceptor")
    }
}

/// What is to happen at some moment.
#[derive(Debug)]
enum Occurrence {
    Deliver { from: usize, to: usize, message: Arc<Message> },
    Gossip { to: usize, item: Arc<Soft> },
    Unreachable { at: usize, peer: usize },
    Link { at: usize, peer: usize },
    Timer { at: usize, plan: u64 },
    Prepared { at: usize, start: u64, id: WorkId, fails: bool },
    Spawned { at: usize, start: u64, id: WorkId },
    Exits { at: usize, id: WorkId, ending: Ending },
    Limit { at: usize, id: WorkId },
    LeaseEnds { at: usize, id: WorkId, plan: u64 },
    Started { at: usize, start: u64, id: WorkId },
    Gather { at: usize, start: u64, id: WorkId },
    Gathered { at: usize, start: u64, id: WorkId },
    Crash { at: usize, down: Down, down_ms: u64 },
    Start { at: usize },
    Wipe { at: usize, down_ms: u64 },
    HandOver { at: usize, until_ms: u64, idle: u32, down_ms: Option<u64> },
    Still { at: usize, still: Still, for_ms: u64 },
    Wake { at: usize },
    Fill { at: usize, for_ms: u64 },
    Room { at: usize },
    StepWall { at: usize, by_ms: i64 },
    Slow { directions: Vec<(usize, usize)>, by_ms: u64, for_ms: u64 },
    Quick { directions: Vec<(usize, usize)> },
    Cut { directions: Vec<(usize, usize)>, for_ms: u64 },
    Mend { directions: Vec<(usize, usize)> },
    Foreign { at: usize, gpu: usize, for_ms: u64 },
    ForeignEnds { at: usize, gpu: usize },
    Save { at: usize, id: WorkId },
    Copy { at: usize, start: u64, job: JobId },
    TakeRoom { at: usize, for_ms: u64 },
    GiveRoom { at: usize },
    LoseCopies { at: usize },
    Submit { task: usize, tried: u64 },
    Uploaded { task: usize, tried: u64 },
    StopJob { task: usize },
}

/// Who carries something out, and so what must not stand still for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The daemon, by itself.
    Daemon,
    /// The daemon, and it came over the network.
    Network,
    /// Supervisors, processes, and whatever else is on the machine.
    Machine,
}

impl Occurrence {
    /// The machine that it needs, and what of it.
    fn place(&self) -> Option<(usize, Whose)> {
        match self {
            Self::Deliver { to, .. } | Self::Gossip { to, .. } => Some((*to, Whose::Network)),
            Self::Unreachable { at, .. }
            | Self::Link { at, .. }
            | Self::Timer { at, .. }
            | Self::Prepared { at, .. }
            | Self::Started { at, .. }
            | Self::Gather { at, .. }
            | Self::Gathered { at, .. }
            | Self::HandOver { at, .. }
            | Self::Copy { at, .. }
            | Self::Foreign { at, .. }
            | Self::ForeignEnds { at, .. } => Some((*at, Whose::Daemon)),
            Self::Spawned { at, .. }
            | Self::Exits { at, .. }
            | Self::Limit { at, .. }
            | Self::LeaseEnds { at, .. }
            | Self::Save { at, .. }
            | Self::Start { at } => Some((*at, Whose::Machine)),
            Self::Crash { .. }
            | Self::Wipe { .. }
            | Self::Still { .. }
            | Self::Wake { .. }
            | Self::Fill { .. }
            | Self::Room { .. }
            | Self::StepWall { .. }
            | Self::Slow { .. }
            | Self::Quick { .. }
            | Self::Cut { .. }
            | Self::Mend { .. }
            | Self::TakeRoom { .. }
            | Self::GiveRoom { .. }
            | Self::LoseCopies { .. }
            | Self::Submit { .. }
            | Self::Uploaded { .. }
            | Self::StopJob { .. } => None,
        }
    }
}

impl World {
    /// The world of `options`, at its first moment: every daemon is about to start.
    ///
    /// # Errors
    /// The pool cannot be founded: a mistake here.
    pub fn new(options: Options, keep_lines: bool) -> anyhow::Result<Self> {
        // Curves would take most of a run's time, and nothing is searched for in them.
        simulate_signatures();
        let pool = Pool::found(&options)?;
        let mut clocks = Random::of(options.seed, "clocks");
        let mut machines = Vec::new();
        for (index, member) in pool.members.iter().enumerate() {
            let capacity = if member.client {
                p2pit_protocol::inventory::Capacity::default()
            } else {
                draw_capacity(&options, index)
            };
            let drift_ppm = i64::try_from(clocks.between(0, 2 * options.drift_ppm_max))?
                - i64::try_from(options.drift_ppm_max)?;
            let skew_ms = clocks.between(0, 2 * options.skew_ms_max);
            let wall_start_ms = WALL_START_MS + skew_ms - options.skew_ms_max;
            let clock = Clock::new(clocks.between(1_000, 800_000_000), drift_ppm, wall_start_ms);
            let mut machine = Machine::new(index, member.clone(), capacity, clock);
            machine.journal.extend(pool.journal.iter().cloned());
            machines.push(machine);
        }
        let capacities: Vec<_> = machines.iter().map(|machine| machine.capacity.clone()).collect();
        let mut world = Self {
            by_peer: machines.iter().map(|machine| (machine.peer, machine.index)).collect(),
            network: Network::new(&options, machines.len()),
            workload: Workload::draw(&options, &capacities),
            faults: Random::of(options.seed, "faults"),
            executors: Random::of(options.seed, "executors"),
            copies: Random::of(options.seed, "copies"),
            people: Random::of(options.seed, "people"),
            trace: Trace::new(keep_lines),
            checkers: check::of(&options),
            options,
            machines,
            pool,
            ledger: Ledger::default(),
            counts: Counts::default(),
            now_ms: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            events_at_once: 0,
            timer_plans: 0,
            healed_ms: None,
            moved_ms: 0,
            happenings: Vec::new(),
            touched: BTreeSet::new(),
            interceptor: None,
            delivered: None,
            waiting: BTreeMap::new(),
            survey_ms: 0,
            clones: BTreeMap::new(),
            troubles: Troubles::default(),
        };
        for at in 0..world.machines.len() {
            world.at(at as u64, Occurrence::Start { at });
        }
        for task in 0..world.workload.tasks.len() {
            let at_ms = world.workload.tasks[task].at_ms;
            world.at(at_ms, Occurrence::Submit { task, tried: 0 });
        }
        world.plan_faults();
        Ok(world)
    }

    /// True time.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// When anything last moved a job on: a value chosen, a process begun or gone.
    #[must_use]
    pub fn moved_ms(&self) -> u64 {
        self.moved_ms
    }

    /// Carry out the next event and look at what it did. False where there is none.
    ///
    /// # Errors
    /// A rule was broken.
    ///
    /// # Panics
    /// A daemon wants to be woken again and again at one moment.
    pub fn step(&mut self) -> Result<bool, Violation> {
        let Some(((at_ms, _), occurrence)) = self.queue.pop_first() else { return Ok(false) };
        self.events_at_once = if at_ms == self.now_ms { self.events_at_once + 1 } else { 0 };
        assert!(self.events_at_once < EVENTS_AT_ONCE_MAX, "time stands still at {at_ms} ms");
        self.now_ms = at_ms;
        self.counts.events += 1;
        self.delivered = None;
        self.carry_out(occurrence);
        self.check()?;
        Ok(true)
    }

    /// Go on until `reached` or until `limit_ms` of time have passed; whether it was
    /// reached.
    ///
    /// # Errors
    /// A rule was broken.
    pub fn run_until(
        &mut self,
        limit_ms: u64,
        mut reached: impl FnMut(&Self) -> bool,
    ) -> Result<bool, Violation> {
        let end_ms = self.now_ms + limit_ms;
        while !reached(self) {
            let next_ms = self.queue.first_key_value().map(|((at_ms, _), _)| *at_ms);
            if next_ms.is_none_or(|at_ms| at_ms > end_ms) {
                self.now_ms = end_ms;
                return Ok(false);
            }
            self.step()?;
        }
        Ok(true)
    }

    /// Let `hand` decide about every direct message from now on.
    pub fn intercept(&mut self, hand: impl FnMut(&Letter<'_>) -> Treatment + Send + 'static) {
        self.interceptor = Some(Interceptor(Box::new(hand)));
    }

    /// Whether the daemon of this machine runs.
    #[must_use]
    pub fn is_up(&self, machine: usize) -> bool {
        self.machines[machine].daemon.is_some()
    }

    /// The machine of a peer.
    #[must_use]
    pub fn machine_of(&self, peer: PeerId) -> Option<usize> {
        self.by_peer.get(&peer).copied()
    }

    /// The state of a task's job, as chosen.
    #[must_use]
    pub fn state_of(&self, task: usize) -> Option<State> {
        let job = self.workload.tasks.get(task)?.job?;
        self.ledger.current(job).map(|value| value.body.state())
    }

    /// Whether every task became a job, and every job that exists came to its end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.workload.tasks.iter().all(|task| task.job.is_some())
            && self.ledger.unfinished().is_empty()
    }

    /// What is still held, kept busy or driven anywhere, in words; empty after a while
    /// in a world where every job is over.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for machine in &self.machines {
            let Some(peer) = &machine.daemon else {
                left.push(format!("{} is down", machine.name()));
                continue;
            };
            let name = machine.name();
            let (holds, work) = peer.book();
            left.extend(holds.map(|hold| format!("{name} holds {:?} for {:?}", hold.id, hold.key)));
            left.extend(work.map(|work| format!("{name} has {:?} at {:?}", work.id, work.phase)));
            let standing = peer.node_view().standing;
            left.extend(standing.iter().map(|key| format!("{name} lets {key:?} wait")));
            if peer.driven() > 0 {
                left.push(format!("{name} drives {} jobs", peer.driven()));
            }
            let processes = machine.executor.processes.iter();
            left.extend(
                processes.map(|(id, p)| format!("{name} has process {id:?} {:?}", p.state)),
            );
            let slots = machine.journal.keys().filter_map(|key| wire::decode::<Slot>(key).ok());
            let temporary =
                |slot: &Slot| matches!(slot, Slot::Hold(_) | Slot::Work(..) | Slot::End(..));
            left.extend(slots.filter(temporary).map(|slot| format!("{name} journals {slot:?}")));
            let preparing = machine.executor.preparing.iter().chain(&machine.executor.prepared);
            left.extend(preparing.map(|id| format!("{name} has directories of {id:?}")));
        }
        // What its holders lost others make anew, also of a job that is over.
        for (job, values) in &self.ledger.chosen {
            let last = values.last().filter(|last| last.body.state() == State::Done);
            let lacking = last.and_then(|last| d2::lacking(&self.scene(), *job, &last.body));
            // Where every disk that had it was lost, nobody can.
            if let Some((id, have, wanted)) = lacking.filter(|(_, have, _)| *have > 0) {
                left.push(format!("what {id:?} left is on {have} disks, not on {wanted}"));
            }
        }
        left
    }

    // ---- events -----------------------------------------------------------------------

    fn at(&mut self, at_ms: u64, occurrence: Occurrence) {
        self.sequence += 1;
        self.queue.insert((at_ms.max(self.now_ms), self.sequence), occurrence);
    }

    fn after(&mut self, ms: u64, occurrence: Occurrence) {
        self.at(self.now_ms + ms, occurrence);
    }

    fn carry_out(&mut self, occurrence: Occurrence) {
        let Some(occurrence) = self.unless_still(occurrence) else { return };
        match occurrence {
            Occurrence::Deliver { from, to, message } => self.deliver(from, to, message),
            Occurrence::Gossip { to, item } => {
                self.mix("gossip", to, &[]);
                self.with_daemon(to, |peer, now| peer.handle_gossip((*item).clone(), now));
            }
            Occurrence::Unreachable { at, peer } => {
                let id = self.machines[peer].peer;
                self.with_daemon(at, |daemon, now| daemon.peer_unreachable(id, now));
            }
            Occurrence::Link { at, peer } => self.tend_link(at, peer),
            Occurrence::Timer { at, plan } => {
                if self.machines[at].timer.is_some_and(|(_, current)| current == plan) {
                    self.machines[at].timer = None;
                    self.mix("timer", at, &[]);
                    self.with_daemon(at, Peer::handle_timeout);
                }
            }
            Occurrence::Prepared { at, start, id, fails } => self.prepared(at, start, id, fails),
            Occurrence::Spawned { at, start, id } => self.spawned(at, start, id),
            Occurrence::Exits { at, id, ending } => self.exits(at, id, ending),
            Occurrence::Limit { at, id } => self.end_process(at, id, Ending::TimedOut),
            Occurrence::Gathered { at, start, id } => self.gathered(at, start, id),
            Occurrence::Crash { at, down, down_ms } => self.crash(at, down, Some(down_ms)),
            Occurrence::LeaseEnds { at, id, plan } => self.lease_ends(at, id, plan),
            Occurrence::Started { at, start, id } => self.tell_started(at, start, id),
            Occurrence::Gather { at, start, id } => {
                if self.machines[at].starts == start {
                    self.gather(at, id);
                }
            }
            Occurrence::Wipe { at, down_ms } => self.wipe(at, down_ms),
            Occurrence::HandOver { at, until_ms, idle, down_ms } => {
                self.hand_over(at, until_ms, idle, down_ms);
            }
            Occurrence::Still { at, still, for_ms } => self.stand_still(at, still, for_ms),
            Occurrence::Wake { at } => self.awake(at),
            Occurrence::Fill { at, for_ms } => self.fill_disk(at, for_ms),
            Occurrence::Room { at } => self.make_room(at),
            Occurrence::StepWall { at, by_ms } => self.step_wall_clock(at, by_ms),
            Occurrence::Slow { directions, by_ms, for_ms } => self.slow(directions, by_ms, for_ms),
            Occurrence::Quick { directions } => {
                directions.iter().for_each(|(from, to)| self.network.slow(*from, *to, 0));
            }
            Occurrence::Start { at } => self.start(at),
            Occurrence::Cut { directions, for_ms } => self.cut(directions, for_ms),
            Occurrence::Mend { directions } => self.mend(&directions),
            Occurrence::Foreign { at, gpu, for_ms } => self.foreign(at, gpu, for_ms),
            Occurrence::ForeignEnds { at, gpu } => self.foreign_ends(at, gpu),
            Occurrence::Save { at, id } => self.save(at, id),
            Occurrence::Copy { at, start, job } => self.copy(at, start, job),
            Occurrence::TakeRoom { at, for_ms } => self.take_room(at, for_ms),
            Occurrence::GiveRoom { at } => self.machines[at].no_room = false,
            Occurrence::LoseCopies { at } => self.lose_copies(at),
            Occurrence::Submit { task, tried } => self.submit_task(task, tried),
            Occurrence::Uploaded { task, tried } => self.uploaded(task, tried),
            Occurrence::StopJob { task } => self.stop_task(task),
        }
    }

    /// What is to happen now; nothing where it has to wait for a machine that stands still.
    fn unless_still(&mut self, occurrence: Occurrence) -> Option<Occurrence> {
        let Some((at, whose)) = occurrence.place() else { return Some(occurrence) };
        match (self.machines[at].still, whose) {
            (None, _) | (Some(Still::Daemon), Whose::Machine) => Some(occurrence),
            (Some(Still::Machine), Whose::Network) => {
                // Nobody listens; what the sender makes of that it is told elsewhere.
                self.counts.lost += 1;
                None
            }
            (Some(Still::Daemon), Whose::Daemon | Whose::Network)
            | (Some(Still::Machine), Whose::Daemon | Whose::Machine) => {
                self.waiting.entry(at).or_default().push_back(occurrence);
                None
            }
        }
    }

    fn deliver(&mut self, from: usize, to: usize, message: Arc<Message>) {
        if !self.is_up(to) {
            self.counts.lost += 1;
            return;
        }
        self.mix("deliver", to, &[&(from as u64).to_le_bytes(), message.name().as_bytes()]);
        let job = job_of(&message);
        if self.trace.keeps_lines() {
            let names = (self.machines[from].name(), self.machines[to].name());
            self.trace.say(self.now_ms, job, || {
                format!("{} → {}: {}", names.0, names.1, describe(&message))
            });
        }
        self.note_grant(to, &message);
        self.delivered = Some(Delivery { from, to, name: message.name(), job });
        let sender = self.machines[from].peer;
        // Mostly there is only this copy.
        let message = Arc::unwrap_or_clone(message);
        self.with_daemon(to, |peer, now| peer.handle_message(sender, message, now));
    }

    /// Hand something to a daemon and carry out what follows. `None` where it does not
    /// run, stands still, or died over it.
    fn with_daemon<T>(&mut self, at: usize, act: impl FnOnce(&mut Peer, Now) -> T) -> Option<T> {
        let machine = &mut self.machines[at];
        if machine.still.is_some() {
            return None;
        }
        let now = machine.clock.now(self.now_ms);
        let answer = act(machine.daemon.as_mut()?, now);
        self.settle(at).then_some(answer)
    }

    /// Make durable what the daemon wants written, then let leave what it wants to leave.
    /// Whether it lived through that.
    fn settle(&mut self, at: usize) -> bool {
        self.touched.insert(at);
        let Some(peer) = self.machines[at].daemon.as_mut() else { return false };
        let writes: Vec<Write> = core::iter::from_fn(|| peer.poll_write()).collect();
        let transmits: Vec<Transmit> = core::iter::from_fn(|| peer.poll_transmit()).collect();
        let events: Vec<Event> = core::iter::from_fn(|| peer.poll_event()).collect();
        if self.machines[at].disk_full && !writes.is_empty() {
            self.counts.full_disks += 1;
            self.crash(at, Down::Daemon, None);
            return false;
        }
        let cut_off = self.cut_off(at, writes.len());
        if cut_off.as_ref().is_none_or(|cut_off| cut_off.durable) {
            for write in writes {
                self.make_durable(at, write);
            }
        }
        let leaving = cut_off.as_ref().map_or(transmits.len(), |cut_off| cut_off.leaving);
        for transmit in transmits.into_iter().take(leaving) {
            match transmit {
                Transmit::Direct { to, message } => self.send(at, to, message),
                Transmit::Gossip(item) => self.spread(at, item),
            }
        }
        if let Some(cut_off) = cut_off {
            self.counts.write_crashes += 1;
            self.crash(at, Down::Daemon, Some(cut_off.down_ms));
            return false;
        }
        for event in events {
            self.obey(at, event);
        }
        self.arm(at);
        self.note_acting(at);
        self.is_up(at)
    }

    fn make_durable(&mut self, at: usize, write: Write) {
        let empty: &[u8] = &[];
        self.mix("write", at, &[&write.key, write.value.as_deref().unwrap_or(empty)]);
        let machine = &mut self.machines[at];
        machine.writes += 1;
        let slot = wire::decode(&write.key);
        let is_tombstone = usize::from(matches!(slot, Ok(Slot::Tombstone(..))));
        let Some(value) = write.value else {
            let removed = usize::from(machine.journal.remove(&write.key).is_some());
            machine.tombstones -= is_tombstone * removed;
            return;
        };
        machine.tombstones += is_tombstone * usize::from(!machine.journal.contains_key(&write.key));
        match slot {
            Ok(Slot::Record(job)) => {
                let store = machine.member.store;
                match wire::decode::<Replica>(&value) {
                    Ok(replica) => self.take_votes(at, job, store, &replica),
                    Err(_) => self.happenings.push(Happening::Garbled(job)),
                }
            }
            Ok(Slot::Hold(_)) => {
                if let Ok(hold) = wire::decode::<Hold>(&value) {
                    let end_ms = machine.clock.true_at(hold.expiry_ms);
                    self.ledger.hold_ends.insert((at, hold.id), end_ms);
                }
            }
            _ => {}
        }
        self.machines[at].journal.insert(write.key, value);
    }

    fn take_votes(&mut self, at: usize, job: JobId, store: StoreId, replica: &Replica) {
        let mut before = self.ledger.current(job).cloned();
        for value in self.ledger.take(job, store, replica, &mut self.happenings) {
            self.take_chosen(at, job, before.as_ref(), &value);
            before = Some(Value::clone(&value));
        }
    }

    fn take_chosen(&mut self, at: usize, job: JobId, before: Option<&Value>, value: &Value) {
        let body = &value.body;
        if self.trace.keeps_lines() {
            let name = self.machines[at].name();
            self.trace.say(self.now_ms, Some(job), || {
                let reason = body.history.last().map_or("", |change| &change.reason);
                let (seq, epoch, term) = (value.seq, value.epoch, body.term);
                let (state, attempt, ranks) = (body.state(), body.attempt, body.ranks.len());
                format!(
                    "{seq} is chosen at {name}: {state}, epoch {epoch}, term {term}, attempt \
                     {attempt}, {ranks} ranks ({reason})"
                )
            });
        }
        let ranks_before = before.map_or(0, |before| before.body.ranks.len());
        self.counts.assigns += u64::from(ranks_before == 0 && !body.ranks.is_empty());
        self.counts.unassigns += u64::from(ranks_before > 0 && body.ranks.is_empty());
        self.counts.seals += u64::from(value.sealed.is_some());
        self.counts.takeovers += u64::from(before.is_some_and(|b| b.body.term < body.term));
        self.moved_ms = self.now_ms;
    }

    fn obey(&mut self, at: usize, event: Event) {
        match event {
            Event::Prepare { id, .. } => self.prepare(at, id),
            Event::Execute { id, assignment, until_ms, .. } => {
                self.execute(at, id, assignment.grant.gpus, until_ms);
            }
            Event::Lease { id, until_ms } => self.lease(at, id, until_ms),
            Event::StopProcess { id, .. } => self.end_process(at, id, Ending::Stopped),
            Event::Discard { id } => self.discard(at, id),
            Event::EndRecorded { id } => self.end_recorded(at, id),
            Event::Submitted { job, result } => self.submitted(at, job, result),
            Event::Wounded { job, by, pinned } => {
                self.counts.wounds += 1;
                let (now_ms, name) = (self.now_ms, self.machines[at].name());
                self.trace.say(now_ms, Some(job), || format!("{name} gave its hold to {by:?}"));
                self.happenings.push(Happening::Wounded { job, by, pinned });
            }
            Event::StoreRefused { reason } => self.refuse_store(at, &reason),
            Event::CopiesChanged { job } => self.plan_copy(at, job),
            Event::RecordChanged { .. } | Event::RosterChanged | Event::BoardChanged { .. } => {}
        }
    }

    fn arm(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        let due = machine.daemon.as_ref().and_then(Peer::poll_timeout);
        let Some((boot_ms, _)) = due else {
            machine.timer = None;
            return;
        };
        let at_ms = machine.clock.true_at(boot_ms).max(self.now_ms);
        if machine.timer.is_some_and(|(planned_ms, _)| planned_ms == at_ms) {
            return;
        }
        self.timer_plans += 1;
        let plan = self.timer_plans;
        machine.timer = Some((at_ms, plan));
        self.at(at_ms, Occurrence::Timer { at, plan });
    }

    // ---- messages ---------------------------------------------------------------------

    fn send(&mut self, from: usize, to: PeerId, message: Message) {
        let Some(&to) = self.by_peer.get(&to) else { return };
        let to = self.clone_of(to);
        self.counts.messages += 1;
        self.mix("send", from, &[&(to as u64).to_le_bytes(), &wire::encode(&message)]);
        self.note_said(from, &message);
        let letter = Letter { from, to, message: &message, at_ms: self.now_ms };
        let hand = self.interceptor.as_mut();
        let treatment = hand.map_or(Treatment::AsDrawn, |hand| (hand.0)(&letter));
        let mut fate = self.network.fate(&self.options, from, to);
        let away = !self.is_up(to) || self.is_asleep(to) || self.network.is_cut(from, to);
        if away || treatment == Treatment::Lose {
            fate.copies_ms.clear();
        }
        if away || self.network.is_cut(to, from) {
            let ms = self.faults.between(300, 3_000);
            self.after(ms, Occurrence::Unreachable { at: from, peer: to });
        }
        if let Treatment::Repeat(again_ms) = treatment {
            fate.copies_ms.extend(again_ms);
        }
        if fate.copies_ms.is_empty() {
            self.counts.lost += 1;
            if self.trace.keeps_lines() {
                let names = (self.machines[from].name(), self.machines[to].name());
                self.trace.say(self.now_ms, job_of(&message), || {
                    format!("{} → {}: {} is lost", names.0, names.1, describe(&message))
                });
            }
        }
        if fate.copies_ms.len() > 1 {
            self.counts.duplicates += 1;
        }
        let message = Arc::new(message);
        for ms in fate.copies_ms {
            self.after(ms, Occurrence::Deliver { from, to, message: Arc::clone(&message) });
        }
    }

    fn spread(&mut self, from: usize, item: Soft) {
        self.mix("spread", from, &[&wire::encode(&item)]);
        let item = Arc::new(item);
        for to in 0..self.machines.len() {
            if to == from || !self.is_up(to) || self.network.is_cut(from, to) {
                continue;
            }
            if let Some(ms) = self.network.gossip(&self.options, from, to) {
                self.after(ms, Occurrence::Gossip { to, item: Arc::clone(&item) });
            }
        }
    }

    /// Whether a connection between two machines can stand.
    fn is_linked(&self, a: usize, b: usize) -> bool {
        let open = !self.network.is_cut(a, b) && !self.network.is_cut(b, a);
        self.machines[a].is_awake() && self.machines[b].is_awake() && open
    }

    fn tend_link(&mut self, at: usize, peer: usize) {
        let linked = self.is_linked(at, peer);
        let id = self.machines[peer].peer;
        if linked && self.machines[at].connected.insert(peer) {
            self.with_daemon(at, |daemon, now| daemon.peer_connected(id, now));
        } else if !linked && self.machines[at].connected.remove(&peer) {
            self.with_daemon(at, |daemon, now| daemon.peer_disconnected(id, now));
        }
    }

    // ---- watching ---------------------------------------------------------------------

    fn scene(&self) -> Scene<'_> {
        Scene {
            now_ms: self.now_ms,
            surveys: self.surveys(),
            options: &self.options,
            network: &self.network,
            troubles: &self.troubles,
            workload: &self.workload,
            healed_ms: self.healed_ms,
            ledger: &self.ledger,
            machines: &self.machines,
            touched: &self.touched,
            happenings: &self.happenings,
        }
    }

    fn check(&mut self) -> Result<(), Violation> {
        let mut checkers = core::mem::take(&mut self.checkers);
        let found = check::look(&mut checkers, &self.scene());
        self.checkers = checkers;
        self.touched.clear();
        self.happenings.clear();
        if self.now_ms >= self.survey_ms {
            self.survey_ms = self.now_ms + SURVEY_MS;
        }
        found
    }

    /// Whether checkers shall look at what no event touched.
    fn surveys(&self) -> bool {
        self.now_ms >= self.survey_ms
    }

    fn mix(&mut self, tag: &str, at: usize, parts: &[&[u8]]) {
        self.trace.mix(tag, &[&self.now_ms.to_le_bytes(), &(at as u64).to_le_bytes()]);
        self.trace.mix("", parts);
    }
}

/// The job a message is about.
#[must_use]
pub fn job_of(message: &Message) -> Option<JobId> {
    match message {
        Message::Init { spec, .. } => Some(JobId::of(&spec.bytes)),
        Message::Commit(commit) => Some(JobId::of(&commit.spec.bytes)),
        Message::Call(call) => Some(call.key.job),
        Message::Bid(bid) => Some(bid.job),
        Message::PinRefused(refusal) => Some(refusal.job),
        Message::Start(start) => Some(start.job),
        Message::Report(report) => Some(report.job),
        Message::Inited { job, .. }
        | Message::InitRefused { job, .. }
        | Message::Pin { job, .. }
        | Message::Pinned { job, .. }
        | Message::HoldsLost { job, .. }
        | Message::Release { job, .. }
        | Message::Committed { job, .. }
        | Message::CommitRefused { job, .. }
        | Message::Withdraw { job, .. }
        | Message::Stop { job, .. }
        | Message::Ask { job, .. }
        | Message::EndRecorded { job, .. }
        | Message::Prepare { job, .. }
        | Message::Accepted { job, .. }
        | Message::Nack { job, .. }
        | Message::NotInit { job, .. }
        | Message::Moved { job, .. }
        | Message::Installed { job, .. }
        | Message::Look { job, .. }
        | Message::Seen { job, .. }
        | Message::Elsewhere { job, .. }
        | Message::Adopted { job, .. }
        | Message::Save { job, .. }
        | Message::SaveHeld { job, .. }
        | Message::AskCopies { job, .. }
        | Message::Copies { job, .. } => Some(*job),
        Message::Promise(promise) => Some(promise.job),
        Message::Accept(accept) => Some(accept.job),
        Message::Adopt(adopt) => Some(JobId::of(&adopt.spec.bytes)),
        Message::Install(install) => Some(JobId::of(&install.spec.bytes)),
        Message::WouldKeep { .. }
        | Message::WillKeep { .. }
        | Message::Renew { .. }
        | Message::Renewed { .. }
        | Message::AskLease { .. }
        | Message::Lease { .. }
        | Message::Soft(_)
        | Message::Reconcile { .. }
        | Message::Reconciled { .. }
        | Message::Want { .. } => None,
    }
}

/// A message in a line.
fn describe(message: &Message) -> String {
    match message {
        Message::Bid(bid) => {
            let (offers, standing) = (bid.offers.len(), bid.standing);
            format!("bid of {offers}, standing {standing}, {:?}", bid.decline)
        }
        Message::Report(report) => {
            format!("report {}.{} {:?}", report.attempt, report.rank, report.report)
        }
        Message::Pin { holds, .. } => format!("pin {holds:?}"),
        Message::Pinned { holds, .. } => format!("pinned {holds:?}"),
        Message::HoldsLost { holds, higher, .. } => format!("holds lost {holds:?} to {higher:?}"),
        Message::Release { holds, call, .. } => format!("release {holds:?} {call:?}"),
        Message::Committed { attempt, .. }
        | Message::Withdraw { attempt, .. }
        | Message::Stop { attempt, .. }
        | Message::Ask { attempt, .. } => format!("{} {attempt}", message.name()),
        Message::Commit(commit) => format!("commit {}", commit.attempt),
        Message::Start(start) => format!("start {}", start.attempt),
        Message::CommitRefused { attempt, reason, .. } => {
            format!("commit-refused {attempt}: {reason}")
        }
        Message::InitRefused { reason, retry, .. } => {
            format!("init-refused{}: {reason}", if *retry { " for now" } else { "" })
        }
        Message::Prepare { epoch, ballot, .. } => format!("prepare {epoch}, {ballot:?}"),
        Message::Promise(promise) => format!(
            "promise {}, {:?}, accepted {:?}",
            promise.epoch, promise.ballot, promise.accepted
        ),
        Message::Accept(accept) => {
            format!("accept {}, {:?}, then {:?}", accept.epoch, accept.ballot, accept.next)
        }
        Message::Accepted { epoch, ballot, .. } => format!("accepted {epoch}, {ballot:?}"),
        Message::Nack { epoch, ballot, promised, .. } => {
            format!("nack {epoch}, {ballot:?}: {promised:?}")
        }
        Message::NotInit { epoch, .. }
        | Message::Installed { epoch, .. }
        | Message::Look { epoch, .. } => format!("{} {epoch}", message.name()),
        Message::Moved { links, .. } => format!("moved to {}", links.len()),
        Message::Install(install) => format!("install {}", install.links.len()),
        Message::Adopt(adopt) => format!("adopt {}", adopt.attempt),
        Message::Adopted { attempt, term, .. } => format!("adopted {attempt}, term {term}"),
        Message::EndRecorded { attempt, rank, .. } => format!("end-recorded {attempt}.{rank}"),
        Message::Save { attempt, rank, seq, .. } | Message::SaveHeld { attempt, rank, seq, .. } => {
            format!("{} {attempt}.{rank}, number {seq}", message.name())
        }
        Message::AskCopies { attempt, .. } => format!("ask-copies {attempt}"),
        Message::Copies { attempt, seq, ranks, .. } => {
            format!("copies {attempt} at {seq}: {ranks:?}")
        }
        other => other.name().to_owned(),
    }
}
