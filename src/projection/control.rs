use std::time::Duration;

use ractor::RpcReplyPort;

use crate::event::{Position, RecordedEvent};
use crate::outage::is_store_outage;
use crate::store::StoreError;

/// What a projection is told.
pub(super) enum Control {
    Pause(Reply),
    Resume(Reply),
    /// It was paused or resumed through another partition of this node.
    Paused(bool, Reply),
    Reset(Reply),
    /// It was reset through another partition of this node.
    BeginAnew(Reply),
    Trigger(Reply),
    /// Builds the next version beside the live one.
    Rebuild(Reply),
    /// Gives that up.
    CancelRebuild(Reply),
    RetryParked(Box<RecordedEvent>, Reply),
}

pub(super) type Reply = RpcReplyPort<Result<(), ControlError>>;

/// Why a projection did not do what it was told.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no such parked event.
    #[error("projection {name} has no parked event at position {position}")]
    NotParked {
        /// The projection.
        name: String,
        /// Where it was looked for.
        position: Position,
    },
    /// The projection's own code failed; nothing was changed.
    #[error("projection {name} refused: {reason}")]
    Refused {
        /// The projection.
        name: String,
        /// What it said.
        reason: String,
    },
    /// The projection writes to one place, or to one that cannot be switched in a transaction.
    #[error("projection {name} cannot be rebuilt beside the live one: {reason}")]
    NotRebuildable {
        /// The projection.
        name: String,
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// Too much is asked of the projection at the same time.
    #[error("too many control calls to projection {name} are under way; try again later")]
    Overloaded {
        /// The projection.
        name: String,
    },
    /// The projection did not come to it in time; it may still do so.
    #[error("projection {name} has not answered within {waited:?}; what was asked may still happen")]
    TimedOut {
        /// The projection.
        name: String,
        /// How long was waited.
        waited: Duration,
    },
    /// It was stopped, or panicked meanwhile.
    #[error("projection {name} ended before it answered")]
    Stopped {
        /// The projection.
        name: String,
    },
    /// The store or the read model failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ControlError {
    /// Whether the same call may succeed later without an operator's help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => is_store_outage(error),
            Self::Overloaded { .. } | Self::TimedOut { .. } | Self::Stopped { .. } => true,
            _ => false,
        }
    }
}
