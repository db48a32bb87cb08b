//! Which GPUs, cores and memory of one machine a process gets.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{
    GROUPS_MAX, PROCESSES_MAX, Process,
    deal::{Deal, Demand},
};
use crate::inventory::{Capacity, Gpu, GpuUuid};

/// What one process gets of its node.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// GPUs in the order of the process's needs.
    pub gpus: Vec<GpuUuid>,
    /// CPU cores counted against the node.
    pub cpu_cores: u32,
    /// Main memory counted against the node, in MiB.
    pub ram_mib: u64,
}

/// What `process` gets of `free`; `None` where it does not fit.
///
/// Never fails where some choice of GPUs fits, and chooses the GPUs with the least
/// memory, ties by model and UUID.
#[must_use]
pub fn fit(process: &Process, free: &Capacity) -> Option<Grant> {
    fit_many(&[(0, 1, process)], free).pop().map(|(_, grant)| grant)
}

/// Room in `free` for processes of several groups, given as (index, wanted, needs):
/// a grant per process that fits, with the index of its group, in the order given.
///
/// Where `free` has room for all, all get it. Otherwise groups take what they can in the
/// order of how hard a process is to place: the most GPUs first, because on other nodes
/// the easy ones fit more likely. GPUs are chosen for all grants together: those with
/// the least memory that serve. A process that breaks a bound of the grammar gets
/// nothing, nor does a group behind the first [`GROUPS_MAX`].
#[must_use]
pub fn fit_many(groups: &[(u32, u32, &Process)], free: &Capacity) -> Vec<(u32, Grant)> {
    let groups: Vec<_> =
        groups.iter().take(GROUPS_MAX).filter(|(_, _, process)| process.check().is_ok()).collect();
    let demand = Demand::of(groups.iter().map(|(_, _, process)| *process));
    let gpus = by_preference(&free.gpus);
    let room = demand.room(&gpus, free);
    let mut counts = vec![0; groups.len()];
    for group in demand.hardest_first() {
        let wanted = groups[group].1.min(PROCESSES_MAX);
        counts[group] = demand.most(&room, &counts, group, wanted.into());
    }
    let Some(deal) = demand.deal(&room, &counts) else { return Vec::new() };
    let mut stock = stock(&deal, &gpus);
    let mut grants = Vec::new();
    for ((&(index, _, process), each), &count) in groups.into_iter().zip(&demand.each).zip(&counts)
    {
        for _ in 0..count {
            let mut gpus = Vec::new();
            for (need, &kind) in process.gpus.iter().zip(&each.kind_of_need) {
                let dealt = (need.count as usize).min(stock[kind].len());
                gpus.extend(stock[kind].drain(..dealt));
            }
            let (cpu_cores, ram_mib) = (process.cpu_cores_counted(), process.ram_mib_counted());
            grants.push((index, Grant { gpus, cpu_cores, ram_mib }));
        }
    }
    grants
}

/// The least memory first, so that what is left serves the most.
fn by_preference(gpus: &[Gpu]) -> Vec<&Gpu> {
    let mut order: Vec<&Gpu> = gpus.iter().collect();
    order.sort_by_key(|gpu| (gpu.memory_bytes, &gpu.model, &gpu.uuid));
    order
}

/// By kind, the GPUs dealt to it.
fn stock(deal: &Deal, gpus: &[&Gpu]) -> Vec<VecDeque<GpuUuid>> {
    let mut stock = vec![VecDeque::new(); deal.missing.len()];
    for (given, gpu) in deal.given.iter().zip(gpus) {
        for (kind, _) in given.iter().enumerate().filter(|&(_, &count)| count > 0) {
            stock[kind].push_back(gpu.uuid.clone());
        }
    }
    stock
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::request::Request;

    #[test]
    fn a_need_for_any_gpu_leaves_the_only_v100_to_the_need_that_names_it() {
        let free = machine(&[("v100", 16), ("gtx", 24)]);
        assert_eq!(placed("[gpu,v100]", &free), ["gtx-1", "v100-0"]);
        assert_eq!(placed("[v100,gpu]", &free), ["v100-0", "gtx-1"]);
    }

    #[test]
    fn a_need_for_any_gpu_takes_the_one_with_the_least_memory_that_serves() {
        let free = machine(&[("a100", 80), ("gtx", 8), ("v100", 32), ("rtx", 24)]);
        assert_eq!(placed("[gpu]", &free), ["gtx-1"]);
        assert_eq!(placed("[gpu>=24g]", &free), ["rtx-3"]);
        assert_eq!(placed("[gpu,gpu>=30g]", &free), ["gtx-1", "v100-2"]);
        assert_eq!(placed("[3:gpu>=24g,gpu]", &free), ["rtx-3", "v100-2", "a100-0", "gtx-1"]);
    }

    #[test]
    fn a_chain_of_overlapping_needs_is_resolved() {
        let free = machine(&[("a", 16), ("a", 32), ("b", 16)]);
        assert_eq!(placed("[gpu,a,gpu>=30g]", &free), ["b-2", "a-0", "a-1"]);
        assert_eq!(fit(&process("[a,gpu>=30g,b,gpu]"), &free), None);
    }

    #[test]
    fn cores_and_memory_bound_a_process_as_gpus_do() {
        let free = Capacity { cpu_cores: 8, ram_mib: 16 << 10, ..machine(&[("v100", 32)]) };
        assert!(fit(&process("[v100,8:cpu,16:ram]"), &free).is_some());
        assert_eq!(fit(&process("[v100,9:cpu]"), &free), None);
        assert_eq!(fit(&process("[17:ram]"), &free), None);
        let grant = fit(&process("[]"), &free).unwrap();
        assert_eq!(grant, Grant { gpus: vec![], cpu_cores: 1, ram_mib: 0 });
        let full = Capacity { cpu_cores: 0, ..free };
        assert!(fit(&process("[v100]"), &full).is_some());
        assert_eq!(fit(&process("[]"), &full), None);
    }

    #[test]
    fn processes_of_several_groups_all_get_room_where_there_is_room_for_all() {
        let free = machine(&[("v100", 16), ("rtx", 24), ("gtx", 8)]);
        assert_eq!(counts("[gpu],[v100],[gpu>=20g]", &free), [1, 1, 1]);
        assert_eq!(counts("[gtx],[gpu,v100]", &free), [1, 1]);
        assert_eq!(counts("2:[gpu],2:[v100]", &free), [2, 1]);
    }

    #[test]
    fn what_is_hard_to_place_elsewhere_goes_first_where_not_all_fit() {
        let free = machine(&[("v100", 16); 4]);
        assert_eq!(counts("3:[v100],[4:v100]", &free), [0, 1]);
        assert_eq!(counts("3:[v100],3:[2:v100]", &free), [0, 2]);
        assert_eq!(counts("9:[],3:[3:v100]", &free), [8, 1]);
    }

    #[test]
    fn wants_from_a_peer_beyond_all_bounds_take_no_more_than_there_is() {
        let free = machine(&[("v100", 16); 4]);
        let mut huge = process("[v100]");
        assert_eq!(fit_many(&[(7, u32::MAX, &huge)], &free).len(), 4);
        huge.gpus[0].count = 0;
        assert_eq!(fit_many(&[(7, u32::MAX, &huge)], &free), []);
        huge.gpus[0].count = u32::MAX;
        assert_eq!(fit(&huge, &free), None);
        let everywhere = Capacity { cpu_cores: u32::MAX, ram_mib: u64::MAX, gpus: vec![] };
        let granted = fit_many(&[(0, u32::MAX, &Process::default())], &everywhere);
        assert_eq!(granted.len(), PROCESSES_MAX as usize);
    }

    proptest! {
        #[test]
        fn grants_are_disjoint_serve_their_needs_and_lie_within_what_is_free(
            request in small_request(),
            free in small_machine(),
        ) {
            let groups: Vec<_> = wants(&request);
            let mut left = free.clone();
            for (group, grant) in fit_many(&groups, &free) {
                let process = groups[group as usize].2;
                let mut given = grant.gpus.iter();
                for need in &process.gpus {
                    for uuid in given.by_ref().take(need.count as usize) {
                        let gpu = free.gpus.iter().find(|gpu| gpu.uuid == *uuid).unwrap();
                        prop_assert!(need.accepts(gpu));
                    }
                }
                prop_assert_eq!(grant.gpus.len(), process.gpu_count() as usize);
                prop_assert!(left.take(&grant));
            }
        }

        #[test]
        fn a_process_fits_exactly_where_some_choice_of_gpus_does(
            request in small_request(),
            free in small_machine(),
        ) {
            let process = &request.groups[0].process;
            let needs: Vec<_> = process
                .gpus
                .iter()
                .flat_map(|need| std::iter::repeat_n(need, need.count as usize))
                .collect();
            let fits = process.cpu_cores_counted() <= free.cpu_cores
                && process.ram_mib_counted() <= free.ram_mib
                && some_choice(&needs, &mut free.gpus.clone());
            prop_assert_eq!(fit(process, &free).is_some(), fits);
        }
    }

    fn some_choice(needs: &[&crate::request::GpuNeed], gpus: &mut Vec<Gpu>) -> bool {
        let Some((need, rest)) = needs.split_first() else { return true };
        (0..gpus.len()).any(|i| {
            need.accepts(&gpus[i]) && {
                let gpu = gpus.remove(i);
                let found = some_choice(rest, gpus);
                gpus.insert(i, gpu);
                found
            }
        })
    }

    fn small_request() -> impl Strategy<Value = Request> {
        let need = prop_oneof!["[12]:[ab]", "[12]:[ab]>=(16|32)g", "[12]:gpu", "gpu>=(16|32)g"];
        let process = (vec(need, 0..3), prop_oneof!["", ",[1-4]:cpu", ",[1-4]:ram"]);
        let process = process.prop_map(|(needs, rest)| {
            format!("[{}]", (needs.join(",") + &rest).trim_start_matches(','))
        });
        vec((1..4_u32, process), 1..4).prop_map(|groups| {
            let groups: Vec<_> = groups.iter().map(|(n, text)| format!("{n}:{text}")).collect();
            Request::parse(&groups.join(",")).unwrap()
        })
    }

    fn small_machine() -> impl Strategy<Value = Capacity> {
        let model = prop_oneof![Just("a"), Just("b"), Just("c")];
        let gpu = (model, prop_oneof![Just(8), Just(16), Just(32)]);
        (vec(gpu, 0..6), 0..8_u32, 0..8_u64).prop_map(|(gpus, cpu_cores, gib)| Capacity {
            cpu_cores,
            ram_mib: gib << 10,
            ..machine(&gpus)
        })
    }

    fn placed(text: &str, free: &Capacity) -> Vec<String> {
        let grant = fit(&process(text), free).unwrap();
        grant.gpus.into_iter().map(|uuid| uuid.0).collect()
    }

    fn counts(text: &str, free: &Capacity) -> Vec<usize> {
        let request = Request::parse(text).unwrap();
        let granted = fit_many(&wants(&request), free);
        let count = |group| granted.iter().filter(|(g, _)| *g as usize == group).count();
        (0..request.groups.len()).map(count).collect()
    }

    fn wants(request: &Request) -> Vec<(u32, u32, &Process)> {
        (0..).zip(&request.groups).map(|(i, group)| (i, group.count, &group.process)).collect()
    }

    fn process(text: &str) -> Process {
        Request::parse(text).unwrap().groups[0].process.clone()
    }

    /// Eight cores, 64 GiB, and GPUs `MODEL-INDEX` of so many GiB.
    fn machine(gpus: &[(&str, u64)]) -> Capacity {
        let gpus = gpus.iter().enumerate().map(|(i, &(model, gib))| Gpu {
            uuid: GpuUuid(format!("{model}-{i}")),
            model: model.to_owned(),
            full_name: model.to_owned(),
            memory_bytes: gib << 30,
            simulated: true,
        });
        Capacity::new(gpus.collect(), 8, 64 << 10)
    }
}
