//! Blobs over a stream.
//!
//! Who wants what is settled before, by messages of the callers. Then one side calls
//! [`send_blobs`] and the other [`receive_blobs`]. Blobs follow one another without
//! answers in between, each as
//!
//! ```text
//! 0, id (32 bytes)                                    the sender lacks it
//! 1, id, size (8 bytes, big-endian), content          the whole blob
//! 2, id, size, the ranges asked for, as `verified`    of a blob longer than a group
//!    encodes them
//! ```
//!
//! and this sequence is cut into chunks of any length up to [`CHUNK_BYTES_MAX`], each
//! behind its length (4 bytes, big-endian). A length with its highest bit set stands for
//! that many zeros, which do not travel. A chunk of length 0 ends it all. So the stream
//! can be used for more afterwards, and an end that comes too early is noticed.
//!
//! A blob of one group is hashed when it is there and stored under its own hash or not at
//! all. A longer one is proved group by group, and what was proved stays in the store's
//! `partial/` whatever happens next. Files are read and written on a blocking thread,
//! which hands chunks to the stream's task over a short queue; a queue's length is all the
//! memory that a transfer takes.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    sync::Arc,
};

use bytes::{Buf, Bytes, BytesMut};
use p2pit_protocol::{BlobId, PeerId};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::{JoinError, spawn_blocking},
};
use tracing::warn;

use super::{
    frame,
    pace::Pace,
    store::{self, BUFFER_BYTES, BlobStore, Verifiable, read_some},
    verified::{self, DecodeError, GROUP_BYTES, Ranges},
};

/// Bytes in one chunk.
pub const CHUNK_BYTES_MAX: usize = BUFFER_BYTES;
/// Blobs in one list of [`write_asks`]; as many as a tree has entries, and its manifest.
pub const ASKS_MAX: usize = super::tree::ENTRIES_MAX + 1;
/// Ranges of one blob in such a list.
const RANGES_MAX: usize = 4096;
/// Ranges of all blobs in such a list.
const RANGES_IN_ALL_MAX: usize = 1 << 17;
/// Chunks between the disk and the stream: enough that neither waits for the other's
/// every step.
const QUEUE_CHUNKS: usize = 8;

const ABSENT: u8 = 0;
const WHOLE: u8 = 1;
const PROVED: u8 = 2;

/// What is asked of a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    pub id: BlobId,
    /// First byte and the one behind the last, each rounded to whole groups; none for the
    /// whole blob.
    pub ranges: Vec<(u64, u64)>,
}

impl Ask {
    pub fn whole(id: BlobId) -> Self {
        Self { id, ranges: Vec::new() }
    }

    /// Bytes of content asked for of a blob of `size` bytes.
    pub fn bytes_of(&self, size: u64) -> u64 {
        self.of(size).byte_count(size)
    }

    /// The groups asked for of a blob of `size` bytes.
    fn of(&self, size: u64) -> Ranges {
        let all = Ranges::all(size);
        if self.ranges.is_empty() {
            return all;
        }
        let mut asked = Ranges::default();
        for (start, end) in &self.ranges {
            asked.add(&Ranges::covering(*start..(*end).min(size).max(*start)));
        }
        asked.intersection(&all)
    }
}

/// Where blobs to be sent are read from.
pub trait Source: Send + Sync + 'static {
    /// `None` where this source does not have the blob.
    fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>>;
}

/// A blob to be sent.
pub enum OpenBlob {
    /// Exactly `size` bytes come from `content`. Sent whole.
    Content { size: u64, content: Box<dyn Read + Send> },
    /// Sent in the ranges asked for, with what proves them.
    Verifiable { store: BlobStore, blob: Verifiable },
}

impl std::fmt::Debug for OpenBlob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Content { size, .. } => {
                f.debug_struct("Content").field("size", size).finish_non_exhaustive()
            }
            Self::Verifiable { blob, .. } => f.debug_tuple("Verifiable").field(blob).finish(),
        }
    }
}

impl Source for BlobStore {
    /// A blob that has gone bad is not had: it is removed.
    fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>> {
        let opened = match self.size(id) {
            Ok(size) if size > GROUP_BYTES => self
                .open_verifiable(id)
                .map(|blob| OpenBlob::Verifiable { store: self.clone(), blob }),
            Ok(_) => self.read(id, GROUP_BYTES as usize).map(|bytes| OpenBlob::Content {
                size: bytes.len() as u64,
                content: Box::new(io::Cursor::new(bytes)),
            }),
            Err(error) => Err(error),
        };
        match opened {
            Ok(blob) => Ok(Some(blob)),
            Err(store::Error::Missing(_)) => Ok(None),
            Err(store::Error::Corrupt(_)) => {
                warn!(blob = %id, "a corrupt blob is removed");
                self.remove(id).map_err(io::Error::other)?;
                Ok(None)
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    pub blobs: u64,
    pub bytes: u64,
    /// Blobs asked for that the source lacks; the receiver is told which.
    pub absent: u64,
}

/// Why sending stopped. The receiver sees the stream end too early.
#[derive(Debug, Error)]
pub enum SendError {
    #[error("cannot send blob {id}")]
    Source { id: BlobId, source: io::Error },
    /// The receiver went away.
    #[error("the stream broke")]
    Stream(#[source] io::Error),
    #[error("the reading thread ended")]
    Thread(#[source] JoinError),
}

/// Sends what is asked for, in its order, no faster than `pace`. `on_bytes` is told how
/// much content has been handed to the stream since it was last told. After an error the
/// stream is in the middle of something: drop it, or the receiver waits.
pub async fn send_blobs(
    source: Arc<dyn Source>,
    asks: Vec<Ask>,
    writer: &mut (impl AsyncWrite + Unpin),
    pace: &Pace,
    mut on_bytes: impl FnMut(u64),
) -> Result<Sent, SendError> {
    let (queue, mut chunks) = mpsc::channel(QUEUE_CHUNKS);
    let reading = spawn_blocking(move || read_out(&*source, &asks, ChunkWriter::new(queue)));
    let mut broken = None;
    while let Some(Chunk { bytes, content_bytes }) = chunks.recv().await {
        pace.take(bytes.len() as u64).await;
        let result = writer.write_all(&bytes).await;
        if let Err(error) = result {
            broken = Some(error);
            break;
        }
        on_bytes(content_bytes);
    }
    drop(chunks);
    let outcome = reading.await.map_err(SendError::Thread)?;
    if let Some(error) = broken {
        return Err(SendError::Stream(error));
    }
    let sent = outcome?;
    writer.write_all(&0_u32.to_be_bytes()).await.map_err(SendError::Stream)?;
    writer.flush().await.map_err(SendError::Stream)?;
    Ok(sent)
}

/// A blob to be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub ask: Ask,
    /// A blob that says it is longer is refused before any of it is kept.
    pub bytes_max: u64,
}

impl Wanted {
    pub fn whole(id: BlobId, bytes_max: u64) -> Self {
        Self { ask: Ask::whole(id), bytes_max }
    }

    /// What `store` lacks of a blob; `None` where it lacks nothing.
    pub fn missing(store: &BlobStore, id: BlobId, size: u64) -> Result<Option<Self>, store::Error> {
        if store.has(&id) {
            return Ok(None);
        }
        let mut wanted = Self::whole(id, size);
        if size > GROUP_BYTES {
            let missing = if store.has_partial(&id, size) {
                let partial = store.partial(&id, size)?;
                if store.finish(&partial)? {
                    return Ok(None);
                }
                partial.missing()
            } else {
                Ranges::all(size)
            };
            let ranges = missing.bytes(size);
            // What is in too many pieces is fetched anew from some piece on.
            let (few, many) = ranges.split_at(ranges.len().min(RANGES_MAX - 1));
            wanted.ask.ranges = few.iter().map(|range| (range.start, range.end)).collect();
            wanted.ask.ranges.extend(many.first().map(|range| (range.start, size)));
        }
        Ok(Some(wanted))
    }

    /// What of this `store` still lacks; `None` where it lacks nothing.
    pub fn still_missing(self, store: &BlobStore) -> Result<Option<Self>, store::Error> {
        if store.has(&self.ask.id) {
            return Ok(None);
        }
        if !self.is_large() {
            return Ok(Some(self));
        }
        let size = self.bytes_max;
        if !store.has_partial(&self.ask.id, size) {
            return Ok(Some(self));
        }
        let left = self.ask.of(size).intersection(&store.partial(&self.ask.id, size)?.missing());
        let ranges: Vec<_> =
            left.bytes(size).iter().map(|range| (range.start, range.end)).collect();
        let ask = Ask { id: self.ask.id, ranges };
        Ok((!left.is_empty()).then_some(Self { ask, bytes_max: size }))
    }

    /// Whether it travels in ranges.
    pub fn is_large(&self) -> bool {
        self.bytes_max > GROUP_BYTES && !self.ask.ranges.is_empty()
    }

    /// Bytes of content that will travel, if the blob has `bytes_max`.
    pub fn bytes(&self) -> u64 {
        self.ask.bytes_of(self.bytes_max)
    }

    /// The first `bytes` of it, a multiple of a group, and what is left then.
    pub fn split(&self, bytes: u64) -> (Self, Option<Self>) {
        let (mut first, mut rest, mut room) = (Vec::new(), Vec::new(), bytes);
        for range in self.ask.of(self.bytes_max).bytes(self.bytes_max) {
            let middle = range.end.min(range.start + room);
            if range.start < middle {
                first.push((range.start, middle));
            }
            if middle < range.end {
                rest.push((middle, range.end));
            }
            room -= middle - range.start;
        }
        let of = |ranges| Self { ask: Ask { id: self.ask.id, ranges }, bytes_max: self.bytes_max };
        let rest = (!rest.is_empty()).then(|| of(rest));
        (of(first), rest)
    }
}

/// What arrived.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Received {
    /// Of which something came.
    pub blobs: u64,
    pub bytes: u64,
    /// The blobs that the sender does not have.
    pub absent: Vec<BlobId>,
}

/// Why receiving stopped. Blobs that were complete are in the store; of a long one that
/// was not, what had been proved is in `partial/`.
#[derive(Debug, Error)]
pub enum ReceiveError {
    #[error("blob {id} from {peer} has the wrong content")]
    WrongContent { id: BlobId, peer: PeerId },
    #[error("blob {id} from {peer} was not asked for")]
    Unexpected { id: BlobId, peer: PeerId },
    #[error("blob {id} from {peer} has {size} bytes where {max} are expected")]
    TooLarge { id: BlobId, peer: PeerId, size: u64, max: u64 },
    #[error("{peer} sends what is no sequence of blobs")]
    Malformed { peer: PeerId },
    /// The sender went away or gave up.
    #[error("the stream from {peer} ended too early")]
    Truncated { peer: PeerId },
    #[error("the stream from {peer} broke")]
    Stream { peer: PeerId, source: io::Error },
    #[error("cannot keep blob {id}")]
    Store { id: BlobId, source: store::Error },
    #[error("the writing thread ended")]
    Thread(#[source] JoinError),
}

impl ReceiveError {
    /// Whether the fault lies here, so that another sender would not help.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Store { .. } | Self::Thread(_))
    }
}

/// Receives into `store` what `peer` sends, which must be among `wanted`. `on_bytes` is
/// told how much content has arrived since it was last told. It is read no faster than
/// `pace`. Blobs are in the store when this returns, and survive a power loss only after [`BlobStore::persist`].
pub async fn receive_blobs(
    store: &BlobStore,
    wanted: &[Wanted],
    peer: PeerId,
    reader: &mut (impl AsyncRead + Unpin),
    pace: &Pace,
    on_bytes: impl FnMut(u64) + Send + 'static,
) -> Result<Received, ReceiveError> {
    let wanted = wanted.iter().map(|wanted| (wanted.ask.id, wanted.clone())).collect();
    let intake = Intake { store: store.clone(), wanted: Some(wanted), peer, on_bytes };
    take_in(intake, reader, pace).await
}

/// As [`receive_blobs`], for whatever is sent whole: from a user of this machine, who owns
/// the store. What says it is some blob must still be that blob.
pub async fn receive_any(
    store: &BlobStore,
    me: PeerId,
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Received, ReceiveError> {
    let intake = Intake { store: store.clone(), wanted: None, peer: me, on_bytes: |_| {} };
    take_in(intake, reader, &Pace::unlimited()).await
}

async fn take_in(
    intake: Intake<impl FnMut(u64) + Send + 'static>,
    reader: &mut (impl AsyncRead + Unpin),
    pace: &Pace,
) -> Result<Received, ReceiveError> {
    let peer = intake.peer;
    let (chunks, queue) = mpsc::channel(QUEUE_CHUNKS);
    let writing = spawn_blocking(move || intake.run(ChunkReader::new(queue)));
    // The thread may stop while the stream is silent.
    let watch = chunks.clone();
    let end = tokio::select! {
        end = read_chunks(reader, chunks, pace) => end,
        () = watch.closed() => Ok(()),
    };
    drop(watch);
    let outcome = writing.await.map_err(ReceiveError::Thread)?;
    match (outcome, end) {
        // The thread knows best, unless all that it saw was our stopping.
        (Err(ReceiveError::Truncated { .. }), Err(frame::Error::Io(source))) => {
            Err(ReceiveError::Stream { peer, source })
        }
        (Err(ReceiveError::Truncated { .. }), Err(frame::Error::TooLong { .. })) => {
            Err(ReceiveError::Malformed { peer })
        }
        (outcome, _) => outcome,
    }
}

/// The blobs of `ids` that `store` lacks, each once, in their order.
pub fn missing(store: &BlobStore, ids: impl IntoIterator<Item = BlobId>) -> Vec<BlobId> {
    let mut seen = std::collections::BTreeSet::new();
    ids.into_iter().filter(|id| seen.insert(*id) && !store.has(id)).collect()
}

/// Writes what is asked for, a list of any length up to [`ASKS_MAX`]: their number, and of
/// each the id, the number of its ranges and these, numbers of 4 and 8 bytes big-endian.
pub async fn write_asks(writer: &mut (impl AsyncWrite + Unpin), asks: &[Ask]) -> io::Result<()> {
    let too_long = || io::Error::other(format!("{} blobs in one list", asks.len()));
    let count = u32::try_from(asks.len()).map_err(|_| too_long())?;
    if asks.len() > ASKS_MAX || asks.iter().any(|ask| ask.ranges.len() > RANGES_MAX) {
        return Err(too_long());
    }
    let mut bytes = Vec::with_capacity(4 + asks.len() * 36);
    bytes.extend_from_slice(&count.to_be_bytes());
    for ask in asks {
        bytes.extend_from_slice(&ask.id.0);
        bytes.extend_from_slice(&(ask.ranges.len() as u32).to_be_bytes());
        for (start, end) in &ask.ranges {
            bytes.extend_from_slice(&start.to_be_bytes());
            bytes.extend_from_slice(&end.to_be_bytes());
        }
    }
    writer.write_all(&bytes).await
}

/// Reads a list of at most `count_max` asks. Memory grows with what arrives, not with
/// what is claimed.
pub async fn read_asks(
    reader: &mut (impl AsyncRead + Unpin),
    count_max: usize,
) -> Result<Vec<Ask>, frame::Error> {
    let count = frame::read_length(reader).await?.ok_or(frame::Error::Closed)?;
    let (got, max) = (usize::try_from(count).unwrap_or(usize::MAX), count_max.min(ASKS_MAX));
    if got > max {
        return Err(frame::Error::TooLong { got, max });
    }
    let mut asks = Vec::new();
    let mut ranges_left = RANGES_IN_ALL_MAX;
    for _ in 0..got {
        let mut id = [0; 32];
        reader.read_exact(&mut id).await.map_err(frame::truncated_or)?;
        let count = reader.read_u32().await.map_err(frame::truncated_or)?;
        let got = usize::try_from(count).unwrap_or(usize::MAX);
        let max = RANGES_MAX.min(ranges_left);
        if got > max {
            return Err(frame::Error::TooLong { got, max });
        }
        ranges_left -= got;
        let mut ranges = Vec::new();
        let mut last = 0;
        for _ in 0..got {
            let start = reader.read_u64().await.map_err(frame::truncated_or)?;
            let end = reader.read_u64().await.map_err(frame::truncated_or)?;
            if start < last || end <= start {
                return Err(frame::Error::Disorder);
            }
            last = end;
            ranges.push((start, end));
        }
        asks.push(Ask { id: BlobId(id), ranges });
    }
    Ok(asks)
}

/// A chunk with its length before it, and how many bytes of content it stands for.
struct Chunk {
    bytes: Bytes,
    content_bytes: u64,
}

/// Cuts what the reading thread has into chunks.
struct ChunkWriter {
    queue: mpsc::Sender<Chunk>,
    buffer: BytesMut,
    content_bytes: u64,
}

/// The stream's task has stopped; it knows why.
struct Stopped;

const LENGTH_BYTES: usize = 4;
/// In a length: so many zeros, which do not follow.
const ZEROS_FLAG: u32 = 1 << 31;
/// Fewer zeros travel as they are.
const ZEROS_MIN: usize = 16 << 10;
static ZEROS: [u8; CHUNK_BYTES_MAX] = [0; CHUNK_BYTES_MAX];

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

impl ChunkWriter {
    fn new(queue: mpsc::Sender<Chunk>) -> Self {
        Self { queue, buffer: empty_chunk(), content_bytes: 0 }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Stopped> {
        if bytes.len() >= ZEROS_MIN && is_zero(bytes) {
            return self.zeros(bytes.len());
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.room()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Content: as [`Self::write`], and counted.
    fn content(&mut self, bytes: &[u8]) -> Result<(), Stopped> {
        self.content_bytes += bytes.len() as u64;
        self.write(bytes)
    }

    /// Reads up to `max` bytes of content straight into the chunk; `None` at the end of
    /// `reader`.
    fn read_from(
        &mut self,
        reader: &mut dyn Read,
        max: u64,
    ) -> io::Result<Result<Option<u64>, Stopped>> {
        let start = self.buffer.len();
        let wanted = self.room().min(usize::try_from(max).unwrap_or(usize::MAX));
        self.buffer.resize(start + wanted, 0);
        let mut reader = reader;
        let read = read_some(&mut reader, &mut self.buffer[start..])?;
        self.buffer.truncate(start + read);
        self.content_bytes += read as u64;
        let done = if read >= ZEROS_MIN && is_zero(&self.buffer[start..]) {
            self.buffer.truncate(start);
            self.zeros(read)
        } else {
            self.flush_if_full()
        };
        Ok(done.map(|()| (read > 0).then_some(read as u64)))
    }

    fn zeros(&mut self, count: usize) -> Result<(), Stopped> {
        let counted = std::mem::take(&mut self.content_bytes);
        self.flush()?;
        self.content_bytes = counted;
        let mut left = count;
        while left > 0 {
            let now = left.min(CHUNK_BYTES_MAX);
            let length = (now as u32) | ZEROS_FLAG;
            let bytes = Bytes::copy_from_slice(&length.to_be_bytes());
            let content_bytes = std::mem::take(&mut self.content_bytes);
            self.queue.blocking_send(Chunk { bytes, content_bytes }).map_err(|_| Stopped)?;
            left -= now;
        }
        Ok(())
    }

    fn room(&self) -> usize {
        LENGTH_BYTES + CHUNK_BYTES_MAX - self.buffer.len()
    }

    fn flush_if_full(&mut self) -> Result<(), Stopped> {
        if self.room() == 0 { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Stopped> {
        let length = self.buffer.len() - LENGTH_BYTES;
        if length == 0 {
            return Ok(());
        }
        let mut buffer = std::mem::replace(&mut self.buffer, empty_chunk());
        buffer[..LENGTH_BYTES].copy_from_slice(&(length as u32).to_be_bytes());
        let content_bytes = std::mem::take(&mut self.content_bytes);
        let chunk = Chunk { bytes: buffer.freeze(), content_bytes };
        self.queue.blocking_send(chunk).map_err(|_| Stopped)
    }
}

fn empty_chunk() -> BytesMut {
    let mut buffer = BytesMut::with_capacity(LENGTH_BYTES + CHUNK_BYTES_MAX);
    buffer.resize(LENGTH_BYTES, 0);
    buffer
}

/// The reading thread's work.
fn read_out(source: &dyn Source, asks: &[Ask], mut chunks: ChunkWriter) -> Result<Sent, SendError> {
    let mut sent = Sent::default();
    for ask in asks {
        match one_blob(source, ask, &mut chunks) {
            Ok(Ok(Some(bytes))) => {
                sent.blobs += 1;
                sent.bytes += bytes;
            }
            Ok(Ok(None)) => sent.absent += 1,
            // Whoever reads the other end of the queue knows why it stopped.
            Ok(Err(Stopped)) => return Ok(sent),
            Err(source) => return Err(SendError::Source { id: ask.id, source }),
        }
    }
    // Whoever stopped knows why; see above.
    let _: Result<(), Stopped> = chunks.flush();
    Ok(sent)
}

fn one_blob(
    source: &dyn Source,
    ask: &Ask,
    chunks: &mut ChunkWriter,
) -> io::Result<Result<Option<u64>, Stopped>> {
    let head = |tag: u8, size: u64| [&[tag][..], &ask.id.0, &size.to_be_bytes()].concat();
    match source.open(&ask.id)? {
        None => Ok(chunks.write(&[&[ABSENT][..], &ask.id.0].concat()).map(|()| None)),
        Some(OpenBlob::Content { size, mut content }) => {
            if let Err(Stopped) = chunks.write(&head(WHOLE, size)) {
                return Ok(Err(Stopped));
            }
            let mut left = size;
            while left > 0 {
                match chunks.read_from(&mut *content, left)? {
                    Ok(Some(read)) => left -= read,
                    Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(Stopped) => return Ok(Err(Stopped)),
                }
            }
            Ok(Ok(Some(size)))
        }
        Some(OpenBlob::Verifiable { store, blob }) => {
            if let Err(Stopped) = chunks.write(&head(PROVED, blob.size)) {
                return Ok(Err(Stopped));
            }
            let ranges = ask.of(blob.size);
            let mut writer = ProvedWriter { chunks, stopped: false };
            let encoded = store.encode(&blob, &ranges, &mut writer);
            match (writer.stopped, encoded) {
                (true, _) => Ok(Err(Stopped)),
                (false, Ok(())) => Ok(Ok(Some(ranges.byte_count(blob.size)))),
                (false, Err(error)) => Err(io::Error::other(error)),
            }
        }
    }
}

/// Takes what `verified` encodes: pairs of hashes and groups of content.
struct ProvedWriter<'a> {
    chunks: &'a mut ChunkWriter,
    stopped: bool,
}

impl Write for ProvedWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        const PAIR_BYTES: usize = 64;
        let written = match bytes.len() {
            PAIR_BYTES => self.chunks.write(bytes),
            _ => self.chunks.content(bytes),
        };
        if let Err(Stopped) = written {
            self.stopped = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands chunks to the writing thread until the last, or until the thread stops.
async fn read_chunks(
    reader: &mut (impl AsyncRead + Unpin),
    chunks: mpsc::Sender<Option<Bytes>>,
    pace: &Pace,
) -> Result<(), frame::Error> {
    loop {
        let length = frame::read_length(reader).await?.ok_or(frame::Error::Truncated)?;
        let is_zeros = length & ZEROS_FLAG != 0;
        let got = usize::try_from(length & !ZEROS_FLAG).unwrap_or(usize::MAX);
        if got > CHUNK_BYTES_MAX {
            return Err(frame::Error::TooLong { got, max: CHUNK_BYTES_MAX });
        }
        if length == 0 {
            // Where the thread has stopped, it says why.
            let _: Result<(), _> = chunks.send(None).await;
            return Ok(());
        }
        let chunk = if is_zeros {
            Bytes::from_static(&ZEROS[..got])
        } else {
            pace.take(u64::from(length)).await;
            let mut buffer = BytesMut::with_capacity(got);
            while buffer.len() < got {
                let left = (got - buffer.len()) as u64;
                let read = (&mut *reader).take(left).read_buf(&mut buffer).await;
                if read.map_err(frame::Error::Io)? == 0 {
                    return Err(frame::Error::Truncated);
                }
            }
            buffer.freeze()
        };
        if chunks.send(Some(chunk)).await.is_err() {
            return Ok(());
        }
    }
}

/// What the writing thread reads from: chunks, then their proper end. An end of the
/// queue without that is an error.
struct ChunkReader {
    queue: mpsc::Receiver<Option<Bytes>>,
    current: Bytes,
    ended: bool,
}

impl ChunkReader {
    fn new(queue: mpsc::Receiver<Option<Bytes>>) -> Self {
        Self { queue, current: Bytes::new(), ended: false }
    }

    /// At least one byte, or none at the proper end.
    fn next(&mut self) -> Result<&mut Bytes, Truncated> {
        while self.current.is_empty() && !self.ended {
            match self.queue.blocking_recv() {
                Some(Some(chunk)) => self.current = chunk,
                Some(None) => self.ended = true,
                None => return Err(Truncated),
            }
        }
        Ok(&mut self.current)
    }

    fn exact<const N: usize>(&mut self) -> Result<[u8; N], Truncated> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes).map_err(|_| Truncated)?;
        Ok(bytes)
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let chunk =
            self.next().map_err(|Truncated| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let now = buffer.len().min(chunk.len());
        chunk.copy_to_slice(&mut buffer[..now]);
        Ok(now)
    }
}

struct Truncated;

/// The writing thread's work.
struct Intake<F> {
    store: BlobStore,
    /// `None` where anything may come.
    wanted: Option<BTreeMap<BlobId, Wanted>>,
    peer: PeerId,
    on_bytes: F,
}

impl<F: FnMut(u64)> Intake<F> {
    fn run(mut self, mut chunks: ChunkReader) -> Result<Received, ReceiveError> {
        let peer = self.peer;
        let truncated = |Truncated| ReceiveError::Truncated { peer };
        let mut received = Received::default();
        while !chunks.next().map_err(truncated)?.is_empty() {
            let [tag] = chunks.exact().map_err(truncated)?;
            if !matches!(tag, ABSENT | WHOLE | PROVED) {
                return Err(ReceiveError::Malformed { peer });
            }
            let id = BlobId(chunks.exact().map_err(truncated)?);
            let wanted = match &mut self.wanted {
                Some(wanted) => wanted.remove(&id).ok_or(ReceiveError::Unexpected { id, peer })?,
                None => Wanted::whole(id, u64::MAX),
            };
            if tag == ABSENT {
                received.absent.push(id);
                continue;
            }
            let size = u64::from_be_bytes(chunks.exact().map_err(truncated)?);
            // Of what travels in ranges, the size is known.
            if size > wanted.bytes_max || (wanted.is_large() && size != wanted.bytes_max) {
                let max = wanted.bytes_max;
                return Err(ReceiveError::TooLarge { id, peer, size, max });
            }
            received.bytes += match tag {
                WHOLE => self.whole(id, size, &mut chunks)?,
                _ => self.proved(id, size, &wanted.ask.of(size), &mut chunks)?,
            };
            received.blobs += 1;
        }
        // What was wanted and not even named as absent never came.
        match &self.wanted {
            Some(wanted) if !wanted.is_empty() => Err(ReceiveError::Truncated { peer }),
            Some(_) | None => Ok(received),
        }
    }

    fn whole(
        &mut self,
        id: BlobId,
        size: u64,
        chunks: &mut ChunkReader,
    ) -> Result<u64, ReceiveError> {
        let peer = self.peer;
        let counted = Counted { reader: chunks, on_bytes: &mut self.on_bytes };
        match self.store.put_expected(&id, counted, size) {
            Ok(()) => Ok(size),
            Err(store::Error::OtherContent { .. }) => Err(ReceiveError::WrongContent { id, peer }),
            // The only thing that is read is what comes from there.
            Err(store::Error::Io { source, .. })
                if source.kind() == io::ErrorKind::UnexpectedEof =>
            {
                Err(ReceiveError::Truncated { peer })
            }
            Err(source) => Err(ReceiveError::Store { id, source }),
        }
    }

    fn proved(
        &mut self,
        id: BlobId,
        size: u64,
        ranges: &Ranges,
        chunks: &mut ChunkReader,
    ) -> Result<u64, ReceiveError> {
        let peer = self.peer;
        let store = |source| ReceiveError::Store { id, source };
        let partial = self.store.partial(&id, size).map_err(store)?;
        let mut failed = None;
        let decoded = verified::decode(&id, size, ranges, chunks, |part| {
            let bytes = part.content_bytes();
            partial.add(part).inspect_err(|e| failed = Some(e.kind()))?;
            (self.on_bytes)(bytes);
            Ok(())
        });
        match decoded {
            Ok(()) => {}
            Err(DecodeError::Corrupt) => return Err(ReceiveError::WrongContent { id, peer }),
            Err(DecodeError::Io(e)) if failed.is_some() => {
                if matches!(failed, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
                {
                    self.store.give_up(&partial).map_err(store)?;
                }
                return Err(store(partial.write_failed(e)));
            }
            Err(DecodeError::Io(_)) => return Err(ReceiveError::Truncated { peer }),
        }
        self.store.finish(&partial).map_err(store)?;
        Ok(ranges.byte_count(size))
    }
}

/// Tells how much is read through it.
struct Counted<'a, R, F> {
    reader: &'a mut R,
    on_bytes: &'a mut F,
}

impl<R: Read, F: FnMut(u64)> Read for Counted<'_, R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        (self.on_bytes)(read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicU64, Ordering},
    };

    use p2pit_protocol::identity::KeyPair;
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    #[tokio::test]
    async fn blobs_of_every_size_arrive_and_the_stream_goes_on() {
        let (from, to) = (Side::new(), Side::new());
        let contents: Vec<Vec<u8>> = [0, 1, 41, CHUNK_BYTES_MAX - 41, CHUNK_BYTES_MAX, 1 << 20]
            .into_iter()
            .map(|size| (0..size).map(|i| (i % 253) as u8).collect())
            .collect();
        let wanted: Vec<Wanted> = contents.iter().map(|content| from.put(content)).collect();
        let ids: Vec<BlobId> = wanted.iter().map(|wanted| wanted.ask.id).collect();
        assert_eq!(missing(&to.store, ids.iter().chain(&ids).copied()), ids);

        let (mut ours, mut theirs) = duplex(1000);
        let progress = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&progress);
        let on_bytes = move |bytes| {
            counted.fetch_add(bytes, Ordering::Relaxed);
        };
        let mut told = 0;
        let sending = async {
            let source = Arc::new(from.store.clone());
            let asks = wholes(ids.clone());
            let sent = send_blobs(source, asks, &mut ours, &NO_LIMIT, |n| told += n).await;
            ours.write_all(b"more").await.unwrap();
            sent
        };
        let receiving = async {
            let received =
                receive_blobs(&to.store, &wanted, peer(), &mut theirs, &NO_LIMIT, on_bytes)
                    .await
                    .unwrap();
            let mut more = [0; 4];
            theirs.read_exact(&mut more).await.unwrap();
            assert_eq!(&more, b"more");
            received
        };
        let (sent, received) = tokio::join!(sending, receiving);
        let total = contents.iter().map(|content| content.len() as u64).sum();
        assert_eq!(sent.unwrap(), Sent { blobs: 6, bytes: total, absent: 0 });
        assert_eq!(received, Received { blobs: 6, bytes: total, absent: vec![] });
        assert_eq!((told, progress.load(Ordering::Relaxed)), (total, total));
        for (wanted, content) in wanted.iter().zip(contents) {
            assert_eq!(to.store.read(&wanted.ask.id, 1 << 20).unwrap(), content);
        }
        assert!(missing(&to.store, ids).is_empty());
    }

    #[tokio::test]
    async fn thousands_of_small_blobs_travel_without_answers() {
        let (from, to) = (Side::new(), Side::new());
        let wanted: Vec<Wanted> = (0..2_000_u32).map(|i| from.put(&i.to_le_bytes())).collect();
        let received = transfer(&from, &to, &wanted).await.1.unwrap();
        assert_eq!((received.blobs, received.bytes), (2_000, 8_000));
    }

    #[tokio::test]
    async fn what_the_sender_lacks_is_named_and_the_rest_arrives() {
        let (from, to) = (Side::new(), Side::new());
        let here = from.put(b"here");
        let gone = Wanted::whole(BlobId::of(b"gone"), 9);
        let (sent, received) = transfer(&from, &to, &[gone.clone(), here.clone()]).await;
        assert_eq!(sent.unwrap().absent, 1);
        assert_eq!(received.unwrap().absent, [gone.ask.id]);
        assert!(to.store.has(&here.ask.id));
    }

    #[tokio::test]
    async fn wrong_content_is_blamed_on_the_blob_and_its_peer_and_not_kept() {
        let (from, to) = (Side::new(), Side::new());
        let (good, bad) = (from.put(b"good"), from.put(b"right"));
        struct Liar(BlobStore, BlobId);
        impl Source for Liar {
            fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>> {
                if *id == self.1 {
                    let content = Box::new(&b"wrong"[..]);
                    return Ok(Some(OpenBlob::Content { size: 5, content }));
                }
                self.0.open(id)
            }
        }
        let liar = Liar(from.store.clone(), bad.ask.id);
        let wanted = [good.clone(), bad.clone()];
        let (_, received) = transfer_from(Arc::new(liar), &to, &wanted).await;
        assert!(matches!(received, Err(ReceiveError::WrongContent { id, peer: from })
                if id == bad.ask.id && from == peer()));
        assert!(to.store.has(&good.ask.id));
        assert!(!to.store.has(&bad.ask.id) && !to.store.has(&BlobId::of(b"wrong")));
        assert_eq!(fs::read_dir(to.dir.path().join("blobs/tmp")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_was_not_asked_for_or_is_too_large_is_refused_at_its_header() {
        let (from, to) = (Side::new(), Side::new());
        let (asked, unasked) = (from.put(b"asked"), from.put(b"unasked"));
        let (mut ours, mut theirs) = duplex(1 << 20);
        let source = Arc::new(from.store.clone());
        let asks = wholes(vec![unasked.ask.id]);
        send_blobs(source, asks, &mut ours, &NO_LIMIT, |_| {}).await.unwrap();
        let received = receive(&to, std::slice::from_ref(&asked), &mut theirs).await;
        assert!(
            matches!(received, Err(ReceiveError::Unexpected { id, .. }) if id == unasked.ask.id)
        );

        let less = Wanted { bytes_max: 4, ..asked.clone() };
        let (_, received) = transfer(&from, &to, &[less]).await;
        assert!(matches!(received, Err(ReceiveError::TooLarge { size: 5, max: 4, .. })));
        assert!(!to.store.has(&asked.ask.id));
    }

    #[tokio::test]
    async fn a_stream_cut_anywhere_is_an_error_and_leaves_no_half_blob() {
        let (from, to) = (Side::new(), Side::new());
        let wanted = [from.put(b"first"), from.put(b"second")];
        let mut whole = Vec::new();
        let asks = wanted.iter().map(|wanted| wanted.ask.clone()).collect();
        let source = Arc::new(from.store.clone());
        send_blobs(source, asks, &mut whole, &NO_LIMIT, |_| {}).await.unwrap();
        for cut in 0..whole.len() {
            let received = receive(&to, &wanted, &mut &whole[..cut]).await;
            assert!(matches!(received, Err(ReceiveError::Truncated { .. })), "{cut}");
        }
        assert_eq!(fs::read_dir(to.dir.path().join("blobs/tmp")).unwrap().count(), 0);
        let end_only = [0; 4];
        let received = receive(&to, &wanted, &mut &end_only[..]).await;
        assert!(matches!(received, Err(ReceiveError::Truncated { .. })));
    }

    #[tokio::test]
    async fn garbage_is_refused() {
        let to = Side::new();
        let wanted = [Wanted::whole(BlobId([7; 32]), u64::MAX)];
        for (bytes, malformed) in [
            (&[0xff; 64][..], true),
            (&[0, 0, 0, 1, 9, 0, 0, 0, 0][..], true),
            (&[0, 0, 0, 1, 1, 0, 0, 0, 0][..], false),
        ] {
            let received = receive(&to, &wanted, &mut &bytes[..]).await;
            let is_malformed = matches!(received, Err(ReceiveError::Malformed { .. }));
            assert_eq!(is_malformed, malformed, "{received:?}");
        }
    }

    #[tokio::test]
    async fn a_silent_stream_does_not_hold_back_a_failure() {
        let to = Side::new();
        let (mut ours, mut theirs) = duplex(1000);
        ours.write_all(&[0, 0, 0, 1, 9]).await.unwrap();
        let received = receive(&to, &[], &mut theirs).await;
        assert!(matches!(received, Err(ReceiveError::Malformed { .. })));
        drop(ours);
    }

    #[tokio::test]
    async fn a_source_that_fails_names_the_blob_and_the_receiver_sees_an_early_end() {
        struct Short;
        impl Source for Short {
            fn open(&self, _: &BlobId) -> io::Result<Option<OpenBlob>> {
                Ok(Some(OpenBlob::Content { size: 9, content: Box::new(&b"four"[..]) }))
            }
        }
        let to = Side::new();
        let wanted = Wanted::whole(BlobId([1; 32]), 9);
        let mut stream = Vec::new();
        let asks = vec![wanted.ask.clone()];
        let sent = send_blobs(Arc::new(Short), asks, &mut stream, &NO_LIMIT, |_| {}).await;
        assert!(matches!(sent, Err(SendError::Source { id, .. }) if id == wanted.ask.id));
        let received = receive(&to, &[wanted], &mut &stream[..]).await;
        assert!(matches!(received, Err(ReceiveError::Truncated { .. })));
    }

    #[tokio::test]
    async fn lists_of_asks_come_back_within_their_bounds() {
        let asks: Vec<Ask> = (0..100_u8)
            .map(|i| Ask {
                id: BlobId([i; 32]),
                ranges: vec![(u64::from(i), 200); usize::from(i % 2)],
            })
            .collect();
        let mut stream = Vec::new();
        write_asks(&mut stream, &asks).await.unwrap();
        assert_eq!(read_asks(&mut &stream[..], 100).await.unwrap(), asks);
        let result = read_asks(&mut &stream[..], 99).await;
        assert!(matches!(result, Err(frame::Error::TooLong { .. })));
        let result = read_asks(&mut &stream[..stream.len() - 1], 100).await;
        assert!(matches!(result, Err(frame::Error::Truncated)));
        assert!(matches!(read_asks(&mut &[][..], 100).await, Err(frame::Error::Closed)));
        let many = Ask { id: BlobId([1; 32]), ranges: vec![(0, 1); RANGES_MAX + 1] };
        assert!(write_asks(&mut Vec::new(), &[many]).await.is_err());
        for ranges in [vec![(1, 1)], vec![(2, 1)], vec![(0, 5), (4, 9)]] {
            let mut stream = Vec::new();
            write_asks(&mut stream, &[Ask { id: BlobId([1; 32]), ranges }]).await.unwrap();
            assert!(matches!(read_asks(&mut &stream[..], 1).await, Err(frame::Error::Disorder)));
        }
    }

    #[tokio::test]
    async fn a_long_blob_goes_on_where_it_was_cut() {
        let (from, to) = (Side::new(), Side::new());
        let content = numbers(7 * GROUP_BYTES as usize + 11);
        let wanted = from.put(&content);
        let size = content.len() as u64;
        let mut whole = Vec::new();
        let asks = vec![wanted.ask.clone()];
        let source: Arc<dyn Source> = Arc::new(from.store.clone());
        send_blobs(Arc::clone(&source), asks, &mut whole, &NO_LIMIT, |_| {}).await.unwrap();
        let received =
            receive(&to, std::slice::from_ref(&wanted), &mut &whole[..whole.len() / 2]).await;
        assert!(matches!(received, Err(ReceiveError::Truncated { .. })), "{received:?}");

        let rest = Wanted::missing(&to.store, wanted.ask.id, size).unwrap().unwrap();
        assert!(rest.bytes() < size && rest.bytes() >= size / 2, "{}", rest.bytes());
        // In parts, and the last part first.
        let (bytes, mut parts, mut left) = (rest.bytes(), Vec::new(), Some(rest));
        while let Some(rest) = left {
            let (part, after) = rest.split(2 * GROUP_BYTES);
            parts.push(part);
            left = after;
        }
        assert!(parts.len() > 1);
        assert_eq!(parts.iter().map(Wanted::bytes).sum::<u64>(), bytes);
        parts.reverse();
        for part in parts {
            assert!(part.clone().still_missing(&to.store).unwrap().is_some());
            let (sent, received) = transfer(&from, &to, std::slice::from_ref(&part)).await;
            assert_eq!(sent.unwrap().bytes, part.bytes());
            assert_eq!(received.unwrap().bytes, part.bytes());
            assert!(part.still_missing(&to.store).unwrap().is_none());
        }
        assert!(Wanted::missing(&to.store, wanted.ask.id, size).unwrap().is_none());
        assert_eq!(to.store.read(&wanted.ask.id, content.len()).unwrap(), content);
        // What it received it can give on.
        let third = Side::new();
        let (_, received) = transfer(&to, &third, &[wanted]).await;
        assert_eq!(received.unwrap().bytes, size);
    }

    #[tokio::test]
    async fn zeros_do_not_travel() {
        let (from, to) = (Side::new(), Side::new());
        let mut content = vec![0; 40 * GROUP_BYTES as usize];
        content[5 * GROUP_BYTES as usize] = 1;
        let wanted = from.put(&content);
        let mut stream = Vec::new();
        let source: Arc<dyn Source> = Arc::new(from.store.clone());
        let mut told = 0;
        let asks = vec![wanted.ask.clone()];
        send_blobs(source, asks, &mut stream, &NO_LIMIT, |n| told += n).await.unwrap();
        assert!(stream.len() < 2 * GROUP_BYTES as usize, "{}", stream.len());
        assert_eq!(told, content.len() as u64);
        receive(&to, std::slice::from_ref(&wanted), &mut &stream[..]).await.unwrap();
        assert_eq!(to.store.read(&wanted.ask.id, content.len()).unwrap(), content);
        struct Zeros;
        impl Source for Zeros {
            fn open(&self, _: &BlobId) -> io::Result<Option<OpenBlob>> {
                let content = Box::new(io::repeat(0).take(1 << 20));
                Ok(Some(OpenBlob::Content { size: 1 << 20, content }))
            }
        }
        let zeros = Wanted::whole(BlobId::of(&vec![0; 1 << 20]), 1 << 20);
        let (_, received) = transfer_from(Arc::new(Zeros), &to, &[zeros]).await;
        assert_eq!(received.unwrap().bytes, 1 << 20);
    }

    #[tokio::test]
    async fn a_blob_that_went_bad_is_not_sent_and_named_absent_from_then_on() {
        let (from, to) = (Side::new(), Side::new());
        let (short, long) = (from.put(b"short"), from.put(&numbers(3 * GROUP_BYTES as usize)));
        for wanted in [&short, &long] {
            let file = fs::File::options().write(true).open(from.store.path_of(&wanted.ask.id));
            file.unwrap().write_all(b"bad").unwrap();
        }
        let (sent, received) = transfer(&from, &to, std::slice::from_ref(&short)).await;
        assert_eq!((sent.unwrap().absent, received.unwrap().absent), (1, vec![short.ask.id]));
        let (sent, received) = transfer(&from, &to, std::slice::from_ref(&long)).await;
        assert!(matches!(sent, Err(SendError::Source { id, .. }) if id == long.ask.id));
        assert!(matches!(received, Err(ReceiveError::Truncated { .. })));
        let (_, received) = transfer(&from, &to, std::slice::from_ref(&long)).await;
        assert_eq!(received.unwrap().absent, [long.ask.id]);
    }

    static NO_LIMIT: Pace = Pace::unlimited();

    fn numbers(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i % 251) as u8).collect()
    }

    fn wholes(ids: Vec<BlobId>) -> Vec<Ask> {
        ids.into_iter().map(Ask::whole).collect()
    }

    async fn receive(
        to: &Side,
        wanted: &[Wanted],
        reader: &mut (impl AsyncRead + Unpin),
    ) -> Result<Received, ReceiveError> {
        receive_blobs(&to.store, wanted, peer(), reader, &NO_LIMIT, |_| {}).await
    }

    struct Side {
        dir: tempfile::TempDir,
        store: BlobStore,
    }

    impl Side {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = BlobStore::open(&dir.path().join("blobs")).unwrap();
            Self { dir, store }
        }

        fn put(&self, content: &[u8]) -> Wanted {
            let id = self.store.put_bytes(content).unwrap();
            Wanted::whole(id, content.len() as u64)
        }
    }

    async fn transfer(
        from: &Side,
        to: &Side,
        wanted: &[Wanted],
    ) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
        transfer_from(Arc::new(from.store.clone()), to, wanted).await
    }

    async fn transfer_from(
        source: Arc<dyn Source>,
        to: &Side,
        wanted: &[Wanted],
    ) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
        let (ours, mut theirs): (DuplexStream, DuplexStream) = duplex(1 << 16);
        let asks = wanted.iter().map(|wanted| wanted.ask.clone()).collect();
        let sending = async move {
            let mut ours = ours;
            send_blobs(source, asks, &mut ours, &NO_LIMIT, |_| {}).await
        };
        let receiving = async {
            let received = receive(to, wanted, &mut theirs).await;
            drop(theirs);
            received
        };
        tokio::join!(sending, receiving)
    }

    fn peer() -> PeerId {
        PeerId(KeyPair::from_seed(&[1; 32]).public())
    }
}
