//! Founding a pool, and joining one through the door of a member.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, bail};
use p2pit_protocol::{
    PeerId,
    door::{self, Hello, InviteUse, JoinRequest, Purpose, Reply},
    identity::SignedBytes,
    peer::Slot,
    roster::{AdmitNode, Author, DeviceId, Kind, Name, Roster, SignedClaim, Ticket},
    wire,
};
use tracing::info;

use super::{Shared, clock, reach};
use crate::journal::Write;

/// Where a node was looked for, as its ticket says it.
fn place(addrs: &[SocketAddr]) -> String {
    addrs.first().map_or_else(|| "nowhere".to_owned(), ToString::to_string)
}

impl Shared {
    /// Found a pool from a genesis its founder made; this node is its first.
    pub(crate) async fn found(
        self: &Arc<Self>,
        genesis: Vec<u8>,
        claim: SignedBytes,
        node_name: &str,
    ) -> anyhow::Result<()> {
        let mut roster = Roster::new(genesis).context("the genesis is not in order")?;
        let claim = SignedClaim::countersign(claim, &self.key)
            .context("the founder's claim is not in order")?;
        let node_name = Name::new(node_name).context("no name for a node")?;
        let kind = Kind::AdmitNode(AdmitNode { claim, node_name });
        let me = self.id();
        let draft = roster
            .draft(Author::Node(me), self.device(), kind, clock::now().wall_ms)
            .context("this node cannot be admitted")?;
        let signed = draft.sign(&self.key).context("this node cannot be admitted")?;
        roster.insert(signed).context("this node cannot be admitted")?;
        self.take_membership(&roster).await
    }

    /// Join the pool of a ticket through any of its doors.
    pub(crate) async fn join(
        self: &Arc<Self>,
        ticket: &str,
        claim: SignedBytes,
        peers: &[SocketAddr],
    ) -> anyhow::Result<()> {
        let ticket: Ticket = ticket.parse()?;
        let claim = SignedClaim::countersign(claim, &self.key)
            .context("the joiner's claim is not in order")?;
        let proof = ticket.prove(claim.id());
        let invite = Some(InviteUse { invite: ticket.invite, proof });
        let hello = Hello {
            versions: reach::versions(),
            pool: ticket.pool,
            store: self.store_id,
            boot: self.boot,
            wall_ms: clock::now().wall_ms,
            purpose: Purpose::Join(JoinRequest { claim, invite }),
        };
        let mut doors: Vec<(PeerId, Vec<SocketAddr>)> = Vec::new();
        for door in &ticket.doors {
            match doors.iter_mut().find(|(peer, _)| *peer == door.peer) {
                Some((_, addrs)) => addrs.push(door.addr),
                None => doors.push((door.peer, [&[door.addr], peers].concat())),
            }
        }
        let mut failures = Vec::new();
        for (peer, addrs) in doors {
            match reach::knock(self, peer, &addrs, &hello).await {
                Ok(Reply::Welcome(welcome)) => {
                    let welcomed = door::welcome(ticket.pool, welcome)
                        .context("the door's welcome is not in order")?;
                    info!(name = %welcomed.node_name, "welcome");
                    let roster = self.complete(welcomed, peer, &addrs).await?;
                    self.take_membership(&roster).await?;
                    self.remember_door(peer, &addrs);
                    return Ok(());
                }
                Ok(Reply::Refused(refusal)) => bail!(reach::ShutOut(refusal)),
                Ok(Reply::Reconciled(_)) => {
                    failures.push(format!("{} misunderstood", place(&addrs)))
                }
                Err(reason) => failures.push(format!("{}: {reason:#}", place(&addrs))),
            }
        }
        if failures.is_empty() {
            bail!("the ticket names no node to join by: `p2pit invite` makes one that does");
        }
        bail!(
            "no node of the ticket answers ({}): is one of its machines on, and can UDP reach it \
             from here?",
            failures.join("; ")
        )
    }

    /// The home's id for statements made in it.
    pub(crate) fn device(&self) -> DeviceId {
        DeviceId(self.store_id.0)
    }

    /// Fetch what a large pool's welcome had no room for.
    async fn complete(
        self: &Arc<Self>,
        welcomed: door::Welcomed,
        peer: PeerId,
        addrs: &[SocketAddr],
    ) -> anyhow::Result<Roster> {
        let mut roster = welcomed.roster;
        let mut complete = welcomed.complete;
        for _ in 0..reach::ROUNDS_MAX {
            if complete {
                break;
            }
            complete = reach::reconcile_roster(self, &mut roster, peer, addrs).await?;
        }
        if !roster.state().is_member_node(self.id()) {
            bail!("the door said welcome, but its roster does not name this node");
        }
        Ok(roster)
    }

    async fn take_membership(self: &Arc<Self>, roster: &Roster) -> anyhow::Result<()> {
        let now = clock::now();
        let genesis = roster.genesis_bytes().to_vec();
        let mut writes =
            vec![Write { key: Slot::Genesis.to_bytes(), value: Some(genesis.clone()) }];
        let mut peer = self.new_peer(genesis)?;
        for signed in roster.statements() {
            let id = p2pit_protocol::roster::Statement::id(signed);
            let (key, value) = (Slot::Statement(id).to_bytes(), wire::encode(signed));
            peer.restore(&key, &value, now).map_err(anyhow::Error::msg)?;
            writes.push(Write { key, value: Some(value) });
        }
        peer.restored().map_err(anyhow::Error::msg)?;
        self.become_member(peer, &[], writes).await
    }

    fn remember_door(&self, peer: PeerId, addrs: &[SocketAddr]) {
        let entry = crate::store::PeerEntry {
            control: Vec::new(),
            data: addrs.to_vec(),
            last_seen_wall_ms: clock::now().wall_ms,
        };
        self.addresses.put(peer, entry, None);
    }
}
