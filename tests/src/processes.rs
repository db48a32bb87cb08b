//! Processes of this machine that belong to a pool or to a job.

use std::{
    ffi::OsStr,
    fs,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::Path,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::wait_until;

/// A killed process is gone as soon as the kernel gets to it.
const KILLED_WITHIN: Duration = Duration::from_secs(20);

/// One process, and no other that gets its number later.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// `None` where it is gone.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
        Some(Self { pid, fd: pidfd_open(raw, PidfdFlags::empty()).ok()? })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// One that is gone already is not signalled.
    pub fn signal(&self, signal: Signal) {
        // Fails for nothing else: all processes here are this user's own.
        let _ = pidfd_send_signal(&self.fd, signal);
    }

    /// Gone, or dead and not yet buried by its parent.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Ends it by force, and returns once it has ended.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
        wait_until("a killed process ends", KILLED_WITHIN, || self.has_ended().then_some(()));
    }

    /// Whose child it is.
    #[must_use]
    pub fn parent(&self) -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
    }

    /// Main memory that it has in use.
    #[must_use]
    pub fn rss_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    }

    /// How many descriptors it has open.
    #[must_use]
    pub fn descriptors(&self) -> Option<usize> {
        Some(fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.count())
    }

    /// The words of its command line.
    #[must_use]
    pub fn command_line(&self) -> Vec<String> {
        let words = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let words = words.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    }
}

/// Every process that names something in `dir`, on its command line or in its environment:
/// daemons, supervisors, and what jobs have started.
#[must_use]
pub fn mentioning(dir: &Path) -> Vec<Process> {
    let needle = dir.as_os_str();
    select(|pid| names(pid, "cmdline", needle) || names(pid, "environ", needle))
}

/// Every process whose environment says that it is of this job.
#[must_use]
pub fn of_job(job: &str) -> Vec<Process> {
    let needle = format!("JOB_ID={job}");
    select(|pid| names(pid, "environ", needle.as_ref()))
}

/// Ends everything that [`mentioning`] finds, by force; what appears meanwhile, too.
pub fn end_all(dir: &Path) {
    wait_until("the processes of a pool end", KILLED_WITHIN, || {
        let left = mentioning(dir);
        left.iter().for_each(|process| process.signal(Signal::KILL));
        left.is_empty().then_some(())
    });
}

fn select(belongs: impl Fn(u32) -> bool) -> Vec<Process> {
    let me = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let opened = pids.filter(|pid| *pid != me && belongs(*pid)).filter_map(Process::of);
    // Asked again with the handle in hand: the number may have become another's.
    opened.filter(|process| !process.has_ended() && belongs(process.pid)).collect()
}

fn names(pid: u32, what: &str, needle: &OsStr) -> bool {
    let needle = needle.as_bytes();
    // A process that is gone, or that is somebody else's, names nothing.
    let text = fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
    text.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_found_by_what_it_names_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut children = [
            Command::new("sh").args(["-c", "read line"]).arg(dir.path().join("home")),
            Command::new("sh").args(["-c", "read line"]).env("JOB_DIR", dir.path().join("home")),
        ]
        .map(|command| command.stdin(Stdio::piped()).spawn().unwrap());
        let mut foreign =
            Command::new("sh").args(["-c", "read line"]).stdin(Stdio::piped()).spawn().unwrap();
        wait_until("both are seen", KILLED_WITHIN, || {
            (mentioning(dir.path()).len() == 2).then_some(())
        });
        end_all(dir.path());
        assert!(children.iter_mut().all(|child| !child.wait().unwrap().success()));
        assert!(foreign.try_wait().unwrap().is_none());
        drop(foreign.stdin.take());
        foreign.wait().unwrap();
    }
}
