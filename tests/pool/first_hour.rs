//! What a newcomer does first, in the order and the haste in which one does it.

use std::fs;

use p2pit_tests::{Pool, SOON, mentioning, wait_until};
use serde_json::{Value, json};

/// Runs until it is told to end.
const HOLD: &str = "trap 'exit 0' TERM; while :; do sleep 0.05; done";

#[test]
fn a_client_that_has_just_joined_can_submit_at_once() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let client = pool.add("laptop", &["--client"]);
    let job = client.submit(&["At once", "[v100]", "-d", "echo ran"]);
    client.wait_for_outcome(&job, "succeeded");
    assert_eq!(client.job(&job)["keepers"], json!(["n1"]));
}

#[test]
fn a_node_that_a_command_started_for_itself_does_not_take_its_machine_out_of_the_pool() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let (first, second) = (pool.node(1), pool.node(2));
    second.shut_down();
    // Starts a daemon for itself, which offers nothing.
    second.p2pit(&["status"]).ended(0);
    wait_until("n1 hears that n2 offers nothing now", SOON, || {
        let nodes = first.nodes();
        (nodes["n2"]["reach"] == "online" && nodes["n2"]["away"] == true).then_some(())
    });
    assert_eq!(first.nodes()["n2"]["gpus"].as_array().unwrap().len(), 1);
    for node in [first, second] {
        let plan = node.json(&["run", "Later", "[v100]", "-d", "true", "--dry-run"]);
        assert_eq!((&plan["candidates"], &plan["keepers"]), (&json!([]), &json!(["n1"])));
    }
    let job = second.submit(&["Later", "[v100]", "-d", "true"]);
    assert_eq!(second.job(&job)["keepers"], json!(["n1"]), "not one that ends when idle");
    second.restart();
    first.wait_for_outcome(&job, "succeeded");
    assert_eq!(first.nodes()["n2"]["away"], false);
}

#[test]
fn an_empty_status_says_where_nobody_could_be_asked() {
    let mut pool = Pool::of(&["none"]);
    let client = pool.add_client("laptop");
    let quiet = client.p2pit(&["status"]);
    assert!(!quiet.stderr.contains("warning"), "{}", quiet.stderr);
    pool.node(1).shut_down();
    wait_until("n1 is gone", SOON, || (client.nodes()["n1"]["reach"] == "offline").then_some(()));
    let alone = client.p2pit(&["status"]);
    assert!(alone.stderr.contains("no other node that keeps jobs is online"), "{}", alone.stderr);
    let shown = client.p2pit(&["show", "nodes"]).ok();
    assert!(shown.contains("offline (as of "), "{shown}");
    let ended = client.p2pit(&["run", "t", "-d", "true"]);
    ended.refused(1, &["no node that keeps jobs", "hint: ", "show nodes"]);
}

#[test]
fn a_peer_without_a_ticket_founds_no_second_pool() {
    let pool = Pool::of(&["none"]);
    let peer = pool.node(1).me()["data"][0].as_str().unwrap().to_owned();
    let other = pool.home("other").used_with(&pool.path().join("other-key"));
    let ended = other.join(None, &["--peer", &peer]);
    ended.refused(1, &["no ticket", &peer, "hint: ", "p2pit invite", "--found"]);
    assert!(mentioning(other.home()).is_empty() && !other.home().join("config.yaml").exists());
    other.join(None, &["--peer", &peer, "--found"]).ended(0);
}

#[test]
fn a_member_home_without_its_key_gets_no_new_one() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    node.shut_down();
    let gone = node.used_with(&pool.path().join("gone"));
    gone.p2pit(&["join", "--detach"]).refused(1, &["is in a pool", "gone", "hint: ", "--identity"]);
    assert!(!gone.identity().exists() && mentioning(node.home()).is_empty());
    node.restart();
}

#[test]
fn what_is_said_to_a_daemon_that_runs_already_is_not_silently_ignored() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    let said = node.p2pit(&["join", "--detach", "--gpus", "sim:4xv100", "--user-name", "bob"]);
    said.ended(0);
    for part in ["does not change the running daemon", "config.yaml", "names said now"] {
        assert!(said.stderr.contains(part), "{part}: {}", said.stderr);
    }
    let plain = node.p2pit(&["join", "--detach"]);
    assert!(!plain.stderr.contains("warning"), "{}", plain.stderr);
    assert_eq!(node.me()["gpus"], Value::Array(Vec::new()));
}

#[test]
fn a_node_with_finished_jobs_is_left_only_by_force_where_nobody_else_has_them() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let job = node.submit(&["Precious", "[v100]", "-d", "echo result > x", "--artifact", "x"]);
    node.wait_for_outcome(&job, "succeeded");
    let refused = node.p2pit(&["leave"]);
    refused.refused(1, &["finished jobs", &job[..4], "hint: ", "p2pit download", "--force"]);
    assert_eq!(node.p2pit(&["cp", &job, "artifacts/x", "-"]).ok(), "result\n");
    node.p2pit(&["leave", "--force"]).ended(0);
}

#[test]
fn a_node_with_finished_jobs_is_left_where_another_has_what_they_left() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let (other, node) = (pool.node(1), pool.node(2));
    let job = node.submit(&["Precious", "[v100]", "-d", "echo result > x", "--artifact", "x"]);
    node.wait_for_outcome(&job, "succeeded");
    node.p2pit(&["leave"]).ended(0);
    assert_eq!(other.p2pit(&["cp", &job, "artifacts/x", "-"]).ok(), "result\n");
}

#[test]
fn following_a_job_that_waits_says_why_and_leaves_it_alone_when_interrupted() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let first = node.submit(&["First", "[v100]", "-d", HOLD]);
    node.wait_for_state(&first, "RUNNING");
    let second = node.submit(&["Second", "[v100]", "-d", "true"]);
    let mut following = node.start(&["log", &second, "-f"]);
    wait_until("the reason is told", SOON, || following.stderr().contains("waits: ").then_some(()));
    assert!(following.stderr().contains("p2pit why "));
    following.interrupt();
    let ended = following.end();
    ended.ended(130);
    assert!(ended.stderr.contains("goes on; `p2pit log "), "{}", ended.stderr);
    let listed = node.p2pit(&["ls", &second]);
    assert!(listed.stderr.contains("has left nothing yet: it is "), "{}", listed.stderr);
    listed.ended(0);
    node.p2pit(&["stop", &first]).ended(0);
    node.wait_for_outcome(&second, "succeeded");
}

#[test]
fn the_log_of_a_job_that_ran_into_its_time_limit_says_so() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    let job = node.submit(&["Late", "-d", HOLD, "--time", "1s", "--grace", "1s"]);
    node.wait_for_outcome(&job, "timed out");
    let log = node.log(&job);
    assert!(log.contains("time limit"), "{log}");
}

#[test]
fn a_name_that_is_nobodys_is_taken_from_the_system() {
    let pool = Pool::empty();
    let node = pool.home("n1");
    let args = ["join", "--detach", "--no-mdns", "--listen", "127.0.0.1:0"];
    node.p2pit(&args).ended(0);
    let uid = rustix::process::geteuid().as_raw().to_string();
    let accounts = fs::read_to_string("/etc/passwd").unwrap();
    let own = accounts.lines().find(|line| line.split(':').nth(2) == Some(&uid));
    let expected = own.and_then(|line| line.split(':').next()).unwrap_or("user");
    assert_eq!(node.me()["user"], expected.to_lowercase());
}
