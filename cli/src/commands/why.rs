//! `p2pit why`: why a job waits, node by node.

use p2pit_protocol::message::{Command, Decline, Reply, Verdict, WaitView};

use crate::{
    args::Globals,
    jobs::Found,
    names::Names,
    output::Output,
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
    let wait = describe(&wait, found.resolved.short.clone(), &names);
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
