//! Many seeds, and what was seen in them.

use core::{fmt, time::Duration};
use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::time::{ClockId, clock_gettime};

use crate::{
    options::Options,
    run::{self, Ending, Report},
    world::Counts,
};

/// Every how many seeds a run is repeated, to see that it comes out the same (W3).
pub const REPEAT_EVERY: u64 = 10;

/// What a search found.
#[derive(Debug, Default)]
pub struct Found {
    /// Seeds that were run.
    pub seeds: u64,
    /// Those that failed, in order.
    pub failures: Vec<Failure>,
    /// Everything that happened in all of them.
    pub counts: Counts,
    /// How much was simulated, repetitions included.
    pub speed: Speed,
}

/// A seed that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// How, in words.
    pub text: String,
    /// 3 for a broken rule, 4 for lack of progress, 101 for a crash.
    pub exit_code: u8,
}

/// How much was simulated in which time of the processor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Speed {
    /// The time of all machines together, in milliseconds.
    pub node_ms: u64,
    /// What the whole process took for it.
    pub cpu: Duration,
}

/// Run every seed of a range, `jobs` of them at a time. `options` makes a run's options of
/// its seed; `progress` hears of every seed as it ends. A seed that crashes is a failure
/// like any other.
pub fn search(
    seeds: Range<u64>,
    jobs: usize,
    options: impl Fn(u64) -> Options + Sync,
    progress: impl Fn(u64, Option<&Failure>) + Sync,
) -> Found {
    let before = cpu_time();
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new(Found::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let tried = try_seed(seed, &options);
                    progress(seed, tried.failure.as_ref());
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.seeds += 1;
                    found.counts.add(&tried.counts);
                    found.speed.node_ms = found.speed.node_ms.saturating_add(tried.node_ms);
                    found.failures.extend(tried.failure);
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.failures.sort_by_key(|failure| failure.seed);
    found.speed.cpu = cpu_time().saturating_sub(before);
    found
}

/// What all threads of this process took of the processor so far.
#[must_use]
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

impl Found {
    /// What the search lacks to prove anything, if it does: what never happened cannot
    /// have gone wrong.
    #[must_use]
    pub fn lacks(&self) -> Vec<&'static str> {
        let Counts { takeovers, seals, wounds, unassigns, silences, .. } = self.counts;
        let must_happen = [
            (takeovers, "no job was taken over"),
            (seals, "no record changed its keepers"),
            (wounds, "no hold was wounded"),
            (unassigns, "no attempt was withdrawn"),
            (silences, "no steward fell silent because nobody confirmed it"),
        ];
        must_happen.into_iter().filter(|(count, _)| *count == 0).map(|(_, lack)| lack).collect()
    }

    /// The exit code of a process that ran only this search.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let worst = self.failures.iter().map(|failure| failure.exit_code).max();
        worst.unwrap_or(if self.lacks().is_empty() { 0 } else { 4 })
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whole numbers are exact enough, and every node-hour is of some milliseconds.
        let cpu_ms = self.cpu.as_millis().max(1);
        let node_ms = u128::from(self.node_ms);
        let hours = node_ms / 3_600_000;
        let per_minute = node_ms * 60_000 / cpu_ms / 3_600_000;
        let (seconds, tenths) = (cpu_ms / 1_000, cpu_ms % 1_000 / 100);
        write!(
            f,
            "{hours} node-hours in {seconds}.{tenths} s of CPU: {per_minute} node-hours per \
             CPU-minute"
        )
    }
}

/// What came of one seed.
#[derive(Debug, Default)]
struct Tried {
    counts: Counts,
    node_ms: u64,
    failure: Option<Failure>,
}

fn try_seed(seed: u64, options: &impl Fn(u64) -> Options) -> Tried {
    // A run says itself how it crashed; this is for what is around it.
    let once = || catch_unwind(AssertUnwindSafe(|| run::run(options(seed), false)));
    let failed = |text, exit_code| Some(Failure { seed, text, exit_code });
    let report = match once() {
        Ok(Ok(report)) => report,
        Ok(Err(reason)) => {
            return Tried { failure: failed(format!("{reason:#}"), 101), ..Tried::default() };
        }
        Err(_) => {
            let text = "crashed before its world was made".to_owned();
            return Tried { failure: failed(text, 101), ..Tried::default() };
        }
    };
    let node_ms = report.node_ms();
    let exit_code = report.exit_code();
    let Report { ending, hash, counts, .. } = report;
    if ending != Ending::Fine {
        return Tried { counts, node_ms, failure: failed(ending.to_string(), exit_code) };
    }
    if !seed.is_multiple_of(REPEAT_EVERY) {
        return Tried { counts, node_ms, failure: None };
    }
    let same = matches!(once(), Ok(Ok(again)) if again.hash == hash);
    let text = || "W3 broken: the same seed came out differently".to_owned();
    let failure = if same { None } else { failed(text(), 3) };
    Tried { counts, node_ms: 2 * node_ms, failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_of_one_seed_does_not_end_the_search_and_is_reported_with_it() {
        let options = |seed| {
            assert_ne!(seed, 2, "no options for this one");
            Options { jobs: 2, span_ms: 1_000, ..Options::stress(seed).without_faults() }
        };
        let found = search(1..4, 2, options, |_, _| {});
        assert_eq!(found.seeds, 3);
        let [failure] = &found.failures[..] else { panic!("{found:?}") };
        assert_eq!((failure.seed, failure.exit_code), (2, 101));
        assert_eq!(found.exit_code(), 101);
    }

    #[test]
    fn a_search_in_which_something_never_happened_says_what() {
        let mut found = Found { counts: all_happened(), ..Found::default() };
        assert_eq!((found.lacks(), found.exit_code()), (vec![], 0));
        found.counts.wounds = 0;
        assert_eq!((found.lacks(), found.exit_code()), (vec!["no hold was wounded"], 4));
        found.counts = Counts::default();
        assert_eq!(found.lacks().len(), 5);
    }

    fn all_happened() -> Counts {
        Counts { takeovers: 1, seals: 1, wounds: 1, unassigns: 1, silences: 1, ..Counts::default() }
    }

    #[test]
    fn speed_is_in_hours_of_machines_per_minute_of_the_processor() {
        let speed = Speed { node_ms: 50 * 3_600_000, cpu: Duration::from_millis(1_500) };
        let text = "50 node-hours in 1.5 s of CPU: 2000 node-hours per CPU-minute";
        assert_eq!(speed.to_string(), text);
    }
}
