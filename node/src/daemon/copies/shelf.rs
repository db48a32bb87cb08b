//! Copies of what ranks on other nodes wrote and left, on this node's disk.
//!
//! ```text
//! <home>/copies/JOB/
//!     spec                   the job
//!     ATTEMPT-RANK/
//!         log                the beginning of the rank's log, as far as it is here
//!         save.json          a copy of keep/ as it was while the rank ran
//!         end.json           what it left when it ended
//! ```
//!
//! The two lists are written only once all that they name is here and survives a loss of
//! power; blobs are in the store. All calls block.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use p2pit_protocol::{
    BlobId, JobId, PeerId,
    bidder::WorkId,
    job::{Attempt, Rank, VerifiedSpec},
    wire,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    daemon::{
        lock,
        work::{SPEC_FILE, rank_dirs, read_spec},
    },
    executor::log::open_to_append,
    home::write_atomic,
    workspace::LOG_NAME,
};

const SAVE: &str = "save.json";
const END: &str = "end.json";

/// A complete copy of what a rank left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EndCopy {
    /// Where it ran.
    pub(crate) node: PeerId,
    /// The length of its log when its end was reported.
    pub(crate) log_bytes: u64,
    pub(crate) keep: Option<BlobId>,
    pub(crate) artifacts: Option<BlobId>,
}

/// A complete copy of what a rank kept at one moment while it ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SaveCopy {
    /// Where it runs, or ran.
    pub(crate) node: PeerId,
    pub(crate) seq: u64,
    pub(crate) tree: BlobId,
}

/// What is here of one rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) log_bytes: u64,
    pub(crate) save: Option<SaveCopy>,
    pub(crate) end: Option<EndCopy>,
}

impl Held {
    /// The trees that this reaches.
    pub(crate) fn trees(&self) -> impl Iterator<Item = BlobId> + '_ {
        let ends = self.end.iter().flat_map(|end| end.keep.into_iter().chain(end.artifacts));
        ends.chain(self.save.iter().map(|save| save.tree))
    }
}

/// Ranks remembered whose directories are safe from a loss of power.
const SETTLED_MAX: usize = 4_096;

/// The directory of all copies. Clones share what they remember.
#[derive(Debug, Clone)]
pub(crate) struct Shelf {
    root: PathBuf,
    settled: Arc<Mutex<BTreeSet<WorkId>>>,
}

impl Shelf {
    /// Nothing is made yet.
    pub(crate) fn at(root: PathBuf) -> Self {
        Self { root, settled: Arc::default() }
    }

    pub(crate) fn job_dir(&self, job: JobId) -> PathBuf {
        self.root.join(job.to_string())
    }

    fn rank_dir(&self, id: WorkId) -> PathBuf {
        self.job_dir(id.job).join(format!("{}-{}", id.attempt, id.rank))
    }

    pub(crate) fn log_path(&self, id: WorkId) -> PathBuf {
        self.rank_dir(id).join(LOG_NAME)
    }

    /// The jobs of which there is anything.
    pub(crate) fn jobs(&self) -> io::Result<Vec<JobId>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut jobs = Vec::new();
        for entry in entries {
            jobs.extend(entry?.file_name().to_str().and_then(|name| name.parse::<JobId>().ok()));
        }
        jobs.sort_unstable();
        Ok(jobs)
    }

    /// The ranks of a job of which there is anything, in order.
    pub(crate) fn ranks(&self, job: JobId) -> io::Result<Vec<(Attempt, Rank)>> {
        match rank_dirs(&self.job_dir(job)) {
            Ok(dirs) => Ok(dirs.into_iter().map(|(attempt, rank, _)| (attempt, rank)).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn spec(&self, job: JobId) -> anyhow::Result<VerifiedSpec> {
        read_spec(&self.job_dir(job))
    }

    /// Makes the directory of a rank, and writes the job's spec where it is not there yet. What
    /// a loss of power takes of that is made again.
    pub(crate) fn make(&self, id: WorkId, spec: &VerifiedSpec) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.rank_dir(id))?;
        let path = self.job_dir(id.job).join(SPEC_FILE);
        let bytes = wire::encode(&spec.signed);
        if fs::metadata(&path).is_ok_and(|known| known.len() == bytes.len() as u64) {
            return Ok(());
        }
        let mut file = tempfile::NamedTempFile::new_in(self.job_dir(id.job))?;
        file.write_all(&bytes)?;
        file.persist(&path)?;
        Ok(())
    }

    /// Makes what [`Self::make`] made survive a loss of power.
    fn settle(&self, id: WorkId) -> io::Result<()> {
        if lock(&self.settled).contains(&id) {
            return Ok(());
        }
        let job_dir = self.job_dir(id.job);
        for path in [&job_dir.join(SPEC_FILE), &job_dir, &self.root] {
            File::open(path)?.sync_all()?;
        }
        let mut settled = lock(&self.settled);
        if settled.len() >= SETTLED_MAX {
            settled.clear();
        }
        settled.insert(id);
        Ok(())
    }

    /// What is here of a rank; nothing where a list cannot be read, since its copy is made
    /// anew then.
    pub(crate) fn held(&self, id: WorkId) -> Held {
        let dir = self.rank_dir(id);
        let log_bytes = fs::metadata(dir.join(LOG_NAME)).map_or(0, |log| log.len());
        Held { log_bytes, save: read(&dir.join(SAVE)), end: read(&dir.join(END)) }
    }

    pub(crate) fn write_save(&self, id: WorkId, save: &SaveCopy) -> io::Result<()> {
        self.settle(id)?;
        write(&self.rank_dir(id).join(SAVE), save)
    }

    pub(crate) fn write_end(&self, id: WorkId, end: &EndCopy) -> io::Result<()> {
        self.settle(id)?;
        write(&self.rank_dir(id).join(END), end)
    }

    /// What was taken for complete is not: it is made anew.
    pub(crate) fn forget_end(&self, id: WorkId) -> io::Result<()> {
        remove_file(&self.rank_dir(id).join(END))
    }

    /// As [`Self::forget_end`].
    pub(crate) fn forget_save(&self, id: WorkId) -> io::Result<()> {
        remove_file(&self.rank_dir(id).join(SAVE))
    }

    /// The copy of a rank's log, to be added to.
    pub(crate) fn log(&self, id: WorkId) -> io::Result<LogCopy> {
        LogCopy::open(&self.log_path(id))
    }
}

/// The beginning of a rank's log, which is added to.
#[derive(Debug)]
pub(crate) struct LogCopy {
    file: File,
    bytes: u64,
    is_synced: bool,
}

impl LogCopy {
    fn open(path: &Path) -> io::Result<Self> {
        let (file, bytes) = open_to_append(path)?;
        // What an earlier daemon wrote last may not be on the disk.
        Ok(Self { file, bytes, is_synced: false })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What a full disk takes only a part of is asked for again.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(bytes);
        self.is_synced = false;
        self.bytes = self.file.metadata()?.len();
        written
    }

    /// Returns once all of it survives a loss of power.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if !self.is_synced {
            self.file.sync_all()?;
            self.is_synced = true;
        }
        Ok(())
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "cannot be read");
            }
            return None;
        }
    };
    match serde_json::from_slice(&bytes) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "is damaged: the copy is made anew");
            None
        }
    }
}

fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    write_atomic(path, &serde_json::to_vec(value)?)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::KeyPair;

    use super::*;

    fn id(attempt: u32, rank: u32) -> WorkId {
        WorkId { job: JobId([7; 32]), attempt: Attempt(attempt), rank: Rank(rank) }
    }

    #[test]
    fn what_is_held_is_read_again_and_a_damaged_list_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::at(dir.path().join("copies"));
        assert_eq!((shelf.jobs().unwrap(), shelf.ranks(id(1, 0).job).unwrap()), (vec![], vec![]));
        assert_eq!(shelf.held(id(1, 0)), Held::default());
        fs::create_dir_all(shelf.rank_dir(id(1, 0))).unwrap();
        fs::create_dir_all(shelf.rank_dir(id(2, 11))).unwrap();
        fs::write(shelf.job_dir(id(1, 0).job).join(SPEC_FILE), "of the job").unwrap();
        let node = PeerId(KeyPair::from_seed(&[1; 32]).public());
        let (keep, tree) = (BlobId([1; 32]), BlobId([2; 32]));
        let end = EndCopy { node, log_bytes: 4, keep: Some(keep), artifacts: None };
        let save = SaveCopy { node, seq: 3, tree };
        shelf.write_end(id(1, 0), &end).unwrap();
        shelf.write_save(id(1, 0), &save).unwrap();
        let mut log = shelf.log(id(1, 0)).unwrap();
        log.append(b"one\n").unwrap();
        log.sync().unwrap();

        let shelf = Shelf::at(dir.path().join("copies"));
        let held = shelf.held(id(1, 0));
        assert_eq!(held, Held { log_bytes: 4, save: Some(save), end: Some(end) });
        assert_eq!(held.trees().collect::<Vec<_>>(), [keep, tree]);
        assert_eq!(shelf.jobs().unwrap(), [id(1, 0).job]);
        let ranks = [(Attempt(1), Rank(0)), (Attempt(2), Rank(11))];
        assert_eq!(shelf.ranks(id(1, 0).job).unwrap(), ranks);

        fs::write(shelf.rank_dir(id(1, 0)).join(END), "{").unwrap();
        assert_eq!(shelf.held(id(1, 0)).end, None);
        shelf.forget_save(id(1, 0)).unwrap();
        shelf.forget_save(id(1, 0)).unwrap();
        assert_eq!(shelf.held(id(1, 0)).save, None);
    }

    #[test]
    fn a_copy_of_a_log_goes_on_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::at(dir.path().to_owned());
        fs::create_dir_all(shelf.rank_dir(id(1, 0))).unwrap();
        for (text, bytes) in [("a\n", 2), ("bc\n", 5)] {
            let mut log = shelf.log(id(1, 0)).unwrap();
            log.append(text.as_bytes()).unwrap();
            assert_eq!(log.bytes(), bytes);
        }
        assert_eq!(fs::read(shelf.log_path(id(1, 0))).unwrap(), b"a\nbc\n");
    }
}
