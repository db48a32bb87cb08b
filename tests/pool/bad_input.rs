//! What goes wrong in a newcomer's first hour: the tool says what, and nothing is half done.

use std::{
    fs,
    net::{TcpListener, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::{Path, PathBuf},
};

use p2pit_protocol::wire::WIRE_VERSION;
use p2pit_tests::{Pool, SOON, mentioning, wait_until};
use rustix::process::Signal;
use serde_json::Value;

/// Every file below `dir` with its content, to see that nothing changed.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(path);
            } else {
                found.push((path.clone(), fs::read(&path).unwrap_or_default()));
            }
        }
    }
    found.sort();
    found
}

/// Debug builds alone can be told of another clock or version.
fn can_pretend() -> bool {
    let can = cfg!(debug_assertions) && std::env::var_os("P2PIT_BIN").is_none();
    if !can {
        #[expect(clippy::print_stderr, reason = "a test that tests nothing must not go unseen")]
        {
            eprintln!("skipped: this build has the clock and the version that it has");
        }
    }
    can
}

#[test]
fn what_cannot_be_parsed_is_named_with_its_place_and_what_was_expected() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let dir = pool.job_dir("bad", &[(".pitrequest.txt", "2:[],\n3:[v100\n")]);
    let there = node.working_in(&dir);
    let place = ".pitrequest.txt:3:1: the request cannot be understood";
    there.p2pit(&["run", "t", "-d", "true"]).refused(1, &[place, "^ expected", "hint: "]);
    fs::write(dir.join(".pitrequest.txt"), b"2:[],\n\xff").unwrap();
    there.p2pit(&["run", "t", "-d", "true"]).refused(1, &[".pitrequest.txt:2: expected a request"]);
    for (args, parts) in [
        (
            &["run", "t", "2:[v100"][..],
            &["2:[v100", "^ expected `,`, `>=` or `]`, found the end"][..],
        ),
        (&["run", "t", "--env", "A"], &["'A'", "--env", "expected NAME=VALUE"]),
        (&["run", "t", "--env", "A-B=1"], &["--env", "`A-B` has '-'"]),
        (&["run", "t", "--time", "5"], &["'5'", "--time", "`30s`, `10min` or `2h`"]),
        (&["run", "t", "--grace", "soon"], &["--grace", "`soon` is not a duration like"]),
        (&["run", "t", "--time", "0s"], &["--time", "ended at once"]),
        (&["run", "", "-d", "true"], &["TITLE", "cannot be empty"]),
        (&["run", "t", "-d", "true", "--artifact", "../x"], &["`../x` is not below"]),
        (&["join", "pit1abc"], &["the ticket is damaged", "copy the whole word"]),
        (&["join", "--listen", "4001"], &["--listen", "expected an IP address and a port"]),
        (&["log", "ab"], &["`ab` is too short", "at least 4", "hint: "]),
        (&["ls", "@last", "../x"], &["`../x`", "`..`"]),
        (&["show", "jobs", "state=runing"], &["`runing`", "hint: ", "running"]),
        (&["show", "jobs", "limit=x"], &["`limit=x`", "hint: "]),
        (&["show", "node:n9"], &["no node `n9`", "hint: ", "n1"]),
    ] {
        node.p2pit(args).refused(1, parts);
    }
    assert_eq!(node.json(&["status"]), Value::Array(Vec::new()), "nothing was submitted");

    node.shut_down();
    fs::write(node.home().join("config.yaml"), "name: n1\nmdns: false\nlisten: 4001\n").unwrap();
    let parts = ["config.yaml", "listen", "`4001`", "`0.0.0.0:4001`", "line 3 column 9"];
    node.p2pit(&["join", "--detach"]).refused(1, &parts);
    assert!(mentioning(node.home()).is_empty(), "no daemon was started");
}

#[test]
fn an_unknown_job_is_answered_with_how_to_find_the_known_ones() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    for command in ["log", "why", "stop", "ls", "download"] {
        node.p2pit(&[command, "zzzzzz"]).refused(1, &["no job `zzzzzz`", "hint: ", "show jobs"]);
        node.p2pit(&[command, "@last"]).refused(1, &["no job in this pool", "hint: ", "p2pit run"]);
    }
}

#[test]
fn a_worker_that_a_job_does_not_have_is_refused() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    let job = node.submit(&["two", "2:[]", "-d", "echo here"]);
    node.wait_for_outcome(&job, "succeeded");
    node.p2pit(&["log", &job, "-w", "7"]).refused(1, &["workers 0 to 1, and no worker 7"]);
    assert!(node.p2pit(&["log", &job, "-w", "1"]).ok().contains("[worker 1] here"));
}

#[test]
fn a_daemon_that_is_not_there_or_does_not_answer_is_named_with_the_way_to_start_it() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    let daemon = node.daemon();
    daemon.signal(Signal::STOP);
    let ended = node.p2pit(&["status"]);
    daemon.signal(Signal::CONT);
    let home = node.home().to_str().unwrap();
    ended.refused(2, &[home, "has not answered", "hint: ", "p2pit join --detach"]);

    // A daemon that cannot be started for a command says why, and where it said more.
    node.shut_down();
    let occupied = UdpSocket::bind("127.0.0.1:0").unwrap();
    let config = format!("mdns: false\nlisten: {}\n", occupied.local_addr().unwrap());
    fs::write(node.home().join("config.yaml"), config).unwrap();
    let address = occupied.local_addr().unwrap().to_string();
    node.p2pit(&["status"]).refused(2, &["the daemon", &address, "hint: ", "daemon.log"]);
    node.p2pit(&["daemon", "--stop"]).refused(1, &["no daemon runs in", home]);
}

#[test]
fn a_ticket_that_is_over_or_of_another_pool_lets_nobody_in_and_leaves_no_key() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    let ticket = node.p2pit(&["invite", "--expires", "1ms"]).ok();
    let late = pool.home("late").used_with(&pool.path().join("late-key"));
    let flags = ["--user-name", "late"];
    let ended = late.join(Some(ticket.trim_end()), &flags);
    ended.refused(1, &["the ticket expired", "hint: ", "p2pit invite"]);
    assert!(!late.identity().exists(), "the key it made is of no pool");
    assert!(!late.home().join("identity").exists() && !late.home().join("config.yaml").exists());
    assert!(mentioning(late.home()).is_empty());

    let other = Pool::of(&["none"]);
    let before = contents(&other.node(1).home().join("journal")).len();
    let foreign = node.invite();
    let ended = other.node(1).join(Some(&foreign), &[]);
    ended.refused(1, &["in the pool `anna-pool` already", "hint: ", "p2pit leave"]);
    assert_eq!(contents(&other.node(1).home().join("journal")).len(), before);
    // A key that was there before stays, also where it is refused.
    let again = late.used_with(other.node(1).identity());
    again.join(Some(&foreign), &["--user-name", "anna"]).refused(
        1,
        &["a user `anna` with another key", "hint: ", "--identity my-key", "--user-name anna-2"],
    );
    assert!(other.node(1).identity().exists());
    again.join(Some(&foreign), &["--user-name", "anna-2"]).ended(0);
}

#[test]
fn a_home_that_is_something_else_is_left_as_it_is() {
    let pool = Pool::empty();
    let thesis = pool.home("thesis");
    fs::create_dir(thesis.home()).unwrap();
    fs::write(thesis.home().join("thesis.tex"), "precious").unwrap();
    let before = contents(pool.path());
    for args in [&["join", "--detach", "--no-mdns"][..], &["daemon"]] {
        thesis.p2pit(args).refused(1, &["foreign files", "thesis.tex", "hint: ", "--home"]);
    }
    thesis.p2pit(&["status"]).refused(1, &["is in no pool", "hint: "]);
    let newer = pool.home("newer");
    fs::create_dir(newer.home()).unwrap();
    fs::write(newer.home().join("p2pit-home"), "p2pit home version 9\n").unwrap();
    newer.p2pit(&["status"]).refused(1, &["version 9", "newer build"]);
    let file = pool.home("thesis/thesis.tex");
    file.p2pit(&["join", "--detach", "--no-mdns"]).refused(1, &["is not a directory", "hint: "]);
    let after = contents(pool.path()).into_iter().filter(|(path, _)| {
        !path.starts_with(newer.home()) && !path.starts_with(pool.path().join("output"))
    });
    let before =
        before.into_iter().filter(|(path, _)| !path.starts_with(pool.path().join("output")));
    assert!(before.eq(after), "nothing was written");
}

#[test]
fn a_home_that_cannot_be_written_to_is_named() {
    let pool = Pool::empty();
    // Where nobody can write, not even root.
    let nowhere = pool.home("x").with_home(Path::new("/proc/self/p2pit"));
    nowhere.p2pit(&["join", "--detach", "--no-mdns"]).refused(nowhere_code(), &["/p2pit"]);
    assert!(!pool.path().join("identity").exists(), "no key is made for it");
    if rustix::process::geteuid().is_root() {
        return;
    }
    let parent = pool.path().join("closed");
    fs::create_dir(&parent).unwrap();
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o500)).unwrap();
    let closed = pool.home("closed/home");
    let ended = closed.p2pit(&["join", "--detach", "--no-mdns"]);
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o700)).unwrap();
    ended.refused(1, &["cannot be written to", "hint: ", "--home"]);
}

/// `/proc` refuses in its own way, which is no answer to what the user did.
const fn nowhere_code() -> i32 {
    2
}

#[test]
fn a_port_that_is_in_use_is_named_and_founds_nothing() {
    let pool = Pool::empty();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap().to_string();
    let node = pool.home("n1");
    node.join(None, &["--listen", &address]).refused(1, &[&address, "in use"]);
    assert!(mentioning(node.home()).is_empty(), "no daemon stays behind");
    assert!(!node.home().join("config.yaml").exists());
    node.p2pit(&["status"]).refused(1, &["in no pool"]);
}

#[test]
fn a_clock_two_hours_off_is_said_at_the_door_and_to_the_member_whose_it_is() {
    if !can_pretend() {
        return;
    }
    let pool = Pool::of(&["none", "none"]);
    for (offset, side) in [("7200000", "ahead of"), ("-7200000", "behind")] {
        let late = pool.home("late").used_with(&pool.path().join("late-key"));
        let clock = ("P2PIT_TEST_CLOCK_OFFSET_MS", offset);
        let ticket = pool.node(1).invite();
        let args = ["join", &ticket, "--detach", "--no-mdns", "--listen", "127.0.0.1:0"];
        let ended = late.p2pit_with(&[clock], &[&args[..], &["--user-name", "bob"]].concat());
        ended.refused(1, &["your clock is 7", " s ", side, "at most 120 s", "date -u"]);
        assert!(mentioning(late.home()).is_empty());
    }
    assert_eq!(pool.node(1).nodes().len(), 2, "nobody was let in");

    // A member is told as well, and not let in before its clock is right again.
    let member = pool.node(2);
    member.shut_down();
    let clock = ("P2PIT_TEST_CLOCK_OFFSET_MS", "7200000");
    member.p2pit_with(&[clock], &["join", "--detach"]).ended(0);
    let warnings = wait_until("the member says why it is alone", SOON, || {
        let warnings = member.me()["warnings"].to_string();
        warnings.contains("does not let this node in").then_some(warnings)
    });
    assert!(warnings.contains("node n1") && warnings.contains("your clock is 7"), "{warnings}");
    member.shut_down();
    member.restart();
    pool.wait_until_assembled();
    wait_until("it is let in", SOON, || {
        (member.me()["warnings"] == Value::Array(Vec::new())).then_some(())
    });
}

#[test]
fn a_daemon_of_another_wire_version_is_refused_with_both_versions() {
    if !can_pretend() {
        return;
    }
    let pool = Pool::of(&["none"]);
    let speaks = format!("speaks {WIRE_VERSION}");
    for (offset, next) in
        [("-1", "update p2pit on your machine"), ("1", "update p2pit on that node")]
    {
        let other = pool.home("other").used_with(&pool.path().join("other-key"));
        let ticket = pool.node(1).invite();
        let args = ["join", &ticket, "--detach", "--no-mdns", "--listen", "127.0.0.1:0"];
        let version = ("P2PIT_TEST_WIRE_OFFSET", offset);
        let ended = other.p2pit_with(&[version], &[&args[..], &["--user-name", "bob"]].concat());
        let theirs = WIRE_VERSION.saturating_add_signed(offset.parse().unwrap());
        let theirs = format!("wire version {theirs}");
        ended.refused(1, &["your p2pit speaks", &theirs, &speaks, next]);
        assert!(!other.identity().exists() && mentioning(other.home()).is_empty());
    }
    assert_eq!(pool.node(1).nodes().len(), 1, "nobody was let in");
}

#[test]
fn a_socket_that_nobody_listens_on_is_no_obstacle() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    node.shut_down();
    drop(UnixListener::bind(node.home().join("api.sock")).unwrap());
    node.p2pit(&["status"]).ended(0);
    node.restart();
    assert_eq!(node.me()["client"], false);
}
