//! What is promised while daemons, machines and networks fail: each node on a machine of its
//! own, in a world of the harness.
//!
//! These mostly wait: for another steward (about 45 s), for a lease to run out (about 200 s).
//! `.ci/run` runs them all at the same time; by hand, with all of them in view:
//!
//! ```sh
//! cargo build --bin p2pit
//! cargo test -p p2pit-tests --test pool -- --test-threads 12 faults::
//! ```

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use super::transfers::noise;
use p2pit_tests::{
    Delay, Node, Process, SOON, SmallDisk, WALL_CLOCK_OFF_MS, World, lines_of, of_job, program,
    wait_until,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Another keeper takes over about 43 s after the last word of a steward, and the machine may
/// be busy with other worlds.
const TAKEN_OVER: Duration = Duration::from_secs(150);
/// A lease runs out 202 s after its node was heard last; then the job is auctioned anew.
const RUN_AGAIN: Duration = Duration::from_secs(400);
/// Of the partitions here.
const CUT: Duration = Duration::from_secs(60);

/// Counts aloud until it is told to end.
const COUNT: &str = "trap 'echo told; exit 0' USR1; \
                     n=0; while :; do n=$((n + 1)); echo tick $n; sleep 0.2; done";
/// Runs until its machine is gone; an attempt that finds the mark of the test ends.
const FIRST_NEVER_ENDS: &str = "if [ ! -e /mnt/again ]; then echo first; sleep 3600; fi; hostname";

/// Counts in `keep/`; an attempt that finds the mark of the test goes on by one, and ends.
const TRAIN: &str = r#"
cd "$JOB_DIR/keep"
if [ ! -e /mnt/again ]; then
    n=0
    while :; do n=$((n + 1)); echo $n > new; mv new step; echo step $n; sleep 0.2; done
fi
n=$(cat step); echo "goes on from $n"; echo $((n + 1)) > step; echo "ended on $(hostname)"
"#;

#[test]
fn machines_form_a_pool_and_nothing_of_them_stays() {
    let Some(world) = World::of(&["sim:1xv100", "none"]) else { return };
    let job = world.named("n2").submit(&["Where", "[v100]", "-d", "hostname; sleep 600"]);
    wait_for_line(world.named("n2"), &job, "n1");
    let mut processes = of_job(&job);
    processes.extend(world.nodes().iter().map(Node::daemon));
    assert!(processes.len() > 2);
    let path = world.path().to_owned();
    drop(world);
    assert!(processes.iter().all(Process::has_ended));
    assert!(!path.exists());
}

/// The faults themselves: each is felt while it lasts, and no longer.
#[test]
fn a_job_comes_through_lines_that_are_slow_late_and_lose_packets() {
    let Some(mut world) = World::of(&["none", "sim:1xv100", "none"]) else { return };
    let (first, second) = (world.named("n1").clone(), world.named("n2").clone());
    // Where every packet overtakes another, QUIC takes all for lost: few are early here.
    let by = Duration::from_millis(40);
    let delay = Delay { by, jitter: Duration::ZERO, early_per_mille: 20 };
    let is_late = world.delay("n1", delay) && world.delay("n2", delay);
    println!("packets are late: {is_late}");
    world.slow("n3", Some("16mbit"));
    world.lose("n2", 10);

    let content = noise(1 << 20);
    let dir = world.job_dir("input", &[]);
    fs::write(dir.join("big"), &content).unwrap();
    let script = "cp big \"$JOB_DIR/artifacts/copy\"; wc -c < big";
    let job = first.working_in(&dir).submit(&["Bad lines", "[v100]", "-d", script]);
    let over = wait_for_end(&first, &job);
    assert_eq!(over["outcome"], "succeeded", "{over:#}");
    assert_eq!(lines_of(&first.log(&job), 0), [content.len().to_string()]);
    let copied = world.job_dir("output", &[]);
    first.working_in(&copied).p2pit(&["cp", &job, "artifacts/copy", "."]).ended(0);
    assert!(fs::read(copied.join("copy")).unwrap() == content);

    assert!(world.dropped() > 0, "packets were lost");
    if let Some((carried, overtaken)) = world.relayed() {
        assert!(carried > 0 && overtaken > 0, "{overtaken} of {carried} overtook another");
    }
    assert!(second.daemon_process().is_some());
    world.heal();
    world.slow("n3", None);
    world.wait_until_assembled_within(TAKEN_OVER);
    assert_eq!(world.dropped(), 0);
}

/// One machine drives a job that waits, one that starts and one that runs.
#[test]
fn jobs_that_wait_start_and_run_go_on_when_the_machine_that_drove_them_goes_out() {
    let Some(mut world) = World::of(&["none", "sim:1xv100", "sim:2xgtx1070"]) else { return };
    let (first, second) = (world.named("n1").clone(), world.named("n2").clone());
    let (first, second) = (&first, &second);
    let runs = first.submit(&["Runs", "[v100]", "-d", COUNT]);
    wait_for_ticks(second, &runs, 2);
    let waits = first.submit(&["Waits", "[v100]", "-d", "echo ran"]);
    // Its input takes its time to where it is going to run.
    world.slow("n3", Some("3mbit"));
    let dir = world.job_dir("input", &[]);
    fs::write(dir.join("big"), noise(12 << 20)).unwrap();
    let starts = first.working_in(&dir).submit(&["Starts", "2:[gtx1070]", "-d", "wc -c < big"]);
    first.wait_for_state(&waits, "WAITING");
    first.wait_for_state(&starts, "PREPARING");
    for job in [&runs, &waits, &starts] {
        let job = first.job(job);
        assert_eq!((&job["steward"], &job["term"]), (&json!("n1"), &json!(1)), "{job:#}");
    }

    world.power_off("n1");
    let off = Instant::now();
    for job in [&runs, &waits, &starts] {
        let job = wait_until("another node drives it", TAKEN_OVER, || {
            let job = second.job(job);
            (job["steward"] != "n1").then_some(job)
        });
        println!("{} is driven by {} after {:?}", job["title"], job["steward"], off.elapsed());
    }
    let seen = ticks(second, &runs);
    wait_for_ticks(second, &runs, seen + 3);
    world.slow("n3", None);
    tell(&runs);
    for job in [&runs, &waits, &starts] {
        wait_for_all_ended(second, job);
    }
    // What they left may have to wait for the third that keeps it.
    world.boot("n1");
    first.restart();
    for job in [&runs, &waits, &starts] {
        for node in world.nodes() {
            let job = wait_for_end(node, job);
            let said = (&job["outcome"], &job["attempt"]);
            assert_eq!(said, (&json!("succeeded"), &json!(1)), "{job:#}");
        }
    }
    for rank in 0..2 {
        assert_eq!(lines_of(&second.log(&starts), rank), [(12 << 20).to_string()]);
    }
    assert_counted(second, &runs, 0);
    assert_eq!(lines_of(&second.log(&waits), 0), ["ran"]);
}

/// After the wipe two of three keepers are left; once the record has three again, one of those
/// two goes as well.
#[test]
fn a_record_outlives_the_wiped_disk_of_one_keeper_and_then_the_loss_of_another() {
    let Some(mut world) = World::of(&["none", "none", "sim:1xv100"]) else { return };
    let [first, second, third] = ["n1", "n2", "n3"].map(|name| world.named(name).clone());
    let [first, second, third] = [&first, &second, &third];
    let job = first.submit(&["Kept", "[v100]", "-d", COUNT]);
    wait_for_ticks(first, &job, 2);
    assert_eq!(names(&first.job(&job)["keepers"]), ["n1", "n2", "n3"]);

    second.crash();
    wipe(second);
    let ticket = first.invite();
    second.join(Some(&ticket), &["--listen", "10.77.2.2:4001", "--gpus", "none"]).ended(0);
    wait_until("three stores keep it again", TAKEN_OVER, || {
        let job = first.job(&job);
        let again = job["epoch"].as_u64() > Some(0);
        (again && names(&job["keepers"]) == ["n1", "n2", "n3"]).then_some(())
    });

    world.power_off("n1");
    wait_for_another_steward(second, &job, "n1");
    let seen = ticks(third, &job);
    wait_for_ticks(third, &job, seen + 3);
    tell(&job);
    wait_for_all_ended(second, &job);
    // What it left may have to wait for the third that keeps it.
    world.boot("n1");
    first.restart();
    for node in world.nodes() {
        let job = wait_for_end(node, &job);
        assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
    }
    assert_counted(third, &job, 0);
}

/// What the steward cannot write down it does not say, and so another does.
#[test]
fn a_job_ends_although_the_disk_of_the_machine_that_drives_it_is_full() {
    let Some(mut world) = World::empty() else { return };
    let Some(disk) = SmallDisk::mount(&world.path().join("n1"), 128 << 20) else { return };
    for (name, gpus) in [("n1", "none"), ("n2", "none"), ("n3", "sim:1xv100")] {
        world.add(name, &["--gpus", gpus, "--cpus", "4"]);
    }
    world.wait_until_assembled_within(TAKEN_OVER);
    let [first, second, third] = world.nodes() else { panic!("three nodes") };
    let job = first.submit(&["Driven", "[v100]", "-d", COUNT]);
    wait_for_ticks(second, &job, 2);
    let daemon = first.daemon().pid();
    disk.fill(0);
    tell(&job);
    for node in [second, third] {
        wait_for_all_ended(node, &job);
    }
    disk.free();
    for node in world.nodes() {
        let job = wait_for_end(node, &job);
        assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
    }
    assert_eq!(first.daemon().pid(), daemon);
    assert_counted(first, &job, 0);
}

/// Whatever the command says, it is true, and the same directory can be submitted again.
#[test]
fn a_submitter_that_is_cut_off_in_the_middle_learns_what_became_of_it() {
    let Some(mut world) = World::of(&["sim:1xv100", "none", "none"]) else { return };
    let laptop = add_laptop(&mut world);
    let dir = world.job_dir("input", &[]);
    let content = noise(8 << 20);
    fs::write(dir.join("big"), &content).unwrap();
    let laptop = laptop.working_in(&dir);
    world.slow("laptop", Some("8mbit"));
    let submission = ["run", "Cut off", "[v100]", "-d", "wc -c < big"];
    let running = laptop.start(&submission);
    wait_for_a_part(&world);
    world.isolate("laptop");
    // The line comes back after a while, or only for another try.
    let ended = running.end();
    assert!(world.dropped() > 0);
    world.heal();
    world.slow("laptop", None);
    println!("cut off in the middle, it ended with {}: {}", ended.code, ended.stderr);
    let mut jobs = Vec::new();
    if ended.code == 0 {
        jobs.push(ended.stdout.trim_end().to_owned());
    } else {
        assert!(ended.stderr.contains("error: ") && ended.stderr.contains("hint: "), "{ended:?}");
        if let Some(job) = full_id(&ended.stderr) {
            // Unknown: a node that answers knows, once all can be heard.
            wait_until("it is known", SOON, || {
                let asked = laptop.p2pit(&["show", &format!("job:{job}"), "--json"]);
                (asked.code != 2).then(|| jobs.extend((asked.code == 0).then(|| job.clone())))
            });
        }
    }
    let again = wait_until("the pool is there again", SOON, || {
        let ended = laptop.p2pit(&submission);
        (ended.code == 0).then(|| ended.stdout.trim_end().to_owned())
    });
    jobs.push(again);
    for job in &jobs {
        let over = wait_for_end(world.node(2), job);
        assert_eq!(over["outcome"], "succeeded", "{over:#}");
        assert_eq!(lines_of(&world.node(2).log(job), 0), [content.len().to_string()]);
    }
    // Nothing was submitted that the user was not told of.
    let listed = world.node(1).json(&["show", "jobs"]);
    assert_eq!(listed.as_array().unwrap().len(), jobs.len(), "{listed:#}");
}

/// The daemon alone knows whether it sent anything, and it is gone: nobody claims to know.
#[test]
fn a_submission_whose_daemon_dies_is_unknown_and_can_be_asked_for() {
    let Some(mut world) = World::of(&["sim:1xv100", "none", "none"]) else { return };
    let laptop = add_laptop(&mut world);
    let dir = world.job_dir("input", &[]);
    fs::write(dir.join("big"), noise(8 << 20)).unwrap();
    let laptop = laptop.working_in(&dir);
    world.slow("laptop", Some("8mbit"));
    let running = laptop.start(&["run", "Unknown", "[v100]", "-d", "true"]);
    wait_for_a_part(&world);
    laptop.crash();
    let ended = running.end();
    ended.refused(2, &["is submitted is unknown", "the daemon ended", "hint: ", "show job:"]);
    let job = full_id(&ended.stderr).expect("the job is named");
    // Its inputs had not come, so nothing was sent.
    world.slow("laptop", None);
    laptop.restart();
    world.wait_until_assembled_within(TAKEN_OVER);
    laptop.p2pit(&["show", &format!("job:{job}")]).refused(1, &["no node", "keeps job"]);
    let again = laptop.submit(&["Again", "[v100]", "-d", "true"]);
    assert_eq!(wait_for_end(world.node(1), &again)["outcome"], "succeeded");
}

#[test]
fn a_submitter_that_is_cut_off_right_after_submitting_changes_nothing() {
    let Some(mut world) = World::of(&["sim:1xv100", "none", "none"]) else { return };
    let laptop = add_laptop(&mut world);
    let dir = world.job_dir("input", &[("small", "content\n")]);
    let script = "sleep 3; cat small; cp small \"$JOB_DIR/artifacts/copy\"";
    let laptop = laptop.working_in(&dir);
    let job = laptop.submit(&["Left", "[v100]", "-d", script]);
    world.isolate("laptop");
    for n in 1..=3 {
        let job = wait_for_end(world.node(n), &job);
        assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
    }
    assert_eq!(lines_of(&world.node(3).log(&job), 0), ["content"]);
    // It comes back, and learns it.
    world.heal();
    wait_until("the laptop is told", SOON, || {
        let ended = laptop.p2pit(&["show", &format!("job:{job}"), "--json"]);
        let job: Value = serde_json::from_str(&ended.stdout).ok()?;
        (job["outcome"] == "succeeded").then_some(())
    });
    assert_eq!(laptop.p2pit(&["cp", &job, "artifacts/copy", "-"]).ok(), "content\n");
}

#[test]
fn a_partition_of_a_minute_ends_nothing_on_either_side() {
    let gpus = ["none", "sim:1xv100", "none", "sim:1xv100", "sim:1xgtx1070"];
    let Some(world) = World::of(&gpus) else { return };
    let first = world.named("n1").clone();
    // The leases of the gang bind, those of the other do not.
    let gang = first.submit(&["Gang", "2:[v100]", "--retries", "1", "-d", COUNT]);
    let lone = world.named("n5").submit(&["Lone", "[gtx1070]", "-d", COUNT]);
    for (job, ranks) in [(&gang, 2), (&lone, 1)] {
        first.wait_for_state(job, "RUNNING");
        for rank in 0..ranks {
            wait_for_lines(&first, job, rank, 2);
        }
    }
    let counters = pids(&[&gang, &lone]);
    assert_eq!(counters.len(), 3);

    let sides = [["n1", "n2"].as_slice(), &["n3", "n4", "n5"]];
    world.cut(sides[0], sides[1]);
    let since = Instant::now();
    let [left, right] = ["n2", "n4"].map(|name| world.named(name).clone());
    wait_until("the minute is over", 2 * CUT, || {
        assert_eq!(pids(&[&gang, &lone]), counters);
        for node in [&left, &right] {
            // A node that is cut off still says what it knows.
            node.p2pit(&["status"]).ended(0);
        }
        (since.elapsed() >= CUT).then_some(())
    });
    assert!(world.dropped() > 0);
    world.heal();
    world.wait_until_assembled_within(TAKEN_OVER);
    for (job, ranks) in [(&gang, 2), (&lone, 1)] {
        for rank in 0..ranks {
            let seen = lines_of(&first.log(job), rank).len();
            wait_for_lines(&first, job, rank, seen + 3);
        }
    }
    assert_eq!(pids(&[&gang, &lone]), counters);
    for (job, ranks) in [(&gang, 2), (&lone, 1)] {
        tell(job);
        for node in [&first, &right] {
            let job = wait_for_end(node, job);
            let said = (&job["outcome"], &job["attempt"]);
            assert_eq!(said, (&json!("succeeded"), &json!(1)), "{job:#}");
        }
        (0..ranks).for_each(|rank| assert_counted(&first, job, rank));
    }
}

#[test]
fn a_daemon_that_stands_still_is_replaced_and_does_no_harm_when_it_goes_on() {
    let Some(world) = World::of(&["none", "none", "sim:1xv100"]) else { return };
    let [first, second, third] = world.nodes() else { panic!("three nodes") };
    let job = first.submit(&["Runs", "[v100]", "-d", COUNT]);
    wait_for_ticks(second, &job, 2);
    let counters = pids(&[&job]);
    world.stop(first);
    wait_for_another_steward(second, &job, "n1");
    // And the one that runs it, for as long as a partition lasts.
    world.stop(third);
    let since = Instant::now();
    wait_until("it stood still", 2 * CUT, || (since.elapsed() >= CUT).then_some(()));
    world.go_on(first);
    world.go_on(third);
    world.wait_until_assembled_within(TAKEN_OVER);
    let seen = ticks(second, &job);
    wait_for_ticks(second, &job, seen + 3);
    assert_eq!(pids(&[&job]), counters);
    tell(&job);
    for node in world.nodes() {
        let job = wait_for_end(node, &job);
        assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
    }
    assert_counted(first, &job, 0);
}

#[test]
fn a_gang_does_not_notice_that_the_daemons_are_upgraded_below_it() {
    let Some(world) = World::of(&["none", "sim:1xv100", "sim:1xv100"]) else { return };
    let first = world.named("n1");
    let gang = first.submit(&["Gang", "2:[v100]", "-d", COUNT]);
    for rank in 0..2 {
        wait_for_lines(first, &gang, rank, 2);
    }
    let counters = pids(&[&gang]);
    let new = world.path().join("new-p2pit");
    fs::copy(program(), &new).unwrap();
    // One after the other, as an administrator would.
    for node in world.nodes() {
        node.shut_down();
        node.run_by(&new).restart();
        let runs = fs::read_link(format!("/proc/{}/exe", node.daemon().pid())).unwrap();
        assert_eq!(runs, new);
    }
    world.wait_until_assembled_within(TAKEN_OVER);
    assert_eq!(pids(&[&gang]), counters);
    for rank in 0..2 {
        let seen = lines_of(&first.log(&gang), rank).len();
        wait_for_lines(first, &gang, rank, seen + 3);
    }
    tell(&gang);
    let job = wait_for_end(first, &gang);
    assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
    (0..2).for_each(|rank| assert_counted(first, &gang, rank));
}

#[test]
fn nothing_is_lost_when_all_daemons_are_killed_at_once() {
    let Some(world) = World::of(&["none", "sim:1xv100", "sim:1xv100"]) else { return };
    let first = world.named("n1");
    let gang = first.submit(&["Gang", "2:[v100]", "--retries", "1", "-d", COUNT]);
    for rank in 0..2 {
        wait_for_lines(first, &gang, rank, 2);
    }
    let waits = first.submit(&["Waits", "[v100]", "-d", "echo ran"]);
    first.wait_for_state(&waits, "WAITING");
    let counters = pids(&[&gang]);
    let daemons: Vec<Process> = world.nodes().iter().map(Node::daemon).collect();
    daemons.iter().for_each(|daemon| daemon.signal(Signal::KILL));
    wait_until("all are dead", SOON, || daemons.iter().all(Process::has_ended).then_some(()));
    world.nodes().iter().rev().for_each(Node::restart);
    world.wait_until_assembled_within(TAKEN_OVER);
    assert_eq!(pids(&[&gang]), counters);
    for rank in 0..2 {
        let seen = lines_of(&first.log(&gang), rank).len();
        wait_for_lines(first, &gang, rank, seen + 3);
    }
    tell(&gang);
    for job in [&gang, &waits] {
        let job = wait_for_end(first, job);
        assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
    }
    (0..2).for_each(|rank| assert_counted(first, &gang, rank));
    assert_eq!(lines_of(&first.log(&waits), 0), ["ran"]);
}

/// Daemons, supervisors and jobs go at once, and the machine comes back with another boot id
/// and a boot clock that begins anew. One job may be run again, the other not.
#[test]
fn a_machine_that_was_restarted_says_so_of_what_ran_there() {
    let Some(mut world) = World::of(&["none", "sim:1xv100", "sim:1xgtx1070"]) else { return };
    let (first, second) = (world.named("n1").clone(), world.named("n2").clone());
    let third = world.named("n3").clone();
    let again = first.submit(&["Again", "[v100]", "--retries", "1", "-d", FIRST_NEVER_ENDS]);
    let once = first.submit(&["Once", "[gtx1070]", "-d", COUNT]);
    wait_for_line(&first, &again, "first");
    wait_for_ticks(&first, &once, 2);

    for name in ["n2", "n3"] {
        world.power_off(name);
    }
    assert!(of_job(&again).is_empty() && of_job(&once).is_empty());
    fs::write(world.shared().join("again"), "").unwrap();
    for (name, node) in [("n2", &second), ("n3", &third)] {
        world.boot(name);
        node.restart();
    }
    world.wait_until_assembled_within(TAKEN_OVER);
    let job = wait_for_end(&first, &again);
    assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(2)), "{job:#}");
    assert_eq!(lines_of(&first.log(&again), 0).last(), Some(&"n2"));
    let job = wait_for_end(&first, &once);
    assert_eq!((&job["outcome"], &job["attempt"]), (&json!("lost"), &json!(1)), "{job:#}");
    let why = first.p2pit(&["show", &format!("job:{once}")]).ok();
    assert!(why.contains("the machine was restarted"), "{why}");
    assert!(of_job(&again).is_empty() && of_job(&once).is_empty());
}

/// Its machine goes out for ever. The lease runs out, and the job is run elsewhere, from what its
/// `keep/` was a moment before.
#[test]
fn a_job_with_retries_goes_on_elsewhere_when_its_machine_never_returns() {
    let Some(world) = World::of(&["none", "sim:1xv100", "sim:1xv100"]) else { return };
    let first = world.named("n1");
    let flags = ["--retries", "1", "--keep-every", "2s"];
    let job = first.submit(&[&["Training", "[v100]"], &flags[..], &["-d", TRAIN]].concat());
    wait_for_ticks(first, &job, 5);
    let seen = ticks(first, &job);
    // Far more than an interval, on a busy machine as well.
    wait_for_ticks(first, &job, seen + 60);
    let ran = first.job(&job)["ranks"][0]["node"].as_str().expect("it has a node").to_owned();
    let other = if ran == "n2" { "n3" } else { "n2" };
    world.power_off(&ran);
    fs::write(world.shared().join("again"), "").unwrap();
    let over = wait_until("it is over", RUN_AGAIN, || {
        let job = first.job(&job);
        (job["state"] == "DONE").then_some(job)
    });
    assert_eq!((&over["outcome"], &over["attempt"]), (&json!("succeeded"), &json!(2)), "{over:#}");
    for name in ["n1", other] {
        let node = world.named(name);
        assert_eq!(wait_for_end(node, &job)["outcome"], "succeeded");
        let log = node.log(&job);
        let said = lines_of(&log, 0);
        assert_eq!(said.last(), Some(&format!("ended on {other}").as_str()), "{said:?}");
        let from = said[said.len() - 2].strip_prefix("goes on from ").expect("it says so");
        let from: usize = from.parse().expect("it is a number");
        assert!(from >= seen, "from {from}, when {seen} had been said long before");
        assert_eq!(node.p2pit(&["cp", &job, "keep/step", "-"]).ok(), format!("{}\n", from + 1));
    }
}

#[test]
fn what_a_job_left_is_read_when_the_machine_that_ran_it_is_gone() {
    let Some(world) = World::of(&["none", "sim:1xv100", "none"]) else { return };
    let first = world.named("n1");
    let script =
        "echo said; echo result > \"$JOB_DIR/artifacts/out\"; echo kept > \"$JOB_DIR/keep/it\"";
    let job = first.submit(&["Leaves", "[v100]", "-d", script]);
    let over = wait_for_end(first, &job);
    assert_eq!(over["outcome"], "succeeded", "{over:#}");
    world.power_off("n2");
    for name in ["n1", "n3"] {
        let node = world.named(name);
        assert_eq!(lines_of(&node.log(&job), 0), ["said"]);
        assert_eq!(node.p2pit(&["cp", &job, "artifacts/out", "-"]).ok(), "result\n");
        assert_eq!(node.p2pit(&["cp", &job, "keep/it", "-"]).ok(), "kept\n");
    }
}

/// Wall clocks order nothing: one that is wrong by less than the pool minds does no harm.
#[test]
fn machines_whose_wall_clocks_differ_run_jobs_together() {
    let Some(world) = World::of(&["none", "sim:1xv100", "sim:1xv100"]) else { return };
    for (name, off) in [("n2", "-90000"), ("n3", "20000")] {
        let node = world.named(name);
        node.shut_down();
        node.restart_with(&[(WALL_CLOCK_OFF_MS, off)]);
    }
    world.wait_until_assembled_within(TAKEN_OVER);
    let first = world.named("n1");
    let gang = first.submit(&["Gang", "2:[v100]", "-d", "echo ran"]);
    let job = wait_for_end(first, &gang);
    assert_eq!((&job["outcome"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job:#}");
}

// ---- what the stories have in common ---------------------------------------------------

/// A machine whose node keeps nothing and runs nothing.
#[track_caller]
fn add_laptop(world: &mut World) -> Node {
    let laptop = world.add("laptop", &["--client"]);
    world.wait_until_assembled_within(TAKEN_OVER);
    laptop
}

/// All that a home has, but for the key of the node.
fn wipe(node: &Node) {
    for entry in fs::read_dir(node.home()).expect("the home can be wiped") {
        let path = entry.expect("the home can be wiped").path();
        if path.ends_with("node.key") || path.ends_with("p2pit-home") {
            continue;
        }
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
            .expect("the home can be wiped");
    }
}

/// Returns once one of the first three nodes has a part of what is being submitted.
#[track_caller]
fn wait_for_a_part(world: &World) {
    let stores: Vec<_> = (1..=3).map(|n| world.node(n).home().join("blobs/partial")).collect();
    wait_until("a part has come", SOON, || {
        stores.iter().any(|store| allocated(store) >= 1 << 20).then_some(())
    });
}

/// Bytes on disk of the files in a directory.
fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.metadata().ok()).map(|it| it.blocks() * 512).sum()
}

/// The id of a job in what a command says of it.
fn full_id(text: &str) -> Option<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter(|word| word.len() == 52).map(str::to_owned).next()
}

fn names(array: &Value) -> Vec<&str> {
    let names = array.as_array().expect("keepers are an array").iter();
    let mut names: Vec<&str> = names.filter_map(Value::as_str).collect();
    names.sort_unstable();
    names
}

fn ticks(node: &Node, job: &str) -> usize {
    lines_of(&node.p2pit(&["log", job]).stdout, 0).len()
}

#[track_caller]
fn wait_for_ticks(node: &Node, job: &str, count: usize) {
    wait_for_lines(node, job, 0, count);
}

#[track_caller]
fn wait_for_lines(node: &Node, job: &str, rank: u32, count: usize) {
    wait_until(&format!("{count} lines of process {rank}"), SOON, || {
        (lines_of(&node.p2pit(&["log", job]).stdout, rank).len() >= count).then_some(())
    });
}

#[track_caller]
fn wait_for_line(node: &Node, job: &str, line: &str) {
    wait_until(&format!("the job says {line}"), SOON, || {
        lines_of(&node.p2pit(&["log", job]).stdout, 0).contains(&line).then_some(())
    });
}

#[track_caller]
fn wait_for_another_steward(node: &Node, job: &str, than: &str) -> Value {
    wait_until("another node drives it", TAKEN_OVER, || {
        let job = node.job(job);
        (job["steward"] != than).then_some(job)
    })
}

#[track_caller]
fn wait_for_end(node: &Node, job: &str) -> Value {
    wait_until("the job is over", TAKEN_OVER, || {
        let ended = node.p2pit(&["show", &format!("job:{job}"), "--json"]);
        let job: Value = serde_json::from_str(&ended.stdout).ok()?;
        (job["state"] == "DONE").then_some(job)
    })
}

/// Returns once it is recorded that every process of the job has ended.
#[track_caller]
fn wait_for_all_ended(node: &Node, job: &str) {
    wait_until("every process has ended", TAKEN_OVER, || {
        let ended = node.p2pit(&["show", &format!("job:{job}"), "--json"]);
        let job: Value = serde_json::from_str(&ended.stdout).ok()?;
        let ranks = job["ranks"].as_array()?;
        let has_ended = |rank: &Value| rank["state"] == "ended";
        let is_over = job["state"] == "CLEANING" || job["state"] == "DONE";
        (is_over && !ranks.is_empty() && ranks.iter().all(has_ended)).then_some(())
    });
}

/// A counter's log has every number once, in order, and its last word.
#[track_caller]
fn assert_counted(node: &Node, job: &str, rank: u32) {
    let log = node.log(job);
    let said = lines_of(&log, rank);
    let counted: Vec<String> = (1..said.len()).map(|n| format!("tick {n}")).collect();
    assert_eq!(said[..counted.len()], counted, "nothing is missing and nothing twice");
    assert_eq!(said.last(), Some(&"told"));
}

/// The shell that counts, of each process of the job.
fn counters_of(job: &str) -> Vec<Process> {
    let has_script = |it: &Process| it.command_line().iter().any(|word| word.contains("echo tick"));
    let mut found: Vec<Process> = of_job(job).into_iter().filter(has_script).collect();
    let all: BTreeSet<u32> = found.iter().map(Process::pid).collect();
    // One that a shell has just made still has its words.
    found.retain(|it| it.parent().is_none_or(|parent| !all.contains(&parent)));
    found
}

fn pids(jobs: &[&str]) -> BTreeSet<u32> {
    jobs.iter().flat_map(|job| counters_of(job)).map(|it| it.pid()).collect()
}

/// Every counter of the job ends.
#[track_caller]
fn tell(job: &str) {
    let counters = counters_of(job);
    assert!(!counters.is_empty(), "the job runs");
    counters.iter().for_each(|counter| counter.signal(Signal::USR1));
}
