//! What keeps blobs on this node: the one place that lists it.
//!
//! A blob stays as long as a tree of any of these kinds names it:
//!
//! | kind | where it is found |
//! |---|---|
//! | inputs of jobs that are not over | the records kept here, the work promised here |
//! | inputs of finished jobs | the records kept here; at need they go |
//! | what ranks left, and what a retry begins with | the records kept here |
//! | what this node is to hold | `copies_wanted` of the records kept here |
//! | what ranks left here | `*.json` in `jobs/JOB/ATTEMPT-RANK/` |
//! | copies of `keep/` of ranks that run here, which others are bringing | memory |
//! | copies of what ranks left elsewhere | `*.json` in `copies/JOB/ATTEMPT-RANK/` |
//! | trees that were brought for a submission | memory, for a day |
//!
//! What is under way otherwise is relied on: see `transfer::store`. Of a job whose data was
//! removed, or has expired, nothing keeps anything.

use std::{fs, io, path::Path};

use p2pit_protocol::{
    BlobId, JobId, Peer,
    copies::CopyOrder,
    job::State,
    record::{Body, Kept},
};

use crate::home::Home;

/// A tree, and what keeps it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Root {
    pub(super) tree: BlobId,
    pub(super) kind: Kind,
}

/// See the module's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Input(JobId),
    Result(JobId),
    Saved(JobId),
    Wanted(JobId),
    Left(JobId),
    Copy(JobId),
    Pushed,
    /// Last: of what keeps one tree the first counts, and this keeps it the least.
    InputOfFinished(JobId),
}

impl Kind {
    /// For messages: what a tree of this kind is.
    pub(super) fn describe(self) -> String {
        let of = |job: JobId| format!("of job {}", short(job));
        match self {
            Self::Input(job) | Self::InputOfFinished(job) => format!("an input {}", of(job)),
            Self::Result(job) | Self::Left(job) => format!("what is left {}", of(job)),
            Self::Saved(job) => format!("a copy of keep/ {}", of(job)),
            Self::Wanted(job) | Self::Copy(job) => format!("a copy {}", of(job)),
            Self::Pushed => "an input of a submission".to_owned(),
        }
    }

    pub(super) fn job(self) -> Option<JobId> {
        match self {
            Self::Input(job)
            | Self::InputOfFinished(job)
            | Self::Result(job)
            | Self::Saved(job)
            | Self::Wanted(job)
            | Self::Left(job)
            | Self::Copy(job) => Some(job),
            Self::Pushed => None,
        }
    }
}

/// A list of trees on the disk that cannot be read: what it names is not known.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) job: JobId,
    pub(super) reason: String,
}

/// Whether what a finished job left may go from this node by its record.
pub(super) fn is_given_up(body: &Body, keep_done_ms: u64, wall_ms: u64) -> Option<Dropped> {
    if body.state() != State::Done {
        return None;
    }
    if body.removed.is_some() {
        return Some(Dropped::Removed);
    }
    let ended_ms = body.history.last().map_or(0, |change| change.at_ms);
    (ended_ms.saturating_add(keep_done_ms) <= wall_ms).then_some(Dropped::Expired)
}

/// Why a job's data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dropped {
    /// Its owner, or an admin, said so, and may take that back.
    Removed,
    /// It is older than `keep_done`.
    Expired,
}

/// What the records and the work of this node keep.
pub(super) fn of_peer(peer: &Peer, keep_done_ms: u64, wall_ms: u64) -> Vec<Root> {
    let mut roots = Vec::new();
    for (job, kept) in peer.records() {
        if is_given_up(&kept.value.body, keep_done_ms, wall_ms).is_none() {
            of_record(*job, kept, &mut roots);
            if let Some(order) = peer.copies_wanted(*job) {
                of_order(*job, &order, &mut roots);
            }
        }
    }
    for job in peer.working_for() {
        if let Some(spec) = peer.work_spec(job) {
            roots.extend(spec.inputs().map(|tree| Root { tree, kind: Kind::Input(job) }));
        }
    }
    roots
}

/// What others are bringing of ranks that run here, though it is not the newest.
pub(super) fn on_the_way(trees: Vec<(JobId, BlobId)>) -> impl Iterator<Item = Root> {
    trees.into_iter().map(|(job, tree)| Root { tree, kind: Kind::Saved(job) })
}

fn of_record(job: JobId, kept: &Kept, roots: &mut Vec<Root>) {
    let body = &kept.value.body;
    let input = match body.state() {
        State::Done => Kind::InputOfFinished(job),
        _ => Kind::Input(job),
    };
    roots.extend(kept.spec.inputs().map(|tree| Root { tree, kind: input }));
    let ends = body.ranks.iter().filter_map(|rank| rank.end.as_ref());
    let results = ends.flat_map(|end| end.keep.into_iter().chain(end.artifacts));
    roots.extend(results.map(|tree| Root { tree, kind: Kind::Result(job) }));
    roots.extend(body.saved.iter().map(|saved| Root { tree: saved.tree, kind: Kind::Saved(job) }));
}

fn of_order(job: JobId, order: &CopyOrder, roots: &mut Vec<Root>) {
    let ends = order.ranks.iter().filter_map(|rank| rank.end);
    let of_ends = ends.flat_map(|end| end.keep.into_iter().chain(end.artifacts));
    let saves = order.ranks.iter().filter_map(|rank| rank.save).map(|save| save.tree);
    let trees = of_ends.chain(saves).chain(order.saved.iter().map(|saved| saved.tree));
    roots.extend(trees.map(|tree| Root { tree, kind: Kind::Wanted(job) }));
}

/// What is named on the disk, and the lists that cannot be read.
pub(super) fn on_disk(home: &Home) -> io::Result<(Vec<Root>, Vec<Unreadable>)> {
    let (mut roots, mut unreadable) = (Vec::new(), Vec::new());
    type OfJob = fn(JobId) -> Kind;
    for (dir, kind) in [(home.jobs(), Kind::Left as OfJob), (home.copies(), Kind::Copy as OfJob)] {
        for job in jobs_in(&dir)? {
            for list in lists_below(&dir.join(job.to_string()))? {
                match named_in(&list) {
                    Ok(trees) => {
                        roots.extend(trees.into_iter().map(|tree| Root { tree, kind: kind(job) }));
                    }
                    // Its directory went meanwhile.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => {
                        let reason = format!("{} cannot be read: {e}", list.display());
                        unreadable.push(Unreadable { job, reason });
                    }
                }
            }
        }
    }
    Ok((roots, unreadable))
}

/// The jobs that have a directory in `dir`.
pub(super) fn jobs_in(dir: &Path) -> io::Result<Vec<JobId>> {
    let names = names_in(dir)?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

/// The names in `dir` that are texts; none where there is no such directory.
pub(super) fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Every list of trees in the directories of a job's ranks. The directories that belong to the
/// job itself are not looked into.
fn lists_below(job_dir: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    let mut lists = Vec::new();
    for name in names_in(job_dir)? {
        let rank_dir = job_dir.join(name);
        if !rank_dir.is_dir() {
            continue;
        }
        for name in names_in(&rank_dir)? {
            if name.ends_with(".json") {
                lists.push(rank_dir.join(name));
            }
        }
    }
    Ok(lists)
}

/// All ids in a list, whatever it calls them: so a list of a later version keeps what it names.
fn named_in(list: &Path) -> io::Result<Vec<BlobId>> {
    let value: serde_json::Value =
        serde_json::from_slice(&fs::read(list)?).map_err(io::Error::other)?;
    let mut trees = Vec::new();
    collect_ids(&value, &mut trees);
    Ok(trees)
}

fn collect_ids(value: &serde_json::Value, ids: &mut Vec<BlobId>) {
    match value {
        serde_json::Value::String(text) => ids.extend(text.parse::<BlobId>()),
        serde_json::Value::Array(values) => values.iter().for_each(|it| collect_ids(it, ids)),
        serde_json::Value::Object(fields) => fields.values().for_each(|it| collect_ids(it, ids)),
        _ => {}
    }
}

pub(super) fn short(job: JobId) -> String {
    job.to_string().chars().take(8).collect()
}

#[cfg(test)]
pub(in crate::daemon) mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use p2pit_protocol::{
        PeerId, PoolId, StoreId, UserId,
        copies::{EndOrder, RankOrder, SaveOrder},
        identity::{Domain, KeyPair, SignedBytes},
        job::{
            Attempt, Change, Command, Continued, Ending, Grace, JobSpec, Policy, Rank,
            RankAssignment, RankEnd, RankRecord, RankState, Removed, Saved, Source, VerifiedSpec,
        },
        record::{Certificate, Value},
        request::Grant,
        wire,
    };

    use super::*;
    use crate::{home::Home, transfer::BlobStore, transfer::store::Reach};

    fn tree(n: u8) -> BlobId {
        BlobId([n; 32])
    }

    fn spec() -> VerifiedSpec {
        let key = KeyPair::from_seed(&[1; 32]);
        let spec = JobSpec {
            pool: PoolId([2; 32]),
            owner: UserId(key.public()),
            title: "t".to_owned(),
            request: "[]".parse().unwrap(),
            command: Command::Direct("true".to_owned()),
            code: tree(1),
            code_bytes: 0,
            source: Source::default(),
            continues: Some(Continued { job: JobId([3; 32]), keep: tree(2) }),
            artifacts: Vec::new(),
            env: std::collections::BTreeMap::new(),
            private: false,
            time_limit_ms: None,
            grace: Grace::default(),
            retries: 0,
            policy: Policy::Continue,
            lost_after_ms: p2pit_protocol::job::LOST_AFTER_MS,
            keep_every_ms: 0,
            nonce: [0; 16],
            submitted_at_ms: 1_000,
            keepers: vec![(node(), StoreId([4; 16]))],
        };
        let signed = SignedBytes::sign(&key, Domain::JobSpec, wire::encode(&spec));
        VerifiedSpec::verify(signed).unwrap()
    }

    fn node() -> PeerId {
        PeerId(KeyPair::from_seed(&[5; 32]).public())
    }

    /// A job whose one rank left a tree of each kind, and that began with a saved one.
    pub(in crate::daemon) fn kept(state: State) -> Kept {
        let spec = spec();
        let mut value = Value::birth(&spec);
        let end = RankEnd {
            keep: Some(tree(3)),
            artifacts: Some(tree(4)),
            ..RankEnd::bare(Ending::Exited { code: 0 }, 2_000)
        };
        let assignment = RankAssignment {
            rank: Rank(0),
            group: 0,
            process: 0,
            node: node(),
            hold: p2pit_protocol::HoldId([0; 16]),
            grant: Grant { gpus: Vec::new(), cpu_cores: 1, ram_mib: 0 },
        };
        value.body.ranks =
            vec![RankRecord { assignment, state: RankState::Ended, end: Some(end), store: None }];
        let saved = Saved { rank: Rank(0), attempt: Attempt(1), node: node(), tree: tree(5) };
        value.body.saved = vec![saved];
        value.body.history.push(Change { state, at_ms: 10_000, reason: String::new() });
        let certificate =
            Certificate { links: Vec::new(), value_bytes: Vec::new(), receipts: Vec::new() };
        let keepers = spec.spec.keepers.clone();
        let spec = Arc::new(spec);
        Kept { spec, hash: value.hash(), value, chosen: true, certificate, keepers }
    }

    fn trees_of(roots: &[Root]) -> BTreeSet<BlobId> {
        roots.iter().map(|root| root.tree).collect()
    }

    #[test]
    fn a_record_keeps_inputs_results_and_what_the_next_attempt_begins_with() {
        let job = JobId([9; 32]);
        for (state, input) in
            [(State::Running, Kind::Input(job)), (State::Done, Kind::InputOfFinished(job))]
        {
            let mut roots = Vec::new();
            of_record(job, &kept(state), &mut roots);
            assert_eq!(trees_of(&roots), (1..=5).map(tree).collect());
            let inputs = roots.iter().filter(|root| root.kind == input);
            assert_eq!(inputs.map(|root| root.tree).collect::<Vec<_>>(), [tree(1), tree(2)]);
        }
    }

    #[test]
    fn an_order_keeps_what_is_to_be_here() {
        let job = JobId([9; 32]);
        let rank = RankOrder {
            rank: Rank(0),
            attempt: Attempt(1),
            node: node(),
            sources: Vec::new(),
            end: Some(EndOrder { log_bytes: 1, keep: Some(tree(1)), artifacts: Some(tree(2)) }),
            save: Some(SaveOrder { seq: 1, tree: tree(3) }),
            follow: false,
        };
        let saved = Saved { rank: Rank(0), attempt: Attempt(1), node: node(), tree: tree(4) };
        let (links, saved) = (Vec::new(), vec![saved]);
        let order =
            CopyOrder { spec: Arc::new(spec()), links, inputs: true, saved, ranks: vec![rank] };
        let mut roots = Vec::new();
        of_order(job, &order, &mut roots);
        assert_eq!(trees_of(&roots), (1..=4).map(tree).collect());
        assert!(roots.iter().all(|root| root.kind == Kind::Wanted(job)));
    }

    #[test]
    fn only_what_is_over_is_given_up_when_it_was_removed_or_is_too_old() {
        let at = |state, removed, wall_ms| {
            let mut body = kept(state).value.body;
            body.removed = removed;
            is_given_up(&body, 5_000, wall_ms)
        };
        let removed = Some(Removed { by: spec().spec.owner, at_ms: 11_000 });
        assert_eq!(at(State::Running, removed, 99_000), None);
        assert_eq!(at(State::Running, None, 99_000), None);
        assert_eq!(at(State::Done, None, 14_999), None);
        assert_eq!(at(State::Done, None, 15_000), Some(Dropped::Expired));
        assert_eq!(at(State::Done, removed, 11_000), Some(Dropped::Removed));
    }

    #[test]
    fn every_list_on_the_disk_keeps_what_it_names_and_one_that_cannot_be_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&dir.path().join("home")).unwrap();
        let [one, two] = [1, 2].map(|n| JobId([n; 32]));
        let write = |dir: std::path::PathBuf, job: JobId, list: &str, text: &str| {
            let rank = dir.join(job.to_string()).join("1-0");
            fs::create_dir_all(&rank).unwrap();
            fs::write(rank.join(list), text).unwrap();
            rank
        };
        let (a, b, c, d) = (tree(1), tree(2), tree(3), tree(4));
        let collected = format!(r#"{{"keep":"{a}","artifacts":"{b}","result":"r","note":null}}"#);
        let rank = write(home.jobs(), one, "collected.json", &collected);
        // What a later version may write, and what a job writes, which is nothing to us.
        write(home.jobs(), one, "later.json", &format!(r#"[{{"deep":["{c}", 7, "x"]}}]"#));
        fs::create_dir(rank.join("keep")).unwrap();
        fs::write(rank.join("keep/own.json"), format!("\"{}\"", tree(9))).unwrap();
        write(home.copies(), two, "end.json", &format!(r#"{{"node":"n","keep":"{d}"}}"#));
        let (roots, unreadable) = on_disk(&home).unwrap();
        assert!(unreadable.is_empty());
        let expected = [
            (a, Kind::Left(one)),
            (b, Kind::Left(one)),
            (c, Kind::Left(one)),
            (d, Kind::Copy(two)),
        ];
        let found: BTreeSet<(BlobId, Kind)> =
            roots.iter().map(|root| (root.tree, root.kind)).collect();
        assert_eq!(found, expected.into());
        write(home.copies(), two, "save.json", "{");
        let (_, unreadable) = on_disk(&home).unwrap();
        assert_eq!(unreadable.len(), 1);
        assert_eq!(unreadable[0].job, two);
        assert!(unreadable[0].reason.contains("save.json"), "{}", unreadable[0].reason);
    }

    #[test]
    fn a_blob_that_any_kind_of_root_names_outlives_sweeps_and_one_of_none_does_not() {
        use crate::transfer::tree::{Entry, Kind as EntryKind, Tree, TreePath};
        let dir = tempfile::tempdir().unwrap();
        // Nothing is relied on for long.
        let store =
            BlobStore::open_for(&dir.path().join("blobs"), std::time::Duration::from_millis(1))
                .unwrap();
        let make = |content: &str| {
            let blob = store.put_bytes(content.as_bytes()).unwrap();
            let path = TreePath::from_bytes("f").unwrap();
            let size = content.len() as u64;
            let kind = EntryKind::File { blob, size, executable: false };
            let tree = Tree::new(vec![Entry { path, kind }]).unwrap();
            (store.put_bytes(&tree.encode().unwrap()).unwrap(), blob)
        };
        let job = JobId([9; 32]);
        let kinds = [
            Kind::Input(job),
            Kind::InputOfFinished(job),
            Kind::Result(job),
            Kind::Saved(job),
            Kind::Wanted(job),
            Kind::Left(job),
            Kind::Copy(job),
            Kind::Pushed,
        ];
        let named: Vec<(Root, BlobId)> = kinds
            .into_iter()
            .map(|kind| {
                let (tree, blob) = make(&kind.describe().repeat(1 + kind.job().map_or(0, |_| 1)));
                (Root { tree, kind }, blob)
            })
            .collect();
        let (tree, blob) = make("of nobody");
        // Until nobody relies on the last of them any more.
        let young = |id: &BlobId| {
            let age = fs::metadata(store.path_of(id)).unwrap().modified().unwrap().elapsed();
            age.unwrap_or_default() < std::time::Duration::from_millis(3)
        };
        while young(&tree) {
            std::thread::yield_now();
        }
        let mut reach = Reach::begin(&store);
        named.iter().for_each(|(root, _)| reach.add_tree(root.tree));
        let is_there = |id: &BlobId| store.path_of(id).exists();
        // The sweep takes what was relied on before it began.
        store.sweep(&reach).unwrap();
        for (root, blob) in &named {
            assert!(is_there(&root.tree) && is_there(blob), "{:?}", root.kind);
        }
        assert!(!is_there(&tree) && !is_there(&blob));
    }
}
