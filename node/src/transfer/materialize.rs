//! Writing a tree to a disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use p2pit_protocol::BlobId;
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Uid, chownat, fchmod, fchown,
        fstat, ioctl_ficlone, openat, renameat, renameat_with, symlinkat, unlinkat,
    },
    io::Errno,
};
use thiserror::Error;

use super::{
    beneath::{self, Descent, Made},
    holes::{self, Piece, Pieces},
    store::{self, BUFFER_BYTES, BlobStore},
    tree::{Entry, Kind, Tree},
    workers,
};

#[derive(Debug, Clone, Copy, Default)]
pub struct MaterializeOptions {
    pub existing: Existing,
    /// The user and group to own everything written; absent, whoever runs this.
    pub owner: Option<(u32, u32)>,
    /// Whether the store is given up for it: a blob that one file needs becomes that file,
    /// where the file system is the same. Its content was verified when it arrived.
    pub consume: bool,
}

/// What may be at the destination already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Nothing: the destination is new or empty.
    #[default]
    Nothing,
    /// Other things: directories are shared, an entry that is there is an error.
    Keep,
    /// Anything: files and links that are there give way, directories do not.
    Replace,
}

/// Why a tree could not be written. What was written before stays, for the caller to
/// keep or remove.
#[derive(Debug, Error)]
pub enum Error {
    #[error("`{0}` is not empty")]
    NotEmpty(PathBuf),
    #[error("`{0}` is there already")]
    Exists(PathBuf),
    #[error("cannot write `{path}`")]
    Io { path: PathBuf, source: io::Error },
    /// A blob that is missing, or a disk that does not read.
    #[error("no content for `{path}`")]
    Content { path: PathBuf, source: store::Error },
    /// It is not in the store any more, so that it can be brought again.
    #[error("no content for `{path}`: blob {blob} was corrupt in the store and is removed from it")]
    Corrupt { path: PathBuf, blob: BlobId },
    #[error("`{path}` should have {expected} bytes, but blob {blob} has {found}")]
    Size { path: PathBuf, blob: BlobId, expected: u64, found: u64 },
}

/// Writes `tree` into `dest`, which is made if it is not there. Every blob is verified
/// as it is copied: a file stands under its name only with the content that the tree
/// gives it. Links are written as they are and never followed, so nothing is ever
/// written outside `dest`.
pub fn materialize(
    store: &BlobStore,
    tree: &Tree,
    dest: &Path,
    options: &MaterializeOptions,
) -> Result<(), Error> {
    let io = |source| Error::Io { path: dest.to_owned(), source };
    fs::create_dir_all(dest).map_err(io)?;
    let nothing_yet = fs::read_dir(dest).map_err(io)?.next().is_none();
    if options.existing == Existing::Nothing && !nothing_yet {
        return Err(Error::NotEmpty(dest.to_owned()));
    }
    if let Some((uid, gid)) = options.owner
        && nothing_yet
    {
        std::os::unix::fs::lchown(dest, Some(uid), Some(gid)).map_err(io)?;
    }
    let entries = tree.entries();
    let mut uses = BTreeMap::<BlobId, u32>::new();
    if options.consume {
        for entry in entries {
            if let Kind::File { blob, .. } = entry.kind {
                *uses.entry(blob).or_default() += 1;
            }
        }
    }
    let single: BTreeSet<BlobId> =
        uses.into_iter().filter(|(_, uses)| *uses == 1).map(|(blob, _)| blob).collect();
    workers::in_parts(
        entries.len(),
        tree.total_bytes(),
        || Writer::new(store, dest, options, &single).map_err(io),
        |writer, part| entries[part].iter().try_for_each(|entry| writer.write(entry)),
    )?;
    Ok(())
}

struct Writer<'a> {
    store: &'a BlobStore,
    dest: &'a Path,
    options: &'a MaterializeOptions,
    /// Blobs that may be moved out of the store.
    movable: &'a BTreeSet<BlobId>,
    descent: Descent,
    buffer: Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(
        store: &'a BlobStore,
        dest: &'a Path,
        options: &'a MaterializeOptions,
        movable: &'a BTreeSet<BlobId>,
    ) -> io::Result<Self> {
        let descent = Descent::new(dest)?;
        Ok(Self { store, dest, options, movable, descent, buffer: vec![0; BUFFER_BYTES] })
    }

    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        let path = self.dest.join(entry.path.as_path());
        let (parents, name) = entry.path.split();
        let options = self.options;
        let dir = self
            .descent
            .enter_with(&parents, |dir, name| make_dir(dir, name, options))
            .map_err(|source| Error::Io { path: path.clone(), source })?;
        let place = Place { dir, name, path: &path, options };
        match &entry.kind {
            Kind::Dir => make_dir(dir, name, options).map_err(|source| place.io(source)),
            Kind::Symlink { target } => place.put(|name| {
                symlinkat(target.as_bytes(), dir, name)?;
                if let Some((uid, gid)) = owner(options) {
                    chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
                }
                Ok(Ok(()))
            }),
            Kind::File { blob, size, executable } => {
                let file = FileSpec { blob: *blob, size: *size, executable: *executable };
                let is_movable = self.movable.contains(blob);
                place.put(|name| {
                    if is_movable && file.move_to(self.store, &place, name)? {
                        return Ok(Ok(()));
                    }
                    let target = create(dir, name, file.mode())?;
                    if let Err(error) = file.fill(self.store, target, &place, &mut self.buffer) {
                        unlinkat(dir, name, AtFlags::empty())?;
                        return Ok(Err(error));
                    }
                    Ok(Ok(()))
                })
            }
        }
    }
}

/// Where one entry goes.
struct Place<'a> {
    dir: BorrowedFd<'a>,
    name: &'a [u8],
    path: &'a Path,
    options: &'a MaterializeOptions,
}

impl Place<'_> {
    /// Makes the entry with `make`, which is told the name to make it under.
    fn put(&self, make: impl FnOnce(&[u8]) -> io::Result<Result<(), Error>>) -> Result<(), Error> {
        if self.options.existing != Existing::Replace {
            return make(self.name).map_err(|source| self.io(source))?;
        }
        match beneath::state(self.dir, self.name) {
            Ok(state) if beneath::is(&state, FileType::Directory) => {
                return Err(Error::Exists(self.path.to_owned()));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return make(self.name).map_err(|source| self.io(source))?;
            }
            Err(error) => return Err(self.io(error)),
        }
        // What is there stays whole until its successor is.
        let temporary = temporary_name();
        make(&temporary).map_err(|source| self.io(source))??;
        renameat(self.dir, &temporary[..], self.dir, self.name)
            .map_err(|errno| self.io(errno.into()))
    }

    fn io(&self, source: io::Error) -> Error {
        let path = self.path.to_owned();
        match source.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists(path),
            _ => Error::Io { path, source },
        }
    }
}

#[derive(Clone, Copy)]
struct FileSpec {
    blob: BlobId,
    size: u64,
    executable: bool,
}

impl FileSpec {
    /// Makes the blob's own file the file, if it has the size and the file system allows.
    fn move_to(&self, store: &BlobStore, place: &Place<'_>, name: &[u8]) -> io::Result<bool> {
        let path = store.path_of(&self.blob);
        let Ok(file) = store.open_blob(&self.blob) else { return Ok(false) };
        if file.metadata()?.len() != self.size {
            return Ok(false);
        }
        match renameat_with(CWD, &path, place.dir, name, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            // Another file system, or one without this kind of renaming.
            Err(Errno::XDEV | Errno::INVAL) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        self.dress(&file, place)?;
        Ok(true)
    }

    /// Mode and owner. Each change of an inode is one more entry in the file system's
    /// journal, so the mode is changed only where the umask was in the way.
    fn dress(&self, file: &File, place: &Place<'_>) -> io::Result<()> {
        if Mode::from_raw_mode(fstat(file)?.st_mode) != self.mode() {
            fchmod(file, self.mode())?;
        }
        if let Some((uid, gid)) = owner(place.options) {
            fchown(file, Some(uid), Some(gid))?;
        }
        Ok(())
    }

    fn mode(&self) -> Mode {
        Mode::from_raw_mode(if self.executable { 0o755 } else { 0o644 })
    }

    /// Copies the blob into `target`, hashing what arrives there.
    fn fill(
        &self,
        store: &BlobStore,
        target: File,
        place: &Place<'_>,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        let content = |source| Error::Content { path: place.path.to_owned(), source };
        let unreadable = |source| {
            let path = store.path_of(&self.blob);
            content(store::Error::Io { doing: "read", path, source })
        };
        let io = |source| place.io(source);
        let source = store.open_blob(&self.blob).map_err(content)?;
        let cloned = self.size >= BUFFER_BYTES as u64 && ioctl_ficlone(&target, &source).is_ok();
        let mut hasher = blake3::Hasher::new();
        let mut found = 0;
        let mut ends_in_hole = false;
        let mut pieces = Pieces::of(if cloned { &target } else { &source }, self.size);
        while let Some(piece) = pieces.next(buffer).map_err(unreadable)? {
            match piece {
                Piece::Data(bytes) => {
                    hasher.update(bytes);
                    if !cloned {
                        target.write_all_at(bytes, found).map_err(io)?;
                    }
                    found += bytes.len() as u64;
                    ends_in_hole = false;
                }
                Piece::Hole(bytes) => {
                    holes::hash_zeros(&mut hasher, bytes);
                    found += bytes;
                    ends_in_hole = true;
                }
            }
        }
        if ends_in_hole && !cloned {
            target.set_len(found).map_err(io)?;
        }
        if hasher.finalize().as_bytes() != &self.blob.0 {
            // As long as it lies there, nobody sends it again.
            store.remove(&self.blob).map_err(content)?;
            return Err(Error::Corrupt { path: place.path.to_owned(), blob: self.blob });
        }
        if found != self.size {
            let (blob, expected) = (self.blob, self.size);
            return Err(Error::Size { path: place.path.to_owned(), blob, expected, found });
        }
        self.dress(&target, place).map_err(io)
    }
}

fn create(dir: BorrowedFd<'_>, name: &[u8], mode: Mode) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(openat(dir, name, flags, mode)?))
}

fn make_dir(dir: BorrowedFd<'_>, name: &[u8], options: &MaterializeOptions) -> io::Result<()> {
    if beneath::make_dir(dir, name)? == Made::New {
        let made = beneath::open_dir(dir, name)?;
        fchmod(made.as_fd(), Mode::from_raw_mode(0o755))?;
        if let Some((uid, gid)) = owner(options) {
            fchown(made.as_fd(), Some(uid), Some(gid))?;
        }
    } else if !beneath::is(&beneath::state(dir, name)?, FileType::Directory) {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    Ok(())
}

fn owner(options: &MaterializeOptions) -> Option<(Uid, Gid)> {
    options.owner.map(|(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid)))
}

fn temporary_name() -> Vec<u8> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!(".p2pit-{}-{count}.part", std::process::id()).into_bytes()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};

    use super::{
        super::tree::{LinkTarget, TreePath},
        *,
    };

    #[test]
    fn a_tree_stands_on_disk_with_its_modes_links_and_empty_directories() {
        let fixture = Fixture::new();
        let tree = Tree::new(vec![
            fixture.file("a/b/script", b"#!", true),
            fixture.file("a/data", &vec![7; 3 * BUFFER_BYTES + 1], false),
            link("a/out", "/etc/passwd"),
            entry("empty", Kind::Dir),
        ])
        .unwrap();
        fixture.materialize(&tree, Existing::Nothing).unwrap();
        let at = |path: &str| fixture.dest.join(path);
        let mode = |path: &str| fs::metadata(at(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!(fs::read(at("a/b/script")).unwrap(), b"#!");
        assert_eq!(fs::read(at("a/data")).unwrap(), vec![7; 3 * BUFFER_BYTES + 1]);
        assert_eq!((mode("a/b/script"), mode("a/data"), mode("a")), (0o755, 0o644, 0o755));
        assert_eq!(fs::read_link(at("a/out")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read_dir(at("empty")).unwrap().count(), 0);
        let again = fixture.materialize(&tree, Existing::Nothing);
        assert!(matches!(again, Err(Error::NotEmpty(path)) if path == fixture.dest));
    }

    #[test]
    fn many_files_are_written_by_several_threads_into_shared_directories() {
        let fixture = Fixture::new();
        let entries: Vec<Entry> = (0..500)
            .map(|i| fixture.file(&format!("d{}/e{}/f{i}", i % 3, i % 7), &[i as u8], false))
            .collect();
        let tree = Tree::new(entries).unwrap();
        fixture.materialize(&tree, Existing::Nothing).unwrap();
        for entry in tree.entries() {
            assert_eq!(fs::read(fixture.dest.join(entry.path.as_path())).unwrap().len(), 1);
        }
    }

    #[test]
    fn a_store_that_is_given_up_gives_its_files() {
        let fixture = Fixture::new();
        let tree = Tree::new(vec![
            fixture.file("dir/once", b"once", true),
            fixture.file("twice", b"twice", false),
            fixture.file("again", b"twice", false),
            fixture.file("there", b"new", false),
        ])
        .unwrap();
        fs::create_dir(&fixture.dest).unwrap();
        fs::write(fixture.dest.join("there"), "old").unwrap();
        let options = MaterializeOptions { consume: true, ..MaterializeOptions::default() };
        let keep = MaterializeOptions { existing: Existing::Keep, ..options };
        let error = materialize(&fixture.store, &tree, &fixture.dest, &keep).unwrap_err();
        assert!(matches!(error, Error::Exists(path) if path.ends_with("there")));
        fs::remove_dir_all(&fixture.dest).unwrap();
        fs::create_dir(&fixture.dest).unwrap();
        fs::write(fixture.dest.join("there"), "old").unwrap();
        for content in ["once", "twice", "new"] {
            fixture.store.put_bytes(content.as_bytes()).unwrap();
        }
        let replace = MaterializeOptions { existing: Existing::Replace, ..options };
        materialize(&fixture.store, &tree, &fixture.dest, &replace).unwrap();
        for (path, content) in
            [("dir/once", "once"), ("twice", "twice"), ("again", "twice"), ("there", "new")]
        {
            assert_eq!(fs::read_to_string(fixture.dest.join(path)).unwrap(), content);
        }
        let mode = |path| fs::metadata(fixture.dest.join(path)).unwrap().permissions().mode();
        assert_eq!((mode("dir/once") & 0o777, mode("there") & 0o777), (0o755, 0o644));
        assert!(
            !fixture.store.has(&BlobId::of(b"once")) && fixture.store.has(&BlobId::of(b"twice"))
        );
    }

    #[test]
    fn a_corrupt_or_missing_blob_is_named_and_leaves_no_file() {
        let fixture = Fixture::new();
        let tree = Tree::new(vec![fixture.file("a/x", b"right", false)]).unwrap();
        let blob = BlobId::of(b"right");
        fs::write(fixture.store.path_of(&blob), b"wrong").unwrap();
        let error = fixture.materialize(&tree, Existing::Nothing).unwrap_err();
        assert!(
            matches!(&error, Error::Corrupt { path, blob: id }
                if path.ends_with("a/x") && *id == blob),
            "{error:?}"
        );
        assert!(!fixture.dest.join("a/x").exists());
        assert!(!fixture.store.has(&blob), "it can be brought again");
        let error = fixture.materialize(&tree, Existing::Keep).unwrap_err();
        assert!(matches!(error, Error::Content { source: store::Error::Missing(_), .. }));
    }

    #[test]
    fn holes_stay_holes() {
        let fixture = Fixture::new();
        let mut content = vec![0; 8 << 20];
        content[5 << 20..][..6].copy_from_slice(b"middle");
        let tree = Tree::new(vec![fixture.file("sparse", &content, false)]).unwrap();
        let path = fixture.store.path_of(&BlobId::of(&content));
        let blob = File::create(&path).unwrap();
        blob.write_all_at(b"middle", 5 << 20).unwrap();
        blob.set_len(content.len() as u64).unwrap();
        fixture.materialize(&tree, Existing::Nothing).unwrap();
        let written = fixture.dest.join("sparse");
        assert!(fs::read(&written).unwrap() == content);
        let allocated = |path: &Path| fs::metadata(path).unwrap().blocks();
        assert!(allocated(&written) <= allocated(&path));
    }

    #[test]
    fn a_size_that_is_not_the_blobs_is_refused() {
        let fixture = Fixture::new();
        let mut lie = fixture.file("x", b"four", false);
        if let Kind::File { size, .. } = &mut lie.kind {
            *size = 5;
        }
        let tree = Tree::new(vec![lie]).unwrap();
        let error = fixture.materialize(&tree, Existing::Nothing).unwrap_err();
        assert!(matches!(error, Error::Size { expected: 5, found: 4, .. }));
    }

    #[test]
    fn nothing_is_written_through_a_link_at_the_destination() {
        let fixture = Fixture::new();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "theirs").unwrap();
        fs::create_dir(&fixture.dest).unwrap();
        symlink(outside.path(), fixture.dest.join("a")).unwrap();
        symlink(outside.path().join("file"), fixture.dest.join("f")).unwrap();
        let through_dir = Tree::new(vec![fixture.file("a/file", b"mine", false)]).unwrap();
        let through_file = Tree::new(vec![fixture.file("f", b"mine", false)]).unwrap();
        for existing in [Existing::Keep, Existing::Replace] {
            assert!(fixture.materialize(&through_dir, existing).is_err());
        }
        let kept = fixture.materialize(&through_file, Existing::Keep);
        assert!(matches!(kept, Err(Error::Exists(_))));
        fixture.materialize(&through_file, Existing::Replace).unwrap();
        assert_eq!(fs::read(fixture.dest.join("f")).unwrap(), b"mine");
        assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"theirs");
    }

    #[test]
    fn replacing_spares_directories_and_keeps_the_old_file_when_content_fails() {
        let fixture = Fixture::new();
        fs::create_dir_all(fixture.dest.join("dir")).unwrap();
        fs::write(fixture.dest.join("file"), "old").unwrap();
        let over_dir = Tree::new(vec![fixture.file("dir", b"x", false)]).unwrap();
        let error = fixture.materialize(&over_dir, Existing::Replace).unwrap_err();
        assert!(matches!(error, Error::Exists(_)));
        let over_file = Tree::new(vec![fixture.file("file", b"new", false)]).unwrap();
        fs::write(fixture.store.path_of(&BlobId::of(b"new")), b"bad").unwrap();
        assert!(fixture.materialize(&over_file, Existing::Replace).is_err());
        assert_eq!(fs::read(fixture.dest.join("file")).unwrap(), b"old");
        assert_eq!(fs::read_dir(&fixture.dest).unwrap().count(), 2);
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        store: BlobStore,
        dest: PathBuf,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
            let dest = dir.path().join("dest");
            Self { _dir: dir, store, dest }
        }

        fn file(&self, path: &str, content: &[u8], executable: bool) -> Entry {
            let blob = self.store.put_bytes(content).unwrap();
            entry(path, Kind::File { blob, size: content.len() as u64, executable })
        }

        fn materialize(&self, tree: &Tree, existing: Existing) -> Result<(), Error> {
            let options = MaterializeOptions { existing, ..MaterializeOptions::default() };
            materialize(&self.store, tree, &self.dest, &options)
        }
    }

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: TreePath::from_bytes(path).unwrap(), kind }
    }

    fn link(path: &str, target: &str) -> Entry {
        entry(path, Kind::Symlink { target: LinkTarget::from_bytes(target).unwrap() })
    }
}
