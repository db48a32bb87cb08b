//! The file `.compute`, as people write it.
//!
//! The executor takes the interpreter from its first line and needs no execute bit. What
//! it cannot mend is found here, before a gang is started for nothing.

use std::{
    ffi::OsStr,
    fs::{self, Permissions},
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::{
    executor::interpreter,
    transfer::{
        BlobStore, Tree, TreePath, store,
        tree::{Kind, PathError},
    },
};

/// In the submitted directory.
pub(super) const NAME: &str = ".compute";

/// Longer files are no scripts with line endings to mend; their head says enough.
const SCRIPT_BYTES_MAX: u64 = 1 << 20;

/// Why the submitted directory cannot be run.
#[derive(Debug, Error)]
pub enum ScriptError {
    #[error("the submitted directory has no file `{NAME}`; write one, or give commands with `-d`")]
    Missing,
    #[error("`{NAME}` in the submitted directory is not a file")]
    NotAFile,
    #[error("`{NAME}` asks for `{}`, which is not on this node", .0.display())]
    Interpreter(PathBuf),
    #[error("cannot read `{NAME}`")]
    Content(#[source] store::Error),
    #[error("cannot {doing} `{NAME}`")]
    Io { doing: &'static str, source: io::Error },
    #[error(transparent)]
    Path(#[from] PathError),
}

/// Sees to it that the script in `src`, where `tree` was just written, can be run. Gives
/// notes for the log.
pub(super) fn make_runnable(
    store: &BlobStore,
    tree: &Tree,
    src: &Path,
    owner: Option<(u32, u32)>,
) -> Result<Vec<String>, ScriptError> {
    let path = TreePath::from_bytes(NAME)?;
    let (blob, executable) = match tree.get(&path).map(|entry| &entry.kind) {
        Some(Kind::File { blob, executable, .. }) => (blob, *executable),
        // Where it leads is for the job's user to see, not for the daemon's.
        Some(Kind::Symlink { .. }) => return Ok(Vec::new()),
        Some(Kind::Dir) => return Err(ScriptError::NotAFile),
        None if tree.list(Some(&path)).is_some() => return Err(ScriptError::NotAFile),
        None => return Err(ScriptError::Missing),
    };
    let unreadable = |source| ScriptError::Io { doing: "read", source };
    let mut text = Vec::new();
    let file = store.open_blob(blob).map_err(ScriptError::Content)?;
    let whole = file.metadata().map_err(unreadable)?.len() <= SCRIPT_BYTES_MAX;
    file.take(SCRIPT_BYTES_MAX).read_to_end(&mut text).map_err(unreadable)?;

    let mut notes = Vec::new();
    match interpreter(&text) {
        Some(words) => {
            let program = Path::new(OsStr::from_bytes(&words[0]));
            if !src.join(program).exists() {
                return Err(ScriptError::Interpreter(program.to_owned()));
            }
        }
        None if executable && text.starts_with(b"\x7fELF") => {}
        None => notes.push(format!("{NAME} has no `#!` line: bash runs it")),
    }
    let windows = text.windows(2).any(|pair| pair == b"\r\n");
    if windows && whole && is_text_of_windows(&text) {
        text.retain(|byte| *byte != b'\r');
        replace(&src.join(NAME), &text, executable, owner)
            .map_err(|source| ScriptError::Io { doing: "rewrite", source })?;
        notes.push(format!("{NAME} has Windows line endings: it runs with Unix ones"));
    } else if windows {
        notes.push(format!("{NAME} has Windows line endings in some lines: they stay"));
    }
    Ok(notes)
}

/// Whether every carriage return stands before a line feed, and every line feed behind
/// one: nothing else is lost with them.
fn is_text_of_windows(text: &[u8]) -> bool {
    let count = |byte| text.iter().filter(|b| **b == byte).count();
    let pairs = text.windows(2).filter(|pair| *pair == b"\r\n").count();
    count(b'\r') == pairs && count(b'\n') == pairs && count(0) == 0
}

fn replace(
    path: &Path,
    text: &[u8],
    executable: bool,
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    fs::remove_file(path)?;
    fs::write(path, text)?;
    fs::set_permissions(path, Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
    match owner {
        Some((uid, gid)) => std::os::unix::fs::lchown(path, Some(uid), Some(gid)),
        None => Ok(()),
    }
}
