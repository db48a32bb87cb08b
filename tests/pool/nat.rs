//! Pools across NATs: routers in network namespaces stand between the nodes.

use std::{fs, time::Duration};

use p2pit_tests::{
    Node, Pool, SOON, job_dir, lines_of,
    nat::{Internet, Nat, Site},
    wait_until,
};
use serde_json::{Value, json};

use super::transfers::noise;

/// A node that moved to another network is found there by then; 20 s are for noticing that
/// nothing answers any more.
const MOVED: Duration = Duration::from_secs(60);
/// The same for UDP that is blocked, which a node notices in the same way; then it dials by
/// TCP, and the data plane is given up for a while.
const BLOCKED: Duration = Duration::from_secs(90);
/// Three tries, each of which waits for the time-out of the one before.
const PUNCHED: Duration = Duration::from_secs(60);

#[test]
fn nodes_behind_nats_join_by_tickets_of_each_other_and_run_each_others_jobs() {
    let Some(mut internet) = Internet::new() else { return };
    let public = internet.public("p");
    let [at_a, at_b, at_c] = ["a", "b", "c"].map(|name| internet.behind(name, Nat::Keeps));
    let mut pool = Pool::empty();
    let sites = [("p", &public, "none"), ("a", &at_a, "none"), ("b", &at_b, "sim:1xv100")];
    let [p, a, _] = found(&mut pool, sites);
    for node in ["a", "b"] {
        wait_for_relay(&p, node, &["p"]);
    }
    assert_eq!(a.nodes()["p"]["dialled"], true);
    assert_eq!(p.nodes()["b"]["dialled"], false);

    // From one NAT to the other, and back; more than a message takes.
    let job = pool.job_dir("job", &[(".compute", "#!/bin/sh\ncp data ../keep/\necho ran here")]);
    let data = noise(3 << 20);
    fs::write(job.join("data"), &data).unwrap();
    let id = a.working_in(&job).submit(&["Across", "[v100]"]);
    a.wait_for_outcome(&id, "succeeded");
    wait_for_lines(&a, &id, &["ran here"]);
    let got = pool.path().join("got");
    a.p2pit(&["cp", &id, "keep/data", &got.display().to_string()]).ok();
    assert!(fs::read(&got).unwrap() == data, "the result is not what was sent");

    // A hole is punched, and the relay is left out.
    wait_until("a hole is punched", PUNCHED, || {
        (severity(&doctor(&a).0, "holes") == Some("ok")).then_some(())
    });
    let (found, code) = doctor(&a);
    assert_eq!(code, 0, "{found:#}");
    assert_eq!(severity(&found, "reachable"), Some("note"), "{found:#}");
    assert_eq!(severity(&found, "relays"), Some("ok"), "{found:#}");
    assert_eq!(severity(&found, "udp"), Some("ok"), "{found:#}");
    assert_eq!(severity(&found, "jobs"), Some("note"), "{found:#}");
    let (found, code) = doctor(&p);
    assert_eq!((severity(&found, "reachable"), code), (Some("ok"), 0), "{found:#}");

    // Somebody else, from behind a NAT, by a ticket that was made behind another.
    let ticket = a.invite();
    let c = pool.home("c");
    at_c.join(&c, Some(&ticket), &["--gpus", "none"]).ended(0);
    pool.take_in(&c);
    wait_until_online(&pool);
}

#[test]
fn between_nats_that_let_no_hole_be_punched_a_member_passes_on() {
    let Some(mut internet) = Internet::new() else { return };
    let [at_p, at_q] = ["p", "q"].map(|name| internet.public(name));
    let [at_a, at_b] = ["a", "b"].map(|name| internet.behind(name, Nat::Random));
    let mut pool = Pool::empty();
    let sites = [
        ("p", &at_p, "none"),
        ("q", &at_q, "none"),
        ("a", &at_a, "none"),
        ("b", &at_b, "sim:1xv100"),
    ];
    let [p, _, a, _] = found(&mut pool, sites);
    for node in ["a", "b"] {
        wait_for_relay(&p, node, &["p", "q"]);
    }
    let id = a.submit(&["Across", "[v100]", "-d", "echo ran; echo kept > ../keep/it"]);
    a.wait_for_outcome(&id, "succeeded");
    wait_for_lines(&a, &id, &["ran"]);
    assert_eq!(a.p2pit(&["cp", &id, "keep/it", "-"]).ok(), "kept\n");

    let found = wait_until("punching was given up", PUNCHED, || {
        let (found, code) = doctor(&a);
        (severity(&found, "holes") == Some("note")).then_some((found, code))
    });
    let (found, code) = found;
    assert_eq!(code, 0, "{found:#}");
    let nat = finding(&found, "nat").unwrap_or_default();
    assert!(nat.contains("symmetric"), "{found:#}");
    let data = found.as_array().unwrap().iter().filter(|it| it["check"] == "data");
    let data: Vec<&str> = data.filter_map(|it| it["finding"].as_str()).collect();
    assert!(data.iter().any(|it| it.contains("node b: passed on by node")), "{found:#}");
    assert!(data.iter().any(|it| it.contains("node p: directly")), "{found:#}");

    // One of the two that pass on goes; the other does it then.
    p.crash();
    wait_until("b is online without p", MOVED, || {
        (a.nodes()["b"]["reach"] == "online").then_some(())?;
        let log = a.p2pit(&["log", &id]);
        (log.code == 0 && lines_of(&log.stdout, 0) == ["ran"]).then_some(())
    });
}

#[test]
fn a_node_that_moves_to_another_network_is_found_there() {
    let Some(mut internet) = Internet::new() else { return };
    let [at_p, mut at_a] = ["p", "a"].map(|name| internet.public(name));
    let mut pool = Pool::empty();
    let [p, a] = found(&mut pool, [("p", &at_p, "none"), ("a", &at_a, "sim:1xv100")]);
    let before = format!("{}:", at_a.address());
    at_a.move_to("198.51.100.77");
    wait_until("the node is found where it is", MOVED, || {
        let node = &p.nodes()["a"];
        let data = node["data"].to_string();
        let is_told = data.contains("198.51.100.77:") && !data.contains(&before);
        (is_told && node["reach"] == "online").then_some(())
    });
    // What is asked goes there.
    let id = p.submit(&["There", "[v100]", "-d", "echo ran"]);
    p.wait_for_outcome(&id, "succeeded");
    wait_for_lines(&p, &id, &["ran"]);
    let (found, code) = doctor(&a);
    assert_eq!((severity(&found, "members"), code), (Some("ok"), 0), "{found:#}");
}

#[test]
fn where_udp_is_blocked_tcp_carries_what_it_can_and_the_doctor_says_so() {
    let Some(mut internet) = Internet::new() else { return };
    let (at_p, at_a) = (internet.public("p"), internet.behind("a", Nat::Keeps));
    let mut pool = Pool::empty();
    let sites = [("p", &at_p, "sim:1xv100"), ("a", &at_a, "sim:1xgtx1070")];
    let [p, a] = found(&mut pool, sites);
    at_a.block_udp();
    wait_until("TCP takes over", BLOCKED, || {
        let (found, code) = doctor(&a);
        let udp = severity(&found, "udp") == Some("warning");
        (udp && severity(&found, "members") == Some("ok") && code == 1).then_some(())
    });
    // Both ways, with inputs, logs and results.
    for (from, to) in [(&a, "[v100]"), (&p, "[gtx1070]")] {
        let dir = pool.path().join("submit").join(from.name());
        let compute = "#!/bin/sh\ncp data ../keep/\necho ran";
        let job = job_dir(&dir, &[(".compute", compute), ("data", "what was sent")]);
        let id = from.working_in(&job).submit(&["By TCP", to]);
        from.wait_for_outcome(&id, "succeeded");
        wait_for_lines(from, &id, &["ran"]);
        assert_eq!(from.p2pit(&["cp", &id, "keep/data", "-"]).ok(), "what was sent");
    }
    // A start without UDP finds the pool as well.
    a.shut_down();
    at_a.restart(&a);
    wait_until_online(&pool);
}

/// A pool with nodes of these names and GPUs at these sites, the first of which founds it; each
/// sees the others.
#[track_caller]
fn found<const N: usize>(pool: &mut Pool, sites: [(&str, &Site, &str); N]) -> [Node; N] {
    let mut nodes: Vec<Node> = Vec::new();
    for (name, site, gpus) in sites {
        let node = pool.home(name);
        let ticket = nodes.first().map(Node::invite);
        site.join(&node, ticket.as_deref(), &["--gpus", gpus, "--cpus", "4"]).ended(0);
        pool.take_in(&node);
        nodes.push(node);
    }
    wait_until_online(pool);
    nodes.try_into().expect("as many as there are sites")
}

#[track_caller]
fn wait_until_online(pool: &Pool) {
    wait_until("all see each other", SOON, || {
        let sees_all = |node: &Node| {
            let nodes = node.nodes();
            nodes.len() == pool.nodes().len() && nodes.values().all(|it| it["reach"] != "offline")
        };
        pool.nodes().iter().all(sees_all).then_some(())
    });
}

/// Somebody else knows that a node cannot be dialled, and who passes on for it.
#[track_caller]
fn wait_for_relay(at: &Node, name: &str, relays: &[&str]) {
    wait_until(&format!("{relays:?} pass on for {name}"), SOON, || {
        let nodes = at.nodes();
        let ids: Vec<&Value> = relays.iter().map(|relay| &nodes[*relay]["id"]).collect();
        let its = nodes[name]["relays"].as_array()?;
        (its.len() == ids.len() && ids.iter().all(|id| its.contains(id))).then_some(())
    });
}

#[track_caller]
fn wait_for_lines(node: &Node, id: &str, expected: &[&str]) {
    wait_until(&format!("the log of {id} has {expected:?}"), SOON, || {
        let log = node.p2pit(&["log", id]);
        (log.code == 0 && lines_of(&log.stdout, 0) == expected).then_some(())
    });
}

/// What the doctor finds, and its exit code.
#[track_caller]
fn doctor(node: &Node) -> (Value, i32) {
    let ended = node.p2pit(&["doctor", "--json"]);
    let found = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| {
        panic!("the doctor printed no JSON: {e}: {}{}", ended.stdout, ended.stderr)
    });
    (found, ended.code)
}

/// How bad the worst is that was found by one check.
fn severity<'a>(found: &'a Value, check: &str) -> Option<&'a str> {
    let of_check = found.as_array()?.iter().filter(|it| it["check"] == check);
    let severities: Vec<&str> = of_check.filter_map(|it| it["severity"].as_str()).collect();
    let order = ["problem", "warning", "note", "ok"];
    order.into_iter().find(|severity| severities.contains(severity))
}

fn finding<'a>(found: &'a Value, check: &str) -> Option<&'a str> {
    let of_check = found.as_array()?.iter().find(|it| it["check"] == json!(check));
    of_check.and_then(|it| it["finding"].as_str())
}
