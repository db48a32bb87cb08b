//! Whether a pool could run a request at all, current use aside.
//!
//! Placing processes on machines is bin packing, so the question is settled in steps:
//! what blocks is looked for in what can be told exactly (a model that is not there, a
//! process too large for every machine, a group too large for the pool, totals), and
//! only then a placement is searched, hardest processes first, machines that are alike
//! for this request taken as one. The search is bounded by [`SEARCH_STEPS_MAX`]. A
//! request is refused only on proof: where the bound is hit it counts as satisfiable,
//! and waits if it is not.

use core::fmt;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    CheckError, GpuNeed, Process, Request,
    deal::{Deal, Demand, Room},
    display::Size,
    nearest::nearest,
};
use crate::inventory::{Capacity, Gpu};

/// Machines looked at in one search for a placement: bounds the time of a submission
/// to a fraction of a second.
const SEARCH_STEPS_MAX: u32 = 20_000;

/// Model names listed in a reason; the rest are counted.
const MODELS_LISTED_MAX: usize = 20;

/// A request that the whole pool, all idle, could not run.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{reason}")]
pub struct Unsatisfiable {
    /// What blocks it first.
    pub reason: Reason,
    /// A request like it that would fit: an existing model, fewer GPUs, cores or less
    /// memory per process, fewer processes. `None` where nothing like it would.
    pub nearest: Option<Request>,
}

/// What keeps a pool from ever running a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// Not a request that the grammar could make.
    Invalid(CheckError),
    /// No node offers anything.
    EmptyPool,
    /// No GPU of that model anywhere.
    NoSuchModel {
        /// The model asked for.
        model: String,
        /// Models that there are, by name, the first few.
        known: Vec<String>,
        /// How many more there are.
        more: u32,
    },
    /// Not one GPU anywhere, and any would do.
    NoGpus,
    /// No GPU of that model, or of any, has that much memory.
    GpuMemory {
        /// The model asked for, if any.
        model: Option<String>,
        /// Bytes asked for.
        wanted: u64,
        /// The largest there is.
        most: u64,
    },
    /// No machine has that many of these GPUs.
    GpusPerNode {
        /// What is asked of one process, of this kind in all.
        wanted: GpuNeed,
        /// The most that one machine has.
        most: u32,
    },
    /// No machine has that many cores.
    CoresPerNode {
        /// Cores of one process.
        wanted: u32,
        /// The most that one machine has.
        most: u32,
    },
    /// No machine has that much main memory.
    RamPerNode {
        /// GiB of one process.
        wanted_gib: u64,
        /// The most that one machine has, whole GiB.
        most_gib: u64,
    },
    /// Each thing a process asks for is somewhere, but no one machine has them all.
    NotOnOneNode {
        /// What it asks for.
        process: Process,
    },
    /// One group alone is more than the pool has room for.
    Group {
        /// Its index in the request.
        group: u32,
        /// Processes asked for.
        wanted: u32,
        /// What each asks for.
        process: Process,
        /// Processes that the pool has room for.
        room: u32,
    },
    /// Each group fits, but not all of them at once.
    Together(Shortage),
}

/// What is short where all groups are to run at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shortage {
    /// GPUs that match.
    Gpus {
        /// Asked for in all.
        wanted: u64,
        /// Of them, what the pool has.
        most: u64,
    },
    /// Cores.
    Cores {
        /// Asked for in all.
        wanted: u64,
        /// What the pool has.
        most: u64,
    },
    /// Main memory.
    Ram {
        /// GiB asked for in all.
        wanted_gib: u64,
        /// What the pool has.
        most_gib: u64,
    },
    /// The totals suffice, but not so that each process is on one machine.
    Placement,
}

/// Whether idle `nodes` could run all of `request` at once; one process never spans
/// nodes, and processes may share one.
///
/// Exact but for requests whose placement is too hard to settle within a fixed number
/// of steps: those are said to be satisfiable.
///
/// # Errors
/// [`Unsatisfiable`], only where it is certain.
pub fn satisfiable(request: &Request, nodes: &[Capacity]) -> Result<(), Unsatisfiable> {
    let Err(reason) = find_blocker(request, nodes) else { return Ok(()) };
    Err(Unsatisfiable { nearest: nearest(request, nodes), reason })
}

fn find_blocker(request: &Request, nodes: &[Capacity]) -> Result<(), Reason> {
    request.check().map_err(Reason::Invalid)?;
    if nodes.is_empty() {
        return Err(Reason::EmptyPool);
    }
    for need in request.groups.iter().flat_map(|group| &group.process.gpus) {
        check_need(need, nodes)?;
    }
    let pool = Pool::new(request, nodes);
    for (index, group) in request.groups.iter().enumerate() {
        let room = pool.room_for(index);
        if room == 0 {
            return Err(why_on_no_node(&group.process, nodes));
        }
        if room < group.count.into() {
            return Err(Reason::Group {
                group: u32::try_from(index).unwrap_or(u32::MAX),
                wanted: group.count,
                process: group.process.clone(),
                room: u32::try_from(room).unwrap_or(u32::MAX),
            });
        }
    }
    pool.check_totals().map_err(Reason::Together)?;
    match pool.place(&pool.wanted, &mut Budget(SEARCH_STEPS_MAX)) {
        Verdict::Fits | Verdict::Unknown => Ok(()),
        Verdict::Never => Err(Reason::Together(Shortage::Placement)),
    }
}

fn check_need(need: &GpuNeed, nodes: &[Capacity]) -> Result<(), Reason> {
    let gpus = || nodes.iter().flat_map(|node| &node.gpus);
    if gpus().any(|gpu| need.accepts(gpu)) {
        return Ok(());
    }
    let any_memory = GpuNeed { memory_bytes_min: None, ..need.clone() };
    let most = gpus().filter(|gpu| any_memory.accepts(gpu)).map(|gpu| gpu.memory_bytes).max();
    match (most, &need.model, need.memory_bytes_min) {
        (Some(most), model, Some(wanted)) => {
            Err(Reason::GpuMemory { model: model.clone(), wanted, most })
        }
        (_, Some(model), _) => {
            let known: BTreeSet<&String> = gpus().map(|gpu| &gpu.model).collect();
            Err(Reason::NoSuchModel {
                model: model.clone(),
                more: u32::try_from(known.len().saturating_sub(MODELS_LISTED_MAX))
                    .unwrap_or(u32::MAX),
                known: known.into_iter().take(MODELS_LISTED_MAX).cloned().collect(),
            })
        }
        (_, None, _) => Err(Reason::NoGpus),
    }
}

/// Why a process that fits on no machine does not.
fn why_on_no_node(process: &Process, nodes: &[Capacity]) -> Reason {
    let most = |of: &dyn Fn(&Capacity) -> u64| nodes.iter().map(of).max().unwrap_or(0);
    let demand = Demand::of([process].into_iter());
    for (kind, &need) in demand.kinds.iter().enumerate() {
        let accepted = |gpus: &[Gpu]| gpus.iter().filter(|gpu| need.accepts(gpu)).count() as u64;
        let most = most(&|node| accepted(&node.gpus));
        let wanted = demand.each[0].gpus[kind];
        if most < wanted {
            let count = u32::try_from(wanted).unwrap_or(u32::MAX);
            return Reason::GpusPerNode {
                wanted: GpuNeed { count, ..need.clone() },
                most: u32::try_from(most).unwrap_or(u32::MAX),
            };
        }
    }
    let cores = most(&|node| node.cpu_cores.into());
    if cores < process.cpu_cores_counted().into() {
        let most = u32::try_from(cores).unwrap_or(u32::MAX);
        return Reason::CoresPerNode { wanted: process.cpu_cores_counted(), most };
    }
    let ram_mib = most(&|node| node.ram_mib);
    if ram_mib < process.ram_mib_counted() {
        let wanted_gib = process.ram_mib_counted() >> 10;
        return Reason::RamPerNode { wanted_gib, most_gib: ram_mib >> 10 };
    }
    Reason::NotOnOneNode { process: process.clone() }
}

/// A request laid over the machines of a pool.
pub(super) struct Pool<'a> {
    demand: Demand<'a>,
    /// Processes asked for, by group.
    pub(super) wanted: Vec<u64>,
    /// Machines that differ for this request, and how many there are of each.
    shapes: Vec<(Room, u64)>,
}

/// What a search found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Fits,
    Never,
    /// The budget ran out first.
    Unknown,
}

/// Steps that a search may still take.
pub(super) struct Budget(pub(super) u32);

impl Budget {
    fn spend(&mut self) -> bool {
        let has_some = self.0 > 0;
        self.0 = self.0.saturating_sub(1);
        has_some
    }
}

impl<'a> Pool<'a> {
    pub(super) fn new(request: &'a Request, nodes: &[Capacity]) -> Self {
        let demand = Demand::of(request.groups.iter().map(|group| &group.process));
        let wanted: Vec<u64> = request.groups.iter().map(|group| group.count.into()).collect();
        let mut shapes: BTreeMap<Room, u64> = BTreeMap::new();
        for node in nodes {
            *shapes.entry(demand.shape(node, &wanted)).or_default() += 1;
        }
        Self { demand, wanted, shapes: shapes.into_iter().collect() }
    }

    /// Processes of `group` that idle machines hold: exact where it is less than wanted.
    fn room_for(&self, group: usize) -> u64 {
        let (none, wanted) = (vec![0; self.wanted.len()], self.wanted[group]);
        let mut room: u64 = 0;
        for (shape, machines) in &self.shapes {
            let each = self.demand.most(shape, &none, group, wanted);
            room = room.saturating_add(each.saturating_mul(*machines));
        }
        room
    }

    /// Whether the machines, were they one, would have room.
    fn check_totals(&self) -> Result<(), Shortage> {
        let total = self.demand.total(&self.wanted);
        let mut supplies = Vec::new();
        let (mut cores, mut ram_mib) = (0_u64, 0_u64);
        for (shape, machines) in &self.shapes {
            cores = cores.saturating_add(shape.cores.saturating_mul(*machines));
            ram_mib = ram_mib.saturating_add(shape.ram_mib.saturating_mul(*machines));
            for supply in &shape.supplies {
                let mut supply = supply.clone();
                supply.count = supply.count.saturating_mul(*machines);
                supplies.push(supply);
            }
        }
        let wanted = total.gpus.iter().sum();
        let missing = Deal::new(&supplies, total.gpus).missing_count();
        if missing > 0 {
            return Err(Shortage::Gpus { wanted, most: wanted - missing });
        }
        if cores < total.cores {
            return Err(Shortage::Cores { wanted: total.cores, most: cores });
        }
        if ram_mib < total.ram_mib {
            let (wanted_gib, most_gib) = (total.ram_mib >> 10, ram_mib >> 10);
            return Err(Shortage::Ram { wanted_gib, most_gib });
        }
        Ok(())
    }

    /// Whether `counts` processes per group can be placed at once.
    pub(super) fn place(&self, counts: &[u64], budget: &mut Budget) -> Verdict {
        let bins = self.shapes.iter().enumerate().map(|(shape, &(_, machines))| {
            let load = vec![0; counts.len()];
            Bin { shape, load, machines }
        });
        let order = self.demand.hardest_first();
        Search { pool: self, order: &order, counts, budget }.place_group(0, bins.collect())
    }
}

/// Machines of one shape that hold the same processes already.
#[derive(Debug, Clone)]
struct Bin {
    shape: usize,
    /// Processes by group.
    load: Vec<u64>,
    machines: u64,
}

/// Depth-first over groups; within a group, over how many processes each machine takes.
struct Search<'a> {
    pool: &'a Pool<'a>,
    /// Groups, hardest first.
    order: &'a [usize],
    counts: &'a [u64],
    budget: &'a mut Budget,
}

/// The bins as one group finds them.
struct Stage {
    position: usize,
    group: usize,
    bins: Vec<Bin>,
    /// Processes of the group that one machine of a bin can take.
    caps: Vec<u64>,
    /// Processes of the group that all machines of this bin and those behind can take.
    room_from: Vec<u64>,
}

impl Search<'_> {
    fn place_group(&mut self, position: usize, bins: Vec<Bin>) -> Verdict {
        let Some(&group) = self.order.get(position) else { return Verdict::Fits };
        let mut sized = Vec::new();
        for bin in merged(bins) {
            if !self.budget.spend() {
                return Verdict::Unknown;
            }
            let (shape, wanted) = (&self.pool.shapes[bin.shape].0, self.counts[group]);
            sized.push((self.pool.demand.most(shape, &bin.load, group, wanted), bin));
        }
        // Machines with the least room first: best fit.
        sized.sort_by_key(|(cap, _)| *cap);
        let (caps, bins): (Vec<u64>, Vec<Bin>) = sized.into_iter().unzip();
        let mut room_from = vec![0; bins.len() + 1];
        for bin in (0..bins.len()).rev() {
            let room = caps[bin].saturating_mul(bins[bin].machines);
            room_from[bin] = room.saturating_add(room_from[bin + 1]);
        }
        let stage = Stage { position, group, bins, caps, room_from };
        self.spread(&stage, self.counts[group], (0, 0), None, &mut Vec::new())
    }

    /// Places `left` processes of the stage's group on machines from bin `first` on, of
    /// which `used` took some already, none of the bin's next ones more than `last`
    /// (alike machines are told apart by nothing else). The depth is bounded by the
    /// number of processes, since each call but the first placed at least one.
    fn spread(
        &mut self,
        stage: &Stage,
        left: u64,
        (first, used): (usize, u64),
        last: Option<u64>,
        chosen: &mut Vec<(usize, u64)>,
    ) -> Verdict {
        if left == 0 {
            return self.place_group(stage.position + 1, stage.loaded(chosen));
        }
        for bin in first..stage.bins.len() {
            let (used, cap) = match last {
                Some(last) if bin == first => (used, last),
                _ => (0, stage.caps[bin]),
            };
            let machines = stage.bins[bin].machines - used;
            let room_behind = stage.room_from[bin + 1];
            if cap.saturating_mul(machines).saturating_add(room_behind) < left {
                return Verdict::Never;
            }
            if machines == 0 {
                continue;
            }
            for count in (1..=cap.min(left)).rev() {
                if count.saturating_mul(machines).saturating_add(room_behind) < left {
                    break;
                }
                if !self.budget.spend() {
                    return Verdict::Unknown;
                }
                chosen.push((bin, count));
                let verdict =
                    self.spread(stage, left - count, (bin, used + 1), Some(count), chosen);
                chosen.pop();
                if verdict != Verdict::Never {
                    return verdict;
                }
            }
        }
        Verdict::Never
    }
}

impl Stage {
    /// The bins after one machine of each chosen bin took so many processes.
    fn loaded(&self, chosen: &[(usize, u64)]) -> Vec<Bin> {
        let mut bins = self.bins.clone();
        for &(bin, count) in chosen {
            bins[bin].machines -= 1;
            let mut loaded = Bin { machines: 1, ..bins[bin].clone() };
            loaded.load[self.group] += count;
            bins.push(loaded);
        }
        bins
    }
}

/// Bins that are alike, as one.
fn merged(bins: Vec<Bin>) -> Vec<Bin> {
    let mut merged: BTreeMap<(usize, Vec<u64>), u64> = BTreeMap::new();
    for bin in bins {
        if bin.machines > 0 {
            *merged.entry((bin.shape, bin.load)).or_default() += bin.machines;
        }
    }
    merged.into_iter().map(|((shape, load), machines)| Bin { shape, load, machines }).collect()
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(error) => write!(f, "not a valid request: {error}"),
            Self::EmptyPool => write!(f, "no node of the pool offers anything"),
            Self::NoSuchModel { model, known, .. } if known.is_empty() => {
                write!(f, "no `{model}` in the pool; it has no GPUs")
            }
            Self::NoSuchModel { model, known, more } => {
                write!(f, "no `{model}` in the pool; there are: {}", known.join(", "))?;
                if *more > 0 { write!(f, " and {more} more") } else { Ok(()) }
            }
            Self::NoGpus => write!(f, "no GPU in the pool"),
            Self::GpuMemory { model, wanted, most } => write!(
                f,
                "no {} in the pool has {}; the largest has {}",
                model.as_deref().unwrap_or("GPU"),
                Size(*wanted),
                Rounded(*most)
            ),
            Self::GpusPerNode { wanted, most } => {
                let GpuNeed { count, .. } = wanted;
                let one = GpuNeed { count: 1, ..wanted.clone() };
                write!(f, "no node has {count} {one} in one machine; the most is {most}")
            }
            Self::CoresPerNode { wanted, most } => {
                write!(f, "no node has {}; the most is {most}", cores(*wanted))
            }
            Self::RamPerNode { wanted_gib, most_gib } => {
                write!(f, "no node has {wanted_gib} GiB of memory; the most is {most_gib} GiB")
            }
            Self::NotOnOneNode { process } => {
                write!(f, "no node has {} together in one machine", phrase(process))
            }
            Self::Group { group, wanted, process, room } => {
                let (each, processes) = match wanted {
                    1 => ("", "1 process".to_owned()),
                    n => (" each", format!("{n} processes")),
                };
                let phrase = phrase(process);
                write!(f, "group {group} wants {processes} with {phrase}{each}; ")?;
                write!(f, "the pool has room for {room}")
            }
            Self::Together(shortage) => write!(f, "the groups do not fit at once: {shortage}"),
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpus { wanted, most } => {
                write!(f, "together they want {wanted} GPUs, of which the pool has {most}")
            }
            Self::Cores { wanted, most } => {
                write!(f, "together they want {wanted} cores, the pool has {most}")
            }
            Self::Ram { wanted_gib, most_gib } => {
                write!(f, "together they want {wanted_gib} GiB of memory, the pool has {most_gib}")
            }
            Self::Placement => {
                write!(f, "no placement has each process on one machine, though the totals suffice")
            }
        }
    }
}

/// Bytes for people, in GiB with one digit where it is not whole.
struct Rounded(u64);

impl fmt::Display for Rounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, tenth) = (self.0 >> 30, ((self.0 & ((1 << 30) - 1)) * 10) >> 30);
        if tenth == 0 { write!(f, "{whole}g") } else { write!(f, "{whole}.{tenth}g") }
    }
}

/// What a process asks for, in words.
fn phrase(process: &Process) -> String {
    let mut parts: Vec<String> = process
        .gpus
        .iter()
        .map(|need| match need.count {
            1 => format!("one {need}"),
            n => format!("{n} {}", GpuNeed { count: 1, ..need.clone() }),
        })
        .collect();
    if process.cpu_cores_counted() > 0 {
        parts.push(cores(process.cpu_cores_counted()));
    }
    parts.extend(process.ram_gib.map(|gib| format!("{gib} GiB of memory")));
    parts.join(" and ")
}

fn cores(count: u32) -> String {
    if count == 1 { "one core".to_owned() } else { format!("{count} cores") }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::inventory::GpuUuid;

    #[test]
    fn a_request_that_the_pool_could_run_is_satisfiable() {
        let pool = lab();
        for text in [
            "",
            "96:[]",
            "4:[v100]",
            "2:[2:v100]",
            "[2:v100],2:[v100],4:[gtx1060]",
            "[4:gtx1060]",
            "[gtx1060,3:gpu]",
            "[v100,cpu,ram],[v100,31:cpu]",
            "4:[gpu>=16g]",
            "3:[64:ram]",
            "3:[32:cpu]",
        ] {
            assert_eq!(satisfiable(&Request::parse(text).unwrap(), &pool), Ok(()), "{text}");
        }
    }

    #[test]
    fn a_refusal_names_what_blocks_and_the_nearest_request_that_fits() {
        for (text, reason, nearest) in [
            ("[h100]", "no `h100` in the pool; there are: gtx1060, v100", "[v100]"),
            ("2:[2:gtx1070]", "no `gtx1070` in the pool; there are: gtx1060, v100", "2:[2:v100]"),
            ("[gpu>=80g]", "no GPU in the pool has 80g; the largest has 32g", "[gpu>=32g]"),
            ("[gtx1060>=8g]", "no gtx1060 in the pool has 8g; the largest has 6g", "[gtx1060>=6g]"),
            ("[4:v100]", "no node has 4 v100 in one machine; the most is 2", "[2:v100]"),
            ("[8:gpu]", "no node has 8 gpu in one machine; the most is 4", "[4:gpu]"),
            (
                "[3:gpu>=16g]",
                "no node has 3 gpu>=16g in one machine; the most is 2",
                "[2:gpu>=16g]",
            ),
            (
                "[v100,gtx1060]",
                "no node has one v100 and one gtx1060 together in one machine",
                "[v100]",
            ),
            ("2:[64:cpu]", "no node has 64 cores; the most is 32", "2:[32:cpu]"),
            (
                "[v100,100:ram]",
                "no node has 100 GiB of memory; the most is 64 GiB",
                "[v100,64:ram]",
            ),
            (
                "6:[v100]",
                "group 0 wants 6 processes with one v100 each; the pool has room for 4",
                "4:[v100]",
            ),
            (
                "100:[]",
                "group 0 wants 100 processes with one core each; the pool has room for 96",
                "96:[]",
            ),
            (
                "2:[v100],3:[2:gtx1060,20:cpu]",
                "group 1 wants 3 processes with 2 gtx1060 and 20 cores each; \
                 the pool has room for 1",
                "2:[v100],[2:gtx1060,20:cpu]",
            ),
            (
                "3:[v100],2:[v100]",
                "the groups do not fit at once: together they want 5 GPUs, of which the pool has 4",
                "3:[v100],[v100]",
            ),
            (
                "2:[32:cpu],2:[32:cpu]",
                "the groups do not fit at once: together they want 128 cores, the pool has 96",
                "2:[32:cpu],[32:cpu]",
            ),
            (
                "2:[40:ram],2:[40:ram]",
                "the groups do not fit at once: no placement has each process on one machine, \
                 though the totals suffice",
                "2:[40:ram],[40:ram]",
            ),
            (
                "[2:v100],3:[v100,3:cpu]",
                "the groups do not fit at once: together they want 5 GPUs, of which the pool has 4",
                "[2:v100],2:[v100,3:cpu]",
            ),
        ] {
            let refusal = satisfiable(&Request::parse(text).unwrap(), &lab()).expect_err(text);
            let shown = refusal.nearest.map(|request| request.to_string());
            assert_eq!(refusal.reason.to_string(), reason, "{text}");
            assert_eq!(shown.as_deref(), Some(nearest), "{text}");
        }
    }

    #[test]
    fn an_empty_pool_and_one_without_gpus_have_nothing_near() {
        let refusal = |text: &str, nodes: &[Capacity]| {
            let refusal = satisfiable(&Request::parse(text).unwrap(), nodes).unwrap_err();
            assert_eq!(refusal.nearest, None);
            refusal.to_string()
        };
        assert_eq!(refusal("[]", &[]), "no node of the pool offers anything");
        let plain = [machine(&[], 4, 4)];
        assert_eq!(refusal("[v100]", &plain), "no `v100` in the pool; it has no GPUs");
        assert_eq!(refusal("[gpu]", &plain), "no GPU in the pool");
    }

    #[test]
    fn backtracking_finds_the_placement_that_first_fit_misses() {
        let nodes = [machine(&[], 8, 0), machine(&[], 8, 0)];
        let request = Request::parse("[4:cpu],2:[3:cpu],3:[2:cpu]").unwrap();
        assert_eq!(satisfiable(&request, &nodes), Ok(()));
        let refused = Request::parse("[4:cpu],2:[3:cpu],2:[2:cpu],[3:cpu]").unwrap();
        assert!(satisfiable(&refused, &nodes).is_err());
    }

    #[test]
    fn a_pool_of_ten_thousand_machines_is_no_work() {
        let nodes: Vec<Capacity> = (0..10_000)
            .map(|i| {
                let gpus = [("v100", 32), ("gtx1060", 6)];
                let mut node = machine(&gpus[..i % 3], 32, 64);
                node.ram_mib += i as u64;
                node
            })
            .collect();
        let request = Request::parse("500:[v100,2:cpu,16:ram],500:[gpu],24:[8:cpu]").unwrap();
        assert_eq!(satisfiable(&request, &nodes), Ok(()));
        let refused = satisfiable(&Request::parse("[2:v100]").unwrap(), &nodes).unwrap_err();
        assert_eq!(refused.nearest.unwrap().to_string(), "[v100]");
    }

    #[test]
    fn a_request_too_hard_to_settle_counts_as_satisfiable() {
        let groups: Vec<String> = (0..32).map(|i| format!("32:[{}:cpu]", 101 + i * 3)).collect();
        let request = Request::parse(&groups.join(",")).unwrap();
        let total: u32 = request.processes().map(|(_, _, p)| p.cpu_cores_counted()).sum();
        let machines: Vec<Capacity> =
            (0..64).map(|_| machine(&[], total.div_ceil(64), 0)).collect();
        let pool = Pool::new(&request, &machines);
        let verdict = pool.place(&pool.wanted, &mut Budget(SEARCH_STEPS_MAX));
        assert_eq!(verdict, Verdict::Unknown);
        assert_eq!(satisfiable(&request, &machines), Ok(()));
    }

    #[test]
    fn an_invalid_request_from_a_peer_is_refused_without_work() {
        let process = Process { cpu_cores: Some(0), ..Process::default() };
        let request = Request { groups: vec![crate::request::Group { count: u32::MAX, process }] };
        let refusal = satisfiable(&request, &lab()).unwrap_err();
        assert_eq!(refusal.to_string(), "not a valid request: a count of 0 cores");
        assert_eq!(refusal.nearest, None);
    }

    proptest! {
        #[test]
        fn satisfiable_agrees_with_trying_every_placement(
            groups in vec((1..3_u32, "[12]:(a|gpu)|[1-4]:cpu|a,[12]:cpu|a,b"), 1..4),
            nodes in vec((vec("[ab]", 0..4), 0..5_u32), 1..4),
        ) {
            let text: Vec<_> = groups.iter().map(|(n, p)| format!("{n}:[{p}]")).collect();
            let request = Request::parse(&text.join(",")).unwrap();
            let nodes: Vec<_> = nodes
                .iter()
                .map(|(gpus, cores)| {
                    let gpus: Vec<_> = gpus.iter().map(|model| (model.as_str(), 8)).collect();
                    machine(&gpus, *cores, 0)
                })
                .collect();
            let mut held = vec![vec![0; request.groups.len()]; nodes.len()];
            let processes: Vec<u32> = request.processes().map(|(group, _, _)| group).collect();
            let possible = some_placement(&request, &nodes, &processes, &mut held);
            let found = satisfiable(&request, &nodes);
            prop_assert_eq!(found.is_ok(), possible, "{:?}", found);
        }

        #[test]
        fn the_nearest_request_fits_and_asks_for_nothing_more(
            groups in vec(
                (1..9_u32, "[1-9]:(a|gpu|c)|gpu>=[1-9]{2}g|[1-9]:cpu,[1-9]:ram|a,b,[1-9]:ram"),
                1..4,
            ),
            nodes in vec((vec("[ab]", 0..4), 0..5_u32), 0..4),
        ) {
            let text: Vec<_> = groups.iter().map(|(n, p)| format!("{n}:[{p}]")).collect();
            let request = Request::parse(&text.join(",")).unwrap();
            let nodes: Vec<_> = nodes
                .iter()
                .map(|(gpus, cores)| {
                    let gpus: Vec<_> = gpus.iter().map(|model| (model.as_str(), 8)).collect();
                    machine(&gpus, *cores, u64::from(*cores))
                })
                .collect();
            if let Err(Unsatisfiable { nearest: Some(near), .. }) = satisfiable(&request, &nodes) {
                prop_assert_eq!(satisfiable(&near, &nodes), Ok(()));
                prop_assert_eq!(Request::parse(&near.to_string()), Ok(near.clone()));
                prop_assert_eq!(near.groups.len(), request.groups.len());
                for (near, asked) in near.groups.iter().zip(&request.groups) {
                    prop_assert!(near.count <= asked.count);
                    prop_assert!(near.process.gpu_count() <= asked.process.gpu_count());
                    prop_assert!(near.process.ram_gib <= asked.process.ram_gib);
                }
            }
        }
    }

    fn some_placement(
        request: &Request,
        nodes: &[Capacity],
        left: &[u32],
        held: &mut Vec<Vec<u32>>,
    ) -> bool {
        let Some((&group, rest)) = left.split_first() else { return true };
        (0..nodes.len()).any(|node| {
            held[node][group as usize] += 1;
            let wants: Vec<_> = (0..)
                .zip(&request.groups)
                .zip(&held[node])
                .map(|((i, group), &count)| (i, count, &group.process))
                .collect();
            let granted = super::super::fit_many(&wants, &nodes[node]).len();
            let found = granted == held[node].iter().sum::<u32>() as usize
                && some_placement(request, nodes, rest, held);
            held[node][group as usize] -= 1;
            found
        })
    }

    /// Two machines with two V100 each, one with four GTX 1060; 32 cores, 64 GiB each.
    fn lab() -> Vec<Capacity> {
        let v100 = machine(&[("v100", 32); 2], 32, 64);
        vec![v100.clone(), machine(&[("gtx1060", 6); 4], 32, 64), v100]
    }

    fn machine(gpus: &[(&str, u64)], cpu_cores: u32, ram_gib: u64) -> Capacity {
        let gpus = gpus.iter().enumerate().map(|(i, &(model, gib))| Gpu {
            uuid: GpuUuid(format!("{model}-{i}")),
            model: model.to_owned(),
            full_name: model.to_owned(),
            memory_bytes: gib << 30,
            simulated: true,
        });
        Capacity::new(gpus.collect(), cpu_cores, ram_gib << 10)
    }
}
