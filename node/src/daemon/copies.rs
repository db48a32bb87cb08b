//! Copies of what ranks on other nodes write and leave: this node's part as a keeper.
//!
//! What is to be here the peer decides, and says anew whenever it changes
//! ([`p2pit_protocol::copies::CopyOrder`]). A task per job has a task for each rank of its
//! order, and that two: one follows the log, the other brings trees. Holders pull, as fast as
//! they can, from the rank's own node or from each other, and go on where they were cut; what
//! they have at last is on their disk as `shelf` tells. A task ends when its rank is no more
//! in the order; what it has stays.

mod shelf;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use bytes::BytesMut;
use futures::FutureExt as _;
use p2pit_protocol::{
    BlobId, JobId, Peer, PeerId,
    bidder::WorkId,
    copies::{CANNOT_MS, CopyOrder, EndOrder, RankOrder, SaveOrder},
    job::{Attempt, Rank, State, VerifiedSpec},
    record::Link,
};
use tokio::{
    io::AsyncReadExt as _,
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use self::shelf::LogCopy;
pub(crate) use self::shelf::{EndCopy, Held, SaveCopy, Shelf};
use super::{
    Shared,
    fetch::FetchError,
    lock, push,
    serve::{Gate, Request, short},
    space,
};
use crate::{
    api::is_disk_full,
    transfer::{BlobStore, frame},
};

/// A log is followed once its rank has run for so long: what ends sooner is fetched once.
const FOLLOW_AFTER: Duration = Duration::from_secs(1);
/// What came of a log is on the disk after this, for when this node loses power as well.
const SYNC_EVERY: Duration = Duration::from_secs(2);
/// Between two tries, at first and at most where nobody is asked: who is back is found soon.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// The same at most where others were asked in vain. Should more of it come, it is said: the order
/// changes then.
const ASKED_PAUSE: Duration = Duration::from_secs(60);
/// The same at most of a job that is over while none of those who have it can be reached.
const DONE_PAUSE: Duration = Duration::from_secs(120);
/// Everybody who can be reached, who mostly has nothing of a job, is asked for it at the first try
/// and at every so many after it.
const EVERYBODY_AT: u32 = 5;
/// Trees that are brought at a time, and those of them that may be of jobs that are over.
const TRANSFERS_MAX: usize = 8;
const TRANSFERS_OF_DONE_MAX: usize = 3;
/// After so long without what is wanted, this node says that it cannot have it.
const STUCK_AFTER: Duration = Duration::from_secs(60);
/// Before others forget that this node cannot hold something: see [`CANNOT_MS`].
const PART_AGAIN: Duration = Duration::from_millis(CANNOT_MS / 10 * 9);
/// How often it is looked whether somebody is back who has what could not be had.
const LOOK_FOR_SOURCES: Duration = Duration::from_secs(5);
/// Taken of a log at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// Inputs remembered.
const KEPT_MAX: usize = 4_096;
/// Logs that are followed at a time, each by a stream that stays open: of more than these it is
/// asked now and then what there is. A connection has only so many streams.
const FOLLOWED_MAX: usize = 200;
/// How long a node may take to say whether a log follows.
const GATE_WITHIN: Duration = Duration::from_secs(10);

/// A rank of a job.
type Part = (Attempt, Rank);
type Orders = watch::Receiver<Option<Arc<CopyOrder>>>;

/// What is copied here.
#[derive(Debug)]
pub(crate) struct Copies {
    shelf: Shelf,
    jobs: Mutex<BTreeMap<JobId, Job>>,
    transfers: Semaphore,
    /// Whoever brings a tree of a job that is over needs one of these as well.
    transfers_of_done: Semaphore,
    followed: Semaphore,
    /// Jobs of which this node said that it cannot have something, and waits for who has it.
    refused: Mutex<BTreeMap<JobId, Refused>>,
    /// Jobs that this node said it holds nothing more of, since it leaves its pool: of how many
    /// processes only it had something then, and when.
    parting: Mutex<BTreeMap<JobId, (usize, Instant)>>,
    /// Inputs that were made safe from a loss of power since this daemon started.
    kept: Mutex<BTreeSet<BlobId>>,
}

#[derive(Debug)]
struct Job {
    orders: watch::Sender<Option<Arc<CopyOrder>>>,
    /// Ranks of which all that was ordered is here.
    complete: BTreeSet<Part>,
    /// Since when something is not to be had.
    stuck: BTreeMap<(Part, What), Instant>,
}

/// What of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Log,
    Trees,
}

#[derive(Debug)]
struct Refused {
    /// Who may have it and could not be reached.
    away: BTreeSet<PeerId>,
    until: Instant,
}

impl Job {
    fn is_stuck(&self, part: Part) -> bool {
        [What::Log, What::Trees].into_iter().any(|what| self.stuck.contains_key(&(part, what)))
    }

    /// A try failed. Whether this node should say that it cannot have it: for long enough nothing
    /// came, and of the ranks that `ended` what it can have is here.
    fn fails(
        &mut self,
        (part, what): (Part, What),
        mut ended: impl Iterator<Item = Part>,
        tried: &Try,
        now: Instant,
    ) -> bool {
        // A source that is connected and silent takes minutes to fail.
        let since = self.stuck.entry((part, what)).or_insert(tried.begun);
        if tried.bytes() > 0 {
            *since = now;
        }
        if now.duration_since(*since) < STUCK_AFTER {
            return false;
        }
        ended.all(|part| self.complete.contains(&part) || self.is_stuck(part))
    }
}

impl Copies {
    pub(crate) fn new(shelf: Shelf) -> Self {
        Self {
            shelf,
            jobs: Mutex::default(),
            transfers: Semaphore::new(TRANSFERS_MAX),
            transfers_of_done: Semaphore::new(TRANSFERS_OF_DONE_MAX),
            followed: Semaphore::new(FOLLOWED_MAX),
            refused: Mutex::default(),
            parting: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    /// An input is safe from a loss of power.
    pub(super) fn note_kept(&self, tree: BlobId) {
        let mut kept = lock(&self.kept);
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(tree);
    }

    /// Of the inputs that were, only those that `is_kept` names are safe from a sweep.
    pub(super) fn forget_kept(&self, is_kept: impl Fn(BlobId) -> bool) {
        lock(&self.kept).retain(|tree| is_kept(*tree));
    }

    /// Of these jobs, with how many processes each: those of which the others are to be told
    /// that this node leaves. Each once, and again when it changed or is about to be forgotten.
    pub(super) fn to_part_from(&self, found: &[(JobId, usize)]) -> Vec<JobId> {
        part_from(&mut lock(&self.parting), found, Instant::now())
    }

    pub(crate) fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// What the peer wants of a job may be another.
    pub(super) fn ordered(&self, shared: &Arc<Shared>, job: JobId, peer: &Peer) {
        let order = peer.copies_wanted(job).map(Arc::new);
        let mut jobs = lock(&self.jobs);
        if let Some(known) = jobs.get_mut(&job) {
            if order.is_none() {
                known.stuck.clear();
            }
            known.orders.send_if_modified(|last| {
                let is_news = *last != order;
                *last = order;
                is_news
            });
        } else if order.is_some() {
            let (orders, received) = watch::channel(order);
            let (complete, stuck) = (BTreeSet::new(), BTreeMap::new());
            jobs.insert(job, Job { orders, complete, stuck });
            tokio::spawn(tend(Arc::clone(shared), job, received));
        }
        drop(jobs);
        // Whoever reads a copy asks again whether there is more to come.
        shared.work.touch(job);
    }

    /// Whether more of this rank is expected to come here.
    pub(crate) fn grows(&self, id: WorkId) -> bool {
        let jobs = lock(&self.jobs);
        let Some(job) = jobs.get(&id.job) else { return false };
        let order = job.orders.borrow();
        let ranks = order.iter().flat_map(|order| &order.ranks);
        let part = (id.attempt, id.rank);
        let is_complete = job.complete.contains(&part);
        ranks
            .filter(|rank| (rank.attempt, rank.rank) == part)
            .any(|rank| rank.follow || rank.end.is_some() && !is_complete)
    }

    fn set_complete(&self, id: WorkId, is_complete: bool) {
        if let Some(job) = lock(&self.jobs).get_mut(&id.job) {
            let part = (id.attempt, id.rank);
            if is_complete {
                job.complete.insert(part)
            } else {
                job.complete.remove(&part)
            };
        }
    }

    /// See [`Job::fails`].
    fn fails(&self, id: WorkId, what: What, tried: &Try) -> bool {
        let part = (id.attempt, id.rank);
        let mut jobs = lock(&self.jobs);
        let Some(job) = jobs.get_mut(&id.job) else { return false };
        let order = job.orders.borrow().clone();
        let ranks = order.iter().flat_map(|order| &order.ranks);
        let ended = ranks.filter(|it| it.end.is_some()).map(|it| (it.attempt, it.rank));
        job.fails((part, what), ended, tried, Instant::now())
    }

    /// It does not fail any more.
    fn goes_on(&self, id: WorkId, what: What) {
        if let Some(job) = lock(&self.jobs).get_mut(&id.job) {
            job.stuck.remove(&((id.attempt, id.rank), what));
        }
    }

    /// Forgets the task of a job, unless there is an order for it again.
    fn is_done_with(&self, job: JobId) -> bool {
        let mut jobs = lock(&self.jobs);
        let is_wanted = jobs.get(&job).is_some_and(|job| job.orders.borrow().is_some());
        if !is_wanted {
            jobs.remove(&job);
        }
        !is_wanted
    }
}

/// What is on the disk, all of it, to be told to the peer after a start. Lists that name what
/// is not there any more are removed. Blocks.
pub(super) fn take_stock(shelf: &Shelf, store: &BlobStore) -> io::Result<Vec<(WorkId, Held)>> {
    let mut stock = Vec::new();
    for job in shelf.jobs()? {
        stock.extend(take_stock_of(shelf, store, job)?);
    }
    Ok(stock)
}

/// As [`take_stock`], of one job. Blocks.
pub(super) fn take_stock_of(
    shelf: &Shelf,
    store: &BlobStore,
    job: JobId,
) -> io::Result<Vec<(WorkId, Held)>> {
    let mut stock = Vec::new();
    for (attempt, rank) in shelf.ranks(job)? {
        let id = WorkId { job, attempt, rank };
        let mut held = shelf.held(id);
        let is_whole = |end: &EndCopy| {
            held.log_bytes >= end.log_bytes
                && end.keep.iter().chain(&end.artifacts).all(|tree| has_tree(store, *tree))
        };
        if held.end.as_ref().is_some_and(|end| !is_whole(end)) {
            warn!(%job, %rank, "not all of a copy is here any more: it is made anew");
            shelf.forget_end(id)?;
            held.end = None;
        }
        if held.save.as_ref().is_some_and(|save| !has_tree(store, save.tree)) {
            warn!(%job, %rank, "not all of a save is here any more: it is made anew");
            shelf.forget_save(id)?;
            held.save = None;
        }
        stock.push((id, held));
    }
    Ok(stock)
}

/// Tells the peer what [`take_stock`] found.
pub(super) fn tell(peer: &mut Peer, stock: Vec<(WorkId, Held)>, now: p2pit_protocol::Now) {
    for (WorkId { job, attempt, rank }, held) in stock {
        if let Some(save) = held.save {
            peer.save_held(job, attempt, rank, save.seq, save.tree, now);
        }
        if held.end.is_some() {
            peer.copied(job, attempt, rank, now);
        }
    }
}

/// Whether a tree is here with all its blobs.
pub(super) fn has_tree(store: &BlobStore, root: BlobId) -> bool {
    store.has(&root)
        && push::blobs_of(store, root)
            .is_ok_and(|blobs| blobs.iter().all(|(blob, _)| store.has(blob)))
}

/// Has a task for every rank that is ordered, and one for the inputs.
async fn tend(shared: Arc<Shared>, job: JobId, mut orders: Orders) {
    let mut tasks = JoinSet::new();
    let mut at_work = BTreeSet::new();
    loop {
        let order = orders.borrow_and_update().clone();
        let ranks = order.iter().flat_map(|order| &order.ranks);
        for part in ranks.map(|rank| (rank.attempt, rank.rank)) {
            if at_work.insert(Some(part)) {
                let (shared, orders) = (Arc::clone(&shared), orders.clone());
                tasks.spawn(async move {
                    let id = WorkId { job, attempt: part.0, rank: part.1 };
                    let task = || copy_rank(&shared, id, orders.clone());
                    until_whole(&shared, job, orders.clone(), task).await;
                    Some(part)
                });
            }
        }
        if order.as_ref().is_some_and(|order| order.inputs) && at_work.insert(None) {
            let (shared, orders) = (Arc::clone(&shared), orders.clone());
            tasks.spawn(async move {
                let task = || hold_inputs(&shared, job, orders.clone());
                until_whole(&shared, job, orders.clone(), task).await;
                None
            });
        }
        if order.is_none() && at_work.is_empty() && shared.copies.is_done_with(job) {
            return;
        }
        tokio::select! {
            changed = orders.changed() => if changed.is_err() {
                return;
            },
            Some(ended) = tasks.join_next() => match ended {
                Ok(task) => drop(at_work.remove(&task)),
                // What breaks in them they see to themselves: the daemon is ending.
                Err(_) => return,
            },
        }
    }
}

/// Does `task`; where it breaks, again after a while, for what is ordered is still to be done.
/// Where it keeps breaking, this node says that it cannot hold the job.
async fn until_whole<T: Future<Output = ()>>(
    shared: &Arc<Shared>,
    job: JobId,
    orders: Orders,
    task: impl Fn() -> T,
) {
    let broken = |reason: String, lasts| async move {
        warn!(%job, reason, "a task that copies broke");
        if lasts {
            cannot(shared, job, &anyhow::anyhow!("a task that copies breaks: {reason}")).await;
        }
    };
    again_where_broken(orders, task, broken).await;
}

/// Does `task` until it comes to its end. Each time that it breaks, `broken` is told why, and
/// whether it has done so for [`STUCK_AFTER`].
async fn again_where_broken<T: Future<Output = ()>, B: Future<Output = ()>>(
    mut orders: Orders,
    task: impl Fn() -> T,
    broken: impl Fn(String, bool) -> B,
) {
    let (mut patience, mut since) = (Patience::new(), None);
    loop {
        // What it leaves behind is on the disk, or behind locks that see to that.
        let Err(panic) = AssertUnwindSafe(task()).catch_unwind().await else { return };
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let reason = text.unwrap_or("it does not say why").to_owned();
        drop(panic);
        let lasts = since.get_or_insert_with(Instant::now).elapsed() >= STUCK_AFTER;
        // What is ordered once it is said ends the pause.
        orders.mark_unchanged();
        broken(reason, lasts).await;
        patience.wait_up_to(ASKED_PAUSE, &mut orders).await;
    }
}

/// What is ordered of one rank now.
struct Wanted {
    spec: Arc<VerifiedSpec>,
    links: Vec<Link>,
    rank: RankOrder,
}

fn wanted(orders: &mut Orders, id: WorkId) -> Option<Wanted> {
    let order = orders.borrow_and_update();
    let order = order.as_ref()?;
    let rank = order.ranks.iter().find(|it| (it.attempt, it.rank) == (id.attempt, id.rank))?;
    let (spec, links, rank) = (Arc::clone(&order.spec), order.links.clone(), rank.clone());
    Some(Wanted { spec, links, rank })
}

/// One try to bring something.
#[derive(Debug)]
struct Try {
    begun: Instant,
    /// Content that came; what was wrong of it did not count, or is not asked for again.
    bytes: Arc<AtomicU64>,
    /// Whether everybody is asked where those who should have it do not.
    everybody: bool,
}

impl Try {
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Waits between two tries, longer each time, and no longer than until the order changes.
struct Patience {
    pause: Duration,
    tries: u32,
}

impl Patience {
    fn new() -> Self {
        Self { pause: PAUSES.0, tries: 0 }
    }

    fn a_try(&mut self) -> Try {
        let everybody = self.tries.is_multiple_of(EVERYBODY_AT);
        self.tries = self.tries.wrapping_add(1);
        Try { begun: Instant::now(), bytes: Arc::default(), everybody }
    }

    async fn wait(&mut self, orders: &mut Orders) {
        self.wait_up_to(PAUSES.1, orders).await;
    }

    async fn wait_up_to(&mut self, most: Duration, orders: &mut Orders) {
        // Whoever waits looks at the order again, also at its end.
        let _ = timeout(self.next(most), orders.changed()).await;
    }

    fn next(&mut self, most: Duration) -> Duration {
        let pause = self.pause.min(most);
        self.pause = (self.pause * 2).min(most);
        pause
    }
}

/// How long to wait at most after a try that failed so.
fn pause_after(error: &FetchError) -> Duration {
    match error {
        FetchError::Nowhere { from, .. } if from.is_empty() => PAUSES.1,
        FetchError::Nowhere { .. } | FetchError::Denied(_) => ASKED_PAUSE,
        FetchError::Here(_) | FetchError::Unwanted => PAUSES.1,
    }
}

async fn copy_rank(shared: &Arc<Shared>, id: WorkId, mut orders: Orders) {
    let mut patience = Patience::new();
    let log = loop {
        let Some(Wanted { spec, .. }) = wanted(&mut orders, id) else { return };
        // What was removed and is wanted again is what there is to go on with.
        if let Err(reason) = space::take_back(shared, id.job).await {
            cannot(shared, id.job, &reason.context("a copy cannot be taken back")).await;
            patience.wait(&mut orders).await;
            continue;
        }
        let shelf = shared.copies.shelf.clone();
        let made = tokio::task::spawn_blocking(move || {
            shelf.make(id, &spec)?;
            shelf.log(id)
        });
        match made.await.map_err(io::Error::other).and_then(|made| made) {
            Ok(log) => break log,
            Err(reason) => {
                let reason = anyhow::Error::from(reason).context("no place for a copy");
                cannot(shared, id.job, &reason).await;
            }
        }
        patience.wait(&mut orders).await;
    };
    // So many bytes of the log are on the disk.
    let (durable, is_durable) = watch::channel(0);
    tokio::join!(
        copy_log(shared, id, log, orders.clone(), durable),
        copy_trees(shared, id, orders, is_durable),
    );
}

/// Says that this node cannot hold what is wanted of a job, for a reason of its own: its disk is
/// full or broken, or not to be written to. It is asked again after [`CANNOT_MS`].
async fn cannot(shared: &Arc<Shared>, job: JobId, reason: &anyhow::Error) {
    let is_full = is_disk_full(reason);
    warn!(%job, reason = format!("{reason:#}"), is_full, "cannot be copied here");
    let what = if is_full { "no room on" } else { "it cannot be kept on" };
    let reason = format!("{what} {}: {reason:#}", shared.label(shared.id()));
    // The daemon is ending if nobody listens.
    let _ = shared.act(move |peer, now| peer.cannot_copy(job, reason, now)).await;
}

/// Of those who may have something of a job, who can be reached; and whether the job is over.
async fn within_reach(shared: &Arc<Shared>, job: JobId, named: &[PeerId]) -> (Vec<PeerId>, bool) {
    let (me, named) = (shared.id(), named.to_vec());
    let known = shared.act(move |peer, _| {
        let is_there = |node: &PeerId| *node != me && peer.board().is_connected(*node);
        let record = peer.record(job);
        let is_done = record.is_some_and(|kept| kept.value.body.state() == State::Done);
        (named.into_iter().filter(is_there).collect(), is_done)
    });
    // The daemon is ending if nobody answers.
    known.await.unwrap_or_default()
}

/// Something of a rank was `tried` for and is not to be had now: waits until it is to be tried again.
/// Others are asked to copy the job instead when this lasts; but nobody for a job that is over
/// while those who have it are away, which they may be for long and for everybody.
async fn not_to_be_had(
    shared: &Arc<Shared>,
    id: WorkId,
    (what, tried): (What, &Try),
    (reason, sources): (String, &[PeerId]),
    patience: &mut Patience,
    orders: &mut Orders,
) {
    let (near, is_done) = within_reach(shared, id.job, sources).await;
    if near.is_empty() && is_done {
        shared.copies.goes_on(id, what);
        return patience.wait_up_to(DONE_PAUSE, orders).await;
    }
    if shared.copies.fails(id, what, tried) {
        let away = sources.iter().copied().filter(|it| !near.contains(it));
        refuse(shared, id.job, reason, away).await;
    }
    let most = if near.is_empty() { PAUSES.1 } else { ASKED_PAUSE };
    patience.wait_up_to(most, orders).await;
}

/// Says that this node cannot have what is wanted of a job, until somebody who may have it and
/// is `away` is back.
async fn refuse(
    shared: &Arc<Shared>,
    job: JobId,
    reason: String,
    away: impl Iterator<Item = PeerId>,
) {
    warn!(%job, reason, "cannot be had here");
    let away: BTreeSet<PeerId> = away.filter(|node| *node != shared.id()).collect();
    if !away.is_empty() {
        let until = Instant::now() + Duration::from_millis(CANNOT_MS);
        let mut refused = lock(&shared.copies.refused);
        let is_first = refused.is_empty();
        refused.insert(job, Refused { away, until });
        if is_first {
            tokio::spawn(look_for_sources(Arc::clone(shared)));
        }
    }
    let reason = format!("{} cannot have it: {reason}", shared.label(shared.id()));
    // The daemon is ending if nobody listens.
    let _ = shared.act(move |peer, now| peer.cannot_copy(job, reason, now)).await;
}

/// See [`Copies::to_part_from`].
fn part_from(
    told: &mut BTreeMap<JobId, (usize, Instant)>,
    found: &[(JobId, usize)],
    now: Instant,
) -> Vec<JobId> {
    told.retain(|job, _| found.iter().any(|(known, _)| known == job));
    let is_news = |(job, processes): &&(JobId, usize)| {
        let known = told.get(job).filter(|(_, at)| now.duration_since(*at) < PART_AGAIN);
        known.is_none_or(|(known, _)| known != processes)
    };
    let news: Vec<_> = found.iter().filter(is_news).copied().collect();
    told.extend(news.iter().map(|(job, processes)| (*job, (*processes, now))));
    news.into_iter().map(|(job, _)| job).collect()
}

/// Says that jobs can be copied here again once somebody is back who may have them.
async fn look_for_sources(shared: Arc<Shared>) {
    loop {
        sleep(LOOK_FOR_SOURCES).await;
        let online = shared.act(|peer, _| peer.board().connected().collect::<BTreeSet<_>>()).await;
        // The daemon is ending.
        let Ok(online) = online else { return };
        let (back, is_last) = {
            let mut refused = lock(&shared.copies.refused);
            let back = take_back(&mut refused, &online, Instant::now());
            (back, refused.is_empty())
        };
        for job in back {
            info!(%job, "somebody is back who may have it: it is copied here again");
            let _ = shared.act(move |peer, now| peer.can_copy(job, now)).await;
        }
        if is_last {
            return;
        }
    }
}

/// The jobs of which somebody is back. Those of which the others forgot the refusal are dropped.
fn take_back(
    refused: &mut BTreeMap<JobId, Refused>,
    online: &BTreeSet<PeerId>,
    now: Instant,
) -> Vec<JobId> {
    refused.retain(|_, refused| refused.until > now);
    let is_back = |refused: &Refused| !refused.away.is_disjoint(online);
    let back = refused.iter().filter(|(_, it)| is_back(it)).map(|(job, _)| *job).collect();
    refused.retain(|_, refused| !is_back(refused));
    back
}

// ---- logs -----------------------------------------------------------------------------

async fn copy_log(
    shared: &Arc<Shared>,
    id: WorkId,
    log: LogCopy,
    mut orders: Orders,
    durable: watch::Sender<u64>,
) {
    let mut copy = Tail { shared, id, log: Some(log), durable };
    let mut patience = Patience::new();
    let begun = Instant::now();
    while let Some(wanted) = wanted(&mut orders, id) {
        let target = wanted.rank.end.map(|end| end.log_bytes);
        if target.is_some_and(|target| copy.bytes() >= target) {
            match copy.sync().await {
                Ok(()) => {
                    if orders.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
                Err(reason) => cannot(shared, id.job, &reason).await,
            }
            patience.wait(&mut orders).await;
            continue;
        }
        if target.is_none() && !wanted.rank.follow {
            if orders.changed().await.is_err() {
                return;
            }
            continue;
        }
        let age = begun.elapsed();
        if target.is_none() && copy.bytes() == 0 && age < FOLLOW_AFTER {
            // Whoever waits looks at the order again, also at its end.
            let _ = timeout(FOLLOW_AFTER - age, orders.changed()).await;
            continue;
        }
        let (before, tried) = (copy.bytes(), patience.a_try());
        let mut is_changed = false;
        let mut why = "no node that may have its log can be reached".to_owned();
        // Who is away is not dialled for each rank of each job again and again.
        let (near, _) = within_reach(shared, id.job, &wanted.rank.sources).await;
        for source in near {
            match copy.follow(source, &wanted, &mut orders).await {
                // Who has less than another does no harm.
                Ok(Stopped::AtEnd) => why = "nobody has all of its log".to_owned(),
                Ok(Stopped::Changed) => {
                    is_changed = true;
                    break;
                }
                Err(Trouble::Here(reason)) => {
                    cannot(shared, id.job, &reason).await;
                    break;
                }
                Err(Trouble::There(reason)) => {
                    let reason = format!("{reason:#}");
                    debug!(job = %id.job, rank = %id.rank, %source, reason, "its log is not to be had");
                    why = format!("its log: {reason}");
                }
            }
            if target.is_some_and(|target| copy.bytes() >= target) {
                break;
            }
        }
        if copy.bytes() > before {
            patience = Patience::new();
            shared.copies.goes_on(id, What::Log);
        }
        let is_there = target.is_some_and(|target| copy.bytes() >= target);
        if is_there {
            shared.copies.goes_on(id, What::Log);
        } else if target.is_some() && copy.bytes() == before && !is_changed {
            let what = (What::Log, &tried);
            let why = (why, &wanted.rank.sources[..]);
            not_to_be_had(shared, id, what, why, &mut patience, &mut orders).await;
        } else if !is_changed {
            patience.wait(&mut orders).await;
        }
    }
}

/// Why a source is not read any longer.
enum Stopped {
    /// It has no more, now or for ever.
    AtEnd,
    /// What is ordered is another.
    Changed,
}

enum Trouble {
    Here(anyhow::Error),
    There(anyhow::Error),
}

struct Tail<'a> {
    shared: &'a Arc<Shared>,
    id: WorkId,
    /// Away only while it is written to.
    log: Option<LogCopy>,
    durable: watch::Sender<u64>,
}

impl Tail<'_> {
    fn bytes(&self) -> u64 {
        self.log.as_ref().map_or(0, LogCopy::bytes)
    }

    /// Takes what `source` has, and where the rank runs there what it writes.
    async fn follow(
        &mut self,
        source: PeerId,
        wanted: &Wanted,
        orders: &mut Orders,
    ) -> Result<Stopped, Trouble> {
        // Others only copy from it, too.
        let is_followed = wanted.rank.follow && source == wanted.rank.node;
        let place = if is_followed { self.shared.copies.followed.try_acquire().ok() } else { None };
        let follow = place.is_some();
        let question = Request::Tail {
            spec: wanted.spec.signed.clone(),
            links: wanted.links.clone(),
            attempt: self.id.attempt,
            rank: self.id.rank,
            from: self.bytes(),
            follow,
        };
        let there = |reason: anyhow::Error| Trouble::There(reason);
        let (_send, mut receive) =
            self.shared.open_tail(source, &question).await.map_err(|e| there(e.into()))?;
        let gate = timeout(GATE_WITHIN, frame::read_message::<Gate>(&mut receive, usize::MAX));
        let gate = gate.await.context("it does not answer").map_err(there)?;
        gate.map_err(|e| there(e.into()))?.pass().map_err(there)?;
        let mut sync_at = Instant::now() + SYNC_EVERY;
        let mut chunk = BytesMut::new();
        let mut target = wanted.rank.end.map(|end| end.log_bytes);
        loop {
            chunk.reserve(CHUNK_BYTES);
            let stopped = tokio::select! {
                biased;
                read = receive.read_buf(&mut chunk) => match read {
                    Ok(0) => Some(Ok(Stopped::AtEnd)),
                    Ok(_) => {
                        self.append(chunk.split().freeze()).await.map_err(Trouble::Here)?;
                        None
                    }
                    Err(reason) => Some(Err(there(reason.into()))),
                },
                () = sleep(sync_at.saturating_duration_since(Instant::now())) => None,
                changed = orders.changed() => {
                    let now = if changed.is_ok() { self::wanted(orders, self.id) } else { None };
                    let is_same =
                        now.as_ref().is_some_and(|now| now.rank.sources == wanted.rank.sources);
                    target = now.and_then(|now| now.rank.end).map(|end| end.log_bytes);
                    if is_same { None } else { Some(Ok(Stopped::Changed)) }
                }
            };
            // All of it is here, and somebody waits for that.
            let is_there = target.is_some_and(|target| self.bytes() >= target);
            let stopped = stopped.or(is_there.then_some(Ok(Stopped::Changed)));
            if Instant::now() >= sync_at || stopped.is_some() {
                self.sync().await.map_err(Trouble::Here)?;
                sync_at = Instant::now() + SYNC_EVERY;
            }
            if let Some(stopped) = stopped {
                return stopped;
            }
        }
    }

    async fn append(&mut self, bytes: bytes::Bytes) -> anyhow::Result<()> {
        self.with(move |log| log.append(&bytes)).await?;
        // Who follows the copy is woken.
        self.shared.work.touch(self.id.job);
        Ok(())
    }

    async fn sync(&mut self) -> anyhow::Result<()> {
        self.with(LogCopy::sync).await?;
        let bytes = self.bytes();
        self.durable.send_if_modified(|durable| std::mem::replace(durable, bytes) != bytes);
        Ok(())
    }

    async fn with(
        &mut self,
        work: impl FnOnce(&mut LogCopy) -> io::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let mut log = match self.log.take() {
            Some(log) => log,
            // A task broke while it had it.
            None => self.shared.copies.shelf.log(self.id).context("cannot open a log's copy")?,
        };
        let (log, done) = tokio::task::spawn_blocking(move || {
            let done = work(&mut log);
            (log, done)
        })
        .await?;
        self.log = Some(log);
        done.context("cannot write a log's copy")
    }
}

// ---- trees ----------------------------------------------------------------------------

/// What follows a turn.
enum Step {
    Idle,
    Again,
}

async fn copy_trees(
    shared: &Arc<Shared>,
    id: WorkId,
    mut orders: Orders,
    mut durable: watch::Receiver<u64>,
) {
    let shelf = &shared.copies.shelf;
    let mut held = shelf.held(id);
    let mut patience = Patience::new();
    while let Some(wanted) = wanted(&mut orders, id) {
        let tried = patience.a_try();
        let done = if let Some(end) = wanted.rank.end {
            let end = end_copy(&wanted.rank, &end);
            if held.end.as_ref() == Some(&end) {
                tell_end(shared, id).await;
                Ok(Step::Idle)
            } else {
                shared.copies.set_complete(id, false);
                let made = make_end(
                    shared,
                    id,
                    &wanted,
                    &end,
                    &mut durable,
                    &mut orders,
                    (held.save.as_ref(), &tried),
                );
                made.await.map(|made| {
                    if made {
                        held.end = Some(end);
                    }
                    Step::Again
                })
            }
        } else if let Some(save) = wanted.rank.save
            && held.save.as_ref().is_none_or(|known| known.seq < save.seq)
        {
            let before = held.save.as_ref().map(|save| save.tree);
            make_save(shared, id, &wanted, save, (before, &tried), &orders).await.map(|copy| {
                held.save = Some(copy);
                Step::Again
            })
        } else {
            Ok(Step::Idle)
        };
        match done {
            Ok(Step::Again) => {
                patience = Patience::new();
                shared.copies.goes_on(id, What::Trees);
            }
            Ok(Step::Idle) => {
                patience = Patience::new();
                shared.copies.goes_on(id, What::Trees);
                if orders.changed().await.is_err() {
                    return;
                }
                // What is wanted again went bad here.
                held = shelf.held(id);
            }
            // The log is not copied any more: both begin anew.
            Err(FetchError::Unwanted) if durable.has_changed().is_err() => return,
            Err(FetchError::Unwanted) => {}
            Err(FetchError::Here(reason)) => {
                cannot(shared, id.job, &reason).await;
                patience.wait(&mut orders).await;
            }
            Err(error @ (FetchError::Nowhere { .. } | FetchError::Denied(_))) => {
                let reason = error.to_string();
                info!(job = %id.job, rank = %id.rank, reason, "not copied yet");
                if wanted.rank.end.is_some() {
                    let what = (What::Trees, &tried);
                    let why = (reason, &wanted.rank.sources[..]);
                    not_to_be_had(shared, id, what, why, &mut patience, &mut orders).await;
                } else {
                    // The process runs: there will be another save.
                    patience.wait_up_to(pause_after(&error), &mut orders).await;
                }
            }
        }
    }
}

async fn tell_end(shared: &Arc<Shared>, id: WorkId) {
    shared.copies.set_complete(id, true);
    let WorkId { job, attempt, rank } = id;
    // The daemon is ending if nobody listens: the next one finds the copy.
    let _ = shared.act(move |peer, now| peer.copied(job, attempt, rank, now)).await;
    shared.work.touch(job);
}

fn end_copy(rank: &RankOrder, end: &EndOrder) -> EndCopy {
    let EndOrder { log_bytes, keep, artifacts } = *end;
    EndCopy { node: rank.node, log_bytes, keep, artifacts }
}

/// Brings all that a rank left, and writes that it is here; `false` where something else was
/// ordered meanwhile.
async fn make_end(
    shared: &Arc<Shared>,
    id: WorkId,
    wanted: &Wanted,
    end: &EndCopy,
    durable: &mut watch::Receiver<u64>,
    orders: &mut Orders,
    (save, tried): (Option<&SaveCopy>, &Try),
) -> Result<bool, FetchError> {
    let watched = orders.clone();
    let is_wanted = || {
        let order = watched.borrow();
        let rank = order.iter().flat_map(|order| &order.ranks);
        let mut rank = rank.filter(|it| (it.attempt, it.rank) == (id.attempt, id.rank));
        std::future::ready(rank.any(|it| it.end == wanted.rank.end))
    };
    for tree in end.keep.iter().chain(&end.artifacts) {
        let before = save.map(|save| save.tree);
        bring(shared, wanted, *tree, (before, tried), is_wanted).await?;
    }
    tokio::select! {
        come = durable.wait_for(|bytes| *bytes >= end.log_bytes) => if come.is_err() {
            return Err(FetchError::Unwanted);
        },
        _ = orders.changed() => return Ok(false),
    }
    let (shelf, end) = (shared.copies.shelf.clone(), end.clone());
    blocking(move || shelf.write_end(id, &end).context("cannot write what a copy is of")).await?;
    info!(job = %id.job, attempt = %id.attempt, rank = %id.rank, "copied what a rank left");
    Ok(true)
}

/// Brings a save, and writes that it is here. One that is on its way is brought to its end
/// although there is a newer one: else a slow line would never bring any. Its node gives it as long
/// as it is asked for it (`saves::OnTheWay`).
async fn make_save(
    shared: &Arc<Shared>,
    id: WorkId,
    wanted: &Wanted,
    save: SaveOrder,
    (before, tried): (Option<BlobId>, &Try),
    orders: &Orders,
) -> Result<SaveCopy, FetchError> {
    let is_wanted = || {
        let order = orders.borrow();
        let rank = order.iter().flat_map(|order| &order.ranks);
        let mut rank = rank.filter(|it| (it.attempt, it.rank) == (id.attempt, id.rank));
        std::future::ready(rank.any(|it| it.end.is_none()))
    };
    bring(shared, wanted, save.tree, (before, tried), is_wanted).await?;
    let copy = SaveCopy { node: wanted.rank.node, seq: save.seq, tree: save.tree };
    let (shelf, written) = (shared.copies.shelf.clone(), copy.clone());
    blocking(move || shelf.write_save(id, &written).context("cannot write what a copy is of"))
        .await?;
    let WorkId { job, attempt, rank } = id;
    let SaveOrder { seq, tree } = save;
    debug!(%job, %attempt, %rank, seq, "copied what a rank keeps");
    // The daemon is ending if nobody listens: the next one finds the copy.
    let _ = shared.act(move |peer, now| peer.save_held(job, attempt, rank, seq, tree, now)).await;
    Ok(copy)
}

/// Has a tree of a job here, safe from a loss of power; what the tree of `how`, which is, has as
/// well need not be made so again.
async fn bring<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    tree: BlobId,
    how: (Option<BlobId>, &Try),
    is_wanted: impl Fn() -> W + Sync,
) -> Result<(), FetchError> {
    let request = Request::Copies { spec: wanted.spec.signed.clone(), links: wanted.links.clone() };
    let of = (wanted.spec.job, tree);
    bring_as(shared, &request, &wanted.rank.sources, of, how, is_wanted).await
}

async fn bring_as<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    request: &Request,
    named: &[PeerId],
    (job, tree): (JobId, BlobId),
    (before, tried): (Option<BlobId>, &Try),
    is_wanted: impl Fn() -> W + Sync,
) -> Result<(), FetchError> {
    let nobody = || FetchError::Nowhere { blob: tree, from: Vec::new() };
    // Whoever waits for those that are away does not keep others from what is there, and jobs
    // that are over not those that wait for their copies.
    let (near, is_done) = within_reach(shared, job, named).await;
    if near.is_empty() {
        return Err(nobody());
    }
    let of_done =
        if is_done { Some(shared.copies.transfers_of_done.acquire().await) } else { None };
    let permit = shared.copies.transfers.acquire().await;
    // It may have been long.
    let (near, _) = within_reach(shared, job, named).await;
    if near.is_empty() {
        return Err(nobody());
    }
    let come = Arc::clone(&tried.bytes);
    let on_bytes = move |bytes| {
        come.fetch_add(bytes, Ordering::Relaxed);
    };
    let brought =
        shared.bring_tree(request, (near, tried.everybody), tree, on_bytes, is_wanted).await;
    drop((permit, of_done));
    brought?;
    let store = shared.store.clone();
    blocking(move || {
        let blobs = |tree| anyhow::Ok(push::blobs_of(&store, tree)?.into_iter().map(|(id, _)| id));
        let mut new: BTreeSet<BlobId> = blobs(tree)?.collect();
        new.insert(tree);
        // Where that cannot be read, all is made so again.
        for known in before.and_then(|before| blobs(before).ok()).into_iter().flatten() {
            new.remove(&known);
        }
        store.persist(&new).with_context(|| format!("tree {tree} cannot be kept"))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T, FetchError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|e| FetchError::Here(e.into()))?;
    done.map_err(FetchError::Here)
}

// ---- inputs ---------------------------------------------------------------------------

/// Has the inputs of a job here, and what its next attempt begins with, as long as that is
/// ordered.
async fn hold_inputs(shared: &Arc<Shared>, job: JobId, mut orders: Orders) {
    let mut held = BTreeSet::new();
    let mut patience = Patience::new();
    loop {
        let order = orders.borrow_and_update().clone();
        let Some(order) = order.filter(|order| order.inputs) else { return };
        let saved = order.saved.iter().map(|saved| saved.tree);
        let trees: BTreeSet<BlobId> = order.spec.inputs().chain(saved).collect();
        let Some(tree) = trees.iter().find(|tree| !held.contains(*tree)).copied() else {
            if orders.changed().await.is_err() {
                return;
            }
            continue;
        };
        let is_wanted = || {
            let order = orders.borrow();
            std::future::ready(order.as_ref().is_some_and(|order| order.inputs))
        };
        let tried = patience.a_try();
        match hold_input(shared, &order, tree, &tried, is_wanted).await {
            Ok(()) => {
                held.insert(tree);
                patience = Patience::new();
            }
            Err(FetchError::Unwanted) => {}
            Err(reason) => {
                if let FetchError::Here(reason) = &reason {
                    cannot(shared, job, reason).await;
                }
                let most = pause_after(&reason);
                let reason = format!("{:#}", anyhow::Error::from(reason));
                info!(%job, %tree, reason, "an input is not here yet");
                // It is not said that this node cannot have it: that would be of the job, and
                // keep it from the logs and results as well.
                patience.wait_up_to(most, &mut orders).await;
            }
        }
    }
}

async fn hold_input<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    order: &CopyOrder,
    tree: BlobId,
    tried: &Try,
    is_wanted: impl Fn() -> W + Sync,
) -> Result<(), FetchError> {
    let (store, is_input) = (shared.store.clone(), order.spec.inputs().any(|input| input == tree));
    if !blocking(move || Ok(has_tree(&store, tree))).await? {
        let spec = &order.spec;
        let keepers = order.links.last().map_or(&spec.spec.keepers, |link| &link.next);
        let saved = order.saved.iter().filter(|saved| saved.tree == tree).map(|saved| saved.node);
        let sources: Vec<PeerId> = saved.chain(keepers.iter().map(|(keeper, _)| *keeper)).collect();
        let request = Request::Copies { spec: spec.signed.clone(), links: order.links.clone() };
        bring_as(shared, &request, &sources, (spec.job, tree), (None, tried), is_wanted).await?;
        info!(job = short(spec.job), %tree, "copied an input");
    }
    if is_input && !lock(&shared.copies.kept).contains(&tree) {
        shared.keep_tree(tree).await.map_err(FetchError::Here)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::KeyPair;

    use super::*;
    use crate::transfer::{
        Tree, TreePath,
        tree::{Entry, Kind},
    };

    #[test]
    fn a_job_is_refused_once_nothing_of_it_can_be_had_for_long() {
        let (orders, _) = watch::channel(None);
        let mut job = Job { orders, complete: BTreeSet::new(), stuck: BTreeMap::new() };
        let (start, part) = (Instant::now(), |rank| (Attempt(1), Rank(rank)));
        let fails = |job: &mut Job, rank, what, (begun_s, bytes), s| {
            let at = |s| start + Duration::from_secs(s);
            let ended = [part(0), part(1)].into_iter();
            let tried = Try { begun: at(begun_s), ..Patience::new().a_try() };
            tried.bytes.store(bytes, Ordering::Relaxed);
            job.fails((part(rank), what), ended, &tried, at(s))
        };
        assert!(!fails(&mut job, 0, What::Trees, (0, 0), 1));
        assert!(!fails(&mut job, 0, What::Trees, (50, 0), 70), "rank 1 is still copied");
        job.complete.insert(part(1));
        assert!(!fails(&mut job, 0, What::Log, (70, 0), 71), "its log is not stuck for so long");
        assert!(fails(&mut job, 0, What::Trees, (70, 0), 72));
        assert!(!fails(&mut job, 0, What::Trees, (72, 1), 90), "it goes on, if slowly");
        assert!(!fails(&mut job, 0, What::Trees, (90, 0), 149));
        assert!(fails(&mut job, 0, What::Trees, (149, 0), 150));
        // Connected and silent: it takes long to fail, and nothing came.
        assert!(fails(&mut job, 0, What::Trees, (150, 0), 630));
        job.stuck.clear();
        assert!(fails(&mut job, 0, What::Trees, (630, 0), 1_110), "also the first time");
        job.complete.clear();
        assert!(!fails(&mut job, 1, What::Log, (1_110, 0), 1_111));
        assert!(fails(&mut job, 1, What::Log, (1_169, 0), 1_170), "both are stuck");
    }

    #[test]
    fn who_was_asked_in_vain_is_left_alone_for_longer_and_longer() {
        let blob = BlobId([1; 32]);
        let nobody = FetchError::Nowhere { blob, from: Vec::new() };
        let lacks = FetchError::Nowhere { blob, from: vec![("a".into(), "lacks it".into())] };
        assert_eq!(pause_after(&nobody), PAUSES.1, "that asks nobody");
        assert_eq!(pause_after(&lacks), ASKED_PAUSE);
        assert_eq!(pause_after(&FetchError::Denied("not yours".into())), ASKED_PAUSE);
        let mut patience = Patience::new();
        let asks = (0..11).map(|_| patience.a_try().everybody).collect::<Vec<_>>();
        let all: Vec<usize> = (0..11).filter(|at| asks[*at]).collect();
        assert_eq!(all, [0, 5, 10]);
        let pauses = (0..9).map(|_| patience.next(ASKED_PAUSE).as_secs()).collect::<Vec<_>>();
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(patience.next(PAUSES.1), PAUSES.1, "nobody is there any more");
    }

    #[tokio::test]
    async fn what_breaks_is_done_again() {
        let (sender, orders) = watch::channel(None);
        let times = std::sync::atomic::AtomicU32::new(0);
        let said = Mutex::new(Vec::new());
        let task = || async {
            let time = times.fetch_add(1, Ordering::Relaxed);
            assert!(time > 2, "fault {time}");
        };
        let broken = |reason: String, lasts: bool| {
            lock(&said).push((reason, lasts));
            // So that nobody waits.
            sender.send_replace(None);
            std::future::ready(())
        };
        again_where_broken(orders, task, broken).await;
        assert_eq!(times.into_inner(), 4);
        let expected = ["fault 0", "fault 1", "fault 2"].map(|fault| (fault.to_owned(), false));
        assert_eq!(said.into_inner().unwrap(), expected);
    }

    #[test]
    fn that_a_node_leaves_is_said_once_of_each_job() {
        let now = Instant::now();
        let (one, two) = (JobId([1; 32]), JobId([2; 32]));
        let mut told = BTreeMap::new();
        assert_eq!(part_from(&mut told, &[(one, 2)], now), [one]);
        assert_eq!(part_from(&mut told, &[(one, 2), (two, 1)], now), [two]);
        assert_eq!(part_from(&mut told, &[(one, 1), (two, 1)], now), [one], "it changed");
        assert_eq!(part_from(&mut told, &[(two, 1)], now), []);
        assert_eq!(part_from(&mut told, &[(one, 1), (two, 1)], now), [one], "it is back");
        let later = now + Duration::from_millis(CANNOT_MS);
        assert_eq!(part_from(&mut told, &[(two, 1)], later), [two], "it is forgotten");
    }

    #[test]
    fn a_refusal_ends_when_somebody_who_was_away_is_back() {
        let node = |n| PeerId(KeyPair::from_seed(&[n; 32]).public());
        let now = Instant::now();
        let until = now + Duration::from_secs(600);
        let job = |n| JobId([n; 32]);
        let refused = |n, until| (job(n), Refused { away: [node(n)].into(), until });
        let mut known: BTreeMap<_, _> =
            [refused(1, until), refused(2, until), refused(3, now)].into();
        let online = [node(2), node(3)].into();
        assert_eq!(take_back(&mut known, &online, now), [job(2)]);
        assert_eq!(known.into_keys().collect::<Vec<_>>(), [job(1)]);
    }

    #[test]
    fn a_copy_that_is_not_whole_any_more_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
        let shelf = Shelf::at(dir.path().join("copies"));
        let id = WorkId { job: JobId([7; 32]), attempt: Attempt(1), rank: Rank(0) };
        let tree = |content: &[u8]| {
            let blob = store.put_bytes(content).unwrap();
            let kind = Kind::File { blob, size: content.len() as u64, executable: false };
            let path = TreePath::from_bytes("file").unwrap();
            let tree = Tree::new(vec![Entry { path, kind }]).unwrap();
            (store.put_bytes(&tree.encode().unwrap()).unwrap(), blob)
        };
        let ((keep, kept), (saved, in_save)) = (tree(b"kept"), tree(b"saved"));
        let node = PeerId(KeyPair::from_seed(&[1; 32]).public());
        let end = EndCopy { node, log_bytes: 4, keep: Some(keep), artifacts: None };
        let save = SaveCopy { node, seq: 3, tree: saved };
        let write = |log: &[u8]| {
            let rank_dir = shelf.log_path(id).parent().unwrap().to_owned();
            std::fs::create_dir_all(&rank_dir).unwrap();
            std::fs::write(shelf.job_dir(id.job).join("spec"), "of the job").unwrap();
            std::fs::write(shelf.log_path(id), log).unwrap();
            shelf.write_end(id, &end).unwrap();
            shelf.write_save(id, &save).unwrap();
        };
        let stock = || {
            let stock = take_stock(&shelf, &store).unwrap();
            let [(found, held)] = &stock[..] else { panic!("{stock:?}") };
            assert_eq!((*found, held), (id, &shelf.held(id)));
            (held.end.is_some(), held.save.is_some())
        };
        write(b"log\n");
        assert_eq!(stock(), (true, true));
        std::fs::write(shelf.log_path(id), "lo").unwrap();
        assert_eq!(stock(), (false, true), "its log was cut off");
        write(b"log\nand more\n");
        assert_eq!(stock(), (true, true));
        store.remove(&kept).unwrap();
        assert_eq!(stock(), (false, true));
        store.remove(&in_save).unwrap();
        assert_eq!(stock(), (false, false));
        assert_eq!(shelf.held(id).log_bytes, 13, "what is here stays");
    }
}
