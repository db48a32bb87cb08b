//! Records of jobs that are over: nobody drives them, and still their keepers go and come.
//!
//! A keeper that notices proposes the change itself, one of them by what it sees; should two do
//! so at once, one of the two is chosen, as of any two proposals.

use std::collections::BTreeSet;

use super::{Context, Stewards, WILLING_MS, keepers_for_record};
use crate::{
    JobId, PeerId,
    job::State,
    message::Message,
    record::{EPOCHS_MAX, Keeper, Kept, quorum_of},
};

/// How long a keeper of a job that is over is away before another takes its place: longer than a
/// machine takes to be repaired, since every such change is made for every job.
pub const DONE_AWAY_MS: u64 = 3_600_000;
/// Most records whose keepers are changed at a time, every
/// [`crate::copies::COPIES_CHECK_MS`].
const CHANGES_MAX: usize = 32;
/// The number of operations on records of jobs that are over, which no steward waits for.
pub(crate) const DONE_OP: u64 = u64::MAX;

impl Stewards {
    /// Give records of jobs that are over other keepers where some are gone for good, or for
    /// long. Whether there was trouble at all.
    pub(crate) fn check_done(&mut self, cx: &mut Context<'_>) {
        let mut changes = Vec::new();
        for (job, kept) in cx.registers.iter() {
            let over = kept.value.body.state() == State::Done && kept.value.body.removed.is_none();
            if over && changes.len() < CHANGES_MAX && self.is_in_trouble(kept, cx) {
                changes.push(*job);
            }
        }
        let mut asked = BTreeSet::new();
        for job in changes {
            self.change_keepers_of_done(job, &mut asked, cx);
        }
        for (node, store) in asked {
            self.asked.insert(node, store);
            cx.out.send(self.me, node, Message::WouldKeep { store });
        }
    }

    /// Whether a keeper of it will not come back, and it is for this node to see to that: the
    /// first of those that are there.
    fn is_in_trouble(&self, kept: &Kept, cx: &Context<'_>) -> bool {
        let lost = |keeper: &Keeper| self.is_lost(*keeper, cx);
        kept.certificate.links.len() + 1 < EPOCHS_MAX
            && kept.keepers.iter().any(lost)
            && self.first_there(&kept.keepers, cx) == Some(self.me)
    }

    fn first_there(&self, keepers: &[Keeper], cx: &Context<'_>) -> Option<PeerId> {
        let there = |keeper: &&Keeper| {
            let connected = keeper.0 == self.me || cx.board.is_connected(keeper.0);
            connected && !self.is_lost(**keeper, cx)
        };
        keepers.iter().find(there).map(|(node, _)| *node)
    }

    /// Whether a keeper is gone, or has been away for long.
    fn is_lost(&self, keeper: Keeper, cx: &Context<'_>) -> bool {
        if keeper == cx.registers.identity() {
            return false;
        }
        let away_ms = cx.now.boot_ms.saturating_sub(cx.copies.away_since(keeper.0));
        let away = !cx.board.is_connected(keeper.0) && away_ms >= DONE_AWAY_MS;
        away || self.is_gone(keeper, cx)
    }

    fn change_keepers_of_done(
        &mut self,
        job: JobId,
        asked: &mut BTreeSet<Keeper>,
        cx: &mut Context<'_>,
    ) {
        if cx.registers.is_busy(job) {
            return;
        }
        let Some(kept) = cx.registers.get(job) else { return };
        if !kept.chosen {
            cx.registers.read(job, cx.now);
            return;
        }
        let (seq, current) = (kept.value.seq, kept.keepers.clone());
        let stay: Vec<Keeper> =
            current.iter().filter(|keeper| !self.is_lost(**keeper, cx)).copied().collect();
        let next = keepers_for_record(job, &current, stay, cx);
        let news: Vec<Keeper> =
            next.iter().filter(|keeper| !current.contains(keeper)).copied().collect();
        if news.is_empty() {
            // Who is only away is better than nobody.
            return;
        }
        let fresh_ms = cx.now.boot_ms.saturating_sub(WILLING_MS);
        let unsure = news.into_iter().filter(|(node, store)| {
            let word = self.willing.get(node);
            !word.is_some_and(|(named, at_ms)| named == store && *at_ms >= fresh_ms)
        });
        let unsure: Vec<Keeper> = unsure.collect();
        let there = |(node, _): &&Keeper| *node == self.me || cx.board.is_connected(*node);
        if !unsure.is_empty() {
            asked.extend(unsure);
        } else if next.iter().filter(there).count() >= quorum_of(next.len()) {
            cx.registers.seal(job, seq, DONE_OP, next, cx.now);
        }
    }
}
