//! A job's log: its keepers' history of it, and what the nodes of its ranks wrote.
//!
//! Following joins one stream of views from a keeper with one stream of lines from each
//! node that the views name. Either may break and is opened again, that of the keeper at the
//! next one; that of a node goes on where it was, at that node or at a keeper that has copies of
//! what it writes. Lines are held for a moment and put in the order of their time, since streams
//! overtake each other. The line that says DONE is held back until every node's stream has ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use p2pit_node::api::{
    log::{Chunks, Held as HeldLog, Part, Parts},
    types::{Log, Logs, NodeInfo, Watch, path},
};
use p2pit_protocol::{
    JobId, PeerId, PoolId,
    job::{Attempt, Change, Outcome, RankState, State},
    message::{Command, JobView, Reply},
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    client::Client,
    jobs::{Asked, try_ask},
    names::{Names, short_job},
    output::{Output, iso8601, plain},
    problem::Problem,
    session::Session,
};

/// Events of all streams that are not shown yet.
const EVENTS_MAX: usize = 64;
/// A node that is being prepared, or does not answer, is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often a node is asked for its lines once the job is over.
const TRIES_AFTER_END: usize = 3;
/// How long a line waits for earlier ones of other streams.
const HOLD: Duration = Duration::from_millis(100);
/// As long, at first, do lines that had been written before anybody followed.
const HOLD_BACKLOG: Duration = Duration::from_millis(500);
/// Held lines beyond this are shown at once.
const HELD_BYTES_MAX: usize = 16 << 20;
/// A job that has waited for this long is asked why, once.
const WHY_AFTER: Duration = Duration::from_secs(3);
/// A keeper that restarts is back within this, and another steward in office.
const KEEPER_PATIENCE: Duration = Duration::from_secs(120);
/// Logs larger than this together are not put in order.
const MERGE_BYTES_MAX: u64 = 256 << 20;
/// Nodes write shorter lines than this.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Where lines go.
type Sink<'a> = dyn FnMut(&[u8]) -> anyhow::Result<()> + Send + 'a;

/// Which job's log, for whom, and how much of it.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    pub(crate) session: &'a Session,
    pub(crate) out: &'a Output,
    pub(crate) pool: PoolId,
    pub(crate) job: JobId,
    /// Who keeps it, as far as is known at first, the steward before the others.
    pub(crate) keepers: Vec<PeerId>,
    /// Only this rank's own lines.
    pub(crate) worker: Option<u32>,
}

impl Reading<'_> {
    /// Shows lines as they come until the job is done.
    pub(crate) async fn follow(&self) -> anyhow::Result<Outcome> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let begun = Instant::now();
        let mut follower = Follower {
            reading: self,
            sender,
            tasks: JoinSet::new(),
            taps: BTreeMap::new(),
            view: None,
            keepers: self.keepers.clone(),
            held: Held::new(begun + HOLD_BACKLOG),
            shown: 0,
            watch: Watching::Open,
            last_view_at: begun,
            is_out_of_sight: false,
            why_at: None,
            was_told_why: false,
        };
        follower.open_watch()?;
        follower.run(events).await
    }

    /// Shows what there is of all attempts, in the order of time.
    pub(crate) async fn read(&self, view: &JobView) -> anyhow::Result<()> {
        self.write(view, &mut |bytes| self.out.data(bytes)).await
    }

    /// As [`Self::read`], into something else.
    pub(crate) async fn write(&self, view: &JobView, sink: &mut Sink<'_>) -> anyhow::Result<()> {
        let mut found = self.look_for_logs(view).await?;
        let bytes = found.sources.values().filter_map(|held| Some(held.first()?.1.bytes));
        if bytes.sum::<u64>() > MERGE_BYTES_MAX {
            self.out.warn("the log is too large to be put in order: it is shown rank by rank");
            self.write_unordered(view, &found, sink).await?;
            return self.warn_of_missing(view, &found).await;
        }
        let logs = self.read_all(&mut found).await;
        let mut lines: Vec<Vec<u8>> = logs.into_values().collect();
        // Behind what happened in the same millisecond, so that DONE stands at the end.
        if self.worker.is_none() {
            lines.extend(view.history.iter().map(|change| history_line(change).into_bytes()));
        }
        self.warn_of_missing(view, &found).await?;
        sink(&merge(&lines, self.worker))
    }

    /// Asks the nodes that may have logs of the job which they have: those of its ranks and its
    /// keepers, and all others where something is lacking then.
    async fn look_for_logs(&self, view: &JobView) -> anyhow::Result<Found> {
        let mut found = Found::default();
        self.ask_for_logs(&mut found, nodes_of(view).into_iter().chain(view.keepers.clone()))
            .await?;
        if found.is_lacking(view) {
            let nodes: Vec<NodeInfo> = self.session.client.get(path::NODES).await?;
            let online = nodes.iter().filter(|node| node.reach != "offline").map(|node| node.node);
            self.ask_for_logs(&mut found, online).await?;
        }
        found.sort();
        Ok(found)
    }

    async fn ask_for_logs(
        &self,
        found: &mut Found,
        nodes: impl Iterator<Item = PeerId>,
    ) -> anyhow::Result<()> {
        let new: Vec<PeerId> = nodes.filter(|node| found.asked.insert(*node)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let signed = self.session.sign(self.pool, &new, &Command::Log(self.job))?;
        let asked = new.iter().map(|&node| {
            let logs = Logs { node, signed: signed.clone() };
            async move { self.session.client.post::<Vec<HeldLog>>(path::LOGS, &logs).await }
        });
        for (node, answer) in new.iter().zip(futures::future::join_all(asked).await) {
            match answer {
                Ok(held) => found.add(*node, held),
                // It has nothing.
                Err(reason) if is_request(&reason) => {}
                Err(reason) => drop(found.silent.insert(*node, reason)),
            }
        }
        Ok(())
    }

    /// Each rank's log from the best of those that have it, or the next.
    async fn read_all(&self, found: &mut Found) -> BTreeMap<Part, Vec<u8>> {
        let mut logs = BTreeMap::new();
        loop {
            let mut asked = BTreeMap::<PeerId, Vec<Part>>::new();
            for (part, sources) in &found.sources {
                if !logs.contains_key(part)
                    && let Some((node, _)) = sources.first()
                {
                    asked.entry(*node).or_default().push(*part);
                }
            }
            if asked.is_empty() {
                return logs;
            }
            let read = asked.iter().map(|(node, parts)| self.read_parts(*node, parts));
            let read = futures::future::join_all(read).await;
            for ((node, parts), read) in asked.into_iter().zip(read) {
                match read {
                    Ok(read) => logs.extend(read),
                    Err(reason) => {
                        for part in parts {
                            found.give_up(part, node);
                        }
                        found.silent.insert(node, reason);
                    }
                }
            }
        }
    }

    async fn read_parts(
        &self,
        node: PeerId,
        parts: &[Part],
    ) -> anyhow::Result<BTreeMap<Part, Vec<u8>>> {
        let mut logs: BTreeMap<Part, Vec<u8>> = parts.iter().map(|part| (*part, vec![])).collect();
        let ranks = parts.iter().map(|(attempt, rank)| (*attempt, *rank, 0)).collect();
        let log = self.log(node, Parts { own: false, ranks }, false)?;
        let mut stream = self.session.client.post_bytes(path::LOG, &log).await?;
        let mut chunks = Chunks::default();
        while let Some(bytes) = stream.next().await? {
            chunks.push(&bytes);
            while let Some(chunk) = chunks.pop()? {
                logs.entry(chunk.part).or_default().extend_from_slice(&chunk.bytes);
            }
        }
        Ok(logs)
    }

    async fn write_unordered(
        &self,
        view: &JobView,
        found: &Found,
        sink: &mut Sink<'_>,
    ) -> anyhow::Result<()> {
        if self.worker.is_none() {
            sink(view.history.iter().map(history_line).collect::<String>().as_bytes())?;
        }
        for (part, sources) in &found.sources {
            let mut tap = Tap::default();
            for (node, _) in sources {
                let (attempt, rank) = *part;
                let parts = Parts { own: false, ranks: vec![(attempt, rank, tap.bytes_of(*part))] };
                match self.write_log(*node, parts, &mut tap, sink).await {
                    Ok(()) => break,
                    Err(reason) => self.warn_unreadable(*node, &reason).await,
                }
            }
            sink(&tap.rest(self.worker))?;
        }
        Ok(())
    }

    async fn write_log(
        &self,
        node: PeerId,
        parts: Parts,
        tap: &mut Tap,
        sink: &mut Sink<'_>,
    ) -> anyhow::Result<()> {
        let log = self.log(node, parts, false)?;
        let mut stream = self.session.client.post_bytes(path::LOG, &log).await?;
        tap.open();
        while let Some(bytes) = stream.next().await? {
            sink(&tap.take(&bytes, self.worker)?)?;
        }
        Ok(())
    }

    /// Says of what there is no log, and of what there is a copy only.
    async fn warn_of_missing(&self, view: &JobView, found: &Found) -> anyhow::Result<()> {
        let mut named = BTreeSet::new();
        for rank in &view.attempt.ranks {
            let part = (view.attempt.number, rank.rank);
            let source = found.sources.get(&part).and_then(|sources| sources.first());
            let Some(reason) = found.silent.get(&rank.node) else { continue };
            if !named.insert(rank.node) {
                continue;
            }
            match source {
                None => self.warn_unreadable(rank.node, reason).await,
                Some((node, held)) if !held.complete => {
                    self.note_copy(rank.node, *node).await;
                }
                Some(_) => {}
            }
        }
        if found.sources.is_empty() && view.state() == State::Done {
            let job = short_job(self.job);
            self.out.warn(&format!("no node that answers has anything of the log of job {job}"));
        }
        Ok(())
    }

    async fn note_copy(&self, node: PeerId, source: PeerId) {
        // A name is a courtesy; the note must come without one.
        let names = Names::load(&self.session.client).await.unwrap_or_default();
        self.out.note(&format!(
            "node {} does not answer: its lines are from the copy of node {}, and what it wrote \
             last may be missing",
            names.node(node),
            names.node(source)
        ));
    }

    fn log(&self, node: PeerId, parts: Parts, follow: bool) -> anyhow::Result<Log> {
        let signed = self.session.sign(self.pool, &[node], &Command::Log(self.job))?;
        Ok(Log { node, signed, parts, follow })
    }

    async fn warn_unreadable(&self, node: PeerId, reason: &anyhow::Error) {
        // A name is a courtesy; the warning must come without one.
        let names = Names::load(&self.session.client).await.unwrap_or_default();
        let name = names.node(node);
        self.out.warn(&format!("the lines of node {name} cannot be read: {reason:#}"));
    }
}

fn is_request(reason: &anyhow::Error) -> bool {
    reason.downcast_ref::<Problem>().is_some_and(Problem::is_request)
}

/// Who has logs of a job.
#[derive(Debug, Default)]
struct Found {
    asked: BTreeSet<PeerId>,
    /// Those that have a rank's log, the best first.
    sources: BTreeMap<Part, Vec<(PeerId, HeldLog)>>,
    silent: BTreeMap<PeerId, anyhow::Error>,
}

impl Found {
    fn add(&mut self, node: PeerId, held: Vec<HeldLog>) {
        for held in held {
            let part = (held.attempt, held.rank);
            self.sources.entry(part).or_default().push((node, held));
        }
    }

    /// The log itself before a whole copy, and that before a shorter one.
    fn sort(&mut self) {
        for sources in self.sources.values_mut() {
            sources.sort_by_key(|(node, held)| {
                core::cmp::Reverse((held.own, held.complete, held.bytes, *node))
            });
        }
    }

    fn give_up(&mut self, part: Part, node: PeerId) {
        if let Some(sources) = self.sources.get_mut(&part) {
            sources.retain(|(source, _)| *source != node);
        }
    }

    /// Whether there may be more elsewhere: of a rank of this attempt, or of one before, of
    /// which a view does not tell where it ran.
    fn is_lacking(&self, view: &JobView) -> bool {
        let Attempt(now) = view.attempt.number;
        let has = |attempt| self.sources.keys().any(|(known, _)| *known == Attempt(attempt));
        let of_now = |rank| self.sources.contains_key(&(view.attempt.number, rank));
        view.attempt.ranks.iter().any(|rank| !of_now(rank.rank)) || (1..now).any(|it| !has(it))
    }
}

/// The nodes of the current attempt, each once, by rank.
pub(crate) fn nodes_of(view: &JobView) -> Vec<PeerId> {
    let mut seen = BTreeSet::new();
    let nodes = view.attempt.ranks.iter().map(|rank| rank.node);
    nodes.filter(|node| seen.insert(*node)).collect()
}

/// A state of a job as a line of its log.
fn history_line(change: &Change) -> String {
    let Change { state, at_ms, reason } = change;
    let reason = plain(reason).replace('\n', " ");
    let colon = if reason.is_empty() { "" } else { ": " };
    format!("[{}] [daemon] {state}{colon}{reason}\n", iso8601(*at_ms))
}

enum Event {
    View(Box<JobView>),
    WatchEnded(anyhow::Result<()>),
    Lines(PeerId, Bytes),
    LinesEnded(PeerId, Attempt, anyhow::Result<()>),
}

struct Follower<'a> {
    reading: &'a Reading<'a>,
    sender: mpsc::Sender<Event>,
    /// Ended with this.
    tasks: JoinSet<()>,
    taps: BTreeMap<PeerId, Tap>,
    view: Option<JobView>,
    /// The first is watched; one that does not answer goes to the end.
    keepers: Vec<PeerId>,
    held: Held,
    /// Changes of the history that were shown.
    shown: usize,
    watch: Watching,
    last_view_at: Instant,
    /// Since the last view the watch has ended.
    is_out_of_sight: bool,
    /// When a job that waits is asked why.
    why_at: Option<Instant>,
    was_told_why: bool,
}

#[derive(Debug, Clone, Copy)]
enum Watching {
    Open,
    Again(Instant),
}

impl Follower<'_> {
    async fn run(&mut self, mut events: mpsc::Receiver<Event>) -> anyhow::Result<Outcome> {
        loop {
            if let Some(outcome) = self.outcome_to_show() {
                self.show_history(true);
                self.reading.out.data(self.held.take_all())?;
                return Ok(outcome);
            }
            let due_lines = self.held.take_due(Instant::now());
            if !due_lines.is_empty() {
                self.reading.out.data(due_lines)?;
            }
            let due = self.next_due();
            tokio::select! {
                biased;
                event = events.recv() => {
                    // This holds a sender.
                    let Some(event) = event else { continue };
                    self.handle(event).await?;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.handle_due().await?;
                }
            }
        }
    }

    async fn handle(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::View(view) => {
                self.last_view_at = Instant::now();
                if std::mem::take(&mut self.is_out_of_sight) {
                    self.reading.out.note(&format!(
                        "job {} is in sight again, at another keeper or after a restart",
                        short_job(self.reading.job)
                    ));
                }
                let at = |view: &JobView| (view.epoch, view.seq, view.is_final());
                if self.view.as_ref().is_some_and(|known| at(known) >= at(&view)) {
                    // Another keeper may be a moment behind.
                    return Ok(());
                }
                for keeper in &view.keepers {
                    if !self.keepers.contains(keeper) {
                        self.keepers.push(*keeper);
                    }
                }
                self.view = Some(*view);
                self.show_history(false);
                self.note_waiting();
                self.open_taps()
            }
            Event::WatchEnded(result) => self.watch_ended(result),
            Event::Lines(node, bytes) => {
                let tap = self.taps.entry(node).or_default();
                let lines = tap.take(&bytes, self.reading.worker)?;
                self.held.add(&mut tap.latest, &lines, Instant::now());
                let source = tap.source;
                if source > 0
                    && !std::mem::replace(&mut tap.was_told_of_copy, true)
                    && let Some(copy) = self.sources_of(node).get(source)
                {
                    self.reading.note_copy(node, *copy).await;
                }
                Ok(())
            }
            Event::LinesEnded(node, attempt, result) => {
                if result.is_ok() {
                    let tap = self.taps.entry(node).or_default();
                    let rest = tap.rest(self.reading.worker);
                    self.held.add(&mut tap.latest, &rest, Instant::now());
                }
                self.lines_ended(node, attempt, result).await
            }
        }
    }

    /// Has a job that begins to wait asked for the reason, if it goes on waiting; be it for
    /// room, or for a majority to say that it is over.
    fn note_waiting(&mut self) {
        let waits = self.view.as_ref().is_some_and(|view| {
            view.state() == State::Waiting || view.state() == State::Done && !view.is_final()
        });
        self.why_at = match self.why_at {
            _ if !waits || self.was_told_why => None,
            None => Some(Instant::now() + WHY_AFTER),
            known => known,
        };
    }

    async fn tell_why(&mut self) {
        let Reading { session, pool, job, out, .. } = *self.reading;
        (self.why_at, self.was_told_why) = (None, true);
        if self.view.as_ref().is_some_and(|view| view.state() == State::Done) {
            out.note(&format!(
                "job {} is over as one of its keepers says: waiting for a majority of them",
                short_job(job)
            ));
            return;
        }
        // A courtesy: where it cannot be had, the log says what there is to say.
        if let Ok(Asked::Said(Reply::Why(wait))) =
            try_ask(session, pool, &self.keepers, &Command::Why(job)).await
            && wait.state == State::Waiting
        {
            let short = short_job(job);
            out.note(&format!(
                "job {short} waits: {}; `p2pit why {short}` says more",
                plain(&wait.summary)
            ));
        }
    }

    async fn handle_due(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.why_at.is_some_and(|at| at <= now) {
            self.tell_why().await;
        }
        if matches!(self.watch, Watching::Again(at) if at <= now) {
            self.open_watch()?;
        }
        let due: Vec<PeerId> = self
            .taps
            .iter()
            .filter(|(_, tap)| matches!(tap.phase, Phase::Again(at) if at <= now))
            .map(|(node, _)| *node)
            .collect();
        due.into_iter().try_for_each(|node| self.open_tap(node))
    }

    fn next_due(&self) -> Option<Instant> {
        let watch = match self.watch {
            Watching::Again(at) => Some(at),
            Watching::Open => None,
        };
        let taps = self.taps.values().filter_map(|tap| match tap.phase {
            Phase::Again(at) => Some(at),
            Phase::New | Phase::Open | Phase::Ended(_) | Phase::GivenUp => None,
        });
        taps.chain(watch).chain(self.why_at).chain(self.held.due_at()).min()
    }

    /// The outcome, once nothing more is to be shown before it.
    fn outcome_to_show(&self) -> Option<Outcome> {
        let view = self.view.as_ref().filter(|view| view.is_final())?;
        let attempt = view.attempt.number;
        let is_settled = |node: &PeerId| match self.taps.get(node).map(|tap| &tap.phase) {
            Some(Phase::Ended(ended)) => *ended >= attempt,
            Some(Phase::GivenUp) => true,
            Some(Phase::New | Phase::Open | Phase::Again(_)) | None => false,
        };
        let lost = || Outcome::Lost { reason: "its outcome is not known".to_owned() };
        nodes_of(view).iter().all(is_settled).then(|| view.outcome.clone().unwrap_or_else(lost))
    }

    fn show_history(&mut self, with_end: bool) {
        let Some(view) = &self.view else { return };
        let new = view.history.get(self.shown..).unwrap_or_default();
        let new: Vec<&Change> =
            new.iter().filter(|change| with_end || change.state != State::Done).collect();
        self.shown += new.len();
        if self.reading.worker.is_some() {
            return;
        }
        let lines: String = new.into_iter().map(history_line).collect();
        self.held.add(&mut Latest::default(), lines.as_bytes(), Instant::now());
    }

    fn open_watch(&mut self) -> anyhow::Result<()> {
        let Reading { session, pool, job, .. } = *self.reading;
        let Some(keeper) = self.keepers.first().copied() else {
            return Err(Problem::broken("no keeper of the job is known").into());
        };
        let signed = session.sign(pool, &[keeper], &Command::Job(job))?;
        let watch = Watch { node: keeper, signed };
        let (client, sender) = (Arc::clone(&session.client), self.sender.clone());
        self.watch = Watching::Open;
        self.tasks.spawn(async move {
            let result = watch_views(&client, &watch, &sender).await;
            // Nobody listens where the command is ending.
            let _ = sender.send(Event::WatchEnded(result)).await;
        });
        Ok(())
    }

    fn watch_ended(&mut self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let job = short_job(self.reading.job);
        if self.view.as_ref().is_some_and(JobView::is_final) {
            return Ok(());
        }
        let is_refused = result.as_ref().err().is_some_and(|reason| {
            reason.downcast_ref::<Problem>().is_some_and(Problem::is_request)
        });
        if self.view.is_none() && (is_refused || (result.is_ok() && self.keepers.len() < 2)) {
            result?;
            return Err(Problem::broken(format!("the keeper of job {job} does not know it")).into());
        }
        let reason = match result {
            Err(reason) => format!("{reason:#}"),
            Ok(()) => "its keeper stopped telling of it".to_owned(),
        };
        // The next one may know more; the same again where there is no other.
        self.keepers.rotate_left(1);
        if self.last_view_at.elapsed() < KEEPER_PATIENCE {
            if !self.is_out_of_sight {
                self.reading
                    .out
                    .warn(&format!("job {job} is out of sight: {reason}; looking for it"));
            }
            self.is_out_of_sight = true;
            self.watch = Watching::Again(Instant::now() + ASK_AGAIN);
            return Ok(());
        }
        Err(Problem::broken(format!("job {job} is out of sight: {reason}"))
            .hint(format!("it goes on; `p2pit log {job} -f` follows it again"))
            .into())
    }

    /// Opens what the view says is there to be read.
    fn open_taps(&mut self) -> anyhow::Result<()> {
        let Some(view) = &self.view else { return Ok(()) };
        let (attempt, state) = (view.attempt.number, view.state());
        let mut ready = BTreeMap::new();
        for rank in &view.attempt.ranks {
            self.taps.entry(rank.node).or_default().ranks.insert((attempt, rank.rank));
            let is_ready = rank.state != RankState::Assigned || state > State::Preparing;
            *ready.entry(rank.node).or_insert(false) |= is_ready;
        }
        for (node, is_ready) in ready {
            let tap = self.taps.entry(node).or_default();
            let is_wanted = match tap.phase {
                Phase::New | Phase::Again(_) => true,
                Phase::Ended(ended) => ended < attempt,
                Phase::Open | Phase::GivenUp => false,
            };
            if is_wanted && is_ready {
                self.open_tap(node)?;
            } else if is_wanted && !matches!(tap.phase, Phase::Again(_)) {
                // What it says while it fetches code and data is worth a look, not haste.
                tap.phase = Phase::Again(Instant::now() + ASK_AGAIN);
            }
        }
        Ok(())
    }

    /// Who can be asked for a node's lines: itself, and then the keepers, which copy them.
    fn sources_of(&self, node: PeerId) -> Vec<PeerId> {
        let keepers = self.view.iter().flat_map(|view| &view.keepers).copied();
        core::iter::once(node).chain(keepers.filter(|keeper| *keeper != node)).collect()
    }

    fn open_tap(&mut self, node: PeerId) -> anyhow::Result<()> {
        let attempt = self.view.as_ref().map_or(Attempt(0), |view| view.attempt.number);
        let sources = self.sources_of(node);
        let tap = self.taps.entry(node).or_default();
        tap.source %= sources.len();
        let log = self.reading.log(sources[tap.source], tap.wanted(), true)?;
        tap.open();
        let (client, sender) = (Arc::clone(&self.reading.session.client), self.sender.clone());
        self.tasks.spawn(async move {
            let result = read_lines(&client, node, &log, &sender).await;
            // Nobody listens where the command is ending.
            let _ = sender.send(Event::LinesEnded(node, attempt, result)).await;
        });
        Ok(())
    }

    async fn lines_ended(
        &mut self,
        node: PeerId,
        attempt: Attempt,
        result: anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let is_done = self.view.as_ref().is_some_and(|view| view.state() == State::Done);
        let runs = self.view.as_ref().is_some_and(|view| {
            let mut ranks = view.attempt.ranks.iter().filter(|rank| rank.node == node);
            !is_done && ranks.any(|rank| rank.state != RankState::Ended)
        });
        let sources = self.sources_of(node).len();
        let tap = self.taps.entry(node).or_default();
        let is_of_copy = tap.source > 0;
        let reason = match result {
            Ok(()) if is_of_copy && runs => {
                // The node may be back.
                tap.source = 0;
                tap.phase = Phase::Again(Instant::now() + ASK_AGAIN);
                return Ok(());
            }
            Ok(()) => {
                tap.phase = Phase::Ended(attempt);
                return self.open_taps();
            }
            Err(reason) => reason,
        };
        if is_done {
            tap.failures += 1;
        }
        if tap.source == 0 {
            tap.trouble = Some(format!("{reason:#}"));
        }
        if tap.failures >= TRIES_AFTER_END * sources {
            tap.phase = Phase::GivenUp;
            let reason = anyhow::Error::msg(tap.trouble.take().unwrap_or_default());
            self.reading.warn_unreadable(node, &reason).await;
            return Ok(());
        }
        tap.source = (tap.source + 1) % sources;
        // All were asked: they may know more in a moment.
        let pause = if tap.source == 0 { ASK_AGAIN } else { Duration::ZERO };
        tap.phase = Phase::Again(Instant::now() + pause);
        Ok(())
    }
}

async fn watch_views(
    client: &Client,
    watch: &Watch,
    sender: &mpsc::Sender<Event>,
) -> anyhow::Result<()> {
    let mut views = client.post_lines::<JobView>(path::WATCH, watch).await?;
    while let Some(view) = views.next().await? {
        if sender.send(Event::View(Box::new(view))).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn read_lines(
    client: &Client,
    node: PeerId,
    log: &Log,
    sender: &mpsc::Sender<Event>,
) -> anyhow::Result<()> {
    let mut stream = client.post_bytes(path::LOG, log).await?;
    while let Some(bytes) = stream.next().await? {
        if sender.send(Event::Lines(node, bytes)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Lines of all streams that are not shown yet.
#[derive(Debug)]
struct Held {
    /// Each with its time, by which they are sorted, and from when on it may be shown.
    lines: Vec<(Vec<u8>, Vec<u8>, Instant)>,
    bytes: usize,
    /// Until then, what arrives may have been written long before.
    backlog_until: Instant,
}

impl Held {
    fn new(backlog_until: Instant) -> Self {
        Self { lines: Vec::new(), bytes: 0, backlog_until }
    }

    /// Takes lines of one stream. Those of one worker stay in their order, whatever its
    /// clock does.
    fn add(&mut self, latest: &mut Latest, lines: &[u8], now: Instant) {
        let due = (now + HOLD).max(self.backlog_until);
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            self.bytes += line.len();
            self.lines.push((latest.time_of(line), line.to_vec(), due));
        }
    }

    /// The time of the first that may be shown.
    fn due_at(&self) -> Option<Instant> {
        self.lines.iter().map(|(.., due)| *due).min()
    }

    /// What need not be held any longer, and all that is earlier.
    fn take_due(&mut self, now: Instant) -> Vec<u8> {
        if self.bytes > HELD_BYTES_MAX {
            return self.take_all();
        }
        if self.due_at().is_none_or(|due| due > now) {
            return Vec::new();
        }
        self.lines.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        let due = self.lines.iter().rposition(|(.., due)| *due <= now).map_or(0, |at| at + 1);
        self.take(due)
    }

    fn take_all(&mut self) -> Vec<u8> {
        self.lines.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        self.take(self.lines.len())
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let taken: Vec<u8> = self.lines.drain(..count).flat_map(|(_, line, _)| line).collect();
        self.bytes -= taken.len();
        taken
    }
}

/// The time of the last line that a stream brought, of each worker.
#[derive(Debug, Default)]
struct Latest {
    of: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of the last line of all, which one without a time continues.
    last: Vec<u8>,
}

impl Latest {
    /// The time by which a line is sorted: its own, or where that is earlier, that of the
    /// line before it.
    fn time_of(&mut self, line: &[u8]) -> Vec<u8> {
        if let (Some(stamp), Some(label)) = (stamp(line), label(line)) {
            let latest = self.of.entry(label.to_vec()).or_default();
            if stamp > &latest[..] {
                *latest = stamp.to_vec();
            }
            self.last.clone_from(latest);
        }
        self.last.clone()
    }
}

/// One node's lines, across all streams that were opened for them.
#[derive(Debug, Default)]
struct Tap {
    phase: Phase,
    failures: usize,
    latest: Latest,
    /// Which of its sources is asked: 0 is the node itself.
    source: usize,
    was_told_of_copy: bool,
    /// Why the node itself could not be read last.
    trouble: Option<String>,
    /// Ranks that ran there.
    ranks: BTreeSet<Part>,
    chunks: Chunks,
    /// What came of each rank's log.
    logs: BTreeMap<Part, PartLog>,
}

#[derive(Debug, Default)]
struct PartLog {
    bytes: u64,
    /// The beginning of a line.
    partial: Vec<u8>,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    New,
    Open,
    /// To be opened again then.
    Again(Instant),
    /// All lines of this attempt are here.
    Ended(Attempt),
    GivenUp,
}

impl Tap {
    fn open(&mut self) {
        self.phase = Phase::Open;
        self.chunks = Chunks::default();
    }

    fn bytes_of(&self, part: Part) -> u64 {
        self.logs.get(&part).map_or(0, |log| log.bytes)
    }

    /// What to ask the source for: a copy is of the newest attempt there.
    fn wanted(&self) -> Parts {
        let own = self.source == 0;
        let newest = self.ranks.last().map(|(attempt, _)| *attempt);
        let known = self.logs.keys().filter(|_| own).copied();
        let copied = self.ranks.iter().filter(|(attempt, _)| !own && Some(*attempt) == newest);
        let ranks = known.chain(copied.copied());
        let ranks = ranks.map(|part| (part.0, part.1, self.bytes_of(part))).collect();
        Parts { own, ranks }
    }

    /// The whole lines that are wanted.
    fn take(&mut self, bytes: &[u8], worker: Option<u32>) -> anyhow::Result<Vec<u8>> {
        self.chunks.push(bytes);
        let mut wanted = Vec::new();
        while let Some(chunk) = self.chunks.pop()? {
            let log = self.logs.entry(chunk.part).or_default();
            log.bytes += chunk.bytes.len() as u64;
            log.take(&chunk.bytes, worker, &mut wanted);
        }
        Ok(wanted)
    }

    /// Last lines without their end.
    fn rest(&mut self, worker: Option<u32>) -> Vec<u8> {
        let mut wanted = Vec::new();
        for log in self.logs.values_mut().filter(|log| !log.partial.is_empty()) {
            log.take(b"\n", worker, &mut wanted);
        }
        wanted
    }
}

impl PartLog {
    fn take(&mut self, bytes: &[u8], worker: Option<u32>, wanted: &mut Vec<u8>) {
        self.partial.extend_from_slice(bytes);
        let end = match self.partial.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            None if self.partial.len() > LINE_BYTES_MAX => self.partial.len(),
            None => return,
        };
        let rest = self.partial.split_off(end);
        let whole = std::mem::replace(&mut self.partial, rest);
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            if is_of(line, worker) {
                wanted.extend_from_slice(line);
            }
        }
    }
}

/// `worker 0` of `[time] [worker 0] text`.
fn label(line: &[u8]) -> Option<&[u8]> {
    let rest = line.strip_prefix(b"[")?;
    let close = rest.iter().position(|byte| *byte == b']')?;
    let rest = rest[close + 1..].strip_prefix(b" [")?;
    let close = rest.iter().position(|byte| *byte == b']')?;
    Some(&rest[..close])
}

fn is_of(line: &[u8], worker: Option<u32>) -> bool {
    worker.is_none_or(|worker| label(line) == Some(format!("worker {worker}").as_bytes()))
}

/// `2025-06-15T15:06:40.123Z`, which sorts as it reads.
const STAMP_BYTES: usize = 24;

fn stamp(line: &[u8]) -> Option<&[u8]> {
    let stamp = line.strip_prefix(b"[")?.get(..=STAMP_BYTES)?;
    let stamp = stamp.strip_suffix(b"]")?;
    stamp[0].is_ascii_digit().then_some(stamp)
}

/// All lines of several logs by time; those of one log and time stay in their order.
fn merge(logs: &[Vec<u8>], worker: Option<u32>) -> Vec<u8> {
    let mut lines: Vec<(&[u8], &[u8])> = Vec::new();
    for log in logs {
        let mut last: &[u8] = b"";
        for line in log.split_inclusive(|byte| *byte == b'\n') {
            last = stamp(line).unwrap_or(last);
            if is_of(line, worker) {
                lines.push((last, line));
            }
        }
    }
    lines.sort_by_key(|(stamp, _)| *stamp);
    let mut merged = Vec::with_capacity(lines.iter().map(|(_, line)| line.len() + 1).sum());
    for (_, line) in lines {
        merged.extend_from_slice(line);
        if !line.ends_with(b"\n") {
            merged.push(b'\n');
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use p2pit_node::api::log::Chunk;
    use p2pit_protocol::job::Rank;

    use super::*;
    use crate::view::samples::{peer, view};

    const TIME: &str = "2025-06-15T15:06:40.12";

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    fn part(attempt: u32, rank: u32) -> Part {
        (Attempt(attempt), Rank(rank))
    }

    fn chunk(rank: u32, text: &str) -> Vec<u8> {
        Chunk { part: part(1, rank), bytes: text.as_bytes().to_vec() }.encode()
    }

    #[test]
    fn lines_come_out_whole_whatever_the_pieces() {
        let log = format!("[{TIME}3Z] [worker 0] one\n[{TIME}4Z] [worker 0] two\nrest");
        for size in 1..log.len() {
            let mut tap = Tap::default();
            let pieces = log.as_bytes().chunks(size);
            let mut shown: Vec<u8> = pieces
                .flat_map(|piece| {
                    let piece = Chunk { part: part(1, 0), bytes: piece.to_vec() };
                    tap.take(&piece.encode(), None).unwrap()
                })
                .collect();
            shown.extend(tap.rest(None));
            assert_eq!(text(shown), format!("{log}\n"));
        }
    }

    #[test]
    fn a_stream_that_is_opened_again_goes_on_where_it_was_also_elsewhere() {
        let mut tap = Tap::default();
        let line = |worker: u8, n: u8| format!("[{TIME}3Z] [worker {worker}] {n}\n");
        tap.ranks = [part(1, 0), part(2, 0), part(2, 1)].into();
        assert_eq!(tap.wanted(), Parts { own: true, ranks: vec![] });
        tap.open();
        let sent = [chunk(0, &line(0, 1)), chunk(1, &line(1, 1)), chunk(0, "[cut")].concat();
        // The last piece comes only in part: it is as if it had not come.
        let shown = tap.take(&sent[..sent.len() - 1], None).unwrap();
        assert_eq!(text(shown), [line(0, 1), line(1, 1)].concat());
        let bytes = line(0, 1).len() as u64;
        let had = vec![(Attempt(1), Rank(0), bytes), (Attempt(1), Rank(1), bytes)];
        assert_eq!(tap.wanted(), Parts { own: true, ranks: had });
        tap.open();
        assert_eq!(text(tap.take(&chunk(0, &line(0, 2)), None).unwrap()), line(0, 2));
        // A keeper is asked for the newest attempt only.
        tap.source = 1;
        let ranks = vec![(Attempt(2), Rank(0), 0), (Attempt(2), Rank(1), 0)];
        assert_eq!(tap.wanted(), Parts { own: false, ranks });
    }

    #[test]
    fn only_the_lines_of_a_worker_are_shown_where_one_is_named() {
        let log = format!(
            "[{TIME}3Z] [worker 1] a\n[{TIME}3Z] [worker 11] b\n[{TIME}3Z] [daemon] c\nnaked\n"
        );
        let shown = Tap::default().take(&chunk(0, &log), Some(1)).unwrap();
        assert_eq!(text(shown), format!("[{TIME}3Z] [worker 1] a\n"));
        assert_eq!(
            text(merge(&[log.into_bytes()], Some(11))),
            format!("[{TIME}3Z] [worker 11] b\n")
        );
    }

    #[test]
    fn the_log_itself_is_read_before_a_copy_and_a_whole_copy_before_a_longer_one() {
        let held = |own, complete, bytes| HeldLog {
            attempt: Attempt(1),
            rank: Rank(0),
            bytes,
            own,
            complete,
        };
        let mut found = Found::default();
        found.add(peer(1), vec![held(false, false, 9)]);
        found.add(peer(2), vec![held(false, true, 8)]);
        found.add(peer(3), vec![held(true, false, 5)]);
        found.sort();
        let order = |found: &Found| -> Vec<PeerId> {
            found.sources[&part(1, 0)].iter().map(|(node, _)| *node).collect()
        };
        assert_eq!(order(&found), [peer(3), peer(2), peer(1)]);
        found.give_up(part(1, 0), peer(3));
        assert_eq!(order(&found), [peer(2), peer(1)]);
    }

    #[test]
    fn others_are_asked_where_an_earlier_attempt_or_a_rank_is_lacking() {
        let mut view = view(State::Running, None);
        view.attempt.number = Attempt(2);
        let rank = view.attempt.ranks[0].rank;
        view.attempt.ranks.truncate(1);
        let held = |attempt| HeldLog {
            attempt: Attempt(attempt),
            rank,
            bytes: 1,
            own: false,
            complete: true,
        };
        let mut found = Found::default();
        found.add(peer(1), vec![held(2)]);
        assert!(found.is_lacking(&view), "the first attempt");
        found.add(peer(2), vec![held(1)]);
        assert!(!found.is_lacking(&view));
        found.sources.remove(&(Attempt(2), rank));
        assert!(found.is_lacking(&view), "the rank of this one");
    }

    #[test]
    fn lines_of_several_streams_are_held_and_come_out_in_the_order_of_time() {
        let now = Instant::now();
        let line = |ms: u8, text: &str| format!("[{TIME}{ms}Z] [x] {text}\n");
        let mut held = Held::new(now);
        let (mut one, mut two) = (Latest::default(), Latest::default());
        held.add(&mut one, (line(3, "c") + "goes on\n").as_bytes(), now);
        held.add(&mut two, line(2, "b").as_bytes(), now + HOLD / 2);
        assert_eq!(text(held.take_due(now)), "");
        assert_eq!(held.due_at(), Some(now + HOLD));
        // With what is due goes what is earlier.
        assert_eq!(text(held.take_due(now + HOLD)), line(2, "b") + &line(3, "c") + "goes on\n");
        // A clock that was set back does not turn a stream's lines around.
        held.add(&mut one, (line(1, "d") + &line(4, "e")).as_bytes(), now + HOLD);
        held.add(&mut two, line(3, "x").as_bytes(), now + HOLD);
        assert_eq!(text(held.take_all()), line(1, "d") + &line(3, "x") + &line(4, "e"));
        assert_eq!((held.bytes, held.due_at()), (0, None));
        // The workers of one node overtake each other as well.
        let of = |worker: u8, ms: u8| format!("[{TIME}{ms}Z] [worker {worker}] {ms}\n");
        held.add(&mut one, (of(0, 7) + &of(1, 6) + &of(1, 8)).as_bytes(), now + HOLD);
        assert_eq!(text(held.take_all()), of(1, 6) + &of(0, 7) + &of(1, 8));
    }

    #[test]
    fn what_was_written_before_is_held_until_all_streams_had_time_to_bring_it() {
        let now = Instant::now();
        let mut held = Held::new(now + HOLD_BACKLOG);
        held.add(&mut Latest::default(), b"[x] [worker 0] a\n", now);
        assert_eq!(held.due_at(), Some(now + HOLD_BACKLOG));
        let much = vec![b'x'; HELD_BYTES_MAX + 1];
        held.add(&mut Latest::default(), &much, now);
        assert_eq!(held.take_due(now).len(), much.len() + 17, "too much to be held");
    }

    #[test]
    fn logs_of_several_nodes_are_put_in_the_order_of_time() {
        let line = |ms: u8, text: &str| format!("[{TIME}{ms}Z] [x] {text}\n");
        let first = format!("{}continued\n{}", line(1, "a"), line(5, "d"));
        let second = [line(1, "b"), line(3, "c")].concat() + "no end";
        let merged = merge(&[first.into_bytes(), second.into_bytes()], None);
        let order = [&line(1, "a"), "continued\n", &line(1, "b"), &line(3, "c"), "no end\n"];
        assert_eq!(text(merged), order.concat() + &line(5, "d"));
    }

    #[test]
    fn a_change_of_state_is_a_line_of_the_daemon() {
        let change = |reason: &str| Change {
            state: State::Waiting,
            at_ms: 1_750_000_000_123,
            reason: reason.to_owned(),
        };
        assert_eq!(
            history_line(&change("no\nroom")),
            "[2025-06-15T15:06:40.123Z] [daemon] WAITING: no room\n"
        );
        assert!(history_line(&change("")).ends_with("[daemon] WAITING\n"));
    }
}
