//! The bytes of a log file: one header, then frames.
//!
//! Frame: magic, payload length, sequence, group, CRC32C, payload. The CRC is salted
//! with the store id and the generation, so that what an older file left on the disk
//! never passes for a frame of this one. `group` is the sequence of the first frame
//! that was made durable by the same fsync: frames of one group may reach the disk
//! in any order, while a whole frame of a later group proves that everything before
//! that group had been durable.

use p2pit_protocol::StoreId;

use super::Write;

/// The log format this build reads and writes, and with it the form of the values in it.
///
/// 2: records have several keepers; jobs, holds and endings say more than before.
pub(super) const FORMAT_VERSION: u32 = 2;

/// What a frame may take. A batch that has more is several frames, which count together or not
/// at all; one write that has more is a caller's mistake.
pub(super) const PAYLOAD_BYTES_MAX: usize = 16 << 20;

pub(super) const HEADER_BYTES: usize = 56;
pub(super) const FRAME_HEAD_BYTES: usize = 28;
const HEADER_MAGIC: [u8; 8] = *b"p2pitjnl";
const FRAME_MAGIC: [u8; 4] = [0xb1, 0x50, 0x17, 0xfe];

const KIND_WRITES: u8 = 1;
const KIND_BOOT: u8 = 2;
/// Writes of a batch that goes on in the next frame.
const KIND_PART: u8 = 3;

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
pub(super) enum Payload<'a> {
    /// A batch, or the end of one.
    Writes(Vec<Entry<'a>>),
    Boot(u64),
    /// Of a batch that counts with its end, in a frame behind.
    Part(Vec<Entry<'a>>),
}

/// One write as it stands in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) key: &'a [u8],
    /// The value, and where in the frame it begins.
    pub(super) value: Option<(usize, &'a [u8])>,
}

impl<'a> Payload<'a> {
    fn decode(bytes: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        match reader.array::<1>()? {
            [KIND_BOOT] => {
                let counter = u64::from_le_bytes(reader.array()?);
                reader.0.is_empty().then_some(Self::Boot(counter))
            }
            [kind @ (KIND_WRITES | KIND_PART)] => {
                let mut writes = Vec::new();
                while !reader.0.is_empty() {
                    let key_bytes = u32::from_le_bytes(reader.array()?);
                    let value_bytes = u32::from_le_bytes(reader.array()?);
                    let key = reader.take(key_bytes as usize)?;
                    let at = FRAME_HEAD_BYTES + bytes.len() - reader.0.len();
                    let value = match value_bytes {
                        REMOVED => None,
                        length => Some((at, reader.take(length as usize)?)),
                    };
                    writes.push(Entry { key, value });
                }
                Some(if kind == KIND_PART { Self::Part(writes) } else { Self::Writes(writes) })
            }
            _ => None,
        }
    }
}

/// What stands before a payload, as far as it can be known without reading that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHead {
    pub(super) seq: u64,
    pub(super) group: u64,
    /// Of the whole frame.
    pub(super) bytes: usize,
    crc: u32,
}

impl FrameHead {
    /// The head at the start of `bytes`; `None` where there is none.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let magic: [u8; 4] = reader.array()?;
        let payload_bytes = u32::from_le_bytes(reader.array()?) as usize;
        let seq = u64::from_le_bytes(reader.array()?);
        let group = u64::from_le_bytes(reader.array()?);
        let crc = u32::from_le_bytes(reader.array()?);
        let is_head = magic == FRAME_MAGIC && payload_bytes <= PAYLOAD_BYTES_MAX;
        is_head.then_some(Self { seq, group, bytes: FRAME_HEAD_BYTES + payload_bytes, crc })
    }

    /// Whether `frame`, which begins with this head, is whole and of this file.
    pub(super) fn fits(&self, header: &Header, frame: &[u8]) -> bool {
        let (head, payload) = frame.split_at(FRAME_HEAD_BYTES);
        self.crc == frame_crc(header, &head[FRAME_MAGIC.len()..FRAME_HEAD_BYTES - 4], payload)
    }
}

/// What a frame says; `None` where no build of this format can have written it.
pub(super) fn payload(frame: &[u8]) -> Option<Payload<'_>> {
    Payload::decode(frame.get(FRAME_HEAD_BYTES..)?)
}

/// Where in `bytes` something begins that looks like a frame.
pub(super) fn find_magic(bytes: &[u8]) -> Option<usize> {
    bytes.windows(FRAME_MAGIC.len()).position(|window| window == FRAME_MAGIC)
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
        self.frame(KIND_BOOT, |bytes| bytes.extend_from_slice(&counter.to_le_bytes()));
    }

    /// One batch, in frames of so many bytes of writes, or more where one write has more. Where
    /// in [`Self::bytes`] each value begins. The caller has checked [`writes_fit`].
    pub(super) fn batch(&mut self, writes: &[Write], frame_bytes: usize) -> Vec<usize> {
        let mut places = Vec::with_capacity(writes.len());
        let mut rest = writes;
        loop {
            let mut bytes = 0;
            let fitting = rest.iter().take_while(|write| {
                bytes += write_bytes(&write.key, write.value.as_deref());
                bytes <= frame_bytes
            });
            let (part, later) = rest.split_at(fitting.count().max(1).min(rest.len()));
            let kind = if later.is_empty() { KIND_WRITES } else { KIND_PART };
            let upserts = part.iter().map(|w| (w.key.as_slice(), w.value.as_deref()));
            places.extend(self.writes_as(kind, upserts));
            if later.is_empty() {
                return places;
            }
            rest = later;
        }
    }

    /// One frame of writes. Where in [`Self::bytes`] each value begins. The caller sees to it
    /// that it is not too large.
    pub(super) fn writes<'w>(
        &mut self,
        writes: impl IntoIterator<Item = Upsert<'w>>,
    ) -> Vec<usize> {
        self.writes_as(KIND_WRITES, writes)
    }

    fn writes_as<'w>(
        &mut self,
        kind: u8,
        writes: impl IntoIterator<Item = Upsert<'w>>,
    ) -> Vec<usize> {
        let mut places = Vec::new();
        self.frame(kind, |bytes| {
            for (key, value) in writes {
                bytes.extend_from_slice(&length(key).to_le_bytes());
                bytes.extend_from_slice(&value.map_or(REMOVED, length).to_le_bytes());
                bytes.extend_from_slice(key);
                places.push(bytes.len());
                bytes.extend_from_slice(value.unwrap_or_default());
            }
        });
        places
    }

    fn frame(&mut self, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&FRAME_MAGIC);
        self.bytes.resize(start + FRAME_HEAD_BYTES, 0);
        self.bytes.push(kind);
        fill(&mut self.bytes);
        let (head, payload) = self.bytes[start..].split_at_mut(FRAME_HEAD_BYTES);
        debug_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        head[4..8].copy_from_slice(&length(payload).to_le_bytes());
        head[8..16].copy_from_slice(&self.next_seq.to_le_bytes());
        head[16..24].copy_from_slice(&self.group.to_le_bytes());
        let crc = frame_crc(self.header, &head[4..24], payload);
        head[24..28].copy_from_slice(&crc.to_le_bytes());
        self.next_seq += 1;
    }
}

/// What one write takes inside a frame.
pub(super) fn write_bytes(key: &[u8], value: Option<&[u8]>) -> usize {
    8 + key.len() + value.map_or(0, <[u8]>::len)
}

/// What the writes in one frame may have together, beside their kind.
pub(super) const WRITES_BYTES_MAX: usize = PAYLOAD_BYTES_MAX - 1;

/// Whether every write fits into a frame.
pub(super) fn writes_fit(writes: &[Write]) -> bool {
    writes.iter().all(|w| write_bytes(&w.key, w.value.as_deref()) <= WRITES_BYTES_MAX)
}

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
    fn a_batch_that_one_frame_does_not_take_is_parts_and_an_end() {
        let write = |key: &str, bytes: usize| Write {
            key: key.into(),
            value: (bytes > 0).then(|| vec![b'v'; bytes]),
        };
        let batch =
            [write("a", 10), write("b", 0), write("large", 90), write("c", 5), write("d", 6)];
        let mut encoder = Encoder::new(&HEADER, 5);
        let places = encoder.batch(&batch, 40);
        let (mut at, mut frames, mut found) = (0, Vec::new(), Vec::new());
        while at < encoder.bytes.len() {
            let head = FrameHead::read(&encoder.bytes[at..]).unwrap();
            assert_eq!(head.group, 5);
            let (is_part, writes) = match payload(&encoder.bytes[at..at + head.bytes]).unwrap() {
                Payload::Part(writes) => (true, writes),
                Payload::Writes(writes) => (false, writes),
                Payload::Boot(_) => panic!("no boot was written"),
            };
            frames.push((is_part, writes.len()));
            found.extend(writes.iter().map(|w| (w.key.to_vec(), w.value.map(|(v, _)| at + v))));
            at += head.bytes;
        }
        assert_eq!(frames, [(true, 2), (true, 1), (false, 2)]);
        let expected = batch.iter().zip(&places);
        let expected = expected.map(|(w, at)| (w.key.clone(), w.value.as_ref().map(|_| *at)));
        assert!(found.into_iter().eq(expected));
        assert_eq!(encoder.next_seq(), 8);
    }

    #[test]
    fn a_frame_of_another_store_or_generation_is_none_of_ours() {
        let mut encoder = Encoder::new(&HEADER, 1);
        encoder.boot(9);
        let head = FrameHead::read(&encoder.bytes).unwrap();
        assert_eq!(head.bytes, encoder.bytes.len());
        assert!(head.fits(&HEADER, &encoder.bytes));
        assert_eq!(payload(&encoder.bytes), Some(Payload::Boot(9)));
        let other_store = Header { store_id: StoreId([8; 16]), ..HEADER };
        let other_generation = Header { generation: 4, ..HEADER };
        assert!(!head.fits(&other_store, &encoder.bytes));
        assert!(!head.fits(&other_generation, &encoder.bytes));
    }

    #[test]
    fn a_value_is_found_where_the_encoder_said_that_it_put_it() {
        let mut encoder = Encoder::new(&HEADER, 1);
        let places = encoder.writes([(b"k".as_slice(), Some(b"one".as_slice())), (b"l", None)]);
        assert_eq!(&encoder.bytes[places[0]..places[0] + 3], b"one");
        let Some(Payload::Writes(writes)) = payload(&encoder.bytes) else { panic!("no writes") };
        assert_eq!(writes[0], Entry { key: b"k", value: Some((places[0], b"one")) });
        assert_eq!(writes[1], Entry { key: b"l", value: None });
    }
}
