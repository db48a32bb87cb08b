//! One machine: its clocks, its journal, its daemon while that lives, and the processes
//! that live with or without it.

use std::collections::{BTreeMap, BTreeSet};

use p2pit_protocol::{
    BlobId, BootId, JobId, Peer, PeerId,
    bidder::WorkId,
    inventory::{Capacity, GpuUuid},
    job::Ending,
    peer::Config,
    roster,
    sabotage::Sabotage,
};

use crate::{clock::Clock, options::Options, pool::Member, random::Random};

/// A machine.
#[derive(Debug)]
pub struct Machine {
    /// Its place among all.
    pub index: usize,
    /// Its id in the pool.
    pub peer: PeerId,
    /// Key and store.
    pub member: Member,
    /// What it offers.
    pub capacity: Capacity,
    /// Its clocks.
    pub clock: Clock,
    /// What is durable.
    pub journal: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Trees on its disk.
    pub trees: BTreeSet<BlobId>,
    /// Ranks of which all they left is on its disk: log and results.
    pub left: BTreeSet<WorkId>,
    /// The newest copy of each rank's `keep/` on its disk, from while the rank ran.
    pub saves: BTreeMap<WorkId, Save>,
    /// Jobs of which something is being copied here: lost with the daemon.
    pub copying: BTreeSet<JobId>,
    /// There is no room for copies.
    pub no_room: bool,
    /// GPUs that others compute on now.
    pub foreign: BTreeSet<GpuUuid>,
    /// The daemon, while it runs.
    pub daemon: Option<Peer>,
    /// How often the daemon was started.
    pub starts: u64,
    /// When the daemon was started last.
    pub started_ms: u64,
    /// How often that was written to its disk.
    pub boots: u64,
    /// How its disk was emptied, counted.
    pub wipes: u64,
    /// Nothing can be written to its disk.
    pub disk_full: bool,
    /// It, or its daemon, stands still.
    pub still: Option<Still>,
    /// When it last went on after it slept.
    pub woke_ms: Option<u64>,
    /// When its daemon last went on after it stood still, for whichever reason.
    pub went_on_ms: Option<u64>,
    /// Tombstones in its journal.
    pub tombstones: usize,
    /// Jobs its daemon acted for when it last did something, with their terms.
    pub acting: Vec<(JobId, u64)>,
    /// What it prepares and runs.
    pub executor: Executor,
    /// Machines the daemon believes to be connected to.
    pub connected: BTreeSet<usize>,
    /// Entries made durable so far.
    pub writes: u64,
    /// A crash that a story asks for.
    pub crash_at_write: Option<CrashAt>,
    /// When the daemon is to be woken, in true time, with the number of that plan.
    pub timer: Option<(u64, u64)>,
}

/// A copy of a rank's `keep/` from while the rank ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Save {
    /// Its number within the attempt.
    pub seq: u64,
    /// The directory.
    pub tree: BlobId,
    /// Since when it is on this disk.
    pub at_ms: u64,
    /// The rank ran on this machine.
    pub own: bool,
}

/// What stands still, without being gone: the boot clock runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Still {
    /// The daemon, as by SIGSTOP: what is said to it waits, supervisors and processes go on.
    Daemon,
    /// The machine sleeps: what is said to it is lost, and nothing goes on.
    Machine,
}

/// Everything on a machine's disk that a daemon starts from.
#[derive(Debug, Clone)]
pub struct Disk {
    pub(crate) member: Member,
    pub(crate) journal: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) trees: BTreeSet<BlobId>,
    pub(crate) left: BTreeSet<WorkId>,
    pub(crate) saves: BTreeMap<WorkId, Save>,
    pub(crate) boots: u64,
}

/// Where in its writing a daemon dies. What it writes at once is one frame: all of it is on
/// the disk afterwards, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashAt {
    /// An entry of the frame, counted from the machine's first.
    pub entry: u64,
    /// Just after the frame is durable, rather than just before.
    pub after: bool,
    /// How long the daemon is away.
    pub down_ms: u64,
}

/// What runs, or is about to, whether the daemon lives or not.
#[derive(Debug, Default)]
pub struct Executor {
    /// Preparations under way: lost with the daemon.
    pub preparing: BTreeSet<WorkId>,
    /// Ranks whose directories are in place: forgotten with the daemon.
    pub prepared: BTreeSet<WorkId>,
    /// Processes with their supervisors.
    pub processes: BTreeMap<WorkId, Process>,
}

/// A process and its supervisor.
#[derive(Debug, Clone)]
pub struct Process {
    /// How far it is.
    pub state: ProcessState,
    /// GPUs it computes on.
    pub gpus: Vec<GpuUuid>,
    /// What it will do.
    pub plan: Plan,
    /// Someone asked it to end.
    pub stopping: bool,
    /// When its lease ends, on the boot clock; never where `None`.
    pub until_ms: Option<u64>,
    /// Counts the changes of that.
    pub lease_plan: u64,
}

/// How far a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessState {
    /// The daemon is starting it: not there yet, and never if the daemon dies now.
    Spawning,
    /// It runs.
    Running,
    /// It ended; its supervisor keeps how.
    Exited(Ending),
}

/// What a process does by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// When it ends by itself, after its start; never where `None`.
    pub run_ms: Option<u64>,
    /// How it ends then.
    pub exit: Ending,
    /// It ignores SIGTERM.
    pub deaf: bool,
    /// From SIGTERM to SIGKILL.
    pub grace_ms: u64,
    /// Its supervisor ends it after this long.
    pub limit_ms: Option<u64>,
}

impl Machine {
    /// A machine that was never started.
    #[must_use]
    pub fn new(index: usize, member: Member, capacity: Capacity, clock: Clock) -> Self {
        Self {
            index,
            peer: PeerId(member.key.public()),
            member,
            capacity,
            clock,
            journal: BTreeMap::new(),
            trees: BTreeSet::new(),
            left: BTreeSet::new(),
            saves: BTreeMap::new(),
            copying: BTreeSet::new(),
            no_room: false,
            foreign: BTreeSet::new(),
            daemon: None,
            starts: 0,
            started_ms: 0,
            boots: 0,
            wipes: 0,
            disk_full: false,
            still: None,
            woke_ms: None,
            went_on_ms: None,
            tombstones: 0,
            acting: Vec::new(),
            executor: Executor::default(),
            connected: BTreeSet::new(),
            writes: 0,
            crash_at_write: None,
            timer: None,
        }
    }

    /// A daemon at its start, before it has read the journal.
    ///
    /// # Errors
    /// The genesis cannot be read.
    pub fn new_daemon(
        &self,
        options: &Options,
        genesis: &[u8],
    ) -> Result<Peer, roster::GenesisError> {
        let mut random =
            Random::of(options.seed, &format!("daemon {} start {}", self.index, self.starts));
        Peer::new(Config {
            key: self.member.key.clone(),
            store: self.member.store,
            boot: BootId(random.bytes()),
            boot_count: self.boots,
            genesis: genesis.to_vec(),
            client: self.member.client,
            seed: random.bytes(),
            sabotage: options.removed_rule.map_or_else(Sabotage::default, Sabotage::remove),
        })
    }

    /// The jobs its daemon would act for if it did something now, with their terms.
    #[must_use]
    pub fn acting_at(&self, true_ms: u64) -> Vec<(JobId, u64)> {
        let now = self.clock.now(true_ms);
        self.daemon.as_ref().map(|peer| peer.acting(now)).unwrap_or_default()
    }

    /// Whether its daemon runs and does not stand still.
    #[must_use]
    pub fn is_awake(&self) -> bool {
        self.daemon.is_some() && self.still.is_none()
    }

    /// A short name: `n3` offers GPUs, `c11` is a client.
    #[must_use]
    pub fn name(&self) -> String {
        let letter = if self.member.client { 'c' } else { 'n' };
        format!("{letter}{}", self.index)
    }
}

impl Executor {
    /// Processes that exist now, with or without a daemon.
    pub fn running(&self) -> impl Iterator<Item = (&WorkId, &Process)> {
        self.processes.iter().filter(|(_, process)| process.state == ProcessState::Running)
    }

    /// The daemon died: what it was doing itself is gone, supervisors go on.
    pub fn lose_daemon(&mut self) {
        self.preparing.clear();
        self.prepared.clear();
        self.processes.retain(|_, process| process.state != ProcessState::Spawning);
    }

    /// The machine died; the processes that ran.
    pub fn lose_machine(&mut self) -> Vec<WorkId> {
        self.lose_daemon();
        let ran = self.running().map(|(id, _)| *id).collect();
        self.processes.clear();
        ran
    }
}
