//! Every crash and every failure at every step of a history, on a disk in memory.

use proptest::prelude::*;

use super::{
    faulty::{FaultyDisk, Model, Trouble},
    tests::{entries_of, put, remove},
    *,
};

/// So small that a few writes lead to a snapshot of several steps, and that most batches of
/// more than one write are several frames.
const LIMITS: Limits = Limits { min_bytes: 700, retry_bytes: 200, step_bytes: 60, frame_bytes: 40 };

/// One call into the journal, as others saw it.
#[derive(Debug)]
struct Step {
    /// The operations of the disk up to its end.
    operations: usize,
    /// What may be there after a crash within it: the state before, and that with any number
    /// of its batches from the first.
    within: Vec<Entries>,
    /// What is acknowledged at its end.
    after: Entries,
    /// The store and boot that were told, before and at the end.
    told_before: Option<(StoreId, u64)>,
    told_after: Option<(StoreId, u64)>,
}

impl Step {
    /// What an opening after a crash must hold, where the disk was left in this state.
    fn expected(&self, model: &Model) -> (Vec<Entries>, Option<(StoreId, u64)>) {
        // At the end of its last operation it may have been acknowledged already.
        match model.operations() == self.operations {
            true => (vec![self.after.clone()], self.told_after),
            false => (self.within.clone(), self.told_before),
        }
    }
}

/// Batches that become durable together, of three sessions with the journal.
fn sessions() -> Vec<Vec<Vec<Vec<Write>>>> {
    let value = |n: usize| "v".repeat(5 + n * 7 % 31) + &n.to_string();
    let group = |n: usize| match n % 5 {
        0 => vec![vec![put(&format!("key{}", n % 7), &value(n))]],
        1 => vec![
            vec![put("first", &value(n)), put("last", &value(n))],
            vec![put(&format!("key{}", n % 3), &value(n + 1)), remove("key2")],
            vec![put("last", &value(n + 2))],
        ],
        2 => vec![vec![remove("first"), put(&format!("key{}", n % 5), &value(n))]],
        3 => vec![vec![put("middle", &value(n))], vec![put("key1", &value(n + 3))]],
        _ => vec![vec![put("first", &value(n)), remove("middle")]],
    };
    vec![(0..12).map(group).collect(), (12..17).map(group).collect(), (17..30).map(group).collect()]
}

fn with(mut entries: Entries, batch: &[Write]) -> Entries {
    for write in batch {
        match &write.value {
            Some(value) => entries.insert(write.key.clone(), value.clone()),
            None => entries.remove(&write.key),
        };
    }
    entries
}

/// The state before a group, and those with each number of its batches from the first.
fn prefixes(before: &Entries, group: &[Vec<Write>]) -> Vec<Entries> {
    let mut states = vec![before.clone()];
    for batch in group {
        states.extend(states.last().cloned().map(|state| with(state, batch)));
    }
    states
}

fn append(journal: &mut Journal, group: &[Vec<Write>]) -> io::Result<()> {
    journal.append_group(&group.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// A history without trouble, and where on the disk its steps end.
fn history(disk: &FaultyDisk) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut now = Entries::new();
    let mut told = None;
    for (session, groups) in sessions().into_iter().enumerate() {
        let (mut journal, recovered) = Journal::open_on(disk.boxed(), LIMITS).unwrap();
        assert_eq!(recovered.entries, now);
        let told_before = told;
        told = Some((recovered.store_id, recovered.boot_counter));
        steps.push(Step {
            operations: disk.operations(),
            within: vec![now.clone()],
            after: now.clone(),
            told_before,
            told_after: told,
        });
        for (n, group) in groups.iter().enumerate() {
            append(&mut journal, group).unwrap();
            let within = prefixes(&now, group);
            now = within.last().unwrap().clone();
            let (told_before, told_after) = (told, told);
            let operations = disk.operations();
            steps.push(Step { operations, within, after: now.clone(), told_before, told_after });
            // Sometimes nothing is committed while a snapshot is under way.
            while n % 4 == session && journal.is_snapshot_due() {
                journal.advance_snapshot(0);
                let (within, after) = (vec![now.clone()], now.clone());
                let operations = disk.operations();
                steps.push(Step { operations, within, after, told_before, told_after });
            }
            assert_eq!(entries_of(&journal), now);
        }
        assert!(journal.header.generation > session as u64 + 1, "too few snapshots");
    }
    steps
}

fn check_opening(
    disk: &FaultyDisk,
    allowed: &[Entries],
    told: Option<(StoreId, u64)>,
) -> Recovered {
    let (journal, recovered) = Journal::open_on(disk.boxed(), LIMITS)
        .unwrap_or_else(|e| panic!("a crash is taken for something else: {e}"));
    assert!(allowed.contains(&recovered.entries), "{:?} is none of {allowed:?}", recovered.entries);
    assert_eq!(entries_of(&journal), recovered.entries);
    if let Some((store_id, boot_counter)) = told {
        assert_eq!(recovered.store_id, store_id);
        assert!(recovered.boot_counter > boot_counter, "a boot is counted twice");
    }
    assert_eq!(disk.names().len(), 1, "{:?}", disk.names());
    recovered
}

/// Acknowledged is present, unacknowledged whole or absent, and no boot is counted twice.
#[test]
fn after_a_crash_at_any_byte_of_any_step_all_that_was_acknowledged_is_there() {
    let disk = FaultyDisk::new(1);
    disk.keep_trail();
    let steps = history(&disk);
    let mut seen = 0;
    for model in disk.trail() {
        let step = steps.iter().find(|step| step.operations >= model.operations()).unwrap();
        let (allowed, told) = step.expected(&model);
        for crashed in model.crashes() {
            seen += 1;
            let twice = seen % 61 == 0;
            if twice {
                crashed.keep_trail();
            }
            let recovered = check_opening(&crashed, &allowed, told);
            if twice {
                crash_again(&crashed, &recovered, &allowed, told);
            }
        }
    }
    assert!(seen > 10_000, "only {seen} crashes");
}

/// Crashes while the opening after a crash was under way.
fn crash_again(
    disk: &FaultyDisk,
    recovered: &Recovered,
    allowed: &[Entries],
    told: Option<(StoreId, u64)>,
) {
    let trail = disk.trail();
    let last = trail.last().unwrap().operations();
    for model in trail {
        for crashed in model.crashes() {
            match model.operations() == last {
                true => {
                    let told = Some((recovered.store_id, recovered.boot_counter));
                    check_opening(&crashed, std::slice::from_ref(&recovered.entries), told);
                }
                false => {
                    check_opening(&crashed, allowed, told);
                }
            }
        }
    }
}

/// What became of a history on a disk with a trouble.
#[derive(Debug, Default)]
struct Outcomes {
    /// Openings that failed, appends that may be tried again, and those that may not.
    refused: usize,
    taken_back: usize,
    poisoned: usize,
    undisturbed: usize,
}

/// Runs the history with a trouble from that operation on, which ends as soon as the journal
/// complains; whatever failed is tried again, after a restart where that is asked for.
fn endure(trouble: Trouble, at: usize, outcomes: &mut Outcomes) {
    let disk = FaultyDisk::new(at as u64);
    disk.trouble_at(Some((at, trouble)));
    let mut now = Entries::new();
    let mut told: Option<(StoreId, u64)> = None;
    let mut failures = 0;
    for groups in sessions() {
        let mut journal = reopen(&disk, &mut now, &[], &mut told, &mut failures, outcomes);
        for group in &groups {
            while let Err(error) = append(&mut journal, group) {
                failures += 1;
                assert!(failures <= 2, "{trouble:?} at {at}: {error}");
                let allowed = prefixes(&now, group);
                for seed in 0..3 {
                    let (_, after) = Journal::open_on(disk.crashed(seed), LIMITS).unwrap();
                    assert!(allowed.contains(&after.entries), "{trouble:?} at {at}");
                }
                disk.trouble_at(None);
                if is_poisoned(&error) {
                    outcomes.poisoned += 1;
                    assert!(!matches!(trouble, Trouble::Full { .. }), "{at}: {error}");
                    assert!(is_poisoned(&append(&mut journal, group).unwrap_err()));
                    drop(journal);
                    journal = reopen(&disk, &mut now, group, &mut told, &mut failures, outcomes);
                } else {
                    outcomes.taken_back += 1;
                    assert_ne!(trouble, Trouble::ReadOnly);
                    assert_eq!(entries_of(&journal), now, "{trouble:?} at {at}");
                }
            }
            now = prefixes(&now, group).pop().unwrap();
            assert_eq!(entries_of(&journal), now, "{trouble:?} at {at}");
        }
        // A restart without a crash, but whatever was not synced is in memory alone.
        drop(journal);
        for seed in 0..3 {
            let (_, after) = Journal::open_on(disk.crashed(seed), LIMITS).unwrap();
            assert_eq!(after.entries, now, "{trouble:?} at {at}");
        }
    }
    outcomes.undisturbed += usize::from(failures == 0);
}

fn reopen(
    disk: &FaultyDisk,
    now: &mut Entries,
    under_way: &[Vec<Write>],
    told: &mut Option<(StoreId, u64)>,
    failures: &mut usize,
    outcomes: &mut Outcomes,
) -> Journal {
    let (journal, recovered) = loop {
        match Journal::open_on(disk.boxed(), LIMITS) {
            Ok(opened) => break opened,
            Err(OpenError::Io { .. }) => {
                outcomes.refused += 1;
                *failures += 1;
                assert!(*failures <= 2);
                disk.trouble_at(None);
            }
            Err(error) => panic!("{error}"),
        }
    };
    assert!(prefixes(now, under_way).contains(&recovered.entries));
    if let Some((store_id, boot_counter)) = *told {
        assert_eq!(recovered.store_id, store_id);
        assert!(recovered.boot_counter > boot_counter);
    }
    *told = Some((recovered.store_id, recovered.boot_counter));
    *now = recovered.entries;
    journal
}

fn endure_everywhere(trouble: Trouble) -> Outcomes {
    let disk = FaultyDisk::new(1);
    history(&disk);
    let mut outcomes = Outcomes::default();
    // A trouble lengthens the history: what is beyond its end changes nothing.
    for at in 1..=disk.operations() {
        endure(trouble, at, &mut outcomes);
    }
    outcomes
}

#[test]
fn a_disk_that_is_full_at_any_step_is_told_and_costs_nothing() {
    for through in [0, 9, 45, 10_000] {
        let outcomes = endure_everywhere(Trouble::Full { through });
        assert!(outcomes.taken_back > 40 && outcomes.refused > 3, "{outcomes:?}");
        assert_eq!(outcomes.poisoned, 0);
    }
}

#[test]
fn a_failure_of_any_step_is_taken_back_put_off_or_poisons_and_costs_nothing() {
    let outcomes = endure_everywhere(Trouble::Broken);
    let Outcomes { refused, taken_back, poisoned, undisturbed } = outcomes;
    assert!(
        refused > 3 && taken_back > 10 && poisoned > 10 && undisturbed > 10,
        "{refused} {taken_back} {poisoned} {undisturbed}"
    );
}

#[test]
fn a_disk_that_becomes_read_only_at_any_step_poisons_until_a_restart() {
    let outcomes = endure_everywhere(Trouble::ReadOnly);
    assert!(outcomes.poisoned > 40 && outcomes.refused > 3, "{outcomes:?}");
    assert_eq!(outcomes.taken_back, 0);
}

#[test]
fn a_log_of_snapshots_and_batches_cut_anywhere_holds_whole_batches_or_is_refused() {
    let (log, states) = log_after_snapshot();
    let (mut held, mut refused) = (0, 0);
    for length in 0..=log.len() {
        let disk = FaultyDisk::new(1);
        disk.replace("log.9", &log[..length]);
        match Journal::open_on(disk.boxed(), LIMITS) {
            Ok((_, recovered)) => {
                assert!(states.contains(&recovered.entries), "cut at {length}");
                held += 1;
            }
            Err(OpenError::Damaged { .. }) => refused += 1,
            Err(error) => panic!("cut at {length}: {error}"),
        }
    }
    assert!(held > 100 && refused > 100, "{held} {refused}");
}

#[test]
fn a_byte_flipped_anywhere_before_the_last_group_is_damage() {
    let (log, states) = log_after_snapshot();
    let last_group_at = {
        let disk = FaultyDisk::new(1);
        disk.replace("log.9", &log);
        let scan = recover::scan(&*disk.boxed().open("log.9").unwrap()).unwrap();
        usize::try_from(scan.last_group_at).unwrap()
    };
    assert!(log.len() - last_group_at > 60);
    for at in 0..log.len() {
        let mut bytes = log.clone();
        bytes[at] ^= 0x20;
        let disk = FaultyDisk::new(1);
        disk.replace("log.9", &bytes);
        match Journal::open_on(disk.boxed(), LIMITS) {
            Err(OpenError::Damaged { .. }) => {
                assert!(at < last_group_at, "{at}: its group may be torn");
                // Refused again, and nothing was changed.
                assert!(Journal::open_on(disk.boxed(), LIMITS).is_err());
                assert_eq!(disk.content("log.9"), bytes);
            }
            Ok((_, recovered)) => {
                assert!(at >= last_group_at, "byte {at} went unnoticed");
                assert!(states.contains(&recovered.entries));
            }
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
}

/// A log that began as a snapshot, and the states that it held since.
fn log_after_snapshot() -> (Vec<u8>, Vec<Entries>) {
    let disk = FaultyDisk::new(1);
    let (mut journal, _) = Journal::open_on(disk.boxed(), LIMITS).unwrap();
    let mut groups = sessions().into_iter().flatten().cycle();
    while journal.header.generation < 3 || journal.is_snapshot_due() {
        append(&mut journal, &groups.next().unwrap()).unwrap();
    }
    let mut states = vec![entries_of(&journal)];
    for group in groups.by_ref().take(3) {
        states.extend(prefixes(states.last().unwrap(), &group));
        append(&mut journal, &group).unwrap();
    }
    assert!(!journal.is_snapshot_due());
    let last = groups.find(|group| group.len() == 3).unwrap();
    states.extend(prefixes(states.last().unwrap(), &last));
    journal.limits.min_bytes = u64::MAX;
    append(&mut journal, &last).unwrap();
    assert_eq!(journal.header.generation, 3);
    (disk.content("log.3"), states)
}

#[test]
fn a_reset_that_is_interrupted_leaves_the_damaged_journal_or_the_new_one() {
    let disk = FaultyDisk::new(1);
    let (mut journal, first) = Journal::open_on(disk.boxed(), LIMITS).unwrap();
    for n in 0..4 {
        append(&mut journal, &[vec![put(&format!("signed{n}"), "kept"), put("own", "promise")]])
            .unwrap();
    }
    drop(journal);
    let mut damaged = disk.content("log.1");
    damaged[frame::HEADER_BYTES + 70] ^= 1;
    let keep = |entries: Entries| {
        assert!(entries.contains_key(b"own".as_slice()));
        entries.into_iter().filter(|(key, _)| key.starts_with(b"signed")).collect::<Entries>()
    };
    let disk = FaultyDisk::new(1);
    disk.replace("log.1", &damaged);
    disk.keep_trail();
    let (_, second) = Journal::reset_on(disk.boxed(), LIMITS, keep).unwrap();
    assert_ne!(second.store_id, first.store_id);
    // The batch that was hit is lost, those around it are not.
    assert_eq!(second.entries.len(), 3);
    assert_eq!(second.boot_counter, 1);
    assert!(second.notes[0].contains("damaged.1"), "{:?}", second.notes);
    assert_eq!(disk.content("damaged.1"), damaged);
    let (mut old, mut new) = (0, 0);
    for model in disk.trail() {
        for crashed in model.crashes() {
            let opened = match Journal::open_on(crashed.boxed(), LIMITS) {
                Ok((_, recovered)) => {
                    new += 1;
                    recovered
                }
                Err(OpenError::Damaged { store_id, .. }) => {
                    old += 1;
                    assert_eq!(store_id, Some(first.store_id));
                    Journal::reset_on(crashed.boxed(), LIMITS, keep).unwrap().1
                }
                Err(error) => panic!("{error}"),
            };
            assert_eq!(opened.entries, second.entries);
            assert_ne!(opened.store_id, first.store_id);
            assert_eq!(crashed.content("damaged.1"), damaged);
        }
    }
    assert!(old > 10 && new > 10, "{old} {new}");
}

#[test]
fn of_a_log_whose_header_is_gone_what_looks_like_frames_is_offered() {
    let disk = FaultyDisk::new(1);
    let (mut journal, first) = Journal::open_on(disk.boxed(), LIMITS).unwrap();
    append(&mut journal, &[vec![put("signed", "kept")]]).unwrap();
    drop(journal);
    let mut bytes = disk.content("log.1");
    bytes[..frame::HEADER_BYTES].fill(0);
    disk.replace("log.1", &bytes);
    let error = Journal::open_on(disk.boxed(), LIMITS).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { store_id: None, .. }), "{error}");
    let (_, second) = Journal::reset_on(disk.boxed(), LIMITS, |entries| entries).unwrap();
    assert_eq!(second.entries.get(b"signed".as_slice()), Some(&b"kept".to_vec()));
    assert_ne!(second.store_id, first.store_id);
    assert_eq!(disk.names(), ["damaged.1", "log.2"]);
}

#[test]
fn what_rots_under_a_running_journal_is_not_copied_into_a_snapshot() {
    let disk = FaultyDisk::new(1);
    let (mut journal, _) = Journal::open_on(disk.boxed(), LIMITS).unwrap();
    append(&mut journal, &[vec![put("a", "healthy value")]]).unwrap();
    append(&mut journal, &[vec![put("b", "another value")]]).unwrap();
    let place = journal.index[b"a".as_slice()];
    journal.file.write_at(place.offset, b"H").unwrap();
    journal.file.sync().unwrap();
    journal.limits.min_bytes = 0;
    // Durable before the snapshot that its growth led to.
    append(&mut journal, &[vec![put("c", "x")]]).unwrap();
    let error = append(&mut journal, &[vec![put("d", "x")]]).unwrap_err();
    assert!(is_poisoned(&error), "{error}");
    assert!(error.to_string().contains("log.1 is damaged at byte"), "{error}");
    drop(journal);
    let error = Journal::open_on(disk.boxed(), LIMITS).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The bound that the module states, with this test's limits.
    #[test]
    fn a_log_never_has_more_than_thrice_its_live_bytes_and_a_constant(
        groups in prop::collection::vec(
            prop::collection::vec((0_u8..40, prop::option::weighted(0.8, 0_usize..90)), 1..6),
            1..300,
        ),
    ) {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = Journal::open_on(disk.boxed(), LIMITS).unwrap();
        let mut live_max = 0;
        for group in &groups {
            let batch: Vec<Write> = group
                .iter()
                .map(|(key, length)| Write { key: vec![*key], value: length.map(|n| vec![*key; n]) })
                .collect();
            if journal.copying.is_none() {
                live_max = journal.live_bytes;
            }
            append(&mut journal, &[batch]).unwrap();
            live_max = live_max.max(journal.live_bytes);
            let group_bytes_max = 6 * (90 + 9) + 29;
            let constant = LIMITS.min_bytes + LIMITS.step_bytes + 3 * group_bytes_max;
            prop_assert!(
                journal.good_bytes <= 3 * live_max + constant,
                "{} bytes of {live_max} live ones", journal.good_bytes
            );
            if let Some(copying) = &journal.copying {
                prop_assert!(copying.bytes <= 2 * live_max + constant);
            }
        }
        while journal.is_snapshot_due() {
            journal.advance_snapshot(0);
        }
        prop_assert!(journal.good_bytes <= LIMITS.snapshot_at(journal.live_bytes));
    }
}
