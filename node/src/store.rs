//! What can be rebuilt: caches and history in an embedded database.
//!
//! Nothing here is needed for safety, and the database may lose or spoil it: one
//! that does not open, has another version or has outgrown its bound is moved aside
//! as `index.broken-<n>` (one is kept) and begun anew, with a warning. Calls touch the
//! disk for well below a millisecond.

mod entry;

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use p2pit_protocol::{PeerId, identity::PublicKey, wire::encode};
use thiserror::Error;

pub use self::entry::{ADDRESSES_MAX, PeerEntry};

/// The indexes of one home. The caller has locked the home.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// `None` only after a rebuild failed.
    open: Mutex<Option<Open>>,
    /// Changes since the size was looked at.
    changes: AtomicU64,
    bytes_max: u64,
}

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{what} of {bytes} bytes where at most {max} are kept")]
    TooLarge { what: &'static str, bytes: usize, max: usize },
    /// There is no room for another one; known ones may still be changed.
    #[error("more than the {max} {what} that are kept")]
    Full { what: &'static str, max: usize },
    #[error("the index {} is in use by another process", .path.display())]
    InUse { path: PathBuf },
    #[error("the index {} cannot be used: {reason}", .path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("the index {} could not be moved aside", .path.display())]
    MoveAside {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Store {
    /// Opens or creates the indexes in `path`, anew where what is there is unusable.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_below(path, INDEX_BYTES_MAX)
    }

    fn open_below(path: &Path, bytes_max: u64) -> Result<Self, StoreError> {
        let open = match Open::patiently_at(path) {
            Ok(open) if open.bytes() <= bytes_max => open,
            Ok(open) => {
                let reason = too_large(&open, bytes_max);
                // Closed first: closing writes into the directory by its path.
                drop(open);
                begin_anew(path, &reason)?
            }
            Err(OpenFailure::Refused(error)) => return Err(error),
            Err(OpenFailure::Broken(reason)) => begin_anew(path, &reason)?,
        };
        let open = Mutex::new(Some(open));
        Ok(Self { path: path.to_owned(), open, changes: AtomicU64::new(0), bytes_max })
    }

    /// Begins anew, now and then, where the index has outgrown its bound.
    fn changed(&self) -> Result<(), StoreError> {
        let changes = self.changes.fetch_add(1, Ordering::Relaxed);
        if !changes.is_multiple_of(SIZE_CHECK_CHANGES) {
            return Ok(());
        }
        let mut guard = self.lock();
        let reason = match guard.as_ref() {
            Some(open) if open.bytes() <= self.bytes_max => return Ok(()),
            Some(open) => too_large(open, self.bytes_max),
            None => "an earlier rebuild failed".to_owned(),
        };
        *guard = None;
        *guard = Some(begin_anew(&self.path, &reason)?);
        Ok(())
    }

    /// Remembers where a peer is. Of more peers than [`PEERS_MAX`] those seen longest
    /// ago are forgotten; of more addresses than [`ADDRESSES_MAX`] the last ones.
    pub fn put_peer(&self, peer: &PeerId, entry: &PeerEntry) -> Result<(), StoreError> {
        self.changed()?;
        self.with(|open| {
            let bytes = encode(&entry.bounded());
            let addresses_changed = match open.peers.tree.insert(peer.0.0, bytes)? {
                None => {
                    open.peers.count += 1;
                    true
                }
                Some(before) => {
                    PeerEntry::decode(&before).is_none_or(|before| !before.same_place(entry))
                }
            };
            if open.peers.count > PEERS_MAX {
                open.forget_stale_peers()?;
            }
            // Worth surviving a crash: a restarted pool finds itself by these.
            if addresses_changed {
                open.db.flush()?;
            }
            Ok(())
        })
    }

    pub fn remove_peer(&self, peer: &PeerId) -> Result<(), StoreError> {
        self.with(|open| open.peers.remove(&peer.0.0))
    }

    /// All remembered peers, those seen last first.
    pub fn peers(&self) -> Result<Vec<(PeerId, PeerEntry)>, StoreError> {
        self.with(|open| {
            let mut peers = open.all_peers()?;
            peers.sort_by_key(|(peer, entry)| (u64::MAX - entry.last_seen_wall_ms, *peer));
            Ok(peers)
        })
    }

    /// Keeps what a node's advert said, as opaque bytes.
    pub fn put_board(&self, node: &PeerId, advert: &[u8]) -> Result<(), StoreError> {
        check_size("an advert", advert, BOARD_ENTRY_BYTES_MAX)?;
        self.changed()?;
        let full = StoreError::Full { what: "adverts", max: BOARD_ENTRIES_MAX };
        self.with(|open| {
            if open.board.count >= BOARD_ENTRIES_MAX && !open.board.tree.contains_key(node.0.0)? {
                return Ok(Err(full));
            }
            open.board.put(&node.0.0, advert)?;
            Ok(Ok(()))
        })?
    }

    pub fn remove_board(&self, node: &PeerId) -> Result<(), StoreError> {
        self.with(|open| open.board.remove(&node.0.0))
    }

    /// The kept adverts by node.
    pub fn board(&self) -> Result<Vec<(PeerId, Vec<u8>)>, StoreError> {
        self.with(|open| {
            let entries = open.board.tree.iter().collect::<sled::Result<Vec<_>>>()?;
            let known =
                |(key, value): &(sled::IVec, sled::IVec)| Some((peer_of(key)?, value.to_vec()));
            Ok(entries.iter().filter_map(known).collect())
        })
    }

    /// Adds a line to the history; beyond [`HISTORY_LINES_MAX`] the oldest go.
    pub fn append_history(&self, line: &[u8]) -> Result<(), StoreError> {
        check_size("a history line", line, HISTORY_LINE_BYTES_MAX)?;
        self.changed()?;
        self.with(|open| {
            let last = open.history.tree.last()?.and_then(|(key, _)| sequence_of(&key));
            let next = last.map_or(0, |last| last + 1);
            open.history.put(&next.to_be_bytes(), line)?;
            while open.history.count > HISTORY_LINES_MAX {
                open.history.tree.pop_min()?;
                open.history.count -= 1;
            }
            Ok(())
        })
    }

    /// The last `count` lines of the history, oldest first.
    pub fn history(&self, count: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        self.with(|open| {
            let newest = open.history.tree.iter().rev().take(count);
            let mut lines = newest
                .map(|entry| entry.map(|(_, line)| line.to_vec()))
                .collect::<sled::Result<Vec<_>>>()?;
            lines.reverse();
            Ok(lines)
        })
    }

    /// Hands everything to the kernel; a clean close does so too.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.with(|open| open.db.flush().map(|_| ()))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Open) -> sled::Result<T>) -> Result<T, StoreError> {
        let unusable = |reason| StoreError::Unusable { path: self.path.clone(), reason };
        match self.lock().as_mut() {
            Some(open) => act(open).map_err(|e| unusable(e.to_string())),
            None => Err(unusable("it could not be rebuilt".to_owned())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Peers kept; the pool is planned for 10,000 nodes.
pub const PEERS_MAX: usize = 16_384;
/// Adverts kept, and the size of one.
pub const BOARD_ENTRIES_MAX: usize = 16_384;
pub const BOARD_ENTRY_BYTES_MAX: usize = 16 << 10;
/// Lines of history kept, and the length of one.
pub const HISTORY_LINES_MAX: usize = 10_000;
pub const HISTORY_LINE_BYTES_MAX: usize = 16 << 10;

/// All bounds above together stay below half of it; beyond it the database leaks.
const INDEX_BYTES_MAX: u64 = 1 << 30;
/// So many changes write at most 4 MiB before the size is looked at, which takes
/// microseconds.
const SIZE_CHECK_CHANGES: u64 = 256;

/// Changes with every stored type.
const VERSION: &[u8] = b"p2pit index 1";
const VERSION_KEY: &[u8] = b"version";

/// Of a full peer cache this part is forgotten at once.
const FORGET_PART: usize = 8;

#[derive(Debug)]
struct Open {
    db: sled::Db,
    peers: Tree,
    board: Tree,
    history: Tree,
}

enum OpenFailure {
    /// Moving it aside would not help.
    Refused(StoreError),
    Broken(String),
}

impl Open {
    /// Waits for the lock of a store that this process has closed just now: its
    /// database lets go of its files a little later.
    fn patiently_at(path: &Path) -> Result<Self, OpenFailure> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match Self::at(path) {
                Err(OpenFailure::Refused(StoreError::InUse { .. }))
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(LOCK_POLL);
                }
                result => return result,
            }
        }
    }

    fn at(path: &Path) -> Result<Self, OpenFailure> {
        // Its corruption checks may panic.
        catch_unwind(AssertUnwindSafe(|| Self::try_at(path)))
            .unwrap_or_else(|_| Err(OpenFailure::Broken("opening it panicked".to_owned())))
    }

    fn try_at(path: &Path) -> Result<Self, OpenFailure> {
        let refused_or_broken = |error: sled::Error| {
            let path = path.to_owned();
            let reason = error.to_string();
            match error {
                sled::Error::Io(_) if reason.contains("could not acquire lock") => {
                    OpenFailure::Refused(StoreError::InUse { path })
                }
                sled::Error::Io(e) if is_environmental(&e) => {
                    OpenFailure::Refused(StoreError::Unusable { path, reason })
                }
                _ => OpenFailure::Broken(reason),
            }
        };
        let (version, open) = Self::read(path).map_err(refused_or_broken)?;
        match version {
            Some(version) if version == VERSION => Ok(open),
            Some(version) => {
                let version = String::from_utf8_lossy(&version).into_owned();
                Err(OpenFailure::Broken(format!("its version is `{version}`")))
            }
            None => {
                let marked = open.db.insert(VERSION_KEY, VERSION).and_then(|_| open.db.flush());
                marked.map_err(refused_or_broken)?;
                Ok(open)
            }
        }
    }

    fn read(path: &Path) -> sled::Result<(Option<sled::IVec>, Self)> {
        let db = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            // What matters is flushed when it is written; an idle node stays idle.
            .flush_every_ms(None)
            .open()?;
        let version = db.get(VERSION_KEY)?;
        let peers = Tree::open(&db, "peers")?;
        let board = Tree::open(&db, "board")?;
        let history = Tree::open(&db, "history")?;
        Ok((version, Self { db, peers, board, history }))
    }

    fn bytes(&self) -> u64 {
        // An index whose size is unknown is not known to be too large.
        self.db.size_on_disk().unwrap_or(0)
    }

    /// Entries that cannot be read are dropped on the way.
    fn all_peers(&mut self) -> sled::Result<Vec<(PeerId, PeerEntry)>> {
        let entries = self.peers.tree.iter().collect::<sled::Result<Vec<_>>>()?;
        let mut peers = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            match (peer_of(&key), PeerEntry::decode(&value)) {
                (Some(peer), Some(entry)) => peers.push((peer, entry)),
                _ => self.peers.remove(&key)?,
            }
        }
        Ok(peers)
    }

    fn forget_stale_peers(&mut self) -> sled::Result<()> {
        let mut peers = self.all_peers()?;
        peers.sort_by_key(|(peer, entry)| (entry.last_seen_wall_ms, *peer));
        for (peer, _) in peers.iter().take(PEERS_MAX / FORGET_PART) {
            self.peers.remove(&peer.0.0)?;
        }
        Ok(())
    }
}

/// A tree that knows its size; the database's own count reads everything.
#[derive(Debug)]
struct Tree {
    tree: sled::Tree,
    count: usize,
}

impl Tree {
    fn open(db: &sled::Db, name: &str) -> sled::Result<Self> {
        let tree = db.open_tree(name)?;
        let count = tree.len();
        Ok(Self { tree, count })
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> sled::Result<()> {
        self.count += usize::from(self.tree.insert(key, value)?.is_none());
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> sled::Result<()> {
        self.count -= usize::from(self.tree.remove(key)?.is_some());
        Ok(())
    }
}

const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// Measured: a larger cache only makes an idle node larger.
const CACHE_BYTES: u64 = 1 << 20;

/// The database buffers a few of these. A write must fit into one.
const SEGMENT_BYTES: usize = 64 << 10;

fn is_environmental(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
    )
}

fn too_large(open: &Open, bytes_max: u64) -> String {
    format!("it has {} bytes, more than {bytes_max}", open.bytes())
}

fn begin_anew(path: &Path, reason: &str) -> Result<Open, StoreError> {
    tracing::warn!(index = %path.display(), reason, "the index is begun anew");
    move_aside(path).map_err(|source| StoreError::MoveAside { path: path.to_owned(), source })?;
    Open::at(path).map_err(|failure| match failure {
        OpenFailure::Refused(error) => error,
        OpenFailure::Broken(reason) => StoreError::Unusable { path: path.to_owned(), reason },
    })
}

/// Renames `path` to the next free `path.broken-<n>` and removes those before it.
fn move_aside(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let prefix = format!("{}.broken-", name.to_string_lossy());
    let mut earlier = Vec::new();
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(number) = name.strip_prefix(&prefix).and_then(|n| n.parse::<u64>().ok()) {
            earlier.push((number, entry.path()));
        }
    }
    let next = earlier.iter().map(|(number, _)| number + 1).max().unwrap_or(1);
    std::fs::rename(path, parent.join(format!("{prefix}{next}")))?;
    for (_, path) in earlier {
        std::fs::remove_dir_all(path)?;
    }
    Ok(())
}

fn check_size(what: &'static str, bytes: &[u8], max: usize) -> Result<(), StoreError> {
    match bytes.len() {
        length if length > max => Err(StoreError::TooLarge { what, bytes: length, max }),
        _ => Ok(()),
    }
}

fn peer_of(key: &[u8]) -> Option<PeerId> {
    Some(PeerId(PublicKey(key.try_into().ok()?)))
}

fn sequence_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u32) -> PeerId {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        PeerId(PublicKey(key))
    }

    fn entry(port: u16, last_seen_wall_ms: u64) -> PeerEntry {
        let address = |port| vec![([127, 0, 0, 1], port).into()];
        PeerEntry { control: address(port), data: address(port + 1), last_seen_wall_ms }
    }

    fn index() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index");
        (directory, path)
    }

    fn siblings(path: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn pretend(store: &Store, change: impl FnOnce(&mut Open)) {
        store
            .with(|open| {
                change(open);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn peers_adverts_and_history_are_there_after_reopening() {
        let (_directory, path) = index();
        let store = Store::open(&path).unwrap();
        store.put_peer(&peer(1), &entry(1000, 5)).unwrap();
        store.put_peer(&peer(2), &entry(2000, 9)).unwrap();
        store.put_peer(&peer(1), &entry(1100, 7)).unwrap();
        store.put_peer(&peer(3), &entry(3000, 1)).unwrap();
        store.remove_peer(&peer(3)).unwrap();
        store.put_board(&peer(1), b"advert").unwrap();
        store.put_board(&peer(2), b"old").unwrap();
        store.remove_board(&peer(2)).unwrap();
        for line in ["one", "two", "three"] {
            store.append_history(line.as_bytes()).unwrap();
        }
        drop(store);
        let store = Store::open(&path).unwrap();
        let expected = [(peer(2), entry(2000, 9)), (peer(1), entry(1100, 7))];
        assert_eq!(store.peers().unwrap(), expected);
        assert_eq!(store.board().unwrap(), [(peer(1), b"advert".to_vec())]);
        assert_eq!(store.history(2).unwrap(), [b"two".to_vec(), b"three".to_vec()]);
        store.append_history(b"four").unwrap();
        assert_eq!(store.history(1).unwrap(), [b"four".to_vec()]);
    }

    #[test]
    fn an_index_that_does_not_open_is_moved_aside_and_only_one_is_kept() {
        let (_directory, path) = index();
        for round in 1..=3 {
            drop(Store::open(&path).unwrap());
            std::fs::write(path.join("conf"), b"damaged configuration of no use").unwrap();
            std::fs::write(path.join("db"), [0xff; 4096]).unwrap();
            let broken = format!("index.broken-{round}");
            let store = Store::open(&path).unwrap();
            assert_eq!(store.peers().unwrap(), []);
            assert_eq!(siblings(&path), ["index".to_owned(), broken]);
        }
    }

    #[test]
    fn an_index_that_outgrows_its_bound_is_begun_anew_while_open_and_when_opened() {
        const BYTES_MAX: u64 = 3 << 20;
        let (_directory, path) = index();
        let store = Store::open_below(&path, BYTES_MAX).unwrap();
        store.put_peer(&peer(1), &entry(1000, 5)).unwrap();
        let line = [7; HISTORY_LINE_BYTES_MAX];
        let lines = (1..2000).find(|_| {
            store.append_history(&line).unwrap();
            siblings(&path).len() == 2
        });
        assert!(lines.is_some(), "{:?}", siblings(&path));
        assert_eq!(store.peers().unwrap(), []);
        assert!(store.history(9).unwrap().len() <= 1);
        store.put_peer(&peer(2), &entry(1000, 5)).unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        for _ in 0..3 * BYTES_MAX / line.len() as u64 {
            store.append_history(&line).unwrap();
        }
        store.flush().unwrap();
        drop(store);
        let store = Store::open_below(&path, BYTES_MAX).unwrap();
        assert_eq!(store.peers().unwrap(), []);
        assert_eq!(siblings(&path), ["index", "index.broken-2"]);
    }

    #[test]
    fn an_index_of_another_version_is_begun_anew() {
        let (_directory, path) = index();
        let store = Store::open(&path).unwrap();
        store.put_peer(&peer(1), &entry(1000, 5)).unwrap();
        store.with(|open| open.db.insert(VERSION_KEY, "p2pit index 0")).unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap().peers().unwrap(), []);
        assert_eq!(siblings(&path), ["index", "index.broken-1"]);
    }

    #[test]
    fn an_index_in_use_is_left_where_it_is() {
        let (_directory, path) = index();
        let _store = Store::open(&path).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
        assert_eq!(siblings(&path), ["index"]);
    }

    #[test]
    fn a_full_peer_cache_forgets_those_seen_longest_ago() {
        let (_directory, path) = index();
        let store = Store::open(&path).unwrap();
        store
            .with(|open| {
                for n in 0..PEERS_MAX {
                    let bytes = encode(&entry(1000, n as u64));
                    open.peers.put(&peer(n as u32).0.0, &bytes)?;
                }
                Ok(())
            })
            .unwrap();
        store.put_peer(&peer(u32::MAX), &entry(1000, u64::MAX)).unwrap();
        let peers = store.peers().unwrap();
        assert_eq!(peers.len(), PEERS_MAX + 1 - PEERS_MAX / FORGET_PART);
        assert_eq!(peers[0].0, peer(u32::MAX));
        assert_eq!(peers.last().unwrap().0, peer((PEERS_MAX / FORGET_PART) as u32));
    }

    #[test]
    fn more_than_fits_is_refused_or_replaces_the_oldest() {
        let (_directory, path) = index();
        let store = Store::open(&path).unwrap();
        let error = store.put_board(&peer(1), &[0; BOARD_ENTRY_BYTES_MAX + 1]).unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
        pretend(&store, |open| open.board.count = BOARD_ENTRIES_MAX - 1);
        store.put_board(&peer(1), b"last").unwrap();
        store.put_board(&peer(1), b"changed").unwrap();
        let error = store.put_board(&peer(2), b"one too many").unwrap_err();
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
        pretend(&store, |open| open.history.count = HISTORY_LINES_MAX - 1);
        store.append_history(b"first").unwrap();
        store.append_history(b"second").unwrap();
        assert_eq!(store.history(9).unwrap(), [b"second".to_vec()]);
    }

    #[test]
    fn an_entry_that_cannot_be_read_is_dropped() {
        let (_directory, path) = index();
        let store = Store::open(&path).unwrap();
        store.put_peer(&peer(1), &entry(1000, 5)).unwrap();
        store.with(|open| open.peers.put(b"short key", b"?")).unwrap();
        store.with(|open| open.peers.put(&peer(2).0.0, b"?")).unwrap();
        assert_eq!(store.peers().unwrap().len(), 1);
        assert_eq!(store.with(|open| Ok(open.peers.count)).unwrap(), 1);
    }
}
