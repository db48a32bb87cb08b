//! What truly happened, as no single machine knows it: the ground the checkers stand on.

mod register;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use p2pit_protocol::{
    BlobId, HoldId, JobId, StoreId,
    bidder::WorkId,
    job::{Attempt, Ending, Rank, State},
    record::{Ballot, Replica, Value},
};

pub use register::{Change, Epoch, Place, Quorum, Register, ValueHash, Vote, Votes};

/// Everything that was chosen, and everything that ran.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Record values in the order of their chain, as far as a quorum made them durable.
    pub chosen: BTreeMap<JobId, Vec<Arc<Value>>>,
    /// The votes behind that.
    pub registers: BTreeMap<JobId, Register>,
    /// Jobs that exist and have not come to their end.
    pub open: BTreeSet<JobId>,
    /// Machines that acted for a job when they last did something.
    pub acting: BTreeMap<JobId, BTreeSet<usize>>,
    /// Until when the processes of an attempt may run on a machine by what stewards told it,
    /// in true time.
    pub grants: BTreeMap<(JobId, Attempt, usize), u64>,
    /// Executions by job and rank, in the order they began.
    pub executions: BTreeMap<(JobId, Rank), Vec<Execution>>,
    /// When each hold ends in true time, by machine, as last written to its journal.
    pub hold_ends: BTreeMap<(usize, HoldId), u64>,
    /// Ranks whose daemon was told that they are prepared.
    pub prepared: BTreeSet<WorkId>,
    /// Jobs whose submission was refused for good.
    pub refused: BTreeSet<JobId>,
    /// Jobs whose submission was confirmed.
    pub submitted: BTreeSet<JobId>,
    /// Every copy of a rank's `keep/` that was made while it ran, with its number.
    pub saves: BTreeMap<BlobId, (WorkId, u64)>,
    /// When machines last said that they cannot copy what a job left.
    pub refusals: BTreeMap<(usize, JobId), u64>,
    /// Jobs a user was told are being stopped, with the attempt they were at.
    pub stops: BTreeMap<JobId, Attempt>,
}

/// One process, from its start to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execution {
    /// Job, attempt and rank.
    pub id: WorkId,
    /// The machine.
    pub machine: usize,
    /// When it came to be.
    pub from_ms: u64,
    /// When it was gone.
    pub to_ms: Option<u64>,
    /// How it ended, where its supervisor lived to see it.
    pub ending: Option<Ending>,
}

/// What one event did, beside changing machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// A record has a new value.
    Chosen(JobId),
    /// A store's promise changed.
    Promised {
        /// The job.
        job: JobId,
        /// The store.
        store: StoreId,
        /// Epoch and ballot before.
        before: (u32, Ballot),
        /// Epoch and ballot now.
        after: (u32, Ballot),
    },
    /// A store voted for a value.
    Voted {
        /// The job.
        job: JobId,
        /// What for.
        vote: Vote,
    },
    /// A quorum voted for a value.
    Quorum {
        /// The job.
        job: JobId,
        /// What for.
        quorum: Quorum,
    },
    /// A value was shown to somebody as chosen.
    Shown {
        /// The job.
        job: JobId,
        /// The value.
        value: ValueHash,
    },
    /// A keeper said that it promised something.
    SaidPromise {
        /// The job.
        job: JobId,
        /// The keeper's store.
        store: StoreId,
        /// Epoch and ballot.
        promise: (u32, Ballot),
    },
    /// A keeper said that it accepted something.
    SaidVote {
        /// The job.
        job: JobId,
        /// The keeper's store.
        store: StoreId,
        /// What.
        vote: Vote,
    },
    /// A machine began to act for a job.
    Acts {
        /// The job.
        job: JobId,
        /// The machine.
        at: usize,
    },
    /// A keeper's entry cannot be read.
    Garbled(JobId),
    /// A hold was taken by a higher job.
    Wounded {
        /// Whose.
        job: JobId,
        /// By whom.
        by: JobId,
        /// It was a pin.
        pinned: bool,
    },
    /// A process came to be.
    Spawned(WorkId),
    /// A process was gone.
    Gone(WorkId),
    /// A submission was confirmed.
    Submitted(JobId),
    /// A submission was refused for good.
    Refused(JobId),
    /// A daemon could not read its journal.
    Unreadable(String),
    /// A daemon asked its executor for what the executor cannot do.
    Misused(WorkId, &'static str),
}

impl Ledger {
    /// The value chosen last.
    #[must_use]
    pub fn current(&self, job: JobId) -> Option<&Value> {
        self.chosen.get(&job)?.last().map(AsRef::as_ref)
    }

    /// Whether the job came to its end.
    #[must_use]
    pub fn is_done(&self, job: JobId) -> bool {
        self.current(job).is_some_and(|value| value.body.state() == State::Done)
    }

    /// Jobs that exist and have not come to their end.
    #[must_use]
    pub fn unfinished(&self) -> Vec<JobId> {
        self.open.iter().copied().collect()
    }

    /// Processes of `job` that exist now.
    pub fn live(&self, job: JobId) -> impl Iterator<Item = &Execution> {
        let of_job = self.executions.range((job, Rank(0))..=(job, Rank(u32::MAX)));
        of_job.flat_map(|(_, runs)| runs).filter(|run| run.to_ms.is_none())
    }

    /// Whether this rank of this attempt ever ran.
    #[must_use]
    pub fn ran(&self, id: WorkId) -> bool {
        self.executions
            .get(&(id.job, id.rank))
            .is_some_and(|runs| runs.iter().any(|run| run.id == id))
    }

    /// Take in what a store now has of a job; what was chosen by it.
    pub(crate) fn take(
        &mut self,
        job: JobId,
        store: StoreId,
        replica: &Replica,
        happenings: &mut Vec<Happening>,
    ) -> Vec<Arc<Value>> {
        let register = self.registers.entry(job).or_default();
        let Some(change) = register.take(store, replica) else {
            happenings.push(Happening::Garbled(job));
            return Vec::new();
        };
        if let Some((before, after)) = change.promised {
            happenings.push(Happening::Promised { job, store, before, after });
        }
        if let Some(vote) = change.voted {
            happenings.push(Happening::Voted { job, vote });
        }
        let Some(quorum) = change.quorum else { return Vec::new() };
        let added = match &quorum.place {
            Place::End(added) => added.clone(),
            Place::Known | Place::Nowhere => Vec::new(),
        };
        happenings.push(Happening::Quorum { job, quorum });
        if let Some(last) = added.last() {
            self.chosen.entry(job).or_default().extend(added.iter().cloned());
            if last.body.state() == State::Done {
                self.open.remove(&job);
            } else {
                self.open.insert(job);
            }
            happenings.push(Happening::Chosen(job));
        }
        added
    }

    pub(crate) fn remove_acting(&mut self, job: JobId, at: usize) {
        if let Some(machines) = self.acting.get_mut(&job) {
            machines.remove(&at);
            if machines.is_empty() {
                self.acting.remove(&job);
            }
        }
    }

    pub(crate) fn begin(&mut self, id: WorkId, machine: usize, at_ms: u64) {
        let run = Execution { id, machine, from_ms: at_ms, to_ms: None, ending: None };
        self.executions.entry((id.job, id.rank)).or_default().push(run);
    }

    pub(crate) fn end(&mut self, id: WorkId, machine: usize, at_ms: u64, ending: Option<Ending>) {
        let runs = self.executions.entry((id.job, id.rank)).or_default();
        let run = runs.iter_mut().rev().find(|run| run.id == id && run.machine == machine);
        if let Some(run) = run {
            run.to_ms.get_or_insert(at_ms);
            run.ending = ending;
        }
    }
}
