//! The daemon's side of one supervisor: a task that turns its events into
//! [`ProcessEvent`]s and that never ends without the last of them.

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    process::Child,
    sync::{mpsc, watch},
};

use super::{
    ProcessEvent,
    clock::{boot_ms, wall_ms},
    control::{Event, LINE_BYTES_MAX, Order, encode, next_line},
    run_dir::{CONTROL_SOCKET, RunDir},
    spec::{Deadline, Ended, Ending, LogState, Usage},
    sys,
};

/// Between two attempts to reach a supervisor that lives, the first and the longest.
const RECONNECT_MIN: Duration = Duration::from_millis(5);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// How long the ending of a lost process waits for its tree to be over. The guard ends the
/// tree within milliseconds, unless the kernel cannot.
const TREE_GRACE: Duration = Duration::from_secs(2);
const TREE_POLL: Duration = Duration::from_millis(50);

/// Places in the queue of events that reports of the log's size leave free.
const PLACES_KEPT: usize = 16;

/// One supervisor as its daemon follows it.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) run_dir: RunDir,
    pub(super) boot_id: String,
    pub(super) events: mpsc::Sender<ProcessEvent>,
    pub(super) orders: mpsc::Receiver<Order>,
    /// The deadline that the supervisor was last asked to keep, if any, to be said again
    /// whenever it is reached anew.
    pub(super) asked: watch::Receiver<Option<Deadline>>,
    /// The one it has, once it said so.
    pub(super) held: watch::Sender<Option<Deadline>>,
    /// To be reaped, where this daemon started it.
    pub(super) child: Option<Child>,
}

impl Watch {
    /// Ends when the supervisor is gone and has been reported on, or when nobody listens.
    pub(super) async fn run(mut self, stream: Option<UnixStream>) {
        let mut seen = Seen::default();
        let mut stream = stream;
        let mut pause = RECONNECT_MIN;
        loop {
            if let Some(connected) = stream.take() {
                pause = RECONNECT_MIN;
                if self.converse(connected, &mut seen).await.is_break() {
                    return;
                }
            }
            match self.run_dir.try_lock() {
                Ok(Some(_)) => break,
                // It lives. It may not listen yet, or have dropped this daemon as too slow.
                Ok(None) => {}
                // Its directory is removed only once it is gone.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                Err(error) => {
                    tracing::warn!(run_dir = %self.run_dir.path().display(), %error, "cannot look after a supervisor");
                }
            }
            stream = connect(self.run_dir.path()).await.ok();
            if stream.is_none() {
                if self.events.is_closed() {
                    return;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RECONNECT_MAX);
            }
        }
        if let Some(mut child) = self.child.take() {
            // Gone already, as the free lock says; this only collects it.
            let _ = child.wait().await;
        }
        self.close(seen).await;
    }

    /// Breaks when the receiver of the events is gone.
    async fn converse(
        &mut self,
        mut stream: UnixStream,
        seen: &mut Seen,
    ) -> std::ops::ControlFlow<()> {
        use std::ops::ControlFlow::{Break, Continue};
        let mut incoming = Vec::new();
        let mut orders_open = true;
        let mut asked_open = true;
        if self.asked.borrow().is_some() {
            self.asked.mark_changed();
        }
        loop {
            tokio::select! {
                biased;
                read = stream.read_buf(&mut incoming) => {
                    if !matches!(read, Ok(1..)) {
                        return Continue(());
                    }
                    while let Some(event) = next_line(&mut incoming) {
                        if let Some(Event::Deadline { boot_ms }) = event {
                            self.held.send_replace(Some(boot_ms));
                        }
                        let Some(event) = event.and_then(|event| seen.translate(event)) else {
                            continue;
                        };
                        // A size is soon followed by another: the last places are for news
                        // that is told once, and so never wait for a slow receiver.
                        if matches!(event, ProcessEvent::LogGrew { .. })
                            && self.events.capacity() < PLACES_KEPT
                        {
                            continue;
                        }
                        if self.events.send(event).await.is_err() {
                            return Break(());
                        }
                    }
                    if incoming.len() > LINE_BYTES_MAX {
                        return Continue(());
                    }
                }
                order = self.orders.recv(), if orders_open => match order {
                    Some(order) => {
                        // A write fails only if the supervisor is going, which the next
                        // read tells.
                        let _ = stream.write_all(&encode(&order)).await;
                    }
                    None => orders_open = false,
                },
                changed = self.asked.changed(), if asked_open => match changed {
                    Ok(()) => {
                        let asked = *self.asked.borrow_and_update();
                        if let Some(boot_ms) = asked {
                            // See above; whoever asked sees that nothing is confirmed.
                            let order = Order::SetDeadline { boot_ms };
                            let _ = stream.write_all(&encode(&order)).await;
                        }
                    }
                    Err(_) => asked_open = false,
                },
                () = self.events.closed() => return Break(()),
            }
        }
    }

    /// Looks again for a while where that fails, as for want of descriptors: the guard ends
    /// the tree by itself meanwhile.
    async fn look_for_tree(&self) -> Result<Option<OwnedFd>> {
        let deadline = Instant::now() + TREE_GRACE;
        loop {
            match open_tree(&self.run_dir, &self.boot_id) {
                Err(_) if Instant::now() < deadline => tokio::time::sleep(TREE_POLL).await,
                found => return found,
            }
        }
    }

    /// Reports the ending if it was not heard, then the end of the tree.
    async fn close(self, seen: Seen) {
        let tree = self.look_for_tree().await;
        let mut tree_over = false;
        if !seen.ended {
            if let Ok(Some(guard)) = &tree {
                tree_over = tokio::time::timeout(TREE_GRACE, over(guard)).await.is_ok();
            }
            let ended = last_word(&self.run_dir, &self.boot_id);
            if self.events.send(ProcessEvent::Ended(ended)).await.is_err() {
                return;
            }
        }
        if let Ok(Some(guard)) = &tree
            && !tree_over
        {
            over(guard).await;
        }
        // A receiver that is gone wants no more news.
        let _ = self.events.send(ProcessEvent::Gone).await;
    }
}

/// What was passed on, so that a reconnection repeats nothing.
#[derive(Debug, Default)]
struct Seen {
    started: bool,
    ended: bool,
}

impl Seen {
    fn translate(&mut self, event: Event) -> Option<ProcessEvent> {
        match event {
            Event::Started { pid, boot_ms } => {
                let new = !std::mem::replace(&mut self.started, true);
                new.then_some(ProcessEvent::Started { pid, boot_ms })
            }
            Event::LogGrew { bytes } => Some(ProcessEvent::LogGrew { bytes }),
            Event::LogTrouble { reason } => Some(ProcessEvent::LogTrouble { reason }),
            Event::Ended(ended) => {
                let new = !std::mem::replace(&mut self.ended, true);
                new.then_some(ProcessEvent::Ended(*ended))
            }
            Event::Deadline { .. } | Event::Pong => None,
        }
    }
}

/// What is known of a process whose supervisor is gone.
pub(super) fn last_word(run_dir: &RunDir, boot_id: &str) -> Ended {
    let ending = match run_dir.read_ended() {
        Ok(Some(ended)) => return ended,
        Ok(None) => how_lost(run_dir, boot_id),
        Err(error) => Ending::Lost { reason: format!("{error:#}") },
    };
    Ended {
        ending,
        boot_ms: boot_ms(),
        wall_ms: wall_ms(),
        usage: Usage::default(),
        log: LogState::default(),
        unsaved: None,
    }
}

fn how_lost(run_dir: &RunDir, boot_id: &str) -> Ending {
    let launch = match run_dir.read_launch() {
        Ok(launch) => launch,
        Err(error) => return Ending::Lost { reason: format!("{error:#}") },
    };
    if launch.boot_id != boot_id {
        return Ending::Lost { reason: "the machine was restarted".into() };
    }
    match run_dir.read_tree() {
        Ok(Some(_)) => Ending::Lost { reason: "its supervisor died".into() },
        // The tree is on record before the first instruction, and files outlive processes.
        Ok(None) => Ending::FailedToStart {
            reason: "its supervisor ended before it started the process".into(),
        },
        Err(error) => Ending::Lost { reason: format!("{error:#}") },
    }
}

/// Whether processes of the tree may still be there though the supervisor is gone.
pub(super) fn open_tree(run_dir: &RunDir, boot_id: &str) -> Result<Option<OwnedFd>> {
    match run_dir.read_launch() {
        Ok(launch) if launch.boot_id == boot_id => {}
        // A file that cannot be read now says nothing.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(is_no_absence) => {
            return Err(error);
        }
        // Of an earlier boot nothing is left, whatever a loss of power made of its files.
        Ok(_) | Err(_) => return Ok(None),
    }
    let Some(tree) = run_dir.read_tree()? else { return Ok(None) };
    tree.guard.open().context("cannot look for the guard")
}

fn is_no_absence(error: &io::Error) -> bool {
    error.kind() != io::ErrorKind::NotFound
}

/// Completes when the process behind a pidfd has ended, or cannot be watched.
async fn over(guard: &OwnedFd) {
    let Ok(guard) = guard.try_clone().and_then(sys::watch_readable) else { return };
    // An error means that the runtime is shutting down.
    let _ = guard.readable().await;
}

/// Through a descriptor of the directory: a socket's own name is limited to 108 bytes.
pub(super) async fn connect(run_dir: &Path) -> std::io::Result<UnixStream> {
    use std::os::fd::AsRawFd as _;
    let dir = std::fs::File::open(run_dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{CONTROL_SOCKET}", dir.as_raw_fd())).await
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncBufReadExt as _, BufReader},
        net::UnixListener,
    };

    use super::*;

    /// For what happens within milliseconds unless it never does.
    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_deadline_is_asked_for_again_after_a_lost_connection() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(dir.path());
        // As long as a supervisor lives.
        let _lock = run_dir.try_lock().unwrap().unwrap();
        let listener = UnixListener::bind(dir.path().join(CONTROL_SOCKET)).unwrap();
        let (events, mut received) = mpsc::channel(64);
        let (_orders, orders) = mpsc::channel(1);
        let (asking, asked) = watch::channel(None);
        let (held, mut known) = watch::channel(None);
        let boot_id = String::new();
        let watching = Watch { run_dir, boot_id, events, orders, asked, held, child: None };
        let watching = tokio::spawn(watching.run(None));
        let deadline = Deadline(Some(7));
        asking.send_replace(Some(deadline));
        for _ in 0..2 {
            let (stream, _) = listener.accept().await.unwrap();
            let mut lines = BufReader::new(stream).lines();
            let line = tokio::time::timeout(SOON, lines.next_line()).await.expect("not asked");
            let line = line.unwrap().unwrap();
            assert_eq!(line, r#"{"set_deadline":{"boot_ms":7}}"#);
        }
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&encode(&Event::Deadline { boot_ms: deadline })).await.unwrap();
        known.wait_for(|known| *known == Some(deadline)).await.unwrap();
        received.close();
        watching.await.unwrap();
    }
}
