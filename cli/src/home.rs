//! The home that a command is about.

use std::{fs::File, path::PathBuf};

use anyhow::Context as _;
use p2pit_node::home::{Home, HomeError, Location, Surroundings};
use rustix::fs::{FlockOperation, flock};

use crate::{args::Globals, problem::Problem};

/// Where home and key of this command are.
pub(crate) fn locate(globals: &Globals) -> anyhow::Result<Location> {
    let surroundings = Surroundings::of_process(globals.home.clone(), globals.identity.clone());
    surroundings.locate().map_err(advise)
}

/// Where commands look for the key that are not told of one.
pub(crate) fn usual_identity(globals: &Globals) -> anyhow::Result<PathBuf> {
    let surroundings =
        Surroundings { identity: None, ..Surroundings::of_process(globals.home.clone(), None) };
    Ok(surroundings.locate().map_err(advise)?.identity)
}

/// The home as a place to run a daemon in; made where there is none.
pub(crate) fn open_or_create(location: &Location) -> anyhow::Result<Home> {
    Home::open_or_create(&absolute(&location.home)?).map_err(advise)
}

/// The home, if it may be in a pool; nothing is created.
pub(crate) fn existing(location: &Location) -> anyhow::Result<Home> {
    let no_pool = || {
        Problem::request(format!("the home {} is in no pool", location.home.display()))
            .hint("`p2pit join TICKET` joins one, `p2pit join` founds one")
    };
    let home = Home::existing(&location.home).map_err(advise)?.ok_or_else(no_pool)?;
    // A daemon that never ran here wrote nothing down.
    let is_empty = std::fs::read_dir(home.journal()).map_or(true, |mut dir| dir.next().is_none());
    if is_empty { Err(no_pool().into()) } else { Ok(home) }
}

/// Where hashes of submitted files are remembered. Without a home, nothing is submitted.
pub(crate) fn hashes(globals: &Globals) -> Option<PathBuf> {
    let location = locate(globals).ok()?;
    Some(Home::existing(&location.home).ok()??.hashes())
}

/// While this lives, no other command starts a daemon in the home.
#[derive(Debug)]
pub(crate) struct StartLock {
    _file: File,
}

impl StartLock {
    pub(crate) fn take(home: &Home) -> anyhow::Result<Self> {
        let path = home.path().join("start.lock");
        let lock = || {
            let file = File::options().create(true).append(true).open(&path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            std::io::Result::Ok(file)
        };
        let file = lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { _file: file })
    }
}

fn advise(error: HomeError) -> anyhow::Error {
    let hint = match &error {
        HomeError::Unwritable { .. }
        | HomeError::NotOurs { .. }
        | HomeError::ForeignFiles { .. } => "`--home DIR` names a directory of your own",
        HomeError::NotADirectory { .. } => "`--home DIR` names a directory",
        HomeError::Newer { .. } => "`p2pit --version` says which one this is",
        HomeError::Nowhere => "`--home DIR` names a directory",
        HomeError::Marker { .. } | HomeError::Io { .. } => return error.into(),
    };
    let message = format!("{:#}", anyhow::Error::from(error));
    Problem::request(message).hint(hint).into()
}

fn absolute(path: &std::path::Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{} is no path", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(home: PathBuf) -> Location {
        Location { identity: home.join("identity"), home }
    }

    #[test]
    fn a_home_that_is_not_there_or_was_never_joined_is_in_no_pool() {
        let directory = tempfile::tempdir().unwrap();
        let missing = location(directory.path().join("missing"));
        let error = existing(&missing).unwrap_err();
        assert!(error.to_string().contains("is in no pool"), "{error}");
        assert!(!missing.home.exists());
        let fresh = location(directory.path().join("fresh"));
        Home::open_or_create(&fresh.home).unwrap();
        assert!(existing(&fresh).unwrap_err().to_string().contains("is in no pool"));
    }
}
