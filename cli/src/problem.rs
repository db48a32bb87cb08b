//! An error that knows whose fault it is and what to do next.

use std::{error::Error, fmt, io};

use p2pit_node::api::{room_hint, types::ApiError};
use p2pit_protocol::door::RefusalCode;

use crate::status::Status;

/// Part of an error's chain that decides how the command ends and what is advised.
///
/// An error without one is something that broke.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    message: String,
    /// Shown below the message as it is, such as a line with a caret.
    excerpt: Option<String>,
    hint: Option<String>,
    status: Status,
    /// The rule by which a pool's door refused, where one did.
    refusal: Option<RefusalCode>,
}

impl Problem {
    /// The request cannot be met.
    pub(crate) fn request(message: impl Into<String>) -> Self {
        let (message, status) = (message.into(), Status::FAILED);
        Self { message, excerpt: None, hint: None, status, refusal: None }
    }

    /// Something broke.
    pub(crate) fn broken(message: impl Into<String>) -> Self {
        Self { status: Status::BROKEN, ..Self::request(message) }
    }

    /// Whether the request is at fault: asking again is answered the same.
    pub(crate) fn is_request(&self) -> bool {
        self.status == Status::FAILED
    }

    pub(crate) fn refusal(&self) -> Option<RefusalCode> {
        self.refusal
    }

    /// With the next step; commands in backticks.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    pub(crate) fn excerpt(self, excerpt: impl Into<String>) -> Self {
        Self { excerpt: Some(excerpt.into()), ..self }
    }
}

impl From<ApiError> for Problem {
    fn from(ApiError { error, hint, broken, refusal }: ApiError) -> Self {
        let problem = if broken { Self::broken(error) } else { Self::request(error) };
        Self { hint, refusal, ..problem }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Problem {}

/// Whoever read our output has had enough of it, which is no failure.
#[derive(Debug)]
pub(crate) struct OutputClosed;

impl fmt::Display for OutputClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads the output any more")
    }
}

impl Error for OutputClosed {}

/// What writing to standard output failed of.
pub(crate) fn output_error(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => OutputClosed.into(),
        _ => anyhow::Error::from(error).context("cannot write the output"),
    }
}

/// How a command that failed ends, and what it says of that; nothing where the reader
/// went away.
pub(crate) fn explain(error: &anyhow::Error) -> (Status, Option<Explanation>) {
    if error.downcast_ref::<OutputClosed>().is_some() {
        return (Status::DONE, None);
    }
    let problem = error.downcast_ref::<Problem>();
    let room = || room_hint(error);
    let explanation = Explanation {
        message: format!("{error:#}"),
        excerpt: problem.and_then(|problem| problem.excerpt.clone()),
        hint: problem.map_or_else(room, |problem| problem.hint.clone()),
    };
    (problem.map_or(Status::BROKEN, |problem| problem.status), Some(explanation))
}

/// What is printed of an error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Explanation {
    pub(crate) message: String,
    pub(crate) excerpt: Option<String>,
    pub(crate) hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_problem_decides_the_status_however_deep_it_lies() {
        let problem = Problem::request("no job `abcd`").hint("`p2pit show jobs` lists them");
        let error = Err::<(), _>(problem).context("cannot stop it").unwrap_err();
        let (status, explanation) = explain(&error);
        let explanation = explanation.unwrap();
        assert_eq!(status, Status::FAILED);
        assert_eq!(explanation.message, "cannot stop it: no job `abcd`");
        assert_eq!(explanation.hint.as_deref(), Some("`p2pit show jobs` lists them"));
    }

    #[test]
    fn any_other_error_is_something_that_broke() {
        let error = anyhow::Error::from(io::Error::other("disk on fire")).context("cannot save");
        let (status, explanation) = explain(&error);
        assert_eq!(status, Status::BROKEN);
        assert_eq!(explanation.unwrap().message, "cannot save: disk on fire");
    }

    #[test]
    fn a_full_disk_comes_with_what_to_do_about_it() {
        let full = io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        let error = anyhow::Error::from(full).context("cannot write `/data/x`");
        let (status, explanation) = explain(&error);
        assert_eq!(status, Status::BROKEN);
        assert!(explanation.unwrap().hint.unwrap().contains("free some space"));
    }

    #[test]
    fn an_error_of_the_daemon_keeps_its_kind_and_hint() {
        let api = |broken| {
            let hint = Some("h".to_owned());
            ApiError { error: "e".to_owned(), hint, broken, refusal: None }
        };
        assert_eq!(Problem::from(api(false)), Problem::request("e").hint("h"));
        assert_eq!(Problem::from(api(true)), Problem::broken("e").hint("h"));
    }

    #[test]
    fn a_closed_pipe_is_success_and_says_nothing() {
        let error = output_error(io::ErrorKind::BrokenPipe.into()).context("listing");
        assert_eq!(explain(&error), (Status::DONE, None));
    }
}
