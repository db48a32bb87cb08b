//! `netsim run` and `netsim search`. Exit codes: 0 fine, 2 bad arguments, 3 a broken
//! rule, 4 lack of progress, 101 a crash.

use std::{
    fs::File,
    io::{BufWriter, Write},
    ops::Range,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use p2pit_netsim::{Options, run, run::Ending, search};
use p2pit_protocol::sabotage::Rule;

/// How many lines about the job concerned a failing run shows.
const LINES_SHOWN: usize = 60;

#[derive(Debug, Parser)]
#[command(name = "netsim", about = "Runs p2pit's peers in a simulated world")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one seed.
    Run {
        /// The seed.
        #[arg(long)]
        seed: u64,
        #[command(flatten)]
        size: Size,
        /// Write every event to this file, as text.
        #[arg(long)]
        trace: Option<PathBuf>,
    },
    /// Run many seeds.
    Search {
        /// From A on, before B.
        #[arg(long, value_name = "A..B", value_parser = parse_range)]
        seeds: Range<u64>,
        /// Seeds at a time.
        #[arg(long, default_value_t = 1)]
        threads: usize,
        #[command(flatten)]
        size: Size,
    },
}

#[derive(Debug, Clone, Args)]
struct Size {
    /// Nodes that offer GPUs.
    #[arg(long)]
    nodes: Option<usize>,
    /// Nodes that only submit.
    #[arg(long)]
    clients: Option<usize>,
    /// Jobs.
    #[arg(long)]
    jobs: Option<usize>,
    /// Let nothing go wrong.
    #[arg(long, conflicts_with = "stress")]
    calm: bool,
    /// A small pool in which something goes wrong all the time.
    #[arg(long)]
    stress: bool,
    /// Leave a rule out, to see its checker notice.
    #[arg(long, value_parser = parse_rule)]
    without: Option<Rule>,
}

impl Size {
    fn options(&self, seed: u64) -> Options {
        let mut options = if self.stress { Options::stress(seed) } else { Options::draw(seed) };
        if self.calm {
            options = options.without_faults();
        }
        options.nodes = self.nodes.unwrap_or(options.nodes).max(1);
        options.clients = self.clients.unwrap_or(options.clients);
        options.jobs = self.jobs.unwrap_or(options.jobs);
        options.removed_rule = self.without;
        options
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match Cli::parse().command {
        Command::Run { seed, size, trace } => {
            let code = run_one(&size.options(seed), trace, &mut out)?;
            Ok(ExitCode::from(code))
        }
        Command::Search { seeds, threads, size } => {
            drop(out);
            let code = search_many(seeds, threads, &size)?;
            Ok(ExitCode::from(code))
        }
    }
}

fn run_one(options: &Options, trace: Option<PathBuf>, out: &mut impl Write) -> anyhow::Result<u8> {
    write!(out, "{options}")?;
    out.flush()?;
    let report = run(options.clone(), trace.is_some())?;
    if let Some(path) = trace {
        let named = || format!("trace file {}", path.display());
        let mut file = BufWriter::new(File::create(&path).with_context(named)?);
        report.world.trace.write_to(&mut file).with_context(named)?;
        file.flush().with_context(named)?;
    }
    writeln!(out, "{}", report.counts)?;
    writeln!(out, "{} after {} s", report.ending, report.at_ms / 1_000)?;
    if report.ending != Ending::Fine {
        show_lines(options, out)?;
    }
    writeln!(out, "trace {}", report.hash)?;
    Ok(report.exit_code())
}

/// Run it again with every line kept, and show the last about the job concerned.
fn show_lines(options: &Options, out: &mut impl Write) -> anyhow::Result<()> {
    let again = run(options.clone(), true)?;
    for line in again.world.trace.last_lines(again.job(), LINES_SHOWN) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn search_many(seeds: Range<u64>, threads: usize, size: &Size) -> anyhow::Result<u8> {
    let found = search::search(
        seeds,
        threads,
        |seed| size.options(seed),
        |seed, failure| {
            let mut out = std::io::stdout().lock();
            // A closed pipe ends the printing, not the search.
            let _ = match failure {
                Some(failure) => writeln!(out, "seed {seed}: {}", failure.text),
                None => writeln!(out, "seed {seed}: fine"),
            };
        },
    );
    let mut out = std::io::stdout().lock();
    for failure in &found.failures {
        let options = size.options(failure.seed);
        writeln!(out, "\nseed {} failed: {}\n{options}", failure.seed, failure.text)?;
        if failure.exit_code != 101 {
            show_lines(&options, &mut out)?;
        }
    }
    writeln!(out, "{}", found.counts)?;
    if let Some(lacks) = found.lacks() {
        writeln!(out, "the search proves nothing: {lacks}")?;
    }
    writeln!(out, "{} seeds, {} failed", found.seeds, found.failures.len())?;
    Ok(found.exit_code())
}

fn parse_range(text: &str) -> anyhow::Result<Range<u64>> {
    let (from, to) = text.split_once("..").context("expected two numbers as in `0..100`")?;
    let range = from.trim().parse()?..to.trim().parse()?;
    if range.is_empty() {
        bail!("no seed lies in `{text}`");
    }
    Ok(range)
}

fn parse_rule(text: &str) -> anyhow::Result<Rule> {
    let rule = Rule::ALL.into_iter().find(|rule| format!("{rule:?}").eq_ignore_ascii_case(text));
    rule.with_context(|| format!("no rule is called `{text}`; there are {:?}", Rule::ALL))
}
