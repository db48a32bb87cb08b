//! Whether the wall clock says how old things are.
//!
//! A clock that was set forward makes everything old at once: blobs that somebody relies on, and
//! what finished jobs left. So for an hour after that it is not gone by. What a daemon last knew
//! of the clock outlives it, in `<home>/clock.json`, as long as it trusted it: setting the clock
//! while no daemon runs, or starting one anew after that, is seen as well. How long a machine was
//! off nobody can tell; an absence of some hours is taken for a clock that was set.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use p2pit_protocol::Now;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::millis;
use crate::{executor::boot_id, home::write_atomic, transfer::store::RELIED};

/// Clocks that part by more than this between two looks were set.
const CLOCK_STEP: Duration = Duration::from_secs(120);
/// The same where the machine was started anew in between, and may have been off.
const OFF_MAX: Duration = Duration::from_secs(6 * 3600);
/// How often what is known of the clock is written.
const NOTE_EVERY: Duration = Duration::from_secs(600);
/// A clock that is further ahead of most others' than this is wrong.
const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// See the module.
pub(super) struct Steady {
    path: PathBuf,
    boot: Option<String>,
    last: Now,
    not_before: Option<Instant>,
    noted: Option<Instant>,
}

/// Both clocks at one moment, and during which boot of the machine.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    boot: Option<String>,
    boot_ms: u64,
    wall_ms: u64,
}

impl Steady {
    /// `path`: where the last daemon wrote what it knew.
    pub(super) fn begin(path: PathBuf, now: Now) -> Self {
        Self::begin_in(path, boot_id().ok(), now)
    }

    fn begin_in(path: PathBuf, boot: Option<String>, now: Now) -> Self {
        // Missing or damaged: there is nothing to go by.
        let bytes = std::fs::read(&path).unwrap_or_default();
        let known: Option<Known> = serde_json::from_slice(&bytes).ok();
        let mut steady = Self { path, boot, last: now, not_before: None, noted: None };
        if let Some(known) = known {
            let is_same_boot = steady.boot.is_some() && steady.boot == known.boot;
            let (passed_ms, step) = if is_same_boot {
                (now.boot_ms.saturating_sub(known.boot_ms), CLOCK_STEP)
            } else {
                (0, OFF_MAX)
            };
            steady.compare(known.wall_ms.saturating_add(passed_ms), step, now);
        }
        steady
    }

    /// To be called every few seconds.
    pub(super) fn observe(&mut self, now: Now) {
        let passed_ms = now.boot_ms.saturating_sub(self.last.boot_ms);
        self.compare(self.last.wall_ms.saturating_add(passed_ms), CLOCK_STEP, now);
        self.last = now;
    }

    fn compare(&mut self, expected_ms: u64, step: Duration, now: Now) {
        if now.wall_ms > expected_ms.saturating_add(millis(step)) {
            self.not_before = Some(Instant::now() + RELIED);
        }
    }

    pub(super) fn is_trusted(&self) -> bool {
        self.not_before.is_none_or(|at| Instant::now() >= at)
    }

    /// What the next daemon is to know, now and then; nothing while the clock is not trusted:
    /// then what was known before has to do.
    pub(super) fn note(&mut self) -> Option<Note> {
        if !self.is_trusted() || self.noted.is_some_and(|at| at.elapsed() < NOTE_EVERY) {
            return None;
        }
        self.noted = Some(Instant::now());
        let Now { boot_ms, wall_ms } = self.last;
        let known = Known { boot: self.boot.clone(), boot_ms, wall_ms };
        Some(Note { path: self.path.clone(), known })
    }
}

/// See [`Steady::note`].
#[derive(Debug)]
pub(super) struct Note {
    path: PathBuf,
    known: Known,
}

impl Note {
    /// Blocks.
    pub(super) fn write(&self) {
        let bytes = serde_json::to_vec(&self.known).map_err(std::io::Error::from);
        if let Err(reason) = bytes.and_then(|bytes| write_atomic(&self.path, &bytes)) {
            let path = self.path.display();
            warn!(%path, %reason, "what the clock is cannot be written for the next daemon");
        }
    }
}

/// Whether this node's clock is far ahead of most of those that were asked; of each: how far it
/// is ahead of this one, in milliseconds.
pub(super) fn is_ahead(others: impl Iterator<Item = i64>) -> bool {
    let ahead_max = i64::try_from(AHEAD_MAX.as_millis()).unwrap_or(i64::MAX);
    let (mut all, mut behind) = (0, 0);
    for ahead_ms in others {
        all += 1;
        behind += i32::from(ahead_ms < -ahead_max);
    }
    2 * behind > all
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    fn now(boot_ms: u64, wall_ms: u64) -> Now {
        Now { boot_ms, wall_ms }
    }

    #[test]
    fn the_times_of_files_are_not_trusted_for_an_hour_after_the_clock_was_set_forward() {
        let dir = tempfile::tempdir().unwrap();
        let mut steady = Steady::begin(dir.path().join("clock.json"), now(0, 1_000_000));
        // Slow, set back, asleep with the wall clock going on as the boot clock does.
        for (boot_ms, wall_ms) in
            [(10_000, 1_010_000), (20_000, 900_000), (8_020_000, 8_900_000), (8_030_000, 8_999_999)]
        {
            steady.observe(now(boot_ms, wall_ms));
            assert!(steady.is_trusted(), "{boot_ms}");
        }
        steady.observe(now(8_040_000, 99_000_000));
        assert!(!steady.is_trusted());
        steady.observe(now(8_050_000, 99_010_000));
        assert!(!steady.is_trusted());
        let left = steady.not_before.unwrap().duration_since(Instant::now());
        assert!(left > RELIED - Duration::from_secs(60) && left <= RELIED, "{left:?}");
        steady.not_before = Some(Instant::now());
        assert!(steady.is_trusted());
    }

    #[test]
    fn a_clock_that_was_set_forward_is_not_trusted_by_the_next_daemon_either() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clock.json");
        let begin = |boot: &str, at| Steady::begin_in(path.clone(), Some(boot.to_owned()), at);
        let far = 30 * 24 * HOUR_MS;
        let mut first = begin("a", now(1_000, far));
        assert!(first.is_trusted(), "nothing is known of before");
        let note = |steady: &mut Steady| {
            let note = steady.note();
            note.iter().for_each(Note::write);
            note.is_some()
        };
        assert!(note(&mut first) && !note(&mut first), "not all the time");
        // The same boot: what passed is known, however long it was.
        assert!(begin("a", now(1_000 + 50 * HOUR_MS, far + 50 * HOUR_MS)).is_trusted());
        assert!(!begin("a", now(2_000, far + HOUR_MS)).is_trusted());
        // Off for a while, or for so long that the clock may have been set.
        assert!(begin("b", now(9, far + 5 * HOUR_MS)).is_trusted());
        assert!(begin("b", now(9, 1)).is_trusted());
        let mut late = begin("b", now(9, far + 7 * HOUR_MS));
        assert!(!late.is_trusted());
        // Who does not trust it leaves nothing that the next one would trust.
        assert!(!note(&mut late));
        assert!(!begin("b", now(10_009, far + 7 * HOUR_MS + 10_000)).is_trusted());
        late.not_before = Some(Instant::now());
        assert!(note(&mut late));
        assert!(begin("b", now(10_009, far + 7 * HOUR_MS + 10_000)).is_trusted());
        // Set while it is trusted, and started anew at once.
        let mut set = begin("b", now(20_009, far + 7 * HOUR_MS + 20_000));
        set.observe(now(30_009, 2 * far));
        assert!(!note(&mut set));
        assert!(!begin("b", now(40_009, 2 * far + 10_000)).is_trusted());
        std::fs::write(&path, "{").unwrap();
        assert!(begin("b", now(40_009, 2 * far + 10_000)).is_trusted());
    }

    #[test]
    fn a_clock_is_wrong_where_it_is_far_ahead_of_most_others() {
        let hours = |hours: &[i64]| is_ahead(hours.iter().map(|it| it * 3_600_000));
        assert!(!hours(&[]));
        assert!(!hours(&[0, -1, 2]));
        assert!(hours(&[-2]));
        assert!(hours(&[-2, 0, -48]));
        assert!(!hours(&[-2, 0]), "one of them is wrong");
        assert!(!hours(&[48, 48, 48]), "it is behind: nothing goes too early");
    }
}
