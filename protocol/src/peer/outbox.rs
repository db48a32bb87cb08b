//! What a peer wants done: writes, transmits, events. Drained by the driver.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::Event;
use crate::{
    HoldId, JobId, PeerId, StatementId,
    job::{Attempt, Rank},
    message::{Message, Soft},
    wire,
};

/// One entry of the journal: the last write to a key is what counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// An encoded [`Slot`].
    pub key: Vec<u8>,
    /// The new value; `None` removes the entry.
    pub value: Option<Vec<u8>>,
}

/// What can be in the journal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Slot {
    /// The pool's genesis.
    Genesis,
    /// A roster statement.
    Statement(StatementId),
    /// A record kept here.
    Record(JobId),
    /// A hold of the book.
    Hold(HoldId),
    /// A rank this node is committed to, or runs.
    Work(JobId, Attempt, Rank),
    /// An attempt of a steward's that this node will never start.
    Tombstone(PeerId, JobId, Attempt),
    /// The latest stewardship known of a job that changed its steward.
    Term(JobId),
    /// How a rank ended here, until its steward recorded it.
    End(JobId, Attempt, Rank),
    /// A job this node refused to keep, while a copy of its submission could be taken.
    Refused(JobId),
}

impl Slot {
    /// The journal key.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }
}

/// A message to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transmit {
    /// To one peer.
    Direct {
        /// Who.
        to: PeerId,
        /// What.
        message: Message,
    },
    /// To everybody, by gossip; may be lost.
    Gossip(Soft),
}

/// Collects effects in the order they arose.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outbox {
    pub(crate) writes: VecDeque<Write>,
    pub(crate) transmits: VecDeque<Transmit>,
    pub(crate) events: VecDeque<Event>,
    /// Messages of this peer to itself: handled before the call returns. They may run
    /// ahead of the disk, since everything that leaves the node waits for it.
    pub(crate) local: VecDeque<Message>,
    /// Records that changed since the peer last looked.
    pub(crate) changed: Vec<JobId>,
}

impl Outbox {
    pub(crate) fn put<T: Serialize>(&mut self, slot: &Slot, value: &T) {
        self.writes.push_back(Write { key: slot.to_bytes(), value: Some(wire::encode(value)) });
    }

    pub(crate) fn remove(&mut self, slot: &Slot) {
        self.writes.push_back(Write { key: slot.to_bytes(), value: None });
    }

    pub(crate) fn send(&mut self, me: PeerId, to: PeerId, message: Message) {
        if to == me {
            self.local.push_back(message);
        } else {
            self.transmits.push_back(Transmit::Direct { to, message });
        }
    }
}
