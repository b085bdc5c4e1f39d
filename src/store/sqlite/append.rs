//! Appends a batch with few statements, because each costs a hop to the connection's thread.

use std::collections::HashMap;
use std::sync::LazyLock;

use sqlx::error::BoxDynError;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{Arguments, Row};
use uuid::Uuid;

use super::super::append::SizeLimits;
use super::super::version_check::StreamVersions;
use super::super::{Append, AppendError, Appended, StoreError};
use super::convert::{from_sql, json_streams, now, to_sql};
use super::error::failed;
use crate::event::{NewEvent, Position, StreamId, Version};

const DOING: &str = "appending events";

/// SQLite limits a row to 1,000,000,000 bytes; the other columns are small.
pub(super) const LIMITS: SizeLimits = SizeLimits { event: 999_000_000, batch: usize::MAX };

const COLUMNS: usize = 10;

/// INSERT statements for 1, 2, 4 … 64 rows.
///
/// Any number of rows needs few of them, and all stay prepared.
static INSERTS: LazyLock<Vec<(usize, String)>> = LazyLock::new(|| {
    let row = format!("({})", ["?"; COLUMNS].join(", "));
    (0..=6)
        .rev()
        .map(|power| {
            let rows = 1 << power;
            let sql = format!(
                "INSERT INTO storied_events (position, category, stream_id, version, name, id, command_id, payload, metadata, recorded_at) VALUES {}",
                vec![row.as_str(); rows].join(", ")
            );
            (rows, sql)
        })
        .collect()
});

/// The result of writing a batch in a transaction.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) answers: Vec<Result<Appended, AppendError>>,
    /// First written event: if it is in the log, all are.
    pub(super) proof: Option<(Position, Uuid)>,
}

/// Writes a batch, inside a transaction that holds the write lock.
pub(super) async fn write(
    connection: &mut SqliteConnection,
    batch: &[Append],
) -> Result<Written, StoreError> {
    let mut versions = load(connection, batch).await?;
    let mut rows = Vec::new();
    let mut answers = Vec::with_capacity(batch.len());
    for append in batch {
        let answer = versions.assign(append);
        if let Ok(appended) = &answer {
            add_rows(&mut rows, append, appended);
        }
        answers.push(answer.map_err(AppendError::from));
    }
    insert(connection, &rows).await?;
    Ok(Written { answers, proof: rows.first().map(EventRow::proof) })
}

/// Loads the end of the log and of every stream in the batch, with one statement.
async fn load(connection: &mut SqliteConnection, batch: &[Append]) -> Result<StreamVersions, StoreError> {
    let streams: Vec<&StreamId> =
        batch.iter().flat_map(|append| &append.streams).map(|part| &part.stream).collect();
    let rows = sqlx::query(
        "SELECT NULL, coalesce(max(position), 0) FROM storied_events
         UNION ALL
         SELECT wanted.key, coalesce(
             (SELECT max(version) FROM storied_events
              WHERE stream_id = wanted.value ->> 1 AND category = wanted.value ->> 0),
             0)
         FROM json_each(?) AS wanted",
    )
    .bind(json_streams(streams.iter().copied()))
    .fetch_all(connection)
    .await
    .map_err(|error| failed(DOING, error))?;
    let mut last = Position::START;
    let mut versions = HashMap::with_capacity(streams.len());
    for row in rows {
        let key: Option<i64> = row.try_get(0).map_err(|error| failed(DOING, error))?;
        let number = from_sql(row.try_get(1).map_err(|error| failed(DOING, error))?);
        match key.map(|key| usize::try_from(key).ok().and_then(|key| streams.get(key))) {
            None => last = Position::new(number),
            Some(Some(&stream)) => _ = versions.insert(stream.clone(), Version::new(number)),
            Some(None) => {
                return Err(StoreError::Corrupt {
                    reason: format!("{DOING}: SQLite returned an unexpected stream"),
                });
            }
        }
    }
    Ok(StreamVersions::new(versions, last))
}

/// An event with its version and position.
struct EventRow<'a> {
    position: Position,
    stream: &'a StreamId,
    version: Version,
    event: &'a NewEvent,
}

impl EventRow<'_> {
    fn proof(&self) -> (Position, Uuid) {
        (self.position, self.event.id)
    }
}

/// Adds the rows of a decided append.
fn add_rows<'a>(rows: &mut Vec<EventRow<'a>>, append: &'a Append, appended: &Appended) {
    let mut positions = appended.positions.iter();
    for (part, end) in append.streams.iter().zip(&appended.versions) {
        let before = end.get() - part.events.len() as u64;
        for ((event, &position), n) in part.events.iter().zip(&mut positions).zip(1..) {
            rows.push(EventRow { position, stream: &part.stream, version: Version::new(before + n), event });
        }
    }
}

async fn insert(connection: &mut SqliteConnection, rows: &[EventRow<'_>]) -> Result<(), StoreError> {
    let recorded_at = now();
    let mut rest = rows;
    for (size, sql) in INSERTS.iter() {
        while let Some((chunk, behind)) = rest.split_at_checked(*size) {
            let mut arguments = SqliteArguments::default();
            arguments.reserve(chunk.len() * COLUMNS, 0);
            for row in chunk {
                add(&mut arguments, row, recorded_at)
                    .map_err(|error| failed(DOING, sqlx::Error::Encode(error)))?;
            }
            sqlx::query_with(sql.as_str(), arguments)
                .execute(&mut *connection)
                .await
                .map_err(|error| failed(DOING, error))?;
            rest = behind;
        }
    }
    Ok(())
}

/// Adds the arguments in the order of the columns in [`INSERTS`].
fn add(arguments: &mut SqliteArguments, row: &EventRow<'_>, recorded_at: i64) -> Result<(), BoxDynError> {
    arguments.add(to_sql(row.position.get()))?;
    arguments.add(row.stream.category())?;
    arguments.add(row.stream.id())?;
    arguments.add(to_sql(row.version.get()))?;
    arguments.add(row.event.name.as_str())?;
    arguments.add(row.event.id)?;
    arguments.add(row.event.command_id)?;
    arguments.add(&*row.event.payload)?;
    arguments.add(&*row.event.metadata)?;
    arguments.add(recorded_at)
}
