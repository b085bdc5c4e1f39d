//! A change that affects all tasks of a projection: its kinds, limits and errors.

use std::time::Duration;

use super::context::TaskConfig;
use super::user_code::is_outage;
use crate::projection::interruption::Interruption;
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

/// Converts an error of the user's code: an outage, or a refusal.
pub(super) fn blame(context: &TaskConfig, read_model: &impl ReadModel, error: &ApplyError) -> ControlError {
    let (name, reason) = (context.name.clone(), error.to_string());
    match is_outage(read_model, error) {
        true => ControlError::Unavailable { name, reason },
        false => ControlError::Refused { name, reason },
    }
}

/// Returns the conversion of an error of a checkpoint; a conflict is retried.
pub(super) fn refused(context: &TaskConfig) -> impl Fn(CheckpointError) -> ControlError {
    let converted = interrupted(context);
    move |error| converted(error.into())
}

/// Returns the conversion of an interruption.
pub(super) fn interrupted(context: &TaskConfig) -> impl Fn(Interruption) -> ControlError {
    let name = &context.name;
    move |interruption| match interruption {
        Interruption::Store(error) => error.into(),
        Interruption::Fenced { reason } => ControlError::Conflict { name: name.clone(), reason },
        Interruption::Later { reason } => ControlError::Unavailable { name: name.clone(), reason },
    }
}

/// Returns whether the next of the [`ATTEMPTS`] may succeed: after a conflict or an outage.
pub(super) fn is_momentary(error: &ControlError) -> bool {
    matches!(
        error,
        ControlError::Conflict { .. }
            | ControlError::Unavailable { .. }
            | ControlError::Store(StoreError::Unavailable { .. })
    )
}
