//! Content by BLAKE3 hash, one file per blob.
//!
//! A blob is written to `tmp/`, hashed on the way, and renamed to its place, so a name
//! in the store is never half a blob; what a crash left in `tmp/` is removed when the
//! store is opened next. Writing is not yet keeping: [`BlobStore::persist`] makes a set
//! of blobs survive power loss. All calls block.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use p2pit_protocol::BlobId;
use rustix::fs::{FlockOperation, OFlags, flock, ioctl_ficlone, syncfs};
use tempfile::NamedTempFile;
use thiserror::Error;

/// The unit of reading and writing content.
pub(super) const BUFFER_BYTES: usize = 256 << 10;

/// A handle on one directory of blobs; clones share it.
#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
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
        let tmp = dir.join("tmp");
        create_private_dir(&tmp)?;
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
            sweep(&tmp)?;
        }
        flock(&lock, FlockOperation::LockShared)
            .map_err(|errno| Error::io("lock", &tmp)(errno.into()))?;
        Ok(Self { inner: Arc::new(Inner { root: dir.to_owned(), _tmp_lock: lock }) })
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
        let mut writer = self.writer()?;
        writer.write(bytes)?;
        Ok(writer.commit()?.0)
    }

    /// Stores all that `reader` yields; gives the blob's id and size.
    pub fn put_reader(&self, reader: impl Read) -> Result<(BlobId, u64), Error> {
        let mut writer = self.writer()?;
        writer.write_from(reader, Path::new("the input"))?;
        writer.commit()
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
        let mut writer = self.writer()?;
        if ioctl_ficlone(writer.temp.as_file(), file).is_ok() {
            writer.hash_what_is_there()?;
            return writer.commit();
        }
        file.rewind().map_err(Error::io("read", path))?;
        // A file that somebody keeps appending to has an end all the same.
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        writer.write_from(file.take(size), path)?;
        writer.commit()
    }

    /// A blob to be written piece by piece.
    pub fn writer(&self) -> Result<BlobWriter, Error> {
        let tmp = self.inner.root.join("tmp");
        let temp = tempfile::Builder::new()
            .prefix("in-")
            .tempfile_in(&tmp)
            .map_err(Error::io("create a file in", &tmp))?;
        Ok(BlobWriter { store: self.clone(), temp, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Forgets a blob; one that is not there is forgotten already.
    pub fn remove(&self, id: &BlobId) -> Result<(), Error> {
        let path = self.path_of(id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path)(source))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Returns once these blobs survive the loss of power.
    pub fn persist<'a>(&self, ids: impl IntoIterator<Item = &'a BlobId>) -> Result<(), Error> {
        // An fsync costs 0.2 ms and more each; beyond this many, one sync of the whole
        // file system is cheaper, even beside others' writes.
        const FSYNCS_MAX: usize = 64;
        let mut ids: Vec<BlobId> = ids.into_iter().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        let files = ids.iter().map(|id| self.open_blob(id));
        if ids.len() > FSYNCS_MAX {
            files.into_iter().try_for_each(|file| file.map(drop))?;
            let root = open_dir(&self.inner.root)?;
            return syncfs(&root)
                .map_err(|errno| Error::io("sync", &self.inner.root)(errno.into()));
        }
        let mut dirs = vec![self.inner.root.clone()];
        for (file, id) in files.zip(&ids) {
            let path = self.path_of(id);
            file?.sync_all().map_err(Error::io("sync", &path))?;
            dirs.extend(path.parent().map(Path::to_owned));
        }
        dirs.dedup();
        for dir in dirs {
            open_dir(&dir)?.sync_all().map_err(Error::io("sync", &dir))?;
        }
        Ok(())
    }
}

/// A blob on its way into the store. Dropped before it is committed, it is gone.
pub struct BlobWriter {
    store: BlobStore,
    temp: NamedTempFile,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl BlobWriter {
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        let (mut file, path) = (self.temp.as_file(), self.temp.path());
        file.write_all(bytes).map_err(Error::io("write", path))
    }

    /// What has been written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The id of what has been written so far.
    pub fn id(&self) -> BlobId {
        BlobId(*self.hasher.finalize().as_bytes())
    }

    /// Gives the blob its name in the store.
    pub fn commit(self) -> Result<(BlobId, u64), Error> {
        let (id, bytes) = (self.id(), self.bytes);
        let path = self.store.path_of(&id);
        // Renaming over an older copy heals one that has gone bad.
        match self.temp.persist(&path) {
            Ok(_) => return Ok((id, bytes)),
            Err(failed) if failed.error.kind() == io::ErrorKind::NotFound => {
                create_private_dir(path.parent().unwrap_or(&self.store.inner.root))?;
                failed.file.persist(&path)
            }
            Err(failed) => Err(failed),
        }
        .map_err(|failed| Error::io("rename a file to", &path)(failed.error))?;
        Ok((id, bytes))
    }

    fn write_from(&mut self, mut reader: impl Read, from: &Path) -> Result<(), Error> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match read_some(&mut reader, &mut buffer).map_err(Error::io("read", from))? {
                0 => return Ok(()),
                read => self.write(&buffer[..read])?,
            }
        }
    }

    fn hash_what_is_there(&mut self) -> Result<(), Error> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let (mut file, path) = (self.temp.as_file(), self.temp.path());
            match read_some(&mut file, &mut buffer).map_err(Error::io("read", path))? {
                0 => return Ok(()),
                read => {
                    self.hasher.update(&buffer[..read]);
                    self.bytes += read as u64;
                }
            }
        }
    }
}

impl fmt::Debug for BlobWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobWriter").field("bytes", &self.bytes).finish_non_exhaustive()
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

fn sweep(tmp: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(tmp).map_err(Error::io("read", tmp))? {
        let path = entry.map_err(Error::io("read", tmp))?.path();
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
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
        assert_eq!(store.put_reader(&b"hello"[..]).unwrap(), (id, 5));
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
    fn an_uncommitted_blob_leaves_nothing() {
        let (dir, store) = store();
        let mut writer = store.writer().unwrap();
        writer.write(b"half").unwrap();
        assert_eq!(writer.id(), BlobId::of(b"half"));
        drop(writer);
        assert_eq!(fs::read_dir(dir.path().join("blobs/tmp")).unwrap().count(), 0);
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
