//! Reading a log file back: which part of it counts.

use std::collections::BTreeMap;

use super::frame::{FIRST_SEQ, Frame, HEADER_BYTES, Header, HeaderError, Payload};

/// What a log file holds, up to its last whole frame.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) header: Header,
    pub(super) entries: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) boot_counter: u64,
    /// Where the next frame goes.
    pub(super) good_bytes: usize,
    pub(super) next_seq: u64,
}

/// Why a log file must not be trusted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Damage {
    Header,
    Version(u32),
    /// What was once durable at this offset is not whole any more.
    At(usize),
}

/// Reads a whole log file.
///
/// A bad frame ends the log where a crash can have left it: behind it, no frame is
/// whole that was written after an fsync covered it. Anywhere else it is damage.
pub(super) fn scan(bytes: &[u8]) -> Result<Scan, Damage> {
    let header = Header::decode(bytes).map_err(|e| match e {
        HeaderError::Malformed => Damage::Header,
        HeaderError::Version(version) => Damage::Version(version),
    })?;
    let mut scan = Scan {
        header,
        entries: BTreeMap::new(),
        boot_counter: header.boot_counter,
        good_bytes: HEADER_BYTES,
        next_seq: FIRST_SEQ,
    };
    while scan.good_bytes < bytes.len() {
        let rest = &bytes[scan.good_bytes..];
        let Some(frame) = Frame::read(&header, rest) else {
            if durable_behind(&scan, rest) {
                return Err(Damage::At(scan.good_bytes));
            }
            break;
        };
        // Whole, but not what was written here: no crash does that.
        let in_order = frame.seq == scan.next_seq && frame.group <= frame.seq;
        match frame.payload() {
            Some(payload) if in_order => scan.apply(payload),
            _ => return Err(Damage::At(scan.good_bytes)),
        }
        scan.good_bytes += frame.bytes;
        scan.next_seq += 1;
    }
    // A snapshot was durable before it got its name, so no crash tears it.
    if scan.in_snapshot() {
        return Err(Damage::At(scan.good_bytes));
    }
    Ok(scan)
}

impl Scan {
    fn in_snapshot(&self) -> bool {
        self.next_seq - FIRST_SEQ < self.header.snapshot_frames
    }

    fn apply(&mut self, payload: Payload) {
        match payload {
            Payload::Boot(counter) => self.boot_counter = counter,
            Payload::Writes(writes) => {
                for write in writes {
                    match write.value {
                        Some(value) => self.entries.insert(write.key, value),
                        None => self.entries.remove(&write.key),
                    };
                }
            }
        }
    }
}

fn durable_behind(scan: &Scan, rest: &[u8]) -> bool {
    Frame::find(&scan.header, rest, |frame| frame.group > scan.next_seq).is_some()
}
