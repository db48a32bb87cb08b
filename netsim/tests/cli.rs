//! The program itself: what it prints and how it exits.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use std::process::{Command, Output};

#[test]
fn two_processes_print_the_same_trace_for_one_seed() {
    let run = || netsim(&["run", "--seed", "7", "--stress", "--jobs", "12"]);
    let (one, other) = (run(), run());
    assert_eq!(one.status.code(), Some(0));
    let lines = text(&one);
    assert!(lines.starts_with("seed 7\n") && lines.contains("\nloss_permille "), "{lines}");
    assert!(lines.lines().last().is_some_and(|line| line.starts_with("trace ")), "{lines}");
    assert_eq!(lines, text(&other));
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
    let shown = netsim(&["search", "--seeds", "0..1", "--jobs", "1", "--calm", "--nodes", "2"]);
    let lines = text(&shown);
    assert_eq!(shown.status.code(), Some(4), "{lines}");
    assert!(lines.contains("the search proves nothing: no hold was wounded"), "{lines}");
}

#[test]
fn a_search_ends_with_its_tally() {
    let found = netsim(&["search", "--seeds", "40..46", "--stress", "--threads", "2"]);
    let lines = text(&found);
    assert_eq!(found.status.code(), Some(0), "{lines}");
    assert!(lines.ends_with("6 seeds, 0 failed\n"), "{lines}");
    let tally = lines.lines().rev().nth(1).unwrap();
    for what in ["withdrawn", "wounds", "crashes", "restarts", "duplicated"] {
        assert!(tally.contains(what), "{tally}");
    }
}

#[test]
fn a_search_prints_each_failing_seed_with_its_options() {
    let found =
        netsim(&["search", "--seeds", "1..2", "--stress", "--without", "startonlywhentold"]);
    let lines = text(&found);
    assert_eq!(found.status.code(), Some(3), "{lines}");
    assert!(lines.contains("\nseed 1 failed: X2 broken at "), "{lines}");
    assert!(lines.contains("removed_rule Some(StartOnlyWhenTold)"), "{lines}");
    assert!(lines.ends_with("1 seeds, 1 failed\n"), "{lines}");
}

fn netsim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_netsim")).args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}
