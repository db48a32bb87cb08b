//! X1: executions of a rank of a job are disjoint in true time, whatever the attempt.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct OneExecutionAtATime;

impl Checker for OneExecutionAtATime {
    fn rule(&self) -> &'static str {
        "X1"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Spawned(id) = happening else { continue };
            let runs = scene.ledger.executions.get(&(id.job, id.rank)).into_iter().flatten();
            let live = runs.filter(|run| run.to_ms.is_none());
            // A machine that sleeps runs nothing, and ends what is overdue as it wakes.
            let live: Vec<_> = live.filter(|run| !scene.sleeps(run.machine)).collect();
            if live.len() > 1 {
                return Err(Broken::of(id.job, format!("a rank runs twice: {live:?}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::{
        JobId,
        bidder::WorkId,
        job::{Attempt, Rank},
    };

    use super::{super::testing, *};
    use crate::ledger::Ledger;

    #[test]
    fn two_attempts_of_one_rank_at_one_time_are_noticed_and_one_after_the_other_are_not() {
        let id =
            |attempt| WorkId { job: JobId::of(b"j"), attempt: Attempt(attempt), rank: Rank(0) };
        let mut ledger = Ledger::default();
        ledger.begin(id(1), 0, 10);
        ledger.end(id(1), 0, 20, None);
        ledger.begin(id(2), 1, 20);
        let look = |ledger: &Ledger, attempt| {
            let happenings = [Happening::Spawned(id(attempt))];
            testing::look(&mut OneExecutionAtATime, ledger, &happenings).is_ok()
        };
        assert!(look(&ledger, 2));
        ledger.begin(id(3), 2, 25);
        assert!(!look(&ledger, 3));
    }
}
