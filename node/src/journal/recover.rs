//! Reading a log file back: which part of it counts.
//!
//! The file is read through a window, so that memory holds the live entries once and a
//! frame, however long the log is.

use std::{collections::BTreeMap, io};

use super::{
    Entries, Place,
    disk::LogFile,
    frame::{
        self, Entry, FIRST_SEQ, FRAME_HEAD_BYTES, FrameHead, HEADER_BYTES, Header, HeaderError,
        Payload,
    },
};

/// What a log file holds, up to its last whole frame.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) header: Header,
    pub(super) entries: Entries,
    /// Where the values of `entries` are.
    pub(super) index: BTreeMap<Vec<u8>, Place>,
    pub(super) boot_counter: u64,
    /// Where the next frame goes.
    pub(super) good_bytes: u64,
    /// Where the last group begins.
    pub(super) last_group_at: u64,
    pub(super) next_seq: u64,
    /// The file's length.
    pub(super) bytes: u64,
}

/// Why a log file must not be trusted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Damage {
    Header,
    Version(u32),
    /// What was once durable at this offset is not whole any more.
    At(u64),
}

/// A batch of several frames, of which the last has not come yet.
struct Unit {
    /// Where its first frame begins, and that one's sequence.
    at: u64,
    seq: u64,
    group: u64,
    /// Where the last group begins without this batch.
    last_group_at: u64,
    writes: Vec<PlacedWrite>,
}

/// A key, and its value and where that is in the file; `None` removes it.
type PlacedWrite = (Vec<u8>, Option<(Place, Vec<u8>)>);

impl Unit {
    fn begun(scan: &Scan, first: &FrameHead) -> Self {
        Self {
            at: scan.good_bytes,
            seq: first.seq,
            group: first.group,
            last_group_at: scan.last_group_at,
            writes: Vec::new(),
        }
    }
}

/// Why a log file could not be read.
#[derive(Debug)]
pub(super) enum ScanError {
    Damage(Damage),
    Io(io::Error),
}

impl From<io::Error> for ScanError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads a whole log file.
///
/// A bad frame ends the log where a crash can have left it: behind it, no frame is
/// whole that was written after an fsync covered it. Anywhere else it is damage.
pub(super) fn scan(file: &dyn LogFile) -> Result<Scan, ScanError> {
    let mut window = Window::of(file)?;
    let header = match window.get(0, HEADER_BYTES)?.map(Header::decode) {
        Some(Ok(header)) => header,
        Some(Err(HeaderError::Version(version))) => {
            return Err(ScanError::Damage(Damage::Version(version)));
        }
        Some(Err(HeaderError::Malformed)) | None => return Err(ScanError::Damage(Damage::Header)),
    };
    let mut scan = Scan {
        header,
        entries: Entries::new(),
        index: BTreeMap::new(),
        boot_counter: header.boot_counter,
        good_bytes: HEADER_BYTES as u64,
        last_group_at: HEADER_BYTES as u64,
        next_seq: FIRST_SEQ,
        bytes: window.end,
    };
    let mut last_group = 0;
    let mut unit: Option<Unit> = None;
    while scan.good_bytes < scan.bytes {
        let damage = ScanError::Damage(Damage::At(scan.good_bytes));
        let Some((head, frame)) = window.frame(Some(&header), scan.good_bytes, |_| true)? else {
            if is_durable_behind(&mut window, &scan)? {
                return Err(damage);
            }
            break;
        };
        // Whole, but not what was written here: no crash does that.
        let in_order = head.seq == scan.next_seq
            && head.group <= head.seq
            && unit.as_ref().is_none_or(|unit| unit.group == head.group);
        match frame::payload(frame).filter(|_| in_order) {
            Some(Payload::Boot(counter)) if unit.is_none() => scan.boot_counter = counter,
            Some(Payload::Part(writes)) => {
                let unit = unit.get_or_insert_with(|| Unit::begun(&scan, &head));
                unit.writes.extend(scan.placed(writes));
            }
            Some(Payload::Writes(writes)) => {
                let parts = unit.take().map(|unit| unit.writes).unwrap_or_default();
                let end = scan.placed(writes);
                parts.into_iter().chain(end).for_each(|write| scan.apply(write));
            }
            Some(Payload::Boot(_)) | None => return Err(damage),
        }
        if head.group != last_group {
            last_group = head.group;
            scan.last_group_at = scan.good_bytes;
        }
        scan.good_bytes += head.bytes as u64;
        scan.next_seq += 1;
    }
    // A crash left a batch without its end: it never counted.
    if let Some(unit) = unit {
        scan.good_bytes = unit.at;
        scan.next_seq = unit.seq;
        scan.last_group_at = unit.last_group_at;
    }
    // A snapshot was durable before it got its name, so no crash tears it.
    if scan.is_in_snapshot() {
        return Err(ScanError::Damage(Damage::At(scan.good_bytes)));
    }
    Ok(scan)
}

/// What whole frames of a damaged file say, whatever stands between them.
///
/// Some of it was outdated by what is lost: good only for values that prove themselves.
/// Where not even the header can be read, nothing else proves that the frames are whole.
pub(super) fn salvage(file: &dyn LogFile) -> io::Result<Entries> {
    let mut window = Window::of(file)?;
    let header = window.get(0, HEADER_BYTES)?.and_then(|bytes| Header::decode(bytes).ok());
    let mut entries = Entries::new();
    let mut at = 0;
    while let Some(found) = window.find(header.as_ref(), at, |_| true)? {
        let (offset, head, frame) = found;
        match frame::payload(frame) {
            Some(payload) => {
                if let Payload::Writes(writes) | Payload::Part(writes) = payload {
                    for write in writes {
                        match write.value {
                            Some((_, value)) => {
                                entries.insert(write.key.to_vec(), value.to_vec());
                            }
                            None => {
                                entries.remove(write.key);
                            }
                        }
                    }
                }
                at = offset + head.bytes as u64;
            }
            None => at = offset + 1,
        }
    }
    Ok(entries)
}

/// The store that a log file is of, as far as its header says.
pub(super) fn header(file: &dyn LogFile) -> io::Result<Option<Header>> {
    let mut window = Window::of(file)?;
    Ok(window.get(0, HEADER_BYTES)?.and_then(|bytes| Header::decode(bytes).ok()))
}

impl Scan {
    fn is_in_snapshot(&self) -> bool {
        self.next_seq - FIRST_SEQ < self.header.snapshot_frames
    }

    /// The writes of the frame at `good_bytes`.
    fn placed(&self, writes: Vec<Entry<'_>>) -> Vec<PlacedWrite> {
        let place = |(at, value): (usize, &[u8])| {
            (Place::of(self.good_bytes + at as u64, value), value.to_vec())
        };
        writes.into_iter().map(|write| (write.key.to_vec(), write.value.map(place))).collect()
    }

    fn apply(&mut self, (key, value): PlacedWrite) {
        match value {
            Some((place, value)) => {
                self.index.insert(key.clone(), place);
                self.entries.insert(key, value);
            }
            None => {
                self.index.remove(&key);
                self.entries.remove(&key);
            }
        }
    }
}

fn is_durable_behind(window: &mut Window<'_>, scan: &Scan) -> io::Result<bool> {
    // Asked of the head before the payload is read: what only looks like a frame, inside
    // of a value, is passed quickly.
    let is_later = |head: &FrameHead| head.group > scan.next_seq && head.group <= head.seq;
    Ok(window.find(Some(&scan.header), scan.good_bytes, is_later)?.is_some())
}

/// A part of a file in memory.
struct Window<'f> {
    file: &'f dyn LogFile,
    end: u64,
    start: u64,
    bytes: Vec<u8>,
}

/// Read at once; a longer frame is read at once too.
const WINDOW_BYTES: u64 = 1 << 20;

impl<'f> Window<'f> {
    fn of(file: &'f dyn LogFile) -> io::Result<Self> {
        Ok(Self { file, end: file.bytes()?, start: 0, bytes: Vec::new() })
    }

    /// So many bytes from `offset`; `None` where the file ends before.
    fn get(&mut self, offset: u64, count: usize) -> io::Result<Option<&[u8]>> {
        Ok(self.from(offset, count)?.and_then(|rest| rest.get(..count)))
    }

    /// At least so many bytes from `offset`; `None` where the file ends before.
    fn from(&mut self, offset: u64, least: usize) -> io::Result<Option<&[u8]>> {
        let wanted_end = offset.saturating_add(least as u64);
        if wanted_end > self.end {
            return Ok(None);
        }
        if offset < self.start || wanted_end > self.start + self.bytes.len() as u64 {
            let count = (least as u64).max(WINDOW_BYTES).min(self.end - offset);
            self.bytes.clear();
            self.bytes.resize(usize::try_from(count).map_err(io::Error::other)?, 0);
            self.start = offset;
            self.file.read_at(offset, &mut self.bytes)?;
        }
        let skipped = usize::try_from(offset - self.start).map_err(io::Error::other)?;
        Ok(self.bytes.get(skipped..))
    }

    /// The whole frame at `offset` whose head is `wanted`; `None` where there is none.
    /// Without a header it need only look like one.
    fn frame(
        &mut self,
        header: Option<&Header>,
        offset: u64,
        wanted: impl Fn(&FrameHead) -> bool,
    ) -> io::Result<Option<(FrameHead, &[u8])>> {
        let head = self.get(offset, FRAME_HEAD_BYTES)?.and_then(FrameHead::read);
        let Some(head) = head.filter(wanted) else { return Ok(None) };
        let Some(frame) = self.get(offset, head.bytes)? else { return Ok(None) };
        let is_whole = header.is_none_or(|header| head.fits(header, frame));
        Ok(is_whole.then_some((head, frame)))
    }

    /// The first whole frame at `from` or behind whose head is `wanted`, and its offset.
    fn find(
        &mut self,
        header: Option<&Header>,
        mut from: u64,
        wanted: impl Fn(&FrameHead) -> bool,
    ) -> io::Result<Option<(u64, FrameHead, &[u8])>> {
        while let Some(rest) = self.from(from, FRAME_HEAD_BYTES)? {
            let passed = match frame::find_magic(rest) {
                None => rest.len() - (FRAME_HEAD_BYTES - 1),
                Some(skipped) => {
                    let at = from + skipped as u64;
                    if let Some((head, _)) = self.frame(header, at, &wanted)? {
                        let frame = self.get(at, head.bytes)?.unwrap_or_default();
                        return Ok(Some((at, head, frame)));
                    }
                    skipped + 1
                }
            };
            from += passed as u64;
        }
        Ok(None)
    }
}
