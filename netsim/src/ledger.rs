//! What truly happened, as no single machine knows it: the ground the checkers stand on.

use std::collections::{BTreeMap, BTreeSet};

use p2pit_protocol::{
    HoldId, JobId,
    bidder::WorkId,
    job::{Attempt, Rank, State},
    record::Value,
};

/// Everything that was chosen, and everything that ran.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Record values in the order they became durable at their keeper: with one keeper
    /// that is what being chosen means.
    pub chosen: BTreeMap<JobId, Vec<Value>>,
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
}

/// What one event did, beside changing machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// A record has a new value.
    Chosen(JobId),
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
        self.chosen.get(&job)?.last()
    }

    /// Whether the job came to its end.
    #[must_use]
    pub fn is_done(&self, job: JobId) -> bool {
        self.current(job).is_some_and(|value| value.body.state() == State::Done)
    }

    /// Jobs that exist and have not come to their end.
    #[must_use]
    pub fn unfinished(&self) -> Vec<JobId> {
        self.chosen.keys().filter(|job| !self.is_done(**job)).copied().collect()
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

    pub(crate) fn begin(&mut self, id: WorkId, machine: usize, at_ms: u64) {
        let run = Execution { id, machine, from_ms: at_ms, to_ms: None };
        self.executions.entry((id.job, id.rank)).or_default().push(run);
    }

    pub(crate) fn end(&mut self, id: WorkId, machine: usize, at_ms: u64) {
        let runs = self.executions.entry((id.job, id.rank)).or_default();
        let run = runs.iter_mut().rev().find(|run| run.id == id && run.machine == machine);
        if let Some(run) = run {
            run.to_ms.get_or_insert(at_ms);
        }
    }
}
