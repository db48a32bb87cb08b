//! What a job wrote and left, when the machines that have it are gone.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::transfers::{files_below, start_with, switch_off};
use p2pit_tests::{Node, Pool, SOON, end_all, lines_of, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

/// What others may miss of a log whose node is lost: it is read about every two seconds, and
/// the machine may be busy.
const LOG_BEHIND: Duration = Duration::from_secs(3);
/// A copy is read where a node says nothing, before the connection to it is given up after 30 s.
const READ_WITHIN: Duration = Duration::from_secs(20);
/// A node is given up 202 s after its last lease, and the steward has to be heard.
const GIVEN_UP: Duration = Duration::from_secs(330);
/// The holder that left is missed at once, and the copy is small.
const REPAIRED: Duration = Duration::from_secs(60);

const LEAVES: &str = "echo step 1; echo model > ../keep/model; \
                      echo plot > ../artifacts/plot; echo step 2";

/// Three keepers, and a fourth node that runs the job and keeps nothing of it.
fn pool_with_worker() -> Pool {
    Pool::of(&["none", "none", "none", "sim:1xv100"])
}

/// Submits from the first node, with the first three as keepers.
fn submit_kept_by_others(pool: &Pool, worker: usize, args: &[&str]) -> String {
    switch_off(pool, worker);
    wait_for_each_other(pool, 3);
    let id = pool.node(1).submit(args);
    assert_eq!(names(&pool.node(1).job(&id)["keepers"]), ["n1", "n2", "n3"]);
    pool.node(worker).restart();
    id
}

/// Until the first nodes of a pool reach each other: else others are chosen as keepers.
fn wait_for_each_other(pool: &Pool, first: usize) {
    for node in &pool.nodes()[..first] {
        wait_until(&format!("{} reaches the others", node.name()), SOON, || {
            let seen = node.nodes();
            let online = |other: &Node| seen[other.name()]["reach"] == "online";
            let mut others = pool.nodes()[..first].iter().filter(|it| it.name() != node.name());
            others.all(online).then_some(())
        });
    }
}

/// As if the machine had burnt down.
fn lose(node: &Node) {
    end_all(node.home());
    fs::remove_dir_all(node.home()).expect("nothing uses it any more");
}

#[test]
fn results_and_log_are_read_after_the_node_that_ran_the_job_is_gone_for_good() {
    let pool = pool_with_worker();
    let id = submit_kept_by_others(&pool, 4, &["Leaves", "[v100]", "-d", LEAVES]);
    let first = pool.node(1);
    let job = first.wait_for_outcome(&id, "succeeded");
    let rank = &job["ranks"][0];
    let holders = names(&rank["holders"]);
    assert_eq!((holders.len(), holders.contains(&"n4")), (2, true), "{rank:#}");
    let shown = first.p2pit(&["show", &format!("job:{id}")]).ok();
    assert!(shown.contains("log and results on n4, n"), "{shown}");
    let before = first.log(&id);

    lose(pool.node(4));
    for n in 1..=3 {
        let node = pool.node(n);
        let read = node.p2pit(&["log", &id]);
        read.ended(0);
        assert_eq!(lines_of(&read.stdout, 0), ["step 1", "step 2"], "{}", read.stderr);
        assert_eq!(node.p2pit(&["cp", &id, "keep/model", "-"]).ok(), "model\n");
        let listed = node.p2pit(&["ls", &id]).ok();
        assert!(listed.contains("keep") && listed.contains("artifacts"), "{listed}");
    }
    // All that the log said before; only what was added when its directories were removed may
    // have come after the copy was complete.
    let after = first.log(&id);
    for line in before.lines().filter(|line| !line.contains("[clean]")) {
        assert!(after.contains(line), "{line}\n{after}");
    }
    // What it kept is begun with, too.
    let next = first.submit(&["Goes on", "[]", "-c", &id, "-d", "cat ../keep/model"]);
    first.wait_for_outcome(&next, "succeeded");
    assert_eq!(lines_of(&first.log(&next), 0), ["model"]);
}

#[test]
fn the_log_of_a_running_job_is_read_from_a_keeper_when_its_node_hangs() {
    let mut pool = pool_with_worker();
    let client = pool.add_client("laptop");
    let count = "n=0; while :; do n=$((n + 1)); echo tick $n; sleep 0.1; done";
    let id = submit_kept_by_others(&pool, 4, &["Counts", "[v100]", "-d", count]);
    let (first, worker) = (pool.node(1), pool.node(4));
    wait_until("it has run for a while", SOON, || {
        let log = first.p2pit(&["log", &id]).stdout;
        (lines_of(&log, 0).len() > 60).then_some(())
    });
    let mut follower = client.start(&["log", &id, "-f"]);
    follower.wait_for("tick 60");
    // The daemon and all that runs below it, as a machine that swaps itself to death.
    let daemon = worker.daemon();
    daemon.signal(Signal::STOP);
    let stopped_ms = wall_ms();
    let read = wait_until("a keeper's copy is read", READ_WITHIN, || {
        let read = first.p2pit(&["log", &id]);
        read.stderr.contains("does not answer").then_some(read)
    });
    read.ended(0);
    assert!(read.stderr.contains("node n4 does not answer"), "{}", read.stderr);
    let last_ms = last_line_ms(&read.stdout);
    let behind = Duration::from_millis(stopped_ms.saturating_sub(last_ms));
    assert!(behind < LOG_BEHIND, "{behind:?} of the log are missing:\n{}", read.stdout);
    let counted = lines_of(&read.stdout, 0);
    let expected: Vec<String> = (1..=counted.len()).map(|n| format!("tick {n}")).collect();
    assert_eq!(counted, expected, "nothing in between is missing");

    // Who followed it all the time sees each line once when the node is back.
    daemon.signal(Signal::CONT);
    let next = format!("tick {}", counted.len() + 100);
    wait_until("it is followed on", SOON, || follower.stdout().contains(&next).then_some(()));
    first.p2pit(&["stop", &id]).ended(0);
    let followed = follower.end();
    let seen = lines_of(&followed.stdout, 0);
    let expected: Vec<String> = (1..=seen.len()).map(|n| format!("tick {n}")).collect();
    assert_eq!(seen, expected, "{}", followed.stderr);
}

#[test]
fn a_job_that_is_tried_again_begins_with_what_the_last_attempt_kept() {
    let pool = Pool::of(&["sim:1xv100", "none", "none"]);
    let node = pool.node(2);
    let script = "cd ../keep; n=$(cat count 2>/dev/null || echo 0); echo found $n; \
                  echo $((n + 1)) > count; test $n -ge 2";
    let id = node.submit(&["Again", "[v100]", "--retries", "5", "-d", script]);
    let job = node.wait_for_outcome(&id, "succeeded");
    assert_eq!(job["attempt"], 3, "{job:#}");
    let log = node.log(&id);
    assert_eq!(lines_of(&log, 0), ["found 0", "found 1", "found 2"], "of all attempts");
    assert!(log.contains("[prepare] begins with keep/ of attempt 2"), "{log}");
    assert_eq!(node.p2pit(&["cp", &id, "keep/count", "-"]).ok(), "3\n");
}

#[test]
fn a_training_goes_on_from_its_copied_checkpoint_when_its_node_never_returns() {
    let pool = Pool::of(&["none", "none", "none", "sim:1xv100", "sim:1xv100"]);
    for n in [4, 5] {
        switch_off(&pool, n);
    }
    let first = pool.node(1);
    // A step a second; each checkpoint is whole before it has its name.
    let script = "cd ../keep; n=$(cat step 2>/dev/null || echo 0); echo begins at $n; \
                  while test $n -lt $((GOAL)); do sleep 0.2; n=$((n + 1)); echo $n > new; \
                  mv new step; echo step $n; done";
    let script = script.replace("$((GOAL))", "100000");
    let args = ["Trains", "[v100]", "--retries", "1", "--keep-every", "1s", "-d", &script];
    wait_for_each_other(&pool, 3);
    let id = first.submit(&args);
    assert_eq!(names(&first.job(&id)["keepers"]), ["n1", "n2", "n3"]);
    pool.node(4).restart();
    wait_until("its keep/ was copied some times", SOON, || {
        let job = first.job(&id);
        let saves = job["ranks"][0]["copies"]["saves"].as_array()?;
        saves.iter().any(|save| save["seq"].as_u64() >= Some(5)).then_some(())
    });
    let stepped = lines_of(&first.log(&id), 0).len() - 1;
    pool.node(5).restart();
    lose(pool.node(4));

    // Meanwhile its files are read from the copy.
    let read = first.p2pit(&["cp", &id, "keep/step", "-"]);
    read.ended(0);
    assert!(read.stderr.contains("is a copy that node n"), "{}", read.stderr);
    let copied: usize = read.stdout.trim().parse().unwrap();

    let job = wait_until("it runs again", GIVEN_UP, || {
        let job = first.job(&id);
        let runs = job["attempt"] == 2 && job["state"] == "RUNNING";
        runs.then_some(job)
    });
    assert_eq!(job["ranks"][0]["node"], "n5", "{job:#}");
    let log = wait_until("it says where it begins", SOON, || {
        let log = first.p2pit(&["log", &id]).stdout;
        (log.matches("begins at").count() == 2).then_some(log)
    });
    let begun = lines_of(&log, 0).into_iter().filter_map(|line| line.strip_prefix("begins at "));
    let begun: Vec<usize> = begun.map(|step| step.parse().unwrap()).collect();
    assert_eq!(begun[0], 0);
    // A second and the way there are five steps and some; of 0.2 s, on a busy machine.
    assert!(begun[1] >= copied && begun[1] + 25 >= stepped, "{begun:?} of {stepped}");
    assert!(log.contains("[prepare] begins with keep/ of attempt 1"), "{log}");
    first.p2pit(&["stop", &id]).ended(0);
}

#[test]
fn what_went_bad_on_a_holder_or_where_the_job_ran_is_brought_again() {
    let pool = pool_with_worker();
    let id = submit_kept_by_others(&pool, 4, &["Leaves", "[v100]", "-d", LEAVES]);
    let job = pool.node(1).wait_for_outcome(&id, "succeeded");
    let holders = names(&job["ranks"][0]["holders"]);
    let holder = holders.iter().find(|name| **name != "n4").expect("n4 ran it");
    let holder = (1..=3).map(|n| pool.node(n)).find(|node| node.name() == *holder).unwrap();
    let list = job["ranks"][0]["keep"].as_str().unwrap().to_owned();
    let whole = |node: &Node| {
        let is_list = |path: &Path| path.ends_with(&list);
        let [model, list] =
            [blob_of(node, |path| fs::read(path).unwrap() == b"model\n"), blob_of(node, is_list)];
        model.is_some() && list.is_some()
    };
    let runner = pool.node(4);
    for (node, other) in [(holder, runner), (runner, holder)] {
        assert!(whole(node));
        let model = blob_of(node, |path| fs::read(path).unwrap() == b"model\n").unwrap();
        fs::write(&model, "noise\n").unwrap();
        // Nobody else has it just now.
        other.shut_down();
        wait_until("that it is bad is found out", SOON, || {
            drop(node.p2pit(&["cp", &id, "keep/model", "-"]));
            (!model.exists()).then_some(())
        });
        other.restart();
        wait_until("it is there again", REPAIRED, || whole(node).then_some(()));
    }
}

/// A blob of a node for which `is_it`.
fn blob_of(node: &Node, is_it: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let entries = |dir: &Path| {
        let entries = fs::read_dir(dir).expect("directories of blobs stay");
        entries.map(|entry| entry.expect("it can be listed").path())
    };
    let dirs = entries(&node.home().join("blobs"));
    let dirs = dirs.filter(|dir| dir.file_name().is_some_and(|name| name.len() == 2));
    dirs.flat_map(|dir| entries(&dir).collect::<Vec<_>>())
        .filter(|path| path.extension().is_none())
        .find(|path| is_it(path))
}

#[test]
fn a_copy_that_takes_longer_than_the_next_takes_to_be_made_is_brought_to_its_end() {
    let pool = pool_with_worker();
    for n in 1..=3 {
        pool.node(n).shut_down();
        start_with(pool.node(n), "download: 2MiB/s");
    }
    // Three pieces, which take 17 s: the last is asked for when the first is there.
    let script =
        "while head -c 35000000 /dev/urandom > new && mv new ../keep/big; do sleep 2; done";
    let args = ["Large", "[v100]", "--keep-every", "1s", "-d", script];
    let id = submit_kept_by_others(&pool, 4, &args);
    let save_of = |node: &Node, below: &str| {
        let lists = files_below(&node.home().join(below));
        let list = lists.into_iter().find(|path| path.ends_with("save.json"))?;
        let save: Value = serde_json::from_slice(&fs::read(list).ok()?).ok()?;
        save["seq"].as_u64()
    };
    let copied = wait_until("a keeper has a copy", Duration::from_secs(180), || {
        (1..=3).find_map(|n| save_of(pool.node(n), "copies"))
    });
    let newest = save_of(pool.node(4), "jobs").expect("it was taken");
    assert!(newest >= copied + 4, "{newest} was taken while {copied} came: it proves nothing");
    pool.node(1).p2pit(&["stop", &id]).ended(0);
}

#[test]
fn when_a_holder_leaves_another_keeper_makes_the_copy() {
    let pool = pool_with_worker();
    let id = submit_kept_by_others(&pool, 4, &["Leaves", "[v100]", "-d", LEAVES]);
    let job = pool.node(1).wait_for_outcome(&id, "succeeded");
    let holder = names(&job["ranks"][0]["holders"]).into_iter().find(|name| *name != "n4");
    let holder = holder.expect("a keeper holds it").to_owned();
    let leaving = pool.nodes().iter().find(|node| node.name() == holder).unwrap();
    let asked = pool.nodes().iter().find(|node| node.name() != holder).unwrap();
    leaving.p2pit(&["leave"]).ended(0);
    wait_until("another keeper has it", REPAIRED, || {
        let job = asked.job(&id);
        let holders = names(&job["ranks"][0]["holders"]);
        (holders.len() >= 2 && !holders.contains(&holder.as_str())).then_some(())
    });
    lose(pool.node(4));
    assert_eq!(lines_of(&asked.log(&id), 0), ["step 1", "step 2"]);
    assert_eq!(asked.p2pit(&["cp", &id, "keep/model", "-"]).ok(), "model\n");
}

#[test]
fn a_node_is_not_left_before_others_have_what_only_it_has() {
    const BYTES: usize = 2 << 20;
    let pool = pool_with_worker();
    switch_off(&pool, 4);
    for n in 1..=3 {
        pool.node(n).shut_down();
        start_with(pool.node(n), "download: 256KiB/s");
    }
    let (first, worker) = (pool.node(1), pool.node(4));
    let writes = format!("head -c {BYTES} /dev/urandom > ../artifacts/big; echo wrote");
    let id = first.submit(&["Large", "[v100]", "-d", &writes]);
    worker.restart();
    first.wait_for_state(&id, "CLEANING");
    let why = first.p2pit(&["why", &id]).ok();
    assert!(why.contains("being copied"), "{why}");
    let left = worker.p2pit(&["leave"]);
    left.ended(0);
    assert!(left.stderr.contains("others are copying"), "{}", left.stderr);

    first.wait_for_outcome(&id, "succeeded");
    let copied = pool.path().join("big");
    first.p2pit(&["cp", &id, "artifacts/big", copied.to_str().unwrap()]).ended(0);
    assert_eq!(fs::metadata(&copied).unwrap().len(), BYTES as u64);
    assert_eq!(lines_of(&first.log(&id), 0), ["wrote"]);
}

/// When the last line of a log was written, by its own clock.
fn last_line_ms(log: &str) -> u64 {
    let line = log.lines().rfind(|line| line.contains("[worker 0]")).expect("it said something");
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (stamp, _) = stamp.expect("a line begins with its time");
    let stamp: jiff::Timestamp = stamp.parse().expect("it is a time");
    u64::try_from(stamp.as_millisecond()).expect("it is of this age")
}

fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is set");
    u64::try_from(since.as_millis()).expect("it is of this age")
}

fn names(array: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = array
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    names.sort_unstable();
    assert_ne!(*array, json!(null), "it is not said");
    names
}
