//! The few things the journal asks of a file system, so that tests can make each fail.

use std::{
    fmt::Debug,
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Instant,
};

use super::OpenError;
use crate::home::{LOCK_PATIENCE, lock_file};

/// One directory of files.
pub(super) trait Disk: Debug + Send {
    fn list(&self) -> io::Result<Vec<String>>;
    /// An empty file of that name, in place of any other.
    fn create(&mut self, name: &str) -> io::Result<Box<dyn LogFile>>;
    fn open(&mut self, name: &str) -> io::Result<Box<dyn LogFile>>;
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&mut self, name: &str) -> io::Result<()>;
    /// Makes names durable.
    fn sync_dir(&mut self) -> io::Result<()>;
    /// What to call a file in messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// One file open for reading and writing.
pub(super) trait LogFile: Debug + Send {
    /// Its length.
    fn bytes(&self) -> io::Result<u64>;
    /// Fills `into` from `offset`; that it ends before is an error.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `bytes`; after an error any part of them may be there.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    fn set_len(&mut self, bytes: u64) -> io::Result<()>;
    /// Makes content and length durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// A real directory, locked against other processes for as long as this lives.
#[derive(Debug)]
pub(super) struct LockedDirectory {
    path: PathBuf,
    /// Closed on exec, so a supervisor never keeps its daemon's journal locked.
    _lock: File,
}

impl LockedDirectory {
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        // Else a power cut could take the directory with all that was acknowledged in it.
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
        }
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK_NAME))
            .map_err(failed)?;
        if !lock_file(&lock, Instant::now() + LOCK_PATIENCE).map_err(failed)? {
            return Err(OpenError::InUse { path: path.to_owned(), pid: holder(&mut lock) });
        }
        (|| {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        })()
        .map_err(failed)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }
}

impl Disk for LockedDirectory {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        Ok(Box::new(options.open(self.path.join(name))?))
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn LogFile>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).open(self.path.join(name))?))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl LogFile for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        Self::set_len(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

const LOCK_NAME: &str = "lock";

/// The pid in a lock file; `None` while its holder is still writing it.
fn holder(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
