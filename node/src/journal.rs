//! What must survive a crash: an append-only log of key/value writes.
//!
//! - A batch is one frame, or several where one does not take it: after a crash it is there
//!   whole or not at all.
//! - [`Journal::append`] returns after one write and one `fdatasync`. Commits that
//!   wait at the same time share both ([`JournalHandle`]).
//! - A torn tail is cut and noted. Damage before the last durable group is
//!   [`OpenError::Damaged`]: what this node once promised is not known any more, so
//!   its store id must never be used again; [`Journal::reset_as_new_store`] starts
//!   over under a new one, with what the caller finds to prove itself in the rest.
//! - An error of `fsync` poisons the journal: the kernel may have dropped the pages
//!   it could not write, so nothing later can be trusted and the caller shuts down. The
//!   kernel also shows those pages to the next opening as if they were on the disk; so
//!   each opening writes the last group again before anything relies on it.
//! - A write that failed before its fsync (a full disk) is taken back and may be
//!   retried. Where not even that is possible (the file system went read-only), the
//!   journal is poisoned.
//! - Files are `log.<generation>`. A log that has grown is replaced by a snapshot of
//!   the live entries: written as `log.new` step by step between commits, made durable,
//!   renamed to the next generation, the directory made durable, and only then appended
//!   to. So the highest generation is always the whole truth, whatever step a crash
//!   interrupts. A snapshot that finds no room is given up and begun again later.
//! - Size: a log has at most 3 times the live bytes (keys and values, at the largest they
//!   had since the last snapshot was begun) and 64 MiB, as long as snapshots find room;
//!   while one is written, all files together at most 5 times and 96 MiB. Memory holds
//!   keys, not values: where a value is, is remembered, and a snapshot reads it back.
//!
//! What the journal cannot see: that a whole home was put back from an older copy. It then
//! opens as it once was, with a boot counter that others have seen already. So the boot
//! counter ([`Recovered::boot_counter`]) is advertised; who remembers a higher one of the
//! same store id, or the same one under another boot id, knows that promises were lost.

#[cfg(test)]
mod crashes;
mod disk;
#[cfg(test)]
pub(crate) mod faulty;
mod frame;
mod handle;
mod recover;
mod snapshot;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use p2pit_protocol::StoreId;
use thiserror::Error;

use self::{
    disk::{Disk, LockedDirectory, LogFile},
    frame::{Encoder, Header},
    recover::{Damage, Scan, ScanError},
    snapshot::{CopyError, Copying},
};

pub use self::handle::{Counts, JournalHandle, JournalThread};

/// An upsert of `key`, or its removal where there is no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// Values by key.
pub type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// What a journal held when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub entries: Entries,
    /// Which store this is; made with the journal, never reused.
    pub store_id: StoreId,
    /// How often the journal has been opened, this time included. Durable before the
    /// opening returns, and never the same twice for one store id, unless an older copy
    /// of the whole directory is put back: which only those can notice who saw a higher
    /// one, or this one with another boot id.
    pub boot_counter: u64,
    /// What a user may want to know about the opening, such as a tail that was cut.
    pub notes: Vec<String>,
}

/// Why a journal cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("the home of {} is in use by another daemon{}", .path.display(), with_pid(*.pid))]
    InUse { path: PathBuf, pid: Option<u32> },
    /// The store id in it must never speak again.
    #[error(
        "the journal {} is damaged {place}; what this node promised to others is not known any \
         more, so it cannot go on as the same store",
        .path.display()
    )]
    Damaged { path: PathBuf, place: String, store_id: Option<StoreId> },
    #[error(
        "the journal {} has format {version}, this build reads format {}: start the p2pit that \
         wrote it, or move the home aside and join the pool anew",
        .path.display(),
        frame::FORMAT_VERSION
    )]
    OtherFormat { path: PathBuf, version: u32 },
    #[error("the journal {} cannot be used", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The append-only log of one directory, locked against other processes.
#[derive(Debug)]
pub struct Journal {
    disk: Box<dyn Disk>,
    file: Box<dyn LogFile>,
    header: Header,
    limits: Limits,
    /// Where the live values are in `file`.
    index: BTreeMap<Vec<u8>, Place>,
    /// What the live entries take on disk without frame heads.
    live_bytes: u64,
    boot_counter: u64,
    /// Everything before this offset is durable.
    good_bytes: u64,
    next_seq: u64,
    /// After a failed snapshot: the file length from which the next is tried.
    snapshot_not_before_bytes: u64,
    /// The snapshot on its way.
    copying: Option<Copying>,
    poisoned: Option<String>,
}

/// Where a value is in a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    offset: u64,
    bytes: usize,
    /// CRC32C of the value: what is copied into a snapshot must be what was written.
    crc: u32,
}

/// When and how snapshots are taken.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// A log is rewritten when it is larger than this and than [`SNAPSHOT_LIVE_FACTOR`]
    /// times its live entries.
    min_bytes: u64,
    /// How much a log grows before a failed snapshot is tried again.
    retry_bytes: u64,
    /// Copied at once, while commits wait.
    step_bytes: u64,
    /// What one frame of a batch has; a larger batch is several.
    frame_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            min_bytes: 4 << 20,
            retry_bytes: 1 << 20,
            step_bytes: 1 << 20,
            frame_bytes: frame::WRITES_BYTES_MAX,
        }
    }
}

impl Journal {
    /// Opens or creates the journal in `directory` and counts the boot.
    pub fn open(directory: &Path) -> Result<(Self, Recovered), OpenError> {
        Self::open_on(Box::new(LockedDirectory::open(directory)?), Limits::default())
    }

    /// Gives up what the journal in `directory` promised and begins a new store, under a
    /// new id. `keep` gets what can still be read of the old one, some of it outdated, and
    /// returns the entries that hold whatever was lost: the new store begins with these.
    ///
    /// The old files stay beside it as `damaged.<n>`, for whoever wants to look, the newest
    /// five of them; a note says where. A crash on the way leaves either the damaged journal or the new one.
    pub fn reset_as_new_store(
        directory: &Path,
        keep: impl FnOnce(Entries) -> Entries,
    ) -> Result<(Self, Recovered), OpenError> {
        let disk = Box::new(LockedDirectory::open(directory)?);
        Self::reset_on(disk, Limits::default(), keep)
    }

    fn reset_on(
        mut disk: Box<dyn Disk>,
        limits: Limits,
        keep: impl FnOnce(Entries) -> Entries,
    ) -> Result<(Self, Recovered), OpenError> {
        let reset = (|| {
            let names = disk.list()?;
            let newest = names.iter().filter_map(|name| generation(name)).max();
            let kept = match newest {
                Some(newest) => keep(recover::salvage(&*disk.open(&log_name(newest))?)?),
                None => Entries::new(),
            };
            found_store(&mut *disk, newest.unwrap_or(0) + 1, &kept)
        })();
        reset.map_err(|source| OpenError::Io { path: disk.path(""), source })?;
        // Sets the old files aside, as does whoever opens it after a crash here.
        Self::open_on(disk, limits)
    }

    fn open_on(mut disk: Box<dyn Disk>, limits: Limits) -> Result<(Self, Recovered), OpenError> {
        let failed = |disk: &dyn Disk, name: &str| {
            let path = disk.path(name);
            move |source| OpenError::Io { path, source }
        };
        let mut names = disk.list().map_err(failed(&*disk, ""))?;
        if !names.iter().any(|name| generation(name).is_some()) {
            let name = log_name(FIRST_GENERATION);
            found_store(&mut *disk, FIRST_GENERATION, &Entries::new())
                .map_err(failed(&*disk, &name))?;
            names = vec![name];
        }
        let newest = names.iter().filter_map(|name| generation(name)).max();
        let name = log_name(newest.unwrap_or(FIRST_GENERATION));
        let mut notes = Vec::new();
        let mut file = disk.open(&name).map_err(failed(&*disk, &name))?;
        let mut scan = recover::scan(&*file).map_err(|e| refused(&*disk, &name, &*file, e))?;
        let torn_bytes = scan.bytes - scan.good_bytes;
        settle(&mut *file, &scan).map_err(failed(&*disk, &name))?;
        // Else a power cut after a kill between renaming and this would bring back the log
        // before, without what was appended to this one.
        disk.sync_dir().map_err(failed(&*disk, ""))?;
        if torn_bytes > 0 {
            notes.push(format!(
                "cut {torn_bytes} bytes that a crash left unfinished at the end of {}",
                disk.path(&name).display()
            ));
        }
        let entries = std::mem::take(&mut scan.entries);
        let mut journal = Self::from_scan(disk, file, limits, scan);
        journal.count_boot().map_err(failed(&*journal.disk, &name))?;
        for name in outdated(&names, newest) {
            let cleared = clear_away(&mut *journal.disk, name, journal.header.store_id);
            notes.extend(cleared.map_err(failed(&*journal.disk, name))?);
        }
        let recovered = Recovered {
            entries,
            store_id: journal.header.store_id,
            boot_counter: journal.boot_counter,
            notes,
        };
        Ok((journal, recovered))
    }

    fn from_scan(disk: Box<dyn Disk>, file: Box<dyn LogFile>, limits: Limits, scan: Scan) -> Self {
        let live_bytes = scan.index.iter().map(|(key, place)| place.live_bytes(key)).sum();
        Self {
            disk,
            file,
            header: scan.header,
            limits,
            index: scan.index,
            live_bytes,
            boot_counter: scan.boot_counter,
            good_bytes: scan.good_bytes,
            next_seq: scan.next_seq,
            snapshot_not_before_bytes: 0,
            copying: None,
            poisoned: None,
        }
    }

    fn count_boot(&mut self) -> io::Result<()> {
        let boot_counter = self.boot_counter + 1;
        let mut encoder = Encoder::new(&self.header, self.next_seq);
        encoder.boot(boot_counter);
        let (bytes, next_seq) = (std::mem::take(&mut encoder.bytes), encoder.next_seq());
        self.make_durable(&bytes, next_seq)?;
        self.boot_counter = boot_counter;
        Ok(())
    }

    /// Makes `writes` durable, all or none. An empty batch costs nothing.
    ///
    /// After an error for which [`is_poisoned`] holds every later append fails too;
    /// after any other nothing of the batch is there and it may be tried again.
    pub fn append(&mut self, writes: &[Write]) -> io::Result<()> {
        self.append_group(&[writes])
    }

    /// Makes several batches durable with one fsync; each stays atomic for itself.
    fn append_group(&mut self, batches: &[&[Write]]) -> io::Result<()> {
        if let Some(cause) = &self.poisoned {
            return Err(io::Error::other(Poisoned(cause.clone())));
        }
        let mut encoder = Encoder::new(&self.header, self.next_seq);
        let mut places = Vec::new();
        for batch in batches.iter().filter(|batch| !batch.is_empty()) {
            if !frame::writes_fit(batch) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("one write may have at most {} bytes", frame::WRITES_BYTES_MAX),
                ));
            }
            places.extend(encoder.batch(batch, self.limits.frame_bytes));
        }
        let (bytes, next_seq) = (std::mem::take(&mut encoder.bytes), encoder.next_seq());
        if bytes.is_empty() {
            return Ok(());
        }
        let start = self.good_bytes;
        self.make_durable(&bytes, next_seq)?;
        for (write, at) in batches.iter().flat_map(|batch| batch.iter()).zip(places) {
            self.apply(write, start + at as u64);
        }
        self.advance_snapshot(bytes.len() as u64);
        Ok(())
    }

    fn make_durable(&mut self, bytes: &[u8], next_seq: u64) -> io::Result<()> {
        let mut written = self.write_or_take_back(bytes);
        // What a snapshot on its way takes of the disk may be what is lacking.
        if let Err(error) = &written
            && is_full(error)
            && self.poisoned.is_none()
            && self.give_up_snapshot(error)
        {
            written = self.write_or_take_back(bytes);
        }
        written?;
        self.file.sync().map_err(|e| self.poison(e.kind(), format!("fsync failed: {e}")))?;
        self.good_bytes += bytes.len() as u64;
        self.next_seq = next_seq;
        Ok(())
    }

    fn write_or_take_back(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Err(error) = self.file.write_at(self.good_bytes, bytes) else { return Ok(()) };
        match self.file.set_len(self.good_bytes) {
            Ok(()) => Err(error),
            Err(e) => Err(self.poison(error.kind(), format!("{error}; not taken back: {e}"))),
        }
    }

    /// `offset` is that of the value, if there is one.
    fn apply(&mut self, write: &Write, offset: u64) {
        let before = match &write.value {
            Some(value) => {
                let place = Place::of(offset, value);
                self.live_bytes += place.live_bytes(&write.key);
                self.index.insert(write.key.clone(), place)
            }
            None => self.index.remove(&write.key),
        };
        self.live_bytes -= before.map_or(0, |place| place.live_bytes(&write.key));
        if let Some(copying) = &mut self.copying {
            copying.note(&write.key);
        }
    }

    /// Whether [`Self::advance_snapshot`] has something to do.
    fn is_snapshot_due(&self) -> bool {
        let from_bytes =
            self.limits.snapshot_at(self.live_bytes).max(self.snapshot_not_before_bytes);
        let is_due = self.copying.is_some() || self.good_bytes > from_bytes;
        is_due && self.poisoned.is_none()
    }

    /// Takes a step of a snapshot that is due, larger where `written_bytes` were committed
    /// since the last one.
    ///
    /// Whatever led here is durable already: a snapshot that cannot be written is put off,
    /// one that may or may not have taken effect poisons the journal.
    fn advance_snapshot(&mut self, written_bytes: u64) {
        if !self.is_snapshot_due() {
            return;
        }
        let mut copying = match self.copying.take() {
            Some(copying) => copying,
            None => {
                let header = Header {
                    generation: self.header.generation + 1,
                    boot_counter: self.boot_counter,
                    ..self.header
                };
                match Copying::begin(&mut *self.disk, header) {
                    Ok(begun) => begun,
                    Err(error) => return self.put_off_snapshot(&error),
                }
            }
        };
        let budget_bytes = self.limits.step_bytes.max(2 * written_bytes);
        match copying.step(&*self.file, &self.index, budget_bytes) {
            Ok(true) => self.take_effect(copying),
            Ok(false) => self.copying = Some(copying),
            Err(CopyError::Given(error)) => self.put_off_snapshot(&error),
            Err(CopyError::Rotten(offset)) => {
                let path = self.disk.path(&log_name(self.header.generation));
                let cause = format!("{} is damaged at byte {offset}", path.display());
                let poisoned = self.poison(io::ErrorKind::InvalidData, cause);
                tracing::error!(error = %poisoned, "the journal cannot be used any more");
            }
        }
    }

    /// From here on the copy is the log that counts.
    fn take_effect(&mut self, mut copying: Copying) {
        if let Err(error) = copying.finish() {
            return self.put_off_snapshot(&error);
        }
        let old_generation = self.header.generation;
        match name_log(&mut *self.disk, copying.header.generation) {
            Ok(()) => {}
            Err(NameError::NotNamed(error)) => return self.put_off_snapshot(&error),
            Err(NameError::InDoubt(error)) => {
                // Ends with the next append: what is durable is so in either file.
                let poisoned = self.poison(error.kind(), format!("renaming a snapshot: {error}"));
                tracing::error!(error = %poisoned, "the journal cannot be used any more");
                return;
            }
        }
        self.file = copying.file;
        self.header = copying.header;
        self.index = copying.index;
        self.good_bytes = copying.bytes;
        self.next_seq = copying.next_seq;
        self.snapshot_not_before_bytes = 0;
        // A leftover is removed at the next opening.
        if let Err(error) = self.disk.remove(&log_name(old_generation)) {
            tracing::warn!(%error, "the journal's previous file was not removed");
        }
    }

    /// Gives back the room that an unfinished snapshot takes; whether there was one.
    fn give_up_snapshot(&mut self, cause: &io::Error) -> bool {
        let was_on_its_way = self.copying.take().is_some();
        if was_on_its_way {
            self.put_off_snapshot(cause);
        }
        was_on_its_way
    }

    fn put_off_snapshot(&mut self, error: &io::Error) {
        tracing::warn!(%error, "the journal's snapshot failed; it will be tried again");
        self.snapshot_not_before_bytes = self.good_bytes + self.limits.retry_bytes;
        match self.disk.remove(NEW_LOG) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "the journal's unfinished snapshot was not removed");
            }
            _ => {}
        }
    }

    fn poison(&mut self, kind: io::ErrorKind, cause: String) -> io::Error {
        self.poisoned = Some(cause.clone());
        io::Error::new(kind, Poisoned(cause))
    }
}

/// Whether an append failed in a way after which only a restart helps.
pub fn is_poisoned(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Poisoned>())
}

#[derive(Debug, Clone, Error)]
#[error("the journal is unusable until the daemon restarts ({0})")]
struct Poisoned(String);

/// A log this many times as large as its live entries is rewritten: then at least half of
/// what is read at the next start would be outdated, and rewriting costs at most as much as
/// has been written since.
const SNAPSHOT_LIVE_FACTOR: u64 = 2;

const FIRST_GENERATION: u64 = 1;
const LOG_PREFIX: &str = "log.";
const NEW_LOG: &str = "log.new";
const SET_ASIDE_PREFIX: &str = "damaged.";
/// Files set aside that stay; those before them are removed.
const SET_ASIDE_MAX: usize = 5;

impl Limits {
    fn snapshot_at(&self, live_bytes: u64) -> u64 {
        self.min_bytes.max(live_bytes * SNAPSHOT_LIVE_FACTOR)
    }
}

impl Place {
    fn live_bytes(&self, key: &[u8]) -> u64 {
        (frame::write_bytes(key, None) + self.bytes) as u64
    }
}

/// Begins a store of a new id, as a log of this generation with these entries.
fn found_store(disk: &mut dyn Disk, generation: u64, entries: &Entries) -> io::Result<()> {
    let mut store_id = [0; 16];
    getrandom::fill(&mut store_id).map_err(io::Error::other)?;
    let store_id = StoreId(store_id);
    let header = Header { store_id, generation, boot_counter: 0, snapshot_frames: 0 };
    let mut copying = Copying::begin(disk, header)?;
    copying.put_all(entries)?;
    copying.finish()?;
    name_log(disk, generation).map_err(|e| match e {
        NameError::NotNamed(error) | NameError::InDoubt(error) => error,
    })
}

/// Why a new log may not count.
#[derive(Debug)]
enum NameError {
    /// It does not, and never will.
    NotNamed(io::Error),
    /// After a crash it may or may not.
    InDoubt(io::Error),
}

/// Without an error the new log is the one that counts.
fn name_log(disk: &mut dyn Disk, generation: u64) -> Result<(), NameError> {
    let name = log_name(generation);
    match disk.rename(NEW_LOG, &name) {
        Ok(()) => disk.sync_dir().map_err(NameError::InDoubt),
        // For want of room nothing was begun; seen by the names, not only believed.
        Err(error) if is_full(&error) => match disk.list() {
            Ok(names) if !names.contains(&name) => Err(NameError::NotNamed(error)),
            Ok(_) | Err(_) => Err(NameError::InDoubt(error)),
        },
        Err(error) => Err(NameError::InDoubt(error)),
    }
}

/// Whether an append failed for want of room: it may be tried again once there is some.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes what was read durable, and nothing else.
///
/// The last group is written once more: after an fsync error in an earlier process it may
/// be in the kernel's memory only, and no later fsync would write it.
fn settle(file: &mut dyn LogFile, scan: &Scan) -> io::Result<()> {
    let group_bytes = usize::try_from(scan.good_bytes - scan.last_group_at);
    let mut group = vec![0; group_bytes.map_err(io::Error::other)?];
    file.read_at(scan.last_group_at, &mut group)?;
    file.write_at(scan.last_group_at, &group)?;
    if scan.bytes > scan.good_bytes {
        file.set_len(scan.good_bytes)?;
    }
    file.sync()
}

/// Removes what a crash left behind; a log of another store is set aside instead, and a
/// note says so.
fn clear_away(disk: &mut dyn Disk, name: &str, store_id: StoreId) -> io::Result<Option<String>> {
    let is_ours = name == NEW_LOG
        || recover::header(&*disk.open(name)?)?.is_some_and(|header| header.store_id == store_id);
    if is_ours {
        disk.remove(name)?;
        return Ok(None);
    }
    let mut earlier: Vec<u64> = disk.list()?.iter().filter_map(|it| set_aside(it)).collect();
    earlier.sort_unstable();
    let next = earlier.last().map_or(1, |last| last.saturating_add(1));
    let aside = set_aside_name(next);
    disk.rename(name, &aside)?;
    // Only now, so that no crash leaves fewer.
    disk.sync_dir()?;
    for old in earlier.iter().rev().skip(SET_ASIDE_MAX - 1) {
        disk.remove(&set_aside_name(*old))?;
    }
    Ok(Some(format!(
        "the journal was damaged, so what this node had promised to others is not known any \
         more: it goes on as another store, without the jobs it kept and ran; the damaged file \
         is kept as {}, until there are {SET_ASIDE_MAX} newer ones",
        disk.path(&aside).display()
    )))
}

fn log_name(generation: u64) -> String {
    format!("{LOG_PREFIX}{generation}")
}

fn set_aside_name(n: u64) -> String {
    format!("{SET_ASIDE_PREFIX}{n}")
}

fn set_aside(name: &str) -> Option<u64> {
    let n = name.strip_prefix(SET_ASIDE_PREFIX)?.parse().ok()?;
    (set_aside_name(n) == name).then_some(n)
}

fn generation(name: &str) -> Option<u64> {
    name.strip_prefix(LOG_PREFIX)?.parse().ok()
}

/// What a crash between the steps of a snapshot left behind.
fn outdated(names: &[String], newest: Option<u64>) -> impl Iterator<Item = &String> {
    names.iter().filter(move |name| {
        newest.is_some() && (*name == NEW_LOG || generation(name).is_some_and(|g| Some(g) < newest))
    })
}

fn refused(disk: &dyn Disk, name: &str, file: &dyn LogFile, error: ScanError) -> OpenError {
    let path = disk.path(name);
    let damage = match error {
        ScanError::Io(source) => return OpenError::Io { path, source },
        ScanError::Damage(damage) => damage,
    };
    let place = match damage {
        Damage::Version(version) => return OpenError::OtherFormat { path, version },
        Damage::Header => "in its first bytes".to_owned(),
        Damage::At(offset) => match file.bytes() {
            Ok(bytes) => format!("at byte {offset} of {bytes}"),
            Err(_) => format!("at byte {offset}"),
        },
    };
    let store_id = recover::header(file).ok().flatten().map(|header| header.store_id);
    OpenError::Damaged { path, place, store_id }
}

fn with_pid(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}
