//! A job's output as lines of its log: `[time] [worker i] text`.

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use super::spec::{LOG_BYTES_MAX, LogState};

/// Longer lines are cut into pieces of this length.
const LINE_BYTES_MAX: usize = 64 << 10;
/// How often a line that is drawn over itself with carriage returns, such as a progress
/// bar, is written while it is being drawn.
const PROGRESS_EVERY_MS: u64 = 5_000;
/// Formatted lines are written when this many bytes are together, so that a read full of
/// empty lines does not multiply in memory.
const BATCH_BYTES: usize = 256 << 10;
/// Kept free below the bound for the note that says so.
const NOTE_BYTES: u64 = 256;

/// Turns output into lines, with a bound on what it holds and writes.
///
/// Nothing here fails: what cannot be written is counted and reported, because neither a
/// full disk nor a full log is a reason to stop a job.
#[derive(Debug)]
pub(super) struct JobLog {
    file: Option<File>,
    label: String,
    bytes_max: u64,
    /// The line that has not ended yet, at most [`LINE_BYTES_MAX`].
    line: Vec<u8>,
    /// The last byte was a carriage return: the next one draws over the line.
    returned: bool,
    progress_at_ms: Option<u64>,
    batch: Vec<u8>,
    /// Output bytes that `batch` stands for.
    batch_output: u64,
    /// The file ends within a line, after a write that the disk cut short.
    torn: bool,
    lost_since_note: u64,
    full: bool,
    state: LogState,
}

impl JobLog {
    pub(super) fn open(path: &Path, label: String, bytes_max: u64) -> Self {
        let mut state = LogState::default();
        let file = match open_to_append(path) {
            Ok((file, bytes)) => {
                state.bytes = bytes;
                Some(file)
            }
            Err(error) => {
                state.trouble = Some(format!("cannot open {}: {error}", path.display()));
                None
            }
        };
        Self {
            file,
            label,
            bytes_max,
            line: Vec::new(),
            returned: false,
            progress_at_ms: None,
            batch: Vec::new(),
            batch_output: 0,
            torn: false,
            lost_since_note: 0,
            full: false,
            state,
        }
    }

    pub(super) fn state(&self) -> &LogState {
        &self.state
    }

    /// Appends output that was read at `wall_ms`.
    pub(super) fn push(&mut self, output: &[u8], wall_ms: u64) {
        let stamp = stamp(wall_ms);
        for &byte in output {
            if byte == b'\n' {
                self.end_line(&stamp);
                continue;
            }
            if self.returned {
                self.draw_over(&stamp, wall_ms);
            }
            if byte == b'\r' {
                self.returned = true;
                continue;
            }
            self.line.push(byte);
            if self.line.len() >= LINE_BYTES_MAX {
                self.cut_line(&stamp);
            }
        }
        self.write_batch();
    }

    /// Writes what is left of the last line; nothing follows.
    pub(super) fn finish(&mut self, wall_ms: u64) {
        if !self.line.is_empty() {
            self.end_line(&stamp(wall_ms));
        }
        self.write_batch();
    }

    fn end_line(&mut self, stamp: &str) {
        self.returned = false;
        let line = std::mem::take(&mut self.line);
        self.add(stamp, &line);
        self.line = line;
        self.line.clear();
    }

    fn draw_over(&mut self, stamp: &str, wall_ms: u64) {
        self.returned = false;
        if self.line.is_empty() {
            return;
        }
        let due = self.progress_at_ms.is_none_or(|at| wall_ms.abs_diff(at) >= PROGRESS_EVERY_MS);
        if due {
            self.progress_at_ms = Some(wall_ms);
            self.end_line(stamp);
        } else {
            self.line.clear();
        }
    }

    /// Ends a line that is too long, between two characters where there are any.
    fn cut_line(&mut self, stamp: &str) {
        let rest = self.line.split_off(complete_utf8_len(&self.line));
        self.end_line(stamp);
        self.line = rest;
    }

    fn add(&mut self, stamp: &str, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let head = format!("[{stamp}] [{}] ", self.label);
        self.batch.reserve(head.len() + text.len() + 1);
        self.batch.extend_from_slice(head.as_bytes());
        self.batch.extend_from_slice(text.as_bytes());
        self.batch.push(b'\n');
        self.batch_output += line.len() as u64 + 1;
        if self.batch.len() >= BATCH_BYTES {
            self.write_batch();
        }
    }

    fn write_batch(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let mut batch = std::mem::take(&mut self.batch);
        let output = std::mem::take(&mut self.batch_output);
        if self.full || self.state.bytes + batch.len() as u64 + NOTE_BYTES > self.bytes_max {
            self.state.bytes_lost += output;
            self.note_full();
        } else {
            if self.lost_since_note > 0 {
                self.note_gap();
            }
            if self.lost_since_note > 0 || !self.append(&batch) {
                self.state.bytes_lost += output;
                self.lost_since_note += output;
            }
        }
        batch.clear();
        self.batch = batch;
    }

    /// Once: the last line of a log that reached its bound.
    fn note_full(&mut self) {
        if self.full {
            return;
        }
        self.full = true;
        let bound = self.bytes_max;
        let note =
            format!("the log has reached its bound of {bound} bytes: further output is dropped");
        self.state.trouble = Some(note.clone());
        let line = format!("[{}] [daemon] {note}\n", stamp(super::clock::wall_ms()));
        self.append(line.as_bytes());
    }

    fn note_gap(&mut self) {
        let lost = self.lost_since_note;
        let stamp = stamp(super::clock::wall_ms());
        let line = format!("[{stamp}] [daemon] {lost} bytes of output could not be written here\n");
        if self.append(line.as_bytes()) {
            self.lost_since_note = 0;
        }
    }

    fn append(&mut self, bytes: &[u8]) -> bool {
        let Some(file) = &mut self.file else { return false };
        if self.torn {
            if let Err(error) = file.write_all(b"\n") {
                self.state.trouble = Some(format!("cannot write the log: {error}"));
                return false;
            }
            self.state.bytes += 1;
            self.torn = false;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match file.write(rest) {
                Ok(0) => {
                    self.state.trouble = Some("cannot write the log: nothing was taken".into());
                    break;
                }
                Ok(taken) => {
                    self.state.bytes += taken as u64;
                    rest = &rest[taken..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.state.trouble = Some(format!("cannot write the log: {error}"));
                    break;
                }
            }
        }
        self.torn = !rest.is_empty() && rest.len() < bytes.len();
        rest.is_empty()
    }
}

/// Adds what the daemon has to say to the log at `path`, as lines of its own under
/// `label`.
pub fn append_to_log(path: &Path, label: &str, text: &str) -> io::Result<()> {
    let mut log = JobLog::open(path, label.to_owned(), LOG_BYTES_MAX);
    let now = super::clock::wall_ms();
    log.push(text.as_bytes(), now);
    log.finish(now);
    log.state.trouble.map_or(Ok(()), |trouble| Err(io::Error::other(trouble)))
}

/// A log to write on at its end, and how long it is.
pub(crate) fn open_to_append(path: &Path) -> io::Result<(File, u64)> {
    let file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

fn stamp(wall_ms: u64) -> String {
    let time =
        i64::try_from(wall_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.unwrap_or(jiff::Timestamp::UNIX_EPOCH).strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// The length of `bytes` without a character that has only begun at its end.
fn complete_utf8_len(bytes: &[u8]) -> usize {
    const CHARACTER_BYTES_MAX: usize = 4;
    let tail = bytes.len().saturating_sub(CHARACTER_BYTES_MAX - 1);
    let start = (tail..bytes.len()).rev().find(|&at| bytes[at] & 0xC0 != 0x80);
    match start {
        Some(start) if character_len(bytes[start]) > bytes.len() - start => start,
        _ => bytes.len(),
    }
}

fn character_len(first: u8) -> usize {
    match first {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF7 => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: u64 = 1_795_205_980_123;

    #[test]
    fn each_line_carries_its_time_and_its_worker() {
        let mut log = TestLog::new(1 << 20);
        log.0.push(b"one\ntw", T0);
        log.0.push(b"o\n\nlast", T0 + 1);
        log.0.finish(T0 + 2);
        assert_eq!(
            log.text(),
            "[2026-11-20T20:19:40.123Z] [worker 3] one\n\
             [2026-11-20T20:19:40.124Z] [worker 3] two\n\
             [2026-11-20T20:19:40.124Z] [worker 3] \n\
             [2026-11-20T20:19:40.125Z] [worker 3] last\n"
        );
        assert_eq!(log.0.state().bytes, log.text().len() as u64);
    }

    #[test]
    fn a_progress_bar_leaves_a_line_now_and_then_and_its_last_state() {
        let mut log = TestLog::new(1 << 20);
        for step in 0..=1000 {
            log.0.push(format!("\rstep {step}").as_bytes(), T0 + step * 10);
        }
        log.0.push(b"\r\ndone\r\n", T0 + 10_010);
        log.0.finish(T0 + 10_010);
        assert_eq!(log.texts(), ["step 0", "step 500", "step 1000", "done"]);
    }

    #[test]
    fn a_line_too_long_is_cut_between_characters() {
        let mut log = TestLog::new(1 << 20);
        let text = format!("x{}", "é".repeat(LINE_BYTES_MAX));
        log.0.push(text.as_bytes(), T0);
        log.0.finish(T0);
        let pieces = log.texts();
        assert_eq!(pieces.len(), 3);
        assert!(pieces.iter().all(|piece| piece.len() <= LINE_BYTES_MAX));
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn bytes_that_are_no_text_are_kept_lossily() {
        let mut log = TestLog::new(1 << 20);
        log.0.push(b"a\xFFb\n\xC3\n", T0);
        assert_eq!(log.texts(), ["a\u{FFFD}b", "\u{FFFD}"]);
        let mut log = TestLog::new(1 << 20);
        log.0.push(&[0x80; LINE_BYTES_MAX + 10], T0);
        log.0.finish(T0);
        assert_eq!(log.texts().len(), 2);
    }

    #[test]
    fn a_full_log_says_so_once_and_stays_within_its_bound() {
        let mut log = TestLog::new(2_000);
        for _ in 0..100 {
            log.0.push(b"some output of a job\n", T0);
        }
        log.0.finish(T0);
        let text = log.text();
        assert!(text.len() <= 2_000, "{}", text.len());
        assert_eq!(text.matches("further output is dropped").count(), 1);
        let kept = text.matches("some output").count() as u64;
        assert_eq!(log.0.state().bytes_lost, (100 - kept) * 21);
    }

    #[test]
    fn a_full_disk_is_reported_and_the_output_counted_as_lost() {
        let mut log = JobLog::open(Path::new("/dev/full"), "worker 0".into(), 1 << 20);
        log.push(b"12345\n", T0);
        log.finish(T0);
        assert_eq!((log.state().bytes, log.state().bytes_lost), (0, 6));
        assert!(log.state().trouble.as_ref().unwrap().contains("No space left"));
    }

    struct TestLog(JobLog, tempfile::NamedTempFile);

    impl TestLog {
        fn new(bytes_max: u64) -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            Self(JobLog::open(file.path(), "worker 3".into(), bytes_max), file)
        }

        fn text(&self) -> String {
            std::fs::read_to_string(self.1.path()).unwrap()
        }

        fn texts(&self) -> Vec<String> {
            let head = "[2026-11-20T20:19:40.123Z] [worker 3] ".len();
            self.text().lines().map(|line| line[head..].to_owned()).collect()
        }
    }
}
