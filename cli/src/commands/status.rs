//! `p2pit status`: what runs, what waits, what was done last.

use std::time::Duration;

use p2pit_node::api::types::{NodeInfo, path};
use p2pit_protocol::message::JobFilter;

use crate::{
    args::Globals, jobs, output::Output, session::Session, status::Status, view::Overview,
};

/// Finished jobs that are shown.
const DONE_MAX: u32 = 20;
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// Show running, waiting and recently finished jobs
///
/// UC% and UM% say how much of its GPUs' compute and memory a job uses. A last line says so
/// where the pool is too small for jobs to survive the loss of a node.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit status\n  p2pit status --watch\n  \
    p2pit status --json | jq '.[] | select(.state == \"RUNNING\") | .title'")]
pub(crate) struct Args {
    /// Show it anew every two seconds until Ctrl-C
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// One JSON array; in each job, `survives_losses` is how many of its keepers may be lost
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    if !args.watch {
        let gathered = gather(&session).await?;
        let Gathered { overview, silent } = gathered;
        out.data(out.format(args.json).status(&overview))?;
        warn_of_silence(out, &silent);
        if overview.jobs.jobs.is_empty() && silent.is_empty() {
            warn_of_solitude(&session, out).await?;
        }
        return Ok(Status::DONE);
    }
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let gathered = gather(&session).await?;
        out.screen(&out.format(false).status(&gathered.overview))?;
        warn_of_silence(out, &gathered.silent);
    }
}

struct Gathered {
    overview: Overview,
    silent: Vec<String>,
}

async fn gather(session: &Session) -> anyhow::Result<Gathered> {
    let filter = JobFilter { owner: None, done_max: DONE_MAX };
    let mut gathered = jobs::gather(session, filter).await?;
    jobs::read_usage(session, &mut gathered).await?;
    let jobs::Gathered { jobs, silent, eligible, full, .. } = gathered;
    Ok(Gathered { overview: Overview { jobs, eligible, full }, silent })
}

/// An empty list says little where nobody could be asked.
async fn warn_of_solitude(session: &Session, out: &Output) -> anyhow::Result<()> {
    let nodes: Vec<NodeInfo> = session.client.get(path::NODES).await?;
    let mut keepers = nodes.iter().filter(|node| node.reach != "self" && !node.client).peekable();
    if keepers.peek().is_none() || keepers.any(|node| node.reach == "online") {
        return Ok(());
    }
    out.warn(
        "no other node that keeps jobs is online: jobs that they keep are not shown; \
         `p2pit show nodes` says when each was heard last",
    );
    for text in session.me().await?.warnings {
        out.warn(&text);
    }
    Ok(())
}

pub(crate) fn warn_of_silence(out: &Output, silent: &[String]) {
    if !silent.is_empty() {
        let nodes = silent.join(", ");
        out.warn(&format!("jobs kept by {nodes} are missing here: no answer"));
    }
}
