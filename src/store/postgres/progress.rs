//! Checkpoints and parked events, as functions over a connection.
//!
//! A projection stores them in the database of its read model, in the read model's transaction. The
//! store uses the same functions on its own schema.

use sqlx::postgres::{PgConnection, PgRow};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::{Checkpoint, CheckpointError, CheckpointRecord, ParkedEvent, StoreError};
use super::convert::to_sql;
use super::error::failed;
use super::statements::{ProgressSql, Schema};
use crate::event::{EventName, Position, StreamId, Version};

/// The tables of checkpoints and parked events.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    sql: ProgressSql,
    /// Whether statements may be prepared under a name; not with a pooler in transaction mode.
    persistent: bool,
    /// Whether checkpoints move only in a transaction that the read model has marked.
    marked: bool,
}

impl Progress {
    pub(crate) fn new(schema: &Schema, persistent: bool) -> Self {
        Self { sql: ProgressSql::new(schema), persistent, marked: false }
    }

    /// Moves checkpoints only in a transaction with the setting `storied_transaction.state`.
    pub(crate) fn of_read_model(schema: &Schema) -> Self {
        Self { sql: ProgressSql::new(schema), persistent: true, marked: true }
    }

    /// Returns whether the current transaction is marked.
    pub(crate) async fn is_marked(&self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(self.sql.is_marked.clone()).persistent(self.persistent).fetch_one(connection).await
    }

    /// Loads the checkpoint of `name` and the id of the store that it belongs to.
    pub(crate) async fn load(
        &self,
        connection: &mut PgConnection,
        name: &str,
    ) -> Result<Option<(Checkpoint, Uuid)>, StoreError> {
        let doing = || format!("reading the checkpoint of {name}");
        let row = sqlx::query(self.sql.load.clone())
            .bind(name)
            .persistent(self.persistent)
            .fetch_optional(connection)
            .await
            .map_err(|error| failed(&doing(), error))?;
        let Some(row) = row else { return Ok(None) };
        let row = Columns::of("checkpoints", &row);
        let columns = || -> Result<_, sqlx::Error> {
            let checkpoint = Checkpoint {
                position: Position::new(row.number(0)?),
                epoch: row.number(1)?,
                mark: row.number(2)?,
            };
            Ok((checkpoint, row.get(3)?))
        };
        columns().map(Some).map_err(|error| failed(&doing(), error))
    }

    /// Loads all checkpoints, ordered by name.
    pub(crate) async fn records(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Vec<CheckpointRecord>, StoreError> {
        const DOING: &str = "reading the checkpoints";
        let record = |row: &PgRow| -> Result<_, sqlx::Error> {
            let row = Columns::of("checkpoints", row);
            Ok(CheckpointRecord {
                name: row.get(0)?,
                checkpoint: Checkpoint {
                    position: Position::new(row.number(1)?),
                    epoch: row.number(2)?,
                    mark: row.number(3)?,
                },
                store: row.get(4)?,
                updated_at: row.time(5)?,
                parked: row.number(6)?,
            })
        };
        let rows =
            sqlx::query(self.sql.records.clone()).persistent(self.persistent).fetch_all(connection).await;
        rows.and_then(|rows| rows.iter().map(record).collect()).map_err(|error| failed(DOING, error))
    }

    /// Loads the checkpoint of `name` in the log of `store`; the default one if none was saved.
    ///
    /// # Errors
    /// `Incompatible` if the checkpoint belongs to another store.
    pub(crate) async fn checkpoint(
        &self,
        connection: &mut PgConnection,
        name: &str,
        store: Uuid,
    ) -> Result<Checkpoint, StoreError> {
        match self.load(connection, name).await? {
            None => Ok(Checkpoint::default()),
            Some((checkpoint, found)) if found == store => Ok(checkpoint),
            Some((_, found)) => Err(StoreError::Incompatible {
                expected: format!("a checkpoint of {name} in event store {store}"),
                found: format!("a checkpoint in event store {found}"),
                advice: "the event store or the read model was replaced or restored: connect the right pair, or reset the projection to rebuild it".into(),
            }),
        }
    }

    /// Makes the checkpoint of `name` one in the log of `store`.
    pub(crate) async fn adopt(
        &self,
        connection: &mut PgConnection,
        name: &str,
        store: Uuid,
    ) -> Result<Checkpoint, StoreError> {
        sqlx::query(self.sql.adopt.clone())
            .bind(name)
            .bind(store)
            .persistent(self.persistent)
            .execute(&mut *connection)
            .await
            .map_err(|error| failed(&format!("taking over the checkpoint of {name}"), error))?;
        self.checkpoint(connection, name, store).await
    }

    /// Moves the checkpoint of `name` from exactly `from` to `to`.
    ///
    /// If two callers do so at the same time, the second waits for the end of the first
    /// transaction.
    pub(crate) async fn save(
        &self,
        connection: &mut PgConnection,
        name: &str,
        store: Uuid,
        from: Checkpoint,
        to: Checkpoint,
    ) -> Result<(), CheckpointError> {
        let stale = |found| CheckpointError::Stale { name: name.to_owned(), expected: from, found };
        if to.epoch < from.epoch {
            return Err(stale(self.checkpoint(connection, name, store).await?));
        }
        let sql = match (from == Checkpoint::default(), self.marked) {
            (true, false) => &self.sql.create,
            (false, false) => &self.sql.update,
            (true, true) => &self.sql.create_marked,
            (false, true) => &self.sql.update_marked,
        };
        let moved = sqlx::query(sql.clone())
            .bind(name)
            .bind(to_sql(to.position.get()))
            .bind(to_sql(to.epoch))
            .bind(to_sql(to.mark))
            .bind(store)
            .bind(to_sql(from.position.get()))
            .bind(to_sql(from.epoch))
            .bind(to_sql(from.mark))
            .persistent(self.persistent)
            .execute(&mut *connection)
            .await
            .map_err(|error| failed(&format!("saving the checkpoint of {name}"), error))?;
        if moved.rows_affected() == 1 {
            return Ok(());
        }
        Err(stale(self.checkpoint(connection, name, store).await?))
    }

    /// Parks an event; replaces an earlier record of the same event.
    pub(crate) async fn park(
        &self,
        connection: &mut PgConnection,
        name: &str,
        event: &ParkedEvent,
    ) -> Result<(), StoreError> {
        sqlx::query(self.sql.park.clone())
            .bind(name)
            .bind(to_sql(event.position.get()))
            .bind(event.event_id)
            .bind(event.stream.category())
            .bind(event.stream.id())
            .bind(to_sql(event.version.get()))
            .bind(event.name.as_str())
            // This text can come from any source, and PostgreSQL cannot store NUL.
            .bind(event.error.replace('\0', "\u{fffd}"))
            .bind(i64::from(event.attempts))
            .bind(event.parked_at)
            .persistent(self.persistent)
            .execute(connection)
            .await
            .map_err(|error| failed(&format!("parking an event of {name}"), error))?;
        Ok(())
    }

    /// Returns the parked events of `name`, oldest first.
    pub(crate) async fn parked(
        &self,
        connection: &mut PgConnection,
        name: &str,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        let doing = || format!("reading the parked events of {name}");
        sqlx::query(self.sql.parked.clone())
            .bind(name)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .persistent(self.persistent)
            .fetch_all(connection)
            .await
            .map_err(|error| failed(&doing(), error))?
            .iter()
            .map(|row| parked_event(row).map_err(|error| failed(&doing(), error)))
            .collect()
    }

    /// Removes a parked event; returns whether there was one.
    pub(crate) async fn unpark(
        &self,
        connection: &mut PgConnection,
        name: &str,
        position: Position,
    ) -> Result<bool, StoreError> {
        let removed = sqlx::query(self.sql.unpark.clone())
            .bind(name)
            .bind(to_sql(position.get()))
            .persistent(self.persistent)
            .execute(connection)
            .await
            .map_err(|error| failed(&format!("removing a parked event of {name}"), error))?;
        Ok(removed.rows_affected() > 0)
    }

    /// Removes all parked events of `name`.
    pub(crate) async fn unpark_all(
        &self,
        connection: &mut PgConnection,
        name: &str,
    ) -> Result<(), StoreError> {
        sqlx::query(self.sql.unpark_all.clone())
            .bind(name)
            .persistent(self.persistent)
            .execute(connection)
            .await
            .map_err(|error| failed(&format!("removing the parked events of {name}"), error))?;
        Ok(())
    }
}

fn parked_event(row: &PgRow) -> Result<ParkedEvent, sqlx::Error> {
    let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| sqlx::Error::Decode(error);
    let row = Columns::of("parked", row);
    Ok(ParkedEvent {
        position: Position::new(row.number(0)?),
        event_id: row.get(1)?,
        stream: StreamId::new(row.get::<&str>(2)?, row.get::<&str>(3)?)
            .map_err(|error| unreadable(error.into()))?,
        version: Version::new(row.number(4)?),
        name: EventName::new(row.get::<&str>(5)?).map_err(|error| unreadable(error.into()))?,
        error: row.get(6)?,
        attempts: u32::try_from(row.number(7)?).unwrap_or(u32::MAX),
        parked_at: row.time(8)?,
    })
}
