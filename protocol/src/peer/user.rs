//! What users ask, and whether they may.

use super::Peer;
use crate::{
    JobId, Now, UserId,
    copies::Scene,
    identity::SignedBytes,
    job::{State, StopCause},
    message::{AttemptView, Command, JobFilter, JobView, RankView, Reply},
    record::{Keeper, Kept},
    steward::Sight,
    wire,
};

/// Most jobs in one answer.
pub const JOBS_MAX: usize = 1_000;

/// Bytes of jobs in one answer, which must fit into one message.
const JOBS_BYTES_MAX: usize = 768 << 10;

impl Peer {
    pub(super) fn answer_user(&mut self, signed: &SignedBytes, now: Now) -> Reply {
        let admitted = match self.guard.check(signed, &self.roster, self.me, now) {
            Ok(admitted) => admitted,
            Err(reason) => return Reply::Denied { reason: reason.to_string() },
        };
        let command: Command = match wire::decode(&admitted.request.command) {
            Ok(command) => command,
            Err(reason) => {
                let reason = format!("the request cannot be read ({reason}): is one side older?");
                return Reply::Denied { reason };
            }
        };
        let user = admitted.user;
        match command {
            Command::Jobs(filter) => Reply::Jobs(self.jobs(user, &filter)),
            Command::Job(job) => {
                self.make_sure_of_end(job, now);
                self.with_record(job, |peer, kept| Reply::Jobs(vec![peer.job_view(user, kept)]))
            }
            Command::Why(job) => self.with_record(job, |peer, kept| {
                if !peer.may_read(user, kept.spec.spec.owner) {
                    return denied("read", job);
                }
                let state = kept.value.body.state();
                if kept.value.body.steward != peer.me && state != State::Done {
                    return peer.unknown(job);
                }
                let scene = Scene { board: &peer.board, roster: &peer.roster, now };
                let sight = Sight { kept, copies: &peer.copies, scene };
                Reply::Why(Box::new(peer.stewards.why(&sight)))
            }),
            Command::Stop(job) => self.stop_job(user, job, now),
            Command::Node => Reply::Node(Box::new(self.bidder.view())),
            Command::Log(job) | Command::Files(job) => self.grant_read(user, job),
            Command::Remove { job, undo } => self.remove_data(user, job, undo, now),
        }
    }

    fn jobs(&self, user: UserId, filter: &JobFilter) -> Vec<JobView> {
        let wanted = |kept: &&Kept| filter.owner.is_none_or(|owner| kept.spec.spec.owner == owner);
        let (done, live): (Vec<&Kept>, Vec<&Kept>) = self
            .registers
            .iter()
            .map(|(_, kept)| kept)
            .filter(wanted)
            .partition(|kept| kept.value.body.state() == State::Done);
        let mut done = done;
        let since = |kept: &Kept| kept.value.body.history.last().map_or(0, |change| change.at_ms);
        done.sort_by_key(|kept| (core::cmp::Reverse(since(kept)), kept.spec.job));
        done.truncate(filter.done_max as usize);
        let mut left = JOBS_BYTES_MAX;
        let mut views = Vec::new();
        for kept in live.into_iter().chain(done).take(JOBS_MAX) {
            // A listing shows no commands, which may be long; `Job` gives them.
            let view = JobView { command: None, ..self.job_view(user, kept) };
            let Some(rest) = left.checked_sub(wire::encode(&view).len()) else { break };
            left = rest;
            views.push(view);
        }
        views
    }

    fn stop_job(&mut self, user: UserId, job: JobId, now: Now) -> Reply {
        let Some(kept) = self.registers.get(job) else { return self.unknown(job) };
        if !self.roster.state().may_control_job(user, kept.spec.spec.owner) {
            return denied("stop", job);
        }
        if kept.value.body.steward != self.me && kept.value.body.state() != State::Done {
            return self.unknown(job);
        }
        self.with_stewards(now, |stewards, cx| stewards.stop(job, user, cx));
        // With one keeper it is recorded at once.
        self.finish(now);
        if self.registers.get(job).is_some_and(|kept| !kept.chosen) {
            // From before a restart, or another keeper's: not sure yet.
            self.make_sure(job, now);
        }
        let body = self.registers.get(job).map(|kept| (&kept.value.body, kept.chosen));
        let recorded = body.is_some_and(|(body, chosen)| {
            let said = matches!(body.stop, Some(StopCause::By(_)));
            chosen && (said || body.state() == State::Done)
        });
        Reply::Stopping { state: body.map_or(State::Done, |(body, _)| body.state()), recorded }
    }

    /// The answer about a job whose record is not here, or not driven here.
    pub(super) fn unknown(&self, job: JobId) -> Reply {
        let names = |keepers: &[Keeper]| keepers.iter().map(|(keeper, _)| *keeper).collect();
        if let Some(kept) = self.registers.get(job) {
            let steward = Some(kept.value.body.steward);
            return Reply::Elsewhere { steward, keepers: names(&kept.keepers) };
        }
        match self.registers.moved(job) {
            Some(keepers) => Reply::Elsewhere { steward: None, keepers: names(keepers) },
            None => Reply::UnknownJob,
        }
    }

    /// Whether `user` may read log and files of a job this node keeps or runs a rank of.
    fn grant_read(&self, user: UserId, job: JobId) -> Reply {
        if let Some(kept) = self.registers.get(job) {
            if !self.may_read(user, kept.spec.spec.owner) {
                return denied("read", job);
            }
            return Reply::Granted(Box::new(self.job_view(user, kept)));
        }
        self.unknown(job)
    }

    /// A record kept here, as `user` may see it. Of one that says that its job is over, this
    /// begins to make sure: [`super::Event::RecordChanged`] tells when there is more to see.
    pub fn job_view_for(&mut self, user: UserId, job: JobId, now: Now) -> Option<JobView> {
        self.make_sure_of_end(job, now);
        self.registers.get(job).map(|kept| self.job_view(user, kept))
    }

    /// Somebody acts on the end of a job, and an end that only this keeper accepted may come
    /// to nothing. What is asked for in passing, such as a listing, is not worth a read.
    pub fn make_sure_of_end(&mut self, job: JobId, now: Now) {
        let is_over = |kept: &Kept| kept.value.body.state() == State::Done;
        if self.registers.get(job).is_some_and(|kept| !kept.chosen && is_over(kept)) {
            self.make_sure(job, now);
        }
    }

    /// Begin to find out what is chosen, unless this store must not speak (yet).
    pub(super) fn make_sure(&mut self, job: JobId, now: Now) {
        if self.shy_until_ms.is_none() && !self.store_refused {
            self.registers.read(job, now);
            self.finish(now);
        }
    }

    /// Whether `user` may read what a job of `owner` left on this node.
    #[must_use]
    pub fn may_read(&self, user: UserId, owner: UserId) -> bool {
        self.roster.state().may_read_job(user, owner)
    }

    /// Check a user's signed request for a command that the driver carries out itself.
    ///
    /// # Errors
    /// Why it is refused, with the next step.
    pub fn check_user(
        &mut self,
        signed: &SignedBytes,
        now: Now,
    ) -> Result<(UserId, Command), String> {
        let admitted = self
            .guard
            .check(signed, &self.roster, self.me, now)
            .map_err(|reason| reason.to_string())?;
        let command = wire::decode(&admitted.request.command)
            .map_err(|e| format!("the request cannot be read ({e}): is one side older?"))?;
        Ok((admitted.user, command))
    }

    fn with_record(&self, job: JobId, answer: impl FnOnce(&Self, &Kept) -> Reply) -> Reply {
        match self.registers.get(job) {
            Some(kept) => answer(self, kept),
            None => self.unknown(job),
        }
    }

    /// A job as `user` may see it: others see that it exists, whose it is, what it asks
    /// for and where it runs, since it occupies what they wait for.
    fn job_view(&self, user: UserId, kept: &Kept) -> JobView {
        let (spec, body) = (&kept.spec.spec, &kept.value.body);
        let may_read = self.may_read(user, spec.owner);
        let open = may_read || !spec.private;
        let ranks = body.ranks.iter().map(|rank| RankView {
            rank: rank.assignment.rank,
            group: rank.assignment.group,
            process: rank.assignment.process,
            node: rank.assignment.node,
            grant: rank.assignment.grant.clone(),
            state: rank.state,
            end: rank.end.clone().filter(|_| may_read).map(Box::new),
        });
        JobView {
            job: kept.spec.job,
            title: if open { spec.title.clone() } else { String::new() },
            owner: spec.owner,
            private: spec.private,
            request: spec.request.clone(),
            command: may_read.then(|| spec.command.clone()),
            source: if may_read { spec.source.clone() } else { crate::job::Source::default() },
            code: if may_read { Some(spec.code) } else { None },
            continues: spec.continues.as_ref().map(|continued| continued.job),
            submitted_at_ms: spec.submitted_at_ms,
            history: body.history.clone(),
            seq: kept.value.seq,
            chosen: kept.chosen,
            epoch: kept.value.epoch,
            keepers: kept.keepers.iter().map(|(keeper, _)| *keeper).collect(),
            steward: body.steward,
            term: body.term,
            recovered: body.recovered,
            retries: spec.retries,
            retried: body.retried,
            policy: spec.policy,
            lost_after_ms: spec.lost_after_ms,
            keep_every_ms: spec.keep_every_ms,
            outcome: body.outcome.clone(),
            attempt: AttemptView { number: body.attempt, ranks: ranks.collect() },
            saved: if may_read { body.saved.clone() } else { Vec::new() },
            removed: body.removed,
            holds: if may_read {
                self.copies.states(kept.spec.job, body.attempt)
            } else {
                Vec::new()
            },
        }
    }
}

pub(super) fn denied(verb: &str, job: JobId) -> Reply {
    let id = &job.to_string()[..8];
    let reason = format!("only the owner of job {id} and admins of the pool may {verb} it");
    Reply::Denied { reason }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use super::*;
    use crate::{
        BlobId, BootId, PeerId, StoreId,
        copies::COPIES_CHECK_MS,
        identity::Domain,
        job::{Command as JobCommand, Grace, JobSpec, Outcome, Policy, Source, VerifiedSpec},
        message::Message,
        peer::{Config, Event, SHY_MS, Slot, Transmit},
        record::{Ballot, Replica as Journalled, Value},
        roster::testing::{Replica, WALL_MS, admit_node, claim, node_key, user_key},
        sabotage::Sabotage,
    };

    pub(in crate::peer) const START: Now = Now { boot_ms: 1_000, wall_ms: WALL_MS };
    const LATER: Now = Now { boot_ms: 1_000 + SHY_MS, wall_ms: WALL_MS + SHY_MS };

    pub(in crate::peer) fn owner() -> UserId {
        UserId(user_key(1).public())
    }

    fn keeper(n: u8) -> Keeper {
        (PeerId(node_key(n).public()), StoreId([n; 16]))
    }

    pub(in crate::peer) fn spec(replica: &Replica) -> VerifiedSpec {
        let spec = JobSpec {
            pool: replica.roster.pool(),
            owner: owner(),
            title: String::new(),
            request: "[]".parse().unwrap(),
            command: JobCommand::Script,
            code: BlobId([0xc0; 32]),
            code_bytes: 1,
            source: Source::default(),
            continues: None,
            artifacts: Vec::new(),
            env: BTreeMap::new(),
            private: false,
            time_limit_ms: None,
            grace: Grace::default(),
            retries: 0,
            policy: Policy::Continue,
            lost_after_ms: 3_600_000,
            keep_every_ms: 60_000,
            nonce: [5; 16],
            submitted_at_ms: WALL_MS,
            keepers: [1, 2, 3].map(keeper).to_vec(),
        };
        let signed = SignedBytes::sign(&user_key(1), Domain::JobSpec, spec.to_bytes());
        VerifiedSpec::verify(signed).unwrap()
    }

    /// Node `n` after a restart, with a record of which it accepted this value in this ballot.
    pub(in crate::peer) fn restarted(
        replica: &Replica,
        n: u8,
        value: &Value,
        accepted: Ballot,
    ) -> Peer {
        started(replica, n, Some((value, accepted)))
    }

    /// The same, or without any record.
    pub(in crate::peer) fn started(
        replica: &Replica,
        n: u8,
        record: Option<(&Value, Ballot)>,
    ) -> Peer {
        let config = Config {
            key: node_key(n),
            store: keeper(n).1,
            boot: BootId([n; 16]),
            boot_count: 1,
            genesis: replica.roster.genesis_bytes().to_vec(),
            client: false,
            seed: [n; 32],
            sabotage: Sabotage::default(),
        };
        let mut peer = Peer::new(config).unwrap();
        for signed in replica.roster.statements() {
            let id = crate::roster::Statement::id(signed);
            peer.restore(&Slot::Statement(id).to_bytes(), &wire::encode(signed), START).unwrap();
        }
        if let Some((value, accepted)) = record {
            let spec = spec(replica);
            let kept = Journalled {
                spec: spec.signed.clone(),
                links: Vec::new(),
                promised: accepted,
                accepted,
                value_bytes: wire::encode(value),
            };
            peer.restore(&Slot::Record(spec.job).to_bytes(), &wire::encode(&kept), START).unwrap();
        }
        peer.restored().unwrap();
        peer.resume(&[], START);
        peer
    }

    fn sent(peer: &mut Peer) -> Vec<(PeerId, Message)> {
        while peer.poll_write().is_some() {}
        let sent = std::iter::from_fn(|| peer.poll_transmit());
        let direct = sent.filter_map(|transmit| match transmit {
            Transmit::Direct { to, message } => Some((to, message)),
            Transmit::Gossip(_) => None,
        });
        direct.collect()
    }

    fn prepares(peer: &mut Peer) -> Vec<(PeerId, Message)> {
        let sent = sent(peer).into_iter();
        sent.filter(|(_, message)| matches!(message, Message::Prepare { .. })).collect()
    }

    /// Three keepers: that the job is over is only what the first accepted.
    fn pool() -> ([Peer; 3], JobId) {
        let mut replica = Replica::founder();
        for n in [2, 3] {
            let claim = claim(replica.roster.pool(), 1, n, n);
            replica.as_node(admit_node(claim, &format!("node{n}"))).unwrap();
        }
        let spec = spec(&replica);
        let birth = Value::birth(&spec);
        let mut body = birth.body.clone();
        body.enter(State::Done, WALL_MS, "it succeeded");
        body.outcome = Some(Outcome::Succeeded);
        let done = birth.successor(body);
        let ballot = Ballot::ZERO.next_of(keeper(2).1);
        let mut peers = [
            restarted(&replica, 1, &done, ballot),
            restarted(&replica, 2, &birth, Ballot::ZERO),
            restarted(&replica, 3, &birth, Ballot::ZERO),
        ];
        for peer in &mut peers {
            sent(peer);
            while peer.poll_event().is_some() {}
        }
        (peers, spec.job)
    }

    #[test]
    fn an_end_that_one_keeper_accepted_is_final_once_a_majority_is_known_to_have_it() {
        let (mut peers, job) = pool();
        let view = peers[0].job_view_for(owner(), job, START).unwrap();
        assert_eq!((view.state(), view.chosen, view.is_final()), (State::Done, false, false));
        assert_eq!(prepares(&mut peers[0]), [], "it does not speak so soon after its start");

        for peer in &mut peers {
            peer.handle_timeout(LATER);
        }
        sent(&mut peers[0]);
        while peers[0].poll_event().is_some() {}
        assert!(!peers[0].job_view_for(owner(), job, LATER).unwrap().is_final());
        let mut mail: VecDeque<_> =
            sent(&mut peers[0]).into_iter().map(|(to, message)| (0, to, message)).collect();
        assert!(!mail.is_empty(), "the others are asked");
        // Again while it is under way.
        peers[0].job_view_for(owner(), job, LATER).unwrap();
        assert_eq!(prepares(&mut peers[0]), []);

        while let Some((from, to, message)) = mail.pop_front() {
            let from = peers[from].id();
            let at = peers.iter().position(|peer| peer.id() == to).unwrap();
            peers[at].handle_message(from, message, LATER);
            mail.extend(sent(&mut peers[at]).into_iter().map(|(to, message)| (at, to, message)));
        }
        let view = peers[0].job_view_for(owner(), job, LATER).unwrap();
        assert!(view.is_final(), "{view:?}");
        assert_eq!(prepares(&mut peers[0]), [], "what is sure is not asked for again");
        let events = std::iter::from_fn(|| peers[0].poll_event());
        let told = events.filter(|event| *event == Event::RecordChanged { job }).count();
        assert!(told > 0, "who watches it is told");
    }

    /// Nobody watches over a job that seems to be over, and whoever proposed its end may be gone.
    #[test]
    fn an_end_that_nobody_says_was_chosen_is_made_sure_of_by_the_first_keeper() {
        let (mut peers, job) = pool();
        peers[0].handle_timeout(LATER);
        let in_ms = |ms| Now { boot_ms: LATER.boot_ms + ms, wall_ms: LATER.wall_ms + ms };
        peers[0].handle_timeout(in_ms(COPIES_CHECK_MS));
        assert_eq!(prepares(&mut peers[0]), [], "a majority cannot be reached");
        peers[0].peer_connected(keeper(2).0, in_ms(COPIES_CHECK_MS));
        sent(&mut peers[0]);
        peers[0].handle_timeout(in_ms(2 * COPIES_CHECK_MS));
        let asked = prepares(&mut peers[0]);
        assert!(!asked.is_empty() && peers[0].registers.is_busy(job), "{asked:?}");
    }

    #[test]
    fn a_listing_asks_nobody() {
        let (mut peers, job) = pool();
        peers[0].handle_timeout(LATER);
        sent(&mut peers[0]);
        let listed = peers[0].jobs(owner(), &JobFilter { owner: None, done_max: 9 });
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].job, listed[0].chosen), (job, false));
        assert_eq!(prepares(&mut peers[0]), []);
    }
}
