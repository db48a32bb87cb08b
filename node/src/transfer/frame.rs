//! Messages on a byte stream: a length of four bytes, big-endian, then the codec's bytes.

use std::io;

use p2pit_protocol::wire::{self, DecodeError, MESSAGE_BYTES_MAX};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The codec charges an integer at its full width, up to eight times its bytes.
const CHARGED_BYTES_MAX: usize = 8 * MESSAGE_BYTES_MAX;

/// Why no message was read or written.
#[derive(Debug, Error)]
pub enum Error {
    /// The stream ended where a message could have begun.
    #[error("no further message")]
    Closed,
    #[error("the stream ended inside a message")]
    Truncated,
    #[error("a message of {got} bytes where at most {max} are allowed")]
    TooLong { got: usize, max: usize },
    #[error("not the expected message")]
    Malformed(#[source] DecodeError),
    #[error("ranges that are not in order")]
    Disorder,
    #[error("the stream broke")]
    Io(#[source] io::Error),
}

/// Writes one message of at most [`MESSAGE_BYTES_MAX`], and does not flush.
pub async fn write_message<T: Serialize>(
    writer: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), Error> {
    let body = wire::encode(message);
    let too_long = Error::TooLong { got: body.len(), max: MESSAGE_BYTES_MAX };
    let length = match u32::try_from(body.len()) {
        Ok(length) if body.len() <= MESSAGE_BYTES_MAX => length,
        _ => return Err(too_long),
    };
    let bytes = [&length.to_be_bytes()[..], &body].concat();
    writer.write_all(&bytes).await.map_err(Error::Io)
}

/// Reads one message of at most `bytes_max`, itself at most [`MESSAGE_BYTES_MAX`].
/// Nothing is allocated for a message that claims to be longer.
pub async fn read_message<T: DeserializeOwned>(
    reader: &mut (impl AsyncRead + Unpin),
    bytes_max: usize,
) -> Result<T, Error> {
    let max = bytes_max.min(MESSAGE_BYTES_MAX);
    let Some(length) = read_length(reader).await? else { return Err(Error::Closed) };
    let got = usize::try_from(length).unwrap_or(usize::MAX);
    if got > max {
        return Err(Error::TooLong { got, max });
    }
    let mut body = vec![0; got];
    reader.read_exact(&mut body).await.map_err(truncated_or)?;
    wire::decode_limited::<T, CHARGED_BYTES_MAX>(&body).map_err(Error::Malformed)
}

/// The length before a message; `None` where the stream ends instead.
pub(super) async fn read_length(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Option<u32>, Error> {
    let mut bytes = [0; 4];
    let first = reader.read(&mut bytes).await.map_err(Error::Io)?;
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut bytes[first..]).await.map_err(truncated_or)?;
    Ok(Some(u32::from_be_bytes(bytes)))
}

pub(super) fn truncated_or(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Truncated,
        _ => Error::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_come_back_in_order_and_then_the_end() {
        let mut stream = Vec::new();
        write_message(&mut stream, &"one".to_owned()).await.unwrap();
        write_message(&mut stream, &"two".to_owned()).await.unwrap();
        let mut reader = &stream[..];
        assert_eq!(read_message::<String>(&mut reader, 100).await.unwrap(), "one");
        assert_eq!(read_message::<String>(&mut reader, 100).await.unwrap(), "two");
        assert!(matches!(read_message::<String>(&mut reader, 100).await, Err(Error::Closed)));
    }

    #[tokio::test]
    async fn what_is_cut_too_long_or_something_else_is_told_apart() {
        let mut stream = Vec::new();
        write_message(&mut stream, &"message".to_owned()).await.unwrap();
        for cut in 1..stream.len() {
            let result = read_message::<String>(&mut &stream[..cut], 100).await;
            assert!(matches!(result, Err(Error::Truncated)), "{cut}");
        }
        let result = read_message::<String>(&mut &stream[..], 7).await;
        assert!(matches!(result, Err(Error::TooLong { got: 8, max: 7 })));
        let result = read_message::<(u8, bool)>(&mut &stream[..], 100).await;
        assert!(matches!(result, Err(Error::Malformed(_))));
        let claims_4_gib = [0xff; 4];
        let result = read_message::<String>(&mut &claims_4_gib[..], usize::MAX).await;
        assert!(matches!(result, Err(Error::TooLong { max: MESSAGE_BYTES_MAX, .. })));
    }

    #[tokio::test]
    async fn the_longest_message_that_can_be_written_can_be_read() {
        let numbers = vec![1_u64; MESSAGE_BYTES_MAX - 5];
        let mut stream = Vec::new();
        write_message(&mut stream, &numbers).await.unwrap();
        let back = read_message::<Vec<u64>>(&mut &stream[..], MESSAGE_BYTES_MAX).await.unwrap();
        assert_eq!(back.len(), numbers.len());
        let longer = vec![0_u8; MESSAGE_BYTES_MAX];
        let result = write_message(&mut Vec::new(), &longer).await;
        assert!(matches!(result, Err(Error::TooLong { .. })));
    }
}
