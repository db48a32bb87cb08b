//! How fast transfers may go.
//!
//! One [`Pace`] is shared by all transfers of a direction. Each takes what it is about to
//! send, and waits for its turn: turns are given in the order they are asked for, so that
//! transfers share a limit evenly, whoever came first.

use std::{
    num::NonZeroU64,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// What may go at once after a pause.
const BURST: Duration = Duration::from_millis(50);

/// A limit in bytes per second, or none.
#[derive(Debug, Default)]
pub struct Pace(Option<Limit>);

#[derive(Debug)]
struct Limit {
    bytes_per_second: NonZeroU64,
    /// When everything that was taken will have gone.
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    pub const fn unlimited() -> Self {
        Self(None)
    }

    pub fn of(bytes_per_second: NonZeroU64) -> Self {
        Self(Some(Limit { bytes_per_second, free_at: Mutex::new(None) }))
    }

    /// Returns once `bytes` may go.
    pub async fn take(&self, bytes: u64) {
        let Some(limit) = &self.0 else { return };
        let turn = limit.reserve(bytes, Instant::now());
        sleep_until(turn).await;
    }
}

impl Limit {
    /// When `bytes` may go, if they are asked for at `now`.
    fn reserve(&self, bytes: u64, now: Instant) -> Instant {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // Whole between any two of its statements.
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let turn = free_at.map_or(earliest, |free_at| free_at.max(earliest));
        *free_at = Some(turn + takes);
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_follow_one_another_at_the_rate_and_a_pause_is_not_saved_up() {
        let limit = Limit {
            bytes_per_second: NonZeroU64::new(1_000_000).unwrap(),
            free_at: Mutex::new(None),
        };
        let start = Instant::now() + Duration::from_secs(1);
        let turns: Vec<Instant> = (0..5).map(|_| limit.reserve(250_000, start)).collect();
        for (i, turn) in turns.iter().enumerate() {
            let expected = start - BURST + Duration::from_millis(250) * i as u32;
            assert_eq!(*turn, expected);
        }
        let later = start + Duration::from_secs(3600);
        assert_eq!(limit.reserve(250_000, later), later - BURST);
        assert_eq!(limit.reserve(1, later), later + Duration::from_millis(200));
    }

    #[tokio::test]
    async fn without_a_limit_nobody_waits() {
        Pace::unlimited().take(u64::MAX).await;
    }
}
