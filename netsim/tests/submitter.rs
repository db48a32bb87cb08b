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
/// Jobs that end differently.
const KINDS: usize = 6;
/// How long the jobs together may take.
const ALL_MS: u64 = 30 * 60_000;

/// Clients submit: they die one after the other.
#[test]
fn a_client_that_dies_right_after_submitted_changes_no_outcome() {
    let inventory = ["2xv100,1xgtx1070", "2xv100", "2xv100", "1xgtx1070"];
    let kinds: Vec<usize> = (0..KINDS).chain(0..KINDS).collect();
    for seed in 0..SEEDS {
        changes_nothing(seed, &|down| {
            let origins = inventory.len()..;
            let submissions: Vec<_> = origins.zip(kinds.clone()).collect();
            outcomes(seed, &inventory, &submissions, down)
        });
    }
}

/// A node submits that keeps its job's record and drives it, too: it dies with both.
#[test]
fn a_steward_that_dies_right_after_submitted_changes_no_outcome() {
    let inventory = ["1xrtx3090", "2xv100,1xgtx1070", "2xv100", "2xv100,1xgtx1070"];
    for (seed, kind) in (0..KINDS).map(|kind| (kind as u64, kind)) {
        changes_nothing(seed, &|down| outcomes(seed, &inventory, &[(0, kind)], down));
    }
}

fn changes_nothing(seed: u64, outcomes: &dyn Fn(Option<Down>) -> Vec<Outcome>) {
    let with = outcomes(None);
    for down in [Down::Daemon, Down::Machine] {
        assert_eq!(outcomes(Some(down)), with, "seed {seed}, {down:?}");
    }
}

type Expected = fn(&Outcome) -> bool;

/// Every way to end that does not depend on chance, with what it needs.
fn kinds() -> [(&'static str, Behaviour, Expected); KINDS] {
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

/// How the jobs of a pool on bad links end: each as its kind must. Their submitters, each with
/// the kind of its job, die where and as soon as they were told `submitted`.
fn outcomes(
    seed: u64,
    inventory: &[&str],
    submissions: &[(usize, usize)],
    down: Option<Down>,
) -> Vec<Outcome> {
    let machines = submissions.iter().map(|(origin, _)| origin + 1).max().unwrap_or(0);
    let options = Options {
        clients: machines.saturating_sub(inventory.len()),
        latency_ms_spread: 40,
        jitter_ms_max: 60,
        loss_permille: 30,
        duplicate_permille: 50,
        gossip_loss_permille: 100,
        ..Options::calm(seed, inventory)
    };
    let mut world = World::new(options, false).unwrap();
    let go_on = |world: &mut World, ms, reached: &dyn Fn(&World) -> bool| {
        world.run_until(ms, reached).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    go_on(&mut world, WARM_UP_MS, &|_| false);
    let mut living: Vec<(usize, usize)> = Vec::new();
    for (origin, kind) in submissions {
        let (request, behaviour, _) = &kinds()[*kind];
        let task = world.submit(*origin, Request::parse(request).unwrap(), behaviour.clone());
        living.push((task, *origin));
    }
    let tasks = living.len();
    while !living.is_empty() {
        let told = |world: &World, task: usize| world.workload.tasks[task].job.is_some();
        let any = |world: &World| living.iter().any(|(task, _)| told(world, *task));
        assert!(go_on(&mut world, ALL_MS, &any), "seed {seed}: not submitted");
        living.retain(|(task, origin)| {
            let told = told(&world, *task);
            if let Some(down) = down.filter(|_| told) {
                // Not a moment later.
                world.crash(*origin, down, None);
            }
            !told
        });
    }
    let done = |world: &World, task| world.state_of(task) == Some(State::Done);
    let all = |world: &World| (0..tasks).all(|task| done(world, task));
    assert!(go_on(&mut world, ALL_MS, &all), "seed {seed}, {down:?}: not all ended");
    world.heal();
    assert_eq!(finish(&mut world).unwrap(), Vec::<String>::new(), "seed {seed}, {down:?}");
    let outcome = |(task, (_, kind)): (usize, &(usize, usize))| {
        let job = world.workload.tasks[task].job.unwrap();
        let outcome = world.ledger.current(job).unwrap().body.outcome.clone().unwrap();
        assert!(kinds()[*kind].2(&outcome), "seed {seed}, {down:?}: job {task} is {outcome:?}");
        match outcome {
            // With which code is drawn when it fails, and so by what came before.
            Outcome::Failed { .. } => Outcome::Failed { code: 1 },
            other => other,
        }
    };
    submissions.iter().enumerate().map(outcome).collect()
}
