//! What the daemon and its clients say over the unix socket, as JSON.
//!
//! Paths are in [`path`]. Errors are [`ApiError`] with a status of 4xx or 5xx. Streams are
//! lines of JSON (`application/x-ndjson`), one value each, unless said otherwise.

use std::net::SocketAddr;

use p2pit_protocol::{
    BlobId, JobId, PeerId, PoolId, StoreId, UserId,
    door::RefusalCode,
    identity::SignedBytes,
    inventory::{Capacity, GpuUuid},
    message::{GpuState, JobView, NodeView, Reach, Reply},
    record::Ballot,
    roster::{DeviceId, Kind},
};
use serde::{Deserialize, Serialize};

use super::log;
use crate::transfer::exchange;

/// The paths of the API.
pub mod path {
    /// GET → [`super::Me`].
    pub const ME: &str = "/v1/me";
    /// POST [`super::Found`] → [`super::Me`]: found a pool. Only while the node has none.
    pub const FOUND: &str = "/v1/found";
    /// POST [`super::Join`] → [`super::Me`]: join a pool. Only while the node has none.
    pub const JOIN: &str = "/v1/join";
    /// GET → `Vec<`[`super::LanNode`]`>`: p2pit nodes that answer on the local network.
    pub const LAN: &str = "/v1/lan";
    /// POST: end the daemon; jobs go on below their supervisors.
    pub const SHUTDOWN: &str = "/v1/shutdown";
    /// POST → [`super::HandedOver`]: other keepers drive what this node drives, as before it
    /// leaves the pool.
    pub const HAND_OVER: &str = "/v1/hand-over";
    /// POST → [`super::Parting`]: what of jobs only this node has; others are asked to copy it.
    pub const PARTING: &str = "/v1/parting";
    /// GET → `Vec<`[`super::NodeInfo`]`>`.
    pub const NODES: &str = "/v1/nodes";
    /// GET → `Vec<`[`super::UserInfo`]`>`.
    pub const USERS: &str = "/v1/users";
    /// POST [`super::DraftRequest`] → [`super::DraftReply`]: a statement to be signed.
    pub const DRAFT: &str = "/v1/draft";
    /// POST [`super::SignedBytes`] → `{}`: take in the signed draft.
    pub const STATEMENTS: &str = "/v1/statements";
    /// POST [`super::Plan`] → [`super::Planned`]: whom a request would be asked of.
    pub const PLAN: &str = "/v1/plan";
    /// POST `Vec<BlobId>` → `Vec<BlobId>`: those the daemon does not have.
    pub const MISSING: &str = "/v1/blobs/missing";
    /// POST a stream of blobs as `transfer::exchange::send_blobs` writes it →
    /// [`super::Uploaded`].
    pub const UPLOAD: &str = "/v1/blobs";
    /// POST [`super::Submit`] → stream of [`super::SubmitEvent`].
    pub const SUBMIT: &str = "/v1/jobs";
    /// POST [`super::Resolve`] → [`super::Resolved`]: which job a text means.
    pub const RESOLVE: &str = "/v1/resolve";
    /// GET → [`super::Audience`]: who has to be asked for the jobs of the pool.
    pub const KEEPERS: &str = "/v1/keepers";
    /// POST [`super::Ask`] → `Vec<`[`super::Answer`]`>`: put a signed request to nodes.
    pub const ASK: &str = "/v1/ask";
    /// POST [`super::Watch`] → stream of `JobView`, one at once and one for each change,
    /// until the job is done. The signed command is `Job`.
    pub const WATCH: &str = "/v1/watch";
    /// POST [`super::Log`] → the log lines of the job that the node has, as
    /// [`super::super::log::Chunk`]s; with `follow` until its ranks there have ended. The signed
    /// command is `Log`.
    pub const LOG: &str = "/v1/log";
    /// POST [`super::Logs`] → `Vec<`[`super::super::log::Held`]`>`: which logs of the job the
    /// node has. The signed command is `Log`.
    pub const LOGS: &str = "/v1/logs";
    /// POST [`super::Files`] → [`super::JobFiles`]: the trees of the ranks of one node.
    /// The signed command is `Files`.
    pub const FILES: &str = "/v1/files";
    /// POST [`super::Fetch`] → blobs as `transfer::exchange::send_blobs` writes them. The
    /// signed command is `Files`.
    pub const FETCH: &str = "/v1/fetch";
    /// POST [`super::Pull`] → lines of [`super::PullEvent`]: such blobs, into the daemon's
    /// store.
    pub const PULL: &str = "/v1/pull";
    /// POST [`super::Survey`] → [`super::Surveyed`]: what a node has of a record whose keepers
    /// are lost. The signed command is `Job`.
    pub const SURVEY: &str = "/v1/survey";
    /// POST → [`super::Checkup`]: try what works here and with others. Takes some seconds.
    pub const DOCTOR: &str = "/v1/doctor";
    /// POST [`super::Recover`] → `{}`: go on from what that node has.
    pub const RECOVER: &str = "/v1/recover";
}

/// An error, as every path answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What went wrong, naming the thing.
    pub error: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the request was at fault (exit code 1) or something broke (2).
    pub broken: bool,
    /// The rule by which a pool's door refused, where one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<RefusalCode>,
}

/// This node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Me {
    pub version: String,
    pub pid: u32,
    pub home: String,
    pub node: PeerId,
    pub store: StoreId,
    /// The home's id for statements its users sign.
    pub device: DeviceId,
    /// The node's short name; empty until it is a member.
    pub name: String,
    pub owner: Option<UserId>,
    pub client: bool,
    pub pool: Option<PoolInfo>,
    /// Where libp2p listens, and where the data plane does; addresses at which others reach
    /// it from outside first.
    pub control: Vec<SocketAddr>,
    pub data: Vec<SocketAddr>,
    /// Whether others can dial it.
    pub dialled: Reach,
    pub connected: usize,
    pub capacity: Capacity,
    /// Why only the owner's jobs run here; `None` where everybody's do.
    pub owner_only: Option<String>,
    /// How jobs are kept apart: `namespaces`, or what is missing for them.
    pub isolation: String,
    /// Jobs this node has work of: promised rooms, processes, ends that are not recorded yet.
    pub working_for: Vec<JobId>,
    /// GPUs that another daemon of this machine offers already.
    pub locked_gpus: Vec<String>,
    /// Milliseconds since the epoch, by the daemon's clock.
    pub wall_ms: u64,
    /// What the journal wrote since the daemon started.
    pub journal: Journalled,
    /// What takes room here.
    pub space: Space,
    /// What the owner should know: clock, disk, rebuilt indexes.
    pub warnings: Vec<String>,
}

/// What p2pit takes of a disk, in bytes, and what it may.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Content, of inputs and of what jobs left.
    pub blobs: u64,
    /// Directories of jobs that run or ran here.
    pub jobs: u64,
    /// Logs of ranks that ran elsewhere.
    pub copies: u64,
    /// What nobody needs any more, and can still be had back.
    pub trash: u64,
    /// `storage` of the configuration.
    pub quota: Option<u64>,
    /// What can still be brought, the trash given up.
    pub room: u64,
    /// Of the file system.
    pub disk_free: u64,
    pub disk_total: u64,
    /// Others get new copies and inputs instead.
    pub full: bool,
    /// Before the first count all but the disk is 0.
    pub is_counted: bool,
}

impl Space {
    /// Everything that p2pit takes.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.blobs + self.jobs + self.copies + self.trash
    }
}

/// One fsync serves all entries that wait for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journalled {
    pub entries: u64,
    pub fsyncs: u64,
}

/// What was tried, and what came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkup {
    pub findings: Vec<Finding>,
}

/// What came of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// One word for what was tried; several findings may have the same.
    pub check: String,
    pub severity: Severity,
    /// What is so, and what does not work because of it.
    pub finding: String,
    /// What to do about it; `None` where there is nothing to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Ok,
    /// It works, though not in the best way, or within limits.
    Note,
    /// Something does not work.
    Warning,
    /// This node cannot take part as it is.
    Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolInfo {
    pub id: PoolId,
    pub name: String,
    pub nodes: usize,
    pub users: usize,
}

/// Found a pool: the user signs the genesis and the node's admission in the CLI.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Found {
    /// The encoded genesis.
    #[serde(with = "serde_bytes_base64")]
    pub genesis: Vec<u8>,
    /// The encoded `JoinClaim` signed by the founder; the node countersigns and admits
    /// itself.
    pub claim: SignedBytes,
    pub node_name: String,
}

/// Join a pool: the user signs the claim in the CLI, the node countersigns it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Join {
    /// The ticket's text.
    pub ticket: String,
    /// The encoded `JoinClaim` signed by the joining user.
    pub claim: SignedBytes,
    /// Doors to try besides those of the ticket.
    pub peers: Vec<SocketAddr>,
}

/// A p2pit node that answered on the local network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LanNode {
    pub node: PeerId,
    pub door: Vec<SocketAddr>,
}

/// A node of the pool as this one knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeInfo {
    pub node: PeerId,
    pub name: String,
    pub owner: UserId,
    pub owner_name: String,
    pub client: bool,
    /// Offers nothing now, although it is no client: a command has started it for itself.
    pub away: bool,
    /// `self`, `online`, or `offline`.
    pub reach: String,
    /// Seconds since its last advert; `None` where none is known.
    pub advert_age_s: Option<u64>,
    pub capacity: Capacity,
    pub not_free: Vec<(GpuUuid, GpuState)>,
    pub free_cpu_cores: u32,
    pub free_ram_mib: u64,
    pub owner_only: Option<String>,
    /// Has no room for more content.
    pub full: bool,
    pub control: Vec<SocketAddr>,
    pub data: Vec<SocketAddr>,
    /// Whether others can dial it.
    pub dialled: Reach,
    /// Members that pass on for it.
    pub relays: Vec<PeerId>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UserInfo {
    pub user: UserId,
    pub name: String,
    pub full_name: Option<String>,
    pub email: Option<String>,
    pub admin: bool,
}

/// Draft a statement by `user` from this home.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DraftRequest {
    pub user: UserId,
    pub kind: Kind,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DraftReply {
    /// The encoded draft, for `roster::Draft::from_bytes(..).sign(..)`.
    #[serde(with = "serde_bytes_base64")]
    pub draft: Vec<u8>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// In the grammar of cluster requests.
    pub request: String,
    /// Must be a member for the plan to be worth anything.
    pub user: UserId,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Planned {
    pub pool: PoolId,
    /// By the daemon's clock.
    pub wall_ms: u64,
    /// The keepers a submission shall name, the first to drive it; chosen anew for each plan.
    pub keepers: Vec<(PeerId, StoreId)>,
    /// Why the pool could never satisfy it; `None` where it could.
    pub unsatisfiable: Option<Unsatisfiable>,
    /// Nodes that would be called first, with the processes each has room for now.
    pub candidates: Vec<(PeerId, u32)>,
    /// What the submitter should know before, of keepers without room.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Unsatisfiable {
    pub reason: String,
    /// The nearest request that would fit.
    pub nearest: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Uploaded {
    pub blobs: u64,
    pub bytes: u64,
}

/// Submit a job whose blobs the daemon has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Submit {
    /// The spec in `Domain::JobSpec`.
    pub spec: SignedBytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum SubmitEvent {
    /// Inputs travel to keepers: what these lacked, together.
    Transferring { blobs_done: u64, bytes_done: u64, blobs: u64, bytes: u64 },
    /// Something did not go as it should, and it goes on.
    Note { text: String },
    /// A majority of the keepers keeps the record, and two of them have every input, where there
    /// are two. What was sent, and what was there already, is that of the one that lacked most.
    Submitted {
        job: JobId,
        keepers: Vec<PeerId>,
        /// How many of these can be reached.
        online: usize,
        blobs_sent: u64,
        bytes_sent: u64,
        blobs_there: u64,
    },
    /// Not submitted.
    Refused { error: ApiError },
    /// Neither yes nor no could be had.
    Unknown { job: JobId },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Resolve {
    /// A prefix of at least four characters, or `@last`.
    pub text: String,
    /// For `@last`.
    pub user: UserId,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Resolved {
    pub job: JobId,
    /// The shortest unique prefix, at least four characters.
    pub short: String,
    /// Those that this node is connected to come first. Of its newest announcement, the one that
    /// made it before the others; of a job that was submitted here and never announced, those
    /// that it named. Empty where none is known: then any node may keep it.
    pub keepers: Vec<PeerId>,
    /// It is being submitted here, and not announced: it may be born yet.
    pub is_under_way: bool,
}

/// What became of the jobs that a node drove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOver {
    /// Driven by other keepers now.
    pub handed: usize,
    /// Still driven here: no other keeper could be reached.
    pub left: usize,
}

/// What would be lost with a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parting {
    pub only_here: Vec<OnlyHere>,
    /// Whether there is anybody who could hold it.
    pub has_heirs: bool,
}

/// A job of which a node alone has what some of its processes left, or what it needs to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnlyHere {
    pub job: JobId,
    pub processes: usize,
    /// Of a job that is not over: how many of its inputs, and of what its last attempt kept.
    #[serde(default)]
    pub needed: usize,
    /// Keepers of it that do not answer, and may know that others have it.
    #[serde(default)]
    pub silent: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Audience {
    pub pool: PoolId,
    /// By the daemon's clock.
    pub wall_ms: u64,
    pub nodes: Vec<PeerId>,
    /// Every known job's shortest unique prefix.
    pub short: Vec<(JobId, String)>,
    /// Who keeps each.
    pub keepers: Vec<(JobId, Vec<PeerId>)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ask {
    /// A `UserRequest` for every one of the nodes.
    pub signed: SignedBytes,
    pub nodes: Vec<PeerId>,
    /// How long each may take to answer; `None`: as long as any request.
    pub within_ms: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    pub node: PeerId,
    /// The answer; `None` where the node could not be asked.
    pub reply: Option<Reply>,
    pub error: Option<String>,
    /// To `Node`: readings that are not the protocol's business.
    pub readings: Vec<GpuReading>,
    /// As above.
    pub space: Option<Space>,
}

/// What a GPU's sensors say; `None` where it has no such sensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuReading {
    pub uuid: String,
    pub simulated: bool,
    pub utilisation_percent: Option<u32>,
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: u64,
    pub temperature_celsius: Option<u32>,
    pub power_milliwatts: Option<u32>,
    pub compute_processes: Vec<(u32, Option<u64>)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Watch {
    pub node: PeerId,
    pub signed: SignedBytes,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Log {
    pub node: PeerId,
    pub signed: SignedBytes,
    pub parts: log::Parts,
    pub follow: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Logs {
    pub node: PeerId,
    pub signed: SignedBytes,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Files {
    pub node: PeerId,
    pub signed: SignedBytes,
    /// Of ranks that ran elsewhere, and of which the node has copies.
    pub copies: bool,
}

/// The trees of a job's ranks that ran on one node, or that it has copies of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobFiles {
    pub node: PeerId,
    pub ranks: Vec<RankFiles>,
    /// The `keep/` that each of them began with, where the job continued another.
    pub continued: Option<Manifest>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RankFiles {
    pub rank: u32,
    pub attempt: u32,
    /// Of a copy: as what it was taken.
    pub copy: Option<Copied>,
    /// `keep/` and the artifacts, as encoded trees; `None` where there are none.
    pub keep: Option<Manifest>,
    pub artifacts: Option<Manifest>,
}

/// What a copy is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Copied {
    /// `keep/` while the process ran: the so many-th copy.
    Save(u64),
    /// What the process left.
    End,
}

/// An encoded `transfer::tree::Tree`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest(#[serde(with = "serde_bytes_base64")] pub Vec<u8>);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fetch {
    pub node: PeerId,
    pub signed: SignedBytes,
    pub asks: Vec<exchange::Ask>,
}

/// Blobs, with their sizes, to be brought into the daemon's own store, from whichever of
/// `nodes`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pull {
    pub nodes: Vec<PeerId>,
    pub signed: SignedBytes,
    pub blobs: Vec<(BlobId, u64)>,
}

/// What comes of [`Pull`]; the last line is `Pulled` or `Failed`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum PullEvent {
    Transferring { bytes_done: u64 },
    Pulled { blobs: u64, bytes: u64 },
    Failed { error: ApiError },
}

/// Ask `node` what it has of a job's record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Survey {
    pub node: PeerId,
    pub signed: SignedBytes,
}

/// What a node has of a record, and how it would go on from that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surveyed {
    pub epoch: u32,
    /// In which ballot the node accepted the value: of one epoch, the highest has everything
    /// that was chosen.
    pub accepted: Ballot,
    pub seq: u64,
    /// Of the value that the node has.
    pub value_hash: [u8; 32],
    /// Who keeps the record, as far as the node knows.
    pub keepers: Vec<PeerId>,
    /// Of these, the node and those it is connected to that still have their stores.
    pub present: Vec<PeerId>,
    /// How many seconds from now the record may be recovered at the earliest: a keeper that
    /// has just gone may come back.
    pub wait_s: u64,
    /// Who would keep the record from now on, the node first.
    pub next: Vec<(PeerId, StoreId)>,
}

/// Have `node` carry out a signed `ForceRecover`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recover {
    pub node: PeerId,
    pub signed: SignedBytes,
}

/// Answers of several nodes that describe jobs.
#[must_use]
pub fn jobs_of(answers: &[Answer]) -> Vec<&JobView> {
    let jobs = answers.iter().filter_map(|answer| match &answer.reply {
        Some(Reply::Jobs(jobs)) => Some(jobs),
        _ => None,
    });
    jobs.flatten().collect()
}

/// The view a node gave of itself.
#[must_use]
pub fn node_of(answer: &Answer) -> Option<&NodeView> {
    match &answer.reply {
        Some(Reply::Node(view)) => Some(view),
        _ => None,
    }
}

mod serde_bytes_base64 {
    use data_encoding::BASE64;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        BASE64.decode(String::deserialize(d)?.as_bytes()).map_err(de::Error::custom)
    }
}
