//! Ids and names alone, one on a line.

use p2pit_node::api::types::{Checkup, NodeInfo, Severity, UserInfo};

use super::{Format, plain};
use crate::view::{File, Job, Jobs, MeAndNode, Node, Overview, Plan, Recovery, Submission, Wait};

#[derive(Debug)]
pub(super) struct Quiet;

impl Format for Quiet {
    fn me(&self, me: &MeAndNode) -> String {
        format!("{}\n", me.me.node)
    }

    fn nodes(&self, nodes: &[NodeInfo]) -> String {
        lines(nodes.iter().map(|node| plain(&node.name)))
    }

    fn node(&self, node: &Node) -> String {
        format!("{}\n", node.info.node)
    }

    fn users(&self, users: &[UserInfo]) -> String {
        lines(users.iter().map(|user| plain(&user.name)))
    }

    fn jobs(&self, jobs: &Jobs) -> String {
        lines(jobs.jobs.iter().map(|job| job.id.to_string()))
    }

    fn job(&self, job: &Job, _now_ms: u64) -> String {
        format!("{}\n", job.id)
    }

    fn status(&self, overview: &Overview) -> String {
        self.jobs(&overview.jobs)
    }

    fn wait(&self, wait: &Wait) -> String {
        format!("{}\n", plain(&wait.summary))
    }

    fn files(&self, files: &[File]) -> String {
        lines(files.iter().map(|file| plain(&file.path)))
    }

    fn plan(&self, plan: &Plan) -> String {
        lines(plan.candidates.iter().map(|(node, ..)| plain(node)))
    }

    fn submission(&self, submission: &Submission) -> String {
        format!("{}\n", submission.id)
    }

    fn recovery(&self, recovery: &Recovery) -> String {
        format!("{}\n", recovery.id)
    }

    fn checkup(&self, checkup: &Checkup) -> String {
        let bad = checkup.findings.iter().filter(|finding| finding.severity > Severity::Ok);
        lines(bad.map(|finding| plain(&finding.check)))
    }
}

fn lines(items: impl Iterator<Item = String>) -> String {
    items.map(|item| format!("{item}\n")).collect()
}
