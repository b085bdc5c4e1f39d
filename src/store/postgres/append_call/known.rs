//! A call for streams whose last events this process has seen.

use sqlx::Row;

use super::super::connection::Session;
use super::super::convert::{from_sql, to_sql};
use super::super::inner::PgInner;
use super::super::numbers::SeenEvent;
use super::reply::Reply;
use super::seen::{correlations, distinct, seen_before};
use super::tags::EventTags;
use crate::event::{Position, Version};
use crate::store::{Append, Appended};

/// The arguments of `storied.append_known()`, one entry for each event.
#[derive(Default)]
pub(super) struct Known {
    server: i64,
    /// Indexes of the appends, sorted by stream: transactions with common streams wait in one order.
    order: Vec<usize>,
    position: Position,
    streams: Vec<i64>,
    expected: Vec<i64>,
    categories: Vec<i32>,
    names: Vec<i32>,
}

/// Returns nothing unless this process has seen the event before each append.
pub(super) fn known(core: &PgInner, appends: &[&Append]) -> Option<Known> {
    let mut numbers = core.numbers.of_server();
    let mut parts = Vec::with_capacity(appends.len());
    for (index, append) in appends.iter().enumerate() {
        let [part] = append.streams.as_slice() else { return None };
        parts.push((index, part, seen_before(&mut numbers, part)?));
    }
    parts.sort_unstable_by_key(|(_, _, last)| last.stream);
    let mut known = Known { server: numbers.server, ..Known::default() };
    for (index, part, last) in parts {
        known.order.push(index);
        known.position = known.position.max(last.position);
        let category = numbers.category(&part.stream)?;
        for (event, n) in part.events.iter().zip(0..) {
            known.streams.push(last.stream);
            known.expected.push(to_sql(last.version.plus(n).get()));
            known.categories.push(category);
            known.names.push(numbers.name(&event.name)?);
        }
    }
    Some(known)
}

/// Appends after events that this process has seen; `None` if it cannot.
pub(super) async fn execute_known(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
    known: Known,
) -> Result<Option<Reply>, sqlx::Error> {
    let parts =
        || known.order.iter().flat_map(|&index| appends.get(index)).flat_map(|append| &append.streams);
    let events = || parts().flat_map(|part| &part.events);
    let tags = EventTags::of(events());
    let sql = if tags.is_empty() { &core.sql.append_known } else { &core.sql.append_known_tagged };
    let query = sqlx::query(sql.clone())
        .bind(known.server)
        .bind(to_sql(known.position.get()))
        .bind(distinct(&known.categories, &known.names))
        .bind(&known.streams)
        .bind(&known.expected)
        .bind(&known.categories)
        .bind(&known.names)
        .bind(events().map(|event| event.id).collect::<Vec<_>>())
        .bind(events().map(|event| event.command_id).collect::<Vec<_>>())
        .bind(events().map(|event| &*event.payload).collect::<Vec<&[u8]>>())
        .bind(events().map(|event| &*event.metadata).collect::<Vec<&[u8]>>())
        .bind(correlations(events()));
    let query = if tags.is_empty() { query } else { tags.bind(query) };
    let row = query.persistent(core.connections.persistent()).fetch_one(&mut **session).await?;
    let positions: Option<Vec<i64>> = row.try_get(0)?;
    let Some(positions) = positions else { return Ok(None) };
    let mut rows = known.streams.iter().zip(&known.expected).zip(positions);
    let (mut outcomes, mut seen) = (vec![None; appends.len()], Vec::with_capacity(appends.len()));
    for (&index, part) in known.order.iter().zip(parts()) {
        let mut appended = Appended { versions: Vec::with_capacity(1), positions: Vec::new() };
        let mut last = None;
        for ((&stream, &before), position) in rows.by_ref().take(part.events.len()) {
            let (version, position) =
                (Version::new(from_sql(before)).plus(1), Position::new(from_sql(position)));
            appended.positions.push(position);
            last = Some(SeenEvent { stream, version, position });
        }
        appended.versions.extend(last.map(|last| last.version));
        seen.extend(last.map(|last| (part.stream.clone(), last)));
        if let Some(outcome) = outcomes.get_mut(index) {
            *outcome = Some(Ok(appended));
        }
    }
    Ok(Some(Reply { outcomes, transaction: None, settled: None, server: known.server, seen }))
}
