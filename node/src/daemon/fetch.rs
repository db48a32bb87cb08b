//! Bringing blobs here from whoever has them.
//!
//! What is missing is cut into pieces of some megabytes: many small blobs, or ranges of a
//! large one. Each source is asked for a piece at a time, two in flight, and gets the next
//! when it has delivered; so a fast one brings more than a slow one. What a source lacks is
//! asked of the others; one that sends wrong content is asked for nothing more, and one
//! that fails several times in a row neither. Nothing that arrived is ever asked for again,
//! also by the next daemon: see `transfer::store` about parts.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
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
/// Failures of a source in a row.
const FAILURES_MAX: u32 = 4;
const PAUSE: Duration = Duration::from_millis(200);

/// What to bring, and what lets us have it.
#[derive(Debug)]
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
    /// Disk or store.
    #[error("cannot keep what was fetched")]
    Here(#[source] anyhow::Error),
    #[error("no longer wanted")]
    Unwanted,
}

fn list(from: &[(String, String)]) -> String {
    match from {
        [] => "no node that may have it can be reached".to_owned(),
        _ => from.iter().map(|(node, why)| format!("{node}: {why}")).collect::<Vec<_>>().join("; "),
    }
}

/// Brings everything; `on_bytes` hears of content as it arrives. `is_wanted` is asked
/// before each piece. Gives the blobs and bytes that travelled.
pub(crate) async fn fetch<W: Future<Output = bool> + Send>(
    shared: &Arc<Shared>,
    fetch: Fetch,
    on_bytes: impl Fn(u64) + Clone + Send + 'static,
    is_wanted: impl Fn() -> W + Sync,
) -> Result<(u64, u64), FetchError> {
    let Fetch { request, gated, sources, blobs } = fetch;
    let store = shared.store.clone();
    let missing = tokio::task::spawn_blocking(move || lacking(&store, &blobs));
    let missing = missing.await.map_err(|e| FetchError::Here(e.into()))?;
    let plan = Plan::new(missing.map_err(|e| FetchError::Here(e.into()))?, &sources);
    if plan.is_done() {
        return Ok((0, 0));
    }
    debug!(pieces = plan.waiting.len(), sources = sources.len(), "fetching");
    let run = Run {
        shared,
        request,
        gated,
        plan: Mutex::new(plan),
        changed: Notify::new(),
        total: Mutex::new(Received::default()),
    };
    let workers = sources.iter().flat_map(|source| {
        (0..PIECES_IN_FLIGHT).map(|_| run.work(*source, on_bytes.clone(), &is_wanted))
    });
    futures::future::try_join_all(workers).await?;
    let outcome = run.plan().outcome();
    if let Err(Left { blob, from }) = outcome {
        let from = from.into_iter().map(|(peer, why)| (shared.label(peer), why)).collect();
        return Err(FetchError::Nowhere { blob, from });
    }
    let total = run.total.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((total.blobs, total.bytes))
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
    There { why: String, for_good: bool },
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
            let asked = self.ask(source, &piece, on_bytes.clone()).await;
            let pause = match asked {
                Ok(received) => {
                    let mut total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
                    total.blobs += received.blobs;
                    total.bytes += received.bytes;
                    drop(total);
                    self.plan().delivered(source, piece, &received.absent);
                    false
                }
                Err(Failed::Here(error)) => return Err(error),
                Err(Failed::There { why, for_good }) => {
                    warn!(%source, why, "a transfer was cut");
                    let store = self.shared.store.clone();
                    let left = tokio::task::spawn_blocking(move || still_lacking(&store, piece))
                        .await
                        .map_err(|e| FetchError::Here(e.into()))?
                        .map_err(|e| FetchError::Here(e.into()))?;
                    self.plan().failed(source, left, why, for_good)
                }
            };
            self.changed.notify_waiters();
            if pause {
                tokio::time::sleep(PAUSE).await;
                self.plan().in_flight -= 1;
                self.changed.notify_waiters();
            }
        }
    }

    async fn ask(
        &self,
        source: PeerId,
        piece: &[Wanted],
        on_bytes: impl Fn(u64) + Send + 'static,
    ) -> Result<Received, Failed> {
        let there = |why: String| Failed::There { why, for_good: false };
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
                Ok(gate) => gate.pass().map_err(|reason| Failed::There {
                    why: format!("{reason:#}"),
                    for_good: true,
                })?,
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
                Failed::There { why, for_good: wrong }
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
    /// Why it is asked for nothing more, or failed last.
    why: Option<String>,
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
                pieces.extend(wanted.in_ranges_of(PIECE_BYTES).map(|range| vec![range]));
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

    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.in_flight == 0
    }

    /// What to ask of `source` next.
    fn next(&mut self, source: PeerId) -> Next {
        let Some(asked) = self.sources.get(&source).filter(|source| !source.given_up) else {
            return Next::Done;
        };
        // Pieces are cut by what was lacking: all of a piece is lacking there, or none.
        let has = |piece: &Piece| piece.iter().all(|it| !asked.lacks.contains(&it.ask.id));
        if let Some(at) = self.waiting.iter().position(has)
            && let Some(piece) = self.waiting.remove(at)
        {
            self.in_flight += 1;
            return Next::Piece(piece);
        }
        if self.in_flight > 0 { Next::Wait } else { Next::Done }
    }

    fn delivered(&mut self, source: PeerId, piece: Piece, absent: &[BlobId]) {
        self.in_flight -= 1;
        if let Some(source) = self.sources.get_mut(&source) {
            source.failures = 0;
            source.lacks.extend(absent);
        }
        let absent: BTreeSet<&BlobId> = absent.iter().collect();
        let lacking: Piece =
            piece.into_iter().filter(|wanted| absent.contains(&wanted.ask.id)).collect();
        if !lacking.is_empty() {
            self.waiting.push_back(lacking);
        }
    }

    /// Whether to wait a little before that source is asked again. It counts as in flight
    /// until then: others, too, are to see what comes of it.
    fn failed(&mut self, source: PeerId, left: Piece, why: String, for_good: bool) -> bool {
        if !left.is_empty() {
            self.waiting.push_front(left);
        }
        if let Some(source) = self.sources.get_mut(&source) {
            source.failures += 1;
            source.given_up |= for_good || source.failures >= FAILURES_MAX;
            source.why = Some(why);
            if !source.given_up {
                return true;
            }
        }
        self.in_flight -= 1;
        false
    }

    /// Whether everything arrived, once nobody is asked any more.
    fn outcome(&self) -> Result<(), Left> {
        let Some(wanted) = self.waiting.iter().flatten().next() else { return Ok(()) };
        let why = |source: &Source| match &source.why {
            Some(why) if source.given_up => why.clone(),
            _ => "does not have it".to_owned(),
        };
        let from = self.sources.iter().map(|(peer, source)| (*peer, why(source))).collect();
        Err(Left { blob: wanted.ask.id, from })
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
    fn a_source_is_given_up_when_it_lies_or_keeps_failing_and_the_other_goes_on() {
        let missing = vec![blob(1, PIECE_BYTES), blob(2, PIECE_BYTES), blob(3, PIECE_BYTES)];
        let mut plan = Plan::new(missing, &[peer(1), peer(2), peer(3)]);
        let lied = piece(&mut plan, peer(1));
        assert!(!plan.failed(peer(1), lied, "wrong content".to_owned(), true));
        assert!(matches!(plan.next(peer(1)), Next::Done));
        for failure in 1..=FAILURES_MAX {
            let cut = piece(&mut plan, peer(2));
            let again = plan.failed(peer(2), cut, "cut".to_owned(), false);
            assert_eq!(again, failure < FAILURES_MAX);
            plan.in_flight -= usize::from(again);
        }
        for _ in 0..3 {
            let good = piece(&mut plan, peer(3));
            plan.delivered(peer(3), good, &[]);
        }
        assert!(plan.is_done() && plan.outcome().is_ok());
    }

    #[test]
    fn nobody_to_ask_is_said() {
        let mut plan = Plan::new(vec![blob(1, 1)], &[]);
        assert!(matches!(plan.next(peer(1)), Next::Done));
        let Left { blob, from } = plan.outcome().unwrap_err();
        assert!(from.is_empty());
        let error = FetchError::Nowhere { blob, from: Vec::new() }.to_string();
        assert!(error.contains("no node that may have it"), "{error}");
    }
}
