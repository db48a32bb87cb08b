//! `p2pit why`: why a job waits, node by node, and of one that runs who is silent.

use std::collections::BTreeMap;

use p2pit_protocol::{
    PeerId,
    job::{Policy, RankState, State},
    message::{Command, Decline, JobView, Reply, Verdict, WaitView},
};

use crate::{
    args::Globals,
    jobs::Found,
    names::Names,
    output::{Output, duration_s},
    session::{Session, unexpected},
    status::Status,
    view::{NodeVerdict, Wait},
};

/// Say why a job waits: what each node said to it, and which job is in front
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  p2pit why @last")]
pub(crate) struct Args {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    let (found, names) =
        tokio::try_join!(Found::by_text(&session, &args.job), Names::load(&session.client))?;
    let why = Command::Why(found.job());
    let Reply::Why(wait) = found.ask_steward(&session, out, &why, |_| true).await? else {
        return Err(unexpected().into());
    };
    let mut wait = describe(&wait, found.resolved.short.clone(), &names);
    if !matches!(wait.state, State::New | State::Waiting | State::Done) {
        add_silent(&mut wait, &found.view(&session, out).await?, &names);
    }
    out.data(out.format(args.json).wait(&wait))?;
    Ok(Status::DONE)
}

fn describe(view: &WaitView, short: String, names: &Names) -> Wait {
    let WaitView { job, state, summary, need, held, nodes } = view;
    let nodes = nodes.iter().map(|(node_id, verdict)| {
        let (verdict, reason) = explain(verdict, names);
        NodeVerdict { node: names.node(*node_id), node_id: *node_id, verdict, reason }
    });
    Wait {
        id: *job,
        short,
        state: *state,
        summary: summary.clone(),
        need: *need,
        held: *held,
        nodes: nodes.collect(),
    }
}

/// The nodes that a job needs, or may need, and that do not answer this one.
fn add_silent(wait: &mut Wait, view: &JobView, names: &Names) {
    let mut silent = BTreeMap::<PeerId, Vec<String>>::new();
    let running = view.attempt.ranks.iter().filter(|rank| rank.state != RankState::Ended);
    for rank in running.filter(|rank| names.is_offline(rank.node)) {
        let until = match view.policy {
            Policy::Restart => "until its lease has run out, some 200 s".to_owned(),
            Policy::Continue => format!("for up to {}", duration_s(view.lost_after_ms / 1_000)),
        };
        silent.entry(rank.node).or_default().push(format!(
            "process {} is {} there: it is waited for {until}",
            rank.rank, rank.state
        ));
    }
    for keeper in view.keepers.iter().filter(|keeper| names.is_offline(**keeper)) {
        silent.entry(*keeper).or_default().push("it is one of the job's keepers".to_owned());
    }
    if silent.is_empty() {
        return;
    }
    let list: Vec<String> = silent.keys().map(|node| names.node(*node)).collect();
    let (nodes, verb) = if list.len() == 1 { ("node", "does") } else { ("nodes", "do") };
    wait.summary = format!("{}; {nodes} {} {verb} not answer", wait.summary, list.join(", "));
    // What is seen from here says more than what others last heard.
    wait.nodes.retain(|known| !silent.contains_key(&known.node_id));
    wait.nodes.extend(silent.into_iter().map(|(node_id, reasons)| NodeVerdict {
        node: names.node(node_id),
        node_id,
        verdict: "silent",
        reason: reasons.join("; "),
    }));
}

fn explain(verdict: &Verdict, names: &Names) -> (&'static str, String) {
    match verdict {
        Verdict::Holds(1) => ("holds", "room for one process".to_owned()),
        Verdict::Holds(n) => ("holds", format!("room for {n} processes")),
        Verdict::Standing(Some(decline)) => ("waits", reason(decline, names)),
        Verdict::Standing(None) => ("waits", "it bids when it has room".to_owned()),
        Verdict::Declined(decline) => ("declined", reason(decline, names)),
        Verdict::NoAnswer => ("silent", "it was asked and has not answered yet".to_owned()),
        Verdict::Unreachable => ("unreachable", String::new()),
        Verdict::NotCalled => ("not called", "enough others were".to_owned()),
        Verdict::Has(1) => ("has", "the results of one process".to_owned()),
        Verdict::Has(n) => ("has", format!("the results of {n} processes")),
        Verdict::Copies(1) => ("copies", "the results of one process".to_owned()),
        Verdict::Copies(n) => ("copies", format!("the results of {n} processes")),
        Verdict::CannotHold(reason) => ("cannot hold", reason.clone()),
    }
}

fn reason(decline: &Decline, names: &Names) -> String {
    match decline {
        Decline::Unsuitable { missing } => format!("it does not have it: {missing}"),
        Decline::Busy { jobs } => {
            let jobs: Vec<String> = jobs.iter().map(|job| names.job(*job)).collect();
            match jobs.len() {
                0 => "busy".to_owned(),
                1 => format!("busy with job {}", jobs[0]),
                _ => format!("busy with jobs {}", jobs.join(", ")),
            }
        }
        Decline::HigherJob { job } => format!("job {} is in front", names.job(*job)),
        Decline::ForeignUse { gpus } => {
            let gpus: Vec<&str> = gpus.iter().map(|gpu| gpu.0.as_str()).collect();
            format!("a process outside the pool uses {}", gpus.join(", "))
        }
        Decline::OwnerOnly { reason } => format!("it runs only its owner's jobs: {reason}"),
        Decline::NotOffering => "it offers nothing".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::JobId;

    use super::*;
    use crate::view::samples::{node, view};

    #[test]
    fn of_a_job_that_runs_the_nodes_that_do_not_answer_are_named() {
        let nodes = [node(1, "offline"), node(2, "online"), node(3, "offline")];
        let names = Names::of(&nodes, &[]);
        let wait = || Wait {
            id: JobId([1; 32]),
            short: "abcd".to_owned(),
            state: State::Running,
            summary: "it runs".to_owned(),
            need: 1,
            held: 0,
            nodes: Vec::new(),
        };
        let mut seen = wait();
        add_silent(&mut seen, &view(State::Running, None), &names);
        assert_eq!(seen.summary, "it runs; nodes n1, n3 do not answer");
        let reasons: Vec<_> = seen.nodes.iter().map(|it| (&it.node[..], &it.reason[..])).collect();
        let runs = "process 0 is running there: it is waited for until its lease has run out, \
                    some 200 s; it is one of the job's keepers";
        assert_eq!(reasons, [("n1", runs), ("n3", "it is one of the job's keepers")]);
        let mut seen = wait();
        add_silent(&mut seen, &view(State::Running, None), &Names::default());
        assert_eq!((seen.summary, seen.nodes.len()), (wait().summary, 0), "all are there");
    }

    #[test]
    fn a_verdict_names_the_job_in_front() {
        let job = JobId([1; 32]);
        let short = &job.to_string()[..8];
        let names = Names::default();
        let declined = Verdict::Declined(Decline::HigherJob { job });
        assert_eq!(explain(&declined, &names), ("declined", format!("job {short} is in front")));
        let busy = Verdict::Standing(Some(Decline::Busy { jobs: vec![job] }));
        assert_eq!(explain(&busy, &names), ("waits", format!("busy with job {short}")));
    }
}
