//! Log lines of several ranks in one stream.
//!
//! A rank's log only ever grows at its end, and a copy of it is its beginning: so a place in
//! it is a number of bytes, whoever has it, and a stream that broke is taken up elsewhere.

use p2pit_protocol::job::{Attempt, Rank};
use serde::{Deserialize, Serialize};

/// A rank of one attempt.
pub type Part = (Attempt, Rank);

/// Which lines a node is to read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parts {
    /// Those of all ranks that ran there.
    pub own: bool,
    /// Of these ranks, from so many bytes on; where they ran elsewhere, from a copy.
    pub ranks: Vec<(Attempt, Rank, u64)>,
}

/// What a node has of one rank's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub attempt: Attempt,
    pub rank: Rank,
    pub bytes: u64,
    /// It is the log itself, and no copy.
    pub own: bool,
    /// Nothing is to be added to it.
    pub complete: bool,
}

/// A piece of one rank's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub part: Part,
    pub bytes: Vec<u8>,
}

/// Attempt, rank and length, little endian, before the bytes.
const HEAD_BYTES: usize = 12;
/// No longer piece is sent or taken.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

impl Chunk {
    /// # Panics
    /// Where it is longer than [`CHUNK_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.bytes.len() <= CHUNK_BYTES_MAX, "a piece of {} bytes", self.bytes.len());
        let (Attempt(attempt), Rank(rank)) = self.part;
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let heads = [attempt, rank, length].map(u32::to_le_bytes);
        [&heads.concat()[..], &self.bytes].concat()
    }
}

/// What came in place of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the log stream is not in order: is one side older?")]
pub struct Malformed;

/// Pieces out of a stream that is cut anywhere.
#[derive(Debug, Default)]
pub struct Chunks {
    buffer: Vec<u8>,
    /// Of the buffer, taken already.
    taken: usize,
}

impl Chunks {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..std::mem::take(&mut self.taken));
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole piece, if it is there.
    ///
    /// # Errors
    /// Where no piece begins like this.
    pub fn pop(&mut self) -> Result<Option<Chunk>, Malformed> {
        let rest = &self.buffer[self.taken..];
        let Some((head, rest)) = rest.split_first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let number =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = number(8) as usize;
        if length > CHUNK_BYTES_MAX {
            return Err(Malformed);
        }
        let Some(bytes) = rest.get(..length) else { return Ok(None) };
        let chunk = Chunk { part: (Attempt(number(0)), Rank(number(4))), bytes: bytes.to_vec() };
        self.taken += HEAD_BYTES + length;
        Ok(Some(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_out_whole_wherever_the_stream_is_cut() {
        let chunk = |rank, text: &str| Chunk {
            part: (Attempt(2), Rank(rank)),
            bytes: text.as_bytes().to_vec(),
        };
        let sent = [chunk(0, "one\n"), chunk(7, ""), chunk(0, "two\nand more\n")];
        let stream: Vec<u8> = sent.iter().flat_map(Chunk::encode).collect();
        for size in 1..stream.len() {
            let (mut chunks, mut came) = (Chunks::default(), Vec::new());
            for piece in stream.chunks(size) {
                chunks.push(piece);
                while let Some(chunk) = chunks.pop().unwrap() {
                    came.push(chunk);
                }
            }
            assert_eq!(came, sent, "cut every {size} bytes");
        }
    }

    #[test]
    fn a_piece_that_is_too_long_is_none() {
        let mut chunks = Chunks::default();
        chunks.push(&[0xff; HEAD_BYTES]);
        assert_eq!(chunks.pop(), Err(Malformed));
    }
}
