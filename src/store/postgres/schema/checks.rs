//! Checks of the server, the database and the log that order and durability depend on.

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use super::super::error::failed;
use super::super::statements::Schema;
use crate::store::StoreError;

pub(super) const CHECKING: &str = "checking the database";

/// Oldest supported server version; the order of the log is proven and tested from it on.
const OLDEST_SERVER: i32 = 150_000;

/// Checks the server settings that order and durability of the log depend on.
pub(super) async fn check_server(connection: &mut PgConnection) -> Result<(), StoreError> {
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
pub(super) async fn check_database(connection: &mut PgConnection, schema: &Schema) -> Result<(), StoreError> {
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
pub(super) async fn check_log(connection: &mut PgConnection, schema: &Schema) -> Result<(), StoreError> {
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
    let name = schema.name();
    if let Some(unlogged) = row.try_get::<Option<String>, _>(10).map_err(checking)? {
        return incompatible(
            format!("logged tables and sequences in schema {name}"),
            format!("unlogged tables or sequences: {unlogged}"),
            "a crash empties unlogged ones, and a standby does not have them: ALTER TABLE … SET LOGGED, ALTER SEQUENCE … SET LOGGED".into(),
        );
    }
    check_sequence(&row, name)?;
    let last_event = row.try_get::<i64, _>(9).map_err(checking)?;
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

/// Checks the settings of the sequence of positions, in the first columns of the row.
fn check_sequence(row: &PgRow, name: &str) -> Result<(), StoreError> {
    let checking = |error| failed(CHECKING, error);
    let number = |column: usize| row.try_get::<i64, _>(column).map_err(checking);
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
    Ok(())
}

fn incompatible(expected: String, found: String, advice: String) -> Result<(), StoreError> {
    Err(StoreError::Incompatible { expected, found, advice })
}
