//! Copies: what the node around a peer is told to hold, and what it says it holds.

use std::sync::Arc;

use super::{Event, Peer};
use crate::{
    BlobId, JobId, Now, PeerId, UserId,
    bidder::WorkId,
    copies::{CopyOrder, SaveOrder, Scene},
    job::{Attempt, Rank, RankState, State},
    message::{Message, Reply},
};

impl Peer {
    /// What is still to be brought here of `job`; `None`: nothing. What is here already stays
    /// until the job's data was given up ([`crate::record::Body::removed`]) or has expired, also
    /// where an order that named it is gone: others may count on it.
    /// [`Event::CopiesChanged`] says when to look again.
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
    /// and durable. To be said again after each start, for what is on disk then, before an order
    /// is carried out.
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
        let id = WorkId { job, attempt, rank };
        self.copies.save_held(id, seq, tree);
        if let Some(node) = self.runs_on(id) {
            self.out.send(self.me, node, Message::SaveHeld { job, attempt, rank, seq });
        }
        self.finish(now);
    }

    /// Not all of what was held of this rank is here any more: it went bad, or it was removed.
    pub fn copy_lost(&mut self, job: JobId, attempt: Attempt, rank: Rank, now: Now) {
        self.copies.lost(job, attempt, rank);
        self.tell_of_copies(job);
        self.finish(now);
    }

    /// What is wanted of `job` cannot be copied here now, for this reason: no room, or no source
    /// has it. Others are asked instead, and this node again after [`crate::copies::CANNOT_MS`],
    /// or [`Peer::can_copy`].
    pub fn cannot_copy(&mut self, job: JobId, reason: String, now: Now) {
        self.copies.cannot(job, reason, now);
        self.tell_of_copies(job);
        self.finish(now);
    }

    /// What was in the way of copying `job` here is not any more.
    pub fn can_copy(&mut self, job: JobId, now: Now) {
        self.copies.can(job);
        self.tell_of_copies(job);
        self.finish(now);
    }

    /// The process of a rank runs here, or ran until this node started again, and this is its
    /// `keep/` as it is now, complete and durable here. `seq` counts such copies of this rank in
    /// this attempt; the same again changes nothing. To be said again after each start, for the
    /// newest of each rank.
    pub fn saved(&mut self, id: WorkId, seq: u64, tree: BlobId, now: Now) {
        let keepers = self.bidder.keepers_of_work(id).or_else(|| self.bidder.keepers_of_end(id));
        self.copies.saved(id, (seq, tree), keepers.unwrap_or_default(), now);
        self.finish(now);
    }

    /// For how long this node holds what a job left after it is over, in milliseconds; 30 days
    /// where this is never said.
    pub fn set_keep_done(&mut self, keep_done_ms: u64, now: Now) {
        self.copies.keep_done_ms = keep_done_ms;
        self.copies.look_around = true;
        self.finish(now);
    }

    fn tell_of_copies(&mut self, job: JobId) {
        if self.shy_until_ms.is_some() || self.store_refused {
            return;
        }
        if let Some(kept) = self.registers.get(job) {
            self.copies.tell(kept, &mut self.out);
        }
    }

    /// The node that runs this rank, as the record here says.
    fn runs_on(&self, id: WorkId) -> Option<PeerId> {
        let body = &self.registers.get(id.job)?.value.body;
        let record = body.ranks.iter().find(|record| record.assignment.rank == id.rank)?;
        let runs = body.attempt == id.attempt && record.state != RankState::Ended;
        runs.then_some(record.assignment.node)
    }

    pub(super) fn handle_copies(&mut self, from: PeerId, message: Message, now: Now) {
        if self.shy_until_ms.is_some() || self.store_refused {
            return;
        }
        match message {
            Message::Save { job, attempt, rank, seq, tree } => {
                let id = WorkId { job, attempt, rank };
                if self.runs_on(id) != Some(from) {
                    return;
                }
                match self.copies.saved_here(id).filter(|held| *held >= seq) {
                    Some(seq) => {
                        let held = Message::SaveHeld { job, attempt, rank, seq };
                        self.out.send(self.me, from, held);
                    }
                    None => {
                        self.copies.announced(id, SaveOrder { seq, tree });
                    }
                }
            }
            Message::SaveHeld { job, attempt, rank, seq } => {
                self.copies.acknowledged(from, WorkId { job, attempt, rank }, seq);
            }
            Message::AskCopies { job, attempt, without } => {
                if let Some(kept) = self.registers.get(job)
                    && kept.value.body.steward == from
                {
                    self.copies.do_without(kept, &without, now);
                    // What follows for this node is part of the answer.
                    self.tend_copies(now);
                }
                let keeps = match self.registers.get(job) {
                    Some(kept) => kept.keepers.iter().any(|(keeper, _)| *keeper == from),
                    None => self.copies.has_save_for(job, from),
                };
                // Who may not know still hears that there is nothing to wait for.
                let ranks = if keeps { self.copies.states(job, attempt) } else { Vec::new() };
                let seq = self.registers.get(job).map_or(0, |kept| kept.value.seq);
                self.out.send(self.me, from, Message::Copies { job, attempt, seq, ranks });
            }
            Message::Copies { job, attempt, seq, ranks } => {
                let Some(kept) = self.registers.get(job) else { return };
                let body = &kept.value.body;
                let keeper = kept.keepers.iter().any(|(keeper, _)| *keeper == from);
                let node = body.ranks.iter().any(|rank| rank.assignment.node == from);
                let lags = keeper && seq < kept.value.seq;
                if attempt == body.attempt && (keeper || node) {
                    self.copies.hear(from, kept, (attempt, seq), ranks, now);
                }
                self.with_stewards(now, |stewards, cx| stewards.copies_heard(job, lags, cx));
            }
            _ => {}
        }
    }

    /// Follow from what a call changed: orders to copy that are other ones now, and what is to
    /// be told of copies.
    pub(super) fn tend_copies(&mut self, now: Now) {
        let scene = Scene { board: &self.board, roster: &self.roster, now };
        let all = self.registers.iter().map(|(job, _)| *job);
        for job in self.copies.due(scene, all) {
            if self.copies.consider(job, self.registers.get(job), scene) {
                self.out.events.push_back(Event::CopiesChanged { job });
            }
        }
        for job in self.copies.to_repeat() {
            self.tell_of_copies(job);
        }
        for job in self.copies.told_now(now) {
            self.tell_of_copies(job);
        }
    }

    pub(super) fn remove_data(&mut self, user: UserId, job: JobId, undo: bool, now: Now) -> Reply {
        let _ = (user, job, undo, now, State::Done);
        Reply::Denied { reason: "jobs cannot be removed yet".to_owned() }
    }
}
