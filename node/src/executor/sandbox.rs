//! What an isolated process sees of the machine.
//!
//! The guard runs in fresh namespaces, as the first process of its PID namespace. Here it
//! turns its copy of the mounts into the job's view, in place:
//!
//! - everything read-only, recursively;
//! - the job's own directories writable at their usual paths;
//! - homes, `/run`, the run directories and the plan's paths covered by empty, read-only
//!   file systems, in which only the job's directories reappear;
//! - `/tmp` and `/var/tmp` the process's own scratch directory; `/dev/shm`, `/dev/pts`,
//!   `/dev/mqueue` and `/proc` its own.
//!
//! A cover cannot be lifted: the job has no capabilities in the namespace that owns these
//! mounts, and in a namespace nested below it the kernel locks all of them together.
//!
//! Under a daemon that is root, all this is done by real root, because directories may lie
//! below others that only root can enter; the user namespace comes last. Otherwise the
//! user namespace comes first, since it is what allows the mounts.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{CStr, CString},
    fs::{self, File},
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::CWD,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree},
    process::Pid,
};

use super::{
    run_dir::Launch,
    spec::{ProcessSpec, RunAs, may_hide},
    sys,
};

/// Covers the machine with the job's view. The caller is alone in new mount, PID and IPC
/// namespaces.
pub(super) fn enter(launch: &Launch) -> Result<()> {
    make_private()?;
    let hidden = hidden_paths(launch)?;
    let places = open_places(&launch.spec)?;
    let resolver = open_resolver(&hidden)?;
    let scratch =
        [open_place(&launch.spec.tmp_dir, true)?, open_place(&launch.spec.tmp_dir, true)?];

    mount_own_proc()?;
    let covers = cover(&hidden)?;
    mount_own_devices()?;
    for (tree, target) in scratch.iter().zip(SCRATCH) {
        if is_directory(Path::new(target)) {
            attach(tree, Path::new(target))?;
        }
    }
    for (path, tree) in &places {
        make_target(path, tree)?;
        attach(tree, path)?;
    }
    if let Some((path, tree)) = &resolver {
        make_target(path, tree)?;
        attach(tree, path)?;
    }
    for cover in covers {
        set_attributes(None, &cover, false, libc::MOUNT_ATTR_RDONLY)
            .with_context(|| format!("cannot make the cover of {} read-only", cover.display()))?;
    }
    rustix::process::chdir("/").context("cannot leave the run directory")
}

/// The directories and files of a process, with whether it may write them; a directory
/// comes before what lies in it.
pub(super) fn places(spec: &ProcessSpec) -> BTreeMap<PathBuf, bool> {
    let mut places: BTreeMap<PathBuf, bool> =
        spec.read_only.iter().map(|path| (path.clone(), false)).collect();
    let own = [&spec.work_dir, &spec.job_dir, &spec.tmp_dir];
    places.extend(own.into_iter().chain(&spec.writable).map(|path| (path.clone(), true)));
    places
}

/// Maps one uid and one gid, and nothing else, onto themselves in the user namespace of
/// `guard`.
pub(super) fn map_ids(guard: Pid, ids: RunAs, may_set_groups: bool) -> Result<()> {
    let proc = PathBuf::from(format!("/proc/{}", guard.as_raw_nonzero()));
    let write = |file: &str, text: String| {
        let path = proc.join(file);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    };
    if !may_set_groups {
        write("setgroups", "deny".into())?;
    }
    write("uid_map", format!("{0} {0} 1\n", ids.uid))?;
    write("gid_map", format!("{0} {0} 1\n", ids.gid))
}

fn make_private() -> Result<()> {
    sys::mount_setattr(None, c"/", true, 0, 0, libc::MS_PRIVATE)
        .context("cannot keep mounts to this process")
}

/// What to cover, ancestors first and without what lies below another.
fn hidden_paths(launch: &Launch) -> Result<Vec<PathBuf>> {
    // `/var/mail` and `/var/spool` hold mail and crontabs of the uid that an unprivileged
    // daemon shares with its jobs.
    const ALWAYS: [&str; 6] = ["/home", "/root", "/run", "/var/run", "/var/mail", "/var/spool"];
    let always = ALWAYS.iter().map(PathBuf::from);
    let asked = launch.spec.sandbox.hidden.iter().cloned();
    let mut resolved = BTreeSet::new();
    for path in always.chain(asked).chain([launch.run_root.clone()]) {
        match fs::canonicalize(&path) {
            Ok(real) if may_hide(&real) => resolved.insert(real),
            Ok(real) => {
                bail!("cannot hide {}: the system is in {}", path.display(), real.display())
            }
            // What does not exist needs no cover; what this uid cannot reach, its job
            // cannot either.
            Err(error) if is_out_of_reach(&error) => continue,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot hide {}", path.display()));
            }
        };
    }
    let mut hidden: Vec<PathBuf> = Vec::new();
    for path in resolved {
        let covered = hidden.last().is_some_and(|last| path.starts_with(last))
            || SCRATCH.iter().any(|scratch| path.starts_with(scratch));
        if !covered {
            hidden.push(path);
        }
    }
    Ok(hidden)
}

fn is_out_of_reach(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

fn open_places(spec: &ProcessSpec) -> Result<Vec<(PathBuf, OwnedFd)>> {
    let open = |(path, writable): (PathBuf, bool)| Ok((path.clone(), open_place(&path, writable)?));
    places(spec).into_iter().map(open).collect()
}

/// A detached copy of the mounts at `path`, to be attached once the path is covered.
fn open_place(path: &Path, writable: bool) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, path, flags)
        .with_context(|| format!("cannot open {} for the job", path.display()))?;
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if !writable {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    set_attributes(Some(&tree), Path::new(""), true, attributes)
        .with_context(|| format!("cannot restrict {}", path.display()))?;
    Ok(tree)
}

/// The name server list, where it is a link into a hidden place such as `/run`.
fn open_resolver(hidden: &[PathBuf]) -> Result<Option<(PathBuf, OwnedFd)>> {
    let Ok(path) = fs::canonicalize("/etc/resolv.conf") else { return Ok(None) };
    if !hidden.iter().any(|hidden| path.starts_with(hidden)) {
        return Ok(None);
    }
    let tree = open_place(&path, false)?;
    Ok(Some((path, tree)))
}

/// Everything read-only, and a `/proc` of the own PID namespace over the machine's.
fn mount_own_proc() -> Result<()> {
    set_attributes(None, Path::new("/"), true, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID)
        .context("cannot make the machine read-only")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None).context("cannot mount a private /proc")
}

/// Returns the covering file systems, which still are writable.
fn cover(hidden: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut covers = Vec::new();
    for path in hidden {
        let context = || format!("cannot hide {}", path.display());
        if is_directory(path) {
            mount_tmpfs(path, COVER_OPTIONS).with_context(context)?;
            covers.push(path.clone());
        } else {
            rustix::mount::mount_bind("/dev/null", path).with_context(context)?;
        }
    }
    Ok(covers)
}

/// A cover holds nothing but mount points.
const COVER_OPTIONS: &CStr = c"size=1m,nr_inodes=4k,mode=755";
/// Where programs expect to write without being told; the process's own scratch directory
/// is shown there.
const SCRATCH: [&str; 2] = ["/tmp", "/var/tmp"];

fn mount_own_devices() -> Result<()> {
    let shm = Path::new("/dev/shm");
    if is_directory(shm) {
        mount_tmpfs(shm, c"mode=1777").context("cannot mount a private /dev/shm")?;
    }
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    if is_directory(Path::new("/dev/pts")) {
        mount("devpts", "/dev/pts", "devpts", flags, c"newinstance,ptmxmode=0666,mode=620")
            .context("cannot mount a private /dev/pts")?;
    }
    if is_directory(Path::new("/dev/mqueue")) {
        mount("mqueue", "/dev/mqueue", "mqueue", flags | MountFlags::NODEV, None)
            .context("cannot mount a private /dev/mqueue")?;
    }
    Ok(())
}

fn mount_tmpfs(path: &Path, options: &CStr) -> rustix::io::Result<()> {
    mount("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options)
}

/// Something of the same kind to mount on; below a cover nothing is there yet.
fn make_target(path: &Path, tree: &OwnedFd) -> Result<()> {
    let context = || format!("cannot make room for {}", path.display());
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let stat = rustix::fs::fstat(tree).with_context(context)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
        return fs::create_dir_all(path).with_context(context);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(context)?;
    }
    File::create_new(path).map(drop).with_context(context)
}

fn attach(tree: &OwnedFd, target: &Path) -> Result<()> {
    move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .with_context(|| format!("cannot show {}", target.display()))
}

fn set_attributes(dir: Option<&OwnedFd>, path: &Path, deep: bool, set: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    sys::mount_setattr(dir, &path, deep, set, 0, 0)
}

fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}
