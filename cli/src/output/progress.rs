//! A bar for what takes long.

use std::{
    fmt,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is over before that shows no bar.
const SHOW_AFTER: Duration = Duration::from_millis(500);

/// Counts bytes; visible on a terminal once it has gone on for a while.
#[derive(Clone)]
pub(crate) struct Progress {
    bar: ProgressBar,
    begun: Instant,
    may_show: bool,
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("bytes", &self.bar.position()).finish_non_exhaustive()
    }
}

impl Progress {
    pub(super) fn new(what: &str, bytes: u64, may_show: bool) -> Self {
        let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::hidden());
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        Self { bar, begun: Instant::now(), may_show }
    }

    /// `bytes` more are done.
    pub(crate) fn add(&self, bytes: u64) {
        self.show_when_due();
        self.bar.inc(bytes);
    }

    /// `done` bytes were there before, and say nothing of the rate.
    pub(crate) fn skip(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    /// `done` of `total` are done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.show_when_due();
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn show_when_due(&self) {
        if self.may_show && self.bar.is_hidden() && self.begun.elapsed() >= SHOW_AFTER {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}
