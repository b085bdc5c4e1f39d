use std::error::Error;
use std::fmt;
use std::time::Duration;

use ractor::RpcReplyPort;

use crate::event::{Position, RecordedEvent};
use crate::outage::is_store_outage;
use crate::store::StoreError;
use crate::transient::Transient;

/// A control message to a projection.
pub(super) enum Control {
    Pause(Reply),
    Resume(Reply),
    /// The projection was paused or resumed through another partition of this node.
    Paused(bool, Reply),
    Reset(Reply),
    /// The projection was reset through another partition of this node.
    BeginAnew(Reply),
    Trigger(Reply),
    /// Builds the next version beside the live one.
    Rebuild(Reply),
    /// Cancels the rebuild.
    CancelRebuild(Reply),
    RetryParked(Box<RecordedEvent>, Reply),
}

pub(super) type Reply = RpcReplyPort<Result<(), ControlError>>;

/// Error of a control call to a projection.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no parked event at this position.
    NotParked {
        /// Name of the projection.
        name: String,
        /// Requested position.
        position: Position,
    },
    /// The projection's own code failed; nothing was changed.
    Refused {
        /// Name of the projection.
        name: String,
        /// Error of the projection's code.
        reason: String,
    },
    /// The projection has a single version, or its read model cannot be cut over in a transaction.
    NotRebuildable {
        /// Name of the projection.
        name: String,
        /// Cause, and the remedy.
        reason: &'static str,
    },
    /// Too many control calls to the projection are in flight.
    Overloaded {
        /// Name of the projection.
        name: String,
    },
    /// The projection did not answer in time; the call may still take effect.
    TimedOut {
        /// Name of the projection.
        name: String,
        /// Duration of the wait.
        waited: Duration,
    },
    /// The projection stopped or panicked before it answered.
    Stopped {
        /// Name of the projection.
        name: String,
    },
    /// Another change of the projection was in progress, on this node or another one. Retry later.
    Conflict {
        /// Name of the projection.
        name: String,
        /// The failed operation and its cause.
        reason: String,
    },
    /// The projection cannot act now. Retry later, unless its status names an error to correct.
    ///
    /// Its own code reports an outage, for example as
    /// [`TargetUnavailable`](super::TargetUnavailable), it has not started yet, or it failed before
    /// its read model was prepared.
    Unavailable {
        /// Name of the projection.
        name: String,
        /// Cause.
        reason: String,
    },
    /// The store or the read model failed.
    Store(StoreError),
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotParked { name, position } => {
                write!(f, "projection {name} has no parked event at position {position}")
            }
            Self::Refused { name, reason } => write!(f, "projection {name} refused: {reason}"),
            Self::NotRebuildable { name, reason } => {
                write!(f, "projection {name} cannot be rebuilt: {reason}")
            }
            Self::Overloaded { name } => write!(
                f,
                "control call to projection {name} failed: too many calls are in flight; retry later"
            ),
            Self::TimedOut { name, waited } => write!(
                f,
                "control call to projection {name} timed out: no answer within {waited:?}; it may still take effect"
            ),
            Self::Stopped { name } => write!(
                f,
                "control call to projection {name} failed: the projection stopped before it answered"
            ),
            Self::Conflict { name, reason } => {
                write!(f, "conflict on projection {name}: {reason}; retry later")
            }
            Self::Unavailable { name, reason } => write!(f, "projection {name} is unavailable: {reason}"),
            Self::Store(error) => error.fmt(f),
        }
    }
}

impl Error for ControlError {
    /// Returns the cause of the store's error.
    ///
    /// A conflict and an unavailability return `Transient`, for code that does not know this type.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Conflict { .. } | Self::Unavailable { .. } => Some(&Transient),
            Self::Store(error) => error.source(),
            _ => None,
        }
    }
}

impl From<StoreError> for ControlError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl ControlError {
    /// Returns whether the same call may succeed later without an operator's help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => is_store_outage(error),
            Self::Overloaded { .. }
            | Self::TimedOut { .. }
            | Self::Stopped { .. }
            | Self::Conflict { .. }
            | Self::Unavailable { .. } => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outage::is_outage;

    #[test]
    fn a_conflict_and_an_unavailability_are_transient() {
        let (name, reason) = ("x".to_owned(), "test".to_owned());
        let errors = [
            (ControlError::Conflict { name: name.clone(), reason: reason.clone() }, true),
            (ControlError::Unavailable { name: name.clone(), reason: reason.clone() }, true),
            (StoreError::Unavailable { reason: reason.clone(), source: None }.into(), true),
            (ControlError::Refused { name, reason }, false),
        ];
        for (error, transient) in errors {
            assert_eq!((error.is_transient(), is_outage(&error)), (transient, transient), "{error}");
        }
    }
}
