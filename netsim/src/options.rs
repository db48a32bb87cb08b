//! Everything a run is made of. All of it is drawn from the seed, unless set.

use core::fmt;

use p2pit_protocol::sabotage::Rule;

use crate::random::Random;

macro_rules! options {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// A run's parameters.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Options {
            $($(#[$doc])* pub $name: $type,)*
        }

        impl fmt::Display for Options {
            /// A line for each option.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                $(writeln!(f, "{} {:?}", stringify!($name), self.$name)?;)*
                Ok(())
            }
        }
    };
}

options! {
    /// Decides everything else that is not set.
    seed: u64,
    /// A rule that is left out, to see that its checker notices.
    removed_rule: Option<Rule>,
    /// The only rule that is watched, by its name; every one without it.
    watched_rule: Option<&'static str>,
    /// Nodes that offer GPUs.
    nodes: usize,
    /// Nodes that only submit.
    clients: usize,
    /// People.
    users: usize,
    /// The GPUs of each node, such as `2xv100`, node by node; drawn where empty.
    inventory: Vec<String>,

    /// Least time a message takes.
    latency_ms_min: u64,
    /// Most that one link adds to that, always.
    latency_ms_spread: u64,
    /// Most that one message is late, which makes others overtake it.
    jitter_ms_max: u64,
    /// Of a thousand messages, how many are lost.
    loss_permille: u64,
    /// Of a thousand messages, how many come twice.
    duplicate_permille: u64,
    /// Of a hundred second copies, how many come late.
    late_percent: u64,
    /// How late those come at most.
    late_ms_max: u64,
    /// Of a thousand pieces of gossip, how many miss a node.
    gossip_loss_permille: u64,
    /// How often links are cut, one way or both, between two nodes or two parts.
    cuts: u64,
    /// How long a cut lasts at most.
    cut_ms_max: u64,

    /// How often a daemon dies; its processes live on.
    daemon_crashes: u64,
    /// How often a machine dies with everything on it.
    reboots: u64,
    /// Of a hundred thousand batches of writes, how many are cut off by a crash.
    write_crash_per_100k: u64,
    /// How long a daemon or machine is away at most.
    down_ms_max: u64,
    /// How often someone else computes on a GPU.
    foreign_uses: u64,
    /// How often a machine dies and comes back with an empty disk.
    wipes: u64,
    /// How often a daemon stands still, as by SIGSTOP.
    pauses: u64,
    /// How often a machine sleeps.
    suspends: u64,
    /// How long either lasts at most.
    still_ms_max: u64,
    /// How often a disk is full for a while.
    full_disks: u64,
    /// How often a wall clock jumps.
    wall_steps: u64,
    /// How far it jumps at most.
    wall_step_ms_max: u64,
    /// How often links are slow for a while.
    slow_links: u64,
    /// How much longer they take then at most.
    slow_ms_max: u64,
    /// How far a wall clock is off at most.
    skew_ms_max: u64,
    /// How much a boot clock is fast or slow at most, in parts per million.
    drift_ppm_max: u64,

    /// Jobs.
    jobs: usize,
    /// In which time they are submitted.
    span_ms: u64,
    /// Of a hundred jobs, how many are submitted together with the one before.
    burst_percent: u64,
    /// Of a hundred jobs, how many have several processes.
    gang_percent: u64,
    /// How much of the pool the largest gang may want.
    gang_share_percent: u64,
    /// How long a process runs at most, by itself.
    run_ms_max: u64,
    /// Of a thousand processes, how many fail.
    exit_failure_permille: u64,
    /// Of a hundred jobs, how many never end by themselves.
    hang_percent: u64,
    /// Of a hundred processes, how many ignore SIGTERM.
    deaf_percent: u64,
    /// Of a hundred jobs, how many are stopped by their owner.
    stop_percent: u64,
    /// Of a hundred jobs, how many are run again elsewhere when they fail or are cut off.
    retry_percent: u64,
    /// How long code and data take at most.
    prepare_ms_max: u64,
    /// Of a thousand preparations, how many fail.
    prepare_failure_permille: u64,
    /// How long a copy of what a rank left takes at most.
    copy_ms_max: u64,
    /// How often `keep/` is copied off its node at most, in milliseconds between.
    keep_every_ms: u64,
    /// How often a machine has no room for copies for a while.
    no_rooms: u64,
    /// How often copies on a disk go bad.
    lost_copies: u64,
}

/// What two boot clocks that keep the promised bound of 0.1 % may each be off.
pub const DRIFT_PPM_MAX: u64 = 500;

/// What came later than the rest: drawn from a stream of its own.
struct MoreFaults {
    wipes: u64,
    pauses: u64,
    suspends: u64,
    still_ms_max: u64,
    full_disks: u64,
    wall_steps: u64,
    wall_step_ms_max: u64,
    slow_links: u64,
    slow_ms_max: u64,
    retry_percent: u64,
}

impl MoreFaults {
    fn draw(seed: u64) -> Self {
        let mut random = Random::of(seed, "more options");
        // Each kind is absent from some runs, so that none hides what another does.
        let mut some = |most: u64| if random.percent(60) { random.between(1, most) } else { 0 };
        Self {
            wipes: some(3),
            pauses: some(8),
            suspends: some(6),
            full_disks: some(4),
            wall_steps: some(6),
            slow_links: some(6),
            still_ms_max: random.between(1_000, 240_000),
            wall_step_ms_max: random.between(1_000, 100_000),
            slow_ms_max: random.between(100, 6_000),
            retry_percent: random.between(0, 100),
        }
    }
}

/// The least time of all nodes together in a run of [`Options::long`].
const LONG_NODE_MS: u64 = 21 * 3_600_000;

impl Options {
    /// The options of `seed`, at the usual size; each group of faults is absent from about a
    /// third of all seeds.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        Self::draw_all(seed).without_some()
    }

    /// The same with every group of faults that [`Options::draw`] may leave out: what a seed
    /// meant before groups could be absent. Seeds that failed then are kept by it.
    #[must_use]
    pub fn draw_all(seed: u64) -> Self {
        let mut random = Random::of(seed, "options");
        let r = &mut random;
        let more = MoreFaults::draw(seed);
        let mut copies = Random::of(seed, "copies");
        Self {
            seed,
            removed_rule: None,
            watched_rule: None,
            nodes: 10,
            clients: 2,
            users: 3,
            inventory: Vec::new(),
            latency_ms_min: r.between(0, 3),
            latency_ms_spread: r.between(0, 40),
            jitter_ms_max: r.between(0, 60),
            loss_permille: r.between(0, 60),
            duplicate_permille: r.between(0, 80),
            late_percent: r.between(0, 40),
            late_ms_max: r.between(1_000, 180_000),
            gossip_loss_permille: r.between(0, 300),
            cuts: r.between(0, 10),
            cut_ms_max: r.between(2_000, 150_000),
            daemon_crashes: r.between(0, 12),
            reboots: r.between(0, 5),
            write_crash_per_100k: r.between(0, 150),
            down_ms_max: r.between(500, 120_000),
            foreign_uses: r.between(0, 10),
            wipes: more.wipes,
            pauses: more.pauses,
            suspends: more.suspends,
            still_ms_max: more.still_ms_max,
            full_disks: more.full_disks,
            wall_steps: more.wall_steps,
            wall_step_ms_max: more.wall_step_ms_max,
            slow_links: more.slow_links,
            slow_ms_max: more.slow_ms_max,
            skew_ms_max: r.between(0, 20_000),
            drift_ppm_max: r.between(0, DRIFT_PPM_MAX),
            jobs: 300,
            span_ms: r.between(300_000, 1_200_000),
            burst_percent: 0,
            gang_percent: r.between(20, 60),
            gang_share_percent: r.between(20, 80),
            run_ms_max: r.between(2_000, 60_000),
            exit_failure_permille: r.between(0, 60),
            hang_percent: r.between(0, 5),
            deaf_percent: r.between(0, 30),
            stop_percent: r.between(0, 15),
            retry_percent: more.retry_percent,
            prepare_ms_max: r.between(100, 20_000),
            prepare_failure_permille: r.between(0, 40),
            copy_ms_max: copies.between(20, 8_000),
            keep_every_ms: copies.between(2_000, 30_000),
            no_rooms: if copies.percent(60) { copies.between(1, 6) } else { 0 },
            lost_copies: if copies.percent(60) { copies.between(1, 6) } else { 0 },
        }
    }

    /// A small pool with too much to do, in which something goes wrong all the time: many
    /// more faults for each event than in [`Options::draw`], and as many groups of them.
    #[must_use]
    pub fn stress(seed: u64) -> Self {
        Self::stress_all(seed).without_some()
    }

    /// The same with every group of faults, as [`Options::draw_all`].
    #[must_use]
    pub fn stress_all(seed: u64) -> Self {
        let mut random = Random::of(seed, "stress");
        let r = &mut random;
        let nodes = r.between(2, 5);
        Self {
            nodes: usize::try_from(nodes).unwrap_or(2),
            clients: 1,
            users: 2,
            latency_ms_spread: r.between(0, 150),
            loss_permille: r.between(0, 200),
            duplicate_permille: r.between(0, 300),
            late_percent: r.between(0, 60),
            late_ms_max: r.between(1_000, 90_000),
            cuts: r.between(0, 8),
            cut_ms_max: r.between(2_000, 100_000),
            daemon_crashes: r.between(0, 10),
            reboots: r.between(0, 6),
            write_crash_per_100k: r.between(0, 3_000),
            down_ms_max: r.between(200, 30_000),
            foreign_uses: r.between(0, 5),
            jobs: 30,
            span_ms: r.between(20_000, 150_000),
            gang_percent: r.between(30, 90),
            gang_share_percent: r.between(40, 100),
            run_ms_max: r.between(500, 20_000),
            stop_percent: r.between(0, 30),
            prepare_ms_max: r.between(50, 10_000),
            prepare_failure_permille: r.between(0, 150),
            ..Self::draw_all(seed)
        }
    }

    /// A long run of few jobs, of 20 node-hours or more: of ten seeds one is a pool of fifty for
    /// half an hour, two are one of twenty for an hour, the others of five to ten for so many
    /// hours as it takes. Faults are drawn as in [`Options::draw`], or as rarely for each hour.
    #[must_use]
    pub fn long(seed: u64) -> Self {
        Self::long_all(seed).without_some()
    }

    /// The same with every group of faults, as [`Options::draw_all`].
    #[must_use]
    pub fn long_all(seed: u64) -> Self {
        let mut random = Random::of(seed, "long");
        let r = &mut random;
        let mut bursts = Random::of(seed, "long bursts");
        let (nodes, span_ms) = match r.below(10) {
            0 => (50, 30 * 60_000),
            1 | 2 => (20, 3_600_000),
            _ => {
                let nodes = r.between(5, 10);
                (nodes, LONG_NODE_MS.div_ceil(nodes))
            }
        };
        Self {
            nodes: usize::try_from(nodes).unwrap_or(5),
            clients: 2,
            jobs: usize::try_from(r.between(25, 40)).unwrap_or(25),
            span_ms,
            // Few jobs for the time: only those that come together want the same GPUs.
            burst_percent: if bursts.percent(50) { bursts.between(20, 80) } else { 0 },
            run_ms_max: r.between(10_000, 900_000),
            // Long enough for leases to run out.
            cut_ms_max: r.between(10_000, 600_000),
            down_ms_max: r.between(1_000, 500_000),
            ..Self::draw_all(seed)
        }
    }

    /// Leave out some groups of faults, so that none hides for ever what another does: each in
    /// about a third of all seeds. Drawn from a stream of its own; the rest stays as it is.
    fn without_some(mut self) -> Self {
        let mut random = Random::of(self.seed, "groups of faults");
        let mut absent = || random.percent(33);
        if absent() {
            (self.loss_permille, self.duplicate_permille, self.late_percent) = (0, 0, 0);
        }
        if absent() {
            self.gossip_loss_permille = 0;
        }
        if absent() {
            self.cuts = 0;
        }
        if absent() {
            (self.daemon_crashes, self.write_crash_per_100k) = (0, 0);
        }
        if absent() {
            self.reboots = 0;
        }
        if absent() {
            self.drift_ppm_max = 0;
        }
        if absent() {
            self.skew_ms_max = 0;
        }
        if absent() {
            (self.exit_failure_permille, self.prepare_failure_permille) = (0, 0);
        }
        self
    }

    /// A small pool in which nothing goes wrong by itself and nobody submits anything:
    /// for stories that say themselves what happens.
    #[must_use]
    pub fn calm(seed: u64, inventory: &[&str]) -> Self {
        Self {
            nodes: inventory.len(),
            clients: 1,
            users: 2,
            inventory: inventory.iter().map(ToString::to_string).collect(),
            latency_ms_min: 1,
            latency_ms_spread: 4,
            jitter_ms_max: 3,
            jobs: 0,
            span_ms: 1_000,
            run_ms_max: 5_000,
            prepare_ms_max: 500,
            copy_ms_max: 50,
            keep_every_ms: p2pit_protocol::job::KEEP_EVERY_MS,
            ..Self::draw_all(seed).without_faults()
        }
    }

    /// The same, with nothing that goes wrong.
    #[must_use]
    pub fn without_faults(self) -> Self {
        Self {
            loss_permille: 0,
            duplicate_permille: 0,
            gossip_loss_permille: 0,
            cuts: 0,
            daemon_crashes: 0,
            reboots: 0,
            write_crash_per_100k: 0,
            wipes: 0,
            pauses: 0,
            suspends: 0,
            full_disks: 0,
            wall_steps: 0,
            slow_links: 0,
            foreign_uses: 0,
            exit_failure_permille: 0,
            hang_percent: 0,
            deaf_percent: 0,
            stop_percent: 0,
            prepare_failure_permille: 0,
            no_rooms: 0,
            lost_copies: 0,
            ..self
        }
    }

    /// Whether nothing is drawn that keeps machines from hearing each other.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let Self { loss_permille, cuts, daemon_crashes, reboots, write_crash_per_100k, .. } = self;
        let Self { wipes, pauses, suspends, full_disks, slow_links, .. } = self;
        [loss_permille, cuts, daemon_crashes, reboots, write_crash_per_100k]
            .into_iter()
            .chain([wipes, pauses, suspends, full_disks, slow_links])
            .all(|count| *count == 0)
    }

    /// How many people there are: each came in with a machine.
    #[must_use]
    pub fn people(&self) -> usize {
        self.users.min(self.nodes + self.clients).max(1)
    }

    /// When faults end, in true time.
    #[must_use]
    pub fn heal_ms(&self) -> u64 {
        crate::workload::WARM_UP_MS + self.span_ms + 30_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_of_faults_is_absent_from_about_a_third_of_all_seeds() {
        for draw in [Options::draw, Options::stress, Options::long] {
            let all: Vec<Options> = (0..600).map(draw).collect();
            let groups: [fn(&Options) -> u64; 8] = [
                |o| o.loss_permille + o.duplicate_permille + o.late_percent,
                |o| o.gossip_loss_permille,
                |o| o.cuts,
                |o| o.daemon_crashes + o.write_crash_per_100k,
                |o| o.reboots,
                |o| o.drift_ppm_max,
                |o| o.skew_ms_max,
                |o| o.exit_failure_permille + o.prepare_failure_permille,
            ];
            for (n, group) in groups.iter().enumerate() {
                let absent = all.iter().filter(|options| group(options) == 0).count();
                // A few draw no cut or reboot where they could have had some.
                assert!((150..300).contains(&absent), "group {n} is absent from {absent} of 600");
            }
        }
    }

    #[test]
    fn what_is_left_out_changes_nothing_else() {
        for seed in 0..50 {
            let (all, some) = (Options::stress_all(seed), Options::stress(seed));
            let with_all = Options {
                loss_permille: all.loss_permille,
                duplicate_permille: all.duplicate_permille,
                late_percent: all.late_percent,
                gossip_loss_permille: all.gossip_loss_permille,
                cuts: all.cuts,
                daemon_crashes: all.daemon_crashes,
                write_crash_per_100k: all.write_crash_per_100k,
                reboots: all.reboots,
                drift_ppm_max: all.drift_ppm_max,
                skew_ms_max: all.skew_ms_max,
                exit_failure_permille: all.exit_failure_permille,
                prepare_failure_permille: all.prepare_failure_permille,
                ..some
            };
            assert_eq!(with_all, all);
        }
    }

    #[test]
    fn a_long_run_is_of_twenty_node_hours_or_more() {
        let mut small = 0;
        for seed in 0..300 {
            let Options { nodes, span_ms, .. } = Options::long(seed);
            assert!(nodes as u64 * span_ms >= 20 * 3_600_000, "seed {seed}");
            assert!((5..=10).contains(&nodes) || nodes == 20 || nodes == 50, "seed {seed}");
            small += u64::from(nodes <= 10);
        }
        assert!((180..240).contains(&small), "{small} of 300 are small");
    }
}
