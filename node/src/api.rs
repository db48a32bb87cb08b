//! The daemon's HTTP + JSON interface on a unix socket.

pub(crate) mod server;
pub mod types;
