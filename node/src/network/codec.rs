//! Direct messages on a stream: a big-endian `u32` length and that many bytes; answered
//! by one byte.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{StreamProtocol, request_response};

use super::{Budget, Payload};
use crate::daemon::bundle::BUNDLE_BYTES_MAX;

pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/p2pit/message/4");

/// A closed stream alone would not tell whether the message was taken.
const TAKEN: [u8; 1] = [1];

#[derive(Clone)]
pub(super) struct MessageCodec {
    pub(super) inbound: Budget,
}

impl request_response::Codec for MessageCodec {
    type Protocol = StreamProtocol;
    type Request = Payload;
    type Response = ();

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Payload>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut len = [0; 4];
        io.read_exact(&mut len).await?;
        let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        if len > BUNDLE_BYTES_MAX {
            let what = format!("a message of {len} bytes where {BUNDLE_BYTES_MAX} are allowed");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let mut payload = self.inbound.reserve(len).await;
        io.read_exact(&mut payload.bytes).await?;
        Ok(payload)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<()>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut taken = [0; 1];
        io.read_exact(&mut taken).await?;
        if taken == TAKEN { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        payload: Payload,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidData);
        let len = u32::try_from(payload.len()).map_err(too_long)?;
        // In one write, so that a short message is one packet.
        let frame = [&len.to_be_bytes(), &payload[..]].concat();
        io.write_all(&frame).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, (): ()) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&TAKEN).await
    }
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::request_response::Codec as _;

    use super::*;

    #[tokio::test]
    async fn a_message_comes_back_as_it_was_written() {
        let mut codec = MessageCodec { inbound: Budget::new() };
        for len in [0, 1, 100_000, BUNDLE_BYTES_MAX] {
            let message = vec![7; len];
            let payload = codec.inbound.try_take(message.clone()).unwrap();
            let mut wire = Cursor::new(Vec::new());
            codec.write_request(&PROTOCOL, &mut wire, payload).await.unwrap();
            wire.set_position(0);
            let read = codec.read_request(&PROTOCOL, &mut wire).await.unwrap();
            assert_eq!(read[..], message);
        }
    }

    #[tokio::test]
    async fn a_length_above_the_limit_is_refused_before_anything_is_allocated() {
        let mut codec = MessageCodec { inbound: Budget::new() };
        for len in [BUNDLE_BYTES_MAX as u32 + 1, u32::MAX] {
            let mut wire = Cursor::new(len.to_be_bytes());
            let error = codec.read_request(&PROTOCOL, &mut wire).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_large_messages_leave_room_for_small_ones() {
        let budget = Budget::new();
        let take = |len| budget.try_take(vec![0; len]);
        let large: Vec<_> = (0..64).map(|_| take(BUNDLE_BYTES_MAX).unwrap()).collect();
        assert!(take(BUNDLE_BYTES_MAX).is_none());
        assert!(take(SMALL).is_some());
        drop(large);
        let small: Vec<_> = std::iter::from_fn(|| take(SMALL)).collect();
        assert_eq!(small.len(), 768);
        assert!(take(BUNDLE_BYTES_MAX).is_some());
    }

    const SMALL: usize = 64 << 10;
}
