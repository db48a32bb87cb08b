//! Every file in `scenarios/`, played with a few seeds. `netsim run FILE --seed N` plays
//! one of them and shows what happened.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use p2pit_netsim::{
    Ending,
    scenario::{Variant, load, play},
};

/// Seeds that each file is played with.
const SEEDS: u64 = 4;
/// Seeds for each way to play a file that has many.
const SEEDS_OF_SWEEP: u64 = 2;

macro_rules! stories {
    ($($name:ident,)*) => {
        $(#[test]
        fn $name() {
            play_file(stringify!($name));
        })*

        #[test]
        fn no_file_is_forgotten() {
            let played: BTreeSet<String> = [$(file_name(stringify!($name))),*].into();
            let files = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap());
            let files = files.map(|file| file.file_name().into_string().unwrap());
            let there: BTreeSet<String> = files.filter(|name| name != "README.md").collect();
            assert_eq!(there, played);
        }
    };
}

stories! {
    clock_five_percent_off,
    done_keeper_replaced,
    fast_clock,
    half_the_pool_leaves,
    half_the_pool_leaves_politely,
    keeper_replaced_during_takeover,
    laptop_closes,
    partition_100s,
    partition_10m_continue,
    partition_10m_restart,
    partition_149s,
    power_cut,
    removed,
    restored_disk,
    results_holder_leaves,
    results_no_room,
    results_node_dies,
    results_node_never_returns,
    results_steward_dies,
    retry_gets_newest_save,
    steward_dies_in_the_auction,
    steward_dies_replacing_a_keeper,
    submission_retried,
    two_reconfigurations_race,
    two_take_over_at_once,
    worker_dies_continue,
    worker_dies_lost_after,
    worker_dies_restart,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

fn file_name(test: &str) -> String {
    format!("{}.yaml", test.replace('_', "-"))
}

fn play_file(test: &str) {
    let path = folder().join(file_name(test));
    let story = load(&path).unwrap_or_else(|error| panic!("{error}"));
    let seeds = if story.variants.len() > 1 { SEEDS_OF_SWEEP } else { SEEDS };
    let mut unmet = Vec::new();
    for variant in &story.variants {
        unmet.extend((1..=seeds).filter_map(|seed| unmet_with(variant, seed)));
    }
    assert!(unmet.is_empty(), "{}", unmet.join("\n"));
}

fn unmet_with(variant: &Variant, seed: u64) -> Option<String> {
    let report = play(variant, variant.options(seed), false).unwrap();
    let label = variant.label();
    (report.ending != Ending::Fine).then(|| format!("seed {seed} {label}: {}", report.ending))
}
