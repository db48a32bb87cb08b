//! Unix sockets in directories of any length.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

/// A path to a unix socket that fits into a socket address, for binding and for
/// connecting, for as long as this lives.
///
/// An address holds 107 bytes. A longer path goes through the directory's descriptor:
/// `/proc/self/fd/<n>/<name>` is the same file, needs no link that others could see
/// or change, and is gone with the process.
#[derive(Debug)]
pub struct SocketPath {
    usable: PathBuf,
    file: PathBuf,
    _directory: Option<File>,
}

impl SocketPath {
    pub(super) fn new(directory: &Path, name: &str) -> io::Result<Self> {
        let file = directory.join(name);
        if file.as_os_str().as_bytes().len() <= ADDRESS_BYTES_MAX {
            return Ok(Self { usable: file.clone(), file, _directory: None });
        }
        let directory = File::open(directory)?;
        let usable = PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()));
        Ok(Self { usable, file, _directory: Some(directory) })
    }

    /// For `bind` and `connect` of this process only.
    pub fn usable(&self) -> &Path {
        &self.usable
    }

    /// The socket's own path, for messages and file operations.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

/// `sun_path` without its terminating zero.
const ADDRESS_BYTES_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    #[test]
    fn a_home_of_any_depth_has_a_socket_that_works() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(90)).join("e".repeat(200));
        std::fs::create_dir_all(&deep).unwrap();
        for directory in [directory.path(), &deep] {
            let server = SocketPath::new(directory, "api.sock").unwrap();
            let listener = UnixListener::bind(server.usable()).unwrap();
            assert_eq!(server.file(), directory.join("api.sock"));
            assert!(server.file().exists());
            let client = SocketPath::new(directory, "api.sock").unwrap();
            let mut stream = UnixStream::connect(client.usable()).unwrap();
            stream.write_all(b"hello").unwrap();
            drop(stream);
            let mut heard = String::new();
            listener.accept().unwrap().0.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "hello");
        }
    }

    #[test]
    fn the_longest_path_that_fits_is_used_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().as_os_str().len();
        for (bytes, direct) in [(ADDRESS_BYTES_MAX, true), (ADDRESS_BYTES_MAX + 1, false)] {
            let name = "n".repeat(bytes - base - "/".len() - "/api.sock".len());
            let home = directory.path().join(name);
            std::fs::create_dir(&home).unwrap();
            let socket = SocketPath::new(&home, "api.sock").unwrap();
            assert_eq!(socket.usable() == socket.file(), direct);
            UnixListener::bind(socket.usable()).unwrap();
        }
    }
}
