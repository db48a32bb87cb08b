//! Leases: a steward's own, and those it gives to processes.

use std::collections::BTreeMap;

use tracing::debug;

use super::{Context, Drive, STEWARD_RENEW_MS, Stewards, Timer};
use crate::{
    JobId, Now, PeerId,
    bidder::{LEASE_GRACE_MS, LEASE_MS},
    job::{Attempt, Ending, RankEnd, RankState, State},
    message::{Adopt, ClockReading, LeaseAsk, LeaseGrant, Message, RENEWALS_MAX, Renewal},
    record::{Body, CLOCK_MARGIN},
    sabotage::Rule,
};

/// After the last lease that may have been given to a node, when none of its processes runs
/// any more: the lease and the time to end them, by the slowest clock.
pub const RERUN_MS: u64 = (LEASE_MS + LEASE_GRACE_MS) + (LEASE_MS + LEASE_GRACE_MS) / CLOCK_MARGIN;

/// Whether `node` may have had a rank of `attempt`: the nodes of the record's own attempt are known,
/// those of others are not. What shows who drives a job names the job and its trees, which are
/// not everybody's to know.
fn may_have_run(body: &Body, attempt: Attempt, node: PeerId) -> bool {
    let unknown = attempt != body.attempt || body.ranks.is_empty();
    attempt > Attempt(0) && (unknown || body.assigned_to(node).next().is_some())
}

/// How soon a renewal that no quorum heard is repeated.
const RETRY_MS: u64 = 2_000;

impl Stewards {
    // ---- its own ----------------------------------------------------------------------

    fn clock(&self, now: Now) -> ClockReading {
        ClockReading { boot: self.boot, boot_ms: now.boot_ms }
    }

    /// Tell the keepers of every job driven here that its steward is there.
    pub(super) fn renew_all(&mut self, cx: &mut Context<'_>) {
        let mut by_keeper: BTreeMap<PeerId, Vec<Renewal>> = BTreeMap::new();
        let jobs: Vec<JobId> = self.drives.keys().copied().collect();
        let mut next_ms = STEWARD_RENEW_MS;
        let fresh_ms = cx.now.boot_ms.saturating_sub(STEWARD_RENEW_MS / 10);
        for job in jobs {
            self.notice_lease(job, cx);
            let acts = self.acts(job, cx);
            let Some(kept) = cx.registers.get(job) else { continue };
            if kept.keepers.len() == 1 {
                continue;
            }
            if !acts {
                next_ms = RETRY_MS;
            }
            let Some(renewal) = cx.registers.renewal(job) else {
                // Unless something is under way, somebody else has proposed.
                cx.registers.read(job, cx.now);
                continue;
            };
            let acks = cx.registers.acks(job);
            for (keeper, store) in &kept.keepers {
                // What it accepted told it as much.
                let heard_ms = acks.and_then(|acks| acks.get(store)).copied().unwrap_or(0);
                if heard_ms < fresh_ms || !acts {
                    by_keeper.entry(*keeper).or_default().push(renewal);
                }
            }
        }
        for (keeper, entries) in by_keeper {
            for entries in entries.chunks(RENEWALS_MAX) {
                let renew = Message::Renew { clock: self.clock(cx.now), entries: entries.to_vec() };
                cx.out.send(self.me, keeper, renew);
            }
        }
        if !self.drives.is_empty() {
            self.timers.set(Timer::Renew, cx.now.after(next_ms));
        }
    }

    /// The same for one job, at once.
    pub(super) fn renew_one(&mut self, job: JobId, cx: &mut Context<'_>) {
        if self.timers.due(&Timer::Renew).is_none() {
            self.timers.set(Timer::Renew, cx.now.after(RETRY_MS));
        }
        let Some(kept) = cx.registers.get(job) else { return };
        let Some(renewal) = cx.registers.renewal(job) else { return };
        if kept.keepers.len() > 1 {
            for (keeper, _) in &kept.keepers {
                let renew = Message::Renew { clock: self.clock(cx.now), entries: vec![renewal] };
                cx.out.send(self.me, *keeper, renew);
            }
        }
    }

    /// See [`Message::Renewed`].
    pub(crate) fn handle_renewed(
        &mut self,
        from: PeerId,
        asked: ClockReading,
        kept: &[JobId],
        refused: &[JobId],
        cx: &mut Context<'_>,
    ) {
        if asked.boot != self.boot {
            return;
        }
        for job in kept {
            cx.registers.renewed(from, *job, asked.boot_ms);
            self.notice_lease(*job, cx);
        }
        for job in refused {
            if self.drives.contains_key(job) && cx.registers.is_keeper(*job, from) {
                cx.registers.read(*job, cx.now);
            }
        }
    }

    /// Nothing measured by the clock counts any more.
    pub(crate) fn clock_jumped(&mut self, cx: &mut Context<'_>) {
        for drive in self.drives.values_mut() {
            drive.since_ms = cx.now.boot_ms;
            for at_ms in drive.observed.granted.values_mut() {
                *at_ms = cx.now.boot_ms;
            }
        }
        for job in self.drives.keys().copied().collect::<Vec<_>>() {
            self.notice_lease(job, cx);
        }
        self.renew_all(cx);
    }

    // ---- its processes' ---------------------------------------------------------------

    /// See [`Message::AskLease`].
    pub(crate) fn handle_ask_lease(
        &mut self,
        from: PeerId,
        asked: ClockReading,
        entries: &[LeaseAsk],
        cx: &mut Context<'_>,
    ) {
        let mut grants = Vec::new();
        for ask in entries.iter().take(RENEWALS_MAX) {
            let LeaseAsk { job, attempt, term } = *ask;
            if !self.acts(job, cx) {
                self.point_elsewhere(from, job, attempt, cx);
                continue;
            }
            let Some(kept) = cx.registers.get(job) else { continue };
            let body = &kept.value.body;
            let named = body.attempt == attempt
                && body
                    .ranks
                    .iter()
                    .any(|rank| rank.assignment.node == from && rank.state != RankState::Ended);
            let Some(drive) = self.drives.get_mut(&job) else { continue };
            if term < body.term && may_have_run(body, attempt, from) {
                // It has not heard of this steward: first it must.
                drive.observed.adopted.remove(&from);
                let adopt = Adopt {
                    spec: drive.spec.signed.clone(),
                    attempt: body.attempt,
                    certificate: kept.certificate.clone(),
                };
                cx.out.send(self.me, from, Message::Adopt(Box::new(adopt)));
                continue;
            }
            if !named {
                let reason = "the attempt is over".to_owned();
                cx.out.send(self.me, from, Message::Stop { job, attempt, reason });
                continue;
            }
            let leased = matches!(
                body.state(),
                State::Starting | State::Running | State::Stopping | State::Cleaning
            );
            if leased {
                drive.observed.granted.insert(from, cx.now.boot_ms);
                drive.observed.heard.insert(from, cx.now.boot_ms);
                grants.push(LeaseGrant { job, attempt, binding: body.bound });
            }
        }
        if !grants.is_empty() {
            cx.out.send(self.me, from, Message::Lease { asked, entries: grants });
        }
    }

    /// Under the policy `continue` no lease binds once RUNNING is recorded. Say so at once: a node
    /// whose daemon dies before it asks again would end its processes with the lease of the start.
    pub(super) fn lift_leases(&mut self, job: JobId, cx: &mut Context<'_>) {
        let Some(kept) = cx.registers.get(job) else { return };
        let Some(drive) = self.drives.get_mut(&job) else { return };
        let body = &kept.value.body;
        // With fewer none was ever bound.
        if body.bound || kept.keepers.len() <= 2 || drive.observed.lifted {
            return;
        }
        drive.observed.lifted = true;
        for (node, asked) in &drive.observed.clocks {
            let grant = LeaseGrant { job, attempt: body.attempt, binding: false };
            cx.out.send(self.me, *node, Message::Lease { asked: *asked, entries: vec![grant] });
        }
    }

    /// A bidder asks about a job that this node does not drive.
    pub(super) fn point_elsewhere(
        &self,
        from: PeerId,
        job: JobId,
        attempt: Attempt,
        cx: &mut Context<'_>,
    ) {
        let Some(kept) = cx.registers.get(job) else {
            // It was kept here once: those who keep it now know more.
            let keepers = cx.registers.moved(job).unwrap_or_default().to_vec();
            for (steward, _) in keepers.into_iter().filter(|(keeper, _)| *keeper != self.me) {
                cx.out.send(self.me, from, Message::Elsewhere { job, steward });
            }
            return;
        };
        let body = &kept.value.body;
        if body.state() == State::Done {
            // Nobody drives it any more: any keeper may tell those whom it concerns.
            if !may_have_run(body, attempt, from) {
                debug!(%job, %from, %attempt, "asks about a job that it never ran");
            } else if kept.chosen && !kept.certificate.receipts.is_empty() {
                let adopt = Adopt {
                    spec: kept.spec.signed.clone(),
                    attempt: body.attempt,
                    certificate: kept.certificate.clone(),
                };
                cx.out.send(self.me, from, Message::Adopt(Box::new(adopt)));
            } else {
                cx.registers.read(job, cx.now);
            }
        } else if body.steward != self.me {
            let steward = body.steward;
            cx.out.send(self.me, from, Message::Elsewhere { job, steward });
        }
    }

    /// A bidder follows this steward.
    pub(crate) fn handle_adopted(
        &mut self,
        from: PeerId,
        job: JobId,
        term: u64,
        cx: &mut Context<'_>,
    ) {
        let now_term = cx.registers.get(job).map(|kept| kept.value.body.term);
        let Some(drive) = self.drives.get_mut(&job) else { return };
        if now_term == Some(term) && drive.observed.adopted.insert(from) {
            drive.observed.heard.insert(from, cx.now.boot_ms);
            if self.acts(job, cx) {
                self.send_outstanding(job, cx);
            }
        }
    }

    /// Ranks whose nodes are silent: over where their leases have surely run out; given up
    /// where they have been silent for as long as the job allows.
    pub(super) fn apply_losses(&self, body: &mut Body, drive: &Drive, now: Now) {
        let wait_ms = if self.sabotage.holds(Rule::RerunWaitsForLease) { RERUN_MS } else { 20_000 };
        let bound = body.bound;
        for rank in body.ranks.iter_mut().filter(|rank| rank.state != RankState::Ended) {
            let node = rank.assignment.node;
            let granted_ms = drive.observed.granted.get(&node).copied().unwrap_or(0);
            let heard_ms = drive.observed.heard.get(&node).copied().unwrap_or(0);
            let leased_ms = granted_ms.max(drive.since_ms);
            let ending = if bound && leased_ms.saturating_add(wait_ms) < now.boot_ms {
                Ending::Lost { reason: "its node fell silent and its lease ran out".to_owned() }
            } else if heard_ms.max(leased_ms).saturating_add(drive.spec.spec.lost_after_ms)
                < now.boot_ms
            {
                Ending::Silent
            } else {
                continue;
            };
            rank.state = RankState::Ended;
            rank.end = Some(RankEnd::bare(ending, now.wall_ms));
        }
    }
}
