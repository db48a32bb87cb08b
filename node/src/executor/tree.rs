//! Processes by ancestry, read from `/proc`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::OwnedFd,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// The longest chain of parents that is followed; the kernel nests at most 32 PID
/// namespaces, and within one a chain is as long as its forks.
const ANCESTRY_LEN_MAX: usize = 1 << 16;

/// A process that cannot be mistaken for a later one with the same number in this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) pid: i32,
    /// In clock ticks since boot.
    pub(super) start_ticks: u64,
}

impl Identity {
    pub(super) fn of(pid: Pid) -> io::Result<Self> {
        let pid = pid.as_raw_nonzero().get();
        let stat = read_stat(pid)?;
        Ok(Self { pid, start_ticks: stat.start_ticks })
    }

    /// A descriptor of the process, or `None` if it has ended.
    pub(super) fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The descriptor pins one process; only now is it known which.
        match read_stat(self.pid) {
            Ok(stat) if stat.start_ticks == self.start_ticks && !stat.ended => Ok(Some(fd)),
            Ok(_) => Ok(None),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ESRCH) =>
            {
                Ok(None)
            }
            // Unread, as for want of descriptors: it may well be there.
            Err(error) => Err(error),
        }
    }
}

/// Whether `pid` is `ancestor` or was started below it. In an isolated tree, orphans
/// become children of the tree's first process, so the answer holds for daemonised
/// processes too.
#[must_use]
pub fn descends_from(pid: u32, ancestor: u32) -> bool {
    let mut current = pid;
    for _ in 0..ANCESTRY_LEN_MAX {
        if current == ancestor {
            return true;
        }
        let Some(stat) = i32::try_from(current).ok().and_then(|pid| read_stat(pid).ok()) else {
            return false;
        };
        match u32::try_from(stat.parent) {
            Ok(parent) if parent > 0 => current = parent,
            _ => return false,
        }
    }
    false
}

/// Sends `signals` to everything below `root`, which itself stays. Returns how many
/// processes were there that had not ended.
pub(super) fn signal_descendants(root: Pid, signals: &[Signal]) -> io::Result<usize> {
    let descendants = descendants(root.as_raw_nonzero().get())?;
    let mut refused = None;
    for identity in &descendants {
        let Some(fd) = identity.open()? else { continue };
        for &signal in signals {
            match pidfd_send_signal(&fd, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => refused = Some(error),
            }
        }
    }
    match refused {
        Some(error) => Err(error.into()),
        None => Ok(descendants.len()),
    }
}

fn descendants(root: i32) -> io::Result<Vec<Identity>> {
    let mut children: BTreeMap<i32, Vec<(Identity, bool)>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process that ended since the listing is none of ours any more.
        let Ok(stat) = read_stat(pid) else { continue };
        let identity = Identity { pid, start_ticks: stat.start_ticks };
        children.entry(stat.parent).or_default().push((identity, stat.ended));
    }
    let mut found = Vec::new();
    let mut seen = BTreeSet::from([root]);
    let mut queue = vec![root];
    while let Some(parent) = queue.pop() {
        for (identity, ended) in children.remove(&parent).unwrap_or_default() {
            if seen.insert(identity.pid) {
                queue.push(identity.pid);
                if !ended {
                    found.push(identity);
                }
            }
        }
    }
    Ok(found)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    parent: i32,
    start_ticks: u64,
    /// A zombie, or about to vanish.
    ended: bool,
}

fn read_stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// `PID (NAME) STATE PPID …`, where NAME may contain anything.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    const PARENT: usize = 1;
    const START_TICKS: usize = 19;
    let name_end = text.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(text.get(name_end + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        parent: fields.get(PARENT)?.parse().ok()?,
        start_ticks: fields.get(START_TICKS)?.parse().ok()?,
        ended: matches!(*fields.first()?, "Z" | "X" | "x"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_blanks_and_brackets_does_not_confuse_the_reader() {
        let text = b"77 (a) Z 1 (b) S 42 77 77 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 991 10 20\n";
        let stat = Stat { parent: 42, start_ticks: 991, ended: false };
        assert_eq!(parse_stat(text), Some(stat));
        assert_eq!(parse_stat(b"77 (a"), None);
        assert_eq!(parse_stat(b"77 (a) S"), None);
    }

    #[test]
    fn a_child_descends_from_its_parent_and_not_the_other_way_round() {
        let own = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(descends_from(child.id(), own));
        assert!(!descends_from(own, child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
