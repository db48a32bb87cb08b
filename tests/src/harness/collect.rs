//! What a world still has to say when its test has failed.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use super::{machine::Place, net::Router};
use crate::{Ended, Node};

/// A node that does not answer now would not later.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Writes into `at`: of each node its daemon's log, its view of pool and jobs, and each job as
/// `show job: --json` gives it; the router's rules with their counts, and its lines.
pub(super) fn collect(at: &Path, nodes: &[Node], router: &Router) -> Vec<PathBuf> {
    let mut written = Vec::new();
    let mut write = |name: &str, text: &str| {
        let path = at.join(name);
        if fs::create_dir_all(at).and_then(|()| fs::write(&path, text)).is_ok() {
            written.push(path);
        }
    };
    write("rules.nft", &router.rules());
    write("lines.txt", &router.lines_now());
    for node in nodes {
        let name = node.name();
        if let Ok(log) = fs::read_to_string(node.home().join("daemon.log")) {
            write(&format!("{name}.daemon.log"), &log);
        }
        if !node.place().is_some_and(Place::is_on) {
            write(&format!("{name}.off"), "the machine is off\n");
            continue;
        }
        let Some(daemon) = node.daemon_process() else {
            write(&format!("{name}.off"), "no daemon runs\n");
            continue;
        };
        daemon.signal(Signal::CONT);
        let deadline = Instant::now() + ANSWER_WITHIN;
        let ask = |args: &[&str]| node.start(args).end_by(deadline);
        let said = |ended: Option<Ended>| match ended {
            Some(ended) => format!("{}{}", ended.stdout, ended.stderr),
            None => "no answer\n".to_owned(),
        };
        write(&format!("{name}.nodes.json"), &said(ask(&["show", "nodes", "--json"])));
        let jobs = ask(&["status", "--json"]);
        let listed = jobs.as_ref().and_then(|it| serde_json::from_str::<Value>(&it.stdout).ok());
        write(&format!("{name}.jobs.json"), &said(jobs));
        let listed = listed.as_ref().and_then(Value::as_array).map(Vec::as_slice);
        for job in listed.unwrap_or_default() {
            let Some(id) = job["id"].as_str() else { continue };
            // What is over is in the list already.
            if job["state"] == "DONE" || Instant::now() > deadline {
                continue;
            }
            let job = ask(&["show", &format!("job:{id}"), "--json"]);
            write(&format!("{name}.job-{id}.json"), &said(job));
        }
    }
    written
}
