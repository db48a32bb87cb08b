//! Small models, searched through to the end: every order of messages, losses and acts that
//! their bounds allow. They drive the real machines; only the network around them is a model.
//!
//! Each prints how many states it met. To read a path that breaks a property, run it alone:
//! `cargo test -p p2pit-protocol --test models NAME -- --nocapture`.
#![allow(clippy::unwrap_used, reason = "a test helper that cannot go on fails its test")]
#![allow(clippy::print_stdout, reason = "the counts of states are what a search has to say")]

mod admins;
#[path = "../cast/mod.rs"]
mod cast;
mod gangs;
mod members;
mod record;

use std::fmt::Debug;

use stateright::{Checker, HasDiscoveries, Model};

/// Search `model` through, print its counts, and fail with the path that breaks a property.
fn search<M>(name: &str, model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: std::hash::Hash + Debug + Clone + PartialEq + Send + Sync + 'static,
    M::Action: Debug + Clone + PartialEq + Send + Sync + 'static,
{
    let checker =
        model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let (states, unique) = (checker.state_count(), checker.unique_state_count());
    println!("{name}: {states} states, {unique} unique, depth {}", checker.max_depth());
    checker.assert_properties();
}
