//! Ranks on a store in a temporary directory, mostly without processes.

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt as _, symlink},
};

use p2pit_protocol::{
    HoldId, JobId, PoolId, StoreId,
    identity::{Domain, KeyPair, SignedBytes},
    inventory::GpuUuid,
    job::{Attempt, Command, Continued, Grace, JobSpec, LOST_AFTER_MS, Policy, Rank, Source},
    request::Grant,
};

use super::*;
use crate::{
    executor::{Ending, Executor, ProcessEvent, ProcessId, SupervisorCommand},
    transfer::{
        TreePath,
        ingest::Seen,
        tree::{Entry, Kind},
    },
};

#[test]
fn a_rank_finds_its_code_and_leaves_what_it_kept_and_nothing_else() {
    let node = Node::new();
    let spec = node.spec(|spec| spec.artifacts = vec!["./out/".into(), "never".into()]);
    let rank = node.rank(&spec, 0);
    let port = rank.prepare();
    assert!(port > 0);
    assert_eq!(rank.read("src/.compute"), "#!/bin/sh\necho hi\n");
    let mode = |path: &str| fs::metadata(rank.at(path)).unwrap().mode();
    assert_eq!(mode("src/.compute") & 0o777, 0o755);
    for dir in ["src", "keep", "tmp", "tmp/home", "artifacts"] {
        assert_eq!(fs::metadata(rank.at(dir)).unwrap().uid(), rank.workspace.uid(), "{dir}");
    }
    assert_eq!(node.live(&rank, &spec), LiveFiles::default());

    rank.write("keep/checkpoint", "half");
    assert!(node.live(&rank, &spec).keep.is_some());
    rank.write("keep/checkpoint", "whole");
    rank.write("src/out/plot.png", "dots");
    rank.write("src/elsewhere", "not asked for");
    rank.write("artifacts/table.csv", "1,2");
    rank.write("tmp/result", "loss 0.1 \u{FFFD}\n\n");
    rank.write("tmp/scratch/deep/file", "x");

    let collected = rank.workspace.collect(&node.store, &spec);
    assert_eq!(node.files(collected.keep), [("checkpoint".into(), "whole".into())].into());
    let artifacts =
        [("out/plot.png", "dots"), ("table.csv", "1,2")].map(|(p, c)| (p.into(), c.into()));
    assert_eq!(node.files(collected.artifacts), artifacts.into());
    assert_eq!(collected.result.as_deref(), Some("loss 0.1 \u{FFFD}"));
    assert_eq!(collected.note.as_deref(), Some("not kept of artifacts: `never` (not found)"));

    rank.workspace.clean().unwrap();
    assert_eq!(rank.names(), ["collected.json", "log"]);
    rank.workspace.clean().unwrap();
    // A daemon that crashed before it said so asks again.
    assert_eq!(rank.workspace.collect(&node.store, &spec), collected);
    let log = rank.read("log");
    let speakers: Vec<&str> =
        log.lines().map(|line| line.split(['[', ']']).nth(3).unwrap()).collect();
    assert_eq!(speakers, ["prepare", "prepare", "prepare", "clean", "clean", "clean"], "{log}");
    assert!(log.contains("code: 1 files, 18 bytes, in src/"), "{log}");
}

#[test]
fn a_rank_that_left_nothing_leaves_no_trees_and_no_note() {
    let node = Node::new();
    let spec = node.spec(|_| {});
    let rank = node.rank(&spec, 0);
    rank.prepare();
    assert_eq!(rank.workspace.collect(&node.store, &spec), Collected::default());
}

#[test]
fn what_a_rank_keeps_is_taken_while_it_runs_and_the_next_attempt_begins_with_it() {
    let node = Node::new();
    let keep = node.tree(&[("base", b"b", false)]);
    let before = JobId::of(b"before");
    let spec = node.spec(|spec| spec.continues = Some(Continued { job: before, keep }));
    let rank = node.rank(&spec, 0);
    rank.prepare();
    assert_eq!(rank.read("keep/base"), "b");
    let mut seen = Seen::default();
    let mut save = |at_ms| rank.workspace.save(&node.store, &mut seen, at_ms).unwrap();
    let Saving::New(first, None) = save(1_000) else { panic!("what it began with is news") };
    assert_eq!((first.seq, first.at_ms), (1, 1_000));
    assert_eq!(save(2_000), Saving::Unchanged);
    rank.write("keep/checkpoint", "step 1");
    let Saving::New(second, None) = save(3_000) else { panic!("it changed") };
    assert_eq!((second.seq, rank.workspace.saved()), (2, Some(second)));

    // A daemon that starts again remembers nothing but what is on its disk.
    seen = Seen::default();
    assert_eq!(rank.workspace.save(&node.store, &mut seen, 4_000).unwrap(), Saving::Unchanged);
    rank.workspace.clean().unwrap();
    assert_eq!(rank.workspace.saved(), Some(second), "of a rank that is over, too");
    assert_eq!(rank.workspace.save(&node.store, &mut seen, 5_000).unwrap(), Saving::Unchanged);

    let resumed = Resumed { keep: Some(second.tree), notes: vec!["keep/ is of attempt 1".into()] };
    let (store, assignment) = (&node.store, &rank.assignment);
    rank.workspace.prepare(store, &rank.spec, assignment, Some(&resumed)).unwrap();
    assert_eq!(
        (rank.read("keep/base"), rank.read("keep/checkpoint")),
        ("b".into(), "step 1".into())
    );
    assert!(rank.read("log").contains("[prepare] keep/ is of attempt 1"), "{}", rank.read("log"));
    // Where nothing of an earlier attempt is to be had, it begins as the first did.
    let resumed = Resumed { keep: None, notes: vec!["it cannot be had".into()] };
    rank.workspace.prepare(store, &rank.spec, assignment, Some(&resumed)).unwrap();
    assert_eq!(fs::read_dir(rank.at("keep")).unwrap().count(), 1);
}

#[test]
fn a_rank_that_never_kept_anything_has_no_save() {
    let node = Node::new();
    let rank = node.rank(&node.spec(|_| {}), 0);
    rank.prepare();
    let mut seen = Seen::default();
    assert_eq!(rank.workspace.save(&node.store, &mut seen, 1).unwrap(), Saving::Unchanged);
    assert_eq!(rank.workspace.saved(), None);
    rank.write("keep/x", "1");
    assert!(matches!(rank.workspace.save(&node.store, &mut seen, 2), Ok(Saving::New(..))));
    // That it was removed is a change like any other.
    fs::remove_file(rank.at("keep/x")).unwrap();
    assert!(matches!(rank.workspace.save(&node.store, &mut seen, 3), Ok(Saving::New(..))));
}

#[test]
fn the_environment_says_who_the_others_are_and_what_the_process_has() {
    let node = Node::new();
    let spec = node.spec(|spec| {
        spec.request = "2:[],[2:v100]".parse().unwrap();
        spec.env = [
            ("LEARNING_RATE", "0.1"),
            ("HOME", "/somewhere"),
            ("CUDA_VISIBLE_DEVICES", "0"),
            ("MASTER_PORT", "29500"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into();
    });
    let [a, b] = [peer(1), peer(2)];
    let rank = node.rank(&spec, 2);
    let grant = Grant {
        gpus: vec![GpuUuid("GPU-b".into()), GpuUuid("SIM-a".into())],
        cpu_cores: 2,
        ram_mib: 0,
    };
    let assignment =
        RankAssignment { group: 1, process: 0, grant, node: a, ..rank.assignment.clone() };
    let hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.1"].map(String::from);
    let gang = Gang { nodes: &[a, b, a], hosts: &hosts, port: 4711 };
    let names = Names { username: "anna".into() };
    let process = rank.workspace.process_spec(&spec, &assignment, &gang, &names, &node.policy());

    let dir = rank.workspace.dir().display().to_string();
    let data = node.dir.path().join("data").display().to_string();
    let user = spec.spec.owner;
    let job = spec.job;
    let number = u32::from_be_bytes(job.0[..4].try_into().unwrap());
    let expected = format!(
        "CUDA_DEVICE_ORDER=PCI_BUS_ID
         CUDA_VISIBLE_DEVICES=GPU-b,SIM-a
         DATA_ROOT={data}
         GROUP_INDEX=1
         HOME=/somewhere
         HOST_GROUP0_PROCESS0=10.0.0.1
         HOST_GROUP0_PROCESS1=10.0.0.2
         HOST_GROUP1_PROCESS0=10.0.0.1
         JOB_DIR={dir}
         JOB_ID={job}
         JOB_NUMBER={number}
         LEARNING_RATE=0.1
         LOCAL_RANK=1
         LOCAL_WORLD_SIZE=2
         LOGNAME=anna
         MASTER_ADDR=10.0.0.1
         MASTER_PORT=4711
         NODE_RANK=0
         NUM_GROUPS=2
         NUM_PROCESSES_GROUP0=2
         NUM_PROCESSES_GROUP1=1
         NVIDIA_VISIBLE_DEVICES=GPU-b,SIM-a
         PROCESS_INDEX=0
         RANK=2
         RESULT_FILE={dir}/tmp/result
         SHARED_DIR={data}/shared
         SRC_DIR={dir}/src
         USER=anna
         USER_DIR={data}/users/{user}
         WORKER_INDEX=2
         WORK_DIR={dir}/src
         WORLD_SIZE=3"
    );
    let env: Vec<String> = process.env.iter().map(|(n, v)| format!("{n}={v}")).collect();
    let expected: Vec<&str> = expected.lines().map(str::trim).collect();
    assert_eq!(env, expected);

    rank.prepare();
    let log = rank.read("log");
    for refused in ["CUDA_VISIBLE_DEVICES", "MASTER_PORT"] {
        assert!(log.contains(&format!("{refused} is set by the pool")), "{log}");
    }
    assert!(!log.contains("HOME is set"), "{log}");

    let none = RankAssignment { grant: Grant::default(), ..assignment };
    let bare = Gang::default();
    let env = rank.workspace.process_spec(&spec, &none, &bare, &names, &node.policy()).env;
    assert_eq!(env["CUDA_VISIBLE_DEVICES"], "");
    assert_eq!(env["NVIDIA_VISIBLE_DEVICES"], "void");
}

#[test]
fn preparing_again_begins_anew_with_the_same_port() {
    let node = Node::new();
    let spec = node.spec(|_| {});
    let rank = node.rank(&spec, 0);
    let port = rank.prepare();
    rank.write("src/left", "by a crash");
    rank.write("keep/left", "");
    // As after a restart of the daemon, which knows nothing of reservations.
    super::port::release(rank.workspace.dir());
    assert_eq!(rank.prepare(), port);
    assert!(!rank.at("src/left").exists() && !rank.at("keep/left").exists());
    let other = node.rank(&spec, 1);
    assert_ne!(other.prepare(), port);
    rank.workspace.discard().unwrap();
    assert_eq!(rank.names(), ["log"]);
    rank.workspace.discard().unwrap();
    node.rank(&spec, 7).workspace.discard().unwrap();
}

#[test]
fn a_continued_job_finds_what_the_other_kept() {
    let node = Node::new();
    let keep = node.tree(&[("model/weights", b"w", false)]);
    let before = JobId::of(b"before");
    let spec = node.spec(|spec| spec.continues = Some(Continued { job: before, keep }));
    let rank = node.rank(&spec, 0);
    rank.prepare();
    assert_eq!(rank.read("keep/model/weights"), "w");
    let uid = fs::metadata(rank.at("keep/model/weights")).unwrap().uid();
    assert_eq!(uid, rank.workspace.uid());
    let collected = rank.workspace.collect(&node.store, &spec);
    assert_eq!(collected.keep, Some(keep));
    assert!(rank.read("log").contains(&before.to_string()));
}

#[test]
fn missing_inputs_are_named() {
    let node = Node::new();
    let spec = node.spec(|spec| spec.code = BlobId::of(b"nowhere"));
    let error = node.rank(&spec, 0).try_prepare().unwrap_err();
    assert!(matches!(error, PrepareError::Missing { input: "code", .. }), "{error:?}");
    let spec = node.spec(|spec| spec.code = node.store.put_bytes(b"no manifest").unwrap());
    let error = node.rank(&spec, 0).try_prepare().unwrap_err();
    assert!(matches!(error, PrepareError::Manifest { input: "code", .. }), "{error:?}");
}

#[test]
fn a_script_is_made_to_run_or_refused_with_the_reason() {
    let node = Node::new();
    let run = |script: &[u8], executable| {
        let code = node.tree(&[(script::NAME, script, executable)]);
        let spec = node.spec(|spec| spec.code = code);
        let rank = node.rank(&spec, 0);
        rank.try_prepare().map(|_| {
            let text = fs::read(rank.at("src/.compute")).unwrap();
            let log = rank.read("log");
            (text, log)
        })
    };
    let (text, log) = run(b"echo plain\n", false).unwrap();
    assert_eq!(text, b"echo plain\n");
    assert!(log.contains("no `#!` line: bash runs it"), "{log}");

    let (text, log) = run(b"#!/bin/sh\r\necho a\r\necho b\r\n", true).unwrap();
    assert_eq!(text, b"#!/bin/sh\necho a\necho b\n");
    assert!(log.contains("Windows line endings: it runs"), "{log}");

    let mixed: &[u8] = b"#!/bin/sh\r\nprintf 'a\rb'\n";
    let (text, log) = run(mixed, true).unwrap();
    assert_eq!(text, mixed);
    assert!(log.contains("they stay"), "{log}");

    let (_, log) = run(b"\x7fELF...", true).unwrap();
    assert!(!log.contains("bash"), "{log}");

    let error = run(b"#!/opt/nowhere/python\nprint()\n", true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`.compute` asks for `/opt/nowhere/python`, which is not on this node"
    );

    let without = node.spec(|spec| spec.code = node.tree(&[("main.py", b"", false)]));
    let error = node.rank(&without, 0).try_prepare().unwrap_err();
    assert!(matches!(error, PrepareError::Script(ScriptError::Missing)), "{error:?}");
    let dir = node.spec(|spec| spec.code = node.tree(&[(".compute/main.py", b"", false)]));
    let error = node.rank(&dir, 0).try_prepare().unwrap_err();
    assert!(matches!(error, PrepareError::Script(ScriptError::NotAFile)), "{error:?}");
    let direct = node.spec(|spec| {
        spec.code = node.tree(&[("main.py", b"", false)]);
        spec.command = Command::Direct("true".into());
    });
    node.rank(&direct, 0).prepare();
}

#[test]
fn links_to_the_outside_bring_nothing_in() {
    let node = Node::new();
    let secret = node.dir.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "private").unwrap();
    let spec = node.spec(|spec| spec.artifacts = vec!["out/key".into(), "key".into()]);
    let rank = node.rank(&spec, 0);
    rank.prepare();
    symlink(&secret, rank.at("keep/dir")).unwrap();
    symlink(&secret, rank.at("src/out")).unwrap();
    symlink(secret.join("key"), rank.at("src/key")).unwrap();
    symlink(secret.join("key"), rank.at("tmp/result")).unwrap();
    let collected = rank.workspace.collect(&node.store, &spec);
    assert!(!node.store.has(&BlobId::of(b"private")));
    assert_eq!(collected.result, None);
    let note = collected.note.unwrap();
    assert!(note.contains("`out/key`") && note.contains("result file"), "{note}");
    rank.workspace.clean().unwrap();
    assert_eq!(fs::read(secret.join("key")).unwrap(), b"private");

    // Where a job shares the daemon's user, even its directories may be links.
    let rank = node.rank(&spec, 1);
    rank.prepare();
    for name in ["keep", "artifacts"] {
        fs::remove_dir(rank.at(name)).unwrap();
        symlink(&secret, rank.at(name)).unwrap();
    }
    assert!(rank.workspace.live_files(&node.store, &spec).is_err());
    let collected = rank.workspace.collect(&node.store, &spec);
    assert_eq!((collected.keep, collected.artifacts), (None, None));
    assert!(!node.store.has(&BlobId::of(b"private")));
    rank.workspace.discard().unwrap();
    assert_eq!(fs::read(secret.join("key")).unwrap(), b"private");
}

#[test]
fn files_of_others_and_special_files_are_noted_and_a_long_note_is_cut() {
    let node = Node::new();
    let spec = node.spec(|_| {});
    let rank = node.rank(&spec, 0);
    rank.prepare();
    rank.write("keep/mine", "m");
    let sockets: Vec<_> = (0..7)
        .map(|i| std::os::unix::net::UnixListener::bind(rank.at(&format!("keep/s{i}"))).unwrap())
        .collect();
    let collected = rank.workspace.collect(&node.store, &spec);
    drop(sockets);
    assert_eq!(node.files(collected.keep).len(), 1);
    let note = collected.note.unwrap();
    assert_eq!(note.matches("(a socket)").count(), 5);
    assert!(note.ends_with("2 more"), "{note}");

    let spec = node.spec(|spec| {
        spec.artifacts = (0..256).map(|i| format!("{i}/{}", "x".repeat(250))).collect();
    });
    let rank = node.rank(&spec, 0);
    rank.prepare();
    assert!(rank.workspace.collect(&node.store, &spec).note.unwrap().len() <= 1024);
}

#[test]
fn what_is_put_into_artifacts_wins_over_the_same_path_below_src() {
    let node = Node::new();
    let spec = node.spec(|spec| spec.artifacts = vec!["out".into(), "file".into()]);
    let rank = node.rank(&spec, 0);
    rank.prepare();
    for (path, content) in [
        ("src/out/a", "src"),
        ("src/out/b", "src"),
        ("src/file/inner", "src"),
        ("artifacts/out/a", "put"),
        ("artifacts/file", "put"),
    ] {
        rank.write(path, content);
    }
    let collected = rank.workspace.collect(&node.store, &spec);
    let expected = [("file", "put"), ("out/a", "put"), ("out/b", "src")];
    assert_eq!(node.files(collected.artifacts), expected.map(|(p, c)| (p.into(), c.into())).into());
    assert!(collected.note.unwrap().starts_with("2 artifacts, such as `file/inner`"));
}

#[test]
fn what_cannot_be_kept_is_set_aside_and_survives_the_cleaning() {
    let node = Node::new();
    let spec = node.spec(|_| {});
    let rank = node.rank(&spec, 0);
    rank.prepare();
    rank.write("keep/model", "precious");
    // A file with a hole that is larger than any disk.
    let hole = fs::File::create(rank.at("keep/hole")).unwrap();
    if hole.set_len(1 << 62).is_err() {
        println!("skipped: this file system has no such files");
        return;
    }
    drop(hole);
    rank.own();
    let collected = rank.workspace.collect(&node.store, &spec);
    assert_eq!(collected.keep, None);
    let note = collected.note.unwrap();
    assert!(note.contains("keep could not be kept") && note.contains(".unsaved"), "{note}");
    rank.workspace.clean().unwrap();
    assert_eq!(rank.names(), ["collected.json", "keep.unsaved", "log"]);
    assert_eq!(rank.read("keep.unsaved/model"), "precious");

    // Another try, once what was in the way is gone.
    fs::remove_file(rank.at("keep.unsaved/hole")).unwrap();
    fs::remove_file(rank.at("collected.json")).unwrap();
    let collected = rank.workspace.collect(&node.store, &spec);
    assert_eq!(node.files(collected.keep).len(), 1);
}

#[tokio::test]
async fn a_process_finds_itself_in_its_directories() {
    let node = Node::new();
    let code = node.tree(&[("data.txt", b"input", false)]);
    let script = r#"
        set -e
        test "$PWD" = "$SRC_DIR"; test "$PWD" = "$WORK_DIR"; test "$(cat data.txt)" = input
        cp data.txt ../keep/; echo plot > "$JOB_DIR/artifacts/plot"; mkdir out; echo o > out/o
        echo x > ../tmp/x; echo y > "$TMPDIR/y"; echo z > ~/z; test "$HOME" = "$JOB_DIR/tmp/home"
        echo "of $USER" > "$USER_DIR/note"; test -d "$DATA_ROOT/shared"
        ! touch "$SHARED_DIR/x" 2>/dev/null || test "$(id -u)" = "$DAEMON_UID"
        ! (echo fake >> ../log) 2>/dev/null || test "$(id -u)" = "$DAEMON_UID"
        echo 42 > "$RESULT_FILE"; chmod 0 ../tmp/home
        echo "rank $RANK of $WORLD_SIZE"
    "#;
    let spec = node.spec(|spec| {
        spec.code = code;
        spec.command = Command::Direct(script.into());
        spec.artifacts = vec!["out".into()];
        let daemon = rustix::process::geteuid().as_raw().to_string();
        spec.env = [("DAEMON_UID".into(), daemon)].into();
    });
    let supervisor = SupervisorCommand {
        env: vec![("P2PIT_TEST_IS_SUPERVISOR".into(), "1".into())],
        ..SupervisorCommand::of_this_program().unwrap()
    };
    let executor = Executor::new(&node.dir.path().join("run"), supervisor).unwrap();
    let shared = Isolation::Shared { reason: "asked for by a test".into() };
    for (attempt, isolation) in [(1, executor.probe().await), (2, shared)] {
        let jobs_root = node.dir.path().join("jobs");
        admit_jobs(&jobs_root, &isolation).unwrap();
        let rank = node.rank_of(&spec, attempt, 0);
        rank.prepare();
        let gang = Gang { nodes: &[rank.assignment.node], hosts: &["::1".into()], port: 1 };
        let names = Names { username: "anna".into() };
        let policy = HostPolicy { isolation, hidden: vec![node.dir.path().to_owned()] };
        let process = rank.workspace.process_spec(&spec, &rank.assignment, &gang, &names, &policy);
        let id = ProcessId { job: spec.job.to_string(), attempt, rank: 0 };
        let mut running = executor.start(&id, process).await.unwrap();
        let mut ending = None;
        while let Some(event) = running.events.recv().await {
            if let ProcessEvent::Ended(ended) = event {
                ending = Some(ended.ending);
            }
        }
        let log = rank.read("log");
        assert_eq!(ending, Some(Ending::Exited { code: 0 }), "{policy:?} {log}");
        assert!(log.contains("[worker 0] rank 0 of 1"), "{log}");
        let collected = rank.workspace.collect(&node.store, &spec);
        assert_eq!(collected.note, None);
        assert_eq!(collected.result.as_deref(), Some("42"));
        assert_eq!(node.files(collected.keep)["data.txt"], "input");
        let artifacts = node.files(collected.artifacts);
        assert_eq!(artifacts.keys().collect::<Vec<_>>(), ["out/o", "plot"]);
        rank.workspace.clean().unwrap();
        assert_eq!(rank.names(), ["collected.json", "log"]);
    }
}

/// A home with a store.
struct Node {
    dir: tempfile::TempDir,
    store: BlobStore,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        fs::create_dir(dir.path().join("jobs")).unwrap();
        let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
        Self { dir, store }
    }

    fn tree(&self, files: &[(&str, &[u8], bool)]) -> BlobId {
        let entry = |(path, content, executable): &(&str, &[u8], bool)| {
            let blob = self.store.put_bytes(content).unwrap();
            let kind = Kind::File { blob, size: content.len() as u64, executable: *executable };
            Entry { path: TreePath::from_bytes(*path).unwrap(), kind }
        };
        let tree = Tree::new(files.iter().map(entry).collect()).unwrap();
        self.store.put_bytes(&tree.encode().unwrap()).unwrap()
    }

    /// The text files of a tree by path.
    fn files(&self, root: Option<BlobId>) -> BTreeMap<String, String> {
        let manifest = self.store.read(&root.unwrap(), MANIFEST_BYTES_MAX).unwrap();
        let tree = Tree::decode(&manifest).unwrap();
        let file = |entry: &Entry| {
            let Kind::File { blob, size, .. } = &entry.kind else { return None };
            let content = self.store.read(blob, usize::try_from(*size).unwrap()).unwrap();
            Some((entry.path.to_string(), String::from_utf8(content).unwrap()))
        };
        tree.entries().iter().filter_map(file).collect()
    }

    fn spec(&self, change: impl FnOnce(&mut JobSpec)) -> VerifiedSpec {
        let key = KeyPair::from_seed(&[7; 32]);
        let mut spec = JobSpec {
            pool: PoolId([1; 32]),
            owner: UserId(key.public()),
            title: "test".into(),
            request: "[]".parse().unwrap(),
            command: Command::Script,
            code: self.tree(&[(script::NAME, b"#!/bin/sh\necho hi\n", true)]),
            code_bytes: 18,
            source: Source::default(),
            continues: None,
            artifacts: Vec::new(),
            env: BTreeMap::new(),
            private: false,
            time_limit_ms: None,
            grace: Grace::default(),
            retries: 0,
            policy: Policy::Continue,
            lost_after_ms: LOST_AFTER_MS,
            keep_every_ms: 0,
            nonce: [3; 16],
            submitted_at_ms: 0,
            keepers: vec![(peer(1), StoreId([0; 16]))],
        };
        change(&mut spec);
        VerifiedSpec::verify(SignedBytes::sign(&key, Domain::JobSpec, spec.to_bytes())).unwrap()
    }

    fn rank(&self, spec: &VerifiedSpec, rank: u32) -> TestRank<'_> {
        self.rank_of(spec, 1, rank)
    }

    fn rank_of(&self, spec: &VerifiedSpec, attempt: u32, rank: u32) -> TestRank<'_> {
        let (attempt, rank) = (Attempt(attempt), Rank(rank));
        let id = WorkId { job: spec.job, attempt, rank };
        TestRank {
            node: self,
            spec: spec.clone(),
            workspace: Workspace::at(&self.dir.path().join("jobs"), id),
            assignment: RankAssignment {
                rank,
                group: 0,
                process: rank.0,
                node: peer(1),
                hold: HoldId([0; 16]),
                grant: Grant::default(),
            },
        }
    }

    fn live(&self, rank: &TestRank<'_>, spec: &VerifiedSpec) -> LiveFiles {
        rank.workspace.live_files(&self.store, spec).unwrap()
    }

    fn policy(&self) -> HostPolicy {
        let isolation = Isolation::Shared { reason: "asked for by a test".into() };
        HostPolicy { isolation, hidden: vec![self.dir.path().to_owned()] }
    }
}

struct TestRank<'a> {
    node: &'a Node,
    spec: VerifiedSpec,
    workspace: Workspace,
    assignment: RankAssignment,
}

impl TestRank<'_> {
    fn try_prepare(&self) -> Result<Prepared, PrepareError> {
        self.workspace.prepare(&self.node.store, &self.spec, &self.assignment, None)
    }

    fn prepare(&self) -> u16 {
        self.try_prepare().unwrap().port
    }

    fn at(&self, path: &str) -> PathBuf {
        self.workspace.dir().join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    /// As the job's user.
    fn write(&self, path: &str, content: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self.own();
    }

    fn own(&self) {
        let dirs = OF_JOB.map(|name| self.at(name));
        prepare_ownership(dirs, self.workspace.run_as).unwrap();
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.workspace.dir()).unwrap();
        let mut names: Vec<String> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn peer(seed: u8) -> PeerId {
    PeerId(KeyPair::from_seed(&[seed; 32]).public())
}
