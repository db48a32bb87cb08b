//! Where the bench runs: in memory, and as root in namespaces of its own.
//!
//! On a disk a comparison of many small files varies eightfold from minute to minute. And
//! what is compared with p2pit has servers: in namespaces of their own they meet nobody
//! else's, and all of them end with the bench, however that ends.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use rustix::fs::statfs;

use crate::table::timed;

/// Says that this process is where it is to be: [`OWN`] or [`SHARED`].
const WORLD: &str = "P2PIT_BENCH_WORLD";
const OWN: &str = "own";
const SHARED: &str = "shared";

/// A file system in memory that Linux machines have.
const MEMORY: &str = "/dev/shm";
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// As users have it; tests have more.
const LOG: &str = "P2PIT_LOG";
const LOG_DEFAULT: &str = "info";

/// Network, processes, and with them everything dies.
const UNSHARE: [&str; 4] = ["-npf", "--mount-proc", "--kill-child", "--"];
/// The first process of a namespace has to bury everybody's orphans, as a shell does.
const FIRST_PROCESS: [&str; 4] = ["sh", "-c", "\"$@\"; exit $?", "sh"];

/// Besides the path of an ordinary user.
const SERVER_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Replaces this process by one that is where it is to be, unless it is there already.
pub(crate) fn enter() -> Result<()> {
    match env::var(WORLD).as_deref() {
        Ok(OWN) => return set_up_network(),
        Ok(_) => return Ok(()),
        Err(_) => {}
    }
    let me = env::current_exe()?;
    let mut command = if is_root() && can_unshare() {
        let mut command = Command::new("unshare");
        command.args(UNSHARE).args(FIRST_PROCESS).arg(me).env(WORLD, OWN);
        command
    } else {
        let mut command = Command::new(me);
        command.env(WORLD, SHARED);
        command
    };
    command.args(env::args_os().skip(1));
    if env::var_os("TMPDIR").is_none() && is_in_memory(Path::new(MEMORY)) {
        command.env("TMPDIR", MEMORY);
    }
    if env::var_os(LOG).is_none() {
        command.env(LOG, LOG_DEFAULT);
    }
    Err(command.exec()).context("cannot start again in other surroundings")
}

/// Whether nobody else is in this network.
pub(crate) fn is_own() -> bool {
    env::var(WORLD).as_deref() == Ok(OWN)
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// For a reader of figures.
pub(crate) fn describe() -> String {
    let files = env::temp_dir();
    let kind = if is_in_memory(&files) { "in memory" } else { "on a disk" };
    format!("homes and files {kind} ({})", files.display())
}

/// Whether a directory's files are in memory.
fn is_in_memory(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|state| state.f_type == TMPFS_MAGIC)
}

/// Where a program lies, if it is installed.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    let dirs = env::split_paths(&path).chain(SERVER_DIRS.iter().map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Bytes that have gone over the loopback device of this network.
pub(crate) fn loopback_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/net/dev")?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("lo:"));
    let bytes = line.and_then(|counts| counts.split_whitespace().next()?.parse().ok());
    bytes.context("no loopback device in /proc/self/net/dev")
}

fn can_unshare() -> bool {
    let mut command = Command::new("unshare");
    command.args(UNSHARE).arg("true").stderr(Stdio::null());
    program("ip").is_some() && command.status().is_ok_and(|status| status.success())
}

/// Loopback, and one address that is not: Slurm does not speak where there is none.
fn set_up_network() -> Result<()> {
    ip("link set lo up")?;
    // Not every kernel has both kinds.
    ip("link add bench0 type dummy").or_else(|_| ip("link add bench0 type veth peer bench1"))?;
    ip("addr add 10.99.0.1/24 dev bench0")?;
    ip("link set bench0 up")
}

fn ip(words: &str) -> Result<()> {
    timed(Command::new("ip").args(words.split(' '))).map(drop)
}
