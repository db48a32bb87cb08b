//! How fast p2pit is on this machine, as Markdown tables.
//!
//! Three daemons and a client node on loopback, anew for each part. Measured with the
//! release build:
//!
//! ```text
//! cargo build --release --bin p2pit
//! cargo run --release -p p2pit-tests --bin p2pit-bench -- [PART ...] [--runs N]
//! ```
//!
//! The homes are in `TMPDIR`, and what that is on decides much: every step that others
//! rely on is on disk before it is told.

mod api;
mod figures;
mod idle;
mod latency;
mod load;
mod ready;
mod submitter;

use std::env;

use anyhow::{Context as _, Result, bail};

/// Warm jobs of each kind, where a part runs them one after the other.
const RUNS: usize = 50;

/// One table or two.
struct Part {
    name: &'static str,
    run: fn(&Options) -> Result<()>,
}

const PARTS: &[Part] = &[
    Part { name: "latency", run: latency::run },
    Part { name: "load", run: load::run },
    Part { name: "ready", run: ready::run },
    Part { name: "idle", run: idle::run },
];

/// What the command line says of all parts.
struct Options {
    runs: usize,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
fn main() -> Result<()> {
    let (parts, options) = parse(env::args().skip(1))?;
    if cfg!(debug_assertions) {
        eprintln!("a debug build, and so is the p2pit beside it: the figures say little");
    }
    for part in parts {
        eprintln!("{}:", part.name);
        (part.run)(&options).with_context(|| format!("{} was not measured", part.name))?;
        println!();
    }
    println!("{}", figures::machine());
    Ok(())
}

/// The parts named, in the order of [`PARTS`]; all where none is.
fn parse(args: impl Iterator<Item = String>) -> Result<(Vec<&'static Part>, Options)> {
    let names = PARTS.iter().map(|part| part.name).collect::<Vec<_>>().join(", ");
    let usage = || format!("usage: p2pit-bench [PART ...] [--runs N]; parts: {names}");
    let mut options = Options { runs: RUNS };
    let mut wanted = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if arg == "--runs" {
            let runs = args.next().and_then(|text| text.parse().ok()).filter(|runs| *runs > 0);
            options.runs = runs.with_context(usage)?;
        } else if PARTS.iter().any(|part| part.name == arg) {
            wanted.push(arg);
        } else {
            bail!("no part {arg:?}; {}", usage());
        }
    }
    let is_wanted = |part: &&Part| wanted.is_empty() || wanted.iter().any(|it| *it == part.name);
    Ok((PARTS.iter().filter(is_wanted).collect(), options))
}
