//! Decodes rows of the progress of projections.

use uuid::Uuid;

use super::{TypedRow, undecodable};
use crate::event::{EventName, Position, StreamId, Version};
use crate::store::progress::{Checkpoint, CheckpointKey, ParkedEvent, StoredProjection};
use crate::store::request::{Request, StoredRequest};

pub(super) fn projection(row: &impl TypedRow) -> Result<(String, StoredProjection, Uuid), sqlx::Error> {
    const TABLE: &str = "projections";
    let found = StoredProjection {
        partitions: row.partition(TABLE, 1)?,
        live_version: row.number(TABLE, 2)?,
        building_version: row.optional_number(TABLE, 3)?,
        start_position: row.optional_number(TABLE, 4)?.map(Position::new),
        revision: row.number(TABLE, 5)?,
    };
    Ok((row.text(TABLE, 0)?, found, row.id(TABLE, 6)?))
}

pub(super) fn checkpoint(row: &impl TypedRow) -> Result<(CheckpointKey, Checkpoint, Uuid), sqlx::Error> {
    const TABLE: &str = "checkpoints";
    let key = CheckpointKey {
        projection: row.text(TABLE, 0)?,
        version: row.number(TABLE, 1)?,
        partition: row.partition(TABLE, 2)?,
    };
    let checkpoint = Checkpoint {
        position: Position::new(row.number(TABLE, 3)?),
        epoch: row.number(TABLE, 4)?,
        generation: row.number(TABLE, 5)?,
        delivered: Position::new(row.number(TABLE, 6)?),
    };
    Ok((key, checkpoint, row.id(TABLE, 7)?))
}

pub(super) fn parked_event(row: &impl TypedRow) -> Result<ParkedEvent, sqlx::Error> {
    const TABLE: &str = "parked";
    Ok(ParkedEvent {
        position: Position::new(row.number(TABLE, 0)?),
        event_id: row.id(TABLE, 1)?,
        stream: StreamId::new(row.text(TABLE, 2)?, row.text(TABLE, 3)?).map_err(undecodable)?,
        version: Version::new(row.number(TABLE, 4)?),
        name: EventName::new(row.text(TABLE, 5)?).map_err(undecodable)?,
        error: row.text(TABLE, 6)?,
        attempts: u32::try_from(row.number(TABLE, 7)?).unwrap_or(u32::MAX),
        parked_at: row.time(TABLE, 8)?,
    })
}

pub(super) fn stored_request(row: &impl TypedRow) -> Result<StoredRequest, sqlx::Error> {
    const TABLE: &str = "requests";
    let (kind, position) = (row.text(TABLE, 0)?, Position::new(row.number(TABLE, 1)?));
    Ok(StoredRequest {
        request: Request::of(&kind, position)
            .ok_or_else(|| undecodable(format!("{TABLE}.kind: unknown kind {kind:?}")))?,
        id: row.id(TABLE, 2)?,
        requested_at: row.time(TABLE, 3)?,
        refused_reason: row.optional_text(TABLE, 4)?,
    })
}
