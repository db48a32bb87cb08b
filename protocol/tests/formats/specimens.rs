//! One specimen of everything that crosses the wire, is signed or hashed, or lands in the
//! journal: always the same bytes, made from fixed seeds.

use std::collections::{BTreeMap, BTreeSet};

use p2pit_protocol::{
    BlobId, BootId, HoldId, JobId, PoolId, StatementId, StoreId,
    bidder::{Hold, Phase, Work, WorkId},
    door::{
        Hello, InviteUse, JoinRequest, Purpose, Reconcile, Reconciled, Refusal, RefusalCode,
        Reply as DoorReply, Welcome,
    },
    identity::{Domain, KeyPair, SignedBytes},
    inventory::{Capacity, Gpu, GpuUuid},
    job::{
        Attempt, Change, Command as JobCommand, Continued, Ending, Grace, JobSpec, Outcome, Policy,
        Rank, RankAssignment, RankEnd, RankRecord, RankState, Removed, Saved, Source, State,
        StopCause, VerifiedSpec,
    },
    message::{
        Accept, Adopt, Advert, AttemptView, Bid, Call, CallFate, ClockReading, Command, Commit,
        CopyState, Decline, GpuState, GpuView, Head, HoldView, Install, JobFilter, JobView, Key,
        LeaseAsk, LeaseGrant, Message, NodeView, Offer, PinRefusal, Promise, RankReport, RankView,
        Reach, Renewal, Reply, Report, Soft, Start, Verdict, WaitView, Wanted, Watch, blinded,
    },
    peer::Slot,
    reconcile::{Items, Sum},
    record::{
        Ballot, Body, Certificate, ForceRecover, Keeper, Link, LinkProof, Replica, StartInfo,
        Value, keepers_hash, sign_receipt,
    },
    request::{Grant, Request},
    roster::{
        Accept as RosterAccept, AdmitNode, Author, ClaimId, Founder, Genesis, Invite, JoinClaim,
        Kind, Leave, Profile, Rights, SignedClaim, Statement, Ticket, UserRequest, prove_invite,
    },
    wire,
};
use serde::Serialize;

use crate::cast::{self, device, keeper, name, sign_job};
pub(crate) use crate::cast::{WALL_MS, node, node_key, user, user_key};
use crate::formats::Unreported;

/// The bytes of one value, in the format named first.
#[derive(Debug, Clone)]
pub(crate) struct Specimen {
    pub(crate) format: &'static str,
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// Collects specimens, each of another name.
#[derive(Default)]
struct Tray(Vec<Specimen>);

impl Tray {
    fn put<T: Serialize>(&mut self, format: &'static str, name: &str, value: &T) {
        self.put_bytes(format, name, wire::encode(value));
    }

    fn put_bytes(&mut self, format: &'static str, name: &str, bytes: Vec<u8>) {
        let name = name.to_owned();
        assert!(!self.0.iter().any(|s| s.format == format && s.name == name), "{format}/{name}");
        self.0.push(Specimen { format, name, bytes });
    }
}

/// All of them, in an order that does not change.
pub(crate) fn all() -> Vec<Specimen> {
    let mut tray = Tray::default();
    put_roster(&mut tray);
    put_door(&mut tray);
    put_record(&mut tray);
    put_messages(&mut tray);
    put_soft(&mut tray);
    put_user(&mut tray);
    put_journal(&mut tray);
    put_requests(&mut tray);
    tray.0
}

// ---- the cast -----------------------------------------------------------------------

pub(crate) fn genesis_bytes() -> Vec<u8> {
    let founder = |n: u8, full_name: Option<&str>| Founder {
        user: user(n),
        username: name(&format!("user{n}")),
        full_name: full_name.map(str::to_owned),
    };
    Genesis {
        name: name("lab"),
        founders: vec![founder(1, Some("Ann Onymous")), founder(2, None)],
        threshold: 1,
        created_wall_ms: WALL_MS,
        nonce: [7; 16],
    }
    .to_bytes()
    .unwrap()
}

pub(crate) fn pool() -> PoolId {
    PoolId::of(&genesis_bytes())
}

fn gpu_uuid(n: u8) -> GpuUuid {
    GpuUuid(format!("GPU-{n:08x}-0000-0000-0000-000000000000"))
}

fn grant() -> Grant {
    Grant { gpus: vec![gpu_uuid(1), gpu_uuid(2)], cpu_cores: 8, ram_mib: 65_536 }
}

fn capacity() -> Capacity {
    let gpu = |n: u8, simulated| Gpu {
        uuid: gpu_uuid(n),
        model: "v100".to_owned(),
        full_name: "Tesla V100-SXM2-32GB".to_owned(),
        memory_bytes: 34_089_730_048,
        simulated,
    };
    Capacity::new(vec![gpu(1, false), gpu(2, false), gpu(3, true)], 32, 262_144)
}

fn request() -> Request {
    "2:[2:v100>=24g,cpu,4:ram],[8:cpu]".parse().unwrap()
}

pub(crate) fn job_spec() -> JobSpec {
    JobSpec {
        pool: pool(),
        owner: user(1),
        title: "train the größte model".to_owned(),
        request: request(),
        command: JobCommand::Direct("python train.py --epochs 3".to_owned()),
        code: BlobId([0xc0; 32]),
        code_bytes: 123_456,
        source: Source {
            remote: Some("https://example.org/lab/model.git".to_owned()),
            commit: Some("92b60390ddd65d6c04c948cd152eb37dbe8abb21".to_owned()),
            diff_lines: 17,
            untracked: 2,
        },
        continues: Some(Continued { job: JobId([9; 32]), keep: BlobId([0xc1; 32]) }),
        artifacts: vec!["out/model.bin".to_owned(), "logs".to_owned()],
        env: BTreeMap::from([
            ("EPOCHS".to_owned(), "3".to_owned()),
            ("MODE".to_owned(), String::new()),
        ]),
        private: true,
        time_limit_ms: Some(86_400_000),
        grace: Grace(60_000),
        retries: 3,
        policy: Policy::Restart,
        lost_after_ms: 3_600_000,
        keep_every_ms: 60_000,
        nonce: [5; 16],
        submitted_at_ms: WALL_MS,
        keepers: vec![keeper(1), keeper(2), keeper(3)],
    }
}

/// The other side of every choice that [`job_spec`] makes.
fn small_job_spec() -> JobSpec {
    cast::small_job_spec(pool(), vec![keeper(1)])
}

pub(crate) fn signed_spec() -> SignedBytes {
    sign_job(&job_spec())
}

pub(crate) fn verified_spec() -> VerifiedSpec {
    VerifiedSpec::verify(signed_spec()).unwrap()
}

fn job() -> JobId {
    verified_spec().job
}

fn ballot(counter: u64, n: u8) -> Ballot {
    Ballot { counter, store: StoreId([n; 16]) }
}

fn receipts(keepers: &[u8], ballot: Ballot, value: &Value) -> Vec<SignedBytes> {
    let sign = |&n: &u8| sign_receipt(&node_key(n), StoreId([n; 16]), ballot, value, value.hash());
    keepers.iter().map(sign).collect()
}

fn assignment(rank: u32) -> RankAssignment {
    RankAssignment {
        rank: Rank(rank),
        group: u32::from(rank == 2),
        process: rank % 2,
        node: node(4),
        hold: HoldId([0x40; 16]),
        grant: grant(),
    }
}

fn rank_end(ending: Ending) -> RankEnd {
    RankEnd {
        ending,
        result: Some("accuracy 0.93".to_owned()),
        keep: Some(BlobId([0xe0; 32])),
        artifacts: Some(BlobId([0xe1; 32])),
        note: Some("`out/huge` was too large".to_owned()),
        log_bytes: 70_000,
        at_ms: WALL_MS + 5_000,
    }
}

fn endings() -> Vec<(&'static str, Ending)> {
    let reason = || "no such file".to_owned();
    vec![
        ("exited", Ending::Exited { code: 3 }),
        ("signaled", Ending::Signaled { signal: 9 }),
        ("stopped", Ending::Stopped),
        ("timed-out", Ending::TimedOut),
        ("failed-to-start", Ending::FailedToStart { reason: reason() }),
        ("lost", Ending::Lost { reason: reason() }),
        ("never-started", Ending::NeverStarted),
        ("lease-ended", Ending::LeaseEnded),
        ("silent", Ending::Silent),
    ]
}

fn change(state: State, reason: &str) -> Change {
    Change { state, at_ms: WALL_MS + 1_000, reason: reason.to_owned() }
}

/// Of a job that has been through everything.
fn full_body() -> Body {
    let states = [
        State::New,
        State::Waiting,
        State::Preparing,
        State::Starting,
        State::Running,
        State::Stopping,
        State::Cleaning,
        State::Done,
    ];
    let rank = |rank, state, end| RankRecord {
        assignment: assignment(rank),
        state,
        end,
        store: Some(StoreId([4; 16])),
    };
    Body {
        steward: node(2),
        term: 4,
        history: states.map(|state| change(state, "because")).into(),
        attempt: Attempt(2),
        ranks: vec![
            rank(0, RankState::Ended, Some(rank_end(Ending::Exited { code: 0 }))),
            rank(1, RankState::Running, None),
            rank(2, RankState::Prepared, None),
            rank(3, RankState::Assigned, None),
        ],
        start: Some(StartInfo { hosts: vec!["192.0.2.4".to_owned()], port: 29_500 }),
        stop: Some(StopCause::RankFailed(Rank(1))),
        failed_starts: 1,
        retried: 2,
        recovered: true,
        bound: true,
        saved: vec![saved()],
        outcome: Some(Outcome::Failed { code: 3 }),
        removed: Some(removed()),
    }
}

fn saved() -> Saved {
    let (rank, attempt) = (Rank(1), Attempt(1));
    Saved { rank, attempt, node: node(3), tree: BlobId([0xe2; 32]) }
}

fn removed() -> Removed {
    Removed { by: user(1), at_ms: WALL_MS + 90_000 }
}

fn copy_state() -> CopyState {
    CopyState {
        rank: Rank(1),
        complete: true,
        save: Some((7, BlobId([0xe3; 32]))),
        under_way: true,
        cannot: Some("no room".to_owned()),
    }
}

// ---- the roster ---------------------------------------------------------------------

fn claim() -> JoinClaim {
    JoinClaim {
        pool: pool(),
        user: user(3),
        username: name("carl"),
        full_name: Some("Carl Friedrich".to_owned()),
        node: node(3),
        node_name: name("box-3"),
        client: false,
        wall_ms: WALL_MS,
        nonce: [3; 16],
    }
}

fn signed_claim() -> SignedClaim {
    cast::signed_claim(3, &claim())
}

const INVITE_SEED: [u8; 32] = [0x50; 32];

fn statement(author: Author, seq: u64, parents: Vec<StatementId>, kind: Kind) -> Statement {
    Statement {
        pool: pool(),
        author,
        device: device(1),
        seq,
        parents,
        kind,
        not_before_ms: WALL_MS,
        not_after_ms: u64::MAX,
    }
}

fn invite_statement() -> Statement {
    let invite = Invite {
        key: KeyPair::from_seed(&INVITE_SEED).public(),
        rights: Rights::User,
        uses: Some(5),
        expires_wall_ms: WALL_MS + 86_400_000,
    };
    statement(Author::User(user(1)), 1, Vec::new(), Kind::Invite(invite))
}

fn signed_statement(statement: &Statement) -> SignedBytes {
    let key = match statement.author {
        Author::User(author) if author == user(1) => user_key(1),
        Author::User(_) => user_key(3),
        Author::Node(_) => node_key(1),
    };
    SignedBytes::sign(&key, Domain::Statement, wire::encode(statement))
}

fn invite_proof() -> SignedBytes {
    let invite = Statement::id(&signed_statement(&invite_statement()));
    let key = KeyPair::from_seed(&INVITE_SEED);
    prove_invite(&key, pool(), invite, signed_claim().id())
}

/// One of each kind, each after the one before.
pub(crate) fn statements() -> Vec<(&'static str, SignedBytes)> {
    let invite = signed_statement(&invite_statement());
    let any_number = Invite {
        key: KeyPair::from_seed(&[0x51; 32]).public(),
        rights: Rights::Admin,
        uses: None,
        expires_wall_ms: u64::MAX,
    };
    let node_1 = Author::Node(node(1));
    let id = Statement::id;
    let own_claim = {
        let own = JoinClaim {
            user: user(1),
            username: name("user1"),
            full_name: None,
            node: node(1),
            node_name: name("box-1"),
            ..claim()
        };
        let by_user = JoinClaim::sign(own.to_bytes(), &user_key(1)).unwrap();
        SignedClaim::countersign(by_user, &node_key(1)).unwrap()
    };
    let admit = signed_statement(&statement(
        node_1,
        1,
        vec![id(&invite)],
        Kind::AdmitNode(AdmitNode { claim: own_claim, node_name: name("box-1") }),
    ));
    let accept = signed_statement(&statement(
        node_1,
        2,
        vec![id(&admit)],
        Kind::Accept(RosterAccept {
            invite: id(&invite),
            claim: signed_claim(),
            invite_proof: invite_proof(),
            node_name: name("box-3"),
        }),
    ));
    let profile = Profile {
        username: Some(name("karl")),
        full_name: Some(String::new()),
        email: Some("karl@example.org".to_owned()),
    };
    let profile = signed_statement(&statement(
        Author::User(user(3)),
        1,
        vec![id(&accept)],
        Kind::Profile(profile),
    ));
    let leave = Leave { node: node(3), claims: vec![signed_claim().id()] };
    let leave = signed_statement(&statement(
        Author::User(user(1)),
        2,
        vec![id(&profile)],
        Kind::Leave(leave),
    ));
    let admins = signed_statement(&statement(
        Author::User(user(1)),
        3,
        vec![id(&leave)],
        Kind::Invite(any_number),
    ));
    vec![
        ("invite", invite),
        ("admit-node", admit),
        ("accept", accept),
        ("profile", profile),
        ("leave", leave),
        ("invite-admins", admins),
    ]
}

fn put_roster(tray: &mut Tray) {
    tray.put_bytes("genesis", "lab", genesis_bytes());
    for (name, signed) in statements() {
        tray.put_bytes("statement", name, signed.bytes.clone());
        tray.put("signed", &format!("statement-{name}"), &signed);
    }
    tray.put_bytes("claim", "claim", claim().to_bytes());
    let client = JoinClaim { full_name: None, client: true, ..claim() };
    tray.put_bytes("claim", "client", client.to_bytes());
    tray.put("signed-claim", "claim", &signed_claim());
    let by_user = JoinClaim::sign(claim().to_bytes(), &user_key(3)).unwrap();
    tray.put("signed", "join-proof", &by_user);
    tray.put_bytes("invite-proof", "proof", invite_proof().bytes);
    tray.put("signed", "invite-proof", &invite_proof());
    let door =
        |addr: &str| p2pit_protocol::roster::Door { peer: node(1), addr: addr.parse().unwrap() };
    let ticket = Ticket {
        pool: pool(),
        pool_name: name("lab"),
        invite: Statement::id(&signed_statement(&invite_statement())),
        invite_seed: INVITE_SEED.into(),
        doors: vec![door("192.0.2.7:4433"), door("[2001:db8::7]:4433")],
        expires_wall_ms: WALL_MS + 86_400_000,
    };
    tray.put_bytes("ticket", "ticket", ticket.to_word().as_bytes().to_vec());
}

// ---- the door -----------------------------------------------------------------------

fn put_door(tray: &mut Tray) {
    // Of a fixed version: a hello of every version is read by every other.
    let hello = |purpose| Hello {
        versions: (3, 3),
        pool: pool(),
        store: StoreId([3; 16]),
        boot: BootId([0xb3; 16]),
        wall_ms: WALL_MS,
        purpose,
    };
    let invite = Statement::id(&signed_statement(&invite_statement()));
    let invite = Some(InviteUse { invite, proof: invite_proof() });
    let join = |invite| Purpose::Join(JoinRequest { claim: signed_claim(), invite });
    tray.put("hello", "join", &hello(join(invite)));
    tray.put("hello", "join-without-invite", &hello(join(None)));
    let all: Vec<SignedBytes> = statements().into_iter().map(|(_, signed)| signed).collect();
    let heads = vec![Statement::id(all.last().unwrap())];
    let reconcile = Reconcile { heads: heads.clone(), statements: all.clone() };
    tray.put("hello", "reconcile", &hello(Purpose::Reconcile(reconcile)));
    let welcome = Welcome {
        genesis: genesis_bytes(),
        statements: all.clone(),
        heads: heads.clone(),
        node_name: name("box-3"),
    };
    tray.put("door-reply", "welcome", &DoorReply::Welcome(welcome));
    let reconciled = Reconciled { statements: all, heads };
    tray.put("door-reply", "reconciled", &DoorReply::Reconciled(reconciled));
    let codes = [
        RefusalCode::Version,
        RefusalCode::OtherPool,
        RefusalCode::Clock,
        RefusalCode::InviteNeeded,
        RefusalCode::InviteUnknown,
        RefusalCode::InviteExpired,
        RefusalCode::InviteUsedUp,
        RefusalCode::BadProof,
        RefusalCode::ClaimStale,
        RefusalCode::UsernameTaken,
        RefusalCode::OtherOwner,
        RefusalCode::NotAMember,
        RefusalCode::CannotAdmit,
        RefusalCode::TooMany,
    ];
    for code in codes {
        let retry_after_ms = (code == RefusalCode::TooMany).then_some(59_000);
        let refusal = Refusal { code, message: "no: do this".to_owned(), retry_after_ms };
        tray.put("door-reply", &format!("refused-{code:?}"), &DoorReply::Refused(refusal));
    }
}

// ---- the record ---------------------------------------------------------------------

/// The chain that the record's specimens are taken from.
pub(crate) struct Chain {
    pub(crate) birth: Value,
    pub(crate) assigned: Value,
    pub(crate) sealed: Value,
    pub(crate) first_of_next: Value,
    pub(crate) next: Vec<Keeper>,
    pub(crate) link: Link,
}

pub(crate) fn chain() -> Chain {
    let birth = Value::birth(&verified_spec());
    let assigned = birth.successor(full_body());
    let next = vec![keeper(2), keeper(3), keeper(4), keeper(5), keeper(6)];
    let sealed = assigned.seal(next.clone());
    let first_of_next = sealed.first_of_next_epoch();
    let proof = LinkProof::Sealed(receipts(&[1, 3], ballot(3, 3), &sealed));
    let link = Link { next: next.clone(), proof };
    Chain { birth, assigned, sealed, first_of_next, next, link }
}

fn force_recover() -> SignedBytes {
    let Chain { assigned, .. } = chain();
    let forced = ForceRecover {
        pool: pool(),
        job: job(),
        by: user(1),
        epoch: 0,
        next: vec![keeper(7)],
        value_hash: assigned.hash(),
        at_ms: WALL_MS + 9_000,
    };
    SignedBytes::sign(&user_key(1), Domain::ForceRecover, wire::encode(&forced))
}

/// Certificates that hold, for [`verified_spec`].
pub(crate) fn certificates() -> Vec<(&'static str, Certificate)> {
    let Chain { birth, assigned, first_of_next, link, .. } = chain();
    let certificate = |links, value: &Value, receipts| Certificate {
        links,
        value_bytes: wire::encode(value),
        receipts,
    };
    let later = first_of_next.successor(full_body());
    let forced_link = Link { next: vec![keeper(7)], proof: LinkProof::Forced(force_recover()) };
    let recovered = Value { epoch: 1, ..assigned.successor(full_body()) };
    vec![
        ("birth", certificate(Vec::new(), &birth, receipts(&[1, 2], Ballot::ZERO, &birth))),
        ("chosen", certificate(Vec::new(), &assigned, receipts(&[2, 3], ballot(2, 2), &assigned))),
        (
            "after-a-change-of-keepers",
            certificate(vec![link], &later, receipts(&[2, 4, 6], ballot(1, 4), &later)),
        ),
        (
            "recovered",
            certificate(vec![forced_link], &recovered, receipts(&[7], Ballot::ZERO, &recovered)),
        ),
    ]
}

fn put_record(tray: &mut Tray) {
    let Chain { birth, assigned, sealed, first_of_next, next, .. } = chain();
    for (name, spec) in [("full", job_spec()), ("small", small_job_spec())] {
        tray.put_bytes("job-spec", name, spec.to_bytes());
    }
    tray.put("signed", "job-spec", &signed_spec());
    tray.put("value", "birth", &birth);
    tray.put("value", "assigned", &assigned);
    tray.put("value", "sealed", &sealed);
    tray.put("value", "first-of-next-epoch", &first_of_next);
    let stops = [
        ("by", StopCause::By(user(2))),
        ("rank-failed", StopCause::RankFailed(Rank(7))),
        ("start-failed", StopCause::StartFailed("no room".to_owned())),
    ];
    for (name, stop) in stops {
        let body = Body { stop: Some(stop), ..birth.body.clone() };
        tray.put("value", &format!("stop-{name}"), &birth.successor(body));
    }
    let outcomes = [
        ("succeeded", Outcome::Succeeded),
        ("failed", Outcome::Failed { code: -1 }),
        ("stopped", Outcome::Stopped { by: user(1) }),
        ("timed-out", Outcome::TimedOut),
        ("lost", Outcome::Lost { reason: "every keeper is gone".to_owned() }),
    ];
    for (name, outcome) in outcomes {
        let body = Body { outcome: Some(outcome), ..birth.body.clone() };
        tray.put("value", &format!("outcome-{name}"), &birth.successor(body));
    }
    for (name, value) in [("accepted", &assigned), ("sealing", &sealed)] {
        let receipt = receipts(&[1], ballot(3, 1), value).remove(0);
        tray.put_bytes("receipt", name, receipt.bytes.clone());
        tray.put("signed", &format!("receipt-{name}"), &receipt);
    }
    tray.put_bytes("force-recover", "recover", force_recover().bytes);
    tray.put("signed", "force-recover", &force_recover());
    for (name, certificate) in certificates() {
        tray.put("certificate", name, &certificate);
    }
    tray.put("keepers", "five", &next);
}

// ---- messages -----------------------------------------------------------------------

fn key() -> Key {
    Key { submitted_at_ms: WALL_MS, job: job() }
}

fn clock() -> ClockReading {
    ClockReading { boot: BootId([0xb1; 16]), boot_ms: 3_600_000 }
}

fn watch() -> Watch {
    Watch { boot: BootId([0xb2; 16]), heard: 1_234 }
}

fn declines() -> Vec<(&'static str, Decline)> {
    vec![
        ("unsuitable", Decline::Unsuitable { missing: "1 GPU v100".to_owned() }),
        ("busy", Decline::Busy { jobs: vec![JobId([8; 32])] }),
        ("higher-job", Decline::HigherJob { job: JobId([8; 32]) }),
        ("foreign-use", Decline::ForeignUse { gpus: vec![gpu_uuid(2)] }),
        ("owner-only", Decline::OwnerOnly { reason: "it runs as its owner".to_owned() }),
        ("not-offering", Decline::NotOffering),
    ]
}

/// One of each variant, by the name that logs use.
pub(crate) fn messages() -> Vec<Message> {
    let Chain { birth, assigned, first_of_next, link, .. } = chain();
    let (job, holds) = (job(), vec![HoldId([0x40; 16]), HoldId([0x41; 16])]);
    let receipt = || receipts(&[1], Ballot::ZERO, &birth).remove(0);
    let reason = || "it ended".to_owned();
    let certificate = certificates().remove(2).1;
    let attempt = Attempt(2);
    vec![
        Message::Init { spec: signed_spec(), receipts: vec![receipt()], refused: Some(reason()) },
        Message::Inited { job, receipts: vec![receipt()], inputs: vec![StoreId([1; 16])] },
        Message::InitRefused { job, reason: reason(), retry: true },
        Message::Prepare { job, epoch: 0, ballot: ballot(2, 2) },
        Message::Promise(Box::new(Promise {
            job,
            epoch: 0,
            ballot: ballot(2, 2),
            accepted: ballot(1, 1),
            value_bytes: wire::encode(&assigned),
            watch: watch(),
        })),
        Message::Accept(Box::new(Accept {
            job,
            epoch: 0,
            ballot: ballot(2, 2),
            next: ballot(3, 2),
            value_bytes: wire::encode(&assigned),
        })),
        Message::Accepted { job, epoch: 0, ballot: ballot(2, 2), receipt: receipt() },
        Message::Nack { job, epoch: 0, ballot: ballot(2, 2), promised: ballot(300, 3) },
        Message::NotInit { job, epoch: 1 },
        Message::Moved { job, links: vec![link.clone()] },
        Message::Install(Box::new(Install {
            spec: signed_spec(),
            links: vec![link],
            accepted: ballot(1, 4),
            value_bytes: wire::encode(&first_of_next),
        })),
        Message::Installed { job, epoch: 1 },
        Message::WouldKeep { store: StoreId([3; 16]) },
        Message::WillKeep { store: StoreId([3; 16]) },
        Message::Renew {
            clock: clock(),
            entries: vec![Renewal {
                job,
                epoch: 1,
                ballot: ballot(70_000, 2),
                next: ballot(70_001, 2),
            }],
        },
        Message::Renewed { asked: clock(), kept: vec![job], refused: vec![JobId([8; 32])] },
        Message::Look { job, epoch: 1 },
        Message::Seen { job, epoch: 1, watch: watch() },
        Message::Call(Call {
            key: key(),
            owner: user(1),
            wanted: vec![Wanted {
                group: 1,
                count: 2,
                process: request().groups[0].process.clone(),
            }],
            inputs: vec![(blinded(BlobId([0xc0; 32])), 123_456)],
            standing: true,
        }),
        Message::Bid(Bid {
            job,
            offers: vec![Offer { hold: holds[0], group: 1, grant: grant(), score: 42 }],
            hold_ms: 10_000,
            standing: true,
            decline: Some(Decline::NotOffering),
        }),
        Message::Pin { job, holds: holds.clone() },
        Message::Pinned { job, holds: holds.clone() },
        Message::PinRefused(PinRefusal { job, missing: holds.clone() }),
        Message::HoldsLost { job, holds: holds.clone(), higher: Some(JobId([8; 32])) },
        Message::Release { job, holds, call: CallFate::Rest { ms: 60_000 } },
        Message::Commit(Box::new(Commit {
            spec: signed_spec(),
            attempt,
            certificate: certificate.clone(),
        })),
        Message::Committed { job, attempt },
        Message::CommitRefused { job, attempt, reason: reason() },
        Message::Withdraw { job, attempt, reason: reason() },
        Message::Start(Start {
            job,
            attempt,
            nodes: vec![node(4), node(5)],
            hosts: vec!["192.0.2.4".to_owned(), "192.0.2.5".to_owned()],
            port: 29_500,
            asked: clock(),
            binding: true,
        }),
        Message::Stop { job, attempt, reason: reason() },
        Message::Ask { job, attempt },
        Message::Report(Box::new(report(RankReport::Prepared {
            port: 29_500,
            host: "192.0.2.4".to_owned(),
            clock: clock(),
        }))),
        Message::EndRecorded { job, attempt, rank: Rank(1) },
        Message::Adopt(Box::new(Adopt { spec: signed_spec(), attempt, certificate })),
        Message::Adopted { job, attempt, term: 4 },
        Message::AskLease { clock: clock(), entries: vec![LeaseAsk { job, attempt, term: 4 }] },
        Message::Elsewhere { job, steward: node(3) },
        Message::Lease {
            asked: clock(),
            entries: vec![LeaseGrant { job, attempt, binding: true }],
        },
        Message::Save { job, attempt, rank: Rank(1), seq: 7, tree: BlobId([0xe3; 32]) },
        Message::SaveHeld { job, attempt, rank: Rank(1), seq: 7 },
        Message::AskCopies { job, attempt, without: vec![node(3)] },
        Message::Copies { job, attempt, seq: 17, ranks: vec![copy_state()] },
        Message::Soft(Soft::head(signed_head())),
        Message::Reconcile { sum: sum(), query: vec![0x61, 0, 0, 2, 0] },
        Message::Reconciled { answer: vec![0x61, 0, 0, 2, 0] },
        Message::Want { ids: vec![[1; 32], [2; 32]] },
    ]
}

fn sum() -> Sum {
    let mut items = Items::default();
    items.insert(Soft::head(signed_head()));
    items.sum()
}

fn report(report: RankReport) -> Report {
    let (node, store) = (node(4), StoreId([0x54; 16]));
    Report { job: job(), attempt: Attempt(2), rank: Rank(1), node, store, report }
}

/// What the messages above leave out of the types inside.
fn more_messages() -> Vec<(String, Message)> {
    let mut more: Vec<(String, Message)> = Vec::new();
    let mut put = |name: String, message| more.push((name, message));
    let job = job();
    for (name, decline) in declines() {
        let decline = Some(decline);
        let bid = Bid { job, offers: Vec::new(), hold_ms: 0, standing: false, decline };
        put(format!("bid-{name}"), Message::Bid(bid));
    }
    for (name, call) in [("stand", CallFate::Stand), ("forget", CallFate::Forget)] {
        let holds = Vec::new();
        put(format!("release-{name}"), Message::Release { job, holds, call });
    }
    for (name, ending) in endings() {
        let ended = RankReport::Ended(rank_end(ending));
        put(format!("report-{name}"), Message::Report(Box::new(report(ended))));
    }
    for (name, at) in [
        ("assigned", RankState::Assigned),
        ("prepared", RankState::Prepared),
        ("running", RankState::Running),
        ("ended", RankState::Ended),
    ] {
        let at = RankReport::At(at);
        put(format!("report-at-{name}"), Message::Report(Box::new(report(at))));
    }
    put("report-cleaning".into(), Message::Report(Box::new(report(RankReport::Cleaning))));
    let (holds, higher) = (Vec::new(), None);
    put("holds-expired".into(), Message::HoldsLost { job, holds, higher });
    more
}

fn put_messages(tray: &mut Tray) {
    for message in messages() {
        tray.put("message", message.name(), &message);
    }
    for (name, message) in more_messages() {
        tray.put("message", &name, &message);
    }
}

// ---- soft state ---------------------------------------------------------------------

fn head(state: State) -> Head {
    let keepers = vec![node(1), node(2), node(3)];
    Head {
        job: job(),
        keeper: node(1),
        keepers,
        epoch: 0,
        seq: 1,
        owner: user(1),
        submitted_at_ms: WALL_MS,
        state,
        chosen: state == State::Done,
    }
}

fn signed_head() -> SignedBytes {
    SignedBytes::sign(&node_key(1), Domain::Head, wire::encode(&head(State::Waiting)))
}

fn advert() -> Advert {
    Advert {
        node: node(4),
        boot: BootId([0xb4; 16]),
        boot_count: 12,
        seq: 345,
        issued_at_ms: WALL_MS,
        store: StoreId([4; 16]),
        client: false,
        owner_only: Some("no sandbox".to_owned()),
        capacity: capacity(),
        not_free: vec![
            (gpu_uuid(1), GpuState::Used),
            (gpu_uuid(2), GpuState::Foreign),
            (gpu_uuid(3), GpuState::Free),
        ],
        free_cpu_cores: 24,
        free_ram_mib: 196_608,
        full: true,
        control: vec!["192.0.2.4:4001".parse().unwrap()],
        data: vec!["[2001:db8::4]:4002".parse().unwrap()],
        reach: Reach::Behind,
        relays: vec![node(1), node(2)],
    }
}

fn put_soft(tray: &mut Tray) {
    let client = Advert {
        client: true,
        owner_only: None,
        capacity: Capacity::default(),
        not_free: Vec::new(),
        control: Vec::new(),
        data: Vec::new(),
        reach: Reach::Unknown,
        relays: Vec::new(),
        ..advert()
    };
    tray.put("advert", "node", &advert());
    tray.put("advert", "client", &client);
    tray.put("advert", "open", &Advert { reach: Reach::Open, relays: Vec::new(), ..advert() });
    tray.put("head", "birth", &head(State::Waiting));
    tray.put("head", "done", &head(State::Done));
    let signed_advert = SignedBytes::sign(&node_key(4), Domain::Advert, wire::encode(&advert()));
    tray.put("signed", "advert", &signed_advert);
    tray.put("signed", "head", &signed_head());
    tray.put("soft", "advert", &Soft::advert(signed_advert));
    tray.put("soft", "head", &Soft::head(signed_head()));
    tray.put("soft", "statement", &Soft::statement(statements().remove(0).1));
}

// ---- users --------------------------------------------------------------------------

fn commands() -> Vec<(&'static str, Command)> {
    let job = job();
    vec![
        ("jobs", Command::Jobs(JobFilter { owner: Some(user(1)), done_max: 20 })),
        ("job", Command::Job(job)),
        ("why", Command::Why(job)),
        ("stop", Command::Stop(job)),
        ("node", Command::Node),
        ("log", Command::Log(job)),
        ("files", Command::Files(job)),
        ("remove", Command::Remove { job, undo: true }),
    ]
}

fn job_view() -> JobView {
    let (spec, body) = (job_spec(), full_body());
    let rank = |record: &RankRecord| RankView {
        rank: record.assignment.rank,
        group: record.assignment.group,
        process: record.assignment.process,
        node: record.assignment.node,
        grant: record.assignment.grant.clone(),
        state: record.state,
        end: record.end.clone().map(Box::new),
    };
    JobView {
        job: job(),
        title: spec.title,
        owner: spec.owner,
        private: spec.private,
        request: spec.request,
        command: Some(spec.command),
        source: spec.source,
        code: Some(spec.code),
        continues: Some(JobId([9; 32])),
        submitted_at_ms: WALL_MS,
        history: body.history,
        seq: 17,
        chosen: true,
        epoch: 1,
        keepers: vec![node(1), node(2), node(3)],
        steward: node(2),
        term: 2,
        retries: spec.retries,
        retried: 1,
        policy: spec.policy,
        lost_after_ms: spec.lost_after_ms,
        recovered: false,
        keep_every_ms: spec.keep_every_ms,
        outcome: body.outcome,
        attempt: AttemptView { number: body.attempt, ranks: body.ranks.iter().map(rank).collect() },
        saved: body.saved,
        removed: body.removed,
        holds: vec![copy_state()],
    }
}

fn put_user(tray: &mut Tray) {
    for (name, command) in commands() {
        tray.put("command", name, &command);
    }
    let request = UserRequest {
        pool: pool(),
        audience: BTreeSet::from([node(1), node(2)]),
        nonce: [6; 16],
        expires_wall_ms: WALL_MS + 60_000,
        command: wire::encode(&Command::Stop(job())),
    };
    let signed = request.sign(&user_key(1));
    tray.put_bytes("user-request", "stop", signed.bytes.clone());
    tray.put("signed", "user-request", &signed);

    tray.put("reply", "jobs", &Reply::Jobs(vec![job_view()]));
    tray.put("reply", "granted", &Reply::Granted(Box::new(job_view())));
    let mut verdicts = vec![
        Verdict::Holds(2),
        Verdict::Standing(None),
        Verdict::Standing(Some(Decline::NotOffering)),
        Verdict::NoAnswer,
        Verdict::Unreachable,
        Verdict::NotCalled,
        Verdict::Has(2),
        Verdict::Copies(1),
        Verdict::CannotHold("no room".to_owned()),
    ];
    verdicts.extend(declines().into_iter().map(|(_, decline)| Verdict::Declined(decline)));
    let why = WaitView {
        job: job(),
        state: State::Waiting,
        summary: "waits for 1 more process".to_owned(),
        need: 3,
        held: 2,
        nodes: (1..).map(node).zip(verdicts).collect(),
    };
    tray.put("reply", "why", &Reply::Why(Box::new(why)));
    let stopping = Reply::Stopping { state: State::Stopping, recorded: true };
    tray.put("reply", "stopping", &stopping);
    let given_up = Reply::Removed { removed: Some(removed()), recorded: true };
    tray.put("reply", "removed", &given_up);
    let elsewhere = Reply::Elsewhere { steward: Some(node(2)), keepers: vec![node(2), node(3)] };
    tray.put("reply", "elsewhere", &elsewhere);
    let gpu = |gpu: &Gpu, state, job| GpuView { gpu: gpu.clone(), state, job };
    let gpus = capacity().gpus;
    let view = NodeView {
        node: node(4),
        gpus: vec![
            gpu(&gpus[0], GpuState::Used, Some(job())),
            gpu(&gpus[1], GpuState::Foreign, None),
            gpu(&gpus[2], GpuState::Free, None),
        ],
        cpu_cores: (32, 24),
        ram_mib: (262_144, 196_608),
        owner_only: Some("no sandbox".to_owned()),
        holds: vec![HoldView { job: job(), grant: grant(), pinned: true }],
        standing: vec![key()],
    };
    tray.put("reply", "node", &Reply::Node(Box::new(view)));
    tray.put("reply", "denied", &Reply::Denied { reason: "not yours: ask its owner".to_owned() });
    tray.put("reply", "unknown-job", &Reply::UnknownJob);
}

// ---- the journal --------------------------------------------------------------------

fn unreported(end: RankEnd) -> Unreported {
    (node(2), 3, vec![node(1), node(2), node(3)], end)
}

/// One of each slot, with what it holds, as a journal entry that a peer takes back.
pub(crate) fn journal() -> Vec<(&'static str, Slot, Vec<u8>)> {
    let Chain { assigned, .. } = chain();
    let (job, attempt, rank) = (job(), Attempt(2), Rank(1));
    let statement = statements().remove(0).1;
    let replica = Replica {
        spec: signed_spec(),
        links: Vec::new(),
        promised: ballot(3, 2),
        accepted: ballot(2, 2),
        value_bytes: wire::encode(&assigned),
    };
    let unreported = unreported(rank_end(Ending::Exited { code: 0 }));
    let refused = (WALL_MS + 120_000, "its owner is not a user of this pool".to_owned());
    vec![
        ("genesis", Slot::Genesis, genesis_bytes()),
        ("statement", Slot::Statement(Statement::id(&statement)), wire::encode(&statement)),
        ("record", Slot::Record(job), wire::encode(&replica)),
        ("hold", Slot::Hold(HoldId([0x40; 16])), wire::encode(&hold(true))),
        ("work", Slot::Work(job, attempt, rank), wire::encode(&work(Phase::Running))),
        ("tombstone", Slot::Tombstone(node(2), job, attempt), wire::encode(&WALL_MS)),
        ("end", Slot::End(job, attempt, rank), wire::encode(&unreported)),
        ("term", Slot::Term(job), wire::encode(&(4_u64, WALL_MS))),
        ("refused", Slot::Refused(job), wire::encode(&refused)),
    ]
}

fn hold(pinned: bool) -> Hold {
    Hold {
        id: HoldId([0x40; 16]),
        key: key(),
        steward: node(2),
        group: 1,
        grant: grant(),
        pinned,
        expiry_ms: 3_610_000,
        expiry_wall_ms: WALL_MS + 10_000,
    }
}

fn work(phase: Phase) -> Work {
    Work {
        id: WorkId { job: job(), attempt: Attempt(2), rank: Rank(1) },
        steward: node(2),
        term: 4,
        assignment: assignment(1),
        phase,
        prepared: Some((29_500, "192.0.2.4".to_owned())),
        signed_spec: signed_spec(),
        certificate: certificates().remove(1).1,
        spec: None,
    }
}

fn put_journal(tray: &mut Tray) {
    let Chain { link, first_of_next, .. } = chain();
    for (name, slot, value) in journal() {
        tray.put("slot", name, &slot);
        let format = match &slot {
            // Kept elsewhere among the vectors.
            Slot::Genesis | Slot::Statement(_) => continue,
            Slot::Record(_) => "replica",
            Slot::Hold(_) => "hold",
            Slot::Work(..) => "work",
            Slot::Tombstone(..) => "tombstone",
            Slot::End(..) => "end",
            Slot::Term(_) => "term",
            Slot::Refused(_) => "refused",
        };
        tray.put_bytes(format, name, value);
    }
    let replica = |value_bytes| Replica {
        spec: signed_spec(),
        links: vec![link.clone()],
        promised: ballot(9, 5),
        accepted: Ballot::ZERO,
        value_bytes,
    };
    tray.put("replica", "next-epoch", &replica(wire::encode(&first_of_next)));
    tray.put("replica", "former-keeper", &replica(Vec::new()));
    tray.put("hold", "unpinned", &hold(false));
    let committed = Phase::Committed { since_ms: 3_600_000, until_ms: 3_720_000 };
    for (name, phase) in
        [("committed", committed), ("starting", Phase::Starting), ("draining", Phase::Draining)]
    {
        tray.put("work", name, &Work { prepared: None, ..work(phase) });
    }
    for (name, ending) in endings() {
        tray.put("end", &format!("end-{name}"), &unreported(rank_end(ending)));
    }
    tray.put("end", "bare", &unreported(RankEnd::bare(Ending::NeverStarted, WALL_MS)));
}

// ---- requests -----------------------------------------------------------------------

fn put_requests(tray: &mut Tray) {
    for (name, text) in [
        ("nothing", ""),
        ("one-gpu", "[gpu]"),
        ("two-groups", "2:[],4:[gtx1070,2:gtx1060]"),
        ("memory", "[ 2 : 3090 >= 24g , 8:cpu, 64:RAM ]"),
        ("small-units", "[v100>=16384m,gpu>=1048576k,a100>=1024b]"),
        ("wrong", "2:[v100,"),
    ] {
        tray.put_bytes("request", name, text.as_bytes().to_vec());
    }
}

/// Ids that follow from the specimens, by what they are of.
pub(crate) fn ids() -> Vec<(String, String)> {
    let mut ids = vec![
        ("pool".to_owned(), pool().to_string()),
        ("job".to_owned(), job().to_string()),
        ("claim".to_owned(), format!("{:?}", ClaimId(signed_claim().id().0))),
        ("blinded".to_owned(), blinded(BlobId([0xc0; 32])).to_string()),
        ("user".to_owned(), user(1).to_string()),
        ("peer".to_owned(), node(1).to_string()),
    ];
    for (name, signed) in statements() {
        ids.push((format!("statement-{name}"), Statement::id(&signed).to_string()));
    }
    let Chain { birth, assigned, sealed, first_of_next, next, .. } = chain();
    for (name, value) in [
        ("birth", birth),
        ("assigned", assigned),
        ("sealed", sealed),
        ("first-of-next-epoch", first_of_next),
    ] {
        ids.push((format!("value-{name}"), BlobId(value.hash()).to_string()));
    }
    ids.push(("keepers".to_owned(), BlobId(keepers_hash(&next)).to_string()));
    ids
}

// ---- as wide as they get ------------------------------------------------------------

fn wide_body(processes: u32) -> Body {
    let rank = |rank| RankRecord {
        assignment: RankAssignment {
            grant: Grant { gpus: Vec::new(), cpu_cores: 1, ram_mib: 0 },
            ..assignment(rank)
        },
        state: RankState::Running,
        end: None,
        store: None,
    };
    Body { ranks: (0..processes).map(rank).collect(), ..full_body() }
}

/// A record's value with so many processes, each of which has no GPU.
pub(crate) fn wide_value(processes: u32) -> Value {
    chain().birth.successor(wide_body(processes))
}

/// The same as shown.
pub(crate) fn wide_reply(processes: u32) -> Reply {
    let rank = |record: &RankRecord| RankView {
        rank: record.assignment.rank,
        group: record.assignment.group,
        process: record.assignment.process,
        node: record.assignment.node,
        grant: record.assignment.grant.clone(),
        state: record.state,
        end: None,
    };
    let ranks = wide_body(processes).ranks.iter().map(rank).collect();
    let attempt = AttemptView { number: Attempt(1), ranks };
    Reply::Jobs(vec![JobView { attempt, ..job_view() }])
}

/// Messages with as much in them as their bounds allow.
pub(crate) fn wide_messages() -> Vec<Message> {
    let job = job();
    let offer = |n: u16| Offer {
        hold: HoldId([n as u8; 16]),
        group: 0,
        grant: Grant { gpus: Vec::new(), cpu_cores: 1, ram_mib: 0 },
        score: 0,
    };
    let wanted = |group| Wanted {
        group,
        count: 1,
        process: "[cpu]".parse::<Request>().unwrap().groups[0].process.clone(),
    };
    let call = Call {
        key: key(),
        owner: user(1),
        wanted: (0..32).map(wanted).collect(),
        inputs: Vec::new(),
        standing: true,
    };
    let start = Start {
        job,
        attempt: Attempt(1),
        nodes: vec![node(4); 1_024],
        hosts: vec!["10.0.0.4".to_owned(); 1_024],
        port: 1,
        asked: clock(),
        binding: false,
    };
    let links = vec![chain().link; p2pit_protocol::record::EPOCHS_MAX];
    vec![
        Message::Bid(Bid {
            job,
            offers: (0..1_024).map(offer).collect(),
            hold_ms: 0,
            standing: false,
            decline: None,
        }),
        Message::Call(call),
        Message::Start(start),
        Message::Renew {
            clock: clock(),
            entries: vec![
                Renewal { job, epoch: 0, ballot: Ballot::ZERO, next: Ballot::ZERO };
                4_096
            ],
        },
        Message::AskLease {
            clock: clock(),
            entries: vec![LeaseAsk { job, attempt: Attempt(1), term: 1 }; 4_096],
        },
        Message::Pin { job, holds: vec![HoldId([0; 16]); 1_024] },
        Message::Want { ids: vec![[1; 32]; 256] },
        Message::Moved { job, links },
        Message::Reconcile { sum: sum(), query: vec![1; 256 << 10] },
    ]
}
