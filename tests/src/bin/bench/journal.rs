//! What the journal costs: commits with one and with many that wait, and those that meet a
//! snapshot.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use p2pit_node::journal::{Journal, JournalHandle, Write};
use tokio::runtime::Runtime;

use crate::{Options, figures::Times};

/// Of each commit.
const VALUE_BYTES: usize = 512;
/// Where a snapshot is met.
const ENTRIES: usize = 20_000;
const ENTRY_BYTES: usize = 2 << 10;
const WRITERS: [usize; 2] = [1, 32];
const FOR: Duration = Duration::from_secs(2);

#[expect(clippy::print_stdout, reason = "it is what this program is for")]
pub(crate) fn run(_: &Options) -> Result<()> {
    let runtime = Runtime::new()?;
    let directory = tempfile::tempdir().context("no temporary directory")?;
    println!("| writers that wait | commits/s | fsyncs per commit | p50 | p99 | max |");
    println!("|---|---|---|---|---|---|");
    let mut rates = Vec::new();
    for writers in WRITERS {
        let path = directory.path().join(writers.to_string());
        let measured = runtime.block_on(commits(&path, writers, 0))?;
        rates.push(measured.per_second());
        println!("| {writers} | {}", measured.cells()?);
    }
    let path = directory.path().join("grown");
    let measured = runtime.block_on(commits(&path, 1, ENTRIES))?;
    let entries = format!("{ENTRIES} entries of {ENTRY_BYTES} bytes, rewritten meanwhile");
    println!("| 1; {entries} | {}", measured.cells()?);
    println!("\n{} writers: {:.1} times the commits of one", WRITERS[1], rates[1] / rates[0]);
    Ok(())
}

struct Measured {
    took: Duration,
    fsyncs: u64,
    times_ms: Vec<f64>,
}

impl Measured {
    fn per_second(&self) -> f64 {
        self.times_ms.len() as f64 / self.took.as_secs_f64()
    }

    fn cells(self) -> Result<String> {
        let (rate, count) = (self.per_second(), self.times_ms.len());
        let per_commit = self.fsyncs as f64 / count as f64;
        let times = Times::of(self.times_ms)?;
        let [p50, p99, max] = [50, 99, 100].map(|p| format!("{:.2} ms", times.percentile(p)));
        Ok(format!("{rate:.0} | {per_commit:.3} | {p50} | {p99} | {max} |"))
    }
}

/// Commits for a while, one after the other in each writer. Where there are to be entries,
/// each was written twice before, so that the log is rewritten at the same time.
async fn commits(path: &Path, writers: usize, entries: usize) -> Result<Measured> {
    let (journal, _) = Journal::open(path)?;
    let (handle, thread) = JournalHandle::spawn(journal)?;
    let entry = |n: usize| Write {
        key: format!("entry {n}").into_bytes(),
        value: Some(vec![0x5a; ENTRY_BYTES]),
    };
    for _ in 0..2 {
        for start in (0..entries).step_by(1000) {
            handle.commit((start..entries.min(start + 1000)).map(entry).collect()).await?;
        }
    }
    let start = Instant::now();
    let groups = handle.counts().groups();
    let value: Arc<[u8]> = vec![0x33; VALUE_BYTES].into();
    let tasks: Vec<_> = (0..writers)
        .map(|writer| {
            let (handle, value): (JournalHandle, _) = (handle.clone(), Arc::clone(&value));
            tokio::spawn(async move {
                let mut times_ms = Vec::new();
                for n in 0_usize.. {
                    if start.elapsed() > FOR {
                        break;
                    }
                    let key = format!("writer {writer}.{}", n % 100).into_bytes();
                    let began = Instant::now();
                    handle.commit(vec![Write { key, value: Some(value.to_vec()) }]).await?;
                    times_ms.push(began.elapsed().as_secs_f64() * 1e3);
                }
                anyhow::Ok(times_ms)
            })
        })
        .collect();
    let mut times_ms = Vec::new();
    for task in tasks {
        times_ms.extend(task.await??);
    }
    let measured =
        Measured { took: start.elapsed(), fsyncs: handle.counts().groups() - groups, times_ms };
    drop(handle);
    thread.closed().await;
    ensure!(entries == 0 || path.join("log.2").exists(), "the log was not rewritten");
    Ok(measured)
}
