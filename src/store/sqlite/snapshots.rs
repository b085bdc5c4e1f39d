//! Snapshots of aggregates and of projections in memory.

use bytes::Bytes;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::super::columns::Columns;
use super::super::{Snapshot, StoreError};
use super::convert::to_sql;
use super::error::failed;
use crate::event::{StreamId, Version};

pub(super) async fn snapshot(
    connection: &mut SqliteConnection,
    stream: &StreamId,
) -> Result<Option<Snapshot>, StoreError> {
    let snapshot = |row: SqliteRow| -> Result<_, sqlx::Error> {
        let row = Columns::of("storied_snapshots", &row);
        Ok(Snapshot {
            version: Version::new(row.number(0)?),
            revision: u32::try_from(row.number(1)?).unwrap_or(u32::MAX),
            state: Bytes::from(row.get::<Vec<u8>>(2)?),
        })
    };
    sqlx::query("SELECT version, revision, state FROM storied_snapshots WHERE category = ? AND stream_id = ?")
        .bind(stream.category())
        .bind(stream.id())
        .fetch_optional(connection)
        .await
        .and_then(|row| row.map(snapshot).transpose())
        .map_err(|error| failed(&format!("reading the snapshot of {stream}"), error))
}

pub(super) async fn save_snapshot(
    connection: &mut SqliteConnection,
    stream: &StreamId,
    snapshot: &Snapshot,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO storied_snapshots (category, stream_id, version, revision, state) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (category, stream_id) DO UPDATE SET version = ?3, revision = ?4, state = ?5
         WHERE revision <> ?4 OR version <= ?3",
    )
    .bind(stream.category())
    .bind(stream.id())
    .bind(to_sql(snapshot.version.get()))
    .bind(snapshot.revision)
    .bind(&*snapshot.state)
    .execute(connection)
    .await
    .map_err(|error| failed(&format!("saving the snapshot of {stream}"), error))?;
    Ok(())
}
