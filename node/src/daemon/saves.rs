//! What a rank keeps, taken while its process runs, for keepers to copy.
//!
//! Every so often, as the job's owner said, and when the process is told to end, `keep/` is
//! taken as it is at one moment; where it is another than the last time, the peer is told, and
//! holders come and get what they lack of it. So a node that never returns costs a job no more
//! than what was written since.

use std::{sync::Arc, time::Duration};

use p2pit_protocol::bidder::WorkId;
use tokio::sync::Notify;
use tracing::warn;

use super::{Shared, clock, work};
use crate::{
    transfer::ingest::Seen,
    workspace::{Save, Saving, Speaker, Workspace},
};

/// What wakes the task that takes `keep/` of one rank; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Saver {
    told_to_end: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

impl Saver {
    pub(super) fn of(shared: &Arc<Shared>, id: WorkId) -> Self {
        let told_to_end = Arc::new(Notify::new());
        let task = tokio::spawn(run(Arc::clone(shared), id, Arc::clone(&told_to_end)));
        Self { told_to_end, task }
    }

    /// The process has got its SIGTERM.
    pub(super) fn told_to_end(&self) {
        self.told_to_end.notify_one();
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(shared: Arc<Shared>, id: WorkId, told_to_end: Arc<Notify>) {
    let job_dir = shared.job_dir(id.job);
    let spec = match tokio::task::spawn_blocking(move || work::read_spec(&job_dir)).await {
        Ok(Ok(spec)) => spec.spec,
        Ok(Err(reason)) => {
            let reason = format!("{reason:#}");
            return warn!(job = %id.job, rank = %id.rank, reason, "what it keeps is not copied");
        }
        Err(reason) => return warn!(%reason, "what a rank keeps is not copied"),
    };
    if spec.keep_every_ms == 0 {
        return;
    }
    let workspace = shared.workspace(id);
    if let Some(save) = workspace.saved() {
        // Of before this daemon started: nobody else may know of it.
        tell(&shared, id, save).await;
    }
    let mut seen = Seen::default();
    let mut is_in_trouble = false;
    let mut left_out = None;
    let mut ends = Ends { limit_ms: spec.time_limit_ms, is_over: false };
    let mut due_ms = clock::now().boot_ms.saturating_add(spec.keep_every_ms);
    loop {
        let wake_ms = ends.at(&shared, id).map_or(due_ms, |end_ms| end_ms.min(due_ms));
        let pause_ms = wake_ms.saturating_sub(clock::now().boot_ms);
        let is_told = tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(pause_ms)) => false,
            () = told_to_end.notified() => true,
        };
        let now_ms = clock::now().boot_ms;
        // A lease may have moved meanwhile.
        let has_ended = is_told || ends.at(&shared, id).is_some_and(|end_ms| end_ms <= now_ms);
        ends.is_over |= has_ended;
        if !has_ended && now_ms < due_ms {
            continue;
        }
        let taking = (workspace.clone(), shared.store.clone(), std::mem::take(&mut seen));
        let taken = tokio::task::spawn_blocking(move || {
            let (workspace, store, mut seen) = taking;
            let saved = workspace.save(&store, &mut seen, clock::wall_ms());
            (seen, saved)
        });
        let Ok((now_seen, saved)) = taken.await else { return };
        seen = now_seen;
        let trouble = match saved {
            Ok(Saving::New(save, without)) => {
                tell(&shared, id, save).await;
                if let Some(without) = without.as_ref().filter(|it| left_out.as_ref() != Some(*it))
                {
                    say(&workspace, format!("not copied of keep/ to other nodes: {without}")).await;
                    shared.work.touch(id.job);
                }
                left_out = without;
                None
            }
            Ok(Saving::Unchanged) => None,
            Ok(Saving::Changing(path)) => Some(format!("`{path}` changes all the time")),
            Ok(Saving::Unreadable(what)) => Some(format!("{what} cannot be read")),
            Err(reason) => Some(format!("{:#}", anyhow::Error::from(reason))),
        };
        if let Some(trouble) = &trouble
            && !is_in_trouble
        {
            say(&workspace, format!("keep/ is not copied to other nodes just now: {trouble}"))
                .await;
            shared.work.touch(id.job);
        }
        is_in_trouble = trouble.is_some();
        due_ms = clock::now().boot_ms.saturating_add(spec.keep_every_ms);
    }
}

/// When its supervisor ends the process by itself.
struct Ends {
    limit_ms: Option<u64>,
    /// That was, and once is enough.
    is_over: bool,
}

impl Ends {
    fn at(&self, shared: &Shared, id: WorkId) -> Option<u64> {
        if self.is_over {
            return None;
        }
        let (started_ms, deadline_ms) = shared.work.times(id);
        let limit = started_ms.zip(self.limit_ms).map(|(at, limit)| at.saturating_add(limit));
        limit.into_iter().chain(deadline_ms).min()
    }
}

async fn tell(shared: &Shared, id: WorkId, save: Save) {
    // The daemon is ending if nobody listens: the next one finds the save.
    let _ = shared.act(move |peer, now| peer.saved(id, save.seq, save.tree, now)).await;
}

/// In the rank's log; where that cannot be written, the daemon's has it.
async fn say(workspace: &Workspace, text: String) {
    let workspace = workspace.clone();
    let said = tokio::task::spawn_blocking(move || {
        let said = workspace.log(Speaker::Daemon, &text);
        (text, said)
    });
    match said.await {
        Ok((_, Ok(()))) => {}
        Ok((text, Err(reason))) => warn!(text, %reason, "not in the log"),
        Err(reason) => warn!(%reason, "not in the log"),
    }
}
