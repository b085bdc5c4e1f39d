//! From a path to a database that is ours: created, migrated, and known by its identity.

use sqlx::Connection;
use sqlx::migrate::{Migrate, MigrateError, Migrator};
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
    migrate(connection, &sqlx::migrate!("migrations/sqlite"), "storied_migrations").await?;
    super::progress::migrate(connection).await?;
    identity(connection, codec).await
}

/// Runs migrations and remembers them in `table`. SQLite's write lock keeps others out meanwhile: sqlx's own lock does
/// nothing on SQLite, hence not `Migrator::run`.
pub(super) async fn migrate(
    connection: &mut SqliteConnection,
    migrations: &Migrator,
    table: &str,
) -> Result<(), StoreError> {
    let refused = |error| match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => failed(MIGRATING, error),
        other => StoreError::storage(format!("{MIGRATING}: {other}"), other),
    };
    let newest = migrations.iter().map(|migration| migration.version).max().unwrap_or(0);
    let incompatible = |found, advice: &str| StoreError::Incompatible {
        expected: format!("{table} up to version {newest}"),
        found,
        advice: advice.into(),
    };
    let mut transaction =
        connection.begin_with("BEGIN IMMEDIATE").await.map_err(|error| failed(MIGRATING, error))?;
    transaction.ensure_migrations_table(table).await.map_err(refused)?;
    let applied = transaction.list_applied_migrations(table).await.map_err(refused)?;
    if let Some(unknown) = applied.iter().find(|applied| !migrations.version_exists(applied.version)) {
        return Err(incompatible(
            format!("version {}", unknown.version),
            "a newer program has used this database: update this one, or use another database",
        ));
    }
    for migration in migrations.iter() {
        match applied.iter().find(|applied| applied.version == migration.version) {
            Some(applied) if applied.checksum == migration.checksum => {}
            Some(_) => {
                return Err(incompatible(
                    format!("another version {}", migration.version),
                    "its tables were not made by a released storied: use another database",
                ));
            }
            None => _ = transaction.apply(table, migration).await.map_err(refused)?,
        }
    }
    transaction.commit().await.map_err(|error| failed(MIGRATING, error))
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
