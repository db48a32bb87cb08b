//! A copy of the live entries, written while commits go on.
//!
//! Steps of about `Limits::step_bytes` copy the entries in the order of their keys from
//! the log that counts to `log.new`, each made durable by itself; between two of them
//! commits are served, which go to the log that counts alone. What a commit changes behind
//! the copier is copied once more. Since each step copies at least twice of what was
//! committed since the last one, the copy gets done. Its header is written last: until
//! then, and until it is renamed, nobody takes it for a log.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Bound,
};

use super::{
    Entries, NEW_LOG, Place,
    disk::{Disk, LogFile},
    frame::{Encoder, FIRST_SEQ, HEADER_BYTES, Header, write_bytes},
};

/// A snapshot on its way.
#[derive(Debug)]
pub(super) struct Copying {
    pub(super) file: Box<dyn LogFile>,
    pub(super) header: Header,
    /// Where the copied values are in `file`.
    pub(super) index: BTreeMap<Vec<u8>, Place>,
    /// The length of `file`.
    pub(super) bytes: u64,
    pub(super) next_seq: u64,
    progress: Progress,
    /// Copied, and changed since.
    changed: BTreeSet<Vec<u8>>,
}

#[derive(Debug, Clone)]
enum Progress {
    Begun,
    /// All keys up to this one are copied.
    UpTo(Vec<u8>),
    /// All keys are copied.
    Through,
}

/// Why a step failed.
#[derive(Debug)]
pub(super) enum CopyError {
    /// The copy is of no use; the log that counts is as it was.
    Given(io::Error),
    /// What the log that counts says at this offset is not what was written there.
    Rotten(u64),
}

impl From<io::Error> for CopyError {
    fn from(error: io::Error) -> Self {
        Self::Given(error)
    }
}

impl Copying {
    /// Begins a log with this header under the temporary name.
    pub(super) fn begin(disk: &mut dyn Disk, header: Header) -> io::Result<Self> {
        let file = disk.create(NEW_LOG)?;
        Ok(Self {
            file,
            header,
            index: BTreeMap::new(),
            bytes: HEADER_BYTES as u64,
            next_seq: FIRST_SEQ,
            progress: Progress::Begun,
            changed: BTreeSet::new(),
        })
    }

    /// To be told of every key that a commit wrote.
    pub(super) fn note(&mut self, key: &[u8]) {
        let is_copied = match &self.progress {
            Progress::Begun => false,
            Progress::UpTo(last) => key <= last.as_slice(),
            Progress::Through => true,
        };
        if is_copied && !self.changed.contains(key) {
            self.changed.insert(key.to_vec());
        }
    }

    /// Copies about `budget_bytes` more of `index`, whose values are in `source`, and makes
    /// them durable. Whether nothing is left to copy.
    pub(super) fn step(
        &mut self,
        source: &dyn LogFile,
        index: &BTreeMap<Vec<u8>, Place>,
        budget_bytes: u64,
    ) -> Result<bool, CopyError> {
        let mut frames = Frames::new(&self.header, self.next_seq, self.bytes);
        let rest = match &self.progress {
            Progress::Begun => Some(Bound::Unbounded),
            Progress::UpTo(last) => Some(Bound::Excluded(last.as_slice())),
            Progress::Through => None,
        };
        if let Some(start) = rest {
            let mut rest = index.range::<[u8], _>((start, Bound::Unbounded));
            let mut last = None;
            while frames.taken_bytes < budget_bytes {
                let Some((key, place)) = rest.next() else {
                    last = Some(Progress::Through);
                    break;
                };
                frames.put(key, Some(place.read(source)?), &mut self.index);
                last = Some(Progress::UpTo(key.clone()));
            }
            self.progress = last.unwrap_or_else(|| self.progress.clone());
        }
        while matches!(self.progress, Progress::Through)
            && frames.taken_bytes < budget_bytes
            && let Some(key) = self.changed.pop_first()
        {
            match index.get(&key) {
                Some(place) => frames.put(&key, Some(place.read(source)?), &mut self.index),
                None if self.index.contains_key(&key) => frames.put(&key, None, &mut self.index),
                None => {}
            }
        }
        let frames = frames.end(&mut self.index);
        self.write(frames)?;
        Ok(matches!(self.progress, Progress::Through) && self.changed.is_empty())
    }

    /// Puts entries that are in no log yet.
    pub(super) fn put_all(&mut self, entries: &Entries) -> io::Result<()> {
        let mut rest = entries.iter().peekable();
        while rest.peek().is_some() {
            let mut frames = Frames::new(&self.header, self.next_seq, self.bytes);
            while frames.taken_bytes < PUT_BYTES
                && let Some((key, value)) = rest.next()
            {
                frames.put(key, Some(value.clone()), &mut self.index);
            }
            let frames = frames.end(&mut self.index);
            self.write(frames)?;
        }
        Ok(())
    }

    fn write(&mut self, (bytes, next_seq): (Vec<u8>, u64)) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.file.write_at(self.bytes, &bytes)?;
        self.file.sync()?;
        self.bytes += bytes.len() as u64;
        self.next_seq = next_seq;
        Ok(())
    }

    /// Makes of it a log that needs only its name.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.header.snapshot_frames = self.next_seq - FIRST_SEQ;
        self.file.write_at(0, &self.header.encode())?;
        self.file.sync()
    }
}

impl Place {
    pub(super) fn of(offset: u64, value: &[u8]) -> Self {
        Self { offset, bytes: value.len(), crc: crc32c::crc32c(value) }
    }

    fn read(&self, source: &dyn LogFile) -> Result<Vec<u8>, CopyError> {
        let mut value = vec![0; self.bytes];
        source.read_at(self.offset, &mut value)?;
        if crc32c::crc32c(&value) != self.crc {
            return Err(CopyError::Rotten(self.offset));
        }
        Ok(value)
    }
}

/// Put at once into a new store.
const PUT_BYTES: u64 = 1 << 20;

/// Packs entries into frames of about [`CHUNK_BYTES`].
struct Frames<'h> {
    encoder: Encoder<'h>,
    /// Where the frames will begin in the file.
    start: u64,
    chunk: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    chunk_bytes: usize,
    taken_bytes: u64,
}

/// Small enough that one damaged place is narrowed down, large enough to cost nothing.
const CHUNK_BYTES: usize = 256 << 10;

impl<'h> Frames<'h> {
    fn new(header: &'h Header, next_seq: u64, start: u64) -> Self {
        let encoder = Encoder::new(header, next_seq);
        Self { encoder, start, chunk: Vec::new(), chunk_bytes: 0, taken_bytes: 0 }
    }

    fn put(&mut self, key: &[u8], value: Option<Vec<u8>>, index: &mut BTreeMap<Vec<u8>, Place>) {
        let bytes = write_bytes(key, value.as_deref());
        if self.chunk_bytes + bytes > CHUNK_BYTES {
            self.flush(index);
        }
        self.chunk_bytes += bytes;
        self.taken_bytes += bytes as u64;
        self.chunk.push((key.to_vec(), value));
    }

    fn flush(&mut self, index: &mut BTreeMap<Vec<u8>, Place>) {
        if self.chunk.is_empty() {
            return;
        }
        let writes = self.chunk.iter().map(|(key, value)| (key.as_slice(), value.as_deref()));
        let places = self.encoder.writes(writes);
        for ((key, value), at) in self.chunk.drain(..).zip(places) {
            match value {
                Some(value) => index.insert(key, Place::of(self.start + at as u64, &value)),
                None => index.remove(&key),
            };
        }
        self.chunk_bytes = 0;
    }

    fn end(mut self, index: &mut BTreeMap<Vec<u8>, Place>) -> (Vec<u8>, u64) {
        self.flush(index);
        let next_seq = self.encoder.next_seq();
        (self.encoder.bytes, next_seq)
    }
}
