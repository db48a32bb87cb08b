//! What a sweep takes, what it must not take whatever happens beside it, and what is counted.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use proptest::{prelude::*, test_runner::Config};

use super::*;
use crate::transfer::tree::{Entry, Kind, Tree, TreePath};

/// A clock that goes when it is told to.
#[derive(Clone, Default)]
struct Time(Arc<AtomicU64>);

impl Time {
    fn now(&self) -> SystemTime {
        // Far from the epoch, as real clocks are.
        SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000 + self.0.load(Ordering::SeqCst))
    }

    fn pass(&self, time: Duration) {
        self.0.fetch_add(time.as_secs(), Ordering::SeqCst);
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    time: Time,
    store: BlobStore,
}

impl Fixture {
    fn new() -> Self {
        let (dir, time) = (tempfile::tempdir().unwrap(), Time::default());
        let store = open(dir.path(), &time);
        Self { dir, time, store }
    }

    /// As after the daemon was killed.
    fn crash(&mut self) {
        self.store = open(self.dir.path(), &self.time);
        self.store.census().unwrap();
    }

    fn tree(&self, contents: &[&[u8]]) -> BlobId {
        let entries = contents.iter().enumerate().map(|(at, content)| Entry {
            path: TreePath::from_bytes(format!("f{at}")).unwrap(),
            kind: Kind::File {
                blob: self.store.put_bytes(content).unwrap(),
                size: content.len() as u64,
                executable: false,
            },
        });
        let tree = Tree::new(entries.collect()).unwrap();
        self.store.put_bytes(&tree.encode().unwrap()).unwrap()
    }

    fn reach(&self, roots: &[BlobId]) -> Reach {
        let mut reach = Reach::begin(&self.store);
        roots.iter().for_each(|root| reach.add_tree(*root));
        reach
    }

    fn is_live(&self, id: &BlobId) -> bool {
        self.store.path_of(id).exists()
    }

    /// That the counters are what a walk finds.
    fn assert_counted(&self) {
        let counted = self.store.used();
        let census = self.store.census().unwrap();
        assert_eq!(counted.blobs, census.bytes);
        assert_eq!(counted.trash, census.trash_bytes);
        assert_eq!(counted.partial, census.partial_bytes);
        assert_eq!(census.drift_bytes, 0);
    }
}

fn open(dir: &Path, time: &Time) -> BlobStore {
    let time = time.clone();
    BlobStore::open_with(&dir.join("blobs"), Upkeep::with_clock(move || time.now())).unwrap()
}

const LATER: Duration = Duration::from_secs(RELIED.as_secs() + 600);
const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn what_comes_once_more_while_it_is_in_the_trash_is_counted_once_there() {
    let it = Fixture::new();
    for _ in 0..3 {
        it.store.put_bytes(&numbers(2 * GROUP_BYTES as usize)).unwrap();
        it.time.pass(LATER);
        assert_eq!(it.store.sweep(&it.reach(&[])).unwrap().trashed, 1);
        it.assert_counted();
    }
}

#[test]
fn what_nothing_names_goes_to_the_trash_and_comes_back_when_it_is_asked_for() {
    let it = Fixture::new();
    let large = numbers(2 * GROUP_BYTES as usize);
    let kept = it.tree(&[b"kept", &large]);
    let gone = it.tree(&[b"gone", &large[1..]]);
    let large_gone = BlobId::of(&large[1..]);
    it.time.pass(LATER);
    let swept = it.store.sweep(&it.reach(&[kept])).unwrap();
    assert_eq!((swept.trashed, swept.relied_on), (3, 0));
    for (content, is_live) in
        [(&b"kept"[..], true), (&large, true), (b"gone", false), (&large[1..], false)]
    {
        assert_eq!(it.is_live(&BlobId::of(content)), is_live);
    }
    it.assert_counted();
    assert!(it.store.used().trash > 2 * GROUP_BYTES);
    // Asked for, with what proves it, and young again.
    let blob = it.store.open_verifiable(&large_gone).unwrap();
    it.store.encode(&blob, &Ranges::all(blob.size), io::sink()).unwrap();
    assert!(
        it.is_live(&large_gone) && it.store.path_of(&large_gone).with_extension(OUTBOARD).exists()
    );
    assert_eq!(it.store.sweep(&it.reach(&[kept])).unwrap().relied_on, 1);
    // Named again.
    assert!(!it.is_live(&gone));
    it.store.sweep(&it.reach(&[kept, gone])).unwrap();
    assert!(it.is_live(&gone) && it.is_live(&BlobId::of(b"gone")));
    it.assert_counted();
}

#[test]
fn the_trash_is_kept_for_its_time_and_what_came_first_goes_first_where_room_is_short() {
    let it = Fixture::new();
    let [first, second] = [vec![1; 50_000], vec![2; 50_000]].map(|content| {
        let id = it.store.put_bytes(&content).unwrap();
        it.time.pass(LATER);
        it.store.sweep(&it.reach(&[])).unwrap();
        id
    });
    it.time.pass(DAY - LATER);
    assert!(it.store.purge(DAY).unwrap() > 0);
    assert!(!it.store.has(&first));
    it.assert_counted();
    let third = it.store.put_bytes(&[3; 50_000]).unwrap();
    it.time.pass(LATER);
    it.store.sweep(&it.reach(&[])).unwrap();
    let enough = || it.store.used().trash < 60_000;
    it.store.purge_until(enough).unwrap();
    assert!(!it.store.has(&second) && it.store.has(&third));
    it.assert_counted();
}

#[test]
fn a_list_of_files_that_went_bad_keeps_everything_until_it_is_whole_again() {
    let it = Fixture::new();
    let root = it.tree(&[b"named"]);
    let other = it.store.put_bytes(b"other").unwrap();
    let manifest = it.store.read(&root, 1 << 20).unwrap();
    it.time.pass(LATER);
    // Bad on the disk, and then found to be so and removed.
    fs::write(it.store.path_of(&root), b"bad").unwrap();
    for is_removed in [false, true] {
        if is_removed {
            assert!(matches!(it.store.check(&root), Err(Error::Corrupt(_))));
            assert!(!it.store.has(&root));
        }
        let reach = it.reach(&[root]);
        assert_eq!(reach.unreadable()[0].0, root);
        assert_eq!(it.store.sweep(&reach).unwrap(), Swept::default());
        assert!(it.is_live(&other) && it.is_live(&BlobId::of(b"named")));
    }
    it.store.put_bytes(&manifest).unwrap();
    let reach = it.reach(&[root]);
    assert!(reach.unreadable().is_empty());
    assert_eq!(it.store.sweep(&reach).unwrap().trashed, 1);
    assert!(!it.is_live(&other) && it.is_live(&BlobId::of(b"named")));
}

#[test]
fn what_is_no_tree_or_never_was_here_holds_nothing_up() {
    let it = Fixture::new();
    let no_tree = it.store.put_bytes(b"no manifest").unwrap();
    let other = it.store.put_bytes(b"other").unwrap();
    it.time.pass(LATER);
    let reach = it.reach(&[no_tree, BlobId::of(b"elsewhere")]);
    assert!(reach.unreadable().is_empty());
    it.store.sweep(&reach).unwrap();
    assert!(it.is_live(&no_tree) && !it.is_live(&other));
}

#[test]
fn whatever_is_relied_on_while_a_transfer_goes_on_stays_until_it_is_over() {
    let it = Fixture::new();
    let before = it.store.put_bytes(b"before").unwrap();
    it.time.pass(LATER);
    let transfer = it.store.begin_use();
    let early = it.store.put_bytes(b"early").unwrap();
    it.time.pass(10 * LATER);
    it.store.sweep(&it.reach(&[])).unwrap();
    assert!(it.is_live(&early) && !it.is_live(&before));
    drop(transfer);
    it.store.sweep(&it.reach(&[])).unwrap();
    assert!(!it.is_live(&early));
}

#[test]
fn parts_that_nobody_goes_on_with_go_while_the_store_is_open() {
    let it = Fixture::new();
    let size = 2 * GROUP_BYTES;
    let [left, wanted] = [b"left", b"want"].map(|content| {
        let partial = it.store.partial(&BlobId::of(content), size).unwrap();
        partial.data.write_all_at(&numbers(9_000), 0).unwrap();
        partial
    });
    // As a transfer leaves it.
    let left = {
        let id = BlobId::of(b"left");
        drop(left);
        id
    };
    it.time.pass(PARTIAL_KEPT + DAY);
    // The clock of the store is ahead of that of the files.
    let now = it.time.now();
    for entry in fs::read_dir(it.dir.path().join("blobs/partial")).unwrap() {
        let file = fs::File::open(entry.unwrap().path()).unwrap();
        file.set_modified(now - PARTIAL_KEPT).unwrap();
    }
    it.store.census().unwrap();
    it.store.sweep_partials(PARTIAL_KEPT + DAY).unwrap();
    assert!(it.store.has_partial(&left, size));
    it.store.sweep_partials(PARTIAL_KEPT).unwrap();
    assert!(!it.store.has_partial(&left, size) && it.store.has_partial(&BlobId::of(b"want"), size));
    it.assert_counted();
    // Who begins anew finds nothing of it.
    let anew = it.store.partial(&left, size).unwrap();
    assert_eq!(anew.missing(), Ranges::all(size));
    assert!(it.store.has_partial(&left, size));
    drop(wanted);
}

#[test]
fn what_may_stay_where_it_is_stays_and_is_not_taken_back() {
    let it = Fixture::new();
    let tree = it.tree(&[b"input"]);
    let blob = BlobId::of(b"input");
    let in_place = || {
        let mut reach = Reach::begin(&it.store);
        reach.add_tree_in_place(tree);
        it.store.sweep(&reach).unwrap()
    };
    it.time.pass(LATER);
    in_place();
    assert!(it.is_live(&tree) && it.is_live(&blob));
    // At need.
    it.time.pass(LATER);
    it.store.sweep(&it.reach(&[])).unwrap();
    assert!(!it.is_live(&tree) && !it.is_live(&blob));
    assert_eq!(in_place(), Swept::default());
    assert!(!it.is_live(&tree) && !it.is_live(&blob));
    // Needed again.
    it.store.sweep(&it.reach(&[tree])).unwrap();
    assert!(it.is_live(&tree) && it.is_live(&blob));
    it.assert_counted();
}

/// What can happen between two steps of a sweep that is about to take a blob, and whether the
/// blob has to be in its place afterwards.
type Between = (&'static str, fn(&Fixture, &BlobId), bool);

const BETWEEN: [Between; 6] = [
    ("nothing", |_, _| {}, false),
    ("asked for", |it, id| assert!(it.store.has(id)), true),
    ("read", |it, id| drop(it.store.read(id, 1 << 20).unwrap()), true),
    ("written", |it, id| assert_eq!(it.store.put_bytes(b"x").unwrap(), *id), true),
    ("made durable", |it, id| it.store.persist([id]).unwrap(), true),
    ("gone bad", |it, id| it.store.remove(id).unwrap(), false),
];

#[test]
fn who_relies_on_a_blob_between_any_two_steps_of_a_sweep_has_it() {
    for (what, between, stays) in BETWEEN {
        // Before the list is made, between the list and the move, and after the move.
        for at in 0..3 {
            let it = Fixture::new();
            let (id, other) =
                (it.store.put_bytes(b"x").unwrap(), it.store.put_bytes(b"y").unwrap());
            it.time.pass(LATER);
            let reach = it.reach(&[]);
            let mut steps = 0;
            let mut step = || {
                if at == 1 && steps == 0 {
                    between(&it, &id);
                }
                steps += 1;
                Ok(())
            };
            if at == 0 {
                between(&it, &id);
            }
            it.store.sweep_stepping(&reach, &mut step).unwrap();
            if at == 2 && what != "gone bad" {
                between(&it, &id);
            }
            // At need the trash goes at once, whatever its age.
            it.store.purge_until(|| false).unwrap();
            assert_eq!(it.store.has(&id), stays, "{what}, {at}");
            assert!(!it.store.has(&other), "{what}, {at}");
        }
    }
}

#[test]
fn a_crash_between_any_two_steps_of_a_move_loses_nothing() {
    let content = numbers(2 * GROUP_BYTES as usize);
    for state in 0..4 {
        let mut it = Fixture::new();
        let id = it.store.put_bytes(&content).unwrap();
        let live = it.store.path_of(&id);
        let trashed =
            it.dir.path().join("blobs/trash").join(&id.to_string()[..2]).join(id.to_string());
        fs::create_dir_all(trashed.parent().unwrap()).unwrap();
        let outboards = [live.with_extension(OUTBOARD), trashed.with_extension(OUTBOARD)];
        match state {
            // On its way there: the directory is made, then the blob moved, then its outboard.
            0 => {}
            1 => fs::rename(&live, &trashed).unwrap(),
            2 => {
                fs::rename(&live, &trashed).unwrap();
                fs::rename(&outboards[0], &outboards[1]).unwrap();
            }
            // On its way back.
            _ => fs::rename(&outboards[0], &outboards[1]).unwrap(),
        }
        it.crash();
        it.assert_counted();
        let blob = it.store.open_verifiable(&id).unwrap();
        it.store.encode(&blob, &Ranges::all(blob.size), io::sink()).unwrap();
        assert_eq!(it.store.read(&id, content.len()).unwrap(), content, "state {state}");
        // What it left elsewhere goes with the next sweep and purge.
        it.time.pass(LATER);
        it.store.sweep(&it.reach(&[id])).unwrap();
        it.time.pass(DAY);
        it.store.purge(DAY).unwrap();
        assert_eq!(it.store.used().trash, 0, "state {state}");
        assert!(it.store.has(&id));
        it.assert_counted();
    }
}

#[test]
fn an_outboard_without_its_blob_goes_and_one_whose_blob_arrives_stays() {
    let it = Fixture::new();
    let id = it.store.put_bytes(&numbers(2 * GROUP_BYTES as usize)).unwrap();
    let path = it.store.path_of(&id);
    fs::remove_file(&path).unwrap();
    it.store.census().unwrap();
    it.store.sweep(&it.reach(&[])).unwrap();
    assert!(path.with_extension(OUTBOARD).exists());
    it.time.pass(LATER);
    it.store.sweep(&it.reach(&[])).unwrap();
    assert!(!path.with_extension(OUTBOARD).exists());
    it.assert_counted();
}

#[test]
fn a_blob_from_the_future_is_given_its_time_before_it_goes() {
    let it = Fixture::new();
    it.time.pass(10 * DAY);
    let id = it.store.put_bytes(b"x").unwrap();
    it.time.0.store(0, Ordering::SeqCst);
    for _ in 0..2 {
        it.store.sweep(&it.reach(&[])).unwrap();
        assert!(it.is_live(&id));
    }
    it.time.pass(LATER);
    it.store.sweep(&it.reach(&[])).unwrap();
    assert!(!it.is_live(&id));
}

/// What a model of the store remembers.
#[derive(Debug, Default)]
struct Model {
    /// Trees that are roots, by their number, with their contents.
    roots: BTreeMap<u8, Vec<Vec<u8>>>,
    /// Contents that somebody relies on, and until when.
    relied_on: BTreeMap<Vec<u8>, SystemTime>,
}

#[derive(Debug, Clone)]
enum Act {
    /// A tree is brought or found here, made durable, and named from then on.
    Root(u8),
    Unroot(u8),
    /// Asks for a blob; where it is here, that is relied on.
    Ask(u8),
    Put(u8),
    Pass(u16),
    /// A sweep, with acts between its steps; it ends after the last, as by a crash, if so.
    Sweep(Vec<Act>, bool),
    Purge,
    PurgeAtNeed,
    Crash,
}

fn content(number: u8) -> Vec<u8> {
    // Some of them have an outboard.
    let length =
        if number.is_multiple_of(4) { GROUP_BYTES as usize + 9 } else { 9 + usize::from(number) };
    vec![number; length]
}

fn small_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..6_u8).prop_map(Act::Root),
        3 => (0..6_u8).prop_map(Act::Unroot),
        3 => (0..12_u8).prop_map(Act::Ask),
        2 => (0..12_u8).prop_map(Act::Put),
        3 => (1..9000_u16).prop_map(Act::Pass),
        2 => Just(Act::PurgeAtNeed),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        5 => small_act(),
        4 => (prop::collection::vec(small_act(), 0..6), any::<bool>())
            .prop_map(|(acts, crashes)| Act::Sweep(acts, crashes)),
        1 => Just(Act::Purge),
        1 => Just(Act::Crash),
    ]
}

/// Contents of tree `number`: trees share some.
fn contents_of(number: u8) -> Vec<Vec<u8>> {
    (0..3).map(|step| content((number * 2 + step) % 12)).collect()
}

fn carry_out(it: &Fixture, model: &mut Model, act: &Act) {
    match act {
        Act::Root(number) => {
            let contents = contents_of(*number);
            // As a keeper does: what is here is found, what is missing comes; then all of it is
            // made durable, and only then is it a root.
            let slices: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            let all_here = contents.iter().all(|content| it.store.has(&BlobId::of(content)));
            if !all_here || number.is_multiple_of(2) {
                it.tree(&slices);
            }
            let root = manifest_of(&contents);
            it.store.put_bytes(&root).unwrap();
            let ids: Vec<BlobId> = contents.iter().map(|content| BlobId::of(content)).collect();
            it.store.persist(&ids).unwrap();
            model.roots.insert(*number, contents);
        }
        Act::Unroot(number) => drop(model.roots.remove(number)),
        Act::Ask(number) => {
            let content = content(*number);
            if it.store.has(&BlobId::of(&content)) {
                model.relied_on.insert(content, it.time.now() + RELIED - Duration::from_secs(300));
            }
        }
        Act::Put(number) => {
            let content = content(*number);
            it.store.put_bytes(&content).unwrap();
            model.relied_on.insert(content, it.time.now() + RELIED - Duration::from_secs(300));
        }
        Act::Pass(seconds) => it.time.pass(Duration::from_secs((*seconds).into())),
        Act::PurgeAtNeed => it.store.purge_until(|| false).unwrap(),
        Act::Purge => drop(it.store.purge(DAY).unwrap()),
        Act::Sweep(..) | Act::Crash => unreachable!("only at the top"),
    }
}

fn manifest_of(contents: &[Vec<u8>]) -> Vec<u8> {
    let entries = contents.iter().enumerate().map(|(at, content)| Entry {
        path: TreePath::from_bytes(format!("f{at}")).unwrap(),
        kind: Kind::File {
            blob: BlobId::of(content),
            size: content.len() as u64,
            executable: false,
        },
    });
    Tree::new(entries.collect()).unwrap().encode().unwrap()
}

/// That everything is there which a root names or somebody relies on: in its place, or in the
/// trash and with it not for the taking.
fn check(it: &Fixture, model: &Model) {
    let now = it.time.now();
    for (number, contents) in &model.roots {
        let manifest = manifest_of(contents);
        for content in contents.iter().chain([&manifest]) {
            assert!(it.is_live(&BlobId::of(content)), "tree {number} lacks {:?}", content[0]);
        }
    }
    for (content, until) in &model.relied_on {
        if *until > now {
            assert!(it.is_live(&BlobId::of(content)), "{:?} is relied on", content[0]);
        }
    }
}

proptest! {
    #![proptest_config(Config { cases: 150, ..Config::default() })]

    #[test]
    fn nothing_that_is_named_or_relied_on_ever_goes(acts in prop::collection::vec(act(), 1..30)) {
        let mut it = Fixture::new();
        let mut model = Model::default();
        for act in &acts {
            match act {
                Act::Crash => it.crash(),
                Act::Sweep(between, crashes) => {
                    // The roots are read first, as the daemon reads them; later ones come
                    // only with their blobs relied on.
                    let roots: Vec<BlobId> =
                        model.roots.values().map(|it| BlobId::of(&manifest_of(it))).collect();
                    let reach = it.reach(&roots);
                    let mut left = between.iter();
                    let swept = it.store.sweep_stepping(&reach, &mut || match left.next() {
                        Some(act) => {
                            carry_out(&it, &mut model, act);
                            check(&it, &model);
                            Ok(())
                        }
                        None if *crashes => Err(Error::Missing(BlobId([0; 32]))),
                        None => Ok(()),
                    });
                    if swept.is_err() {
                        it.crash();
                    }
                }
                act => carry_out(&it, &mut model, act),
            }
            check(&it, &model);
        }
        it.assert_counted();
    }
}

#[test]
fn threads_that_rely_on_blobs_beside_sweeps_and_purges_always_have_them() {
    let dir = tempfile::tempdir().unwrap();
    // Real time, in which a second is an hour.
    let begun = std::time::Instant::now();
    let clock = move || {
        SystemTime::UNIX_EPOCH
            + Duration::from_secs(2_000_000_000)
            + begun.elapsed() * u32::try_from(RELIED.as_secs()).unwrap()
    };
    let store = BlobStore::open_with(&dir.path().join("blobs"), Upkeep::with_clock(clock)).unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(4);
    let is_over = move || std::time::Instant::now() > end;
    let found = AtomicU64::new(0);
    let trashed = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3_u8 {
            let (store, found) = (&store, &found);
            scope.spawn(move || {
                let mut at = u32::from(thread);
                while !is_over() {
                    at = at.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // So many that most are not relied on any more when their turn comes.
                    let content = ((at >> 8) % 900).to_be_bytes().repeat(750);
                    let id = BlobId::of(&content);
                    if store.has(&id) {
                        found.fetch_add(1, Ordering::Relaxed);
                    } else {
                        store.put_bytes(&content).unwrap();
                    }
                    // Well within the time that it may rely on it.
                    assert_eq!(store.read(&id, 3000).unwrap(), content);
                    std::thread::sleep(Duration::from_millis(u64::from(at >> 28) / 2));
                }
            });
        }
        scope.spawn(|| {
            while !is_over() {
                let swept = store.sweep(&Reach::begin(&store)).unwrap();
                trashed.fetch_add(swept.trashed, Ordering::Relaxed);
                store.purge_until(|| false).unwrap();
            }
        });
    });
    assert!(found.into_inner() > 0 && trashed.into_inner() > 0, "nothing met");
    let used = store.used();
    let census = store.census().unwrap();
    assert_eq!((used.blobs, used.trash), (census.bytes, census.trash_bytes));
}

mod limits {
    use super::*;

    fn limited(quota: u64) -> Fixture {
        let it = Fixture::new();
        it.store.set_limits(Limits { whose: "node n1".to_owned(), quota: Some(quota) });
        it
    }

    fn refusal(result: Result<impl Sized, Error>) -> String {
        let Err(Error::Io { source, .. }) = result else { panic!("it was taken") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        source.to_string()
    }

    #[test]
    fn whatever_comes_in_is_bounded_and_the_refusal_says_by_what() {
        let it = limited(1 << 20);
        let put = |n: u8, size: usize| it.store.put_bytes(&vec![n; size]);
        put(1, 700 << 10).unwrap();
        let said = refusal(put(2, 600 << 10));
        for part in ["No space left on node n1", "1.0 MiB", "`storage`", "p2pit rm"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!it.store.has(&BlobId::of(&vec![2; 600 << 10])));
        let path = it.dir.path().join("file");
        fs::write(&path, vec![3; 600 << 10]).unwrap();
        refusal(it.store.put_file(&path));
        // What arrives in ranges is refused as it arrives, and can be given up.
        let (from_dir, from) = store();
        let content = vec![4; 3 * GROUP_BYTES as usize];
        let id = from.put_bytes(&content).unwrap();
        let partial = it.store.partial(&id, content.len() as u64).unwrap();
        let blob = from.open_verifiable(&id).unwrap();
        let mut encoded = Vec::new();
        from.encode(&blob, &Ranges::all(blob.size), &mut encoded).unwrap();
        let mut refused = None;
        let decoded =
            verified::decode(&id, blob.size, &Ranges::all(blob.size), &encoded[..], |part| {
                partial.add(part).inspect_err(|e| refused = Some(e.kind()))
            });
        assert!(decoded.is_err());
        assert_eq!(refused, Some(io::ErrorKind::StorageFull));
        assert!(it.store.used().total() <= 1 << 20);
        it.store.give_up(&partial).unwrap();
        it.assert_counted();
        // Nothing is left of what was refused, and what is smaller still fits.
        assert_eq!(fs::read_dir(it.dir.path().join("blobs/tmp")).unwrap().count(), 0);
        put(5, 100 << 10).unwrap();
        it.assert_counted();
        drop(from_dir);
    }

    #[test]
    fn zeros_and_results_are_not_refused() {
        let it = limited(1 << 20);
        it.store.put_bytes(&vec![0; 8 << 20]).unwrap();
        assert!(it.store.used().total() < 1 << 20);
        it.store.for_results().put_bytes(&vec![1; 2 << 20]).unwrap();
        assert!(it.store.is_short());
        refusal(it.store.put_bytes(b"more"));
        it.assert_counted();
    }

    #[test]
    fn the_trash_makes_room_first_and_then_what_relief_finds() {
        let it = limited(1 << 20);
        let id = it.store.put_bytes(&vec![1; 800 << 10]).unwrap();
        it.time.pass(LATER);
        it.store.sweep(&it.reach(&[])).unwrap();
        let second = it.store.put_bytes(&vec![2; 800 << 10]).unwrap();
        assert!(!it.store.has(&id));
        it.time.pass(LATER);
        let relieved = Arc::new(AtomicU64::new(0));
        let (store, times) = (it.store.clone(), Arc::clone(&relieved));
        it.store.set_relief(move |wanted| {
            assert!((1..=800 << 10).contains(&wanted));
            times.fetch_add(1, Ordering::SeqCst);
            store.sweep(&Reach::begin(&store)).unwrap();
        });
        it.store.put_bytes(&vec![3; 800 << 10]).unwrap();
        assert!(!it.store.has(&second));
        assert_eq!(relieved.load(Ordering::SeqCst), 1);
        // Relied on: no relief helps.
        refusal(it.store.put_bytes(&vec![4; 800 << 10]));
        it.assert_counted();
    }

    #[test]
    fn for_what_cannot_fit_nothing_is_deleted() {
        let it = limited(1 << 20);
        let id = it.store.put_bytes(&vec![1; 600 << 10]).unwrap();
        it.time.pass(LATER);
        it.store.sweep(&it.reach(&[])).unwrap();
        it.store.set_relief(|_| {});
        let in_trash = it.store.used().trash;
        assert!(in_trash >= 600 << 10);
        let kind = it.store.fits(2 << 20).unwrap_err().kind();
        assert_eq!((kind, it.store.used().trash), (io::ErrorKind::StorageFull, in_trash));
        assert!(!it.store.could_fit(2 << 20, 0) && it.store.could_fit(900 << 10, 0));
        it.store.fits(900 << 10).unwrap();
        assert_eq!(it.store.used().trash, 0);
        assert!(!it.store.has(&id));
    }

    #[test]
    fn what_may_be_named_again_stays_in_the_trash_until_a_sweep_has_looked() {
        let it = limited(1 << 20);
        let id = it.store.put_bytes(&vec![1; 600 << 10]).unwrap();
        it.time.pass(LATER);
        it.store.sweep(&it.reach(&[])).unwrap();
        it.store.keep_trash();
        let in_trash = it.store.used().trash;
        it.store.fits(900 << 10).unwrap_err();
        assert_eq!(it.store.used().trash, in_trash);
        // One that began before does not count: it may have missed what is named now.
        let before = it.reach(&[]);
        it.store.keep_trash();
        it.store.sweep(&before).unwrap();
        it.store.fits(900 << 10).unwrap_err();
        it.store.sweep(&it.reach(&[])).unwrap();
        it.store.fits(900 << 10).unwrap();
        assert!(!it.store.has(&id));
    }

    #[test]
    fn what_is_beside_the_store_counts_and_what_is_in_the_trash_is_room() {
        let it = limited(1 << 20);
        it.store.set_beside(900 << 10);
        refusal(it.store.put_bytes(&vec![1; 200 << 10]));
        assert_eq!(it.store.room_left(), Some(124 << 10));
        it.store.put_bytes(&vec![1; 100 << 10]).unwrap();
        it.time.pass(LATER);
        it.store.sweep(&it.reach(&[])).unwrap();
        assert_eq!(it.store.room_left(), Some(124 << 10));
        it.store.set_beside(0);
        assert_eq!(it.store.room_left(), Some(1 << 20));
    }

    #[test]
    fn without_limits_nothing_is_bounded() {
        let it = Fixture::new();
        assert_eq!(it.store.room_left(), None);
        assert!(!it.store.is_short());
        assert!(it.store.fits(u64::MAX).is_ok());
        it.store.set_limits(Limits { whose: "node n1".to_owned(), quota: None });
        // More than any disk.
        let refused = it.store.fits(1 << 60).unwrap_err().to_string();
        assert!(refused.contains("free, of which p2pit leaves"), "{refused}");
        let refused = it.store.could_ever_fit(1 << 60).unwrap_err().to_string();
        assert!(refused.contains("free, of which p2pit leaves"), "{refused}");
        assert!(it.store.could_ever_fit(1).is_ok());
        it.store.set_limits(Limits { whose: "node n1".to_owned(), quota: Some(5) });
        assert!(it.store.could_ever_fit(5).is_ok());
        let refused = it.store.could_ever_fit(6).unwrap_err().to_string();
        assert!(refused.contains("p2pit may use 5 bytes there"), "{refused}");
    }

    #[test]
    fn amounts_are_shown_in_three_digits_or_so() {
        for (bytes, shown) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1536, "1.5 KiB"),
            (200 << 30, "200 GiB"),
            (3 << 40, "3.0 TiB"),
        ] {
            assert_eq!(amount(bytes), shown);
        }
    }
}
