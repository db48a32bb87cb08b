//! Ending jobs before their time.

use p2pit_tests::{Node, Pool, SOON, of_job, wait_until};
use serde_json::Value;

#[test]
fn stopping_a_job_ends_all_its_processes_and_frees_its_gpus() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    // Neither of them minds SIGTERM, and one has left the session.
    let script = "trap '' TERM; setsid sleep 600 & sleep 600 & echo up; wait; wait";
    let args = ["run", "Stubborn", "2:[v100]", "-l", "--grace", "1s", "-d", script];
    let mut follower = pool.node(1).start(&args);
    follower.wait_for("[worker 0] up");
    follower.wait_for("[worker 1] up");
    let id = pool.node(1).job("@last")["id"].as_str().unwrap().to_owned();
    let processes = of_job(&id);
    assert!(processes.len() >= 6, "{processes:?}");

    pool.node(2).p2pit(&["stop", &id]).ended(0);

    follower.end().ended(143);
    let job = pool.node(2).wait_for_outcome(&id, "stopped");
    assert_eq!((&job["stopped_by"], &job["exit_code"]), (&"anna".into(), &143.into()));
    let left: Vec<_> = processes.iter().filter(|it| !it.has_ended()).collect();
    assert!(left.is_empty(), "{left:?}");
    wait_until_free(pool.node(1));
    pool.node(1).p2pit(&["run", "Next", "2:[v100]", "-d", "true", "-l"]).ended(0);
}

#[test]
fn a_process_may_use_its_grace_to_end_well() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let script = "trap 'echo saved > $JOB_DIR/keep/state; exit 0' TERM; echo up; \
                  while :; do sleep 0.05; done";
    let mut follower = node.start(&["run", "Careful", "[v100]", "-l", "-d", script]);
    follower.wait_for("[worker 0] up");
    node.p2pit(&["stop", "@last"]).ended(0);
    follower.end().ended(143);
    assert_eq!(node.p2pit(&["cp", "@last", "keep/state", "-"]).ok(), "saved\n");
}

#[test]
fn a_job_that_waits_can_be_stopped_and_never_runs() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let running = node.submit(&["Running", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&running, "RUNNING");
    let waiting = node.submit(&["Waiting", "[v100]", "-d", "echo never"]);
    node.wait_for_state(&waiting, "WAITING");

    node.p2pit(&["stop", &waiting, &running]).ended(0);

    let job = node.wait_for_outcome(&waiting, "stopped");
    let states: Vec<&Value> =
        job["history"].as_array().unwrap().iter().map(|change| &change["state"]).collect();
    assert!(!states.contains(&&"RUNNING".into()), "{states:?}");
    assert!(!node.log(&waiting).contains("never"));
    node.wait_for_outcome(&running, "stopped");
    wait_until_free(node);
    let again = node.p2pit(&["stop", &waiting]);
    again.ended(0);
    assert!(again.stderr.contains("is over"), "{}", again.stderr);
}

#[test]
fn a_time_limit_ends_a_job_with_exit_code_124() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let args = ["run", "Endless", "[v100]", "--time", "1s", "-l", "-d", "sleep 600"];
    node.p2pit(&args).ended(124);
    let job = node.job("@last");
    assert_eq!((&job["outcome"], &job["exit_code"]), (&"timed out".into(), &124.into()));
    wait_until_free(node);
}

/// Returns once this node sees no GPU of the pool in use.
#[track_caller]
fn wait_until_free(node: &Node) {
    wait_until("all GPUs are free", SOON, || {
        let nodes = node.nodes();
        let mut gpus = nodes.values().filter_map(|node| node["gpus"].as_array()).flatten();
        gpus.all(|gpu| gpu["state"] == "free").then_some(())
    });
}
