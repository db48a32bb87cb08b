//! The bytes of a log file: one header, then frames.
//!
//! Frame: magic, payload length, sequence, group, CRC32C, payload. The CRC is salted
//! with the store id and the generation, so that what an older file left on the disk
//! never passes for a frame of this one. `group` is the sequence of the first frame
//! that was made durable by the same fsync: frames of one group may reach the disk
//! in any order, while a whole frame of a later group proves that everything before
//! that group had been durable.

use std::collections::BTreeMap;

use p2pit_protocol::StoreId;

use super::Write;

/// The newest log format this build reads and the one it writes.
pub(super) const FORMAT_VERSION: u32 = 1;

/// What a batch may take on disk; a larger one is a caller's mistake.
pub(super) const PAYLOAD_BYTES_MAX: usize = 16 << 20;

pub(super) const HEADER_BYTES: usize = 56;
const FRAME_HEAD_BYTES: usize = 28;
const HEADER_MAGIC: [u8; 8] = *b"p2pitjnl";
const FRAME_MAGIC: [u8; 4] = [0xb1, 0x50, 0x17, 0xfe];

const KIND_WRITES: u8 = 1;
const KIND_BOOT: u8 = 2;

/// In place of a value's length: the key is removed.
const REMOVED: u32 = u32::MAX;

/// The start of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) store_id: StoreId,
    pub(super) generation: u64,
    /// The boot counter when this file was begun.
    pub(super) boot_counter: u64,
    /// How many frames the file was born with. They were durable before it got its
    /// name, so none of them is ever torn by a crash.
    pub(super) snapshot_frames: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderError {
    Malformed,
    Version(u32),
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&HEADER_MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.store_id.0);
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.boot_counter.to_le_bytes());
        bytes.extend_from_slice(&self.snapshot_frames.to_le_bytes());
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER_BYTES);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let mut reader = Reader(bytes.get(..HEADER_BYTES).ok_or(HeaderError::Malformed)?);
        let parts = (|| {
            let magic: [u8; 8] = reader.array()?;
            let version = u32::from_le_bytes(reader.array()?);
            let header = Self {
                store_id: StoreId(reader.array()?),
                generation: u64::from_le_bytes(reader.array()?),
                boot_counter: u64::from_le_bytes(reader.array()?),
                snapshot_frames: u64::from_le_bytes(reader.array()?),
            };
            Some((magic, version, header, u32::from_le_bytes(reader.array()?)))
        })();
        let Some((magic, version, header, crc)) = parts else { return Err(HeaderError::Malformed) };
        if magic != HEADER_MAGIC || crc != crc32c::crc32c(&bytes[..HEADER_BYTES - 4]) {
            return Err(HeaderError::Malformed);
        }
        if version != FORMAT_VERSION {
            return Err(HeaderError::Version(version));
        }
        Ok(header)
    }

    fn salt(&self) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.store_id.0), &self.generation.to_le_bytes())
    }
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Payload {
    Writes(Vec<Write>),
    Boot(u64),
}

impl Payload {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        match reader.array::<1>()? {
            [KIND_BOOT] => {
                let counter = u64::from_le_bytes(reader.array()?);
                reader.0.is_empty().then_some(Self::Boot(counter))
            }
            [KIND_WRITES] => {
                let mut writes = Vec::new();
                while !reader.0.is_empty() {
                    let key_bytes = u32::from_le_bytes(reader.array()?);
                    let value_bytes = u32::from_le_bytes(reader.array()?);
                    let key = reader.take(key_bytes as usize)?.to_vec();
                    let value = match value_bytes {
                        REMOVED => None,
                        length => Some(reader.take(length as usize)?.to_vec()),
                    };
                    writes.push(Write { key, value });
                }
                Some(Self::Writes(writes))
            }
            _ => None,
        }
    }
}

/// One frame as it stands in a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) seq: u64,
    pub(super) group: u64,
    payload: &'a [u8],
    pub(super) bytes: usize,
}

impl<'a> Frame<'a> {
    /// The whole frame at the start of `bytes`; `None` where there is none.
    pub(super) fn read(header: &Header, bytes: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let magic: [u8; 4] = reader.array()?;
        let covered = reader.0;
        let payload_bytes = u32::from_le_bytes(reader.array()?) as usize;
        let seq = u64::from_le_bytes(reader.array()?);
        let group = u64::from_le_bytes(reader.array()?);
        let crc = u32::from_le_bytes(reader.array()?);
        if magic != FRAME_MAGIC || payload_bytes > PAYLOAD_BYTES_MAX {
            return None;
        }
        let payload = reader.take(payload_bytes)?;
        let whole = crc == frame_crc(header, &covered[..FRAME_HEAD_BYTES - 8], payload);
        whole.then_some(Self { seq, group, payload, bytes: FRAME_HEAD_BYTES + payload_bytes })
    }

    pub(super) fn payload(&self) -> Option<Payload> {
        Payload::decode(self.payload)
    }

    /// The first whole frame anywhere in `bytes` that `wanted` accepts.
    pub(super) fn find(
        header: &Header,
        bytes: &'a [u8],
        wanted: impl Fn(&Self) -> bool,
    ) -> Option<Self> {
        bytes
            .windows(FRAME_MAGIC.len())
            .enumerate()
            .filter(|(_, window)| *window == FRAME_MAGIC)
            .filter_map(|(offset, _)| Self::read(header, &bytes[offset..]))
            .find(wanted)
    }
}

/// A key and its value; `None` removes it.
type Upsert<'a> = (&'a [u8], Option<&'a [u8]>);

/// Appends frames to a buffer that is then written at once.
#[derive(Debug)]
pub(super) struct Encoder<'a> {
    header: &'a Header,
    next_seq: u64,
    group: u64,
    pub(super) bytes: Vec<u8>,
}

impl<'a> Encoder<'a> {
    /// All frames of one encoder belong to the group that begins with `next_seq`.
    pub(super) fn new(header: &'a Header, next_seq: u64) -> Self {
        Self { header, next_seq, group: next_seq, bytes: Vec::new() }
    }

    pub(super) fn next_seq(&self) -> u64 {
        self.next_seq
    }

    pub(super) fn boot(&mut self, counter: u64) {
        self.frame(KIND_BOOT, &counter.to_le_bytes());
    }

    /// The caller has checked [`writes_fit`].
    pub(super) fn writes<'w>(&mut self, writes: impl IntoIterator<Item = Upsert<'w>>) {
        let mut body = Vec::new();
        for (key, value) in writes {
            body.extend_from_slice(&length(key).to_le_bytes());
            body.extend_from_slice(&value.map_or(REMOVED, length).to_le_bytes());
            body.extend_from_slice(key);
            body.extend_from_slice(value.unwrap_or_default());
        }
        self.frame(KIND_WRITES, &body);
    }

    fn frame(&mut self, kind: u8, body: &[u8]) {
        let payload = [&[kind], body].concat();
        debug_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        let mut covered = Vec::with_capacity(FRAME_HEAD_BYTES - 8);
        covered.extend_from_slice(&length(&payload).to_le_bytes());
        covered.extend_from_slice(&self.next_seq.to_le_bytes());
        covered.extend_from_slice(&self.group.to_le_bytes());
        let crc = frame_crc(self.header, &covered, &payload);
        self.bytes.extend_from_slice(&FRAME_MAGIC);
        self.bytes.extend_from_slice(&covered);
        self.bytes.extend_from_slice(&crc.to_le_bytes());
        self.bytes.extend_from_slice(&payload);
        self.next_seq += 1;
    }
}

/// What one write takes inside a frame.
pub(super) fn write_bytes(key: &[u8], value: Option<&[u8]>) -> usize {
    8 + key.len() + value.map_or(0, <[u8]>::len)
}

/// Whether a batch fits into one frame.
pub(super) fn writes_fit(writes: &[Write]) -> bool {
    let body: usize = writes.iter().map(|w| write_bytes(&w.key, w.value.as_deref())).sum();
    body < PAYLOAD_BYTES_MAX
}

/// The frames that recreate `entries`, of about [`SNAPSHOT_CHUNK_BYTES`] each.
pub(super) fn snapshot(header: &mut Header, entries: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut chunks: Vec<Vec<Upsert<'_>>> = Vec::new();
    let mut room = 0;
    for (key, value) in entries {
        let bytes = write_bytes(key, Some(value));
        if bytes > room {
            chunks.push(Vec::new());
            room = SNAPSHOT_CHUNK_BYTES.max(bytes);
        }
        room -= bytes;
        if let Some(chunk) = chunks.last_mut() {
            chunk.push((key, Some(value)));
        }
    }
    header.snapshot_frames = chunks.len() as u64;
    let mut encoder = Encoder::new(header, FIRST_SEQ);
    for chunk in chunks {
        encoder.writes(chunk);
    }
    let frames = encoder.bytes;
    [header.encode(), frames].concat()
}

/// Small enough that one damaged place is narrowed down, large enough to cost nothing.
const SNAPSHOT_CHUNK_BYTES: usize = 256 << 10;

/// The sequence of a file's first frame.
pub(super) const FIRST_SEQ: u64 = 1;

fn frame_crc(header: &Header, covered: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(header.salt(), covered), payload)
}

#[expect(clippy::expect_used, reason = "callers keep every length below PAYLOAD_BYTES_MAX")]
fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a frame's parts are shorter than 4 GiB")
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header =
        Header { store_id: StoreId([7; 16]), generation: 3, boot_counter: 2, snapshot_frames: 0 };

    #[test]
    fn a_header_comes_back_and_a_flipped_bit_is_noticed() {
        let bytes = HEADER.encode();
        assert_eq!(Header::decode(&bytes), Ok(HEADER));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert_eq!(Header::decode(&damaged), Err(HeaderError::Malformed), "byte {at}");
        }
        assert_eq!(Header::decode(&bytes[..HEADER_BYTES - 1]), Err(HeaderError::Malformed));
    }

    #[test]
    fn the_format_on_disk_is_pinned() {
        let mut encoder = Encoder::new(&HEADER, 5);
        encoder.writes([(b"k".as_slice(), Some(b"v".as_slice())), (b"gone".as_slice(), None)]);
        assert_eq!(
            data_encoding::HEXLOWER.encode(&encoder.bytes),
            "b15017fe17000000050000000000000005000000000000006787105f01\
             01000000010000006b7604000000ffffffff676f6e65"
        );
    }

    #[test]
    fn a_frame_of_another_store_or_generation_is_none_of_ours() {
        let mut encoder = Encoder::new(&HEADER, 1);
        encoder.boot(9);
        let frame = Frame::read(&HEADER, &encoder.bytes).unwrap();
        assert_eq!(frame.payload(), Some(Payload::Boot(9)));
        let other_store = Header { store_id: StoreId([8; 16]), ..HEADER };
        let other_generation = Header { generation: 4, ..HEADER };
        assert_eq!(Frame::read(&other_store, &encoder.bytes), None);
        assert_eq!(Frame::read(&other_generation, &encoder.bytes), None);
    }
}
