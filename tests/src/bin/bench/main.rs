//! How fast p2pit is on this machine, and how fast others are in the same minutes.
//!
//! Real daemons and a client node on loopback, anew for each part. Both packages are built
//! together, or what they have in common is built twice:
//!
//! ```text
//! cargo build --release -p p2pit-cli -p p2pit-tests
//! target/release/p2pit-bench [PART ...] [--runs N] [--quick]
//! ```
//!
//! Homes and files are in `/dev/shm` unless `TMPDIR` says otherwise, and what that is on
//! decides much: every step that others rely on is on disk before it is told. What p2pit is
//! compared with is used where it is installed; Slurm only by root, as it needs namespaces.

mod api;
mod beside_slurm;
mod data;
mod figures;
mod idle;
mod journal;
mod keepers;
mod latency;
mod load;
mod quic;
mod ready;
mod rsync;
mod slurm;
mod start;
mod submitter;
mod table;
mod transfer;
mod turns;
mod world;

use std::env;

use anyhow::{Context as _, Result, bail};

use table::Row;

/// Warm jobs of each kind, where a part runs them one after the other.
const RUNS: usize = 50;

/// What is measured together.
struct Part {
    name: &'static str,
    /// Gives lines of the table of comparisons; prints what else it measures.
    run: fn(&Options) -> Result<Vec<Row>>,
}

const PARTS: &[Part] = &[
    Part { name: "latency", run: |options| latency::run(options).map(|()| Vec::new()) },
    Part { name: "load", run: |options| load::run(options).map(|()| Vec::new()) },
    Part { name: "keepers", run: keepers::run },
    Part { name: "ready", run: |options| ready::run(options).map(|()| Vec::new()) },
    Part { name: "idle", run: |options| idle::run(options).map(|()| Vec::new()) },
    Part { name: "journal", run: |options| journal::run(options).map(|()| Vec::new()) },
    Part { name: "start", run: start::run },
    Part { name: "slurm", run: beside_slurm::run },
    Part { name: "transfer", run: transfer::run },
];

/// What the command line says of all parts.
struct Options {
    runs: usize,
    /// Where whatever is compared takes turns; by default, each part has its own number.
    turns: Option<usize>,
    /// Within two minutes, for the parts that can.
    quick: bool,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    if let Some(result) = quic::run_as_told(&words) {
        return result;
    }
    let (parts, options) = parse(words.into_iter())?;
    world::enter()?;
    if cfg!(debug_assertions) {
        eprintln!("a debug build, and so is the p2pit beside it: the figures say little");
    }
    let mut rows = Vec::new();
    for part in parts {
        eprintln!("{} …", part.name);
        let measured = (part.run)(&options);
        rows.extend(measured.with_context(|| format!("{} was not measured", part.name))?);
    }
    if !rows.is_empty() {
        println!("\n{}\n", table::table(&rows));
    }
    println!("{}; {}", figures::machine(), world::describe());
    Ok(())
}

/// The parts named, in the order of [`PARTS`]; all where none is.
fn parse(args: impl Iterator<Item = String>) -> Result<(Vec<&'static Part>, Options)> {
    let names = PARTS.iter().map(|part| part.name).collect::<Vec<_>>().join(", ");
    let usage = || format!("usage: p2pit-bench [PART ...] [--runs N] [--quick]; parts: {names}");
    let mut options = Options { runs: RUNS, turns: None, quick: false };
    let mut wanted = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if arg == "--runs" {
            let runs = args.next().and_then(|text| text.parse().ok()).filter(|runs| *runs > 0);
            options.runs = runs.with_context(usage)?;
            options.turns = runs;
        } else if arg == "--quick" {
            options.quick = true;
        } else if PARTS.iter().any(|part| part.name == arg) {
            wanted.push(arg);
        } else {
            bail!("no part {arg:?}; {}", usage());
        }
    }
    let is_wanted = |part: &&Part| wanted.is_empty() || wanted.iter().any(|it| *it == part.name);
    Ok((PARTS.iter().filter(is_wanted).collect(), options))
}
