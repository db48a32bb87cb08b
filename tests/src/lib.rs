//! Real daemons on loopback, for tests and measurements.
//!
//! A [`Pool`] is a temporary directory with one user's key and the homes of some nodes.
//! A [`Node`] runs the real `p2pit` for its home, as a user at a shell would: nothing here
//! speaks to a daemon in another way, so that what is tested is what is promised. Every
//! command has a time limit of its own. When a pool is dropped, also in a panic, every
//! process that belongs to its directory is ended by its id; after a panic the ends of the
//! daemons' logs are printed and the directory stays.
//!
//! A [`World`] is such a pool on machines of their own, whose network, power and clocks a test
//! breaks; its module says how.

mod command;
mod disk;
mod harness;
pub mod nat;
mod node;
mod pool;
mod processes;
mod require;
mod wait;

pub use command::{Ended, Running};
pub use disk::SmallDisk;
pub use harness::{Delay, WALL_CLOCK_OFF_MS, World};
pub use node::{Node, job_dir, lines_of, program};
pub use pool::Pool;
pub use processes::{Process, end_all, mentioning, of_job};
pub use require::{has_namespaces, has_torch, is_root, python_packages};
pub use wait::{SOON, wait_until};
