//! The jobs of the pool, gathered from those who keep them.

use std::collections::BTreeMap;

use p2pit_node::api::types::{Answer, Audience, NodeInfo, Resolved, UserInfo, jobs_of, path};
use p2pit_protocol::{
    JobId, PeerId, PoolId,
    job::State,
    message::{Command, JobFilter, JobView, Reply},
};

use crate::{
    names::Names,
    problem::Problem,
    session::{Session, accepted, unexpected},
    view::{Job, Jobs, Usage, eligible_keepers},
};

/// What was gathered, and what could not be.
#[derive(Debug)]
pub(crate) struct Gathered {
    pub(crate) pool: PoolId,
    pub(crate) names: Names,
    pub(crate) jobs: Jobs,
    /// Keepers that did not answer, so that their jobs are missing.
    pub(crate) silent: Vec<String>,
    /// Nodes that a job's keepers can be chosen from.
    pub(crate) eligible: usize,
}

/// Every live job and `filter.done_max` finished ones: first those that run, then those
/// that wait, then the finished from the newest.
pub(crate) async fn gather(session: &Session, filter: JobFilter) -> anyhow::Result<Gathered> {
    let audience = session.client.get::<Audience>(path::KEEPERS);
    let nodes = session.client.get::<Vec<NodeInfo>>(path::NODES);
    let users = session.client.get::<Vec<UserInfo>>(path::USERS);
    let (audience, nodes, users) = tokio::try_join!(audience, nodes, users)?;
    let names = Names::of(&nodes, &users).with_jobs(&audience);
    let done_max = filter.done_max;
    let command = Command::Jobs(filter);
    let answers = session.ask(audience.pool, &audience.nodes, &command).await?;
    let silent = answers.iter().filter(|answer| answer.reply.is_none());
    let silent: Vec<String> = silent.map(|answer| names.node(answer.node)).collect();
    if let Some(reason) = refused_by_all(&answers) {
        return Err(Problem::request(reason).into());
    }
    let jobs = arrange(&jobs_of(&answers), &names, done_max as usize);
    let jobs = Jobs { now_ms: audience.wall_ms, jobs };
    let eligible = eligible_keepers(&nodes);
    Ok(Gathered { pool: audience.pool, names, jobs, silent, eligible })
}

/// Adds what the GPUs of running jobs say.
pub(crate) async fn read_usage(session: &Session, gathered: &mut Gathered) -> anyhow::Result<()> {
    let jobs = &mut gathered.jobs.jobs;
    let running = |job: &&mut Job| matches!(job.state, State::Running | State::Stopping);
    let nodes: std::collections::BTreeSet<PeerId> = jobs
        .iter_mut()
        .filter(running)
        .flat_map(|job| job.ranks.iter().filter(|rank| !rank.gpus.is_empty()))
        .map(|rank| rank.node_id)
        .collect();
    if nodes.is_empty() {
        return Ok(());
    }
    let nodes: Vec<PeerId> = nodes.into_iter().collect();
    let answers = session.ask(gathered.pool, &nodes, &Command::Node).await?;
    let readings = answers.iter().flat_map(|answer| &answer.readings);
    for job in jobs.iter_mut().filter(running) {
        job.usage = Usage::of(job, readings.clone());
    }
    Ok(())
}

/// A job that a user named.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) pool: PoolId,
    pub(crate) resolved: Resolved,
}

impl Found {
    pub(crate) async fn by_text(session: &Session, text: &str) -> anyhow::Result<Self> {
        let (resolved, pool) = tokio::try_join!(session.resolve(text), session.pool())?;
        Ok(Self { pool, resolved })
    }

    pub(crate) fn job(&self) -> JobId {
        self.resolved.job
    }

    /// Asks the keeper.
    pub(crate) async fn ask(&self, session: &Session, command: &Command) -> anyhow::Result<Reply> {
        let answer = session.ask_one(self.pool, self.resolved.keeper, command).await?;
        Ok(accepted(answer)?)
    }

    pub(crate) async fn view(&self, session: &Session) -> anyhow::Result<JobView> {
        match self.ask(session, &Command::Job(self.job())).await? {
            Reply::Jobs(jobs) => jobs
                .into_iter()
                .find(|view| view.job == self.job())
                .ok_or_else(|| unexpected().into()),
            _ => Err(unexpected().into()),
        }
    }

    /// As [`Self::view`], for reading what the job left: who may not is told here.
    pub(crate) async fn view_to_read(
        &self,
        session: &Session,
        command: &Command,
    ) -> anyhow::Result<JobView> {
        match self.ask(session, command).await? {
            Reply::Granted(view) => Ok(*view),
            _ => Err(unexpected().into()),
        }
    }
}

/// Why nobody answered the question, where all refused it.
fn refused_by_all(answers: &[Answer]) -> Option<String> {
    let reasons: Vec<&String> = answers
        .iter()
        .filter_map(|answer| match &answer.reply {
            Some(Reply::Denied { reason }) => Some(reason),
            _ => None,
        })
        .collect();
    let any = answers.iter().any(|answer| matches!(answer.reply, Some(Reply::Jobs(_))));
    if any { None } else { reasons.first().map(|reason| (*reason).clone()) }
}

/// Each job once, as its newest description has it.
fn arrange(views: &[&JobView], names: &Names, done_max: usize) -> Vec<Job> {
    let mut newest: BTreeMap<JobId, &JobView> = BTreeMap::new();
    for view in views {
        let known = newest.entry(view.job).or_insert(view);
        if view.seq > known.seq {
            *known = view;
        }
    }
    let jobs = newest.into_values().map(|view| Job::of(view, names));
    let (mut done, mut live): (Vec<Job>, Vec<Job>) = jobs.partition(|job| job.state == State::Done);
    let waits = |job: &Job| matches!(job.state, State::New | State::Waiting);
    live.sort_by_key(|job| (waits(job), job.submitted_at_ms, job.id));
    done.sort_by_key(|job| (core::cmp::Reverse(job.since_ms()), job.id));
    done.truncate(done_max);
    live.into_iter().chain(done).collect()
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::job::{Change, Outcome};

    use super::*;
    use crate::view::samples::{NOW_MS, view};

    fn numbered(n: u8, state: State, at_ms: u64) -> JobView {
        let outcome = (state == State::Done).then_some(Outcome::Succeeded);
        JobView {
            job: JobId([n; 32]),
            history: vec![Change { state, at_ms, reason: String::new() }],
            submitted_at_ms: at_ms,
            ..view(state, outcome)
        }
    }

    #[test]
    fn running_jobs_come_first_then_waiting_ones_then_the_newest_done() {
        let views = [
            numbered(1, State::Done, NOW_MS - 10),
            numbered(2, State::Waiting, NOW_MS - 50),
            numbered(3, State::Running, NOW_MS - 20),
            numbered(4, State::Done, NOW_MS - 5),
            numbered(5, State::Done, NOW_MS - 90),
            numbered(6, State::Cleaning, NOW_MS - 30),
        ];
        let jobs = arrange(&views.iter().collect::<Vec<_>>(), &Names::default(), 2);
        let order: Vec<u8> = jobs.iter().map(|job| job.id.0[0]).collect();
        assert_eq!(order, [6, 3, 2, 4, 1]);
    }

    #[test]
    fn of_two_descriptions_the_newer_counts() {
        let old = JobView { seq: 1, ..numbered(1, State::Waiting, NOW_MS) };
        let new = JobView { seq: 2, ..numbered(1, State::Running, NOW_MS) };
        for views in [[&old, &new], [&new, &old]] {
            let jobs = arrange(&views, &Names::default(), 9);
            assert_eq!((jobs.len(), jobs[0].state), (1, State::Running));
        }
    }
}
