//! The directory that a user submits, as a tree.
//!
//! Taken are all files that are not ignored, as they are on disk: `.gitignore` (in a
//! checkout also those above it, `.git/info/exclude` and the global excludes) and
//! `.pitignore` decide. What git tracks is taken even if `.gitignore` matches it, as
//! git itself would; `.pitignore` has the last word. `.git` is never taken, that of a
//! submodule neither; a submodule's files are. Links stay links.

mod git;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use bytes::Bytes;
use ignore::{WalkBuilder, gitignore::Gitignore};
use p2pit_protocol::BlobId;
use rustix::fs::{FileType, OFlags, Stat, fstat};
use thiserror::Error;

use super::{
    beneath::{self, Descent},
    exchange::{OpenBlob, Source},
    store::{BUFFER_BYTES, read_some},
    tree::{self, ENTRIES_MAX, Entry, Kind, LinkTarget, PathError, Tree, TreePath},
    workers,
};

pub use git::GitInfo;

/// Patterns for p2pit alone, in the syntax of `.gitignore`.
const IGNORE_FILE: &str = ".pitignore";

#[derive(Debug, Clone)]
pub struct SnapshotOptions {
    /// The git program. Where it does not run, a checkout is walked like any directory
    /// and no git information is given.
    pub git: OsString,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self { git: "git".into() }
    }
}

/// A directory as it was, hashed but not copied: the files stay where they are.
#[derive(Debug)]
pub struct Snapshot {
    pub tree: Tree,
    pub manifest: Vec<u8>,
    /// The blob of the manifest.
    pub root: BlobId,
    /// One file per distinct blob, ascending by blob.
    pub files: Vec<SnapshotFile>,
    pub git: Option<GitInfo>,
    /// What the user should know although the snapshot could be taken.
    pub notes: Vec<String>,
}

/// A file whose content is a blob of the snapshot, as long as it does not change.
#[derive(Debug, Clone)]
pub struct SnapshotFile {
    pub blob: BlobId,
    pub path: PathBuf,
    pub size: u64,
    stamp: Stamp,
}

/// Why a directory cannot be submitted as it is.
#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot read `{path}`")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("`{path}` is a {what}, which cannot be submitted")]
    Special { path: PathBuf, what: &'static str },
    #[error("`{path}` keeps changing while it is read")]
    Changing { path: PathBuf },
    #[error("`{path}` cannot be submitted under its name")]
    Path { path: PathBuf, source: PathError },
    #[error("`{dir}` has more than {ENTRIES_MAX} files that are not ignored")]
    TooManyEntries { dir: PathBuf },
    #[error("no manifest of `{dir}`")]
    Tree { dir: PathBuf, source: tree::Error },
}

/// Walks and hashes `dir`. Blocks.
pub fn snapshot(dir: &Path, options: &SnapshotOptions) -> Result<Snapshot, Error> {
    let unreadable = |source| Error::Unreadable { path: dir.to_owned(), source };
    let dir = dir.canonicalize().map_err(unreadable)?;
    let checkout = git::is_inside_checkout(&dir);
    thread::scope(|scope| {
        // Git answers while we walk and hash.
        let (dir, program) = (&dir, &options.git);
        let info = checkout.then(|| scope.spawn(|| git::info(program, dir)));
        let tracked = checkout.then(|| scope.spawn(|| git::tracked(program, dir)));
        let mut walk = Walk::new(dir);
        walk.run(checkout)?;
        let mut failure = None;
        match tracked.map(join) {
            Some(Ok(paths)) => walk.add_tracked(&paths)?,
            Some(Err(note)) => failure = Some(note),
            None => {}
        }
        let files = walk.hash()?;
        let git = match info.map(join) {
            Some(Ok(info)) => Some(info),
            Some(Err(note)) => {
                // Where both questions fail it is for one reason.
                failure.get_or_insert(note);
                None
            }
            None => None,
        };
        let mut notes = walk.notes;
        notes.extend(failure);
        assemble(dir, walk.entries, files, git, notes)
    })
}

impl Snapshot {
    /// Serves the blobs of this snapshot, the manifest among them.
    pub fn source(&self) -> SnapshotSource {
        let files = self.files.iter().map(|file| (file.blob, file.clone())).collect();
        let manifest = (self.root, Bytes::from(self.manifest.clone()));
        SnapshotSource { shared: Arc::new(Shared { files, manifest }) }
    }

    /// All blobs of the snapshot with their sizes, the manifest first.
    pub fn blobs(&self) -> Vec<(BlobId, u64)> {
        let files = self.files.iter().map(|file| (file.blob, file.size));
        [(self.root, self.manifest.len() as u64)].into_iter().chain(files).collect()
    }
}

/// The files of a snapshot, read where they are when they are sent.
#[derive(Debug, Clone)]
pub struct SnapshotSource {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    files: BTreeMap<BlobId, SnapshotFile>,
    manifest: (BlobId, Bytes),
}

impl Source for SnapshotSource {
    fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>> {
        let (manifest_id, manifest) = &self.shared.manifest;
        if id == manifest_id {
            let size = manifest.len() as u64;
            let content = Box::new(io::Cursor::new(manifest.clone()));
            return Ok(Some(OpenBlob::Content { size, content }));
        }
        let Some(file) = self.shared.files.get(id) else { return Ok(None) };
        let content = UnchangedFile::open(file)?;
        Ok(Some(OpenBlob::Content { size: file.size, content: Box::new(content) }))
    }
}

/// A file of a snapshot being sent. The last bytes are withheld if it is no longer what
/// was hashed, so that the receiver is never left with content that it must refuse.
struct UnchangedFile {
    file: File,
    path: PathBuf,
    stamp: Stamp,
    left: u64,
}

impl UnchangedFile {
    fn open(file: &SnapshotFile) -> io::Result<Self> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let opened = File::options()
            .read(true)
            .custom_flags(flags)
            .open(&file.path)
            .map_err(|error| named(&file.path, &error))?;
        let unchanged =
            Self { file: opened, path: file.path.clone(), stamp: file.stamp, left: file.size };
        unchanged.check()?;
        Ok(unchanged)
    }

    fn check(&self) -> io::Result<()> {
        if Stamp::of(&fstat(&self.file)?) == self.stamp {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "`{}` has changed since it was submitted",
            self.path.display()
        )))
    }
}

impl Read for UnchangedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = read_some(&mut self.file, &mut buffer[..wanted])
            .map_err(|error| named(&self.path, &error))?;
        self.left -= read as u64;
        if self.left == 0 || read == 0 {
            self.check()?;
        }
        Ok(read)
    }
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot read `{}`: {error}", path.display()))
}

/// What shows that a file has been written to or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(state: &Stat) -> Self {
        Self {
            device: state.st_dev,
            inode: state.st_ino,
            size: state.st_size,
            modified: (state.st_mtime, state.st_mtime_nsec.cast_signed()),
            changed: (state.st_ctime, state.st_ctime_nsec.cast_signed()),
        }
    }
}

/// The first pass: what there is to take.
struct Walk<'a> {
    dir: &'a Path,
    /// Links and empty directories.
    entries: Vec<Entry>,
    files: Vec<(TreePath, u64)>,
    seen: BTreeSet<TreePath>,
    notes: Vec<String>,
}

impl<'a> Walk<'a> {
    fn new(dir: &'a Path) -> Self {
        Self { dir, entries: vec![], files: vec![], seen: BTreeSet::new(), notes: vec![] }
    }

    fn run(&mut self, checkout: bool) -> Result<(), Error> {
        let walk = WalkBuilder::new(self.dir)
            .standard_filters(false)
            .git_ignore(true)
            .git_exclude(checkout)
            .git_global(checkout)
            .require_git(false)
            // Above a directory that is no checkout, ignore files mean something else.
            .parents(checkout)
            .add_custom_ignore_filename(IGNORE_FILE)
            .follow_links(false)
            .filter_entry(|entry| entry.file_name() != ".git")
            .build();
        for found in walk {
            let found = found.map_err(|error| self.walk_error(&error))?;
            if let Some(error) = found.error() {
                self.notes.push(error.to_string());
            }
            if found.depth() == 0 {
                if !found.path().is_dir() {
                    let source = io::ErrorKind::NotADirectory.into();
                    return Err(Error::Unreadable { path: self.dir.to_owned(), source });
                }
                continue;
            }
            let path = found.path();
            let relative = path.strip_prefix(self.dir).unwrap_or(path);
            let tree_path = TreePath::from_path(relative)
                .map_err(|source| Error::Path { path: path.to_owned(), source })?;
            self.take(tree_path)?;
        }
        Ok(())
    }

    /// Adds what git tracks although the walk passed it over.
    fn add_tracked(&mut self, paths: &[Vec<u8>]) -> Result<(), Error> {
        let mut rules = PitIgnores::new(self.dir);
        let mut descent = Descent::new(self.dir)
            .map_err(|source| Error::Unreadable { path: self.dir.to_owned(), source })?;
        for bytes in paths {
            // Git's index may hold what is no path below here; then the walk has it.
            let Ok(path) = TreePath::from_bytes(&bytes[..]) else { continue };
            if self.seen.contains(&path) || rules.ignore(&path) {
                continue;
            }
            let (parents, name) = path.split();
            let state = descent.enter(&parents).and_then(|dir| beneath::state(dir, name));
            // Deleted on disk, or below what is now a link: not there to be taken. A
            // submodule stands in the index as a directory.
            let Ok(state) = state else { continue };
            if !beneath::is(&state, FileType::Directory) {
                self.take(path)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, path: TreePath) -> Result<(), Error> {
        let full = self.dir.join(path.as_path());
        let unreadable = |source| Error::Unreadable { path: full.clone(), source };
        if self.seen.len() >= ENTRIES_MAX {
            return Err(Error::TooManyEntries { dir: self.dir.to_owned() });
        }
        let state = rustix::fs::lstat(&full).map_err(|errno| unreadable(errno.into()))?;
        match FileType::from_raw_mode(state.st_mode) {
            FileType::RegularFile => {
                self.files.push((path.clone(), u64::try_from(state.st_size).unwrap_or(0)));
            }
            FileType::Symlink => {
                let target = rustix::fs::readlink(&full, Vec::new())
                    .map_err(|errno| unreadable(errno.into()))?;
                let target = LinkTarget::from_bytes(target.into_bytes())
                    .map_err(|source| Error::Path { path: full.clone(), source })?;
                self.entries.push(Entry { path: path.clone(), kind: Kind::Symlink { target } });
            }
            FileType::Directory => {
                // Only what is empty on disk: a directory of ignored files is not.
                if full.read_dir().map_err(unreadable)?.next().is_none() {
                    self.entries.push(Entry { path: path.clone(), kind: Kind::Dir });
                }
            }
            other => {
                let what = beneath::special_name(other);
                return Err(Error::Special { path: full, what });
            }
        }
        self.seen.insert(path);
        Ok(())
    }

    fn hash(&self) -> Result<Vec<Hashed>, Error> {
        let bytes = self.files.iter().map(|(_, size)| size).sum();
        let parts = workers::in_parts(self.files.len(), bytes, |part| {
            let mut descent = Descent::new(self.dir)
                .map_err(|source| Error::Unreadable { path: self.dir.to_owned(), source })?;
            let mut buffer = vec![0; BUFFER_BYTES];
            let mut hash = |(path, _): &(TreePath, u64)| {
                Hashed::read(self.dir, &mut descent, path, &mut buffer)
            };
            self.files[part].iter().map(&mut hash).collect::<Result<Vec<_>, _>>()
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    fn walk_error(&self, error: &ignore::Error) -> Error {
        let mut path = self.dir.to_owned();
        let mut inner = error;
        loop {
            match inner {
                ignore::Error::WithPath { path: at, err } => {
                    path.clone_from(at);
                    inner = err;
                }
                ignore::Error::WithDepth { err, .. }
                | ignore::Error::WithLineNumber { err, .. } => {
                    inner = err;
                }
                _ => break,
            }
        }
        let kind = inner.io_error().map_or(io::ErrorKind::Other, io::Error::kind);
        Error::Unreadable { path, source: io::Error::new(kind, inner.to_string()) }
    }
}

/// The `.pitignore` files on the way to a path, read once each.
struct PitIgnores<'a> {
    dir: &'a Path,
    rules: BTreeMap<PathBuf, Gitignore>,
}

impl<'a> PitIgnores<'a> {
    fn new(dir: &'a Path) -> Self {
        Self { dir, rules: BTreeMap::new() }
    }

    /// The nearest file with an opinion decides, as in git; an ignored directory takes
    /// all below it along.
    fn ignore(&mut self, path: &TreePath) -> bool {
        let full = self.dir.join(path.as_path());
        let mut at = Some(full.as_path());
        while let Some(inner) = at.filter(|inner| *inner != self.dir) {
            let is_dir = inner != full;
            for outer in inner.ancestors().skip(1).take_while(|a| a.starts_with(self.dir)) {
                let rules = self
                    .rules
                    .entry(outer.to_owned())
                    .or_insert_with(|| Gitignore::new(outer.join(IGNORE_FILE)).0);
                match rules.matched(inner, is_dir) {
                    ignore::Match::Ignore(_) => return true,
                    ignore::Match::Whitelist(_) => break,
                    ignore::Match::None => {}
                }
            }
            at = inner.parent();
        }
        false
    }
}

struct Hashed {
    entry: Entry,
    file: SnapshotFile,
}

impl Hashed {
    fn read(
        dir: &Path,
        descent: &mut Descent,
        path: &TreePath,
        buffer: &mut [u8],
    ) -> Result<Self, Error> {
        // An editor saving at this moment is done by the second look.
        const TRIES_MAX: u32 = 3;
        let full = dir.join(path.as_path());
        let unreadable = |source| Error::Unreadable { path: full.clone(), source };
        for _ in 0..TRIES_MAX {
            let (parents, name) = path.split();
            let (mut file, before) = descent
                .enter(&parents)
                .and_then(|dir| beneath::open_file(dir, name))
                .map_err(unreadable)?;
            let mut hasher = blake3::Hasher::new();
            let mut size = 0;
            let size_max = u64::try_from(before.st_size).unwrap_or(0);
            // One byte more than it should have shows that it grows.
            while size <= size_max {
                match read_some(&mut file, buffer).map_err(unreadable)? {
                    0 => break,
                    read => {
                        hasher.update(&buffer[..read]);
                        size += read as u64;
                    }
                }
            }
            let after = fstat(&file).map_err(|errno| unreadable(errno.into()))?;
            let stamp = Stamp::of(&before);
            if stamp == Stamp::of(&after) && size == size_max {
                let blob = BlobId(*hasher.finalize().as_bytes());
                let executable = before.st_mode & 0o111 != 0;
                let kind = Kind::File { blob, size, executable };
                let entry = Entry { path: path.clone(), kind };
                return Ok(Self { entry, file: SnapshotFile { blob, path: full, size, stamp } });
            }
        }
        Err(Error::Changing { path: full })
    }
}

fn assemble(
    dir: &Path,
    mut entries: Vec<Entry>,
    hashed: Vec<Hashed>,
    git: Option<GitInfo>,
    notes: Vec<String>,
) -> Result<Snapshot, Error> {
    let unencodable = |source| Error::Tree { dir: dir.to_owned(), source };
    let mut files = Vec::with_capacity(hashed.len());
    for Hashed { entry, file } in hashed {
        entries.push(entry);
        files.push(file);
    }
    files.sort_by_key(|file: &SnapshotFile| file.blob);
    files.dedup_by_key(|file| file.blob);
    let tree = Tree::new(entries).map_err(unencodable)?;
    let manifest = tree.encode().map_err(unencodable)?;
    let root = BlobId::of(&manifest);
    Ok(Snapshot { tree, manifest, root, files, git, notes })
}

fn join<T>(handle: thread::ScopedJoinHandle<'_, T>) -> T {
    match handle.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
        process::Command,
    };

    use super::*;

    #[test]
    fn a_plain_directory_gives_its_files_minus_the_ignored() {
        let dir = Dir::new(&[
            (".gitignore", "*.o\n/build/\n"),
            (".pitignore", "*.mp4\n"),
            (".ignore", "main.c\n"),
            ("main.c", "int main;"),
            ("main.o", "object"),
            ("movie.mp4", "large"),
            ("build/x", "x"),
            ("sub/.gitignore", "secret\n"),
            ("sub/secret", "s"),
            ("sub/.env", "hidden"),
            ("only-ignored/a.o", "a"),
        ]);
        fs::create_dir(dir.at("empty")).unwrap();
        symlink("../outside", dir.at("link")).unwrap();
        let snapshot = dir.snapshot().unwrap();
        assert_eq!(
            paths(&snapshot),
            [
                ".gitignore",
                ".ignore",
                ".pitignore",
                "empty",
                "link",
                "main.c",
                "sub/.env",
                "sub/.gitignore"
            ]
        );
        assert_eq!(snapshot.root, BlobId::of(&snapshot.manifest));
        assert_eq!(Tree::decode(&snapshot.manifest).unwrap(), snapshot.tree);
        assert!(snapshot.git.is_none());
        assert_eq!(snapshot.files.len(), 6);
        assert_eq!(dir.snapshot().unwrap().root, snapshot.root);
    }

    #[test]
    fn ignore_files_above_a_plain_directory_do_not_count() {
        let dir = Dir::new(&[(".gitignore", "*\n"), ("sub/file", "f")]);
        let inner = snapshot(&dir.at("sub"), &SnapshotOptions::default()).unwrap();
        assert_eq!(paths(&inner), ["file"]);
    }

    #[test]
    fn a_checkout_gives_what_git_tracks_and_what_is_not_ignored() {
        let Some(dir) = Dir::checkout(&[
            (".gitignore", "*.bin\nlogs/\n"),
            ("tracked.bin", "kept by force"),
            ("logs/kept.txt", "kept by force"),
            ("gone", "deleted later"),
            ("src/main.py", "print()"),
        ]) else {
            return;
        };
        dir.git(&["add", "-f", "."]);
        dir.git(&["commit", "-qm", "first"]);
        dir.git(&["remote", "add", "origin", "https://me:token@example.org/lab/code.git"]);
        fs::remove_file(dir.at("gone")).unwrap();
        fs::write(dir.at("src/main.py"), "print(1)\nprint(2)\n").unwrap();
        fs::write(dir.at("untracked.py"), "new").unwrap();
        fs::write(dir.at("ignored.bin"), "new").unwrap();
        fs::write(dir.at("excluded"), "new").unwrap();
        fs::write(dir.at(".git/info/exclude"), "excluded\n").unwrap();

        let snapshot = dir.snapshot().unwrap();
        assert_eq!(
            paths(&snapshot),
            [".gitignore", "logs/kept.txt", "src/main.py", "tracked.bin", "untracked.py"]
        );
        let git = snapshot.git.unwrap();
        assert_eq!(git.remote.as_deref(), Some("https://example.org/lab/code.git"));
        assert_eq!(git.commit.map(|commit| commit.len()), Some(40));
        assert_eq!(git.branch.as_deref(), Some("trunk"));
        // One line out, two in, and the one of the deleted file.
        assert_eq!((git.diff_lines, git.untracked), (4, 1));
        assert!(snapshot.notes.is_empty(), "{:?}", snapshot.notes);
    }

    #[test]
    fn pitignore_holds_for_tracked_files_too() {
        let Some(dir) = Dir::checkout(&[
            (".pitignore", "data/\n*.ckpt\n!best.ckpt\n"),
            ("data/large", "l"),
            ("last.ckpt", "l"),
            ("best.ckpt", "b"),
            ("code.py", "c"),
        ]) else {
            return;
        };
        dir.git(&["add", "-f", "."]);
        assert_eq!(paths(&dir.snapshot().unwrap()), [".pitignore", "best.ckpt", "code.py"]);
    }

    #[test]
    fn a_part_of_a_checkout_obeys_the_ignore_files_above_it() {
        let Some(dir) =
            Dir::checkout(&[(".gitignore", "*.o\n"), ("sub/a.o", "o"), ("sub/a.c", "c")])
        else {
            return;
        };
        let inner = snapshot(&dir.at("sub"), &SnapshotOptions::default()).unwrap();
        assert_eq!(paths(&inner), ["a.c"]);
        assert_eq!(inner.git.unwrap().untracked, 1);
    }

    #[test]
    fn a_submodules_files_are_taken_and_its_git_directory_is_not() {
        let (Some(library), Some(dir)) =
            (Dir::checkout(&[("lib.py", "lib")]), Dir::checkout(&[("main.py", "main")]))
        else {
            return;
        };
        library.git(&["add", "."]);
        library.git(&["commit", "-qm", "library"]);
        let url = library.root.path().to_str().unwrap();
        dir.git(&["-c", "protocol.file.allow=always", "submodule", "add", "-q", url, "vendor"]);
        fs::write(dir.at("vendor/patched.py"), "on disk only").unwrap();
        let snapshot = dir.snapshot().unwrap();
        assert_eq!(
            paths(&snapshot),
            [".gitmodules", "main.py", "vendor/lib.py", "vendor/patched.py"]
        );
    }

    #[test]
    fn without_the_git_program_a_checkout_is_walked_and_that_is_said() {
        let Some(dir) = Dir::checkout(&[(".gitignore", "*.o\n"), ("a.o", "o"), ("a.c", "c")])
        else {
            return;
        };
        let options = SnapshotOptions { git: "/nonexistent/git".into() };
        let snapshot = snapshot(dir.root.path(), &options).unwrap();
        assert_eq!(paths(&snapshot), [".gitignore", "a.c"]);
        assert!(snapshot.git.is_none());
        assert_eq!(snapshot.notes.len(), 1);
        assert!(snapshot.notes[0].contains("/nonexistent/git"), "{:?}", snapshot.notes);
    }

    #[test]
    fn a_socket_in_the_tree_is_refused_by_name() {
        let dir = Dir::new(&[("a", "a")]);
        let _socket = UnixListener::bind(dir.at("sock")).unwrap();
        let error = dir.snapshot().unwrap_err();
        assert!(error.to_string().contains("sock` is a socket"), "{error}");
        fs::write(dir.at(".pitignore"), "sock\n").unwrap();
        assert!(dir.snapshot().is_ok());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let absent = snapshot(Path::new("/nonexistent/dir"), &SnapshotOptions::default());
        assert!(absent.unwrap_err().to_string().contains("/nonexistent/dir"));
        let dir = Dir::new(&[("file", "f")]);
        let file = snapshot(&dir.at("file"), &SnapshotOptions::default());
        assert!(file.unwrap_err().to_string().contains("file`"));
        // Root reads everything, so this part is for everybody else.
        fs::set_permissions(dir.at("file"), fs::Permissions::from_mode(0o000)).unwrap();
        if File::open(dir.at("file")).is_err() {
            let error = dir.snapshot().unwrap_err();
            assert!(matches!(error, Error::Unreadable { path, .. } if path.ends_with("file")));
        }
    }

    #[test]
    fn a_file_that_never_is_what_it_says_is_given_up_by_name() {
        // The kernel says of this file that it is empty, and then it is not.
        let dir = Path::new("/proc/self");
        let mut descent = Descent::new(dir).unwrap();
        let path = TreePath::from_bytes("status").unwrap();
        let error = Hashed::read(dir, &mut descent, &path, &mut [0; 4096]).err().unwrap();
        assert!(matches!(error, Error::Changing { path } if path.ends_with("status")));
    }

    #[test]
    fn names_that_are_not_utf8_are_taken_as_they_are() {
        let dir = Dir::new(&[]);
        fs::write(dir.root.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9")), "x").unwrap();
        let snapshot = dir.snapshot().unwrap();
        assert_eq!(snapshot.tree.entries()[0].path.as_bytes(), b"caf\xe9");
    }

    #[test]
    fn a_file_that_changed_after_the_snapshot_is_not_served() {
        let dir = Dir::new(&[("file", "before"), ("same", "same")]);
        let snapshot = dir.snapshot().unwrap();
        let source = snapshot.source();
        let read = |content: &[u8]| -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            let Some(OpenBlob::Content { mut content, .. }) = source.open(&BlobId::of(content))?
            else {
                panic!("not there, or not read as it is");
            };
            content.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        assert_eq!(read(b"before").unwrap(), b"before");
        assert_eq!(read(&snapshot.manifest).unwrap(), snapshot.manifest);
        fs::write(dir.at("file"), "afterwards").unwrap();
        let error = read(b"before").unwrap_err();
        assert!(error.to_string().contains("file` has changed"), "{error}");
        assert_eq!(read(b"same").unwrap(), b"same");
        assert!(source.open(&BlobId::of(b"unknown")).unwrap().is_none());
    }

    #[test]
    fn many_files_hash_the_same_as_one_by_one() {
        let dir = Dir::new(&[]);
        for i in 0..300_u32 {
            fs::write(dir.at(&format!("f{i:03}")), i.to_le_bytes()).unwrap();
        }
        fs::write(dir.at("copy"), 7_u32.to_le_bytes()).unwrap();
        let snapshot = dir.snapshot().unwrap();
        assert_eq!((snapshot.tree.file_count(), snapshot.files.len()), (301, 300));
        for (i, entry) in snapshot.tree.entries().iter().skip(1).enumerate() {
            let expected = BlobId::of(&(i as u32).to_le_bytes());
            assert!(matches!(entry.kind, Kind::File { blob, .. } if blob == expected));
        }
    }

    struct Dir {
        root: tempfile::TempDir,
    }

    impl Dir {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = Self { root: tempfile::tempdir().unwrap() };
            for (path, content) in files {
                fs::create_dir_all(dir.at(path).parent().unwrap()).unwrap();
                fs::write(dir.at(path), content).unwrap();
            }
            dir
        }

        /// `None` on a machine without git.
        fn checkout(files: &[(&str, &str)]) -> Option<Self> {
            Command::new("git").arg("--version").output().ok()?;
            let dir = Self::new(files);
            dir.git(&["init", "-q", "-b", "trunk"]);
            Some(dir)
        }

        fn git(&self, args: &[&str]) {
            let output = Command::new("git")
                .arg("-C")
                .arg(self.root.path())
                .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
                .args(["-c", "commit.gpgsign=false"])
                .args(args)
                .output()
                .unwrap();
            assert!(output.status.success(), "git {args:?}: {output:?}");
        }

        fn at(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn snapshot(&self) -> Result<Snapshot, Error> {
            snapshot(self.root.path(), &SnapshotOptions::default())
        }
    }

    fn paths(snapshot: &Snapshot) -> Vec<String> {
        snapshot.tree.entries().iter().map(|entry| entry.path.to_string()).collect()
    }
}
