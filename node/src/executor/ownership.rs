//! Handing directories to the user that a job runs as.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, chownat, openat2},
    process::{Gid, Uid},
};

use super::spec::RunAs;

/// Makes `ids` the owner of everything below the given paths, and of these. Does nothing
/// where the job keeps the daemon's user.
///
/// Links are changed, not followed, and nothing outside the trees is touched even if a job
/// that still runs replaces directories by links meanwhile.
pub fn prepare_ownership<P: AsRef<Path>>(
    paths: impl IntoIterator<Item = P>,
    ids: Option<RunAs>,
) -> Result<()> {
    let Some(ids) = ids else { return Ok(()) };
    for path in paths {
        let path = path.as_ref();
        change_tree(path, ids)
            .with_context(|| format!("cannot hand {} to uid {}", path.display(), ids.uid))?;
    }
    Ok(())
}

fn change_tree(root: &Path, ids: RunAs) -> Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(ids.uid)), Some(Gid::from_raw(ids.gid)));
    chownat(CWD, root, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    if !root.symlink_metadata()?.is_dir() {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root: OwnedFd = rustix::fs::open(root, flags, Mode::empty())?;
    let mut queue = vec![PathBuf::from(".")];
    while let Some(path) = queue.pop() {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let dir = openat2(&root, &path, flags, Mode::empty(), within)
            .with_context(|| format!("cannot open {}", path.display()))?;
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            chownat(&dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .with_context(|| format!("cannot change {:?} in {}", name, path.display()))?;
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode)
                }
                kind => kind,
            };
            if kind.is_dir() {
                use std::os::unix::ffi::OsStrExt as _;
                queue.push(path.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt as _};

    use super::*;

    #[test]
    fn a_whole_tree_changes_hands_but_not_what_its_links_point_to() {
        let Some(ids) = RunAs::for_this_daemon() else {
            println!("skipped: only root can give files away");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/file"), "").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        prepare_ownership([&tree], Some(ids)).unwrap();
        for path in ["", "a", "a/b", "a/b/file", "a/link"] {
            let metadata = tree.join(path).symlink_metadata().unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (ids.uid, ids.gid), "{path}");
        }
        assert_eq!(outside.metadata().unwrap().uid(), 0);
        assert_eq!(outside.join("file").metadata().unwrap().uid(), 0);
    }
}
