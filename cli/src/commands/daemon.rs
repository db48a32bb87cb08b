//! `p2pit daemon`: a node in the background, as other commands start it.

use std::time::Duration;

use p2pit_node::{
    api::types::{Me, path},
    daemon::{self, Options},
    home::Home,
};

use crate::{
    args::Globals,
    client::Client,
    daemon_log,
    daemon_process::{self, READY_LINE},
    home,
    node_flags::NodeFlags,
    output::Output,
    problem::Problem,
    status::Status,
};

/// Run this home's node as a service would, or end it with --stop
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit daemon --stop      end the node of `join --detach`; \
    its jobs go on, and the next start takes them up\n  p2pit daemon             run it here, \
    and log to standard error")]
pub(crate) struct Args {
    #[command(flatten)]
    flags: NodeFlags,
    /// Offer nothing, and end after this long without a command
    #[arg(long, value_name = "SECS")]
    idle_exit: Option<u64>,
    /// Say on standard output once the API answers
    #[arg(long, hide = true)]
    announce: bool,
    /// End the daemon that runs in this home; jobs go on
    #[arg(long, conflicts_with_all = ["idle_exit", "announce"])]
    stop: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let location = home::locate(globals)?;
    if args.stop {
        return stop(&home::existing(&location)?, out).await;
    }
    let home = home::open_or_create(&location)?;
    if let Some(client) = Client::connect(&home).await? {
        return Err(runs_already(&home, &client.get(path::ME).await?).into());
    }
    let settings = args.flags.resolve(&home)?;
    if args.announce {
        daemon_log::to_file(&settings.log, home.daemon_log())?;
    } else {
        daemon_log::to_stderr(&settings.log, out.colour_talk())?;
    }
    let idle_exit = args.idle_exit.map(Duration::from_secs);
    let announce = args.announce;
    let ready = move || {
        if announce {
            // Whoever waits for it sees the end of the line, and says what it means.
            let _ = daemon_log::announce(READY_LINE);
        }
    };
    daemon::run(Options { home, settings, idle_exit }, ready).await?;
    Ok(Status::DONE)
}

pub(super) fn runs_already(home: &Home, me: &Me) -> Problem {
    let home = home.path().display();
    Problem::request(format!("a daemon runs in {home} already (process {})", me.pid))
        .hint("`p2pit daemon --stop` ends it; `--home` names another home")
}

async fn stop(home: &Home, out: &Output) -> anyhow::Result<Status> {
    let Some(client) = Client::connect(home).await? else {
        let message = format!("no daemon runs in {}", home.path().display());
        return Err(Problem::request(message).into());
    };
    // Not asked of the daemon where it can be helped: one whose disk is full does not answer.
    let pid = match client.pid() {
        Some(pid) => pid,
        None => client.get::<Me>(path::ME).await?.pid,
    };
    daemon_process::end(&client, pid).await?;
    out.note("the daemon has ended; its jobs go on");
    Ok(Status::DONE)
}
