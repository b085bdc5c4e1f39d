//! Runs a set of migrations.

use sqlx::Connection;
use sqlx::migrate::{AppliedMigration, Migrate, MigrateError, Migrator};
use sqlx::sqlite::SqliteConnection;

use super::super::StoreError;
use super::error::failed;

/// Operation named in errors.
pub(super) const MIGRATING: &str = "preparing storied's tables";

/// Runs migrations and records them in `table`.
///
/// SQLite's write lock keeps other processes out meanwhile. `Migrator::run` is not used, because
/// its own lock does nothing on SQLite.
pub(super) async fn migrate(
    connection: &mut SqliteConnection,
    migrations: &Migrator,
    table: &str,
) -> Result<(), StoreError> {
    let refused = |error| match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => failed(MIGRATING, error),
        other => StoreError::storage(format!("{MIGRATING}: {other}"), other),
    };
    let mut transaction =
        connection.begin_with("BEGIN IMMEDIATE").await.map_err(|error| failed(MIGRATING, error))?;
    transaction.ensure_migrations_table(table).await.map_err(refused)?;
    let applied = transaction.list_applied_migrations(table).await.map_err(refused)?;
    suit(migrations, &applied, table)?;
    for migration in migrations.iter() {
        if !applied.iter().any(|applied| applied.version == migration.version) {
            transaction.apply(table, migration).await.map_err(refused)?;
        }
    }
    transaction.commit().await.map_err(|error| failed(MIGRATING, error))
}

/// Checks that all migrations were run, and changes nothing.
///
/// # Errors
/// `Incompatible` if migrations are missing, or others were run.
pub(super) async fn check(
    connection: &mut SqliteConnection,
    migrations: &Migrator,
    table: &str,
) -> Result<(), StoreError> {
    const CHECKING: &str = "checking the database";
    let exists = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?)";
    let exists: bool = sqlx::query_scalar(exists)
        .bind(table)
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| failed(CHECKING, error))?;
    let applied = if exists {
        let applied = connection.list_applied_migrations(table).await;
        applied.map_err(|error| StoreError::storage(format!("{CHECKING}: {error}"), error))?
    } else {
        Vec::new()
    };
    suit(migrations, &applied, table)?;
    if applied.len() < migrations.iter().count() {
        let found = applied.last().map_or("none".into(), |last| format!("version {}", last.version));
        let advice = "open it with a program that may migrate (SqliteOptions::migrate)";
        return Err(incompatible(migrations, table, found, advice));
    }
    Ok(())
}

/// Checks that the applied migrations belong to `migrations`.
fn suit(migrations: &Migrator, applied: &[AppliedMigration], table: &str) -> Result<(), StoreError> {
    for applied in applied {
        match migrations.iter().find(|migration| migration.version == applied.version) {
            Some(migration) if applied.checksum == migration.checksum => {}
            Some(_) => {
                let found = format!("another version {}", applied.version);
                let advice =
                    "the tables were not created by a released version of storied: use another database";
                return Err(incompatible(migrations, table, found, advice));
            }
            None => {
                let found = format!("version {}", applied.version);
                let advice =
                    "a newer program has used this database: update this program, or use another database";
                return Err(incompatible(migrations, table, found, advice));
            }
        }
    }
    Ok(())
}

fn incompatible(migrations: &Migrator, table: &str, found: String, advice: &str) -> StoreError {
    let newest = migrations.iter().map(|migration| migration.version).max().unwrap_or(0);
    let expected = format!("{table} up to version {newest}");
    StoreError::Incompatible { expected, found, advice: advice.into() }
}
