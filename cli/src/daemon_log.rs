//! The log of a daemon: on standard error, and bounded where that is a file of the home.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// A log that reaches this size is kept once as `daemon.log.old` and begun anew.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Logs what `filter` lets through to standard error.
pub(crate) fn to_stderr(filter: &str, colour: bool) -> anyhow::Result<()> {
    let format = tracing_subscriber::fmt().with_env_filter(parse(filter)?);
    format.with_ansi(colour).with_writer(io::stderr).init();
    Ok(())
}

/// Logs what `filter` lets through to the file that standard error is.
pub(crate) fn to_file(filter: &str, path: PathBuf) -> anyhow::Result<()> {
    let written = path.metadata().map_or(0, |metadata| metadata.len());
    let writer = Bounded { path, written: Mutex::new(written) };
    let format = tracing_subscriber::fmt().with_env_filter(parse(filter)?);
    format.with_ansi(false).with_writer(writer).init();
    Ok(())
}

fn parse(filter: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(filter).with_context(|| format!("`{filter}` does not say what to log"))
}

#[derive(Debug)]
struct Bounded {
    path: PathBuf,
    written: Mutex<u64>,
}

impl<'a> MakeWriter<'a> for Bounded {
    type Writer = BoundedWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        BoundedWriter { log: self }
    }
}

#[derive(Debug)]
struct BoundedWriter<'a> {
    log: &'a Bounded,
}

impl Write for BoundedWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = self.log.written.lock().unwrap_or_else(PoisonError::into_inner);
        if *written + bytes.len() as u64 > LOG_BYTES_MAX && *written > 0 {
            // What else writes to standard error, such as a panic, follows to the new file.
            redirect(&turn(&self.log.path)?)?;
            *written = 0;
        }
        let count = io::stderr().write(bytes)?;
        *written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Keeps the log of so far under another name and opens a new one.
fn turn(path: &Path) -> io::Result<File> {
    std::fs::rename(path, path.with_extension("log.old"))?;
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Makes standard output and standard error this file.
fn redirect(file: &File) -> io::Result<()> {
    for target in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: both descriptors are open, and dup2 touches no memory.
        if unsafe { libc::dup2(file.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Says on standard output that the API answers, then lets go of it: whoever started the
/// daemon reads no further.
pub(crate) fn announce(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()?;
    // SAFETY: as above.
    if unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_kept_once_and_begun_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.log");
        for round in ["first", "second", "third"] {
            std::fs::write(&path, round).unwrap();
            turn(&path).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert_eq!(std::fs::read(directory.path().join("daemon.log.old")).unwrap(), b"third");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
