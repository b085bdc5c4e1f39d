//! From a path to a database that is ours: created, migrated, and known by its identity.

use sqlx::sqlite::SqliteConnection;
use uuid::Uuid;

use super::super::StoreError;
use super::error::failed;
use super::migrate::{MIGRATING, check, migrate};
use crate::codec::Codec;

/// The log's own table of migrations.
const TABLE: &str = "storied_migrations";

/// Makes the file an event store if it is none yet, and it may; its identity.
pub(super) async fn prepare(
    connection: &mut SqliteConnection,
    codec: Codec,
    may_migrate: bool,
) -> Result<Uuid, StoreError> {
    let migrations = sqlx::migrate!("migrations/sqlite");
    if !may_migrate {
        check(connection, &migrations, TABLE).await?;
        super::progress::check(connection).await?;
    }
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| failed(MIGRATING, error))?;
    // A backup made by VACUUM INTO has lost its write-ahead log. Opened to read it stays as it is; a program that may migrate
    // turns it back.
    let readable = !may_migrate && ["delete", "truncate", "persist"].contains(&&*mode);
    if readable {
        tracing::warn!(
            mode,
            "the event store has no write-ahead log; readers and writers wait for each other"
        );
    } else if mode != "wal" {
        return Err(StoreError::Incompatible {
            expected: "a database that can keep a write-ahead log".into(),
            found: format!("journal mode {mode}"),
            advice: "put the file on a local disk, or use MemoryStore if nothing is to be kept".into(),
        });
    }
    if may_migrate {
        migrate(connection, &migrations, TABLE).await?;
        super::progress::migrate(connection).await?;
        found(connection, codec).await?;
    }
    identity(connection, codec).await
}

/// Gives a new store its identity.
async fn found(connection: &mut SqliteConnection, codec: Codec) -> Result<(), StoreError> {
    sqlx::query("INSERT OR IGNORE INTO storied_meta (key, value) VALUES ('store_id', ?), ('codec', ?)")
        .bind(Uuid::new_v4().to_string())
        .bind(codec.name())
        .execute(connection)
        .await
        .map(drop)
        .map_err(|error| failed(MIGRATING, error))
}

/// The identity of a store, which must have been made with this codec.
async fn identity(connection: &mut SqliteConnection, codec: Codec) -> Result<Uuid, StoreError> {
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
