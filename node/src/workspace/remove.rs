//! Removing what a job made, whatever it did to be kept.
//!
//! Directories without permissions are opened up first, links are removed and not
//! followed, and trees of any depth are flattened on the way, so that neither descriptors
//! nor the stack run out. What is mounted in a tree is not entered: it is somebody else's.

use std::{
    ffi::CStr,
    fs::Permissions,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, openat2, renameat,
        statat, unlinkat,
    },
    io::Errno,
    path::Arg,
};
use thiserror::Error;

/// Something of a job that is still there.
#[derive(Debug, Error)]
#[error("cannot remove `{path}`")]
pub struct Residue {
    pub path: PathBuf,
    pub source: io::Error,
}

/// Directories deeper than this are moved up before they are entered.
const DEPTH_MAX: usize = 32;

/// Removes the directory, file or link at `path`; nothing there is fine.
pub(crate) fn tree(path: &Path) -> Result<(), Residue> {
    let residue = |errno: Errno| Residue { path: path.to_owned(), source: errno.into() };
    let state = match statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(state) => state,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(residue(errno)),
    };
    if !FileType::from_raw_mode(state.st_mode).is_dir() {
        return unlinkat(CWD, path, AtFlags::empty()).map_err(residue);
    }
    let root = open(CWD, path, ResolveFlags::empty()).map_err(residue)?;
    let mut removal = Removal { root: root.as_fd(), first_failure: None, moved: 0 };
    let emptied = removal.empty(root.as_fd(), path, 0);
    let removed = emptied.and_then(|()| unlinkat(CWD, path, AtFlags::REMOVEDIR));
    match (removed, removal.first_failure) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(failure)) => Err(failure),
        (Err(errno), None) => Err(residue(errno)),
    }
}

struct Removal<'a> {
    root: BorrowedFd<'a>,
    first_failure: Option<Residue>,
    moved: u64,
}

impl Removal<'_> {
    /// As far as it goes: what cannot be removed does not keep the rest.
    fn empty(&mut self, dir: BorrowedFd<'_>, path: &Path, depth: usize) -> rustix::io::Result<()> {
        // Again as long as that leads further: what is moved up appears behind the reader,
        // and not every file system lists on evenly while entries go.
        loop {
            let (mut left, mut gone) = (false, false);
            for entry in Dir::read_from(dir)? {
                let entry = entry?;
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                match self.entry(dir, name, path, depth) {
                    Ok(()) => gone = true,
                    Err(errno) => {
                        left = true;
                        let path = path.join(name.to_string_lossy().as_ref());
                        let residue = Residue { path, source: errno.into() };
                        self.first_failure.get_or_insert(residue);
                    }
                }
            }
            if !gone {
                return if left { Err(Errno::NOTEMPTY) } else { Ok(()) };
            }
        }
    }

    fn entry(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
        depth: usize,
    ) -> rustix::io::Result<()> {
        let state = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if !FileType::from_raw_mode(state.st_mode).is_dir() {
            return unlinkat(dir, name, AtFlags::empty());
        }
        let inner = open(dir, name, ResolveFlags::NO_XDEV)?;
        if depth == DEPTH_MAX {
            return self.move_up(dir, name);
        }
        let path = path.join(name.to_string_lossy().as_ref());
        self.empty(inner.as_fd(), &path, depth + 1)?;
        unlinkat(dir, name, AtFlags::REMOVEDIR)
    }

    /// To the root, from where it is removed with the other entries there.
    fn move_up(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<()> {
        self.moved += 1;
        renameat(dir, name, self.root, format!(".p2pit-removed-{}", self.moved))
    }
}

/// Opens a directory, never through a link, and makes it one that entries can be removed
/// from.
fn open(
    dir: impl AsFd,
    name: impl Arg + Copy,
    within: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |access| openat2(&dir, name, flags | access, Mode::empty(), within);
    let opened = match open(OFlags::RDONLY) {
        Err(Errno::ACCESS) => {
            // The mode of a directory that must not be opened is changed by its descriptor's
            // name, since a path could have become a link.
            let place = open(OFlags::PATH)?;
            let link = format!("/proc/self/fd/{}", place.as_raw_fd());
            std::fs::set_permissions(link, Permissions::from_mode(0o700))
                .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::ACCESS))?;
            open(OFlags::RDONLY)?
        }
        other => other?,
    };
    if fstat(&opened)?.st_mode & 0o700 != 0o700 {
        fchmod(&opened, Mode::RWXU)?;
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{chown, symlink},
    };

    use super::*;

    #[test]
    fn everything_a_job_may_leave_is_removed_and_nothing_behind_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "theirs").unwrap();
        let tree_path = dir.path().join("tree");
        fs::create_dir_all(tree_path.join("locked/inner/most")).unwrap();
        fs::write(tree_path.join("locked/inner/file"), "").unwrap();
        symlink(&outside, tree_path.join("locked/inner/link")).unwrap();
        symlink(&outside, tree_path.join("link")).unwrap();
        for i in 0..3000 {
            fs::write(tree_path.join(format!("f{i}")), "").unwrap();
        }
        let _socket = std::os::unix::net::UnixListener::bind(tree_path.join("socket")).unwrap();
        for (path, mode) in [("locked/inner/most", 0), ("locked/inner", 0o555), ("locked", 0)] {
            fs::set_permissions(tree_path.join(path), Permissions::from_mode(mode)).unwrap();
        }
        if rustix::process::geteuid().is_root() {
            chown(tree_path.join("locked"), Some(4242), Some(4242)).unwrap();
        }
        tree(&tree_path).unwrap();
        assert!(tree_path.symlink_metadata().is_err());
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"theirs");
        tree(&tree_path).unwrap();
        symlink(&outside, &tree_path).unwrap();
        tree(&tree_path).unwrap();
        assert!(outside.exists());
    }

    #[test]
    fn a_tree_deeper_than_paths_and_descriptors_go_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let tree_path = dir.path().join("tree");
        fs::create_dir(&tree_path).unwrap();
        // In the way of what is moved up.
        fs::write(tree_path.join(".p2pit-removed-1"), "").unwrap();
        fs::create_dir_all(tree_path.join(".p2pit-removed-2/full")).unwrap();
        let mut at = open(CWD, &tree_path, ResolveFlags::empty()).unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open(&at, c"d", ResolveFlags::NO_XDEV).unwrap();
        }
        drop(at);
        tree(&tree_path).unwrap();
        assert!(!tree_path.exists());
    }

    #[test]
    fn what_cannot_be_removed_is_named_and_the_rest_goes() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can mount something in the way");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let busy = dir.path().join("tree/a/busy");
        fs::create_dir_all(&busy).unwrap();
        fs::write(dir.path().join("theirs"), "").unwrap();
        fs::write(dir.path().join("tree/other"), "").unwrap();
        if rustix::mount::mount_bind(dir.path(), &busy).is_err() {
            println!("skipped: mounting is not allowed here");
            return;
        }
        let residue = tree(&dir.path().join("tree"));
        rustix::mount::unmount(&busy, rustix::mount::UnmountFlags::DETACH).unwrap();
        let residue = residue.unwrap_err();
        assert_eq!(residue.path, busy);
        assert_eq!(residue.source.raw_os_error(), Some(libc::EXDEV));
        assert!(!dir.path().join("tree/other").exists());
        assert!(dir.path().join("theirs").exists());
    }
}
