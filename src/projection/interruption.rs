//! The reason why the task of a projection cannot continue now.

use crate::store::{CheckpointError, StoreError};

/// The reason why a task cannot continue now.
#[derive(Debug, thiserror::Error)]
pub(super) enum Interruption {
    /// The store or the read model failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another owner has moved the checkpoint; this one is fenced.
    #[error("{reason}")]
    Fenced { reason: String },
    /// The task waits, or a step of it failed for another reason; a later attempt may succeed.
    #[error("{reason}")]
    Later { reason: String },
}

impl From<CheckpointError> for Interruption {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Store(error) => Self::Store(error),
            moved => Self::Fenced { reason: moved.to_string() },
        }
    }
}
