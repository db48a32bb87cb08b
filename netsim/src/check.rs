//! The rules, each in a file of its own, looked at after every event.
//!
//! A checker knows what truly happened (the [`Ledger`]) and may read every daemon's book.
//! It looks only at what the event touched, so that looking costs little.

mod answers;
mod d1;
pub(crate) mod d2;
mod d3;
mod g1;
mod g3;
mod g4;
mod journal;
mod partition;
mod q2;
mod r1;
mod r2;
mod r3;
mod r4;
mod r5;
mod s1;
mod s2;
mod s3;
mod w2;
mod x1;
mod x2;
mod x3;
mod x4;
mod x5;
mod x6;

use core::fmt;
use std::collections::BTreeSet;

use p2pit_protocol::{JobId, Peer};

use crate::{
    ledger::{Happening, Ledger},
    machine::{Machine, Still},
    network::Network,
    options::Options,
    workload::Workload,
    world::Troubles,
};

/// What a checker may look at.
#[derive(Debug)]
pub struct Scene<'a> {
    /// True time.
    pub now_ms: u64,
    /// When faults ended, if they have.
    pub healed_ms: Option<u64>,
    /// Whether to look at what no event touched, too: every few seconds.
    pub surveys: bool,
    /// What the run is made of.
    pub options: &'a Options,
    /// The links.
    pub network: &'a Network,
    /// What people want.
    pub workload: &'a Workload,
    /// What went wrong lately.
    pub(crate) troubles: &'a Troubles,
    /// What truly happened so far.
    pub ledger: &'a Ledger,
    /// Every machine.
    pub machines: &'a [Machine],
    /// Machines whose daemon did something in this event.
    pub touched: &'a BTreeSet<usize>,
    /// What this event did.
    pub happenings: &'a [Happening],
}

/// A rule that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: &'static str,
    /// True time.
    pub at_ms: u64,
    /// The job concerned, if it is about one.
    pub job: Option<JobId>,
    /// What was seen.
    pub text: String,
}

/// What a checker saw that must not be.
#[derive(Debug)]
pub struct Broken {
    job: Option<JobId>,
    text: String,
}

/// Watches one rule.
pub trait Checker: fmt::Debug + Send {
    /// The rule's name, as the design has it.
    fn rule(&self) -> &'static str;

    /// Look at what an event touched.
    ///
    /// # Errors
    /// The rule is broken.
    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken>;
}

/// Every checker, fresh.
#[must_use]
pub fn all() -> Vec<Box<dyn Checker>> {
    vec![
        Box::new(journal::Readable),
        Box::new(r1::OneValuePerBallot),
        Box::new(r3::SealsEnd),
        Box::new(r4::EpochsFollow),
        Box::new(r5::PromisesStay),
        Box::new(r2::OneChain),
        Box::new(s1::OneSteward),
        Box::new(s2::TermsDiffer),
        Box::new(s3::JobsHaveStewards::default()),
        Box::new(g1::OneJobPerGpu),
        Box::new(g3::CommitsAreChosen),
        Box::new(g4::HoldsEnd),
        Box::new(q2::PinsStay),
        Box::new(x1::OneExecutionAtATime),
        Box::new(x5::OneResult),
        Box::new(x2::ProcessesAreChosen),
        Box::new(x3::OneStartPerAttempt),
        Box::new(x4::WholeOrNothing::default()),
        Box::new(x6::LeasesEnd),
        Box::new(d1::SubmittedIsSafe),
        Box::new(d2::DoneIsSafe),
        Box::new(d3::RetriesGoOn),
        Box::new(partition::PartitionsKillNothing),
        Box::new(w2::BoundsHold::default()),
        Box::new(answers::AnswersHold),
    ]
}

/// Those that a run of `options` is watched by, fresh.
///
/// # Panics
/// No rule has the name of the only one to be watched.
#[must_use]
pub fn of(options: &Options) -> Vec<Box<dyn Checker>> {
    let mut checkers = all();
    if let Some(rule) = options.watched_rule {
        checkers.retain(|checker| checker.rule() == rule);
        assert!(!checkers.is_empty(), "no rule is called `{rule}`");
    }
    checkers
}

/// Let every checker look.
///
/// # Errors
/// The first rule that is broken.
pub fn look(checkers: &mut [Box<dyn Checker>], scene: &Scene<'_>) -> Result<(), Violation> {
    for checker in checkers {
        checker.look(scene).map_err(|broken| Violation {
            rule: checker.rule(),
            at_ms: scene.now_ms,
            job: broken.job,
            text: broken.text,
        })?;
    }
    Ok(())
}

impl Scene<'_> {
    /// The daemons that did something, with their machines.
    fn touched(&self) -> impl Iterator<Item = (&Machine, &Peer)> {
        self.touched.iter().filter_map(|at| {
            let machine = self.machines.get(*at)?;
            Some((machine, machine.daemon.as_ref()?))
        })
    }

    /// Every daemon that runs, with its machine.
    fn daemons(&self) -> impl Iterator<Item = (&Machine, &Peer)> {
        self.machines.iter().filter_map(|machine| Some((machine, machine.daemon.as_ref()?)))
    }

    /// Whether a machine sleeps, or wakes at this moment.
    fn sleeps(&self, at: usize) -> bool {
        self.machines.get(at).is_some_and(|machine| {
            machine.still == Some(Still::Machine) || machine.woke_ms == Some(self.now_ms)
        })
    }

    /// When a machine last went on after it slept.
    fn woke_ms(&self, at: usize) -> Option<u64> {
        self.machines.get(at).and_then(|machine| machine.woke_ms)
    }

    /// Jobs whose record changed in this event.
    fn chosen(&self) -> impl Iterator<Item = JobId> {
        self.happenings.iter().filter_map(|happening| match happening {
            Happening::Chosen(job) => Some(*job),
            _ => None,
        })
    }
}

impl Broken {
    fn of(job: JobId, text: impl Into<String>) -> Self {
        Self { job: Some(job), text: text.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} broken at {} ms", self.rule, self.at_ms)?;
        if let Some(job) = self.job {
            write!(f, ", job {job}")?;
        }
        write!(f, ": {}", self.text)
    }
}

#[cfg(test)]
mod testing {
    use super::*;

    /// What a checker says about `happenings` in a world without machines.
    pub(super) fn look(
        checker: &mut dyn Checker,
        ledger: &Ledger,
        happenings: &[Happening],
    ) -> Result<(), Broken> {
        let options = Options::draw(0);
        checker.look(&Scene {
            now_ms: 20,
            healed_ms: None,
            surveys: false,
            options: &options,
            network: &Network::new(&options, 0),
            workload: &Workload::default(),
            troubles: &Troubles::default(),
            ledger,
            machines: &[],
            touched: &BTreeSet::new(),
            happenings,
        })
    }
}
