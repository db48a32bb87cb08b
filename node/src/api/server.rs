//! Serves [`super::types::path`] to the users of this machine.
//!
//! The socket is the owner's alone (mode 0600). It grants nothing by itself: whatever
//! concerns a job or the roster is signed by its user, and checked by the node that
//! carries it out.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use p2pit_protocol::{
    BlobId, JobId, Peer, PeerId,
    identity::SignedBytes,
    job::VerifiedSpec,
    message::JobView,
    peer::SubmitError,
    record::{Keeper, quorum_of},
    request::Request as ClusterRequest,
    roster::{Author, Kind, NODE_CLAIMS_MAX},
};
use tokio::{io::AsyncReadExt as _, net::UnixListener, sync::mpsc};
use tokio_util::io::StreamReader;
use tracing::warn;

use super::{
    log::Held,
    types::{
        Answer, ApiError, Ask, Audience, Checkup, DraftReply, DraftRequest, Fetch, Files, Found,
        HandedOver, JobFiles, Join, Journalled, LanNode, Log, Logs, Me, NodeInfo, Parting, Plan,
        Planned, PoolInfo, Pull, PullEvent, Recover, Resolve, Resolved, Submit, SubmitEvent,
        Survey, Surveyed, Unsatisfiable, Uploaded, UserInfo, Watch, path,
    },
};
use crate::{
    daemon::{
        ASK_TIMEOUT, NoPeer, ReachError, Shared, ShutOut, doctor,
        fetch::{Blobs, Fetch as BlobFetch, FetchError, fetch as fetch_blobs},
        keepers_of,
        logs::{self, LogReader},
        now, parting, push,
        serve::{self, Gate, Request, UserAnswer, Views},
        space, standing,
    },
    executor::Isolation,
    home::Home,
    transfer::{
        BlobStore, Pace,
        exchange::{self, Source},
        frame,
        store::NoRoom,
        stream::RecvStream,
    },
};

/// Largest JSON body: the ids of a directory of a million files.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Shortest job prefix shown or accepted.
const SHORT_MIN: usize = 4;
/// Jobs named to somebody whose prefix is that of several.
const CANDIDATES_MAX: usize = 10;
/// How long a newcomer looks around before it founds a pool: mDNS asks at 0, 1 and 3 s,
/// and who answered a second ago does not answer again.
const LAN_LOOK: Duration = Duration::from_secs(4);

/// What is still read of an upload that has been refused. A client stops long before, once
/// it has the answer.
const DRAIN_BYTES_MAX: u64 = 64 << 20;

/// How long a plan waits for a node that can keep the job.
const KEEPER_WITHIN: Duration = Duration::from_secs(5);

/// How long the list of a job's files is waited for: a node reads the manifests of all of them.
const FILES_WITHIN: Duration = Duration::from_secs(15);

type Answered<T> = Result<Json<T>, Failure>;

/// The API on its socket.
pub(crate) struct Server {
    listener: UnixListener,
    router: Router,
}

impl Server {
    pub(crate) fn bind(shared: Arc<Shared>) -> anyhow::Result<Self> {
        remove_socket(&shared.home);
        let socket = shared.home.api_socket()?;
        let file = socket.file().to_owned();
        let listener = UnixListener::bind(socket.usable())
            .with_context(|| format!("cannot listen on {}", file.display()))?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot protect {}", file.display()))?;
        Ok(Self { listener, router: router(shared) })
    }

    pub(crate) async fn run(self) {
        if let Err(reason) = axum::serve(self.listener, self.router).await {
            warn!(%reason, "the API ended");
        }
    }
}

/// The socket of a daemon that has ended, or is ending.
pub(crate) fn remove_socket(home: &Home) {
    match home.api_socket().and_then(|socket| std::fs::remove_file(socket.file())) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => warn!(%e, "the old socket stays"),
        Ok(()) | Err(_) => {}
    }
}

fn router(shared: Arc<Shared>) -> Router {
    let counted = Arc::clone(&shared);
    Router::new()
        .route(path::ME, get(me))
        .route(path::FOUND, post(found))
        .route(path::JOIN, post(join))
        .route(path::LAN, get(lan))
        .route(path::SHUTDOWN, post(shutdown))
        .route(path::HAND_OVER, post(hand_over))
        .route(path::PARTING, post(part))
        .route(path::NODES, get(nodes))
        .route(path::USERS, get(users))
        .route(path::DRAFT, post(draft))
        .route(path::STATEMENTS, post(statements))
        .route(path::PLAN, post(plan))
        .route(path::MISSING, post(missing))
        .route(path::UPLOAD, post(upload))
        .route(path::SUBMIT, post(submit))
        .route(path::RESOLVE, post(resolve))
        .route(path::KEEPERS, get(keepers))
        .route(path::ASK, post(ask))
        .route(path::WATCH, post(watch))
        .route(path::LOG, post(log))
        .route(path::LOGS, post(logs))
        .route(path::FILES, post(files))
        .route(path::FETCH, post(fetch))
        .route(path::PULL, post(pull))
        .route(path::SURVEY, post(survey))
        .route(path::RECOVER, post(recover))
        .route(path::DOCTOR, post(doctor))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::from_fn(
            move |request: axum::extract::Request, next: axum::middleware::Next| {
                let in_use = counted.in_use();
                let shared = Arc::clone(&counted);
                // A daemon without room can still be ended.
                let needs_room = request.uri().path() != path::SHUTDOWN;
                async move {
                    let response = tokio::select! {
                        response = next.run(request) => response,
                        () = shared.out_of_room(), if needs_room => {
                            Failure::no_room(&shared.home).into_response()
                        }
                    };
                    // A stream is in use until its last byte.
                    response.map(|body| {
                        let held =
                            stream::unfold((body.into_data_stream(), in_use), |(mut b, u)| async {
                                b.next().await.map(|chunk| (chunk, (b, u)))
                            });
                        Body::from_stream(held)
                    })
                }
            },
        ))
        .with_state(shared)
}

// ---- this node ------------------------------------------------------------------------

async fn me(State(shared): State<Arc<Shared>>) -> Answered<Me> {
    Ok(Json(describe(&shared).await?))
}

async fn describe(shared: &Arc<Shared>) -> Result<Me, Failure> {
    let known = shared
        .act(|peer, _| {
            let state = peer.roster().state();
            let node = state.nodes.get(&peer.id());
            let pool = PoolInfo {
                id: peer.pool(),
                name: peer.roster().genesis().name.to_string(),
                nodes: state.nodes.len(),
                users: state.users.len(),
            };
            let name = node.map(|node| node.name.to_string()).unwrap_or_default();
            let (connected, working_for) = (peer.board().connected().count(), peer.working_for());
            (pool, name, node.map(|node| node.owner), connected, working_for)
        })
        .await;
    let (pool, name, owner, connected, mut working_for) = match known {
        Ok((pool, name, owner, connected, jobs)) => (Some(pool), name, owner, connected, jobs),
        Err(NoPeer::NoPool) => (None, String::new(), None, 0, BTreeSet::new()),
        Err(ending @ NoPeer::Ending) => return Err(ending.into()),
    };
    let (control, data) =
        shared.network().map(|network| standing::addresses(shared, &network)).unwrap_or_default();
    working_for.extend(shared.work.jobs());
    Ok(Me {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        home: shared.home.path().display().to_string(),
        node: shared.id(),
        store: shared.store_id,
        device: shared.device(),
        name,
        owner,
        client: shared.settings.client,
        pool,
        control,
        data,
        dialled: shared.standing.reach(),
        connected,
        capacity: shared.capacity.clone(),
        owner_only: shared.owner_only(),
        isolation: match &shared.isolation {
            Isolation::Isolated => "namespaces".to_owned(),
            Isolation::Shared { reason } => format!("none: {reason}"),
        },
        working_for: working_for.into_iter().collect(),
        locked_gpus: shared.locked_gpus.clone(),
        wall_ms: now().wall_ms,
        journal: Journalled { entries: shared.journal.entries(), fsyncs: shared.journal.groups() },
        space: space::describe(shared),
        warnings: shared.warnings(),
    })
}

async fn doctor(State(shared): State<Arc<Shared>>) -> Json<Checkup> {
    Json(doctor::examine(&shared).await)
}

async fn found(State(shared): State<Arc<Shared>>, Json(found): Json<Found>) -> Answered<Me> {
    not_yet_member(&shared).await?;
    shared.found(found.genesis, found.claim, &found.node_name).await.map_err(Failure::request)?;
    Ok(Json(describe(&shared).await?))
}

async fn join(State(shared): State<Arc<Shared>>, Json(join): Json<Join>) -> Answered<Me> {
    not_yet_member(&shared).await?;
    shared.join(&join.ticket, join.claim, &join.peers).await.map_err(Failure::request)?;
    Ok(Json(describe(&shared).await?))
}

async fn not_yet_member(shared: &Shared) -> Result<(), Failure> {
    match shared.act(|peer, _| peer.roster().genesis().name.to_string()).await {
        Ok(pool) => Err(Failure::hinted(
            format!("this home is in the pool `{pool}` already"),
            "`p2pit leave` leaves it; another `--home` can be in another pool",
        )),
        Err(NoPeer::NoPool) => Ok(()),
        Err(ending @ NoPeer::Ending) => Err(ending.into()),
    }
}

async fn lan(State(shared): State<Arc<Shared>>) -> Answered<Vec<LanNode>> {
    if !shared.settings.mdns || shared.settings.listen.ip().is_loopback() {
        return Ok(Json(Vec::new()));
    }
    match crate::network::browse_once(LAN_LOOK).await {
        Ok(found) => {
            let others = found.into_iter().filter(|found| found.peer != shared.id());
            Ok(Json(others.map(|f| LanNode { node: f.peer, door: f.data }).collect()))
        }
        Err(reason) => {
            warn!(reason = format!("{reason:#}"), "the local network cannot be looked at");
            Ok(Json(Vec::new()))
        }
    }
}

async fn shutdown(State(shared): State<Arc<Shared>>) -> Answered<BTreeMap<(), ()>> {
    shared.shutdown.notify_one();
    Ok(Json(BTreeMap::new()))
}

async fn hand_over(State(shared): State<Arc<Shared>>) -> Answered<HandedOver> {
    Ok(Json(shared.hand_over().await?))
}

async fn part(State(shared): State<Arc<Shared>>) -> Answered<Parting> {
    let only_here = parting::only_here(&shared).await.map_err(Failure::broken)?;
    Ok(Json(Parting { only_here, has_heirs: shared.has_heirs().await? }))
}

// ---- the pool -------------------------------------------------------------------------

async fn nodes(State(shared): State<Arc<Shared>>) -> Answered<Vec<NodeInfo>> {
    let nodes = shared
        .act(|peer, now| {
            let state = peer.roster().state();
            let describe = |(id, node): (&PeerId, &p2pit_protocol::roster::Node)| {
                let advert = peer.board().get(*id).map(|posted| posted.advert.clone());
                let reach = if *id == peer.id() {
                    "self"
                } else if peer.board().is_connected(*id) {
                    "online"
                } else {
                    "offline"
                };
                let age =
                    advert.as_ref().map(|a| now.wall_ms.saturating_sub(a.issued_at_ms) / 1000);
                let owner_name = state.users.get(&node.owner).map(|u| u.username.to_string());
                NodeInfo {
                    node: *id,
                    name: node.name.to_string(),
                    owner: node.owner,
                    owner_name: owner_name.unwrap_or_default(),
                    client: node.client,
                    away: !node.client && advert.as_ref().is_some_and(|a| a.client),
                    reach: reach.to_owned(),
                    advert_age_s: age,
                    capacity: advert.as_ref().map(|a| a.capacity.clone()).unwrap_or_default(),
                    not_free: advert.as_ref().map(|a| a.not_free.clone()).unwrap_or_default(),
                    free_cpu_cores: advert.as_ref().map_or(0, |a| a.free_cpu_cores),
                    free_ram_mib: advert.as_ref().map_or(0, |a| a.free_ram_mib),
                    owner_only: advert.as_ref().and_then(|a| a.owner_only.clone()),
                    full: advert.as_ref().is_some_and(|a| a.full),
                    control: advert.as_ref().map(|a| a.control.clone()).unwrap_or_default(),
                    data: advert.as_ref().map(|a| a.data.clone()).unwrap_or_default(),
                    dialled: advert.as_ref().map(|a| a.reach).unwrap_or_default(),
                    relays: advert.as_ref().map(|a| a.relays.clone()).unwrap_or_default(),
                }
            };
            state.nodes.iter().map(describe).collect::<Vec<_>>()
        })
        .await?;
    Ok(Json(nodes))
}

async fn users(State(shared): State<Arc<Shared>>) -> Answered<Vec<UserInfo>> {
    let users = shared
        .act(|peer, _| {
            let describe =
                |(id, user): (&p2pit_protocol::UserId, &p2pit_protocol::roster::User)| UserInfo {
                    user: *id,
                    name: user.username.to_string(),
                    full_name: user.full_name.clone(),
                    email: user.email.clone(),
                    admin: user.admin,
                };
            peer.roster().state().users.iter().map(describe).collect::<Vec<_>>()
        })
        .await?;
    Ok(Json(users))
}

async fn draft(
    State(shared): State<Arc<Shared>>,
    Json(request): Json<DraftRequest>,
) -> Answered<DraftReply> {
    let device = shared.device();
    let draft = shared
        .act(move |peer, now| {
            let author = Author::User(request.user);
            let mut kind = request.kind;
            // Who leaves need not know by which claims it is a member.
            if let Kind::Leave(leave) = &mut kind
                && leave.claims.is_empty()
                && let Some(node) = peer.roster().state().nodes.get(&leave.node)
            {
                leave.claims = node.claims.iter().copied().take(NODE_CLAIMS_MAX).collect();
            }
            peer.roster().draft(author, device, kind, now.wall_ms)
        })
        .await?
        .map_err(|e| Failure::request(e.into()))?;
    Ok(Json(DraftReply { draft: draft.bytes().to_vec() }))
}

async fn statements(
    State(shared): State<Arc<Shared>>,
    Json(signed): Json<SignedBytes>,
) -> Answered<BTreeMap<(), ()>> {
    shared
        .act(move |peer, now| peer.say(signed, now))
        .await?
        .map_err(|e| Failure::request(e.into()))?;
    Ok(Json(BTreeMap::new()))
}

// ---- submission -----------------------------------------------------------------------

async fn plan(State(shared): State<Arc<Shared>>, Json(plan): Json<Plan>) -> Answered<Planned> {
    let request: ClusterRequest = plan
        .request
        .parse()
        .map_err(|e: p2pit_protocol::request::ParseError| Failure::request(e.into()))?;
    let user = plan.user;
    let mut salt = [0; 32];
    getrandom::fill(&mut salt)
        .map_err(|e| Failure::broken(anyhow::anyhow!("no randomness: {e}")))?;
    // A node that has just joined or started may not have met anybody yet.
    let is_met = |peer: &Peer, keepers: &[Keeper]| {
        let is_met = |node: PeerId| node == peer.id() || peer.board().is_connected(node);
        keepers.iter().filter(|(node, _)| is_met(*node)).count()
    };
    let keepers_are_met = async {
        loop {
            let heard = shared.heard.notified();
            let met = move |peer: &mut Peer, _| {
                let keepers = peer.propose_keepers(&salt);
                (is_met(peer, &keepers), keepers.len())
            };
            let (met, keepers) = shared.act(met).await?;
            if keepers > 0 && met >= quorum_of(keepers) {
                return Ok::<_, NoPeer>(());
            }
            heard.await;
        }
    };
    // Without one, what there is says why.
    tokio::time::timeout(KEEPER_WITHIN, keepers_are_met).await.unwrap_or(Ok(()))?;
    let (member, keepers, met, planned) = shared
        .act(move |peer, now| {
            let unsatisfiable = peer.feasible(&request).err().map(|why| Unsatisfiable {
                reason: why.reason.to_string(),
                nearest: why.nearest.map(|nearest| nearest.to_string()),
            });
            let candidates = peer.dry_run(&request, now);
            let member = peer.roster().state().is_member_user(user);
            let keepers = peer.propose_keepers(&salt);
            let met = is_met(peer, &keepers);
            let is_full = |node: PeerId| peer.board().get(node).is_some_and(|it| it.advert.full);
            let full: Vec<PeerId> =
                keepers.iter().map(|(node, _)| *node).filter(|node| is_full(*node)).collect();
            (member, keepers, met, (peer.pool(), now.wall_ms, unsatisfiable, candidates, full))
        })
        .await?;
    if !member {
        return Err(Failure::hinted(
            format!("user {user} is not a user of this pool"),
            "join it with a ticket, or name another key with `--identity`",
        ));
    }
    if met == 0 {
        return Err(Failure::hinted(
            "no node that keeps jobs can be reached from here".to_owned(),
            "`p2pit show nodes` says which nodes are offline; one that is no client must be on",
        ));
    }
    if met < quorum_of(keepers.len()) {
        let names: Vec<String> = keepers.iter().map(|(node, _)| shared.label(*node)).collect();
        return Err(Failure::hinted(
            format!(
                "a job needs a majority of {} to keep it, and only {met} can be reached",
                names.join(", ")
            ),
            "`p2pit show nodes` says which nodes are offline; a node that is gone for good \
             counts no more half an hour after it was heard last",
        ));
    }
    let (pool, wall_ms, unsatisfiable, candidates, full) = planned;
    let notes = notes_of_full(full.len() == keepers.len(), &full, |node| shared.label(node));
    Ok(Json(Planned { pool, wall_ms, keepers, unsatisfiable, candidates, notes }))
}

/// What the submitter should know where keepers have no room.
fn notes_of_full(all: bool, full: &[PeerId], label: impl Fn(PeerId) -> String) -> Vec<String> {
    if full.is_empty() {
        return Vec::new();
    }
    let names: Vec<String> = full.iter().map(|node| label(*node)).collect();
    let names = names.join(", ");
    let next = "`p2pit show node:NAME` says what takes it, `p2pit rm` removes what finished jobs \
                left";
    vec![if all {
        format!("no node that would keep the job has room for more content ({names}): {next}")
    } else {
        format!("{names} would keep the job and has no room for more content: {next}")
    }]
}

async fn missing(
    State(shared): State<Arc<Shared>>,
    Json(ids): Json<Vec<BlobId>>,
) -> Answered<Vec<BlobId>> {
    let store = shared.store.clone();
    let missing = tokio::task::spawn_blocking(move || exchange::missing(&store, ids)).await;
    Ok(Json(missing.map_err(|e| Failure::broken(e.into()))?))
}

async fn upload(State(shared): State<Arc<Shared>>, body: Body) -> Answered<Uploaded> {
    take_in(&shared.store, shared.id(), body).await.map(Json)
}

async fn take_in(store: &BlobStore, me: PeerId, body: Body) -> Result<Uploaded, Failure> {
    let mut reader = StreamReader::new(body.into_data_stream().map_err(std::io::Error::other));
    let received = match exchange::receive_any(store, me, &mut reader).await {
        Ok(received) => received,
        Err(reason) => {
            // The answer goes out at once. A body that nobody reads would close the connection
            // under a client that still writes, which would see that instead of the answer.
            tokio::spawn(async move {
                let mut rest = reader.take(DRAIN_BYTES_MAX);
                // Where the body breaks off, nobody waits for anything.
                let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
            });
            return Err(Failure::broken(reason.into()));
        }
    };
    match reader.read(&mut [0]).await {
        Ok(0) => Ok(Uploaded { blobs: received.blobs, bytes: received.bytes }),
        Ok(_) => Err(Failure::request(anyhow::anyhow!("there is more than the blobs"))),
        Err(e) => Err(Failure::broken(e.into())),
    }
}

async fn submit(State(shared): State<Arc<Shared>>, Json(submit): Json<Submit>) -> Response {
    let (events, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let carried = tokio::select! {
            carried = carry(&shared, submit.spec, &events) => carried,
            () = shared.out_of_room() => Err(Failure::no_room(&shared.home)),
        };
        let last = carried.unwrap_or_else(|failure| SubmitEvent::Refused { error: failure.0 });
        // The command may have been interrupted; a submission that was sent stands.
        let _ = events.send(last).await;
    });
    ndjson(tokio_stream(receiver))
}

/// Bring the inputs to two keepers, then submit.
async fn carry(
    shared: &Arc<Shared>,
    signed: SignedBytes,
    events: &mpsc::Sender<SubmitEvent>,
) -> Result<SubmitEvent, Failure> {
    let spec = VerifiedSpec::verify(signed.clone()).map_err(|e| Failure::request(e.into()))?;
    let job = spec.job;
    let keepers: Vec<PeerId> = spec.spec.keepers.iter().map(|(keeper, _)| *keeper).collect();
    // What was found to be here when the command asked stays here.
    let _in_use = shared.store.begin_use();
    // To the end, whether or not anybody waits for it.
    let _under_way = shared.begin_submission(job, keepers.clone());
    let report = |pushed: push::Pushed| {
        // Progress is for watching: what does not fit in the queue is not missed.
        let _ = events.try_send(SubmitEvent::Transferring {
            blobs_done: 0,
            bytes_done: pushed.bytes_done,
            blobs: pushed.blobs,
            bytes: pushed.bytes,
        });
    };
    let note = |text| {
        // As above: what matters is what comes of it.
        let _ = events.try_send(SubmitEvent::Note { text });
    };
    let sent = push::spread(shared, &spec, &keepers, report, note).await;
    let sent = sent.map_err(Failure::undelivered)?;
    let submitted = shared.submit(signed).await;
    match submitted.map_err(|e| Failure::request(anyhow::Error::msg(e)))? {
        Ok(()) => Ok(SubmitEvent::Submitted {
            job,
            // It is submitted, whatever becomes of this daemon.
            online: online(shared, keepers.clone()).await.unwrap_or(0),
            keepers,
            blobs_sent: sent.blobs,
            bytes_sent: sent.bytes,
            blobs_there: sent.there,
        }),
        Err(SubmitError::Refused(reason)) => Err(Failure::request(anyhow::Error::msg(reason))),
        Err(SubmitError::Unknown) => Ok(SubmitEvent::Unknown { job }),
    }
}

/// How many of these nodes can be reached.
async fn online(shared: &Arc<Shared>, nodes: Vec<PeerId>) -> Result<usize, NoPeer> {
    let is_online =
        |peer: &Peer, node: PeerId| node == peer.id() || peer.board().is_connected(node);
    shared.act(move |peer, _| nodes.into_iter().filter(|node| is_online(peer, *node)).count()).await
}

// ---- jobs -----------------------------------------------------------------------------

async fn resolve(
    State(shared): State<Arc<Shared>>,
    Json(resolve): Json<Resolve>,
) -> Answered<Resolved> {
    let (user, wanted) = (resolve.user, resolve.text.to_ascii_lowercase());
    let is_last = wanted == "@last";
    if !is_last && wanted.len() < SHORT_MIN {
        return Err(Failure::hinted(
            format!("`{}` is too short for a job: at least {SHORT_MIN} characters", resolve.text),
            "`p2pit show jobs` lists them",
        ));
    }
    let wanted_id: Option<JobId> = wanted.parse().ok();
    let submitted = if is_last { Vec::new() } else { shared.submitted(&wanted) };
    let (heads, mut all, kept, connected) = shared
        .act(move |peer, _| {
            let all: Vec<String> = peer.heads().map(|head| head.job.to_string()).collect();
            let matches = |head: &&p2pit_protocol::message::Head| {
                if is_last { head.owner == user } else { head.job.to_string().starts_with(&wanted) }
            };
            let mut heads: Vec<_> = peer.heads().filter(matches).cloned().collect();
            if is_last {
                heads.sort_by_key(|head| core::cmp::Reverse((head.submitted_at_ms, head.job)));
                heads.truncate(1);
            }
            // After a start nobody may have announced them here yet.
            let kept: Vec<(JobId, Vec<PeerId>)> = peer
                .records()
                .filter(|(job, _)| !is_last && job.to_string().starts_with(&wanted))
                .map(|(job, kept)| (*job, kept.keepers.iter().map(|(node, _)| *node).collect()))
                .collect();
            let connected: std::collections::BTreeSet<PeerId> =
                peer.board().connected().chain([peer.id()]).collect();
            (heads, all, kept, connected)
        })
        .await?;
    let is_announced = |job: &JobId| heads.iter().any(|head| head.job == *job);
    let submitted = submitted.into_iter().filter(|known| !is_announced(&known.job));
    let mut is_under_way = false;
    let mut found: Vec<(JobId, Vec<PeerId>)> = submitted
        .inspect(|known| is_under_way |= known.is_under_way())
        .map(|known| (known.job, known.keepers))
        .collect();
    all.extend(found.iter().map(|(job, _)| job.to_string()));
    found.extend(heads.iter().map(|head| (head.job, keepers_of(head))));
    for (job, keepers) in kept {
        if !found.iter().any(|(known, _)| *known == job) {
            all.push(job.to_string());
            found.push((job, keepers));
        }
    }
    match found.as_slice() {
        [] if is_last => Err(Failure::hinted(
            "you have no job in this pool".to_owned(),
            "`p2pit run` submits one",
        )),
        [] => match wanted_id {
            // Its keepers know whether it exists, announced or not.
            Some(job) => Ok(Json(Resolved {
                job,
                short: short_of(&job.to_string(), &all),
                keepers: Vec::new(),
                is_under_way,
            })),
            None => Err(Failure::hinted(
                format!("no job `{}` is known here", resolve.text),
                "`p2pit show jobs` lists them; a job submitted elsewhere a moment ago may need a \
                 second",
            )),
        },
        [(job, keepers)] => Ok(Json(Resolved {
            job: *job,
            short: short_of(&job.to_string(), &all),
            keepers: connected_first(keepers.clone(), &connected),
            is_under_way,
        })),
        several => {
            let jobs: Vec<String> = several.iter().map(|(job, _)| job.to_string()).collect();
            Err(ambiguous(&resolve.text, &jobs, &all))
        }
    }
}

/// In the same order otherwise: who is off is waited for last.
fn connected_first(
    mut keepers: Vec<PeerId>,
    connected: &std::collections::BTreeSet<PeerId>,
) -> Vec<PeerId> {
    keepers.sort_by_key(|keeper| !connected.contains(keeper));
    keepers
}

fn ambiguous(text: &str, jobs: &[String], all: &[String]) -> Failure {
    let mut names: Vec<String> =
        jobs.iter().take(CANDIDATES_MAX).map(|job| short_of(job, all)).collect();
    if jobs.len() > names.len() {
        names.push("…".to_owned());
    }
    Failure::hinted(
        format!("`{text}` can be any of {} jobs: {}", jobs.len(), names.join(", ")),
        "give more characters; `p2pit show jobs` says which is which",
    )
}

fn short_of(id: &str, all: &[String]) -> String {
    let shared_with = |other: &&String| other.as_str() != id;
    let longest = all
        .iter()
        .filter(shared_with)
        .map(|other| other.bytes().zip(id.bytes()).take_while(|(a, b)| a == b).count())
        .max()
        .unwrap_or(0);
    id.chars().take((longest + 1).max(SHORT_MIN)).collect()
}

async fn keepers(State(shared): State<Arc<Shared>>) -> Answered<Audience> {
    let (pool, wall_ms, nodes, jobs, kept) = shared
        .act(|peer, now| {
            let kept: Vec<(JobId, Vec<PeerId>)> =
                peer.heads().map(|head| (head.job, keepers_of(head))).collect();
            let mut nodes: std::collections::BTreeSet<PeerId> =
                kept.iter().flat_map(|(_, keepers)| keepers).copied().collect();
            // A job born a moment ago is known to its keepers before its head is to us.
            nodes.extend(peer.board().connected().filter(|node| {
                peer.board().get(*node).is_some_and(|posted| !posted.advert.client)
            }));
            nodes.insert(peer.id());
            let jobs: Vec<JobId> = kept.iter().map(|(job, _)| *job).collect();
            (peer.pool(), now.wall_ms, nodes, jobs, kept)
        })
        .await?;
    let mut texts: Vec<(String, JobId)> =
        jobs.into_iter().map(|job| (job.to_string(), job)).collect();
    texts.sort();
    let neighbours = |at: usize| {
        let before = at.checked_sub(1).and_then(|at| texts.get(at));
        [before, texts.get(at + 1)]
            .into_iter()
            .flatten()
            .map(|(text, _)| text.clone())
            .collect::<Vec<_>>()
    };
    let short = texts
        .iter()
        .enumerate()
        .map(|(at, (text, job))| (*job, short_of(text, &neighbours(at))))
        .collect();
    let nodes = nodes.into_iter().collect();
    Ok(Json(Audience { pool, wall_ms, nodes, short, keepers: kept }))
}

async fn ask(State(shared): State<Arc<Shared>>, Json(ask): Json<Ask>) -> Answered<Vec<Answer>> {
    let within = ask.within_ms.map_or(ASK_TIMEOUT, Duration::from_millis);
    let asked = ask.nodes.into_iter().map(|node| {
        let (shared, signed) = (Arc::clone(&shared), ask.signed.clone());
        async move {
            let answered = if node == shared.id() {
                serve::user(&shared, signed).await
            } else {
                let question = Request::User(signed);
                let asked = shared.ask_within::<UserAnswer>(node, &question, within).await;
                asked.map_err(anyhow::Error::from)
            };
            match answered {
                Ok(answer) => Answer {
                    node,
                    reply: Some(answer.reply),
                    error: None,
                    readings: answer.readings,
                    space: answer.space,
                },
                Err(reason) => Answer {
                    node,
                    reply: None,
                    error: Some(format!("{reason:#}")),
                    readings: Vec::new(),
                    space: None,
                },
            }
        }
    });
    Ok(Json(futures::future::join_all(asked).await))
}

async fn watch(
    State(shared): State<Arc<Shared>>,
    Json(watch): Json<Watch>,
) -> Result<Response, Failure> {
    if watch.node == shared.id() {
        let views = Views::open(&shared, watch.signed).await.map_err(Failure::request)?;
        let stream = stream::try_unfold(views, |mut views| async {
            Ok(views.next().await?.map(|view| (view, views)))
        });
        return Ok(ndjson(until_broken(stream)));
    }
    let (_, receive) = shared.open(watch.node, &Request::Watch(watch.signed)).await?;
    let stream = stream::try_unfold(receive, |mut receive| async {
        match frame::read_message::<JobView>(&mut receive, usize::MAX).await {
            Ok(view) => Ok(Some((view, receive))),
            Err(frame::Error::Closed) => Ok(None),
            Err(reason) => Err(anyhow::Error::from(reason)),
        }
    });
    Ok(ndjson(until_broken(stream)))
}

async fn log(State(shared): State<Arc<Shared>>, Json(log): Json<Log>) -> Result<Response, Failure> {
    if log.node == shared.id() {
        let reader = LogReader::open(&shared, log.signed, log.parts, log.follow).await;
        let stream = stream::try_unfold(reader.map_err(Failure::request)?, |mut reader| async {
            anyhow::Ok(reader.next().await?.map(|it| (Bytes::from(it.encode()), reader)))
        });
        return Ok(octets(stream));
    }
    let request = Request::Log { signed: log.signed, parts: log.parts, follow: log.follow };
    Ok(octets(rest_of(open_within(ASK_TIMEOUT, &shared, log.node, &request).await?)))
}

async fn logs(State(shared): State<Arc<Shared>>, Json(logs): Json<Logs>) -> Answered<Vec<Held>> {
    if logs.node == shared.id() {
        let held = logs::held(&shared, logs.signed).await.map_err(Failure::request)?;
        return Ok(Json(held));
    }
    let request = Request::Logs(logs.signed);
    let mut receive = open_within(ASK_TIMEOUT, &shared, logs.node, &request).await?;
    let bytes = receive
        .read_to_end(LOGS_BYTES_MAX)
        .await
        .context("the node's list of logs broke off")
        .map_err(Failure::broken)?;
    let held = serde_json::from_slice(&bytes).context("the node's list of logs is not in order");
    Ok(Json(held.map_err(Failure::broken)?))
}

/// A hundred bytes of JSON a log.
const LOGS_BYTES_MAX: usize = 64 << 20;

async fn files(State(shared): State<Arc<Shared>>, Json(files): Json<Files>) -> Answered<JobFiles> {
    let Files { node, signed, copies } = files;
    if node == shared.id() {
        let files = serve::job_files(&shared, signed, copies).await;
        return Ok(Json(files.map_err(Failure::request)?));
    }
    let request = Request::Files { signed, copies };
    let mut receive = open_within(FILES_WITHIN, &shared, node, &request).await?;
    let bytes = receive
        .read_to_end(FILES_BYTES_MAX)
        .await
        .context("the node's list of files broke off")
        .map_err(Failure::broken)?;
    let answered: JobFiles = serde_json::from_slice(&bytes)
        .context("the node's list of files is not in order")
        .map_err(Failure::broken)?;
    Ok(Json(JobFiles { node, ..answered }))
}

/// Manifests of all ranks of one node, as base64 in JSON.
const FILES_BYTES_MAX: usize = 256 << 20;

async fn fetch(
    State(shared): State<Arc<Shared>>,
    Json(fetch): Json<Fetch>,
) -> Result<Response, Failure> {
    if fetch.node == shared.id() {
        let allowed = serve::allow_blobs(&shared, fetch.signed, &fetch.asks).await;
        let source: Arc<dyn Source> = Arc::new(allowed.map_err(Failure::request)?);
        let (reader, mut writer) = tokio::io::duplex(1 << 20);
        tokio::spawn(async move {
            let unlimited = Pace::unlimited();
            let sent =
                exchange::send_blobs(source, fetch.asks, &mut writer, &unlimited, |_| {}).await;
            // The reader sees the stream end too early, and says so.
            if let Err(reason) = sent {
                warn!(reason = format!("{:#}", anyhow::Error::from(reason)), "files were not sent");
            }
        });
        return Ok(octets(
            tokio_util::io::ReaderStream::with_capacity(reader, 256 << 10)
                .map_err(anyhow::Error::from),
        ));
    }
    let (mut send, receive) = shared.open_copy(fetch.node, &Request::Blobs(fetch.signed)).await?;
    let asked = async {
        exchange::write_asks(&mut send, &fetch.asks).await?;
        send.finish()?;
        anyhow::Ok(())
    };
    asked.await.map_err(Failure::broken)?;
    let receive = open_gate(&shared, fetch.node, receive).await?;
    let stream = rest_of(receive).and_then(move |bytes: Bytes| {
        let shared = Arc::clone(&shared);
        async move {
            shared.bandwidth.download.take(bytes.len() as u64).await;
            Ok(bytes)
        }
    });
    Ok(octets(stream))
}

async fn pull(State(shared): State<Arc<Shared>>, Json(pull): Json<Pull>) -> Response {
    let (events, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let progress = events.clone();
        let done = Arc::new(AtomicU64::new(0));
        let on_bytes = move |bytes| {
            let bytes_done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            // Progress is for watching: what does not fit in the queue is not missed.
            let _ = progress.try_send(PullEvent::Transferring { bytes_done });
        };
        let last = match bring(&shared, pull, on_bytes).await {
            Ok((blobs, bytes)) => PullEvent::Pulled { blobs, bytes },
            Err(FetchError::Denied(why)) => {
                PullEvent::Failed { error: Failure::request(anyhow::Error::msg(why)).0 }
            }
            Err(reason) => PullEvent::Failed { error: Failure::broken(reason.into()).0 },
        };
        // The command may have been interrupted; what came is kept.
        let _ = events.send(last).await;
    });
    ndjson(tokio_stream(receiver))
}

async fn bring(
    shared: &Arc<Shared>,
    pull: Pull,
    on_bytes: impl Fn(u64) + Clone + Send + 'static,
) -> Result<(u64, u64), FetchError> {
    let Pull { nodes, signed, blobs } = pull;
    let sources = nodes.into_iter().filter(|node| *node != shared.id()).collect();
    let (request, blobs) = (Request::Blobs(signed), Blobs::Known(blobs));
    let bringing = BlobFetch { request, gated: true, sources, blobs };
    fetch_blobs(shared, bringing, on_bytes, async || true).await
}

async fn survey(
    State(shared): State<Arc<Shared>>,
    Json(survey): Json<Survey>,
) -> Answered<Surveyed> {
    let surveyed = if survey.node == shared.id() {
        serve::survey(&shared, survey.signed).await.map_err(|e| format!("{e:#}"))
    } else {
        shared.ask(survey.node, &Request::Survey(survey.signed)).await?
    };
    surveyed.map(Json).map_err(|reason| Failure::request(anyhow::Error::msg(reason)))
}

async fn recover(
    State(shared): State<Arc<Shared>>,
    Json(recover): Json<Recover>,
) -> Answered<BTreeMap<(), ()>> {
    let recovered: Result<(), String> = if recover.node == shared.id() {
        serve::recover(&shared, recover.signed).await.map_err(|e| format!("{e:#}"))
    } else {
        shared.ask(recover.node, &Request::Recover(recover.signed)).await?
    };
    recovered.map_err(|reason| Failure::request(anyhow::Error::msg(reason)))?;
    Ok(Json(BTreeMap::new()))
}

/// Ask a node for what it has of a job. One that died without a word is given up sooner than its
/// connection is: others have copies.
async fn open_within(
    within: Duration,
    shared: &Arc<Shared>,
    node: PeerId,
    request: &Request,
) -> Result<RecvStream, Failure> {
    let opened = async {
        let (_, receive) = shared.open(node, request).await?;
        open_gate(shared, node, receive).await
    };
    let silent = |_| Failure::from(ReachError::Silent(shared.label(node)));
    tokio::time::timeout(within, opened).await.map_err(silent)?
}

async fn open_gate(
    shared: &Shared,
    node: PeerId,
    mut receive: RecvStream,
) -> Result<RecvStream, Failure> {
    match frame::read_message::<Gate>(&mut receive, usize::MAX).await {
        Ok(gate) => gate.pass().map(|()| receive).map_err(Failure::request),
        Err(reason) => Err(ReachError::Answer(shared.label(node), reason).into()),
    }
}

// ---- streams and errors ---------------------------------------------------------------

fn rest_of(receive: RecvStream) -> impl Stream<Item = anyhow::Result<Bytes>> + Send {
    stream::try_unfold(receive, |mut receive| async {
        let chunk = receive.read_some(256 << 10).await?;
        Ok(chunk.map(|chunk| (chunk, receive)))
    })
}

fn octets(stream: impl Stream<Item = anyhow::Result<Bytes>> + Send + 'static) -> Response {
    let body = Body::from_stream(stream.inspect_err(|reason| {
        warn!(reason = format!("{reason:#}"), "a stream broke off");
    }));
    ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response()
}

fn ndjson<T: serde::Serialize>(stream: impl Stream<Item = T> + Send + 'static) -> Response {
    let lines = stream.map(|value| {
        let mut line = serde_json::to_vec(&value).map_err(std::io::Error::other)?;
        line.push(b'\n');
        Ok::<_, std::io::Error>(Bytes::from(line))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// The values up to the first error, which the reader sees as an early end.
fn until_broken<T: Send>(
    stream: impl Stream<Item = anyhow::Result<T>> + Send,
) -> impl Stream<Item = T> + Send {
    stream
        .map(|value| {
            value.inspect_err(|reason| warn!(reason = format!("{reason:#}"), "a stream broke off"))
        })
        .take_while(|value| std::future::ready(value.is_ok()))
        .filter_map(|value| std::future::ready(value.ok()))
}

fn tokio_stream<T: Send>(receiver: mpsc::Receiver<T>) -> impl Stream<Item = T> + Send {
    stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|v| (v, receiver)) })
}

/// What a request failed of.
#[derive(Debug)]
struct Failure(ApiError);

impl Failure {
    fn request(reason: anyhow::Error) -> Self {
        if is_disk_full(&reason) {
            return Self::broken(reason);
        }
        let refusal = reason.downcast_ref::<ShutOut>().map(|ShutOut(refusal)| refusal.code);
        Self(ApiError { error: format!("{reason:#}"), hint: None, broken: false, refusal })
    }

    fn hinted(error: String, hint: &str) -> Self {
        Self(ApiError { error, hint: Some(hint.to_owned()), broken: false, refusal: None })
    }

    fn broken(reason: anyhow::Error) -> Self {
        let hint = room_hint(&reason);
        Self(ApiError { error: format!("{reason:#}"), hint, broken: true, refusal: None })
    }
}

/// What to do where something could not be written for want of room.
pub fn room_hint(reason: &anyhow::Error) -> Option<String> {
    let refused = reason.chain().find_map(|cause| {
        let inner = cause.downcast_ref::<std::io::Error>()?.get_ref()?;
        inner.downcast_ref::<NoRoom>()
    });
    match refused {
        Some(no_room) => Some(no_room.next_step()),
        None if is_disk_full(reason) => Some(
            "free some space on that disk, or remove finished jobs with `p2pit rm JOB`, and try \
             again"
                .to_owned(),
        ),
        None => None,
    }
}

impl Failure {
    /// A job's inputs did not get to enough of its keepers; nothing is submitted.
    fn undelivered(reason: anyhow::Error) -> Self {
        let mut failure = Self::request(reason);
        failure.0.hint.get_or_insert_with(|| {
            "submit it again: what has arrived is not sent again; `p2pit show nodes` says which \
             nodes are online"
                .to_owned()
        });
        failure
    }
}

/// Whether something could not be written for want of room.
pub fn is_disk_full(reason: &anyhow::Error) -> bool {
    use std::io::{Error, ErrorKind};
    let kinds = reason.chain().filter_map(|cause| Some(cause.downcast_ref::<Error>()?.kind()));
    kinds.into_iter().any(|kind| matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
}

impl Failure {
    /// What was asked for is queued, and cannot be taken back.
    fn no_room(home: &Home) -> Self {
        let home = home.path().display();
        Self(ApiError {
            error: format!(
                "the disk of the home {home} is full: the daemon waits for room, and what you asked \
                 for may still be done then"
            ),
            hint: Some(
                "free some space on that disk; `p2pit status` then says what was done, and `p2pit rm \
                 JOB` removes finished jobs"
                    .into(),
            ),
            broken: true,
            refusal: None,
        })
    }
}

impl From<NoPeer> for Failure {
    fn from(reason: NoPeer) -> Self {
        match reason {
            NoPeer::NoPool => Self::hinted(
                "this home is in no pool".to_owned(),
                "`p2pit join TICKET` joins one, `p2pit join` founds one",
            ),
            NoPeer::Ending => Self::broken(reason.into()),
        }
    }
}

impl From<ReachError> for Failure {
    fn from(reason: ReachError) -> Self {
        let mut failure = Self::broken(reason.into());
        failure.0.hint = Some("`p2pit show nodes` says which nodes are online".to_owned());
        failure
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = if self.0.broken { StatusCode::BAD_GATEWAY } else { StatusCode::BAD_REQUEST };
        (status, Json(self.0)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use p2pit_protocol::identity::KeyPair;

    use super::*;

    /// As `exchange::send_blobs` ends every stream.
    const END: &[u8] = &[0; 4];

    async fn take_in_body(body: Body) -> Result<Uploaded, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        let me = PeerId(KeyPair::from_seed(&[1; 32]).public());
        take_in(&store, me, body).await
    }

    async fn take_in_chunks(chunks: Vec<&'static [u8]>) -> (Result<Uploaded, Failure>, bool) {
        let has_ended = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&has_ended);
        let end = stream::poll_fn(move |_| {
            ending.store(true, Ordering::Relaxed);
            std::task::Poll::Ready(None)
        });
        let chunks = stream::iter(chunks.into_iter().map(Ok::<_, std::io::Error>));
        let result = take_in_body(Body::from_stream(chunks.chain(end))).await;
        (result, has_ended.load(Ordering::Relaxed))
    }

    #[test]
    fn a_prefix_of_several_jobs_is_answered_with_the_shortest_unique_ones() {
        let all = ["abcdefx", "abcdey", "abcz", "other"].map(str::to_owned);
        let failure = ambiguous("abc", &all[..3], &all).0;
        assert_eq!(failure.error, "`abc` can be any of 3 jobs: abcdef, abcdey, abcz");
        assert!(failure.hint.is_some() && !failure.broken);
        let many: Vec<String> = (10..30).map(|n| format!("abc{n}")).collect();
        let failure = ambiguous("abc", &many, &many).0;
        assert!(failure.error.contains("20 jobs: abc10") && failure.error.ends_with("abc19, …"));
    }

    #[test]
    fn keepers_without_room_are_named_before_a_submission() {
        let node = |n: u8| PeerId(KeyPair::from_seed(&[n; 32]).public());
        let label = |it: PeerId| format!("node n{}", if it == node(1) { 1 } else { 2 });
        assert!(notes_of_full(false, &[], label).is_empty());
        let some = notes_of_full(false, &[node(1)], label);
        assert!(some[0].starts_with("node n1 would keep the job and has no room"), "{some:?}");
        let all = notes_of_full(true, &[node(1), node(2)], label);
        assert!(all[0].contains("no node that would keep") && all[0].contains("p2pit rm"));
    }

    #[tokio::test]
    async fn an_upload_is_answered_once_its_body_has_ended() {
        let (result, has_ended) = take_in_chunks(vec![END]).await;
        assert_eq!(result.unwrap().blobs, 0);
        assert!(has_ended);
        let (result, _) = take_in_chunks(vec![END, b"more"]).await;
        assert!(!result.unwrap_err().0.broken);
    }

    #[tokio::test]
    async fn a_refused_upload_is_answered_at_once_and_read_on_only_so_far() {
        let (chunks, body) = mpsc::channel(1);
        let taking = tokio::spawn(take_in_body(Body::from_stream(
            tokio_stream(body).map(Ok::<_, std::io::Error>),
        )));
        let no_blob = Bytes::from_static(b"\0\0\0\x01\x07");
        chunks.send(no_blob).await.unwrap();
        assert!(taking.await.unwrap().unwrap_err().0.broken);
        let mut read = 0;
        let chunk = Bytes::from(vec![0; 1 << 20]);
        while chunks.send(chunk.clone()).await.is_ok() {
            read += chunk.len() as u64;
        }
        // One more waits in the queue, one is being read.
        assert!((DRAIN_BYTES_MAX..=DRAIN_BYTES_MAX + (2 << 20)).contains(&read), "{read}");
    }
}
