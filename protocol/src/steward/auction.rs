//! Collecting holds for every rank of a job, then pinning them all.
//!
//! A try has at most [`ROUNDS_MAX`] rounds. Each round calls the nodes that may supply
//! what is still missing, waits for their answers, keeps the cheapest holds and gives
//! the rest back. A try that ends without every rank held gives everything back: a job
//! never sits on part of what it needs. Its calls stay standing at bidders, which wake
//! it when room appears.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    HoldId, JobId, Now, PeerId,
    inventory::{Board, board::free_of},
    job::{RankAssignment, VerifiedSpec},
    message::{Bid, Call, CallFate, Decline, Verdict, WaitView, Wanted, blinded},
    peer::Random,
    request::{Grant, Request, fit_many},
};

/// Rounds of one try.
pub const ROUNDS_MAX: u32 = 3;
/// How long a round waits for answers.
pub const ROUND_MS: u64 = 1_000;
/// How long a round waits for cheaper answers once every rank is held.
pub const SETTLE_MS: u64 = 15;
/// The longest pause between tries while some node may not know of the job.
pub const FINISH_MS: u64 = 30_000;

/// A hold chosen for a process of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pick {
    pub(crate) node: PeerId,
    pub(crate) hold: HoldId,
    pub(crate) group: u32,
    pub(crate) grant: Grant,
    score: u32,
    expiry_ms: u64,
}

/// Holds chosen for every rank, and which of them are pinned.
#[derive(Debug, Clone)]
pub(crate) struct Pinning {
    picks: Vec<(Pick, bool)>,
    assignments: Vec<RankAssignment>,
}

impl Pinning {
    pub(super) fn names(&self, hold: HoldId) -> bool {
        self.picks.iter().any(|(pick, _)| pick.hold == hold)
    }

    pub(super) fn pinned(&mut self, from: PeerId, holds: &[HoldId]) {
        for (pick, pinned) in &mut self.picks {
            if pick.node == from && holds.contains(&pick.hold) {
                *pinned = true;
            }
        }
    }

    /// The assignment, once every pick is pinned.
    pub(super) fn complete(&self) -> Option<Vec<RankAssignment>> {
        self.picks.iter().all(|(_, pinned)| *pinned).then(|| self.assignments.clone())
    }

    pub(super) fn by_node(&self) -> Vec<(PeerId, Vec<HoldId>)> {
        let mut by_node: BTreeMap<PeerId, Vec<HoldId>> = BTreeMap::new();
        for (pick, _) in &self.picks {
            by_node.entry(pick.node).or_default().push(pick.hold);
        }
        by_node.into_iter().collect()
    }
}

/// What the auction wants done.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing yet; see [`Auction::wake_ms`].
    Wait,
    /// Send these calls.
    Call(Vec<(PeerId, Call)>),
    /// Every rank is held: pin.
    Pin { pinning: Pinning, releases: Vec<(PeerId, Vec<HoldId>)> },
    /// The try failed: give everything back, and wait for room.
    GiveUp { releases: Vec<(PeerId, Vec<HoldId>, CallFate)> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Outstanding,
    /// `again`: to ask once more in the same try may help, since a higher job took what
    /// was held there.
    Given {
        standing: bool,
        decline: Option<Decline>,
        again: bool,
    },
}

/// One job's auction.
#[derive(Debug, Clone)]
pub(crate) struct Auction {
    /// When to step again, if nothing is heard before.
    pub(super) wake_ms: Option<u64>,
    /// Between tries.
    pub(super) resting: bool,
    wanted: Vec<Wanted>,
    /// 0 before the first round of a try.
    round: u32,
    round_over: bool,
    answers: BTreeMap<PeerId, Answer>,
    holds: BTreeMap<HoldId, Pick>,
    /// Tries that failed.
    failures: u32,
    /// Nodes that could not do it: asked last, taken where there is no other.
    avoided: BTreeSet<PeerId>,
}

impl Auction {
    pub(super) fn new(spec: &VerifiedSpec) -> Self {
        Self {
            wake_ms: None,
            resting: false,
            wanted: wanted_of(&spec.spec.request),
            round: 0,
            round_over: false,
            answers: BTreeMap::new(),
            holds: BTreeMap::new(),
            failures: 0,
            avoided: BTreeSet::new(),
        }
    }

    /// Prefer other nodes than these.
    pub(super) fn avoiding(mut self, nodes: &BTreeSet<PeerId>) -> Self {
        self.avoided.clone_from(nodes);
        self
    }

    pub(super) fn hear(&mut self, from: PeerId, bid: Bid, now: Now) {
        let expiry_ms = now.after(bid.hold_ms.min(crate::bidder::HOLD_MS));
        // A repeated call's answer lists all that is held there.
        for offer in bid.offers {
            let wanted = self.wanted.iter().any(|wanted| wanted.group == offer.group);
            if !wanted || self.holds.len() >= HOLDS_MAX {
                continue;
            }
            let pick = Pick {
                node: from,
                hold: offer.hold,
                group: offer.group,
                grant: offer.grant,
                score: offer.score,
                expiry_ms,
            };
            self.holds.insert(offer.hold, pick);
            self.resting = false;
        }
        let given = Answer::Given { standing: bid.standing, decline: bid.decline, again: false };
        if self.answers.len() < ANSWERS_MAX || self.answers.contains_key(&from) {
            self.answers.insert(from, given);
        }
    }

    pub(super) fn lose(&mut self, from: PeerId, holds: &[HoldId], higher: Option<JobId>) {
        for hold in holds {
            if self.holds.get(hold).is_some_and(|pick| pick.node == from) {
                self.holds.remove(hold);
            }
        }
        if let Some(job) = higher
            && let Some(Answer::Given { decline, again, .. }) = self.answers.get_mut(&from)
        {
            *decline = Some(Decline::HigherJob { job });
            *again = true;
        }
    }

    pub(super) fn time_is_up(&mut self, now: Now) {
        self.holds.retain(|_, pick| pick.expiry_ms > now.boot_ms);
        if self.resting {
            self.resting = false;
            self.round = 0;
        } else {
            self.round_over = true;
        }
    }

    /// Whether it waits for its timer alone: no bidder had a place for its call.
    pub(super) fn is_left_out(&self, now: Now) -> bool {
        self.resting && self.wake_ms.is_none_or(|at_ms| at_ms > now.boot_ms) && !self.has_place()
    }

    /// Whether a call of it stands at some bidder.
    pub(super) fn has_place(&self) -> bool {
        let stands = |answer: &Answer| matches!(answer, Answer::Given { standing: true, .. });
        self.answers.values().any(stands)
    }

    /// Whether a call to `node` might help and none stands there.
    pub(super) fn would_ask(&self, node: PeerId) -> bool {
        let stands = matches!(self.answers.get(&node), Some(Answer::Given { standing: true, .. }));
        self.resting && !stands
    }

    /// Holds and calls by node, to be taken back.
    pub(super) fn withdraw(&mut self) -> Vec<(PeerId, Vec<HoldId>)> {
        let mut by_node: BTreeMap<PeerId, Vec<HoldId>> =
            self.answers.keys().map(|node| (*node, Vec::new())).collect();
        for pick in core::mem::take(&mut self.holds).into_values() {
            by_node.entry(pick.node).or_default().push(pick.hold);
        }
        self.answers.clear();
        by_node.into_iter().collect()
    }

    pub(super) fn step(
        &mut self,
        spec: &VerifiedSpec,
        board: &Board,
        random: &mut Random,
        now: Now,
    ) -> Step {
        if self.resting {
            return Step::Wait;
        }
        let missing = self.missing();
        if self.round == 0 && !missing.is_empty() {
            return self.next_round(spec, &missing, board, random, now);
        }
        let outstanding = self.answers.values().any(|answer| *answer == Answer::Outstanding);
        if missing.is_empty() {
            if outstanding && !self.round_over {
                let settle = now.after(SETTLE_MS);
                self.wake_ms = Some(self.wake_ms.map_or(settle, |at_ms| at_ms.min(settle)));
                return Step::Wait;
            }
            return self.pin(spec);
        }
        if outstanding && !self.round_over {
            return Step::Wait;
        }
        if self.round < ROUNDS_MAX {
            return self.next_round(spec, &missing, board, random, now);
        }
        self.give_up(random, now)
    }

    pub(super) fn describe(&self, view: &mut WaitView, board: &Board, now: Now) {
        view.held = u32::try_from(self.cheapest().len()).unwrap_or(u32::MAX);
        for node in board.candidates(view.job, &self.wanted, now) {
            if !self.answers.contains_key(&node) {
                view.nodes.push((node, Verdict::NotCalled));
            }
        }
        for (node, posted) in board.iter() {
            let silent = board.is_unreachable(*node, now) && !posted.advert.client;
            if silent && !self.answers.contains_key(node) {
                view.nodes.push((*node, Verdict::Unreachable));
            }
        }
        for (node, answer) in &self.answers {
            let held = self.holds.values().filter(|pick| pick.node == *node).count();
            let verdict = match answer {
                Answer::Outstanding if board.is_unreachable(*node, now) => Verdict::Unreachable,
                Answer::Outstanding => Verdict::NoAnswer,
                Answer::Given { .. } if held > 0 => {
                    Verdict::Holds(u32::try_from(held).unwrap_or(u32::MAX))
                }
                Answer::Given { standing: true, decline, .. } => Verdict::Standing(decline.clone()),
                Answer::Given { standing: false, decline: Some(decline), .. } => {
                    Verdict::Declined(decline.clone())
                }
                Answer::Given { standing: false, decline: None, .. } => Verdict::Standing(None),
            };
            view.nodes.push((*node, verdict));
        }
        view.nodes.sort_by_key(|(node, _)| *node);
        view.summary = if view.nodes.is_empty() {
            "no node of the pool that this one knows of has what a process needs".to_owned()
        } else {
            let have = match (view.held, view.need) {
                (0, 1) => "no node has room for its process".to_owned(),
                (1, 1) => "its process has room".to_owned(),
                (held, need) => format!("{held} of {need} processes have room"),
            };
            match self.failures {
                0 => format!("{have}; nodes are being asked"),
                1 => format!("{have} after one try"),
                tries => format!("{have} after {tries} tries"),
            }
        };
    }

    fn next_round(
        &mut self,
        spec: &VerifiedSpec,
        missing: &[Wanted],
        board: &Board,
        random: &mut Random,
        now: Now,
    ) -> Step {
        self.round += 1;
        self.round_over = false;
        let mut candidates = board.candidates(spec.job, missing, now);
        candidates.sort_by_key(|node| self.avoided.contains(node));
        let chosen = self.choose(&candidates, missing);
        if chosen.is_empty() {
            return self.give_up(random, now);
        }
        let mut calls = Vec::new();
        for node in chosen {
            let call = Call {
                key: crate::bidder::spec_key(spec),
                owner: spec.spec.owner,
                wanted: self.wanted_at(node, missing),
                inputs: vec![(blinded(spec.spec.code), spec.spec.code_bytes)],
                standing: true,
            };
            self.answers.insert(node, Answer::Outstanding);
            calls.push((node, call));
        }
        self.wake_ms = Some(now.after(ROUND_MS));
        Step::Call(calls)
    }

    /// need + max(2, need/2) nodes: those not asked in this try before the others.
    fn choose(&self, candidates: &[PeerId], missing: &[Wanted]) -> Vec<PeerId> {
        let need: u32 = missing.iter().map(|wanted| wanted.count).sum();
        let most = (need + (need / 2).max(2)) as usize;
        let useless = |node: &PeerId| match self.answers.get(node) {
            // It bids by itself when room appears, or has just said that it has neither room
            // nor a place to wait for it.
            Some(Answer::Given { standing, decline, again }) => {
                self.round > 1 && !again && (*standing || decline.is_some())
            }
            Some(Answer::Outstanding) | None => false,
        };
        let fresh = candidates.iter().filter(|node| !self.answers.contains_key(node));
        let again = candidates.iter().filter(|node| self.answers.contains_key(node));
        fresh.chain(again).filter(|node| !useless(node)).take(most).copied().collect()
    }

    /// What to ask of `node`: what is missing, and what it holds already.
    fn wanted_at(&self, node: PeerId, missing: &[Wanted]) -> Vec<Wanted> {
        let held = |group| {
            let here = self.holds.values().filter(|p| p.node == node && p.group == group).count();
            u32::try_from(here).unwrap_or(u32::MAX)
        };
        let wanted = self.wanted.iter().map(|wanted| {
            let missing = missing.iter().find(|m| m.group == wanted.group).map_or(0, |m| m.count);
            let count = missing.saturating_add(held(wanted.group)).min(wanted.count);
            Wanted { count, ..wanted.clone() }
        });
        wanted.filter(|wanted| wanted.count > 0).collect()
    }

    fn missing(&self) -> Vec<Wanted> {
        let missing = self.wanted.iter().map(|wanted| {
            let held = self.holds.values().filter(|pick| pick.group == wanted.group).count();
            let held = u32::try_from(held).unwrap_or(u32::MAX);
            Wanted { count: wanted.count.saturating_sub(held), ..wanted.clone() }
        });
        missing.filter(|wanted| wanted.count > 0).collect()
    }

    /// For each group its cheapest holds, as many as it wants; ties by node id.
    fn cheapest(&self) -> Vec<Pick> {
        let mut picks = Vec::new();
        for wanted in &self.wanted {
            let mut of_group: Vec<&Pick> =
                self.holds.values().filter(|pick| pick.group == wanted.group).collect();
            of_group.sort_by_key(|pick| {
                (self.avoided.contains(&pick.node), pick.score, pick.node, pick.hold)
            });
            picks.extend(of_group.into_iter().take(wanted.count as usize).cloned());
        }
        picks
    }

    fn pin(&mut self, spec: &VerifiedSpec) -> Step {
        let picks = self.cheapest();
        let assignments = super::number_ranks(spec, picks.clone());
        for pick in &picks {
            self.holds.remove(&pick.hold);
        }
        let keeps: Vec<PeerId> = picks.iter().map(|pick| pick.node).collect();
        let surplus = core::mem::take(&mut self.holds);
        let mut releases: BTreeMap<PeerId, Vec<HoldId>> = self
            .answers
            .keys()
            .filter(|node| !keeps.contains(node))
            .map(|node| (*node, Vec::new()))
            .collect();
        for pick in surplus.into_values() {
            releases.entry(pick.node).or_default().push(pick.hold);
        }
        let picks = picks.into_iter().map(|pick| (pick, false)).collect();
        Step::Pin {
            pinning: Pinning { picks, assignments },
            releases: releases.into_iter().collect(),
        }
    }

    fn give_up(&mut self, random: &mut Random, now: Now) -> Step {
        self.failures = self.failures.saturating_add(1);
        self.round = 0;
        self.round_over = false;
        self.resting = true;
        // Room found by waiting calls wakes us; the pause only mends what was lost.
        let pause_ms = (1_000_u64 << self.failures.min(5)).min(FINISH_MS);
        self.wake_ms = Some(now.after(pause_ms / 2 + random.below(pause_ms)));
        let mut by_node: BTreeMap<PeerId, Vec<HoldId>> = BTreeMap::new();
        for pick in core::mem::take(&mut self.holds).into_values() {
            by_node.entry(pick.node).or_default().push(pick.hold);
        }
        // A node whose offer was of no use alone shall not offer the same at once.
        let rest_ms = 500 + random.below((500_u64 << self.failures.min(5)).min(FINISH_MS));
        let releases = by_node
            .into_iter()
            .map(|(node, holds)| (node, holds, CallFate::Rest { ms: rest_ms }))
            .collect();
        for answer in self.answers.values_mut() {
            if *answer == Answer::Outstanding {
                *answer = Answer::Given { standing: false, decline: None, again: false };
            }
        }
        Step::GiveUp { releases }
    }
}

/// Most holds one auction looks at.
const HOLDS_MAX: usize = 4_096;
/// Most nodes whose answers one auction remembers.
const ANSWERS_MAX: usize = 4_096;

fn wanted_of(request: &Request) -> Vec<Wanted> {
    (0_u32..)
        .zip(&request.groups)
        .map(|(group, wanted)| Wanted {
            group,
            count: wanted.count,
            process: wanted.process.clone(),
        })
        .collect()
}

/// Who would be called in a first round, with the processes each has room for now.
pub(super) fn dry_run(
    me: PeerId,
    request: &Request,
    board: &Board,
    now: Now,
) -> Vec<(PeerId, u32)> {
    let wanted = wanted_of(request);
    let need: u32 = wanted.iter().map(|wanted| wanted.count).sum();
    let most = (need + (need / 2).max(2)) as usize;
    let asked: Vec<_> = wanted.iter().map(|w| (w.group, w.count, &w.process)).collect();
    let candidates = board.candidates(JobId(me.0.0), &wanted, now).into_iter().take(most);
    let room = |node: PeerId| {
        let fits =
            board.get(node).map_or(0, |posted| fit_many(&asked, &free_of(&posted.advert)).len());
        (node, u32::try_from(fits).unwrap_or(u32::MAX))
    };
    candidates.map(room).collect()
}
