//! The environment of a process.
//!
//! Three layers, the later ones above the earlier: what the executor gives every process
//! (`PATH`, `TMPDIR`, `LANG`, …); what the job's owner set; what the pool sets. So an
//! owner may choose a `PATH` or a `HOME`, but not what says which resources, peers and
//! directories a process has: a wrong `CUDA_VISIBLE_DEVICES` would be somebody else's GPU.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use p2pit_protocol::{
    JobId, PeerId,
    job::{RankAssignment, VerifiedSpec},
    request::Grant,
};

use super::{Gang, Names, SRC, Workspace};

/// Everything above the executor's own defaults.
pub(super) fn of(
    workspace: &Workspace,
    spec: &VerifiedSpec,
    assignment: &RankAssignment,
    gang: &Gang<'_>,
    names: &Names,
) -> BTreeMap<String, String> {
    let home = text(&workspace.home_dir());
    let user = names.username.clone();
    let defaults = [("HOME", home), ("USER", user.clone()), ("LOGNAME", user)];
    let mut env: BTreeMap<String, String> =
        defaults.map(|(name, value)| (name.to_owned(), value)).into();
    env.extend(spec.spec.env.clone());
    env.extend(set_by_pool(workspace, spec, assignment, gang));
    env
}

/// The names that the owner set and that are not the owner's to set.
pub(super) fn refused<'a>(
    workspace: &Workspace,
    spec: &'a VerifiedSpec,
    assignment: &RankAssignment,
) -> Vec<&'a str> {
    let ours = set_by_pool(workspace, spec, assignment, &Gang::default());
    spec.spec.env.keys().filter(|name| ours.contains_key(*name)).map(String::as_str).collect()
}

/// UUIDs in the order of the needs they meet, simulated ones too: where those are all a
/// process has, it sees no real GPU.
pub(super) fn gpu_list(grant: &Grant) -> String {
    let uuids: Vec<&str> = grant.gpus.iter().map(|uuid| uuid.0.as_str()).collect();
    uuids.join(",")
}

fn set_by_pool(
    workspace: &Workspace,
    spec: &VerifiedSpec,
    assignment: &RankAssignment,
    gang: &Gang<'_>,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut set = |name: &str, value: String| {
        env.insert(name.to_owned(), value);
    };
    let groups = &spec.spec.request.groups;
    let host = |rank: usize| gang.hosts.get(rank).cloned().unwrap_or_default();

    set("NUM_GROUPS", groups.len().to_string());
    for (index, group) in groups.iter().enumerate() {
        set(&format!("NUM_PROCESSES_GROUP{index}"), group.count.to_string());
    }
    for (rank, (group, process)) in spec.spec.ranks().enumerate() {
        set(&format!("HOST_GROUP{group}_PROCESS{process}"), host(rank));
    }
    set("GROUP_INDEX", assignment.group.to_string());
    set("PROCESS_INDEX", assignment.process.to_string());
    set("WORKER_INDEX", assignment.rank.to_string());
    set("JOB_ID", spec.job.to_string());
    set("JOB_NUMBER", job_number(spec.job).to_string());

    let src = text(&workspace.dir.join(SRC));
    set("SRC_DIR", src.clone());
    set("WORK_DIR", src);
    set("JOB_DIR", text(&workspace.dir));
    set("RESULT_FILE", text(&workspace.result_path()));
    set("DATA_ROOT", text(&workspace.data));
    set("SHARED_DIR", text(&workspace.shared_dir()));
    set("USER_DIR", text(&workspace.user_dir(spec.spec.owner)));

    let place = Place::of(assignment, gang.nodes);
    set("RANK", assignment.rank.to_string());
    set("WORLD_SIZE", spec.spec.rank_count().to_string());
    set("LOCAL_RANK", place.local_rank.to_string());
    set("LOCAL_WORLD_SIZE", place.local_world_size.to_string());
    set("NODE_RANK", place.node_rank.to_string());
    set("MASTER_ADDR", host(0));
    set("MASTER_PORT", gang.port.to_string());

    let gpus = gpu_list(&assignment.grant);
    // An empty list means none to CUDA, but all to some versions of NVIDIA's container
    // tools, which have a word for none.
    let for_containers = if gpus.is_empty() { "void".to_owned() } else { gpus.clone() };
    set("NVIDIA_VISIBLE_DEVICES", for_containers);
    set("CUDA_VISIBLE_DEVICES", gpus);
    set("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned());
    env
}

/// Where a rank stands among those of its node, and its node among all.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    local_rank: usize,
    local_world_size: usize,
    node_rank: usize,
}

impl Place {
    /// Nodes count in the order of their first ranks, so that rank 0 is on node 0.
    fn of(assignment: &RankAssignment, nodes: &[PeerId]) -> Self {
        let rank = assignment.rank.0 as usize;
        let is_here = |node: &&PeerId| **node == assignment.node;
        let before = nodes.iter().take_while(|node| !is_here(node)).collect::<BTreeSet<_>>();
        Self {
            local_rank: nodes.iter().take(rank).filter(is_here).count(),
            local_world_size: nodes.iter().filter(is_here).count().max(1),
            node_rank: before.len(),
        }
    }
}

/// A number for scripts that want one, such as for a seed: the first 32 bits of the id.
/// Two jobs may have the same.
fn job_number(job: JobId) -> u32 {
    let [a, b, c, d, ..] = job.0;
    u32::from_be_bytes([a, b, c, d])
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::{HoldId, identity::KeyPair, job::Rank};

    use super::*;

    #[test]
    fn ranks_are_counted_by_node_and_nodes_by_their_first_rank() {
        let [a, b, c] = [1, 2, 3].map(|seed| PeerId(KeyPair::from_seed(&[seed; 32]).public()));
        let nodes = [b, a, b, c, a, b];
        let place = |rank: u32, node| {
            let (group, process, hold) = (0, rank, HoldId([0; 16]));
            let grant = Grant::default();
            let rank = Rank(rank);
            let place =
                Place::of(&RankAssignment { rank, group, process, node, hold, grant }, &nodes);
            (place.local_rank, place.local_world_size, place.node_rank)
        };
        assert_eq!(place(0, b), (0, 3, 0));
        assert_eq!(place(1, a), (0, 2, 1));
        assert_eq!(place(2, b), (1, 3, 0));
        assert_eq!(place(3, c), (0, 1, 2));
        assert_eq!(place(4, a), (1, 2, 1));
        assert_eq!(place(5, b), (2, 3, 0));
    }
}
