use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::error::StoreError;
use crate::event::{EventName, Position, RecordedEvent, StreamId, Version};

/// How far a reader of the log has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checkpoint {
    /// Everything up to here is applied.
    pub position: Position,
    /// The lease epoch under which it was written; an owner with a lower one is refused.
    pub epoch: u64,
    /// A number of the reader's own that belongs to the position (the sequence of a mirror), else 0.
    pub mark: u64,
}

/// A checkpoint as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Whose it is.
    pub name: String,
    /// How far that has got.
    pub checkpoint: Checkpoint,
    /// In the log of the store with this id.
    pub store: Uuid,
    /// When it was last written.
    pub updated_at: DateTime<Utc>,
    /// How many events are put aside under its name.
    pub parked: u64,
}

/// Why a checkpoint was not moved.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Somebody else moved it: another owner is at work and this one must stop.
    #[error(
        "the checkpoint of {name} is not where this owner left it (expected position {} in epoch {}, found position {} in epoch {}): another owner has taken over",
        expected.position, expected.epoch, found.position, found.epoch
    )]
    Stale {
        /// Whose checkpoint.
        name: String,
        /// Where this owner left it.
        expected: Checkpoint,
        /// Where it is.
        found: Checkpoint,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An event that a projection could not apply and has put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedEvent {
    /// Where it is in the log; the event itself is read from there.
    pub position: Position,
    /// Its id.
    pub event_id: Uuid,
    /// Its stream.
    pub stream: StreamId,
    /// Its version.
    pub version: Version,
    /// Its name.
    pub name: EventName,
    /// The last error.
    pub error: String,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was parked.
    pub parked_at: DateTime<Utc>,
}

impl ParkedEvent {
    /// Puts `event` aside because of `error`.
    pub fn new(event: &RecordedEvent, error: String, attempts: u32) -> Self {
        Self {
            position: event.position,
            event_id: event.id,
            stream: event.stream.clone(),
            version: event.version,
            name: event.name.clone(),
            error,
            attempts,
            parked_at: Utc::now(),
        }
    }
}
