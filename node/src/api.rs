//! The daemon's HTTP + JSON interface on a unix socket.

pub mod log;
pub(crate) mod server;
pub mod types;

pub use self::server::is_disk_full;
