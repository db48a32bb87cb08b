//! Socket addresses and libp2p's, and a port that is free for both transports.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
};

use libp2p::{Multiaddr, multiaddr::Protocol};

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

/// `None` where it is not an IP address with a port.
pub(super) fn socket(addr: &Multiaddr) -> Option<SocketAddr> {
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
}
