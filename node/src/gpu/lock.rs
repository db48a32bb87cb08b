//! One lock per GPU for the whole machine: two daemons, of two users or two pools,
//! never offer the same GPU.
//!
//! The lock is `flock` on a file named after the GPU's UUID, in a directory that
//! every user of the machine finds at the same path, whoever comes first:
//! `/run/lock/p2pit` where `/run/lock` is open to everybody (Debian and its like),
//! else `/tmp/p2pit-locks`. The choice depends on the machine alone, never on who
//! asks, so root's daemon and a user's meet. The directory is sticky and writable by
//! all, the files are writable by all; nothing in it is followed, trusted or executed.
//!
//! The kernel releases a lock with the last descriptor of its file, so a dead daemon
//! holds nothing. Descriptors close on exec: a supervisor keeps the GPU of its job
//! locked beyond its daemon's death only if it is handed [`GpuLock::as_fd`] on
//! purpose. The restarted daemon of the same home recognises such a lock as its own
//! ([`Acquired::ours`]).

use std::{
    fs::{File, Permissions},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{MetadataExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use p2pit_protocol::inventory::GpuUuid;
use rustix::{
    fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags},
    io::Errno,
};
use thiserror::Error;

use crate::home::{LOCK_PATIENCE, lock_file};

/// The directory of this machine's GPU locks.
#[derive(Debug, Clone)]
pub struct GpuLocks {
    directory: PathBuf,
}

/// The right to offer one GPU, for as long as a descriptor of it is open.
#[derive(Debug)]
pub struct GpuLock {
    uuid: GpuUuid,
    file: File,
    /// Locked too, which tells systemd-tmpfiles to leave the directory alone.
    _directory: Arc<OwnedFd>,
}

/// What came of asking for locks.
#[derive(Debug, Default)]
pub struct Acquired {
    pub locks: Vec<GpuLock>,
    /// Kept locked by supervisors of this home that outlived an earlier daemon.
    pub ours: Vec<GpuUuid>,
    pub busy: Vec<(GpuUuid, Holder)>,
    /// Neither locked nor known to be: not to be offered.
    pub failed: Vec<(GpuUuid, LockError)>,
}

/// Who offers a GPU, by its own account; any user of the machine could have written it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: Option<u32>,
    pub home: Option<PathBuf>,
}

#[derive(Debug, Error)]
pub enum LockError {
    #[error("{} is not safe to keep locks in: {problem}", .path.display())]
    Unsafe { path: PathBuf, problem: &'static str },
    #[error("{} cannot be used for locks", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl GpuLocks {
    /// The locks that all daemons of this machine share.
    pub fn machine() -> Self {
        let shared = std::fs::metadata(SHARED_PARENT)
            .is_ok_and(|m| m.is_dir() && m.uid() == 0 && m.mode() & 0o7777 == OPEN_DIRECTORY);
        Self::at(if shared { SHARED_DIRECTORY } else { FALLBACK_DIRECTORY })
    }

    pub(crate) fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Locks as many of `uuids` as possible for the daemon of `home`. The caller has
    /// opened that home, so no other daemon runs in it.
    pub fn acquire(&self, uuids: &[GpuUuid], home: &Path) -> Result<Acquired, LockError> {
        let directory = Arc::new(self.open_directory()?);
        let mut acquired = Acquired::default();
        let deadline = Instant::now() + LOCK_PATIENCE;
        for uuid in uuids {
            match self.lock(&directory, uuid, home, deadline) {
                Ok(Ok(lock)) => acquired.locks.push(lock),
                Ok(Err(holder)) if holder.home.as_deref() == Some(home) => {
                    acquired.ours.push(uuid.clone());
                }
                Ok(Err(holder)) => acquired.busy.push((uuid.clone(), holder)),
                Err(error) => acquired.failed.push((uuid.clone(), error)),
            }
        }
        Ok(acquired)
    }

    fn open_directory(&self) -> Result<OwnedFd, LockError> {
        let path = &self.directory;
        let failed = |source: io::Error| LockError::Io { path: path.clone(), source };
        match std::fs::create_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
            Ok(()) | Err(_) => {}
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let problem = "it is not a directory";
                return Err(LockError::Unsafe { path: path.clone(), problem });
            }
            Err(e) => return Err(failed(e.into())),
        };
        let directory = File::from(directory);
        let mode = |directory: &File| Ok(directory.metadata()?.mode() & 0o7777);
        if mode(&directory).map_err(failed)? != OPEN_DIRECTORY {
            // Ours, and just created under a umask; somebody else's must be right.
            let opened = directory.set_permissions(Permissions::from_mode(OPEN_DIRECTORY));
            if opened.is_err() && mode(&directory).map_err(failed)? != OPEN_DIRECTORY {
                let problem = "it is not open to all users (mode 1777)";
                return Err(LockError::Unsafe { path: path.clone(), problem });
            }
        }
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared) {
            // A cleaner is at work just now; it spares files younger than days.
            Ok(()) | Err(Errno::WOULDBLOCK) => Ok(directory.into()),
            Err(e) => Err(failed(e.into())),
        }
    }

    fn lock(
        &self,
        directory: &Arc<OwnedFd>,
        uuid: &GpuUuid,
        home: &Path,
        deadline: Instant,
    ) -> Result<Result<GpuLock, Holder>, LockError> {
        let name = file_name(uuid);
        let failed = |source: io::Error| LockError::Io { path: self.directory.join(&name), source };
        for _ in 0..REPLACED_MAX {
            let mut file = self.open_file(directory, &name)?;
            if !lock_file(&file, deadline).map_err(failed)? {
                return Ok(Err(Holder::read(&mut file)));
            }
            // A cleaner of temporary files may have removed it between the two steps;
            // then this is a lock on a file that nobody else would find.
            let locked = file.metadata().map_err(failed)?;
            match rustix::fs::statat(&**directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(named) if (named.st_dev, named.st_ino) == (locked.dev(), locked.ino()) => {
                    Holder::write(&mut file, home).map_err(failed)?;
                    let (uuid, _directory) = (uuid.clone(), directory.clone());
                    return Ok(Ok(GpuLock { uuid, file, _directory }));
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(failed(e.into())),
            }
        }
        let problem = "its files are replaced all the time";
        Err(LockError::Unsafe { path: self.directory.clone(), problem })
    }

    fn open_file(&self, directory: &OwnedFd, name: &str) -> Result<File, LockError> {
        let path = || self.directory.join(name);
        let failed = |e: Errno| LockError::Io { path: path(), source: e.into() };
        for _ in 0..REPLACED_MAX {
            // Without O_CREAT, which the kernel may deny on other users' files in a
            // sticky directory (fs.protected_regular); NONBLOCK lest a pipe stops us.
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            match rustix::fs::openat(directory, name, flags, Mode::empty()) {
                Ok(file) => {
                    let file = File::from(file);
                    let metadata =
                        file.metadata().map_err(|source| LockError::Io { path: path(), source })?;
                    // A second name would let us write into a file elsewhere.
                    if metadata.is_file() && metadata.nlink() <= 1 {
                        return Ok(file);
                    }
                    let problem = "it is not a plain file of its own";
                    return Err(LockError::Unsafe { path: path(), problem });
                }
                Err(Errno::NOENT) => create_file(directory, name).map_err(failed)?,
                Err(Errno::LOOP) => {
                    let problem = "it is a symbolic link";
                    return Err(LockError::Unsafe { path: path(), problem });
                }
                Err(e) => return Err(failed(e)),
            }
        }
        let problem = "its files are removed all the time";
        Err(LockError::Unsafe { path: self.directory.clone(), problem })
    }
}

impl GpuLock {
    pub fn uuid(&self) -> &GpuUuid {
        &self.uuid
    }
}

impl AsFd for GpuLock {
    /// For a supervisor that is to keep the lock: a duplicate of it that is not closed
    /// on exec holds the same lock.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Holder {
    /// For the user: why a GPU of this machine is not offered.
    pub fn message(&self, uuid: &GpuUuid) -> String {
        let pid = self.pid.map_or_else(|| "pid unknown".to_owned(), |pid| format!("pid {pid}"));
        let home = match &self.home {
            Some(home) => format!("home {}", home.display()),
            None => "home unknown".to_owned(),
        };
        format!("GPU {uuid} is offered by another p2pit daemon ({pid}, {home})")
    }

    fn write(file: &mut File, home: &Path) -> io::Result<()> {
        let mut text = format!("{}\n", std::process::id()).into_bytes();
        text.extend_from_slice(home.as_os_str().as_bytes());
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&text)
    }

    fn read(file: &mut File) -> Self {
        let mut bytes = Vec::new();
        // What cannot be read is not known.
        let _ = file.take(HOLDER_BYTES_MAX).read_to_end(&mut bytes);
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (pid, home) = text.split_once('\n').unwrap_or((&text, ""));
        // It ends up on terminals.
        let printable = !home.is_empty() && !home.contains(char::is_control);
        Self { pid: pid.parse().ok(), home: printable.then(|| PathBuf::from(home)) }
    }
}

const SHARED_PARENT: &str = "/run/lock";
const SHARED_DIRECTORY: &str = "/run/lock/p2pit";
const FALLBACK_DIRECTORY: &str = "/tmp/p2pit-locks";
const OPEN_DIRECTORY: u32 = 0o1777;

/// The longest path and a pid.
const HOLDER_BYTES_MAX: u64 = 4096 + 16;

/// How often a file may vanish under us before we call it an attack.
const REPLACED_MAX: usize = 16;

/// Files appear with their final mode: one that others cannot open would exclude them.
fn create_file(directory: &OwnedFd, name: &str) -> Result<(), Errno> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|_| Errno::IO)?;
    let temporary = format!(".{}", data_encoding::HEXLOWER.encode(&random));
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, temporary.as_str(), flags, Mode::empty())?;
    let moved = rustix::fs::fchmod(&file, Mode::from_raw_mode(0o666)).and_then(|()| {
        let names = (temporary.as_str(), name);
        rustix::fs::renameat_with(directory, names.0, directory, names.1, RenameFlags::NOREPLACE)
    });
    match moved {
        Ok(()) => Ok(()),
        Err(error) => {
            rustix::fs::unlinkat(directory, temporary.as_str(), AtFlags::empty())?;
            // Another daemon was faster; its file does as well.
            if error == Errno::EXIST { Ok(()) } else { Err(error) }
        }
    }
}

/// UUIDs of MIG instances of older drivers contain slashes.
fn file_name(uuid: &GpuUuid) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    uuid.0.chars().take(128).map(safe).chain(".lock".chars()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn gpu(text: &str) -> GpuUuid {
        GpuUuid(text.to_owned())
    }

    fn locks() -> (tempfile::TempDir, GpuLocks) {
        let directory = tempfile::tempdir().unwrap();
        let locks = GpuLocks::at(directory.path().join("locks"));
        (directory, locks)
    }

    #[test]
    fn a_gpu_is_locked_once_and_the_second_daemon_learns_by_whom() {
        let (_directory, locks) = locks();
        let (a, b) = (gpu("GPU-a"), gpu("GPU-b"));
        let first = locks.acquire(std::slice::from_ref(&a), Path::new("/home/anna")).unwrap();
        assert_eq!(first.locks.len(), 1);
        let second = locks.acquire(&[a.clone(), b.clone()], Path::new("/home/ben")).unwrap();
        assert_eq!(second.locks[0].uuid(), &b);
        let (uuid, holder) = &second.busy[0];
        assert_eq!(
            holder.message(uuid),
            format!(
                "GPU GPU-a is offered by another p2pit daemon (pid {}, home /home/anna)",
                std::process::id()
            )
        );
        drop(first);
        assert_eq!(locks.acquire(&[a], Path::new("/home/ben")).unwrap().locks.len(), 1);
    }

    #[test]
    fn directory_and_files_are_open_to_every_user() {
        let (_directory, locks) = locks();
        let _held = locks.acquire(&[gpu("MIG-GPU-a/1/0")], Path::new("/home/anna")).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&locks.directory), 0o1777);
        assert_eq!(mode(&locks.directory.join("MIG-GPU-a_1_0.lock")), 0o666);
        assert_eq!(std::fs::read_dir(&locks.directory).unwrap().count(), 1);
    }

    #[test]
    fn a_lock_handed_to_a_supervisor_outlives_the_daemon_and_is_known_as_ours() {
        let (_directory, locks) = locks();
        let uuids = [gpu("GPU-a")];
        let home = Path::new("/home/anna");
        let mut first = locks.acquire(&uuids, home).unwrap();
        let supervisors = first.locks.remove(0).as_fd().try_clone_to_owned().unwrap();
        let restarted = locks.acquire(&uuids, home).unwrap();
        assert_eq!(restarted.ours, uuids);
        assert!(restarted.locks.is_empty() && restarted.busy.is_empty());
        assert_eq!(locks.acquire(&uuids, Path::new("/home/ben")).unwrap().busy.len(), 1);
        drop(supervisors);
        assert_eq!(locks.acquire(&uuids, home).unwrap().locks.len(), 1);
    }

    #[test]
    fn links_pipes_and_second_names_are_refused_and_never_written_to() {
        let (directory, locks) = locks();
        drop(locks.acquire(&[], Path::new("/home/anna")).unwrap());
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        symlink(&victim, locks.directory.join("GPU-symlink.lock")).unwrap();
        std::fs::hard_link(&victim, locks.directory.join("GPU-hardlink.lock")).unwrap();
        let pipe = locks.directory.join("GPU-pipe.lock");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o666.into(), 0)
            .unwrap();
        let uuids = [gpu("GPU-symlink"), gpu("GPU-hardlink"), gpu("GPU-pipe"), gpu("GPU-good")];
        let acquired = locks.acquire(&uuids, Path::new("/home/anna")).unwrap();
        assert_eq!(acquired.locks.len(), 1);
        assert_eq!(acquired.failed.len(), 3);
        for (uuid, error) in &acquired.failed {
            assert!(matches!(error, LockError::Unsafe { .. }), "{uuid}: {error}");
        }
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn a_symlink_in_place_of_the_directory_is_refused() {
        let (directory, locks) = locks();
        let elsewhere = directory.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, &locks.directory).unwrap();
        let error = locks.acquire(&[gpu("GPU-a")], Path::new("/home/anna")).unwrap_err();
        assert!(error.to_string().contains("not a directory"), "{error}");
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_holder_text_that_somebody_forged_is_shown_without_harm() {
        let holder = Holder::parse(b"12\n/home/\x1b[31mred");
        assert_eq!(holder, Holder { pid: Some(12), home: None });
        assert_eq!(Holder::parse(b"\xff\xff"), Holder { pid: None, home: None });
    }
}
