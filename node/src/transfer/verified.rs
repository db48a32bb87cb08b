//! Ranges of a blob that prove themselves against its id.
//!
//! A [`BlobId`] is the root of BLAKE3's own hash tree, so the hashes on the way from the
//! root to a part of a blob prove that part by itself: verified streaming as in the bao
//! specification, here by the crate `bao-tree`, which nothing outside this module names.
//! The hashes of a blob's inner nodes are its *outboard*, in pre-order, 64 bytes for every
//! group of [`GROUP_BYTES`] but one. Whoever sends ranges needs it; whoever receives them
//! gets it along.

use std::{
    fs::File,
    io::{self, Read, Write},
    ops::Range,
    os::unix::fs::FileExt,
};

use bao_tree::{
    BaoTree, BlockSize, ChunkNum, ChunkRanges,
    blake3::{
        Hash,
        hazmat::{Mode, merge_subtrees_non_root, merge_subtrees_root},
    },
    io::{
        BaoContentItem, DecodeError as BaoDecodeError, EncodeError as BaoEncodeError,
        outboard::PreOrderOutboard,
        sync::{CreateOutboard, DecodeResponseIter, encode_ranges_validated},
    },
    iter::BaoChunk,
};
use blake3::hazmat::HasherExt;
use bytes::Bytes;
use p2pit_protocol::BlobId;
use thiserror::Error;

/// Bytes that are proved together. What is not longer than one group has no outboard: it
/// is proved as a whole.
pub const GROUP_BYTES: u64 = 256 << 10;
const BLOCK: BlockSize = BlockSize::from_chunk_log(8);
const CHUNKS_PER_GROUP: u64 = 256;

/// A set of groups of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges(ChunkRanges);

impl Default for Ranges {
    fn default() -> Self {
        Self(ChunkRanges::empty())
    }
}

impl Ranges {
    /// All groups of a blob of `size` bytes; an empty one has one empty group.
    pub fn all(size: u64) -> Self {
        Self::of_groups(0..groups(size))
    }

    fn of_groups(groups: Range<u64>) -> Self {
        let chunk = |group| ChunkNum(group * CHUNKS_PER_GROUP);
        Self(ChunkRanges::from(chunk(groups.start)..chunk(groups.end)))
    }

    /// The groups that `bytes` touches.
    pub fn covering(bytes: Range<u64>) -> Self {
        Self::of_groups(bytes.start / GROUP_BYTES..bytes.end.div_ceil(GROUP_BYTES))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn add(&mut self, other: &Self) {
        self.0 |= other.0.clone();
    }

    /// What is in `self` and not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0))
    }

    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0))
    }

    /// The ranges in bytes, ascending and apart, of a blob of `size` bytes.
    pub fn bytes(&self, size: u64) -> Vec<Range<u64>> {
        let boundaries: Vec<u64> =
            self.0.boundaries().iter().map(|chunk| chunk.to_bytes().min(size)).collect();
        boundaries.chunks(2).map(|pair| pair[0]..pair.get(1).copied().unwrap_or(size)).collect()
    }

    /// How many bytes of a blob of `size` bytes these are.
    pub fn byte_count(&self, size: u64) -> u64 {
        self.bytes(size).iter().map(|range| range.end - range.start).sum()
    }
}

fn groups(size: u64) -> u64 {
    size.div_ceil(GROUP_BYTES).max(1)
}

/// Bytes of the outboard of a blob of `size` bytes.
pub fn outboard_bytes(size: u64) -> u64 {
    BaoTree::new(size, BLOCK).outboard_size()
}

/// Reads exactly `size` bytes; gives their id and the outboard.
pub fn hash(reader: impl Read, size: u64) -> io::Result<(BlobId, Vec<u8>)> {
    let mut outboard = PreOrderOutboard {
        root: Hash::from_bytes([0; 32]),
        tree: BaoTree::new(size, BLOCK),
        data: Vec::with_capacity(usize::try_from(outboard_bytes(size)).unwrap_or(0)),
    };
    outboard.init_from(reader)?;
    Ok((BlobId(*outboard.root.as_bytes()), outboard.data))
}

/// Why ranges were not written.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// Content or outboard are not what the id says.
    #[error("the content is not that of its id")]
    Corrupt,
    #[error(transparent)]
    Io(io::Error),
}

/// Writes `ranges` of the blob in `data` with the hashes that prove them. Nothing wrong is
/// ever written: each group is verified first.
pub fn encode(
    id: &BlobId,
    size: u64,
    data: &File,
    outboard: &File,
    ranges: &Ranges,
    mut writer: impl Write,
) -> Result<(), EncodeError> {
    let outboard = PreOrderOutboard {
        root: Hash::from_bytes(id.0),
        tree: BaoTree::new(size, BLOCK),
        data: outboard,
    };
    encode_ranges_validated(data, outboard, &ranges.0, &mut writer).map_err(|e| match e {
        BaoEncodeError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof => EncodeError::Corrupt,
        BaoEncodeError::Io(e) => EncodeError::Io(e),
        BaoEncodeError::ParentHashMismatch(_) | BaoEncodeError::LeafHashMismatch(_) => {
            EncodeError::Corrupt
        }
        other => EncodeError::Io(other.into()),
    })
}

/// Why ranges were not read.
#[derive(Debug, Error)]
pub enum DecodeError {
    #[error("the content is not that of its id")]
    Corrupt,
    #[error(transparent)]
    Io(io::Error),
}

/// A part of a blob that has been proved.
#[derive(Debug)]
pub enum Proved {
    /// Bytes of the outboard.
    Hashes { offset: u64, bytes: [u8; 64] },
    /// Bytes of the content: one group.
    Content { offset: u64, bytes: Bytes },
}

impl Proved {
    /// How much content it is.
    pub fn content_bytes(&self) -> u64 {
        match self {
            Self::Hashes { .. } => 0,
            Self::Content { bytes, .. } => bytes.len() as u64,
        }
    }
}

/// Reads what [`encode`] wrote for the same id, size and ranges, and hands out each part
/// once it is proved. Where a part is handed out, the hashes above it have been.
pub fn decode(
    id: &BlobId,
    size: u64,
    ranges: &Ranges,
    reader: impl Read,
    mut on_proved: impl FnMut(Proved) -> io::Result<()>,
) -> Result<(), DecodeError> {
    let tree = BaoTree::new(size, BLOCK);
    for item in DecodeResponseIter::new(Hash::from_bytes(id.0), tree, reader, &ranges.0) {
        let proved = match item {
            Ok(BaoContentItem::Leaf(leaf)) => {
                Proved::Content { offset: leaf.offset, bytes: leaf.data }
            }
            Ok(BaoContentItem::Parent(parent)) => {
                let Some(at) = tree.pre_order_offset(parent.node) else { continue };
                let mut bytes = [0; 64];
                bytes[..32].copy_from_slice(parent.pair.0.as_bytes());
                bytes[32..].copy_from_slice(parent.pair.1.as_bytes());
                Proved::Hashes { offset: at * 64, bytes }
            }
            Err(BaoDecodeError::ParentHashMismatch(_) | BaoDecodeError::LeafHashMismatch(_)) => {
                return Err(DecodeError::Corrupt);
            }
            Err(error) => return Err(DecodeError::Io(error.into())),
        };
        on_proved(proved).map_err(DecodeError::Io)?;
    }
    Ok(())
}

/// The groups of `data` that are proved by what there is of `outboard`: how a transfer
/// that was cut, by whatever, knows what it has.
pub fn proved_ranges(id: &BlobId, size: u64, data: &File, outboard: &File) -> io::Result<Ranges> {
    let tree = BaoTree::new(size, BLOCK);
    let (everything, mut proved) = (Ranges::all(size), Ranges::default());
    // What each node still to come must hash to, where that is known.
    let mut expected = vec![Some(Hash::from_bytes(id.0))];
    let mut buffer = vec![0; GROUP_BYTES as usize];
    for chunk in tree.ranges_pre_order_chunks_iter_ref(&everything.0, 0) {
        let known = expected.pop().flatten();
        match chunk {
            BaoChunk::Parent { node, is_root, .. } => {
                let pair = match (known, tree.pre_order_offset(node)) {
                    (Some(hash), Some(at)) => read_pair(outboard, at * 64)?
                        .filter(|(left, right)| parent_hash(left, right, is_root) == hash),
                    _ => None,
                };
                expected.push(pair.map(|(_, right)| right));
                expected.push(pair.map(|(left, _)| left));
            }
            BaoChunk::Leaf { start_chunk, size, is_root, .. } => {
                let Some(hash) = known else { continue };
                let (start, buffer) = (start_chunk.to_bytes(), &mut buffer[..size]);
                if read_whole(data, buffer, start)? && group_hash(start, buffer, is_root) == hash {
                    proved.add(&Ranges::covering(start..start + size.max(1) as u64));
                }
            }
        }
    }
    Ok(proved)
}

fn read_pair(outboard: &File, offset: u64) -> io::Result<Option<(Hash, Hash)>> {
    let mut bytes = [0; 64];
    if !read_whole(outboard, &mut bytes, offset)? {
        return Ok(None);
    }
    let half = |at: usize| {
        let mut hash = [0; 32];
        hash.copy_from_slice(&bytes[at..at + 32]);
        Hash::from_bytes(hash)
    };
    Ok(Some((half(0), half(32))))
}

/// Whether all of it is there.
fn read_whole(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(buffer, offset) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

fn parent_hash(left: &Hash, right: &Hash, is_root: bool) -> Hash {
    let (left, right) = (left.as_bytes(), right.as_bytes());
    if is_root {
        merge_subtrees_root(left, right, Mode::Hash)
    } else {
        Hash::from(merge_subtrees_non_root(left, right, Mode::Hash))
    }
}

fn group_hash(start: u64, bytes: &[u8], is_root: bool) -> Hash {
    if is_root {
        return blake3::hash(bytes);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(start);
    hasher.update(bytes);
    Hash::from(hasher.finalize_non_root())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZES: [u64; 8] = [
        0,
        1,
        GROUP_BYTES,
        GROUP_BYTES + 1,
        2 * GROUP_BYTES,
        3 * GROUP_BYTES + 5,
        8 * GROUP_BYTES,
        11 * GROUP_BYTES - 1,
    ];

    #[test]
    fn an_id_is_the_plain_hash_whatever_the_size() {
        for size in SIZES {
            let content = content(size);
            let (id, outboard) = hash(&content[..], size).unwrap();
            assert_eq!(id, BlobId::of(&content), "{size}");
            assert_eq!(outboard.len() as u64, outboard_bytes(size));
        }
        assert!(hash(&b"short"[..], 6).is_err());
    }

    #[test]
    fn any_ranges_travel_and_prove_themselves() {
        for size in SIZES {
            let blob = Blob::new(size);
            let last = groups(size);
            for ranges in [
                Ranges::all(size),
                Ranges::covering(0..1),
                Ranges::of_groups(last - 1..last),
                Ranges::of_groups(last / 2..last),
            ] {
                let encoded = blob.encode(&ranges).unwrap();
                let (data, outboard) = (empty(size), empty(0));
                let taken = blob.decode_into(&ranges, &encoded, &data, &outboard).unwrap();
                assert_eq!(taken, ranges.byte_count(size));
                let proved = proved_ranges(&blob.id, size, &data, &outboard).unwrap();
                assert_eq!(proved, ranges, "{size}");
            }
        }
    }

    #[test]
    fn parts_that_arrived_in_any_order_make_the_whole() {
        let blob = Blob::new(11 * GROUP_BYTES - 1);
        let (data, outboard) = (empty(blob.size), empty(0));
        let mut have = Ranges::default();
        for group in [7, 0, 10, 3] {
            have.add(&Ranges::of_groups(group..group + 1));
            let encoded = blob.encode(&Ranges::of_groups(group..group + 1)).unwrap();
            blob.decode_into(&Ranges::of_groups(group..group + 1), &encoded, &data, &outboard)
                .unwrap();
            assert_eq!(proved_ranges(&blob.id, blob.size, &data, &outboard).unwrap(), have);
        }
        let rest = Ranges::all(blob.size).without(&have);
        assert_eq!(rest.bytes(blob.size).len(), 3);
        let encoded = blob.encode(&rest).unwrap();
        blob.decode_into(&rest, &encoded, &data, &outboard).unwrap();
        let mut whole = vec![0; blob.size as usize];
        data.read_exact_at(&mut whole, 0).unwrap();
        assert_eq!(BlobId::of(&whole), blob.id);
    }

    #[test]
    fn what_is_corrupt_is_neither_sent_nor_taken_nor_counted() {
        let blob = Blob::new(4 * GROUP_BYTES);
        let all = Ranges::all(blob.size);
        let encoded = blob.encode(&all).unwrap();
        let step = encoded.len() / 97;
        for at in (0..encoded.len()).step_by(step) {
            let mut wrong = encoded.clone();
            wrong[at] ^= 1;
            let (data, outboard) = (empty(blob.size), empty(0));
            let result = blob.decode_into(&all, &wrong, &data, &outboard);
            assert!(matches!(result, Err(DecodeError::Corrupt)), "{at}");
        }
        blob.data.write_all_at(b"rotten", 2 * GROUP_BYTES + 9).unwrap();
        assert!(matches!(blob.encode(&all), Err(EncodeError::Corrupt)));
        assert!(blob.encode(&Ranges::of_groups(0..2)).is_ok());
        let proved = proved_ranges(&blob.id, blob.size, &blob.data, &blob.outboard).unwrap();
        assert_eq!(proved, all.without(&Ranges::of_groups(2..3)));
        // Without the hashes above it, nothing proves a group.
        blob.outboard.write_all_at(&[0; 64], 64).unwrap();
        let proved = proved_ranges(&blob.id, blob.size, &blob.data, &blob.outboard).unwrap();
        assert_eq!(proved, Ranges::of_groups(3..4));
    }

    #[test]
    fn a_cut_stream_is_an_error_of_the_stream() {
        let blob = Blob::new(2 * GROUP_BYTES);
        let all = Ranges::all(blob.size);
        let encoded = blob.encode(&all).unwrap();
        for cut in [0, 63, 64, 100, encoded.len() - 1] {
            let result = blob.decode_into(&all, &encoded[..cut], &empty(blob.size), &empty(0));
            assert!(matches!(result, Err(DecodeError::Io(e))
                if e.kind() == io::ErrorKind::UnexpectedEof));
        }
    }

    proptest! {
        #[test]
        fn ranges_are_sets(a in groups_of(40), b in groups_of(40)) {
            let size = 40 * GROUP_BYTES;
            let set = |groups: &[u64]| {
                let mut ranges = Ranges::default();
                for group in groups {
                    ranges.add(&Ranges::of_groups(*group..group + 1));
                }
                ranges
            };
            let without: Vec<u64> = a.iter().filter(|g| !b.contains(g)).copied().collect();
            let both: Vec<u64> = a.iter().filter(|g| b.contains(g)).copied().collect();
            prop_assert_eq!(set(&a).without(&set(&b)), set(&without));
            prop_assert_eq!(set(&a).intersection(&set(&b)), set(&both));
            let mut distinct = a.clone();
            distinct.sort_unstable();
            distinct.dedup();
            let bytes = distinct.len() as u64 * GROUP_BYTES;
            prop_assert_eq!(set(&a).byte_count(size), bytes);
            let again = set(&a).bytes(size).into_iter().fold(Ranges::default(), |mut all, range| {
                all.add(&Ranges::covering(range));
                all
            });
            prop_assert_eq!(again, set(&a));
        }
    }

    fn groups_of(max: u64) -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(0..max, 0..20)
    }

    struct Blob {
        id: BlobId,
        size: u64,
        data: File,
        outboard: File,
    }

    impl Blob {
        fn new(size: u64) -> Self {
            let content = content(size);
            let (id, hashes) = hash(&content[..], size).unwrap();
            let (data, outboard) = (empty(0), empty(0));
            data.write_all_at(&content, 0).unwrap();
            outboard.write_all_at(&hashes, 0).unwrap();
            Self { id, size, data, outboard }
        }

        fn encode(&self, ranges: &Ranges) -> Result<Vec<u8>, EncodeError> {
            let mut encoded = Vec::new();
            encode(&self.id, self.size, &self.data, &self.outboard, ranges, &mut encoded)?;
            Ok(encoded)
        }

        fn decode_into(
            &self,
            ranges: &Ranges,
            encoded: &[u8],
            data: &File,
            outboard: &File,
        ) -> Result<u64, DecodeError> {
            let mut taken = 0;
            decode(&self.id, self.size, ranges, encoded, |proved| match proved {
                Proved::Hashes { offset, bytes } => outboard.write_all_at(&bytes, offset),
                Proved::Content { offset, bytes } => {
                    taken += bytes.len() as u64;
                    data.write_all_at(&bytes, offset)
                }
            })?;
            Ok(taken)
        }
    }

    fn content(size: u64) -> Vec<u8> {
        (0..size).map(|i| (i % 251) as u8).collect()
    }

    fn empty(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }
}
