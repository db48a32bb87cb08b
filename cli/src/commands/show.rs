//! `p2pit show`: nodes, users and jobs, all or one.

use std::{collections::BTreeMap, str::FromStr};

use p2pit_node::api::types::{Answer, NodeInfo, UserInfo, jobs_of, node_of, path};
use p2pit_protocol::{
    PeerId,
    job::State,
    message::{Command, GpuState, GpuView, JobFilter, NodeView},
};

use super::status::warn_of_silence;
use crate::{
    args::Globals,
    identity::wall_ms,
    jobs::{self, Found},
    names::Names,
    output::Output,
    problem::Problem,
    session::{Session, pool_of},
    status::Status,
    view::{self, Job, Live, MeAndNode, NodeGpu, eligible_keepers},
};

/// Show nodes, users or jobs of the pool
///
/// WHAT is `nodes`, `node:NAME`, `me`, `users`, `jobs` or `job:ID`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Jobs may be narrowed down by `user=NAME`, `title=PART`, `state=STATE` and \
    `limit=N` (100).\n\n\
    Examples:\n  p2pit show nodes\n  p2pit show node:lab1\n  p2pit show me\n  \
    p2pit show jobs user=anna state=failed limit=5\n  p2pit show job:@last --json"
)]
pub(crate) struct Args {
    #[arg(value_name = "WHAT")]
    what: What,
    /// Only jobs with `KEY=VALUE`
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// One JSON value: an array for `nodes`, `users` and `jobs`, else an object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Nodes,
    Node(String),
    Me,
    Users,
    Jobs,
    Job(String),
}

impl FromStr for What {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("node", name)) if !name.is_empty() => Ok(Self::Node(name.to_owned())),
            Some(("job", id)) if !id.is_empty() => Ok(Self::Job(id.to_owned())),
            None if text == "nodes" => Ok(Self::Nodes),
            None if text == "me" => Ok(Self::Me),
            None if text == "users" => Ok(Self::Users),
            None if text == "jobs" => Ok(Self::Jobs),
            Some(_) | None => Err("expected `nodes`, `node:NAME`, `me`, `users`, `jobs` or \
                                   `job:ID`"
                .to_owned()),
        }
    }
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let Args { what, filters, json } = args;
    let filter = Filter::parse(&filters)?;
    if what != What::Jobs && !filters.is_empty() {
        return Err(Problem::request("only `show jobs` can be narrowed down").into());
    }
    let format = out.format(json);
    let session = Session::open(globals, out).await?;
    let text = match what {
        What::Nodes => format.nodes(&sorted(session.client.get(path::NODES).await?)),
        What::Node(name) => format.node(&node(&session, &name).await?),
        What::Me => format.me(&me(&session).await?),
        What::Users => format.users(&session.client.get::<Vec<UserInfo>>(path::USERS).await?),
        What::Jobs => {
            let mut gathered = jobs(&session, out, &filter).await?;
            gathered.jobs.retain(|job| filter.admits(job));
            gathered.jobs.truncate(filter.limit as usize);
            format.jobs(&gathered)
        }
        What::Job(id) => {
            let (found, names) =
                tokio::try_join!(Found::by_text(&session, &id), Names::load(&session.client))?;
            let view = found.view(&session, out).await?;
            let mut job = Job::of(&view, &names);
            job.short.clone_from(&found.resolved.short);
            // Each tells only what it holds itself; one that is silent is none to be had from.
            let asked = Command::Job(view.job);
            let answers = session.ask(found.pool, &view.keepers, &asked).await?;
            let views = answers.iter().filter_map(|answer| {
                let [view] = jobs_of(core::slice::from_ref(answer))[..] else { return None };
                Some((answer.node, view))
            });
            job.add_copies(&views.collect::<Vec<_>>(), &names);
            format.job(&job, wall_ms())
        }
    };
    out.data(text)?;
    Ok(Status::DONE)
}

async fn me(session: &Session) -> anyhow::Result<MeAndNode> {
    let me = session.me().await?;
    let user_id = session.user();
    if me.pool.is_none() {
        return Ok(MeAndNode { me, user_id, user: None, eligible: None });
    }
    let nodes = session.client.get::<Vec<NodeInfo>>(path::NODES);
    let users = session.client.get::<Vec<UserInfo>>(path::USERS);
    let (nodes, users) = tokio::try_join!(nodes, users)?;
    let user = users.into_iter().find(|user| user.user == user_id);
    Ok(MeAndNode { me, user_id, user, eligible: Some(eligible_keepers(&nodes)) })
}

async fn jobs(session: &Session, out: &Output, filter: &Filter) -> anyhow::Result<view::Jobs> {
    let owner = match &filter.user {
        None => None,
        Some(name) => {
            let names = Names::load(&session.client).await?;
            let user = names.user_named(name).or_else(|| name.parse().ok());
            Some(user.ok_or_else(|| {
                Problem::request(format!("the pool has no user `{name}`"))
                    .hint("`p2pit show users` lists them")
            })?)
        }
    };
    // What is filtered out here must not use up the limit there.
    let narrowed = filter.title.is_some() || filter.state.is_some();
    let done_max = if narrowed { FILTERED_DONE_MAX } else { filter.limit };
    let mut gathered = jobs::gather(session, JobFilter { owner, done_max }).await?;
    jobs::read_usage(session, &mut gathered).await?;
    warn_of_silence(out, &gathered.silent);
    Ok(gathered.jobs)
}

async fn node(session: &Session, name: &str) -> anyhow::Result<view::Node> {
    let nodes = session.client.get::<Vec<NodeInfo>>(path::NODES);
    let users = session.client.get::<Vec<UserInfo>>(path::USERS);
    let (nodes, users, me) = tokio::try_join!(nodes, users, session.me())?;
    let names = Names::of(&nodes, &users);
    let id = names.node_named(name).or_else(|| name.parse::<PeerId>().ok());
    let info = nodes.into_iter().find(|node| Some(node.node) == id).ok_or_else(|| {
        let known: Vec<&str> = names.node_names().collect();
        Problem::request(format!("the pool has no node `{name}`"))
            .hint(format!("it has {}", known.join(", ")))
    })?;
    let answer = session.ask_one(pool_of(&me)?, info.node, &Command::Node).await?;
    let mut names = names;
    if node_of(&answer).is_some_and(|view| view.gpus.iter().any(|gpu| gpu.job.is_some())) {
        names = names.with_jobs(&session.client.get(path::KEEPERS).await?);
    }
    let isolation = match (info.node == me.node, &info.owner_only) {
        (true, _) => me.isolation.clone(),
        (false, None) => "namespaces".to_owned(),
        (false, Some(reason)) => format!("none: {reason}"),
    };
    Ok(describe(info, isolation, answer, &names))
}

fn describe(mut info: NodeInfo, isolation: String, answer: Answer, names: &Names) -> view::Node {
    let readings: BTreeMap<String, _> =
        answer.readings.iter().map(|reading| (reading.uuid.clone(), reading.clone())).collect();
    let reading = |uuid: &str| readings.get(uuid).cloned();
    let error = match &answer.reply {
        Some(p2pit_protocol::message::Reply::Denied { reason }) => Some(reason.clone()),
        _ => answer.error.clone(),
    };
    let Some(live) = node_of(&answer) else {
        let gpus = info.capacity.gpus.iter().map(|gpu| {
            let state = info.not_free.iter().find(|(uuid, _)| *uuid == gpu.uuid);
            let state = state.map_or(GpuState::Free, |(_, state)| *state);
            NodeGpu { gpu: gpu.clone(), state, job: None, reading: None }
        });
        let gpus = gpus.collect();
        return view::Node { info, isolation, gpus, live: None, error };
    };
    let NodeView { node: _, gpus, cpu_cores, ram_mib, owner_only, holds, standing } = live;
    info.owner_only.clone_from(owner_only);
    let gpus = gpus.iter().map(|GpuView { gpu, state, job }| NodeGpu {
        gpu: gpu.clone(),
        state: *state,
        job: job.map(|job| names.job(job)),
        reading: reading(&gpu.uuid.0),
    });
    let gpus = gpus.collect();
    let live = Live {
        cpu_cores: *cpu_cores,
        ram_mib: *ram_mib,
        holds: holds.iter().map(|hold| names.job(hold.job)).collect(),
        standing: standing.len(),
    };
    view::Node { info, isolation, gpus, live: Some(live), error }
}

/// By name, with this node's own place among the others.
fn sorted(mut nodes: Vec<NodeInfo>) -> Vec<NodeInfo> {
    nodes.sort_by(|a, b| (&a.name, a.node).cmp(&(&b.name, b.node)));
    nodes
}

/// Finished jobs that are looked through for those wanted.
const FILTERED_DONE_MAX: u32 = 1_000;
const LIMIT: u32 = 100;

#[derive(Debug, PartialEq, Eq)]
struct Filter {
    user: Option<String>,
    title: Option<String>,
    state: Option<String>,
    limit: u32,
}

impl Filter {
    fn parse(texts: &[String]) -> Result<Self, Problem> {
        let mut filter = Self { user: None, title: None, state: None, limit: LIMIT };
        for text in texts {
            match text.split_once('=') {
                Some(("user", name)) => filter.user = Some(name.to_lowercase()),
                Some(("title", part)) => filter.title = Some(part.to_lowercase()),
                Some(("state", state)) => filter.state = Some(parse_state(state)?),
                Some(("limit", number)) => {
                    filter.limit = number.parse().map_err(|_| {
                        Problem::request(format!("`limit={number}` is no number of jobs"))
                            .hint("such as `limit=20`")
                    })?;
                }
                Some(_) | None => {
                    return Err(Problem::request(format!("`{text}` is no filter for jobs")).hint(
                        "filters are `user=NAME`, `title=PART`, `state=STATE` and `limit=N`",
                    ));
                }
            }
        }
        Ok(filter)
    }

    /// A state by its name, its three letters, or the outcome in a word.
    fn admits(&self, job: &Job) -> bool {
        let outcome = job.outcome.as_ref().map(ToString::to_string).unwrap_or_default();
        let is_state = |wanted: &String| {
            [job.state.to_string().to_lowercase(), job.state.code().to_lowercase()].contains(wanted)
                || outcome == *wanted
                || outcome.split('(').next() == Some(wanted.as_str()) && !outcome.is_empty()
        };
        self.title.as_ref().is_none_or(|part| job.title.to_lowercase().contains(part))
            && self.state.as_ref().is_none_or(is_state)
    }
}

/// What [`Filter::admits`] understands, in lower case.
fn parse_state(text: &str) -> Result<String, Problem> {
    let state = text.to_lowercase();
    let is_state = STATES.iter().any(|known| {
        [known.to_string().to_lowercase(), known.code().to_lowercase()].contains(&state)
    });
    let code = state.strip_prefix("failed(").and_then(|rest| rest.strip_suffix(')'));
    let is_failed = code.is_some_and(|code| code.parse::<i32>().is_ok());
    if is_state || is_failed || OUTCOMES.contains(&state.as_str()) {
        return Ok(state);
    }
    let known: Vec<String> = STATES.iter().map(|it| it.to_string().to_lowercase()).collect();
    let (known, outcomes) = (known.join(", "), OUTCOMES.join(", "));
    Err(Problem::request(format!("no job is ever in state `{text}`"))
        .hint(format!("states are {known}; of done jobs also {outcomes}")))
}

const STATES: [State; 8] = [
    State::New,
    State::Waiting,
    State::Preparing,
    State::Starting,
    State::Running,
    State::Stopping,
    State::Cleaning,
    State::Done,
];
/// As outcomes are shown, without numbers.
const OUTCOMES: [&str; 5] = ["succeeded", "failed", "stopped", "timed out", "lost"];

#[cfg(test)]
mod tests {
    use p2pit_protocol::job::Outcome;

    use super::*;
    use crate::view::samples;

    #[test]
    fn what_is_shown_is_named_in_one_word() {
        for (text, what) in [
            ("nodes", What::Nodes),
            ("node:lab1", What::Node("lab1".to_owned())),
            ("me", What::Me),
            ("job:@last", What::Job("@last".to_owned())),
        ] {
            assert_eq!(text.parse(), Ok(what));
        }
        for text in ["node", "node:", "job:", "everything", "jobs:x", ""] {
            assert!(text.parse::<What>().is_err(), "{text}");
        }
    }

    #[test]
    fn jobs_are_narrowed_down_by_title_state_and_outcome() {
        let admitted = |filter: &str, job: &Job| {
            let filters: Vec<String> = filter.split(' ').map(str::to_owned).collect();
            Filter::parse(&filters).unwrap().admits(job)
        };
        let running = samples::job(State::Running, None);
        let failed = samples::job(State::Done, Some(Outcome::Failed { code: 3 }));
        assert!(admitted("title=LIGHT", &running) && !admitted("title=dark", &running));
        assert!(admitted("state=running", &running) && admitted("state=RUN", &running));
        assert!(admitted("state=failed", &failed) && admitted("state=failed(3)", &failed));
        assert!(admitted("state=done", &failed) && !admitted("state=failed", &running));
        assert!(!admitted("title=light state=waiting", &running));
        assert!(Filter::parse(&["colour=red".to_owned()]).is_err());
        assert!(Filter::parse(&["limit=many".to_owned()]).is_err());
        for state in ["timed out", "LOST", "failed(-1)", "sto"] {
            assert!(Filter::parse(&[format!("state={state}")]).is_ok(), "{state}");
        }
        for state in ["", "runing", "failed(x)", "failed("] {
            assert!(Filter::parse(&[format!("state={state}")]).is_err(), "{state}");
        }
    }
}
