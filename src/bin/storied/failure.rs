//! Why a command fails, and with which exit code.

use std::io;
use std::process::ExitCode;

use storied::StoreError;
use storied::bus::BusError;

use crate::output;
use crate::redact;

/// The exit code for a wrong command line.
pub(crate) const USAGE: u8 = 2;

/// Why a command fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// What was looked at is not as it should be.
    #[error("{0}")]
    Problem(String),
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// Something cannot be reached; later it may be.
    #[error("{0}")]
    Unavailable(String),
    /// Somebody has to do something first.
    #[error("{0}")]
    Refused(String),
    /// A request stands, and no node has taken it.
    #[error("{0}")]
    Pending(String),
    /// Standard output cannot be written.
    #[error("standard output cannot be written: {0}")]
    Output(String),
    /// Standard output is a pipe that its reader has closed.
    #[error("standard output is closed")]
    Closed,
}

impl Failure {
    /// Says what it is about.
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
            // As of a program that a closed pipe ends.
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

    /// Says it, without secrets.
    pub(crate) fn tell(&self, json: bool) -> ExitCode {
        let text = redact::urls(&self.to_string());
        if !matches!(self, Self::Closed) {
            if json {
                let error = serde_json::json!({ "error": { "kind": self.kind(), "message": text } });
                output::complain(&format!("{error}\n"));
            } else {
                output::complain(&format!("error: {}\n", output::clean(&text)));
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

impl From<BusError> for Failure {
    fn from(error: BusError) -> Self {
        let text = redact::error(&error);
        match error {
            BusError::Incompatible { .. } => Self::Refused(text),
            _ => Self::Unavailable(text),
        }
    }
}

/// An error of standard output, which is all that commands write.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Output(error.to_string()),
        }
    }
}
