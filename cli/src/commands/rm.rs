//! `p2pit rm`: give up what finished jobs left.

use p2pit_protocol::{
    job::State,
    message::{Command, Reply},
};

use super::{job::confirm, stop::worst};
use crate::{
    args::Globals,
    jobs::Found,
    names::Names,
    output::Output,
    problem::{Problem, explain},
    session::{Session, unexpected},
    status::Status,
    view::Job,
};

/// Remove what finished jobs left: logs, keep/ and artifacts, on every node
///
/// It goes to the nodes' trash, and is deleted after the time that their configuration gives it
/// (`trash`, 24 hours by default), or before where room is short. Until then --undo brings it
/// back. That the job was, and how it ended, stays on record. For the job's owner and admins.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit rm k3qz\n  \
    p2pit rm k3qz --undo\n  \
    p2pit rm --yes $(p2pit --quiet show jobs user=anna state=failed)")]
pub(crate) struct Args {
    /// Unique prefixes of ids, or `@last` for your newest job
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<String>,
    /// Bring back what was removed and is still in the trash
    #[arg(long)]
    undo: bool,
    /// Do not ask first
    #[arg(long, short)]
    yes: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    let names = Names::load(&session.client).await?;
    let mut found = Vec::new();
    for text in &args.jobs {
        found.push(look(&session, out, &names, text, args.undo).await);
    }
    let jobs: Vec<&Job> = found.iter().flatten().map(|(_, job)| job).collect();
    if !args.undo && !args.yes && !jobs.is_empty() {
        let lines: Vec<String> = jobs.iter().map(|job| describe(job)).collect();
        out.note(&format!("removes the logs, keep/ and artifacts of\n{}", lines.join("\n")));
        if !confirm().await? {
            return Err(Problem::request("nothing was removed")
                .hint("`p2pit rm --yes JOB` does it without asking")
                .into());
        }
    }
    let carried = found.into_iter().map(|found| async {
        let (found, job) = found?;
        carry_out(&session, out, &found, &job, args.undo).await
    });
    let results = futures::future::join_all(carried).await;
    finish(out, results)
}

fn finish(out: &Output, mut results: Vec<anyhow::Result<()>>) -> anyhow::Result<Status> {
    if results.len() == 1
        && let Some(only) = results.pop()
    {
        return only.map(|()| Status::DONE);
    }
    for reason in results.iter().filter_map(|result| result.as_ref().err()) {
        if let Some(explanation) = explain(reason).1 {
            out.error(&explanation);
        }
    }
    Ok(worst(&results))
}

/// One line of what is about to go.
fn describe(job: &Job) -> String {
    let outcome = job.outcome.as_ref().map(ToString::to_string).unwrap_or_default();
    format!("  {}  {} of {}: {outcome}", job.short, job.title, job.user)
}

/// The job that is meant, if there is anything to do about it.
async fn look(
    session: &Session,
    out: &Output,
    names: &Names,
    text: &str,
    undo: bool,
) -> anyhow::Result<(Found, Job)> {
    let found = Found::by_text(session, text).await?;
    let view = found.view(session, out).await?;
    let mut job = Job::of(&view, names);
    job.short.clone_from(&found.resolved.short);
    refuse_live(&job, undo)?;
    Ok((found, job))
}

fn refuse_live(job: &Job, undo: bool) -> Result<(), Problem> {
    if job.state == State::Done {
        return Ok(());
    }
    let (short, state) = (&job.short, job.state);
    let problem = Problem::request(format!("job {short} is not over: it is {state}"));
    Err(if undo {
        problem.hint("nothing of it was removed")
    } else {
        problem.hint(format!("`p2pit stop {short}` ends it; then it can be removed"))
    })
}

async fn carry_out(
    session: &Session,
    out: &Output,
    found: &Found,
    job: &Job,
    undo: bool,
) -> anyhow::Result<()> {
    let short = &found.resolved.short;
    let was_removed = job.removed.is_some();
    if undo && !was_removed {
        out.note(&format!("what job {short} left was not removed: there is nothing to undo"));
        return Ok(());
    }
    let command = Command::Remove { job: found.job(), undo };
    // Only what is recorded is sure to happen.
    let is_final = |reply: &Reply| !matches!(reply, Reply::Removed { recorded: false, .. });
    let reply = found.ask_steward(session, out, &command, is_final).await?;
    let Reply::Removed { removed, .. } = reply else { return Err(unexpected().into()) };
    out.note(&match (undo, removed.is_some()) {
        (false, true) if was_removed => format!("what job {short} left was removed before"),
        (false, true) => format!(
            "what job {short} left goes, on every node; `p2pit rm {short} --undo` brings it back \
             as long as it is in their trash"
        ),
        (true, false) => format!(
            "what job {short} left comes back, where it still was in the trash; `p2pit ls {short}` \
             says what there is"
        ),
        // Somebody else was faster.
        (false, false) => format!("somebody has taken back that job {short} was removed"),
        (true, true) => format!("somebody has removed job {short} again"),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::job::Outcome;

    use super::*;
    use crate::view::samples;

    #[test]
    fn only_what_is_over_is_removed_and_the_refusal_says_how_it_can_be() {
        let running = samples::job(State::Running, None);
        let refused = refuse_live(&running, false).unwrap_err();
        assert!(refused.is_request());
        assert!(refused.to_string().contains("is RUNNING"), "{refused}");
        let done = samples::job(State::Done, Some(Outcome::Succeeded));
        assert_eq!(refuse_live(&done, false), Ok(()));
        assert!(describe(&done).ends_with(": succeeded"), "{}", describe(&done));
    }
}
