//! The directory of one process: what it was asked, what is known of its tree, how it
//! ended, and a lock that is held exactly as long as its supervisor lives.
//!
//! - `spec.json`: the [`Launch`], written by the daemon before it starts the supervisor.
//! - `lock`: an `flock` taken by the daemon and inherited by the supervisor, so that there
//!   is no moment at which neither holds it.
//! - `tree.json`: written by the supervisor before the process can execute anything.
//! - `ended.json`: the result, durable before it is announced.
//! - `control.sock`: where a restarted daemon connects.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustix::fs::{FallocateFlags, FlockOperation};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    spec::{Ended, ProcessId, ProcessSpec},
    tree::Identity,
};

pub(super) const CONTROL_SOCKET: &str = "control.sock";
const SPEC: &str = "spec.json";
const LOCK: &str = "lock";
const TREE: &str = "tree.json";
const ENDED: &str = "ended.json";
const ENDED_DRAFT: &str = "ended.json.draft";
/// An environment may be large; the kernel itself takes no more than 6 MiB.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Room set aside for the result while the disk has some. A result that is longer, through
/// the text of a reason, still fits unless the disk is full.
const ENDED_BYTES_RESERVED: u64 = 4096;

/// What a daemon hands to a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Launch {
    pub(super) id: ProcessId,
    /// The boot this was made in: nothing resumes in another.
    pub(super) boot_id: String,
    /// All run directories, hidden from the job.
    pub(super) run_root: PathBuf,
    pub(super) spec: ProcessSpec,
}

/// The process below which everything of the job lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tree {
    pub(super) guard: Identity,
}

/// The paths of one run directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    pub(super) fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Makes the directory; fails if there is one, because a process starts at most once.
    pub(super) fn create(&self) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(&self.path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn write_launch(&self, launch: &Launch) -> Result<()> {
        write_new(&self.path.join(SPEC), launch)
    }

    pub(super) fn read_launch(&self) -> Result<Launch> {
        read(&self.path.join(SPEC))?
            .with_context(|| format!("no {SPEC} in {}", self.path.display()))
    }

    pub(super) fn write_tree(&self, tree: &Tree) -> Result<()> {
        write_new(&self.path.join(TREE), tree)
    }

    pub(super) fn read_tree(&self) -> Result<Option<Tree>> {
        read(&self.path.join(TREE))
    }

    pub(super) fn read_ended(&self) -> Result<Option<Ended>> {
        read(&self.path.join(ENDED))
    }

    /// Whether a supervisor was here before.
    pub(super) fn is_used(&self) -> bool {
        [TREE, ENDED].iter().any(|name| self.path.join(name).exists())
    }

    /// Takes the lock, or `None` if the supervisor (or its starting daemon) holds it.
    pub(super) fn try_lock(&self) -> io::Result<Option<File>> {
        let path = self.path.join(LOCK);
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Where the result will be written, with its disk space set aside beforehand: a job that
/// fills the disk must not cost its own exit status.
#[derive(Debug)]
pub(super) struct ResultSlot {
    dir: PathBuf,
}

impl ResultSlot {
    pub(super) fn reserve(run_dir: &RunDir) -> Result<Self> {
        let path = run_dir.path.join(ENDED_DRAFT);
        let file = create_new(&path)?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, ENDED_BYTES_RESERVED) {
            // A file system without allocation in advance still takes the result later.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot reserve space at {}", path.display()));
            }
        }
        Ok(Self { dir: run_dir.path.clone() })
    }

    /// Durable once this returns.
    pub(super) fn write(&self, ended: &Ended) -> Result<()> {
        let draft = self.dir.join(ENDED_DRAFT);
        let bytes = serde_json::to_vec(ended).context("cannot encode the result")?;
        let context = || format!("cannot write {}", draft.display());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&draft)
            .with_context(context)?;
        file.write_all_at(&bytes, 0).with_context(context)?;
        file.set_len(bytes.len() as u64).with_context(context)?;
        file.sync_data().with_context(context)?;
        let target = self.dir.join(ENDED);
        fs::rename(&draft, &target)
            .with_context(|| format!("cannot rename to {}", target.display()))?;
        let dir =
            File::open(&self.dir).with_context(|| format!("cannot open {}", self.dir.display()))?;
        rustix::fs::fsync(dir.as_fd())
            .with_context(|| format!("cannot sync {}", self.dir.display()))
    }
}

fn create_new(path: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

fn write_new(path: &Path, value: &impl Serialize) -> Result<()> {
    let bytes =
        serde_json::to_vec(value).with_context(|| format!("cannot encode {}", path.display()))?;
    create_new(path)?.write_all(&bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot open {}", path.display()));
        }
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let value =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(Some(value))
}
