//! The manifest of a directory: sorted entries, encoded one way only.
//!
//! A manifest may come from anybody, so [`Tree::decode`] accepts only what
//! [`Tree::encode`] makes: relative paths of plain components, in strictly ascending
//! order, none inside a file, a link or a directory said to be empty. Names are bytes,
//! because those of Unix are.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fmt,
    marker::PhantomData,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use p2pit_protocol::{
    BlobId,
    wire::{self, DecodeError},
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, SeqAccess, Visitor},
};
use thiserror::Error;

/// Entries in one tree.
pub const ENTRIES_MAX: usize = 1_000_000;
/// Bytes of one encoded manifest.
pub const MANIFEST_BYTES_MAX: usize = 128 << 20;
/// Bytes of one path, separators included; the kernel's own limit.
pub const PATH_BYTES_MAX: usize = 4096;
/// Bytes of one name; the limit of the usual file systems.
pub const NAME_BYTES_MAX: usize = 255;
/// Components of one path: whoever walks a tree keeps one descriptor open per level.
pub const DEPTH_MAX: usize = 128;

/// Says what the bytes are and in which version.
const HEADER: &[u8] = b"p2pit-tree/1\n";

/// The content of a directory: what is where, with the hash of every file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    /// As [`check`] demands.
    entries: Vec<Entry>,
}

/// One file, link or empty directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub path: TreePath,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    File {
        blob: BlobId,
        size: u64,
        executable: bool,
    },
    /// Kept as it is and never followed, wherever it points.
    Symlink {
        target: LinkTarget,
    },
    /// A directory without entries; all others follow from the paths.
    Dir,
}

/// What stands directly inside a directory of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: Vec<u8>,
    pub kind: ListedKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListedKind {
    File {
        blob: BlobId,
        size: u64,
        executable: bool,
    },
    Symlink {
        target: LinkTarget,
    },
    /// With the number and the bytes of all files below.
    Dir {
        files: u64,
        bytes: u64,
    },
}

/// Why something is not a tree.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum Error {
    #[error("`{0}` appears twice")]
    Duplicate(TreePath),
    #[error("`{0}` is out of order")]
    Order(TreePath),
    #[error("`{inner}` lies inside `{outer}`, which is not a directory with entries")]
    Inside { inner: TreePath, outer: TreePath },
    #[error("more than {ENTRIES_MAX} entries")]
    TooManyEntries,
    #[error("the sizes of the files add up to more than can be")]
    TooManyBytes,
    #[error("not a directory manifest of version 1")]
    NotAManifest,
    #[error("malformed directory manifest")]
    Malformed(#[source] DecodeError),
    #[error("a manifest of {0} bytes where at most {MANIFEST_BYTES_MAX} are allowed")]
    ManifestTooLong(usize),
}

impl Tree {
    /// The tree of `entries`, in any order. A directory named as empty that has entries
    /// after all is left out.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, Error> {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        let mut kept: Vec<Entry> = Vec::with_capacity(entries.len());
        for entry in entries {
            let implied = |last: &Entry| last.kind == Kind::Dir && last.path.contains(&entry.path);
            if kept.last().is_some_and(implied) {
                kept.pop();
            }
            kept.push(entry);
        }
        check(&kept)?;
        Ok(Self { entries: kept })
    }

    /// The manifest: the same bytes for the same tree, everywhere.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let bytes = [HEADER, &wire::encode(&self.entries)].concat();
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(Error::ManifestTooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// The tree of a manifest, whoever made it.
    pub fn decode(manifest: &[u8]) -> Result<Self, Error> {
        // The codec charges an integer at its full width, up to eight times its bytes.
        const CHARGED_BYTES_MAX: usize = 8 * MANIFEST_BYTES_MAX;
        if manifest.len() > MANIFEST_BYTES_MAX {
            return Err(Error::ManifestTooLong(manifest.len()));
        }
        let body = manifest.strip_prefix(HEADER).ok_or(Error::NotAManifest)?;
        let Bounded::<Entry, ENTRIES_MAX>(entries) =
            wire::decode_limited::<_, CHARGED_BYTES_MAX>(body).map_err(Error::Malformed)?;
        check(&entries)?;
        Ok(Self { entries })
    }

    /// All entries, ascending by path; a path comes right before what it contains.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn file_count(&self) -> u64 {
        self.files().count() as u64
    }

    /// The sizes of all files, each as often as it appears.
    pub fn total_bytes(&self) -> u64 {
        self.files().map(|(_, size)| size).sum()
    }

    /// The distinct blobs of the files with their sizes. A manifest that lies names two
    /// sizes for one blob; the larger is given here, and no content can fit both.
    pub fn blobs(&self) -> BTreeMap<BlobId, u64> {
        let mut blobs = BTreeMap::new();
        for (blob, size) in self.files() {
            let known = blobs.entry(blob).or_insert(size);
            *known = size.max(*known);
        }
        blobs
    }

    /// The entry at exactly `path`.
    pub fn get(&self, path: &TreePath) -> Option<&Entry> {
        let index = self.entries.binary_search_by(|entry| entry.path.cmp(path)).ok()?;
        Some(&self.entries[index])
    }

    /// What stands directly in `dir` (`None` is the root), ascending by name; a file or
    /// link lists as itself. `None` where there is no such path.
    pub fn list(&self, dir: Option<&TreePath>) -> Option<Vec<Listed>> {
        let Some(dir) = dir else { return Some(children(&self.entries, 0)) };
        match self.get(dir) {
            Some(Entry { kind: Kind::Dir, .. }) => Some(Vec::new()),
            Some(entry) => {
                Some(vec![Listed { name: dir.file_name().to_vec(), kind: listed(&entry.kind) }])
            }
            None => {
                let below = self.below(dir);
                (!below.is_empty()).then(|| children(below, dir.components().count()))
            }
        }
    }

    /// What is at or below `path`, as a tree of its own: the content of a directory, or
    /// the one file or link under its name. `None` where there is no such path.
    pub fn subtree(&self, path: &TreePath) -> Option<Self> {
        match self.get(path) {
            Some(Entry { kind: Kind::Dir, .. }) => Some(Self::default()),
            Some(entry) => {
                let path = TreePath(path.file_name().to_vec());
                Some(Self { entries: vec![Entry { path, kind: entry.kind.clone() }] })
            }
            None => {
                let below = self.below(path);
                let strip = |entry: &Entry| Entry {
                    path: TreePath(entry.path.0[path.0.len() + 1..].to_vec()),
                    kind: entry.kind.clone(),
                };
                (!below.is_empty()).then(|| Self { entries: below.iter().map(strip).collect() })
            }
        }
    }

    /// One tree of the trees of several ranks. What all that have a path agree on stands
    /// at that path; where they differ, each rank's version stands under `rank<i>/`.
    pub fn union(ranks: &[(u32, &Self)]) -> Result<Self, UnionError> {
        let mut merged: BTreeMap<&TreePath, Versions<'_>> = BTreeMap::new();
        for (rank, tree) in ranks {
            for entry in &tree.entries {
                merged.entry(&entry.path).or_default().add(*rank, &entry.kind);
            }
        }
        let apart = conflicting(&merged);
        let taken: BTreeSet<&[u8]> =
            merged.keys().filter_map(|path| path.components().next()).collect();
        let mut entries = Vec::new();
        for (path, versions) in merged {
            if !apart.contains(path) {
                entries.push(Entry { path: path.clone(), kind: versions.0[0].1.clone() });
                continue;
            }
            for (rank, kind) in versions.0 {
                let path = path.under(&rank_dir(rank, &taken))?;
                entries.push(Entry { path, kind: kind.clone() });
            }
        }
        Ok(Self::new(entries)?)
    }

    /// As [`Self::union`], of ranks that each began with a copy of `base`: what one of them
    /// changed is not made a conflict by those that left it as it was. What one removed and
    /// another left stays: nothing is lost because a process tidied up its own copy.
    pub fn union_since(base: &Self, ranks: &[(u32, &Self)]) -> Result<Self, UnionError> {
        let is_changed =
            |tree: &Self, entry: &Entry| tree.get(&entry.path).is_some_and(|it| it != entry);
        let changed: BTreeMap<&TreePath, &Entry> = base
            .entries
            .iter()
            .filter(|entry| ranks.iter().any(|(_, tree)| is_changed(tree, entry)))
            .map(|entry| (&entry.path, entry))
            .collect();
        let is_old = |entry: &Entry| changed.get(&entry.path) == Some(&entry);
        let without = |tree: &Self| Self {
            entries: tree.entries.iter().filter(|entry| !is_old(entry)).cloned().collect(),
        };
        let ranks: Vec<(u32, Self)> =
            ranks.iter().map(|(rank, tree)| (*rank, without(tree))).collect();
        let ranks: Vec<(u32, &Self)> = ranks.iter().map(|(rank, tree)| (*rank, tree)).collect();
        Self::union(&ranks)
    }

    fn files(&self) -> impl Iterator<Item = (BlobId, u64)> {
        self.entries.iter().filter_map(|entry| match entry.kind {
            Kind::File { blob, size, .. } => Some((blob, size)),
            Kind::Symlink { .. } | Kind::Dir => None,
        })
    }

    /// The entries inside `dir`: they stand together.
    fn below(&self, dir: &TreePath) -> &[Entry] {
        let start = self.entries.partition_point(|entry| entry.path <= *dir);
        let rest = &self.entries[start..];
        &rest[..rest.partition_point(|entry| dir.contains(&entry.path))]
    }
}

/// Why the trees of several ranks have no union.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum UnionError {
    #[error(transparent)]
    Tree(#[from] Error),
    #[error("no room for a conflicting path under its rank's directory")]
    Path(#[from] PathError),
}

/// Where something is in a tree: one or more plain components, joined by `/`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TreePath(Vec<u8>);

/// Why bytes are not a path inside a tree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("path `{path}` {problem}")]
pub struct PathError {
    path: String,
    problem: &'static str,
}

impl TreePath {
    /// The path of components joined by `/`.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self, PathError> {
        let bytes = bytes.into();
        match problem_with(&bytes) {
            None => Ok(Self(bytes)),
            Some(problem) => {
                let shown = &bytes[..bytes.len().min(200)];
                Err(PathError { path: shown.escape_ascii().to_string(), problem })
            }
        }
    }

    /// The path below a tree's root. `.` components and a trailing slash are what a
    /// person may write, and fall away.
    pub fn from_path(path: &Path) -> Result<Self, PathError> {
        let mut bytes = Vec::with_capacity(path.as_os_str().len());
        for component in path.components().filter(|c| *c != Component::CurDir) {
            if !bytes.is_empty() {
                bytes.push(b'/');
            }
            bytes.extend_from_slice(component.as_os_str().as_bytes());
        }
        Self::from_bytes(bytes)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a relative path.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    pub fn to_path_buf(&self) -> PathBuf {
        self.as_path().to_owned()
    }

    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }

    /// The last component.
    pub fn file_name(&self) -> &[u8] {
        self.split().1
    }

    /// Whether `inner` lies inside this path, at any depth.
    pub fn contains(&self, inner: &Self) -> bool {
        inner.0.strip_prefix(&self.0[..]).is_some_and(|rest| rest.first() == Some(&b'/'))
    }

    /// This path inside the directory `parent`.
    pub fn under(&self, parent: &Self) -> Result<Self, PathError> {
        Self::from_bytes([&parent.0[..], b"/", &self.0].concat())
    }

    /// The components before the last, and the last.
    pub(super) fn split(&self) -> (Vec<&[u8]>, &[u8]) {
        let mut parents: Vec<&[u8]> = self.components().collect();
        let name = parents.pop().unwrap_or_default();
        (parents, name)
    }
}

impl Ord for TreePath {
    /// By components, not by bytes: `a/b` comes before `a-b`, so that a directory's
    /// entries follow it without a gap.
    fn cmp(&self, other: &Self) -> Ordering {
        let differing = self.0.iter().zip(&other.0).find(|(a, b)| a != b);
        match differing {
            None => self.0.len().cmp(&other.0.len()),
            Some((b'/', _)) => Ordering::Less,
            Some((_, b'/')) => Ordering::Greater,
            Some((a, b)) => a.cmp(b),
        }
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", String::from_utf8_lossy(&self.0).escape_debug())
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{self}`")
    }
}

impl Serialize for TreePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for TreePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Bounded::<u8, PATH_BYTES_MAX>(bytes) = Bounded::deserialize(deserializer)?;
        Self::from_bytes(bytes).map_err(de::Error::custom)
    }
}

/// Where a symbolic link points: any bytes a file system can hold.
#[derive(Clone, PartialEq, Eq)]
pub struct LinkTarget(Vec<u8>);

impl LinkTarget {
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self, PathError> {
        let bytes = bytes.into();
        let problem = if bytes.is_empty() {
            "is an empty link target"
        } else if bytes.len() > PATH_BYTES_MAX {
            "is too long a link target"
        } else if bytes.contains(&0) {
            "is a link target with a NUL byte"
        } else {
            return Ok(Self(bytes));
        };
        let shown = &bytes[..bytes.len().min(200)];
        Err(PathError { path: shown.escape_ascii().to_string(), problem })
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for LinkTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", String::from_utf8_lossy(&self.0).escape_debug())
    }
}

impl fmt::Debug for LinkTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{self}`")
    }
}

impl Serialize for LinkTarget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for LinkTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Bounded::<u8, PATH_BYTES_MAX>(bytes) = Bounded::deserialize(deserializer)?;
        Self::from_bytes(bytes).map_err(de::Error::custom)
    }
}

/// What makes a list of entries a tree. Because of the order, whatever lies inside a
/// path comes right after it, so neighbours are all that must be compared.
fn check(entries: &[Entry]) -> Result<(), Error> {
    if entries.len() > ENTRIES_MAX {
        return Err(Error::TooManyEntries);
    }
    for pair in entries.windows(2) {
        let [before, after] = pair else { continue };
        match before.path.cmp(&after.path) {
            Ordering::Less => {}
            Ordering::Equal => return Err(Error::Duplicate(after.path.clone())),
            Ordering::Greater => return Err(Error::Order(after.path.clone())),
        }
        if before.path.contains(&after.path) {
            let (inner, outer) = (after.path.clone(), before.path.clone());
            return Err(Error::Inside { inner, outer });
        }
    }
    let sizes = entries.iter().map(|entry| match entry.kind {
        Kind::File { size, .. } => size,
        Kind::Symlink { .. } | Kind::Dir => 0,
    });
    sizes.into_iter().try_fold(0_u64, u64::checked_add).ok_or(Error::TooManyBytes)?;
    Ok(())
}

fn problem_with(path: &[u8]) -> Option<&'static str> {
    if path.len() > PATH_BYTES_MAX {
        return Some("is too long");
    }
    if path.first() == Some(&b'/') {
        return Some("is absolute");
    }
    if path.contains(&0) {
        return Some("contains a NUL byte");
    }
    let mut depth = 0;
    for component in path.split(|byte| *byte == b'/') {
        depth += 1;
        match component {
            b"" => return Some("has an empty component"),
            b"." => return Some("has a `.` component"),
            b".." => return Some("has a `..` component"),
            name if name.len() > NAME_BYTES_MAX => return Some("has too long a name"),
            _ => {}
        }
    }
    (depth > DEPTH_MAX).then_some("is too deep")
}

/// Groups entries that share `depth` components by the next one.
fn children(entries: &[Entry], depth: usize) -> Vec<Listed> {
    let mut list: Vec<Listed> = Vec::new();
    for entry in entries {
        let mut rest = entry.path.components().skip(depth);
        let Some(name) = rest.next() else { continue };
        if rest.next().is_none() {
            list.push(Listed { name: name.to_vec(), kind: listed(&entry.kind) });
            continue;
        }
        if list.last().is_none_or(|last| last.name != name) {
            let kind = ListedKind::Dir { files: 0, bytes: 0 };
            list.push(Listed { name: name.to_vec(), kind });
        }
        if let (
            Some(Listed { kind: ListedKind::Dir { files, bytes }, .. }),
            Kind::File { size, .. },
        ) = (list.last_mut(), &entry.kind)
        {
            *files += 1;
            *bytes += size;
        }
    }
    list
}

fn listed(kind: &Kind) -> ListedKind {
    match kind {
        Kind::File { blob, size, executable } => {
            ListedKind::File { blob: *blob, size: *size, executable: *executable }
        }
        Kind::Symlink { target } => ListedKind::Symlink { target: target.clone() },
        Kind::Dir => ListedKind::Dir { files: 0, bytes: 0 },
    }
}

/// What the ranks have at one path.
#[derive(Default)]
struct Versions<'a>(Vec<(u32, &'a Kind)>);

impl<'a> Versions<'a> {
    fn add(&mut self, rank: u32, kind: &'a Kind) {
        self.0.push((rank, kind));
    }

    fn agree(&self) -> bool {
        self.0.windows(2).all(|pair| pair[0].1 == pair[1].1)
    }

    fn has_leaf(&self) -> bool {
        self.0.iter().any(|(_, kind)| **kind != Kind::Dir)
    }
}

/// The paths that cannot stand in one tree: the ranks differ there, or it is a file for
/// one of them and a directory for another.
fn conflicting<'a>(merged: &BTreeMap<&'a TreePath, Versions<'_>>) -> BTreeSet<&'a TreePath> {
    let mut apart = BTreeSet::new();
    let mut outer_leaves: Vec<&TreePath> = Vec::new();
    for (path, versions) in merged {
        outer_leaves.retain(|outer| outer.contains(path));
        if !versions.agree() || !outer_leaves.is_empty() {
            apart.insert(*path);
        }
        apart.extend(&outer_leaves);
        if versions.has_leaf() {
            outer_leaves.push(path);
        }
    }
    apart
}

/// `rank<i>`, lengthened by `_` until no rank has an entry of that name.
fn rank_dir(rank: u32, taken: &BTreeSet<&[u8]>) -> TreePath {
    let mut name = format!("rank{rank}").into_bytes();
    while taken.contains(&name[..]) {
        name.push(b'_');
    }
    TreePath(name)
}

/// A sequence that is refused as soon as it has more than `MAX` items, whatever length
/// it claims.
struct Bounded<T, const MAX: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(BoundedVisitor(PhantomData))
    }
}

struct BoundedVisitor<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for BoundedVisitor<T, MAX> {
    type Value = Bounded<T, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX} items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        // A claimed length is only a hint: memory grows with what really comes.
        const RESERVED_MAX: usize = 64;
        let claimed = sequence.size_hint().unwrap_or(0);
        if claimed > MAX {
            return Err(de::Error::invalid_length(claimed, &self));
        }
        let mut items = Vec::with_capacity(claimed.min(RESERVED_MAX));
        while let Some(item) = sequence.next_element()? {
            if items.len() == MAX {
                return Err(de::Error::invalid_length(MAX + 1, &self));
            }
            items.push(item);
        }
        Ok(Bounded(items))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tree_comes_back_from_its_manifest_and_encodes_the_same_in_any_order() {
        let entries = vec![file("b/c", b"1"), link("a", "../outside"), dir("b/empty")];
        let mut reversed = entries.clone();
        reversed.reverse();
        let tree = Tree::new(entries).unwrap();
        let manifest = tree.encode().unwrap();
        assert_eq!(Tree::decode(&manifest).unwrap(), tree);
        assert_eq!(Tree::new(reversed).unwrap().encode().unwrap(), manifest);
        assert_eq!((tree.file_count(), tree.total_bytes()), (1, 1));
    }

    #[test]
    fn hostile_paths_are_refused_by_name() {
        for (path, problem) in [
            ("", "empty component"),
            ("/etc/passwd", "absolute"),
            ("a/../b", "`..`"),
            ("..", "`..`"),
            ("./a", "`.`"),
            ("a//b", "empty component"),
            ("a/", "empty component"),
            ("a\0b", "NUL"),
            (&"n".repeat(NAME_BYTES_MAX + 1), "too long a name"),
            (&"a/".repeat(PATH_BYTES_MAX), "too long"),
            (&format!("{}a", "a/".repeat(DEPTH_MAX)), "too deep"),
        ] {
            let error = TreePath::from_bytes(path).unwrap_err();
            assert!(error.to_string().contains(problem), "{path:.20}: {error}");
            let forged = manifest_of(&[Entry { path: TreePath(path.into()), kind: Kind::Dir }]);
            assert!(matches!(Tree::decode(&forged), Err(Error::Malformed(_))), "{path:.20}");
        }
        assert!(TreePath::from_bytes(&b"caf\xe9"[..]).is_ok());
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let twice = manifest_of(&[file("a", b"1"), file("a", b"2")]);
        assert_eq!(Tree::decode(&twice), Err(Error::Duplicate(path("a"))));
        let unsorted = manifest_of(&[file("b", b"1"), file("a", b"2")]);
        assert_eq!(Tree::decode(&unsorted), Err(Error::Order(path("a"))));
        for outer in [file("a", b"1"), link("a", "/tmp"), dir("a")] {
            let inside = manifest_of(&[outer, file("a/b", b"2")]);
            let error = Tree::decode(&inside).unwrap_err();
            assert_eq!(error, Error::Inside { inner: path("a/b"), outer: path("a") });
        }
        let huge = |name| Entry {
            path: path(name),
            kind: Kind::File { blob: BlobId([0; 32]), size: u64::MAX, executable: false },
        };
        assert_eq!(Tree::decode(&manifest_of(&[huge("a"), huge("b")])), Err(Error::TooManyBytes));
        assert_eq!(Tree::decode(b""), Err(Error::NotAManifest));
        assert_eq!(Tree::decode(b"p2pit-tree/2\n\0"), Err(Error::NotAManifest));
        let mut trailing = manifest_of(&[file("a", b"1")]);
        trailing.push(0);
        assert!(matches!(Tree::decode(&trailing), Err(Error::Malformed(_))));
        let empty_link =
            Entry { path: path("a"), kind: Kind::Symlink { target: LinkTarget(vec![]) } };
        assert!(matches!(Tree::decode(&manifest_of(&[empty_link])), Err(Error::Malformed(_))));
    }

    #[test]
    fn claimed_counts_cost_nothing() {
        // 2^62 entries, and a path of 2^32 bytes.
        for claim in [&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0x40][..], &[1, 0xfc, 0xff, 0xff, 0xff, 0xff]] {
            let forged = [HEADER, claim].concat();
            assert!(matches!(Tree::decode(&forged), Err(Error::Malformed(_))));
        }
        let many = vec![dir("a"); ENTRIES_MAX + 1];
        assert!(matches!(Tree::decode(&manifest_of(&many)), Err(Error::Malformed(_))));
    }

    #[test]
    fn a_directory_lists_what_stands_directly_in_it() {
        let entries = vec![file("a/x", b"1"), file("a/b/y", b"22"), file("a-b", b"3"), dir("e")];
        let tree = Tree::new(entries).unwrap();
        let names = |list: Option<Vec<Listed>>| {
            list.map(|list| {
                list.into_iter().map(|l| String::from_utf8(l.name).unwrap()).collect::<Vec<_>>()
            })
        };
        assert_eq!(names(tree.list(None)), Some(vec!["a".into(), "a-b".into(), "e".into()]));
        assert_eq!(names(tree.list(Some(&path("a")))), Some(vec!["b".into(), "x".into()]));
        assert_eq!(names(tree.list(Some(&path("e")))), Some(vec![]));
        assert_eq!(names(tree.list(Some(&path("a/x")))), Some(vec!["x".into()]));
        assert_eq!(tree.list(Some(&path("nowhere"))), None);
        let top = tree.list(None).unwrap();
        assert_eq!(top[0].kind, ListedKind::Dir { files: 2, bytes: 3 });
        let sub = tree.subtree(&path("a")).unwrap();
        assert_eq!(sub, Tree::new(vec![file("x", b"1"), file("b/y", b"22")]).unwrap());
        let one = tree.subtree(&path("a/b/y")).unwrap();
        assert_eq!(one, Tree::new(vec![file("y", b"22")]).unwrap());
        assert_eq!(tree.subtree(&path("a/z")), None);
    }

    #[test]
    fn a_union_keeps_what_agrees_and_parts_what_differs_by_rank() {
        let zero = Tree::new(vec![
            file("same", b"1"),
            file("log", b"zero"),
            file("out", b"a file here"),
            dir("d"),
            file("only0", b"x"),
        ])
        .unwrap();
        let one = Tree::new(vec![
            file("same", b"1"),
            file("log", b"one"),
            file("out/part", b"a directory there"),
            file("d/filled", b"y"),
        ])
        .unwrap();
        let union = Tree::union(&[(0, &zero), (1, &one)]).unwrap();
        let expected = Tree::new(vec![
            file("same", b"1"),
            file("only0", b"x"),
            file("d/filled", b"y"),
            file("rank0/log", b"zero"),
            file("rank1/log", b"one"),
            file("rank0/out", b"a file here"),
            file("rank1/out/part", b"a directory there"),
        ])
        .unwrap();
        assert_eq!(union, expected);
    }

    #[test]
    fn what_one_rank_changed_is_so_although_the_others_left_it() {
        let base = Tree::new(vec![
            file("checkpoint", b"epoch 1"),
            file("removed", b"old"),
            file("same", b"1"),
            file("both", b"before"),
        ])
        .unwrap();
        let zero = Tree::new(vec![
            file("checkpoint", b"epoch 2"),
            file("same", b"1"),
            file("both", b"zero"),
            file("new", b"n"),
        ])
        .unwrap();
        let mut one = base.entries().to_vec();
        one[0] = file("both", b"one");
        let one = Tree::new(one).unwrap();
        let union = Tree::union_since(&base, &[(0, &zero), (1, &one), (2, &base)]).unwrap();
        let expected = Tree::new(vec![
            file("checkpoint", b"epoch 2"),
            file("removed", b"old"),
            file("same", b"1"),
            file("new", b"n"),
            file("rank0/both", b"zero"),
            file("rank1/both", b"one"),
        ])
        .unwrap();
        assert_eq!(union, expected);
        assert_eq!(Tree::union_since(&base, &[(0, &base), (1, &base)]).unwrap(), base);
    }

    #[test]
    fn a_union_never_writes_over_a_directory_called_like_a_rank() {
        let zero = Tree::new(vec![file("log", b"zero"), file("rank0/log", b"mine")]).unwrap();
        let one = Tree::new(vec![file("log", b"one")]).unwrap();
        let union = Tree::union(&[(0, &zero), (1, &one)]).unwrap();
        assert_eq!(union.get(&path("rank0/log")).unwrap(), &file("rank0/log", b"mine"));
        assert_eq!(union.get(&path("rank0_/log")).unwrap(), &file("rank0_/log", b"zero"));
        assert_eq!(union.get(&path("rank1/log")).unwrap(), &file("rank1/log", b"one"));
    }

    #[test]
    fn what_a_person_writes_becomes_a_path_unless_it_leaves() {
        assert_eq!(TreePath::from_path(Path::new("./keep/out/")), Ok(path("keep/out")));
        assert!(TreePath::from_path(Path::new("../x")).is_err());
        assert!(TreePath::from_path(Path::new("/etc")).is_err());
        assert!(TreePath::from_path(Path::new(".")).is_err());
    }

    proptest! {
        #[test]
        fn any_tree_round_trips(entries in prop::collection::vec(any_entry(), 0..40)) {
            if let Ok(tree) = Tree::new(entries) {
                let manifest = tree.encode().unwrap();
                prop_assert_eq!(Tree::decode(&manifest), Ok(tree));
            }
        }

        #[test]
        fn no_bytes_panic_the_decoder(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Tree::decode(&body);
            let _ = Tree::decode(&[HEADER, &body].concat());
        }

        #[test]
        fn paths_order_as_their_components_do(a in any_path(), b in any_path()) {
            let by_components: Ordering = a.components().cmp(b.components());
            prop_assert_eq!(a.cmp(&b), by_components);
        }

        #[test]
        fn any_trees_have_a_union_with_every_content(
            zero in prop::collection::vec(any_entry(), 0..12),
            one in prop::collection::vec(any_entry(), 0..12),
        ) {
            if let (Ok(zero), Ok(one)) = (Tree::new(zero), Tree::new(one)) {
                let union = Tree::union(&[(0, &zero), (1, &one)]).unwrap();
                let mut blobs = zero.blobs();
                blobs.extend(one.blobs());
                let kept: BTreeSet<_> = union.blobs().into_keys().collect();
                prop_assert_eq!(kept, blobs.into_keys().collect::<BTreeSet<_>>());
            }
        }
    }

    fn any_path() -> impl Strategy<Value = TreePath> {
        prop::collection::vec("[a-c.\\-é]{1,2}", 1..4)
            .prop_filter_map("a plain path", |parts| TreePath::from_bytes(parts.join("/")).ok())
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        let kind = prop_oneof![
            4 => (any::<u8>(), 0..1_000_u64, any::<bool>()).prop_map(|(seed, size, executable)| {
                Kind::File { blob: BlobId([seed; 32]), size, executable }
            }),
            1 => prop::collection::vec(1_u8.., 1..9)
                .prop_map(|target| Kind::Symlink { target: LinkTarget(target) }),
            1 => Just(Kind::Dir),
        ];
        (any_path(), kind).prop_map(|(path, kind)| Entry { path, kind })
    }

    fn path(text: &str) -> TreePath {
        TreePath::from_bytes(text).unwrap()
    }

    fn file(at: &str, content: &[u8]) -> Entry {
        let size = content.len() as u64;
        Entry {
            path: path(at),
            kind: Kind::File { blob: BlobId::of(content), size, executable: false },
        }
    }

    fn link(at: &str, target: &str) -> Entry {
        Entry {
            path: path(at),
            kind: Kind::Symlink { target: LinkTarget::from_bytes(target).unwrap() },
        }
    }

    fn dir(at: &str) -> Entry {
        Entry { path: path(at), kind: Kind::Dir }
    }

    /// What a peer could send: encoded without any check.
    fn manifest_of(entries: &[Entry]) -> Vec<u8> {
        [HEADER, &wire::encode(&entries)].concat()
    }
}
