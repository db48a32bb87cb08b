//! What keeps blobs on this node: the one place that lists it.
//!
//! A blob stays as long as a tree of any of these kinds names it:
//!
//! | kind | where it is found |
//! |---|---|
//! | inputs of jobs that are not over | the records kept here, the work promised here |
//! | inputs of finished jobs | the records kept here; at need they go |
//! | what ranks left, and what a retry begins with | the records kept here |
//! | what this node is to hold | `copies_wanted` of the records kept here |
//! | what ranks left here | `*.json` in `jobs/JOB/ATTEMPT-RANK/` |
//! | copies of what ranks left elsewhere | `*.json` in `copies/JOB/ATTEMPT-RANK/` |
//! | trees that were brought for a submission | memory, for a day |
//!
//! What is under way otherwise is relied on: see `transfer::store`. Of a job whose data was
//! removed, or has expired, nothing keeps anything.

use std::{fs, io, path::Path};

use p2pit_protocol::{
    BlobId, JobId, Peer,
    job::State,
    record::{Body, Kept},
};

use crate::home::Home;

/// A tree, and what keeps it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Root {
    pub(super) tree: BlobId,
    pub(super) kind: Kind,
}

/// See the module's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Input(JobId),
    InputOfFinished(JobId),
    Result(JobId),
    Saved(JobId),
    Wanted(JobId),
    Left(JobId),
    Copy(JobId),
    Pushed,
}

impl Kind {
    /// For messages: what a tree of this kind is.
    pub(super) fn describe(self) -> String {
        let of = |job: JobId| format!("of job {}", short(job));
        match self {
            Self::Input(job) | Self::InputOfFinished(job) => format!("an input {}", of(job)),
            Self::Result(job) | Self::Left(job) => format!("what is left {}", of(job)),
            Self::Saved(job) => format!("a copy of keep/ {}", of(job)),
            Self::Wanted(job) | Self::Copy(job) => format!("a copy {}", of(job)),
            Self::Pushed => "an input of a submission".to_owned(),
        }
    }

    pub(super) fn job(self) -> Option<JobId> {
        match self {
            Self::Input(job)
            | Self::InputOfFinished(job)
            | Self::Result(job)
            | Self::Saved(job)
            | Self::Wanted(job)
            | Self::Left(job)
            | Self::Copy(job) => Some(job),
            Self::Pushed => None,
        }
    }
}

/// A list of trees on the disk that cannot be read: what it names is not known.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) job: JobId,
    pub(super) reason: String,
}

/// Whether what a finished job left may go from this node by its record.
pub(super) fn is_given_up(body: &Body, keep_done_ms: u64, wall_ms: u64) -> Option<Dropped> {
    if body.state() != State::Done {
        return None;
    }
    if body.removed.is_some() {
        return Some(Dropped::Removed);
    }
    let ended_ms = body.history.last().map_or(0, |change| change.at_ms);
    (ended_ms.saturating_add(keep_done_ms) <= wall_ms).then_some(Dropped::Expired)
}

/// Why a job's data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dropped {
    /// Its owner, or an admin, said so, and may take that back.
    Removed,
    /// It is older than `keep_done`.
    Expired,
}

/// What the records and the work of this node keep.
pub(super) fn of_peer(peer: &Peer, keep_done_ms: u64, wall_ms: u64) -> Vec<Root> {
    let mut roots = Vec::new();
    for (job, kept) in peer.records() {
        if is_given_up(&kept.value.body, keep_done_ms, wall_ms).is_none() {
            of_record(*job, kept, &mut roots);
            of_order(*job, peer, &mut roots);
        }
    }
    for job in peer.working_for() {
        if let Some(spec) = peer.work_spec(job) {
            roots.extend(spec.inputs().map(|tree| Root { tree, kind: Kind::Input(job) }));
        }
    }
    roots
}

fn of_record(job: JobId, kept: &Kept, roots: &mut Vec<Root>) {
    let body = &kept.value.body;
    let input = match body.state() {
        State::Done => Kind::InputOfFinished(job),
        _ => Kind::Input(job),
    };
    roots.extend(kept.spec.inputs().map(|tree| Root { tree, kind: input }));
    let ends = body.ranks.iter().filter_map(|rank| rank.end.as_ref());
    let results = ends.flat_map(|end| end.keep.into_iter().chain(end.artifacts));
    roots.extend(results.map(|tree| Root { tree, kind: Kind::Result(job) }));
    roots.extend(body.saved.iter().map(|saved| Root { tree: saved.tree, kind: Kind::Saved(job) }));
}

fn of_order(job: JobId, peer: &Peer, roots: &mut Vec<Root>) {
    let Some(order) = peer.copies_wanted(job) else { return };
    let ends = order.ranks.iter().filter_map(|rank| rank.end);
    let of_ends = ends.flat_map(|end| end.keep.into_iter().chain(end.artifacts));
    let saves = order.ranks.iter().filter_map(|rank| rank.save).map(|save| save.tree);
    let trees = of_ends.chain(saves).chain(order.saved.iter().map(|saved| saved.tree));
    roots.extend(trees.map(|tree| Root { tree, kind: Kind::Wanted(job) }));
}

/// What is named on the disk, and the lists that cannot be read.
pub(super) fn on_disk(home: &Home) -> io::Result<(Vec<Root>, Vec<Unreadable>)> {
    let (mut roots, mut unreadable) = (Vec::new(), Vec::new());
    type OfJob = fn(JobId) -> Kind;
    for (dir, kind) in [(home.jobs(), Kind::Left as OfJob), (home.copies(), Kind::Copy as OfJob)] {
        for job in jobs_in(&dir)? {
            for list in lists_below(&dir.join(job.to_string()))? {
                match named_in(&list) {
                    Ok(trees) => {
                        roots.extend(trees.into_iter().map(|tree| Root { tree, kind: kind(job) }));
                    }
                    // Its directory went meanwhile.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => {
                        let reason = format!("{} cannot be read: {e}", list.display());
                        unreadable.push(Unreadable { job, reason });
                    }
                }
            }
        }
    }
    Ok((roots, unreadable))
}

/// The jobs that have a directory in `dir`.
pub(super) fn jobs_in(dir: &Path) -> io::Result<Vec<JobId>> {
    let names = names_in(dir)?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

/// The names in `dir` that are texts; none where there is no such directory.
pub(super) fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Every list of trees in the directories of a job's ranks. The directories that belong to the
/// job itself are not looked into.
fn lists_below(job_dir: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    let mut lists = Vec::new();
    for name in names_in(job_dir)? {
        let rank_dir = job_dir.join(name);
        if !rank_dir.is_dir() {
            continue;
        }
        for name in names_in(&rank_dir)? {
            if name.ends_with(".json") {
                lists.push(rank_dir.join(name));
            }
        }
    }
    Ok(lists)
}

/// All ids in a list, whatever it calls them: so a list of a later version keeps what it names.
fn named_in(list: &Path) -> io::Result<Vec<BlobId>> {
    let value: serde_json::Value =
        serde_json::from_slice(&fs::read(list)?).map_err(io::Error::other)?;
    let mut trees = Vec::new();
    collect_ids(&value, &mut trees);
    Ok(trees)
}

fn collect_ids(value: &serde_json::Value, ids: &mut Vec<BlobId>) {
    match value {
        serde_json::Value::String(text) => ids.extend(text.parse::<BlobId>()),
        serde_json::Value::Array(values) => values.iter().for_each(|it| collect_ids(it, ids)),
        serde_json::Value::Object(fields) => fields.values().for_each(|it| collect_ids(it, ids)),
        _ => {}
    }
}

pub(super) fn short(job: JobId) -> String {
    job.to_string().chars().take(8).collect()
}
