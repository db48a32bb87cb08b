//! `p2pit log`: what a job wrote.

use p2pit_protocol::{job::State, message::Command};

use super::Interrupts;
use crate::{
    args::Globals, follow::Reading, jobs::Found, output::Output, problem::Problem,
    session::Session, status::Status,
};

/// Show a job's log: what it wrote, and how its state changed
///
/// Lines are `[time] [worker N] text`, those of the pool `[time] [daemon] STATE: reason`.
#[derive(Debug, clap::Args)]
#[command(after_help = "With --follow the exit code is the job's own: 143 where it was stopped, \
    124 where it ran into its time limit, 125 where it was lost. Ctrl-C ends only the following, \
    with 130.\n\n\
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
    if let Some(worker) = args.worker {
        refuse_worker(worker, view.request.process_count(), &found.resolved.short)?;
    }
    let reading = Reading {
        session: &session,
        out,
        pool: found.pool,
        job: found.job(),
        keepers: found.resolved.keepers.clone(),
        worker: args.worker,
    };
    if !args.follow {
        reading.read(&view).await?;
        return Ok(Status::DONE);
    }
    if view.state() != State::Done {
        let mut interrupts = Interrupts::new()?;
        return tokio::select! {
            outcome = reading.follow() => Ok(Status::of_outcome(&outcome?)),
            status = interrupts.next() => {
                let job = &found.resolved.short;
                out.note(&format!("job {job} goes on; `p2pit log {job} -f` follows it again"));
                Ok(status)
            }
        };
    }
    reading.read(&view).await?;
    Ok(view.outcome.as_ref().map_or(Status::DONE, Status::of_outcome))
}

fn refuse_worker(worker: u32, processes: u32, job: &str) -> Result<(), Problem> {
    if worker < processes {
        return Ok(());
    }
    let which = match processes {
        1 => "only worker 0".to_owned(),
        n => format!("workers 0 to {}", n - 1),
    };
    Err(Problem::request(format!("job {job} has {which}, and no worker {worker}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_the_job_does_not_have_is_answered_with_those_it_has() {
        assert_eq!(refuse_worker(1, 2, "abcd"), Ok(()));
        let message =
            |worker, processes| refuse_worker(worker, processes, "abcd").unwrap_err().to_string();
        assert_eq!(message(7, 2), "job abcd has workers 0 to 1, and no worker 7");
        assert_eq!(message(1, 1), "job abcd has only worker 0, and no worker 1");
    }
}
