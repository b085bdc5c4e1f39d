//! Checkpoints and parked events, as functions over a connection.
//!
//! A projection stores them in the database of its read model, in the read model's transaction. The
//! store uses the same functions on its own file.
//!
//! All names are qualified: a temporary table of `apply` with the same name would replace ours.

use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::{Checkpoint, CheckpointError, CheckpointRecord, ParkedEvent, StoreError};
use super::convert::{now, to_sql};
use super::error::failed;
use crate::event::{EventName, Position, StreamId, Version};

/// Table that records the migrations of these tables.
const TABLE: &str = "storied_read_model_migrations";

fn migrations() -> Migrator {
    sqlx::migrate!("migrations/sqlite-read-model")
}

/// Creates the tables if needed, in any database.
pub(crate) async fn migrate(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    super::migrate::migrate(connection, &migrations(), TABLE).await
}

/// Checks that the tables exist in the current version.
///
/// # Errors
/// `Incompatible` if they are missing or have another version.
pub(crate) async fn check(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    super::migrate::check(connection, &migrations(), TABLE).await
}

/// Loads the checkpoint of `name` and the id of the store that it belongs to.
pub(crate) async fn load(
    connection: &mut SqliteConnection,
    name: &str,
) -> Result<Option<(Checkpoint, Uuid)>, StoreError> {
    let doing = || format!("reading the checkpoint of {name}");
    let row =
        sqlx::query("SELECT position, epoch, mark, store_id FROM main.storied_checkpoints WHERE name = ?")
            .bind(name)
            .fetch_optional(connection)
            .await
            .map_err(|error| failed(&doing(), error))?;
    let Some(row) = row else { return Ok(None) };
    let row = Columns::of("storied_checkpoints", &row);
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
pub(crate) async fn records(connection: &mut SqliteConnection) -> Result<Vec<CheckpointRecord>, StoreError> {
    const DOING: &str = "reading the checkpoints";
    let record = |row: &SqliteRow| -> Result<_, sqlx::Error> {
        let row = Columns::of("storied_checkpoints", row);
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
    let rows = sqlx::query(
        "SELECT name, position, epoch, mark, store_id, updated_at,
             (SELECT count(*) FROM main.storied_parked WHERE storied_parked.name = storied_checkpoints.name)
         FROM main.storied_checkpoints ORDER BY name",
    );
    let rows = rows.fetch_all(connection).await;
    rows.and_then(|rows| rows.iter().map(record).collect()).map_err(|error| failed(DOING, error))
}

/// Loads the checkpoint of `name` in the log of `store`; the default one if none was saved.
///
/// # Errors
/// `Incompatible` if the checkpoint belongs to another store.
pub(crate) async fn checkpoint(
    connection: &mut SqliteConnection,
    name: &str,
    store: Uuid,
) -> Result<Checkpoint, StoreError> {
    match load(connection, name).await? {
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
    connection: &mut SqliteConnection,
    name: &str,
    store: Uuid,
) -> Result<Checkpoint, StoreError> {
    sqlx::query("UPDATE main.storied_checkpoints SET store_id = ?2 WHERE name = ?1 AND store_id <> ?2")
        .bind(name)
        .bind(store)
        .execute(&mut *connection)
        .await
        .map_err(|error| failed(&format!("taking over the checkpoint of {name}"), error))?;
    checkpoint(connection, name, store).await
}

/// Moves the checkpoint of `name` from exactly `from` to `to`.
pub(crate) async fn save(
    connection: &mut SqliteConnection,
    name: &str,
    store: Uuid,
    from: Checkpoint,
    to: Checkpoint,
) -> Result<(), CheckpointError> {
    let stale = |found| CheckpointError::Stale { name: name.to_owned(), expected: from, found };
    if to.epoch < from.epoch {
        return Err(stale(checkpoint(connection, name, store).await?));
    }
    // A name that was never saved is at the default checkpoint, so only from there a row is
    // created.
    let sql = if from == Checkpoint::default() {
        "INSERT INTO main.storied_checkpoints (name, position, epoch, mark, store_id, updated_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (name) DO UPDATE
         SET position = ?2, epoch = ?3, mark = ?4, updated_at = ?6
         WHERE store_id = ?5 AND position = ?7 AND epoch = ?8 AND mark = ?9"
    } else {
        "UPDATE main.storied_checkpoints
         SET position = ?2, epoch = ?3, mark = ?4, updated_at = ?6
         WHERE name = ?1 AND store_id = ?5 AND position = ?7 AND epoch = ?8 AND mark = ?9"
    };
    let moved = sqlx::query(sql)
        .bind(name)
        .bind(to_sql(to.position.get()))
        .bind(to_sql(to.epoch))
        .bind(to_sql(to.mark))
        .bind(store)
        .bind(now())
        .bind(to_sql(from.position.get()))
        .bind(to_sql(from.epoch))
        .bind(to_sql(from.mark))
        .execute(&mut *connection)
        .await
        .map_err(|error| failed(&format!("saving the checkpoint of {name}"), error))?;
    if moved.rows_affected() == 1 {
        return Ok(());
    }
    Err(stale(checkpoint(connection, name, store).await?))
}

/// Parks an event; replaces an earlier record of the same event.
pub(crate) async fn park(
    connection: &mut SqliteConnection,
    name: &str,
    event: &ParkedEvent,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT OR REPLACE INTO main.storied_parked
         (name, position, event_id, category, stream_id, version, event_name, error, attempts, parked_at)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(name)
    .bind(to_sql(event.position.get()))
    .bind(event.event_id)
    .bind(event.stream.category())
    .bind(event.stream.id())
    .bind(to_sql(event.version.get()))
    .bind(event.name.as_str())
    .bind(event.error.as_str())
    .bind(event.attempts)
    .bind(event.parked_at.timestamp_micros())
    .execute(connection)
    .await
    .map_err(|error| failed(&format!("parking an event of {name}"), error))?;
    Ok(())
}

/// Returns the parked events of `name`, oldest first.
pub(crate) async fn parked(
    connection: &mut SqliteConnection,
    name: &str,
    limit: usize,
) -> Result<Vec<ParkedEvent>, StoreError> {
    let doing = || format!("reading the parked events of {name}");
    sqlx::query(
        "SELECT position, event_id, category, stream_id, version, event_name, error, attempts, parked_at
         FROM main.storied_parked WHERE name = ? ORDER BY position LIMIT ?",
    )
    .bind(name)
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await
    .map_err(|error| failed(&doing(), error))?
    .iter()
    .map(|row| parked_event(row).map_err(|error| failed(&doing(), error)))
    .collect()
}

fn parked_event(row: &SqliteRow) -> Result<ParkedEvent, sqlx::Error> {
    let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| sqlx::Error::Decode(error);
    let row = Columns::of("storied_parked", row);
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

/// Removes a parked event; returns whether there was one.
pub(crate) async fn unpark(
    connection: &mut SqliteConnection,
    name: &str,
    position: Position,
) -> Result<bool, StoreError> {
    let removed = sqlx::query("DELETE FROM main.storied_parked WHERE name = ? AND position = ?")
        .bind(name)
        .bind(to_sql(position.get()))
        .execute(connection)
        .await
        .map_err(|error| failed(&format!("removing a parked event of {name}"), error))?;
    Ok(removed.rows_affected() > 0)
}

/// Removes all parked events of `name`.
pub(crate) async fn unpark_all(connection: &mut SqliteConnection, name: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM main.storied_parked WHERE name = ?")
        .bind(name)
        .execute(connection)
        .await
        .map_err(|error| failed(&format!("removing the parked events of {name}"), error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::sqlite::SqliteConnectOptions;
    use sqlx::{ConnectOptions, Connection, Executor};

    use super::*;

    fn at(position: u64) -> Checkpoint {
        Checkpoint { position: Position::new(position), epoch: 1, mark: 0 }
    }

    /// A read model's database belongs to the application, with its own tables, migrations and
    /// transactions.
    #[tokio::test]
    async fn lives_in_a_users_database() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("read-model.db");
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
        let mut connection = options.connect().await.unwrap();
        connection
            .execute("CREATE TABLE revenue (pence INTEGER); CREATE TABLE _sqlx_migrations (mine INTEGER)")
            .await
            .unwrap();
        migrate(&mut connection).await.unwrap();
        migrate(&mut connection).await.unwrap();

        let store = Uuid::new_v4();
        let mut transaction = connection.begin().await.unwrap();
        transaction.execute("INSERT INTO revenue VALUES (1)").await.unwrap();
        save(&mut transaction, "p", store, Checkpoint::default(), at(1)).await.unwrap();
        transaction.rollback().await.unwrap();
        assert_eq!(load(&mut connection, "p").await.unwrap(), None);

        let mut transaction = connection.begin().await.unwrap();
        transaction.execute("INSERT INTO revenue VALUES (1)").await.unwrap();
        save(&mut transaction, "p", store, Checkpoint::default(), at(1)).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(load(&mut connection, "p").await.unwrap(), Some((at(1), store)));

        // A refused save leaves the rest of the transaction to the application.
        let mut transaction = connection.begin().await.unwrap();
        let refused = save(&mut transaction, "p", store, at(7), at(8)).await;
        assert!(
            matches!(refused, Err(CheckpointError::Stale { found, .. }) if found == at(1)),
            "{refused:?}"
        );
        transaction.rollback().await.unwrap();

        let other = save(&mut connection, "p", Uuid::new_v4(), at(1), at(2)).await;
        let incompatible = matches!(other, Err(CheckpointError::Store(StoreError::Incompatible { .. })));
        assert!(incompatible, "{other:?}");
    }
}
