//! Disks without room: the user hears which, daemons survive, nothing half done stays, and
//! with room again all goes on.

use std::{collections::BTreeSet, fs, path::PathBuf};

use p2pit_tests::{Ended, Node, Pool, SOON, SmallDisk, lines_of, wait_until};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
/// A home that is in use takes a few.
const DISK_BYTES: u64 = 128 * MIB;
/// What is submitted.
const DATA_BYTES: usize = 32 << 20;
/// For the journal and the log of a daemon that has nothing to store.
const LEFT_BYTES: u64 = 8 * MIB;

#[test]
fn a_disk_that_is_full_while_a_job_is_submitted_is_named() {
    let mut pool = Pool::empty();
    let Some(disk) = SmallDisk::mount(&pool.path().join("n1"), DISK_BYTES) else { return };
    let node = add(&mut pool, "n1", "sim:1xv100").working_in(&data_dir(&pool));
    let daemon = node.daemon().pid();
    disk.fill(LEFT_BYTES);
    let run = || node.p2pit(&["run", "Full", "[v100]", "-d", "wc -c < data", "-l"]);
    for _ in 0..2 {
        run().refused(2, &[&home(&node), "No space left", "hint: ", "free"]);
    }
    assert!(node.json(&["show", "jobs"]).as_array().unwrap().is_empty());
    assert_eq!(fs::read_dir(node.home().join("blobs/tmp")).unwrap().count(), 0);
    disk.free();
    assert_eq!(lines_of(&run().ok(), 0), [DATA_BYTES.to_string()]);
    assert_eq!(node.daemon().pid(), daemon);
}

#[test]
fn a_disk_without_any_room_is_named_by_whatever_has_to_be_written_down() {
    let mut pool = Pool::empty();
    let Some(disk) = SmallDisk::mount(&pool.path().join("n1"), DISK_BYTES) else { return };
    let node = add(&mut pool, "n1", "sim:1xv100");
    let daemon = node.daemon().pid();
    let first = node.submit(&["First", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&first, "RUNNING");
    disk.fill(0);
    // The last page of the journal may have room for some more.
    let refused = wait_until("nothing more can be written down", SOON, || {
        let run = node.p2pit(&["run", "More", "[v100]", "-d", "true"]);
        (run.code != 0).then_some(run)
    });
    let says = format!("the disk of the home {} is full", home(&node));
    refused.refused(2, &[&says, "hint: ", "free"]);
    node.p2pit(&["stop", &first]).refused(2, &[&says, "hint: ", "free"]);
    disk.free();
    node.p2pit(&["stop", &first]).ended(0);
    node.wait_for_outcome(&first, "stopped");
    let last = node.submit(&["Last", "[v100]", "-d", "true"]);
    node.wait_for_outcome(&last, "succeeded");
    assert_eq!(node.daemon().pid(), daemon);
}

#[test]
fn a_daemon_whose_disk_is_full_can_be_ended() {
    let mut pool = Pool::empty();
    let Some(disk) = SmallDisk::mount(&pool.path().join("n1"), DISK_BYTES) else { return };
    let node = add(&mut pool, "n1", "sim:1xv100");
    let first = node.submit(&["First", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&first, "RUNNING");
    for is_signalled in [false, true] {
        let daemon = node.daemon();
        disk.fill(0);
        wait_until("nothing more can be written down", SOON, || {
            let run = node.p2pit(&["run", "More", "[v100]", "-d", "true"]);
            (run.code != 0).then_some(())
        });
        if is_signalled {
            daemon.signal(Signal::TERM);
            wait_until("the daemon ends", SOON, || daemon.has_ended().then_some(()));
        } else {
            node.shut_down();
            assert!(daemon.has_ended());
        }
        disk.free();
        node.restart();
        assert_ne!(node.daemon().pid(), daemon.pid());
    }
    // It was there all the time.
    node.wait_for_state(&first, "RUNNING");
    node.p2pit(&["stop", &first]).ended(0);
    node.wait_for_outcome(&first, "stopped");
}

#[test]
fn a_disk_that_is_full_while_inputs_are_fetched_fails_the_job_and_not_the_node() {
    let mut pool = Pool::empty();
    let Some(disk) = SmallDisk::mount(&pool.path().join("n2"), DISK_BYTES) else { return };
    let node = add(&mut pool, "n1", "sim:1xv100").working_in(&data_dir(&pool));
    let full = add(&mut pool, "n2", "sim:1xgtx1070");
    pool.wait_until_assembled();
    let daemon = full.daemon().pid();
    disk.fill(LEFT_BYTES);
    let run = || node.p2pit(&["run", "Full", "[gtx1070]", "-d", "wc -c < data", "-l"]);
    let failed = run();
    assert_ne!(failed.code, 0);
    let text = format!("{}{}", failed.stdout, failed.stderr);
    for part in [home(&full).as_str(), "No space left"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(fs::read_dir(full.home().join("blobs/tmp")).unwrap().count(), 0);
    disk.free();
    assert_eq!(lines_of(&run().ok(), 0), [DATA_BYTES.to_string()]);
    assert_eq!(full.daemon().pid(), daemon);
}

#[test]
fn a_disk_that_is_full_while_a_job_logs_costs_lines_and_not_the_job() {
    let mut pool = Pool::empty();
    let Some(disk) = SmallDisk::mount(&pool.path().join("n1"), DISK_BYTES) else { return };
    let node = add(&mut pool, "n1", "sim:1xv100");
    let daemon = node.daemon().pid();
    let script = "until test -e $JOB_DIR/keep/full; do sleep 0.05; done; \
                  yes 'a line of output' | head -n 1000000; touch $JOB_DIR/keep/said; \
                  until test -e $JOB_DIR/keep/free; do sleep 0.05; done; echo after";
    let id = node.submit(&["Talkative", "[v100]", "-d", script]);
    node.wait_for_state(&id, "RUNNING");
    let keep = node.home().join("jobs").join(&id).join("1-0/keep");
    disk.fill(LEFT_BYTES);
    fs::write(keep.join("full"), "").unwrap();
    wait_until("the job said everything", SOON, || keep.join("said").exists().then_some(()));
    disk.free();
    fs::write(keep.join("free"), "").unwrap();
    let job = node.wait_for_outcome(&id, "succeeded");
    let log = node.log(&id);
    let said = lines_of(&log, 0);
    assert!((2..1_000_000).contains(&said.len()), "{} lines", said.len());
    assert_eq!(said.last(), Some(&"after"));
    assert!(log.contains("bytes of output could not be written here"), "not said in the log");
    let note = job["ranks"][0]["note"].as_str().unwrap_or_default();
    assert!(note.contains("No space left"), "{job:#}");
    assert_eq!(node.daemon().pid(), daemon);
}

#[test]
fn a_disk_that_is_full_while_files_of_a_job_come_is_named() {
    let mut pool = Pool::empty();
    let dir = data_dir(&pool);
    let Some(disk) = SmallDisk::mount(&dir.join("small"), DISK_BYTES) else { return };
    let node = add(&mut pool, "n1", "sim:1xv100").working_in(&dir);
    let job = node.submit(&["Left", "[v100]", "-d", "cp data $JOB_DIR/artifacts"]);
    node.wait_for_outcome(&job, "succeeded");
    disk.fill(LEFT_BYTES);
    let copy = || node.p2pit(&["cp", &job, "artifacts/data", "small"]);
    let download = || node.p2pit(&["download", &job, "-o", "small/all.tar.gz"]);
    for get in [&copy as &dyn Fn() -> Ended, &download] {
        get().refused(2, &["small/.p2pit-", "No space left", "hint: ", "free some space"]);
    }
    disk.free();
    copy().ended(0);
    assert_eq!(fs::metadata(dir.join("small/data")).unwrap().len(), DATA_BYTES as u64);
    download().ended(0);
    let names = fs::read_dir(dir.join("small")).unwrap().map(|it| it.unwrap().file_name());
    assert_eq!(names.collect::<BTreeSet<_>>(), ["all.tar.gz", "data"].map(Into::into).into());
}

fn add(pool: &mut Pool, name: &str, gpus: &str) -> Node {
    pool.add(name, &["--gpus", gpus, "--cpus", "4"])
}

fn data_dir(pool: &Pool) -> PathBuf {
    pool.job_dir("data", &[("data", &"x".repeat(DATA_BYTES))])
}

fn home(node: &Node) -> String {
    node.home().display().to_string()
}
