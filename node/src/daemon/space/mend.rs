//! Content that went bad here, brought again.
//!
//! A disk that gives something else than was written to it is found out when content is read:
//! the blob is removed then, and remembered (`blobs/damaged/`). What it is part of is not whole
//! any more, although this node told others that it is. So a copy is forgotten, which the peer
//! hears, and made anew as any other. What was left by a process that ran here is nobody's
//! order: it is brought from those who have the copies.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use p2pit_protocol::{BlobId, JobId, PeerId, bidder::WorkId, job::VerifiedSpec};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::{roots::jobs_in, short};
use crate::{
    daemon::{
        Shared,
        copies::{self, Held, Shelf},
        push,
        serve::Request,
        work,
    },
    home::Home,
    transfer::{BlobStore, store},
    workspace::Workspace,
};

/// Between two tries, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Mender {
    /// When something was last done for a blob, and how long the next time is off from then.
    tried: BTreeMap<BlobId, (Instant, Duration)>,
    bringing: Option<JoinHandle<()>>,
}

/// What is not whole any more.
#[derive(Debug, Default)]
struct Broken {
    /// Copies, and what is still there of each.
    copies: Vec<(WorkId, Held)>,
    /// Trees that ranks left here.
    left: Vec<(JobId, BlobId)>,
}

impl Mender {
    /// To be called often: looks whether content went bad.
    pub(super) async fn look(&mut self, shared: &Arc<Shared>) -> anyhow::Result<()> {
        let store = shared.store.clone();
        let damaged = tokio::task::spawn_blocking(move || store.damaged()).await??;
        let due = due(&mut self.tried, &damaged, Instant::now());
        if due.is_empty() {
            return Ok(());
        }
        let (home, store) = (shared.home.clone(), shared.store.clone());
        let shelf = shared.copies.shelf().clone();
        let broken = tokio::task::spawn_blocking(move || find(&home, &shelf, &store, &due));
        let Broken { copies, left } = broken.await??;
        for (WorkId { job, attempt, rank }, _) in &copies {
            warn!(%job, %attempt, %rank, "what is held of it went bad: it is made anew");
        }
        if !copies.is_empty() {
            let lost = move |peer: &mut p2pit_protocol::Peer, now| {
                for (WorkId { job, attempt, rank }, _) in &copies {
                    peer.copy_lost(*job, *attempt, *rank, now);
                }
                copies::tell(peer, copies, now);
            };
            shared.act(lost).await?;
        }
        let is_busy = self.bringing.as_ref().is_some_and(|task| !task.is_finished());
        if !left.is_empty() && !is_busy {
            let shared = Arc::clone(shared);
            self.bringing = Some(tokio::spawn(async move {
                for (job, tree) in left {
                    match bring(&shared, job, tree).await {
                        Ok(()) => info!(%job, %tree, "what a rank left here is whole again"),
                        Err(reason) => {
                            let reason = format!("{reason:#}");
                            warn!(%job, %tree, reason, "what a rank left here is not whole");
                        }
                    }
                }
            }));
        }
        Ok(())
    }
}

/// Of what is `damaged`, for what something is to be done now.
fn due(
    tried: &mut BTreeMap<BlobId, (Instant, Duration)>,
    damaged: &BTreeSet<BlobId>,
    now: Instant,
) -> BTreeSet<BlobId> {
    tried.retain(|blob, _| damaged.contains(blob));
    let mut due = BTreeSet::new();
    for blob in damaged {
        let pause = match tried.get(blob) {
            None => PAUSES.0,
            Some((at, pause)) if now.duration_since(*at) >= *pause => (*pause * 2).min(PAUSES.1),
            Some(_) => continue,
        };
        tried.insert(*blob, (now, pause));
        due.insert(*blob);
    }
    due
}

/// What has any of these blobs. Copies are forgotten. Blocks.
fn find(
    home: &Home,
    shelf: &Shelf,
    store: &BlobStore,
    damaged: &BTreeSet<BlobId>,
) -> io::Result<Broken> {
    let mut broken = Broken::default();
    let is_bad = |tree: &BlobId| has_any(store, *tree, damaged);
    for job in shelf.jobs()? {
        for (attempt, rank) in shelf.ranks(job)? {
            let id = WorkId { job, attempt, rank };
            let held = shelf.held(id);
            let end = held.end.iter().flat_map(|end| end.keep.iter().chain(&end.artifacts));
            let is_end_bad = end.into_iter().any(is_bad);
            let is_save_bad = held.save.as_ref().is_some_and(|save| is_bad(&save.tree));
            if is_end_bad {
                shelf.forget_end(id)?;
            }
            if is_save_bad {
                shelf.forget_save(id)?;
            }
            if is_end_bad || is_save_bad {
                broken.copies.push((id, shelf.held(id)));
            }
        }
    }
    for job in jobs_in(&home.jobs())? {
        let ranks = match work::rank_dirs(&home.jobs().join(job.to_string())) {
            Ok(ranks) => ranks,
            // It was given up meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for (attempt, rank, _) in ranks {
            let workspace = Workspace::at(&home.jobs(), WorkId { job, attempt, rank });
            let left = workspace.collected().unwrap_or_default();
            let trees = left.keep.into_iter().chain(left.artifacts);
            broken.left.extend(trees.filter(is_bad).map(|tree| (job, tree)));
        }
    }
    Ok(broken)
}

/// Whether a tree has any of these blobs, or went bad itself. Of one that is not here nothing is
/// known. Blocks.
fn has_any(store: &BlobStore, root: BlobId, damaged: &BTreeSet<BlobId>) -> bool {
    damaged.contains(&root)
        || push::blobs_of(store, root)
            .is_ok_and(|blobs| blobs.iter().any(|(blob, _)| damaged.contains(blob)))
}

/// Has a tree that a rank left here whole again, from who has copies of it.
async fn bring(shared: &Arc<Shared>, job: JobId, tree: BlobId) -> anyhow::Result<()> {
    let dir = shared.job_dir(job);
    let spec: VerifiedSpec = tokio::task::spawn_blocking(move || work::read_spec(&dir)).await??;
    let own = spec.spec.keepers.clone();
    let (links, keepers) = shared
        .act(move |peer, _| {
            let kept = peer.record(job);
            let links = kept.map(|kept| kept.certificate.links.clone()).unwrap_or_default();
            let heads = peer.heads().filter(|head| head.job == job);
            let announced = heads.flat_map(super::super::keepers_of);
            let recorded = kept.into_iter().flat_map(|kept| &kept.keepers);
            let all = recorded.chain(&own).map(|(keeper, _)| *keeper);
            (links, announced.chain(all).collect::<Vec<PeerId>>())
        })
        .await?;
    let request = Request::Copies { spec: spec.signed.clone(), links };
    let dir = shared.job_dir(job);
    let is_wanted = || std::future::ready(dir.is_dir());
    shared
        .bring_tree(&request, (keepers, false), tree, |_| {}, is_wanted)
        .await
        .map_err(|reason| anyhow::Error::from(reason).context(short(job)))?;
    let store = shared.store.clone();
    tokio::task::spawn_blocking(move || {
        let mut blobs: BTreeSet<BlobId> =
            push::blobs_of(&store, tree)?.into_iter().map(|(blob, _)| blob).collect();
        blobs.insert(tree);
        Ok(store.persist(&blobs)?)
    })
    .await?
}

/// Reads these lists of files, so that those that went bad are removed, and brought again. Blocks.
pub(super) fn check(store: &BlobStore, roots: impl IntoIterator<Item = BlobId>) {
    for root in roots {
        match store.check(&root) {
            Ok(()) | Err(store::Error::Corrupt(_) | store::Error::Missing(_)) => {}
            Err(reason) => warn!(%root, %reason, "a list of files cannot be read"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use p2pit_protocol::{
        identity::KeyPair,
        job::{Attempt, Rank},
    };

    use super::*;
    use crate::{
        daemon::copies::{EndCopy, SaveCopy},
        transfer::{
            Tree, TreePath,
            store::Reach,
            tree::{Entry, Kind},
        },
    };

    struct Fixture {
        _dir: tempfile::TempDir,
        home: Home,
        shelf: Shelf,
        store: BlobStore,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let home = Home::open_or_create(&dir.path().join("home")).unwrap();
            let store = BlobStore::open(&home.blobs()).unwrap();
            let shelf = Shelf::at(home.copies());
            Self { _dir: dir, home, shelf, store }
        }

        /// A tree of one file, and that file.
        fn tree(&self, content: &str) -> (BlobId, BlobId) {
            let blob = self.store.put_bytes(content.as_bytes()).unwrap();
            let kind = Kind::File { blob, size: content.len() as u64, executable: false };
            let path = TreePath::from_bytes("file").unwrap();
            let tree = Tree::new(vec![Entry { path, kind }]).unwrap();
            (self.store.put_bytes(&tree.encode().unwrap()).unwrap(), blob)
        }

        /// A copy of a rank that ended, and of a save of it.
        fn copy(&self, id: WorkId, keep: BlobId, saved: BlobId) {
            let rank_dir = self.shelf.log_path(id).parent().unwrap().to_owned();
            fs::create_dir_all(rank_dir).unwrap();
            fs::write(self.shelf.job_dir(id.job).join("spec"), "of the job").unwrap();
            let node = PeerId(KeyPair::from_seed(&[1; 32]).public());
            let end = EndCopy { node, log_bytes: 0, keep: Some(keep), artifacts: None };
            self.shelf.write_end(id, &end).unwrap();
            self.shelf.write_save(id, &SaveCopy { node, seq: 1, tree: saved }).unwrap();
        }

        fn find(&self) -> Broken {
            let damaged = self.store.damaged().unwrap();
            find(&self.home, &self.shelf, &self.store, &damaged).unwrap()
        }
    }

    fn id(n: u8) -> WorkId {
        WorkId { job: JobId([n; 32]), attempt: Attempt(1), rank: Rank(0) }
    }

    #[test]
    fn a_copy_whose_content_went_bad_is_forgotten_and_no_other() {
        let fixture = Fixture::new();
        let [(keep, kept), (saved, _), (other, _)] =
            ["kept", "saved", "other"].map(|content| fixture.tree(content));
        fixture.copy(id(1), keep, saved);
        fixture.copy(id(2), other, saved);
        let broken = fixture.find();
        assert!(broken.copies.is_empty(), "{broken:?}");
        fs::write(fixture.store.path_of(&kept), "bad!").unwrap();
        assert!(fixture.store.check(&kept).is_err());
        let broken = fixture.find();
        let [(found, held)] = &broken.copies[..] else { panic!("{broken:?}") };
        assert_eq!(*found, id(1));
        assert!(held.end.is_none() && held.save.is_some(), "{held:?}");
        assert_eq!(fixture.shelf.held(id(1)), *held);
        assert!(fixture.shelf.held(id(2)).end.is_some());
        // It was brought again.
        fixture.tree("kept");
        assert!(fixture.store.damaged().unwrap().is_empty());
    }

    #[test]
    fn a_list_of_files_that_a_sweep_cannot_read_has_its_copies_made_anew() {
        let fixture = Fixture::new();
        let ((keep, _), (saved, _)) = (fixture.tree("kept"), fixture.tree("saved"));
        fixture.copy(id(1), keep, saved);
        for tree in [keep, saved] {
            fs::write(fixture.store.path_of(&tree), "bad").unwrap();
        }
        assert!(fixture.find().copies.is_empty(), "nobody has looked");
        let mut reach = Reach::begin(&fixture.store);
        reach.add_tree(keep);
        reach.add_tree(saved);
        check(&fixture.store, reach.unreadable().iter().map(|(tree, _)| *tree));
        let broken = fixture.find();
        let [(found, held)] = &broken.copies[..] else { panic!("{broken:?}") };
        assert_eq!((*found, held), (id(1), &Held::default()));
    }

    #[test]
    fn what_a_rank_left_here_and_went_bad_is_to_be_brought() {
        let fixture = Fixture::new();
        let ((keep, _), (artifacts, made)) = (fixture.tree("kept"), fixture.tree("made"));
        let rank = fixture.home.jobs().join(id(1).job.to_string()).join("1-0");
        fs::create_dir_all(&rank).unwrap();
        let list =
            format!(r#"{{"keep":"{keep}","artifacts":"{artifacts}","result":null,"note":null}}"#);
        fs::write(rank.join("collected.json"), list).unwrap();
        assert!(fixture.find().left.is_empty());
        fixture.store.remove(&made).unwrap();
        assert_eq!(fixture.find().left, [(id(1).job, artifacts)]);
    }

    #[test]
    fn what_cannot_be_mended_is_tried_again_and_more_seldom() {
        let (start, one) = (Instant::now(), BlobId([1; 32]));
        let mut tried = BTreeMap::new();
        let mut at = |s, damaged: &[BlobId]| {
            let damaged = damaged.iter().copied().collect();
            !due(&mut tried, &damaged, start + Duration::from_secs(s)).is_empty()
        };
        assert!(at(0, &[one]) && !at(59, &[one]) && at(60, &[one]) && !at(179, &[one]));
        assert!(at(180, &[one]));
        assert!(!at(181, &[]) && at(182, &[one]), "it went bad again");
    }
}
