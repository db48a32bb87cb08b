//! Requests: what fits, what waits, and what never can be.

use p2pit_tests::Pool;

#[test]
fn a_request_that_no_node_can_satisfy_is_refused_with_the_nearest_one_that_fits() {
    let pool = Pool::of(&["sim:2xv100", "sim:1xgtx1070"]);
    let refused = |request: &str, why: &str, nearest: &str| {
        let ended = pool.node(2).p2pit(&["run", "Too much", request, "-d", "true"]);
        ended.refused(1, &[request, why, "hint: ", nearest]);
    };
    refused("[a100]", "no `a100` in the pool", "`[v100]`");
    refused("[4:v100]", "the most is 2", "`[2:v100]`");
    refused("5:[gtx1070]", "", "`[gtx1070]`");
    refused("[999:cpu]", "", "`[4:cpu]`");
    let jobs = pool.node(1).json(&["show", "jobs"]);
    assert_eq!(jobs.as_array().unwrap().len(), 0, "nothing was submitted: {jobs:#}");
}

#[test]
fn a_job_runs_where_the_gpu_is_that_it_asks_for() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    for (request, node) in [("[gtx1070]", "n2"), ("[v100]", "n1"), ("[gpu>=24g]", "n1")] {
        let followed = pool.node(1).p2pit(&["run", "Where", request, "-d", "true", "-l"]);
        followed.ended(0);
        let job = pool.node(1).job("@last");
        assert_eq!(job["ranks"][0]["node"], node, "{request}");
    }
}

#[test]
fn the_request_and_the_script_come_from_the_submitted_directory() {
    let pool = Pool::of(&["sim:2xv100"]);
    let script = "#!/bin/sh\necho \"$CUDA_VISIBLE_DEVICES\"; cat data/input\n";
    let files = [
        (".compute", script),
        (".pitrequest.txt", "[2:v100]\n"),
        ("data/input", "read\n"),
        (".pitignore", "secret\n"),
        ("secret", "never sent\n"),
    ];
    let dir = pool.job_dir("by-file", &files);
    let node = pool.node(1).working_in(&dir);
    let log = node.p2pit(&["run", "By file", "-l"]).ok();
    let said = p2pit_tests::lines_of(&log, 0);
    assert_eq!((said[0].split(',').count(), said[1]), (2, "read"), "{log}");
    let job = node.job("@last");
    assert_eq!((&job["request"], &job["resources"]["gpus"]), (&"[2:v100]".into(), &2.into()));
}

#[test]
fn a_dry_run_says_what_would_be_asked_of_whom_and_submits_nothing() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    let plan = pool.node(2).json(&["run", "Maybe", "[v100]", "-d", "true", "--dry-run"]);
    let candidate = serde_json::json!({ "node": "n1", "processes": 1, "offline_s": null });
    assert_eq!(plan["candidates"], serde_json::json!([candidate]));
    assert_eq!((&plan["title"], &plan["request"]), (&"Maybe".into(), &"[v100]".into()));
    assert_eq!(pool.node(1).json(&["status"]).as_array().unwrap().len(), 0);
}
