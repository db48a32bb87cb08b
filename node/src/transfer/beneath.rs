//! Walking below a directory that somebody else may be rearranging at the same time.
//!
//! Every component is opened by itself, relative to the one before, and never through
//! a link. Whatever a job does to its directories meanwhile, a path below one of them
//! leads to something below it, or nowhere.

use std::{
    ffi::{CStr, CString, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, Statx, StatxFlags, fstat, mkdirat, openat,
        statat, statx,
    },
    io::Errno,
};

/// An open directory and the chain of directories below it that was entered last.
pub(super) struct Descent {
    root: OwnedFd,
    entered: Vec<(Vec<u8>, OwnedFd)>,
}

impl Descent {
    /// Below `root`; a link at `root` itself is followed, since the caller chose it.
    pub(super) fn new(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: openat(CWD, root, flags, Mode::empty())?, entered: Vec::new() })
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The directory at `components`. Those shared with the last call stay open.
    pub(super) fn enter(&mut self, components: &[&[u8]]) -> io::Result<BorrowedFd<'_>> {
        self.enter_with(components, |_, _| Ok(()))
    }

    /// As [`Self::enter`], where `prepare` is called with each directory and the name in
    /// it before that name is opened.
    pub(super) fn enter_with(
        &mut self,
        components: &[&[u8]],
        mut prepare: impl FnMut(BorrowedFd<'_>, &[u8]) -> io::Result<()>,
    ) -> io::Result<BorrowedFd<'_>> {
        let shared = self.entered.iter().zip(components).take_while(|((a, _), b)| a == *b).count();
        self.entered.truncate(shared);
        for name in &components[shared..] {
            let dir = self.current();
            prepare(dir, name)?;
            let next = open_dir(dir, name)?;
            self.entered.push((name.to_vec(), next));
        }
        Ok(self.current())
    }

    fn current(&self) -> BorrowedFd<'_> {
        self.entered.last().map_or(self.root.as_fd(), |(_, fd)| fd.as_fd())
    }
}

/// A directory right inside `dir`; a link is an error.
pub(super) fn open_dir(dir: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(dir, name, flags, Mode::empty())?)
}

/// A directory right inside `dir`, there already or made now.
pub(super) fn make_dir(dir: impl AsFd, name: &[u8]) -> io::Result<Made> {
    match mkdirat(dir, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(Made::New),
        Err(Errno::EXIST) => Ok(Made::Already),
        Err(errno) => Err(errno.into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    New,
    Already,
}

/// A regular file right inside `dir`, open for reading, with its state. Anything else
/// is an error, and opening it has no effect on it: a pipe does not block, a link is
/// not followed, a device is not touched.
pub(super) fn open_file(dir: impl AsFd, name: &[u8]) -> io::Result<(File, Stat)> {
    let found = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if !is(&found, FileType::RegularFile) {
        return Err(not_a_file());
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(&dir, name, flags, Mode::empty())?;
    let opened = fstat(&file)?;
    if !is(&opened, FileType::RegularFile) {
        return Err(not_a_file());
    }
    Ok((File::from(file), opened))
}

/// The state of what is right inside `dir`, links not followed.
pub(super) fn state(dir: impl AsFd, name: &[u8]) -> io::Result<Stat> {
    Ok(statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// As [`state`], from the machine that serves the file where that is another: what is
/// known of it here may be a while old. `NOSYS` from a kernel that cannot be asked so.
pub(super) fn fresh_state(dir: impl AsFd, name: &[u8]) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
    statx(dir, name, flags, StatxFlags::BASIC_STATS)
}

/// Where a link right inside `dir` points.
pub(super) fn read_link(dir: impl AsFd, name: &[u8]) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes())
}

/// At most `count_max` names inside an open directory; `None` where there are more.
pub(super) fn names(dir: impl AsFd, count_max: usize) -> io::Result<Option<Vec<CString>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        if names.len() == count_max {
            return Ok(None);
        }
        names.push(name.to_owned());
    }
    Ok(Some(names))
}

pub(super) fn is(state: &Stat, file_type: FileType) -> bool {
    FileType::from_raw_mode(state.st_mode) == file_type
}

/// What a file that is no file, link or directory is called.
pub(super) fn special_name(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Fifo => "named pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        _ => "special file",
    }
}

/// `name` inside `dir`, for messages.
pub(super) fn joined(dir: &Path, name: &[u8]) -> std::path::PathBuf {
    dir.join(OsStr::from_bytes(name))
}

fn not_a_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_link_is_never_a_way_down() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/file"), "f").unwrap();
        symlink(outside.path(), dir.path().join("a/link")).unwrap();
        symlink(outside.path().join("secret"), dir.path().join("a/secret")).unwrap();

        let mut descent = Descent::new(dir.path()).unwrap();
        assert!(open_file(descent.enter(&[b"a", b"b"]).unwrap(), b"file").is_ok());
        assert!(descent.enter(&[b"a", b"link"]).is_err());
        assert!(open_file(descent.enter(&[b"a"]).unwrap(), b"secret").is_err());
        assert!(descent.enter(&[b"a", b"b", b"file"]).is_err());
    }

    #[test]
    fn a_directory_swapped_for_a_link_after_it_was_entered_stays_the_old_one() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "secret").unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/file"), "mine").unwrap();

        let mut descent = Descent::new(dir.path()).unwrap();
        descent.enter(&[b"a"]).unwrap();
        fs::rename(dir.path().join("a"), dir.path().join("old")).unwrap();
        symlink(outside.path(), dir.path().join("a")).unwrap();
        let (file, _) = open_file(descent.enter(&[b"a"]).unwrap(), b"file").unwrap();
        assert_eq!(io::read_to_string(file).unwrap(), "mine");
        assert!(Descent::new(dir.path()).unwrap().enter(&[b"a"]).is_err());
    }

    #[test]
    fn a_pipe_is_refused_without_waiting_for_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let descent = Descent::new(dir.path()).unwrap();
        rustix::fs::mkfifoat(descent.root(), "pipe", Mode::RUSR | Mode::WUSR).unwrap();
        assert!(open_file(descent.root(), b"pipe").is_err());
    }
}
