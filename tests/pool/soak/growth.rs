//! Whether a process grows for as long as it lives: of samples, with no clock and no process.

use std::{collections::BTreeMap, time::Duration};

/// What one process had in use at some age.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) age: Duration,
    pub(super) rss_kib: u64,
    pub(super) fds: u64,
}

/// One that has not lived so long is not judged.
pub(super) const JUDGED_FROM: Duration = Duration::from_secs(40);
/// Until this age a daemon comes to what every daemon has.
const YOUNG: Duration = Duration::from_secs(10);
/// The rest of its life is looked at in so many equal parts.
const PARTS: u32 = 4;
/// What it may have more in each part than in the part before: of memory so much for each second.
/// A daemon grows in leaps, of up to 20 MiB where it did something for the first time, and is flat
/// before and after; in four parts of which none is flat it leaks. The most that a busy machine has
/// shown is 360 KiB/s in the flattest part; of a leak of a MiB/s it was at least 720.
const STEP_KIB_PER_S: u64 = 512;
const STEP_FDS: u64 = 2;
/// What it may have more in the last part than in the first, however it came to it.
const ALL_KIB: u64 = 48 << 10;
const ALL_FDS: u64 = 24;

/// What a process had in each part of its life: medians.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Growth {
    pub(super) lived: Duration,
    pub(super) rss_kib: Vec<u64>,
    pub(super) fds: Vec<u64>,
}

impl Growth {
    /// `None` of a process that was not watched for long enough.
    pub(super) fn of(readings: &[Reading]) -> Option<Self> {
        let lived = readings.iter().map(|it| it.age).max().filter(|age| *age >= JUDGED_FROM)?;
        let part = (lived - YOUNG) / PARTS;
        let parts = (0..PARTS).map(|n| {
            let (from, to) = (YOUNG + part * n, YOUNG + part * (n + 1));
            let is_last = n + 1 == PARTS;
            let within = readings.iter().filter(|it| it.age >= from && (it.age < to || is_last));
            Some(within.collect::<Vec<_>>()).filter(|it| !it.is_empty())
        });
        let parts: Vec<Vec<&Reading>> = parts.collect::<Option<_>>()?;
        let rss = parts.iter().map(|part| median(part.iter().map(|it| it.rss_kib).collect()));
        let fds = parts.iter().map(|part| median(part.iter().map(|it| it.fds).collect()));
        Some(Self { lived, rss_kib: rss.collect(), fds: fds.collect() })
    }

    /// How it grew more than it may.
    pub(super) fn complaint(&self) -> Option<String> {
        let Self { lived, rss_kib, fds } = self;
        let part_ms = lived.saturating_sub(YOUNG).as_millis() as u64 / u64::from(PARTS);
        let (lived, step_kib) = (lived.as_secs(), part_ms * STEP_KIB_PER_S / 1000);
        if grew(rss_kib, step_kib, ALL_KIB) {
            return Some(format!("had {rss_kib:?} KiB in the parts of its {lived} s"));
        }
        let more = grew(fds, STEP_FDS, ALL_FDS);
        more.then(|| format!("had {fds:?} descriptors in the parts of its {lived} s"))
    }
}

/// Whether each is more than the one before by more than `step`, or the last than the first by
/// more than `all`.
fn grew(parts: &[u64], step: u64, all: u64) -> bool {
    parts.windows(2).all(|two| two[1] > two[0] + step)
        || parts.first().zip(parts.last()).is_some_and(|(first, last)| *last > first + all)
}

/// The medians of each ten seconds of a life, in MiB, to be looked at.
pub(super) fn course(readings: &[Reading]) -> String {
    let mut by_age: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for it in readings {
        by_age.entry(it.age.as_secs() / 10).or_default().push(it.rss_kib);
    }
    let medians = by_age.into_values().map(|kib| (median(kib) >> 10).to_string());
    medians.collect::<Vec<_>>().join(" ")
}

pub(super) fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that lives for `seconds`, read every two, with a little noise.
    fn lives(
        seconds: u64,
        kib_at: impl Fn(u64) -> u64,
        fds_at: impl Fn(u64) -> u64,
    ) -> Vec<Reading> {
        let ages = (0..=seconds).step_by(2);
        let noise = |age: u64| age * 7 % 5;
        ages.map(|age| Reading {
            age: Duration::from_secs(age),
            rss_kib: (58 << 10) + kib_at(age) + 100 * noise(age),
            fds: 20 + fds_at(age) + noise(age),
        })
        .collect()
    }

    fn complaint(readings: &[Reading]) -> Option<String> {
        Growth::of(readings).expect("it lived long enough").complaint()
    }

    #[test]
    fn a_leak_of_a_mebibyte_a_second_is_seen_however_short_the_life() {
        for seconds in [40, 41, 50, 60, 90, 300] {
            let said = complaint(&lives(seconds, |age| age << 10, |_| 0));
            assert!(said.is_some_and(|it| it.contains("KiB")), "in {seconds} s");
        }
        // A slower one in a longer life; one that begins late.
        assert!(complaint(&lives(120, |age| age * 640, |_| 0)).is_some());
        assert!(complaint(&lives(140, |age| age.saturating_sub(60) << 10, |_| 0)).is_some());
    }

    #[test]
    fn a_leak_of_descriptors_is_seen() {
        let said = complaint(&lives(60, |_| 0, |age| age)).expect("it leaks");
        assert!(said.contains("descriptors"), "{said}");
    }

    #[test]
    fn what_is_flat_passes_and_so_does_what_grows_and_settles() {
        for seconds in [40, 41, 100, 300] {
            assert_eq!(complaint(&lives(seconds, |_| 0, |_| 0)), None);
        }
        // All of its code, caches and connections, in the first half minute: 30 MiB.
        let settles = lives(70, |age| age.min(30) << 10, |age| age.min(30));
        assert_eq!(complaint(&settles), None);
        // A leap late in its life, as many had that were measured (MiB of each ten seconds).
        let leap = [68, 68, 68, 69, 73, 87, 88_u64];
        let leaps = lives(69, |age| (leap[usize::try_from(age / 10).unwrap()] - 58) << 10, |_| 0);
        assert_eq!(complaint(&leaps), None);
        assert_eq!(complaint(&leaps[..31]), None, "at the worst time");
        // Three leaps in a row, as one of thirty had.
        let parts = vec![82_128, 94_728, 101_340, 112_044];
        let lived = Duration::from_secs(84);
        assert_eq!(Growth { lived, rss_kib: parts, fds: vec![20; 4] }.complaint(), None);
        // What jobs take that come and go.
        let waves = lives(100, |age| age / 10 % 2 * (8 << 10), |age| age / 10 % 2 * 8);
        assert_eq!(complaint(&waves), None);
        // A peak of one reading is no growth.
        let mut peak = lives(60, |_| 0, |_| 0);
        let last = peak.last_mut().expect("it was read");
        (last.rss_kib, last.fds) = (500 << 10, 500);
        assert_eq!(complaint(&peak), None);
    }

    #[test]
    fn a_process_that_died_young_is_not_judged() {
        assert_eq!(Growth::of(&lives(38, |age| age << 10, |_| 0)), None);
        assert_eq!(Growth::of(&[]), None);
        // Nor one of a part of whose life nothing is known.
        let mut late = lives(80, |age| age << 10, |_| 0);
        late.retain(|it| it.age > Duration::from_secs(30));
        assert_eq!(Growth::of(&late), None);
    }
}
