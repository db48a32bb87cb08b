//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

/// For whatever takes less than a second on an idle machine; a test machine may be busy
/// with many daemons at once.
pub const SOON: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(50);

/// Asks again and again until `condition` gives something.
///
/// # Panics
/// Where that takes longer than `within`: `what` did not come to be.
#[track_caller]
pub fn wait_until<T>(what: &str, within: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(it) = condition() {
            return it;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", within.as_secs());
        std::thread::sleep(POLL);
    }
}
