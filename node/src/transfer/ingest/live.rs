//! Taking in a directory that a process goes on writing to.
//!
//! Each round looks at everything, and reads the files that are not as they were when they
//! were read. A round that finds nothing to read, and the same directories as the round before,
//! has all as it was at one moment, right before it: no file changed between the round that
//! read it and the look that ended this one, and no name came, went or moved since the last.
//! Until then rounds follow with growing pauses; after the last nothing is taken, since a
//! checkpoint in part is worse than the one before it.
//!
//! For the same reason nothing is left out that may be read the next time: what went while it
//! was looked at, and what an error of the moment kept from being read (too many open files, a
//! bad block), has another round follow. What never can be in a tree is left out, and what the
//! job itself does not let anybody read, where that was so in two rounds.
//!
//! A file that is only appended to, such as a log, would keep that from ever ending. So does
//! a checkpoint while it is being written, and that must not be taken in part. They are told
//! apart by time: of a file that begins with all that it had [`GROWN_FOR`] before, what it has
//! when it is read is taken.

use std::{
    collections::BTreeMap,
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{ErrorKind, Read as _, Seek as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use p2pit_protocol::BlobId;
use rustix::fs::{Stat, fstat};

use super::{
    Entry, Error, IngestOptions, Ingested, Kind, Reading, Scan, SkipReason, Skipped, TreePath,
    beneath, store_tree, unreadable, workers,
};
use crate::transfer::{
    store::{self, BlobStore},
    verified,
};

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
    /// With what is left out of it for good.
    Taken(Ingested),
    /// This changed in every round.
    Changing(PathBuf),
    /// This could not be read in any round.
    Unreadable(Skipped),
}

/// The files of a directory as they were read, so that those that did not change since are
/// not read again.
#[derive(Debug)]
pub struct Seen {
    files: BTreeMap<TreePath, SeenFile>,
    /// What the last round found.
    listing: Option<Listing>,
    /// [`GROWN_FOR`], but in tests.
    grown_for: Duration,
}

impl Default for Seen {
    fn default() -> Self {
        Self { files: BTreeMap::new(), listing: None, grown_for: GROWN_FOR }
    }
}

/// The names in all directories, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listing {
    hash: u64,
    /// A directory that was written to just before it was listed, so that its times say little.
    fresh: Option<PathBuf>,
}

impl Listing {
    fn of(scan: &Scan<'_>, now_ms: u64) -> Self {
        let mut hasher = DefaultHasher::new();
        scan.dirs.hash(&mut hasher);
        scan.files.hash(&mut hasher);
        for entry in &scan.entries {
            entry.path.hash(&mut hasher);
        }
        for skipped in &scan.skipped {
            skipped.path.hash(&mut hasher);
        }
        let fresh = scan.dirs.iter().find(|(_, stamp)| !stamp.is_sure_at(now_ms));
        let path =
            |path: &Option<TreePath>| path.as_ref().map_or(".".into(), TreePath::to_path_buf);
        Self { hash: hasher.finish(), fresh: fresh.map(|(dir, _)| path(dir)) }
    }

    /// Whether nothing came or went between the two looks.
    fn is_same_since(&self, before: Option<&Self>) -> bool {
        before.is_some_and(|before| before.fresh.is_none() && before.hash == self.hash)
    }
}

/// What of the directory is left out, and may have to be looked at again.
#[derive(Debug, Default)]
struct Omitted {
    /// Of what could not be read for want of a permission: in which round that was seen last.
    denied: BTreeMap<PathBuf, usize>,
}

impl Omitted {
    /// Whether this is out for good, as far as `round` shows.
    fn is_for_good(&mut self, path: &Path, reason: &SkipReason, round: usize) -> bool {
        match reason {
            SkipReason::Special(_)
            | SkipReason::ForeignOwner(_)
            | SkipReason::OtherFileSystem
            | SkipReason::Path(_) => true,
            SkipReason::Unreadable(error) if error.kind() == ErrorKind::PermissionDenied => {
                self.denied.insert(path.to_owned(), round).is_some_and(|seen| seen + 1 == round)
            }
            SkipReason::NotFound | SkipReason::Unreadable(_) => false,
        }
    }
}

/// What comes of [`Omitted`] in the last round.
fn hindrance(path: PathBuf, reason: SkipReason) -> Live {
    match reason {
        SkipReason::Unreadable(_) => Live::Unreadable(Skipped { path, reason }),
        _ => Live::Changing(path),
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    let look = || {
        let mut scan = Scan::new(dir, options)?;
        scan.whole()?;
        Ok(scan)
    };
    ingest_looking(store, dir, options, seen, look)
}

/// As [`ingest_live`], where `look` finds what there is.
fn ingest_looking<'a>(
    store: &BlobStore,
    dir: &Path,
    options: &IngestOptions,
    seen: &mut Seen,
    mut look: impl FnMut() -> Result<Scan<'a>, Error>,
) -> Result<Live, Error> {
    for file in seen.files.values_mut().filter(|file| file.trust == Trust::Beginning) {
        // There may be more of it now.
        file.trust = Trust::Growing;
    }
    let mut passed_over = BTreeMap::new();
    let mut omitted = Omitted::default();
    let mut hindered = Live::Changing(".".into());
    for (round, pause_ms) in PAUSES_MS.into_iter().enumerate() {
        thread::sleep(Duration::from_millis(pause_ms));
        let looked_ms = wall_ms();
        let scan = look()?;
        let listing = Listing::of(&scan, looked_ms);
        let is_same = listing.is_same_since(seen.listing.as_ref());
        let fresh = listing.fresh.clone();
        seen.listing = Some(listing);
        let Scan { entries, skipped, files, stamps, bytes, .. } = scan;
        let (skipped, again): (Vec<Skipped>, Vec<Skipped>) =
            skipped.into_iter().partition(|it| omitted.is_for_good(&it.path, &it.reason, round));
        let mut again = again.into_iter().next().map(|it| hindrance(it.path, it.reason));
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
        if unread.is_empty() && again.is_none() && is_same {
            return taken(store, dir, seen, entries, skipped, passed_over).map(Live::Taken);
        }
        let changing = unread.first().map(|path| Live::Changing(path.to_path_buf()));
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
                Read::Skipped(reason) => {
                    seen.files.remove(&path);
                    if omitted.is_for_good(path.as_path(), &reason, round) {
                        passed_over.insert(path, reason);
                    } else if again.is_none() {
                        again = Some(hindrance(path.to_path_buf(), reason));
                    }
                }
            }
        }
        let moving = || Live::Changing(fresh.unwrap_or(".".into()));
        hindered = again.or(changing).unwrap_or_else(moving);
    }
    Ok(hindered)
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
    store_tree(store, dir, entries, skipped)
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
    let (blob, size) = match reading.store.put_open_file(&file, &full) {
        Ok(put) => put,
        // Cut off while it was read.
        Err(store::Error::Io { source, .. }) if source.kind() == ErrorKind::UnexpectedEof => {
            return Ok(Read::Changed);
        }
        Err(source) => return Err(Error::Store { path: full, source }),
    };
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

    use rustix::io::Errno;

    use super::*;
    use crate::transfer::tree::{MANIFEST_BYTES_MAX, Tree};

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
            Live::Changing(path) => assert_eq!(path, Path::new("busy")),
            // Where the machine has no time for who writes, it is whole for long enough.
            Live::Taken(_) => {
                let Kind::File { blob, size, .. } =
                    &fixture.seen.files.values().next().unwrap().kind
                else {
                    panic!("no file")
                };
                let content = fixture.store.read(blob, 4 << 20).unwrap();
                assert!(*size == 4 << 20 && content.iter().all(|it| *it == content[0]), "{size}");
            }
            Live::Unreadable(skipped) => panic!("{skipped:?}"),
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

    impl Fixture {
        /// Takes the directory, where `look` finds what is there in each round.
        fn looking<'a>(&mut self, look: impl FnMut() -> Result<Scan<'a>, Error>) -> Live {
            let options = IngestOptions::default();
            let (store, keep) = (&self.store, &self.keep);
            ingest_looking(store, keep, &options, &mut self.seen, look).unwrap()
        }
    }

    fn names_of(live: &Live) -> Vec<String> {
        let Live::Taken(taken) = live else { panic!("{live:?}") };
        taken.tree.entries().iter().map(|entry| entry.path.to_string()).collect()
    }

    #[test]
    fn a_checkpoint_that_moves_while_it_is_looked_for_is_not_missed() {
        let mut fixture = Fixture::new();
        let (keep, options) = (fixture.keep.clone(), IngestOptions::default());
        for name in ["ckpt-99", "ckpt.tmp"] {
            fs::write(keep.join(name), name).unwrap();
        }
        let mut moves = true;
        let taken = fixture.looking(|| {
            let mut scan = Scan::new(&keep, &options)?;
            let root = scan.descent.root().try_clone_to_owned().unwrap();
            let names = beneath::names(&root, 10).unwrap().unwrap();
            if std::mem::take(&mut moves) {
                // The names are known, and nothing else yet.
                fs::rename(keep.join("ckpt.tmp"), keep.join("ckpt-100")).unwrap();
                fs::remove_file(keep.join("ckpt-99")).unwrap();
            }
            scan.listed(&root, None, &names)?;
            Ok(scan)
        });
        assert_eq!(names_of(&taken), ["ckpt-100"]);
    }

    #[test]
    fn what_moves_past_a_look_is_not_missed() {
        let mut fixture = Fixture::new();
        let (keep, options) = (fixture.keep.clone(), IngestOptions::default());
        for name in ["a", "b"] {
            fs::create_dir(keep.join(name)).unwrap();
            fs::write(keep.join(name).join("stays"), "x").unwrap();
        }
        fs::write(keep.join("b/ckpt"), "x").unwrap();
        // Long ago.
        thread::sleep(Duration::from_millis(2 * SURE_AFTER_MS));
        let mut turn = 0;
        let taken = fixture.looking(|| {
            turn += 1;
            let mut scan = Scan::new(&keep, &options)?;
            let dir = |name: &str| {
                let (dir, path) = (File::open(keep.join(name)), TreePath::from_bytes(name));
                (dir.unwrap(), path.unwrap())
            };
            for name in ["a", "b"] {
                let (dir, path) = dir(name);
                scan.directory(&dir, Some(&path))?;
                if turn == 1 && name == "a" {
                    // In neither, for who looks into one after the other.
                    fs::rename(keep.join("b/ckpt"), keep.join("a/ckpt")).unwrap();
                }
            }
            Ok(scan)
        });
        assert_eq!(names_of(&taken), ["a/ckpt", "a/stays", "b/stays"]);
    }

    #[test]
    fn what_cannot_be_read_for_a_moment_is_no_reason_to_leave_it_out() {
        let mut fixture = Fixture::new();
        let (keep, options) = (fixture.keep.clone(), IngestOptions::default());
        fs::write(keep.join("plain"), "x").unwrap();
        fs::create_dir(keep.join("sub")).unwrap();
        fs::write(keep.join("sub/ckpt"), "x").unwrap();
        // In so many rounds the directory cannot be opened.
        let mut taken = |rounds: usize, errno: Errno| {
            let mut left = rounds;
            fixture.looking(|| {
                let mut scan = Scan::new(&keep, &options)?;
                scan.whole()?;
                if left > 0 {
                    left -= 1;
                    let sub = scan.files.iter().position(|it| it.as_bytes() == b"sub/ckpt");
                    let sub = sub.unwrap();
                    scan.files.remove(sub);
                    scan.stamps.remove(sub);
                    scan.skip(Path::new("sub"), unreadable(errno.into()));
                }
                Ok(scan)
            })
        };
        for errno in [Errno::MFILE, Errno::IO] {
            assert_eq!(names_of(&taken(3, errno)), ["plain", "sub/ckpt"]);
            let Live::Unreadable(skipped) = taken(PAUSES_MS.len(), errno) else {
                panic!("a copy without it")
            };
            assert_eq!(skipped.path, Path::new("sub"));
        }
        assert_eq!(names_of(&taken(1, Errno::ACCESS)), ["plain", "sub/ckpt"]);
        // The job does not want it to be read.
        let live = taken(PAUSES_MS.len(), Errno::ACCESS);
        assert_eq!(names_of(&live), ["plain"]);
        let Live::Taken(taken) = live else { panic!() };
        assert_eq!(taken.skipped.len(), 1);
    }

    #[test]
    fn what_no_tree_can_hold_is_left_out_at_once() {
        let mut fixture = Fixture::new();
        fs::write(fixture.keep.join("plain"), "x").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(fixture.keep.join("s")).unwrap();
        let live = fixture.take();
        assert_eq!(names_of(&live), ["plain"]);
        let Live::Taken(taken) = live else { panic!() };
        assert!(matches!(taken.skipped[..], [Skipped { reason: SkipReason::Special(_), .. }]));
    }
}
