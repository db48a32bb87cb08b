//! The record: one replicated register per job, changed by compare-and-set only.
//!
//! A value names everything about a job that must outlive a node: attempt, ranks, nodes,
//! GPUs and holds, state and outcome. It is kept by several keepers, each an [`Acceptor`];
//! what a majority of them accepted at one ballot is chosen ([CASPaxos], Rystsov 2018).
//! Any keeper may propose; routinely only the steward does, and then a change costs one
//! round trip: with each acceptance a keeper promises the next ballot, too.
//!
//! The keepers are data in the register. A value may *seal* its epoch and name the next
//! keepers: nothing is chosen after it, and the next epoch begins with exactly its body.
//!
//! A stewardship is renewed beside the register. A keeper counts in memory how often it has
//! heard of the steward ([`Watch`]); a renewal is refused where somebody else was promised a
//! higher ballot. Who wants to take over reads these counts by quorum, waits longer than a
//! lease lasts, and demands in its own round of promises that none has changed. So renewals
//! cost neither a signature nor a write, and two stewards never act at once.
//!
//! [CASPaxos]: https://arxiv.org/abs/1802.07000

mod acceptor;
mod ballot;
mod certificate;
mod proposer;
mod replica;
mod value;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use tracing::{debug, info};

pub use acceptor::{Acceptor, Refused};
pub use ballot::{Ballot, Keeper};
pub use certificate::{
    Certificate, CertificateError, EPOCHS_MAX, ForceRecover, Link, LinkProof, ReceiptBody,
    are_distinct, check_force_recover, check_receipt, follow, keepers_hash, quorum_of,
    sign_receipt,
};
pub use proposer::{Ask, BACKOFF_MS, BACKOFFS_MAX, End, Operation, Proposer};
pub use replica::Replica;
pub use value::{Body, HISTORY_MAX, REASON_BYTES_MAX, StartInfo, Value};

use crate::{
    BootId, JobId, Now, PeerId, StoreId,
    identity::{KeyPair, SignedBytes},
    job::{State, VerifiedSpec},
    message::{Accept, Install, Message, Promise, RENEWALS_MAX, Renewal, Watch},
    peer::{Random, Slot, Write},
    sabotage::{Rule, Sabotage},
    timer::Timers,
    wire,
};

/// Most records one keeper keeps.
pub const RECORDS_MAX: usize = 100_000;
/// How long a steward may act after it sent a renewal that a quorum heard.
pub const STEWARD_MS: u64 = 30_000;
/// How often a stewardship is renewed.
pub const STEWARD_RENEW_MS: u64 = 10_000;
/// After how much silence of the steward a keeper begins to look around.
pub const SUSPECT_MS: u64 = 11_000;
/// What every wait for somebody else's clock is longer by: one part in this many. Clocks of
/// computers differ by less than one part in a thousand; one that is five per cent off does no
/// harm either, whether anybody notices it or not.
pub const CLOCK_MARGIN: u64 = 16;
/// How long a keeper sees no sign of the steward before it takes over: a lease, by the slowest
/// clock, on the fastest.
pub const TAKEOVER_MS: u64 = STEWARD_MS + STEWARD_MS / CLOCK_MARGIN;
/// How much longer each further keeper waits.
pub const STAGGER_MS: u64 = 3_000;
/// How often a keeper looks around while it suspects.
pub const LOOK_MS: u64 = 5_000;
/// How often an unanswered proposal is sent again, at first.
pub const RESEND_MS: u64 = 400;
/// How long a record is kept after its job ended.
pub const KEEP_MS: u64 = 30 * 24 * 3_600_000;

/// The largest journal entry taken for a record.
const RESTORED_BYTES_MAX: usize = 64 << 20;

/// What became of an operation, or of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The operation was done; what is chosen is known.
    Chosen {
        /// The job.
        job: JobId,
        /// The caller's number for the operation.
        op: u64,
    },
    /// It was not: another value is in place, or none can be reached. Nothing is known to have
    /// been changed by it.
    Conflict {
        /// The job.
        job: JobId,
        /// The caller's number for the operation.
        op: u64,
    },
    /// Another keeper changed the record, or this one keeps it no more.
    Changed {
        /// The job.
        job: JobId,
    },
}

/// The number of operations that nobody waits for: reads and take-overs.
pub const OWN_OP: u64 = 0;

/// One record as a keeper keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The job.
    pub spec: Arc<VerifiedSpec>,
    /// The value chosen or accepted last.
    pub value: Value,
    /// The hash of its bytes.
    pub hash: [u8; 32],
    /// Whether it is known to have been chosen, and nothing since.
    pub chosen: bool,
    /// Proof that it was; without receipts where it is only accepted, or a birth.
    pub certificate: Certificate,
    /// Who keeps it.
    pub keepers: Vec<Keeper>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Resend(JobId),
    Watch(JobId),
    Hand(JobId),
}

#[derive(Debug, Clone)]
struct Register {
    acceptor: Acceptor,
    proposer: Proposer,
    kept: Option<Kept>,
    /// See [`Watch`].
    heard: BTreeMap<PeerId, u64>,
    heard_ms: u64,
    /// When this configuration was begun here, on the boot clock.
    epoch_ms: u64,
    /// What keepers had heard when this one first asked, and when that was.
    seen: BTreeMap<StoreId, (Watch, u64)>,
    /// When each keeper last heard of this node as steward: the time it was told.
    acks: BTreeMap<StoreId, u64>,
    /// The lease carried over from the epoch before.
    carried_ms: u64,
    /// Not to act before, on the boot clock: the steward of an epoch that was given up may
    /// still do.
    quiet_until_ms: u64,
    resends: u32,
    /// Keepers of the epoch before, to be told when this one is chosen.
    former: Vec<PeerId>,
    /// This node sealed an epoch in whose successor it keeps nothing: whom it still has to
    /// install.
    handing: Option<Handing>,
}

impl Register {
    /// Somebody spoke as this job's steward, or candidate.
    fn hear(&mut self, from: PeerId) {
        *self.heard.entry(from).or_default() += 1;
    }

    /// How often anybody but `asker` did: what a candidate says itself is no sign of the steward.
    fn heard_beside(&self, asker: PeerId) -> u64 {
        self.heard.iter().filter(|(from, _)| **from != asker).map(|(_, count)| count).sum()
    }
}

#[derive(Debug, Clone)]
struct Handing {
    install: Install,
    keepers: Vec<Keeper>,
    done: BTreeSet<PeerId>,
}

/// All records this node keeps.
#[derive(Debug, Clone)]
pub struct Registers {
    me: PeerId,
    store: StoreId,
    boot: BootId,
    key: KeyPair,
    random: Random,
    sabotage: Sabotage,
    records: BTreeMap<JobId, Register>,
    timers: Timers<Timer>,
    events: VecDeque<Event>,
    writes: VecDeque<Write>,
    sends: VecDeque<(PeerId, Message)>,
    takeovers: u64,
}

/// No room for another record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this keeper keeps {RECORDS_MAX} records already")]
pub struct Full;

impl Registers {
    /// No records yet.
    #[must_use]
    pub(crate) fn new(
        key: KeyPair,
        store: StoreId,
        boot: BootId,
        random: Random,
        sabotage: Sabotage,
    ) -> Self {
        Self {
            me: PeerId(key.public()),
            store,
            boot,
            key,
            random,
            sabotage,
            records: BTreeMap::new(),
            timers: Timers::default(),
            events: VecDeque::new(),
            writes: VecDeque::new(),
            sends: VecDeque::new(),
            takeovers: 0,
        }
    }

    /// Take back a record from the journal.
    ///
    /// # Errors
    /// The journal's bytes are not a record of ours.
    pub fn restore(&mut self, bytes: &[u8], now: Now) -> Result<JobId, String> {
        // Ours, and so not bound by what a message may have.
        let replica: Replica =
            wire::decode_limited::<_, RESTORED_BYTES_MAX>(bytes).map_err(|e| e.to_string())?;
        let acceptor = Acceptor::restore(replica, self.sabotage)?;
        let job = acceptor.job();
        self.insert(acceptor, now);
        Ok(job)
    }

    fn insert(&mut self, acceptor: Acceptor, now: Now) {
        let job = acceptor.job();
        let forced = |link: &Link| matches!(link.proof, LinkProof::Forced(_));
        let forced = acceptor.links().last().is_some_and(forced);
        let register = Register {
            proposer: Proposer::new(self.store, acceptor.keepers().to_vec(), self.sabotage),
            kept: kept_of(&acceptor),
            acceptor,
            heard: BTreeMap::new(),
            heard_ms: now.boot_ms,
            epoch_ms: now.boot_ms,
            seen: BTreeMap::new(),
            acks: BTreeMap::new(),
            carried_ms: 0,
            // A recovering node that starts again does not know how much of it is over.
            quiet_until_ms: if forced { now.after(TAKEOVER_MS) } else { 0 },
            resends: 0,
            former: Vec::new(),
            handing: None,
        };
        self.records.insert(job, register);
        self.watch(job, now);
    }

    /// The record of `job`, if it is kept here.
    #[must_use]
    pub fn get(&self, job: JobId) -> Option<&Kept> {
        self.records.get(&job)?.kept.as_ref()
    }

    /// Every record kept here, by id.
    pub fn iter(&self) -> impl Iterator<Item = (&JobId, &Kept)> {
        self.records.iter().filter_map(|(job, register)| Some((job, register.kept.as_ref()?)))
    }

    /// What this node accepted last of `job`, chosen or not, and in which ballot: of two keepers of
    /// one epoch, the one with the higher has every value that was chosen.
    #[must_use]
    pub fn accepted(&self, job: JobId) -> Option<(Ballot, &Value)> {
        let acceptor = &self.records.get(&job)?.acceptor;
        Some((acceptor.accepted(), acceptor.value()?))
    }

    /// Who keeps a record that this node kept once, as far as known here.
    #[must_use]
    pub fn moved(&self, job: JobId) -> Option<&[Keeper]> {
        let register = self.records.get(&job)?;
        register.kept.is_none().then(|| register.acceptor.keepers())
    }

    /// The job as its owner signed it, of a record that is or was kept here.
    #[must_use]
    pub fn spec(&self, job: JobId) -> Option<&Arc<VerifiedSpec>> {
        self.records.get(&job).map(|register| register.acceptor.spec())
    }

    /// What leads from the spec's keepers to those of now, of a record that is or was kept here.
    #[must_use]
    pub fn links(&self, job: JobId) -> Option<&[Link]> {
        self.records.get(&job).map(|register| register.acceptor.links())
    }

    /// How many records are or were kept here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Jobs taken over from another steward since the daemon started.
    #[must_use]
    pub fn takeovers(&self) -> u64 {
        self.takeovers
    }

    /// Create the record of `spec` with its birth value. Again gives the same receipt.
    /// The caller has checked that this node and store are named in the spec.
    ///
    /// # Errors
    /// [`RECORDS_MAX`] are kept already.
    pub fn init(&mut self, spec: Arc<VerifiedSpec>, now: Now) -> Result<SignedBytes, Full> {
        let job = spec.job;
        if !self.records.contains_key(&job) {
            if self.records.len() >= RECORDS_MAX {
                return Err(Full);
            }
            self.insert(Acceptor::born(Arc::clone(&spec), self.sabotage), now);
            self.persist(job);
            self.events.push_back(Event::Changed { job });
        }
        Ok(self.birth_receipt(&spec))
    }

    fn birth_receipt(&self, spec: &VerifiedSpec) -> SignedBytes {
        let birth = Value::birth(spec);
        sign_receipt(&self.key, self.store, Ballot::ZERO, &birth, birth.hash())
    }

    /// Forget a record: its birth can never be chosen, or it ended long ago.
    pub fn forget(&mut self, job: JobId) {
        if self.records.remove(&job).is_some() {
            for timer in [Timer::Resend(job), Timer::Watch(job), Timer::Hand(job)] {
                self.timers.cancel(&timer);
            }
            self.writes.push_back(Write { key: Slot::Record(job).to_bytes(), value: None });
            self.events.push_back(Event::Changed { job });
        }
    }

    // ---- operations -------------------------------------------------------------------

    /// Replace the value of `job` if its sequence number is `expected_seq`. An event
    /// with `op` follows.
    pub fn compare_and_set(
        &mut self,
        job: JobId,
        expected_seq: u64,
        op: u64,
        body: Body,
        now: Now,
    ) {
        let next = self
            .get(job)
            .filter(|kept| kept.chosen && kept.value.seq == expected_seq)
            .map(|kept| kept.value.successor_of(kept.hash, body));
        self.set(job, op, next, now);
    }

    /// End the epoch of `job`, if its sequence number is `expected_seq`; `next` keep it from
    /// then on. An event with `op` follows.
    pub fn seal(&mut self, job: JobId, expected_seq: u64, op: u64, next: Vec<Keeper>, now: Now) {
        let next = self.get(job).filter(|kept| kept.chosen && kept.value.seq == expected_seq).map(
            |kept| Value {
                sealed: Some(next),
                ..kept.value.successor_of(kept.hash, kept.value.body.clone())
            },
        );
        self.set(job, op, next, now);
    }

    fn set(&mut self, job: JobId, op: u64, next: Option<Value>, now: Now) {
        match next {
            Some(value) => self.begin(job, op, Operation::Set(Box::new(value)), now),
            None => self.events.push_back(Event::Conflict { job, op }),
        }
    }

    /// Whether an operation on the record is under way here: another has to wait for its event.
    #[must_use]
    pub fn is_busy(&self, job: JobId) -> bool {
        self.records.get(&job).is_some_and(|register| register.proposer.is_busy())
    }

    /// Make sure of what is chosen. An event with [`OWN_OP`] follows, or with the number of the
    /// operation that is under way.
    pub fn read(&mut self, job: JobId, now: Now) {
        let busy = self.records.get(&job).is_none_or(|register| register.proposer.is_busy());
        if !busy {
            self.begin(job, OWN_OP, Operation::Read, now);
        }
    }

    fn begin(&mut self, job: JobId, op: u64, operation: Operation, now: Now) {
        let Some(register) = self.records.get_mut(&job).filter(|r| r.kept.is_some()) else {
            self.events.push_back(Event::Conflict { job, op });
            return;
        };
        let known = register.kept.as_ref().filter(|kept| kept.chosen);
        let known = known.map(|kept| (&kept.value, kept.hash));
        let promised = register.acceptor.promised();
        register.resends = 0;
        match register.proposer.begin(op, operation, known, promised, now.boot_ms) {
            Ok(()) => self.pursue(job, now),
            Err(_) => self.events.push_back(Event::Conflict { job, op }),
        }
    }

    /// Say to every keeper that has not answered what is wanted of it.
    fn pursue(&mut self, job: JobId, now: Now) {
        let Some(register) = self.records.get(&job) else { return };
        let epoch = register.acceptor.epoch();
        let Some((ask, silent)) = register.proposer.ask() else { return };
        for (peer, _) in silent {
            let message = match &ask {
                Ask::Prepare(ballot) => Message::Prepare { job, epoch, ballot: *ballot },
                Ask::Accept { ballot, next, value_bytes } => Message::Accept(Box::new(Accept {
                    job,
                    epoch,
                    ballot: *ballot,
                    next: *next,
                    value_bytes: value_bytes.to_vec(),
                })),
            };
            self.sends.push_back((peer, message));
        }
        let resend_ms = RESEND_MS << register.resends.min(3);
        self.timers.set(Timer::Resend(job), now.after(resend_ms));
    }

    fn ended(&mut self, job: JobId, end: Option<End>, now: Now) {
        let Some(End { op, done, chosen }) = end else {
            // A phase ended, and the next begins.
            self.pursue(job, now);
            return;
        };
        self.timers.cancel(&Timer::Resend(job));
        let Some(register) = self.records.get_mut(&job) else { return };
        register.seen.clear();
        if let Some((value, value_bytes, receipts)) = chosen {
            if value.sealed.is_some() {
                self.succeed(job, &value, receipts, now);
                self.events.push_back(Event::Conflict { job, op });
                return;
            }
            let former = core::mem::take(&mut register.former);
            let was_mine = register.kept.as_ref().is_some_and(|k| k.value.body.steward == self.me);
            if value.body.steward == self.me && !was_mine {
                self.takeovers += 1;
                info!(%job, term = value.body.term, "took the job over");
            }
            register.kept = Some(Kept {
                spec: Arc::clone(register.acceptor.spec()),
                hash: *blake3::hash(&value_bytes).as_bytes(),
                value,
                chosen: true,
                certificate: Certificate {
                    links: register.acceptor.links().to_vec(),
                    value_bytes,
                    receipts,
                },
                keepers: register.acceptor.keepers().to_vec(),
            });
            if let Some(install) = self.install_of(job).filter(|_| !former.is_empty()) {
                for peer in former {
                    self.sends.push_back((peer, Message::Install(Box::new(install.clone()))));
                }
            }
        }
        self.watch(job, now);
        self.events.push_back(if done {
            Event::Chosen { job, op }
        } else {
            Event::Conflict { job, op }
        });
    }

    // ---- change of keepers ------------------------------------------------------------

    /// A seal was chosen: begin the next epoch.
    fn succeed(&mut self, job: JobId, sealed: &Value, receipts: Vec<SignedBytes>, now: Now) {
        let Some(next) = sealed.sealed.clone() else { return };
        let link = Link { next: next.clone(), proof: LinkProof::Sealed(receipts) };
        let mut first = sealed.first_of_next_epoch();
        if !self.sabotage.holds(Rule::EpochStartsFromSeal) {
            first.body.failed_starts += 1;
        }
        self.enter_epoch(job, link, first, next, now);
    }

    fn enter_epoch(&mut self, job: JobId, link: Link, first: Value, next: Vec<Keeper>, now: Now) {
        let Some(register) = self.records.get_mut(&job) else { return };
        info!(%job, epoch = first.epoch, keepers = next.len(), "the job's keepers change");
        let old = register.acceptor.keepers().to_vec();
        let mut links = register.acceptor.links().to_vec();
        links.push(link);
        let spec = Arc::clone(register.acceptor.spec());
        let install = Install {
            spec: spec.signed.clone(),
            links: links.clone(),
            accepted: Ballot::ZERO,
            value_bytes: wire::encode(&first),
        };
        for (peer, _) in next.iter().filter(|(peer, _)| *peer != self.me) {
            self.sends.push_back((*peer, Message::Install(Box::new(install.clone()))));
        }
        if next.contains(&(self.me, self.store)) {
            let lease_ms = lease_of(register);
            register.carried_ms = if old.len() > 1 { lease_ms } else { now.after(STEWARD_MS) };
            register.former =
                old.iter().filter(|keeper| !next.contains(keeper)).map(|(peer, _)| *peer).collect();
            register.acceptor = Acceptor::installed(
                spec,
                links,
                next.clone(),
                Ballot::ZERO,
                Some(first),
                self.sabotage,
            );
            self.renew_epoch(job, now);
            self.read(job, now);
        } else {
            // The old epoch's entry stays until a quorum of the new one has begun.
            register.handing = Some(Handing { install, keepers: next, done: BTreeSet::new() });
            register.proposer.dethrone(Ballot::ZERO);
            self.timers.set(Timer::Hand(job), now.after(RESEND_MS));
        }
    }

    /// The acceptor is of another epoch: everything beside it begins anew.
    fn renew_epoch(&mut self, job: JobId, now: Now) {
        let Some(register) = self.records.get_mut(&job) else { return };
        if let Some(op) = register.proposer.abandon()
            && op != OWN_OP
        {
            self.events.push_back(Event::Conflict { job, op });
        }
        register.proposer =
            Proposer::new(self.store, register.acceptor.keepers().to_vec(), self.sabotage);
        register.kept = kept_of(&register.acceptor);
        register.acks.clear();
        register.seen.clear();
        register.handing = None;
        register.heard_ms = now.boot_ms;
        register.epoch_ms = now.boot_ms;
        register.hear(self.me);
        self.timers.cancel(&Timer::Resend(job));
        self.timers.cancel(&Timer::Hand(job));
        self.persist(job);
        self.watch(job, now);
        self.events.push_back(Event::Changed { job });
    }

    fn install_of(&self, job: JobId) -> Option<Install> {
        let acceptor = &self.records.get(&job)?.acceptor;
        acceptor.value()?;
        Some(Install {
            spec: acceptor.signed_spec().clone(),
            links: acceptor.links().to_vec(),
            accepted: acceptor.accepted(),
            value_bytes: acceptor.value_bytes().to_vec(),
        })
    }

    /// The keepers of a job changed to `keepers`, as the links prove. The caller has checked
    /// them, and that the sender is among the keepers.
    ///
    /// # Errors
    /// Why it is not taken.
    pub fn install(
        &mut self,
        from: PeerId,
        spec: Arc<VerifiedSpec>,
        install: Install,
        keepers: Vec<Keeper>,
        now: Now,
    ) -> Result<(), String> {
        let job = spec.job;
        let epoch = u32::try_from(install.links.len()).unwrap_or(u32::MAX);
        let known = self
            .records
            .get(&job)
            .map(|register| (register.acceptor.epoch(), register.acceptor.value().is_some()));
        let member = keepers.contains(&(self.me, self.store));
        let news = known.is_none_or(|(known, _)| epoch > known);
        if !news {
            // Again, or overtaken by a later one.
            self.sends.push_back((from, Message::Installed { job, epoch }));
            return Ok(());
        }
        if known.is_none() && !member {
            return Err("this node never kept that record".to_owned());
        }
        if known.is_none() && self.records.len() >= RECORDS_MAX {
            return Err(Full.to_string());
        }
        let value = if member {
            let value: Value = wire::decode(&install.value_bytes).map_err(|e| e.to_string())?;
            let canonical = wire::encode(&value) == install.value_bytes;
            if value.job != job || value.epoch != epoch || !canonical {
                return Err("the value is of another record or epoch".to_owned());
            }
            let first = install.accepted == Ballot::ZERO;
            if first && !install.links.last().is_some_and(|link| link.leads_to(&value)) {
                return Err("the value does not follow from the one that was sealed".to_owned());
            }
            if !first && !keepers.iter().any(|(keeper, _)| *keeper == from) {
                return Err("only its keepers know what an epoch has accepted".to_owned());
            }
            Some(value)
        } else {
            None
        };
        let acceptor = Acceptor::installed(
            spec,
            install.links,
            keepers,
            install.accepted,
            value,
            self.sabotage,
        );
        match self.records.get_mut(&job) {
            Some(register) => register.acceptor = acceptor,
            None => self.insert(acceptor, now),
        }
        self.renew_epoch(job, now);
        self.sends.push_back((from, Message::Installed { job, epoch }));
        Ok(())
    }

    /// A keeper of the next epoch has begun it.
    pub fn handle_installed(&mut self, from: PeerId, job: JobId, epoch: u32, now: Now) {
        let is_keeper = self.is_keeper(job, from);
        let Some(register) = self.records.get_mut(&job) else { return };
        let Some(handing) = &mut register.handing else {
            if is_keeper && epoch == register.acceptor.epoch() {
                self.pursue(job, now);
            }
            return;
        };
        if handing.install.links.len() != epoch as usize
            || !handing.keepers.iter().any(|(peer, _)| *peer == from)
        {
            return;
        }
        handing.done.insert(from);
        if handing.done.len() >= quorum_of(handing.keepers.len()) {
            let (links, keepers) = (handing.install.links.clone(), handing.keepers.clone());
            let spec = Arc::clone(register.acceptor.spec());
            register.acceptor =
                Acceptor::installed(spec, links, keepers, Ballot::ZERO, None, self.sabotage);
            self.renew_epoch(job, now);
        }
    }

    /// The keepers are lost, and somebody who may said that these go on from what this one
    /// has. The caller has checked that.
    ///
    /// # Errors
    /// This node does not keep the record, or in another epoch or state.
    pub fn recover(
        &mut self,
        job: JobId,
        signed: SignedBytes,
        forced: &ForceRecover,
        now: Now,
    ) -> Result<(), String> {
        let register = self.records.get(&job).ok_or("this node does not keep the record")?;
        let value = register.acceptor.value().ok_or("this node keeps the record no more")?;
        if register.acceptor.epoch() != forced.epoch {
            return Err(format!(
                "the record is at epoch {} here: look at it again with `p2pit show`",
                register.acceptor.epoch()
            ));
        }
        if value.hash() != forced.value_hash {
            return Err("the record has changed here meanwhile: try again".to_owned());
        }
        if !are_distinct(&forced.next) {
            return Err("a keeper is named twice".to_owned());
        }
        if !forced.next.contains(&(self.me, self.store)) {
            return Err("the node that has the record must be one of its next keepers".to_owned());
        }
        let mut first = value.first_of_next_epoch();
        first.body.recovered = true;
        first.body.steward = self.me;
        first.body.term += 1;
        let link = Link { next: forced.next.clone(), proof: LinkProof::Forced(signed) };
        if let Some(register) = self.records.get_mut(&job) {
            register.quiet_until_ms = now.after(TAKEOVER_MS);
        }
        self.enter_epoch(job, link, first, forced.next.clone(), now);
        Ok(())
    }

    // ---- messages ---------------------------------------------------------------------

    pub(crate) fn is_keeper(&self, job: JobId, peer: PeerId) -> bool {
        self.records
            .get(&job)
            .is_some_and(|register| register.acceptor.keepers().iter().any(|(k, _)| *k == peer))
    }

    fn refuse(&mut self, to: PeerId, job: JobId, epoch: u32, ballot: Ballot, refused: &Refused) {
        let message = match refused {
            Refused::Promised(promised) => {
                Message::Nack { job, epoch, ballot, promised: *promised }
            }
            Refused::NotInit => Message::NotInit { job, epoch },
            Refused::Moved => {
                let Some(register) = self.records.get(&job) else { return };
                Message::Moved { job, links: register.acceptor.links().to_vec() }
            }
            Refused::Malformed => {
                debug!(%job, %to, "a value of no record");
                return;
            }
        };
        self.sends.push_back((to, message));
    }

    /// See [`Message::Prepare`].
    pub fn handle_prepare(&mut self, from: PeerId, job: JobId, epoch: u32, ballot: Ballot) {
        let boot = self.boot;
        let Some(register) = self.records.get_mut(&job) else {
            self.sends.push_back((from, Message::NotInit { job, epoch }));
            return;
        };
        let known = register.acceptor.keepers().iter().any(|(keeper, _)| *keeper == from);
        if !known && register.acceptor.epoch() == epoch {
            return;
        }
        match register.acceptor.prepare(epoch, ballot) {
            Ok(()) => {
                if from != self.me {
                    register.proposer.dethrone(ballot);
                }
                let promise = Promise {
                    job,
                    epoch,
                    ballot,
                    accepted: register.acceptor.accepted(),
                    value_bytes: register.acceptor.value_bytes().to_vec(),
                    watch: Watch { boot, heard: register.heard_beside(from) },
                };
                self.persist(job);
                self.sends.push_back((from, Message::Promise(Box::new(promise))));
            }
            Err(refused) => self.refuse(from, job, epoch, ballot, &refused),
        }
    }

    /// See [`Message::Accept`].
    pub fn handle_accept(&mut self, from: PeerId, accept: &Accept, now: Now) {
        let Accept { job, epoch, ballot, next, ref value_bytes } = *accept;
        let Some(register) = self.records.get_mut(&job) else {
            self.sends.push_back((from, Message::NotInit { job, epoch }));
            return;
        };
        let known = register.acceptor.keepers().iter().any(|(keeper, _)| *keeper == from);
        if !known && register.acceptor.epoch() == epoch {
            return;
        }
        let changed = match register.acceptor.accept(epoch, ballot, next, value_bytes) {
            Ok(changed) => changed,
            Err(refused) => {
                self.refuse(from, job, epoch, ballot, &refused);
                return;
            }
        };
        register.hear(from);
        register.heard_ms = now.boot_ms;
        register.seen.clear();
        let Some(value) = register.acceptor.value() else { return };
        let hash = *blake3::hash(value_bytes).as_bytes();
        let receipt = sign_receipt(&self.key, self.store, ballot, value, hash);
        if changed {
            if from != self.me {
                register.proposer.dethrone(next);
                // Whoever only makes sure of what is chosen does not make it doubtful.
                let known = register.kept.as_ref();
                if !known.is_some_and(|kept| kept.chosen && kept.hash == hash) {
                    register.kept = kept_of(&register.acceptor);
                    self.events.push_back(Event::Changed { job });
                }
            }
            self.persist(job);
        }
        self.watch(job, now);
        self.sends.push_back((from, Message::Accepted { job, epoch, ballot, receipt }));
    }

    /// See [`Message::Promise`].
    pub fn handle_promise(&mut self, from: PeerId, promise: Promise, now: Now) {
        let job = promise.job;
        let Some(register) = self.records.get_mut(&job) else { return };
        if register.acceptor.epoch() != promise.epoch {
            return;
        }
        let before = register.proposer.held().is_some();
        let end = register.proposer.promised(from, promise, now.boot_ms);
        if end.is_some() || (!before && register.proposer.held().is_some()) {
            register.resends = 0;
            self.ended(job, end, now);
        }
    }

    /// See [`Message::Accepted`].
    pub fn handle_accepted(
        &mut self,
        from: PeerId,
        job: JobId,
        epoch: u32,
        ballot: Ballot,
        receipt: SignedBytes,
        now: Now,
    ) {
        let Some(register) = self.records.get_mut(&job) else { return };
        if register.acceptor.epoch() != epoch {
            return;
        }
        let store = register.acceptor.keepers().iter().find(|(k, _)| *k == from).map(|k| k.1);
        // To accept another's stewardship is no sign that this one's lasts.
        let held = register.proposer.held();
        let mine = held.is_some_and(|(.., steward)| steward == Some(self.me));
        let sent_ms = register.proposer.sent_ms(ballot).filter(|_| mine);
        if let (Some(store), Some(sent_ms)) = (store, sent_ms) {
            let ack = register.acks.entry(store).or_default();
            *ack = (*ack).max(sent_ms);
        }
        let end = register.proposer.accepted(from, ballot, receipt);
        if end.is_some() {
            self.ended(job, end, now);
        }
    }

    /// See [`Message::Nack`].
    pub fn handle_nack(
        &mut self,
        from: PeerId,
        job: JobId,
        epoch: u32,
        ballot: Ballot,
        promised: Ballot,
        now: Now,
    ) {
        let Some(register) = self.records.get_mut(&job) else { return };
        if register.acceptor.epoch() == epoch && register.proposer.refused(from, ballot, promised) {
            let most_ms = BACKOFF_MS << register.proposer.refusals().min(BACKOFFS_MAX);
            let at_ms = now.after(self.random.below(most_ms));
            self.timers.set(Timer::Resend(job), at_ms);
        }
    }

    /// See [`Message::NotInit`]: bring that keeper what it lacks.
    pub fn handle_not_init(&mut self, from: PeerId, job: JobId, epoch: u32) {
        if !self.is_keeper(job, from) {
            return;
        }
        let Some(register) = self.records.get(&job) else { return };
        if register.acceptor.epoch() != epoch || register.acceptor.value().is_none() {
            return;
        }
        let message = if epoch == 0 {
            let spec = Arc::clone(register.acceptor.spec());
            let mut receipts = vec![self.birth_receipt(&spec)];
            // That a majority keeps it overrules what the other may have refused.
            let kept = register.kept.as_ref().filter(|kept| kept.value.epoch == 0);
            receipts.extend(kept.into_iter().flat_map(|kept| kept.certificate.receipts.clone()));
            Message::Init { spec: spec.signed.clone(), receipts, refused: None }
        } else {
            let Some(install) = self.install_of(job) else { return };
            Message::Install(Box::new(install))
        };
        self.sends.push_back((from, message));
    }

    /// A keeper was brought what it lacked: ask it once more.
    pub fn keeper_ready(&mut self, job: JobId, now: Now) {
        if self.records.get(&job).is_some_and(|register| register.proposer.is_busy()) {
            self.pursue(job, now);
        }
    }

    /// The epoch is over, as `links`, which lead to `keepers`, prove.
    pub fn handle_moved(
        &mut self,
        from: PeerId,
        job: JobId,
        links: Vec<Link>,
        keepers: Vec<Keeper>,
        now: Now,
    ) {
        let Some(register) = self.records.get_mut(&job) else { return };
        let epoch = u32::try_from(links.len()).unwrap_or(u32::MAX);
        if epoch <= register.acceptor.epoch() {
            return;
        }
        if keepers.contains(&(self.me, self.store)) {
            // As a member it needs the value itself, and nobody brings it where the job is over.
            let who = |keeper: PeerId| keepers.iter().any(|(known, _)| *known == keeper);
            let to = if who(from) { vec![from] } else { keepers.iter().map(|it| it.0).collect() };
            for keeper in to.into_iter().filter(|keeper| *keeper != self.me) {
                self.sends.push_back((keeper, Message::NotInit { job, epoch }));
            }
            return;
        }
        let spec = Arc::clone(register.acceptor.spec());
        register.acceptor =
            Acceptor::installed(spec, links, keepers, Ballot::ZERO, None, self.sabotage);
        self.renew_epoch(job, now);
    }

    // ---- stewardship ------------------------------------------------------------------

    /// What this node renews with, if it is steward of the job and holds the ballot.
    #[must_use]
    pub fn renewal(&self, job: JobId) -> Option<Renewal> {
        let register = self.records.get(&job)?;
        let kept = register.kept.as_ref()?;
        let (ballot, next, steward) = register.proposer.held()?;
        let mine = kept.value.body.steward == self.me && steward.is_none_or(|s| s == self.me);
        (mine && kept.chosen).then(|| Renewal {
            job,
            epoch: register.acceptor.epoch(),
            ballot,
            next,
        })
    }

    /// A steward renews; what it is to be answered.
    pub fn handle_renew(
        &mut self,
        from: PeerId,
        entries: &[Renewal],
        now: Now,
    ) -> (Vec<JobId>, Vec<JobId>) {
        let (mut heard, mut refused) = (Vec::new(), Vec::new());
        for renewal in entries.iter().take(RENEWALS_MAX) {
            let Renewal { job, epoch, ballot, next } = *renewal;
            let Some(register) = self.records.get_mut(&job) else {
                // Its disk is new: that says nothing of who drives the job.
                self.sends.push_back((from, Message::NotInit { job, epoch }));
                continue;
            };
            if !register.acceptor.keepers().iter().any(|(keeper, _)| *keeper == from) {
                refused.push(job);
                continue;
            }
            match register.acceptor.renew(epoch, ballot, next) {
                Ok(()) => {
                    register.hear(from);
                    register.heard_ms = now.boot_ms;
                    register.seen.clear();
                    heard.push(job);
                    self.watch(job, now);
                }
                Err(reason) => {
                    if reason != (Refused::Promised(register.acceptor.promised())) {
                        self.refuse(from, job, epoch, ballot, &reason);
                    }
                    refused.push(job);
                }
            }
        }
        (heard, refused)
    }

    /// A keeper heard of this node as steward, as it was told at `sent_ms`.
    pub fn renewed(&mut self, from: PeerId, job: JobId, sent_ms: u64) {
        let Some(register) = self.records.get_mut(&job) else { return };
        let store = register.acceptor.keepers().iter().find(|(k, _)| *k == from).map(|k| k.1);
        if let Some(store) = store {
            let ack = register.acks.entry(store).or_default();
            *ack = (*ack).max(sent_ms);
        }
    }

    /// Until when this node may act as steward of the job, on the boot clock.
    #[must_use]
    pub fn lease_until(&self, job: JobId, now: Now) -> u64 {
        let Some(register) = self.records.get(&job) else { return 0 };
        match &register.kept {
            Some(kept) if kept.value.body.steward == self.me && kept.chosen => {
                let until_ms = lease_of(register);
                // Before that time no lease is one.
                if now.boot_ms < register.quiet_until_ms { 0 } else { until_ms }
            }
            Some(_) | None => 0,
        }
    }

    /// Until when nobody may act for a job whose keepers were given up, on the boot clock.
    #[must_use]
    pub fn quiet_until(&self, job: JobId) -> u64 {
        self.records.get(&job).map_or(0, |register| register.quiet_until_ms)
    }

    /// Since when a job has the keepers it has, as far as this node knows, on the boot clock.
    #[must_use]
    pub fn epoch_since(&self, job: JobId) -> u64 {
        self.records.get(&job).map_or(0, |register| register.epoch_ms)
    }

    /// When each keeper of a job last heard of this node as steward, on the boot clock.
    #[must_use]
    pub fn acks(&self, job: JobId) -> Option<&BTreeMap<StoreId, u64>> {
        self.records.get(&job).map(|register| &register.acks)
    }

    /// The clock cannot be trusted to have run evenly: nothing measured by it counts.
    pub fn clock_jumped(&mut self, now: Now) {
        for register in self.records.values_mut() {
            register.acks.clear();
            register.carried_ms = 0;
            register.seen.clear();
            register.heard_ms = now.boot_ms;
        }
        for job in self.records.keys().copied().collect::<Vec<_>>() {
            self.watch(job, now);
        }
    }

    /// Arm the watch over a live record whose steward is another.
    fn watch(&mut self, job: JobId, now: Now) {
        let Some(register) = self.records.get(&job) else { return };
        let live = register.kept.as_ref().is_some_and(|kept| {
            kept.value.body.state() != State::Done
                && kept.value.body.steward != self.me
                && kept.keepers.len() > 1
        });
        if live {
            let at_ms = register.heard_ms.saturating_add(SUSPECT_MS).max(now.boot_ms);
            self.timers.set(Timer::Watch(job), at_ms);
        } else {
            self.timers.cancel(&Timer::Watch(job));
        }
    }

    fn suspect(&mut self, job: JobId, now: Now) {
        let Some(register) = self.records.get_mut(&job) else { return };
        let Some(kept) = &register.kept else { return };
        let others = kept.keepers.iter().filter(|(peer, _)| *peer != kept.value.body.steward);
        let position = others.take_while(|(peer, _)| *peer != self.me).count() as u64;
        let wait_ms = TAKEOVER_MS + STAGGER_MS * position;
        let wait_ms = if self.sabotage.holds(Rule::TakeoverWaits) { wait_ms } else { 0 };
        let ripe: BTreeMap<StoreId, Watch> = register
            .seen
            .iter()
            .filter(|(_, (_, since_ms))| since_ms.saturating_add(wait_ms) <= now.boot_ms)
            .map(|(store, (watch, _))| (*store, *watch))
            .collect();
        let quorum = quorum_of(kept.keepers.len());
        if ripe.len() >= quorum {
            // One that got no answer from those it asked may get it from others.
            register.proposer.abandon();
            debug!(%job, "no sign of its steward: taking over");
            let take_over = Operation::TakeOver { steward: self.me, watches: ripe };
            self.timers.set(Timer::Watch(job), now.after(LOOK_MS));
            // Some of them may be gone by now, and others back.
            self.look(job);
            self.begin(job, OWN_OP, take_over, now);
            return;
        }
        let mut sinces: Vec<u64> = register.seen.values().map(|(_, since_ms)| *since_ms).collect();
        sinces.sort_unstable();
        let ripens = sinces.get(quorum - 1).map(|since_ms| since_ms.saturating_add(wait_ms));
        let at_ms = ripens.filter(|at_ms| *at_ms > now.boot_ms).unwrap_or(u64::MAX);
        self.timers.set(Timer::Watch(job), at_ms.min(now.after(LOOK_MS)));
        self.look(job);
    }

    /// Ask the job's keepers what they have heard.
    fn look(&mut self, job: JobId) {
        let Some(register) = self.records.get(&job) else { return };
        let epoch = register.acceptor.epoch();
        for (peer, _) in register.acceptor.keepers() {
            self.sends.push_back((*peer, Message::Look { job, epoch }));
        }
    }

    /// See [`Message::Look`].
    pub fn handle_look(&mut self, from: PeerId, job: JobId, epoch: u32) {
        let message = match self.records.get(&job) {
            Some(register) if register.acceptor.epoch() == epoch && register.kept.is_some() => {
                let watch = Watch { boot: self.boot, heard: register.heard_beside(from) };
                Message::Seen { job, epoch, watch }
            }
            Some(register) if register.acceptor.epoch() >= epoch => {
                Message::Moved { job, links: register.acceptor.links().to_vec() }
            }
            Some(_) | None => Message::NotInit { job, epoch },
        };
        self.sends.push_back((from, message));
    }

    /// See [`Message::Seen`].
    pub fn handle_seen(&mut self, from: PeerId, job: JobId, epoch: u32, watch: Watch, now: Now) {
        let Some(register) = self.records.get_mut(&job) else { return };
        if register.acceptor.epoch() != epoch {
            return;
        }
        let keepers = register.acceptor.keepers();
        let Some((_, store)) = keepers.iter().find(|(peer, _)| *peer == from) else { return };
        match register.seen.get(store) {
            Some((seen, _)) if *seen == watch => {}
            // Somebody was heard of: the wait begins anew.
            Some(_) => {
                register.seen.clear();
                register.seen.insert(*store, (watch, now.boot_ms));
            }
            None => {
                register.seen.insert(*store, (watch, now.boot_ms));
            }
        }
    }

    // ---- time -------------------------------------------------------------------------

    /// When [`Registers::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(u64, &'static str)> {
        self.timers.next().map(|(at_ms, timer)| {
            let reason = match timer {
                Timer::Resend(_) => "a proposal is unanswered",
                Timer::Watch(_) => "a job's steward is silent",
                Timer::Hand(_) => "new keepers are unanswered",
            };
            (at_ms, reason)
        })
    }

    /// Carry out what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some(timer) = self.timers.pop_due(now.boot_ms) {
            match timer {
                Timer::Resend(job) => {
                    let Some(register) = self.records.get_mut(&job) else { continue };
                    register.resends = register.resends.saturating_add(1);
                    let promised = register.acceptor.promised();
                    register.proposer.resume(promised);
                    self.pursue(job, now);
                }
                Timer::Watch(job) => self.suspect(job, now),
                Timer::Hand(job) => {
                    let Some(register) = self.records.get(&job) else { continue };
                    let Some(handing) = &register.handing else { continue };
                    for (peer, _) in &handing.keepers {
                        if !handing.done.contains(peer) {
                            let install = Box::new(handing.install.clone());
                            self.sends.push_back((*peer, Message::Install(install)));
                        }
                    }
                    self.timers.set(Timer::Hand(job), now.after(4 * RESEND_MS));
                }
            }
        }
    }

    /// What became of operations and records, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What must be durable before anything that follows from it is told to anyone.
    pub fn poll_write(&mut self) -> Option<Write> {
        self.writes.pop_front()
    }

    /// What to send, to this node itself, too.
    pub fn poll_send(&mut self) -> Option<(PeerId, Message)> {
        self.sends.pop_front()
    }

    /// The keeper this node is, with its store.
    #[must_use]
    pub fn identity(&self) -> Keeper {
        (self.me, self.store)
    }

    fn persist(&mut self, job: JobId) {
        if let Some(register) = self.records.get(&job) {
            self.writes.push_back(Write {
                key: Slot::Record(job).to_bytes(),
                value: Some(wire::encode(&register.acceptor.replica())),
            });
        }
    }
}

/// What an acceptor knows by itself.
fn kept_of(acceptor: &Acceptor) -> Option<Kept> {
    Some(Kept {
        spec: Arc::clone(acceptor.spec()),
        value: acceptor.value()?.clone(),
        hash: *blake3::hash(acceptor.value_bytes()).as_bytes(),
        chosen: false,
        certificate: Certificate {
            links: acceptor.links().to_vec(),
            value_bytes: acceptor.value_bytes().to_vec(),
            receipts: Vec::new(),
        },
        keepers: acceptor.keepers().to_vec(),
    })
}

/// Until when a steward may act: a quorum heard of it at most [`STEWARD_MS`] before.
fn lease_of(register: &Register) -> u64 {
    let keepers = register.acceptor.keepers();
    if keepers.len() == 1 {
        return u64::MAX;
    }
    let mut heard: Vec<u64> = register.acks.values().copied().collect();
    heard.sort_unstable_by(|a, b| b.cmp(a));
    let acked = heard.get(quorum_of(keepers.len()) - 1);
    acked.map_or(0, |sent_ms| sent_ms.saturating_add(STEWARD_MS)).max(register.carried_ms)
}
