//! Executors: preparing ranks, running processes, and what supervisors do alone.

use p2pit_protocol::{
    bidder::{LEASE_GRACE_MS, WorkId},
    inventory::GpuUuid,
    job::Ending,
};

use super::{Occurrence, World};
use crate::{
    ledger::Happening,
    machine::{Plan, Process, ProcessState},
    workload::Behaviour,
};

impl World {
    pub(super) fn prepare(&mut self, at: usize, id: WorkId) {
        let executor = &mut self.machines[at].executor;
        if executor.processes.contains_key(&id) {
            self.happenings.push(Happening::Misused(id, "prepare what has a process"));
            return;
        }
        executor.prepared.remove(&id);
        executor.preparing.insert(id);
        let behaviour = self.behaviour_of(id);
        let ms = self.executors.between(5, behaviour.prepare_ms_max.max(5));
        let fails = self.executors.permille(behaviour.prepare_failure_permille);
        let start = self.machines[at].starts;
        self.after(ms, Occurrence::Prepared { at, start, id, fails });
    }

    pub(super) fn prepared(&mut self, at: usize, start: u64, id: WorkId, fails: bool) {
        let machine = &mut self.machines[at];
        if machine.starts != start || !machine.executor.preparing.remove(&id) {
            return;
        }
        let result = if fails {
            Err("the tree cannot be had".to_owned())
        } else {
            machine.executor.prepared.insert(id);
            self.ledger.prepared.insert(id);
            let port = u16::try_from(self.executors.between(20_000, 60_000)).unwrap_or(0);
            Ok((port, format!("10.0.0.{at}")))
        };
        self.mix("prepared", at, &[]);
        let (now_ms, name) = (self.now_ms, self.machines[at].name());
        self.trace.say(now_ms, Some(id.job), || {
            format!("{name} prepared {}.{}: {result:?}", id.attempt, id.rank)
        });
        let code = self.workload.by_job.get(&id.job).map(|task| self.workload.tasks[*task].code);
        if let Some(code) = code.filter(|_| result.is_ok()) {
            self.machines[at].trees.insert(code);
            self.with_daemon(at, |peer, _| peer.tree_stored(code));
        }
        self.with_daemon(at, |peer, now| peer.prepared(id, result, now));
    }

    pub(super) fn execute(
        &mut self,
        at: usize,
        id: WorkId,
        gpus: Vec<GpuUuid>,
        until_ms: Option<u64>,
    ) {
        if !self.machines[at].executor.prepared.remove(&id) {
            self.happenings.push(Happening::Misused(id, "execute what is not prepared"));
            return;
        }
        if self.machines[at].executor.processes.contains_key(&id) {
            self.happenings.push(Happening::Misused(id, "execute what was executed"));
            return;
        }
        let behaviour = self.behaviour_of(id);
        let fails = self.executors.permille(behaviour.failure_permille);
        let exit = match (fails, self.executors.below(3)) {
            (false, _) => Ending::Exited { code: 0 },
            (true, 0) => Ending::Signaled { signal: 11 },
            (true, _) => Ending::Exited { code: 3 },
        };
        let run_ms = self.executors.between(behaviour.run_ms_min, behaviour.run_ms_max.max(1));
        let plan = Plan {
            run_ms: (!behaviour.hangs || fails).then_some(run_ms),
            exit,
            deaf: self.executors.percent(behaviour.deaf_percent),
            grace_ms: behaviour.grace_ms,
            limit_ms: behaviour.limit_ms,
        };
        let process = Process {
            state: ProcessState::Spawning,
            gpus,
            plan,
            stopping: false,
            until_ms,
            lease_plan: 0,
        };
        self.machines[at].executor.processes.insert(id, process);
        let ms = self.executors.between(1, 150);
        let start = self.machines[at].starts;
        self.after(ms, Occurrence::Spawned { at, start, id });
    }

    pub(super) fn spawned(&mut self, at: usize, start: u64, id: WorkId) {
        let machine = &mut self.machines[at];
        let Some(process) = machine.executor.processes.get_mut(&id) else { return };
        if machine.starts != start || process.state != ProcessState::Spawning {
            return;
        }
        process.state = ProcessState::Running;
        let (plan, stopping) = (process.plan.clone(), process.stopping);
        process.stopping = false;
        let name = machine.name();
        self.mix("spawned", at, &[]);
        self.trace
            .say(self.now_ms, Some(id.job), || format!("{name} runs {}.{}", id.attempt, id.rank));
        self.counts.processes += 1;
        self.ledger.begin(id, at, self.now_ms);
        self.happenings.push(Happening::Spawned(id));
        self.moved_ms = self.now_ms;
        if let Some(run_ms) = plan.run_ms {
            self.after(run_ms, Occurrence::Exits { at, id, ending: plan.exit });
        }
        self.plan_save(at, id);
        if let Some(limit_ms) = plan.limit_ms {
            self.after(limit_ms, Occurrence::Limit { at, id });
        }
        let until_ms = self.machines[at].executor.processes.get(&id).and_then(|p| p.until_ms);
        self.lease(at, id, until_ms);
        if stopping {
            self.end_process(at, id, Ending::Stopped);
        }
        if self.machines[at].still.is_some() {
            self.after(0, Occurrence::Started { at, start, id });
        } else {
            self.tell_started(at, start, id);
        }
    }

    pub(super) fn tell_started(&mut self, at: usize, start: u64, id: WorkId) {
        // A daemon that was started since has found it itself.
        if self.machines[at].starts == start {
            self.with_daemon(at, |peer, now| peer.started(id, now));
        }
    }

    /// Its supervisor is told when to end a process, daemon or not.
    pub(super) fn lease(&mut self, at: usize, id: WorkId, until_ms: Option<u64>) {
        let machine = &mut self.machines[at];
        let Some(process) = machine.executor.processes.get_mut(&id) else { return };
        process.until_ms = until_ms;
        process.lease_plan += 1;
        let plan = process.lease_plan;
        if process.state == ProcessState::Running
            && let Some(until_ms) = until_ms
        {
            let at_ms = machine.clock.true_at(until_ms);
            self.at(at_ms, Occurrence::LeaseEnds { at, id, plan });
        }
    }

    /// SIGTERM, and not long after it SIGKILL, whatever grace its job has.
    pub(super) fn lease_ends(&mut self, at: usize, id: WorkId, plan: u64) {
        let Some(process) = self.machines[at].executor.processes.get(&id) else { return };
        if process.lease_plan != plan || process.state != ProcessState::Running {
            return;
        }
        self.counts.lease_ends += 1;
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, Some(id.job), || {
            format!("{name}: the lease of {}.{} ends", id.attempt, id.rank)
        });
        // The grace counts from the deadline, also where the machine slept over it.
        let machine = &self.machines[at];
        let until_ms = machine.executor.processes.get(&id).and_then(|process| process.until_ms);
        let now_ms = machine.clock.now(self.now_ms).boot_ms;
        let left_ms = until_ms.map_or(0, |until_ms| {
            (until_ms + LEASE_GRACE_MS).saturating_sub(now_ms).min(LEASE_GRACE_MS)
        });
        if left_ms == 0 {
            self.exits(at, id, Ending::LeaseEnded);
            return;
        }
        self.end_process(at, id, Ending::LeaseEnded);
        self.after(left_ms, Occurrence::Exits { at, id, ending: Ending::LeaseEnded });
    }

    /// SIGTERM, and after the grace SIGKILL: its supervisor does that, daemon or not.
    pub(super) fn end_process(&mut self, at: usize, id: WorkId, ending: Ending) {
        let Some(process) = self.machines[at].executor.processes.get_mut(&id) else { return };
        let stops_already = core::mem::replace(&mut process.stopping, true);
        if stops_already || process.state != ProcessState::Running {
            return;
        }
        let (deaf, grace_ms) = (process.plan.deaf, process.plan.grace_ms);
        let quick_ms = self.executors.between(1, 300).min(grace_ms);
        let ms = if deaf { grace_ms } else { quick_ms };
        self.after(ms, Occurrence::Exits { at, id, ending });
    }

    pub(super) fn exits(&mut self, at: usize, id: WorkId, ending: Ending) {
        let name = self.machines[at].name();
        let Some(process) = self.machines[at].executor.processes.get_mut(&id) else { return };
        if process.state != ProcessState::Running {
            return;
        }
        self.trace.say(self.now_ms, Some(id.job), || {
            format!("{name}: {}.{} ended, {ending}", id.attempt, id.rank)
        });
        process.state = ProcessState::Exited(ending.clone());
        self.ledger.end(id, at, self.now_ms, Some(ending));
        self.happenings.push(Happening::Gone(id));
        self.moved_ms = self.now_ms;
        self.mix("exits", at, &[]);
        if self.machines[at].still.is_some() {
            let start = self.machines[at].starts;
            self.after(0, Occurrence::Gather { at, start, id });
        } else {
            self.gather(at, id);
        }
    }

    /// A daemon that comes back asks supervisors what became of their processes.
    pub(super) fn report_exits(&mut self, at: usize) {
        let processes = self.machines[at].executor.processes.iter();
        let exited: Vec<WorkId> = processes
            .filter(|(_, process)| matches!(process.state, ProcessState::Exited(_)))
            .map(|(id, _)| *id)
            .collect();
        for id in exited {
            let book = self.machines[at].daemon.as_ref().map(|peer| peer.book().1);
            if book.is_some_and(|mut work| !work.any(|work| work.id == id)) {
                // Its ending is in the journal already.
                self.machines[at].executor.processes.remove(&id);
            } else {
                self.gather(at, id);
            }
        }
    }

    pub(super) fn gather(&mut self, at: usize, id: WorkId) {
        if self.with_daemon(at, |peer, now| peer.draining(id, now)).is_some() {
            let (ms, start) = (self.executors.between(1, 800), self.machines[at].starts);
            self.after(ms, Occurrence::Gathered { at, start, id });
        }
    }

    pub(super) fn gathered(&mut self, at: usize, start: u64, id: WorkId) {
        if self.machines[at].starts != start {
            return;
        }
        let process = self.machines[at].executor.processes.get(&id);
        let Some(ProcessState::Exited(ending)) = process.map(|p| p.state.clone()) else { return };
        self.mix("gathered", at, &[]);
        let wall_ms = self.machines[at].clock.now(self.now_ms).wall_ms;
        let end = self.leave_results(at, id, ending, wall_ms);
        self.with_daemon(at, |peer, now| peer.ended(id, end, now));
    }

    pub(super) fn discard(&mut self, at: usize, id: WorkId) {
        let executor = &mut self.machines[at].executor;
        executor.preparing.remove(&id);
        executor.prepared.remove(&id);
        if executor.processes.contains_key(&id) {
            self.happenings.push(Happening::Misused(id, "discard what has a process"));
        }
    }

    pub(super) fn end_recorded(&mut self, at: usize, id: WorkId) {
        let executor = &mut self.machines[at].executor;
        executor.prepared.remove(&id);
        let ended = executor.processes.remove(&id);
        if ended.is_some_and(|process| !matches!(process.state, ProcessState::Exited(_))) {
            self.happenings.push(Happening::Misused(id, "record the ending of what lives"));
        }
    }

    pub(super) fn behaviour_of(&self, id: WorkId) -> Behaviour {
        let task = self.workload.by_job.get(&id.job).and_then(|t| self.workload.tasks.get(*t));
        task.map_or_else(|| Behaviour::plain(1_000), |task| task.behaviour.clone())
    }
}
