use std::error::Error;
use std::time::Duration;

use crate::event::Position;
use crate::outage::is_store_outage;
use crate::store::StoreError;

/// What a failing [`Projection::apply`](super::Projection::apply) says; boxed, so that `?` works on every error.
pub type ApplyError = Box<dyn Error + Send + Sync>;

/// What `apply` says when what it writes to cannot be reached: no event is to blame, and the projection tries again for as
/// long as it takes, whatever [`attempts`](super::ProjectionOptions::attempts) say. On every read model, and also as the
/// [source](Error::source) of another error (which `#[error(transparent)]` hides: that hands on only what is below).
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
#[error("what the projection writes to is unavailable: {0}")]
pub struct TargetUnavailable(#[source] ApplyError);

impl TargetUnavailable {
    /// Because of this.
    pub fn new(source: impl Into<ApplyError>) -> Self {
        Self(source.into())
    }
}

/// What [`Projection::reset`](super::Projection::reset) says where there is none: for sure, nothing was emptied.
#[derive(Debug, thiserror::Error)]
#[error("this projection does not implement reset")]
pub(super) struct NoReset;

/// Why a projection has not applied what somebody waits for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// It may still do so. This says nothing about the command that wrote the event.
    #[error("projection {name} has not come to position {wanted} within {waited:?}; it is at {reached}")]
    TimedOut {
        /// The projection.
        name: String,
        /// What was waited for.
        wanted: Position,
        /// How far it was.
        reached: Position,
        /// How long was waited.
        waited: Duration,
    },
    /// It is paused, and was not resumed within the time of the wait. This says nothing about the command that wrote the event.
    #[error(
        "projection {name} is paused at position {reached} and has not come to position {wanted} within {waited:?}; resume it"
    )]
    Paused {
        /// The projection.
        name: String,
        /// What was waited for.
        wanted: Position,
        /// How far it was.
        reached: Position,
        /// How long was waited.
        waited: Duration,
    },
    /// It waits for a [trigger](super::ProjectionHandle::trigger), and none came within the time of the wait: see
    /// [`Schedule::Manual`](super::Schedule::Manual).
    #[error(
        "projection {name} waits for a trigger at position {reached} and has not come to position {wanted} within {waited:?}; call trigger"
    )]
    NotTriggered {
        /// The projection.
        name: String,
        /// Position of the wait.
        wanted: Position,
        /// Position of the projection.
        reached: Position,
        /// Length of the wait.
        waited: Duration,
    },
    /// It stands still before it, on this node, until somebody acts.
    #[error("projection {name} failed at position {reached}: {error}")]
    Failed {
        /// The projection.
        name: String,
        /// How far it was.
        reached: Position,
        /// What went wrong.
        error: String,
    },
    /// No runtime of this process has started it.
    #[error(
        "lookup {name} did not start within {waited:?}; register it with Runtime::builder().lookup(…) and start the runtime"
    )]
    NotStarted {
        /// The lookup.
        name: String,
        /// How long the caller waited.
        waited: Duration,
    },
    /// It was stopped, and the runtime with it.
    #[error("projection {name} has ended")]
    Stopped {
        /// The projection.
        name: String,
    },
    /// The end of the log could not be found out.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl WaitError {
    /// Whether the same wait may succeed later without an operator's help.
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
