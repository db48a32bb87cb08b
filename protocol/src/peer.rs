//! One node's whole behaviour: the machines of this crate, composed.
//!
//! A driver owns the [`Peer`] and runs this loop:
//!
//! 1. hand over what happened: [`Peer::handle_message`], [`Peer::handle_timeout`], or one
//!    of the verbs (`submit`, `prepared`, `ended`, …), each with the time;
//! 2. drain [`Peer::poll_write`] and make all of it durable;
//! 3. only then drain [`Peer::poll_transmit`] and [`Peer::poll_event`], and carry out what
//!    they say;
//! 4. call [`Peer::handle_timeout`] no later than [`Peer::poll_timeout`] says.
//!
//! After a restart the driver builds a new peer, hands it every journal entry with
//! [`Peer::restore`], says [`Peer::restored`], and then calls [`Peer::resume`] with the
//! processes that still live.

mod copies;
mod keep;
mod outbox;
mod random;
mod soft;
mod submission;
mod turns;
mod user;

use core::hash::BuildHasher;
use std::{
    collections::{BTreeMap, BTreeSet, hash_map::RandomState},
    sync::Arc,
};

use tracing::debug;

pub(crate) use outbox::Outbox;
pub use outbox::{Slot, Transmit, Write};
pub(crate) use random::Random;
pub use soft::{
    ADVERT_GAP_MS, ADVERT_MEAN_MS, ADVERT_REFRESH_MS, HEAD_MS, HEADS_MAX, RECONCILE_MS,
};
pub use submission::{
    REFUSALS_MAX, SUBMISSIONS_MAX, SUBMIT_MS, SUBMIT_RESEND_MS, SUBMIT_TOLERANCE_MS,
};
pub use user::JOBS_MAX;

use self::{
    soft::SoftState,
    submission::{Birth, Refusal, Submission},
};
use crate::{
    BlobId, BootId, JobId, Now, PeerId, PoolId, StatementId, StoreId,
    bidder::{Bidder, Terms, WorkId},
    copies::Copies,
    door::{self, DoorBook},
    identity::{KeyPair, SignedBytes},
    inventory::{Board, Capacity, GpuUuid},
    job::{RankAssignment, RankEnd, State, VerifiedSpec},
    message::{Commit, Message, Reach, Soft},
    record::{Ballot, Certificate, Keeper, Kept, Registers, Value},
    request::{Request, Unsatisfiable, satisfiable},
    roster::{self, DeviceId, RequestGuard, Roster},
    sabotage::{Rule, Sabotage},
    steward::{self, Stewards},
    timer::Timers,
    wire,
};

/// How long a node that has just started waits for others to say whether they know of a later
/// life of its store, before it speaks as a keeper.
pub const SHY_MS: u64 = 3_000;

/// What a peer is made of.
#[derive(Debug)]
pub struct Config {
    /// The node's key.
    pub key: KeyPair,
    /// The journal's store.
    pub store: StoreId,
    /// This boot of the daemon.
    pub boot: BootId,
    /// Boots of this journal so far.
    pub boot_count: u64,
    /// The pool's genesis, as its founders made it.
    pub genesis: Vec<u8>,
    /// Offers nothing and keeps nothing.
    pub client: bool,
    /// For nonces and back-off.
    pub seed: [u8; 32],
    /// Test only: a rule to leave out.
    pub sabotage: Sabotage,
}

/// What the driver is to do, or to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Fetch code and data of a rank and set up its directories; then say
    /// [`Peer::prepared`].
    Prepare {
        /// The rank.
        id: WorkId,
        /// The job.
        spec: Option<Box<VerifiedSpec>>,
        /// What it is given.
        assignment: RankAssignment,
        /// What proves so to those who have the inputs.
        certificate: Certificate,
    },
    /// Start the process of a rank; then say [`Peer::started`], and in the end
    /// [`Peer::draining`] and [`Peer::ended`].
    Execute {
        /// The rank.
        id: WorkId,
        /// The job.
        spec: Option<Box<VerifiedSpec>>,
        /// What it is given.
        assignment: RankAssignment,
        /// Each rank's node, in rank order: addresses do not tell two nodes of one
        /// machine apart.
        nodes: Vec<PeerId>,
        /// The address of each rank's node, in rank order.
        hosts: Vec<String>,
        /// A port of the job's own on rank 0's node.
        port: u16,
        /// When its supervisor ends it, on the boot clock, unless [`Event::Lease`] says
        /// otherwise before; `None`: it does not.
        until_ms: Option<u64>,
    },
    /// Another deadline for the process of a rank, for its supervisor to keep even when this
    /// daemon is gone. It ends the whole tree then: SIGTERM at the deadline, SIGKILL
    /// [`crate::bidder::LEASE_GRACE_MS`] later at the latest.
    Lease {
        /// The rank.
        id: WorkId,
        /// On the boot clock; `None`: none any more.
        until_ms: Option<u64>,
    },
    /// Stop the process of a rank: SIGTERM, the job's grace, SIGKILL.
    StopProcess {
        /// The rank.
        id: WorkId,
        /// Why, for people.
        reason: String,
    },
    /// Remove what was prepared for a rank that will not start.
    Discard {
        /// The rank.
        id: WorkId,
    },
    /// The ending of a rank is in the record.
    EndRecorded {
        /// The rank.
        id: WorkId,
    },
    /// What this node is to hold of a job may be another: see [`Peer::copies_wanted`].
    CopiesChanged {
        /// The job.
        job: JobId,
    },
    /// A record kept here has a new value.
    RecordChanged {
        /// The job.
        job: JobId,
    },
    /// A submission was settled.
    Submitted {
        /// The job.
        job: JobId,
        /// Kept; or why not.
        result: Result<(), SubmitError>,
    },
    /// This node's store was used after the copy that is in use now was made: what it promised
    /// since is not known here. The driver must go on with a new store, or not at all.
    StoreRefused {
        /// What showed it, for people.
        reason: String,
    },
    /// A hold was taken by a higher job.
    Wounded {
        /// Whose hold.
        job: JobId,
        /// Which job took it.
        by: JobId,
        /// Whether it was pinned: never, while the rules hold.
        pinned: bool,
    },
    /// Members came or went.
    RosterChanged,
    /// A node's addresses or inventory are news.
    BoardChanged {
        /// The node.
        node: PeerId,
    },
}

/// Why a job was not submitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The keeper refused it.
    #[error("{0}")]
    Refused(String),
    /// Neither yes nor no could be had: it may exist.
    #[error("no answer from the job's keeper: whether it was submitted is unknown")]
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Submit(JobId),
    Soft,
    Shy,
    Turn,
}

/// One node.
#[derive(Debug, Clone)]
pub struct Peer {
    me: PeerId,
    key: KeyPair,
    store: StoreId,
    boot: BootId,
    boot_count: u64,
    store_refused: bool,
    client: bool,
    sabotage: Sabotage,
    device: DeviceId,
    random: Random,
    roster: Roster,
    guard: RequestGuard,
    doors: DoorBook,
    board: Board,
    registers: Registers,
    stewards: Stewards,
    bidder: Bidder,
    copies: Copies,
    soft: SoftState,
    submissions: BTreeMap<JobId, Submission>,
    births: BTreeMap<JobId, Birth>,
    refused: BTreeMap<JobId, Refusal>,
    timers: Timers<Timer>,
    out: Outbox,
    /// Until when, on the boot clock, this node keeps its records to itself after a start:
    /// others may know of a later life of its store.
    shy_until_ms: Option<u64>,
    /// The clocks as they stood at the last call.
    last_now: Option<Now>,
    /// The clocks as they stood when their rates were last compared.
    clocks_since: Now,
    /// Statements from the journal, until all are there.
    unplaced: Vec<SignedBytes>,
}

impl Peer {
    /// A peer that knows its pool's genesis and nothing else yet.
    ///
    /// # Errors
    /// The genesis cannot be read.
    pub fn new(config: Config) -> Result<Self, roster::GenesisError> {
        let me = PeerId(config.key.public());
        let mut seed = config.seed;
        if !config.sabotage.holds(Rule::OnlySeededRandomness) {
            // What the order of a hash map would bring in: another number each time.
            let ambient = RandomState::new().hash_one(0_u8);
            seed[..8].copy_from_slice(&ambient.to_be_bytes());
        }
        let mut random = Random::new(seed);
        let roster = Roster::new(config.genesis)?;
        let guard = RequestGuard::new();
        let hold_prefix = random.bytes();
        let soft = SoftState::new(config.boot, config.boot_count);
        Ok(Self {
            me,
            store: config.store,
            boot: config.boot,
            boot_count: config.boot_count,
            store_refused: false,
            client: config.client,
            // An emptied home counts its statements anew, and so is another device.
            device: DeviceId(config.store.0),
            roster,
            guard,
            doors: DoorBook::new(),
            board: Board::default(),
            registers: Registers::new(
                config.key.clone(),
                config.store,
                config.boot,
                Random::new(random.bytes()),
                config.sabotage,
            ),
            stewards: Stewards::new(me, config.boot, config.sabotage),
            bidder: Bidder::new((me, config.store), config.boot, hold_prefix, config.sabotage),
            copies: Copies::new((me, config.store), config.sabotage),
            sabotage: config.sabotage,
            soft,
            submissions: BTreeMap::new(),
            births: BTreeMap::new(),
            shy_until_ms: None,
            last_now: None,
            clocks_since: Now { boot_ms: 0, wall_ms: 0 },
            refused: BTreeMap::new(),
            timers: Timers::default(),
            out: Outbox::default(),
            unplaced: Vec::new(),
            key: config.key,
            random,
        })
    }

    // ---- the journal ------------------------------------------------------------------

    /// Take back one journal entry.
    ///
    /// # Errors
    /// The entry is not one this version can have written.
    pub fn restore(&mut self, key: &[u8], value: &[u8], now: Now) -> Result<(), String> {
        let slot: Slot = wire::decode(key).map_err(|e| format!("journal key: {e}"))?;
        let context = |e: String| format!("journal entry {slot:?}: {e}");
        match &slot {
            Slot::Genesis => Ok(()),
            Slot::Statement(_) => {
                // Entries come in key order, not causes first: placed together at the end.
                let signed = wire::decode(value).map_err(|e| context(e.to_string()))?;
                self.unplaced.push(signed);
                Ok(())
            }
            Slot::Record(_) => self.registers.restore(value, now).map(|_| ()).map_err(context),
            Slot::Hold(_) => self.bidder.restore_hold(value, now).map_err(context),
            Slot::Work(..) => self.bidder.restore_work(value, now).map_err(context),
            Slot::Tombstone(steward, job, attempt) => {
                self.bidder.restore_tombstone(*steward, *job, *attempt, value);
                Ok(())
            }
            Slot::End(job, attempt, rank) => {
                let id = WorkId { job: *job, attempt: *attempt, rank: *rank };
                self.bidder.restore_end(id, value).map_err(context)
            }
            Slot::Term(job) => self.bidder.restore_term(*job, value).map_err(context),
            Slot::Refused(job) => {
                let refusal = wire::decode(value).map_err(|e| context(e.to_string()))?;
                self.refused.insert(*job, refusal);
                Ok(())
            }
        }
    }

    /// All entries were handed to [`Peer::restore`].
    ///
    /// # Errors
    /// Statements that cannot be placed: the journal is not whole.
    pub fn restored(&mut self) -> Result<(), String> {
        let mut ready = Vec::new();
        let mut lacking: BTreeMap<StatementId, Vec<Unplaced>> = BTreeMap::new();
        for signed in core::mem::take(&mut self.unplaced) {
            let parents = roster::Statement::from_bytes(&signed.bytes)
                .map_err(|e| format!("journalled statement: {e}"))?
                .parents;
            ready.push(Unplaced { signed, parents });
        }
        let mut left = ready.len();
        while let Some(mut unplaced) = ready.pop() {
            let roster = &self.roster;
            unplaced.parents.retain(|parent| !roster.contains(*parent));
            if let Some(parent) = unplaced.parents.last() {
                lacking.entry(*parent).or_default().push(unplaced);
                continue;
            }
            let inserted = self.roster.insert(unplaced.signed);
            let id = inserted.map_err(|e| format!("journalled statement: {e}"))?.id;
            left -= 1;
            ready.extend(lacking.remove(&id).unwrap_or_default());
        }
        if left > 0 {
            return Err(format!("{left} journalled statements lack what they follow from"));
        }
        Ok(())
    }

    /// Go on after a restart, with the ranks whose processes the executor still knows.
    pub fn resume(&mut self, alive: &[WorkId], now: Now) {
        self.bidder.adopt(alive, now, &mut self.out);
        for signed in self.roster.statements().into_iter().cloned().collect::<Vec<_>>() {
            self.soft.insert(Soft::statement(signed));
        }
        let me = self.me;
        let alone = self.roster.state().nodes.keys().all(|node| *node == me);
        if !self.registers.is_empty() && !alone {
            self.shy_until_ms = Some(now.after(SHY_MS));
        }
        let jobs: Vec<JobId> = self.registers.iter().map(|(job, _)| *job).collect();
        for job in jobs {
            if self.registers.get(job).is_some_and(|k| k.value.body.state() == State::Done) {
                self.announce_head(job, now);
            }
        }
        match self.shy_until_ms {
            Some(until_ms) => self.timers.set(Timer::Shy, until_ms),
            None => self.take_up_records(now),
        }
        self.timers.set(Timer::Soft, now.boot_ms);
        self.copies.begin(now);
        for job in self.registers.iter().map(|(job, _)| *job) {
            self.copies.record_changed(job);
        }
        self.finish(now);
    }

    // ---- verbs: the node around it ----------------------------------------------------

    /// What this machine offers. `owner_only` says why only its owner's jobs may run.
    pub fn set_offer(&mut self, capacity: Capacity, owner_only: Option<String>, now: Now) {
        let owner = self.roster.state().nodes.get(&self.me).map(|node| node.owner);
        let closed = self.client || capacity == Capacity::default();
        let owner_only = owner_only.and_then(|reason| owner.map(|owner| (owner, reason)));
        self.bidder.set_terms(Terms { owner_only, closed });
        self.bidder.set_capacity(capacity, now, &mut self.out);
        self.soft.changed = true;
        self.finish(now);
    }

    /// What this machine offers at other times, while it runs as a client: so that the pool
    /// goes on counting on it, and nobody calls it now.
    pub fn set_away(&mut self, capacity: Capacity, now: Now) {
        self.soft.away = capacity;
        self.soft.changed = true;
        self.finish(now);
    }

    /// Whether this node has no room for more content. What it has to hold already stays its
    /// duty; others are chosen for what is new, where there are any.
    pub fn set_full(&mut self, full: bool, now: Now) {
        self.soft.set_full(full);
        self.finish(now);
    }

    /// Processes that are not the pool's compute on these GPUs.
    pub fn set_foreign(&mut self, gpus: Vec<GpuUuid>, now: Now) {
        self.bidder.set_foreign(gpus, now, &mut self.out);
        self.finish(now);
    }

    /// Whether others can dial this node, and the members that pass on for it.
    pub fn set_reach(&mut self, reach: Reach, relays: Vec<PeerId>, now: Now) {
        self.soft.set_reach(reach, relays);
        self.finish(now);
    }

    /// Where this node can be reached.
    pub fn set_addresses(
        &mut self,
        control: Vec<core::net::SocketAddr>,
        data: Vec<core::net::SocketAddr>,
        now: Now,
    ) {
        self.soft.set_addresses(control, data);
        self.finish(now);
    }

    /// This tree, with every blob of it, is here and durable.
    pub fn tree_stored(&mut self, tree: BlobId) {
        self.bidder.tree_stored(tree);
    }

    /// Of the trees that were said to be here only those stay for which `is_kept` says so:
    /// of the others blobs may go from now on.
    pub fn forget_trees(&mut self, is_kept: impl Fn(BlobId) -> bool) {
        self.bidder.forget_trees(is_kept);
    }

    /// Code and data of a rank are in place, with a free port and this node's address; or
    /// why they cannot be.
    pub fn prepared(&mut self, id: WorkId, result: Result<(u16, String), String>, now: Now) {
        self.bidder.prepared(id, result, now, &mut self.out);
        self.finish(now);
    }

    /// A rank cannot be prepared now for want of what another node has that is away. It is given
    /// back, and another attempt follows: a start that failed it is not.
    pub fn not_prepared_yet(&mut self, id: WorkId, reason: String, now: Now) {
        self.bidder.not_prepared_yet(id, reason, now, &mut self.out);
        self.finish(now);
    }

    /// The process of a rank runs.
    pub fn started(&mut self, id: WorkId, now: Now) {
        self.bidder.started(id, now, &mut self.out);
        self.finish(now);
    }

    /// The process of a rank ended; its results are being gathered.
    pub fn draining(&mut self, id: WorkId, now: Now) {
        self.bidder.draining(id, &mut self.out);
        self.finish(now);
    }

    /// A rank is over here, its results are kept and nothing else of it is left.
    pub fn ended(&mut self, id: WorkId, end: RankEnd, now: Now) {
        self.bidder.end(id, end, now, &mut self.out);
        self.finish(now);
    }

    /// A connection to a member stands.
    pub fn peer_connected(&mut self, peer: PeerId, now: Now) {
        self.board.set_connected(peer, true);
        self.copies.connected(peer, now);
        self.soft.turns.enqueue(peer);
        self.next_turn(now);
        self.finish(now);
    }

    /// The last connection to a member fell.
    pub fn peer_disconnected(&mut self, peer: PeerId, now: Now) {
        self.board.set_connected(peer, false);
        self.copies.disconnected(peer, now);
        self.finish(now);
    }

    /// A message to this member could not be delivered.
    pub fn peer_unreachable(&mut self, peer: PeerId, now: Now) {
        self.board.set_unreachable(peer, now);
    }

    // ---- verbs: people ----------------------------------------------------------------

    /// Take a statement made here, by a user's CLI or by this node.
    ///
    /// # Errors
    /// It is not in order.
    pub fn say(&mut self, signed: SignedBytes, now: Now) -> Result<(), roster::Rejected> {
        if self.roster.insert_drafted(signed.clone())?.new {
            self.keep_statement(&signed);
            self.out.transmits.push_back(Transmit::Gossip(Soft::statement(signed)));
        }
        self.finish(now);
        Ok(())
    }

    /// Judge a newcomer, or a member that calls at the door.
    pub fn handle_door(&mut self, from: PeerId, hello: door::Hello, now: Now) -> door::Reply {
        let (reply, added) =
            self.doors.judge(&mut self.roster, &self.key, self.device, from, hello, now);
        for signed in added {
            self.keep_statement(&signed);
            self.out.transmits.push_back(Transmit::Gossip(Soft::statement(signed)));
        }
        self.finish(now);
        reply
    }

    /// Answer a user's signed request.
    pub fn handle_user_request(&mut self, signed: &SignedBytes, now: Now) -> crate::message::Reply {
        let reply = self.answer_user(signed, now);
        self.finish(now);
        reply
    }

    // ---- messages and time ------------------------------------------------------------

    /// A message arrived from a peer whose identity the transport proved.
    pub fn handle_message(&mut self, from: PeerId, message: Message, now: Now) {
        if !self.roster.state().is_member_node(from) {
            debug!(%from, "message from a stranger dropped");
            return;
        }
        self.notice_clock(now);
        self.dispatch(from, message, now);
        self.finish(now);
    }

    /// The time that [`Peer::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Now) {
        self.notice_clock(now);
        self.registers.handle_timeout(now);
        self.with_stewards(now, Stewards::settle);
        self.bidder.handle_timeout(now, &mut self.out);
        self.with_stewards(now, Stewards::handle_timeout);
        self.copies.handle_timeout(&self.bidder, now, &mut self.out);
        while let Some(timer) = self.timers.pop_due(now.boot_ms) {
            match timer {
                Timer::Submit(job) => self.send_init(job, now),
                Timer::Soft => self.tend_soft_state(now),
                Timer::Shy => self.take_up_records(now),
                Timer::Turn => self.next_turn(now),
            }
        }
        self.finish(now);
    }

    /// What must be durable before anything polled after it leaves the node.
    pub fn poll_write(&mut self) -> Option<Write> {
        self.out.writes.pop_front()
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.out.transmits.pop_front()
    }

    /// What to do.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.out.events.pop_front()
    }

    /// When to call [`Peer::handle_timeout`] (boot clock), with the reason.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(u64, &'static str)> {
        let own = self.timers.next().map(|(at_ms, timer)| {
            let reason = match timer {
                Timer::Submit(_) => "a submission is unanswered",
                Timer::Soft => "soft state wants tending",
                Timer::Shy => "records are to be taken up after the start",
                Timer::Turn => "the next peer's turn to be reconciled with",
            };
            (at_ms, reason)
        });
        [
            own,
            self.bidder.poll_timeout(),
            self.copies.poll_timeout(),
            self.stewards.poll_timeout(),
            self.registers.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    // ---- getters ----------------------------------------------------------------------

    /// This node.
    #[must_use]
    pub fn id(&self) -> PeerId {
        self.me
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> PoolId {
        self.roster.pool()
    }

    /// The store its records are kept in.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// This boot of the daemon.
    #[must_use]
    pub fn boot(&self) -> BootId {
        self.boot
    }

    /// Who is a member.
    #[must_use]
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// What was last heard of every node.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// A record kept here.
    #[must_use]
    pub fn record(&self, job: JobId) -> Option<&Kept> {
        self.registers.get(job)
    }

    /// See [`Registers::accepted`].
    #[must_use]
    pub fn accepted(&self, job: JobId) -> Option<(Ballot, &Value)> {
        self.registers.accepted(job)
    }

    /// Jobs that this node has work of: rooms promised, processes, and ends that the record
    /// does not have yet.
    #[must_use]
    pub fn working_for(&self) -> BTreeSet<JobId> {
        self.bidder.jobs().collect()
    }

    /// Every record kept here.
    pub fn records(&self) -> impl Iterator<Item = (&JobId, &Kept)> {
        self.registers.iter()
    }

    /// Jobs this node drives.
    #[must_use]
    pub fn driven(&self) -> usize {
        self.stewards.len()
    }

    /// Announced jobs: id, keeper, owner, submission time, and whether it is done.
    pub fn heads(&self) -> impl Iterator<Item = &crate::message::Head> {
        self.soft.heads()
    }

    /// What this node holds, runs and has to itself, as its book says.
    #[must_use]
    pub fn node_view(&self) -> crate::message::NodeView {
        self.bidder.view()
    }

    /// Holds, and ranks this node is committed to, for checkers.
    pub fn book(
        &self,
    ) -> (impl Iterator<Item = &crate::bidder::Hold>, impl Iterator<Item = &crate::bidder::Work>)
    {
        let book = self.bidder.book();
        (book.holds.values(), book.work.values())
    }

    /// The GPUs that a rank has here.
    #[must_use]
    pub fn gpus_of(&self, id: WorkId) -> Vec<GpuUuid> {
        let work = self.bidder.book().work.get(&id);
        work.map(|work| work.assignment.grant.gpus.clone()).unwrap_or_default()
    }

    /// Whether this rank is committed to or runs here.
    #[must_use]
    pub fn has_rank(&self, id: WorkId) -> bool {
        self.bidder.book().work.contains_key(&id)
    }

    /// Whether a rank of `job` is committed to or runs here.
    #[must_use]
    pub fn has_work(&self, job: JobId) -> bool {
        self.bidder.spec_of(job).is_some()
    }

    /// The spec of a job this node has a rank of.
    #[must_use]
    pub fn work_spec(&self, job: JobId) -> Option<&Arc<VerifiedSpec>> {
        self.bidder.spec_of(job)
    }

    /// Whether the pool as advertised could ever satisfy `request`.
    ///
    /// # Errors
    /// Why not, with the nearest request that it could.
    pub fn feasible(&self, request: &Request) -> Result<(), Unsatisfiable> {
        satisfiable(request, &self.board.capacities())
    }

    /// Who would be called first for `request`, with the processes each has room for.
    #[must_use]
    pub fn dry_run(&self, request: &Request, now: Now) -> Vec<(PeerId, u32)> {
        steward::dry_run(self.me, request, &self.board, now)
    }

    /// The keepers a job submitted here should name, the first to drive it: this node first,
    /// unless it is a client; then nodes it is connected to, of distinct owners where there
    /// is a choice, in an order that `salt` decides. Empty where no node can keep it.
    #[must_use]
    pub fn propose_keepers(&self, salt: &[u8]) -> Vec<Keeper> {
        let me = (self.me, self.store);
        steward::propose(me, self.client, &self.board, &self.roster, salt)
    }

    /// The jobs this node acts for as steward now, each with its term.
    #[must_use]
    pub fn acting(&self, now: Now) -> Vec<(JobId, u64)> {
        self.stewards.acting(&self.registers, now)
    }

    /// Times a steward here fell silent because its lease had run out.
    #[must_use]
    pub fn fences(&self) -> u64 {
        self.stewards.fences()
    }

    /// Jobs taken over from another steward since the daemon started.
    #[must_use]
    pub fn takeovers(&self) -> u64 {
        self.registers.takeovers()
    }

    // ---- inside -----------------------------------------------------------------------

    fn dispatch(&mut self, from: PeerId, message: Message, now: Now) {
        match message {
            Message::Init { spec, receipts, refused } => {
                self.handle_init(from, spec, &receipts, refused, now);
            }
            Message::Inited { job, receipts, inputs } => {
                self.handle_inited(from, job, receipts, &inputs, now);
            }
            Message::InitRefused { job, reason, retry } => {
                self.handle_init_refused(from, job, reason, retry, now);
            }
            Message::Call(call) => self.bidder.handle_call(from, call, now, &mut self.out),
            Message::Pin { job, holds } => {
                self.bidder.handle_pin(from, job, &holds, now, &mut self.out);
            }
            Message::Release { job, holds, call } => {
                self.bidder.handle_release(from, job, &holds, call, now, &mut self.out);
            }
            Message::Commit(commit) => self.handle_commit(from, *commit, now),
            Message::Withdraw { job, attempt, reason } => {
                self.bidder.handle_withdraw(from, job, attempt, &reason, now, &mut self.out);
            }
            Message::Start(start) => self.bidder.handle_start(from, start, now, &mut self.out),
            Message::Stop { job, attempt, reason } => {
                self.bidder.handle_stop(from, job, attempt, &reason, now, &mut self.out);
            }
            Message::Ask { job, attempt } => {
                self.bidder.handle_ask(from, job, attempt, now, &mut self.out);
            }
            Message::EndRecorded { job, attempt, rank } => {
                let id = WorkId { job, attempt, rank };
                self.bidder.handle_end_recorded(from, id, &mut self.out);
            }
            Message::Bid(bid) => self.with_stewards(now, |s, cx| s.handle_bid(from, bid, cx)),
            Message::Pinned { job, holds } => {
                self.with_stewards(now, |s, cx| s.handle_pinned(from, job, &holds, cx));
            }
            Message::PinRefused(refusal) => {
                self.with_stewards(now, |s, cx| s.handle_pin_refused(&refusal, cx));
            }
            Message::HoldsLost { job, holds, higher } => {
                self.with_stewards(now, |s, cx| s.handle_holds_lost(from, job, &holds, higher, cx));
            }
            Message::Committed { job, attempt } => {
                self.with_stewards(now, |s, cx| s.handle_committed(from, job, attempt, cx));
            }
            Message::CommitRefused { job, attempt, reason } => self.with_stewards(now, |s, cx| {
                s.handle_commit_refused(from, job, attempt, reason, cx);
            }),
            Message::Report(report) => {
                self.with_stewards(now, |s, cx| s.handle_report(from, *report, cx));
            }
            Message::Adopt(adopt) => self.handle_adopt(from, &adopt, now),
            Message::Adopted { job, term, .. } => {
                self.with_stewards(now, |s, cx| s.handle_adopted(from, job, term, cx));
            }
            Message::AskLease { clock, entries } => {
                self.with_stewards(now, |s, cx| s.handle_ask_lease(from, clock, &entries, cx));
            }
            Message::Lease { asked, entries } => {
                self.bidder.handle_lease(from, asked, &entries, now, &mut self.out);
            }
            Message::Elsewhere { job, steward } => {
                self.bidder.handle_elsewhere(from, job, steward, now, &mut self.out);
            }
            Message::Prepare { .. }
            | Message::Promise(_)
            | Message::Accept(_)
            | Message::Accepted { .. }
            | Message::Nack { .. }
            | Message::NotInit { .. }
            | Message::Moved { .. }
            | Message::Install(_)
            | Message::Installed { .. }
            | Message::WouldKeep { .. }
            | Message::WillKeep { .. }
            | Message::Renew { .. }
            | Message::Renewed { .. }
            | Message::Look { .. }
            | Message::Seen { .. } => self.handle_record(from, message, now),
            Message::Save { .. }
            | Message::SaveHeld { .. }
            | Message::AskCopies { .. }
            | Message::Copies { .. } => self.handle_copies(from, message, now),
            Message::Soft(item) => {
                self.handle_soft(item, now);
            }
            Message::Reconcile { sum, query } => self.handle_reconcile(from, sum, &query),
            Message::Reconciled { answer } => self.handle_reconciled(from, &answer, now),
            Message::Want { ids } => self.handle_want(from, &ids),
        }
    }

    /// Deliver what the machines said to each other, and settle what was proposed.
    fn finish(&mut self, now: Now) {
        loop {
            self.with_stewards(now, Stewards::settle);
            if let Some(message) = self.out.local.pop_front() {
                self.dispatch(self.me, message, now);
                continue;
            }
            if !self.copies.has_work() {
                break;
            }
            self.tend_copies(now);
        }
        self.after_changes(now);
    }

    fn with_stewards(
        &mut self,
        now: Now,
        act: impl FnOnce(&mut Stewards, &mut steward::Context<'_>),
    ) {
        let mut cx = steward::Context {
            registers: &mut self.registers,
            copies: &mut self.copies,
            board: &self.board,
            roster: &self.roster,
            random: &mut self.random,
            out: &mut self.out,
            now,
        };
        act(&mut self.stewards, &mut cx);
    }

    fn handle_commit(&mut self, from: PeerId, commit: Commit, now: Now) {
        let attempt = commit.attempt;
        let job = JobId::of(&commit.spec.bytes);
        let checked = VerifiedSpec::verify(commit.spec.clone())
            .map_err(|e| e.to_string())
            .and_then(|spec| self.check_owner(&spec).map(|()| spec));
        match checked {
            Ok(spec) => {
                let value = self.check_certificate(&commit.certificate, &spec);
                self.bidder.handle_commit(from, commit, spec, value, now, &mut self.out);
            }
            Err(reason) => {
                let refused = Message::CommitRefused { job, attempt, reason };
                self.out.send(self.me, from, refused);
            }
        }
    }

    fn check_owner(&self, spec: &VerifiedSpec) -> Result<(), String> {
        if spec.spec.pool != self.pool() {
            return Err("the job is of another pool".to_owned());
        }
        if !self.roster.state().users.contains_key(&spec.spec.owner) {
            return Err("the job's owner is not a user of this pool".to_owned());
        }
        Ok(())
    }

    // ---- roster -----------------------------------------------------------------------

    fn take_statement(&mut self, signed: SignedBytes) -> Result<bool, roster::Rejected> {
        let inserted = self.roster.insert(signed)?;
        for id in &inserted.added {
            if let Some(signed) = self.roster.get(*id).cloned() {
                self.keep_statement(&signed);
            }
        }
        Ok(inserted.new)
    }

    fn keep_statement(&mut self, signed: &SignedBytes) {
        let id = roster::Statement::id(signed);
        self.out.put(&Slot::Statement(id), signed);
        self.soft.insert(Soft::statement(signed.clone()));
        self.soft.members_changed = true;
        self.copies.look_around = true;
        self.out.events.push_back(Event::RosterChanged);
    }
}

/// A journalled statement, and what it follows from, as far as it is not placed.
#[derive(Debug, Clone)]
struct Unplaced {
    signed: SignedBytes,
    parents: Vec<StatementId>,
}
