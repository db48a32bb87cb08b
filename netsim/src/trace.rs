//! What happened, as a running hash, and as lines for people where asked for.

use std::io::Write;

use p2pit_protocol::JobId;

/// The hash of everything, and optionally its text.
#[derive(Debug)]
pub struct Trace {
    hasher: blake3::Hasher,
    lines: Option<Vec<Line>>,
}

/// One thing that happened.
#[derive(Debug, Clone)]
pub struct Line {
    /// True time.
    pub at_ms: u64,
    /// The job it is about.
    pub job: Option<JobId>,
    /// What.
    pub text: String,
}

impl Trace {
    /// A trace, which keeps lines if `keep_lines`.
    #[must_use]
    pub fn new(keep_lines: bool) -> Self {
        Self { hasher: blake3::Hasher::new(), lines: keep_lines.then(Vec::new) }
    }

    /// Take bytes into the hash, with a tag that says what they are.
    pub fn mix(&mut self, tag: &str, parts: &[&[u8]]) {
        self.hasher.update(tag.as_bytes());
        for part in parts {
            self.hasher.update(&(part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        }
    }

    /// Whether lines are kept.
    #[must_use]
    pub fn keeps_lines(&self) -> bool {
        self.lines.is_some()
    }

    /// Keep a line, if lines are kept.
    pub fn say(&mut self, at_ms: u64, job: Option<JobId>, text: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(Line { at_ms, job, text: text() });
        }
    }

    /// The hash so far, in hexadecimal.
    #[must_use]
    pub fn hash(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }

    /// The lines kept.
    #[must_use]
    pub fn lines(&self) -> &[Line] {
        self.lines.as_deref().unwrap_or_default()
    }

    /// The last `most` lines about `job`, or of all where no job is named.
    #[must_use]
    pub fn last_lines(&self, job: Option<JobId>, most: usize) -> Vec<&Line> {
        let about = |line: &&Line| job.is_none() || line.job.is_none() || line.job == job;
        let mut lines: Vec<&Line> = self.lines().iter().rev().filter(about).take(most).collect();
        lines.reverse();
        lines
    }

    /// Write every line.
    ///
    /// # Errors
    /// The writer's.
    pub fn write_to(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.lines().iter().try_for_each(|line| writeln!(out, "{line}"))
    }
}

impl core::fmt::Display for Line {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (seconds, rest) = (self.at_ms / 1_000, self.at_ms % 1_000);
        match self.job {
            Some(job) => write!(f, "{seconds:>6}.{rest:03} {job:?} {}", self.text),
            None => write!(f, "{seconds:>6}.{rest:03} {:10} {}", "", self.text),
        }
    }
}
