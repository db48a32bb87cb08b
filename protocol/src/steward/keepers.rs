//! Who keeps a record: proposed once at submission, and again when keepers go or come.

use std::collections::BTreeSet;

use super::{Context, Stewards, Timer};
use crate::{
    JobId, Now, PeerId, StoreId,
    inventory::Board,
    message::Message,
    record::{EPOCHS_MAX, Keeper, Registers, STEWARD_MS, quorum_of},
    roster::Roster,
    sabotage::Rule,
};

/// How long a keeper is away before it is replaced.
pub const AWAY_MS: u64 = 10 * 60_000;
/// For how long a node's word that it would keep a record is believed.
pub(super) const WILLING_MS: u64 = 30_000;
/// How often it is looked whether keepers went or came.
pub const KEEPERS_CHECK_MS: u64 = 20_000;

/// How many keepers a record gets in a pool where so many nodes can keep one: three below
/// seven, else five; as many as there are in smaller pools.
#[must_use]
pub(super) const fn keepers_for(nodes: usize) -> usize {
    match nodes {
        0..3 => nodes,
        3..7 => 3,
        _ => 5,
    }
}

/// How many nodes a pool with so many that can keep a record may lose for good at once, and
/// no record is lost.
#[must_use]
pub const fn survives(nodes: usize) -> usize {
    keepers_for(nodes).saturating_sub(1) / 2
}

/// Nodes that can keep records, in an order of the job's own: those this node is connected to
/// first.
fn eligible(me: Keeper, client: bool, board: &Board, roster: &Roster, salt: &[u8]) -> Vec<Keeper> {
    let others = board
        .iter()
        .filter(|(node, posted)| {
            **node != me.0 && !posted.advert.client && roster.state().is_member_node(**node)
        })
        .map(|(node, posted)| (*node, posted.advert.store));
    let mut all: Vec<Keeper> = others.chain((!client).then_some(me)).collect();
    let order = |node: &PeerId| *blake3::hash(&[salt, &node.0.0[..]].concat()).as_bytes();
    all.sort_by_cached_key(|(node, _)| {
        (*node != me.0, !board.is_connected(*node) && *node != me.0, order(node))
    });
    all
}

/// The keepers a job submitted at `me` should name: itself first, unless it is a client; then
/// in an order that `salt` decides, of distinct owners where there is a choice.
pub(crate) fn propose(
    me: Keeper,
    client: bool,
    board: &Board,
    roster: &Roster,
    salt: &[u8],
) -> Vec<Keeper> {
    let all = eligible(me, client, board, roster, salt);
    let reachable = all.iter().filter(|(node, _)| *node == me.0 || board.is_connected(*node));
    // Two need each other: with one of them off no job could be submitted. The other comes to
    // keep it once it is back.
    let wanted = match keepers_for(all.len()) {
        few @ 0..3 => few.min(reachable.count().max(1)),
        wanted => wanted,
    };
    choose(Vec::new(), &all, wanted, board, me.0, roster)
}

/// Fill `chosen` up to `wanted`: reachable ones first, among them those that have room, and
/// among these those of other owners.
fn choose(
    mut chosen: Vec<Keeper>,
    from: &[Keeper],
    wanted: usize,
    board: &Board,
    me: PeerId,
    roster: &Roster,
) -> Vec<Keeper> {
    let is_full = |node: PeerId| board.get(node).is_some_and(|posted| posted.advert.full);
    let owner = |node: PeerId| roster.state().nodes.get(&node).map(|node| node.owner);
    while chosen.len() < wanted {
        let owners: Vec<_> = chosen.iter().map(|(node, _)| owner(*node)).collect();
        let rest = from.iter().filter(|keeper| !chosen.iter().any(|(node, _)| *node == keeper.0));
        let best = rest.min_by_key(|(node, _)| {
            let reachable = *node == me || board.is_connected(*node);
            (!reachable, is_full(*node), *node != me, owners.contains(&owner(*node)))
        });
        let Some(best) = best else { break };
        chosen.push(*best);
    }
    chosen
}

/// The keepers that stay of `current`, filled up with nodes that can be reached; those that do not
/// stay come last, where there are not enough others.
pub(super) fn keepers_for_record(
    job: JobId,
    current: &[Keeper],
    stay: Vec<Keeper>,
    cx: &Context<'_>,
) -> Vec<Keeper> {
    let me = cx.registers.identity();
    let all = eligible(me, false, cx.board, cx.roster, &job.0);
    let wanted = keepers_for(all.len().max(stay.len())).max(stay.len());
    let is_new = |keeper: &Keeper| !current.contains(keeper) || stay.contains(keeper);
    let there = |keeper: &Keeper| keeper.0 == me.0 || cx.board.is_connected(keeper.0);
    let reachable: Vec<Keeper> =
        all.into_iter().filter(|keeper| there(keeper) && is_new(keeper)).collect();
    let away: Vec<Keeper> =
        current.iter().filter(|keeper| !stay.contains(keeper)).copied().collect();
    let mut next = choose(stay, &reachable, wanted, cx.board, me.0, cx.roster);
    let member = |keeper: &Keeper| cx.roster.state().is_member_node(keeper.0);
    let room = wanted.saturating_sub(next.len());
    let names = |next: &[Keeper], node: PeerId| next.iter().any(|(named, _)| *named == node);
    let rest: Vec<Keeper> =
        away.into_iter().filter(|keeper| member(keeper) && !names(&next, keeper.0)).collect();
    next.extend(rest.into_iter().take(room));
    next
}

impl Stewards {
    /// Give every job driven here the keepers it should have.
    pub(super) fn check_keepers(&mut self, cx: &mut Context<'_>) {
        let jobs: Vec<JobId> = self.drives.keys().copied().collect();
        let mut asked = BTreeSet::new();
        for job in jobs {
            let busy = cx.registers.is_busy(job);
            let proposes = self.drives.get(&job).is_none_or(|drive| drive.proposal.is_some());
            if busy || proposes || !self.acts(job, cx) {
                continue;
            }
            let Some(kept) = cx.registers.get(job).filter(|kept| kept.chosen) else { continue };
            if kept.certificate.links.len() + 1 >= EPOCHS_MAX {
                continue;
            }
            let seq = kept.value.seq;
            let current = kept.keepers.clone();
            let next = self.next_keepers(job, &current, cx);
            if next.iter().collect::<BTreeSet<_>>() == current.iter().collect() {
                continue;
            }
            let fresh_ms = cx.now.boot_ms.saturating_sub(WILLING_MS);
            let unsure: Vec<Keeper> = next
                .iter()
                .filter(|keeper| !current.contains(keeper))
                .filter(|(node, store)| {
                    let word = self.willing.get(node);
                    !word.is_some_and(|(named, at_ms)| named == store && *at_ms >= fresh_ms)
                })
                .copied()
                .collect();
            if !unsure.is_empty() {
                asked.extend(unsure);
            } else if self.can_begin(job, &current, &next, cx) {
                self.ops += 1;
                let op = self.ops;
                if let Some(drive) = self.drives.get_mut(&job) {
                    drive.proposal = Some(op);
                }
                cx.registers.seal(job, seq, op, next, cx.now);
            }
        }
        self.asked.retain(|node, _| cx.board.is_connected(*node));
        for (node, store) in asked {
            self.asked.insert(node, store);
            cx.out.send(self.me, node, Message::WouldKeep { store });
        }
        if !self.drives.is_empty() {
            self.timers.set(Timer::Keepers, cx.now.after(KEEPERS_CHECK_MS));
        }
    }

    /// See [`Message::WillKeep`].
    pub(crate) fn handle_will_keep(&mut self, from: PeerId, store: StoreId, cx: &mut Context<'_>) {
        if self.asked.get(&from) != Some(&store) {
            return;
        }
        let fresh_ms = cx.now.boot_ms.saturating_sub(WILLING_MS);
        self.willing.retain(|_, (_, at_ms)| *at_ms >= fresh_ms);
        let before = self.willing.insert(from, (store, cx.now.boot_ms));
        let news = before.is_none_or(|(named, _)| named != store);
        let at_ms = cx.now.after(WILLING_MS / 100);
        if self.drives.is_empty() {
            return;
        }
        if news && self.timers.due(&Timer::Keepers).is_none_or(|due_ms| at_ms < due_ms) {
            self.timers.set(Timer::Keepers, at_ms);
        }
    }

    /// Whether a majority of the next keepers is there: else nobody could go on after the seal.
    fn can_begin(&self, job: JobId, current: &[Keeper], next: &[Keeper], cx: &Context<'_>) -> bool {
        let me = cx.registers.identity();
        let acks = cx.registers.acks(job);
        let there = |keeper: &&Keeper| {
            let heard_ms = acks.and_then(|acks| acks.get(&keeper.1)).copied().unwrap_or(0);
            let heard = heard_ms.saturating_add(STEWARD_MS) > cx.now.boot_ms;
            **keeper == me
                || if current.contains(keeper) { heard } else { cx.board.is_connected(keeper.0) }
        };
        next.iter().filter(there).count() >= quorum_of(next.len())
    }

    /// The keepers of now without those that are gone, filled up.
    fn next_keepers(&self, job: JobId, current: &[Keeper], cx: &Context<'_>) -> Vec<Keeper> {
        let me = cx.registers.identity();
        let all = eligible(me, false, cx.board, cx.roster, &job.0);
        let (mut stay, mut away) = (Vec::new(), Vec::new());
        for keeper in current {
            if *keeper == me || !self.is_gone(*keeper, cx) {
                if *keeper == me || !self.is_away(job, *keeper, cx.registers, cx.now) {
                    stay.push(*keeper);
                } else {
                    away.push(*keeper);
                }
            }
        }
        let wanted = keepers_for(all.len().max(stay.len()));
        let reachable: Vec<Keeper> = all
            .into_iter()
            .filter(|(node, _)| *node == me.0 || cx.board.is_connected(*node))
            .filter(|(node, _)| !away.iter().any(|(gone, _)| gone == node))
            .collect();
        let wanted = wanted.max(stay.len());
        let mut next = choose(stay, &reachable, wanted, cx.board, me.0, cx.roster);
        // Who is only away is better than nobody.
        next.extend(away.into_iter().take(wanted.saturating_sub(next.len())));
        next
    }

    /// Whether a keeper will never answer as that store again.
    pub(super) fn is_gone(&self, (node, store): Keeper, cx: &Context<'_>) -> bool {
        if !cx.roster.state().is_member_node(node) {
            return true;
        }
        let posted = cx.board.get(node);
        // One that only submits now may come back to keep what it kept.
        posted.is_some_and(|posted| posted.advert.store != store)
    }

    fn is_away(&self, job: JobId, (_, store): Keeper, registers: &Registers, now: Now) -> bool {
        let drive_ms = self.drives.get(&job).map_or(0, |drive| drive.since_ms);
        // Since the keepers changed nobody may have had to answer yet.
        let since_ms = drive_ms.max(registers.epoch_since(job));
        let heard_ms = registers.acks(job).and_then(|acks| acks.get(&store)).copied();
        heard_ms.unwrap_or(0).max(since_ms).saturating_add(AWAY_MS) < now.boot_ms
    }

    /// Hand every job over to another keeper, where there is one that can be reached; how many
    /// hand-overs are under way.
    pub(crate) fn hand_over(&mut self, cx: &mut Context<'_>) -> usize {
        let jobs: Vec<JobId> = self.drives.keys().copied().collect();
        let mut handed = 0;
        for job in jobs {
            let Some(drive) = self.drives.get(&job) else { continue };
            if drive.leaving {
                handed += 1;
                continue;
            }
            let busy = cx.registers.is_busy(job);
            if busy || drive.proposal.is_some() || !self.acts(job, cx) {
                continue;
            }
            let Some(kept) = cx.registers.get(job).filter(|kept| kept.chosen) else { continue };
            let heir = kept
                .keepers
                .iter()
                .find(|(node, _)| *node != self.me && cx.board.is_connected(*node));
            let Some((heir, _)) = heir else { continue };
            let mut body = kept.value.body.clone();
            body.steward = *heir;
            if self.sabotage.holds(Rule::TermCounts) {
                body.term += 1;
            }
            let seq = kept.value.seq;
            self.ops += 1;
            let op = self.ops;
            if let Some(drive) = self.drives.get_mut(&job) {
                drive.proposal = Some(op);
                drive.leaving = true;
            }
            handed += 1;
            cx.registers.compare_and_set(job, seq, op, body, cx.now);
        }
        handed
    }
}
