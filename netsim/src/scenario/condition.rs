//! What a story says of jobs and machines, and whether it is so.

use std::collections::BTreeMap;

use p2pit_protocol::{
    JobId, PeerId, StoreId,
    bidder::{LEASE_GRACE_MS, WorkId},
    copies::NOT_COPIED,
    identity::SignedBytes,
    job::{Ending, Outcome, Rank, Saved, State, VerifiedSpec},
    record::{Body, Value},
};

use super::{
    format::{Condition, Deed, OutcomeName},
    hand::Hand,
    read::Variant,
};
use crate::{workload::Task, world::World};

/// Who is who in a story that is being played.
#[derive(Debug)]
pub(super) struct Cast<'v> {
    pub(super) variant: &'v Variant,
    /// The tasks that jobs became, by the name of the job.
    pub(super) tasks: BTreeMap<&'v str, usize>,
    pub(super) hand: Hand,
    /// The store of each machine at the beginning.
    pub(super) stores: Vec<StoreId>,
}

macro_rules! given {
    ($self:ident: $($field:ident $name:literal),* $(,)?) => {
        [$($self.$field.is_some().then_some($name)),*].into_iter().flatten().collect()
    };
}

impl Condition {
    /// The fields given that are about the job's state.
    pub(super) fn of_job(&self) -> Vec<&'static str> {
        given!(self:
            submitted "submitted",
            ended "ended",
            state "state",
            outcome "outcome",
            attempt "attempt",
            attempts_at_most "attempts-at-most",
            processes "processes",
            executions "executions",
            lease_endings "lease-endings",
            leases_kept "leases-kept",
            term_at_least "term-at-least",
            term_at_most "term-at-most",
            epoch_at_least "epoch-at-least",
            keepers "keepers",
            steward "steward",
            steward_not "steward-not",
            keeper_not "keeper-not",
            submissions_at_least "submissions-at-least",
            copies "copies",
            disks_at_least "disks-at-least",
            saved "saved",
            removed "removed",
            removed_everywhere "removed-everywhere",
            not_copied "not-copied",
        )
    }

    /// The fields given that are about the machine's state.
    pub(super) fn of_node(&self) -> Vec<&'static str> {
        given!(self: up "up", new_store "new-store")
    }

    /// The fields given that are about any state.
    pub(super) fn of_state(&self) -> Vec<&'static str> {
        [self.of_job(), self.of_node()].concat()
    }

    /// The fields given that are about a message.
    pub(super) fn of_message(&self) -> Vec<&'static str> {
        given!(self: moment "moment", nth "nth", from "from", to "to")
    }

    /// Whether everything it says is so.
    ///
    /// # Errors
    /// What is not so, in words.
    pub(super) fn holds(&self, cast: &Cast<'_>, world: &World) -> Result<(), String> {
        if let Some(name) = &self.job {
            let told = cast.told(name, world)?;
            self.history_holds(&told).map_err(|what| format!("job {name}: {what}"))?;
            self.record_holds(&told).map_err(|what| format!("job {name}: {what}"))?;
        }
        if let Some(node) = &self.node {
            let at = cast.one(&node.0, world)?;
            let of = |what: String| format!("{}: {what}", world.machines[at].name());
            expect(self.up, || world.is_up(at), "whether its daemon runs").map_err(of)?;
            let is_new = || cast.stores.get(at) != Some(&world.machines[at].member.store);
            expect(self.new_store, is_new, "whether it has a new store").map_err(of)?;
        }
        Ok(())
    }

    /// What can be said before a record exists.
    fn history_holds(&self, told: &Told<'_>) -> Result<(), String> {
        let Told { task, world, job, .. } = *told;
        expect(self.submitted, || task.job.is_some(), "whether its submitter was told")?;
        at_least(self.submissions_at_least, task.tries + 1, "submissions")?;
        let copies = || {
            let of_task = world.workload.by_job.iter().filter(|(_, of)| **of == told.index);
            of_task.filter(|(job, _)| world.ledger.chosen.contains_key(*job)).count()
        };
        expect(self.copies, copies, "jobs that came of it")?;
        let live = || job.map_or(0, |job| world.ledger.live(job).count());
        expect(self.processes, live, "its processes that exist now")?;
        if let Some(wanted) = self.executions {
            for rank in 0..task.request.process_count() {
                let runs = job.map_or(0, |job| executions(world, job, Rank(rank)).count());
                expect(Some(wanted), || runs, &format!("executions of its rank {rank}"))?;
            }
        }
        expect(self.lease_endings, || told.lease_endings(), "processes ended by their lease")?;
        if self.leases_kept.is_some() {
            expect(self.leases_kept, || told.leases_kept(), "whether leases were kept")?;
        }
        Ok(())
    }

    /// What is said of the record.
    fn record_holds(&self, told: &Told<'_>) -> Result<(), String> {
        if !self.asks_record() {
            return Ok(());
        }
        let world = told.world;
        let value = told.value().ok_or("it has no record")?;
        let body = &value.body;
        expect(self.ended, || body.state() == State::Done, "whether it ended")?;
        expect(self.state.map(|state| state.0.0), || body.state(), "its state")?;
        if let Some(wanted) = self.outcome {
            let outcome = body.outcome.as_ref().map(OutcomeName::of);
            if outcome != Some(wanted.0) {
                let (state, attempt) = (body.state(), body.attempt);
                let is = match &body.outcome {
                    Some(Outcome::Lost { reason }) => format!("lost: {reason}"),
                    Some(outcome) => outcome.to_string(),
                    None => format!("{state} at attempt {attempt}"),
                };
                return Err(format!("it is {is}, where {} was expected", wanted.0));
            }
        }
        expect(self.attempt, || body.attempt.0, "its attempt")?;
        at_most(self.attempts_at_most, body.attempt.0, "its attempts")?;
        at_least(self.term_at_least, body.term, "its term")?;
        at_most(self.term_at_most, body.term, "its term")?;
        at_least(self.epoch_at_least, value.epoch, "its epoch")?;
        expect(self.keepers, || told.keepers().len(), "its keepers")?;
        at_least(self.disks_at_least, told.disks(body), "disks with what a rank left")?;
        let is_save = |saved: &Saved| world.ledger.saves.contains_key(&saved.tree);
        let saved = || body.saved.iter().any(is_save);
        expect(self.saved, saved, "whether a copy of keep/ is named for the next attempt")?;
        expect(self.removed, || body.removed.is_some(), "whether it was removed")?;
        let known = || told.is_removed_everywhere();
        expect(self.removed_everywhere, known, "whether every keeper knows that it was removed")?;
        let given_up = || {
            let notes = body.ranks.iter().filter_map(|rank| rank.end.as_ref()?.note.as_ref());
            notes.into_iter().any(|note| note.starts_with(NOT_COPIED))
        };
        expect(self.not_copied, given_up, "whether what it left was given up")?;
        let steward = || world.machine_of(body.steward);
        if let Some(side) = &self.steward {
            let at = told.cast.one(&side.0, world)?;
            expect(Some(Some(at)), steward, "its steward")?;
        }
        if let Some(side) = &self.steward_not
            && steward() == Some(told.cast.one(&side.0, world)?)
        {
            return Err(format!("its steward is n{}", steward().unwrap_or_default()));
        }
        if let Some(side) = &self.keeper_not {
            let at = told.cast.one(&side.0, world)?;
            if told.keepers().contains(&world.machines[at].peer) {
                return Err(format!("{} keeps it", world.machines[at].name()));
            }
        }
        Ok(())
    }

    fn asks_record(&self) -> bool {
        self.ended.is_some()
            || self.state.is_some()
            || self.outcome.is_some()
            || self.attempt.is_some()
            || self.attempts_at_most.is_some()
            || self.term_at_least.is_some()
            || self.term_at_most.is_some()
            || self.epoch_at_least.is_some()
            || self.keepers.is_some()
            || self.disks_at_least.is_some()
            || self.saved.is_some()
            || self.removed.is_some()
            || self.removed_everywhere.is_some()
            || self.not_copied.is_some()
            || self.steward.is_some()
            || self.steward_not.is_some()
            || self.keeper_not.is_some()
    }
}

fn expect<T: PartialEq + core::fmt::Debug>(
    wanted: Option<T>,
    is: impl FnOnce() -> T,
    what: &str,
) -> Result<(), String> {
    let Some(wanted) = wanted else { return Ok(()) };
    let is = is();
    if is == wanted {
        return Ok(());
    }
    Err(format!("{what}: {is:?}, where {wanted:?} was expected"))
}

fn at_least<T: PartialOrd + core::fmt::Display>(
    wanted: Option<T>,
    is: T,
    what: &str,
) -> Result<(), String> {
    match wanted {
        Some(wanted) if is < wanted => {
            Err(format!("{what}: {is}, where at least {wanted} was expected"))
        }
        _ => Ok(()),
    }
}

fn at_most<T: PartialOrd + core::fmt::Display>(
    wanted: Option<T>,
    is: T,
    what: &str,
) -> Result<(), String> {
    match wanted {
        Some(wanted) if is > wanted => {
            Err(format!("{what}: {is}, where at most {wanted} was expected"))
        }
        _ => Ok(()),
    }
}

fn executions(
    world: &World,
    job: JobId,
    rank: Rank,
) -> impl Iterator<Item = &crate::ledger::Execution> {
    world.ledger.executions.get(&(job, rank)).into_iter().flatten()
}

impl OutcomeName {
    fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Succeeded => Self::Succeeded,
            Outcome::Failed { .. } => Self::Failed,
            Outcome::Stopped { .. } => Self::Stopped,
            Outcome::TimedOut => Self::TimedOut,
            Outcome::Lost { .. } => Self::Lost,
        }
    }
}

// ---- who is meant ---------------------------------------------------------------------

/// A job that a story tells of.
struct Told<'a> {
    cast: &'a Cast<'a>,
    world: &'a World,
    index: usize,
    task: &'a Task,
    /// Its id, once it was signed.
    job: Option<JobId>,
}

impl Told<'_> {
    /// On how many disks of machines that are up what each rank left is, at the least.
    fn disks(&self, body: &Body) -> usize {
        let disks = |id: WorkId| {
            let up = self.world.machines.iter().filter(|machine| machine.daemon.is_some());
            up.filter(|machine| machine.left.contains(&id)).count()
        };
        let Some(job) = self.job else { return 0 };
        let ids = body.ranks.iter().map(|record| {
            let rank = record.assignment.rank;
            WorkId { job, attempt: body.attempt, rank }
        });
        ids.map(disks).min().unwrap_or(0)
    }

    fn is_removed_everywhere(&self) -> bool {
        let Some(job) = self.job else { return false };
        let mut keepers =
            self.keepers().into_iter().filter_map(|keeper| self.world.machine_of(keeper));
        keepers.all(|at| {
            let daemon = self.world.machines[at].daemon.as_ref();
            let kept = daemon.and_then(|daemon| daemon.record(job));
            kept.is_some_and(|kept| kept.value.body.removed.is_some())
        })
    }
}

impl Cast<'_> {
    fn told<'a>(&'a self, name: &str, world: &'a World) -> Result<Told<'a>, String> {
        let index = *self.tasks.get(name).ok_or(format!("job {name} is not submitted yet"))?;
        let task = &world.workload.tasks[index];
        let job = task.job.or_else(|| task.spec.as_ref().map(|spec| JobId::of(&spec.bytes)));
        Ok(Told { cast: self, world, index, task, job })
    }

    /// The job that a name stands for, once it was signed.
    pub(super) fn job(&self, name: &str, world: &World) -> Option<JobId> {
        self.told(name, world).ok()?.job
    }

    /// The machines that are meant.
    ///
    /// # Errors
    /// Nobody has that role now.
    pub(super) fn all(&self, deed: &Deed, world: &World) -> Result<Vec<usize>, String> {
        match &deed.nodes {
            Some(sides) => sides.iter().map(|side| self.one(&side.0, world)).collect(),
            None => self.one(deed, world).map(|at| vec![at]),
        }
    }

    /// The machine that is meant.
    ///
    /// # Errors
    /// Nobody has that role now.
    pub(super) fn one(&self, deed: &Deed, world: &World) -> Result<usize, String> {
        let machine = |peer: Option<PeerId>| peer.and_then(|peer| world.machine_of(peer));
        if let Some(name) = &deed.node {
            return self.variant.machine(name).ok_or(format!("no machine is called `{name}`"));
        }
        if let Some(name) = &deed.steward_of {
            let told = self.told(name, world)?;
            let steward = told.steward();
            return machine(steward).ok_or(format!("job {name} has no steward yet"));
        }
        if let Some(name) = &deed.keeper_of {
            let told = self.told(name, world)?;
            let steward = told.steward();
            let mut others = told.keepers();
            others.retain(|keeper| Some(*keeper) != steward);
            let none = format!("job {name} has no {}. keeper beside its steward", deed.nth + 1);
            return machine(others.get(deed.nth).copied()).ok_or(none);
        }
        if let Some(name) = &deed.submitter_of {
            return Ok(self.told(name, world)?.task.origin);
        }
        if let Some(name) = &deed.worker_of {
            let told = self.told(name, world)?;
            let ranks = told.value().map(|value| &value.body.ranks[..]).unwrap_or_default();
            let node = ranks.get(deed.nth).map(|rank| rank.assignment.node);
            return machine(node).ok_or(format!("rank {} of job {name} has no node", deed.nth));
        }
        Err("nobody is meant".to_owned())
    }
}

impl Told<'_> {
    fn value(&self) -> Option<&Value> {
        self.world.ledger.current(self.job?)
    }

    fn steward(&self) -> Option<PeerId> {
        let named = || self.first_keepers().first().copied();
        self.value().map(|value| value.body.steward).or_else(named)
    }

    /// Who keeps the record now; whom its spec names, before anybody does.
    fn keepers(&self) -> Vec<PeerId> {
        let register = self.job.and_then(|job| self.world.ledger.registers.get(&job));
        let keepers = register.map(|register| register.keepers()).unwrap_or_default();
        if keepers.is_empty() {
            return self.first_keepers();
        }
        keepers.iter().map(|(peer, _)| *peer).collect()
    }

    fn first_keepers(&self) -> Vec<PeerId> {
        let verify = |spec: &SignedBytes| VerifiedSpec::verify(spec.clone()).ok();
        let spec = self.task.spec.as_ref().and_then(verify);
        spec.map(|spec| spec.spec.keepers.iter().map(|(peer, _)| *peer).collect())
            .unwrap_or_default()
    }

    /// Processes, of whatever attempt, that their lease ended.
    fn lease_endings(&self) -> usize {
        let Some(job) = self.job else { return 0 };
        let runs = (0..self.task.request.process_count())
            .flat_map(|rank| executions(self.world, job, Rank(rank)));
        runs.filter(|run| run.ending == Some(Ending::LeaseEnded)).count()
    }

    /// Whether every rank that ran again did so only after the last lease of the process
    /// before had surely ended, with its grace. A process that had none counts as broken:
    /// nothing was kept.
    fn leases_kept(&self) -> bool {
        let Some(job) = self.job else { return true };
        (0..self.task.request.process_count()).all(|rank| {
            let runs: Vec<_> = executions(self.world, job, Rank(rank)).collect();
            runs.windows(2).all(|pair| {
                let key = (job, pair[0].id.attempt, pair[0].machine);
                let until_ms = self.world.ledger.grants.get(&key);
                until_ms.is_some_and(|until_ms| {
                    pair[1].from_ms >= until_ms.saturating_add(LEASE_GRACE_MS)
                })
            })
        })
    }
}
