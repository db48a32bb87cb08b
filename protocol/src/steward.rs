//! Drives one job each: auction, assignment, gang start, outcome.
//!
//! A drive is level-triggered. Messages only update what was observed; then
//! `Stewards::advance` compares that with the chosen record value and proposes the
//! next value, one at a time. What a bidder may act on is sent after the value that
//! names it is chosen, never before. Whatever is unanswered is sent again, so that a
//! lost message costs time and nothing else.
//!
//! | state     | leaves when                                                             |
//! |-----------|-------------------------------------------------------------------------|
//! | WAITING   | every rank is held and pinned: Assign is chosen → PREPARING             |
//! | PREPARING | every rank is prepared → STARTING; one refused or silent → WAITING      |
//! | STARTING  | every rank runs or ended → RUNNING; one never will → STOPPING           |
//! | RUNNING   | every process ended → CLEANING; one failed, or a stop → STOPPING        |
//! | STOPPING  | every rank ended → CLEANING, and DONE where there is nothing to copy;   |
//! |           | WAITING where the gang never started whole, or the job may be retried   |
//! | CLEANING  | every rank's results are on as many nodes as they should be → DONE      |
//!
//! A steward acts only while its lease lasts ([`crate::record::STEWARD_MS`]): without it, it
//! is silent, and goes on where it was once a quorum of keepers heard of it again. A rank
//! whose node is silent counts as over only when its process surely is: the lease of the
//! process has run out on the slowest clock, counted from the last that was granted.

mod auction;
mod copying;
mod done;
mod drive;
mod keepers;
mod leases;
mod outcome;

use std::{collections::BTreeMap, sync::Arc};

use tracing::{debug, info, warn};

pub use auction::{FINISH_MS, ROUND_MS, ROUNDS_MAX, SETTLE_MS};
pub(crate) use copying::Sight;
#[cfg(test)]
pub(crate) use copying::finished;
pub use done::DONE_AWAY_MS;
pub(crate) use done::DONE_OP;
pub(crate) use drive::Drive;
pub(crate) use keepers::propose;
pub use keepers::{AWAY_MS, KEEPERS_CHECK_MS, survives};
pub use leases::RERUN_MS;

use self::{
    auction::{Auction, Step},
    copying::finish_if_over,
    drive::{Observed, Stage},
    keepers::{WILLING_MS, keepers_for_record},
};
use crate::{
    BootId, HoldId, JobId, Now, PeerId, StoreId, UserId,
    copies::{Copies, Scene},
    inventory::Board,
    job::{
        Attempt, Ending, Outcome, Policy, Rank, RankAssignment, RankEnd, RankRecord, RankState,
        State, StopCause, VerifiedSpec,
    },
    message::{
        Adopt, Bid, CallFate, Commit, Key, Message, PinRefusal, RankReport, Report, Start, WaitView,
    },
    peer::{Event, Outbox, Random},
    record::{self, Body, Registers, STEWARD_RENEW_MS, StartInfo},
    request::Request,
    roster::Roster,
    sabotage::{Rule, Sabotage},
    timer::Timers,
};

/// How often what is unanswered is sent again.
pub const RESEND_MS: u64 = 2_000;
/// How often a commitment is renewed while its node prepares.
pub const RENEW_MS: u64 = 20_000;
/// How often it is looked whether a lease has run out.
pub const LOOK_MS: u64 = 5_000;
/// How often a node is asked how its running ranks stand.
pub const ASK_MS: u64 = 60_000;
/// How long a node may be silent before an assignment is taken back.
pub const SILENT_MS: u64 = 45_000;
/// How long a steward pauses after pins that failed; doubled each time, five times at most.
const PIN_PAUSE_MS: u64 = 50;
/// How long the pins of one assignment may take.
pub const PINNING_MS: u64 = 3_000;
/// Starts that may fail before the job does.
pub const FAILED_STARTS_MAX: u32 = 3;
/// Jobs that are roused for one place, should each give up again.
const ROUSED_MAX: u32 = 16;
/// Farewells to a node that does not answer, before it is left to its own clock.
const WITHDRAWALS_MAX: u32 = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TimerKind {
    Auction,
    Pinning,
    Resend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Job(JobId, TimerKind),
    /// Stewardships are to be renewed.
    Renew,
    /// Keepers may have gone or come.
    Keepers,
}

/// What a steward works with at each call.
pub(crate) struct Context<'a> {
    pub(crate) registers: &'a mut Registers,
    pub(crate) copies: &'a mut Copies,
    pub(crate) board: &'a Board,
    pub(crate) roster: &'a Roster,
    pub(crate) random: &'a mut Random,
    pub(crate) out: &'a mut Outbox,
    pub(crate) now: Now,
}

/// The drives of every job this node is steward of.
#[derive(Debug, Clone)]
pub(crate) struct Stewards {
    me: PeerId,
    boot: BootId,
    sabotage: Sabotage,
    drives: BTreeMap<JobId, Drive>,
    timers: Timers<Timer>,
    ops: u64,
    /// The job roused last: the next place is for the one behind it.
    roused: Option<Key>,
    /// Further jobs to rouse should those roused give up.
    rouses_left: u32,
    /// Times a steward fell silent because its lease had run out.
    fences: u64,
    /// Nodes that said they would keep records: in which store, and when, on the boot clock.
    willing: BTreeMap<PeerId, (StoreId, u64)>,
    /// Nodes that were asked whether they would keep in which store.
    asked: BTreeMap<PeerId, StoreId>,
    /// The job that is over whose keepers were changed last: the next turn is for those behind it.
    done_after: Option<JobId>,
}

impl Stewards {
    pub(crate) fn new(me: PeerId, boot: BootId, sabotage: Sabotage) -> Self {
        Self {
            me,
            boot,
            sabotage,
            drives: BTreeMap::new(),
            timers: Timers::default(),
            ops: 0,
            roused: None,
            rouses_left: 0,
            fences: 0,
            willing: BTreeMap::new(),
            asked: BTreeMap::new(),
            done_after: None,
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<(u64, &'static str)> {
        self.timers.next().map(|(at_ms, timer)| {
            let reason = match timer {
                Timer::Job(_, TimerKind::Auction) => "an auction's turn ends",
                Timer::Job(_, TimerKind::Pinning) => "pins are missing",
                Timer::Job(_, TimerKind::Resend) => "something is unanswered",
                Timer::Renew => "stewardships are to be renewed",
                Timer::Keepers => "keepers may have gone or come",
            };
            (at_ms, reason)
        })
    }

    /// Jobs driven now.
    pub(crate) fn len(&self) -> usize {
        self.drives.len()
    }

    /// Times a steward here fell silent because its lease had run out.
    pub(crate) fn fences(&self) -> u64 {
        self.fences
    }

    /// Follow from what the record of `job` says now: take it up, look again, or let it go.
    pub(crate) fn consider(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(kept) = cx.registers.get(job) else {
            self.resign(job);
            return;
        };
        let body = &kept.value.body;
        if body.steward != self.me {
            self.resign(job);
        } else if !kept.chosen && body.state() != State::Done {
            // Handed over to this node, or from before a restart.
            cx.registers.read(job, cx.now);
        } else if kept.chosen && body.state() != State::Done && !self.drives.contains_key(&job) {
            let mut drive = Drive::new(Arc::clone(&kept.spec), cx.now);
            // Until then the steward of an epoch that was given up may grant leases.
            drive.since_ms = drive.since_ms.max(cx.registers.quiet_until(job));
            self.drives.insert(job, drive);
            if self.timers.due(&Timer::Keepers).is_none() {
                self.timers.set(Timer::Keepers, cx.now.after(KEEPERS_CHECK_MS));
            }
            self.renew_one(job, cx);
            self.notice_lease(job, cx);
        }
    }

    /// The job is another's, or nobody's.
    fn resign(&mut self, job: JobId) {
        if self.drives.remove(&job).is_some() {
            debug!(%job, "no longer its steward");
            for kind in [TimerKind::Auction, TimerKind::Pinning, TimerKind::Resend] {
                self.timers.cancel(&Timer::Job(job, kind));
            }
        }
    }

    /// Whether this node may act as steward of `job` now.
    fn acts(&self, job: JobId, cx: &Context<'_>) -> bool {
        self.may_act(job, cx.registers, cx.now)
    }

    fn may_act(&self, job: JobId, registers: &Registers, now: Now) -> bool {
        let Some(drive) = self.drives.get(&job) else { return false };
        let fenced = self.sabotage.holds(Rule::StewardFences);
        !drive.leaving && (!fenced || registers.lease_until(job, now) > now.boot_ms)
    }

    /// The jobs this node acts for as steward now, each with its term.
    pub(crate) fn acting(&self, registers: &Registers, now: Now) -> Vec<(JobId, u64)> {
        let acting = self.drives.keys().filter(|job| self.may_act(**job, registers, now));
        let term = |job: &JobId| Some((*job, registers.get(*job)?.value.body.term));
        acting.filter_map(term).collect()
    }

    /// Begin or cease to act, as the lease says.
    fn notice_lease(&mut self, job: JobId, cx: &mut Context<'_>) {
        let acts = self.acts(job, cx);
        // Else the keepers change, and nobody lacks anything.
        let chosen = cx.registers.get(job).is_some_and(|kept| kept.chosen);
        let Some(drive) = self.drives.get_mut(&job) else { return };
        let acted = core::mem::replace(&mut drive.acting, acts);
        if acted && !acts && chosen && !drive.leaving {
            self.fences += 1;
            warn!(%job, "no quorum of its keepers heard of this steward: it is silent");
        }
        if acts && !acted {
            match &drive.stage {
                // Whatever was answered meanwhile was not heard: ask anew.
                Stage::Auction(_) => {
                    let auction = Auction::new(&drive.spec).avoiding(&drive.avoided);
                    drive.stage = Stage::Auction(auction);
                }
                Stage::Pinning(_) => self.pinning_failed(job, cx),
                Stage::Assigned => {}
            }
            self.take_stage(job, cx);
            self.advance(job, cx);
        }
    }

    /// A person asks for the job to end.
    pub(crate) fn stop(&mut self, job: JobId, by: UserId, cx: &mut Context<'_>) {
        let ended = cx.registers.get(job).is_some_and(|kept| {
            let body = &kept.value.body;
            !body.ranks.is_empty() && body.all_at_least(RankState::Ended)
        });
        if let Some(drive) = self.drives.get_mut(&job) {
            if ended {
                // Nothing runs any more: what is left to stop is waiting for what nobody who can be
                // reached has. What is being copied is waited for: who cannot go on says so.
                drive.give_up_copies = true;
            }
            drive.observed.stop_asked.get_or_insert(by);
            self.advance(job, cx);
        }
    }

    /// Somebody said what it holds of a job; whether it keeps the record and lacks the latest
    /// value, by which it would know what there is to copy.
    pub(crate) fn copies_heard(&mut self, job: JobId, lags: bool, cx: &mut Context<'_>) {
        let Some(drive) = self.drives.get_mut(&job) else { return };
        let Some(since_ms) = drive.copies_since_ms else { return };
        let due_ms = drive.shown_ms.max(since_ms).saturating_add(RESEND_MS);
        if lags && drive.proposal.is_none() && due_ms <= cx.now.boot_ms && self.acts(job, cx) {
            // What is chosen is accepted once more, by all of them.
            if let Some(drive) = self.drives.get_mut(&job) {
                drive.shown_ms = cx.now.boot_ms;
            }
            cx.registers.read(job, cx.now);
        }
        self.advance(job, cx);
    }

    /// Why a job waits.
    pub(crate) fn why(&self, sight: &Sight<'_>) -> WaitView {
        let (job, state) = (sight.kept.spec.job, sight.kept.value.body.state());
        let Scene { board, now, .. } = sight.scene;
        let mut view =
            WaitView { job, state, summary: String::new(), need: 0, held: 0, nodes: Vec::new() };
        if let Some(drive) = self.drives.get(&job) {
            view.need = drive.spec.spec.rank_count();
            match &drive.stage {
                Stage::Auction(auction) => auction.describe(&mut view, board, now),
                Stage::Pinning(_) | Stage::Assigned => {
                    view.held = view.need;
                    view.summary = drive.describe_assigned(state);
                    if let Some(since_ms) = drive.copies_since_ms {
                        sight.describe(drive, since_ms, &mut view);
                    }
                }
            }
        }
        if view.summary.is_empty() {
            view.summary = format!("the job is {state}");
        }
        view
    }

    // ---- messages from bidders --------------------------------------------------------

    pub(crate) fn handle_bid(&mut self, from: PeerId, bid: Bid, cx: &mut Context<'_>) {
        let job = bid.job;
        let ids: Vec<HoldId> = bid.offers.iter().map(|offer| offer.hold).collect();
        if self.drives.contains_key(&job) && !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else {
            self.give_back(job, from, ids, cx);
            return;
        };
        match &mut drive.stage {
            Stage::Auction(auction) => {
                auction.hear(from, bid, cx.now);
                self.turn(job, cx);
            }
            Stage::Pinning(pinning) => {
                let surplus: Vec<_> = ids.into_iter().filter(|id| !pinning.names(*id)).collect();
                if !surplus.is_empty() {
                    self.give_back(job, from, surplus, cx);
                }
            }
            Stage::Assigned => {
                let body = cx.registers.get(job).map(|kept| &kept.value.body);
                let surplus: Vec<_> = ids
                    .into_iter()
                    .filter(|id| !body.is_some_and(|b| b.assigned_to(from).any(|a| a.hold == *id)))
                    .collect();
                if !surplus.is_empty() {
                    self.give_back(job, from, surplus, cx);
                }
            }
        }
    }

    pub(crate) fn handle_holds_lost(
        &mut self,
        from: PeerId,
        job: JobId,
        holds: &[HoldId],
        higher: Option<JobId>,
        cx: &mut Context<'_>,
    ) {
        if !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else { return };
        match &mut drive.stage {
            Stage::Auction(auction) => {
                auction.lose(from, holds, higher);
                self.turn(job, cx);
            }
            Stage::Pinning(pinning) => {
                if holds.iter().any(|id| pinning.names(*id)) {
                    self.pinning_failed(job, cx);
                }
            }
            Stage::Assigned => {}
        }
    }

    pub(crate) fn handle_pinned(
        &mut self,
        from: PeerId,
        job: JobId,
        holds: &[HoldId],
        cx: &mut Context<'_>,
    ) {
        if !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else { return };
        if let Stage::Pinning(pinning) = &mut drive.stage {
            pinning.pinned(from, holds);
            self.advance(job, cx);
        }
    }

    pub(crate) fn handle_pin_refused(&mut self, refusal: &PinRefusal, cx: &mut Context<'_>) {
        if !self.acts(refusal.job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&refusal.job) else { return };
        if let Stage::Pinning(pinning) = &mut drive.stage
            && refusal.missing.iter().any(|id| pinning.names(*id))
        {
            self.pinning_failed(refusal.job, cx);
        }
    }

    pub(crate) fn handle_committed(
        &mut self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        cx: &mut Context<'_>,
    ) {
        if !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else { return };
        if drive.is_at(attempt, cx.registers) {
            drive.observed.adopted.insert(from);
            drive.observed.committed.insert(from);
            drive.observed.heard.insert(from, cx.now.boot_ms);
        } else if drive.withdrawals.contains_key(&(from, attempt)) {
            // A commit overtook our farewell: say it again.
            self.send_withdrawals(job, cx);
        }
    }

    pub(crate) fn handle_commit_refused(
        &mut self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        reason: String,
        cx: &mut Context<'_>,
    ) {
        if !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else { return };
        drive.withdrawals.remove(&(from, attempt));
        if !drive.is_at(attempt, cx.registers) {
            self.retire_if_over(job, cx);
            return;
        }
        let named = cx.registers.get(job).is_some_and(|k| k.value.body.nodes().contains(&from));
        if !named {
            return;
        }
        drive.observed.heard.insert(from, cx.now.boot_ms);
        let mut reason = reason;
        cut(&mut reason, REASON_BYTES_MAX);
        drive.observed.refused.entry(from).or_insert(reason);
        self.advance(job, cx);
    }

    pub(crate) fn handle_report(&mut self, from: PeerId, report: Report, cx: &mut Context<'_>) {
        let Report { job, attempt, rank, node, store, report } = report;
        let is_end = matches!(report, RankReport::Ended(_));
        let done = |out: &mut Outbox, me| {
            if is_end {
                out.send(me, from, Message::EndRecorded { job, attempt, rank });
            }
        };
        if node != from {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else {
            let known = cx.registers.get(job);
            if known.is_some_and(|k| k.chosen && k.value.body.state() == State::Done) {
                // Nobody waits for this ending any more.
                done(cx.out, self.me);
            } else if is_end {
                self.point_elsewhere(from, job, attempt, cx);
            }
            return;
        };
        if !drive.acting {
            return;
        }
        let at =
            drive.is_at(attempt, cx.registers) || !self.sabotage.holds(Rule::ResultNamesAttempt);
        if !at {
            drive.withdrawals.remove(&(from, attempt));
            done(cx.out, self.me);
            self.retire_if_over(job, cx);
            return;
        }
        let Some(kept) = cx.registers.get(job) else { return };
        let Some(record) = kept.value.body.ranks.iter().find(|r| r.assignment.rank == rank) else {
            return;
        };
        if record.assignment.node != from && self.sabotage.holds(Rule::ResultNamesAttempt) {
            return;
        }
        if record.state == RankState::Ended {
            done(cx.out, self.me);
            let ending = record.end.as_ref().map(|end| &end.ending);
            let lost = matches!(ending, Some(Ending::Lost { .. } | Ending::Silent));
            if !is_end && lost {
                // It was given up for lost, and runs. Any other such report is an old copy.
                let reason = "its rank was given up for lost".to_owned();
                cx.out.send(self.me, from, Message::Stop { job, attempt, reason });
            }
            return;
        }
        if let RankReport::Prepared { clock, .. } = &report {
            drive.observed.clocks.insert(from, *clock);
        }
        drive.observed.heard.insert(from, cx.now.boot_ms);
        if let RankReport::Ended(RankEnd { ending: Ending::FailedToStart { .. }, .. }) = &report {
            drive.observed.failed.insert(from);
        }
        if is_end {
            drive.observed.stores.entry(rank).or_insert(store);
        }
        let ready = matches!(report, RankReport::Prepared { .. });
        drive.observed.hear(rank, report);
        let starting = cx.registers.get(job).map(|k| k.value.body.state()) == Some(State::Starting);
        if ready && starting && drive.proposal.is_none() {
            // It asks for a fresher lease, or was prepared once more.
            self.send_outstanding(job, cx);
        }
        self.advance(job, cx);
    }

    /// A node has room it did not have: jobs that have no call standing there ask again.
    pub(crate) fn room_seen(&mut self, node: PeerId, cx: &mut Context<'_>) {
        for (job, drive) in &mut self.drives {
            if let Stage::Auction(auction) = &mut drive.stage
                && auction.would_ask(node)
            {
                let soon = cx.now.after(cx.random.below(200));
                let timer = Timer::Job(*job, TimerKind::Auction);
                let next = auction.wake_ms.map_or(soon, |at_ms| at_ms.min(soon));
                auction.wake_ms = Some(next);
                self.timers.set(timer, next);
            }
        }
    }

    pub(crate) fn handle_timeout(&mut self, cx: &mut Context<'_>) {
        while let Some(timer) = self.timers.pop_due(cx.now.boot_ms) {
            let (job, kind) = match timer {
                Timer::Job(job, kind) => (job, kind),
                Timer::Renew => {
                    self.renew_all(cx);
                    continue;
                }
                Timer::Keepers => {
                    self.check_keepers(cx);
                    continue;
                }
            };
            self.notice_lease(job, cx);
            if !self.acts(job, cx) {
                continue;
            }
            match kind {
                TimerKind::Auction => {
                    if let Some(Drive { stage: Stage::Auction(auction), .. }) =
                        self.drives.get_mut(&job)
                    {
                        auction.wake_ms = None;
                        auction.time_is_up(cx.now);
                        self.turn(job, cx);
                    }
                }
                TimerKind::Pinning => {
                    if let Some(Drive { stage: Stage::Pinning(_), .. }) = self.drives.get(&job) {
                        self.pinning_failed(job, cx);
                    }
                }
                TimerKind::Resend => self.resend(job, cx),
            }
        }
    }

    // ---- the record -------------------------------------------------------------------

    /// Take the outcomes of proposals, and go on from the values chosen.
    pub(crate) fn settle(&mut self, cx: &mut Context<'_>) {
        while let Some(event) = cx.registers.poll_event() {
            let (job, op, failed) = match event {
                record::Event::Chosen { job, op } => (job, Some(op), false),
                record::Event::Conflict { job, op } => (job, Some(op), true),
                record::Event::Changed { job } => (job, None, false),
            };
            cx.out.events.push_back(Event::RecordChanged { job });
            cx.out.changed.push(job);
            cx.copies.record_changed(job);
            self.consider(job, cx);
            let Some(drive) = self.drives.get_mut(&job) else { continue };
            if op.is_some() && drive.proposal == op {
                drive.proposal = None;
                drive.leaving = false;
            }
            if drive.proposal.is_none() {
                self.notice_lease(job, cx);
                if self.acts(job, cx) {
                    if failed || !self.has_taken(job, cx.registers) {
                        self.take_stage(job, cx);
                    }
                    self.advance(job, cx);
                }
            }
        }
        while let Some(write) = cx.registers.poll_write() {
            cx.out.writes.push_back(write);
        }
        while let Some((to, message)) = cx.registers.poll_send() {
            cx.out.send(self.me, to, message);
        }
    }

    /// Whether the attempt stands as it stood: a value that was only made sure of again must not
    /// put off what is due to be asked.
    fn has_taken(&self, job: JobId, registers: &Registers) -> bool {
        let (Some(drive), Some(kept)) = (self.drives.get(&job), registers.get(job)) else {
            return false;
        };
        let at = (kept.value.epoch, kept.value.seq);
        matches!(drive.stage, Stage::Assigned) && drive.taken == Some(at)
    }

    /// After a value was chosen: what it lets us say, and which stage follows from it.
    fn take_stage(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(kept) = cx.registers.get(job) else { return };
        let (body, at) = (kept.value.body.clone(), (kept.value.epoch, kept.value.seq));
        let Some(drive) = self.drives.get_mut(&job) else { return };
        drive.taken = Some(at);
        if drive.epoch.replace(at.0).is_some_and(|before| before != at.0) {
            // Who runs something is to know who keeps the record now.
            drive.observed.adopted.clear();
        }
        let ended = !body.ranks.is_empty() && body.all_at_least(RankState::Ended);
        if !ended || body.state() == State::Done {
            (drive.copies_since_ms, drive.give_up_copies) = (None, false);
        } else if drive.copies_since_ms.is_none() {
            drive.copies_since_ms = Some(cx.now.boot_ms);
        }
        for rank in body.ranks.iter().filter(|rank| rank.state == RankState::Ended) {
            let acknowledged = drive.acknowledged.insert((body.attempt, rank.assignment.rank));
            if acknowledged {
                let rank_id = rank.assignment.rank;
                let recorded = Message::EndRecorded { job, attempt: body.attempt, rank: rank_id };
                cx.out.send(self.me, rank.assignment.node, recorded);
            }
        }
        let in_auction = matches!(drive.stage, Stage::Auction(_));
        if body.ranks.is_empty() && body.state() != State::Done {
            if !in_auction {
                drive.avoided.extend(&drive.observed.failed);
                drive.avoided.extend(drive.observed.refused.keys());
                let auction = Auction::new(drive.spec.as_ref()).avoiding(&drive.avoided);
                drive.stage = Stage::Auction(auction);
                drive.observed = Observed::keeping_stop(&drive.observed);
            }
        } else if !matches!(drive.stage, Stage::Assigned) && body.state() != State::Done {
            let own = matches!(drive.stage, Stage::Pinning(_)) && body.state() == State::Preparing;
            drive.stage = Stage::Assigned;
            drive.observed = Observed::keeping_stop(&drive.observed);
            drive.pin_failures = 0;
            if own {
                // The commit tells them who drives the job.
                drive.observed.adopted.extend(body.nodes());
            }
            for node in body.nodes() {
                drive.observed.heard.insert(node, cx.now.boot_ms);
            }
            self.timers.cancel(&Timer::Job(job, TimerKind::Auction));
            self.timers.cancel(&Timer::Job(job, TimerKind::Pinning));
        }
        match body.state() {
            State::Done => {
                info!(%job, outcome = body.outcome.as_ref().map(ToString::to_string), "job done");
                self.forget_calls(job, cx);
                self.send_withdrawals(job, cx);
                self.retire_if_over(job, cx);
            }
            State::New | State::Waiting => {
                self.send_withdrawals(job, cx);
                self.turn(job, cx);
            }
            State::Preparing | State::Starting | State::Stopping | State::Cleaning => {
                self.send_outstanding(job, cx);
            }
            State::Running => {
                self.lift_leases(job, cx);
                self.send_outstanding(job, cx);
            }
        }
    }

    /// Propose what follows from the record and what was observed, if anything does.
    fn advance(&mut self, job: JobId, cx: &mut Context<'_>) {
        if !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get(&job) else { return };
        if drive.proposal.is_some() || cx.registers.is_busy(job) {
            return;
        }
        let Some(kept) = cx.registers.get(job).filter(|kept| kept.chosen) else { return };
        let (seq, before) = (kept.value.seq, &kept.value.body);
        let scene = Scene { board: cx.board, roster: cx.roster, now: cx.now };
        let sight = Sight { kept, copies: cx.copies, scene };
        let Some((body, farewell)) = self.next_body(drive, &sight) else {
            return;
        };
        let old_nodes = before.nodes();
        let old_attempt = before.attempt;
        debug!(%job, state = %body.state(), "proposing");
        self.ops += 1;
        let op = self.ops;
        let Some(drive) = self.drives.get_mut(&job) else { return };
        drive.proposal = Some(op);
        if farewell {
            for node in old_nodes {
                drive.withdrawals.insert((node, old_attempt), 0);
            }
        }
        if !self.sabotage.holds(Rule::CommitNeedsCertificate)
            && body.state() == State::Preparing
            && before.state() != State::Preparing
        {
            self.commit_unchosen(job, seq, &body, cx);
            return;
        }
        cx.registers.compare_and_set(job, seq, op, body, cx.now);
    }

    /// The next value, and whether the nodes of the one before are to be told that their
    /// attempt is off.
    fn next_body(&self, drive: &Drive, sight: &Sight<'_>) -> Option<(Body, bool)> {
        let (before, keepers, now) =
            (&sight.kept.value.body, sight.kept.keepers.len(), sight.scene.now);
        let at_ms = now.wall_ms;
        let mut body = before.clone();
        let observed = &drive.observed;
        match before.state() {
            State::New | State::Waiting => {
                if let Some(by) = observed.stop_asked {
                    body.outcome = Some(Outcome::Stopped { by });
                    body.enter(State::Done, at_ms, "stopped before it started");
                    return Some((body, false));
                }
                let Stage::Pinning(pinning) = &drive.stage else { return None };
                let assignments = pinning.complete()?;
                body.attempt = Attempt(before.attempt.0 + 1);
                body.ranks = assignments
                    .into_iter()
                    .map(|assignment| RankRecord {
                        assignment,
                        state: RankState::Assigned,
                        end: None,
                        store: None,
                    })
                    .collect();
                body.start = None;
                body.bound = false;
                let reason = format!("attempt {} assigned", body.attempt);
                body.enter(State::Preparing, at_ms, reason);
                Some((body, false))
            }
            State::Preparing => self.next_of_preparing(drive, body, keepers, now),
            State::Starting => {
                apply_reports(&mut body, observed);
                apply_refusals(&mut body, observed, at_ms);
                self.apply_losses(&mut body, drive, now);
                if let Some(reason) = self.cannot_start(drive, &body, now) {
                    body.stop = Some(StopCause::StartFailed(reason.clone()));
                    body.enter(State::Stopping, at_ms, reason);
                    return Some((finish_if_over(body, drive, sight), false));
                }
                if let Some(by) = observed.stop_asked {
                    body.stop = Some(StopCause::By(by));
                    body.enter(State::Stopping, at_ms, "stopped");
                    return Some((finish_if_over(body, drive, sight), false));
                }
                if body.all_at_least(RankState::Running) {
                    body.failed_starts = 0;
                    body.bound &= drive.spec.spec.policy == Policy::Restart && keepers > 2;
                    body.enter(State::Running, at_ms, "every process started");
                    return Some((running(body, drive, sight), false));
                }
                None
            }
            State::Running => {
                apply_reports(&mut body, observed);
                apply_refusals(&mut body, observed, at_ms);
                self.apply_losses(&mut body, drive, now);
                body.bound &= keepers > 2;
                let body = running(body, drive, sight);
                (body != *before).then_some((body, false))
            }
            State::Stopping | State::Cleaning => {
                apply_reports(&mut body, observed);
                apply_refusals(&mut body, observed, at_ms);
                self.apply_losses(&mut body, drive, now);
                let over = body.all_at_least(RankState::Ended);
                if let Some(by) = observed.stop_asked
                    && ((!over
                        && (matches!(body.stop, None | Some(StopCause::StartFailed(_)))
                            || (matches!(body.stop, Some(StopCause::RankFailed(_)))
                                && body.retried < drive.spec.spec.retries)))
                        || (over && copying::is_to_be_retried(&body, drive)))
                {
                    // Else a steward that restarts would auction the gang once more.
                    body.stop = Some(StopCause::By(by));
                }
                let body = finish_if_over(body, drive, sight);
                (body != *before).then_some((body, false))
            }
            State::Done => None,
        }
    }

    fn next_of_preparing(
        &self,
        drive: &Drive,
        mut body: Body,
        keepers: usize,
        now: Now,
    ) -> Option<(Body, bool)> {
        let at_ms = now.wall_ms;
        let observed = &drive.observed;
        let off = |mut body: Body, reason: String| {
            body.ranks.clear();
            body.enter(State::Waiting, at_ms, reason);
            (body, true)
        };
        if let Some(by) = observed.stop_asked {
            let (mut body, farewell) = off(body, "stopped".to_owned());
            body.outcome = Some(Outcome::Stopped { by });
            body.enter(State::Done, at_ms, "stopped before it started");
            return Some((body, farewell));
        }
        if let Some((node, reason)) = observed.refused.first_key_value() {
            return Some(off(body, format!("node {node} refused: {reason}")));
        }
        if let Some((rank, end)) = observed.ends.first_key_value() {
            let note = end.note.iter().map(|note| format!(": {note}")).collect::<String>();
            let mut reason = format!("rank {rank}: {}{note}", end.ending);
            cut(&mut reason, REASON_BYTES_MAX);
            if end.ending == Ending::NeverStarted {
                return Some(off(body, reason));
            }
            body.failed_starts += 1;
            if body.failed_starts >= FAILED_STARTS_MAX {
                let (mut body, farewell) = off(body, reason.clone());
                body.outcome = Some(Outcome::Failed { code: end.ending.code() });
                body.enter(State::Done, at_ms, reason);
                return Some((body, farewell));
            }
            return Some(off(body, reason));
        }
        if let Some(node) = drive.silent(&body, now) {
            return Some(off(body, format!("node {node} fell silent")));
        }
        let all = body.ranks.iter().all(|r| observed.prepared.contains_key(&r.assignment.rank));
        let gang = self.sabotage.holds(Rule::GangStartsWhole);
        if all || (!gang && !observed.prepared.is_empty()) {
            let host = |r: &RankRecord| {
                observed.prepared.get(&r.assignment.rank).map_or_else(String::new, |p| p.1.clone())
            };
            body.start = Some(StartInfo {
                hosts: body.ranks.iter().map(host).collect(),
                port: observed.prepared.get(&Rank(0)).map_or(0, |prepared| prepared.0),
            });
            for rank in &mut body.ranks {
                rank.state = RankState::Prepared;
            }
            // A neighbour's three-minute reboot must not end a healthy job.
            body.bound = keepers > 2;
            body.enter(State::Starting, at_ms, "every process is prepared");
            return Some((body, false));
        }
        None
    }

    /// Why this start cannot become a whole gang any more.
    fn cannot_start(&self, drive: &Drive, body: &Body, now: Now) -> Option<String> {
        if !self.sabotage.holds(Rule::GangStartsWhole) {
            return None;
        }
        let never = body.ranks.iter().find_map(|rank| match &rank.end {
            Some(RankEnd {
                ending:
                    ending @ (Ending::NeverStarted
                    | Ending::FailedToStart { .. }
                    | Ending::Lost { .. }
                    | Ending::LeaseEnded
                    | Ending::Silent),
                ..
            }) => Some(format!("rank {}: {ending}", rank.assignment.rank)),
            _ => None,
        });
        never.or_else(|| drive.silent(body, now).map(|node| format!("node {node} fell silent")))
    }

    // ---- what is sent -----------------------------------------------------------------

    /// Say what the record lets us say to every node that has not shown it knows.
    fn send_outstanding(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(kept) = cx.registers.get(job) else { return };
        let Some(drive) = self.drives.get(&job) else { return };
        let body = &kept.value.body;
        let attempt = body.attempt;
        let mut next_ms = RESEND_MS;
        let mut granted = Vec::new();
        for node in body.nodes() {
            let ended = body
                .ranks
                .iter()
                .filter(|rank| rank.assignment.node == node)
                .all(|rank| rank.state == RankState::Ended);
            if ended {
                continue;
            }
            if !drive.observed.adopted.contains(&node) {
                cx.out.send(
                    self.me,
                    node,
                    Message::Adopt(Box::new(Adopt {
                        spec: drive.spec.signed.clone(),
                        attempt,
                        certificate: kept.certificate.clone(),
                    })),
                );
                continue;
            }
            let message = match body.state() {
                State::Preparing => {
                    if drive.observed.committed.contains(&node) {
                        next_ms = next_ms.max(RESEND_MS);
                    }
                    Message::Commit(Box::new(Commit {
                        spec: drive.spec.signed.clone(),
                        attempt,
                        certificate: kept.certificate.clone(),
                    }))
                }
                State::Starting => {
                    let Some(start) = &body.start else { continue };
                    match drive.observed.clocks.get(&node).copied() {
                        Some(asked) => {
                            granted.push(node);
                            let ranks = body.ranks.iter();
                            Message::Start(Start {
                                job,
                                attempt,
                                nodes: ranks.map(|rank| rank.assignment.node).collect(),
                                hosts: start.hosts.clone(),
                                port: start.port,
                                asked,
                                binding: body.bound,
                            })
                        }
                        // From before this stewardship.
                        None => Message::Ask { job, attempt },
                    }
                }
                State::Running | State::Cleaning => {
                    next_ms = ASK_MS;
                    // Who asks for a lease has said how it stands.
                    let leased = drive.observed.granted.get(&node);
                    let fresh = |at_ms: &u64| at_ms.saturating_add(ASK_MS) > cx.now.boot_ms;
                    if drive.just_entered || (body.bound && leased.is_some_and(fresh)) {
                        continue;
                    }
                    Message::Ask { job, attempt }
                }
                State::Stopping => {
                    let reason = body.history.last().map_or("", |change| &change.reason);
                    Message::Stop { job, attempt, reason: reason.to_owned() }
                }
                State::New | State::Waiting | State::Done => continue,
            };
            cx.out.send(self.me, node, message);
        }
        let everybody_committed = body.state() == State::Preparing
            && body.nodes().iter().all(|node| drive.observed.committed.contains(node));
        if everybody_committed {
            next_ms = RENEW_MS;
        }
        let adopted = body.nodes().iter().all(|node| drive.observed.adopted.contains(node));
        if drive.copies_since_ms.is_some() {
            next_ms = self.ask_for_copies(job, cx);
        } else if !adopted {
            next_ms = RESEND_MS;
        } else if body.bound {
            // To see in time when a lease has run out.
            next_ms = next_ms.min(LOOK_MS);
        }
        if let Some(drive) = self.drives.get_mut(&job) {
            for node in granted {
                drive.observed.granted.insert(node, cx.now.boot_ms);
            }
        }
        self.timers.set(Timer::Job(job, TimerKind::Resend), cx.now.after(next_ms));
    }

    fn resend(&mut self, job: JobId, cx: &mut Context<'_>) {
        self.advance(job, cx);
        self.settle(cx);
        let Some(drive) = self.drives.get_mut(&job) else { return };
        drive.just_entered = false;
        if matches!(drive.stage, Stage::Assigned) {
            self.send_outstanding(job, cx);
        }
        self.send_withdrawals(job, cx);
        self.retire_if_over(job, cx);
    }

    fn send_withdrawals(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(drive) = self.drives.get_mut(&job) else { return };
        drive.withdrawals.retain(|_, tries| *tries < WITHDRAWALS_MAX);
        for ((node, attempt), tries) in &mut drive.withdrawals {
            *tries += 1;
            let reason = "the attempt is off".to_owned();
            let message = Message::Withdraw { job, attempt: *attempt, reason };
            cx.out.send(self.me, *node, message);
        }
        if !drive.withdrawals.is_empty() {
            self.timers.set(Timer::Job(job, TimerKind::Resend), cx.now.after(RESEND_MS));
        }
    }

    /// A job that is over needs its drive only while farewells are unanswered.
    fn retire_if_over(&mut self, job: JobId, cx: &mut Context<'_>) {
        let over = cx.registers.get(job).is_none_or(|kept| kept.value.body.state() == State::Done);
        let quiet = self.drives.get(&job).is_some_and(|drive| drive.withdrawals.is_empty());
        if over && quiet {
            self.drives.remove(&job);
            for kind in [TimerKind::Auction, TimerKind::Pinning, TimerKind::Resend] {
                self.timers.cancel(&Timer::Job(job, kind));
            }
        }
    }

    fn give_back(&self, job: JobId, to: PeerId, holds: Vec<HoldId>, cx: &mut Context<'_>) {
        let message = Message::Release { job, holds, call: CallFate::Forget };
        cx.out.send(self.me, to, message);
    }

    fn forget_calls(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(drive) = self.drives.get_mut(&job) else { return };
        let (called, picked) = match &mut drive.stage {
            Stage::Auction(auction) => (auction.withdraw(), Vec::new()),
            Stage::Pinning(pinning) => (Vec::new(), pinning.by_node()),
            Stage::Assigned => return,
        };
        for (node, holds) in called.into_iter().chain(picked) {
            let message = Message::Release { job, holds, call: CallFate::Forget };
            cx.out.send(self.me, node, message);
        }
        self.place_freed(cx.now);
    }

    // ---- the auction ------------------------------------------------------------------

    /// Let the auction take its next step.
    fn turn(&mut self, job: JobId, cx: &mut Context<'_>) {
        if !self.acts(job, cx) {
            return;
        }
        let Some(drive) = self.drives.get_mut(&job) else { return };
        if drive.proposal.is_some() || drive.observed.stop_asked.is_some() {
            return;
        }
        let Stage::Auction(auction) = &mut drive.stage else { return };
        let (spec, me) = (Arc::clone(&drive.spec), self.me);
        let mut gave_up = false;
        match auction.step(&spec, cx.board, cx.random, cx.now) {
            Step::Wait => {}
            Step::Call(calls) => {
                for (node, call) in calls {
                    cx.out.send(me, node, Message::Call(call));
                }
            }
            Step::GiveUp { releases } => {
                gave_up = !auction.has_place();
                for (node, holds, call) in releases {
                    cx.out.send(me, node, Message::Release { job, holds, call });
                }
            }
            Step::Pin { pinning, releases } => {
                for (node, holds) in releases {
                    let call = CallFate::Forget;
                    cx.out.send(me, node, Message::Release { job, holds, call });
                }
                for (node, holds) in pinning.by_node() {
                    cx.out.send(me, node, Message::Pin { job, holds });
                }
                drive.stage = Stage::Pinning(pinning);
                self.timers.cancel(&Timer::Job(job, TimerKind::Auction));
                self.timers.set(Timer::Job(job, TimerKind::Pinning), cx.now.after(PINNING_MS));
                self.place_freed(cx.now);
                return;
            }
        }
        match auction.wake_ms {
            Some(at_ms) => self.timers.set(Timer::Job(job, TimerKind::Auction), at_ms),
            None => self.timers.cancel(&Timer::Job(job, TimerKind::Auction)),
        }
        if gave_up {
            self.gave_up(crate::bidder::spec_key(&spec), cx.now);
        }
    }

    /// A job needs its places at bidders no more: one of those that found none asks again,
    /// so that a long queue does not wait for timers.
    fn place_freed(&mut self, now: Now) {
        self.rouses_left = ROUSED_MAX;
        if !self.rouse_next(now) {
            // Behind the last comes the highest.
            self.roused = None;
            self.rouse_next(now);
        }
    }

    /// A job gave up. Had it been roused, the place is for the next: a job that cannot
    /// use any place now keeps none from those behind it.
    fn gave_up(&mut self, key: Key, now: Now) {
        if self.roused == Some(key) {
            self.rouse_next(now);
        }
    }

    /// Have the highest job that was left out, of those behind the one roused last, ask
    /// again; whether there was one.
    fn rouse_next(&mut self, now: Now) -> bool {
        let left_out = self.drives.iter_mut().filter_map(|(job, drive)| match &mut drive.stage {
            Stage::Auction(auction) if auction.is_left_out(now) => {
                Some((crate::bidder::spec_key(&drive.spec), *job, auction))
            }
            Stage::Auction(_) | Stage::Pinning(_) | Stage::Assigned => None,
        });
        let behind = left_out.filter(|(key, ..)| Some(*key) > self.roused);
        let next = behind.min_by_key(|(key, ..)| *key);
        let Some((key, job, auction)) = next.filter(|_| self.rouses_left > 0) else {
            return false;
        };
        auction.wake_ms = Some(now.boot_ms);
        self.timers.set(Timer::Job(job, TimerKind::Auction), now.boot_ms);
        self.rouses_left -= 1;
        self.roused = Some(key);
        true
    }

    /// Give everything back and ask again after a moment.
    fn pinning_failed(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(drive) = self.drives.get_mut(&job) else { return };
        if drive.proposal.is_some() {
            return;
        }
        let Stage::Pinning(pinning) = &drive.stage else { return };
        // What is on its way must have arrived before the next call, and until then nobody
        // shall bid by itself: an offer made before is not known from one made after.
        drive.pin_failures = drive.pin_failures.saturating_add(1);
        let most_ms = PIN_PAUSE_MS << drive.pin_failures.min(5);
        let pause_ms = most_ms / 2 + cx.random.below(most_ms / 2);
        for (node, holds) in pinning.by_node() {
            let call = CallFate::Rest { ms: pause_ms + PIN_PAUSE_MS };
            cx.out.send(self.me, node, Message::Release { job, holds, call });
        }
        let mut auction = Auction::new(drive.spec.as_ref()).avoiding(&drive.avoided);
        let at_ms = cx.now.after(pause_ms);
        auction.wake_ms = Some(at_ms);
        auction.resting = true;
        drive.stage = Stage::Auction(auction);
        self.timers.cancel(&Timer::Job(job, TimerKind::Pinning));
        self.timers.set(Timer::Job(job, TimerKind::Auction), at_ms);
    }

    /// With the certificate rule removed: tell bidders of a value nobody chose.
    fn commit_unchosen(&self, job: JobId, seq: u64, body: &Body, cx: &mut Context<'_>) {
        let Some(kept) = cx.registers.get(job) else { return };
        let mut value = kept.value.successor(body.clone());
        value.seq = seq + 1;
        let certificate = record::Certificate {
            links: Vec::new(),
            value_bytes: crate::wire::encode(&value),
            receipts: Vec::new(),
        };
        for node in body.nodes() {
            let commit = Commit {
                spec: kept.spec.signed.clone(),
                attempt: body.attempt,
                certificate: certificate.clone(),
            };
            cx.out.send(self.me, node, Message::Commit(Box::new(commit)));
        }
    }
}

/// What would be asked of whom, were `request` submitted now.
pub(crate) fn dry_run(
    me: PeerId,
    request: &Request,
    board: &Board,
    now: Now,
) -> Vec<(PeerId, u32)> {
    auction::dry_run(me, request, board, now)
}

/// What becomes of a job that is being prepared, of which rank 0 ends so.
#[cfg(test)]
pub(crate) fn after_preparing(kept: &crate::record::Kept, end: RankEnd, now: Now) -> Option<Body> {
    let stewards = Stewards::new(kept.value.body.steward, BootId([1; 16]), Sabotage::default());
    let mut drive = Drive::new(Arc::clone(&kept.spec), now);
    drive.observed.ends.insert(Rank(0), end);
    let (body, keepers) = (kept.value.body.clone(), kept.keepers.len());
    stewards.next_of_preparing(&drive, body, keepers, now).map(|(body, _)| body)
}

/// Move ranks on as their nodes reported.
fn apply_reports(body: &mut Body, observed: &Observed) {
    for rank in &mut body.ranks {
        let id = rank.assignment.rank;
        if observed.running.contains(&id) && rank.state < RankState::Running {
            rank.state = RankState::Running;
        }
        if let Some(end) = observed.ends.get(&id)
            && rank.state != RankState::Ended
        {
            rank.state = RankState::Ended;
            rank.end = Some(end.clone());
            rank.store = observed.stores.get(&id).copied();
        }
    }
    let texts = ENDS_BYTES_MAX / body.ranks.len().max(1);
    for end in body.ranks.iter_mut().filter_map(|rank| rank.end.as_mut()) {
        shorten(&mut end.result, texts / 2);
        shorten(&mut end.note, texts / 4);
        if let Ending::FailedToStart { reason } | Ending::Lost { reason } = &mut end.ending {
            cut(reason, texts / 4);
        }
    }
}

/// The longest reason of another node's that enters a record.
const REASON_BYTES_MAX: usize = 512;

/// What the ranks' own words may take of a record, which must fit into one message.
const ENDS_BYTES_MAX: usize = 256 << 10;

fn shorten(text: &mut Option<String>, bytes_max: usize) {
    if let Some(text) = text {
        cut(text, bytes_max);
    }
}

fn cut(text: &mut String, bytes_max: usize) {
    let mut end = bytes_max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// A node that knows nothing of an attempt has buried it: what ran there is lost, and
/// what had not started never will.
fn apply_refusals(body: &mut Body, observed: &Observed, at_ms: u64) {
    for rank in &mut body.ranks {
        let Some(reason) = observed.refused.get(&rank.assignment.node) else { continue };
        if rank.state == RankState::Ended {
            continue;
        }
        let ending = if rank.state == RankState::Running {
            Ending::Lost { reason: reason.clone() }
        } else {
            Ending::NeverStarted
        };
        rank.state = RankState::Ended;
        rank.end = Some(RankEnd::bare(ending, at_ms));
    }
}

/// RUNNING and what follows from it.
fn running(mut body: Body, drive: &Drive, sight: &Sight<'_>) -> Body {
    let (observed, at_ms) = (&drive.observed, sight.scene.now.wall_ms);
    let over = body.all_at_least(RankState::Ended);
    let failed = body
        .ranks
        .iter()
        .find(|rank| rank.end.as_ref().is_some_and(|end| !end.ending.is_success()));
    let failed = failed.map(|rank| {
        let is_late = rank.end.as_ref().is_some_and(|end| end.ending == Ending::TimedOut);
        (rank.assignment.rank, if is_late { "reached the time limit" } else { "failed" })
    });
    if !over && let Some((rank, how)) = failed {
        body.stop = Some(StopCause::RankFailed(rank));
        body.enter(State::Stopping, at_ms, format!("rank {rank} {how}"));
        return body;
    }
    if !over && let Some(by) = observed.stop_asked {
        body.stop = Some(StopCause::By(by));
        body.enter(State::Stopping, at_ms, "stopped");
        return body;
    }
    let all_exited = body.ranks.iter().all(|rank| {
        rank.state == RankState::Ended || observed.cleaning.contains(&rank.assignment.rank)
    });
    if all_exited {
        body.enter(State::Cleaning, at_ms, "every process ended");
    }
    finish_if_over(body, drive, sight)
}

/// Ranks numbered in request order, each with the pick made for it.
pub(crate) fn number_ranks(spec: &VerifiedSpec, picks: Vec<auction::Pick>) -> Vec<RankAssignment> {
    let mut by_group: BTreeMap<u32, Vec<auction::Pick>> = BTreeMap::new();
    for pick in picks {
        by_group.entry(pick.group).or_default().push(pick);
    }
    for picks in by_group.values_mut() {
        // Ranks of one node next to each other, as frameworks expect.
        picks.sort_by_key(|pick| (pick.node, pick.hold));
        picks.reverse();
    }
    let mut assignments = Vec::new();
    for (rank, (group, process)) in (0_u32..).zip(spec.spec.ranks()) {
        let Some(pick) = by_group.get_mut(&group).and_then(Vec::pop) else { continue };
        assignments.push(RankAssignment {
            rank: Rank(rank),
            group,
            process,
            node: pick.node,
            hold: pick.hold,
            grant: pick.grant,
        });
    }
    assignments
}
