//! Daemons in the background: starting one, waiting for it, ending it.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions, Permissions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{Me, path},
    home::Home,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

use crate::{client::Client, home::StartLock, problem::Problem};

/// What a daemon in the background says on its standard output once its API answers.
pub(crate) const READY_LINE: &str = "ready";
/// Drivers of GPUs may take many seconds to wake up.
const START_WITHIN: Duration = Duration::from_secs(60);
/// A daemon that is ending finishes what it has begun.
const END_WITHIN: Duration = Duration::from_secs(15);
/// One that closed the connection instead of answering is on its way out.
const END_UNANSWERED_WITHIN: Duration = Duration::from_secs(2);
/// Of its log, shown where it did not start.
const TAIL_LINES: usize = 8;
const TAIL_BYTES: u64 = 8 << 10;

/// Starts `p2pit daemon` with `flags` in `home`, in a session of its own, and returns once
/// its API answers; or connects to one that another command has just started.
pub(crate) async fn start(home: &Home, flags: &[OsString]) -> anyhow::Result<Client> {
    let lock_home = home.clone();
    let _lock = tokio::task::spawn_blocking(move || StartLock::take(&lock_home)).await??;
    if let Some(client) = Client::connect(home).await? {
        return Ok(client);
    }
    let log_path = home.daemon_log();
    let log =
        open_log(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let log_start = log.metadata()?.len();
    let mut child = spawn(home, flags, log)?;
    let mut said = String::new();
    let stdout = child.stdout.take().context("the daemon's output is not connected")?;
    let mut stdout = BufReader::new(stdout);
    let ready = timeout(START_WITHIN, stdout.read_line(&mut said)).await;
    if ready.is_ok() && said.trim_end() == READY_LINE {
        // From here on it lives without the command that started it.
        std::mem::forget(child);
        let client = Client::connect(home).await?;
        return client.ok_or_else(|| not_started(&log_path, log_start, "ended at once").into());
    }
    let what = match ready {
        Ok(_) => match child.wait().await?.code() {
            Some(code) => format!("ended with exit code {code}"),
            None => "was killed".to_owned(),
        },
        Err(_) => {
            child.kill().await?;
            format!("did not answer within {} s", START_WITHIN.as_secs())
        }
    };
    Err(not_started(&log_path, log_start, &what).into())
}

/// This program, also where an upgrade has replaced its file.
pub(crate) fn this_program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

/// Asks a daemon to end and returns once it has.
pub(crate) async fn end(client: &Client, pid: u32) -> anyhow::Result<()> {
    let process = Process::of(pid)?;
    let asked = client.post_empty(path::SHUTDOWN).await;
    // One with nothing to finish may be gone before its answer is out.
    let limit = if asked.is_ok() { END_WITHIN } else { END_UNANSWERED_WITHIN };
    if process.gone_within(limit).await? {
        return Ok(());
    }
    asked?;
    let message = format!("the daemon (process {pid}) does not end");
    Err(Problem::broken(message).hint(format!("`kill -9 {pid}` ends it; jobs go on")).into())
}

/// Whether a daemon was started by a command for itself, and ends by itself.
pub(crate) fn is_on_demand(me: &Me) -> bool {
    let arguments = std::fs::read(format!("/proc/{}/cmdline", me.pid)).unwrap_or_default();
    arguments.split(|byte| *byte == 0).any(|argument| argument == IDLE_EXIT.as_bytes())
}

/// The option that makes a daemon end by itself.
pub(crate) const IDLE_EXIT: &str = "--idle-exit";

/// A process that is not a child of this one, without danger of taking another of the same
/// number for it.
#[derive(Debug)]
pub(crate) struct Process {
    /// `None` where it is gone already.
    fd: Option<OwnedFd>,
}

impl Process {
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process id")?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Self { fd: Some(fd) }),
            Err(rustix::io::Errno::SRCH) => Ok(Self { fd: None }),
            Err(e) => Err(e).context("a process cannot be watched"),
        }
    }

    /// Waits for its end; whether it came.
    pub(crate) async fn gone_within(self, limit: Duration) -> anyhow::Result<bool> {
        tokio::task::spawn_blocking(move || self.wait(limit)).await?
    }

    /// As [`Self::gone_within`], blocking.
    pub(crate) fn wait(&self, limit: Duration) -> anyhow::Result<bool> {
        let Some(fd) = &self.fd else { return Ok(true) };
        let limit = rustix::event::Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&limit)).context("a process cannot be waited for")? > 0)
    }
}

fn spawn(home: &Home, flags: &[OsString], log: File) -> anyhow::Result<tokio::process::Child> {
    let program = this_program();
    let mut command = Command::new(&program);
    command
        .arg("--home")
        .arg(home.path())
        .args(["daemon", "--announce"])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .current_dir("/")
        .kill_on_drop(true);
    // SAFETY: setsid is async-signal-safe and touches no memory of this process.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn().with_context(|| format!("cannot start {}", program.display()))
}

fn open_log(path: &Path) -> io::Result<File> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    log.set_permissions(Permissions::from_mode(0o600))?;
    Ok(log)
}

fn not_started(log: &Path, start: u64, what: &str) -> Problem {
    let problem =
        Problem::broken(format!("the daemon {what}")).hint(format!("its log is {}", log.display()));
    match tail(log, start) {
        Ok(tail) if !tail.is_empty() => problem.excerpt(tail),
        Ok(_) | Err(_) => problem,
    }
}

/// The last lines of what was written behind `start`.
fn tail(path: &Path, start: u64) -> io::Result<String> {
    let mut log = File::open(path)?;
    let length = log.metadata()?.len();
    log.seek(SeekFrom::Start(start.max(length.saturating_sub(TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    log.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_is_what_this_start_wrote_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.log");
        std::fs::write(&path, "old\n").unwrap();
        let lines: Vec<String> = (0..20).map(|i| format!("line {i}\n")).collect();
        std::fs::write(&path, format!("old\n{}", lines.concat())).unwrap();
        let tail = tail(&path, 4).unwrap();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.starts_with("line 12\n") && tail.ends_with("line 19"), "{tail}");
        std::fs::write(&path, "old\n").unwrap();
        assert_eq!(super::tail(&path, 4).unwrap(), "");
    }

    #[tokio::test]
    async fn the_end_of_a_foreign_process_is_seen_at_once_and_its_life_too() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(!process.wait(Duration::ZERO).unwrap());
        child.kill().unwrap();
        assert!(process.gone_within(Duration::from_secs(10)).await.unwrap());
        child.wait().unwrap();
        assert!(Process::of(child.id()).unwrap().wait(Duration::ZERO).unwrap());
    }
}
