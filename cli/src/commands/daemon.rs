//! `p2pit daemon`: a node in the background, as other commands start it.

use std::time::Duration;

use p2pit_node::daemon::{self, Options};

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

/// Run this home's node, or end it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit daemon --stop      end the node of `join --detach`; \
    its jobs go on, and the next start takes them up\n  p2pit daemon")]
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

async fn stop(home: &p2pit_node::home::Home, out: &Output) -> anyhow::Result<Status> {
    let Some(client) = Client::connect(home).await? else {
        let message = format!("no daemon runs in {}", home.path().display());
        return Err(Problem::request(message).into());
    };
    let me = client.get(p2pit_node::api::types::path::ME).await?;
    daemon_process::end(&client, &me).await?;
    out.note("the daemon has ended; its jobs go on");
    Ok(Status::DONE)
}
