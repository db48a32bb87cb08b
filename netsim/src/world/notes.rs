//! What machines say and do, noted down for the checkers.

use p2pit_protocol::{
    JobId, StoreId,
    bidder::LEASE_MS,
    identity::{Domain, SignedBytes},
    job::{Attempt, Policy, State},
    message::{LeaseGrant, Message, Start},
    record::ReceiptBody,
    wire,
};

use super::World;
use crate::ledger::{Happening, Vote};

impl World {
    /// What a keeper or steward vouches for by a message.
    pub(super) fn note_said(&mut self, from: usize, message: &Message) {
        let store = self.machines[from].member.store;
        match message {
            Message::Promise(promise) => self.happenings.push(Happening::SaidPromise {
                job: promise.job,
                store,
                promise: (promise.epoch, promise.ballot),
            }),
            Message::Accepted { job, receipt, .. } => self.note_receipt(*job, store, receipt),
            Message::Inited { job, receipts, .. } => {
                receipts.iter().for_each(|receipt| self.note_receipt(*job, store, receipt));
            }
            Message::Commit(commit) => {
                let value = *blake3::hash(&commit.certificate.value_bytes).as_bytes();
                let job = JobId::of(&commit.spec.bytes);
                self.happenings.push(Happening::Shown { job, value });
            }
            Message::Adopt(adopt) => {
                let value = *blake3::hash(&adopt.certificate.value_bytes).as_bytes();
                let job = JobId::of(&adopt.spec.bytes);
                self.happenings.push(Happening::Shown { job, value });
            }
            _ => {}
        }
    }

    fn note_receipt(&mut self, job: JobId, store: StoreId, receipt: &SignedBytes) {
        let body = receipt.verify(Domain::Receipt).ok().map(wire::decode::<ReceiptBody>);
        let Some(Ok(body)) = body else { return };
        // Receipts of others are passed on; whoever gave them answered for them then.
        if body.store == store {
            let vote = Vote { epoch: body.epoch, ballot: body.ballot, value: body.value_hash };
            self.happenings.push(Happening::SaidVote { job, store, vote });
        }
    }

    /// How long a steward lets processes run, by what it tells their node.
    pub(super) fn note_grant(&mut self, at: usize, message: &Message) {
        let (asked, grants) = match message {
            Message::Lease { asked, entries } => (asked, &entries[..]),
            Message::Start(start) => {
                let Start { job, attempt, binding, asked, .. } = start;
                let first = LeaseGrant { job: *job, attempt: *attempt, binding: *binding };
                (asked, &[first][..])
            }
            _ => return,
        };
        let until_ms = self.machines[at].clock.true_at(asked.boot_ms + LEASE_MS);
        for LeaseGrant { job, attempt, binding } in grants {
            let free = !binding && self.may_be_unbound(*job, *attempt);
            self.grant(at, *job, *attempt, if free { u64::MAX } else { until_ms });
        }
    }

    fn grant(&mut self, at: usize, job: JobId, attempt: Attempt, until_ms: u64) {
        let granted = self.ledger.grants.entry((job, attempt, at)).or_default();
        *granted = until_ms.max(*granted);
    }

    /// Whether leases of an attempt may be lifted: where it is not to be run elsewhere and was
    /// recorded to run, or where its few keepers may well be away together.
    fn may_be_unbound(&self, job: JobId, attempt: Attempt) -> bool {
        let few = self.ledger.registers.get(&job).is_some_and(|r| r.keepers().len() <= 2);
        let task = self.workload.by_job.get(&job).and_then(|t| self.workload.tasks.get(*t));
        let policy = task.map(|task| task.behaviour.policy);
        let values = self.ledger.chosen.get(&job).into_iter().flatten();
        let ran = |state| matches!(state, State::Running | State::Cleaning);
        let ran = values.rev().any(|v| v.body.attempt == attempt && ran(v.body.state()));
        few || policy == Some(Policy::Continue) && ran
    }

    /// For which jobs a daemon acts after it did something.
    pub(super) fn note_acting(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        let idle = machine.daemon.as_ref().is_none_or(|peer| peer.driven() == 0);
        if idle && machine.acting.is_empty() {
            return;
        }
        let acting = machine.acting_at(self.now_ms);
        let before = core::mem::replace(&mut machine.acting, acting.clone());
        let peer = machine.peer;
        for (job, term) in &before {
            if acting.contains(&(*job, *term)) {
                continue;
            }
            self.ledger.remove_acting(*job, at);
            let still_named = self.ledger.current(*job).is_some_and(|value| {
                let body = &value.body;
                let in_office = body.steward == peer && body.term == *term;
                // While its keepers change a job has no steward, and nobody lacks one.
                in_office && value.sealed.is_none() && body.state() != State::Done
            });
            self.counts.silences += u64::from(still_named);
        }
        for (job, term) in acting {
            if !before.contains(&(job, term)) {
                self.ledger.acting.entry(job).or_default().insert(at);
                self.happenings.push(Happening::Acts { job, at });
            }
            // What it grants to itself goes over no network.
            let of_job = self.machines[at].executor.processes.keys();
            let attempts: Vec<Attempt> =
                of_job.filter(|id| id.job == job).map(|id| id.attempt).collect();
            for attempt in attempts {
                let free = self.may_be_unbound(job, attempt);
                let until_ms = if free { u64::MAX } else { self.now_ms + LEASE_MS };
                self.grant(at, job, attempt, until_ms);
            }
        }
    }
}
