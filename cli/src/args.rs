//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::{
    completion, cp, daemon, demo, doctor, download, invite, job, join, leave, log, ls, rm, run,
    show, status, stop, why,
};

/// Lab workstations as one pool with nobody in charge: submit jobs from anywhere, run them
/// where there are GPUs.
#[derive(Debug, Parser)]
#[command(
    name = "p2pit",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 the request failed, 2 something broke, 130 ended with \
                  Ctrl-C; where a command waited for a job, the job's own.\n\n\
                  Examples:\n  \
                  p2pit demo                                see it work, on this machine alone\n  \
                  p2pit join                                found a pool\n  \
                  p2pit join pit1…                          join the pool of a ticket\n  \
                  p2pit run \"My task\" 2:[8:gtx1070] -l      run .compute, and follow its log\n  \
                  p2pit status                              what runs and what waits"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Globals {
    /// The node's home [env: P2PIT_HOME] [default: /var/lib/p2pit for root, else
    /// ~/.local/state/p2pit]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) home: Option<PathBuf>,
    /// Your key [env: P2PIT_IDENTITY] [default: inside a home that was named, else
    /// ~/.config/p2pit/identity]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) identity: Option<PathBuf>,
    /// Ids and names only, and no talk
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// When to use colour; `NO_COLOR` is honoured
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t)]
    pub(crate) color: ColorChoice,
    /// Say more on standard error; twice for still more
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    /// On terminals
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Join(join::Args),
    Leave(leave::Args),
    Invite(invite::Args),
    #[command(visible_alias = "put")]
    Run(run::Args),
    Log(log::Args),
    Status(status::Args),
    Show(show::Args),
    Why(why::Args),
    Stop(stop::Args),
    Rm(rm::Args),
    Job(job::Args),
    Ls(ls::Args),
    Cp(cp::Args),
    Download(download::Args),
    Demo(demo::Args),
    Doctor(doctor::Args),
    Completion(completion::Args),
    Daemon(daemon::Args),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["p2pit"], line].concat())
    }

    #[test]
    fn the_command_line_is_in_order() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_may_stand_before_and_behind_the_command() {
        for line in [["--home", "/h", "status"], ["status", "--home", "/h"]] {
            assert_eq!(parse(&line).unwrap().globals.home, Some(PathBuf::from("/h")));
        }
    }

    #[test]
    fn put_is_run() {
        for command in ["run", "put"] {
            let cli = parse(&[command, "My task", "2:[v100]", "-l"]).unwrap();
            assert!(matches!(cli.command, Command::Run(_)));
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let help = command.clone().render_long_help().to_string();
            let example = format!("p2pit {}", command.get_name());
            assert!(help.contains("Example") && help.contains(&example), "{help}");
        }
    }
}
