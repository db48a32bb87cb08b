//! Jobs that several nodes keep: what becomes of them when some of these go.

use std::{fs, time::Duration};

use super::transfers::{noise, start_with, switch_off};
use p2pit_tests::{Node, Pool, Process, SOON, lines_of, of_job, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Another keeper takes over 30 s after the steward was heard last, and a few seconds for its
/// place among them; the machine may be busy.
const TAKEN_OVER: Duration = Duration::from_secs(150);
/// Runs until it is told to end.
const HOLD: &str = "trap 'echo told; exit 0' USR1; echo holds; while :; do sleep 0.05; done";
/// As above, and takes its time when it is stopped.
const STOPPABLE: &str = "trap 'exit 0' TERM; echo holds; while :; do sleep 0.05; done";

#[test]
fn a_job_that_waits_is_driven_on_when_the_node_that_drove_it_dies() {
    let pool = Pool::of(&["none", "none", "sim:1xv100"]);
    let (first, second) = (pool.node(1), pool.node(2));
    let occupant = second.submit(&["Occupant", "[v100]", "-d", HOLD]);
    wait_for_line(second, &occupant, "holds");
    let id = first.submit(&["Waits", "[v100]", "-d", "echo ran"]);
    let job = first.wait_for_state(&id, "WAITING");
    assert_eq!((&job["steward"], &job["term"]), (&json!("n1"), &json!(1)), "{job:#}");
    assert_eq!(names(&job["keepers"]), ["n1", "n2", "n3"]);

    first.crash();
    let job = wait_for_another_steward(second, &id, "n1");
    assert_eq!(job["state"], "WAITING", "{job:#}");
    tell(&occupant);
    assert_ended_once(&pool, &[2, 3], &id, "ran");
}

#[test]
fn a_job_that_is_being_prepared_is_driven_on_when_the_node_that_drove_it_dies() {
    let pool = Pool::of(&["none", "none", "none", "sim:1xv100"]);
    let (first, second, worker) = (pool.node(1), pool.node(2), pool.node(4));
    switch_off(&pool, 4);
    let dir = pool.job_dir("prepared", &[]);
    fs::write(dir.join("big"), noise(12 << 20)).unwrap();
    let id = first.working_in(&dir).submit(&["Prepared", "[v100]", "-d", "wc -c < big"]);
    assert_eq!(names(&first.job(&id)["keepers"]), ["n1", "n2", "n3"]);
    start_with(worker, "download: 1MiB/s");
    second.wait_for_state(&id, "PREPARING");

    first.crash();
    let job = wait_for_end(second, &id);
    assert_ne!(job["steward"], "n1", "{job:#}");
    assert_ended_once(&pool, &[2, 3, 4], &id, &(12 << 20).to_string());
}

#[test]
fn a_job_that_runs_goes_on_and_ends_once_when_the_node_that_drove_it_dies() {
    let mut pool = Pool::of(&["none", "none", "sim:1xv100"]);
    let client = pool.add_client("laptop");
    let (first, second) = (pool.node(1), pool.node(2));
    let id = first.submit(&["Runs", "[v100]", "-d", HOLD]);
    let mut follower = client.start(&["log", &id, "-f"]);
    follower.wait_for("holds");

    first.crash();
    let job = wait_for_another_steward(second, &id, "n1");
    assert_eq!((&job["state"], &job["attempt"]), (&json!("RUNNING"), &json!(1)), "{job:#}");
    for node in [second, pool.node(3), &client] {
        let listed = node.json(&["status"]);
        let found = listed.as_array().unwrap().iter().find(|job| job["id"] == id.as_str());
        assert_eq!(found.expect("it is listed")["state"], "RUNNING", "at {}", node.name());
    }
    tell(&id);
    let followed = follower.end();
    followed.ended(0);
    assert_eq!(lines_of(&followed.stdout, 0), ["holds", "told"], "{}", followed.stderr);
    assert_ended_once(&pool, &[2, 3], &id, "told");
}

#[test]
fn a_job_needs_neither_its_submitter_nor_its_steward_once_it_is_submitted() {
    let mut pool = Pool::of(&["none", "none", "none", "sim:1xv100"]);
    let client = pool.add_client("laptop");
    // Off, it neither keeps nor drives the job: only the others have what it needs.
    switch_off(&pool, 4);
    let id = client.submit(&["Left alone", "[v100]", "-d", "echo ran"]);
    client.crash();
    let worker = pool.node(4);
    let steward = pool.node(1).job(&id)["steward"].clone();
    let steward = pool.nodes().iter().find(|node| steward == node.name()).unwrap();
    assert_ne!(steward.name(), "n4");
    steward.crash();
    worker.restart();
    wait_for_end(worker, &id);
    assert_eq!(lines_of(&worker.log(&id), 0), ["ran"]);
}

#[test]
fn a_keeper_that_is_down_from_the_start_keeps_nobody_from_submitting() {
    let pool = Pool::of(&["sim:1xv100", "none", "none"]);
    let (first, second) = (pool.node(1), pool.node(2));
    pool.node(3).crash();
    wait_until_offline(first, &["n3"]);
    let ended = first.p2pit(&["run", "One short", "[v100]", "-d", "echo ran"]);
    ended.ended(0);
    let said = "Kept by: 3 nodes, one of them offline: it does not survive the loss of one";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    let id = ended.stdout.trim_end();
    second.wait_for_outcome(id, "succeeded");
    assert_eq!(names(&second.job(id)["keepers"]), ["n1", "n2", "n3"]);
}

#[test]
fn a_job_gains_keepers_as_its_pool_grows() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let id = pool.node(1).submit(&["Grows", "[v100]", "-d", HOLD]);
    wait_for_line(pool.node(1), &id, "holds");
    let alone = pool.node(1).job(&id);
    assert_eq!((&alone["keepers"], &alone["epoch"]), (&json!(["n1"]), &json!(0)));

    for name in ["n2", "n3"] {
        pool.add(name, &["--gpus", "none"]);
    }
    let job = wait_until("three nodes keep it", TAKEN_OVER, || {
        let job = pool.node(3).job(&id);
        (names(&job["keepers"]) == ["n1", "n2", "n3"]).then_some(job)
    });
    assert!(job["epoch"].as_u64().unwrap() >= 1, "{job:#}");
    assert_eq!((&job["state"], &job["attempt"]), (&json!("RUNNING"), &json!(1)), "{job:#}");
    tell(&id);
    assert_ended_once(&pool, &[1, 2, 3], &id, "told");
}

#[test]
fn a_daemon_that_ends_in_good_order_hands_its_jobs_over_at_once() {
    let pool = Pool::of(&["none", "none", "sim:1xv100"]);
    let (first, second) = (pool.node(1), pool.node(2));
    let id = first.submit(&["Handed over", "[v100]", "-d", HOLD]);
    wait_for_line(second, &id, "holds");
    first.daemon().signal(Signal::TERM);
    // Nobody takes over by itself so soon.
    let job = wait_until("another node drives it", Duration::from_secs(15), || {
        let job = second.job(&id);
        (job["steward"] != "n1").then_some(job)
    });
    assert_eq!((&job["term"], &job["state"]), (&json!(2), &json!("RUNNING")), "{job:#}");
    tell(&id);
    assert_ended_once(&pool, &[2, 3], &id, "told");
}

#[test]
fn a_node_that_leaves_is_replaced_and_the_job_it_drove_goes_on() {
    let pool = Pool::of(&["none", "none", "none", "sim:1xv100"]);
    let first = pool.node(1);
    let id = first.submit(&["Goes on", "[v100]", "-d", HOLD]);
    wait_for_line(first, &id, "holds");
    let ended = first.p2pit(&["leave"]);
    ended.ended(0);
    assert!(ended.stderr.contains("drive 1 of the pool's jobs now"), "{}", ended.stderr);
    let others = [pool.node(2), pool.node(3), pool.node(4)];
    let job = wait_until("three others keep it", TAKEN_OVER, || {
        let job = others[0].job(&id);
        (names(&job["keepers"]) == ["n2", "n3", "n4"]).then_some(job)
    });
    assert_eq!((&job["state"], &job["attempt"]), (&json!("RUNNING"), &json!(1)), "{job:#}");
    tell(&id);
    assert_ended_once(&pool, &[2, 3, 4], &id, "told");
}

#[test]
fn a_node_without_which_a_job_has_no_majority_is_left_only_by_force() {
    let pool = Pool::of(&["none", "sim:1xv100"]);
    let id = pool.node(2).submit(&["Needs both", "[v100]", "-d", HOLD]);
    wait_for_line(pool.node(2), &id, "holds");
    let refused = pool.node(1).p2pit(&["leave"]);
    refused.refused(1, &["kept by too few others", &id[..4], "hint: ", "--force"]);
    tell(&id);
    pool.node(1).wait_for_outcome(&id, "succeeded");
    pool.node(1).p2pit(&["leave"]).ended(0);
}

#[test]
fn a_job_is_recovered_when_two_of_its_three_keepers_are_gone_for_good() {
    let mut pool = Pool::of(&["none", "none", "sim:1xv100"]);
    let client = pool.add_client("laptop");
    let survivor = pool.node(3);
    let id = pool.node(1).submit(&["Recovered", "[v100]", "-d", HOLD]);
    wait_for_line(survivor, &id, "holds");
    let early = survivor.p2pit(&["job", "recover", &id, "--yes"]);
    early.refused(1, &["nothing has to be recovered", "hint: "]);

    for node in [pool.node(1), pool.node(2)] {
        node.crash();
        fs::remove_dir_all(node.home()).unwrap();
    }
    wait_until_offline(survivor, &["n1", "n2"]);
    let soon = survivor.p2pit(&["job", "recover", &id, "--yes"]);
    soon.refused(1, &["n1, n2", "less than a minute", "hint: ", "try again in"]);
    let unsure = wait_until("they have been away for long enough", TAKEN_OVER, || {
        let ended = survivor.p2pit(&["--quiet", "job", "recover", &id]);
        (!ended.stderr.contains("try again in")).then_some(ended)
    });
    unsure.ended(1);
    for part in ["has lost 2 of its 3 keepers", "n1, heard last", "n2, heard last", "--yes"] {
        assert!(unsure.stderr.contains(part), "{part}: {}", unsure.stderr);
    }
    assert_eq!(survivor.job(&id)["recovered"], false);

    // From anywhere: the node that has the record carries it out.
    let done = client.json(&["job", "recover", &id, "--yes"]);
    assert_eq!((&done["from"], &done["keepers"]), (&json!("n3"), &json!(["n3"])), "{done:#}");
    let job = survivor.job(&id);
    assert_eq!((&job["recovered"], &job["steward"]), (&json!(true), &json!("n3")), "{job:#}");
    assert!(survivor.p2pit(&["show", &format!("job:{id}")]).ok().contains("Recovered"));
    tell(&id);
    let job = wait_for_end(survivor, &id);
    assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
}

#[test]
fn a_stranger_to_a_job_cannot_recover_it() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let stranger = pool.add_stranger("bob", &["--client"]);
    let id = pool.node(1).submit(&["Not his", "[v100]", "-d", "true"]);
    pool.node(1).wait_for_outcome(&id, "succeeded");
    let refused = stranger.p2pit(&["job", "recover", &id, "--yes"]);
    refused.refused(1, &["only the owner", "admins"]);
}

#[test]
fn a_job_is_stopped_although_the_node_that_drove_it_is_dead() {
    let pool = Pool::of(&["none", "none", "sim:1xv100"]);
    let (first, second) = (pool.node(1), pool.node(2));
    let id = first.submit(&["Stopped", "[v100]", "-d", STOPPABLE]);
    wait_for_line(second, &id, "holds");
    first.crash();
    let stopped = second.p2pit(&["stop", &id]);
    stopped.ended(0);
    assert!(stopped.stderr.contains("waits for its steward"), "{}", stopped.stderr);
    let job = wait_for_end(second, &id);
    assert_eq!(job["outcome"], "stopped", "{job:#}");
    wait_until("nothing of it runs", SOON, || of_job(&id).is_empty().then_some(()));
}

#[test]
fn a_full_id_that_nobody_keeps_is_known_to_be_none() {
    let pool = Pool::of(&["none", "none"]);
    let id = "a".repeat(52);
    pool.node(1).p2pit(&["show", &format!("job:{id}")]).refused(1, &["keeps job", "hint: "]);
}

#[test]
fn a_full_id_is_not_said_to_be_none_while_a_node_that_could_keep_it_is_off() {
    let pool = Pool::of(&["none", "none"]);
    let first = pool.node(1);
    pool.node(2).crash();
    wait_until_offline(first, &["n2"]);
    let id = "a".repeat(52);
    let asked = first.p2pit(&["show", &format!("job:{id}")]);
    asked.refused(2, &["unknown", "node n2", "hint: ", "show nodes"]);
}

#[test]
fn a_node_that_runs_a_job_is_not_left_although_nobody_that_keeps_the_job_answers() {
    let pool = Pool::of(&["none", "none", "none", "sim:1xv100"]);
    let worker = pool.node(4);
    switch_off(&pool, 4);
    let id = pool.node(1).submit(&["Runs on", "[v100]", "-d", HOLD]);
    worker.restart();
    wait_for_line(pool.node(1), &id, "holds");
    for n in 1..=3 {
        pool.node(n).crash();
    }
    wait_until_offline(worker, &["n1", "n2", "n3"]);
    worker.p2pit(&["leave"]).refused(1, &["jobs run here", &id[..4], "hint: ", "--force"]);
    assert!(!of_job(&id).is_empty(), "it runs on");
    tell(&id);
}

#[test]
fn several_jobs_are_stopped_although_one_of_them_cannot_be() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let id = node.submit(&["Stopped", "[v100]", "-d", STOPPABLE]);
    wait_for_line(node, &id, "holds");
    let stopped = node.p2pit(&["stop", "nosuchjob", &id]);
    stopped.ended(1);
    for part in ["no job `nosuchjob`", "is being stopped"] {
        assert!(stopped.stderr.contains(part), "{part}: {}", stopped.stderr);
    }
    node.wait_for_outcome(&id, "stopped");
}

#[track_caller]
fn wait_until_offline(node: &Node, missed: &[&str]) {
    wait_until("they are missed", SOON, || {
        let nodes = node.nodes();
        missed.iter().all(|name| nodes[*name]["reach"] == "offline").then_some(())
    });
}

fn names(array: &Value) -> Vec<&str> {
    let mut names: Vec<&str> =
        array.as_array().expect("keepers are an array").iter().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names
}

#[track_caller]
fn wait_for_line(node: &Node, id: &str, line: &str) {
    wait_until(&format!("the job says {line}"), SOON, || {
        let log = node.p2pit(&["log", id]).stdout;
        lines_of(&log, 0).contains(&line).then_some(())
    });
}

#[track_caller]
fn wait_for_another_steward(node: &Node, id: &str, than: &str) -> Value {
    wait_until("another node drives it", TAKEN_OVER, || {
        let job = node.job(id);
        (job["steward"] != than).then_some(job)
    })
}

#[track_caller]
fn wait_for_end(node: &Node, id: &str) -> Value {
    wait_until("the job is over", TAKEN_OVER, || {
        let job = node.job(id);
        (job["state"] == "DONE").then_some(job)
    })
}

/// Done at its first attempt, with this one line at the end of its log, as each of the nodes
/// says; and driven by one of them.
#[track_caller]
fn assert_ended_once(pool: &Pool, nodes: &[usize], id: &str, last_line: &str) {
    for n in nodes {
        let node = pool.node(*n);
        let job = wait_for_end(node, id);
        assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
        let log = node.log(id);
        let said = lines_of(&log, 0);
        assert_eq!(said.iter().filter(|line| **line == last_line).count(), 1, "{said:?}");
        assert_eq!(said.last(), Some(&last_line), "{said:?}");
        let driven_by = job["steward"].as_str().expect("a job has a steward");
        assert!(nodes.iter().any(|n| pool.node(*n).name() == driven_by), "{job:#}");
    }
}

/// The holder's shell has the script on its command line, and so has no process it starts.
#[track_caller]
fn tell(id: &str) {
    let shells = of_job(id)
        .into_iter()
        .filter(|it| it.command_line().iter().any(|word| word.contains("echo told")));
    shells.min_by_key(Process::pid).expect("the job runs").signal(Signal::USR1);
}
