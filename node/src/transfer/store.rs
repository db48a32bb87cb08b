//! Content by BLAKE3 hash, one file per blob.
//!
//! A blob is written to `tmp/`, hashed on the way, and renamed to its place, so a name
//! in the store is never half a blob; what a crash left in `tmp/` is removed when the
//! store is opened next. A blob longer than one group has its outboard beside it, see
//! [`super::verified`]; it can be made again from the blob at any time. What arrives in
//! ranges gathers in `partial/`, where it outlives the transfer and the daemon: whoever
//! asks for the blob next goes on from there, after what is there has proved itself.
//! Zeros become holes. Writing is not yet keeping: [`BlobStore::persist`] makes a set of
//! blobs survive power loss. All calls block.
//!
//! ```text
//! ab/abcd…, ab/abcd….outboard   blobs; the time of a file is when it was last relied on
//! tmp/  partial/                what is not a blob yet
//! trash/ab/abcd…                blobs that nothing names any more: see `trash`
//! damaged/abcd…                 blobs that went bad here and were not brought again
//! ```
//!
//! What takes room is counted, and bounded where the owner of the store says so: see `room`.

mod intake;
mod partial;
mod proof;
mod room;
mod trash;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, Metadata, Permissions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use p2pit_protocol::BlobId;
use rustix::fs::{FlockOperation, flock, syncfs};
use thiserror::Error;

pub use self::{
    partial::Partial,
    proof::Verifiable,
    room::{Census, Limits, NoRoom, Used, amount},
    trash::{RELIED, Reach, Swept, Use},
};
use self::{partial::PartialSlot, room::Room, trash::Upkeep};

/// The unit of reading and writing content.
pub(super) const BUFFER_BYTES: usize = 256 << 10;
/// What nobody went on with for so long is given up.
pub const PARTIAL_KEPT: Duration = Duration::from_secs(14 * 24 * 3600);
const OUTBOARD: &str = "outboard";
const TMP: &str = "tmp";
const PARTIAL: &str = "partial";
const TRASH: &str = "trash";
const DAMAGED: &str = "damaged";

/// A handle on one directory of blobs; clones share it.
#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<Inner>,
    /// What is put may go beyond the limits: see [`BlobStore::for_results`].
    is_lenient: bool,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Those of late: a transfer of many pieces proves what is there once.
    partials: Mutex<BTreeMap<(BlobId, u64), PartialSlot>>,
    room: Room,
    upkeep: Upkeep,
    /// Holds a shared lock on `tmp/`, which tells another process opening this store
    /// that the files there are in use.
    _tmp_lock: File,
}

/// Why the store could not do what was asked.
#[derive(Debug, Error)]
pub enum Error {
    #[error("blob {0} is not in the store")]
    Missing(BlobId),
    /// What lies under this name is something else: remove it and fetch it again.
    #[error("blob {0} is corrupt in the store")]
    Corrupt(BlobId),
    #[error("blob {id} has {size} bytes where at most {max} are allowed")]
    TooLarge { id: BlobId, size: u64, max: u64 },
    /// Content from elsewhere is not what it was said to be.
    #[error("what was to be blob {expected} is blob {found}")]
    OtherContent { expected: BlobId, found: BlobId },
    #[error("cannot {doing} `{path}`")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl Error {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

impl BlobStore {
    /// The store in `dir`, made if it is not there, readable by this user alone.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_with(dir, Upkeep::default())
    }

    /// As [`Self::open`]; blobs are relied on for this long instead of [`RELIED`].
    pub fn open_for(dir: &Path, relied: Duration) -> Result<Self, Error> {
        Self::open_with(dir, Upkeep::default().relied_for(relied))
    }

    fn open_with(dir: &Path, upkeep: Upkeep) -> Result<Self, Error> {
        let (tmp, partial) = (dir.join(TMP), dir.join(PARTIAL));
        create_private_dir(&tmp)?;
        create_private_dir(&partial)?;
        fs::set_permissions(dir, Permissions::from_mode(0o700))
            .map_err(Error::io("set the mode of", dir))?;
        // So that `persist` need not look above the store.
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent {
            open_dir(parent)?.sync_all().map_err(Error::io("sync", parent))?;
        }
        let lock = open_dir(&tmp)?;
        // Only the first to come may sweep: to others the files may be in use.
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            sweep(&tmp, Duration::ZERO)?;
            sweep(&partial, PARTIAL_KEPT)?;
        }
        flock(&lock, FlockOperation::LockShared)
            .map_err(|errno| Error::io("lock", &tmp)(errno.into()))?;
        upkeep.set_has_trash(dir.join(TRASH).is_dir());
        let inner = Inner {
            root: dir.to_owned(),
            partials: Mutex::default(),
            room: Room::default(),
            upkeep,
            _tmp_lock: lock,
        };
        Ok(Self { inner: Arc::new(inner), is_lenient: false })
    }

    /// The same store for what a job left: it goes in whatever the limits say, as long as the
    /// disk has room. It comes from directories that the job has here and that go right after,
    /// and this may be the only copy.
    #[must_use]
    pub fn for_results(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), is_lenient: true }
    }

    /// Whether there is nothing in it, not even a part of a blob.
    pub fn is_empty(&self) -> Result<bool, Error> {
        let root = &self.inner.root;
        let mut dirs = vec![root.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
                let path = entry.map_err(Error::io("read", &dir))?.path();
                if !path.is_dir() {
                    return Ok(false);
                }
                dirs.push(path);
            }
        }
        Ok(true)
    }

    /// Whether the blob is here. Who is told so may rely on it: see [`RELIED`].
    pub fn has(&self, id: &BlobId) -> bool {
        matches!(self.find(id), Ok(Some(_)))
    }

    /// Where the blob lies if the store has it.
    pub fn path_of(&self, id: &BlobId) -> PathBuf {
        let name = id.to_string();
        self.inner.root.join(&name[..2]).join(name)
    }

    pub fn size(&self, id: &BlobId) -> Result<u64, Error> {
        self.found(id).map(|metadata| metadata.len())
    }

    fn found(&self, id: &BlobId) -> Result<Metadata, Error> {
        match self.find(id) {
            Ok(Some(metadata)) => Ok(metadata),
            Ok(None) => Err(Error::Missing(*id)),
            Err(source) => Err(Error::io("read", &self.path_of(id))(source)),
        }
    }

    /// The blob's file. Its content is not verified: the reader hashes what it uses.
    pub fn open_blob(&self, id: &BlobId) -> Result<File, Error> {
        self.found(id)?;
        let path = self.path_of(id);
        File::open(&path).map_err(|source| missing_or(id, "open", &path, source))
    }

    /// The verified content of a blob of at most `bytes_max`.
    pub fn read(&self, id: &BlobId, bytes_max: usize) -> Result<Vec<u8>, Error> {
        let file = self.open_blob(id)?;
        let size = self.size(id)?;
        let max = bytes_max as u64;
        if size > max {
            return Err(Error::TooLarge { id: *id, size, max });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        file.take(max).read_to_end(&mut bytes).map_err(Error::io("read", &self.path_of(id)))?;
        if BlobId::of(&bytes) == *id { Ok(bytes) } else { Err(Error::Corrupt(*id)) }
    }

    /// Removes a blob that has gone bad, and remembers that it was here: what only it names
    /// is not known any more, and so not taken for unused.
    pub fn remove(&self, id: &BlobId) -> Result<(), Error> {
        self.mark_damaged(id)?;
        let path = self.path_of(id);
        for path in [path.with_extension(OUTBOARD), path] {
            let room = fs::metadata(&path).map_or(0, |metadata| room::room_of(&metadata));
            match fs::remove_file(&path) {
                Ok(()) => self.inner.room.live_changed(-room),
                Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::io("remove", &path)(source)),
            }
        }
        Ok(())
    }

    /// Returns once these blobs survive the loss of power.
    pub fn persist<'a>(&self, ids: impl IntoIterator<Item = &'a BlobId>) -> Result<(), Error> {
        // An fsync costs 0.2 ms and more each; beyond this many, one sync of the whole
        // file system is cheaper, even beside others' writes.
        const FSYNCS_MAX: usize = 64;
        let mut ids: Vec<BlobId> = ids.into_iter().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() > FSYNCS_MAX {
            if let Some(missing) = ids.iter().find(|id| !self.has(id)) {
                return Err(Error::Missing(*missing));
            }
            let root = open_dir(&self.inner.root)?;
            return syncfs(&root)
                .map_err(|errno| Error::io("sync", &self.inner.root)(errno.into()));
        }
        let mut dirs = vec![self.inner.root.clone()];
        for id in &ids {
            let (file, path) = (self.open_blob(id)?, self.path_of(id));
            file.sync_all().map_err(Error::io("sync", &path))?;
            dirs.extend(path.parent().map(Path::to_owned));
        }
        dirs.dedup();
        for dir in dirs {
            open_dir(&dir)?.sync_all().map_err(Error::io("sync", &dir))?;
        }
        Ok(())
    }
}

/// One read that a signal does not disturb; 0 at the end.
pub(super) fn read_some(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn missing_or(id: &BlobId, doing: &'static str, path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => Error::Missing(*id),
        _ => Error::io(doing, path)(source),
    }
}

fn create_private_dir(dir: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(Error::io("create", dir))
}

fn open_dir(dir: &Path) -> Result<File, Error> {
    File::open(dir).map_err(Error::io("open", dir))
}

/// Removes the files of `dir` that nobody wrote to for so long.
fn sweep(dir: &Path, kept: Duration) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let modified = fs::metadata(&path).and_then(|it| it.modified());
        let age = modified.map_err(Error::io("read", &path))?.elapsed().unwrap_or_default();
        if age >= kept {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}
