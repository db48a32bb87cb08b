//! The program itself: what it prints and how it exits.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use std::{
    path::PathBuf,
    process::{Command, Output},
};

#[test]
fn two_processes_print_the_same_but_for_their_speed_for_one_seed() {
    let run = || netsim(&["run", "--seed", "7", "--stress", "--tasks", "12"]);
    let (one, other) = (run(), run());
    assert_eq!(one.status.code(), Some(0));
    let lines = text(&one);
    assert!(lines.starts_with("seed 7\n") && lines.contains("\nloss_permille "), "{lines}");
    let last = lines.lines().last().unwrap();
    let hash = last.strip_prefix("trace ").unwrap_or_else(|| panic!("{lines}"));
    assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{last}");
    assert_eq!(without_speed(&lines), without_speed(&text(&other)));
    assert_eq!(without_speed(&lines).lines().count() + 1, lines.lines().count());
}

#[test]
fn a_seed_that_leaves_out_a_group_of_faults_has_all_where_that_is_asked_for() {
    let options = |args: &[&str]| {
        let run = ["run", "--seed", "3", "--stress", "--tasks", "1"];
        text(&netsim(&[&run, args].concat()))
    };
    let (some, all) = (options(&[]), options(&["--every-fault"]));
    let is_absent = |lines: &str, name| lines.contains(&format!("\n{name} 0\n"));
    let groups = ["loss_permille", "gossip_loss_permille", "drift_ppm_max", "skew_ms_max"];
    assert!(groups.iter().any(|name| is_absent(&some, name)), "{some}");
    assert!(!groups.iter().any(|name| is_absent(&all, name)), "{all}");
}

#[test]
fn a_broken_rule_is_shown_with_the_last_events_of_its_job_and_exits_with_3() {
    let shown = netsim(&["run", "--seed", "1", "--stress", "--without", "TakenIsNotFree"]);
    assert_eq!(shown.status.code(), Some(3));
    let lines = text(&shown);
    let broken = lines.lines().find(|line| line.starts_with("G1 broken at ")).unwrap();
    let (_, job) = broken.split_once(", job ").unwrap();
    let about_it = |line: &&str| line.starts_with(' ') && line.contains(&job[..10]);
    assert!(lines.lines().filter(about_it).count() > 2, "{lines}");
}

#[test]
fn a_search_in_which_nothing_was_contested_fails() {
    let shown = netsim(&["search", "--seeds", "0..1", "--tasks", "1", "--calm", "--nodes", "2"]);
    let lines = text(&shown);
    assert_eq!(shown.status.code(), Some(4), "{lines}");
    assert!(lines.contains("the search proves nothing: no hold was wounded"), "{lines}");
    assert!(lines.ends_with("\n1 seeds, 0 failed\n"), "{lines}");
}

#[test]
fn a_search_ends_with_its_tally() {
    let found = netsim(&["search", "--seeds", "40..46", "--stress", "--jobs", "2"]);
    let lines = text(&found);
    assert_eq!(found.status.code(), Some(0), "{lines}");
    assert!(lines.ends_with("\n6 seeds, 0 failed\n"), "{lines}");
    for what in ["withdrawn", "wounds", "crashes", "restarts", "duplicated"] {
        assert!(lines.contains(what), "{lines}");
    }
    let speed = lines.lines().find(|line| line.ends_with(SPEED)).unwrap();
    let hours: u64 = speed.split(' ').next().unwrap().parse().unwrap();
    assert!(hours > 0, "{speed}");
}

#[test]
fn a_search_prints_each_failing_seed_with_its_options_and_last_events() {
    let found =
        netsim(&["search", "--seeds", "1..2", "--stress", "--without", "startonlywhentold"]);
    let lines = text(&found);
    assert_eq!(found.status.code(), Some(3), "{lines}");
    assert!(lines.contains("\nseed 1 failed: X2 broken at "), "{lines}");
    assert!(lines.contains("removed_rule Some(StartOnlyWhenTold)"), "{lines}");
    let (_, job) = lines.split_once(", job ").unwrap();
    assert!(lines.lines().filter(|line| line.contains(&job[..10])).count() > 3, "{lines}");
    assert!(lines.ends_with("1 seeds, 1 failed\n"), "{lines}");
}

#[test]
fn a_scenario_is_played_and_its_trace_written() {
    let trace = folder("trace").join("trace.txt");
    let story = story("fine", "  - expect: {job: a, outcome: succeeded, within: 1m}\n");
    let path = trace.to_str().unwrap();
    let played = netsim(&["run", story.to_str().unwrap(), "--seed", "3", "--trace", path]);
    let lines = text(&played);
    assert_eq!(played.status.code(), Some(0), "{lines}");
    assert!(lines.starts_with("seed 3\n"), "{lines}");
    assert!(lines.contains("\nevery job came to its end after "), "{lines}");
    assert!(lines.lines().last().unwrap().starts_with("trace "), "{lines}");
    let written = std::fs::read_to_string(&trace).unwrap();
    assert!(written.lines().count() > 20 && written.contains(" runs 1.0"), "{written}");
}

#[test]
fn an_expectation_that_is_not_met_exits_with_3_and_shows_its_line_and_the_job() {
    let story = story("unmet", "  - expect: {job: a, outcome: failed, within: 1m}\n");
    let played = netsim(&["run", story.to_str().unwrap()]);
    let lines = text(&played);
    assert_eq!(played.status.code(), Some(3), "{lines}");
    let what = "unmet.yaml:6: steps[1]: job a: it is succeeded, where failed was expected";
    assert!(lines.contains(what), "{lines}");
    let (_, job) = lines.split_once(", job ").unwrap();
    assert!(lines.lines().filter(|line| line.contains(&job[..10])).count() > 3, "{lines}");
}

#[test]
fn a_moment_that_never_comes_exits_with_4() {
    let story = story("never", "  - when: {job: a, attempt: 2, within: 1m}\n    stop: a\n");
    let played = netsim(&["run", story.to_str().unwrap()]);
    let lines = text(&played);
    assert_eq!(played.status.code(), Some(4), "{lines}");
    assert!(
        lines.contains("never.yaml:6: steps[1]: job a: its attempt: 1, where 2 was"),
        "{lines}"
    );
}

#[test]
fn of_a_sweep_every_choice_is_played_or_those_asked_for() {
    let story = story("sweep", "  - after: <wait>\n    stop: a\nsweep: {wait: [1s, 2s, 3s]}\n");
    let path = story.to_str().unwrap();
    let labels = |args: &[&str]| {
        let lines = text(&netsim(&[&["run", path], args].concat()));
        let labels = lines.lines().filter(|line| line.starts_with("wait "));
        labels.map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(labels(&[]), ["wait 1s", "wait 2s", "wait 3s"]);
    assert_eq!(labels(&["--with", "wait=2s"]), ["wait 2s"]);
}

#[test]
fn what_cannot_be_asked_for_exits_with_2_and_says_why() {
    let wrong = story("wrong", "  - crsh: {node: n0}\n");
    let wrong = wrong.to_str().unwrap();
    let fine = story("size", "  - stop: a\n");
    let fine = fine.to_str().unwrap();
    for (args, why) in [
        (&["run"][..], "--seed <SEED>"),
        (&["run", wrong], "wrong.yaml:6: steps[1]: unknown field `crsh`"),
        (&["run", "no/such.yaml"], "no/such.yaml:1: cannot be opened"),
        (&["run", fine, "--nodes", "3"], "a scenario says itself what its pool is"),
        (&["run", fine, "--with", "a=b"], "its sweep has no such value"),
        (&["run", "--seed", "1", "--without", "Nothing"], "no rule is called `Nothing`"),
        (&["search", "--seeds", "3..3"], "no seed lies in `3..3`"),
        (&["search", "--seeds", "1..2", "--jobs", "0"], "0 is not in 1.."),
    ] {
        let refused = netsim(args);
        let said = String::from_utf8(refused.stderr.clone()).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(why), "{args:?}: {said}");
    }
}

const SPEED: &str = " node-hours per CPU-minute";

fn without_speed(lines: &str) -> String {
    let kept = lines.lines().filter(|line| !line.ends_with(SPEED));
    kept.map(|line| format!("{line}\n")).collect()
}

/// A file in which a job of a few seconds is submitted, with more steps.
fn story(name: &str, steps: &str) -> PathBuf {
    let path = folder(name).join(format!("{name}.yaml"));
    let text = format!(
        "story: a test\npool: {{nodes: [1xv100, 1xv100]}}\n\
         jobs: {{a: {{from: n0, request: '[v100]', run: 5s}}}}\nsteps:\n  - submit: a\n{steps}"
    );
    std::fs::write(&path, text).unwrap();
    path
}

/// A folder of one test's own.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("netsim-cli-{name}"));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn netsim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_netsim")).args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}
