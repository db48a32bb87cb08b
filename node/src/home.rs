//! The home: one directory with everything that belongs to one node.
//!
//! ```text
//! p2pit-home   says that this directory is a home, and of which version
//! config.yaml  settings, optional        node.key   the node's secret key
//! identity     the user's secret key, where the home was named explicitly
//! journal/     what must survive a crash  index/    what can be rebuilt
//! blobs/       content by hash            jobs/     directories of jobs
//! copies/      of what ranks on other nodes wrote and left
//! run/         sockets and pids of supervisors
//! cache/       what costs time alone to lose: hashes of submitted files
//! api.sock     the daemon's API           daemon.log, ports.json, offer.json
//! clock.json   what the wall clock was last
//! ```
//!
//! A directory with anything else in it is never taken for a home, and a home of
//! another user or a newer build is left alone.

mod key_file;
mod ports;
mod socket;

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use p2pit_protocol::inventory::Capacity;
use rustix::{fs::FlockOperation, io::Errno};
use thiserror::Error;

pub use self::{
    key_file::{KeyFileError, KeyKind, load_key, load_or_create_key},
    ports::Ports,
    socket::SocketPath,
};

/// Where the home is, and where the user's key is kept by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    pub home: PathBuf,
    pub identity: PathBuf,
}

/// What the place of the home depends on.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// `--home` or `P2PIT_HOME`.
    pub home: Option<PathBuf>,
    /// `--identity` or `P2PIT_IDENTITY`.
    pub identity: Option<PathBuf>,
    pub xdg_state_home: Option<OsString>,
    pub xdg_config_home: Option<OsString>,
    pub user_home: Option<OsString>,
    pub is_root: bool,
}

impl Surroundings {
    /// Those of this process. The arguments are what the command line says; the
    /// environment is asked where it says nothing.
    pub fn of_process(home: Option<PathBuf>, identity: Option<PathBuf>) -> Self {
        let named = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self {
            home: home.or_else(|| named(crate::config::env::HOME).map(PathBuf::from)),
            identity: identity.or_else(|| named(crate::config::env::IDENTITY).map(PathBuf::from)),
            xdg_state_home: named("XDG_STATE_HOME"),
            xdg_config_home: named("XDG_CONFIG_HOME"),
            user_home: named("HOME"),
            is_root: rustix::process::geteuid().is_root(),
        }
    }

    /// The home: as named explicitly, else `/var/lib/p2pit` for root, else
    /// `$XDG_STATE_HOME/p2pit` or `~/.local/state/p2pit`. The identity: as named
    /// explicitly, else inside an explicit home, else `$XDG_CONFIG_HOME/p2pit/identity`
    /// or `~/.config/p2pit/identity`.
    pub fn locate(&self) -> Result<Location, HomeError> {
        let home = match &self.home {
            Some(home) => home.clone(),
            None if self.is_root => PathBuf::from(ROOT_HOME),
            None => self.under(self.xdg_state_home.as_ref(), ".local/state")?,
        };
        let identity = match &self.identity {
            Some(identity) => identity.clone(),
            None if self.home.is_some() => home.join("identity"),
            None => self.under(self.xdg_config_home.as_ref(), ".config")?.join("identity"),
        };
        Ok(Location { home, identity })
    }

    fn under(&self, xdg: Option<&OsString>, default: &str) -> Result<PathBuf, HomeError> {
        // The XDG specification: a relative path is to be ignored.
        let base = match xdg.map(PathBuf::from).filter(|path| path.is_absolute()) {
            Some(base) => base,
            None => Path::new(self.user_home.as_ref().ok_or(HomeError::Nowhere)?).join(default),
        };
        Ok(base.join("p2pit"))
    }
}

/// Why a directory cannot be this node's home.
#[derive(Debug, Error)]
pub enum HomeError {
    #[error("no place for a home: neither `--home`, `P2PIT_HOME` nor `HOME` is set")]
    Nowhere,
    #[error(
        "foreign files in the home: {}, such as `{example}`; choose an empty directory",
        .path.display()
    )]
    ForeignFiles { path: PathBuf, example: String },
    #[error("the home {} is not a directory", .path.display())]
    NotADirectory { path: PathBuf },
    #[error("the home {} belongs to user id {owner}, not to {us}", .path.display())]
    NotOurs { path: PathBuf, owner: u32, us: u32 },
    #[error("the home {} cannot be written to", .path.display())]
    Unwritable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the home {} has version {version}, this build knows up to {HOME_VERSION}; install a \
         newer build",
        .path.display()
    )]
    Newer { path: PathBuf, version: u32 },
    #[error("the marker {} is not one of a home", .path.display())]
    Marker { path: PathBuf },
    #[error("the home's {} cannot be used", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A directory that is a home, of this user and version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// Makes `path` a home where it is missing or empty, and checks it where it is one.
    pub fn open_or_create(path: &Path) -> Result<Self, HomeError> {
        create_directories(path)?;
        let home = Self { path: path.canonicalize().map_err(|e| io_error(path, e))? };
        home.check_owner()?;
        match home.read_marker()? {
            Some(version) if version > HOME_VERSION => {
                return Err(HomeError::Newer { path: home.path, version });
            }
            Some(_) => {}
            None => home.found()?,
        }
        home.check_writable()?;
        for directory in [home.journal(), home.index(), home.blobs(), home.jobs(), home.run()] {
            create_directories(&directory)?;
        }
        Ok(home)
    }

    /// The home at `path` for a command that only talks to its daemon: nothing is
    /// created. `None` where there is no home.
    pub fn existing(path: &Path) -> Result<Option<Self>, HomeError> {
        let home = match path.canonicalize() {
            Ok(path) => Self { path },
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error(path, e)),
        };
        match home.read_marker()? {
            Some(version) if version > HOME_VERSION => {
                Err(HomeError::Newer { path: home.path, version })
            }
            Some(_) => Ok(Some(home)),
            None => Ok(None),
        }
    }

    /// Absolute, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    pub fn blobs(&self) -> PathBuf {
        self.path.join("blobs")
    }

    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    pub fn jobs(&self) -> PathBuf {
        self.path.join("jobs")
    }

    pub fn copies(&self) -> PathBuf {
        self.path.join("copies")
    }

    /// Directories of jobs that were given up, until their time is over.
    pub fn trash(&self) -> PathBuf {
        self.path.join("trash")
    }

    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Where hashes of submitted files are remembered; made when there are any.
    pub fn hashes(&self) -> PathBuf {
        self.path.join("cache/hashes")
    }

    pub fn node_key(&self) -> PathBuf {
        self.path.join("node.key")
    }

    /// What the daemon last knew of the clocks of this machine.
    pub(crate) fn clock(&self) -> PathBuf {
        self.path.join("clock.json")
    }

    pub fn daemon_log(&self) -> PathBuf {
        self.path.join("daemon.log")
    }

    pub fn config_file(&self) -> PathBuf {
        self.path.join(CONFIG_NAME)
    }

    /// Where the daemon's API listens, in a form that fits into a socket address.
    pub fn api_socket(&self) -> io::Result<SocketPath> {
        SocketPath::new(&self.path, SOCKET_NAME)
    }

    /// The ports of the last run, so that peers find the node where it was.
    pub fn ports(&self) -> Option<Ports> {
        Ports::load(&self.path.join(PORTS_NAME))
    }

    pub fn remember_ports(&self, ports: Ports) -> io::Result<()> {
        ports.save(&self.path.join(PORTS_NAME))
    }

    /// Whether a node of this home is a member: one that is not has never had ports, and
    /// one that left has none any more.
    pub fn is_member(&self) -> bool {
        self.path.join(PORTS_NAME).exists()
    }

    /// What the last daemon that was no client had to offer; nothing where none is known.
    pub fn offer(&self) -> Capacity {
        let bytes = std::fs::read(self.path.join(OFFER_NAME)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    pub fn remember_offer(&self, capacity: &Capacity) -> io::Result<()> {
        write_atomic(&self.path.join(OFFER_NAME), &serde_json::to_vec(capacity)?)
    }

    fn check_owner(&self) -> Result<(), HomeError> {
        let metadata = self.path.metadata().map_err(|e| io_error(&self.path, e))?;
        let us = rustix::process::geteuid().as_raw();
        if !metadata.is_dir() {
            return Err(HomeError::NotADirectory { path: self.path.clone() });
        }
        if metadata.uid() != us {
            return Err(HomeError::NotOurs { path: self.path.clone(), owner: metadata.uid(), us });
        }
        Ok(())
    }

    /// The version in the marker; `None` without a marker.
    fn read_marker(&self) -> Result<Option<u32>, HomeError> {
        let path = self.path.join(MARKER_NAME);
        let text = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                return Err(HomeError::NotADirectory { path: self.path.clone() });
            }
            Err(e) => return Err(io_error(&path, e)),
        };
        match text.trim().strip_prefix(MARKER_TEXT).and_then(|version| version.parse().ok()) {
            Some(version) => Ok(Some(version)),
            None => Err(HomeError::Marker { path }),
        }
    }

    fn found(&self) -> Result<(), HomeError> {
        if let Some(example) = self.foreign_file()? {
            return Err(HomeError::ForeignFiles { path: self.path.clone(), example });
        }
        let failed = |source| HomeError::Unwritable { path: self.path.clone(), source };
        std::fs::set_permissions(&self.path, Permissions::from_mode(0o700)).map_err(failed)?;
        let marker = format!("{MARKER_TEXT}{HOME_VERSION}\n");
        write_atomic(&self.path.join(MARKER_NAME), marker.as_bytes()).map_err(failed)
    }

    fn foreign_file(&self) -> Result<Option<String>, HomeError> {
        let failed = |e| io_error(&self.path, e);
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if !PREPARED_NAMES.contains(&name.as_str()) && !name.starts_with(TEMPORARY_PREFIX) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    fn check_writable(&self) -> Result<(), HomeError> {
        use rustix::fs::Access;
        let all = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::access(&self.path, all)
            .map_err(|e| HomeError::Unwritable { path: self.path.clone(), source: e.into() })
    }
}

/// Replaces `path` with `bytes`, readable by its owner only: after a crash it holds
/// the old content or the new.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = temporary_beside(path)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_parent(path)
}

/// Locks `file` exclusively, trying until `deadline`; `false` where another holds it.
///
/// A process that some thread is just starting has a copy of every descriptor until
/// its exec, so that a lock given up may look held for a moment.
pub(crate) fn lock_file(file: &File, deadline: Instant) -> io::Result<bool> {
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Longer than from fork to exec, short enough to wait for in front of a terminal.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_millis(250);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// The newest layout of a home that this build reads and the one it writes.
pub const HOME_VERSION: u32 = 1;

const ROOT_HOME: &str = "/var/lib/p2pit";
const MARKER_NAME: &str = "p2pit-home";
const MARKER_TEXT: &str = "p2pit home version ";
const SOCKET_NAME: &str = "api.sock";
const CONFIG_NAME: &str = "config.yaml";
const PORTS_NAME: &str = "ports.json";
const OFFER_NAME: &str = "offer.json";

/// What a user may lay out before the first start.
const PREPARED_NAMES: [&str; 2] = [CONFIG_NAME, "identity"];

/// A crash may leave files of this prefix.
const TEMPORARY_PREFIX: &str = ".p2pit-new-";

fn io_error(path: &Path, source: io::Error) -> HomeError {
    HomeError::Io { path: path.to_owned(), source }
}

fn create_directories(path: &Path) -> Result<(), HomeError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                HomeError::NotADirectory { path }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                HomeError::Unwritable { path, source }
            }
            _ => HomeError::Io { path, source },
        }
    })
}

fn temporary_beside(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(parent(path))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings() -> Surroundings {
        Surroundings { user_home: Some("/home/anna".into()), ..Surroundings::default() }
    }

    fn places(surroundings: &Surroundings) -> (String, String) {
        let location = surroundings.locate().unwrap();
        (location.home.display().to_string(), location.identity.display().to_string())
    }

    #[test]
    fn the_home_is_where_it_was_named_else_where_the_system_keeps_state() {
        let plain = surroundings();
        let expected = ("/home/anna/.local/state/p2pit", "/home/anna/.config/p2pit/identity");
        assert_eq!(places(&plain), (expected.0.to_owned(), expected.1.to_owned()));
        let xdg = Surroundings {
            xdg_state_home: Some("/state".into()),
            xdg_config_home: Some("relative".into()),
            ..surroundings()
        };
        assert_eq!(places(&xdg).0, "/state/p2pit");
        assert_eq!(places(&xdg).1, expected.1);
        let root = Surroundings { is_root: true, ..xdg.clone() };
        assert_eq!(places(&root).0, "/var/lib/p2pit");
        let explicit = Surroundings { home: Some("/data/node".into()), ..root };
        assert_eq!(places(&explicit), ("/data/node".to_owned(), "/data/node/identity".to_owned()));
        let both = Surroundings { identity: Some("/keys/anna".into()), ..explicit };
        assert_eq!(places(&both).1, "/keys/anna");
        assert!(matches!(Surroundings::default().locate(), Err(HomeError::Nowhere)));
    }

    #[test]
    fn a_missing_directory_becomes_a_home_and_stays_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/home");
        assert_eq!(Home::existing(&path).unwrap(), None);
        let home = Home::open_or_create(&path).unwrap();
        assert_eq!(home.path().metadata().unwrap().mode() & 0o777, 0o700);
        assert!(home.journal().is_dir() && home.run().is_dir());
        std::fs::write(home.daemon_log(), "a line").unwrap();
        assert_eq!(Home::open_or_create(&path).unwrap(), home);
        assert_eq!(Home::existing(&path).unwrap(), Some(home));
    }

    #[test]
    fn a_prepared_directory_is_accepted_and_one_with_foreign_files_is_not() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.yaml"), "name: here").unwrap();
        std::fs::write(directory.path().join(".p2pit-new-abc"), "").unwrap();
        Home::open_or_create(directory.path()).unwrap();

        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("thesis.tex"), "precious").unwrap();
        let error = Home::open_or_create(directory.path()).unwrap_err();
        assert!(matches!(error, HomeError::ForeignFiles { .. }));
        assert!(error.to_string().contains("such as `thesis.tex`"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_eq!(Home::existing(directory.path()).unwrap(), None);
    }

    #[test]
    fn a_newer_home_and_a_strange_marker_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let marker = directory.path().join(MARKER_NAME);
        std::fs::write(&marker, "p2pit home version 2\n").unwrap();
        for result in
            [Home::open_or_create(directory.path()).map(Some), Home::existing(directory.path())]
        {
            assert!(matches!(result, Err(HomeError::Newer { version: 2, .. })), "{result:?}");
        }
        std::fs::write(&marker, "something else").unwrap();
        let error = Home::open_or_create(directory.path()).unwrap_err();
        assert!(matches!(error, HomeError::Marker { .. }), "{error}");
    }

    #[test]
    fn a_file_is_no_home() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path().to_owned(), file.path().join("below")] {
            let error = Home::open_or_create(&path).unwrap_err();
            assert!(matches!(error, HomeError::NotADirectory { .. }), "{error}");
        }
    }

    #[test]
    fn somebody_elses_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (path, owner_id) = match rustix::process::geteuid().is_root() {
            true => (directory.path(), 12_345),
            false => (Path::new("/"), 0),
        };
        if owner_id != 0 {
            std::os::unix::fs::chown(path, Some(owner_id), None).unwrap();
        }
        let error = Home::open_or_create(path).unwrap_err();
        assert!(matches!(error, HomeError::NotOurs { owner, .. } if owner == owner_id), "{error}");
    }

    #[test]
    fn a_home_that_lost_its_write_permission_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        Home::open_or_create(directory.path()).unwrap();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o500)).unwrap();
        let result = Home::open_or_create(directory.path());
        // Nothing stops root.
        match rustix::process::geteuid().is_root() {
            true => assert!(result.is_ok()),
            false => assert!(matches!(result, Err(HomeError::Unwritable { .. })), "{result:?}"),
        }
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).unwrap();
    }
}
