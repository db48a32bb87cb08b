//! Reading the logs that are on this node: those of ranks that ran here, and copies of others.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use p2pit_protocol::{JobId, bidder::WorkId, identity::SignedBytes};
use tokio::sync::watch;

use super::{
    Shared,
    serve::{may_read, short},
    work,
};
use crate::{
    api::log::{Chunk, Held, Part, Parts},
    workspace::LOG_NAME,
};

/// Read of one rank at a time.
const CHUNK_BYTES: u64 = 256 << 10;

/// Logs of a job on this node, those of one rank after those of another, and with `follow`
/// as they grow.
pub(crate) struct LogReader {
    shared: Arc<Shared>,
    job: JobId,
    follow: bool,
    /// All ranks that ran here.
    own: bool,
    /// Of a log that goes on, only whole lines.
    whole_lines: bool,
    activity: watch::Receiver<u64>,
    read: BTreeMap<Part, u64>,
    queue: VecDeque<Chunk>,
}

impl LogReader {
    /// For somebody whose request says that they may read it.
    pub(crate) async fn open(
        shared: &Arc<Shared>,
        signed: SignedBytes,
        parts: Parts,
        follow: bool,
    ) -> anyhow::Result<Self> {
        let (job, _) = may_read(shared, signed).await?;
        let reader = Self::of(shared, job, &parts, follow, true);
        let (paths, asked) = (Paths::of(shared, job), parts);
        tokio::task::spawn_blocking(move || {
            let lacking = asked
                .ranks
                .iter()
                .find(|(attempt, rank, _)| paths.log((*attempt, *rank)).is_none());
            if let Some((attempt, rank, _)) = lacking {
                let job = short(job);
                bail!("there is no log of rank {rank} of attempt {attempt} of job {job} here");
            }
            if asked.own && !paths.of_job.is_dir() {
                bail!("job {} left nothing on this node", short(job));
            }
            Ok(())
        })
        .await??;
        Ok(reader)
    }

    /// For who has shown otherwise that it may: bytes as they are.
    pub(crate) fn of_rank(shared: &Arc<Shared>, id: WorkId, from: u64, follow: bool) -> Self {
        let ranks = vec![(id.attempt, id.rank, from)];
        Self::of(shared, id.job, &Parts { own: false, ranks }, follow, false)
    }

    fn of(
        shared: &Arc<Shared>,
        job: JobId,
        parts: &Parts,
        follow: bool,
        whole_lines: bool,
    ) -> Self {
        let read = parts.ranks.iter().map(|(attempt, rank, from)| ((*attempt, *rank), *from));
        Self {
            shared: Arc::clone(shared),
            job,
            follow,
            own: parts.own,
            whole_lines,
            activity: shared.work.activity(job),
            read: read.collect(),
            queue: VecDeque::new(),
        }
    }

    /// The next piece; `None` at the end.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Chunk>> {
        loop {
            if let Some(chunk) = self.queue.pop_front() {
                return Ok(Some(chunk));
            }
            self.activity.borrow_and_update();
            // Asked before reading: what ends meanwhile is read completely.
            let is_over = self.is_over().await?;
            let (paths, own) = (Paths::of(&self.shared, self.job), self.own);
            let to_the_end = !self.whole_lines || is_over || !self.follow;
            let mut read = std::mem::take(&mut self.read);
            let (read, chunks) = tokio::task::spawn_blocking(move || {
                let chunks = paths.read_on(&mut read, own, to_the_end);
                (read, chunks)
            })
            .await?;
            self.read = read;
            self.queue.extend(chunks?);
            if self.queue.is_empty() {
                if is_over || !self.follow {
                    return Ok(None);
                }
                self.activity.changed().await.context("the daemon is ending")?;
            }
        }
    }

    /// Whether nothing is to be added to any of them.
    async fn is_over(&self) -> anyhow::Result<bool> {
        let (job, own) = (self.job, self.own);
        let shared = &self.shared;
        if own && shared.work.is_live(job) {
            return Ok(false);
        }
        let ids: Vec<WorkId> = self
            .read
            .keys()
            .map(|(attempt, rank)| WorkId { job, attempt: *attempt, rank: *rank })
            .collect();
        if ids.iter().any(|id| shared.work.has(*id)) {
            return Ok(false);
        }
        let grows = ids.iter().any(|id| shared.copies.grows(*id));
        let (has_work, is_done) = shared
            .act(move |peer, _| {
                let has_work = own && peer.has_work(job) || ids.iter().any(|id| peer.has_rank(*id));
                (has_work, peer.record(job).is_some_and(|kept| kept.value.body.state() == DONE))
            })
            .await?;
        // What could not be copied until the job was over is not waited for.
        Ok(!has_work && (!grows || is_done))
    }
}

const DONE: p2pit_protocol::job::State = p2pit_protocol::job::State::Done;

/// Which logs of a job are on this node.
pub(crate) async fn held(shared: &Arc<Shared>, signed: SignedBytes) -> anyhow::Result<Vec<Held>> {
    let (job, _) = may_read(shared, signed).await?;
    let paths = Paths::of(shared, job);
    let found = tokio::task::spawn_blocking(move || paths.all()).await??;
    let id = |attempt, rank| WorkId { job, attempt, rank };
    let ids: Vec<WorkId> = found.iter().map(|(at, ..)| id(at.0, at.1)).collect();
    let at_work = shared
        .act(move |peer, _| {
            ids.into_iter().filter(|id| peer.has_rank(*id)).collect::<BTreeSet<_>>()
        })
        .await?;
    let held = found.into_iter().map(|((attempt, rank), bytes, own, has_end)| {
        let id = id(attempt, rank);
        let grows = at_work.contains(&id) || shared.work.has(id);
        Held { attempt, rank, bytes, own, complete: if own { !grows } else { has_end } }
    });
    Ok(held.collect())
}

/// Where logs of a job are.
struct Paths {
    of_job: PathBuf,
    copies: super::copies::Shelf,
    job: JobId,
}

impl Paths {
    fn of(shared: &Shared, job: JobId) -> Self {
        Self { of_job: shared.job_dir(job), copies: shared.copies.shelf().clone(), job }
    }

    fn id(&self, (attempt, rank): Part) -> WorkId {
        WorkId { job: self.job, attempt, rank }
    }

    fn own(&self, (attempt, rank): Part) -> PathBuf {
        self.of_job.join(format!("{attempt}-{rank}")).join(LOG_NAME)
    }

    /// What a rank that ran here wrote goes before a copy of it.
    fn log(&self, part: Part) -> Option<PathBuf> {
        let copy = self.copies.log_path(self.id(part));
        [self.own(part), copy].into_iter().find(|path| path.is_file())
    }

    fn own_parts(&self) -> io::Result<Vec<Part>> {
        match work::rank_dirs(&self.of_job) {
            Ok(dirs) => Ok(dirs.into_iter().map(|(attempt, rank, _)| (attempt, rank)).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Of each log its length, whether it is no copy, and of a copy whether it is complete.
    fn all(&self) -> io::Result<Vec<(Part, u64, bool, bool)>> {
        let mut found = BTreeMap::new();
        for part in self.copies.ranks(self.job)? {
            let held = self.copies.held(self.id(part));
            found.insert(part, (held.log_bytes, false, held.end.is_some()));
        }
        for part in self.own_parts()? {
            if let Ok(log) = self.own(part).metadata() {
                found.insert(part, (log.len(), true, false));
            }
        }
        Ok(found.into_iter().map(|(part, (bytes, own, end))| (part, bytes, own, end)).collect())
    }

    /// What each has beyond what was read.
    fn read_on(
        &self,
        read: &mut BTreeMap<Part, u64>,
        own: bool,
        to_the_end: bool,
    ) -> anyhow::Result<Vec<Chunk>> {
        if own {
            for part in self.own_parts()? {
                read.entry(part).or_default();
            }
        }
        let mut chunks = Vec::new();
        for (part, offset) in read {
            let Some(path) = self.log(*part) else { continue };
            let bytes = read_from(&path, *offset, to_the_end)
                .with_context(|| format!("cannot read {}", path.display()))?;
            if !bytes.is_empty() {
                *offset += bytes.len() as u64;
                chunks.push(Chunk { part: *part, bytes });
            }
        }
        Ok(chunks)
    }
}

/// At most [`CHUNK_BYTES`]; cut behind the last whole line where more may come, unless the
/// line is longer than that.
fn read_from(path: &Path, offset: u64, to_the_end: bool) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(CHUNK_BYTES).read_to_end(&mut bytes)?;
    let is_cut = bytes.len() as u64 == CHUNK_BYTES;
    if !to_the_end || is_cut {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole > 0 || !is_cut {
            bytes.truncate(whole);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_in_whole_lines_until_nothing_more_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let read = |offset, to_the_end| {
            String::from_utf8(read_from(&path, offset, to_the_end).unwrap()).unwrap()
        };
        assert_eq!(read(0, true), "", "it is not there yet");
        std::fs::write(&path, "one\ntwo\nthr").unwrap();
        assert_eq!(read(0, false), "one\ntwo\n");
        assert_eq!(read(8, false), "");
        assert_eq!(read(8, true), "thr");
        assert_eq!(read(99, true), "");
        let long = "x".repeat(CHUNK_BYTES as usize + 3);
        std::fs::write(&path, format!("a\n{long}\n")).unwrap();
        assert_eq!(read(0, true), "a\n");
        // Longer than is read at once, it comes in pieces all the same.
        assert_eq!(read(2, false).len(), CHUNK_BYTES as usize);
        assert_eq!(read(2 + CHUNK_BYTES, false), "xxx\n");
    }
}
