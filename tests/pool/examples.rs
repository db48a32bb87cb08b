//! The examples, run as their first lines say.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use p2pit_tests::{Node, Pool, has_torch, lines_of, python_packages, wait_until};
use serde_json::Value;

/// Packages are unpacked by jobs, on a machine that may be busy with all other tests.
const INSTALLED_WITHIN: Duration = Duration::from_secs(600);

#[test]
fn two_processes_on_two_nodes_learn_digits_and_later_jobs_go_on() {
    let Some(packages) = python_packages() else { return };
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    for node in pool.nodes() {
        copy_files(&packages, &node.home().join("data/shared/wheels"));
    }
    let node = &pool.node(1).working_in(&example("digits"));
    let run = |title: &str, epochs: usize, continued: &[&str]| {
        let epochs = format!("EPOCHS={epochs}");
        let args = [title, "2:[v100]", "--env", "PIP_NO_INDEX=1", "--env", &epochs];
        run(node, &[&args, continued].concat())
    };

    let (job, log) = run("Digits", 10, &[]);
    let nodes: BTreeSet<_> = (0..2).map(|rank| job["ranks"][rank]["node"].as_str()).collect();
    assert_eq!(nodes.len(), 2, "{job:#}");
    assert_eq!(parameters(&log, 0), parameters(&log, 1));
    let result = job["ranks"][0]["result"].as_str().unwrap_or_default();
    assert!(result.contains("after 10 epochs"), "{job:#}");

    // Fetched by the node that did not run rank 0.
    let dir = pool.job_dir("results", &[]);
    let other = pool.nodes().iter().find(|it| job["ranks"][0]["node"] != it.name());
    let other = other.expect("there are two nodes").working_in(&dir);
    other.p2pit(&["cp", "@last", "artifacts", "first"]).ended(0);
    let read = |path: &str| fs::read(dir.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert!(read("first/loss.png").starts_with(b"\x89PNG"));
    assert!(read("first/model.npz").starts_with(b"PK"));
    let table = String::from_utf8(read("first/metrics.csv")).unwrap();
    assert_eq!(table.lines().count(), 1 + 10, "{table}");
    let first = epochs(&read("first/metrics.json"));
    assert_eq!(first.len(), 10);
    let accuracy = first[9]["test_accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.9, "{accuracy}");
    let loss = |epoch: &Value| epoch["train_log_loss"].as_f64().unwrap();
    assert!(loss(&first[9]) < loss(&first[0]) / 2.0, "{first:#?}");

    // The second job finds what rank 0 of the first kept, the third that of the second.
    for (title, from, to) in [("More", 11, 12), ("Still more", 13, 13)] {
        let (_, log) = run(title, to, &["-c", "@last"]);
        for rank in 0..2 {
            let said = lines_of(&log, rank);
            let expected = format!("from epoch {from} to {to}");
            assert!(said.iter().any(|line| line.ends_with(&expected)), "{expected}: {said:#?}");
        }
        assert_eq!(parameters(&log, 0), parameters(&log, 1));
        let more = node.p2pit(&["cp", "@last", "artifacts/metrics.json", "-"]).ok();
        let more = epochs(more.as_bytes());
        assert_eq!((more.len(), &more[..10]), (to, &first[..]));
    }
}

#[test]
fn torch_finds_its_peers_by_what_a_process_is_told() {
    if !has_torch() {
        return;
    }
    let pool = Pool::of(&["sim:2xv100", "sim:1xv100"]);
    let node = pool.node(1).working_in(&example("torchrun"));
    let (_, log) = run(&node, &["Torch", "3:[v100]"]);
    for rank in 0..3 {
        let said = lines_of(&log, rank);
        assert!(said.contains(&"all 3 processes agree"), "{said:#?}");
    }
}

#[test]
fn examples_that_install_packages_do_it_alike() {
    let read = |name: &str| fs::read_to_string(example(name).join("venv.sh")).unwrap();
    assert!(read("digits") == read("torchrun"), "venv.sh of one example was changed");
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name)
}

/// The job, which succeeded, and its log.
#[track_caller]
fn run(node: &Node, args: &[&str]) -> (Value, String) {
    let id = node.submit(args);
    wait_until(&format!("job {id} is over"), INSTALLED_WITHIN, || {
        (node.job(&id)["state"] == "DONE").then_some(())
    });
    (node.wait_for_outcome(&id, "succeeded"), node.log(&id))
}

/// The digest of a process's network at its end.
#[track_caller]
fn parameters(log: &str, rank: u32) -> &str {
    let said = lines_of(log, rank);
    let line = said.iter().find_map(|line| line.strip_prefix("parameters "));
    let line = line.unwrap_or_else(|| panic!("rank {rank} did not come to its end: {said:#?}"));
    line.split_once(": the same in all 2 processes").expect("they are compared").0
}

#[track_caller]
fn epochs(metrics: &[u8]) -> Vec<Value> {
    let metrics: Value = serde_json::from_slice(metrics).expect("the metrics are JSON");
    metrics["epochs"].as_array().expect("there are epochs").clone()
}

#[track_caller]
fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a home can be written to");
    let entries = fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    for entry in entries {
        let entry = entry.expect("the directory can be read");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a file can be copied");
    }
}
