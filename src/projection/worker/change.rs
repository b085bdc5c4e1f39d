//! A change that affects all tasks of a projection: its kinds, limits and errors.

use std::time::Duration;

use super::context::TaskConfig;
use super::user_code::is_outage;
use crate::projection::interruption::Interruption;
use crate::projection::{ApplyError, ControlError};
use crate::store::{CheckpointError, StoreError};

/// Maximum time for which one node may hold up all others.
pub(super) const ORDER: Duration = Duration::from_secs(10);

/// A transaction that affects all tasks of the projection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Reset,
    BeginRebuild,
    EndRebuild,
    DropVersion,
}

/// Converts an error of the user's code: an outage, or a refusal.
pub(super) fn blame(context: &TaskConfig, error: &ApplyError) -> ControlError {
    let (name, reason) = (context.name.clone(), error.to_string());
    match is_outage(error) {
        true => ControlError::Unavailable { name, reason },
        false => ControlError::Refused { name, reason },
    }
}

/// Returns the error of a change that found other versions than it began with.
pub(super) fn versions_changed(context: &TaskConfig, doing: &str) -> ControlError {
    let reason = format!("{doing} failed: the versions have changed");
    ControlError::Conflict { name: context.name.clone(), reason }
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

/// Returns whether the next of the attempts may succeed: after a conflict or an outage.
pub(super) fn is_momentary(error: &ControlError) -> bool {
    matches!(
        error,
        ControlError::Conflict { .. }
            | ControlError::Unavailable { .. }
            | ControlError::Store(StoreError::Unavailable { .. })
    )
}
