//! The optional index of the log by name.

use std::sync::Arc;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use super::super::connection::Connections;
use super::super::error::failed;
use super::super::statements::Schema;
use super::checks::CHECKING;
use super::migrations::MIGRATION_LOCK;
use crate::store::StoreError;

const INDEXING: &str = "creating the index by name";

/// Returns whether the log has a valid index by name.
pub(super) async fn is_indexed_by_name(
    connection: &mut PgConnection,
    schema: &Schema,
) -> Result<bool, StoreError> {
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
pub(super) async fn index(
    connections: &Arc<Connections>,
    schema: &Schema,
    may_migrate: bool,
) -> Result<(), StoreError> {
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
