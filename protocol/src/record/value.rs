//! The value of a record.

use serde::{Deserialize, Serialize};

use super::Keeper;
use crate::{
    JobId, PeerId,
    job::{
        Attempt, Change, Outcome, RankAssignment, RankRecord, RankState, Removed, Saved, State,
        StopCause, VerifiedSpec,
    },
    wire,
};

/// The longest reason of a state, in bytes: a record must fit into one message.
pub const REASON_BYTES_MAX: usize = 1_024;

/// Most entries of a history; later changes replace the last but one.
pub const HISTORY_MAX: usize = 64;

/// What is chosen: a body with its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    /// The job.
    pub job: JobId,
    /// The configuration's number; 0 while the first keepers keep it.
    pub epoch: u32,
    /// Counts values from 1.
    pub seq: u64,
    /// BLAKE3 hash of the value before; zeros for the first.
    pub prev: [u8; 32],
    /// The content.
    pub body: Body,
    /// The next keepers, where this value ends its epoch: nothing is chosen after it, and the
    /// next epoch begins with exactly its body.
    pub sealed: Option<Vec<Keeper>>,
}

/// What processes need to find each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartInfo {
    /// The address of each rank's node, in rank order.
    pub hosts: Vec<String>,
    /// A port free on rank 0's node.
    pub port: u16,
}

/// Everything about a job that changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Body {
    /// The keeper that drives the job.
    pub steward: PeerId,
    /// Counts stewardships from 1.
    pub term: u64,
    /// States so far; the last is the current one. Never empty.
    pub history: Vec<Change>,
    /// The last attempt's number; 0 before the first.
    pub attempt: Attempt,
    /// The ranks of the current attempt; empty while unassigned.
    pub ranks: Vec<RankRecord>,
    /// What every rank is told at its start; set with [`State::Starting`].
    pub start: Option<StartInfo>,
    /// Why it is being ended, if it is.
    pub stop: Option<StopCause>,
    /// Attempts that were assigned and could not be started.
    pub failed_starts: u32,
    /// The processes of the current attempt have leases that bind: a node that was silent for
    /// longer runs none of them any more. Never set again within an attempt.
    pub bound: bool,
    /// Attempts that ran, failed and were followed by another.
    pub retried: u32,
    /// The majority of its keepers was lost, and somebody said so: it may have missed changes.
    pub recovered: bool,
    /// What the next attempt begins with, where one was given up: for each rank at most
    /// [`crate::job::SAVED_MAX`] copies of its `keep/`, the best first.
    pub saved: Vec<Saved>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What it left was given up, of a job that is over: nobody needs to hold it any more.
    pub removed: Option<Removed>,
}

impl Value {
    /// The first value of a job: a pure function of its spec, so that every keeper
    /// makes the same.
    #[must_use]
    pub fn birth(spec: &VerifiedSpec) -> Self {
        let at_ms = spec.spec.submitted_at_ms;
        let change = |state, reason: &str| Change { state, at_ms, reason: reason.to_owned() };
        Self {
            job: spec.job,
            epoch: 0,
            seq: 1,
            prev: [0; 32],
            body: Body {
                steward: spec.spec.keepers[0].0,
                term: 1,
                history: vec![
                    change(State::New, "submitted"),
                    change(State::Waiting, "being auctioned"),
                ],
                attempt: Attempt(0),
                ranks: Vec::new(),
                start: None,
                stop: None,
                failed_starts: 0,
                bound: false,
                retried: 0,
                recovered: false,
                saved: Vec::new(),
                outcome: None,
                removed: None,
            },
            sealed: None,
        }
    }

    /// The next value, with `body`.
    #[must_use]
    pub fn successor(&self, body: Body) -> Self {
        self.successor_of(self.hash(), body)
    }

    /// The same, where this one's hash is known.
    #[must_use]
    pub fn successor_of(&self, hash: [u8; 32], body: Body) -> Self {
        Self { job: self.job, epoch: self.epoch, seq: self.seq + 1, prev: hash, body, sealed: None }
    }

    /// The value that ends this one's epoch, with the same body.
    #[must_use]
    pub fn seal(&self, next: Vec<Keeper>) -> Self {
        Self { sealed: Some(next), ..self.successor(self.body.clone()) }
    }

    /// The first value of the epoch after the one that this value ends: a pure function of
    /// it, so that every new keeper makes the same.
    #[must_use]
    pub fn first_of_next_epoch(&self) -> Self {
        Self { epoch: self.epoch + 1, ..self.successor(self.body.clone()) }
    }

    /// The BLAKE3 hash of this value's bytes, as its receipts name it.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&wire::encode(self)).as_bytes()
    }
}

impl Body {
    /// The current state.
    #[must_use]
    pub fn state(&self) -> State {
        self.history.last().map_or(State::New, |change| change.state)
    }

    /// Enter `state`. Entering the current state again changes nothing.
    pub fn enter(&mut self, state: State, at_ms: u64, reason: impl Into<String>) {
        if self.state() == state {
            return;
        }
        if self.history.len() >= HISTORY_MAX {
            self.history.remove(HISTORY_MAX - 2);
        }
        let mut reason = reason.into();
        while reason.len() > REASON_BYTES_MAX {
            reason.pop();
        }
        self.history.push(Change { state, at_ms, reason });
    }

    /// The nodes of the current attempt, each once, by id.
    #[must_use]
    pub fn nodes(&self) -> Vec<PeerId> {
        let mut nodes: Vec<PeerId> = self.ranks.iter().map(|rank| rank.assignment.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// What the current attempt gives to `node`.
    pub fn assigned_to(&self, node: PeerId) -> impl Iterator<Item = &RankAssignment> {
        self.ranks.iter().map(|rank| &rank.assignment).filter(move |a| a.node == node)
    }

    /// Whether every rank is at least at `state`.
    #[must_use]
    pub fn all_at_least(&self, state: RankState) -> bool {
        self.ranks.iter().all(|rank| rank.state >= state)
    }
}
