//! Discovery on the local network by multicast DNS: a hint where members may be, and how
//! a newcomer finds a pool. Whoever is not wanted on the network is not started.
//!
//! Not libp2p's own: that one announces every program that speaks libp2p under one name,
//! and has no place for the port of the door. Ours is `_p2pit._udp.local.` and says which
//! node is where; nothing of its pool.
//!
//! Anybody may say anything here. An address is only ever tried; who answers there has to
//! prove who it is. The library keeps what it hears while it looks and sets no bound to
//! that, so looking is done for seconds at a time by an instance of its own that is thrown
//! away, and the one that announces does not listen to announcements.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::Context as _;
use mdns_sd::{
    DaemonEvent, IfKind, Receiver, ResolvedService, ServiceDaemon, ServiceEvent, ServiceInfo,
};
use p2pit_protocol::PeerId;
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

/// Nodes that one look finds, and that are remembered as told.
const FOUND_MAX: usize = 256;

const SERVICE: &str = "_p2pit._udp.local.";
/// Addresses taken from one announcement.
const ADDRESSES_MAX: usize = 8;
/// News that wait for the daemon.
const EVENTS_MAX: usize = 64;
/// How long one look takes, and how far apart two are. Whoever starts looks at once; the
/// others need not be quick.
const LOOK: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_secs(300);
/// How often the library looks whether interfaces came or went, in seconds.
const INTERFACES_EVERY: u32 = 30;

/// What a node says of itself. One that listens on loopback alone has nothing to announce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announcement {
    pub peer: PeerId,
    /// Of libp2p, for QUIC and TCP.
    pub control_port: u16,
    /// Of the data plane, which has the door.
    pub data_port: u16,
}

/// Announces and looks until it is dropped.
#[derive(Debug)]
pub struct Lan {
    responder: Instance,
    looking: AbortHandle,
}

/// News from the local network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LanEvent {
    /// A node that is new, or has moved.
    Found { peer: PeerId, control: Vec<SocketAddr>, data: Vec<SocketAddr> },
}

/// A node that claims to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub peer: PeerId,
    pub control: Vec<SocketAddr>,
    pub data: Vec<SocketAddr>,
}

impl Lan {
    /// Must be called within a runtime. That there is no multicast here is no error: it is
    /// logged, and nothing is found.
    ///
    /// # Errors
    /// The system gives no thread or no poll descriptor.
    pub fn start(announcement: Announcement) -> anyhow::Result<(Self, mpsc::Receiver<LanEvent>)> {
        let responder = Instance::start()?;
        tokio::spawn(log_trouble(responder.0.monitor()?));
        responder.0.register(service(&announcement)?)?;
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let looking = tokio::spawn(keep_looking(announcement.peer, sender)).abort_handle();
        Ok((Self { responder, looking }, events))
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        self.looking.abort();
        debug!(responder = ?self.responder, "no longer announced");
    }
}

/// Who is there: for a newcomer, which announces nothing. Questions are asked at once,
/// after one second and after three, and one may go unanswered that followed another's
/// closely.
///
/// # Errors
/// The system gives no thread or no poll descriptor.
pub async fn browse_once(duration: Duration) -> anyhow::Result<Vec<Found>> {
    let mut all = BTreeMap::new();
    look(duration, |found| {
        all.insert(found.peer, found);
    })
    .await?;
    Ok(all.into_values().collect())
}

async fn keep_looking(me: PeerId, events: mpsc::Sender<LanEvent>) {
    let mut told: BTreeMap<PeerId, Found> = BTreeMap::new();
    loop {
        let looked = look(LOOK, |found| {
            let is_news = found.peer != me && told.get(&found.peer) != Some(&found);
            if !is_news || (told.len() >= FOUND_MAX && !told.contains_key(&found.peer)) {
                return;
            }
            let Found { peer, control, data } = found.clone();
            // What does not fit is told after the next look.
            if events.try_send(LanEvent::Found { peer, control, data }).is_ok() {
                told.insert(peer, found);
            }
        });
        if let Err(reason) = looked.await {
            warn!(reason = format!("{reason:#}"), "the local network cannot be looked at");
            return;
        }
        if events.is_closed() {
            return;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Ends early once [`FOUND_MAX`] nodes were found: more than that is no laboratory.
async fn look(duration: Duration, mut each: impl FnMut(Found)) -> anyhow::Result<()> {
    let browser = Instance::start()?;
    let heard = browser.0.browse(SERVICE)?;
    let mut peers = BTreeSet::new();
    let looking = async {
        while let Ok(event) = heard.recv_async().await {
            let ServiceEvent::ServiceResolved(service) = event else { continue };
            let Some(found) = found(&service) else {
                debug!(name = service.fullname, "not an announcement of ours");
                continue;
            };
            peers.insert(found.peer);
            each(found);
            if peers.len() >= FOUND_MAX {
                return;
            }
        }
    };
    // To look for a while is what was asked for.
    let _ = timeout(duration, looking).await;
    Ok(())
}

/// One instance of the library; its thread ends with it, with a good-bye for what it
/// announced.
struct Instance(ServiceDaemon);

impl Instance {
    fn start() -> anyhow::Result<Self> {
        let daemon = ServiceDaemon::new().context("multicast DNS cannot be started")?;
        // A machine does not need to be told of itself.
        daemon.disable_interface(vec![IfKind::LoopbackV4, IfKind::LoopbackV6])?;
        daemon.set_ip_check_interval(INTERFACES_EVERY)?;
        Ok(Self(daemon))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(reason) = self.0.shutdown() {
            debug!(%reason, "multicast DNS has ended already");
        }
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance").finish_non_exhaustive()
    }
}

/// Without multicast it fails again and again in the same way.
async fn log_trouble(events: Receiver<DaemonEvent>) {
    let mut is_logged = false;
    while let Ok(event) = events.recv_async().await {
        if let DaemonEvent::Error(reason) = event
            && !std::mem::replace(&mut is_logged, true)
        {
            warn!(%reason, "discovery on the local network has trouble");
        }
    }
}

fn service(announcement: &Announcement) -> anyhow::Result<ServiceInfo> {
    let peer = announcement.peer.to_string();
    let properties = [
        (PEER, peer.clone()),
        (CONTROL, announcement.control_port.to_string()),
        (DATA, announcement.data_port.to_string()),
    ];
    let host = format!("{peer}.local.");
    let mut service =
        ServiceInfo::new(SERVICE, &peer, &host, (), announcement.control_port, &properties[..])
            .context("this node cannot be announced")?
            .enable_addr_auto();
    // Nobody else has this name.
    service.set_requires_probe(false);
    Ok(service)
}

const PEER: &str = "peer";
const CONTROL: &str = "control";
const DATA: &str = "data";

/// `None` where it is not what [`service`] makes.
fn found(service: &ResolvedService) -> Option<Found> {
    let text = |key| service.get_property_val_str(key);
    let port = |key| text(key)?.parse().ok().filter(|port: &u16| *port != 0);
    let peer = text(PEER)?.parse().ok()?;
    let (control, data) = (port(CONTROL)?, port(DATA)?);
    let ips: BTreeSet<IpAddr> = service.addresses.iter().map(|ip| ip.to_ip_addr()).collect();
    let ips: Vec<_> = ips.into_iter().filter(is_usable).take(ADDRESSES_MAX).collect();
    let with_port = |port| ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
    (!ips.is_empty()).then(|| Found { peer, control: with_port(control), data: with_port(data) })
}

/// A link-local IPv6 address means nothing without its interface, which libp2p does not
/// know.
fn is_usable(ip: &IpAddr) -> bool {
    let is_link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_link_local)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use p2pit_protocol::identity::KeyPair;
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    #[test]
    fn nodes_on_one_network_find_each_other_with_the_ports_they_announced() {
        in_own_network(async {
            let [alice, bob] = [announcement(1), announcement(2)];
            let (first, mut found_by_alice) = Lan::start(alice).unwrap();
            let (_second, mut found_by_bob) = Lan::start(bob).unwrap();
            assert_eq!(next(&mut found_by_alice).await, expected(&bob));
            assert_eq!(next(&mut found_by_bob).await, expected(&alice));
            look_until(|found| found.len() == 2).await;
            drop(first);
            look_until(|found| found.iter().map(|f| f.peer).eq([bob.peer])).await;
        });
    }

    #[test]
    fn an_announcement_that_is_not_ours_is_not_taken() {
        let good = announcement(1);
        let resolved = |change: fn(&mut Vec<(&str, String)>), ip: &str| {
            let mut properties = vec![
                (PEER, good.peer.to_string()),
                (CONTROL, "4001".to_owned()),
                (DATA, "4002".to_owned()),
            ];
            change(&mut properties);
            let properties = &properties[..];
            let info = ServiceInfo::new(SERVICE, "x", "x.local.", ip, 1, properties).unwrap();
            found(&info.as_resolved_service())
        };
        let taken = resolved(|_| {}, "10.0.0.1,127.0.0.1,fe80::1").unwrap();
        assert_eq!(taken.data, ["10.0.0.1:4002".parse().unwrap()]);
        assert_eq!(resolved(|_| {}, "127.0.0.1"), None);
        assert_eq!(resolved(|p| p[0].1 = "nobody".to_owned(), "10.0.0.1"), None);
        assert_eq!(resolved(|p| p[1].1 = "0".to_owned(), "10.0.0.1"), None);
        assert_eq!(resolved(|p| p[2].1 = "65536".to_owned(), "10.0.0.1"), None);
        assert_eq!(resolved(|p| p.truncate(2), "10.0.0.1"), None);
        let many: Vec<_> = (1..100).map(|n| format!("10.0.0.{n}")).collect();
        assert_eq!(resolved(|_| {}, &many.join(",")).unwrap().control.len(), ADDRESSES_MAX);
    }

    const PATIENCE: Duration = Duration::from_secs(30);
    const IP: &str = "10.77.0.1";

    fn announcement(seed: u8) -> Announcement {
        Announcement {
            peer: PeerId(KeyPair::from_seed(&[seed; 32]).public()),
            control_port: 4000 + u16::from(seed),
            data_port: 5000 + u16::from(seed),
        }
    }

    fn expected(announcement: &Announcement) -> LanEvent {
        let at = |port| vec![SocketAddr::new(IP.parse().unwrap(), port)];
        LanEvent::Found {
            peer: announcement.peer,
            control: at(announcement.control_port),
            data: at(announcement.data_port),
        }
    }

    /// Looks as a newcomer does. An answer that was given to somebody within the last
    /// second is not repeated, so one look may miss it.
    async fn look_until(is_expected: impl Fn(&[Found]) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let found = browse_once(Duration::from_secs(1)).await.unwrap();
            if is_expected(&found) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "found {found:?}");
        }
    }

    async fn next(events: &mut mpsc::Receiver<LanEvent>) -> LanEvent {
        timeout(PATIENCE, events.recv()).await.expect("nothing found").unwrap()
    }

    /// On a thread in a network namespace of its own, so that nothing goes out. Threads
    /// and processes that it starts are in there, too.
    fn in_own_network(test: impl Future<Output = ()> + Send + 'static) {
        let run = move || {
            if let Err(reason) = own_network() {
                println!("skipped: {reason}");
                let required = std::env::var("P2PIT_TEST_REQUIRE").unwrap_or_default();
                assert!(!required.contains("namespaces"), "namespaces are required: {reason}");
                return;
            }
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test);
        };
        std::thread::spawn(run).join().unwrap();
    }

    fn own_network() -> Result<(), String> {
        // SAFETY: only this thread's network changes, and it holds no socket.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
        unshared.map_err(|e| format!("no network namespace: {e}"))?;
        for arguments in [
            "link set lo up",
            "link add lan0 type veth peer name lan1",
            &format!("address add {IP}/24 dev lan0"),
            "link set lan0 up",
            "link set lan1 up",
        ] {
            let output = Command::new("ip").args(arguments.split(' ')).output();
            let output = output.map_err(|e| format!("`ip` cannot be run: {e}"))?;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned());
            }
        }
        Ok(())
    }
}
