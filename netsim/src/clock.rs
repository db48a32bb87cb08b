//! The clocks of one machine, against true time.

use p2pit_protocol::Now;

/// Where every wall clock stands at true time 0, before its own error.
pub const WALL_START_MS: u64 = 1_700_000_000_000;

/// A boot clock with its own rate, and a wall clock with its own error.
#[derive(Debug, Clone)]
pub struct Clock {
    /// True time of the last boot.
    booted_ms: u64,
    /// What the boot clock said then: machines were up before the simulation began.
    boot_start_ms: u64,
    /// Parts per million that the boot clock runs fast.
    drift_ppm: i64,
    /// What the wall clock is ahead, as a shift of [`WALL_START_MS`].
    wall_start_ms: u64,
}

impl Clock {
    /// A machine that has been up for `uptime_ms`.
    #[must_use]
    pub fn new(uptime_ms: u64, drift_ppm: i64, wall_start_ms: u64) -> Self {
        Self { booted_ms: 0, boot_start_ms: uptime_ms, drift_ppm, wall_start_ms }
    }

    /// The machine booted again: its boot clock starts anew.
    pub fn reboot(&mut self, true_ms: u64, after_ms: u64) {
        (self.booted_ms, self.boot_start_ms) = (true_ms, after_ms);
    }

    /// What the clocks say at `true_ms`.
    #[must_use]
    pub fn now(&self, true_ms: u64) -> Now {
        let passed = true_ms.saturating_sub(self.booted_ms);
        Now {
            boot_ms: self.boot_start_ms + self.own(passed),
            wall_ms: self.wall_start_ms + true_ms,
        }
    }

    /// The first true time at which the boot clock says `boot_ms` or more.
    #[must_use]
    pub fn true_at(&self, boot_ms: u64) -> u64 {
        let own = boot_ms.saturating_sub(self.boot_start_ms);
        let mut passed = own.saturating_sub(own / 500);
        // The rate is within 0.1 %, so this takes at most a few steps for each second.
        while self.own(passed) < own {
            passed += ((own - self.own(passed)) / 2).max(1);
        }
        while passed > 0 && self.own(passed - 1) >= own {
            passed -= 1;
        }
        self.booted_ms + passed
    }

    fn own(&self, passed_ms: u64) -> u64 {
        let shift = i128::from(passed_ms) * i128::from(self.drift_ppm) / 1_000_000;
        u64::try_from(i128::from(passed_ms) + shift).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_time_is_reached_at_its_true_time_and_not_a_millisecond_earlier() {
        for drift_ppm in [-1_000, -17, 0, 400, 1_000] {
            let mut clock = Clock::new(5_000, drift_ppm, WALL_START_MS);
            clock.reboot(70_000, 3);
            for boot_ms in [3, 4, 999, 10_000, 123_457, 86_400_000] {
                let at_ms = clock.true_at(boot_ms);
                assert!(clock.now(at_ms).boot_ms >= boot_ms);
                assert!(at_ms == 70_000 || clock.now(at_ms - 1).boot_ms < boot_ms);
            }
        }
    }
}
