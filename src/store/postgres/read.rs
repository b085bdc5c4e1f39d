//! Reading events.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::super::columns::Time;
use super::super::{Filter, LogPage, ReadLog, StoreError};
use super::connection::Session;
use super::convert::{from_sql, to_sql};
use super::error::failed;
use super::inner::PgInner;
use super::numbering::{learn_streams, resolve};
use super::numbers::{NumberedEvents, SeenEvent};
use crate::codec::Codec;
use crate::event::{Category, EventName, InvalidName, Position, RecordedEvent, StreamId, Version};

const READING_LOG: &str = "reading the log";
const READING_STREAM: &str = "reading a stream";

/// Maximum number of positions that a page with a filter scans.
///
/// It bounds the cost whatever the page finds: some milliseconds of server time.
const WINDOW: i64 = 50_000;

/// Maximum number of names looked up in the index by name, each up to the page size.
///
/// With more names the log is scanned.
const LOOKED_UP: usize = 16;

/// Maximum number of filter values for a prepared statement.
///
/// A statement with more values is planned each time with the values: PostgreSQL then builds a hash
/// table of them.
const FEW: usize = 64;

/// Maximum number of events read beyond the mark without a query of the mark.
const ADJACENT: usize = 64;

/// Maximum number of positions that are read without the filter, which is then applied here.
///
/// The statements with a filter need a second round trip to find where such a page ends.
const NARROW: u64 = 64;

/// Reads one page of the log.
///
/// The page ends at a mark that an earlier statement determined, on whichever connection. Every
/// event up to the mark is visible to any statement that begins later (I1). Events that follow the
/// mark without a hole need no new mark: see [`adjacent`].
pub(super) async fn log(core: &Arc<PgInner>, read: &ReadLog) -> Result<LogPage, StoreError> {
    // While the reader is below the cached mark, the cached mark suffices.
    let mut found = match core.high_water_mark.cached(read.after) {
        Some(head) => page(core, read, head).await?,
        None => LogPage { events: Vec::new(), scanned_to: read.after, head: read.after },
    };
    // If the request does not go beyond the cached mark, the current mark is not needed.
    if found.has_more() || read.upto.is_some_and(|upto| read.after < upto && upto <= found.head) {
        return Ok(found);
    }
    if adjacent(core, read, &mut found).await? {
        return Ok(found);
    }
    found.head = core.high_water_mark.refresh(&core.connections, &core.sql).await?;
    let left = read.limit.max(1) - found.events.len();
    if left > 0 {
        let rest = ReadLog { after: found.scanned_to, limit: left, ..read.clone() };
        let rest = page(core, &rest, found.head).await?;
        found.scanned_to = rest.scanned_to;
        found.events.extend(rest.events);
    }
    Ok(found)
}

/// Extends a page that ends at the mark by the events whose positions follow without a hole.
///
/// All these positions are taken, so no event can appear between them later (I1). Returns whether the
/// page then reaches the last visible event or the end of the request. Otherwise the current mark
/// decides how far it goes.
async fn adjacent(core: &Arc<PgInner>, read: &ReadLog, page: &mut LogPage) -> Result<bool, StoreError> {
    let Some(known) = core.high_water_mark.id_at(page.scanned_to) else { return Ok(false) };
    // For readers that follow the log, not for those that look up an event.
    if read.limit < page.events.len() + ADJACENT {
        return Ok(false);
    }
    let limit = core.page_sizer.events(ADJACENT);
    let mut session = core.connections.get(READING_LOG).await?;
    let rows = sqlx::query(core.sql.adjacent.clone())
        .bind(to_sql(page.scanned_to.get()))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(READING_LOG, error))?;
    session.finish(READING_LOG).await?;
    let mut decoder = Decoder::new(READING_LOG, core.info.codec)?;
    let mut budget = core.page_sizer.page(limit);
    let (mut upto, mut last, mut taken) = (page.scanned_to, None, NumberedEvents::default());
    for row in &rows {
        let there: Option<Uuid> = row.try_get(9).map_err(|error| failed(READING_LOG, error))?;
        let (event, numbers) = decoder.of_log(row)?;
        // Another server that took over may lack the event at the mark.
        let is_next = event.position.get() == upto.get() + 1;
        if there != Some(known) || !is_next || read.upto.is_some_and(|end| event.position > end) {
            break;
        }
        budget.take(&event);
        (upto, last) = (event.position, Some(event.id));
        taken.events.push(event);
        taken.numbers.push(numbers);
    }
    let count = taken.events.len();
    learn_streams(core, READING_LOG, &rows, [8, 10, 11])?;
    let events = resolve(core, READING_LOG, taken).await?;
    page.events.extend(events.into_iter().filter(|event| read.filter.matches(event)));
    page.scanned_to = upto;
    let Some(id) = last else { return Ok(false) };
    page.head = page.scanned_to;
    core.high_water_mark.advance(page.head, Some(id));
    Ok(count == rows.len() && count < limit || Some(page.scanned_to) == read.upto)
}

/// Returns the id of the event at `position`, also above the high-water mark.
pub(super) async fn event_id_at(core: &Arc<PgInner>, position: Position) -> Result<Option<Uuid>, StoreError> {
    const DOING: &str = "looking up an event";
    let mut session = core.connections.get(DOING).await?;
    let id = sqlx::query_scalar(core.sql.event_at.clone())
        .bind(to_sql(position.get()))
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    Ok(id)
}

async fn page(core: &Arc<PgInner>, read: &ReadLog, head: Position) -> Result<LogPage, StoreError> {
    let mut page = LogPage { events: Vec::new(), scanned_to: read.after, head };
    let end = read.upto.map_or(head, |upto| upto.min(head));
    if end <= read.after {
        return Ok(page);
    }
    if let Some((events, scanned_to)) = core.high_water_mark.recent(core.connections.begun(), read, end) {
        return Ok(LogPage { events, scanned_to, head });
    }
    let filter = &read.filter;
    let limit = core.page_sizer.events(read.limit);
    let mut session = core.connections.get(READING_LOG).await?;
    let mut found;
    if *filter == Filter::all() || end.get() - read.after.get() <= NARROW && limit as u64 >= NARROW {
        found = query(core, &mut session, read, limit, Wanted::All, end).await?;
        // The end may lie in a hole that is never filled.
        page.scanned_to = found.last.unwrap_or(read.after);
    } else if let Some(names) = looked_up(core, filter) {
        found = query(core, &mut session, read, limit, Wanted::Names(names), end).await?;
        page.scanned_to = match found.end {
            Some(last) => last,
            None if end == head => head,
            None => last_event(core, &mut session, read.after, end, i64::MAX).await?.unwrap_or(read.after),
        };
    } else {
        let after = to_sql(read.after.get());
        let near = Position::new(from_sql(to_sql(end.get()).min(after.saturating_add(WINDOW))));
        found = query(core, &mut session, read, limit, Wanted::Filter(filter), near).await?;
        page.scanned_to = match found.end {
            Some(last) => last,
            None => match last_event(core, &mut session, read.after, near, WINDOW).await? {
                Some(last) => last,
                // The hole is wider than the window.
                None => match last_event(core, &mut session, read.after, end, WINDOW).await? {
                    Some(end) => {
                        found = query(core, &mut session, read, limit, Wanted::Filter(filter), end).await?;
                        found.end.unwrap_or(end)
                    }
                    None => read.after,
                },
            },
        };
    }
    // If rows are left unread, the connection is closed: reusing it would require receiving them.
    if found.cut {
        drop(session);
    } else {
        session.finish(READING_LOG).await?;
    }
    page.events = resolve(core, READING_LOG, found.events).await?;
    page.events.retain(|event| filter.matches(event));
    Ok(page)
}

/// The events that a statement found.
struct Found {
    events: NumberedEvents,
    /// Position of the last event.
    last: Option<Position>,
    /// Position of the last event, if more events may follow it.
    end: Option<Position>,
    /// Whether rows of the statement were left unread.
    cut: bool,
}

/// Returns the names of `filter`, if the index by name is the better access path.
///
/// The caller applies the other conditions of the filter.
fn looked_up<'a>(core: &PgInner, filter: &'a Filter) -> Option<Vec<&'a str>> {
    let names = filter.names()?;
    let looked_up = core.indexed_by_name && filter.streams().is_none() && names.len() <= LOOKED_UP;
    looked_up.then(|| names.iter().map(EventName::as_str).collect())
}

/// Returns the last event at most `span` positions after the first one after `after`, up to `end`.
async fn last_event(
    core: &PgInner,
    session: &mut Session,
    after: Position,
    end: Position,
    span: i64,
) -> Result<Option<Position>, StoreError> {
    let found: Option<Option<i64>> = sqlx::query_scalar(core.sql.last_event.clone())
        .bind(to_sql(after.get()))
        .bind(to_sql(end.get()))
        .bind(span)
        .persistent(core.connections.persistent())
        .fetch_optional(&mut **session)
        .await
        .map_err(|error| failed(READING_LOG, error))?;
    Ok(found.flatten().map(|position| Position::new(from_sql(position))))
}

/// The events that a statement selects.
enum Wanted<'a> {
    All,
    Filter(&'a Filter),
    /// Events with any of these names, by the index.
    Names(Vec<&'a str>),
}

/// Reads up to `limit` events after the position of `read`, up to `end`, as far as the page has
/// budget.
async fn query(
    core: &PgInner,
    session: &mut Session,
    read: &ReadLog,
    limit: usize,
    wanted: Wanted<'_>,
    end: Position,
) -> Result<Found, StoreError> {
    let persistent = core.connections.persistent();
    let sql = match wanted {
        Wanted::All => &core.sql.log,
        Wanted::Filter(_) => &core.sql.filtered,
        Wanted::Names(_) => &core.sql.by_name,
    };
    let query = sqlx::query(sql.clone())
        .bind(to_sql(read.after.get()))
        .bind(to_sql(end.get()))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX));
    let query = match wanted {
        Wanted::All => query.persistent(persistent),
        Wanted::Names(names) => query.bind(names).persistent(persistent),
        Wanted::Filter(filter) => {
            let names: Option<Vec<&str>> =
                filter.names().map(|names| names.iter().map(EventName::as_str).collect());
            let categories: Option<Vec<&str>> =
                filter.categories().map(|categories| categories.iter().map(Category::as_str).collect());
            let streams: Option<(Vec<&str>, Vec<&str>)> =
                filter.streams().map(|streams| streams.iter().map(|it| (it.category(), it.id())).unzip());
            let values = names.as_ref().map_or(0, Vec::len)
                + categories.as_ref().map_or(0, Vec::len)
                + streams.as_ref().map_or(0, |(categories, _)| categories.len());
            let (of_streams, ids) = streams.unzip();
            query
                .bind(names)
                .bind(categories)
                .bind(of_streams)
                .bind(ids)
                .persistent(persistent && values <= FEW)
        }
    };
    let mut decoder = Decoder::new(READING_LOG, core.info.codec)?;
    let mut budget = core.page_sizer.page(limit);
    let mut events = NumberedEvents::default();
    let mut rows = query.fetch(&mut **session);
    while !budget.is_cut()
        && let Some(row) = rows.try_next().await.map_err(|error| failed(READING_LOG, error))?
    {
        let (event, numbers) = decoder.of_log(&row)?;
        budget.take(&event);
        events.events.push(event);
        events.numbers.push(numbers);
    }
    let last = events.events.last().map(|last| last.position);
    Ok(Found { events, last, end: last.filter(|_| budget.is_full()), cut: budget.is_cut() })
}

/// Reads one page of a stream.
pub(super) async fn stream(
    core: &Arc<PgInner>,
    stream: &StreamId,
    after: Version,
    limit: usize,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let mut session = core.connections.get(READING_STREAM).await?;
    let mut decoder = Decoder::new(READING_STREAM, core.info.codec)?;
    let mut found = NumberedEvents::default();
    let mut last = None;
    {
        let mut rows = sqlx::query(core.sql.stream.clone())
            .bind(stream.category())
            .bind(stream.id())
            .bind(to_sql(after.get()))
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .persistent(core.connections.persistent())
            .fetch(&mut *session);
        while let Some(row) = rows.try_next().await.map_err(|error| failed(READING_STREAM, error))? {
            let (event, name) = decoder.event(&row, stream.clone())?;
            found.events.push(event);
            found.numbers.push((name, None));
            last = Some(row);
        }
    }
    session.finish(READING_STREAM).await?;
    if let (Some(row), Some(event)) = (last, found.events.last()) {
        let number = |column| row.try_get::<i64, _>(column).map_err(|error| failed(READING_STREAM, error));
        let (number, server) = (number(8)?, number(9)?);
        let seen = SeenEvent { stream: number, version: event.version, position: event.position };
        core.numbers.learn(server, vec![(stream.clone(), seen)]);
    }
    resolve(core, READING_STREAM, found).await
}

/// Decodes rows into events, without their names and streams, which the rows have as numbers.
///
/// Columns are decoded without type checks, because the statements of this module fix their types.
pub(super) struct Decoder {
    doing: &'static str,
    codec: Codec,
    /// Stands for the name and the stream of an event until their numbers are resolved.
    unresolved: (EventName, StreamId),
}

impl Decoder {
    pub(super) fn new(doing: &'static str, codec: Codec) -> Result<Self, StoreError> {
        let names = || Ok((EventName::new("unresolved")?, StreamId::new("unresolved", "0")?));
        let names: Result<_, InvalidName> = names();
        let corrupt = |error: InvalidName| StoreError::Corrupt { reason: error.to_string() };
        Ok(Self { doing, codec, unresolved: names.map_err(corrupt)? })
    }

    fn corrupt(&self, reason: &str) -> StoreError {
        StoreError::Corrupt { reason: format!("{}: {reason}", self.doing) }
    }

    /// Decodes a row that includes the stream; returns the numbers of the name and of the stream.
    pub(super) fn of_log(&mut self, row: &PgRow) -> Result<(RecordedEvent, (i32, Option<i64>)), StoreError> {
        let stream = row.try_get_unchecked::<i64, _>(8).map_err(|error| failed(self.doing, error))?;
        let (event, name) = self.event(row, self.unresolved.1.clone())?;
        Ok((event, (name, Some(stream))))
    }

    /// Decodes a row; returns the number of the name.
    fn event(&mut self, row: &PgRow, stream: StreamId) -> Result<(RecordedEvent, i32), StoreError> {
        let bytes = |column: usize| row.try_get_unchecked::<Vec<u8>, _>(column).map(Bytes::from);
        let columns = || -> Result<_, sqlx::Error> {
            Ok((
                row.try_get_unchecked::<i64, _>(0)?,
                row.try_get_unchecked::<i64, _>(1)?,
                row.try_get_unchecked::<i32, _>(2)?,
                row.try_get_unchecked::<Uuid, _>(3)?,
                row.try_get_unchecked::<Uuid, _>(4)?,
                bytes(5)?,
                bytes(6)?,
                row.try_get_unchecked::<Time, _>(7)?.0,
            ))
        };
        let (position, version, name, id, command_id, payload, metadata, recorded_at) =
            columns().map_err(|error| match error {
                sqlx::Error::ColumnDecode { source, index } if index == "7" => {
                    self.corrupt(&format!("events.recorded_at: {source}"))
                }
                other => failed(self.doing, other),
            })?;
        let number = |column: &str, number: i64| {
            let negative = |_| self.corrupt(&format!("events.{column} is {number}"));
            u64::try_from(number).map_err(negative)
        };
        let event = RecordedEvent {
            id,
            stream,
            version: Version::new(number("version", version)?),
            position: Position::new(number("position", position)?),
            name: self.unresolved.0.clone(),
            codec: self.codec,
            payload,
            command_id,
            metadata,
            recorded_at,
        };
        Ok((event, name))
    }
}
