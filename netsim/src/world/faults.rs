//! What goes wrong: crashes, cuts, other people's processes. And the end of it.

use std::collections::{BTreeSet, VecDeque};

use p2pit_protocol::{
    JobId, Peer, StoreId,
    peer::Slot,
    record::{Keeper, quorum_of},
    wire,
};

use super::{Occurrence, World};
use crate::{
    ledger::Happening,
    machine::{CrashAt, Disk, ProcessState, Still},
    random::Random,
    workload::WARM_UP_MS,
};

/// How long a daemon may stand still before others take it for gone.
const STILL_NOTICED_MS: u64 = 20_000;

/// How long a daemon that ends in good order tries to hand over what it drives; how often it
/// looks, and how often it does where nothing is under way: as the real one.
const HAND_OVER_WITHIN_MS: u64 = 3_000;
const HAND_OVER_POLL_MS: u64 = 50;
const HAND_OVER_TRIES: u32 = 10;

/// How long what has no end counts as trouble.
const NO_END_MS: u64 = 1 << 40;

/// What was done to machines and links lately: what may explain that a lease ran out.
#[derive(Debug, Default)]
pub(crate) struct Troubles {
    list: VecDeque<Trouble>,
}

/// Something that kept machines from hearing each other.
#[derive(Debug, Clone)]
pub(crate) struct Trouble {
    /// Bit n: machine n is part of it.
    machines: Vec<bool>,
    pub(crate) from_ms: u64,
    pub(crate) to_ms: u64,
    /// It lay on links only: every machine went on.
    pub(crate) is_cut: bool,
}

impl Troubles {
    /// Troubles are forgotten once they ended this long ago.
    const KEPT_MS: u64 = 600_000;

    fn add(&mut self, machines: Vec<bool>, from_ms: u64, to_ms: u64, is_cut: bool) {
        while self.list.front().is_some_and(|t| t.to_ms + Self::KEPT_MS < from_ms) {
            self.list.pop_front();
        }
        self.list.push_back(Trouble { machines, from_ms, to_ms, is_cut });
    }

    /// Those of `machines` that reach beyond `since_ms`.
    pub(crate) fn of(&self, machines: &[usize], since_ms: u64) -> impl Iterator<Item = &Trouble> {
        self.list.iter().filter(move |trouble| {
            let named = |at: &usize| trouble.machines.get(*at).copied().unwrap_or(false);
            trouble.to_ms >= since_ms && machines.iter().any(named)
        })
    }
}

/// Where in a frame of writes, and in what would leave after it, a daemon dies.
pub(super) struct CutOff {
    pub(super) durable: bool,
    pub(super) leaving: usize,
    pub(super) down_ms: u64,
}

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
        self.plan_more_faults(heal_ms);
        for _ in 0..self.options.foreign_uses {
            let at_ms = self.faults.between(WARM_UP_MS, heal_ms);
            let at = self.faults.index(self.options.nodes);
            let gpu = self.faults.index(self.machines[at].capacity.gpus.len());
            let for_ms = self.faults.between(1_000, 60_000);
            self.at(at_ms, Occurrence::Foreign { at, gpu, for_ms });
        }
    }

    /// The same, of what came later: in a stream of its own, so that it shifts nothing.
    fn plan_more_faults(&mut self, heal_ms: u64) {
        let mut random = Random::of(self.options.seed, "more faults");
        let machines = self.machines.len();
        let options = self.options.clone();
        let when = |random: &mut Random, count: u64| -> Vec<(u64, usize, u64)> {
            let one = |_| {
                let at_ms = random.between(WARM_UP_MS, heal_ms);
                (at_ms, random.index(machines), random.between(0, 1_000))
            };
            (0..count).map(one).collect()
        };
        for (at_ms, at, share) in when(&mut random, options.wipes) {
            let down_ms = 1_000 + options.down_ms_max * share / 1_000;
            self.at(at_ms, Occurrence::Wipe { at, down_ms });
        }
        let stills = [(Still::Daemon, options.pauses), (Still::Machine, options.suspends)];
        for (still, count) in stills {
            for (at_ms, at, share) in when(&mut random, count) {
                let for_ms = 100 + options.still_ms_max * share / 1_000;
                self.at(at_ms, Occurrence::Still { at, still, for_ms });
            }
        }
        for (at_ms, at, share) in when(&mut random, options.full_disks) {
            let for_ms = 1_000 + options.down_ms_max * share / 1_000;
            self.at(at_ms, Occurrence::Fill { at, for_ms });
        }
        for (at_ms, at, share) in when(&mut random, options.wall_steps) {
            let most = i64::try_from(options.wall_step_ms_max).unwrap_or(0);
            let by_ms = most * (i64::try_from(share).unwrap_or(0) - 500) / 500;
            self.at(at_ms, Occurrence::StepWall { at, by_ms });
        }
        for (at_ms, one, share) in when(&mut random, options.slow_links) {
            let other = random.index(machines);
            let directions = match random.below(3) {
                0 => vec![(one, other)],
                1 => vec![(one, other), (other, one)],
                _ => (0..machines).flat_map(|n| [(one, n), (n, one)]).collect(),
            };
            let by_ms = 50 + options.slow_ms_max * share / 1_000;
            let for_ms = random.between(1_000, options.cut_ms_max.max(1_000));
            self.at(at_ms, Occurrence::Slow { directions, by_ms, for_ms });
        }
        // In a stream of its own again, as it came later still.
        let mut random = Random::of(self.options.seed, "faults of copies");
        for (at_ms, at, share) in when(&mut random, options.no_rooms) {
            let for_ms = 1_000 + 2 * options.down_ms_max * share / 1_000;
            self.at(at_ms, Occurrence::TakeRoom { at, for_ms });
        }
        for (at_ms, at, _) in when(&mut random, options.lost_copies) {
            self.at(at_ms, Occurrence::LoseCopies { at });
        }
    }

    /// End every fault: all machines run, every link carries everything.
    pub fn heal(&mut self) {
        self.healed_ms = Some(self.now_ms);
        self.network.heal();
        for at in 0..self.machines.len() {
            self.machines[at].crash_at_write = None;
            self.machines[at].disk_full = false;
            self.machines[at].no_room = false;
            self.machines[at].clock.set_wall_right();
            self.awake(at);
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
        if self.is_asleep(at) && down == Down::Daemon {
            // Nothing goes on there, not even dying.
            return;
        }
        self.trouble(&[at], down_ms.unwrap_or(NO_END_MS), false);
        self.forget_still(at);
        let machine = &mut self.machines[at];
        let was_up = machine.daemon.take().is_some();
        machine.timer = None;
        machine.connected.clear();
        machine.copying.clear();
        let acted = core::mem::take(&mut machine.acting);
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
            self.ledger.end(id, at, self.now_ms, None);
            self.happenings.push(Happening::Gone(id));
        }
        for (job, _) in acted {
            self.ledger.remove_acting(job, at);
        }
        if was_up {
            self.tell_links(at, 50, 8_000);
            self.submissions_lost(at);
        }
        if let Some(down_ms) = down_ms {
            self.after(down_ms, Occurrence::Start { at });
        }
    }

    /// The daemon of a machine hands over what it drives, and then the machine is switched off,
    /// to come back `down_ms` later, if it is to.
    pub fn leave(&mut self, at: usize, down_ms: Option<u64>) {
        if self.healed_ms.is_none() {
            let until_ms = self.now_ms + HAND_OVER_WITHIN_MS;
            self.after(0, Occurrence::HandOver { at, until_ms, idle: 0, down_ms });
        }
    }

    pub(super) fn hand_over(&mut self, at: usize, until_ms: u64, idle: u32, down_ms: Option<u64>) {
        let handed = self.with_daemon(at, Peer::hand_over);
        let left = self.machines[at].daemon.as_ref().map_or(0, Peer::driven);
        let idle = if handed.is_some_and(|under_way| under_way > 0) { 0 } else { idle + 1 };
        if left == 0 || idle == HAND_OVER_TRIES || self.now_ms >= until_ms {
            self.crash(at, Down::Machine, down_ms);
        } else {
            let next = Occurrence::HandOver { at, until_ms, idle, down_ms };
            self.after(HAND_OVER_POLL_MS, next);
        }
    }

    /// A machine dies and comes back with an empty disk, as another store; unless a record
    /// would lose the majority of its keepers for good.
    pub(super) fn wipe(&mut self, at: usize, down_ms: u64) {
        if self.healed_ms.is_none() && self.may_lose_disk(at) {
            self.crash_and_wipe(at, down_ms);
        }
    }

    /// A machine dies and comes back after `down_ms` with an empty disk, as another store.
    pub fn crash_and_wipe(&mut self, at: usize, down_ms: u64) {
        self.crash(at, Down::Machine, Some(down_ms));
        self.new_store(at);
        self.machines[at].trees.clear();
        self.machines[at].left.clear();
        self.machines[at].saves.clear();
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, None, || format!("the disk of {name} is emptied"));
        self.counts.wipes += 1;
    }

    /// Whether every job would keep a majority of its keepers' disks without this one, and its
    /// inputs; and no submission, which may become a job, names it.
    fn may_lose_disk(&self, at: usize) -> bool {
        let keeps = |job: &JobId, (peer, store): &Keeper| {
            let machine = self.machine_of(*peer).map(|index| &self.machines[index]);
            machine.is_some_and(|machine| {
                let slot = Slot::Record(*job).to_bytes();
                machine.index != at
                    && machine.member.store == *store
                    && machine.journal.contains_key(&slot)
            })
        };
        // Of a job that ended somebody may still have a rank, and waits to be told.
        let slots = self.machines.iter().flat_map(|machine| machine.journal.keys());
        let waiting = slots.filter_map(|key| match wire::decode(key) {
            Ok(Slot::Work(job, ..) | Slot::End(job, ..)) => Some(job),
            _ => None,
        });
        let jobs: BTreeSet<JobId> = self.ledger.open.iter().copied().chain(waiting).collect();
        let mut registers =
            jobs.iter().filter_map(|job| Some((job, self.ledger.registers.get(job)?.keepers())));
        let survive = registers.all(|(job, keepers)| {
            let left = keepers.iter().filter(|keeper| keeps(job, keeper)).count();
            left >= quorum_of(keepers.len())
        });
        let asked = self.workload.tasks.iter().filter(|task| task.job.is_none());
        let mut asked = asked.filter_map(|task| self.keepers_named(task.spec.as_ref()?)).flatten();
        survive && !asked.any(|(peer, _)| self.machine_of(peer) == Some(at))
    }

    /// What is on a machine's disk now.
    #[must_use]
    pub fn disk(&self, at: usize) -> Disk {
        let machine = &self.machines[at];
        Disk {
            member: machine.member.clone(),
            journal: machine.journal.clone(),
            trees: machine.trees.clone(),
            left: machine.left.clone(),
            saves: machine.saves.clone(),
            boots: machine.boots,
        }
    }

    /// A machine dies and comes back after `down_ms` with `disk`: an old copy of its own, or
    /// that of another machine, which then has a double.
    pub fn crash_and_restore(&mut self, at: usize, disk: Disk, down_ms: u64) {
        self.crash(at, Down::Machine, Some(down_ms));
        let machine = &mut self.machines[at];
        let peer = p2pit_protocol::PeerId(disk.member.key.public());
        if peer != machine.peer
            && let Some(original) = self.by_peer.get(&peer)
        {
            self.clones.insert(*original, at);
        }
        machine.peer = peer;
        machine.member = disk.member;
        machine.journal = disk.journal;
        machine.trees = disk.trees;
        (machine.left, machine.saves) = (disk.left, disk.saves);
        machine.boots = disk.boots;
    }

    /// A daemon found that its store has another life: it starts again as another store, with
    /// nothing of what the old one kept.
    pub(super) fn refuse_store(&mut self, at: usize, reason: &str) {
        let name = self.machines[at].name();
        let text = format!("{name} gives its store up: {reason}");
        self.trace.say(self.now_ms, None, || text);
        self.crash(at, Down::Daemon, Some(1_000));
        self.new_store(at);
        self.counts.stores_refused += 1;
    }

    /// The machine's journal is another's, with nothing in it but who is in the pool.
    fn new_store(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        machine.wipes += 1;
        let stream = format!("store {at} {}", machine.wipes);
        machine.member.store = StoreId(Random::of(self.options.seed, &stream).bytes());
        machine.journal = self.pool.journal.iter().cloned().collect();
        machine.tombstones = 0;
        machine.boots = 0;
    }

    /// Where a message to a machine goes: to it or to its double.
    pub(super) fn clone_of(&mut self, at: usize) -> usize {
        match self.clones.get(&at) {
            Some(double) if self.is_up(*double) && (!self.is_up(at) || self.faults.percent(50)) => {
                *double
            }
            _ => at,
        }
    }

    /// A machine's boot clock runs fast by `drift_ppm` parts per million from now on.
    pub fn set_boot_drift(&mut self, at: usize, drift_ppm: i64) {
        self.machines[at].clock.set_drift(self.now_ms, drift_ppm);
        self.rearm(at);
    }

    /// A machine's boot clock jumps.
    pub fn step_boot_clock(&mut self, at: usize, by_ms: i64) {
        self.machines[at].clock.step_boot(self.now_ms, by_ms);
        self.rearm(at);
    }

    /// A machine's wall clock jumps.
    pub fn step_wall_clock(&mut self, at: usize, by_ms: i64) {
        if self.healed_ms.is_some() {
            return;
        }
        self.counts.wall_steps += 1;
        self.machines[at].clock.step_wall(by_ms);
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, None, || format!("{name}: wall clock jumps {by_ms} ms"));
    }

    /// Timers and leases of a machine whose boot clock changed.
    fn rearm(&mut self, at: usize) {
        self.machines[at].timer = None;
        self.arm(at);
        let leased = self.machines[at].executor.processes.iter();
        let leased: Vec<_> = leased.map(|(id, process)| (*id, process.until_ms)).collect();
        for (id, until_ms) in leased {
            self.lease(at, id, until_ms);
        }
    }

    /// A machine or its daemon stands still for some time.
    pub fn stand_still(&mut self, at: usize, still: Still, for_ms: u64) {
        if self.healed_ms.is_some() || self.machines[at].still.is_some() {
            return;
        }
        if still == Still::Daemon && !self.is_up(at) {
            return;
        }
        match still {
            Still::Daemon => self.counts.pauses += 1,
            Still::Machine => self.counts.suspends += 1,
        }
        let name = self.machines[at].name();
        self.trace
            .say(self.now_ms, None, || format!("{name} stands still ({still:?}), {for_ms} ms"));
        self.machines[at].still = Some(still);
        self.trouble(&[at], for_ms, false);
        if for_ms > STILL_NOTICED_MS {
            self.tell_links(at, STILL_NOTICED_MS / 2, STILL_NOTICED_MS);
        }
        self.after(for_ms, Occurrence::Wake { at });
    }

    /// A machine that stood still goes on; what waited for it happens now.
    pub fn awake(&mut self, at: usize) {
        let Some(still) = self.machines[at].still.take() else { return };
        self.machines[at].went_on_ms = Some(self.now_ms);
        if still == Still::Machine {
            self.machines[at].woke_ms = Some(self.now_ms);
        }
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, None, || format!("{name} goes on"));
        for occurrence in self.waiting.remove(&at).unwrap_or_default() {
            self.after(0, occurrence);
        }
        if self.is_up(at) {
            self.tell_links(at, 20, 1_500);
        }
    }

    /// A machine that stood still is gone: what waited for its daemon never happens.
    fn forget_still(&mut self, at: usize) {
        if self.machines[at].still.take().is_none() {
            return;
        }
        for occurrence in self.waiting.remove(&at).unwrap_or_default() {
            if matches!(occurrence, Occurrence::Start { .. } | Occurrence::ForeignEnds { .. }) {
                self.after(0, occurrence);
            }
        }
    }

    pub(super) fn is_asleep(&self, at: usize) -> bool {
        self.machines[at].still == Some(Still::Machine)
    }

    /// Nothing can be written to a machine's disk for some time.
    pub fn fill_disk(&mut self, at: usize, for_ms: u64) {
        if self.healed_ms.is_some() {
            return;
        }
        self.machines[at].disk_full = true;
        self.trouble(&[at], for_ms, false);
        let name = self.machines[at].name();
        self.trace.say(self.now_ms, None, || format!("{name}: disk full for {for_ms} ms"));
        self.after(for_ms, Occurrence::Room { at });
    }

    pub(super) fn make_room(&mut self, at: usize) {
        self.machines[at].disk_full = false;
        self.after(0, Occurrence::Start { at });
    }

    pub(super) fn slow(&mut self, directions: Vec<(usize, usize)>, by_ms: u64, for_ms: u64) {
        if self.healed_ms.is_some() {
            return;
        }
        for (from, to) in &directions {
            self.network.slow(*from, *to, by_ms);
        }
        self.after(for_ms, Occurrence::Quick { directions });
    }

    fn trouble(&mut self, machines: &[usize], for_ms: u64, is_cut: bool) {
        let mut named = vec![false; self.machines.len()];
        for at in machines {
            named[*at] = true;
        }
        self.troubles.add(named, self.now_ms, self.now_ms + for_ms, is_cut);
    }

    /// Start the daemon of a machine from its journal.
    pub fn start(&mut self, at: usize) {
        // A daemon writes that it starts: without room it does not.
        if self.is_up(at) || self.machines[at].disk_full {
            return;
        }
        // The world may have healed before the machine was to be back.
        self.machines[at].clock.runs_by(self.now_ms);
        let now = self.machines[at].clock.now(self.now_ms);
        let machine = &mut self.machines[at];
        machine.starts += 1;
        machine.started_ms = self.now_ms;
        machine.boots += 1;
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
            self.tell_what_is_held(at);
            self.report_exits(at);
            self.tell_links(at, 20, 1_500);
        }
    }

    /// The daemon of a machine dies at a chosen entry of its journal.
    pub fn crash_at_write(&mut self, at: usize, crash: CrashAt) {
        self.machines[at].crash_at_write = Some(crash);
    }

    /// Whether a daemon dies over these writes, and what of them stays; `None` where it
    /// does not die.
    pub(super) fn cut_off(&mut self, at: usize, entries: usize) -> Option<CutOff> {
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
            return Some(CutOff { durable: crash.after, leaving: 0, down_ms: crash.down_ms });
        }
        if self.faults.below(100_000) >= self.options.write_crash_per_100k {
            return None;
        }
        let durable = self.faults.percent(60);
        // What is sent is sent one by one: a few may have left already.
        let leaving = if durable { self.faults.index(4) } else { 0 };
        Some(CutOff { durable, leaving, down_ms: self.draw_down_ms() })
    }

    /// Cut these directions for some time.
    pub fn cut(&mut self, directions: Vec<(usize, usize)>, for_ms: u64) {
        if self.healed_ms.is_some() {
            return;
        }
        self.trace.say(self.now_ms, None, || format!("cut {directions:?} for {for_ms} ms"));
        self.counts.cuts += 1;
        let mut ends: Vec<usize> = directions.iter().flat_map(|(a, b)| [*a, *b]).collect();
        ends.sort_unstable();
        ends.dedup();
        self.trouble(&ends, for_ms, true);
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
