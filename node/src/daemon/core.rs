//! The task that owns the peer.
//!
//! Whatever happens arrives as an [`Input`]. A turn takes all that wait, hands them to the
//! peer, makes its writes durable in one commit, and only then lets anything out: replies
//! to callers, messages, events. Inputs that arrive during the commit share the next.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use p2pit_protocol::{
    JobId, Now, Peer, PeerId,
    message::{Message, Soft},
    peer::{Event, SubmitError, Transmit},
    wire,
};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, error, info, warn};

use super::{Shared, bundle, clock, serve::Absence};
use crate::{
    executor::Deadline,
    journal::{self, JournalHandle, Write},
    network::{self, Acceptance, Network},
};

/// Inputs that wait; beyond that their senders do.
pub(super) const INPUTS_MAX: usize = 4_096;
/// Inputs of one turn: bounds how long replies wait for each other.
const TURN_INPUTS_MAX: usize = 512;
/// How often a journal that has no room is tried again.
const JOURNAL_RETRY: Duration = Duration::from_secs(1);

type Release = Box<dyn FnOnce() + Send>;
type Act = Box<dyn FnOnce(&mut State, Now) -> Release + Send>;

/// What can happen to the core.
pub(super) enum Input {
    /// Something for the peer; what it returns is called once its writes are durable.
    Act(Act),
    /// The network.
    Network(network::Event),
    /// The node became a member: there is a peer from now on.
    Member(Box<Peer>, Vec<Write>, Network, oneshot::Sender<()>),
    /// End.
    Shutdown,
}

/// What the core owns.
pub(super) struct State {
    pub(super) peer: Option<Peer>,
    pub(super) submissions: BTreeMap<JobId, oneshot::Sender<Result<(), SubmitError>>>,
    /// Bumped at each change of a record kept here.
    pub(super) watched: BTreeMap<JobId, watch::Sender<u64>>,
    pub(super) absence: Absence,
    network: Option<Network>,
    /// Why this store must not be used any more.
    refused: Option<StoreRefused>,
}

/// This store was used elsewhere, or after the copy that is in use was made: what it promised
/// then is not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct StoreRefused(pub(super) String);

/// Run until told to end, or the journal fails.
pub(super) async fn run(
    shared: Arc<Shared>,
    journal: JournalHandle,
    mut inputs: mpsc::Receiver<Input>,
) -> anyhow::Result<()> {
    let mut state = State {
        peer: None,
        submissions: BTreeMap::new(),
        watched: BTreeMap::new(),
        absence: Absence::new(clock::now()),
        network: None,
        refused: None,
    };
    let mut batch = Vec::with_capacity(TURN_INPUTS_MAX);
    loop {
        let deadline = state.peer.as_ref().and_then(Peer::poll_timeout);
        let now = clock::now();
        let wait =
            deadline.map(|(at_ms, _)| Duration::from_millis(at_ms.saturating_sub(now.boot_ms)));
        tokio::select! {
            biased;
            received = inputs.recv_many(&mut batch, TURN_INPUTS_MAX) => {
                if received == 0 {
                    return Ok(());
                }
            }
            () = sleep_or_forever(wait) => {}
        }
        let now = clock::now();
        let mut writes = Writes::default();
        let mut releases: Vec<Release> = Vec::new();
        let mut ending = false;
        for input in batch.drain(..) {
            match input {
                Input::Act(act) => releases.push(act(&mut state, now)),
                Input::Network(event) => {
                    // A node that went away comes back, if it does, as another process: its
                    // data-plane connections would only be found dead by their timeouts.
                    if let network::Event::Disconnected(node) = &event {
                        shared.endpoint.forget(node);
                    }
                    on_network(&mut state, event, now, &mut writes);
                    shared.heard.notify_waiters();
                }
                Input::Member(peer, first_writes, network, done) => {
                    writes.add(first_writes);
                    state.peer = Some(*peer);
                    state.network = Some(network);
                    releases.push(Box::new(move || {
                        // The caller may have given up; the membership stands.
                        let _ = done.send(());
                    }));
                }
                Input::Shutdown => ending = true,
            }
            writes.add_of(state.peer.as_mut());
        }
        if let Some(peer) = &mut state.peer {
            if peer.poll_timeout().is_some_and(|(at_ms, _)| at_ms <= now.boot_ms) {
                peer.handle_timeout(now);
            }
            writes.add_of(Some(peer));
        }
        for batch in writes.batches {
            let batch = batch.into_iter().map(|(key, value)| Write { key, value }).collect();
            commit(&shared.waits_for_room, &shared.ending, &journal, batch).await?;
        }
        releases.into_iter().for_each(|release| release());
        send(&mut state);
        while let Some(event) = state.peer.as_mut().and_then(Peer::poll_event) {
            on_event(&shared, &mut state, event);
        }
        if let Some(refused) = state.refused {
            return Err(refused.into());
        }
        if ending {
            return Ok(());
        }
    }
}

/// What a turn wrote, in batches: what one input caused is in one of them, and of what was
/// written several times only the last counts.
#[derive(Debug, Default)]
struct Writes {
    batches: Vec<BTreeMap<Vec<u8>, Option<Vec<u8>>>>,
    /// Added to the last batch.
    bytes: usize,
}

/// What one batch may have before the next is begun: one fsync that all wait for. One input
/// may write more, as a timeout of many jobs does; the journal takes that as one all the same.
const BATCH_BYTES_MAX: usize = 8 << 20;

impl Writes {
    fn add_of(&mut self, peer: Option<&mut Peer>) {
        let Some(peer) = peer else { return };
        let writes = std::iter::from_fn(|| peer.poll_write());
        self.add(writes.map(|write| Write { key: write.key, value: write.value }));
    }

    fn add(&mut self, writes: impl IntoIterator<Item = Write>) {
        let mut writes = writes.into_iter().peekable();
        if writes.peek().is_none() {
            return;
        }
        if self.batches.is_empty() || self.bytes > BATCH_BYTES_MAX {
            self.batches.push(BTreeMap::new());
            self.bytes = 0;
        }
        let Some(batch) = self.batches.last_mut() else { return };
        for Write { key, value } in writes {
            self.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            batch.insert(key, value);
        }
    }
}

async fn sleep_or_forever(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Nothing leaves the node before this returns. A full disk is waited for, since nothing
/// was acknowledged; any other failure ends the daemon, because nobody knows any more
/// what is on the disk, or because trying again would not help.
async fn commit(
    waits_for_room: &watch::Sender<bool>,
    is_ending: &AtomicBool,
    journal: &JournalHandle,
    writes: Vec<Write>,
) -> anyhow::Result<()> {
    let mut warned = false;
    loop {
        let Err(failure) = journal.commit(writes.clone()).await else {
            if warned {
                waits_for_room.send_replace(false);
                info!("the journal can be written again");
            }
            return Ok(());
        };
        if journal::is_poisoned(&failure) {
            error!(%failure, "the journal failed");
            return Err(failure).context("the journal cannot be trusted any more: the daemon ends; jobs go on below their supervisors");
        }
        if !journal::is_full(&failure) {
            error!(%failure, "the journal cannot be written");
            return Err(failure).context(
                "the journal cannot be written, and not for want of room: the daemon ends; jobs \
                 go on below their supervisors. See to the disk, as the kernel's log says what \
                 ails it, and start the node again with `p2pit join --detach`",
            );
        }
        if !warned {
            warn!(%failure, "the journal cannot be written: nothing is acknowledged until it can");
            waits_for_room.send_replace(true);
            warned = true;
        }
        if is_ending.load(Ordering::Relaxed) {
            return Err(failure).context("the daemon ends with a journal that has no room");
        }
        tokio::time::sleep(JOURNAL_RETRY).await;
    }
}

fn send(state: &mut State) {
    let State { peer: Some(peer), network: Some(network), .. } = state else { return };
    let mut direct: BTreeMap<PeerId, Vec<Vec<u8>>> = BTreeMap::new();
    while let Some(transmit) = peer.poll_transmit() {
        match transmit {
            Transmit::Direct { to, message } => {
                direct.entry(to).or_default().push(wire::encode(&message));
            }
            Transmit::Gossip(item) => network.publish(wire::encode(&item)),
        }
    }
    for (to, messages) in direct {
        for bundle in bundle::pack(messages) {
            network.send(to, bundle);
        }
    }
}

/// Each message of a bundle is an input of its own: what it caused is added to `writes` by itself.
fn on_network(state: &mut State, event: network::Event, now: Now, writes: &mut Writes) {
    let Some(peer) = &mut state.peer else { return };
    match event {
        network::Event::Connected(node, _) => peer.peer_connected(node, now),
        network::Event::Disconnected(node) => {
            peer.peer_disconnected(node, now);
            state.absence.note_gone(node, now);
        }
        network::Event::DialFailed(node, reason) => {
            debug!(%node, reason, "cannot be dialled");
            peer.peer_unreachable(node, now);
        }
        network::Event::Undeliverable { to } => peer.peer_unreachable(to, now),
        network::Event::Message { from, bytes } => {
            let Some(messages) = bundle::unpack(&bytes) else {
                return debug!(%from, "what is no bundle of messages");
            };
            for message in messages {
                match wire::decode::<Message>(message) {
                    Ok(message) => {
                        peer.handle_message(from, message, now);
                        writes.add_of(Some(&mut *peer));
                    }
                    Err(reason) => debug!(%from, %reason, "message not understood"),
                }
            }
        }
        network::Event::Gossip { bytes, id, .. } => {
            let acceptance = match wire::decode::<Soft>(&bytes) {
                Ok(item) => {
                    let is_news = peer.handle_gossip(item, now);
                    if is_news { Acceptance::Accept } else { Acceptance::Ignore }
                }
                Err(_) => Acceptance::Reject,
            };
            if let Some(network) = &state.network {
                network.report_gossip(id, acceptance);
            }
        }
        network::Event::ListenAddrs(_) => {}
    }
}

fn on_event(shared: &Arc<Shared>, state: &mut State, event: Event) {
    match event {
        Event::Prepare { id, spec, assignment, certificate } => {
            shared.work.prepare(shared, id, spec, assignment, certificate);
        }
        Event::Execute { id, spec, assignment, nodes, hosts, port, until_ms } => {
            shared.work.execute(
                shared,
                id,
                spec,
                assignment,
                super::work::Start { nodes, hosts, port, deadline: Deadline(until_ms) },
            );
        }
        Event::Lease { id, until_ms } => shared.work.lease(shared, id, until_ms),
        Event::StopProcess { id, reason } => shared.work.stop(shared, id, reason),
        Event::Discard { id } => shared.work.discard(shared, id),
        Event::EndRecorded { id } => shared.work.forget(shared, id),
        Event::RecordChanged { job } => {
            if let Some(changed) = state.watched.get(&job) {
                changed.send_modify(|count| *count += 1);
            }
        }
        Event::CopiesChanged { job } => {
            if let Some(peer) = &state.peer {
                shared.copies.ordered(shared, job, peer);
            }
        }
        Event::Submitted { job, result } => {
            if let Some(waiting) = state.submissions.remove(&job) {
                // The submitter's command may have been interrupted: the job stands.
                let _ = waiting.send(result);
            }
        }
        Event::StoreRefused { reason } => {
            error!(reason, "this store must not be used any more");
            state.refused = Some(StoreRefused(reason));
        }
        Event::Wounded { job, by, .. } => debug!(%job, %by, "a higher job took a hold"),
        Event::RosterChanged => {
            let Some(peer) = &state.peer else { return };
            shared.set_members(peer.roster());
            if let Some(network) = &state.network {
                network.set_members(shared.members());
            }
            shared.reach_changed.notify_one();
        }
        Event::BoardChanged { node } => {
            let Some(posted) = state.peer.as_ref().and_then(|peer| peer.board().get(node)) else {
                return;
            };
            shared.remember_addresses(node, &posted.advert, posted.item.signed());
            shared.reach_changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::faulty::{FaultyDisk, Trouble};

    #[tokio::test]
    async fn a_journal_that_fails_for_another_reason_than_room_ends_the_daemon_and_says_so() {
        let disk = FaultyDisk::new(1);
        let (journal, _thread) = JournalHandle::spawn(disk.journal()).unwrap();
        let (waits, is_ending) = (watch::channel(false).0, AtomicBool::new(false));
        commit(&waits, &is_ending, &journal, vec![write(1, 5)]).await.unwrap();
        // The next write fails as a broken disk's does; all after it would succeed.
        disk.trouble_at(Some((disk.operations() + 1, Trouble::Broken)));
        let ended = commit(&waits, &is_ending, &journal, vec![write(2, 5)]).await.unwrap_err();
        let ended = format!("{ended:#}");
        for part in ["not for want of room", "start the node again", "injected"] {
            assert!(ended.contains(part), "{part}: {ended}");
        }
        assert!(!*waits.borrow(), "it is not the room that lacks");
    }

    #[tokio::test]
    async fn a_full_disk_is_waited_for_until_there_is_room_or_the_daemon_ends() {
        let disk = FaultyDisk::new(1);
        let (journal, _thread) = JournalHandle::spawn(disk.journal()).unwrap();
        let (waits, is_ending) = (watch::channel(false).0, Arc::new(AtomicBool::new(false)));
        let mut seen = waits.subscribe();
        for ends in [false, true] {
            disk.trouble_at(Some((0, Trouble::Full { through: 0 })));
            let (waits, is_ending) = (waits.clone(), Arc::clone(&is_ending));
            let (journal, ending) = (journal.clone(), Arc::clone(&is_ending));
            let committing = tokio::spawn(async move {
                commit(&waits, &is_ending, &journal, vec![write(1, 5)]).await
            });
            seen.wait_for(|waits| *waits).await.unwrap();
            if ends {
                ending.store(true, Ordering::Relaxed);
                let ended = format!("{:#}", committing.await.unwrap().unwrap_err());
                assert!(ended.contains("has no room"), "{ended}");
            } else {
                disk.trouble_at(None);
                committing.await.unwrap().unwrap();
                assert!(!*seen.borrow_and_update());
            }
        }
    }

    fn write(key: u8, bytes: usize) -> Write {
        Write { key: vec![key], value: Some(vec![key; bytes]) }
    }

    #[test]
    fn what_a_turn_writes_is_one_batch_and_of_each_key_the_last() {
        let mut writes = Writes::default();
        writes.add([write(1, 5), write(2, 5)]);
        writes.add([]);
        writes.add([write(1, 7), Write { key: vec![2], value: None }]);
        let [batch] = &writes.batches[..] else { panic!("{} batches", writes.batches.len()) };
        assert_eq!(*batch, [(vec![1], Some(vec![1; 7])), (vec![2], None)].into());
    }

    #[test]
    fn a_turn_is_batches_of_a_bounded_size_and_what_one_input_wrote_stays_together() {
        let mut writes = Writes::default();
        for input in 0..40_u8 {
            writes.add([write(2 * input, 1 << 19), write(2 * input + 1, 1 << 19)]);
        }
        assert!(writes.batches.len() > 3, "{}", writes.batches.len());
        for batch in &writes.batches {
            let bytes: usize = batch.values().flatten().map(Vec::len).sum();
            assert!(bytes <= BATCH_BYTES_MAX + (1 << 20), "{bytes}");
            assert!(batch.keys().all(|key| batch.contains_key(&vec![key[0] ^ 1])));
        }
    }
}
