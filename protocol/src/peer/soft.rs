//! Soft state: this node's advert, everyone's adverts and heads, and their repair.

use std::collections::BTreeMap;

use tracing::debug;

use super::{Peer, Timer, Transmit, turns::Turns};
use crate::{
    BootId, JobId, Now, PeerId,
    bidder::Usage,
    copies::COPIES_CHECK_MS,
    identity::{Domain, SignedBytes},
    inventory::{Capacity, board::CLOCK_TOLERANCE_MS},
    job::{KEEPERS_MAX, State},
    message::{Advert, Head, Message, Piece, Reach, Soft, WANT_MAX},
    peer::Event,
    reconcile::{ItemId, Items, Sum},
    record::{self, Kept},
    steward::Stewards,
    wire,
};

/// How long between two adverts of one node at the least.
pub const ADVERT_GAP_MS: u64 = 5_000;
/// How long between two adverts of one node on average.
pub const ADVERT_MEAN_MS: u64 = 30_000;
/// How often an unchanged advert is renewed: thrice in its life.
pub const ADVERT_REFRESH_MS: u64 = 10 * 60_000;
/// How often soft state is reconciled with a random peer.
pub const RECONCILE_MS: u64 = 30_000;
/// The longest pause until a keeper says again of a head that it lacks the record; the first is
/// [`COPIES_CHECK_MS`], each later one twice as long.
const LACKING_PAUSE_MS: u64 = 10 * 60_000;
/// Of how many it says so at a time, every [`crate::copies::COPIES_CHECK_MS`].
const LACKING_MAX: u32 = 32;
/// Most job heads kept.
pub const HEADS_MAX: usize = 65_536;
/// How long a head is kept after its job was submitted.
pub const HEAD_MS: u64 = 30 * 24 * 3_600_000;
/// Adverts that may follow each other at [`ADVERT_GAP_MS`] after a quiet time.
const ADVERT_BURST: u64 = 6;

/// Whether the head of a job that was submitted then is told no more.
fn is_old(submitted_at_ms: u64, now: Now) -> bool {
    submitted_at_ms.saturating_add(HEAD_MS) < now.wall_ms
}

#[derive(Debug, Clone)]
pub(super) struct SoftState {
    boot: BootId,
    boot_count: u64,
    seq: u64,
    /// The latest that is known of when this node issued an advert while it had another store.
    other_store_ms: u64,
    /// Something but use changed since the last advert.
    pub(super) changed: bool,
    /// Adverts have not been held against the roster since it changed.
    pub(super) members_changed: bool,
    advertised: Option<Usage>,
    last_advert_ms: Option<u64>,
    /// Milliseconds of [`ADVERT_MEAN_MS`] saved up.
    credit_ms: u64,
    /// What a client offers when it is none.
    pub(super) away: Capacity,
    /// See [`Peer::set_full`].
    full: bool,
    next_reconcile_ms: u64,
    /// See [`Peer::keep_old_records`].
    pub(super) keeps_old: bool,
    control: Vec<core::net::SocketAddr>,
    data: Vec<core::net::SocketAddr>,
    reach: Reach,
    relays: Vec<PeerId>,
    items: Items,
    pub(super) turns: Turns,
    adverts: BTreeMap<PeerId, ItemId>,
    heads: BTreeMap<JobId, (Head, ItemId)>,
    /// Jobs whose heads name this node as keeper though it has no record of them.
    lacking: BTreeMap<JobId, Lacking>,
}

/// When it is said again that a record is lacking, on the boot clock, and after which pause then.
#[derive(Debug, Clone, Copy)]
struct Lacking {
    due_ms: u64,
    pause_ms: u64,
}

impl SoftState {
    pub(super) fn new(boot: BootId, boot_count: u64) -> Self {
        Self {
            boot,
            boot_count,
            seq: 0,
            other_store_ms: 0,
            changed: true,
            members_changed: false,
            advertised: None,
            last_advert_ms: None,
            credit_ms: ADVERT_BURST * ADVERT_MEAN_MS,
            away: Capacity::default(),
            full: false,
            next_reconcile_ms: 0,
            keeps_old: false,
            control: Vec::new(),
            data: Vec::new(),
            reach: Reach::Unknown,
            relays: Vec::new(),
            items: Items::default(),
            turns: Turns::default(),
            adverts: BTreeMap::new(),
            heads: BTreeMap::new(),
            lacking: BTreeMap::new(),
        }
    }

    pub(super) fn set_addresses(
        &mut self,
        control: Vec<core::net::SocketAddr>,
        data: Vec<core::net::SocketAddr>,
    ) {
        if self.control != control || self.data != data {
            (self.control, self.data) = (control, data);
            self.changed = true;
        }
    }

    pub(super) fn set_reach(&mut self, reach: Reach, relays: Vec<PeerId>) {
        if self.reach != reach || self.relays != relays {
            (self.reach, self.relays) = (reach, relays);
            self.changed = true;
        }
    }

    pub(super) fn set_full(&mut self, full: bool) {
        self.changed |= self.full != full;
        self.full = full;
    }

    pub(super) fn heads(&self) -> impl Iterator<Item = &Head> {
        self.heads.values().map(|(head, _)| head)
    }

    /// What was said last of `job`.
    pub(super) fn head_of(&self, job: JobId) -> Option<&Head> {
        self.heads.get(&job).map(|(head, _)| head)
    }

    /// The signed head of `job`.
    pub(super) fn head(&self, job: JobId) -> Option<Soft> {
        self.heads.get(&job).and_then(|(_, id)| self.items.get(id)).cloned()
    }

    pub(super) fn insert(&mut self, item: Soft) -> ItemId {
        let id = item.id();
        self.items.insert(item);
        id
    }

    fn insert_head(&mut self, head: Head, item: Soft) {
        let id = self.insert(item);
        if let Some((_, old)) = self.heads.insert(head.job, (head, id))
            && old != id
        {
            self.items.remove(&old);
        }
        if self.heads.len() > HEADS_MAX {
            let oldest = self.heads.values().map(|(h, _)| (h.submitted_at_ms, h.job)).min();
            if let Some((_, (_, id))) = oldest.and_then(|(_, job)| self.heads.remove_entry(&job)) {
                self.items.remove(&id);
            }
        }
    }

    fn insert_advert(&mut self, node: PeerId, item: Soft) {
        let id = self.insert(item);
        if let Some(old) = self.adverts.insert(node, id)
            && old != id
        {
            self.items.remove(&old);
        }
    }

    /// When the next advert may be made.
    fn advert_allowed_ms(&self, now: Now) -> u64 {
        let Some(last) = self.last_advert_ms else { return now.boot_ms };
        let gap = last.saturating_add(ADVERT_GAP_MS);
        let short = ADVERT_MEAN_MS.saturating_sub(self.credit_at(now));
        gap.max(now.after(short))
    }

    fn credit_at(&self, now: Now) -> u64 {
        let passed = now.boot_ms.saturating_sub(self.last_advert_ms.unwrap_or(now.boot_ms));
        (self.credit_ms + passed).min(ADVERT_BURST * ADVERT_MEAN_MS)
    }
}

impl Peer {
    /// Take an item; whether it was in order and news.
    pub(super) fn handle_soft(&mut self, item: Soft, now: Now) -> bool {
        let id = item.id();
        let news = self.take_soft(item, now);
        if self.soft.turns.arrived(&id) {
            self.turn_ended(now);
        }
        news
    }

    fn take_soft(&mut self, item: Soft, now: Now) -> bool {
        match item.piece() {
            Piece::Statement(signed) => {
                self.take_statement(signed.clone()).unwrap_or_else(|reason| {
                    debug!(%reason, "statement refused");
                    false
                })
            }
            Piece::Advert(_) => self.handle_advert(item, now),
            Piece::Head(_) => self.handle_head(item, now),
        }
    }

    /// Soft state that gossip brought. The driver has checked nothing; whether it should
    /// be passed on to others.
    pub fn handle_gossip(&mut self, item: Soft, now: Now) -> bool {
        let fresh = self.handle_soft(item, now);
        self.finish(now);
        fresh
    }

    /// Whether it was news.
    fn handle_advert(&mut self, item: Soft, now: Now) -> bool {
        let node = PeerId(item.signed().signer);
        if node == self.me {
            if let Some(advert) = item.verified_advert() {
                self.check_own_advert(advert.store, advert.boot_count, advert.boot);
                if advert.store != self.store && advert.issued_at_ms > self.soft.other_store_ms {
                    // From before it lost its disk, perhaps by a clock that was ahead: what is said
                    // from now on is to count as the later.
                    self.soft.other_store_ms = advert.issued_at_ms;
                    self.soft.changed = true;
                }
            }
            return false;
        }
        if !self.roster.state().is_member_node(node) {
            return false;
        }
        let news = self.board.post(item.clone(), now) == Some(true);
        if news {
            self.soft.insert_advert(node, item);
            self.out.events.push_back(Event::BoardChanged { node });
            self.copies.look_around = true;
            self.with_stewards(now, |stewards, cx| stewards.room_seen(node, cx));
        }
        news
    }

    /// Whether it was news.
    fn handle_head(&mut self, item: Soft, now: Now) -> bool {
        let signed = item.signed();
        let Some(head) = signed
            .verify(Domain::Head)
            .ok()
            .and_then(|bytes| wire::decode::<Head>(bytes).ok())
            .filter(|head| head.keeper.0 == signed.signer)
        else {
            return false;
        };
        let member = self.roster.state().is_member_node(head.keeper);
        let old = is_old(head.submitted_at_ms, now);
        let future = head.submitted_at_ms > now.wall_ms.saturating_add(CLOCK_TOLERANCE_MS);
        let id = item.id();
        // The later; of two alike, the one that all choose alike.
        let later =
            self.soft.heads.get(&head.job).is_none_or(|(known, known_id)| {
                (head.version(), *known_id) > (known.version(), id)
            });
        let named = head.keepers.contains(&head.keeper) && head.keepers.len() <= KEEPERS_MAX;
        let fresh = member && !old && !future && later && named;
        if fresh {
            let job = head.job;
            self.bidder.hint(job, &head.keepers);
            let lacks = head.keepers.contains(&self.me) && self.registers.spec(job).is_none();
            if lacks && !self.client {
                let lacking = Lacking { due_ms: now.boot_ms, pause_ms: COPIES_CHECK_MS };
                self.soft.lacking.insert(job, lacking);
            } else {
                self.soft.lacking.remove(&job);
            }
            self.soft.insert_head(head, item);
            let speaks = self.shy_until_ms.is_none() && !self.store_refused;
            if speaks && self.is_behind_its_head(job) {
                // What it left was given up, say, and nobody reached this keeper then.
                self.registers.read(job, now);
            }
        }
        fresh
    }

    /// Ask for records that this node is to keep and never got: it may have been off from the birth
    /// of a job until it was over, and then nobody drives the job who would notice.
    pub(super) fn ask_for_lacking(&mut self, now: Now) {
        let (me, soft, board) = (self.me, &mut self.soft, &self.board);
        let (registers, heads) = (&self.registers, &soft.heads);
        soft.lacking.retain(|job, _| registers.spec(*job).is_none() && heads.contains_key(job));
        let mut asked = 0;
        for (job, lacking) in soft.lacking.iter_mut().filter(|(_, it)| it.due_ms <= now.boot_ms) {
            let Some((head, _)) = heads.get(job) else { continue };
            let there = |node: &PeerId| *node != me && board.is_connected(*node);
            let others = head.keepers.iter().copied();
            let Some(to) = core::iter::once(head.keeper).chain(others).find(there) else {
                continue;
            };
            lacking.due_ms = now.after(lacking.pause_ms);
            lacking.pause_ms = lacking.pause_ms.saturating_mul(2).min(LACKING_PAUSE_MS);
            asked += 1;
            self.out.send(me, to, Message::NotInit { job: *job, epoch: head.epoch });
            if asked >= LACKING_MAX {
                break;
            }
        }
    }

    /// Tell the pool of a job kept here: at its birth, when its keepers change, and at its end.
    pub(super) fn announce_head(&mut self, job: JobId, now: Now) {
        let Some(kept) = self.registers.get(job) else { return };
        if is_old(kept.spec.spec.submitted_at_ms, now) {
            return;
        }
        let head = Head {
            job,
            keeper: self.me,
            keepers: kept.keepers.iter().map(|(keeper, _)| *keeper).collect(),
            epoch: kept.value.epoch,
            seq: kept.value.seq,
            owner: kept.spec.spec.owner,
            submitted_at_ms: kept.spec.spec.submitted_at_ms,
            state: kept.value.body.state(),
            chosen: kept.chosen,
        };
        let known = self.soft.head_of(job);
        if known.is_some_and(|known| known.version() >= head.version()) {
            return;
        }
        let item = Soft::head(SignedBytes::sign(&self.key, Domain::Head, wire::encode(&head)));
        self.bidder.hint(job, &head.keepers);
        self.soft.insert_head(head, item.clone());
        self.out.transmits.push_back(Transmit::Gossip(item));
    }

    /// Follow from what a call changed: heads of jobs that ended, use to be advertised.
    pub(super) fn after_changes(&mut self, now: Now) {
        let changed = core::mem::take(&mut self.out.changed);
        for job in changed {
            let Some(kept) = self.registers.get(job) else { continue };
            let ours = kept.chosen && kept.value.body.steward == self.me;
            let over = kept.value.body.state() == State::Done;
            let known = self.soft.head_of(job).map(Head::version);
            let epoch = known.map(|(epoch, ..)| epoch);
            // Of a job that is over nobody is the steward: who knows more than the others says so.
            let more =
                kept.chosen && over && known < Some((kept.value.epoch, kept.value.seq, true));
            if more || (ours && (over || epoch != Some(kept.value.epoch))) {
                self.announce_head(job, now);
            }
        }
        // Else who has left is asked for bids, and counts for what the pool could do.
        if self.soft.members_changed {
            self.expire_adverts(now);
        }
        let used = !self.client && self.soft.advertised.as_ref() != Some(self.bidder.usage());
        // Who is no member has nothing to advertise, and nobody would listen.
        if (self.soft.changed || used) && self.roster.state().is_member_node(self.me) {
            let at_ms = self.soft.advert_allowed_ms(now);
            let sooner = self.timers.due(&Timer::Soft).is_none_or(|due_ms| at_ms < due_ms);
            if sooner {
                self.timers.set(Timer::Soft, at_ms);
            }
        }
    }

    /// Forget adverts that expired, and those of nodes that are members no more.
    fn expire_adverts(&mut self, now: Now) {
        self.soft.members_changed = false;
        let roster = self.roster.state();
        self.board.expire(now, |node| roster.is_member_node(node));
        let board = &self.board;
        let gone: Vec<PeerId> = self
            .soft
            .adverts
            .keys()
            .filter(|node| **node != self.me && board.get(**node).is_none())
            .copied()
            .collect();
        for node in gone {
            if let Some(id) = self.soft.adverts.remove(&node) {
                self.soft.items.remove(&id);
            }
        }
    }

    pub(super) fn tend_soft_state(&mut self, now: Now) {
        self.expire_adverts(now);
        self.drop_old_records(now);
        self.advertise(now);
        if self.soft.next_reconcile_ms <= now.boot_ms {
            let peers: Vec<PeerId> = self.board.connected().collect();
            let pick = self.random.below(peers.len() as u64);
            if let Some(peer) = usize::try_from(pick).ok().and_then(|pick| peers.get(pick)) {
                self.soft.turns.enqueue(*peer);
            }
            let jitter = self.random.below(RECONCILE_MS / 4);
            self.soft.next_reconcile_ms = now.after(RECONCILE_MS - RECONCILE_MS / 8 + jitter);
        }
        let refresh = self.soft.last_advert_ms.map(|at_ms| at_ms + ADVERT_REFRESH_MS);
        let next_ms = self.soft.next_reconcile_ms.min(refresh.unwrap_or(u64::MAX));
        self.timers.set(Timer::Soft, next_ms.max(now.after(1)));
        self.next_turn(now);
    }

    /// Forget records of jobs that ended long ago, and heads that nobody would take any more.
    fn drop_old_records(&mut self, now: Now) {
        let heads = self.soft.heads.values();
        let stale = heads.filter(|(head, _)| is_old(head.submitted_at_ms, now));
        for job in stale.map(|(head, _)| head.job).collect::<Vec<_>>() {
            if let Some((_, id)) = self.soft.heads.remove(&job) {
                self.soft.items.remove(&id);
            }
        }
        if self.soft.keeps_old {
            return;
        }
        let old = |kept: &Kept| {
            let last = kept.value.body.history.last();
            last.is_some_and(|change| {
                change.state == State::Done
                    && change.at_ms.saturating_add(record::KEEP_MS) < now.wall_ms
            })
        };
        let jobs: Vec<JobId> =
            self.registers.iter().filter(|(_, kept)| old(kept)).map(|(job, _)| *job).collect();
        for job in jobs {
            self.registers.forget(job);
        }
    }

    fn advertise(&mut self, now: Now) {
        let usage = self.bidder.usage().clone();
        let stale = self
            .soft
            .last_advert_ms
            .is_none_or(|at_ms| at_ms.saturating_add(ADVERT_REFRESH_MS) <= now.boot_ms);
        let news = self.soft.changed || self.soft.advertised.as_ref() != Some(&usage);
        let allowed = self.soft.advert_allowed_ms(now) <= now.boot_ms;
        if !(allowed && (news || stale)) || !self.roster.state().is_member_node(self.me) {
            return;
        }
        self.soft.credit_ms = self.soft.credit_at(now).saturating_sub(ADVERT_MEAN_MS);
        self.soft.last_advert_ms = Some(now.boot_ms);
        self.soft.changed = false;
        self.soft.seq += 1;
        let after_ms = self.soft.other_store_ms.saturating_add(1);
        // Who is further ahead is believed by nobody.
        let ahead = after_ms > now.wall_ms.saturating_add(CLOCK_TOLERANCE_MS);
        let issued_at_ms = if ahead { now.wall_ms } else { now.wall_ms.max(after_ms) };
        let book = self.bidder.book();
        let advert = Advert {
            node: self.me,
            boot: self.soft.boot,
            boot_count: self.soft.boot_count,
            seq: self.soft.seq,
            issued_at_ms,
            store: self.store,
            client: self.client,
            owner_only: self.bidder.terms().owner_only.as_ref().map(|(_, reason)| reason.clone()),
            capacity: if self.client { self.soft.away.clone() } else { book.total().clone() },
            not_free: usage.0.clone(),
            free_cpu_cores: usage.1,
            free_ram_mib: usage.2,
            full: self.soft.full,
            control: self.soft.control.clone(),
            data: self.soft.data.clone(),
            reach: self.soft.reach,
            relays: self.soft.relays.clone(),
        };
        self.soft.advertised = Some(usage);
        let signed = SignedBytes::sign(&self.key, Domain::Advert, wire::encode(&advert));
        let item = Soft::advert(signed);
        self.board.post(item.clone(), now);
        self.soft.insert_advert(self.me, item.clone());
        self.out.transmits.push_back(Transmit::Gossip(item));
        let me = self.me;
        self.with_stewards(now, |stewards: &mut Stewards, cx| stewards.room_seen(me, cx));
    }

    // ---- reconciliation ---------------------------------------------------------------

    /// Ask whoever waits for it, if nobody is being asked.
    pub(super) fn next_turn(&mut self, now: Now) {
        let board = &self.board;
        if let Some(peer) = self.soft.turns.next(|peer| board.is_connected(peer), now)
            && let Some(query) = self.soft.items.ask()
        {
            self.out.send(self.me, peer, Message::Reconcile { sum: self.soft.items.sum(), query });
        }
        if let Some(due_ms) = self.soft.turns.due_ms() {
            let sooner = self.timers.due(&Timer::Turn).is_none_or(|at_ms| due_ms < at_ms);
            if sooner {
                self.timers.set(Timer::Turn, due_ms);
            }
        }
    }

    /// A peer told all it knows, and all of it is here.
    fn turn_ended(&mut self, now: Now) {
        if self.shy_until_ms.is_some() {
            self.take_up_records(now);
        }
        self.next_turn(now);
    }

    pub(super) fn handle_reconcile(&mut self, from: PeerId, sum: Sum, query: &[u8]) {
        match self.soft.items.answer(sum, query) {
            Some(answer) => self.out.send(self.me, from, Message::Reconciled { answer }),
            None => debug!(%from, "question of a reconciliation not understood"),
        }
    }

    pub(super) fn handle_reconciled(&mut self, from: PeerId, answer: &[u8], now: Now) {
        let Some(mut difference) = self.soft.items.compare(answer) else {
            debug!(%from, "answer of a reconciliation not understood");
            return;
        };
        // They come out of a hash set, and what is sent must not depend on its order.
        difference.need.sort_unstable();
        for ids in difference.need.chunks(WANT_MAX) {
            self.out.send(self.me, from, Message::Want { ids: ids.to_vec() });
        }
        // What this node says of itself it brings along: after a start nobody else has it.
        let own = self.soft.adverts.get(&self.me).filter(|id| difference.have.contains(id));
        if let Some(advert) = own.and_then(|id| self.soft.items.get(id)).cloned() {
            self.out.send(self.me, from, Message::Soft(advert));
        }
        let further = difference.next_query.is_some();
        if let Some(query) = difference.next_query {
            self.out.send(self.me, from, Message::Reconcile { sum: self.soft.items.sum(), query });
        }
        if self.soft.turns.answered(from, &difference.need, further) {
            self.turn_ended(now);
        }
    }

    pub(super) fn handle_want(&mut self, from: PeerId, ids: &[ItemId]) {
        self.send_items(from, &ids[..ids.len().min(WANT_MAX)]);
    }

    /// Statements go first: what they admit is what lets the rest be believed.
    fn send_items(&mut self, to: PeerId, ids: &[ItemId]) {
        let mut items: Vec<Soft> =
            ids.iter().filter_map(|id| self.soft.items.get(id)).cloned().collect();
        items.sort_by_key(|item| !matches!(item.piece(), Piece::Statement(_)));
        for item in items {
            self.out.send(self.me, to, Message::Soft(item));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Peer, StoreId,
        identity::KeyPair,
        inventory::{Capacity, Gpu, GpuUuid},
        message::{Piece, Soft},
        peer::{ADVERT_MEAN_MS, Config, Slot, Transmit},
        roster::testing::{Replica, WALL_MS, admit_node, claim, node_key},
        sabotage::Sabotage,
        time::Now,
        wire,
    };

    const NOW: Now = Now { boot_ms: 1_000, wall_ms: WALL_MS };

    /// A peer of machine `n` with the roster of `replica`.
    fn peer(replica: &Replica, key: &KeyPair, client: bool) -> Peer {
        let config = Config {
            key: key.clone(),
            store: StoreId([7; 16]),
            boot: crate::BootId([1; 16]),
            boot_count: 1,
            genesis: replica.roster.genesis_bytes().to_vec(),
            client,
            seed: [3; 32],
            sabotage: Sabotage::default(),
        };
        let mut peer = Peer::new(config).unwrap();
        for signed in replica.roster.statements() {
            let id = crate::roster::Statement::id(signed);
            peer.restore(&Slot::Statement(id).to_bytes(), &wire::encode(signed), NOW).unwrap();
        }
        peer.restored().unwrap();
        peer.resume(&[], NOW);
        peer
    }

    fn advert_of(peer: &mut Peer, now: Now) -> Soft {
        peer.handle_timeout(now);
        let sent = std::iter::from_fn(|| peer.poll_transmit());
        let adverts = sent.filter_map(|transmit| match transmit {
            Transmit::Gossip(item) if matches!(item.piece(), Piece::Advert(_)) => Some(item),
            _ => None,
        });
        adverts.last().unwrap()
    }

    #[test]
    fn a_machine_that_is_away_still_counts_and_is_neither_called_nor_made_keeper() {
        let mut founder = Replica::founder();
        let claim = claim(founder.roster.pool(), 1, 2, 0);
        founder.as_node(admit_node(claim, "node2")).unwrap();
        let gpu = Gpu {
            uuid: GpuUuid("G".to_owned()),
            model: "v100".to_owned(),
            full_name: "V100".to_owned(),
            memory_bytes: 1 << 34,
            simulated: true,
        };
        let capacity = Capacity::new(vec![gpu], 4, 1024);
        let request = "[v100]".parse().unwrap();

        let mut away = peer(&founder, &node_key(2), true);
        away.set_offer(Capacity::default(), None, NOW);
        away.set_away(capacity, NOW);
        assert_eq!(away.propose_keepers(b"salt"), [], "it ends before the job does");

        let mut other = peer(&founder, &node_key(1), true);
        other.peer_connected(away.id(), NOW);
        assert!(other.feasible(&request).is_err());
        assert!(other.handle_gossip(advert_of(&mut away, NOW), NOW));
        assert_eq!(other.feasible(&request), Ok(()), "the pool has it, at other times");
        assert_eq!(other.dry_run(&request, NOW), []);
        assert_eq!(other.propose_keepers(b"salt"), []);
        assert_eq!(away.feasible(&request), Ok(()));
        assert_eq!(away.dry_run(&request, NOW), []);
    }

    #[test]
    fn a_node_without_room_says_so_and_is_a_keeper_only_where_no_other_is() {
        let mut founder = Replica::founder();
        for n in 2..=4 {
            let claim = claim(founder.roster.pool(), 1, n, n);
            founder.as_node(admit_node(claim, &format!("node{n}"))).unwrap();
        }
        let mut me = peer(&founder, &node_key(1), false);
        me.set_offer(Capacity::new(Vec::new(), 4, 1024), None, NOW);
        let mut others: Vec<Peer> = (2..=4).map(|n| peer(&founder, &node_key(n), false)).collect();
        let mut at = NOW;
        let mut proposed = |full: &[usize], me: &mut Peer| {
            at = Now { boot_ms: at.boot_ms + ADVERT_MEAN_MS, wall_ms: at.wall_ms + ADVERT_MEAN_MS };
            for (n, other) in others.iter_mut().enumerate() {
                other.set_offer(Capacity::new(Vec::new(), 4, 1024), None, at);
                other.set_full(full.contains(&n), at);
                me.peer_connected(other.id(), at);
                assert!(me.handle_gossip(advert_of(other, at), at));
            }
            let keepers = me.propose_keepers(b"salt");
            assert_eq!(keepers.len(), 3);
            let is_named = |other: &Peer| keepers.iter().position(|(node, _)| *node == other.id());
            others.iter().map(is_named).collect::<Vec<_>>()
        };
        for n in 0..3 {
            assert_eq!(proposed(&[n], &mut me)[n], None, "two others have room");
        }
        // There where there is no other, and last.
        let places = proposed(&[0, 2], &mut me);
        assert_eq!(places[1], Some(1));
        assert!(places[0] == Some(2) || places[2] == Some(2));
    }
}
