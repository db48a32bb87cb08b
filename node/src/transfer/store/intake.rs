//! Content on its way in: hashed as it is written, and named when it is whole.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use p2pit_protocol::BlobId;
use rustix::fs::{OFlags, ioctl_ficlone};
use tempfile::NamedTempFile;

use super::{
    BlobStore, Error, TMP, create_private_dir, read_some,
    room::{Reserved, room_at, room_of},
};
use crate::transfer::verified::{self, GROUP_BYTES};

/// Zeros up to the next multiple of this many bytes are not written: files start as a hole.
const HOLE_BYTES: usize = 64 << 10;

impl BlobStore {
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
            let metadata = temp.as_file().metadata().map_err(Error::io("read", path))?;
            let size = metadata.len();
            let room = u64::try_from(room_of(&metadata)).unwrap_or_default();
            self.fits(room).map_err(Error::io("write", temp.path()))?;
            let (id, outboard) =
                verified::hash(temp.as_file(), size).map_err(Error::io("read", temp.path()))?;
            let taken = Taken { store: self, temp, id, outboard, _reserved: None };
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
        let mut tee = Tee {
            reader,
            file: temp.as_file(),
            offset: 0,
            store: self,
            reserved: self.reserved(),
            failed: None,
        };
        let hashed = if size <= GROUP_BYTES {
            let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
            tee.read_exact(&mut bytes).map(|()| (BlobId::of(&bytes), Vec::new()))
        } else {
            verified::hash(&mut tee, size)
        };
        let Tee { failed, reserved, .. } = tee;
        if let Some(source) = failed {
            return Err(Error::io("write", temp.path())(source));
        }
        let (id, outboard) = hashed.map_err(Error::io("read", from))?;
        // What ends in a hole is not yet as long as it is.
        temp.as_file().set_len(size).map_err(Error::io("write", temp.path()))?;
        Ok(Taken { store: self, temp, id, outboard, _reserved: Some(reserved) })
    }

    pub(super) fn temp(&self) -> Result<NamedTempFile, Error> {
        let tmp = self.inner.root.join(TMP);
        tempfile::Builder::new()
            .prefix("in-")
            .tempfile_in(&tmp)
            .map_err(Error::io("create a file in", &tmp))
    }

    /// Gives a file its name in the store. Renaming over an older copy heals one that has
    /// gone bad.
    pub(super) fn settle(&self, temp: NamedTempFile, path: &Path) -> Result<(), Error> {
        self.touch_open(temp.as_file()).map_err(Error::io("set the time of", temp.path()))?;
        // A sweep must not take this for what it saw under that name before.
        let _shared = self.share();
        let _one = self.place();
        let before = room_at(path);
        match temp.persist(path) {
            Ok(_) => Ok(()),
            Err(failed) if failed.error.kind() == io::ErrorKind::NotFound => {
                create_private_dir(path.parent().unwrap_or(&self.inner.root))?;
                failed.file.persist(path).map(drop)
            }
            Err(failed) => Err(failed),
        }
        .map_err(|failed| Error::io("rename a file to", path)(failed.error))?;
        self.inner.room.live_changed(room_at(path) - before);
        Ok(())
    }
}

/// Content in a file of its own that has no name in the store yet.
struct Taken<'a> {
    store: &'a BlobStore,
    temp: NamedTempFile,
    id: BlobId,
    outboard: Vec<u8>,
    /// Until it counts as a blob.
    _reserved: Option<Reserved<'a>>,
}

impl Taken<'_> {
    fn commit(self) -> Result<BlobId, Error> {
        let path = self.store.path_of(&self.id);
        self.store.settle(self.temp, &path)?;
        self.store.write_outboard(&path, &self.outboard)?;
        self.store.unmark_damaged(&self.id)?;
        Ok(self.id)
    }
}

/// Writes what is read through it.
struct Tee<'a, 's, R> {
    reader: R,
    file: &'a File,
    offset: u64,
    store: &'s BlobStore,
    reserved: Reserved<'s>,
    /// Why writing failed; reading fails then, too.
    failed: Option<io::Error>,
}

impl<R: Read> Read for Tee<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = read_some(&mut self.reader, buffer)?;
        let bytes = &buffer[..read];
        let written = if is_zero(bytes) {
            Ok(())
        } else {
            let more = self.store.reserve_more(&mut self.reserved, read as u64);
            more.and_then(|()| write_at(self.file, bytes, self.offset))
        };
        if let Err(error) = written {
            let kind = error.kind();
            self.failed = Some(error);
            return Err(kind.into());
        }
        self.offset += read as u64;
        Ok(read)
    }
}

static ZEROS: [u8; HOLE_BYTES] = [0; HOLE_BYTES];

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(HOLE_BYTES).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Writes into a file that has nothing there yet, leaving out what is zero.
pub(super) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
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
