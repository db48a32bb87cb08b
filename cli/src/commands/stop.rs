//! `p2pit stop`: end jobs before their time.

use p2pit_protocol::{
    job::State,
    message::{Command, JobView, Reply},
};

use crate::{
    args::Globals,
    jobs::{Asked, Found},
    output::Output,
    problem::explain,
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
    // At once, and each for itself: one that nobody drives now holds up no other.
    let stops = args.jobs.iter().map(|text| async {
        let result = stop(&session, out, text).await;
        if args.jobs.len() > 1
            && let Err(reason) = &result
            && let Some(explanation) = explain(reason).1
        {
            out.error(&explanation);
        }
        result
    });
    let mut results = futures::future::join_all(stops).await;
    if results.len() == 1
        && let Some(only) = results.pop()
    {
        return only.map(|()| Status::DONE);
    }
    Ok(worst(&results))
}

async fn stop(session: &Session, out: &Output, text: &str) -> anyhow::Result<()> {
    let found = Found::by_text(session, text).await?;
    let job = Command::Job(found.job());
    // Whoever is not sure that it is over finds out by stopping it.
    let was_over = match found.try_ask(session, &job).await? {
        Asked::Said(Reply::Jobs(jobs)) => jobs.iter().any(JobView::is_final),
        Asked::Said(_) | Asked::NoSteward | Asked::Nobody(_) => false,
    };
    // Only what is recorded is sure to happen.
    let is_final = |reply: &Reply| !matches!(reply, Reply::Stopping { recorded: false, .. });
    let stop = Command::Stop(found.job());
    let reply = found.ask_steward(session, out, &stop, is_final).await?;
    let Reply::Stopping { state, .. } = reply else {
        return Err(unexpected().into());
    };
    let short = &found.resolved.short;
    out.note(&match state {
        State::Done if was_over => format!("job {short} is over already: there is nothing to stop"),
        State::Done => format!("job {short} is over now"),
        _ => format!("job {short} is being stopped"),
    });
    Ok(())
}

/// How a command ends that did several things.
pub(super) fn worst(results: &[anyhow::Result<()>]) -> Status {
    let status = |result: &anyhow::Result<()>| match result {
        Ok(()) => Status::DONE,
        Err(reason) => explain(reason).0,
    };
    results.iter().map(status).max_by_key(|status| status.0).unwrap_or(Status::DONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Problem;

    #[test]
    fn several_stops_end_as_the_worst_of_them_does() {
        let refused = || Err(Problem::request("no job `abcd`").into());
        let broken = || Err(Problem::broken("nobody drives job abcd now").into());
        assert_eq!(worst(&[Ok(()), Ok(())]), Status::DONE);
        assert_eq!(worst(&[Ok(()), refused(), Ok(())]), Status::FAILED);
        assert_eq!(worst(&[refused(), broken(), Ok(())]), Status::BROKEN);
    }
}
