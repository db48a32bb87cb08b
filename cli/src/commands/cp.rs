//! `p2pit cp`: files of a job to this machine.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use p2pit_node::transfer::{
    BlobStore, MaterializeOptions, Tree, TreePath,
    materialize::{Existing, materialize},
    tree::{Entry, Kind},
};

use super::ls;
use crate::{
    args::Globals, files::parse_path, output::Output, problem::Problem, session::Session,
    status::Status,
};

/// Copy a file or directory of a job to this machine
///
/// What is there already is never overwritten without --force. Content is verified.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit cp @last artifacts results       a directory, as results/\n  \
    p2pit cp k3qz keep/model.pt            a file, into this directory\n  \
    p2pit cp k3qz keep/log.txt - | less    a file, to standard output")]
pub(crate) struct Args {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// A path as `p2pit ls` shows it; `.` is everything
    path: String,
    /// A directory to copy into, a new name, or `-` for standard output
    #[arg(default_value = ".")]
    dest: PathBuf,
    /// Overwrite files that are there
    #[arg(long, short)]
    force: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let path = parse_path(&args.path)?;
    let session = Session::open(globals, out).await?;
    let (_, left) = ls::gather(&session, out, &args.job).await?;
    let is_single = path.as_ref().is_some_and(|path| left.tree.get(path).is_some_and(is_leaf));
    let tree = left.at(path.as_ref())?;
    let to_stdout = args.dest == Path::new("-");
    let target = if to_stdout {
        None
    } else {
        refuse_new_directory(is_single, &args.dest)?;
        // As for `cp -r`, `keep/.` is what is in `keep`.
        let named = path.as_ref().filter(|_| is_single || !args.path.ends_with("/."));
        let target = Target::choose(named, is_single, &args.dest);
        if !args.force {
            target.refuse_existing(&tree)?;
        }
        Some(target)
    };
    // Beside the destination, so that the disk there is the one that must have room.
    let beside = target.as_ref().map_or_else(std::env::temp_dir, Target::existing_parent);
    let stage = tempfile::Builder::new()
        .prefix(".p2pit-cp-")
        .tempdir_in(&beside)
        .with_context(|| format!("cannot write into {}", beside.display()))?;
    let store = BlobStore::open(&stage.path().join("blobs"))?;
    let progress = out.progress("copying", tree.total_bytes());
    left.fetch(&session, &tree, &store, &progress).await?;
    progress.finish();
    match target {
        Some(target) => {
            tokio::task::spawn_blocking(move || {
                let result = target.write(&store, &tree, args.force);
                drop(stage);
                result
            })
            .await??;
        }
        None => write_to_stdout(out, &store, &tree, is_single)?,
    }
    Ok(Status::DONE)
}

/// As `cp`: a file is not put into a directory that would have to be made for it.
fn refuse_new_directory(is_single: bool, dest: &Path) -> Result<(), Problem> {
    use std::os::unix::ffi::OsStrExt as _;
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
#[derive(Debug, PartialEq, Eq)]
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

    /// Looks before anything is brought; what appears meanwhile is not overwritten either.
    fn refuse_existing(&self, tree: &Tree) -> anyhow::Result<()> {
        for entry in tree.entries().iter().filter(|entry| is_leaf(entry)) {
            let path = match &self.name {
                Some(name) => self.dir.join(name),
                None => self.dir.join(entry.path.as_path()),
            };
            if path.symlink_metadata().is_ok() {
                return Err(exists(&path));
            }
        }
        Ok(())
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
        let options = MaterializeOptions { existing, owner: None };
        match materialize(store, tree, &self.dir, &options) {
            Err(p2pit_node::transfer::materialize::Error::Exists(path)) => Err(exists(&path)),
            result => Ok(result?),
        }
    }
}

fn exists(path: &Path) -> anyhow::Error {
    Problem::request(format!("`{}` is there already", path.display()))
        .hint("`--force` overwrites files; another name leaves them")
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
        Ok(_) if !force => Err(exists(path)),
        Ok(_) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::BlobId;

    use super::*;

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
        beside.write(&store, &tree, false).unwrap();
        assert_eq!(fs::read(dest.join("a")).unwrap(), b"new");
    }
}
