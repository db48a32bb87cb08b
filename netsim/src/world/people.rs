//! People: they submit, ask again until they have an answer, and stop jobs.

use std::collections::{BTreeMap, BTreeSet};

use p2pit_protocol::{
    BlobId, JobId, UserId,
    identity::{Domain, SignedBytes},
    job::{Command, Grace, JobSpec, Source, State, VerifiedSpec},
    message::{Command as UserCommand, Reply},
    peer::{Slot, SubmitError},
    record::{Keeper, quorum_of},
    request::Request,
    roster::UserRequest,
    wire,
};

use super::{Occurrence, World};
use crate::{
    ledger::Happening,
    workload::{Behaviour, Task},
};

impl World {
    /// Submit something now, at machine `origin`; the number of the task.
    pub fn submit(&mut self, origin: usize, request: Request, behaviour: Behaviour) -> usize {
        let task = self.workload.tasks.len();
        self.workload.tasks.push(Task {
            at_ms: self.now_ms,
            origin,
            user: 0,
            request,
            code: BlobId::of(b"code"),
            behaviour,
            keepers: Vec::new(),
            spec: None,
            job: None,
            tries: 0,
        });
        self.after(0, Occurrence::Submit { task, tried: 0 });
        task
    }

    /// Have the owner of a task stop its job now.
    pub fn stop(&mut self, task: usize) {
        self.after(0, Occurrence::StopJob { task });
    }

    pub(super) fn submit_task(&mut self, task: usize, tried: u64) {
        let Task { origin, job, tries, .. } = self.workload.tasks[task];
        if job.is_some() || tries != tried {
            return;
        }
        if self.workload.tasks[task].spec.is_none() && !self.make_spec(task, origin) {
            self.submit_again(task, 2_000);
            return;
        }
        let ms = self.people.between(5, 300);
        self.after(ms, Occurrence::Uploaded { task, tried });
    }

    /// Sign a spec that names the keepers its submitter's node proposes.
    fn make_spec(&mut self, task: usize, origin: usize) -> bool {
        let machine = &self.machines[origin];
        let now = machine.clock.now(self.now_ms);
        let proposed = machine.daemon.as_ref().filter(|_| machine.is_awake());
        let (nonce, pool): ([u8; 16], _) = (self.people.bytes(), self.pool.id);
        let keepers = proposed.map(|peer| peer.propose_keepers(&nonce)).unwrap_or_default();
        let named = self.workload.tasks[task].keepers.iter().map(|at| &self.machines[*at]);
        let named: Vec<Keeper> = named.map(|named| (named.peer, named.member.store)).collect();
        let keepers = if named.is_empty() { keepers } else { named };
        let wanted = &mut self.workload.tasks[task];
        if keepers.is_empty() {
            return false;
        }
        let key = &self.pool.users[wanted.user];
        let spec = JobSpec {
            pool,
            owner: UserId(key.public()),
            title: format!("task {task}"),
            request: wanted.request.clone(),
            command: Command::Direct("true".to_owned()),
            code: wanted.code,
            code_bytes: 40 << 20,
            source: Source::default(),
            continues: None,
            artifacts: Vec::new(),
            env: BTreeMap::new(),
            private: false,
            time_limit_ms: wanted.behaviour.limit_ms,
            grace: Grace(wanted.behaviour.grace_ms),
            retries: wanted.behaviour.retries,
            policy: wanted.behaviour.policy,
            lost_after_ms: wanted.behaviour.lost_after_ms,
            keep_every_ms: wanted.behaviour.keep_every_ms,
            nonce,
            submitted_at_ms: now.wall_ms,
            keepers,
        };
        let signed = SignedBytes::sign(key, Domain::JobSpec, spec.to_bytes());
        let job = JobId::of(&signed.bytes);
        self.trace.say(self.now_ms, Some(job), || format!("task {task}: {}", spec.request));
        self.workload.by_job.insert(job, task);
        self.workload.tasks[task].spec = Some(signed);
        true
    }

    /// The inputs go to every keeper that can be reached, and the job is submitted.
    pub(super) fn uploaded(&mut self, task: usize, tried: u64) {
        let Task { origin, code, tries, .. } = self.workload.tasks[task];
        if tries != tried {
            return;
        }
        let Some(signed) = self.workload.tasks[task].spec.clone() else { return };
        for (keeper, _) in self.keepers_named(&signed).unwrap_or_default() {
            let Some(at) = self.machine_of(keeper) else { continue };
            if at == origin || self.is_linked(origin, at) {
                self.machines[at].trees.insert(code);
                self.with_daemon(at, |peer, _| peer.tree_stored(code));
            }
        }
        self.mix("submit", origin, &[&signed.bytes]);
        let submitted = self.with_daemon(origin, |peer, now| peer.submit(signed, now));
        if !matches!(submitted, Some(Ok(_))) {
            self.submit_again(task, 2_000);
        }
    }

    pub(super) fn submitted(&mut self, at: usize, job: JobId, result: Result<(), SubmitError>) {
        let Some(&task) = self.workload.by_job.get(&job) else { return };
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, Some(job), || format!("{name} submitted it: {result:?}"));
        let wanted = &mut self.workload.tasks[task];
        if wanted.job.is_some() {
            return;
        }
        match result {
            Ok(()) => {
                wanted.job = Some(job);
                self.counts.jobs += 1;
                self.ledger.submitted.insert(job);
                self.happenings.push(Happening::Submitted(job));
                if let Some(ms) = self.workload.tasks[task].behaviour.stop_after_ms {
                    self.after(ms, Occurrence::StopJob { task });
                }
            }
            Err(SubmitError::Refused(_)) => {
                wanted.spec = None;
                self.ledger.refused.insert(job);
                self.happenings.push(Happening::Refused(job));
                self.submit_again(task, 4_000);
            }
            Err(SubmitError::Unknown) => {
                self.give_up_if_lost(task);
                self.submit_again(task, 3_000);
            }
        }
    }

    /// Where most keepers that a spec names lost their disks or refused it, while another keeps
    /// it, no answer will ever come: it is submitted as another job.
    fn give_up_if_lost(&mut self, task: usize) {
        let Some(signed) = self.workload.tasks[task].spec.clone() else { return };
        let keepers = self.keepers_named(&signed).unwrap_or_default();
        let refused = Slot::Refused(JobId::of(&signed.bytes)).to_bytes();
        let lives = |(peer, store): &&Keeper| {
            let machine = self.machine_of(*peer).map(|at| &self.machines[at]);
            machine.is_some_and(|machine| {
                machine.member.store == *store && !machine.journal.contains_key(&refused)
            })
        };
        let left = keepers.iter().filter(lives).count();
        if left < quorum_of(keepers.len()) {
            self.workload.tasks[task].spec = None;
        }
    }

    /// Whoever waited for an answer at this machine asks again.
    pub(super) fn submissions_lost(&mut self, at: usize) {
        for task in 0..self.workload.tasks.len() {
            let Task { origin, job, ref spec, .. } = self.workload.tasks[task];
            if origin == at && job.is_none() && spec.is_some() {
                self.submit_again(task, 3_000);
            }
        }
    }

    fn submit_again(&mut self, task: usize, after_ms: u64) {
        self.workload.tasks[task].tries += 1;
        let tried = self.workload.tasks[task].tries;
        let ms = after_ms + self.people.below(1_000);
        self.after(ms, Occurrence::Submit { task, tried });
    }

    pub(super) fn stop_task(&mut self, task: usize) {
        let wanted = &self.workload.tasks[task];
        let Some(job) = wanted.job else { return };
        let steward = self.ledger.current(job).map(|value| value.body.steward);
        let Some(asked) = steward.and_then(|steward| self.machine_of(steward)) else { return };
        let machine = &self.machines[asked];
        let request = UserRequest {
            pool: self.pool.id,
            audience: BTreeSet::from([machine.peer]),
            nonce: self.people.bytes(),
            expires_wall_ms: machine.clock.now(self.now_ms).wall_ms + 30_000,
            command: wire::encode(&UserCommand::Stop(job)),
        };
        let signed = request.sign(&self.pool.users[wanted.user]);
        self.mix("stop", asked, &[&job.0]);
        let reply = self.with_daemon(asked, |peer, now| {
            let reply = peer.handle_user_request(&signed, now);
            (reply, peer.record(job).map(|kept| kept.value.body.attempt))
        });
        let (at_ms, answer) = (self.now_ms, format!("{reply:?}"));
        self.trace.say(at_ms, Some(job), || format!("its owner stops it: {answer}"));
        match reply {
            Some((Reply::Stopping { state, recorded: true }, Some(attempt))) => {
                if state != State::Done {
                    self.ledger.stops.entry(job).or_insert(attempt);
                }
            }
            // It is down, or died over it, or drives the job no more, or has not recorded it.
            _ => self.after(2_000, Occurrence::StopJob { task }),
        }
    }

    /// The keepers that a spec names.
    pub(super) fn keepers_named(&self, signed: &SignedBytes) -> Option<Vec<Keeper>> {
        VerifiedSpec::verify(signed.clone()).ok().map(|spec| spec.spec.keepers)
    }
}
