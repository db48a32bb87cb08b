//! Stories of a few machines: who competes, who dies when, which message goes astray.
//! Every checker watches all of them.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use p2pit_netsim::{
    Options, World,
    machine::CrashAt,
    run::finish,
    workload::{Behaviour, WARM_UP_MS},
    world::{Down, Treatment},
};
use p2pit_protocol::{
    bidder::WorkId,
    job::{Outcome, State},
    message::Message,
    request::Request,
};

/// The steward of every story's job, without a GPU that anybody wants.
const STEWARD: usize = 0;
/// Two of its bidders.
const BIDDERS: [usize; 2] = [1, 2];

/// Calls that one bidder lets wait.
const STANDING_MAX: usize = 64;

/// The states a job that runs goes through.
const STATES: [State; 6] = [
    State::Waiting,
    State::Preparing,
    State::Starting,
    State::Running,
    State::Cleaning,
    State::Done,
];

#[test]
fn two_gangs_that_each_want_every_gpu_both_run_one_after_the_other() {
    for seed in 0..8 {
        let mut world = pool(seed, &["2xv100", "2xv100", "2xv100"]);
        let gangs: Vec<usize> =
            (0..3).map(|origin| submit(&mut world, origin, "6:[v100]", 3_000)).collect();
        end(&mut world);
        assert!(gangs.iter().all(|gang| succeeded(&world, *gang)), "seed {seed}");
    }
}

#[test]
fn gangs_that_overlap_in_part_do_not_block_each_other() {
    for seed in 0..8 {
        let mut world = pool(seed, &["2xv100", "2xv100", "2xgtx1070", "1xv100,1xgtx1070"]);
        let requests = ["4:[v100]", "2:[v100],2:[gtx1070]", "3:[gtx1070]", "5:[v100]", "8:[gpu]"];
        let gangs: Vec<usize> = (0..10)
            .map(|n| submit(&mut world, n % 4, requests[n % requests.len()], 2_000))
            .collect();
        end(&mut world);
        assert!(gangs.iter().all(|gang| succeeded(&world, *gang)), "seed {seed}");
    }
}

#[test]
fn a_gang_that_finds_no_place_to_wait_does_not_keep_those_behind_it_from_theirs() {
    for seed in 0..2 {
        let mut world = pool(seed, &["1xgtx1070", "2xa100", "8xv100,1xrtx3090"]);
        let endless = |world: &mut World, request| {
            world.submit(STEWARD, Request::parse(request).unwrap(), Behaviour::endless())
        };
        let of_a100 = endless(&mut world, "2:[a100]");
        let of_v100 = endless(&mut world, "8:[v100]");
        reach(&mut world, of_a100, State::Running);
        reach(&mut world, of_v100, State::Running);
        // Both nodes let as many wait as they can; one gang and most small jobs have no place.
        let gangs: Vec<usize> =
            (0..STANDING_MAX + 1).map(|_| submit_in_order(&mut world, "2:[a100]", 100)).collect();
        let small: Vec<usize> =
            (0..5 * STANDING_MAX).map(|_| submit_in_order(&mut world, "[v100]", 100)).collect();
        // So that its advert, which rouses all, is not due again soon.
        for _ in 0..60 {
            let short = submit(&mut world, STEWARD, "[rtx3090]", 100);
            reach(&mut world, short, State::Done);
            pass(&mut world, 1_000);
        }
        world.stop(of_v100);
        let done = |world: &World| small.iter().all(|job| succeeded(world, *job));
        let in_time = world.run_until(45_000, done).unwrap();
        let late = small.iter().filter(|job| !succeeded(&world, **job)).count();
        assert!(in_time, "seed {seed}: {late} of {} wait though GPUs are free", small.len());
        assert!(gangs.iter().all(|gang| world.state_of(*gang) == Some(State::Waiting)));
        for waiting in gangs {
            world.stop(waiting);
        }
        world.stop(of_a100);
        end(&mut world);
    }
}

#[test]
fn a_steward_that_dies_in_any_state_finishes_its_job_after_its_return() {
    for state in STATES {
        for down in [Down::Daemon, Down::Machine] {
            let (mut world, gang) = gang_of_four(7);
            reach(&mut world, gang, state);
            world.crash(STEWARD, down, Some(5_000));
            end(&mut world);
            assert!(succeeded(&world, gang), "{down:?} in {state}: {:?}", outcome(&world, gang));
        }
    }
}

#[test]
fn a_bidder_whose_daemon_dies_in_any_state_does_not_end_the_job() {
    for state in STATES {
        for bidder in BIDDERS {
            let (mut world, gang) = gang_of_four(7);
            reach(&mut world, gang, state);
            // Processes that are just being started are lost with the daemon.
            if state == State::Starting {
                pass(&mut world, 400);
            }
            world.crash(bidder, Down::Daemon, Some(5_000));
            end(&mut world);
            assert!(succeeded(&world, gang), "n{bidder} in {state}: {:?}", outcome(&world, gang));
        }
    }
}

#[test]
fn a_bidder_whose_machine_dies_in_any_state_ends_the_job_only_if_a_process_was_lost() {
    for state in STATES {
        let (mut world, gang) = gang_of_four(7);
        reach(&mut world, gang, state);
        world.crash(BIDDERS[0], Down::Machine, Some(5_000));
        end(&mut world);
        let lost = matches!(outcome(&world, gang), Some(Outcome::Lost { .. }));
        let may_be_lost = matches!(state, State::Starting | State::Running | State::Cleaning);
        assert!(succeeded(&world, gang) || lost && may_be_lost, "in {state}");
    }
}

#[test]
fn a_daemon_may_die_before_or_after_any_entry_of_its_journal() {
    for machine in [STEWARD, BIDDERS[0]] {
        let (mut whole, gang) = gang_of_four(3);
        let first = whole.machines[machine].writes;
        end(&mut whole);
        assert!(succeeded(&whole, gang));
        let entries = whole.machines[machine].writes - first;
        assert!(entries > 5, "n{machine} wrote {entries} entries");
        for entry in first..first + entries {
            for after in [false, true] {
                let (mut world, gang) = gang_of_four(3);
                world.crash_at_write(machine, CrashAt { entry, after, down_ms: 4_000 });
                end(&mut world);
                assert_eq!(world.counts.write_crashes, 1, "entry {entry}");
                let done = world.state_of(gang) == Some(State::Done);
                assert!(done, "n{machine}, entry {entry}, after {after}");
                // Only what was being started can be lost with its daemon.
                if machine == STEWARD || every_rank_ran(&world, gang) {
                    assert!(succeeded(&world, gang), "n{machine}, entry {entry}, after {after}");
                }
            }
        }
    }
}

#[test]
fn a_daemon_may_die_again_while_it_mends_what_its_first_death_left() {
    let gang_of_six = || {
        let mut world = pool(3, &["1xgtx1070", "3xv100", "3xv100"]);
        let gang = submit(&mut world, STEWARD, "6:[v100]", 4_000);
        (world, gang)
    };
    let (mut whole, gang) = gang_of_six();
    reach(&mut whole, gang, State::Preparing);
    let first = whole.machines[BIDDERS[0]].writes;
    reach(&mut whole, gang, State::Running);
    for entry in first..whole.machines[BIDDERS[0]].writes {
        for later in 1..8 {
            let (mut world, _) = gang_of_six();
            let crash = CrashAt { entry, after: true, down_ms: 1_000 };
            world.crash_at_write(BIDDERS[0], crash);
            assert!(world.run_until(60_000, |world| world.counts.write_crashes == 1).unwrap());
            let again = CrashAt { entry: entry + later, ..crash };
            world.crash_at_write(BIDDERS[0], again);
            end(&mut world);
        }
    }
}

#[test]
fn a_rank_that_waits_in_vain_beside_one_that_was_lost_is_reported() {
    let (mut whole, gang) = gang_of_four(3);
    reach(&mut whole, gang, State::Preparing);
    let first = whole.machines[BIDDERS[0]].writes;
    reach(&mut whole, gang, State::Running);
    for entry in first..whole.machines[BIDDERS[0]].writes {
        let (mut world, _) = gang_of_four(3);
        let crash = CrashAt { entry, after: true, down_ms: 2_000 };
        world.crash_at_write(BIDDERS[0], crash);
        assert!(world.run_until(60_000, |world| world.counts.write_crashes == 1).unwrap());
        // Its steward's starts do not reach it, nor does one refusal reach the steward.
        world.intercept(|letter| match letter.message {
            Message::Start(_) if letter.to == BIDDERS[0] => Treatment::Lose,
            Message::CommitRefused { .. } => Treatment::Lose,
            _ => Treatment::AsDrawn,
        });
        pass(&mut world, 130_000);
        world.intercept(|_| Treatment::AsDrawn);
        end(&mut world);
    }
}

#[test]
fn a_node_that_dies_right_after_its_commit_is_replaced() {
    let (mut world, gang) = gang_with_a_spare(5);
    reach(&mut world, gang, State::Preparing);
    let node = node_of_rank_0(&world, gang);
    world.crash(node, Down::Machine, None);
    let running = |world: &World| world.state_of(gang) == Some(State::Running);
    assert!(world.run_until(120_000, running).unwrap(), "not running without n{node}");
    assert!(world.counts.unassigns >= 1);
    world.start(node);
    end(&mut world);
}

#[test]
fn of_a_gang_whose_node_dies_at_the_start_nothing_stays() {
    let (mut world, gang) = gang_with_a_spare(5);
    reach(&mut world, gang, State::Starting);
    let node = node_of_rank_0(&world, gang);
    world.crash(node, Down::Machine, None);
    let job = world.workload.tasks[gang].job.unwrap();
    pass(&mut world, 5_000);
    assert_eq!(world.ledger.live(job).count(), 2, "the others run");
    pass(&mut world, 60_000);
    assert_eq!(world.ledger.live(job).count(), 0, "a part of the gang stays");
    // Whether its ranks ran only the node can tell: nothing is started anew before.
    assert_eq!(world.state_of(gang), Some(State::Stopping));
    world.start(node);
    end(&mut world);
}

#[test]
fn a_job_that_is_stopped_in_any_state_ends_as_stopped() {
    for state in [State::Waiting, State::Preparing, State::Starting, State::Running] {
        let mut world = pool(9, &["1xgtx1070", "2xv100", "2xv100"]);
        let behaviour = Behaviour { prepare_ms_max: 2_000, ..Behaviour::endless() };
        let request = Request::parse("4:[v100]").unwrap();
        let gang = world.submit(STEWARD, request, behaviour);
        reach(&mut world, gang, state);
        world.stop(gang);
        end(&mut world);
        assert!(matches!(outcome(&world, gang), Some(Outcome::Stopped { .. })), "in {state}");
    }
}

#[test]
fn a_stop_that_was_accepted_holds_though_the_steward_dies_at_once() {
    for state in [State::Waiting, State::Preparing, State::Starting, State::Running] {
        let mut world = pool(9, &["1xgtx1070", "2xv100", "2xv100"]);
        let behaviour = Behaviour { prepare_ms_max: 2_000, ..Behaviour::endless() };
        let gang = world.submit(STEWARD, Request::parse("4:[v100]").unwrap(), behaviour);
        reach(&mut world, gang, state);
        world.stop(gang);
        let job = world.workload.tasks[gang].job.unwrap();
        let accepted =
            |world: &World| world.ledger.stops.contains_key(&job) || world.ledger.is_done(job);
        assert!(world.run_until(10_000, accepted).unwrap());
        world.crash(STEWARD, Down::Daemon, Some(5_000));
        end(&mut world);
        assert!(matches!(outcome(&world, gang), Some(Outcome::Stopped { .. })), "in {state}");
    }
}

#[test]
fn a_gang_stopped_while_its_failed_start_is_undone_is_not_started_again() {
    // One rank cannot start, so the gang is on its way back to the auction when its owner
    // stops it; the steward dies before the last rank has ended.
    let (mut world, gang) = gang_with_a_spare(2);
    reach(&mut world, gang, State::Starting);
    let job = world.workload.tasks[gang].job.unwrap();
    let node = node_of_rank_0(&world, gang);
    world.crash(node, Down::Machine, None);
    let stopping = |world: &World| world.state_of(gang) == Some(State::Stopping);
    assert!(world.run_until(120_000, stopping).unwrap());
    world.stop(gang);
    assert!(world.run_until(10_000, |world| world.ledger.stops.contains_key(&job)).unwrap());
    world.crash(STEWARD, Down::Daemon, Some(3_000));
    pass(&mut world, 5_000);
    world.start(node);
    end(&mut world);
    assert!(matches!(outcome(&world, gang), Some(Outcome::Stopped { .. })));
}

#[test]
fn commitments_whose_withdrawal_is_lost_end_by_their_own_clock() {
    let mut world = pool(4, &["1xgtx1070", "2xv100", "2xv100"]);
    let behaviour = Behaviour { prepare_ms_max: 3_600_000, ..Behaviour::endless() };
    let gang = world.submit(STEWARD, Request::parse("4:[v100]").unwrap(), behaviour);
    reach(&mut world, gang, State::Preparing);
    let committed = |world: &World| {
        BIDDERS.iter().all(|at| world.machines[*at].daemon.as_ref().unwrap().book().1.count() == 2)
    };
    assert!(world.run_until(5_000, committed).unwrap());
    world.intercept(|letter| match letter.message {
        Message::Withdraw { .. } => Treatment::Lose,
        _ => Treatment::AsDrawn,
    });
    world.stop(gang);
    pass(&mut world, 60_000);
    assert!(committed(&world), "nobody told them");
    pass(&mut world, 65_000);
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn old_copies_of_every_message_change_nothing() {
    for seed in 0..4 {
        let mut world = pool(seed, &["1xgtx1070", "2xv100", "2xv100", "1xv100,2xgtx1070"]);
        // Each message leads to less than one more copy, else they would never end.
        let mut sent = 0_usize;
        world.intercept(move |_| {
            sent += 1;
            let again_ms = [40, 2_500, 30_000, 170_000][sent % 4];
            if sent.is_multiple_of(3) {
                Treatment::Repeat(vec![again_ms])
            } else {
                Treatment::AsDrawn
            }
        });
        let requests = ["4:[v100]", "[v100]", "2:[gtx1070]", "5:[v100]", "[2:v100]"];
        let jobs: Vec<usize> = (0..10)
            .map(|n| submit(&mut world, n % 4, requests[n % requests.len()], 4_000))
            .collect();
        end(&mut world);
        // The last copies arrive when everything is long over.
        pass(&mut world, 200_000);
        assert_eq!(world.leftovers(), Vec::<String>::new());
        for job in &jobs {
            assert!(succeeded(&world, *job), "seed {seed}: {:?}", outcome(&world, *job));
        }
    }
}

#[test]
fn a_hold_that_ended_while_its_machine_was_down_does_not_come_back() {
    for uptime_ms in [500, 6_000] {
        for down_ms in [1_000, 6_000, 14_000] {
            for crash_ms in [500, 4_000, 9_000, 12_000] {
                let mut world = pool(uptime_ms + crash_ms, &["1xgtx1070", "2xv100", "2xv100"]);
                // So that the boot clocks before and after the reboot can be mistaken.
                world.crash(1, Down::Machine, Some(100));
                pass(&mut world, uptime_ms);
                // Its holds are there, and nobody pins, renews or releases them.
                world.intercept(|letter| match letter.message {
                    Message::Pin { .. } | Message::Release { .. } => Treatment::Lose,
                    _ => Treatment::AsDrawn,
                });
                submit(&mut world, STEWARD, "4:[v100]", 1_000);
                let book = |world: &World| {
                    world.machines[1].daemon.as_ref().map_or(0, |peer| peer.book().0.count())
                };
                assert!(world.run_until(5_000, |world| book(world) > 0).unwrap());
                world.cut(vec![(STEWARD, 1), (1, STEWARD)], 40_000);
                world.crash(1, Down::Machine, Some(down_ms));
                pass(&mut world, down_ms + crash_ms);
                world.crash(1, Down::Daemon, Some(200));
                pass(&mut world, 30_000);
                world.intercept(|_| Treatment::AsDrawn);
                end(&mut world);
            }
        }
    }
}

#[test]
fn a_copy_of_a_refused_submission_does_not_bring_the_job_to_life() {
    // Nobody has heard of the only node that could run it.
    let options = Options::calm(1, &["1xgtx1070", "1xgtx1070", "1xa100"]);
    let mut world = World::new(options, false).unwrap();
    let around = |other| [(other, 2), (2, other)];
    world.cut([0, 1, 3].into_iter().flat_map(around).collect(), 40_000);
    pass(&mut world, WARM_UP_MS);
    let client = world.machines.len() - 1;
    world.intercept(|letter| match letter.message {
        Message::Init { .. } => Treatment::Repeat(vec![60_000]),
        _ => Treatment::AsDrawn,
    });
    let task = submit(&mut world, client, "[a100]", 1_000);
    let refused = |world: &World| !world.ledger.refused.is_empty();
    assert!(world.run_until(30_000, refused).unwrap());
    for keeper in [0, 1] {
        world.crash(keeper, Down::Daemon, Some(1_000));
    }
    pass(&mut world, 90_000);
    end(&mut world);
    assert!(succeeded(&world, task), "a fresh submission of it is taken");
}

#[test]
fn a_daemon_restarted_while_its_processes_run_says_that_they_run() {
    let mut world = pool(7, &["1xgtx1070", "2xv100", "2xv100"]);
    let request = Request::parse("4:[v100]").unwrap();
    let gang = world.submit(STEWARD, request, Behaviour::endless());
    reach(&mut world, gang, State::Starting);
    // The steward hears of none of them while their first daemons live.
    world.intercept(|letter| match letter.message {
        Message::Report(_) => Treatment::Lose,
        _ => Treatment::AsDrawn,
    });
    let job = world.workload.tasks[gang].job.unwrap();
    assert!(world.run_until(5_000, |world| world.ledger.live(job).count() == 4).unwrap());
    for bidder in BIDDERS {
        world.crash(bidder, Down::Daemon, Some(100));
    }
    world.intercept(|_| Treatment::AsDrawn);
    let running = |world: &World| world.state_of(gang) == Some(State::Running);
    assert!(world.run_until(5_000, running).unwrap());
    assert_eq!(world.ledger.live(job).count(), 4);
    world.stop(gang);
    end(&mut world);
}

#[test]
fn a_job_that_never_ends_counts_as_lack_of_progress_and_so_does_what_is_left() {
    let mut world = pool(1, &["1xv100"]);
    let task = world.submit(STEWARD, Request::parse("[v100]").unwrap(), Behaviour::endless());
    reach(&mut world, task, State::Running);
    let stuck = finish(&mut world).unwrap();
    assert!(stuck.len() == 1 && stuck[0].contains("is RUNNING at attempt 1"), "{stuck:?}");
    let left = world.leftovers();
    for what in ["at Running", "drives 1 jobs", "has process", "journals Work"] {
        assert!(left.iter().any(|left| left.contains(what)), "{left:?}");
    }
}

#[test]
fn a_steward_whose_boot_clock_jumps_is_silent_until_it_is_heard_again() {
    for by_ms in [30_000, -5_000] {
        let mut world = pool(1, &["1xgtx1070", "2xv100", "2xv100"]);
        let gang = world.submit(STEWARD, Request::parse("4:[v100]").unwrap(), Behaviour::endless());
        reach(&mut world, gang, State::Running);
        let job = world.workload.tasks[gang].job.unwrap();
        pass(&mut world, 60_000);
        assert_eq!(world.counts.silences, 0);
        world.step_boot_clock(STEWARD, by_ms);
        let silent = |world: &World| world.counts.silences == 1;
        assert!(world.run_until(15_000, silent).unwrap(), "{by_ms} ms were not noticed");
        let acts = |world: &World| world.ledger.acting.contains_key(&job);
        assert!(world.run_until(5_000, acts).unwrap(), "{by_ms} ms were the end of it");
        pass(&mut world, 60_000);
        assert_eq!((world.counts.silences, world.counts.takeovers), (1, 0));
        world.stop(gang);
        end(&mut world);
    }
}

#[test]
fn once_running_is_recorded_no_process_of_a_job_that_continues_has_a_deadline() {
    let mut world = pool(1, &["1xgtx1070", "2xv100", "2xv100"]);
    let gang = world.submit(STEWARD, Request::parse("4:[v100]").unwrap(), Behaviour::endless());
    reach(&mut world, gang, State::Running);
    pass(&mut world, 1_000);
    let processes = world.machines.iter().flat_map(|machine| machine.executor.processes.values());
    let deadlines: Vec<Option<u64>> = processes.map(|process| process.until_ms).collect();
    assert_eq!(deadlines, [None; 4], "a daemon that dies now takes its processes along");
    world.stop(gang);
    end(&mut world);
}

#[test]
fn a_boot_clock_that_is_five_percent_off_is_noticed_and_touches_no_process() {
    let rates = [10_000, 50_000, 400_000].map(|ppm| [(ppm, ppm > 10_000), (-ppm, ppm > 10_000)]);
    for (drift_ppm, is_noticed) in rates.into_iter().flatten() {
        let mut world = pool(1, &["1xgtx1070", "2xv100", "2xv100"]);
        let gang = submit(&mut world, STEWARD, "4:[v100]", 1);
        world.workload.tasks[gang].behaviour = Behaviour::endless();
        reach(&mut world, gang, State::Running);
        world.set_boot_drift(STEWARD, drift_ppm);
        pass(&mut world, 300_000);
        assert_eq!(world.counts.silences > 0, is_noticed, "{drift_ppm} ppm");
        let job = world.workload.tasks[gang].job.unwrap();
        assert_eq!(world.ledger.live(job).count(), 4, "{drift_ppm} ppm");
        world.set_boot_drift(STEWARD, 0);
        world.stop(gang);
        end(&mut world);
        assert_eq!(world.counts.lease_ends, 0, "{drift_ppm} ppm");
    }
}

#[test]
fn a_node_that_is_no_member_any_more_waits_quietly() {
    let mut world = World::new(Options::calm(1, &["1xv100", "1xv100"]), false).unwrap();
    world.machines[1].journal.clear();
    pass(&mut world, 60_000);
    assert!(world.counts.events < 1_000, "{} events", world.counts.events);
}

/// A pool whose nodes know each other.
fn pool(seed: u64, inventory: &[&str]) -> World {
    let mut world = World::new(Options::calm(seed, inventory), false).unwrap();
    pass(&mut world, WARM_UP_MS);
    world
}

/// A steward without a GPU of use, and a gang over both bidders, two ranks on each.
fn gang_of_four(seed: u64) -> (World, usize) {
    let mut world = pool(seed, &["1xgtx1070", "2xv100", "2xv100"]);
    let behaviour = Behaviour { prepare_ms_max: 1_500, ..Behaviour::plain(8_000) };
    let gang = world.submit(STEWARD, Request::parse("4:[v100]").unwrap(), behaviour);
    (world, gang)
}

/// An endless gang of four, with a node more than it needs.
fn gang_with_a_spare(seed: u64) -> (World, usize) {
    let mut world = pool(seed, &["1xgtx1070", "2xv100", "2xv100", "2xv100"]);
    let behaviour = Behaviour { limit_ms: Some(90_000), ..Behaviour::endless() };
    let gang = world.submit(STEWARD, Request::parse("4:[v100]").unwrap(), behaviour);
    (world, gang)
}

fn node_of_rank_0(world: &World, task: usize) -> usize {
    let job = world.workload.tasks[task].job.unwrap();
    let node = world.ledger.current(job).unwrap().body.ranks[0].assignment.node;
    world.machine_of(node).unwrap()
}

fn submit(world: &mut World, origin: usize, request: &str, run_ms_max: u64) -> usize {
    world.submit(origin, Request::parse(request).unwrap(), Behaviour::plain(run_ms_max))
}

/// Each a little later than the one before: keys in the order of submission.
fn submit_in_order(world: &mut World, request: &str, run_ms_max: u64) -> usize {
    let task = submit(world, STEWARD, request, run_ms_max);
    pass(world, 2);
    task
}

fn pass(world: &mut World, ms: u64) {
    world.run_until(ms, |_| false).unwrap_or_else(|violation| panic!("{violation}"));
}

fn reach(world: &mut World, task: usize, state: State) {
    let reached = |world: &World| world.state_of(task) >= Some(state);
    let is_reached = world.run_until(120_000, reached).unwrap_or_else(|v| panic!("{v}"));
    assert!(is_reached, "task {task} did not come to {state}");
}

/// Everything comes to its end, and nothing is left of it.
fn end(world: &mut World) {
    let stuck = finish(world).unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!(stuck, Vec::<String>::new());
}

fn every_rank_ran(world: &World, task: usize) -> bool {
    let job = world.workload.tasks[task].job.unwrap();
    let body = &world.ledger.current(job).unwrap().body;
    let ids = body.ranks.iter().map(|rank| WorkId {
        job,
        attempt: body.attempt,
        rank: rank.assignment.rank,
    });
    ids.into_iter().all(|id| world.ledger.ran(id))
}

fn outcome(world: &World, task: usize) -> Option<Outcome> {
    let job = world.workload.tasks[task].job?;
    world.ledger.current(job)?.body.outcome.clone()
}

fn succeeded(world: &World, task: usize) -> bool {
    outcome(world, task) == Some(Outcome::Succeeded)
}
