//! The acceptor of one record: what a keeper promised and accepted (CASPaxos, Rystsov 2018).

use std::sync::Arc;

use super::{Ballot, Keeper, Link, Replica, Value, follow};
use crate::{
    JobId, UserId,
    identity::SignedBytes,
    job::VerifiedSpec,
    sabotage::{Rule, Sabotage},
    wire,
};

/// Why an acceptor does not do as asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// It promised this ballot.
    Promised(Ballot),
    /// It knows nothing of that epoch yet: the answer counts for nothing.
    NotInit,
    /// That epoch is over.
    Moved,
    /// No value of this record.
    Malformed,
}

/// One record as its keeper holds it.
#[derive(Debug, Clone)]
pub struct Acceptor {
    spec: Arc<VerifiedSpec>,
    links: Vec<Link>,
    keepers: Vec<Keeper>,
    promised: Ballot,
    accepted: Ballot,
    value_bytes: Vec<u8>,
    /// `None` where this node keeps the record no more.
    value: Option<Value>,
    sabotage: Sabotage,
}

impl Acceptor {
    /// A record as it is born. Every keeper makes the same.
    #[must_use]
    pub fn born(spec: Arc<VerifiedSpec>, sabotage: Sabotage) -> Self {
        let value = Value::birth(&spec);
        Self {
            keepers: spec.spec.keepers.clone(),
            spec,
            links: Vec::new(),
            promised: Ballot::ZERO,
            accepted: Ballot::ZERO,
            value_bytes: wire::encode(&value),
            value: Some(value),
            sabotage,
        }
    }

    /// A record whose keepers changed to `keepers`, which `links` lead to, with what another
    /// of them accepted. Without a value it only tells who the keepers are.
    #[must_use]
    pub fn installed(
        spec: Arc<VerifiedSpec>,
        links: Vec<Link>,
        keepers: Vec<Keeper>,
        accepted: Ballot,
        value: Option<Value>,
        sabotage: Sabotage,
    ) -> Self {
        let value_bytes = value.as_ref().map(wire::encode).unwrap_or_default();
        Self { spec, links, keepers, promised: accepted, accepted, value_bytes, value, sabotage }
    }

    /// As it was journalled.
    ///
    /// # Errors
    /// The entry is not a record of ours.
    pub fn restore(replica: Replica, sabotage: Sabotage) -> Result<Self, String> {
        let spec = VerifiedSpec::verify(replica.spec).map_err(|e| e.to_string())?;
        // Proved when they were journalled; who may recover is not known yet.
        let keepers = follow(&spec, &replica.links, |_: UserId| true).map_err(|e| e.to_string())?;
        let value = match replica.value_bytes.as_slice() {
            [] => None,
            bytes => Some(wire::decode(bytes).map_err(|e| e.to_string())?),
        };
        Ok(Self {
            spec: Arc::new(spec),
            links: replica.links,
            keepers,
            promised: replica.promised,
            accepted: replica.accepted,
            value_bytes: replica.value_bytes,
            value,
            sabotage,
        })
    }

    /// What belongs into the journal.
    #[must_use]
    pub fn replica(&self) -> Replica {
        Replica {
            spec: self.spec.signed.clone(),
            links: self.links.clone(),
            promised: self.promised,
            accepted: self.accepted,
            value_bytes: self.value_bytes.clone(),
        }
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.spec.job
    }

    /// The job as its owner signed it.
    #[must_use]
    pub fn spec(&self) -> &Arc<VerifiedSpec> {
        &self.spec
    }

    /// The job as its owner signed it, in its bytes.
    #[must_use]
    pub fn signed_spec(&self) -> &SignedBytes {
        &self.spec.signed
    }

    /// Changes of keepers so far.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        u32::try_from(self.links.len()).unwrap_or(u32::MAX)
    }

    /// From the spec's keepers to those of now.
    #[must_use]
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The keepers of this epoch.
    #[must_use]
    pub fn keepers(&self) -> &[Keeper] {
        &self.keepers
    }

    /// No proposal below this is accepted.
    #[must_use]
    pub fn promised(&self) -> Ballot {
        self.promised
    }

    /// The proposal accepted last.
    #[must_use]
    pub fn accepted(&self) -> Ballot {
        self.accepted
    }

    /// The value accepted last; `None` where this node keeps the record no more.
    #[must_use]
    pub fn value(&self) -> Option<&Value> {
        self.value.as_ref()
    }

    /// The same, as it was received.
    #[must_use]
    pub fn value_bytes(&self) -> &[u8] {
        &self.value_bytes
    }

    fn check_epoch(&self, epoch: u32) -> Result<(), Refused> {
        if epoch < self.epoch() || (epoch == self.epoch() && self.value.is_none()) {
            Err(Refused::Moved)
        } else if epoch > self.epoch() {
            Err(Refused::NotInit)
        } else {
            Ok(())
        }
    }

    /// Promise to accept nothing below `ballot`. What was accepted goes with the answer, once
    /// the promise is durable. The same ballot again gets the same answer: it may have been
    /// lost, and no two proposers have one in common.
    ///
    /// # Errors
    /// A higher ballot was promised, or it is not of this epoch.
    pub fn prepare(&mut self, epoch: u32, ballot: Ballot) -> Result<(), Refused> {
        self.check_epoch(epoch)?;
        if ballot < self.promised && self.sabotage.holds(Rule::PromiseIsKept) {
            return Err(Refused::Promised(self.promised));
        }
        self.promised = ballot;
        Ok(())
    }

    /// Accept a value, and promise `next`. Whether anything changed: the same proposal again
    /// gets the same answer.
    ///
    /// # Errors
    /// A higher ballot was promised, or it is not of this epoch.
    pub fn accept(
        &mut self,
        epoch: u32,
        ballot: Ballot,
        next: Ballot,
        value_bytes: &[u8],
    ) -> Result<bool, Refused> {
        self.check_epoch(epoch)?;
        if ballot == self.accepted && ballot > Ballot::ZERO && self.value_bytes == value_bytes {
            return Ok(false);
        }
        let late = ballot < self.promised || ballot <= self.accepted;
        if late && self.sabotage.holds(Rule::AcceptNeedsPromise) {
            return Err(Refused::Promised(self.promised.max(self.accepted)));
        }
        let value: Value = wire::decode(value_bytes).map_err(|_| Refused::Malformed)?;
        // Values are named by the hash of their bytes: there is one encoding of each.
        let canonical = wire::encode(&value) == value_bytes;
        if value.job != self.job() || value.epoch != epoch || !canonical {
            return Err(Refused::Malformed);
        }
        self.promised = ballot.max(next);
        self.accepted = ballot;
        self.value_bytes = value_bytes.to_vec();
        self.value = Some(value);
        Ok(true)
    }

    /// Whether a steward that holds `ballot`, and has asked for `next` to be promised, is still
    /// the last to have proposed. Any other ballot above, even one of its own, may stand for a
    /// take-over that it does not know of.
    ///
    /// # Errors
    /// A higher ballot was promised, or it is not of this epoch.
    pub fn renew(&self, epoch: u32, ballot: Ballot, next: Ballot) -> Result<(), Refused> {
        self.check_epoch(epoch)?;
        if self.promised <= ballot || self.promised == next {
            Ok(())
        } else {
            Err(Refused::Promised(self.promised))
        }
    }
}
