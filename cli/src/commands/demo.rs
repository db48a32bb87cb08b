//! `p2pit demo`: the main job on this machine alone, with simulated GPUs.
//!
//! Everything is done by commands that a user could type; they are shown and run as
//! processes of their own. What they leave is in one temporary directory, and every daemon
//! and supervisor names it on its command line: that is how all of it is found again.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{NodeInfo, path},
    config::env,
    home::Home,
};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

use super::Interrupts;
use crate::{
    client::Client, daemon_process::this_program, output::Output, problem::Problem, processes,
    status::Status,
};

/// Show it all on this machine: a pool, a job on two GPUs, its log and its results
///
/// The nodes are on loopback and their GPUs simulated: neither Docker nor root nor a GPU is
/// needed. Every command is shown as it is run. Afterwards, and on Ctrl-C, nothing is left.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit demo\n  p2pit demo --keep    leave the pool running, \
    to go on by hand")]
pub(crate) struct Args {
    /// Leave the pool running, and say how to use and how to end it
    #[arg(long)]
    keep: bool,
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    nodes: u8,
}

/// What the demo submits, so that it works without the repository.
const SCRIPT: &str = include_str!("../../../examples/first-light/.compute");
/// On a machine that has much else to do.
const ASSEMBLED_WITHIN: Duration = Duration::from_secs(60);
const ASSEMBLED_POLL: Duration = Duration::from_millis(50);
/// For a job, and for the processes of the pool, when the demo is over.
const END_WITHIN: Duration = Duration::from_secs(5);

pub(crate) async fn run(out: &Output, args: Args) -> anyhow::Result<Status> {
    let mut interrupts = Interrupts::new()?;
    let dir = tempfile::Builder::new()
        .prefix("p2pit-demo-")
        .tempdir()
        .context("no temporary directory can be made")?;
    let root = dir.path().canonicalize().context("the temporary directory is gone")?;
    let demo = Demo { out, root: root.clone(), nodes: args.nodes, job_runs: Cell::new(false) };
    let shown = tokio::select! {
        shown = demo.show() => match shown {
            Ok(()) => Ok(Status::DONE),
            // Ctrl-C reaches all processes of a terminal, and one of ours was faster.
            Err(error) => error.downcast::<Interrupted>().map(|interrupted| interrupted.0),
        },
        status = interrupts.next() => Ok(status),
    };
    if args.keep && matches!(shown, Ok(Status::DONE)) {
        let _ = dir.keep();
        demo.say_how_to_go_on_here()?;
        return Ok(Status::DONE);
    }
    demo.stop_job().await;
    tokio::task::spawn_blocking(move || {
        processes::end_below(&root, END_WITHIN)?;
        dir.close().context("the temporary directory cannot be removed")
    })
    .await??;
    if matches!(shown, Ok(Status::DONE)) {
        demo.say_how_to_go_on()?;
    }
    shown
}

struct Demo<'a> {
    out: &'a Output,
    root: PathBuf,
    nodes: u8,
    /// A job was submitted and is not known to be done.
    job_runs: Cell<bool>,
}

impl Demo<'_> {
    async fn show(&self) -> anyhow::Result<()> {
        let many = if self.nodes == 1 { "one node" } else { "nodes" };
        self.comment(&format!("A pool of {many} with two simulated GPUs each, on this machine:"))?;
        self.say(&format!("$ export {}={}", env::IDENTITY, self.identity().display()))?;
        self.join(1, None).await?;
        if self.nodes > 1 {
            let ticket = self.invite().await?;
            for n in 2..=self.nodes {
                self.join(n, Some(&ticket)).await?;
            }
        }
        self.wait_until_assembled().await?;

        self.comment("A job of two processes with a GPU each, submitted from a directory:")?;
        let work = self.write_example()?;
        self.say(&format!("$ cd {}", work.display()))?;
        self.job_runs.set(true);
        self.p2pit(1, ["run", "First light", "2:[v100]", "-l"], &work).await?;
        self.job_runs.set(false);

        // From another node than the one it was submitted at, where there is another.
        let elsewhere = self.nodes.min(2);
        self.comment("What the pool says of it, from any of its nodes:")?;
        self.p2pit(elsewhere, ["status"], &work).await?;
        self.p2pit(elsewhere, ["show", "nodes"], &work).await?;

        self.comment("What it left:")?;
        self.p2pit(elsewhere, ["ls", "@last", "artifacts"], &work).await?;
        let results = self.root.join("results");
        let copy: [&OsStr; 4] =
            ["cp".as_ref(), "@last".as_ref(), "artifacts".as_ref(), results.as_ref()];
        self.p2pit(elsewhere, copy, &work).await?;
        self.show_results(&results)
    }

    async fn join(&self, n: u8, ticket: Option<&str>) -> anyhow::Result<()> {
        let name = format!("demo-{n}");
        let mut args = vec!["join"];
        args.extend(ticket);
        args.extend(["--detach", "--name", &name, "--gpus", "sim:2xv100"]);
        args.extend(["--listen", "127.0.0.1:0", "--no-mdns"]);
        self.p2pit(n, args, &self.root).await
    }

    /// A ticket of the first node.
    async fn invite(&self) -> anyhow::Result<String> {
        let mut command = self.command(1, &self.root);
        command.arg("invite").stdout(Stdio::piped()).stderr(Stdio::inherit());
        self.say(&format!("$ TICKET=$(p2pit --home {} invite)", self.home(1).display()))?;
        let output = command.output().await.context("cannot start p2pit")?;
        if !output.status.success() {
            return Err(failed("p2pit invite", output.status));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Returns once every node can ask all others, and knows their GPUs.
    async fn wait_until_assembled(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + ASSEMBLED_WITHIN;
        for n in 1..=self.nodes {
            let home = Home::existing(&self.home(n))?.context("a node's home is gone")?;
            let client = Client::connect(&home).await?.context("a node's daemon is gone")?;
            while !self.is_assembled(&client).await? {
                if Instant::now() > deadline {
                    let seconds = ASSEMBLED_WITHIN.as_secs();
                    let message = format!("the nodes did not find each other within {seconds} s");
                    return Err(Problem::broken(message).into());
                }
                sleep(ASSEMBLED_POLL).await;
            }
        }
        Ok(())
    }

    async fn is_assembled(&self, client: &Client) -> anyhow::Result<bool> {
        let nodes: Vec<NodeInfo> = client.get(path::NODES).await?;
        let is_here = |node: &&NodeInfo| node.reach != "offline" && !node.capacity.gpus.is_empty();
        Ok(nodes.iter().filter(is_here).count() == usize::from(self.nodes))
    }

    fn write_example(&self) -> anyhow::Result<PathBuf> {
        let work = self.root.join("first-light");
        let script = work.join(".compute");
        let write = || {
            fs::create_dir(&work)?;
            fs::write(&script, SCRIPT)?;
            fs::set_permissions(&script, Permissions::from_mode(0o755))
        };
        write().with_context(|| format!("cannot write {}", script.display()))?;
        Ok(work)
    }

    fn show_results(&self, results: &Path) -> anyhow::Result<()> {
        self.say(&format!("$ cat {}/*", results.display()))?;
        let mut files: Vec<PathBuf> = fs::read_dir(results)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .with_context(|| format!("cannot read {}", results.display()))?;
        files.sort();
        for file in files {
            let content =
                fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            self.out.data(content)?;
        }
        Ok(())
    }

    /// Ends what an interruption left running, so that it can tidy up after itself.
    async fn stop_job(&self) {
        if !self.job_runs.get() {
            return;
        }
        let silent = |args: &[&str]| {
            let mut command = self.command(1, &self.root);
            command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let stopping = async {
            // Where it does not work, force follows.
            let _ = silent(&["stop", "@last"]).status().await;
            let _ = silent(&["log", "@last", "-f"]).status().await;
        };
        let _ = timeout(END_WITHIN, stopping).await;
    }

    /// Shows a command, runs it, and expects it to succeed.
    async fn p2pit(
        &self,
        n: u8,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        dir: &Path,
    ) -> anyhow::Result<()> {
        let mut command = self.command(n, dir);
        let mut line = format!("p2pit --home {}", self.home(n).display());
        for arg in args {
            command.arg(arg.as_ref());
            let text = arg.as_ref().to_string_lossy();
            let is_ticket = text.starts_with("pit1");
            line.push_str(&format!(
                " {}",
                if is_ticket { "$TICKET".into() } else { quoted(&text) }
            ));
        }
        self.say(&format!("$ {line}"))?;
        let status = command.status().await.context("cannot start p2pit")?;
        if status.success() { Ok(()) } else { Err(failed(&line, status)) }
    }

    fn command(&self, n: u8, dir: &Path) -> Command {
        let mut command = Command::new(this_program());
        command
            .arg("--home")
            .arg(self.home(n))
            .env(env::IDENTITY, self.identity())
            .env_remove(env::HOME)
            .current_dir(dir)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    fn home(&self, n: u8) -> PathBuf {
        self.root.join(format!("n{n}"))
    }

    fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    fn comment(&self, text: &str) -> anyhow::Result<()> {
        self.say(&format!("\n# {text}"))
    }

    fn say(&self, line: &str) -> anyhow::Result<()> {
        self.out.data(format!("{line}\n"))
    }

    fn say_how_to_go_on(&self) -> anyhow::Result<()> {
        self.comment("That was all of it; nothing is left running. On real machines:")?;
        self.say(
            "p2pit join                      # on the first: founds a pool, prints a ticket\n\
             p2pit join TICKET               # on every other\n\
             p2pit run \"My task\" 2:[v100] -l # in a directory with a script .compute\n\
             p2pit demo --keep               # or leave this pool running\n\
             p2pit --help",
        )
    }

    fn say_how_to_go_on_here(&self) -> anyhow::Result<()> {
        self.comment("The pool runs on. To use it, from any of its homes:")?;
        self.say(&format!("export {}={}", env::IDENTITY, self.identity().display()))?;
        for n in 1..=self.nodes {
            let (home, name) = (self.home(n), if n == 1 { "export " } else { "# or " });
            self.say(&format!("{name}{}={}", env::HOME, home.display()))?;
        }
        self.say(&format!("cd {}", self.root.join("first-light").display()))?;
        self.say("p2pit run \"Second light\" 2:[v100] -c @last -l")?;
        self.comment("To end it:")?;
        for n in 1..=self.nodes {
            self.say(&format!("p2pit --home {} daemon --stop", self.home(n).display()))?;
        }
        self.say(&format!("rm -r {}", self.root.display()))
    }
}

/// A command of the demo was ended by a signal that is for the demo, too.
#[derive(Debug)]
struct Interrupted(Status);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

fn failed(line: &str, status: ExitStatus) -> anyhow::Error {
    for interruption in [Status::INTERRUPTED, Status::TERMINATED] {
        let code = i32::from(interruption.0);
        if status.code() == Some(code) || status.signal().map(|signal| 128 + signal) == Some(code) {
            return Interrupted(interruption).into();
        }
    }
    Problem::broken(format!("`{line}` ended with {status}")).into()
}

/// As a shell would have to be told.
fn quoted(text: &str) -> String {
    let is_plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':' | '@' | '=');
    let is_request = text.ends_with(']') && !text.contains(char::is_whitespace);
    if is_request || (!text.is_empty() && text.chars().all(is_plain)) {
        return text.to_owned();
    }
    if !text.contains(['"', '$', '`', '\\', '!']) {
        return format!("\"{text}\"");
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_they_would_be_typed() {
        for (text, shown) in [
            ("--home", "--home"),
            ("2:[v100]", "2:[v100]"),
            ("First light", "\"First light\""),
            ("", "\"\""),
            ("echo $HOME", "'echo $HOME'"),
            ("it's \"it\"", r#"'it'\''s "it"'"#),
        ] {
            assert_eq!(quoted(text), shown);
        }
    }
}
