//! Hashes of files that are still what they were when they were read.
//!
//! A file is believed to be unchanged where its device, inode, size and times (`mtime` and
//! `ctime`) are those of then. That holds as long as every change leaves another `ctime`
//! behind, and here is what could make it fail:
//!
//! - **A change right after the reading** may fall into the same tick of the clock that
//!   stamps files, which is two seconds in the worst case. So a hash is remembered only if
//!   both times lay further back when the reading began (git's rule for a "racy" entry).
//! - **A clock set back** lets times come twice. The memory says which boot of the machine it
//!   is of, and how far apart wall clock and boot clock were. In another boot, or where they
//!   moved against one another, nothing of it is believed.
//! - **Files of another machine** carry that machine's clock, and their attributes may be
//!   known from a while ago. The margin is a minute there, and attributes are asked afresh.
//! - **Memory maps**: a process that writes to a file through one may leave `ctime` alone
//!   for as long as the page was not written back. As git and rsync, we cannot see that.
//!
//! A memory is one file per submitted directory, in a directory of the user's. It may be
//! lost or removed at any time, and is ignored unless its checksum holds.

use std::{
    fs::{self, DirBuilder},
    io::{self, Write as _},
    os::unix::{ffi::OsStrExt as _, fs::DirBuilderExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use p2pit_protocol::{BlobId, wire};
use rustix::{
    fs::statfs,
    time::{ClockId, Timespec, clock_gettime},
};
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::Stamp;
use crate::transfer::tree::TreePath;

/// Says what the bytes are and in which version.
const HEADER: &[u8] = b"p2pit-hashes/1\n";
const CHECKSUM_BYTES: usize = 32;
/// A directory whose hashes take more is hashed anew each time.
const FILE_BYTES_MAX: usize = 128 << 20;
/// Directories remembered, and the bytes of all; those that were not used for the longest
/// time go first.
const ROOTS_MAX: usize = 64;
const TOTAL_BYTES_MAX: u64 = 256 << 20;

const SECOND_NS: i64 = 1_000_000_000;
/// The coarsest clock that stamps files on a disk of this machine is FAT's.
const MARGIN_NS: i64 = 2 * SECOND_NS;
/// Clocks of machines that serve files are off by less, or somebody has noticed.
const REMOTE_MARGIN_NS: i64 = 60 * SECOND_NS;
/// Less than the margin, so that no time that was believed comes again; more than may pass
/// between asking two clocks.
const STEP_NS_MAX: i64 = SECOND_NS / 2;

/// What is known of one directory's files.
#[derive(Debug)]
pub(super) struct HashCache {
    path: PathBuf,
    root: PathBuf,
    now: Clock,
    /// Ascending by path.
    known: Vec<Known>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    path: TreePath,
    stamp: Stamp,
    blob: BlobId,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    clock: Clock,
    /// The directory, since two paths could have one hash.
    root: Vec<u8>,
    known: Vec<Known>,
}

/// The clocks at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Clock {
    /// Tells one boot from another.
    boot: String,
    wall_ns: i64,
    /// Since the boot, suspend included.
    boot_ns: i64,
}

impl HashCache {
    /// What is remembered in `caches` of the directory `root`, as far as it can be believed.
    /// `now` is before anything in `root` was looked at.
    pub(super) fn load(caches: &Path, root: &Path, now: Clock) -> Self {
        let name = blake3::hash(root.as_os_str().as_bytes()).to_hex();
        let path = caches.join(&name[..32]);
        let known = match read(&path) {
            Ok(stored) if stored.root != root.as_os_str().as_bytes() => Vec::new(),
            Ok(stored) if !now.continues(&stored.clock) => {
                debug!("the clock was set: hashes are not believed");
                Vec::new()
            }
            Ok(stored) => stored.known,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                debug!(path = %path.display(), %error, "hashes cannot be read");
                Vec::new()
            }
        };
        Self { path, root: root.to_owned(), now, known }
    }

    /// The hash of a file that has this stamp now.
    pub(super) fn get(&self, path: &TreePath, stamp: &Stamp) -> Option<BlobId> {
        let at = self.known.binary_search_by(|known| known.path.cmp(path)).ok()?;
        let known = &self.known[at];
        (known.stamp == *stamp).then_some(known.blob)
    }

    /// Remembers these for the next time: files of the directory with the stamps that they
    /// had while they were read, between the `now` of [`Self::load`] and `end`.
    pub(super) fn save<'a>(
        self,
        end: &Clock,
        files: impl Iterator<Item = (&'a TreePath, Stamp, BlobId)>,
    ) -> io::Result<()> {
        if !end.continues(&self.now) {
            // Which clock stamped what was read cannot be told.
            return remove(&self.path);
        }
        let local = local_device(&self.root);
        let is_settled = |stamp: &Stamp| {
            let margin = if local == Some(stamp.device) { MARGIN_NS } else { REMOTE_MARGIN_NS };
            let before = self.now.wall_ns - margin;
            nanoseconds(stamp.modified) < before && nanoseconds(stamp.changed) < before
        };
        let mut known: Vec<Known> = files
            .filter(|(_, stamp, _)| is_settled(stamp))
            .map(|(path, stamp, blob)| Known { path: path.clone(), stamp, blob })
            .collect();
        known.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        if known.is_empty() {
            return remove(&self.path);
        }
        if known == self.known
            && let Ok(file) = fs::File::options().append(true).open(&self.path)
        {
            // For the pruning, which asks when it was of use last.
            return file.set_modified(SystemTime::now());
        }
        let root = self.root.as_os_str().as_bytes().to_vec();
        write(&self.path, &Stored { clock: self.now, root, known })
    }
}

impl Clock {
    pub(super) fn now() -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let nanos = |time: Timespec| nanoseconds((time.tv_sec, time.tv_nsec));
        Ok(Self {
            boot,
            boot_ns: nanos(clock_gettime(ClockId::Boottime)),
            wall_ns: nanos(clock_gettime(ClockId::Realtime)),
        })
    }

    /// Whether the wall clock ran on without being set since `earlier`.
    fn continues(&self, earlier: &Self) -> bool {
        let wall = self.wall_ns.saturating_sub(earlier.wall_ns);
        let boot = self.boot_ns.saturating_sub(earlier.boot_ns);
        self.boot == earlier.boot && wall >= 0 && wall.abs_diff(boot) <= STEP_NS_MAX.unsigned_abs()
    }
}

fn nanoseconds((seconds, nanos): (i64, i64)) -> i64 {
    seconds.saturating_mul(SECOND_NS).saturating_add(nanos)
}

/// The device of `root` where that is a disk or the memory of this machine, whose clock is
/// ours.
fn local_device(root: &Path) -> Option<u64> {
    /// As in the kernel's `linux/magic.h`, and those of file systems outside it.
    const LOCAL: [u32; 9] = [
        0xEF53,      // ext2, ext3, ext4
        0x5846_5342, // xfs
        0x9123_683E, // btrfs
        0xF2F5_2010, // f2fs
        0xCA45_1A4E, // bcachefs
        0x2FC1_2FC1, // zfs
        0x0102_1994, // tmpfs
        0x8584_58F6, // ramfs
        0x794C_7630, // overlayfs
    ];
    // The kernel's type is wider here and narrower there; all magics have 32 bits.
    let magic = statfs(root).ok()?.f_type as u32;
    let device = rustix::fs::stat(root).ok()?.st_dev;
    LOCAL.contains(&magic).then_some(device)
}

fn read(path: &Path) -> io::Result<Stored> {
    const CHARGED_BYTES_MAX: usize = 8 * FILE_BYTES_MAX;
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let size = fs::metadata(path)?.len();
    if size > FILE_BYTES_MAX as u64 {
        return Err(invalid(format!("{size} bytes")));
    }
    let bytes = fs::read(path)?;
    let rest = bytes.strip_prefix(HEADER).ok_or_else(|| invalid("another version".to_owned()))?;
    let (checksum, body) =
        rest.split_at_checked(CHECKSUM_BYTES).ok_or_else(|| invalid("cut short".to_owned()))?;
    if blake3::hash(body).as_bytes() != checksum {
        return Err(invalid("the checksum does not hold".to_owned()));
    }
    wire::decode_limited::<Stored, CHARGED_BYTES_MAX>(body).map_err(|e| invalid(e.to_string()))
}

/// Without waiting for the disk: what a loss of power leaves fails its checksum.
fn write(path: &Path, stored: &Stored) -> io::Result<()> {
    let body = wire::encode(stored);
    if HEADER.len() + CHECKSUM_BYTES + body.len() > FILE_BYTES_MAX {
        return remove(path);
    }
    let caches = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(caches)?;
    let mut file = tempfile::Builder::new().prefix("new-").tempfile_in(caches)?;
    file.write_all(HEADER)?;
    file.write_all(blake3::hash(&body).as_bytes())?;
    file.write_all(&body)?;
    file.persist(path)?;
    prune(caches)
}

/// Removes what was not used for the longest time, as long as there is too much. What a
/// crash left half-written ages like everything else.
fn prune(caches: &Path) -> io::Result<()> {
    let mut found = Vec::new();
    for entry in fs::read_dir(caches)? {
        let entry = entry?;
        // Gone meanwhile: another command prunes as well.
        let Ok(metadata) = entry.metadata() else { continue };
        found.push((metadata.modified()?, metadata.len(), entry.path()));
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    let mut total = 0;
    for (n, (_, bytes, path)) in found.iter().enumerate() {
        total += bytes;
        // The newest is the one that was just written.
        if n > 0 && (n >= ROOTS_MAX || total > TOTAL_BYTES_MAX) {
            remove(path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
impl HashCache {
    pub(super) fn known(&self) -> Vec<(TreePath, Stamp)> {
        self.known.iter().map(|known| (known.path.clone(), known.stamp)).collect()
    }
}

#[cfg(test)]
impl Clock {
    /// Now, where the wall clock is so many seconds ahead.
    pub(super) fn shifted(seconds: i64) -> io::Result<Self> {
        let now = Self::now()?;
        Ok(Self { wall_ns: now.wall_ns + seconds * SECOND_NS, ..now })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the files in these tests, in seconds.
    const CHANGED: i64 = 1_000;

    #[test]
    fn a_hash_is_believed_only_for_the_same_stamp() {
        let fixture = Fixture::new();
        let stamp = fixture.stamp();
        fixture.save(CHANGED + 10, stamp);
        assert_eq!(fixture.get(CHANGED + 20, stamp), Some(blob()));
        for other in [
            Stamp { device: stamp.device + 1, ..stamp },
            Stamp { inode: stamp.inode + 1, ..stamp },
            Stamp { size: stamp.size + 1, ..stamp },
            Stamp { modified: (CHANGED, 1), ..stamp },
            Stamp { changed: (CHANGED, 1), ..stamp },
        ] {
            assert_eq!(fixture.get(CHANGED + 20, other), None, "{other:?}");
        }
        let other = TreePath::from_bytes("other").unwrap();
        let cache = HashCache::load(fixture.caches(), fixture.dir.path(), at(CHANGED + 20));
        assert_eq!(cache.get(&other, &stamp), None);
    }

    #[test]
    fn a_file_that_changed_just_before_or_will_change_is_not_remembered() {
        let fixture = Fixture::new();
        let stamp = fixture.stamp();
        for too_soon in [CHANGED - 1, CHANGED, CHANGED + 2] {
            fixture.save(too_soon, stamp);
            assert_eq!(fixture.get(CHANGED + 1_000, stamp), None, "{too_soon}");
        }
        let in_the_future = Stamp { modified: (CHANGED + 500, 0), ..stamp };
        fixture.save(CHANGED + 100, in_the_future);
        assert_eq!(fixture.get(CHANGED + 1_000, in_the_future), None);
    }

    #[test]
    fn clocks_of_other_machines_get_a_wider_margin() {
        let fixture = Fixture::new();
        let remote = Stamp { device: fixture.stamp().device + 1, ..fixture.stamp() };
        fixture.save(CHANGED + 59, remote);
        assert_eq!(fixture.get(CHANGED + 70, remote), None);
        fixture.save(CHANGED + 61, remote);
        assert_eq!(fixture.get(CHANGED + 70, remote), Some(blob()));
    }

    #[test]
    fn nothing_is_believed_once_the_clock_was_set() {
        let fixture = Fixture::new();
        let stamp = fixture.stamp();
        let now = at(CHANGED + 1_000);
        let step =
            |seconds: i64| Clock { wall_ns: now.wall_ns + seconds * SECOND_NS, ..now.clone() };
        fixture.save(CHANGED + 100, stamp);
        let get = |clock| {
            let cache = HashCache::load(fixture.caches(), fixture.dir.path(), clock);
            cache.get(&path(), &stamp)
        };
        assert_eq!(get(now.clone()), Some(blob()));
        for seconds in [-3_600, -1, 1, 3_600] {
            assert_eq!(get(step(seconds)), None, "{seconds}");
        }
        assert_eq!(get(Clock { boot: "another".to_owned(), ..now.clone() }), None);
        // Of one that was set while files were read, nothing is kept either.
        let cache = HashCache::load(fixture.caches(), fixture.dir.path(), now.clone());
        cache.save(&step(-10), std::iter::once((&path(), stamp, blob()))).unwrap();
        assert_eq!(get(now.clone()), None);
    }

    #[test]
    fn directories_that_were_not_used_for_the_longest_time_are_forgotten() {
        let fixture = Fixture::new();
        let caches = fixture.caches();
        fs::create_dir_all(caches).unwrap();
        for n in 0..2 * ROOTS_MAX as u64 {
            let file = fs::File::create(caches.join(format!("old-{n}"))).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(n)).unwrap();
        }
        fixture.save(CHANGED + 100, fixture.stamp());
        assert_eq!(fixture.get(CHANGED + 100, fixture.stamp()), Some(blob()));
        assert_eq!(fs::read_dir(caches).unwrap().count(), ROOTS_MAX);
        assert!(!caches.join("old-0").exists());
        assert!(caches.join(format!("old-{}", 2 * ROOTS_MAX - 1)).exists());

        let large = fs::File::create(caches.join("large")).unwrap();
        large.set_len(TOTAL_BYTES_MAX + 1).unwrap();
        large.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let newer = Stamp { inode: 2, ..fixture.stamp() };
        fixture.save(CHANGED + 100, newer);
        assert!(!caches.join("large").exists());
        assert_eq!(fixture.get(CHANGED + 100, newer), Some(blob()));
    }

    struct Fixture {
        dir: tempfile::TempDir,
        caches: PathBuf,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let caches = dir.path().join("cache/hashes");
            Self { dir, caches }
        }

        fn caches(&self) -> &Path {
            &self.caches
        }

        /// Of a file on this machine.
        fn stamp(&self) -> Stamp {
            let device = local_device(self.dir.path()).expect("tests run on a local disk");
            Stamp { device, inode: 1, size: 3, modified: (CHANGED, 0), changed: (CHANGED, 0) }
        }

        fn save(&self, wall_s: i64, stamp: Stamp) {
            let cache = HashCache::load(self.caches(), self.dir.path(), at(wall_s));
            cache.save(&at(wall_s + 1), std::iter::once((&path(), stamp, blob()))).unwrap();
        }

        fn get(&self, wall_s: i64, stamp: Stamp) -> Option<BlobId> {
            let cache = HashCache::load(self.caches(), self.dir.path(), at(wall_s));
            cache.get(&path(), &stamp)
        }
    }

    /// On a machine that booted at second 0 and whose clock nobody has set.
    fn at(wall_s: i64) -> Clock {
        let ns = wall_s * SECOND_NS;
        Clock { boot: "this".to_owned(), wall_ns: ns, boot_ns: ns }
    }

    fn path() -> TreePath {
        TreePath::from_bytes("dir/file").unwrap()
    }

    fn blob() -> BlobId {
        BlobId::of(b"content")
    }
}
