//! The two clocks of this machine.

use p2pit_protocol::Now;

/// Boot clock and wall clock, now.
pub(crate) fn now() -> Now {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let wall = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Now { boot_ms: milliseconds(boot), wall_ms: milliseconds(wall) }
}

fn milliseconds(time: rustix::time::Timespec) -> u64 {
    // Neither clock is before its epoch on a running system; one that is reads as 0.
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds * 1_000 + nanoseconds / 1_000_000
}
