//! The clocks of one machine, against true time.

use p2pit_protocol::Now;

/// Where every wall clock stands at true time 0, before its own error.
pub const WALL_START_MS: u64 = 1_700_000_000_000;

/// One whole rate, in parts per million.
const WHOLE_PPM: u128 = 1_000_000;

/// A boot clock with its own rate, and a wall clock with its own error.
#[derive(Debug, Clone)]
pub struct Clock {
    /// True time from which the boot clock runs as it does: its last boot, or step.
    since_ms: u64,
    /// What the boot clock said then: machines were up before the simulation began.
    boot_start_ms: u64,
    /// How far it runs in a million of true milliseconds.
    rate_ppm: u128,
    /// Where the wall clock stood at true time 0.
    wall_start_ms: u64,
    /// The same, before anybody stepped it.
    wall_right_ms: u64,
}

impl Clock {
    /// A machine that has been up for `uptime_ms`, whose boot clock runs fast by
    /// `drift_ppm` parts per million.
    #[must_use]
    pub fn new(uptime_ms: u64, drift_ppm: i64, wall_start_ms: u64) -> Self {
        Self {
            since_ms: 0,
            boot_start_ms: uptime_ms,
            rate_ppm: rate(drift_ppm),
            wall_start_ms,
            wall_right_ms: wall_start_ms,
        }
    }

    /// The machine booted again: its boot clock starts anew.
    pub fn reboot(&mut self, true_ms: u64, after_ms: u64) {
        (self.since_ms, self.boot_start_ms) = (true_ms, after_ms);
    }

    /// The machine is up: a boot that was to come later has come by now.
    pub fn runs_by(&mut self, true_ms: u64) {
        self.since_ms = self.since_ms.min(true_ms);
    }

    /// The boot clock runs fast by `drift_ppm` from now on.
    pub fn set_drift(&mut self, true_ms: u64, drift_ppm: i64) {
        let boot_ms = self.now(true_ms).boot_ms;
        (self.since_ms, self.boot_start_ms) = (true_ms, boot_ms);
        self.rate_ppm = rate(drift_ppm);
    }

    /// The boot clock jumps: what no sound machine does.
    pub fn step_boot(&mut self, true_ms: u64, by_ms: i64) {
        let boot_ms = self.now(true_ms).boot_ms.saturating_add_signed(by_ms);
        (self.since_ms, self.boot_start_ms) = (true_ms, boot_ms);
    }

    /// The wall clock jumps.
    pub fn step_wall(&mut self, by_ms: i64) {
        self.wall_start_ms = self.wall_start_ms.saturating_add_signed(by_ms);
    }

    /// Undo every jump of the wall clock.
    pub fn set_wall_right(&mut self) {
        self.wall_start_ms = self.wall_right_ms;
    }

    /// How far the wall clock is from where it stood before anybody stepped it.
    #[must_use]
    pub fn wall_error_ms(&self) -> u64 {
        self.wall_start_ms.abs_diff(self.wall_right_ms)
    }

    /// What the clocks say at `true_ms`.
    #[must_use]
    pub fn now(&self, true_ms: u64) -> Now {
        let passed = u128::from(true_ms.saturating_sub(self.since_ms));
        Now {
            boot_ms: self.boot_start_ms + narrow(passed * self.rate_ppm / WHOLE_PPM),
            wall_ms: self.wall_start_ms + true_ms,
        }
    }

    /// The first true time at which the boot clock says `boot_ms` or more.
    #[must_use]
    pub fn true_at(&self, boot_ms: u64) -> u64 {
        let own = u128::from(boot_ms.saturating_sub(self.boot_start_ms));
        self.since_ms.saturating_add(narrow((own * WHOLE_PPM).div_ceil(self.rate_ppm)))
    }
}

fn rate(drift_ppm: i64) -> u128 {
    u128::try_from(1_000_000 + i128::from(drift_ppm)).unwrap_or(1).max(1)
}

fn narrow(ms: u128) -> u64 {
    u64::try_from(ms).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_time_is_reached_at_its_true_time_and_not_a_millisecond_earlier() {
        for drift_ppm in [-50_000, -500, -17, 0, 400, 500, 50_000] {
            let mut clock = Clock::new(5_000, drift_ppm, WALL_START_MS);
            clock.reboot(70_000, 3);
            for boot_ms in [3, 4, 999, 10_000, 123_457, 86_400_000] {
                let at_ms = clock.true_at(boot_ms);
                assert!(clock.now(at_ms).boot_ms >= boot_ms);
                assert!(at_ms == 70_000 || clock.now(at_ms - 1).boot_ms < boot_ms);
            }
        }
    }

    #[test]
    fn a_boot_clock_that_changes_its_rate_goes_on_from_where_it_stood() {
        let mut clock = Clock::new(1_000, 0, WALL_START_MS);
        clock.set_drift(10_000, 50_000);
        assert_eq!(clock.now(10_000).boot_ms, 11_000);
        assert_eq!(clock.now(20_000).boot_ms, 21_500);
        clock.step_boot(20_000, -500);
        assert_eq!(clock.now(20_000).boot_ms, 21_000);
        clock.step_wall(-7_000);
        assert_eq!(clock.now(20_000).wall_ms, WALL_START_MS + 13_000);
        clock.set_wall_right();
        assert_eq!(clock.now(20_000).wall_ms, WALL_START_MS + 20_000);
    }
}
