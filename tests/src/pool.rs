//! A pool in a temporary directory.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;

use crate::{Node, Running, SOON, node, processes, wait_until};

/// Of each daemon's log, shown after a failure.
const LOG_TAIL_LINES: usize = 60;

/// Nodes of one user in one temporary directory. Dropped, all that runs in it is ended.
#[derive(Debug)]
pub struct Pool {
    /// `None` only while it is being dropped.
    dir: Option<TempDir>,
    path: PathBuf,
    nodes: Vec<Node>,
}

impl Pool {
    /// A directory without any node.
    ///
    /// # Panics
    /// Where no directory can be made.
    #[must_use]
    pub fn empty() -> Self {
        Self::empty_in(&std::env::temp_dir())
    }

    /// As [`Self::empty`], in memory where this machine has a place for that: for tests that
    /// would keep a disk busy for minutes.
    #[must_use]
    pub fn in_memory() -> Self {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { Self::empty_in(memory) } else { Self::empty() }
    }

    fn empty_in(dir: &Path) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("p2pit-test-")
            .tempdir_in(dir)
            .expect("a temporary directory can be made");
        // As processes see it.
        let path = dir.path().canonicalize().expect("the directory is there");
        for name in ["empty", "output"] {
            fs::create_dir(path.join(name)).expect("the directory can be written to");
        }
        Self { dir: Some(dir), path, nodes: Vec::new() }
    }

    /// A running pool: nodes `n1`, `n2` and so on, each with these GPUs, that all know of
    /// each other.
    #[track_caller]
    #[must_use]
    pub fn of(gpus: &[&str]) -> Self {
        let mut pool = Self::empty();
        for (n, gpus) in (1..).zip(gpus) {
            pool.add(&format!("n{n}"), &["--gpus", gpus, "--cpus", "4"]);
        }
        pool.wait_until_assembled();
        pool
    }

    /// The n-th node, from 1.
    ///
    /// # Panics
    /// Where there are not so many.
    #[must_use]
    pub fn node(&self, n: usize) -> &Node {
        &self.nodes[n - 1]
    }

    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A further node of the pool's first user; the first of all founds the pool.
    #[track_caller]
    pub fn add(&mut self, name: &str, flags: &[&str]) -> Node {
        self.add_node(self.home(name), flags)
    }

    /// As [`Self::add`], for a home that is there.
    #[track_caller]
    pub(crate) fn add_node(&mut self, node: Node, flags: &[&str]) -> Node {
        let ticket = self.nodes.first().map(Node::invite);
        let flags = [&["--user-name", "anna"], flags].concat();
        node.join(ticket.as_deref(), &flags).ended(0);
        self.nodes.push(node.clone());
        node
    }

    /// A node that offers nothing, and knows what the others offer.
    #[track_caller]
    pub fn add_client(&mut self, name: &str) -> Node {
        let node = self.add(name, &["--client"]);
        self.wait_until_assembled();
        node
    }

    /// A node of somebody who comes with a ticket.
    #[track_caller]
    pub fn add_stranger(&mut self, user: &str, flags: &[&str]) -> Node {
        let node = self.home(&format!("of-{user}")).used_with(&self.path.join(user));
        let ticket = self.node(1).invite();
        let flags = [&["--user-name", user], flags].concat();
        node.join(Some(&ticket), &flags).ended(0);
        self.nodes.push(node.clone());
        self.wait_until_assembled();
        node
    }

    /// A home that nothing was done with.
    #[must_use]
    pub fn home(&self, name: &str) -> Node {
        Node::new(&self.path, name)
    }

    /// Returns once every node is connected to every other and knows what it offers.
    #[track_caller]
    pub fn wait_until_assembled(&self) {
        self.wait_until_assembled_within(SOON);
    }

    /// As [`Self::wait_until_assembled`], where that takes longer: nodes that missed each other
    /// for a while try again at most a minute after the last time.
    #[track_caller]
    pub fn wait_until_assembled_within(&self, within: Duration) {
        for node in &self.nodes {
            let mut seen = BTreeMap::new();
            wait_until(&format!("{} sees all nodes", node.name()), within, || {
                seen = node.nodes();
                let is_here = |it: &Node| {
                    // Only the node itself knows what it offers before its first advert.
                    seen.get(it.name()).is_some_and(|it| {
                        it["reach"] == "self"
                            || (it["reach"] == "online" && !it["advert_age_s"].is_null())
                    })
                };
                (seen.len() == self.nodes.len() && self.nodes.iter().all(is_here)).then_some(())
            });
        }
    }

    /// A directory to submit.
    #[must_use]
    pub fn job_dir(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let path = self.path.join("submit").join(name);
        fs::create_dir_all(&path).expect("the pool's directory can be written to");
        node::job_dir(&path, files)
    }

    /// Starts `p2pit` without a home or user, with `tmp` for its temporary files.
    #[must_use]
    pub fn start_bare(&self, args: &[&str], tmp: &Path) -> Running {
        let mut command: Command = node::p2pit();
        command.args(args).env("TMPDIR", tmp).current_dir(&self.path);
        Running::start(command, &self.path.join("output"))
    }

    fn tell_of_failure(&self) {
        let mut text = format!("the pool stays in {}\n", self.path.display());
        for node in &self.nodes {
            let log = fs::read(node.home().join("daemon.log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
            text.push_str(&format!("--- the end of {}'s daemon log\n{tail}\n", node.name()));
        }
        #[expect(clippy::print_stderr, reason = "the test runner shows it with the failure")]
        {
            eprintln!("{text}---");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        if !std::thread::panicking() {
            processes::end_all(&self.path);
            dir.close().expect("nothing holds the pool's directory");
            return;
        }
        self.tell_of_failure();
        // A second panic would hide the first.
        let ended = std::panic::catch_unwind(|| processes::end_all(&self.path));
        let _ = (dir.keep(), ended);
    }
}
