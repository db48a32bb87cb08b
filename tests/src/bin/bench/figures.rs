//! What is measured of many runs, of a process, and of the machine.

use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};

/// How long each of many runs took, in milliseconds, sorted.
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn of(mut times: Vec<f64>) -> Result<Self> {
        ensure!(!times.is_empty(), "no runs, no figures");
        times.sort_by(f64::total_cmp);
        Ok(Self(times))
    }

    /// The value that `percent` of all do not exceed.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0[rank - 1]
    }

    pub(crate) fn min(&self) -> f64 {
        self.0[0]
    }
}

/// What a process takes of memory.
pub(crate) struct Memory {
    pub(crate) rss_mib: f64,
    /// Pages that it shares with others count in part.
    pub(crate) pss_mib: f64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        Ok(Self { rss_mib: kib(pid, "Rss:")? / 1024.0, pss_mib: kib(pid, "Pss:")? / 1024.0 })
    }
}

fn kib(pid: u32, name: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("no {name} in {path}"))
}

/// By all threads so far, those that ended included, on any core.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name in parentheses may have anything in it; user and system time are the
    // 12th and 13th fields behind it.
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: Vec<u64> = fields.skip(11).take(2).filter_map(|it| it.parse().ok()).collect();
    ensure!(ticks.len() == 2, "no times in {path}");
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(ticks.iter().sum::<u64>() as f64 / per_second as f64)
}

/// Processes that ran or wanted to, over one, five and fifteen minutes.
pub(crate) fn load_average() -> Result<String> {
    let path = "/proc/loadavg";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}

pub(crate) fn machine() -> String {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cores} cores of {model}, Linux {}", kernel.trim())
}
