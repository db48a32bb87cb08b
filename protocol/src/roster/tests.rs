use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{
    testing::{
        Replica, WALL_MS, accept, admit_node, claim, claim_as, claims_of, forge, genesis_by, name,
        node_key, user_key,
    },
    *,
};
use crate::identity::{KeyPair, PeerId, UserId};

fn user(n: u8) -> UserId {
    UserId(user_key(n).public())
}

fn peer(n: u8) -> PeerId {
    PeerId(node_key(n).public())
}

fn profile(full_name: &str) -> Kind {
    Kind::Profile(Profile { full_name: Some(full_name.to_owned()), ..Profile::default() })
}

fn leave(roster: &Roster, n: u8) -> Kind {
    Kind::Leave(Leave { node: peer(n), claims: claims_of(roster, n) })
}

#[test]
fn a_founder_is_admin_and_brings_the_first_machine_without_any_door() {
    let founder = Replica::founder();
    let state = founder.roster.state();
    assert!(state.is_admin(user(1)) && state.may_invite(user(1)));
    assert_eq!(state.users[&user(1)].username, name("user1"));
    assert_eq!(state.nodes[&peer(1)].owner, user(1));
    assert_eq!(founder.roster.next_seq(Author::Node(peer(1)), founder.device), 2);
    assert_eq!(founder.roster.heads().len(), 1);
}

#[test]
fn any_number_joins_by_one_ticket_and_gets_the_rights_it_names() {
    let mut door = Replica::founder();
    let ticket = door.invite(50, Rights::User, None);
    door.accept(&ticket, 2).unwrap();
    door.accept(&ticket, 3).unwrap();
    let admins = door.invite(51, Rights::Admin, None);
    door.accept(&admins, 4).unwrap();
    let state = door.roster.state();
    assert!(state.is_member_user(user(2)) && state.is_member_node(peer(3)));
    assert!(!state.is_admin(user(2)) && state.is_admin(user(4)));
    assert_eq!(state.invites[&ticket.invite].used, 2);

    assert!(state.may_control_job(user(2), user(2)) && state.may_control_job(user(4), user(2)));
    assert!(!state.may_read_job(user(2), user(3)) && !state.may_control_job(user(2), user(3)));
    assert!(!state.may_read_job(user(9), user(9)), "a stranger has no right even to its own");
    assert!(!state.may_invite(user(2)));
}

#[test]
fn an_ordinary_user_neither_invites_nor_removes_anothers_machine() {
    let mut door = Replica::founder();
    let ticket = door.invite(50, Rights::User, None);
    door.accept(&ticket, 2).unwrap();
    let mut other = Replica::new(2, door.roster.clone());
    let kind = Kind::Invite(Invite {
        key: user_key(9).public(),
        rights: Rights::Admin,
        uses: None,
        expires_wall_ms: u64::MAX,
    });
    let no_right =
        |why| DraftError::Rejected(Rejected::NoRight { author: Author::User(user(2)), why });
    assert_eq!(other.as_user(kind.clone()), Err(no_right("only admins invite")));
    let not_mine = leave(&other.roster, 1);
    assert_eq!(
        other.as_user(not_mine.clone()),
        Err(no_right("only its owner or an admin removes a node"))
    );
    for kind in [kind, not_mine] {
        let author = Author::User(user(2));
        let forged = forge(&other.roster, author, &other.user, other.device, |_| (), kind);
        assert!(matches!(door.roster.insert(forged), Err(Rejected::NoRight { .. })));
    }
}

#[test]
fn a_limited_ticket_used_at_two_doors_at_once_lets_in_only_as_many_after_the_merge() {
    let mut left = Replica::founder();
    let open = left.invite(50, Rights::User, None);
    left.accept(&open, 2).unwrap();
    let once = left.invite(51, Rights::User, Some(1));
    let mut right = Replica::new(2, left.roster.clone());
    left.accept(&once, 3).unwrap();
    right.accept(&once, 4).unwrap();
    // What the loser says afterwards falls with it.
    let mut loser = [Replica::new(3, left.roster.clone()), Replica::new(4, right.roster.clone())];
    for replica in &mut loser {
        replica.as_user(profile("I was here")).unwrap();
        let own = claim(once.pool, replica.n, replica.n + 10, 0);
        let door_name = format!("node{}", replica.n + 10);
        replica.as_node(admit_node(own, &door_name)).unwrap();
    }
    let [three, four] = loser;
    left.pull(&three.roster);
    left.pull(&four.roster);
    right.pull(&four.roster);
    right.pull(&three.roster);

    let state = left.roster.state();
    assert_eq!(state, right.roster.state());
    let in_by_it = [3, 4].into_iter().filter(|&n| state.is_member_user(user(n)));
    assert_eq!(in_by_it.count(), 1);
    for n in [3, 4] {
        let is_in = state.is_member_user(user(n));
        assert_eq!(state.is_member_node(peer(n)), is_in);
        assert_eq!(state.is_member_node(peer(n + 10)), is_in);
    }
    assert_eq!(state.invites[&once.invite].used, 1);
    // The door that admitted the loser goes on all the same.
    left.accept(&open, 5).unwrap();
    right.accept(&open, 6).unwrap();
}

#[test]
fn one_person_with_two_machines_takes_one_use() {
    let mut door = Replica::founder();
    let once = door.invite(51, Rights::User, Some(1));
    door.accept(&once, 3).unwrap();
    let second = claim(once.pool, 3, 13, 1);
    door.as_node(accept(&once, second, "node13")).unwrap();
    let state = door.roster.state();
    assert_eq!(state.nodes[&peer(13)].owner, user(3));
    assert_eq!(state.invites[&once.invite].used, 1);
    let stranger = claim(once.pool, 4, 4, 0);
    door.as_node(accept(&once, stranger, "node4")).unwrap();
    assert!(!door.roster.state().is_member_user(user(4)), "used up");
}

#[test]
fn two_statements_under_one_number_are_void_with_what_follows_and_kept_as_evidence() {
    let mut door = Replica::founder();
    let (author, device) = (Author::User(user(1)), door.device);
    let before = door.roster.clone();
    door.as_user(profile("one")).unwrap();
    let next = door.as_user(profile("later")).unwrap();
    let mut twin = Replica { roster: before, ..door.clone() };
    let other = twin.as_user(profile("other")).unwrap();
    assert_eq!(door.roster.state().users[&user(1)].full_name.as_deref(), Some("later"));

    door.roster.insert(other).unwrap();
    assert_eq!(door.roster.state().users[&user(1)].full_name, None);
    assert!(!door.roster.applies(Statement::id(&next)));
    let evidence = door.roster.contradictions();
    assert_eq!(evidence.len(), 1);
    assert_eq!((evidence[0].author, evidence[0].seq), (author, 1));
    assert_eq!(evidence[0].statements.len(), 2);
    assert_eq!(
        door.roster.draft(author, device, profile("more"), 0),
        Err(DraftError::Suspended(author))
    );
    // Another home of the same person goes on.
    door.device = DeviceId([99; 16]);
    door.as_user(profile("elsewhere")).unwrap();
    assert_eq!(door.roster.state().users[&user(1)].full_name.as_deref(), Some("elsewhere"));
}

#[test]
fn a_draft_overtaken_by_another_is_not_published() {
    let mut door = Replica::founder();
    let author = Author::User(user(1));
    let draft = |text| door.roster.draft(author, door.device, profile(text), WALL_MS).unwrap();
    let (first, second) = (draft("first"), draft("second"));
    door.roster.insert_drafted(first.sign(&door.user).unwrap()).unwrap();
    let second = second.sign(&door.user).unwrap();
    assert_eq!(door.roster.insert_drafted(second), Err(Rejected::Stale));
    assert!(door.roster.contradictions().is_empty());
}

#[test]
fn a_machine_that_left_needs_a_new_claim_to_come_back() {
    let mut door = Replica::founder();
    let ticket = door.invite(50, Rights::User, None);
    door.accept(&ticket, 2).unwrap();
    let mut two = Replica::new(2, door.roster.clone());
    let away = leave(&two.roster, 2);
    two.as_node(away).unwrap();
    door.pull(&two.roster);
    assert!(!door.roster.state().is_member_node(peer(2)));
    assert!(door.roster.state().is_member_user(user(2)), "the person stays");

    let old = claim(ticket.pool, 2, 2, 0);
    assert!(matches!(
        door.as_node(admit_node(old.clone(), "node2")),
        Err(DraftError::Rejected(Rejected::NoRight { .. }))
    ));
    let author = Author::Node(peer(1));
    let forged =
        forge(&door.roster, author, &door.node, door.device, |_| (), admit_node(old, "node2"));
    door.roster.insert(forged).unwrap();
    assert!(!door.roster.state().is_member_node(peer(2)), "kept, but it does not apply");

    let new = claim(ticket.pool, 2, 2, 1);
    door.as_node(admit_node(new, "node2")).unwrap();
    assert!(door.roster.state().is_member_node(peer(2)));
    let by_admin = leave(&door.roster, 2);
    door.as_user(by_admin).unwrap();
    assert!(!door.roster.state().is_member_node(peer(2)));
}

#[test]
fn a_replay_concurrent_to_a_leave_does_not_undo_it() {
    let mut door = Replica::founder();
    let ticket = door.invite(50, Rights::User, None);
    door.accept(&ticket, 2).unwrap();
    let mut elsewhere = Replica::new(2, door.roster.clone());
    elsewhere.accept(&ticket, 3).unwrap();
    for n in 30..40 {
        // Long before or long after in the fold's order: it makes no difference.
        elsewhere.as_user(profile(&n.to_string())).unwrap();
    }
    let again = claim(ticket.pool, 2, 2, 0);
    elsewhere.as_node(admit_node(again, "node2")).unwrap();
    let away = leave(&door.roster, 2);
    door.as_user(away).unwrap();
    door.pull(&elsewhere.roster);
    assert!(!door.roster.state().is_member_node(peer(2)));
    assert!(door.roster.state().is_member_node(peer(3)), "said before it knew of the leave");
}

#[test]
fn names_taken_at_the_same_time_differ_by_a_number_everywhere() {
    let mut left = Replica::founder();
    let ticket = left.invite(50, Rights::User, None);
    left.accept(&ticket, 2).unwrap();
    let mut right = Replica::new(2, left.roster.clone());
    let pool = ticket.pool;
    left.as_node(accept(&ticket, claim_as(pool, 3, 3, 0, "jo", "box"), "box")).unwrap();
    right.as_node(accept(&ticket, claim_as(pool, 4, 4, 0, "jo", "box"), "box")).unwrap();
    left.pull(&right.roster);
    right.pull(&left.roster);
    let state = left.roster.state();
    assert_eq!(state, right.roster.state());
    let users: BTreeSet<_> = [3, 4].map(|n| state.users[&user(n)].username.to_string()).into();
    assert_eq!(users, ["jo".to_owned(), "jo-2".to_owned()].into());
    let nodes: BTreeSet<_> = [3, 4].map(|n| state.nodes[&peer(n)].name.to_string()).into();
    assert_eq!(nodes, ["box".to_owned(), "box-2".to_owned()].into());
    assert_eq!(state.user_named(&name("jo")).map(|u| state.is_member_user(u)), Some(true));
}

#[test]
fn a_profile_changes_only_what_it_names() {
    let mut founder = Replica::founder();
    let both = Profile {
        username: None,
        full_name: Some("Ann Bee".to_owned()),
        email: Some("ann@example.org".to_owned()),
    };
    founder.as_user(Kind::Profile(both)).unwrap();
    let rename =
        Profile { username: Some(name("ann")), email: Some(String::new()), full_name: None };
    founder.as_user(Kind::Profile(rename)).unwrap();
    let me = &founder.roster.state().users[&user(1)];
    assert_eq!(me.username, name("ann"));
    assert_eq!((me.full_name.as_deref(), me.email.as_deref()), (Some("Ann Bee"), None));
}

#[test]
fn an_admin_ticket_raises_a_member() {
    let mut door = Replica::founder();
    let open = door.invite(50, Rights::User, None);
    door.accept(&open, 2).unwrap();
    assert!(!door.roster.state().is_admin(user(2)));
    let admins = door.invite(51, Rights::Admin, Some(1));
    door.accept(&admins, 2).unwrap();
    assert!(door.roster.state().is_admin(user(2)));
    assert_eq!(door.roster.state().nodes[&peer(2)].name, name("node2"));
}

#[test]
fn a_stranger_cannot_make_the_roster_grow() {
    let mut door = Replica::founder();
    let ticket = door.invite(50, Rights::User, None);
    let stranger = Replica::new(9, door.roster.clone());
    let len = door.roster.len();
    let claim_of_9 = claim(ticket.pool, 9, 9, 0);
    let said_by = |author: Author, key: &KeyPair, kind: Kind| {
        forge(&stranger.roster, author, key, stranger.device, |_| (), kind)
    };
    let as_node = |kind| said_by(Author::Node(peer(9)), &stranger.node, kind);
    let attempts = [
        said_by(Author::User(user(9)), &stranger.user, profile("me")),
        as_node(accept(&ticket, claim_of_9.clone(), "node9")),
        as_node(admit_node(claim_of_9.clone(), "node9")),
        as_node(Kind::Leave(Leave { node: peer(1), claims: claims_of(&door.roster, 1) })),
    ];
    for attempt in attempts {
        assert!(matches!(door.roster.insert(attempt), Err(Rejected::NoRight { .. })));
    }
    // A member's name on a stranger's signature.
    let kind = admit_node(claim_of_9, "node9");
    let forged = said_by(Author::Node(peer(1)), &stranger.node, kind);
    let author = Author::Node(peer(1));
    assert_eq!(door.roster.insert(forged.clone()), Err(Rejected::NotItsAuthor(author)));
    let mut signed_for = forged;
    signed_for.signer = node_key(1).public();
    assert_eq!(door.roster.insert(signed_for), Err(Rejected::Signature));
    assert_eq!((door.roster.len(), door.roster.waiting()), (len, 0));
}

#[test]
fn a_door_cannot_admit_by_a_false_proof_or_under_another_name() {
    let mut door = Replica::founder();
    let mut ticket = door.invite(50, Rights::User, None);
    let at_door =
        |kind| forge(&door.roster, Author::Node(peer(1)), &door.node, door.device, |_| (), kind);
    let mut tries = Vec::new();
    let mut guessed = ticket.clone();
    guessed.invite_seed[0] ^= 1;
    tries.push((
        at_door(accept(&guessed, claim(ticket.pool, 2, 2, 0), "node2")),
        Rejected::InviteProof,
    ));
    tries.push((
        at_door(accept(&ticket, claim(ticket.pool, 2, 2, 0), "elsewhere")),
        Rejected::Bounds("node name is not the one in the claim"),
    ));
    let other_pool = claim(PoolId([3; 32]), 2, 2, 0);
    tries.push((
        at_door(accept(&ticket, other_pool, "node2")),
        Rejected::OtherPool(PoolId([3; 32])),
    ));
    ticket.invite = StatementId([0; 32]);
    tries.push((
        at_door(accept(&ticket, claim(ticket.pool, 2, 2, 0), "node2")),
        Rejected::Unseen("an invite"),
    ));
    for (signed, expected) in tries {
        assert_eq!(door.roster.insert(signed), Err(expected));
    }
}

#[test]
fn a_gap_or_a_repetition_in_the_sequence_is_refused() {
    let mut door = Replica::founder();
    door.as_user(profile("one")).unwrap();
    let author = Author::User(user(1));
    for seq in [1, 3] {
        let forged =
            forge(&door.roster, author, &door.user, door.device, |s| s.seq = seq, profile("x"));
        assert_eq!(door.roster.insert(forged), Err(Rejected::Sequence { author, seq }));
    }
    // The right number, but made without having seen its predecessor.
    let unseen =
        forge(&door.roster, author, &door.user, door.device, |s| s.parents.clear(), profile("x"));
    assert_eq!(door.roster.insert(unseen), Err(Rejected::Sequence { author, seq: 2 }));
}

#[test]
fn statements_wait_for_their_parents_and_no_more_than_a_bound_of_them() {
    let mut founder = Replica::founder();
    let first = founder.as_user(profile("0")).unwrap();
    let rest: Vec<_> =
        (1..=WAITING_MAX + 3).map(|n| founder.as_user(profile(&n.to_string())).unwrap()).collect();
    let mut other = Roster::new(founder.roster.genesis_bytes().to_vec()).unwrap();
    for signed in rest.iter().rev() {
        let inserted = other.insert(signed.clone()).unwrap();
        assert!(inserted.new && inserted.added.is_empty());
    }
    assert_eq!(other.waiting(), WAITING_MAX);
    assert!(!other.insert(rest[0].clone()).unwrap().new);
    other.insert(founder.roster.statements()[0].clone()).unwrap();
    let added = other.insert(first).unwrap().added;
    assert_eq!(added.len(), WAITING_MAX + 1, "the newest gave way first: they came first");
    for signed in rest {
        other.insert(signed).unwrap();
    }
    assert_eq!(other.digest(), founder.roster.digest());
    assert_eq!(other.state(), founder.roster.state());
}

#[test]
fn what_a_peer_lacks_is_sent_in_parts_that_fit() {
    let mut founder = Replica::founder();
    for n in 0..40 {
        founder.as_user(profile(&n.to_string())).unwrap();
    }
    let roster = &founder.roster;
    let mut other = Roster::new(roster.genesis_bytes().to_vec()).unwrap();
    let mut rounds = 0;
    while other.digest() != roster.digest() {
        let part = roster.statements_unknown_to(&other.heads(), 3000);
        assert!(!part.is_empty());
        for signed in part {
            assert_eq!(other.insert(signed).unwrap().added.len(), 1);
        }
        rounds += 1;
    }
    assert!(rounds > 3);
    assert!(roster.statements_unknown_to(&other.heads(), usize::MAX).is_empty());
    let unknown = [StatementId([9; 32])];
    assert_eq!(roster.statements_unknown_to(&unknown, usize::MAX).len(), roster.len());
    let newest = roster.newest_statements(3000);
    assert_eq!(newest.last(), roster.statements().last().copied());
    assert!(newest.len() < 40);
}

#[test]
fn a_back_dated_statement_gains_nothing_by_its_date() {
    let mut door = Replica::founder();
    let ticket = door.invite(50, Rights::User, None);
    door.accept(&ticket, 2).unwrap();
    let mut two = Replica::new(2, door.roster.clone());
    let away = leave(&two.roster, 2);
    two.as_node(away).unwrap();
    door.pull(&two.roster);

    // A machine that left admits another, dated and placed before it came in.
    let kind = accept(&ticket, claim(ticket.pool, 3, 3, 0), "node3");
    let author = Author::Node(peer(2));
    let before_it_came = |s: &mut Statement| {
        s.parents = vec![ticket.invite];
        s.seq = 1;
        s.not_before_ms = 0;
    };
    let device = DeviceId([77; 16]);
    let early = forge(&door.roster, author, &two.node, device, before_it_came, kind.clone());
    assert!(matches!(door.roster.insert(early), Err(Rejected::NoRight { .. })));

    // With the leave among what it saw, the oldest date does not help.
    let dated = |s: &mut Statement| (s.seq, s.not_after_ms) = (1, 1);
    let late = forge(&door.roster, author, &two.node, device, dated, kind);
    let inserted = door.roster.insert(late).unwrap();
    assert!(!door.roster.applies(inserted.id));
    assert!(!door.roster.state().is_member_user(user(3)));
}

#[test]
fn many_heads_are_merged_by_drafts_of_a_bounded_number_of_parents() {
    let mut founder = Replica::founder();
    let base = founder.roster.clone();
    for n in 0..40_u8 {
        let device = DeviceId([n + 100; 16]);
        let mut home = Replica { roster: base.clone(), device, ..founder.clone() };
        home.as_user(profile(&n.to_string())).unwrap();
        founder.pull(&home.roster);
    }
    assert_eq!(founder.roster.heads().len(), 40);
    founder.device = DeviceId([101; 16]);
    for _ in 0..3 {
        founder.as_user(profile("merged")).unwrap();
    }
    assert_eq!(founder.roster.heads().len(), 1);
    assert_eq!(founder.roster.state().users[&user(1)].full_name.as_deref(), Some("merged"));
}

#[test]
fn a_machine_that_comes_and_goes_without_end_is_in_while_its_last_claim_is() {
    let mut founder = Replica::founder();
    let pool = founder.roster.pool();
    for n in 0..60_u8 {
        let again = claim(pool, 1, 40, n);
        founder.as_node(admit_node(again, "node40")).unwrap();
        if n % 3 == 2 {
            assert_eq!(claims_of(&founder.roster, 40).len(), 3);
            let away = leave(&founder.roster, 40);
            founder.as_user(away).unwrap();
            assert!(!founder.roster.state().is_member_node(peer(40)));
        }
    }
    for n in 100..=100 + u8::try_from(NODE_CLAIMS_MAX).unwrap() {
        founder.as_node(admit_node(claim(pool, 1, 40, n), "node40")).unwrap();
    }
    assert_eq!(
        claims_of(&founder.roster, 40).len(),
        NODE_CLAIMS_MAX,
        "no more than one leave ends"
    );
}

/// One step of a random history of a pool.
#[derive(Debug, Clone)]
enum Step {
    Invite { by: u8, uses: Option<u32>, admin: bool },
    Accept { at: u8, invite: usize, n: u8 },
    OwnNode { at: u8, n: u8, nonce: u8 },
    Leave { by: u8, n: u8 },
    Rename { by: u8, to: u8 },
    Contradict { by: u8 },
    Exchange { from: u8, to: u8 },
}

fn any_step() -> impl Strategy<Value = Step> {
    let member = 1..6_u8;
    prop_oneof![
        1 => (member.clone(), proptest::option::of(1..3_u32), any::<bool>())
            .prop_map(|(by, uses, admin)| Step::Invite { by, uses, admin }),
        5 => (member.clone(), any::<usize>(), 2..12_u8)
            .prop_map(|(at, invite, n)| Step::Accept { at, invite, n }),
        2 => (member.clone(), 12..15_u8, 0..3_u8)
            .prop_map(|(at, n, nonce)| Step::OwnNode { at, n, nonce }),
        2 => (member.clone(), 1..15_u8).prop_map(|(by, n)| Step::Leave { by, n }),
        2 => (member.clone(), 0..2_u8).prop_map(|(by, to)| Step::Rename { by, to }),
        1 => member.clone().prop_map(|by| Step::Contradict { by }),
        4 => (member.clone(), member).prop_map(|(from, to)| Step::Exchange { from, to }),
    ]
}

/// Runs the steps over five replicas, of which the first three are members from the
/// start; a step that its author has no right to is simply not taken.
fn play(steps: &[Step]) -> Vec<Replica> {
    let mut founder = Replica::founder();
    let open = founder.invite(200, Rights::User, None);
    founder.accept(&open, 2).unwrap();
    founder.accept(&open, 3).unwrap();
    let mut tickets = vec![
        open,
        founder.invite(201, Rights::Admin, None),
        founder.invite(202, Rights::User, Some(1)),
    ];
    let mut replicas: Vec<Replica> =
        (1..6).map(|n| Replica::new(n, founder.roster.clone())).collect();
    for (number, step) in steps.iter().enumerate() {
        let at = |n: u8| usize::from(n) - 1;
        match *step {
            Step::Invite { by, uses, admin } => {
                let rights = if admin { Rights::Admin } else { Rights::User };
                let seed = u8::try_from(number).unwrap();
                tickets.extend(replicas[at(by)].try_invite(seed, rights, uses));
            }
            Step::Accept { at: door, invite, n } => {
                let ticket = &tickets[invite % tickets.len()];
                let _ = replicas[at(door)].accept(ticket, n);
            }
            Step::OwnNode { at: door, n, nonce } => {
                let pool = founder.roster.pool();
                let _ = replicas[at(door)]
                    .as_node(admit_node(claim_as(pool, door, n, nonce, "x", "box"), "box"));
            }
            Step::Leave { by, n } => {
                let replica = &mut replicas[at(by)];
                if replica.roster.state().is_member_node(peer(n)) {
                    let kind = leave(&replica.roster, n);
                    let _ = replica.as_user(kind);
                }
            }
            Step::Rename { by, to } => {
                let username = Some(name(["jo", "ann"][usize::from(to)]));
                let kind = Kind::Profile(Profile { username, ..Profile::default() });
                let _ = replicas[at(by)].as_user(kind);
            }
            Step::Contradict { by } => {
                let mut twin = replicas[at(by)].clone();
                let _ = twin.as_user(profile("two-faced"));
                let _ = replicas[at(by)].as_user(profile("honest"));
                let other = replicas[at(by % 5 + 1)].clone();
                for signed in twin.roster.statements() {
                    replicas[at(other.n)].roster.insert(signed.clone()).unwrap();
                }
            }
            Step::Exchange { from, to } => {
                let theirs = replicas[at(from)].roster.clone();
                replicas[at(to)].pull(&theirs);
            }
        }
    }
    replicas
}

/// The properties below would hold of histories in which nothing happens.
#[test]
fn random_histories_see_what_they_are_meant_to() {
    let mut runner = TestRunner::deterministic();
    let (mut contradictions, mut forks, mut late_accepts, mut users) = (0, 0, 0, 0);
    for _ in 0..30 {
        let steps = proptest::collection::vec(any_step(), 60).new_tree(&mut runner).unwrap();
        let mut merged = Replica::new(1, Roster::new(genesis_by(&[1])).unwrap());
        for replica in play(&steps.current()) {
            merged.pull(&replica.roster);
        }
        let roster = &merged.roster;
        contradictions += roster.contradictions().len();
        forks += usize::from(roster.heads().len() > 1);
        users += roster.state().users.len();
        for signed in roster.statements() {
            let is_accept =
                matches!(Statement::from_bytes(&signed.bytes).unwrap().kind, Kind::Accept(_));
            late_accepts += usize::from(is_accept && !roster.applies(Statement::id(signed)));
        }
    }
    assert!(contradictions > 10 && forks > 10 && late_accepts > 10 && users > 100);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_same_statements_in_any_order_give_the_same_state(
        steps in proptest::collection::vec(any_step(), 1..60),
        keys in proptest::collection::vec(any::<u16>(), 1000),
    ) {
        let mut all: Vec<SignedBytes> = play(&steps)
            .iter()
            .flat_map(|r| r.roster.statements().into_iter().cloned().collect::<Vec<_>>())
            .collect();
        let mut in_order = Roster::new(genesis_by(&[1])).unwrap();
        for signed in &all {
            in_order.insert(signed.clone()).unwrap();
        }
        // Duplicates are in, since replicas share most; now any order.
        let mut keys = keys.into_iter().cycle();
        all.sort_by_cached_key(|_| keys.next());
        let mut shuffled = Roster::new(genesis_by(&[1])).unwrap();
        for (count, signed) in all.iter().enumerate() {
            shuffled.insert(signed.clone()).unwrap();
            if count % 16 == 0 {
                // Asking in between leaves no trace.
                let _ = shuffled.state();
            }
        }
        prop_assert_eq!(shuffled.waiting(), 0);
        prop_assert_eq!(shuffled.digest(), in_order.digest());
        prop_assert_eq!(shuffled.heads(), in_order.heads());
        prop_assert_eq!(shuffled.state(), in_order.state());
        prop_assert_eq!(shuffled.statements(), in_order.statements());
        prop_assert_eq!(shuffled.contradictions(), in_order.contradictions());
    }

    #[test]
    fn three_replicas_converge_in_whatever_way_they_exchange(
        steps in proptest::collection::vec(any_step(), 1..50),
        exchanges in proptest::collection::vec((0..3_usize, 0..3_usize, 200..4000_usize), 0..12),
    ) {
        let mut replicas: Vec<Roster> =
            play(&steps).into_iter().take(3).map(|r| r.roster).collect();
        let give = |replicas: &mut Vec<Roster>, from: usize, to: usize, bytes_max| {
            let part = replicas[from].statements_unknown_to(&replicas[to].heads(), bytes_max);
            for signed in part {
                replicas[to].insert(signed).unwrap();
            }
        };
        for (from, to, bytes_max) in exchanges {
            give(&mut replicas, from, to, bytes_max);
        }
        for (from, to) in [(0, 1), (1, 2), (2, 1), (1, 0), (2, 0)] {
            give(&mut replicas, from, to, usize::MAX);
        }
        for other in &replicas[1..] {
            prop_assert_eq!(other.digest(), replicas[0].digest());
            prop_assert_eq!(other.state(), replicas[0].state());
        }
    }

    #[test]
    fn every_state_keeps_its_own_rules(steps in proptest::collection::vec(any_step(), 1..60)) {
        let mut merged = Replica::new(1, Roster::new(genesis_by(&[1])).unwrap());
        for replica in play(&steps) {
            merged.pull(&replica.roster);
        }
        let state = merged.roster.state();
        let usernames: BTreeSet<_> = state.users.values().map(|u| &u.username).collect();
        prop_assert_eq!(usernames.len(), state.users.len());
        let node_names: BTreeSet<_> = state.nodes.values().map(|n| &n.name).collect();
        prop_assert_eq!(node_names.len(), state.nodes.len());
        for node in state.nodes.values() {
            prop_assert!(state.is_member_user(node.owner));
            prop_assert!(!node.claims.is_empty());
        }
        for invite in state.invites.values() {
            prop_assert!(invite.uses.is_none_or(|uses| invite.used <= uses));
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Statement::from_bytes(&bytes);
        let _ = Draft::from_bytes(bytes.clone());
        let _ = JoinClaim::from_bytes(&bytes);
        let _ = Genesis::from_bytes(&bytes);
        let mut roster = Roster::new(genesis_by(&[1])).unwrap();
        let signed = SignedBytes::sign(&user_key(1), Domain::Statement, bytes);
        prop_assert!(roster.insert(signed).is_err());
    }
}
