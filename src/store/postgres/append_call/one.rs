//! A call of a single event: the first one of its stream, or after one that this process has seen.

use chrono::DateTime;
use sqlx::Row;

use super::super::connection::Session;
use super::super::convert::{from_sql, to_sql};
use super::super::inner::PgInner;
use super::super::numbers::SeenEvent;
use super::reply::Reply;
use super::seen::exact;
use super::tags::EventTags;
use crate::event::{NewEvent, Position, RecordedEvent, Version};
use crate::store::{Append, Appended, StreamAppend};

/// Returns the only event of a call, and its stream.
pub(super) fn single<'a>(appends: &[&'a Append]) -> Option<(&'a StreamAppend, &'a NewEvent)> {
    let [append] = appends else { return None };
    let [part] = append.streams.as_slice() else { return None };
    let [event] = part.events.as_slice() else { return None };
    Some((part, event))
}

/// Appends a single event, the first one of a stream or after one that this process has seen; `None`
/// if it cannot.
pub(super) async fn execute_one(
    core: &PgInner,
    session: &mut Session,
    part: &StreamAppend,
    event: &NewEvent,
) -> Result<Option<Reply>, sqlx::Error> {
    let numbers = {
        let mut known = core.numbers.of_server();
        let last = known.last_event(&part.stream);
        (known.server, last, known.category(&part.stream), known.name(&event.name))
    };
    let (server, last, Some(category), Some(name)) = numbers else { return Ok(None) };
    let before = last.map_or(Version::NONE, |last| last.version);
    if exact(part) != Some(to_sql(before.get())) {
        return Ok(None);
    }
    let tags = EventTags::of(std::iter::once(event));
    let sql = if tags.is_empty() { &core.sql.append_one } else { &core.sql.append_one_tagged };
    let query = sqlx::query(sql.clone())
        .bind(server)
        .bind(last.map(|last| to_sql(last.position.get())))
        .bind(last.map(|last| last.stream))
        .bind(last.is_none().then(|| part.stream.id()))
        .bind(to_sql(before.get()))
        .bind(category)
        .bind(name)
        .bind(event.id)
        .bind(event.command_id)
        .bind(&*event.payload)
        .bind(&*event.metadata)
        .bind(core.high_water_mark.can_skip_query())
        .bind(event.own_correlation());
    let query = if tags.is_empty() { query } else { query.bind(tags.texts()) };
    let answer = query.persistent(core.connections.persistent()).fetch_one(&mut **session).await;
    let row = match answer {
        // The version is taken: `append()` finds out by whom. A taken position is an error.
        Err(sqlx::Error::Database(error)) if error.constraint() == Some("storied_events_version") => {
            return Ok(None);
        }
        answer => answer?,
    };
    let answer: Option<Vec<i64>> = row.try_get(0)?;
    let Some(&[stream, position, ref rest @ ..]) = answer.as_deref() else { return Ok(None) };
    let (version, position) = (before.plus(1), Position::new(from_sql(position)));
    let settled = settled(core, part, event, version, position, rest);
    let outcomes = vec![Some(Ok(Appended { versions: vec![version], positions: vec![position] }))];
    let seen = vec![(part.stream.clone(), SeenEvent { stream, version, position })];
    Ok(Some(Reply { outcomes, transaction: None, settled, server, seen }))
}

/// Decodes the result of `storied.settled()` for an appended event.
pub(super) fn settled(
    core: &PgInner,
    part: &StreamAppend,
    event: &NewEvent,
    version: Version,
    position: Position,
    values: &[i64],
) -> Option<(Position, RecordedEvent)> {
    let &[previous, recorded_at] = values else { return None };
    let event = RecordedEvent {
        id: event.id,
        stream: part.stream.clone(),
        version,
        position,
        name: event.name.clone(),
        codec: core.info.codec,
        payload: event.payload.clone(),
        command_id: event.command_id,
        metadata: event.metadata.clone(),
        recorded_at: DateTime::from_timestamp_micros(recorded_at)?,
    };
    Some((Position::new(from_sql(previous)), event))
}
