//! Directories that are not as one would wish: what is submitted of them, what is refused,
//! and that nothing half done stays.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, MetadataExt as _, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use p2pit_tests::{Node, Pool, lines_of, wait_until};

#[test]
fn links_are_kept_as_links_and_never_followed() {
    let pool = Pool::of(&["sim:1xv100"]);
    let secret = pool.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("file"), "do not take this along").unwrap();
    let script = "#!/bin/bash\n\
                  readlink file dir gone\n\
                  ln -s /etc/passwd \"$JOB_DIR/keep/passwd\"\n\
                  ln -s .. \"$JOB_DIR/keep/up\"\n";
    let dir = pool.job_dir("links", &[(".compute", script), ("real", "r")]);
    symlink(secret.join("file"), dir.join("file")).unwrap();
    symlink(&secret, dir.join("dir")).unwrap();
    symlink("../nowhere", dir.join("gone")).unwrap();

    let node = pool.node(1).working_in(&dir);
    let log = node.p2pit(&["run", "Links", "[v100]", "-l"]).ok();
    let secret_file = secret.join("file").display().to_string();
    let secret = secret.display().to_string();
    assert_eq!(lines_of(&log, 0), [&secret_file, &secret, "../nowhere"]);
    assert!(!holds(node.home(), b"do not take this along"));

    node.p2pit(&["cp", "@last", "keep", "back"]).ended(0);
    assert_eq!(fs::read_link(dir.join("back/passwd")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read_link(dir.join("back/up")).unwrap(), Path::new(".."));
    assert!(!holds(node.home(), &fs::read("/etc/passwd").unwrap()));
}

#[test]
fn names_that_are_no_text_come_back_as_they_went() {
    let pool = Pool::of(&["sim:1xv100"]);
    let script = "#!/bin/bash\nmkdir \"$JOB_DIR/keep/d\"; cp -r -- *odd* \"$JOB_DIR/keep/d/\"\n";
    let dir = pool.job_dir("names", &[(".compute", script)]);
    let names: [&[u8]; 5] =
        [b"odd caf\xe9", b"odd\nline", b"odd \"q' $(x)", b"-odd", b"odd\x01\xff"];
    for name in names {
        fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let node = pool.node(1).working_in(&dir);
    node.p2pit(&["run", "Names", "[v100]", "-l"]).ended(0);
    assert_eq!(node.json(&["ls", "@last", "keep/d"]).as_array().unwrap().len(), names.len());

    let back = pool.job_dir("back", &[]);
    let node = node.working_in(&back);
    node.p2pit(&["cp", "@last", "keep/d", "all"]).ended(0);
    for name in names {
        let name = OsStr::from_bytes(name);
        assert_eq!(fs::read(back.join("all").join(name)).unwrap(), name.as_bytes());
    }
    let mut one = node.command();
    one.args(["cp", "@last"]).arg(OsStr::from_bytes(b"keep/d/odd caf\xe9")).arg("one");
    assert!(one.status().unwrap().success());
    assert_eq!(fs::read(back.join("one")).unwrap(), b"odd caf\xe9");
}

#[test]
fn what_is_no_file_is_refused_by_name() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("special", &[("sub/.keep", "")]);
    let node = pool.node(1).working_in(&dir);
    let at = dir.join("sub/thing");
    let refused = |what: &str| {
        let run = node.p2pit(&["run", "Special", "[v100]", "-d", "true"]);
        run.refused(1, &["sub/thing", what, "hint: ", ".pitignore"]);
        fs::remove_file(&at).unwrap();
    };
    let _socket = UnixListener::bind(&at).unwrap();
    refused("socket");
    assert!(Command::new("mkfifo").arg(&at).status().unwrap().success());
    refused("named pipe");
    if p2pit_tests::is_root() {
        assert!(Command::new("mknod").arg(&at).args(["c", "1", "7"]).status().unwrap().success());
        refused("character device");
        assert!(Command::new("mknod").arg(&at).args(["b", "7", "250"]).status().unwrap().success());
        refused("block device");
    }
    assert!(Command::new("mkfifo").arg(&at).status().unwrap().success());
    fs::write(dir.join(".pitignore"), "thing\n").unwrap();
    node.p2pit(&["run", "Special", "[v100]", "-d", "test ! -e sub/thing", "-l"]).ended(0);
    assert_eq!(node.json(&["show", "jobs"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_named() {
    let pool = Pool::of(&["sim:1xv100"]);
    // The kernel says of these files that they are empty, and then they are not.
    let node = pool.node(1).working_in(Path::new("/proc/sys/kernel/random"));
    let run = node.p2pit(&["run", "Changing", "[v100]", "-d", "true"]);
    run.refused(1, &["/proc/sys/kernel/random/", "keeps changing", "hint: ", ".pitignore"]);
    assert!(node.json(&["show", "jobs"]).as_array().unwrap().is_empty());
}

#[test]
fn a_script_that_cannot_run_is_refused_before_anything_is_sent() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("scripts", &[]);
    let node = pool.node(1).working_in(&dir);
    let run = || node.p2pit(&["run", "Script", "[v100]"]);
    run().refused(1, &["`.compute`", "hint: ", "-d"]);
    let elf = fs::read(std::env::current_exe().unwrap()).unwrap()[..64].to_vec();
    for (text, parts) in [
        (&b"echo a\r\necho b\n"[..], ["`.compute` has Windows line ends", "hint: ", "sed -i"]),
        (&elf, ["`.compute` is a program", "hint: ", "chmod +x"]),
        (b"PK\x03\x04\0", ["`.compute` is neither", "hint: ", "text"]),
    ] {
        fs::write(dir.join(".compute"), text).unwrap();
        run().refused(1, &parts);
    }
    fs::remove_file(dir.join(".compute")).unwrap();
    symlink("gone", dir.join(".compute")).unwrap();
    run().refused(1, &["`.compute` is a link to `gone`", "hint: "]);
    fs::remove_file(dir.join(".compute")).unwrap();
    fs::create_dir(dir.join(".compute")).unwrap();
    run().refused(1, &["`.compute` is not a file", "hint: "]);
    assert!(node.json(&["show", "jobs"]).as_array().unwrap().is_empty());
}

#[test]
fn a_script_runs_without_execute_bit_first_line_or_unix_line_ends() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("scripts", &[("bin/run", "echo linked\n")]);
    let node = pool.node(1).working_in(&dir);
    for (text, prints) in [
        ("echo $((1 + 1)) ${BASH_VERSION:+bash}\n", "2 bash"),
        ("#!/bin/sh\necho ${BASH_VERSION:-none}; echo ran\n", "ran"),
        ("#!/bin/sh\r\necho unix\r\n", "unix"),
    ] {
        fs::write(dir.join(".compute"), text).unwrap();
        let ran = node.p2pit(&["run", "Script", "[v100]", "-l"]);
        assert_eq!(ran.stderr.contains("Windows line ends"), text.contains('\r'), "{}", ran.stderr);
        assert_eq!(lines_of(&ran.ok(), 0).last(), Some(&prints));
    }
    fs::remove_file(dir.join(".compute")).unwrap();
    symlink("bin/run", dir.join(".compute")).unwrap();
    assert_eq!(lines_of(&node.p2pit(&["run", "Script", "[v100]", "-l"]).ok(), 0), ["linked"]);
}

#[test]
fn an_empty_directory_can_be_submitted() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("empty", &[]);
    let node = pool.node(1).working_in(&dir);
    let log = node.p2pit(&["run", "Empty", "[v100]", "-d", "ls -A | wc -l", "-l"]).ok();
    assert_eq!(lines_of(&log, 0), ["0"]);
}

#[test]
fn patterns_of_the_user_hold_wherever_git_looks_for_them() {
    if Command::new("git").arg("--version").output().is_err() {
        return;
    }
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("checkout", &[("a.py", ""), ("a.swp", ""), ("a.tmp", "")]);
    let init = Command::new("git").args(["init", "-q"]).current_dir(&dir).status();
    assert!(init.unwrap().success());
    let config = pool.job_dir("config", &[("git/ignore", "*.swp\n"), ("mine", "*.tmp\n")]);
    let node = pool.node(1).working_in(&dir);
    let files = |xdg: &Path| {
        let mut command = node.command();
        command.env("XDG_CONFIG_HOME", xdg);
        command.args(["run", "Plan", "[v100]", "-d", "true", "--dry-run", "--json"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        plan["files"].as_u64().unwrap()
    };
    assert_eq!(files(&pool.path().join("none")), 3);
    assert_eq!(files(&config), 2);
    let mine = config.join("mine").display().to_string();
    fs::write(config.join("git/config"), format!("[core]\nexcludesFile = {mine}\n")).unwrap();
    fs::write(dir.join("b.tmp"), "").unwrap();
    assert_eq!(files(&config), 2);
}

#[test]
fn a_second_submission_reads_only_what_changed() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("again", &[("old", "old"), ("new", "1")]);
    let node = pool.node(1).working_in(&dir);
    // Files count as settled some seconds after their last change; how many is not ours to
    // wait for, but that it happens is.
    let remembered = node.home().join("cache/hashes");
    let plan = || node.json(&["run", "Plan", "[v100]", "-d", "true", "--dry-run"]);
    wait_until("hashes are remembered", p2pit_tests::SOON, || {
        assert_eq!(plan()["files"], 2);
        fs::read_dir(&remembered).ok()?.next().map(|_| ())
    });
    let log = |text: &str| {
        fs::write(dir.join("new"), text).unwrap();
        node.p2pit(&["run", "Again", "[v100]", "-d", "cat old new", "-l"]).ok()
    };
    assert_eq!(lines_of(&log("2\n"), 0), ["old2"]);
    assert_eq!(lines_of(&log("3\n"), 0), ["old3"]);
}

#[test]
fn a_hundred_thousand_files_are_submitted_run_and_kept() {
    const FILES: usize = 100_000;
    let mut pool = Pool::in_memory();
    pool.add("n1", &["--gpus", "sim:1xv100"]);
    let client = pool.add_client("laptop");
    let dir = pool.job_dir("many", &[]);
    for n in 0..FILES {
        let sub = dir.join(format!("d{:02}", n % 100));
        if n < 100 {
            fs::create_dir(&sub).unwrap();
        }
        fs::write(sub.join(format!("f{n}")), n.to_string()).unwrap();
    }
    let client = client.working_in(&dir);
    let script = "find . -type f | wc -l; cat d42/f77742; mkdir $JOB_DIR/keep/d; \
                  cp -r d42 $JOB_DIR/keep/d/";
    let id = client.submit(&["Many", "[v100]", "-d", script]);
    wait_until_succeeded(&client, &id);
    assert_eq!(lines_of(&client.log(&id), 0), [&FILES.to_string(), "77742"]);
    assert_eq!(client.json(&["ls", &id, "keep/d/d42"]).as_array().unwrap().len(), FILES / 100);
}

#[test]
fn a_file_of_holes_travels_and_comes_back_as_holes() {
    const BYTES: u64 = 8 << 30;
    let mut pool = Pool::of(&["sim:1xv100"]);
    let client = pool.add_client("laptop");
    let dir = pool.job_dir("sparse", &[]);
    let file = File::create(dir.join("disk.img")).unwrap();
    file.set_len(BYTES).unwrap();
    file.write_all_at(b"middle", BYTES / 2).unwrap();
    let client = client.working_in(&dir);
    let script = format!(
        "test $(stat -c %s disk.img) = {BYTES}; dd status=none if=disk.img bs=1 skip={} count=6; \
         echo; cp --sparse=always disk.img $JOB_DIR/keep/",
        BYTES / 2
    );
    let id = client.submit(&["Sparse", "[v100]", "-d", &script]);
    wait_until_succeeded(&client, &id);
    assert_eq!(lines_of(&client.log(&id), 0), ["middle"]);
    client.p2pit(&["cp", &id, "keep/disk.img", "back.img"]).ended(0);
    let back = File::open(dir.join("back.img")).unwrap();
    let mut middle = [0; 6];
    back.read_exact_at(&mut middle, BYTES / 2).unwrap();
    assert_eq!((&middle, back.metadata().unwrap().len()), (b"middle", BYTES));
    // On every disk on the way.
    let on_disk: u64 = files_below(pool.path()).iter().map(|path| allocated(path)).sum();
    assert!(on_disk < 256 << 20, "{on_disk} bytes");
}

#[test]
fn a_damaged_blob_is_named_and_sent_again() {
    let pool = Pool::of(&["sim:1xv100"]);
    let dir = pool.job_dir("damage", &[("data", "precious content")]);
    let node = pool.node(1).working_in(&dir);
    let run = || node.p2pit(&["run", "Damage", "[v100]", "-d", "cat data", "-l"]);
    run().ended(0);
    let blob = blob_with(&node, b"precious content");
    fs::write(&blob, "damaged! content").unwrap();
    let failed = run();
    assert_ne!(failed.code, 0);
    let text = format!("{}{}", failed.stdout, failed.stderr);
    let name = blob.file_name().unwrap().to_str().unwrap();
    for part in ["src/data", name, "corrupt"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(lines_of(&run().ok(), 0), ["precious content"]);
}

/// However long the disk takes for it.
#[track_caller]
fn wait_until_succeeded(node: &Node, id: &str) {
    wait_until("the job is over", Duration::from_secs(600), || {
        (node.job(id)["state"] == "DONE").then_some(())
    });
    node.wait_for_outcome(id, "succeeded");
}

/// The file in the node's store with this content.
fn blob_with(node: &Node, content: &[u8]) -> PathBuf {
    let blobs = files_below(&node.home().join("blobs"));
    let found = blobs.into_iter().find(|path| fs::read(path).is_ok_and(|found| found == content));
    found.expect("the blob is in the store")
}

/// Whether any file below `dir` has `bytes` in it.
fn holds(dir: &Path, bytes: &[u8]) -> bool {
    files_below(dir).iter().any(|path| {
        let content = fs::read(path).unwrap_or_default();
        content.windows(bytes.len()).any(|window| window == bytes)
    })
}

fn allocated(path: &Path) -> u64 {
    path.symlink_metadata().map_or(0, |metadata| metadata.blocks() * 512)
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files_below(&entry.path())),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            Ok(_) | Err(_) => {}
        }
    }
    found
}
