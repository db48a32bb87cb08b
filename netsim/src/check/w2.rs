//! W2: what others can make a node grow keeps its stated bound, and nobody waits for ever: a
//! job that ended holds nothing and has no call standing once the time for that is over.

use std::collections::BTreeMap;

use p2pit_protocol::{
    JobId,
    bidder::TOMBSTONES_MAX,
    job::State,
    message::Key,
    record::{EPOCHS_MAX, HISTORY_MAX, RECORDS_MAX},
};

use super::{Broken, Checker, Scene};
use crate::machine::Machine;

/// Calls that one bidder lets stand, as promised.
const STANDING_MAX: usize = 64;
/// How long a call stands, as promised, and a little: for a copy of it that came late, for a
/// slow clock, and for the hold that is offered at its end.
const STANDING_MS: u64 = (15 + 5) * 60_000;
/// How often what waits is looked at: it takes a view of the whole node.
const LOOK_MS: u64 = 60_000;

#[derive(Debug, Default)]
pub(super) struct BoundsHold {
    /// When jobs ended.
    ended_ms: BTreeMap<JobId, u64>,
    look_ms: u64,
}

impl Checker for BoundsHold {
    fn rule(&self) -> &'static str {
        "W2"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for job in scene.chosen() {
            let Some(value) = scene.ledger.current(job) else { continue };
            let history = value.body.history.len();
            if history > HISTORY_MAX || value.epoch as usize > EPOCHS_MAX {
                let text = format!("a history of {history} in epoch {}", value.epoch);
                return Err(Broken::of(job, text));
            }
            if value.body.state() == State::Done {
                self.ended_ms.entry(job).or_insert(scene.now_ms);
            }
        }
        if !scene.surveys {
            return Ok(());
        }
        let waits = scene.now_ms >= self.look_ms;
        if waits {
            self.look_ms = scene.now_ms + LOOK_MS;
        }
        for (machine, peer) in scene.daemons() {
            within(machine, peer.records().count(), RECORDS_MAX, "records")?;
            within(machine, machine.tombstones, TOMBSTONES_MAX, "tombstones")?;
            // What stands still ends nothing; it does as soon as it goes on.
            let went_on_ms = machine.went_on_ms.unwrap_or(0);
            if !waits || machine.still.is_some() || went_on_ms + LOOK_MS > scene.now_ms {
                continue;
            }
            let standing = peer.node_view().standing;
            within(machine, standing.len(), STANDING_MAX, "standing calls")?;
            for key in standing {
                self.look_at(scene, machine, key, "lets it wait")?;
            }
            for hold in peer.book().0 {
                self.look_at(scene, machine, hold.key, "holds something for it")?;
            }
        }
        Ok(())
    }
}

impl BoundsHold {
    /// Something of a job is on a machine: it must not be long over.
    fn look_at(
        &self,
        scene: &Scene<'_>,
        machine: &Machine,
        key: Key,
        what: &str,
    ) -> Result<(), Broken> {
        let ended_ms = self.ended_ms.get(&key.job).copied();
        match ended_ms.filter(|ended_ms| ended_ms + STANDING_MS < scene.now_ms) {
            Some(ended_ms) => {
                let text = format!("{} still {what}, which ended at {ended_ms} ms", machine.name());
                Err(Broken::of(key.job, text))
            }
            None => Ok(()),
        }
    }
}

fn within(machine: &Machine, got: usize, max: usize, what: &str) -> Result<(), Broken> {
    if got <= max {
        return Ok(());
    }
    Err(Broken { job: None, text: format!("{} has {got} {what}", machine.name()) })
}
