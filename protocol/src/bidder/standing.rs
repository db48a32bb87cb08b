//! Standing calls: left with a bidder that has no room now.

use std::collections::BTreeMap;

use crate::{
    JobId, Now, PeerId,
    message::{Call, Key},
};

/// Most standing calls a bidder keeps; a higher one pushes the lowest out.
pub(crate) const STANDING_MAX: usize = 64;
/// How long a call stands.
pub(crate) const STANDING_MS: u64 = 15 * 60_000;
/// Bids nobody answered before a call is dropped: its steward is gone.
const UNANSWERED_BIDS_MAX: u32 = 8;

#[derive(Debug, Clone)]
pub(crate) struct StandingCall {
    pub(crate) steward: PeerId,
    pub(crate) call: Call,
    pub(crate) since: Now,
    /// Bids made under it so far.
    pub(crate) bids: u32,
    /// Until then the steward wants no bid: it could not use the last.
    pub(crate) rests_until_ms: u64,
}

impl StandingCall {
    pub(crate) const fn new(steward: PeerId, call: Call, since: Now) -> Self {
        Self { steward, call, since, bids: 0, rests_until_ms: 0 }
    }
}

/// By key: the highest job first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    calls: BTreeMap<Key, StandingCall>,
}

impl Standing {
    /// Keep a call, replacing the same job's; the call it pushed out, if any.
    ///
    /// # Errors
    /// The lowest job kept, where all kept are higher than this one.
    pub(crate) fn keep(
        &mut self,
        mut standing: StandingCall,
    ) -> Result<Option<StandingCall>, JobId> {
        let key = standing.call.key;
        if let Some(old) = self.calls.get(&key) {
            standing.bids = old.bids;
            standing.rests_until_ms = old.rests_until_ms;
            self.calls.insert(key, standing);
            return Ok(None);
        }
        let mut pushed_out = None;
        if self.calls.len() >= STANDING_MAX {
            let lowest = self.calls.last_key_value().map(|(lowest, _)| *lowest);
            match lowest {
                Some(lowest) if key.is_higher_than(&lowest) => {
                    pushed_out = self.calls.remove(&lowest);
                }
                Some(lowest) => return Err(lowest.job),
                None => {}
            }
        }
        self.calls.insert(key, standing);
        Ok(pushed_out)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.calls.keys().copied()
    }

    pub(crate) fn get(&self, key: Key) -> Option<&StandingCall> {
        self.calls.get(&key)
    }

    /// Count a bid under this call; whether it was the last that is worth making.
    pub(crate) fn count_bid(&mut self, key: Key) -> bool {
        self.calls.get_mut(&key).is_some_and(|standing| {
            standing.bids += 1;
            standing.bids >= UNANSWERED_BIDS_MAX
        })
    }

    pub(crate) fn forget(&mut self, job: JobId, steward: PeerId) {
        self.calls.retain(|key, standing| key.job != job || standing.steward != steward);
    }

    pub(crate) fn expire(&mut self, now: Now) {
        self.calls.retain(|_, standing| standing.since.after(STANDING_MS) > now.boot_ms);
    }

    /// The steward could not use a bid now, but is there: wait before the next.
    pub(crate) fn rest(&mut self, job: JobId, steward: PeerId, until_ms: u64) {
        for (key, standing) in &mut self.calls {
            if key.job == job && standing.steward == steward {
                standing.rests_until_ms = until_ms;
                standing.bids = 0;
            }
        }
    }

    /// When the next call expires or has rested.
    pub(crate) fn next_change(&self, now: Now) -> Option<u64> {
        let rested = |standing: &StandingCall| {
            (standing.rests_until_ms > now.boot_ms).then_some(standing.rests_until_ms)
        };
        let change = |standing: &StandingCall| {
            let expiry = standing.since.after(STANDING_MS);
            rested(standing).map_or(expiry, |rested| rested.min(expiry))
        };
        self.calls.values().map(change).min()
    }
}
