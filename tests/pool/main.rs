//! What p2pit promises, tried on real daemons on loopback.

mod admission;
mod bad_disk;
mod bad_input;
mod bad_input_tree;
mod copies;
mod demo;
mod environment;
mod examples;
mod faults;
mod files;
mod first_hour;
mod gang;
mod home;
mod isolation;
mod journal;
mod keepers;
mod queue;
mod requests;
mod scripts;
mod soak;
mod stopping;
mod survival;
mod transfers;
