//! What the machine has.

use std::{path::Path, thread::available_parallelism};

/// Cores and main memory in MiB that this process may use: the affinity mask and the
/// limits of a container count.
pub fn machine_resources() -> (u32, u64) {
    let cores = available_parallelism().map_or(1, |count| count.get());
    let cores = u32::try_from(cores).unwrap_or(u32::MAX);
    let installed = read("/proc/meminfo").and_then(|text| total_mib(&text));
    let limits = CGROUP_LIMITS.iter().filter_map(read).filter_map(|t| limit_mib(&t));
    let ram_mib = installed.into_iter().chain(limits).min().unwrap_or(0);
    (cores, ram_mib)
}

/// As a container sees its own: version 2, then version 1.
const CGROUP_LIMITS: [&str; 2] =
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

/// `None` for `max`. Version 1 says "no limit" with a number beyond any machine's.
fn limit_mib(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok().map(|bytes| bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_at_least_a_core_and_some_memory() {
        let (cores, ram_mib) = machine_resources();
        assert!(cores >= 1 && ram_mib > 64, "{cores} cores, {ram_mib} MiB");
    }

    #[test]
    fn memory_is_read_from_the_kernels_texts() {
        let meminfo = "MemTotal:       24618260 kB\nMemFree:         1000 kB\n";
        assert_eq!(total_mib(meminfo), Some(24_041));
        assert_eq!(total_mib("MemFree: 1000 kB\n"), None);
        assert_eq!(limit_mib("1073741824\n"), Some(1024));
        assert_eq!(limit_mib("max\n"), None);
    }
}
