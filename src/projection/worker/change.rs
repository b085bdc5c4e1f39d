//! A change that affects all tasks of a projection: its kinds, limits and errors.

use std::time::Duration;

use super::context::TaskConfig;
use super::user_code::is_outage;
use crate::projection::{ApplyError, ControlError, ReadModel};
use crate::store::{Checkpoint, CheckpointError, StoreError};

/// Maximum time for which one node may hold up all others.
pub(super) const ORDER: Duration = Duration::from_secs(10);

/// Additional time after which the database aborts the transaction.
///
/// Later than the local timeout, so that this process reports the cause.
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// Maximum number of attempts while other nodes move the same checkpoints.
pub(super) const ATTEMPTS: u32 = 20;

/// A transaction that affects all tasks of the projection.
///
/// It takes effect only if the operator request `requested`, if any, still exists.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change<'r> {
    Empty {
        requested: Option<&'r str>,
    },
    BeginRebuild {
        requested: Option<&'r str>,
    },
    EndRebuild {
        requested: Option<&'r str>,
    },
    /// Deletes the request `asked`, unless it was made again after its row had this checkpoint.
    Discard {
        asked: Option<(&'r str, Checkpoint)>,
    },
}

/// Converts an error of the user's code: transient, or refused.
pub(super) fn blame(context: &TaskConfig, read_model: &impl ReadModel, error: &ApplyError) -> ControlError {
    if is_outage(read_model, error) {
        return StoreError::not_now(error.to_string()).into();
    }
    ControlError::Refused { name: context.name.clone(), reason: error.to_string() }
}

/// Converts an error; a conflict on a checkpoint becomes a transient error, to be retried.
pub(super) fn refused(error: CheckpointError) -> ControlError {
    ControlError::Store(match error {
        CheckpointError::Stale { .. } => StoreError::Unavailable { reason: error.to_string(), source: None },
        CheckpointError::Store(error) => error,
    })
}
