//! Room on the disk: what goes when nothing needs it any more, and what is refused.
//!
//! One task looks after it. Every hour, at the start, and when the store has no room for what
//! comes, it finds out what is still named by anything ([`roots`]), has the store move the rest
//! to its trash, and deletes what has been there for long enough. In between it moves the
//! directories of jobs whose data was given up to a trash of their own ([`bin`]), puts them back
//! where that was taken back, and tells the pool whether there is room.

mod bin;
mod mend;
mod roots;
mod steady;
mod usage;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use p2pit_protocol::{
    BlobId, JobId, PeerId,
    job::{State, VerifiedSpec},
    record::{Certificate, Kept},
};
use tokio::sync::Notify;
use tracing::{info, warn};

use self::{
    bin::Bin,
    mend::Mender,
    roots::{Dropped, Root, short},
    steady::Steady,
};
use super::{NoPeer, Shared, clock, copies, lock, serve::Request, work};
use crate::{
    api::types,
    transfer::{
        BlobStore,
        store::{Limits, PARTIAL_KEPT, RELIED, Reach, amount},
    },
};

/// Between two sweeps that nobody asked for.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);
/// Between two looks at whether jobs were removed and whether there is room.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long several reasons to look are gathered.
const GATHER: Duration = Duration::from_millis(100);
/// Between two counts of directories, where a quota depends on them.
const COUNT_EVERY: Duration = Duration::from_secs(300);
/// How long content may wait for room.
const RELIEF_WITHIN: Duration = Duration::from_secs(20);
/// For so long after a sweep that found too little, no other is made for want of room.
const FRUITLESS: Duration = Duration::from_secs(30);
/// For how long a tree that was brought for a submission is kept for it.
const PUSHED_KEPT: Duration = Duration::from_secs(24 * 3600);
const PUSHED_MAX: usize = 100_000;
/// A node with less room than this, or than this part of what it may take, is full.
const FULL_BYTES: u64 = 1 << 30;
const FULL_PART: u64 = 50;
/// Jobs asked about in one look.
const ASKS_MAX: usize = 16;
/// How long a keeper may take to say whether a job was removed.
const ASK_WITHIN: Duration = Duration::from_secs(3);
/// After nobody could tell.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// A job is taken to be over for good, although not known to be so by a majority, after this.
const SURELY_OVER_MS: u64 = 3_600_000;

/// What the node knows of its room.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Somebody needs room, or a job's data was given up.
    wake: Notify,
    need: Mutex<Need>,
    relieved: Condvar,
    /// Trees that submitters brought, which no record names yet.
    pushed: Mutex<BTreeMap<BlobId, Instant>>,
    counted: Mutex<Counted>,
    /// What keeps sweeps from being made, for the owner.
    warnings: Mutex<Vec<String>>,
    /// What keepers said of jobs that are not kept here.
    told: Mutex<BTreeMap<JobId, Told>>,
    /// When nobody could tell last.
    untold: Mutex<BTreeMap<JobId, Instant>>,
    /// Directories came back out of the trash: what they name is to come as well.
    is_due: AtomicBool,
    taking_back: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Need {
    /// By each that waits, in bytes.
    wanted: BTreeSet<u64>,
    /// Sweeps that were made for want of room.
    sweeps: u64,
    /// When one last found too little, and for how many bytes.
    fruitless: Option<(Instant, u64)>,
}

/// What the last walk found beside the blobs.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    jobs: u64,
    copies: u64,
    bin: u64,
    at: Option<Instant>,
    full: bool,
}

/// What is known of a job that is not kept here.
#[derive(Debug, Clone, Copy)]
struct Told {
    /// Of the announcement that made this node ask, and of the value it was shown.
    head: (u32, u64),
    value: (u32, u64),
    removed: bool,
}

impl Space {
    /// Called where content finds no room: has the task find some, and returns once it has, or
    /// cannot.
    fn relieve(&self, wanted: u64) {
        let mut need = lock(&self.need);
        let is_fruitless =
            |(at, bytes): (Instant, u64)| at.elapsed() < FRUITLESS && wanted >= bytes;
        if need.fruitless.is_some_and(is_fruitless) {
            return;
        }
        need.wanted.insert(wanted);
        let before = need.sweeps;
        self.wake.notify_one();
        // Who waits too long is refused; there may be room the next time.
        drop(
            self.relieved
                .wait_timeout_while(need, RELIEF_WITHIN, |need| need.sweeps == before)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// `lacks` is the least that there is no room for.
    fn relief_is_over(&self, lacks: Option<u64>) {
        let mut need = lock(&self.need);
        need.sweeps += 1;
        need.fruitless = lacks.map(|bytes| (Instant::now(), bytes));
        drop(need);
        self.relieved.notify_all();
    }

    /// A submitter brought this tree: a record will name it.
    pub(crate) fn pushed(&self, tree: BlobId) {
        let mut pushed = lock(&self.pushed);
        if pushed.len() >= PUSHED_MAX {
            // Then what was relied on of late has to do.
            pushed.clear();
        }
        pushed.insert(tree, Instant::now());
    }

    /// This record is kept here, or changed: it keeps its inputs from now on; of a job that is
    /// over, what it left may have been given up.
    pub(crate) fn named(&self, kept: &Kept) {
        let mut pushed = lock(&self.pushed);
        pushed.retain(|tree, _| kept.spec.inputs().all(|input| input != *tree));
        drop(pushed);
        if kept.value.body.state() == State::Done {
            self.wake.notify_one();
        }
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        lock(&self.warnings).clone()
    }
}

/// Bound the store, and begin to look after it.
pub(super) async fn begin(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let whose = format!("node {}", shared.settings.name);
    shared.store.set_limits(Limits { whose, quota: shared.settings.storage });
    if shared.settings.storage.is_some() {
        // Before anything comes: what is not counted is not bounded.
        count(shared).await.context("what is stored here cannot be counted")?;
    }
    let space = Arc::clone(&shared.space);
    shared.store.set_relief(move |wanted| space.relieve(wanted));
    tokio::spawn(tend(Arc::clone(shared)));
    Ok(())
}

async fn tend(shared: Arc<Shared>) {
    let every = sweep_every();
    let keep_done_ms = millis(shared.settings.keep_done);
    // No pool yet; said when there is one.
    let mut is_told = false;
    let mut next = Instant::now();
    let mut steady = Steady::begin(shared.home.clock(), clock::now());
    let mut mender = Mender::default();
    let (begun, mut is_counted) = (next, true);
    loop {
        is_told = is_told
            || shared.act(move |peer, now| peer.set_keep_done(keep_done_ms, now)).await.is_ok();
        let wanted = std::mem::take(&mut lock(&shared.space.need).wanted);
        if let Some(note) = steady.note() {
            // What cannot be written it says itself.
            let _ = tokio::task::spawn_blocking(move || note.write()).await;
        }
        let keep_done = keep_done(&shared, &steady);
        let keeps = keep_done.is_none();
        // There may be no pool yet.
        let _ = shared.act(move |peer, _| peer.keep_old_records(keeps)).await;
        let mut lacks = None;
        if !wanted.is_empty() {
            // Somebody waits: nobody is asked about removed jobs before.
            lacks = swept(&steady, tidy(&shared, &wanted, begun, keep_done)).await.unwrap_or_else(
                || {
                    // Nothing was swept.
                    wanted.first().copied()
                },
            );
            if lacks.is_none() {
                shared.space.relief_is_over(None);
            }
            is_counted = false;
        }
        let has_gone = match settle_given_up(&shared, keep_done).await {
            Ok(has_gone) => has_gone,
            Err(reason) => {
                warn!(reason = format!("{reason:#}"), "data of removed jobs stays");
                false
            }
        };
        let has_come = shared.space.is_due.swap(false, Ordering::Relaxed);
        if Instant::now() >= next || has_gone || has_come {
            next = Instant::now() + every;
            let lacking = if lacks.is_some() { wanted } else { BTreeSet::new() };
            if let Some(still) = swept(&steady, tidy(&shared, &lacking, begun, keep_done)).await {
                lacks = still;
                is_counted = false;
            }
            if !lacking.is_empty() {
                shared.space.relief_is_over(lacks);
            }
        } else if lacks.is_some() {
            shared.space.relief_is_over(lacks);
        }
        if let Err(reason) = mender.look(&shared).await
            && !matches!(reason.downcast_ref(), Some(NoPeer::NoPool))
        {
            warn!(reason = format!("{reason:#}"), "content that went bad is not brought again");
        }
        if !is_counted {
            match count(&shared).await {
                Ok(()) => is_counted = true,
                Err(reason) => {
                    warn!(reason = format!("{reason:#}"), "what is stored here cannot be counted");
                }
            }
        }
        look_at_room(&shared).await;
        tokio::select! {
            // Jobs end in numbers: one look is for all of them.
            () = shared.space.wake.notified() => tokio::time::sleep(GATHER).await,
            () = tokio::time::sleep(LOOK_EVERY.min(every)) => {}
        }
        steady.observe(clock::now());
    }
}

/// For how long what finished jobs left is kept here, where the clock says how old that is.
fn keep_done(shared: &Shared, steady: &Steady) -> Option<Duration> {
    let answers = shared.standing.known().answers;
    let is_right = !steady::is_ahead(answers.values().map(|answer| answer.clock_ms));
    (steady.is_trusted() && is_right).then_some(shared.settings.keep_done)
}

/// What came of a round; `None` where it could not be made.
async fn swept(
    steady: &Steady,
    round: impl Future<Output = anyhow::Result<Option<u64>>>,
) -> Option<Option<u64>> {
    let done = if steady.is_trusted() {
        round.await
    } else {
        Err(anyhow::anyhow!("the clock was set: it is waited for an hour"))
    };
    match done {
        Ok(lacks) => Some(lacks),
        Err(reason) => {
            if !matches!(reason.downcast_ref(), Some(NoPeer::NoPool)) {
                warn!(reason = format!("{reason:#}"), "nothing was swept");
            }
            None
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(debug_assertions)]
fn sweep_every() -> Duration {
    match crate::config::env::for_tests(crate::config::env::SWEEP_MS) {
        0 => SWEEP_EVERY,
        ms => Duration::from_millis(u64::try_from(ms).unwrap_or_default()),
    }
}

#[cfg(not(debug_assertions))]
const fn sweep_every() -> Duration {
    SWEEP_EVERY
}

/// For so long after a start nothing of a removed job is deleted.
fn undo_is_heard_after() -> Duration {
    RELIED.min(sweep_every())
}

/// The store of a daemon.
pub(super) fn open_store(
    dir: &std::path::Path,
) -> Result<BlobStore, crate::transfer::store::Error> {
    #[cfg(debug_assertions)]
    if let ms @ 1.. = crate::config::env::for_tests(crate::config::env::SWEEP_MS) {
        return BlobStore::open_for(dir, Duration::from_millis(u64::try_from(ms).unwrap_or(1)));
    }
    BlobStore::open(dir)
}

/// One round of all that makes room. Of several that wait for some, each with so many bytes,
/// the largest that can be had at all is made; the smallest that there is no room for is
/// returned.
async fn tidy(
    shared: &Arc<Shared>,
    wanted: &BTreeSet<u64>,
    begun: Instant,
    keep_done: Option<Duration>,
) -> anyhow::Result<Option<u64>> {
    expire(shared, keep_done).await?;
    let spared = sweep(shared, true, keep_done).await?;
    // Of what is in the trash it is not known either how old it is.
    let kept = keep_done.map_or(Duration::MAX, |_| shared.settings.trash);
    // Who took a removal back may not have been heard yet.
    let removed_too = begun.elapsed() >= undo_is_heard_after();
    let bin = Bin::of(&shared.home);
    let mut in_bin = if wanted.is_empty() {
        Vec::new()
    } else {
        let bin = bin.clone();
        tokio::task::spawn_blocking(move || bin.sizes(removed_too)).await??
    };
    let could_fit = |wanted: u64, freed: u64| shared.store.could_fit(wanted, freed);
    let most = in_bin.iter().map(|(bytes, _)| *bytes).sum::<u64>().saturating_add(spared);
    // For what cannot fit nothing goes.
    let goal = wanted.iter().rev().copied().find(|wanted| could_fit(*wanted, most));
    let mut freed = 0;
    if let Some(goal) = goal {
        if !could_fit(goal, 0) {
            sweep(shared, false, keep_done).await?;
        }
        in_bin.retain(|(bytes, _)| {
            let is_needed = !could_fit(goal, freed);
            freed += if is_needed { *bytes } else { 0 };
            is_needed
        });
    } else {
        in_bin.clear();
    }
    let store = shared.store.clone();
    tokio::task::spawn_blocking(move || {
        if removed_too {
            store.purge(kept)?;
        }
        store.sweep_partials(PARTIAL_KEPT)?;
        let old = bin.purge(kept, removed_too).context("the trash of jobs cannot be emptied")?;
        let needed = bin::delete(in_bin.into_iter().map(|(_, path)| path));
        for residue in old.into_iter().chain(needed) {
            warn!(residue, "a directory of a job that was given up stays");
        }
        anyhow::Ok(())
    })
    .await??;
    if freed > 0 {
        count_beside(shared).await?;
    }
    Ok(wanted.iter().copied().find(|wanted| !could_fit(*wanted, 0)))
}

/// Moves what nothing names to the trash; without inputs of finished jobs where so. How many
/// bytes only they keep.
async fn sweep(
    shared: &Arc<Shared>,
    keeps_finished_inputs: bool,
    keep_done: Option<Duration>,
) -> anyhow::Result<u64> {
    // Before anything is looked at: see `Reach`.
    let mut reach = Reach::begin(&shared.store);
    let keep_done_ms = millis(keep_done.unwrap_or(Duration::MAX));
    let pushed = fresh_pushed(shared);
    let on_the_way = shared.served.on_the_way.kept(Instant::now(), |id| shared.work.has(id));
    let holding = Arc::clone(shared);
    let mut all = shared
        .act(move |peer, now| {
            let mut all = roots::of_peer(peer, keep_done_ms, now.wall_ms);
            all.extend(pushed.into_iter().map(|tree| Root { tree, kind: roots::Kind::Pushed }));
            all.extend(roots::on_the_way(on_the_way));
            if !keeps_finished_inputs {
                all.retain(|root| !matches!(root.kind, roots::Kind::InputOfFinished(_)));
            }
            let kept: BTreeSet<BlobId> = all.iter().map(|root| root.tree).collect();
            // Who hears from now on that a tree is here has had it looked at after this.
            peer.forget_trees(|tree| kept.contains(&tree));
            holding.copies.forget_kept(|tree| kept.contains(&tree));
            all
        })
        .await?;
    let (home, store) = (shared.home.clone(), shared.store.clone());
    let (swept, warnings) = tokio::task::spawn_blocking(move || {
        let (on_disk, lists) = roots::on_disk(&home).context("directories of jobs")?;
        all.extend(on_disk);
        all.sort_unstable();
        all.dedup_by_key(|root| root.tree);
        for root in &all {
            match root.kind {
                roots::Kind::InputOfFinished(_) => reach.add_tree_in_place(root.tree),
                _ => reach.add_tree(root.tree),
            }
        }
        let mut warnings: Vec<String> =
            lists.iter().map(|list| unknown(&list.reason, &given_up(list.job))).collect();
        for (tree, reason) in reach.unreadable() {
            let root = all.iter().find(|root| root.tree == *tree);
            let what = root.map_or_else(String::new, |root| root.kind.describe());
            let reason = format!("the list of files of {what}, blob {tree}, is damaged ({reason})");
            let next = root.map_or_else(String::new, |root| next_step(root.kind));
            warnings.push(unknown(&reason, &next));
        }
        // What others have is brought again.
        mend::check(&store, reach.unreadable().iter().map(|(tree, _)| *tree));
        if !lists.is_empty() {
            reach.give_up();
        }
        anyhow::Ok((store.sweep(&reach).context("the store cannot be swept")?, warnings))
    })
    .await??;
    for warning in &warnings {
        warn!(warning, "nothing is swept");
    }
    *lock(&shared.space.warnings) = warnings;
    if swept.trashed > 0 || swept.brought_back > 0 {
        info!(
            trashed = swept.trashed,
            bytes = swept.trashed_bytes,
            brought_back = swept.brought_back,
            "swept the store"
        );
    }
    Ok(swept.spared_bytes)
}

/// What the owner is told where it is not known what is needed.
fn unknown(reason: &str, next: &str) -> String {
    format!("{reason}: what it names is not known, and so no unused file is deleted here{next}")
}

/// What follows where the list of files of such a tree is damaged.
fn next_step(kind: roots::Kind) -> String {
    let Some(job) = kind.job() else { return String::new() };
    if matches!(kind, roots::Kind::Input(_) | roots::Kind::InputOfFinished(_)) {
        return given_up(job);
    }
    // Others may be whole: nobody is to give them up for this one.
    let id = short(job);
    format!(
        "; it is brought again from a node that has it, as soon as one can be reached; only if \
         `p2pit show job:{id}` names no other node that has it, `p2pit rm {id}` gives up what the \
         job left, everywhere"
    )
}

fn given_up(job: JobId) -> String {
    format!(
        "; where the job is over, `p2pit rm {}` gives up what it left, on all nodes",
        short(job)
    )
}

fn fresh_pushed(shared: &Shared) -> Vec<BlobId> {
    let mut pushed = lock(&shared.space.pushed);
    pushed.retain(|_, at| at.elapsed() < PUSHED_KEPT);
    pushed.keys().copied().collect()
}

/// Walks everything, and puts the counters right.
async fn count(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let store = shared.store.clone();
    let census = tokio::task::spawn_blocking(move || store.census()).await??;
    count_beside(shared).await?;
    tracing::debug!(?census, "counted what is stored");
    Ok(())
}

/// Walks what is beside the store, which grows without being asked.
async fn count_beside(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let dirs = [shared.home.jobs(), shared.home.copies(), shared.home.trash()];
    let dirs = tokio::task::spawn_blocking(move || usage::of(&dirs)).await??;
    if let [jobs, copies, bin] = dirs[..] {
        let mut counted = lock(&shared.space.counted);
        *counted = Counted { jobs, copies, bin, at: Some(Instant::now()), full: counted.full };
        shared.store.set_beside(jobs + copies + bin);
    }
    Ok(())
}

/// Tells the pool whether there is room, and counts again where a quota depends on it.
async fn look_at_room(shared: &Arc<Shared>) {
    let counted = *lock(&shared.space.counted);
    let is_old = counted.at.is_none_or(|at| at.elapsed() > COUNT_EVERY);
    if shared.settings.storage.is_some()
        && is_old
        && let Err(reason) = count_beside(shared).await
    {
        warn!(reason = format!("{reason:#}"), "what is stored here cannot be counted");
    }
    let Some(room) = shared.store.room_left() else { return };
    let total = shared.settings.storage.or_else(|| Some(shared.store.disk_bytes().ok()?.1));
    let margin = FULL_BYTES.min(total.unwrap_or(0) / FULL_PART);
    // Not back and forth with every blob that comes and goes.
    let full = if counted.full { room < 2 * margin } else { room < margin };
    if full != counted.full {
        lock(&shared.space.counted).full = full;
        if full {
            warn!(room = amount(room), "there is hardly any room: others get copies and inputs");
        } else {
            info!(room = amount(room), "there is room again");
        }
    }
    // Said again in any case: the pool may have been joined since.
    let _ = shared.act(move |peer, now| peer.set_full(full, now)).await;
}

/// For people: what takes room here.
pub(crate) fn describe(shared: &Shared) -> types::Space {
    let used = shared.store.used();
    let counted = *lock(&shared.space.counted);
    let (disk_free, disk_total) = shared.store.disk_bytes().unwrap_or_default();
    types::Space {
        blobs: used.blobs + used.partial,
        jobs: counted.jobs,
        copies: counted.copies,
        trash: used.trash + counted.bin,
        quota: shared.settings.storage,
        room: shared.store.room_left().unwrap_or(disk_free),
        disk_free,
        disk_total,
        full: counted.full,
        is_counted: counted.at.is_some(),
    }
}

// ---- finished jobs ----------------------------------------------------------------------

/// What is to become of a job's directories here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// In their place, also where they were removed, or taken for too old, before.
    Stay,
    Go(Dropped),
    /// It is not sure yet: they are left where they are.
    Unsure,
    /// Its record is not here.
    Ask,
}

/// Moves directories of jobs that were removed, or are older than `keep_done`, to the trash, and
/// those of jobs that are not after all back; whether any went. Without `keep_done` it is not
/// known how old any of them is.
async fn settle_given_up(
    shared: &Arc<Shared>,
    keep_done: Option<Duration>,
) -> anyhow::Result<bool> {
    let bin = Bin::of(&shared.home);
    let listing = bin.clone();
    let (here, removed, expired) = tokio::task::spawn_blocking(move || {
        let expired = if keep_done.is_some() { listing.expired()? } else { BTreeMap::new() };
        std::io::Result::Ok((listing.jobs()?, listing.removed()?, expired))
    })
    .await?
    .context("directories of jobs cannot be listed")?;
    if here.is_empty() && removed.is_empty() && expired.is_empty() {
        return Ok(false);
    }
    let live = shared.work.jobs();
    let keep_done_ms = millis(keep_done.unwrap_or(Duration::MAX));
    let mut jobs = here.clone();
    jobs.extend(&removed);
    let named: BTreeSet<JobId> = jobs.iter().copied().collect();
    jobs.extend(expired.keys());
    jobs.sort_unstable();
    jobs.dedup();
    let early = expired.clone();
    let judged = shared.act(move |peer, now| {
        let judge = |job: JobId| {
            if live.contains(&job) || peer.has_work(job) {
                return (job, Fate::Stay);
            }
            let fate = match peer.record(job) {
                Some(kept) => fate_of(kept, keep_done_ms, now.wall_ms),
                None if named.contains(&job) => Fate::Ask,
                // What came here in the future is judged again, in its place.
                None if early.get(&job) == Some(&true) => Fate::Stay,
                None => Fate::Unsure,
            };
            (job, fate)
        };
        jobs.into_iter().map(judge).collect::<Vec<_>>()
    });
    let judged = match judged.await {
        Ok(judged) => judged,
        Err(NoPeer::NoPool) => return Ok(false),
        Err(ending @ NoPeer::Ending) => return Err(ending.into()),
    };
    let asked = ask_about(shared, &judged).await?;
    let mut gone = false;
    for (job, fate) in judged {
        let fate = match fate {
            Fate::Ask => match asked.get(&job) {
                Some(true) => Fate::Go(Dropped::Removed),
                Some(false) => Fate::Stay,
                None => continue,
            },
            fate => fate,
        };
        match fate {
            Fate::Go(why) if here.binary_search(&job).is_ok() => {
                gone |= give_up(shared, job, why).await?;
            }
            Fate::Stay if removed.binary_search(&job).is_ok() || expired.contains_key(&job) => {
                take_back(shared, job)
                    .await
                    .with_context(|| format!("job {} cannot be put back", short(job)))?;
            }
            _ => {}
        }
    }
    Ok(gone)
}

/// What its record says of a job that nothing of runs here.
fn fate_of(kept: &Kept, keep_done_ms: u64, wall_ms: u64) -> Fate {
    let given_up = |wall_ms| roots::is_given_up(&kept.value.body, keep_done_ms, wall_ms);
    match given_up(wall_ms) {
        None => Fate::Stay,
        // It goes no further than the trash, whatever comes of a value that this keeper has only
        // accepted.
        Some(Dropped::Removed) => Fate::Go(Dropped::Removed),
        Some(Dropped::Expired)
            if kept.chosen || given_up(wall_ms.saturating_sub(SURELY_OVER_MS)).is_some() =>
        {
            Fate::Go(Dropped::Expired)
        }
        Some(Dropped::Expired) => Fate::Unsure,
    }
}

/// Moves a job's directories to the trash; whether there were any.
async fn give_up(shared: &Arc<Shared>, job: JobId, why: Dropped) -> anyhow::Result<bool> {
    let (bin, copies) = (Bin::of(&shared.home), shared.home.copies());
    let (moved, ranks) = tokio::task::spawn_blocking(move || {
        let ranks = work::rank_dirs(&copies.join(job.to_string())).unwrap_or_default();
        std::io::Result::Ok((bin.put(job, why)?, ranks))
    })
    .await?
    .with_context(|| format!("what job {} left cannot be moved to the trash", short(job)))?;
    if moved {
        info!(%job, ?why, "what it left is in the trash");
        let lost = move |peer: &mut p2pit_protocol::Peer, now| {
            for (attempt, rank, _) in ranks {
                peer.copy_lost(job, attempt, rank, now);
            }
        };
        // The daemon is ending if nobody listens; the next one reads what there is.
        let _ = shared.act(lost).await;
        shared.served.forget(job);
        shared.work.forget_waits(job);
    }
    Ok(moved)
}

/// Moves a job's directories out of the trash, and tells the peer what is held again.
///
/// To be called before anything is made for a job in `copies/`: what was begun anew would stand
/// in the place of what was there.
pub(super) async fn take_back(shared: &Arc<Shared>, job: JobId) -> anyhow::Result<()> {
    // Nobody goes on before what is back was looked at.
    let _alone = shared.space.taking_back.lock().await;
    let (bin, shelf) = (Bin::of(&shared.home), shared.copies.shelf().clone());
    let store = shared.store.clone();
    let stock = tokio::task::spawn_blocking(move || {
        if !bin.take_back(job)? {
            return std::io::Result::Ok(None);
        }
        // What it names may be in the trash of the store, and comes back from there.
        store.keep_trash();
        Ok(Some(copies::take_stock_of(&shelf, &store, job)?))
    });
    let Some(stock) = stock.await?? else { return Ok(()) };
    info!(%job, "what it left is back");
    shared.space.is_due.store(true, Ordering::Relaxed);
    shared.space.wake.notify_one();
    shared.act(move |peer, now| copies::tell(peer, stock, now)).await?;
    Ok(())
}

/// Moves what finished jobs left here to the trash once it is too old.
async fn expire(shared: &Arc<Shared>, keep_done: Option<Duration>) -> anyhow::Result<()> {
    let Some(keep_done) = keep_done else { return Ok(()) };
    let bin = Bin::of(&shared.home);
    let (listing, home) = (bin.clone(), shared.home.clone());
    let ages = tokio::task::spawn_blocking(move || {
        let jobs = listing.jobs()?;
        std::io::Result::Ok(jobs.into_iter().map(|job| (job, age(&home, job))).collect::<Vec<_>>())
    })
    .await??;
    let live = shared.work.jobs();
    // By its record `settle_given_up` judges.
    let expired = shared
        .act(move |peer, _| {
            let goes = |job: JobId| {
                let announced = peer.heads().find(|head| head.job == job);
                let may_go_on = announced.is_some_and(|head| head.state != State::Done);
                peer.record(job).is_none()
                    && !may_go_on
                    && !peer.has_work(job)
                    && !live.contains(&job)
            };
            let old = ages.into_iter().filter(|(_, age)| *age >= keep_done);
            old.map(|(job, _)| job).filter(|job| goes(*job)).collect::<Vec<_>>()
        })
        .await?;
    for job in expired {
        give_up(shared, job, Dropped::Expired).await?;
    }
    Ok(())
}

/// How long ago anything was written into the directories of a job's ranks, apart from what is
/// the job's own.
fn age(home: &crate::home::Home, job: JobId) -> Duration {
    let mut youngest = Duration::MAX;
    for kind in [home.jobs(), home.copies()] {
        let ranks = work::rank_dirs(&kind.join(job.to_string())).unwrap_or_default();
        for (_, _, dir) in ranks {
            let files = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            let files = files.filter_map(|file| file.metadata().ok());
            let own = std::fs::metadata(&dir).into_iter();
            for modified in files.chain(own).filter_map(|it| it.modified().ok()) {
                youngest = youngest.min(modified.elapsed().unwrap_or_default());
            }
        }
    }
    // Of a directory without ranks nothing is known: it goes with the next that is.
    if youngest == Duration::MAX { Duration::ZERO } else { youngest }
}

/// What keepers say of jobs that are not kept here: whether what they left was removed. Asked
/// where an announcement is news.
async fn ask_about(
    shared: &Arc<Shared>,
    judged: &[(JobId, Fate)],
) -> anyhow::Result<BTreeMap<JobId, bool>> {
    let unknown: BTreeSet<JobId> =
        judged.iter().filter(|(_, fate)| *fate == Fate::Ask).map(|(job, _)| *job).collect();
    if unknown.is_empty() {
        return Ok(BTreeMap::new());
    }
    let wanted = unknown.clone();
    let heads = shared
        .act(move |peer, _| {
            let heads = peer.heads().filter(|head| wanted.contains(&head.job));
            let done = heads.filter(|head| head.state == State::Done);
            done.map(|head| (head.job, (head.epoch, head.seq), super::keepers_of(head)))
                .collect::<Vec<_>>()
        })
        .await?;
    let is_news = |job: &JobId, head: (u32, u64)| {
        let waits = lock(&shared.space.untold).get(job).is_some_and(|at| at.elapsed() < ASK_AGAIN);
        !waits && lock(&shared.space.told).get(job).is_none_or(|told| told.head < head)
    };
    let news = heads.into_iter().filter(|(job, head, _)| is_news(job, *head)).take(ASKS_MAX);
    let asks = news.map(|(job, head, keepers)| async move {
        (job, head, ask_keepers(shared, job, keepers).await)
    });
    for (job, head, answer) in futures::future::join_all(asks).await {
        let Some((value, removed)) = answer? else {
            lock(&shared.space.untold).insert(job, Instant::now());
            continue;
        };
        let mut told = lock(&shared.space.told);
        let known = told.entry(job).or_insert(Told { head, value, removed });
        if known.value <= value {
            *known = Told { head: head.max(known.head), value, removed };
        }
    }
    lock(&shared.space.untold).retain(|job, _| unknown.contains(job));
    let mut told = lock(&shared.space.told);
    told.retain(|job, _| unknown.contains(job));
    Ok(told.iter().map(|(job, told)| (*job, told.removed)).collect())
}

/// The newest value that a keeper proves: its epoch and number, and whether it says that what
/// the job left was removed. `None` where nobody says.
async fn ask_keepers(
    shared: &Arc<Shared>,
    job: JobId,
    keepers: Vec<PeerId>,
) -> anyhow::Result<Option<((u32, u64), bool)>> {
    let home = shared.home.clone();
    let spec = tokio::task::spawn_blocking(move || {
        let dirs = [home.jobs().join(job.to_string()), home.copies().join(job.to_string())];
        let in_bin = [home.trash().join("jobs"), home.trash().join("copies")]
            .map(|dir| dir.join(format!("{job}.removed")));
        dirs.into_iter().chain(in_bin).find_map(|dir| work::read_spec(&dir).ok())
    })
    .await?;
    // Of a rank that was never prepared.
    let Some(spec) = spec else { return Ok(None) };
    for keeper in keepers.into_iter().filter(|keeper| *keeper != shared.id()) {
        let question = Request::Removal(spec.signed.clone());
        let answer: Option<Certificate> =
            match shared.ask_within(keeper, &question, ASK_WITHIN).await {
                Ok(answer) => answer,
                // Another may be there.
                Err(_) => continue,
            };
        let Some(certificate) = answer else { continue };
        let spec = spec.clone();
        let value = shared.act(move |peer, _| peer.check_certificate(&certificate, &spec)).await?;
        match value {
            Ok(value) if value.body.state() == State::Done => {
                return Ok(Some(((value.epoch, value.seq), value.body.removed.is_some())));
            }
            Ok(_) => {}
            Err(reason) => {
                tracing::debug!(%keeper, %job, reason, "what it says of a job is not proved");
            }
        }
    }
    Ok(None)
}

/// What proves to another node whether what a job left was removed; nothing where that is not
/// known here. Whoever shows the spec had a part in the job.
pub(super) async fn removal(
    shared: &Arc<Shared>,
    spec: p2pit_protocol::identity::SignedBytes,
) -> anyhow::Result<Option<Certificate>> {
    let spec = tokio::task::spawn_blocking(move || VerifiedSpec::verify(spec)).await??;
    let job = spec.job;
    Ok(shared
        .act(move |peer, now| {
            // After a start it may not be known yet; who asks again is told.
            peer.make_sure_of_end(job, now);
            let kept = peer.record(job).filter(|kept| kept.chosen)?;
            (!kept.certificate.receipts.is_empty()).then(|| kept.certificate.clone())
        })
        .await?)
}

#[cfg(test)]
pub(super) use self::roots::tests::kept as sample_record;

#[cfg(test)]
mod tests;
