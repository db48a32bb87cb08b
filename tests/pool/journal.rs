//! What a home keeps, damaged or gone while its daemon is down: the journal and the index.

use std::{fs, path::PathBuf};

use p2pit_tests::{Node, Pool, Process, SOON, lines_of, mentioning, of_job, wait_until};
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn a_node_whose_journal_is_damaged_goes_on_as_another_store_and_says_so() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    let node = pool.node(1);
    let members = log_of(node).1.len();
    let id = node.submit(&["Long", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&id, "RUNNING");
    let processes = of_job(&id);
    assert!(!processes.is_empty());
    let before = node.me();
    node.crash();
    let (log, mut bytes) = log_of(node);
    // In the first of what the job led to, which several fsyncs followed.
    bytes[members + 40] ^= 0x10;
    fs::write(&log, &bytes).unwrap();

    // What runs is ended before the new store says to anybody that it knows nothing of it, and
    // here that takes a while.
    let is_supervising = |process: &Process| process.command_line().contains(&"supervise".into());
    let mut supervising = mentioning(node.home());
    supervising.retain(is_supervising);
    assert!(!supervising.is_empty());
    supervising.iter().for_each(|process| process.signal(Signal::STOP));
    let restart = node.start(&["join", "--detach"]);
    wait_until("the daemon ends what it does not know", 2 * SOON, || {
        let log = fs::read_to_string(node.home().join("daemon.log")).unwrap();
        log.contains("its processes do not end").then_some(())
    });
    wait_until("nobody hears it", SOON, || {
        (pool.node(2).nodes()["n1"]["reach"] == "offline").then_some(())
    });
    supervising.iter().for_each(|process| process.signal(Signal::CONT));
    restart.end().ended(0);
    assert!(processes.iter().all(Process::has_ended));

    let me = node.me();
    for same in ["node", "pool", "name"] {
        assert_eq!(me[same], before[same], "{me:#}");
    }
    let aside = node.home().join("journal/damaged.1");
    assert_eq!(fs::read(&aside).unwrap(), bytes);
    let said = format!("the damaged file is kept as {}", aside.display());
    assert!(warnings(&me).iter().any(|it| it.contains(&said)), "{me:#}");
    let journal = fs::read(log_of(node).0).unwrap();
    assert_ne!(journal[STORE_ID], bytes[STORE_ID], "the store id is used again");
    pool.wait_until_assembled();
    let after = node.submit(&["After", "[v100]", "-d", "echo worked"]);
    node.wait_for_outcome(&after, "succeeded");
    // The damage is told once, and the new store is an ordinary one.
    node.crash();
    node.restart();
    node.wait_for_outcome(&after, "succeeded");
    assert_eq!(warnings(&node.me()), Vec::<String>::new());
}

#[test]
fn a_node_whose_journal_is_lost_ends_what_ran_and_joins_again() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    let (node, other) = (pool.node(1), pool.node(2));
    let id = node.submit(&["Long", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&id, "RUNNING");
    let processes = of_job(&id);
    node.crash();
    let (log, bytes) = log_of(node);
    fs::write(&log, &bytes[..20]).unwrap();

    // Without a ticket it would be alone in a pool of its own; the second time, too.
    for _ in 0..2 {
        let parts = ["was in a pool", "p2pit join TICKET", "p2pit join --found"];
        node.p2pit(&["join", "--detach"]).refused(1, &parts);
    }
    node.p2pit(&["join", &other.invite(), "--detach"]).ended(0);

    assert!(warnings(&node.me()).iter().any(|it| it.contains("join again with a ticket")));
    wait_until("what ran under the old journal ends", SOON, || {
        processes.iter().all(Process::has_ended).then_some(())
    });
    pool.wait_until_assembled();
    let after = other.submit(&["After", "[v100]", "-d", "true"]);
    other.wait_for_outcome(&after, "succeeded");
}

#[test]
fn a_node_whose_home_was_restored_from_a_copy_says_so_and_begins_anew() {
    let pool = Pool::of(&["sim:1xv100", "none", "none"]);
    let (node, other) = (pool.node(1), pool.node(2));
    node.shut_down();
    let (log, copied) = log_of(node);
    let before = copied[STORE_ID].to_vec();
    node.restart();
    let id = node.submit(&["Kept", "[v100]", "-d", "echo ran"]);
    other.wait_for_outcome(&id, "succeeded");
    pool.wait_until_assembled();
    node.shut_down();
    for entry in fs::read_dir(node.home().join("journal")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    fs::write(&log, &copied).unwrap();

    // It starts, hears from the others what it does not know of itself, and ends.
    let _ = node.p2pit(&["join", "--detach"]);
    let said = |part: &str| {
        let daemon_log = fs::read_to_string(node.home().join("daemon.log")).unwrap();
        daemon_log.contains(part)
    };
    wait_until("it ends and says why", SOON, || {
        (said("must not be used any more") && said("join --detach")).then_some(())
    });
    wait_until("it is gone", SOON, || (other.nodes()["n1"]["reach"] == "offline").then_some(()));
    node.restart();
    assert_ne!(log_of(node).1[STORE_ID], before[..], "the store id is used again");
    let aside = node.home().join("journal/damaged.1");
    assert_eq!(fs::read(&aside).unwrap()[..copied.len()], copied, "nothing of it is lost");
    pool.wait_until_assembled();
    assert_eq!(lines_of(&node.log(&id), 0), ["ran"]);
    let after = node.submit(&["After", "[v100]", "-d", "true"]);
    other.wait_for_outcome(&after, "succeeded");
}

#[test]
fn deleting_the_index_of_a_node_loses_nothing() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    let (node, other) = (pool.node(1), pool.node(2));
    let work = pool.job_dir("inputs", &[("input", "fetched\n")]);
    let script = "cat input; cp input $JOB_DIR/artifacts/";
    let done = node.working_in(&work).submit(&["Done", "[v100]", "-d", script]);
    node.wait_for_outcome(&done, "succeeded");
    let running = node.submit(&["Long", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&running, "RUNNING");
    let (nodes, jobs) = (offers(node), job_ids(node));

    for spoil in [delete as fn(&Node), corrupt] {
        node.crash();
        spoil(node);
        node.restart();
        assert_eq!(job_ids(node), jobs);
        node.wait_for_outcome(&done, "succeeded");
        assert_eq!(lines_of(&node.log(&done), 0), ["fetched"]);
        assert_eq!(node.p2pit(&["cp", &done, "artifacts/input", "-"]).ok(), "fetched\n");
        node.wait_for_state(&running, "RUNNING");
    }
    // Addresses are gone with the index: the other node comes by itself.
    pool.wait_until_assembled();
    assert_eq!(offers(node), nodes);
    assert_eq!(lines_of(&other.log(&done), 0), ["fetched"]);
    let log = fs::read_to_string(node.home().join("daemon.log")).unwrap();
    assert!(log.contains("the index is begun anew"), "no warning about the index");
    assert!(node.home().join("index.broken-1").is_dir());
    node.p2pit(&["stop", &running]).ended(0);
    node.wait_for_outcome(&running, "stopped");
}

fn delete(node: &Node) {
    fs::remove_dir_all(node.home().join("index")).expect("the index is there");
}

fn corrupt(node: &Node) {
    for file in ["conf", "db"] {
        fs::write(node.home().join("index").join(file), [0xa5; 5000]).expect("the index is there");
    }
}

/// Where the store id stands in a log.
const STORE_ID: std::ops::Range<usize> = 12..28;

/// The log that counts, and what is in it.
fn log_of(node: &Node) -> (PathBuf, Vec<u8>) {
    let logs = fs::read_dir(node.home().join("journal")).expect("a home has a journal");
    let generation =
        |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("log.")?.parse::<u64>().ok();
    let logs = logs
        .map(|entry| entry.expect("it can be listed").path())
        .filter(|path| generation(path).is_some());
    let path = logs.max_by_key(generation).expect("a journal has a log");
    let bytes = fs::read(&path).expect("a log can be read");
    (path, bytes)
}

fn warnings(me: &Value) -> Vec<String> {
    let warnings = me["warnings"].as_array().expect("warnings are an array");
    warnings.iter().map(|it| it.as_str().unwrap_or_default().to_owned()).collect()
}

/// The GPUs of every node.
fn offers(node: &Node) -> Vec<(String, Vec<String>)> {
    let gpus = |it: &Value| {
        let gpus = it["gpus"].as_array().cloned().unwrap_or_default();
        gpus.iter().map(|gpu| gpu["uuid"].to_string()).collect()
    };
    node.nodes().iter().map(|(name, it)| (name.clone(), gpus(it))).collect()
}

fn job_ids(node: &Node) -> Vec<String> {
    let jobs = node.json(&["show", "jobs"]);
    let mut ids: Vec<String> = jobs
        .as_array()
        .expect("jobs are an array")
        .iter()
        .map(|job| job["id"].to_string())
        .collect();
    ids.sort();
    ids
}
