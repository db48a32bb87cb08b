//! Processes of one job on several nodes.

use std::fs;

use p2pit_tests::{Pool, lines_of};

#[test]
fn the_processes_of_a_gang_on_two_nodes_talk_to_each_other() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let dir = pool.job_dir("talk", &[(".compute", "#!/bin/sh\nexec ./talk\n")]);
    fs::copy(env!("CARGO_BIN_EXE_p2pit-talk"), dir.join("talk")).unwrap();

    let followed = pool.node(1).working_in(&dir).p2pit(&["run", "Talk", "2:[v100]", "-l"]);
    let log = followed.ok();

    assert_eq!(lines_of(&log, 0), ["heard: process-1 is here"], "{log}");
    assert_eq!(lines_of(&log, 1), ["heard: process 0 greets process-1"], "{log}");
    let job = pool.node(2).job("@last");
    let nodes: Vec<_> = (0..2).map(|rank| job["ranks"][rank]["node"].as_str().unwrap()).collect();
    assert_ne!(nodes[0], nodes[1], "each node has one GPU: {job:#}");
}

#[test]
fn when_one_process_of_a_gang_fails_the_others_are_ended() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let script = "if [ $PROCESS_INDEX = 1 ]; then exit 5; fi; sleep 600";
    let followed = pool.node(1).p2pit(&["run", "Half", "2:[v100]", "-l", "-d", script]);
    followed.ended(5);
    let job = pool.node(1).job("@last");
    assert_eq!(job["outcome"], "failed(5)");
    assert_eq!(job["ranks"][1]["exit_code"], 5);
    assert_eq!(job["ranks"][0]["ending"], "stopped", "{job:#}");
}
