//! R4: an epoch begins with exactly the value that follows from the seal of the one before.

use p2pit_protocol::record::Ballot;

use super::{Broken, Checker, Scene};
use crate::ledger::{Happening, Register, Vote};

#[derive(Debug)]
pub(super) struct EpochsFollow;

impl Checker for EpochsFollow {
    fn rule(&self) -> &'static str {
        "R4"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        for happening in scene.happenings {
            let Happening::Voted { job, vote } = happening else { continue };
            let Some(register) = scene.ledger.registers.get(job) else { continue };
            if vote.epoch > 0 && vote.ballot == Ballot::ZERO {
                look_at_first(register, vote).map_err(|text| Broken::of(*job, text))?;
            }
        }
        Ok(())
    }
}

fn look_at_first(register: &Register, vote: &Vote) -> Result<(), String> {
    let epoch = vote.epoch;
    if register.epoch(epoch).is_some_and(|of_vote| of_vote.forced) {
        return Ok(());
    }
    let sealed = register.epoch(epoch - 1).and_then(|before| before.sealed);
    let Some(seal) = sealed.and_then(|sealed| register.value(&sealed)) else {
        return Err(format!("epoch {epoch} begins though epoch {} was not sealed", epoch - 1));
    };
    if seal.first_of_next_epoch().hash() != vote.value {
        return Err(format!("epoch {epoch} does not begin with what sealed the one before"));
    }
    let named = seal.sealed.as_deref();
    if named != register.epoch(epoch).map(|epoch| &epoch.keepers[..]) {
        return Err(format!("epoch {epoch} has other keepers than the seal before it names"));
    }
    Ok(())
}
