//! Ids. Two ids in one role get two types; all are fixed bytes with a text form.

use core::{fmt, str::FromStr};

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

use super::PublicKey;

/// A text is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{text}` is not a {what}")]
pub struct ParseIdError {
    what: &'static str,
    text: String,
}

impl ParseIdError {
    fn new(what: &'static str, text: &str) -> Self {
        Self { what, text: text.chars().take(80).collect() }
    }
}

/// As text where a person may read it (JSON), as the bare bytes on the wire.
macro_rules! serde_as_text {
    ($name:ident, $bytes:ty) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
                } else {
                    <$bytes>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

macro_rules! base32_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The BLAKE3 hash of `bytes`.
            #[must_use]
            pub fn of(bytes: &[u8]) -> Self {
                Self(*blake3::hash(bytes).as_bytes())
            }
        }

        impl fmt::Display for $name {
            /// 52 characters of lower-case base32 (RFC 4648, no padding).
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.to_string()[..10])
            }
        }

        serde_as_text!($name, [u8; 32]);

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                BASE32_NOPAD
                    .decode(text.to_ascii_uppercase().as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError::new($what, text))
            }
        }
    };
}

base32_id!(
    /// A job: the BLAKE3 hash of its signed spec. Shown as a unique prefix.
    JobId, "job id"
);
base32_id!(
    /// Content: the BLAKE3 hash of a blob, of a tree's manifest among others.
    BlobId, "blob id"
);
base32_id!(
    /// A pool: the BLAKE3 hash of its genesis.
    PoolId, "pool id"
);
base32_id!(
    /// A roster statement: the BLAKE3 hash of its signed bytes and signature.
    StatementId, "statement id"
);

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Ids that are counted differ at their end.
                let (start, end) = (&self.0[..4], &self.0[14..]);
                write!(f, "{}-{}", HEXLOWER.encode(start), HEXLOWER.encode(end))
            }
        }

        serde_as_text!($name, [u8; 16]);

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                HEXLOWER
                    .decode(text.as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError::new($what, text))
            }
        }
    };
}

hex_id!(
    /// One journal directory: an emptied or restored disk is another store.
    StoreId, "store id"
);
hex_id!(
    /// One boot of a node's daemon.
    BootId, "boot id"
);
hex_id!(
    /// One hold a bidder gave: never used twice by that bidder.
    HoldId, "hold id"
);

/// A node: the libp2p peer id of its ed25519 key.
///
/// Kept as the key itself; the text form is libp2p's (`12D3KooW…`), the base58 of
/// the identity multihash of the key's protobuf encoding (libp2p peer-ids spec).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub PublicKey);

/// identity multihash (0x00), length 36, protobuf field 1 = Ed25519, field 2 of 32 bytes.
const PEER_ID_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

impl PeerId {
    /// The 38 bytes that libp2p uses for this peer.
    #[must_use]
    pub fn to_multihash(self) -> Vec<u8> {
        [&PEER_ID_PREFIX[..], &self.0.0].concat()
    }

    /// The peer id in libp2p's bytes; `None` unless it is of an ed25519 key.
    #[must_use]
    pub fn from_multihash(bytes: &[u8]) -> Option<Self> {
        let key = bytes.strip_prefix(&PEER_ID_PREFIX)?;
        Some(Self(PublicKey(key.try_into().ok()?)))
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.to_multihash()).into_string())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.to_string();
        f.write_str(&text[text.len() - 6..])
    }
}

serde_as_text!(PeerId, PublicKey);

impl FromStr for PeerId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        bs58::decode(text)
            .into_vec()
            .ok()
            .and_then(|bytes| Self::from_multihash(&bytes))
            .ok_or_else(|| ParseIdError::new("peer id", text))
    }
}

/// A person, by public key. The text form is `u` and base32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(pub PublicKey);

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "u{}", BASE32_NOPAD.encode(&self.0.0).to_ascii_lowercase())
    }
}

impl fmt::Debug for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_string()[..8])
    }
}

serde_as_text!(UserId, PublicKey);

impl FromStr for UserId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.strip_prefix('u')
            .and_then(|rest| BASE32_NOPAD.decode(rest.to_ascii_uppercase().as_bytes()).ok())
            .and_then(|bytes| bytes.try_into().ok())
            .map(|bytes| Self(PublicKey(bytes)))
            .ok_or_else(|| ParseIdError::new("user id", text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::KeyPair;

    #[test]
    fn every_id_parses_back_from_its_text() {
        let key = KeyPair::from_seed(&[3; 32]).public();
        let job = JobId::of(b"x");
        assert_eq!(job.to_string().parse(), Ok(job));
        let store = StoreId([9; 16]);
        assert_eq!(store.to_string().parse(), Ok(store));
        let peer = PeerId(key);
        assert!(peer.to_string().starts_with("12D3KooW"));
        assert_eq!(peer.to_string().parse(), Ok(peer));
        let user = UserId(key);
        assert_eq!(user.to_string().parse(), Ok(user));
        assert!("nonsense".parse::<JobId>().is_err());
    }
}
