//! One call of `storied.append()`: one round trip and one commit.

use std::sync::Arc;

use chrono::DateTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::{ExpectedVersion, StoreError};
use super::append_batch::{AppendGroup, StreamPart};
use super::append_outcome::{AppendOutcome, CommitHandle, DOING, Failure};
use super::connection::Session;
use super::convert::{from_sql, to_sql};
use super::durability;
use super::error::{ErrorClass, class_of, failed};
use super::inner::PgInner;
use crate::event::{NewEvent, Position, RecordedEvent, Version};

/// Appends units in one transaction; returns the outcome of each.
pub(super) async fn call(
    core: &Arc<PgInner>,
    units: &[&AppendGroup<'_>],
) -> Result<Vec<AppendOutcome>, Failure> {
    core.stuck.check()?;
    let explicit = core.connections.appends_in_transactions();
    let server = core.connections.begun();
    let session =
        if explicit { core.connections.begin(DOING).await } else { core.connections.acquire(DOING).await };
    let mut session = session.map_err(Failure::Failed)?;
    let (reply, mut cancelled) = core.watched(core.timed(execute(core, &mut session, units))).await;
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

async fn execute(
    core: &PgInner,
    session: &mut Session,
    units: &[&AppendGroup<'_>],
) -> Result<Reply, sqlx::Error> {
    // Not in an explicit transaction: its end is looked up by its id, which only `append()`
    // returns.
    if !core.connections.appends_in_transactions()
        && let [unit] = units
        && let [part] = unit.parts.as_slice()
        && let ([event], Some(expected)) = (part.events.as_slice(), exact(part))
        && let Some(reply) = execute_one(core, session, part, expected, event).await?
    {
        return Ok(reply);
    }
    let row = execute_many(core, session, units).await?;
    Reply::decode(&row, units)
}

/// Returns the version that a part expects, if it is a single one.
///
/// It needs no look-up: the previous event either is the last of the stream, or the next version is
/// taken.
fn exact(part: &StreamPart<'_>) -> Option<i64> {
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
    part: &StreamPart<'_>,
    expected: i64,
    event: &NewEvent,
) -> Result<Option<Reply>, sqlx::Error> {
    let answer: Option<Vec<i64>> = sqlx::query_scalar(core.sql.append_one.clone())
        .bind(part.key)
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
    let outcomes = vec![AppendOutcome::Appended(vec![(before, vec![position])])];
    Ok(Some(Reply { outcomes, transaction: None, settled }))
}

async fn execute_many(
    core: &PgInner,
    session: &mut Session,
    units: &[&AppendGroup<'_>],
) -> Result<PgRow, sqlx::Error> {
    let parts =
        || units.iter().enumerate().flat_map(|(unit, it)| it.parts.iter().map(move |part| (unit, part)));
    let events = || parts().flat_map(|(_, part)| part.events.iter());
    let look_up = !units.iter().all(|unit| matches!(unit.parts.as_slice(), [only] if exact(only).is_some()));
    let expected = |part: &StreamPart<'_>| {
        exact(part).unwrap_or(if part.expected == ExpectedVersion::StreamExists { -2 } else { -1 })
    };
    sqlx::query(core.sql.append.clone())
        .bind(parts().map(|(_, part)| part.key).collect::<Vec<_>>())
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

/// The outcomes of a call's units, and the transaction's id.
///
/// The id is present if the transaction wrote events and a later look-up may need it.
struct Reply {
    outcomes: Vec<AppendOutcome>,
    transaction: Option<String>,
    /// The only event and the position before it in the log, if every position up to there is
    /// decided.
    settled: Option<(Position, RecordedEvent)>,
}

impl Reply {
    /// Decodes the result of `storied.append()`; the migration describes it.
    fn decode(row: &PgRow, units: &[&AppendGroup<'_>]) -> Result<Self, sqlx::Error> {
        let versions: Vec<i64> = row.try_get(0)?;
        let lost: Option<Vec<bool>> = row.try_get(1)?;
        let positions: Option<Vec<i64>> = row.try_get(2)?;
        let mut positions =
            positions.unwrap_or_default().into_iter().map(|position| Position::new(from_sql(position)));
        let mut index = 0;
        let mut outcomes = Vec::with_capacity(units.len());
        for unit in units {
            let mut appended = Vec::with_capacity(unit.parts.len());
            let mut refused = None;
            for (number, part) in unit.parts.iter().enumerate() {
                let version = Version::new(versions.get(index).copied().map_or(0, from_sql));
                let lost = lost.as_ref().and_then(|lost| lost.get(index)).copied().unwrap_or_default();
                index += 1;
                let own = positions.by_ref().take(part.events.len()).collect();
                if lost && part.expected.allows(version) {
                    refused.get_or_insert(AppendOutcome::VersionRace);
                } else if lost || !part.expected.allows(version) {
                    refused.get_or_insert(AppendOutcome::Conflict(number, version));
                }
                appended.push((version, own));
            }
            outcomes.push(refused.unwrap_or(AppendOutcome::Appended(appended)));
        }
        Ok(Self { outcomes, transaction: row.try_get(3)?, settled: None })
    }
}
