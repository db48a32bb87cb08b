//! Entries of the book: holds, and ranks this node is committed to.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    HoldId, JobId, Now, PeerId,
    identity::SignedBytes,
    job::{Attempt, Rank, RankAssignment, VerifiedSpec},
    message::Key,
    peer::Slot,
    record::Certificate,
    request::Grant,
};

/// Resources kept for a job for a short while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Its number.
    pub id: HoldId,
    /// The job and its place in the order.
    pub key: Key,
    /// Who may pin, renew and release it.
    pub steward: PeerId,
    /// The process group it is for.
    pub group: u32,
    /// What is held.
    pub grant: Grant,
    /// About to be assigned: cannot be wounded, will not be renewed.
    pub pinned: bool,
    /// Boot-clock milliseconds.
    pub expiry_ms: u64,
    /// The same moment on the wall clock: what is left of it after a reboot, when the
    /// boot clock started anew.
    pub expiry_wall_ms: u64,
}

impl Hold {
    pub(super) fn last(&mut self, ms: u64, now: Now) {
        self.expiry_ms = now.after(ms);
        self.expiry_wall_ms = now.wall_ms.saturating_add(ms);
    }

    /// Fit the expiry to a boot clock that may have started anew; whether the hold is
    /// still to be kept. It ends by whichever clock says so first: to end early only
    /// costs a refusal.
    pub(super) fn survives(&mut self, longest_ms: u64, now: Now) -> bool {
        let left_ms = self.expiry_wall_ms.saturating_sub(now.wall_ms);
        if left_ms == 0 || left_ms > longest_ms || self.expiry_ms > now.after(longest_ms) {
            return false;
        }
        self.expiry_ms = self.expiry_ms.min(now.after(left_ms));
        true
    }
}

/// A rank of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkId {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
    /// The rank.
    pub rank: Rank,
}

impl WorkId {
    pub(crate) const fn slot(self) -> Slot {
        Slot::Work(self.job, self.attempt, self.rank)
    }

    pub(crate) const fn end_slot(self) -> Slot {
        Slot::End(self.job, self.attempt, self.rank)
    }
}

/// How far a rank is on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Named in the record; prepares, or waits for its start.
    Committed {
        /// When it was committed, on the boot clock.
        since_ms: u64,
        /// When it is given up, on the boot clock.
        until_ms: u64,
    },
    /// Told to start: a process may exist from here on.
    Starting,
    /// Its process runs.
    Running,
    /// Its process ended; results are being gathered.
    Draining,
}

/// A rank this node is committed to, or runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The rank.
    pub id: WorkId,
    /// Who drives the job.
    pub steward: PeerId,
    /// Its stewardship.
    pub term: u64,
    /// What the record gives it.
    pub assignment: RankAssignment,
    /// How far it is.
    pub phase: Phase,
    /// The port and host it announced once its code and data were in place.
    pub prepared: Option<(u16, String)>,
    /// The job as its owner signed it.
    pub signed_spec: SignedBytes,
    /// Proof that the record names this node: whoever has the inputs gives them for it.
    pub certificate: Certificate,
    /// The same, verified; always present once taken into the book.
    #[serde(skip)]
    pub spec: Option<Arc<VerifiedSpec>>,
}

impl Work {
    /// Who keeps the record, by what named this node.
    pub(super) fn keepers(&self) -> Vec<PeerId> {
        let first = self.spec.as_ref().map_or(&[][..], |spec| &spec.spec.keepers);
        let keepers = self.certificate.links.last().map_or(first, |link| &link.next);
        keepers.iter().map(|(keeper, _)| *keeper).collect()
    }
}
