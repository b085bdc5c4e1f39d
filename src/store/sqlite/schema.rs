//! From a path to a database that is ours: created, migrated, and known by its identity.

use sqlx::Connection;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::SqliteConnection;
use uuid::Uuid;

use super::super::StoreError;
use super::error::failed;
use crate::codec::Codec;

const MIGRATING: &str = "preparing storied's tables";

/// Makes the file an event store if it is none yet; its identity.
pub(super) async fn prepare(connection: &mut SqliteConnection, codec: Codec) -> Result<Uuid, StoreError> {
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| failed(MIGRATING, error))?;
    if mode != "wal" {
        return Err(StoreError::Incompatible {
            expected: "a database that can keep a write-ahead log".into(),
            found: format!("journal mode {mode}"),
            advice: "put the file on a local disk, or use MemoryStore if nothing is to be kept".into(),
        });
    }
    let mut migrations = sqlx::migrate!("migrations/sqlite");
    migrations.dangerous_set_table_name("storied_migrations");
    migrate(connection, &migrations).await?;
    super::progress::migrate(connection).await?;
    identity(connection, codec).await
}

/// Runs migrations. SQLite's write lock keeps others out meanwhile: sqlx's own lock does nothing on SQLite.
pub(super) async fn migrate(
    connection: &mut SqliteConnection,
    migrations: &Migrator,
) -> Result<(), StoreError> {
    let mut transaction =
        connection.begin_with("BEGIN IMMEDIATE").await.map_err(|error| failed(MIGRATING, error))?;
    // Not `run`: a future that calls that cannot be boxed ("implementation of Acquire is not general enough").
    migrations
        .run_direct(None, &mut *transaction, false)
        .await
        .map_err(|error| refused(migrations, error))?;
    transaction.commit().await.map_err(|error| failed(MIGRATING, error))
}

fn refused(migrations: &Migrator, error: MigrateError) -> StoreError {
    let ours = migrations.iter().map(|migration| migration.version).max().unwrap_or(0);
    let incompatible = |found: String, advice: &str| StoreError::Incompatible {
        expected: format!("storied's tables in version {ours}"),
        found,
        advice: advice.into(),
    };
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => failed(MIGRATING, error),
        MigrateError::VersionMissing(version) => incompatible(
            format!("version {version}"),
            "a newer program has used this database: update this one, or use another database",
        ),
        other => incompatible(
            other.to_string(),
            "the tables were not made by a released version of storied: use another database",
        ),
    }
}

/// Gives a new store its identity, and checks that of an old one.
async fn identity(connection: &mut SqliteConnection, codec: Codec) -> Result<Uuid, StoreError> {
    sqlx::query("INSERT OR IGNORE INTO storied_meta (key, value) VALUES ('store_id', ?), ('codec', ?)")
        .bind(Uuid::new_v4().to_string())
        .bind(codec.name())
        .execute(&mut *connection)
        .await
        .map_err(|error| failed(MIGRATING, error))?;
    let found = meta(connection, "codec").await?;
    if Codec::from_name(&found) != Some(codec) {
        return Err(StoreError::Incompatible {
            expected: format!("an event store with {codec} payloads"),
            found: format!("one with {found} payloads"),
            advice:
                "open it with the codec that it was created with (SqliteOptions::codec), or use another file"
                    .into(),
        });
    }
    let id = meta(connection, "store_id").await?;
    id.parse().map_err(|error| StoreError::Corrupt {
        reason: format!("storied_meta has the store id {id:?}: {error}"),
    })
}

async fn meta(connection: &mut SqliteConnection, key: &str) -> Result<String, StoreError> {
    sqlx::query_scalar("SELECT value FROM storied_meta WHERE key = ?")
        .bind(key)
        .fetch_one(connection)
        .await
        .map_err(|error| failed(MIGRATING, error))
}
