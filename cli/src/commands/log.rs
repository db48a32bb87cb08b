//! `p2pit log`: what a job wrote.

use p2pit_protocol::{job::State, message::Command};

use crate::{
    args::Globals, follow::Reading, jobs::Found, output::Output, session::Session, status::Status,
};

/// Show a job's log: what it wrote, and how its state changed
///
/// Lines are `[time] [worker N] text`, those of the pool `[time] [daemon] STATE: reason`.
#[derive(Debug, clap::Args)]
#[command(after_help = "With --follow the exit code is the job's own: 143 where it was stopped, \
    124 where it ran into its time limit, 125 where it was lost.\n\n\
    Examples:\n  p2pit log @last -f\n  p2pit log k3qz --worker 1 | grep loss")]
pub(crate) struct Args {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// Go on until the job is done
    #[arg(long, short)]
    follow: bool,
    /// Only the lines of this process
    #[arg(long, short, value_name = "N")]
    worker: Option<u32>,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    let found = Found::by_text(&session, &args.job).await?;
    let view = found.view_to_read(&session, &Command::Log(found.job())).await?;
    let reading = Reading {
        session: &session,
        out,
        pool: found.pool,
        job: found.job(),
        keeper: found.resolved.keeper,
        worker: args.worker,
    };
    if !args.follow {
        reading.read(&view).await?;
        return Ok(Status::DONE);
    }
    if view.state() != State::Done {
        return Ok(Status::of_outcome(&reading.follow().await?));
    }
    reading.read(&view).await?;
    Ok(view.outcome.as_ref().map_or(Status::DONE, Status::of_outcome))
}
