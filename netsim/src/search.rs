//! Many seeds, and what was seen in them.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

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

/// Run every seed of a range on `threads` threads. `options` makes a run's options of
/// its seed; `progress` hears of every seed as it ends.
pub fn search(
    seeds: Range<u64>,
    threads: usize,
    options: impl Fn(u64) -> Options + Sync,
    progress: impl Fn(u64, Option<&Failure>) + Sync,
) -> Found {
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new(Found::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let (counts, failure) = try_seed(seed, &options);
                    progress(seed, failure.as_ref());
                    let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    found.seeds += 1;
                    found.counts.add(&counts);
                    found.failures.extend(failure);
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    found.failures.sort_by_key(|failure| failure.seed);
    found
}

impl Found {
    /// What the search lacks to prove anything, if it does.
    #[must_use]
    pub fn lacks(&self) -> Option<&'static str> {
        match (self.counts.wounds, self.counts.unassigns) {
            (0, _) => Some("no hold was wounded in any run"),
            (_, 0) => Some("no attempt was withdrawn in any run"),
            _ => None,
        }
    }

    /// The exit code of a process that ran only this search.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let worst = self.failures.iter().map(|failure| failure.exit_code).max();
        worst.unwrap_or(if self.lacks().is_some() { 4 } else { 0 })
    }
}

fn try_seed(seed: u64, options: &impl Fn(u64) -> Options) -> (Counts, Option<Failure>) {
    let once = || catch_unwind(AssertUnwindSafe(|| run::run(options(seed), false)));
    let (report, panicked) = match once() {
        Ok(Ok(report)) => (Some(report), None),
        Ok(Err(reason)) => (None, Some(format!("{reason:#}"))),
        Err(panic) => (None, Some(panic_text(&*panic))),
    };
    let failure = |text, exit_code| Some(Failure { seed, text, exit_code });
    let Some(Report { ending, hash, counts, .. }) = report else {
        return (Counts::default(), failure(panicked.unwrap_or_default(), 101));
    };
    match ending {
        Ending::Fine => {}
        Ending::Violation(violation) => return (counts, failure(violation.to_string(), 3)),
        stuck @ Ending::Stuck(_) => return (counts, failure(stuck.to_string(), 4)),
    }
    if seed.is_multiple_of(REPEAT_EVERY) {
        let same = matches!(once(), Ok(Ok(again)) if again.hash == hash);
        if !same {
            let text = "W3 broken: the same seed came out differently".to_owned();
            return (counts, failure(text, 3));
        }
    }
    (counts, None)
}

fn panic_text(panic: &(dyn core::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("crashed: {}", text.unwrap_or("without a word"))
}
