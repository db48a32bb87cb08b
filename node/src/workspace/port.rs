//! Ports that jobs of this node are to have for themselves.
//!
//! A job binds its port some time after it was told of it. In between, the port is kept
//! from other jobs of this process here; once it is bound, the kernel keeps it. A rank's
//! port is also in a file, so that preparing again after a restart gives the same one.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs, io,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use socket2::{Domain, Socket, Type};

/// By port, the directory of the rank that has it. At most a port per rank on this machine.
static RESERVED: Mutex<BTreeMap<u16, PathBuf>> = Mutex::new(BTreeMap::new());

/// Ports that the kernel offers and that are reserved here, before giving up.
const OFFERS_MAX: usize = 256;

/// A port that is free now and no other rank's: `wanted` if that is such a one.
pub(super) fn reserve(dir: &Path, wanted: Option<u16>) -> io::Result<u16> {
    let mut reserved = reserved();
    if let Some(port) = wanted
        && reserved.get(&port).is_none_or(|owner| owner == dir)
        && bind(port).is_ok()
    {
        reserved.insert(port, dir.to_owned());
        return Ok(port);
    }
    // Open until the end, so that the kernel does not offer the same again.
    let mut offers = Vec::new();
    while offers.len() < OFFERS_MAX {
        let (socket, port) = bind(0)?;
        if let Entry::Vacant(vacant) = reserved.entry(port) {
            vacant.insert(dir.to_owned());
            return Ok(port);
        }
        offers.push(socket);
    }
    Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "all ports on offer are other jobs'"))
}

pub(super) fn release(dir: &Path) {
    reserved().retain(|_, owner| owner != dir);
}

/// The port in the file at `path`, if there is one.
pub(super) fn remembered(path: &Path) -> Option<u16> {
    fs::read_to_string(path).ok()?.trim().parse().ok().filter(|port| *port > 0)
}

/// Bound, but not listening: nobody can connect, and closing leaves nothing behind.
fn bind(port: u16) -> io::Result<(Socket, u16)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
    let bound = socket.local_addr()?.as_socket_ipv4().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((socket, bound.port()))
}

fn reserved() -> MutexGuard<'static, BTreeMap<u16, PathBuf>> {
    // Whole between any two statements.
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::TcpListener};

    use super::*;

    #[test]
    fn no_two_ranks_get_one_port_until_it_is_released() {
        let dirs: Vec<PathBuf> = (0..200).map(|i| format!("/ports/test-a/{i}").into()).collect();
        let ports: BTreeSet<u16> = dirs.iter().map(|dir| reserve(dir, None).unwrap()).collect();
        assert_eq!(ports.len(), dirs.len());
        let first = reserved().iter().find(|(_, dir)| **dir == dirs[0]).map(|(p, _)| *p).unwrap();
        assert_ne!(reserve(&dirs[1], Some(first)).unwrap(), first);
        release(&dirs[0]);
        assert_eq!(reserve(&dirs[1], Some(first)).unwrap(), first);
        dirs.iter().for_each(|dir| release(dir));
        assert!(!reserved().values().any(|dir| dir.starts_with("/ports/test-a")));
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_not_given() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap().port();
        let dir = Path::new("/ports/test-b");
        assert_ne!(reserve(dir, Some(taken)).unwrap(), taken);
        release(dir);
    }
}
