//! What only this node has of jobs, before it leaves its pool.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use p2pit_protocol::{
    JobId, Now, Peer, PeerId,
    bidder::WorkId,
    job::{Attempt, Rank, RankEnd},
};
use serde::{Deserialize, Serialize};

use super::{NoPeer, Shared, serve::Request, work};
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
}

/// What the peer here knows of a job, for another node or for this one.
fn left(peer: &Peer, job: JobId) -> Left {
    let Some(kept) = peer.record(job) else { return Left::default() };
    let body = &kept.value.body;
    if body.removed.is_some() {
        return Left { attempt: body.attempt, ..Left::default() };
    }
    let ranks = body.ranks.iter().filter(|it| it.end.as_ref().is_some_and(RankEnd::has_results));
    let ranks = ranks.map(|it| (it.assignment.rank, it.assignment.node)).collect();
    Left { attempt: body.attempt, ranks, complete: BTreeSet::new() }
}

/// The answer to [`Request::Left`].
pub(crate) async fn answer(shared: &Arc<Shared>, jobs: Vec<JobId>) -> anyhow::Result<Vec<Left>> {
    let me = shared.id();
    let asked: Vec<JobId> = jobs.into_iter().take(JOBS_MAX).collect();
    let of_peer = asked.clone();
    let known = shared
        .act(move |peer, _| of_peer.into_iter().map(|job| left(peer, job)).collect::<Vec<_>>());
    let (mut known, shelf) = (known.await?, shared.copies.shelf().clone());
    Ok(tokio::task::spawn_blocking(move || {
        for (job, left) in asked.into_iter().zip(&mut known) {
            let attempt = left.attempt;
            let has = |rank: Rank| shelf.held(WorkId { job, attempt, rank }).end.is_some();
            let here = left.ranks.iter().filter(|(rank, node)| *node == me || has(*rank));
            left.complete = here.map(|(rank, _)| *rank).collect();
        }
        known
    })
    .await?)
}

/// The jobs of which this node has something that no other node that can be reached has all of,
/// or that others may have of whom one does not answer. Those that it keeps it has others copy.
pub(crate) async fn only_here(shared: &Arc<Shared>) -> anyhow::Result<Vec<OnlyHere>> {
    let jobs = jobs_here(shared).await?;
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
    let found = tokio::task::spawn_blocking(move || {
        let has = |id: WorkId| shelf.held(id).end.is_some();
        let of = |(job, Said { left, mut silent }): (JobId, Said)| {
            let has = |attempt, rank| has(WorkId { job, attempt, rank });
            let mut ranks = ranks_only_here(me, &left, &online, has);
            if !silent.is_empty() {
                // What ran here, and what was copied: there may be more to it than is known.
                let ran = work::rank_dirs(&dir.join(job.to_string())).unwrap_or_default();
                let ran = ran.into_iter().map(|(attempt, rank, _)| (attempt, rank));
                let copied = shelf.ranks(job).unwrap_or_default().into_iter();
                let here = ran.chain(copied.filter(|(attempt, rank)| has(*attempt, *rank)));
                let unsure = ranks_unsure(me, &left, &online, here.collect());
                if unsure.is_empty() {
                    silent.clear();
                }
                ranks.extend(unsure);
            }
            let ranks: BTreeSet<Rank> = ranks.into_iter().collect();
            (!ranks.is_empty()).then_some(OnlyHere { job, processes: ranks.len(), silent })
        };
        said.into_iter().filter_map(of).collect::<Vec<_>>()
    })
    .await?;
    let only: Vec<_> = found.iter().map(|only| (only.job, only.processes)).collect();
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
