//! How others reach this node.
//!
//! Nobody can tell by itself: so a few members are asked from where they see this node, and
//! whether they can dial it there, from ports that it never sent anything to. Where most of
//! those that tried can, it is open, and passes on for others; else it is behind a NAT or a
//! firewall, and has two open members pass on for it. Either goes into the advert. Members that
//! see it at its own address may be behind the same NAT: they count where no other tried.
//!
//! Asked again when this node listens elsewhere, when members come that have not been asked,
//! and every few minutes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use p2pit_protocol::{PeerId, message::Reach};
use tokio::{
    net::TcpStream,
    sync::{Notify, Semaphore, SemaphorePermit},
    time::{Instant, timeout},
};
use tracing::{debug, info};

use super::{
    Shared, clock, lock,
    serve::{Probe, Probed, Request},
};
use crate::{
    network::{Network, Relay, Route, Standing as Stand},
    transfer::endpoint::Connection,
};

/// Members that are asked.
const ASKED: usize = 3;
/// Members that are to pass on for this node: one may go.
const RELAYS: usize = 2;
/// How often, where nothing has changed.
const EVERY: Duration = Duration::from_secs(300);
/// How soon, where nobody answered.
const AGAIN: Duration = Duration::from_secs(10);
/// What changes together is looked at together.
const SETTLE: Duration = Duration::from_millis(300);
/// Before a change of what was known is believed.
const CONFIRM_AFTER: Duration = Duration::from_secs(1);
/// How long a port may take to answer who dials it.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);
/// Probes for others at once; each dials three ports.
const PROBES_MAX: usize = 16;
/// Of these for one member.
const PROBES_PER_PEER: usize = 2;

/// What is known of it.
#[derive(Debug)]
pub(crate) struct Standing {
    known: Mutex<Known>,
    pub(super) changed: Notify,
    probing: Semaphore,
    /// For whom how many probes are made.
    probed: Mutex<BTreeMap<PeerId, usize>>,
}

/// Leave to make a probe for a member, as long as it lives.
struct Permit<'a> {
    _room: SemaphorePermit<'a>,
    probed: &'a Mutex<BTreeMap<PeerId, usize>>,
    peer: PeerId,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut probed = lock(self.probed);
        if let Some(count) = probed.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                probed.remove(&self.peer);
            }
        }
    }
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            changed: Notify::new(),
            probing: Semaphore::new(PROBES_MAX),
            probed: Mutex::default(),
        }
    }
}

/// What those that were asked have told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) reach: Reach,
    pub(crate) answers: BTreeMap<PeerId, Answer>,
}

/// What one of them told.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) probed: Probed,
    /// How far its clock is ahead of this one, in milliseconds; 0 where it may be right, as the
    /// time of the question lets it.
    pub(crate) clock_ms: i64,
}

/// Whether a NAT gives this node's port the same address for all it talks to. Only then holes
/// can be punched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// It is seen at its own address: there is no NAT.
    None,
    Same,
    Varies,
    /// Too few have seen it.
    Unknown,
}

impl Standing {
    pub(crate) fn known(&self) -> Known {
        lock(&self.known).clone()
    }

    pub(crate) fn reach(&self) -> Reach {
        lock(&self.known).reach
    }

    fn permit(&self, peer: PeerId) -> Option<Permit<'_>> {
        let _room = self.probing.try_acquire().ok()?;
        let mut probed = lock(&self.probed);
        let count = probed.entry(peer).or_default();
        if *count >= PROBES_PER_PEER {
            return None;
        }
        *count += 1;
        drop(probed);
        Some(Permit { _room, probed: &self.probed, peer })
    }
}

impl Known {
    /// What the answers come to; `own` are this machine's addresses.
    fn judge(answers: &BTreeMap<PeerId, Answer>, own: &[IpAddr]) -> Reach {
        let by_datagrams = answers.values().filter_map(|answer| {
            answer.probed.seen.map(|seen| (&answer.probed, !own.contains(&seen.ip())))
        });
        let by_datagrams: Vec<_> = by_datagrams.collect();
        if by_datagrams.is_empty() && !answers.is_empty() {
            // They can only be asked through others, or by TCP.
            return Reach::Behind;
        }
        let tried = by_datagrams.into_iter().filter(|(probed, _)| probed.data.is_some());
        let (outside, inside): (Vec<_>, Vec<_>) = tried.partition(|(_, is_outside)| *is_outside);
        let counted = if outside.is_empty() { inside } else { outside };
        let open = counted.iter().filter(|(probed, _)| probed.is_open()).count();
        match counted.len() {
            // Who had no leave to try says nothing.
            0 => Reach::Unknown,
            all if 2 * open > all => Reach::Open,
            _ => Reach::Behind,
        }
    }

    /// `own` are this machine's addresses.
    pub(crate) fn mapping(&self, own: &[IpAddr]) -> Mapping {
        let seen: Vec<SocketAddr> =
            self.answers.values().filter_map(|answer| answer.probed.seen).collect();
        let mapped: Vec<_> = seen.iter().filter(|addr| !own.contains(&addr.ip())).collect();
        match mapped.as_slice() {
            [] if seen.is_empty() => Mapping::Unknown,
            [] => Mapping::None,
            [_] => Mapping::Unknown,
            [first, rest @ ..] if rest.iter().all(|addr| addr == first) => Mapping::Same,
            _ => Mapping::Varies,
        }
    }

    /// Addresses beyond this machine's at which others could dial it, where two say the same, or
    /// only one could be asked: one alone could name any.
    fn outside(&self, own: &[IpAddr]) -> BTreeSet<IpAddr> {
        let mut votes = BTreeMap::<IpAddr, usize>::new();
        let open = self.answers.values().filter(|answer| answer.probed.is_open());
        let seen = open.filter_map(|answer| answer.probed.seen).map(|addr| addr.ip());
        for ip in seen.filter(|ip| !own.contains(ip)) {
            *votes.entry(ip).or_default() += 1;
        }
        let needed = self.answers.len().min(2);
        votes.into_iter().filter(|(_, votes)| *votes >= needed).map(|(ip, _)| ip).collect()
    }
}

impl Probed {
    /// Both planes can be dialled.
    pub(crate) fn is_open(&self) -> bool {
        let ok = |port: &Option<Result<(), String>>| matches!(port, Some(Ok(())));
        ok(&self.data) && (ok(&self.control) || ok(&self.tcp))
    }

    fn untried(seen: Option<SocketAddr>) -> Self {
        let wall_ms = clock::now().wall_ms;
        Self { seen, control: None, tcp: None, data: None, wall_ms }
    }
}

/// Dials a member where its question came from, anew.
pub(super) async fn probe(
    shared: &Shared,
    from: PeerId,
    ports: &Probe,
    connection: Option<&Connection>,
) -> Probed {
    let seen = connection.map(Connection::addr);
    let route = shared.network().and_then(|network| network.route(from));
    let ip = match (seen, route) {
        (Some(addr), _) | (None, Some(Route::Direct(addr))) => addr.ip(),
        _ => return Probed::untried(seen),
    };
    let Some(_permit) = shared.standing.permit(from) else { return Probed::untried(seen) };
    let at = |port| SocketAddr::new(ip, port);
    let endpoint = &shared.endpoint;
    let (control, tcp, data) = tokio::join!(
        endpoint.probe_control(at(ports.control), PROBE_PATIENCE),
        dial_tcp(at(ports.control)),
        endpoint.probe(from, at(ports.data), PROBE_PATIENCE),
    );
    let wall_ms = clock::now().wall_ms;
    Probed { seen, control: Some(control), tcp: Some(tcp), data: Some(data), wall_ms }
}

async fn dial_tcp(addr: SocketAddr) -> Result<(), String> {
    match timeout(PROBE_PATIENCE, TcpStream::connect(addr)).await {
        Ok(connected) => connected.map(drop).map_err(|e| e.to_string()),
        Err(_elapsed) => Err("no answer".to_owned()),
    }
}

/// Asks when there is something to ask, and says what came of it.
pub(super) async fn watch(shared: Arc<Shared>) {
    let (mut listened, mut due_at) = (Vec::new(), None::<Instant>);
    // The last time, whether they answered or not.
    let mut asked = BTreeSet::new();
    loop {
        let now = Instant::now();
        let left = due_at.map_or(EVERY, |at| at.saturating_duration_since(now));
        if timeout(left, shared.standing.changed.notified()).await.is_ok() {
            tokio::time::sleep(SETTLE).await;
        }
        let Some(network) = shared.network() else { continue };
        let members = match members(&shared).await {
            Ok(members) => members,
            Err(super::NoPeer::NoPool) => continue,
            Err(super::NoPeer::Ending) => return,
        };
        let listens = network.listen_addrs();
        if listens != listened {
            // Nothing that was known holds any more.
            *lock(&shared.standing.known) = Known::default();
            listened = listens;
            due_at = None;
        }
        let known = shared.standing.known();
        let connected = || members.iter().filter(|member| member.connected);
        let has_fresh = connected().any(|member| !asked.contains(&member.node));
        let is_due =
            due_at.is_none_or(|at| at <= Instant::now()) || (asked.len() < ASKED && has_fresh);
        if connected().count() == 0 {
            // Whatever cut it off may have changed how it is reached.
            due_at = None;
        } else if is_due {
            asked = to_ask(shared.id(), &members).collect();
            let answers = ask_confirmed(&shared, &known, &members).await;
            // Where nobody answers they are asked again soon.
            let next = if answers.is_empty() { AGAIN } else { EVERY };
            if !answers.is_empty() {
                take_in(&shared, answers);
            }
            due_at = Some(Instant::now() + next);
        }
        apply(&shared, &network, &members).await;
    }
}

/// A member, as far as it matters here.
#[derive(Debug, Clone)]
struct Member {
    node: PeerId,
    connected: bool,
    client: bool,
    reach: Reach,
    control: Vec<SocketAddr>,
}

async fn members(shared: &Shared) -> Result<Vec<Member>, super::NoPeer> {
    shared
        .act(|peer, _| {
            let board = peer.board();
            let others = peer.roster().state().nodes.keys().filter(|node| **node != peer.id());
            let member = |node: &PeerId| {
                let advert = board.get(*node).map(|posted| &posted.advert);
                Member {
                    node: *node,
                    connected: board.is_connected(*node),
                    client: advert.is_none_or(|advert| advert.client),
                    reach: advert.map(|advert| advert.reach).unwrap_or_default(),
                    control: advert.map(|advert| advert.control.clone()).unwrap_or_default(),
                }
            };
            others.map(member).collect()
        })
        .await
}

/// Asks anew. To be used where a person waits for it.
pub(crate) async fn ask_now(shared: &Arc<Shared>) -> Known {
    if let (Some(network), Ok(members)) = (shared.network(), members(shared).await) {
        let answers = ask_confirmed(shared, &shared.standing.known(), &members).await;
        if !answers.is_empty() {
            take_in(shared, answers);
        }
        apply(shared, &network, &members).await;
    }
    shared.standing.known()
}

async fn ask_confirmed(
    shared: &Arc<Shared>,
    known: &Known,
    members: &[Member],
) -> BTreeMap<PeerId, Answer> {
    let answers = ask(shared, members).await;
    let reach = Known::judge(&answers, &own_ips(shared));
    let differs = reach != known.reach && known.reach != Reach::Unknown;
    if answers.is_empty() || !differs {
        return answers;
    }
    // A packet may have been lost.
    tokio::time::sleep(CONFIRM_AFTER).await;
    ask(shared, members).await
}

/// Those that everybody can dial are asked first: most of what is between is in their view.
fn to_ask(me: PeerId, members: &[Member]) -> impl Iterator<Item = PeerId> {
    let mut asked: Vec<&Member> = members.iter().filter(|member| member.connected).collect();
    asked.sort_by_key(|member| (member.reach != Reach::Open, draw(me, member.node)));
    asked.into_iter().take(ASKED).map(|member| member.node)
}

async fn ask(shared: &Arc<Shared>, members: &[Member]) -> BTreeMap<PeerId, Answer> {
    let Some(network) = shared.network() else { return BTreeMap::new() };
    let control = network.listen_addrs().first().map_or(0, SocketAddr::port);
    let data = shared.endpoint.local_addr().map_or(0, |addr| addr.port());
    let question = Request::Probe(Probe { control, data });
    let answers = to_ask(shared.id(), members).map(|node| {
        let question = &question;
        async move {
            let wall_ms = clock::now().wall_ms;
            match shared.ask::<Probed>(node, question).await {
                Ok(probed) => {
                    let there = i64::try_from(probed.wall_ms).unwrap_or(i64::MAX);
                    let here = i64::try_from(clock::now().wall_ms).unwrap_or(i64::MAX);
                    let before = i64::try_from(wall_ms).unwrap_or(i64::MAX);
                    let clock_ms = clock_offset(before, here, there);
                    Some((node, Answer { probed, clock_ms }))
                }
                Err(reason) => {
                    debug!(%node, reason = format!("{reason:#}"), "not asked");
                    None
                }
            }
        }
    });
    futures::future::join_all(answers).await.into_iter().flatten().collect()
}

/// How far another clock is ahead, that showed `there` at some time between two readings of
/// this one: 0 where it may be right.
fn clock_offset(before: i64, after: i64, there: i64) -> i64 {
    if there < before { there.saturating_sub(before) } else { there.saturating_sub(after).max(0) }
}

/// Where this machine listens.
fn own_ips(shared: &Shared) -> Vec<IpAddr> {
    let listens = shared.network().map(|network| network.listen_addrs()).unwrap_or_default();
    listens.iter().map(SocketAddr::ip).collect()
}

fn take_in(shared: &Shared, answers: BTreeMap<PeerId, Answer>) {
    let own = own_ips(shared);
    let mut known = lock(&shared.standing.known);
    let reach = match Known::judge(&answers, &own) {
        // Nobody could try: what was known holds.
        Reach::Unknown => known.reach,
        reach => reach,
    };
    if known.reach != reach {
        info!(?reach, "how others reach this node");
    }
    *known = Known { reach, answers };
}

/// Where the control and the data plane are found; first those that everybody can use.
pub(crate) fn addresses(shared: &Shared, network: &Network) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
    let listens = network.listen_addrs();
    let own: Vec<IpAddr> = listens.iter().map(SocketAddr::ip).collect();
    let outside = lock(&shared.standing.known).outside(&own);
    let also = |addrs: Vec<SocketAddr>| {
        let port = addrs.first().map_or(0, SocketAddr::port);
        let more = outside.iter().map(|ip| SocketAddr::new(*ip, port));
        more.chain(addrs.iter().copied()).collect()
    };
    (also(listens), also(shared.data_addrs(network)))
}

/// Tells the network and the advert.
async fn apply(shared: &Arc<Shared>, network: &Network, members: &[Member]) {
    let known = shared.standing.known();
    let (control, data) = addresses(shared, network);
    let passes_on = known.reach == Reach::Open && !shared.settings.client && !shared.on_demand;
    let relays = if known.reach == Reach::Behind {
        choose_relays(shared.id(), &network.relays(), members, network)
    } else {
        Vec::new()
    };
    let public = if passes_on { control.clone() } else { Vec::new() };
    network.set_standing(Stand { public, relays });
    let (reach, relays) = (known.reach, network.relays());
    let told = shared.act(move |peer, now| {
        peer.set_addresses(control, data, now);
        peer.set_reach(reach, relays, now);
    });
    // Nothing to tell where the daemon ends.
    let _ = told.await;
}

/// Open members that are connected directly; those that pass on already go on.
fn choose_relays(me: PeerId, now: &[PeerId], members: &[Member], network: &Network) -> Vec<Relay> {
    let is_direct = |node| matches!(network.route(node), Some(Route::Direct(_)));
    let fit = members.iter().filter(|member| {
        member.connected && !member.client && member.reach == Reach::Open && is_direct(member.node)
    });
    let mut fit: Vec<_> = fit.collect();
    fit.sort_by_key(|member| (!now.contains(&member.node), draw(me, member.node)));
    let relay = |member: &Member| Relay { node: member.node, addrs: member.control.clone() };
    fit.into_iter().take(RELAYS).map(relay).collect()
}

/// Spreads the load: everybody draws others first.
fn draw(me: PeerId, node: PeerId) -> [u8; 32] {
    *blake3::hash(&[me.0.0, node.0.0].concat()).as_bytes()
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::PublicKey;

    use super::*;

    fn answer(seen: Option<&str>, data: Result<(), String>) -> Answer {
        let seen = seen.map(|addr| addr.parse().unwrap());
        let control = Some(Ok(()));
        let probed = Probed { seen, control, tcp: None, data: Some(data), wall_ms: 0 };
        Answer { probed, clock_ms: 0 }
    }

    fn known(answers: Vec<Answer>) -> Known {
        let answers: BTreeMap<_, _> =
            (1..).map(|n| PeerId(PublicKey([n; 32]))).zip(answers).collect();
        let own = ["10.0.0.1".parse().unwrap()];
        Known { reach: Known::judge(&answers, &own), answers }
    }

    fn shut() -> Result<(), String> {
        Err("no answer".to_owned())
    }

    #[test]
    fn a_node_is_open_where_most_that_tried_can_dial_it() {
        let at = |ip| Some(ip);
        let untried = |ip: &str| Answer { probed: Probed::untried(ip.parse().ok()), clock_ms: 0 };
        let outside = |data| answer(at("192.0.2.1:5"), data);
        for (answers, reach) in [
            (vec![], Reach::Unknown),
            (vec![answer(at("10.0.0.1:5"), Ok(()))], Reach::Open),
            (
                vec![answer(at("10.0.0.1:5"), Ok(())), answer(at("192.0.2.1:5"), shut())],
                Reach::Behind,
            ),
            // Asked by TCP, or through a relay, alone.
            (vec![answer(None, shut())], Reach::Behind),
            (vec![answer(None, shut()), answer(at("10.0.0.1:5"), Ok(()))], Reach::Open),
            // Who had no leave to try.
            (vec![untried("192.0.2.1:5")], Reach::Unknown),
            (vec![untried("192.0.2.1:5"), outside(Ok(()))], Reach::Open),
            (vec![outside(Ok(())), outside(Ok(())), outside(shut())], Reach::Open),
            (vec![outside(Ok(())), outside(shut())], Reach::Behind),
            // Two are behind the same NAT.
            (
                vec![
                    answer(at("10.0.0.1:5"), Ok(())),
                    answer(at("10.0.0.1:5"), Ok(())),
                    outside(shut()),
                ],
                Reach::Behind,
            ),
        ] {
            assert_eq!(known(answers.clone()).reach, reach, "{answers:?}");
        }
    }

    #[test]
    fn a_nat_is_told_from_none_and_by_what_it_shows_to_several() {
        let own = ["10.0.0.1".parse().unwrap()];
        let seen = |addrs: &[&str]| {
            known(addrs.iter().map(|addr| answer(Some(addr), Ok(()))).collect()).mapping(&own)
        };
        assert_eq!(seen(&[]), Mapping::Unknown);
        assert_eq!(seen(&["10.0.0.1:5"]), Mapping::None);
        assert_eq!(seen(&["192.0.2.1:5"]), Mapping::Unknown, "one says nothing of others");
        assert_eq!(seen(&["192.0.2.1:5", "192.0.2.1:5"]), Mapping::Same);
        assert_eq!(seen(&["192.0.2.1:5", "192.0.2.1:6"]), Mapping::Varies);
        assert_eq!(seen(&["192.0.2.1:5", "10.0.0.1:5", "192.0.2.1:5"]), Mapping::Same);
    }

    #[test]
    fn an_address_that_others_could_dial_is_told_and_one_they_could_not_is_none() {
        let own = ["10.0.0.1".parse().unwrap()];
        let forwarded = known(vec![
            answer(Some("192.0.2.1:5"), Ok(())),
            answer(Some("192.0.2.1:7"), Ok(())),
            answer(Some("192.0.2.2:5"), shut()),
        ]);
        assert_eq!(forwarded.outside(&own), ["192.0.2.1".parse().unwrap()].into());
        let one = |answers: &[&str]| {
            known(answers.iter().map(|addr| answer(Some(addr), Ok(()))).collect()).outside(&own)
        };
        assert_eq!(one(&["192.0.2.1:5"]), ["192.0.2.1".parse().unwrap()].into());
        assert!(one(&["192.0.2.1:5", "10.0.0.1:5"]).is_empty(), "nobody else says so");
        assert!(one(&["192.0.2.1:5", "192.0.2.2:5"]).is_empty());
    }

    #[test]
    fn one_member_does_not_take_all_leave_to_probe() {
        let standing = Standing::default();
        let node = |n| PeerId(PublicKey([n; 32]));
        let held: Vec<_> =
            (0..PROBES_PER_PEER).map(|_| standing.permit(node(1)).unwrap()).collect();
        assert!(standing.permit(node(1)).is_none() && standing.permit(node(2)).is_some());
        drop(held);
        assert!(standing.permit(node(1)).is_some());
    }

    #[test]
    fn three_are_asked_open_ones_first() {
        let node = |n| PeerId(PublicKey([n; 32]));
        let member = |n, connected, reach| Member {
            node: node(n),
            connected,
            client: false,
            reach,
            control: Vec::new(),
        };
        let members = [
            member(1, true, Reach::Behind),
            member(2, true, Reach::Unknown),
            member(3, false, Reach::Open),
            member(4, true, Reach::Open),
            member(5, true, Reach::Behind),
            member(6, true, Reach::Open),
        ];
        let asked: Vec<PeerId> = to_ask(node(9), &members).collect();
        assert_eq!(asked.len(), ASKED);
        let open: BTreeSet<_> = asked[..2].iter().copied().collect();
        assert_eq!(open, [node(4), node(6)].into());
    }

    #[test]
    fn a_clock_is_off_only_beyond_what_the_question_took() {
        for (there, offset) in [(100, 0), (150, 0), (200, 0), (90, -10), (230, 30)] {
            assert_eq!(clock_offset(100, 200, there), offset);
        }
    }
}
