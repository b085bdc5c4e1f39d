//! The reasons why publishing is interrupted.

use uuid::Uuid;

use crate::bus::BusError;
use crate::event::Position;
use crate::store::{PublisherCheckpoint, StoreError};

/// The reason why publishing was interrupted.
#[derive(Debug, thiserror::Error)]
pub(super) enum Interruption {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "saving the checkpoint of the publisher failed: another publisher has moved it (expected \
         position {} in epoch {})",
        expected.position, expected.epoch
    )]
    Fenced { expected: PublisherCheckpoint },
    #[error(
        "the log stream ends at position {log_stream}, but the log at {log}: the store was restored \
         from an older state, and new events would contradict events that others have read; give \
         the restored store its own log stream (another namespace, or delete the old stream); if \
         the messages from {first} on were forged, delete them from the stream"
    )]
    Ahead { log_stream: Position, log: Position, first: u64 },
    #[error(
        "the last event of the log stream is {log_stream} at position {position}, but the log has {} \
         there: the store was restored from an older state and has new events since, or it is a \
         copy; give it its own log stream (another namespace, or delete the old stream); if the \
         messages from {first} on were forged, delete them from the stream",
        log.map_or_else(|| "none".to_owned(), |id| id.to_string())
    )]
    Diverged { position: Position, log_stream: Uuid, log: Option<Uuid>, first: u64 },
    #[error(
        "the log stream continues at position {position}: the high-water mark of this process is \
         lower; the publisher retries"
    )]
    Unstable { position: Position },
    #[error("the lease \"publisher\" was lost, or was not renewed in time")]
    LeaseLost,
}

impl Interruption {
    /// The kind of interruption, in one word.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Bus(error) => error.kind(),
            Self::Store(error) => error.kind(),
            Self::Fenced { .. } => "checkpoint",
            Self::Ahead { .. } => "ahead",
            Self::Diverged { .. } => "diverged",
            Self::Unstable { .. } => "unstable",
            Self::LeaseLost => "lease_lost",
        }
    }
}
