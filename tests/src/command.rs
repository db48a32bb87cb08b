//! One command: started, watched, and waited for.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::wait_until;

/// No command of a test takes this long unless it hangs.
const COMMAND_WITHIN: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);

/// A command that is over.
#[derive(Debug)]
pub struct Ended {
    line: String,
    /// 128 + n where signal n ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// What it printed, where it succeeded.
    ///
    /// # Panics
    /// Where it did not.
    #[track_caller]
    pub fn ok(self) -> String {
        self.ended(0);
        self.stdout
    }

    /// Ended with this code.
    ///
    /// # Panics
    /// Where it ended with another.
    #[track_caller]
    pub fn ended(&self, code: i32) {
        assert_eq!(self.code, code, "{}", self.describe());
    }

    /// Ended with this code, nothing on standard output, and an error on standard error
    /// that has these parts in this order.
    ///
    /// # Panics
    /// Where it did not.
    #[track_caller]
    pub fn refused(&self, code: i32, parts: &[&str]) {
        self.ended(code);
        assert_eq!(self.stdout, "", "{}", self.describe());
        let mut rest = self.stderr.as_str();
        for part in ["error: "].iter().chain(parts) {
            let Some(at) = rest.find(part) else {
                panic!("{part:?} is not said: {}", self.describe());
            };
            rest = &rest[at + part.len()..];
        }
    }

    fn describe(&self) -> String {
        let Self { line, code, stdout, stderr } = self;
        format!("`{line}` ended with {code}\n--- stdout\n{stdout}--- stderr\n{stderr}---")
    }
}

/// A command that may still run. Dropped, it is killed.
///
/// Its output goes to files: it can be read while it runs, and a daemon that inherited it
/// by mistake would hold nobody up.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    deadline: Instant,
}

impl Running {
    /// Starts a command in a process group of its own, with its output in `scratch`.
    ///
    /// # Panics
    /// Where it cannot be started.
    #[must_use]
    pub fn start(mut command: Command, scratch: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let [stdout, stderr] = ["out", "err"].map(|what| scratch.join(format!("{n}.{what}")));
        let [out, err] = [&stdout, &stderr].map(|path| {
            File::create(path).unwrap_or_else(|e| panic!("cannot create {}: {e}", path.display()))
        });
        let words = command.get_args().map(|word| word.to_string_lossy().into_owned());
        let line = words.collect::<Vec<_>>().join(" ");
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let child = command.spawn().unwrap_or_else(|e| {
            panic!("cannot start {}: {e}", command.get_program().to_string_lossy())
        });
        let deadline = Instant::now() + COMMAND_WITHIN;
        Self { line, child, stdout, stderr, deadline }
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Returns once standard output has `text`.
    ///
    /// # Panics
    /// Where that takes too long, or the command ends without it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let left = self.deadline.saturating_duration_since(Instant::now());
        wait_until(&format!("`{}` prints {text:?}", self.line), left, || {
            let has_ended = self.try_wait().is_some();
            let is_there = read(&self.stdout).contains(text);
            assert!(is_there || !has_ended, "`{}` ended without {text:?}", self.line);
            is_there.then_some(())
        });
    }

    /// As Ctrl-C in a terminal: to the command and whatever it has started.
    pub fn interrupt(&mut self) {
        if let Some(pid) = self.unreaped() {
            // Fails only where all of them have ended.
            let _ = kill_process_group(pid, Signal::INT);
        }
    }

    /// To the command alone.
    pub fn signal(&mut self, signal: Signal) {
        if let Some(pid) = self.unreaped() {
            let _ = kill_process(pid, signal);
        }
    }

    /// Returns once it is over.
    ///
    /// # Panics
    /// Where it takes longer than any command may.
    #[track_caller]
    #[must_use]
    pub fn end(mut self) -> Ended {
        let code = loop {
            if let Some(code) = self.try_wait() {
                break code;
            }
            if Instant::now() > self.deadline {
                panic!(
                    "`{}` does not end\n--- stdout\n{}--- stderr\n{}---",
                    self.line,
                    self.stdout(),
                    self.stderr()
                );
            }
            std::thread::sleep(POLL);
        };
        Ended { line: self.line.clone(), code, stdout: self.stdout(), stderr: self.stderr() }
    }

    /// As [`Self::end`], by a time of the caller's; `None` where it has not ended by then: it is
    /// killed.
    pub(crate) fn end_by(mut self, deadline: Instant) -> Option<Ended> {
        loop {
            if let Some(code) = self.try_wait() {
                let (stdout, stderr) = (self.stdout(), self.stderr());
                return Some(Ended { line: self.line.clone(), code, stdout, stderr });
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(POLL);
        }
    }

    fn try_wait(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.child.try_wait().expect("a child can be waited for")?;
        status.code().or_else(|| status.signal().map(|signal| 128 + signal))
    }

    /// Its id, while that cannot be another's.
    fn unreaped(&mut self) -> Option<Pid> {
        if self.try_wait().is_some() {
            return None;
        }
        Pid::from_raw(i32::try_from(self.child.id()).ok()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Does nothing to one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}
