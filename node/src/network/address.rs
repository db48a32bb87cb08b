//! Socket addresses and libp2p's, and a port that is free for both transports.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

/// As QUIC and as TCP; the swarm tries QUIC first.
pub(super) fn both(addr: SocketAddr) -> [Multiaddr; 2] {
    [quic(addr), tcp(addr)]
}

pub(super) fn quic(addr: SocketAddr) -> Multiaddr {
    Multiaddr::from(addr.ip()).with(Protocol::Udp(addr.port())).with(Protocol::QuicV1)
}

pub(super) fn tcp(addr: SocketAddr) -> Multiaddr {
    Multiaddr::from(addr.ip()).with(Protocol::Tcp(addr.port()))
}

/// A member behind a relay, or this node where `to` is none: what to listen on.
pub(super) fn circuit(relay: PeerId, addr: Multiaddr, to: Option<PeerId>) -> Multiaddr {
    let relayed = addr.with(Protocol::P2p(relay)).with(Protocol::P2pCircuit);
    match to {
        Some(to) => relayed.with(Protocol::P2p(to)),
        None => relayed,
    }
}

/// The relay of an address that leads through one.
pub(super) fn relay(addr: &Multiaddr) -> Option<PeerId> {
    let mut relay = None;
    for part in addr {
        match part {
            Protocol::P2p(peer) => relay = Some(peer),
            Protocol::P2pCircuit => return relay,
            _ => {}
        }
    }
    None
}

/// `None` where it is not an IP address with a port, or leads through a relay.
pub(super) fn socket(addr: &Multiaddr) -> Option<SocketAddr> {
    if addr.iter().any(|part| matches!(part, Protocol::P2pCircuit)) {
        return None;
    }
    let mut parts = addr.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::V4(ip),
        Protocol::Ip6(ip) => IpAddr::V6(ip),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Udp(port) | Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// The address of this machine that packets to `to` leave from now, as the kernel routes them;
/// none is sent. `None` where there is no way.
pub(super) fn source_towards(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// A port of `ip` that is free for TCP and UDP at this moment.
pub(super) fn free_port(ip: IpAddr) -> io::Result<u16> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..FREE_PORT_TRIES {
        let tcp = TcpListener::bind((ip, 0))?;
        let port = tcp.local_addr()?.port();
        match UdpSocket::bind((ip, port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Most ports are free, so one or two do.
const FREE_PORT_TRIES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_same_after_libp2p_had_it() {
        for text in ["10.1.2.3:4001", "[2001:db8::1]:4001"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(both(addr).map(|multi| socket(&multi)), [Some(addr), Some(addr)]);
        }
        assert_eq!(quic("10.1.2.3:4".parse().unwrap()).to_string(), "/ip4/10.1.2.3/udp/4/quic-v1");
        assert_eq!(socket(&"/dns4/a.example/tcp/1".parse().unwrap()), None);
    }

    #[test]
    fn packets_to_this_machine_leave_from_itself() {
        let to = "127.0.0.1:9".parse().unwrap();
        assert_eq!(source_towards(to), Some(Ipv4Addr::LOCALHOST.into()));
    }

    #[test]
    fn an_address_behind_a_relay_is_no_address_of_the_node() {
        let (relay_id, member) = (PeerId::random(), PeerId::random());
        let at = quic("10.1.2.3:4".parse().unwrap());
        for to in [None, Some(member)] {
            let addr = circuit(relay_id, at.clone(), to);
            assert_eq!((socket(&addr), relay(&addr)), (None, Some(relay_id)));
        }
        assert_eq!(relay(&at.with(Protocol::P2p(member))), None);
    }
}
