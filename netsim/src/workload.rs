//! Jobs: what they ask for, how their processes behave, and when people stop them.

use std::collections::BTreeMap;

use p2pit_protocol::{
    BlobId, JobId,
    identity::SignedBytes,
    inventory::{Capacity, gpu::parse_simulated},
    job::{KEEP_EVERY_MS, LOST_AFTER_MS, Policy},
    request::{Request, satisfiable},
};

use crate::{options::Options, random::Random};

/// How long a pool has to get to know itself before the first job.
pub const WARM_UP_MS: u64 = 8_000;

/// A job as its user means it.
#[derive(Debug, Clone)]
pub struct Task {
    /// When it is submitted first.
    pub at_ms: u64,
    /// The machine it is submitted at.
    pub origin: usize,
    /// Whose it is.
    pub user: usize,
    /// What it asks for.
    pub request: Request,
    /// The tree it needs.
    pub code: BlobId,
    /// How its processes behave.
    pub behaviour: Behaviour,
    /// The machines that keep it first; whom its origin proposes where there are none.
    pub keepers: Vec<usize>,
    /// The spec being submitted now.
    pub spec: Option<SignedBytes>,
    /// Its id once it is known to be kept.
    pub job: Option<JobId>,
    /// How often it was submitted again.
    pub tries: u64,
}

/// How the processes of a job behave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behaviour {
    /// Never ends by itself.
    pub hangs: bool,
    /// How long a process runs at least.
    pub run_ms_min: u64,
    /// How long a process runs at most.
    pub run_ms_max: u64,
    /// Of a thousand processes, how many fail.
    pub failure_permille: u64,
    /// Of a hundred processes, how many ignore SIGTERM.
    pub deaf_percent: u64,
    /// How long preparing takes at most.
    pub prepare_ms_max: u64,
    /// Of a thousand preparations, how many fail.
    pub prepare_failure_permille: u64,
    /// Ended by its supervisor after this long.
    pub limit_ms: Option<u64>,
    /// From SIGTERM to SIGKILL.
    pub grace_ms: u64,
    /// Stopped by its owner this long after it was submitted.
    pub stop_after_ms: Option<u64>,
    /// Attempts after the first, should one fail.
    pub retries: u32,
    /// What becomes of a process whose node is cut off.
    pub policy: Policy,
    /// How long the node of a rank may be silent before the rank is lost.
    pub lost_after_ms: u64,
    /// How often `keep/` is copied off its node; 0: when the process has ended.
    pub keep_every_ms: u64,
}

impl Behaviour {
    /// Runs for a moment and succeeds.
    #[must_use]
    pub fn plain(run_ms_max: u64) -> Self {
        Self {
            hangs: false,
            run_ms_min: 1,
            run_ms_max,
            failure_permille: 0,
            deaf_percent: 0,
            prepare_ms_max: 300,
            prepare_failure_permille: 0,
            limit_ms: None,
            grace_ms: 5_000,
            stop_after_ms: None,
            retries: 0,
            policy: Policy::Continue,
            lost_after_ms: LOST_AFTER_MS,
            keep_every_ms: KEEP_EVERY_MS,
        }
    }

    /// The same, run again elsewhere where a process is lost or fails.
    #[must_use]
    pub fn retried(self, retries: u32) -> Self {
        Self { retries, policy: Policy::Restart, ..self }
    }

    /// Runs until it is stopped.
    #[must_use]
    pub fn endless() -> Self {
        Self { hangs: true, ..Self::plain(0) }
    }
}

/// How far apart two jobs of a burst come, at most.
const BURST_GAP_MS: u64 = 300;

/// All tasks, and which job is whose.
#[derive(Debug, Default)]
pub struct Workload {
    /// In the order of their first submission.
    pub tasks: Vec<Task>,
    /// Every id that a task was tried under.
    pub by_job: BTreeMap<JobId, usize>,
}

impl Workload {
    /// The tasks of `options` for machines with these capacities.
    #[must_use]
    pub fn draw(options: &Options, capacities: &[Capacity]) -> Self {
        let mut random = Random::of(options.seed, "workload");
        let mut tasks: Vec<Task> =
            (0..options.jobs).map(|_| draw_task(options, capacities, &mut random)).collect();
        let mut random = Random::of(options.seed, "retries");
        for task in &mut tasks {
            if random.percent(options.retry_percent) {
                let retries = u32::try_from(random.between(1, 3)).unwrap_or(1);
                task.behaviour = task.behaviour.clone().retried(retries);
            }
        }
        tasks.sort_by_key(|task| task.at_ms);
        let mut random = Random::of(options.seed, "bursts");
        for task in 1..tasks.len() {
            if random.percent(options.burst_percent) {
                tasks[task].at_ms = tasks[task - 1].at_ms + random.below(BURST_GAP_MS);
            }
        }
        tasks.sort_by_key(|task| task.at_ms);
        Self { tasks, by_job: BTreeMap::new() }
    }
}

/// What machine `index` offers, drawn: mostly one model, often two.
#[must_use]
pub fn draw_capacity(options: &Options, index: usize) -> Capacity {
    let mut random = Random::of(options.seed, &format!("machine {index}"));
    let text = match options.inventory.get(index) {
        Some(text) => text.clone(),
        None => {
            let first = random.index(MODELS.len());
            let mut text = format!("{}x{}", random.between(1, 4), MODELS[first]);
            if random.percent(40) {
                let second = MODELS[(first + 1 + random.index(MODELS.len() - 1)) % MODELS.len()];
                text += &format!(",{}x{second}", random.between(1, 2));
            }
            text
        }
    };
    let gpus = parse_simulated(&text, &index.to_string()).unwrap_or_default();
    let cores = 8 * u32::try_from(random.between(1, 8)).unwrap_or(1);
    Capacity::new(gpus, cores, 32_768 * random.between(1, 8))
}

const MODELS: [&str; 4] = ["v100", "gtx1070", "rtx3090", "a100"];

fn draw_task(options: &Options, capacities: &[Capacity], random: &mut Random) -> Task {
    let machines = (options.nodes + options.clients) as u64;
    // Half of all jobs come from clients, where there are any.
    let from_client = options.clients > 0 && random.percent(50);
    let origin = if from_client {
        random.between(options.nodes as u64, machines - 1)
    } else {
        random.below(options.nodes as u64)
    };
    let stopped = random.percent(options.stop_percent);
    let hangs = random.percent(options.hang_percent);
    let limited = (hangs && !stopped) || random.percent(3);
    let code = [b'c', u8::try_from(random.below(20)).unwrap_or(0)];
    Task {
        at_ms: WARM_UP_MS + random.below(options.span_ms),
        origin: usize::try_from(origin).unwrap_or(0),
        user: random.index(options.people()),
        request: draw_request(options, capacities, random),
        code: BlobId::of(&code),
        behaviour: Behaviour {
            hangs,
            run_ms_min: 1,
            run_ms_max: random.between(200, options.run_ms_max.max(200)),
            failure_permille: options.exit_failure_permille,
            deaf_percent: options.deaf_percent,
            prepare_ms_max: random.between(20, options.prepare_ms_max.max(20)),
            prepare_failure_permille: options.prepare_failure_permille,
            limit_ms: limited.then(|| random.between(1_000, 60_000)),
            grace_ms: random.between(500, 30_000),
            stop_after_ms: stopped.then(|| random.between(0, 90_000)),
            retries: 0,
            policy: Policy::Continue,
            lost_after_ms: LOST_AFTER_MS,
            keep_every_ms: options.keep_every_ms,
        },
        keepers: Vec::new(),
        spec: None,
        job: None,
        tries: 0,
    }
}

/// A request that the pool could satisfy.
fn draw_request(options: &Options, capacities: &[Capacity], random: &mut Random) -> Request {
    for _ in 0..50 {
        let text = if random.percent(options.gang_percent) {
            draw_gang(options, capacities, random)
        } else {
            let model = MODELS[random.index(MODELS.len())];
            match random.below(10) {
                0 => "[]".to_owned(),
                1 => "[4:cpu,8:ram]".to_owned(),
                2 => "[gpu]".to_owned(),
                3 => format!("[{}:{model},2:cpu]", random.between(1, 4)),
                4 => "[2:gpu>=24g]".to_owned(),
                _ => format!("[{model}]"),
            }
        };
        let request = Request::parse(&text).ok();
        if let Some(request) = request.filter(|r| satisfiable(r, capacities).is_ok()) {
            return request;
        }
    }
    Request::default()
}

fn draw_gang(options: &Options, capacities: &[Capacity], random: &mut Random) -> String {
    let (model, other) = (MODELS[random.index(MODELS.len())], MODELS[random.index(MODELS.len())]);
    let of = |model: &str| {
        let gpus = capacities.iter().flat_map(|capacity| &capacity.gpus);
        gpus.filter(|gpu| gpu.model == model).count() as u64
    };
    let all: u64 = capacities.iter().map(|capacity| capacity.gpus.len() as u64).sum();
    let mut count = |gpus: u64| random.between(2, (gpus * options.gang_share_percent / 100).max(2));
    let (some, others, any) = (count(of(model)), count(of(other)), count(all));
    match random.below(6) {
        0 => format!("{any}:[gpu]"),
        1 => format!("1:[],{some}:[{model}]"),
        2 if model != other => format!("{}:[{model}],{}:[{other}]", some.div_ceil(2), others / 2),
        3 => format!("{}:[2:{model}]", (some / 2).max(1)),
        4 => format!("{some}:[2:cpu,{model}]"),
        _ => format!("{some}:[{model}]"),
    }
}
