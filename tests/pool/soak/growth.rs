//! Whether a process grows for as long as it lives: of samples, with no clock and no process.

use std::time::Duration;

/// What one process had in use at some age.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) age: Duration,
    pub(super) rss_kib: u64,
    pub(super) fds: u64,
}

/// One that has not lived so long is not judged.
pub(super) const JUDGED_FROM: Duration = Duration::from_secs(40);
/// At these ages it has what it needs to be a daemon, and none of what it would leak.
const YOUNG: std::ops::Range<Duration> = Duration::from_secs(10)..Duration::from_secs(20);
/// So long before its end it is old.
const OLD: Duration = Duration::from_secs(10);
/// What a process may have more when it is old than when it was young, in KiB and in descriptors.
const MORE_KIB: u64 = 12 << 10;
const MORE_FDS: u64 = 12;

/// What a process had when it was young, and when it was old: medians.
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
        let (young, old): (Vec<_>, Vec<_>) = (
            readings.iter().filter(|it| YOUNG.contains(&it.age)).collect(),
            readings.iter().filter(|it| it.age + OLD > lived).collect(),
        );
        if lived < JUDGED_FROM || young.is_empty() {
            return None;
        }
        let rss = |of: &[&Reading]| median(of.iter().map(|it| it.rss_kib).collect());
        let fds = |of: &[&Reading]| median(of.iter().map(|it| it.fds).collect());
        let (rss_kib, fds) = ((rss(&young), rss(&old)), (fds(&young), fds(&old)));
        Some(Self { lived, rss_kib, fds })
    }

    /// How it grew more than it may.
    pub(super) fn complaint(&self) -> Option<String> {
        let Self { lived, rss_kib, fds } = self;
        let lived = lived.as_secs();
        if rss_kib.1 > rss_kib.0 + MORE_KIB {
            return Some(format!("grew from {} to {} KiB in {lived} s", rss_kib.0, rss_kib.1));
        }
        let more = fds.1 > fds.0 + MORE_FDS;
        more.then(|| format!("had {} descriptors, after {lived} s {}", fds.0, fds.1))
    }
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
    fn a_leak_of_a_mebibyte_a_second_is_seen_in_forty_seconds() {
        let said = complaint(&lives(40, |age| age << 10, |_| 0)).expect("it leaks");
        assert!(said.contains("KiB in 40 s"), "{said}");
        // A slower one in a longer life.
        assert!(complaint(&lives(90, |age| age * 256, |_| 0)).is_some());
    }

    #[test]
    fn a_leak_of_descriptors_is_seen() {
        let said = complaint(&lives(60, |_| 0, |age| age / 2)).expect("it leaks");
        assert!(said.contains("descriptors"), "{said}");
    }

    #[test]
    fn what_is_flat_passes_and_so_does_what_grows_and_settles() {
        assert_eq!(complaint(&lives(100, |_| 0, |_| 0)), None);
        // All of its code, caches and connections, in the first half minute.
        let settles = lives(100, |age| age.min(30) * 400, |age| age.min(15));
        assert_eq!(complaint(&settles), None);
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
        // Nor one that was not seen while it was young.
        let mut late = lives(80, |age| age << 10, |_| 0);
        late.retain(|it| it.age > Duration::from_secs(20));
        assert_eq!(Growth::of(&late), None);
    }
}
