//! What scripts may rely on: exit codes, standard output, JSON.

use p2pit_tests::{Pool, has_namespaces, lines_of, mentioning};
use serde_json::Value;

#[test]
fn a_command_that_waited_for_a_job_ends_with_the_code_of_the_job() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    for (script, code, outcome) in [
        ("true", 0, "succeeded"),
        ("exit 7", 7, "failed(7)"),
        ("kill -KILL $$", 137, "failed(137)"),
        ("no-such-command", 127, "failed(127)"),
    ] {
        let followed = node.p2pit(&["run", "Code", "[v100]", "-l", "-d", script]);
        followed.ended(code);
        let job = node.job("@last");
        let id = job["id"].as_str().unwrap();
        assert_eq!((&job["outcome"], &job["exit_code"]), (&outcome.into(), &code.into()));
        node.p2pit(&["log", id, "-f"]).ended(code);
        // This one waits for nothing.
        node.p2pit(&["log", id]).ended(0);
    }
}

#[test]
fn the_id_alone_is_printed_as_soon_as_a_job_is_submitted() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let ended = node.p2pit(&["run", "Quiet", "[v100]", "-d", "sleep 600"]);
    assert!(ended.stderr.contains("Quiet"), "the talk is on standard error: {}", ended.stderr);
    let stdout = ended.ok();
    let id = stdout.strip_suffix('\n').unwrap();
    assert_eq!(id.split_whitespace().collect::<Vec<_>>(), [id]);
    let job = node.job(id);
    assert_eq!((&job["id"], &job["outcome"]), (&id.into(), &Value::Null));
    // Any unique prefix means the job, too, and so does `@last`.
    assert_eq!(node.job(&id[..6])["id"], id);
    assert_eq!(node.job("@last")["id"], id);
    let put = node.submit(&["--home", node.home().to_str().unwrap(), "Again", "-d", "true"]);
    assert_ne!(put, id);
    node.p2pit(&["put", "Alias", "[]", "-d", "true", "-l"]).ended(0);
    node.p2pit(&["stop", id]).ended(0);
}

#[test]
fn a_ticket_alone_is_printed_by_invite() {
    let pool = Pool::of(&["none"]);
    let printed = pool.node(1).p2pit(&["invite"]).ok();
    let ticket = printed.strip_suffix('\n').unwrap();
    assert!(ticket.starts_with("pit1"), "{ticket}");
    assert!(ticket.bytes().all(|b| b.is_ascii_alphanumeric()), "{ticket}");
}

#[test]
fn listings_print_one_json_value_with_the_promised_fields() {
    let pool = Pool::of(&["sim:2xv100,1xgtx1070", "none"]);
    let node = pool.node(2);
    let id = node.submit(&["Listed", "[v100]", "-d", "sleep 600"]);
    node.wait_for_state(&id, "RUNNING");

    for args in [&["status"][..], &["show", "jobs"]] {
        let jobs = node.json(args);
        let [job] = &jobs.as_array().unwrap()[..] else { panic!("{jobs:#}") };
        assert_eq!(job["id"], id);
        assert_eq!(job["title"], "Listed");
        assert_eq!(job["user"], "anna");
        assert_eq!(job["state"], "RUNNING");
        assert_eq!(job["outcome"], Value::Null);
        assert_eq!(job["request"], "[v100]");
        assert_eq!(job["resources"]["gpus"], 1);
        let [rank] = &job["ranks"].as_array().unwrap()[..] else { panic!("{job:#}") };
        assert_eq!((&rank["node"], &rank["state"]), (&"n1".into(), &"running".into()));
        assert_eq!(rank["gpus"].as_array().unwrap().len(), 1);
    }

    let nodes = node.nodes();
    assert_eq!(nodes.keys().collect::<Vec<_>>(), ["n1", "n2"]);
    assert_eq!((&nodes["n1"]["reach"], &nodes["n2"]["reach"]), (&"online".into(), &"self".into()));
    let gpus = nodes["n1"]["gpus"].as_array().unwrap();
    let models: Vec<&Value> = gpus.iter().map(|gpu| &gpu["model"]).collect();
    assert_eq!(models, ["v100", "v100", "gtx1070"]);
    assert!(gpus.iter().all(|gpu| gpu["simulated"] == true), "{gpus:#?}");

    let n1 = pool.node(1).json(&["show", "node:n1"]);
    let used: Vec<&Value> = n1["gpus"].as_array().unwrap().iter().map(|gpu| &gpu["job"]).collect();
    assert_eq!(used.iter().filter(|job| !job.is_null()).count(), 1, "{n1:#}");

    let table = node.p2pit(&["status"]).ok();
    let heads: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(heads, ["JOB", "S", "SINCE", "UC%", "UM%", "USER", "TITLE", "RESOURCE"]);
    for args in [&["show", "nodes"][..], &["show", "node:n1"], &["show", "me"]] {
        let text = pool.node(1).p2pit(args).ok();
        assert!(text.contains("simulated"), "{text}");
    }
    node.p2pit(&["stop", &id]).ended(0);
    node.wait_for_outcome(&id, "stopped");
    let done = node.json(&["status"]);
    assert_eq!((&done[0]["state"], &done[0]["outcome"]), (&"DONE".into(), &"stopped".into()));
}

#[test]
fn a_command_where_no_daemon_runs_starts_a_client_node_for_itself() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let laptop = pool.add_client("laptop");
    laptop.shut_down();
    assert_eq!(mentioning(laptop.home()).len(), 0);

    let ended = laptop.p2pit(&["run", "On demand", "[v100]", "-d", "echo ran", "-l"]);
    assert!(ended.stderr.contains("starting a client node"), "{}", ended.stderr);
    assert_eq!(lines_of(&ended.ok(), 0), ["ran"]);

    let status = laptop.p2pit(&["status", "--json"]);
    assert!(!status.stderr.contains("starting"), "it is there now: {}", status.stderr);
    assert_eq!(mentioning(laptop.home()).len(), 1);
}

#[test]
fn an_interrupted_follower_leaves_the_job_running_and_says_so() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let script = "echo up; sleep 600";
    let mut follower = node.start(&["run", "Detached", "[v100]", "-l", "-d", script]);
    follower.wait_for("[worker 0] up");
    follower.interrupt();
    let ended = follower.end();
    ended.ended(130);
    assert!(ended.stderr.contains("detached"), "{}", ended.stderr);
    assert_eq!(node.job("@last")["state"], "RUNNING");
    node.p2pit(&["stop", "@last"]).ended(0);
}

#[test]
fn a_log_can_be_read_by_worker_and_while_the_job_runs() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let script = "echo I am $RANK; sleep 600";
    let mut follower = pool.node(1).start(&["run", "Two", "2:[v100]", "-l", "-d", script]);
    follower.wait_for("I am 0");
    follower.wait_for("I am 1");
    let log = pool.node(2).p2pit(&["log", "@last", "--worker", "1"]).ok();
    assert_eq!((lines_of(&log, 1), log.lines().count()), (vec!["I am 1"], 1), "{log}");
    pool.node(2).p2pit(&["stop", "@last"]).ended(0);
    follower.end().ended(143);
}

#[test]
fn a_node_says_how_it_keeps_jobs_apart() {
    let pool = Pool::of(&["none"]);
    let me = pool.node(1).me();
    assert_eq!(me["owner_only"].is_null(), has_namespaces(pool.node(1)), "{me:#}");
}
