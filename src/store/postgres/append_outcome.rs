//! The outcome of an append, or the reason why it has none.

use super::super::StoreError;
use super::connection::Backend;
use super::error::{ErrorClass, class_of, failed, is_version_race};
use crate::event::{Position, Version};

/// Operation named in errors.
pub(super) const DOING: &str = "appending events";

/// The outcome of a unit.
#[derive(Debug)]
pub(super) enum AppendOutcome {
    /// The events are in the log; for each part, the version before them and their positions.
    Appended(Vec<(Version, Vec<Position>)>),
    /// The part with this index found another version.
    Conflict(usize, Version),
    /// Another writer was faster, but the expected versions may still hold.
    VersionRace,
    Failed(StoreError),
}

/// The reason why a call returned no outcome for its units.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was written: the server refuses the content of the call.
    Refused(StoreError),
    /// Nothing was written: the state of the server does not allow it.
    Failed(StoreError),
    /// Nothing was written; the server asks for a retry.
    Retry(StoreError),
    /// Nothing was written: the connection broke before the commit.
    NotSent(StoreError),
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
        let class = class_of(&error);
        let error = failed(DOING, error);
        match class {
            ErrorClass::Retry => Failure::Retry(error),
            ErrorClass::Refused => Failure::Refused(error),
            ErrorClass::Failed | ErrorClass::Unknown => Failure::Failed(error),
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
