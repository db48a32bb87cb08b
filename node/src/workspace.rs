//! The directories of one rank, from its assignment to what it leaves.
//!
//! ```text
//! <home>/jobs/JOB/ATTEMPT-RANK/
//!     src/        the submitted directory; the process starts here
//!     keep/       kept when the process ends; starts as what a continued job kept
//!     artifacts/  kept as well, beside the paths below src/ that the job names
//!     tmp/        the process's own scratch, with its HOME and the result file
//!     log         what the process and the daemon said; stays
//!     port        the port this node keeps free for the job
//!     collected.json   what the rank left, once it is in the store; stays
//!     save.json        the last copy of keep/ that was taken while it ran; stays
//! <home>/data/
//!     shared/     the same for every job of this node, read-only
//!     users/USER/ writable by the jobs of one owner
//! ```
//!
//! A rank goes through [`Workspace::prepare`], [`Workspace::process_spec`],
//! [`Workspace::collect`] and [`Workspace::clean`], or ends early with
//! [`Workspace::discard`]. Each may be repeated after a crash of the daemon. All calls
//! but `process_spec` block.
//!
//! What is below these directories belongs to a job that may be hostile, while the daemon
//! may be root: nothing of it is opened through a link. The directory of the rank itself
//! is the daemon's; a job writes only inside the four.

mod collect;
mod environment;
mod port;
mod remove;
mod save;
mod script;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use p2pit_protocol::{
    BlobId, PeerId, UserId,
    bidder::WorkId,
    job::{self, RankAssignment, VerifiedSpec},
};
use thiserror::Error;
use tracing::warn;

pub use self::{
    collect::{Collected, FilesError, LiveFiles},
    remove::Residue,
    save::{Save, Saving},
    script::ScriptError,
};
use crate::{
    executor::{
        self, Deadline, Isolation, LOG_BYTES_MAX, ProcessSpec, RunAs, SandboxPlan, append_to_log,
        prepare_ownership,
    },
    transfer::{
        BlobStore, MaterializeOptions, Tree,
        materialize::{self, materialize},
        store,
        tree::{self, MANIFEST_BYTES_MAX},
    },
};

/// The log's name in a rank's directory.
pub const LOG_NAME: &str = "log";

const SRC: &str = "src";
const KEEP: &str = "keep";
const ARTIFACTS: &str = "artifacts";
const TMP: &str = "tmp";
const PORT: &str = "port";
/// All that a job can write, apart from its owner's directory.
const OF_JOB: [&str; 4] = [SRC, KEEP, ARTIFACTS, TMP];

/// The directories of one rank of one attempt.
#[derive(Debug, Clone)]
pub struct Workspace {
    id: WorkId,
    dir: PathBuf,
    data: PathBuf,
    /// Who owns what the job may write; `None` where jobs keep the daemon's user.
    run_as: Option<RunAs>,
}

/// What a rank has once it is prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Free on this node and the job's own until [`Workspace::clean`] or
    /// [`Workspace::discard`].
    pub port: u16,
}

/// What a rank that is tried again begins with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resumed {
    /// What an earlier attempt kept, which is in the store.
    pub keep: Option<BlobId>,
    /// For the log: where that is from, or why there is none.
    pub notes: Vec<String>,
}

/// All ranks of an attempt, as every one of them is told.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gang<'a> {
    /// Each rank's node, in rank order.
    pub nodes: &'a [PeerId],
    /// The address of each rank's node, in rank order.
    pub hosts: &'a [String],
    /// Free on rank 0's node.
    pub port: u16,
}

/// What things are called that a job knows by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// The owner's.
    pub username: String,
}

/// How this machine keeps jobs from the rest of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPolicy {
    pub isolation: Isolation,
    /// Not to be seen by jobs, besides the homes of people: the daemon's home.
    pub hidden: Vec<PathBuf>,
}

/// Who says a line of a log that no process said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    Daemon,
    Prepare,
    Clean,
}

impl fmt::Display for Speaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Daemon => "daemon",
            Self::Prepare => "prepare",
            Self::Clean => "clean",
        })
    }
}

/// Why a rank cannot run on this node.
#[derive(Debug, Error)]
pub enum PrepareError {
    #[error("cannot {doing} `{path}`")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("the {input} is not here")]
    Missing { input: &'static str, source: store::Error },
    #[error("the {input}, tree {tree}, is damaged")]
    Manifest { input: &'static str, tree: BlobId, source: tree::Error },
    #[error("cannot write the {input}")]
    Write { input: &'static str, source: materialize::Error },
    #[error("what an earlier preparation left is in the way")]
    Residue(#[source] Residue),
    #[error("cannot give the directories to the user that jobs run as")]
    Ownership(#[source] anyhow::Error),
    #[error("no free port for the job")]
    Port(#[source] io::Error),
    #[error(transparent)]
    Script(ScriptError),
}

impl PrepareError {
    /// Whether content is not here, or not any more, so that it can be brought again.
    pub(crate) fn lacks_content(&self) -> bool {
        match self {
            Self::Missing { source, .. }
            | Self::Write { source: materialize::Error::Content { source, .. }, .. } => {
                matches!(source, store::Error::Corrupt(_) | store::Error::Missing(_))
            }
            Self::Write { source, .. } => matches!(source, materialize::Error::Corrupt { .. }),
            _ => false,
        }
    }

    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

/// Lets jobs reach their directories where no sandbox shows them: a daemon that is root
/// runs jobs as another user, who then passes through the home, without being able to
/// list it. To be called once, before the first job is prepared.
pub fn admit_jobs(jobs_root: &Path, isolation: &Isolation) -> io::Result<()> {
    if isolation.is_isolated() || RunAs::for_this_daemon().is_none() {
        return Ok(());
    }
    for dir in [Some(jobs_root), jobs_root.parent()].into_iter().flatten() {
        let mode = fs::metadata(dir)?.mode();
        fs::set_permissions(dir, Permissions::from_mode(mode | 0o011))?;
    }
    Ok(())
}

impl Workspace {
    /// The directories of `id` below `jobs_root`, `<home>/jobs`. Nothing is made yet.
    #[must_use]
    pub fn at(jobs_root: &Path, id: WorkId) -> Self {
        let rank = format!("{}-{}", id.attempt, id.rank);
        Self {
            id,
            dir: jobs_root.join(id.job.to_string()).join(rank),
            data: jobs_root.with_file_name("data"),
            run_as: RunAs::for_this_daemon(),
        }
    }

    /// The rank's own directory. What else the daemon puts there, it removes itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.dir.join(LOG_NAME)
    }

    /// The size of the log now; 0 where there is none.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        std::fs::metadata(self.log_path()).map_or(0, |metadata| metadata.len())
    }

    /// Adds lines to the rank's log.
    pub fn log(&self, speaker: Speaker, text: &str) -> io::Result<()> {
        append_to_log(&self.log_path(), &speaker.to_string(), text)
    }

    /// Makes everything that the process needs. Where there was something before, of a
    /// preparation that a crash cut short, it begins anew; the port stays if it can. `keep/`
    /// is that of `resumed`, else of the job that this one continues, else empty.
    pub fn prepare(
        &self,
        store: &BlobStore,
        spec: &VerifiedSpec,
        assignment: &RankAssignment,
        resumed: Option<&Resumed>,
    ) -> Result<Prepared, PrepareError> {
        let port_before = port::remembered(&self.dir.join(PORT));
        self.discard().map_err(PrepareError::Residue)?;
        self.make_directories(spec.spec.owner)?;
        self.say(&self.describe(spec, assignment))?;

        let code = self.write_input(store, "code", spec.spec.code, SRC)?;
        for note in resumed.iter().flat_map(|resumed| &resumed.notes) {
            self.say(note)?;
        }
        if let Some(keep) = resumed.and_then(|resumed| resumed.keep) {
            self.write_input(store, "kept files", keep, KEEP)?;
        } else if let Some(continued) = &spec.spec.continues {
            self.say(&format!("continues job {}", continued.job))?;
            self.write_input(store, "kept files", continued.keep, KEEP)?;
        }
        if spec.spec.command == job::Command::Script {
            let notes = script::make_runnable(store, &code, &self.dir.join(SRC), self.owner())
                .map_err(PrepareError::Script)?;
            for note in notes {
                self.say(&note)?;
            }
        }
        for name in environment::refused(self, spec, assignment) {
            self.say(&format!("{name} is set by the pool: the job's own value is not used"))?;
        }
        let port = port::reserve(&self.dir, port_before).map_err(PrepareError::Port)?;
        let path = self.dir.join(PORT);
        fs::write(&path, format!("{port}\n")).map_err(PrepareError::io("write", &path))?;
        self.say(&format!("prepared; port {port} is the job's own on this node"))?;
        Ok(Prepared { port })
    }

    /// What to start, once every rank is prepared.
    #[must_use]
    pub fn process_spec(
        &self,
        spec: &VerifiedSpec,
        assignment: &RankAssignment,
        gang: &Gang<'_>,
        names: &Names,
        policy: &HostPolicy,
    ) -> ProcessSpec {
        let command = match &spec.spec.command {
            job::Command::Script => executor::Command::Script { path: script::NAME.into() },
            job::Command::Direct(text) => executor::Command::Direct { text: text.clone() },
        };
        ProcessSpec {
            command,
            work_dir: self.dir.join(SRC),
            job_dir: self.dir.join(KEEP),
            tmp_dir: self.dir.join(TMP),
            writable: vec![self.dir.join(ARTIFACTS), self.user_dir(spec.spec.owner)],
            read_only: vec![self.shared_dir()],
            env: environment::of(self, spec, assignment, gang, names),
            log_path: self.log_path(),
            log_bytes_max: LOG_BYTES_MAX,
            time_limit_ms: spec.spec.time_limit_ms,
            // The lease is none of the workspace's business: who starts the process knows it.
            deadline: Deadline(None),
            grace_ms: spec.spec.grace.0,
            run_as: self.run_as,
            isolation: policy.isolation.clone(),
            sandbox: SandboxPlan::for_host(policy.hidden.iter().cloned()),
        }
    }

    /// Removes what the job wrote, once it is collected. The log stays.
    pub fn clean(&self) -> Result<(), Residue> {
        let mut result = Ok(());
        for name in OF_JOB.iter().chain([&PORT]) {
            result = result.and(remove::tree(&self.dir.join(name)));
        }
        port::release(&self.dir);
        let text = match &result {
            Ok(()) => "directories are removed".to_owned(),
            Err(residue) => format!("{residue}: {}", residue.source),
        };
        self.say_if_possible(Speaker::Clean, &text);
        result
    }

    /// Whether there is anything for [`Workspace::clean`] to remove.
    #[must_use]
    pub fn is_unclean(&self) -> bool {
        OF_JOB.iter().any(|name| self.dir.join(name).symlink_metadata().is_ok())
    }

    /// Removes all but the log, for a rank that never ran.
    pub fn discard(&self) -> Result<(), Residue> {
        port::release(&self.dir);
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Residue { path: self.dir.clone(), source }),
        };
        let mut result = Ok(());
        for entry in entries {
            let removed = match entry {
                Ok(entry) if entry.file_name() == LOG_NAME => Ok(()),
                Ok(entry) => remove::tree(&entry.path()),
                Err(source) => Err(Residue { path: self.dir.clone(), source }),
            };
            result = result.and(removed);
        }
        result
    }

    fn make_directories(&self, owner: UserId) -> Result<(), PrepareError> {
        // Passed through by the job's user, where that is another.
        let passage = if self.run_as.is_some() { 0o711 } else { 0o700 };
        let job_dir = self.dir.parent().unwrap_or(&self.dir);
        let users = self.data.join("users");
        let user_dir = self.user_dir(owner);
        for dir in [job_dir, &self.dir, &self.data, &users] {
            make_dir(dir, passage)?;
            set_mode(dir, passage)?;
        }
        make_dir(&self.shared_dir(), 0o755)?;
        make_dir(&user_dir, 0o700)?;
        if let Some((uid, gid)) = self.owner() {
            std::os::unix::fs::lchown(&user_dir, Some(uid), Some(gid))
                .map_err(PrepareError::io("change the owner of", &user_dir))?;
        }
        let of_job = OF_JOB.map(|name| self.dir.join(name));
        for dir in of_job.iter().chain([&self.home_dir()]) {
            make_dir(dir, 0o700)?;
        }
        prepare_ownership(&of_job, self.run_as).map_err(PrepareError::Ownership)
    }

    fn write_input(
        &self,
        store: &BlobStore,
        input: &'static str,
        root: BlobId,
        name: &str,
    ) -> Result<Tree, PrepareError> {
        let manifest = store
            .read(&root, MANIFEST_BYTES_MAX)
            .map_err(|source| PrepareError::Missing { input, source })?;
        let tree = Tree::decode(&manifest).map_err(|source| PrepareError::Manifest {
            input,
            tree: root,
            source,
        })?;
        let options = MaterializeOptions { owner: self.owner(), ..MaterializeOptions::default() };
        materialize(store, &tree, &self.dir.join(name), &options)
            .map_err(|source| PrepareError::Write { input, source })?;
        let (files, bytes) = (tree.file_count(), tree.total_bytes());
        self.say(&format!("{input}: {files} files, {bytes} bytes, in {name}/"))?;
        Ok(tree)
    }

    fn describe(&self, spec: &VerifiedSpec, assignment: &RankAssignment) -> String {
        let WorkId { job, attempt, rank } = self.id;
        let count = spec.spec.rank_count();
        let grant = &assignment.grant;
        let gpus = match environment::gpu_list(grant) {
            gpus if gpus.is_empty() => "no GPU".to_owned(),
            gpus => gpus,
        };
        let cores = grant.cpu_cores;
        format!("job {job}, attempt {attempt}, rank {rank} of {count}: {gpus}, {cores} CPU cores")
    }

    fn say(&self, text: &str) -> Result<(), PrepareError> {
        let path = self.log_path();
        self.log(Speaker::Prepare, text).map_err(PrepareError::io("write", &path))
    }

    /// Where there is nothing to be done about a log that cannot be written.
    fn say_if_possible(&self, speaker: Speaker, text: &str) {
        if let Err(error) = self.log(speaker, text) {
            warn!(path = %self.log_path().display(), %error, text, "not in the log");
        }
    }

    fn owner(&self) -> Option<(u32, u32)> {
        self.run_as.map(|ids| (ids.uid, ids.gid))
    }

    /// The user whose files are the job's.
    fn uid(&self) -> u32 {
        self.run_as.map_or_else(|| rustix::process::geteuid().as_raw(), |ids| ids.uid)
    }

    fn home_dir(&self) -> PathBuf {
        self.dir.join(TMP).join("home")
    }

    /// Where the process puts the short text that is shown as its result.
    fn result_path(&self) -> PathBuf {
        self.dir.join(TMP).join("result")
    }

    fn shared_dir(&self) -> PathBuf {
        self.data.join("shared")
    }

    /// By the key and not by the name, which may change and pass to somebody else.
    fn user_dir(&self, owner: UserId) -> PathBuf {
        self.data.join("users").join(owner.to_string())
    }
}

/// A directory of this mode, whatever the umask; one that is there already keeps its own.
fn make_dir(path: &Path, mode: u32) -> Result<(), PrepareError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => set_mode(path, mode),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(PrepareError::io("make", path)(error)),
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), PrepareError> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(PrepareError::io("set the mode of", path))
}
