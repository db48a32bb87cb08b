//! Calls of the kernel that no library here wraps safely. All unsafe code of the executor
//! is in this file.
//!
//! Supervisor and guard are single-threaded from their first instruction, so a forked
//! child may go on as an ordinary process; only [`watch_readable`] is for the daemon.

use std::{
    ffi::{CStr, CString},
    io,
    mem::{self, MaybeUninit},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr,
};

use rustix::process::Pid;
use tokio::io::{Interest, unix::AsyncFd};

use super::spec::{ExitStatus, Usage};

/// Which side of a fork the caller is on.
#[derive(Debug)]
pub(super) enum Side<T> {
    Parent(T),
    Child,
}

/// Namespaces of an isolated process; `user` where the caller is not root.
pub(super) fn clone_into_namespaces(user: bool) -> io::Result<Side<(Pid, OwnedFd)>> {
    let user = if user { libc::CLONE_NEWUSER } else { 0 };
    let flags = user
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_PIDFD;
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = flags as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM and a stack this is a fork: the child runs on its own copy
    // of this stack, and `args` and `pidfd` outlive the call. This process has one thread,
    // so no lock can be held by a thread that the child lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of_val(&args)) };
    match pid {
        0 => Ok(Side::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel just opened this descriptor for us alone.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            Ok(Side::Parent((pid.ok_or(io::ErrorKind::InvalidData)?, pidfd)))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts this process into a user namespace of its own, with nothing mapped yet.
pub(super) fn unshare_user() -> rustix::io::Result<()> {
    // SAFETY: neither descriptors nor memory are shared with anyone, and this process has
    // one thread.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) }
}

pub(super) fn fork() -> io::Result<Side<Pid>> {
    // SAFETY: this process has one thread, so the child may run any code.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child),
        pid => match Pid::from_raw(pid) {
            Some(pid) if pid.as_raw_nonzero().get() > 0 => Ok(Side::Parent(pid)),
            _ => Err(io::Error::last_os_error()),
        },
    }
}

/// Changes the attributes of the mount at `path`, or of the whole tree below.
pub(super) fn mount_setattr(
    dir: Option<&OwnedFd>,
    path: &CStr,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
) -> io::Result<()> {
    let fd = dir.map_or(libc::AT_FDCWD, |dir| dir.as_raw_fd());
    let mut flags = libc::AT_SYMLINK_NOFOLLOW;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH;
    }
    let attr = libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    // SAFETY: path and attr are valid for the call, and the size is that of `attr`.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Blocks `signals` and returns a descriptor that becomes readable when one is pending.
pub(super) fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set before anything reads it.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn ignore_signal(signal: i32) {
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Every signal back to its default and unblocked, as a new program expects. Only makes
/// async-signal-safe calls.
pub(super) fn reset_signals() {
    // SAFETY: SIG_DFL installs no handler; the kernel refuses the signals that cannot be
    // changed, and the set is initialised before its use.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
}

/// What a wait for any child found.
#[derive(Debug)]
pub(super) enum Waited {
    Child {
        pid: i32,
        status: ExitStatus,
        usage: Usage,
    },
    /// There are children, none of them has ended.
    NoneYet,
    NoChildren,
}

pub(super) fn wait_any(block: bool) -> io::Result<Waited> {
    let flags = if block { 0 } else { libc::WNOHANG };
    loop {
        let mut raw = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: both pointers are valid for writes during the call.
        let pid =
            unsafe { libc::wait4(-1, &raw mut raw, flags | libc::__WALL, usage.as_mut_ptr()) };
        if pid == 0 {
            return Ok(Waited::NoneYet);
        }
        if pid < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ECHILD) => return Ok(Waited::NoChildren),
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            }
        }
        let status = if libc::WIFEXITED(raw) {
            ExitStatus::Code(libc::WEXITSTATUS(raw))
        } else if libc::WIFSIGNALED(raw) {
            ExitStatus::Signal(libc::WTERMSIG(raw))
        } else {
            continue;
        };
        // SAFETY: zeroed is a valid rusage, and the kernel filled it for this child.
        let usage = unsafe { usage.assume_init() };
        return Ok(Waited::Child { pid, status, usage: convert_usage(&usage) });
    }
}

fn convert_usage(usage: &libc::rusage) -> Usage {
    let micros = |time: libc::timeval| {
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        seconds.saturating_mul(1_000_000) + u64::try_from(time.tv_usec).unwrap_or(0)
    };
    Usage {
        cpu_user_us: micros(usage.ru_utime),
        cpu_system_us: micros(usage.ru_stime),
        rss_bytes_max: u64::try_from(usage.ru_maxrss).unwrap_or(0).saturating_mul(1024),
    }
}

/// Sends `signal` to every process the caller can see and may signal, itself apart. Only
/// sensible as the first process of a PID namespace, and refused everywhere else.
pub(super) fn kill_namespace(signal: i32) -> io::Result<()> {
    if rustix::process::getpid() != Pid::INIT {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // SAFETY: a plain system call.
    match unsafe { libc::kill(-1, signal) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Moves descriptors to fixed numbers from 3 on, closes every other one above 2, and
/// returns them in their new places, closed on exec.
pub(super) fn keep_only<const N: usize>(fds: [OwnedFd; N]) -> io::Result<[OwnedFd; N]> {
    const FIRST: RawFd = 3;
    let last = FIRST + N as RawFd;
    let mut placed = [-1; N];
    for (slot, fd) in placed.iter_mut().zip(fds) {
        // Above the target range first, so that no descriptor lands on another.
        // SAFETY: duplicates a descriptor that we own.
        let high = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, last) };
        if high < 0 {
            return Err(io::Error::last_os_error());
        }
        *slot = high;
        mem::forget(fd);
    }
    for (slot, target) in placed.iter_mut().zip(FIRST..) {
        // SAFETY: the target range holds nothing but descriptors that are given up here.
        if unsafe { libc::dup3(*slot, target, libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        *slot = target;
    }
    close_from(last)?;
    // SAFETY: each number was made by dup3 above and has this one owner.
    Ok(placed.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: nothing from `first` on is used again by this process; what it inherited
    // there belongs to another program.
    if unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) } == 0 {
        return Ok(());
    }
    // Before Linux 5.9, one by one; the list's own descriptor is closed by its end.
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd >= first) {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Takes over the descriptors that the parent passed as standard input and output.
pub(super) fn take_stdin_stdout() -> io::Result<(OwnedFd, OwnedFd)> {
    let take = |number| {
        // SAFETY: duplicates whatever is there; fails if nothing is.
        let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just opened this descriptor for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    Ok((take(0)?, take(1)?))
}

/// Makes standard input, output and error copies of the given descriptors. Only makes
/// async-signal-safe calls.
pub(super) fn set_stdio(input: &OwnedFd, output: &OwnedFd) -> io::Result<()> {
    set_numbered(&[(input, 0), (output, 1), (output, 2)])
}

/// Makes standard input and output copies of the given descriptor.
pub(super) fn set_stdin_stdout(fd: &OwnedFd) -> io::Result<()> {
    set_numbered(&[(fd, 0), (fd, 1)])
}

fn set_numbered(places: &[(&OwnedFd, RawFd)]) -> io::Result<()> {
    for (fd, target) in places.iter().copied() {
        // SAFETY: 0 to 2 are ours to replace; the source stays open.
        if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Leaves the session keyring of the daemon's owner, which may hold tickets and keys.
pub(super) fn join_fresh_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name = ptr::null::<libc::c_char>();
    // SAFETY: a null name asks for an anonymous keyring.
    match unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Replaces this program; returns only with an error. Only makes async-signal-safe calls.
pub(super) fn execute(program: &CStr, args: &Pointers, env: &Pointers) -> i32 {
    // SAFETY: both arrays end with null and point at strings that `Pointers` owns.
    unsafe { libc::execve(program.as_ptr(), args.pointers.as_ptr(), env.pointers.as_ptr()) };
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

/// Strings in the form `execve` takes, made before a fork.
#[derive(Debug)]
pub(super) struct Pointers {
    pointers: Vec<*const libc::c_char>,
    _strings: Vec<CString>,
}

impl Pointers {
    pub(super) fn new(strings: Vec<CString>) -> Self {
        let pointers =
            strings.iter().map(|s| s.as_ptr()).chain(std::iter::once(ptr::null())).collect();
        Self { pointers, _strings: strings }
    }
}

/// Ends the process without running exit handlers that belong to the parent's program.
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: never returns.
    unsafe { libc::_exit(code) }
}

/// For the runtime to tell when `fd` becomes readable.
pub(super) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one descriptor for its whole life and closes it only when it
    // is dropped, which is after its registration ends.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
