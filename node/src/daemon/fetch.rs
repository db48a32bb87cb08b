//! Bringing blobs here from whoever has them.
//!
//! What is missing is cut into pieces of some megabytes: many small blobs, or ranges of a
//! large one. Each source is asked for a piece at a time, two in flight, and gets the next
//! when it has delivered; so a fast one brings more than a slow one. What a source lacks is
//! asked of the others; one that sends wrong content is asked for nothing more, and one
//! that has failed for a minute neither: a daemon that restarts is back by then. Content
//! that arrived is not asked for again, also by the next daemon: see `transfer::store`
//! about parts.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use p2pit_protocol::{BlobId, PeerId};
use tokio::sync::Notify;
use tracing::{debug, warn};

use super::{
    Shared,
    serve::{Gate, Request},
};
use crate::transfer::{
    exchange::{self, Ask, ReceiveError, Received, Wanted},
    frame,
    store::{self, BlobStore},
};

/// Content of one piece: some 100 ms of a fast network.
const PIECE_BYTES: u64 = 16 << 20;
/// Blobs of one piece.
const PIECE_BLOBS: usize = 2_000;
/// Pieces asked of one source at a time, so that it need not wait for the next question.
const PIECES_IN_FLIGHT: usize = 2;
/// How long a source may fail, if nothing comes from it meanwhile, and how often at least.
const FAILING_MAX: Duration = Duration::from_secs(60);
const FAILURES_MIN: u32 = 4;
/// After a failure, doubled with each up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));
/// A source that sends nothing for so long is taken for a dead one.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// How often a transfer that goes on is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What was here when a fetch began may be removed as corrupt before its end.
const ROUNDS_MAX: u32 = 3;

/// What to bring, and what lets us have it.
#[derive(Debug, Clone)]
pub(crate) struct Fetch {
    /// Asked of each source.
    pub(crate) request: Request,
    /// Whether the answer begins with a [`Gate`].
    pub(crate) gated: bool,
    /// In the order of preference.
    pub(crate) sources: Vec<PeerId>,
    pub(crate) blobs: Blobs,
}

/// What is to be here in the end.
#[derive(Debug, Clone)]
pub(crate) enum Blobs {
    /// With their sizes.
    Known(Vec<(BlobId, u64)>),
    /// One of which is only known how long it is at most.
    UpTo(BlobId, u64),
}

/// Why not everything is here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// `from` says of each source, by its name, why not from there.
    #[error("blob {blob} cannot be had: {}", list(.from))]
    Nowhere { blob: BlobId, from: Vec<(String, String)> },
    /// Nobody that has it may give it to us.
    #[error("{0}")]
    Denied(String),
    /// Disk or store.
    #[error("cannot keep what was fetched")]
    Here(#[source] anyhow::Error),
    #[error("no longer wanted")]
    Unwanted,
}

/// Why not from a source that was asked for everything.
const LACKS: &str = "does not have it";

impl FetchError {
    /// Whether everybody who was to have it was asked, and has it not.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self, Self::Nowhere { from, .. } if from.iter().all(|(_, why)| why == LACKS))
    }
}

fn list(from: &[(String, String)]) -> String {
    match from {
        [] => "no node that may have it can be reached".to_owned(),
        _ => from.iter().map(|(node, why)| format!("{node}: {why}")).collect::<Vec<_>>().join("; "),
    }
}

/// Brings everything; `on_bytes` hears of content as it arrives. `is_wanted` is asked
/// before each piece. Gives the blobs and bytes that travelled.
///
/// Sources that others pass on for are asked only for what those that need it not cannot give.
pub(crate) async fn fetch<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    fetch: Fetch,
    on_bytes: impl Fn(u64) + Clone + Send + 'static,
    is_wanted: impl Fn() -> W + Sync,
) -> Result<(u64, u64), FetchError> {
    let (far, near): (Vec<_>, Vec<_>) =
        fetch.sources.iter().partition(|source| shared.is_passed_on(**source));
    if far.is_empty() || near.is_empty() {
        return fetch_from(shared, fetch, on_bytes, &is_wanted).await;
    }
    let of = |sources| Fetch { sources, ..fetch.clone() };
    match fetch_from(shared, of(near), on_bytes.clone(), &is_wanted).await {
        Err(FetchError::Nowhere { from: mut why, .. }) => {
            let fetched = fetch_from(shared, of(far), on_bytes, &is_wanted).await;
            fetched.map_err(|error| match error {
                FetchError::Nowhere { blob, from } => {
                    why.extend(from);
                    FetchError::Nowhere { blob, from: why }
                }
                error => error,
            })
        }
        fetched => fetched,
    }
}

async fn fetch_from<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    fetch: Fetch,
    on_bytes: impl Fn(u64) + Clone + Send + 'static,
    is_wanted: &(impl Fn() -> W + Sync),
) -> Result<(u64, u64), FetchError> {
    let Fetch { request, gated, sources, blobs } = fetch;
    // However long it takes: what came stays.
    let _in_use = shared.store.begin_use();
    let blobs = Arc::new(blobs);
    let mut total = (0, 0);
    for round in 0.. {
        let (store, asked) = (shared.store.clone(), Arc::clone(&blobs));
        let missing = tokio::task::spawn_blocking(move || {
            let missing = lacking(&store, &asked)?;
            if let Blobs::Known(_) = *asked {
                // Rather before it travels than after.
                store.could_ever_fit(missing.iter().map(Wanted::bytes).sum())?;
            }
            anyhow::Ok(missing)
        })
        .await;
        let missing = missing.map_err(|e| FetchError::Here(e.into()))?.map_err(FetchError::Here)?;
        let Some(first) = missing.first() else { break };
        if round == ROUNDS_MAX {
            let from = vec![("this node".to_owned(), "it is removed again and again".to_owned())];
            return Err(FetchError::Nowhere { blob: first.ask.id, from });
        }
        debug!(blobs = missing.len(), sources = sources.len(), "fetching");
        let run = Run {
            shared,
            request: request.clone(),
            gated,
            plan: Mutex::new(Plan::new(missing, &sources)),
            changed: Notify::new(),
            total: Mutex::new(Received::default()),
        };
        let workers = sources.iter().flat_map(|source| {
            (0..PIECES_IN_FLIGHT).map(|_| run.work(*source, on_bytes.clone(), is_wanted))
        });
        futures::future::try_join_all(workers).await?;
        run.plan().outcome().map_err(|left| left.into_error(shared))?;
        let received = run.total.into_inner().unwrap_or_else(PoisonError::into_inner);
        total.0 += received.blobs;
        total.1 += received.bytes;
    }
    Ok(total)
}

/// What of `blobs` is not here.
fn lacking(store: &BlobStore, blobs: &Blobs) -> Result<Vec<Wanted>, store::Error> {
    match blobs {
        Blobs::UpTo(id, _) if store.has(id) => Ok(Vec::new()),
        Blobs::UpTo(id, max) => Ok(vec![Wanted::whole(*id, *max)]),
        Blobs::Known(blobs) => {
            let missing = blobs.iter().map(|(id, size)| Wanted::missing(store, *id, *size));
            missing.filter_map(Result::transpose).collect()
        }
    }
}

struct Run<'a> {
    shared: &'a Arc<Shared>,
    request: Request,
    gated: bool,
    plan: Mutex<Plan>,
    /// A piece came back, or the last one arrived.
    changed: Notify,
    total: Mutex<Received>,
}

/// How asking a source for a piece can fail.
enum Failed {
    Here(FetchError),
    There(Trouble),
}

/// What a source failed of.
#[derive(Debug, Clone)]
enum Trouble {
    /// It may be back.
    Cut(String),
    /// It is asked for nothing more.
    Wrong(String),
    Denied(String),
}

impl Trouble {
    fn why(&self) -> &str {
        let (Self::Cut(why) | Self::Wrong(why) | Self::Denied(why)) = self;
        why
    }
}

impl Run<'_> {
    /// Asks `source` for pieces until there are none for it.
    async fn work<W: Future<Output = bool> + Send>(
        &self,
        source: PeerId,
        on_bytes: impl Fn(u64) + Clone + Send + 'static,
        is_wanted: &(impl Fn() -> W + Sync),
    ) -> Result<(), FetchError> {
        loop {
            let changed = self.changed.notified();
            let next = self.plan().next(source);
            let piece = match next {
                Next::Piece(piece) => piece,
                // Others may give back what they were asked for.
                Next::Wait => {
                    changed.await;
                    continue;
                }
                Next::Done => return Ok(()),
            };
            if !is_wanted().await {
                return Err(FetchError::Unwanted);
            }
            let asked = self.ask_while(source, &piece, on_bytes.clone(), is_wanted).await;
            let pause = match asked {
                Ok(received) => {
                    let mut total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
                    total.blobs += received.blobs;
                    total.bytes += received.bytes;
                    drop(total);
                    self.plan().delivered(source, piece, &received.absent);
                    None
                }
                Err(Failed::Here(error)) => return Err(error),
                Err(Failed::There(trouble)) => {
                    warn!(%source, why = trouble.why(), "a transfer was cut");
                    let store = self.shared.store.clone();
                    let left = tokio::task::spawn_blocking(move || still_lacking(&store, piece))
                        .await
                        .map_err(|e| FetchError::Here(e.into()))?
                        .map_err(|e| FetchError::Here(e.into()))?;
                    self.plan().failed(source, left, trouble, Instant::now())
                }
            };
            self.changed.notify_waiters();
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
                self.plan().in_flight -= 1;
                self.changed.notify_waiters();
            }
        }
    }

    /// Asks for a piece while somebody wants it and something comes.
    async fn ask_while<W: Future<Output = bool> + Send>(
        &self,
        source: PeerId,
        piece: &[Wanted],
        on_bytes: impl Fn(u64) + Send + 'static,
        is_wanted: &(impl Fn() -> W + Sync),
    ) -> Result<Received, Failed> {
        let come = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&come);
        let on_bytes = move |bytes| {
            counted.fetch_add(bytes, Ordering::Relaxed);
            on_bytes(bytes);
        };
        let mut asking = std::pin::pin!(self.ask(source, piece, on_bytes));
        let (mut before, mut since) = (0, Instant::now());
        loop {
            tokio::select! {
                asked = &mut asking => return asked,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if !is_wanted().await {
                return Err(Failed::Here(FetchError::Unwanted));
            }
            let now = come.load(Ordering::Relaxed);
            if now != before {
                (before, since) = (now, Instant::now());
            } else if since.elapsed() >= SILENCE_MAX {
                let why = format!("sent nothing for {} s", SILENCE_MAX.as_secs());
                return Err(Failed::There(Trouble::Cut(why)));
            }
        }
    }

    async fn ask(
        &self,
        source: PeerId,
        piece: &[Wanted],
        on_bytes: impl Fn(u64) + Send + 'static,
    ) -> Result<Received, Failed> {
        let there = |why: String| Failed::There(Trouble::Cut(why));
        let opened = self.shared.open_bulk(source, &self.request).await;
        let (mut send, mut receive) =
            opened.map_err(|e| there(format!("{:#}", anyhow::Error::from(e))))?;
        let asks: Vec<Ask> = piece.iter().map(|wanted| wanted.ask.clone()).collect();
        let asked = async {
            exchange::write_asks(&mut send, &asks).await?;
            send.finish()?;
            std::io::Result::Ok(())
        };
        asked.await.map_err(|e| there(e.to_string()))?;
        if self.gated {
            match frame::read_message::<Gate>(&mut receive, usize::MAX).await {
                Ok(gate) => gate
                    .pass()
                    .map_err(|reason| Failed::There(Trouble::Denied(format!("{reason:#}"))))?,
                Err(e) => return Err(there(e.to_string())),
            }
        }
        let (store, pace) = (&self.shared.store, &self.shared.bandwidth.download);
        exchange::receive_blobs(store, piece, source, &mut receive, pace, on_bytes).await.map_err(
            |error| {
                let wrong = matches!(
                    error,
                    ReceiveError::WrongContent { .. }
                        | ReceiveError::Unexpected { .. }
                        | ReceiveError::TooLarge { .. }
                        | ReceiveError::Malformed { .. }
                );
                if error.is_local() {
                    return Failed::Here(FetchError::Here(error.into()));
                }
                let why = format!("{:#}", anyhow::Error::from(error));
                Failed::There(if wrong { Trouble::Wrong(why) } else { Trouble::Cut(why) })
            },
        )
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        // Whole between any two of its statements.
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of a piece has not arrived.
fn still_lacking(store: &BlobStore, piece: Piece) -> Result<Piece, store::Error> {
    piece.into_iter().filter_map(|wanted| wanted.still_missing(store).transpose()).collect()
}

type Piece = Vec<Wanted>;

#[derive(Debug)]
enum Next {
    Piece(Piece),
    Wait,
    Done,
}

/// A blob that nobody gave, and why each did not.
#[derive(Debug)]
struct Left {
    blob: BlobId,
    from: Vec<(PeerId, String)>,
    /// Whether the reason of each is that we may not have it.
    denied: bool,
}

impl Left {
    fn into_error(self, shared: &Shared) -> FetchError {
        let Self { blob, from, denied } = self;
        let from: Vec<_> = from.into_iter().map(|(peer, why)| (shared.label(peer), why)).collect();
        match from.first() {
            Some((node, why)) if denied => FetchError::Denied(format!("{node}: {why}")),
            _ => FetchError::Nowhere { blob, from },
        }
    }
}

/// Who is asked for what.
#[derive(Debug, Default)]
struct Plan {
    waiting: VecDeque<Piece>,
    in_flight: usize,
    sources: BTreeMap<PeerId, Source>,
}

#[derive(Debug, Default)]
struct Source {
    lacks: BTreeSet<BlobId>,
    failures: u32,
    failing_since: Option<Instant>,
    /// Of the last failure.
    trouble: Option<Trouble>,
    given_up: bool,
}

impl Plan {
    fn new(missing: Vec<Wanted>, sources: &[PeerId]) -> Self {
        let mut pieces = VecDeque::new();
        let (mut small, mut bytes): (Piece, u64) = (Vec::new(), 0);
        for wanted in missing {
            // Of a size that is only a bound nothing is known, but that it is one blob.
            let size = wanted.bytes();
            if wanted.is_large() && size > PIECE_BYTES {
                // Cut when its turn comes: its size is only what somebody says.
                pieces.push_back(vec![wanted]);
                continue;
            }
            if small.len() >= PIECE_BLOBS || (bytes > 0 && bytes + size > PIECE_BYTES) {
                pieces.push_back(std::mem::take(&mut small));
                bytes = 0;
            }
            bytes += size;
            small.push(wanted);
        }
        if !small.is_empty() {
            pieces.push_back(small);
        }
        let sources = sources.iter().map(|source| (*source, Source::default())).collect();
        Self { waiting: pieces, in_flight: 0, sources }
    }

    /// What to ask of `source` next.
    fn next(&mut self, source: PeerId) -> Next {
        let Some(asked) = self.sources.get(&source).filter(|source| !source.given_up) else {
            return Next::Done;
        };
        // Pieces are cut by what was lacking: all of a piece is lacking there, or none.
        let lacks = |source: &Source, piece: &Piece| {
            piece.iter().any(|it| source.lacks.contains(&it.ask.id))
        };
        // What failed last is not asked for what another can give: a dead one would take each
        // piece as soon as it has lost it.
        let is_well = |source: &&Source| !source.given_up && source.failing_since.is_none();
        let is_for_others = |piece: &Piece| {
            asked.failing_since.is_some()
                && self.sources.values().filter(is_well).any(|other| !lacks(other, piece))
        };
        let has = |piece: &Piece| !lacks(asked, piece) && !is_for_others(piece);
        if let Some(at) = self.waiting.iter().position(has)
            && let Some(mut piece) = self.waiting.remove(at)
        {
            if let [large] = &mut piece[..]
                && large.is_large()
                && let (first, Some(rest)) = large.split(PIECE_BYTES)
            {
                *large = first;
                self.waiting.insert(at, vec![rest]);
            }
            self.in_flight += 1;
            return Next::Piece(piece);
        }
        // What others are to give may come back from them.
        let may_be_needed = self.waiting.iter().any(|piece| !lacks(asked, piece));
        if self.in_flight > 0 || may_be_needed { Next::Wait } else { Next::Done }
    }

    fn delivered(&mut self, source: PeerId, piece: Piece, absent: &[BlobId]) {
        self.in_flight -= 1;
        if let Some(source) = self.sources.get_mut(&source) {
            (source.failures, source.failing_since) = (0, None);
            source.lacks.extend(absent);
        }
        let absent: BTreeSet<&BlobId> = absent.iter().collect();
        let lacking: Piece =
            piece.into_iter().filter(|wanted| absent.contains(&wanted.ask.id)).collect();
        if !lacking.is_empty() {
            self.waiting.push_back(lacking);
        }
    }

    /// How long to wait before that source is asked again, if it is. It counts as in flight
    /// until then: others, too, are to see what comes of it.
    fn failed(
        &mut self,
        source: PeerId,
        left: Piece,
        trouble: Trouble,
        now: Instant,
    ) -> Option<Duration> {
        if !left.is_empty() {
            self.waiting.push_front(left);
        }
        if let Some(source) = self.sources.get_mut(&source) {
            source.failures += 1;
            let since = *source.failing_since.get_or_insert(now);
            source.given_up |= !matches!(trouble, Trouble::Cut(_))
                || source.failures >= FAILURES_MIN && now.duration_since(since) >= FAILING_MAX;
            source.trouble = Some(trouble);
            if !source.given_up {
                let doubled = PAUSES.0 * 2_u32.saturating_pow(source.failures.min(8) - 1);
                return Some(doubled.min(PAUSES.1));
            }
        }
        self.in_flight -= 1;
        None
    }

    /// Whether everything arrived, once nobody is asked any more.
    fn outcome(&self) -> Result<(), Left> {
        let Some(wanted) = self.waiting.iter().flatten().next() else { return Ok(()) };
        let given_up = |source: &&Source| source.given_up;
        let trouble = |source: &Source| source.trouble.clone().filter(|_| source.given_up);
        let why =
            |source: &Source| trouble(source).map_or(LACKS.to_owned(), |it| it.why().to_owned());
        let denied = !self.sources.is_empty()
            && self.sources.values().filter(given_up).count() == self.sources.len()
            && self.sources.values().all(|it| matches!(it.trouble, Some(Trouble::Denied(_))));
        let from = self.sources.iter().map(|(peer, source)| (*peer, why(source))).collect();
        Err(Left { blob: wanted.ask.id, from, denied })
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::KeyPair;

    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId(KeyPair::from_seed(&[number; 32]).public())
    }

    fn blob(number: u32, size: u64) -> Wanted {
        Wanted::whole(BlobId::of(&number.to_le_bytes()), size)
    }

    fn piece(plan: &mut Plan, source: PeerId) -> Piece {
        match plan.next(source) {
            Next::Piece(piece) => piece,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn small_blobs_travel_together_and_a_large_one_in_ranges() {
        let mut missing: Vec<Wanted> = (0..5_000).map(|i| blob(i, 1_000)).collect();
        let mut large = blob(9_000, 40 << 20);
        large.ask.ranges = vec![(0, 40 << 20)];
        missing.push(large);
        let mut plan = Plan::new(missing, &[peer(1)]);
        let mut counts = Vec::new();
        let mut bytes = 0;
        while let Next::Piece(piece) = plan.next(peer(1)) {
            counts.push(piece.len());
            bytes += piece.iter().map(Wanted::bytes).sum::<u64>();
            plan.delivered(peer(1), piece, &[]);
        }
        counts.sort_unstable();
        assert_eq!(counts, [1, 1, 1, 1_000, 2_000, 2_000]);
        assert_eq!(bytes, 5_000_000 + (40 << 20));
        assert!(plan.outcome().is_ok());
    }

    #[test]
    fn what_one_source_lacks_is_asked_of_the_other() {
        let wanted = [blob(1, 10), blob(2, 10)];
        let mut plan = Plan::new(wanted.to_vec(), &[peer(1), peer(2)]);
        let first = piece(&mut plan, peer(1));
        assert!(matches!(plan.next(peer(2)), Next::Wait));
        plan.delivered(peer(1), first, &[wanted[1].ask.id]);
        assert!(matches!(plan.next(peer(1)), Next::Done));
        let second = piece(&mut plan, peer(2));
        assert_eq!(second, [wanted[1].clone()]);
        // While it is on its way, the first may yet be needed for it.
        assert!(matches!(plan.next(peer(1)), Next::Wait));
        plan.delivered(peer(2), second, &[wanted[1].ask.id]);
        assert!(matches!(plan.next(peer(2)), Next::Done));
        let left = plan.outcome().unwrap_err();
        assert_eq!(left.blob, wanted[1].ask.id);
        let whys: Vec<&str> = left.from.iter().map(|(_, why)| why.as_str()).collect();
        assert_eq!(whys, ["does not have it"; 2]);
    }

    #[test]
    fn what_a_silent_source_may_have_is_not_lost() {
        let lost = |silent: bool| {
            let wanted = blob(1, 10);
            let mut plan = Plan::new(vec![wanted.clone()], &[peer(1), peer(2)]);
            let asked = piece(&mut plan, peer(1));
            plan.delivered(peer(1), asked, &[wanted.ask.id]);
            let asked = piece(&mut plan, peer(2));
            if silent {
                let denied = Trouble::Denied("not of this pool".to_owned());
                plan.failed(peer(2), asked, denied, Instant::now());
            } else {
                plan.delivered(peer(2), asked, &[wanted.ask.id]);
            }
            let Left { blob, from, .. } = plan.outcome().unwrap_err();
            let from = from.into_iter().map(|(peer, why)| (peer.to_string(), why)).collect();
            FetchError::Nowhere { blob, from }.is_lost()
        };
        assert!(lost(false));
        assert!(!lost(true));
        assert!(!FetchError::Denied("not of this pool".to_owned()).is_lost());
    }

    #[test]
    fn a_source_is_given_up_when_it_lies_or_keeps_failing() {
        let mut plan = Plan::new(vec![blob(1, PIECE_BYTES)], &[peer(1), peer(2)]);
        let (start, lied) = (Instant::now(), piece(&mut plan, peer(1)));
        let wrong = Trouble::Wrong("wrong content".to_owned());
        assert!(plan.failed(peer(1), lied, wrong, start).is_none());
        assert!(matches!(plan.next(peer(1)), Next::Done));
        // As often as it likes within a minute: it may be restarting.
        for failure in 0..9 {
            let cut = piece(&mut plan, peer(2));
            let at = start + FAILING_MAX * failure / 8;
            let pause = plan.failed(peer(2), cut, Trouble::Cut("cut".to_owned()), at);
            assert_eq!(pause.is_some(), failure < 8, "{failure}");
            plan.in_flight -= usize::from(pause.is_some());
        }
        assert!(plan.in_flight == 0 && plan.outcome().is_err());
    }

    #[test]
    fn what_one_source_fails_of_is_left_to_the_other_until_that_fails_too() {
        let mut plan = Plan::new(vec![blob(1, 10)], &[peer(1), peer(2)]);
        let fail = |plan: &mut Plan, source: PeerId| {
            let cut = piece(plan, source);
            let trouble = Trouble::Cut("cut".to_owned());
            assert!(plan.failed(source, cut, trouble, Instant::now()).is_some());
            plan.in_flight -= 1;
        };
        fail(&mut plan, peer(1));
        assert!(matches!(plan.next(peer(1)), Next::Wait));
        fail(&mut plan, peer(2));
        // Neither is better than the other now.
        let good = piece(&mut plan, peer(1));
        plan.delivered(peer(1), good, &[]);
        assert!(plan.outcome().is_ok());
        assert!(matches!(plan.next(peer(2)), Next::Done));
    }

    #[test]
    fn only_where_all_deny_it_is_it_denied() {
        let denied = || Trouble::Denied("not yours".to_owned());
        for (second, expected) in [(denied(), true), (Trouble::Wrong("bad".to_owned()), false)] {
            let mut plan = Plan::new(vec![blob(1, 10)], &[peer(1), peer(2)]);
            for (source, trouble) in [(peer(1), denied()), (peer(2), second)] {
                let asked = piece(&mut plan, source);
                assert!(plan.failed(source, asked, trouble, Instant::now()).is_none());
            }
            assert_eq!(plan.outcome().unwrap_err().denied, expected);
        }
    }

    #[test]
    fn nobody_to_ask_is_said() {
        let mut plan = Plan::new(vec![blob(1, 1)], &[]);
        assert!(matches!(plan.next(peer(1)), Next::Done));
        let Left { blob, from, denied } = plan.outcome().unwrap_err();
        assert!(from.is_empty() && !denied);
        let error = FetchError::Nowhere { blob, from: Vec::new() }.to_string();
        assert!(error.contains("no node that may have it"), "{error}");
    }
}
