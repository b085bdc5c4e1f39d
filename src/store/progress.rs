//! What a store keeps of the projections: checkpoints, versions, dead letters and requests.

use std::fmt;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::error::StoreError;
use super::request::{Request, StoredRequest};
use crate::event::{EventName, Position, RecordedEvent, StreamId, Version};

/// Key of a checkpoint: a partition of a version of a projection's read model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointKey {
    /// Name of the projection.
    pub projection: String,
    /// Version of the read model: 0 before the first rebuild.
    pub version: u64,
    /// Index of the partition; 0 if the projection is not partitioned.
    pub partition: u16,
}

impl CheckpointKey {
    /// Returns the key of the first version of a projection that is not partitioned.
    pub fn new(projection: impl Into<String>) -> Self {
        Self { projection: projection.into(), version: 0, partition: 0 }
    }
}

impl fmt::Display for CheckpointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { projection, version, partition } = self;
        write!(f, "projection {projection} (version {version}, partition {partition})")
    }
}

/// The progress of a projection in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checkpoint {
    /// Last applied position; all events up to it are applied.
    pub position: Position,
    /// Lease epoch of the write; an owner with a lower epoch is fenced.
    pub epoch: u64,
    /// Number of resets and cut-overs; an owner that knows an earlier one is fenced.
    pub generation: u64,
    /// Position that was delivered before the last reset, for read models without rollback.
    pub delivered: Position,
}

impl Checkpoint {
    /// I7: returns the checkpoint in the next generation.
    ///
    /// Writers that know only `self` are fenced, also at the start of the log.
    pub(crate) fn next_generation(self) -> Self {
        Self { generation: self.generation + 1, ..self }
    }
}

/// The layout, the versions and the start position of a projection's read model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoredProjection {
    /// Number of partitions; 0 if the projection is not partitioned.
    pub partitions: u16,
    /// Version that readers use: 0 before the first rebuild.
    pub live_version: u64,
    /// Version that a rebuild writes to, if one is in progress.
    pub building_version: Option<u64>,
    /// Last position that is never applied; `None` until it is known.
    pub start_position: Option<Position>,
    /// Number of writes of this row, for compare and set. 0: never written.
    pub revision: u64,
}

/// All of a projection's progress.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredProgress {
    /// Layout, versions and start position.
    pub projection: StoredProjection,
    /// Checkpoints of all versions.
    pub checkpoints: Vec<(CheckpointKey, Checkpoint)>,
}

impl StoredProgress {
    /// Returns a checkpoint; the default one if none was saved.
    pub(crate) fn checkpoint(&self, key: &CheckpointKey) -> Checkpoint {
        self.checkpoints.iter().find(|(found, _)| found == key).map(|(_, found)| *found).unwrap_or_default()
    }
}

/// A write to the progress of a projection. Several are made in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgressWrite {
    /// Moves a checkpoint from exactly `from` to `to`.
    Checkpoint {
        /// The checkpoint.
        key: CheckpointKey,
        /// Its expected value.
        from: Checkpoint,
        /// Its new value, in the same epoch or a later one.
        to: Checkpoint,
    },
    /// Changes the layout, the versions or the start position from exactly `from`.
    ///
    /// The store counts the revision.
    Projection {
        /// Name of the projection.
        name: String,
        /// Expected value.
        from: StoredProjection,
        /// New value.
        to: StoredProjection,
    },
    /// Parks an event; replaces an earlier record of the same event.
    Park {
        /// Checkpoint that passes over the event.
        key: CheckpointKey,
        /// The event.
        event: ParkedEvent,
    },
    /// Deletes a parked event; fails if there is none.
    Unpark {
        /// Checkpoint that passed over the event.
        key: CheckpointKey,
        /// Position of the event.
        position: Position,
    },
    /// Deletes all parked events of a checkpoint.
    UnparkAll {
        /// The checkpoint.
        key: CheckpointKey,
    },
    /// Stores a request; replaces an equal one.
    AddRequest {
        /// Name of the projection.
        projection: String,
        /// The request.
        request: StoredRequest,
    },
    /// Deletes a request; fails if it does not exist.
    RemoveRequest {
        /// Name of the projection.
        projection: String,
        /// The request.
        request: Request,
        /// Id of the request; any if `None`.
        id: Option<Uuid>,
    },
    /// Records the refusal of a request; fails if the request does not exist.
    RefuseRequest {
        /// Name of the projection.
        projection: String,
        /// The request.
        request: Request,
        /// Id of the request.
        id: Uuid,
        /// Reason of the refusal.
        reason: String,
    },
}

/// A checkpoint as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Key of the checkpoint.
    pub key: CheckpointKey,
    /// Progress of the projection.
    pub checkpoint: Checkpoint,
    /// Id of the store that the position belongs to.
    pub store: Uuid,
    /// Time of the last write.
    pub updated_at: DateTime<Utc>,
    /// Number of parked events.
    pub parked: u64,
}

/// The reason why progress was not written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Another owner moved the checkpoint; this owner is fenced and must stop.
    #[error(
        "saving the checkpoint of {key} failed: another owner has moved it (expected position {} in epoch {}, found position {} in epoch {})",
        expected.position, expected.epoch, found.position, found.epoch
    )]
    Stale {
        /// Key of the checkpoint.
        key: CheckpointKey,
        /// Checkpoint as this owner last saved it.
        expected: Checkpoint,
        /// Stored checkpoint.
        found: Checkpoint,
    },
    /// The layout, the versions or the start position changed meanwhile.
    #[error("changing projection {projection} failed: another node has changed it meanwhile")]
    Changed {
        /// Name of the projection.
        projection: String,
    },
    /// There is no such parked event or request.
    #[error("changing projection {projection} failed: it has no {what}")]
    Missing {
        /// Name of the projection.
        projection: String,
        /// What does not exist.
        what: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CheckpointError {
    pub(crate) fn not_parked(key: &CheckpointKey, position: Position) -> Self {
        let what = format!("parked event at position {position}");
        Self::Missing { projection: key.projection.clone(), what }
    }

    pub(crate) fn not_requested(projection: &str, request: Request) -> Self {
        Self::Missing { projection: projection.to_owned(), what: format!("request for a {request}") }
    }
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
