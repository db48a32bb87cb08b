//! Taking in what a job left behind.
//!
//! The directory belongs to the job, which may be hostile and still running, while the
//! daemon may be root. So everything is opened one component at a time without
//! following links (module `beneath`), only regular files are read, other file systems are
//! not entered, and where the job's user is known, files of others are passed over: a
//! hard link to a foreign file is no way to read it.

mod live;

use std::{
    ffi::CString,
    fmt, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use p2pit_protocol::BlobId;
use rustix::fs::{FileType, fstat};
use thiserror::Error;

use super::{
    beneath::{self, Descent},
    store::{self, BlobStore},
    tree::{self, ENTRIES_MAX, Entry, Kind, LinkTarget, Tree, TreePath},
    workers,
};

use live::Stamp;
pub use live::{Live, Seen, ingest_live};

#[derive(Debug, Clone)]
pub struct IngestOptions {
    /// What to take, below the directory; empty means everything.
    pub paths: Vec<TreePath>,
    /// The only user whose files are read.
    pub owner: Option<u32>,
    /// Bytes of all files together.
    pub bytes_max: u64,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self { paths: Vec::new(), owner: None, bytes_max: u64::MAX }
    }
}

/// What was taken in, and what was not.
#[derive(Debug)]
pub struct Ingested {
    /// The blob of the tree's manifest.
    pub root: BlobId,
    pub tree: Tree,
    pub skipped: Vec<Skipped>,
}

/// Something that is not in the tree, and why.
#[derive(Debug)]
pub struct Skipped {
    pub path: PathBuf,
    pub reason: SkipReason,
}

#[derive(Debug)]
pub enum SkipReason {
    /// Asked for, and not there; or gone before it could be read.
    NotFound,
    /// Neither file, link nor directory: what it is.
    Special(&'static str),
    /// A file of another user.
    ForeignOwner(u32),
    /// A directory on which something is mounted.
    OtherFileSystem,
    /// No tree can hold such a path.
    Path(tree::PathError),
    Unreadable(io::Error),
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => write!(f, "not found"),
            Self::Special(what) => write!(f, "a {what}"),
            Self::ForeignOwner(uid) => write!(f, "owned by user {uid}"),
            Self::OtherFileSystem => write!(f, "on another file system"),
            Self::Path(error) => write!(f, "{error}"),
            Self::Unreadable(error) => write!(f, "{error}"),
        }
    }
}

/// Why a directory could not be taken in at all.
#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot read `{path}`")]
    Io { path: PathBuf, source: io::Error },
    #[error("`{path}` has more than {ENTRIES_MAX} entries")]
    TooManyEntries { path: PathBuf },
    #[error("`{path}` has more than {bytes_max} bytes")]
    TooManyBytes { path: PathBuf, bytes_max: u64 },
    #[error("no manifest of `{path}`")]
    Tree { path: PathBuf, source: tree::Error },
    #[error("cannot keep `{path}`")]
    Store { path: PathBuf, source: store::Error },
}

/// Stores the files below `dir` and the manifest of what was found. No ignore rules;
/// links are kept as links.
pub fn ingest(store: &BlobStore, dir: &Path, options: &IngestOptions) -> Result<Ingested, Error> {
    let mut scan = Scan::new(dir, options)?;
    if options.paths.is_empty() {
        scan.whole()?;
    }
    let mut paths = options.paths.clone();
    paths.sort();
    paths.dedup_by(|path, before| path == before || before.contains(path));
    for path in &paths {
        scan.path(path)?;
    }
    let Scan { mut entries, mut skipped, files, bytes, .. } = scan;

    let parts = workers::in_parts(
        files.len(),
        bytes,
        || Reading::new(store, dir, options),
        |reading, part| reading.read(&files[part]),
    )?;
    for (found, missed) in parts {
        entries.extend(found);
        skipped.extend(missed);
    }
    store_tree(store, dir, entries, skipped)
}

/// Stores the list of what was taken from `dir`, whose blobs are in the store.
fn store_tree(
    store: &BlobStore,
    dir: &Path,
    entries: Vec<Entry>,
    skipped: Vec<Skipped>,
) -> Result<Ingested, Error> {
    let unencodable = |source| Error::Tree { path: dir.to_owned(), source };
    let tree = Tree::new(entries).map_err(unencodable)?;
    let manifest = tree.encode().map_err(unencodable)?;
    let root = store
        .put_bytes(&manifest)
        .map_err(|source| Error::Store { path: dir.to_owned(), source })?;
    Ok(Ingested { root, tree, skipped })
}

/// The first pass: what is there.
struct Scan<'a> {
    dir: &'a Path,
    options: &'a IngestOptions,
    descent: Descent,
    device: u64,
    /// Links and empty directories.
    entries: Vec<Entry>,
    files: Vec<TreePath>,
    /// Of each of the files.
    stamps: Vec<Stamp>,
    /// The directories, each as it was before it was listed.
    dirs: Vec<(Option<TreePath>, Stamp)>,
    bytes: u64,
    skipped: Vec<Skipped>,
}

impl<'a> Scan<'a> {
    fn new(dir: &'a Path, options: &'a IngestOptions) -> Result<Self, Error> {
        let io = |source| Error::Io { path: dir.to_owned(), source };
        let descent = Descent::new(dir).map_err(io)?;
        let device = fstat(descent.root()).map_err(|errno| io(errno.into()))?.st_dev;
        Ok(Self {
            dir,
            options,
            descent,
            device,
            entries: Vec::new(),
            files: Vec::new(),
            stamps: Vec::new(),
            dirs: Vec::new(),
            bytes: 0,
            skipped: Vec::new(),
        })
    }

    fn whole(&mut self) -> Result<(), Error> {
        let root = self.descent.root().try_clone_to_owned();
        let root = root.map_err(|source| Error::Io { path: self.dir.to_owned(), source })?;
        self.directory(root.as_fd(), None)
    }

    /// One path that was asked for.
    fn path(&mut self, path: &TreePath) -> Result<(), Error> {
        let (parents, name) = path.split();
        let entered = self.descent.enter(&parents).and_then(|dir| dir.try_clone_to_owned());
        match entered {
            Ok(dir) => self.entry(dir.as_fd(), name, path.clone()),
            Err(error) => {
                self.skip(path.as_path(), unreadable(error));
                Ok(())
            }
        }
    }

    fn directory(&mut self, dir: impl AsFd, path: Option<&TreePath>) -> Result<(), Error> {
        let room = ENTRIES_MAX.saturating_sub(self.count());
        let listed = fstat(dir.as_fd()).map_err(io::Error::from).and_then(|state| {
            self.dirs.push((path.cloned(), Stamp::of(&state)));
            beneath::names(dir.as_fd(), room)
        });
        let names = match listed {
            Ok(Some(names)) => names,
            Ok(None) => return Err(Error::TooManyEntries { path: self.dir.to_owned() }),
            Err(error) => {
                self.skip(path.map_or(Path::new("."), TreePath::as_path), unreadable(error));
                return Ok(());
            }
        };
        if let (true, Some(path)) = (names.is_empty(), path) {
            self.entries.push(Entry { path: path.clone(), kind: Kind::Dir });
        }
        self.listed(dir, path, &names)
    }

    /// Of a directory that has these names.
    fn listed(
        &mut self,
        dir: impl AsFd,
        path: Option<&TreePath>,
        names: &[CString],
    ) -> Result<(), Error> {
        for name in names {
            let name = name.to_bytes();
            let child = match path {
                None => TreePath::from_bytes(name),
                Some(parent) => TreePath::from_bytes([parent.as_bytes(), b"/", name].concat()),
            };
            match child {
                Ok(child) => self.entry(dir.as_fd(), name, child)?,
                Err(error) => {
                    let parent = path.map_or(Path::new(""), TreePath::as_path);
                    self.skip(&beneath::joined(parent, name), SkipReason::Path(error));
                }
            }
        }
        Ok(())
    }

    /// Recurses into directories, at most [`tree::DEPTH_MAX`] deep because paths are.
    fn entry(&mut self, dir: impl AsFd, name: &[u8], path: TreePath) -> Result<(), Error> {
        if self.count() >= ENTRIES_MAX {
            return Err(Error::TooManyEntries { path: self.dir.to_owned() });
        }
        let state = match beneath::state(dir.as_fd(), name) {
            Ok(state) => state,
            Err(error) => {
                self.skip(path.as_path(), unreadable(error));
                return Ok(());
            }
        };
        match FileType::from_raw_mode(state.st_mode) {
            FileType::RegularFile => {
                let size = u64::try_from(state.st_size).unwrap_or(0);
                self.bytes = self.bytes.saturating_add(size);
                if self.bytes > self.options.bytes_max {
                    let (path, bytes_max) = (self.dir.to_owned(), self.options.bytes_max);
                    return Err(Error::TooManyBytes { path, bytes_max });
                }
                self.files.push(path);
                self.stamps.push(Stamp::of(&state));
            }
            FileType::Symlink => self.link(dir, name, path),
            FileType::Directory if state.st_dev != self.device => {
                self.skip(path.as_path(), SkipReason::OtherFileSystem);
            }
            FileType::Directory => match beneath::open_dir(dir, name) {
                Ok(inner) => self.directory(inner, Some(&path))?,
                Err(error) => self.skip(path.as_path(), unreadable(error)),
            },
            other => {
                self.skip(path.as_path(), SkipReason::Special(beneath::special_name(other)));
            }
        }
        Ok(())
    }

    fn link(&mut self, dir: impl AsFd, name: &[u8], path: TreePath) {
        let target = match beneath::read_link(dir, name) {
            Ok(target) => target,
            Err(error) => return self.skip(path.as_path(), unreadable(error)),
        };
        match LinkTarget::from_bytes(target) {
            Ok(target) => self.entries.push(Entry { path, kind: Kind::Symlink { target } }),
            Err(error) => self.skip(path.as_path(), SkipReason::Path(error)),
        }
    }

    fn skip(&mut self, path: &Path, reason: SkipReason) {
        self.skipped.push(Skipped { path: path.to_owned(), reason });
    }

    /// Everything seen counts, so that what is skipped is bounded as well.
    fn count(&self) -> usize {
        self.entries.len() + self.files.len() + self.skipped.len()
    }
}

/// The second pass: the content of files.
struct Reading<'a> {
    store: &'a BlobStore,
    dir: &'a Path,
    options: &'a IngestOptions,
    descent: Descent,
}

impl<'a> Reading<'a> {
    fn new(store: &'a BlobStore, dir: &'a Path, options: &'a IngestOptions) -> Result<Self, Error> {
        let descent =
            Descent::new(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
        Ok(Self { store, dir, options, descent })
    }

    fn read(&mut self, paths: &[TreePath]) -> Result<(Vec<Entry>, Vec<Skipped>), Error> {
        let (mut entries, mut skipped) = (Vec::new(), Vec::new());
        for path in paths {
            match self.file(path)? {
                Ok(kind) => entries.push(Entry { path: path.clone(), kind }),
                Err(reason) => skipped.push(Skipped { path: path.to_path_buf(), reason }),
            }
        }
        Ok((entries, skipped))
    }

    fn file(&mut self, path: &TreePath) -> Result<Result<Kind, SkipReason>, Error> {
        let (parents, name) = path.split();
        let opened = self.descent.enter(&parents).and_then(|dir| beneath::open_file(dir, name));
        let (file, state) = match opened {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(unreadable(error))),
        };
        if self.options.owner.is_some_and(|owner| owner != state.st_uid) {
            return Ok(Err(SkipReason::ForeignOwner(state.st_uid)));
        }
        let full = self.dir.join(path.as_path());
        let (blob, size) = self
            .store
            .put_open_file(&file, &full)
            .map_err(|source| Error::Store { path: full, source })?;
        let executable = state.st_mode & 0o111 != 0;
        Ok(Ok(Kind::File { blob, size, executable }))
    }
}

fn unreadable(error: io::Error) -> SkipReason {
    match error.kind() {
        io::ErrorKind::NotFound => SkipReason::NotFound,
        _ => SkipReason::Unreadable(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{
            fs::{MetadataExt, PermissionsExt, symlink},
            net::UnixListener,
        },
    };

    use super::{
        super::materialize::{MaterializeOptions, materialize},
        *,
    };

    #[test]
    fn a_directory_goes_in_and_comes_out_the_same() {
        let fixture = Fixture::new();
        fixture.write("a/run.sh", b"#!/bin/sh");
        fs::set_permissions(fixture.at("a/run.sh"), fs::Permissions::from_mode(0o700)).unwrap();
        fixture.write("a/.hidden", b"h");
        fixture.write("target.gitignored", b"no rules here");
        symlink("/etc/passwd", fixture.at("a/link")).unwrap();
        fs::create_dir(fixture.at("empty")).unwrap();
        for i in 0..200_u8 {
            fixture.write(&format!("many/f{i}"), &[i]);
        }

        let first = fixture.ingest(&[]).unwrap();
        assert!(first.skipped.is_empty(), "{:?}", first.skipped);
        let manifest = fixture.store.read(&first.root, tree::MANIFEST_BYTES_MAX).unwrap();
        assert_eq!(Tree::decode(&manifest).unwrap(), first.tree);
        assert_eq!(first.tree.file_count(), 203);

        let copy = fixture.dir.path().join("copy");
        materialize(&fixture.store, &first.tree, &copy, &MaterializeOptions::default()).unwrap();
        let second = ingest(&fixture.store, &copy, &IngestOptions::default()).unwrap();
        assert_eq!(second.root, first.root);
    }

    #[test]
    fn chosen_paths_are_taken_and_the_absent_are_listed() {
        let fixture = Fixture::new();
        fixture.write("out/plot.png", b"p");
        fixture.write("out/deep/model", b"m");
        fixture.write("other", b"o");
        let taken = fixture.ingest(&["out", "out/deep", "absent", "other/below"]).unwrap();
        let paths: Vec<_> = taken.tree.entries().iter().map(|e| e.path.to_string()).collect();
        assert_eq!(paths, ["out/deep/model", "out/plot.png"]);
        assert_eq!(taken.skipped.len(), 2);
        assert!(matches!(taken.skipped[0].reason, SkipReason::NotFound));
        assert_eq!(taken.skipped[0].path, Path::new("absent"));
        assert!(matches!(taken.skipped[1].reason, SkipReason::Unreadable(_)));
    }

    #[test]
    fn a_link_out_of_the_directory_brings_nothing_in() {
        let fixture = Fixture::new();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("shadow"), "secret").unwrap();
        symlink(outside.path(), fixture.at("dir")).unwrap();
        symlink(outside.path().join("shadow"), fixture.at("file")).unwrap();
        let taken = fixture.ingest(&["file", "dir/shadow"]).unwrap();
        assert_eq!(taken.tree.entries().len(), 1);
        assert!(matches!(taken.tree.entries()[0].kind, Kind::Symlink { .. }));
        assert_eq!(taken.skipped[0].path, Path::new("dir/shadow"));
        assert!(!fixture.store.has(&BlobId::of(b"secret")));
        let whole = fixture.ingest(&[]).unwrap();
        assert_eq!(whole.tree.file_count(), 0);
    }

    #[test]
    fn a_link_put_in_place_of_a_directory_between_the_passes_brings_nothing_in() {
        let fixture = Fixture::new();
        fixture.write("d/shadow", b"mine");
        let options = IngestOptions::default();
        let mut scan = Scan::new(&fixture.work, &options).unwrap();
        scan.whole().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("shadow"), "secret").unwrap();
        fs::rename(fixture.at("d"), fixture.at("old")).unwrap();
        symlink(outside.path(), fixture.at("d")).unwrap();
        let mut reading = Reading::new(&fixture.store, &fixture.work, &options).unwrap();
        let (entries, skipped) = reading.read(&scan.files).unwrap();
        assert!(entries.is_empty());
        assert_eq!(skipped.len(), 1);
        assert!(!fixture.store.has(&BlobId::of(b"secret")));
    }

    #[test]
    fn sockets_pipes_and_foreign_files_are_listed_and_left() {
        let fixture = Fixture::new();
        let _socket = UnixListener::bind(fixture.at("socket")).unwrap();
        let dir = fs::File::open(&fixture.work).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(&dir, "pipe", mode).unwrap();
        fixture.write("plain", b"p");
        let taken = fixture.ingest(&[]).unwrap();
        let mut skipped: Vec<_> = taken.skipped.iter().map(|s| s.reason.to_string()).collect();
        skipped.sort();
        assert_eq!(skipped, ["a named pipe", "a socket"]);
        assert_eq!(taken.tree.file_count(), 1);

        let uid = fs::metadata(fixture.at("plain")).unwrap().uid();
        let owned = |owner| {
            let options = IngestOptions { owner: Some(owner), ..IngestOptions::default() };
            ingest(&fixture.store, &fixture.work, &options).unwrap().tree.file_count()
        };
        assert_eq!((owned(uid), owned(uid + 1)), (1, 0));
    }

    #[test]
    fn more_bytes_than_allowed_are_refused_before_any_is_read() {
        let fixture = Fixture::new();
        fixture.write("a", &[1; 600]);
        fixture.write("b", &[2; 600]);
        let options = IngestOptions { bytes_max: 1000, ..IngestOptions::default() };
        let error = ingest(&fixture.store, &fixture.work, &options).unwrap_err();
        assert!(matches!(error, Error::TooManyBytes { bytes_max: 1000, .. }));
        assert!(!fixture.store.has(&BlobId::of(&[1; 600])));
    }

    #[test]
    fn a_path_too_deep_for_a_tree_is_listed() {
        let fixture = Fixture::new();
        let mut deep = fixture.work.clone();
        for _ in 0..=tree::DEPTH_MAX {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fixture.write("plain", b"p");
        let taken = fixture.ingest(&[]).unwrap();
        assert_eq!(taken.tree.file_count(), 1);
        assert!(matches!(taken.skipped[..], [Skipped { reason: SkipReason::Path(_), .. }]));
    }

    struct Fixture {
        dir: tempfile::TempDir,
        store: BlobStore,
        work: PathBuf,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
            let work = dir.path().join("work");
            fs::create_dir(&work).unwrap();
            Self { dir, store, work }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.work.join(path)
        }

        fn write(&self, path: &str, content: &[u8]) {
            fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
            fs::write(self.at(path), content).unwrap();
        }

        fn ingest(&self, paths: &[&str]) -> Result<Ingested, Error> {
            let paths = paths.iter().map(|path| TreePath::from_bytes(*path).unwrap()).collect();
            let options = IngestOptions { paths, ..IngestOptions::default() };
            ingest(&self.store, &self.work, &options)
        }
    }
}
