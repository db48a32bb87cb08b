//! The process between a supervisor and a job: the root of the job's process tree.
//!
//! Isolated, it is the first process of the job's PID namespace: whatever it leaves behind
//! the kernel ends with it. Shared, it is a child subreaper, so that orphans of the job
//! become its children, and it walks the tree. Either way it ends only when nothing of the
//! tree is left, and it ends the tree when its supervisor goes away: the channel closes,
//! and if isolated the kernel kills it by the parent-death signal as well.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
    process::{Pid, Resource, Signal, getpid},
    time::Timespec,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    privileges,
    program::{self, Candidate},
    run_dir::Launch,
    sandbox,
    spec::{ExitStatus, RunAs},
    sys::{self, Pointers, Side, Waited},
    text, tree,
};

/// What a supervisor tells its guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToGuard {
    /// The tree is on record; begin.
    Go,
    /// The ids are mapped.
    Mapped,
    /// SIGTERM to the whole tree; what is left when the main process ends may go on until
    /// `Kill`.
    Term,
    /// SIGKILL to the whole tree.
    Kill,
}

/// What a guard tells its supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromGuard {
    /// It is in a user namespace that has no ids yet.
    NeedsMapping,
    /// The command is being executed.
    Started,
    Failed {
        reason: String,
    },
    MainEnded {
        status: ExitStatus,
    },
}

/// No message is longer; reasons are cut.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 10;
const REASON_BYTES_MAX: usize = 4 << 10;
/// Between two walks over a tree that is being killed, at most.
const SWEEP_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// The kernel's out-of-memory killer takes jobs before anything of the machine's owner.
const OOM_SCORE: &[u8] = b"500";

/// The guard's whole life.
pub(super) fn run(launch: &Launch, channel: OwnedFd, output: OwnedFd) -> ! {
    let code = match Guard::begin(launch, channel, output) {
        Ok(guard) => guard.watch(),
        // The supervisor is gone or the tree cannot be watched: nothing was started, or
        // what was started ends with this process.
        Err(_) => 1,
    };
    sys::exit_now(code)
}

/// Receives one message, or `None` when the other side is gone.
pub(super) fn receive<T: DeserializeOwned>(channel: &OwnedFd) -> Result<Option<T>> {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    match rustix::io::retry_on_intr(|| recv(channel, &mut buffer, RecvFlags::empty())) {
        Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(None),
        Ok((_, len)) => Ok(Some(serde_json::from_slice(&buffer[..len])?)),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn transmit(channel: &OwnedFd, message: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(message)?;
    rustix::io::retry_on_intr(|| send(channel, &bytes, SendFlags::NOSIGNAL))?;
    Ok(())
}

#[derive(Debug)]
struct Guard {
    isolated: bool,
    channel: OwnedFd,
    children: OwnedFd,
    main: Pid,
    main_ended: bool,
    stopping: bool,
}

impl Guard {
    fn begin(launch: &Launch, channel: OwnedFd, output: OwnedFd) -> Result<Self> {
        let [channel, output] = sys::keep_only([channel, output])?;
        match Self::start(launch, &channel, output) {
            Ok((main, children)) => {
                transmit(&channel, &FromGuard::Started)?;
                let isolated = launch.spec.isolation.is_isolated();
                Ok(Self { isolated, channel, children, main, main_ended: false, stopping: false })
            }
            Err(error) => {
                let reason = text::shortened(format!("{error:#}"), REASON_BYTES_MAX);
                transmit(&channel, &FromGuard::Failed { reason })?;
                Err(error)
            }
        }
    }

    fn start(launch: &Launch, channel: &OwnedFd, output: OwnedFd) -> Result<(Pid, OwnedFd)> {
        rustix::thread::set_name(c"p2pit-guard")?;
        // Not the supervisor's: what is made here is for the job to see, and the job's own.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let children = sys::signal_fd(&[libc::SIGCHLD])?;
        expect(channel, ToGuard::Go)?;
        leave_keyring()?;
        // Here, because the process inherits it and could not set it any more.
        volunteer_when_memory_is_short().context("cannot set the out-of-memory score")?;
        let spec = &launch.spec;
        let main = if spec.isolation.is_isolated() {
            sandbox::enter(launch)?;
            isolate_user(channel, spec.run_as)?;
            Main::prepare(launch, Rights::None)?
        } else {
            rustix::process::set_child_subreaper(Some(getpid()))?;
            rustix::process::chdir("/")?;
            Main::prepare(launch, Rights::OfGuard(spec.run_as))?
        };
        Ok((main.start(output)?, children))
    }

    fn watch(mut self) -> i32 {
        loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(())) => return 0,
                // Without its channel or its children's signals it cannot guard; ending
                // ends the tree.
                Err(_) => {
                    let _ = self.end_all();
                    return 1;
                }
            }
        }
    }

    /// One event; `Some` when nothing is left to guard.
    fn turn(&mut self) -> Result<Option<()>> {
        let (signalled, spoken) = {
            let mut fds = [
                PollFd::new(&self.children, PollFlags::IN),
                PollFd::new(&self.channel, PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
            (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
        };
        if signalled {
            drain(&self.children);
            let left = self.reap()?;
            if !left {
                // Orphans would be its children, too: there is nothing to look for.
                return Ok(Some(()));
            }
            if self.main_ended && !self.stopping {
                self.end_all()?;
                return Ok(Some(()));
            }
        }
        if spoken {
            match receive(&self.channel)? {
                Some(ToGuard::Term) => {
                    self.stopping = true;
                    // A stopped process takes SIGTERM only once it continues.
                    self.signal(&[Signal::TERM, Signal::CONT])?;
                }
                Some(ToGuard::Go | ToGuard::Mapped) => {}
                Some(ToGuard::Kill) | None => {
                    self.end_all()?;
                    return Ok(Some(()));
                }
            }
        }
        Ok(None)
    }

    /// Collects the children that have ended. Returns whether any is left.
    fn reap(&mut self) -> Result<bool> {
        loop {
            match sys::wait_any(false)? {
                Waited::Child { pid, status, .. } => self.note(pid, status)?,
                Waited::NoneYet => return Ok(true),
                Waited::NoChildren => return Ok(false),
            }
        }
    }

    fn note(&mut self, pid: i32, status: ExitStatus) -> Result<()> {
        if pid == self.main.as_raw_nonzero().get() {
            self.main_ended = true;
            // A supervisor that is gone needs no news; the tree ends all the same.
            let _ = transmit(&self.channel, &FromGuard::MainEnded { status });
        }
        Ok(())
    }

    /// Kills the tree until nothing of it is left.
    fn end_all(&mut self) -> Result<()> {
        loop {
            self.signal(&[Signal::KILL])?;
            if !self.reap()? {
                return Ok(());
            }
            let mut fds = [PollFd::new(&self.children, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut fds, Some(&SWEEP_EVERY)))?;
            drain(&self.children);
        }
    }

    fn signal(&self, signals: &[Signal]) -> Result<()> {
        if self.isolated {
            for signal in signals {
                sys::kill_namespace(signal.as_raw())?;
            }
        } else {
            tree::signal_descendants(getpid(), signals)?;
        }
        Ok(())
    }
}

/// The main process, with all that can be done before it exists.
#[derive(Debug)]
struct Main {
    candidates: Vec<Candidate>,
    env: Pointers,
    work_dir: std::path::PathBuf,
    rights: Rights,
}

/// What the process still has to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    /// Nothing: the guard gave up everything itself.
    None,
    /// A guard without namespaces keeps its rights, so that the job cannot signal it where
    /// it is root; the process becomes the given user.
    OfGuard(Option<RunAs>),
}

/// Where the start of the main process failed, in one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session,
    Output,
    User,
    Privileges,
    WorkDir,
    Limits,
    Execute,
}

const STEPS: [(Step, &str); 7] = [
    (Step::Session, "cannot start a session"),
    (Step::Output, "cannot connect the output"),
    (Step::User, "cannot become the job's user"),
    (Step::Privileges, "cannot give up privileges"),
    (Step::WorkDir, "cannot enter the work directory"),
    (Step::Limits, "cannot set limits"),
    (Step::Execute, "cannot execute the command"),
];

impl Main {
    fn prepare(launch: &Launch, rights: Rights) -> Result<Self> {
        let env = program::environment(&launch.spec);
        Ok(Self {
            candidates: program::candidates(&launch.spec, &env)?,
            env: program::encode_environment(&env)?,
            work_dir: launch.spec.work_dir.clone(),
            rights,
        })
    }

    /// Returns once the command is being executed, or with the reason why it cannot.
    fn start(&self, output: OwnedFd) -> Result<Pid> {
        let input = File::open("/dev/null").context("cannot open /dev/null")?.into();
        let (mut failure, report) = io::pipe().context("cannot make a pipe")?;
        let pid = match sys::fork().context("cannot fork")? {
            Side::Parent(pid) => pid,
            Side::Child => {
                let (step, error) = self.become_command(&input, &output);
                let mut text = vec![step as u8];
                text.extend(error.to_ne_bytes());
                // The guard reads a missing report as a failure too, by the exit code.
                let _ = (&report).write_all(&text);
                sys::exit_now(127)
            }
        };
        drop((output, report));
        let mut text = Vec::new();
        failure.read_to_end(&mut text).context("cannot read from the new process")?;
        let Some((&step, errno)) = text.split_first() else { return Ok(pid) };
        let errno = errno.try_into().map(i32::from_ne_bytes).unwrap_or(libc::EIO);
        let what = STEPS.iter().find(|(known, _)| *known as u8 == step);
        let what = what.map_or("cannot start", |(_, what)| what);
        let place = if step == Step::WorkDir as u8 {
            format!(" {}", self.work_dir.display())
        } else {
            String::new()
        };
        Err(anyhow!(io::Error::from_raw_os_error(errno)).context(format!("{what}{place}")))
    }

    /// In the forked child; returns only if it fails.
    fn become_command(&self, input: &OwnedFd, output: &OwnedFd) -> (Step, i32) {
        let failed = |step, error: Errno| (step, error.raw_os_error());
        sys::reset_signals();
        if let Err(error) = rustix::process::setsid() {
            return failed(Step::Session, error);
        }
        if let Err(error) = sys::set_stdio(input, output) {
            return (Step::Output, error.raw_os_error().unwrap_or(libc::EIO));
        }
        if let Rights::OfGuard(run_as) = self.rights {
            if let Err(error) = run_as.map_or(Ok(()), privileges::become_user) {
                return failed(Step::User, error);
            }
            if let Err(error) = privileges::drop_all() {
                return failed(Step::Privileges, error);
            }
            // After the change of user, which clears it.
            let death = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            if let Err(error) = death {
                return failed(Step::Privileges, error);
            }
        }
        if let Err(error) = rustix::process::chdir(&self.work_dir) {
            return failed(Step::WorkDir, error);
        }
        if let Err(error) = limit_core_files() {
            return failed(Step::Limits, error);
        }
        let mut last = libc::ENOENT;
        for candidate in &self.candidates {
            last = sys::execute(&candidate.program, &candidate.args, &self.env);
            if !matches!(last, libc::ENOENT | libc::ENOEXEC | libc::EACCES) {
                break;
            }
        }
        (Step::Execute, last)
    }
}

fn limit_core_files() -> rustix::io::Result<()> {
    let mut limit = rustix::process::getrlimit(Resource::Core);
    limit.current = Some(0);
    rustix::process::setrlimit(Resource::Core, limit)
}

fn volunteer_when_memory_is_short() -> rustix::io::Result<()> {
    use rustix::fs::{Mode, OFlags, open};
    let file = open("/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    match file.and_then(|file| rustix::io::write(file, OOM_SCORE)) {
        // Refused only where the machine's owner already set a higher score.
        Ok(_) | Err(Errno::ACCESS | Errno::PERM) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The last steps of isolation: ids of its own and nothing to regain any with.
fn isolate_user(channel: &OwnedFd, run_as: Option<RunAs>) -> Result<()> {
    if let Some(run_as) = run_as {
        match sys::unshare_user() {
            Ok(()) => {
                transmit(channel, &FromGuard::NeedsMapping)?;
                expect(channel, ToGuard::Mapped)?;
            }
            // Switched off on this machine: the uid alone has no rights either.
            Err(Errno::NOSPC | Errno::PERM | Errno::INVAL | Errno::NOSYS) => {}
            Err(error) => return Err(error).context("cannot make a user namespace"),
        }
        privileges::become_user(run_as).context("cannot become the job's user")?;
    }
    privileges::drop_all().context("cannot give up privileges")?;
    // After the change of user, which clears it. The job cannot trace a guard that is not
    // dumpable.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

fn expect(channel: &OwnedFd, expected: ToGuard) -> Result<()> {
    match receive::<ToGuard>(channel)? {
        Some(message) if message == expected => Ok(()),
        Some(_) => bail!("stopped before it began"),
        None => bail!("the supervisor is gone"),
    }
}

/// A kernel without keyrings, or one that forbids their use, has nothing to leave.
fn leave_keyring() -> Result<()> {
    match sys::join_fresh_keyring() {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
        Err(error) => Err(error).context("cannot leave the keyring of the daemon"),
    }
}

/// Empties a signal descriptor; the children themselves tell what happened.
fn drain(signals: &OwnedFd) {
    let mut buffer = [0; 1024];
    while rustix::io::read(signals.as_fd(), &mut buffer).is_ok_and(|len| len > 0) {}
}
