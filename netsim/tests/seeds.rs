//! A few seeds of every kind, run on each change; `netsim search` runs many more. Seeds
//! that once failed are among them, with what they found: with every group of faults, as
//! `netsim run --seed N --stress --every-fault` has them, since groups could not be absent then.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use p2pit_netsim::{Ending, Options, run};

#[test]
fn a_day_in_a_pool_of_ten_comes_to_its_end() {
    for seed in 0..3 {
        expect_fine(&Options { jobs: 60, ..Options::draw(seed) });
    }
}

#[test]
fn small_pools_under_constant_trouble_come_to_their_end() {
    for seed in 20..32 {
        expect_fine(&Options::stress(seed));
    }
}

#[test]
fn a_pool_in_which_nothing_goes_wrong_comes_to_its_end() {
    let options = Options { jobs: 40, span_ms: 60_000, ..Options::draw(5).without_faults() };
    expect_fine(&options);
}

#[test]
fn two_nodes_and_nothing_else_come_to_their_end() {
    for seed in 0..4 {
        expect_fine(&Options { nodes: 2, clients: 0, jobs: 20, ..Options::stress(seed) });
    }
}

#[test]
fn one_node_alone_comes_to_its_end() {
    expect_fine(&Options { nodes: 1, clients: 0, jobs: 20, ..Options::stress(3) });
}

#[test]
fn one_seed_is_one_run_and_another_is_another() {
    let hash = |seed| run(Options { jobs: 20, ..Options::stress(seed) }, false).unwrap().hash;
    assert_eq!(hash(1), hash(1));
    assert_ne!(hash(1), hash(2));
}

#[test]
fn keeping_lines_does_not_change_the_run() {
    let run = |keep_lines| run(Options { jobs: 15, ..Options::stress(9) }, keep_lines).unwrap();
    let (with, without) = (run(true), run(false));
    assert_eq!(with.hash, without.hash);
    assert!(!with.world.trace.lines().is_empty() && without.world.trace.lines().is_empty());
}

/// A rank of two had been committed when the daemon died: the commitment was renewed for
/// ever, and the gang never prepared whole.
#[test]
fn seed_19_a_torn_commitment_is_given_up() {
    expect_fine(&Options { jobs: 60, ..Options::draw_all(19) });
}

/// A submission was refused, and a copy of it that came later was taken.
#[test]
fn seed_stress_14_a_refusal_is_final() {
    expect_fine(&Options::stress_all(14));
}

/// A pin from before a reboot came back at a second restart, beside its GPU's next job.
#[test]
fn seed_stress_129_holds_of_another_boot_stay_gone() {
    expect_fine(&Options::stress_all(129));
}

/// A crash between the two entries of an ending left no trace of the rank.
#[test]
fn seed_stress_159_an_ending_is_written_before_the_rank_leaves_the_book() {
    expect_fine(&Options::stress_all(159));
}

/// Of two ranks on one node one had ended and the other was given up: nobody said so.
#[test]
fn seed_stress_983_each_rank_that_is_given_up_is_reported() {
    expect_fine(&Options::stress_all(983));
}

/// A daemon died again while it gave up a torn commitment: what it had not yet given up
/// was renewed for ever.
#[test]
fn seed_stress_3025_what_is_left_of_a_buried_attempt_is_given_up() {
    expect_fine(&Options::stress_all(3025));
}

/// A steward that had been silent went on with an auction none of whose answers had come.
#[test]
fn seed_stress_8_a_steward_that_acts_again_asks_anew() {
    expect_fine(&Options::stress_all(8));
}

/// The first keeper got a job from another and refused it for want of its inputs.
#[test]
fn seed_stress_20_a_job_that_exists_is_kept_without_its_inputs() {
    expect_fine(&Options::stress_all(20));
}

/// A keeper that joined in a later epoch gave a receipt for the birth.
#[test]
fn seed_stress_52_only_who_saw_a_birth_vouches_for_it() {
    expect_fine(&Options::stress_all(52));
}

/// A record that could not be born was forgotten, and what was promised for it with it.
#[test]
fn seed_stress_178_what_is_forgotten_is_refused_from_then_on() {
    expect_fine(&Options::stress_all(178));
}

/// The steward that had to acknowledge an ending kept the record no more.
#[test]
fn seed_stress_200_an_ending_finds_whoever_drives_the_job() {
    expect_fine(&Options::stress_all(200));
}

/// A late refusal of the first half of a take-over ended its second, which a quorum had
/// accepted: nobody acted, each for want of silence.
#[test]
fn seed_stress_20039_a_minority_that_refuses_does_not_stop_a_take_over() {
    expect_fine(&Options::stress_all(20_039));
}

/// A node that had just started asked for what it would not take, again and again.
#[test]
fn seed_stress_20539_a_shy_node_asks_each_peer_once_more() {
    expect_fine(&Options::stress_all(20_539));
}

/// Having slept, a steward made sure of a value that named another, and took the
/// acknowledgements for its own.
#[test]
fn seed_10_to_accept_anothers_stewardship_renews_no_lease() {
    expect_fine(&Options::draw_all(10));
}

/// A keeper that ran a rank of a job that was over told itself so, was asked by itself who
/// drives the job, and told itself again, for ever.
#[test]
fn seed_stress_100926_an_answer_leads_to_no_question() {
    expect_fine(&Options::stress(100_926));
}

/// The same between nodes: a process that was to end asked for its lease whenever a keeper said
/// that its job was over, and the keepers said so whenever it asked.
#[test]
fn seeds_long_100045_and_100202_what_is_over_needs_no_lease() {
    expect_fine(&Options { burst_percent: 0, ..Options::long(100_045) });
    expect_fine(&Options { burst_percent: 0, ..Options::long(100_202) });
}

/// The one question for a lease before a cut of 140 s was lost, and not repeated for 25 s: the
/// lease ended before the cut did.
#[test]
fn seed_long_100208_a_question_for_a_lease_is_soon_repeated() {
    expect_fine(&Options { burst_percent: 0, ..Options::long(100_208) });
}

/// A job had ended, two of its three keepers lost their disks, and a node that had a rank of an
/// attempt given up waited for ever to be told: more than is promised, so no such disk is lost.
#[test]
fn seed_stress_773_who_waits_for_an_answer_keeps_somebody_who_can_give_it() {
    expect_fine(&Options::stress(773));
}

/// A keeper whose disk was emptied refused each renewal; the steward made sure of its value each
/// time, and so put off for ever to ask that node about the rank it had.
#[test]
fn seed_stress_302521_what_is_due_to_be_asked_is_not_put_off() {
    expect_fine(&Options::stress(302_521));
}

/// What a submission is told once the keepers changed, and a hold behind a wall clock that was set
/// back before a reboot.
#[test]
fn seeds_stress_301442_302922_and_36_are_within_what_is_promised() {
    for seed in [301_442, 302_922, 36] {
        expect_fine(&Options::stress(seed));
    }
}

/// A machine that came back early, since the world healed, had a boot clock that stood still until
/// it was to have come back.
#[test]
fn seed_long_404448_a_machine_that_is_up_has_a_clock_that_runs() {
    expect_fine(&Options::long(404_448));
}

/// The only keeper that a commit had named lost its disk; those that had come since were not asked
/// who acknowledges an ending.
#[test]
fn seed_stress_502853_who_keeps_a_job_by_now_is_asked_too() {
    expect_fine(&Options::stress(502_853));
}

/// A keeper was off from the birth of a job until it was over; the others counted on it for a copy
/// of what the job left, and it knew nothing of the job.
#[test]
fn seed_stress_7_a_keeper_that_missed_the_whole_job_asks_for_its_record() {
    expect_fine(&Options::stress(7));
}

/// A keeper had said that it could not hold a copy before another had the record, which counted on
/// it for ten minutes.
#[test]
fn seed_stress_64591413_a_refusal_is_told_to_who_comes_later() {
    expect_fine(&Options::stress(64_591_413));
}

/// A keeper learnt that the epoch was over, of which it was a keeper too, and waited for somebody
/// to bring it the value; the job was over, and nobody did.
#[test]
fn seed_stress_64593160_a_keeper_of_the_next_epoch_asks_for_its_value() {
    expect_fine(&Options::stress(64_593_160));
}

/// Of two keepers each had accepted the end of a job, at ballots of their own, and both were
/// started anew: nobody watches over what seems to be over, and it was never chosen.
#[test]
fn seeds_stress_64594392_and_64596442_an_end_is_made_sure_of() {
    for seed in [64_594_392, 64_596_442] {
        expect_fine(&Options::stress(seed));
    }
}

/// A keeper that had just got the record was not counted on for a copy: it had lacked it for ten
/// seconds.
#[test]
fn seed_stress_64596090_who_has_the_record_by_now_counts() {
    expect_fine(&Options::stress(64_596_090));
}

/// A keeper whose clock was late had refused a job for good that the two others kept; once one of
/// these lost its copy, the other counted on the first.
#[test]
fn seeds_stress_64596932_and_64597222_who_refused_keeps_what_a_majority_keeps() {
    for seed in [64_596_932, 64_597_222, 64_597_698] {
        expect_fine(&Options::stress(seed));
    }
}

/// All three times that a keeper said that it lacks a record were lost.
#[test]
fn seeds_stress_64599417_and_64603002_a_lacking_record_is_asked_for_until_it_comes() {
    for seed in [64_599_417, 64_603_002] {
        expect_fine(&Options::stress(seed));
    }
}

/// A steward did not know the store of the node that left something, so that nobody could tell
/// later that it was lost.
#[test]
fn seed_stress_64600893_an_end_comes_with_its_store() {
    expect_fine(&Options::stress(64_600_893));
}

/// A node that lost its disk, and whose clock had been ahead before, was not believed to have
/// another store.
#[test]
fn seed_stress_64612564_what_a_node_says_after_it_lost_its_disk_is_the_later() {
    expect_fine(&Options::stress(64_612_564));
}

fn expect_fine(options: &Options) {
    let report = run(options.clone(), false).unwrap();
    assert_eq!(report.ending, Ending::Fine, "{}\n{options}", report.ending);
}
