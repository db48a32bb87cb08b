//! Taking in a directory that a process goes on writing to.
//!
//! Each round looks at everything, and reads the files that are not as they were when they
//! were read. A round that finds nothing to read has the directory as it was at one moment:
//! no file changed between the round that read it and the look that ended this one. Until
//! then rounds follow with growing pauses; after the last nothing is taken, since a
//! checkpoint in part is worse than the one before it.
//!
//! A file that is only appended to, such as a log, would keep that from ever ending. So does
//! a checkpoint while it is being written, and that must not be taken in part. They are told
//! apart by time: of a file that begins with all that it had [`GROWN_FOR`] before, what it has
//! when it is read is taken.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _},
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use p2pit_protocol::BlobId;
use rustix::fs::{Stat, fstat};

use super::{
    Entry, Error, IngestOptions, Ingested, Kind, Reading, Scan, SkipReason, Skipped, Tree,
    TreePath, beneath, unreadable, workers,
};
use crate::transfer::{store::BlobStore, verified};

/// Before each round, in ms. What a round has read is looked at again at once, and only what
/// changed all the same gets time to settle.
const PAUSES_MS: [u64; 10] = [0, 0, 150, 0, 250, 0, 500, 0, 1_000, 0];
/// A file whose last change is no older than this when it is read may change again without
/// its times telling: they come from a clock of some 10 ms.
const SURE_AFTER_MS: u64 = 100;
/// Nothing takes so long to be written that is worth nothing without its end, mostly.
const GROWN_FOR: Duration = Duration::from_secs(30);

/// What a directory is now, or why it cannot be had.
#[derive(Debug)]
pub enum Live {
    Taken(Ingested),
    /// This file changed in every round.
    Changing(TreePath),
}

/// The files of a directory as they were read, so that those that did not change since are
/// not read again.
#[derive(Debug)]
pub struct Seen {
    files: BTreeMap<TreePath, SeenFile>,
    /// [`GROWN_FOR`], but in tests.
    grown_for: Duration,
}

impl Default for Seen {
    fn default() -> Self {
        Self { files: BTreeMap::new(), grown_for: GROWN_FOR }
    }
}

#[derive(Debug, Clone)]
struct SeenFile {
    stamp: Stamp,
    kind: Kind,
    trust: Trust,
    at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// It is the same as long as its stamp is.
    Sure,
    /// It was written to just before it was read, so that its stamp says little.
    Fresh,
    /// It grew while it was read, as it does all the time: what is known is its beginning.
    Beginning,
    /// It grew while it was read, and may be of no use yet.
    Growing,
}

/// What shows that a file has been written to or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    mode: u32,
}

impl Stamp {
    pub(super) fn of(state: &Stat) -> Self {
        Self {
            device: state.st_dev,
            inode: state.st_ino,
            size: u64::try_from(state.st_size).unwrap_or(0),
            modified: (state.st_mtime, state.st_mtime_nsec.cast_signed()),
            changed: (state.st_ctime, state.st_ctime_nsec.cast_signed()),
            mode: state.st_mode,
        }
    }

    /// Whether its last change lies so far from `now_ms` that the next has another time.
    fn is_sure_at(&self, now_ms: u64) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let changed_ms = seconds.saturating_mul(1_000).saturating_add(nanoseconds / 1_000_000);
        now_ms.abs_diff(u64::try_from(changed_ms).unwrap_or(0)) >= SURE_AFTER_MS
    }

    fn is_same_file_grown(&self, before: &Self) -> bool {
        (self.device, self.inode) == (before.device, before.inode) && self.size >= before.size
    }
}

impl Seen {
    fn has(&self, store: &BlobStore, path: &TreePath, stamp: &Stamp) -> bool {
        self.files.get(path).is_some_and(|seen| {
            let is_same = match seen.trust {
                Trust::Sure => seen.stamp == *stamp,
                Trust::Fresh | Trust::Growing => false,
                Trust::Beginning => stamp.is_same_file_grown(&seen.stamp),
            };
            is_same && matches!(&seen.kind, Kind::File { blob, .. } if store.has(blob))
        })
    }
}

/// What reading a file gave.
enum Read {
    Seen(SeenFile),
    /// Written to while it was read; it still begins as it did.
    StillGrowing,
    /// Written to, or gone, while it was read.
    Changed,
    Skipped(SkipReason),
}

/// As [`super::ingest`], of a directory that is being written to: everything as it was at one
/// moment, or nothing. `seen` is of the last call for the same directory. Blocks, for seconds
/// where files keep changing.
pub fn ingest_live(
    store: &BlobStore,
    dir: &Path,
    options: &IngestOptions,
    seen: &mut Seen,
) -> Result<Live, Error> {
    for file in seen.files.values_mut().filter(|file| file.trust == Trust::Beginning) {
        // There may be more of it now.
        file.trust = Trust::Growing;
    }
    let mut passed_over = BTreeMap::new();
    let mut changing = None;
    for pause_ms in PAUSES_MS {
        thread::sleep(Duration::from_millis(pause_ms));
        let mut scan = Scan::new(dir, options)?;
        scan.whole()?;
        let Scan { entries, skipped, files, stamps, bytes, .. } = scan;
        let there: BTreeMap<&TreePath, &Stamp> = files.iter().zip(&stamps).collect();
        seen.files.retain(|path, _| there.contains_key(path));
        passed_over.retain(|path, _| there.contains_key(path));
        let unread: Vec<TreePath> = there
            .iter()
            .filter(|(path, stamp)| {
                !passed_over.contains_key(**path) && !seen.has(store, path, stamp)
            })
            .map(|(path, _)| (*path).clone())
            .collect();
        let Some(first) = unread.first() else {
            return taken(store, dir, seen, entries, skipped, passed_over).map(Live::Taken);
        };
        changing = Some(first.clone());
        let known = &*seen;
        let read = workers::in_parts(
            unread.len(),
            bytes,
            || Reading::new(store, dir, options),
            |reading, part| {
                let read = unread[part].iter().map(|path| read_live(reading, path, known));
                read.collect::<Result<Vec<_>, _>>()
            },
        )?;
        for (path, read) in unread.into_iter().zip(read.into_iter().flatten()) {
            match read {
                Read::Seen(file) => drop(seen.files.insert(path, file)),
                Read::StillGrowing => {}
                Read::Changed => drop(seen.files.remove(&path)),
                Read::Skipped(reason) => drop(passed_over.insert(path, reason)),
            }
        }
    }
    // Only a path that was read gets here: a round without one has returned.
    changing.map(Live::Changing).ok_or_else(|| Error::Io {
        path: dir.to_owned(),
        source: std::io::Error::other("no round of reading"),
    })
}

fn taken(
    store: &BlobStore,
    dir: &Path,
    seen: &Seen,
    mut entries: Vec<Entry>,
    mut skipped: Vec<Skipped>,
    passed_over: BTreeMap<TreePath, SkipReason>,
) -> Result<Ingested, Error> {
    let files = seen.files.iter();
    entries.extend(files.map(|(path, it)| Entry { path: path.clone(), kind: it.kind.clone() }));
    skipped.extend(
        passed_over.into_iter().map(|(path, reason)| Skipped { path: path.to_path_buf(), reason }),
    );
    let unencodable = |source| Error::Tree { path: dir.to_owned(), source };
    let tree = Tree::new(entries).map_err(unencodable)?;
    let manifest = tree.encode().map_err(unencodable)?;
    let root = store
        .put_bytes(&manifest)
        .map_err(|source| Error::Store { path: dir.to_owned(), source })?;
    Ok(Ingested { root, tree, skipped })
}

fn read_live(reading: &mut Reading<'_>, path: &TreePath, known: &Seen) -> Result<Read, Error> {
    let (parents, name) = path.split();
    let now_ms = wall_ms();
    let opened = reading.descent.enter(&parents).and_then(|dir| beneath::open_file(dir, name));
    let (file, state) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            return Ok(match unreadable(error) {
                SkipReason::NotFound => Read::Changed,
                reason => Read::Skipped(reason),
            });
        }
    };
    if reading.options.owner.is_some_and(|owner| owner != state.st_uid) {
        return Ok(Read::Skipped(SkipReason::ForeignOwner(state.st_uid)));
    }
    let full = reading.dir.join(path.as_path());
    let io = |source| Error::Io { path: full.clone(), source };
    let (blob, size) = reading
        .store
        .put_open_file(&file, &full)
        .map_err(|source| Error::Store { path: full.clone(), source })?;
    let before = Stamp { size, ..Stamp::of(&state) };
    let after = Stamp::of(&fstat(&file).map_err(|errno| io(errno.into()))?);
    let at = Instant::now();
    let executable = state.st_mode & 0o111 != 0;
    let kind = Kind::File { blob, size, executable };
    let seen = |trust| Read::Seen(SeenFile { stamp: before, kind, trust, at });
    if after == before {
        return Ok(seen(if before.is_sure_at(now_ms) { Trust::Sure } else { Trust::Fresh }));
    }
    if after.size < size || !begins_with(&file, size, &blob).map_err(io)? {
        return Ok(Read::Changed);
    }
    let Some(earlier) = known.files.get(path) else { return Ok(seen(Trust::Growing)) };
    let Kind::File { blob: was, size: had, .. } = &earlier.kind else { return Ok(Read::Changed) };
    let has_grown =
        before.is_same_file_grown(&earlier.stamp) && begins_with(&file, *had, was).map_err(io)?;
    Ok(match has_grown {
        true if at.duration_since(earlier.at) >= known.grown_for => seen(Trust::Beginning),
        true => Read::StillGrowing,
        false => seen(Trust::Growing),
    })
}

/// Whether the first `size` bytes of a file are still this content.
fn begins_with(mut file: &File, size: u64, blob: &BlobId) -> std::io::Result<bool> {
    file.rewind()?;
    match verified::hash(file.take(size), size) {
        Ok((found, _)) => Ok(found == *blob),
        // Cut off meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write as _,
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
    };

    use super::*;
    use crate::transfer::tree::MANIFEST_BYTES_MAX;

    struct Fixture {
        _dir: tempfile::TempDir,
        keep: std::path::PathBuf,
        store: BlobStore,
        seen: Seen,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let keep = dir.path().join("keep");
            fs::create_dir(&keep).unwrap();
            let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
            Self { _dir: dir, keep, store, seen: Seen::default() }
        }

        fn take(&mut self) -> Live {
            ingest_live(&self.store, &self.keep, &IngestOptions::default(), &mut self.seen).unwrap()
        }

        fn taken(&mut self) -> BTreeMap<String, Vec<u8>> {
            let Live::Taken(taken) = self.take() else { panic!("it keeps changing") };
            assert!(taken.skipped.is_empty(), "{:?}", taken.skipped);
            let manifest = self.store.read(&taken.root, MANIFEST_BYTES_MAX).unwrap();
            assert_eq!(Tree::decode(&manifest).unwrap(), taken.tree);
            let file = |entry: &Entry| match &entry.kind {
                Kind::File { blob, size, .. } => {
                    let content = self.store.read(blob, usize::try_from(*size).unwrap()).unwrap();
                    Some((entry.path.to_string(), content))
                }
                Kind::Dir | Kind::Symlink { .. } => None,
            };
            taken.tree.entries().iter().filter_map(file).collect()
        }
    }

    #[test]
    fn what_did_not_change_is_not_read_again() {
        let mut fixture = Fixture::new();
        fs::write(fixture.keep.join("a"), "first").unwrap();
        fs::create_dir(fixture.keep.join("d")).unwrap();
        fs::write(fixture.keep.join("d/b"), "same").unwrap();
        assert_eq!(fixture.taken()["a"], b"first");
        // Other content under the name that the file's blob has: who reads the file again puts
        // it right.
        let blob = BlobId::of(b"same");
        fs::write(fixture.store.path_of(&blob), "bad!").unwrap();
        fs::write(fixture.keep.join("a"), "other").unwrap();
        let Live::Taken(taken) = fixture.take() else { panic!("it keeps changing") };
        assert_eq!(taken.tree.file_count(), 2);
        assert_eq!(fs::read(fixture.store.path_of(&blob)).unwrap(), b"bad!");
        // What is not in the store any more is read all the same.
        fixture.store.remove(&blob).unwrap();
        assert_eq!(fixture.taken()["d/b"], b"same");
        fs::remove_file(fixture.keep.join("a")).unwrap();
        assert_eq!(fixture.taken().len(), 1);
        assert_eq!(fixture.seen.files.len(), 1);
    }

    /// Runs `work` with a number that grows, in a thread, until it is dropped.
    struct Busy {
        stop: Arc<AtomicBool>,
        turns: Arc<AtomicU64>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Busy {
        fn with(mut work: impl FnMut(u64) + Send + 'static) -> Self {
            let (stop, turns) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
            let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&turns));
            let thread = thread::spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    work(counted.load(Ordering::Relaxed));
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            });
            let busy = Self { stop, turns, thread: Some(thread) };
            while busy.turns.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            busy
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
            self.thread.take().unwrap().join().unwrap();
        }
    }

    #[test]
    fn a_log_that_grows_all_the_time_is_taken_once_it_is_known_as_one() {
        let mut fixture = Fixture::new();
        let path = fixture.keep.join("log");
        let mut log = fs::File::create(&path).unwrap();
        let _busy = Busy::with(move |turn| writeln!(log, "line {turn}").unwrap());
        assert!(matches!(fixture.take(), Live::Changing(_)), "it may be of no use without its end");
        // It is no file of the moment any more.
        fixture.seen.grown_for = Duration::from_millis(1);
        let mut before = 0;
        for _ in 0..3 {
            let taken = fixture.taken();
            let now = &taken["log"];
            assert!(now.len() > before, "{} of {before}", now.len());
            let whole = fs::read(&path).unwrap();
            assert_eq!(now[..], whole[..now.len()]);
            before = now.len();
        }
    }

    #[test]
    fn a_file_that_is_overwritten_all_the_time_is_not_taken_in_part() {
        let mut fixture = Fixture::new();
        fs::write(fixture.keep.join("still"), "x").unwrap();
        let path = fixture.keep.join("busy");
        // Large enough that it is another before it is read to its end.
        let _busy = Busy::with(move |turn| {
            fs::write(&path, vec![u8::try_from(turn % 251).unwrap(); 4 << 20]).unwrap();
        });
        match fixture.take() {
            Live::Changing(path) => assert_eq!(path.to_string(), "busy"),
            Live::Taken(taken) => panic!("{:?}", taken.tree),
        }
    }

    #[test]
    fn two_files_that_belong_together_are_never_taken_of_different_times() {
        let mut fixture = Fixture::new();
        let (one, two) = (fixture.keep.join("one"), fixture.keep.join("two"));
        // As a careful program does: each is replaced at once, and for a while both agree.
        let write = move |turn: u64| {
            for path in [&one, &two] {
                let new = path.with_extension("new");
                fs::write(&new, turn.to_string()).unwrap();
                fs::rename(&new, path).unwrap();
            }
            thread::sleep(Duration::from_millis(300));
        };
        write(0);
        let _busy = Busy::with(write);
        let mut seen = 0;
        for _ in 0..5 {
            if let Live::Taken(_) = fixture.take() {
                let blobs: Vec<_> = fixture.seen.files.values().map(|it| &it.kind).collect();
                assert_eq!(blobs[0], blobs[1], "of one turn");
                seen += 1;
            }
        }
        assert!(seen > 0, "there is time enough between two turns");
    }
}
