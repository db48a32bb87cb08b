//! A node's book of its own GPUs, cores and memory: who may have them.
//!
//! Every process this node may run goes through the same steps, each durable before
//! anyone is told: *held* for a job (10 s, renewable), *pinned* (10 s, once), *committed*
//! under a certificate that the record names it, *running*, *draining*, free again.
//! Only a hold can be taken away by a higher job; a pin never.
//!
//! Calls that find no room stay as standing calls, the highest first, and are answered
//! with a bid when room appears.

mod book;
mod entry;
mod lease;
mod standing;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tracing::debug;

pub(crate) use book::{Book, Usage};
pub use entry::{Hold, Phase, Work, WorkId};
pub(crate) use lease::Proven;

use self::{
    lease::Lease,
    standing::{Standing, StandingCall},
};
use crate::{
    BlobId, BootId, HoldId, JobId, Now, PeerId, StoreId, UserId,
    inventory::{Capacity, GpuUuid},
    job::{Attempt, Ending, Rank, RankAssignment, RankEnd, RankState, VerifiedSpec},
    message::{
        Bid, Call, CallFate, Commit, Decline, GpuView, HoldView, Key, LeaseAsk, Message, NodeView,
        Offer, PinRefusal, REST_MS_MAX, RankReport, Report, Start, Wanted, blinded,
    },
    peer::{Event, Outbox, Slot},
    record::{Keeper, Value},
    request::{Grant, fit, fit_many},
    sabotage::{Rule, Sabotage},
    timer::Timers,
    wire,
};

/// How long a hold lasts unless renewed.
pub const HOLD_MS: u64 = 10_000;
/// How long a pin lasts. It is not renewed.
pub const PIN_MS: u64 = 10_000;
/// How long a commitment waits for its start, unless renewed.
pub const COMMITTED_MS: u64 = 120_000;
/// The longest a commitment waits for its start, renewed or not.
pub const PREPARE_MS_MAX: u64 = 3_600_000;
/// How long a process lease lasts from when it was asked for.
pub const LEASE_MS: u64 = 180_000;
/// How often a process lease is renewed: a cut of 150 s right after one leaves time for the
/// next.
pub const LEASE_RENEW_MS: u64 = 25_000;
/// From the end of a lease to when nothing of the process is left.
pub const LEASE_GRACE_MS: u64 = 10_000;
/// Most trees a node remembers to have whole.
pub const TREES_MAX: usize = 65_536;
/// How often an unacknowledged ending is repeated, at first.
pub const REPORT_MS: u64 = 2_000;
/// Endings repeated to the steward alone, before the record's keepers are asked who it is.
const REPORTS_ALONE: u32 = 4;
/// How long a tombstone is kept: longer than any message can be delayed.
pub const TOMBSTONE_MS: u64 = 7 * 24 * 3_600_000;
/// Most tombstones kept; beyond that the oldest go.
pub const TOMBSTONES_MAX: usize = 65_536;

/// What a bidder must know of the node around it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Terms {
    /// Runs only this user's jobs, and why.
    pub(crate) owner_only: Option<(UserId, String)>,
    /// Offers nothing.
    pub(crate) closed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Hold(HoldId),
    Start(WorkId),
    Report(WorkId),
    Standing,
    Lease,
}

/// The bidder's machine.
#[derive(Debug, Clone)]
pub(crate) struct Bidder {
    me: PeerId,
    store: StoreId,
    boot: BootId,
    sabotage: Sabotage,
    terms: Terms,
    book: Book,
    standing: Standing,
    /// Attempts that will never be started here, by who may speak of them, so that nobody
    /// buries another steward's; with the wall time they were buried.
    tombstones: BTreeMap<(PeerId, JobId, Attempt), u64>,
    /// The latest stewardship known of jobs that changed theirs: who comes with an earlier
    /// one is not their steward any more. With the wall time it was learnt.
    known_terms: BTreeMap<JobId, (u64, u64)>,
    /// Who was said to drive a job, and when it was asked, on the boot clock.
    pointed: BTreeMap<(JobId, PeerId), u64>,
    /// Who keeps jobs by now of which something is here, as their heads say: those that a commit
    /// named may all be gone.
    hints: BTreeMap<JobId, Vec<PeerId>>,
    /// Leases of ranks with processes here.
    leases: BTreeMap<WorkId, Lease>,
    /// Endings no steward has acknowledged.
    ends: BTreeMap<WorkId, UnreportedEnd>,
    timers: Timers<Timer>,
    holds_made: u64,
    hold_prefix: [u8; 8],
    /// Holds in the journal that ended while the daemon was away. They leave the journal
    /// before anything else happens: to come back later they would only need a boot
    /// clock that has reached their time once more.
    stale_holds: Vec<HoldId>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct UnreportedEnd {
    steward: PeerId,
    term: u64,
    /// Who keeps the record: they know who drives the job, or that it is over.
    keepers: Vec<PeerId>,
    end: RankEnd,
    /// How often it was repeated by this daemon.
    #[serde(skip)]
    repeats: u32,
}

/// What a record gives to this node, and under which stewardship.
struct Assigned {
    term: u64,
    ranks: Vec<RankAssignment>,
}

impl Bidder {
    /// `hold_prefix` must differ at every boot: holds are never numbered twice.
    pub(crate) fn new(
        (me, store): Keeper,
        boot: BootId,
        hold_prefix: [u8; 8],
        sabotage: Sabotage,
    ) -> Self {
        Self {
            me,
            store,
            boot,
            sabotage,
            terms: Terms::default(),
            book: Book::new(sabotage),
            standing: Standing::default(),
            tombstones: BTreeMap::new(),
            known_terms: BTreeMap::new(),
            pointed: BTreeMap::new(),
            hints: BTreeMap::new(),
            leases: BTreeMap::new(),
            ends: BTreeMap::new(),
            timers: Timers::default(),
            holds_made: 0,
            hold_prefix,
            stale_holds: Vec::new(),
        }
    }

    pub(crate) fn set_terms(&mut self, terms: Terms) {
        self.terms = terms;
    }

    pub(crate) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    /// Who keeps the record of a rank that is committed to or runs here, by what named this node
    /// last.
    pub(crate) fn keepers_of_work(&self, id: WorkId) -> Option<Vec<PeerId>> {
        self.book.work.get(&id).map(Work::keepers)
    }

    /// The same of a rank that ended here and whose ending no steward has acknowledged yet.
    pub(crate) fn keepers_of_end(&self, id: WorkId) -> Option<Vec<PeerId>> {
        self.ends.get(&id).map(|unreported| unreported.keepers.clone())
    }

    pub(crate) fn local_trees(&self) -> &BTreeSet<BlobId> {
        &self.book.local_trees
    }

    /// A tree is here, all of it. Beyond [`TREES_MAX`] another is forgotten: it costs a
    /// look or a transfer, nothing else.
    pub(crate) fn tree_stored(&mut self, tree: BlobId) {
        if self.book.local_trees.len() >= TREES_MAX
            && let Some(other) = self.book.local_trees.pop_first()
        {
            self.book.blinded_trees.remove(&blinded(other));
        }
        self.book.local_trees.insert(tree);
        self.book.blinded_trees.insert(blinded(tree));
    }

    /// See [`crate::Peer::forget_trees`].
    pub(crate) fn forget_trees(&mut self, is_kept: impl Fn(BlobId) -> bool) {
        let Book { local_trees, blinded_trees, .. } = &mut self.book;
        local_trees.retain(|tree| {
            let stays = is_kept(*tree);
            if !stays {
                blinded_trees.remove(&blinded(*tree));
            }
            stays
        });
    }

    pub(crate) fn poll_timeout(&self) -> Option<(u64, &'static str)> {
        self.timers.next().map(|(at_ms, timer)| {
            let reason = match timer {
                Timer::Hold(_) => "a hold expires",
                Timer::Start(_) => "a commitment waits for its start",
                Timer::Report(_) => "an ending is unacknowledged",
                Timer::Standing => "a standing call expires or has rested",
                Timer::Lease => "leases are to be renewed",
            };
            (at_ms, reason)
        })
    }

    // ---- what the node around it says -------------------------------------------------

    pub(crate) fn set_capacity(&mut self, total: Capacity, now: Now, out: &mut Outbox) {
        self.book.set_total(total);
        self.room_appeared(now, out);
    }

    /// These GPUs are computed on by processes that are not ours.
    pub(crate) fn set_foreign(&mut self, gpus: Vec<GpuUuid>, now: Now, out: &mut Outbox) {
        self.book.set_foreign(gpus.into_iter().collect());
        self.room_appeared(now, out);
    }

    /// Code and data of a rank are in place, or cannot be.
    pub(crate) fn prepared(
        &mut self,
        id: WorkId,
        result: Result<(u16, String), String>,
        now: Now,
        out: &mut Outbox,
    ) {
        let Some(work) = self.book.work.get_mut(&id) else { return };
        if !matches!(work.phase, Phase::Committed { .. }) {
            return;
        }
        match result {
            Ok((port, host)) => {
                // Not journalled: a restarted daemon prepares again.
                work.prepared = Some((port, host));
                let steward = work.steward;
                if !self.sabotage.holds(Rule::StartOnlyWhenTold) {
                    self.run(id, None, None, now, out);
                }
                self.report_state(id, steward, now, out);
            }
            Err(reason) => {
                let ending = Ending::FailedToStart { reason };
                self.end(id, RankEnd::bare(ending, now.wall_ms), now, out);
            }
        }
    }

    /// The process of a rank runs.
    pub(crate) fn started(&mut self, id: WorkId, now: Now, out: &mut Outbox) {
        let Some(work) = self.book.work.get_mut(&id) else { return };
        if work.phase == Phase::Starting {
            work.phase = Phase::Running;
            let steward = work.steward;
            self.report_state(id, steward, now, out);
        }
    }

    /// What is lacking may be had later: see [`crate::Peer::not_prepared_yet`].
    pub(crate) fn not_prepared_yet(
        &mut self,
        id: WorkId,
        reason: String,
        now: Now,
        out: &mut Outbox,
    ) {
        let work = self.book.work.get(&id);
        if work.is_some_and(|work| matches!(work.phase, Phase::Committed { .. })) {
            let end = RankEnd::bare(Ending::NeverStarted, now.wall_ms);
            self.end(id, RankEnd { note: Some(reason), ..end }, now, out);
        }
    }

    /// The process of a rank ended; results are being gathered.
    pub(crate) fn draining(&mut self, id: WorkId, out: &mut Outbox) {
        let Some(work) = self.book.work.get_mut(&id) else { return };
        if matches!(work.phase, Phase::Starting | Phase::Running) {
            work.phase = Phase::Draining;
            let steward = work.steward;
            self.report(id, steward, RankReport::Cleaning, out);
        }
    }

    /// A rank is over here and nothing of it is left: what it was given is free again.
    pub(crate) fn end(&mut self, id: WorkId, end: RankEnd, now: Now, out: &mut Outbox) {
        let Some(work) = self.book.remove_work(id) else { return };
        self.timers.cancel(&Timer::Start(id));
        self.leases.remove(&id);
        // In this order a crash in between leaves the rank twice, which the next start
        // sees, and never not at all, which nobody would.
        let steward = work.steward;
        let (term, keepers) = (work.term, work.keepers());
        let unreported = UnreportedEnd { steward, term, keepers, end, repeats: 0 };
        out.put(&id.end_slot(), &unreported);
        out.remove(&id.slot());
        self.bury(steward, id.job, id.attempt, now, out);
        self.ends.insert(id, unreported);
        self.send_end(id, now, out);
        self.room_appeared(now, out);
    }

    /// After a restart: the processes the executor still knows. Ranks that were told to
    /// start and are not among them ended unseen; ranks not yet started are prepared again.
    pub(crate) fn adopt(&mut self, alive: &[WorkId], now: Now, out: &mut Outbox) {
        for id in core::mem::take(&mut self.stale_holds) {
            out.remove(&Slot::Hold(id));
        }
        let ids: Vec<WorkId> = self.book.work.keys().copied().collect();
        for id in ids {
            if let Some(steward) = self.ends.get(&id).map(|unreported| unreported.steward) {
                self.book.remove_work(id);
                out.remove(&id.slot());
                self.timers.cancel(&Timer::Start(id));
                self.bury(steward, id.job, id.attempt, now, out);
                continue;
            }
            if alive.contains(&id) {
                self.started(id, now, out);
                continue;
            }
            match self.book.work[&id].phase {
                Phase::Committed { .. } => {}
                Phase::Starting | Phase::Running | Phase::Draining => {
                    let reason = "its node restarted and found no process of it".to_owned();
                    let end = RankEnd::bare(Ending::Lost { reason }, now.wall_ms);
                    out.events.push_back(Event::Discard { id });
                    self.end(id, end, now, out);
                }
            }
        }
        self.adopt_committed(now, out);
        self.timers.set(Timer::Lease, now.boot_ms);
        for id in self.ends.keys().copied().collect::<Vec<_>>() {
            self.send_end(id, now, out);
        }
    }

    /// Prepare again what waits for its start; but where the attempt is buried and none
    /// of its ranks lives here, another rank ended or was given up, and so is this one.
    fn adopt_committed(&mut self, now: Now, out: &mut Outbox) {
        for id in self.book.work.keys().copied().collect::<Vec<_>>() {
            let work = &self.book.work[&id];
            let Phase::Committed { .. } = work.phase else { continue };
            let buried = self.is_buried(work.steward, id.job, id.attempt);
            let lives = |id: &WorkId| !matches!(self.book.work[id].phase, Phase::Committed { .. });
            if buried && !self.work_of(id.job, id.attempt).iter().any(lives) {
                out.events.push_back(Event::Discard { id });
                self.end(id, RankEnd::bare(Ending::NeverStarted, now.wall_ms), now, out);
            } else {
                out.events.push_back(self.prepare_event(id));
            }
        }
    }

    // ---- the journal ------------------------------------------------------------------

    pub(crate) fn restore_hold(&mut self, bytes: &[u8], now: Now) -> Result<(), String> {
        let mut hold: Hold = wire::decode(bytes).map_err(|e| e.to_string())?;
        let longest_ms = if hold.pinned { PIN_MS } else { HOLD_MS };
        if !hold.survives(longest_ms, now) {
            self.stale_holds.push(hold.id);
            return Ok(());
        }
        self.timers.set(Timer::Hold(hold.id), hold.expiry_ms);
        self.book.put_hold(hold);
        Ok(())
    }

    pub(crate) fn restore_work(&mut self, bytes: &[u8], now: Now) -> Result<(), String> {
        let mut work: Work = wire::decode(bytes).map_err(|e| e.to_string())?;
        let spec = VerifiedSpec::verify(work.signed_spec.clone()).map_err(|e| e.to_string())?;
        let id = work.id;
        if let Phase::Committed { until_ms, .. } = &mut work.phase {
            *until_ms = (*until_ms).min(now.after(COMMITTED_MS));
            self.timers.set(Timer::Start(id), *until_ms);
            // What the last daemon had in place must be put in place again.
            work.prepared = None;
        }
        work.spec = Some(Arc::new(spec));
        self.book.put_work(work);
        Ok(())
    }

    pub(crate) fn restore_tombstone(
        &mut self,
        steward: PeerId,
        job: JobId,
        attempt: Attempt,
        bytes: &[u8],
    ) {
        let buried_ms = wire::decode(bytes).unwrap_or_default();
        self.tombstones.insert((steward, job, attempt), buried_ms);
    }

    pub(crate) fn restore_term(&mut self, job: JobId, bytes: &[u8]) -> Result<(), String> {
        let known = wire::decode(bytes).map_err(|e| e.to_string())?;
        self.known_terms.insert(job, known);
        Ok(())
    }

    pub(crate) fn restore_end(&mut self, id: WorkId, bytes: &[u8]) -> Result<(), String> {
        self.ends.insert(id, wire::decode(bytes).map_err(|e| e.to_string())?);
        Ok(())
    }

    // ---- messages from stewards -------------------------------------------------------

    pub(crate) fn handle_call(&mut self, from: PeerId, call: Call, now: Now, out: &mut Outbox) {
        let job = call.key.job;
        let bid = self.bid(from, &call, now, out);
        debug!(%job, offers = bid.offers.len(), standing = bid.standing, "bid");
        out.send(self.me, from, Message::Bid(bid));
    }

    pub(crate) fn handle_pin(
        &mut self,
        from: PeerId,
        job: JobId,
        ids: &[HoldId],
        now: Now,
        out: &mut Outbox,
    ) {
        let is_held = |id: &HoldId| {
            let hold = self.book.holds.get(id);
            hold.is_some_and(|hold| hold.key.job == job && hold.steward == from)
        };
        let missing: Vec<HoldId> = ids.iter().filter(|id| !is_held(id)).copied().collect();
        if !missing.is_empty() {
            out.send(self.me, from, Message::PinRefused(PinRefusal { job, missing }));
            return;
        }
        for id in ids {
            let Some(hold) = self.book.hold_mut(*id) else { continue };
            if !hold.pinned {
                hold.pinned = true;
                hold.last(PIN_MS, now);
                self.timers.set(Timer::Hold(*id), hold.expiry_ms);
                out.put(&Slot::Hold(*id), hold);
            }
        }
        out.send(self.me, from, Message::Pinned { job, holds: ids.to_vec() });
    }

    pub(crate) fn handle_release(
        &mut self,
        from: PeerId,
        job: JobId,
        ids: &[HoldId],
        call: CallFate,
        now: Now,
        out: &mut Outbox,
    ) {
        match call {
            CallFate::Stand => {}
            CallFate::Rest { ms } => {
                self.standing.rest(job, from, now.after(ms.min(REST_MS_MAX)));
                self.arm_standing(now);
            }
            CallFate::Forget => self.standing.forget(job, from),
        }
        let mut freed = false;
        for id in ids {
            let ours = |hold: &Hold| hold.key.job == job && hold.steward == from;
            if self.book.holds.get(id).is_some_and(ours) {
                self.drop_hold(*id, out);
                freed = true;
            }
        }
        if freed {
            self.room_appeared(now, out);
        }
    }

    pub(crate) fn handle_commit(
        &mut self,
        from: PeerId,
        commit: Commit,
        spec: VerifiedSpec,
        value: Result<Value, String>,
        now: Now,
        out: &mut Outbox,
    ) {
        let (job, attempt) = (spec.job, commit.attempt);
        let known: Vec<WorkId> = self.work_of(job, attempt);
        if self.is_torn(from, &known, &commit, value.as_ref().ok()) {
            for id in known {
                self.abandon(id, now, out);
            }
            let reason = "its daemon died while it committed".to_owned();
            out.send(self.me, from, Message::CommitRefused { job, attempt, reason });
            self.room_appeared(now, out);
            return;
        }
        if !known.is_empty() {
            self.renew_commitments(&known, from, now, out);
            out.send(self.me, from, Message::Committed { job, attempt });
            for id in known {
                self.report_state(id, from, now, out);
            }
            return;
        }
        let checked = value.and_then(|value| {
            let ranks = self.check_commit(from, &commit, &spec, &value)?;
            Ok(Assigned { term: value.body.term, ranks })
        });
        match checked {
            Ok(assigned) => {
                self.learn_term(job, assigned.term, now, out);
                self.commit(from, &commit, spec, assigned, now, out);
                out.send(self.me, from, Message::Committed { job, attempt });
            }
            Err(reason) => {
                self.bury(from, job, attempt, now, out);
                for hold in self.book.holds_of(job, from) {
                    self.drop_hold(hold, out);
                }
                self.resend_ends(job, attempt, now, out);
                out.send(self.me, from, Message::CommitRefused { job, attempt, reason });
                self.room_appeared(now, out);
            }
        }
    }

    pub(crate) fn handle_withdraw(
        &mut self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        reason: &str,
        now: Now,
        out: &mut Outbox,
    ) {
        for hold in self.book.holds_of(job, from) {
            self.drop_hold(hold, out);
        }
        self.stop_or_bury(from, job, attempt, reason, now, out);
        self.room_appeared(now, out);
    }

    pub(crate) fn handle_start(&mut self, from: PeerId, start: Start, now: Now, out: &mut Outbox) {
        let (job, attempt) = (start.job, start.attempt);
        let ids = self.work_of(job, attempt);
        if ids.is_empty() {
            if self.resend_ends(job, attempt, now, out) {
                return;
            }
            self.bury(from, job, attempt, now, out);
            let reason = "it is not committed to this attempt any more".to_owned();
            out.send(self.me, from, Message::CommitRefused { job, attempt, reason });
            return;
        }
        for id in ids {
            let Some(work) = self.book.work.get(&id) else { continue };
            if work.steward != from {
                continue;
            }
            match work.phase {
                // The terms may have changed since it was committed, as over a restart.
                Phase::Committed { .. }
                    if work.spec.as_ref().is_some_and(|spec| self.check_terms(spec).is_err()) =>
                {
                    let ending = Ending::FailedToStart {
                        reason: "its node does not run this owner's jobs any more".to_owned(),
                    };
                    out.events.push_back(Event::Discard { id });
                    self.end(id, RankEnd::bare(ending, now.wall_ms), now, out);
                }
                Phase::Committed { .. } if work.prepared.is_some() => {
                    match self.first_lease(&start, now) {
                        Some(until_ms) => self.run(id, Some(&start), until_ms, now, out),
                        // It was long on its way: ask for a fresh one.
                        None => self.report_state(id, from, now, out),
                    }
                }
                // A restarted daemon prepares again; the steward repeats its start.
                Phase::Committed { .. } => {}
                Phase::Starting | Phase::Running | Phase::Draining => {
                    self.report_state(id, from, now, out);
                }
            }
        }
    }

    pub(crate) fn handle_stop(
        &mut self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        reason: &str,
        now: Now,
        out: &mut Outbox,
    ) {
        self.stop_or_bury(from, job, attempt, reason, now, out);
    }

    pub(crate) fn handle_ask(
        &mut self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        now: Now,
        out: &mut Outbox,
    ) {
        let ids = self.work_of(job, attempt);
        let repeated = self.resend_ends(job, attempt, now, out);
        if ids.is_empty() && !repeated {
            self.bury(from, job, attempt, now, out);
            let reason = "it knows nothing of this attempt".to_owned();
            out.send(self.me, from, Message::CommitRefused { job, attempt, reason });
        }
        for id in ids {
            self.report_state(id, from, now, out);
        }
    }

    pub(crate) fn handle_end_recorded(&mut self, from: PeerId, id: WorkId, out: &mut Outbox) {
        if self.ends.get(&id).is_some_and(|end| end.steward == from) {
            self.ends.remove(&id);
            self.timers.cancel(&Timer::Report(id));
            out.remove(&id.end_slot());
            out.events.push_back(Event::EndRecorded { id });
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Now, out: &mut Outbox) {
        while let Some(timer) = self.timers.pop_due(now.boot_ms) {
            match timer {
                Timer::Hold(id) => self.expire_hold(id, now, out),
                Timer::Start(id) => {
                    // It may share its node with ranks that ended: each says so for itself.
                    debug!(job = %id.job, "commitment was never started");
                    out.events.push_back(Event::Discard { id });
                    self.end(id, RankEnd::bare(Ending::NeverStarted, now.wall_ms), now, out);
                }
                Timer::Report(id) => self.repeat_end(id, now, out),
                Timer::Lease => self.ask_leases(now, out),
                Timer::Standing => {
                    self.standing.expire(now);
                    self.arm_standing(now);
                    self.room_appeared(now, out);
                }
            }
        }
    }

    // ---- views ------------------------------------------------------------------------

    pub(crate) fn view(&self) -> NodeView {
        let free = self.book.free();
        let gpus = self.book.total.gpus.iter().map(|gpu| GpuView {
            gpu: gpu.clone(),
            state: self.book.gpu_state(&gpu.uuid),
            job: self.book.gpu_job(&gpu.uuid),
        });
        NodeView {
            node: self.me,
            gpus: gpus.collect(),
            cpu_cores: (self.book.total.cpu_cores, free.cpu_cores),
            ram_mib: (self.book.total.ram_mib, free.ram_mib),
            owner_only: self.terms.owner_only.as_ref().map(|(_, reason)| reason.clone()),
            holds: self
                .book
                .holds
                .values()
                .map(|h| HoldView { job: h.key.job, grant: h.grant.clone(), pinned: h.pinned })
                .collect(),
            standing: self.standing.keys().collect(),
        }
    }

    /// What an advert says about use.
    pub(crate) fn usage(&self) -> &Usage {
        self.book.usage()
    }

    /// The spec of a job this node has work or an unacknowledged ending of.
    pub(crate) fn spec_of(&self, job: JobId) -> Option<&Arc<VerifiedSpec>> {
        let first = WorkId { job, attempt: Attempt(0), rank: Rank(0) };
        let (id, work) = self.book.work.range(first..).next()?;
        if id.job == job { work.spec.as_ref() } else { None }
    }

    /// Jobs there is work or an unacknowledged ending of, once for each rank.
    pub(crate) fn jobs(&self) -> impl Iterator<Item = JobId> {
        let live = self.book.work.iter().filter(|(_, work)| work.spec.is_some());
        live.map(|(id, _)| id.job)
    }

    // ---- bids -------------------------------------------------------------------------

    fn bid(&mut self, from: PeerId, call: &Call, now: Now, out: &mut Outbox) -> Bid {
        let job = call.key.job;
        let mut bid = Bid {
            job,
            offers: self.offers_of(job, from, call, now, out),
            hold_ms: HOLD_MS,
            standing: false,
            decline: None,
        };
        if let Some(decline) = self.refusal(call) {
            bid.decline = Some(decline);
            return bid;
        }
        let missing = self.missing(call, &bid.offers);
        if !missing.is_empty() {
            bid.offers.extend(self.hold(from, call, &missing, now, out));
        }
        let missing = self.missing(call, &bid.offers);
        if missing.is_empty() {
            self.standing.forget(job, from);
            return bid;
        }
        bid.decline = Some(self.decline(call.key, &missing));
        if call.standing && bid.decline.as_ref().is_some_and(|d| self.may_appear(d, &missing)) {
            let expires = self.sabotage.holds(Rule::CallsExpire);
            let since = if expires { now } else { Now { boot_ms: u64::MAX, ..now } };
            let standing = StandingCall::new(from, call.clone(), since);
            match self.standing.keep(standing) {
                Ok(pushed_out) => {
                    bid.standing = true;
                    self.arm_standing(now);
                    if let Some(lower) = pushed_out {
                        self.tell_pushed_out(&lower, call.key.job, out);
                    }
                }
                Err(higher) => bid.decline = Some(Decline::HigherJob { job: higher }),
            }
        }
        bid
    }

    /// Holds this job has here already, renewed: a repeated call gets the same answer.
    fn offers_of(
        &mut self,
        job: JobId,
        from: PeerId,
        call: &Call,
        now: Now,
        out: &mut Outbox,
    ) -> Vec<Offer> {
        let mut offers = Vec::new();
        for id in self.book.holds_of(job, from) {
            let Some(hold) = self.book.hold_mut(id) else { continue };
            if !hold.pinned {
                hold.last(HOLD_MS, now);
                self.timers.set(Timer::Hold(id), hold.expiry_ms);
                out.put(&Slot::Hold(id), hold);
            }
            let (group, grant) = (hold.group, hold.grant.clone());
            let score = self.score(&grant, call);
            offers.push(Offer { hold: id, group, grant, score });
        }
        offers
    }

    /// Reasons that have nothing to do with room.
    fn refusal(&self, call: &Call) -> Option<Decline> {
        if self.terms.closed {
            return Some(Decline::NotOffering);
        }
        let (owner, reason) = self.terms.owner_only.as_ref()?;
        (call.owner != *owner).then(|| Decline::OwnerOnly { reason: reason.clone() })
    }

    fn missing(&self, call: &Call, offers: &[Offer]) -> Vec<Wanted> {
        let missing = call.wanted.iter().map(|wanted| {
            let offered = offers.iter().filter(|offer| offer.group == wanted.group).count();
            let offered = u32::try_from(offered).unwrap_or(u32::MAX);
            Wanted { count: wanted.count.saturating_sub(offered), ..wanted.clone() }
        });
        missing.filter(|wanted| wanted.count > 0).collect()
    }

    /// Hold what fits of `missing`: in free room first, then in room that lower jobs only
    /// hold, whose holds are wounded.
    fn hold(
        &mut self,
        from: PeerId,
        call: &Call,
        missing: &[Wanted],
        now: Now,
        out: &mut Outbox,
    ) -> Vec<Offer> {
        let wanted: Vec<_> = missing.iter().map(|w| (w.group, w.count, &w.process)).collect();
        let most: u64 = missing.iter().map(|w| u64::from(w.count)).sum();
        let mut free = self.book.free().clone();
        let mut grants = fit_many(&wanted, &free);
        let mut wounded = Vec::new();
        for id in self.woundable(call.key) {
            if grants.len() as u64 >= most {
                break;
            }
            let Some(hold) = self.book.holds.get(&id) else { continue };
            free.give_back(&hold.grant, &self.book.total);
            wounded.push(id);
            let more = fit_many(&wanted, &free);
            if more.len() > grants.len() {
                grants = more;
                for id in wounded.drain(..) {
                    self.wound(id, call.key.job, out);
                }
            }
        }
        grants
            .into_iter()
            .map(|(group, grant)| self.make_hold(from, call, group, grant, now, out))
            .collect()
    }

    /// Holds a job with `key` may take, the lowest first.
    fn woundable(&self, key: Key) -> Vec<HoldId> {
        let mut lower: Vec<&Hold> = self
            .book
            .holds
            .values()
            .filter(|hold| key.is_higher_than(&hold.key))
            .filter(|hold| !hold.pinned || !self.sabotage.holds(Rule::PinsAreNotWounded))
            .collect();
        lower.sort_by(|a, b| b.key.cmp(&a.key).then(a.id.cmp(&b.id)));
        lower.into_iter().map(|hold| hold.id).collect()
    }

    fn wound(&mut self, id: HoldId, higher: JobId, out: &mut Outbox) {
        let Some(hold) = self.drop_hold(id, out) else { return };
        debug!(job = %hold.key.job, %higher, "hold wounded");
        out.events.push_back(Event::Wounded { job: hold.key.job, by: higher, pinned: hold.pinned });
        let lost = Message::HoldsLost { job: hold.key.job, holds: vec![id], higher: Some(higher) };
        out.send(self.me, hold.steward, lost);
    }

    fn make_hold(
        &mut self,
        from: PeerId,
        call: &Call,
        group: u32,
        grant: Grant,
        now: Now,
        out: &mut Outbox,
    ) -> Offer {
        self.holds_made += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.hold_prefix);
        id[8..].copy_from_slice(&self.holds_made.to_be_bytes());
        let id = HoldId(id);
        let hold = Hold {
            id,
            key: call.key,
            steward: from,
            group,
            grant: grant.clone(),
            pinned: false,
            expiry_ms: now.after(HOLD_MS),
            expiry_wall_ms: now.wall_ms.saturating_add(HOLD_MS),
        };
        self.timers.set(Timer::Hold(id), hold.expiry_ms);
        out.put(&Slot::Hold(id), &hold);
        self.book.put_hold(hold);
        let score = self.score(&grant, call);
        Offer { hold: id, group, grant, score }
    }

    /// The cost of a grant here: a point for each started 16 MiB of inputs to fetch, ten
    /// for each GPU left idle beside it (best fit), one for each core.
    fn score(&self, grant: &Grant, call: &Call) -> u32 {
        let fetch: u64 = call
            .inputs
            .iter()
            .filter(|(tree, _)| !self.book.blinded_trees.contains(tree))
            .map(|(_, bytes)| bytes.div_ceil(16 << 20))
            .sum();
        let free = self.book.free();
        let gpus_left = if grant.gpus.is_empty() { 0 } else { free.gpus.len() as u64 };
        let gpus_idle = if grant.gpus.is_empty() { self.book.total.gpus.len() as u64 } else { 0 };
        let score = fetch + 10 * gpus_left + 10 * gpus_idle + u64::from(self.book.used_cores());
        u32::try_from(score).unwrap_or(u32::MAX)
    }

    fn decline(&self, key: Key, missing: &[Wanted]) -> Decline {
        for wanted in missing {
            if fit(&wanted.process, &self.book.total).is_none() {
                return Decline::Unsuitable { missing: wanted.process.to_string() };
            }
        }
        let higher =
            self.book.holds.values().map(|hold| hold.key).filter(|k| k.is_higher_than(&key));
        if let Some(higher) = higher.min() {
            return Decline::HigherJob { job: higher.job };
        }
        let jobs = self.book.jobs();
        if jobs.is_empty() && !self.book.foreign.is_empty() {
            return Decline::ForeignUse {
                gpus: self.book.foreign.iter().take(8).cloned().collect(),
            };
        }
        Decline::Busy { jobs: jobs.into_iter().filter(|job| *job != key.job).take(8).collect() }
    }

    fn may_appear(&self, decline: &Decline, missing: &[Wanted]) -> bool {
        !matches!(decline, Decline::Unsuitable { .. })
            || missing.iter().any(|wanted| fit(&wanted.process, &self.book.total).is_some())
    }

    /// Answer standing calls, the highest first, with what fits now.
    pub(crate) fn room_appeared(&mut self, now: Now, out: &mut Outbox) {
        let mut room = self.book.free().clone();
        for key in self.standing.keys().collect::<Vec<_>>() {
            let Some(standing) = self.standing.get(key) else { continue };
            if standing.rests_until_ms > now.boot_ms {
                continue;
            }
            let wanted: Vec<_> =
                standing.call.wanted.iter().map(|w| (w.group, w.count, &w.process)).collect();
            if fit_many(&wanted, &room).is_empty() && self.woundable(key).is_empty() {
                continue;
            }
            if !self.book.holds_of(key.job, standing.steward).is_empty() {
                continue;
            }
            let (steward, call) = (standing.steward, standing.call.clone());
            let bid = self.bid(steward, &call, now, out);
            if bid.offers.is_empty() {
                continue;
            }
            if self.standing.count_bid(key) {
                self.standing.forget(key.job, steward);
            }
            out.send(self.me, steward, Message::Bid(bid));
            room.clone_from(self.book.free());
        }
    }

    fn tell_pushed_out(&self, lower: &StandingCall, higher: JobId, out: &mut Outbox) {
        let bid = Bid {
            job: lower.call.key.job,
            offers: Vec::new(),
            hold_ms: HOLD_MS,
            standing: false,
            decline: Some(Decline::HigherJob { job: higher }),
        };
        out.send(self.me, lower.steward, Message::Bid(bid));
    }

    fn arm_standing(&mut self, now: Now) {
        match self.standing.next_change(now) {
            Some(at_ms) => self.timers.set(Timer::Standing, at_ms),
            None => self.timers.cancel(&Timer::Standing),
        }
    }

    // ---- holds ------------------------------------------------------------------------

    fn drop_hold(&mut self, id: HoldId, out: &mut Outbox) -> Option<Hold> {
        let hold = self.book.remove_hold(id)?;
        self.timers.cancel(&Timer::Hold(id));
        out.remove(&Slot::Hold(id));
        Some(hold)
    }

    fn expire_hold(&mut self, id: HoldId, now: Now, out: &mut Outbox) {
        if !self.sabotage.holds(Rule::HoldsExpire) {
            return;
        }
        let Some(hold) = self.drop_hold(id, out) else { return };
        let lost = Message::HoldsLost { job: hold.key.job, holds: vec![id], higher: None };
        out.send(self.me, hold.steward, lost);
        self.room_appeared(now, out);
    }

    // ---- commitments ------------------------------------------------------------------

    /// Whether this node runs jobs of this owner, as its own signature names it.
    fn check_terms(&self, spec: &VerifiedSpec) -> Result<(), String> {
        if self.terms.closed {
            return Err("this node offers nothing".to_owned());
        }
        match &self.terms.owner_only {
            Some((owner, reason)) if spec.spec.owner != *owner => {
                Err(format!("this node runs only its owner's jobs: {reason}"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// What the record gives to this node, if the commit is in order in every respect.
    fn check_commit(
        &self,
        from: PeerId,
        commit: &Commit,
        spec: &VerifiedSpec,
        value: &Value,
    ) -> Result<Vec<RankAssignment>, String> {
        let (job, attempt) = (spec.job, commit.attempt);
        if value.body.steward != from {
            return Err("the sender is not the job's steward".to_owned());
        }
        if value.body.term < self.known_term(job) {
            return Err("another node is the job's steward by now".to_owned());
        }
        self.check_terms(spec)?;
        if self.tombstones.contains_key(&(from, job, attempt)) {
            return Err("this attempt was given up here".to_owned());
        }
        if value.body.attempt != attempt {
            return Err("the record is at another attempt".to_owned());
        }
        let assigned: Vec<RankAssignment> = value.body.assigned_to(self.me).cloned().collect();
        if assigned.is_empty() {
            return Err("the record does not name this node".to_owned());
        }
        for assignment in &assigned {
            let hold = self.book.holds.get(&assignment.hold);
            let in_order = hold.is_some_and(|hold| {
                (hold.pinned || !self.sabotage.holds(Rule::CommitNeedsCertificate))
                    && hold.steward == from
                    && hold.grant == assignment.grant
                    && hold.group == assignment.group
                    && hold.key == spec_key(spec)
            });
            if !in_order {
                return Err(format!("its pin for rank {} is gone", assignment.rank));
            }
            let foreign = assignment.grant.gpus.iter().find(|gpu| self.book.foreign.contains(*gpu));
            if let Some(gpu) = foreign {
                return Err(format!("a process that is not the pool's computes on {gpu}"));
            }
        }
        Ok(assigned)
    }

    /// Whether a crash cut off a commitment in the middle: some of the ranks that the
    /// record gives to this node are in the book, the others never were. Such a part is
    /// given up, since it will never be whole.
    fn is_torn(
        &self,
        from: PeerId,
        known: &[WorkId],
        commit: &Commit,
        value: Option<&Value>,
    ) -> bool {
        // Once one of them started, failed or was given up, a missing rank is an ended one.
        let is_waiting = |id: &WorkId| matches!(self.book.work[id].phase, Phase::Committed { .. });
        if known.is_empty()
            || !known.iter().all(is_waiting)
            || known.iter().any(|id| self.tombstones.contains_key(&(from, id.job, commit.attempt)))
        {
            return false;
        }
        let Some(value) = value else { return false };
        value.body.steward == from
            && value.body.attempt == commit.attempt
            && value.body.assigned_to(self.me).count() > known.len()
    }

    fn commit(
        &mut self,
        from: PeerId,
        commit: &Commit,
        spec: VerifiedSpec,
        assigned: Assigned,
        now: Now,
        out: &mut Outbox,
    ) {
        let job = spec.job;
        let spec = Arc::new(spec);
        let Assigned { term, ranks } = assigned;
        for assignment in ranks {
            self.drop_hold(assignment.hold, out);
            let id = WorkId { job, attempt: commit.attempt, rank: assignment.rank };
            let until_ms = now.after(COMMITTED_MS);
            let work = Work {
                id,
                steward: from,
                term,
                assignment,
                phase: Phase::Committed { since_ms: now.boot_ms, until_ms },
                prepared: None,
                signed_spec: spec.signed.clone(),
                certificate: commit.certificate.clone(),
                spec: Some(Arc::clone(&spec)),
            };
            self.timers.set(Timer::Start(id), until_ms);
            out.put(&id.slot(), &work);
            self.book.put_work(work);
            out.events.push_back(self.prepare_event(id));
        }
        // What was held beyond the assignment is free again.
        let surplus = self.book.holds_of(job, from);
        for hold in &surplus {
            self.drop_hold(*hold, out);
        }
        self.standing.forget(job, from);
        if !surplus.is_empty() {
            self.room_appeared(now, out);
        }
    }

    fn prepare_event(&self, id: WorkId) -> Event {
        let work = &self.book.work[&id];
        Event::Prepare {
            id,
            spec: work.spec.clone().map(|spec| (*spec).clone()).map(Box::new),
            assignment: work.assignment.clone(),
            certificate: work.certificate.clone(),
        }
    }

    fn renew_commitments(&mut self, ids: &[WorkId], from: PeerId, now: Now, out: &mut Outbox) {
        for id in ids {
            let Some(work) = self.book.work.get_mut(id) else { continue };
            let Phase::Committed { since_ms, until_ms } = &mut work.phase else { continue };
            if work.steward != from {
                continue;
            }
            let longest = since_ms.saturating_add(PREPARE_MS_MAX);
            *until_ms = now.after(COMMITTED_MS).min(longest);
            let until_ms = *until_ms;
            self.timers.set(Timer::Start(*id), until_ms);
            out.put(&id.slot(), work);
        }
    }

    /// The marker that it was started is durable before it is: an attempt starts at most
    /// once on a node, ever.
    fn run(
        &mut self,
        id: WorkId,
        start: Option<&Start>,
        until_ms: Option<u64>,
        now: Now,
        out: &mut Outbox,
    ) {
        let Some(work) = self.book.work.get_mut(&id) else { return };
        work.phase = Phase::Starting;
        if self.sabotage.holds(Rule::StartIsWritten) {
            out.put(&id.slot(), work);
        }
        self.timers.cancel(&Timer::Start(id));
        let lease = Lease::granted(until_ms, now);
        // The others of its gang may have taken long to prepare.
        let renew_ms = lease.renew_ms().max(now.boot_ms);
        self.leases.insert(id, lease);
        if self.timers.due(&Timer::Lease).is_none_or(|due_ms| renew_ms < due_ms) {
            self.timers.set(Timer::Lease, renew_ms);
        }
        let spec = work.spec.clone().map(|spec| (*spec).clone()).map(Box::new);
        let assignment = work.assignment.clone();
        let steward = work.steward;
        self.bury(steward, id.job, id.attempt, now, out);
        let (nodes, hosts, port) = start
            .map_or((Vec::new(), Vec::new(), 0), |s| (s.nodes.clone(), s.hosts.clone(), s.port));
        out.events.push_back(Event::Execute { id, spec, assignment, nodes, hosts, port, until_ms });
    }

    /// Stop what runs of an attempt; what has not started never will.
    fn stop_or_bury(
        &mut self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        reason: &str,
        now: Now,
        out: &mut Outbox,
    ) {
        self.bury(from, job, attempt, now, out);
        let ids = self.work_of(job, attempt);
        let repeated = self.resend_ends(job, attempt, now, out);
        if ids.is_empty() && !repeated {
            let reason = "it was never started here".to_owned();
            out.send(self.me, from, Message::CommitRefused { job, attempt, reason });
        }
        for id in ids {
            let Some(work) = self.book.work.get(&id) else { continue };
            if work.steward != from {
                continue;
            }
            match work.phase {
                Phase::Committed { .. } => {
                    out.events.push_back(Event::Discard { id });
                    self.end(id, RankEnd::bare(Ending::NeverStarted, now.wall_ms), now, out);
                }
                Phase::Starting | Phase::Running => {
                    out.events.push_back(Event::StopProcess { id, reason: reason.to_owned() });
                }
                Phase::Draining => {}
            }
        }
    }

    /// A commitment that will not be started any more.
    fn abandon(&mut self, id: WorkId, now: Now, out: &mut Outbox) {
        if let Some(Work { steward, .. }) = self.book.remove_work(id) {
            out.remove(&id.slot());
            self.timers.cancel(&Timer::Start(id));
            self.bury(steward, id.job, id.attempt, now, out);
            out.events.push_back(Event::Discard { id });
        }
    }

    fn bury(&mut self, steward: PeerId, job: JobId, attempt: Attempt, now: Now, out: &mut Outbox) {
        let buried = (steward, job, attempt);
        if self.tombstones.contains_key(&buried) {
            return;
        }
        if self.tombstones.len() >= TOMBSTONES_MAX {
            self.forget_oldest_tombstones(now, out);
        }
        self.tombstones.insert(buried, now.wall_ms);
        out.put(&Slot::Tombstone(steward, job, attempt), &now.wall_ms);
    }

    /// Those older than any message can be; if none is, the oldest half, so that the next
    /// look comes late.
    fn forget_oldest_tombstones(&mut self, now: Now, out: &mut Outbox) {
        let mut ages: Vec<u64> = self.tombstones.values().copied().collect();
        ages.sort_unstable();
        let middle = ages[ages.len() / 2];
        let until_ms = middle.max(now.wall_ms.saturating_sub(TOMBSTONE_MS));
        self.tombstones.retain(|(steward, job, attempt), buried_ms| {
            let keep = *buried_ms > until_ms;
            if !keep {
                out.remove(&Slot::Tombstone(*steward, *job, *attempt));
            }
            keep
        });
    }

    fn is_buried(&self, steward: PeerId, job: JobId, attempt: Attempt) -> bool {
        self.tombstones.contains_key(&(steward, job, attempt))
    }

    fn work_of(&self, job: JobId, attempt: Attempt) -> Vec<WorkId> {
        let of = |rank| WorkId { job, attempt, rank: Rank(rank) };
        self.book.work.range(of(0)..=of(u32::MAX)).map(|(id, _)| *id).collect()
    }

    // ---- reports ----------------------------------------------------------------------

    fn report_state(&mut self, id: WorkId, to: PeerId, now: Now, out: &mut Outbox) {
        let Some(work) = self.book.work.get(&id) else { return };
        let report = match (&work.phase, &work.prepared) {
            (Phase::Committed { .. }, Some((port, host))) => {
                RankReport::Prepared { port: *port, host: host.clone(), clock: self.clock(now) }
            }
            (Phase::Committed { .. }, None) => RankReport::At(RankState::Assigned),
            (Phase::Starting, _) => RankReport::At(RankState::Prepared),
            (Phase::Running, _) => RankReport::At(RankState::Running),
            (Phase::Draining, _) => RankReport::Cleaning,
        };
        self.report(id, to, report, out);
    }

    fn report(&self, id: WorkId, to: PeerId, report: RankReport, out: &mut Outbox) {
        let WorkId { job, attempt, rank } = id;
        let (node, store) = (self.me, self.store);
        let report = Report { job, attempt, rank, node, store, report };
        out.send(self.me, to, Message::Report(Box::new(report)));
    }

    /// Report an ending, and again after a while unless it is acknowledged.
    fn send_end(&mut self, id: WorkId, now: Now, out: &mut Outbox) {
        let Some(unreported) = self.ends.get_mut(&id) else { return };
        unreported.repeats = unreported.repeats.saturating_add(1);
        let (repeats, steward) = (unreported.repeats, unreported.steward);
        let end = unreported.end.clone();
        self.report(id, steward, RankReport::Ended(end), out);
        let pause_ms = REPORT_MS << repeats.saturating_sub(REPORTS_ALONE).min(4);
        self.timers.set(Timer::Report(id), now.after(pause_ms));
    }

    /// Nobody acknowledged an ending in time: report it again, and ask who drives the job by
    /// now, or knows that it is over. Only time leads here: what the asked ones answer leads to
    /// another report, which must not lead to another question.
    fn repeat_end(&mut self, id: WorkId, now: Now, out: &mut Outbox) {
        self.send_end(id, now, out);
        let Some(unreported) = self.ends.get(&id) else { return };
        if unreported.repeats > REPORTS_ALONE {
            let ask = LeaseAsk { job: id.job, attempt: id.attempt, term: unreported.term };
            for keeper in self.with_hints(id.job, unreported.keepers.clone()) {
                let ask = Message::AskLease { clock: self.clock(now), entries: vec![ask] };
                out.send(self.me, keeper, ask);
            }
        }
    }

    /// Repeat endings of an attempt; whether there are any.
    fn resend_ends(&mut self, job: JobId, attempt: Attempt, now: Now, out: &mut Outbox) -> bool {
        let of = |rank| WorkId { job, attempt, rank: Rank(rank) };
        let ids: Vec<_> = self.ends.range(of(0)..=of(u32::MAX)).map(|(id, _)| *id).collect();
        for id in &ids {
            self.send_end(*id, now, out);
        }
        !ids.is_empty()
    }
}

/// A job's place in the order, from its spec.
pub(crate) fn spec_key(spec: &VerifiedSpec) -> Key {
    Key { submitted_at_ms: spec.spec.submitted_at_ms, job: spec.job }
}
