//! Files and logs of jobs on this node: which there are, and who may have which blob.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use anyhow::Context as _;
use p2pit_protocol::{
    BlobId, JobId, PeerId, UserId,
    bidder::WorkId,
    job::{Attempt, Rank, VerifiedSpec},
};

use super::{Shared, lock, saves::OnTheWay, work};
use crate::{
    api::types::{Copied, JobFiles, Manifest, RankFiles},
    transfer::{
        store::{self, BlobStore},
        tree::Tree,
    },
    workspace::Workspace,
};

/// Trees whose blobs are remembered, so that a transfer of many requests reads each
/// manifest once.
const TREES_MAX: usize = 64;
/// Jobs whose live files are remembered as readable.
const LIVE_JOBS_MAX: usize = 256;
/// Owners and trees remembered.
const OWNED_MAX: usize = 1024;
const MANIFEST_BYTES_MAX: usize = 128 << 20;

/// Which blobs belong to which tree, for answering whether a blob may be given.
#[derive(Debug, Default)]
pub(crate) struct Served {
    trees: Mutex<BTreeMap<BlobId, Arc<BTreeSet<BlobId>>>>,
    live: Mutex<BTreeMap<JobId, BTreeSet<BlobId>>>,
    /// Trees that were found to be somebody's.
    owned: Mutex<BTreeSet<(UserId, BlobId)>>,
    /// Copies of `keep/` of ranks that run here.
    pub(super) on_the_way: OnTheWay,
}

impl Served {
    /// The blobs of a tree, its manifest among them.
    pub(crate) fn blobs_of(
        &self,
        store: &BlobStore,
        root: BlobId,
    ) -> anyhow::Result<Arc<BTreeSet<BlobId>>> {
        if let Some(known) = lock(&self.trees).get(&root) {
            return Ok(Arc::clone(known));
        }
        let manifest = match store.read(&root, MANIFEST_BYTES_MAX) {
            // Removed, it is missed, and brought again.
            Err(store::Error::Corrupt(_)) => {
                return Err(store
                    .check(&root)
                    .map_or_else(anyhow::Error::from, |()| store::Error::Corrupt(root).into()));
            }
            manifest => manifest?,
        };
        let tree = Tree::decode(&manifest).with_context(|| format!("tree {root} is damaged"))?;
        let mut blobs: BTreeSet<BlobId> = tree.blobs().into_keys().collect();
        blobs.insert(root);
        let blobs = Arc::new(blobs);
        let mut trees = lock(&self.trees);
        if trees.len() >= TREES_MAX {
            trees.clear();
        }
        trees.insert(root, Arc::clone(&blobs));
        Ok(blobs)
    }

    fn remember_live(&self, job: JobId, blobs: impl Iterator<Item = BlobId>) {
        let mut live = lock(&self.live);
        if live.len() >= LIVE_JOBS_MAX {
            live.clear();
        }
        live.entry(job).or_default().extend(blobs);
    }

    /// Nothing of a job is to be given any more.
    pub(super) fn forget(&self, job: JobId) {
        lock(&self.live).remove(&job);
    }

    fn is_live(&self, job: JobId, blob: &BlobId) -> bool {
        lock(&self.live).get(&job).is_some_and(|blobs| blobs.contains(blob))
    }
}

/// The trees of the newest attempt's ranks on this node: as kept where a rank is over, as
/// they are now where it runs.
pub(crate) async fn live_trees(shared: &Arc<Shared>, job: JobId) -> anyhow::Result<JobFiles> {
    let (store, job_dir) = (shared.store.clone(), shared.job_dir(job));
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || {
        let mut ranks = Vec::new();
        for (attempt, rank) in newest_ranks(&job_dir)? {
            let id = WorkId { job, attempt, rank };
            let workspace = shared.workspace(id);
            let (keep, artifacts) = trees_of(&shared, &workspace, &store, job)?;
            let (rank, attempt) = (rank.0, attempt.0);
            ranks.push(RankFiles { rank, attempt, copy: None, keep, artifacts });
        }
        let continued = continued(&store, &work::read_spec(&job_dir)?);
        Ok(JobFiles { node: shared.id(), ranks, continued })
    })
    .await?
}

fn continued(store: &BlobStore, spec: &VerifiedSpec) -> Option<Manifest> {
    let root = spec.spec.continues.as_ref().map(|it| it.keep)?;
    // What went bad or was removed is not missed: ranks that differ stand apart.
    if store.has(&root) { store.read(&root, MANIFEST_BYTES_MAX).ok().map(Manifest) } else { None }
}

/// Of each rank that ran elsewhere, the newest that this node has a copy of.
pub(crate) async fn copied_trees(shared: &Arc<Shared>, job: JobId) -> anyhow::Result<JobFiles> {
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || {
        let (shelf, store) = (shared.copies.shelf(), &shared.store);
        let manifest = |root: Option<BlobId>| {
            root.map(|root| anyhow::Ok(Manifest(store.read(&root, MANIFEST_BYTES_MAX)?)))
                .transpose()
        };
        let mut newest = BTreeMap::new();
        for (attempt, rank) in shelf.ranks(job)? {
            let held = shelf.held(WorkId { job, attempt, rank });
            let (copy, keep, artifacts) = match (held.end, held.save) {
                (Some(end), _) => (Copied::End, end.keep, end.artifacts),
                (None, Some(save)) => (Copied::Save(save.seq), Some(save.tree), None),
                (None, None) => continue,
            };
            let (keep, artifacts) = (manifest(keep)?, manifest(artifacts)?);
            let (rank, attempt) = (rank.0, attempt.0);
            newest.insert(rank, RankFiles { rank, attempt, copy: Some(copy), keep, artifacts });
        }
        let continued = continued(store, &shelf.spec(job)?);
        Ok(JobFiles { node: shared.id(), ranks: newest.into_values().collect(), continued })
    })
    .await?
}

/// Whether a blob belongs to what the ranks of `job` left, or have now, on this node. Of a keeper
/// of the job that asks for it, for what it copies, it is remembered what that is.
pub(crate) fn is_of_job(
    shared: &Shared,
    job: JobId,
    keeper: Option<PeerId>,
    blob: &BlobId,
) -> anyhow::Result<bool> {
    // What has gone is given by others.
    let has = |root: BlobId| {
        Ok(shared.store.has(&root) && shared.served.blobs_of(&shared.store, root)?.contains(blob))
    };
    if shared.served.on_the_way.give(job, keeper, Instant::now(), has)?
        || shared.served.is_live(job, blob)
    {
        return Ok(true);
    }
    let mut roots = BTreeSet::new();
    for (attempt, rank) in ranks(&shared.job_dir(job))? {
        let workspace = shared.workspace(WorkId { job, attempt, rank });
        let left = workspace.collected().unwrap_or_default();
        roots.extend([left.keep, left.artifacts].into_iter().flatten());
        roots.extend(workspace.saved().map(|save| save.tree));
    }
    let shelf = shared.copies.shelf();
    for (attempt, rank) in shelf.ranks(job)? {
        roots.extend(shelf.held(WorkId { job, attempt, rank }).trees());
    }
    for root in roots {
        if has(root)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a job of this owner that ran here had this tree as input.
pub(crate) fn is_of_owner(shared: &Shared, owner: UserId, root: BlobId) -> anyhow::Result<bool> {
    if lock(&shared.served.owned).contains(&(owner, root)) {
        return Ok(true);
    }
    let jobs = shared.home.jobs();
    let listed = std::fs::read_dir(&jobs);
    for entry in listed.with_context(|| format!("cannot list {}", jobs.display()))? {
        // A directory without a spec is of a rank that never was prepared.
        let Ok(spec) = work::read_spec(&entry?.path()) else { continue };
        if spec.spec.owner == owner && spec.inputs().any(|input| input == root) {
            let mut owned = lock(&shared.served.owned);
            if owned.len() >= OWNED_MAX {
                owned.clear();
            }
            owned.insert((owner, root));
            return Ok(true);
        }
    }
    Ok(false)
}

fn trees_of(
    shared: &Shared,
    workspace: &Workspace,
    store: &BlobStore,
    job: JobId,
) -> anyhow::Result<(Option<Manifest>, Option<Manifest>)> {
    let manifest = |root: Option<BlobId>| {
        root.map(|root| anyhow::Ok(Manifest(store.read(&root, MANIFEST_BYTES_MAX)?))).transpose()
    };
    if let Some(result) = workspace.collected() {
        return Ok((manifest(result.keep)?, manifest(result.artifacts)?));
    }
    let live = workspace.live_files(store, &work::read_spec(&shared.job_dir(job))?)?;
    for root in [live.keep, live.artifacts].into_iter().flatten() {
        let blobs = shared.served.blobs_of(store, root)?;
        shared.served.remember_live(job, blobs.iter().copied());
    }
    Ok((manifest(live.keep)?, manifest(live.artifacts)?))
}

fn newest_ranks(job_dir: &Path) -> anyhow::Result<Vec<(Attempt, Rank)>> {
    let ranks = ranks(job_dir)?;
    let newest = ranks.iter().map(|(attempt, _)| *attempt).max();
    Ok(ranks.into_iter().filter(|(attempt, _)| Some(*attempt) == newest).collect())
}

/// Those that have a directory on this node.
fn ranks(job_dir: &Path) -> anyhow::Result<Vec<(Attempt, Rank)>> {
    match work::rank_dirs(job_dir) {
        Ok(dirs) => Ok(dirs.into_iter().map(|(attempt, rank, _)| (attempt, rank)).collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("cannot list {}", job_dir.display())),
    }
}
