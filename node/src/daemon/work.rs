//! Carries out what the peer decided about ranks on this node: prepare, execute, stop,
//! clean up, and tell the peer how it went.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use p2pit_protocol::{
    BlobId, JobId, PeerId,
    bidder::WorkId,
    identity::SignedBytes,
    inventory::GpuUuid,
    job::{Attempt, Ending, Rank, RankAssignment, RankEnd, Saved, VerifiedSpec},
    record::Certificate,
    wire,
};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Shared, clock, fetch::FetchError, lock, saves::Saver, serve::Request};
use crate::{
    executor::{
        self, Adopted, Control, Deadline, ProcessEvent, ProcessId, ProcessSpec, Running, StartError,
    },
    workspace::{Collected, Gang, PrepareError, Prepared, Resumed},
};

/// What a rank needs to know of the others.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub(crate) nodes: Vec<PeerId>,
    pub(crate) hosts: Vec<String>,
    pub(crate) port: u16,
    /// When its lease runs out.
    pub(crate) deadline: Deadline,
}

/// The ranks of this node that have something running or going on.
#[derive(Debug, Default)]
pub(crate) struct Work {
    live: Mutex<BTreeMap<WorkId, Live>>,
    /// Bumped whenever a job's log grew or a rank of it ended here.
    activity: Mutex<BTreeMap<JobId, watch::Sender<u64>>>,
    waits: Mutex<Waits>,
}

/// Of the ranks that are to run here, since when what they are to go on from cannot be had. A
/// daemon that starts again knows of none.
#[derive(Debug, Default)]
struct Waits(BTreeMap<(JobId, Rank), Wait>);

#[derive(Debug)]
struct Wait {
    /// Any of which would do.
    trees: BTreeSet<BlobId>,
    /// On the boot clock.
    first_ms: u64,
    last_ms: u64,
    lost_after_ms: u64,
}

/// Ranks of which it is known since when they wait.
const WAITS_MAX: usize = 1_024;

impl Waits {
    /// A try failed. Whether it has been waited for so long that it counts as lost.
    fn is_lost(
        &mut self,
        rank: (JobId, Rank),
        trees: &BTreeSet<BlobId>,
        now_ms: u64,
        lost_after_ms: u64,
    ) -> bool {
        // Of what was not tried for so long, the job is over or runs elsewhere.
        self.0.retain(|_, wait| now_ms.saturating_sub(wait.last_ms) <= wait.lost_after_ms);
        if self.0.len() >= WAITS_MAX && !self.0.contains_key(&rank) {
            // To begin it anew costs the least of the one that waits the shortest.
            let newest = self.0.iter().max_by_key(|(_, wait)| wait.first_ms);
            if let Some(newest) = newest.map(|(rank, _)| *rank) {
                self.0.remove(&newest);
            }
        }
        let trees = trees.clone();
        let new = |trees| Wait { trees, first_ms: now_ms, last_ms: now_ms, lost_after_ms };
        // Of others nobody has waited for.
        let known = self.0.remove(&rank).filter(|known| known.trees == trees);
        let wait = self.0.entry(rank).or_insert(known.unwrap_or_else(|| new(trees)));
        wait.last_ms = now_ms;
        now_ms.saturating_sub(wait.first_ms) >= lost_after_ms
    }
}

#[derive(Debug, Default)]
struct Live {
    pid: Option<u32>,
    control: Option<Control>,
    /// Told to stop before there was anything to stop.
    stop: Option<String>,
    /// What the peer said last of when its lease runs out, if anything.
    deadline: Option<Deadline>,
    /// When its process began, on the boot clock.
    started_ms: Option<u64>,
    /// Takes what it keeps.
    saver: Option<Saver>,
}

/// In the directory of a job.
pub(crate) const SPEC_FILE: &str = "spec";
/// Between two orders to end what the book does not name; it ends within milliseconds, unless
/// its supervisor or the kernel cannot.
const KILL_AGAIN: Duration = Duration::from_secs(5);
/// How long a supervisor may take to confirm a deadline before that is a matter for the log.
const CONFIRM_WITHIN: Duration = Duration::from_secs(10);

impl Work {
    /// Fetch inputs and set up directories; the peer hears how it went.
    pub(crate) fn prepare(
        &self,
        shared: &Arc<Shared>,
        id: WorkId,
        spec: Option<Box<VerifiedSpec>>,
        assignment: RankAssignment,
        certificate: Certificate,
    ) {
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let prepared = match spec {
                Some(spec) => prepare(&shared, id, &spec, &assignment, certificate).await,
                None => Err(anyhow::anyhow!("the job's spec is not in the book")),
            };
            let is_early = prepared.as_ref().is_err_and(|e| e.is::<NotYet>());
            let result = prepared.map_err(|e| format!("{e:#}"));
            if let Err(reason) = &result {
                warn!(job = %id.job, rank = %id.rank, reason, "cannot be prepared");
            }
            let failed = result.is_err();
            let wanted = shared.act(move |peer, now| {
                match result {
                    Err(reason) if is_early => peer.not_prepared_yet(id, reason, now),
                    result => peer.prepared(id, result, now),
                }
                peer.has_rank(id)
            });
            // The daemon is ending if nobody listens; a restarted one prepares again. A rank
            // that was withdrawn meanwhile was discarded before all of it was there.
            let given_up = wanted.await.is_ok_and(|wanted| !wanted);
            if failed || given_up {
                shared.work.discard(&shared, id);
            }
            shared.work.touch(id.job);
        });
    }

    /// Start the process of a rank.
    pub(crate) fn execute(
        &self,
        shared: &Arc<Shared>,
        id: WorkId,
        spec: Option<Box<VerifiedSpec>>,
        assignment: RankAssignment,
        start: Start,
    ) {
        self.live().entry(id).or_default().deadline = Some(start.deadline);
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let Some(spec) = spec else {
                return fail(&shared, id, "the job's spec is not in the book".to_owned()).await;
            };
            let workspace = shared.workspace(id);
            let names = shared.names_of(&spec).await;
            let process = workspace.process_spec(
                &spec,
                &assignment,
                &Gang { nodes: &start.nodes, hosts: &start.hosts, port: start.port },
                &names,
                &shared.host_policy(),
            );
            let locks = match shared.locks_of(&assignment.grant.gpus) {
                Ok(locks) => locks,
                Err(e) => return fail(&shared, id, format!("its GPU locks: {e}")).await,
            };
            // It may have been moved meanwhile.
            let deadline = shared.work.deadline(id).unwrap_or(start.deadline);
            let process = ProcessSpec { deadline, ..process };
            match shared.executor.start_holding(&process_id(id), process, locks).await {
                Ok(running) => follow(shared, id, running, Some(deadline)).await,
                // Written into the book before it was started: a restart finds it running.
                Err(StartError::AlreadyExists(_)) => {
                    let reason = "it was started here before".to_owned();
                    let ending = Ending::FailedToStart { reason };
                    report(&shared, id, RankEnd::bare(ending, clock::now().wall_ms)).await;
                }
                Err(reason) => {
                    fail(&shared, id, format!("{:#}", anyhow::Error::from(reason))).await;
                }
            }
        });
    }

    /// Stop the process of a rank: SIGTERM, the job's grace, SIGKILL.
    pub(crate) fn stop(&self, shared: &Arc<Shared>, id: WorkId, reason: String) {
        let mut live = self.live();
        // Over already, and about to be reported so.
        let Some(entry) = live.get_mut(&id) else { return };
        match entry.control.clone() {
            Some(control) => {
                drop(live);
                let shared = Arc::clone(shared);
                tokio::spawn(async move {
                    control.stop(None, &reason).await;
                    shared.work.told_to_end(id);
                    shared.work.touch(id.job);
                });
            }
            None => entry.stop = Some(reason),
        }
    }

    /// Move or lift the deadline that the supervisor of a rank keeps.
    pub(crate) fn lease(&self, shared: &Arc<Shared>, id: WorkId, until_ms: Option<u64>) {
        let mut live = self.live();
        // Over already, and about to be reported so.
        let Some(entry) = live.get_mut(&id) else { return };
        let asked = Deadline(until_ms);
        entry.deadline = Some(entry.deadline.map_or(asked, |known| known.moved(asked)));
        // Without a supervisor yet: it is told at its start, or once it is adopted.
        let Some(control) = entry.control.clone() else { return };
        // Before anybody else can take the lock, so that orders stay in order.
        control.set_deadline(asked);
        drop(live);
        let shared = Arc::clone(shared);
        tokio::spawn(async move { confirm(&shared, id, &control).await });
    }

    /// Remove what was prepared for a rank that will not start.
    pub(crate) fn discard(&self, shared: &Arc<Shared>, id: WorkId) {
        let workspace = shared.workspace(id);
        let shared = Arc::clone(shared);
        tokio::task::spawn_blocking(move || {
            // Whoever follows the log asks again whether there is more to come.
            shared.work.touch(id.job);
            if let Err(reason) = workspace.discard() {
                let reason = format!("{:#}", anyhow::Error::from(reason));
                warn!(job = %id.job, rank = %id.rank, reason, "residue of a rank that never ran");
            }
        });
    }

    /// The rank's ending is in the record: the executor need not remember it.
    pub(crate) fn forget(&self, shared: &Arc<Shared>, id: WorkId) {
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            if let Err(reason) = shared.executor.forget(&process_id(id)).await {
                warn!(job = %id.job, rank = %id.rank, reason = format!("{reason:#}"), "run directory stays");
            }
        });
    }

    /// After a restart: take up what an earlier daemon left running or unreported. The
    /// ranks that need no verdict of the peer.
    pub(crate) async fn adopt(
        &self,
        shared: &Arc<Shared>,
    ) -> anyhow::Result<Vec<(WorkId, Option<Running>, Option<executor::Ended>)>> {
        let mut found = Vec::new();
        for (process, adopted) in shared.executor.adopt().await? {
            let Some(id) = work_id(&process) else {
                warn!(%process, "not a rank of ours");
                continue;
            };
            match adopted {
                Adopted::Running(running) => {
                    self.live().entry(id).or_default();
                    found.push((id, Some(running), None));
                }
                Adopted::Ended(ended) => found.push((id, None, Some(ended))),
            }
        }
        Ok(found)
    }

    /// Go on with what [`Work::adopt`] found, once the peer has resumed.
    pub(crate) fn take_up(
        &self,
        shared: &Arc<Shared>,
        id: WorkId,
        running: Option<Running>,
        ended: Option<executor::Ended>,
    ) {
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            match (running, ended) {
                (Some(running), _) => {
                    info!(job = %id.job, rank = %id.rank, "adopted");
                    follow(shared, id, running, None).await;
                }
                (None, Some(ended)) => finish(&shared, id, ended).await,
                (None, None) => {}
            }
        });
    }

    /// End and forget a process that the book does not name.
    pub(crate) fn dismiss(&self, shared: &Arc<Shared>, id: WorkId, running: Option<Running>) {
        self.live().remove(&id);
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            if let Some(running) = running {
                end_unknown(id, running).await;
            }
            shared.work.forget(&shared, id);
            clean_if_needed(&shared, id);
        });
    }

    /// As [`Work::dismiss`], of all of these, but leaves their directories; returns once
    /// nothing of them is left, however long that takes.
    pub(crate) async fn end_unknown(
        &self,
        shared: &Arc<Shared>,
        found: Vec<(WorkId, Option<Running>)>,
    ) {
        let ends = found.into_iter().map(|(id, running)| async move {
            if let Some(running) = running {
                end_unknown(id, running).await;
            }
            self.live().remove(&id);
            self.forget(shared, id);
        });
        futures::future::join_all(ends).await;
    }

    /// GPUs processes of ours run on are told apart from foreign use by these.
    pub(crate) fn pids(&self) -> BTreeSet<u32> {
        self.live().values().filter_map(|live| live.pid).collect()
    }

    /// Ranks with something going on.
    pub(crate) fn count(&self) -> usize {
        self.live().len()
    }

    /// Jobs of which a rank has something going on here.
    pub(crate) fn jobs(&self) -> BTreeSet<JobId> {
        self.live().keys().map(|id| id.job).collect()
    }

    /// Whether this rank has something going on here.
    pub(crate) fn has(&self, id: WorkId) -> bool {
        self.live().contains_key(&id)
    }

    /// Whether a rank of `job` has something going on here.
    pub(crate) fn is_live(&self, job: JobId) -> bool {
        self.live().keys().any(|id| id.job == job)
    }

    /// A counter that changes when the job's log grows or a rank of it ends here.
    pub(crate) fn activity(&self, job: JobId) -> watch::Receiver<u64> {
        let mut activity = self.lock_activity();
        activity.retain(|_, sender| sender.receiver_count() > 0);
        activity.entry(job).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    pub(crate) fn touch(&self, job: JobId) {
        if let Some(sender) = self.lock_activity().get(&job) {
            sender.send_modify(|count| *count += 1);
        }
    }

    /// Nothing of a job is to begin here any more.
    pub(super) fn forget_waits(&self, job: JobId) {
        lock(&self.waits).0.retain(|(known, _), _| *known != job);
    }

    fn told_to_end(&self, id: WorkId) {
        if let Some(saver) = self.live().get(&id).and_then(|live| live.saver.as_ref()) {
            saver.told_to_end();
        }
    }

    /// When the process of a rank began, and when its lease ends, on the boot clock; where that
    /// is known.
    pub(super) fn times(&self, id: WorkId) -> (Option<u64>, Option<u64>) {
        let live = self.live();
        let Some(live) = live.get(&id) else { return (None, None) };
        (live.started_ms, live.deadline.and_then(|deadline| deadline.0))
    }

    fn deadline(&self, id: WorkId) -> Option<Deadline> {
        self.live().get(&id).and_then(|live| live.deadline)
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<WorkId, Live>> {
        // Whole between any two of its statements.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_activity(&self) -> MutexGuard<'_, BTreeMap<JobId, watch::Sender<u64>>> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn prepare(
    shared: &Arc<Shared>,
    id: WorkId,
    spec: &VerifiedSpec,
    assignment: &RankAssignment,
    certificate: Certificate,
) -> anyhow::Result<(u16, String)> {
    // From the first of its inputs to the directories.
    let _in_use = shared.store.begin_use();
    let is_wanted = async || shared.act(move |peer, _| peer.has_rank(id)).await.unwrap_or(false);
    let mut went_bad: Vec<String> = Vec::new();
    let prepared = loop {
        let resumed = resume_from(shared, id, spec, &certificate, is_wanted).await?;
        for tree in spec.inputs() {
            let fetched = shared.fetch_tree(spec, &certificate, tree, is_wanted).await;
            fetched.with_context(|| match went_bad.last() {
                None => format!("cannot fetch input {tree}"),
                Some(reason) => format!("{reason}; it cannot be fetched again"),
            })?;
        }
        match lay_out(shared, id, spec, assignment, resumed).await {
            // What went bad here was removed: it is brought again.
            Err(reason) if lacks_content(&reason) && went_bad.len() < REFETCHES_MAX => {
                let reason = format!("{reason:#}");
                warn!(job = %id.job, rank = %id.rank, reason, "fetching again");
                went_bad.push(reason);
            }
            prepared => break prepared?,
        }
    };
    Ok((prepared.port, shared.host()))
}

/// How often blobs that turn out to be corrupt here are fetched again.
const REFETCHES_MAX: usize = 3;

fn lacks_content(reason: &anyhow::Error) -> bool {
    reason.downcast_ref::<PrepareError>().is_some_and(PrepareError::lacks_content)
}

/// A rank cannot be prepared for want of what a node has that is away.
#[derive(Debug, thiserror::Error)]
#[error("what this process is to go on from: {0}")]
struct NotYet(String);

/// How long one attempt waits for what it is to go on from. It has the GPUs of all its processes
/// meanwhile; another attempt follows, of which other jobs may come in between.
const RESUME_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Between two tries to bring it.
const RESUME_PAUSE: Duration = Duration::from_secs(30);
/// How often it is looked meanwhile whether the attempt was given up.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What an earlier attempt of this rank kept, brought here: the best of what the record names
/// that can be had. Where there is nothing but what somebody who cannot be reached may have, it is
/// waited for, also by the attempts that follow, since work is not to be lost: until a process
/// whose node is silent for so long counts as lost.
async fn resume_from<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    id: WorkId,
    spec: &VerifiedSpec,
    certificate: &Certificate,
    is_wanted: impl Fn() -> W + Sync,
) -> anyhow::Result<Option<Resumed>> {
    // It has been checked before it was committed to.
    let body = certificate.value()?.body;
    let saved: Vec<Saved> = body.saved.into_iter().filter(|it| it.rank == id.rank).collect();
    if saved.is_empty() {
        return Ok(None);
    }
    let trees = saved.iter().map(|saved| saved.tree).collect();
    let (rank, begun) = ((id.job, id.rank), Instant::now());
    loop {
        let mut resumed =
            match bring_best(shared, id, spec, certificate, &saved, &is_wanted).await? {
                Brought::Settled(resumed) => {
                    lock(&shared.work.waits).0.remove(&rank);
                    return Ok(Some(resumed));
                }
                Brought::MayBeAway(resumed) => resumed,
            };
        let (now_ms, lost_after_ms) = (clock::now().boot_ms, spec.spec.lost_after_ms);
        if lock(&shared.work.waits).is_lost(rank, &trees, now_ms, lost_after_ms) {
            // It stays remembered: should the gang not start, the next attempt does not wait.
            for note in &mut resumed.notes {
                note.push_str("; waited for until --lost-after");
            }
            return Ok(Some(resumed));
        }
        let retry_at = Instant::now() + RESUME_PAUSE;
        while Instant::now() < retry_at {
            if begun.elapsed() >= RESUME_WITHIN || !is_wanted().await {
                return Err(NotYet(resumed.notes.join("; ")).into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// What came of a try to bring what a rank is to go on from.
enum Brought {
    /// The best of it is here, or there is none any more.
    Settled(Resumed),
    /// There is nothing, and somebody may have some who cannot be reached.
    MayBeAway(Resumed),
}

async fn bring_best<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    id: WorkId,
    spec: &VerifiedSpec,
    certificate: &Certificate,
    saved: &[Saved],
    is_wanted: impl Fn() -> W + Sync,
) -> anyhow::Result<Brought> {
    let newest = certificate.links.last().map_or(&spec.spec.keepers, |link| &link.next);
    let request = Request::Inputs { spec: spec.signed.clone(), certificate: certificate.clone() };
    let mut resumed = Resumed::default();
    let mut is_lost = true;
    for Saved { attempt, node, tree, .. } in saved.iter().copied() {
        let of = format!("keep/ of attempt {attempt}");
        let keepers = newest.iter().map(|(keeper, _)| *keeper);
        let sources = keepers.filter(|keeper| *keeper != node);
        let sources = core::iter::once(node).chain(sources).collect();
        match shared.bring_tree(&request, (sources, true), tree, |_| {}, &is_wanted).await {
            Ok(()) => {
                let from = shared.label(node);
                resumed.notes.push(format!("begins with {of}, of which {from} has a copy"));
                resumed.keep = Some(tree);
                break;
            }
            Err(reason @ (FetchError::Nowhere { .. } | FetchError::Denied(_))) => {
                is_lost &= reason.is_lost();
                let reason = format!("{:#}", anyhow::Error::from(reason));
                warn!(job = %id.job, rank = %id.rank, %attempt, reason, "a save cannot be had");
                resumed.notes.push(format!("{of} cannot be had: {reason}"));
            }
            Err(reason) => return Err(reason).with_context(|| format!("cannot fetch {of}")),
        }
    }
    let is_settled = resumed.keep.is_some() || is_lost;
    Ok(if is_settled { Brought::Settled(resumed) } else { Brought::MayBeAway(resumed) })
}

async fn lay_out(
    shared: &Arc<Shared>,
    id: WorkId,
    spec: &VerifiedSpec,
    assignment: &RankAssignment,
    resumed: Option<Resumed>,
) -> anyhow::Result<Prepared> {
    let workspace = shared.workspace(id);
    let (store, spec, assignment) = (shared.store.clone(), spec.clone(), assignment.clone());
    let job_dir = shared.job_dir(id.job);
    tokio::task::spawn_blocking(move || {
        let prepared = workspace.prepare(&store, &spec, &assignment, resumed.as_ref())?;
        // Not synced: after a loss of power the process is gone, and so is what this is for.
        let path = job_dir.join(SPEC_FILE);
        std::fs::write(&path, wire::encode(&spec.signed))
            .with_context(|| format!("cannot write {}", path.display()))?;
        anyhow::Ok(prepared)
    })
    .await?
}

/// The next renewal tries again, and the supervisor keeps what it has.
async fn confirm(shared: &Shared, id: WorkId, control: &Control) {
    if let Err(reason) = control.deadline_confirmed(CONFIRM_WITHIN).await
        && shared.work.live().contains_key(&id)
    {
        warn!(job = %id.job, rank = %id.rank, %reason, "its lease could not be moved");
    }
}

/// Hand on what a supervisor says until nothing of the process is left. `held` is the
/// deadline it was started with, by this daemon.
async fn follow(shared: Arc<Shared>, id: WorkId, mut running: Running, held: Option<Deadline>) {
    let (stop, moved) = {
        let mut live = shared.work.live();
        let entry = live.entry(id).or_default();
        entry.control = Some(running.control.clone());
        entry.saver = Some(Saver::of(&shared, id));
        let moved = entry.deadline.filter(|asked| held.is_none_or(|held| !held.covers(*asked)));
        if let Some(asked) = moved {
            running.control.set_deadline(asked);
        }
        (entry.stop.take(), moved.is_some())
    };
    if moved {
        let (shared, control) = (Arc::clone(&shared), running.control.clone());
        tokio::spawn(async move { confirm(&shared, id, &control).await });
    }
    if let Some(reason) = stop {
        running.control.stop(None, &reason).await;
        shared.work.told_to_end(id);
    }
    let mut last = None;
    while let Some(event) = running.events.recv().await {
        match event {
            ProcessEvent::Started { pid, boot_ms } => {
                {
                    let mut live = shared.work.live();
                    let entry = live.entry(id).or_default();
                    (entry.pid, entry.started_ms) = (Some(pid), Some(boot_ms));
                }
                // See `prepare` about a daemon that is ending.
                let _ = shared.act(move |peer, now| peer.started(id, now)).await;
            }
            ProcessEvent::LogGrew { .. } => shared.work.touch(id.job),
            ProcessEvent::LogTrouble { reason } => {
                warn!(job = %id.job, rank = %id.rank, reason, "output is being lost");
            }
            ProcessEvent::Ended(ended) => {
                // What it keeps is gathered whole now.
                shared.work.live().entry(id).or_default().saver = None;
                shared.work.touch(id.job);
                let _ = shared.act(move |peer, now| peer.draining(id, now)).await;
                last = Some(ended);
            }
            ProcessEvent::Gone => break,
        }
    }
    match last {
        Some(ended) => finish(&shared, id, ended).await,
        // Only where this daemon ends or its watch broke: the process may well be there, so
        // nothing is said or touched. The next daemon adopts it.
        None => warn!(job = %id.job, rank = %id.rank, "its supervisor is not heard any more"),
    }
}

/// End a process that the book does not name, and return once nothing of it is left.
async fn end_unknown(id: WorkId, running: Running) {
    let Running { mut events, control, .. } = running;
    warn!(job = %id.job, rank = %id.rank, "runs without being in the book: it is ended");
    loop {
        // Said again: what a supervisor was told while it was not reached may be lost.
        let told = control.kill("no daemon knows of it");
        let over = async {
            tokio::join!(told, async { while events.recv().await.is_some() {} });
        };
        if tokio::time::timeout(KILL_AGAIN, over).await.is_ok() {
            return;
        }
        warn!(
            job = %id.job,
            rank = %id.rank,
            "its processes do not end: the node waits for that, lest others run it meanwhile"
        );
    }
}

/// Gather results and report; then remove the rest.
async fn finish(shared: &Arc<Shared>, id: WorkId, ended: executor::Ended) {
    let workspace = shared.workspace(id);
    let _in_use = shared.store.begin_use();
    let (store, job_dir) = (shared.store.for_results(), shared.job_dir(id.job));
    let gathered = tokio::task::spawn_blocking(move || {
        let collected = match read_spec(&job_dir) {
            Ok(spec) => workspace.collect(&store, &spec),
            Err(reason) => Collected { note: Some(format!("{reason:#}")), ..Collected::default() },
        };
        // Now that nothing more is written: what a copy must have.
        (collected, workspace.log_bytes())
    });
    let (collected, log_bytes) = gathered.await.unwrap_or_else(|e| {
        let note = Some(format!("results could not be gathered: {e}"));
        (Collected { note, ..Collected::default() }, ended.log.bytes)
    });
    let end = RankEnd {
        ending: ending_of(ended.ending),
        result: collected.result,
        keep: collected.keep,
        artifacts: collected.artifacts,
        note: join_notes([collected.note, ended.log.trouble, ended.unsaved]),
        log_bytes,
        at_ms: ended.wall_ms,
    };
    let gpus = shared.act(move |peer, _| peer.gpus_of(id)).await.unwrap_or_default();
    report(shared, id, end).await;
    clean(shared, id, gpus);
}

/// Remove what is left of a rank that is over. Nobody waits for it: its processes are
/// gone and its results kept. What cannot be removed is evidence against its GPUs.
pub(super) fn clean(shared: &Arc<Shared>, id: WorkId, gpus: Vec<GpuUuid>) {
    let (shared, workspace) = (Arc::clone(shared), shared.workspace(id));
    tokio::spawn(async move {
        let cleaned = tokio::task::spawn_blocking(move || workspace.clean()).await;
        let residue = match cleaned {
            Ok(Ok(())) => return,
            Ok(Err(residue)) => anyhow::Error::from(residue),
            Err(e) => anyhow::Error::from(e),
        };
        let evidence = format!("rank {} of job {}: residue: {residue:#}", id.rank, id.job);
        shared.quarantine(gpus, evidence).await;
    });
}

/// As [`clean`], of a rank that had no GPUs, where there is something to remove.
pub(super) fn clean_if_needed(shared: &Arc<Shared>, id: WorkId) {
    if shared.workspace(id).is_unclean() {
        clean(shared, id, Vec::new());
    }
}

/// After a restart: remove what earlier daemons had no time to, of ranks that are over.
pub(super) async fn sweep(shared: &Arc<Shared>) {
    let jobs = shared.home.jobs();
    let found = tokio::task::spawn_blocking(move || {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&jobs)? {
            let entry = entry?;
            let Some(job) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            for (attempt, rank, _) in rank_dirs(&entry.path())? {
                found.push(WorkId { job, attempt, rank });
            }
        }
        std::io::Result::Ok(found)
    });
    let found = match found.await.map_err(std::io::Error::other).and_then(|found| found) {
        Ok(found) => found,
        Err(reason) => return warn!(%reason, "directories of old jobs cannot be listed"),
    };
    for id in found {
        // Still running without being in the book: removed when it is ended.
        if shared.work.live().contains_key(&id) {
            continue;
        }
        let over = shared.act(move |peer, _| !peer.has_rank(id)).await.unwrap_or(false);
        if over {
            clean_if_needed(shared, id);
        }
    }
}

async fn fail(shared: &Arc<Shared>, id: WorkId, reason: String) {
    warn!(job = %id.job, rank = %id.rank, reason, "could not be started");
    let mut end = RankEnd::bare(Ending::FailedToStart { reason }, clock::now().wall_ms);
    let workspace = shared.workspace(id);
    // It tells how the preparation went. Where it cannot be measured there is none to be copied.
    end.log_bytes =
        tokio::task::spawn_blocking(move || workspace.log_bytes()).await.unwrap_or_default();
    shared.work.discard(shared, id);
    report(shared, id, end).await;
}

async fn report(shared: &Arc<Shared>, id: WorkId, end: RankEnd) {
    shared.work.live().remove(&id);
    shared.served.on_the_way.is_over(id);
    // See `prepare` about a daemon that is ending: the run directory keeps the result.
    let _ = shared.act(move |peer, now| peer.ended(id, end, now)).await;
    shared.work.touch(id.job);
}

/// The spec of a job that has, or had, a rank on this node.
pub(crate) fn read_spec(job_dir: &std::path::Path) -> anyhow::Result<VerifiedSpec> {
    let path = job_dir.join(SPEC_FILE);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let signed: SignedBytes =
        wire::decode(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    VerifiedSpec::verify(signed).with_context(|| format!("{} is damaged", path.display()))
}

/// The directories of ranks of a job on this node: attempt, rank, path, in order.
pub(crate) fn rank_dirs(
    job_dir: &std::path::Path,
) -> std::io::Result<Vec<(Attempt, Rank, PathBuf)>> {
    let mut dirs = Vec::new();
    for entry in std::fs::read_dir(job_dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let parsed = name
            .to_str()
            .and_then(|name| name.split_once('-'))
            .and_then(|(a, r)| Some((Attempt(a.parse().ok()?), Rank(r.parse().ok()?))));
        if let Some((attempt, rank)) = parsed {
            dirs.push((attempt, rank, entry.path()));
        }
    }
    dirs.sort();
    Ok(dirs)
}

fn process_id(id: WorkId) -> ProcessId {
    ProcessId { job: id.job.to_string(), attempt: id.attempt.0, rank: id.rank.0 }
}

fn work_id(process: &ProcessId) -> Option<WorkId> {
    let job = process.job.parse().ok()?;
    Some(WorkId { job, attempt: Attempt(process.attempt), rank: Rank(process.rank) })
}

fn ending_of(ending: executor::Ending) -> Ending {
    match ending {
        executor::Ending::Exited { code } => Ending::Exited { code },
        executor::Ending::Signaled { signal } => Ending::Signaled { signal },
        executor::Ending::TimedOut { .. } => Ending::TimedOut,
        executor::Ending::LeaseEnded { .. } => Ending::LeaseEnded,
        executor::Ending::Stopped { .. } => Ending::Stopped,
        executor::Ending::FailedToStart { reason } => Ending::FailedToStart { reason },
        executor::Ending::Lost { reason } => Ending::Lost { reason },
    }
}

fn join_notes<const N: usize>(notes: [Option<String>; N]) -> Option<String> {
    let notes: Vec<String> = notes.into_iter().flatten().collect();
    (!notes.is_empty()).then(|| notes.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::ExitStatus;

    #[test]
    fn what_a_process_is_to_go_on_from_counts_as_lost_once_it_was_waited_for_long_enough() {
        const LOST_AFTER: u64 = 600_000;
        let [first, other, both] = [&[1][..], &[2], &[1, 2]]
            .map(|trees| trees.iter().map(|n| BlobId([*n; 32])).collect::<BTreeSet<_>>());
        let rank = |job, rank| (JobId([job; 32]), Rank(rank));
        let mut waits = Waits::default();
        let mut fails = |rank, trees, at_ms| waits.is_lost(rank, trees, at_ms, LOST_AFTER);
        assert!(!fails(rank(1, 0), &first, 5_000_000));
        assert!(!fails(rank(1, 1), &first, 5_300_000), "each rank for itself");
        assert!(!fails(rank(2, 0), &first, 5_300_000), "and each job");
        assert!(!fails(rank(1, 0), &first, 5_599_999));
        assert!(fails(rank(1, 0), &first, 5_600_000));
        assert!(fails(rank(1, 0), &first, 5_600_001), "also of the attempt that follows");
        assert!(!fails(rank(1, 1), &first, 5_600_000));
        for (at_ms, trees) in [(5_900_000, &other), (6_500_000, &both)] {
            assert!(!fails(rank(1, 1), trees, at_ms), "nobody waited for these");
            assert!(!fails(rank(1, 1), trees, at_ms + LOST_AFTER - 1));
            assert!(fails(rank(1, 1), trees, at_ms + LOST_AFTER));
        }
        assert!(!fails(rank(1, 0), &first, 7_200_000), "it was not tried for long");
        assert_eq!(waits.0.len(), 2);
    }

    #[test]
    fn who_waits_is_forgotten_in_the_end_and_the_longest_the_last() {
        let trees = BTreeSet::from([BlobId([1; 32])]);
        let rank = |n| (JobId([1; 32]), Rank(n));
        let mut waits = Waits::default();
        let many = u32::try_from(3 * WAITS_MAX).unwrap();
        for n in 0..many {
            assert!(!waits.is_lost(rank(n), &trees, u64::from(n), 600_000));
            assert!(waits.0.len() <= WAITS_MAX);
        }
        assert!(waits.is_lost(rank(0), &trees, 600_000, 600_000));
        assert!(!waits.is_lost(rank(0), &trees, 9_000_000, 600_000));
        assert_eq!(waits.0.len(), 1);
    }

    #[test]
    fn a_lease_that_ran_out_is_told_apart_from_a_time_limit() {
        let status = ExitStatus::Signal(libc::SIGTERM);
        for status in [None, Some(status)] {
            let ending = ending_of(executor::Ending::LeaseEnded { status });
            assert_eq!(ending, Ending::LeaseEnded);
        }
        assert_eq!(ending_of(executor::Ending::TimedOut { status }), Ending::TimedOut);
    }
}
