//! What one node knows of copies, and what follows for it.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    CANNOT_MS, COPIES_CHECK_MS, EndOrder, HERE_MS, INPUT_HOLDERS, RankOrder, SAVE_RESEND_MS,
    SAVE_RESEND_MS_MAX, SaveOrder, candidates, copies_for, holders, in_order_of,
};
use crate::{
    BlobId, JobId, Now, PeerId, StoreId,
    bidder::{Bidder, WorkId},
    inventory::Board,
    job::{Attempt, Ending, Rank, RankRecord, RankState, SAVED_MAX, Saved, State},
    message::{COPIES_MAX, CopyState, Message},
    peer::Outbox,
    record::{Body, KEEP_MS, Keeper, Kept},
    roster::Roster,
    sabotage::{Rule, Sabotage},
    steward::AWAY_MS,
    timer::Timers,
};

/// Most copies of `keep/` of processes of this node that are remembered.
const SAVES_MAX: usize = 4_096;
/// How long a steward waits to be told of part of what was copied.
const TELL_MS: u64 = 1_000;
/// How often the others are told that something cannot be copied here.
const REFUSALS_TOLD: u32 = 3;
/// How long a keeper may lack the record before it does not count for copies.
const LACKS_MS: u64 = 10_000;
/// The longest reason of another node's that is remembered, in bytes.
const REASON_BYTES_MAX: usize = 256;

/// What is seen of others at a call.
#[derive(Clone, Copy)]
pub(crate) struct Scene<'a> {
    pub(crate) board: &'a Board,
    pub(crate) roster: &'a Roster,
    pub(crate) now: Now,
}

/// What is here of one rank, durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    complete: bool,
    save: Option<(u64, BlobId)>,
}

/// The keepers that are the stores that keep the record, as far as is known: a node that lost its
/// disk knows nothing of it. In the order in which they hold what `rank` leaves, where one is given.
fn stores_of(kept: &Kept, rank: Option<Rank>, me: PeerId, scene: Scene<'_>) -> Vec<PeerId> {
    let same = |(node, store): &&Keeper| {
        let posted = scene.board.get(*node);
        *node == me || posted.is_none_or(|posted| posted.advert.store == *store)
    };
    let mut keepers = kept.keepers.clone();
    if let Some(rank) = rank {
        in_order_of(rank, &mut keepers);
    }
    keepers.iter().filter(same).map(|(node, _)| *node).collect()
}

/// What this node has to bring here of a job; see [`super::CopyOrder`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Duty {
    pub(crate) inputs: bool,
    pub(crate) saved: Vec<Saved>,
    pub(crate) ranks: Vec<RankOrder>,
}

/// Why something cannot be copied here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cannot {
    reason: String,
    until_ms: u64,
    /// How often the others were told; of what this node cannot.
    told: u32,
    /// Of which configuration of the record.
    epoch: u32,
}

/// What another node said of its copies of an attempt, or this one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    attempt: Attempt,
    /// When; `None`: not since it connected last.
    at_ms: Option<u64>,
    ranks: BTreeMap<Rank, CopyState>,
    /// When it last said of a rank that it is being copied.
    busy_ms: BTreeMap<Rank, u64>,
    cannot: Option<Cannot>,
    /// Since when it keeps no record of the job, though it is named as a keeper.
    lacks_ms: Option<u64>,
}

/// A copy of `keep/` that a process here made.
#[derive(Debug, Clone, PartialEq, Eq)]
struct OwnSave {
    seq: u64,
    tree: BlobId,
    keepers: Vec<PeerId>,
    /// Who has it, in which store.
    held_by: BTreeMap<PeerId, Option<StoreId>>,
    pause_ms: u64,
}

impl OwnSave {
    /// Whether as many others have it as should.
    fn is_held(&self, me: PeerId) -> bool {
        let others = self.keepers.iter().filter(|keeper| **keeper != me).count();
        self.held_by.len() >= (copies_for(self.keepers.len()) - 1).min(others)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Check,
    Tell(JobId),
    Save(WorkId),
}

/// How the results of a rank stand that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// As many nodes have them as can; so many, and so many should.
    Enough { have: usize, should: usize },
    /// They are being copied; the same.
    UnderWay { have: usize, should: usize },
    /// Nobody who can be reached has all of them, since then, on the boot clock.
    Gone { since_ms: u64 },
    /// Nobody has them, and nobody will: the disk they were on is lost.
    Lost,
}

/// What this node knows of copies.
#[derive(Debug, Clone)]
pub(crate) struct Copies {
    me: PeerId,
    store: StoreId,
    sabotage: Sabotage,
    /// See [`crate::Peer::set_keep_done`].
    pub(crate) keep_done_ms: u64,
    /// What is to be brought here.
    duties: BTreeMap<JobId, Duty>,
    /// What is here, as the node around the peer says.
    held: BTreeMap<JobId, BTreeMap<(Attempt, Rank), Held>>,
    /// What cannot be copied here, and why.
    cannot: BTreeMap<JobId, Cannot>,
    /// What holders say, this node among them, of jobs kept here.
    told: BTreeMap<JobId, BTreeMap<PeerId, Told>>,
    /// The newest copy of each rank's `keep/`, as its node says.
    announced: BTreeMap<JobId, BTreeMap<Rank, (Attempt, SaveOrder)>>,
    /// Copies of `keep/` that processes here made.
    saves: BTreeMap<WorkId, OwnSave>,
    /// Since when nodes are away, on the boot clock.
    away: BTreeMap<PeerId, u64>,
    /// Since when nodes are connected, on the boot clock.
    here: BTreeMap<PeerId, u64>,
    /// Who was present when that was last looked at, with which store.
    present: BTreeMap<PeerId, (Option<StoreId>, bool)>,
    /// Since when this node looks, on the boot clock.
    began_ms: u64,
    /// Who is present may have changed.
    pub(crate) look_around: bool,
    /// It is time to see whether keepers of jobs that are over are gone.
    pub(crate) look_at_done: bool,
    /// It is time to see whether copies of `keep/` are where they were.
    pub(crate) look_at_saves: bool,
    /// It is time to tell again what cannot be copied here.
    repeats: bool,
    /// Jobs whose orders are to be thought over.
    dirty: BTreeSet<JobId>,
    /// Jobs of which something was copied since their stewards were told.
    news: BTreeSet<JobId>,
    /// Of these, those whose stewards have waited for more.
    overdue: BTreeSet<JobId>,
    timers: Timers<Timer>,
}

impl Copies {
    pub(crate) fn new((me, store): Keeper, sabotage: Sabotage) -> Self {
        Self {
            me,
            store,
            sabotage,
            keep_done_ms: KEEP_MS,
            duties: BTreeMap::new(),
            held: BTreeMap::new(),
            cannot: BTreeMap::new(),
            told: BTreeMap::new(),
            announced: BTreeMap::new(),
            saves: BTreeMap::new(),
            away: BTreeMap::new(),
            here: BTreeMap::new(),
            present: BTreeMap::new(),
            began_ms: 0,
            look_around: true,
            look_at_done: false,
            look_at_saves: false,
            repeats: false,
            dirty: BTreeSet::new(),
            news: BTreeSet::new(),
            overdue: BTreeSet::new(),
            timers: Timers::default(),
        }
    }

    /// Whether anything is to be thought over, or told.
    pub(crate) fn has_work(&self) -> bool {
        self.look_around
            || self.look_at_done
            || self.look_at_saves
            || self.repeats
            || !self.dirty.is_empty()
            || !self.news.is_empty()
            || !self.overdue.is_empty()
    }

    /// Begin to look, at a start.
    pub(crate) fn begin(&mut self, now: Now) {
        self.began_ms = now.boot_ms;
        self.timers.set(Timer::Check, now.after(COPIES_CHECK_MS));
    }

    pub(crate) fn poll_timeout(&self) -> Option<(u64, &'static str)> {
        self.timers.next().map(|(at_ms, timer)| {
            let reason = match timer {
                Timer::Check => "who holds copies is to be looked at",
                Timer::Tell(_) => "what was copied is to be told",
                Timer::Save(_) => "a copy of keep/ is unacknowledged",
            };
            (at_ms, reason)
        })
    }

    pub(crate) fn handle_timeout(&mut self, bidder: &Bidder, now: Now, out: &mut Outbox) {
        while let Some(timer) = self.timers.pop_due(now.boot_ms) {
            match timer {
                Timer::Check => {
                    (self.look_around, self.repeats) = (true, true);
                    (self.look_at_done, self.look_at_saves) = (true, true);
                    self.forget_refusals(now);
                    self.timers.set(Timer::Check, now.after(COPIES_CHECK_MS));
                }
                Timer::Tell(job) => {
                    self.overdue.insert(job);
                }
                Timer::Save(id) => self.send_save(id, bidder, now, out),
            }
        }
    }

    /// Jobs that cannot be copied here of which the others are to be told again: the first time
    /// may not have reached everybody.
    pub(crate) fn repeated(&mut self) -> Vec<JobId> {
        let due = core::mem::take(&mut self.repeats);
        let mut jobs = Vec::new();
        for (job, cannot) in self.cannot.iter_mut().filter(|_| due) {
            if cannot.told < REFUSALS_TOLD {
                cannot.told += 1;
                jobs.push(*job);
            }
        }
        jobs
    }

    /// Nodes that could not hold something are asked again after a while.
    fn forget_refusals(&mut self, now: Now) {
        let over = |cannot: &Cannot| cannot.until_ms <= now.boot_ms;
        for (job, told) in &mut self.told {
            for told in told.values_mut().filter(|told| told.cannot.as_ref().is_some_and(over)) {
                told.cannot = None;
                self.dirty.insert(*job);
            }
        }
        let old = self.cannot.iter().filter(|(_, cannot)| over(cannot));
        for job in old.map(|(job, _)| *job).collect::<Vec<_>>() {
            self.cannot.remove(&job);
            self.dirty.insert(job);
        }
    }

    // ---- who is there -----------------------------------------------------------------

    pub(crate) fn connected(&mut self, peer: PeerId, now: Now) {
        self.away.remove(&peer);
        self.here.insert(peer, now.boot_ms);
        self.look_around = true;
        // It may come back with another disk: what it has it is to say again.
        for told in self.told.values_mut().filter_map(|told| told.get_mut(&peer)) {
            // Until then it has not answered, and nothing is to be concluded from its silence.
            told.at_ms = None;
            told.ranks.clear();
        }
        // Its daemon may have been started anew, and knows of no refusal then.
        for cannot in self.cannot.values_mut() {
            cannot.told = 0;
        }
    }

    /// A keeper shows that it has the record by now.
    pub(crate) fn has_record(&mut self, keeper: PeerId, job: JobId) {
        let told = self.told.get_mut(&job).and_then(|told| told.get_mut(&keeper));
        if let Some(told) = told
            && told.lacks_ms.take().is_some()
        {
            told.cannot = None;
            self.dirty.insert(job);
        }
    }

    /// A keeper reads the record, for which it may be new: it is to hear, like the others, where
    /// something of the job cannot be copied here.
    pub(crate) fn is_read(&mut self, job: JobId) {
        if let Some(cannot) = self.cannot.get_mut(&job) {
            cannot.told = 0;
        }
    }

    pub(crate) fn disconnected(&mut self, peer: PeerId, now: Now) {
        self.here.remove(&peer);
        self.away.insert(peer, now.boot_ms);
        self.look_around = true;
    }

    /// The record of `job` changed, or is kept here no more.
    pub(crate) fn record_changed(&mut self, job: JobId) {
        self.dirty.insert(job);
    }

    /// Since when `node` is away, on the boot clock; of nodes that were never seen, since this
    /// one looks.
    pub(crate) fn away_since(&self, node: PeerId) -> u64 {
        self.away.get(&node).copied().unwrap_or(self.began_ms)
    }

    /// Whether what is on `node` can be had now.
    fn is_reachable(&self, node: PeerId, scene: Scene<'_>) -> bool {
        node == self.me || scene.board.is_connected(node)
    }

    /// The store that `node` has, as far as is known.
    pub(crate) fn store_of(&self, node: PeerId, scene: Scene<'_>) -> Option<StoreId> {
        if node == self.me {
            return Some(self.store);
        }
        scene.board.get(node).map(|posted| posted.advert.store)
    }

    /// The node that ran a rank, unless it lost its disk since.
    fn runner(&self, record: &RankRecord, scene: Scene<'_>) -> Option<PeerId> {
        let node = record.assignment.node;
        let lost = match (record.store, self.store_of(node, scene)) {
            (Some(then), Some(now)) => then != now,
            (None, _) | (_, None) => false,
        };
        (!lost).then_some(node)
    }

    /// Whether `node` counts for holding something.
    pub(crate) fn is_present(&self, node: PeerId, scene: Scene<'_>) -> bool {
        self.is_present_within(node, AWAY_MS, scene)
    }

    /// The same, where it may be away for so long.
    fn is_present_within(&self, node: PeerId, most_ms: u64, scene: Scene<'_>) -> bool {
        let posted = scene.board.get(node);
        let client = node != self.me && posted.is_some_and(|posted| posted.advert.client);
        let away_ms = scene.now.boot_ms.saturating_sub(self.away_since(node));
        scene.roster.state().is_member_node(node)
            && !client
            && (self.is_reachable(node, scene) || away_ms < most_ms)
    }

    /// Whether `node` said lately that it cannot hold what `job` leaves.
    fn has_refused(&self, job: JobId, node: PeerId) -> bool {
        if node == self.me {
            return self.cannot.contains_key(&job);
        }
        let told = self.told.get(&job).and_then(|told| told.get(&node));
        told.is_some_and(|told| told.cannot.is_some())
    }

    // ---- what this node is to hold ----------------------------------------------------

    /// Jobs to be thought over now: those whose records changed; all, where somebody came or
    /// went.
    pub(crate) fn due(
        &mut self,
        scene: Scene<'_>,
        all: impl Iterator<Item = JobId>,
    ) -> BTreeSet<JobId> {
        if core::mem::take(&mut self.look_around) {
            let nodes = scene.roster.state().nodes.keys();
            let present = nodes.filter(|node| self.is_present(**node, scene));
            let present = present.map(|node| {
                let is_here = self.is_present_within(*node, HERE_MS, scene);
                (*node, (self.store_of(*node, scene), is_here))
            });
            let present = present.collect();
            if present != self.present {
                self.present = present;
                self.dirty.extend(all);
            }
            // Which of them are still wanted depends on the date.
            self.dirty.extend(self.duties.keys());
        }
        core::mem::take(&mut self.dirty)
    }

    /// Think over what is to be brought here of `job`; whether that is news.
    pub(crate) fn consider(&mut self, job: JobId, kept: Option<&Kept>, scene: Scene<'_>) -> bool {
        let Some(kept) = kept else {
            self.told.remove(&job);
            self.announced.remove(&job);
            self.cannot.remove(&job);
            // Of a job of which nothing was made here either, nobody asks any more.
            if !self.saves.keys().any(|id| id.job == job) {
                self.held.remove(&job);
            }
            return self.duties.remove(&job).is_some();
        };
        self.drop_stale(job, kept);
        if let Some(cannot) = self.cannot.get_mut(&job)
            && cannot.epoch != kept.value.epoch
        {
            // Who keeps it now may not have heard of it.
            (cannot.epoch, cannot.told) = (kept.value.epoch, 0);
            self.repeats = true;
        }
        let duty = self.duty_of(job, kept, scene);
        if self.duties.get(&job) == duty.as_ref() {
            return false;
        }
        match duty {
            Some(duty) => self.duties.insert(job, duty),
            None => self.duties.remove(&job),
        };
        true
    }

    /// Forget what was said by or of whom the record names no more.
    fn drop_stale(&mut self, job: JobId, kept: &Kept) {
        let body = &kept.value.body;
        let over = body.state() == State::Done;
        if let Some(told) = self.told.get_mut(&job) {
            told.retain(|node, told| {
                let named = kept.keepers.iter().any(|(keeper, _)| keeper == node)
                    || body.ranks.iter().any(|rank| rank.assignment.node == *node);
                named && (told.cannot.is_some() || (!over && told.attempt == body.attempt))
            });
            if told.is_empty() {
                self.told.remove(&job);
            }
        }
        if let Some(announced) = self.announced.get_mut(&job) {
            announced.retain(|rank, (attempt, _)| {
                let runs = |record: &RankRecord| {
                    record.assignment.rank == *rank && record.state != RankState::Ended
                };
                *attempt == body.attempt && body.ranks.iter().any(runs)
            });
            if announced.is_empty() {
                self.announced.remove(&job);
            }
        }
    }

    fn duty_of(&self, job: JobId, kept: &Kept, scene: Scene<'_>) -> Option<Duty> {
        let body = &kept.value.body;
        let over = body.state() == State::Done;
        let ended_ms = body.history.last().map_or(0, |change| change.at_ms);
        let expired = over && ended_ms.saturating_add(self.keep_done_ms) <= scene.now.wall_ms;
        if expired || body.removed.is_some() || self.cannot.contains_key(&job) {
            return None;
        }
        let keepers = stores_of(kept, None, self.me, scene);
        let may = |node: PeerId| self.is_present(node, scene) && !self.has_refused(job, node);
        let most_ms = if over { AWAY_MS } else { HERE_MS };
        let may_hold = |node: PeerId| {
            self.is_present_within(node, most_ms, scene) && !self.has_refused(job, node)
        };
        let first = |keepers: &[PeerId], most| {
            keepers.iter().copied().filter(|node| may(*node)).take(most).any(|node| node == self.me)
        };
        let inputs = !over && first(&keepers, INPUT_HOLDERS);
        let saved = if inputs { body.saved.clone() } else { Vec::new() };
        let started = matches!(
            body.state(),
            State::Starting | State::Running | State::Stopping | State::Cleaning | State::Done
        );
        let ranks = body.ranks.iter().filter(|_| started).filter_map(|rank| {
            let should = copies_for(kept.keepers.len());
            let runner = self.runner(rank, scene);
            let number = rank.assignment.rank;
            let keepers = stores_of(kept, Some(number), self.me, scene);
            let is_mine = holders(runner, &keepers, should, may_hold).contains(&self.me);
            if runner == Some(self.me) || !is_mine {
                return None;
            }
            self.rank_order(job, body, rank, &keepers)
        });
        let duty = Duty { inputs, saved, ranks: ranks.collect() };
        (duty.inputs || !duty.ranks.is_empty()).then_some(duty)
    }

    /// What is still to be brought here of a rank.
    fn rank_order(
        &self,
        job: JobId,
        body: &Body,
        record: &RankRecord,
        keepers: &[PeerId],
    ) -> Option<RankOrder> {
        let (rank, attempt) = (record.assignment.rank, body.attempt);
        let held = self.held_of(job, attempt, rank);
        let ended = record.state == RankState::Ended;
        let end = record.end.as_ref().filter(|end| end.has_results() && !held.complete);
        let end = end.map(|end| EndOrder {
            log_bytes: end.log_bytes,
            keep: end.keep,
            artifacts: end.artifacts,
        });
        let announced = self.announced.get(&job).and_then(|announced| announced.get(&rank));
        let newer = |save: &SaveOrder| held.save.is_none_or(|(seq, _)| seq < save.seq);
        let save = announced.filter(|(at, _)| *at == attempt && !ended).map(|(_, save)| *save);
        let save = save.filter(newer);
        let follow = !ended && record.state >= RankState::Prepared;
        if end.is_none() && save.is_none() && !follow {
            return None;
        }
        let node = record.assignment.node;
        let sources = candidates(Some(node), keepers).filter(|source| *source != self.me).collect();
        Some(RankOrder { rank, attempt, node, sources, end, save, follow })
    }

    /// What is to be brought here of a job.
    pub(crate) fn duty(&self, job: JobId) -> Option<&Duty> {
        self.duties.get(&job)
    }

    // ---- what is here -----------------------------------------------------------------

    fn held_of(&self, job: JobId, attempt: Attempt, rank: Rank) -> Held {
        let of_job = self.held.get(&job);
        of_job.and_then(|held| held.get(&(attempt, rank))).copied().unwrap_or_default()
    }

    fn held_mut(&mut self, job: JobId, attempt: Attempt, rank: Rank) -> &mut Held {
        self.dirty.insert(job);
        self.held.entry(job).or_default().entry((attempt, rank)).or_default()
    }

    pub(crate) fn copied(&mut self, job: JobId, attempt: Attempt, rank: Rank) {
        self.held_mut(job, attempt, rank).complete = true;
        self.news.insert(job);
    }

    pub(crate) fn save_held(&mut self, id: WorkId, seq: u64, tree: BlobId) {
        let held = self.held_mut(id.job, id.attempt, id.rank);
        if held.save.is_none_or(|(known, _)| known < seq) {
            held.save = Some((seq, tree));
        }
    }

    pub(crate) fn lost(&mut self, job: JobId, attempt: Attempt, rank: Rank) {
        if let Some(of_job) = self.held.get_mut(&job) {
            of_job.remove(&(attempt, rank));
            if of_job.is_empty() {
                self.held.remove(&job);
            }
            self.dirty.insert(job);
        }
    }

    /// `job` cannot be copied here; whether the others are to be told.
    pub(crate) fn cannot(&mut self, job: JobId, reason: String, now: Now) -> bool {
        if let Some(known) = self.cannot.get_mut(&job) {
            // It is asked again when that is over, not later for having said it twice; a reason
            // that names how much room there is changes with every try.
            let tell = known.reason != reason && known.told < REFUSALS_TOLD;
            known.told += u32::from(tell);
            known.reason = reason;
            return tell;
        }
        let until_ms = now.after(CANNOT_MS);
        self.cannot.insert(job, Cannot { reason, until_ms, told: 1, epoch: 0 });
        self.dirty.insert(job);
        true
    }

    pub(crate) fn can(&mut self, job: JobId) {
        self.cannot.remove(&job);
        self.dirty.insert(job);
    }

    /// How this node stands to the copies of an attempt: of ranks it holds something of, is to
    /// hold, or cannot hold.
    pub(crate) fn states(&self, job: JobId, attempt: Attempt) -> Vec<CopyState> {
        let cannot = self.cannot.get(&job).map(|cannot| cannot.reason.clone());
        let of_job = self.held.get(&job).into_iter().flatten();
        let mut states: BTreeMap<Rank, CopyState> = BTreeMap::new();
        let blank =
            |rank| CopyState { rank, complete: false, save: None, under_way: false, cannot: None };
        for ((_, rank), held) in of_job.filter(|((at, _), _)| *at == attempt) {
            let state = CopyState { complete: held.complete, save: held.save, ..blank(*rank) };
            states.insert(*rank, state);
        }
        let ranks = self.duties.get(&job).into_iter().flat_map(|duty| &duty.ranks);
        for order in ranks.filter(|order| order.attempt == attempt) {
            states.entry(order.rank).or_insert_with(|| blank(order.rank)).under_way = true;
        }
        if cannot.is_some() {
            // Said of all that is not here, and at least once.
            states.entry(Rank(0)).or_insert_with(|| blank(Rank(0)));
            for state in states.values_mut().filter(|state| !state.complete || state.rank.0 == 0) {
                state.cannot.clone_from(&cannot);
            }
        }
        states.into_values().take(COPIES_MAX).collect()
    }

    // ---- what others say --------------------------------------------------------------

    /// See [`Message::Copies`]. The caller has checked that the record names the sender.
    pub(crate) fn hear(
        &mut self,
        from: PeerId,
        kept: &Kept,
        (attempt, seq): (Attempt, u64),
        states: Vec<CopyState>,
        now: Now,
    ) {
        let (job, body) = (kept.spec.job, &kept.value.body);
        let told = self.told.entry(job).or_default().entry(from);
        let told = told.or_insert_with(|| Told {
            attempt,
            at_ms: Some(now.boot_ms),
            ranks: BTreeMap::new(),
            busy_ms: BTreeMap::new(),
            cannot: None,
            lacks_ms: None,
        });
        if told.attempt != attempt {
            told.busy_ms.clear();
        }
        (told.attempt, told.at_ms) = (attempt, Some(now.boot_ms));
        told.ranks.clear();
        // A keeper that does not get the record holds nothing of it.
        let keeps = kept.keepers.iter().any(|(keeper, _)| *keeper == from);
        let since_ms = told.lacks_ms.unwrap_or(now.boot_ms);
        told.lacks_ms = (keeps && seq == 0).then_some(since_ms);
        let lacks = told.lacks_ms.is_some_and(|ms| ms.saturating_add(LACKS_MS) <= now.boot_ms);
        let mut cannot = lacks.then(|| "it does not have the record".to_owned());
        let named = |rank: Rank| body.ranks.iter().any(|record| record.assignment.rank == rank);
        for mut state in states.into_iter().take(COPIES_MAX) {
            if let Some(mut reason) = state.cannot.take() {
                while reason.len() > REASON_BYTES_MAX {
                    reason.pop();
                }
                cannot = Some(reason);
            }
            if named(state.rank) {
                if state.under_way {
                    told.busy_ms.insert(state.rank, now.boot_ms);
                }
                told.ranks.insert(state.rank, state);
            }
        }
        let news = told.cannot.is_some() != cannot.is_some();
        told.cannot = cannot.map(|reason| {
            // Said again, it is not said of a longer time.
            let until_ms = told.cannot.as_ref().map(|cannot| cannot.until_ms);
            let until_ms = until_ms.unwrap_or_else(|| now.after(CANNOT_MS));
            Cannot { reason, until_ms, told: 0, epoch: 0 }
        });
        if news {
            self.dirty.insert(job);
        }
    }

    /// Jobs whose stewards are to be told now what was copied: once all of it was, and after
    /// [`TELL_MS`] what is there. So a gang of a thousand is not told of a thousand times.
    pub(crate) fn told_now(&mut self, now: Now) -> Vec<JobId> {
        let mut due = Vec::new();
        for job in core::mem::take(&mut self.news) {
            let more = self.duties.get(&job).map(|duty| duty.ranks.iter());
            let more = more.is_some_and(|mut ranks| ranks.any(|order| order.end.is_some()));
            if !more || self.overdue.contains(&job) {
                due.push(job);
                continue;
            }
            if self.timers.due(&Timer::Tell(job)).is_none() {
                self.timers.set(Timer::Tell(job), now.after(TELL_MS));
            }
        }
        for job in core::mem::take(&mut self.overdue) {
            if !due.contains(&job) {
                due.push(job);
            }
        }
        for job in &due {
            self.timers.cancel(&Timer::Tell(*job));
        }
        due
    }

    /// The steward counts on none of `without` for the copies of `kept`: they refused, or are
    /// silent.
    pub(crate) fn do_without(&mut self, kept: &Kept, without: &[PeerId], now: Now) {
        let job = kept.spec.job;
        for node in without.iter().take(kept.keepers.len()) {
            let named = kept.keepers.iter().any(|(keeper, _)| keeper == node);
            if !named || *node == self.me || self.has_refused(job, *node) {
                continue;
            }
            let reason = "so the steward says".to_owned();
            let until_ms = now.after(CANNOT_MS);
            let cannot = Some(Cannot { reason, until_ms, told: 0, epoch: 0 });
            let blank = Told {
                attempt: kept.value.body.attempt,
                at_ms: None,
                ranks: BTreeMap::new(),
                busy_ms: BTreeMap::new(),
                cannot: None,
                lacks_ms: None,
            };
            self.told.entry(job).or_default().entry(*node).or_insert(blank).cannot = cannot;
            self.dirty.insert(job);
        }
    }

    /// Whom a steward does not count on for copies: keepers that refused, or are silent since it
    /// waits.
    pub(crate) fn without(&self, kept: &Kept, since_ms: u64, scene: Scene<'_>) -> Vec<PeerId> {
        let (job, attempt) = (kept.spec.job, kept.value.body.attempt);
        let keepers = kept.keepers.iter().map(|(keeper, _)| *keeper);
        let lacks = |node: PeerId| {
            kept.value.body.ranks.iter().any(|record| {
                let rank = record.assignment.rank;
                let complete = self.state_of(node, job, attempt, rank).0;
                !complete && self.is_silent(node, job, rank, since_ms, scene)
            })
        };
        keepers.filter(|node| self.has_refused(job, *node) || lacks(*node)).collect()
    }

    /// Whether `node` has said nothing of a rank for too long to be waited for.
    fn is_silent(
        &self,
        node: PeerId,
        job: JobId,
        rank: Rank,
        since_ms: u64,
        scene: Scene<'_>,
    ) -> bool {
        let heard_ms = since_ms.max(self.busy_since(node, job, rank));
        node != self.me && heard_ms.saturating_add(AWAY_MS) < scene.now.boot_ms
    }

    /// Tell who should know how this node stands to the copies of `kept`: the steward; all
    /// keepers, where something cannot be held here, or can again (`everybody`).
    pub(crate) fn tell(&self, kept: &Kept, everybody: bool, out: &mut Outbox) {
        let (job, body) = (kept.spec.job, &kept.value.body);
        let refuses = everybody || self.cannot.contains_key(&job);
        let ranks = self.states(job, body.attempt);
        let over = body.state() == State::Done;
        let keepers = kept.keepers.iter().map(|(keeper, _)| *keeper);
        let to = keepers.filter(|keeper| refuses || (*keeper == body.steward && !over));
        for to in to {
            let (attempt, seq, ranks) = (body.attempt, kept.value.seq, ranks.clone());
            out.send(self.me, to, Message::Copies { job, attempt, seq, ranks });
        }
    }

    /// The newest copy of a rank's `keep/`, as its node says; whether it was news. The caller
    /// has checked that the rank runs there.
    pub(crate) fn announced(&mut self, id: WorkId, save: SaveOrder) -> bool {
        let announced = self.announced.entry(id.job).or_default();
        let known = announced.get(&id.rank);
        let news = known.is_none_or(|(at, known)| (*at, known.seq) < (id.attempt, save.seq));
        if news {
            announced.insert(id.rank, (id.attempt, save));
            self.dirty.insert(id.job);
        }
        news
    }

    /// The number of the copy of a rank's `keep/` that is here.
    pub(crate) fn saved_here(&self, id: WorkId) -> Option<u64> {
        self.held_of(id.job, id.attempt, id.rank).save.map(|(seq, _)| seq)
    }

    // ---- what processes here wrote ----------------------------------------------------

    /// A process here has a new copy of its `keep/`.
    pub(crate) fn saved(
        &mut self,
        id: WorkId,
        (seq, tree): (u64, BlobId),
        keepers: Vec<PeerId>,
        bidder: &Bidder,
        now: Now,
    ) {
        if self.saves.get(&id).is_some_and(|known| known.seq >= seq) {
            return;
        }
        self.save_held(id, seq, tree);
        if self.saves.len() >= SAVES_MAX && !self.saves.contains_key(&id) {
            // What still runs is worth more than what has ended.
            let mut ended = self.saves.keys().filter(|id| bidder.keepers_of_work(**id).is_none());
            if let Some(old) = ended.next().or(self.saves.keys().next()).copied() {
                self.forget_save(old);
            }
        }
        let (held_by, pause_ms) = (BTreeMap::new(), SAVE_RESEND_MS);
        self.saves.insert(id, OwnSave { seq, tree, keepers, held_by, pause_ms });
        self.timers.set(Timer::Save(id), now.boot_ms);
    }

    /// Whether a copy of `keep/` is to be announced (again).
    #[cfg(test)]
    pub(crate) fn is_save_due(&self, id: WorkId) -> bool {
        self.timers.due(&Timer::Save(id)).is_some()
    }

    fn forget_save(&mut self, id: WorkId) {
        self.saves.remove(&id);
        self.timers.cancel(&Timer::Save(id));
        // So is what is here of a job of which nobody asks any more.
        self.dirty.insert(id.job);
    }

    /// Whether those that acknowledged copies of `keep/` still have them, by what is seen of them:
    /// where too few are left, the copy is announced again. Copies of what `is_over` go.
    pub(crate) fn review_saves(
        &mut self,
        keepers_of: impl Fn(WorkId) -> Option<Vec<PeerId>>,
        is_over: impl Fn(WorkId) -> bool,
        scene: Scene<'_>,
    ) {
        if !core::mem::take(&mut self.look_at_saves) {
            return;
        }
        for id in self.saves.keys().copied().collect::<Vec<_>>() {
            let Some(keepers) = keepers_of(id) else {
                if is_over(id) {
                    self.forget_save(id);
                }
                continue;
            };
            let Some(save) = self.saves.get(&id) else { continue };
            let mut held_by = save.held_by.clone();
            held_by.retain(|node, store| {
                let now = self.store_of(*node, scene);
                let same = store.is_none() || now.is_none() || *store == now;
                same && keepers.contains(node) && self.is_present_within(*node, HERE_MS, scene)
            });
            let Some(save) = self.saves.get_mut(&id) else { continue };
            (save.keepers, save.held_by) = (keepers, held_by);
            if !save.is_held(self.me) && self.timers.due(&Timer::Save(id)).is_none() {
                save.pause_ms = SAVE_RESEND_MS;
                self.timers.set(Timer::Save(id), scene.now.boot_ms);
            }
        }
    }

    fn send_save(&mut self, id: WorkId, bidder: &Bidder, now: Now, out: &mut Outbox) {
        let Some(save) = self.saves.get_mut(&id) else { return };
        // Once the process has ended its last copy counts, which the record names.
        let Some(keepers) = bidder.keepers_of_work(id) else { return };
        save.keepers = keepers;
        if save.is_held(self.me) {
            return;
        }
        let WorkId { job, attempt, rank } = id;
        for keeper in &save.keepers {
            if *keeper != self.me && !save.held_by.contains_key(keeper) {
                let (seq, tree) = (save.seq, save.tree);
                out.send(self.me, *keeper, Message::Save { job, attempt, rank, seq, tree });
            }
        }
        self.timers.set(Timer::Save(id), now.after(save.pause_ms));
        save.pause_ms = (2 * save.pause_ms).min(SAVE_RESEND_MS_MAX);
    }

    /// See [`Message::SaveHeld`].
    pub(crate) fn acknowledged(&mut self, from: PeerId, id: WorkId, seq: u64, scene: Scene<'_>) {
        let store = self.store_of(from, scene);
        let Some(save) = self.saves.get_mut(&id) else { return };
        if seq >= save.seq && save.keepers.contains(&from) {
            save.held_by.insert(from, store);
        }
    }

    /// Whether `asker` keeps the record of a job of which a process here wrote something.
    pub(crate) fn has_save_for(&self, job: JobId, asker: PeerId) -> bool {
        let first = WorkId { job, attempt: Attempt(0), rank: Rank(0) };
        let of_job = self.saves.range(first..).take_while(|(id, _)| id.job == job);
        of_job.into_iter().any(|(_, save)| save.keepers.contains(&asker))
    }

    // ---- for the steward --------------------------------------------------------------

    /// What `node` said last of a rank of the attempt that the record is at.
    fn state_of(
        &self,
        node: PeerId,
        job: JobId,
        attempt: Attempt,
        rank: Rank,
    ) -> (bool, Option<(u64, BlobId)>) {
        if node == self.me {
            let held = self.held_of(job, attempt, rank);
            return (held.complete, held.save);
        }
        let told = self.told.get(&job).and_then(|told| told.get(&node));
        let state = told.filter(|told| told.attempt == attempt).and_then(|t| t.ranks.get(&rank));
        state.map_or((false, None), |state| (state.complete, state.save))
    }

    /// When `node` last said that it copies a rank, on the boot clock.
    fn busy_since(&self, node: PeerId, job: JobId, rank: Rank) -> u64 {
        let told = self.told.get(&job).and_then(|told| told.get(&node));
        told.and_then(|told| told.busy_ms.get(&rank)).copied().unwrap_or(0)
    }

    /// How the results of a rank stand that ended, at a steward that waits for them since
    /// `since_ms`.
    pub(crate) fn standing(
        &self,
        kept: &Kept,
        record: &RankRecord,
        since_ms: u64,
        scene: Scene<'_>,
    ) -> Standing {
        let (job, attempt, rank) = (kept.spec.job, kept.value.body.attempt, record.assignment.rank);
        let should = copies_for(kept.keepers.len());
        let keepers = stores_of(kept, Some(rank), self.me, scene);
        let runner = self.runner(record, scene);
        let (mut all, mut have, mut possible, mut gone_ms) = (0, 0, 0, 0);
        // Whether all are known to have nothing, and there is no disk any more that had it.
        let mut hopeless = runner.is_none();
        for candidate in candidates(runner, &keepers) {
            all += 1;
            let complete =
                runner == Some(candidate) || self.state_of(candidate, job, attempt, rank).0;
            let reachable = self.is_reachable(candidate, scene);
            if complete && reachable {
                have += 1;
            } else if complete {
                hopeless = false;
                gone_ms = gone_ms.max(self.away_since(candidate));
            }
            let silent = !complete && self.is_silent(candidate, job, rank, since_ms, scene);
            let willing = complete || (!self.has_refused(job, candidate) && !silent);
            let present = self.is_present(candidate, scene);
            if present && willing {
                possible += 1;
            }
            let answered = candidate == self.me || self.has_answered(candidate, kept, since_ms);
            // Who is away may have all of it, however long it is away; a node that was put out
            // of the pool brings nothing back.
            if !complete && !answered && scene.roster.state().is_member_node(candidate) {
                hopeless = false;
                let here_ms = self.here.get(&candidate).copied().filter(|_| reachable);
                gone_ms = gone_ms.max(here_ms.unwrap_or_else(|| self.away_since(candidate)));
            }
        }
        if !self.sabotage.holds(Rule::DoneWaitsForCopies) || have >= should.min(possible).max(1) {
            return Standing::Enough { have, should: should.min(all) };
        }
        match have {
            0 if hopeless => Standing::Lost,
            0 => Standing::Gone { since_ms: gone_ms },
            _ => Standing::UnderWay { have, should: should.min(all) },
        }
    }

    /// Whom a steward asks what it holds of the attempt: the keepers and the nodes of the
    /// attempt that can be reached, but not itself.
    fn asked(&self, kept: &Kept, scene: Scene<'_>) -> BTreeSet<PeerId> {
        let keepers = kept.keepers.iter().map(|(keeper, _)| *keeper);
        let nodes = kept.value.body.nodes();
        let all = keepers.chain(nodes).filter(|node| *node != self.me);
        all.filter(|node| scene.board.is_connected(*node)).collect()
    }

    fn has_answered(&self, node: PeerId, kept: &Kept, since_ms: u64) -> bool {
        let told = self.told.get(&kept.spec.job).and_then(|told| told.get(&node));
        told.is_some_and(|told| {
            let lately = told.at_ms.is_some_and(|at_ms| at_ms >= since_ms);
            told.attempt == kept.value.body.attempt && lately
        })
    }

    /// Whether everybody who can be reached has said what they hold, since then.
    pub(crate) fn all_answered(&self, kept: &Kept, since_ms: u64, scene: Scene<'_>) -> bool {
        self.asked(kept, scene).into_iter().all(|node| self.has_answered(node, kept, since_ms))
    }

    /// Whether a keeper that has not answered may have a copy of the `keep/` of a rank of which
    /// nothing else is known: who can be reached, or is away for less than [`AWAY_MS`].
    pub(crate) fn may_have_saves(
        &self,
        kept: &Kept,
        body: &Body,
        since_ms: u64,
        scene: Scene<'_>,
    ) -> bool {
        let mut all = stores_of(kept, None, self.me, scene).into_iter();
        let unheard = all.any(|node| {
            let answered = node == self.me || self.has_answered(node, kept, since_ms);
            !answered && self.is_present(node, scene)
        });
        let unknown = |record: &RankRecord| {
            let end = record.end.as_ref();
            let never = |end: &crate::job::RankEnd| {
                matches!(end.ending, Ending::NeverStarted | Ending::FailedToStart { .. })
            };
            if end.is_some_and(|end| never(end) || end.keep.is_some()) {
                return false;
            }
            self.newest_save(kept, record.assignment.rank, scene).is_none()
        };
        unheard && body.ranks.iter().any(unknown)
    }

    /// Those who have not.
    pub(crate) fn to_ask(&self, kept: &Kept, since_ms: u64, scene: Scene<'_>) -> Vec<PeerId> {
        let asked = self.asked(kept, scene).into_iter();
        asked.filter(|node| !self.has_answered(*node, kept, since_ms)).collect()
    }

    /// Keepers that can be reached and have not all that the ranks left.
    pub(crate) fn incomplete(&self, kept: &Kept, scene: Scene<'_>) -> Vec<PeerId> {
        let (job, body) = (kept.spec.job, &kept.value.body);
        let lacks = |node: &PeerId| {
            body.ranks.iter().any(|record| {
                let wanted = record.end.as_ref().is_some_and(crate::job::RankEnd::has_results);
                let rank = record.assignment.rank;
                wanted
                    && record.assignment.node != *node
                    && !self.state_of(*node, job, body.attempt, rank).0
            })
        };
        let keepers = kept.keepers.iter().map(|(keeper, _)| *keeper);
        let others = keepers.filter(|node| *node != self.me && scene.board.is_connected(*node));
        others.filter(lacks).collect()
    }

    /// The newest copy of a rank's `keep/` of the attempt that the record is at, and who has it,
    /// of those that can be reached.
    pub(crate) fn newest_save(
        &self,
        kept: &Kept,
        rank: Rank,
        scene: Scene<'_>,
    ) -> Option<(PeerId, BlobId)> {
        let (job, body) = (kept.spec.job, &kept.value.body);
        let keepers = kept.keepers.iter().map(|(keeper, _)| *keeper);
        let nodes = body.ranks.iter().filter(|record| record.assignment.rank == rank);
        let nodes = nodes.map(|record| record.assignment.node);
        let mut newest: Option<(u64, PeerId, BlobId)> = None;
        for node in keepers.chain(nodes).filter(|node| self.is_reachable(*node, scene)) {
            let (_, save) = self.state_of(node, job, body.attempt, rank);
            if let Some((seq, tree)) = save
                && newest.is_none_or(|(known, ..)| known < seq)
            {
                newest = Some((seq, node, tree));
            }
        }
        newest.map(|(_, node, tree)| (node, tree))
    }

    /// What the next attempt begins with when this one is given up, its ends being in `body`.
    pub(crate) fn saved_for_next(&self, kept: &Kept, body: &Body, scene: Scene<'_>) -> Vec<Saved> {
        let mut all = Vec::new();
        for record in &body.ranks {
            let (rank, attempt) = (record.assignment.rank, body.attempt);
            let end = record.end.as_ref().and_then(|end| end.keep);
            let end = end.map(|tree| Saved { rank, attempt, node: record.assignment.node, tree });
            let save = self.newest_save(kept, rank, scene);
            let save = save.filter(|_| self.sabotage.holds(Rule::RetryTakesNewestSave));
            let save = save.map(|(node, tree)| Saved { rank, attempt, node, tree });
            let before = body.saved.iter().filter(|saved| saved.rank == rank).copied();
            let mut of_rank: Vec<Saved> = Vec::new();
            for saved in end.into_iter().chain(save).chain(before) {
                let known = of_rank.iter().any(|known| known.tree == saved.tree);
                if !known && of_rank.len() < SAVED_MAX {
                    of_rank.push(saved);
                }
            }
            all.extend(of_rank);
        }
        all
    }

    /// Who said lately that it cannot hold what `job` leaves, and why.
    pub(crate) fn refusal(&self, job: JobId) -> Option<(PeerId, &str)> {
        let own = self.cannot.get(&job).map(|cannot| (self.me, cannot.reason.as_str()));
        own.or_else(|| {
            let mut told = self.told.get(&job)?.iter();
            told.find_map(|(node, told)| Some((*node, told.cannot.as_ref()?.reason.as_str())))
        })
    }

    /// Whether `node` can be reached, has refused, copies, or has everything; of how many ranks.
    pub(crate) fn verdict(
        &self,
        node: PeerId,
        kept: &Kept,
        scene: Scene<'_>,
    ) -> Option<crate::message::Verdict> {
        use crate::message::Verdict;
        let (job, body) = (kept.spec.job, &kept.value.body);
        let told = self.told.get(&job).and_then(|told| told.get(&node));
        let refusal = told.and_then(|told| told.cannot.as_ref());
        let refusal = refusal.or_else(|| self.cannot.get(&job).filter(|_| node == self.me));
        if let Some(cannot) = refusal {
            return Some(Verdict::CannotHold(cannot.reason.clone()));
        }
        if !self.is_reachable(node, scene) {
            return Some(Verdict::Unreachable);
        }
        let has = body.ranks.iter().filter(|record| {
            let rank = record.assignment.rank;
            let wanted = record.end.as_ref().is_some_and(crate::job::RankEnd::has_results);
            let own = record.assignment.node == node;
            wanted && (own || self.state_of(node, job, body.attempt, rank).0)
        });
        let has = u32::try_from(has.count()).unwrap_or(u32::MAX);
        let busy = if node == self.me {
            self.duties.get(&job).map_or(0, |duty| duty.ranks.len())
        } else {
            let ranks = told.map(|told| told.ranks.values().filter(|state| state.under_way));
            ranks.map_or(0, Iterator::count)
        };
        let busy = u32::try_from(busy).unwrap_or(u32::MAX);
        if busy > 0 { Some(Verdict::Copies(busy)) } else { (has > 0).then_some(Verdict::Has(has)) }
    }
}
