//! `p2pit completion`: what a shell needs to complete command lines.

use clap::{CommandFactory as _, ValueEnum};
use clap_complete::{Shell as Generator, generate};

use crate::{args::Cli, output::Output, status::Status};

/// Print a script that completes `p2pit` command lines in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit completion bash > ~/.local/share/bash-completion/completions/p2pit\n  \
    p2pit completion zsh > ~/.zfunc/_p2pit\n  \
    p2pit completion fish > ~/.config/fish/completions/p2pit.fish")]
pub(crate) struct Args {
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(out: &Output, args: Args) -> anyhow::Result<Status> {
    let generator = match args.shell {
        Shell::Bash => Generator::Bash,
        Shell::Zsh => Generator::Zsh,
        Shell::Fish => Generator::Fish,
    };
    let mut script = Vec::new();
    generate(generator, &mut Cli::command(), "p2pit", &mut script);
    out.data(script)?;
    Ok(Status::DONE)
}
