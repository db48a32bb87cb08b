//! One large file out of the pool, and a tree of many small ones into it, beside what
//! else carries files.
//!
//! All directories are on the same file system. What was carried is compared with its
//! original, and it must have gone over the loopback device: what a daemon remembered of
//! an earlier turn would be no transfer.

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use p2pit_tests::{Node, Pool};
use serde_json::Value;

use crate::{
    Options,
    data::{MIB, Tree, ensure_equal, ensure_holds, remove},
    quic,
    rsync::{Rsync, Way},
    table::{Goal, Row, Unit, timed},
    turns::{Runner, in_turns},
    world,
};

const TURNS: usize = 5;
/// Caches fill, connections are made.
const WARM_UPS: usize = 1;

const LARGE_MIB: u64 = 1024;
/// Of what the least quinn program takes, where p2pit is to have 60 % of its rate.
const LARGE_QUIC_GOAL: f64 = 1.0 / 0.6;
const LARGE_SSH_GOAL: f64 = 1.0;
const NEW_TREE_GOAL: f64 = 2.0;
const CHANGED_TREE_GOAL_S: f64 = 0.4;

/// Files that change: 1 %.
const CHANGED_FILES: usize = Tree::FILES / 100;
/// Blobs besides the files: what says which files there are.
const MANIFESTS_MAX: u64 = 4;
/// On the wire besides the content: packets, acknowledgements, manifests, and what members
/// tell each other meanwhile.
const OVERHEAD_BYTES_MAX: u64 = 4 * MIB;

const DAEMON: &str = "rsync, its daemon";
const SSH: &str = "rsync over ssh";

pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let turns = options.turns.unwrap_or(TURNS);
    let scratch = tempfile::Builder::new().prefix("p2pit-bench-").tempdir()?;
    // As other programs see it.
    let dir = scratch.path().canonicalize()?;
    let rsync = Rsync::start(&dir)?;
    let mut rows = large_file(&dir, &rsync, turns)?;
    rows.extend(many_files(&dir, &rsync, turns)?);
    Ok(rows)
}

/// An artifact of a job that is over, from the node that ran it to a file on another.
fn large_file(dir: &Path, rsync: &Rsync, turns: usize) -> Result<Vec<Row>> {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let client = pool.add_client("client");
    let target = dir.join("copies");
    fs::create_dir(&target)?;
    let (original, copy) = (dir.join("large"), target.join("large"));
    let job = write_large_artifact(&client);
    fetch(&client, &job, &original)?;
    let (_, sum) = timed(Command::new("sha256sum").arg(&original))?;
    let sum = sum.split(' ').next().unwrap_or_default();
    ensure!(client.log(&job).contains(sum), "what came is not what the job wrote");

    let rate = |took: Duration| {
        ensure_equal(&original, &copy)?;
        remove(&copy)?;
        Ok(LARGE_MIB as f64 / took.as_secs_f64())
    };
    let by_rsync = |way| rate(rsync.copy(way, &original, &target)?);
    let unit = Unit::MebibytesPerSecond;
    let mut runners = [
        Runner::new("p2pit", unit, || rate(fetch(&client, &job, &copy)?)),
        Runner::new("the least quinn program", unit, || {
            rate(quic::copy(&original, &copy, quic::PACKET_BYTES)?)
        }),
        Runner::new("the same with larger packets, as ours", unit, || {
            rate(quic::copy(&original, &copy, quic::LARGE_PACKET_BYTES)?)
        }),
        Runner::new(SSH, unit, || by_rsync(Way::Ssh)).if_there(rsync.has(Way::Ssh)),
        Runner::new(DAEMON, unit, || by_rsync(Way::Daemon)).if_there(rsync.has(Way::Daemon)),
        Runner::new("cp", unit, || rate(timed(Command::new("cp").args([&original, &copy]))?.0)),
    ];
    in_turns(&mut runners, WARM_UPS, turns)?;
    let mut rows = Row::all("an artifact of 1 GiB, file to file", &runners);
    rows[0].goal = Some(Goal::Ratio(LARGE_QUIC_GOAL));
    rows[2].goal = Some(Goal::Ratio(LARGE_SSH_GOAL));
    drop(runners);
    remove(&original)?;
    Ok(rows)
}

fn write_large_artifact(client: &Node) -> String {
    let commands = format!(
        "head -c {} /dev/urandom > \"$JOB_DIR/artifacts/large\" && \
         sha256sum < \"$JOB_DIR/artifacts/large\"",
        LARGE_MIB * MIB
    );
    let job = client.submit(&["a large file", "[]", "-d", &commands]);
    client.wait_for_outcome(&job, "succeeded");
    job
}

/// The time of a whole `p2pit cp`.
fn fetch(client: &Node, job: &str, to: &Path) -> Result<Duration> {
    let before = world::loopback_bytes()?;
    let mut command = client.command();
    let (took, _) = timed(command.args(["cp", job, "artifacts/large"]).arg(to))?;
    let travelled = world::loopback_bytes()? - before;
    ensure!(travelled >= LARGE_MIB * MIB, "only {travelled} bytes travelled");
    Ok(took)
}

/// A directory that nobody has anything of, and the same with a few files changed.
fn many_files(dir: &Path, rsync: &Rsync, turns: usize) -> Result<Vec<Row>> {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let tree = Tree::new(dir.join("tree"))?;
    let client = pool.add_client("client").working_in(tree.dir());
    let [by_daemon, by_ssh, by_cp] = ["by-daemon", "by-ssh", "by-cp"].map(|name| dir.join(name));
    let by_rsync = |way, to: &PathBuf| {
        let took = rsync.copy(way, tree.dir(), to)?;
        ensure_holds(&to.join("tree"), &tree)?;
        Ok(took.as_secs_f64())
    };
    let submit_all = || {
        let (took, sent) = submit(&client)?;
        ensure!(sent.bytes >= tree.bytes(), "only {sent:?} travelled");
        Ok(took.as_secs_f64())
    };
    // What changed in this turn.
    let changed_bytes = Cell::new(0);
    let submit_changed = || {
        let (took, sent) = submit(&client)?;
        let bytes_max = changed_bytes.get() + OVERHEAD_BYTES_MAX;
        let is_all = sent.blobs <= CHANGED_FILES as u64 + MANIFESTS_MAX
            && sent.bytes.max(sent.wire_bytes) <= bytes_max;
        ensure!(is_all, "{sent:?} travelled where {CHANGED_FILES} files have changed");
        Ok(took.as_secs_f64())
    };
    let unit = Unit::Seconds;
    let mut new = [
        Runner::new("p2pit", unit, submit_all),
        Runner::new(DAEMON, unit, || by_rsync(Way::Daemon, &by_daemon))
            .if_there(rsync.has(Way::Daemon)),
        Runner::new(SSH, unit, || by_rsync(Way::Ssh, &by_ssh)).if_there(rsync.has(Way::Ssh)),
        Runner::new("cp -r", unit, || {
            let took = timed(Command::new("cp").arg("-r").arg(tree.dir()).arg(&by_cp))?.0;
            remove(&by_cp)?;
            Ok(took.as_secs_f64())
        }),
    ];
    let mut changed = [
        Runner::new("p2pit", unit, submit_changed),
        Runner::new(DAEMON, unit, || by_rsync(Way::Daemon, &by_daemon))
            .if_there(rsync.has(Way::Daemon)),
        Runner::new(SSH, unit, || by_rsync(Way::Ssh, &by_ssh)).if_there(rsync.has(Way::Ssh)),
    ];
    for turn in 0..WARM_UPS + turns {
        tree.fill(turn as u64)?;
        new.iter_mut().try_for_each(|runner| runner.turn(turn >= WARM_UPS))?;
        changed_bytes.set(tree.change(CHANGED_FILES, turn as u64)?);
        changed.iter_mut().try_for_each(|runner| runner.turn(turn >= WARM_UPS))?;
        remove(&by_daemon)?;
        remove(&by_ssh)?;
    }
    let what = "10,000 files, 191 MiB, until submitted";
    let mut rows = Row::all(what, &new);
    rows[0].goal = Some(Goal::Ratio(NEW_TREE_GOAL));
    let mut again = Row::all("the same with 1 % of the files changed", &changed);
    again[0].goal = Some(Goal::Figure(CHANGED_TREE_GOAL_S));
    rows.extend(again);
    Ok(rows)
}

/// What travelled for a submission.
#[derive(Debug)]
struct Sent {
    blobs: u64,
    bytes: u64,
    /// All that went over the loopback device meanwhile.
    wire_bytes: u64,
}

/// The time of a whole `p2pit run`, which ends when the job is submitted. Returns when it
/// is over, and every file was there.
fn submit(client: &Node) -> Result<(Duration, Sent)> {
    let count = format!("test $(find . -type f | wc -l) = {}", Tree::FILES);
    let before = world::loopback_bytes()?;
    let mut command = client.command();
    let (took, printed) = timed(command.args(["run", "tree", "[]", "-d", &count, "--json"]))?;
    let wire_bytes = world::loopback_bytes()? - before;
    let submission: Value = serde_json::from_str(&printed)?;
    let number = |name: &str| {
        submission[name].as_u64().with_context(|| format!("no number {name} in {printed}"))
    };
    let sent = Sent { blobs: number("sent_blobs")?, bytes: number("sent_bytes")?, wire_bytes };
    let job = submission["id"].as_str().with_context(|| format!("no id in {printed}"))?;
    client.wait_for_outcome(job, "succeeded");
    Ok((took, sent))
}
