use super::*;
use crate::{
    roster::testing::{Replica, WALL_MS, claim, claim_as, name, node_key, user_key},
    roster::{Invite, Leave, Ticket},
    wire,
};

const NOW: Now = Now { boot_ms: 5_000_000, wall_ms: WALL_MS };

fn hello(pool: PoolId, purpose: Purpose) -> Hello {
    Hello {
        versions: VERSIONS,
        pool,
        store: StoreId([1; 16]),
        boot: BootId([2; 16]),
        wall_ms: WALL_MS,
        purpose,
    }
}

fn join_with(ticket: &Ticket, claim: SignedClaim) -> Hello {
    let proof = ticket.prove(claim.id());
    let invite = Some(InviteUse { invite: ticket.invite, proof });
    hello(ticket.pool, Purpose::Join(JoinRequest { claim, invite }))
}

fn peer(n: u8) -> PeerId {
    PeerId(node_key(n).public())
}

/// Machine `from` comes to the door of `door`; both messages go over the wire.
fn knock(door: &mut Replica, from: u8, hello: Hello, now: Now) -> (Reply, Vec<SignedBytes>) {
    let hello = wire::decode(&wire::encode(&hello)).unwrap();
    let before = door.roster.len();
    let (reply, added) = judge(&mut door.roster, &door.node, door.device, peer(from), hello, now);
    assert_eq!(door.roster.len(), before + added.len());
    (wire::decode(&wire::encode(&reply)).unwrap(), added)
}

/// Person and machine `n` join by `ticket` at `door`.
fn joined(door: &mut Replica, ticket: &Ticket, n: u8) -> Replica {
    let (reply, added) = knock(door, n, join_with(ticket, claim(ticket.pool, n, n, 0)), NOW);
    let Reply::Welcome(message) = reply else { panic!("{reply:?}") };
    assert_eq!(added.len(), 1);
    let welcomed = welcome(ticket.pool, message).unwrap();
    assert!(welcomed.complete);
    assert_eq!(welcomed.node_name, name(&format!("node{n}")));
    Replica::new(n, welcomed.roster)
}

fn refused(reply: (Reply, Vec<SignedBytes>)) -> (RefusalCode, String) {
    let (Reply::Refused(refusal), added) = reply else { panic!("{reply:?}") };
    assert!(added.is_empty());
    (refusal.code, refusal.message)
}

/// Bring `visitor` and `door` together, as a node does, within some rounds.
fn reconcile(visitor: &mut Replica, door: &mut Replica) -> u32 {
    let mut words = Reconcile::asking(&visitor.roster);
    for round in 1..10 {
        let hello = hello(visitor.roster.pool(), Purpose::Reconcile(words));
        match knock(door, visitor.n, hello, NOW).0 {
            Reply::Reconciled(answer) => {
                let heads = answer.heads.clone();
                if answer.take(&mut visitor.roster).1.unwrap() {
                    return round;
                }
                words = Reconcile::bringing(&visitor.roster, &heads);
            }
            Reply::Refused(refusal) => {
                assert_eq!(refusal.code, RefusalCode::NotAMember);
                words = Reconcile::introducing(&visitor.roster);
            }
            Reply::Welcome(_) => panic!("welcome to one who did not ask to join"),
        }
    }
    panic!("no end of reconciling");
}

#[test]
fn two_join_with_one_ticket_and_the_second_at_the_door_of_the_first() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let mut two = joined(&mut one, &ticket, 2);
    let mut three = joined(&mut two, &ticket, 3);
    assert_eq!(three.roster.state().nodes.len(), 3);
    assert!(!one.roster.state().is_member_node(three.peer()));

    // The founder's node has not heard of it: it introduces itself.
    assert_eq!(reconcile(&mut three, &mut one), 2);
    assert_eq!(one.roster.digest(), three.roster.digest());
    assert_eq!(one.roster.state(), two.roster.state());
}

#[test]
fn a_repeated_join_is_welcomed_without_a_new_statement() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, Some(1));
    joined(&mut one, &ticket, 2);
    let again = join_with(&ticket, claim(ticket.pool, 2, 2, 0));
    let (reply, added) = knock(&mut one, 2, again, NOW);
    assert!(matches!(reply, Reply::Welcome(_)));
    assert!(added.is_empty());
}

#[test]
fn a_member_brings_another_machine_without_a_ticket() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, Some(1));
    joined(&mut one, &ticket, 2);
    let second = JoinRequest { claim: claim(ticket.pool, 2, 12, 0), invite: None };
    let (reply, added) = knock(&mut one, 12, hello(ticket.pool, Purpose::Join(second)), NOW);
    assert!(matches!(reply, Reply::Welcome(_)), "{reply:?}");
    assert_eq!(added.len(), 1);
    assert_eq!(one.roster.state().nodes[&peer(12)].owner.0, user_key(2).public());
    assert_eq!(one.roster.state().invites[&ticket.invite].used, 1);
}

#[test]
fn each_reason_to_refuse_is_told_apart_with_what_to_do() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, Some(1));
    let pool = ticket.pool;
    let good = || join_with(&ticket, claim(pool, 2, 2, 0));
    let mut refuse = |from, hello, now| refused(knock(&mut one, from, hello, now));

    let newer = Hello { versions: (WIRE_VERSION + 1, WIRE_VERSION + 3), ..good() };
    let (code, message) = refuse(2, newer, NOW);
    assert_eq!(code, RefusalCode::Version);
    let theirs = format!("version {} to {},", WIRE_VERSION + 1, WIRE_VERSION + 3);
    let ours = format!("speaks {WIRE_VERSION}:");
    assert!(message.contains(&theirs) && message.contains(&ours), "{message}");
    assert!(message.contains("update p2pit on that node"), "{message}");
    let older = Hello { versions: (WIRE_VERSION - 1, WIRE_VERSION - 1), ..good() };
    let (_, message) = refuse(2, older, NOW);
    let theirs = format!("version {}, ", WIRE_VERSION - 1);
    assert!(message.contains(&theirs) && message.contains("on your machine"), "{message}");
    assert_eq!(refused((judge_unreadable(), Vec::new())).0, RefusalCode::Version);
    let elsewhere = Hello { pool: PoolId([9; 32]), ..good() };
    assert_eq!(refuse(2, elsewhere, NOW).0, RefusalCode::OtherPool);
    let (code, message) = refuse(2, Hello { wall_ms: WALL_MS - 121_000, ..good() }, NOW);
    assert_eq!(code, RefusalCode::Clock);
    assert!(message.contains("121 s behind that"), "{message}");
    let (code, message) = refuse(2, Hello { wall_ms: u64::MAX, ..good() }, NOW);
    assert_eq!(code, RefusalCode::Clock);
    assert!(message.contains("ahead"), "{message}");

    let day_later = Now { wall_ms: ticket.expires_wall_ms, ..NOW };
    let late = Hello { wall_ms: day_later.wall_ms, ..good() };
    assert_eq!(refuse(2, late, day_later).0, RefusalCode::InviteExpired);
    let hour_later = Now { wall_ms: WALL_MS + 3_600_000, ..NOW };
    let old_claim = Hello { wall_ms: hour_later.wall_ms, ..good() };
    assert_eq!(refuse(2, old_claim, hour_later).0, RefusalCode::ClaimStale);

    let no_ticket = JoinRequest { claim: claim(pool, 2, 2, 0), invite: None };
    let no_ticket = hello(pool, Purpose::Join(no_ticket));
    assert_eq!(refuse(2, no_ticket, NOW).0, RefusalCode::InviteNeeded);
    let unknown = Ticket { invite: StatementId([8; 32]), ..ticket.clone() };
    let unknown = join_with(&unknown, claim(pool, 2, 2, 0));
    assert_eq!(refuse(2, unknown, NOW).0, RefusalCode::InviteUnknown);
    let mut guessed = ticket.clone();
    guessed.invite_seed[5] ^= 1;
    let guessed = join_with(&guessed, claim(pool, 2, 2, 0));
    assert_eq!(refuse(2, guessed, NOW).0, RefusalCode::BadProof);
    assert_eq!(refuse(3, good(), NOW).0, RefusalCode::BadProof, "overheard from another machine");
    let other_pool = join_with(&ticket, claim(PoolId([9; 32]), 2, 2, 0));
    assert_eq!(refuse(2, other_pool, NOW).0, RefusalCode::BadProof);
    let same_name = join_with(&ticket, claim_as(pool, 2, 2, 0, "user1", "box"));
    let (code, message) = refuse(2, same_name, NOW);
    assert_eq!(code, RefusalCode::UsernameTaken);
    assert!(message.contains("--identity"), "{message}");

    joined(&mut one, &ticket, 2);
    let next = join_with(&ticket, claim(pool, 3, 3, 0));
    assert_eq!(refused(knock(&mut one, 3, next, NOW)).0, RefusalCode::InviteUsedUp);
    let anothers = JoinRequest { claim: claim(pool, 1, 2, 0), invite: None };
    let anothers = hello(pool, Purpose::Join(anothers));
    assert_eq!(refused(knock(&mut one, 2, anothers, NOW)).0, RefusalCode::OtherOwner);
}

#[test]
fn a_refusal_shows_nothing_of_the_pool_to_who_has_no_ticket() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let stranger = claim_as(ticket.pool, 9, 9, 0, "user1", "node1");
    let unknown = Ticket { invite: StatementId([8; 32]), ..ticket.clone() };
    let hellos = [
        hello(PoolId([3; 32]), Purpose::Reconcile(Reconcile::asking(&one.roster))),
        hello(ticket.pool, Purpose::Reconcile(Reconcile::introducing(&one.roster))),
        hello(ticket.pool, Purpose::Join(JoinRequest { claim: stranger.clone(), invite: None })),
        join_with(&unknown, stranger),
    ];
    for hello in hellos {
        let (code, message) = refused(knock(&mut one, 9, hello, NOW));
        let shown = format!("{code:?} {message}");
        for secret in ["user1", "node1", &ticket.pool.to_string(), &peer(1).to_string()] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}

#[test]
fn a_taken_node_name_gets_a_number_at_the_door() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let same = join_with(&ticket, claim_as(ticket.pool, 2, 2, 0, "jo", "node1"));
    let (Reply::Welcome(message), _) = knock(&mut one, 2, same, NOW) else { panic!("refused") };
    assert_eq!(message.node_name, name("node1-2"));
}

#[test]
fn a_limited_ticket_at_two_doors_is_settled_when_they_meet() {
    let mut one = Replica::founder();
    let open = one.invite(50, Rights::User, None);
    let once = one.invite(51, Rights::User, Some(1));
    let mut two = joined(&mut one, &open, 2);
    let three = joined(&mut one, &once, 3);
    let four = joined(&mut two, &once, 4);
    reconcile(&mut two, &mut one);
    assert_eq!(one.roster.state(), two.roster.state());
    let (three, four) = (three.peer(), four.peer());
    let state = one.roster.state();
    assert_ne!(state.is_member_node(three), state.is_member_node(four));
    let loser = if state.is_member_node(three) { 4 } else { 3 };
    let words = Reconcile::asking(&one.roster);
    let back = hello(one.roster.pool(), Purpose::Reconcile(words));
    assert_eq!(refused(knock(&mut one, loser, back, NOW)).0, RefusalCode::NotAMember);
}

#[test]
fn a_machine_that_left_joins_again_with_a_new_claim_only() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let mut two = joined(&mut one, &ticket, 2);
    let claims = two.roster.state().nodes[&peer(2)].claims.clone();
    two.as_node(Kind::Leave(Leave { node: peer(2), claims })).unwrap();
    // Its last word, brought by itself.
    let words = Reconcile::bringing(&two.roster, &one.roster.heads());
    let (reply, added) = knock(&mut one, 2, hello(ticket.pool, Purpose::Reconcile(words)), NOW);
    assert!(matches!(reply, Reply::Refused(Refusal { code: RefusalCode::NotAMember, .. })));
    assert_eq!(added.len(), 1);
    assert!(!one.roster.state().is_member_node(peer(2)));

    let old = join_with(&ticket, claim(ticket.pool, 2, 2, 0));
    assert_eq!(refused(knock(&mut one, 2, old, NOW)).0, RefusalCode::ClaimStale);
    let new = join_with(&ticket, claim(ticket.pool, 2, 2, 1));
    assert!(matches!(knock(&mut one, 2, new, NOW).0, Reply::Welcome(_)));
    assert_eq!(one.roster.state().invites[&ticket.invite].used, 1);
}

#[test]
fn a_node_that_is_no_member_admits_nobody() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let mut outside = Replica::new(7, one.roster.clone());
    let request = join_with(&ticket, claim(ticket.pool, 2, 2, 0));
    assert_eq!(refused(knock(&mut outside, 2, request, NOW)).0, RefusalCode::CannotAdmit);
}

#[test]
fn an_admin_ticket_raises_a_member_at_the_door() {
    let mut one = Replica::founder();
    let open = one.invite(50, Rights::User, None);
    let two = joined(&mut one, &open, 2);
    let admins = one.invite(51, Rights::Admin, Some(1));
    let request = join_with(&admins, claim(open.pool, 2, 2, 3));
    let (reply, added) = knock(&mut one, 2, request, NOW);
    assert!(matches!(reply, Reply::Welcome(_)), "{reply:?}");
    assert_eq!(added.len(), 1);
    assert!(one.roster.state().is_admin(two.user_id()));
}

#[test]
fn an_unknown_peer_leaves_nothing_behind_whatever_it_pushes() {
    let mut one = Replica::founder();
    let mut elsewhere = Replica::founder();
    let ticket = elsewhere.invite(50, Rights::User, None);
    joined(&mut elsewhere, &ticket, 2);
    // True statements of the pool, brought by somebody whom they do not admit.
    let words = Reconcile::introducing(&elsewhere.roster);
    let foreign = hello(one.roster.pool(), Purpose::Reconcile(words));
    let digest = one.roster.digest();
    assert_eq!(refused(knock(&mut one, 9, foreign, NOW)).0, RefusalCode::NotAMember);
    // Some whose causes are missing.
    let mut words = Reconcile::introducing(&elsewhere.roster);
    words.statements.remove(1);
    let gap = hello(one.roster.pool(), Purpose::Reconcile(words));
    assert_eq!(refused(knock(&mut one, 2, gap, NOW)).0, RefusalCode::NotAMember);
    assert_eq!((one.roster.digest(), one.roster.waiting()), (digest, 0));
}

#[test]
fn a_newcomer_checks_that_the_door_answers_for_its_pool() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let request = join_with(&ticket, claim(ticket.pool, 2, 2, 0));
    let (Reply::Welcome(message), _) = knock(&mut one, 2, request, NOW) else { panic!("refused") };
    let expected = PoolId([4; 32]);
    let error = welcome(expected, message.clone()).unwrap_err();
    assert_eq!(error, WelcomeError::OtherPool { expected, got: ticket.pool });
    let mut bent = message;
    bent.statements[1].bytes[40] ^= 1;
    assert!(matches!(welcome(ticket.pool, bent), Err(WelcomeError::Statement(_))));
}

#[test]
fn a_refused_request_is_answered_from_memory_for_a_minute() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let pool = ticket.pool;
    let mut book = DoorBook::new();
    let mut ask = |one: &mut Replica, hello: &Hello, after_ms: u64| {
        let now = Now { boot_ms: NOW.boot_ms + after_ms, ..NOW };
        book.judge(&mut one.roster, &one.node, one.device, peer(2), hello.clone(), now).0
    };
    let code = |reply: Reply| match reply {
        Reply::Refused(refusal) => (refusal.code, refusal.retry_after_ms),
        other => panic!("{other:?}"),
    };
    let claim_of = |nonce| claim(pool, 2, 2, nonce);
    let seed = [60; 32];
    let not_yet = Ticket { invite_seed: seed.into(), ..ticket.clone() };
    let first = join_with(&not_yet, claim_of(0));
    assert_eq!(code(ask(&mut one, &first, 0)), (RefusalCode::BadProof, None));
    assert_eq!(code(ask(&mut one, &first, 10_000)), (RefusalCode::BadProof, Some(50_000)));

    // Other requests are judged, up to a number.
    for nonce in 1..4 {
        let other = join_with(&not_yet, claim_of(nonce));
        assert_eq!(code(ask(&mut one, &other, 20_000)), (RefusalCode::BadProof, None));
    }
    let good = join_with(&ticket, claim_of(9));
    assert_eq!(code(ask(&mut one, &good, 30_000)), (RefusalCode::TooMany, Some(30_000)));
    assert!(matches!(ask(&mut one, &good, 60_000), Reply::Welcome(_)));
}

#[test]
fn the_memory_of_refusals_is_bounded() {
    let mut one = Replica::founder();
    let mut book = DoorBook::new();
    let foreign = hello(PoolId([9; 32]), Purpose::Reconcile(Reconcile::asking(&one.roster)));
    for n in 0..u64::try_from(REFUSED_PEERS_MAX).unwrap() + 50 {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&n.to_le_bytes());
        let from = PeerId(crate::identity::PublicKey(key));
        let now = Now { boot_ms: NOW.boot_ms + n, ..NOW };
        book.judge(&mut one.roster, &one.node, one.device, from, foreign.clone(), now);
    }
    assert_eq!(book.len(), REFUSED_PEERS_MAX);
}

#[test]
fn the_encoding_of_door_messages_stays_as_it_is() {
    let mut one = Replica::founder();
    let ticket = one.invite(50, Rights::User, None);
    let pinned = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
    let join = join_with(&ticket, claim(ticket.pool, 2, 2, 0));
    // A hello of every version is read by every other, so that both can be named.
    let of_version_1 = |hello: &Hello| wire::encode(&Hello { versions: (1, 1), ..hello.clone() });
    assert_eq!(pinned(&of_version_1(&join)), "36688849bcc6f556");
    let welcomed = knock(&mut one, 2, join.clone(), NOW).0;
    assert_eq!(pinned(&wire::encode(&welcomed)), "c6e8462227fd595e");
    let asking = hello(ticket.pool, Purpose::Reconcile(Reconcile::asking(&one.roster)));
    assert_eq!(pinned(&of_version_1(&asking)), "78eba3b75b6d9338");
    let reconciled = knock(&mut one, 2, asking, NOW).0;
    assert_eq!(pinned(&wire::encode(&reconciled)), "eef78221429bb88f");
    let refused = knock(&mut one, 3, join, NOW).0;
    assert_eq!(pinned(&wire::encode(&refused)), "d0e772d7264cc713");
}

#[test]
fn a_full_roster_fits_into_its_messages() {
    let mut one = Replica::founder();
    // Long statements, so that they do not fit into one message.
    for n in 0..2500_u32 {
        let kind = Kind::Profile(crate::roster::Profile {
            full_name: Some(format!("{n:0>254}")),
            ..Default::default()
        });
        one.as_user(kind).unwrap();
    }
    let key = KeyPair::from_seed(&[50; 32]).public();
    let expires_wall_ms = WALL_MS + 1000;
    let invite = Invite { key, rights: Rights::User, uses: None, expires_wall_ms };
    let signed = one.as_user(Kind::Invite(invite)).unwrap();
    let ticket = Ticket {
        pool: one.roster.pool(),
        pool_name: name("lab"),
        invite: crate::roster::Statement::id(&signed),
        invite_seed: [50; 32].into(),
        doors: Vec::new(),
        expires_wall_ms,
    };
    let request = join_with(&ticket, claim(ticket.pool, 2, 2, 0));
    let (Reply::Welcome(message), _) = knock(&mut one, 2, request, NOW) else { panic!("refused") };
    assert!(wire::encode(&message).len() < MESSAGE_BYTES_MAX);
    let welcomed = welcome(ticket.pool, message).unwrap();
    assert!(!welcomed.complete);
    let mut two = Replica::new(2, welcomed.roster);
    assert_eq!(reconcile(&mut two, &mut one), 1);
    assert_eq!(two.roster.digest(), one.roster.digest());
}
