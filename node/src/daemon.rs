//! The daemon: one [`p2pit_protocol::Peer`] with a network, a disk, GPUs and processes.

use std::time::Duration;

use crate::{config::Settings, home::Home};

/// How a daemon is run.
#[derive(Debug)]
pub struct Options {
    /// Where everything it keeps is.
    pub home: Home,
    /// What it offers and where it listens.
    pub settings: Settings,
    /// Started for a single command: offers nothing, and ends after this long without a
    /// request, a live record or a running process.
    pub idle_exit: Option<Duration>,
}

/// Run until a signal, a shutdown request or the idle time ends it. `ready` is called once
/// the API answers.
///
/// # Errors
/// What kept it from starting, or broke it.
pub async fn run(options: Options, ready: impl FnOnce() + Send) -> anyhow::Result<()> {
    let _ = (options, ready);
    anyhow::bail!("not yet")
}
