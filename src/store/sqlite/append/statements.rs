//! Statements of a transaction that reach the connection's thread in one hop.

use futures_util::StreamExt;
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqliteQueryResult, SqliteRow};
use sqlx::{Arguments, Either, Executor, SqlSafeStr};

use super::super::convert::to_sql;
use super::super::error::encoding;
use super::super::number_cache::Anchor;
use crate::store::StoreError;

pub(in crate::store::sqlite) const DOING: &str = "appending events";

pub(super) const BEGIN: &str = "BEGIN IMMEDIATE;\n";

/// Fails unless the log contains an event. Parameters: those of [`add_anchor`].
pub(super) const EXPECT_ANCHOR: &str = "INSERT INTO storied_expected_events (position, id) VALUES (?, ?);\n";

/// The results of statements, up to the first one that failed.
#[derive(Default)]
pub(super) struct Results {
    /// One for each completed statement.
    pub(super) done: Vec<SqliteQueryResult>,
    pub(super) rows: Vec<SqliteRow>,
    pub(super) error: Option<sqlx::Error>,
}

/// Runs statements until one of them fails.
pub(super) async fn run(
    connection: &mut SqliteConnection,
    sql: impl SqlSafeStr,
    arguments: SqliteArguments,
) -> Results {
    let mut results = Results::default();
    let mut stream = connection.fetch_many(sqlx::query_with(sql, arguments));
    while let Some(result) = stream.next().await {
        match result {
            Ok(Either::Left(done)) => results.done.push(done),
            Ok(Either::Right(row)) => results.rows.push(row),
            Err(error) => results.error = Some(error),
        }
    }
    results
}

/// Adds a value to the arguments of statements.
pub(super) fn add<'q, T>(arguments: &mut SqliteArguments, value: T) -> Result<(), StoreError>
where
    T: sqlx::Encode<'q, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    arguments.add(value).map_err(|error| encoding(DOING, error))
}

/// Adds the arguments of [`EXPECT_ANCHOR`].
pub(super) fn add_anchor(arguments: &mut SqliteArguments, (position, id): Anchor) -> Result<(), StoreError> {
    add(arguments, to_sql(position.get()))?;
    add(arguments, id)
}
