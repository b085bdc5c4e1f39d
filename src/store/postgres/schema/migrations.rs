//! The migrations of the tables, and how they are run.

use std::collections::HashMap;

use sqlx::migrate::{Migrate, MigrateError, Migration, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use uuid::Uuid;

use super::super::error::failed;
use super::super::statements::{LogSql, Schema};
use super::checks::CHECKING;
use crate::codec::Codec;
use crate::store::StoreError;

pub(super) const MIGRATING: &str = "preparing storied's tables";

/// Key of the advisory lock for creating tables.
pub(super) const MIGRATION_LOCK: i64 = 7_310_323_741_263_721_841;

/// A set of migrations, recorded in a table of its own beside those of the application.
pub(super) struct Set {
    table: &'static str,
    migrator: Migrator,
}

impl Set {
    /// Returns the migrations of the log and of its readers' progress.
    pub(super) fn all() -> [Self; 2] {
        [Self { table: "migrations", migrator: sqlx::migrate!("migrations/postgres") }, Self::progress()]
    }

    pub(super) fn progress() -> Self {
        Self { table: "read_model_migrations", migrator: sqlx::migrate!("migrations/postgres-read-model") }
    }

    /// Returns the migrations for a schema, with the checksums of the files.
    fn of(&self, schema: &Schema) -> impl Iterator<Item = Migration> {
        self.migrator
            .iter()
            .map(|migration| Migration { sql: schema.text(migration.sql.as_str()), ..migration.clone() })
    }

    /// Runs the missing migrations within the caller's transaction.
    ///
    /// It replaces the loop of sqlx, whose lock belongs to a session: a pooler in transaction mode
    /// provides none.
    async fn run(&self, connection: &mut PgConnection, schema: &Schema) -> Result<(), MigrateError> {
        let table = format!("\"{}\".{}", schema.name(), self.table);
        connection.ensure_migrations_table(&table).await?;
        let applied = connection.list_applied_migrations(&table).await?;
        for migration in self.of(schema) {
            if !applied.iter().any(|applied| applied.version == migration.version) {
                connection.apply(&table, &migration).await?;
            }
        }
        Ok(())
    }

    /// Returns whether all migrations of the set have been run.
    ///
    /// # Errors
    /// `Incompatible` if other migrations have been run.
    pub(super) async fn is_current(
        &self,
        connection: &mut PgConnection,
        schema: &Schema,
    ) -> Result<bool, StoreError> {
        let checking = |error| failed(CHECKING, error);
        let exists: bool = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
            .bind(format!("\"{}\".{}", schema.name(), self.table))
            .persistent(false)
            .fetch_one(&mut *connection)
            .await
            .map_err(checking)?;
        if !exists {
            return Ok(false);
        }
        let table = schema.text(&format!("SELECT version, checksum FROM storied.{}", self.table));
        let applied: HashMap<i64, Vec<u8>> = sqlx::query(table)
            .persistent(false)
            .fetch_all(connection)
            .await
            .and_then(|rows| rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect())
            .map_err(checking)?;
        let ours = self.migrator.iter().map(|migration| migration.version).max().unwrap_or(0);
        for migration in self.migrator.iter() {
            if applied.get(&migration.version).is_some_and(|sum| **sum != *migration.checksum) {
                return Err(self.refused(schema, MigrateError::VersionMismatch(migration.version)));
            }
        }
        if let Some(newer) = applied.keys().filter(|version| !self.migrator.version_exists(**version)).max() {
            return Err(self.refused(schema, MigrateError::VersionMissing(*newer)));
        }
        Ok(applied.contains_key(&ours))
    }

    fn refused(&self, schema: &Schema, error: MigrateError) -> StoreError {
        let ours = self.migrator.iter().map(|migration| migration.version).max().unwrap_or(0);
        let incompatible = |found: String, advice: &str| StoreError::Incompatible {
            expected: format!("storied's tables in schema {} in version {ours}", schema.name()),
            found,
            advice: advice.into(),
        };
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                failed(MIGRATING, error)
            }
            MigrateError::VersionMissing(version) => incompatible(
                format!("version {version}"),
                "a newer program has used this database: update this program, or use another schema or database",
            ),
            other => incompatible(
                other.to_string(),
                "the tables were not created by a released version of storied: use another schema or database",
            ),
        }
    }
}

/// Runs migrations in one transaction; concurrent callers wait and then find nothing to do.
pub(super) async fn migrate(
    connection: &mut PgConnection,
    schema: &Schema,
    sets: &[Set],
    codec: Option<Codec>,
    pooled: bool,
) -> Result<(), StoreError> {
    let migrating = |error| failed(MIGRATING, error);
    let mut transaction = connection.begin().await.map_err(migrating)?;
    // sqlx's migrator prepares named statements, and earlier clients may have left such names in a
    // pooler's session.
    let leave_nothing = if pooled { "; DEALLOCATE ALL" } else { "" };
    // A migration may take longer than an ordinary statement.
    let begin = format!(
        "SELECT pg_advisory_xact_lock({MIGRATION_LOCK}); SET LOCAL statement_timeout = 0{leave_nothing}"
    );
    (&mut *transaction).execute(AssertSqlSafe(begin)).await.map_err(migrating)?;
    // Read from the table: to_regnamespace may answer from a cache that lacks schemas created while
    // this session waited for the lock.
    let exists: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1)")
            .bind(schema.name())
            .persistent(false)
            .fetch_one(&mut *transaction)
            .await
            .map_err(migrating)?;
    // Checked first because CREATE SCHEMA needs a right even if the schema exists.
    if !exists {
        let create = AssertSqlSafe(format!("CREATE SCHEMA \"{}\"", schema.name()));
        (&mut *transaction).execute(create).await.map_err(migrating)?;
    }
    for set in sets {
        set.run(&mut transaction, schema).await.map_err(|error| set.refused(schema, error))?;
    }
    if let Some(codec) = codec {
        sqlx::query(schema.text(
            "INSERT INTO storied.meta (key, value) VALUES ('store_id', $1), ('codec', $2) ON CONFLICT DO NOTHING",
        ))
        .bind(Uuid::new_v4().to_string())
        .bind(codec.name())
        .persistent(false)
        .execute(&mut *transaction)
        .await
        .map_err(migrating)?;
        let known: bool =
            sqlx::query_scalar(schema.text("SELECT EXISTS (SELECT FROM storied.meta WHERE key = 'server')"))
                .persistent(false)
                .fetch_one(&mut *transaction)
                .await
                .map_err(migrating)?;
        if !known {
            let home = LogSql::new(|sql| schema.text(sql)).record_home;
            sqlx::query(home).persistent(false).execute(&mut *transaction).await.map_err(migrating)?;
        }
    }
    if pooled {
        (&mut *transaction).execute("DEALLOCATE ALL").await.map_err(migrating)?;
    }
    transaction.commit().await.map_err(migrating)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_follow_the_schema() {
        let schema = Schema::new("user").unwrap();
        for set in Set::all() {
            for migration in set.of(&schema) {
                assert!(!migration.sql.as_str().contains("storied."), "{}", migration.sql.as_str());
                assert!(migration.sql.as_str().contains("\"user\"."));
            }
        }
    }
}
