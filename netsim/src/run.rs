//! One run: faults and safety, then healing and progress.

use core::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{
    check::Violation,
    options::Options,
    world::{Counts, World},
};

/// How long nothing may move, once faults ended, before the run counts as stuck: longer
/// than any process, preparation or grace of a workload, and any pause of an auction.
pub const STILL_MS_MAX: u64 = 5 * 60_000;
/// How long all jobs together may take after faults ended.
pub const FINISH_MS_MAX: u64 = 6 * 3_600_000;
/// How long after the last job's end something may still be held.
pub const LEFTOVER_MS_MAX: u64 = 5 * 60_000;
/// How often it is asked whether all is over.
const LOOK_MS: u64 = 250;

/// How a run went.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub ending: Ending,
    /// The hash of everything that happened.
    pub hash: String,
    /// How often what happened.
    pub counts: Counts,
    /// True time at its end.
    pub at_ms: u64,
    /// The world as it stood.
    pub world: World,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Every job came to its end and no rule was broken.
    Fine,
    /// A rule was broken.
    Violation(Violation),
    /// Faults ended, and still something did not come to its end.
    Stuck(Vec<String>),
    /// A daemon or the simulator panicked, with these words.
    Crashed(String),
}

/// Carry out the run of `options`.
///
/// # Errors
/// The world cannot be made: a mistake of the simulator.
pub fn run(options: Options, keep_lines: bool) -> anyhow::Result<Report> {
    let mut world = World::new(options, keep_lines)?;
    let ending = caught(|| match phases(&mut world) {
        Ok(stuck) if stuck.is_empty() => Ending::Fine,
        Ok(stuck) => Ending::Stuck(stuck),
        Err(violation) => Ending::Violation(violation),
    });
    Ok(Report::of(ending, world))
}

/// How `act` ends; a panic of it is an ending, too, so that what the world saw until then
/// can still be shown.
pub(crate) fn caught(act: impl FnOnce() -> Ending) -> Ending {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Ending::Crashed(text.unwrap_or("without a word").to_owned())
    })
}

/// What did not come to its end, in words.
fn phases(world: &mut World) -> Result<Vec<String>, Violation> {
    let heal_ms = world.options.heal_ms();
    world.run_until(heal_ms, |_| false)?;
    world.heal();
    finish(world)
}

/// Demand that every job comes to its end and nothing is left of any. For worlds that
/// healed, or in which nothing went wrong.
///
/// # Errors
/// A rule was broken.
pub fn finish(world: &mut World) -> Result<Vec<String>, Violation> {
    let since_ms = world.now_ms();
    let still_ms = STILL_MS_MAX.max(world.options.run_ms_max + STILL_MS_MAX / 2);
    let is_still = |world: &World| {
        let moved_ms = world.moved_ms().max(since_ms);
        world.now_ms() > moved_ms + still_ms
    };
    let ended = |world: &World| world.is_over() || is_still(world);
    world.run_until(FINISH_MS_MAX, now_and_then(ended))?;
    if !world.is_over() {
        return Ok(unfinished(world));
    }
    world.run_until(LEFTOVER_MS_MAX, now_and_then(|world| world.leftovers().is_empty()))?;
    Ok(world.leftovers())
}

/// `reached`, asked only as often as [`LOOK_MS`] says: it looks at the whole world.
fn now_and_then(reached: impl Fn(&World) -> bool) -> impl FnMut(&World) -> bool {
    let mut next_ms = 0;
    move |world| {
        if world.now_ms() < next_ms {
            return false;
        }
        next_ms = world.now_ms() + LOOK_MS;
        reached(world)
    }
}

fn unfinished(world: &World) -> Vec<String> {
    let mut stuck = Vec::new();
    for (index, task) in world.workload.tasks.iter().enumerate() {
        if task.job.is_none() {
            stuck.push(format!("task {index} was never submitted"));
        }
    }
    for job in world.ledger.unfinished() {
        let Some(value) = world.ledger.current(job) else { continue };
        let (state, attempt) = (value.body.state(), value.body.attempt);
        let task = world.workload.by_job.get(&job).and_then(|t| world.workload.tasks.get(*t));
        let request = task.map(|task| task.request.to_string()).unwrap_or_default();
        stuck.push(format!("job {job} ({request}) is {state} at attempt {attempt}"));
    }
    stuck
}

impl Report {
    /// What came of `world`.
    pub(crate) fn of(ending: Ending, world: World) -> Self {
        Self {
            ending,
            hash: world.trace.hash(),
            counts: world.counts.clone(),
            at_ms: world.now_ms(),
            world,
        }
    }

    /// How much was simulated: the time of all nodes that offer GPUs together, in milliseconds.
    #[must_use]
    pub fn node_ms(&self) -> u64 {
        self.at_ms.saturating_mul(self.world.options.nodes as u64)
    }

    /// The exit code of a process that ran only this.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.ending {
            Ending::Fine => 0,
            Ending::Violation(_) => 3,
            Ending::Stuck(_) => 4,
            Ending::Crashed(_) => 101,
        }
    }

    /// The job it went wrong with, if it went wrong with one.
    #[must_use]
    pub fn job(&self) -> Option<p2pit_protocol::JobId> {
        match &self.ending {
            Ending::Violation(violation) => violation.job,
            Ending::Stuck(_) => self.world.ledger.unfinished().first().copied(),
            Ending::Fine | Ending::Crashed(_) => None,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fine => f.write_str("every job came to its end"),
            Self::Violation(violation) => violation.fmt(f),
            Self::Crashed(text) => write!(f, "crashed: {text}"),
            Self::Stuck(what) => {
                write!(f, "no progress:")?;
                what.iter().take(20).try_for_each(|what| write!(f, "\n  {what}"))
            }
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            events,
            messages,
            lost,
            duplicates,
            wounds,
            assigns,
            unassigns,
            crashes,
            write_crashes,
            takeovers,
            seals,
            silences,
            lease_ends,
            reboots,
            wipes,
            stores_refused,
            full_disks,
            pauses,
            suspends,
            cuts,
            wall_steps,
            restarts,
            processes,
            jobs,
            copies,
            saves,
        } = self;
        write!(
            f,
            "{jobs} jobs, {processes} processes, {assigns} assignments, {unassigns} withdrawn, \
             {wounds} wounds, {takeovers} takeovers, {seals} seals, {silences} stewards silenced \
             and {lease_ends} processes ended by their lease, {crashes} crashes ({write_crashes} \
             while writing), {reboots} reboots ({wipes} with an empty disk), {stores_refused} \
             stores given up, {full_disks} full \
             disks, {pauses} pauses, {suspends} suspends, {cuts} cuts, {wall_steps} steps of wall \
             clocks, {restarts} restarts, {messages} messages, {lost} lost, {duplicates} \
             duplicated, {copies} copies of results, {saves} of keep/, {events} events"
        )
    }
}

impl Counts {
    /// These and those of another run.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.messages += other.messages;
        self.lost += other.lost;
        self.duplicates += other.duplicates;
        self.wounds += other.wounds;
        self.assigns += other.assigns;
        self.unassigns += other.unassigns;
        self.crashes += other.crashes;
        self.write_crashes += other.write_crashes;
        self.takeovers += other.takeovers;
        self.seals += other.seals;
        self.silences += other.silences;
        self.lease_ends += other.lease_ends;
        self.reboots += other.reboots;
        self.wipes += other.wipes;
        self.stores_refused += other.stores_refused;
        self.full_disks += other.full_disks;
        self.pauses += other.pauses;
        self.suspends += other.suspends;
        self.cuts += other.cuts;
        self.wall_steps += other.wall_steps;
        self.restarts += other.restarts;
        self.processes += other.processes;
        self.jobs += other.jobs;
        self.copies += other.copies;
        self.saves += other.saves;
    }
}
