//! What is asked of an executor and how a process ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The longest job label in a process id; it is part of a directory name.
pub const JOB_LABEL_LEN_MAX: usize = 128;
/// What one process may log before further output is dropped.
pub const LOG_BYTES_MAX: u64 = 1 << 30;
/// The uid and gid of jobs under a daemon that runs as root. Above every range that
/// distributions and systemd hand out, below 2³¹ for tools that keep a uid signed.
pub const JOB_UID: u32 = 1_900_000_000;

/// One rank of one attempt of a job. It is started at most once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The job's id as text: letters, digits, `-` and `_`.
    pub job: String,
    pub attempt: u32,
    pub rank: u32,
}

impl ProcessId {
    /// Whether the job label can be a part of a directory name.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        !self.job.is_empty()
            && self.job.len() <= JOB_LABEL_LEN_MAX
            && self.job.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.job, self.attempt, self.rank)
    }
}

/// A text that is not a process id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a process id")]
pub struct InvalidProcessId(String);

impl FromStr for ProcessId {
    type Err = InvalidProcessId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidProcessId(text.to_owned());
        let mut parts = text.split('.');
        let (Some(job), Some(attempt), Some(rank), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(invalid());
        };
        let id = Self {
            job: job.to_owned(),
            attempt: attempt.parse().map_err(|_| invalid())?,
            rank: rank.parse().map_err(|_| invalid())?,
        };
        // The canonical form only: two directories for one id would be two starts.
        if id.is_valid() && id.to_string() == text { Ok(id) } else { Err(invalid()) }
    }
}

/// Everything a supervisor needs to run one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    pub command: Command,
    /// Where the command starts; writable.
    pub work_dir: PathBuf,
    /// The job's directory with `keep/` and the artifacts; writable.
    pub job_dir: PathBuf,
    /// The process's own scratch directory on disk, writable: `HOME`, and inside the
    /// sandbox also `/tmp` and `/var/tmp`.
    pub tmp_dir: PathBuf,
    /// Further directories it may write.
    pub writable: Vec<PathBuf>,
    /// Directories and files below hidden places that it may read.
    pub read_only: Vec<PathBuf>,
    /// The environment besides `PATH`, `HOME`, `TMPDIR`, `USER`, `LOGNAME`, `LANG` and
    /// `PWD`, which have defaults and may be overridden here.
    pub env: BTreeMap<String, String>,
    /// The log that lines are appended to; outside of everything the job can write.
    pub log_path: PathBuf,
    /// Output beyond this size of the log is dropped, with a note.
    pub log_bytes_max: u64,
    /// How long the process may run, from its start, suspend of the machine included.
    pub time_limit_ms: Option<u64>,
    /// When the lease given at the start runs out. If that is past, nothing is executed.
    // Named so by older daemons, whose processes are adopted.
    #[serde(rename = "deadline_boot_ms")]
    pub deadline: Deadline,
    /// Between SIGTERM and SIGKILL where no other grace is given.
    pub grace_ms: u64,
    /// Who the process runs as; `None` keeps the daemon's uid.
    pub run_as: Option<RunAs>,
    /// What [`Executor::probe`](super::Executor::probe) found. A process that asks for
    /// isolation and cannot have it fails to start; it never runs without.
    pub isolation: Isolation,
    pub sandbox: SandboxPlan,
}

/// What a process executes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// A file in the work dir. Its `#!` line names the interpreter; without one it is
    /// executed if its mode says so, and read by bash otherwise.
    Script { path: PathBuf },
    /// Text run by `bash -c`, or `sh -c` where there is no bash.
    Direct { text: String },
}

/// Uid and gid of a job under a daemon that runs as root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunAs {
    pub uid: u32,
    pub gid: u32,
}

impl RunAs {
    /// Where this process is root: [`JOB_UID`], or in a container that has no such id the
    /// highest it has. `None` where it is not, or is called root without having any other
    /// id, as in a rootless container.
    #[must_use]
    pub fn for_this_daemon() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        // Without a map there are no user namespaces, and so all ids.
        let pick = |map| std::fs::read_to_string(map).map_or(Some(JOB_UID), |map| job_id_in(&map));
        Some(Self { uid: pick("/proc/self/uid_map")?, gid: pick("/proc/self/gid_map")? })
    }
}

/// How far a process is kept apart from the rest of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Own mount, PID, IPC and UTS namespaces, and a user namespace.
    Isolated,
    /// No namespaces: the process sees what the uid it runs as may see.
    Shared { reason: String },
}

impl Isolation {
    #[must_use]
    pub fn is_isolated(&self) -> bool {
        matches!(self, Self::Isolated)
    }
}

/// What an isolated process must not see, besides homes, `/run` and the executor's own
/// directories, which are always hidden.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxPlan {
    /// Directories appear empty, other files as `/dev/null`; missing ones are skipped.
    pub hidden: Vec<PathBuf>,
}

impl SandboxPlan {
    /// Hides the homes that this machine's `passwd` names, the one in `HOME`, and
    /// `extra`, such as the homes of the daemons.
    #[must_use]
    pub fn for_host(extra: impl IntoIterator<Item = PathBuf>) -> Self {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let mut hidden: BTreeSet<PathBuf> = homes_in(&passwd).collect();
        hidden.extend(std::env::home_dir().filter(|home| may_hide(home)));
        hidden.extend(extra);
        Self { hidden: hidden.into_iter().collect() }
    }
}

/// The final word about a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub ending: Ending,
    /// When it ended, on the boot clock of the boot it ended in.
    pub boot_ms: u64,
    /// When it ended, in milliseconds since the Unix epoch.
    pub wall_ms: u64,
    pub usage: Usage,
    pub log: LogState,
    /// Why this could not be written to disk yet, as on a full one. The supervisor holds
    /// it in memory and tries again until [`Executor::forget`](super::Executor::forget).
    pub unsaved: Option<String>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// By itself, with this code.
    Exited { code: i32 },
    /// By a signal that did not come from here.
    Signaled { signal: i32 },
    /// Stopped because it had run for as long as its job may.
    TimedOut { status: ExitStatus },
    /// Stopped because its lease ran out; `None` where that was so before it could start.
    LeaseEnded { status: Option<ExitStatus> },
    /// Stopped on request.
    Stopped { reason: String, status: ExitStatus },
    /// No instruction of the command was executed.
    FailedToStart { reason: String },
    /// It is over, but nobody saw how.
    Lost { reason: String },
}

/// When a supervisor ends its process, on the boot clock, which goes on while the machine is
/// suspended; `None`: no lease binds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Deadline(pub Option<u64>);

impl Deadline {
    /// What holds once `asked` was heard: of two times the later, since a renewal that comes
    /// late must not take back another. No deadline stays none until one is set.
    #[must_use]
    pub fn moved(self, asked: Self) -> Self {
        match (self.0, asked.0) {
            (Some(held), Some(asked)) => Self(Some(held.max(asked))),
            _ => asked,
        }
    }

    /// Whether hearing `asked` would change nothing.
    #[must_use]
    pub fn covers(self, asked: Self) -> bool {
        self.moved(asked) == self
    }
}

/// What the kernel said about the main process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    Code(i32),
    Signal(i32),
}

/// What the whole process tree used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    /// Of the largest single process.
    pub rss_bytes_max: u64,
}

/// What became of the output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    /// The size of the log file.
    pub bytes: u64,
    /// Output bytes that are not in the log.
    pub bytes_lost: u64,
    /// The last reason why a line could not be written.
    pub trouble: Option<String>,
}

/// Whether hiding `path` leaves a system to run in.
pub(super) fn may_hide(path: &Path) -> bool {
    const SYSTEM: [&str; 12] = [
        "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/dev", "/proc", "/sys",
        "/nix", "/gnu",
    ];
    const ALONE: [&str; 3] = ["/", "/var", "/opt"];
    path.is_absolute()
        && !path.components().any(|c| c == Component::ParentDir)
        && !SYSTEM.iter().any(|system| path.starts_with(system))
        && !ALONE.iter().any(|alone| path == Path::new(alone))
}

/// The id for jobs among those of a user namespace, given as lines of `inside outside count`.
fn job_id_in(map: &str) -> Option<u32> {
    let highest = map.lines().filter_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let (first, _, count) =
            (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        if (first..first + count).contains(&u64::from(JOB_UID)) {
            return Some(JOB_UID);
        }
        let last = first + count.checked_sub(1)?;
        u32::try_from(last).ok().filter(|last| (1..JOB_UID).contains(last))
    });
    highest.max()
}

/// Homes of root and of people; system users keep theirs in places jobs may need.
fn homes_in(passwd: &str) -> impl Iterator<Item = PathBuf> {
    const UID_PEOPLE_MIN: u32 = 1000;
    const UID_NOBODY: u32 = 65534;
    passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let uid: u32 = fields.get(2)?.parse().ok()?;
        let home = PathBuf::from(fields.get(5)?);
        let person = uid == 0 || (uid >= UID_PEOPLE_MIN && uid != UID_NOBODY);
        (person && may_hide(&home)).then_some(home)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_id_reads_back_from_its_directory_name() {
        let id = ProcessId { job: "k7-Q_x".into(), attempt: 3, rank: 12 };
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn a_deadline_only_moves_away_and_is_lifted_until_another_is_set() {
        let [none, early, late] = [None, Some(5), Some(9)].map(Deadline);
        for (held, asked, then) in [
            (early, late, late),
            (late, early, late),
            (late, none, none),
            (none, none, none),
            (none, early, early),
        ] {
            assert_eq!(held.moved(asked), then, "{held:?} {asked:?}");
            assert!(then.covers(asked), "{held:?} {asked:?}");
            assert_eq!(held.covers(asked), held == then, "{held:?} {asked:?}");
        }
    }

    #[test]
    fn names_that_are_no_process_ids_are_refused() {
        for text in ["", "a", "a.1", "a.1.2.3", "a.01.2", "a/b.1.2", "..1.2", "a.-1.2", ".1.2"] {
            assert!(text.parse::<ProcessId>().is_err(), "{text}");
        }
    }

    #[test]
    fn jobs_of_root_get_an_id_that_the_container_has() {
        assert_eq!(job_id_in("         0          0 4294967295\n"), Some(JOB_UID));
        assert_eq!(job_id_in("0 1000 1\n1 100000 65536\n"), Some(65536));
        assert_eq!(job_id_in("0 1000 1\n"), None);
        assert_eq!(job_id_in("junk\n0 0 0\n"), None);
    }

    #[test]
    fn homes_of_people_are_hidden_but_system_directories_never() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbin:x:2:2::/bin:/x\nalice:x:1000:1000::/data/alice:/b\n\
                      nobody:x:65534:65534::/nonexistent:/x\nodd:x:1001:1001::/:/b\nshort:x\n\
                      svc:x:1002:1002::/usr/share/svc:/b\n";
        let homes: Vec<_> = homes_in(passwd).collect();
        assert_eq!(homes, [PathBuf::from("/root"), PathBuf::from("/data/alice")]);
    }
}
