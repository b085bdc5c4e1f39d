//! Snapshots of aggregates and of projections in memory.

use std::sync::Arc;

use bytes::Bytes;
use sqlx::postgres::PgRow;

use super::super::columns::Columns;
use super::super::{Snapshot, StoreError};
use super::convert::to_sql;
use super::error::failed;
use super::inner::PgInner;
use crate::event::{StreamId, Version};

pub(super) async fn snapshot(core: &Arc<PgInner>, stream: &StreamId) -> Result<Option<Snapshot>, StoreError> {
    let doing = format!("reading the snapshot of {stream}");
    let snapshot = |row: PgRow| -> Result<_, sqlx::Error> {
        let row = Columns::of("snapshots", &row);
        Ok(Snapshot {
            version: Version::new(row.number(0)?),
            revision: u32::try_from(row.number(1)?).unwrap_or(u32::MAX),
            state: Bytes::from(row.get::<Vec<u8>>(2)?),
        })
    };
    let mut session = core.connections.get(&doing).await?;
    let snapshot = sqlx::query(core.sql.snapshot.clone())
        .bind(stream.category())
        .bind(stream.id())
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .and_then(|row| row.map(snapshot).transpose())
        .map_err(|error| failed(&doing, error))?;
    session.finish(&doing).await?;
    Ok(snapshot)
}

pub(super) async fn save_snapshot(
    core: &Arc<PgInner>,
    stream: &StreamId,
    snapshot: &Snapshot,
) -> Result<(), StoreError> {
    let doing = format!("saving the snapshot of {stream}");
    let mut session = core.connections.get(&doing).await?;
    sqlx::query(core.sql.save_snapshot.clone())
        .bind(stream.category())
        .bind(stream.id())
        .bind(to_sql(snapshot.version.get()))
        .bind(i64::from(snapshot.revision))
        .bind(&*snapshot.state)
        .persistent(core.connections.persistent())
        .execute(&mut *session)
        .await
        .map_err(|error| failed(&doing, error))?;
    session.finish(&doing).await
}
