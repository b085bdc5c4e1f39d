//! Prepares a database for a store: migrations, identity, and the checks for a safe log.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use sqlx::migrate::{Migrate, MigrateError, Migration, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use uuid::Uuid;

use super::super::{Adoption, Home, StoreError};
use super::connection::Connections;
use super::error::failed;
use super::statements::{LogSql, Schema};
use crate::codec::Codec;

const CHECKING: &str = "checking the database";
const MIGRATING: &str = "preparing storied's tables";
const INDEXING: &str = "creating the index by name";

/// Key of the advisory lock for creating tables.
const MIGRATION_LOCK: i64 = 7_310_323_741_263_721_841;

/// Oldest supported server version; the order of the log is proven and tested from it on.
const OLDEST_SERVER: i32 = 150_000;

/// A set of migrations, recorded in a table of its own beside those of the application.
struct Set {
    table: &'static str,
    migrator: Migrator,
}

impl Set {
    /// Returns the migrations of the log and of its readers' progress.
    fn all() -> [Self; 2] {
        [Self { table: "migrations", migrator: sqlx::migrate!("migrations/postgres") }, Self::progress()]
    }

    fn progress() -> Self {
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
    async fn is_current(&self, connection: &mut PgConnection, schema: &Schema) -> Result<bool, StoreError> {
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
        if let Some(newer) = applied.keys().filter(|version| !self.migrator.version_exists(**version)).max() {
            return Err(self.refused(schema, MigrateError::VersionMissing(*newer)));
        }
        for migration in self.migrator.iter() {
            if applied.get(&migration.version).is_some_and(|sum| **sum != *migration.checksum) {
                return Err(self.refused(schema, MigrateError::VersionMismatch(migration.version)));
            }
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

/// The facts about an opened event store.
pub(super) struct Prepared {
    pub(super) id: Uuid,
    pub(super) adoption: Adoption,
    /// Whether the log has an index by name.
    pub(super) indexed_by_name: bool,
}

/// Makes the schema an event store if it is not one yet, and checks that it is safe.
pub(super) async fn prepare(
    connections: &Arc<Connections>,
    schema: &Schema,
    codec: Codec,
    may_migrate: bool,
    index_by_name: bool,
) -> Result<Prepared, StoreError> {
    let mut session = connections.get(CHECKING).await?;
    check_server(&mut session).await?;
    check_database(&mut session, schema).await?;
    let mut current = true;
    for set in Set::all() {
        current &= set.is_current(&mut session, schema).await?;
    }
    session.finish(CHECKING).await?;
    if !current {
        if !may_migrate {
            return Err(StoreError::Incompatible {
                expected: format!("storied's tables in schema {} in this program's version", schema.name()),
                found: "no tables, or older ones".into(),
                advice: "run a program that may migrate (PostgresOptions::migrate), with a login that may create tables"
                    .into(),
            });
        }
        let mut session = connections.acquire(MIGRATING).await?;
        migrate(&mut session, schema, &Set::all(), Some(codec), !connections.persistent()).await?;
        if connections.persistent() {
            session.finish(MIGRATING).await?;
        }
    }
    let mut session = connections.get(CHECKING).await?;
    check_log(&mut session, schema).await?;
    let (id, adoption) = identity(&mut session, schema, codec).await?;
    let mut indexed = is_indexed_by_name(&mut session, schema).await?;
    session.finish(CHECKING).await?;
    if index_by_name && !indexed {
        index(connections, schema, may_migrate).await?;
        indexed = true;
    }
    Ok(Prepared { id, adoption, indexed_by_name: indexed })
}

/// Returns whether the log has a valid index by name.
async fn is_indexed_by_name(connection: &mut PgConnection, schema: &Schema) -> Result<bool, StoreError> {
    let found: Option<bool> =
        sqlx::query_scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)")
            .bind(format!("\"{}\".events_by_name", schema.name()))
            .persistent(false)
            .fetch_optional(connection)
            .await
            .map_err(|error| failed(CHECKING, error))?;
    Ok(found.unwrap_or(false))
}

/// Creates the index by name.
async fn index(connections: &Arc<Connections>, schema: &Schema, may_migrate: bool) -> Result<(), StoreError> {
    let name = schema.name();
    let create = format!("CREATE INDEX CONCURRENTLY events_by_name ON {name}.events (name, position)");
    let missing = |found: &str, advice: String| StoreError::Incompatible {
        expected: format!("an index {name}.events_by_name"),
        found: found.into(),
        advice,
    };
    if !may_migrate {
        return Err(missing("no valid index", format!("let the owner of the tables run {create}")));
    }
    let mut session = connections.begin(INDEXING).await?;
    let indexing = |error| failed(INDEXING, error);
    // As in a migration, other processes wait for the lock and then find the index.
    let begin = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK}); SET LOCAL statement_timeout = 0");
    (&mut *session).execute(AssertSqlSafe(begin)).await.map_err(indexing)?;
    let make = schema.text("CREATE INDEX IF NOT EXISTS events_by_name ON storied.events (name, position)");
    (&mut *session).execute(make).await.map_err(indexing)?;
    let valid = is_indexed_by_name(&mut session, schema).await?;
    session.finish(INDEXING).await?;
    if !valid {
        let advice =
            format!("wait until it is built, or drop an abandoned one: DROP INDEX {name}.events_by_name");
        return Err(missing("an invalid index", advice));
    }
    Ok(())
}

/// Creates the tables for checkpoints and parked events if needed, in any database.
pub(crate) async fn prepare_read_model(
    connection: &mut PgConnection,
    schema: &Schema,
) -> Result<(), StoreError> {
    check_database(connection, schema).await?;
    let set = Set::progress();
    if set.is_current(connection, schema).await? {
        return Ok(());
    }
    migrate(connection, schema, &[set], None, false).await
}

/// Runs migrations in one transaction; concurrent callers wait and then find nothing to do.
async fn migrate(
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
            let home = LogSql::new(schema).record_home;
            sqlx::query(home).persistent(false).execute(&mut *transaction).await.map_err(migrating)?;
        }
    }
    if pooled {
        (&mut *transaction).execute("DEALLOCATE ALL").await.map_err(migrating)?;
    }
    transaction.commit().await.map_err(migrating)
}

/// Checks the server settings that order and durability of the log depend on.
async fn check_server(connection: &mut PgConnection) -> Result<(), StoreError> {
    let checking = |error| failed(CHECKING, error);
    let row = sqlx::query(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'),
            pg_is_in_recovery(), current_setting('synchronous_commit'),
            current_setting('default_transaction_isolation'), current_setting('default_transaction_read_only'),
            current_setting('fsync')",
    )
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(checking)?;
    let misconfigured = |expected: &str, found: String, advice: &str| {
        Err(StoreError::Misconfigured { expected: expected.into(), found, advice: advice.into() })
    };
    let text = |column: usize| row.try_get::<String, _>(column).map_err(checking);
    if row.try_get::<i32, _>(0).map_err(checking)? < OLDEST_SERVER {
        return misconfigured(
            "PostgreSQL 15 or newer",
            format!("PostgreSQL {}", text(1)?),
            "update the server",
        );
    }
    if row.try_get::<bool, _>(2).map_err(checking)? {
        return misconfigured(
            "a primary server",
            "a standby in recovery".into(),
            "connect to the primary: a standby accepts no events and does not know up to where the log is complete",
        );
    }
    if text(3)? == "off" {
        return misconfigured(
            "synchronous_commit on",
            "synchronous_commit off".into(),
            "remove the setting for this server, database and login: events would be acknowledged before they are durable",
        );
    }
    if text(4)? != "read committed" {
        return misconfigured(
            "default_transaction_isolation 'read committed'",
            format!("'{}'", text(4)?),
            "remove the setting for this server, database and login: readers would miss events under another isolation level",
        );
    }
    if text(5)? == "on" {
        return misconfigured(
            "default_transaction_read_only off",
            "default_transaction_read_only on".into(),
            "remove the setting for this server, database and login",
        );
    }
    if text(6)? == "off" {
        tracing::warn!(
            "PostgreSQL runs with fsync = off: a crash of its machine can destroy the event store"
        );
    }
    Ok(())
}

/// Highest position: the key of the low-water lock has 44 bits for it.
const LAST_POSITION: i64 = (1 << 44) - 1;

/// Checks the encoding of the database and the schema of tables created without one.
async fn check_database(connection: &mut PgConnection, schema: &Schema) -> Result<(), StoreError> {
    let checking = |error| failed(CHECKING, error);
    let (encoding, database, default): (String, String, Option<String>) = sqlx::query_as(
        "SELECT current_setting('server_encoding'), current_database()::text, current_schema()::text",
    )
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(checking)?;
    if encoding != "UTF8" {
        return Err(StoreError::Incompatible {
            expected: "a database with the encoding UTF8".into(),
            found: format!("database {database} with the encoding {encoding}"),
            advice: "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0: in another encoding single ids and names cannot be stored".into(),
        });
    }
    if default.as_deref() == Some(schema.name()) {
        tracing::warn!(
            schema = schema.name(),
            "tables that the application creates without a schema go into the schema of storied: use a login with another name, or set search_path to the application's schema"
        );
    }
    Ok(())
}

/// Checks the objects of the schema that order and durability of the log depend on.
async fn check_log(connection: &mut PgConnection, schema: &Schema) -> Result<(), StoreError> {
    let checking = |error| failed(CHECKING, error);
    let row = sqlx::query(schema.text(
        "SELECT s.seqtypid::regtype::text, s.seqincrement, s.seqmin, s.seqmax, s.seqstart, s.seqcache, s.seqcycle,
            pg_sequence_last_value('storied.positions'), has_sequence_privilege('storied.positions', 'USAGE, SELECT'),
            (SELECT coalesce(max(position), 0) FROM storied.events),
            (SELECT string_agg(c.relname, ', ' ORDER BY c.relname) FROM pg_catalog.pg_class AS c
                WHERE c.relnamespace = (SELECT e.relnamespace FROM pg_catalog.pg_class AS e WHERE e.oid = 'storied.events'::regclass)
                    AND c.relkind IN ('r', 'S') AND c.relpersistence <> 'p')
         FROM pg_sequence AS s WHERE s.seqrelid = 'storied.positions'::regclass",
    ))
    .persistent(false)
    .fetch_one(&mut *connection)
    .await
    .map_err(checking)?;
    let number = |column: usize| row.try_get::<i64, _>(column).map_err(checking);
    let incompatible = |expected: String, found: String, advice: String| {
        Err(StoreError::Incompatible { expected, found, advice })
    };
    let name = schema.name();
    if let Some(unlogged) = row.try_get::<Option<String>, _>(10).map_err(checking)? {
        return incompatible(
            format!("logged tables and sequences in schema {name}"),
            format!("unlogged tables or sequences: {unlogged}"),
            "a crash empties unlogged ones, and a standby does not have them: ALTER TABLE … SET LOGGED, ALTER SEQUENCE … SET LOGGED".into(),
        );
    }
    let settings = |kind: &str, [increment, min, max, start, cache]: [i64; 5], cycle: bool| {
        let cycle = if cycle { "CYCLE" } else { "NO CYCLE" };
        format!(
            "AS {kind} INCREMENT {increment} MINVALUE {min} MAXVALUE {max} START {start} CACHE {cache} {cycle}"
        )
    };
    let expected = settings("bigint", [1, 1, LAST_POSITION, 1, 1], false);
    let found = settings(
        &row.try_get::<String, _>(0).map_err(checking)?,
        [number(1)?, number(2)?, number(3)?, number(4)?, number(5)?],
        row.try_get(6).map_err(checking)?,
    );
    if found != expected {
        return incompatible(
            format!("the sequence {name}.positions {expected}"),
            found,
            format!(
                "readers could miss events: stop all writers and ALTER SEQUENCE {name}.positions {expected}"
            ),
        );
    }
    let last_event = number(9)?;
    let last_value = match row.try_get::<Option<i64>, _>(7).map_err(checking)? {
        Some(last_value) => last_value,
        // From PostgreSQL 17 on, a missing right is not an error.
        None if !row.try_get::<bool, _>(8).map_err(checking)? => {
            return Err(StoreError::Storage {
                reason: format!(
                    "{CHECKING}: permission denied for sequence {name}.positions; GRANT this login the rights in docs/postgres-grants.sql"
                ),
                source: None,
            });
        }
        None if last_event == 0 => 0,
        // No value was drawn since RESTART, or since setval() with false.
        None => {
            let next: i64 = sqlx::query_scalar(schema.text("SELECT last_value FROM storied.positions"))
                .persistent(false)
                .fetch_one(&mut *connection)
                .await
                .map_err(checking)?;
            next - 1
        }
    };
    if last_value < last_event {
        return incompatible(
            format!("the sequence {name}.positions at {last_event} or higher, where the last event is"),
            format!("{last_value}"),
            format!(
                "a copy or restore has not advanced the sequence: stop all writers and SELECT setval('{name}.positions', {last_event})"
            ),
        );
    }
    Ok(())
}

/// Returns the identity of the store, created with its tables, and whether this database is its
/// home.
async fn identity(
    connection: &mut PgConnection,
    schema: &Schema,
    codec: Codec,
) -> Result<(Uuid, Adoption), StoreError> {
    let found = home_of(connection, schema).await?;
    let meta: HashMap<String, String> = sqlx::query(schema.text("SELECT key, value FROM storied.meta"))
        .persistent(false)
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect())
        .map_err(|error| failed(CHECKING, error))?;
    let value = |key: &str| {
        meta.get(key)
            .map(String::as_str)
            .ok_or_else(|| StoreError::Corrupt { reason: format!("{}.meta has no {key}", schema.name()) })
    };
    let database = Database::of(value("server")?, value("database_oid")?, value("database")?);
    let recorded = database.home(value("schema_oid")?, value("schema")?);
    let adoption = Adoption::of(recorded, found);
    let found = value("codec")?;
    if Codec::from_name(found) != Some(codec) {
        return Err(StoreError::Incompatible {
            expected: format!("an event store with {codec} payloads"),
            found: format!("an event store with {found} payloads"),
            advice: "open it with the codec of its creation (PostgresOptions::codec), or use another schema"
                .into(),
        });
    }
    let id = value("store_id")?;
    let id = id.parse().map_err(|error| StoreError::Corrupt {
        reason: format!("{}.meta has the store id {id:?}: {error}", schema.name()),
    })?;
    Ok((id, adoption))
}

/// A database of a server.
pub(crate) struct Database {
    /// System identifier and object id.
    ///
    /// Both survive a failover to a streaming standby and a renaming. A copy made by the server or
    /// by `pg_restore` never has both.
    identity: String,
    /// Display form, such as `database shop (16384) of server 7312…`.
    shown: String,
}

impl Database {
    fn of(server: &str, oid: &str, name: &str) -> Self {
        Self {
            identity: format!("{server} {oid}"),
            shown: format!("database {name} ({oid}) of server {server}"),
        }
    }

    /// Returns the home of a store in this database.
    ///
    /// The object id of its schema survives a renaming; a copy made by `pg_restore` never has it.
    fn home(&self, oid: &str, name: &str) -> Home {
        Home {
            identity: format!("{} {oid}", self.identity),
            shown: format!("schema {name} ({oid}) in {}", self.shown),
        }
    }

    /// Returns whether the home of the store is in this database.
    pub(crate) fn holds(&self, home: &Home) -> bool {
        home.identity.rsplit_once(' ').is_some_and(|(database, _)| database == self.identity)
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Returns the database of a connection.
pub(crate) async fn database_of(connection: &mut PgConnection) -> Result<Database, StoreError> {
    let (server, oid, name): (String, String, String) = sqlx::query_as(
        "SELECT system_identifier::text, oid::text, datname::text FROM pg_control_system(), pg_database
         WHERE datname = current_database()",
    )
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| failed(CHECKING, error))?;
    Ok(Database::of(&server, &oid, &name))
}

/// Returns the home of the store in `schema`.
async fn home_of(connection: &mut PgConnection, schema: &Schema) -> Result<Home, StoreError> {
    let database = database_of(connection).await?;
    let oid: String = sqlx::query_scalar(
        schema
            .text("SELECT relnamespace::text FROM pg_catalog.pg_class WHERE oid = 'storied.meta'::regclass"),
    )
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| failed(CHECKING, error))?;
    Ok(database.home(&oid, schema.name()))
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
