//! How the GPUs of a machine are dealt out to needs that overlap.
//!
//! `[gpu,v100]` on a machine with one V100 and one GTX must not give the V100 away as
//! any `gpu`. Needs of one kind are counted together, GPUs are dealt one supply after
//! the other, and where a kind is full, what it holds is moved to other kinds along an
//! augmenting path. That is exact: it fails only where no dealing out exists. And since
//! a supply once used stays used, what is dealt first is preferred: the GPUs used are
//! the least that could be, in the order of the supplies (the greedy rule of a
//! transversal matroid).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{GpuNeed, Process};
use crate::inventory::{Capacity, Gpu};

/// What the processes of some groups ask for, in terms of distinct kinds of GPU need.
pub(super) struct Demand<'a> {
    /// The most particular first.
    pub(super) kinds: Vec<&'a GpuNeed>,
    /// One per group.
    pub(super) each: Vec<Each>,
}

/// What one process of a group takes from its machine.
#[derive(Debug)]
pub(super) struct Each {
    /// GPUs per kind.
    pub(super) gpus: Vec<u64>,
    /// Of each need in the order written, its kind.
    pub(super) kind_of_need: Vec<usize>,
    pub(super) cores: u64,
    pub(super) ram_mib: u64,
}

/// What a machine offers to a [`Demand`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Room {
    pub(super) supplies: Vec<Supply>,
    pub(super) cores: u64,
    pub(super) ram_mib: u64,
}

/// GPUs that serve the same kinds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Supply {
    pub(super) count: u64,
    /// By kind.
    pub(super) serves: Vec<bool>,
}

/// Who got how much.
#[derive(Debug)]
pub(super) struct Deal {
    /// By supply and kind.
    pub(super) given: Vec<Vec<u64>>,
    /// By kind, what could not be given.
    pub(super) missing: Vec<u64>,
}

impl<'a> Demand<'a> {
    pub(super) fn of(processes: impl Iterator<Item = &'a Process> + Clone) -> Self {
        let kinds: BTreeMap<_, &GpuNeed> = processes
            .clone()
            .flat_map(|process| &process.gpus)
            .map(|need| (particularity(need), need))
            .collect();
        let index: BTreeMap<_, usize> = kinds.keys().zip(0..).map(|(key, i)| (*key, i)).collect();
        let each = processes
            .map(|process| {
                let mut gpus = vec![0; kinds.len()];
                let mut kind_of_need = Vec::new();
                for need in &process.gpus {
                    let kind = index[&particularity(need)];
                    gpus[kind] += u64::from(need.count);
                    kind_of_need.push(kind);
                }
                let cores = process.cpu_cores_counted().into();
                Each { gpus, kind_of_need, cores, ram_mib: process.ram_mib_counted() }
            })
            .collect();
        Self { kinds: kinds.into_values().collect(), each }
    }

    /// What `gpus`, each a supply of its own in this order, and the rest of `capacity` offer.
    pub(super) fn room(&self, gpus: &[&Gpu], capacity: &Capacity) -> Room {
        let supplies = gpus.iter().map(|gpu| Supply { count: 1, serves: self.serves(gpu) });
        Room {
            supplies: supplies.collect(),
            cores: capacity.cpu_cores.into(),
            ram_mib: capacity.ram_mib,
        }
    }

    /// What `capacity` offers, cut to what `counts` processes per group could take at
    /// most: machines that do not differ for this demand become equal.
    pub(super) fn shape(&self, capacity: &Capacity, counts: &[u64]) -> Room {
        let total = self.total(counts);
        let gpus_total: u64 = total.gpus.iter().sum();
        let mut supplies: BTreeMap<Vec<bool>, u64> = BTreeMap::new();
        for gpu in &capacity.gpus {
            *supplies.entry(self.serves(gpu)).or_default() += 1;
        }
        Room {
            supplies: supplies
                .into_iter()
                .filter(|(serves, _)| serves.contains(&true))
                .map(|(serves, count)| Supply { count: count.min(gpus_total), serves })
                .collect(),
            cores: u64::from(capacity.cpu_cores).min(total.cores),
            ram_mib: (capacity.ram_mib >> 10 << 10).min(total.ram_mib),
        }
    }

    /// What `counts` processes per group take together.
    pub(super) fn total(&self, counts: &[u64]) -> Each {
        let mut total =
            Each { gpus: vec![0; self.kinds.len()], kind_of_need: vec![], cores: 0, ram_mib: 0 };
        for (each, &count) in self.each.iter().zip(counts) {
            for (sum, gpus) in total.gpus.iter_mut().zip(&each.gpus) {
                *sum += gpus * count;
            }
            total.cores += each.cores * count;
            total.ram_mib += each.ram_mib * count;
        }
        total
    }

    /// Deals `room` out to `counts` processes per group; `None` where it is too small.
    pub(super) fn deal(&self, room: &Room, counts: &[u64]) -> Option<Deal> {
        let total = self.total(counts);
        let gpus_there: u64 = room.supplies.iter().map(|supply| supply.count).sum();
        if total.cores > room.cores
            || total.ram_mib > room.ram_mib
            || total.gpus.iter().sum::<u64>() > gpus_there
        {
            return None;
        }
        let deal = Deal::new(&room.supplies, total.gpus);
        (deal.missing_count() == 0).then_some(deal)
    }

    /// The most processes of `group`, up to `wanted`, that `room` holds beside `counts`.
    pub(super) fn most(&self, room: &Room, counts: &[u64], group: usize, wanted: u64) -> u64 {
        let mut trial = counts.to_vec();
        greatest(wanted, |n| {
            trial[group] = counts[group] + n;
            self.deal(room, &trial).is_some()
        })
    }

    /// Groups, the hardest to place first, ties by index.
    ///
    /// Easy processes fill what hard ones leave; the other way round two machines
    /// would each take easy ones only, and the hard one would find no room.
    pub(super) fn hardest_first(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.each.len()).collect();
        order.sort_by_key(|&group| {
            let each = &self.each[group];
            let kinds: Vec<usize> =
                (0..self.kinds.len()).filter(|&kind| each.gpus[kind] > 0).collect();
            let gpus: u64 = each.gpus.iter().sum();
            (core::cmp::Reverse((gpus, each.cores, each.ram_mib)), kinds, group)
        });
        order
    }

    fn serves(&self, gpu: &Gpu) -> Vec<bool> {
        self.kinds.iter().map(|need| need.accepts(gpu)).collect()
    }
}

/// A model before any GPU, much memory before little; equal for needs of one kind.
fn particularity(need: &GpuNeed) -> (bool, core::cmp::Reverse<u64>, Option<&str>) {
    let memory = need.memory_bytes_min.unwrap_or(0);
    (need.model.is_none(), core::cmp::Reverse(memory), need.model.as_deref())
}

/// The greatest `n` up to `max` for which `holds`, which must hold for 0 and, where it
/// holds, for everything less.
pub(super) fn greatest(max: u64, mut holds: impl FnMut(u64) -> bool) -> u64 {
    if max == 0 || holds(max) {
        return max;
    }
    let (mut yes, mut no) = (0, max);
    while no - yes > 1 {
        let middle = yes + (no - yes) / 2;
        *(if holds(middle) { &mut yes } else { &mut no }) = middle;
    }
    yes
}

impl Deal {
    /// Deals out as much as can be to kinds that want `wanted` each.
    pub(super) fn new(supplies: &[Supply], wanted: Vec<u64>) -> Self {
        let given = vec![vec![0; wanted.len()]; supplies.len()];
        let mut deal = Self { given, missing: wanted };
        for (index, supply) in supplies.iter().enumerate() {
            let mut left = supply.count;
            while left > 0 && deal.missing_count() > 0 {
                let Some(path) = deal.path(supplies, index) else { break };
                left -= deal.push(&path, left);
            }
        }
        deal
    }

    pub(super) fn missing_count(&self) -> u64 {
        self.missing.iter().sum()
    }

    /// The shortest way to place more of supply `first`: it goes to the first kind, the
    /// next supply's share in that kind moves on to the next kind, until one has room.
    fn path(&self, supplies: &[Supply], first: usize) -> Option<Vec<(usize, usize)>> {
        let mut came_by: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
        let mut kinds_seen = BTreeSet::new();
        let mut queue = VecDeque::from([first]);
        came_by.insert(first, Vec::new());
        while let Some(supply) = queue.pop_front() {
            for kind in (0..self.missing.len()).filter(|&kind| supplies[supply].serves[kind]) {
                if !kinds_seen.insert(kind) {
                    continue;
                }
                let mut path = came_by[&supply].clone();
                path.push((supply, kind));
                if self.missing[kind] > 0 {
                    return Some(path);
                }
                for other in (0..supplies.len()).filter(|&other| self.given[other][kind] > 0) {
                    if let std::collections::btree_map::Entry::Vacant(new) = came_by.entry(other) {
                        new.insert(path.clone());
                        queue.push_back(other);
                    }
                }
            }
        }
        None
    }

    /// Moves as much as `left` and the path allow, at least 1; how much that was.
    fn push(&mut self, path: &[(usize, usize)], left: u64) -> u64 {
        let moved = path.windows(2).map(|step| self.given[step[1].0][step[0].1]);
        let room = path.last().map_or(0, |&(_, kind)| self.missing[kind]);
        let amount = moved.fold(left.min(room), u64::min);
        for step in path.windows(2) {
            self.given[step[1].0][step[0].1] -= amount;
        }
        for &(supply, kind) in path {
            self.given[supply][kind] += amount;
        }
        if let Some(&(_, kind)) = path.last() {
            self.missing[kind] -= amount;
        }
        amount
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn a_deal_places_as_much_as_trying_everything_does(
            serves in vec(vec(any::<bool>(), 3), 0..5),
            wanted in vec(0..3_u64, 3),
        ) {
            let supplies: Vec<_> =
                serves.iter().map(|serves| Supply { count: 1, serves: serves.clone() }).collect();
            let deal = Deal::new(&supplies, wanted.clone());
            let placed: u64 = wanted.iter().sum::<u64>() - deal.missing_count();
            prop_assert_eq!(placed, best(&serves, &mut wanted.clone()));
            for (kind, &wanted) in wanted.iter().enumerate() {
                let given: u64 = deal.given.iter().map(|given| given[kind]).sum();
                prop_assert_eq!(given + deal.missing[kind], wanted);
            }
            for (given, supply) in deal.given.iter().zip(&supplies) {
                prop_assert!(given.iter().sum::<u64>() <= supply.count);
                prop_assert!(given.iter().zip(&supply.serves).all(|(&n, &ok)| n == 0 || ok));
            }
        }
    }

    fn best(serves: &[Vec<bool>], wanted: &mut [u64]) -> u64 {
        let Some((first, rest)) = serves.split_first() else { return 0 };
        let mut most = best(rest, wanted);
        for kind in 0..wanted.len() {
            if first[kind] && wanted[kind] > 0 {
                wanted[kind] -= 1;
                most = most.max(1 + best(rest, wanted));
                wanted[kind] += 1;
            }
        }
        most
    }
}
