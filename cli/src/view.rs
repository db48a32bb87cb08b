//! What is shown, as values with names instead of ids. How it is shown is `output`'s.

use p2pit_node::api::types::{GpuReading, Me, NodeInfo, UserInfo};
use p2pit_protocol::{
    BlobId, JobId, PeerId, UserId,
    inventory::Gpu,
    job::{Change, Command, Outcome, Policy, RankEnd, RankState, Source, State},
    message::{GpuState, JobView},
    record::quorum_of,
};

use crate::{names::Names, output::duration_s};

/// A job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    /// The shortest unique prefix.
    pub(crate) short: String,
    pub(crate) title: String,
    pub(crate) user: String,
    pub(crate) user_id: UserId,
    pub(crate) private: bool,
    pub(crate) request: String,
    pub(crate) command: Option<Command>,
    pub(crate) source: Source,
    /// `None` where the reader may not see it.
    pub(crate) code: Option<BlobId>,
    pub(crate) continues: Option<JobId>,
    pub(crate) submitted_at_ms: u64,
    pub(crate) state: State,
    pub(crate) history: Vec<Change>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) stopped_by: Option<String>,
    pub(crate) keepers: Vec<String>,
    /// How many of them can be reached.
    pub(crate) keepers_online: usize,
    /// Counts changes of the keepers.
    pub(crate) epoch: u32,
    pub(crate) steward: String,
    /// Counts stewardships from 1.
    pub(crate) term: u64,
    /// Its record was restored without the majority of its keepers.
    pub(crate) recovered: bool,
    pub(crate) retries: u32,
    pub(crate) retried: u32,
    pub(crate) policy: Policy,
    pub(crate) lost_after_ms: u64,
    /// 0: never.
    pub(crate) keep_every_ms: u64,
    pub(crate) attempt: u32,
    pub(crate) ranks: Vec<Rank>,
    pub(crate) usage: Usage,
}

/// One process of a job.
#[derive(Debug, Clone)]
pub(crate) struct Rank {
    pub(crate) rank: u32,
    pub(crate) group: u32,
    pub(crate) process: u32,
    pub(crate) node: String,
    pub(crate) node_id: PeerId,
    pub(crate) gpus: Vec<String>,
    pub(crate) cpu_cores: u32,
    pub(crate) ram_mib: u64,
    pub(crate) state: RankState,
    pub(crate) end: Option<RankEnd>,
    /// `None` where the keepers were not asked.
    pub(crate) copies: Option<Copies>,
}

/// Who has what a process left, and what it kept while it ran.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Copies {
    /// Nodes that have all that it left, its own first.
    pub(crate) holders: Vec<String>,
    /// Nodes that are copying it.
    pub(crate) copying: Vec<String>,
    /// Nodes with a copy of its `keep/` from while it ran: which one it is.
    pub(crate) saves: Vec<(String, u64)>,
    /// Nodes that cannot hold a copy, and why.
    pub(crate) cannot: Vec<(String, String)>,
}

/// How much of its GPUs a job uses, in per cent; `None` where unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) compute_percent: Option<u32>,
    pub(crate) memory_percent: Option<u32>,
}

/// Jobs in the order shown, as of a time.
#[derive(Debug, Clone)]
pub(crate) struct Jobs {
    pub(crate) now_ms: u64,
    pub(crate) jobs: Vec<Job>,
}

/// The jobs of the pool, and how safe they are.
#[derive(Debug, Clone)]
pub(crate) struct Overview {
    pub(crate) jobs: Jobs,
    /// Nodes that a job's keepers can be chosen from.
    pub(crate) eligible: usize,
}

/// This node and the user of this command.
#[derive(Debug, Clone)]
pub(crate) struct MeAndNode {
    pub(crate) me: Me,
    pub(crate) user_id: UserId,
    /// `None` where the key is not a user's of the pool.
    pub(crate) user: Option<UserInfo>,
    /// Nodes that a job's keepers can be chosen from; `None` outside of pools.
    pub(crate) eligible: Option<usize>,
}

/// A node in full.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) info: NodeInfo,
    pub(crate) isolation: String,
    pub(crate) gpus: Vec<NodeGpu>,
    /// As the node itself said just now; `None` where it could not be asked.
    pub(crate) live: Option<Live>,
    pub(crate) error: Option<String>,
}

/// What only the node itself knows.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) cpu_cores: (u32, u32),
    pub(crate) ram_mib: (u64, u64),
    pub(crate) holds: Vec<String>,
    pub(crate) standing: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct NodeGpu {
    pub(crate) gpu: Gpu,
    pub(crate) state: GpuState,
    pub(crate) job: Option<String>,
    pub(crate) reading: Option<GpuReading>,
}

/// Why a job waits.
#[derive(Debug, Clone)]
pub(crate) struct Wait {
    pub(crate) id: JobId,
    pub(crate) short: String,
    pub(crate) state: State,
    pub(crate) summary: String,
    pub(crate) need: u32,
    pub(crate) held: u32,
    pub(crate) nodes: Vec<NodeVerdict>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeVerdict {
    pub(crate) node: String,
    pub(crate) node_id: PeerId,
    /// One word: `holds`, `waits`, `declined`, `silent`, `unreachable`, `not called`.
    pub(crate) verdict: &'static str,
    pub(crate) reason: String,
}

/// What stands in a directory of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) kind: FileKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FileKind {
    Dir { files: u64, bytes: u64 },
    File { bytes: u64, executable: bool },
    Link { target: String },
}

/// What a submission would do.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) title: String,
    pub(crate) request: String,
    pub(crate) processes: u32,
    pub(crate) command: Command,
    pub(crate) source: Source,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) missing_blobs: u64,
    pub(crate) missing_bytes: u64,
    pub(crate) keepers: Vec<String>,
    /// Nodes that would be called first, with the processes each has room for now; of those
    /// that are offline, how many seconds ago that was so.
    pub(crate) candidates: Vec<(String, u32, Option<u64>)>,
}

/// A job that was just submitted.
#[derive(Debug, Clone)]
pub(crate) struct Submission {
    pub(crate) id: JobId,
    pub(crate) title: String,
    pub(crate) request: String,
    pub(crate) private: bool,
    pub(crate) continues: Option<JobId>,
    pub(crate) command: Command,
    pub(crate) source: Source,
    /// The first drives it.
    pub(crate) keepers: Vec<PeerId>,
    /// How many of them can be reached.
    pub(crate) keepers_online: usize,
    pub(crate) sent_blobs: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) there_blobs: u64,
}

/// How a job goes on without the majority of its keepers.
#[derive(Debug, Clone)]
pub(crate) struct Recovery {
    pub(crate) id: JobId,
    pub(crate) short: String,
    /// How many it had.
    pub(crate) keepers: usize,
    pub(crate) lost: Vec<Lost>,
    /// The node whose knowledge of it counts.
    pub(crate) from: String,
    pub(crate) epoch: u32,
    pub(crate) seq: u64,
    /// Its keepers from then on.
    pub(crate) next: Vec<String>,
}

/// A keeper that cannot be reached.
#[derive(Debug, Clone)]
pub(crate) struct Lost {
    pub(crate) node: String,
    /// Seconds since it was heard last; `None` where that is longer than is remembered.
    pub(crate) heard_s: Option<u64>,
}

impl Recovery {
    /// What it means, for who decides it.
    pub(crate) fn text(&self) -> String {
        let Self { id: _, short, keepers, lost, from, epoch: _, seq, next } = self;
        let lost: Vec<String> = lost
            .iter()
            .map(|Lost { node, heard_s }| match heard_s {
                Some(age) => format!("  {node}, heard last {} ago", duration_s(*age)),
                None => format!("  {node}, not heard for long"),
            })
            .collect();
        format!(
            "job {short} has lost {} of its {keepers} keepers:\n{}\nit would go on from change \
             {seq}, which node {from} has, and be kept by {}; later changes that only the lost \
             keepers knew are forgotten, such as an attempt that was started, or a result that \
             was accepted\na keeper that is only off is better started again",
            lost.len(),
            lost.join("\n"),
            next.join(", "),
        )
    }
}

impl Job {
    pub(crate) fn of(view: &JobView, names: &Names) -> Self {
        let JobView {
            job,
            title,
            owner,
            private,
            request,
            command,
            source,
            code,
            continues,
            submitted_at_ms,
            history,
            seq: _,
            chosen: _,
            epoch,
            keepers,
            steward,
            term,
            recovered,
            retries,
            retried,
            policy,
            lost_after_ms,
            keep_every_ms,
            outcome,
            attempt,
            saved: _,
            removed: _,
            holds: _,
        } = view;
        let ranks = attempt.ranks.iter().map(|rank| Rank {
            rank: rank.rank.0,
            group: rank.group,
            process: rank.process,
            node: names.node(rank.node),
            node_id: rank.node,
            gpus: rank.grant.gpus.iter().map(ToString::to_string).collect(),
            cpu_cores: rank.grant.cpu_cores,
            ram_mib: rank.grant.ram_mib,
            state: rank.state,
            end: rank.end.as_deref().cloned(),
            copies: None,
        });
        Self {
            id: *job,
            short: names.job(*job),
            title: title.clone(),
            user: names.user(*owner),
            user_id: *owner,
            private: *private,
            request: request.to_string(),
            command: command.clone(),
            source: source.clone(),
            code: *code,
            continues: *continues,
            submitted_at_ms: *submitted_at_ms,
            state: view.state(),
            history: history.clone(),
            outcome: outcome.clone(),
            stopped_by: match outcome {
                Some(Outcome::Stopped { by }) => Some(names.user(*by)),
                _ => None,
            },
            keepers: keepers.iter().map(|keeper| names.node(*keeper)).collect(),
            keepers_online: keepers.iter().filter(|keeper| !names.is_offline(**keeper)).count(),
            epoch: *epoch,
            steward: names.node(*steward),
            term: *term,
            recovered: *recovered,
            retries: *retries,
            retried: *retried,
            policy: *policy,
            lost_after_ms: *lost_after_ms,
            keep_every_ms: *keep_every_ms,
            attempt: attempt.number.0,
            ranks: ranks.collect(),
            usage: Usage::default(),
        }
    }

    /// Takes in what keepers say that they hold of its current attempt.
    pub(crate) fn add_copies(&mut self, views: &[(PeerId, &JobView)], names: &Names) {
        for rank in &mut self.ranks {
            let copies = rank.copies.get_or_insert_default();
            let has_results = rank.end.as_ref().is_some_and(RankEnd::has_results);
            if has_results && !names.is_offline(rank.node_id) {
                copies.holders.push(rank.node.clone());
            }
            for (keeper, view) in views {
                if view.attempt.number.0 != self.attempt {
                    continue;
                }
                let name = names.node(*keeper);
                for held in view.holds.iter().filter(|held| held.rank.0 == rank.rank) {
                    if held.complete && *keeper != rank.node_id {
                        copies.holders.push(name.clone());
                    } else if held.under_way {
                        copies.copying.push(name.clone());
                    }
                    if let Some((seq, _)) = held.save {
                        copies.saves.push((name.clone(), seq));
                    }
                    if let Some(reason) = &held.cannot {
                        copies.cannot.push((name.clone(), reason.clone()));
                    }
                }
            }
        }
    }

    /// When it came into its state.
    pub(crate) fn since_ms(&self) -> u64 {
        self.history.last().map_or(self.submitted_at_ms, |change| change.at_ms)
    }
}

impl Usage {
    /// Over all GPUs that a job has; `None` where none of them says anything.
    pub(crate) fn of<'a>(
        job: &Job,
        readings: impl Iterator<Item = &'a GpuReading> + Clone,
    ) -> Self {
        let gpus = job.ranks.iter().flat_map(|rank| &rank.gpus);
        let read: Vec<&GpuReading> = gpus
            .filter_map(|uuid| readings.clone().find(|reading| reading.uuid == *uuid))
            .collect();
        let compute: Vec<u32> = read.iter().filter_map(|r| r.utilisation_percent).collect();
        let memory: Vec<(u64, u64)> = read
            .iter()
            .filter_map(|r| Some((r.memory_used_bytes?, r.memory_total_bytes)))
            .collect();
        let used: u64 = memory.iter().map(|(used, _)| used).sum();
        let total: u64 = memory.iter().map(|(_, total)| total).sum();
        let percent = |part: u64, whole: u64| {
            let percent = u128::from(part) * 100 / u128::from(whole.max(1));
            (whole > 0).then(|| u32::try_from(percent).unwrap_or(u32::MAX))
        };
        let sum: u64 = compute.iter().map(|percent| u64::from(*percent)).sum();
        Self {
            compute_percent: percent(sum, compute.len() as u64 * 100),
            memory_percent: percent(used, total),
        }
    }
}

/// How many of its keepers a job survives the loss of, where so many of them are online: what
/// is left must be a majority of all.
pub(crate) fn survived_losses(keepers: usize, online: usize) -> usize {
    online.saturating_sub(quorum_of(keepers))
}

/// Nodes that jobs are kept by and that can be reached: neither clients nor what a command has
/// started for itself.
pub(crate) fn eligible_keepers(nodes: &[NodeInfo]) -> usize {
    let is_eligible = |node: &&NodeInfo| !node.client && !node.away && node.reach != "offline";
    nodes.iter().filter(is_eligible).count()
}

/// `2:v100`, one for each model in order, with `simulated` behind those that are.
pub(crate) fn gpu_summary<'a>(gpus: impl IntoIterator<Item = &'a Gpu>) -> String {
    let mut counts: Vec<((&str, bool), usize)> = Vec::new();
    for gpu in gpus {
        let kind = (gpu.model.as_str(), gpu.simulated);
        match counts.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => counts.push((kind, 1)),
        }
    }
    let texts = counts.iter().map(|((model, simulated), count)| {
        format!("{count}:{model}{}", if *simulated { " (simulated)" } else { "" })
    });
    let text = texts.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "none".to_owned() } else { text }
}

#[cfg(test)]
pub(crate) mod samples {
    use p2pit_protocol::{
        identity::PublicKey,
        inventory::GpuUuid,
        job::Attempt,
        message::{AttemptView, RankView},
        request::Grant,
    };

    use super::*;

    pub(crate) const NOW_MS: u64 = 1_750_000_000_000;

    pub(crate) fn peer(n: u8) -> PeerId {
        PeerId(PublicKey([n; 32]))
    }

    pub(crate) fn gpu(n: u8, simulated: bool) -> Gpu {
        Gpu {
            uuid: GpuUuid(format!("SIM-x-{n}")),
            model: "v100".to_owned(),
            full_name: "Simulated V100".to_owned(),
            memory_bytes: 32 << 30,
            simulated,
        }
    }

    /// Of one rank with one GPU.
    pub(crate) fn view(state: State, outcome: Option<Outcome>) -> JobView {
        JobView {
            job: JobId([5; 32]),
            title: "First light".to_owned(),
            owner: UserId(PublicKey([9; 32])),
            private: false,
            request: "[v100]".parse().unwrap(),
            command: Some(Command::Script),
            source: Source::default(),
            code: Some(BlobId([6; 32])),
            continues: None,
            submitted_at_ms: NOW_MS - 90_000,
            history: vec![
                Change { state: State::New, at_ms: NOW_MS - 90_000, reason: "submitted".into() },
                Change { state, at_ms: NOW_MS - 60_000, reason: "so it goes".into() },
            ],
            seq: 2,
            chosen: true,
            epoch: 1,
            keepers: vec![peer(1), peer(2), peer(3)],
            steward: peer(2),
            term: 4,
            recovered: false,
            retries: 3,
            retried: 1,
            policy: Policy::Restart,
            lost_after_ms: 86_400_000,
            keep_every_ms: 60_000,
            outcome,
            attempt: AttemptView {
                number: Attempt(1),
                ranks: vec![RankView {
                    rank: p2pit_protocol::job::Rank(0),
                    group: 0,
                    process: 0,
                    node: peer(1),
                    grant: Grant {
                        gpus: vec![GpuUuid("SIM-x-0".to_owned())],
                        cpu_cores: 0,
                        ram_mib: 0,
                    },
                    state: RankState::Running,
                    end: None,
                }],
            },
            saved: Vec::new(),
            removed: None,
            holds: Vec::new(),
        }
    }

    pub(crate) fn job(state: State, outcome: Option<Outcome>) -> Job {
        Job::of(&view(state, outcome), &Names::default())
    }

    pub(crate) fn node(n: u8, reach: &str) -> NodeInfo {
        NodeInfo {
            node: peer(n),
            name: format!("n{n}"),
            owner: UserId(PublicKey([9; 32])),
            owner_name: String::new(),
            client: false,
            away: false,
            reach: reach.to_owned(),
            advert_age_s: None,
            capacity: p2pit_protocol::inventory::Capacity::default(),
            not_free: Vec::new(),
            free_cpu_cores: 0,
            free_ram_mib: 0,
            owner_only: None,
            control: Vec::new(),
            data: Vec::new(),
        }
    }

    pub(crate) fn reading(n: u8, compute: Option<u32>, used_gib: Option<u64>) -> GpuReading {
        GpuReading {
            uuid: format!("SIM-x-{n}"),
            simulated: true,
            utilisation_percent: compute,
            memory_used_bytes: used_gib.map(|gib| gib << 30),
            memory_total_bytes: 32 << 30,
            temperature_celsius: None,
            power_milliwatts: None,
            compute_processes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{samples::*, *};

    #[test]
    fn gpus_are_counted_by_model_and_simulated_ones_say_so() {
        assert_eq!(gpu_summary(&[]), "none");
        assert_eq!(gpu_summary(&[gpu(0, false), gpu(1, false)]), "2:v100");
        let mixed = [gpu(0, false), gpu(1, true)];
        assert_eq!(gpu_summary(&mixed), "1:v100, 1:v100 (simulated)");
    }

    #[test]
    fn a_job_survives_the_loss_of_a_minority_of_its_keepers() {
        let survived = |keepers| survived_losses(keepers, keepers);
        assert_eq!([0, 1, 2, 3, 4, 5].map(survived), [0, 0, 0, 1, 1, 2]);
    }

    #[test]
    fn keepers_that_are_off_already_cannot_be_lost() {
        let survived = |(keepers, online)| survived_losses(keepers, online);
        assert_eq!([(3, 3), (3, 2), (3, 1), (3, 0)].map(survived), [1, 0, 0, 0]);
        assert_eq!([(5, 5), (5, 4), (5, 3), (5, 2)].map(survived), [2, 1, 0, 0]);

        let node = |n: u8, reach: &str| samples::node(n, reach);
        let mut nodes = [node(1, "self"), node(2, "online"), node(3, "offline"), node(4, "online")];
        nodes[3].client = true;
        assert_eq!(eligible_keepers(&nodes), 2);
        let job = Job::of(&view(State::Running, None), &Names::of(&nodes, &[]));
        assert_eq!((job.keepers.len(), job.keepers_online), (3, 2));
    }

    #[test]
    fn usage_is_the_mean_over_the_gpus_of_the_job_and_unknown_without_any() {
        let mut job = job(State::Running, None);
        job.ranks[0].gpus = vec!["SIM-x-0".to_owned(), "SIM-x-1".to_owned()];
        let readings = [
            reading(0, Some(50), Some(8)),
            reading(1, Some(100), Some(24)),
            reading(2, Some(0), Some(0)),
        ];
        let usage = Usage::of(&job, readings.iter());
        assert_eq!(usage, Usage { compute_percent: Some(75), memory_percent: Some(50) });
        let silent = [reading(0, None, None)];
        assert_eq!(Usage::of(&job, silent.iter()), Usage::default());
        assert_eq!(Usage::of(&job, [].iter()), Usage::default());
    }
}
