//! The `p2pit` command.
//!
//! A command line becomes a function from arguments to an exit status in `commands/`. It
//! talks to the home's daemon through `client`, signs with the user's key, which no daemon
//! ever sees, and says what it has to say through `output`.

mod args;
mod client;
mod commands;
mod daemon_log;
mod daemon_process;
mod files;
mod follow;
mod home;
mod identity;
mod jobs;
mod names;
mod node_flags;
mod output;
mod problem;
mod processes;
mod script;
mod session;
mod status;
mod submission;
mod tickets;
mod view;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    // Before anything is set up: a supervisor is small, and outlives what starts it.
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|command| command == "supervise")
        && let Some(run_dir) = args.next()
    {
        let code = p2pit_node::executor::supervise_main(Path::new(&run_dir));
        return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
    }
    commands::main()
}
