//! The small process beside each job process. It outlives the daemon, keeps the log,
//! enforces the deadlines, and has the last word about how the process ended.
//!
//! One thread, one poll loop, no runtime: it may live for weeks beside every process.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use p2pit_protocol::bidder::LEASE_GRACE_MS;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::{Pid, PidfdFlags, Signal, getegid, geteuid, getpid, pidfd_open, pidfd_send_signal},
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};

use super::{
    clock::{boot_ms, wall_ms},
    control::{Event, LINE_BYTES_MAX, Order, encode, next_line},
    guard::{self, FromGuard, ToGuard},
    log::JobLog,
    run_dir::{CONTROL_SOCKET, Launch, ResultSlot, RunDir, Tree},
    sandbox,
    spec::{Deadline, Ended, Ending, ExitStatus, Isolation, LogState, ProcessSpec, RunAs, Usage},
    sys::{self, Side, Waited},
    tree::{self, Identity},
};

/// The longest from the end of a lease to SIGKILL. Peers count on nothing running
/// [`LEASE_GRACE_MS`] past it; the rest is for the tree to die in, if need be with its guard.
const LEASE_KILL_MS: u64 = LEASE_GRACE_MS - 1_000;
/// A daemon, its successor, and whoever looks on.
const CLIENTS_MAX: usize = 8;
/// Unread events of one client; a client further behind is dropped and may reconnect.
const OUTGOING_BYTES_MAX: usize = 4 * LINE_BYTES_MAX;
/// How long a guard that was told to kill the tree may take before it is killed itself.
const GUARD_KILL_MS: u64 = 500;
/// How long the end of the main process waits for the end of its tree before it is
/// announced: processes that the kernel cannot end, as in a broken driver, must not hide it.
const DRAIN_MS: u64 = 2_000;
/// Between two attempts to write a result to a full disk.
const SAVE_EVERY_MS: u64 = 1_000;
/// Between two walks over what a lost guard left behind.
const SWEEP_EVERY_MS: u64 = 20;
/// Between two reports of a growing log.
const LOG_NOTICE_MS: u64 = 50;
/// Read from the job per turn, so that a chatty one cannot keep orders waiting.
const READ_BYTES: usize = 64 << 10;
/// What is still read when the tree is over or given up on.
const LAST_READS_MAX: usize = 64;
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

const EXIT_DONE: i32 = 0;
const EXIT_REFUSED: i32 = 1;

/// The whole life of the hidden subcommand `supervise RUN_DIR`.
///
/// To be called before the program makes a thread. Standard input is a connected socket to
/// the daemon, standard output the locked lock file of the run directory; both are replaced
/// by `/dev/null`. Standard error is never written, and holds what the process holds. The exit status tells the daemon nothing that the run directory does not.
#[must_use]
pub fn supervise_main(run_dir: &Path) -> i32 {
    match begin(run_dir) {
        Ok(Some((mut supervisor, outcome))) => {
            supervisor.outcome = outcome.err().map(|error| Outcome::Failed(format!("{error:#}")));
            supervisor.run();
            EXIT_DONE
        }
        Ok(None) | Err(_) => EXIT_REFUSED,
    }
}

/// Detaches from the daemon and starts the guard. A failure within is the process's ending;
/// a failure of this function leaves the lock free and so is seen as one by the daemon.
fn begin(run_dir: &Path) -> Result<Option<(Supervisor, Result<()>)>> {
    let (daemon, lock) = sys::take_stdin_stdout()?;
    let [daemon, lock] = sys::keep_only([daemon, lock])?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?.into();
    // Standard error stays what the daemon made it: what it holds lies in its queue.
    sys::set_stdin_stdout(&null)?;
    drop(null);
    // The starter made it no group leader, so this cannot fail.
    rustix::process::setsid()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    rustix::thread::set_name(c"p2pit-supervise")?;
    for signal in [libc::SIGHUP, libc::SIGPIPE, libc::SIGXFSZ] {
        sys::ignore_signal(signal);
    }
    let asked_to_end = sys::signal_fd(&[libc::SIGTERM, libc::SIGINT])?;
    rustix::process::chdir(run_dir)?;
    let run_dir = RunDir::at(".");
    if run_dir.is_used() {
        return Ok(None);
    }
    let launch = run_dir.read_launch()?;
    let mut supervisor = Supervisor::new(launch, run_dir, asked_to_end, daemon, lock)?;
    let outcome = supervisor.start_guard();
    Ok(Some((supervisor, outcome)))
}

#[derive(Debug)]
struct Supervisor {
    launch: Launch,
    run_dir: RunDir,
    slot: Option<ResultSlot>,
    log: JobLog,
    output: Option<OwnedFd>,
    guard: Option<GuardHandle>,
    outlet: Outlet,
    timer: OwnedFd,
    asked_to_end: OwnedFd,
    /// Held until this process ends.
    _lock: OwnedFd,

    started_boot_ms: Option<u64>,
    deadline: Deadline,
    stop: Option<Stop>,
    outcome: Option<Outcome>,
    /// From then on the end is announced even if the tree is not over.
    drain_until: Option<u64>,
    usage: Usage,
    ended: Option<Ended>,
    save_at: Option<u64>,
    released: bool,
    /// Something of the tree may have come to this process when its guard was lost.
    sweep_at: Option<u64>,
    log_notice_at: Option<u64>,
}

#[derive(Debug)]
struct GuardHandle {
    pid: Pid,
    pidfd: OwnedFd,
    channel: OwnedFd,
    /// The channel is still open.
    speaks: bool,
}

/// Why and until when a process is being stopped.
#[derive(Debug)]
struct Stop {
    cause: Cause,
    kill_at: u64,
    /// Set once SIGKILL was asked for: then the guard itself is killed.
    kill_guard_at: Option<u64>,
}

#[derive(Debug)]
enum Cause {
    Order(String),
    /// The job's own.
    TimeLimit,
    Lease,
}

/// What is known about the main process.
#[derive(Debug)]
enum Outcome {
    Failed(String),
    Ended(ExitStatus),
    /// The guard is gone without a word about it.
    Unknown(String),
}

impl Supervisor {
    fn new(
        launch: Launch,
        run_dir: RunDir,
        asked_to_end: OwnedFd,
        daemon: OwnedFd,
        lock: OwnedFd,
    ) -> Result<Self> {
        let label = format!("worker {}", launch.id.rank);
        let log = JobLog::open(&launch.spec.log_path, label, launch.spec.log_bytes_max);
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        Ok(Self {
            outlet: Outlet::open(daemon)?,
            timer,
            asked_to_end,
            _lock: lock,
            slot: None,
            log,
            output: None,
            guard: None,
            started_boot_ms: None,
            deadline: launch.spec.deadline,
            stop: None,
            outcome: None,
            drain_until: None,
            usage: Usage::default(),
            ended: None,
            save_at: None,
            released: false,
            sweep_at: None,
            log_notice_at: None,
            launch,
            run_dir,
        })
    }

    fn spec(&self) -> &ProcessSpec {
        &self.launch.spec
    }

    fn start_guard(&mut self) -> Result<()> {
        self.outlet.listen()?;
        self.slot = Some(ResultSlot::reserve(&self.run_dir)?);
        let (output, job_output) = io::pipe().context("cannot make a pipe")?;
        rustix::io::ioctl_fionbio(&output, true)?;
        self.output = Some(output.into());
        let (channel, guard_channel) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // A guard that is lost leaves its tree to this process.
        rustix::process::set_child_subreaper(Some(getpid()))?;
        let privileged = self.spec().run_as.is_some();
        let isolated = self.spec().isolation.is_isolated();
        let side = if isolated {
            clone_into_namespaces(!privileged)?
        } else {
            match sys::fork().context("cannot fork")? {
                Side::Child => Side::Child,
                Side::Parent(pid) => Side::Parent((pid, pidfd_open(pid, PidfdFlags::empty())?)),
            }
        };
        let (pid, pidfd) = match side {
            Side::Child => guard::run(&self.launch, guard_channel, job_output.into()),
            Side::Parent(parts) => parts,
        };
        drop((guard_channel, job_output));
        let tree = Tree { guard: Identity::of(pid).context("cannot identify the guard")? };
        self.guard = Some(GuardHandle { pid, pidfd, channel, speaks: true });
        if isolated && !privileged {
            let own = RunAs { uid: geteuid().as_raw(), gid: getegid().as_raw() };
            sandbox::map_ids(pid, own, false)?;
        }
        self.run_dir.write_tree(&tree)?;
        let now = boot_ms();
        self.enforce_limits(now);
        if self.stop.is_some() {
            bail!("its lease ran out before it could start");
        }
        self.tell_guard(ToGuard::Go);
        Ok(())
    }

    fn run(&mut self) {
        loop {
            self.advance(boot_ms());
            if self.is_over() {
                break;
            }
            // A poll that fails cannot be waited out; whoever holds the other ends of this
            // process's descriptors sees them close, and the guard ends the tree.
            if self.wait().is_err() {
                break;
            }
        }
        self.outlet.leave();
    }

    fn is_over(&self) -> bool {
        let saved = self.save_at.is_none() || self.released;
        self.ended.is_some() && self.guard.is_none() && self.sweep_at.is_none() && saved
    }

    /// Does what is due at `now`.
    fn advance(&mut self, now: u64) {
        self.enforce_limits(now);
        self.escalate(now);
        self.sweep(now);
        if self.outcome.is_some() && self.ended.is_none() {
            let drained = self.guard.is_none() && self.sweep_at.is_none();
            let until = *self.drain_until.get_or_insert(now + DRAIN_MS);
            if matches!(self.outcome, Some(Outcome::Failed(_))) && !drained {
                self.kill_guard();
            }
            if drained || now >= until {
                self.conclude(now);
            }
        }
        if self.save_at.is_some_and(|at| now >= at) {
            self.save(now);
        }
        if self.log_notice_at.is_some_and(|at| now >= at) {
            self.log_notice_at = None;
            self.announce_log();
        }
    }

    fn enforce_limits(&mut self, now: u64) {
        if !self.limits_count() {
            return;
        }
        let grace = self.spec().grace_ms;
        if self.time_limit_at().is_some_and(|at| now >= at) {
            self.begin_stop(Cause::TimeLimit, now.saturating_add(grace));
        }
        // From when it ran out, not from when that is seen: a machine that was suspended
        // over it owes the rest at once.
        if let Some(at) = self.deadline.0.filter(|at| now >= *at) {
            self.begin_stop(Cause::Lease, lease_kill_at(at, grace));
        }
    }

    /// Once the main process has ended, only a tree that still has some grace is limited.
    fn limits_count(&self) -> bool {
        self.outcome.is_none() || self.stop.is_some()
    }

    fn time_limit_at(&self) -> Option<u64> {
        Some(self.started_boot_ms?.saturating_add(self.spec().time_limit_ms?))
    }

    /// The first cause stands; a later one, or the same one met again, can only shorten the
    /// grace.
    fn begin_stop(&mut self, cause: Cause, kill_at: u64) {
        match &mut self.stop {
            Some(stop) => stop.kill_at = stop.kill_at.min(kill_at),
            None => {
                self.stop = Some(Stop { cause, kill_at, kill_guard_at: None });
                self.tell_guard(ToGuard::Term);
            }
        }
    }

    fn escalate(&mut self, now: u64) {
        let Some(stop) = &mut self.stop else { return };
        match stop.kill_guard_at {
            None if now >= stop.kill_at => {
                stop.kill_guard_at = Some(now + GUARD_KILL_MS);
                self.tell_guard(ToGuard::Kill);
            }
            Some(at) if now >= at => self.kill_guard(),
            _ => {}
        }
    }

    fn tell_guard(&mut self, message: ToGuard) {
        let Some(guard) = &mut self.guard else { return };
        if guard.speaks && guard::transmit(&guard.channel, &message).is_err() {
            // The guard is gone, or as good as: its pidfd tells.
            guard.speaks = false;
        }
    }

    /// Isolated, the kernel ends the tree with it; shared, the sweep does.
    fn kill_guard(&self) {
        if let Some(guard) = &self.guard {
            // It may just have ended, which is as good.
            let _ = pidfd_send_signal(&guard.pidfd, Signal::KILL);
        }
    }

    /// Ends what came to this process as orphans when a shared guard was lost.
    fn sweep(&mut self, now: u64) {
        if self.guard.is_some() || self.sweep_at.is_none_or(|at| now < at) {
            return;
        }
        // What refuses now is tried again; this process stays until nothing is left.
        let _ = tree::signal_descendants(getpid(), &[Signal::KILL]);
        self.sweep_at = Some(now + SWEEP_EVERY_MS);
        while let Ok(waited) = sys::wait_any(false) {
            match waited {
                Waited::Child { usage, .. } => self.count(usage),
                Waited::NoneYet => break,
                Waited::NoChildren => {
                    self.sweep_at = None;
                    break;
                }
            }
        }
    }

    fn count(&mut self, usage: Usage) {
        self.usage.cpu_user_us += usage.cpu_user_us;
        self.usage.cpu_system_us += usage.cpu_system_us;
        self.usage.rss_bytes_max = self.usage.rss_bytes_max.max(usage.rss_bytes_max);
    }

    fn conclude(&mut self, now: u64) {
        for _ in 0..LAST_READS_MAX {
            if !self.read_output() {
                break;
            }
        }
        self.log.finish(wall_ms());
        self.ended = Some(Ended {
            ending: self.ending(),
            boot_ms: now,
            wall_ms: wall_ms(),
            usage: self.usage,
            log: self.log.state().clone(),
            unsaved: None,
        });
        self.save(now);
        self.announce_log();
        self.log_notice_at = None;
        if let Some(event) = self.ended_event() {
            self.outlet.announce(&event);
        }
    }

    fn ending(&self) -> Ending {
        let status = match &self.outcome {
            Some(Outcome::Ended(status)) => *status,
            Some(Outcome::Failed(reason)) if self.stop.is_none() => {
                return Ending::FailedToStart { reason: reason.clone() };
            }
            Some(Outcome::Unknown(reason)) if self.stop.is_none() => {
                return Ending::Lost { reason: reason.clone() };
            }
            // The guard had to be killed for its tree to end.
            _ => ExitStatus::Signal(libc::SIGKILL),
        };
        let executed = !matches!(self.outcome, Some(Outcome::Failed(_)));
        match self.stop.as_ref().map(|stop| &stop.cause) {
            Some(Cause::Order(reason)) => Ending::Stopped { reason: reason.clone(), status },
            Some(Cause::TimeLimit) => Ending::TimedOut { status },
            Some(Cause::Lease) => Ending::LeaseEnded { status: executed.then_some(status) },
            None => match status {
                ExitStatus::Code(code) => Ending::Exited { code },
                ExitStatus::Signal(signal) => Ending::Signaled { signal },
            },
        }
    }

    fn save(&mut self, now: u64) {
        let Some(ended) = &mut self.ended else { return };
        ended.unsaved = None;
        let written = match &self.slot {
            Some(slot) => slot.write(ended),
            None => ResultSlot::reserve(&self.run_dir).and_then(|slot| slot.write(ended)),
        };
        self.save_at = match written {
            Ok(()) => None,
            Err(error) => {
                ended.unsaved = Some(format!("{error:#}"));
                // Without a run directory nobody can ask any more.
                Path::new(CONTROL_SOCKET).exists().then_some(now + SAVE_EVERY_MS)
            }
        };
    }

    fn ended_event(&self) -> Option<Event> {
        self.ended.clone().map(|ended| Event::Ended(Box::new(ended)))
    }

    fn announce_log(&mut self) {
        let LogState { bytes, trouble, .. } = self.log.state().clone();
        self.outlet.announce_log(bytes, trouble);
    }

    /// Sleeps until something happens, and takes it in.
    fn wait(&mut self) -> Result<()> {
        self.arm_timer()?;
        let ready = self.poll()?;
        if ready.timer {
            let mut ticks = [0; 8];
            match rustix::io::read(&self.timer, &mut ticks) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if ready.asked_to_end {
            let mut buffer = [0; 1024];
            while rustix::io::read(&self.asked_to_end, &mut buffer).is_ok_and(|len| len > 0) {}
            let reason = "the machine is shutting down, or the supervisor was told to end";
            let grace = self.spec().grace_ms;
            self.begin_stop(Cause::Order(reason.into()), boot_ms().saturating_add(grace));
        }
        if ready.output {
            self.read_output();
        }
        if ready.channel {
            self.hear_guard();
        }
        if ready.guard_ended {
            self.bury_guard();
        }
        if ready.listener {
            self.greet();
        }
        for order in self.outlet.exchange(&ready.clients) {
            self.obey(order);
        }
        Ok(())
    }

    fn arm_timer(&self) -> Result<()> {
        let stop = self.stop.as_ref();
        let limits = [self.time_limit_at(), self.deadline.0];
        let limits = limits.into_iter().flatten().filter(|_| self.limits_count());
        let escalation = stop
            .map(|stop| stop.kill_guard_at.unwrap_or(stop.kill_at))
            .filter(|_| self.guard.is_some());
        let drain = self.drain_until.filter(|_| self.ended.is_none());
        let others = [escalation, drain, self.save_at, self.sweep_at, self.log_notice_at];
        let met = |limit: &u64| stop.is_some() && *limit <= boot_ms();
        let next = limits.filter(|limit| !met(limit)).chain(others.into_iter().flatten()).min();
        // An all-zero time disarms; the past fires at once.
        let value = next.map_or(Timespec { tv_sec: 0, tv_nsec: 0 }, |ms| Timespec {
            tv_sec: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(ms % 1000).unwrap_or(0) * 1_000_000 + 1,
        });
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec)?;
        Ok(())
    }

    fn poll(&self) -> Result<Ready> {
        let guard = self.guard.as_ref();
        let fixed = [
            Some(self.timer.as_fd()),
            Some(self.asked_to_end.as_fd()),
            self.output.as_ref().map(AsFd::as_fd),
            guard.filter(|guard| guard.speaks).map(|guard| guard.channel.as_fd()),
            guard.map(|guard| guard.pidfd.as_fd()),
            self.outlet.listener.as_ref().map(AsFd::as_fd),
        ];
        let clients = self.outlet.clients.iter();
        let mut fds: Vec<PollFd<'_>> = fixed
            .iter()
            .flatten()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .chain(clients.map(|client| PollFd::new(&client.stream, client.interest())))
            .collect();
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let [timer, asked_to_end, output, channel, guard_ended, listener] =
            fixed.map(|fd| fd.is_some() && ready.next().unwrap_or(false));
        let clients = ready.collect();
        Ok(Ready { timer, asked_to_end, output, channel, guard_ended, listener, clients })
    }

    /// Returns whether there may be more.
    fn read_output(&mut self) -> bool {
        let Some(output) = &self.output else { return false };
        let mut buffer = [0; READ_BYTES];
        match rustix::io::read(output, &mut buffer) {
            Ok(0) => self.output = None,
            Ok(len) => {
                self.log.push(&buffer[..len], wall_ms());
                self.log_notice_at.get_or_insert(boot_ms() + LOG_NOTICE_MS);
                return true;
            }
            Err(Errno::INTR) => return true,
            Err(Errno::AGAIN) => {}
            // A pipe has no other errors; without it nothing more can be logged.
            Err(_) => self.output = None,
        }
        false
    }

    fn hear_guard(&mut self) {
        let Some(guard) = &mut self.guard else { return };
        // A guard that says nothing understandable is as good as one that is gone.
        let Ok(Some(message)) = guard::receive(&guard.channel) else {
            guard.speaks = false;
            return;
        };
        let pid = guard.pid;
        match message {
            FromGuard::NeedsMapping => self.map_job_user(pid),
            FromGuard::Started => {
                let boot_ms = boot_ms();
                self.started_boot_ms = Some(boot_ms);
                let event = Event::Started { pid: number(pid), boot_ms };
                self.outlet.announce(&event);
            }
            FromGuard::Failed { reason } => self.outcome = Some(Outcome::Failed(reason)),
            FromGuard::MainEnded { status } => {
                self.outcome.get_or_insert(Outcome::Ended(status));
                // While stopping, the rest of the tree has what is left of the grace.
                self.drain_until =
                    self.stop.as_ref().map(|stop| stop.kill_at.saturating_add(DRAIN_MS));
            }
        }
    }

    fn map_job_user(&mut self, guard: Pid) {
        let mapped = self
            .spec()
            .run_as
            .context("no user to run as")
            .and_then(|ids| sandbox::map_ids(guard, ids, true));
        match mapped {
            Ok(()) => self.tell_guard(ToGuard::Mapped),
            Err(error) => self.outcome = Some(Outcome::Failed(format!("{error:#}"))),
        }
    }

    /// The guard has ended, and isolated so has the tree.
    fn bury_guard(&mut self) {
        while self.guard.as_ref().is_some_and(|guard| guard.speaks) {
            self.hear_guard();
        }
        let Some(guard) = self.guard.take() else { return };
        let mut end = None;
        let mut orphans = true;
        while let Ok(waited) = sys::wait_any(false) {
            match waited {
                Waited::Child { pid, status, usage } => {
                    if pid == guard.pid.as_raw_nonzero().get() {
                        end = Some(status);
                    }
                    self.count(usage);
                }
                Waited::NoneYet => break,
                Waited::NoChildren => {
                    orphans = false;
                    break;
                }
            }
        }
        if orphans && matches!(self.spec().isolation, Isolation::Shared { .. }) {
            self.sweep_at = Some(boot_ms());
        }
        let how = match end {
            Some(ExitStatus::Code(code)) => format!("with code {code}"),
            Some(ExitStatus::Signal(signal)) => format!("by signal {signal}"),
            None => "unseen".into(),
        };
        let reason = format!("the guard of the process tree ended {how}");
        self.outcome.get_or_insert(Outcome::Unknown(reason));
    }

    fn greet(&mut self) {
        let started = match (&self.guard, self.started_boot_ms) {
            (Some(guard), Some(boot_ms)) => {
                Some(Event::Started { pid: number(guard.pid), boot_ms })
            }
            _ => None,
        };
        let ended = self.ended_event();
        let log = Event::LogGrew { bytes: self.log.state().bytes };
        let deadline = Event::Deadline { boot_ms: self.deadline };
        let events: Vec<Event> = started.into_iter().chain([log, deadline]).chain(ended).collect();
        self.outlet.accept(&events);
    }

    fn obey(&mut self, order: Order) {
        let now = boot_ms();
        let over = self.outcome.is_some();
        match order {
            Order::Stop { grace_ms, reason } if !over => {
                let grace = grace_ms.unwrap_or(self.spec().grace_ms);
                self.begin_stop(Cause::Order(reason), now.saturating_add(grace));
            }
            Order::Kill { reason } => {
                if !over {
                    self.begin_stop(Cause::Order(reason), now);
                } else if let Some(stop) = &mut self.stop {
                    stop.kill_at = stop.kill_at.min(now);
                }
            }
            Order::Stop { .. } => {}
            Order::SetDeadline { boot_ms } => {
                self.deadline = self.deadline.moved(boot_ms);
                self.outlet.announce(&Event::Deadline { boot_ms: self.deadline });
            }
            Order::Release => self.released = self.ended.is_some(),
            Order::Ping => self.outlet.announce(&Event::Pong),
        }
    }
}

#[derive(Debug)]
struct Ready {
    timer: bool,
    asked_to_end: bool,
    output: bool,
    channel: bool,
    guard_ended: bool,
    listener: bool,
    clients: Vec<bool>,
}

fn clone_into_namespaces(user: bool) -> Result<Side<(Pid, OwnedFd)>> {
    sys::clone_into_namespaces(user).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSPC) => anyhow!("this machine allows no (more) namespaces"),
        _ => anyhow!(error).context("cannot make namespaces"),
    })
}

/// When what is left of a tree gets SIGKILL whose lease ran out at `deadline`.
fn lease_kill_at(deadline: u64, grace_ms: u64) -> u64 {
    deadline.saturating_add(grace_ms.min(LEASE_KILL_MS))
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// The connections to daemons.
#[derive(Debug)]
struct Outlet {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    trouble: Option<String>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    gone: bool,
}

impl Outlet {
    fn open(daemon: OwnedFd) -> Result<Self> {
        let stream = UnixStream::from(daemon);
        stream.set_nonblocking(true).context("standard input is no socket")?;
        Ok(Self { listener: None, clients: vec![Client::new(stream)], trouble: None })
    }

    /// Binds in the current directory, whose path may be longer than a socket's name.
    fn listen(&mut self) -> Result<()> {
        let listener = UnixListener::bind(CONTROL_SOCKET).context("cannot bind the socket")?;
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        Ok(())
    }

    fn accept(&mut self, greeting: &[Event]) {
        let Some(listener) = &self.listener else { return };
        // Whoever cannot be accepted tries again.
        let Ok((stream, _)) = listener.accept() else { return };
        if self.clients.len() >= CLIENTS_MAX || stream.set_nonblocking(true).is_err() {
            return;
        }
        let mut client = Client::new(stream);
        for event in greeting {
            client.say(event);
        }
        self.clients.push(client);
    }

    fn announce(&mut self, event: &Event) {
        for client in &mut self.clients {
            client.say(event);
        }
    }

    /// The size is only told to those who have taken the last one.
    fn announce_log(&mut self, bytes: u64, trouble: Option<String>) {
        for client in self.clients.iter_mut().filter(|client| client.outgoing.is_empty()) {
            client.say(&Event::LogGrew { bytes });
        }
        if let Some(reason) = &trouble
            && self.trouble != trouble
        {
            self.announce(&Event::LogTrouble { reason: reason.clone() });
            self.trouble = trouble;
        }
    }

    fn exchange(&mut self, ready: &[bool]) -> Vec<Order> {
        let mut orders = Vec::new();
        for (client, _) in self.clients.iter_mut().zip(ready).filter(|(_, ready)| **ready) {
            client.flush();
            client.listen(&mut orders);
        }
        self.clients.retain(|client| !client.gone);
        orders
    }

    /// Says what is left to say, to those who listen.
    fn leave(&mut self) {
        for client in &mut self.clients {
            // Without a time limit the write below could only fail sooner.
            let _ = client.stream.set_nonblocking(false);
            let _ = client.stream.set_write_timeout(Some(LEAVE_WITHIN));
            client.flush();
        }
    }
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self { stream, incoming: Vec::new(), outgoing: Vec::new(), gone: false }
    }

    fn interest(&self) -> PollFlags {
        if self.outgoing.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    fn say(&mut self, event: &Event) {
        self.outgoing.extend(encode(event));
        self.flush();
        self.gone |= self.outgoing.len() > OUTGOING_BYTES_MAX;
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() && !self.gone {
            match rustix::io::write(&self.stream, &self.outgoing) {
                Ok(len) => drop(self.outgoing.drain(..len)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.gone = true,
            }
        }
    }

    fn listen(&mut self, orders: &mut Vec<Order>) {
        let mut buffer = [0; 4096];
        match rustix::io::read(&self.stream, &mut buffer) {
            Ok(0) => self.gone = true,
            Ok(len) => self.incoming.extend_from_slice(&buffer[..len]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.gone = true,
        }
        while let Some(line) = next_line(&mut self.incoming) {
            orders.extend(line);
        }
        self.gone |= self.incoming.len() > LINE_BYTES_MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_grace_of_a_job_outlasts_that_of_a_lease() {
        assert_eq!(lease_kill_at(5_000, 300), 5_300);
        for grace_ms in [LEASE_GRACE_MS, 3_600_000, u64::MAX] {
            let guard_killed_at = lease_kill_at(5_000, grace_ms) + GUARD_KILL_MS;
            assert!(guard_killed_at < 5_000 + LEASE_GRACE_MS, "{guard_killed_at}");
        }
    }
}
