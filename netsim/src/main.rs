//! `netsim run` and `netsim search`. Exit codes: 0 fine, 2 bad arguments, 3 a broken
//! rule, 4 lack of progress, 101 a crash.

use std::{
    fs::File,
    io::{BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, Subcommand};
use p2pit_netsim::{
    Options, Report, run,
    run::Ending,
    scenario::{self, Variant},
    search::{self, Speed, cpu_time},
};
use p2pit_protocol::sabotage::Rule;

/// A run is made of small allocations: they take a fifth of its time with the C library's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How many lines about the job concerned a failing run shows.
const LINES_SHOWN: usize = 60;

/// The exit code where what was asked for cannot be done.
const BAD_ARGUMENTS: u8 = 2;

#[derive(Debug, Parser)]
#[command(name = "netsim", about = "Runs p2pit's peers in a simulated world")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one seed, or a scenario file.
    Run(Run),
    /// Run many seeds.
    Search {
        /// From A on, before B.
        #[arg(long, value_name = "A..B", value_parser = parse_range)]
        seeds: Range<u64>,
        /// Seeds at a time.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        jobs: u16,
        #[command(flatten)]
        size: Size,
        /// Leave a rule out, to see its checker notice.
        #[arg(long, value_parser = parse_rule)]
        without: Option<Rule>,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// A story to play; `netsim/scenarios/README.md` says how one is written.
    #[arg(value_name = "FILE.yaml")]
    scenario: Option<PathBuf>,
    /// The seed; 1 for a scenario that is given without.
    #[arg(long, required_unless_present = "scenario")]
    seed: Option<u64>,
    /// Of a scenario with a sweep, play only those with this value.
    #[arg(long, value_name = "NAME=VALUE", requires = "scenario", value_parser = parse_choice)]
    with: Vec<(String, String)>,
    #[command(flatten)]
    size: Size,
    /// Leave a rule out, to see its checker notice.
    #[arg(long, value_parser = parse_rule)]
    without: Option<Rule>,
    /// Write every event to this file, as text.
    #[arg(long)]
    trace: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Args)]
struct Size {
    /// Nodes that offer GPUs.
    #[arg(long)]
    nodes: Option<usize>,
    /// Nodes that only submit.
    #[arg(long)]
    clients: Option<usize>,
    /// How much there is to do: jobs that are submitted.
    #[arg(long)]
    tasks: Option<usize>,
    /// Let nothing go wrong.
    #[arg(long, conflicts_with = "stress")]
    calm: bool,
    /// A small pool in which something goes wrong all the time.
    #[arg(long)]
    stress: bool,
    /// A long run of few jobs, of 20 node-hours or more.
    #[arg(long, conflicts_with = "stress")]
    long: bool,
    /// Leave out no group of faults: what seeds meant before groups could be absent.
    #[arg(long, conflicts_with = "calm")]
    every_fault: bool,
}

impl Size {
    fn options(&self, seed: u64, without: Option<Rule>) -> Options {
        let mut options = match (self.stress, self.long, self.every_fault) {
            (true, _, false) => Options::stress(seed),
            (true, _, true) => Options::stress_all(seed),
            (_, true, false) => Options::long(seed),
            (_, true, true) => Options::long_all(seed),
            (_, _, false) => Options::draw(seed),
            (_, _, true) => Options::draw_all(seed),
        };
        if self.calm {
            options = options.without_faults();
        }
        options.nodes = self.nodes.unwrap_or(options.nodes).max(1);
        options.clients = self.clients.unwrap_or(options.clients);
        options.jobs = self.tasks.unwrap_or(options.jobs);
        options.removed_rule = without;
        options
    }
}

/// Something that can be run, again and again alike.
#[derive(Debug)]
struct Subject {
    options: Options,
    /// A story, unless everything is drawn.
    story: Option<Variant>,
}

impl Subject {
    fn run(&self, keep_lines: bool) -> anyhow::Result<Report> {
        match &self.story {
            Some(story) => scenario::play(story, self.options.clone(), keep_lines),
            None => run(self.options.clone(), keep_lines),
        }
    }

    /// Run it again with every line kept, and show the last about the job concerned.
    fn show_lines(&self, out: &mut impl Write) -> anyhow::Result<()> {
        let again = self.run(true)?;
        show_last(&again, out)
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(run) => run_once(run),
        Command::Search { seeds, jobs, size, without } => {
            let options = |seed| size.options(seed, without);
            search_many(seeds, usize::from(jobs), options)
        }
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(reason) => {
            // Nowhere is left to say that this failed, too.
            let _ = writeln!(std::io::stderr(), "netsim: {reason:#}");
            ExitCode::from(BAD_ARGUMENTS)
        }
    }
}

fn run_once(run: Run) -> anyhow::Result<u8> {
    let subjects = match &run.scenario {
        None => {
            let options = run.size.options(run.seed.unwrap_or_default(), run.without);
            vec![Subject { options, story: None }]
        }
        Some(path) => stories(path, &run)?,
    };
    let mut out = std::io::stdout().lock();
    if let Some(first) = subjects.first() {
        write!(out, "{}", first.options)?;
        out.flush()?;
    }
    let before = cpu_time();
    let mut file = run.trace.as_deref().map(TraceFile::create).transpose()?;
    let (mut worst, mut node_ms, mut hashes) = (0, 0, Vec::new());
    for subject in &subjects {
        let report = subject.run(file.is_some())?;
        let label = subject.story.as_ref().map(Variant::label).filter(|label| !label.is_empty());
        if let Some(label) = &label {
            writeln!(out, "\n{label}")?;
        }
        if let Some(file) = &mut file {
            file.add(&report, label.as_deref())?;
        }
        writeln!(out, "{}", report.counts)?;
        writeln!(out, "{} after {} s", report.ending, report.at_ms / 1_000)?;
        out.flush()?;
        match (&report.ending, file.is_some()) {
            (Ending::Fine, _) => {}
            (_, true) => show_last(&report, &mut out)?,
            (_, false) => subject.show_lines(&mut out)?,
        }
        worst = report.exit_code().max(worst);
        node_ms += report.node_ms();
        hashes.push(report.hash);
    }
    if let Some(file) = file {
        file.finish()?;
    }
    writeln!(out, "{}", Speed { node_ms, cpu: cpu_time().saturating_sub(before) })?;
    writeln!(out, "trace {}", hash_of_all(&hashes))?;
    Ok(worst)
}

/// The ways to play a file that are asked for.
fn stories(path: &Path, run: &Run) -> anyhow::Result<Vec<Subject>> {
    ensure!(
        run.size == Size::default(),
        "a scenario says itself what its pool is: leave out --nodes, --clients, --tasks, --calm, \
         --stress, --long and --every-fault"
    );
    let story = scenario::load(path)?;
    let asked_for = |variant: &Variant| {
        run.with.iter().all(|(name, value)| variant.with.get(name) == Some(value))
    };
    let variants: Vec<Variant> = story.variants.into_iter().filter(asked_for).collect();
    ensure!(!variants.is_empty(), "{}: its sweep has no such value", path.display());
    let subject = |story: Variant| {
        let options = Options { removed_rule: run.without, ..story.options(run.seed.unwrap_or(1)) };
        Subject { options, story: Some(story) }
    };
    Ok(variants.into_iter().map(subject).collect())
}

/// One trace's hash, or that of all of them in their order.
fn hash_of_all(hashes: &[String]) -> String {
    match hashes {
        [only] => only.clone(),
        all => blake3::hash(all.concat().as_bytes()).to_hex().to_string(),
    }
}

fn show_last(report: &Report, out: &mut impl Write) -> anyhow::Result<()> {
    for line in report.world.trace.last_lines(report.job(), LINES_SHOWN) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Where `--trace` writes.
struct TraceFile<'p> {
    path: &'p Path,
    out: BufWriter<File>,
}

impl<'p> TraceFile<'p> {
    fn create(path: &'p Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| named(path))?;
        Ok(Self { path, out: BufWriter::new(file) })
    }

    fn add(&mut self, report: &Report, label: Option<&str>) -> anyhow::Result<()> {
        if let Some(label) = label {
            writeln!(self.out, "{label}").with_context(|| named(self.path))?;
        }
        report.world.trace.write_to(&mut self.out).with_context(|| named(self.path))
    }

    fn finish(mut self) -> anyhow::Result<()> {
        self.out.flush().with_context(|| named(self.path))
    }
}

fn named(path: &Path) -> String {
    format!("trace file {}", path.display())
}

fn search_many(
    seeds: Range<u64>,
    jobs: usize,
    options: impl Fn(u64) -> Options + Sync,
) -> anyhow::Result<u8> {
    let found = search::search(seeds, jobs, &options, |seed, failure| {
        let mut out = std::io::stdout().lock();
        // A closed pipe ends the printing, not the search.
        let _ = match failure {
            Some(failure) => writeln!(out, "seed {seed}: {}", failure.text),
            None => writeln!(out, "seed {seed}: fine"),
        };
    });
    let mut out = std::io::stdout().lock();
    for failure in &found.failures {
        let subject = Subject { options: options(failure.seed), story: None };
        writeln!(out, "\nseed {} failed: {}\n{}", failure.seed, failure.text, subject.options)?;
        if let Err(reason) = subject.show_lines(&mut out) {
            writeln!(out, "its last events cannot be shown: {reason:#}")?;
        }
    }
    writeln!(out, "{}", found.counts)?;
    writeln!(out, "{}", found.speed)?;
    for lacks in found.lacks() {
        writeln!(out, "the search proves nothing: {lacks} in any run")?;
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

fn parse_choice(text: &str) -> anyhow::Result<(String, String)> {
    let (name, value) = text.split_once('=').context("expected a name and a value as in `a=b`")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn parse_rule(text: &str) -> anyhow::Result<Rule> {
    let rule = Rule::ALL.into_iter().find(|rule| format!("{rule:?}").eq_ignore_ascii_case(text));
    rule.with_context(|| format!("no rule is called `{text}`; there are {:?}", Rule::ALL))
}
