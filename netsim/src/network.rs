//! Links between machines: how long a message takes, whether it comes, and how often.

use std::collections::BTreeMap;

use crate::{options::Options, random::Random};

/// All links of a world.
#[derive(Debug)]
pub struct Network {
    random: Random,
    machines: usize,
    /// What one link takes, in milliseconds, by sender and then receiver.
    link_ms: Vec<u64>,
    /// Cuts that lie on a direction; it carries nothing while there are any.
    cuts: BTreeMap<(usize, usize), u32>,
    /// What a direction takes beyond that for a while.
    slow_ms: BTreeMap<(usize, usize), u64>,
    /// Loss and repetition ended.
    healed: bool,
}

/// What becomes of one message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fate {
    /// How long each copy takes; none where it is lost.
    pub copies_ms: Vec<u64>,
}

impl Network {
    /// The links of `machines`.
    #[must_use]
    pub fn new(options: &Options, machines: usize) -> Self {
        let mut random = Random::of(options.seed, "links");
        let mut draw = || options.latency_ms_min + random.between(0, options.latency_ms_spread);
        let link_ms = (0..machines * machines).map(|_| draw()).collect();
        Self {
            random: Random::of(options.seed, "network"),
            machines,
            link_ms,
            slow_ms: BTreeMap::new(),
            cuts: BTreeMap::new(),
            healed: false,
        }
    }

    /// Draw what becomes of a message on a link that is not cut.
    pub fn fate(&mut self, options: &Options, from: usize, to: usize) -> Fate {
        let link_ms = self.link_ms(from, to);
        let first_ms = link_ms + self.random.between(0, options.jitter_ms_max);
        let second_ms = link_ms + self.random.between(0, options.jitter_ms_max);
        if self.healed {
            return Fate { copies_ms: vec![first_ms] };
        }
        let mut copies_ms = Vec::new();
        if !self.random.permille(options.loss_permille) {
            copies_ms.push(first_ms);
        }
        if self.random.permille(options.duplicate_permille) {
            let late = self.random.percent(options.late_percent);
            let late_ms = if late { self.random.between(0, options.late_ms_max) } else { 0 };
            copies_ms.push(second_ms + late_ms);
        }
        Fate { copies_ms }
    }

    /// Draw how long a piece of gossip takes to a node; `None` where it misses it.
    pub fn gossip(&mut self, options: &Options, from: usize, to: usize) -> Option<u64> {
        let link_ms = self.link_ms(from, to);
        // A few hops, each with a delay of its own.
        let hops_ms = 3 * link_ms + self.random.between(0, 3 * options.jitter_ms_max + 20);
        let missed = !self.healed && self.random.permille(options.gossip_loss_permille);
        (!missed).then_some(hops_ms)
    }

    /// What a direction takes now.
    fn link_ms(&self, from: usize, to: usize) -> u64 {
        let usual_ms = self.link_ms.get(from * self.machines + to).copied().unwrap_or_default();
        if self.slow_ms.is_empty() {
            return usual_ms;
        }
        usual_ms + self.slow_ms.get(&(from, to)).copied().unwrap_or_default()
    }

    /// From now on a direction takes `by_ms` longer than it usually does.
    pub fn slow(&mut self, from: usize, to: usize, by_ms: u64) {
        if by_ms == 0 {
            self.slow_ms.remove(&(from, to));
        } else {
            self.slow_ms.insert((from, to), by_ms);
        }
    }

    /// Whether nothing is cut.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.cuts.is_empty()
    }

    /// Whether nothing gets from `from` to `to`.
    #[must_use]
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        !self.cuts.is_empty() && self.cuts.contains_key(&(from, to))
    }

    /// Cut one direction once more.
    pub fn cut(&mut self, from: usize, to: usize) {
        *self.cuts.entry((from, to)).or_default() += 1;
    }

    /// Take one cut off a direction.
    pub fn mend(&mut self, from: usize, to: usize) {
        if let Some(cuts) = self.cuts.get_mut(&(from, to)) {
            *cuts -= 1;
            if *cuts == 0 {
                self.cuts.remove(&(from, to));
            }
        }
    }

    /// From now on everything arrives, once.
    pub fn heal(&mut self) {
        self.healed = true;
        self.cuts.clear();
        self.slow_ms.clear();
    }
}
