//! What a story does to messages and learns from them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use p2pit_protocol::{
    JobId,
    message::{Accept, Message},
    record::Value,
    wire,
};

use super::format::{Moment, SEAL};
use crate::world::{Delivery, Letter, Treatment, World, job_of};

/// A hand on every link of a world.
#[derive(Debug, Clone, Default)]
pub(super) struct Hand(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    wanted: Option<Wanted>,
    losses: Vec<Loss>,
}

/// A message that a story waits for.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Its name.
    pub(super) name: &'static str,
    /// When of it.
    pub(super) moment: Moment,
    /// The how manieth, from 1.
    pub(super) nth: u64,
    /// What it must be about and between whom; `None` as long as that is not known, and
    /// nothing fits.
    pub(super) filter: Option<Filter>,
    /// How many there were.
    pub(super) seen: u64,
}

/// Which messages are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) job: JobId,
    pub(super) from: Option<usize>,
    pub(super) to: Option<usize>,
}

/// Messages to lose.
#[derive(Debug)]
pub(super) struct Loss {
    pub(super) names: Vec<&'static str>,
    pub(super) job: Option<JobId>,
    pub(super) to: Option<Vec<usize>>,
    pub(super) until_ms: u64,
}

impl Hand {
    /// Lay it on every link of `world`.
    pub(super) fn lay_on(&self, world: &mut World) {
        let hand = self.clone();
        world.intercept(move |letter| hand.held().treat(letter));
    }

    /// Wait for a message from now on, or for none.
    pub(super) fn want(&self, wanted: Option<Wanted>) {
        self.held().wanted = wanted;
    }

    /// Say what the message waited for must be about.
    pub(super) fn aim(&self, filter: Option<Filter>) {
        if let Some(wanted) = &mut self.held().wanted {
            wanted.filter = filter;
        }
    }

    /// Whether its moment came. `delivered` is what the last event brought to anyone.
    pub(super) fn came(&self, delivered: Option<&Delivery>) -> bool {
        let mut held = self.held();
        let Some(wanted) = &mut held.wanted else { return false };
        if wanted.moment == Moment::Delivered
            && let Some(delivery) = delivered
            && wanted.means(delivery.name, delivery.job, delivery.from, delivery.to)
        {
            wanted.seen += 1;
        }
        wanted.seen >= wanted.nth
    }

    /// Lose messages.
    pub(super) fn lose(&self, loss: Loss) {
        self.held().losses.push(loss);
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn treat(&mut self, letter: &Letter<'_>) -> Treatment {
        let (name, job) = (letter.message.name(), job_of(letter.message));
        let seals = || matches!(letter.message, Message::Accept(accept) if seals(accept));
        self.losses.retain(|loss| loss.until_ms > letter.at_ms);
        if self.losses.iter().any(|loss| loss.takes(name, job, letter.to)) {
            return Treatment::Lose;
        }
        let Some(wanted) = &mut self.wanted else { return Treatment::AsDrawn };
        let name = if wanted.name == SEAL && seals() { SEAL } else { name };
        if wanted.moment == Moment::Delivered || !wanted.means(name, job, letter.from, letter.to) {
            return Treatment::AsDrawn;
        }
        wanted.seen += 1;
        // Its like that leave at the same moment would have left after it.
        let lost = wanted.moment == Moment::Before && wanted.seen >= wanted.nth;
        if lost { Treatment::Lose } else { Treatment::AsDrawn }
    }
}

fn seals(accept: &Accept) -> bool {
    wire::decode::<Value>(&accept.value_bytes).is_ok_and(|value| value.sealed.is_some())
}

impl Wanted {
    fn means(&self, name: &str, job: Option<JobId>, from: usize, to: usize) -> bool {
        let Some(filter) = &self.filter else { return false };
        // Renewals are for many jobs at once, and count for each.
        let about_it = job.is_none_or(|job| job == filter.job);
        let between_them = filter.from.is_none_or(|wanted| wanted == from)
            && filter.to.is_none_or(|wanted| wanted == to);
        name == self.name && about_it && between_them
    }
}

impl Loss {
    fn takes(&self, name: &str, job: Option<JobId>, to: usize) -> bool {
        let about_it = match (self.job, job) {
            (Some(wanted), Some(job)) => wanted == job,
            _ => true,
        };
        let to_them = self.to.as_ref().is_none_or(|receivers| receivers.contains(&to));
        about_it && to_them && self.names.contains(&name)
    }
}
