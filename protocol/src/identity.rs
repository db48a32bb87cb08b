//! Who speaks: keys, the ids derived from them, and signed bytes.
//!
//! A signature always covers `domain ‖ 0x00 ‖ bytes`, where the domain names the
//! kind of thing signed, so that bytes signed as one kind never verify as another.
//! What was received is what is verified, hashed and kept: nothing is re-encoded.

mod id;
mod key;
mod signed;
mod text;

pub use id::{
    BlobId, BootId, HoldId, JobId, ParseIdError, PeerId, PoolId, StatementId, StoreId, UserId,
};
#[cfg(feature = "sabotage")]
pub use key::simulated::simulate_signatures;
pub use key::{KeyPair, PublicKey, Signature};
pub use signed::{Domain, SignatureError, SignedBytes};
