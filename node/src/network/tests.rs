//! Networks on loopback, several in one process.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener, UdpSocket},
    time::{Duration, Instant},
};

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use p2pit_protocol::{PeerId, PoolId, identity::KeyPair};
use tokio::{sync::mpsc, time::timeout};

use super::{
    Acceptance, EVENTS_MAX, Event, GOSSIP_BYTES_MAX, GossipId, Network, NetworkConfig, Punch,
    Relay, Route, Standing, behaviour::MESSAGE_TIMEOUT,
};
use crate::{daemon::bundle::BUNDLE_BYTES_MAX, transfer::stream};

#[tokio::test]
async fn members_connect_and_talk_both_ways() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    alice.network.send(bob.id, b"question".to_vec());
    assert_eq!(bob.message().await, (alice.id, b"question".to_vec()));
    bob.network.send(alice.id, b"answer".to_vec());
    assert_eq!(alice.message().await, (bob.id, b"answer".to_vec()));
    alice.network.send(bob.id, Vec::new());
    assert_eq!(bob.message().await, (alice.id, Vec::new()));
    let largest = vec![7; BUNDLE_BYTES_MAX];
    alice.network.send(bob.id, largest.clone());
    assert_eq!(bob.message().await, (alice.id, largest));
}

#[tokio::test]
async fn a_send_dials_by_itself_where_an_address_is_known() {
    let [alice, mut bob] = members([1, 2]).await;
    alice.network.dial(bob.id, bob.addrs(), Vec::new());
    // Not connected yet: they wait until it is.
    for _ in 0..10 {
        alice.network.send(bob.id, b"early".to_vec());
    }
    for _ in 0..10 {
        assert_eq!(bob.message().await.1, b"early");
    }
}

#[tokio::test]
async fn gossip_reaches_all_and_goes_on_only_when_it_was_accepted() {
    let [mut alice, mut bob, mut carol] = members([1, 2, 3]).await;
    // A line: what Carol gets, Bob has passed on.
    alice.connect(&mut bob).await;
    carol.connect(&mut bob).await;
    let id = loop {
        // Until the neighbours know what each other listens to, gossip is lost.
        alice.network.publish(format!("news {:?}", Instant::now()).into_bytes());
        if let Some((from, _, id)) = bob.gossip_within(Duration::from_millis(50)).await {
            assert_eq!(from, alice.id);
            break id;
        }
    };
    bob.network.report_gossip(id, Acceptance::Accept);
    let (from, bytes, _) = carol.gossip_within(PATIENCE).await.unwrap();
    assert_eq!(from, bob.id);
    assert_eq!(bytes[..4], *b"news");

    let kept = |n: usize| format!("kept {n}").into_bytes();
    for (n, judgement) in [Acceptance::Ignore, Acceptance::Reject].into_iter().enumerate() {
        alice.network.publish(kept(n));
        let id = bob.gossip_that_is(&kept(n)).await;
        bob.network.report_gossip(id, judgement);
    }
    alice.network.publish(b"last".to_vec());
    let id = bob.gossip_that_is(b"last").await;
    bob.network.report_gossip(id, Acceptance::Accept);
    let (_, bytes, _) = carol.gossip_within(PATIENCE).await.unwrap();
    assert_eq!(bytes, b"last", "what was not accepted went on");
    bob.network.publish(vec![0; GOSSIP_BYTES_MAX + 1]);
    bob.network.publish(b"after one too large".to_vec());
    carol.gossip_that_is(b"after one too large").await;
}

#[tokio::test]
async fn who_has_a_relay_is_reached_through_it_and_then_directly() {
    let [mut relay, mut alice, mut bob] = members([1, 2, 3]).await;
    relay.network.set_standing(Standing { public: relay.addrs(), relays: Vec::new() });
    alice.connect(&mut relay).await;
    bob.connect(&mut relay).await;
    let at = || vec![Relay { node: relay.id, addrs: relay.addrs() }];
    bob.network.set_standing(Standing { public: Vec::new(), relays: at() });
    let relays = loop {
        if let Event::Relays(relays) = bob.event().await {
            break relays;
        }
    };
    assert_eq!((relays, bob.network.relays()), (vec![relay.id], vec![relay.id]));

    alice.network.dial(bob.id, Vec::new(), at());
    let (who, route) = alice.route().await;
    assert_eq!((who, route), (bob.id, Route::Relayed(relay.id)));
    let (who, route) = bob.route().await;
    assert_eq!((who, route), (alice.id, Route::Relayed(relay.id)));
    alice.network.send(bob.id, vec![7; 300 << 10]);
    assert_eq!(bob.message().await, (alice.id, vec![7; 300 << 10]), "more than libp2p's default");

    let mut tunnels = bob.network.take_tunnels().unwrap();
    let mut there = alice.network.open_tunnel(bob.id).await.unwrap();
    there.stream.write_all(b"through").await.unwrap();
    there.stream.close().await.unwrap();
    let (from, mut here) = tunnels.next().await.unwrap();
    assert_eq!(from, alice.id);
    let mut read = Vec::new();
    here.stream.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"through");
    drop((here, there));

    // Nothing is in the way here: the hole that is punched opens, and the relay is left out.
    for (from, to) in [(&alice, &bob), (&bob, &alice)] {
        let begin = Instant::now();
        let is_direct = || matches!(from.network.route(to.id), Some(Route::Direct(_)));
        let is_punched = || from.network.punches().get(&to.id) == Some(&Punch::Open);
        while !(is_direct() && is_punched()) {
            assert!(begin.elapsed() < PATIENCE, "{:?}", from.network.punches());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    loop {
        // What is under way in the connection that goes is lost, and its sender told.
        bob.network.send(alice.id, b"directly".to_vec());
        if let Ok(got) = timeout(Duration::from_secs(1), alice.message()).await {
            break assert_eq!(got, (bob.id, b"directly".to_vec()));
        }
    }
}

#[tokio::test]
async fn a_tunnel_is_read_and_written_like_a_stream_of_the_data_plane() {
    let [mut alice, mut bob] = members([1, 2]).await;
    let nobody = alice.network.open_tunnel(bob.id).await.unwrap_err();
    assert_eq!(nobody.kind(), std::io::ErrorKind::NotConnected);
    alice.connect(&mut bob).await;
    let mut tunnels = bob.network.take_tunnels().unwrap();
    let opened = alice.network.open_tunnel(bob.id).await.unwrap();
    assert!(!opened.relayed);
    let (mut send, mut receive) = stream::tunnel(opened);
    let serving = async {
        let (from, tunnel) = tunnels.next().await.unwrap();
        assert_eq!(from, alice.id);
        let (mut send, mut receive) = stream::tunnel(tunnel);
        let asked = receive.read_to_end(3 << 20).await.unwrap();
        assert!(asked == vec![5; 3 << 20]);
        send.write_all(b"answer").await.unwrap();
        send.finish().unwrap();
        assert!(send.finish().is_err(), "it has ended");
        assert!(send.write_all(b"more").await.is_err());
        send.stopped().await;
    };
    let asking = async {
        send.write_all(&vec![5; 3 << 20]).await.unwrap();
        send.finish().unwrap();
        let some = receive.read_some(3).await.unwrap().unwrap();
        let rest = receive.read_to_end(100).await.unwrap();
        assert_eq!([&some[..], &rest[..]].concat(), b"answer");
        assert_eq!(receive.read_some(3).await.unwrap(), None);
    };
    timeout(PATIENCE, async { tokio::join!(serving, asking) }).await.expect("it hangs");

    // Longer than what is taken.
    let (mut send, _receive) = stream::tunnel(alice.network.open_tunnel(bob.id).await.unwrap());
    // A stream is heard of with its first bytes.
    send.write_all(b"four").await.unwrap();
    send.finish().unwrap();
    let (_, tunnel) = tunnels.next().await.unwrap();
    let (_send, mut receive) = stream::tunnel(tunnel);
    assert!(receive.read_to_end(3).await.is_err());
}

#[tokio::test]
async fn who_is_not_known_to_be_reachable_passes_on_for_nobody() {
    let [mut relay, mut bob] = members([1, 2]).await;
    bob.connect(&mut relay).await;
    let at = vec![Relay { node: relay.id, addrs: relay.addrs() }];
    bob.network.set_standing(Standing { public: Vec::new(), relays: at });
    // The same connection answers for longer than a reservation would take.
    for n in 0..20 {
        bob.network.send(relay.id, vec![n]);
        assert_eq!(relay.message().await.1, [n]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(bob.network.relays(), []);
}

#[tokio::test]
async fn a_stranger_is_refused_and_a_former_member_is_cut_off() {
    let [mut alice, mut bob] = members([1, 2]).await;
    let mut mallory = Node::start(9).await;
    mallory.network.set_members([alice.id, mallory.id].into());
    mallory.network.dial(alice.id, alice.addrs(), Vec::new());
    // The refusal comes after the handshake, so Mallory may think for a moment that she is
    // in.
    loop {
        match mallory.event().await {
            Event::Connected(..) => {}
            Event::Disconnected(_) | Event::DialFailed(..) => break,
            other => panic!("{other:?}"),
        }
    }
    mallory.network.send(alice.id, b"let me in".to_vec());
    mallory.undeliverable(alice.id).await;
    alice.network.dial(mallory.id, mallory.addrs(), Vec::new());
    let Event::DialFailed(peer, reason) = alice.event().await else { panic!("dialled a stranger") };
    assert_eq!((peer, reason.as_str()), (mallory.id, "not a member"));
    alice.network.send(mallory.id, b"psst".to_vec());
    alice.undeliverable(mallory.id).await;

    alice.connect(&mut bob).await;
    alice.network.set_members([alice.id].into());
    bob.disconnected(alice.id).await;
    alice.disconnected(bob.id).await;
    alice.network.send(bob.id, b"and yet".to_vec());
    alice.undeliverable(bob.id).await;
}

#[tokio::test]
async fn whoever_answers_as_somebody_else_is_not_the_peer() {
    let [mut alice, bob, carol] = members([1, 2, 3]).await;
    alice.network.dial(carol.id, bob.addrs(), Vec::new());
    let Event::DialFailed(peer, reason) = alice.event().await else {
        panic!("took the wrong peer")
    };
    assert_eq!(peer, carol.id);
    assert!(!reason.is_empty());
}

#[tokio::test]
async fn an_oversized_message_is_undeliverable_and_harms_nothing() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    alice.network.send(bob.id, vec![0; BUNDLE_BYTES_MAX + 1]);
    alice.undeliverable(bob.id).await;
    alice.network.send(bob.id, b"small".to_vec());
    assert_eq!(bob.message().await.1, b"small");
}

#[tokio::test]
async fn a_peer_that_is_gone_is_noticed_and_messages_to_it_are_undeliverable() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    let addrs = bob.addrs();
    bob.network.close().await;
    alice.disconnected(bob.id).await;
    alice.network.send(bob.id, b"hello?".to_vec());
    let before = Instant::now();
    let Event::DialFailed(peer, reason) = alice.event().await else { panic!("whom?") };
    assert_eq!(peer, bob.id);
    assert!(reason.contains(&format!("/ip4/127.0.0.1/tcp/{}", addrs[0].port())), "{reason}");
    alice.undeliverable(bob.id).await;
    assert!(before.elapsed() < MESSAGE_TIMEOUT + Duration::from_secs(2));
    let nobody = id(77);
    alice.network.set_members([bob.id, nobody].into());
    alice.network.send(nobody, b"where are you?".to_vec());
    let Event::DialFailed(_, reason) = alice.event().await else { panic!("whom?") };
    assert_eq!(reason, "no address is known");
    alice.undeliverable(nobody).await;
}

#[tokio::test]
async fn a_peer_that_restarts_on_its_port_is_connected_again() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    let addr = bob.addrs()[0];
    bob.network.close().await;
    drop(bob);
    alice.disconnected(id(2)).await;
    let mut bob = Node::start_at(2, addr).await;
    bob.network.set_members([alice.id, bob.id].into());
    assert_eq!(bob.addrs(), [addr]);
    alice.network.send(bob.id, b"back?".to_vec());
    assert_eq!(bob.message().await.1, b"back?");
}

#[tokio::test]
async fn a_second_start_of_a_peer_takes_the_place_of_the_first() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    // As after a crash: the old connection looks alive.
    let mut again = Node::start(2).await;
    again.network.set_members([alice.id].into());
    again.network.dial(alice.id, alice.addrs(), Vec::new());
    again.connected(alice.id).await;
    alice.disconnected(again.id).await;
    bob.disconnected(alice.id).await;
    let addr = alice.connected(again.id).await;
    assert_eq!(addr, again.addrs()[0]);
    for _ in 0..10 {
        alice.network.send(again.id, b"to the living".to_vec());
        assert_eq!(again.message().await.1, b"to the living");
    }
}

#[tokio::test]
async fn tcp_is_taken_where_udp_does_not_get_through() {
    let [mut alice, mut bob] = members([1, 2]).await;
    // Bob's TCP port, and a UDP port where nobody answers.
    let tcp = bob.addrs()[0];
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = relay.local_addr().unwrap();
    let silent = UdpSocket::bind(front).unwrap();
    relay.set_nonblocking(true).unwrap();
    let relay = tokio::net::TcpListener::from_std(relay).unwrap();
    let relaying = tokio::spawn(async move {
        let (mut inner, _) = relay.accept().await.unwrap();
        let mut outer = tokio::net::TcpStream::connect(tcp).await.unwrap();
        tokio::io::copy_bidirectional(&mut inner, &mut outer).await
    });
    alice.network.dial(bob.id, vec![front], Vec::new());
    assert_eq!(alice.connected(bob.id).await, front);
    bob.connected(alice.id).await;
    alice.network.send(bob.id, b"by TCP".to_vec());
    assert_eq!(bob.message().await.1, b"by TCP");
    relaying.abort();
    drop(silent);
}

#[tokio::test]
async fn one_port_serves_quic_and_tcp_and_a_taken_one_is_an_error() {
    let alice = Node::start(1).await;
    let [addr] = alice.addrs()[..] else { panic!("{:?}", alice.addrs()) };
    assert_ne!(addr.port(), 0);
    assert!(TcpListener::bind(addr).is_err());
    assert!(UdpSocket::bind(addr).is_err());
    let taken = Network::start(config(2, addr)).await.unwrap_err();
    assert!(format!("{taken:#}").contains(&addr.port().to_string()), "{taken:#}");
}

#[tokio::test]
async fn an_unspecified_address_is_shown_as_those_of_the_interfaces() {
    let [any_v4, any_v6] = ["0.0.0.0:0", "[::]:0"].map(|any| any.parse().unwrap());
    let node = Node::start_at(1, any_v4).await;
    let port = node.addrs()[0].port();
    let loopback_v4 = |port| SocketAddr::from(([127, 0, 0, 1], port));
    assert!(node.addrs().contains(&loopback_v4(port)));
    assert!(node.addrs().iter().all(|addr| addr.port() == port && !addr.ip().is_unspecified()));
    if let Err(reason) = UdpSocket::bind("[::1]:0") {
        return println!("skipped for IPv6: {reason}");
    }
    let node = Node::start_at(2, any_v6).await;
    let port = node.addrs()[0].port();
    assert!(node.addrs().contains(&loopback_v4(port)));
    assert!(node.addrs().contains(&format!("[::1]:{port}").parse().unwrap()));
    assert!(node.addrs().iter().all(|addr| addr.port() == port));
}

#[tokio::test]
async fn a_daemon_that_leaves_events_lying_makes_senders_wait_and_loses_nothing_acknowledged() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    // More than fits into Bob's queue, and less than Alice may have waiting.
    let count = EVENTS_MAX + 32;
    let message = |n: usize| u32::try_from(n).unwrap().to_be_bytes().to_vec();
    for n in 0..count {
        alice.network.send(bob.id, message(n));
    }
    let mut heard = BTreeSet::new();
    while heard.len() < count {
        heard.insert(bob.message().await.1);
    }
    assert_eq!(heard, (0..count).map(message).collect());
    // The last acknowledgements are followed by the answer.
    bob.network.send(alice.id, b"all".to_vec());
    assert_eq!(alice.message().await.1, b"all");
}

#[tokio::test]
async fn ending_the_last_handle_ends_the_network() {
    let [mut alice, mut bob] = members([1, 2]).await;
    alice.connect(&mut bob).await;
    let Node { network, mut events, id, .. } = bob;
    drop(network.clone());
    drop(network);
    alice.disconnected(id).await;
    while timeout(PATIENCE, events.recv()).await.unwrap().is_some() {}
}

/// How long a test waits for what is to happen in milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    id: PeerId,
    network: Network,
    events: mpsc::Receiver<Event>,
}

/// Nodes that know each other as members, and have no connection yet.
async fn members<const N: usize>(seeds: [u8; N]) -> [Node; N] {
    let nodes = futures::future::join_all(seeds.map(Node::start)).await;
    let ids: BTreeSet<PeerId> = seeds.map(id).into();
    for node in &nodes {
        node.network.set_members(ids.clone());
    }
    nodes.try_into().map_err(|_| "as many as seeds").unwrap()
}

fn id(seed: u8) -> PeerId {
    PeerId(KeyPair::from_seed(&[seed; 32]).public())
}

fn config(seed: u8, listen: SocketAddr) -> NetworkConfig {
    NetworkConfig { key: KeyPair::from_seed(&[seed; 32]), pool: PoolId([7; 32]), listen }
}

impl Node {
    async fn start(seed: u8) -> Self {
        Self::start_at(seed, "127.0.0.1:0".parse().unwrap()).await
    }

    /// A port of a network that has just ended may be busy for a moment.
    async fn start_at(seed: u8, listen: SocketAddr) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Network::start(config(seed, listen)).await {
                Ok((network, events)) => return Self { id: id(seed), network, events },
                Err(reason) if Instant::now() > deadline => panic!("{reason:#}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn addrs(&self) -> Vec<SocketAddr> {
        self.network.listen_addrs()
    }

    async fn connect(&mut self, other: &mut Self) {
        self.network.dial(other.id, other.addrs(), Vec::new());
        assert_eq!(self.connected(other.id).await, other.addrs()[0]);
        other.connected(self.id).await;
    }

    async fn event(&mut self) -> Event {
        timeout(PATIENCE, self.events.recv()).await.expect("nothing happens").expect("ended")
    }

    async fn connected(&mut self, peer: PeerId) -> SocketAddr {
        loop {
            if let Event::Connected(who, Route::Direct(addr)) = self.event().await
                && who == peer
            {
                return addr;
            }
        }
    }

    async fn route(&mut self) -> (PeerId, Route) {
        loop {
            if let Event::Connected(who, route) = self.event().await {
                return (who, route);
            }
        }
    }

    async fn disconnected(&mut self, peer: PeerId) {
        while !matches!(self.event().await, Event::Disconnected(who) if who == peer) {}
    }

    async fn undeliverable(&mut self, peer: PeerId) {
        while !matches!(self.event().await, Event::Undeliverable { to } if to == peer) {}
    }

    async fn message(&mut self) -> (PeerId, Vec<u8>) {
        loop {
            match self.event().await {
                Event::Message { from, bytes } => return (from, bytes.to_vec()),
                Event::Undeliverable { to } => panic!("a message to {to} was lost"),
                _ => {}
            }
        }
    }

    async fn gossip_within(&mut self, patience: Duration) -> Option<(PeerId, Vec<u8>, GossipId)> {
        let waiting = async {
            loop {
                if let Event::Gossip { from, bytes, id } = self.events.recv().await.unwrap() {
                    return (from, bytes.to_vec(), id);
                }
            }
        };
        timeout(patience, waiting).await.ok()
    }

    async fn gossip_that_is(&mut self, expected: &[u8]) -> GossipId {
        loop {
            let (_, bytes, id) = self.gossip_within(PATIENCE).await.expect("no such gossip");
            if bytes == expected {
                return id;
            }
        }
    }
}
