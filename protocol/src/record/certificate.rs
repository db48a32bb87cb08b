//! Receipts and what a quorum of them proves.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Ballot, Keeper, Value};
use crate::{
    JobId, PoolId, StoreId, UserId,
    identity::{Domain, KeyPair, SignedBytes},
    job::{KEEPERS_MAX, VerifiedSpec},
    wire,
};

/// Most configurations a record goes through; it keeps the last for good. Bounds what
/// proves a value.
pub const EPOCHS_MAX: usize = 256;

/// What a keeper signs when it accepts a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptBody {
    /// The job.
    pub job: JobId,
    /// The configuration.
    pub epoch: u32,
    /// The proposal it was accepted in.
    pub ballot: Ballot,
    /// The value's sequence number.
    pub seq: u64,
    /// BLAKE3 hash of the value's bytes.
    pub value_hash: [u8; 32],
    /// Of a value that seals its epoch: the hash of the next keepers.
    pub sealed: Option<[u8; 32]>,
    /// The store it was accepted in.
    pub store: StoreId,
}

/// From one configuration to the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The keepers of the next epoch.
    pub next: Vec<Keeper>,
    /// Why they are.
    pub proof: LinkProof,
}

/// What makes a [`Link`] true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkProof {
    /// A quorum of the epoch accepted a value that names them and ends the epoch: receipts
    /// with [`ReceiptBody::sealed`].
    Sealed(Vec<SignedBytes>),
    /// The owner or an admin gave the old keepers up for lost: a signed [`ForceRecover`].
    Forced(SignedBytes),
}

/// An owner's or admin's word that the majority of a record's keepers is lost for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForceRecover {
    /// The pool.
    pub pool: PoolId,
    /// The job.
    pub job: JobId,
    /// Who says so, and signs it.
    pub by: UserId,
    /// The epoch that is given up.
    pub epoch: u32,
    /// Who keeps the record from now on.
    pub next: Vec<Keeper>,
    /// The value to go on from: the last that a surviving keeper accepted.
    pub value_hash: [u8; 32],
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// A value's bytes with receipts for it, and what proves that their signers keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// From the keepers that the spec names to those of the value's epoch.
    pub links: Vec<Link>,
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
    /// The value is of another configuration than the links lead to.
    #[error("the value is of epoch {value}, the links lead to epoch {links}")]
    OtherEpoch {
        /// The value's.
        value: u32,
        /// Links.
        links: usize,
    },
    /// A change of keepers is not proved.
    #[error("the keepers of epoch {epoch} are not proved: {reason}")]
    Link {
        /// The epoch it leads to.
        epoch: usize,
        /// What is missing.
        reason: String,
    },
    /// Fewer valid receipts than a quorum.
    #[error("{valid} valid receipts where {quorum} are needed")]
    NoQuorum {
        /// Receipts of distinct keepers and stores that verify.
        valid: usize,
        /// How many it takes.
        quorum: usize,
    },
}

/// How many of `keepers` make a majority.
#[must_use]
pub const fn quorum_of(keepers: usize) -> usize {
    keepers / 2 + 1
}

/// The hash of a configuration, as a sealing receipt names it.
#[must_use]
pub fn keepers_hash(keepers: &[Keeper]) -> [u8; 32] {
    *blake3::hash(&wire::encode(&keepers)).as_bytes()
}

/// One keeper's acceptance of `value`, whose bytes have this hash, at `ballot`.
#[must_use]
pub fn sign_receipt(
    key: &KeyPair,
    store: StoreId,
    ballot: Ballot,
    value: &Value,
    value_hash: [u8; 32],
) -> SignedBytes {
    let body = ReceiptBody {
        job: value.job,
        epoch: value.epoch,
        ballot,
        seq: value.seq,
        value_hash,
        sealed: value.sealed.as_deref().map(keepers_hash),
        store,
    };
    SignedBytes::sign(key, Domain::Receipt, wire::encode(&body))
}

/// The body of a receipt that one of `keepers` signed.
#[must_use]
pub fn check_receipt(receipt: &SignedBytes, keepers: &[Keeper]) -> Option<ReceiptBody> {
    let body: ReceiptBody = wire::decode(receipt.verify(Domain::Receipt).ok()?).ok()?;
    let named = |(peer, store): &Keeper| peer.0 == receipt.signer && *store == body.store;
    keepers.iter().any(named).then_some(body)
}

/// Distinct stores of `keepers` whose receipts are alike in all but the store, and as
/// `wanted` says.
fn agreeing(
    receipts: &[SignedBytes],
    keepers: &[Keeper],
    wanted: impl Fn(&ReceiptBody) -> bool,
) -> usize {
    let mut stores = BTreeSet::new();
    let mut first: Option<ReceiptBody> = None;
    for receipt in receipts.iter().take(KEEPERS_MAX) {
        let Some(body) = check_receipt(receipt, keepers) else { continue };
        let like_first = first
            .as_ref()
            .is_none_or(|first| ReceiptBody { store: body.store, ..first.clone() } == body);
        if wanted(&body) && like_first {
            stores.insert(body.store);
            first.get_or_insert(body);
        }
    }
    stores.len()
}

/// Whether no node and no store is named twice.
#[must_use]
pub fn are_distinct(keepers: &[Keeper]) -> bool {
    let nodes: BTreeSet<_> = keepers.iter().map(|(node, _)| node).collect();
    let stores: BTreeSet<_> = keepers.iter().map(|(_, store)| store).collect();
    nodes.len() == keepers.len() && stores.len() == keepers.len()
}

impl Link {
    /// Whether `first` is the first value of the epoch that this link leads to, as far as a link
    /// tells: it follows the value that was sealed, or that the recovery goes on from.
    #[must_use]
    pub fn leads_to(&self, first: &Value) -> bool {
        match &self.proof {
            LinkProof::Sealed(receipts) => receipts.iter().any(|receipt| {
                let body = wire::decode::<ReceiptBody>(&receipt.bytes);
                body.is_ok_and(|body| body.value_hash == first.prev && body.seq + 1 == first.seq)
            }),
            LinkProof::Forced(signed) => wire::decode::<ForceRecover>(&signed.bytes)
                .is_ok_and(|forced| forced.value_hash == first.prev),
        }
    }
}

/// The keepers that `links` lead to, from those that the spec names.
///
/// # Errors
/// A link is not proved. `may_recover` says whether a user may give this job's keepers up.
pub fn follow(
    spec: &VerifiedSpec,
    links: &[Link],
    may_recover: impl Fn(UserId) -> bool,
) -> Result<Vec<Keeper>, CertificateError> {
    let mut keepers = spec.spec.keepers.clone();
    if links.len() > EPOCHS_MAX {
        let reason = format!("a record has at most {EPOCHS_MAX} configurations");
        return Err(CertificateError::Link { epoch: links.len(), reason });
    }
    for (epoch, link) in links.iter().enumerate() {
        let bad = |reason: String| CertificateError::Link { epoch: epoch + 1, reason };
        if link.next.is_empty() || link.next.len() > KEEPERS_MAX {
            return Err(bad(format!("{} keepers", link.next.len())));
        }
        if !are_distinct(&link.next) {
            return Err(bad("a keeper is named twice".to_owned()));
        }
        match &link.proof {
            LinkProof::Sealed(receipts) => {
                let seal = Some(keepers_hash(&link.next));
                let valid = agreeing(receipts, &keepers, |body| {
                    body.job == spec.job && body.epoch as usize == epoch && body.sealed == seal
                });
                let quorum = quorum_of(keepers.len());
                if valid < quorum {
                    return Err(bad(format!("{valid} valid receipts where {quorum} are needed")));
                }
            }
            LinkProof::Forced(signed) => {
                let forced = check_force_recover(signed, spec).map_err(&bad)?;
                if forced.epoch as usize != epoch || forced.next != link.next {
                    return Err(bad("the recovery is of another epoch".to_owned()));
                }
                if !may_recover(forced.by) {
                    return Err(bad("recovered by somebody who has no right to".to_owned()));
                }
            }
        }
        keepers.clone_from(&link.next);
    }
    Ok(keepers)
}

/// The content of a signed [`ForceRecover`] for the job of `spec`.
///
/// # Errors
/// Why it is not in order.
pub fn check_force_recover(
    signed: &SignedBytes,
    spec: &VerifiedSpec,
) -> Result<ForceRecover, String> {
    let bytes = signed.verify(Domain::ForceRecover).map_err(|e| e.to_string())?;
    let forced: ForceRecover = wire::decode(bytes).map_err(|e| e.to_string())?;
    if forced.by.0 != signed.signer || forced.pool != spec.spec.pool || forced.job != spec.job {
        return Err("the recovery is not for this job, or not signed by who it names".to_owned());
    }
    Ok(forced)
}

impl Certificate {
    /// The value, unverified.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn value(&self) -> Result<Value, CertificateError> {
        wire::decode(&self.value_bytes).map_err(|e| CertificateError::Value(e.to_string()))
    }

    /// The value, if a quorum of the keepers that the links lead to accepted it.
    /// `may_recover` says whether a user may give this job's keepers up.
    ///
    /// # Errors
    /// [`CertificateError`] naming what is missing.
    pub fn verify(
        &self,
        spec: &VerifiedSpec,
        may_recover: impl Fn(UserId) -> bool,
    ) -> Result<Value, CertificateError> {
        let value = self.value()?;
        if value.job != spec.job {
            return Err(CertificateError::OtherJob);
        }
        if value.epoch as usize != self.links.len() {
            return Err(CertificateError::OtherEpoch {
                value: value.epoch,
                links: self.links.len(),
            });
        }
        let keepers = follow(spec, &self.links, may_recover)?;
        let value_hash = *blake3::hash(&self.value_bytes).as_bytes();
        let valid = agreeing(&self.receipts, &keepers, |body| {
            body.job == value.job
                && body.epoch == value.epoch
                && body.seq == value.seq
                && body.value_hash == value_hash
        });
        let quorum = quorum_of(keepers.len());
        if valid >= quorum { Ok(value) } else { Err(CertificateError::NoQuorum { valid, quorum }) }
    }
}
