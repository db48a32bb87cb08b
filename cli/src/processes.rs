//! Processes of this program that belong to a directory: daemons by their home,
//! supervisors by their run directory.

use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

use crate::{daemon_process::Process, problem::Problem};

/// After SIGKILL a process is gone as soon as the kernel gets to it.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// Ends every process of this program that names something in `dir`: friendly, and by
/// force after `grace`. A supervisor takes the processes of its job with it. Blocks.
pub(crate) fn end_below(dir: &Path, grace: Duration) -> anyhow::Result<()> {
    end(dir, Signal::TERM, grace)?;
    if below(dir)?.is_empty() {
        return Ok(());
    }
    end(dir, Signal::KILL, KILLED_WITHIN)?;
    let left = below(dir)?;
    if left.is_empty() {
        return Ok(());
    }
    let left: Vec<String> = left.iter().map(ToString::to_string).collect();
    Err(Problem::broken(format!("processes {} do not end", left.join(", "))).into())
}

fn end(dir: &Path, signal: Signal, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let mut processes = Vec::new();
    for pid in below(dir)? {
        let process = Process::of(pid)?;
        // Between the look and the handle the number may have become another's.
        if !belongs(pid, dir, &own_program()?) {
            continue;
        }
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // One that is gone already is what is wanted.
            let _ = kill_process(pid, signal);
        }
        processes.push(process);
    }
    for process in processes {
        process.wait(deadline.saturating_duration_since(Instant::now()))?;
    }
    Ok(())
}

fn below(dir: &Path) -> anyhow::Result<Vec<u32>> {
    let program = own_program()?;
    let me = std::process::id();
    let processes = fs::read_dir("/proc").context("the processes cannot be listed")?;
    let pids = processes
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.filter(|pid| *pid != me && belongs(*pid, dir, &program)).collect())
}

/// Device and inode of a program's file, whatever it is called.
type Program = (u64, u64);

fn own_program() -> anyhow::Result<Program> {
    let file = fs::metadata("/proc/self/exe").context("this program's file cannot be found")?;
    Ok((file.dev(), file.ino()))
}

fn belongs(pid: u32, dir: &Path, program: &Program) -> bool {
    let exe = fs::metadata(format!("/proc/{pid}/exe"));
    if !exe.is_ok_and(|file| (file.dev(), file.ino()) == *program) {
        return false;
    }
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments
        .split(|byte| *byte == 0)
        .any(|argument| Path::new(std::ffi::OsStr::from_bytes(argument)).starts_with(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_processes_of_this_program_that_name_the_directory_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap();
        let mut foreign = std::process::Command::new("sh")
            .args(["-c", "read line"])
            .arg(path.join("n1"))
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert!(below(&path).unwrap().is_empty(), "another program's");
        end_below(&path, Duration::from_secs(5)).unwrap();
        assert!(foreign.try_wait().unwrap().is_none(), "it lives on");
        drop(foreign.stdin.take());
        foreign.wait().unwrap();
    }

    #[test]
    fn a_process_of_this_program_that_names_the_directory_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::tests::a_process_that_was_told_to_waits"])
            .arg(path.join("n1"))
            .env(WAIT, "1")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        assert_eq!(below(&path).unwrap(), [child.id()]);
        end_below(&path, Duration::from_secs(5)).unwrap();
        assert!(!child.wait().unwrap().success());
    }

    /// Set for the process that the test above starts.
    const WAIT: &str = "P2PIT_TEST_WAIT";

    #[test]
    fn a_process_that_was_told_to_waits() {
        if std::env::var_os(WAIT).is_some() {
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
    }
}
