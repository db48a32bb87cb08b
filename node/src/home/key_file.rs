//! Files with one secret key: a header line that says whose, then the seed in hex.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER_PERMISSIVE;
use p2pit_protocol::identity::KeyPair;
use thiserror::Error;

use super::{parent, sync_parent, temporary_beside};

/// Whose key it is: a node's key is never used as a person's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    Node,
    User,
}

#[derive(Debug, Error)]
pub enum KeyFileError {
    #[error("there is no key file {}", .path.display())]
    Missing { path: PathBuf },
    #[error(
        "the key file {} can be read by others (mode {mode:03o}); after `chmod 600` it is used",
        .path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the key file {} belongs to user id {owner}", .path.display())]
    NotOurs { path: PathBuf, owner: u32 },
    #[error("{} is not a p2pit key file: {problem}", .path.display())]
    Malformed { path: PathBuf, problem: &'static str },
    #[error("the key file {} is not {}", .path.display(), .wanted.owner())]
    WrongKind { path: PathBuf, wanted: KeyKind },
    #[error("the key file {} cannot be used", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The key in `path`.
pub fn load_key(path: &Path, kind: KeyKind) -> Result<KeyPair, KeyFileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing { path: path.to_owned() },
        _ => KeyFileError::Io { path: path.to_owned(), source },
    };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o777;
    let us = rustix::process::geteuid();
    if !metadata.is_file() {
        return Err(KeyFileError::Malformed { path: path.to_owned(), problem: "not a file" });
    }
    if metadata.uid() != us.as_raw() && !us.is_root() {
        return Err(KeyFileError::NotOurs { path: path.to_owned(), owner: metadata.uid() });
    }
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    file.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    parse(&text, kind).map_err(|problem| match problem {
        Problem::Malformed(problem) => KeyFileError::Malformed { path: path.to_owned(), problem },
        Problem::WrongKind => KeyFileError::WrongKind { path: path.to_owned(), wanted: kind },
    })
}

/// The key in `path`, made now where there is none. An existing file is never
/// replaced. The flag says whether the key is new.
pub fn load_or_create_key(path: &Path, kind: KeyKind) -> Result<(KeyPair, bool), KeyFileError> {
    match load_key(path, kind) {
        Err(KeyFileError::Missing { .. }) => {}
        result => return result.map(|key| (key, false)),
    }
    match create(path, kind) {
        Ok(key) => Ok((key, true)),
        // Another process was faster.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            load_key(path, kind).map(|key| (key, false))
        }
        Err(source) => Err(KeyFileError::Io { path: path.to_owned(), source }),
    }
}

impl KeyKind {
    fn header(self) -> &'static str {
        match self {
            Self::Node => "p2pit node key 1",
            Self::User => "p2pit user key 1",
        }
    }

    fn owner(self) -> &'static str {
        match self {
            Self::Node => "a node's",
            Self::User => "a user's",
        }
    }
}

const KEY_FILE_BYTES_MAX: u64 = 1024;

fn create(path: &Path, kind: KeyKind) -> io::Result<KeyPair> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    let key = KeyPair::from_seed(&seed);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent(path))?;
    let mut file = temporary_beside(path)?;
    writeln!(file, "{}\n{}", kind.header(), HEXLOWER_PERMISSIVE.encode(&seed))?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path)?;
    sync_parent(path)?;
    Ok(key)
}

enum Problem {
    Malformed(&'static str),
    WrongKind,
}

fn parse(text: &str, kind: KeyKind) -> Result<KeyPair, Problem> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let header = lines.next().unwrap_or_default();
    if [KeyKind::Node, KeyKind::User].iter().all(|kind| header != kind.header()) {
        return Err(Problem::Malformed("its first line is not of a key this build knows"));
    }
    if header != kind.header() {
        return Err(Problem::WrongKind);
    }
    let seed = lines.next().and_then(|line| HEXLOWER_PERMISSIVE.decode(line.as_bytes()).ok());
    let seed: Option<[u8; 32]> = seed.and_then(|bytes| bytes.try_into().ok());
    match (seed, lines.next()) {
        (Some(seed), None) => Ok(KeyPair::from_seed(&seed)),
        _ => Err(Problem::Malformed("its second line is not 64 hexadecimal digits")),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_key_is_made_once_and_then_always_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config/p2pit/identity");
        let missing = load_key(&path, KeyKind::User).unwrap_err();
        assert!(matches!(missing, KeyFileError::Missing { .. }));
        let (made, new) = load_or_create_key(&path, KeyKind::User).unwrap();
        assert!(new);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        let (loaded, new) = load_or_create_key(&path, KeyKind::User).unwrap();
        assert!(!new);
        assert_eq!(loaded.public(), made.public());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let already = create(&path, KeyKind::User).unwrap_err();
        assert_eq!(already.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn the_text_form_is_pinned() {
        let text = format!("p2pit user key 1\n{}\n", "07".repeat(32));
        let key = parse(&text, KeyKind::User).ok().unwrap();
        assert_eq!(key.public(), KeyPair::from_seed(&[7; 32]).public());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_way_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.key");
        load_or_create_key(&path, KeyKind::Node).unwrap();
        for mode in [0o640, 0o604, 0o660] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = load_or_create_key(&path, KeyKind::Node).unwrap_err();
            assert!(matches!(error, KeyFileError::Exposed { .. }), "{error}");
            assert!(error.to_string().contains("`chmod 600`"), "{error}");
        }
    }

    #[test]
    fn what_is_not_the_wanted_key_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        load_or_create_key(&path, KeyKind::Node).unwrap();
        let error = load_or_create_key(&path, KeyKind::User).unwrap_err();
        assert!(matches!(error, KeyFileError::WrongKind { .. }), "{error}");
        assert!(error.to_string().ends_with("is not a user's"), "{error}");
        for text in ["", "p2pit node key 1", "p2pit node key 1\nabc\n", "ssh-ed25519 AAAA"] {
            std::fs::write(&path, text).unwrap();
            let error = load_or_create_key(&path, KeyKind::Node).unwrap_err();
            assert!(matches!(error, KeyFileError::Malformed { .. }), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        let error = load_or_create_key(directory.path(), KeyKind::Node).unwrap_err();
        assert!(matches!(error, KeyFileError::Malformed { .. }), "{error}");
    }
}
