//! What a rank keeps, taken while it runs.

use std::{collections::BTreeSet, fs, io};

use p2pit_protocol::BlobId;
use serde::{Deserialize, Serialize};

use super::{
    KEEP, Workspace,
    collect::{FilesError, list_skipped},
};
use crate::{
    home::write_atomic,
    transfer::{
        BlobStore, Tree,
        ingest::{Live, Seen, ingest_live},
        tree::MANIFEST_BYTES_MAX,
    },
};

/// What [`Workspace::save`] took last.
const SAVED: &str = "save.json";

/// `keep/` of a rank as it was at one moment while it ran, in the store and safe from a loss
/// of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Save {
    /// Counts those of the rank in this attempt, from 1.
    pub seq: u64,
    pub tree: BlobId,
    /// Milliseconds since the Unix epoch, by this node's clock.
    pub at_ms: u64,
}

/// What came of a try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Saving {
    /// With what no copy can have, in words.
    New(Save, Option<String>),
    /// It is as it was the last time, or there has never been anything in it.
    Unchanged,
    /// This in it changes all the time.
    Changing(String),
    /// This in it cannot be read, for this reason. It may be the next time: a copy without it
    /// would take the place of one that has it.
    Unreadable(String),
}

impl Workspace {
    /// The last save that was taken of `keep/`, also after its directories are removed.
    #[must_use]
    pub fn saved(&self) -> Option<Save> {
        // Missing or damaged, the next is taken as if it were the first.
        serde_json::from_slice(&fs::read(self.dir.join(SAVED)).ok()?).ok()
    }

    /// Takes `keep/` as it is now into the store, at `now_ms`, unless it is as it was the last
    /// time. `seen` is that of the last call. Blocks.
    pub fn save(
        &self,
        store: &BlobStore,
        seen: &mut Seen,
        now_ms: u64,
    ) -> Result<Saving, FilesError> {
        let io = |source| FilesError::Io { path: KEEP.to_owned(), source };
        let dir = self.dir.join(KEEP);
        match dir.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(FilesError::NotADirectory(KEEP.to_owned())),
            // The rank is over.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Saving::Unchanged),
            Err(error) => return Err(io(error)),
        }
        let taken = match ingest_live(store, &dir, &self.ingest_options(&dir)?, seen)? {
            Live::Taken(taken) => taken,
            Live::Changing(path) => return Ok(Saving::Changing(path.display().to_string())),
            Live::Unreadable(skipped) => {
                let what = list_skipped(&[skipped]).unwrap_or_default();
                return Ok(Saving::Unreadable(what));
            }
        };
        let before = self.saved();
        let is_same = before.is_some_and(|before| before.tree == taken.root);
        if is_same || before.is_none() && taken.tree.is_empty() {
            return Ok(Saving::Unchanged);
        }
        let mut new: BTreeSet<BlobId> = taken.tree.blobs().into_keys().collect();
        new.insert(taken.root);
        if let Some(before) = &before {
            // What it had is safe already. Where that cannot be read, all is made so again.
            let manifest = store.read(&before.tree, MANIFEST_BYTES_MAX).ok();
            let tree = manifest.and_then(|manifest| Tree::decode(&manifest).ok());
            for blob in tree.iter().flat_map(|tree| tree.blobs().into_keys()) {
                new.remove(&blob);
            }
        }
        store.persist(&new)?;
        let seq = before.map_or(0, |before| before.seq) + 1;
        let save = Save { seq, tree: taken.root, at_ms: now_ms };
        let bytes = serde_json::to_vec(&save).map_err(io::Error::other).map_err(io)?;
        write_atomic(&self.dir.join(SAVED), &bytes)
            .map_err(|source| FilesError::Io { path: SAVED.to_owned(), source })?;
        Ok(Saving::New(save, list_skipped(&taken.skipped)))
    }
}
