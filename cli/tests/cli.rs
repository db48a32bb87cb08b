//! What the built command does where no daemon is needed.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A directory to work in, with a home and a key that nobody else has.
struct Place {
    dir: TempDir,
}

#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_p2pit"));
        command
            .args(args)
            .current_dir(self.path())
            .env_clear()
            .env("HOME", self.path())
            .env("P2PIT_HOME", self.path().join("home"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ended {
        Ended::of(self.command(args).output().unwrap())
    }
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
impl Ended {
    fn of(Output { status, stdout, stderr }: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
    }

    /// Nothing on standard output, and these parts on standard error, in this order.
    #[track_caller]
    fn failed_with(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        let mut rest = self.stderr.as_str();
        for part in parts {
            let Some(at) = rest.find(part) else { panic!("{part:?} is not in {}", self.stderr) };
            rest = &rest[at + part.len()..];
        }
    }
}

const COMMANDS: [&str; 15] = [
    "join",
    "leave",
    "invite",
    "run",
    "log",
    "status",
    "show",
    "why",
    "stop",
    "ls",
    "cp",
    "download",
    "demo",
    "completion",
    "daemon",
];

#[test]
fn every_command_explains_itself_with_examples() {
    let place = Place::new();
    let overview = place.run(&["--help"]);
    assert_eq!(overview.code, Some(0));
    assert_eq!(overview.stderr, "");
    for command in COMMANDS {
        assert!(overview.stdout.contains(&format!("\n  {command} ")), "{command}");
        let help = place.run(&[command, "--help"]);
        assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""), "{command}");
        assert!(help.stdout.contains("Example"), "{}", help.stdout);
        assert!(help.stdout.contains("Usage: p2pit"), "{}", help.stdout);
    }
}

#[test]
fn the_version_is_said() {
    let version = Place::new().run(&["--version"]);
    assert_eq!(version.stdout, format!("p2pit {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn bad_usage_is_told_on_standard_error_and_changes_nothing() {
    let place = Place::new();
    for line in [
        &["fly"][..],
        &[],
        &["run"],
        &["stop"],
        &["show", "everything"],
        &["join", "--gpus", "many"],
        &["join", "--listen", "here"],
        &["run", "t", "--time", "soon"],
        &["run", "t", "--retries", "101"],
        &["run", "t", "--retries", "-1"],
        &["run", "t", "--on-partition", "wait"],
        &["run", "t", "--lost-after", "1min"],
        &["run", "t", "--env", "NAME"],
        &["run", "t", "--env", "A B=1"],
        &["run", ""],
        &["run", "t", "-l", "--json"],
        &["invite", "--uses", "0"],
        &["completion", "cobol"],
    ] {
        let said = if line.is_empty() { "Usage: p2pit" } else { "error: " };
        place.run(line).failed_with(1, &[said]);
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn without_a_pool_a_command_says_how_to_get_into_one() {
    let place = Place::new();
    for line in [
        &["status"][..],
        &["show", "me"],
        &["stop", "abcd"],
        &["log", "@last"],
        &["invite"],
        &["leave"],
        &["run", "t", "-d", "true"],
        &["daemon", "--stop"],
    ] {
        place.run(line).failed_with(1, &["error: the home ", "in no pool", "hint: ", "p2pit join"]);
    }
    assert!(!place.path().join("home").exists(), "nothing is made by asking");
}

#[test]
fn a_home_that_cannot_be_one_is_named() {
    let place = Place::new();
    let file = place.path().join("file");
    fs::write(&file, "x").unwrap();
    let inside = file.join("home");
    let ended = place.run(&["--home", inside.to_str().unwrap(), "join", "--no-mdns"]);
    ended.failed_with(1, &["error: ", "is not a directory", "hint: ", "--home"]);
    // Nobody can make a directory there, not even root.
    let ended = place.run(&["--home", "/proc/p2pit", "join", "--no-mdns"]);
    ended.failed_with(2, &["error: ", "/proc/p2pit"]);
    let foreign = place.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), "x").unwrap();
    let ended = place.run(&["--home", foreign.to_str().unwrap(), "join", "--no-mdns"]);
    ended.failed_with(1, &["error: ", "thesis.tex", "hint: "]);
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
}

#[test]
fn a_damaged_ticket_is_refused_before_anything_is_made() {
    let place = Place::new();
    for (ticket, reason) in
        [("hello", "not a ticket"), ("pit1abcdefgh", "damaged"), ("pit9abcdefgh", "newer p2pit")]
    {
        place.run(&["join", ticket]).failed_with(1, &["error: ", reason]);
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn a_request_that_cannot_be_read_is_shown_with_a_caret() {
    let place = Place::new();
    let ended = place.run(&["run", "My task", "2:[v100", "-d", "true"]);
    let excerpt = "\n  2:[v100\n         ^ expected `,`, `>=` or `]`, found the end\n";
    ended.failed_with(1, &["error: the request cannot be understood\n", excerpt, "\nhint: "]);
    fs::write(place.path().join(".pitrequest.txt"), "2:[]\n3:[]").unwrap();
    let ended = place.run(&["run", "My task", "-d", "true"]);
    let place = "/.pitrequest.txt:2:1: the request cannot be understood\n";
    ended.failed_with(1, &["error: ", place, "\n  3:[]\n  ^ "]);
}

#[test]
fn completions_come_for_every_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.run(&["completion", shell]);
        assert_eq!((script.code, script.stderr.as_str()), (Some(0), ""));
        for word in ["download", "on-partition", "lost-after", "restart"] {
            assert!(script.stdout.contains(word), "{word} for {shell}");
        }
    }
}

#[test]
fn a_reader_who_goes_away_is_no_failure() {
    let place = Place::new();
    let mut child = place
        .command(&["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = Ended::of(child.wait_with_output().unwrap());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn colour_is_said_only_where_it_is_asked_for() {
    let place = Place::new();
    let coloured = |args: &[&str]| place.run(args).stderr.contains('\x1b');
    assert!(!coloured(&["status"]), "no terminal");
    assert!(coloured(&["--color", "always", "status"]));
    assert!(!coloured(&["--color", "never", "status"]));
}

#[test]
fn a_supervisor_without_a_run_directory_ends_at_once() {
    let place = Place::new();
    let missing = place.path().join("run");
    let ended = place.run(&["supervise", missing.to_str().unwrap()]);
    assert!(ended.code.is_some_and(|code| code != 0), "{ended:?}");
    assert_eq!(ended.stdout, "");
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let place = Place::new();
    let home = place.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::File::create(home.join("config.yaml")).unwrap().write_all(b"cpu: 3\n").unwrap();
    let ended = place.run(&["join", "--no-mdns"]);
    ended.failed_with(1, &["error: ", "config.yaml", "unknown field `cpu`"]);
}
