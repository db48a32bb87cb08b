//! Copies: what the node around a peer is told to hold, and what it says it holds.

use std::sync::Arc;

use super::{Event, Peer, user::denied};
use crate::{
    BlobId, JobId, Now, PeerId, UserId,
    bidder::WorkId,
    copies::{CopyOrder, SaveOrder, Scene},
    job::{Attempt, Rank, RankState, Removed, State},
    message::{Message, Reply},
    record::Body,
    steward::{DONE_OP, Stewards},
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
        self.tell_of_copies(job, false);
        self.finish(now);
    }

    /// What is wanted of `job` cannot be copied here now, for this reason: no room, or no source
    /// has it. Others are asked instead, and this node again after [`crate::copies::CANNOT_MS`],
    /// or [`Peer::can_copy`].
    pub fn cannot_copy(&mut self, job: JobId, reason: String, now: Now) {
        if self.copies.cannot(job, reason, now) {
            self.tell_of_copies(job, false);
        }
        self.finish(now);
    }

    /// What was in the way of copying `job` here is not any more.
    pub fn can_copy(&mut self, job: JobId, now: Now) {
        self.copies.can(job);
        self.tell_of_copies(job, true);
        self.finish(now);
    }

    /// The process of a rank runs here, or ran until this node started again, and this is its
    /// `keep/` as it is now, complete and durable here. `seq` counts such copies of this rank in
    /// this attempt; the same again changes nothing. To be said again after each start, for the
    /// newest of each rank.
    pub fn saved(&mut self, id: WorkId, seq: u64, tree: BlobId, now: Now) {
        let keepers = self.bidder.keepers_of_work(id).or_else(|| self.bidder.keepers_of_end(id));
        let keepers = keepers.unwrap_or_default();
        self.copies.saved(id, (seq, tree), keepers, &self.bidder, now);
        self.finish(now);
    }

    /// For how long this node holds what a job left after it is over, in milliseconds; 30 days
    /// where this is never said.
    pub fn set_keep_done(&mut self, keep_done_ms: u64, now: Now) {
        self.copies.keep_done_ms = keep_done_ms;
        self.copies.look_around = true;
        self.finish(now);
    }

    /// Whether records of jobs that ended long ago are kept all the same, since the wall clock may
    /// be wrong about how long ago that is. A record that is forgotten does not come back. Not
    /// kept where this is never said.
    pub fn keep_old_records(&mut self, keeps: bool) {
        self.soft.keeps_old = keeps;
    }

    fn tell_of_copies(&mut self, job: JobId, everybody: bool) {
        if self.shy_until_ms.is_some() || self.store_refused {
            return;
        }
        if let Some(kept) = self.registers.get(job) {
            self.copies.tell(kept, everybody, &mut self.out);
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
                let scene = Scene { board: &self.board, roster: &self.roster, now };
                self.copies.acknowledged(from, WorkId { job, attempt, rank }, seq, scene);
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
        let (registers, soft) = (&self.registers, &self.soft);
        let is_over = |id: WorkId| match registers.get(id.job).map(|kept| &kept.value.body) {
            Some(body) => body.state() == State::Done || body.attempt > id.attempt,
            None => {
                soft.head_of(id.job).is_some_and(|head| head.chosen && head.state == State::Done)
            }
        };
        let bidder = &self.bidder;
        let is_over = |id: WorkId| bidder.keepers_of_end(id).is_none() && is_over(id);
        self.copies.review_saves(|id| bidder.keepers_of_work(id), is_over, scene);
        let all = self.registers.iter().map(|(job, _)| *job);
        for job in self.copies.due(scene, all) {
            if self.copies.consider(job, self.registers.get(job), scene) {
                self.out.events.push_back(Event::CopiesChanged { job });
            }
        }
        if core::mem::take(&mut self.copies.look_at_done)
            && self.shy_until_ms.is_none()
            && !self.store_refused
        {
            self.with_stewards(now, Stewards::check_done);
            self.make_sure_of_ends(now);
            self.ask_for_lacking(now);
        }
        for job in self.copies.repeated() {
            self.tell_of_copies(job, false);
        }
        for job in self.copies.told_now(now) {
            self.tell_of_copies(job, false);
        }
    }

    /// Give up what a job left, or take that back: a change of the record that any keeper may
    /// propose, since nobody drives a job that is over.
    pub(super) fn remove_data(&mut self, user: UserId, job: JobId, undo: bool, now: Now) -> Reply {
        let Some(kept) = self.registers.get(job) else { return self.unknown(job) };
        if !self.roster.state().may_control_job(user, kept.spec.spec.owner) {
            return denied("remove", job);
        }
        let state = kept.value.body.state();
        if state != State::Done {
            let id = &job.to_string()[..8];
            let reason = format!("job {id} is {state}, not over: stop it first");
            return Reply::Denied { reason };
        }
        if self.shy_until_ms.is_some() || self.store_refused {
            return Reply::Removed { removed: kept.value.body.removed, recorded: false };
        }
        if !kept.chosen {
            self.make_sure(job, now);
        }
        let done = |body: &Body| body.removed.is_none() == undo;
        let due = self.registers.get(job).filter(|kept| kept.chosen && !done(&kept.value.body));
        if let Some(kept) = due
            && !self.registers.is_busy(job)
        {
            let (seq, mut body) = (kept.value.seq, kept.value.body.clone());
            body.removed = (!undo).then_some(Removed { by: user, at_ms: now.wall_ms });
            self.registers.compare_and_set(job, seq, DONE_OP, body, now);
            // With one keeper it is recorded at once.
            self.finish(now);
        }
        let kept = self.registers.get(job);
        Reply::Removed {
            removed: kept.and_then(|kept| kept.value.body.removed),
            recorded: kept.is_some_and(|kept| kept.chosen && done(&kept.value.body)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BlobId, StoreId,
        copies::{
            CANNOT_MS, COPIES_CHECK_MS, EndOrder, HERE_MS, SAVES_AWAY_MS, SAVES_WAIT_MS, Standing,
        },
        job::{Ending, Outcome, RankAssignment, RankEnd, RankRecord, Saved, StopCause},
        message::CopyState,
        peer::{SHY_MS, Transmit, user::tests as user},
        record::{Ballot, Value},
        request::Grant,
        roster::testing::{Replica, admit_node, claim, node_key},
        steward::{AWAY_MS, Sight},
    };

    const TREE: BlobId = BlobId([0xe0; 32]);

    fn at(ms: u64) -> Now {
        Now { boot_ms: user::START.boot_ms + ms, wall_ms: user::START.wall_ms + ms }
    }

    fn node(n: u8) -> PeerId {
        PeerId(node_key(n).public())
    }

    /// Four nodes, of whom three keep a job; rank 0 ran, or runs, on the fourth.
    fn replica() -> Replica {
        let mut replica = Replica::founder();
        for n in [2, 3, 4] {
            let claim = claim(replica.roster.pool(), 1, n, n);
            replica.as_node(admit_node(claim, &format!("node{n}"))).unwrap();
        }
        replica
    }

    fn value(replica: &Replica, state: State, end: Option<RankEnd>) -> Value {
        let birth = Value::birth(&user::spec(replica));
        let mut body = birth.body.clone();
        body.attempt = Attempt(1);
        let grant = Grant { gpus: Vec::new(), cpu_cores: 1, ram_mib: 0 };
        let hold = crate::HoldId([1; 16]);
        let (rank, group, process) = (Rank(0), 0, 0);
        let node = node(4);
        body.ranks = vec![RankRecord {
            assignment: RankAssignment { rank, group, process, node, hold, grant },
            state: if end.is_some() { RankState::Ended } else { RankState::Running },
            end,
            store: Some(StoreId([4; 16])),
        }];
        body.outcome = (state == State::Done).then_some(Outcome::Succeeded);
        body.enter(state, user::START.wall_ms, "so it goes");
        birth.successor(body)
    }

    fn end() -> RankEnd {
        let bare = RankEnd::bare(Ending::Exited { code: 0 }, user::START.wall_ms);
        RankEnd { log_bytes: 7, keep: Some(TREE), ..bare }
    }

    /// Keeper `n` with this value, connected to all others.
    fn keeper(n: u8, value: &Value) -> Peer {
        let replica = replica();
        let ballot = Ballot::ZERO.next_of(StoreId([n; 16]));
        let mut peer = user::restarted(&replica, n, value, ballot);
        for other in (1..=4).filter(|other| *other != n) {
            peer.peer_connected(node(other), at(0));
        }
        peer.handle_timeout(at(SHY_MS));
        sent(&mut peer);
        peer
    }

    fn sent(peer: &mut Peer) -> Vec<(PeerId, Message)> {
        while peer.poll_write().is_some() || peer.poll_event().is_some() {}
        let sent = std::iter::from_fn(|| peer.poll_transmit());
        let copies = sent.filter_map(|transmit| match transmit {
            Transmit::Direct { to, message: message @ Message::Copies { .. } } => {
                Some((to, message))
            }
            _ => None,
        });
        copies.collect()
    }

    fn ends(peer: &Peer, job: JobId) -> Option<Vec<(Rank, Option<EndOrder>)>> {
        let order = peer.copies_wanted(job)?;
        Some(order.ranks.iter().map(|rank| (rank.rank, rank.end)).collect())
    }

    #[test]
    fn the_second_keeper_holds_what_rank_0_left_and_the_third_when_it_is_away() {
        let done = value(&replica(), State::Done, Some(end()));
        let job = done.job;
        let [first, mut second, mut third] = [1, 2, 3].map(|n| keeper(n, &done));
        assert_eq!(ends(&first, job), None);
        let wanted = EndOrder { log_bytes: 7, keep: Some(TREE), artifacts: None };
        assert_eq!(ends(&second, job), Some(vec![(Rank(0), Some(wanted))]));
        let sources = second.copies_wanted(job).unwrap().ranks[0].sources.clone();
        assert_eq!(sources, [node(4), node(3), node(1)], "its node before the other keepers");
        assert_eq!(ends(&third, job), None);

        second.copied(job, Attempt(1), Rank(0), at(4_000));
        assert_eq!(ends(&second, job), None, "it is here");
        second.copy_lost(job, Attempt(1), Rank(0), at(5_000));
        assert_eq!(ends(&second, job).map(|ends| ends.len()), Some(1), "and is made anew");

        third.peer_disconnected(node(2), at(4_000));
        third.handle_timeout(at(4_000 + AWAY_MS - COPIES_CHECK_MS));
        assert_eq!(ends(&third, job), None, "it may come back");
        third.handle_timeout(at(4_000 + AWAY_MS + COPIES_CHECK_MS));
        assert_eq!(ends(&third, job), Some(vec![(Rank(0), Some(wanted))]));
        third.peer_connected(node(2), at(5_000 + AWAY_MS + COPIES_CHECK_MS));
        assert_eq!(ends(&third, job), None, "it came back");
    }

    #[test]
    fn what_a_job_leaves_that_is_not_over_waits_for_nobody_who_is_away() {
        for (state, end) in [(State::Running, None), (State::Cleaning, Some(end()))] {
            let live = value(&replica(), state, end);
            let job = live.job;
            let mut third = keeper(3, &live);
            assert_eq!(ends(&third, job), None);
            third.peer_disconnected(node(2), at(4_000));
            third.handle_timeout(at(4_000 + HERE_MS / 2));
            assert_eq!(ends(&third, job), None, "its daemon may be starting again");
            third.handle_timeout(at(4_000 + HERE_MS + COPIES_CHECK_MS));
            assert_eq!(ends(&third, job).map(|ends| ends.len()), Some(1), "{state}");
            third.peer_connected(node(2), at(5_000 + HERE_MS + COPIES_CHECK_MS));
            assert_eq!(ends(&third, job), None, "it came back");
        }
    }

    #[test]
    fn who_cannot_hold_something_says_so_and_the_next_does_for_a_while() {
        let done = value(&replica(), State::Done, Some(end()));
        let job = done.job;
        let (mut second, mut third) = (keeper(2, &done), keeper(3, &done));
        second.cannot_copy(job, "no room".to_owned(), at(4_000));
        assert_eq!(ends(&second, job), None);
        let said = sent(&mut second);
        let to: Vec<PeerId> = said.iter().map(|(to, _)| *to).collect();
        assert_eq!(to, [node(1), node(3)], "the other keepers are told");
        second.cannot_copy(job, "no room".to_owned(), at(4_005));
        assert_eq!(sent(&mut second), [], "and once is enough");
        third.handle_message(node(2), said[1].1.clone(), at(4_010));
        assert_eq!(ends(&third, job).map(|ends| ends.len()), Some(1));
        third.handle_timeout(at(4_010 + CANNOT_MS + COPIES_CHECK_MS));
        assert_eq!(ends(&third, job), None, "it is asked once more");
        second.can_copy(job, at(9_000));
        assert_eq!(ends(&second, job).map(|ends| ends.len()), Some(1));
    }

    #[test]
    fn an_attempt_that_waits_in_vain_for_what_it_goes_on_from_is_no_failed_start() {
        let mut preparing = value(&replica(), State::Preparing, None);
        let failed = Ending::FailedToStart { reason: "no such file".to_owned() };
        let waits = RankEnd {
            note: Some("what this process is to go on from".to_owned()),
            ..RankEnd::bare(Ending::NeverStarted, user::START.wall_ms)
        };
        for times in 1..10 {
            let first = keeper(1, &preparing);
            let kept = first.record(preparing.job).unwrap();
            let end = waits.clone();
            let body = crate::steward::after_preparing(kept, end, at(SHY_MS)).unwrap();
            let last = body.history.last().unwrap();
            assert_eq!((last.state, body.failed_starts), (State::Waiting, 0), "{times}");
            assert_eq!(last.reason, "rank 0: never started: what this process is to go on from");
            preparing.body.attempt.0 += 1;
        }
        let first = keeper(1, &preparing);
        let kept = first.record(preparing.job).unwrap();
        let end = RankEnd::bare(failed, user::START.wall_ms);
        let body = crate::steward::after_preparing(kept, end, at(SHY_MS)).unwrap();
        assert_eq!(body.failed_starts, 1);
    }

    #[test]
    fn what_was_given_up_or_has_expired_is_not_copied() {
        let mut done = value(&replica(), State::Done, Some(end()));
        let job = done.job;
        let mut second = keeper(2, &done);
        second.set_keep_done(60_000, at(4_000));
        assert!(second.copies_wanted(job).is_some());
        second.handle_timeout(at(60_000 + COPIES_CHECK_MS));
        assert_eq!(second.copies_wanted(job), None);
        let by = user::owner();
        done.body.removed = Some(crate::job::Removed { by, at_ms: user::START.wall_ms });
        assert_eq!(keeper(2, &done).copies_wanted(job), None);
    }

    #[test]
    fn saves_are_taken_from_the_node_that_runs_the_rank_and_nobody_else() {
        let running = value(&replica(), State::Running, None);
        let job = running.job;
        let mut second = keeper(2, &running);
        let (attempt, rank) = (Attempt(1), Rank(0));
        let order = second.copies_wanted(job).unwrap();
        assert!(order.ranks[0].follow && order.ranks[0].save.is_none());
        let save = |seq| Message::Save { job, attempt, rank, seq, tree: TREE };
        second.handle_message(node(3), save(1), at(4_000));
        assert_eq!(second.copies_wanted(job), Some(order), "another node says nothing of it");
        second.handle_message(node(4), save(2), at(4_000));
        let wanted = second.copies_wanted(job).unwrap().ranks[0].save;
        assert_eq!(wanted, Some(SaveOrder { seq: 2, tree: TREE }));
        second.save_held(job, attempt, rank, 2, TREE, at(5_000));
        assert_eq!(second.copies_wanted(job).unwrap().ranks[0].save, None);
        let held = Message::SaveHeld { job, attempt, rank, seq: 2 };
        let transmits = std::iter::from_fn(|| second.poll_transmit());
        let direct = Transmit::Direct { to: node(4), message: held };
        assert_eq!(transmits.filter(|transmit| *transmit == direct).count(), 1);
    }

    #[test]
    fn what_is_held_is_told_to_keepers_only() {
        let done = value(&replica(), State::Cleaning, Some(end()));
        let job = done.job;
        let mut second = keeper(2, &done);
        second.copied(job, Attempt(1), Rank(0), at(4_000));
        sent(&mut second);
        let ask = Message::AskCopies { job, attempt: Attempt(1), without: Vec::new() };
        for (from, ranks) in [(node(1), 1), (node(4), 0)] {
            second.handle_message(from, ask.clone(), at(4_100));
            let said = sent(&mut second);
            let [(to, Message::Copies { ranks: told, .. })] = &said[..] else { panic!("{said:?}") };
            assert_eq!((*to, told.len()), (from, ranks), "a tree's id is as good as the tree");
        }
    }

    fn standing(peer: &Peer, job: JobId, since: Now, now: Now) -> Standing {
        let kept = peer.registers.get(job).unwrap();
        let scene = Scene { board: &peer.board, roster: &peer.roster, now };
        peer.copies.standing(kept, &kept.value.body.ranks[0], since.boot_ms, scene)
    }

    /// What `from` says it has of rank 0.
    fn say(peer: &mut Peer, from: PeerId, job: JobId, complete: bool, now: Now) {
        let (attempt, rank) = (Attempt(1), Rank(0));
        let state = CopyState { rank, complete, save: None, under_way: false, cannot: None };
        let seq = peer.registers.get(job).unwrap().value.seq;
        peer.handle_message(from, Message::Copies { job, attempt, seq, ranks: vec![state] }, now);
    }

    /// The first keeper of a job whose rank ran on a node that lost its disk since.
    fn steward_of_what_a_lost_disk_had() -> (Peer, JobId) {
        let mut cleaning = value(&replica(), State::Cleaning, Some(end()));
        cleaning.body.ranks[0].store = Some(StoreId([40; 16]));
        let job = cleaning.job;
        let mut first = keeper(1, &cleaning);
        let ballot = Ballot::ZERO.next_of(StoreId([4; 16]));
        let mut fourth = user::restarted(&replica(), 4, &cleaning, ballot);
        fourth.handle_timeout(at(3_999));
        let adverts = std::iter::from_fn(|| fourth.poll_transmit());
        let mut adverts = adverts.filter_map(|transmit| match transmit {
            Transmit::Gossip(item) if item.verified_advert().is_some() => Some(item),
            _ => None,
        });
        assert!(first.handle_gossip(adverts.next().unwrap(), at(4_000)));
        (first, job)
    }

    #[test]
    fn a_keeper_that_connects_again_is_asked_before_anything_is_lost() {
        let (mut first, job) = steward_of_what_a_lost_disk_had();
        say(&mut first, node(2), job, false, at(4_100));
        say(&mut first, node(3), job, true, at(4_100));
        let since = at(4_000);
        assert!(!matches!(standing(&first, job, since, at(4_200)), Standing::Lost));
        first.peer_disconnected(node(3), at(5_000));
        first.peer_connected(node(3), at(5_100));
        let stands = standing(&first, job, since, at(5_200));
        assert_eq!(stands, Standing::Gone { since_ms: at(5_100).boot_ms });
        say(&mut first, node(3), job, false, at(5_300));
        assert_eq!(standing(&first, job, since, at(5_400)), Standing::Lost, "it says so itself");
    }

    #[test]
    fn what_a_keeper_may_have_that_is_away_for_long_is_gone_not_lost() {
        let (mut first, job) = steward_of_what_a_lost_disk_had();
        first.peer_disconnected(node(3), at(4_000));
        let later = 4_000 + 2 * AWAY_MS;
        say(&mut first, node(2), job, false, at(later));
        let stands = standing(&first, job, at(later), at(later + 100));
        assert_eq!(stands, Standing::Gone { since_ms: at(4_000).boot_ms });
    }

    fn finish(peer: &Peer, job: JobId, since: Now, give_up: bool, now: Now) -> (Body, String) {
        let kept = peer.registers.get(job).unwrap();
        let scene = Scene { board: &peer.board, roster: &peer.roster, now };
        let sight = Sight { kept, copies: &peer.copies, scene };
        crate::steward::finished(&sight, since.boot_ms, give_up)
    }

    #[test]
    fn the_next_attempt_waits_for_keepers_that_may_soon_be_back_where_nothing_is_known() {
        let bare = RankEnd::bare(Ending::Stopped, user::START.wall_ms);
        let mut stopping = value(&replica(), State::Stopping, Some(bare));
        stopping.body.stop = Some(StopCause::StartFailed("no port".to_owned()));
        let job = stopping.job;
        let mut first = keeper(1, &stopping);
        first.peer_disconnected(node(3), at(4_000));
        let since = at(5_000);
        for other in [2, 4] {
            say(&mut first, node(other), job, false, at(5_100));
        }
        let (body, why) = finish(&first, job, since, false, at(5_200));
        assert_eq!(body.state(), State::Stopping, "the third may have a copy of keep/");
        assert!(why.contains("no longer than 3 min"), "{why}");
        let (body, _) = finish(&first, job, since, false, at(5_000 + SAVES_AWAY_MS));
        assert_eq!((body.state(), body.saved.len()), (State::Waiting, 0), "and it is not awaited");

        first.peer_connected(node(3), at(6_000));
        let (body, _) = finish(&first, job, since, false, at(6_000 + SAVES_WAIT_MS));
        assert_eq!(body.state(), State::Stopping, "it is back, and has not said anything yet");
        let (attempt, rank, save) = (Attempt(1), Rank(0), Some((7, TREE)));
        let state = CopyState { rank, complete: false, save, under_way: false, cannot: None };
        let seq = stopping.seq;
        let copies = Message::Copies { job, attempt, seq, ranks: vec![state] };
        first.handle_message(node(3), copies, at(6_100));
        let (body, _) = finish(&first, job, since, false, at(6_200));
        let saved = Saved { rank, attempt, node: node(3), tree: TREE };
        assert_eq!((body.state(), &body.saved[..]), (State::Waiting, &[saved][..]));
    }

    #[test]
    fn a_copy_of_keep_whose_holder_is_gone_is_announced_again() {
        let running = value(&replica(), State::Running, None);
        let id = WorkId { job: running.job, attempt: Attempt(1), rank: Rank(0) };
        let mut fourth = keeper(4, &running);
        let keepers = [1, 2, 3].map(node).to_vec();
        let scene = |peer: &Peer, now| (peer.board.clone(), peer.roster.clone(), now);
        fourth.copies.saved(id, (1, TREE), keepers.clone(), &fourth.bidder, at(4_000));
        let (board, roster, now) = scene(&fourth, at(4_100));
        let seen = Scene { board: &board, roster: &roster, now };
        fourth.copies.acknowledged(node(1), id, 1, seen);
        fourth.handle_timeout(at(4_100));
        let review = |peer: &mut Peer, keepers: Option<Vec<PeerId>>, over, ms| {
            peer.copies.look_at_saves = true;
            let (board, roster, now) = scene(peer, at(ms));
            let seen = Scene { board: &board, roster: &roster, now };
            peer.copies.review_saves(|_| keepers.clone(), |_| over, seen);
            peer.copies.is_save_due(id)
        };
        assert!(!review(&mut fourth, Some(keepers.clone()), false, 4_200), "one more has it");
        fourth.peer_disconnected(node(1), at(5_000));
        assert!(!review(&mut fourth, Some(keepers.clone()), false, 5_000 + HERE_MS / 2));
        assert!(review(&mut fourth, Some(keepers), false, 5_001 + HERE_MS), "it is gone");
        assert!(fourth.copies.has_save_for(id.job, node(2)));
        review(&mut fourth, None, false, 6_000 + HERE_MS);
        assert!(fourth.copies.has_save_for(id.job, node(2)), "a steward may ask for it");
        assert!(!review(&mut fourth, None, true, 6_000 + HERE_MS));
        assert!(!fourth.copies.has_save_for(id.job, node(2)), "the job is over");
    }

    #[test]
    fn a_keeper_that_was_off_until_the_job_was_over_asks_for_its_record() {
        let done = value(&replica(), State::Done, Some(end()));
        let job = done.job;
        let mut first = keeper(1, &done);
        let mut third = user::started(&replica(), 3, None);
        for other in [1, 2, 4] {
            third.peer_connected(node(other), at(0));
        }
        third.handle_timeout(at(SHY_MS));
        first.announce_head(job, at(SHY_MS));
        let head = first.soft.head(job);
        assert!(third.handle_gossip(head.unwrap(), at(SHY_MS)));
        let all = |peer: &mut Peer| -> Vec<(PeerId, Message)> {
            while peer.poll_write().is_some() || peer.poll_event().is_some() {}
            let all = std::iter::from_fn(|| peer.poll_transmit());
            let direct = all.filter_map(|transmit| match transmit {
                Transmit::Direct { to, message } => Some((to, message)),
                _ => None,
            });
            direct.collect()
        };
        all(&mut third);
        let lacks = (node(1), Message::NotInit { job, epoch: 0 });
        let mut told = 0;
        for n in 1..=6 {
            third.handle_timeout(at(SHY_MS + n * COPIES_CHECK_MS));
            told += all(&mut third).into_iter().filter(|sent| *sent == lacks).count();
        }
        assert_eq!(told, 3, "less and less often");
        all(&mut first);
        // Six days later the job is still brought to it.
        let late = at(6 * 24 * 3_600_000);
        first.handle_message(node(3), lacks.1, late);
        let init = all(&mut first)
            .into_iter()
            .find(|(to, message)| *to == node(3) && matches!(message, Message::Init { .. }));
        third.handle_message(node(1), init.unwrap().1, late);
        assert!(third.registers.get(job).is_some());
        let reads = all(&mut third);
        let (first, second) = (node(1), node(2));
        let prepares: Vec<_> = reads
            .iter()
            .map(|(to, message)| (to, matches!(message, Message::Prepare { .. })))
            .collect();
        assert!(
            prepares.contains(&(&first, true)) && prepares.contains(&(&second, true)),
            "{reads:?}"
        );
    }

    #[test]
    fn a_clock_that_may_be_wrong_costs_no_record() {
        let done = value(&replica(), State::Done, Some(end()));
        let job = done.job;
        let mut first = keeper(1, &done);
        first.keep_old_records(true);
        let month = crate::record::KEEP_MS + 1;
        let set = Now { wall_ms: at(5_000).wall_ms + month, ..at(24 * 3_600_000) };
        first.handle_timeout(set);
        assert!(first.registers.get(job).is_some());
        first.keep_old_records(false);
        first.handle_timeout(Now { boot_ms: set.boot_ms + 24 * 3_600_000, ..set });
        assert!(first.registers.get(job).is_none(), "it is as old as it seems");
    }

    #[test]
    fn only_owner_and_admins_remove_and_only_what_is_over() {
        let replica = replica();
        let running = value(&replica, State::Running, None);
        let job = running.job;
        let mut peer = keeper(1, &running);
        let reply = peer.remove_data(user::owner(), job, false, at(4_000));
        assert!(matches!(&reply, Reply::Denied { reason } if reason.contains("stop it first")));
        let stranger = UserId(crate::roster::testing::user_key(9).public());
        let mut peer = keeper(1, &value(&replica, State::Done, Some(end())));
        let reply = peer.remove_data(stranger, job, false, at(4_000));
        assert!(matches!(&reply, Reply::Denied { reason } if reason.contains("only the owner")));
        let reply = peer.remove_data(user::owner(), job, false, at(4_000));
        assert_eq!(reply, Reply::Removed { removed: None, recorded: false }, "not chosen yet");
    }
}
