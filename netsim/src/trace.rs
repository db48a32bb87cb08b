//! What happened, as a running hash, and as lines for people where asked for.

use std::io::Write;

use p2pit_protocol::JobId;

/// How many bytes are hashed at once.
const UNHASHED_BYTES: usize = 16 << 10;

/// The hash of everything, and optionally its text.
#[derive(Debug)]
pub struct Trace {
    hasher: blake3::Hasher,
    /// What is not hashed yet: many small pieces take far longer than one large one.
    unhashed: Vec<u8>,
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
        let (hasher, unhashed) = (blake3::Hasher::new(), Vec::with_capacity(2 * UNHASHED_BYTES));
        Self { hasher, unhashed, lines: keep_lines.then(Vec::new) }
    }

    /// Take bytes into the hash, with a tag that says what they are.
    pub fn mix(&mut self, tag: &str, parts: &[&[u8]]) {
        self.unhashed.extend_from_slice(tag.as_bytes());
        for part in parts {
            self.unhashed.extend_from_slice(&(part.len() as u64).to_le_bytes());
            self.unhashed.extend_from_slice(part);
        }
        if self.unhashed.len() >= UNHASHED_BYTES {
            self.hasher.update(&self.unhashed);
            self.unhashed.clear();
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
        self.hasher.clone().update(&self.unhashed).finalize().to_hex().to_string()
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
