//! A call of any appends.

use sqlx::Row;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;

use super::super::connection::Session;
use super::super::convert::to_sql;
use super::super::inner::PgInner;
use super::one::{settled, single};
use super::reply::Reply;
use super::seen::{correlations, distinct, exact, seen_before};
use super::tags::EventTags;
use crate::event::NewEvent;
use crate::store::{Append, ExpectedVersion, StreamAppend};

/// The arguments of `storied.append()` that depend on what this process has seen.
pub(super) struct Numbered {
    pub(super) server: i64,
    /// Highest position of the events that known streams end with.
    position: Option<i64>,
    streams: Vec<Option<i64>>,
    categories: Vec<i32>,
    names: Vec<i32>,
}

/// Returns nothing if a name has no number; the numbers were dropped in between.
pub(super) fn numbered(core: &PgInner, appends: &[&Append]) -> Option<Numbered> {
    let mut known = core.numbers.of_server();
    let parts = || appends.iter().flat_map(|append| &append.streams);
    let mut position = None;
    let mut streams = Vec::new();
    for part in parts() {
        let last = seen_before(&mut known, part);
        position = position.max(last.map(|last| to_sql(last.position.get())));
        streams.push(last.map(|last| last.stream));
    }
    let categories = parts().map(|part| known.category(&part.stream)).collect::<Option<Vec<_>>>()?;
    let events = parts().flat_map(|part| &part.events);
    let names = events.map(|event| known.name(&event.name)).collect::<Option<Vec<_>>>()?;
    Some(Numbered { server: known.server, position, streams, categories, names })
}

/// Appends anything; with `look_up`, reads the versions of all streams first.
pub(super) async fn execute_many(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
    look_up: bool,
) -> Result<Option<Reply>, sqlx::Error> {
    let Some(numbered) = numbered(core, appends) else { return Ok(None) };
    let look_up = look_up || needs_look_up(appends);
    let tags = EventTags::of(events(appends));
    let row = if tags.is_empty() {
        bind(sqlx::query(core.sql.append.clone()), core, appends, &numbered, look_up)
    } else {
        tags.bind(bind(sqlx::query(core.sql.append_tagged.clone()), core, appends, &numbered, look_up))
    };
    let row = row.persistent(core.connections.persistent()).fetch_one(&mut **session).await?;
    decode(core, &row, appends, numbered.server)
}

/// Returns the events of appends, in the order of the arguments.
pub(super) fn events<'a>(appends: &[&'a Append]) -> impl Iterator<Item = &'a NewEvent> + Clone {
    appends.iter().flat_map(|append| &append.streams).flat_map(|part| &part.events)
}

/// Returns whether `storied.append()` has to read the versions of the streams first.
pub(super) fn needs_look_up(appends: &[&Append]) -> bool {
    !appends.iter().all(|it| matches!(it.streams.as_slice(), [only] if exact(only).is_some()))
}

/// Binds the arguments of `storied.append()`.
pub(super) fn bind<'q>(
    query: Query<'q, Postgres, PgArguments>,
    core: &PgInner,
    appends: &[&Append],
    numbered: &Numbered,
    look_up: bool,
) -> Query<'q, Postgres, PgArguments> {
    let parts =
        || appends.iter().enumerate().flat_map(|(unit, it)| it.streams.iter().map(move |part| (unit, part)));
    let events = || events(appends);
    let expected = |part: &StreamAppend| {
        exact(part).unwrap_or(if part.expected == ExpectedVersion::StreamExists { -2 } else { -1 })
    };
    let ids = parts().zip(&numbered.streams).map(|((_, part), known)| match known {
        Some(_) => None,
        None => Some(part.stream.id()),
    });
    query
        .bind(numbered.server)
        .bind(numbered.position)
        .bind(&numbered.streams)
        .bind(&numbered.categories)
        .bind(ids.collect::<Vec<_>>())
        .bind(parts().map(|(unit, _)| count(unit)).collect::<Vec<_>>())
        .bind(parts().map(|(_, part)| expected(part)).collect::<Vec<_>>())
        .bind(parts().map(|(_, part)| count(part.events.len())).collect::<Vec<_>>())
        .bind(look_up)
        .bind(distinct(&numbered.categories, &numbered.names))
        .bind(&numbered.names)
        .bind(events().map(|event| event.id).collect::<Vec<_>>())
        .bind(events().map(|event| event.command_id).collect::<Vec<_>>())
        .bind(events().map(|event| &*event.payload).collect::<Vec<&[u8]>>())
        .bind(events().map(|event| &*event.metadata).collect::<Vec<&[u8]>>())
        // Behind a pooler, the same connection may lead to another server.
        .bind(!core.connections.appends_in_transactions() && core.high_water_mark.can_skip_query())
        .bind(correlations(events()))
}

/// Decodes the result of `storied.append()`, in the first columns of a row.
pub(super) fn decode(
    core: &PgInner,
    row: &PgRow,
    appends: &[&Append],
    server: i64,
) -> Result<Option<Reply>, sqlx::Error> {
    let Some(mut reply) = Reply::decode(row, appends, server)? else {
        core.numbers.forget(server);
        return Ok(None);
    };
    if let (Some((part, event)), [Some(Ok(appended))]) = (single(appends), reply.outcomes.as_slice())
        && let (&[version], &[position]) = (appended.versions.as_slice(), appended.positions.as_slice())
    {
        let values: Option<Vec<i64>> = row.try_get(5)?;
        reply.settled = settled(core, part, event, version, position, &values.unwrap_or_default());
    }
    Ok(Some(reply))
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
