//! Every checker is proved: with its rule removed it notices, within a few seeds, before
//! any other does; and with the rule in place the same seed is fine.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use p2pit_netsim::{Ending, Options, check::Violation, run};
use p2pit_protocol::sabotage::Rule;

/// Seeds tried before a rule counts as not missed by anybody.
const SEEDS: u64 = 12;

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
    prove(Rule::TakeoverWaits, "S1", Options::stress_all);
}

#[test]
fn without_new_terms_two_stewards_have_the_same() {
    prove(Rule::TermCounts, "S2", Options::stress_all);
}

#[test]
fn without_a_second_copy_of_its_inputs_a_job_is_called_submitted() {
    prove(Rule::InputsOnTwoNodes, "D1", Options::stress_all);
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

fn prove(rule: Rule, checker: &str, options: impl Fn(u64) -> Options) {
    let fine = |seed: &u64| run(options(*seed), false).unwrap().ending == Ending::Fine;
    let noticed = (0..SEEDS).filter(fine).find_map(|seed| {
        let report = run(Options { removed_rule: Some(rule), ..options(seed) }, false).unwrap();
        match report.ending {
            Ending::Violation(violation) => Some((seed, violation)),
            Ending::Fine | Ending::Stuck(_) | Ending::Crashed(_) => None,
        }
    });
    let (seed, Violation { rule: noticed_by, text, .. }) =
        noticed.unwrap_or_else(|| panic!("nobody noticed that {rule:?} is missing"));
    assert_eq!(noticed_by, checker, "seed {seed}: {text}");
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
