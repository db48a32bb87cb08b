//! One stream of the data plane, whatever carries it.
//!
//! Mostly that is a stream of a QUIC connection of our own ([`super::endpoint`]). Where no such
//! connection comes about it is a *tunnel*: a stream of the control plane, which may go by TCP
//! or through a relay. Both are read and written alike; a tunnel through a relay is slowed
//! down, since it costs the member that passes it on.

use std::{
    io,
    num::NonZeroU64,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf,
        ReadHalf, WriteHalf,
    },
    sync::watch,
    task::AbortHandle,
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _};

use super::Pace;
use crate::network::{InUse, Tunnel};

/// What all tunnels through relays of this node may send together, in bytes per second.
pub const RELAYED_BYTES_PER_S: u64 = 4 << 20;
/// Of one tunnel: written, and not on its way yet.
const PIPE_BYTES: usize = 64 << 10;

static RELAYED: LazyLock<Pace> =
    LazyLock::new(|| NonZeroU64::new(RELAYED_BYTES_PER_S).map_or_else(Pace::unlimited, Pace::of));

type Carrier = Compat<libp2p::Stream>;

/// What is written to the other side. Dropping it ends it in good order.
#[derive(Debug)]
pub struct SendStream(Sending);

#[derive(Debug)]
enum Sending {
    Quic(quinn::SendStream),
    Tunnel(Piped),
}

/// What is written goes through a pipe to a task, so that its end needs no waiting.
#[derive(Debug)]
struct Piped {
    /// `None` once nothing more is to come.
    pipe: Option<DuplexStream>,
    /// Its sender is gone once nothing more is carried.
    carried: watch::Receiver<()>,
    carrier: AbortHandle,
}

/// What the other side writes.
#[derive(Debug)]
pub struct RecvStream(Receiving);

#[derive(Debug)]
enum Receiving {
    Quic(quinn::RecvStream),
    /// Held for as long as it is read.
    Tunnel(ReadHalf<Carrier>, #[expect(dead_code, reason = "it counts while it lives")] Arc<InUse>),
}

/// A tunnel as a pair of streams; those through relays share [`RELAYED_BYTES_PER_S`]. Must be
/// called within a runtime.
#[must_use]
pub fn tunnel(Tunnel { stream, relayed, in_use }: Tunnel) -> (SendStream, RecvStream) {
    let in_use = Arc::new(in_use);
    let held = Arc::clone(&in_use);
    let (read, write) = tokio::io::split(stream.compat());
    let (pipe, piped) = tokio::io::duplex(PIPE_BYTES);
    let (carries, carried) = watch::channel(());
    let task = tokio::spawn(async move {
        if let Err(reason) = carry(piped, write, relayed).await {
            tracing::debug!(%reason, "a tunnel broke");
        }
        drop((carries, held));
    });
    let piped = Piped { pipe: Some(pipe), carried, carrier: task.abort_handle() };
    (SendStream(Sending::Tunnel(piped)), RecvStream(Receiving::Tunnel(read, in_use)))
}

async fn carry(
    mut piped: DuplexStream,
    mut write: WriteHalf<Carrier>,
    relayed: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; PIPE_BYTES];
    loop {
        let read = piped.read(&mut buffer).await?;
        if read == 0 {
            return write.shutdown().await;
        }
        if relayed {
            RELAYED.take(read as u64).await;
        }
        write.write_all(&buffer[..read]).await?;
        write.flush().await?;
    }
}

impl From<quinn::SendStream> for SendStream {
    fn from(stream: quinn::SendStream) -> Self {
        Self(Sending::Quic(stream))
    }
}

impl From<quinn::RecvStream> for RecvStream {
    fn from(stream: quinn::RecvStream) -> Self {
        Self(Receiving::Quic(stream))
    }
}

impl SendStream {
    /// Streams of a higher one go first, where the carrier can tell them apart.
    ///
    /// # Errors
    /// The stream has ended.
    pub fn set_priority(&self, priority: i32) -> io::Result<()> {
        match &self.0 {
            Sending::Quic(stream) => Ok(stream.set_priority(priority)?),
            Sending::Tunnel(_) => Ok(()),
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// The stream broke, or the other side wants no more.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        tokio::io::AsyncWriteExt::write_all(self, bytes).await
    }

    /// Nothing more will be written. What was is delivered, if the connection lives.
    ///
    /// # Errors
    /// The stream has ended already.
    pub fn finish(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Sending::Quic(stream) => Ok(stream.finish()?),
            Sending::Tunnel(tunnel) => match tunnel.pipe.take() {
                Some(_) => Ok(()),
                None => Err(io::ErrorKind::BrokenPipe.into()),
            },
        }
    }

    /// The other side sees that this broke off; of a tunnel, that it ends too early.
    pub fn reset(&mut self) {
        match &mut self.0 {
            // Fails where it has ended, and then the other side has seen that.
            Sending::Quic(stream) => drop(stream.reset(quinn::VarInt::from_u32(0))),
            Sending::Tunnel(tunnel) => {
                tunnel.carrier.abort();
                tunnel.pipe = None;
            }
        }
    }

    /// Returns once the other side does not want more, or has everything. Of a tunnel that is
    /// noticed when something is written.
    pub async fn stopped(&mut self) {
        match &mut self.0 {
            // Also where the connection is lost.
            Sending::Quic(stream) => drop(stream.stopped().await),
            Sending::Tunnel(tunnel) => while tunnel.carried.changed().await.is_ok() {},
        }
    }
}

impl AsyncWrite for SendStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Sending::Quic(stream) => AsyncWrite::poll_write(Pin::new(stream), cx, bytes),
            Sending::Tunnel(Piped { pipe: Some(pipe), .. }) => Pin::new(pipe).poll_write(cx, bytes),
            Sending::Tunnel(_) => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Sending::Quic(stream) => Pin::new(stream).poll_flush(cx),
            Sending::Tunnel(Piped { pipe: Some(pipe), .. }) => Pin::new(pipe).poll_flush(cx),
            Sending::Tunnel(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Sending::Quic(stream) => Pin::new(stream).poll_shutdown(cx),
            Sending::Tunnel(Piped { pipe: Some(pipe), .. }) => Pin::new(pipe).poll_shutdown(cx),
            Sending::Tunnel(_) => Poll::Ready(Ok(())),
        }
    }
}

impl RecvStream {
    /// The next bytes, at most `max`; `None` at the end.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn read_some(&mut self, max: usize) -> io::Result<Option<Bytes>> {
        match &mut self.0 {
            Receiving::Quic(stream) => {
                Ok(stream.read_chunk(max, true).await?.map(|chunk| chunk.bytes))
            }
            Receiving::Tunnel(stream, _) => {
                let mut bytes = vec![0; max.min(PIPE_BYTES)];
                let read = stream.read(&mut bytes).await?;
                bytes.truncate(read);
                Ok((read > 0).then(|| bytes.into()))
            }
        }
    }

    /// Everything to the end, which must be at most `max` bytes.
    ///
    /// # Errors
    /// The stream broke, or is longer.
    pub async fn read_to_end(&mut self, max: usize) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
        let limited = (&mut *self).take(limit);
        tokio::io::AsyncReadExt::read_to_end(&mut { limited }, &mut all).await?;
        if all.len() > max {
            let what = format!("more than {max} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(all)
    }
}

impl AsyncRead for RecvStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Receiving::Quic(stream) => AsyncRead::poll_read(Pin::new(stream), cx, buffer),
            Receiving::Tunnel(stream, _) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}
