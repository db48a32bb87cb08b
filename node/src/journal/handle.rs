//! The journal on a thread of its own, for callers that must not block.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use super::{Journal, Poisoned, Write, frame};

/// Commits to a journal from async code; cheap to clone. The journal is closed, and
/// its directory unlocked, when the last clone is gone.
#[derive(Debug, Clone)]
pub struct JournalHandle {
    commits: mpsc::Sender<Commit>,
    counts: Arc<Counts>,
}

/// What a journal wrote since it was opened, without what its snapshots took.
#[derive(Debug, Default)]
pub struct Counts {
    groups: AtomicU64,
    entries: AtomicU64,
}

impl Counts {
    /// Groups of commits, each with one fsync.
    pub fn groups(&self) -> u64 {
        self.groups.load(Ordering::Relaxed)
    }

    /// Entries written or removed by these.
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    fn add(&self, entries: usize) {
        self.entries.fetch_add(entries as u64, Ordering::Relaxed);
        self.groups.fetch_add(1, Ordering::Relaxed);
    }
}

/// The thread behind a [`JournalHandle`].
#[derive(Debug)]
pub struct JournalThread {
    done: oneshot::Receiver<()>,
}

#[derive(Debug)]
struct Commit {
    writes: Vec<Write>,
    reply: oneshot::Sender<io::Result<()>>,
}

impl JournalHandle {
    pub fn spawn(journal: Journal) -> io::Result<(Self, JournalThread)> {
        let (commits, receiver) = mpsc::channel(WAITING_COMMITS_MAX);
        let (finished, done) = oneshot::channel();
        let counts = Arc::<Counts>::default();
        let counted = Arc::clone(&counts);
        thread::Builder::new().name("journal".to_owned()).spawn(move || {
            run(journal, receiver, &counted);
            // Nobody may be waiting for the end.
            let _ = finished.send(());
        })?;
        Ok((Self { commits, counts }, JournalThread { done }))
    }

    /// What was written so far; does not keep the journal open.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Returns once `writes` are durable, all or none. Commits that are waiting
    /// together share one fsync. Errors are those of [`Journal::append`].
    ///
    /// Dropping the future does not take the commit back.
    pub async fn commit(&self, writes: Vec<Write>) -> io::Result<()> {
        if writes.is_empty() {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        let gone = || io::Error::other(Poisoned("its thread has ended".to_owned()));
        self.commits.send(Commit { writes, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl JournalThread {
    /// Returns when all handles are gone, everything is durable and the directory is
    /// unlocked.
    pub async fn closed(self) {
        // An error means that the thread ended without saying so; it has ended.
        let _ = self.done.await;
    }
}

/// Commits that may queue up; more wait in [`JournalHandle::commit`].
const WAITING_COMMITS_MAX: usize = 1024;

/// What one fsync may cover, and one commit more: beyond it, waiting longer helps nobody.
const GROUP_BYTES_MAX: usize = 4 << 20;

fn run(mut journal: Journal, mut commits: mpsc::Receiver<Commit>, counts: &Counts) {
    loop {
        let first = if journal.is_snapshot_due() {
            match commits.try_recv() {
                Ok(first) => first,
                Err(TryRecvError::Empty) => {
                    journal.advance_snapshot(0);
                    continue;
                }
                // An unfinished snapshot is begun anew by the next opening.
                Err(TryRecvError::Disconnected) => return,
            }
        } else {
            match commits.blocking_recv() {
                Some(first) => first,
                None => return,
            }
        };
        let mut group = vec![first];
        let mut bytes = group[0].bytes();
        while bytes < GROUP_BYTES_MAX
            && let Ok(next) = commits.try_recv()
        {
            bytes += next.bytes();
            group.push(next);
        }
        let (fitting, oversized): (Vec<_>, Vec<_>) =
            group.into_iter().partition(|commit| frame::writes_fit(&commit.writes));
        for commit in oversized {
            let result = journal.append(&commit.writes);
            commit.answer(result);
        }
        let batches: Vec<&[Write]> = fitting.iter().map(|c| c.writes.as_slice()).collect();
        let result = journal.append_group(&batches);
        counts.add(batches.iter().map(|batch| batch.len()).sum());
        for commit in fitting {
            commit.answer(result.as_ref().copied().map_err(copy_of));
        }
    }
}

impl Commit {
    fn bytes(&self) -> usize {
        self.writes.iter().map(|w| frame::write_bytes(&w.key, w.value.as_deref())).sum()
    }

    fn answer(self, result: io::Result<()>) {
        // The caller may have stopped waiting; its commit stands.
        let _ = self.reply.send(result);
    }
}

/// Every commit of a group gets the group's error.
fn copy_of(error: &io::Error) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Poisoned>()) {
        Some(poisoned) => io::Error::new(error.kind(), poisoned.clone()),
        None => match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(error.kind(), error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{
        Limits,
        faulty::{Fault, FaultyDisk},
        is_poisoned,
    };

    fn write(key: &str) -> Write {
        Write { key: key.into(), value: Some(b"value".to_vec()) }
    }

    #[tokio::test]
    async fn commits_that_wait_together_share_an_fsync_and_all_last() {
        let disk = FaultyDisk::new(1);
        let (journal, _) = Journal::open_on(disk.boxed(), Limits::default()).unwrap();
        let (handle, thread) = JournalHandle::spawn(journal).unwrap();
        let before = (disk.syncs(), disk.operations());
        disk.stall(true);
        let commit = |n: usize| {
            let handle = handle.clone();
            tokio::spawn(async move { handle.commit(vec![write(&n.to_string())]).await })
        };
        let mut commits = vec![commit(0)];
        // From its write on the thread is stalled, and whatever comes queues up.
        while disk.operations() == before.1 {
            tokio::task::yield_now().await;
        }
        commits.extend((1..50).map(commit));
        while handle.commits.capacity() > WAITING_COMMITS_MAX - 49 {
            tokio::task::yield_now().await;
        }
        disk.stall(false);
        for commit in commits {
            commit.await.unwrap().unwrap();
        }
        assert_eq!(disk.syncs() - before.0, 2);
        drop(handle);
        thread.closed().await;
        let (_, recovered) = Journal::open_on(disk.crashed(2), Limits::default()).unwrap();
        assert_eq!(recovered.entries.len(), 50);
    }

    #[tokio::test]
    async fn what_one_fsync_covers_is_bounded() {
        const COMMITS: usize = 13;
        let disk = FaultyDisk::new(1);
        // Without snapshots, which have fsyncs of their own.
        let limits = Limits { min_bytes: u64::MAX, ..Limits::default() };
        let (journal, _) = Journal::open_on(disk.boxed(), limits).unwrap();
        let (handle, _thread) = JournalHandle::spawn(journal).unwrap();
        let before = (disk.syncs(), disk.operations());
        disk.stall(true);
        let commit = |n: usize| {
            let handle = handle.clone();
            let value = Some(vec![0; GROUP_BYTES_MAX / 4]);
            let write = Write { key: n.to_string().into(), value };
            tokio::spawn(async move { handle.commit(vec![write]).await })
        };
        let mut commits = vec![commit(0)];
        while disk.operations() == before.1 {
            tokio::task::yield_now().await;
        }
        commits.extend((1..COMMITS).map(commit));
        while handle.commits.capacity() > WAITING_COMMITS_MAX - (COMMITS - 1) {
            tokio::task::yield_now().await;
        }
        disk.stall(false);
        for commit in commits {
            commit.await.unwrap().unwrap();
        }
        // The first, and then four together.
        assert_eq!(disk.syncs() - before.0, 1 + (COMMITS - 1) / 4);
        assert_eq!(handle.counts().groups(), 1 + (COMMITS as u64 - 1) / 4);
        assert_eq!(handle.counts().entries(), COMMITS as u64);
    }

    #[tokio::test]
    async fn a_grown_log_is_rewritten_while_nobody_commits() {
        let disk = FaultyDisk::new(1);
        let limits =
            Limits { min_bytes: 2000, retry_bytes: 100, step_bytes: 50, ..Limits::default() };
        let (journal, _) = Journal::open_on(disk.boxed(), limits).unwrap();
        let (handle, thread) = JournalHandle::spawn(journal).unwrap();
        let value = Some(vec![1; 3000]);
        let keys = (0..9).map(|n| Write { key: vec![n], value: Some(vec![n; 40]) });
        let big = Write { key: b"big".to_vec(), value };
        handle.commit(keys.chain([big]).collect()).await.unwrap();
        handle.commit(vec![Write { key: b"big".to_vec(), value: None }]).await.unwrap();
        // The thread steps on without being asked.
        while disk.names() != ["log.2"] {
            tokio::task::yield_now().await;
        }
        drop(handle);
        thread.closed().await;
        let (_, recovered) = Journal::open_on(disk.crashed(2), limits).unwrap();
        assert_eq!(recovered.entries.len(), 9);
    }

    #[tokio::test]
    async fn a_failed_fsync_fails_every_commit_from_then_on() {
        let disk = FaultyDisk::new(1);
        let (journal, _) = Journal::open_on(disk.boxed(), Limits::default()).unwrap();
        let (handle, _thread) = JournalHandle::spawn(journal).unwrap();
        handle.commit(vec![write("kept")]).await.unwrap();
        disk.fail_next(Fault::Sync);
        for _ in 0..2 {
            let error = handle.commit(vec![write("lost")]).await.unwrap_err();
            assert!(is_poisoned(&error), "{error}");
        }
    }

    #[tokio::test]
    async fn a_commit_of_more_than_a_frame_takes_lasts_whole() {
        let disk = FaultyDisk::new(1);
        let (handle, thread) = JournalHandle::spawn(disk.journal()).unwrap();
        let value = |n: u8| vec![n; frame::PAYLOAD_BYTES_MAX / 2];
        let writes = (0..3).map(|n| Write { key: vec![n], value: Some(value(n)) });
        handle.commit(writes.collect()).await.unwrap();
        handle.commit(vec![write("fine")]).await.unwrap();
        drop(handle);
        thread.closed().await;
        let (_, recovered) = Journal::open_on(disk.crashed(2), Limits::default()).unwrap();
        assert_eq!(recovered.entries.len(), 4);
        assert!((0..3).all(|n| recovered.entries[&vec![n]] == value(n)));
    }

    #[tokio::test]
    async fn an_oversized_write_fails_alone() {
        let (journal, _) = Journal::open_on(FaultyDisk::new(1).boxed(), Limits::default()).unwrap();
        let (handle, _thread) = JournalHandle::spawn(journal).unwrap();
        let value = Some(vec![0; frame::PAYLOAD_BYTES_MAX]);
        let error = handle.commit(vec![Write { key: vec![1], value }]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(!is_poisoned(&error));
        handle.commit(vec![write("fine")]).await.unwrap();
    }
}
