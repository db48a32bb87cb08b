//! `p2pit cp`: files of a job to this machine.

use std::{
    cell::Cell,
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    pin::pin,
};

use anyhow::Context as _;
use p2pit_node::{
    api::is_disk_full,
    transfer::{
        BlobStore, MaterializeOptions, Tree, TreePath,
        materialize::{Existing, materialize},
        snapshot::STAGE_PREFIX,
        store,
        tree::{Entry, Kind},
        verified,
    },
};
use p2pit_protocol::{BlobId, JobId};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{Interrupts, ls};
use crate::{
    args::Globals, files::parse_path, output::Output, problem::Problem, session::Session,
    status::Status,
};

/// Copy a file or directory of a job to this machine
///
/// What is there already is never overwritten without --force. Content is verified. A copy
/// that was interrupted goes on where it stopped when the same command is given again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit cp @last artifacts results       a directory, as results/\n  \
    p2pit cp k3qz keep/model.pt            a file, into this directory\n  \
    p2pit cp k3qz keep/log.txt - | less    a file, to standard output\n  \
    p2pit cp -c @last keep keep            what an earlier copy did not bring")]
pub(crate) struct Args {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// A path as `p2pit ls` shows it; `.` is everything
    path: OsString,
    /// A directory to copy into, a new name, or `-` for standard output
    #[arg(default_value = ".")]
    dest: PathBuf,
    /// Overwrite files that are there
    #[arg(long, short)]
    force: bool,
    /// Leave files that are there with the job's content, and copy the others
    #[arg(long = "continue", short)]
    continues: bool,
}

/// How far a copy is: it decides what an interrupt does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Looking,
    Fetching,
    /// Files get their names, which is short and better not done by half.
    Writing,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let mut interrupts = Interrupts::new()?;
    let phase = Cell::new(Phase::Looking);
    let mut copying = pin!(copy(globals, out, args, &phase));
    tokio::select! {
        copied = &mut copying => return copied,
        status = interrupts.next() => match phase.get() {
            Phase::Looking => return Ok(status),
            Phase::Fetching => {
                out.note("interrupted: the same command goes on where it stopped");
                return Ok(status);
            }
            Phase::Writing => {}
        }
    }
    copying.await
}

async fn copy(
    globals: &Globals,
    out: &Output,
    args: Args,
    phase: &Cell<Phase>,
) -> anyhow::Result<Status> {
    let path = parse_path(Path::new(&args.path))?;
    let session = Session::open(globals, out).await?;
    let (_, left) = ls::gather(&session, out, &args.job).await?;
    let is_single = path.as_ref().is_some_and(|path| left.tree.get(path).is_some_and(is_leaf));
    let tree = left.at(path.as_ref())?;
    if args.dest == Path::new("-") {
        let stage = tempfile::Builder::new().prefix(STAGE_PREFIX).tempdir()?;
        let store = BlobStore::open(&stage.path().join("blobs"))?;
        let progress = out.progress("copying", tree.total_bytes());
        left.fetch(&session, &tree, &store, &progress).await?;
        progress.finish();
        write_to_stdout(out, &store, &tree, is_single)?;
        return Ok(Status::DONE);
    }
    refuse_new_directory(is_single, &args.dest)?;
    // As for `cp -r`, `keep/.` is what is in `keep`.
    let named = path.as_ref().filter(|_| is_single || !args.path.as_bytes().ends_with(b"/."));
    let target = Target::choose(named, is_single, &args.dest);
    let target = target.or_earlier_copy(&tree, is_single, &args.dest)?;
    let key = stage_key(left.job(), &args)?;
    let found = Stage::find(&key, &target)?;
    // What an earlier copy has written may make the same words mean another place.
    let recorded = found.as_ref().map(Stage::target).transpose()?.flatten();
    let target = recorded.unwrap_or(target);
    let was_writing = found.as_ref().is_some_and(Stage::was_writing);
    let tree = match (args.force, args.continues || was_writing) {
        (_, true) => {
            let (target, force) = (target.clone(), args.force);
            tokio::task::spawn_blocking(move || target.without_what_is_there(&tree, force))
                .await??
        }
        (false, false) => {
            target.refuse_existing(&tree)?;
            tree
        }
        (true, false) => tree,
    };
    let stage = match found {
        Some(stage) => {
            let (tree, target) = (tree.clone(), target.clone());
            tokio::task::spawn_blocking(move || {
                stage.check(&tree)?;
                stage.record(&target)?;
                anyhow::Ok(stage)
            })
            .await??
        }
        None => Stage::make(&key, &target)?,
    };
    let progress = out.progress("copying", tree.total_bytes());
    phase.set(Phase::Fetching);
    if let Err(reason) = left.fetch(&session, &tree, &stage.store, &progress).await {
        stage.leave()?;
        let hint = if is_disk_full(&reason) {
            "free some space on that disk, then give the same command again"
        } else {
            "the same command goes on where it stopped"
        };
        let message = format!("not everything came: {reason:#}");
        return Err(Problem::broken(message).hint(hint).into());
    }
    progress.finish();
    phase.set(Phase::Writing);
    tokio::task::spawn_blocking(move || {
        stage.begin_writing()?;
        target.write(&stage.store, &tree, args.force)?;
        stage.remove()
    })
    .await??;
    Ok(Status::DONE)
}

/// What the same command has in common with this one, if it is given again.
fn stage_key(job: JobId, args: &Args) -> anyhow::Result<String> {
    let here = std::env::current_dir().context("the working directory is not there any more")?;
    let words = [args.path.as_os_str(), args.dest.as_os_str(), here.as_os_str()];
    let words = words.map(|word| [word.as_bytes(), b"\0"].concat()).concat();
    Ok(BlobId::of(&[&job.0[..], &words].concat()).to_string().chars().take(16).collect())
}

/// Where content gathers before it gets its names: beside the destination, so that the
/// disk there is the one that must have room, and under a name that the same command
/// finds again. This user's alone, since that name is no secret.
#[derive(Debug)]
struct Stage {
    dir: PathBuf,
    store: BlobStore,
    _lock: fs::File,
}

impl Stage {
    const TARGET: &str = "target";
    const WRITING: &str = "writing";

    fn dir_in(beside: &Path, key: &str) -> PathBuf {
        beside.join(format!("{STAGE_PREFIX}{key}"))
    }

    /// What an earlier copy left, at `target` or above: there it was if the target is in
    /// what that copy has written.
    fn find(key: &str, target: &Target) -> anyhow::Result<Option<Self>> {
        let absolute = std::path::absolute(&target.dir)?;
        for beside in absolute.ancestors() {
            let dir = Self::dir_in(beside, key);
            if dir.symlink_metadata().is_ok() {
                return Self::open(dir).map(Some);
            }
        }
        Ok(None)
    }

    fn make(key: &str, target: &Target) -> anyhow::Result<Self> {
        let beside = target.existing_parent();
        let cannot = || format!("cannot write into {}", beside.display());
        let dir = Self::dir_in(&beside, key);
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(e).with_context(cannot);
            }
            // Another command may make it at the same time.
            Ok(()) | Err(_) => {}
        }
        let stage = Self::open(dir)?;
        stage.record(target)?;
        Ok(stage)
    }

    fn open(dir: PathBuf) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write into {}", dir.display());
        let state = fs::symlink_metadata(&dir).with_context(cannot)?;
        if !state.is_dir() || state.uid() != rustix::process::geteuid().as_raw() {
            let message = format!("`{}` is not a directory of yours", dir.display());
            return Err(Problem::request(message)
                .hint("name another destination, or have it removed")
                .into());
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).with_context(cannot)?;
        let lock = fs::File::create(dir.join("lock")).with_context(cannot)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
            return Err(Problem::request("the same command is at work already")
                .hint("wait for it, or end it")
                .into());
        }
        let store = BlobStore::open(&dir.join("blobs"))?;
        Ok(Self { dir, store, _lock: lock })
    }

    fn record(&self, Target { dir, name }: &Target) -> anyhow::Result<()> {
        let name = name.as_ref().map(|name| [b"\0", name.as_os_str().as_bytes()].concat());
        let bytes = [dir.as_os_str().as_bytes(), &name.unwrap_or_default()].concat();
        let new = self.dir.join("target.new");
        let written = fs::write(&new, bytes);
        let placed = written.and_then(|()| fs::rename(&new, self.dir.join(Self::TARGET)));
        placed.with_context(|| format!("cannot write {}", new.display()))
    }

    /// Where the copy that made this goes; `None` where it ended before it said so.
    fn target(&self) -> anyhow::Result<Option<Target>> {
        let path = self.dir.join(Self::TARGET);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        let mut parts = bytes.split(|byte| *byte == 0).map(|part| OsStr::from_bytes(part).into());
        // Without a directory, it was lost with the power.
        let dir = parts.next().filter(|dir: &PathBuf| !dir.as_os_str().is_empty());
        Ok(dir.map(|dir| Target { dir, name: parts.next() }))
    }

    /// From now on, what has the job's content at the target may be this copy's.
    fn begin_writing(&self) -> anyhow::Result<()> {
        let path = self.dir.join(Self::WRITING);
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(())
    }

    fn was_writing(&self) -> bool {
        self.dir.join(Self::WRITING).exists()
    }

    /// Removes what has gone bad, as when the power failed before it was on the disk: it
    /// would become a file unseen.
    fn check(&self, tree: &Tree) -> anyhow::Result<()> {
        for blob in tree.blobs().into_keys().filter(|blob| self.store.has(blob)) {
            match self.store.check(&blob) {
                Ok(()) | Err(store::Error::Corrupt(_)) => {}
                Err(reason) => return Err(reason.into()),
            }
        }
        Ok(())
    }

    /// Removes it if nothing came and nothing was written.
    fn leave(self) -> anyhow::Result<()> {
        if self.store.is_empty()? && !self.was_writing() { self.remove() } else { Ok(()) }
    }

    fn remove(self) -> anyhow::Result<()> {
        let dir = self.dir;
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
    }
}

/// As `cp`: a file is not put into a directory that would have to be made for it.
fn refuse_new_directory(is_single: bool, dest: &Path) -> Result<(), Problem> {
    if !is_single || !dest.as_os_str().as_bytes().ends_with(b"/") || dest.is_dir() {
        return Ok(());
    }
    let message = format!("there is no directory `{}`", dest.display());
    Err(Problem::request(message)
        .hint("make it first, or leave out the `/` for a file of that name"))
}

fn is_leaf(entry: &Entry) -> bool {
    entry.kind != Kind::Dir
}

/// Where something goes: a directory, and for a single file its name in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    dir: PathBuf,
    name: Option<PathBuf>,
}

impl Target {
    /// As `cp -r`: into a directory that is there, else under the name given.
    fn choose(path: Option<&TreePath>, is_single: bool, dest: &Path) -> Self {
        let own_name = path.map(|path| {
            let name = path.as_path().file_name().unwrap_or(path.as_path().as_os_str());
            PathBuf::from(name)
        });
        match (is_single, dest.is_dir()) {
            (true, true) => Self { dir: dest.to_owned(), name: own_name },
            (true, false) => {
                let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty());
                Self {
                    dir: parent.unwrap_or(Path::new(".")).to_owned(),
                    name: dest.file_name().map(PathBuf::from).or(own_name),
                }
            }
            (false, true) => {
                let dir = own_name.map_or_else(|| dest.to_owned(), |name| dest.join(name));
                Self { dir, name: None }
            }
            (false, false) => Self { dir: dest.to_owned(), name: None },
        }
    }

    /// Where an earlier copy made `dest` itself, that is where this one goes: else the same
    /// command, given twice, would make a second copy inside the first.
    fn or_earlier_copy(self, tree: &Tree, is_single: bool, dest: &Path) -> anyhow::Result<Self> {
        if is_single || self.dir == dest || self.dir.symlink_metadata().is_ok() {
            return Ok(self);
        }
        let earlier = Self { dir: dest.to_owned(), name: None };
        for entry in tree.entries().iter().filter(|entry| is_leaf(entry)) {
            if is_there(&earlier.path_of(entry), &entry.kind)? == Some(true) {
                return Ok(earlier);
            }
        }
        Ok(self)
    }

    /// Looks before anything is brought; what appears meanwhile is not overwritten either.
    fn refuse_existing(&self, tree: &Tree) -> anyhow::Result<()> {
        for entry in tree.entries().iter().filter(|entry| is_leaf(entry)) {
            let path = self.path_of(entry);
            if path.symlink_metadata().is_ok() {
                return Err(exists(&path));
            }
        }
        Ok(())
    }

    fn path_of(&self, entry: &Entry) -> PathBuf {
        match &self.name {
            Some(name) => self.dir.join(name),
            None => self.dir.join(entry.path.as_path()),
        }
    }

    /// What an earlier copy has not brought. Other content is only overwritten by force.
    fn without_what_is_there(&self, tree: &Tree, force: bool) -> anyhow::Result<Tree> {
        let mut left = Vec::new();
        for entry in tree.entries() {
            let path = self.path_of(entry);
            match is_there(&path, &entry.kind)? {
                Some(true) => {}
                Some(false) if !force => return Err(differs(&path)),
                Some(false) | None => left.push(entry.clone()),
            }
        }
        Ok(Tree::new(left)?)
    }

    fn existing_parent(&self) -> PathBuf {
        let existing = self.dir.ancestors().find(|dir| dir.is_dir());
        let named = existing.filter(|dir| !dir.as_os_str().is_empty());
        named.unwrap_or(Path::new(".")).to_owned()
    }

    fn write(&self, store: &BlobStore, tree: &Tree, force: bool) -> anyhow::Result<()> {
        let renamed;
        let tree = match (&self.name, tree.entries()) {
            (Some(name), [entry]) => {
                let path = TreePath::from_path(name)?;
                renamed = Tree::new(vec![Entry { path, kind: entry.kind.clone() }])?;
                &renamed
            }
            _ => tree,
        };
        let existing = if force { Existing::Replace } else { Existing::Keep };
        let options = MaterializeOptions { existing, owner: None, consume: true };
        match materialize(store, tree, &self.dir, &options) {
            Err(p2pit_node::transfer::materialize::Error::Exists(path)) => Err(exists(&path)),
            result => Ok(result?),
        }
    }
}

/// Whether what is at `path` is `kind`, if there is something.
fn is_there(path: &Path, kind: &Kind) -> anyhow::Result<Option<bool>> {
    let state = match path.symlink_metadata() {
        Ok(state) => state,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot look at {}", path.display())),
    };
    let cannot_read = || format!("cannot read {}", path.display());
    Ok(Some(match kind {
        Kind::Dir => state.is_dir(),
        Kind::Symlink { target } => {
            state.is_symlink()
                && fs::read_link(path).with_context(cannot_read)?.as_os_str().as_bytes()
                    == target.as_bytes()
        }
        Kind::File { blob, size, .. } => {
            state.is_file() && state.len() == *size && {
                let file = fs::File::open(path).with_context(cannot_read)?;
                verified::hash(file, *size).with_context(cannot_read)?.0 == *blob
            }
        }
    }))
}

/// With `--continue`, where what is there is not what the job has.
fn differs(path: &Path) -> anyhow::Error {
    Problem::request(format!("`{}` is there already and is not what the job has", path.display()))
        .hint("`--force` overwrites such files; another name leaves them")
        .into()
}

fn exists(path: &Path) -> anyhow::Error {
    Problem::request(format!("`{}` is there already", path.display()))
        .hint(
            "`--force` overwrites files, `--continue` leaves those that are the job's; another \
             name leaves them all",
        )
        .into()
}

fn write_to_stdout(
    out: &Output,
    store: &BlobStore,
    tree: &Tree,
    is_single: bool,
) -> anyhow::Result<()> {
    let blob = match tree.entries() {
        [Entry { kind: Kind::File { blob, .. }, .. }] if is_single => blob,
        _ => {
            return Err(Problem::request("only a file can be written to standard output")
                .hint("`p2pit download JOB -o -` writes everything as a .tar.gz")
                .into());
        }
    };
    copy_to_stdout(out, store.open_blob(blob)?)
}

pub(super) fn copy_to_stdout(out: &Output, mut file: fs::File) -> anyhow::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match io::Read::read(&mut file, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => out.data(&buffer[..read])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("cannot read what was fetched"),
        }
    }
}

/// Whether `path` may be written anew.
pub(super) fn refuse_existing_file(path: &Path, force: bool) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(_) if !force => Err(Problem::request(format!("`{}` is there already", path.display()))
            .hint("`--force` overwrites it; another name leaves it")
            .into()),
        Ok(_) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use p2pit_node::transfer::tree::LinkTarget;

    fn path(text: &str) -> TreePath {
        TreePath::from_bytes(text).unwrap()
    }

    fn target(dir: impl AsRef<Path>, name: Option<&str>) -> Target {
        Target { dir: dir.as_ref().to_owned(), name: name.map(PathBuf::from) }
    }

    #[test]
    fn a_copy_goes_into_a_directory_that_is_there_or_under_a_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let (keep, new) = (path("keep/d"), dir.join("new"));
        assert_eq!(Target::choose(Some(&keep), true, dir), target(dir, Some("d")));
        assert_eq!(Target::choose(Some(&keep), true, &new), target(dir, Some("new")));
        assert_eq!(Target::choose(Some(&keep), false, dir), target(dir.join("d"), None));
        assert_eq!(Target::choose(Some(&keep), false, &new), target(&new, None));
        assert_eq!(Target::choose(None, false, dir), target(dir, None));
        assert_eq!(Target::choose(Some(&keep), true, Path::new("x")), target(".", Some("x")));
        assert!(refuse_new_directory(true, &new.join("")).is_err());
        for (is_single, dest) in [(true, dir.join("")), (true, new.clone()), (false, new.join(""))]
        {
            assert_eq!(refuse_new_directory(is_single, &dest), Ok(()), "{}", dest.display());
        }
        assert_eq!(target(new.join("deep"), None).existing_parent(), dir);
    }

    #[test]
    fn the_same_copy_again_goes_to_where_the_first_went_and_not_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (keep, results) = (path("keep"), dir.path().join("results"));
        let kind = Kind::File { blob: BlobId::of(b"new"), size: 3, executable: false };
        let tree = Tree::new(vec![Entry { path: path("d/a"), kind }]).unwrap();
        let choose = || {
            let chosen = Target::choose(Some(&keep), false, &results);
            chosen.or_earlier_copy(&tree, false, &results).unwrap()
        };
        assert_eq!(choose(), target(&results, None));
        fs::create_dir_all(results.join("d")).unwrap();
        assert_eq!(choose(), target(results.join("keep"), None), "somebody's own directory");
        fs::write(results.join("d/a"), "old").unwrap();
        assert_eq!(choose(), target(results.join("keep"), None), "with something else in it");
        fs::write(results.join("d/a"), "new").unwrap();
        assert_eq!(choose(), target(&results, None), "an earlier copy");
        assert!(choose().refuse_existing(&tree).is_err());
        // Into a directory that holds several copies.
        fs::create_dir(results.join("keep")).unwrap();
        assert_eq!(choose(), target(results.join("keep"), None));
    }

    #[test]
    fn a_copy_cut_short_while_it_writes_goes_on_to_where_it_went() {
        let dir = tempfile::tempdir().unwrap();
        let (keep, results) = (path("keep"), dir.path().join("results"));
        let choose = || Target::choose(Some(&keep), false, &results);
        let chosen = choose();
        assert!(Stage::find("key", &chosen).unwrap().is_none());
        let stage = Stage::make("key", &chosen).unwrap();
        assert_eq!(fs::metadata(&stage.dir).unwrap().mode() & 0o777, 0o700);
        assert!(!stage.was_writing());
        let busy = Stage::find("key", &chosen).unwrap_err().to_string();
        assert!(busy.contains("at work already"), "{busy}");
        stage.begin_writing().unwrap();
        fs::create_dir(&results).unwrap();
        stage.leave().unwrap();
        assert_ne!(choose(), chosen);
        assert!(Stage::find("other", &choose()).unwrap().is_none());
        let stage = Stage::find("key", &choose()).unwrap().unwrap();
        assert_eq!(stage.target().unwrap(), Some(chosen));
        assert!(stage.was_writing());
        for recorded in [target("d", Some("n")), target(".", None)] {
            stage.record(&recorded).unwrap();
            assert_eq!(stage.target().unwrap(), Some(recorded));
        }
        fs::write(stage.dir.join(Stage::TARGET), [0; 9]).unwrap();
        assert!(stage.target().unwrap().is_none());
        stage.remove().unwrap();
        assert!(Stage::find("key", &choose()).unwrap().is_none());
    }

    #[test]
    fn what_went_bad_before_a_copy_goes_on_is_brought_again() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::make("key", &target(dir.path(), None)).unwrap();
        let entry = |name: &str| {
            let blob = stage.store.put_bytes(name.as_bytes()).unwrap();
            let kind = Kind::File { blob, size: name.len() as u64, executable: false };
            (blob, Entry { path: path(name), kind })
        };
        let ((good, a), (bad, b)) = (entry("good"), entry("bad"));
        let tree = Tree::new(vec![a, b]).unwrap();
        fs::write(stage.store.path_of(&bad), [0; 3]).unwrap();
        stage.check(&tree).unwrap();
        assert_eq!((stage.store.has(&good), stage.store.has(&bad)), (true, false));
    }

    #[test]
    fn content_does_not_gather_in_what_is_somebody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let target = target(dir.path(), None);
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let place = Stage::dir_in(dir.path(), "key");
        std::os::unix::fs::symlink(&elsewhere, &place).unwrap();
        let refused = || {
            for result in
                [Stage::find("key", &target).map(drop), Stage::make("key", &target).map(drop)]
            {
                let reason = result.unwrap_err();
                assert!(reason.downcast_ref::<Problem>().unwrap().is_request(), "{reason:#}");
            }
        };
        refused();
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&place, Some(12345), None).unwrap();
            refused();
        }
    }

    #[test]
    fn nothing_is_overwritten_unless_forced() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
        let blob = store.put_bytes(b"new").unwrap();
        assert_eq!(blob, BlobId::of(b"new"));
        let kind = Kind::File { blob, size: 3, executable: false };
        let tree = Tree::new(vec![Entry { path: path("a"), kind }]).unwrap();
        let dest = dir.path().join("dest");
        fs::create_dir(&dest).unwrap();
        fs::write(dest.join("b"), "old").unwrap();
        let as_b = target(&dest, Some("b"));
        assert!(as_b.refuse_existing(&tree).unwrap_err().to_string().contains("there already"));
        assert!(as_b.write(&store, &tree, false).is_err());
        assert_eq!(fs::read(dest.join("b")).unwrap(), b"old");
        as_b.write(&store, &tree, true).unwrap();
        assert_eq!(fs::read(dest.join("b")).unwrap(), b"new");
        let beside = target(&dest, None);
        beside.refuse_existing(&tree).unwrap();
        store.put_bytes(b"new").unwrap();
        beside.write(&store, &tree, false).unwrap();
        assert_eq!(fs::read(dest.join("a")).unwrap(), b"new");
    }

    #[test]
    fn going_on_brings_what_is_not_there_and_spares_what_is_somebody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let (blob, size) = (BlobId::of(content), content.len() as u64);
            Entry { path: path(name), kind: Kind::File { blob, size, executable: false } }
        };
        let link = Kind::Symlink { target: LinkTarget::from_bytes("there").unwrap() };
        let link = Entry { path: path("link"), kind: link };
        let entries = vec![file("same", b"same"), file("sub/new", b"new"), file("x", b"12"), link];
        let tree = Tree::new(entries).unwrap();
        fs::write(dir.path().join("same"), "same").unwrap();
        std::os::unix::fs::symlink("there", dir.path().join("link")).unwrap();
        let target = target(dir.path(), None);
        let left = |force| -> anyhow::Result<Vec<String>> {
            let left = target.without_what_is_there(&tree, force)?;
            Ok(left.entries().iter().map(|entry| entry.path.to_string()).collect())
        };
        assert_eq!(left(false).unwrap(), ["sub/new", "x"]);
        fs::write(dir.path().join("x"), "21").unwrap();
        assert!(left(false).unwrap_err().to_string().contains("x` is there already"));
        assert_eq!(left(true).unwrap(), ["sub/new", "x"]);
    }
}
