//! The request nearest to one that does not fit: what the user may try instead.

use super::{
    GpuNeed, MEMORY_REPORTED_PERCENT_MIN, Process, Request,
    deal::{Deal, Demand, greatest},
    feasible::{Budget, Pool, Verdict},
};
use crate::inventory::{Capacity, Gpu, gpu::known_memory_bytes};

/// Machines looked at in all searches for how many processes fit.
const NEAREST_STEPS_MAX: u32 = 20_000;

/// A request that fits, with as little as possible changed, in this order: models that
/// are not there, memory no GPU has, what no single machine has, numbers of processes.
pub(super) fn nearest(request: &Request, nodes: &[Capacity]) -> Option<Request> {
    request.check().ok()?;
    let gpus: Vec<&Gpu> = nodes.iter().flat_map(|node| &node.gpus).collect();
    let mut near = request.clone();
    for group in &mut near.groups {
        for need in &mut group.process.gpus {
            *need = nearest_need(need, &gpus)?;
        }
        group.process = nearest_process(&group.process, nodes)?;
    }
    let counts = nearest_counts(&near, nodes)?;
    for (group, count) in near.groups.iter_mut().zip(counts) {
        group.count = u32::try_from(count).ok()?;
    }
    Some(near)
}

/// A need that some GPU meets.
fn nearest_need(need: &GpuNeed, gpus: &[&Gpu]) -> Option<GpuNeed> {
    if gpus.iter().any(|gpu| need.accepts(gpu)) {
        return Some(need.clone());
    }
    let has_model = |model: &String| gpus.iter().any(|gpu| gpu.model == *model);
    let model = match &need.model {
        Some(model) if !has_model(model) => Some(nearest_model(model, gpus)?),
        model => model.clone(),
    };
    let mut near = GpuNeed { model, ..need.clone() };
    if !gpus.iter().any(|gpu| near.accepts(gpu)) {
        near.memory_bytes_min = None;
        let most = gpus.iter().filter(|gpu| near.accepts(gpu)).map(|gpu| gpu.memory_bytes).max()?;
        let (mib, gib) = (most >> 20 << 20, most >> 30 << 30);
        near.memory_bytes_min = [gib, mib, most].into_iter().find(|&bytes| bytes > 0);
    }
    Some(near)
}

/// The model of the pool that is most like `asked`: one of which it is a part or that is
/// a part of it (`3090` and `rtx3090`); for a well-known model the one nearest in memory,
/// rather larger than smaller; else, as a slip of the pen, the one nearest in spelling.
fn nearest_model(asked: &str, gpus: &[&Gpu]) -> Option<String> {
    let asked_bytes = known_memory_bytes(asked);
    let near = gpus.iter().min_by_key(|gpu| {
        let is_part = gpu.model.contains(asked) || asked.contains(&gpu.model);
        let memory = asked_bytes.map(|asked| {
            (
                gpu.memory_bytes < asked / 100 * MEMORY_REPORTED_PERCENT_MIN,
                gpu.memory_bytes.abs_diff(asked),
            )
        });
        (!is_part, memory, edit_distance(asked, &gpu.model), &gpu.model)
    })?;
    Some(near.model.clone())
}

/// Letters to insert, remove or change to make `a` of `b` (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The most of `process` that one machine has: GPUs first, then cores, then memory.
fn nearest_process(process: &Process, nodes: &[Capacity]) -> Option<Process> {
    let demand = Demand::of([process].into_iter());
    let mut best: Option<Process> = None;
    for node in nodes {
        let Some(part) = part_on(process, &demand, node) else { continue };
        if best.as_ref().is_none_or(|best| rank(&part) > rank(best)) {
            best = Some(part);
        }
    }
    best
}

fn rank(process: &Process) -> (u32, Option<u32>, Option<u32>) {
    (process.gpu_count(), process.cpu_cores, process.ram_gib)
}

/// What `node` has of `process`; `None` where that is nothing it could run as.
fn part_on(process: &Process, demand: &Demand<'_>, node: &Capacity) -> Option<Process> {
    let each = &demand.each[0];
    let shape = demand.shape(node, &[1]);
    let missing = Deal::new(&shape.supplies, each.gpus.clone()).missing;
    let mut given: Vec<u64> = each.gpus.iter().zip(&missing).map(|(n, short)| n - short).collect();
    let mut gpus = Vec::new();
    for (need, &kind) in process.gpus.iter().zip(&each.kind_of_need) {
        let count = given[kind].min(need.count.into());
        given[kind] -= count;
        if count > 0 {
            gpus.push(GpuNeed { count: u32::try_from(count).ok()?, ..need.clone() });
        }
    }
    if gpus.is_empty() && !process.gpus.is_empty() {
        return None;
    }
    let at_least_one = |amount: u32| (amount > 0).then_some(amount);
    let ram_gib = u32::try_from(node.ram_mib >> 10).unwrap_or(u32::MAX);
    let part = Process {
        gpus,
        cpu_cores: process.cpu_cores.and_then(|cores| at_least_one(cores.min(node.cpu_cores))),
        ram_gib: process.ram_gib.and_then(|gib| at_least_one(gib.min(ram_gib))),
    };
    (part.cpu_cores_counted() <= node.cpu_cores).then_some(part)
}

/// As many processes as fit at once, earlier groups first, at least one of each group.
fn nearest_counts(request: &Request, nodes: &[Capacity]) -> Option<Vec<u64>> {
    let pool = Pool::new(request, nodes);
    let mut budget = Budget(NEAREST_STEPS_MAX);
    let mut fits = |counts: &[u64]| pool.place(counts, &mut budget) == Verdict::Fits;
    let mut counts = vec![1; pool.wanted.len()];
    if !fits(&counts) {
        return None;
    }
    for group in 0..counts.len() {
        let more = greatest(pool.wanted[group] - 1, |more| {
            let mut trial = counts.clone();
            trial[group] += more;
            fits(&trial)
        });
        counts[group] += more;
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::gpu::parse_simulated;

    #[test]
    fn a_missing_model_is_replaced_by_the_one_most_like_it() {
        for (asked, there, near) in [
            ("3090", "1xrtx3090,1xrtx4090", "rtx3090"),
            ("a100-80gb", "1xa100,1xh100", "a100"),
            ("h100", "1xp100,1xa100,1xh200", "a100"),
            ("rtx4090", "1xrtx3090,1xh200,1xgtx1060", "rtx3090"),
            ("h200", "1xgtx1060,1xv100", "v100"),
            ("gtx106o", "1xv100,1xgtx1060,1xgtx1070", "gtx1060"),
        ] {
            let gpus = parse_simulated(there, "n").unwrap();
            let gpus: Vec<&Gpu> = gpus.iter().collect();
            assert_eq!(nearest_model(asked, &gpus).as_deref(), Some(near), "{asked}");
        }
    }

    #[test]
    fn distances_between_words_are_counted_in_letters() {
        assert_eq!(edit_distance("v100", "v100"), 0);
        assert_eq!(edit_distance("v10", "v100"), 1);
        assert_eq!(edit_distance("", "v100"), 4);
        assert_eq!(edit_distance("gtx1070", "rtx1060"), 2);
    }
}
