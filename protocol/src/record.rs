//! The record: one register per job, changed by compare-and-set only.
//!
//! A value names everything about a job that must outlive a node: attempt, ranks,
//! nodes, GPUs and holds, state and outcome. Each value has a sequence number and
//! the hash of its predecessor; each acceptance is a receipt signed by the keeper.
//!
//! In this version a record has one keeper, the first its spec names, and a quorum is
//! one receipt. Callers see only what a replicated register has as well:
//! [`Registers::init`], [`Registers::compare_and_set`], and later an [`Event`] that
//! says whether the value was chosen. They never read what is not yet chosen.

mod ballot;
mod certificate;
mod replica;
mod value;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

pub use ballot::{Ballot, Keeper};
pub use certificate::{
    Certificate, CertificateError, EPOCHS_MAX, ForceRecover, Link, LinkProof, ReceiptBody,
    check_force_recover, check_receipt, follow, keepers_hash, quorum_of, sign_receipt,
};
pub use replica::Replica;
pub use value::{Body, HISTORY_MAX, REASON_BYTES_MAX, StartInfo, Value};

use crate::{
    JobId, PeerId, StoreId,
    identity::{KeyPair, SignedBytes},
    job::VerifiedSpec,
    peer::{Slot, Write},
    wire,
};

/// Most records one keeper keeps.
pub const RECORDS_MAX: usize = 100_000;

/// The largest journal entry taken for a record.
const RESTORED_BYTES_MAX: usize = 64 << 20;

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The value is chosen; the certificate proves it.
    Chosen {
        /// The job.
        job: JobId,
        /// The caller's number for the operation.
        op: u64,
    },
    /// The value in place was not the one expected; nothing was changed.
    Conflict {
        /// The job.
        job: JobId,
        /// The caller's number for the operation.
        op: u64,
    },
}

/// One record as a keeper keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The job.
    pub spec: Arc<VerifiedSpec>,
    /// The chosen value.
    pub value: Value,
    /// Proof that it was chosen.
    pub certificate: Certificate,
}

/// All records this node keeps.
#[derive(Debug)]
pub struct Registers {
    me: PeerId,
    store: StoreId,
    key: KeyPair,
    kept: BTreeMap<JobId, Kept>,
    events: VecDeque<Event>,
    writes: VecDeque<Write>,
}

impl Registers {
    /// No records yet.
    #[must_use]
    pub fn new(key: KeyPair, store: StoreId) -> Self {
        Self {
            me: PeerId(key.public()),
            store,
            key,
            kept: BTreeMap::new(),
            events: VecDeque::new(),
            writes: VecDeque::new(),
        }
    }

    /// Take back a record from the journal.
    ///
    /// # Errors
    /// The journal's bytes are not a record of ours.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<JobId, String> {
        // Ours, and so not bound by what a message may have.
        let replica: Replica =
            wire::decode_limited::<_, RESTORED_BYTES_MAX>(bytes).map_err(|e| e.to_string())?;
        let spec = Arc::new(VerifiedSpec::verify(replica.spec).map_err(|e| e.to_string())?);
        let value: Value = wire::decode(&replica.value_bytes).map_err(|e| e.to_string())?;
        let receipt = sign_receipt(&self.key, self.store, replica.accepted, &value);
        let certificate = Certificate {
            links: replica.links,
            value_bytes: replica.value_bytes,
            receipts: vec![receipt],
        };
        let value = certificate.value().map_err(|e| e.to_string())?;
        let job = spec.job;
        self.kept.insert(job, Kept { spec, value, certificate });
        Ok(job)
    }

    /// The record of `job`, if it is kept here.
    #[must_use]
    pub fn get(&self, job: JobId) -> Option<&Kept> {
        self.kept.get(&job)
    }

    /// Every record kept here, by id.
    pub fn iter(&self) -> impl Iterator<Item = (&JobId, &Kept)> {
        self.kept.iter()
    }

    /// Create the record of `spec` with its birth value. Again gives the same receipt.
    /// The caller has checked that this node and store are named in the spec.
    ///
    /// # Errors
    /// [`RECORDS_MAX`] are kept already.
    pub fn init(&mut self, spec: Arc<VerifiedSpec>) -> Result<SignedBytes, Full> {
        let job = spec.job;
        if let Some(kept) = self.kept.get(&job) {
            let birth = Value::birth(&kept.spec);
            return Ok(sign_receipt(&self.key, self.store, Ballot::ZERO, &birth));
        }
        if self.kept.len() >= RECORDS_MAX {
            return Err(Full);
        }
        let value = Value::birth(&spec);
        let receipt = self.accept(spec, value);
        Ok(receipt)
    }

    /// Replace the value of `job` if its sequence number is `expected_seq`. An event
    /// with `op` follows.
    pub fn compare_and_set(&mut self, job: JobId, expected_seq: u64, op: u64, body: Body) {
        let Some(kept) = self.kept.get(&job) else {
            self.events.push_back(Event::Conflict { job, op });
            return;
        };
        if kept.value.seq != expected_seq {
            self.events.push_back(Event::Conflict { job, op });
            return;
        }
        let value = kept.value.successor(body);
        let spec = kept.spec.clone();
        self.accept(spec, value);
        self.events.push_back(Event::Chosen { job, op });
    }

    /// What became of operations, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What must be durable before anything that follows from it is told to anyone.
    pub fn poll_write(&mut self) -> Option<Write> {
        self.writes.pop_front()
    }

    /// The keeper this node is, with its store.
    #[must_use]
    pub fn identity(&self) -> (PeerId, StoreId) {
        (self.me, self.store)
    }

    fn accept(&mut self, spec: Arc<VerifiedSpec>, value: Value) -> SignedBytes {
        let job = spec.job;
        let ballot = match value.seq {
            1 => Ballot::ZERO,
            seq => Ballot { counter: seq, store: self.store },
        };
        let receipt = sign_receipt(&self.key, self.store, ballot, &value);
        let certificate = Certificate {
            links: Vec::new(),
            value_bytes: wire::encode(&value),
            receipts: vec![receipt.clone()],
        };
        let replica = Replica {
            spec: spec.signed.clone(),
            links: Vec::new(),
            promised: ballot,
            accepted: ballot,
            value_bytes: certificate.value_bytes.clone(),
        };
        self.writes.push_back(Write {
            key: Slot::Record(job).to_bytes(),
            value: Some(wire::encode(&replica)),
        });
        self.kept.insert(job, Kept { spec, value, certificate });
        receipt
    }
}

/// No room for another record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this keeper keeps {RECORDS_MAX} records already")]
pub struct Full;
