//! Reading events. Every page is one statement and so one snapshot.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::page_size::PageSizer;
use super::super::{CommandEvents, LogPage, ReadLog, StoreError};
use super::connection::Readers;
use super::convert::{from_sql, json_list, json_streams, to_sql};
use super::error::failed;
use crate::codec::Codec;
use crate::event::{Category, EventName, Position, RecordedEvent, StreamId, Version};

const READING_LOG: &str = "reading the log";
/// Table of the log.
const EVENTS: &str = "storied_events";
const READING_STREAM: &str = "reading a stream";

/// Reads one page of the log.
///
/// The scan follows the position, whatever the filter (`NOT INDEXED` leaves only the primary key).
/// Each page starts at the end of the previous one, so all pages together are one pass over the
/// log, however long the lists are.
pub(super) async fn log(
    readers: &Readers,
    page_sizer: &PageSizer,
    codec: Codec,
    read: &ReadLog,
) -> Result<LogPage, StoreError> {
    let limit = page_sizer.events(read.limit);
    let names = read.filter.names().map(|names| json_list(names.iter().map(EventName::as_str)));
    let categories =
        read.filter.categories().map(|categories| json_list(categories.iter().map(Category::as_str)));
    let streams = read.filter.streams().map(json_streams);
    // The first row, which has no category, contains the end of the log and the end of the scan.
    let sql = format!(
        "SELECT coalesce(max(position), 0), NULL, NULL,
             (SELECT coalesce(max(position), 0) FROM storied_events WHERE position <= ?2),
             NULL, NULL, NULL, NULL, NULL, NULL
         FROM storied_events
         UNION ALL
         SELECT * FROM (
             SELECT position, category, stream_id, version, name, id, command_id, payload, metadata, recorded_at
             FROM storied_events NOT INDEXED
             WHERE position > ?1 AND position <= ?2{}{}{}
             ORDER BY position LIMIT ?3)",
        if names.is_some() { " AND name IN (SELECT value FROM json_each(?4))" } else { "" },
        if categories.is_some() { " AND category IN (SELECT value FROM json_each(?5))" } else { "" },
        if streams.is_some() {
            " AND (category, stream_id) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?6))"
        } else {
            ""
        },
    );
    let mut reader = readers.get(READING_LOG).await?;
    let mut rows = sqlx::query(AssertSqlSafe(sql))
        .bind(to_sql(read.after.get()))
        .bind(read.upto.map_or(i64::MAX, |upto| to_sql(upto.get())))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .bind(names)
        .bind(categories)
        .bind(streams)
        .fetch(&mut reader.connection);

    let mut decoder = Decoder::new(READING_LOG, codec);
    let mut page = LogPage { events: Vec::new(), scanned_to: read.after, head: Position::START };
    let mut end = Position::START;
    let mut last = Position::START;
    let mut budget = page_sizer.page(limit);
    while let Some(row) = rows.try_next().await.map_err(|error| failed(READING_LOG, error))? {
        let position = Position::new(decoder.number(&row, 0)?);
        match row.try_get::<Option<&str>, _>(1).map_err(|error| failed(READING_LOG, error))? {
            None => {
                page.head = position;
                end = Position::new(decoder.number(&row, 3)?);
            }
            Some(category) => {
                // SQLite keeps the order of an inner query, but does not guarantee it.
                if position <= last {
                    return Err(decoder.corrupt(&format!("position {position} came after {last}")));
                }
                last = position;
                if budget.is_full() {
                    continue;
                }
                let category = decoder.category(category)?;
                let id = row.try_get::<&str, _>(2).map_err(|error| failed(READING_LOG, error))?;
                let stream = StreamId::stored(category, Arc::from(id));
                let event = decoder.event(&row, 3, stream, position)?;
                budget.take(&event);
                page.events.push(event);
            }
        }
    }
    drop(rows);
    reader.give_back();
    page.scanned_to = match page.events.last() {
        Some(last) if budget.is_full() => last.position,
        _ => end.max(read.after),
    };
    Ok(page)
}

/// Reads one page of a stream.
pub(super) async fn stream(
    readers: &Readers,
    codec: Codec,
    stream: &StreamId,
    after: Version,
    limit: usize,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let mut reader = readers.get(READING_STREAM).await?;
    let mut rows = sqlx::query(
        "SELECT position, version, name, id, command_id, payload, metadata, recorded_at
         FROM storied_events WHERE stream_id = ? AND category = ? AND version > ? ORDER BY version LIMIT ?",
    )
    .bind(stream.id())
    .bind(stream.category())
    .bind(to_sql(after.get()))
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch(&mut reader.connection);
    let mut decoder = Decoder::new(READING_STREAM, codec);
    let mut events = Vec::new();
    while let Some(row) = rows.try_next().await.map_err(|error| failed(READING_STREAM, error))? {
        let position = Position::new(decoder.number(&row, 0)?);
        events.push(decoder.event(&row, 1, stream.clone(), position)?);
    }
    drop(rows);
    reader.give_back();
    Ok(events)
}

/// Finds the events of a command in a stream.
///
/// `INDEXED BY` leaves one plan, whatever the statistics say.
pub(super) async fn command_events(
    readers: &Readers,
    stream: &StreamId,
    command: Uuid,
) -> Result<Option<CommandEvents>, StoreError> {
    const DOING: &str = "looking up the events of a command";
    let mut reader = readers.get(DOING).await?;
    let row = sqlx::query(
        "SELECT min(version), max(version), (
             SELECT position FROM storied_events INDEXED BY storied_events_by_command
             WHERE command_id = ?1 AND stream_id = ?2 AND category = ?3 ORDER BY version DESC LIMIT 1)
         FROM (
             SELECT * FROM (
                 SELECT version FROM storied_events INDEXED BY storied_events_by_command
                 WHERE command_id = ?1 AND stream_id = ?2 AND category = ?3 ORDER BY version LIMIT 1)
             UNION ALL
             SELECT * FROM (
                 SELECT version FROM storied_events INDEXED BY storied_events_by_command
                 WHERE command_id = ?1 AND stream_id = ?2 AND category = ?3 ORDER BY version DESC LIMIT 1))",
    )
    .bind(command)
    .bind(stream.id())
    .bind(stream.category())
    .fetch_one(&mut reader.connection)
    .await
    .map_err(|error| failed(DOING, error))?;
    reader.give_back();
    let number = |column| row.try_get::<Option<i64>, _>(column).map_err(|error| failed(DOING, error));
    let found = (number(0)?, number(1)?, number(2)?);
    let (Some(first), Some(last), Some(position)) = found else { return Ok(None) };
    Ok(Some(CommandEvents {
        first: Version::new(from_sql(first)),
        last: Version::new(from_sql(last)),
        position: Position::new(from_sql(position)),
    }))
}

/// Returns the last event of the log, which is the high-water mark (I1).
///
/// SQLite commits in the order of positions, so no event appears below it.
pub(super) async fn high_water_mark(readers: &Readers) -> Result<Position, StoreError> {
    const DOING: &str = "reading the high-water mark";
    let mut reader = readers.get(DOING).await?;
    let last: i64 = sqlx::query_scalar("SELECT coalesce(max(position), 0) FROM storied_events")
        .fetch_one(&mut reader.connection)
        .await
        .map_err(|error| failed(DOING, error))?;
    reader.give_back();
    Ok(Position::new(from_sql(last)))
}

/// Returns whether the event `id` is at `position`.
pub(super) async fn is_at(readers: &Readers, position: Position, id: Uuid) -> Result<bool, StoreError> {
    const DOING: &str = "looking up an event";
    let mut reader = readers.get(DOING).await?;
    let found: Option<Uuid> = sqlx::query_scalar("SELECT id FROM storied_events WHERE position = ?")
        .bind(to_sql(position.get()))
        .fetch_optional(&mut reader.connection)
        .await
        .map_err(|error| failed(DOING, error))?;
    reader.give_back();
    Ok(found == Some(id))
}

/// Decodes rows into events.
///
/// A page has few names and categories and many events, so each name is allocated and checked once.
struct Decoder {
    doing: &'static str,
    codec: Codec,
    names: HashSet<EventName>,
    categories: HashSet<Category>,
}

impl Decoder {
    fn new(doing: &'static str, codec: Codec) -> Self {
        Self { doing, codec, names: HashSet::new(), categories: HashSet::new() }
    }

    fn number(&self, row: &SqliteRow, column: usize) -> Result<u64, StoreError> {
        Columns::of(EVENTS, row).number(column).map_err(|error| failed(self.doing, error))
    }

    fn category(&mut self, text: &str) -> Result<Category, StoreError> {
        if let Some(category) = self.categories.get(text) {
            return Ok(category.clone());
        }
        let category = Category::new(text).map_err(|error| self.corrupt(&error.to_string()))?;
        self.categories.insert(category.clone());
        Ok(category)
    }

    fn name(&mut self, text: &str) -> Result<EventName, StoreError> {
        if let Some(name) = self.names.get(text) {
            return Ok(name.clone());
        }
        let name = EventName::new(text).map_err(|error| self.corrupt(&error.to_string()))?;
        self.names.insert(name.clone());
        Ok(name)
    }

    fn corrupt(&self, reason: &str) -> StoreError {
        StoreError::Corrupt { reason: format!("{}: {reason}", self.doing) }
    }

    /// Decodes the event with the columns from version to time, which begin at `first`.
    fn event(
        &mut self,
        row: &SqliteRow,
        first: usize,
        stream: StreamId,
        position: Position,
    ) -> Result<RecordedEvent, StoreError> {
        let doing = self.doing;
        let bytes = |column: usize| row.try_get::<Vec<u8>, _>(column).map(Bytes::from);
        let columns = || -> Result<_, sqlx::Error> {
            Ok((
                row.try_get::<&str, _>(first + 1)?,
                row.try_get::<Uuid, _>(first + 2)?,
                row.try_get::<Uuid, _>(first + 3)?,
                bytes(first + 4)?,
                bytes(first + 5)?,
                Columns::of(EVENTS, row).time(first + 6)?,
            ))
        };
        let (name, id, command_id, payload, metadata, recorded_at) =
            columns().map_err(|error| failed(doing, error))?;
        Ok(RecordedEvent {
            id,
            stream,
            version: Version::new(self.number(row, first)?),
            position,
            name: self.name(name)?,
            codec: self.codec,
            payload,
            command_id,
            metadata,
            recorded_at,
        })
    }
}
