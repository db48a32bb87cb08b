//! All that commands say. Data goes to standard output, talk to standard error.
//!
//! A [`Format`] makes text of values: for people, as JSON, or as bare ids.

mod human;
mod json;
mod progress;
mod quiet;
mod text;

use std::io::{self, IsTerminal as _, Write as _};

pub(crate) use progress::Progress;
pub(crate) use text::{bytes, duration_s, iso8601, plain};

use crate::{
    args::{ColorChoice, Globals},
    problem::{Explanation, output_error},
    view::{File, Job, Jobs, MeAndNode, Node, Overview, Plan, Recovery, Submission, Wait},
};
use p2pit_node::api::types::{Checkup, NodeInfo, UserInfo};

/// What a value looks like on standard output: whole lines.
pub(crate) trait Format {
    fn me(&self, me: &MeAndNode) -> String;
    fn nodes(&self, nodes: &[NodeInfo]) -> String;
    fn node(&self, node: &Node) -> String;
    fn users(&self, users: &[UserInfo]) -> String;
    fn jobs(&self, jobs: &Jobs) -> String;
    fn job(&self, job: &Job, now_ms: u64) -> String;
    fn status(&self, overview: &Overview) -> String;
    fn wait(&self, wait: &Wait) -> String;
    fn files(&self, files: &[File]) -> String;
    fn plan(&self, plan: &Plan) -> String;
    fn submission(&self, submission: &Submission) -> String;
    fn recovery(&self, recovery: &Recovery) -> String;
    fn checkup(&self, checkup: &Checkup) -> String;
}

/// Where a command's words go.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    quiet: bool,
    pub(crate) verbose: u8,
    colour: bool,
    colour_talk: bool,
}

impl Output {
    pub(crate) fn new(globals: &Globals) -> Self {
        let wanted = |is_terminal: bool| match globals.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // https://no-color.org: present and not empty, whatever its value.
            ColorChoice::Auto => {
                is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        Self {
            quiet: globals.quiet,
            verbose: globals.verbose,
            colour: wanted(io::stdout().is_terminal()),
            colour_talk: wanted(io::stderr().is_terminal()),
        }
    }

    /// How values are shown: `--json` above `--quiet`.
    pub(crate) fn format(&self, json: bool) -> Box<dyn Format> {
        match (json, self.quiet) {
            (true, _) => Box::new(json::Json),
            (false, true) => Box::new(quiet::Quiet),
            (false, false) => Box::new(human::Human { colour: self.colour }),
        }
    }

    pub(crate) fn colour_talk(&self) -> bool {
        self.colour_talk
    }

    /// Data, as it is, at once.
    pub(crate) fn data(&self, bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes.as_ref()).and_then(|()| stdout.flush()).map_err(output_error)
    }

    /// A screen that replaces the one before, where there are screens.
    pub(crate) fn screen(&self, text: &str) -> anyhow::Result<()> {
        if io::stdout().is_terminal() {
            return self.data(format!("\x1b[H\x1b[2J{text}"));
        }
        self.data(format!("{text}\n"))
    }

    /// Talk that may be silenced.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            say(&format!("{text}\n"));
        }
    }

    /// What there is to say of a submission beside the job's id.
    pub(crate) fn submission(&self, submission: &Submission) {
        self.note(human::submission_text(submission).trim_end());
    }

    /// What the user should know even when silent.
    pub(crate) fn warn(&self, text: &str) {
        let label = self.paint("warning:", "1;33");
        say(&format!("{label} {}\n", plain(text)));
    }

    pub(crate) fn error(&self, explanation: &Explanation) {
        let Explanation { message, excerpt, hint } = explanation;
        let mut text = format!("{} {}\n", self.paint("error:", "1;31"), plain(message));
        if let Some(excerpt) = excerpt {
            let lines = excerpt.lines().map(|line| format!("  {}\n", plain(line)));
            text.push_str(&format!("\n{}", lines.collect::<String>()));
        }
        if let Some(hint) = hint {
            text.push_str(&format!("\n{} {}\n", self.paint("hint:", "1;36"), plain(hint)));
        }
        say(&text);
    }

    /// A bar that shows itself where something of `bytes` takes long.
    pub(crate) fn progress(&self, what: &str, bytes: u64) -> Progress {
        Progress::new(what, bytes, !self.quiet && io::stderr().is_terminal())
    }

    fn paint(&self, text: &str, code: &str) -> String {
        if self.colour_talk { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// In one write, so that lines of several processes do not mix.
fn say(text: &str) {
    // Nobody is left to be told that nobody listens.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}
