//! Transfers that are cut, that meet what went bad, and that share a network.

use std::{
    fs,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use p2pit_tests::{Node, Pool, SOON, lines_of, wait_until};
use rustix::process::Signal;

const MIB: usize = 1 << 20;

#[test]
fn a_copy_that_was_interrupted_goes_on_where_it_stopped() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let dir = pool.job_dir("here", &[]);
    let content = noise(8 * MIB);
    let job = with_artifact(&pool, &content);
    let slow = pool.node(1).working_in(&dir);
    slow.shut_down();
    start_with(&slow, "download: 2MiB/s");

    let mut copy = slow.start(&["cp", &job, "artifacts/big", "."]);
    let stage = wait_until("something to have come", SOON, || {
        let stage = stage_in(&dir)?;
        (allocated(&stage) >= 3 * MIB as u64).then_some(stage)
    });
    copy.interrupt();
    let ended = copy.end();
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(ended.stderr.contains("goes on where it stopped"), "{ended:?}");
    assert!(stage.exists() && !dir.join("big").exists());

    // What came is not asked for again: it could not be had, of the copy neither.
    slow.shut_down();
    for node in [pool.node(1), pool.node(2)] {
        let holder = blob_of(node, &content);
        fs::File::options().write(true).open(&holder).unwrap().write_all_at(b"bad", 0).unwrap();
    }
    start_with(&slow, "");
    slow.p2pit(&["cp", &job, "artifacts/big", "."]).ended(0);
    assert!(fs::read(dir.join("big")).unwrap() == content);
    assert!(stage_in(&dir).is_none());
    // And without what came it is not to be had from there any more.
    fs::remove_file(dir.join("big")).unwrap();
    let failed = slow.p2pit(&["cp", &job, "artifacts/big", "."]);
    failed.refused(2, &["node n", "is not there any more", "hint: "]);
    assert!(!dir.join("big").exists());
}

#[test]
fn a_daemon_that_was_killed_while_it_fetched_goes_on_where_it_stopped() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let client = pool.node(1);
    let (content, dir) = (noise(8 * MIB), pool.job_dir("inputs", &[]));
    fs::write(dir.join("big"), &content).unwrap();
    let worker = pool.node(2);
    switch_off(&pool, 2);
    let script = "sha256sum < big | cut -c1-8";
    let job = client.working_in(&dir).submit(&["Big input", "[v100]", "-d", script]);
    start_with(worker, "download: 2MiB/s");
    let partial = worker.home().join("blobs/partial");
    wait_until("something to have come", SOON, || {
        (allocated(&partial) >= 3 * MIB as u64).then_some(())
    });
    worker.crash();
    let keeper = blob_of(client, &content);
    fs::File::options().write(true).open(&keeper).unwrap().write_all_at(b"bad", 0).unwrap();
    start_with(worker, "");
    client.wait_for_outcome(&job, "succeeded");
    assert_eq!(lines_of(&client.log(&job), 0).len(), 1);
    assert_eq!(fs::read_dir(&partial).unwrap().count(), 0);
}

#[test]
fn an_input_that_went_bad_at_its_keeper_comes_from_whoever_else_has_it() {
    let pool = Pool::of(&["none", "sim:1xv100", "sim:1xgtx1070"]);
    let content = noise(MIB);
    let dir = pool.job_dir("inputs", &[(".compute", "#!/bin/sh\nwc -c < big\n")]);
    fs::write(dir.join("big"), &content).unwrap();
    let keeper = pool.node(1).working_in(&dir);
    switch_off(&pool, 3);
    let first = keeper.submit(&["One", "[v100]"]);
    keeper.wait_for_outcome(&first, "succeeded");

    let bad = blob_of(&keeper, &content);
    fs::File::options().write(true).open(&bad).unwrap().write_all_at(b"bad", 300_000).unwrap();
    let second = keeper.submit(&["Two", "[gtx1070]"]);
    pool.node(3).restart();
    keeper.wait_for_outcome(&second, "succeeded");
    assert_eq!(lines_of(&keeper.log(&second), 0), [content.len().to_string()]);
    assert!(!bad.exists(), "what went bad is not offered again");
}

#[test]
fn an_input_that_went_bad_where_it_is_needed_is_fetched_again() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let content = noise(MIB);
    let dir = pool.job_dir("inputs", &[(".compute", "#!/bin/sh\nwc -c < big\n")]);
    fs::write(dir.join("big"), &content).unwrap();
    let keeper = pool.node(1).working_in(&dir);
    let first = keeper.submit(&["One", "[v100]"]);
    keeper.wait_for_outcome(&first, "succeeded");
    let store = pool.node(2).home().join("blobs");
    for path in files_below(&store) {
        if path.extension().is_none() {
            fs::File::options().write(true).open(&path).unwrap().write_all_at(b"bad", 0).unwrap();
        }
    }
    let second = keeper.submit(&["Two", "[v100]"]);
    keeper.wait_for_outcome(&second, "succeeded");
    assert_eq!(lines_of(&keeper.log(&second), 0), [content.len().to_string()]);
}

#[test]
fn what_went_bad_at_the_submitter_is_said_and_the_next_submission_mends_it() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let client = pool.add_client("laptop");
    let content = noise(2 * MIB);
    let dir = pool.job_dir("inputs", &[(".compute", "#!/bin/sh\nwc -c < big\n")]);
    fs::write(dir.join("big"), &content).unwrap();
    let client = client.working_in(&dir);
    let first = client.submit(&["One", "[v100]"]);
    client.wait_for_outcome(&first, "succeeded");
    // The keeper has lost it, and what the client has is not it any more.
    fs::remove_file(blob_of(pool.node(1), &content)).unwrap();
    let bad = blob_of(&client, &content);
    fs::File::options().write(true).open(&bad).unwrap().write_all_at(b"bad", MIB as u64).unwrap();
    let refused = client.p2pit(&["run", "Two", "[v100]"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(refused.stderr.contains("corrupt"), "{refused:?}");
    let third = client.submit(&["Three", "[v100]"]);
    client.wait_for_outcome(&third, "succeeded");
}

#[test]
fn a_keeper_that_is_killed_while_it_gives_is_asked_again_once_it_is_back() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let keeper = pool.node(1);
    let (content, dir) = (noise(8 * MIB), pool.job_dir("inputs", &[]));
    fs::write(dir.join("big"), &content).unwrap();
    let worker = pool.node(2);
    switch_off(&pool, 2);
    let script = "wc -c < big";
    let job = keeper.working_in(&dir).submit(&["Big input", "[v100]", "-d", script]);
    start_with(worker, "download: 2MiB/s");
    let partial = worker.home().join("blobs/partial");
    wait_until("something to have come", SOON, || {
        (allocated(&partial) >= 2 * MIB as u64).then_some(())
    });
    keeper.crash();
    keeper.restart();
    keeper.wait_for_outcome(&job, "succeeded");
    let job = keeper.job(&job);
    assert_eq!(job["attempt"], 1, "{job:#}");
}

#[test]
fn an_input_that_nobody_has_any_more_is_named() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let content = noise(1000);
    let dir = pool.job_dir("inputs", &[]);
    fs::write(dir.join("small"), &content).unwrap();
    let keeper = pool.node(1).working_in(&dir);
    switch_off(&pool, 2);
    keeper.p2pit(&["run", "Here", "[]", "-d", "true", "-l"]).ended(0);
    let bad = blob_of(&keeper, &content);
    let blob = bad.file_name().unwrap().to_str().unwrap().to_owned();
    fs::write(&bad, "bad").unwrap();
    let job = keeper.submit(&["There", "[v100]", "-d", "true"]);
    pool.node(2).restart();
    let job = keeper.wait_for_outcome(&job, "failed(126)").to_string();
    assert!(job.contains(&blob) && job.contains("node n1: does not have it"), "{job}");
}

#[test]
fn a_transfer_that_nobody_reads_does_not_hold_up_a_log() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let dir = pool.job_dir("here", &[]);
    // More than connection, pipes and buffers hold.
    let content = noise(96 * MIB);
    let job = with_artifact(&pool, &content);
    let node = pool.node(1).working_in(&dir);
    let mut copy = node.start(&["cp", &job, "artifacts/big", "."]);
    wait_until("the copy to have begun", SOON, || stage_in(&dir));
    copy.signal(Signal::STOP);
    for _ in 0..3 {
        assert_eq!(lines_of(&node.log(&job), 0), ["left it"]);
    }
    copy.signal(Signal::CONT);
    copy.end().ended(0);
    assert!(fs::read(dir.join("big")).unwrap() == content);
}

#[test]
fn a_copy_is_continued_beside_what_is_there() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("here", &[]);
    let node = pool.node(1).working_in(&dir);
    let script = "cd $JOB_DIR/keep; echo one > a; mkdir d; echo two > d/b; ln -s a link";
    node.p2pit(&["run", "Results", "[v100]", "-d", script, "-l"]).ended(0);
    node.p2pit(&["cp", "@last", "keep", "out"]).ended(0);
    fs::remove_file(dir.join("out/d/b")).unwrap();
    node.p2pit(&["cp", "@last", "keep/d/b", "out/d"]).ended(0);
    fs::remove_file(dir.join("out/d/b")).unwrap();
    fs::write(dir.join("out/mine"), "mine").unwrap();
    fs::write(dir.join("out/a"), "ONE\n").unwrap();
    let args = ["cp", "-c", "@last", "keep/a", "out"];
    node.p2pit(&args).refused(1, &["out/a` is there already", "hint: "]);
    assert_eq!(fs::read_to_string(dir.join("out/a")).unwrap(), "ONE\n");
    fs::write(dir.join("out/a"), "one\n").unwrap();
    node.p2pit(&args).ended(0);
}

/// A job on node 2, submitted and kept at node 1, that is over and left this as an
/// artifact.
fn with_artifact(pool: &Pool, content: &[u8]) -> String {
    let dir = pool.job_dir("inputs", &[]);
    fs::write(dir.join("big"), content).expect("the input is written");
    let node = pool.node(1).working_in(&dir);
    let script = "cp big $JOB_DIR/artifacts; echo left it";
    let job = node.submit(&["Artifact", "[v100]", "-d", script]);
    node.wait_for_outcome(&job, "succeeded");
    job
}

/// Ends the n-th node's daemon: while it is off it is not chosen to keep a job, and so does not
/// get its inputs before it has to fetch them.
#[track_caller]
pub(super) fn switch_off(pool: &Pool, n: usize) {
    let name = pool.node(n).name();
    pool.node(n).shut_down();
    for node in pool.nodes().iter().filter(|node| node.name() != name) {
        wait_until(&format!("{} misses {name}", node.name()), SOON, || {
            (node.nodes()[name]["reach"] == "offline").then_some(())
        });
    }
}

/// Starts the node's daemon, which has been ended, with this limit or none.
pub(super) fn start_with(node: &Node, setting: &str) {
    let path = node.home().join("config.yaml");
    let config = fs::read_to_string(&path).expect("a home has a configuration");
    let kept = config.lines().filter(|line| !line.starts_with("download:"));
    let lines: Vec<&str> = kept.chain([setting]).collect();
    fs::write(&path, lines.join("\n") + "\n").expect("it can be written");
    node.restart();
}

fn blob_of(node: &Node, content: &[u8]) -> PathBuf {
    let blobs = node.home().join("blobs");
    let found = files_below(&blobs).into_iter().find(|path| {
        fs::metadata(path).is_ok_and(|state| state.len() == content.len() as u64)
            && fs::read(path).is_ok_and(|read| read == content)
    });
    found.expect("the node has the blob")
}

fn stage_in(dir: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(dir).expect("it is there").filter_map(Result::ok);
    entries.map(|entry| entry.path()).find(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".p2pit-stage-"))
    })
}

/// Bytes of all files below `dir` on the disk.
fn allocated(dir: &Path) -> u64 {
    files_below(dir).iter().filter_map(|it| fs::metadata(it).ok()).map(|it| it.blocks() * 512).sum()
}

pub(super) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(&entry.path())),
            Ok(_) => files.push(entry.path()),
            // Gone meanwhile.
            Err(_) => {}
        }
    }
    files
}

/// Bytes that no two runs of which are the same.
pub(super) fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..count.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(count);
    bytes
}
