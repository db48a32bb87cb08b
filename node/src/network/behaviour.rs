//! The swarm's protocols, each with its bounds.

use std::{num::NonZeroU32, time::Duration};

use anyhow::anyhow;
use libp2p::{
    StreamProtocol, Swarm, SwarmBuilder, dcutr, gossipsub, identify,
    identity::Keypair,
    noise, ping, relay,
    request_response::{self, ProtocolSupport},
    swarm::NetworkBehaviour,
    tcp, yamux,
};
use libp2p_allow_block_list::{self as allow_list, AllowedPeers};
use libp2p_connection_limits::{self as limits, ConnectionLimits};
use p2pit_protocol::PoolId;

use super::{
    Budget, GOSSIP_BYTES_MAX, SMALL_BYTES_MAX,
    codec::{self, MessageCodec},
    seen,
};

/// Handshakes in progress, each way. Strangers take part in these.
const PENDING_MAX: u32 = 128;
/// Connections in all: what is above [`super::driver::CONNECTED_WANTED`] is let go of
/// when it is idle, and this holds while it is not.
const CONNECTIONS_MAX: u32 = 256;
/// Of these, others may open at most so many: a node can always reach out itself.
const CONNECTIONS_INCOMING_MAX: u32 = 192;
/// Two where both sides dialled at once, and as many that have not noticed yet that
/// their peer was restarted.
const CONNECTIONS_PER_PEER_MAX: u32 = 4;
/// Messages in flight on a connection, both ways together.
const MESSAGES_PER_CONNECTION_MAX: usize = 2 * super::driver::IN_FLIGHT_MAX;
/// Streams that a peer may have open in one connection.
const STREAMS_MAX: u32 = 256;
/// Of one connection: bytes that arrived and have not been read, on one stream and in
/// all.
const WINDOW_BYTES: (u32, u32) = (1 << 20, 4 << 20);

/// From sending a message to its acknowledgement.
pub(super) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// An address that answers does so by then.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// The same for an address by TCP: two more handshakes.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that is there answers in time even when it is busy; two keep-alives are missed.
const QUIC_IDLE_TIMEOUT: Duration = Duration::from_secs(20);
const QUIC_KEEP_ALIVE: Duration = Duration::from_secs(8);
/// Notices dead TCP connections.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// What identify tells members, and nobody else.
const PROTOCOL_VERSION: &str = "p2pit/1";
const GOSSIP_PROTOCOL: &str = "/p2pit/gossip/1";
/// The requests of the data plane where its own packets do not come through.
pub(super) const TUNNEL_PROTOCOL: StreamProtocol = StreamProtocol::new("/p2pit/tunnel/1");

/// Members that this node passes on for, if it is reachable; each takes one reservation.
const RESERVATIONS_MAX: usize = 512;
/// Pairs of members that talk through this node. Each costs it two streams and their buffers.
const CIRCUITS_MAX: usize = 1_024;
/// Of one member: some more than the connections it strives for.
const CIRCUITS_PER_PEER_MAX: usize = 96;
/// A reservation is renewed by itself well before that.
const RESERVATION: Duration = Duration::from_secs(60 * 60);
/// After either a circuit is cut, and made anew by whoever needs it. The defaults of libp2p,
/// 2 minutes and 128 KiB, are for strangers; these are members. What is large is slowed down
/// where it is sent: see `transfer::stream`.
const CIRCUIT: (Duration, u64) = (Duration::from_secs(7 * 24 * 60 * 60), 8 << 30);
/// Requests of one member: so many at once, and one more each such time.
const RESERVATION_RATE: (u32, Duration) = (30, Duration::from_secs(10));
const CIRCUIT_RATE: (u32, Duration) = (128, Duration::from_secs(1));

/// In the order in which they may deny a connection: strangers first.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) allowed: allow_list::Behaviour<AllowedPeers>,
    limits: limits::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(super) gossip: gossipsub::Behaviour<gossipsub::IdentityTransform, OneTopic>,
    pub(super) messages: request_response::Behaviour<MessageCodec>,
    /// Passes on for members that cannot be dialled.
    pub(super) relay: relay::Behaviour,
    /// Has others pass on for this node, and reaches those that have it so.
    relayed: relay::client::Behaviour,
    /// Both sides dial at once, so that their NATs let them through.
    pub(super) punch: dcutr::Behaviour,
    pub(super) seen: seen::Behaviour,
    pub(super) streams: libp2p_stream::Behaviour,
}

/// Peers cannot make us keep other topics.
type OneTopic = gossipsub::WhitelistSubscriptionFilter;

pub(super) fn topic(pool: PoolId) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(format!("p2pit/1/{pool}"))
}

/// Must be called within a runtime.
pub(super) fn swarm(
    identity: Keypair,
    pool: PoolId,
    agent: String,
    inbound: Budget,
) -> anyhow::Result<Swarm<Behaviour>> {
    let identify = identify(&identity, agent);
    let gossip = gossip(pool)?;
    let me = identity.public().to_peer_id();
    let behaviour = |relayed| Behaviour {
        allowed: allow_list::Behaviour::default(),
        limits: limits::Behaviour::new(connection_limits()),
        identify,
        ping: ping::Behaviour::new(
            ping::Config::new().with_interval(PING_EVERY).with_timeout(PING_TIMEOUT),
        ),
        gossip,
        messages: request_response::Behaviour::with_codec(
            MessageCodec { inbound },
            [(codec::PROTOCOL, ProtocolSupport::Full)],
            request_response::Config::default()
                .with_request_timeout(MESSAGE_TIMEOUT)
                .with_max_concurrent_streams(MESSAGES_PER_CONNECTION_MAX),
        ),
        relay: relay(me),
        relayed,
        punch: dcutr::Behaviour::new(me),
        seen: seen::Behaviour::default(),
        streams: libp2p_stream::Behaviour::new(),
    };
    let swarm = SwarmBuilder::with_existing_identity(identity)
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux_config)?
        .with_quic_config(|mut quic| {
            quic.handshake_timeout = HANDSHAKE_TIMEOUT;
            quic.max_idle_timeout = millis(QUIC_IDLE_TIMEOUT);
            quic.keep_alive_interval = QUIC_KEEP_ALIVE;
            quic.max_concurrent_stream_limit = STREAMS_MAX;
            (quic.max_stream_data, quic.max_connection_data) = WINDOW_BYTES;
            quic
        })
        .with_relay_client(noise::Config::new, yamux_config)?
        .with_behaviour(|_, relayed| behaviour(relayed))?
        .with_swarm_config(|config| {
            config
                // Members stay connected until there are too many of them.
                .with_idle_connection_timeout(Duration::MAX)
                // QUIC first, TCP 30 ms (250 ms on public addresses) later.
                .with_smart_dial()
                // A message goes out with the negotiation of its stream, not a round trip
                // after it.
                .with_substream_upgrade_protocol_override(libp2p::core::upgrade::Version::V1Lazy)
                .with_max_negotiating_inbound_streams(MESSAGES_PER_CONNECTION_MAX)
        })
        .with_connection_timeout(CONNECTION_TIMEOUT)
        .build();
    Ok(swarm)
}

/// Only members come so far: the allow-list stands before it.
fn relay(me: libp2p::PeerId) -> relay::Behaviour {
    let config = relay::Config {
        max_reservations: RESERVATIONS_MAX,
        max_reservations_per_peer: CONNECTIONS_PER_PEER_MAX as usize,
        reservation_duration: RESERVATION,
        reservation_rate_limiters: Vec::new(),
        max_circuits: CIRCUITS_MAX,
        max_circuits_per_peer: CIRCUITS_PER_PEER_MAX,
        max_circuit_duration: CIRCUIT.0,
        max_circuit_bytes: CIRCUIT.1,
        circuit_src_rate_limiters: Vec::new(),
    };
    let limit = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
    let config = config
        .reservation_rate_per_peer(limit(RESERVATION_RATE.0), RESERVATION_RATE.1)
        .circuit_src_per_peer(limit(CIRCUIT_RATE.0), CIRCUIT_RATE.1);
    let mut relay = relay::Behaviour::new(me, config);
    // Until it is known that others can reach this node.
    relay.set_status(Some(relay::Status::Disable));
    relay
}

fn yamux_config() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS_MAX as usize);
    config
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn connection_limits() -> ConnectionLimits {
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(PENDING_MAX))
        .with_max_pending_outgoing(Some(PENDING_MAX))
        .with_max_established_incoming(Some(CONNECTIONS_INCOMING_MAX))
        .with_max_established(Some(CONNECTIONS_MAX))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER_MAX))
}

fn identify(identity: &Keypair, agent: String) -> identify::Behaviour {
    let config = identify::Config::new(PROTOCOL_VERSION.to_owned(), identity.public())
        .with_agent_version(agent)
        // Where members listen is known from their adverts.
        .with_hide_listen_addrs(true)
        .with_cache_size(0);
    identify::Behaviour::new(config)
}

fn gossip(
    pool: PoolId,
) -> anyhow::Result<gossipsub::Behaviour<gossipsub::IdentityTransform, OneTopic>> {
    let topic = topic(pool);
    let config = gossipsub::ConfigBuilder::default()
        .protocol_id(GOSSIP_PROTOCOL, gossipsub::Version::V1_1)
        // Every item is signed by its author already. Anything beside the item would let
        // one item travel as many, and is refused.
        .validation_mode(gossipsub::ValidationMode::Anonymous)
        .message_id_fn(|message| gossipsub::MessageId::new(blake3::hash(&message.data).as_bytes()))
        .validate_messages()
        .flood_publish(false)
        .max_transmit_size(GOSSIP_BYTES_MAX)
        // Everybody up to six neighbours; beyond, hops grow with the logarithm of the pool.
        .mesh_n_low(4)
        .mesh_n(6)
        .mesh_n_high(12)
        .mesh_outbound_min(2)
        .heartbeat_initial_delay(Duration::from_secs(1))
        .heartbeat_interval(HEARTBEAT)
        // An item lives for minutes, and comes by other ways after that.
        .duplicate_cache_time(Duration::from_secs(120))
        .connection_handler_queue_len(GOSSIP_QUEUE_MAX)
        .max_publish_messages(GOSSIP_QUEUE_MAX)
        .max_control_messages_sent(GOSSIP_QUEUE_MAX)
        .build()?;
    let mut gossip = gossipsub::Behaviour::new_with_subscription_filter(
        gossipsub::MessageAuthenticity::Anonymous,
        config,
        gossipsub::WhitelistSubscriptionFilter([topic.hash()].into()),
    )
    .map_err(|reason| anyhow!("gossip cannot be set up: {reason}"))?;
    gossip
        .with_peer_score(score_params(&topic), score_thresholds())
        .map_err(|reason| anyhow!("gossip's scores cannot be set up: {reason}"))?;
    gossip.subscribe(&topic)?;
    Ok(gossip)
}

/// Also the step by which scores decay.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Items that wait for one slow peer, and ids in one packet.
const GOSSIP_QUEUE_MAX: usize = 512;

/// A well-behaved peer gains at most 20 in the long run. Passing on what no honest node
/// would costs ten times the square of how often, for some ten minutes: the third time
/// such a peer gets nothing from us, the fourth it is not listened to.
fn score_params(topic: &gossipsub::IdentTopic) -> gossipsub::PeerScoreParams {
    let slowly = gossipsub::score_parameter_decay(Duration::from_secs(600));
    let of_topic = gossipsub::TopicScoreParams {
        topic_weight: 1.0,
        time_in_mesh_weight: 0.01,
        time_in_mesh_quantum: Duration::from_secs(1),
        time_in_mesh_cap: 1_000.0,
        first_message_deliveries_weight: 0.1,
        first_message_deliveries_decay: slowly,
        first_message_deliveries_cap: 100.0,
        // State is gossiped when it changes. A quiet pool is no failure of its members.
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        invalid_message_deliveries_weight: -10.0,
        invalid_message_deliveries_decay: slowly,
        ..gossipsub::TopicScoreParams::default()
    };
    gossipsub::PeerScoreParams {
        topics: [(topic.hash(), of_topic)].into(),
        topic_score_cap: 20.0,
        app_specific_weight: 0.0,
        // Members of one laboratory may all come from one address; who is a member was
        // decided elsewhere.
        ip_colocation_factor_weight: 0.0,
        // A peer that was restarted has forgotten that it was to keep away for a while.
        behaviour_penalty_threshold: 3.0,
        behaviour_penalty_decay: gossipsub::score_parameter_decay(Duration::from_secs(60)),
        decay_interval: HEARTBEAT,
        retain_score: Duration::from_secs(600),
        ..gossipsub::PeerScoreParams::default()
    }
}

fn score_thresholds() -> gossipsub::PeerScoreThresholds {
    gossipsub::PeerScoreThresholds {
        gossip_threshold: -10.0,
        publish_threshold: -50.0,
        graylist_threshold: -80.0,
        accept_px_threshold: 0.0,
        opportunistic_graft_threshold: 1.0,
    }
}

const _: () = assert!(GOSSIP_BYTES_MAX <= SMALL_BYTES_MAX);
