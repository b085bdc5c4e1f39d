use std::error::Error;
use std::time::Duration;

use crate::event::Position;
use crate::outage::is_store_outage;
use crate::store::StoreError;

/// Error of [`Projection::apply`](super::Projection::apply).
///
/// Boxed, so that `?` works on every error.
pub type ApplyError = Box<dyn Error + Send + Sync>;

/// Error of `apply` if the target of its writes is unavailable.
///
/// The error does not count against the event: the projection retries without a limit, regardless
/// of [`max_attempts`](super::ProjectionOptions::max_attempts). It works on every read model, also as the
/// [source](Error::source) of another error. `#[error(transparent)]` hides it, because that
/// forwards only the inner source.
///
/// ```
/// # use storied::projection::{ApplyError, TargetUnavailable};
/// # fn send() -> std::io::Result<()> { Ok(()) }
/// fn index() -> Result<(), ApplyError> {
///     Ok(send().map_err(TargetUnavailable::new)?)
/// }
/// # index().unwrap();
/// ```
#[derive(Debug, thiserror::Error)]
#[error("the write target of the projection is unavailable: {0}")]
pub struct TargetUnavailable(#[source] ApplyError);

impl TargetUnavailable {
    /// Creates the error with its cause.
    pub fn new(source: impl Into<ApplyError>) -> Self {
        Self(source.into())
    }
}

/// Error of the default [`Projection::reset`](super::Projection::reset): nothing was emptied.
#[derive(Debug, thiserror::Error)]
#[error("this projection does not implement reset")]
pub(super) struct NoReset;

/// Error of a wait for a projection.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The projection may still reach the position.
    ///
    /// Says nothing about the command that wrote the event.
    #[error(
        "projection {name} did not reach position {wanted} within {waited:?}; it is at position {reached}"
    )]
    TimedOut {
        /// Name of the projection.
        name: String,
        /// Position of the wait.
        wanted: Position,
        /// Position of the projection.
        reached: Position,
        /// Duration of the wait.
        waited: Duration,
    },
    /// The projection is paused, and was not resumed during the wait.
    ///
    /// Says nothing about the command that wrote the event.
    #[error(
        "projection {name} is paused at position {reached} and did not reach position {wanted} within {waited:?}; resume it"
    )]
    Paused {
        /// Name of the projection.
        name: String,
        /// Position of the wait.
        wanted: Position,
        /// Position of the projection.
        reached: Position,
        /// Duration of the wait.
        waited: Duration,
    },
    /// The projection waits for a [trigger](super::ProjectionHandle::trigger), and none came in
    /// time.
    ///
    /// See [`Schedule::Manual`](super::Schedule::Manual).
    #[error(
        "projection {name} waits for a trigger at position {reached} and did not reach position {wanted} within {waited:?}; call trigger"
    )]
    NotTriggered {
        /// Name of the projection.
        name: String,
        /// Position of the wait.
        wanted: Position,
        /// Position of the projection.
        reached: Position,
        /// Duration of the wait.
        waited: Duration,
    },
    /// The projection stopped before the position, on this node, until an operator acts.
    #[error("projection {name} failed at position {reached}: {error}")]
    Failed {
        /// Name of the projection.
        name: String,
        /// Position of the projection.
        reached: Position,
        /// Error of the projection.
        error: String,
    },
    /// No runtime of this process has started the index.
    #[error(
        "in-memory index {name} did not start within {waited:?}; register it with Runtime::builder().in_memory_index(…) and start the runtime"
    )]
    NotStarted {
        /// Name of the index.
        name: String,
        /// Duration of the wait.
        waited: Duration,
    },
    /// The projection was stopped, together with its runtime.
    #[error("projection {name} has stopped")]
    Stopped {
        /// Name of the projection.
        name: String,
    },
    /// The end of the log could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl WaitError {
    /// Returns whether the same wait may succeed later without an operator's help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => is_store_outage(error),
            Self::TimedOut { .. }
            | Self::Paused { .. }
            | Self::NotTriggered { .. }
            | Self::NotStarted { .. }
            | Self::Stopped { .. } => true,
            Self::Failed { .. } => false,
        }
    }
}

/// The error of a batch whose transaction was not open any more at its end.
///
/// It counts as a refusal of the commit, so that the event is found.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(super) fn transaction_ended(name: &str) -> crate::store::StoreError {
    let reason = format!(
        "saving the checkpoint of {name} failed: the transaction has ended within the projection; in \
         apply, use neither COMMIT nor ROLLBACK and return every error of the database; if apply has \
         committed writes, they remain: reset the projection"
    );
    crate::store::StoreError::Invalid { reason }
}
