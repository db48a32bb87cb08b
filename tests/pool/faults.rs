//! What is promised while machines and networks fail: each node on a machine of its own.

use p2pit_tests::{Delay, Node, SOON, World, lines_of, of_job, wait_until};
use std::time::Duration;

#[test]
fn machines_form_a_pool_and_nothing_of_them_stays() {
    let Some(world) = World::of(&["sim:1xv100", "none"]) else { return };
    let job = world.named("n2").submit(&["Host", "[v100]", "-d", "hostname; sleep 600"]);
    let node = world.named("n1");
    wait_until("it runs", SOON, || lines_of(&node.log(&job), 0).contains(&"n1").then_some(()));
    let processes = of_job(&job);
    assert!(!processes.is_empty());
    drop(world);
    assert!(processes.iter().all(|it| it.has_ended()));
}

#[test]
fn late_packets() {
    let Some(mut world) = World::of(&["sim:1xv100", "none"]) else { return };
    let delay = Delay {
        by: Duration::from_millis(60),
        jitter: Duration::from_millis(60),
        early_per_mille: 50,
    };
    if !world.delay("n1", delay) || !world.delay("n2", delay) {
        return;
    }
    let started = std::time::Instant::now();
    let out = world.named("n2").p2pit(&["run", "Late", "[v100]", "-d", "echo ran", "-l"]).ok();
    println!("{:?} {:?}", started.elapsed(), world.relayed());
    assert_eq!(lines_of(&out, 0), ["ran"]);
}
