//! Tickets: an invite that an admin signs, with the addresses of nodes to join by.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{DraftReply, DraftRequest, Me, NodeInfo, path},
    home::{Home, write_atomic},
};
use p2pit_protocol::{
    identity::KeyPair,
    message::Reach,
    roster::{DOORS_MAX, Door, Draft, Invite, Kind, Name, Rights, Statement, Ticket},
};

use crate::{
    client::Client,
    identity::{Identity, random},
    problem::Problem,
    session::pool_of,
};

/// What `join` prints a ticket for, and keeps it.
pub(crate) const DEFAULT_VALID_MS: u64 = 7 * 24 * 3600 * 1000;
/// A kept ticket with less than this left is replaced.
const REUSE_LEFT_MS: u64 = 24 * 3600 * 1000;
/// Of one node, so that others have room in a ticket.
const OWN_DOORS_MAX: usize = 4;
const OWN_DOORS_BEHIND_MAX: usize = 2;

/// What an invite allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) valid_ms: u64,
    pub(crate) uses: Option<u32>,
    pub(crate) rights: Rights,
}

/// A new invite, as a ticket.
pub(crate) async fn issue(
    client: &Client,
    identity: &Identity,
    me: &Me,
    terms: Terms,
) -> anyhow::Result<Ticket> {
    let pool = pool_of(me)?;
    let name = me.pool.as_ref().map(|pool| pool.name.as_str()).unwrap_or_default();
    let invite_key = KeyPair::from_seed(&random()?);
    let expires_wall_ms = me.wall_ms.saturating_add(terms.valid_ms);
    let invite = Invite {
        key: invite_key.public(),
        rights: terms.rights,
        uses: terms.uses,
        expires_wall_ms,
    };
    let nodes: Vec<NodeInfo> = client.get(path::NODES).await?;
    let invite = state(client, identity, Kind::Invite(invite)).await?;
    Ok(Ticket {
        pool,
        pool_name: Name::new(name).context("the pool's name is none")?,
        invite,
        invite_seed: invite_key.seed(),
        doors: doors(me, &nodes),
        expires_wall_ms,
    })
}

/// The ticket that was made in this home before, with the addresses of today; a new one
/// where it ends soon. So starting a node again and again does not fill the roster.
pub(crate) async fn reuse_or_issue(
    client: &Client,
    identity: &Identity,
    home: &Home,
    me: &Me,
) -> anyhow::Result<Ticket> {
    let file = file_of(home);
    let kept = std::fs::read_to_string(&file).ok().and_then(|text| text.parse::<Ticket>().ok());
    let is_good = |ticket: &Ticket| {
        Some(ticket.pool) == me.pool.as_ref().map(|pool| pool.id)
            && ticket.expires_wall_ms > me.wall_ms.saturating_add(REUSE_LEFT_MS)
    };
    if let Some(mut ticket) = kept.filter(is_good) {
        let nodes: Vec<NodeInfo> = client.get(path::NODES).await?;
        ticket.doors = doors(me, &nodes);
        return Ok(ticket);
    }
    let terms = Terms { valid_ms: DEFAULT_VALID_MS, uses: None, rights: Rights::User };
    let ticket = issue(client, identity, me, terms).await?;
    write_atomic(&file, ticket.to_word().as_bytes())
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(ticket)
}

pub(crate) fn file_of(home: &Home) -> PathBuf {
    home.path().join("ticket")
}

/// Says something about the pool as the user: drafted by the daemon, checked and signed
/// here.
pub(crate) async fn state(
    client: &Client,
    identity: &Identity,
    kind: Kind,
) -> anyhow::Result<p2pit_protocol::StatementId> {
    let request = DraftRequest { user: identity.user(), kind: kind.clone() };
    let reply: DraftReply = client.post(path::DRAFT, &request).await?;
    let draft = Draft::from_bytes(reply.draft).context("the daemon's draft is not in order")?;
    if !says(&draft.statement().kind, &kind) {
        return Err(Problem::broken("the daemon drafted another statement than asked for").into());
    }
    let signed = draft.sign(identity.key()).context("the daemon's draft is not for you")?;
    let _: serde_json::Value = client.post(path::STATEMENTS, &signed).await?;
    Ok(Statement::id(&signed))
}

/// Whether a draft says what was asked for. Which claims a leave ends is for the daemon to
/// look up.
fn says(drafted: &Kind, asked: &Kind) -> bool {
    match (drafted, asked) {
        (Kind::Leave(drafted), Kind::Leave(asked)) => {
            drafted.node == asked.node
                && (asked.claims.is_empty() || drafted.claims == asked.claims)
        }
        (drafted, asked) => drafted == asked,
    }
}

/// Where a newcomer may knock: here, unless this node comes and goes, and at the other
/// nodes; addresses that lead here from other machines before those that do not.
fn doors(me: &Me, nodes: &[NodeInfo]) -> Vec<Door> {
    let comes_and_goes = me.client || me.capacity.cpu_cores == 0;
    let others = nodes.iter().filter(|node| node.node != me.node && !node.client);
    let rank = |node: &&NodeInfo| node.reach != "online";
    let (away, online): (Vec<&NodeInfo>, Vec<&NodeInfo>) = others.partition(rank);
    let own = of_node(me.node, &me.data, OWN_DOORS_MAX);
    let of_others = |nodes: Vec<&NodeInfo>| -> Vec<Door> {
        nodes.into_iter().flat_map(|node| of_node(node.node, &node.data, 1)).collect()
    };
    // Whoever everybody can dial is found from anywhere.
    let (mut online, mut away) = (online, away);
    for nodes in [&mut online, &mut away] {
        nodes.sort_by_key(|node| match node.dialled {
            Reach::Open => 0,
            Reach::Unknown => 1,
            Reach::Behind => 2,
        });
    }
    let (online, away) = (of_others(online), of_others(away));
    // Behind a NAT only neighbours find this node: few doors, behind those that all find.
    let (neighbours, own) = match me.dialled {
        Reach::Behind => (own.into_iter().take(OWN_DOORS_BEHIND_MAX).collect(), Vec::new()),
        Reach::Open | Reach::Unknown => (Vec::new(), own),
    };
    let room = DOORS_MAX - neighbours.len();
    let order = if comes_and_goes { [online, own, away] } else { [own, online, away] };
    let mut seen = BTreeSet::new();
    let doors = order.concat().into_iter().filter(|door| seen.insert(*door)).take(room);
    doors.chain(neighbours).collect()
}

fn of_node(peer: p2pit_protocol::PeerId, addrs: &[SocketAddr], max: usize) -> Vec<Door> {
    let usable = |addr: &&SocketAddr| {
        let is_link_local = match addr {
            SocketAddr::V4(v4) => v4.ip().is_link_local(),
            SocketAddr::V6(v6) => v6.ip().is_unicast_link_local(),
        };
        addr.port() != 0 && !addr.ip().is_unspecified() && !is_link_local
    };
    let mut addrs: Vec<SocketAddr> = addrs.iter().filter(usable).copied().collect();
    addrs.sort_by_key(|addr| (addr.ip().is_loopback(), addr.is_ipv6()));
    addrs.into_iter().take(max).map(|addr| Door { peer, addr }).collect()
}

#[cfg(test)]
mod tests {
    use p2pit_node::api::types::{Journalled, Space};
    use p2pit_protocol::{
        StoreId, UserId, identity::PublicKey, inventory::Capacity, roster::DeviceId, roster::Leave,
    };

    use super::*;
    use crate::view::samples::peer;

    fn me(cpu_cores: u32) -> Me {
        Me {
            version: String::new(),
            pid: 1,
            home: String::new(),
            node: peer(1),
            store: StoreId([0; 16]),
            device: DeviceId([0; 16]),
            name: "n1".to_owned(),
            owner: None,
            client: false,
            pool: None,
            control: Vec::new(),
            data: addrs(&[
                "127.0.0.1:1",
                "[fe80::1]:1",
                "[2001:db8::1]:1",
                "10.0.0.1:1",
                "0.0.0.0:1",
            ]),
            dialled: Reach::Unknown,
            connected: 0,
            capacity: Capacity::new(Vec::new(), cpu_cores, 0),
            owner_only: None,
            isolation: String::new(),
            working_for: Vec::new(),
            locked_gpus: Vec::new(),
            wall_ms: 0,
            journal: Journalled { entries: 0, fsyncs: 0 },
            space: Space::default(),
            warnings: Vec::new(),
        }
    }

    fn node(n: u8, reach: &str, client: bool) -> NodeInfo {
        NodeInfo {
            node: peer(n),
            name: format!("n{n}"),
            owner: UserId(PublicKey([0; 32])),
            owner_name: String::new(),
            client,
            away: false,
            reach: reach.to_owned(),
            advert_age_s: None,
            capacity: Capacity::default(),
            not_free: Vec::new(),
            free_cpu_cores: 0,
            free_ram_mib: 0,
            owner_only: None,
            full: false,
            control: Vec::new(),
            data: addrs(&[&format!("127.0.0.1:{n}"), &format!("10.0.0.{n}:{n}")]),
            dialled: Reach::Unknown,
            relays: Vec::new(),
        }
    }

    fn addrs(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn order(me: &Me, nodes: &[NodeInfo]) -> Vec<String> {
        doors(me, nodes).iter().map(|door| door.addr.to_string()).collect()
    }

    #[test]
    fn behind_a_nat_the_doors_of_others_come_first_and_those_that_all_find_before_them() {
        let mut me = me(4);
        let mut nodes = [node(2, "online", false), node(3, "online", false)];
        nodes[0].dialled = Reach::Behind;
        nodes[1].dialled = Reach::Open;
        me.dialled = Reach::Behind;
        let expected = ["10.0.0.3:3", "10.0.0.2:2", "10.0.0.1:1", "[2001:db8::1]:1"];
        assert_eq!(order(&me, &nodes), expected);
        me.dialled = Reach::Open;
        assert_eq!(order(&me, &nodes)[..2], ["10.0.0.1:1", "[2001:db8::1]:1"]);
    }

    #[test]
    fn doors_that_lead_here_from_elsewhere_come_first() {
        let nodes = [
            node(1, "self", false),
            node(2, "offline", false),
            node(3, "online", false),
            node(4, "online", true),
        ];
        let expected = ["10.0.0.1:1", "[2001:db8::1]:1", "127.0.0.1:1", "10.0.0.3:3", "10.0.0.2:2"];
        assert_eq!(order(&me(4), &nodes), expected);
        assert_eq!(order(&me(0), &nodes)[0], "10.0.0.3:3", "a client node is a poor door");
        let many: Vec<NodeInfo> = (2..40).map(|n| node(n, "online", false)).collect();
        assert_eq!(order(&me(4), &many).len(), DOORS_MAX);
    }

    #[test]
    fn a_draft_that_says_something_else_is_not_signed() {
        let leave = |n, claims| Kind::Leave(Leave { node: peer(n), claims });
        let claim = p2pit_protocol::roster::ClaimId([1; 32]);
        assert!(says(&leave(1, vec![claim]), &leave(1, vec![])));
        assert!(!says(&leave(2, vec![claim]), &leave(1, vec![])));
        let invite = |rights| {
            let key = PublicKey([0; 32]);
            Kind::Invite(Invite { key, rights, uses: None, expires_wall_ms: 1 })
        };
        assert!(!says(&invite(Rights::Admin), &invite(Rights::User)));
        assert!(says(&invite(Rights::User), &invite(Rights::User)));
    }
}
