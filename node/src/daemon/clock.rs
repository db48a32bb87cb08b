//! The two clocks of this machine.

use p2pit_protocol::Now;

/// Boot clock and wall clock, now.
pub(crate) fn now() -> Now {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Now { boot_ms: milliseconds(boot), wall_ms: wall_ms() }
}

/// Milliseconds since the Unix epoch, by this machine's wall clock.
#[must_use]
pub fn wall_ms() -> u64 {
    let wall = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    milliseconds(wall).saturating_add_signed(offset_ms())
}

/// By how much this process's wall clock is off, for tests of what others say to that.
#[cfg(debug_assertions)]
fn offset_ms() -> i64 {
    static OFFSET_MS: std::sync::OnceLock<i64> = std::sync::OnceLock::new();
    *OFFSET_MS.get_or_init(|| crate::config::env::for_tests(crate::config::env::CLOCK_OFFSET_MS))
}

#[cfg(not(debug_assertions))]
const fn offset_ms() -> i64 {
    0
}

fn milliseconds(time: rustix::time::Timespec) -> u64 {
    // Neither clock is before its epoch on a running system; one that is reads as 0.
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds * 1_000 + nanoseconds / 1_000_000
}
