//! One job as its steward sees it, beside what the record says.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    SILENT_MS,
    auction::{Auction, Pinning},
};
use crate::{
    JobId, Now, PeerId, StoreId, UserId,
    job::{Attempt, Rank, RankEnd, RankState, State, VerifiedSpec},
    message::{ClockReading, RankReport},
    record::{Body, Registers},
};

/// Everything volatile about one job: lost with the steward, found out again by asking.
#[derive(Debug, Clone)]
pub(crate) struct Drive {
    pub(super) spec: Arc<VerifiedSpec>,
    pub(super) stage: Stage,
    pub(super) observed: Observed,
    /// The proposal in flight: one at a time.
    pub(super) proposal: Option<u64>,
    /// The value that was last followed, as epoch and seq.
    pub(super) taken: Option<(u32, u64)>,
    /// Endings whose nodes were told that they are recorded.
    pub(super) acknowledged: BTreeSet<(Attempt, Rank)>,
    /// Nodes to be told that an attempt is off, with the times they were.
    pub(super) withdrawals: BTreeMap<(PeerId, Attempt), u32>,
    /// Nodes that failed or refused in an earlier attempt.
    pub(super) avoided: BTreeSet<PeerId>,
    /// Tries in a row that failed when every rank was held.
    pub(super) pin_failures: u32,
    /// Nothing is overdue yet in the current state.
    pub(super) just_entered: bool,
    /// When this stewardship began here, on the boot clock.
    pub(super) since_ms: u64,
    /// Whether it acted when last looked at.
    pub(super) acting: bool,
    /// The configuration that was last followed.
    pub(super) epoch: Option<u32>,
    /// Since when every rank's end is in the record and what they left is being copied, on the
    /// boot clock.
    pub(super) copies_since_ms: Option<u64>,
    /// When a keeper that lacks the latest value was last brought it, on the boot clock.
    pub(super) shown_ms: u64,
    /// Somebody asked not to wait for what only a node has that is gone.
    pub(super) give_up_copies: bool,
    /// It is being handed over: not a word more.
    pub(super) leaving: bool,
}

/// What the steward is busy with.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    /// Collecting holds, or waiting for room.
    Auction(Auction),
    /// Every process is held; pins are being collected.
    Pinning(Pinning),
    /// The record names ranks; they and it say what is to do.
    Assigned,
}

/// What bidders said about the current attempt, and users about the job.
#[derive(Debug, Clone, Default)]
pub(super) struct Observed {
    pub(super) stop_asked: Option<UserId>,
    pub(super) committed: BTreeSet<PeerId>,
    pub(super) refused: BTreeMap<PeerId, String>,
    pub(super) prepared: BTreeMap<Rank, (u16, String)>,
    pub(super) running: BTreeSet<Rank>,
    pub(super) cleaning: BTreeSet<Rank>,
    pub(super) ends: BTreeMap<Rank, RankEnd>,
    /// Which store the node of each rank had when it said how the rank ended.
    pub(super) stores: BTreeMap<Rank, StoreId>,
    /// Nodes that could not prepare or start a rank.
    pub(super) failed: BTreeSet<PeerId>,
    /// When each node last said something, on the boot clock.
    pub(super) heard: BTreeMap<PeerId, u64>,
    /// Nodes that know who drives the job.
    pub(super) adopted: BTreeSet<PeerId>,
    /// Each node's clock as it last said that it is prepared.
    pub(super) clocks: BTreeMap<PeerId, ClockReading>,
    /// When each node was last given a lease, on the boot clock.
    pub(super) granted: BTreeMap<PeerId, u64>,
    /// Every node was told that its lease binds no more.
    pub(super) lifted: bool,
}

impl Observed {
    /// Nothing observed of a new attempt; a stop that was asked for stays asked for.
    pub(super) fn keeping_stop(old: &Self) -> Self {
        Self { stop_asked: old.stop_asked, ..Self::default() }
    }

    pub(super) fn hear(&mut self, rank: Rank, report: RankReport) {
        match report {
            RankReport::At(RankState::Running) => {
                self.running.insert(rank);
            }
            RankReport::At(RankState::Assigned | RankState::Prepared | RankState::Ended) => {}
            RankReport::Prepared { port, host, .. } => {
                let host: String = host.chars().take(253).collect();
                self.prepared.insert(rank, (port, host));
            }
            RankReport::Cleaning => {
                self.running.insert(rank);
                self.cleaning.insert(rank);
            }
            RankReport::Ended(end) => {
                self.ends.entry(rank).or_insert(end);
            }
        }
    }
}

impl Drive {
    pub(super) fn new(spec: Arc<VerifiedSpec>, now: Now) -> Self {
        Self {
            stage: Stage::Auction(Auction::new(&spec)),
            spec,
            observed: Observed::default(),
            proposal: None,
            taken: None,
            acknowledged: BTreeSet::new(),
            withdrawals: BTreeMap::new(),
            avoided: BTreeSet::new(),
            pin_failures: 0,
            just_entered: true,
            since_ms: now.boot_ms,
            acting: false,
            epoch: None,
            copies_since_ms: None,
            shown_ms: 0,
            give_up_copies: false,
            leaving: false,
        }
    }

    fn job(&self) -> JobId {
        self.spec.job
    }

    /// Whether the record is at this attempt, with its ranks still named.
    pub(super) fn is_at(&self, attempt: Attempt, registers: &Registers) -> bool {
        registers.get(self.job()).is_some_and(|kept| {
            let body = &kept.value.body;
            body.attempt == attempt && !body.ranks.is_empty()
        })
    }

    /// A node of the attempt that has said nothing for too long.
    pub(super) fn silent(&self, body: &Body, now: Now) -> Option<PeerId> {
        let waits_for = |node: &PeerId| {
            body.ranks
                .iter()
                .any(|rank| rank.assignment.node == *node && rank.state < RankState::Running)
        };
        body.nodes().into_iter().filter(waits_for).find(|node| {
            let heard = self.observed.heard.get(node).copied().unwrap_or(now.boot_ms);
            heard.saturating_add(SILENT_MS) < now.boot_ms
        })
    }

    pub(super) fn describe_assigned(&self, state: State) -> String {
        let prepared = self.observed.prepared.len();
        let need = self.spec.spec.rank_count();
        match state {
            State::Preparing => {
                format!("{prepared} of {need} processes have their code and data")
            }
            State::Starting => {
                let running = self.observed.running.len();
                format!("{running} of {need} processes have started")
            }
            State::Stopping => {
                let ended = self.observed.ends.len();
                format!("being stopped: {ended} of {need} processes have ended")
            }
            State::New | State::Waiting | State::Running | State::Cleaning | State::Done => {
                String::new()
            }
        }
    }
}
