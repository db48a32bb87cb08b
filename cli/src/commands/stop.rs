//! `p2pit stop`: end jobs before their time.

use p2pit_protocol::{
    job::State,
    message::{Command, Reply},
};

use crate::{
    args::Globals,
    jobs::Found,
    output::Output,
    session::{Session, unexpected},
    status::Status,
};

/// Stop jobs: SIGTERM, then after the job's grace SIGKILL
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit stop k3qz\n  \
    p2pit stop @last\n  \
    p2pit stop $(p2pit --quiet show jobs user=anna state=waiting)")]
pub(crate) struct Args {
    /// Unique prefixes of ids, or `@last` for your newest job
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<String>,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    for text in &args.jobs {
        let found = Found::by_text(&session, text).await?;
        // Only what is recorded is sure to happen.
        let is_final = |reply: &Reply| !matches!(reply, Reply::Stopping { recorded: false, .. });
        let stop = Command::Stop(found.job());
        let reply = found.ask_steward(&session, out, &stop, is_final).await?;
        let Reply::Stopping { state, .. } = reply else {
            return Err(unexpected().into());
        };
        let short = &found.resolved.short;
        out.note(&match state {
            State::Done => format!("job {short} is over already: there is nothing to stop"),
            _ => format!("job {short} is being stopped"),
        });
    }
    Ok(Status::DONE)
}
