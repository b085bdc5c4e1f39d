//! Tables of the progress of projections, of their control, and of the publisher.
//!
//! All names are qualified: a temporary table of `apply` with the same name would replace ours.

use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

use super::super::StoreError;
use super::super::sql::{Controls, Progress, session};
use super::error::failed;

session!(SqliteConnection, SqliteRow, failed, micros);

/// Table that records the migrations of the progress.
const TABLE: &str = "storied_read_model_migrations";

/// The time in microseconds since 1970.
const NOW: &str = "CAST(unixepoch('subsec') * 1000000 AS INTEGER)";

/// The progress of projections.
pub(crate) static PROGRESS: LazyLock<Progress> = LazyLock::new(|| Progress::new(text, NOW, "true", true));

/// The control of projections and the checkpoint of the publisher.
pub(super) static CONTROLS: LazyLock<Controls> = LazyLock::new(|| Controls::new(text, true));

fn text(sql: &str) -> SqlStr {
    AssertSqlSafe(sql.replace("storied.", "main.storied_")).into_sql_str()
}

fn micros(time: DateTime<Utc>) -> i64 {
    time.timestamp_micros()
}

fn migrations() -> Migrator {
    sqlx::migrate!("migrations/sqlite-read-model")
}

/// Creates the tables of the progress if needed, in any database.
pub(crate) async fn migrate(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    super::migrate::migrate(connection, &migrations(), TABLE).await
}

/// Checks that the tables of the progress exist in the current version.
///
/// # Errors
/// `Incompatible` if they are missing or have another version.
pub(crate) async fn check(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    super::migrate::check(connection, &migrations(), TABLE).await
}

#[cfg(test)]
mod tests {
    use sqlx::sqlite::SqliteConnectOptions;
    use sqlx::{ConnectOptions, Connection, Executor};
    use uuid::Uuid;

    use super::*;
    use crate::event::Position;
    use crate::store::{Checkpoint, CheckpointError, CheckpointKey, ProgressWrite, StoreError};

    fn at(position: u64) -> Checkpoint {
        Checkpoint { position: Position::new(position), epoch: 1, ..Checkpoint::default() }
    }

    async fn save(
        connection: &mut SqliteConnection,
        store: Uuid,
        from: Checkpoint,
        to: Checkpoint,
    ) -> Result<(), CheckpointError> {
        let write = ProgressWrite::Checkpoint { key: CheckpointKey::new("p"), from, to };
        PROGRESS.write(connection, store, &write).await
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
        let key = CheckpointKey::new("p");
        let none = Checkpoint::default();
        let mut transaction = connection.begin().await.unwrap();
        transaction.execute("INSERT INTO revenue VALUES (1)").await.unwrap();
        save(&mut transaction, store, none, at(1)).await.unwrap();
        transaction.rollback().await.unwrap();
        assert_eq!(PROGRESS.checkpoint(&mut connection, &key, store).await.unwrap(), none);

        let mut transaction = connection.begin().await.unwrap();
        transaction.execute("INSERT INTO revenue VALUES (1)").await.unwrap();
        save(&mut transaction, store, none, at(1)).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(PROGRESS.checkpoint(&mut connection, &key, store).await.unwrap(), at(1));

        // A refused save leaves the rest of the transaction to the application.
        let mut transaction = connection.begin().await.unwrap();
        let refused = save(&mut transaction, store, at(7), at(8)).await;
        assert!(
            matches!(refused, Err(CheckpointError::Stale { found, .. }) if found == at(1)),
            "{refused:?}"
        );
        transaction.rollback().await.unwrap();

        let other = save(&mut connection, Uuid::new_v4(), at(1), at(2)).await;
        let incompatible = matches!(other, Err(CheckpointError::Store(StoreError::Incompatible { .. })));
        assert!(incompatible, "{other:?}");
    }
}
