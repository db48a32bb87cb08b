//! A journal that is damaged: the node goes on as another store of the same node.

use std::path::Path;

use anyhow::Context as _;
use p2pit_protocol::{
    PeerId,
    identity::SignedBytes,
    peer::Slot,
    roster::{Roster, Statement},
    wire,
};
use tracing::{debug, warn};

use crate::{
    home::{Home, KeyKind, load_or_create_key},
    journal::{Entries, Journal, OpenError, Recovered},
};

/// Opens the journal of `home`. Where it is damaged, a new store is begun with what of the
/// old one proves itself, which is this node's membership; a note says so. Another does at
/// every start for as long as the membership is lost.
///
/// # Errors
/// As of [`Journal::open`], and where nothing new can be begun.
pub(super) fn open_journal(home: &Home) -> anyhow::Result<(Journal, Recovered)> {
    let directory = home.journal();
    let (journal, mut recovered) = match Journal::open(&directory) {
        Err(damage @ OpenError::Damaged { .. }) => begin(home, &directory, &damage)?,
        opened => opened?,
    };
    if home.is_member() && !recovered.entries.contains_key(&Slot::Genesis.to_bytes()) {
        recovered.notes.push(
            "of the pool's roster too little could be read: join again with a ticket, which \
             `p2pit invite` makes at any other node"
                .to_owned(),
        );
    }
    Ok((journal, recovered))
}

fn begin(
    home: &Home,
    directory: &Path,
    damage: &OpenError,
) -> anyhow::Result<(Journal, Recovered)> {
    warn!(%damage, "the node goes on as another store");
    let (key, _) = load_or_create_key(&home.node_key(), KeyKind::Node)?;
    let me = PeerId(key.public());
    Ok(Journal::reset_as_new_store(directory, |entries| membership(&entries, me))?)
}

/// Begins a new store in place of one that must not be used any more, and says what to do.
///
/// # Errors
/// Where no new one can be begun.
pub(super) fn give_up(home: &Home, reason: &anyhow::Error) -> anyhow::Result<anyhow::Error> {
    let directory = home.journal();
    let (key, _) = load_or_create_key(&home.node_key(), KeyKind::Node)?;
    let me = PeerId(key.public());
    let (_, recovered) =
        Journal::reset_as_new_store(&directory, |entries| membership(&entries, me)).with_context(
            || {
                format!(
                    "{reason:#}; move {} away before the node is started again",
                    directory.display()
                )
            },
        )?;
    let aside = recovered.notes.join("; ");
    Ok(anyhow::anyhow!(
        "the journal {} must not be used any more: {reason:#}. It is kept aside, and the node \
         begins anew as another store when it is started again, as by `p2pit join --detach`; the \
         records it kept are with their other keepers ({aside})",
        directory.display()
    ))
}

/// The genesis and the statements that follow from it and are signed as they must be, if
/// they say that this node is a member. What is missing comes from the other members.
fn membership(entries: &Entries, me: PeerId) -> Entries {
    let mut kept = Entries::new();
    let genesis_key = Slot::Genesis.to_bytes();
    let Some(genesis) = entries.get(&genesis_key) else { return kept };
    let Ok(mut roster) = Roster::new(genesis.clone()) else { return kept };
    for (key, value) in entries {
        if !matches!(wire::decode(key), Ok(Slot::Statement(_))) {
            continue;
        }
        match wire::decode::<SignedBytes>(value).map(|signed| roster.insert(signed)) {
            Ok(Ok(_)) => {}
            Ok(Err(reason)) => debug!(%reason, "a statement of the damaged journal"),
            Err(reason) => debug!(%reason, "an entry of the damaged journal"),
        }
    }
    if !roster.state().is_member_node(me) {
        return kept;
    }
    kept.insert(genesis_key, genesis.clone());
    for signed in roster.statements() {
        kept.insert(Slot::Statement(Statement::id(signed)).to_bytes(), wire::encode(signed));
    }
    kept
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::{
        UserId,
        identity::KeyPair,
        roster::{
            AdmitNode, Author, DeviceId, Founder, Genesis, JoinClaim, Kind, Name, SignedClaim,
        },
    };

    use super::*;

    fn journal_of(node: &KeyPair) -> Entries {
        let user = KeyPair::from_seed(&[1; 32]);
        let name = |text: &str| Name::new(text).unwrap();
        let founder =
            Founder { user: UserId(user.public()), username: name("anna"), full_name: None };
        let genesis = Genesis {
            name: name("lab"),
            founders: vec![founder],
            threshold: 1,
            created_wall_ms: 5,
            nonce: [3; 16],
        };
        let mut roster = Roster::new(genesis.to_bytes().unwrap()).unwrap();
        let claim = JoinClaim {
            pool: roster.pool(),
            user: UserId(user.public()),
            username: name("anna"),
            full_name: None,
            node: PeerId(node.public()),
            node_name: name("n1"),
            client: false,
            wall_ms: 5,
            nonce: [4; 16],
        };
        let claim = JoinClaim::sign(claim.to_bytes(), &user).unwrap();
        let claim = SignedClaim::countersign(claim, node).unwrap();
        let kind = Kind::AdmitNode(AdmitNode { claim, node_name: name("n1") });
        let author = Author::Node(PeerId(node.public()));
        let draft = roster.draft(author, DeviceId([7; 16]), kind, 5).unwrap();
        roster.insert(draft.sign(node).unwrap()).unwrap();
        let mut entries = Entries::new();
        entries.insert(Slot::Genesis.to_bytes(), roster.genesis_bytes().to_vec());
        for signed in roster.statements() {
            let key = Slot::Statement(Statement::id(signed)).to_bytes();
            entries.insert(key, wire::encode(signed));
        }
        assert_eq!(entries.len(), 2);
        entries
    }

    #[test]
    fn of_a_damaged_journal_the_membership_is_kept_and_no_promise() {
        let node = KeyPair::from_seed(&[2; 32]);
        let whole = journal_of(&node);
        let mut found = whole.clone();
        found.insert(Slot::Record(p2pit_protocol::JobId([9; 32])).to_bytes(), b"promised".to_vec());
        found.insert(b"\xff no key of ours".to_vec(), Vec::new());
        assert_eq!(membership(&found, PeerId(node.public())), whole);
    }

    #[test]
    fn nothing_is_kept_where_the_rest_does_not_say_that_this_node_is_a_member() {
        let node = KeyPair::from_seed(&[2; 32]);
        let me = PeerId(node.public());
        let whole = journal_of(&node);
        let other = PeerId(KeyPair::from_seed(&[3; 32]).public());
        assert_eq!(membership(&whole, other), Entries::new());
        for key in whole.keys() {
            let mut less = whole.clone();
            less.remove(key);
            assert_eq!(membership(&less, me), Entries::new());
            let mut changed = whole.clone();
            *changed.get_mut(key).unwrap().last_mut().unwrap() ^= 1;
            assert_eq!(membership(&changed, me), Entries::new());
        }
    }
}
