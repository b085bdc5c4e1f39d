//! The causes of a failed command, and their exit codes.

use std::io;
use std::process::ExitCode;

use storied::StoreError;
use storied::bus::BusError;
use storied::process::RequestError;
use storied::schedule::ScheduleError;

use crate::redact;
use crate::terminal;

/// Exit code of a wrong command line.
pub(crate) const USAGE: u8 = 2;

/// The cause of a failed command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The inspected data has a problem.
    #[error("{0}")]
    Problem(String),
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// A service is unreachable; a retry may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// The command needs another action first.
    #[error("{0}")]
    Refused(String),
    /// A request stands, and no node has taken it.
    #[error("{0}")]
    Pending(String),
    /// Writing to standard output failed.
    #[error("writing to standard output failed: {0}")]
    Output(String),
    /// Standard output is a pipe that its reader has closed.
    #[error("standard output is closed")]
    Closed,
}

impl Failure {
    /// Puts the subject before the text.
    pub(crate) fn about(self, what: &str) -> Self {
        let with = |text| format!("{what}: {text}");
        match self {
            Self::Problem(text) => Self::Problem(with(text)),
            Self::Usage(text) => Self::Usage(with(text)),
            Self::Unavailable(text) => Self::Unavailable(with(text)),
            Self::Refused(text) => Self::Refused(with(text)),
            other => other,
        }
    }

    fn code(&self) -> u8 {
        match self {
            Self::Problem(_) => 1,
            Self::Usage(_) => USAGE,
            Self::Unavailable(_) => 3,
            Self::Refused(_) => 4,
            Self::Pending(_) => 5,
            Self::Output(_) => 6,
            // A program that a closed pipe ends does not fail.
            Self::Closed => 0,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Problem(_) => "problem",
            Self::Usage(_) => "usage",
            Self::Unavailable(_) => "unavailable",
            Self::Refused(_) => "refused",
            Self::Pending(_) => "pending",
            Self::Output(_) => "output",
            Self::Closed => "closed",
        }
    }

    /// Prints the failure without secrets, and returns its exit code.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        let text = redact::urls(&self.to_string());
        if !matches!(self, Self::Closed) {
            if json {
                let error = serde_json::json!({ "error": { "kind": self.kind(), "message": text } });
                terminal::print_error(&format!("{error}\n"));
            } else {
                terminal::print_error(&format!("error: {}\n", terminal::clean(&text)));
            }
        }
        ExitCode::from(self.code())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let text = redact::error(&error);
        match error {
            StoreError::Unavailable { .. } | StoreError::OutcomeUnknown { .. } => Self::Unavailable(text),
            StoreError::Invalid { .. } => Self::Usage(text),
            StoreError::Corrupt { .. } => Self::Problem(text),
            _ => Self::Refused(text),
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Store(error) => error.into(),
            other => Self::Refused(redact::error(&other)),
        }
    }
}

impl From<ScheduleError> for Failure {
    fn from(error: ScheduleError) -> Self {
        match error {
            ScheduleError::Store(error) => error.into(),
            other => Self::Refused(redact::error(&other)),
        }
    }
}

impl From<BusError> for Failure {
    fn from(error: BusError) -> Self {
        let text = redact::error(&error);
        match error {
            BusError::Incompatible { .. } => Self::Refused(text),
            _ => Self::Unavailable(text),
        }
    }
}

/// Converts an error of standard output, the only destination of commands.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Output(error.to_string()),
        }
    }
}
