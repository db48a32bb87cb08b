//! How much the store takes, and how much it may.
//!
//! Counters go along with every change; [`BlobStore::census`] walks the store and puts them
//! right. What is counted is what files take on the disk, so that holes are free. Whoever
//! brings content asks first, and is refused where the limits are reached although all that
//! could go is gone: first the trash, then what [`BlobStore::set_relief`] finds.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use rustix::fs::statvfs;

use super::{BlobStore, Error, PARTIAL, TRASH, trash};

/// Of the file system, what is left to others where it is large enough, and at most that.
const LEFT_FREE_PERCENT: u64 = 5;
const LEFT_FREE_BYTES_MAX: u64 = 5 << 30;
/// Files take whole blocks.
const BLOCK_BYTES: u64 = 4096;

/// What a store may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Whose store it is, for messages: a node, by its name.
    pub whose: String,
    /// Bytes that it may take together with what is [beside](BlobStore::set_beside) it; by
    /// itself it takes whatever leaves some of the file system free.
    pub quota: Option<u64>,
}

/// What takes room, in bytes of disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    pub blobs: u64,
    pub trash: u64,
    /// Of blobs that are still arriving.
    pub partial: u64,
    /// Of the node's other directories, as it last said.
    pub beside: u64,
}

impl Used {
    #[must_use]
    pub fn total(&self) -> u64 {
        self.blobs + self.trash + self.partial + self.beside
    }
}

/// What a walk of the store found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// How many.
    pub blobs: u64,
    pub bytes: u64,
    pub trash_bytes: u64,
    pub partial_bytes: u64,
    /// By how much the counters were wrong.
    pub drift_bytes: u64,
}

/// Content that goes beyond what the store may take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct NoRoom {
    whose: String,
    store: PathBuf,
    wanted: u64,
    bound: Bound,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    Quota { quota: u64, used: u64 },
    Disk { free: u64, left: u64 },
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { whose, store, wanted, bound } = self;
        let (wanted, store) = (amount(*wanted), store.display());
        match bound {
            Bound::Quota { quota, used } => write!(
                f,
                "No space left on {whose}: p2pit may use {} there (`storage` in its config.yaml) \
                 and uses {}, so that {wanted} more in {store} do not fit; `p2pit rm` removes \
                 what finished jobs left",
                amount(*quota),
                amount(*used),
            ),
            Bound::Disk { free, left } => write!(
                f,
                "No space left on {whose}: the disk of {store} has {} free, of which p2pit leaves \
                 {} to others, so that {wanted} more do not fit",
                amount(*free),
                amount(*left),
            ),
        }
    }
}

impl NoRoom {
    /// What its reader can do.
    #[must_use]
    pub fn next_step(&self) -> String {
        let whose = &self.whose;
        match self.bound {
            Bound::Quota { .. } => format!(
                "remove finished jobs with `p2pit rm JOB`, or let p2pit use more with `storage` \
                 in the config.yaml of {whose}, which it reads when it is started"
            ),
            Bound::Disk { .. } => format!(
                "free some space on that disk of {whose}, or remove finished jobs with `p2pit rm \
                 JOB`"
            ),
        }
    }
}

type Relief = Box<dyn Fn(u64) + Send + Sync>;

/// Counters and limits of one store.
#[derive(Default)]
pub(super) struct Room {
    limits: Mutex<Option<Limits>>,
    relief: OnceLock<Relief>,
    live: AtomicI64,
    trash: AtomicI64,
    partial: AtomicI64,
    beside: AtomicI64,
    /// Promised to content that is being written.
    reserved: AtomicI64,
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Room {
    pub(super) fn live_changed(&self, by: i64) {
        self.live.fetch_add(by, Ordering::Relaxed);
    }

    pub(super) fn trash_changed(&self, by: i64) {
        self.trash.fetch_add(by, Ordering::Relaxed);
    }

    pub(super) fn partial_changed(&self, by: i64) {
        self.partial.fetch_add(by, Ordering::Relaxed);
    }

    fn used(&self) -> Used {
        let bytes = |counter: &AtomicI64| {
            u64::try_from(counter.load(Ordering::Relaxed)).unwrap_or_default()
        };
        Used {
            blobs: bytes(&self.live),
            trash: bytes(&self.trash),
            partial: bytes(&self.partial),
            beside: bytes(&self.beside),
        }
    }

    fn limits(&self) -> MutexGuard<'_, Option<Limits>> {
        // Whole between any two of its statements.
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room that was promised to content; it is taken back with this.
#[derive(Debug)]
pub(super) struct Reserved<'a> {
    room: &'a Room,
    bytes: i64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.room.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl BlobStore {
    /// What content may take from now on. Without limits it may take the disk.
    pub fn set_limits(&self, limits: Limits) {
        *self.inner.room.limits() = Some(limits);
    }

    /// What is called where the trash alone does not make the room that is wanted, with how
    /// many bytes that are, to find more that can go; it returns once that is done.
    pub fn set_relief(&self, relief: impl Fn(u64) + Send + Sync + 'static) {
        // Once per store: a second would be of another daemon.
        let _ = self.inner.room.relief.set(Box::new(relief));
    }

    /// What the node's other directories take, which count for the quota.
    pub fn set_beside(&self, bytes: u64) {
        self.inner.room.beside.store(signed(bytes), Ordering::Relaxed);
    }

    /// What takes room now, as counted.
    #[must_use]
    pub fn used(&self) -> Used {
        self.inner.room.used()
    }

    /// Bytes that can still be brought, the trash given up; `None` without limits.
    pub fn room_left(&self) -> Option<u64> {
        let limits = self.inner.room.limits().clone()?;
        let used = self.used();
        // What cannot be asked has room: who writes there finds out.
        let of_disk =
            self.disk().map_or(u64::MAX, |disk| (disk.free + used.trash).saturating_sub(disk.left));
        let of_quota =
            limits.quota.map_or(u64::MAX, |quota| quota.saturating_sub(used.total() - used.trash));
        Some(of_disk.min(of_quota))
    }

    /// Bytes of the file system that are free, and what it has in all.
    pub fn disk_bytes(&self) -> io::Result<(u64, u64)> {
        self.disk().map(|disk| (disk.free, disk.total))
    }

    /// A promise of room, of none yet.
    pub(super) fn reserved(&self) -> Reserved<'_> {
        Reserved { room: &self.inner.room, bytes: 0 }
    }

    /// Promises room for so many bytes more.
    pub(super) fn reserve_more(&self, reserved: &mut Reserved<'_>, bytes: u64) -> io::Result<()> {
        // Content that arrives at the same time sees each other's promises.
        reserved.bytes += signed(bytes);
        self.inner.room.reserved.fetch_add(signed(bytes), Ordering::Relaxed);
        self.fits(0)
    }

    /// Whether so many bytes more fit, once all that can go is gone; may take seconds where
    /// they do not.
    ///
    /// # Errors
    /// [`NoRoom`], as an error of a full disk.
    pub fn fits(&self, bytes: u64) -> io::Result<()> {
        if self.is_lenient {
            return Ok(());
        }
        let Some(lack) = self.lacks(bytes) else { return Ok(()) };
        let trash_is_enough = || self.lack_of(self.promised(bytes), self.used().trash).is_none();
        if (self.is_trash_kept() || !trash_is_enough())
            && let Some(relief) = self.inner.room.relief.get()
        {
            relief(lack.wanted);
        }
        // For what does not fit all the same nothing is deleted.
        if trash_is_enough() {
            self.purge_until(|| self.lacks(bytes).is_none()).map_err(io::Error::other)?;
        }
        let refused = |lack| Err(io::Error::new(io::ErrorKind::StorageFull, lack));
        self.lacks(bytes).map_or(Ok(()), refused)
    }

    /// Whether so many bytes could fit if there were nothing else: before any of them travels.
    /// Nothing is deleted for what is only announced, and holes take no room: whether the rest
    /// fits shows as it is written.
    ///
    /// # Errors
    /// [`NoRoom`], as an error of a full disk.
    pub fn could_ever_fit(&self, bytes: u64) -> io::Result<()> {
        let limits = self.inner.room.limits().clone().filter(|_| !self.is_lenient);
        let Some(Limits { whose, quota }) = limits else { return Ok(()) };
        let refused = |bound| {
            let (whose, store) = (whose.clone(), self.inner.root.clone());
            let lack = NoRoom { whose, store, wanted: bytes, bound };
            Err(io::Error::new(io::ErrorKind::StorageFull, lack))
        };
        if let Some(quota) = quota.filter(|quota| *quota < bytes) {
            return refused(Bound::Quota { quota, used: self.used().total() });
        }
        match self.disk() {
            Ok(disk) if disk.total.saturating_sub(disk.left) < bytes => {
                refused(Bound::Disk { free: disk.free, left: disk.left })
            }
            // What cannot be asked has room: who writes there finds out.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Whether so many bytes would fit in all, once the trash and `freed` bytes more are gone.
    #[must_use]
    pub fn could_fit(&self, wanted: u64, freed: u64) -> bool {
        self.lack_of(wanted, self.used().trash.saturating_add(freed)).is_none()
    }

    /// Whether the limits are reached now.
    pub fn is_short(&self) -> bool {
        self.lacks(0).is_some()
    }

    fn lacks(&self, bytes: u64) -> Option<NoRoom> {
        self.lack_of(self.promised(bytes), 0)
    }

    /// So many bytes, with what was promised already.
    fn promised(&self, bytes: u64) -> u64 {
        let reserved = self.inner.room.reserved.load(Ordering::Relaxed);
        bytes.saturating_add(u64::try_from(reserved).unwrap_or_default())
    }

    /// Why so many bytes would not fit after `freed` are gone.
    fn lack_of(&self, wanted: u64, freed: u64) -> Option<NoRoom> {
        let room = &self.inner.room;
        let limits = room.limits();
        let Limits { whose, quota } = limits.as_ref()?;
        let lack = |bound| {
            let (whose, store) = (whose.clone(), self.inner.root.clone());
            Some(NoRoom { whose, store, wanted, bound })
        };
        let used = room.used().total();
        if let Some(quota) = *quota
            && used.saturating_sub(freed).saturating_add(wanted) > quota
        {
            return lack(Bound::Quota { quota, used });
        }
        // See `room_left`.
        let disk = self.disk().ok()?;
        if disk.free.saturating_add(freed) < disk.left.saturating_add(wanted) {
            return lack(Bound::Disk { free: disk.free, left: disk.left });
        }
        None
    }

    fn disk(&self) -> io::Result<Disk> {
        let of = statvfs(&self.inner.root)?;
        let total = of.f_blocks.saturating_mul(of.f_frsize);
        let left = (total / 100).saturating_mul(LEFT_FREE_PERCENT).min(LEFT_FREE_BYTES_MAX);
        Ok(Disk { free: of.f_bavail.saturating_mul(of.f_frsize), total, left })
    }

    /// Walks the store, and puts the counters right.
    pub fn census(&self) -> Result<Census, Error> {
        let room = &self.inner.room;
        let before = room.used();
        let mut census = Census::default();
        self.each_live(|_, metadata, is_blob| {
            census.bytes += signless(room_of(metadata));
            census.blobs += u64::from(is_blob);
            Ok(())
        })?;
        trash::each_file_below(&self.inner.root.join(TRASH), &mut |_, metadata| {
            census.trash_bytes += signless(room_of(metadata));
            Ok(())
        })?;
        // What is in `tmp/` is on its way, and counted as what was promised to it.
        trash::each_file_below(&self.inner.root.join(PARTIAL), &mut |_, metadata| {
            census.partial_bytes += signless(room_of(metadata));
            Ok(())
        })?;
        let now = room.used();
        // What came behind the walk is counted as well: rather too much than too little.
        let set = |counter: &AtomicI64, found: u64, before: u64, now: u64| {
            let came = now.saturating_sub(before);
            counter.store(signed(found.saturating_add(came)), Ordering::Relaxed);
            found.abs_diff(before)
        };
        census.drift_bytes = set(&room.live, census.bytes, before.blobs, now.blobs)
            + set(&room.trash, census.trash_bytes, before.trash, now.trash)
            + set(&room.partial, census.partial_bytes, before.partial, now.partial);
        Ok(census)
    }
}

struct Disk {
    free: u64,
    total: u64,
    /// What is left to others.
    left: u64,
}

/// What a file takes: its blocks, and not those that the file system has set aside behind
/// its end.
pub(super) fn room_of(metadata: &fs::Metadata) -> i64 {
    let length = metadata.len().div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES);
    signed(metadata.blocks().saturating_mul(512).min(length))
}

/// As [`room_of`], of what is at `path`, if anything.
pub(super) fn room_at(path: &Path) -> i64 {
    fs::symlink_metadata(path).map_or(0, |metadata| room_of(&metadata))
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn signless(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or_default()
}

/// Bytes as people read them: `1.5 GiB`.
#[must_use]
pub fn amount(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut shown = bytes as f64;
    while shown >= 1024.0 && unit + 1 < UNITS.len() {
        shown /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && shown < 100.0);
    format!("{shown:.digits$} {}", UNITS[unit])
}
