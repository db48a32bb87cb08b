//! A program of its own that submits many jobs through one daemon, as a workflow engine
//! would: it speaks the daemon's API itself, signs every job, and hashes the code once.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use p2pit_node::{
    api::types::{Answer, Ask, Plan, Planned, Submit, SubmitEvent, Watch, jobs_of, path},
    home::{Home, KeyKind, load_key},
    transfer::{SnapshotOptions, snapshot},
};
use p2pit_protocol::{
    BlobId, JobId, PeerId, UserId,
    identity::{Domain, KeyPair, SignedBytes},
    job::{
        Command as JobCommand, Grace, JobSpec, KEEP_EVERY_MS, LOST_AFTER_MS, Outcome, Policy,
        Source, State, VerifiedSpec,
    },
    message::{Command, JobFilter, JobView},
    roster::{REQUEST_AHEAD_MS_MAX, UserRequest},
    wire,
};
use p2pit_tests::Node;

use crate::api::{exchange, post};

/// Of one user, through one daemon.
pub(crate) struct Submitter {
    home: Home,
    key: KeyPair,
    planned: Planned,
    /// The root of the code, and its bytes.
    code: (BlobId, u64),
}

/// What became of a number of jobs, by the clock of this machine.
pub(crate) struct Burst {
    pub(crate) jobs: BTreeSet<JobId>,
    /// From the first submission to the last job known to be kept, in seconds.
    pub(crate) submitted_s: f64,
    /// When the first was submitted.
    pub(crate) started_wall_ms: u64,
}

impl Submitter {
    /// Through the daemon of `node`. `request` is one that the pool can satisfy; the
    /// directory that `node` works in is known to the daemon from an earlier job.
    pub(crate) fn new(node: &Node, code_dir: &Path, request: &str) -> Result<Self> {
        let home = Home::existing(node.home())?.context("the node has no home")?;
        let key = load_key(node.identity(), KeyKind::User)?;
        let user = UserId(key.public());
        let plan = Plan { request: request.to_owned(), user };
        let planned = exchange(&home, path::PLAN, &plan)?;
        let code = snapshot(code_dir, &SnapshotOptions::default())?;
        Ok(Self { home, key, planned, code: (code.root, code.tree.total_bytes()) })
    }

    /// The same, with jobs that fewer nodes keep: the first `keepers` of the others' keepers.
    pub(crate) fn kept_by(&self, keepers: usize) -> Result<Self> {
        let Self { home, key, planned, code } = self;
        let mut planned = planned.clone();
        let there = planned.keepers.len();
        ensure!(there >= keepers, "{keepers} keepers are wanted, and there are {there}");
        planned.keepers.truncate(keepers);
        Ok(Self { home: home.clone(), key: key.clone(), planned, code: *code })
    }

    /// Who drives the jobs; others keep them, too.
    pub(crate) fn steward(&self) -> Result<PeerId> {
        let first = self.planned.keepers.first().context("nobody keeps jobs")?;
        Ok(first.0)
    }

    /// Submits `jobs` jobs, at most `at_once` of them at a time; returns when all are kept.
    pub(crate) fn submit(
        &self,
        jobs: usize,
        at_once: usize,
        request: &str,
        command: &str,
    ) -> Result<Burst> {
        let next = AtomicU64::new(0);
        let (start, started_wall_ms) = (Instant::now(), wall_ms()?);
        let submitted = thread::scope(|scope| {
            let one_after_the_other = || {
                let mut mine = Vec::new();
                while next.fetch_add(1, Ordering::Relaxed) < jobs as u64 {
                    mine.push(self.submit_one(request, command)?);
                }
                anyhow::Ok(mine)
            };
            let threads: Vec<_> =
                (0..at_once.min(jobs)).map(|_| scope.spawn(one_after_the_other)).collect();
            let mut all = BTreeSet::new();
            for thread in threads {
                match thread.join() {
                    Ok(mine) => all.extend(mine?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            anyhow::Ok(all)
        });
        let jobs = submitted?;
        Ok(Burst { jobs, submitted_s: start.elapsed().as_secs_f64(), started_wall_ms })
    }

    /// Submits a job and sees it end: milliseconds from the start of the submission until it
    /// is known to be kept, and until its record is known to say that it is done.
    pub(crate) fn run_one(&self, request: &str, command: &str) -> Result<(f64, f64)> {
        let start = Instant::now();
        let took_ms = || start.elapsed().as_secs_f64() * 1e3;
        let job = self.submit_one(request, command)?;
        let submitted_ms = took_ms();
        let node = self.steward()?;
        let signed = self.sign(&Command::Job(job), &[node])?;
        let views = post(&self.home, path::WATCH, &Watch { node, signed })?;
        let done_ms = took_ms();
        let last = views.lines().last().context("nothing is said of the job")?;
        let view: JobView = serde_json::from_str(last)?;
        ensure!(view.outcome == Some(Outcome::Succeeded), "a job failed: {view:?}");
        Ok((submitted_ms, done_ms))
    }

    fn submit_one(&self, request: &str, command: &str) -> Result<JobId> {
        let spec = JobSpec {
            pool: self.planned.pool,
            owner: self.user(),
            title: "bench".to_owned(),
            request: request.parse()?,
            command: JobCommand::Direct(command.to_owned()),
            code: self.code.0,
            code_bytes: self.code.1,
            source: Source::default(),
            continues: None,
            artifacts: Vec::new(),
            env: [].into(),
            private: false,
            time_limit_ms: None,
            grace: Grace::default(),
            retries: 0,
            policy: Policy::Continue,
            lost_after_ms: LOST_AFTER_MS,
            keep_every_ms: KEEP_EVERY_MS,
            nonce: nonce()?,
            submitted_at_ms: wall_ms()?,
            keepers: self.planned.keepers.clone(),
        };
        let spec = SignedBytes::sign(&self.key, Domain::JobSpec, spec.to_bytes());
        let spec = VerifiedSpec::verify(spec)?.signed;
        let said = post(&self.home, path::SUBMIT, &Submit { spec })?;
        let last = said.lines().last().context("nothing is said of the submission")?;
        match serde_json::from_str(last)? {
            SubmitEvent::Submitted { job, .. } => Ok(job),
            other => bail!("a job was not submitted: {other:?}"),
        }
    }

    /// Returns once no job of the burst is live, and those that are listed succeeded: when
    /// the last of them was done by its record, in milliseconds of wall time. How often is
    /// looked does not enter.
    pub(crate) fn wait(&self, burst: &Burst, within: Duration, every: Duration) -> Result<u64> {
        let deadline = Instant::now() + within;
        loop {
            let mut jobs = self.jobs(burst.jobs.len())?;
            jobs.retain(|job| burst.jobs.contains(&job.job));
            let live = jobs.iter().filter(|job| job.state() != State::Done).count();
            if live == 0 && !jobs.is_empty() {
                let succeeded = |job: &&JobView| job.outcome == Some(Outcome::Succeeded);
                let failed = jobs.iter().find(|job| !succeeded(job));
                ensure!(failed.is_none(), "a job failed: {failed:?}");
                let last = jobs.iter().filter_map(|job| Some(job.history.last()?.at_ms)).max();
                return last.context("a job without a history");
            }
            ensure!(Instant::now() < deadline, "{live} jobs are not done in time");
            thread::sleep(every);
        }
    }

    /// Live jobs of this user, and the newest of those that are done.
    fn jobs(&self, done_max: usize) -> Result<Vec<JobView>> {
        let done_max = u32::try_from(done_max)?;
        let command = Command::Jobs(JobFilter { owner: Some(self.user()), done_max });
        Ok(jobs_of(&self.ask(&command)?).into_iter().cloned().collect())
    }

    fn ask(&self, command: &Command) -> Result<Vec<Answer>> {
        let nodes = vec![self.steward()?];
        let signed = self.sign(command, &nodes)?;
        let answers: Vec<Answer> =
            exchange(&self.home, path::ASK, &Ask { signed, nodes, within_ms: None })?;
        let error = answers.iter().find_map(|answer| answer.error.as_deref());
        ensure!(error.is_none(), "the keeper does not answer: {error:?}");
        Ok(answers)
    }

    fn sign(&self, command: &Command, nodes: &[PeerId]) -> Result<SignedBytes> {
        let request = UserRequest {
            pool: self.planned.pool,
            audience: nodes.iter().copied().collect(),
            nonce: nonce()?,
            expires_wall_ms: wall_ms()? + REQUEST_AHEAD_MS_MAX,
            command: wire::encode(command),
        };
        Ok(request.sign(&self.key))
    }

    fn user(&self) -> UserId {
        UserId(self.key.public())
    }
}

fn nonce() -> Result<[u8; 16]> {
    let mut nonce = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

pub(crate) fn wall_ms() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?)
}
