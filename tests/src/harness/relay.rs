//! Packets that are late: a relay in this process, for kernels without `tc netem`.
//!
//! The router sends what comes from a delayed machine to a TUN device; this process reads it
//! there, keeps it for a while, and writes it back, whereupon it is forwarded as usual. So
//! nobody has to be told of the relay, and TCP is carried like UDP.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, open},
    ioctl::{Updater, ioctl, opcode},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::net::{DETOUR, Router};

/// More packets than that are lost, as on a line whose queue is full.
const QUEUE: usize = 1 << 16;
/// The longest without a look at whether the relay is to end.
const TURN: Duration = Duration::from_millis(100);
const PACKET_BYTES: usize = 1 << 16;

/// How late packets are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delay {
    pub by: Duration,
    /// So much more, each packet by its own draw: packets overtake each other.
    pub jitter: Duration,
    /// So many of 1000 are not late at all, and overtake all that are under way.
    pub early_per_mille: u32,
}

impl Delay {
    pub(super) fn for_netem(self) -> Vec<String> {
        let mut words = vec!["delay".to_owned(), format!("{}ms", self.by.as_millis())];
        if !self.jitter.is_zero() {
            words.push(format!("{}ms", self.jitter.as_millis()));
        }
        if self.early_per_mille > 0 {
            words.push("reorder".to_owned());
            words.push(format!("{}%", f64::from(self.early_per_mille) / 10.0));
        }
        words
    }
}

/// Carries packets until it is dropped.
#[derive(Debug)]
pub(super) struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    delays: Mutex<BTreeMap<Ipv4Addr, Delay>>,
    ends: AtomicBool,
    carried: AtomicU64,
    overtaken: AtomicU64,
}

impl Relay {
    /// # Errors
    /// What this process may not do.
    pub(super) fn start(router: &Router) -> Result<Self, String> {
        router.make_detour()?;
        let shared = Arc::new(Shared::default());
        let (tell, told) = mpsc::channel();
        let (theirs, pid) = (Arc::clone(&shared), router.holder.pid());
        // A thread of its own: it changes its network, and never comes back.
        let thread = thread::spawn(move || match open_device(pid) {
            Ok(device) => {
                let _ = tell.send(Ok(()));
                carry(&device, &theirs);
            }
            Err(reason) => {
                let _ = tell.send(Err(reason));
            }
        });
        let relay = Self { shared, thread: Some(thread) };
        told.recv().map_err(|_| "it ended".to_owned())??;
        Ok(relay)
    }

    /// How late is what this machine sends.
    pub(super) fn set(&self, at: Ipv4Addr, delay: Delay) {
        self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner).insert(at, delay);
    }

    pub(super) fn carried(&self) -> (u64, u64) {
        let count = |it: &AtomicU64| it.load(Ordering::Relaxed);
        (count(&self.shared.carried), count(&self.shared.overtaken))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        // One that panicked has said so.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The device of the relay, in the network of this process.
fn open_device(router: u32) -> Result<OwnedFd, String> {
    let path = format!("/proc/{router}/ns/net");
    let network = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| format!("the router's network cannot be entered: {e}"))?;
    let device =
        open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| format!("/dev/net/tun: {e}"))?;
    /// The start of the kernel's `ifreq`, and room for the rest.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    /// `_IOW('T', 202, int)`, although it takes an `ifreq`.
    const TUNSETIFF: u32 = opcode::write::<i32>(b'T', 202);
    /// Packets, and nothing before them.
    const TUN_WITHOUT_HEADER: u16 = 0x1001;
    let mut request = Request { name: [0; 16], flags: TUN_WITHOUT_HEADER, rest: [0; 22] };
    request.name[..DETOUR.len()].copy_from_slice(DETOUR.as_bytes());
    // SAFETY: this request reads and writes an `ifreq`, which this is, and nothing else.
    unsafe { ioctl(&device, Updater::<TUNSETIFF, Request>::new(&mut request)) }
        .map_err(|e| format!("the device {DETOUR} cannot be had: {e}"))?;
    Ok(device)
}

fn carry(device: &OwnedFd, shared: &Shared) {
    let mut waiting: BTreeMap<(Instant, u64), Vec<u8>> = BTreeMap::new();
    let (mut count, mut random) = (0_u64, 0x9e37_79b9_7f4a_7c15_u64);
    let mut last_gone = 0;
    let mut buffer = vec![0; PACKET_BYTES];
    while !shared.ends.load(Ordering::Relaxed) {
        let now = Instant::now();
        while let Some(entry) = waiting.first_entry() {
            let (due, number) = *entry.key();
            if due > now {
                break;
            }
            // One that does not get through is a lost packet.
            let _ = rustix::io::write(device, &entry.remove());
            shared.carried.fetch_add(1, Ordering::Relaxed);
            if number < last_gone {
                shared.overtaken.fetch_add(1, Ordering::Relaxed);
            }
            last_gone = last_gone.max(number);
        }
        let next =
            waiting.first_key_value().map(|((due, _), _)| due.saturating_duration_since(now));
        let wait = Timespec::try_from(next.unwrap_or(TURN).min(TURN)).unwrap_or_default();
        if poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&wait)).is_err() {
            continue;
        }
        loop {
            let length = match rustix::io::read(device, &mut buffer) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // The device is gone, and so is the world.
                Err(_) => return,
            };
            let packet = &buffer[..length];
            let Some(from) = source(packet) else { continue };
            let delays = shared.delays.lock().unwrap_or_else(PoisonError::into_inner);
            let delay = delays.get(&from).copied();
            drop(delays);
            if waiting.len() >= QUEUE {
                continue;
            }
            // Xorshift: which packets are early matters to nobody.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            count += 1;
            let late = delay.map_or(Duration::ZERO, |delay| {
                if random % 1000 < u64::from(delay.early_per_mille) {
                    return Duration::ZERO;
                }
                let jitter = u64::try_from(delay.jitter.as_micros()).unwrap_or(u64::MAX);
                let more = ((random >> 32) * jitter.min(u64::from(u32::MAX))) >> 32;
                delay.by + Duration::from_micros(more)
            });
            waiting.insert((Instant::now() + late, count), packet.to_vec());
        }
    }
}

/// Where an IPv4 packet comes from.
fn source(packet: &[u8]) -> Option<Ipv4Addr> {
    let first = packet.first()?;
    let at: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    (first >> 4 == 4).then(|| at.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netem_is_told_the_same_as_the_relay() {
        let mut delay =
            Delay { by: Duration::from_millis(80), jitter: Duration::ZERO, early_per_mille: 0 };
        assert_eq!(delay.for_netem(), ["delay", "80ms"]);
        delay.jitter = Duration::from_millis(40);
        delay.early_per_mille = 25;
        assert_eq!(delay.for_netem(), ["delay", "80ms", "40ms", "reorder", "2.5%"]);
    }

    #[test]
    fn the_source_of_a_packet_is_found_and_nothing_else_is_taken_for_one() {
        let mut packet = [0_u8; 20];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&[10, 77, 3, 2]);
        assert_eq!(source(&packet), Some(Ipv4Addr::new(10, 77, 3, 2)));
        assert_eq!(source(&packet[..15]), None);
        packet[0] = 0x60;
        assert_eq!(source(&packet), None);
        assert_eq!(source(&[]), None);
    }
}
