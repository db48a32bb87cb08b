//! Whether a process grows for as long as it lives: of samples, with no clock and no process.

use std::{collections::BTreeMap, time::Duration};

/// What one process had in use at some age.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) age: Duration,
    pub(super) rss_kib: u64,
    pub(super) fds: u64,
}

/// One that has not lived so long is not judged. A shorter life shows how a daemon grows to what it
/// needs, and not where that ends.
pub(super) const JUDGED_FROM: Duration = Duration::from_secs(50);
/// What it has in the middle of its life and at the end is the median of so long.
const WINDOW: Duration = Duration::from_secs(10);
/// What a process may have more at its end than in the middle of its life, in KiB and in
/// descriptors. Daemons that live for 50 s and more have up to 6 MiB and 4 descriptors more; one
/// that loses a MiB each second has 20 MiB more at that age.
const MORE_KIB: u64 = 12 << 10;
const MORE_FDS: u64 = 12;

/// What a process had in the middle of its life and at the end: medians.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Growth {
    pub(super) lived: Duration,
    pub(super) rss_kib: (u64, u64),
    pub(super) fds: (u64, u64),
}

impl Growth {
    /// `None` of a process that was not watched for long enough.
    pub(super) fn of(readings: &[Reading]) -> Option<Self> {
        let lived = readings.iter().map(|it| it.age).max()?;
        let within = |from: Duration, to: Duration| -> Vec<&Reading> {
            readings.iter().filter(|it| it.age > from && it.age <= to).collect()
        };
        if lived < JUDGED_FROM {
            return None;
        }
        let middle = within((lived - WINDOW) / 2, (lived + WINDOW) / 2);
        let end = within(lived - WINDOW, lived);
        if middle.is_empty() {
            return None;
        }
        let rss = |of: &[&Reading]| median(of.iter().map(|it| it.rss_kib).collect());
        let fds = |of: &[&Reading]| median(of.iter().map(|it| it.fds).collect());
        let (rss_kib, fds) = ((rss(&middle), rss(&end)), (fds(&middle), fds(&end)));
        Some(Self { lived, rss_kib, fds })
    }

    /// How it grew more than it may.
    pub(super) fn complaint(&self) -> Option<String> {
        let Self { lived, rss_kib, fds } = self;
        let lived = lived.as_secs();
        if rss_kib.1 > rss_kib.0 + MORE_KIB {
            return Some(format!(
                "grew from {} to {} KiB in the second half of {lived} s",
                rss_kib.0, rss_kib.1
            ));
        }
        let more = fds.1 > fds.0 + MORE_FDS;
        more.then(|| format!("had {} descriptors half way, and {} after {lived} s", fds.0, fds.1))
    }
}

/// The medians of each ten seconds of a life, in MiB, to be looked at.
pub(super) fn course(readings: &[Reading]) -> String {
    let mut by_age: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for it in readings {
        by_age.entry(it.age.as_secs() / WINDOW.as_secs()).or_default().push(it.rss_kib);
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
        for seconds in [50, 51, 60, 90, 300] {
            let said = complaint(&lives(seconds, |age| age << 10, |_| 0));
            assert!(said.is_some_and(|it| it.contains("KiB")), "in {seconds} s");
        }
        // A slower one in a longer life, also where it begins late.
        assert!(complaint(&lives(120, |age| age * 300, |_| 0)).is_some());
        assert!(complaint(&lives(120, |age| age.saturating_sub(60) << 10, |_| 0)).is_some());
    }

    #[test]
    fn a_leak_of_descriptors_is_seen() {
        let said = complaint(&lives(60, |_| 0, |age| age)).expect("it leaks");
        assert!(said.contains("descriptors"), "{said}");
    }

    #[test]
    fn what_is_flat_passes_and_so_does_what_grows_and_settles() {
        for seconds in [50, 51, 100, 300] {
            assert_eq!(complaint(&lives(seconds, |_| 0, |_| 0)), None);
        }
        // All of its code, caches and connections, in the first half minute: 30 MiB.
        let settles = lives(70, |age| age.min(30) << 10, |age| age.min(30));
        assert_eq!(complaint(&settles), None);
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
        assert_eq!(Growth::of(&lives(48, |age| age << 10, |_| 0)), None);
        assert_eq!(Growth::of(&[]), None);
        // Nor one that was not seen in the middle.
        let mut late = lives(80, |age| age << 10, |_| 0);
        late.retain(|it| it.age > Duration::from_secs(60));
        assert_eq!(Growth::of(&late), None);
    }
}
