//! One call of `storied.append()`: one round trip and one commit.

use std::sync::Arc;

use chrono::DateTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::{Append, AppendError, Appended, Conflict, ExpectedVersion, StoreError, StreamAppend};
use super::append_failure::{CommitHandle, DOING, Failure};
use super::connection::Session;
use super::convert::{from_sql, to_sql};
use super::durability;
use super::error::{ErrorClass, class_of, failed};
use super::inner::PgInner;
use super::numbering::{NumberingError, number_names};
use super::numbers::{SeenEvent, ServerNumbers};
use crate::event::{NewEvent, Position, RecordedEvent, StreamId, Version};

/// The outcome of an append.
///
/// `None` if another writer was faster, but the expected versions may still hold.
pub(super) type Outcome = Option<Result<Appended, AppendError>>;

/// Sends appends in one transaction; returns the outcome of each.
pub(super) async fn call(core: &Arc<PgInner>, appends: &[&Append]) -> Result<Vec<Outcome>, Failure> {
    core.stuck.check()?;
    number_names(core, appends).await.map_err(|error| match error {
        NumberingError::Store(error) => Failure::Failed(error),
        NumberingError::Database(error) if class_of(&error) == ErrorClass::Unknown => {
            core.connections.purge();
            Failure::NotSent(failed(DOING, error))
        }
        NumberingError::Database(error) => Failure::answered(error),
    })?;
    let explicit = core.connections.appends_in_transactions();
    let server = core.connections.begun();
    let session =
        if explicit { core.connections.begin(DOING).await } else { core.connections.acquire(DOING).await };
    let mut session = session.map_err(Failure::Failed)?;
    let (reply, mut cancelled) = core.watched(core.timed(execute(core, &mut session, appends))).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) if class_of(&error) == ErrorClass::Unknown => {
            core.connections.purge();
            let backend = session.backend();
            drop(session);
            let error = failed(DOING, error);
            return Err(match backend {
                // Without a commit, the server rolls back as soon as it notices the loss.
                _ if explicit => Failure::NotSent(error),
                Some(backend) => Failure::Unknown(error, CommitHandle::Backend(backend)),
                None => Failure::Failed(StoreError::OutcomeUnknown {
                    reason: format!(
                        "{error}; the server process is unknown, so the events cannot be looked up"
                    ),
                    source: Some(Arc::new(error)),
                }),
            });
        }
        Err(error) => {
            if class_of(&error) == ErrorClass::Failed {
                // Another server may be the primary now: the next attempt opens a new connection.
                core.connections.purge();
            } else {
                session.roll_back().await;
            }
            return Err(Failure::answered(error));
        }
    };
    let Some(Reply { outcomes, transaction, settled, server: number, seen }) = reply else {
        session.roll_back().await;
        return Err(Failure::OtherServer);
    };
    let (done, cancelled_at_end) = core.watched(core.timed(session.done())).await;
    if explicit {
        // A warning before the commit does not concern the wait of the commit.
        cancelled = cancelled_at_end;
    }
    match done {
        // I3: the server reports success, but perhaps no standby has the commit.
        Ok(()) if cancelled => Err(Failure::Unknown(durability::cancelled(), CommitHandle::Committed)),
        Ok(()) => {
            // Not for a connection opened since, which may lead to another server.
            if let Some((previous, event)) = settled
                && core.connections.begun() == server
            {
                core.high_water_mark.advance_locally(server, previous, event);
            }
            core.numbers.learn(number, seen);
            Ok(outcomes)
        }
        Err(error) if class_of(&error) == ErrorClass::Unknown => {
            core.connections.purge();
            let error = failed(DOING, error);
            Err(match transaction {
                Some(transaction) => Failure::Unknown(error, CommitHandle::Transaction(transaction)),
                None => Failure::NotSent(error),
            })
        }
        Err(error) => Err(Failure::answered(error)),
    }
}

/// Returns nothing if the numbers are those of another server process.
async fn execute(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
) -> Result<Option<Reply>, sqlx::Error> {
    let mut look_up = false;
    // Not in an explicit transaction: its end is looked up by its id, which only `append()`
    // returns.
    if !core.connections.appends_in_transactions() {
        let reply = match single(appends) {
            Some((part, event)) => execute_one(core, session, part, event).await?,
            None => match known(core, appends) {
                Some(known) => {
                    look_up = true;
                    execute_known(core, session, appends, known).await?
                }
                None => None,
            },
        };
        if reply.is_some() {
            return Ok(reply);
        }
    }
    execute_many(core, session, appends, look_up).await
}

/// Returns the only event of a call, and its stream.
fn single<'a>(appends: &[&'a Append]) -> Option<(&'a StreamAppend, &'a NewEvent)> {
    let [append] = appends else { return None };
    let [part] = append.streams.as_slice() else { return None };
    let [event] = part.events.as_slice() else { return None };
    Some((part, event))
}

/// Returns the version that a part expects, if it is a single one.
fn exact(part: &StreamAppend) -> Option<i64> {
    match part.expected {
        ExpectedVersion::Exact(version) => Some(to_sql(version.get())),
        ExpectedVersion::NoStream => Some(0),
        ExpectedVersion::Any | ExpectedVersion::StreamExists => None,
    }
}

/// Returns the event that a part follows, if this process has seen it.
fn seen_before(known: &mut ServerNumbers, part: &StreamAppend) -> Option<SeenEvent> {
    known.last_event(&part.stream).filter(|last| exact(part) == Some(to_sql(last.version.get())))
}

/// Returns each of the categories and names once.
fn distinct(categories: &[i32], names: &[i32]) -> Vec<i32> {
    let mut used = [categories, names].concat();
    used.sort_unstable();
    used.dedup();
    used
}

/// Appends a single event after one that this process has seen; `None` if it cannot.
async fn execute_one(
    core: &PgInner,
    session: &mut Session,
    part: &StreamAppend,
    event: &NewEvent,
) -> Result<Option<Reply>, sqlx::Error> {
    let numbers = {
        let mut known = core.numbers.of_server();
        let last = seen_before(&mut known, part);
        (known.server, last, known.category(&part.stream), known.name(&event.name))
    };
    let (server, Some(last), Some(category), Some(name)) = numbers else { return Ok(None) };
    let answer: Result<Option<Vec<i64>>, _> = sqlx::query_scalar(core.sql.append_one.clone())
        .bind(server)
        .bind(to_sql(last.position.get()))
        .bind(last.stream)
        .bind(to_sql(last.version.get()))
        .bind(category)
        .bind(name)
        .bind(event.id)
        .bind(event.command_id)
        .bind(&*event.payload)
        .bind(&*event.metadata)
        .bind(core.high_water_mark.can_skip_query())
        .persistent(core.connections.persistent())
        .fetch_one(&mut **session)
        .await;
    let answer = match answer {
        // The version is taken: `append()` finds out by whom.
        Err(sqlx::Error::Database(error)) if error.is_unique_violation() => return Ok(None),
        answer => answer?,
    };
    let Some(&[position, ref rest @ ..]) = answer.as_deref() else { return Ok(None) };
    let (version, position) = (last.version.plus(1), Position::new(from_sql(position)));
    let settled = match *rest {
        [previous, recorded_at] => DateTime::from_timestamp_micros(recorded_at).map(|recorded_at| {
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
                recorded_at,
            };
            (Position::new(from_sql(previous)), event)
        }),
        _ => None,
    };
    let outcomes = vec![Some(Ok(Appended { versions: vec![version], positions: vec![position] }))];
    let seen = vec![(part.stream.clone(), SeenEvent { stream: last.stream, version, position })];
    Ok(Some(Reply { outcomes, transaction: None, settled, server, seen }))
}

/// The arguments of `storied.append()` that depend on what this process has seen.
struct Numbered {
    server: i64,
    /// Highest position of the events that known streams end with.
    position: Option<i64>,
    streams: Vec<Option<i64>>,
    categories: Vec<i32>,
    names: Vec<i32>,
}

/// Returns nothing if a name has no number; the numbers were dropped in between.
fn numbered(core: &PgInner, appends: &[&Append]) -> Option<Numbered> {
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

/// The arguments of `storied.append_known()`, one entry for each event.
#[derive(Default)]
struct Known {
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
fn known(core: &PgInner, appends: &[&Append]) -> Option<Known> {
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
async fn execute_known(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
    known: Known,
) -> Result<Option<Reply>, sqlx::Error> {
    let parts =
        || known.order.iter().flat_map(|&index| appends.get(index)).flat_map(|append| &append.streams);
    let events = || parts().flat_map(|part| &part.events);
    let positions: Option<Vec<i64>> = sqlx::query_scalar(core.sql.append_known.clone())
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
        .persistent(core.connections.persistent())
        .fetch_one(&mut **session)
        .await?;
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

/// Appends anything; with `look_up`, reads the versions of all streams first.
async fn execute_many(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
    look_up: bool,
) -> Result<Option<Reply>, sqlx::Error> {
    let Some(numbered) = numbered(core, appends) else { return Ok(None) };
    let parts =
        || appends.iter().enumerate().flat_map(|(unit, it)| it.streams.iter().map(move |part| (unit, part)));
    let events = || parts().flat_map(|(_, part)| part.events.iter());
    let look_up =
        look_up || !appends.iter().all(|it| matches!(it.streams.as_slice(), [only] if exact(only).is_some()));
    let expected = |part: &StreamAppend| {
        exact(part).unwrap_or(if part.expected == ExpectedVersion::StreamExists { -2 } else { -1 })
    };
    let ids = parts().zip(&numbered.streams).map(|((_, part), known)| match known {
        Some(_) => None,
        None => Some(part.stream.id()),
    });
    let row = sqlx::query(core.sql.append.clone())
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
        .persistent(core.connections.persistent())
        .fetch_one(&mut **session)
        .await?;
    let reply = Reply::decode(&row, appends, numbered.server)?;
    if reply.is_none() {
        core.numbers.forget(numbered.server);
    }
    Ok(reply)
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The outcomes of a call, and the transaction's id.
///
/// The id is present if the transaction wrote events and a later look-up may need it.
struct Reply {
    outcomes: Vec<Outcome>,
    transaction: Option<String>,
    /// The only event and the position before it in the log, if every position up to there is
    /// decided.
    settled: Option<(Position, RecordedEvent)>,
    /// The server process.
    server: i64,
    /// The last events of the streams after the append.
    seen: Vec<(StreamId, SeenEvent)>,
}

impl Reply {
    /// Decodes the result of `storied.append()`; the migration describes it.
    fn decode(row: &PgRow, appends: &[&Append], server: i64) -> Result<Option<Self>, sqlx::Error> {
        let Some(streams) = row.try_get::<Option<Vec<Option<i64>>>, _>(0)? else { return Ok(None) };
        let found: Vec<i64> = row.try_get(1)?;
        let lost: Option<Vec<bool>> = row.try_get(2)?;
        let positions: Option<Vec<i64>> = row.try_get(3)?;
        let mut streams = streams.into_iter();
        let mut found = found.into_iter().map(|version| Version::new(from_sql(version)));
        let mut lost = lost.unwrap_or_default().into_iter();
        let mut positions =
            positions.unwrap_or_default().into_iter().map(|position| Position::new(from_sql(position)));
        let mut outcomes = Vec::with_capacity(appends.len());
        let mut seen = Vec::with_capacity(found.len());
        for append in appends {
            let mut appended = Appended { versions: Vec::new(), positions: Vec::new() };
            let mut refused: Option<Outcome> = None;
            let mut ends = Vec::with_capacity(append.streams.len());
            for part in &append.streams {
                let before = found.next().unwrap_or(Version::NONE);
                let lost = lost.next().unwrap_or_default();
                let conflict = || Conflict {
                    stream: part.stream.clone(),
                    expected: part.expected,
                    actual: Some(before),
                };
                if !part.expected.allows(before) {
                    refused.get_or_insert_with(|| Some(Err(conflict().into())));
                } else if lost {
                    refused.get_or_insert(None);
                }
                let version = before.plus(part.events.len() as u64);
                appended.versions.push(version);
                appended.positions.extend(positions.by_ref().take(part.events.len()));
                if let (Some(stream), Some(&position)) = (streams.next().flatten(), appended.positions.last())
                {
                    ends.push((part.stream.clone(), SeenEvent { stream, version, position }));
                }
            }
            if refused.is_none() {
                seen.append(&mut ends);
            }
            outcomes.push(refused.unwrap_or(Some(Ok(appended))));
        }
        Ok(Some(Self { outcomes, transaction: row.try_get(4)?, settled: None, server, seen }))
    }
}
