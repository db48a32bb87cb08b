//! The directory that a user submits, as a tree.
//!
//! Taken are all files that are not ignored, as they are on disk: `.gitignore` (in a
//! checkout also those above it, `.git/info/exclude` and the global excludes) and
//! `.pitignore` decide. What git tracks is taken even if `.gitignore` matches it, as
//! git itself would; `.pitignore` has the last word. `.git` is never taken, that of a
//! submodule neither; a submodule's files are. Links stay links.
//!
//! It is done in two passes: a walk that says what there is to take, and then several
//! threads that look at each file and read those whose hash is not remembered (module `cache`).
//! A file that changes while it is read is read again, and given up by name; one that
//! vanishes is left out with a note.

mod cache;
mod git;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use bytes::Bytes;
use ignore::{WalkBuilder, gitignore::Gitignore};
use p2pit_protocol::BlobId;
use rustix::{
    fs::{FileType, OFlags, Stat, Statx, StatxTimestamp, fstat, makedev},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    beneath::{self, Descent},
    exchange::{OpenBlob, Source},
    holes::{self, Piece, Pieces},
    store::BUFFER_BYTES,
    tree::{self, ENTRIES_MAX, Entry, Kind, LinkTarget, PathError, Tree, TreePath},
    workers,
};

use cache::{Clock, HashCache};
pub use git::GitInfo;

/// How directories and files are called in which a copy from the pool gathers.
pub const STAGE_PREFIX: &str = ".p2pit-stage-";
/// Patterns for p2pit alone, in the syntax of `.gitignore`.
const IGNORE_FILE: &str = ".pitignore";

#[derive(Debug, Clone)]
pub struct SnapshotOptions {
    /// The git program. Where it does not run, a checkout is walked like any directory
    /// and no git information is given.
    pub git: OsString,
    /// Where hashes of files are remembered, so that those that did not change need not be
    /// read again; made if it is not there. Absent, every file is read.
    pub hashes: Option<PathBuf>,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self { git: "git".into(), hashes: None }
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
    snapshot_by(dir, options, &Clock::now)
}

fn snapshot_by(
    dir: &Path,
    options: &SnapshotOptions,
    clock: &(dyn Fn() -> io::Result<Clock> + Sync),
) -> Result<Snapshot, Error> {
    let unreadable = |source| Error::Unreadable { path: dir.to_owned(), source };
    let dir = dir.canonicalize().map_err(unreadable)?;
    let top = git::top_of_checkout(&dir);
    let checkout = top.is_some();
    let start = clock();
    thread::scope(|scope| {
        // Git answers while we walk and hash.
        let (dir, program) = (&dir, &options.git);
        let info = checkout.then(|| scope.spawn(|| git::info(program, dir)));
        let tracked = checkout.then(|| scope.spawn(|| git::tracked(program, dir)));
        let hashes = options.hashes.as_ref().map(|hashes| {
            scope.spawn(move || start.map(|start| HashCache::load(hashes, dir, start)))
        });
        let mut walk = Walk::new(dir);
        walk.run(top, top.and_then(|_| git::excludes(program, dir)))?;
        let mut failure = None;
        match tracked.map(join) {
            Some(Ok(paths)) => walk.add_tracked(&paths, checkout)?,
            Some(Err(note)) => failure = Some(note),
            None => {}
        }
        let Walk { entries, files, mut notes, .. } = walk;
        let hashes = hashes.map(join).transpose().unwrap_or_else(|error| {
            notes.push(format!("hashes of files are not remembered: {error}"));
            None
        });
        let hashed = hash(dir, files, hashes.as_ref(), &mut notes)?;
        if let Some(hashes) = hashes {
            let files = hashed.iter().map(|Hashed { entry, file }| (&entry.path, file));
            let files = files.map(|(path, file)| (path, file.stamp, file.blob));
            let saved = clock().and_then(|end| hashes.save(&end, files));
            if let Err(error) = saved {
                notes.push(format!("hashes of files are not remembered: {error}"));
            }
        }
        let git = match info.map(join) {
            Some(Ok(info)) => Some(info),
            Some(Err(note)) => {
                // Where both questions fail it is for one reason.
                failure.get_or_insert(note);
                None
            }
            None => None,
        };
        notes.extend(failure);
        assemble(dir, entries, hashed, git, notes)
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
    pieces: Pieces<File>,
    path: PathBuf,
    stamp: Stamp,
    left: u64,
    /// Zeros that come next and need not be read.
    hole: u64,
}

impl UnchangedFile {
    fn open(file: &SnapshotFile) -> io::Result<Self> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let opened = File::options()
            .read(true)
            .custom_flags(flags)
            .open(&file.path)
            .map_err(|error| named(&file.path, &error))?;
        let unchanged = Self {
            pieces: Pieces::of(opened, file.size),
            path: file.path.clone(),
            stamp: file.stamp,
            left: file.size,
            hole: 0,
        };
        unchanged.check()?;
        Ok(unchanged)
    }

    fn check(&self) -> io::Result<()> {
        if Stamp::of(&fstat(self.pieces.file())?) == self.stamp {
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
        let buffer = &mut buffer[..wanted];
        let mut read = 0;
        if self.hole == 0 && wanted > 0 {
            let next = self.pieces.next(buffer).map_err(|error| named(&self.path, &error))?;
            match next {
                Some(Piece::Data(bytes)) => read = bytes.len(),
                Some(Piece::Hole(bytes)) => self.hole = bytes,
                None => {}
            }
        }
        if self.hole > 0 {
            read = wanted.min(usize::try_from(self.hole).unwrap_or(usize::MAX));
            buffer[..read].fill(0);
            self.hole -= read as u64;
        }
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds, here and below.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(state: &Stat) -> Self {
        Self {
            device: state.st_dev,
            inode: state.st_ino,
            size: u64::try_from(state.st_size).unwrap_or(0),
            modified: (state.st_mtime, state.st_mtime_nsec.cast_signed()),
            changed: (state.st_ctime, state.st_ctime_nsec.cast_signed()),
        }
    }

    fn of_statx(state: &Statx) -> Self {
        let time = |time: StatxTimestamp| (time.tv_sec, i64::from(time.tv_nsec));
        Self {
            device: makedev(state.stx_dev_major, state.stx_dev_minor),
            inode: state.stx_ino,
            size: state.stx_size,
            modified: time(state.stx_mtime),
            changed: time(state.stx_ctime),
        }
    }

    /// Of the file right inside `dir`, with its mode.
    fn look(dir: impl AsFd, name: &[u8]) -> io::Result<(Self, u32)> {
        match beneath::fresh_state(&dir, name) {
            Ok(state) => Ok((Self::of_statx(&state), u32::from(state.stx_mode))),
            Err(Errno::NOSYS) => {
                let state = beneath::state(dir, name)?;
                Ok((Self::of(&state), state.st_mode))
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Never taken, whatever the patterns say: git's own, and what `p2pit cp` is bringing.
fn is_passed_over(name: &OsStr) -> bool {
    name == ".git" || name.as_encoded_bytes().starts_with(STAGE_PREFIX.as_bytes())
}

/// The first pass: what there is to take.
struct Walk<'a> {
    dir: &'a Path,
    /// Links and empty directories.
    entries: Vec<Entry>,
    files: Vec<TreePath>,
    notes: Vec<String>,
}

impl<'a> Walk<'a> {
    fn new(dir: &'a Path) -> Self {
        Self { dir, entries: vec![], files: vec![], notes: vec![] }
    }

    /// `top` is the top of the checkout, `excludes` what git said about it.
    fn run(&mut self, top: Option<&Path>, excludes: Option<Vec<PathBuf>>) -> Result<(), Error> {
        let checkout = top.is_some();
        let mut walk = WalkBuilder::new(self.dir);
        walk.standard_filters(false)
            .git_ignore(true)
            .git_exclude(checkout)
            .git_global(checkout && excludes.is_none())
            // Patterns from outside the checkout are relative to its top.
            .current_dir(top.unwrap_or(self.dir))
            .require_git(false)
            // Above a directory that is no checkout, ignore files mean something else.
            .parents(checkout)
            .add_custom_ignore_filename(IGNORE_FILE)
            .follow_links(false)
            .filter_entry(|entry| !is_passed_over(entry.file_name()));
        for file in excludes.into_iter().flatten().filter(|file| file.is_file()) {
            if let Some(error) = walk.add_ignore(file) {
                self.notes.push(error.to_string());
            }
        }
        for found in walk.build() {
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
            match found.file_type() {
                Some(kind) if kind.is_file() => self.take(tree_path, FileType::RegularFile)?,
                Some(kind) if kind.is_dir() => self.take(tree_path, FileType::Directory)?,
                Some(_) | None => self.take_unknown(tree_path)?,
            }
        }
        Ok(())
    }

    /// Adds what git tracks although the walk passed it over.
    fn add_tracked(&mut self, paths: &[Vec<u8>], checkout: bool) -> Result<(), Error> {
        let walked = self.files.iter().chain(self.entries.iter().map(|entry| &entry.path));
        let walked: BTreeSet<&[u8]> = walked.map(TreePath::as_bytes).collect();
        let passed_over = paths.iter().filter(|path| !walked.contains(&path[..]));
        let passed_over: BTreeSet<&Vec<u8>> = passed_over.collect();
        let mut rules = PitIgnores::new(self.dir, checkout);
        let mut descent = Descent::new(self.dir)
            .map_err(|source| Error::Unreadable { path: self.dir.to_owned(), source })?;
        for bytes in passed_over {
            // Git's index may hold what is no path below here; then the walk has it.
            let Ok(path) = TreePath::from_bytes(&bytes[..]) else { continue };
            if rules.ignore(&path) {
                continue;
            }
            let (parents, name) = path.split();
            let state = descent.enter(&parents).and_then(|dir| beneath::state(dir, name));
            // Deleted on disk, or below what is now a link: not there to be taken. A
            // submodule stands in the index as a directory.
            let Ok(state) = state else { continue };
            if !beneath::is(&state, FileType::Directory) {
                self.take(path, FileType::from_raw_mode(state.st_mode))?;
            }
        }
        Ok(())
    }

    fn take_unknown(&mut self, path: TreePath) -> Result<(), Error> {
        let full = self.dir.join(path.as_path());
        match rustix::fs::lstat(&full) {
            Ok(state) => self.take(path, FileType::from_raw_mode(state.st_mode)),
            Err(Errno::NOENT) => {
                self.notes.push(vanished(&path));
                Ok(())
            }
            Err(errno) => Err(Error::Unreadable { path: full, source: errno.into() }),
        }
    }

    fn take(&mut self, path: TreePath, kind: FileType) -> Result<(), Error> {
        if self.files.len() + self.entries.len() >= ENTRIES_MAX {
            return Err(Error::TooManyEntries { dir: self.dir.to_owned() });
        }
        if kind == FileType::RegularFile {
            self.files.push(path);
            return Ok(());
        }
        let full = self.dir.join(path.as_path());
        let unreadable = |source| Error::Unreadable { path: full.clone(), source };
        match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlink(&full, Vec::new())
                    .map_err(|errno| unreadable(errno.into()))?;
                let target = LinkTarget::from_bytes(target.into_bytes())
                    .map_err(|source| Error::Path { path: full.clone(), source })?;
                self.entries.push(Entry { path, kind: Kind::Symlink { target } });
            }
            FileType::Directory => {
                // Only what is empty on disk: a directory of ignored files is not.
                if full.read_dir().map_err(unreadable)?.next().is_none() {
                    self.entries.push(Entry { path, kind: Kind::Dir });
                }
            }
            other => {
                let what = beneath::special_name(other);
                return Err(Error::Special { path: full, what });
            }
        }
        Ok(())
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
    /// Those above `dir` count, too.
    parents: bool,
    rules: BTreeMap<PathBuf, Gitignore>,
}

impl<'a> PitIgnores<'a> {
    fn new(dir: &'a Path, parents: bool) -> Self {
        Self { dir, parents, rules: BTreeMap::new() }
    }

    /// The nearest file with an opinion decides, as in git; an ignored directory takes
    /// all below it along.
    fn ignore(&mut self, path: &TreePath) -> bool {
        let full = self.dir.join(path.as_path());
        let mut at = Some(full.as_path());
        while let Some(inner) = at.filter(|inner| *inner != self.dir) {
            let is_dir = inner != full;
            let counts = |outer: &&Path| self.parents || outer.starts_with(self.dir);
            for outer in inner.ancestors().skip(1).take_while(counts) {
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

/// The second pass: what the files of the first are, in two steps, so that how much there
/// is to read is known before it is shared out.
fn hash(
    dir: &Path,
    files: Vec<TreePath>,
    hashes: Option<&HashCache>,
    notes: &mut Vec<String>,
) -> Result<Vec<Hashed>, Error> {
    let descend = || {
        Descent::new(dir)
            .map_err(|source| Error::Unreadable { path: dir.to_owned(), source })
            .map(|descent| (descent, vec![0; BUFFER_BYTES]))
    };
    let looked = workers::in_parts(files.len(), 0, descend, |(descent, _), part| {
        files[part]
            .iter()
            .map(|path| look(dir, descent, path, hashes))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let (mut hashed, mut unread, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (path, looked) in files.into_iter().zip(looked.into_iter().flatten()) {
        match looked {
            Looked::Known(state, blob) => hashed.push(Hashed::new(dir, path, state, blob)),
            Looked::Unknown(size) => {
                bytes += size;
                unread.push(path);
            }
            Looked::Gone => notes.push(vanished(&path)),
        }
    }
    let read = workers::in_parts(unread.len(), bytes, descend, |(descent, buffer), part| {
        let read = |path: &TreePath| read(dir, descent, path, buffer);
        unread[part].iter().map(read).collect::<Result<Vec<_>, _>>()
    })?;
    for (path, read) in unread.into_iter().zip(read.into_iter().flatten()) {
        match read {
            Some((state, blob)) => hashed.push(Hashed::new(dir, path, state, blob)),
            None => notes.push(vanished(&path)),
        }
    }
    Ok(hashed)
}
/// What is known of a file before it is read.
enum Looked {
    Known(State, BlobId),
    /// With its size.
    Unknown(u64),
    /// It was there when its directory was listed.
    Gone,
}

#[derive(Clone, Copy)]
struct State {
    stamp: Stamp,
    executable: bool,
}

impl State {
    fn new(stamp: Stamp, mode: u32) -> Self {
        Self { stamp, executable: mode & 0o111 != 0 }
    }
}

struct Hashed {
    entry: Entry,
    file: SnapshotFile,
}

impl Hashed {
    fn new(dir: &Path, path: TreePath, state: State, blob: BlobId) -> Self {
        let State { stamp, executable } = state;
        let full = dir.join(path.as_path());
        let kind = Kind::File { blob, size: stamp.size, executable };
        let file = SnapshotFile { blob, path: full, size: stamp.size, stamp };
        Self { entry: Entry { path, kind }, file }
    }
}

fn look(
    dir: &Path,
    descent: &mut Descent,
    path: &TreePath,
    hashes: Option<&HashCache>,
) -> Result<Looked, Error> {
    let (parents, name) = path.split();
    let looked = descent.enter(&parents).and_then(|dir| Stamp::look(dir, name));
    match looked {
        Ok((stamp, mode)) => {
            let is_file = FileType::from_raw_mode(mode) == FileType::RegularFile;
            let known = hashes.filter(|_| is_file).and_then(|hashes| hashes.get(path, &stamp));
            Ok(match known {
                Some(blob) => Looked::Known(State::new(stamp, mode), blob),
                None => Looked::Unknown(stamp.size),
            })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Looked::Gone),
        Err(source) => Err(Error::Unreadable { path: dir.join(path.as_path()), source }),
    }
}

/// The hash of a file, and what the file was all the while; `None` where it is gone.
fn read(
    dir: &Path,
    descent: &mut Descent,
    path: &TreePath,
    buffer: &mut [u8],
) -> Result<Option<(State, BlobId)>, Error> {
    // An editor saving at this moment is done by the second look.
    const TRIES_MAX: u32 = 3;
    let unreadable = |source| Error::Unreadable { path: dir.join(path.as_path()), source };
    for _ in 0..TRIES_MAX {
        let (parents, name) = path.split();
        let opened = descent.enter(&parents).and_then(|dir| beneath::open_file(dir, name));
        let (file, before) = match opened {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        let stamp = Stamp::of(&before);
        let mut hasher = blake3::Hasher::new();
        let mut size = 0;
        let mut pieces = Pieces::of(&file, stamp.size);
        // One byte more than it should have shows that it grows.
        while size <= stamp.size {
            match pieces.next(buffer).map_err(unreadable)? {
                Some(Piece::Data(bytes)) => {
                    hasher.update(bytes);
                    size += bytes.len() as u64;
                }
                Some(Piece::Hole(bytes)) => {
                    holes::hash_zeros(&mut hasher, bytes);
                    size += bytes;
                }
                None => break,
            }
        }
        let after = fstat(&file).map_err(|errno| unreadable(errno.into()))?;
        if stamp == Stamp::of(&after) && size == stamp.size {
            let blob = BlobId(*hasher.finalize().as_bytes());
            return Ok(Some((State::new(stamp, before.st_mode), blob)));
        }
    }
    Err(Error::Changing { path: dir.join(path.as_path()) })
}

fn vanished(path: &TreePath) -> String {
    format!("`{path}` vanished while the directory was read: it is not submitted")
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
            fs::{FileExt as _, MetadataExt as _, PermissionsExt, symlink},
            net::UnixListener,
        },
        process::Command,
    };

    use proptest::prelude::*;
    use rustix::{fs::Uid, thread::set_thread_res_uid};

    use super::*;

    #[test]
    fn a_plain_directory_gives_its_files_minus_the_ignored() {
        let dir = Dir::new(&[
            (".gitignore", "*.o\n/build/\n"),
            (".pitignore", "*.mp4\n"),
            (".ignore", "main.c\n"),
            ("main.c", "int main;"),
            (".p2pit-stage-x/blobs/part", "on its way"),
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
    fn exactly_those_files_are_ignored_that_git_ignores() {
        let files = [
            (".gitignore", "*.o\n!keep.o\n/top\nbuild/\n\\#hash\ndoc/**/*.pdf\n a b \n[ab]?.log\n"),
            ("sub/.gitignore", "!again.o\n/anchored\ndeep/er\n"),
            ("mine.exclude", "*.mine\n/anchored-mine\n"),
            ("a.o", ""),
            ("keep.o", ""),
            ("top", ""),
            ("sub/top", ""),
            ("sub/again.o", ""),
            ("sub/other.o", ""),
            ("sub/anchored", ""),
            ("sub/x/anchored", ""),
            ("sub/deep/er", ""),
            ("sub/deep/er2", ""),
            ("build/x", ""),
            ("sub/build/keep.o", ""),
            ("builder/x", ""),
            ("#hash", ""),
            ("doc/a.pdf", ""),
            ("doc/x/y/b.pdf", ""),
            ("other/a.pdf", ""),
            (" a b ", ""),
            (" a b", ""),
            ("a1.log", ""),
            ("c1.log", ""),
            ("x.mine", ""),
            ("anchored-mine", ""),
            ("sub/anchored-mine", ""),
            ("x.own", ""),
            ("anchored-own", ""),
            ("sub/anchored-own", ""),
        ];
        let Some(dir) = Dir::checkout(&files) else { return };
        let excludes = dir.at("mine.exclude");
        dir.git(&["config", "core.excludesFile", excludes.to_str().unwrap()]);
        fs::write(dir.at(".git/info/exclude"), "*.own\n/anchored-own\n!x.mine\n").unwrap();
        dir.git(&["add", "builder"]);
        for part in ["", "sub"] {
            let listed = dir.git(&["-C", part, "ls-files", "-zco", "--exclude-standard"]);
            let mut expected: Vec<&str> = listed.split_terminator('\0').collect();
            expected.sort_by_key(|path| TreePath::from_bytes(*path).unwrap());
            let found = snapshot(&dir.at(part), &SnapshotOptions::default()).unwrap();
            assert_eq!(paths(&found), expected, "in `{part}`");
            assert!(found.notes.is_empty(), "{:?}", found.notes);
        }
        // A second worktree has its git directory elsewhere, and the same excludes.
        dir.git(&["commit", "-qm", "first"]);
        let other = tempfile::tempdir().unwrap();
        let other = other.path().join("worktree");
        dir.git(&["worktree", "add", "-q", other.to_str().unwrap()]);
        fs::write(other.join("x.own"), "").unwrap();
        fs::write(other.join("new"), "").unwrap();
        let found = snapshot(&other, &SnapshotOptions::default()).unwrap();
        assert_eq!(paths(&found), ["builder/x", "new"]);
    }

    #[test]
    fn a_pitignore_above_a_part_of_a_checkout_holds_for_tracked_files_too() {
        let Some(dir) =
            Dir::checkout(&[(".pitignore", "*.ckpt\n"), ("sub/a.ckpt", "c"), ("sub/a.py", "p")])
        else {
            return;
        };
        dir.git(&["add", "-f", "."]);
        let inner = snapshot(&dir.at("sub"), &SnapshotOptions::default()).unwrap();
        assert_eq!(paths(&inner), ["a.py"]);
    }

    #[test]
    fn files_that_git_stores_otherwise_are_taken_as_they_are_on_disk() {
        let Some(dir) = Dir::checkout(&[
            (".gitattributes", "*.bin filter=lfs -text\n*.txt text eol=crlf\n*.c ident\n"),
            ("weights.bin", "the weights"),
            ("pointer.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            ("crlf.txt", "one\r\ntwo\r\n"),
            ("id.c", "$Id$"),
        ]) else {
            return;
        };
        // What git-lfs does to content on its way into the repository, and out of it.
        dir.git(&["config", "filter.lfs.clean", "tr a-z A-Z"]);
        dir.git(&["config", "filter.lfs.smudge", "tr A-Z a-z"]);
        dir.git(&["config", "filter.lfs.required", "true"]);
        dir.git(&["add", "."]);
        dir.git(&["commit", "-qm", "first"]);
        let content = |snapshot: &Snapshot, path: &str| {
            let entry = snapshot.tree.get(&TreePath::from_bytes(path).unwrap()).unwrap();
            blob_of(entry)
        };
        let first = dir.snapshot().unwrap();
        for path in ["weights.bin", "pointer.bin", "crlf.txt", "id.c"] {
            assert_eq!(content(&first, path), BlobId::of(&fs::read(dir.at(path)).unwrap()));
        }
        assert!(first.notes.is_empty(), "{:?}", first.notes);
        // A machine without git-lfs: git itself fails on changed files, we do not.
        dir.git(&["config", "filter.lfs.clean", "no-such-program"]);
        fs::write(dir.at("weights.bin"), "new weights").unwrap();
        let second = dir.snapshot().unwrap();
        assert_eq!(content(&second, "weights.bin"), BlobId::of(b"new weights"));
        assert_eq!(paths(&second), paths(&first));
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
        let options = SnapshotOptions { git: "/nonexistent/git".into(), hashes: None };
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
    }

    #[test]
    fn what_may_not_be_read_is_named() {
        let dir = Dir::new(&[("sub/file", "f"), ("sub/dir/file", "f")]);
        let mode = |path: &str, mode| {
            fs::set_permissions(dir.at(path), fs::Permissions::from_mode(mode)).unwrap();
        };
        mode("", 0o755);
        for (path, none, all) in [("sub/file", 0o000, 0o644), ("sub/dir", 0o000, 0o755)] {
            mode(path, none);
            // Root reads everything: one thread, and those that it starts, become somebody else.
            let error = thread::scope(|scope| {
                let reading = scope.spawn(|| {
                    if rustix::process::geteuid().is_root() {
                        let nobody = Uid::from_raw(65_534);
                        set_thread_res_uid(nobody, nobody, nobody).unwrap();
                    }
                    dir.snapshot().unwrap_err()
                });
                join(reading)
            });
            mode(path, all);
            let Error::Unreadable { path: named, source } = error else { panic!("{error}") };
            assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
            assert!(named.ends_with(path), "{}", named.display());
        }
    }

    #[test]
    fn a_file_that_never_is_what_it_says_is_given_up_by_name() {
        // The kernel says of this file that it is empty, and then it is not.
        let dir = Path::new("/proc/self");
        let mut descent = Descent::new(dir).unwrap();
        let path = TreePath::from_bytes("status").unwrap();
        let error = read(dir, &mut descent, &path, &mut [0; 4096]).err().unwrap();
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

    #[test]
    fn a_file_with_holes_is_hashed_and_served_as_what_it_stands_for() {
        let dir = Dir::new(&[]);
        let file = File::create(dir.at("sparse")).unwrap();
        file.set_len(5 << 20).unwrap();
        file.write_all_at(b"middle", 2 << 20).unwrap();
        drop(file);
        let content = fs::read(dir.at("sparse")).unwrap();
        let snapshot = dir.snapshot().unwrap();
        let blob = BlobId::of(&content);
        assert_eq!((snapshot.files[0].blob, snapshot.files[0].size), (blob, 5 << 20));
        let mut served = Vec::new();
        let source = snapshot.source();
        let Some(OpenBlob::Content { content: mut opened, .. }) = source.open(&blob).unwrap()
        else {
            panic!("not there, or not read as it is");
        };
        opened.read_to_end(&mut served).unwrap();
        assert!(served == content);
    }

    #[test]
    fn what_did_not_change_is_not_read_again() {
        let dir = Dir::new(&[("same", "same"), ("edited", "before"), ("gone", "gone")]);
        let hashes = tempfile::tempdir().unwrap();
        let first = dir.remembered(&hashes, LATER).unwrap();
        // Only reading it would show.
        let lie = BlobId::of(b"a lie");
        forge(&hashes, dir.root.path(), lie);
        fs::write(dir.at("edited"), "behind").unwrap();
        fs::remove_file(dir.at("gone")).unwrap();
        fs::write(dir.at("new"), "new").unwrap();
        let second = dir.remembered(&hashes, LATER).unwrap();
        let blobs: Vec<BlobId> = second.tree.entries().iter().map(blob_of).collect();
        assert_eq!(blobs, [BlobId::of(b"behind"), BlobId::of(b"new"), lie]);
        assert_eq!(first.tree.file_count(), 3);
    }

    #[test]
    fn a_damaged_memory_is_ignored_and_replaced() {
        let dir = Dir::new(&[("file", "content")]);
        let hashes = tempfile::tempdir().unwrap();
        let first = dir.remembered(&hashes, LATER).unwrap();
        let memory = fs::read_dir(hashes.path()).unwrap().next().unwrap().unwrap().path();
        let good = fs::read(&memory).unwrap();
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [&flipped[..], &good[..good.len() - 1], &good[..20], b"", b"other/2\n"] {
            fs::write(&memory, damaged).unwrap();
            let again = dir.remembered(&hashes, LATER).unwrap();
            assert_eq!((again.root, again.notes), (first.root, vec![]));
            assert!(fs::read(&memory).unwrap().len() == good.len());
        }
        // Not even a place for it is a reason to fail.
        let options = SnapshotOptions { hashes: Some(dir.at("file")), ..Default::default() };
        let without = snapshot_by(dir.root.path(), &options, &|| Clock::shifted(LATER)).unwrap();
        assert_eq!(without.root, first.root);
        assert!(without.notes[0].contains("not remembered"), "{:?}", without.notes);
    }

    #[derive(Debug, Clone)]
    enum Change {
        /// Another content of the same length.
        Edit(usize, u8),
        /// As [`Self::Edit`], by cutting the file short first, with its time put back.
        Restamp(usize, u8),
        /// Two names change places.
        Swap(usize, usize),
        /// A new file takes the name.
        Replace(usize, u8),
        Remove(usize),
        Snapshot,
        /// The wall clock is set, by so many seconds.
        Step(i64),
    }

    fn change() -> impl Strategy<Value = Change> {
        let file = || 0..4_usize;
        prop_oneof![
            (file(), any::<u8>()).prop_map(|(f, byte)| Change::Edit(f, byte)),
            (file(), any::<u8>()).prop_map(|(f, byte)| Change::Restamp(f, byte)),
            (file(), file()).prop_map(|(a, b)| Change::Swap(a, b)),
            (file(), any::<u8>()).prop_map(|(f, byte)| Change::Replace(f, byte)),
            file().prop_map(Change::Remove),
            Just(Change::Snapshot),
            Just(Change::Snapshot),
            (-5..5_i64).prop_map(Change::Step),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn what_is_remembered_never_shows(
            settled in any::<bool>(),
            changes in prop::collection::vec(change(), 1..24),
        ) {
            let dir = Dir::new(&[]);
            let hashes = tempfile::tempdir().unwrap();
            let at = |file: usize| dir.at(&format!("f{file}"));
            (0..4).for_each(|file| fs::write(at(file), [0; 3]).unwrap());
            let mut shift_s = if settled { LATER } else { 0 };
            for change in changes {
                match change {
                    Change::Edit(file, byte) => fs::write(at(file), [byte; 3]).unwrap(),
                    Change::Restamp(file, byte) => {
                        let modified = at(file).metadata().and_then(|m| m.modified());
                        let opened = File::create(at(file)).unwrap();
                        opened.write_all_at(&[byte; 3], 0).unwrap();
                        if let Ok(modified) = modified {
                            opened.set_modified(modified).unwrap();
                        }
                    }
                    Change::Swap(a, b) => {
                        for (from, to) in [(at(a), dir.at("x")), (at(b), at(a)), (dir.at("x"), at(b))] {
                            // Where one is missing, the other is only renamed.
                            let _ = fs::rename(from, to);
                        }
                    }
                    Change::Replace(file, byte) => {
                        fs::write(dir.at("y"), [byte; 3]).unwrap();
                        fs::rename(dir.at("y"), at(file)).unwrap();
                    }
                    Change::Remove(file) => {
                        let _ = fs::remove_file(at(file));
                    }
                    Change::Snapshot => {
                        let remembered = dir.remembered(&hashes, shift_s).unwrap();
                        prop_assert_eq!(remembered.root, dir.snapshot().unwrap().root);
                        if settled {
                            // The clock that we pretend has gone on since then.
                            dir.wait_for_a_tick();
                        }
                    }
                    Change::Step(seconds) => shift_s += seconds,
                }
            }
        }
    }

    /// Seconds after which a time is believed.
    const LATER: i64 = 3600;

    fn blob_of(entry: &Entry) -> BlobId {
        let Kind::File { blob, .. } = entry.kind else { panic!("{entry:?} is no file") };
        blob
    }

    /// Remembers `blob` for every file that is remembered.
    fn forge(hashes: &tempfile::TempDir, root: &Path, blob: BlobId) {
        let root = root.canonicalize().unwrap();
        let clock = || Clock::shifted(LATER).unwrap();
        let cache = HashCache::load(hashes.path(), &root, clock());
        let known = cache.known();
        assert!(!known.is_empty());
        let forged = known.iter().map(|(path, stamp)| (path, *stamp, blob));
        cache.save(&clock(), forged).unwrap();
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

        fn git(&self, args: &[&str]) -> String {
            let output = Command::new("git")
                .arg("-C")
                .arg(self.root.path())
                .args(["-c", "user.name=t", "-c", "user.email=t@example.org"])
                .args(["-c", "commit.gpgsign=false"])
                .args(args)
                .output()
                .unwrap();
            assert!(output.status.success(), "git {args:?}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        }

        fn at(&self, path: &str) -> PathBuf {
            self.root.path().join(path)
        }

        fn snapshot(&self) -> Result<Snapshot, Error> {
            snapshot(self.root.path(), &SnapshotOptions::default())
        }

        /// With a memory, on a machine whose wall clock is so many seconds ahead.
        fn remembered(&self, hashes: &tempfile::TempDir, shift_s: i64) -> Result<Snapshot, Error> {
            let hashes = Some(hashes.path().to_owned());
            let options = SnapshotOptions { hashes, ..SnapshotOptions::default() };
            snapshot_by(self.root.path(), &options, &|| Clock::shifted(shift_s))
        }

        /// Returns once a file that is written to gets another time than one before.
        fn wait_for_a_tick(&self) {
            let probe =
                tempfile::NamedTempFile::new_in(self.root.path().parent().unwrap()).unwrap();
            let changed = || {
                fs::write(probe.path(), "x").unwrap();
                let metadata = probe.path().metadata().unwrap();
                (metadata.ctime(), metadata.ctime_nsec())
            };
            let before = changed();
            while changed() == before {}
        }
    }

    fn paths(snapshot: &Snapshot) -> Vec<String> {
        snapshot.tree.entries().iter().map(|entry| entry.path.to_string()).collect()
    }
}
