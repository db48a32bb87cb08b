//! `p2pit join`: this machine as a node of a pool.

use std::{
    fs::File,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    pin::pin,
};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{Found, Join, LanNode, Me, UserInfo, path},
    config::Settings,
    daemon::{self, Options},
    home::Home,
};
use p2pit_protocol::{
    PoolId,
    door::RefusalCode,
    roster::{Founder, Genesis, JoinClaim, Name, Ticket},
};
use tokio::sync::oneshot;

use super::{Interrupts, daemon::runs_already};
use crate::{
    args::Globals,
    client::Client,
    daemon_log, daemon_process, home,
    identity::{Identity, login_name, random},
    node_flags::NodeFlags,
    output::{Output, duration_s},
    problem::Problem,
    session::wait_for_company,
    status::Status,
    tickets,
    view::gpu_summary,
};

/// Make this machine a node of a pool, and run it
///
/// Without a ticket, a home that is in a pool is started again; else a pool is founded,
/// unless p2pit nodes answer on the local network. Your key is made on first use.
///
/// What is said here about the machine is kept in the home's config.yaml for later starts,
/// where there is none yet.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    p2pit join                               found a pool, or start again\n  \
    p2pit join pit1…                         join the pool of a ticket\n  \
    p2pit join pit1… --detach --name lab2    … in the background\n  \
    p2pit --home /tmp/n1 join --gpus sim:2xv100 --found")]
pub(crate) struct Args {
    /// One word that begins with `pit1`, from `p2pit invite`
    #[arg(value_name = "TICKET")]
    ticket: Option<String>,
    /// Your name in the pool [default: your login]
    #[arg(long, value_name = "NAME")]
    user_name: Option<Name>,
    /// Your name in full
    #[arg(long, value_name = "TEXT")]
    full_name: Option<String>,
    /// The pool's name where one is founded (default: `<you>-pool`)
    #[arg(long, value_name = "NAME")]
    pool_name: Option<Name>,
    /// Found a pool although others answer on the local network, or a node is named
    #[arg(long, conflicts_with = "ticket")]
    found: bool,
    /// Run in the background; `p2pit daemon --stop` ends it
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    flags: NodeFlags,
}

/// Commands that are not told of a key find the one that this home was joined with: a copy
/// where they look, if there is nothing yet. The file named may be removed afterwards.
fn remember_key(usual: &Path, path: &Path, identity: &Identity, out: &Output) {
    if usual.symlink_metadata().is_ok() {
        if Identity::load(usual).is_ok_and(|other| other.user() != identity.user()) {
            let (usual, path) = (usual.display(), path.display());
            out.warn(&format!(
                "{usual} is another key than {path}: name yours with `--identity {path}` in every \
                 command for this home, or remove {usual} and join again"
            ));
        }
        return;
    }
    match copy_key(path, usual) {
        Ok(()) => out.note(&format!("copied your key to {}, where commands look", usual.display())),
        Err(reason) => out.warn(&format!(
            "your key cannot be copied to {}: {reason}; name it with `--identity {}` in every \
             command for this home",
            usual.display(),
            path.display()
        )),
    }
}

fn copy_key(from: &Path, to: &Path) -> std::io::Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    let key = std::fs::read(from)?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    file.write_all(&key)?;
    file.sync_all()
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    // Before anything is made for it.
    let ticket = args.ticket.as_deref().map(parse_ticket).transpose()?;
    let location = home::locate(globals)?;
    let home = home::open_or_create(&location)?;
    let settings = args.flags.resolve(&home)?;
    let (identity, is_new) = if home.is_member() {
        (member_key(&home, &location.identity)?, false)
    } else {
        Identity::load_or_create(&location.identity)?
    };
    if is_new {
        let path = location.identity.display();
        out.note(&format!("made your key in {path}: keep it, it is who you are"));
    }
    let usual = home::usual_identity(globals)?;
    let made = Made { identity: &location.identity, usual, is_new };
    let joined = run_with_key(out, args, ticket, &home, &identity, &made, &settings).await;
    if let Err(error) = &joined {
        made.undo(error, out);
    }
    joined
}

/// The key of a home that is in a pool: another one would not be of that pool.
fn member_key(home: &Home, path: &Path) -> anyhow::Result<Identity> {
    Identity::load(path).map_err(|error| match error.downcast_ref::<Problem>() {
        Some(missing) => Problem::request(format!(
            "the home {} is in a pool, and {missing}",
            home.path().display()
        ))
        .hint(
            "`--identity FILE` names the key it was joined with; without that key, \
                     another `--home` joins as somebody new",
        )
        .into(),
        None => error,
    })
}

/// The key, as far as this command made it.
#[derive(Debug)]
struct Made<'a> {
    identity: &'a Path,
    /// Where commands look for it that are not told where it is.
    usual: PathBuf,
    is_new: bool,
}

impl Made<'_> {
    /// Where a door refused a new key, it is nobody's, and the next try shall not take it
    /// for the user's own.
    fn undo(&self, error: &anyhow::Error, out: &Output) {
        let refused = error.downcast_ref::<Problem>().is_some_and(|p| p.refusal().is_some());
        if !self.is_new || !refused {
            return;
        }
        let path = self.identity.display();
        match std::fs::remove_file(self.identity) {
            Ok(()) => out.note(&format!("removed the key {path} again, which is of no pool")),
            Err(reason) => out.warn(&format!("the new key {path} is of no pool: {reason}")),
        }
    }
}

async fn run_with_key(
    out: &Output,
    args: Args,
    ticket: Option<(String, Ticket)>,
    home: &Home,
    identity: &Identity,
    made: &Made<'_>,
    settings: &Settings,
) -> anyhow::Result<Status> {
    let newcomer = Newcomer { out, home, identity, made, settings, flags: &args.flags };
    let wish = newcomer.wish(&args, ticket);
    if let Some(client) = end_on_demand(home, out).await? {
        return newcomer.meet_running(&client, &wish, args.detach).await;
    }
    if args.detach {
        return newcomer.detached(&wish).await;
    }
    // What the daemon tells is for its log; here only what may need a hand.
    let filter = if settings.log == "info" && out.verbose == 0 { "warn" } else { &settings.log };
    daemon_log::to_stderr(filter, out.colour_talk())?;
    newcomer.foreground(&wish).await
}

fn parse_ticket(text: &str) -> anyhow::Result<(String, Ticket)> {
    let ticket = text.parse::<Ticket>().map_err(|e| Problem::request(e.to_string()))?;
    Ok((text.trim().to_owned(), ticket))
}

/// The daemon that runs in the home, unless a command had started it for itself: that one
/// is ended.
async fn end_on_demand(home: &Home, out: &Output) -> anyhow::Result<Option<Client>> {
    let Some(client) = Client::connect(home).await? else { return Ok(None) };
    let me: Me = client.get(path::ME).await?;
    if !daemon_process::is_on_demand(&me) {
        return Ok(Some(client));
    }
    out.note("ending the client node that a command had started here");
    daemon_process::end(&client, me.pid).await?;
    Ok(None)
}

/// What is to become of a home that is in no pool.
#[derive(Debug)]
struct Wish {
    ticket: Option<(String, Ticket)>,
    username: Name,
    full_name: Option<String>,
    pool_name: Name,
    found: bool,
    /// Something that only a newcomer can say.
    says_more: bool,
}

#[derive(Debug)]
struct Newcomer<'a> {
    out: &'a Output,
    home: &'a Home,
    identity: &'a Identity,
    /// Where that is kept.
    made: &'a Made<'a>,
    settings: &'a Settings,
    flags: &'a NodeFlags,
}

impl Newcomer<'_> {
    fn wish(&self, args: &Args, ticket: Option<(String, Ticket)>) -> Wish {
        let username = args.user_name.clone().unwrap_or_else(login_name);
        let pool_name =
            args.pool_name.clone().unwrap_or_else(|| Name::from_any(&format!("{username}-pool")));
        let (full_name, found) = (args.full_name.clone(), args.found);
        let says_more =
            args.user_name.is_some() || full_name.is_some() || args.pool_name.is_some() || found;
        Wish { ticket, username, full_name, pool_name, found, says_more }
    }

    /// Runs the daemon here, while this command is its own first client.
    async fn foreground(&self, wish: &Wish) -> anyhow::Result<Status> {
        let (ready, is_ready) = oneshot::channel();
        let options =
            Options { home: self.home.clone(), settings: self.settings.clone(), idle_exit: None };
        let mut daemon = pin!(daemon::run(options, move || {
            // Nobody waits where the command is ending.
            let _ = ready.send(());
        }));
        let mut entering = pin!(async {
            if is_ready.await.is_err() {
                // The daemon says why it did not come so far.
                return std::future::pending().await;
            }
            let client = Client::connect(self.home).await?;
            let client = client.context("the daemon's own API does not answer")?;
            let entered = self.enter(&client, wish).await;
            anyhow::Ok((client, entered))
        });
        let (client, entered) = tokio::select! {
            ended = &mut daemon => return ended.map(|()| Status::DONE),
            entered = &mut entering => entered?,
        };
        if let Err(reason) = entered {
            // It may be gone before its answer is out.
            let (_, ended) = tokio::join!(client.post_empty(path::SHUTDOWN), daemon);
            return Err(ended.err().unwrap_or(reason));
        }
        self.out.note("press Ctrl-C to stop");
        daemon.await?;
        Ok(Status::DONE)
    }

    async fn detached(&self, wish: &Wish) -> anyhow::Result<Status> {
        let mut interrupts = Interrupts::new()?;
        let flags = self.flags.to_args();
        let client = tokio::select! {
            client = daemon_process::start(self.home, &flags) => client?,
            status = interrupts.next() => return Ok(status),
        };
        let entered = tokio::select! {
            entered = self.enter(&client, wish) => entered.map(|()| Status::DONE),
            status = interrupts.next() => Ok(status),
        };
        if matches!(entered, Ok(Status::DONE)) {
            self.out.note("runs in the background; `p2pit daemon --stop` ends it");
        } else {
            let me: Me = client.get(path::ME).await?;
            daemon_process::end(&client, me.pid).await?;
        }
        entered
    }

    /// A daemon runs here already.
    async fn meet_running(
        &self,
        client: &Client,
        wish: &Wish,
        detach: bool,
    ) -> anyhow::Result<Status> {
        if detach {
            self.enter(client, wish).await?;
            self.out.note("it had been running already");
            if !self.flags.is_empty() {
                let path = self.home.config_file();
                self.out.warn(&format!(
                    "what you said of this machine does not change the running daemon: write it \
                     to {}, then `p2pit daemon --stop` and `p2pit join --detach`",
                    path.display()
                ));
            }
            return Ok(Status::DONE);
        }
        let me: Me = client.get(path::ME).await?;
        Err(runs_already(self.home, &me).into())
    }

    /// Makes the node a member where it is none, and says what it is.
    async fn enter(&self, client: &Client, wish: &Wish) -> anyhow::Result<()> {
        let mut me: Me = client.get(path::ME).await?;
        match (&me.pool, &wish.ticket) {
            (None, Some((word, ticket))) => me = self.join(client, &me, wish, word, ticket).await?,
            (None, None) => me = self.found(client, &me, wish).await?,
            (Some(pool), Some((_, ticket))) if ticket.pool != pool.id => {
                let message = format!("this home is in the pool `{}` already", pool.name);
                return Err(Problem::request(message)
                    .hint("`p2pit leave` leaves it; another `--home` can be in another pool")
                    .into());
            }
            (Some(pool), Some(_) | None) if wish.says_more => {
                self.out.warn(&format!(
                    "this home is in the pool `{}` already: names said now have no effect",
                    pool.name
                ));
            }
            (Some(_), Some(_) | None) => {}
        }
        // Only now: what was said for a join that failed may have been its mistake.
        remember_key(&self.made.usual, self.made.identity, self.identity, self.out);
        if self.flags.remember(self.home)? {
            let path = self.home.config_file();
            self.out.note(&format!("wrote what you said of this machine to {}", path.display()));
        }
        self.introduce(client, &me, wish.ticket.is_none()).await
    }

    async fn join(
        &self,
        client: &Client,
        me: &Me,
        wish: &Wish,
        word: &str,
        ticket: &Ticket,
    ) -> anyhow::Result<Me> {
        let claim = self.claim(ticket.pool, me, wish)?;
        let join = Join {
            ticket: word.to_owned(),
            claim: JoinClaim::sign(claim.to_bytes(), self.identity.key())
                .map_err(|e| Problem::request(e.to_string()))?,
            peers: self.peers().await,
        };
        let joined = client.post::<Me>(path::JOIN, &join).await;
        let me = joined.map_err(|error| self.advise(error, wish))?;
        // So that the next command finds a pool that it can use.
        wait_for_company(client).await?;
        Ok(me)
    }

    /// What to do about a refusal that only this side can put into commands.
    fn advise(&self, error: anyhow::Error, wish: &Wish) -> anyhow::Error {
        let problem = match error.downcast::<Problem>() {
            Ok(problem) => problem,
            Err(error) => return error,
        };
        let hint = match problem.refusal() {
            Some(RefusalCode::UsernameTaken) => format!(
                "if you are `{name}`, copy your key from the machine where you joined first, and \
                 join with it:\n  \
                 scp OTHER:.config/p2pit/identity my-key && chmod 600 my-key\n  \
                 p2pit --identity my-key join TICKET\n\
                 if you are somebody else, take another name:\n  \
                 p2pit join TICKET --user-name {name}-2",
                name = wish.username
            ),
            Some(RefusalCode::OtherPool | RefusalCode::InviteUnknown) => {
                "ask an admin of the pool for a new one: `p2pit invite`".to_owned()
            }
            Some(RefusalCode::InviteExpired | RefusalCode::InviteUsedUp) => {
                "an admin makes a new one with `p2pit invite`".to_owned()
            }
            _ => return problem.into(),
        };
        problem.hint(hint).into()
    }

    async fn found(&self, client: &Client, me: &Me, wish: &Wish) -> anyhow::Result<Me> {
        if !wish.found {
            self.refuse_lost_pool()?;
            self.refuse_peers()?;
            self.look_around(client).await?;
        }
        let genesis = Genesis {
            name: wish.pool_name.clone(),
            founders: vec![Founder {
                user: self.identity.user(),
                username: wish.username.clone(),
                full_name: wish.full_name.clone(),
            }],
            threshold: 1,
            created_wall_ms: me.wall_ms,
            nonce: random()?,
        };
        let genesis = genesis.to_bytes().map_err(|e| Problem::request(e.to_string()))?;
        let claim = self.claim(PoolId::of(&genesis), me, wish)?;
        let found = Found {
            genesis,
            node_name: claim.node_name.to_string(),
            claim: JoinClaim::sign(claim.to_bytes(), self.identity.key())
                .map_err(|e| Problem::request(e.to_string()))?,
        };
        client.post(path::FOUND, &found).await
    }

    /// Whoever starts a node again means its pool, even where its roster was lost with the
    /// journal.
    fn refuse_lost_pool(&self) -> anyhow::Result<()> {
        if !self.home.is_member() {
            return Ok(());
        }
        let home = self.home.path().display();
        let message = format!(
            "the node of {home} was in a pool, and its journal, which was damaged or lost, no \
             longer says in which"
        );
        Err(Problem::request(message)
            .hint(
                "join again with `p2pit join TICKET`: `p2pit invite` makes a ticket at any other \
                 node of the pool; `p2pit join --found` founds a separate pool",
            )
            .into())
    }

    /// Whoever names a node to try means its pool, not one of their own.
    fn refuse_peers(&self) -> anyhow::Result<()> {
        if self.settings.peers.is_empty() {
            return Ok(());
        }
        let peers: Vec<String> = self.settings.peers.iter().map(ToString::to_string).collect();
        Err(Problem::request(format!("no ticket for the pool of {}", peers.join(", ")))
            .hint(
                "`p2pit invite` prints one on a machine of that pool, for `p2pit join TICKET`; \
                 `p2pit join --found` founds a separate pool",
            )
            .into())
    }

    async fn look_around(&self, client: &Client) -> anyhow::Result<()> {
        if !self.settings.mdns {
            return Ok(());
        }
        self.out.note("looking for p2pit nodes on the local network");
        let nodes: Vec<LanNode> = client.get(path::LAN).await?;
        if nodes.is_empty() {
            return Ok(());
        }
        let doors: Vec<String> =
            nodes.iter().flat_map(|node| node.door.first()).map(ToString::to_string).collect();
        Err(Problem::request(format!(
            "p2pit nodes answer on the local network: {}",
            doors.join(", ")
        ))
        .hint(
            "ask their admin for a ticket (`p2pit invite`) and `p2pit join TICKET`, or found a \
             separate pool with `p2pit join --found`",
        )
        .into())
    }

    fn claim(&self, pool: PoolId, me: &Me, wish: &Wish) -> anyhow::Result<JoinClaim> {
        Ok(JoinClaim {
            pool,
            user: self.identity.user(),
            username: wish.username.clone(),
            full_name: wish.full_name.clone(),
            node: me.node,
            node_name: Name::from_any(self.settings.name.as_str()),
            client: self.settings.client,
            wall_ms: me.wall_ms,
            nonce: random()?,
        })
    }

    /// Where the peers named by the settings are; names that mean nothing are passed over.
    async fn peers(&self) -> Vec<SocketAddr> {
        let mut addrs = Vec::new();
        for peer in &self.settings.peers {
            match tokio::net::lookup_host((peer.host.as_str(), peer.port)).await {
                Ok(found) => addrs.extend(found),
                Err(reason) => self.out.warn(&format!("{peer} cannot be found: {reason}")),
            }
        }
        addrs
    }

    /// Who came by a ticket has seen one; whoever comes first, or back, may want one.
    async fn introduce(&self, client: &Client, me: &Me, with_ticket: bool) -> anyhow::Result<()> {
        let users: Vec<UserInfo> = client.get(path::USERS).await?;
        let user = users.iter().find(|user| user.user == self.identity.user());
        let (pool, nodes) = match &me.pool {
            Some(pool) => (pool.name.as_str(), pool.nodes),
            None => ("none", 0),
        };
        let plural = if nodes == 1 { "" } else { "s" };
        let client_note = if me.client { " (a client: offers nothing)" } else { "" };
        let mut text = format!("Node:   {}{client_note}\n", me.name);
        text.push_str(&format!("GPUs:   {}\n", gpu_summary(&me.capacity.gpus)));
        text.push_str(&format!("Pool:   {pool} ({nodes} node{plural})\n"));
        let admin = user.is_some_and(|user| user.admin);
        let role = if admin { ", admin" } else { "" };
        let name = user.map_or("not of this pool", |user| user.name.as_str());
        text.push_str(&format!("User:   {name}{role}\n"));
        if admin && with_ticket {
            let ticket = tickets::reuse_or_issue(client, self.identity, self.home, me).await?;
            let left_s = ticket.expires_wall_ms.saturating_sub(me.wall_ms) / 1000;
            text.push_str(&format!("Ticket: {}\n", *ticket.to_word()));
            self.out.data(text)?;
            self.out.note(&format!(
                "others join with `p2pit join TICKET`; this ticket is good for {}",
                duration_s(left_s)
            ));
        } else {
            self.out.data(text)?;
            let whose = if admin { "" } else { " of an admin" };
            self.out.note(&format!("`p2pit invite`{whose} prints a ticket for others"));
        }
        if let Some(reason) = &me.owner_only {
            self.out.warn(&format!("this node runs only its owner's jobs: {reason}"));
        }
        for text in me.locked_gpus.iter().chain(&me.warnings) {
            self.out.warn(text);
        }
        super::doctor::short(client, self.out).await;
        Ok(())
    }
}
