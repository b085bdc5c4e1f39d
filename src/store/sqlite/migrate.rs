//! Running a set of migrations.

use sqlx::Connection;
use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::sqlite::SqliteConnection;

use super::super::StoreError;
use super::error::failed;

/// What errors say that storied was doing.
pub(super) const MIGRATING: &str = "preparing storied's tables";

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
