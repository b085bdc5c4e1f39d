//! Prepares a file for a store: creation, migrations and identity.

use std::path::Path;

use chrono::{DateTime, Utc};
use sqlx::AssertSqlSafe;
use sqlx::sqlite::SqliteConnection;
use uuid::Uuid;

use super::super::{Adopt, Adoption, Home, StoreError};
use super::error::failed;
use super::migrate::{MIGRATING, check, migrate};
use crate::codec::Codec;

pub(super) const ADOPTING: &str = "adopting the event store";

/// Table that records the migrations of the log.
const TABLE: &str = "storied_migrations";

/// Makes the file an event store if it is not one yet, if allowed.
///
/// Returns the identity of the store, and whether the file is its home.
pub(super) async fn prepare(
    connection: &mut SqliteConnection,
    path: &Path,
    codec: Codec,
    may_migrate: bool,
) -> Result<(Uuid, Adoption), StoreError> {
    refuse_text_layout(connection).await?;
    let migrations = sqlx::migrate!("migrations/sqlite");
    if !may_migrate {
        check(connection, &migrations, TABLE).await?;
        super::progress::check(connection).await?;
    }
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| failed(MIGRATING, error))?;
    // A backup made by VACUUM INTO has no write-ahead log. Opened for reading it stays unchanged; a
    // program that may migrate turns the log on again.
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
            advice: "put the file on a local disk, or use MemoryStore if no data has to be kept".into(),
        });
    }
    if may_migrate {
        migrate(connection, &migrations, TABLE).await?;
        super::progress::migrate(connection).await?;
        found(connection, &home(path)?, codec).await?;
    }
    let id = identity(connection, codec).await?;
    let recorded = Home {
        identity: meta(connection, "file").await?,
        shown: format!("file {}", meta(connection, "path").await?),
    };
    Ok((id, Adoption::of(recorded, home(path)?)))
}

/// Refuses tables of the layout before streams and names had numbers.
///
/// No release had that layout, so no migration leads from it.
async fn refuse_text_layout(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_table_info('storied_events') WHERE name = 'stream_id')";
    let found: bool = sqlx::query_scalar(sql)
        .fetch_one(connection)
        .await
        .map_err(|error| failed("checking the database", error))?;
    if !found {
        return Ok(());
    }
    Err(StoreError::Incompatible {
        expected: "storied_events with the numbers of streams and names".into(),
        found: "storied_events with their text, the layout of an unreleased storied".into(),
        advice: "use a new file; no migration leads from this layout, and only the program that wrote the file reads it"
            .into(),
    })
}

/// Returns the identity of a file, which a copy does not share.
///
/// It is the number in the file system and the time of creation. Both survive a renaming. If the
/// file system has no creation time, it is the number alone. If it has neither, copies are not
/// detected.
pub(crate) fn home(path: &Path) -> Result<Home, StoreError> {
    let reading =
        |error| StoreError::storage(format!("reading the metadata of {}: {error}", path.display()), error);
    let file = std::fs::metadata(path).map_err(reading)?;
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&file);
    #[cfg(not(unix))]
    let number = 0;
    let created = file.created().map(|time| DateTime::<Utc>::from(time).to_rfc3339()).unwrap_or_default();
    let shown = std::fs::canonicalize(path).map_err(reading)?;
    Ok(Home { identity: format!("{number} {created}"), shown: format!("file {}", shown.display()) })
}

/// Makes the file at `path` the store's own, and returns the store's id from now on.
pub(super) async fn adopt(
    connection: &mut SqliteConnection,
    path: &Path,
    old: Uuid,
    adopt: Adopt,
) -> Result<Uuid, StoreError> {
    let adopting = |error| failed(ADOPTING, error);
    let home = home(path)?;
    let new = match adopt {
        Adopt::Moved => old,
        Adopt::Copy => Uuid::new_v4(),
    };
    let path = home.shown.strip_prefix("file ").unwrap_or_default();
    for (key, value) in [("file", &*home.identity), ("path", path), ("store_id", &*new.to_string())] {
        sqlx::query("UPDATE storied_meta SET value = ? WHERE key = ?")
            .bind(value)
            .bind(key)
            .execute(&mut *connection)
            .await
            .map_err(adopting)?;
    }
    if adopt == Adopt::Copy {
        // The publisher of the copy cannot use the checkpoint of the original's bus.
        sqlx::query("DELETE FROM storied_publisher").execute(&mut *connection).await.map_err(adopting)?;
        for table in ["projections", "checkpoints"] {
            let sql = format!("UPDATE storied_{table} SET store_id = ?2 WHERE store_id = ?1");
            sqlx::query(AssertSqlSafe(sql))
                .bind(old)
                .bind(new)
                .execute(&mut *connection)
                .await
                .map_err(adopting)?;
        }
        // The epochs stay, because checkpoints contain them.
        sqlx::query("UPDATE storied_leases SET expires_at = 0")
            .execute(connection)
            .await
            .map_err(adopting)?;
    }
    Ok(new)
}

/// Creates the identity of a new store.
async fn found(connection: &mut SqliteConnection, home: &Home, codec: Codec) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT OR IGNORE INTO storied_meta (key, value) VALUES ('store_id', ?), ('codec', ?), ('file', ?), ('path', ?)",
    )
        .bind(Uuid::new_v4().to_string())
        .bind(codec.name())
        .bind(home.identity.as_str())
        .bind(home.shown.strip_prefix("file ").unwrap_or_default())
        .execute(connection)
        .await
        .map(drop)
        .map_err(|error| failed(MIGRATING, error))
}

/// Returns the identity of a store, which must have been created with this codec.
async fn identity(connection: &mut SqliteConnection, codec: Codec) -> Result<Uuid, StoreError> {
    let found = meta(connection, "codec").await?;
    if Codec::from_name(&found) != Some(codec) {
        return Err(StoreError::Incompatible {
            expected: format!("an event store with {codec} payloads"),
            found: format!("an event store with {found} payloads"),
            advice: "open it with the codec of its creation (SqliteOptions::codec), or use another file"
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
