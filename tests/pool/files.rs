//! What jobs take with them and what they leave.

use std::fs;

use p2pit_tests::{Node, Pool, lines_of};

#[test]
fn what_a_job_kept_is_listed_and_fetched_from_any_node() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let script = "\
        mkdir -p $JOB_DIR/keep/deep out; echo result > $RESULT_FILE
        echo $RANK > $JOB_DIR/keep/mine-$RANK; echo same > $JOB_DIR/keep/deep/same
        echo rank $RANK > $JOB_DIR/keep/conflict; echo scratch > $JOB_DIR/tmp/gone
        echo artifact > $JOB_DIR/artifacts/report-$RANK
        echo built > out/model; echo forgotten > not-named";
    let args = ["run", "Files", "2:[v100]", "--artifact", "out", "-l", "-d", script];
    pool.node(1).p2pit(&args).ended(0);

    for node in pool.nodes() {
        let paths = |path: &str| {
            let listed = node.json(&["ls", "@last", path]);
            let paths = listed.as_array().unwrap().iter();
            paths.map(|it| it["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(paths(""), ["artifacts", "keep"]);
        assert_eq!(
            paths("keep"),
            ["keep/deep", "keep/mine-0", "keep/mine-1", "keep/rank0", "keep/rank1"]
        );
        assert_eq!(paths("keep/deep"), ["keep/deep/same"]);
        for rank in ["0", "1"] {
            let path = format!("keep/rank{rank}/conflict");
            assert_eq!(node.p2pit(&["cp", "@last", &path, "-"]).ok(), format!("rank {rank}\n"));
        }
        let kept = paths("artifacts");
        assert!(kept.contains(&"artifacts/report-0".to_owned()), "{kept:?}");
        assert!(kept.contains(&"artifacts/report-1".to_owned()), "{kept:?}");
        let model = node.p2pit(&["cp", "@last", "artifacts/out/model", "-"]).ok();
        assert_eq!(model, "built\n");
        node.p2pit(&["cp", "@last", "keep/missing", "-"]).refused(1, &["keep/missing"]);
        node.p2pit(&["cp", "@last", "../keep", "-"]).refused(1, &[]);
    }
    let job = pool.node(2).job("@last");
    assert_eq!(job["ranks"][0]["result"].as_str().map(str::trim_end), Some("result"));
    assert_nothing_is_left(&pool);
}

#[test]
fn copying_overwrites_only_where_that_is_asked_for() {
    let pool = Pool::of(&["sim:1xv100"]);
    let (node, dir) = with_results(&pool);
    node.p2pit(&["cp", "@last", "keep", "results"]).ended(0);
    // Given twice, it makes no second copy inside the first.
    node.p2pit(&["cp", "@last", "keep", "results"]).refused(1, &["there already", "--continue"]);
    node.p2pit(&["cp", "@last", "keep", "results", "-c"]).ended(0);
    assert!(!dir.join("results/keep").exists());
    let file = dir.join("results/a");
    assert_eq!(fs::read_to_string(&file).unwrap(), "first\n");
    assert_eq!(fs::read_to_string(dir.join("results/sub/b")).unwrap(), "second\n");

    fs::write(&file, "mine").unwrap();
    node.p2pit(&["cp", "@last", "keep/a", "results"]).refused(1, &["results/a", "hint: ", "-f"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    node.p2pit(&["cp", "@last", "keep/a", "results", "-f"]).ended(0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "first\n");

    node.p2pit(&["cp", "@last", "keep/sub/b"]).ended(0);
    assert_eq!(fs::read_to_string(dir.join("b")).unwrap(), "second\n");
}

#[test]
fn everything_can_be_downloaded_as_one_archive() {
    let pool = Pool::of(&["sim:1xv100"]);
    let (node, dir) = with_results(&pool);
    node.p2pit(&["download", "@last", "-o", "all.tar.gz"]).ended(0);
    let listing = std::process::Command::new("tar")
        .args(["-xzf", "all.tar.gz", "--strip-components=0"])
        .current_dir(&dir)
        .status()
        .unwrap();
    assert!(listing.success());
    let found = find(&dir, "a");
    assert_eq!(fs::read_to_string(&found[0]).unwrap(), "first\n", "{found:?}");
    node.p2pit(&["download", "@last", "-o", "all.tar.gz"]).refused(1, &["all.tar.gz"]);
    node.p2pit(&["download", "@last", "-o", "all.tar.gz", "--force"]).ended(0);
}

#[test]
fn a_job_goes_on_with_what_another_kept() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    let node = pool.node(1);
    let count = "n=$(($(cat $JOB_DIR/keep/n 2>/dev/null || echo 0) + 1)); \
                 echo $n > $JOB_DIR/keep/n; echo run $n";
    node.p2pit(&["run", "One", "[v100]", "-d", count, "-l"]).ended(0);
    // On another node than the first, so that it has to travel.
    let log = node.p2pit(&["run", "Two", "[gtx1070]", "-c", "@last", "-d", count, "-l"]).ok();
    assert_eq!(lines_of(&log, 0), ["run 2"]);
    let log = pool.node(2).p2pit(&["run", "Three", "[v100]", "-c", "@last", "-d", count, "-l"]);
    assert_eq!(lines_of(&log.ok(), 0), ["run 3"]);
    node.p2pit(&["run", "Four", "-c", "@last", "-d", "true"]).ended(0);
}

#[test]
fn a_gang_of_which_one_process_keeps_can_be_continued_again_and_again() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let node = pool.node(1);
    // Each process begins with a copy; only one of them changes it.
    let script = "n=$(($(cat $JOB_DIR/keep/n 2>/dev/null || echo 0) + 1)); \
                  [ $RANK = 1 ] || echo $n > $JOB_DIR/keep/n; echo run $n";
    node.p2pit(&["run", "One", "2:[v100]", "-d", script, "-l"]).ended(0);
    for run in ["run 2", "run 3"] {
        let log = node.p2pit(&["run", "On", "2:[v100]", "-c", "@last", "-d", script, "-l"]).ok();
        assert_eq!((lines_of(&log, 0), lines_of(&log, 1)), (vec![run], vec![run]));
    }
}

#[test]
fn what_each_process_of_a_gang_kept_comes_together_from_wherever_it_is_continued() {
    let mut pool = Pool::of(&["sim:1xv100", "sim:1xv100"]);
    let client = pool.add_client("laptop");
    let script =
        "cd $JOB_DIR/keep; cat mine-* | sort | tr '\\n' ' '; echo; echo $RANK > mine-$RANK";
    client.p2pit(&["run", "One", "2:[v100]", "-d", script, "-l"]).ended(0);
    let first = client.json(&["show", "jobs"])[0]["id"].as_str().unwrap().to_owned();
    // From a node of neither process, from one of them, and from there once more.
    for node in [&client, pool.node(1), pool.node(1)] {
        let log = node.p2pit(&["run", "On", "2:[v100]", "-c", &first, "-d", script, "-l"]).ok();
        assert_eq!((lines_of(&log, 0), lines_of(&log, 1)), (vec!["0 1 "], vec!["0 1 "]));
    }
}

#[test]
fn only_what_the_pool_does_not_have_travels() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let client = pool.add_client("laptop");
    let big = "x".repeat(1 << 20);
    let dir = pool.job_dir("big", &[(".compute", "#!/bin/sh\nwc -c < big\n"), ("big", &big)]);
    let client = client.working_in(&dir);
    let first = client.json(&["run", "Big", "[v100]"]);
    assert!(first["sent_bytes"].as_u64().unwrap() > 1 << 20, "{first:#}");
    fs::write(dir.join("small"), "new").unwrap();
    let second = client.json(&["run", "Big", "[v100]"]);
    assert!(second["sent_bytes"].as_u64().unwrap() < 1 << 12, "{second:#}");
    let id = second["id"].as_str().unwrap();
    pool.node(1).wait_for_outcome(id, "succeeded");
    assert_eq!(lines_of(&pool.node(1).log(id), 0), ["1048576"]);
}

/// A node working in a directory of its own, and a job that is over and kept two files.
fn with_results(pool: &Pool) -> (Node, std::path::PathBuf) {
    let dir = pool.job_dir("here", &[]);
    let node = pool.node(1).working_in(&dir);
    let script = "cd $JOB_DIR/keep; mkdir sub; echo first > a; echo second > sub/b";
    node.p2pit(&["run", "Results", "[v100]", "-d", script, "-l"]).ended(0);
    (node, dir)
}

/// Neither scratch files nor the submitted directory stay on any node.
#[track_caller]
fn assert_nothing_is_left(pool: &Pool) {
    for node in pool.nodes() {
        for name in ["gone", "not-named", "mine-0", "mine-1"] {
            let left = find(node.home(), name);
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// Every file of this name below `dir`.
fn find(dir: &std::path::Path, name: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(find(&path, name));
        } else if entry.file_name() == name {
            found.push(path);
        }
    }
    found
}
