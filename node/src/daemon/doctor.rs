//! What works on this machine and between it and the others, and what to do where it does not.
//!
//! Everything is tried when it is asked for: members are asked to dial this node, and it asks
//! them. What is said of others is said of those that are connected.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use p2pit_protocol::{PeerId, message::Reach};
use tokio::{net::TcpStream, time::timeout};

use super::{
    Shared,
    reach::Carried,
    serve::Request,
    standing::{Answer, Known, Mapping},
};
use crate::{
    api::types::{Checkup, Finding, Severity},
    executor::Isolation,
    gpu::Health,
    network::{Network, Punch, Route},
    transfer::stream::RELAYED_BYTES_PER_S,
};

/// Members with whom the data plane is tried.
const SAMPLE: usize = 8;
/// Addresses that are dialled by TCP.
const TCP_TRIED: usize = 4;
const TCP_WITHIN: Duration = Duration::from_secs(3);
/// Clocks that are further apart are worth a word, and no longer understood by doors.
const CLOCK_MS: (i64, i64) = (5_000, 110_000);
/// Of the home's file system, whichever is less.
const DISK_FREE: (u64, u64) = (5 << 30, 5);
/// For a relay that is about to take this node.
const RELAY_WITHIN: Duration = Duration::from_secs(4);
const RELAY_POLL: Duration = Duration::from_millis(100);

/// Tries everything. Takes some seconds where something does not answer.
pub(crate) async fn examine(shared: &Arc<Shared>) -> Checkup {
    let mut sheet = Sheet::default();
    if let Some(network) = shared.network() {
        network_of(shared, &network, &mut sheet).await;
    } else {
        sheet.problem(
            "pool",
            "this node is in no pool".to_owned(),
            "`p2pit join TICKET` joins one, `p2pit join` founds one",
        );
    }
    machine(shared, &mut sheet);
    Checkup { findings: sheet.0 }
}

/// What was found, in the order in which it was looked at.
#[derive(Debug, Default)]
struct Sheet(Vec<Finding>);

impl Sheet {
    fn add(&mut self, check: &str, severity: Severity, finding: String, hint: Option<String>) {
        self.0.push(Finding { check: check.to_owned(), severity, finding, hint });
    }

    fn ok(&mut self, check: &str, finding: String) {
        self.add(check, Severity::Ok, finding, None);
    }

    fn note(&mut self, check: &str, finding: String, hint: &str) {
        self.add(check, Severity::Note, finding, Some(hint.to_owned()));
    }

    fn warning(&mut self, check: &str, finding: String, hint: &str) {
        self.add(check, Severity::Warning, finding, Some(hint.to_owned()));
    }

    fn problem(&mut self, check: &str, finding: String, hint: &str) {
        self.add(check, Severity::Problem, finding, Some(hint.to_owned()));
    }
}

async fn network_of(shared: &Arc<Shared>, network: &Network, sheet: &mut Sheet) {
    let others = shared.act(|peer, _| {
        let board = peer.board();
        let others = peer.roster().state().nodes.keys().filter(|node| **node != peer.id());
        let other = |node: &PeerId| {
            let advert = board.get(*node).map(|posted| &posted.advert);
            let control = advert.map(|advert| advert.control.clone()).unwrap_or_default();
            (*node, board.is_connected(*node), control)
        };
        others.map(other).collect::<Vec<_>>()
    });
    // The daemon is ending: there is nothing more to say.
    let Ok(others) = others.await else { return };
    if others.is_empty() {
        return sheet
            .ok("pool", "this node is alone in its pool: nothing more can be tried".into());
    }
    let connected: Vec<_> = others.iter().filter(|(_, connected, _)| *connected).collect();
    let (known, carried, tcp) = tokio::join!(
        super::standing::ask_now(shared),
        carried(shared, connected.iter().map(|(node, ..)| *node)),
        tcp(&connected, network),
    );
    members(shared, others.len(), connected.len(), sheet);
    if connected.is_empty() {
        return;
    }
    udp(&carried, &known, sheet);
    match tcp {
        Some(Ok(addr)) => sheet.ok("tcp", format!("TCP gets out, to {addr}")),
        Some(Err(tried)) => sheet.note(
            "tcp",
            format!("TCP reaches none of {tried}"),
            "it is needed only where UDP is blocked; a firewall here or there drops it",
        ),
        None => {}
    }
    let own: Vec<IpAddr> = network.listen_addrs().iter().map(SocketAddr::ip).collect();
    reachable(shared, network, &known, &own, sheet);
    relays(shared, network, &known, sheet).await;
    punches(shared, network, sheet);
    for (node, carried) in &carried {
        data(shared, *node, carried.as_ref().ok(), sheet);
    }
    clocks(shared, &known.answers, sheet);
    if shared.settings.mdns {
        sheet.ok("mdns", "looks for members on the local network".to_owned());
    } else {
        sheet.note(
            "mdns",
            "does not look for members on the local network".to_owned(),
            "fine where addresses do not change; `mdns: true` in config.yaml turns it on",
        );
    }
}

fn members(shared: &Shared, others: usize, connected: usize, sheet: &mut Sheet) {
    let all = format!("connected with {connected} of {others} other nodes");
    if connected == others {
        sheet.ok("members", all);
    } else if connected > 0 {
        sheet.note("members", all, "`p2pit show nodes` says which; those may be switched off");
    } else {
        let port = shared.network().and_then(|n| n.listen_addrs().first().map(SocketAddr::port));
        let port = port.map_or_else(|| "its ports".to_owned(), |port| format!("port {port}"));
        sheet.problem(
            "members",
            all,
            &format!(
                "see whether another node is on and this machine has a network; `--peer HOST:PORT` \
                 (of its data plane) names one; a firewall must let UDP and TCP from {port} out"
            ),
        );
    }
}

fn udp(carried: &BTreeMap<PeerId, Result<Carried, String>>, known: &Known, sheet: &mut Sheet) {
    let own = |carried: &Result<Carried, String>| matches!(carried, Ok(Carried::Own { .. }));
    let seen = known.answers.values().find_map(|answer| answer.probed.seen);
    match seen {
        Some(addr) => sheet.ok("udp", format!("UDP gets out; this node is seen at {addr}")),
        None if carried.values().any(own) => sheet.ok("udp", "UDP gets out".to_owned()),
        None => sheet.warning(
            "udp",
            "UDP reaches no member that was tried: data goes by TCP or through others, slowly"
                .to_owned(),
            "let UDP out at the firewall, at least to the ports of the other nodes (`p2pit show \
             nodes --json`); nobody can join by a ticket from this network without it",
        ),
    }
}

fn reachable(shared: &Shared, network: &Network, known: &Known, own: &[IpAddr], sheet: &mut Sheet) {
    let control = network.listen_addrs().first().map_or(0, SocketAddr::port);
    let data = shared.endpoint.local_addr().map_or(0, |addr| addr.port());
    let asked: Vec<String> = known.answers.keys().map(|node| shared.label(*node)).collect();
    match known.reach {
        Reach::Unknown => sheet.note(
            "reachable",
            "nobody has answered whether this node can be dialled".to_owned(),
            "try again in a moment",
        ),
        Reach::Open => {
            sheet.ok("reachable", format!("others can dial this node, says {}", asked.join(", ")));
        }
        Reach::Behind => sheet.note(
            "reachable",
            format!("others cannot dial this node: {}", why_not(shared, &known.answers)),
            &format!(
                "everything works, except jobs whose processes talk to each other across \
                 networks; forward UDP and TCP {control} and UDP {data} to this machine at its \
                 router (with `listen: 0.0.0.0:{control}` in config.yaml, {data} must be the next \
                 port), or open them in its firewall, and others reach it directly"
            ),
        ),
    }
    match known.mapping(own) {
        Mapping::None => sheet.ok("nat", "no NAT between this node and those asked".to_owned()),
        Mapping::Same => {
            sheet.ok("nat", "a NAT that shows all others the same port: holes open".to_owned());
        }
        Mapping::Varies => sheet.note(
            "nat",
            "a NAT that shows each other node another port (symmetric): no holes can be punched"
                .to_owned(),
            "between two nodes behind such NATs a reachable member passes everything on",
        ),
        Mapping::Unknown => sheet.note(
            "nat",
            "too few members see this node to tell what its NAT does".to_owned(),
            "it takes two that are reached by UDP",
        ),
    }
    if known.reach == Reach::Behind {
        sheet.note(
            "jobs",
            "processes of one job on this node and on nodes of other networks cannot reach each \
             other's ports"
                .to_owned(),
            "ask for all GPUs of such a job on nodes of one network; jobs of one process, or \
             whose processes do not talk, run anywhere",
        );
    }
}

/// What those said that were asked to dial, each thing once.
fn why_not(shared: &Shared, answers: &BTreeMap<PeerId, Answer>) -> String {
    let mut said = Vec::new();
    for (node, Answer { probed, .. }) in answers {
        let mut ports = Vec::new();
        for (port, result) in [
            ("control by UDP", &probed.control),
            ("control by TCP", &probed.tcp),
            ("data by UDP", &probed.data),
        ] {
            if let Some(Err(reason)) = result {
                ports.push(format!("{port}: {reason}"));
            }
        }
        if !ports.is_empty() {
            said.push(format!("{} tried ({})", shared.label(*node), ports.join(", ")));
        }
    }
    if said.is_empty() {
        return "it is reached only by TCP or through others".to_owned();
    }
    said.join("; ")
}

async fn relays(shared: &Shared, network: &Network, known: &Known, sheet: &mut Sheet) {
    if known.reach == Reach::Behind {
        let begun = std::time::Instant::now();
        while network.relays().is_empty() && begun.elapsed() < RELAY_WITHIN {
            tokio::time::sleep(RELAY_POLL).await;
        }
    }
    let relays: Vec<String> = network.relays().into_iter().map(|node| shared.label(node)).collect();
    if !relays.is_empty() {
        let verb = if relays.len() == 1 { "passes" } else { "pass" };
        sheet.ok("relays", format!("{} {verb} on for this node", relays.join(" and ")));
    } else if known.reach == Reach::Behind {
        sheet.warning(
            "relays",
            "no member passes on for this node: others that cannot be dialled do not reach it"
                .to_owned(),
            "the pool needs a member that others can dial and that is no client; `p2pit doctor` \
             there says whether it is",
        );
    }
}

fn punches(shared: &Shared, network: &Network, sheet: &mut Sheet) {
    let (mut open, mut shut) = (Vec::new(), Vec::new());
    for (node, punch) in network.punches() {
        match (punch, network.route(node)) {
            (_, None) => {}
            (Punch::Open, Some(_)) => open.push(shared.label(node)),
            (Punch::Shut(_), Some(Route::Relayed(_))) => shut.push(shared.label(node)),
            // It came about in another way.
            (Punch::Shut(_), Some(Route::Direct(_))) => {}
        }
    }
    if !open.is_empty() {
        sheet.ok("holes", format!("punched a hole to {}", open.join(", ")));
    }
    if !shut.is_empty() {
        sheet.note(
            "holes",
            format!("no hole could be punched to {}", shut.join(", ")),
            "a reachable member passes on between them and this node",
        );
    }
}

fn data(shared: &Shared, node: PeerId, carried: Option<&Carried>, sheet: &mut Sheet) {
    let label = shared.label(node);
    let mib = RELAYED_BYTES_PER_S >> 20;
    match carried {
        Some(Carried::Own { addr, rtt, mtu, black_holes }) => {
            let ms = rtt.as_secs_f64() * 1e3;
            let finding = format!(
                "data to and from {label}: directly, {addr}, round trip {ms:.1} ms, packets of \
                 {mtu} bytes"
            );
            if *black_holes > 0 {
                sheet.note(
                    "data",
                    finding,
                    "larger packets get lost on the way: a tunnel or VPN with a small MTU that \
                     does not say so",
                );
            } else {
                sheet.ok("data", finding);
            }
        }
        Some(Carried::Tunnel { relay: None }) => sheet.note(
            "data",
            format!("data to and from {label}: through the control plane's connection"),
            "that is slower than a connection of its own: UDP is blocked on one side, or both are \
             behind NATs",
        ),
        Some(Carried::Tunnel { relay: Some(relay) }) => sheet.note(
            "data",
            format!(
                "data to and from {label}: passed on by {}, at most {mib} MiB/s",
                shared.label(*relay)
            ),
            "inputs and results come faster from nodes that can be dialled; keep one of those \
             among the pool's nodes",
        ),
        None => sheet.warning(
            "data",
            format!("no data comes from {label}, although it is connected"),
            "its logs and files cannot be read from here now; `p2pit doctor` there may say more",
        ),
    }
}

fn clocks(shared: &Shared, answers: &BTreeMap<PeerId, Answer>, sheet: &mut Sheet) {
    let furthest = answers.iter().max_by_key(|(_, answer)| answer.clock_ms.abs());
    let Some((node, Answer { clock_ms, .. })) = furthest else { return };
    let seconds = clock_ms.abs() / 1_000;
    let way = if *clock_ms > 0 { "behind" } else { "ahead of" };
    let finding = format!("this clock is {seconds} s {way} that of {}", shared.label(*node));
    let hint = "set the clock, best by NTP (`timedatectl set-ntp true`) on both machines";
    if clock_ms.abs() >= CLOCK_MS.1 {
        sheet.problem("clock", format!("{finding}: requests are refused"), hint);
    } else if clock_ms.abs() >= CLOCK_MS.0 {
        sheet.warning("clock", format!("{finding}: at 120 s requests are refused"), hint);
    } else {
        sheet.ok("clock", "agrees with the clocks of those asked".to_owned());
    }
}

/// One question to each, and what carried it.
async fn carried(
    shared: &Arc<Shared>,
    nodes: impl Iterator<Item = PeerId>,
) -> BTreeMap<PeerId, Result<Carried, String>> {
    let asked = nodes.take(SAMPLE).map(|node| async move {
        let answer = shared.ask::<Vec<SocketAddr>>(node, &Request::Addresses).await;
        let carried = match answer {
            Ok(_) => shared.carried(node).ok_or_else(|| "it has just gone".to_owned()),
            Err(reason) => Err(format!("{:#}", anyhow::Error::from(reason))),
        };
        (node, carried)
    });
    futures::future::join_all(asked).await.into_iter().collect()
}

/// The first address that answers by TCP, or those that do not; `None` where nobody has one.
async fn tcp(
    connected: &[&(PeerId, bool, Vec<SocketAddr>)],
    network: &Network,
) -> Option<Result<SocketAddr, String>> {
    let at = |node: PeerId, addrs: &Vec<SocketAddr>| match network.route(node) {
        Some(Route::Direct(addr)) => {
            // It may have come from a port that it does not listen on.
            let port = addrs.first().map_or(addr.port(), SocketAddr::port);
            Some(SocketAddr::new(addr.ip(), port))
        }
        _ => None,
    };
    let addrs: Vec<SocketAddr> =
        connected.iter().filter_map(|(node, _, addrs)| at(*node, addrs)).take(TCP_TRIED).collect();
    if addrs.is_empty() {
        return None;
    }
    let dial = |addr: &SocketAddr| {
        let addr = *addr;
        Box::pin(async move {
            let connected = timeout(TCP_WITHIN, TcpStream::connect(addr)).await;
            connected.map_err(drop)?.map(|_| addr).map_err(drop)
        })
    };
    match futures::future::select_ok(addrs.iter().map(dial)).await {
        Ok((addr, _)) => Some(Ok(addr)),
        Err(()) => {
            let tried: Vec<String> = addrs.iter().map(ToString::to_string).collect();
            Some(Err(tried.join(", ")))
        }
    }
}

fn machine(shared: &Shared, sheet: &mut Sheet) {
    disk(shared, sheet);
    gpus(shared, sheet);
    match &shared.isolation {
        Isolation::Isolated => sheet.ok("sandbox", "jobs are kept apart by namespaces".to_owned()),
        Isolation::Shared { reason } => sheet.warning(
            "sandbox",
            format!("this node runs only its owner's jobs: {reason}"),
            "others' jobs run here once the kernel allows user namespaces, or the daemon runs as \
             root",
        ),
    }
    for warning in shared.warnings() {
        sheet.warning("daemon", warning, "the daemon's log says more");
    }
}

fn disk(shared: &Shared, sheet: &mut Sheet) {
    let home = shared.home.path();
    match rustix::fs::statvfs(home) {
        Ok(fs) => {
            let (free, all) = (fs.f_bavail * fs.f_frsize, fs.f_blocks * fs.f_frsize);
            let finding = format!("{} GiB free below {}", free >> 30, home.display());
            if free < DISK_FREE.0.min(all / 100 * DISK_FREE.1) {
                sheet.warning(
                    "disk",
                    finding,
                    "inputs and results have little room here: make some, or move the home",
                );
            } else {
                sheet.ok("disk", finding);
            }
        }
        Err(reason) => sheet.problem(
            "disk",
            format!("{} cannot be looked at: {reason}", home.display()),
            "see to the disk",
        ),
    }
}

fn gpus(shared: &Shared, sheet: &mut Sheet) {
    if shared.settings.client || shared.on_demand {
        return sheet.ok("gpus", "a client: it offers nothing".to_owned());
    }
    for message in &shared.locked_gpus {
        sheet.warning("gpus", message.clone(), "one daemon of a machine offers each GPU");
    }
    for reading in shared.readings() {
        if let Health::Gone(reason) = &reading.health {
            sheet.warning(
                "gpus",
                format!("GPU {} is gone: {reason}", reading.uuid),
                "`nvidia-smi` and the kernel's log say more; the driver may have to be reloaded",
            );
        }
    }
    match shared.capacity.gpus.len() {
        0 => sheet.note(
            "gpus",
            "offers no GPU".to_owned(),
            "where this machine has some, `nvidia-smi` must show them; `gpus: none` in \
             config.yaml means it",
        ),
        n => sheet.ok("gpus", format!("offers {n}")),
    }
}
