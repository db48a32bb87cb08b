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

/// The next [`CHANGES_MAX`] jobs of which `wanted` says so, after the last that was taken, by id
/// and round: those that cannot be mended do not keep the rest from their turn.
fn in_turn<'a, V: 'a, I: Iterator<Item = (&'a JobId, &'a V)>>(
    all: impl Fn() -> I,
    after: Option<JobId>,
    wanted: impl Fn(&V) -> bool,
) -> Vec<JobId> {
    let later = all().filter(|(job, _)| Some(**job) > after);
    let first = all().filter(|(job, _)| Some(**job) <= after);
    let wanted = later.chain(first).filter(|(_, value)| wanted(value));
    wanted.map(|(job, _)| *job).take(CHANGES_MAX).collect()
}

impl Stewards {
    /// Give records of jobs that are over other keepers where some are gone for good, or for
    /// long. Whether there was trouble at all.
    pub(crate) fn check_done(&mut self, cx: &mut Context<'_>) {
        let in_trouble = |kept: &Kept| {
            let over = kept.value.body.state() == State::Done && kept.value.body.removed.is_none();
            over && !cx.registers.is_busy(kept.spec.job) && self.is_in_trouble(kept, cx)
        };
        let all = || cx.registers.iter();
        let changes = in_turn(all, self.done_after, |kept| in_trouble(kept));
        self.done_after = changes.last().copied();
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn jobs_that_cannot_be_mended_do_not_keep_the_rest_from_their_turn() {
        let most = u8::try_from(CHANGES_MAX).unwrap();
        let all: BTreeMap<JobId, u8> = (0..most + 5).map(|n| (JobId([n; 32]), n)).collect();
        let next = |after| in_turn(|| all.iter(), after, |n| *n != 1);
        let first = next(None);
        assert_eq!((first.len(), first.last()), (CHANGES_MAX, Some(&JobId([most; 32]))));
        let second = next(first.last().copied());
        assert_eq!(second.len(), CHANGES_MAX);
        assert_eq!(
            second[..5],
            [1, 2, 3, 4]
                .map(|n| JobId([most + n; 32]))
                .into_iter()
                .chain([JobId([0; 32])])
                .collect::<Vec<_>>()
        );
        let few = in_turn(|| all.iter(), Some(JobId([9; 32])), |n| *n == 9);
        assert_eq!(few, [JobId([9; 32])], "the only one is taken each time");
    }
}
