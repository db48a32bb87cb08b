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

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use p2pit_protocol::BlobId;
use rustix::{
    fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock, ioctl_ficlone, syncfs},
    io::Errno,
};
use tempfile::NamedTempFile;
use thiserror::Error;
use tracing::warn;

use super::verified::{self, EncodeError, GROUP_BYTES, Proved, Ranges};

/// The unit of reading and writing content.
pub(super) const BUFFER_BYTES: usize = 256 << 10;
/// Zeros up to the next multiple of this many bytes are not written: files start as a hole.
const HOLE_BYTES: usize = 64 << 10;
/// What nobody went on with for so long is given up.
const PARTIAL_KEPT: Duration = Duration::from_secs(14 * 24 * 3600);
/// Kept open although nobody writes to them just now.
const PARTIALS_OPEN: usize = 32;
const OUTBOARD: &str = "outboard";

/// A handle on one directory of blobs; clones share it.
#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Those of late: a transfer of many pieces proves what is there once.
    partials: Mutex<BTreeMap<(BlobId, u64), PartialSlot>>,
    /// Holds a shared lock on `tmp/`, which tells another process opening this store
    /// that the files there are in use.
    _tmp_lock: File,
}

/// Empty until somebody has proved what is there, while others wait for that alone.
type PartialSlot = Arc<Mutex<Option<Arc<Partial>>>>;

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
        let (tmp, partial) = (dir.join("tmp"), dir.join("partial"));
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
        let (root, partials) = (dir.to_owned(), Mutex::default());
        Ok(Self { inner: Arc::new(Inner { root, partials, _tmp_lock: lock }) })
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

    pub fn has(&self, id: &BlobId) -> bool {
        self.path_of(id).is_file()
    }

    /// Where the blob lies if the store has it.
    pub fn path_of(&self, id: &BlobId) -> PathBuf {
        let name = id.to_string();
        self.inner.root.join(&name[..2]).join(name)
    }

    pub fn size(&self, id: &BlobId) -> Result<u64, Error> {
        let path = self.path_of(id);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(source) => Err(missing_or(id, "read", &path, source)),
        }
    }

    /// The blob's file. Its content is not verified: the reader hashes what it uses.
    pub fn open_blob(&self, id: &BlobId) -> Result<File, Error> {
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

    pub fn put_bytes(&self, bytes: &[u8]) -> Result<BlobId, Error> {
        self.take(bytes, bytes.len() as u64, Path::new("the input"))?.commit()
    }

    /// Stores the content of a file. A link at the end of `path` is not followed.
    pub fn put_file(&self, path: &Path) -> Result<(BlobId, u64), Error> {
        let nofollow = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nofollow)
            .open(path)
            .map_err(Error::io("open", path))?;
        self.put_open_file(&file, path)
    }

    /// Stores the content of an open file from its start, as much as it has now;
    /// `path` is for errors only. Where the file system can share blocks, it does.
    pub fn put_open_file(&self, mut file: &File, path: &Path) -> Result<(BlobId, u64), Error> {
        // A file that somebody keeps appending to has an end all the same.
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let temp = self.temp()?;
        if ioctl_ficlone(temp.as_file(), file).is_ok() {
            // Shared blocks do not change with the file.
            let size = temp.as_file().metadata().map_err(Error::io("read", path))?.len();
            let (id, outboard) =
                verified::hash(temp.as_file(), size).map_err(Error::io("read", temp.path()))?;
            let taken = Taken { store: self, temp, id, outboard };
            return Ok((taken.commit()?, size));
        }
        file.rewind().map_err(Error::io("read", path))?;
        let taken = self.take(file, size, path)?;
        Ok((taken.commit()?, size))
    }

    /// Stores exactly `size` bytes of `reader`, which must be the blob `id`.
    pub fn put_expected(&self, id: &BlobId, reader: impl Read, size: u64) -> Result<(), Error> {
        let taken = self.take(reader, size, Path::new("the input"))?;
        if taken.id != *id {
            return Err(Error::OtherContent { expected: *id, found: taken.id });
        }
        taken.commit().map(drop)
    }

    /// Reads `size` bytes into a file of their own, hashing them on the way.
    fn take(&self, reader: impl Read, size: u64, from: &Path) -> Result<Taken<'_>, Error> {
        let temp = self.temp()?;
        let mut tee = Tee { reader, file: temp.as_file(), offset: 0, failed: None };
        let hashed = if size <= GROUP_BYTES {
            let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
            tee.read_exact(&mut bytes).map(|()| (BlobId::of(&bytes), Vec::new()))
        } else {
            verified::hash(&mut tee, size)
        };
        if let Some(source) = tee.failed {
            return Err(Error::io("write", temp.path())(source));
        }
        let (id, outboard) = hashed.map_err(Error::io("read", from))?;
        // What ends in a hole is not yet as long as it is.
        temp.as_file().set_len(size).map_err(Error::io("write", temp.path()))?;
        Ok(Taken { store: self, temp, id, outboard })
    }

    fn temp(&self) -> Result<NamedTempFile, Error> {
        let tmp = self.inner.root.join("tmp");
        tempfile::Builder::new()
            .prefix("in-")
            .tempfile_in(&tmp)
            .map_err(Error::io("create a file in", &tmp))
    }

    /// Gives a file its name in the store. Renaming over an older copy heals one that has
    /// gone bad.
    fn settle(&self, temp: NamedTempFile, path: &Path) -> Result<(), Error> {
        match temp.persist(path) {
            Ok(_) => return Ok(()),
            Err(failed) if failed.error.kind() == io::ErrorKind::NotFound => {
                create_private_dir(path.parent().unwrap_or(&self.inner.root))?;
                failed.file.persist(path)
            }
            Err(failed) => Err(failed),
        }
        .map_err(|failed| Error::io("rename a file to", path)(failed.error))?;
        Ok(())
    }

    /// Writes `ranges` of a blob with what proves them. A blob that turns out to be
    /// corrupt is removed, and is missing from then on.
    pub fn encode(
        &self,
        blob: &Verifiable,
        ranges: &Ranges,
        writer: impl Write,
    ) -> Result<(), Error> {
        let Verifiable { id, size, data, outboard } = blob;
        match verified::encode(id, *size, data, outboard, ranges, writer) {
            Ok(()) => Ok(()),
            Err(EncodeError::Io(e)) => Err(Error::io("read", &self.path_of(id))(e)),
            Err(EncodeError::Corrupt) => {
                self.check(id)?;
                // The blob is as it should be, so its outboard was not: the next to ask
                // gets a new one.
                Err(Error::Corrupt(*id))
            }
        }
    }

    /// A blob longer than one group, opened for [`Self::encode`].
    pub fn open_verifiable(&self, id: &BlobId) -> Result<Verifiable, Error> {
        let data = self.open_blob(id)?;
        let path = self.path_of(id);
        let size = data.metadata().map_err(Error::io("read", &path))?.len();
        let beside = path.with_extension(OUTBOARD);
        let outboard = match File::open(&beside) {
            Ok(outboard) => outboard,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.check(id)?;
                File::open(&beside).map_err(Error::io("open", &beside))?
            }
            Err(e) => return Err(Error::io("open", &beside)(e)),
        };
        Ok(Verifiable { id: *id, size, data, outboard })
    }

    /// Reads a blob to its end. It gets a new outboard if it is what it should be, and is
    /// removed if it is not.
    pub fn check(&self, id: &BlobId) -> Result<(), Error> {
        let file = self.open_blob(id)?;
        let path = self.path_of(id);
        let size = file.metadata().map_err(Error::io("read", &path))?.len();
        let (found, outboard) = verified::hash(&file, size).map_err(Error::io("read", &path))?;
        if found != *id {
            warn!(blob = %id, path = %path.display(), "a corrupt blob is removed");
            self.remove(id)?;
            return Err(Error::Corrupt(*id));
        }
        self.write_outboard(&path, &outboard)
    }

    fn write_outboard(&self, blob: &Path, outboard: &[u8]) -> Result<(), Error> {
        if outboard.is_empty() {
            return Ok(());
        }
        let mut temp = self.temp()?;
        temp.write_all(outboard).map_err(Error::io("write", temp.path()))?;
        self.settle(temp, &blob.with_extension(OUTBOARD))
    }

    /// A blob that arrives in ranges: what is there already, proved anew if nobody was at it
    /// of late. Whoever says another size of it has another file.
    pub fn partial(&self, id: &BlobId, size: u64) -> Result<Arc<Partial>, Error> {
        let slot = {
            let mut partials = self.partials();
            if partials.len() >= PARTIALS_OPEN {
                partials.retain(|_, slot| is_in_use(slot));
            }
            Arc::clone(partials.entry((*id, size)).or_default())
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(partial) = slot.as_ref().filter(|partial| partial.state().end.is_none()) {
            return Ok(Arc::clone(partial));
        }
        let partial = Arc::new(Partial::open(&self.inner.root, *id, size)?);
        *slot = Some(Arc::clone(&partial));
        Ok(partial)
    }

    /// Whether some of a blob may be here.
    pub fn has_partial(&self, id: &BlobId, size: u64) -> bool {
        partial_path(&self.inner.root, id, size).is_file()
    }

    /// Gives up what came of a blob, as when it does not fit: a full disk that stays full
    /// would stop everything else here. Others that are at it fail, too.
    pub fn give_up(&self, partial: &Partial) -> Result<(), Error> {
        let mut state = partial.state();
        if state.end.is_some() {
            return Ok(());
        }
        state.end = Some(End::GivenUp);
        for path in [partial.path.with_extension(OUTBOARD), partial.path.clone()] {
            // What is still open keeps its room.
            match OpenOptions::new().write(true).truncate(true).open(&path) {
                Ok(_) => fs::remove_file(&path).map_err(Error::io("remove", &path))?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("remove", &path)(e)),
            }
        }
        Ok(())
    }

    /// Gives a blob its name once nothing of it is missing; whether it has it.
    pub fn finish(&self, partial: &Partial) -> Result<bool, Error> {
        let mut state = partial.state();
        match state.end {
            Some(End::Finished) => return Ok(true),
            Some(End::GivenUp) => return Err(given_up(&partial.path)),
            None => {}
        }
        if !Ranges::all(partial.size).without(&state.have).is_empty() {
            return Ok(false);
        }
        let path = self.path_of(&partial.id);
        create_private_dir(path.parent().unwrap_or(&self.inner.root))?;
        let from = partial.path.with_extension(OUTBOARD);
        let pairs = [(from, path.with_extension(OUTBOARD)), (partial.path.clone(), path)];
        for (from, to) in pairs {
            fs::rename(&from, &to).map_err(Error::io("rename a file to", &to))?;
        }
        state.end = Some(End::Finished);
        Ok(true)
    }

    fn partials(&self) -> MutexGuard<'_, BTreeMap<(BlobId, u64), PartialSlot>> {
        // Whole between any two of its statements.
        self.inner.partials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a blob; one that is not there is forgotten already.
    pub fn remove(&self, id: &BlobId) -> Result<(), Error> {
        let path = self.path_of(id);
        for path in [path.with_extension(OUTBOARD), path] {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path)(source));
                }
                Ok(()) | Err(_) => {}
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

/// Content in a file of its own that has no name in the store yet.
struct Taken<'a> {
    store: &'a BlobStore,
    temp: NamedTempFile,
    id: BlobId,
    outboard: Vec<u8>,
}

impl Taken<'_> {
    fn commit(self) -> Result<BlobId, Error> {
        let path = self.store.path_of(&self.id);
        self.store.settle(self.temp, &path)?;
        self.store.write_outboard(&path, &self.outboard)?;
        Ok(self.id)
    }
}

/// Writes what is read through it.
struct Tee<'a, R> {
    reader: R,
    file: &'a File,
    offset: u64,
    /// Why writing failed; reading fails then, too.
    failed: Option<io::Error>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = read_some(&mut self.reader, buffer)?;
        if let Err(error) = write_at(self.file, &buffer[..read], self.offset) {
            let kind = error.kind();
            self.failed = Some(error);
            return Err(kind.into());
        }
        self.offset += read as u64;
        Ok(read)
    }
}

/// Makes a hole, or zeros where the file system has no holes.
fn clear(file: &File, range: std::ops::Range<u64>) -> io::Result<()> {
    let length = range.end - range.start;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, hole, range.start, length) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL) if length == 0 => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; BUFFER_BYTES];
            let mut at = range.start;
            while at < range.end {
                let now = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(BUFFER_BYTES);
                file.write_all_at(&zeros[..now], at)?;
                at += now as u64;
            }
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Writes into a file that has nothing there yet, leaving out what is zero.
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    static ZEROS: [u8; HOLE_BYTES] = [0; HOLE_BYTES];
    let (mut start, mut at) = (0, 0);
    while at < bytes.len() {
        // Pieces come in any length: to the next boundary in the file.
        let to_boundary = HOLE_BYTES - (offset as usize + at) % HOLE_BYTES;
        let end = bytes.len().min(at + to_boundary);
        if bytes[at..end] == ZEROS[..end - at] {
            file.write_all_at(&bytes[start..at], offset + start as u64)?;
            start = end;
        }
        at = end;
    }
    file.write_all_at(&bytes[start..], offset + start as u64)
}

/// A blob longer than one group, whose ranges can be proved.
#[derive(Debug)]
pub struct Verifiable {
    pub id: BlobId,
    pub size: u64,
    data: File,
    outboard: File,
}

/// A blob of which some ranges may be here. Several transfers may add to it at once.
#[derive(Debug)]
pub struct Partial {
    id: BlobId,
    size: u64,
    data: File,
    outboard: File,
    path: PathBuf,
    state: Mutex<PartialState>,
}

#[derive(Debug)]
struct PartialState {
    have: Ranges,
    end: Option<End>,
}

#[derive(Debug, Clone, Copy)]
enum End {
    /// It has its name in the store.
    Finished,
    GivenUp,
}

fn partial_path(root: &Path, id: &BlobId, size: u64) -> PathBuf {
    root.join("partial").join(format!("{id}-{size}"))
}

fn given_up(path: &Path) -> Error {
    Error::io("write", path)(Errno::NOSPC.into())
}

fn is_in_use(slot: &PartialSlot) -> bool {
    let Ok(partial) = slot.try_lock() else { return true };
    Arc::strong_count(slot) > 1
        || partial.as_ref().is_some_and(|partial| Arc::strong_count(partial) > 1)
}

impl Partial {
    fn open(root: &Path, id: BlobId, size: u64) -> Result<Self, Error> {
        let path = partial_path(root, &id, size);
        let open = |path: &Path| {
            let options = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path);
            options.map_err(Error::io("open", path))
        };
        let (data, outboard) = (open(&path)?, open(&path.with_extension(OUTBOARD))?);
        let length = data.metadata().map_err(Error::io("read", &path))?.len();
        let mut have = Ranges::default();
        if length == size {
            have = verified::proved_ranges(&id, size, &data, &outboard)
                .map_err(Error::io("read", &path))?;
        } else {
            for length in [0, size] {
                data.set_len(length).map_err(Error::io("write", &path))?;
            }
        }
        // What is not proved must read as zeros: zeros are not written.
        for range in Ranges::all(size).without(&have).bytes(size) {
            clear(&data, range).map_err(Error::io("write", &path))?;
        }
        let state = Mutex::new(PartialState { have, end: None });
        Ok(Self { id, size, data, outboard, path, state })
    }

    /// What is still to come.
    pub fn missing(&self) -> Ranges {
        Ranges::all(self.size).without(&self.state().have)
    }

    /// Adds what has been proved to be of this blob.
    pub fn add(&self, proved: Proved) -> io::Result<()> {
        if matches!(self.state().end, Some(End::GivenUp)) {
            return Err(Errno::NOSPC.into());
        }
        match proved {
            Proved::Hashes { offset, bytes } => self.outboard.write_all_at(&bytes, offset),
            Proved::Content { offset, bytes } => {
                write_at(&self.data, &bytes, offset)?;
                let end = offset + bytes.len().max(1) as u64;
                self.state().have.add(&Ranges::covering(offset..end));
                Ok(())
            }
        }
    }

    /// Says what [`Self::add`] failed of.
    pub fn write_failed(&self, source: io::Error) -> Error {
        Error::io("write", &self.path)(source)
    }

    fn state(&self) -> MutexGuard<'_, PartialState> {
        // Whole between any two of its statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_comes_back_under_its_hash() {
        let (_dir, store) = store();
        let id = store.put_bytes(b"hello").unwrap();
        assert_eq!(id, BlobId::of(b"hello"));
        assert!(store.has(&id));
        assert_eq!(store.size(&id).unwrap(), 5);
        assert_eq!(store.read(&id, 5).unwrap(), b"hello");
        assert!(matches!(store.read(&id, 4), Err(Error::TooLarge { size: 5, max: 4, .. })));
        store.put_expected(&id, &b"hello"[..], 5).unwrap();
        let other = store.put_expected(&id, &b"other"[..], 5);
        assert!(matches!(other, Err(Error::OtherContent { expected, .. }) if expected == id));
        store.remove(&id).unwrap();
        store.remove(&id).unwrap();
        assert!(matches!(store.read(&id, 5), Err(Error::Missing(missing)) if missing == id));
        assert!(matches!(store.size(&id), Err(Error::Missing(_))));
        assert!(matches!(store.open_blob(&id), Err(Error::Missing(_))));
    }

    #[test]
    fn a_file_of_many_buffers_is_stored_whole() {
        let (dir, store) = store();
        let content: Vec<u8> = (0..3 * BUFFER_BYTES + 7).map(|i| (i % 251) as u8).collect();
        let path = dir.path().join("large");
        fs::write(&path, &content).unwrap();
        let (id, size) = store.put_file(&path).unwrap();
        assert_eq!((id, size), (BlobId::of(&content), content.len() as u64));
        assert_eq!(store.read(&id, content.len()).unwrap(), content);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(store.put_file(&link), Err(Error::Io { .. })));
    }

    #[test]
    fn a_corrupt_blob_is_named_and_putting_it_again_heals_it() {
        let (_dir, store) = store();
        let id = store.put_bytes(b"right").unwrap();
        fs::write(store.path_of(&id), b"wrong").unwrap();
        assert!(matches!(store.read(&id, 9), Err(Error::Corrupt(corrupt)) if corrupt == id));
        store.put_bytes(b"right").unwrap();
        assert_eq!(store.read(&id, 9).unwrap(), b"right");
    }

    #[test]
    fn files_are_private_and_leftovers_are_swept_unless_somebody_uses_them() {
        let (dir, store) = store();
        let id = store.put_bytes(b"x").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&store.path_of(&id)), 0o600);
        assert_eq!(mode(dir.path().join("blobs").as_path()), 0o700);
        assert_eq!(mode(store.path_of(&id).parent().unwrap()), 0o700);

        let left = dir.path().join("blobs/tmp/in-left");
        fs::write(&left, b"torn").unwrap();
        let second = BlobStore::open(&dir.path().join("blobs")).unwrap();
        assert!(left.exists());
        drop((store, second));
        let reopened = BlobStore::open(&dir.path().join("blobs")).unwrap();
        assert!(!left.exists());
        assert!(reopened.has(&id));
    }

    #[test]
    fn what_was_not_read_whole_leaves_nothing() {
        let (dir, store) = store();
        for size in [5, GROUP_BYTES + 1] {
            let id = BlobId::of(b"whole");
            assert!(store.put_expected(&id, &b"half"[..], size).is_err());
        }
        assert_eq!(fs::read_dir(dir.path().join("blobs/tmp")).unwrap().count(), 0);
    }

    #[test]
    fn ranges_gather_over_transfers_and_restarts_until_the_blob_is_whole() {
        let (from_dir, from) = store();
        let (to_dir, to) = store();
        let content = numbers(5 * GROUP_BYTES as usize + 3);
        let id = from.put_bytes(&content).unwrap();
        let size = content.len() as u64;
        let blob = from.open_verifiable(&id).unwrap();
        let send = |ranges: &Ranges, partial: &Partial| {
            let mut encoded = Vec::new();
            from.encode(&blob, ranges, &mut encoded).unwrap();
            verified::decode(&id, size, ranges, &encoded[..], |it| partial.add(it)).unwrap();
        };
        let first = Ranges::covering(GROUP_BYTES..3 * GROUP_BYTES);
        {
            let partial = to.partial(&id, size).unwrap();
            send(&first, &partial);
            assert!(Arc::ptr_eq(&partial, &to.partial(&id, size).unwrap()));
            assert!(!to.finish(&partial).unwrap() && !to.has(&id));
        }
        // Who said another size before does not spoil what comes.
        let other = BlobId::of(b"another");
        to.partial(&other, 9).unwrap();
        assert_eq!(to.partial(&other, 12).unwrap().missing(), Ranges::all(12));
        drop(to);
        let to = BlobStore::open(&to_dir.path().join("blobs")).unwrap();
        let partial = to.partial(&id, size).unwrap();
        assert_eq!(partial.missing(), Ranges::all(size).without(&first));
        // A disk that lost some of it is believed in nothing, and what it left there is gone.
        partial.data.write_all_at(b"lost", 2 * GROUP_BYTES).unwrap();
        partial.data.write_all_at(b"left", 4 * GROUP_BYTES).unwrap();
        drop((partial, to));
        let to = BlobStore::open(&to_dir.path().join("blobs")).unwrap();
        let partial = to.partial(&id, size).unwrap();
        let missing = partial.missing();
        assert_eq!(missing.byte_count(size), size - GROUP_BYTES);
        let mut left = [1; 4];
        partial.data.read_exact_at(&mut left, 4 * GROUP_BYTES).unwrap();
        assert_eq!(left, [0; 4]);
        send(&missing, &partial);
        assert!(to.finish(&partial).unwrap() && to.finish(&partial).unwrap());
        assert_eq!(to.read(&id, content.len()).unwrap(), content);
        assert!(to.path_of(&id).with_extension(OUTBOARD).exists());
        drop(from_dir);
    }

    #[test]
    fn who_misstates_a_size_touches_nothing_of_the_blob() {
        let (_from_dir, from) = store();
        let (_to_dir, to) = store();
        let content = numbers(3 * GROUP_BYTES as usize);
        let (id, size) = (from.put_bytes(&content).unwrap(), content.len() as u64);
        let blob = from.open_verifiable(&id).unwrap();
        let partial = to.partial(&id, size).unwrap();
        for range in [0..GROUP_BYTES, GROUP_BYTES..size] {
            let ranges = Ranges::covering(range);
            let mut encoded = Vec::new();
            from.encode(&blob, &ranges, &mut encoded).unwrap();
            verified::decode(&id, size, &ranges, &encoded[..], |it| partial.add(it)).unwrap();
            to.partial(&id, size - 1).unwrap();
            to.partial(&id, size + 1).unwrap();
        }
        assert!(to.finish(&partial).unwrap());
        assert_eq!(to.read(&id, content.len()).unwrap(), content);
    }

    #[test]
    fn what_was_given_up_is_gone_for_all_and_can_begin_anew() {
        let (dir, store) = store();
        let id = BlobId::of(b"large");
        let size = 2 * GROUP_BYTES;
        let (one, two) = (store.partial(&id, size).unwrap(), store.partial(&id, size).unwrap());
        one.data.write_all_at(&numbers(9_000), 0).unwrap();
        store.give_up(&one).unwrap();
        store.give_up(&two).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("blobs/partial")).unwrap().count(), 0);
        let part = Proved::Hashes { offset: 0, bytes: [0; 64] };
        assert_eq!(two.add(part).unwrap_err().kind(), io::ErrorKind::StorageFull);
        let anew = store.partial(&id, size).unwrap();
        assert!(store.finish(&two).is_err());
        assert!(!store.finish(&anew).unwrap() && store.has_partial(&id, size));
    }

    #[test]
    fn a_blob_that_went_bad_is_removed_and_a_lost_outboard_is_made_again() {
        let (_dir, store) = store();
        let content = numbers(3 * GROUP_BYTES as usize);
        let (id, all) = (store.put_bytes(&content).unwrap(), Ranges::all(content.len() as u64));
        let outboard = store.path_of(&id).with_extension(OUTBOARD);
        fs::remove_file(&outboard).unwrap();
        let blob = store.open_verifiable(&id).unwrap();
        store.encode(&blob, &all, io::sink()).unwrap();
        fs::write(&outboard, [7; 128]).unwrap();
        let blob = store.open_verifiable(&id).unwrap();
        assert!(store.encode(&blob, &all, io::sink()).is_err());
        let blob = store.open_verifiable(&id).unwrap();
        store.encode(&blob, &all, io::sink()).unwrap();
        File::options().write(true).open(store.path_of(&id)).unwrap().write_all(b"bad").unwrap();
        assert!(matches!(store.encode(&blob, &all, io::sink()), Err(Error::Corrupt(_))));
        assert!(!store.has(&id) && !outboard.exists());
        assert!(matches!(store.open_verifiable(&id), Err(Error::Missing(_))));
    }

    #[test]
    fn zeros_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        let (dir, store) = store();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.write_all_at(b"start", 0).unwrap();
        file.write_all_at(b"end", 40 << 20).unwrap();
        file.set_len(64 << 20).unwrap();
        let (id, size) = store.put_file(&path).unwrap();
        let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
        assert_eq!(size, 64 << 20);
        assert!(blocks(&store.path_of(&id)) <= 1 << 20);
        let (_other, to) = self::store();
        let partial = to.partial(&id, size).unwrap();
        let mut encoded = Vec::new();
        let blob = store.open_verifiable(&id).unwrap();
        store.encode(&blob, &Ranges::all(size), &mut encoded).unwrap();
        verified::decode(&id, size, &Ranges::all(size), &encoded[..], |it| partial.add(it))
            .unwrap();
        assert!(to.finish(&partial).unwrap());
        assert!(blocks(&to.path_of(&id)) <= 1 << 20);
        to.check(&id).unwrap();
    }

    fn numbers(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn persisting_names_the_blob_that_is_missing() {
        let (_dir, store) = store();
        let few = [store.put_bytes(b"a").unwrap(), store.put_bytes(b"b").unwrap()];
        store.persist(&few).unwrap();
        let mut many: Vec<BlobId> = (0..100_u8).map(|i| store.put_bytes(&[i]).unwrap()).collect();
        store.persist(&many).unwrap();
        many.push(BlobId::of(b"absent"));
        assert!(matches!(store.persist(&many), Err(Error::Missing(_))));
        assert!(matches!(store.persist(&many[100..]), Err(Error::Missing(_))));
    }

    fn store() -> (tempfile::TempDir, BlobStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
        (dir, store)
    }
}
