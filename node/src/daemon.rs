//! The daemon: one `p2pit_protocol::Peer` with a network, a disk, GPUs and processes.
//!
//! `core` owns the peer and lets nothing out before the journal has it. Around it,
//! `work` runs ranks, `serve` answers other nodes on the data plane, `reach` finds
//! and asks them, `join` founds and joins pools, and `crate::api` serves this
//! machine's users. They share `Shared` and speak to the core through closures.

mod addresses;
mod anew;
pub(crate) mod bundle;
mod clock;
mod copies;
mod core;
pub(crate) mod doctor;
pub(crate) mod fetch;
mod files;
mod join;
pub(crate) mod logs;
pub(crate) mod parting;
pub(crate) mod push;
mod reach;
mod saves;
pub(crate) mod serve;
pub(crate) mod space;
pub(crate) mod standing;
mod work;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU64,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use p2pit_protocol::{
    BootId, JobId, Now, Peer, PeerId, StoreId,
    bidder::WorkId,
    identity::{KeyPair, SignedBytes},
    inventory::{Capacity, Gpu, GpuUuid},
    job::{State, VerifiedSpec},
    message::{Advert, Head},
    peer::{Slot, SubmitError},
    roster::Roster,
    wire,
};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::{info, warn};

pub use self::clock::wall_ms;
pub(crate) use self::{
    clock::now,
    reach::{ASK_TIMEOUT, ReachError, ShutOut},
};
use self::{
    copies::{Copies, Shelf},
    core::Input,
    work::Work,
};
use crate::{
    api::types::HandedOver,
    config::{Rate, Settings},
    executor::{Executor, Isolation, SupervisorCommand},
    gpu::{GpuLock, GpuLocks, GpuMonitor, GpuReading, GpuSource, Health, foreign_use},
    home::{Home, KeyKind, Ports, load_or_create_key},
    journal::{self, Entries, JournalHandle},
    network::{Network, NetworkConfig},
    store::{PeerEntry, Store},
    transfer::{
        BlobStore, Pace,
        endpoint::{DATA, DOOR, Endpoint},
    },
    workspace::{HostPolicy, Names, Workspace},
};

/// For how long a full disk is taken for a passing thing by those who wait for an answer.
const ROOM_PATIENCE: Duration = Duration::from_secs(2);
/// How long other keepers may take to take over what a node drives that is about to go.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(3);
const HAND_OVER_POLL: Duration = Duration::from_millis(50);
/// A change of the record that is under way keeps it from being handed over; one that takes
/// longer than this is not waited for.
const HAND_OVER_STALL: Duration = Duration::from_millis(500);

/// How a daemon is run.
#[derive(Debug)]
pub struct Options {
    /// Where everything it keeps is.
    pub home: Home,
    /// What it offers and where it listens.
    pub settings: Settings,
    /// Started for a single command: offers nothing, and ends after this long without a
    /// request, a live record or a running process.
    pub idle_exit: Option<Duration>,
}

/// Everything the daemon's tasks have in common.
pub(crate) struct Shared {
    pub(crate) home: Home,
    pub(crate) settings: Settings,
    pub(crate) key: KeyPair,
    pub(crate) store_id: StoreId,
    pub(crate) boot: BootId,
    pub(crate) boot_count: u64,
    pub(crate) store: BlobStore,
    pub(crate) index: Store,
    /// On their way into the index.
    pub(crate) addresses: addresses::Addresses,
    pub(crate) bandwidth: Bandwidth,
    pub(crate) endpoint: Endpoint,
    pub(crate) executor: Executor,
    pub(crate) isolation: Isolation,
    pub(crate) work: Work,
    pub(crate) copies: Copies,
    pub(crate) capacity: Capacity,
    pub(crate) locked_gpus: Vec<String>,
    /// How others reach this node.
    pub(crate) standing: standing::Standing,
    pub(crate) shut: reach::Shut,
    /// How often this node has begun to listen elsewhere, or to be passed on for by others.
    moves: AtomicU64,
    /// Wakes the task that keeps connections to members.
    pub(crate) reach_changed: Notify,
    /// Wakes who waits for something that others say, or for their coming.
    pub(crate) heard: Notify,
    pub(crate) shutdown: Notify,
    pub(crate) journal: Arc<journal::Counts>,
    on_demand: bool,
    inputs: mpsc::Sender<Input>,
    members: Arc<RwLock<BTreeSet<PeerId>>>,
    network: Mutex<Option<Network>>,
    readings: Mutex<Vec<GpuReading>>,
    warnings: Mutex<Vec<String>>,
    /// Names of member nodes, for messages.
    names: RwLock<BTreeMap<PeerId, String>>,
    /// Members that do not let this node in, and why, where its owner can help it.
    shut_out: Mutex<BTreeMap<PeerId, String>>,
    /// GPUs whose last process left something behind.
    quarantined: Mutex<BTreeSet<GpuUuid>>,
    ending: AtomicBool,
    /// The journal cannot be written for want of room, and the core waits for that.
    waits_for_room: watch::Sender<bool>,
    submitted: Mutex<Submitted>,
    requests: AtomicUsize,
    last_request_ms: AtomicU64,
    served: files::Served,
    /// Apart: the store asks it for room.
    pub(crate) space: Arc<space::Space>,
    gpu_locks: Mutex<Vec<GpuLock>>,
    /// GPUs that only a supervisor of an earlier daemon has locked: not for new jobs.
    unlocked_gpus: Mutex<BTreeSet<GpuUuid>>,
}

/// Jobs submitted here whose keepers are remembered.
const SUBMITTED_MAX: usize = 1_024;

/// Jobs submitted here, the newest last: one whose submission ended without a yes may be known
/// to none but the keepers it named, and one whose submission goes on may be born yet.
#[derive(Debug, Default)]
pub(crate) struct Submitted(Vec<Submission>);

/// A job submitted here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Submission {
    pub(crate) job: JobId,
    pub(crate) keepers: Vec<PeerId>,
    /// How many submissions of it go on.
    under_way: usize,
}

impl Submission {
    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way > 0
    }
}

impl Submitted {
    fn begin(&mut self, job: JobId, keepers: Vec<PeerId>) {
        let known = self.0.iter().position(|known| known.job == job);
        let before = known.map_or(0, |at| self.0.remove(at).under_way);
        let more = (self.0.len() + 1).saturating_sub(SUBMITTED_MAX);
        self.0.drain(..more);
        self.0.push(Submission { job, keepers, under_way: before + 1 });
    }

    fn end(&mut self, job: JobId) {
        if let Some(known) = self.0.iter_mut().find(|known| known.job == job) {
            known.under_way = known.under_way.saturating_sub(1);
        }
    }

    /// Those whose id begins so.
    fn starting_with(&self, prefix: &str) -> Vec<Submission> {
        self.0.iter().filter(|it| it.job.to_string().starts_with(prefix)).cloned().collect()
    }
}

/// While this lives, a job is being submitted here.
pub(crate) struct UnderWay<'a> {
    shared: &'a Shared,
    job: JobId,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        lock(&self.shared.submitted).end(self.job);
    }
}

/// How fast blobs may travel, all transfers together.
pub(crate) struct Bandwidth {
    pub(crate) upload: Pace,
    pub(crate) download: Pace,
}

impl Bandwidth {
    fn of(settings: &Settings) -> Self {
        let pace = |rate: Option<Rate>| {
            let limit = rate.and_then(|rate| NonZeroU64::new(rate.0));
            limit.map_or_else(Pace::unlimited, Pace::of)
        };
        Self { upload: pace(settings.upload), download: pace(settings.download) }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("home", &self.home).finish_non_exhaustive()
    }
}

/// The core has ended, or this node is in no pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoPeer {
    #[error("this node is in no pool")]
    NoPool,
    #[error("the daemon is ending")]
    Ending,
}

/// Run until a signal, a shutdown request or the idle time ends it. `ready` is called once
/// the API answers.
///
/// # Errors
/// What kept it from starting, or broke it.
pub async fn run(options: Options, ready: impl FnOnce() + Send) -> anyhow::Result<()> {
    let Options { home, settings, idle_exit } = options;
    // libp2p's QUIC would write the secrets of its connections there.
    if std::env::var_os("SSLKEYLOGFILE").is_some() {
        anyhow::bail!("SSLKEYLOGFILE is set: unset it, or the pool's traffic could be read");
    }
    let (journal, mut recovered) = anew::open_journal(&home)?;
    for note in &recovered.notes {
        warn!(note, "journal");
    }
    let (key, _) = load_or_create_key(&home.node_key(), KeyKind::Node)?;
    let store = space::open_store(&home.blobs())?;
    let index = Store::open(&home.index())?;
    let on_demand = idle_exit.is_some();
    let source = if on_demand || settings.client {
        GpuSource::None
    } else {
        GpuSource::probe(&settings.gpus, &PeerId(key.public()).to_string())
    };
    let LockedGpus { gpus, locks, unlocked, taken: locked_gpus } = lock_gpus(&source, &home)?;
    let capacity = if on_demand || settings.client {
        Capacity::default()
    } else {
        Capacity::new(gpus, settings.cpus, settings.memory_mib)
    };
    if !on_demand && let Err(reason) = home.remember_offer(&capacity) {
        warn!(%reason, "what this machine offers is not remembered");
    }
    let executor = Executor::new(&home.run(), SupervisorCommand::of_this_program()?)?;
    let isolation = executor.probe().await;
    std::fs::create_dir_all(home.jobs())
        .and_then(|()| crate::workspace::admit_jobs(&home.jobs(), &isolation))
        .with_context(|| format!("cannot use {}", home.jobs().display()))?;
    let members: Arc<RwLock<BTreeSet<PeerId>>> = Arc::default();
    let endpoint = bind_data_plane(&home, &settings, &key, &members)?;
    let bandwidth = Bandwidth::of(&settings);
    let (inputs, received) = mpsc::channel(core::INPUTS_MAX);
    let (journal, journal_thread) = JournalHandle::spawn(journal)?;
    let mut boot = [0; 16];
    getrandom::fill(&mut boot).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    let copies = Copies::new(Shelf::at(home.copies()));
    let shared = Arc::new(Shared {
        store_id: recovered.store_id,
        boot: BootId(boot),
        boot_count: recovered.boot_counter,
        home,
        settings,
        key,
        store,
        index,
        addresses: addresses::Addresses::default(),
        bandwidth,
        endpoint,
        executor,
        isolation,
        work: Work::default(),
        copies,
        capacity,
        locked_gpus,
        standing: standing::Standing::default(),
        shut: reach::Shut::default(),
        moves: AtomicU64::new(0),
        reach_changed: Notify::new(),
        heard: Notify::new(),
        shutdown: Notify::new(),
        journal: journal.counts(),
        on_demand,
        inputs,
        members,
        network: Mutex::default(),
        readings: Mutex::default(),
        warnings: Mutex::new(recovered.notes.clone()),
        names: RwLock::default(),
        shut_out: Mutex::default(),
        quarantined: Mutex::default(),
        ending: AtomicBool::new(false),
        waits_for_room: watch::channel(false).0,
        submitted: Mutex::default(),
        requests: AtomicUsize::new(0),
        last_request_ms: AtomicU64::new(clock::now().boot_ms),
        served: files::Served::default(),
        space: Arc::default(),
        gpu_locks: Mutex::new(locks),
        unlocked_gpus: Mutex::new(unlocked),
    });
    let home = shared.home.clone();
    tokio::spawn(addresses::keep_writing(Arc::clone(&shared)));
    let mut core = tokio::spawn(core::run(Arc::clone(&shared), journal, received));
    resume(&shared, std::mem::take(&mut recovered.entries)).await?;
    space::begin(&shared).await?;
    tokio::spawn(serve::accept(Arc::clone(&shared)));
    tokio::spawn(reach::tend(Arc::clone(&shared)));
    tokio::spawn(standing::watch(Arc::clone(&shared)));
    watch_gpus(&shared, source)?;
    let api = crate::api::server::Server::bind(Arc::clone(&shared))?;
    let api = tokio::spawn(api.run());
    ready();
    info!(version = env!("CARGO_PKG_VERSION"), "the daemon is ready");
    let ended = tokio::select! {
        ended = &mut core => Some(ended),
        () = shared.shutdown.notified() => None,
        () = idle(&shared, idle_exit) => None,
        reason = signal() => { info!(reason = reason?, "ending"); None }
    };
    let result = match ended {
        Some(ended) => ended.context("the core broke")?,
        None => {
            shared.hand_over_before_the_end().await;
            shared.ending.store(true, Ordering::Relaxed);
            // Fails where the core has ended by itself meanwhile.
            let _ = shared.inputs.send(Input::Shutdown).await;
            core.await.context("the core broke")?
        }
    };
    api.abort();
    crate::api::server::remove_socket(&shared.home);
    if let Some(network) = shared.network() {
        network.close().await;
    }
    shared.endpoint.close().await;
    shared.addresses.write(&shared.index);
    if let Err(reason) = shared.index.flush() {
        warn!(%reason, "the index was not flushed");
    }
    drop(shared);
    journal_thread.closed().await;
    match result {
        Err(reason) if reason.is::<core::StoreRefused>() => Err(anew::give_up(&home, &reason)?),
        result => result,
    }
}

/// Build the peer from the journal, if the node is in a pool.
async fn resume(shared: &Arc<Shared>, entries: Entries) -> anyhow::Result<()> {
    let Some(genesis) = entries.get(&Slot::Genesis.to_bytes()) else {
        // Whatever runs here was started under a journal that is gone.
        let found = shared.work.adopt(shared).await?;
        let found: Vec<_> = found.into_iter().map(|(id, running, _)| (id, running)).collect();
        let ids: Vec<WorkId> = found.iter().map(|(id, _)| *id).collect();
        shared.work.end_unknown(shared, found).await;
        for id in ids {
            work::clean_if_needed(shared, id);
        }
        return Ok(());
    };
    let now = clock::now();
    let mut peer = shared.new_peer(genesis.clone())?;
    let unreadable = |reason: String| {
        anyhow::anyhow!("the journal holds what this version cannot read: {reason}")
    };
    for (key, value) in &entries {
        peer.restore(key, value, now).map_err(unreadable)?;
    }
    drop(entries);
    peer.restored().map_err(unreadable)?;
    for (_, kept) in peer.records().map(|(job, kept)| (*job, kept.clone())).collect::<Vec<_>>() {
        // Of finished ones it does not matter any more, and there may be many.
        if kept.value.body.state() == State::Done {
            continue;
        }
        for tree in kept.spec.inputs().filter(|tree| copies::has_tree(&shared.store, *tree)) {
            peer.tree_stored(tree);
        }
    }
    let adopted = shared.work.adopt(shared).await?;
    // Reported before the last daemon died, or started under a book that is gone. A node whose
    // book does not name a rank says that it knows nothing of it, and others run it then: so
    // nothing is said before its processes are over.
    let (adopted, unknown): (Vec<_>, Vec<_>) =
        adopted.into_iter().partition(|(id, ..)| peer.has_rank(*id));
    let unknown = unknown.into_iter().map(|(id, running, _)| (id, running)).collect();
    shared.work.end_unknown(shared, unknown).await;
    let alive: Vec<WorkId> = adopted.iter().map(|(id, ..)| *id).collect();
    let (shelf, store) = (shared.copies.shelf().clone(), shared.store.clone());
    let stock = tokio::task::spawn_blocking(move || copies::take_stock(&shelf, &store));
    let stock = stock.await?.context("copies of other nodes' ranks cannot be looked through")?;
    shared.become_member(peer, &alive, Vec::new()).await?;
    shared.act(move |peer, now| copies::tell(peer, stock, now)).await?;
    work::sweep(shared).await;
    for (id, running, ended) in adopted {
        if shared.act(move |peer, _| peer.has_rank(id)).await? {
            shared.work.take_up(shared, id, running, ended);
        } else {
            // Given up while the peer resumed.
            shared.work.dismiss(shared, id, running);
        }
    }
    Ok(())
}

impl Shared {
    /// Returns once the core has been waiting for room on the disk for longer than a
    /// passing shortage.
    pub(crate) async fn out_of_room(&self) {
        let mut waits = self.waits_for_room.subscribe();
        // Its sender lives as long as this.
        while waits.wait_for(|waits| *waits).await.is_ok() {
            let there_is_room = waits.wait_for(|waits| !*waits);
            if tokio::time::timeout(ROOM_PATIENCE, there_is_room).await.is_err() {
                return;
            }
        }
    }

    /// Let `act` at the peer; returns once what it caused is durable.
    pub(crate) async fn act<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Peer, Now) -> R + Send + 'static,
    ) -> Result<R, NoPeer> {
        self.act_on_state(move |state, now| match &mut state.peer {
            Some(peer) => Ok(act(peer, now)),
            None => Err(NoPeer::NoPool),
        })
        .await?
    }

    async fn act_on_state<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut core::State, Now) -> R + Send + 'static,
    ) -> Result<R, NoPeer> {
        let (reply, answer) = oneshot::channel();
        let act = Box::new(move |state: &mut core::State, now| {
            let result = act(state, now);
            Box::new(move || {
                // Whoever asked may have given up.
                let _ = reply.send(result);
            }) as Box<dyn FnOnce() + Send>
        });
        self.inputs.send(Input::Act(act)).await.map_err(|_| NoPeer::Ending)?;
        answer.await.map_err(|_| NoPeer::Ending)
    }

    /// As [`Self::act`], with what is known of how long nodes have been away.
    async fn act_watching<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Peer, &serve::Absence, Now) -> R + Send + 'static,
    ) -> Result<R, NoPeer> {
        self.act_on_state(move |state, now| match &mut state.peer {
            Some(peer) => Ok(act(peer, &state.absence, now)),
            None => Err(NoPeer::NoPool),
        })
        .await?
    }

    /// Submit a job whose keeper has its inputs.
    pub(crate) async fn submit(
        &self,
        spec: SignedBytes,
    ) -> Result<Result<(), SubmitError>, String> {
        let (settled, result) = oneshot::channel();
        let submitted = self
            .act_on_state(move |state, now| {
                let Some(peer) = &mut state.peer else { return Err(NoPeer::NoPool.to_string()) };
                let job = peer.submit(spec, now)?;
                state.submissions.insert(job, settled);
                Ok(())
            })
            .await;
        // A daemon that ends meanwhile may have sent it.
        let Ok(submitted) = submitted else { return Ok(Err(SubmitError::Unknown)) };
        submitted?;
        Ok(result.await.unwrap_or(Err(SubmitError::Unknown)))
    }

    /// Have other keepers drive the jobs that this node drives; returns once they do, or where
    /// that took long enough.
    pub(crate) async fn hand_over(&self) -> Result<HandedOver, NoPeer> {
        let before = self.act(|peer, _| peer.driven()).await?;
        let mut patience = HandOverPatience::begun(before, Instant::now());
        loop {
            let heard = self.heard.notified();
            let (under_way, left) =
                self.act(|peer, now| (peer.hand_over(now), peer.driven())).await?;
            if patience.is_over(under_way, left, Instant::now()) {
                return Ok(HandedOver { handed: before.saturating_sub(left), left });
            }
            // Woken by what others say; else it is looked at again.
            let _ = tokio::time::timeout(HAND_OVER_POLL, heard).await;
        }
    }

    /// Else the jobs driven here would stand still until others notice. Without room on the
    /// disk nothing can be handed over, and nothing that does not answer keeps a daemon from
    /// ending.
    async fn hand_over_before_the_end(&self) {
        let mut waits = self.waits_for_room.subscribe();
        let handed = tokio::select! {
            biased;
            // Its sender lives as long as this.
            _ = waits.wait_for(|waits| *waits) => {
                return warn!("the disk is full: no job can be handed over");
            }
            handed = tokio::time::timeout(2 * HAND_OVER_WITHIN, self.hand_over()) => handed,
        };
        match handed {
            Ok(Ok(HandedOver { handed: 0, left: 0 }) | Err(_)) => {}
            Ok(Ok(HandedOver { handed, left })) => info!(handed, left, "handed jobs over"),
            Err(_) => warn!("the journal does not answer: no job can be handed over"),
        }
    }

    /// A counter that changes with the record of a job kept here.
    pub(crate) async fn watch_record(
        &self,
        job: JobId,
    ) -> Result<tokio::sync::watch::Receiver<u64>, NoPeer> {
        self.act_on_state(move |state, _| {
            state.watched.retain(|_, sender| sender.receiver_count() > 0);
            state.watched.entry(job).or_insert_with(|| tokio::sync::watch::channel(0).0).subscribe()
        })
        .await
    }

    pub(crate) fn id(&self) -> PeerId {
        PeerId(self.key.public())
    }

    fn new_peer(&self, genesis: Vec<u8>) -> anyhow::Result<Peer> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
        let config = p2pit_protocol::peer::Config {
            key: self.key.clone(),
            store: self.store_id,
            boot: self.boot,
            boot_count: self.boot_count,
            genesis,
            client: self.settings.client || self.on_demand,
            seed,
            sabotage: p2pit_protocol::sabotage::Sabotage::default(),
        };
        let mut peer = Peer::new(config).context("the pool's genesis cannot be read")?;
        // Until it is known whether the clock can be gone by: see `space`.
        peer.keep_old_records(true);
        Ok(peer)
    }

    /// Start the network and hand the peer to the core.
    async fn become_member(
        self: &Arc<Self>,
        mut peer: Peer,
        alive: &[WorkId],
        mut writes: Vec<crate::journal::Write>,
    ) -> anyhow::Result<()> {
        let now = clock::now();
        let pool = peer.pool();
        let listen = self.control_listen();
        let is_free_to_move = self.settings.listen.port() == 0;
        let (network, mut events) = start_network(&self.key, pool, listen, is_free_to_move).await?;
        let ports = Ports {
            control: network.listen_addrs().first().map_or(0, SocketAddr::port),
            data: self.endpoint.local_addr()?.port(),
        };
        if let Err(reason) = self.home.remember_ports(ports) {
            warn!(%reason, "ports are not remembered");
        }
        self.set_members(peer.roster());
        network.set_members(self.members());
        for (_, advert) in self.index.board().unwrap_or_default() {
            if let Ok(signed) = wire::decode::<SignedBytes>(&advert) {
                peer.handle_gossip(p2pit_protocol::message::Soft::advert(signed), now);
            }
        }
        peer.set_addresses(network.listen_addrs(), self.data_addrs(&network), now);
        peer.set_offer(self.capacity.clone(), self.owner_only(), now);
        if self.on_demand {
            peer.set_away(self.home.offer(), now);
        }
        peer.set_foreign(self.unusable(), now);
        peer.resume(alive, now);
        while let Some(write) = peer.poll_write() {
            writes.push(crate::journal::Write { key: write.key, value: write.value });
        }
        *lock(&self.network) = Some(network.clone());
        let inputs = self.inputs.clone();
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                use crate::network::Event;
                match &event {
                    Event::ListenAddrs(_) => {
                        shared.moves.fetch_add(1, Ordering::Relaxed);
                        shared.shut.forget();
                        shared.addresses_changed().await;
                        shared.standing.changed.notify_one();
                        shared.reach_changed.notify_one();
                    }
                    Event::Relays(_) | Event::Connected(..) => {
                        shared.standing.changed.notify_one();
                    }
                    Event::Disconnected(_) => {
                        shared.standing.changed.notify_one();
                        // It may be dialled again at once.
                        shared.reach_changed.notify_one();
                    }
                    _ => {}
                }
                if inputs.send(Input::Network(event)).await.is_err() {
                    return;
                }
            }
        });
        let (done, resumed) = oneshot::channel();
        let member = Input::Member(Box::new(peer), writes, network, done);
        self.inputs.send(member).await.map_err(|_| NoPeer::Ending)?;
        resumed.await.map_err(|_| NoPeer::Ending)?;
        if let Some(network) = self.network() {
            tokio::spawn(serve::tunnels(Arc::clone(self), network));
        }
        reach::announce_on_lan(self, pool);
        self.reach_changed.notify_one();
        Ok(())
    }

    async fn addresses_changed(&self) {
        let Some(network) = self.network() else { return };
        let (control, data) = standing::addresses(self, &network);
        // Nothing to tell where the daemon ends.
        let _ = self.act(move |peer, now| peer.set_addresses(control, data, now)).await;
    }

    /// Where the data plane is reached: its port on every address of the control plane.
    pub(crate) fn data_addrs(&self, network: &Network) -> Vec<SocketAddr> {
        let Ok(local) = self.endpoint.local_addr() else { return Vec::new() };
        if !local.ip().is_unspecified() {
            return vec![local];
        }
        let ips: BTreeSet<IpAddr> = network.listen_addrs().iter().map(SocketAddr::ip).collect();
        ips.into_iter().map(|ip| SocketAddr::new(ip, local.port())).collect()
    }

    /// The address by which processes on other nodes reach processes on this one.
    pub(crate) fn host(&self) -> String {
        let addrs = self.network().map(|network| self.data_addrs(&network)).unwrap_or_default();
        let outside = addrs.iter().find(|addr| !addr.ip().is_loopback());
        let ip = outside.or(addrs.first()).map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |a| a.ip());
        ip.to_string()
    }

    pub(crate) fn network(&self) -> Option<Network> {
        lock(&self.network).clone()
    }

    pub(crate) fn owner_only(&self) -> Option<String> {
        match &self.isolation {
            Isolation::Isolated => None,
            Isolation::Shared { reason } => {
                Some(format!("jobs cannot be kept from the owner's files: {reason}"))
            }
        }
    }

    pub(crate) fn is_member(&self, peer: PeerId) -> bool {
        self.members.read().unwrap_or_else(PoisonError::into_inner).contains(&peer)
    }

    fn set_members(&self, roster: &Roster) {
        let nodes = &roster.state().nodes;
        let names = nodes.iter().map(|(id, node)| (*id, node.name.to_string())).collect();
        *self.names.write().unwrap_or_else(PoisonError::into_inner) = names;
        let members = nodes.keys().copied().collect();
        *self.members.write().unwrap_or_else(PoisonError::into_inner) = members;
    }

    fn members(&self) -> BTreeSet<PeerId> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn job_dir(&self, job: JobId) -> PathBuf {
        self.home.jobs().join(job.to_string())
    }

    pub(crate) fn workspace(&self, id: WorkId) -> Workspace {
        Workspace::at(&self.home.jobs(), id)
    }

    pub(crate) fn host_policy(&self) -> HostPolicy {
        HostPolicy { isolation: self.isolation.clone(), hidden: vec![self.home.path().to_owned()] }
    }

    pub(crate) async fn names_of(&self, spec: &VerifiedSpec) -> Names {
        let owner = spec.spec.owner;
        let known = self.act(move |peer, _| {
            peer.roster().state().users.get(&owner).map(|user| user.username.to_string())
        });
        let username = known.await.ok().flatten().unwrap_or_else(|| owner.to_string());
        Names { username }
    }

    /// Copies of the machine-wide locks of these GPUs, for a process to hold.
    pub(crate) fn locks_of(&self, gpus: &[GpuUuid]) -> std::io::Result<Vec<OwnedFd>> {
        use std::os::fd::AsFd as _;
        let locks = lock(&self.gpu_locks);
        let of_gpus = locks.iter().filter(|lock| gpus.contains(lock.uuid()));
        of_gpus.map(|lock| lock.as_fd().try_clone_to_owned()).collect()
    }

    /// Try for the locks that supervisors of an earlier daemon held at the start.
    fn lock_what_became_free(&self) {
        let wanted: Vec<GpuUuid> = lock(&self.unlocked_gpus).iter().cloned().collect();
        if wanted.is_empty() {
            return;
        }
        match GpuLocks::machine().acquire(&wanted, self.home.path()) {
            Ok(acquired) => {
                let mut unlocked = lock(&self.unlocked_gpus);
                for got in &acquired.locks {
                    unlocked.remove(got.uuid());
                }
                lock(&self.gpu_locks).extend(acquired.locks);
            }
            Err(reason) => warn!(%reason, "GPU locks"),
        }
    }

    /// GPUs that must not be given to anybody now.
    fn unusable(&self) -> Vec<GpuUuid> {
        let mut unusable = in_foreign_use(&lock(&self.readings), &self.work.pids());
        unusable.extend(lock(&self.quarantined).iter().cloned());
        unusable.extend(lock(&self.unlocked_gpus).iter().cloned());
        unusable.into_iter().collect()
    }

    /// Offer these GPUs to nobody until the daemon is restarted: a process that had them
    /// left something behind.
    pub(crate) async fn quarantine(&self, gpus: Vec<GpuUuid>, evidence: String) {
        if gpus.is_empty() {
            return;
        }
        let names: Vec<String> = gpus.iter().map(ToString::to_string).collect();
        let warning = format!("quarantined {}: {evidence}", names.join(", "));
        warn!(warning);
        lock(&self.warnings).push(warning);
        lock(&self.quarantined).extend(gpus);
        let unusable = self.unusable();
        // The daemon is ending if nobody listens.
        let _ = self.act(move |peer, now| peer.set_foreign(unusable, now)).await;
    }

    pub(crate) fn readings(&self) -> Vec<GpuReading> {
        lock(&self.readings).clone()
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = lock(&self.warnings).clone();
        warnings.extend(self.space.warnings());
        for (node, reason) in &*lock(&self.shut_out) {
            warnings.push(format!("{} does not let this node in: {reason}", self.label(*node)));
        }
        warnings
    }

    /// What a message calls a node: its name, where it is a member.
    pub(crate) fn label(&self, node: PeerId) -> String {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        match names.get(&node) {
            Some(name) => format!("node {name}"),
            None => format!("node {node}"),
        }
    }

    /// A job is being submitted, and its keepers are to be remembered.
    pub(crate) fn begin_submission(&self, job: JobId, keepers: Vec<PeerId>) -> UnderWay<'_> {
        lock(&self.submitted).begin(job, keepers);
        UnderWay { shared: self, job }
    }

    /// Jobs submitted here whose ids begin so.
    pub(crate) fn submitted(&self, prefix: &str) -> Vec<Submission> {
        lock(&self.submitted).starting_with(prefix)
    }

    /// Keep what an advert says of a node's addresses for after a restart.
    pub(crate) fn remember_addresses(&self, node: PeerId, advert: &Advert, signed: &SignedBytes) {
        let entry = PeerEntry {
            control: advert.control.clone(),
            data: advert.data.clone(),
            last_seen_wall_ms: clock::now().wall_ms,
        };
        self.addresses.put(node, entry, Some(wire::encode(signed)));
    }

    /// While the guard lives, somebody of this machine uses the daemon.
    pub(crate) fn in_use(self: &Arc<Self>) -> InUse {
        self.requests.fetch_add(1, Ordering::Relaxed);
        InUse { shared: Arc::clone(self) }
    }

    /// Port 0 takes the port of the last run where it is free.
    fn control_listen(&self) -> SocketAddr {
        let mut listen = self.settings.listen;
        if listen.port() == 0
            && let Some(ports) = self.home.ports()
        {
            listen.set_port(ports.control);
        }
        listen
    }
}

/// How long a hand-over goes on: by time, as what others say may wake it any number of times
/// in between.
#[derive(Debug)]
struct HandOverPatience {
    deadline: Instant,
    /// When a change was last under way, or last fewer were left than before.
    progress_at: Instant,
    left: usize,
}

impl HandOverPatience {
    fn begun(left: usize, now: Instant) -> Self {
        Self { deadline: now + HAND_OVER_WITHIN, progress_at: now, left }
    }

    fn is_over(&mut self, under_way: usize, left: usize, now: Instant) -> bool {
        if under_way > 0 || left < self.left {
            self.progress_at = now;
        }
        self.left = left;
        left == 0 || now >= self.deadline || now >= self.progress_at + HAND_OVER_STALL
    }
}

/// See [`Shared::in_use`].
#[derive(Debug)]
pub(crate) struct InUse {
    shared: Arc<Shared>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.shared.last_request_ms.store(clock::now().boot_ms, Ordering::Relaxed);
        self.shared.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn start_network(
    key: &KeyPair,
    pool: p2pit_protocol::PoolId,
    listen: SocketAddr,
    is_free_to_move: bool,
) -> anyhow::Result<(Network, mpsc::Receiver<crate::network::Event>)> {
    let config = |listen| NetworkConfig { key: key.clone(), pool, listen };
    match Network::start(config(listen)).await {
        Ok(started) => Ok(started),
        // The port of the last run belongs to somebody else now: any other will do, unless
        // the owner named this one, which firewalls and other nodes may know.
        Err(reason) if is_free_to_move && listen.port() != 0 => {
            warn!(%listen, reason = format!("{reason:#}"), "cannot listen there");
            Network::start(config(SocketAddr::new(listen.ip(), 0))).await
        }
        Err(reason) => Err(reason),
    }
}

/// The data plane listens one port above the control plane, or where it did last.
fn bind_data_plane(
    home: &Home,
    settings: &Settings,
    key: &KeyPair,
    members: &Arc<RwLock<BTreeSet<PeerId>>>,
) -> anyhow::Result<Endpoint> {
    let members = Arc::clone(members);
    let is_allowed = Arc::new(move |peer: &PeerId, alpn: &[u8]| {
        alpn == DOOR.alpn || members.read().unwrap_or_else(PoisonError::into_inner).contains(peer)
    });
    let bind = |port| {
        let addr = SocketAddr::new(settings.listen.ip(), port);
        Endpoint::bind(key, addr, &[DOOR, DATA], Arc::clone(&is_allowed) as _)
    };
    if settings.listen.port() != 0 {
        let port = settings.listen.port().checked_add(1).context("no port above 65535")?;
        return Ok(bind(port)?);
    }
    let last = home.ports().map_or(0, |ports| ports.data);
    match bind(last) {
        Err(reason) if last != 0 => {
            warn!(port = last, %reason, "the data plane's last port is taken");
            Ok(bind(0)?)
        }
        bound => Ok(bound?),
    }
}

/// The GPUs of this machine, by whether they are ours to offer.
#[derive(Debug, Default)]
struct LockedGpus {
    /// Ours, now or once a supervisor of ours is done with them.
    gpus: Vec<Gpu>,
    locks: Vec<GpuLock>,
    /// Locked by a supervisor, says the lock's own text; any user could have written that,
    /// so nothing is given away on it.
    unlocked: BTreeSet<GpuUuid>,
    /// Why others are not ours.
    taken: Vec<String>,
}

/// The GPUs this daemon alone may offer on this machine.
fn lock_gpus(source: &GpuSource, home: &Home) -> anyhow::Result<LockedGpus> {
    let gpus = source.inventory().to_vec();
    if !source.needs_locks() || gpus.is_empty() {
        return Ok(LockedGpus { gpus, ..LockedGpus::default() });
    }
    let uuids: Vec<GpuUuid> = gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
    let acquired = GpuLocks::machine().acquire(&uuids, home.path())?;
    let mut taken = Vec::new();
    for (uuid, holder) in &acquired.busy {
        taken.push(holder.message(uuid));
    }
    for (uuid, reason) in &acquired.failed {
        taken.push(format!("GPU {uuid} cannot be locked: {reason}"));
    }
    for message in &taken {
        warn!(message, "not offered");
    }
    let offered = |gpu: &Gpu| {
        acquired.ours.contains(&gpu.uuid) || acquired.locks.iter().any(|l| *l.uuid() == gpu.uuid)
    };
    let gpus = gpus.into_iter().filter(offered).collect();
    let unlocked = acquired.ours.into_iter().collect();
    Ok(LockedGpus { gpus, locks: acquired.locks, unlocked, taken })
}

/// Read the GPUs every few seconds, and tell the peer of foreign use and of GPUs that are
/// gone.
fn watch_gpus(shared: &Arc<Shared>, source: GpuSource) -> anyhow::Result<()> {
    let (monitor, mut readings) =
        GpuMonitor::spawn(Arc::new(source), shared.settings.gpu_read_every)?;
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let mut known: Option<Vec<GpuUuid>> = None;
        while let Some(reading) = readings.recv().await {
            *lock(&shared.readings) = reading;
            shared.lock_what_became_free();
            let unusable = shared.unusable();
            let held = shared
                .act(|peer, _| {
                    let (_, work) = peer.book();
                    work.flat_map(|w| w.assignment.grant.gpus.clone()).collect::<BTreeSet<_>>()
                })
                .await;
            if let Ok(held) = held
                && known.as_ref() != Some(&unusable)
            {
                known = Some(unusable.clone());
                // The daemon is ending if nobody listens.
                let _ = shared.act(move |peer, now| peer.set_foreign(unusable, now)).await;
                monitor.read_now(held);
            }
        }
    });
    Ok(())
}

/// GPUs that processes of others compute on, and those that are gone.
fn in_foreign_use(readings: &[GpuReading], ours: &BTreeSet<u32>) -> BTreeSet<GpuUuid> {
    let pids = readings.iter().flat_map(|r| r.compute_processes.iter().flatten()).map(|p| p.pid);
    let own: BTreeSet<u32> = pids
        .filter(|pid| ours.iter().any(|root| crate::executor::descends_from(*pid, *root)))
        .collect();
    let foreign = foreign_use(readings, &own);
    let gone = readings.iter().filter(|r| matches!(r.health, Health::Gone(_)));
    foreign.into_keys().chain(gone.map(|reading| reading.uuid.clone())).collect()
}

/// Returns once nothing has been asked of an on-demand daemon for its idle time.
async fn idle(shared: &Arc<Shared>, idle_exit: Option<Duration>) {
    let Some(idle_exit) = idle_exit else { return std::future::pending().await };
    loop {
        let last_ms = shared.last_request_ms.load(Ordering::Relaxed);
        let idle_ms = clock::now().boot_ms.saturating_sub(last_ms);
        let left = idle_exit.saturating_sub(Duration::from_millis(idle_ms));
        if !left.is_zero() {
            tokio::time::sleep(left).await;
            continue;
        }
        let driven = shared.act(|peer, _| peer.driven()).await.unwrap_or(0);
        let busy = shared.requests.load(Ordering::Relaxed) > 0 || shared.work.count() > 0;
        if !busy && driven == 0 {
            info!("nothing was asked of this daemon for a while");
            return;
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

async fn signal() -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("no signal handler")?;
    let mut terminate = signal(SignalKind::terminate()).context("no signal handler")?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "interrupted",
        _ = terminate.recv() => "terminated",
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is done under these locks that can stop half way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who keeps a job by its announcement, the one that made it first: it drove the job then.
pub(crate) fn keepers_of(head: &Head) -> Vec<PeerId> {
    let others = head.keepers.iter().filter(|keeper| **keeper != head.keeper);
    std::iter::once(&head.keeper).chain(others).copied().collect()
}

/// The roster of the pool, as the core has it now.
pub(crate) async fn roster(shared: &Shared) -> Result<Roster, NoPeer> {
    shared.act(|peer, _| peer.roster().clone()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_over_is_given_up_by_time_and_not_by_how_often_others_say_something() {
        let begin = Instant::now();
        let mut patience = HandOverPatience::begun(3, begin);
        for _ in 0..1000 {
            assert!(!patience.is_over(0, 3, begin));
        }
        let mut at = begin + HAND_OVER_STALL - Duration::from_millis(1);
        assert!(!patience.is_over(0, 2, at), "one was handed over");
        at += HAND_OVER_STALL - Duration::from_millis(1);
        assert!(!patience.is_over(1, 2, at), "one is under way");
        at += HAND_OVER_STALL - Duration::from_millis(1);
        assert!(!patience.is_over(0, 2, at));
        assert!(patience.is_over(0, 2, at + Duration::from_millis(1)), "nothing moves");
        assert!(patience.is_over(0, 0, begin), "nothing is left");
        let mut busy = HandOverPatience::begun(3, begin);
        assert!(!busy.is_over(1, 3, begin + HAND_OVER_WITHIN - Duration::from_millis(1)));
        assert!(busy.is_over(1, 3, begin + HAND_OVER_WITHIN));
    }

    #[test]
    fn the_keepers_that_a_submitted_job_named_are_remembered_of_so_many_jobs() {
        let node = |n: u8| PeerId(KeyPair::from_seed(&[n; 32]).public());
        let job = |n: usize| JobId(*blake3::hash(&n.to_le_bytes()).as_bytes());
        let mut submitted = Submitted::default();
        submitted.begin(job(0), vec![node(1)]);
        submitted.begin(job(0), vec![node(1), node(2)]);
        let found = |submitted: &Submitted| {
            let mut found = submitted.starting_with(&job(0).to_string()[..8]);
            assert!(found.len() < 2);
            found.pop()
        };
        assert_eq!(found(&submitted).unwrap().keepers, [node(1), node(2)]);
        submitted.end(job(0));
        assert!(found(&submitted).unwrap().is_under_way(), "one of the two goes on");
        submitted.end(job(0));
        assert!(!found(&submitted).unwrap().is_under_way());
        for n in 1..=SUBMITTED_MAX {
            submitted.begin(job(n), vec![node(3)]);
        }
        assert_eq!(submitted.0.len(), SUBMITTED_MAX);
        assert_eq!(found(&submitted), None, "it was the oldest");
        assert_eq!(submitted.starting_with(&job(1).to_string()).len(), 1);
    }
}
