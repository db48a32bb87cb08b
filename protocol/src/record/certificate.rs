//! Receipts and what a quorum of them proves.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Value;
use crate::{
    JobId, StoreId,
    identity::{Domain, KeyPair, SignedBytes},
    job::{KEEPERS_MAX, VerifiedSpec},
    wire,
};

/// What a keeper signs when it accepts a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptBody {
    /// The job.
    pub job: JobId,
    /// The configuration.
    pub epoch: u32,
    /// The value's sequence number.
    pub seq: u64,
    /// BLAKE3 hash of the value's bytes.
    pub value_hash: [u8; 32],
    /// The store it was accepted in.
    pub store: StoreId,
}

/// A value's bytes with receipts for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The encoded [`Value`].
    pub value_bytes: Vec<u8>,
    /// Each of another keeper.
    pub receipts: Vec<SignedBytes>,
}

/// Why a certificate proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CertificateError {
    /// Its value cannot be read.
    #[error("the record value cannot be read: {0}")]
    Value(String),
    /// It is for another job.
    #[error("the certificate is for another job")]
    OtherJob,
    /// Fewer valid receipts than a quorum.
    #[error("{valid} valid receipts where {quorum} are needed")]
    NoQuorum {
        /// Receipts of distinct keepers and stores that verify.
        valid: usize,
        /// How many it takes.
        quorum: usize,
    },
}

impl Certificate {
    /// One keeper's acceptance of `value`.
    #[must_use]
    pub fn sign(key: &KeyPair, store: StoreId, value: &Value) -> Self {
        let value_bytes = wire::encode(value);
        let receipt = ReceiptBody {
            job: value.job,
            epoch: value.epoch,
            seq: value.seq,
            value_hash: *blake3::hash(&value_bytes).as_bytes(),
            store,
        };
        let receipt = SignedBytes::sign(key, Domain::Receipt, wire::encode(&receipt));
        Self { value_bytes, receipts: vec![receipt] }
    }

    /// The receipt for the birth value of `spec`: what `submitted` waits for.
    #[must_use]
    pub fn birth_receipt(&self, key: &KeyPair, store: StoreId, spec: &VerifiedSpec) -> SignedBytes {
        let birth = Self::sign(key, store, &Value::birth(spec));
        birth.receipts[0].clone()
    }

    /// The value, unverified.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn value(&self) -> Result<Value, CertificateError> {
        wire::decode(&self.value_bytes).map_err(|e| CertificateError::Value(e.to_string()))
    }

    /// The value, if a quorum of the keepers that `spec` names accepted it.
    ///
    /// # Errors
    /// [`CertificateError`] naming what is missing.
    pub fn verify(&self, spec: &VerifiedSpec) -> Result<Value, CertificateError> {
        let value = self.value()?;
        if value.job != spec.job {
            return Err(CertificateError::OtherJob);
        }
        let value_hash = *blake3::hash(&self.value_bytes).as_bytes();
        let mut stores = BTreeSet::new();
        for receipt in self.receipts.iter().take(KEEPERS_MAX) {
            let Ok(bytes) = receipt.verify(Domain::Receipt) else { continue };
            let Ok(body) = wire::decode::<ReceiptBody>(bytes) else { continue };
            let named = spec
                .spec
                .keepers
                .iter()
                .any(|(peer, store)| peer.0 == receipt.signer && *store == body.store);
            let same = body.job == value.job
                && body.epoch == value.epoch
                && body.seq == value.seq
                && body.value_hash == value_hash;
            if named && same {
                stores.insert(body.store);
            }
        }
        let quorum = spec.spec.keepers.len() / 2 + 1;
        if stores.len() >= quorum {
            Ok(value)
        } else {
            Err(CertificateError::NoQuorum { valid: stores.len(), quorum })
        }
    }
}
