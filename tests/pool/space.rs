//! Room on the disk: what goes by itself, what never does, and what is said where there is none.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use p2pit_tests::{Node, Pool, SOON, SmallDisk, lines_of, wait_until};

use super::transfers::noise;

const MIB: usize = 1 << 20;
/// Between two sweeps, and for how long a blob is relied on: see `config::env`.
const SWEEP: (&str, &str) = ("P2PIT_TEST_SWEEP_MS", "1500");

#[test]
fn what_is_needed_stays_through_sweeps_and_can_be_submitted_again() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = data_dir(&pool, "data", 3 * MIB);
    let node = &pool.node(1).working_in(&dir);
    tidy_with(node, &["trash: 0s"]);
    let script = "cp data $JOB_DIR/keep/left; head -c 100000 data > $JOB_DIR/artifacts/some";
    let job = node.submit(&["Left", "[v100]", "-d", script]);
    node.wait_for_outcome(&job, "succeeded");
    let live = node.submit(&["Live", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&live, "RUNNING");
    let waiting = node.submit(&["Waiting", "[v100]", "-d", "wc -c < data"]);
    wait_for_sweeps(node, 3);
    node.p2pit(&["cp", &job, "keep/left", "again"]).ended(0);
    assert_eq!(fs::read(dir.join("again")).unwrap(), noise(3 * MIB));
    fs::remove_file(dir.join("again")).unwrap();
    for _ in 0..5 {
        let again = node.submit(&["Again", "[v100]", "-d", "wc -c < data"]);
        node.p2pit(&["stop", &again]).ended(0);
    }
    node.p2pit(&["stop", &live]).ended(0);
    node.wait_for_outcome(&waiting, "succeeded");
    assert_eq!(lines_of(&node.log(&waiting), 0), [(3 * MIB).to_string()]);
    assert_eq!(node.me()["warnings"], serde_json::json!([]));
}

#[test]
fn what_finished_jobs_left_goes_after_its_time_and_that_they_were_stays() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = &pool.node(1).working_in(&data_dir(&pool, "data", 3 * MIB));
    tidy_with(node, &["keep_done: 3s", "trash: 1s"]);
    let job = node.submit(&["Left", "[v100]", "-d", "cp data $JOB_DIR/keep/left"]);
    node.wait_for_outcome(&job, "succeeded");
    wait_until("what the job left is gone", SOON, || {
        let is_gone = |dir: &str| !node.home().join(dir).join(&job).exists();
        let left = allocated(&node.home().join("blobs")) + allocated(&node.home().join("trash"));
        (is_gone("jobs") && left < MIB as u64).then_some(())
    });
    assert_eq!(node.job(&job)["outcome"], "succeeded");
    let ls = node.p2pit(&["ls", &job]);
    assert!(ls.code != 0 && ls.stderr.contains("keep_done"), "{}", ls.stderr);
    // What was counted is what is there.
    wait_until("it is counted", SOON, || {
        let used = node.me()["space"]["used_bytes"].as_u64().unwrap();
        (used < MIB as u64).then_some(())
    });
    let next = node.submit(&["Next", "[v100]", "-d", "wc -c < data"]);
    node.wait_for_outcome(&next, "succeeded");
}

#[test]
fn a_clock_that_was_set_forward_takes_nothing_that_a_finished_job_left() {
    const TWO_DAYS: (&str, &str) = ("P2PIT_TEST_CLOCK_OFFSET_MS", "172800000");
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    tidy_with(node, &["keep_done: 1day"]);
    let job = node.submit(&["Left", "[v100]", "-d", "echo kept > $JOB_DIR/keep/left"]);
    node.wait_for_outcome(&job, "succeeded");
    let left = node.home().join("jobs").join(&job);
    let clock = node.home().join("clock.json");
    wait_until("what the clock is is known to the next daemon", SOON, || {
        clock.exists().then_some(())
    });
    node.shut_down();
    let logged = fs::read_to_string(node.home().join("daemon.log")).unwrap().len();
    node.restart_with(&[TWO_DAYS]);
    wait_until("a round without a sweep is over", SOON, || {
        let log = fs::read_to_string(node.home().join("daemon.log")).unwrap();
        log.get(logged..)?.contains("the clock was set").then_some(())
    });
    assert!(left.is_dir(), "it is not known how old it is");
    node.shut_down();
    // Nothing shows that the clock is wrong: all seems old, until it is right again.
    fs::remove_file(&clock).unwrap();
    node.restart_with(&[TWO_DAYS]);
    wait_until("it is too old", SOON, || (!left.exists()).then_some(()));
    node.shut_down();
    node.restart();
    wait_until("it is back", SOON, || left.is_dir().then_some(()));
    assert!(node.p2pit(&["ls", &job, "keep"]).ok().contains("left"));
}

#[test]
fn a_quota_holds_finished_jobs_inputs_make_room_and_live_ones_never_do() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dirs: Vec<PathBuf> =
        (0..4).map(|n| data_dir(&pool, &format!("data{n}"), (20 + n) * MIB)).collect();
    let node = pool.node(1);
    tidy_with(node, &["storage: 80MiB"]);
    let run = |n: usize, script: &str| {
        let dir = node.working_in(&dirs[n]);
        dir.p2pit(&["run", "Data", "[v100]", "-d", script, "-l"])
    };
    // One after the other they would not fit.
    for n in 0..4 {
        assert_eq!(lines_of(&run(n, "wc -c < data").ok(), 0), [((20 + n) * MIB).to_string()]);
        wait_for_sweeps(node, 2);
    }
    let space = node.me()["space"].clone();
    assert_eq!(space["quota_bytes"], 80 << 20);
    assert!(space["used_bytes"].as_u64().unwrap() <= 80 << 20, "{space:#}");
    // Those of a job that waits stay, whatever comes.
    let live = node.submit(&["Live", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&live, "RUNNING");
    let waiting = node.working_in(&dirs[0]).submit(&["Waits", "[v100]", "-d", "wc -c < data"]);
    let second = node.working_in(&dirs[1]).submit(&["Waits", "[v100]", "-d", "wc -c < data"]);
    let large = data_dir(&pool, "large", 60 * MIB);
    for _ in 0..2 {
        let refused = node.working_in(&large).p2pit(&["run", "Large", "[v100]", "-d", "true"]);
        refused.refused(2, &["No space left on node n1", "80.0 MiB", "`storage`", "p2pit rm"]);
    }
    node.p2pit(&["stop", &live]).ended(0);
    for (job, bytes) in [(&waiting, 20 * MIB), (&second, 21 * MIB)] {
        node.wait_for_outcome(job, "succeeded");
        assert_eq!(lines_of(&node.log(job), 0), [bytes.to_string()]);
    }
}

#[test]
fn a_node_whose_disk_is_full_says_so_and_others_keep_jobs_instead() {
    let mut pool = Pool::empty();
    let Some(disk) = SmallDisk::mount(&pool.path().join("n2"), 128 << 20) else { return };
    for n in 1..=4 {
        pool.add(&format!("n{n}"), &["--gpus", "sim:1xv100", "--cpus", "4"]);
    }
    pool.wait_until_assembled();
    let (first, full) = (pool.node(1).clone(), pool.node(2).clone());
    full.shut_down();
    // Looks often.
    full.p2pit_with(&[SWEEP], &["join", "--detach"]).ended(0);
    disk.fill(4 << 20);
    wait_until("the others hear that n2 is full", SOON, || {
        (first.nodes()["n2"]["full"] == true).then_some(())
    });
    let status = first.p2pit(&["status"]).ok();
    assert!(status.contains("No room for more content on n2"), "{status}");
    let nodes = first.p2pit(&["show", "nodes"]).ok();
    assert!(nodes.contains("online (disk full)"), "{nodes}");
    let node = first.json(&["show", "node:n2"]);
    assert_eq!(node["space"]["full"], true);
    for _ in 0..6 {
        let job = first.submit(&["Elsewhere", "[v100]", "-d", "true"]);
        let keepers = first.job(&job)["keepers"].clone();
        assert!(!keepers.as_array().unwrap().contains(&"n2".into()), "{keepers}");
    }
    disk.free();
    wait_until("the others hear that n2 has room", SOON, || {
        (first.nodes()["n2"]["full"] == false).then_some(())
    });
}

#[test]
fn a_list_of_files_that_went_bad_stops_sweeps_and_its_owner_hears_of_it() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = &pool.node(1).working_in(&data_dir(&pool, "data", 3 * MIB));
    tidy_with(node, &["trash: 0s", "keep_done: 4s"]);
    let job = node.submit(&["Left", "[v100]", "-d", "cp data $JOB_DIR/keep/left"]);
    node.wait_for_outcome(&job, "succeeded");
    let keep = node.job(&job)["ranks"][0]["keep"].as_str().unwrap().to_owned();
    let manifest = node.home().join("blobs").join(&keep[..2]).join(&keep);
    fs::write(&manifest, "bad").unwrap();
    let warnings = wait_until("the owner is warned", SOON, || {
        let warnings = node.me()["warnings"].to_string();
        warnings.contains(&keep).then_some(warnings)
    });
    assert!(warnings.contains("is damaged") && warnings.contains(&job[..8]), "{warnings}");
    // Once nothing needs the list any more, sweeps go on.
    wait_until("the rest goes with its job", SOON, || {
        let left = allocated(&node.home().join("blobs"));
        (left < MIB as u64 && node.me()["warnings"] == serde_json::json!([])).then_some(())
    });
}

#[test]
fn what_is_removed_is_gone_from_every_node_until_that_is_taken_back() {
    let mut pool = Pool::of(&["sim:1xv100", "sim:1xv100", "sim:1xv100", "sim:1xgtx1070"]);
    let node = pool.node(1).clone();
    // One that runs where it is not kept.
    let job = (0..20).find_map(|_| {
        let script = "echo said; echo data > $JOB_DIR/keep/left";
        let job = node.submit(&["Left", "[gtx1070]", "-d", script]);
        let done = node.wait_for_outcome(&job, "succeeded");
        let keepers = done["keepers"].as_array().unwrap().clone();
        (!keepers.contains(&"n4".into())).then_some(job)
    });
    let job = &job.expect("three of four nodes keep a job");
    let short = &job[..8];
    let homes: Vec<PathBuf> = pool.nodes().iter().map(|node| node.home().to_owned()).collect();
    let places = |job: &str| -> Vec<PathBuf> {
        let dirs =
            homes.iter().flat_map(|home| ["jobs", "copies"].map(|dir| home.join(dir).join(job)));
        dirs.filter(|dir| dir.exists()).collect()
    };
    let before = places(job);
    assert!(before.len() > 1, "{before:?}");

    let live = node.submit(&["Live", "[v100]", "-d", "sleep 600"]);
    node.p2pit(&["rm", "--yes", &live]).refused(1, &["is not over", "p2pit stop"]);
    node.p2pit(&["stop", &live]).ended(0);
    node.p2pit(&["rm", job]).refused(1, &["nothing was removed", "--yes"]);
    node.p2pit(&["rm", "--undo", job]).ended(0);
    assert_eq!(places(job), before);

    node.p2pit(&["rm", "--yes", job]).ended(0);
    for read in [&["ls", job][..], &["log", job], &["cp", job, "keep/left", "x"]] {
        node.p2pit(read).refused(1, &["was removed by anna", "p2pit rm", "--undo"]);
    }
    let shown = pool.node(3).job(job);
    assert_eq!((&shown["removed"]["by"], &shown["outcome"]), (&"anna".into(), &"succeeded".into()));
    wait_until("nothing of it is in its place", SOON, || places(job).is_empty().then_some(()));

    pool.node(2).p2pit(&["rm", "--undo", short]).ended(0);
    wait_until("all of it is back", SOON, || (places(job) == before).then_some(()));
    assert_eq!(lines_of(&node.log(job), 0), ["said"]);
    assert!(node.p2pit(&["ls", job, "keep"]).ok().contains("keep/left"));
    assert!(node.job(job)["removed"].is_null());

    let other = pool.add_stranger("boris", &["--gpus", "none"]);
    other.p2pit(&["rm", "--yes", short]).refused(1, &["owner"]);
    assert_eq!(places(job), before);
}

/// Starts the node's daemon again with these settings, and with sweeps every moment.
fn tidy_with(node: &Node, settings: &[&str]) {
    node.shut_down();
    let path = node.home().join("config.yaml");
    let config = fs::read_to_string(&path).expect("a home has a configuration");
    let lines: Vec<&str> = config.lines().chain(settings.iter().copied()).collect();
    fs::write(&path, lines.join("\n") + "\n").expect("it can be written");
    node.p2pit_with(&[SWEEP], &["join", "--detach"]).ended(0);
}

/// Returns once so many sweeps more were made.
fn wait_for_sweeps(node: &Node, count: usize) {
    let sweeps = || {
        let log = fs::read(node.home().join("daemon.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).matches("counted what is stored").count()
    };
    let before = sweeps();
    wait_until("sweeps are made", SOON, || (sweeps() >= before + count).then_some(()));
}

fn data_dir(pool: &Pool, name: &str, bytes: usize) -> PathBuf {
    let dir = pool.job_dir(name, &[]);
    fs::write(dir.join("data"), noise(bytes)).expect("it can be written");
    dir
}

/// Bytes of disk that everything below `dir` takes.
fn allocated(dir: &Path) -> u64 {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let Ok(state) = entry.metadata() else { continue };
        bytes += if state.is_dir() { allocated(&entry.path()) } else { state.blocks() * 512 };
    }
    bytes
}
