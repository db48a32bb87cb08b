//! More jobs than room.

use p2pit_tests::{Node, Pool, SOON, lines_of, of_job, wait_until};
use rustix::process::Signal;
use serde_json::Value;

/// Runs until it is told to end.
const HOLD: &str = "trap 'exit 0' USR1; while :; do sleep 0.05; done";

/// Says when it begins and when it ends, in seconds.
const STAMPS: &str = "echo $EPOCHREALTIME; sleep 0.2; echo $EPOCHREALTIME";

#[test]
fn more_jobs_than_room_all_run_and_no_gpu_is_given_twice() {
    const JOBS: usize = 12;
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let submitted = (0..JOBS).map(|n| {
        let node = pool.node(1 + n % 2);
        node.submit(&[&format!("Job {n}"), "[v100]", "-d", STAMPS])
    });
    let ids: Vec<String> = submitted.collect();

    let runs: Vec<Run> = ids.iter().map(|id| Run::of(pool.node(1), id)).collect();
    for (i, run) in runs.iter().enumerate() {
        for other in &runs[..i] {
            assert!(run.gpu != other.gpu || !run.overlaps(other), "{run:?} {other:?}");
        }
    }
    let gpus: std::collections::BTreeSet<&str> = runs.iter().map(|run| run.gpu.as_str()).collect();
    assert_eq!(gpus.len(), 2, "both nodes work: {runs:#?}");
}

#[test]
fn a_job_that_waits_says_which_job_is_in_front() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    let node = pool.node(1);
    let first = node.submit(&["First", "[v100]", "-d", HOLD]);
    node.wait_for_state(&first, "RUNNING");
    let second = pool.node(2).submit(&["Second", "[v100]", "-d", "true"]);

    for asked in pool.nodes() {
        let (why, reason) = wait_until("the node says that it is busy", SOON, || {
            let why = asked.json(&["why", &second]);
            let n1 = why["nodes"].as_array().unwrap().iter().find(|it| it["node"] == "n1")?;
            let reason = n1["reason"].as_str().filter(|_| n1["verdict"] == "waits")?.to_owned();
            Some((why, reason))
        });
        assert_eq!((&why["state"], &why["need"]), (&"WAITING".into(), &1.into()), "{why:#}");
        assert!(reason.contains(&first[..4]), "{reason} does not name {first}");
    }
    let waiting = node.job(&second);
    assert_eq!((&waiting["state"], &waiting["outcome"]), (&"WAITING".into(), &Value::Null));
    release(&first);
    node.wait_for_outcome(&second, "succeeded");
}

#[test]
fn a_later_job_does_not_overtake_an_earlier_one() {
    let pool = Pool::of(&["sim:1xv100", "none"]);
    let node = pool.node(1);
    let running = node.submit(&["Running", "[v100]", "-d", HOLD]);
    node.wait_for_state(&running, "RUNNING");
    // From different nodes, so that their records have different stewards.
    let waiting: Vec<String> = (0..4)
        .map(|n| pool.node(1 + n % 2).submit(&[&format!("Wait {n}"), "[v100]", "-d", STAMPS]))
        .collect();
    for id in &waiting {
        node.wait_for_state(id, "WAITING");
    }
    release(&running);
    let runs: Vec<Run> = waiting.iter().map(|id| Run::of(node, id)).collect();
    assert!(runs.is_sorted_by(|a, b| a.end <= b.start), "{runs:#?}");
}

#[test]
fn a_gang_and_jobs_of_one_process_all_get_their_turn() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let node = pool.node(1);
    let running: Vec<String> =
        (0..2).map(|_| node.submit(&["Run", "[v100]", "-d", HOLD])).collect();
    for id in &running {
        node.wait_for_state(id, "RUNNING");
    }
    let gang = node.submit(&["Gang", "2:[v100]", "-d", STAMPS]);
    node.wait_for_state(&gang, "WAITING");
    let later: Vec<String> = (0..3)
        .map(|n| pool.node(1 + n % 2).submit(&[&format!("Later {n}"), "[v100]", "-d", STAMPS]))
        .collect();
    for id in &later {
        node.wait_for_state(id, "WAITING");
    }
    for id in &running {
        release(id);
    }
    let gang = Run::of(node, &gang);
    for id in &later {
        let later = Run::of(node, id);
        assert!(!gang.overlaps(&later), "the gang has both GPUs: {gang:?} {later:?}");
    }
}

/// When the first process of a job ran, by its own clock, and where.
#[derive(Debug)]
struct Run {
    gpu: String,
    start: f64,
    end: f64,
}

impl Run {
    /// Once the job has succeeded.
    #[track_caller]
    fn of(node: &Node, id: &str) -> Self {
        let job = node.wait_for_outcome(id, "succeeded");
        let log = node.log(id);
        let said: Vec<f64> =
            lines_of(&log, 0).iter().filter_map(|line| line.parse().ok()).collect();
        let ([start, end], Some(gpu)) = (&said[..], job["ranks"][0]["gpus"][0].as_str()) else {
            panic!("{log}\n{job:#}");
        };
        Self { gpu: gpu.to_owned(), start: *start, end: *end }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

fn release(id: &str) {
    for process in of_job(id) {
        if process.command_line().iter().any(|word| word.contains("trap")) {
            process.signal(Signal::USR1);
        }
    }
}
