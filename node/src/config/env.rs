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

/// Milliseconds by which the wall clock is off. Debug builds only: for tests.
#[cfg(debug_assertions)]
pub const CLOCK_OFFSET_MS: &str = "P2PIT_TEST_CLOCK_OFFSET_MS";
/// Milliseconds between two sweeps of the store, and for which blobs are relied on. Debug builds
/// only: for tests.
#[cfg(debug_assertions)]
pub const SWEEP_MS: &str = "P2PIT_TEST_SWEEP_MS";
/// Added to the wire version said at doors. Debug builds only: for tests.
#[cfg(debug_assertions)]
pub const WIRE_OFFSET: &str = "P2PIT_TEST_WIRE_OFFSET";

/// The number in a variable that only tests set; 0 where it has none.
#[cfg(debug_assertions)]
pub(crate) fn for_tests(variable: &str) -> i64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}
