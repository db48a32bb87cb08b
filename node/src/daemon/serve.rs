//! What this node answers other nodes: at its door, and on the data plane.
//!
//! Every stream of the data plane opens with one [`Request`]. Users' requests are signed,
//! and the peer decides; inputs go only to nodes that the job's record names.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use p2pit_protocol::{
    BlobId, JobId, Now, Peer, PeerId, UserId,
    bidder::WorkId,
    door::{self, Hello},
    identity::SignedBytes,
    job::{Attempt, Rank, State, VerifiedSpec},
    message::{Command, JobView, Reply},
    record::{Body, Certificate, ForceRecover, Keeper, Link, quorum_of},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::Semaphore, time::timeout};
use tracing::{debug, warn};

use super::{
    Shared, files,
    logs::{self, LogReader},
    parting, push, space, work,
};
use crate::{
    api::{
        is_disk_full,
        log::Parts,
        types::{self, GpuReading, JobFiles, Surveyed},
    },
    gpu,
    network::Network,
    transfer::{
        endpoint::{Connection, DATA, DOOR, Incoming},
        exchange::{self, Ask, OpenBlob, Source},
        frame,
        store::BlobStore,
        stream::{self, RecvStream, SendStream},
    },
};

/// What a stream of the data plane is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Where does your control plane listen? → `Vec<SocketAddr>`.
    Addresses,
    /// A user's request → [`UserAnswer`].
    User(SignedBytes),
    /// The signed `Job` → [`JobView`], one at once and one for each change, until done.
    Watch(SignedBytes),
    /// The signed `Log` → [`Gate`], then pieces of logs ([`crate::api::log::Chunk`]).
    Log { signed: SignedBytes, parts: Parts, follow: bool },
    /// The signed `Log` → [`Gate`], then which logs there are
    /// ([`crate::api::log::Held`]), as JSON bytes to the end.
    Logs(SignedBytes),
    /// The signed `Files` → [`Gate`], then [`JobFiles`] as JSON bytes to the end: of the ranks
    /// that ran there, or of those that it has copies of.
    Files { signed: SignedBytes, copies: bool },
    /// The signed `Files`, asks behind → [`Gate`], then blobs.
    Blobs(SignedBytes),
    /// Asks behind: inputs of the job → [`Gate`], blobs. The certificate is for a value of its
    /// record that names the asking node; whoever has the blobs may be asked.
    Inputs { spec: SignedBytes, certificate: Certificate },
    /// Asks behind, from a keeper of the job, as the links show: its inputs, and what its ranks
    /// left or have saved → [`Gate`], blobs.
    Copies { spec: SignedBytes, links: Vec<Link> },
    /// From a keeper of the job: the log of a rank, from so many bytes on → [`Gate`], the log's
    /// bytes; with `follow` until nothing more is written there.
    Tail {
        spec: SignedBytes,
        links: Vec<Link>,
        attempt: Attempt,
        rank: Rank,
        from: u64,
        follow: bool,
    },
    /// A tree for a job to be submitted → twice, for the manifest and for all else of it:
    /// [`Gate`], the asks for what is missing, those blobs back; → [`Gate`] once everything
    /// is durable.
    Push { root: BlobId, manifest_bytes: u64 },
    /// What did these jobs leave, and what of it have you? → `Vec<Left>`, at most
    /// [`parting::JOBS_MAX`].
    Left(Vec<JobId>),
    /// The signed `Job`: what do you have of its record, whose keepers are lost? →
    /// `Result<Surveyed, String>`.
    Survey(SignedBytes),
    /// The signed spec of a job that the asker had a part in: was what it left removed? →
    /// `Option<Certificate>` of the newest value of its record that is known to be chosen.
    Removal(SignedBytes),
    /// A signed `ForceRecover`: go on from what you have → `Result<(), String>`.
    Recover(SignedBytes),
    /// From where do you see me, and can you dial me there? → [`Probed`].
    Probe(Probe),
    /// You cannot be dialled, and I can: connect to me, for questions of this lane →
    /// `Result<(), String>`, once you have.
    ConnectBack { lane: u8 },
    /// This connection is the one you asked for → `()`.
    Connected { lane: u8 },
}

/// Where who asks listens, at whatever address it is seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Probe {
    pub(crate) control: u16,
    pub(crate) data: u16,
}

/// To [`Request::Probe`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Probed {
    /// From where the question came; `None` where it came through others.
    pub(crate) seen: Option<SocketAddr>,
    /// Whether its ports answer at that address when they are dialled anew; `None` where that
    /// was not tried: of the control plane by UDP, the same by TCP, of the data plane.
    pub(crate) control: Option<Result<(), String>>,
    pub(crate) tcp: Option<Result<(), String>>,
    pub(crate) data: Option<Result<(), String>>,
    /// Milliseconds since the epoch, by the clock there.
    pub(crate) wall_ms: u64,
}

/// To [`Request::User`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct UserAnswer {
    pub(crate) reply: Reply,
    pub(crate) readings: Vec<GpuReading>,
    pub(crate) space: Option<types::Space>,
}

/// Whether what was asked follows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Gate {
    Open,
    Denied(String),
    /// For want of room on a disk there.
    Full(String),
}

impl Gate {
    fn closed(reason: &anyhow::Error) -> Self {
        let text = format!("{reason:#}");
        if is_disk_full(reason) { Self::Full(text) } else { Self::Denied(text) }
    }

    /// # Errors
    /// Why what was asked does not follow.
    pub(crate) fn pass(self) -> anyhow::Result<()> {
        match self {
            Self::Open => Ok(()),
            Self::Denied(reason) => Err(anyhow::Error::msg(reason)),
            Self::Full(reason) => {
                Err(std::io::Error::new(std::io::ErrorKind::StorageFull, reason).into())
            }
        }
    }
}

/// Hellos on one connection.
const HELLOS_MAX: usize = 3 * super::reach::ROUNDS_MAX as usize;
/// How long a newcomer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest tree manifest taken.
pub(super) const MANIFEST_BYTES_MAX: u64 = 128 << 20;
/// Requests that come through tunnels, from all members together.
const TUNNELS_MAX: usize = 256;
/// Of these from one member.
const TUNNELS_PER_PEER: usize = 32;
/// How long who opened a tunnel may take to say what for.
const TUNNEL_ASKS_WITHIN: Duration = Duration::from_secs(10);
/// Longer than the side that asked for the connection keeps it without use.
const BACK_IDLE: Duration = Duration::from_secs(180);
/// Before bulk, when a connection has room: what somebody looks at.
const URGENT: i32 = 1;

/// Take connections until the endpoint closes.
pub(super) async fn accept(shared: Arc<Shared>) {
    while let Some(incoming) = shared.endpoint.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let peer = incoming.peer;
            let served = if incoming.alpn == DOOR.alpn {
                door(&shared, &incoming).await
            } else {
                data(shared, &incoming).await;
                Ok(())
            };
            if let Err(reason) = served {
                debug!(%peer, reason = format!("{reason:#}"), "not served");
            }
        });
    }
}

/// Hear hellos, one a stream, and let the peer judge them.
async fn door(shared: &Arc<Shared>, incoming: &Incoming) -> anyhow::Result<()> {
    let from = incoming.peer;
    // Enough to bring two rosters together, and too few to hold the door.
    for _ in 0..HELLOS_MAX {
        let Ok(accepted) = timeout(HELLO_TIMEOUT, incoming.connection.accept_bi()).await else {
            return Ok(());
        };
        let Ok((mut send, mut receive)) = accepted else { return Ok(()) };
        let hello = frame::read_message::<Hello>(&mut receive, usize::MAX);
        let reply = match timeout(HELLO_TIMEOUT, hello).await? {
            Ok(hello) => shared.act(move |peer, now| peer.handle_door(from, hello, now)).await?,
            Err(frame::Error::Malformed(_)) => door::judge_unreadable(),
            Err(reason) => return Err(reason.into()),
        };
        timeout(HELLO_TIMEOUT, frame::write_message(&mut send, &reply)).await??;
        send.finish()?;
    }
    // The last reply is on its way: the connection's end must not overtake it.
    let _ = timeout(HELLO_TIMEOUT, incoming.connection.closed()).await;
    Ok(())
}

async fn data(shared: Arc<Shared>, incoming: &Incoming) {
    // Ends with the connection.
    while let Ok(streams) = incoming.connection.accept_bi().await {
        begin(&shared, &incoming.connection, streams);
    }
}

/// Answer on a connection that this node opened, because the other side asked for it. Ends
/// with it, or when nothing was asked for so long that the other side has let go of it.
pub(super) async fn data_back(shared: Arc<Shared>, connection: Connection) {
    while let Ok(Ok(streams)) = timeout(BACK_IDLE, connection.accept_bi()).await {
        begin(&shared, &connection, streams);
    }
}

fn begin(
    shared: &Arc<Shared>,
    connection: &Connection,
    (send, receive): (quinn::SendStream, quinn::RecvStream),
) {
    let (shared, connection) = (Arc::clone(shared), connection.clone());
    tokio::spawn(async move {
        let from = connection.peer();
        if !shared.is_member(from) {
            return;
        }
        // The answer alone is no reason for the connection to stay, and its streams are.
        let answered = answer(&shared, from, send.into(), receive.into(), Some(connection)).await;
        if let Err(reason) = answered {
            debug!(%from, reason = format!("{reason:#}"), "request not answered");
        }
    });
}

/// Answer what members ask through the control plane's connections, where their own do not
/// come through.
pub(super) async fn tunnels(shared: Arc<Shared>, network: Network) {
    let Some(mut tunnels) = network.take_tunnels() else { return };
    let room = Arc::new(Semaphore::new(TUNNELS_MAX));
    let mut rooms = BTreeMap::<PeerId, Arc<Semaphore>>::new();
    while let Some((from, tunnel)) = tunnels.next().await {
        if !shared.is_member(from) {
            continue;
        }
        rooms.retain(|_, room| room.available_permits() < TUNNELS_PER_PEER);
        let own = rooms.entry(from).or_insert_with(|| Arc::new(Semaphore::new(TUNNELS_PER_PEER)));
        let own = Arc::clone(own).try_acquire_owned();
        let all = Arc::clone(&room).try_acquire_owned();
        let (Ok(own), Ok(all)) = (own, all) else {
            debug!(%from, "too many tunnels");
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let _permits = (own, all);
            let (send, receive) = stream::tunnel(tunnel);
            if let Err(reason) = answer(&shared, from, send, receive, None).await {
                debug!(%from, reason = format!("{reason:#}"), "request not answered");
            }
        });
    }
}

async fn answer(
    shared: &Arc<Shared>,
    from: PeerId,
    mut send: SendStream,
    mut receive: RecvStream,
    connection: Option<Connection>,
) -> anyhow::Result<()> {
    let request = frame::read_message(&mut receive, usize::MAX);
    let request = match &connection {
        Some(_) => request.await?,
        None => timeout(TUNNEL_ASKS_WITHIN, request).await.context("nothing was asked")??,
    };
    if !matches!(
        request,
        Request::Blobs(_) | Request::Inputs { .. } | Request::Copies { .. } | Request::Tail { .. }
    ) {
        send.set_priority(URGENT)?;
    }
    match request {
        Request::Addresses => {
            let addrs = shared.network().map(|n| n.listen_addrs()).unwrap_or_default();
            frame::write_message(&mut send, &addrs).await?;
        }
        Request::User(signed) => {
            let answer = user(shared, signed).await?;
            frame::write_message(&mut send, &answer).await?;
        }
        Request::Watch(signed) => {
            let mut views = Views::open(shared, signed).await?;
            while let Some(view) = until_unwanted(&mut send, views.next()).await? {
                frame::write_message(&mut send, &view).await?;
            }
        }
        Request::Log { signed, parts, follow } => {
            let mut log = match LogReader::open(shared, signed, parts, follow).await {
                Ok(log) => log,
                Err(reason) => return deny(send, reason).await,
            };
            frame::write_message(&mut send, &Gate::Open).await?;
            while let Some(chunk) = until_unwanted(&mut send, log.next()).await? {
                send.write_all(&chunk.encode()).await?;
            }
        }
        Request::Logs(signed) => match logs::held(shared, signed).await {
            Ok(held) => {
                frame::write_message(&mut send, &Gate::Open).await?;
                send.write_all(&serde_json::to_vec(&held)?).await?;
            }
            Err(reason) => return deny(send, reason).await,
        },
        Request::Files { signed, copies } => match job_files(shared, signed, copies).await {
            Ok(files) => {
                frame::write_message(&mut send, &Gate::Open).await?;
                send.write_all(&serde_json::to_vec(&files)?).await?;
            }
            Err(reason) => return deny(send, reason).await,
        },
        Request::Blobs(signed) => {
            let asks = exchange::read_asks(&mut receive, exchange::ASKS_MAX).await?;
            let allowed = match allow_blobs(shared, signed, &asks).await {
                Ok(allowed) => allowed,
                Err(reason) => return deny(send, reason).await,
            };
            frame::write_message(&mut send, &Gate::Open).await?;
            give(shared, allowed, asks, &mut send).await?;
        }
        Request::Inputs { spec, certificate } => {
            let asks = exchange::read_asks(&mut receive, exchange::ASKS_MAX).await?;
            let allowed = match allow_inputs(shared, from, spec, certificate, &asks).await {
                Ok(allowed) => allowed,
                Err(reason) => return deny(send, reason).await,
            };
            frame::write_message(&mut send, &Gate::Open).await?;
            give(shared, allowed, asks, &mut send).await?;
        }
        Request::Copies { spec, links } => {
            let asks = exchange::read_asks(&mut receive, exchange::ASKS_MAX).await?;
            let allowed = match allow_copies(shared, from, spec, links, &asks).await {
                Ok(allowed) => allowed,
                Err(reason) => return deny(send, reason).await,
            };
            frame::write_message(&mut send, &Gate::Open).await?;
            give(shared, allowed, asks, &mut send).await?;
        }
        Request::Tail { spec, links, attempt, rank, from: offset, follow } => {
            let spec = match check_keeper(shared, from, spec, links).await {
                Ok(spec) => spec,
                Err(reason) => return deny(send, reason).await,
            };
            frame::write_message(&mut send, &Gate::Open).await?;
            let id = WorkId { job: spec.job, attempt, rank };
            let mut log = LogReader::of_rank(shared, id, offset, follow);
            while let Some(chunk) = until_unwanted(&mut send, log.next()).await? {
                send.write_all(&chunk.bytes).await?;
            }
        }
        Request::Removal(spec) => {
            let removal = space::removal(shared, spec).await?;
            frame::write_message(&mut send, &removal).await?;
        }
        Request::Left(jobs) => {
            let left = parting::answer(shared, jobs).await?;
            frame::write_message(&mut send, &left).await?;
        }
        Request::Survey(signed) => {
            let surveyed = survey(shared, signed).await.map_err(|e| format!("{e:#}"));
            frame::write_message(&mut send, &surveyed).await?;
        }
        Request::Recover(signed) => {
            let recovered = recover(shared, signed).await.map_err(|e| format!("{e:#}"));
            frame::write_message(&mut send, &recovered).await?;
        }
        Request::Probe(probe) => {
            let probed = super::standing::probe(shared, from, &probe, connection.as_ref()).await;
            frame::write_message(&mut send, &probed).await?;
        }
        Request::ConnectBack { lane } => {
            let connected = super::reach::connect_back(shared, from, lane).await;
            let connected = connected.map_err(|e| format!("{e:#}"));
            frame::write_message(&mut send, &connected).await?;
        }
        Request::Connected { lane } => {
            let connection = connection.context("not on a connection of the data plane")?;
            shared.endpoint.adopt(connection, DATA.alpn, lane);
            frame::write_message(&mut send, &()).await?;
        }
        Request::Push { root, manifest_bytes } => {
            let taken = push::take(shared, from, root, manifest_bytes, &mut send, &mut receive);
            if let Err(reason) = taken.await {
                warn!(%from, reason = format!("{reason:#}"), "a submitter's tree was not taken");
                return deny(send, reason).await;
            }
        }
    }
    send.finish()?;
    Ok(())
}

/// What comes next, or nothing once the asker has gone away.
async fn until_unwanted<T>(
    send: &mut SendStream,
    next: impl Future<Output = anyhow::Result<Option<T>>>,
) -> anyhow::Result<Option<T>> {
    tokio::select! {
        next = next => next,
        _ = send.stopped() => Ok(None),
    }
}

/// Blobs of the store that somebody may have: to that person, it has no others.
pub(crate) struct Allowed {
    store: BlobStore,
    ids: BTreeSet<BlobId>,
}

impl Source for Allowed {
    fn open(&self, id: &BlobId) -> std::io::Result<Option<OpenBlob>> {
        if self.ids.contains(id) { self.store.open(id) } else { Ok(None) }
    }
}

/// Sends blobs, at the pace of all that is sent.
async fn give(
    shared: &Shared,
    allowed: Allowed,
    asks: Vec<Ask>,
    send: &mut SendStream,
) -> Result<(), exchange::SendError> {
    let source: Arc<dyn Source> = Arc::new(allowed);
    exchange::send_blobs(source, asks, send, &shared.bandwidth.upload, |_| {}).await?;
    Ok(())
}

async fn deny(mut send: SendStream, reason: anyhow::Error) -> anyhow::Result<()> {
    frame::write_message(&mut send, &Gate::closed(&reason)).await?;
    send.finish()?;
    Ok(())
}

/// Carry out a user's request here.
pub(crate) async fn user(shared: &Arc<Shared>, signed: SignedBytes) -> anyhow::Result<UserAnswer> {
    let reply = shared.act(move |peer, now| peer.handle_user_request(&signed, now)).await?;
    let (readings, space) = match &reply {
        Reply::Node(_) => (readings(shared), Some(space::describe(shared))),
        _ => (Vec::new(), None),
    };
    Ok(UserAnswer { reply, readings, space })
}

fn readings(shared: &Shared) -> Vec<GpuReading> {
    let known = shared.readings();
    let describe = |gpu: &p2pit_protocol::inventory::Gpu| {
        let reading: Option<&gpu::GpuReading> = known.iter().find(|r| r.uuid == gpu.uuid);
        let processes = reading.and_then(|r| r.compute_processes.clone()).unwrap_or_default();
        GpuReading {
            uuid: gpu.uuid.to_string(),
            simulated: gpu.simulated,
            utilisation_percent: reading.and_then(|r| r.utilisation_percent),
            memory_used_bytes: reading.and_then(|r| r.memory_used_bytes),
            memory_total_bytes: gpu.memory_bytes,
            temperature_celsius: reading.and_then(|r| r.temperature_celsius),
            power_milliwatts: reading.and_then(|r| r.power_milliwatts),
            compute_processes: processes.iter().map(|p| (p.pid, p.memory_used_bytes)).collect(),
        }
    };
    shared.capacity.gpus.iter().map(describe).collect()
}

/// A record kept here, as it changes.
pub(crate) struct Views {
    shared: Arc<Shared>,
    user: UserId,
    job: JobId,
    changes: tokio::sync::watch::Receiver<u64>,
    last: Option<JobView>,
}

impl Views {
    pub(crate) async fn open(shared: &Arc<Shared>, signed: SignedBytes) -> anyhow::Result<Self> {
        let checked = shared.act(move |peer, now| peer.check_user(&signed, now)).await?;
        let (user, command) = checked.map_err(anyhow::Error::msg)?;
        let Command::Job(job) = command else { bail!("the request is not to describe a job") };
        let changes = shared.watch_record(job).await?;
        let shared = Arc::clone(shared);
        Ok(Self { shared, user, job, changes, last: None })
    }

    /// The next view; `None` after the one that says done and is known to be chosen, or for a
    /// job not kept here.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<JobView>> {
        while !self.last.as_ref().is_some_and(JobView::is_final) {
            // Marked as seen before it is read: no change falls in between.
            self.changes.borrow_and_update();
            let (user, job) = (self.user, self.job);
            let view = self.shared.act(move |peer, now| peer.job_view_for(user, job, now)).await?;
            let Some(view) = view else { return Ok(None) };
            let is_same = |last: &JobView| {
                (last.epoch, last.seq) == (view.epoch, view.seq)
                    && last.is_final() == view.is_final()
            };
            if !self.last.as_ref().is_some_and(is_same) {
                self.last = Some(view.clone());
                return Ok(Some(view));
            }
            self.changes.changed().await.context("the daemon is ending")?;
        }
        Ok(None)
    }
}

/// Whether a signed request lets its user read a job's log and files on this node.
pub(super) async fn may_read(
    shared: &Arc<Shared>,
    signed: SignedBytes,
) -> anyhow::Result<(JobId, Command)> {
    let checked = shared.act(move |peer, now| peer.check_user(&signed, now)).await?;
    let (user, command) = checked.map_err(anyhow::Error::msg)?;
    let (Command::Log(job) | Command::Files(job)) = command else {
        bail!("the request is not to read a job's log or files");
    };
    let dirs = [shared.job_dir(job), shared.copies.shelf().job_dir(job)];
    let Some(dir) = dirs.into_iter().find(|dir| dir.join(work::SPEC_FILE).exists()) else {
        let kept = humantime::format_duration(shared.settings.keep_done);
        bail!(
            "job {} left nothing on this node, or it is gone: what finished jobs left stays for \
             {kept} here (`keep_done`)",
            short(job)
        );
    };
    let spec = tokio::task::spawn_blocking(move || work::read_spec(&dir)).await??;
    let owner = spec.spec.owner;
    if !shared.act(move |peer, _| peer.may_read(user, owner)).await? {
        bail!("only the owner of job {} and admins of the pool may read it", short(job));
    }
    Ok((job, command))
}

pub(super) fn short(job: JobId) -> String {
    job.to_string().chars().take(8).collect()
}

/// The trees of a job's ranks on this node.
pub(crate) async fn job_files(
    shared: &Arc<Shared>,
    signed: SignedBytes,
    copies: bool,
) -> anyhow::Result<JobFiles> {
    let (job, _) = may_read(shared, signed).await?;
    if copies {
        files::copied_trees(shared, job).await
    } else {
        files::live_trees(shared, job).await
    }
}

/// Those of the blobs asked for that are of the job of a signed request.
pub(crate) async fn allow_blobs(
    shared: &Arc<Shared>,
    signed: SignedBytes,
    asks: &[Ask],
) -> anyhow::Result<Allowed> {
    let (job, _) = may_read(shared, signed).await?;
    let ids: Vec<BlobId> = asks.iter().map(|ask| ask.id).collect();
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || {
        let mut allowed = BTreeSet::new();
        for id in ids {
            if files::is_of_job(&shared, job, None, &id)? {
                allowed.insert(id);
            }
        }
        Ok(Allowed { store: shared.store.clone(), ids: allowed })
    })
    .await?
}

/// Those of the blobs asked for that are inputs of the job, if the asking node may have
/// them: a value of the job's record named it, the job is one of this pool and not over as
/// far as is known here, and this node has the trees as that owner's.
async fn allow_inputs(
    shared: &Arc<Shared>,
    from: PeerId,
    spec: SignedBytes,
    certificate: Certificate,
    asks: &[Ask],
) -> anyhow::Result<Allowed> {
    let spec = tokio::task::spawn_blocking(move || VerifiedSpec::verify(spec)).await??;
    let (job, owner) = (spec.job, spec.spec.owner);
    let spec = Arc::new(spec);
    let (asked, proof) = (Arc::clone(&spec), certificate);
    let (pool, admitted, is_over, is_known, recorded, value) = shared
        .act(move |peer, _| {
            let state = peer.roster().state();
            let newest = proof.links.last().map_or(&asked.spec.keepers, |link| &link.next);
            let members = newest.iter().filter(|(keeper, _)| state.nodes.contains_key(keeper));
            // Some may have left since; a majority that never was here is nobody's word.
            let admitted =
                state.is_member_user(owner) && members.count() >= quorum_of(newest.len());
            let record = peer.record(job);
            let is_over = record.is_some_and(|kept| kept.value.body.state() == State::Done);
            let is_known = record.is_some() || peer.work_spec(job).is_some();
            let value = peer.check_certificate(&proof, &asked);
            let recorded = record.map(|kept| trees_of(&kept.value.body)).unwrap_or_default();
            (peer.pool(), admitted, is_over, is_known, recorded, value)
        })
        .await?;
    if spec.spec.pool != pool || !admitted {
        bail!("job {} is not of this pool", short(job));
    }
    if is_over {
        bail!("job {} is over", short(job));
    }
    let body = value.map_err(anyhow::Error::msg)?.body;
    if !body.nodes().contains(&from) {
        bail!("the record of job {} does not name {from}", short(job));
    }
    let ids: Vec<BlobId> = asks.iter().map(|ask| ask.id).collect();
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || {
        let mut allowed = BTreeSet::new();
        for root in spec.inputs() {
            // Who names a tree in a job of his own has not shown that it is his.
            if is_known || files::is_of_owner(&shared, owner, root)? {
                allow_tree(&shared, root, &ids, &mut allowed)?;
            }
        }
        for saved in &body.saved {
            if recorded.contains(&saved.tree) || files::is_of_job(&shared, job, None, &saved.tree)?
            {
                allow_tree(&shared, saved.tree, &ids, &mut allowed)?;
            }
        }
        Ok(Allowed { store: shared.store.clone(), ids: allowed })
    })
    .await?
}

/// Allows those of the blobs asked for that are of a tree, if that is here.
fn allow_tree(
    shared: &Shared,
    root: BlobId,
    ids: &[BlobId],
    allowed: &mut BTreeSet<BlobId>,
) -> anyhow::Result<()> {
    if shared.store.has(&root) {
        let blobs = shared.served.blobs_of(&shared.store, root)?;
        allowed.extend(ids.iter().filter(|id| blobs.contains(id)));
    }
    Ok(())
}

/// The job of this spec, where its links show that `from` keeps it.
async fn check_keeper(
    shared: &Arc<Shared>,
    from: PeerId,
    spec: SignedBytes,
    links: Vec<Link>,
) -> anyhow::Result<Arc<VerifiedSpec>> {
    let spec = tokio::task::spawn_blocking(move || VerifiedSpec::verify(spec)).await??;
    let (job, spec) = (spec.job, Arc::new(spec));
    let asked = Arc::clone(&spec);
    let (pool, is_admitted, keepers, known) = shared
        .act(move |peer, _| {
            // Links that are known here and not to the asker may have taken the job from it; who
            // only runs a rank of it has them of what named this node.
            let kept = peer.record(job).map(|kept| &kept.certificate.links);
            let works = peer.book().1.filter(|work| work.id.job == job);
            let known = works.map(|work| &work.certificate.links).chain(kept);
            let known = newer_keepers(known.map(Vec::as_slice), &links);
            (
                peer.pool(),
                peer.roster().state().is_member_user(asked.spec.owner),
                peer.check_links(&links, &asked),
                known,
            )
        })
        .await?;
    if spec.spec.pool != pool || !is_admitted {
        bail!("job {} is not of this pool", short(job));
    }
    let keepers = keepers.map_err(anyhow::Error::msg)?;
    let keeps = |keepers: &[Keeper]| keepers.iter().any(|(keeper, _)| *keeper == from);
    if !keeps(&keepers) || known.is_some_and(|known| !keeps(&known)) {
        bail!("{from} does not keep job {}", short(job));
    }
    Ok(spec)
}

/// The keepers of now, by the longest of the links that are `known` here, where they lead further
/// than those that are `shown`.
fn newer_keepers<'a>(
    known: impl Iterator<Item = &'a [Link]>,
    shown: &[Link],
) -> Option<Vec<Keeper>> {
    let longest = known.max_by_key(|links| links.len())?;
    let last = longest.last().filter(|_| longest.len() > shown.len())?;
    Some(last.next.clone())
}

/// Those of the blobs asked for that a keeper of the job is to hold: its inputs, and what its
/// ranks left or have saved, where this node has them as that job's.
async fn allow_copies(
    shared: &Arc<Shared>,
    from: PeerId,
    spec: SignedBytes,
    links: Vec<Link>,
    asks: &[Ask],
) -> anyhow::Result<Allowed> {
    if let Some(trees) = left_by(shared, from, spec.clone()).await? {
        let (shared, ids) = (Arc::clone(shared), asks.iter().map(|ask| ask.id).collect::<Vec<_>>());
        let allowed = tokio::task::spawn_blocking(move || {
            let mut allowed = BTreeSet::new();
            for root in trees {
                allow_tree(&shared, root, &ids, &mut allowed)?;
            }
            anyhow::Ok(Allowed { store: shared.store.clone(), ids: allowed })
        });
        return allowed.await?;
    }
    let spec = check_keeper(shared, from, spec, links).await?;
    let (job, owner) = (spec.job, spec.spec.owner);
    let (is_recorded, recorded) = shared
        .act(move |peer, _| {
            let record = peer.record(job);
            let body = record.map(|kept| &kept.value.body);
            let trees = body.map(trees_of).unwrap_or_default();
            (record.is_some() || peer.work_spec(job).is_some(), trees)
        })
        .await?;
    let ids: Vec<BlobId> = asks.iter().map(|ask| ask.id).collect();
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || {
        let is_known = is_recorded || shared.job_dir(job).join(work::SPEC_FILE).exists();
        let mut allowed = BTreeSet::new();
        for root in spec.inputs() {
            // See `allow_inputs`.
            if is_known || files::is_of_owner(&shared, owner, root)? {
                allow_tree(&shared, root, &ids, &mut allowed)?;
            }
        }
        for root in recorded {
            allow_tree(&shared, root, &ids, &mut allowed)?;
        }
        for id in &ids {
            if !allowed.contains(id) && files::is_of_job(&shared, job, Some(from), id)? {
                allowed.insert(*id);
            }
        }
        Ok(Allowed { store: shared.store.clone(), ids: allowed })
    })
    .await?
}

/// What ranks of a job left on `from`, which does not keep it, as the record here says; `None`
/// where that is nothing. It may have back what went bad there.
async fn left_by(
    shared: &Arc<Shared>,
    from: PeerId,
    spec: SignedBytes,
) -> anyhow::Result<Option<Vec<BlobId>>> {
    let spec = tokio::task::spawn_blocking(move || VerifiedSpec::verify(spec)).await??;
    let left = move |peer: &mut Peer, _| {
        let kept = peer.record(spec.job)?;
        if kept.keepers.iter().any(|(keeper, _)| *keeper == from) {
            return None;
        }
        let ranks = kept.value.body.ranks.iter().filter(|it| it.assignment.node == from);
        let ends = ranks.filter_map(|rank| rank.end.as_ref());
        let trees: Vec<BlobId> =
            ends.flat_map(|end| end.keep.into_iter().chain(end.artifacts)).collect();
        (!trees.is_empty()).then_some(trees)
    };
    Ok(shared.act(left).await?)
}

/// What a record says that its ranks left or saved.
fn trees_of(body: &Body) -> Vec<BlobId> {
    let ends = body.ranks.iter().filter_map(|rank| rank.end.as_ref());
    let left = ends.flat_map(|end| end.keep.into_iter().chain(end.artifacts));
    left.chain(body.saved.iter().map(|saved| saved.tree)).collect()
}

/// What this node has of the record of a job, for somebody who may have it recovered.
pub(crate) async fn survey(shared: &Arc<Shared>, signed: SignedBytes) -> anyhow::Result<Surveyed> {
    let checked = shared.act(move |peer, now| peer.check_user(&signed, now)).await?;
    let (user, command) = checked.map_err(anyhow::Error::msg)?;
    let Command::Job(job) = command else { bail!("the request is not to describe a job") };
    let surveyed =
        shared.act_watching(move |peer, absence, now| survey_of(peer, absence, user, job, now));
    surveyed.await?.map_err(anyhow::Error::msg)
}

fn survey_of(
    peer: &Peer,
    absence: &Absence,
    user: UserId,
    job: JobId,
    now: Now,
) -> Result<Surveyed, String> {
    let unknown = "this node does not keep the record";
    let kept = peer.record(job).ok_or(unknown)?;
    if !peer.roster().state().may_control_job(user, kept.spec.spec.owner) {
        let job = short(job);
        return Err(format!("only the owner of job {job} and admins of the pool may recover it"));
    }
    let me = (peer.id(), peer.store());
    let (present, wait_ms) = presence(peer, absence, &kept.keepers, now);
    // Those that are lost must not be named again, as long as they are still remembered.
    let next = peer.propose_keepers(&job.0).into_iter();
    let next = next.filter(|keeper| *keeper != me && peer.board().is_connected(keeper.0));
    // A steward that cannot have its proposal chosen has accepted it itself.
    let (accepted, value) = peer.accepted(job).ok_or(unknown)?;
    Ok(Surveyed {
        epoch: value.epoch,
        accepted,
        seq: value.seq,
        value_hash: value.hash(),
        keepers: kept.keepers.iter().map(|(keeper, _)| *keeper).collect(),
        present,
        wait_s: wait_ms.div_ceil(1_000),
        next: core::iter::once(me).chain(next).collect(),
    })
}

/// How long a keeper must have been away, on the boot clock, before anybody may give it up for
/// lost: longer than a restart takes, or a cut that heals by itself.
const LOST_AFTER_MS: u64 = 60_000;

/// Since when, on the boot clock, nodes have been away.
#[derive(Debug)]
pub(super) struct Absence {
    /// When this node began to look.
    since_ms: u64,
    left_ms: BTreeMap<PeerId, u64>,
}

impl Absence {
    pub(super) fn new(now: Now) -> Self {
        Self { since_ms: now.boot_ms, left_ms: BTreeMap::new() }
    }

    pub(super) fn note_gone(&mut self, node: PeerId, now: Now) {
        self.left_ms.insert(node, now.boot_ms);
    }

    /// How long until a node that is away now may be given up.
    fn wait_ms(&self, node: PeerId, now: Now) -> u64 {
        let since_ms = self.left_ms.get(&node).copied().unwrap_or(self.since_ms);
        since_ms.saturating_add(LOST_AFTER_MS).saturating_sub(now.boot_ms)
    }
}

/// Of these keepers, this node and those it is connected to that still have their stores; and
/// for how many milliseconds too many of the others have not been away for long enough.
fn presence(peer: &Peer, absence: &Absence, keepers: &[Keeper], now: Now) -> (Vec<PeerId>, u64) {
    let board = peer.board();
    let has_store = |node: PeerId, store| {
        if node == peer.id() {
            store == peer.store()
        } else {
            board.get(node).is_none_or(|posted| posted.advert.store == store)
        }
    };
    let (mut present, mut waits) = (Vec::new(), Vec::new());
    for (node, store) in keepers {
        if *node == peer.id() || board.is_connected(*node) {
            // One that is here with another store lost this one for good.
            if has_store(*node, *store) {
                present.push(*node);
            }
        } else {
            waits.push(absence.wait_ms(*node, now));
        }
    }
    let wait_ms = wait_for_loss(keepers.len(), present.len(), waits);
    (present, wait_ms)
}

/// How long until so few keepers are left, those `present` and those that may not be given up
/// yet, that they are no majority; 0 where that is so, or will not be.
fn wait_for_loss(keepers: usize, present: usize, mut waits_ms: Vec<u64>) -> u64 {
    let quorum = quorum_of(keepers);
    waits_ms.retain(|wait_ms| *wait_ms > 0);
    waits_ms.sort_unstable();
    let left = present + waits_ms.len();
    if present >= quorum || left < quorum {
        return 0;
    }
    // The first of these to be given up bring what is left below a majority.
    waits_ms.get(left - quorum).copied().unwrap_or(0)
}

/// Go on from what this node has of a record, as its owner or an admin says.
pub(crate) async fn recover(shared: &Arc<Shared>, signed: SignedBytes) -> anyhow::Result<()> {
    let recovered = shared.act_watching(move |peer, absence, now| {
        let forced: ForceRecover = p2pit_protocol::wire::decode(&signed.bytes)
            .map_err(|e| format!("the request cannot be read ({e}): is one side older?"))?;
        let keepers = peer.record(forced.job).map(|kept| kept.keepers.clone()).unwrap_or_default();
        let (present, wait_ms) = presence(peer, absence, &keepers, now);
        if !keepers.is_empty() && present.len() >= quorum_of(keepers.len()) {
            return Err("a majority of its keepers can be reached: nothing is lost".to_owned());
        }
        if wait_ms > 0 {
            return Err(format!(
                "keepers that have been away for less than {} s are not lost yet: try again in \
                 {} s",
                LOST_AFTER_MS / 1_000,
                wait_ms.div_ceil(1_000)
            ));
        }
        peer.recover(signed, now)
    });
    recovered.await?.map(drop).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::{StoreId, identity::KeyPair, record::LinkProof};

    use super::*;

    #[test]
    fn links_that_lead_further_than_those_shown_say_who_keeps() {
        let keeper = |n: u8| (PeerId(KeyPair::from_seed(&[n; 32]).public()), StoreId([n; 16]));
        let link = |n| Link { next: vec![keeper(n)], proof: LinkProof::Sealed(Vec::new()) };
        let links = [link(1), link(2)];
        // Of the work here, which knows more than the record, or the other way round.
        for known in [[&links[..1], &links[..]], [&links[..], &links[..0]]] {
            let newer = |shown: &[Link]| newer_keepers(known.into_iter(), shown);
            assert_eq!(newer(&[]), Some(vec![keeper(2)]));
            assert_eq!(newer(&links[..1]), Some(vec![keeper(2)]));
            assert_eq!(newer(&links), None);
        }
        assert_eq!(newer_keepers(core::iter::empty(), &[]), None, "nothing is known here");
    }

    #[test]
    fn keepers_are_given_up_only_once_they_have_been_away_for_long_enough() {
        let now = |boot_ms| Now { boot_ms, wall_ms: 0 };
        let node = PeerId(KeyPair::from_seed(&[1; 32]).public());
        let mut absence = Absence::new(now(5_000));
        assert_eq!(absence.wait_ms(node, now(6_000)), 59_000, "it was never seen since the start");
        absence.note_gone(node, now(70_000));
        assert_eq!(absence.wait_ms(node, now(70_001)), 59_999);
        assert_eq!(absence.wait_ms(node, now(130_000)), 0);
        // It came back meanwhile, and went again.
        absence.note_gone(node, now(140_000));
        assert_eq!(absence.wait_ms(node, now(150_000)), 50_000);
    }

    #[test]
    fn a_record_waits_until_what_is_left_is_no_majority() {
        for (keepers, present, waits, wait_ms) in [
            (3, 1, vec![0, 0], 0),
            (3, 1, vec![0, 7], 7),
            (3, 1, vec![9, 7], 9),
            (3, 2, vec![7], 0),
            (5, 2, vec![0, 9, 7], 9),
            (5, 2, vec![0, 0, 7], 7),
            (5, 1, vec![4, 9, 7, 0], 7),
            (2, 1, vec![7], 7),
            (1, 0, vec![7], 7),
        ] {
            let case = format!("{present} of {keepers}, {waits:?}");
            assert_eq!(wait_for_loss(keepers, present, waits), wait_ms, "{case}");
        }
    }
}
