//! The store and its rooms.

mod sweeps;

use std::{io::Write as _, os::unix::fs::FileExt as _};

use super::*;
use crate::transfer::verified::{self, GROUP_BYTES, Proved, Ranges};

#[test]
fn what_is_put_comes_back_under_its_hash() {
    let (_dir, store) = store();
    let id = store.put_bytes(b"hello").unwrap();
    assert_eq!(id, BlobId::of(b"hello"));
    assert!(store.has(&id));
    assert_eq!(store.size(&id).unwrap(), 5);
    assert_eq!(store.read(&id, 5).unwrap(), b"hello");
    assert!(matches!(store.read(&id, 4), Err(Error::TooLarge { size: 5, max: 4, .. })));
    store.put_expected(&id, &b"hello"[..], 5).unwrap();
    let other = store.put_expected(&id, &b"other"[..], 5);
    assert!(matches!(other, Err(Error::OtherContent { expected, .. }) if expected == id));
    store.remove(&id).unwrap();
    store.remove(&id).unwrap();
    assert!(matches!(store.read(&id, 5), Err(Error::Missing(missing)) if missing == id));
    assert!(matches!(store.size(&id), Err(Error::Missing(_))));
    assert!(matches!(store.open_blob(&id), Err(Error::Missing(_))));
}

#[test]
fn a_file_of_many_buffers_is_stored_whole() {
    let (dir, store) = store();
    let content: Vec<u8> = (0..3 * BUFFER_BYTES + 7).map(|i| (i % 251) as u8).collect();
    let path = dir.path().join("large");
    fs::write(&path, &content).unwrap();
    let (id, size) = store.put_file(&path).unwrap();
    assert_eq!((id, size), (BlobId::of(&content), content.len() as u64));
    assert_eq!(store.read(&id, content.len()).unwrap(), content);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(store.put_file(&link), Err(Error::Io { .. })));
}

#[test]
fn a_corrupt_blob_is_named_and_putting_it_again_heals_it() {
    let (_dir, store) = store();
    let id = store.put_bytes(b"right").unwrap();
    fs::write(store.path_of(&id), b"wrong").unwrap();
    assert!(matches!(store.read(&id, 9), Err(Error::Corrupt(corrupt)) if corrupt == id));
    store.put_bytes(b"right").unwrap();
    assert_eq!(store.read(&id, 9).unwrap(), b"right");
}

#[test]
fn files_are_private_and_leftovers_are_swept_unless_somebody_uses_them() {
    let (dir, store) = store();
    let id = store.put_bytes(b"x").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&store.path_of(&id)), 0o600);
    assert_eq!(mode(dir.path().join("blobs").as_path()), 0o700);
    assert_eq!(mode(store.path_of(&id).parent().unwrap()), 0o700);

    let left = dir.path().join("blobs/tmp/in-left");
    fs::write(&left, b"torn").unwrap();
    let second = BlobStore::open(&dir.path().join("blobs")).unwrap();
    assert!(left.exists());
    drop((store, second));
    let reopened = BlobStore::open(&dir.path().join("blobs")).unwrap();
    assert!(!left.exists());
    assert!(reopened.has(&id));
}

#[test]
fn what_was_not_read_whole_leaves_nothing() {
    let (dir, store) = store();
    for size in [5, GROUP_BYTES + 1] {
        let id = BlobId::of(b"whole");
        assert!(store.put_expected(&id, &b"half"[..], size).is_err());
    }
    assert_eq!(fs::read_dir(dir.path().join("blobs/tmp")).unwrap().count(), 0);
}

#[test]
fn ranges_gather_over_transfers_and_restarts_until_the_blob_is_whole() {
    let (from_dir, from) = store();
    let (to_dir, to) = store();
    let content = numbers(5 * GROUP_BYTES as usize + 3);
    let id = from.put_bytes(&content).unwrap();
    let size = content.len() as u64;
    let blob = from.open_verifiable(&id).unwrap();
    let send = |ranges: &Ranges, partial: &Partial| {
        let mut encoded = Vec::new();
        from.encode(&blob, ranges, &mut encoded).unwrap();
        verified::decode(&id, size, ranges, &encoded[..], |it| partial.add(it)).unwrap();
    };
    let first = Ranges::covering(GROUP_BYTES..3 * GROUP_BYTES);
    {
        let partial = to.partial(&id, size).unwrap();
        send(&first, &partial);
        assert!(Arc::ptr_eq(&partial, &to.partial(&id, size).unwrap()));
        assert!(!to.finish(&partial).unwrap() && !to.has(&id));
    }
    // Who said another size before does not spoil what comes.
    let other = BlobId::of(b"another");
    to.partial(&other, 9).unwrap();
    assert_eq!(to.partial(&other, 12).unwrap().missing(), Ranges::all(12));
    drop(to);
    let to = BlobStore::open(&to_dir.path().join("blobs")).unwrap();
    let partial = to.partial(&id, size).unwrap();
    assert_eq!(partial.missing(), Ranges::all(size).without(&first));
    // A disk that lost some of it is believed in nothing, and what it left there is gone.
    partial.data.write_all_at(b"lost", 2 * GROUP_BYTES).unwrap();
    partial.data.write_all_at(b"left", 4 * GROUP_BYTES).unwrap();
    drop((partial, to));
    let to = BlobStore::open(&to_dir.path().join("blobs")).unwrap();
    let partial = to.partial(&id, size).unwrap();
    let missing = partial.missing();
    assert_eq!(missing.byte_count(size), size - GROUP_BYTES);
    let mut left = [1; 4];
    partial.data.read_exact_at(&mut left, 4 * GROUP_BYTES).unwrap();
    assert_eq!(left, [0; 4]);
    send(&missing, &partial);
    assert!(to.finish(&partial).unwrap() && to.finish(&partial).unwrap());
    assert_eq!(to.read(&id, content.len()).unwrap(), content);
    assert!(to.path_of(&id).with_extension(OUTBOARD).exists());
    drop(from_dir);
}

#[test]
fn who_misstates_a_size_touches_nothing_of_the_blob() {
    let (_from_dir, from) = store();
    let (_to_dir, to) = store();
    let content = numbers(3 * GROUP_BYTES as usize);
    let (id, size) = (from.put_bytes(&content).unwrap(), content.len() as u64);
    let blob = from.open_verifiable(&id).unwrap();
    let partial = to.partial(&id, size).unwrap();
    for range in [0..GROUP_BYTES, GROUP_BYTES..size] {
        let ranges = Ranges::covering(range);
        let mut encoded = Vec::new();
        from.encode(&blob, &ranges, &mut encoded).unwrap();
        verified::decode(&id, size, &ranges, &encoded[..], |it| partial.add(it)).unwrap();
        to.partial(&id, size - 1).unwrap();
        to.partial(&id, size + 1).unwrap();
    }
    assert!(to.finish(&partial).unwrap());
    assert_eq!(to.read(&id, content.len()).unwrap(), content);
}

#[test]
fn what_was_given_up_is_gone_for_all_and_can_begin_anew() {
    let (dir, store) = store();
    let id = BlobId::of(b"large");
    let size = 2 * GROUP_BYTES;
    let (one, two) = (store.partial(&id, size).unwrap(), store.partial(&id, size).unwrap());
    one.data.write_all_at(&numbers(9_000), 0).unwrap();
    store.give_up(&one).unwrap();
    store.give_up(&two).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("blobs/partial")).unwrap().count(), 0);
    let part = Proved::Hashes { offset: 0, bytes: [0; 64] };
    assert_eq!(two.add(part).unwrap_err().kind(), io::ErrorKind::StorageFull);
    let anew = store.partial(&id, size).unwrap();
    assert!(store.finish(&two).is_err());
    assert!(!store.finish(&anew).unwrap() && store.has_partial(&id, size));
}

#[test]
fn a_blob_that_went_bad_is_removed_and_a_lost_outboard_is_made_again() {
    let (_dir, store) = store();
    let content = numbers(3 * GROUP_BYTES as usize);
    let (id, all) = (store.put_bytes(&content).unwrap(), Ranges::all(content.len() as u64));
    let outboard = store.path_of(&id).with_extension(OUTBOARD);
    fs::remove_file(&outboard).unwrap();
    let blob = store.open_verifiable(&id).unwrap();
    store.encode(&blob, &all, io::sink()).unwrap();
    fs::write(&outboard, [7; 128]).unwrap();
    let blob = store.open_verifiable(&id).unwrap();
    assert!(store.encode(&blob, &all, io::sink()).is_err());
    let blob = store.open_verifiable(&id).unwrap();
    store.encode(&blob, &all, io::sink()).unwrap();
    File::options().write(true).open(store.path_of(&id)).unwrap().write_all(b"bad").unwrap();
    assert!(matches!(store.encode(&blob, &all, io::sink()), Err(Error::Corrupt(_))));
    assert!(!store.has(&id) && !outboard.exists());
    assert!(matches!(store.open_verifiable(&id), Err(Error::Missing(_))));
}

#[test]
fn zeros_take_no_room() {
    use std::os::unix::fs::MetadataExt;
    let (dir, store) = store();
    let path = dir.path().join("sparse");
    let file = File::create(&path).unwrap();
    file.write_all_at(b"start", 0).unwrap();
    file.write_all_at(b"end", 40 << 20).unwrap();
    file.set_len(64 << 20).unwrap();
    let (id, size) = store.put_file(&path).unwrap();
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert_eq!(size, 64 << 20);
    assert!(blocks(&store.path_of(&id)) <= 1 << 20);
    let (_other, to) = self::store();
    let partial = to.partial(&id, size).unwrap();
    let mut encoded = Vec::new();
    let blob = store.open_verifiable(&id).unwrap();
    store.encode(&blob, &Ranges::all(size), &mut encoded).unwrap();
    verified::decode(&id, size, &Ranges::all(size), &encoded[..], |it| partial.add(it)).unwrap();
    assert!(to.finish(&partial).unwrap());
    assert!(blocks(&to.path_of(&id)) <= 1 << 20);
    to.check(&id).unwrap();
}

pub(super) fn numbers(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i % 251) as u8).collect()
}

#[test]
fn persisting_names_the_blob_that_is_missing() {
    let (_dir, store) = store();
    let few = [store.put_bytes(b"a").unwrap(), store.put_bytes(b"b").unwrap()];
    store.persist(&few).unwrap();
    let mut many: Vec<BlobId> = (0..100_u8).map(|i| store.put_bytes(&[i]).unwrap()).collect();
    store.persist(&many).unwrap();
    many.push(BlobId::of(b"absent"));
    assert!(matches!(store.persist(&many), Err(Error::Missing(_))));
    assert!(matches!(store.persist(&many[100..]), Err(Error::Missing(_))));
}

pub(super) fn store() -> (tempfile::TempDir, BlobStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
    (dir, store)
}
