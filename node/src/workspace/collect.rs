//! Taking in what a rank leaves.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
};

use p2pit_protocol::{BlobId, job::VerifiedSpec};
use rustix::fs::{FileType, Mode, OFlags, fstat, statvfs};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{ARTIFACTS, KEEP, SRC, Speaker, Workspace};
use crate::{
    executor::shortened,
    home::write_atomic,
    transfer::{
        BlobStore, IngestOptions, Tree, TreePath, ingest,
        ingest::{self as taking_in, Ingested, Skipped},
        store,
        tree::{self, Entry, Kind},
    },
};

/// As much of the result file as goes into the record.
const RESULT_BYTES_MAX: usize = 4 << 10;
/// A note goes into the record of the job, with those of all other ranks.
const NOTE_BYTES_MAX: usize = 1 << 10;
/// What is kept may be this much although the disk is smaller: a minute or two of hashing.
const HOLES_BYTES_MAX: u64 = 128 << 30;
/// Of what is not kept, as much is named one by one.
const NAMED_MAX: usize = 5;
const COLLECTED: &str = "collected.json";
/// What could not be kept is set aside under its name with this end, so that the only copy
/// is not removed.
const ASIDE: &str = "unsaved";

/// What a rank left. Trees are in the store, safe from a loss of power.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// `keep/`, if there is anything in it.
    pub keep: Option<BlobId>,
    /// The artifact paths below `src/` and what is in `artifacts/`, as one tree.
    pub artifacts: Option<BlobId>,
    /// The first 4 KiB of the result file.
    pub result: Option<String>,
    /// What could not be kept, and why.
    pub note: Option<String>,
}

/// What a rank has so far. The trees are in the store, which need not keep them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LiveFiles {
    pub keep: Option<BlobId>,
    pub artifacts: Option<BlobId>,
}

/// Why files of a rank could not be taken in.
#[derive(Debug, Error)]
pub enum FilesError {
    #[error(transparent)]
    Read(#[from] taking_in::Error),
    #[error("`{0}` is not a directory")]
    NotADirectory(String),
    #[error("the artifacts make no tree")]
    Tree(#[from] tree::Error),
    #[error("cannot keep the files")]
    Store(#[from] store::Error),
    #[error("cannot look into `{path}`")]
    Io { path: String, source: io::Error },
}

/// A tree and the notes about what is missing in it.
struct Taken {
    root: BlobId,
    tree: Tree,
    notes: Vec<String>,
}

impl Workspace {
    /// Takes in what the rank left, once nothing of it runs. Again gives the same.
    pub fn collect(&self, store: &BlobStore, spec: &VerifiedSpec) -> Collected {
        if let Some(before) = self.collected() {
            return before;
        }
        let mut notes = self.take_back();
        let keep = self.settle(self.kept(store), store, &[KEEP], &mut notes);
        let artifacts = self.artifacts(store, spec);
        let artifacts = self.settle(artifacts, store, &[SRC, ARTIFACTS], &mut notes);
        let result = self.result().unwrap_or_else(|error| {
            notes.push(format!("the result file cannot be read: {error}"));
            None
        });
        let mut collected = Collected { keep, artifacts, result, note: joined(notes) };
        if collected == Collected::default() {
            return collected;
        }
        let memory = self.dir.join(COLLECTED);
        let bytes = serde_json::to_vec(&collected).map_err(io::Error::other);
        if let Err(error) = bytes.and_then(|bytes| write_atomic(&memory, &bytes)) {
            let note = format!("cannot write {}: {error}", memory.display());
            collected.note = joined(collected.note.into_iter().chain([note]).collect());
        }
        if let Some(note) = &collected.note {
            self.say_if_possible(Speaker::Clean, note);
        }
        collected
    }

    /// What [`Self::collect`] gave, after the directories are removed too; `None` where that
    /// was nothing at all.
    #[must_use]
    pub fn collected(&self) -> Option<Collected> {
        // Missing or damaged, it is as if there had been none: another try does no harm.
        serde_json::from_slice(&fs::read(self.dir.join(COLLECTED)).ok()?).ok()
    }

    /// What the rank has now, while it may be writing.
    pub fn live_files(
        &self,
        store: &BlobStore,
        spec: &VerifiedSpec,
    ) -> Result<LiveFiles, FilesError> {
        let root =
            |taken: Option<Taken>| taken.and_then(|t| (!t.tree.is_empty()).then_some(t.root));
        Ok(LiveFiles {
            keep: root(self.kept(store)?),
            artifacts: root(self.artifacts(store, spec)?),
        })
    }

    fn kept(&self, store: &BlobStore) -> Result<Option<Taken>, FilesError> {
        let taken = self.take(store, KEEP, Vec::new())?;
        Ok(taken.map(|taken| taken.described(KEEP)).filter(Taken::has_anything))
    }

    fn artifacts(
        &self,
        store: &BlobStore,
        spec: &VerifiedSpec,
    ) -> Result<Option<Taken>, FilesError> {
        let mut notes = Vec::new();
        let mut paths = Vec::new();
        for path in &spec.spec.artifacts {
            match TreePath::from_path(Path::new(path)) {
                Ok(path) => paths.push(path),
                Err(error) => notes.push(format!("artifacts: {error}")),
            }
        }
        let named = if paths.is_empty() { None } else { self.take(store, SRC, paths)? };
        let named = named.map(|taken| taken.described("artifacts"));
        let beside = self.take(store, ARTIFACTS, Vec::new())?;
        let beside = beside.map(|taken| taken.described(ARTIFACTS));
        let mut taken = match (named, beside) {
            (Some(named), Some(beside)) if !beside.tree.is_empty() => merge(store, named, beside)?,
            (Some(named), _) => named,
            (None, Some(beside)) => beside,
            (None, None) => return Ok(None),
        };
        taken.notes.splice(0..0, notes);
        Ok(Some(taken).filter(Taken::has_anything))
    }

    /// What is below one of the rank's directories; `None` where there is no such directory.
    fn take(
        &self,
        store: &BlobStore,
        name: &str,
        paths: Vec<TreePath>,
    ) -> Result<Option<Ingested>, FilesError> {
        let dir = self.dir.join(name);
        let io = |source| FilesError::Io { path: name.to_owned(), source };
        match dir.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(FilesError::NotADirectory(name.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        }
        let options = IngestOptions { paths, ..self.ingest_options(&dir)? };
        Ok(Some(ingest(store, &dir, &options)?))
    }

    /// For everything in one of the rank's directories.
    pub(super) fn ingest_options(&self, dir: &Path) -> Result<IngestOptions, FilesError> {
        // Files with holes can claim any size, and reading holes takes time, too.
        let disk = statvfs(dir).map_err(|errno| FilesError::Io {
            path: dir.display().to_string(),
            source: errno.into(),
        })?;
        let bytes_max = disk.f_blocks.saturating_mul(disk.f_frsize).max(HOLES_BYTES_MAX);
        Ok(IngestOptions { owner: Some(self.uid()), bytes_max, ..IngestOptions::default() })
    }

    /// Makes a tree durable. Where it cannot be, the directories it is from are set aside.
    fn settle(
        &self,
        taken: Result<Option<Taken>, FilesError>,
        store: &BlobStore,
        dirs: &[&str],
        notes: &mut Vec<String>,
    ) -> Option<BlobId> {
        let durable = taken.and_then(|taken| {
            let Some(taken) = taken else { return Ok(None) };
            let blobs = taken.tree.blobs();
            store.persist(blobs.keys().chain([&taken.root]))?;
            Ok(Some(taken))
        });
        match durable {
            Ok(None) => None,
            Ok(Some(taken)) => {
                notes.extend(taken.notes);
                (!taken.tree.is_empty()).then_some(taken.root)
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                let names = dirs.join(" and ");
                let stays = self.set_aside(dirs);
                notes.push(format!("{names} could not be kept: {error:#}; {stays}"));
                None
            }
        }
    }

    /// Says what became of them.
    fn set_aside(&self, dirs: &[&str]) -> String {
        for name in dirs {
            let (from, to) = (self.dir.join(name), self.dir.join(format!("{name}.{ASIDE}")));
            match fs::rename(&from, &to) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return format!("{name} could not be set aside either: {error}"),
            }
        }
        format!("on this node they stay, in {}, with the ending `.{ASIDE}`", self.dir.display())
    }

    /// For another try after a crash in between. Says what could not be.
    fn take_back(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for name in [KEEP, SRC, ARTIFACTS] {
            let (to, from) = (self.dir.join(name), self.dir.join(format!("{name}.{ASIDE}")));
            let is_aside = from.symlink_metadata().is_ok() && to.symlink_metadata().is_err();
            if is_aside && let Err(error) = fs::rename(&from, &to) {
                notes.push(format!("{name} stays in {}: {error}", from.display()));
            }
        }
        notes
    }

    fn result(&self) -> io::Result<Option<String>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: OwnedFd = match rustix::fs::open(self.result_path(), flags, Mode::empty()) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let state = fstat(&file)?;
        if !FileType::from_raw_mode(state.st_mode).is_file() || state.st_uid != self.uid() {
            return Err(io::Error::other("it is not a file of the job"));
        }
        let mut bytes = Vec::new();
        File::from(file).take(RESULT_BYTES_MAX as u64).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        // A byte that is no text becomes three that are.
        Ok(Some(shortened(text, RESULT_BYTES_MAX)).filter(|text| !text.is_empty()))
    }
}

impl Taken {
    fn has_anything(&self) -> bool {
        !self.tree.is_empty() || !self.notes.is_empty()
    }
}

trait Described {
    fn described(self, name: &str) -> Taken;
}

impl Described for Ingested {
    fn described(self, name: &str) -> Taken {
        let notes = list_skipped(&self.skipped).map(|list| format!("not kept of {name}: {list}"));
        let notes = notes.into_iter().collect();
        Taken { root: self.root, tree: self.tree, notes }
    }
}

/// What is in `artifacts/` was put there to be kept, so it wins.
fn merge(store: &BlobStore, named: Taken, beside: Taken) -> Result<Taken, FilesError> {
    let mut notes = named.notes;
    notes.extend(beside.notes);
    let (out, stay): (Vec<&Entry>, Vec<&Entry>) =
        named.tree.entries().iter().partition(|entry| is_in_the_way(entry, &beside.tree));
    if let Some(first) = out.first() {
        let (count, path) = (out.len(), &first.path);
        notes.push(format!("{count} artifacts, such as `{path}`, give way to those in artifacts/"));
    }
    let entries = stay.into_iter().chain(beside.tree.entries()).cloned().collect();
    let tree = Tree::new(entries)?;
    let root = store.put_bytes(&tree.encode()?)?;
    Ok(Taken { root, tree, notes })
}

fn is_in_the_way(entry: &Entry, other: &Tree) -> bool {
    let path = entry.path.as_bytes();
    let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let inside_a_file = ends
        .filter_map(|end| TreePath::from_bytes(&path[..end]).ok())
        .any(|parent| other.get(&parent).is_some_and(|found| found.kind != Kind::Dir));
    inside_a_file || other.list(Some(&entry.path)).is_some()
}

/// What is missing, and why; nothing where nothing is.
pub(super) fn list_skipped(skipped: &[Skipped]) -> Option<String> {
    let mut named: Vec<String> = skipped
        .iter()
        .take(NAMED_MAX)
        .map(|skipped| {
            let path = skipped.path.display().to_string();
            format!("`{}` ({})", path.escape_debug(), skipped.reason)
        })
        .collect();
    if skipped.len() > NAMED_MAX {
        named.push(format!("{} more", skipped.len() - NAMED_MAX));
    }
    (!named.is_empty()).then(|| named.join(", "))
}

fn joined(notes: Vec<String>) -> Option<String> {
    (!notes.is_empty()).then(|| shortened(notes.join("; "), NOTE_BYTES_MAX))
}
