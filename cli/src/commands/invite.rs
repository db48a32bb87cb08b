//! `p2pit invite`: a ticket for others.

use p2pit_node::config::Period;
use p2pit_protocol::roster::Rights;

use crate::{
    args::Globals,
    output::{Output, iso8601},
    problem::Problem,
    session::Session,
    status::Status,
    tickets::{self, Terms},
};

/// Print a ticket that lets others join the pool
///
/// A ticket is one word. Whoever has it can join until it expires, with no admin around:
/// pass it on like a key.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit invite                            for a week, for anybody who has it\n  \
    p2pit invite --expires 1h --uses 1      for one person, today\n  \
    ssh lab2 p2pit join --detach $(p2pit invite)")]
pub(crate) struct Args {
    /// How long it can be used
    #[arg(long, value_name = "DURATION", default_value = "7d")]
    expires: Period,
    /// How many users it lets in [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    uses: Option<u32>,
    /// Those who come by it are admins
    #[arg(long)]
    admin: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let valid_ms = u64::try_from(args.expires.0.as_millis()).unwrap_or(u64::MAX);
    if valid_ms == 0 {
        return Err(Problem::request("a ticket that expires at once lets nobody in").into());
    }
    let session = Session::open(globals, out).await?;
    let me = session.me().await?;
    let rights = if args.admin { Rights::Admin } else { Rights::User };
    let terms = Terms { valid_ms, uses: args.uses, rights };
    let ticket = tickets::issue(&session.client, &session.identity, &me, terms).await?;
    if ticket.doors.is_empty() {
        out.warn("no node of the pool has an address that the ticket could name");
    }
    out.data(format!("{}\n", *ticket.to_word()))?;
    let uses = match args.uses {
        Some(1) => "by one user".to_owned(),
        Some(uses) => format!("by {uses} users"),
        None => "by any number of users".to_owned(),
    };
    out.note(&format!("can be used {uses} until {}", iso8601(ticket.expires_wall_ms)));
    Ok(Status::DONE)
}
