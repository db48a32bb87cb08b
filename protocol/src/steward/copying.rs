//! What is waited for between the end of the last process and the end of the job, or the next
//! attempt: copies of what the ranks left.

use super::{Context, Drive, RESEND_MS, Stewards, cut, outcome};
use crate::{
    JobId,
    copies::{Copies, NOT_COPIED, SAVES_AWAY_MS, SAVES_WAIT_MS, Scene, Standing},
    job::{Ending, Outcome, RankEnd, RankState, State, StopCause},
    message::{Message, WaitView},
    record::{Body, Kept},
};

/// The longest pause between two questions to a keeper that is still copying.
const ASK_COPIES_MS_MAX: u64 = 20_000;

/// A record and what is known of copies of what its job left.
#[derive(Clone, Copy)]
pub(crate) struct Sight<'a> {
    pub(crate) kept: &'a Kept,
    pub(crate) copies: &'a Copies,
    pub(crate) scene: Scene<'a>,
}

/// Whether it is settled where the results are.
enum Results {
    /// They are being copied, or the only node that has them may come back.
    Awaited,
    /// Nothing more comes of waiting. What of it is not as it should be, for people.
    Settled(Option<String>),
}

impl Sight<'_> {
    /// Whether everybody who can be reached said what they hold of `keep/`, and where nothing is
    /// known of a rank, who may soon be back as well; or long enough was waited for that. The ends
    /// are in the record before anybody is asked.
    fn saves_are_known(&self, drive: &Drive) -> bool {
        let recorded = self.kept.value.body.all_at_least(RankState::Ended);
        let Some(since_ms) = drive.copies_since_ms.filter(|_| recorded) else {
            return drive.spec.spec.keep_every_ms == 0;
        };
        let waited_ms = self.scene.now.boot_ms.saturating_sub(since_ms);
        let answered = self.copies.all_answered(self.kept, since_ms, self.scene);
        (answered || waited_ms >= SAVES_WAIT_MS) && !self.waits_for_saves(since_ms)
    }

    /// Whether the next attempt waits for what somebody may have who is away.
    fn waits_for_saves(&self, since_ms: u64) -> bool {
        let over_ms = since_ms.saturating_add(SAVES_AWAY_MS);
        self.kept.spec.spec.keep_every_ms > 0
            && self.scene.now.boot_ms < over_ms
            && self.copies.may_have_saves(self.kept, &self.kept.value.body, since_ms, self.scene)
    }

    /// How the results of all ranks stand; what is given up is noted in their ends.
    fn results(&self, body: &mut Body, drive: &Drive) -> Results {
        let now = self.scene.now;
        let since_ms = drive.copies_since_ms.unwrap_or(now.boot_ms);
        let lost_after_ms = drive.spec.spec.lost_after_ms;
        let (mut few, mut lost) = (None, Vec::new());
        for record in &body.ranks {
            if !record.end.as_ref().is_some_and(RankEnd::has_results) {
                continue;
            }
            match self.copies.standing(self.kept, record, since_ms, self.scene) {
                // Whoever copies it says so, or that it cannot: then it is another's.
                Standing::UnderWay { .. } => return Results::Awaited,
                Standing::Enough { have, should } if have < should => {
                    let known = few.get_or_insert((0_usize, have, should));
                    *known = (known.0 + 1, known.1.min(have), should);
                }
                Standing::Enough { .. } => {}
                Standing::Gone { since_ms } => {
                    let until_ms = since_ms.max(drive.since_ms).saturating_add(lost_after_ms);
                    if until_ms > now.boot_ms && !drive.give_up_copies {
                        return Results::Awaited;
                    }
                    lost.push(record.assignment.rank);
                }
                Standing::Lost => lost.push(record.assignment.rank),
            }
        }
        for record in &mut body.ranks {
            let rank = record.assignment.rank;
            let Some(end) = record.end.as_mut().filter(|_| lost.contains(&rank)) else { continue };
            let save = self.copies.newest_save(self.kept, rank, self.scene);
            let mut note = NOT_COPIED.to_owned();
            if let Some((_, tree)) = save {
                end.keep = Some(tree);
                note.push_str("; keep/ is as it was copied while the process ran");
            }
            if let Some(before) = &end.note {
                note = format!("{note}; {before}");
            }
            cut(&mut note, super::REASON_BYTES_MAX);
            end.note = Some(note);
        }
        let lost = match lost.len() {
            0 => None,
            1 => Some("what one process left was not copied before its node was gone".to_owned()),
            n => {
                Some(format!("what {n} processes left was not copied before their nodes were gone"))
            }
        };
        let few = few.map(|(ranks, have, should)| {
            let whose =
                if ranks == 1 { "one process".to_owned() } else { format!("{ranks} processes") };
            let nodes = if have == 1 { "node" } else { "nodes" };
            let why = match self.copies.refusal(self.kept.spec.job) {
                Some((node, reason)) => format!("{node} cannot hold it: {reason}"),
                None => "the other keepers are away".to_owned(),
            };
            format!("what {whose} left is on {have} {nodes}, not on {should}: {why}")
        });
        let all: Vec<String> = lost.into_iter().chain(few).collect();
        Results::Settled((!all.is_empty()).then(|| all.join("; ")))
    }

    /// Why a job is not over yet all of whose processes are.
    pub(super) fn describe(&self, drive: &Drive, since_ms: u64, view: &mut WaitView) {
        let body = &self.kept.value.body;
        let (mut waits, mut gone) = (0, 0);
        for record in &body.ranks {
            if !record.end.as_ref().is_some_and(RankEnd::has_results) {
                continue;
            }
            match self.copies.standing(self.kept, record, since_ms, self.scene) {
                Standing::Enough { .. } => {}
                Standing::UnderWay { .. } => waits += 1,
                Standing::Gone { .. } | Standing::Lost => gone += 1,
            }
        }
        let of = body.ranks.len();
        view.summary = match (waits, gone) {
            (0, 0) => "what the processes left is copied".to_owned(),
            (waits, 0) => {
                format!("what {waits} of {of} processes left is being copied to other nodes")
            }
            (_, gone) => format!(
                "only nodes that are gone have what {gone} of {of} processes left: the job is over \
                 when they are back, when they have been gone for {} min, or when it is stopped",
                self.kept.spec.spec.lost_after_ms / 60_000
            ),
        };
        if begins_again(body, drive) && self.waits_for_saves(since_ms) {
            view.summary = format!(
                "the next attempt waits for nodes that are away and may have the newest copy of \
                 keep/: no longer than {} min",
                SAVES_AWAY_MS / 60_000
            );
        }
        let keepers = self.kept.keepers.iter().map(|(keeper, _)| *keeper);
        let mut nodes: Vec<_> = keepers.chain(body.nodes()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        for node in nodes {
            if let Some(verdict) = self.copies.verdict(node, self.kept, self.scene) {
                view.nodes.push((node, verdict));
            }
        }
    }
}

/// Nothing of the attempt may still run somewhere.
fn is_surely_over(body: &Body) -> bool {
    let silent = |end: &RankEnd| end.ending == Ending::Silent;
    !body.ranks.iter().any(|rank| rank.end.as_ref().is_some_and(silent))
}

/// Whether another attempt follows, all ranks of this one being at their ends.
pub(super) fn is_to_be_retried(body: &Body, drive: &Drive) -> bool {
    let (outcome, _) = outcome::decide(body, drive.observed.stop_asked);
    let failed = matches!(outcome, Outcome::Failed { .. } | Outcome::Lost { .. });
    failed && is_surely_over(body) && body.retried < drive.spec.spec.retries
}

/// The same, or once more since the gang did not start whole.
fn begins_again(body: &Body, drive: &Drive) -> bool {
    let failed = matches!(body.stop, Some(StopCause::StartFailed(_)));
    let starts = failed && drive.observed.stop_asked.is_none() && is_surely_over(body);
    (starts && body.failed_starts + 1 < super::FAILED_STARTS_MAX) || is_to_be_retried(body, drive)
}

/// DONE once every rank ended and what it left is copied; or WAITING again, where the gang never
/// was whole or the job may be retried.
pub(super) fn finish_if_over(mut body: Body, drive: &Drive, sight: &Sight<'_>) -> Body {
    if !body.all_at_least(RankState::Ended) {
        return body;
    }
    let at_ms = sight.scene.now.wall_ms;
    // What may still run somewhere is never run again.
    let mut failed_starts = body.failed_starts;
    if is_surely_over(&body)
        && let Some(StopCause::StartFailed(reason)) = body.stop.clone()
    {
        failed_starts += 1;
        if failed_starts < super::FAILED_STARTS_MAX && drive.observed.stop_asked.is_none() {
            if !sight.saves_are_known(drive) {
                return body;
            }
            body.failed_starts = failed_starts;
            body.saved = sight.copies.saved_for_next(sight.kept, &body, sight.scene);
            body.ranks.clear();
            body.stop = None;
            body.start = None;
            body.enter(State::Waiting, at_ms, format!("the gang did not start whole: {reason}"));
            return body;
        }
    }
    let (outcome, reason) = outcome::decide(&body, drive.observed.stop_asked);
    let retries = drive.spec.spec.retries;
    if is_to_be_retried(&body, drive) {
        if !sight.saves_are_known(drive) {
            if body.state() == State::Running {
                body.enter(State::Cleaning, at_ms, "every process ended");
            }
            return body;
        }
        body.retried += 1;
        body.failed_starts = failed_starts;
        body.saved = sight.copies.saved_for_next(sight.kept, &body, sight.scene);
        body.ranks.clear();
        body.stop = None;
        body.start = None;
        body.bound = false;
        let reason = format!("{reason}; retry {} of {retries}", body.retried);
        body.enter(State::Waiting, at_ms, reason);
        return body;
    }
    match sight.results(&mut body, drive) {
        Results::Awaited => {
            body.enter(State::Cleaning, at_ms, "every process ended: what they left is copied");
        }
        Results::Settled(flaw) => {
            body.failed_starts = failed_starts;
            body.outcome = Some(outcome);
            let reason = match flaw {
                Some(flaw) => format!("{reason}; {flaw}"),
                None => reason,
            };
            body.enter(State::Done, at_ms, reason);
        }
    }
    body
}

/// What becomes of a job all of whose processes are over since then; whether somebody asked not to
/// wait.
#[cfg(test)]
pub(crate) fn finished(sight: &Sight<'_>, since_ms: u64, give_up_copies: bool) -> (Body, String) {
    let spec = std::sync::Arc::clone(&sight.kept.spec);
    let drive = Drive {
        copies_since_ms: Some(since_ms),
        give_up_copies,
        ..Drive::new(spec, sight.scene.now)
    };
    let (job, state, summary) = (sight.kept.spec.job, sight.kept.value.body.state(), String::new());
    let mut view = WaitView { job, state, summary, need: 0, held: 0, nodes: Vec::new() };
    sight.describe(&drive, since_ms, &mut view);
    (finish_if_over(sight.kept.value.body.clone(), &drive, sight), view.summary)
}

impl Stewards {
    /// Ask who may hold copies what they hold; after how many milliseconds to ask again.
    pub(super) fn ask_for_copies(&self, job: JobId, cx: &mut Context<'_>) -> u64 {
        let Some(drive) = self.drives.get(&job) else { return RESEND_MS };
        let Some(since_ms) = drive.copies_since_ms else { return RESEND_MS };
        let Some(kept) = cx.registers.get(job) else { return RESEND_MS };
        let scene = Scene { board: cx.board, roster: cx.roster, now: cx.now };
        let waited_ms = cx.now.boot_ms.saturating_sub(since_ms);
        let retried = begins_again(&kept.value.body, drive);
        let to = if retried && drive.spec.spec.keep_every_ms > 0 {
            cx.copies.to_ask(kept, since_ms, scene)
        } else if waited_ms >= RESEND_MS || drive.since_ms.saturating_add(RESEND_MS) > since_ms {
            cx.copies.incomplete(kept, scene)
        } else {
            // They have just learnt that there is something to copy, and say so when they have.
            Vec::new()
        };
        let without = cx.copies.without(kept, since_ms, scene);
        for keeper in to {
            let (attempt, without) = (kept.value.body.attempt, without.clone());
            let ask = Message::AskCopies { job, attempt, without };
            cx.out.send(self.me, keeper, ask);
        }
        if retried { RESEND_MS } else { waited_ms.clamp(RESEND_MS, ASK_COPIES_MS_MAX) }
    }
}
