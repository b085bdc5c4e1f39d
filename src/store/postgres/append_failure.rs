//! The reason why an append has no outcome yet.

use super::super::StoreError;
use super::connection::Backend;
use super::error::{ErrorClass, class_of, failed, is_position_taken, is_version_race, set_back};

/// Operation named in errors.
pub(super) const DOING: &str = "appending events";

/// The reason why a call returned no outcomes.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was written: the content of the call or the state of the server does not allow it.
    Failed(StoreError),
    /// Nothing was written; the server asks for a retry.
    Retry(StoreError),
    /// Nothing was written: the connection broke before the commit.
    NotSent(StoreError),
    /// Nothing was written: what this process has seen is not proven on this server process.
    OtherServer,
    /// Nothing was written: another writer was faster.
    VersionRace,
    /// The events may have been written.
    Unknown(StoreError, CommitHandle),
}

impl Failure {
    /// Classifies a definite answer of the server.
    pub(super) fn answered(error: sqlx::Error) -> Self {
        if is_version_race(&error) {
            return Failure::VersionRace;
        }
        if is_position_taken(&error) {
            return Failure::Failed(set_back(DOING, &error.to_string()));
        }
        let class = class_of(&error);
        let error = failed(DOING, error);
        match (class, error) {
            (ErrorClass::Retry, error) => Failure::Retry(error),
            // Also a code of the application's own: the writer isolates what is `Invalid`.
            (ErrorClass::Refused, error @ StoreError::Storage { .. }) => {
                Failure::Failed(StoreError::Invalid { reason: error.to_string() })
            }
            (ErrorClass::Refused | ErrorClass::Failed | ErrorClass::Unknown, error) => Failure::Failed(error),
        }
    }
}

/// The means to look up an append without an answer.
#[derive(Debug)]
pub(super) enum CommitHandle {
    /// The server process of the append, which serves no other client.
    Backend(Backend),
    /// The id of the transaction; its server process may serve other clients now.
    Transaction(String),
    /// The append is committed. Its wait for a standby was cancelled.
    Committed,
}
