//! What only this node has of jobs, before it leaves its pool.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use p2pit_protocol::{
    BlobId, JobId, Now, Peer, PeerId,
    bidder::WorkId,
    job::{Attempt, Rank, RankEnd, State},
    record::Kept,
};
use serde::{Deserialize, Serialize};

use super::{NoPeer, Shared, copies, serve::Request, work};
use crate::api::types::OnlyHere;

/// Jobs asked about in one request.
pub(crate) const JOBS_MAX: usize = 256;

/// What a keeper says of what a job left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Left {
    /// The attempt that the record is at; 0 where it keeps none.
    attempt: Attempt,
    /// Of the ranks that left something: which node ran it.
    ranks: Vec<(Rank, PeerId)>,
    /// Those of them of which all is here.
    complete: BTreeSet<Rank>,
    /// Which value of the record says so: its epoch and number.
    value: (u32, u64),
    /// Of a job that is not over, what an attempt begins with: its inputs, and what was kept by
    /// the one before, with the node that has it.
    needs: Vec<(BlobId, Option<PeerId>)>,
    /// Those of them of which all is here.
    has: BTreeSet<BlobId>,
}

/// What the peer here knows of a job, for another node or for this one.
fn left(peer: &Peer, job: JobId) -> Left {
    peer.record(job).map(of_record).unwrap_or_default()
}

fn of_record(kept: &Kept) -> Left {
    let (body, value) = (&kept.value.body, (kept.value.epoch, kept.value.seq));
    if body.removed.is_some() {
        return Left { attempt: body.attempt, value, ..Left::default() };
    }
    let mut needs = Vec::new();
    if body.state() != State::Done {
        needs.extend(kept.spec.inputs().map(|tree| (tree, None)));
        needs.extend(body.saved.iter().map(|saved| (saved.tree, Some(saved.node))));
    }
    let ranks = body.ranks.iter().filter(|it| it.end.as_ref().is_some_and(RankEnd::has_results));
    let ranks = ranks.map(|it| (it.assignment.rank, it.assignment.node)).collect();
    Left { attempt: body.attempt, ranks, value, needs, ..Left::default() }
}

/// The answer to [`Request::Left`].
pub(crate) async fn answer(shared: &Arc<Shared>, jobs: Vec<JobId>) -> anyhow::Result<Vec<Left>> {
    let me = shared.id();
    let asked: Vec<JobId> = jobs.into_iter().take(JOBS_MAX).collect();
    let of_peer = asked.clone();
    let known = shared
        .act(move |peer, _| of_peer.into_iter().map(|job| left(peer, job)).collect::<Vec<_>>());
    let (mut known, shelf) = (known.await?, shared.copies.shelf().clone());
    let store = shared.store.clone();
    Ok(tokio::task::spawn_blocking(move || {
        // Jobs share their inputs.
        let mut trees = BTreeMap::new();
        for (job, left) in asked.into_iter().zip(&mut known) {
            let attempt = left.attempt;
            let has = |rank: Rank| shelf.held(WorkId { job, attempt, rank }).end.is_some();
            let here = left.ranks.iter().filter(|(rank, node)| *node == me || has(*rank));
            left.complete = here.map(|(rank, _)| *rank).collect();
            let needs = left.needs.iter().map(|(tree, _)| *tree);
            let mut is_here =
                |tree| *trees.entry(tree).or_insert_with(|| copies::has_tree(&store, tree));
            left.has = needs.filter(|tree| is_here(*tree)).collect();
        }
        known
    })
    .await?)
}

/// The jobs of which this node has something, also what they need to go on, that no other node that can be reached has all of,
/// or that others may have of whom one does not answer. Those that it keeps it has others copy.
pub(crate) async fn only_here(shared: &Arc<Shared>) -> anyhow::Result<Vec<OnlyHere>> {
    let mut jobs = jobs_here(shared).await?;
    // Of these there may be inputs here, and nothing else.
    let is_live = |kept: &Kept| kept.value.body.state() != State::Done;
    let live = shared.act(move |peer, _| {
        let live = peer.records().filter(|(_, kept)| is_live(kept));
        live.map(|(job, _)| *job).collect::<Vec<_>>()
    });
    jobs.extend(live.await?);
    let asked: Vec<JobId> = jobs.iter().copied().collect();
    let keepers = shared.act(move |peer, _| keepers_of(peer, &asked)).await?;
    let mut by_keeper = BTreeMap::<PeerId, Vec<JobId>>::new();
    for (job, keepers) in keepers {
        for keeper in keepers {
            by_keeper.entry(keeper).or_default().push(job);
        }
    }
    let questions = by_keeper
        .iter()
        .flat_map(|(keeper, jobs)| jobs.chunks(JOBS_MAX).map(|jobs| (*keeper, jobs.to_vec())));
    let answers = questions.map(|(keeper, jobs)| async move {
        let answered = if keeper == shared.id() {
            answer(shared, jobs.clone()).await.ok()
        } else {
            shared.ask::<Vec<Left>>(keeper, &Request::Left(jobs.clone())).await.ok()
        };
        (keeper, jobs, answered.unwrap_or_default())
    });
    let mut said = BTreeMap::<JobId, Said>::new();
    for (keeper, jobs, answers) in futures::future::join_all(answers).await {
        let mut answers = answers.into_iter();
        for job in jobs {
            let said = said.entry(job).or_default();
            match answers.next() {
                Some(left) => drop(said.left.insert(keeper, left)),
                None => said.silent.push(shared.label(keeper)),
            }
        }
    }
    let dir = shared.home.jobs();
    let (me, shelf) = (shared.id(), shared.copies.shelf().clone());
    let online = shared.act(|peer, _| peer.board().connected().collect::<BTreeSet<_>>()).await?;
    let store = shared.store.clone();
    let found = tokio::task::spawn_blocking(move || {
        let mut trees = BTreeMap::new();
        let mut is_here =
            |tree| *trees.entry(tree).or_insert_with(|| copies::has_tree(&store, tree));
        let has = |id: WorkId| shelf.held(id).end.is_some();
        let of = |(job, Said { left, mut silent }): (JobId, Said)| {
            let needed = needed_only_here(me, &left, &online, &mut is_here);
            let has = |attempt, rank| has(WorkId { job, attempt, rank });
            let mut ranks = ranks_only_here(me, &left, &online, has);
            if !silent.is_empty() {
                // What ran here, and what was copied: there may be more to it than is known.
                let ran = work::rank_dirs(&dir.join(job.to_string())).unwrap_or_default();
                let ran = ran.into_iter().map(|(attempt, rank, _)| (attempt, rank));
                let copied = shelf.ranks(job).unwrap_or_default().into_iter();
                let here = ran.chain(copied.filter(|(attempt, rank)| has(*attempt, *rank)));
                let unsure = ranks_unsure(me, &left, &online, here.collect());
                if unsure.is_empty() && needed == 0 {
                    silent.clear();
                }
                ranks.extend(unsure);
            }
            let ranks: BTreeSet<Rank> = ranks.into_iter().collect();
            let processes = ranks.len();
            (processes + needed > 0).then_some(OnlyHere { job, processes, needed, silent })
        };
        said.into_iter().filter_map(of).collect::<Vec<_>>()
    })
    .await?;
    let only: Vec<_> = found.iter().map(|only| (only.job, only.processes + only.needed)).collect();
    let parting = shared.copies.to_part_from(&only);
    if !parting.is_empty() {
        shared.act(move |peer, now| have_copied(peer, &parting, now)).await?;
    }
    Ok(found)
}

/// What the keepers of a job say, and who of them says nothing.
#[derive(Debug, Default)]
struct Said {
    left: BTreeMap<PeerId, Left>,
    silent: Vec<String>,
}

/// Of a job of which not every keeper answers: what is `here`, and nobody else is known to have.
/// Who is silent may know of a later attempt than those who answer.
fn ranks_unsure(
    me: PeerId,
    said: &BTreeMap<PeerId, Left>,
    online: &BTreeSet<PeerId>,
    here: BTreeSet<(Attempt, Rank)>,
) -> Vec<Rank> {
    let now = said.values().map(|left| left.attempt).max().unwrap_or_default();
    let is_elsewhere = |attempt: Attempt, rank: Rank| {
        let mut of_it = said.iter().filter(|(_, left)| left.attempt == attempt);
        // That it left nothing is known as well.
        of_it.any(|(keeper, left)| {
            (*keeper != me && left.complete.contains(&rank))
                || left.ranks.iter().all(|(known, _)| *known != rank)
                || left
                    .ranks
                    .iter()
                    .any(|(known, node)| *known == rank && *node != me && online.contains(node))
        })
    };
    let of_now = here.into_iter().filter(|(attempt, _)| *attempt >= now);
    let unsure = of_now.filter(|(attempt, rank)| !is_elsewhere(*attempt, *rank));
    unsure.map(|(_, rank)| rank).collect()
}

/// Others do not wait for a node that goes.
fn have_copied(peer: &mut Peer, jobs: &[JobId], now: Now) {
    for job in jobs {
        peer.cannot_copy(*job, "it is leaving the pool".to_owned(), now);
    }
}

async fn jobs_here(shared: &Arc<Shared>) -> anyhow::Result<BTreeSet<JobId>> {
    let (shelf, dir) = (shared.copies.shelf().clone(), shared.home.jobs());
    tokio::task::spawn_blocking(move || {
        let mut jobs: BTreeSet<JobId> = shelf.jobs()?.into_iter().collect();
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let job = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(job) = job.filter(|_| entry.path().join(work::SPEC_FILE).is_file()) {
                jobs.insert(job);
            }
        }
        Ok(jobs)
    })
    .await?
}

fn keepers_of(peer: &Peer, jobs: &[JobId]) -> Vec<(JobId, BTreeSet<PeerId>)> {
    let mut keepers: BTreeMap<JobId, BTreeSet<PeerId>> =
        jobs.iter().map(|job| (*job, BTreeSet::new())).collect();
    for head in peer.heads() {
        if let Some(known) = keepers.get_mut(&head.job) {
            known.extend(&head.keepers);
        }
    }
    let members = &peer.roster().state().nodes;
    for (job, known) in &mut keepers {
        let kept = peer.record(*job).into_iter().flat_map(|kept| &kept.keepers);
        known.extend(kept.map(|(keeper, _)| *keeper));
        // Who has left the pool is not waited for.
        known.retain(|keeper| members.contains_key(keeper));
    }
    keepers.into_iter().collect()
}

/// Of what keepers say of one job: the ranks of which all is here, at `me`, and nowhere else.
fn ranks_only_here(
    me: PeerId,
    said: &BTreeMap<PeerId, Left>,
    online: &BTreeSet<PeerId>,
    has: impl Fn(Attempt, Rank) -> bool,
) -> Vec<Rank> {
    let Some(now) = said.values().map(|left| left.attempt).max() else { return Vec::new() };
    let of_now = || said.iter().filter(|(_, left)| left.attempt == now);
    let ranks: BTreeMap<Rank, PeerId> =
        of_now().flat_map(|(_, left)| left.ranks.iter().copied()).collect();
    let is_only_here = |(rank, node): &(Rank, PeerId)| {
        let elsewhere =
            of_now().any(|(keeper, left)| *keeper != me && left.complete.contains(rank));
        let ran_elsewhere = *node != me && online.contains(node);
        (*node == me || has(now, *rank)) && !elsewhere && !ran_elsewhere
    };
    ranks.into_iter().filter(is_only_here).map(|(rank, _)| rank).collect()
}

/// Of what the newest value of a job's record says that it needs: how many trees `me` has, and
/// no other node that can be reached.
fn needed_only_here(
    me: PeerId,
    said: &BTreeMap<PeerId, Left>,
    online: &BTreeSet<PeerId>,
    mut is_here: impl FnMut(BlobId) -> bool,
) -> usize {
    let Some(newest) = said.values().map(|left| left.value).max() else { return 0 };
    let of_newest = said.values().filter(|left| left.value == newest);
    let needs: BTreeSet<(BlobId, Option<PeerId>)> =
        of_newest.flat_map(|left| left.needs.iter().copied()).collect();
    let elsewhere = |tree: &BlobId| {
        let mut others = said.iter().filter(|(keeper, _)| **keeper != me);
        let saved = needs.iter().filter(|(saved, _)| saved == tree);
        let mut nodes = saved.filter_map(|(_, node)| *node);
        others.any(|(_, left)| left.has.contains(tree))
            || nodes.any(|node| node != me && online.contains(&node))
    };
    let trees: BTreeSet<BlobId> = needs.iter().map(|(tree, _)| *tree).collect();
    trees.into_iter().filter(|tree| !elsewhere(tree) && is_here(*tree)).count()
}

impl Shared {
    /// Whether another node could hold what this one has.
    pub(crate) async fn has_heirs(&self) -> Result<bool, NoPeer> {
        self.act(|peer, _| {
            let board = peer.board();
            let clients = |node: PeerId| board.get(node).is_some_and(|posted| posted.advert.client);
            board.connected().any(|node| !clients(node))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::KeyPair;

    use super::*;

    fn node(n: u8) -> PeerId {
        PeerId(KeyPair::from_seed(&[n; 32]).public())
    }

    fn said(attempt: u32, ran: &[(u32, u8)], complete: &[u32]) -> Left {
        Left {
            attempt: Attempt(attempt),
            ranks: ran.iter().map(|(rank, at)| (Rank(*rank), node(*at))).collect(),
            complete: complete.iter().copied().map(Rank).collect(),
            ..Left::default()
        }
    }

    #[test]
    fn what_a_job_needs_that_is_not_over_is_only_here_until_another_has_it() {
        let (input, saved) = (BlobId([1; 32]), BlobId([2; 32]));
        let says = |seq, has: &[BlobId]| Left {
            value: (0, seq),
            needs: vec![(input, None), (saved, Some(node(1)))],
            has: has.iter().copied().collect(),
            ..Left::default()
        };
        let online = |nodes: &[u8]| nodes.iter().map(|n| node(*n)).collect();
        let only = |second: Left, here: &[BlobId]| {
            // This node runs, or ran, the job, and does not keep it.
            let said = [(node(2), second), (node(3), says(4, &[]))].into();
            needed_only_here(node(1), &said, &online(&[2, 3]), |tree| here.contains(&tree))
        };
        // The retry is recorded, and the keepers begin to pull.
        assert_eq!(only(says(4, &[input]), &[input, saved]), 1);
        assert_eq!(only(says(4, &[]), &[input, saved]), 2);
        assert_eq!(only(says(4, &[]), &[input]), 1, "what is not here either is not lost by it");
        assert_eq!(only(says(4, &[input, saved]), &[input, saved]), 0);
        // What an older value names counts for nothing, but what is there is there.
        let over = Left { value: (0, 5), ..Left::default() };
        assert_eq!(only(over, &[input, saved]), 0, "the job is over");
        assert_eq!(only(says(3, &[saved]), &[input, saved]), 1);
        // Another node has it, and is there.
        let at = |other: u8, nodes: &[u8]| {
            let mut left = says(4, &[input]);
            left.needs[1].1 = Some(node(other));
            let said = [(node(2), left)].into();
            needed_only_here(node(1), &said, &online(nodes), |_| true)
        };
        assert_eq!((at(9, &[2, 9]), at(9, &[2]), at(1, &[1, 2])), (0, 1, 1));
        let nobody = BTreeMap::new();
        assert_eq!(needed_only_here(node(1), &nobody, &online(&[]), |_| true), 0);
    }

    #[test]
    fn what_a_keeper_says_has_the_inputs_and_saves_of_a_job_that_is_not_over() {
        use crate::daemon::space;
        for (state, is_live) in
            [(State::Waiting, true), (State::Running, true), (State::Done, false)]
        {
            let kept = space::sample_record(state);
            let left = of_record(&kept);
            let body = &kept.value.body;
            let needs: Vec<(BlobId, Option<PeerId>)> = kept
                .spec
                .inputs()
                .map(|tree| (tree, None))
                .chain(body.saved.iter().map(|saved| (saved.tree, Some(saved.node))))
                .collect();
            assert!(!body.saved.is_empty());
            assert_eq!(left.needs, if is_live { needs } else { Vec::new() }, "{state:?}");
        }
    }

    #[test]
    fn what_a_silent_keeper_would_know_of_is_only_here() {
        let here = [(Attempt(1), Rank(0)), (Attempt(2), Rank(0)), (Attempt(2), Rank(1))];
        let unsure = |said: BTreeMap<PeerId, Left>| {
            ranks_unsure(node(1), &said, &[node(3)].into(), here.into())
        };
        assert_eq!(unsure(BTreeMap::new()), [Rank(0), Rank(0), Rank(1)], "nobody answers");
        let ran = [(0, 1), (1, 1)];
        assert_eq!(unsure([(node(2), said(2, &ran, &[0]))].into()), [Rank(1)]);
        assert_eq!(unsure([(node(1), said(2, &ran, &[0, 1]))].into()), [Rank(0), Rank(1)]);
        assert_eq!(unsure([(node(2), said(1, &ran, &[0]))].into()), [Rank(0), Rank(1)]);
        let at_third = said(2, &[(0, 3), (1, 1)], &[]);
        assert_eq!(unsure([(node(2), at_third)].into()), [Rank(1)], "node 3 ran it, and is there");
        assert_eq!(unsure([(node(2), said(2, &[], &[]))].into()), [], "it left nothing");
        assert_eq!(unsure([(node(2), said(3, &ran, &[]))].into()), [], "it was tried again");
    }

    #[test]
    fn what_another_has_or_ran_is_not_only_here() {
        let online = [node(2), node(3)].into();
        let ran = [(0, 1), (1, 2), (2, 9)];
        let only = |second: Left| {
            let said = [(node(1), said(2, &ran, &[0, 2])), (node(2), second)].into();
            ranks_only_here(node(1), &said, &online, |_, rank| rank == Rank(2))
        };
        let lacking = said(2, &ran, &[1]);
        assert_eq!(only(lacking), [Rank(0), Rank(2)], "node 9 is off, and this one has its rank");
        assert_eq!(only(said(2, &ran, &[0, 1])), [Rank(2)]);
        assert_eq!(only(said(2, &ran, &[0, 1, 2])), []);
        // What a keeper says of an earlier attempt counts for nothing.
        assert_eq!(only(said(1, &[], &[0, 1, 2])), [Rank(0), Rank(2)]);
        // Nobody knows of the job any more.
        let nobody = [(node(1), Left::default())].into();
        assert_eq!(ranks_only_here(node(1), &nobody, &online, |_, _| true), []);
    }
}
