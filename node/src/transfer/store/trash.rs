//! Blobs that nothing names any more, on their way out.
//!
//! [`BlobStore::sweep`] moves what is not reachable to `trash/`, and [`BlobStore::purge`]
//! removes what has been there for long enough. Whoever asks for a blob that is in the trash
//! has it back.
//!
//! Who was told that a blob is here may rely on it, although nothing names it yet: the record
//! of a submission comes long after the question what is missing. So each answer, each reading
//! and each writing of a blob sets the time of its file; a sweep leaves alone whatever was
//! relied on within [`RELIED`], or since the oldest [`Use`] that still goes on began. It looks
//! at that time and moves the file under a lock that everybody who relies on a blob shares. So
//! either the sweep sees the new time, or who asks finds the blob in the trash and takes it back
//! out. The time is on the disk and outlives the daemon.
//!
//! A crash between two steps leaves a blob in its place or in the trash, both of which is fine,
//! and at most its outboard elsewhere, which is made again.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    fs::{self, File, FileTimes, Metadata},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use p2pit_protocol::BlobId;

use super::{
    BlobStore, DAMAGED, Error, OUTBOARD, PARTIAL, TRASH, create_private_dir,
    room::{room_at, room_of},
};
use crate::transfer::tree::{MANIFEST_BYTES_MAX, Tree};

/// For how long at least who was told that a blob is here may rely on that, although nothing
/// names it.
pub const RELIED: Duration = Duration::from_secs(3600);
/// A file whose time is younger than this part of that is not touched again.
const TOUCH_PART: u32 = 12;
/// A file from further in the future was written under a clock that was wrong.
const FUTURE_MAX: Duration = Duration::from_secs(300);

type Clock = Box<dyn Fn() -> SystemTime + Send + Sync>;

/// What keeps relied-on blobs from a sweep.
pub(super) struct Upkeep {
    clock: Clock,
    /// See [`RELIED`].
    relied: Duration,
    /// Shared by who relies on a blob; a sweep that moves one away has it alone.
    gate: RwLock<()>,
    /// Of those who share it, one at a time puts a file where one may be: else both count it.
    placing: Mutex<()>,
    uses: Arc<Mutex<BTreeMap<u64, SystemTime>>>,
    /// Saves looking there for every blob that is not here.
    has_trash: AtomicBool,
    /// How often it was said that what is in the trash may be named again.
    named_again: AtomicU64,
    /// Of these the last sweep knew.
    swept_at: AtomicU64,
}

impl Default for Upkeep {
    fn default() -> Self {
        Self::with_clock(SystemTime::now)
    }
}

impl fmt::Debug for Upkeep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upkeep").field("uses", &self.uses).finish_non_exhaustive()
    }
}

impl Upkeep {
    pub(super) fn with_clock(clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self {
            clock: Box::new(clock),
            relied: RELIED,
            gate: RwLock::default(),
            placing: Mutex::default(),
            uses: Arc::default(),
            has_trash: AtomicBool::new(false),
            named_again: AtomicU64::new(0),
            swept_at: AtomicU64::new(0),
        }
    }

    /// Blobs are relied on for this long.
    pub(super) fn relied_for(self, relied: Duration) -> Self {
        Self { relied, ..self }
    }

    fn touch_every(&self) -> Duration {
        self.relied / TOUCH_PART
    }

    pub(super) fn set_has_trash(&self, has_trash: bool) {
        self.has_trash.store(has_trash, Ordering::Relaxed);
    }

    /// What was relied on before may go, if nothing names it.
    fn cutoff(&self) -> SystemTime {
        let ago = |time: SystemTime, by| time.checked_sub(by).unwrap_or(SystemTime::UNIX_EPOCH);
        let old = ago((self.clock)(), self.relied);
        let oldest = lock(&self.uses).values().min().map(|begun| ago(*begun, self.touch_every()));
        oldest.map_or(old, |begun| begun.min(old))
    }
}

/// While this lives, no sweep takes what was relied on since it began: for transfers, which
/// may take longer than [`RELIED`].
#[derive(Debug)]
pub struct Use {
    number: u64,
    uses: Arc<Mutex<BTreeMap<u64, SystemTime>>>,
}

impl Drop for Use {
    fn drop(&mut self) {
        lock(&self.uses).remove(&self.number);
    }
}

/// Every blob that something names. To be begun before it is looked what there is: what comes
/// to be named after that is relied on since, and so left alone however long all of it takes.
#[derive(Debug)]
pub struct Reach {
    store: BlobStore,
    _since: Use,
    /// See [`BlobStore::keep_trash`].
    named_again: u64,
    blobs: HashSet<BlobId>,
    /// Stay where they are, in the trash as well.
    in_place: HashSet<BlobId>,
    /// Roots whose lists of files went bad here, and why they cannot be read.
    unreadable: Vec<(BlobId, String)>,
    is_given_up: bool,
}

impl Reach {
    /// Nothing yet.
    #[must_use]
    pub fn begin(store: &BlobStore) -> Self {
        let (blobs, unreadable) = (HashSet::new(), Vec::new());
        let (store, _since) = (store.clone(), store.begin_use());
        let in_place = HashSet::new();
        let named_again = store.inner.upkeep.named_again.load(Ordering::Relaxed);
        Self { store, _since, named_again, blobs, in_place, unreadable, is_given_up: false }
    }

    /// Adds a tree and all that it names, as far as it is here. What is not a tree names
    /// nothing; a tree that never was here, nothing that would be.
    pub fn add_tree(&mut self, root: BlobId) {
        if self.blobs.insert(root) {
            let named = self.named_by(root);
            self.blobs.extend(named);
        }
    }

    /// As [`Self::add_tree`], of a tree that nobody needs any more and that may stay as long as
    /// there is room: what of it has gone to the trash is not taken back.
    pub fn add_tree_in_place(&mut self, root: BlobId) {
        // Asking for it would take it out of the trash.
        if self.store.path_of(&root).exists() && self.in_place.insert(root) {
            let named = self.named_by(root);
            self.in_place.extend(named);
        }
    }

    fn named_by(&mut self, root: BlobId) -> Vec<BlobId> {
        match self.store.read(&root, MANIFEST_BYTES_MAX) {
            Ok(manifest) => {
                // By its hash it is what was meant: it never will be one.
                Tree::decode(&manifest)
                    .map(|it| it.blobs().into_keys().collect())
                    .unwrap_or_default()
            }
            Err(Error::Missing(_)) if !self.store.is_damaged(&root) => Vec::new(),
            Err(Error::TooLarge { .. }) => Vec::new(),
            Err(reason) => {
                let reason = format!("{:#}", anyhow::Error::from(reason));
                self.unreadable.push((root, reason));
                Vec::new()
            }
        }
    }

    /// It is not known what else there is: nothing is swept.
    pub fn give_up(&mut self) {
        self.is_given_up = true;
    }

    /// Trees of which it is not known what they name; while there are any, nothing is swept.
    #[must_use]
    pub fn unreadable(&self) -> &[(BlobId, String)] {
        &self.unreadable
    }

    #[must_use]
    pub fn contains(&self, id: &BlobId) -> bool {
        self.blobs.contains(id) || self.in_place.contains(id)
    }
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Moved to the trash.
    pub trashed: u64,
    pub trashed_bytes: u64,
    /// Named again, and taken out of the trash.
    pub brought_back: u64,
    /// Named by nothing, and relied on of late.
    pub relied_on: u64,
    /// Of what stays only as long as there is room, and nobody relies on.
    pub spared_bytes: u64,
}

impl BlobStore {
    /// See [`Use`].
    #[must_use]
    pub fn begin_use(&self) -> Use {
        let upkeep = &self.inner.upkeep;
        let mut uses = lock(&upkeep.uses);
        let number = uses.keys().next_back().map_or(0, |last| last + 1);
        uses.insert(number, (upkeep.clock)());
        drop(uses);
        Use { number, uses: Arc::clone(&upkeep.uses) }
    }

    /// The blob's file, out of the trash if it is there, and relied on from now on.
    pub(super) fn find(&self, id: &BlobId) -> io::Result<Option<Metadata>> {
        let upkeep = &self.inner.upkeep;
        let path = self.path_of(id);
        let _shared = self.share();
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                let is_fresh = metadata.modified()? + upkeep.touch_every() > (upkeep.clock)();
                if !is_fresh {
                    self.touch(&path)?;
                }
                return Ok(Some(metadata));
            }
            Ok(_) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        if !upkeep.has_trash.load(Ordering::Relaxed) {
            return Ok(None);
        }
        self.bring_back(id, &path)
    }

    /// Sets the time of a file: it was relied on now.
    pub(super) fn touch(&self, path: &Path) -> io::Result<()> {
        // Read-only is enough for its owner.
        self.touch_open(&File::open(path)?)
    }

    pub(super) fn touch_open(&self, file: &File) -> io::Result<()> {
        let now = (self.inner.upkeep.clock)();
        file.set_times(FileTimes::new().set_modified(now).set_accessed(now))
    }

    /// Keeps a sweep from moving anything while this lives: for as long as a rename takes.
    pub(super) fn share(&self) -> RwLockReadGuard<'_, ()> {
        self.inner.upkeep.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps others from placing files in the store while this lives: for as long as a rename
    /// takes.
    pub(super) fn place(&self) -> MutexGuard<'_, ()> {
        lock(&self.inner.upkeep.placing)
    }

    /// Out of the trash, under the gate.
    fn bring_back(&self, id: &BlobId, path: &Path) -> io::Result<Option<Metadata>> {
        let from = self.trash_path(id);
        match self.touch(&from) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        }
        if let Some(dir) = path.parent() {
            create_private_dir(dir).map_err(io::Error::other)?;
        }
        let pairs = [
            (from.clone(), path.to_owned()),
            (from.with_extension(OUTBOARD), path.with_extension(OUTBOARD)),
        ];
        let _one = self.place();
        for (from, to) in pairs {
            let (room, before) = (room_at(&from), room_at(&to));
            match fs::rename(&from, &to) {
                Ok(()) => {
                    self.inner.room.trash_changed(-room);
                    self.inner.room.live_changed(room - before);
                }
                // Purged meanwhile; or it has no outboard.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(metadata)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Moves what `reach` does not have and nobody relies on to the trash, and takes what it
    /// has out of there. Nothing is moved where it is not known what is reachable.
    pub fn sweep(&self, reach: &Reach) -> Result<Swept, Error> {
        self.sweep_stepping(reach, &mut || Ok(()))
    }

    /// As [`Self::sweep`]; `step` is called before each blob.
    pub(super) fn sweep_stepping(
        &self,
        reach: &Reach,
        step: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Swept, Error> {
        let mut swept = Swept::default();
        let mut back = Vec::new();
        each_file_below(&self.inner.root.join(TRASH), &mut |path, _| {
            back.extend(blob_at(path).filter(|id| reach.blobs.contains(id)));
            Ok(())
        })?;
        for id in back {
            step()?;
            swept.brought_back += u64::from(self.has(&id));
        }
        self.inner.upkeep.swept_at.fetch_max(reach.named_again, Ordering::Relaxed);
        if !reach.unreadable.is_empty() || reach.is_given_up {
            return Ok(swept);
        }
        let cutoff = self.inner.upkeep.cutoff();
        self.each_live(|path, metadata, is_blob| {
            if !is_blob {
                return self.sweep_outboard(path);
            }
            let Some(id) = blob_at(path) else { return Ok(()) };
            if reach.contains(&id) {
                let is_old = metadata.modified().is_ok_and(|at| at < cutoff);
                if is_old && !reach.blobs.contains(&id) {
                    let room = u64::try_from(room_of(metadata)).unwrap_or_default();
                    swept.spared_bytes += room;
                }
                return Ok(());
            }
            step()?;
            match self.discard(&id, path).map_err(Error::io("move to the trash", path))? {
                Some(bytes) => {
                    swept.trashed += 1;
                    swept.trashed_bytes += bytes;
                }
                None => swept.relied_on += 1,
            }
            Ok(())
        })?;
        Ok(swept)
    }

    /// Moves a blob to the trash unless somebody relies on it; how many bytes it takes there.
    fn discard(&self, id: &BlobId, path: &Path) -> io::Result<Option<u64>> {
        let upkeep = &self.inner.upkeep;
        let to = self.trash_path(id);
        if let Some(dir) = to.parent() {
            create_private_dir(dir).map_err(io::Error::other)?;
        }
        let _alone = upkeep.gate.write().unwrap_or_else(PoisonError::into_inner);
        upkeep.set_has_trash(true);
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let relied_on = metadata.modified()?;
        let now = (upkeep.clock)();
        if relied_on > now + FUTURE_MAX {
            // A clock was wrong: the next sweep but one decides.
            self.touch(path)?;
            return Ok(None);
        }
        if relied_on >= upkeep.cutoff() {
            return Ok(None);
        }
        // Its time in the trash begins.
        self.touch(path)?;
        let mut moved = 0;
        let pairs = [
            (path.to_owned(), to.clone()),
            (path.with_extension(OUTBOARD), to.with_extension(OUTBOARD)),
        ];
        for (from, to) in pairs {
            // It may have come once more while it was there.
            let (room, before) = (room_at(&from), room_at(&to));
            match fs::rename(&from, &to) {
                Ok(()) => {
                    self.inner.room.live_changed(-room);
                    self.inner.room.trash_changed(room - before);
                    moved += room;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Some(u64::try_from(moved).unwrap_or_default()))
    }

    /// Removes an outboard whose blob a crash has left elsewhere.
    fn sweep_outboard(&self, path: &Path) -> Result<(), Error> {
        let _alone = self.inner.upkeep.gate.write().unwrap_or_else(PoisonError::into_inner);
        let Ok(modified) = fs::metadata(path).and_then(|it| it.modified()) else { return Ok(()) };
        // A blob that arrives has its outboard in place first.
        if path.with_extension("").exists() || modified >= self.inner.upkeep.cutoff() {
            return Ok(());
        }
        let room = room_at(path);
        fs::remove_file(path).map_err(Error::io("remove", path))?;
        self.inner.room.live_changed(-room);
        Ok(())
    }

    /// Removes what has been in the trash for so long; how many bytes that was.
    pub fn purge(&self, kept: Duration) -> Result<u64, Error> {
        let now = (self.inner.upkeep.clock)();
        let mut removed = 0;
        each_file_below(&self.inner.root.join(TRASH), &mut |path, metadata| {
            let age = metadata.modified().map(|at| now.duration_since(at).unwrap_or_default());
            if age.map_err(Error::io("read", path))? >= kept {
                removed += self.remove_from_trash(path, metadata)?;
            }
            Ok(())
        })?;
        Ok(removed)
    }

    /// What is in the trash may be named again: until the next sweep has taken out what is, no
    /// want of room empties it.
    pub fn keep_trash(&self) {
        self.inner.upkeep.named_again.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the trash waits for a sweep: see [`Self::keep_trash`].
    pub(super) fn is_trash_kept(&self) -> bool {
        let upkeep = &self.inner.upkeep;
        upkeep.named_again.load(Ordering::Relaxed) != upkeep.swept_at.load(Ordering::Relaxed)
    }

    /// Removes from the trash, the oldest first, until there is enough room.
    pub(super) fn purge_until(&self, is_enough: impl Fn() -> bool) -> Result<(), Error> {
        if self.used().trash == 0 || self.is_trash_kept() {
            return Ok(());
        }
        let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
        each_file_below(&self.inner.root.join(TRASH), &mut |path, metadata| {
            let at = metadata.modified().map_err(Error::io("read", path))?;
            files.push((at, path.to_owned()));
            Ok(())
        })?;
        files.sort();
        for (_, path) in files {
            if is_enough() {
                break;
            }
            if let Ok(metadata) = fs::metadata(&path) {
                self.remove_from_trash(&path, &metadata)?;
            }
        }
        Ok(())
    }

    fn remove_from_trash(&self, path: &Path, metadata: &Metadata) -> Result<u64, Error> {
        match fs::remove_file(path) {
            Ok(()) => {
                self.inner.room.trash_changed(-room_of(metadata));
                Ok(u64::try_from(room_of(metadata)).unwrap_or_default())
            }
            // Somebody took it back.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(Error::io("remove", path)(e)),
        }
    }

    /// Removes parts of blobs that nobody went on with for so long, and is not at now.
    pub fn sweep_partials(&self, kept: Duration) -> Result<(), Error> {
        let now = (self.inner.upkeep.clock)();
        let busy = self.partials_in_use();
        each_file_below(&self.inner.root.join(PARTIAL), &mut |path, metadata| {
            let age = metadata.modified().map(|at| now.duration_since(at).unwrap_or_default());
            if age.map_err(Error::io("read", path))? < kept
                || busy.contains(&path.with_extension(""))
            {
                return Ok(());
            }
            match fs::remove_file(path) {
                Ok(()) => self.inner.room.partial_changed(-room_of(metadata)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("remove", path)(e)),
            }
            Ok(())
        })
    }

    /// Calls `act` for every file of a blob or its outboard, and says which of both it is.
    pub(super) fn each_live(
        &self,
        mut act: impl FnMut(&Path, &Metadata, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let root = &self.inner.root;
        for entry in fs::read_dir(root).map_err(Error::io("read", root))? {
            let entry = entry.map_err(Error::io("read", root))?;
            if entry.file_name().len() != 2 {
                continue;
            }
            each_file_below(&entry.path(), &mut |path, metadata| {
                let is_outboard = path.extension().is_some_and(|end| end == OUTBOARD);
                act(path, metadata, !is_outboard)
            })?;
        }
        Ok(())
    }

    pub(super) fn mark_damaged(&self, id: &BlobId) -> Result<(), Error> {
        let dir = self.inner.root.join(DAMAGED);
        create_private_dir(&dir)?;
        let path = dir.join(id.to_string());
        File::create(&path).map(drop).map_err(Error::io("create", &path))
    }

    /// It is as it should be again.
    pub(super) fn unmark_damaged(&self, id: &BlobId) -> Result<(), Error> {
        let path = self.inner.root.join(DAMAGED).join(id.to_string());
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(e)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Whether it was here, went bad, and was not brought again.
    pub fn is_damaged(&self, id: &BlobId) -> bool {
        self.inner.root.join(DAMAGED).join(id.to_string()).exists()
    }

    /// The blobs that went bad here and were not brought again.
    pub fn damaged(&self) -> Result<BTreeSet<BlobId>, Error> {
        let dir = self.inner.root.join(DAMAGED);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(e) => return Err(Error::io("read", &dir)(e)),
        };
        let mut damaged = BTreeSet::new();
        for entry in entries {
            let path = entry.map_err(Error::io("read", &dir))?.path();
            // A crash may have left the mark of one that is here again.
            damaged.extend(blob_at(&path).filter(|id| !self.path_of(id).exists()));
        }
        Ok(damaged)
    }

    fn trash_path(&self, id: &BlobId) -> PathBuf {
        let name = id.to_string();
        self.inner.root.join(TRASH).join(&name[..2]).join(name)
    }
}

fn blob_at(path: &Path) -> Option<BlobId> {
    path.file_name()?.to_str()?.parse().ok()
}

/// Calls `act` for every file below `dir`, if there is such a directory. What goes away
/// meanwhile is left out.
pub(super) fn each_file_below(
    dir: &Path,
    act: &mut dyn FnMut(&Path, &Metadata) -> Result<(), Error>,
) -> Result<(), Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("read", dir)(e)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io("read", &path)(e)),
        };
        if metadata.is_dir() {
            each_file_below(&path, act)?;
        } else {
            act(&path, &metadata)?;
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole between any two statements under it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
