//! What directories take on the disk.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Bytes of disk that everything below these takes, each; a file with several names once, under
/// the first of them.
pub(super) fn of(dirs: &[PathBuf]) -> io::Result<Vec<u64>> {
    let mut seen = BTreeSet::new();
    dirs.iter().map(|dir| below(dir, &mut seen)).collect()
}

fn below(dir: &Path, seen: &mut BTreeSet<(u64, u64)>) -> io::Result<u64> {
    let mut total = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            // Jobs make and remove them meanwhile, and may keep them to themselves.
            Err(e) if is_passing(&e) => continue,
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(e) if is_passing(&e) => continue,
                Err(e) => return Err(e),
            };
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(e) if is_passing(&e) => continue,
                Err(e) => return Err(e),
            };
            if metadata.is_dir() {
                dirs.push(entry.path());
            }
            let is_other_name = metadata.nlink() > 1
                && !metadata.is_dir()
                && !seen.insert((metadata.dev(), metadata.ino()));
            if !is_other_name {
                total += metadata.blocks() * 512;
            }
        }
    }
    Ok(total)
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_free_and_a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        fs::create_dir_all(one.join("deep")).unwrap();
        fs::create_dir(&two).unwrap();
        let before = of(&[one.clone(), two.clone(), dir.path().join("none")]).unwrap();
        fs::write(one.join("deep/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(one.join("deep/file"), two.join("same")).unwrap();
        fs::File::create(two.join("hole")).unwrap().set_len(1 << 30).unwrap();
        let after = of(&[one, two, dir.path().join("none")]).unwrap();
        let grown: Vec<u64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        assert!((100_000..300_000).contains(&grown[0]), "{grown:?}");
        assert!(grown[1] < 100_000, "{grown:?}");
        assert_eq!(after[2], 0);
    }
}
