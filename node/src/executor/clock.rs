//! The two clocks of the executor.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Milliseconds since boot, suspend included.
pub(super) fn boot_ms() -> u64 {
    milliseconds(clock_gettime(ClockId::Boottime))
}

/// Milliseconds since the Unix epoch.
pub(super) fn wall_ms() -> u64 {
    milliseconds(clock_gettime(ClockId::Realtime))
}

/// Tells one boot of the machine from another.
pub(crate) fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn milliseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000)
}
