//! Inserts the events of a batch and commits.

use std::fmt::Write;
use std::sync::LazyLock;

use serde_json::Value;
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqliteQueryResult};
use sqlx::{Arguments, AssertSqlSafe, SqlSafeStr, SqlStr};

use super::super::convert::{from_sql, now, to_sql};
use super::super::number_cache::Anchor;
use super::statements::{BEGIN, DOING, EXPECT_ANCHOR, Results, add, add_anchor, run};
use crate::event::{NewEvent, Position, StreamId};
use crate::store::StoreError;

/// Number of columns without the position, which SQLite assigns: one more than the last.
const COLUMNS: usize = 10;

/// Numbers of rows that a statement has room for.
///
/// A batch takes the next larger statement, whose other rows are NULL. So all stay prepared.
const SIZES: [usize; 11] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128];

struct Statements {
    size: usize,
    insert: String,
    /// A whole transaction.
    transaction: SqlStr,
}

static STATEMENTS: LazyLock<[Statements; SIZES.len()]> = LazyLock::new(|| {
    SIZES.map(|size| {
        let row = format!("({})", ["?"; COLUMNS].join(", "));
        let rows = vec![row; size].join(", ");
        let insert = format!(
            "INSERT INTO storied_events (stream, version, category, name, recorded_at, id, command_id, payload, metadata, correlation_id)
             SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL;\n"
        );
        let transaction = AssertSqlSafe(format!("{BEGIN}{EXPECT_ANCHOR}{insert}COMMIT")).into_sql_str();
        Statements { size, insert, transaction }
    })
});

const CREATE_STREAMS: &str = "
    INSERT INTO storied_streams (number, category, stream_id)
    SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?);\n";

/// Inserts the tags of the events that the next statement inserts, from the end of the log on.
///
/// It precedes that statement, whose spare parameters would take any argument that follows its own.
const INSERT_TAGS: &str = "
    INSERT INTO storied_tags (tag, position, name)
    SELECT value ->> 0, (SELECT coalesce(max(position), 0) FROM storied_events) + (value ->> 1), value ->> 2
    FROM json_each(?);\n";

/// An event with its numbers.
#[derive(Debug)]
pub(super) struct EventRow<'b> {
    pub(super) stream: i64,
    pub(super) version: u64,
    pub(super) category: i64,
    pub(super) name: i64,
    pub(super) event: &'b NewEvent,
}

/// A stream that the batch creates.
#[derive(Debug)]
pub(super) struct NewStream<'b> {
    pub(super) number: i64,
    pub(super) category: i64,
    pub(super) stream: &'b StreamId,
}

/// The reason why a transaction is not committed.
#[derive(Debug)]
pub(super) enum Failure {
    Insert(sqlx::Error),
    /// The commit failed; the position is that of the last event.
    Commit(Position, sqlx::Error),
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Inserts all rows and commits; returns the position of the last one.
///
/// Begins the transaction if it is not `begun`.
pub(super) async fn insert_and_commit(
    connection: &mut SqliteConnection,
    rows: &[EventRow<'_>],
    created: &[NewStream<'_>],
    anchor: Option<Anchor>,
    begun: bool,
) -> Result<Position, Failure> {
    let recorded_at = now();
    let mut rest = rows;
    let mut begun = begun;
    let mut end = Position::START;
    while !rest.is_empty() {
        let fitting = STATEMENTS.iter().find(|statements| statements.size >= rest.len());
        let statements = fitting.unwrap_or(&STATEMENTS[SIZES.len() - 1]);
        let (chunk, after) = rest.split_at(rest.len().min(statements.size));
        let (is_first, is_last) = (rest.len() == rows.len(), after.is_empty());
        let created = if is_first { created } else { &[] };
        let tags = json_tags(chunk);
        let mut arguments = SqliteArguments::default();
        arguments.reserve(chunk.len() * COLUMNS + 4, 0);
        let mut before = 0;
        let mut sql = String::new();
        if !begun {
            (before, sql) = (1, BEGIN.to_owned());
            if let Some(anchor) = anchor {
                (before, sql) = (2, sql + EXPECT_ANCHOR);
                add_anchor(&mut arguments, anchor)?;
            }
        }
        if !created.is_empty() {
            (before, sql) = (before + 1, sql + CREATE_STREAMS);
            add(&mut arguments, json(created))?;
        }
        if let Some(tags) = &tags {
            (before, sql) = (before + 1, sql + INSERT_TAGS);
            add(&mut arguments, &**tags)?;
        }
        for row in chunk {
            add_row(&mut arguments, row, recorded_at)?;
        }
        let sql = match before {
            2 if !begun && created.is_empty() && tags.is_none() && is_last => statements.transaction.clone(),
            _ => {
                let commit = if is_last { "COMMIT" } else { "" };
                AssertSqlSafe(format!("{sql}{}{commit}", statements.insert)).into_sql_str()
            }
        };
        let Results { done, error, .. } = run(connection, sql, arguments).await;
        let Some(inserted) = done.get(before) else {
            let error = error.unwrap_or(sqlx::Error::WorkerCrashed);
            return Err(Failure::Insert(error));
        };
        let position = check(inserted, chunk.len());
        // The commit has a result of its own: without it, the outcome is unknown.
        let committed = !is_last || done.len() > before + 1;
        end = match (position, error) {
            (Ok(position), None) if committed => position,
            (Ok(position), error) => {
                return Err(Failure::Commit(position, error.unwrap_or(sqlx::Error::WorkerCrashed)));
            }
            (Err(reason), None) if is_last => {
                return Err(StoreError::OutcomeUnknown { reason, source: None }.into());
            }
            (Err(reason), _) => return Err(StoreError::Corrupt { reason }.into()),
        };
        (begun, rest) = (true, after);
    }
    Ok(end)
}

/// Checks that SQLite inserted all rows, and returns the position of the last one.
///
/// # Errors
/// The reason, if a trigger of the application has left rows out.
fn check(inserted: &SqliteQueryResult, rows: usize) -> Result<Position, String> {
    let found = inserted.rows_affected();
    if found != rows as u64 {
        return Err(format!("{DOING}: expected {rows} new rows in storied_events, found {found}"));
    }
    Ok(Position::new(from_sql(inserted.last_insert_rowid())))
}

/// Encodes new streams as `[[number, category, id], …]`.
fn json(created: &[NewStream<'_>]) -> String {
    let mut json = String::from("[");
    for new in created {
        let id = Value::from(new.stream.id());
        let comma = if json.len() > 1 { "," } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(json, "{comma}[{},{},{id}]", new.number, new.category);
    }
    json.push(']');
    json
}

/// Encodes the tags of rows as `[[tag, row, name], …]`, with rows counted from 1.
///
/// Returns `None` if the rows have no tags.
fn json_tags(rows: &[EventRow<'_>]) -> Option<String> {
    if rows.iter().all(|row| row.event.tags.is_empty()) {
        return None;
    }
    let tags = rows.iter().zip(1_u64..).flat_map(|(row, n)| {
        row.event.tags.iter().map(move |tag| vec![Value::from(tag.as_str()), n.into(), row.name.into()])
    });
    Some(Value::from_iter(tags).to_string())
}

/// Adds the arguments of a row in the order of the columns.
fn add_row(arguments: &mut SqliteArguments, row: &EventRow<'_>, recorded_at: i64) -> Result<(), StoreError> {
    add(arguments, row.stream)?;
    add(arguments, to_sql(row.version))?;
    add(arguments, row.category)?;
    add(arguments, row.name)?;
    add(arguments, recorded_at)?;
    add(arguments, row.event.id)?;
    add(arguments, row.event.command_id)?;
    add(arguments, &*row.event.payload)?;
    add(arguments, &*row.event.metadata)?;
    add(arguments, row.event.own_correlation())
}
