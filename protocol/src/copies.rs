//! Who holds copies of a job's inputs, logs and results, and what this node holds itself.
//!
//! A rule without state says who should: see [`holders`]. Every keeper applies it to every
//! record it keeps, by itself, also when the job is over; so that repair needs neither a leader
//! nor any traffic but the copy. The node around the peer carries out what
//! [`crate::Peer::copies_wanted`] says, and tells what came of it.

mod machine;

use std::sync::Arc;

pub(crate) use machine::{Copies, Scene, Standing};

use crate::{
    BlobId, PeerId,
    job::{Attempt, Rank, Saved, VerifiedSpec},
    record::Link,
};

/// On how many nodes the log and the results of each rank are before the job is done, where so
/// many can hold them.
pub const COPIES: usize = 2;
/// The same, of a job that five nodes keep.
pub const COPIES_OF_FIVE: usize = 3;
/// Nodes that hold the inputs of a job that is not over.
pub const INPUT_HOLDERS: usize = 2;
/// How long a node that said it cannot hold something is left out.
pub const CANNOT_MS: u64 = 10 * 60_000;
/// How long a node may be out of reach until another holds what ranks of a job leave that is not
/// over: longer than a daemon takes to start again. A job is not to wait for a machine that is
/// off, nor its log to be without a copy; one copy too many does no harm.
pub const HERE_MS: u64 = 15_000;
/// How often it is looked whether others should hold something now.
pub const COPIES_CHECK_MS: u64 = 20_000;
/// How often a copy of `keep/` is announced until enough nodes hold it, at first; each time twice
/// as long, up to [`SAVE_RESEND_MS_MAX`].
pub const SAVE_RESEND_MS: u64 = 2_000;
/// See [`SAVE_RESEND_MS`].
pub const SAVE_RESEND_MS_MAX: u64 = 60_000;
/// How long a steward waits for what keepers hold before a job is tried again.
pub const SAVES_WAIT_MS: u64 = 10_000;
/// How long it waits for keepers that are out of reach, where nothing is known of what a rank kept
/// so far: longer than a machine takes to start again, since to begin from scratch may cost days;
/// less than [`crate::steward::AWAY_MS`], since such a machine may also never come.
pub const SAVES_AWAY_MS: u64 = 3 * 60_000;
/// How the note of a rank begins whose results were given up: its node is gone, and nobody else
/// has all of them.
pub const NOT_COPIED: &str = "not copied before its node was gone";

/// On how many nodes the results of a job are that so many nodes keep.
#[must_use]
pub const fn copies_for(keepers: usize) -> usize {
    if keepers >= 5 { COPIES_OF_FIVE } else { COPIES }
}

/// Put the keepers of a record in the order in which they hold what `rank` leaves. Each rank begins
/// with another, so that the copies of a gang are spread; rank 0 with the second, since the first
/// mostly is the steward, and what one failure takes is better not in one place.
pub fn in_order_of<T>(rank: Rank, keepers: &mut [T]) {
    if let Some(first) = (rank.0 as usize).wrapping_add(1).checked_rem(keepers.len()) {
        keepers.rotate_left(first);
    }
}

/// Who may hold what the rank that ran on `node` left, the first before the others: that node,
/// unless it is none any more, then the keepers.
pub fn candidates(node: Option<PeerId>, keepers: &[PeerId]) -> impl Iterator<Item = PeerId> + '_ {
    node.into_iter().chain(keepers.iter().copied().filter(move |keeper| Some(*keeper) != node))
}

/// Who should hold what the rank that ran on `node` left: the first `should` candidates of whom
/// `is_present` says so; see [`copies_for`].
pub fn holders(
    node: Option<PeerId>,
    keepers: &[PeerId],
    should: usize,
    is_present: impl Fn(PeerId) -> bool,
) -> Vec<PeerId> {
    candidates(node, keepers).filter(|candidate| is_present(*candidate)).take(should).collect()
}

/// What this node has still to bring here of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOrder {
    /// The job.
    pub spec: Arc<VerifiedSpec>,
    /// From the spec's keepers to those of now: they show that this node is one of them.
    pub links: Vec<Link>,
    /// The trees of [`VerifiedSpec::inputs`] are to be here.
    pub inputs: bool,
    /// What the next attempt begins with, to be here like the inputs; empty where `inputs` is
    /// not set.
    pub saved: Vec<Saved>,
    /// Ranks of the current attempt that ran elsewhere, or do.
    pub ranks: Vec<RankOrder>,
}

/// What this node has still to bring here of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankOrder {
    /// The rank.
    pub rank: Rank,
    /// The attempt.
    pub attempt: Attempt,
    /// The node that runs or ran it.
    pub node: PeerId,
    /// Whom to ask: that node, then the other keepers.
    pub sources: Vec<PeerId>,
    /// What it left, once it ended: when all of it is here and durable,
    /// [`crate::Peer::copied`] is to be said.
    pub end: Option<EndOrder>,
    /// The newest copy of its `keep/` from while its process runs: when it is here and durable,
    /// [`crate::Peer::save_held`] is to be said.
    pub save: Option<SaveOrder>,
    /// Its log may still grow: it is to be followed.
    pub follow: bool,
}

/// What a rank left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOrder {
    /// How many bytes of its log there must be at the least.
    pub log_bytes: u64,
    /// Its `keep/`, as a tree.
    pub keep: Option<BlobId>,
    /// Its artifacts, as a tree.
    pub artifacts: Option<BlobId>,
}

/// A copy of `keep/` from while the process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOrder {
    /// Its number within the attempt.
    pub seq: u64,
    /// The directory, as a tree.
    pub tree: BlobId,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::identity::KeyPair;

    fn node(n: u8) -> PeerId {
        PeerId(KeyPair::from_seed(&[n; 32]).public())
    }

    fn nodes(numbers: impl IntoIterator<Item = u8>) -> Vec<PeerId> {
        numbers.into_iter().map(node).collect()
    }

    #[test]
    fn the_node_that_ran_a_rank_comes_first_and_who_is_away_is_left_out() {
        let keepers = nodes([1, 2, 3]);
        let of = |ran, away: u8| holders(ran, &keepers, 2, |peer| peer != node(away));
        assert_eq!(of(Some(node(9)), 99), nodes([9, 1]), "the node, and one keeper");
        assert_eq!(of(Some(node(2)), 99), nodes([2, 1]), "a keeper counts once");
        assert_eq!(of(Some(node(9)), 1), nodes([9, 2]));
        assert_eq!(of(Some(node(9)), 9), nodes([1, 2]), "two keepers, where the node is gone");
        assert_eq!(of(None, 99), nodes([1, 2]), "or lost its disk");
        assert_eq!(holders(None, &nodes([1]), 2, |_| true), nodes([1]), "no more than there are");
    }

    #[test]
    fn copies_of_a_gang_are_spread_over_the_keepers() {
        let first = |rank| {
            let mut keepers = [0, 1, 2];
            in_order_of(Rank(rank), &mut keepers);
            keepers
        };
        assert_eq!([first(0), first(1), first(2)], [[1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        assert_eq!(first(3), first(0));
        let mut none: [u8; 0] = [];
        in_order_of(Rank(u32::MAX), &mut none);
    }

    #[test]
    fn five_keepers_hold_three_copies() {
        assert_eq!([1, 2, 3, 4, 5].map(copies_for), [2, 2, 2, 2, 3]);
    }

    proptest! {
        /// Whoever is away and whatever ran where: those who should hold are distinct, are there,
        /// and are as many as should and can; and a node that goes adds at most one other.
        #[test]
        fn one_that_goes_is_replaced_by_one_other(
            ran in 0_u8..8,
            keepers in 1_u8..=5,
            away in 0_u8..=255,
            goes in 0_u8..8,
        ) {
            let keepers = nodes(0..keepers);
            let should = copies_for(keepers.len());
            let all = nodes(0..8);
            let place = |peer: PeerId| all.iter().position(|known| *known == peer).unwrap_or(0);
            let there = |peer: PeerId| away >> place(peer) & 1 == 0;
            let before = holders(Some(node(ran)), &keepers, should, there);
            let can = candidates(Some(node(ran)), &keepers).filter(|peer| there(*peer)).count();
            prop_assert_eq!(before.len(), should.min(can));
            prop_assert!(before.iter().all(|peer| there(*peer)));
            let without = |peer| there(peer) && peer != node(goes);
            let after = holders(Some(node(ran)), &keepers, should, without);
            let news = after.iter().filter(|peer| !before.contains(peer)).count();
            prop_assert!(news <= usize::from(before.contains(&node(goes))));
            prop_assert!(!after.contains(&node(goes)));
        }
    }
}
