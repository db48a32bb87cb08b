//! From a directory to a submitted job: snapshot, plan, upload, signature, submission.

use std::{cell::Cell, collections::BTreeMap, io, path::Path, sync::Arc};

use anyhow::Context as _;
use bytes::Bytes;
use p2pit_node::{
    api::types::{Plan, Planned, Submit, SubmitEvent, Unsatisfiable, Uploaded, path},
    transfer::{
        Snapshot, SnapshotOptions, TreePath,
        exchange::{OpenBlob, Source},
        snapshot,
    },
};
use p2pit_protocol::{
    BlobId, JobId, PeerId,
    identity::{Domain, SignedBytes},
    job::{self, Command, Continued, Grace, JobSpec, Policy, VerifiedSpec},
    request::Request,
};

use crate::{
    args::Globals,
    files::{KEEP, Left},
    home,
    identity::{random, wall_ms},
    jobs::Found,
    names::short_job,
    output::Output,
    problem::Problem,
    script,
    session::Session,
    view::Submission,
};

/// What the user wants to run.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) title: String,
    pub(crate) request: Request,
    pub(crate) command: Command,
    pub(crate) continues: Option<String>,
    pub(crate) artifacts: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) private: bool,
    pub(crate) time_limit_ms: Option<u64>,
    pub(crate) grace: Grace,
    pub(crate) retries: u32,
    pub(crate) policy: Policy,
    pub(crate) lost_after_ms: u64,
    /// 0: never.
    pub(crate) keep_every_ms: u64,
}

/// A directory hashed, and a pool that could run it.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) planned: Planned,
    pub(crate) snapshot: Snapshot,
    /// Blobs of the snapshot that the daemon lacks, with their sizes.
    pub(crate) missing: Vec<(BlobId, u64)>,
}

/// Hashes a directory on a thread of its own, from now on.
pub(crate) fn start_snapshot(
    globals: &Globals,
    dir: &Path,
) -> tokio::task::JoinHandle<Result<Snapshot, snapshot::Error>> {
    let dir = dir.to_owned();
    let options = SnapshotOptions { hashes: home::hashes(globals), ..SnapshotOptions::default() };
    tokio::task::spawn_blocking(move || snapshot(&dir, &options))
}

/// Asks whether the pool could run it while the directory is being hashed.
pub(crate) async fn prepare(
    session: &Session,
    wish: &Wish,
    snapshot: tokio::task::JoinHandle<Result<Snapshot, snapshot::Error>>,
) -> anyhow::Result<Prepared> {
    let plan = Plan { request: wish.request.to_string(), user: session.user() };
    let planning = async {
        let planned: Planned = session.client.post(path::PLAN, &plan).await?;
        match &planned.unsatisfiable {
            Some(unsatisfiable) => Err(refuse(&wish.request, unsatisfiable).into()),
            None => anyhow::Ok(planned),
        }
    };
    let hashing = async {
        let mut snapshot = snapshot.await?.map_err(blame)?;
        if wish.command == Command::Script {
            snapshot.notes.extend(script::check(&snapshot)?);
        }
        let blobs: BTreeMap<BlobId, u64> = snapshot.blobs().into_iter().collect();
        let ids: Vec<BlobId> = blobs.keys().copied().collect();
        let missing: Vec<BlobId> = session.client.post(path::MISSING, &ids).await?;
        let size = |id: &BlobId| Some((*id, *blobs.get(id)?));
        anyhow::Ok((missing.iter().filter_map(size).collect(), snapshot))
    };
    let (planned, (missing, snapshot)) = tokio::try_join!(planning, hashing)?;
    Ok(Prepared { planned, snapshot, missing })
}

/// Submits it. `sent` holds the job's id from when it may exist.
pub(crate) async fn submit(
    session: &Session,
    out: &Output,
    wish: Wish,
    prepared: Prepared,
    sent: &Cell<Option<JobId>>,
) -> anyhow::Result<Submission> {
    let Prepared { planned, snapshot, missing } = prepared;
    let blobs = snapshot.blobs().len() as u64;
    let uploaded = upload(session, out, &snapshot, &missing).await?;
    let continues = match &wish.continues {
        Some(text) => Some(continue_job(session, out, text).await?),
        None => None,
    };
    let source = source_of(&snapshot);
    let spec = JobSpec {
        pool: planned.pool,
        owner: session.user(),
        title: wish.title.clone(),
        request: wish.request.clone(),
        command: wish.command.clone(),
        code: snapshot.root,
        code_bytes: snapshot.tree.total_bytes(),
        source: source.clone(),
        continues: continues.clone(),
        artifacts: wish.artifacts,
        env: wish.env,
        private: wish.private,
        time_limit_ms: wish.time_limit_ms,
        grace: wish.grace,
        retries: wish.retries,
        policy: wish.policy,
        lost_after_ms: wish.lost_after_ms,
        keep_every_ms: wish.keep_every_ms,
        nonce: random()?,
        submitted_at_ms: wall_ms(),
        keepers: planned.keepers,
    };
    let signed = SignedBytes::sign(session.identity.key(), Domain::JobSpec, spec.to_bytes());
    let verified = VerifiedSpec::verify(signed).map_err(|e| Problem::request(e.to_string()))?;
    sent.set(Some(verified.job));
    let carried = carry(session, out, verified).await?;
    // Where only this node keeps it, what was uploaded is all that travelled.
    let (sent_blobs, sent_bytes, there_blobs) = if carried.blobs + carried.there == 0 {
        (uploaded.blobs, uploaded.bytes, blobs.saturating_sub(uploaded.blobs))
    } else {
        (carried.blobs, carried.bytes, carried.there)
    };
    Ok(Submission {
        id: carried.job,
        title: wish.title,
        request: wish.request.to_string(),
        private: wish.private,
        continues: continues.map(|continued| continued.job),
        command: wish.command,
        source,
        keepers: carried.keepers,
        keepers_online: carried.online,
        sent_blobs,
        sent_bytes,
        there_blobs,
    })
}

/// The snapshot's origin as the record keeps it.
pub(crate) fn source_of(snapshot: &Snapshot) -> job::Source {
    snapshot.git.as_ref().map_or_else(job::Source::default, |git| job::Source {
        remote: git.remote.clone(),
        commit: git.commit.clone(),
        diff_lines: git.diff_lines,
        untracked: git.untracked,
    })
}

fn refuse(request: &Request, unsatisfiable: &Unsatisfiable) -> Problem {
    let Unsatisfiable { reason, nearest } = unsatisfiable;
    let problem = Problem::request(format!("the pool can never satisfy `{request}`: {reason}"));
    match nearest {
        Some(nearest) => problem.hint(format!("the nearest request that fits is `{nearest}`")),
        None => problem.hint("`p2pit show nodes` shows what there is"),
    }
}

/// A directory that cannot be submitted as it is, is not something that broke; a disk that
/// cannot be read is.
fn blame(error: snapshot::Error) -> anyhow::Error {
    use snapshot::Error;
    let hint = match &error {
        Error::Unreadable { source, .. } => match source.kind() {
            io::ErrorKind::PermissionDenied => {
                "give yourself the right to read it, or name it in `.pitignore`"
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => "try again",
            _ => return error.into(),
        },
        Error::Special { .. } => "remove it, or name it in `.pitignore`",
        Error::Changing { .. } => "wait until it is written, or name it in `.pitignore`",
        Error::Path { .. } => "rename it, or name it in `.pitignore`",
        Error::TooManyEntries { .. } | Error::Tree { .. } => {
            "name in `.pitignore` what the job does not need"
        }
    };
    Problem::request(format!("{:#}", anyhow::Error::from(error))).hint(hint).into()
}

async fn upload(
    session: &Session,
    out: &Output,
    snapshot: &Snapshot,
    missing: &[(BlobId, u64)],
) -> anyhow::Result<Uploaded> {
    if missing.is_empty() {
        return Ok(Uploaded { blobs: 0, bytes: 0 });
    }
    let progress = out.progress("reading", missing.iter().map(|(_, size)| size).sum());
    let ids = missing.iter().map(|(id, _)| *id).collect();
    let source = Arc::new(snapshot.source());
    let posting = session.client.post_blobs(path::UPLOAD, source, ids, |n| progress.add(n));
    let uploaded = posting.await.context("the directory did not reach the daemon")?;
    progress.finish();
    Ok(uploaded)
}

struct Carried {
    job: JobId,
    keepers: Vec<PeerId>,
    online: usize,
    blobs: u64,
    bytes: u64,
    there: u64,
}

async fn carry(session: &Session, out: &Output, spec: VerifiedSpec) -> anyhow::Result<Carried> {
    let (job, spec) = (spec.job, spec.signed);
    let progress = out.progress("sending", 0);
    // From here on the daemon may have sent it, whatever it could still say.
    let posted = session.client.post_lines(path::SUBMIT, &Submit { spec }).await;
    let mut events = posted.map_err(|reason| reason.context(unheard(job)))?;
    loop {
        let event = match events.next().await {
            Ok(Some(event)) => event,
            Ok(None) => return Err(unheard(job).into()),
            Err(reason) => return Err(reason.context(unheard(job))),
        };
        match event {
            SubmitEvent::Transferring { bytes_done, bytes, .. } => progress.set(bytes_done, bytes),
            SubmitEvent::Note { text } => out.warn(&text),
            SubmitEvent::Submitted {
                job,
                keepers,
                online,
                blobs_sent,
                bytes_sent,
                blobs_there,
            } => {
                progress.finish();
                return Ok(Carried {
                    job,
                    keepers,
                    online,
                    blobs: blobs_sent,
                    bytes: bytes_sent,
                    there: blobs_there,
                });
            }
            SubmitEvent::Refused { error } => {
                progress.finish();
                return Err(Problem::from(error).into());
            }
            SubmitEvent::Unknown { job } => {
                progress.finish();
                return Err(unknown(job).into());
            }
        }
    }
}

fn unknown(job: JobId) -> Problem {
    undecided(job, "a majority of its keepers is silent")
}

fn unheard(job: JobId) -> Problem {
    undecided(job, "the daemon ended before it said so")
}

fn undecided(job: JobId, why: &str) -> Problem {
    Problem::broken(format!("whether job {job} is submitted is unknown: {why}")).hint(format!(
        "it may run yet: `p2pit show job:{job}` says whether any keeper has it; do not submit it \
         again before that says that no node of the pool keeps it"
    ))
}

/// The union of what a job's ranks kept, brought to this node as the next job's input.
async fn continue_job(session: &Session, out: &Output, text: &str) -> anyhow::Result<Continued> {
    let found = Found::by_text(session, text).await?;
    let job = found.job();
    let view = found.view_to_read(session, &p2pit_protocol::message::Command::Files(job)).await?;
    let left = Left::gather(session, found.pool, &view).await?;
    if let Some(reason) = left.missing.first() {
        let message = format!("not all that job {} kept can be had: {reason}", short_job(job));
        return Err(Problem::broken(message).into());
    }
    for note in &left.notes {
        out.warn(note);
    }
    let keep = left.tree.subtree(&TreePath::from_bytes(KEEP)?).unwrap_or_default();
    left.pull(session, out, &keep).await?;
    let manifest = Bytes::from(keep.encode().context("what the job kept is too much")?);
    let root = BlobId::of(&manifest);
    let source = Arc::new(OneBlob { id: root, content: manifest });
    let _: Uploaded = session.client.post_blobs(path::UPLOAD, source, vec![root], |_| {}).await?;
    Ok(Continued { job, keep: root })
}

#[derive(Debug)]
struct OneBlob {
    id: BlobId,
    content: Bytes,
}

impl Source for OneBlob {
    fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>> {
        let content = || Box::new(io::Cursor::new(self.content.clone()));
        let size = self.content.len() as u64;
        Ok((*id == self.id).then(|| OpenBlob::Content { size, content: content() }))
    }
}

#[cfg(test)]
mod tests {
    use crate::{problem::explain, status::Status};

    use super::*;

    #[test]
    fn what_cannot_be_submitted_is_the_users_to_mend_unless_the_disk_is_broken() {
        let unreadable = |kind: io::ErrorKind| snapshot::Error::Unreadable {
            path: "/data/x".into(),
            source: kind.into(),
        };
        let special = snapshot::Error::Special { path: "/data/x".into(), what: "socket" };
        for error in [special, unreadable(io::ErrorKind::PermissionDenied)] {
            let (status, explanation) = explain(&blame(error));
            let explanation = explanation.unwrap();
            assert_eq!(status, Status::FAILED);
            assert!(explanation.message.contains("`/data/x`"), "{explanation:?}");
            assert!(explanation.hint.unwrap().contains(".pitignore"));
        }
        let (status, _) = explain(&blame(unreadable(io::ErrorKind::Other)));
        assert_eq!(status, Status::BROKEN);
    }

    #[test]
    fn a_request_that_never_fits_is_answered_with_the_nearest_that_does() {
        let nearest = Some("2:[2:v100]".to_owned());
        let reason = "no node has 8 v100".to_owned();
        let problem = refuse(&"2:[8:v100]".parse().unwrap(), &Unsatisfiable { reason, nearest });
        let (_, explanation) = explain(&problem.into());
        let hint = explanation.unwrap().hint.unwrap();
        assert_eq!(hint, "the nearest request that fits is `2:[2:v100]`");
    }
}
