//! How a job ended, from how its ranks did.

use crate::{
    UserId,
    job::{Ending, Outcome, RankEnd, StopCause},
    record::Body,
};

/// The outcome of a job all of whose ranks ended, with the reason in words.
pub(super) fn decide(body: &Body, stop_asked: Option<UserId>) -> (Outcome, String) {
    if let Some(by) = stopped_by(body, stop_asked) {
        return (Outcome::Stopped { by }, "stopped".to_owned());
    }
    let Some((rank, end)) = guilty(body) else {
        return (Outcome::Succeeded, "every process succeeded".to_owned());
    };
    let reason = format!("rank {rank}: {}", end.ending);
    let outcome = match &end.ending {
        Ending::TimedOut => Outcome::TimedOut,
        Ending::Lost { reason } => Outcome::Lost { reason: reason.clone() },
        Ending::LeaseEnded | Ending::Silent => Outcome::Lost { reason: end.ending.to_string() },
        Ending::Exited { .. }
        | Ending::Signaled { .. }
        | Ending::Stopped
        | Ending::FailedToStart { .. }
        | Ending::NeverStarted => Outcome::Failed { code: end.ending.code() },
    };
    (outcome, reason)
}

fn stopped_by(body: &Body, stop_asked: Option<UserId>) -> Option<UserId> {
    match &body.stop {
        Some(StopCause::By(by)) => Some(*by),
        Some(StopCause::StartFailed(_)) => stop_asked,
        Some(StopCause::RankFailed(_)) | None => None,
    }
}

/// The rank whose failure ended the job: the recorded one, else the first to fail.
fn guilty(body: &Body) -> Option<(u32, &RankEnd)> {
    let failed = body.ranks.iter().filter_map(|rank| {
        let end = rank.end.as_ref()?;
        (!end.ending.is_success()).then_some((rank.assignment.rank.0, end))
    });
    let recorded = match &body.stop {
        Some(StopCause::RankFailed(rank)) => Some(rank.0),
        Some(StopCause::By(_) | StopCause::StartFailed(_)) | None => None,
    };
    let mut failed: Vec<_> = failed.collect();
    failed.sort_by_key(|(rank, end)| (Some(*rank) != recorded, end.at_ms, *rank));
    failed.into_iter().next()
}
