//! ed25519 keys (RFC 8032), behind our own types so that the library is named once.

use core::fmt;

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A secret ed25519 key with its public half.
#[derive(Clone)]
pub struct KeyPair {
    signing: SigningKey,
}

impl KeyPair {
    /// The key whose 32-byte secret is `seed`. The caller supplies the randomness.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self { signing: SigningKey::from_bytes(seed) }
    }

    /// The 32 secret bytes; wiped from memory when dropped.
    #[must_use]
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.signing.to_bytes())
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.signing.verifying_key().to_bytes())
    }

    pub(super) fn sign_raw(&self, message: &[u8]) -> Signature {
        #[cfg(feature = "sabotage")]
        if simulated::is_on() {
            return Signature(simulated::sign(&self.public(), message).to_vec());
        }
        Signature(self.signing.sign(message).to_bytes().to_vec())
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPair").field("public", &self.public()).finish_non_exhaustive()
    }
}

/// The 32 bytes of an ed25519 public key; not necessarily a valid point until used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    pub(super) fn verify_raw(&self, message: &[u8], signature: &Signature) -> bool {
        #[cfg(feature = "sabotage")]
        if simulated::is_on() {
            return simulated::sign(self, message)[..] == signature.0[..];
        }
        let Ok(key) = VerifyingKey::from_bytes(&self.0) else { return false };
        let Ok(signature) = ed25519_dalek::Signature::from_slice(&signature.0) else {
            return false;
        };
        key.verify_strict(message, &signature).is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0[..8]))
    }
}

/// The 64 bytes of an ed25519 signature.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Signature(#[serde(with = "super::text")] pub Vec<u8>);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(self.0.get(..6).unwrap_or(&self.0)))
    }
}

/// Signatures for a simulator, whose time would else go into curves. They bind key and
/// message, so that an altered byte, another signer or another domain is noticed; but who
/// knows the public key can make them, so that they protect nothing.
#[cfg(feature = "sabotage")]
pub(super) mod simulated {
    use core::sync::atomic::{AtomicBool, Ordering};

    use super::PublicKey;

    static ON: AtomicBool = AtomicBool::new(false);

    /// From now on every key of this process signs and verifies in this way: what was signed
    /// before does not verify any more.
    pub fn simulate_signatures() {
        ON.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_on() -> bool {
        ON.load(Ordering::Relaxed)
    }

    pub(super) fn sign(key: &PublicKey, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        // Half is enough to tell; the length is that of a real signature.
        let hash = blake3::keyed_hash(&key.0, message);
        signature[..32].copy_from_slice(hash.as_bytes());
        signature
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::identity::KeyPair;

        #[test]
        fn a_simulated_signature_holds_only_for_its_key_and_message() {
            // The switch itself is left alone: other tests of this process sign for real.
            let (one, other) = (KeyPair::from_seed(&[1; 32]), KeyPair::from_seed(&[2; 32]));
            let signature = sign(&one.public(), b"message");
            assert_eq!(signature, sign(&one.public(), b"message"));
            assert_ne!(signature, sign(&one.public(), b"messagf"));
            assert_ne!(signature, sign(&other.public(), b"message"));
        }
    }
}
