//! The jobs of the pool, gathered from those who keep them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use p2pit_node::api::types::{Answer, Audience, NodeInfo, Resolved, UserInfo, jobs_of, path};
use p2pit_protocol::{
    JobId, PeerId, PoolId,
    job::State,
    message::{Command, JobFilter, JobView, Reply},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    names::Names,
    output::{Output, iso8601},
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
    /// Keepers that did not answer, and without whom jobs are missing.
    pub(crate) silent: Vec<String>,
    /// Nodes that a job's keepers can be chosen from.
    pub(crate) eligible: usize,
    /// Nodes that have no room for more content.
    pub(crate) full: Vec<String>,
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
    let offline: BTreeSet<PeerId> =
        nodes.iter().filter(|node| node.reach == "offline").map(|node| node.node).collect();
    let (away, here): (Vec<PeerId>, Vec<PeerId>) =
        audience.nodes.iter().partition(|node| offline.contains(node));
    let (mut answers, of_away) = tokio::try_join!(
        session.ask_within(audience.pool, &here, &command, Some(PATIENCE)),
        session.ask_within(audience.pool, &away, &command, Some(PATIENCE_OFFLINE)),
    )?;
    answers.extend(of_away);
    let mut missed = missed(&audience.keepers, &answers);
    missed.retain(|node| !offline.contains(node));
    if !missed.is_empty() {
        // Nobody else has what they have: they get the time they need.
        answers.retain(|answer| !missed.contains(&answer.node));
        let missed: Vec<PeerId> = missed.into_iter().collect();
        answers.extend(session.ask(audience.pool, &missed, &command).await?);
    }
    let silent = self::missed(&audience.keepers, &answers);
    let silent: Vec<String> = silent.into_iter().map(|node| names.node(node)).collect();
    if let Some(reason) = refused_by_all(&answers) {
        return Err(Problem::request(reason).into());
    }
    let jobs = arrange(&jobs_of(&answers), &names, done_max as usize);
    let jobs = Jobs { now_ms: audience.wall_ms, jobs };
    let eligible = eligible_keepers(&nodes);
    let is_full = |node: &&NodeInfo| node.full && !node.client && node.reach != "offline";
    let full = nodes.iter().filter(is_full).map(|node| node.name.clone()).collect();
    Ok(Gathered { pool: audience.pool, names, jobs, silent, eligible, full })
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
    // A courtesy: nobody waits for it longer than for the jobs themselves.
    let answers = session.ask_within(gathered.pool, &nodes, &Command::Node, Some(PATIENCE)).await?;
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

/// What came of asking those who keep a job.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Somebody answered, or refused to.
    Said(Reply),
    /// Some keep it, and point to a steward that does not answer.
    NoSteward,
    /// None that answered keeps it; why the others of those that could did not.
    Nobody(Vec<String>),
}

/// How long one keeper may think before the next is asked, too.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one has that this node has no connection to: it is mostly off, and a command that
/// has just started a node for itself is connected to few.
const PATIENCE_OFFLINE: Duration = Duration::from_millis(500);
/// Nodes asked at once about one job.
const AT_ONCE_MAX: usize = 64;
/// Answers about one job that name further nodes.
const REDIRECTS_MAX: usize = 64;
/// Silent nodes named in a message.
const SILENT_SHOWN_MAX: usize = 10;
/// How long a job may be without somebody who drives it: another keeper takes over sooner.
const STEWARD_WITHIN: Duration = Duration::from_secs(60);
/// How often it is asked for, at first and at last.
const STEWARD_POLL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

impl Found {
    pub(crate) async fn by_text(session: &Session, text: &str) -> anyhow::Result<Self> {
        let (resolved, pool) = tokio::try_join!(session.resolve(text), session.pool())?;
        Ok(Self { pool, resolved })
    }

    pub(crate) fn job(&self) -> JobId {
        self.resolved.job
    }

    /// Asks one keeper after the other until one says something, the steward first.
    pub(crate) async fn try_ask(
        &self,
        session: &Session,
        command: &Command,
    ) -> anyhow::Result<Asked> {
        try_ask(session, self.pool, &self.resolved.keepers, command).await
    }

    /// As [`Self::try_ask`], where any keeper will do.
    pub(crate) async fn ask(&self, session: &Session, command: &Command) -> anyhow::Result<Reply> {
        match self.try_ask(session, command).await? {
            Asked::Said(reply) => Ok(accepted(reply)?),
            Asked::NoSteward => Err(self.no_steward().into()),
            Asked::Nobody(silent) => Err(self.nobody(&silent).into()),
        }
    }

    /// As [`Self::try_ask`], for what only the steward can do: where there is none, this waits
    /// for the next. `is_final` says whether a reply needs no further asking.
    pub(crate) async fn ask_steward(
        &self,
        session: &Session,
        out: &Output,
        command: &Command,
        is_final: impl Fn(&Reply) -> bool,
    ) -> anyhow::Result<Reply> {
        let short = &self.resolved.short;
        let begun = Instant::now();
        let mut told = BTreeSet::new();
        let mut pause = STEWARD_POLL.0;
        loop {
            let (is_heard, waits_for) = match self.try_ask(session, command).await? {
                Asked::Said(reply) => {
                    let reply = accepted(reply)?;
                    if is_final(&reply) {
                        return Ok(reply);
                    }
                    (true, "a majority of its keepers to record it")
                }
                Asked::NoSteward => (
                    false,
                    "its steward, which is silent: another keeper takes over within a minute",
                ),
                Asked::Nobody(silent) => return Err(self.nobody(&silent).into()),
            };
            if begun.elapsed() > STEWARD_WITHIN {
                return Err(if is_heard { self.not_recorded() } else { self.no_steward() }.into());
            }
            // A round trip is nobody's business.
            if (!is_heard || begun.elapsed() > PATIENCE) && told.insert(waits_for) {
                out.note(&format!("job {short} waits for {waits_for}"));
            }
            sleep(pause).await;
            pause = (pause * 2).min(STEWARD_POLL.1);
        }
    }

    fn not_recorded(&self) -> Problem {
        let short = &self.resolved.short;
        Problem::broken(format!(
            "whether it is recorded for job {short} is unknown: too few of its keepers answer"
        ))
        .hint("the same command again settles it; `p2pit show nodes` says which nodes are online")
    }

    fn no_steward(&self) -> Problem {
        let short = &self.resolved.short;
        Problem::broken(format!("nobody drives job {short} now: its steward is silent")).hint(
            "another keeper takes over within a minute where a majority of them is on: try again",
        )
    }

    fn nobody(&self, silent: &[String]) -> Problem {
        let short = &self.resolved.short;
        if silent.is_empty() && self.resolved.is_under_way {
            return Problem::broken(format!(
                "job {short} is being submitted from here, and no node keeps it yet"
            ))
            .hint("try again in a moment; it may also come to nothing");
        }
        if silent.is_empty() {
            return Problem::request(format!("no node of the pool keeps job {short}"))
                .hint("`p2pit show jobs` lists what is kept");
        }
        let more = silent.len().saturating_sub(SILENT_SHOWN_MAX);
        let mut text = silent.iter().take(SILENT_SHOWN_MAX).cloned().collect::<Vec<_>>().join("; ");
        if more > 0 {
            text.push_str(&format!("; and {more} more"));
        }
        Problem::broken(format!(
            "whether job {short} is kept is unknown: no node that answers keeps it, but {text}"
        ))
        .hint(
            "`p2pit show nodes` says which nodes are online; of keepers that are gone for good, \
             `p2pit job recover` makes do without them",
        )
    }

    /// What a keeper says of it. One that is not sure that the job is over finds out when it is
    /// asked: it gets a moment for that.
    pub(crate) async fn view(&self, session: &Session, out: &Output) -> anyhow::Result<JobView> {
        let begun = Instant::now();
        let mut pause = STEWARD_POLL.0;
        loop {
            let reply = self.ask(session, &Command::Job(self.job())).await?;
            let Reply::Jobs(jobs) = reply else { return Err(unexpected().into()) };
            let view = jobs.into_iter().find(|view| view.job == self.job());
            let view = view.ok_or_else(unexpected)?;
            if view.state() != State::Done || view.is_final() {
                return Ok(view);
            }
            if begun.elapsed() > PATIENCE {
                out.warn(&format!(
                    "that job {} is over is what one of its keepers says, and too few of the \
                     others answer: it may not stand",
                    self.resolved.short
                ));
                return Ok(view);
            }
            sleep(pause).await;
            pause = (pause * 2).min(STEWARD_POLL.1);
        }
    }

    /// As [`Self::view`], for reading what the job left: who may not is told here.
    pub(crate) async fn view_to_read(
        &self,
        session: &Session,
        command: &Command,
    ) -> anyhow::Result<JobView> {
        let view = match self.ask(session, command).await? {
            Reply::Granted(view) => *view,
            _ => return Err(unexpected().into()),
        };
        if let Some(removed) = view.removed {
            let short = &self.resolved.short;
            let by = Names::load(&session.client).await?.user(removed.by);
            let at = iso8601(removed.at_ms);
            return Err(Problem::request(format!(
                "what job {short} left was removed by {by} at {at}"
            ))
            .hint(format!(
                "`p2pit rm {short} --undo` brings it back as long as it is in the nodes' trash"
            ))
            .into());
        }
        Ok(view)
    }
}

/// Asks those who may keep a job, one after the other, and whomever they point to; where none
/// of these says anything, at once all others that keep jobs, and then all that could.
pub(crate) async fn try_ask(
    session: &Session,
    pool: PoolId,
    keepers: &[PeerId],
    command: &Command,
) -> anyhow::Result<Asked> {
    let ask = |node| session.ask_one(pool, node, command);
    let mut round = Round::new(keepers);
    if let Some(reply) = round.run(PATIENCE, ask).await? {
        return Ok(Asked::Said(reply));
    }
    if !round.is_kept {
        let audience = session.client.get::<Audience>(path::KEEPERS).await?;
        round.add(audience.nodes);
        if let Some(reply) = round.run(Duration::ZERO, ask).await? {
            return Ok(Asked::Said(reply));
        }
    }
    if !round.is_kept {
        // That nobody keeps it is only so where every node that could says it.
        let nodes = session.client.get::<Vec<NodeInfo>>(path::NODES).await?;
        round.add(nodes.iter().filter(|node| !node.client).map(|node| node.node));
        if let Some(reply) = round.run(Duration::ZERO, ask).await? {
            return Ok(Asked::Said(reply));
        }
    }
    Ok(if round.is_kept { Asked::NoSteward } else { Asked::Nobody(round.silent) })
}

#[derive(Debug)]
struct Round {
    waiting: VecDeque<PeerId>,
    known: BTreeSet<PeerId>,
    /// Somebody keeps it, and does not drive it.
    is_kept: bool,
    silent: Vec<String>,
    redirects: usize,
}

impl Round {
    fn new(keepers: &[PeerId]) -> Self {
        let (waiting, known) = (VecDeque::new(), BTreeSet::new());
        let mut round = Self { waiting, known, is_kept: false, silent: Vec::new(), redirects: 0 };
        round.add(keepers.iter().copied());
        round
    }

    fn add(&mut self, nodes: impl IntoIterator<Item = PeerId>) {
        for node in nodes {
            if self.known.insert(node) {
                self.waiting.push_back(node);
            }
        }
    }

    fn add_first(&mut self, node: PeerId) {
        let is_waiting = self.waiting.contains(&node);
        if self.known.insert(node) || is_waiting {
            self.waiting.retain(|it| *it != node);
            self.waiting.push_front(node);
        }
    }

    /// The first answer that is one, of nodes that each have this long before the next is
    /// asked, too.
    async fn run<F: Future<Output = anyhow::Result<Answer>>>(
        &mut self,
        patience: Duration,
        ask: impl Fn(PeerId) -> F,
    ) -> anyhow::Result<Option<Reply>> {
        let mut asking = FuturesUnordered::new();
        loop {
            if asking.is_empty() {
                let Some(next) = self.waiting.pop_front() else { return Ok(None) };
                asking.push(ask(next));
            }
            while patience.is_zero()
                && asking.len() < AT_ONCE_MAX
                && let Some(next) = self.waiting.pop_front()
            {
                asking.push(ask(next));
            }
            let answer = if patience.is_zero() || self.waiting.is_empty() {
                asking.next().await
            } else {
                let Ok(answer) = timeout(patience, asking.next()).await else {
                    // It may still answer, but nobody waits for it alone.
                    if let Some(next) = self.waiting.pop_front() {
                        asking.push(ask(next));
                    }
                    continue;
                };
                answer
            };
            let Some(answer) = answer.transpose()? else { continue };
            match answer.reply {
                Some(Reply::Elsewhere { steward, keepers }) => {
                    self.is_kept = true;
                    if self.redirects < REDIRECTS_MAX {
                        self.redirects += 1;
                        self.add(keepers);
                        if let Some(steward) = steward {
                            self.add_first(steward);
                        }
                    }
                }
                Some(Reply::UnknownJob) => {}
                Some(reply) => return Ok(Some(reply)),
                None => {
                    let node = || format!("node {} does not answer", answer.node);
                    self.silent.push(answer.error.unwrap_or_else(node));
                }
            }
        }
    }
}

/// Those who did not answer, of whom a job is kept by no other.
fn missed(kept: &[(JobId, Vec<PeerId>)], answers: &[Answer]) -> BTreeSet<PeerId> {
    let silent = answers.iter().filter(|answer| answer.reply.is_none());
    let silent: BTreeSet<PeerId> = silent.map(|answer| answer.node).collect();
    // Its keepers may be others by now than those this node knows of.
    let shown: BTreeSet<JobId> = jobs_of(answers).iter().map(|view| view.job).collect();
    let lost = kept.iter().filter(|(job, keepers)| {
        !shown.contains(job) && keepers.iter().all(|it| silent.contains(it))
    });
    lost.flat_map(|(_, keepers)| keepers).copied().collect()
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
        let at = |view: &JobView| (view.epoch, view.seq, view.chosen);
        if at(view) > at(known) {
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
    use crate::view::samples::{NOW_MS, peer, view};

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

    fn answer(node: PeerId, reply: Option<Reply>) -> anyhow::Result<Answer> {
        let error = reply.is_none().then(|| format!("{node} cannot be reached"));
        Ok(Answer { node, reply, error, readings: Vec::new(), space: None })
    }

    #[test]
    fn a_no_is_only_said_of_a_job_that_nobody_can_have_or_get() {
        let found = |is_under_way| Found {
            pool: PoolId([1; 32]),
            resolved: Resolved {
                job: JobId([1; 32]),
                short: "abcd".to_owned(),
                keepers: Vec::new(),
                is_under_way,
            },
        };
        assert!(found(false).nobody(&[]).is_request());
        let submitting = found(true).nobody(&[]);
        assert!(!submitting.is_request() && submitting.to_string().contains("being submitted"));
        let many: Vec<String> = (0..12).map(|n| format!("node n{n} cannot be reached")).collect();
        let silent = found(false).nobody(&many);
        assert!(!silent.is_request());
        let text = silent.to_string();
        assert!(text.contains("node n9 cannot") && text.ends_with("; and 2 more"), "{text}");
    }

    #[tokio::test]
    async fn nobody_keeps_a_job_only_where_all_that_could_say_so() {
        let mut round = Round::new(&[peer(1), peer(2)]);
        let say_no = async |node| answer(node, Some(Reply::UnknownJob));
        assert_eq!(round.run(PATIENCE, say_no).await.unwrap(), None);
        assert!(!round.is_kept && round.silent.is_empty());
        let asked = std::cell::Cell::new(0);
        let third_is_off = async |node: PeerId| {
            asked.set(asked.get() + 1);
            answer(node, (node != peer(3)).then_some(Reply::UnknownJob))
        };
        round.add((1..=9).map(peer));
        assert_eq!(round.run(Duration::ZERO, third_is_off).await.unwrap(), None);
        assert_eq!(asked.get(), 7, "those that said no are not asked again");
        assert_eq!(round.silent, [format!("{} cannot be reached", peer(3))]);
    }

    #[tokio::test]
    async fn who_is_asked_last_of_all_may_be_the_one_that_keeps_it() {
        let mut round = Round::new(&[]);
        round.add((1..=200).map(peer));
        let kept = |node| {
            if node == peer(150) {
                Reply::Elsewhere { steward: Some(peer(201)), keepers: vec![peer(150)] }
            } else if node == peer(201) {
                Reply::Jobs(Vec::new())
            } else {
                Reply::UnknownJob
            }
        };
        let ask = async |node| answer(node, Some(kept(node)));
        assert_eq!(round.run(Duration::ZERO, ask).await.unwrap(), Some(Reply::Jobs(Vec::new())));
    }

    #[test]
    fn a_silent_keeper_is_missed_only_where_no_other_has_its_jobs() {
        let answer = |n: u8, is_there: bool| Answer {
            node: peer(n),
            reply: is_there.then(|| Reply::Jobs(Vec::new())),
            error: None,
            readings: Vec::new(),
            space: None,
        };
        let kept =
            [(JobId([1; 32]), vec![peer(1), peer(2)]), (JobId([2; 32]), vec![peer(2), peer(3)])];
        assert_eq!(missed(&kept, &[answer(1, true), answer(2, false), answer(3, true)]), [].into());
        let answers = [answer(1, false), answer(2, false), answer(3, true)];
        assert_eq!(missed(&kept, &answers), [peer(1), peer(2)].into());
        // Others keep it by now.
        let moved = Reply::Jobs(vec![numbered(1, State::Running, NOW_MS)]);
        let job = numbered(1, State::Running, NOW_MS).job;
        let kept = [(job, vec![peer(1), peer(2)])];
        let moved = Answer { reply: Some(moved), ..answer(3, true) };
        assert_eq!(missed(&kept, &[answer(1, false), answer(2, false), moved]), [].into());
    }

    #[test]
    fn of_two_descriptions_the_newer_counts_and_a_later_configuration_more() {
        let before = JobView { epoch: 0, seq: 9, ..numbered(1, State::Waiting, NOW_MS) };
        let after = JobView { epoch: 1, seq: 2, ..numbered(1, State::Running, NOW_MS) };
        for views in [[&before, &after], [&after, &before]] {
            assert_eq!(arrange(&views, &Names::default(), 9)[0].state, State::Running);
        }

        let old = JobView { seq: 1, ..numbered(1, State::Waiting, NOW_MS) };
        let new = JobView { seq: 2, ..numbered(1, State::Running, NOW_MS) };
        for views in [[&old, &new], [&new, &old]] {
            let jobs = arrange(&views, &Names::default(), 9);
            assert_eq!((jobs.len(), jobs[0].state), (1, State::Running));
        }
    }
}
