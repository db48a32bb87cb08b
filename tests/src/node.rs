//! One node's home, and commands run for it.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use serde_json::Value;

use crate::{Ended, Process, Running, SOON, harness::Place, wait_until};

/// What daemons and commands write to their logs; a measurement sets it to less.
const LOG: &str = "P2PIT_LOG";
const LOG_OF_TESTS: &str = "info,p2pit_node=debug,p2pit_protocol=debug";

/// A home, the user whose commands are run for it, and where they are run.
#[derive(Debug, Clone)]
pub struct Node {
    name: String,
    home: PathBuf,
    identity: PathBuf,
    work: PathBuf,
    scratch: PathBuf,
    /// `None`: on this machine, as it is.
    place: Option<Arc<Place>>,
    program: PathBuf,
}

impl Node {
    /// A node of the pool in `dir`, whose user is the pool's first.
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            home: dir.join(name),
            identity: dir.join("identity"),
            work: dir.join("empty"),
            scratch: dir.join("output"),
            place: None,
            program: program(),
        }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home
    }

    #[must_use]
    pub fn identity(&self) -> &Path {
        &self.identity
    }

    /// The same home, used by the holder of another key.
    #[must_use]
    pub fn used_with(&self, identity: &Path) -> Self {
        Self { identity: identity.to_owned(), ..self.clone() }
    }

    /// The same user, at another home.
    #[must_use]
    pub fn with_home(&self, home: &Path) -> Self {
        Self { home: home.to_owned(), ..self.clone() }
    }

    /// The same home, with commands run in another directory.
    #[must_use]
    pub fn working_in(&self, dir: &Path) -> Self {
        Self { work: dir.to_owned(), ..self.clone() }
    }

    /// The same home, used by another build of the command, or another copy.
    #[must_use]
    pub fn run_by(&self, program: &Path) -> Self {
        Self { program: program.to_owned(), ..self.clone() }
    }

    /// The same home, whose daemon and commands run on a machine of their own.
    #[must_use]
    pub(crate) fn at_place(&self, place: Arc<Place>) -> Self {
        Self { place: Some(place), ..self.clone() }
    }

    pub(crate) fn place(&self) -> Option<&Place> {
        self.place.as_deref()
    }

    /// Runs a command to its end.
    #[track_caller]
    #[must_use]
    pub fn p2pit(&self, args: &[&str]) -> Ended {
        self.start(args).end()
    }

    /// As [`Self::p2pit`], with more in the environment: of the command, and of a daemon that
    /// it starts.
    #[track_caller]
    #[must_use]
    pub fn p2pit_with(&self, variables: &[(&str, &str)], args: &[&str]) -> Ended {
        let mut command = self.command();
        command.args(args).envs(variables.iter().copied());
        Running::start(command, &self.scratch).end()
    }

    /// Starts a command.
    #[must_use]
    pub fn start(&self, args: &[&str]) -> Running {
        let mut command = self.command();
        command.args(args);
        Running::start(command, &self.scratch)
    }

    /// `p2pit` for this home and user, in an environment that has nothing else to say.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = match &self.place {
            Some(place) => place.command(&self.program, &self.work),
            None => Command::new(&self.program),
        };
        clear_environment(&mut command);
        command.arg("--home").arg(&self.home).arg("--identity").arg(&self.identity);
        command.current_dir(&self.work);
        command
    }

    /// Joins the pool of a ticket, or founds one; the daemon stays in the background.
    #[track_caller]
    #[must_use]
    pub fn join(&self, ticket: Option<&str>, flags: &[&str]) -> Ended {
        let mut args = vec!["join"];
        args.extend(ticket);
        args.extend(["--detach", "--name", &self.name, "--no-mdns"]);
        if !flags.contains(&"--listen") {
            args.extend(["--listen", "127.0.0.1:0"]);
        }
        args.extend(flags);
        self.p2pit(&args)
    }

    /// The value that a command prints with `--json`.
    #[track_caller]
    #[must_use]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.p2pit(&[args, &["--json"]].concat()).ok();
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("{args:?} printed no JSON: {e}: {text}"))
    }

    #[track_caller]
    #[must_use]
    pub fn me(&self) -> Value {
        self.json(&["show", "me"])
    }

    /// The daemon of the home, also where it does not answer; `None` where none runs, or
    /// where the node has no machine of its own.
    #[must_use]
    pub fn daemon_process(&self) -> Option<Process> {
        self.place.as_ref()?.daemon(&self.home)
    }

    /// The daemon of the home.
    #[track_caller]
    #[must_use]
    pub fn daemon(&self) -> Process {
        if self.place.is_some() {
            // What it says of itself is its number on its own machine.
            let daemon = self.daemon_process();
            return daemon.unwrap_or_else(|| panic!("no daemon runs at {}", self.name));
        }
        let me = self.me();
        let pid = me["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.and_then(Process::of).unwrap_or_else(|| panic!("no daemon in {me}"))
    }

    /// Ends the daemon as a crash would: nothing is told, nothing is tidied up.
    #[track_caller]
    pub fn crash(&self) {
        self.daemon().kill();
    }

    /// Ends the daemon in good order.
    #[track_caller]
    pub fn shut_down(&self) {
        self.p2pit(&["daemon", "--stop"]).ended(0);
    }

    /// Starts the daemon again, with what it has kept in its home.
    #[track_caller]
    pub fn restart(&self) {
        self.restart_with(&[]);
    }

    /// As [`Self::restart`], with more in the daemon's environment.
    #[track_caller]
    pub fn restart_with(&self, variables: &[(&str, &str)]) {
        self.p2pit_with(variables, &["join", "--detach"]).ended(0);
    }

    #[track_caller]
    #[must_use]
    pub fn invite(&self) -> String {
        self.p2pit(&["invite"]).ok().trim_end().to_owned()
    }

    /// Submits, and gives the job's id.
    #[track_caller]
    #[must_use]
    pub fn submit(&self, args: &[&str]) -> String {
        let printed = self.p2pit(&[&["run"], args].concat()).ok();
        let id = printed.trim_end();
        assert!(
            !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric()),
            "an id alone is printed, not {printed:?}"
        );
        id.to_owned()
    }

    #[track_caller]
    #[must_use]
    pub fn job(&self, id: &str) -> Value {
        self.json(&["show", &format!("job:{id}")])
    }

    /// Returns the job once it is in this state.
    #[track_caller]
    pub fn wait_for_state(&self, id: &str, state: &str) -> Value {
        let mut last = Value::Null;
        wait_until(&format!("job {id} is {state}"), SOON, || {
            last = self.job(id);
            assert!(last["state"] != "DONE" || state == "DONE", "it is over: {last:#}");
            (last["state"] == state).then(|| last.clone())
        })
    }

    /// Returns the job once it is over, which it must be with this outcome.
    #[track_caller]
    pub fn wait_for_outcome(&self, id: &str, outcome: &str) -> Value {
        let job = self.wait_for_state(id, "DONE");
        assert_eq!(job["outcome"], outcome, "{}\n{job:#}", self.p2pit(&["log", id]).stdout);
        job
    }

    #[track_caller]
    #[must_use]
    pub fn log(&self, id: &str) -> String {
        self.p2pit(&["log", id]).ok()
    }

    /// The nodes of the pool by name.
    #[track_caller]
    #[must_use]
    pub fn nodes(&self) -> BTreeMap<String, Value> {
        let nodes = self.json(&["show", "nodes"]);
        let nodes = nodes.as_array().expect("nodes are an array");
        let name = |node: &Value| node["name"].as_str().unwrap_or_default().to_owned();
        nodes.iter().map(|node| (name(node), node.clone())).collect()
    }
}

/// `p2pit` without a word, in an environment that has nothing to say.
pub(crate) fn p2pit() -> Command {
    let mut command = Command::new(program());
    clear_environment(&mut command);
    command
}

fn clear_environment(command: &mut Command) {
    command.env_clear();
    for name in ["PATH", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // Nobody's: what is taken from there would be a mistake.
    command.env("HOME", "/nonexistent");
    let log = std::env::var_os(LOG).unwrap_or_else(|| LOG_OF_TESTS.into());
    command.env(LOG, log);
}

/// The text of each line that a process wrote, in order.
#[must_use]
pub fn lines_of(log: &str, worker: u32) -> Vec<&str> {
    let label = format!(" [worker {worker}] ");
    log.lines().filter_map(|line| Some(line.split_once(&label)?.1)).collect()
}

/// A directory to submit, with files of these names and contents. Those that begin with
/// `#!` can be executed.
///
/// # Panics
/// Where it cannot be written.
#[must_use]
pub fn job_dir(at: &Path, files: &[(&str, &str)]) -> PathBuf {
    for (name, content) in files {
        let path = at.join(name);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(at))?;
            fs::write(&path, content)?;
            let mode = if content.starts_with("#!") { 0o755 } else { 0o644 };
            fs::set_permissions(&path, Permissions::from_mode(mode))
        };
        write().unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    }
    at.to_owned()
}

/// The built command: `P2PIT_BIN`, or what lies where this test was built.
///
/// # Panics
/// Where it was not built.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("P2PIT_BIN") {
        return path.into();
    }
    let me = std::env::current_exe().expect("a program has a file");
    let built = me.ancestors().skip(1).take(2).map(|dir| dir.join("p2pit")).find(|it| it.is_file());
    built.unwrap_or_else(|| {
        panic!(
            "no `p2pit` beside {}: build it with `cargo build --bin p2pit`, or run all tests \
             with `cargo test --workspace`",
            me.display()
        )
    })
}
