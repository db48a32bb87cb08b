//! What daemon and supervisor say to each other: one JSON value per line.
//!
//! A supervisor may be older or newer than the daemon that adopts it. Fields are only ever
//! added, and a line that is not understood is skipped.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::spec::{Deadline, Ended};

/// No event or order is longer; the longest carries the reason of an ending.
pub(super) const LINE_BYTES_MAX: usize = 64 << 10;

/// What a supervisor tells whoever is connected. A new connection first gets the latest of
/// each kind, so that it misses nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    Started {
        pid: u32,
        boot_ms: u64,
    },
    LogGrew {
        bytes: u64,
    },
    LogTrouble {
        reason: String,
    },
    /// When the lease ends, said again after each order about it.
    Deadline {
        boot_ms: Deadline,
    },
    Ended(Box<Ended>),
    Pong,
}

/// What a daemon wants of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// SIGTERM to all of the tree, SIGKILL after the grace (that of the spec if `None`).
    Stop {
        grace_ms: Option<u64>,
        reason: String,
    },
    /// SIGKILL to all of the tree.
    Kill {
        reason: String,
    },
    /// The lease ends then, or later if it did so before; `None`: there is none.
    SetDeadline {
        boot_ms: Deadline,
    },
    /// The result is recorded elsewhere; stop trying to write it here.
    Release,
    Ping,
}

pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    // Enums of numbers and texts have no state that JSON lacks.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Cuts complete lines off the front of `buffer`.
pub(super) fn next_line<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> Option<Option<T>> {
    let end = buffer.iter().position(|&b| b == b'\n')?;
    let line: Vec<u8> = buffer.drain(..=end).collect();
    Some(serde_json::from_slice(&line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_off_one_by_one_and_unknown_ones_skipped() {
        let mut buffer = encode(&Order::Ping);
        buffer.extend_from_slice(b"{\"dance\":1}\n");
        buffer.extend(encode(&Order::SetDeadline { boot_ms: Deadline(None) }));
        buffer.extend_from_slice(b"{\"st");
        assert_eq!(next_line(&mut buffer), Some(Some(Order::Ping)));
        assert_eq!(next_line::<Order>(&mut buffer), Some(None));
        let lifted = Order::SetDeadline { boot_ms: Deadline(None) };
        assert_eq!(next_line(&mut buffer), Some(Some(lifted)));
        assert_eq!(next_line::<Order>(&mut buffer), None);
        assert_eq!(buffer, b"{\"st");
    }

    #[test]
    fn an_older_supervisors_time_limit_is_understood() {
        use crate::executor::spec::{Ending, ExitStatus};
        let line = br#"{"timed_out":{"limit":"time","status":{"signal":15}}}"#;
        let status = ExitStatus::Signal(15);
        assert_eq!(serde_json::from_slice::<Ending>(line).unwrap(), Ending::TimedOut { status });
        let line = encode(&Order::SetDeadline { boot_ms: Deadline(Some(7)) });
        assert_eq!(line, b"{\"set_deadline\":{\"boot_ms\":7}}\n");
    }
}
