//! Keeping records: what keepers, stewards and bidders say to each other about them.

use std::sync::Arc;

use tracing::{debug, warn};

use super::{Event, Peer, Timer};
use crate::{
    JobId, Now, PeerId, UserId,
    bidder::Proven,
    identity::SignedBytes,
    job::{State, VerifiedSpec},
    message::{Adopt, Install, Message},
    record::{Certificate, Keeper, Kept, Link, Value, check_force_recover, follow, quorum_of},
    sabotage::Rule,
    steward::Stewards,
};

/// How much further than the boot clock the wall clock may move between two calls, beside one
/// part in a hundred, before neither is believed to have run evenly.
const JUMP_MS: u64 = 2_000;
/// Over how long, on the boot clock, the rates of the two clocks are compared at the least.
const RATE_WINDOW_MS: u64 = 60_000;
/// One part in so many is how far they may differ over that time: far more than the 0.05 % of
/// sound machines and the corrections of NTP, and less than the 5 % that is not to go unnoticed.
const RATE_TOLERANCE: u64 = 25;
/// Most records of jobs that seem to be over that are made sure of at a time.
const ENDS_MAX: usize = 32;

impl Peer {
    /// A clock that was set, or a machine that stood still, makes what was measured by it
    /// worthless: stewards fall silent until they are heard again, waits begin anew.
    pub(super) fn notice_clock(&mut self, now: Now) {
        let before = self.last_now.replace(now);
        let Some(before) = before else {
            self.clocks_since = now;
            return;
        };
        let boot_ms = now.boot_ms.saturating_sub(before.boot_ms);
        let wall_ms = now.wall_ms.saturating_sub(before.wall_ms);
        let back =
            now.boot_ms < before.boot_ms || now.wall_ms.saturating_add(JUMP_MS) < before.wall_ms;
        let jumped = back || boot_ms.abs_diff(wall_ms) > JUMP_MS + boot_ms / 100;
        let drifted = !jumped && self.clocks_drift(now);
        if drifted {
            warn!("boot and wall clock run at different rates: one is set by hand, or broken");
        }
        if jumped || drifted {
            debug!(boot_ms, wall_ms, "the clocks moved unevenly");
            self.clocks_since = now;
            self.registers.clock_jumped(now);
            self.with_stewards(now, Stewards::clock_jumped);
        }
    }

    /// Whether the clocks ran at different rates; judged once in [`RATE_WINDOW_MS`].
    fn clocks_drift(&mut self, now: Now) -> bool {
        let boot_ms = now.boot_ms.saturating_sub(self.clocks_since.boot_ms);
        let wall_ms = now.wall_ms.saturating_sub(self.clocks_since.wall_ms);
        if boot_ms.max(wall_ms) < RATE_WINDOW_MS {
            return false;
        }
        self.clocks_since = now;
        boot_ms.abs_diff(wall_ms) > boot_ms.max(wall_ms) / RATE_TOLERANCE
    }

    /// Whether `user` may give the keepers of a job of `owner` up for lost.
    fn may_recover(&self, owner: UserId) -> impl Fn(UserId) -> bool {
        let state = self.roster.state();
        move |user| state.may_control_job(user, owner)
    }

    /// What a certificate proves about the job of `spec`.
    ///
    /// # Errors
    /// Why it proves nothing.
    pub fn check_certificate(
        &self,
        certificate: &Certificate,
        spec: &VerifiedSpec,
    ) -> Result<Value, String> {
        if !self.sabotage.holds(Rule::CommitNeedsCertificate) {
            return certificate.value().map_err(|e| e.to_string());
        }
        certificate.verify(spec, self.may_recover(spec.spec.owner)).map_err(|e| e.to_string())
    }

    /// Who keeps the job of `spec` after these changes of its keepers: whoever shows them and is
    /// among those keeps its record.
    ///
    /// # Errors
    /// Why they prove nothing.
    pub fn check_links(&self, links: &[Link], spec: &VerifiedSpec) -> Result<Vec<Keeper>, String> {
        follow(spec, links, self.may_recover(spec.spec.owner)).map_err(|e| e.to_string())
    }

    /// Speak as a keeper from now on: nobody knows of a later life of this store, or nobody
    /// answers.
    pub(super) fn take_up_records(&mut self, now: Now) {
        self.shy_until_ms = None;
        self.timers.cancel(&Timer::Shy);
        if self.store_refused {
            return;
        }
        let jobs: Vec<JobId> = self.registers.iter().map(|(job, _)| *job).collect();
        for job in jobs {
            if self.is_behind_its_head(job) {
                self.registers.read(job, now);
            }
            self.with_stewards(now, |stewards, cx| stewards.consider(job, cx));
        }
    }

    /// Whether this keeper missed what others have of a job that is over.
    pub(super) fn is_behind_its_head(&self, job: JobId) -> bool {
        let (Some(kept), Some(head)) = (self.registers.get(job), self.soft.head_of(job)) else {
            return false;
        };
        head.state == State::Done
            && head.keepers.contains(&self.me)
            && (kept.value.epoch, kept.value.seq) < (head.epoch, head.seq)
    }

    /// Make sure of values that end jobs and that nobody says were chosen: whoever proposed them
    /// may be gone, and nobody watches over a job that seems to be over. The first of the keepers
    /// that are there does it.
    pub(super) fn make_sure_of_ends(&mut self, now: Now) {
        let there = |node: PeerId| node == self.me || self.board.is_connected(node);
        let is_due = |job: JobId, kept: &Kept| {
            let said = self.soft.head_of(job).is_some_and(|head| {
                head.state == State::Done
                    && head.version() >= (kept.value.epoch, kept.value.seq, true)
            });
            let mut around = kept.keepers.iter().map(|(keeper, _)| *keeper).filter(|it| there(*it));
            let first = around.next() == Some(self.me);
            kept.value.body.state() == State::Done
                && !kept.chosen
                && !said
                && first
                && 1 + around.count() >= quorum_of(kept.keepers.len())
                && !self.registers.is_busy(job)
        };
        let due = self.registers.iter().filter(|(job, kept)| is_due(**job, kept));
        let due: Vec<JobId> = due.map(|(job, _)| *job).take(ENDS_MAX).collect();
        for job in due {
            self.registers.read(job, now);
        }
    }

    pub(super) fn handle_record(&mut self, from: PeerId, message: Message, now: Now) {
        if (self.shy_until_ms.is_some() || self.store_refused) && from != self.me {
            return;
        }
        match message {
            Message::Prepare { job, epoch, ballot } => {
                self.copies.is_read(job);
                self.registers.handle_prepare(from, job, epoch, ballot);
            }
            Message::Promise(promise) => {
                self.copies.has_record(from, promise.job);
                self.registers.handle_promise(from, *promise, now);
            }
            Message::Accept(accept) => self.registers.handle_accept(from, &accept, now),
            Message::Accepted { job, epoch, ballot, receipt } => {
                self.copies.has_record(from, job);
                self.registers.handle_accepted(from, job, epoch, ballot, receipt, now);
            }
            Message::Nack { job, epoch, ballot, promised } => {
                self.registers.handle_nack(from, job, epoch, ballot, promised, now);
            }
            Message::NotInit { job, epoch } => self.registers.handle_not_init(from, job, epoch),
            Message::Moved { job, links } => {
                self.submission_moved(job, &links);
                let Some(spec) = self.registers.spec(job).map(Arc::clone) else { return };
                match self.check_links(&links, &spec) {
                    Ok(keepers) => self.registers.handle_moved(from, job, links, keepers, now),
                    Err(reason) => debug!(%job, %from, reason, "a redirection proves nothing"),
                }
            }
            Message::Install(install) => {
                if let Err(reason) = self.handle_install(from, *install, now) {
                    debug!(%from, reason, "a change of keepers refused");
                }
            }
            Message::Installed { job, epoch } => {
                self.copies.has_record(from, job);
                self.registers.handle_installed(from, job, epoch, now);
            }
            Message::WouldKeep { store } if store == self.store && !self.client => {
                self.out.send(self.me, from, Message::WillKeep { store });
            }
            Message::WillKeep { store } => {
                self.with_stewards(now, |stewards, cx| stewards.handle_will_keep(from, store, cx));
            }
            Message::Renew { clock, entries } => {
                let (kept, refused) = self.registers.handle_renew(from, &entries, now);
                self.out.send(self.me, from, Message::Renewed { asked: clock, kept, refused });
            }
            Message::Renewed { asked, kept, refused } => {
                self.with_stewards(now, |stewards, cx| {
                    stewards.handle_renewed(from, asked, &kept, &refused, cx);
                });
            }
            Message::Look { job, epoch } => self.registers.handle_look(from, job, epoch),
            Message::Seen { job, epoch, watch } => {
                self.registers.handle_seen(from, job, epoch, watch, now);
            }
            _ => {}
        }
    }

    fn handle_install(&mut self, from: PeerId, install: Install, now: Now) -> Result<(), String> {
        if self.client {
            return Err("a client keeps nothing".to_owned());
        }
        let spec = match self.registers.spec(JobId::of(&install.spec.bytes)) {
            Some(spec) => Arc::clone(spec),
            None => {
                let spec = VerifiedSpec::verify(install.spec.clone()).map_err(|e| e.to_string())?;
                self.check_owner(&spec)?;
                Arc::new(spec)
            }
        };
        let keepers = self.check_links(&install.links, &spec)?;
        let before = install.links.split_last().map(|(_, before)| before);
        let former = match before {
            Some(before) => self.check_links(before, &spec)?,
            None => return Err("no change of keepers is shown".to_owned()),
        };
        if !keepers.iter().chain(&former).any(|(keeper, _)| *keeper == from) {
            return Err("it comes from none of the keepers".to_owned());
        }
        self.registers.install(from, spec, install, keepers, now)
    }

    pub(super) fn handle_adopt(&mut self, from: PeerId, adopt: &Adopt, now: Now) {
        let checked = VerifiedSpec::verify(adopt.spec.clone())
            .map_err(|e| e.to_string())
            .and_then(|spec| self.check_owner(&spec).map(|()| spec))
            .and_then(|spec| {
                let value = self.check_certificate(&adopt.certificate, &spec)?;
                let keepers = self.check_links(&adopt.certificate.links, &spec)?;
                Ok((value, keepers))
            });
        match checked {
            Ok((value, keepers)) => {
                let proven = Proven { value: &value, keepers: &keepers };
                self.bidder.handle_adopt(from, adopt, &proven, now, &mut self.out);
            }
            Err(reason) => debug!(%from, reason, "not shown to be a steward"),
        }
    }

    /// Hand every job driven here over to another of its keepers, as before the daemon ends.
    /// How many hand-overs are still under way: to be called again after a moment until there
    /// is none.
    pub fn hand_over(&mut self, now: Now) -> usize {
        let mut handed = 0;
        self.with_stewards(now, |stewards, cx| handed = stewards.hand_over(cx));
        self.finish(now);
        handed
    }

    /// The majority of a job's keepers is lost for good, as its owner or an admin says with a
    /// signed [`crate::record::ForceRecover`]: go on from what this node has. Changes that only
    /// the lost keepers knew are gone, and so it must be somebody's word, never a time-out.
    ///
    /// # Errors
    /// Why not, with the next step.
    pub fn recover(&mut self, signed: SignedBytes, now: Now) -> Result<JobId, String> {
        if self.shy_until_ms.is_some() || self.store_refused {
            let reason = "this node has just started and asks the others first";
            return Err(format!("{reason}: try again in {} s", crate::peer::SHY_MS / 1_000));
        }
        let bytes: crate::record::ForceRecover = crate::wire::decode(&signed.bytes)
            .map_err(|e| format!("the request cannot be read: {e}"))?;
        let job = bytes.job;
        let spec = self.registers.spec(job).map(Arc::clone);
        let spec = spec.ok_or("this node does not keep the record: ask one that does")?;
        let forced = check_force_recover(&signed, &spec)?;
        if !self.may_recover(spec.spec.owner)(forced.by) {
            return Err("only the job's owner and admins may recover it".to_owned());
        }
        self.registers.recover(job, signed, &forced, now)?;
        self.finish(now);
        Ok(job)
    }

    /// This node's own advert came back: another life of its store may be ahead of this one.
    pub(super) fn check_own_advert(
        &mut self,
        store: crate::StoreId,
        boot_count: u64,
        boot: crate::BootId,
    ) {
        let ahead =
            boot_count > self.boot_count || (boot_count == self.boot_count && boot != self.boot);
        if store == self.store && ahead && !self.store_refused {
            self.store_refused = true;
            let reason = format!(
                "others have heard from this node's store in its start number {boot_count}, and \
                 this is its start number {}: its files were restored from a copy, or another \
                 copy of them is in use",
                self.boot_count
            );
            self.out.events.push_back(Event::StoreRefused { reason });
        }
    }
}
