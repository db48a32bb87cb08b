//! A command's access to its home: the daemon, the user's key, and the pool.

use std::{ffi::OsString, sync::Arc, time::Duration};

use p2pit_node::{
    api::types::{Answer, Ask, Me, NodeInfo, Resolve, Resolved, path},
    home::Home,
};
use p2pit_protocol::{
    PeerId, PoolId, UserId,
    identity::SignedBytes,
    message::{Command, Reply},
    roster::AUDIENCE_MAX,
};

use tokio::time::{Instant, sleep};

use crate::{
    args::Globals,
    client::Client,
    daemon_process::{self, IDLE_EXIT},
    home,
    identity::Identity,
    node_flags::NodeFlags,
    output::Output,
    problem::Problem,
};

/// Nodes that are on answer within a moment; those that are off must not hold a command up.
const COMPANY_WITHIN: Duration = Duration::from_secs(5);
const COMPANY_POLL: Duration = Duration::from_millis(20);
/// Other nodes tell of their jobs soon after they are met.
const JOBS_WITHIN: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) home: Home,
    /// Shared with tasks that read streams.
    pub(crate) client: Arc<Client>,
    pub(crate) identity: Identity,
    /// Until when the daemon, started for this command, may still be learning which jobs
    /// there are.
    learns_until: Option<Instant>,
}

impl Session {
    /// With the daemon of the home; where none runs and the home is in a pool, with one
    /// started for this command.
    pub(crate) async fn open(globals: &Globals, out: &Output) -> anyhow::Result<Self> {
        let location = home::locate(globals)?;
        let home = home::existing(&location)?;
        let identity = Identity::load(&location.identity)?;
        let (client, learns_until) = match Client::connect(&home).await? {
            Some(client) => (client, None),
            None => {
                let client = start_on_demand(&home, out).await?;
                (client, Some(Instant::now() + JOBS_WITHIN))
            }
        };
        Ok(Self { home, client: Arc::new(client), identity, learns_until })
    }

    pub(crate) fn user(&self) -> UserId {
        self.identity.user()
    }

    pub(crate) async fn me(&self) -> anyhow::Result<Me> {
        self.client.get(path::ME).await
    }

    pub(crate) async fn pool(&self) -> anyhow::Result<PoolId> {
        Ok(pool_of(&self.me().await?)?)
    }

    /// The job that a user means by `text`.
    pub(crate) async fn resolve(&self, text: &str) -> anyhow::Result<Resolved> {
        let resolve = Resolve { text: text.to_owned(), user: self.user() };
        loop {
            let resolved = self.client.post(path::RESOLVE, &resolve).await;
            let may_learn = self.learns_until.is_some_and(|until| Instant::now() < until);
            if resolved.is_ok() || !may_learn {
                return resolved;
            }
            sleep(COMPANY_POLL).await;
        }
    }

    /// Puts a command to nodes, and gives what each said.
    pub(crate) async fn ask(
        &self,
        pool: PoolId,
        nodes: &[PeerId],
        command: &Command,
    ) -> anyhow::Result<Vec<Answer>> {
        self.ask_within(pool, nodes, command, None).await
    }

    /// As [`Self::ask`], of nodes that have this long to answer.
    pub(crate) async fn ask_within(
        &self,
        pool: PoolId,
        nodes: &[PeerId],
        command: &Command,
        within: Option<Duration>,
    ) -> anyhow::Result<Vec<Answer>> {
        let within_ms = within.map(|within| u64::try_from(within.as_millis()).unwrap_or(u64::MAX));
        let asked = nodes.chunks(AUDIENCE_MAX).map(|nodes| async move {
            let signed = self.sign(pool, nodes, command)?;
            let ask = Ask { signed, nodes: nodes.to_vec(), within_ms };
            self.client.post::<Vec<Answer>>(path::ASK, &ask).await
        });
        Ok(futures::future::try_join_all(asked).await?.concat())
    }

    /// Puts a command to one node.
    pub(crate) async fn ask_one(
        &self,
        pool: PoolId,
        node: PeerId,
        command: &Command,
    ) -> anyhow::Result<Answer> {
        let answers = self.ask(pool, &[node], command).await?;
        let answer = answers.into_iter().next();
        Ok(answer.ok_or_else(|| Problem::broken("the daemon did not ask the node"))?)
    }

    pub(crate) fn sign(
        &self,
        pool: PoolId,
        nodes: &[PeerId],
        command: &Command,
    ) -> anyhow::Result<SignedBytes> {
        self.identity.request(pool, nodes.iter().copied(), command)
    }
}

/// The pool of a node that must have one.
pub(crate) fn pool_of(me: &Me) -> Result<PoolId, Problem> {
    me.pool.as_ref().map(|pool| pool.id).ok_or_else(|| {
        Problem::request(format!("the home {} is in no pool", me.home))
            .hint("`p2pit join TICKET` joins one, `p2pit join` founds one")
    })
}

/// What a node said, where that is no refusal.
pub(crate) fn accepted(reply: Reply) -> Result<Reply, Problem> {
    match reply {
        Reply::Denied { reason } => Err(Problem::request(reason)),
        reply => Ok(reply),
    }
}

/// A reply of another kind than the command's, from a keeper.
pub(crate) fn unexpected() -> Problem {
    Problem::broken("the job's keeper answered something else")
        .hint("the node and this command may be of different versions: `p2pit --version` on both")
}

async fn start_on_demand(home: &Home, out: &Output) -> anyhow::Result<Client> {
    let idle = NodeFlags::default().resolve(home)?.client_idle;
    out.note(&format!(
        "no daemon runs here: starting a client node, which ends after {} without a command",
        humantime::format_duration(idle)
    ));
    let flags = [OsString::from(IDLE_EXIT), OsString::from(idle.as_secs().to_string())];
    let client = daemon_process::start(home, &flags).await?;
    let me: Me = client.get(path::ME).await?;
    if let Err(problem) = pool_of(&me) {
        daemon_process::end(&client, me.pid).await?;
        return Err(problem.into());
    }
    wait_for_company(&client).await?;
    Ok(client)
}

/// A node that has just started knows little of its pool: returns once it is connected to
/// another node, and has that one's word of what it offers; or when that took long enough.
pub(crate) async fn wait_for_company(client: &Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + COMPANY_WITHIN;
    loop {
        let nodes: Vec<NodeInfo> = client.get(path::NODES).await?;
        let is_company = |node: &NodeInfo| node.reach == "online" && node.advert_age_s.is_some();
        let is_alone = nodes.iter().all(|node| node.reach == "self");
        if is_alone || nodes.iter().any(is_company) || Instant::now() > deadline {
            return Ok(());
        }
        sleep(COMPANY_POLL).await;
    }
}
