//! What a rank keeps, taken while its process runs, for keepers to copy.
//!
//! Every so often, as the job's owner said, and when the process is told to end, `keep/` is
//! taken as it is at one moment; where it is another than the last time, the peer is told, and
//! holders come and get what they lack of it. So a node that never returns costs a job no more
//! than what was written since. What a holder is still bringing is given although there are newer
//! ones ([`OnTheWay`]): else a line that needs longer than the time between two would never bring
//! any.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use p2pit_protocol::{BlobId, JobId, PeerId, bidder::WorkId};
use tokio::sync::Notify;
use tracing::warn;

use super::{Shared, clock, lock, work};
use crate::{
    transfer::{ingest::Seen, store::RELIED},
    workspace::{Save, Saving, Speaker, Workspace},
};

/// The last copies of a rank's `keep/` that are given to whoever may have them: who hears of one
/// begins to bring it only a while later.
const RECENT: usize = 3;
/// Holders of which it is remembered what they bring of one rank. Keepers are five at most, but
/// change.
const HOLDERS_MAX: usize = 8;
/// A holder that has asked for nothing of a copy for so long does not bring it any more; so long
/// what it was given is relied on anyway.
const IDLE: Duration = RELIED;

/// The copies of `keep/` of ranks that run here which are given, and kept for that: the last few,
/// and of those before them what a holder has begun to bring. In memory: what a daemon that starts
/// again has forgotten, holders give up for the newest.
#[derive(Debug, Default)]
pub(super) struct OnTheWay {
    ranks: Mutex<BTreeMap<WorkId, OfRank>>,
}

#[derive(Debug, Default)]
struct OfRank {
    /// The newest first.
    recent: VecDeque<BlobId>,
    /// What each holder asked for last, and when.
    brought: BTreeMap<PeerId, (BlobId, Instant)>,
}

impl OfRank {
    fn trees(&self) -> impl Iterator<Item = BlobId> + '_ {
        self.recent.iter().chain(self.brought.values().map(|(tree, _)| tree)).copied()
    }

    fn brings(&mut self, holder: PeerId, tree: BlobId, now: Instant) {
        self.brought.insert(holder, (tree, now));
        if self.brought.len() > HOLDERS_MAX
            && let Some(idlest) = self.brought.iter().min_by_key(|(_, (_, at))| *at)
        {
            let idlest = *idlest.0;
            self.brought.remove(&idlest);
        }
    }
}

impl OnTheWay {
    fn announced(&self, id: WorkId, tree: BlobId) {
        let mut ranks = lock(&self.ranks);
        let recent = &mut ranks.entry(id).or_default().recent;
        recent.retain(|known| *known != tree);
        recent.push_front(tree);
        recent.truncate(RECENT);
    }

    /// Whether one of these copies of a job has a blob, by what `has` says of a tree. A keeper
    /// that asks is taken to be bringing that copy: of several with the blob the one that it had
    /// something of before, or else the newest.
    pub(super) fn give(
        &self,
        job: JobId,
        asker: Option<PeerId>,
        now: Instant,
        has: impl Fn(BlobId) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let trees: Vec<(WorkId, BlobId)> = {
            let ranks = lock(&self.ranks);
            let of_job = || ranks.iter().filter(|(id, _)| id.job == job);
            let own = |of: &OfRank| of.brought.get(&asker?).map(|(tree, _)| *tree);
            let owns = of_job().filter_map(|(id, of)| Some((*id, own(of)?)));
            let all = of_job().flat_map(|(id, of)| of.trees().map(|tree| (*id, tree)));
            owns.chain(all).collect()
        };
        // Without the lock: a list of files is read.
        for (id, tree) in trees {
            if has(tree)? {
                if let (Some(asker), Some(of)) = (asker, lock(&self.ranks).get_mut(&id)) {
                    of.brings(asker, tree, now);
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What is kept for that, of which job. What is not brought any more, and ranks that are
    /// over, are forgotten.
    pub(super) fn kept(&self, now: Instant, runs: impl Fn(WorkId) -> bool) -> Vec<(JobId, BlobId)> {
        let mut ranks = lock(&self.ranks);
        ranks.retain(|id, _| runs(*id));
        let mut kept = Vec::new();
        for (id, of) in &mut *ranks {
            of.brought.retain(|_, (_, at)| now.saturating_duration_since(*at) < IDLE);
            kept.extend(of.trees().map(|tree| (id.job, tree)));
        }
        kept
    }

    /// The end of a rank is reported: what it left is brought instead.
    pub(super) fn is_over(&self, id: WorkId) {
        lock(&self.ranks).remove(&id);
    }
}

/// What wakes the task that takes `keep/` of one rank; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Saver {
    told_to_end: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

impl Saver {
    pub(super) fn of(shared: &Arc<Shared>, id: WorkId) -> Self {
        let told_to_end = Arc::new(Notify::new());
        let task = tokio::spawn(run(Arc::clone(shared), id, Arc::clone(&told_to_end)));
        Self { told_to_end, task }
    }

    /// The process has got its SIGTERM.
    pub(super) fn told_to_end(&self) {
        self.told_to_end.notify_one();
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(shared: Arc<Shared>, id: WorkId, told_to_end: Arc<Notify>) {
    let job_dir = shared.job_dir(id.job);
    let spec = match tokio::task::spawn_blocking(move || work::read_spec(&job_dir)).await {
        Ok(Ok(spec)) => spec.spec,
        Ok(Err(reason)) => {
            let reason = format!("{reason:#}");
            return warn!(job = %id.job, rank = %id.rank, reason, "what it keeps is not copied");
        }
        Err(reason) => return warn!(%reason, "what a rank keeps is not copied"),
    };
    if spec.keep_every_ms == 0 {
        return;
    }
    let workspace = shared.workspace(id);
    if let Some(save) = workspace.saved() {
        // Of before this daemon started: nobody else may know of it.
        tell(&shared, id, save).await;
    }
    let mut seen = Seen::default();
    let mut is_in_trouble = false;
    let mut left_out = None;
    let mut ends = Ends { limit_ms: spec.time_limit_ms, is_over: false };
    let mut due_ms = clock::now().boot_ms.saturating_add(spec.keep_every_ms);
    loop {
        let wake_ms = ends.at(&shared, id).map_or(due_ms, |end_ms| end_ms.min(due_ms));
        let pause_ms = wake_ms.saturating_sub(clock::now().boot_ms);
        let is_told = tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(pause_ms)) => false,
            () = told_to_end.notified() => true,
        };
        let now_ms = clock::now().boot_ms;
        // A lease may have moved meanwhile.
        let has_ended = is_told || ends.at(&shared, id).is_some_and(|end_ms| end_ms <= now_ms);
        ends.is_over |= has_ended;
        if !has_ended && now_ms < due_ms {
            continue;
        }
        let taking = (workspace.clone(), shared.store.clone(), std::mem::take(&mut seen));
        let taken = tokio::task::spawn_blocking(move || {
            let (workspace, store, mut seen) = taking;
            let saved = workspace.save(&store, &mut seen, clock::wall_ms());
            (seen, saved)
        });
        let Ok((now_seen, saved)) = taken.await else { return };
        seen = now_seen;
        let trouble = match saved {
            Ok(Saving::New(save, without)) => {
                tell(&shared, id, save).await;
                if let Some(without) = without.as_ref().filter(|it| left_out.as_ref() != Some(*it))
                {
                    say(&workspace, format!("not copied of keep/ to other nodes: {without}")).await;
                    shared.work.touch(id.job);
                }
                left_out = without;
                None
            }
            Ok(Saving::Unchanged) => None,
            Ok(Saving::Changing(path)) => Some(format!("`{path}` changes all the time")),
            Ok(Saving::Unreadable(what)) => Some(format!("{what} cannot be read")),
            Err(reason) => Some(format!("{:#}", anyhow::Error::from(reason))),
        };
        if let Some(trouble) = &trouble
            && !is_in_trouble
        {
            say(&workspace, format!("keep/ is not copied to other nodes just now: {trouble}"))
                .await;
            shared.work.touch(id.job);
        }
        is_in_trouble = trouble.is_some();
        due_ms = clock::now().boot_ms.saturating_add(spec.keep_every_ms);
    }
}

/// When its supervisor ends the process by itself.
struct Ends {
    limit_ms: Option<u64>,
    /// That was, and once is enough.
    is_over: bool,
}

impl Ends {
    fn at(&self, shared: &Shared, id: WorkId) -> Option<u64> {
        if self.is_over {
            return None;
        }
        let (started_ms, deadline_ms) = shared.work.times(id);
        let limit = started_ms.zip(self.limit_ms).map(|(at, limit)| at.saturating_add(limit));
        limit.into_iter().chain(deadline_ms).min()
    }
}

async fn tell(shared: &Shared, id: WorkId, save: Save) {
    shared.served.on_the_way.announced(id, save.tree);
    // The daemon is ending if nobody listens: the next one finds the save.
    let _ = shared.act(move |peer, now| peer.saved(id, save.seq, save.tree, now)).await;
}

/// In the rank's log; where that cannot be written, the daemon's has it.
async fn say(workspace: &Workspace, text: String) {
    let workspace = workspace.clone();
    let said = tokio::task::spawn_blocking(move || {
        let said = workspace.log(Speaker::Daemon, &text);
        (text, said)
    });
    match said.await {
        Ok((_, Ok(()))) => {}
        Ok((text, Err(reason))) => warn!(text, %reason, "not in the log"),
        Err(reason) => warn!(%reason, "not in the log"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use p2pit_protocol::{
        identity::KeyPair,
        job::{Attempt, Rank},
    };

    use super::*;

    fn id(rank: u32) -> WorkId {
        WorkId { job: JobId([7; 32]), attempt: Attempt(1), rank: Rank(rank) }
    }

    fn holder(n: u8) -> PeerId {
        PeerId(KeyPair::from_seed(&[n; 32]).public())
    }

    /// The `n`th copy has a list, a blob of its own, and one that all have.
    fn tree(n: u32) -> BlobId {
        BlobId::of(&n.to_le_bytes())
    }

    fn own(n: u32) -> BlobId {
        BlobId::of(&[&n.to_le_bytes()[..], b"own"].concat())
    }

    fn blobs(root: BlobId) -> BTreeSet<BlobId> {
        let n = (0..1_000).find(|n| tree(*n) == root).unwrap();
        [root, own(n), BlobId([1; 32])].into()
    }

    struct World {
        way: OnTheWay,
        start: Instant,
    }

    impl World {
        fn new() -> Self {
            Self { way: OnTheWay::default(), start: Instant::now() }
        }

        fn gives_at(&self, s: u64, asker: u8, blob: BlobId) -> bool {
            let now = self.start + Duration::from_secs(s);
            let has = |tree| Ok(blobs(tree).contains(&blob));
            self.way.give(id(0).job, Some(holder(asker)), now, has).unwrap()
        }

        fn kept_at(&self, s: u64) -> BTreeSet<BlobId> {
            let kept = self.way.kept(self.start + Duration::from_secs(s), |_| true);
            kept.into_iter().map(|(_, tree)| tree).collect()
        }
    }

    #[test]
    fn what_a_slow_line_brings_is_given_and_kept_to_its_end_whatever_is_newer() {
        let world = World::new();
        world.way.announced(id(0), tree(0));
        assert!(world.gives_at(0, 1, tree(0)), "its list of files");
        for n in 1..500 {
            world.way.announced(id(0), tree(n));
            let s = u64::from(n) * 60;
            // A fast holder brings each, and may ask for what all have as well.
            assert!(world.gives_at(s, 2, tree(n)) && world.gives_at(s, 2, own(n)));
            assert!(world.gives_at(s, 2, BlobId([1; 32])));
            assert!(world.gives_at(s, 1, own(0)), "piece {n} of the slow one");
            let expected = [0, n, n.saturating_sub(1), n.saturating_sub(2)].map(tree);
            assert_eq!(world.kept_at(s), expected.into(), "and nothing else");
        }
        assert!(!world.gives_at(30_000, 1, own(7)), "nobody was bringing it");
        // It has it, and goes on with the newest.
        assert!(world.gives_at(30_000, 1, tree(499)) && !world.kept_at(30_000).contains(&tree(0)));
        assert!(!world.gives_at(30_000, 1, own(0)));
    }

    #[test]
    fn what_is_brought_no_more_goes() {
        let world = World::new();
        for n in 0..4 {
            world.way.announced(id(0), tree(n));
            assert!(world.gives_at(0, 1, own(0)));
        }
        let idle_s = IDLE.as_secs();
        assert!(world.kept_at(idle_s - 1).contains(&tree(0)));
        assert_eq!(world.kept_at(idle_s), [1, 2, 3].map(tree).into());
        // However many ask.
        for n in 0..20_u8 {
            let newest = tree(10 + u32::from(n));
            world.way.announced(id(0), newest);
            assert!(world.gives_at(idle_s + u64::from(n), n, newest));
        }
        assert!(world.kept_at(idle_s + 20).len() <= HOLDERS_MAX + RECENT);
    }

    #[test]
    fn a_reader_keeps_nothing_and_a_rank_that_is_over_neither() {
        let world = World::new();
        let has = |blob| move |tree| Ok(blobs(tree).contains(&blob));
        for n in 0..4 {
            world.way.announced(id(0), tree(n));
            let read = world.way.give(id(0).job, None, world.start, has(own(0))).unwrap();
            assert_eq!(read, n < 3);
        }
        let other = JobId([8; 32]);
        assert!(!world.way.give(other, None, world.start, has(own(3))).unwrap());
        world.way.announced(id(1), tree(100));
        world.way.is_over(id(0));
        assert_eq!(world.kept_at(0), [tree(100)].into());
        assert!(world.way.kept(world.start, |_| false).is_empty());
        assert_eq!(world.kept_at(0), [].into(), "it is forgotten");
    }
}
