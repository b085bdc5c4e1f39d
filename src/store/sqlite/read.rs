//! Reading events. Every page is one statement and so one snapshot.

mod correlated;
mod decoder;
mod matching;

use futures_util::TryStreamExt;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

pub(super) use self::correlated::correlated;
use self::decoder::Decoder;
pub(super) use self::matching::matching;
use super::super::page_size::PageSizer;
use super::super::{CommandEvents, Filter, LogPage, ReadLog, StoreError};
use super::connection::Readers;
use super::convert::{from_sql, json_list, json_streams, to_sql};
use super::error::failed;
use super::number_cache::NumberCache;
use crate::codec::Codec;
use crate::event::{Category, EventName, Position, RecordedEvent, StreamId, Version};

const READING_LOG: &str = "reading the log";
const READING_STREAM: &str = "reading a stream";

/// The number of a stream; parameters: category and id.
const STREAM: &str = "(
    SELECT number FROM storied_streams
    WHERE stream_id = ?2 AND category = (SELECT number FROM storied_names WHERE name = ?1))";

/// Reads one page of the log.
///
/// The scan follows the position, whatever the filter (`NOT INDEXED` leaves only the primary key).
/// Each page starts at the end of the previous one, so all pages together are one pass over the
/// log, however long the lists are.
pub(super) async fn log(
    readers: &Readers,
    page_sizer: &PageSizer,
    cache: &NumberCache,
    codec: Codec,
    read: &ReadLog,
) -> Result<LogPage, StoreError> {
    let limit = page_sizer.events(read.limit);
    let anchor = cache.anchor();
    let mut reader = readers.get(READING_LOG).await?;
    let mut rows = sqlx::query(AssertSqlSafe(log_statement(&read.filter)))
        .bind(to_sql(read.after.get()))
        .bind(read.upto.map_or(i64::MAX, |upto| to_sql(upto.get())))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .bind(anchor.map(|(position, _)| to_sql(position.get())))
        .bind(read.filter.names().map(|names| json_list(names.iter().map(EventName::as_str))))
        .bind(read.filter.categories().map(|names| json_list(names.iter().map(Category::as_str))))
        .bind(read.filter.streams().map(json_streams))
        .fetch(&mut reader.connection);

    let mut decoder = Decoder::new(READING_LOG, codec, cache)?;
    let mut page = LogPage { events: Vec::new(), scanned_to: read.after, head: Position::START };
    let mut end = Position::START;
    let mut last = Position::START;
    let mut budget = page_sizer.page(limit);
    while let Some(row) = rows.try_next().await.map_err(|error| failed(READING_LOG, error))? {
        let position = Position::new(decoder.number(&row, 0)?);
        let Some(stream) = decoder.optional_number(&row, 1)? else {
            page.head = position;
            end = Position::new(decoder.number(&row, 2)?);
            let found: Option<Uuid> = row.try_get(4).map_err(|error| failed(READING_LOG, error))?;
            if anchor.is_some_and(|(_, id)| found != Some(id)) {
                cache.clear();
            }
            continue;
        };
        // SQLite keeps the order of an inner query, but does not guarantee it.
        if position <= last {
            return Err(decoder.corrupt(&format!("position {position} came after {last}")));
        }
        last = position;
        if budget.is_full() {
            continue;
        }
        let event = decoder.event(&row, stream, position, page.events.len())?;
        budget.take(&event);
        page.events.push(event);
    }
    drop(rows);
    if let Some(event) = page.events.last() {
        cache.read_log((event.position, event.id));
    }
    decoder.resolve(&mut reader.connection, &mut page.events).await?;
    reader.give_back();
    page.scanned_to = match page.events.last() {
        Some(last) if budget.is_full() => last.position,
        _ => end.max(read.after),
    };
    Ok(page)
}

/// Returns the statement for a page.
///
/// The first row, which has no stream, contains the end of the log, the end of the scan and the id
/// of the event at the position of the anchor. The conditions name numbers, which SQLite looks up
/// once for a page.
fn log_statement(filter: &Filter) -> String {
    format!(
        "SELECT coalesce(max(position), 0), NULL,
             (SELECT coalesce(max(position), 0) FROM storied_events WHERE position <= ?2),
             NULL, (SELECT id FROM storied_events WHERE position = ?4), NULL, NULL, NULL, NULL
         FROM storied_events
         UNION ALL
         SELECT * FROM (
             SELECT position, stream, version, name, id, command_id, payload, metadata, recorded_at
             FROM storied_events NOT INDEXED
             WHERE position > ?1 AND position <= ?2{}{}{}
             ORDER BY position LIMIT ?3)",
        if filter.names().is_some() {
            " AND name IN (SELECT number FROM storied_names WHERE name IN (SELECT value FROM json_each(?5)))"
        } else {
            ""
        },
        if filter.categories().is_some() {
            " AND category IN (SELECT number FROM storied_names WHERE name IN (SELECT value FROM json_each(?6)))"
        } else {
            ""
        },
        if filter.streams().is_some() {
            " AND stream IN (
                SELECT stream.number FROM json_each(?7) AS wanted
                CROSS JOIN storied_names AS category ON category.name = wanted.value ->> 0
                CROSS JOIN storied_streams AS stream
                    ON stream.stream_id = wanted.value ->> 1 AND stream.category = category.number)"
        } else {
            ""
        },
    )
}

/// Reads one page of a stream.
pub(super) async fn stream(
    readers: &Readers,
    cache: &NumberCache,
    codec: Codec,
    stream: &StreamId,
    after: Version,
    limit: usize,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let mut reader = readers.get(READING_STREAM).await?;
    let sql = format!(
        "SELECT position, stream, version, name, id, command_id, payload, metadata, recorded_at,
             (SELECT id FROM storied_events WHERE position = ?5)
         FROM storied_events WHERE stream = {STREAM} AND version > ?3 ORDER BY version LIMIT ?4"
    );
    let anchor = cache.anchor();
    let mut rows = sqlx::query(AssertSqlSafe(sql))
        .bind(stream.category())
        .bind(stream.id())
        .bind(to_sql(after.get()))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .bind(anchor.map(|(position, _)| to_sql(position.get())))
        .fetch(&mut reader.connection);
    let mut decoder = Decoder::new(READING_STREAM, codec, cache)?;
    let mut events: Vec<RecordedEvent> = Vec::new();
    let mut number = 0;
    while let Some(row) = rows.try_next().await.map_err(|error| failed(READING_STREAM, error))? {
        if events.is_empty() {
            let found: Option<Uuid> = row.try_get(9).map_err(|error| failed(READING_STREAM, error))?;
            if anchor.is_some_and(|(_, id)| found != Some(id)) {
                cache.clear();
            }
            number = decoder.optional_number(&row, 1)?.unwrap_or_default();
            decoder.streams.insert(number, stream.clone());
        }
        let position = Position::new(decoder.number(&row, 0)?);
        events.push(decoder.event(&row, number, position, events.len())?);
    }
    drop(rows);
    if let Some(event) = events.last() {
        cache.read_stream(stream, number, event.version, (event.position, event.id));
    }
    decoder.resolve(&mut reader.connection, &mut events).await?;
    reader.give_back();
    Ok(events)
}

/// Finds the events of a command in a stream.
///
/// `INDEXED BY` leaves one plan, whatever the statistics say. The entries of a command and a stream
/// have the order of the positions, which is that of the versions.
pub(super) async fn command_events(
    readers: &Readers,
    stream: &StreamId,
    command: Uuid,
) -> Result<Option<CommandEvents>, StoreError> {
    const DOING: &str = "looking up the events of a command";
    let mut reader = readers.get(DOING).await?;
    let sql = format!(
        "WITH found AS MATERIALIZED (
             SELECT (
                 SELECT position FROM storied_events INDEXED BY storied_events_by_command
                 WHERE command_id = ?3 AND stream = wanted.number ORDER BY position LIMIT 1) AS first, (
                 SELECT position FROM storied_events INDEXED BY storied_events_by_command
                 WHERE command_id = ?3 AND stream = wanted.number ORDER BY position DESC LIMIT 1) AS last
             FROM (SELECT {STREAM} AS number) AS wanted)
         SELECT first.version, last.version, last.position FROM found
         CROSS JOIN storied_events AS first ON first.position = found.first
         CROSS JOIN storied_events AS last ON last.position = found.last"
    );
    let row = sqlx::query(AssertSqlSafe(sql))
        .bind(stream.category())
        .bind(stream.id())
        .bind(command)
        .fetch_optional(&mut reader.connection)
        .await
        .map_err(|error| failed(DOING, error))?;
    reader.give_back();
    let Some(row) = row else { return Ok(None) };
    let number = |column| row.try_get::<i64, _>(column).map(from_sql).map_err(|error| failed(DOING, error));
    Ok(Some(CommandEvents {
        first: Version::new(number(0)?),
        last: Version::new(number(1)?),
        position: Position::new(number(2)?),
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
