//! A deterministic world for [`p2pit_protocol::Peer`]: virtual time, machines that
//! crash, a network that loses, repeats and reorders, and checkers that watch.
//!
//! One seed makes one run, down to the hash of its trace. A run has two phases: first
//! faults go on, and only what must never happen is checked; then everything heals, and
//! every job has to come to its end. See [`mod@run`] for the phases, [`mod@world`] for
//! how one event is carried out, [`mod@check`] for the rules.

#![forbid(unsafe_code)]

pub mod check;
pub mod clock;
pub mod ledger;
pub mod machine;
pub mod network;
pub mod options;
pub mod pool;
pub mod random;
pub mod run;
pub mod scenario;
pub mod search;
pub mod trace;
pub mod workload;
pub mod world;

pub use options::Options;
pub use run::{Ending, Report, run};
pub use world::World;
