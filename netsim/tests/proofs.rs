//! Every checker is proved: with its rule removed it notices, within a few seeds or in a story,
//! before any other does; and with the rule in place the same run is fine. Where another always
//! notices before it, the checker is shown to notice where it watches alone.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use std::path::Path;

use p2pit_netsim::{
    Ending, Options,
    check::Violation,
    run,
    scenario::{load, play, play::RULE as STORY},
    workload::{Behaviour, WARM_UP_MS},
    world::{Treatment, World},
};
use p2pit_protocol::{job::State, message::Message, request::Request, sabotage::Rule};

/// Seeds tried before a rule counts as not missed by anybody.
const SEEDS: u64 = 12;
/// The same, for each way to play a story.
const SEEDS_OF_STORY: u64 = 2;

#[test]
fn without_taken_is_not_free_a_gpu_is_given_to_two_jobs() {
    prove(Rule::TakenIsNotFree, "G1", busy);
}

#[test]
fn without_certificates_a_bidder_commits_to_what_nobody_chose() {
    prove(Rule::CommitNeedsCertificate, "G3", busy);
}

#[test]
fn without_expiry_a_hold_stays_for_ever() {
    prove(Rule::HoldsExpire, "G4", |seed| Options { loss_permille: 150, ..busy(seed) });
}

#[test]
fn without_their_protection_pins_are_wounded() {
    prove(Rule::PinsAreNotWounded, "Q2", |seed| Options {
        // A slow network: a pin lasts long enough for a higher job's call to meet it.
        latency_ms_min: 60,
        latency_ms_spread: 200,
        ..busy(seed)
    });
}

#[test]
fn without_waiting_for_the_start_a_process_runs_that_no_record_started() {
    prove(Rule::StartOnlyWhenTold, "X2", busy);
}

#[test]
fn without_waiting_for_all_ranks_a_part_of_a_gang_is_started() {
    prove(Rule::GangStartsWhole, "X4", busy);
}

#[test]
fn without_ballots_of_their_own_two_proposers_have_two_values_accepted_at_one() {
    prove_by_story(Rule::BallotsDiffer, "R1", "two-take-over-at-once");
}

#[test]
fn without_going_on_from_what_was_accepted_last_what_was_chosen_is_undone() {
    prove(Rule::LastAcceptedWins, "R2", Options::stress_all);
}

#[test]
fn without_seals_that_end_an_epoch_another_value_is_chosen_in_it() {
    prove_by_story(Rule::SealEndsEpoch, "R3", "steward-dies-replacing-a-keeper");
}

#[test]
fn without_refusing_what_is_below_its_promise_a_keeper_promises_less_than_before() {
    prove(Rule::AcceptNeedsPromise, "R5", Options::stress_all);
}

#[test]
fn without_keeping_promises_a_keeper_promises_less_than_before() {
    prove(Rule::PromiseIsKept, "R5", Options::stress_all);
}

#[test]
fn without_exactly_the_sealed_body_an_epoch_begins_with_another() {
    prove(Rule::EpochStartsFromSeal, "R4", Options::stress_all);
}

#[test]
fn without_waiting_a_keeper_takes_over_while_the_steward_acts() {
    // With two stewards at once anything may go wrong first.
    let only = Some("S1");
    prove(Rule::TakeoverWaits, "S1", |seed| Options {
        watched_rule: only,
        ..Options::stress_all(seed)
    });
}

#[test]
fn without_fencing_itself_a_steward_acts_while_its_successor_does() {
    prove_by_story(Rule::StewardFences, "S1", "partition-100s");
}

#[test]
fn without_new_terms_two_stewards_have_the_same() {
    prove(Rule::TermCounts, "S2", Options::stress_all);
}

#[test]
fn without_waiting_for_its_lease_a_rank_that_still_runs_is_run_again() {
    let story = "partition-10m-restart";
    // The record gives the rank up before it names the next attempt, so X2 is always first.
    prove_by_story(Rule::RerunWaitsForLease, "X2", story);
    prove_by_story_alone(Rule::RerunWaitsForLease, "X1", story);
}

#[test]
fn without_writing_down_that_it_was_started_a_rank_is_started_again() {
    prove(Rule::StartIsWritten, "X3", Options::stress_all);
}

#[test]
fn without_asking_whose_it_is_another_attempts_end_becomes_the_result() {
    prove_by_story(Rule::ResultNamesAttempt, "X5", "partition-10m-restart");
}

#[test]
fn without_leases_that_bind_a_process_runs_past_its_own() {
    prove_by_story(Rule::LeaseBinds, "X6", "partition-10m-restart");
}

#[test]
fn without_a_second_copy_of_its_inputs_a_job_is_called_submitted() {
    prove(Rule::InputsOnTwoNodes, "D1", Options::stress_all);
}

#[test]
fn without_waiting_for_copies_a_job_is_done_and_one_node_has_what_it_left() {
    prove(Rule::DoneWaitsForCopies, "D2", Options::stress_all);
}

#[test]
fn without_asking_for_saves_a_retry_begins_with_an_older_copy() {
    prove_by_story(Rule::RetryTakesNewestSave, "D3", "retry-gets-newest-save");
}

#[test]
fn without_an_end_to_their_time_calls_of_jobs_that_ended_stand_for_ever() {
    let notice = |removed_rule| {
        let options = Options::calm(1, &["1xgtx1070", "1xv100"]);
        let mut world = World::new(Options { removed_rule, ..options }, false).unwrap();
        world.run_until(WARM_UP_MS, |_| false)?;
        let endless = |world: &mut World| {
            world.submit(0, Request::parse("[v100]").unwrap(), Behaviour::endless())
        };
        let first = endless(&mut world);
        let runs = |world: &World| world.state_of(first) == Some(State::Running);
        assert!(world.run_until(60_000, runs)?);
        let second = endless(&mut world);
        let waits = |world: &World| world.leftovers().iter().any(|left| left.ends_with(" wait"));
        assert!(world.run_until(60_000, waits)?);
        // Its owner gives it up, and the bidder never hears of that.
        world.intercept(|letter| match letter.message {
            Message::Release { .. } => Treatment::Lose,
            _ => Treatment::AsDrawn,
        });
        world.stop(second);
        assert!(world.run_until(60_000, |world| world.state_of(second) == Some(State::Done))?);
        world.run_until(60_000, |_| false)?;
        assert!(waits(&world), "it was told in another way");
        world.run_until(30 * 60_000, |_| false)?;
        assert!(!waits(&world), "a call stands, and nobody noticed");
        Ok(())
    };
    assert_eq!(notice(None), Ok(()));
    let Violation { rule, .. } = notice(Some(Rule::CallsExpire)).unwrap_err();
    assert_eq!(rule, "W2");
}

#[test]
fn without_seeded_randomness_the_same_seed_comes_out_differently() {
    let seeds = 0..SEEDS;
    let differs = seeds.into_iter().find(|seed| {
        let removed_rule = Some(Rule::OnlySeededRandomness);
        let hash = || run(Options { removed_rule, ..busy(*seed) }, false).unwrap().hash;
        hash() != hash()
    });
    let seed = differs.expect("no seed came out differently");
    let hash = || run(busy(seed), false).unwrap().hash;
    assert_eq!(hash(), hash());
}

/// With every rule each of the first seeds is fine, and without `rule` it is `checker` that
/// notices first.
fn prove(rule: Rule, checker: &str, options: impl Fn(u64) -> Options) {
    let noticed = (0..SEEDS).find_map(|seed| {
        let ending = |options| run(options, false).unwrap().ending;
        let label = format!("seed {seed}");
        assert_eq!(ending(options(seed)), Ending::Fine, "{label}, with every rule");
        violation(ending(Options { removed_rule: Some(rule), ..options(seed) }))
            .map(|violation| (label, violation))
    });
    expect_noticed(rule, checker, noticed);
}

/// The same, in the story of a file in `scenarios/`.
fn prove_by_story(rule: Rule, checker: &'static str, file: &str) {
    expect_noticed(rule, checker, noticed_in_story(rule, None, file));
}

/// The same, where nothing but `checker` is watched.
fn prove_by_story_alone(rule: Rule, checker: &'static str, file: &str) {
    expect_noticed(rule, checker, noticed_in_story(rule, Some(checker), file));
}

/// What is noticed first without `rule`, and when; each way to play the story is fine with it.
fn noticed_in_story(
    rule: Rule,
    watched_rule: Option<&'static str>,
    file: &str,
) -> Option<(String, Violation)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let story = load(&folder.join(format!("{file}.yaml"))).unwrap_or_else(|e| panic!("{e}"));
    let ways = story.variants.iter().flat_map(|way| (1..=SEEDS_OF_STORY).map(move |n| (way, n)));
    ways.into_iter().find_map(|(way, seed)| {
        let ending = |options| play(way, options, false).unwrap().ending;
        let label = format!("seed {seed} {}", way.label());
        assert_eq!(ending(way.options(seed)), Ending::Fine, "{label}, with every rule");
        let removed_rule = Some(rule);
        violation(ending(Options { removed_rule, watched_rule, ..way.options(seed) }))
            // What the story expects is no rule of ours.
            .filter(|violation| violation.rule != STORY)
            .map(|violation| (label, violation))
    })
}

fn violation(ending: Ending) -> Option<Violation> {
    match ending {
        Ending::Violation(violation) => Some(violation),
        Ending::Fine | Ending::Stuck(_) | Ending::Crashed(_) => None,
    }
}

fn expect_noticed(rule: Rule, checker: &str, noticed: Option<(String, Violation)>) {
    let (label, Violation { rule: noticed_by, text, .. }) =
        noticed.unwrap_or_else(|| panic!("nobody noticed that {rule:?} is missing"));
    assert_eq!(noticed_by, checker, "{label}: {text}");
}

/// A small pool with more to do than it has room for.
fn busy(seed: u64) -> Options {
    Options {
        nodes: 4,
        clients: 1,
        jobs: 25,
        span_ms: 40_000,
        run_ms_max: 8_000,
        prepare_ms_max: 1_000,
        gang_percent: 60,
        gang_share_percent: 70,
        late_ms_max: 20_000,
        cut_ms_max: 15_000,
        down_ms_max: 10_000,
        cuts: 2,
        daemon_crashes: 2,
        reboots: 1,
        ..Options::draw_all(seed)
    }
}
