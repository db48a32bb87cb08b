//! `p2pit ls`: the files of a job.

use std::{ffi::OsString, path::Path};

use p2pit_protocol::{job::State, message::Command};

use crate::{
    args::Globals,
    files::{Left, parse_path},
    jobs::Found,
    output::Output,
    session::Session,
    status::Status,
};

/// List what a job keeps: `keep/` and `artifacts/`, of all its processes together
///
/// Each line is D, F or L for a directory, file or link, its size in bytes, and its path.
/// Where processes left different files under one path, each stands under `rank<i>/`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit ls @last\n  p2pit ls k3qz keep/checkpoints")]
pub(crate) struct Args {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// A file or directory [default: the top]
    path: Option<OsString>,
    /// One JSON array
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let path = parse_path(Path::new(&args.path.unwrap_or_default()))?;
    let session = Session::open(globals, out).await?;
    let (found, left) = gather(&session, out, &args.job).await?;
    if left.tree.entries().is_empty() && path.is_none() {
        let view = found.view(&session, out).await?;
        if view.state() != State::Done {
            let (job, state) = (&found.resolved.short, view.state());
            out.note(&format!(
                "job {job} has left nothing yet: it is {state}, and files are kept when a \
                 process ends"
            ));
        }
    }
    let files = left.list(path.as_ref())?;
    out.data(out.format(args.json).files(&files))?;
    Ok(Status::DONE)
}

/// The files of the job that a user named.
pub(super) async fn gather(
    session: &Session,
    out: &Output,
    job: &str,
) -> anyhow::Result<(Found, Left)> {
    let found = Found::by_text(session, job).await?;
    let view = found.view_to_read(session, &Command::Files(found.job())).await?;
    let left = Left::gather(session, found.pool, &view).await?;
    for reason in &left.missing {
        out.warn(&format!("files are missing: {reason}"));
    }
    for note in &left.notes {
        out.warn(note);
    }
    Ok((found, left))
}
