//! What is carried: a large file, and a tree of many small ones. The content is noise, so
//! that nothing compresses it, and another with each seed, so that nobody has it.

use std::{
    fs::{self, File, OpenOptions},
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

pub(crate) const MIB: u64 = 1 << 20;

const DIRECTORIES: usize = 100;
const FILE_BYTES_MIN: u64 = 1 << 10;
const FILE_BYTES_MAX: u64 = 64 << 10;
/// The logarithm of a size is spread evenly up to here, so that some files have the
/// largest size; that comes to 191 MiB for 10,000 files.
const SIZE_LOG2_MAX: f64 = 16.6;
/// Has no factor in common with the number of files.
const SIZE_STRIDE: usize = 7919;
/// Rewritten in a file that changes.
const CHANGE_BYTES: u64 = 64;

/// A directory of files of 1 to 64 KiB.
pub(crate) struct Tree {
    dir: PathBuf,
    files: Vec<(PathBuf, u64)>,
}

impl Tree {
    pub(crate) const FILES: usize = 10_000;

    /// Nothing yet.
    pub(crate) fn new(dir: PathBuf) -> Result<Self> {
        for n in 0..DIRECTORIES {
            fs::create_dir_all(dir.join(format!("d{n:02}")))?;
        }
        let file = |n: usize| {
            let (min, max) = ((FILE_BYTES_MIN as f64).log2(), SIZE_LOG2_MAX);
            // Large and small ones in each directory.
            let rank = n * SIZE_STRIDE % Self::FILES;
            let size = (min + (max - min) * rank as f64 / Self::FILES as f64).exp2() as u64;
            (dir.join(format!("d{:02}/f{n:05}", n % DIRECTORIES)), size.min(FILE_BYTES_MAX))
        };
        let files = (0..Self::FILES).map(file).collect();
        Ok(Self { dir, files })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, size)| size).sum()
    }

    /// Writes every file anew.
    pub(crate) fn fill(&self, seed: u64) -> Result<()> {
        let mut noise = Noise(seed);
        let mut buffer = vec![0; FILE_BYTES_MAX as usize];
        for (path, size) in &self.files {
            let content = &mut buffer[..*size as usize];
            noise.fill(content);
            // A new file, as a new checkout has it.
            remove(path)?;
            fs::write(path, content)?;
        }
        Ok(())
    }

    /// Changes a few bytes in the middle of `count` files; gives how large these are
    /// together.
    pub(crate) fn change(&self, count: usize, seed: u64) -> Result<u64> {
        let mut noise = Noise(seed);
        let mut indices: Vec<usize> = (0..self.files.len()).collect();
        let mut bytes = 0;
        for n in 0..count {
            let rest = (indices.len() - n) as u64;
            indices.swap(n, n + (noise.next() % rest) as usize);
            let (path, size) = &self.files[indices[n]];
            let mut change = [0; CHANGE_BYTES as usize];
            noise.fill(&mut change);
            let at = noise.next() % (size - CHANGE_BYTES);
            OpenOptions::new().write(true).open(path)?.write_all_at(&change, at)?;
            bytes += size;
        }
        Ok(bytes)
    }
}

/// Fails where two files differ.
pub(crate) fn ensure_equal(left: &Path, right: &Path) -> Result<()> {
    let [mut a, mut b] = [open(left)?, open(right)?];
    let mut buffers = [vec![0; MIB as usize], vec![0; MIB as usize]];
    loop {
        let [x, y] = &mut buffers;
        let read = a.read(x)?;
        let is_same = b.read_exact(&mut y[..read]).is_ok() && x[..read] == y[..read];
        ensure!(is_same, "{} is not {}", right.display(), left.display());
        if read == 0 {
            ensure!(b.read(y)? == 0, "{} is longer than {}", right.display(), left.display());
            return Ok(());
        }
    }
}

/// Fails where a directory does not have every file of `tree` as it is.
pub(crate) fn ensure_holds(dir: &Path, tree: &Tree) -> Result<()> {
    for (path, _) in &tree.files {
        let copy = dir.join(path.strip_prefix(&tree.dir)?);
        let [original, copied] = [path, &copy]
            .map(|path| fs::read(path).with_context(|| format!("cannot read {}", path.display())));
        ensure!(original? == copied?, "{} is not {}", copy.display(), path.display());
    }
    Ok(())
}

/// Removes a file or a directory with all that is in it, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    result.with_context(|| format!("cannot remove {}", path.display()))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// Numbers without a pattern, the same ones for the same seed: SplitMix64.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_as_large_as_is_said_and_changes_where_it_is_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::new(dir.path().join("tree")).unwrap();
        assert_eq!(tree.bytes() / MIB, 191);
        tree.fill(1).unwrap();
        let copy = dir.path().join("copy");
        let copied = std::process::Command::new("cp").arg("-r").args([tree.dir(), &copy]).status();
        assert!(copied.unwrap().success());
        ensure_holds(&copy, &tree).unwrap();
        let changed = tree.change(100, 2).unwrap();
        assert!((100 * FILE_BYTES_MIN..100 * FILE_BYTES_MAX).contains(&changed));
        let differs = |(path, _): &&(PathBuf, u64)| {
            let copied = copy.join(path.strip_prefix(tree.dir()).unwrap());
            ensure_equal(path, &copied).is_err()
        };
        assert_eq!(tree.files.iter().filter(differs).count(), 100);
        assert!(ensure_holds(&copy, &tree).is_err());
    }
}
