//! Faults on real daemons: machines of their own on one network that a test can break.
//!
//! A [`World`] is a [`crate::Pool`] whose nodes each have a machine: a network, process, mount
//! and time namespace (`machine`), with an address and a line of its own to a router in the
//! middle (`net`). Daemons, supervisors and jobs of a node are inside; the test is outside, and
//! speaks to a node as everywhere: with the command, over the socket in its home.
//!
//! | what goes wrong | how |
//! |---|---|
//! | a part of the network is cut off, one way or both | [`World::cut`], nftables at the router |
//! | packets are lost | [`World::lose`], nftables `numgen` |
//! | a line is slow | [`World::slow`], `tc tbf` |
//! | packets are late, or overtake each other | [`World::delay`], `tc netem` where the kernel has it, else a relay of the harness (`relay`) |
//! | a cable is pulled | [`World::unplug`] |
//! | a daemon dies, stands still | [`crate::Node::crash`], [`World::stop`] and [`World::go_on`] |
//! | a machine goes out, and comes back | [`World::power_off`], [`World::boot`]: no process of it is left, its boot id is another, its boot clock begins anew |
//! | a disk is small, or wiped | [`crate::SmallDisk`] below a home; removing the home |
//! | a wall clock is wrong | [`WALL_CLOCK_OFF_MS`] in a daemon's environment |
//!
//! What a machine is made of is held by one process per machine, which ends when its standard
//! input does: whatever becomes of the test, a panic or a `kill -9`, nothing of the machine
//! stays, neither process nor namespace nor mount. When a test fails, a world first collects
//! what the nodes can still say (`collect`) into the pool's directory, and prints where.
//!
//! As root the machines share this machine's users. An ordinary user gets the world in a user
//! namespace of its own, where it may have one. Not simulated is what a power cut does to
//! writes that were not synced (the journal's own tests cut those off), and a machine's memory
//! of other machines: the kernel is one, and so are its page cache and its clock's rate.

mod collect;
mod machine;
mod net;
mod relay;
mod world;

pub(crate) use machine::Place;
pub use relay::Delay;
pub use world::{WALL_CLOCK_OFF_MS, World};
