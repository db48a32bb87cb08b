//! What must survive a crash: an append-only log of key/value writes.
//!
//! - A batch is one frame: after a crash it is there whole or not at all.
//! - [`Journal::append`] returns after one write and one `fdatasync`. Commits that
//!   wait at the same time share both ([`JournalHandle`]).
//! - A torn tail is cut and noted. Damage before the last durable group is
//!   [`OpenError::Damaged`]: what this node once promised is not known any more, so
//!   its store id must never be used again; [`Journal::reset_as_new_store`] starts
//!   over under a new one.
//! - An error of `fsync` poisons the journal: the kernel may have dropped the pages
//!   it could not write, so nothing later can be trusted and the caller shuts down.
//!   A write that failed before it (a full disk) is taken back and may be retried.
//! - Files are `log.<generation>`. A log that has grown is replaced by a snapshot of
//!   the live entries: written as `log.new`, made durable, renamed to the next
//!   generation, the directory made durable, and only then appended to. So the highest
//!   generation is always the whole truth, whatever step a crash interrupts.

mod disk;
#[cfg(test)]
mod faulty;
mod frame;
mod handle;
mod recover;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use p2pit_protocol::StoreId;
use thiserror::Error;

use self::{
    disk::{Disk, LockedDirectory, LogFile},
    frame::{Encoder, FIRST_SEQ, Header},
    recover::{Damage, Scan},
};

pub use self::handle::{JournalHandle, JournalThread};

/// An upsert of `key`, or its removal where there is no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub key: Vec<u8>,
    pub value: Option<Vec<u8>>,
}

/// What a journal held when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub entries: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Which store this is; made with the journal, never reused.
    pub store_id: StoreId,
    /// How often the journal has been opened, this time included.
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
        "the journal {} has format {version}, this build knows up to {}",
        .path.display(),
        frame::FORMAT_VERSION
    )]
    NewerFormat { path: PathBuf, version: u32 },
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
    entries: BTreeMap<Vec<u8>, Vec<u8>>,
    /// What `entries` take on disk without frame heads.
    live_bytes: u64,
    boot_counter: u64,
    /// Everything before this offset is durable.
    good_bytes: u64,
    next_seq: u64,
    /// The file length from which a snapshot is worth its writing.
    snapshot_at_bytes: u64,
    poisoned: Option<String>,
}

impl Journal {
    /// Opens or creates the journal in `directory` and counts the boot.
    pub fn open(directory: &Path) -> Result<(Self, Recovered), OpenError> {
        Self::open_on(Box::new(LockedDirectory::open(directory)?))
    }

    /// Gives up what the journal in `directory` holds and begins a new store. The old
    /// files stay beside it as `damaged.<n>`, for whoever wants to look.
    pub fn reset_as_new_store(directory: &Path) -> Result<(Self, Recovered), OpenError> {
        let mut disk = LockedDirectory::open(directory)?;
        set_logs_aside(&mut disk)
            .map_err(|source| OpenError::Io { path: directory.to_owned(), source })?;
        Self::open_on(Box::new(disk))
    }

    fn open_on(mut disk: Box<dyn Disk>) -> Result<(Self, Recovered), OpenError> {
        let failed = |disk: &dyn Disk, name: &str| {
            let path = disk.path(name);
            move |source| OpenError::Io { path, source }
        };
        let names = disk.list().map_err(failed(&*disk, ""))?;
        let newest = names.iter().filter_map(|name| generation(name)).max();
        let mut notes = Vec::new();
        let mut journal = match newest {
            None => Self::create(disk)?,
            Some(generation) => {
                let name = log_name(generation);
                let bytes = disk.read(&name).map_err(failed(&*disk, &name))?;
                let scan = recover::scan(&bytes).map_err(|e| damaged(&*disk, &name, &bytes, e))?;
                let mut file = disk.open(&name).map_err(failed(&*disk, &name))?;
                let torn_bytes = bytes.len() - scan.good_bytes;
                if torn_bytes > 0 {
                    cut(&mut *file, scan.good_bytes).map_err(failed(&*disk, &name))?;
                    notes.push(format!(
                        "cut {torn_bytes} bytes that a crash left unfinished at the end of {}",
                        disk.path(&name).display()
                    ));
                }
                Self::from_scan(disk, file, scan)
            }
        };
        let name = log_name(journal.header.generation);
        journal.count_boot().map_err(failed(&*journal.disk, &name))?;
        for name in outdated(&names, newest) {
            journal.disk.remove(name).map_err(failed(&*journal.disk, name))?;
        }
        let recovered = Recovered {
            entries: journal.entries.clone(),
            store_id: journal.header.store_id,
            boot_counter: journal.boot_counter,
            notes,
        };
        Ok((journal, recovered))
    }

    fn create(mut disk: Box<dyn Disk>) -> Result<Self, OpenError> {
        let name = log_name(FIRST_GENERATION);
        let mut store_id = [0; 16];
        let created = getrandom::fill(&mut store_id).map_err(io::Error::other).and_then(|()| {
            let mut header = Header {
                store_id: StoreId(store_id),
                generation: FIRST_GENERATION,
                boot_counter: 0,
                snapshot_frames: 0,
            };
            let (file, bytes) = begin_log(&mut *disk, &mut header, &BTreeMap::new())?;
            name_log(&mut *disk, header.generation)?;
            Ok((file, header, bytes))
        });
        let (file, header, good_bytes) =
            created.map_err(|source| OpenError::Io { path: disk.path(&name), source })?;
        let entries = BTreeMap::new();
        let scan = Scan { header, entries, boot_counter: 0, good_bytes, next_seq: FIRST_SEQ };
        Ok(Self::from_scan(disk, file, scan))
    }

    fn from_scan(disk: Box<dyn Disk>, file: Box<dyn LogFile>, scan: Scan) -> Self {
        let live_bytes = scan.entries.iter().map(|(key, value)| entry_bytes(key, value)).sum();
        Self {
            disk,
            file,
            header: scan.header,
            entries: scan.entries,
            live_bytes,
            boot_counter: scan.boot_counter,
            good_bytes: scan.good_bytes as u64,
            next_seq: scan.next_seq,
            snapshot_at_bytes: snapshot_at(live_bytes),
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
        for batch in batches.iter().filter(|batch| !batch.is_empty()) {
            if !frame::writes_fit(batch) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("a batch may have at most {} bytes", frame::PAYLOAD_BYTES_MAX),
                ));
            }
            encoder.writes(batch.iter().map(|w| (w.key.as_slice(), w.value.as_deref())));
        }
        let (bytes, next_seq) = (std::mem::take(&mut encoder.bytes), encoder.next_seq());
        if bytes.is_empty() {
            return Ok(());
        }
        self.make_durable(&bytes, next_seq)?;
        batches.iter().flat_map(|batch| batch.iter()).for_each(|write| self.apply(write));
        self.snapshot_if_grown();
        Ok(())
    }

    fn make_durable(&mut self, bytes: &[u8], next_seq: u64) -> io::Result<()> {
        if let Err(error) = self.file.write_at(self.good_bytes, bytes) {
            return match self.file.set_len(self.good_bytes) {
                Ok(()) => Err(error),
                Err(e) => Err(self.poison(error.kind(), format!("{error}; not taken back: {e}"))),
            };
        }
        self.file.sync().map_err(|e| self.poison(e.kind(), format!("fsync failed: {e}")))?;
        self.good_bytes += bytes.len() as u64;
        self.next_seq = next_seq;
        Ok(())
    }

    fn apply(&mut self, write: &Write) {
        let before = match &write.value {
            Some(value) => {
                self.live_bytes += entry_bytes(&write.key, value);
                self.entries.insert(write.key.clone(), value.clone())
            }
            None => self.entries.remove(&write.key),
        };
        self.live_bytes -= before.map_or(0, |value| entry_bytes(&write.key, &value));
    }

    /// The batch that led here is durable already: a snapshot that cannot be written
    /// is put off, one that may or may not have taken effect poisons the journal.
    fn snapshot_if_grown(&mut self) {
        if self.good_bytes <= self.snapshot_at_bytes {
            return;
        }
        let old_generation = self.header.generation;
        let mut header = Header {
            generation: old_generation + 1,
            boot_counter: self.boot_counter,
            ..self.header
        };
        let (file, bytes) = match begin_log(&mut *self.disk, &mut header, &self.entries) {
            Ok(begun) => begun,
            Err(error) => {
                tracing::warn!(%error, "the journal's snapshot failed; it will be tried again");
                self.snapshot_at_bytes = self.good_bytes + SNAPSHOT_RETRY_BYTES;
                return;
            }
        };
        if let Err(error) = name_log(&mut *self.disk, header.generation) {
            // Ends with the next append: this one's batch is durable in either file.
            let poisoned = self.poison(error.kind(), format!("renaming a snapshot: {error}"));
            tracing::error!(error = %poisoned, "the journal cannot be used any more");
            return;
        }
        self.file = file;
        self.header = header;
        self.good_bytes = bytes as u64;
        self.next_seq = FIRST_SEQ + header.snapshot_frames;
        self.snapshot_at_bytes = snapshot_at(self.live_bytes);
        // A leftover is removed at the next opening.
        if let Err(error) = self.disk.remove(&log_name(old_generation)) {
            tracing::warn!(%error, "the journal's previous file was not removed");
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

/// A log is rewritten when it is both larger than this and than
/// [`SNAPSHOT_LIVE_FACTOR`] times its live entries: then at least three quarters of
/// what is read at the next start would be outdated, and rewriting costs at most a
/// third of what has been written since.
const SNAPSHOT_BYTES_MIN: u64 = 4 << 20;
const SNAPSHOT_LIVE_FACTOR: u64 = 4;

/// How much a log grows before a failed snapshot is tried again.
const SNAPSHOT_RETRY_BYTES: u64 = 1 << 20;

const FIRST_GENERATION: u64 = 1;
const LOG_PREFIX: &str = "log.";
const NEW_LOG: &str = "log.new";

fn snapshot_at(live_bytes: u64) -> u64 {
    SNAPSHOT_BYTES_MIN.max(live_bytes * SNAPSHOT_LIVE_FACTOR)
}

fn entry_bytes(key: &[u8], value: &[u8]) -> u64 {
    frame::write_bytes(key, Some(value)) as u64
}

/// A log of `entries` under its temporary name, durable; and its length.
fn begin_log(
    disk: &mut dyn Disk,
    header: &mut Header,
    entries: &BTreeMap<Vec<u8>, Vec<u8>>,
) -> io::Result<(Box<dyn LogFile>, usize)> {
    let bytes = frame::snapshot(header, entries);
    let mut file = disk.create(NEW_LOG)?;
    file.write_at(0, &bytes)?;
    file.sync()?;
    Ok((file, bytes.len()))
}

/// From here on the new log is the one that counts.
fn name_log(disk: &mut dyn Disk, generation: u64) -> io::Result<()> {
    disk.rename(NEW_LOG, &log_name(generation))?;
    disk.sync_dir()
}

fn cut(file: &mut dyn LogFile, good_bytes: usize) -> io::Result<()> {
    file.set_len(good_bytes as u64)?;
    file.sync()
}

fn set_logs_aside(disk: &mut dyn Disk) -> io::Result<()> {
    let names = disk.list()?;
    let mut free = (1_u64..).map(|n| format!("damaged.{n}")).filter(|n| !names.contains(n));
    for name in names.iter().filter(|name| is_log(name)) {
        if let Some(aside) = free.next() {
            disk.rename(name, &aside)?;
        }
    }
    disk.sync_dir()
}

fn log_name(generation: u64) -> String {
    format!("{LOG_PREFIX}{generation}")
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

fn is_log(name: &str) -> bool {
    name.starts_with(LOG_PREFIX)
}

fn damaged(disk: &dyn Disk, name: &str, bytes: &[u8], damage: Damage) -> OpenError {
    let path = disk.path(name);
    let place = match damage {
        Damage::Version(version) => return OpenError::NewerFormat { path, version },
        Damage::Header => "in its first bytes".to_owned(),
        Damage::At(offset) => format!("at byte {offset} of {}", bytes.len()),
    };
    OpenError::Damaged { path, place, store_id: Header::decode(bytes).ok().map(|h| h.store_id) }
}

fn with_pid(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        faulty::{Fault, FaultyDisk},
        *,
    };

    type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

    #[test]
    fn what_was_appended_is_there_after_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, first) = Journal::open(directory.path()).unwrap();
        assert_eq!((first.boot_counter, first.entries.len()), (1, 0));
        journal.append(&[put("a", "1"), put("b", "2")]).unwrap();
        journal.append(&[put("a", "3"), remove("b")]).unwrap();
        journal.append(&[]).unwrap();
        drop(journal);
        let (_, second) = Journal::open(directory.path()).unwrap();
        assert_eq!(second.entries, entries(&[("a", "3")]));
        assert_eq!(second.store_id, first.store_id);
        assert_eq!(second.boot_counter, 2);
        assert_eq!(second.notes, Vec::<String>::new());
    }

    #[test]
    fn a_second_daemon_on_the_same_directory_is_told_who_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let open = Journal::open(directory.path()).unwrap();
        let error = Journal::open(directory.path()).unwrap_err();
        let OpenError::InUse { pid, .. } = &error else { panic!("{error}") };
        assert_eq!(*pid, Some(std::process::id()));
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(open);
        Journal::open(directory.path()).unwrap();
    }

    #[test]
    fn a_log_cut_at_any_byte_of_its_last_batch_loses_exactly_that_batch() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(directory.path()).unwrap();
        journal.append(&[put("kept", "1")]).unwrap();
        let kept_bytes = journal.good_bytes as usize;
        // Longer than what is written over it, so that a tail not cut would show.
        let more = "3".repeat(200);
        journal.append(&[put("lost", "2"), remove("kept"), put("more", &more)]).unwrap();
        drop(journal);
        let log = directory.path().join("log.1");
        let whole = std::fs::read(&log).unwrap();
        for length in kept_bytes..=whole.len() {
            std::fs::write(&log, &whole[..length]).unwrap();
            let (mut journal, recovered) = Journal::open(directory.path()).unwrap();
            let expected = match length == whole.len() {
                true => entries(&[("lost", "2"), ("more", &more)]),
                false => entries(&[("kept", "1")]),
            };
            assert_eq!(recovered.entries, expected, "cut at {length}");
            let torn = length != whole.len() && length != kept_bytes;
            assert_eq!(recovered.notes.len(), usize::from(torn), "cut at {length}");
            journal.append(&[put("next", "4")]).unwrap();
            drop(journal);
            let (_, again) = Journal::open(directory.path()).unwrap();
            assert_eq!(again.entries.len(), expected.len() + 1, "cut at {length}");
            assert_eq!(again.notes, Vec::<String>::new(), "cut at {length}");
        }
    }

    #[test]
    fn a_flipped_bit_before_the_last_frame_is_damage_and_in_it_a_torn_tail() {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
        for n in 0..4 {
            journal.append(&[put(&format!("key{n}"), "value")]).unwrap();
        }
        let before_last = journal.good_bytes as usize;
        journal.append(&[put("last", "value")]).unwrap();
        let whole = disk.read("log.1").unwrap();
        for at in 0..whole.len() {
            for bit in [0x01, 0x80] {
                let mut flipped = whole.clone();
                flipped[at] ^= bit;
                match recover::scan(&flipped) {
                    Err(damage) => assert!(at < before_last, "{damage:?} for byte {at}"),
                    Ok(scan) => {
                        assert!(at >= before_last, "byte {at} went unnoticed");
                        assert_eq!(scan.good_bytes, before_last);
                        assert_eq!(scan.entries.len(), 4);
                    }
                }
            }
        }
    }

    #[test]
    fn commits_of_one_fsync_may_reach_the_disk_in_any_order() {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
        journal.append(&[put("kept", "1")]).unwrap();
        let kept_bytes = journal.good_bytes as usize;
        let batches = [[put("a", "1")], [put("b", "2")], [put("c", "3")]];
        journal.append_group(&[&batches[0], &batches[1], &batches[2]]).unwrap();
        let mut bytes = disk.read("log.1").unwrap();
        bytes[kept_bytes] = 0;
        let scan = recover::scan(&bytes).unwrap();
        assert_eq!(scan.entries, entries(&[("kept", "1")]));
        assert_eq!(scan.good_bytes, kept_bytes);
        journal.append(&[put("later", "4")]).unwrap();
        let mut bytes = disk.read("log.1").unwrap();
        bytes[kept_bytes] = 0;
        assert_eq!(recover::scan(&bytes).unwrap_err(), Damage::At(kept_bytes));
    }

    #[test]
    fn a_damaged_store_is_refused_and_can_only_begin_anew_under_another_id() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, first) = Journal::open(directory.path()).unwrap();
        journal.append(&[put("promise", "1")]).unwrap();
        journal.append(&[put("promise", "2")]).unwrap();
        drop(journal);
        let log = directory.path().join("log.1");
        let mut bytes = std::fs::read(&log).unwrap();
        bytes[frame::HEADER_BYTES + 45] ^= 1;
        std::fs::write(&log, &bytes).unwrap();
        for _ in 0..2 {
            let error = Journal::open(directory.path()).unwrap_err();
            let OpenError::Damaged { store_id, .. } = &error else { panic!("{error}") };
            assert_eq!(*store_id, Some(first.store_id));
            assert!(error.to_string().contains("log.1"), "{error}");
        }
        let (_, second) = Journal::reset_as_new_store(directory.path()).unwrap();
        assert_ne!(second.store_id, first.store_id);
        assert_eq!((second.boot_counter, second.entries.len()), (1, 0));
        assert_eq!(std::fs::read(directory.path().join("damaged.1")).unwrap(), bytes);
    }

    #[test]
    fn a_snapshot_that_is_not_whole_is_damage_even_at_the_end_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(directory.path()).unwrap();
        grow_until_snapshot(&mut journal);
        let snapshot_bytes = journal.good_bytes;
        drop(journal);
        let log = directory.path().join("log.2");
        let whole = std::fs::read(&log).unwrap();
        assert_eq!(whole.len() as u64, snapshot_bytes);
        std::fs::write(&log, &whole[..whole.len() - 1]).unwrap();
        assert!(matches!(Journal::open(directory.path()), Err(OpenError::Damaged { .. })));
    }

    #[test]
    fn a_grown_log_is_replaced_by_its_live_entries() {
        let disk = FaultyDisk::new(1);
        let (mut journal, first) = Journal::open_on(disk.boxed()).unwrap();
        journal.append(&[put("small", "kept")]).unwrap();
        grow_until_snapshot(&mut journal);
        assert_eq!(disk.names(), ["log.2"]);
        assert!(journal.good_bytes < SNAPSHOT_BYTES_MIN / 2, "{}", journal.good_bytes);
        journal.append(&[put("after", "kept too")]).unwrap();
        let (_, recovered) = Journal::open_on(disk.crashed(7)).unwrap();
        assert_eq!(recovered.entries.len(), 3);
        assert_eq!(recovered.entries, journal.entries);
        assert_eq!((recovered.store_id, recovered.boot_counter), (first.store_id, 2));
    }

    #[test]
    fn a_newer_format_is_not_taken_for_damage() {
        let directory = tempfile::tempdir().unwrap();
        drop(Journal::open(directory.path()).unwrap());
        let log = directory.path().join("log.1");
        let mut bytes = std::fs::read(&log).unwrap();
        bytes[8] = 9;
        let covered = frame::HEADER_BYTES - 4;
        let crc = crc32c::crc32c(&bytes[..covered]);
        bytes[covered..covered + 4].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(&log, &bytes).unwrap();
        let error = Journal::open(directory.path()).unwrap_err();
        assert!(matches!(error, OpenError::NewerFormat { version: 9, .. }), "{error}");
    }

    #[test]
    fn after_a_failed_fsync_nothing_can_be_appended() {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
        journal.append(&[put("a", "1")]).unwrap();
        disk.fail_next(Fault::Sync);
        assert!(is_poisoned(&journal.append(&[put("b", "2")]).unwrap_err()));
        let error = journal.append(&[put("c", "3")]).unwrap_err();
        assert!(is_poisoned(&error) && error.to_string().contains("fsync"), "{error}");
        let (_, recovered) = Journal::open_on(disk.crashed(3)).unwrap();
        assert_eq!(recovered.entries.get(b"a".as_slice()), Some(&b"1".to_vec()));
    }

    #[test]
    fn a_full_disk_is_an_error_that_may_be_tried_again() {
        for through in 0..60 {
            let disk = FaultyDisk::new(1);
            let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
            journal.append(&[put("a", "1")]).unwrap();
            disk.fail_next(Fault::ShortWrite(through));
            let big = put("b", &"2".repeat(100));
            let error = journal.append(std::slice::from_ref(&big)).unwrap_err();
            assert!(!is_poisoned(&error), "{error}");
            journal.append(&[big]).unwrap();
            let (_, recovered) = Journal::open_on(disk.crashed(3)).unwrap();
            assert_eq!(recovered.entries.len(), 2);
        }
    }

    #[test]
    fn a_failed_write_that_cannot_be_taken_back_poisons() {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
        disk.fail_next(Fault::ShortWrite(5));
        disk.fail_next(Fault::SetLen);
        assert!(is_poisoned(&journal.append(&[put("a", "1")]).unwrap_err()));
        assert!(is_poisoned(&journal.append(&[put("a", "1")]).unwrap_err()));
    }

    #[test]
    fn a_snapshot_that_cannot_be_begun_is_put_off_and_one_in_doubt_poisons() {
        for (fault, doubt) in [
            (Fault::Create, false),
            (Fault::ShortWrite(100), false),
            (Fault::Rename, true),
            (Fault::SyncDir, true),
        ] {
            let disk = FaultyDisk::new(1);
            let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
            while journal.good_bytes + 2 * FILLER_BYTES < SNAPSHOT_BYTES_MIN {
                journal.append(&[filler()]).unwrap();
            }
            journal.append(&[filler()]).unwrap();
            // The short write must hit the snapshot, not the batch that leads to it.
            let full = matches!(fault, Fault::ShortWrite(_));
            journal.snapshot_at_bytes = u64::MAX;
            journal.append(&[filler()]).unwrap();
            journal.snapshot_at_bytes = SNAPSHOT_BYTES_MIN;
            disk.fail_next(fault);
            if full {
                journal.snapshot_if_grown();
            } else {
                journal.append(&[put("last", "kept")]).unwrap();
            }
            let next = journal.append(&[put("next", "value")]);
            assert_eq!(next.is_err(), doubt, "{fault:?}");
            let expected = journal.entries.clone();
            for seed in 0..8 {
                let (_, recovered) = Journal::open_on(disk.crashed(seed)).unwrap();
                assert_eq!(recovered.entries, expected, "{fault:?}");
            }
            if !doubt {
                let limit = SNAPSHOT_BYTES_MIN + 2 * SNAPSHOT_RETRY_BYTES;
                while journal.header.generation == 1 {
                    assert!(journal.good_bytes < limit, "the snapshot was not tried again");
                    journal.append(&[filler()]).unwrap();
                }
            }
        }
    }

    /// Every step of opening, appending and snapshotting, interrupted in turn.
    #[test]
    fn a_crash_at_any_step_loses_nothing_that_was_acknowledged() {
        let mut steps = 0;
        for dies_after in 0.. {
            let disk = FaultyDisk::new(dies_after);
            disk.die_after(dies_after as usize);
            let (acknowledged, tried) = work_until_death(&disk);
            steps = steps.max(disk.operations());
            for seed in 0..4 {
                let Ok((_, recovered)) = Journal::open_on(disk.crashed(dies_after * 4 + seed))
                else {
                    panic!("not opened after dying at step {dies_after}")
                };
                let state = recovered.entries;
                assert!(
                    state == acknowledged || state == tried,
                    "after step {dies_after}: {:?} is neither {:?} nor {:?}",
                    state.keys(),
                    acknowledged.keys(),
                    tried.keys()
                );
            }
            if disk.operations() < dies_after as usize {
                break;
            }
        }
        assert!(steps > 20, "only {steps} steps seen");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_log_cut_anywhere_holds_a_prefix_of_its_batches(
            batches in prop::collection::vec(
                prop::collection::vec((0_u8..6, prop::option::of(any::<u16>())), 1..5),
                1..12,
            ),
            cut_at in any::<prop::sample::Index>(),
        ) {
            let disk = FaultyDisk::new(1);
            let (mut journal, _) = Journal::open_on(disk.boxed()).unwrap();
            let born_bytes = journal.good_bytes as usize;
            let mut states = vec![Entries::new()];
            for batch in &batches {
                let batch: Vec<Write> = batch
                    .iter()
                    .map(|(key, value)| Write {
                        key: vec![*key],
                        value: value.map(|v| v.to_le_bytes().to_vec()),
                    })
                    .collect();
                journal.append(&batch).unwrap();
                states.push(journal.entries.clone());
            }
            let bytes = disk.read("log.1").unwrap();
            let length = born_bytes + cut_at.index(bytes.len() - born_bytes + 1);
            let scan = recover::scan(&bytes[..length]).unwrap();
            prop_assert!(states.contains(&scan.entries));
            prop_assert_eq!(recover::scan(&bytes).unwrap().entries, states.pop().unwrap());
        }

        #[test]
        fn any_bytes_at_all_are_read_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            with_header in any::<bool>(),
        ) {
            let store_id = StoreId([1; 16]);
            let header =
                Header { store_id, generation: 1, boot_counter: 0, snapshot_frames: 0 };
            let bytes = if with_header { [header.encode(), bytes].concat() } else { bytes };
            prop_assert_eq!(recover::scan(&bytes).is_ok(), with_header);
        }
    }

    /// Opens, appends, snapshots and reopens until the disk is dead: the state that was
    /// acknowledged last, and the one under way at that moment.
    fn work_until_death(disk: &FaultyDisk) -> (Entries, Entries) {
        let mut acknowledged = Entries::new();
        for round in 0..3 {
            let Ok((mut journal, recovered)) = Journal::open_on(disk.boxed()) else {
                return (acknowledged.clone(), acknowledged);
            };
            assert_eq!(recovered.entries, acknowledged);
            for step in 0..3 {
                if step == 1 {
                    // So that the next append takes a snapshot.
                    journal.snapshot_at_bytes = 0;
                }
                let batch = [put(&format!("{round}.{step}"), "value"), put("last", "value")];
                let mut tried = journal.entries.clone();
                tried.extend(batch.iter().map(|w| (w.key.clone(), w.value.clone().unwrap())));
                if journal.append(&batch).is_err() {
                    return (acknowledged, tried);
                }
                acknowledged = tried;
            }
        }
        (acknowledged.clone(), acknowledged)
    }

    const FILLER_BYTES: u64 = 256 << 10;

    fn filler() -> Write {
        put("filler", &"x".repeat(FILLER_BYTES as usize))
    }

    fn grow_until_snapshot(journal: &mut Journal) {
        while journal.header.generation == 1 {
            journal.append(&[filler()]).unwrap();
        }
    }

    fn put(key: &str, value: &str) -> Write {
        Write { key: key.into(), value: Some(value.into()) }
    }

    fn remove(key: &str) -> Write {
        Write { key: key.into(), value: None }
    }

    fn entries(pairs: &[(&str, &str)]) -> Entries {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }
}
