//! Bytes with a signature over a named domain.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{KeyPair, PublicKey, Signature};

/// What kind of thing a signature covers. The text is part of what is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// A roster statement.
    Statement,
    /// A joiner's proof that it holds the invite's key.
    InviteProof,
    /// A joiner's proof that it holds the user's key.
    JoinProof,
    /// A node's advert.
    Advert,
    /// A job as its owner signed it.
    JobSpec,
    /// A user's request to one or several nodes.
    UserRequest,
    /// A keeper's acceptance of a record value.
    Receipt,
    /// A keeper's announcement of a job's latest record value.
    Head,
    /// An owner's or admin's word that a record's keepers are lost.
    ForceRecover,
}

impl Domain {
    /// The number is the version of what is signed: another encoding, another number, so that
    /// bytes of one version are never taken for those of another.
    const fn tag(self) -> &'static [u8] {
        match self {
            Self::Statement => b"p2pit/statement/1",
            Self::InviteProof => b"p2pit/invite-proof/1",
            Self::JoinProof => b"p2pit/join-proof/1",
            Self::Advert => b"p2pit/advert/1",
            Self::JobSpec => b"p2pit/job-spec/2",
            Self::UserRequest => b"p2pit/user-request/1",
            Self::Receipt => b"p2pit/receipt/2",
            Self::Head => b"p2pit/head/2",
            Self::ForceRecover => b"p2pit/force-recover/1",
        }
    }

    fn message(self, bytes: &[u8]) -> Vec<u8> {
        let mut message = Vec::with_capacity(self.tag().len() + 1 + bytes.len());
        message.extend_from_slice(self.tag());
        message.push(0);
        message.extend_from_slice(bytes);
        message
    }
}

/// Bytes, who signed them, and the signature over domain and bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SignedBytes {
    /// The signed bytes exactly as their author made them.
    #[serde(with = "super::text")]
    pub bytes: Vec<u8>,
    /// The author's key.
    pub signer: PublicKey,
    /// Over `domain ‖ 0x00 ‖ bytes`.
    pub signature: Signature,
}

/// The signature does not belong to these bytes, this key and this domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("signature does not verify")]
pub struct SignatureError;

impl SignedBytes {
    /// Sign `bytes` as a thing of kind `domain`.
    #[must_use]
    pub fn sign(key: &KeyPair, domain: Domain, bytes: Vec<u8>) -> Self {
        let signature = key.sign_raw(&domain.message(&bytes));
        Self { bytes, signer: key.public(), signature }
    }

    /// The bytes, if the signature is the signer's over them in `domain`.
    ///
    /// # Errors
    /// [`SignatureError`] where it is not.
    pub fn verify(&self, domain: Domain) -> Result<&[u8], SignatureError> {
        if self.signer.verify_raw(&domain.message(&self.bytes), &self.signature) {
            Ok(&self.bytes)
        } else {
            Err(SignatureError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_holds_only_for_its_domain_key_and_bytes() {
        let key = KeyPair::from_seed(&[7; 32]);
        let signed = SignedBytes::sign(&key, Domain::Advert, b"hello".to_vec());
        assert_eq!(signed.verify(Domain::Advert), Ok(&b"hello"[..]));
        assert_eq!(signed.verify(Domain::Statement), Err(SignatureError));

        let mut other_bytes = signed.clone();
        other_bytes.bytes.push(b'!');
        assert_eq!(other_bytes.verify(Domain::Advert), Err(SignatureError));

        let mut other_key = signed.clone();
        other_key.signer = KeyPair::from_seed(&[8; 32]).public();
        assert_eq!(other_key.verify(Domain::Advert), Err(SignatureError));

        let mut short = signed;
        short.signature.0.pop();
        assert_eq!(short.verify(Domain::Advert), Err(SignatureError));
    }
}
