//! The p2pit daemon: network, disk, GPUs and processes around one protocol peer.
//!
//! Decisions are made in `p2pit_protocol`; this crate carries them out.

pub mod api;
pub mod config;
pub mod daemon;
pub mod executor;
pub mod gpu;
pub mod home;
pub mod journal;
pub mod network;
pub mod store;
pub mod transfer;
pub mod workspace;
