//! Blobs over a stream.
//!
//! Who wants what is settled before, by messages of the callers. Then one side calls
//! [`send_blobs`] and the other [`receive_blobs`]. Blobs follow one another without
//! answers in between, each as
//!
//! ```text
//! 1, id (32 bytes), size (8 bytes, big-endian), content      or
//! 0, id                                                      the sender lacks it
//! ```
//!
//! and this sequence is cut into chunks of any length up to [`CHUNK_BYTES_MAX`], each
//! behind its length (4 bytes, big-endian); a chunk of length 0 ends it. So the stream
//! can be used for more afterwards, and an end that comes too early is noticed.
//!
//! Content is hashed as it arrives and stored under its own hash or not at all. Files
//! are read and written on a blocking thread, which hands chunks to the stream's task
//! over a short queue; a queue's length is all the memory that a transfer takes.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    sync::Arc,
};

use bytes::{Buf, Bytes, BytesMut};
use p2pit_protocol::{BlobId, PeerId};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::{JoinError, spawn_blocking},
};

use super::{
    frame,
    store::{self, BUFFER_BYTES, BlobStore, read_some},
};

/// Bytes in one chunk.
pub const CHUNK_BYTES_MAX: usize = BUFFER_BYTES;
/// Ids in one list of [`write_ids`]; as many as a tree has entries, and its manifest.
pub const IDS_MAX: usize = super::tree::ENTRIES_MAX + 1;
/// Chunks between the disk and the stream: enough that neither waits for the other's
/// every step.
const QUEUE_CHUNKS: usize = 8;

const ABSENT: u8 = 0;
const PRESENT: u8 = 1;

/// Where blobs to be sent are read from.
pub trait Source: Send + Sync + 'static {
    /// `None` where this source does not have the blob.
    fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>>;
}

/// A blob being read: exactly `size` bytes come from `content`.
pub struct OpenBlob {
    pub size: u64,
    pub content: Box<dyn Read + Send>,
}

impl std::fmt::Debug for OpenBlob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenBlob").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Source for BlobStore {
    fn open(&self, id: &BlobId) -> io::Result<Option<OpenBlob>> {
        match self.open_blob(id) {
            Ok(file) => {
                let size = file.metadata()?.len();
                Ok(Some(OpenBlob { size, content: Box::new(file) }))
            }
            Err(store::Error::Missing(_)) => Ok(None),
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

/// Sends the blobs in the order of `ids`. `on_bytes` is told how much content has been
/// handed to the stream since it was last told. After an error the stream is in the
/// middle of something: drop it, or the receiver waits.
pub async fn send_blobs(
    source: Arc<dyn Source>,
    ids: Vec<BlobId>,
    writer: &mut (impl AsyncWrite + Unpin),
    mut on_bytes: impl FnMut(u64),
) -> Result<Sent, SendError> {
    let (queue, mut chunks) = mpsc::channel(QUEUE_CHUNKS);
    let reading = spawn_blocking(move || read_out(&*source, &ids, ChunkWriter::new(queue)));
    let mut broken = None;
    while let Some(Chunk { bytes, content_bytes }) = chunks.recv().await {
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub id: BlobId,
    /// A blob that says it is longer is refused before any of it is kept.
    pub bytes_max: u64,
}

/// What arrived.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Received {
    pub blobs: u64,
    pub bytes: u64,
    /// The blobs that the sender does not have.
    pub absent: Vec<BlobId>,
}

/// Why receiving stopped. The blobs that were complete are in the store; of the one that
/// was not, nothing is.
#[derive(Debug, Error)]
pub enum ReceiveError {
    #[error("blob {id} from {peer} has the wrong content")]
    WrongContent { id: BlobId, peer: PeerId },
    #[error("blob {id} from {peer} was not asked for")]
    Unexpected { id: BlobId, peer: PeerId },
    #[error("blob {id} from {peer} has {size} bytes where at most {max} are expected")]
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

/// Receives into `store` what `peer` sends, which must be among `wanted`. `on_bytes` is
/// told how much content has arrived since it was last told. Blobs are in the store when
/// this returns, and survive a power loss only after [`BlobStore::persist`].
pub async fn receive_blobs(
    store: &BlobStore,
    wanted: &[Wanted],
    peer: PeerId,
    reader: &mut (impl AsyncRead + Unpin),
    on_bytes: impl FnMut(u64) + Send + 'static,
) -> Result<Received, ReceiveError> {
    let wanted = wanted.iter().map(|wanted| (wanted.id, wanted.bytes_max)).collect();
    let intake = Intake { store: store.clone(), wanted: Some(wanted), peer, on_bytes };
    take_in(intake, reader).await
}

/// As [`receive_blobs`], for whatever is sent: from a user of this machine, who owns the
/// store. What says it is some blob must still be that blob.
pub async fn receive_any(
    store: &BlobStore,
    me: PeerId,
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Received, ReceiveError> {
    let intake = Intake { store: store.clone(), wanted: None, peer: me, on_bytes: |_| {} };
    take_in(intake, reader).await
}

async fn take_in(
    intake: Intake<impl FnMut(u64) + Send + 'static>,
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Received, ReceiveError> {
    let peer = intake.peer;
    let (chunks, queue) = mpsc::channel(QUEUE_CHUNKS);
    let writing = spawn_blocking(move || intake.run(ChunkReader::new(queue)));
    // The thread may stop while the stream is silent.
    let watch = chunks.clone();
    let end = tokio::select! {
        end = read_chunks(reader, chunks) => end,
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

/// Writes a list of ids of any length up to [`IDS_MAX`], for asking or offering.
pub async fn write_ids(writer: &mut (impl AsyncWrite + Unpin), ids: &[BlobId]) -> io::Result<()> {
    if ids.len() > IDS_MAX {
        return Err(io::Error::other(format!("{} blobs in one list", ids.len())));
    }
    let mut bytes = Vec::with_capacity(4 + ids.len() * 32);
    // Fits: see the bound above.
    bytes.extend_from_slice(&(ids.len() as u32).to_be_bytes());
    ids.iter().for_each(|id| bytes.extend_from_slice(&id.0));
    writer.write_all(&bytes).await
}

/// Reads a list of at most `count_max` ids. Memory grows with what arrives, not with
/// what is claimed.
pub async fn read_ids(
    reader: &mut (impl AsyncRead + Unpin),
    count_max: usize,
) -> Result<Vec<BlobId>, frame::Error> {
    let count = frame::read_length(reader).await?.ok_or(frame::Error::Closed)?;
    let (got, max) = (usize::try_from(count).unwrap_or(usize::MAX), count_max.min(IDS_MAX));
    if got > max {
        return Err(frame::Error::TooLong { got: got.saturating_mul(32), max: max * 32 });
    }
    let mut ids = Vec::new();
    for _ in 0..got {
        let mut id = [0; 32];
        reader.read_exact(&mut id).await.map_err(frame::truncated_or)?;
        ids.push(BlobId(id));
    }
    Ok(ids)
}

/// A chunk with its length before it, and how many bytes of it are content.
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

impl ChunkWriter {
    fn new(queue: mpsc::Sender<Chunk>) -> Self {
        Self { queue, buffer: empty_chunk(), content_bytes: 0 }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Stopped> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.room()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Reads up to `max` bytes straight into the chunk; `None` at the end of `reader`.
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
        Ok(self.flush_if_full().map(|()| (read > 0).then_some(read as u64)))
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
fn read_out(
    source: &dyn Source,
    ids: &[BlobId],
    mut chunks: ChunkWriter,
) -> Result<Sent, SendError> {
    let mut sent = Sent::default();
    for id in ids {
        match send_one(source, id, &mut chunks) {
            Ok(Ok(Some(bytes))) => {
                sent.blobs += 1;
                sent.bytes += bytes;
            }
            Ok(Ok(None)) => sent.absent += 1,
            Ok(Err(Stopped)) => return Ok(sent),
            Err(source) => return Err(SendError::Source { id: *id, source }),
        }
    }
    // Where the task has stopped, it reports that itself.
    let _: Result<(), Stopped> = chunks.flush();
    Ok(sent)
}

fn send_one(
    source: &dyn Source,
    id: &BlobId,
    chunks: &mut ChunkWriter,
) -> io::Result<Result<Option<u64>, Stopped>> {
    let Some(mut blob) = source.open(id)? else {
        let header = [&[ABSENT][..], &id.0].concat();
        return Ok(chunks.write(&header).map(|()| None));
    };
    let header = [&[PRESENT][..], &id.0, &blob.size.to_be_bytes()].concat();
    if chunks.write(&header).is_err() {
        return Ok(Err(Stopped));
    }
    let mut left = blob.size;
    while left > 0 {
        match chunks.read_from(&mut *blob.content, left)? {
            Ok(Some(read)) => left -= read,
            Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Stopped) => return Ok(Err(Stopped)),
        }
    }
    Ok(Ok(Some(blob.size)))
}

/// Hands chunks to the writing thread until the last, or until the thread stops.
async fn read_chunks(
    reader: &mut (impl AsyncRead + Unpin),
    chunks: mpsc::Sender<Option<Bytes>>,
) -> Result<(), frame::Error> {
    loop {
        let length = frame::read_length(reader).await?.ok_or(frame::Error::Truncated)?;
        let (got, max) = (usize::try_from(length).unwrap_or(usize::MAX), CHUNK_BYTES_MAX);
        if got > max {
            return Err(frame::Error::TooLong { got, max });
        }
        if got == 0 {
            // Where the thread has stopped, it says why.
            let _: Result<(), _> = chunks.send(None).await;
            return Ok(());
        }
        let mut buffer = BytesMut::with_capacity(got);
        while buffer.len() < got {
            let left = (got - buffer.len()) as u64;
            let read = (&mut *reader).take(left).read_buf(&mut buffer).await;
            if read.map_err(frame::Error::Io)? == 0 {
                return Err(frame::Error::Truncated);
            }
        }
        if chunks.send(Some(buffer.freeze())).await.is_err() {
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
        let mut rest = &mut bytes[..];
        while !rest.is_empty() {
            let chunk = self.next()?;
            if chunk.is_empty() {
                return Err(Truncated);
            }
            let now = rest.len().min(chunk.len());
            chunk.copy_to_slice(&mut rest[..now]);
            rest = &mut rest[now..];
        }
        Ok(bytes)
    }
}

struct Truncated;

/// The writing thread's work.
struct Intake<F> {
    store: BlobStore,
    /// The bound of each; `None` where anything may come.
    wanted: Option<BTreeMap<BlobId, u64>>,
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
            if tag != PRESENT && tag != ABSENT {
                return Err(ReceiveError::Malformed { peer });
            }
            let id = BlobId(chunks.exact().map_err(truncated)?);
            let max = match &mut self.wanted {
                Some(wanted) => wanted.remove(&id).ok_or(ReceiveError::Unexpected { id, peer })?,
                None => u64::MAX,
            };
            if tag == ABSENT {
                received.absent.push(id);
                continue;
            }
            let size = u64::from_be_bytes(chunks.exact().map_err(truncated)?);
            if size > max {
                return Err(ReceiveError::TooLarge { id, peer, size, max });
            }
            self.blob(id, size, &mut chunks)?;
            received.blobs += 1;
            received.bytes += size;
        }
        // What was wanted and not even named as absent never came.
        match &self.wanted {
            Some(wanted) if !wanted.is_empty() => Err(ReceiveError::Truncated { peer }),
            Some(_) | None => Ok(received),
        }
    }

    fn blob(
        &mut self,
        id: BlobId,
        size: u64,
        chunks: &mut ChunkReader,
    ) -> Result<(), ReceiveError> {
        let peer = self.peer;
        let store = |source| ReceiveError::Store { id, source };
        let mut writer = self.store.writer().map_err(store)?;
        while writer.bytes() < size {
            let chunk = chunks.next().map_err(|Truncated| ReceiveError::Truncated { peer })?;
            if chunk.is_empty() {
                return Err(ReceiveError::Truncated { peer });
            }
            let left = usize::try_from(size - writer.bytes()).unwrap_or(usize::MAX);
            let now = chunk.len().min(left);
            writer.write(&chunk[..now]).map_err(store)?;
            chunk.advance(now);
            (self.on_bytes)(now as u64);
        }
        if writer.id() != id {
            return Err(ReceiveError::WrongContent { id, peer });
        }
        writer.commit().map_err(store)?;
        Ok(())
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
        let ids: Vec<BlobId> = wanted.iter().map(|wanted| wanted.id).collect();
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
            let sent = send_blobs(source, ids.clone(), &mut ours, |bytes| told += bytes).await;
            ours.write_all(b"more").await.unwrap();
            sent
        };
        let receiving = async {
            let received =
                receive_blobs(&to.store, &wanted, peer(), &mut theirs, on_bytes).await.unwrap();
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
            assert_eq!(to.store.read(&wanted.id, 1 << 20).unwrap(), content);
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
        let gone = Wanted { id: BlobId::of(b"gone"), bytes_max: 9 };
        let (sent, received) = transfer(&from, &to, &[gone, here]).await;
        assert_eq!(sent.unwrap().absent, 1);
        assert_eq!(received.unwrap().absent, [gone.id]);
        assert!(to.store.has(&here.id));
    }

    #[tokio::test]
    async fn wrong_content_is_blamed_on_the_blob_and_its_peer_and_not_kept() {
        let (from, to) = (Side::new(), Side::new());
        let (good, bad) = (from.put(b"good"), from.put(b"right"));
        fs::write(from.store.path_of(&bad.id), b"wrong").unwrap();
        let (_, received) = transfer(&from, &to, &[good, bad]).await;
        assert!(matches!(received, Err(ReceiveError::WrongContent { id, peer: from })
                if id == bad.id && from == peer()));
        assert!(to.store.has(&good.id));
        assert!(!to.store.has(&bad.id) && !to.store.has(&BlobId::of(b"wrong")));
        assert_eq!(fs::read_dir(to.dir.path().join("blobs/tmp")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_was_not_asked_for_or_is_too_large_is_refused_at_its_header() {
        let (from, to) = (Side::new(), Side::new());
        let (asked, unasked) = (from.put(b"asked"), from.put(b"unasked"));
        let (mut ours, mut theirs) = duplex(1 << 20);
        let source = Arc::new(from.store.clone());
        send_blobs(source, vec![unasked.id], &mut ours, |_| {}).await.unwrap();
        let received = receive_blobs(&to.store, &[asked], peer(), &mut theirs, |_| {}).await;
        assert!(matches!(received, Err(ReceiveError::Unexpected { id, .. }) if id == unasked.id));

        let less = Wanted { bytes_max: 4, ..asked };
        let (_, received) = transfer(&from, &to, &[less]).await;
        assert!(matches!(received, Err(ReceiveError::TooLarge { size: 5, max: 4, .. })));
        assert!(!to.store.has(&asked.id));
    }

    #[tokio::test]
    async fn a_stream_cut_anywhere_is_an_error_and_leaves_no_half_blob() {
        let (from, to) = (Side::new(), Side::new());
        let wanted = [from.put(b"first"), from.put(b"second")];
        let mut whole = Vec::new();
        let ids = wanted.iter().map(|wanted| wanted.id).collect();
        send_blobs(Arc::new(from.store.clone()), ids, &mut whole, |_| {}).await.unwrap();
        for cut in 0..whole.len() {
            let received =
                receive_blobs(&to.store, &wanted, peer(), &mut &whole[..cut], |_| {}).await;
            assert!(matches!(received, Err(ReceiveError::Truncated { .. })), "{cut}");
        }
        assert_eq!(fs::read_dir(to.dir.path().join("blobs/tmp")).unwrap().count(), 0);
        let end_only = [0; 4];
        let received = receive_blobs(&to.store, &wanted, peer(), &mut &end_only[..], |_| {}).await;
        assert!(matches!(received, Err(ReceiveError::Truncated { .. })));
    }

    #[tokio::test]
    async fn garbage_is_refused() {
        let to = Side::new();
        let wanted = [Wanted { id: BlobId([7; 32]), bytes_max: u64::MAX }];
        for (bytes, malformed) in [
            (&[0xff; 64][..], true),
            (&[0, 0, 0, 1, 9, 0, 0, 0, 0][..], true),
            (&[0, 0, 0, 1, 1, 0, 0, 0, 0][..], false),
        ] {
            let received = receive_blobs(&to.store, &wanted, peer(), &mut &bytes[..], |_| {}).await;
            let is_malformed = matches!(received, Err(ReceiveError::Malformed { .. }));
            assert_eq!(is_malformed, malformed, "{received:?}");
        }
    }

    #[tokio::test]
    async fn a_silent_stream_does_not_hold_back_a_failure() {
        let to = Side::new();
        let (mut ours, mut theirs) = duplex(1000);
        ours.write_all(&[0, 0, 0, 1, 9]).await.unwrap();
        let received = receive_blobs(&to.store, &[], peer(), &mut theirs, |_| {}).await;
        assert!(matches!(received, Err(ReceiveError::Malformed { .. })));
        drop(ours);
    }

    #[tokio::test]
    async fn a_source_that_fails_names_the_blob_and_the_receiver_sees_an_early_end() {
        struct Short;
        impl Source for Short {
            fn open(&self, _: &BlobId) -> io::Result<Option<OpenBlob>> {
                Ok(Some(OpenBlob { size: 9, content: Box::new(&b"four"[..]) }))
            }
        }
        let to = Side::new();
        let wanted = Wanted { id: BlobId([1; 32]), bytes_max: 9 };
        let mut stream = Vec::new();
        let sent = send_blobs(Arc::new(Short), vec![wanted.id], &mut stream, |_| {}).await;
        assert!(matches!(sent, Err(SendError::Source { id, .. }) if id == wanted.id));
        let received = receive_blobs(&to.store, &[wanted], peer(), &mut &stream[..], |_| {}).await;
        assert!(matches!(received, Err(ReceiveError::Truncated { .. })));
    }

    #[tokio::test]
    async fn lists_of_ids_come_back_within_their_bound() {
        let ids: Vec<BlobId> = (0..100_u8).map(|i| BlobId([i; 32])).collect();
        let mut stream = Vec::new();
        write_ids(&mut stream, &ids).await.unwrap();
        assert_eq!(read_ids(&mut &stream[..], 100).await.unwrap(), ids);
        let result = read_ids(&mut &stream[..], 99).await;
        assert!(matches!(result, Err(frame::Error::TooLong { .. })));
        let result = read_ids(&mut &stream[..stream.len() - 1], 100).await;
        assert!(matches!(result, Err(frame::Error::Truncated)));
        assert!(matches!(read_ids(&mut &[][..], 100).await, Err(frame::Error::Closed)));
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
            Wanted { id, bytes_max: content.len() as u64 }
        }
    }

    async fn transfer(
        from: &Side,
        to: &Side,
        wanted: &[Wanted],
    ) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
        let (ours, mut theirs): (DuplexStream, DuplexStream) = duplex(1 << 16);
        let ids = wanted.iter().map(|wanted| wanted.id).collect();
        let source = Arc::new(from.store.clone());
        let sending = async move {
            let mut ours = ours;
            send_blobs(source, ids, &mut ours, |_| {}).await
        };
        let receiving = async {
            let received = receive_blobs(&to.store, wanted, peer(), &mut theirs, |_| {}).await;
            drop(theirs);
            received
        };
        tokio::join!(sending, receiving)
    }

    fn peer() -> PeerId {
        PeerId(KeyPair::from_seed(&[1; 32]).public())
    }
}
