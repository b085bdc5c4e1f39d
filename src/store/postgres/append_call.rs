//! One call of `storied.append()`: one round trip and one commit.

use std::sync::Arc;

use chrono::DateTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::{Append, AppendError, Appended, Conflict, ExpectedVersion, StoreError, StreamAppend};
use super::append_failure::{CommitHandle, DOING, Failure};
use super::connection::Session;
use super::convert::{from_sql, stream_key, to_sql};
use super::durability;
use super::error::{ErrorClass, class_of, failed};
use super::inner::PgInner;
use crate::event::{NewEvent, Position, RecordedEvent, Version};

/// The outcome of an append.
///
/// `None` if another writer was faster, but the expected versions may still hold.
pub(super) type Outcome = Option<Result<Appended, AppendError>>;

/// Sends appends in one transaction; returns the outcome of each.
pub(super) async fn call(core: &Arc<PgInner>, appends: &[&Append]) -> Result<Vec<Outcome>, Failure> {
    core.stuck.check()?;
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
    let Reply { outcomes, transaction, settled } = reply;
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

async fn execute(core: &PgInner, session: &mut Session, appends: &[&Append]) -> Result<Reply, sqlx::Error> {
    // Not in an explicit transaction: its end is looked up by its id, which only `append()`
    // returns.
    if !core.connections.appends_in_transactions()
        && let [append] = appends
        && let [part] = append.streams.as_slice()
        && let ([event], Some(expected)) = (part.events.as_slice(), exact(part))
        && let Some(reply) = execute_one(core, session, part, expected, event).await?
    {
        return Ok(reply);
    }
    let row = execute_many(core, session, appends).await?;
    Reply::decode(&row, appends)
}

/// Returns the version that a part expects, if it is a single one.
///
/// It needs no look-up: the previous event either is the last of the stream, or the next version is
/// taken.
fn exact(part: &StreamAppend) -> Option<i64> {
    match part.expected {
        ExpectedVersion::Exact(version) => Some(to_sql(version.get())),
        ExpectedVersion::NoStream => Some(0),
        ExpectedVersion::Any | ExpectedVersion::StreamExists => None,
    }
}

/// Appends a single event; `None` if it cannot have the version after the expected one.
async fn execute_one(
    core: &PgInner,
    session: &mut Session,
    part: &StreamAppend,
    expected: i64,
    event: &NewEvent,
) -> Result<Option<Reply>, sqlx::Error> {
    let answer: Option<Vec<i64>> = sqlx::query_scalar(core.sql.append_one.clone())
        .bind(stream_key(&part.stream))
        .bind(expected)
        .bind(part.stream.category())
        .bind(part.stream.id())
        .bind(event.name.as_str())
        .bind(event.id)
        .bind(event.command_id)
        .bind(&*event.payload)
        .bind(&*event.metadata)
        .bind(core.high_water_mark.can_skip_query())
        .persistent(core.connections.persistent())
        .fetch_one(&mut **session)
        .await?;
    let Some(&[position, ref rest @ ..]) = answer.as_deref() else { return Ok(None) };
    let (before, position) = (Version::new(from_sql(expected)), Position::new(from_sql(position)));
    let settled = match *rest {
        [previous, recorded_at] => DateTime::from_timestamp_micros(recorded_at).map(|recorded_at| {
            let event = RecordedEvent {
                id: event.id,
                stream: part.stream.clone(),
                version: before.plus(1),
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
    let outcomes = vec![Some(Ok(Appended { versions: vec![before.plus(1)], positions: vec![position] }))];
    Ok(Some(Reply { outcomes, transaction: None, settled }))
}

async fn execute_many(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
) -> Result<PgRow, sqlx::Error> {
    let parts =
        || appends.iter().enumerate().flat_map(|(unit, it)| it.streams.iter().map(move |part| (unit, part)));
    let events = || parts().flat_map(|(_, part)| part.events.iter());
    let look_up = !appends.iter().all(|it| matches!(it.streams.as_slice(), [only] if exact(only).is_some()));
    let expected = |part: &StreamAppend| {
        exact(part).unwrap_or(if part.expected == ExpectedVersion::StreamExists { -2 } else { -1 })
    };
    sqlx::query(core.sql.append.clone())
        .bind(parts().map(|(_, part)| stream_key(&part.stream)).collect::<Vec<_>>())
        .bind(parts().map(|(_, part)| part.stream.category()).collect::<Vec<_>>())
        .bind(parts().map(|(_, part)| part.stream.id()).collect::<Vec<_>>())
        .bind(parts().map(|(unit, _)| count(unit)).collect::<Vec<_>>())
        .bind(parts().map(|(_, part)| expected(part)).collect::<Vec<_>>())
        .bind(parts().map(|(_, part)| count(part.events.len())).collect::<Vec<_>>())
        .bind(look_up)
        .bind(events().map(|event| event.name.as_str()).collect::<Vec<_>>())
        .bind(events().map(|event| event.id).collect::<Vec<_>>())
        .bind(events().map(|event| event.command_id).collect::<Vec<_>>())
        .bind(events().map(|event| &*event.payload).collect::<Vec<&[u8]>>())
        .bind(events().map(|event| &*event.metadata).collect::<Vec<&[u8]>>())
        .persistent(core.connections.persistent())
        .fetch_one(&mut **session)
        .await
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
}

impl Reply {
    /// Decodes the result of `storied.append()`; the migration describes it.
    fn decode(row: &PgRow, appends: &[&Append]) -> Result<Self, sqlx::Error> {
        let found: Vec<i64> = row.try_get(0)?;
        let lost: Option<Vec<bool>> = row.try_get(1)?;
        let positions: Option<Vec<i64>> = row.try_get(2)?;
        let mut found = found.into_iter().map(|version| Version::new(from_sql(version)));
        let mut lost = lost.unwrap_or_default().into_iter();
        let mut positions =
            positions.unwrap_or_default().into_iter().map(|position| Position::new(from_sql(position)));
        let mut outcomes = Vec::with_capacity(appends.len());
        for append in appends {
            let mut appended = Appended { versions: Vec::new(), positions: Vec::new() };
            let mut refused: Option<Outcome> = None;
            for part in &append.streams {
                let version = found.next().unwrap_or(Version::NONE);
                let lost = lost.next().unwrap_or_default();
                let conflict = || Conflict {
                    stream: part.stream.clone(),
                    expected: part.expected,
                    actual: Some(version),
                };
                if !part.expected.allows(version) {
                    refused.get_or_insert_with(|| Some(Err(conflict().into())));
                } else if lost {
                    refused.get_or_insert(None);
                }
                appended.versions.push(version.plus(part.events.len() as u64));
                appended.positions.extend(positions.by_ref().take(part.events.len()));
            }
            outcomes.push(refused.unwrap_or(Some(Ok(appended))));
        }
        Ok(Self { outcomes, transaction: row.try_get(3)?, settled: None })
    }
}
