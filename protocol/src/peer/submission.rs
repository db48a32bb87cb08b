//! Submission: how a job comes to be kept.
//!
//! The submitter says `Init` to the first keeper, which checks the job, keeps it, and brings
//! it to the others with its receipt. Once a quorum keeps it and its inputs are on two nodes,
//! the job is *submitted*. Where the first keeper does not answer, the submitter asks all.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Event, Peer, Slot, SubmitError, Timer};
use crate::{
    JobId, Now, PeerId, StoreId,
    identity::SignedBytes,
    job::{KEEPERS_MAX, VerifiedSpec},
    message::Message,
    record::{Ballot, Link, check_receipt, quorum_of},
    sabotage::Rule,
};

/// How long a submission may take before its fate is called unknown.
pub const SUBMIT_MS: u64 = 15_000;
/// How often an unanswered submission is repeated.
pub const SUBMIT_RESEND_MS: u64 = 1_000;
/// How far a submitter's clock may be from its keeper's.
pub const SUBMIT_TOLERANCE_MS: u64 = 120_000;
/// How old a job may be that one keeper brings to another.
pub(super) const BIRTH_MS: u64 = 7 * 24 * 3_600_000;
/// Most submissions in flight at once.
pub const SUBMISSIONS_MAX: usize = 4_096;
/// Most refusals a keeper remembers; beyond that it gives none, and only asks to wait.
pub const REFUSALS_MAX: usize = 4_096;
/// The longest reason of another keeper's that is remembered, in bytes.
const REFUSAL_BYTES_MAX: usize = 1_024;
/// Most receipts that are looked at of those that come with a job: the sender's of its birth, and
/// those of what was chosen last.
const RECEIPTS_MAX: usize = 1 + KEEPERS_MAX;
/// Nodes that have a job's inputs when it counts as submitted; all keepers, if fewer.
pub(super) const INPUT_COPIES: usize = 2;

#[derive(Debug, Clone)]
pub(super) struct Submission {
    spec: Arc<VerifiedSpec>,
    until_ms: u64,
    receipts: BTreeMap<StoreId, SignedBytes>,
    inputs: BTreeSet<StoreId>,
    refusals: BTreeSet<PeerId>,
    /// The first keeper's refusal, which the others are to join.
    refused: Option<String>,
}

/// A job's first keeper brings it to the others.
#[derive(Debug, Clone)]
pub(super) struct Birth {
    until_ms: u64,
    receipts: BTreeMap<StoreId, SignedBytes>,
    inputs: BTreeSet<StoreId>,
    refusals: BTreeSet<PeerId>,
    /// Who waits for the answer.
    waiting: BTreeSet<PeerId>,
}

/// Why a job is not kept here. It is kept until the job is too old to be brought here, so
/// that a late copy of its submission cannot undo what the submitter was told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Refusal {
    until_wall_ms: u64,
    reason: String,
}

/// Whether a job counts as submitted.
fn is_submitted(
    spec: &VerifiedSpec,
    receipts: &BTreeMap<StoreId, SignedBytes>,
    inputs: &BTreeSet<StoreId>,
    two: bool,
) -> bool {
    let keepers = spec.spec.keepers.len();
    let copies = if two { INPUT_COPIES.min(keepers) } else { 0 };
    receipts.len() >= quorum_of(keepers) && inputs.len() >= copies
}

impl Peer {
    /// Submit a job whose inputs its first keepers already have. [`Event::Submitted`] follows.
    ///
    /// # Errors
    /// The spec is not in order, or too many submissions are in flight.
    pub fn submit(&mut self, spec: SignedBytes, now: Now) -> Result<JobId, String> {
        let spec = Arc::new(VerifiedSpec::verify(spec).map_err(|e| e.to_string())?);
        if self.submissions.len() >= SUBMISSIONS_MAX {
            return Err(format!("{SUBMISSIONS_MAX} submissions are in flight already"));
        }
        let job = spec.job;
        let submission = Submission {
            spec,
            until_ms: now.after(SUBMIT_MS),
            receipts: BTreeMap::new(),
            inputs: BTreeSet::new(),
            refusals: BTreeSet::new(),
            refused: None,
        };
        self.submissions.insert(job, submission);
        self.send_init(job, now);
        self.finish(now);
        Ok(job)
    }

    pub(super) fn send_init(&mut self, job: JobId, now: Now) {
        let Some(submission) = self.submissions.get_mut(&job) else { return };
        if submission.until_ms <= now.boot_ms {
            self.settle_submission(job, Err(SubmitError::Unknown));
            return;
        }
        let first_time = submission.until_ms == now.after(SUBMIT_MS);
        let refused = submission.refused.clone();
        let most = if first_time { 1 } else { usize::MAX };
        let keepers = submission.spec.spec.keepers.iter().map(|(keeper, _)| *keeper);
        let keepers: Vec<PeerId> = keepers.take(most).collect();
        let receipts: Vec<SignedBytes> = submission.receipts.values().cloned().collect();
        let spec = submission.spec.signed.clone();
        for keeper in keepers {
            let (spec, receipts) = (spec.clone(), receipts.clone());
            let init = Message::Init { spec, receipts, refused: refused.clone() };
            self.out.send(self.me, keeper, init);
        }
        self.timers.set(Timer::Submit(job), now.after(SUBMIT_RESEND_MS));
    }

    /// Somebody wants a job to be kept here.
    pub(super) fn handle_init(
        &mut self,
        from: PeerId,
        signed: SignedBytes,
        receipts: &[SignedBytes],
        refused: Option<String>,
        now: Now,
    ) {
        // What is promised while others may know of a later life of this store may be lost with
        // it; the submitter asks again.
        if self.shy_until_ms.is_some() || self.store_refused {
            return;
        }
        let job = JobId::of(&signed.bytes);
        if let Some(links) = self.registers.links(job).filter(|links| !links.is_empty()) {
            // This store may never have seen its birth; that its keepers changed shows it.
            let links = links.to_vec();
            self.out.send(self.me, from, Message::Moved { job, links });
            return;
        }
        let (spec, receipt) = match self.accept_init(signed, receipts, refused, now) {
            Ok(accepted) => accepted,
            Err((reason, retry)) => {
                let refused = Message::InitRefused { job, reason, retry };
                self.out.send(self.me, from, refused);
                return;
            }
        };
        if self.is_behind_its_head(job) {
            // It was off until the job was over: nobody brings it more than the birth.
            self.registers.read(job, now);
        }
        let trees = self.bidder.local_trees();
        let has_inputs = spec.inputs().all(|tree| trees.contains(&tree));
        let first = spec.spec.keepers[0] == (self.me, self.store);
        let by_keeper = spec.spec.keepers.iter().any(|(keeper, _)| *keeper == from);
        if !first || (by_keeper && from != self.me) {
            let inputs = if has_inputs { vec![self.store] } else { Vec::new() };
            let inited = Message::Inited { job, receipts: vec![receipt], inputs };
            self.out.send(self.me, from, inited);
            return;
        }
        self.births.retain(|_, birth| birth.until_ms > now.boot_ms);
        let birth = self.births.entry(job).or_insert_with(|| Birth {
            until_ms: now.after(4 * SUBMIT_MS),
            receipts: BTreeMap::new(),
            inputs: BTreeSet::new(),
            refusals: BTreeSet::new(),
            waiting: BTreeSet::new(),
        });
        birth.waiting.insert(from);
        birth.receipts.insert(self.store, receipt.clone());
        if has_inputs {
            birth.inputs.insert(self.store);
        }
        for (keeper, _) in spec.spec.keepers.iter().skip(1) {
            let (spec, receipts) = (spec.signed.clone(), vec![receipt.clone()]);
            let init = Message::Init { spec, receipts, refused: None };
            self.out.send(self.me, *keeper, init);
        }
        self.answer_birth(job, &spec, now);
    }

    /// Tell those who wait what is known of a job's birth, once it counts as submitted.
    fn answer_birth(&mut self, job: JobId, spec: &VerifiedSpec, now: Now) {
        let two = self.sabotage.holds(Rule::InputsOnTwoNodes);
        let Some(birth) = self.births.get_mut(&job) else { return };
        if !is_submitted(spec, &birth.receipts, &birth.inputs, two) {
            return;
        }
        let inited = Message::Inited {
            job,
            receipts: birth.receipts.values().cloned().collect(),
            inputs: birth.inputs.iter().copied().collect(),
        };
        let waiting = core::mem::take(&mut birth.waiting);
        if waiting.is_empty() {
            return;
        }
        self.announce_head(job, now);
        for submitter in waiting {
            // Whoever submitted can find the job at once, before gossip comes round.
            if let Some(head) = self.soft.head(job) {
                self.out.send(self.me, submitter, Message::Soft(head));
            }
            self.out.send(self.me, submitter, inited.clone());
        }
    }

    fn accept_init(
        &mut self,
        signed: SignedBytes,
        receipts: &[SignedBytes],
        refused: Option<String>,
        now: Now,
    ) -> Result<(Arc<VerifiedSpec>, SignedBytes), (String, bool)> {
        let job = JobId::of(&signed.bytes);
        if let Some(spec) = self.registers.spec(job).map(Arc::clone) {
            let receipt = self.registers.init(Arc::clone(&spec), now);
            return receipt.map(|receipt| (spec, receipt)).map_err(|e| (e.to_string(), true));
        }
        let spec = VerifiedSpec::verify(signed).map_err(|e| (e.to_string(), false))?;
        if self.client || !spec.spec.keepers.contains(&(self.me, self.store)) {
            // It may have been, before it lost its disk.
            return Err(("this node is not a keeper of the job".to_owned(), true));
        }
        let others = receipts.iter().take(RECEIPTS_MAX);
        let others = others.filter_map(|receipt| check_receipt(receipt, &spec.spec.keepers));
        let others = others.filter(|body| body.job == job && body.epoch == 0);
        let others: BTreeSet<StoreId> = others.map(|body| body.store).collect();
        let kept_elsewhere = !others.is_empty();
        // Then nobody was told that the job is refused, whatever this node said.
        let exists = others.len() >= quorum_of(spec.spec.keepers.len());
        if let Some(refusal) = self.refused.get(&job)
            && !exists
        {
            return Err((refusal.reason.clone(), false));
        }
        if let Some(mut reason) = refused.filter(|_| !exists) {
            while reason.len() > REFUSAL_BYTES_MAX {
                reason.pop();
            }
            return Err(self.refuse(&spec, reason, now));
        }
        let first = spec.spec.keepers[0] == (self.me, self.store);
        if kept_elsewhere {
            // It exists: what is in its way here can only be for now.
            self.check_owner(&spec).map_err(|reason| (reason, true))?;
            let age_ms = now.wall_ms.saturating_sub(spec.spec.submitted_at_ms);
            if age_ms > BIRTH_MS {
                return Err((
                    "the job is too old to be brought to another keeper".to_owned(),
                    true,
                ));
            }
        } else if let Err(reason) = self.check_init(&spec, first, now) {
            return Err(self.refuse(&spec, reason, now));
        }
        let trees = self.bidder.local_trees();
        if first
            && !kept_elsewhere
            && let Some(missing) = spec.inputs().find(|tree| !trees.contains(tree))
        {
            return Err((format!("input {missing} is not on the keeper yet"), true));
        }
        let spec = Arc::new(spec);
        match self.registers.init(Arc::clone(&spec), now) {
            Ok(receipt) => {
                if self.refused.remove(&job).is_some() {
                    self.out.remove(&Slot::Refused(job));
                }
                Ok((spec, receipt))
            }
            Err(full) => Err((full.to_string(), true)),
        }
    }

    /// What must be so now, and need not be so later.
    fn check_init(&self, spec: &VerifiedSpec, first: bool, now: Now) -> Result<(), String> {
        self.check_owner(spec)?;
        let off_ms = spec.spec.submitted_at_ms.abs_diff(now.wall_ms);
        if off_ms > SUBMIT_TOLERANCE_MS {
            return Err(format!(
                "the submitter's clock is {} s off its keeper's; at most {} s are allowed: set \
                 the clock and submit again",
                off_ms / 1000,
                SUBMIT_TOLERANCE_MS / 1000
            ));
        }
        if first { self.feasible(&spec.spec.request).map_err(|e| e.to_string()) } else { Ok(()) }
    }

    /// Refuse a job for good; or where that cannot be remembered, only for now.
    fn refuse(&mut self, spec: &VerifiedSpec, reason: String, now: Now) -> (String, bool) {
        let until_wall_ms = spec.spec.submitted_at_ms.saturating_add(BIRTH_MS);
        if until_wall_ms < now.wall_ms {
            return (reason, false);
        }
        let over = |refusal: &Refusal| refusal.until_wall_ms < now.wall_ms;
        let old: Vec<JobId> =
            self.refused.iter().filter(|(_, r)| over(r)).map(|(job, _)| *job).collect();
        for job in old {
            self.refused.remove(&job);
            self.out.remove(&Slot::Refused(job));
        }
        if self.refused.len() >= REFUSALS_MAX {
            return ("this keeper refused too many jobs lately".to_owned(), true);
        }
        let refusal = Refusal { until_wall_ms, reason: reason.clone() };
        self.out.put(&Slot::Refused(spec.job), &refusal);
        self.refused.insert(spec.job, refusal);
        (reason, false)
    }

    pub(super) fn handle_inited(
        &mut self,
        from: PeerId,
        job: JobId,
        receipts: Vec<SignedBytes>,
        inputs: &[StoreId],
        now: Now,
    ) {
        let two = self.sabotage.holds(Rule::InputsOnTwoNodes);
        let spec = self.registers.spec(job).map(Arc::clone);
        let spec = spec.or_else(|| Some(Arc::clone(&self.submissions.get(&job)?.spec)));
        let Some(spec) = spec else { return };
        if !spec.spec.keepers.iter().any(|(keeper, _)| *keeper == from) {
            return;
        }
        self.copies.has_record(from, job);
        self.registers.keeper_ready(job, now);
        if !self.births.contains_key(&job) && !self.submissions.contains_key(&job) {
            return;
        }
        let mut fresh = BTreeMap::new();
        for receipt in receipts.into_iter().take(spec.spec.keepers.len()) {
            let body = check_receipt(&receipt, &spec.spec.keepers);
            let body = body.filter(|body| {
                body.job == job && body.epoch == 0 && body.seq == 1 && body.ballot == Ballot::ZERO
            });
            match body {
                Some(body) => {
                    fresh.insert(body.store, receipt);
                }
                None => warn!(%job, %from, "receipt not in order"),
            }
        }
        let inputs: Vec<StoreId> =
            inputs.iter().filter(|store| fresh.contains_key(store)).copied().collect();
        if let Some(birth) = self.births.get_mut(&job) {
            birth.receipts.extend(fresh.clone());
            birth.inputs.extend(&inputs);
            self.answer_birth(job, &spec, now);
        }
        if let Some(submission) = self.submissions.get_mut(&job) {
            submission.receipts.extend(fresh);
            submission.inputs.extend(&inputs);
            if is_submitted(&spec, &submission.receipts, &submission.inputs, two) {
                self.settle_submission(job, Ok(()));
            }
        }
    }

    pub(super) fn handle_init_refused(
        &mut self,
        from: PeerId,
        job: JobId,
        reason: String,
        retry: bool,
        now: Now,
    ) {
        if retry {
            return;
        }
        let is_born = !self.births.contains_key(&job);
        if is_born && self.registers.get(job).is_some_and(|kept| !kept.chosen) {
            // Where a majority keeps it, the next time that can be shown.
            self.registers.read(job, now);
        }
        // So many that the others are no quorum.
        let too_many = |spec: &VerifiedSpec, refusals: &BTreeSet<PeerId>| {
            let keepers = spec.spec.keepers.len();
            refusals.len() > keepers - quorum_of(keepers)
        };
        let spec = self.registers.spec(job).map(Arc::clone);
        if let (Some(spec), Some(birth)) = (spec, self.births.get_mut(&job)) {
            if spec.spec.keepers.iter().any(|(keeper, _)| *keeper == from) {
                birth.refusals.insert(from);
            }
            if too_many(&spec, &birth.refusals) {
                // It can never be chosen, and what was promised for it must not be forgotten.
                self.registers.forget(job);
                self.births.remove(&job);
                self.refuse(&spec, reason.clone(), now);
            }
        }
        let Some(submission) = self.submissions.get_mut(&job) else { return };
        let keepers = &submission.spec.spec.keepers;
        if !keepers.iter().any(|(keeper, _)| *keeper == from) {
            return;
        }
        let first = from == keepers[0].0;
        let news = submission.refusals.insert(from);
        if too_many(&submission.spec, &submission.refusals) {
            let reason = submission.refused.take().unwrap_or(reason);
            self.settle_submission(job, Err(SubmitError::Refused(reason)));
        } else if first && news {
            // An earlier try may have reached the others: only they can tell.
            submission.refused = Some(reason);
            submission.until_ms = now.after(SUBMIT_MS).saturating_sub(1);
            self.send_init(job, now);
        }
    }

    /// The keepers of a job changed, as these links say: so it was submitted.
    pub(super) fn submission_moved(&mut self, job: JobId, links: &[Link]) {
        let Some(submission) = self.submissions.get(&job) else { return };
        let spec = Arc::clone(&submission.spec);
        if !links.is_empty() && self.check_links(links, &spec).is_ok() {
            self.settle_submission(job, Ok(()));
        }
    }

    fn settle_submission(&mut self, job: JobId, result: Result<(), SubmitError>) {
        self.submissions.remove(&job);
        self.timers.cancel(&Timer::Submit(job));
        self.out.events.push_back(Event::Submitted { job, result });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        peer::{SHY_MS, Transmit, user::tests as user},
        record::{Value, sign_receipt},
        roster::testing::{Replica, WALL_MS, admit_node, claim, node_key},
    };

    /// What the third keeper answers.
    fn answer(
        third: &mut Peer,
        spec: &VerifiedSpec,
        receipts: &[SignedBytes],
        now: Now,
    ) -> Message {
        let init =
            Message::Init { spec: spec.signed.clone(), receipts: receipts.to_vec(), refused: None };
        third.handle_message(spec.spec.keepers[0].0, init, now);
        while third.poll_write().is_some() {}
        let sent = std::iter::from_fn(|| third.poll_transmit());
        let mut answers = sent.filter_map(|transmit| match transmit {
            Transmit::Direct { message, .. } => Some(message),
            Transmit::Gossip(_) => None,
        });
        answers
            .find(|it| matches!(it, Message::Inited { .. } | Message::InitRefused { .. }))
            .unwrap()
    }

    #[test]
    fn what_was_refused_is_kept_only_where_a_majority_shows_that_it_exists() {
        let mut replica = Replica::founder();
        for n in [2, 3] {
            let claim = claim(replica.roster.pool(), 1, n, n);
            replica.as_node(admit_node(claim, &format!("node{n}"))).unwrap();
        }
        let spec = user::spec(&replica);
        let mut third = user::started(&replica, 3, None);
        // Its clock is late.
        let now = Now { boot_ms: 1_000 + SHY_MS, wall_ms: WALL_MS - 2 * SUBMIT_TOLERANCE_MS };
        third.handle_timeout(now);
        let refused = |answer: Message| matches!(answer, Message::InitRefused { retry: false, .. });
        assert!(refused(answer(&mut third, &spec, &[], now)));
        let birth = Value::birth(&spec);
        let by = |n: u8| {
            let store = spec.spec.keepers[usize::from(n) - 1].1;
            sign_receipt(&node_key(n), store, Ballot::ZERO, &birth, birth.hash())
        };
        assert!(
            refused(answer(&mut third, &spec, &[by(1)], now)),
            "its owner may think it refused"
        );
        assert!(refused(answer(&mut third, &spec, &[by(1), by(1)], now)));
        let kept = answer(&mut third, &spec, &[by(1), by(2)], now);
        assert!(matches!(kept, Message::Inited { .. }), "{kept:?}");
        assert!(third.registers.get(spec.job).is_some() && third.refused.is_empty());
    }
}
