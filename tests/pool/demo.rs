//! `p2pit demo`, which shows it all and leaves nothing.

use std::{fs, path::Path};

use p2pit_tests::{Pool, Running, mentioning};
use rustix::process::Signal;

#[test]
fn the_demo_shows_the_main_job_and_leaves_nothing_behind() {
    let pool = Pool::empty();
    let (demo, tmp) = start(&pool);
    let shown = demo.end().ok();
    for part in [
        "run \"First light\" 2:[v100]",
        "[worker 0] ",
        "[worker 1] ",
        "status",
        "succeeded",
        "show nodes",
        "simulated",
        "p2pit join",
    ] {
        assert!(shown.contains(part), "{part:?} is not shown: {shown}");
    }
    assert_nothing_is_left(&tmp);
}

#[test]
fn a_demo_interrupted_while_its_pool_is_made_leaves_nothing_behind() {
    interrupted_at("join $TICKET", Running::interrupt);
}

#[test]
fn a_demo_interrupted_while_its_job_runs_leaves_nothing_behind() {
    interrupted_at("[worker 0] I am", Running::interrupt);
}

#[test]
fn a_demo_that_is_ended_alone_ends_what_it_started() {
    interrupted_at("[worker 0] I am", |demo| demo.signal(Signal::TERM));
}

#[track_caller]
fn interrupted_at(moment: &str, interrupt: impl FnOnce(&mut Running)) {
    let pool = Pool::empty();
    let (mut demo, tmp) = start(&pool);
    demo.wait_for(moment);
    interrupt(&mut demo);
    let ended = demo.end();
    assert!([130, 143].contains(&ended.code), "{ended:?}");
    assert_nothing_is_left(&tmp);
}

fn start(pool: &Pool) -> (Running, std::path::PathBuf) {
    let tmp = pool.path().join("tmp");
    fs::create_dir(&tmp).expect("the pool's directory can be written to");
    (pool.start_bare(&["demo"], &tmp), tmp)
}

#[track_caller]
fn assert_nothing_is_left(tmp: &Path) {
    let left: Vec<_> = mentioning(tmp).iter().map(|it| it.command_line()).collect();
    assert!(left.is_empty(), "{left:?}");
    let left = fs::read_dir(tmp).expect("the directory is there");
    let left: Vec<_> = left.filter_map(Result::ok).map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}
