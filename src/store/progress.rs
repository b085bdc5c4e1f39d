use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::error::StoreError;
use crate::event::{EventName, Position, RecordedEvent, StreamId, Version};

/// The progress of a reader of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checkpoint {
    /// Last applied position; all events up to it are applied.
    pub position: Position,
    /// Lease epoch of the write; an owner with a lower epoch is fenced.
    pub epoch: u64,
    /// Number that the reader stores with the position (the sequence of a log stream), else 0.
    pub mark: u64,
}

/// A checkpoint as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Name of the reader.
    pub name: String,
    /// Progress of the reader.
    pub checkpoint: Checkpoint,
    /// Id of the store that the position belongs to.
    pub store: Uuid,
    /// Time of the last write.
    pub updated_at: DateTime<Utc>,
    /// Number of events parked under the name.
    pub parked: u64,
}

/// The reason why a checkpoint was not saved.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Another owner moved the checkpoint; this owner is fenced and must stop.
    #[error(
        "saving the checkpoint of {name} failed: another owner has moved it (expected position {} in epoch {}, found position {} in epoch {})",
        expected.position, expected.epoch, found.position, found.epoch
    )]
    Stale {
        /// Name of the checkpoint.
        name: String,
        /// Checkpoint as this owner last saved it.
        expected: Checkpoint,
        /// Stored checkpoint.
        found: Checkpoint,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A poison event that a projection has parked after its attempts failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedEvent {
    /// Position in the log, from which the event itself is read.
    pub position: Position,
    /// Id of the event.
    pub event_id: Uuid,
    /// Stream of the event.
    pub stream: StreamId,
    /// Version of the event.
    pub version: Version,
    /// Name of the event.
    pub name: EventName,
    /// Last error.
    pub error: String,
    /// Number of attempts.
    pub attempts: u32,
    /// Time of parking.
    pub parked_at: DateTime<Utc>,
}

impl ParkedEvent {
    /// Parks `event` because of `error`.
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
