//! Pools for models: person and machine of each number, all of them founders.

use p2pit_protocol::{
    identity::SignedBytes,
    roster::{AdmitNode, Author, Founder, Genesis, JoinClaim, Kind, Roster, SignedClaim},
};

use crate::cast::{WALL_MS, device, name, node, node_key, signed_claim, user, user_key};

/// Persons 1 to `founders`, each an admin; the first `machines` of them with a machine.
pub(crate) fn pool_of(founders: u8, machines: u8) -> Roster {
    let founder =
        |n: u8| Founder { user: user(n), username: name(&format!("user{n}")), full_name: None };
    let genesis = Genesis {
        name: name("lab"),
        founders: (1..=founders).map(founder).collect(),
        threshold: 1,
        created_wall_ms: WALL_MS,
        nonce: [7; 16],
    };
    let mut roster = Roster::new(genesis.to_bytes().unwrap()).unwrap();
    for n in 1..=machines {
        let kind = admission(&roster, n);
        say(&mut roster, Author::Node(node(n)), n, kind).unwrap();
    }
    roster
}

/// Machine `n` lets itself in, by the claim of person `n`.
pub(crate) fn admission(roster: &Roster, n: u8) -> Kind {
    Kind::AdmitNode(AdmitNode { claim: claim(roster, n), node_name: name(&format!("node{n}")) })
}

pub(crate) fn claim(roster: &Roster, n: u8) -> SignedClaim {
    let claim = JoinClaim {
        pool: roster.pool(),
        user: user(n),
        username: name(&format!("user{n}")),
        full_name: None,
        node: node(n),
        node_name: name(&format!("node{n}")),
        client: false,
        wall_ms: WALL_MS,
        nonce: [0; 16],
    };
    signed_claim(n, &claim)
}

/// Say something at this replica, if its roster lets the author.
pub(crate) fn say(roster: &mut Roster, author: Author, n: u8, kind: Kind) -> Option<SignedBytes> {
    let draft = roster.draft(author, device(n), kind, WALL_MS).ok()?;
    let key = if matches!(author, Author::User(_)) { user_key(n) } else { node_key(n) };
    let signed = draft.sign(&key).unwrap();
    roster.insert_drafted(signed.clone()).unwrap();
    Some(signed)
}
