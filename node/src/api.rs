//! The daemon's HTTP + JSON interface on a unix socket, and a client for it.

pub mod types;
