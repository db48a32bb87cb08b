//! What the codec read, judged: bytes as a spec that its owner signed, as a statement, as a
//! certificate, as a journal entry, as a message to a node, as a turn of reconciliation.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use p2pit_protocol::{
    BootId, Now, Peer, PeerId, StoreId, UserId,
    door::Hello,
    identity::{Domain, KeyPair, SignedBytes},
    job::{JobSpec, VerifiedSpec},
    message::{Message, Soft},
    peer::{Config, Slot},
    reconcile,
    record::Certificate,
    roster::{
        AdmitNode, Author, DeviceId, Draft, Founder, Genesis, JoinClaim, Kind, Name, SignedClaim,
        Statement,
    },
    sabotage::Sabotage,
    wire,
};

const NOW: Now = Now { boot_ms: 3_600_000, wall_ms: 1_700_000_000_000 };

fn user() -> KeyPair {
    KeyPair::from_seed(&[1; 32])
}

fn peer() -> Peer {
    let founder = Founder {
        user: UserId(user().public()),
        username: Name::new("user1").expect("a name"),
        full_name: None,
    };
    let genesis = Genesis {
        name: Name::new("lab").expect("a name"),
        founders: vec![founder],
        threshold: 1,
        created_wall_ms: NOW.wall_ms,
        nonce: [7; 16],
    };
    let mut peer = Peer::new(Config {
        key: KeyPair::from_seed(&[0x81; 32]),
        store: StoreId([1; 16]),
        boot: BootId([1; 16]),
        boot_count: 1,
        genesis: genesis.to_bytes().expect("a genesis"),
        client: false,
        seed: [0; 32],
        sabotage: Sabotage::default(),
    })
    .expect("a peer");
    peer.restored().expect("an empty journal");
    // A member, or nothing that it hears would go far.
    let (node, name) = (KeyPair::from_seed(&[0x81; 32]), Name::new("node1").expect("a name"));
    let claim = JoinClaim {
        pool: peer.pool(),
        user: UserId(user().public()),
        username: Name::new("user1").expect("a name"),
        full_name: None,
        node: peer.id(),
        node_name: name.clone(),
        client: false,
        wall_ms: NOW.wall_ms,
        nonce: [0; 16],
    };
    let by_user = JoinClaim::sign(claim.to_bytes(), &user()).expect("its user's claim");
    let claim = SignedClaim::countersign(by_user, &node).expect("its node's claim");
    let kind = Kind::AdmitNode(AdmitNode { claim, node_name: name });
    let author = Author::Node(peer.id());
    let draft = peer.roster().draft(author, DeviceId([1; 16]), kind, NOW.wall_ms).expect("a draft");
    peer.say(draft.sign(&node).expect("its author"), NOW).expect("a statement");
    peer.resume(&[], NOW);
    peer
}

fn drain(peer: &mut Peer) {
    while peer.poll_write().is_some() {}
    while peer.poll_transmit().is_some() {}
    while peer.poll_event().is_some() {}
}

thread_local! {
    /// Kept from input to input, and made anew now and then, so that it stays fast.
    static PEER: RefCell<(u32, Peer)> = RefCell::new((0, peer()));
}

fuzz_target!(|bytes: &[u8]| {
    let signed = |domain| SignedBytes::sign(&user(), domain, bytes.to_vec());
    if wire::decode::<JobSpec>(bytes).is_ok() {
        let _ = VerifiedSpec::verify(signed(Domain::JobSpec));
    }
    if let Ok(certificate) = wire::decode::<Certificate>(bytes) {
        let _ = certificate.value();
    }
    let _ = Statement::from_bytes(bytes);
    let _ = Draft::from_bytes(bytes.to_vec());
    let _ = JoinClaim::from_bytes(bytes);
    let _ = Genesis::from_bytes(bytes);
    let mut items = reconcile::Items::default();
    items.insert(Soft::head(signed(Domain::Head)));
    let _ = items.answer(reconcile::Sum::default(), bytes);
    let _ = items.compare(bytes);

    if let Some((key, value)) = bytes.split_at_checked(bytes.first().map_or(0, |n| *n as usize))
        && wire::decode::<Slot>(key).is_ok()
    {
        let mut fresh = peer();
        let _ = fresh.restore(key, value, NOW);
        let _ = fresh.restored();
        fresh.resume(&[], NOW);
        drain(&mut fresh);
    }
    PEER.with_borrow_mut(|(used, peer_now)| {
        *used += 1;
        if *used % 4_096 == 0 {
            *peer_now = peer();
        }
        let me = peer_now.id();
        // From itself, so that who is a member is not in the way.
        if let Ok(message) = wire::decode::<Message>(bytes) {
            peer_now.handle_message(me, message, NOW);
        }
        if let Ok(hello) = wire::decode::<Hello>(bytes) {
            let _ = peer_now.handle_door(PeerId(user().public()), hello, NOW);
        }
        peer_now.handle_user_request(&signed(Domain::UserRequest), NOW);
        peer_now.handle_timeout(NOW);
        drain(peer_now);
    });
});
