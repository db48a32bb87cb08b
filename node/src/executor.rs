//! Runs processes of jobs on this machine, below supervisors that outlive the daemon.
//!
//! ```text
//! daemon ──socket── supervisor ──channel── guard ── main process ── …
//!                       │ reads output, keeps the log, deadlines, result
//! ```
//!
//! A **supervisor** is this program again, started as `supervise RUN_DIR` in a session of
//! its own. It starts a **guard**, the root of the process tree; the guard makes the
//! sandbox, starts the command and ends only when the whole tree has. Whichever of the
//! three dies, the tree below it ends, save that the daemon's death ends nothing: the next
//! daemon finds the run directory and connects again.
//!
//! What a caller may rely on:
//!
//! - A [`ProcessId`] is started at most once, as long as its run directory is there.
//! - Every started process yields one [`ProcessEvent::Ended`] and then
//!   [`ProcessEvent::Gone`], whatever dies in between and across daemons, until
//!   [`Executor::forget`].
//! - The result is on disk before it is announced, and after [`ProcessEvent::Gone`] no
//!   process of the tree is left.
//! - A process that asks for [`Isolation::Isolated`] never runs with less.

mod clock;
mod control;
mod guard;
pub(crate) mod log;
mod ownership;
mod privileges;
mod program;
mod run_dir;
mod sandbox;
mod spec;
mod supervisor;
mod sys;
mod text;
mod tree;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context as _;
use thiserror::Error;
use tokio::sync::{mpsc, watch as latest};

pub(crate) use self::clock::boot_id;
pub use self::{
    log::append_to_log,
    ownership::prepare_ownership,
    spec::{
        Command, Deadline, Ended, Ending, ExitStatus, InvalidProcessId, Isolation,
        JOB_LABEL_LEN_MAX, JOB_UID, LOG_BYTES_MAX, LogState, ProcessId, ProcessSpec, RunAs,
        SandboxPlan, Usage,
    },
    supervisor::supervise_main,
    tree::descends_from,
};
pub(crate) use self::{program::interpreter, text::shortened};

use self::{
    control::{Order, encode},
    run_dir::{Launch, RunDir},
    watch::Watch,
};

/// Events of one process that its caller has not taken yet.
const EVENTS_MAX: usize = 64;
/// Orders to one process that are not written yet.
const ORDERS_MAX: usize = 16;
/// A reason is a sentence; longer ones are cut.
const REASON_BYTES_MAX: usize = 1024;
/// How long a supervisor may take to leave once its result is recorded.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
const LEAVE_POLL: Duration = Duration::from_millis(5);
/// In listings of processes.
const SUPERVISOR_NAME: &str = "p2pit";
const PROBE_PREFIX: &str = "probe~";
/// A sandbox is made in milliseconds, or not at all.
const PROBE_WITHIN_MS: u64 = 20_000;

/// A standard error that nobody reads, in whose queue `held` lie: descriptors in flight
/// stay open as long as the socket that could receive them, which is the supervisor's and
/// its guard's, and no program of the job can take them out of it (see unix(7)).
fn hand_down(held: &[OwnedFd]) -> anyhow::Result<Stdio> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    if held.is_empty() {
        return Ok(Stdio::null());
    }
    anyhow::ensure!(held.len() <= HELD_MAX, "{} descriptors to be held", held.len());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let borrowed: Vec<_> = held.iter().map(std::os::fd::AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HELD_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    anyhow::ensure!(
        control.push(SendAncillaryMessage::ScmRights(&borrowed)),
        "too many descriptors"
    );
    sendmsg(&ours, &[io::IoSlice::new(b".")], &mut control, SendFlags::empty())
        .context("cannot hand down descriptors")?;
    Ok(Stdio::from(OwnedFd::from(theirs)))
}

/// Descriptors that one process can hold: one for each GPU it may be given.
const HELD_MAX: usize = 64;

/// Starts and finds the processes of one daemon.
#[derive(Debug, Clone)]
pub struct Executor {
    run_root: PathBuf,
    supervisor: SupervisorCommand,
    boot_id: String,
}

/// How to start a supervisor: `exe args… RUN_DIR`, with nothing but `env` in its
/// environment.
#[derive(Debug, Clone)]
pub struct SupervisorCommand {
    pub exe: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
}

impl SupervisorCommand {
    /// This program's hidden subcommand `supervise`.
    pub fn of_this_program() -> io::Result<Self> {
        // By this link, and not by the path behind it: that one leads nowhere, or to
        // another version, once an upgrade has replaced the file.
        let exe = PathBuf::from("/proc/self/exe");
        exe.read_link()?;
        Ok(Self { exe, args: vec!["supervise".into()], env: Vec::new() })
    }
}

/// News of one process. The first is `Started` unless it ended without, the last are
/// `Ended` and `Gone`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It executes its command. Every process of it [descends from](descends_from) `pid`.
    Started { pid: u32, boot_ms: u64 },
    /// The size of the log, now and then while it grows.
    LogGrew { bytes: u64 },
    /// Output is being lost; the process goes on.
    LogTrouble { reason: String },
    /// How the process ended. Its log is complete.
    Ended(Ended),
    /// Nothing of its tree is left.
    Gone,
}

/// A process that runs, or whose last events have not been taken yet.
#[derive(Debug)]
pub struct Running {
    pub id: ProcessId,
    /// Closes after [`ProcessEvent::Gone`].
    pub events: mpsc::Receiver<ProcessEvent>,
    pub control: Control,
}

/// Orders to one process. They are in vain, not wrong, once it has ended.
#[derive(Debug, Clone)]
pub struct Control {
    orders: mpsc::Sender<Order>,
    asked: latest::Sender<Option<Deadline>>,
    held: latest::Receiver<Option<Deadline>>,
}

/// A supervisor that lives has not confirmed a deadline, because it is stopped or cannot be
/// reached: the deadline it had still counts. Asking again is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "its supervisor does not answer, and {}",
    match .held {
        Some(Deadline(Some(at))) => format!("ends the process at {at} ms of the boot clock"),
        Some(Deadline(None)) => "has no deadline".to_owned(),
        None => "never said which deadline it has".to_owned(),
    }
)]
pub struct Unconfirmed {
    /// What it said last.
    pub held: Option<Deadline>,
}

impl Control {
    /// SIGTERM to the whole tree, SIGKILL when the grace (by default that of the spec) is
    /// over. The reason becomes part of the ending.
    pub async fn stop(&self, grace_ms: Option<u64>, reason: &str) {
        self.order(Order::Stop { grace_ms, reason: shorten(reason) }).await;
    }

    /// SIGKILL to the whole tree.
    pub async fn kill(&self, reason: &str) {
        self.order(Order::Kill { reason: shorten(reason) }).await;
    }

    /// The lease ends then, whoever is alive then; see [`Deadline::moved`] about an earlier
    /// one. Said until the supervisor hears it, if that takes a reconnection. Of several only
    /// the last counts.
    pub fn set_deadline(&self, deadline: Deadline) {
        self.asked.send_modify(|asked| {
            *asked = Some(asked.map_or(deadline, |asked| asked.moved(deadline)));
        });
    }

    /// Waits until the supervisor has what [`Control::set_deadline`] asked for last, or until
    /// the process is over.
    ///
    /// # Errors
    /// [`Unconfirmed`] if that is not so `within` the given time.
    pub async fn deadline_confirmed(&self, within: Duration) -> Result<(), Unconfirmed> {
        let mut held = self.held.clone();
        let confirmed = held.wait_for(|held| {
            let asked = *self.asked.borrow();
            asked.is_none_or(|asked| held.is_some_and(|held| held.covers(asked)))
        });
        match tokio::time::timeout(within, confirmed).await {
            // An error means that the process is over.
            Ok(Ok(_) | Err(_)) => Ok(()),
            Err(_) => Err(Unconfirmed { held: *self.held.borrow() }),
        }
    }

    async fn order(&self, order: Order) {
        // Fails when the process is over.
        let _ = self.orders.send(order).await;
    }
}

/// What a restarted daemon finds of a process.
#[derive(Debug)]
pub enum Adopted {
    Running(Running),
    /// It is over and nothing of it is left.
    Ended(Ended),
}

#[derive(Debug, Error)]
pub enum StartError {
    /// It was started before; its run directory says what became of it.
    #[error("process {0} was already started")]
    AlreadyExists(ProcessId),
    #[error("process {id} cannot be run: {reason}")]
    Invalid { id: ProcessId, reason: String },
    /// Nothing was started.
    #[error("cannot start the supervisor of process {id}")]
    Supervisor { id: ProcessId, source: anyhow::Error },
}

impl Executor {
    /// Keeps run directories below `run_root`, which only the daemon may enter and no job
    /// sees.
    pub fn new(run_root: &Path, supervisor: SupervisorCommand) -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(run_root)
            .with_context(|| format!("cannot make {}", run_root.display()))?;
        let run_root = run_root
            .canonicalize()
            .with_context(|| format!("cannot resolve {}", run_root.display()))?;
        let boot_id = clock::boot_id().context("cannot read the boot id")?;
        Ok(Self { run_root, supervisor, boot_id })
    }

    /// Whether processes can be isolated on this machine, found out by running one that
    /// looks for its own run directory.
    pub async fn probe(&self) -> Isolation {
        match self.try_isolation().await {
            Ok(()) => Isolation::Isolated,
            Err(error) => Isolation::Shared { reason: format!("{error:#}") },
        }
    }

    /// Starts one process. Its id is used up, unless this fails with
    /// [`StartError::Invalid`] or [`StartError::Supervisor`].
    pub async fn start(&self, id: &ProcessId, spec: ProcessSpec) -> Result<Running, StartError> {
        self.start_holding(id, spec, Vec::new()).await
    }

    /// As [`Executor::start`]. The descriptors stay open until the supervisor and the whole
    /// tree are gone, whatever becomes of this daemon: locks of what the process uses.
    pub async fn start_holding(
        &self,
        id: &ProcessId,
        spec: ProcessSpec,
        held: Vec<OwnedFd>,
    ) -> Result<Running, StartError> {
        // Files and a vfork: too long for a thread that has other things to do.
        let (executor, own_id) = (self.clone(), id.clone());
        tokio::task::spawn_blocking(move || executor.start_here(own_id, spec, &held))
            .await
            .unwrap_or_else(|error| {
                Err(StartError::Supervisor { id: id.clone(), source: error.into() })
            })
    }

    /// Finds what this daemon or an earlier one started and has not forgotten. For the time
    /// before this daemon starts anything itself.
    pub async fn adopt(&self) -> anyhow::Result<Vec<(ProcessId, Adopted)>> {
        let context = || format!("cannot list {}", self.run_root.display());
        let mut found = Vec::new();
        let mut entries = tokio::fs::read_dir(&self.run_root).await.with_context(context)?;
        while let Some(entry) = entries.next_entry().await.with_context(context)? {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with(PROBE_PREFIX)) {
                continue;
            }
            let Some(id) = name.to_str().and_then(|name| name.parse::<ProcessId>().ok()) else {
                tracing::warn!(path = %entry.path().display(), "not a run directory");
                continue;
            };
            match self.adopt_one(&id) {
                Ok(adopted) => found.push((id, adopted)),
                // One damaged directory must not keep a daemon from its other processes.
                Err(reason) => {
                    tracing::warn!(%id, reason = format!("{reason:#}"), "cannot be adopted");
                }
            }
        }
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(found)
    }

    /// Removes what is known of a process that has ended, once its result is recorded.
    /// Fails while its supervisor still has a tree to look after.
    pub async fn forget(&self, id: &ProcessId) -> anyhow::Result<()> {
        use tokio::io::AsyncWriteExt as _;
        let run_dir = self.run_dir(id);
        if !id.is_valid() || !run_dir.path().exists() {
            return Ok(());
        }
        let is_gone = || run_dir.try_lock().map(|lock| lock.is_some());
        if !is_gone()? {
            // It may hold a result that did not fit on the disk, and then waits for this.
            if let Ok(mut stream) = watch::connect(run_dir.path()).await {
                // Unwritten only if the supervisor is leaving.
                let _ = stream.write_all(&encode(&Order::Release)).await;
            }
            let leaving = async {
                while !is_gone()? {
                    tokio::time::sleep(LEAVE_POLL).await;
                }
                io::Result::Ok(())
            };
            tokio::time::timeout(LEAVE_WITHIN, leaving)
                .await
                .with_context(|| format!("process {id} is not over yet"))??;
        }
        run_dir.remove().with_context(|| format!("cannot remove {}", run_dir.path().display()))
    }

    fn start_here(
        &self,
        id: ProcessId,
        spec: ProcessSpec,
        held: &[OwnedFd],
    ) -> Result<Running, StartError> {
        if let Err(reason) = self.check(&id, &spec) {
            return Err(StartError::Invalid { id, reason });
        }
        let run_dir = self.run_dir(&id);
        match run_dir.create() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StartError::AlreadyExists(id));
            }
            Err(error) => {
                let source = anyhow::Error::new(error)
                    .context(format!("cannot make {}", run_dir.path().display()));
                return Err(StartError::Supervisor { id, source });
            }
        }
        let (boot_id, run_root) = (self.boot_id.clone(), self.run_root.clone());
        let launch = Launch { id: id.clone(), boot_id, run_root, spec };
        self.spawn(&run_dir, &launch, held).map_err(|source| StartError::Supervisor {
            id,
            // A directory that cannot be removed is found, and reported as a failed start,
            // by the next adoption.
            source: match run_dir.remove() {
                Ok(()) => source,
                Err(error) => source.context(error),
            },
        })
    }

    fn run_dir(&self, id: &ProcessId) -> RunDir {
        RunDir::at(self.run_root.join(id.to_string()))
    }

    fn check(&self, id: &ProcessId, spec: &ProcessSpec) -> Result<(), String> {
        if !id.is_valid() {
            return Err("its job id cannot be a directory name".into());
        }
        let is_plain = |path: &Path| {
            path.is_absolute()
                && path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
        };
        let places = sandbox::places(spec);
        for path in places.keys().chain([&spec.log_path]) {
            if !is_plain(path) || path.parent().is_none() {
                return Err(format!("{} is no plain absolute path", path.display()));
            }
        }
        let hidden = spec.sandbox.hidden.iter().chain([&self.run_root]);
        for hidden in hidden.filter(|_| spec.isolation.is_isolated()) {
            if let Some(place) = places.keys().find(|place| hidden.starts_with(place)) {
                let (hidden, place) = (hidden.display(), place.display());
                return Err(format!("{hidden} is to be hidden, but is shown with {place}"));
            }
        }
        // The supervisor may be root, and must not write where a job could put a link.
        let exposed = places.iter().find(|(place, rw)| **rw && spec.log_path.starts_with(place));
        if let Some((place, _)) = exposed {
            return Err(format!("its log lies in {}, where it can write", place.display()));
        }
        if let Command::Script { path } = &spec.command
            && !path.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
        {
            return Err(format!("{} is no path within the work directory", path.display()));
        }
        if let Some(name) =
            spec.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0']))
        {
            return Err(format!("{name:?} is no name of an environment variable"));
        }
        let as_root = match spec.run_as {
            Some(ids) => ids.uid == 0 || ids.gid == 0,
            None => RunAs::for_this_daemon().is_some(),
        };
        if as_root {
            return Err("a job never runs as root".into());
        }
        Ok(())
    }

    /// Starts the supervisor with its end of a connection and with the lock, which this
    /// process gives up by closing its copy.
    fn spawn(
        &self,
        run_dir: &RunDir,
        launch: &Launch,
        held: &[OwnedFd],
    ) -> anyhow::Result<Running> {
        let lock = run_dir.try_lock()?.context("its run directory is in use")?;
        run_dir.write_launch(launch)?;
        let (own, theirs) = std::os::unix::net::UnixStream::pair()?;
        own.set_nonblocking(true)?;
        let own = tokio::net::UnixStream::from_std(own)?;
        let child = tokio::process::Command::new(&self.supervisor.exe)
            .arg0(SUPERVISOR_NAME)
            .args(&self.supervisor.args)
            .arg(run_dir.path())
            .env_clear()
            .envs(self.supervisor.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(OwnedFd::from(lock)))
            .stderr(hand_down(held)?)
            .kill_on_drop(false)
            .spawn()
            .with_context(|| format!("cannot execute {}", self.supervisor.exe.display()))?;
        let held = Some(launch.spec.deadline);
        Ok(self.watch(launch.id.clone(), run_dir.clone(), held, Some(child), Some(own)))
    }

    fn watch(
        &self,
        id: ProcessId,
        run_dir: RunDir,
        held: Option<Deadline>,
        child: Option<tokio::process::Child>,
        stream: Option<tokio::net::UnixStream>,
    ) -> Running {
        let (event_sender, events) = mpsc::channel(EVENTS_MAX);
        let (orders, order_receiver) = mpsc::channel(ORDERS_MAX);
        let (asked, asked_receiver) = latest::channel(None);
        let (held_sender, held) = latest::channel(held);
        let watch = Watch {
            run_dir,
            boot_id: self.boot_id.clone(),
            events: event_sender,
            orders: order_receiver,
            asked: asked_receiver,
            held: held_sender,
            child,
        };
        tokio::spawn(watch.run(stream));
        Running { id, events, control: Control { orders, asked, held } }
    }

    fn adopt_one(&self, id: &ProcessId) -> anyhow::Result<Adopted> {
        let run_dir = self.run_dir(id);
        // What only looks gone would be run elsewhere, and so twice: where it cannot be told
        // whether it is there, it is, until its watch has found out.
        let may_be_there = match run_dir.try_lock() {
            Ok(None) => true,
            Ok(Some(_)) => match watch::open_tree(&run_dir, &self.boot_id) {
                Ok(tree) => tree.is_some(),
                Err(reason) => {
                    tracing::warn!(%id, reason = format!("{reason:#}"), "its processes cannot be looked for");
                    true
                }
            },
            Err(reason) if reason.kind() == io::ErrorKind::NotFound => {
                return Err(reason).with_context(|| format!("cannot adopt process {id}"));
            }
            Err(reason) => {
                tracing::warn!(%id, %reason, "it cannot be told whether its supervisor lives");
                true
            }
        };
        if may_be_there {
            return Ok(Adopted::Running(self.watch(id.clone(), run_dir, None, None, None)));
        }
        Ok(Adopted::Ended(watch::last_word(&run_dir, &self.boot_id)))
    }

    async fn try_isolation(&self) -> anyhow::Result<()> {
        let dir = tempfile::Builder::new().prefix(PROBE_PREFIX).tempdir_in(&self.run_root)?;
        let dirs = ["work", "job", "tmp"].map(|name| dir.path().join(name));
        for dir in &dirs {
            std::fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let run_as = RunAs::for_this_daemon();
        prepare_ownership(&dirs, run_as)?;
        let probe = Self::new(&dir.path().join("run"), self.supervisor.clone())?;
        let id = ProcessId { job: "probe".into(), attempt: 0, rank: 0 };
        let [work_dir, job_dir, tmp_dir] = dirs;
        let secret = probe.run_dir(&id).path().to_string_lossy().into_owned();
        let spec = ProcessSpec {
            command: Command::Direct { text: r#"test ! -e "$SECRET/spec.json""#.into() },
            work_dir,
            job_dir,
            tmp_dir,
            writable: Vec::new(),
            read_only: Vec::new(),
            env: [("SECRET".to_owned(), secret)].into(),
            log_path: dir.path().join("log"),
            log_bytes_max: 1 << 16,
            time_limit_ms: Some(PROBE_WITHIN_MS),
            deadline: Deadline(None),
            grace_ms: 0,
            run_as,
            isolation: Isolation::Isolated,
            sandbox: SandboxPlan { hidden: vec![self.run_root.clone()] },
        };
        let mut running = probe.start(&id, spec).await?;
        while let Some(event) = running.events.recv().await {
            if let ProcessEvent::Ended(ended) = event {
                return match ended.ending {
                    Ending::Exited { code: 0 } => Ok(()),
                    Ending::FailedToStart { reason } => Err(anyhow::Error::msg(reason)),
                    other => anyhow::bail!("a trial process ended unexpectedly: {other:?}"),
                };
            }
        }
        anyhow::bail!("the trial process vanished")
    }
}

fn shorten(reason: &str) -> String {
    text::shortened(reason.to_owned(), REASON_BYTES_MAX)
}
