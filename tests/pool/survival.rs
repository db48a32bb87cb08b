//! Jobs and pools that outlive the daemons.

use p2pit_tests::{Node, Pool, Process, SOON, lines_of, of_job, wait_until};
use rustix::process::Signal;

/// Counts aloud until it is told to end.
const COUNT: &str =
    "trap 'echo told; exit 0' USR1; n=0; while :; do n=$((n + 1)); echo tick $n; sleep 0.1; done";

#[test]
fn a_job_goes_on_when_its_submitter_leaves_right_after_submitting() {
    let mut pool = Pool::of(&["sim:1xv100", "none"]);
    let client = pool.add_client("laptop");
    let id = client.submit(&["Long", "[v100]", "-d", "sleep 1; echo worked"]);
    client.crash();

    let other = pool.node(2);
    other.wait_for_outcome(&id, "succeeded");
    for node in [pool.node(1), other] {
        assert_eq!(lines_of(&node.log(&id), 0), ["worked"], "as {} says", node.name());
    }
}

#[test]
fn a_job_outlives_a_daemon_that_is_killed_and_is_taken_up_by_the_next() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let id = node.submit(&["Count", "[v100]", "-d", COUNT]);
    wait_for_ticks(node, &id, 3);
    let counter = counter_of(&id);

    node.crash();
    assert!(!counter.has_ended());
    node.restart();

    let job = node.job(&id);
    assert_eq!((&job["state"], &job["attempt"]), (&"RUNNING".into(), &1.into()), "{job:#}");
    let seen = ticks(node, &id);
    wait_for_ticks(node, &id, seen + 3);
    assert_eq!(counter_of(&id).pid(), counter.pid());
    counter.signal(Signal::USR1);
    node.wait_for_outcome(&id, "succeeded");
    let log = node.log(&id);
    let said = lines_of(&log, 0);
    let counted: Vec<String> = (1..said.len()).map(|n| format!("tick {n}")).collect();
    assert_eq!(said[..counted.len()], counted, "nothing is missing and nothing twice");
    assert_eq!(said[counted.len()..], ["told"]);
}

#[test]
fn a_job_that_ends_while_no_daemon_runs_is_reported_by_the_next() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let id = node.submit(&["Count", "[v100]", "-d", &COUNT.replace("exit 0", "exit 3")]);
    wait_for_ticks(node, &id, 1);
    let processes = of_job(&id);
    node.crash();
    counter_of(&id).signal(Signal::USR1);
    wait_until("its processes end", SOON, || {
        processes.iter().all(Process::has_ended).then_some(())
    });
    node.restart();
    node.wait_for_outcome(&id, "failed(3)");
}

#[test]
fn a_follower_is_told_the_end_of_a_job_across_a_restart_of_its_daemon() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let client = pool.add_client("laptop");
    let node = pool.node(1);
    let id = client.submit(&["Count", "[v100]", "-d", COUNT]);
    let mut follower = client.start(&["log", &id, "-f"]);
    follower.wait_for("tick 3");
    node.crash();
    node.restart();
    wait_for_ticks(node, &id, ticks(node, &id) + 3);
    counter_of(&id).signal(Signal::USR1);
    let log = follower.end().ok();
    let said = lines_of(&log, 0);
    let counted: Vec<String> = (1..said.len()).map(|n| format!("tick {n}")).collect();
    assert_eq!(said[..counted.len()], counted, "nothing is missing and nothing twice");
}

#[test]
fn a_pool_whose_daemons_were_all_restarted_reassembles_by_itself() {
    let pool = Pool::of(&["sim:1xv100", "sim:2xgtx1070", "none"]);
    let [first, second, third] = pool.nodes() else { panic!("three nodes") };
    first.crash();
    third.shut_down();
    second.crash();
    for node in [third, first, second] {
        node.restart();
    }
    pool.wait_until_assembled();
    assert_eq!(third.nodes()["n2"]["gpus"].as_array().unwrap().len(), 2);
    third.p2pit(&["run", "After", "[v100]", "-d", "true", "-l"]).ended(0);
}

#[test]
fn jobs_that_were_done_are_still_known_after_a_restart() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let script = "echo said; echo kept > $JOB_DIR/keep/file";
    let id = node.submit(&["Done", "[v100]", "-d", script]);
    node.wait_for_outcome(&id, "succeeded");
    node.crash();
    node.restart();
    node.wait_for_outcome(&id, "succeeded");
    assert_eq!(lines_of(&node.log(&id), 0), ["said"]);
    assert_eq!(node.p2pit(&["cp", &id, "keep/file", "-"]).ok(), "kept\n");
}

fn ticks(node: &Node, id: &str) -> usize {
    lines_of(&node.log(id), 0).len()
}

#[track_caller]
fn wait_for_ticks(node: &Node, id: &str, count: usize) {
    wait_until(&format!("{count} ticks"), SOON, || (ticks(node, id) >= count).then_some(()));
}

/// The shell that counts, and not what it starts: it has the script on its command line.
fn counter_of(id: &str) -> Process {
    let shells = of_job(id)
        .into_iter()
        .filter(|it| it.command_line().iter().any(|word| word.contains("echo tick")));
    // A subshell has the same words and a higher number.
    shells.min_by_key(Process::pid).expect("the job runs")
}
