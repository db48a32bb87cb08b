//! How a command ends.

use p2pit_protocol::job::Outcome;

/// A command's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u8);

impl Status {
    /// What was asked for is done.
    pub(crate) const DONE: Self = Self(0);
    /// The request could not be met, and the same request will not be until something
    /// that it depends on changes.
    pub(crate) const FAILED: Self = Self(1);
    /// Something broke on the way.
    pub(crate) const BROKEN: Self = Self(2);
    /// Ended with Ctrl-C, as a shell says it: 128 + SIGINT.
    pub(crate) const INTERRUPTED: Self = Self(130);
    /// 128 + SIGTERM.
    pub(crate) const TERMINATED: Self = Self(143);

    /// The code of a command that waited for a job: the job's own where it has one.
    pub(crate) fn of_outcome(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Succeeded => Self::DONE,
            // A failure never looks like success, whatever its number.
            Outcome::Failed { code } => {
                Self(u8::try_from(*code).ok().filter(|code| *code != 0).unwrap_or(1))
            }
            Outcome::Stopped { .. } => Self(143),
            Outcome::TimedOut => Self(124),
            Outcome::Lost { .. } => Self(125),
        }
    }
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::{UserId, identity::PublicKey};

    use super::*;

    #[test]
    fn a_job_that_was_waited_for_gives_its_own_exit_code() {
        let by = UserId(PublicKey([0; 32]));
        for (outcome, code) in [
            (Outcome::Succeeded, 0),
            (Outcome::Failed { code: 3 }, 3),
            (Outcome::Failed { code: 137 }, 137),
            (Outcome::Failed { code: 0 }, 1),
            (Outcome::Failed { code: 256 }, 1),
            (Outcome::Stopped { by }, 143),
            (Outcome::TimedOut, 124),
            (Outcome::Lost { reason: String::new() }, 125),
        ] {
            assert_eq!(Status::of_outcome(&outcome), Status(code), "{outcome}");
        }
    }
}
