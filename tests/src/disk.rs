//! Disks that are full when a test wants them to be.

use std::{
    ffi::CString,
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, fallocate, statvfs},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use crate::is_root;

/// A small disk of its own for one directory. To be dropped before the pool that the
/// directory is in.
#[derive(Debug)]
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// A disk of so many bytes at `at`, which is made; `None`, said, where this user may not.
    ///
    /// # Panics
    /// Where it cannot be mounted although this is root.
    #[must_use]
    pub fn mount(at: &Path, bytes: u64) -> Option<Self> {
        if !is_root() {
            return None;
        }
        fs::create_dir_all(at).expect("the directory can be made");
        let options = CString::new(format!("size={bytes},mode=700")).expect("no zero byte");
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), options.as_c_str())
            .unwrap_or_else(|e| panic!("cannot mount a disk at {}: {e}", at.display()));
        Some(Self { at: at.to_owned() })
    }

    /// Leaves room for so many bytes.
    ///
    /// # Panics
    /// Where there is less already.
    pub fn fill(&self, left: u64) {
        let ballast = File::create(self.ballast()).expect("a file has room on the disk");
        loop {
            let disk = statvfs(&self.at).expect("the disk is there");
            let free = disk.f_bavail * disk.f_frsize;
            let bytes = free.checked_sub(left).expect("there is so much");
            match fallocate(&ballast, FallocateFlags::empty(), 0, bytes) {
                Ok(()) => return,
                // A daemon wrote in between.
                Err(rustix::io::Errno::NOSPC) => {}
                Err(e) => panic!("the disk cannot be filled: {e}"),
            }
        }
    }

    /// Gives the room back.
    ///
    /// # Panics
    /// Where it was not taken.
    pub fn free(&self) {
        fs::remove_file(self.ballast()).expect("the disk was filled");
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Daemons may still use it: it goes with the last of them.
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}
