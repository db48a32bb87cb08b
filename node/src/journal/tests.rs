//! What the journal promises, on a real directory and on a disk that fails.

use proptest::prelude::*;

use super::{
    faulty::{Fault, FaultyDisk, Held},
    recover::{Damage, Scan, ScanError},
    *,
};

#[test]
fn what_was_appended_is_there_after_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let (mut journal, first) = Journal::open(directory.path()).unwrap();
    assert_eq!((first.boot_counter, first.entries.len()), (1, 0));
    journal.append(&[put("a", "1"), put("b", "2")]).unwrap();
    journal.append(&[put("a", "3"), remove("b")]).unwrap();
    journal.append(&[]).unwrap();
    drop(journal);
    let (_, second) = Journal::open(directory.path()).unwrap();
    assert_eq!(second.entries, entries(&[("a", "3")]));
    assert_eq!(second.store_id, first.store_id);
    assert_eq!(second.boot_counter, 2);
    assert_eq!(second.notes, Vec::<String>::new());
}

#[test]
fn a_second_daemon_on_the_same_directory_is_told_who_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let open = Journal::open(directory.path()).unwrap();
    let error = Journal::open(directory.path()).unwrap_err();
    let OpenError::InUse { pid, .. } = &error else { panic!("{error}") };
    assert_eq!(*pid, Some(std::process::id()));
    assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
    drop(open);
    Journal::open(directory.path()).unwrap();
}

#[test]
fn a_log_cut_at_any_byte_of_its_last_batch_loses_exactly_that_batch() {
    let directory = tempfile::tempdir().unwrap();
    let (mut journal, _) = Journal::open(directory.path()).unwrap();
    journal.append(&[put("kept", "1")]).unwrap();
    let kept_bytes = journal.good_bytes as usize;
    // Longer than what is written over it, so that a tail not cut would show.
    let more = "3".repeat(200);
    journal.append(&[put("lost", "2"), remove("kept"), put("more", &more)]).unwrap();
    drop(journal);
    let log = directory.path().join("log.1");
    let whole = std::fs::read(&log).unwrap();
    for length in kept_bytes..=whole.len() {
        std::fs::write(&log, &whole[..length]).unwrap();
        let (mut journal, recovered) = Journal::open(directory.path()).unwrap();
        let expected = match length == whole.len() {
            true => entries(&[("lost", "2"), ("more", &more)]),
            false => entries(&[("kept", "1")]),
        };
        assert_eq!(recovered.entries, expected, "cut at {length}");
        let torn = length != whole.len() && length != kept_bytes;
        assert_eq!(recovered.notes.len(), usize::from(torn), "cut at {length}");
        journal.append(&[put("next", "4")]).unwrap();
        drop(journal);
        let (_, again) = Journal::open(directory.path()).unwrap();
        assert_eq!(again.entries.len(), expected.len() + 1, "cut at {length}");
        assert_eq!(again.notes, Vec::<String>::new(), "cut at {length}");
    }
}

#[test]
fn a_flipped_bit_before_the_last_frame_is_damage_and_in_it_a_torn_tail() {
    let disk = FaultyDisk::new(1);
    let (mut journal, _) = open(&disk);
    for n in 0..4 {
        journal.append(&[put(&format!("key{n}"), "value")]).unwrap();
    }
    let before_last = journal.good_bytes as usize;
    journal.append(&[put("last", "value")]).unwrap();
    let whole = disk.content("log.1");
    for at in 0..whole.len() {
        for bit in [0x01, 0x80] {
            let mut flipped = whole.clone();
            flipped[at] ^= bit;
            match scan(&flipped) {
                Err(damage) => assert!(at < before_last, "{damage:?} for byte {at}"),
                Ok(scan) => {
                    assert!(at >= before_last, "byte {at} went unnoticed");
                    assert_eq!(scan.good_bytes as usize, before_last);
                    assert_eq!(scan.entries.len(), 4);
                }
            }
        }
    }
}

#[test]
fn commits_of_one_fsync_may_reach_the_disk_in_any_order() {
    let disk = FaultyDisk::new(1);
    let (mut journal, _) = open(&disk);
    journal.append(&[put("kept", "1")]).unwrap();
    let kept_bytes = journal.good_bytes as usize;
    let batches = [[put("a", "1")], [put("b", "2")], [put("c", "3")]];
    journal.append_group(&[&batches[0], &batches[1], &batches[2]]).unwrap();
    let mut bytes = disk.content("log.1");
    bytes[kept_bytes] = 0;
    let found = scan(&bytes).unwrap();
    assert_eq!(found.entries, entries(&[("kept", "1")]));
    assert_eq!(found.good_bytes as usize, kept_bytes);
    journal.append(&[put("later", "4")]).unwrap();
    let mut bytes = disk.content("log.1");
    bytes[kept_bytes] = 0;
    assert_eq!(scan(&bytes).unwrap_err(), Damage::At(kept_bytes as u64));
}

#[test]
fn a_damaged_store_is_refused_and_can_only_begin_anew_under_another_id() {
    let directory = tempfile::tempdir().unwrap();
    let (mut journal, first) = Journal::open(directory.path()).unwrap();
    journal.append(&[put("promise", "1")]).unwrap();
    journal.append(&[put("promise", "2")]).unwrap();
    drop(journal);
    let log = directory.path().join("log.1");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[frame::HEADER_BYTES + 45] ^= 1;
    std::fs::write(&log, &bytes).unwrap();
    for _ in 0..2 {
        let error = Journal::open(directory.path()).unwrap_err();
        let OpenError::Damaged { store_id, .. } = &error else { panic!("{error}") };
        assert_eq!(*store_id, Some(first.store_id));
        assert!(error.to_string().contains("log.1"), "{error}");
    }
    let (_, second) = Journal::reset_as_new_store(directory.path(), |_| Entries::new()).unwrap();
    assert_ne!(second.store_id, first.store_id);
    assert_eq!((second.boot_counter, second.entries.len()), (1, 0));
    assert_eq!(std::fs::read(directory.path().join("damaged.1")).unwrap(), bytes);
}

#[test]
fn of_the_files_set_aside_the_newest_five_stay() {
    let disk = FaultyDisk::new(1);
    drop(Journal::open_on(disk.boxed(), Limits::default()).unwrap());
    let mut set_aside = Vec::new();
    for n in 1..=8 {
        let log = disk.names().into_iter().find(|name| generation(name).is_some()).unwrap();
        set_aside.push((format!("damaged.{n}"), disk.content(&log)));
        let reset = Journal::reset_on(disk.boxed(), Limits::default(), |_| Entries::new());
        let (_, recovered) = reset.unwrap();
        assert!(recovered.notes[0].contains(&format!("damaged.{n}")), "{:?}", recovered.notes);
        let kept: Vec<String> =
            disk.names().into_iter().filter(|name| name.starts_with("damaged.")).collect();
        let newest: Vec<&str> =
            set_aside.iter().rev().take(5).rev().map(|(name, _)| name.as_str()).collect();
        assert_eq!(kept, newest);
    }
    for (name, content) in &set_aside[3..] {
        assert_eq!(disk.content(name), *content);
    }
}

#[test]
fn a_snapshot_that_is_not_whole_is_damage_even_at_the_end_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let (mut journal, _) = Journal::open(directory.path()).unwrap();
    grow_until_snapshot(&mut journal);
    let snapshot_bytes = journal.good_bytes;
    drop(journal);
    let log = directory.path().join("log.2");
    let whole = std::fs::read(&log).unwrap();
    assert_eq!(whole.len() as u64, snapshot_bytes);
    std::fs::write(&log, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(Journal::open(directory.path()), Err(OpenError::Damaged { .. })));
}

#[test]
fn a_grown_log_is_replaced_by_its_live_entries() {
    let disk = FaultyDisk::new(1);
    let (mut journal, first) = open(&disk);
    journal.append(&[put("small", "kept")]).unwrap();
    grow_until_snapshot(&mut journal);
    assert_eq!(disk.names(), ["log.2"]);
    assert!(journal.good_bytes < Limits::default().min_bytes / 2, "{}", journal.good_bytes);
    journal.append(&[put("after", "kept too")]).unwrap();
    let (_, recovered) = Journal::open_on(disk.crashed(7), Limits::default()).unwrap();
    assert_eq!(recovered.entries.len(), 3);
    assert_eq!(recovered.entries, entries_of(&journal));
    assert_eq!((recovered.store_id, recovered.boot_counter), (first.store_id, 2));
}

#[test]
fn a_newer_format_is_not_taken_for_damage() {
    let directory = tempfile::tempdir().unwrap();
    drop(Journal::open(directory.path()).unwrap());
    let log = directory.path().join("log.1");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[8] = 9;
    let covered = frame::HEADER_BYTES - 4;
    let crc = crc32c::crc32c(&bytes[..covered]);
    bytes[covered..covered + 4].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&log, &bytes).unwrap();
    let error = Journal::open(directory.path()).unwrap_err();
    assert!(matches!(error, OpenError::OtherFormat { version: 9, .. }), "{error}");
}

#[test]
fn after_a_failed_fsync_nothing_can_be_appended() {
    let disk = FaultyDisk::new(1);
    let (mut journal, _) = open(&disk);
    journal.append(&[put("a", "1")]).unwrap();
    disk.fail_next(Fault::Sync);
    assert!(is_poisoned(&journal.append(&[put("b", "2")]).unwrap_err()));
    let error = journal.append(&[put("c", "3")]).unwrap_err();
    assert!(is_poisoned(&error) && error.to_string().contains("fsync"), "{error}");
    let (_, recovered) = Journal::open_on(disk.crashed(3), Limits::default()).unwrap();
    assert_eq!(recovered.entries.get(b"a".as_slice()), Some(&b"1".to_vec()));
}

#[test]
fn a_full_disk_is_an_error_that_may_be_tried_again() {
    for through in 0..60 {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = open(&disk);
        journal.append(&[put("a", "1")]).unwrap();
        disk.fail_next(Fault::ShortWrite(through));
        let big = put("b", &"2".repeat(100));
        let error = journal.append(std::slice::from_ref(&big)).unwrap_err();
        assert!(!is_poisoned(&error), "{error}");
        journal.append(&[big]).unwrap();
        let (_, recovered) = Journal::open_on(disk.crashed(3), Limits::default()).unwrap();
        assert_eq!(recovered.entries.len(), 2);
    }
}

#[test]
fn a_failed_write_that_cannot_be_taken_back_poisons() {
    let disk = FaultyDisk::new(1);
    let (mut journal, _) = open(&disk);
    disk.fail_next(Fault::ShortWrite(5));
    disk.fail_next(Fault::SetLen);
    assert!(is_poisoned(&journal.append(&[put("a", "1")]).unwrap_err()));
    assert!(is_poisoned(&journal.append(&[put("a", "1")]).unwrap_err()));
}

#[test]
fn a_snapshot_that_cannot_be_begun_is_put_off_and_one_in_doubt_poisons() {
    for (fault, doubt) in [
        (Fault::Create, false),
        (Fault::ShortWrite(100), false),
        (Fault::Rename, true),
        (Fault::SyncDir, true),
    ] {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = open(&disk);
        while journal.good_bytes + 2 * FILLER_BYTES < Limits::default().min_bytes {
            journal.append(&[filler()]).unwrap();
        }
        journal.append(&[filler()]).unwrap();
        // The short write must hit the snapshot, not the batch that leads to it.
        let full = matches!(fault, Fault::ShortWrite(_));
        journal.limits.min_bytes = u64::MAX;
        journal.append(&[filler()]).unwrap();
        journal.limits = Limits::default();
        disk.fail_next(fault);
        if full {
            journal.advance_snapshot(0);
        } else {
            journal.append(&[put("last", "kept")]).unwrap();
        }
        let next = journal.append(&[put("next", "value")]);
        assert_eq!(next.is_err(), doubt, "{fault:?}");
        let expected = entries_of(&journal);
        for seed in 0..8 {
            let (_, recovered) = Journal::open_on(disk.crashed(seed), Limits::default()).unwrap();
            assert_eq!(recovered.entries, expected, "{fault:?}");
        }
        if !doubt {
            let limit = Limits::default().min_bytes + 2 * Limits::default().retry_bytes;
            while journal.header.generation == 1 {
                assert!(journal.good_bytes < limit, "the snapshot was not tried again");
                journal.append(&[filler()]).unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_log_cut_anywhere_holds_a_prefix_of_its_batches(
        batches in prop::collection::vec(
            prop::collection::vec((0_u8..6, prop::option::of(any::<u16>())), 1..5),
            1..12,
        ),
        cut_at in any::<prop::sample::Index>(),
    ) {
        let disk = FaultyDisk::new(1);
        let (mut journal, _) = open(&disk);
        let born_bytes = journal.good_bytes as usize;
        let mut states = vec![Entries::new()];
        for batch in &batches {
            let batch: Vec<Write> = batch
                .iter()
                .map(|(key, value)| Write {
                    key: vec![*key],
                    value: value.map(|v| v.to_le_bytes().to_vec()),
                })
                .collect();
            journal.append(&batch).unwrap();
            states.push(entries_of(&journal));
        }
        let bytes = disk.content("log.1");
        let length = born_bytes + cut_at.index(bytes.len() - born_bytes + 1);
        let found = scan(&bytes[..length]).unwrap();
        prop_assert!(states.contains(&found.entries));
        prop_assert_eq!(scan(&bytes).unwrap().entries, states.pop().unwrap());
    }

    #[test]
    fn any_bytes_at_all_are_read_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        with_header in any::<bool>(),
    ) {
        let store_id = StoreId([1; 16]);
        let header =
            Header { store_id, generation: 1, boot_counter: 0, snapshot_frames: 0 };
        let bytes = if with_header { [header.encode(), bytes].concat() } else { bytes };
        prop_assert_eq!(scan(&bytes).is_ok(), with_header);
    }
}

const FILLER_BYTES: u64 = 256 << 10;

fn filler() -> Write {
    put("filler", &"x".repeat(FILLER_BYTES as usize))
}

fn grow_until_snapshot(journal: &mut Journal) {
    while journal.header.generation == 1 {
        journal.append(&[filler()]).unwrap();
    }
}

pub(super) fn put(key: &str, value: &str) -> Write {
    Write { key: key.into(), value: Some(value.into()) }
}

pub(super) fn remove(key: &str) -> Write {
    Write { key: key.into(), value: None }
}

fn entries(pairs: &[(&str, &str)]) -> Entries {
    pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

fn open(disk: &FaultyDisk) -> (Journal, Recovered) {
    Journal::open_on(disk.boxed(), Limits::default()).unwrap()
}

fn scan(bytes: &[u8]) -> Result<Scan, Damage> {
    recover::scan(&Held(bytes.to_vec())).map_err(|e| match e {
        ScanError::Damage(damage) => damage,
        ScanError::Io(error) => panic!("{error}"),
    })
}

/// What the journal's index says, read from its file.
pub(super) fn entries_of(journal: &Journal) -> Entries {
    let value = |place: &Place| {
        let mut value = vec![0; place.bytes];
        journal.file.read_at(place.offset, &mut value).unwrap();
        assert_eq!(crc32c::crc32c(&value), place.crc);
        value
    };
    journal.index.iter().map(|(key, place)| (key.clone(), value(place))).collect()
}
