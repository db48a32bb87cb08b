//! Stories told in files: a pool, a few jobs, and what happens step by step.
//!
//! A file says what must come of it, and every rule is watched beside that. `netsim run
//! scenarios/NAME.yaml` plays one; its format is described in `scenarios/README.md`.
//! [`mod@format`] is what stands in a file, [`mod@read`] checks it, [`mod@play`] carries
//! it out in a [`crate::World`].

pub mod condition;
pub mod format;
mod hand;
mod locate;
pub mod play;
pub mod read;

pub use play::play;
pub use read::{Error, Story, Variant, load, parse};
