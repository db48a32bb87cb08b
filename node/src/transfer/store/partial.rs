//! Blobs that arrive in ranges.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use p2pit_protocol::BlobId;
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::{
    BUFFER_BYTES, BlobStore, Error, OUTBOARD, PARTIAL, create_private_dir,
    intake::{is_zero, write_at},
    room::room_at,
};
use crate::transfer::verified::{self, Proved, Ranges};

/// Kept open although nobody writes to them just now.
const PARTIALS_OPEN: usize = 32;

/// Empty until somebody has proved what is there, while others wait for that alone.
pub(super) type PartialSlot = Arc<Mutex<Option<Arc<Partial>>>>;

/// A blob of which some ranges may be here. Several transfers may add to it at once.
#[derive(Debug)]
pub struct Partial {
    id: BlobId,
    size: u64,
    pub(super) data: File,
    outboard: File,
    path: PathBuf,
    /// Whose limits bound it.
    store: BlobStore,
    /// What is counted for it.
    counted: AtomicI64,
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
    root.join(PARTIAL).join(format!("{id}-{size}"))
}

/// What a blob and its outboard take.
fn room_of_both(path: &Path) -> i64 {
    room_at(path) + room_at(&path.with_extension(OUTBOARD))
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
    fn open(store: &BlobStore, id: BlobId, size: u64) -> Result<Self, Error> {
        let path = partial_path(&store.inner.root, &id, size);
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
        let counted = AtomicI64::new(room_of_both(&path));
        Ok(Self { id, size, data, outboard, path, store: store.clone(), counted, state })
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
                if !is_zero(&bytes) {
                    self.store.fits(bytes.len() as u64)?;
                    let more = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
                    self.counted.fetch_add(more, Ordering::Relaxed);
                    self.store.inner.room.partial_changed(more);
                }
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

impl BlobStore {
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
        let partial = Arc::new(Partial::open(self, *id, size)?);
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
        self.inner.room.partial_changed(-partial.counted.load(Ordering::Relaxed));
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
        for file in [&partial.outboard, &partial.data] {
            self.touch_open(file).map_err(Error::io("set the time of", &partial.path))?;
        }
        // See `settle`.
        let _shared = self.share();
        let one = self.place();
        let before = room_of_both(&path);
        let from = partial.path.with_extension(OUTBOARD);
        let pairs = [(from, path.with_extension(OUTBOARD)), (partial.path.clone(), path)];
        for (from, to) in pairs {
            fs::rename(&from, &to).map_err(Error::io("rename a file to", &to))?;
        }
        state.end = Some(End::Finished);
        let path = self.path_of(&partial.id);
        self.inner.room.partial_changed(-partial.counted.load(Ordering::Relaxed));
        self.inner.room.live_changed(room_of_both(&path) - before);
        drop(one);
        self.unmark_damaged(&partial.id)?;
        Ok(true)
    }

    /// The files that somebody is at; of others it is forgotten what is there.
    pub(super) fn partials_in_use(&self) -> BTreeSet<PathBuf> {
        let mut partials = self.partials();
        partials.retain(|_, slot| is_in_use(slot));
        partials.keys().map(|(id, size)| partial_path(&self.inner.root, id, *size)).collect()
    }

    fn partials(&self) -> MutexGuard<'_, BTreeMap<(BlobId, u64), PartialSlot>> {
        // Whole between any two of its statements.
        self.inner.partials.lock().unwrap_or_else(PoisonError::into_inner)
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
