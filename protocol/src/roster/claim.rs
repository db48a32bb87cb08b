//! A person and a machine saying together: this machine is mine, let us in.
//!
//! A claim is signed twice over the same bytes, by the user's key (in the CLI, which
//! alone holds it) and by the node's key (in the daemon). So nobody can put another
//! person's machine under their own name, nor use a machine to speak for a person.
//! A claim admits its node once: after the node left, it takes a new claim.

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Name, statement::is_plain_text};
use crate::{
    identity::{
        Domain, KeyPair, PeerId, PoolId, PublicKey, Signature, SignedBytes, StatementId, UserId,
    },
    wire,
};

/// The longest encoding of a claim, in bytes.
pub const CLAIM_BYTES_MAX: usize = 1 << 10;

/// How far a claim's date may be from the clock of the door that is shown it: the
/// time a joiner has to find a door after the CLI signed. Only doors look at it.
pub const CLAIM_AGE_MS_MAX: u64 = 10 * 60 * 1000;

/// What the user and the node that join say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinClaim {
    /// The pool to join.
    pub pool: PoolId,
    /// The person.
    pub user: UserId,
    /// The name the person wishes; of no effect where the user is known already.
    pub username: Name,
    /// The name in full.
    pub full_name: Option<String>,
    /// The machine.
    pub node: PeerId,
    /// The name wished for it.
    pub node_name: Name,
    /// Whether it offers nothing.
    pub client: bool,
    /// When the user signed, by the wall clock.
    pub wall_ms: u64,
    /// Random, so that a machine that left can join again with a new claim.
    pub nonce: [u8; 16],
}

/// A claim: the BLAKE3 hash of its bytes, whatever the signatures.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClaimId(pub [u8; 32]);

impl fmt::Debug for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0[..5]))
    }
}

/// A claim's bytes with both signatures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedClaim {
    bytes: Vec<u8>,
    user_signature: Signature,
    node_signature: Signature,
}

/// Why a claim does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ClaimError {
    /// Not the bytes of a claim.
    #[error("claim does not decode")]
    Malformed(#[source] wire::DecodeError),
    /// A full name that is too long or not plain text.
    #[error("full name in the claim is too long or not plain text")]
    Text,
    /// The user's signature is not over these bytes.
    #[error("claim is not signed by user {0}")]
    User(UserId),
    /// The node's signature is not over these bytes.
    #[error("claim is not signed by node {0}")]
    Node(PeerId),
}

impl JoinClaim {
    /// The bytes to sign.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// The claim in `bytes`, not yet known to be signed: for showing before signing.
    ///
    /// # Errors
    /// [`ClaimError`] where they are not one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ClaimError> {
        let claim: Self =
            wire::decode_limited::<_, CLAIM_BYTES_MAX>(bytes).map_err(ClaimError::Malformed)?;
        if claim.full_name.as_deref().is_some_and(|name| !is_plain_text(name)) {
            return Err(ClaimError::Text);
        }
        Ok(claim)
    }

    /// Sign the bytes of a claim as its user.
    ///
    /// # Errors
    /// [`ClaimError`] where the bytes are not a claim of that user.
    pub fn sign(bytes: Vec<u8>, user: &KeyPair) -> Result<SignedBytes, ClaimError> {
        let claim = Self::from_bytes(&bytes)?;
        if claim.user.0 != user.public() {
            return Err(ClaimError::User(claim.user));
        }
        Ok(SignedBytes::sign(user, Domain::JoinProof, bytes))
    }
}

impl SignedClaim {
    /// Add the node's signature to what its user signed.
    ///
    /// # Errors
    /// [`ClaimError`] where either is not who the claim names.
    pub fn countersign(user_signed: SignedBytes, node: &KeyPair) -> Result<Self, ClaimError> {
        let node_signature =
            SignedBytes::sign(node, Domain::JoinProof, user_signed.bytes.clone()).signature;
        let signed = Self {
            bytes: user_signed.bytes,
            user_signature: user_signed.signature,
            node_signature,
        };
        signed.open()?;
        Ok(signed)
    }

    /// The claim, if both signatures hold.
    ///
    /// # Errors
    /// [`ClaimError`] where one does not.
    pub fn open(&self) -> Result<JoinClaim, ClaimError> {
        let claim = JoinClaim::from_bytes(&self.bytes)?;
        if !self.is_signed_by(claim.user.0, &self.user_signature) {
            return Err(ClaimError::User(claim.user));
        }
        if !self.is_signed_by(claim.node.0, &self.node_signature) {
            return Err(ClaimError::Node(claim.node));
        }
        Ok(claim)
    }

    /// The claim's id.
    #[must_use]
    pub fn id(&self) -> ClaimId {
        ClaimId(*blake3::hash(&self.bytes).as_bytes())
    }

    fn is_signed_by(&self, signer: PublicKey, signature: &Signature) -> bool {
        let signed =
            SignedBytes { bytes: self.bytes.clone(), signer, signature: signature.clone() };
        signed.verify(Domain::JoinProof).is_ok()
    }
}

/// A joiner's proof that it holds the key of `invite`, bound to one claim.
#[must_use]
pub fn prove_invite(
    invite_key: &KeyPair,
    pool: PoolId,
    invite: StatementId,
    claim: ClaimId,
) -> SignedBytes {
    SignedBytes::sign(invite_key, Domain::InviteProof, invite_proof_bytes(pool, invite, claim))
}

pub(crate) fn invite_proof_holds(
    proof: &SignedBytes,
    invite_key: PublicKey,
    pool: PoolId,
    invite: StatementId,
    claim: ClaimId,
) -> bool {
    proof.signer == invite_key
        && proof.verify(Domain::InviteProof)
            == Ok(invite_proof_bytes(pool, invite, claim).as_slice())
}

fn invite_proof_bytes(pool: PoolId, invite: StatementId, claim: ClaimId) -> Vec<u8> {
    [pool.0, invite.0, claim.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_holds_only_with_the_signatures_of_its_user_and_its_node() {
        let (user, node) = (KeyPair::from_seed(&[1; 32]), KeyPair::from_seed(&[2; 32]));
        let claim = JoinClaim {
            pool: PoolId([7; 32]),
            user: UserId(user.public()),
            username: Name::new("ann").unwrap(),
            full_name: None,
            node: PeerId(node.public()),
            node_name: Name::new("box").unwrap(),
            client: false,
            wall_ms: 1,
            nonce: [0; 16],
        };
        let by_user = JoinClaim::sign(claim.to_bytes(), &user).unwrap();
        let signed = SignedClaim::countersign(by_user.clone(), &node).unwrap();
        assert_eq!(signed.open(), Ok(claim.clone()));

        assert_eq!(
            JoinClaim::sign(claim.to_bytes(), &node),
            Err(ClaimError::User(claim.user)),
            "another user's claim cannot be signed by mistake"
        );
        assert_eq!(
            SignedClaim::countersign(by_user, &user),
            Err(ClaimError::Node(claim.node)),
            "nobody brings another's machine"
        );
        let mut forged = signed;
        forged.user_signature = forged.node_signature.clone();
        assert_eq!(forged.open(), Err(ClaimError::User(claim.user)));
    }
}
