//! Records of the outcomes of handled commands.

use std::time::Duration;

use bytes::Bytes;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::{CommandRecord, StoreError};
use super::convert::now;
use super::error::failed;

pub(super) async fn command(
    connection: &mut SqliteConnection,
    id: Uuid,
) -> Result<Option<CommandRecord>, StoreError> {
    let record = |row: SqliteRow| -> Result<_, sqlx::Error> {
        let row = Columns::of("storied_commands", &row);
        Ok(CommandRecord {
            id: row.get(0)?,
            name: row.get(1)?,
            fingerprint: row.get(2)?,
            outcome: Bytes::from(row.get::<Vec<u8>>(3)?),
            recorded_at: row.time(4)?,
        })
    };
    sqlx::query("SELECT id, name, fingerprint, outcome, recorded_at FROM storied_commands WHERE id = ?")
        .bind(id)
        .fetch_optional(connection)
        .await
        .and_then(|row| row.map(record).transpose())
        .map_err(|error| failed("reading a command record", error))
}

pub(super) async fn record_command(
    connection: &mut SqliteConnection,
    record: CommandRecord,
) -> Result<CommandRecord, StoreError> {
    const DOING: &str = "recording a command";
    sqlx::query(
        "INSERT OR IGNORE INTO storied_commands (id, name, fingerprint, outcome, recorded_at) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(record.id)
    .bind(&record.name)
    .bind(record.fingerprint)
    .bind(&*record.outcome)
    .bind(now())
    .execute(&mut *connection)
    .await
    .map_err(|error| failed(DOING, error))?;
    let recorded = command(connection, record.id).await?;
    recorded.ok_or_else(|| StoreError::Corrupt { reason: format!("{DOING}: the record is missing") })
}

pub(super) async fn forget_commands(
    connection: &mut SqliteConnection,
    age: Duration,
    limit: usize,
) -> Result<usize, StoreError> {
    let before = now().saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
    let forgotten = sqlx::query(
        "DELETE FROM storied_commands WHERE id IN (
            SELECT id FROM storied_commands WHERE recorded_at <= ? ORDER BY recorded_at LIMIT ?)",
    )
    .bind(before)
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .execute(connection)
    .await
    .map_err(|error| failed("deleting old command records", error))?;
    Ok(usize::try_from(forgotten.rows_affected()).unwrap_or(usize::MAX))
}
