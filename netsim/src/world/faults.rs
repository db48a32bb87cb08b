//! What goes wrong: crashes, cuts, other people's processes. And the end of it.

use p2pit_protocol::Peer;

use super::{Occurrence, World};
use crate::{
    ledger::Happening,
    machine::{CrashAt, ProcessState},
    workload::WARM_UP_MS,
};

/// How a machine goes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// The daemon dies; supervisors and processes live on.
    Daemon,
    /// The machine dies and boots again: no process is left.
    Machine,
}

impl World {
    /// Draw the faults of the first phase.
    pub(super) fn plan_faults(&mut self) {
        let heal_ms = self.options.heal_ms();
        let machines = self.machines.len();
        for _ in 0..self.options.cuts {
            let at_ms = self.faults.between(WARM_UP_MS, heal_ms);
            let for_ms = self.faults.between(1_000, self.options.cut_ms_max.max(1_000));
            let directions = self.draw_cut(machines);
            self.at(at_ms, Occurrence::Cut { directions, for_ms });
        }
        let crashes =
            [(Down::Daemon, self.options.daemon_crashes), (Down::Machine, self.options.reboots)];
        for (down, count) in crashes {
            for _ in 0..count {
                let at_ms = self.faults.between(WARM_UP_MS, heal_ms);
                let (at, down_ms) = (self.faults.index(machines), self.draw_down_ms());
                self.at(at_ms, Occurrence::Crash { at, down, down_ms });
            }
        }
        for _ in 0..self.options.foreign_uses {
            let at_ms = self.faults.between(WARM_UP_MS, heal_ms);
            let at = self.faults.index(self.options.nodes);
            let gpu = self.faults.index(self.machines[at].capacity.gpus.len());
            let for_ms = self.faults.between(1_000, 60_000);
            self.at(at_ms, Occurrence::Foreign { at, gpu, for_ms });
        }
    }

    /// End every fault: all machines run, every link carries everything.
    pub fn heal(&mut self) {
        self.healed_ms = Some(self.now_ms);
        self.network.heal();
        for at in 0..self.machines.len() {
            self.machines[at].crash_at_write = None;
            if self.machines[at].foreign.is_empty() {
                continue;
            }
            self.machines[at].foreign.clear();
            self.with_daemon(at, |peer, now| peer.set_foreign(Vec::new(), now));
        }
        for at in 0..self.machines.len() {
            if !self.is_up(at) {
                self.after(at as u64, Occurrence::Start { at });
            }
            for peer in 0..self.machines.len() {
                let ms = self.faults.between(10, 1_000);
                self.after(ms, Occurrence::Link { at, peer });
            }
        }
    }

    /// Take a machine or its daemon away, to come back after `down_ms`, if it is to.
    pub fn crash(&mut self, at: usize, down: Down, down_ms: Option<u64>) {
        if self.healed_ms.is_some() {
            return;
        }
        let machine = &mut self.machines[at];
        let was_up = machine.daemon.take().is_some();
        machine.timer = None;
        machine.connected.clear();
        let ended = match down {
            Down::Daemon => {
                machine.executor.lose_daemon();
                Vec::new()
            }
            Down::Machine => machine.executor.lose_machine(),
        };
        let name = machine.name();
        if down == Down::Machine {
            self.counts.reboots += 1;
            // The boot clock starts anew, some time before the daemon does.
            let booting_ms = self.faults.between(0, 40_000).min(down_ms.unwrap_or(0));
            let back_ms = self.now_ms + down_ms.unwrap_or(0);
            self.machines[at].clock.reboot(back_ms - booting_ms, 0);
        } else {
            self.counts.crashes += u64::from(was_up);
        }
        self.trace.say(self.now_ms, None, || format!("{name} dies ({down:?})"));
        self.mix("crash", at, &[]);
        for id in ended {
            self.ledger.end(id, at, self.now_ms);
            self.happenings.push(Happening::Gone(id));
        }
        if was_up {
            self.tell_links(at, 50, 8_000);
            self.submissions_lost(at);
        }
        if let Some(down_ms) = down_ms {
            self.after(down_ms, Occurrence::Start { at });
        }
    }

    /// Start the daemon of a machine from its journal.
    pub fn start(&mut self, at: usize) {
        if self.is_up(at) {
            return;
        }
        let now = self.machines[at].clock.now(self.now_ms);
        let machine = &mut self.machines[at];
        machine.starts += 1;
        self.counts.restarts += u64::from(machine.starts > 1);
        let mut peer = match machine.new_daemon(&self.options, &self.pool.genesis) {
            Ok(peer) => peer,
            Err(reason) => {
                self.happenings.push(Happening::Unreadable(reason.to_string()));
                return;
            }
        };
        for (key, value) in &machine.journal {
            if let Err(reason) = peer.restore(key, value, now) {
                self.happenings.push(Happening::Unreadable(reason));
                return;
            }
        }
        if let Err(reason) = peer.restored() {
            self.happenings.push(Happening::Unreadable(reason));
            return;
        }
        if let Err(reason) = peer.restored() {
            self.happenings.push(Happening::Unreadable(reason));
            return;
        }
        for tree in &machine.trees {
            peer.tree_stored(*tree);
        }
        peer.set_offer(machine.capacity.clone(), None, now);
        peer.set_foreign(machine.foreign.iter().cloned().collect(), now);
        let address = ([10, 0, 0, u8::try_from(at).unwrap_or(0)], 4_000).into();
        peer.set_addresses(vec![address], vec![address], now);
        let known: Vec<_> = machine.executor.processes.keys().copied().collect();
        peer.resume(&known, now);
        peer.handle_timeout(now);
        machine.daemon = Some(peer);
        let name = machine.name();
        self.trace.say(self.now_ms, None, || format!("{name} starts, knowing {known:?}"));
        self.mix("start", at, &[]);
        if self.settle(at) {
            self.report_exits(at);
            self.tell_links(at, 20, 1_500);
        }
    }

    /// The daemon of a machine dies at a chosen entry of its journal.
    pub fn crash_at_write(&mut self, at: usize, crash: CrashAt) {
        self.machines[at].crash_at_write = Some(crash);
    }

    /// How many of `entries` become durable before a crash, and how long the daemon is
    /// away then; `None` where there is no crash.
    pub(super) fn cut_off(&mut self, at: usize, entries: usize) -> Option<(usize, u64)> {
        if entries == 0 || self.healed_ms.is_some() {
            return None;
        }
        let written = self.machines[at].writes;
        if let Some(crash) = self.machines[at].crash_at_write {
            let ahead = usize::try_from(crash.entry.checked_sub(written)?).ok()?;
            if ahead >= entries {
                return None;
            }
            self.machines[at].crash_at_write = None;
            return Some((ahead + usize::from(crash.after), crash.down_ms));
        }
        (self.faults.below(100_000) < self.options.write_crash_per_100k)
            .then(|| (self.faults.index(entries + 1), self.draw_down_ms()))
    }

    /// Cut these directions for some time.
    pub fn cut(&mut self, directions: Vec<(usize, usize)>, for_ms: u64) {
        if self.healed_ms.is_some() {
            return;
        }
        self.trace.say(self.now_ms, None, || format!("cut {directions:?} for {for_ms} ms"));
        for (from, to) in &directions {
            self.network.cut(*from, *to);
        }
        self.tell_directions(&directions, 100, 12_000);
        self.after(for_ms, Occurrence::Mend { directions });
    }

    pub(super) fn mend(&mut self, directions: &[(usize, usize)]) {
        if self.healed_ms.is_some() {
            return;
        }
        for (from, to) in directions {
            self.network.mend(*from, *to);
        }
        self.tell_directions(directions, 20, 3_000);
    }

    pub(super) fn foreign(&mut self, at: usize, gpu: usize, for_ms: u64) {
        if self.healed_ms.is_some() {
            return;
        }
        let Some(gpu_there) = self.machines[at].capacity.gpus.get(gpu) else { return };
        let uuid = gpu_there.uuid.clone();
        // The owner takes what is idle: a GPU a job computes on is reclaimed another way.
        let busy =
            self.machines[at].executor.processes.values().any(|process| {
                process.state != ProcessState::Spawning && process.gpus.contains(&uuid)
            });
        if !busy && self.machines[at].foreign.insert(uuid) {
            self.tell_foreign(at);
            self.after(for_ms, Occurrence::ForeignEnds { at, gpu });
        }
    }

    pub(super) fn foreign_ends(&mut self, at: usize, gpu: usize) {
        let Some(gpu) = self.machines[at].capacity.gpus.get(gpu) else { return };
        let uuid = gpu.uuid.clone();
        if self.machines[at].foreign.remove(&uuid) {
            self.tell_foreign(at);
        }
    }

    fn tell_foreign(&mut self, at: usize) {
        let gpus: Vec<_> = self.machines[at].foreign.iter().cloned().collect();
        self.with_daemon(at, |peer: &mut Peer, now| peer.set_foreign(gpus, now));
    }

    fn draw_down_ms(&mut self) -> u64 {
        self.faults.between(100, self.options.down_ms_max.max(100))
    }

    /// Directions to cut: between two machines, around one, or between two parts.
    fn draw_cut(&mut self, machines: usize) -> Vec<(usize, usize)> {
        let random = &mut self.faults;
        let (one, other) = (random.index(machines), random.index(machines));
        let kind = random.below(5);
        let part: Vec<bool> = (0..machines).map(|_| random.percent(50)).collect();
        let mut directions = Vec::new();
        for from in 0..machines {
            for to in (0..machines).filter(|to| *to != from) {
                let cut = match kind {
                    0 => (from, to) == (one, other),
                    1 => (from, to) == (one, other) || (to, from) == (one, other),
                    2 => from == one,
                    3 => from == one || to == one,
                    _ => part[from] != part[to],
                };
                if cut {
                    directions.push((from, to));
                }
            }
        }
        directions
    }

    /// Both ends of every link of a machine notice after a while what became of it.
    fn tell_links(&mut self, at: usize, low_ms: u64, high_ms: u64) {
        let others = (0..self.machines.len()).filter(|other| *other != at);
        let directions: Vec<_> = others.map(|other| (at, other)).collect();
        self.tell_directions(&directions, low_ms, high_ms);
    }

    fn tell_directions(&mut self, directions: &[(usize, usize)], low_ms: u64, high_ms: u64) {
        for (from, to) in directions {
            for (at, peer) in [(*from, *to), (*to, *from)] {
                let ms = self.faults.between(low_ms, high_ms);
                self.after(ms, Occurrence::Link { at, peer });
            }
        }
    }
}
