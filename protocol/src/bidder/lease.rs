//! Leases of processes, as the node that runs them sees them; and whose they are.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{debug, info};

use super::{Bidder, LEASE_MS, LEASE_RENEW_MS, Phase, TOMBSTONES_MAX, Timer, WorkId};
use crate::{
    JobId, Now, PeerId,
    job::{Attempt, Rank, RankState, State},
    message::{Adopt, ClockReading, LeaseAsk, LeaseGrant, Message, RENEWALS_MAX, Start},
    peer::{Event, Outbox, Slot},
    record::{Keeper, Value},
    sabotage::Rule,
};

/// How soon a lease is asked for again where nobody answered: at first, and when others were
/// asked, too. One question that is lost must not make a cut of 150 s outlast the lease.
const RETRY_SOON_MS: u64 = 4_000;
/// See above.
const RETRY_MS: u64 = 10_000;

/// Most nodes that this one remembers to have been sent to, with the jobs they were asked about.
const POINTED_MAX: usize = 4_096;

/// Most jobs whose keepers are remembered from heads.
const HINTS_MAX: usize = 4_096;

/// Permission for one process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    /// When its supervisor ends it, on the boot clock, as it was last told; the outer `None`:
    /// not known since the daemon started.
    until_ms: Option<Option<u64>>,
    /// When that was asked for which a steward last said that it may run on, on the boot clock.
    answered_ms: u64,
}

impl Lease {
    pub(super) fn granted(until_ms: Option<u64>, now: Now) -> Self {
        let asked_ms = until_ms.map_or(now.boot_ms, |until_ms| until_ms.saturating_sub(LEASE_MS));
        Self { until_ms: Some(until_ms), answered_ms: asked_ms }
    }

    /// When it is to be renewed, on the boot clock.
    pub(super) const fn renew_ms(self) -> u64 {
        self.answered_ms.saturating_add(LEASE_RENEW_MS)
    }
}

/// What a certificate proves.
pub(crate) struct Proven<'a> {
    /// The record's value.
    pub(crate) value: &'a Value,
    /// Who keeps the record.
    pub(crate) keepers: &'a [Keeper],
}

impl Bidder {
    pub(super) fn clock(&self, now: Now) -> ClockReading {
        ClockReading { boot: self.boot, boot_ms: now.boot_ms }
    }

    /// The lease that comes with a start: it counts from when this node said that it is
    /// prepared. `Some(None)` does not end; `None` is too short to begin with.
    pub(super) fn first_lease(&self, start: &Start, now: Now) -> Option<Option<u64>> {
        if !start.binding || !self.sabotage.holds(Rule::LeaseBinds) {
            return Some(None);
        }
        let until_ms = start.asked.boot_ms.saturating_add(LEASE_MS);
        let fresh = start.asked.boot == self.boot && until_ms >= now.after(LEASE_MS / 2);
        fresh.then_some(Some(until_ms))
    }

    /// Ask stewards to let every process here run on; where one does not answer, its job's
    /// keepers may know another.
    pub(super) fn ask_leases(&mut self, now: Now, out: &mut Outbox) {
        /// Since the last lease was asked for: when it may be renewed, and when somebody else
        /// than the steward is asked.
        const SOON_MS: u64 = LEASE_RENEW_MS / 2;
        const SILENT_MS: u64 = LEASE_RENEW_MS + 2 * RETRY_SOON_MS - 1_000;
        self.drop_hints();
        let mut asks: BTreeMap<PeerId, Vec<LeaseAsk>> = BTreeMap::new();
        let mut next_ms = None;
        for (id, work) in &self.book.work {
            if matches!(work.phase, Phase::Committed { .. }) {
                continue;
            }
            let answered_ms = self.leases.get(id).map_or(0, |lease| lease.answered_ms);
            let silent_ms = now.boot_ms.saturating_sub(answered_ms);
            // What is due soon is asked for with what is due now.
            let pause_ms = match silent_ms {
                0..SOON_MS => LEASE_RENEW_MS - silent_ms,
                SOON_MS..SILENT_MS => RETRY_SOON_MS,
                _ => RETRY_MS,
            };
            next_ms = Some(next_ms.map_or(pause_ms, |next_ms: u64| next_ms.min(pause_ms)));
            if silent_ms < SOON_MS {
                continue;
            }
            let ask = LeaseAsk { job: id.job, attempt: id.attempt, term: work.term };
            let mut to = vec![work.steward];
            if silent_ms >= SILENT_MS {
                to.extend(self.with_hints(id.job, work.keepers()));
            }
            to.sort_unstable();
            to.dedup();
            for steward in to {
                let asks = asks.entry(steward).or_default();
                if !asks.contains(&ask) {
                    asks.push(ask);
                }
            }
        }
        for (steward, entries) in asks {
            for entries in entries.chunks(RENEWALS_MAX) {
                let ask = Message::AskLease { clock: self.clock(now), entries: entries.to_vec() };
                out.send(self.me, steward, ask);
            }
        }
        match next_ms {
            Some(next_ms) => self.timers.set(Timer::Lease, now.after(next_ms)),
            None => self.timers.cancel(&Timer::Lease),
        }
    }

    /// See [`Message::Lease`].
    pub(crate) fn handle_lease(
        &mut self,
        from: PeerId,
        asked: ClockReading,
        entries: &[LeaseGrant],
        now: Now,
        out: &mut Outbox,
    ) {
        if asked.boot != self.boot || asked.boot_ms > now.boot_ms {
            return;
        }
        for grant in entries.iter().take(RENEWALS_MAX) {
            for id in self.work_of(grant.job, grant.attempt) {
                let work = &self.book.work[&id];
                if work.steward != from || matches!(work.phase, Phase::Committed { .. }) {
                    continue;
                }
                let binding = grant.binding && self.sabotage.holds(Rule::LeaseBinds);
                let until_ms = binding.then(|| asked.boot_ms.saturating_add(LEASE_MS));
                let lease =
                    self.leases.entry(id).or_insert(Lease { until_ms: None, answered_ms: 0 });
                lease.answered_ms = lease.answered_ms.max(asked.boot_ms);
                let news = match (lease.until_ms, until_ms) {
                    // It never binds again: this is an answer from before.
                    (Some(None), _) => false,
                    (Some(Some(known)), Some(until_ms)) => until_ms > known,
                    (known, until_ms) => known != Some(until_ms),
                };
                if news {
                    lease.until_ms = Some(until_ms);
                    out.events.push_back(Event::Lease { id, until_ms });
                }
            }
        }
    }

    /// The head of a job says who keeps it. Anybody may have signed it: they are asked beside
    /// those that are known, and no more is believed of it.
    pub(crate) fn hint(&mut self, job: JobId, keepers: &[PeerId]) {
        let concerned =
            !self.works_of_job(job).is_empty() || self.ends.keys().any(|id| id.job == job);
        if concerned && (self.hints.len() < HINTS_MAX || self.hints.contains_key(&job)) {
            self.hints.insert(job, keepers.to_vec());
        }
    }

    pub(super) fn with_hints(&self, job: JobId, mut keepers: Vec<PeerId>) -> Vec<PeerId> {
        keepers.extend(self.hints.get(&job).into_iter().flatten());
        keepers.sort_unstable();
        keepers.dedup();
        keepers
    }

    /// What is hinted of jobs of which nothing is here any more is of no use.
    fn drop_hints(&mut self) {
        let works: BTreeSet<JobId> = self.book.work.keys().map(|id| id.job).collect();
        let ends: BTreeSet<JobId> = self.ends.keys().map(|id| id.job).collect();
        self.hints.retain(|job, _| works.contains(job) || ends.contains(job));
    }

    /// A keeper says who drives a job: ask there. Two that name each other must not be asked in
    /// turns without a pause, and nobody but those that were asked sends this node anywhere.
    pub(crate) fn handle_elsewhere(
        &mut self,
        from: PeerId,
        job: JobId,
        steward: PeerId,
        now: Now,
        out: &mut Outbox,
    ) {
        let names = |keepers: &[PeerId]| keepers.contains(&from);
        let hinted = self.hints.get(&job).is_some_and(|hints| names(hints));
        let known = self.works_of_job(job).iter().any(|id| {
            let work = &self.book.work[id];
            work.steward == from || names(&work.keepers())
        }) || self
            .ends
            .iter()
            .any(|(id, end)| id.job == job && (end.steward == from || names(&end.keepers)))
            || hinted
            || self.pointed.contains_key(&(job, from));
        let soon_ms = now.boot_ms.saturating_sub(RETRY_SOON_MS);
        if !known || self.pointed.get(&(job, steward)).is_some_and(|at_ms| *at_ms > soon_ms) {
            return;
        }
        let works = self.works_of_job(job).into_iter().filter_map(|id| {
            let work = &self.book.work[&id];
            let waits = matches!(work.phase, Phase::Committed { .. });
            (!waits && work.steward != steward).then_some((id, work.term))
        });
        let ends = self.ends.iter().filter(|(id, end)| id.job == job && end.steward != steward);
        let ends = ends.map(|(id, end)| (*id, end.term));
        let asks: Vec<LeaseAsk> = works
            .chain(ends)
            .map(|(id, term)| LeaseAsk { job, attempt: id.attempt, term })
            .take(1)
            .collect();
        if !asks.is_empty() {
            if self.pointed.len() >= POINTED_MAX {
                self.pointed.retain(|_, at_ms| *at_ms > soon_ms);
            }
            if self.pointed.len() >= POINTED_MAX {
                return;
            }
            self.pointed.insert((job, steward), now.boot_ms);
            let ask = Message::AskLease { clock: self.clock(now), entries: asks };
            out.send(self.me, steward, ask);
        }
    }

    pub(super) fn works_of_job(&self, job: JobId) -> Vec<WorkId> {
        let of = |attempt, rank| WorkId { job, attempt: Attempt(attempt), rank: Rank(rank) };
        let range = of(0, 0)..=of(u32::MAX, u32::MAX);
        self.book.work.range(range).map(|(id, _)| *id).collect()
    }

    // ---- stewardships -----------------------------------------------------------------

    pub(super) fn known_term(&self, job: JobId) -> u64 {
        self.known_terms.get(&job).map_or(1, |(term, _)| *term)
    }

    /// Remember the latest stewardship of a job that changed its steward.
    pub(super) fn learn_term(&mut self, job: JobId, term: u64, now: Now, out: &mut Outbox) {
        if term <= self.known_term(job) {
            return;
        }
        if self.known_terms.len() >= TOMBSTONES_MAX && !self.known_terms.contains_key(&job) {
            let mut ages: Vec<u64> = self.known_terms.values().map(|(_, at_ms)| *at_ms).collect();
            ages.sort_unstable();
            let middle = ages[ages.len() / 2];
            self.known_terms.retain(|job, (_, at_ms)| {
                let keep = *at_ms > middle;
                if !keep {
                    out.remove(&Slot::Term(*job));
                }
                keep
            });
        }
        self.known_terms.insert(job, (term, now.wall_ms));
        out.put(&Slot::Term(job), &(term, now.wall_ms));
    }

    /// A steward shows that it drives a job: what is here of it is its from now on.
    pub(crate) fn handle_adopt(
        &mut self,
        from: PeerId,
        adopt: &Adopt,
        proven: &Proven<'_>,
        now: Now,
        out: &mut Outbox,
    ) {
        let Proven { value, keepers } = proven;
        let (job, body) = (value.job, &value.body);
        let over = body.state() == State::Done;
        let keeper = keepers.iter().any(|(keeper, _)| *keeper == from);
        let entitled = body.steward == from || (over && keeper);
        if !entitled || body.term < self.known_term(job) {
            debug!(%job, %from, term = body.term, "not this job's steward");
            return;
        }
        self.learn_term(job, body.term, now, out);
        let mut news = false;
        for id in self.works_of_job(job) {
            let Some(work) = self.book.work.get_mut(&id) else { continue };
            let before = core::mem::replace(&mut work.steward, from);
            if before != from || work.term != body.term {
                work.term = body.term;
                news = true;
                out.put(&id.slot(), work);
                info!(%job, term = body.term, "another node drives the job now");
            }
            if before != from && self.is_buried(before, job, id.attempt) {
                self.bury(from, job, id.attempt, now, out);
            }
            let wanted = !over
                && id.attempt == body.attempt
                && body.ranks.iter().any(|rank| {
                    rank.assignment.rank == id.rank
                        && rank.assignment.node == self.me
                        && rank.state != RankState::Ended
                });
            // An old copy of what was so says nothing of a later attempt.
            if wanted
                && let Some(work) = self.book.work.get_mut(&id)
                && work.certificate.links.len() < adopt.certificate.links.len()
            {
                // Others keep the record by now, and are told what is to be copied.
                work.certificate = adopt.certificate.clone();
                out.put(&id.slot(), work);
            }
            if !wanted && id.attempt <= body.attempt {
                let reason = "its steward says that the attempt is over";
                self.stop_or_bury(from, job, id.attempt, reason, now, out);
            }
        }
        for (id, unreported) in &mut self.ends {
            if id.job == job && (unreported.steward != from || unreported.term != body.term) {
                (unreported.steward, unreported.term) = (from, body.term);
                unreported.keepers = keepers.iter().map(|(keeper, _)| *keeper).collect();
                out.put(&id.end_slot(), unreported);
            }
        }
        let adopted = Message::Adopted { job, attempt: adopt.attempt, term: body.term };
        out.send(self.me, from, adopted);
        if body
            .ranks
            .iter()
            .any(|rank| rank.assignment.node == self.me && rank.state != RankState::Ended)
        {
            self.handle_ask(from, job, body.attempt, now, out);
        } else {
            self.resend_all_ends(job, now, out);
        }
        // Its renewal is due at once: the new steward counts from what it gives. Who tells of
        // the job's end gives none, and would answer with the same again, at once.
        let works = self.works_of_job(job);
        if news && !over && !works.is_empty() {
            for id in works {
                self.leases.entry(id).and_modify(|lease| lease.answered_ms = 0);
            }
            self.timers.set(Timer::Lease, now.boot_ms);
        }
    }

    fn resend_all_ends(&mut self, job: JobId, now: Now, out: &mut Outbox) {
        let ids: Vec<WorkId> = self.ends.keys().filter(|id| id.job == job).copied().collect();
        for id in ids {
            self.send_end(id, now, out);
        }
    }
}
