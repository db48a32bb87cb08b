//! Time as the machines see it: a number that comes in with each call.

use serde::{Deserialize, Serialize};

/// The two clocks of a node at the moment of a call.
///
/// Deadlines use `boot_ms` only. `wall_ms` is used where people or peers compare
/// dates: statement validity, request expiry, log lines, `submitted_at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Now {
    /// Milliseconds since the machine booted, suspend included (`CLOCK_BOOTTIME`).
    pub boot_ms: u64,
    /// Milliseconds since the Unix epoch.
    pub wall_ms: u64,
}

impl Now {
    /// The boot-clock time `ms` milliseconds from now.
    #[must_use]
    pub fn after(self, ms: u64) -> u64 {
        self.boot_ms.saturating_add(ms)
    }
}
