//! Reading files that say where they are empty.
//!
//! A file of twenty gigabytes may have a few kilobytes on the disk. What is not there is
//! known to be zero, so it is neither read nor written: hashed from a buffer of zeros,
//! sent as such, and left out again where the file is laid out.

use std::{borrow::Borrow, fs::File, io, os::unix::fs::FileExt as _};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Smaller files are not asked for holes: the question costs as much as reading them.
const ASK_BYTES_MIN: u64 = 128 << 10;
/// Few enough to stay in a processor's cache, enough for a hasher to use its full width.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What comes next in a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'b> {
    Data(&'b [u8]),
    /// So many zeros that are not on the disk.
    Hole(u64),
}

/// A file from its start to its end, wherever its cursor stands.
#[derive(Debug)]
pub(super) struct Pieces<F> {
    file: F,
    at: u64,
    /// Up to here there is data.
    data_end: u64,
}

impl<F: Borrow<File>> Pieces<F> {
    /// `size` is what the file should have; it is read to its end all the same.
    pub(super) fn of(file: F, size: u64) -> Self {
        let data_end = if size < ASK_BYTES_MIN { u64::MAX } else { 0 };
        Self { file, at: 0, data_end }
    }

    pub(super) fn file(&self) -> &File {
        self.file.borrow()
    }

    /// At most as much as fits into `buffer`, or a hole of any length; `None` at the end.
    pub(super) fn next<'b>(&mut self, buffer: &'b mut [u8]) -> io::Result<Option<Piece<'b>>> {
        if self.at >= self.data_end
            && let Some(bytes) = self.hole()?
        {
            self.at += bytes;
            return Ok(Some(Piece::Hole(bytes)));
        }
        let left = usize::try_from(self.data_end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let read = loop {
            match self.file().read_at(&mut buffer[..wanted], self.at) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        self.at += read as u64;
        Ok((read > 0).then(|| Piece::Data(&buffer[..read])))
    }

    /// Looks where the next data is; the length of the hole before it, if there is one.
    fn hole(&mut self) -> io::Result<Option<u64>> {
        match seek(self.file(), SeekFrom::Data(self.at)) {
            Ok(data) if data > self.at => {
                // Looked at again once the hole is passed.
                self.data_end = data;
                Ok(Some(data - self.at))
            }
            Ok(_) => {
                self.data_end = match seek(self.file(), SeekFrom::Hole(self.at)) {
                    Ok(end) if end > self.at => end,
                    // It was cut short at this moment; reading finds the end.
                    Ok(_) | Err(Errno::NXIO) => u64::MAX,
                    Err(errno) => return Err(errno.into()),
                };
                Ok(None)
            }
            // No data from here on.
            Err(Errno::NXIO) => {
                let size = self.file().metadata()?.len();
                Ok(size.checked_sub(self.at).filter(|bytes| *bytes > 0))
            }
            // This file system cannot say.
            Err(_) => {
                self.data_end = u64::MAX;
                Ok(None)
            }
        }
    }
}

/// Hashes `bytes` zeros.
pub(super) fn hash_zeros(hasher: &mut blake3::Hasher, mut bytes: u64) {
    while bytes > 0 {
        let now = bytes.min(ZEROS.len() as u64);
        // Fits: it is at most the length of a buffer.
        hasher.update(&ZEROS[..now as usize]);
        bytes -= now;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn the_pieces_of_a_file_are_its_content() {
        let file = tempfile::tempfile().unwrap();
        let mut content = vec![0; 3 << 20];
        for (at, bytes) in [(0, &b"start"[..]), (1 << 20, b"middle"), ((3 << 20) - 3, b"end")] {
            content[at..at + bytes.len()].copy_from_slice(bytes);
            file.write_all_at(bytes, at as u64).unwrap();
        }
        let (bytes, holes) = read(&file);
        assert!(bytes == content);
        // What the file system left out, we do not read either.
        let is_sparse = file.metadata().unwrap().blocks() * 512 < content.len() as u64;
        assert_eq!(holes > 0, is_sparse);
    }

    #[test]
    fn a_file_of_nothing_but_a_hole_ends_where_it_ends() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(read(&file), (vec![], 0));
        file.set_len(1 << 20).unwrap();
        assert!(read(&file).0 == vec![0; 1 << 20]);
        file.set_len(5).unwrap();
        assert_eq!(read(&file).0, [0; 5]);
    }

    #[test]
    fn zeros_hash_as_if_they_had_been_read() {
        for bytes in [0, 1, ZEROS.len(), 3 * ZEROS.len() + 7] {
            let mut hasher = blake3::Hasher::new();
            hash_zeros(&mut hasher, bytes as u64);
            assert_eq!(hasher.finalize(), blake3::hash(&vec![0; bytes]));
        }
    }

    /// The content, and how much of it was in holes.
    fn read(file: &File) -> (Vec<u8>, u64) {
        let (mut content, mut holes) = (Vec::new(), 0);
        let mut pieces = Pieces::of(file, file.metadata().unwrap().len());
        let mut buffer = vec![0; 1000];
        loop {
            match pieces.next(&mut buffer).unwrap() {
                Some(Piece::Data(bytes)) => content.extend_from_slice(bytes),
                Some(Piece::Hole(bytes)) => {
                    content.resize(content.len() + bytes as usize, 0);
                    holes += bytes;
                }
                None => return (content, holes),
            }
        }
    }
}
