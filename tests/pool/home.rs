//! What can be wrong with a home or an address.

use std::{
    fs,
    net::{TcpListener, UdpSocket},
};

use p2pit_tests::{Pool, mentioning};

#[test]
fn a_home_has_one_daemon() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    let daemon = node.daemon().pid();
    node.p2pit(&["join", "--no-mdns"]).refused(1, &["a daemon runs in", "hint: ", "--stop"]);
    node.p2pit(&["join", "--detach"]).ended(0);
    node.p2pit(&["daemon"]).refused(1, &["a daemon runs in", "hint: ", "--stop"]);
    assert_eq!(node.daemon().pid(), daemon);
}

#[test]
fn a_node_in_the_foreground_runs_until_it_is_interrupted() {
    let pool = Pool::empty();
    let node = pool.home("n1");
    let mut foreground = node.start(&["join", "--no-mdns", "--listen", "127.0.0.1:0"]);
    foreground.wait_for("Ticket: pit1");
    assert_eq!(node.daemon().pid(), foreground.pid());
    // Nor does it stay where there is nothing to run for.
    let ticket = node.p2pit(&["invite", "--expires", "1ms"]).ok();
    let late = pool.home("n2").used_with(&pool.path().join("bob"));
    let ended = late.p2pit(&["join", ticket.trim_end(), "--no-mdns", "--user-name", "bob"]);
    ended.refused(1, &["expired"]);
    foreground.interrupt();
    foreground.end().ok();
    assert!(mentioning(pool.path()).is_empty());
}

#[test]
fn a_directory_with_other_files_does_not_become_a_home() {
    let pool = Pool::empty();
    let node = pool.home("thesis");
    fs::create_dir(node.home()).unwrap();
    fs::write(node.home().join("thesis.tex"), "precious").unwrap();
    let ended = node.join(None, &[]);
    ended.refused(ended.code, &["thesis.tex", "hint: "]);
    assert!([1, 2].contains(&ended.code));
    let names: Vec<_> =
        fs::read_dir(node.home()).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert_eq!(names, ["thesis.tex"]);
}

#[test]
fn an_address_that_is_in_use_is_named() {
    let pool = Pool::empty();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).unwrap();
    let node = pool.home("n1");
    let flags = ["--listen", &address.to_string()];
    node.join(None, &flags).refused(1, &[&address.to_string(), "in use"]);
    assert!(mentioning(node.home()).is_empty(), "no daemon stays behind");

    drop(tcp);
    node.join(None, &flags).refused(1, &[&address.to_string(), "in use"]);
    drop(udp);
    node.join(None, &flags).ended(0);
    assert_eq!(node.me()["control"], serde_json::json!([address.to_string()]));
}

#[test]
fn a_damaged_key_is_named_and_not_replaced() {
    let pool = Pool::of(&["none"]);
    let node = pool.node(1);
    node.shut_down();
    let key = node.home().join("node.key");
    fs::write(&key, "no key").unwrap();
    node.p2pit(&["join", "--detach"]).refused(2, &["node.key"]);
    assert_eq!(fs::read_to_string(&key).unwrap(), "no key");
}
