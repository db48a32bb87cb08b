//! Every environment variable that p2pit reads for itself.

/// The home directory; like `--home`.
pub const HOME: &str = "P2PIT_HOME";
/// The user's key file; like `--identity`.
pub const IDENTITY: &str = "P2PIT_IDENTITY";
/// The node's name; like `--name`.
pub const NAME: &str = "P2PIT_NAME";
/// The GPUs to offer: `auto`, `none` or `sim:…`; like `--gpus`.
pub const GPUS: &str = "P2PIT_GPUS";
/// Cores to offer; like `--cpus`.
pub const CPUS: &str = "P2PIT_CPUS";
/// Main memory to offer, such as `64g`; like `--memory`.
pub const MEMORY: &str = "P2PIT_MEMORY";
/// Where to listen, `IP:PORT`; like `--listen`.
pub const LISTEN: &str = "P2PIT_LISTEN";
/// Nodes to try, `HOST:PORT` with commas between; like `--peer`.
pub const PEERS: &str = "P2PIT_PEERS";
/// Whether to use mDNS, `on` or `off`; `off` is like `--no-mdns`.
pub const MDNS: &str = "P2PIT_MDNS";
/// What is logged, as filter directives such as `info` or `p2pit_node=debug`.
pub const LOG: &str = "P2PIT_LOG";
