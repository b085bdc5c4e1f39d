use std::time::Duration;

use ractor::RpcReplyPort;

use crate::event::{Position, RecordedEvent};
use crate::outage::is_store_outage;
use crate::store::StoreError;

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
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no parked event at this position.
    #[error("projection {name} has no parked event at position {position}")]
    NotParked {
        /// Name of the projection.
        name: String,
        /// Requested position.
        position: Position,
    },
    /// The projection's own code failed; nothing was changed.
    #[error("projection {name} refused: {reason}")]
    Refused {
        /// Name of the projection.
        name: String,
        /// Error of the projection's code.
        reason: String,
    },
    /// The projection has a single version, or its read model cannot be cut over in a transaction.
    #[error("projection {name} cannot be rebuilt: {reason}")]
    NotRebuildable {
        /// Name of the projection.
        name: String,
        /// Cause, and the remedy.
        reason: &'static str,
    },
    /// Too many control calls to the projection are in flight.
    #[error("control call to projection {name} failed: too many calls are in flight; retry later")]
    Overloaded {
        /// Name of the projection.
        name: String,
    },
    /// The projection did not answer in time; the call may still take effect.
    #[error(
        "control call to projection {name} timed out: no answer within {waited:?}; it may still take effect"
    )]
    TimedOut {
        /// Name of the projection.
        name: String,
        /// Duration of the wait.
        waited: Duration,
    },
    /// The projection stopped or panicked before it answered.
    #[error("control call to projection {name} failed: the projection stopped before it answered")]
    Stopped {
        /// Name of the projection.
        name: String,
    },
    /// The store or the read model failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ControlError {
    /// Returns whether the same call may succeed later without an operator's help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => is_store_outage(error),
            Self::Overloaded { .. } | Self::TimedOut { .. } | Self::Stopped { .. } => true,
            _ => false,
        }
    }
}
