//! `p2pit download`: everything a job left, as one archive.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use flate2::{Compression, write::GzEncoder};
use p2pit_node::transfer::{BlobStore, Tree, snapshot::STAGE_PREFIX, tree::Kind};
use tar::{Builder, EntryType, Header};

use super::{
    cp::{copy_to_stdout, refuse_existing_file},
    ls,
};
use crate::{
    args::Globals, follow::Reading, jobs::Found, output::Output, session::Session, status::Status,
};

/// Download all that a job left as a .tar.gz: `keep/`, `artifacts/` and its log
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit download @last\n  \
    p2pit download k3qz -o results.tar.gz\n  p2pit download k3qz -o - | tar -tz")]
pub(crate) struct Args {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// The archive; `-` is standard output (default: `<JOB>.tar.gz`)
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite the archive if it is there
    #[arg(long, short)]
    force: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    let (found, left) = ls::gather(&session, out, &args.job).await?;
    let short = found.resolved.short.clone();
    let output = args.output.unwrap_or_else(|| PathBuf::from(format!("{short}.tar.gz")));
    let to_stdout = output == Path::new("-");
    if !to_stdout {
        refuse_existing_file(&output, args.force)?;
    }
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty() && !to_stdout);
    let parent = parent.map_or_else(|| PathBuf::from("."), Path::to_owned);
    let parent = if to_stdout { std::env::temp_dir() } else { parent };
    let stage = tempfile::Builder::new()
        .prefix(STAGE_PREFIX)
        .tempdir_in(&parent)
        .with_context(|| format!("cannot write into {}", parent.display()))?;
    let store = BlobStore::open(&stage.path().join("blobs"))?;
    let progress = out.progress("downloading", left.tree.total_bytes());
    left.fetch(&session, &left.tree, &store, &progress).await?;
    progress.finish();
    let log = fetch_log(&session, out, &found, stage.path()).await?;
    let mtime_s = crate::identity::wall_ms() / 1000;
    let tree = left.tree;
    let archive = stage.path().join("archive");
    let packing = archive.clone();
    let file = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::create_new(&packing)?;
        pack(file, &short, &tree, &store, &[log], mtime_s)
    })
    .await?
    .context("the archive cannot be made")?;
    if to_stdout {
        drop(file);
        copy_to_stdout(out, std::fs::File::open(&archive)?)?;
        return Ok(Status::DONE);
    }
    let placed = if args.force {
        std::fs::rename(&archive, &output)
    } else {
        // Unlike a rename, fails where something is there meanwhile.
        std::fs::hard_link(&archive, &output)
    };
    placed.with_context(|| format!("cannot write {}", output.display()))?;
    Ok(Status::DONE)
}

/// As `p2pit log` shows it.
async fn fetch_log(
    session: &Session,
    out: &Output,
    found: &Found,
    stage: &Path,
) -> anyhow::Result<(String, PathBuf)> {
    let view = found.view(session, out).await?;
    let path = stage.join("log");
    let mut file =
        std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let reading = Reading {
        session,
        out,
        pool: found.pool,
        job: found.job(),
        keepers: found.resolved.keepers.clone(),
        worker: None,
    };
    reading.write(&view, &mut |bytes| Ok(file.write_all(bytes)?)).await?;
    Ok(("log.txt".to_owned(), path))
}

/// Writes the archive into `writer`, which comes back.
fn pack<W: Write>(
    writer: W,
    top: &str,
    tree: &Tree,
    store: &BlobStore,
    logs: &[(String, PathBuf)],
    mtime_s: u64,
) -> anyhow::Result<W> {
    let mut archive = Builder::new(GzEncoder::new(writer, Compression::default()));
    let header = |kind, mode, size| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(mtime_s);
        header
    };
    for entry in tree.entries() {
        let path = Path::new(top).join(entry.path.as_path());
        match &entry.kind {
            Kind::Dir => {
                archive.append_data(
                    &mut header(EntryType::Directory, 0o755, 0),
                    path,
                    io::empty(),
                )?;
            }
            Kind::Symlink { target } => {
                use std::os::unix::ffi::OsStrExt as _;
                let target = Path::new(std::ffi::OsStr::from_bytes(target.as_bytes()));
                archive.append_link(&mut header(EntryType::Symlink, 0o777, 0), path, target)?;
            }
            Kind::File { blob, size, executable } => {
                let mode = if *executable { 0o755 } else { 0o644 };
                let content = store.open_blob(blob)?.take(*size);
                archive.append_data(&mut header(EntryType::Regular, mode, *size), path, content)?;
            }
        }
    }
    for (name, path) in logs {
        let file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        let name = Path::new(top).join(name);
        archive.append_data(&mut header(EntryType::Regular, 0o644, size), name, file.take(size))?;
    }
    Ok(archive.into_inner()?.finish()?)
}

#[cfg(test)]
mod tests {
    use flate2::read::GzDecoder;
    use p2pit_node::transfer::{
        TreePath,
        tree::{Entry, LinkTarget},
    };

    use super::*;

    #[test]
    fn the_archive_holds_files_links_empty_directories_and_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
        let blob = store.put_bytes(b"#!/bin/sh\n").unwrap();
        let entry = |path: &str, kind| Entry { path: TreePath::from_bytes(path).unwrap(), kind };
        let tree = Tree::new(vec![
            entry("keep/run", Kind::File { blob, size: 10, executable: true }),
            entry("keep/link", Kind::Symlink { target: LinkTarget::from_bytes("run").unwrap() }),
            entry("artifacts", Kind::Dir),
        ])
        .unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "line\n").unwrap();
        let logs = [("log.txt".to_owned(), log)];
        let packed = pack(Vec::new(), "abcd", &tree, &store, &logs, 1_750_000_000).unwrap();
        let to = dir.path().join("to");
        tar::Archive::new(GzDecoder::new(&packed[..])).unpack(&to).unwrap();
        assert_eq!(std::fs::read(to.join("abcd/keep/run")).unwrap(), b"#!/bin/sh\n");
        assert_eq!(std::fs::read_link(to.join("abcd/keep/link")).unwrap(), Path::new("run"));
        assert!(to.join("abcd/artifacts").is_dir());
        assert_eq!(std::fs::read(to.join("abcd/log.txt")).unwrap(), b"line\n");
        use std::os::unix::fs::PermissionsExt as _;
        let mode = to.join("abcd/keep/run").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0o111);
    }
}
