//! The codec: bincode 2 with a byte limit, trailing bytes rejected.
//!
//! Only this module (and the node's store) names bincode. What is signed or hashed
//! is always the received bytes, never a second encoding of the decoded value.

mod bounded;

use core::marker::PhantomData;

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use self::bounded::{Allowance, Bounded};

/// The version of everything said on the wire; peers of another are told so.
///
/// 2: a certificate comes with a request for a job's inputs. 3: records have several keepers,
/// and processes have leases. 4: a turn of reconciliation names the asker's set.
/// 5: results are copied before a job is done.
pub const WIRE_VERSION: u16 = 5;

/// The largest message between peers, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// What decoding allocates at most, for each byte of its input and beside that.
///
/// A list of empty texts takes 24 bytes where each has one on the wire, twice that while it
/// grows; what peers really send stays far below: the widest is a process without GPUs in
/// [`crate::message::JobView`].
pub const ALLOCATED_BYTES_MAX: (usize, usize) = (16, 64 << 10);

/// Why bytes are not the value they should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// More bytes than a message may have.
    #[error("{got} bytes where at most {max} are allowed")]
    TooLong {
        /// Bytes received.
        got: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// Not an encoding of the expected type.
    #[error("malformed: {0}")]
    Malformed(String),
    /// A valid value with something behind it.
    #[error("{0} bytes behind the value")]
    Trailing(usize),
}

/// The bytes of `value`.
///
/// # Panics
/// Never for the types of this workspace: none has a sequence of unknown length or
/// a serialiser that fails.
#[must_use]
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "in-memory encoding of derived types cannot fail")]
    bincode::serde::encode_to_vec(value, bincode::config::standard())
        .expect("derived Serialize implementations do not fail")
}

/// The value in `bytes`, of at most [`MESSAGE_BYTES_MAX`].
///
/// # Errors
/// [`DecodeError`] where the bytes are not exactly one value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    decode_limited::<T, MESSAGE_BYTES_MAX>(bytes)
}

/// The value in `bytes`, of at most `MAX` bytes.
///
/// # Errors
/// [`DecodeError`] where the bytes are not exactly one value.
pub fn decode_limited<T: DeserializeOwned, const MAX: usize>(
    bytes: &[u8],
) -> Result<T, DecodeError> {
    if bytes.len() > MAX {
        return Err(DecodeError::TooLong { got: bytes.len(), max: MAX });
    }
    let config = bincode::config::standard().with_limit::<MAX>();
    let (per_byte, beside) = ALLOCATED_BYTES_MAX;
    // Texts, never longer than the input, need no allowance.
    let allowance = Allowance::new((per_byte - 1).saturating_mul(bytes.len()) + beside);
    // A seed and not a type: only so does bincode say how many bytes it used.
    let seed = Bounded::new(PhantomData::<T>, &allowance);
    let (value, used) = bincode::serde::seed_decode_from_slice(seed, bytes, config)
        .map_err(|e| DecodeError::Malformed(e.to_string()))?;
    if used == bytes.len() { Ok(value) } else { Err(DecodeError::Trailing(bytes.len() - used)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_comes_back_and_anything_else_is_refused() {
        let bytes = encode(&(7_u32, "seven".to_owned()));
        assert_eq!(decode::<(u32, String)>(&bytes), Ok((7, "seven".to_owned())));
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(decode::<(u32, String)>(&longer), Err(DecodeError::Trailing(1)));
        assert!(matches!(decode::<(u32, String)>(&bytes[..3]), Err(DecodeError::Malformed(_))));
        assert!(matches!(
            decode_limited::<(u32, String), 2>(&bytes),
            Err(DecodeError::TooLong { .. })
        ));
        let claims_a_gigabyte = [0xfc, 0, 0, 0, 0x40];
        assert!(matches!(decode::<Vec<u8>>(&claims_a_gigabyte), Err(DecodeError::Malformed(_))));
    }
}
