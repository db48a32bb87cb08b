//! The rules, each in a file of its own, looked at after every event.
//!
//! A checker knows what truly happened (the [`Ledger`]) and may read every daemon's book.
//! It looks only at what the event touched, so that looking costs little.

mod answers;
mod chain;
mod g1;
mod g3;
mod g4;
mod journal;
mod q2;
mod x1;
mod x2;
mod x3;
mod x4;

use core::fmt;
use std::collections::BTreeSet;

use p2pit_protocol::{JobId, Peer};

use crate::{
    ledger::{Happening, Ledger},
    machine::Machine,
};

/// What a checker may look at.
#[derive(Debug)]
pub struct Scene<'a> {
    /// True time.
    pub now_ms: u64,
    /// When faults ended, if they have.
    pub healed_ms: Option<u64>,
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
        Box::new(chain::OneChain),
        Box::new(g1::OneJobPerGpu),
        Box::new(g3::CommitsAreChosen),
        Box::new(g4::HoldsEnd),
        Box::new(q2::PinsStay),
        Box::new(x1::OneExecutionAtATime),
        Box::new(x2::ProcessesAreChosen),
        Box::new(x3::OneStartPerAttempt),
        Box::new(x4::WholeOrNothing::default()),
        Box::new(answers::AnswersHold),
    ]
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
