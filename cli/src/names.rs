//! What people call nodes, users and jobs.

use std::collections::{BTreeMap, BTreeSet};

use p2pit_node::api::types::{Audience, NodeInfo, UserInfo, path};
use p2pit_protocol::{JobId, PeerId, UserId};

use crate::client::Client;

/// Characters of a job's id where nothing better is known: unique in practice.
const JOB_CHARS: usize = 8;
/// The last characters of a peer id differ; the first do not.
const PEER_CHARS: usize = 6;
const USER_CHARS: usize = 8;

/// Names by id, with a stand-in where there is none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    nodes: BTreeMap<PeerId, String>,
    users: BTreeMap<UserId, String>,
    jobs: BTreeMap<JobId, String>,
    offline: BTreeSet<PeerId>,
}

impl Names {
    pub(crate) async fn load(client: &Client) -> anyhow::Result<Self> {
        let nodes = client.get::<Vec<NodeInfo>>(path::NODES);
        let users = client.get::<Vec<UserInfo>>(path::USERS);
        let (nodes, users) = tokio::try_join!(nodes, users)?;
        Ok(Self::of(&nodes, &users))
    }

    pub(crate) fn of(nodes: &[NodeInfo], users: &[UserInfo]) -> Self {
        Self {
            nodes: nodes.iter().map(|node| (node.node, node.name.clone())).collect(),
            users: users.iter().map(|user| (user.user, user.name.clone())).collect(),
            jobs: BTreeMap::new(),
            offline: nodes.iter().filter(|it| it.reach == "offline").map(|it| it.node).collect(),
        }
    }

    /// With the shortest unique prefixes of jobs.
    pub(crate) fn with_jobs(mut self, audience: &Audience) -> Self {
        self.jobs.extend(audience.short.iter().cloned());
        self
    }

    pub(crate) fn node(&self, node: PeerId) -> String {
        self.nodes.get(&node).filter(|name| !name.is_empty()).cloned().unwrap_or_else(|| {
            let text = node.to_string();
            format!("…{}", &text[text.len().saturating_sub(PEER_CHARS)..])
        })
    }

    /// Whether it is known that the node cannot be reached now.
    pub(crate) fn is_offline(&self, node: PeerId) -> bool {
        self.offline.contains(&node)
    }

    pub(crate) fn node_named(&self, name: &str) -> Option<PeerId> {
        self.nodes.iter().find(|(_, known)| *known == name).map(|(node, _)| *node)
    }

    pub(crate) fn user(&self, user: UserId) -> String {
        self.users
            .get(&user)
            .cloned()
            .unwrap_or_else(|| user.to_string().chars().take(USER_CHARS).collect())
    }

    pub(crate) fn user_named(&self, name: &str) -> Option<UserId> {
        self.users.iter().find(|(_, known)| *known == name).map(|(user, _)| *user)
    }

    pub(crate) fn node_names(&self) -> impl Iterator<Item = &str> {
        self.nodes.values().map(String::as_str)
    }

    pub(crate) fn job(&self, job: JobId) -> String {
        self.jobs.get(&job).cloned().unwrap_or_else(|| short_job(job))
    }
}

/// A prefix of a job's id for a message that must not wait for the unique one.
pub(crate) fn short_job(job: JobId) -> String {
    job.to_string().chars().take(JOB_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::PublicKey;

    use super::*;

    #[test]
    fn what_has_no_name_is_called_by_part_of_its_id() {
        let names = Names::default();
        let (node, user) = (PeerId(PublicKey([1; 32])), UserId(PublicKey([2; 32])));
        assert!(node.to_string().ends_with(names.node(node).trim_start_matches('…')));
        assert!(user.to_string().starts_with(&names.user(user)));
        let job = JobId([3; 32]);
        assert_eq!(names.job(job), job.to_string()[..8]);
    }
}
