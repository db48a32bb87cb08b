//! A daemon can always read the journal that it wrote.

use super::{Broken, Checker, Scene};
use crate::ledger::Happening;

#[derive(Debug)]
pub(super) struct Readable;

impl Checker for Readable {
    fn rule(&self) -> &'static str {
        "journal"
    }

    fn look(&mut self, scene: &Scene<'_>) -> Result<(), Broken> {
        let unreadable = scene.happenings.iter().find_map(|happening| match happening {
            Happening::Unreadable(reason) => Some(reason.clone()),
            _ => None,
        });
        unreadable.map_or(Ok(()), |text| Err(Broken { job: None, text }))
    }
}
