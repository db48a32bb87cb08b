//! Killing the submitter right after `submitted` changes no outcome: the same jobs are played
//! twice with one seed, and once each of their submitters dies at that moment and never comes
//! back before all is over.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use p2pit_netsim::{
    Options, World,
    run::finish,
    workload::{Behaviour, WARM_UP_MS},
    world::Down,
};
use p2pit_protocol::{
    job::{Outcome, State},
    request::Request,
};

/// Worlds each of which is played with living and with dead submitters.
const SEEDS: u64 = 12;
/// How long the jobs together may take.
const ALL_MS: u64 = 30 * 60_000;

#[test]
fn a_submitter_that_dies_right_after_submitted_changes_no_outcome() {
    for seed in 0..SEEDS {
        let with = outcomes(seed, None);
        for (index, how) in with.iter().enumerate() {
            let expected = index % jobs().len();
            assert!(jobs()[expected].2(how), "seed {seed}: job {index} is {how:?}");
        }
        for down in [Down::Daemon, Down::Machine] {
            assert_eq!(outcomes(seed, Some(down)), with, "seed {seed}, {down:?}");
        }
    }
}

type Expected = fn(&Outcome) -> bool;

/// Every way to end that does not depend on chance, with what it needs.
fn jobs() -> [(&'static str, Behaviour, Expected); 6] {
    let plain = Behaviour { run_ms_min: 4_000, ..Behaviour::plain(4_000) };
    let failing = Behaviour { failure_permille: 1_000, ..plain.clone() };
    [
        ("[v100]", plain.clone(), |how| *how == Outcome::Succeeded),
        ("4:[v100]", plain.clone(), |how| *how == Outcome::Succeeded),
        ("2:[v100],1:[gtx1070]", failing.clone(), |how| matches!(how, Outcome::Failed { .. })),
        ("[2:v100]", failing.retried(2), |how| matches!(how, Outcome::Failed { .. })),
        ("2:[v100]", Behaviour { limit_ms: Some(9_000), ..Behaviour::endless() }, |how| {
            *how == Outcome::TimedOut
        }),
        ("3:[v100]", Behaviour { stop_after_ms: Some(60_000), ..Behaviour::endless() }, |how| {
            matches!(how, Outcome::Stopped { .. })
        }),
    ]
}

/// How each job of a crowded pool on bad links ends. Each has a submitter of its own: a client,
/// which dies where and as soon as it was told `submitted`.
fn outcomes(seed: u64, down: Option<Down>) -> Vec<Outcome> {
    let inventory = ["2xv100,1xgtx1070", "2xv100", "2xv100", "1xgtx1070"];
    let jobs = jobs();
    let mut world = World::new(
        Options {
            clients: 2 * jobs.len(),
            latency_ms_spread: 40,
            jitter_ms_max: 60,
            loss_permille: 30,
            duplicate_permille: 50,
            gossip_loss_permille: 100,
            ..Options::calm(seed, &inventory)
        },
        false,
    )
    .unwrap();
    let go_on = |world: &mut World, ms, reached: &dyn Fn(&World) -> bool| {
        world.run_until(ms, reached).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    go_on(&mut world, WARM_UP_MS, &|_| false);
    let mut living: Vec<(usize, usize)> = Vec::new();
    for (index, (request, behaviour, _)) in jobs.iter().chain(&jobs).enumerate() {
        let client = inventory.len() + index;
        let task = world.submit(client, Request::parse(request).unwrap(), behaviour.clone());
        living.push((task, client));
    }
    let tasks = living.len();
    while !living.is_empty() {
        let told = |world: &World, task: usize| world.workload.tasks[task].job.is_some();
        let any = |world: &World| living.iter().any(|(task, _)| told(world, *task));
        assert!(go_on(&mut world, ALL_MS, &any), "seed {seed}: not submitted");
        living.retain(|(task, client)| {
            let told = told(&world, *task);
            if let Some(down) = down.filter(|_| told) {
                // Not a moment later.
                world.crash(*client, down, None);
            }
            !told
        });
    }
    let done = |world: &World, task| world.state_of(task) == Some(State::Done);
    let all = |world: &World| (0..tasks).all(|task| done(world, task));
    assert!(go_on(&mut world, ALL_MS, &all), "seed {seed}, {down:?}: not all ended");
    world.heal();
    assert_eq!(finish(&mut world).unwrap(), Vec::<String>::new(), "seed {seed}, {down:?}");
    let outcome = |task: usize| {
        let job = world.workload.tasks[task].job.unwrap();
        match world.ledger.current(job).unwrap().body.outcome.clone().unwrap() {
            // With which code is drawn when it fails, and so by what came before.
            Outcome::Failed { .. } => Outcome::Failed { code: 1 },
            other => other,
        }
    };
    (0..tasks).map(outcome).collect()
}
