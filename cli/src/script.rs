//! The script of a directory, looked at before it is submitted: what cannot run anywhere
//! need not travel to say so.

use std::{io::Read as _, path::Component};

use anyhow::Context as _;
use p2pit_node::transfer::{
    Snapshot, Tree, TreePath,
    exchange::{OpenBlob, Source as _},
    tree::{Kind, LinkTarget},
};
use p2pit_protocol::BlobId;

use crate::problem::Problem;

/// In the submitted directory.
pub(crate) const SCRIPT: &str = ".compute";

/// Links on the way to the script.
const LINKS_MAX: usize = 8;
/// Of longer files, the head says enough.
const TEXT_BYTES_MAX: u64 = 1 << 20;
const MEND: &str = "`sed -i 's/\\r$//' .compute` gives it Unix ones";

/// Whether the script can be run; what the user should know although it can.
pub(crate) fn check(snapshot: &Snapshot) -> anyhow::Result<Option<String>> {
    let (blob, executable) = match resolve(&snapshot.tree)? {
        Script::File { blob, executable } => (blob, executable),
        Script::Elsewhere(target) => {
            let note = format!("`{SCRIPT}` is a link to `{target}`, which each node must have");
            return Ok(Some(note));
        }
    };
    let mut text = Vec::new();
    let opened = snapshot.source().open(&blob).and_then(|opened| {
        // A snapshot reads its files where they are.
        let Some(OpenBlob::Content { content, .. }) = opened else { return Ok(()) };
        content.take(TEXT_BYTES_MAX).read_to_end(&mut text).map(drop)
    });
    opened.with_context(|| format!("cannot read `{SCRIPT}`"))?;
    Ok(judge(&text, executable)?)
}

enum Script {
    File {
        blob: BlobId,
        executable: bool,
    },
    /// At an absolute path.
    Elsewhere(String),
}

fn resolve(tree: &Tree) -> anyhow::Result<Script> {
    let mut path = TreePath::from_bytes(SCRIPT)?;
    for _ in 0..LINKS_MAX {
        let target = match tree.get(&path).map(|entry| &entry.kind) {
            Some(Kind::File { blob, executable, .. }) => {
                return Ok(Script::File { blob: *blob, executable: *executable });
            }
            Some(Kind::Symlink { target }) => target,
            Some(Kind::Dir) => return Err(no_file().into()),
            None if tree.list(Some(&path)).is_some() => return Err(no_file().into()),
            None if path.as_bytes() == SCRIPT.as_bytes() => return Err(missing().into()),
            None => return Err(dangling(&path.to_string()).into()),
        };
        let shown = String::from_utf8_lossy(target.as_bytes()).escape_debug().to_string();
        if target.as_bytes().starts_with(b"/") {
            return Ok(Script::Elsewhere(shown));
        }
        path = beside(&path, target).ok_or_else(|| dangling(&shown))?;
    }
    Err(no_file().into())
}

/// Where a relative link leads; `None` if out of the directory.
fn beside(link: &TreePath, target: &LinkTarget) -> Option<TreePath> {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::Path};
    let mut path = link.to_path_buf();
    path.pop();
    for component in Path::new(OsStr::from_bytes(target.as_bytes())).components() {
        match component {
            Component::ParentDir if !path.pop() => return None,
            Component::ParentDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    TreePath::from_path(&path).ok()
}

/// Whether bash, an interpreter or the kernel can make anything of it.
fn judge(text: &[u8], executable: bool) -> Result<Option<String>, Problem> {
    let names_interpreter = text.starts_with(b"#!");
    if text.starts_with(b"\x7fELF") {
        return match executable {
            true => Ok(None),
            false => Err(Problem::request(format!(
                "`{SCRIPT}` is a program without the right to \
                 be executed"
            ))
            .hint("`chmod +x .compute` gives it")),
        };
    }
    if text.starts_with(b"\xEF\xBB\xBF") {
        let message =
            format!("`{SCRIPT}` begins with a byte order mark, which no shell understands");
        return Err(
            Problem::request(message).hint("`sed -i '1s/^\\xef\\xbb\\xbf//' .compute` removes it")
        );
    }
    let head = &text[..text.len().min(4096)];
    if head.contains(&0) && !names_interpreter && !executable {
        return Err(Problem::request(format!("`{SCRIPT}` is neither a script nor a program"))
            .hint("it should be text in UTF-8, such as a script for bash"));
    }
    let pairs = text.windows(2).filter(|pair| *pair == b"\r\n").count();
    let lines = text.iter().filter(|byte| **byte == b'\n').count();
    match pairs {
        0 => Ok(None),
        // Each node drops them: nothing else is lost by it.
        _ if pairs == lines => {
            Ok(Some(format!("`{SCRIPT}` has Windows line ends: it runs with Unix ones; {MEND}")))
        }
        _ => Err(Problem::request(format!(
            "`{SCRIPT}` has Windows line ends in {pairs} of its {lines} lines"
        ))
        .hint(MEND)),
    }
}

fn missing() -> Problem {
    Problem::request(format!("this directory has no `{SCRIPT}` to run"))
        .hint(format!("write the script `{SCRIPT}`, or give commands with `-d 'commands'`"))
}

fn no_file() -> Problem {
    Problem::request(format!("`{SCRIPT}` is not a file"))
        .hint(format!("write the script `{SCRIPT}`, or give commands with `-d 'commands'`"))
}

fn dangling(target: &str) -> Problem {
    Problem::request(format!("`{SCRIPT}` is a link to `{target}`, which is not submitted"))
        .hint("put the script itself there, or a link to a file in this directory")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use p2pit_node::transfer::{SnapshotOptions, snapshot};

    use super::*;
    use crate::{problem::explain, status::Status};

    #[test]
    fn a_script_needs_no_execute_bit_and_no_first_line() {
        for text in
            [&b"#!/bin/sh\necho\n"[..], b"echo\n", b"echo", b"", b"#!/usr/bin/env python3\n\0"]
        {
            for executable in [false, true] {
                assert_eq!(judge(text, executable), Ok(None), "{text:?}");
            }
        }
        assert_eq!(judge(b"\x7fELF\x02\0\0", true), Ok(None));
    }

    #[test]
    fn what_cannot_run_is_refused_with_the_way_out() {
        for (text, says, hint) in [
            (&b"\x7fELF\x02\0\0"[..], "without the right", "chmod +x .compute"),
            (b"PK\x03\x04\0\0", "neither", "UTF-8"),
            (b"\xEF\xBB\xBF#!/bin/sh\n", "byte order mark", "sed"),
            (b"echo a\r\necho b\n", "in 1 of its 2 lines", "sed -i 's/\\r$//' .compute"),
        ] {
            let (status, explanation) = explain(&judge(text, false).unwrap_err().into());
            let explanation = explanation.unwrap();
            assert_eq!(status, Status::FAILED);
            assert!(explanation.message.contains(".compute"), "{explanation:?}");
            assert!(explanation.message.contains(says), "{explanation:?}");
            assert!(explanation.hint.as_ref().unwrap().contains(hint), "{explanation:?}");
        }
        let note = judge(b"#!/bin/sh\r\necho\r\n", false).unwrap().unwrap();
        assert!(note.contains("Windows") && note.contains(MEND), "{note}");
    }

    #[test]
    fn a_link_counts_as_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join(SCRIPT);
        let check = || check(&snapshot(dir.path(), &SnapshotOptions::default()).unwrap());
        let refused = || check().unwrap_err().to_string();
        assert!(refused().contains("has no `.compute`"), "{}", refused());
        fs::create_dir_all(dir.path().join("bin/inner")).unwrap();
        fs::write(dir.path().join("bin/run"), "echo\n").unwrap();
        symlink("../run", dir.path().join("bin/inner/run")).unwrap();
        symlink("./bin/inner/run", &script).unwrap();
        assert_eq!(check().unwrap(), None);
        for (target, says) in [
            ("bin", "not a file"),
            ("nothing", "a link to `nothing`, which is not submitted"),
            ("../outside", "a link to `../outside`, which is not submitted"),
            (".compute", "not a file"),
        ] {
            fs::remove_file(&script).unwrap();
            symlink(target, &script).unwrap();
            assert!(refused().contains(says), "{}", refused());
        }
        fs::remove_file(&script).unwrap();
        symlink("/opt/run", &script).unwrap();
        assert!(check().unwrap().unwrap().contains("`/opt/run`"));
        fs::remove_file(&script).unwrap();
        fs::create_dir(&script).unwrap();
        assert!(refused().contains("not a file"));
    }
}
