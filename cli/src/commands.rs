//! A file for each subcommand: a function from arguments to an exit status.

pub(crate) mod completion;
pub(crate) mod cp;
pub(crate) mod daemon;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod download;
pub(crate) mod invite;
pub(crate) mod job;
pub(crate) mod join;
pub(crate) mod leave;
pub(crate) mod log;
pub(crate) mod ls;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod show;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod why;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    args::{Cli, Command},
    daemon_log,
    output::Output,
    problem::explain,
    status::Status,
};

/// A node is mostly idle, and each thread costs memory.
const DAEMON_THREADS_MAX: usize = 4;

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(said) => return usage(&said),
    };
    let out = Output::new(&cli.globals);
    let status = start(cli, &out).unwrap_or_else(|error| {
        let (status, explanation) = explain(&error);
        if let Some(explanation) = explanation {
            out.error(&explanation);
        }
        status
    });
    ExitCode::from(status.0)
}

/// Help and version are what was asked for; anything else is a request that failed.
fn usage(said: &clap::Error) -> ExitCode {
    // Nobody is left to be told that nobody listens.
    let _ = said.print();
    ExitCode::from(if said.use_stderr() { Status::FAILED.0 } else { Status::DONE.0 })
}

fn start(cli: Cli, out: &Output) -> anyhow::Result<Status> {
    let is_daemon = matches!(cli.command, Command::Join(_) | Command::Daemon(_));
    if !is_daemon && out.verbose > 0 {
        let filter = if out.verbose > 1 { "debug" } else { "info" };
        daemon_log::to_stderr(filter, out.colour_talk())?;
    }
    let runtime = runtime(is_daemon)?;
    let result = runtime.block_on(Box::pin(until_interrupted(cli, out)));
    // What still reads a disk somewhere holds nobody up.
    runtime.shutdown_background();
    result
}

fn runtime(is_daemon: bool) -> anyhow::Result<Runtime> {
    let mut builder = if is_daemon {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(cores.clamp(2, DAEMON_THREADS_MAX));
        builder
    } else {
        Builder::new_current_thread()
    };
    builder.enable_all().build().context("no runtime")
}

/// Ends a command on Ctrl-C, tidily: what it has made for itself goes with it.
async fn until_interrupted(cli: Cli, out: &Output) -> anyhow::Result<Status> {
    let minds_signals = matches!(
        cli.command,
        Command::Join(_)
            | Command::Daemon(_)
            | Command::Run(_)
            | Command::Log(_)
            | Command::Cp(_)
            | Command::Demo(_)
    );
    if minds_signals {
        return dispatch(cli, out).await;
    }
    let mut interrupts = Interrupts::new()?;
    tokio::select! {
        result = dispatch(cli, out) => result,
        status = interrupts.next() => Ok(status),
    }
}

async fn dispatch(Cli { globals, command }: Cli, out: &Output) -> anyhow::Result<Status> {
    let globals = &globals;
    match command {
        Command::Join(args) => join::run(globals, out, args).await,
        Command::Leave(args) => leave::run(globals, out, args).await,
        Command::Invite(args) => invite::run(globals, out, args).await,
        Command::Run(args) => run::run(globals, out, args).await,
        Command::Log(args) => log::run(globals, out, args).await,
        Command::Status(args) => status::run(globals, out, args).await,
        Command::Show(args) => show::run(globals, out, args).await,
        Command::Why(args) => why::run(globals, out, args).await,
        Command::Job(args) => job::run(globals, out, args).await,
        Command::Stop(args) => stop::run(globals, out, args).await,
        Command::Rm(args) => rm::run(globals, out, args).await,
        Command::Ls(args) => ls::run(globals, out, args).await,
        Command::Cp(args) => cp::run(globals, out, args).await,
        Command::Download(args) => download::run(globals, out, args).await,
        Command::Demo(args) => demo::run(out, args).await,
        Command::Doctor(args) => doctor::run(globals, out, args).await,
        Command::Completion(args) => completion::run(out, args),
        Command::Daemon(args) => daemon::run(globals, out, args).await,
    }
}

/// Ctrl-C and a friendly kill.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("no signal handler");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The status of a command that is ended by the next one.
    pub(crate) async fn next(&mut self) -> Status {
        tokio::select! {
            _ = self.interrupt.recv() => Status::INTERRUPTED,
            _ = self.terminate.recv() => Status::TERMINATED,
        }
    }
}
