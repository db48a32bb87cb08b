//! Copies: what the node around a peer is told to hold, and what it says it holds.

use std::sync::Arc;

use super::Peer;
use crate::{
    BlobId, JobId, Now, PeerId, UserId,
    bidder::WorkId,
    copies::CopyOrder,
    job::{Attempt, Rank},
    message::{Message, Reply},
};

impl Peer {
    /// What this node is to hold of `job`, beside what it made itself; `None`: nothing, or
    /// nothing any more. What is here already stays until the job's data was given up
    /// ([`crate::record::Body::removed`]) or has expired: others may know of it.
    /// [`super::Event::CopiesChanged`] says when to look again.
    #[must_use]
    pub fn copies_wanted(&self, job: JobId) -> Option<CopyOrder> {
        let kept = self.registers.get(job)?;
        let duty = self.copies.duty(job)?;
        Some(CopyOrder {
            spec: Arc::clone(&kept.spec),
            links: kept.certificate.links.clone(),
            inputs: duty.inputs,
            saved: duty.saved.clone(),
            ranks: duty.ranks.clone(),
        })
    }

    /// What a rank left (its log as long as the record says, `keep/` and artifacts) is all here
    /// and durable. To be said again after each start, for what is on disk then.
    pub fn copied(&mut self, job: JobId, attempt: Attempt, rank: Rank, now: Now) {
        self.copies.copied(job, attempt, rank);
        self.finish(now);
    }

    /// This copy of the `keep/` of a rank that ran, or runs, elsewhere is here and durable. To be
    /// said again after each start, for what is on disk then.
    pub fn save_held(
        &mut self,
        job: JobId,
        attempt: Attempt,
        rank: Rank,
        seq: u64,
        tree: BlobId,
        now: Now,
    ) {
        self.copies.save_held(job, attempt, rank, seq, tree);
        self.finish(now);
    }

    /// Nothing of this rank is held here any more, or not all of what was: it went bad, or it
    /// was removed.
    pub fn copy_lost(&mut self, job: JobId, attempt: Attempt, rank: Rank, now: Now) {
        self.copies.lost(job, attempt, rank);
        self.finish(now);
    }

    /// What is wanted of `job` cannot be copied here now, for this reason: no room, or no source
    /// has it. Others are asked instead, and this node again after [`crate::copies::CANNOT_MS`],
    /// or [`Peer::can_copy`].
    pub fn cannot_copy(&mut self, job: JobId, reason: String, now: Now) {
        self.copies.cannot(job, reason, now);
        self.finish(now);
    }

    /// What was in the way of copying `job` here is not any more.
    pub fn can_copy(&mut self, job: JobId, now: Now) {
        self.copies.can(job);
        self.finish(now);
    }

    /// The process of a rank runs here, or ran until this node started again, and this is its
    /// `keep/` as it is now, complete and durable here. `seq` counts such copies of this rank in
    /// this attempt; the same again changes nothing.
    pub fn saved(&mut self, id: WorkId, seq: u64, tree: BlobId, now: Now) {
        self.copies.saved(id, seq, tree);
        self.finish(now);
    }

    /// For how long this node holds what a job left after it is over, in milliseconds; 30 days
    /// where this is never said.
    pub fn set_keep_done(&mut self, keep_done_ms: u64, now: Now) {
        self.copies.keep_done_ms = keep_done_ms;
        self.finish(now);
    }

    pub(super) fn handle_copies(&mut self, from: PeerId, message: Message, now: Now) {
        let _ = (from, message, now);
    }

    pub(super) fn remove_data(&mut self, user: UserId, job: JobId, undo: bool, now: Now) -> Reply {
        let _ = (user, job, undo, now);
        Reply::Denied { reason: "jobs cannot be removed yet".to_owned() }
    }
}
