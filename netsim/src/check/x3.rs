//! X3: a node starts a rank of an attempt at most once, across restarts; and a daemon
//! asks its executor only for what can be done.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct OneStartPerAttempt;

impl Checker for OneStartPerAttempt {
    fn rule(&self) -> &'static str {
        "X3"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            match happening {
                Happening::Misused(id, what) => {
                    return Err(Broken::of(id.job, format!("told to {what}: {id:?}")));
                }
                Happening::Spawned(id) => {
                    let runs = scene.ledger.executions.get(&(id.job, id.rank));
                    let of_id = runs.into_iter().flatten().filter(|run| run.id == *id);
                    if of_id.count() > 1 {
                        return Err(Broken::of(id.job, format!("{id:?} was started again")));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}
