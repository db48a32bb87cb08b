//! A submitter's trees on their way to two of the job's keepers.
//!
//! A keeper asks for what it lacks, first of the manifest, then of all that it names; so
//! a tree of any number of blobs fits, and a push that was cut goes on where it stopped.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use p2pit_protocol::{BlobId, PeerId, job::VerifiedSpec};
use tokio::sync::mpsc;
use tracing::info;

use super::{
    Shared,
    serve::{Gate, MANIFEST_BYTES_MAX, Request},
};
use crate::transfer::{
    exchange::{self, Ask, SendError, Source, Wanted},
    frame,
    store::{self, BlobStore},
    stream::{RecvStream, SendStream},
    tree::Tree,
};

/// How far a push is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pushed {
    pub(crate) blobs: u64,
    pub(crate) bytes: u64,
    pub(crate) bytes_done: u64,
    /// Blobs the keeper had already.
    pub(crate) there: u64,
}

/// Nodes beside the submitter's own that get a job's inputs before it is submitted, and nodes
/// that have them then, where there are so many.
const COPIES: usize = 2;

/// Has a job's inputs kept by this node, if it is a keeper, and brought to two others: the
/// first that can be reached. Returns once enough nodes have them; what is still on its way
/// then goes on. `report` hears of all that travels until then, `note` of what does not. Gives
/// what the one that lacked most was sent, of those that have all.
pub(crate) async fn spread(
    shared: &Arc<Shared>,
    spec: &VerifiedSpec,
    keepers: &[PeerId],
    report: impl FnMut(Pushed) + Send,
    note: impl FnMut(String) + Send,
) -> anyhow::Result<Pushed> {
    let trees: Vec<BlobId> = spec.inputs().collect();
    let me = shared.id();
    if keepers.contains(&me) {
        for tree in &trees {
            shared.space.pushed(*tree);
            shared.keep_tree(*tree).await?;
        }
    }
    let others = with_room_first(shared, keepers.iter().filter(|keeper| **keeper != me)).await?;
    let needed = COPIES.min(keepers.len()) - usize::from(keepers.contains(&me));
    let (trees, bringer) = (Arc::<[BlobId]>::from(trees), Arc::clone(shared));
    let (travelled, mut travels) = mpsc::channel(TRAVELLED_MAX);
    let mut pushes = Pushes::begun(others, move |to| {
        let (shared, trees) = (Arc::clone(&bringer), Arc::clone(&trees));
        let travelled = travelled.clone();
        async move { bring_all(&shared, to, &trees, &travelled).await }.boxed()
    });
    let label = |node| shared.label(node);
    let most = pushes.until(needed, &mut travels, label, report, note).await?;
    if !pushes.going.is_empty() {
        // A daemon that a command had started stays until that is done.
        let (in_use, shared) = (shared.in_use(), Arc::clone(shared));
        tokio::spawn(async move {
            while let Some(outcome) = pushes.next().await {
                if let Outcome::Missed { to, reason, .. } = outcome {
                    let (node, reason) = (shared.label(to), format!("{reason:#}"));
                    info!(node, reason, "a job's inputs did not reach a further keeper of it");
                }
            }
            drop(in_use);
        });
    }
    Ok(most)
}

/// In this order, those last that say that they have no room.
async fn with_room_first(
    shared: &Shared,
    keepers: impl Iterator<Item = &PeerId>,
) -> anyhow::Result<VecDeque<PeerId>> {
    let mut keepers: Vec<PeerId> = keepers.copied().collect();
    let asked = keepers.clone();
    let full = shared.act(move |peer, _| {
        let is_full = |node: &PeerId| peer.board().get(*node).is_some_and(|it| it.advert.full);
        asked.into_iter().filter(is_full).collect::<Vec<_>>()
    });
    let full = full.await?;
    keepers.sort_by_key(|keeper| full.contains(keeper));
    Ok(keepers.into())
}

/// Brings everything to one keeper.
type Bring = Box<dyn Fn(PeerId) -> BoxFuture<'static, anyhow::Result<Pushed>> + Send>;

/// Reports of what travels that wait; more are left out.
const TRAVELLED_MAX: usize = 64;

/// A job's inputs on their way to [`COPIES`] keepers, or as many as there are.
struct Pushes {
    bring: Bring,
    /// Who gets them where one of the first cannot.
    others: VecDeque<PeerId>,
    going: FuturesUnordered<BoxFuture<'static, (PeerId, anyhow::Result<Pushed>)>>,
}

/// How a push ended.
enum Outcome {
    Brought(Pushed),
    Missed { to: PeerId, reason: anyhow::Error, instead: Option<PeerId> },
}

impl Pushes {
    fn begun(
        mut others: VecDeque<PeerId>,
        bring: impl Fn(PeerId) -> BoxFuture<'static, anyhow::Result<Pushed>> + Send + 'static,
    ) -> Self {
        let first: Vec<PeerId> = others.drain(..COPIES.min(others.len())).collect();
        let pushes = Self { bring: Box::new(bring), others, going: FuturesUnordered::new() };
        first.into_iter().for_each(|to| pushes.begin(to));
        pushes
    }

    fn begin(&self, to: PeerId) {
        let brought = (self.bring)(to);
        self.going.push(async move { (to, brought.await) }.boxed());
    }

    /// The next that ends; where it failed, another is begun in its place. `None` once nothing
    /// is on its way.
    async fn next(&mut self) -> Option<Outcome> {
        let (to, brought) = self.going.next().await?;
        Some(match brought {
            Ok(pushed) => Outcome::Brought(pushed),
            Err(reason) => {
                let instead = self.others.pop_front();
                instead.into_iter().for_each(|next| self.begin(next));
                Outcome::Missed { to, reason, instead }
            }
        })
    }

    /// Returns once so many have everything.
    async fn until(
        &mut self,
        needed: usize,
        travels: &mut mpsc::Receiver<(PeerId, Pushed)>,
        label: impl Fn(PeerId) -> String,
        mut report: impl FnMut(Pushed),
        mut note: impl FnMut(String),
    ) -> anyhow::Result<Pushed> {
        let mut most: Option<Pushed> = None;
        let (mut copies, mut first_failure) = (0_usize, None);
        let mut all = BTreeMap::new();
        while copies < needed {
            let outcome = tokio::select! {
                biased;
                Some((to, now)) = travels.recv() => {
                    all.insert(to, now);
                    report(all.values().fold(Pushed::default(), |sum, pushed| sum.and(*pushed)));
                    continue;
                }
                outcome = self.next() => outcome,
            };
            let (to, reason, instead) = match outcome {
                Some(Outcome::Brought(pushed)) => {
                    copies += 1;
                    most = Some(most.map_or(pushed, |known| {
                        core::cmp::max_by_key(pushed, known, |pushed| pushed.bytes)
                    }));
                    continue;
                }
                Some(Outcome::Missed { to, reason, instead }) => (to, reason, instead),
                None => break,
            };
            let missed = format!("the job's inputs did not reach {}, a keeper of it", label(to));
            if let Some(next) = instead {
                note(format!("{missed}: {reason:#}; {} gets them instead", label(next)));
            } else if copies + self.going.len() >= needed {
                note(format!("{missed}: {reason:#}"));
            }
            first_failure.get_or_insert_with(|| reason.context(missed));
        }
        match first_failure {
            Some(reason) if copies < needed => Err(reason),
            Some(_) | None => Ok(most.unwrap_or_default()),
        }
    }
}

/// Brings trees to one keeper, and tells of what travels to it.
async fn bring_all(
    shared: &Arc<Shared>,
    to: PeerId,
    trees: &[BlobId],
    travelled: &mpsc::Sender<(PeerId, Pushed)>,
) -> anyhow::Result<Pushed> {
    let mut sum = Pushed::default();
    for tree in trees {
        let before = sum;
        let pushed = shared
            .push_tree(to, *tree, |now| {
                // For watching: what does not fit is not missed.
                let _ = travelled.try_send((to, before.and(now)));
            })
            .await?;
        sum = sum.and(pushed);
    }
    Ok(sum)
}

impl Pushed {
    fn and(self, other: Self) -> Self {
        Self {
            blobs: self.blobs + other.blobs,
            bytes: self.bytes + other.bytes,
            bytes_done: self.bytes_done + other.bytes_done,
            there: self.there + other.there,
        }
    }
}

/// Takes in a tree that a submitter's node brings, and says so once all of it is durable.
pub(super) async fn take(
    shared: &Arc<Shared>,
    from: PeerId,
    root: BlobId,
    manifest_bytes: u64,
    send: &mut SendStream,
    receive: &mut RecvStream,
) -> anyhow::Result<()> {
    if manifest_bytes > MANIFEST_BYTES_MAX {
        bail!(
            "its list of files has {manifest_bytes} bytes; at most {MANIFEST_BYTES_MAX} are taken"
        );
    }
    // However long it takes: what was found to be here stays.
    let _in_use = shared.store.begin_use();
    let store = shared.store.clone();
    // A list that went bad here is as good as none: it is sent again, and not met halfway.
    let check = move || if store.has(&root) { store.check(&root) } else { Ok(()) };
    match tokio::task::spawn_blocking(check).await? {
        Ok(()) | Err(store::Error::Corrupt(_)) => {}
        Err(reason) => return Err(reason.into()),
    }
    take_blobs(shared, from, vec![(root, manifest_bytes)], send, receive).await?;
    let store = shared.store.clone();
    let blobs = tokio::task::spawn_blocking(move || blobs_of(&store, root)).await??;
    take_blobs(shared, from, blobs, send, receive).await?;
    shared.space.pushed(root);
    shared.keep_tree(root).await?;
    frame::write_message(send, &Gate::Open).await?;
    Ok(())
}

async fn take_blobs(
    shared: &Arc<Shared>,
    from: PeerId,
    blobs: Vec<(BlobId, u64)>,
    send: &mut SendStream,
    receive: &mut RecvStream,
) -> anyhow::Result<()> {
    let store = shared.store.clone();
    let wanted = tokio::task::spawn_blocking(move || {
        let wanted = lacking(&store, &blobs)?;
        // Rather before it travels than after.
        store.could_ever_fit(wanted.iter().map(Wanted::bytes).sum())?;
        anyhow::Ok(wanted)
    })
    .await??;
    let asks: Vec<Ask> = wanted.iter().map(|wanted| wanted.ask.clone()).collect();
    frame::write_message(send, &Gate::Open).await?;
    exchange::write_asks(send, &asks).await?;
    if wanted.is_empty() {
        return Ok(());
    }
    let pace = &shared.bandwidth.download;
    let received =
        exchange::receive_blobs(&shared.store, &wanted, from, receive, pace, |_| {}).await?;
    match received.absent.first() {
        None => Ok(()),
        Some(absent) => bail!("blob {absent} cannot be read by {}", shared.label(from)),
    }
}

fn lacking(store: &BlobStore, blobs: &[(BlobId, u64)]) -> Result<Vec<Wanted>, store::Error> {
    let lacking = blobs.iter().map(|(id, size)| Wanted::missing(store, *id, *size));
    lacking.filter_map(Result::transpose).collect()
}

/// The blobs that the manifest `root`, which is in the store, names, and their sizes.
pub(super) fn blobs_of(store: &BlobStore, root: BlobId) -> anyhow::Result<Vec<(BlobId, u64)>> {
    let manifest = store.read(&root, usize::try_from(MANIFEST_BYTES_MAX)?)?;
    let tree = Tree::decode(&manifest).with_context(|| format!("tree {root} is not in order"))?;
    Ok(tree.blobs().into_iter().collect())
}

impl Shared {
    /// Makes a tree whose blobs are here durable, and tells the peer that it is.
    pub(crate) async fn keep_tree(self: &Arc<Self>, root: BlobId) -> anyhow::Result<()> {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || {
            let mut ids: Vec<BlobId> =
                blobs_of(&store, root)?.into_iter().map(|(id, _)| id).collect();
            ids.push(root);
            store.persist(&ids).with_context(|| format!("tree {root} cannot be kept"))
        })
        .await??;
        self.copies.note_kept(root);
        self.act(move |peer, _| peer.tree_stored(root)).await?;
        Ok(())
    }

    /// Brings a tree that is here to the keeper of a job. What it lacked, and what it had.
    pub(crate) async fn push_tree(
        self: &Arc<Self>,
        to: PeerId,
        root: BlobId,
        mut progress: impl FnMut(Pushed) + Send,
    ) -> anyhow::Result<Pushed> {
        let _in_use = self.store.begin_use();
        let store = self.store.clone();
        let (manifest_bytes, blobs) = tokio::task::spawn_blocking(move || {
            anyhow::Ok((store.size(&root)?, blobs_of(&store, root)?))
        })
        .await??;
        let (mut send, mut receive) =
            self.open_bulk(to, &Request::Push { root, manifest_bytes }).await?;
        let mut pushed = Pushed::default();
        for blobs in [vec![(root, manifest_bytes)], blobs] {
            open_gate(&mut receive).await?;
            let asks = exchange::read_asks(&mut receive, blobs.len()).await?;
            let sizes: BTreeMap<BlobId, u64> = blobs.into_iter().collect();
            pushed.blobs += asks.len() as u64;
            pushed.there += (sizes.len() - asks.len()) as u64;
            for ask in &asks {
                let size = sizes.get(&ask.id).with_context(|| {
                    let to = self.label(to);
                    format!("{to} asks for blob {}, which is not of this tree", ask.id)
                })?;
                pushed.bytes += ask.bytes_of(*size);
            }
            if asks.is_empty() {
                continue;
            }
            let source: Arc<dyn Source> = Arc::new(self.store.clone());
            let pace = &self.bandwidth.upload;
            let sent = exchange::send_blobs(source, asks, &mut send, pace, |bytes| {
                pushed.bytes_done += bytes;
                progress(pushed);
            });
            match sent.await {
                Ok(_) => {}
                // Where the keeper stopped reading, it says why.
                Err(reason @ SendError::Stream(_)) => {
                    open_gate(&mut receive).await?;
                    return Err(reason.into());
                }
                // It waits for the rest, which will not come.
                Err(reason) => {
                    send.reset();
                    return Err(reason.into());
                }
            }
        }
        send.finish()?;
        open_gate(&mut receive).await?;
        Ok(pushed)
    }
}

async fn open_gate(receive: &mut RecvStream) -> anyhow::Result<()> {
    let gate: Gate = frame::read_message(receive, usize::MAX).await?;
    gate.pass()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use p2pit_protocol::identity::PublicKey;
    use tokio::sync::oneshot;

    use super::*;

    fn node(n: u8) -> PeerId {
        PeerId(PublicKey([n; 32]))
    }

    type Ends = Arc<Mutex<BTreeMap<PeerId, oneshot::Sender<anyhow::Result<Pushed>>>>>;

    /// Pushes that end when the test says so.
    fn pushes(others: &[PeerId]) -> (Pushes, Ends) {
        let ends = Ends::default();
        let begun = Arc::clone(&ends);
        let pushes = Pushes::begun(others.iter().copied().collect(), move |to| {
            let (end, ended) = oneshot::channel();
            begun.lock().unwrap().insert(to, end);
            async move { ended.await? }.boxed()
        });
        (pushes, ends)
    }

    fn end(ends: &Ends, node: PeerId, result: anyhow::Result<Pushed>) {
        assert!(ends.lock().unwrap().remove(&node).expect("it was begun").send(result).is_ok());
    }

    fn sent(bytes: u64) -> Pushed {
        Pushed { bytes, ..Pushed::default() }
    }

    #[tokio::test]
    async fn where_one_copy_is_needed_the_slower_one_is_not_waited_for_and_goes_on() {
        let (mut pushes, ends) = pushes(&[node(1), node(2), node(3)]);
        let (_travelled, mut travels) = mpsc::channel(1);
        end(&ends, node(2), Ok(sent(7)));
        let label = |_| String::new();
        let until = pushes.until(1, &mut travels, label, |_| {}, |note| panic!("{note}"));
        assert_eq!(until.await.unwrap().bytes, 7);
        assert_eq!(pushes.going.len(), 1);
        end(&ends, node(1), Err(anyhow::anyhow!("cut")));
        // In its place the next.
        let missed = pushes.next().await;
        assert!(
            matches!(missed, Some(Outcome::Missed { instead: Some(next), .. }) if next == node(3))
        );
        end(&ends, node(3), Ok(sent(1)));
        assert!(matches!(pushes.next().await, Some(Outcome::Brought(_))));
        assert!(pushes.next().await.is_none());
    }

    #[tokio::test]
    async fn too_few_copies_are_an_error_that_names_the_first_who_missed_them() {
        let (mut pushes, ends) = pushes(&[node(1), node(2)]);
        let (_travelled, mut travels) = mpsc::channel(1);
        end(&ends, node(1), Ok(sent(7)));
        end(&ends, node(2), Err(anyhow::anyhow!("cut")));
        let label = |node: PeerId| format!("node {}", node.0.0[0]);
        let missed = pushes.until(2, &mut travels, label, |_| {}, |_| {}).await.unwrap_err();
        let missed = format!("{missed:#}");
        assert!(missed.contains("did not reach node 2") && missed.contains("cut"), "{missed}");
    }
}
