//! Appending: one round trip per batch, and the recovery of appends without an answer.

use std::sync::Arc;
use std::time::Duration;

use chrono::DateTime;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::super::{Append, AppendError, Appended, Conflict, ExpectedVersion, StoreError};
use super::append_batch::{self, AppendGroup, StreamPart};
use super::commit_recovery::{self, CommitHandle};
use super::connection::Session;
use super::durability;
use super::error::{self, ErrorClass, class_of, failed};
use super::{PgInner, from_sql, to_sql};
use crate::event::{NewEvent, Position, RecordedEvent, Version};

pub(super) const DOING: &str = "appending events";

/// Maximum number of times the same events are sent, on the server's request or after a proven
/// loss.
const ATTEMPTS: u32 = 8;
/// Maximum number of lost races of an append without an exact expected version.
///
/// In each race another append succeeds.
const LOST_RACES: u32 = 1_000;

/// The outcome of a unit.
#[derive(Debug)]
pub(super) enum AppendOutcome {
    /// The events are in the log; for each part, the version before them and their positions.
    Appended(Vec<(Version, Vec<Position>)>),
    /// The part with this index found another version.
    Conflict(usize, Version),
    /// Another writer was faster, but the expected versions may still hold.
    VersionRace,
    Failed(StoreError),
}

/// Appends a batch. Once polled, it must run to completion.
pub(super) async fn append(core: &Arc<PgInner>, batch: &[Append]) -> Vec<Result<Appended, AppendError>> {
    let _appending = core.high_water_mark.appending();
    let mut answers: Vec<Option<Result<Appended, AppendError>>> = Vec::with_capacity(batch.len());
    let mut todo = Vec::with_capacity(batch.len());
    for (index, append) in batch.iter().enumerate() {
        answers.push(match append_batch::check(append) {
            Ok(()) => {
                todo.push(index);
                None
            }
            Err(error) => Some(Err(error.into())),
        });
    }
    let mut coalesce = true;
    while !todo.is_empty() {
        let plan = append_batch::plan(batch, &todo, coalesce);
        todo = plan.deferred;
        for call in &plan.calls {
            for (unit, outcome) in call.iter().zip(settle(core, call).await) {
                if let AppendOutcome::Failed(StoreError::Invalid { .. }) = &outcome
                    && unit.appends.len() > 1
                {
                    // Each append is sent alone, to find the one that cannot be stored.
                    coalesce = false;
                    todo.extend(&unit.appends);
                    continue;
                }
                tell(batch, unit, outcome, &mut answers, &mut todo);
            }
        }
        todo.sort_unstable();
    }
    let missing = || StoreError::Corrupt { reason: "an append received no result".into() };
    let answers: Vec<_> =
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(missing().into()))).collect();
    let last = answers.iter().flatten().filter_map(|appended| appended.positions.last()).max();
    if let Some(&last) = last {
        core.high_water_mark.announce(last);
    }
    answers
}

/// Answers the appends of a unit; appends to be decided again go back to `todo`.
fn tell(
    batch: &[Append],
    unit: &AppendGroup<'_>,
    outcome: AppendOutcome,
    answers: &mut [Option<Result<Appended, AppendError>>],
    todo: &mut Vec<usize>,
) {
    let mut answer = |index: usize, result| {
        if let Some(answer) = answers.get_mut(index) {
            *answer = Some(result);
        }
    };
    match outcome {
        AppendOutcome::Appended(places) => {
            if let ([_, _, ..], [(base, positions)]) = (unit.appends.as_slice(), places.as_slice()) {
                // Several appends to one stream share the versions and positions of the unit.
                let (mut end, mut rest) = (*base, positions.as_slice());
                for &index in &unit.appends {
                    let events = batch
                        .get(index)
                        .map_or(0, |append| append.streams.iter().map(|part| part.events.len()).sum());
                    let (own, behind) = rest.split_at(events.min(rest.len()));
                    (end, rest) = (end.plus(own.len() as u64), behind);
                    answer(index, Ok(Appended { versions: vec![end], positions: own.to_vec() }));
                }
                return;
            }
            let versions = places.iter().map(|(base, positions)| base.plus(positions.len() as u64)).collect();
            let positions = places.into_iter().flat_map(|(_, positions)| positions).collect();
            if let Some(&index) = unit.appends.first() {
                answer(index, Ok(Appended { versions, positions }));
            }
        }
        AppendOutcome::Conflict(part, actual) => {
            let mut appends = unit.appends.iter().copied();
            let (Some(first), Some(part)) = (appends.next(), unit.parts.get(part)) else { return };
            let conflict = Conflict { stream: part.stream.clone(), expected: part.expected, actual };
            answer(first, Err(conflict.into()));
            // They were merged with the first on the assumption that it succeeds.
            todo.extend(appends);
        }
        AppendOutcome::VersionRace => {
            let reason = format!("{DOING}: other writers were faster in every attempt; retry later");
            for &index in &unit.appends {
                answer(index, Err(StoreError::Unavailable { reason: reason.clone(), source: None }.into()));
            }
        }
        AppendOutcome::Failed(error) => {
            for &index in &unit.appends {
                answer(index, Err(error.clone().into()));
            }
        }
    }
}

/// Sends calls until every unit has an outcome.
///
/// A call that the server refuses as a whole is split, until each unit that cannot be stored is
/// alone.
async fn settle(core: &Arc<PgInner>, units: &[AppendGroup<'_>]) -> Vec<AppendOutcome> {
    let mut outcomes: Vec<Option<AppendOutcome>> = units.iter().map(|_| None).collect();
    let mut groups: Vec<Vec<usize>> = vec![(0..units.len()).collect()];
    while let Some(mut group) = groups.pop() {
        let (mut attempts, mut lost_races) = (0, 0);
        while !group.is_empty() {
            let members: Vec<&AppendGroup<'_>> = group.iter().filter_map(|&index| units.get(index)).collect();
            let failure = match call(core, &members).await {
                Ok(found) => {
                    group = file(group, found, &mut outcomes, lost_races >= LOST_RACES);
                    if !group.is_empty() {
                        lost_races += 1;
                        pause(lost_races).await;
                    }
                    continue;
                }
                Err(failure) => failure,
            };
            let error = match failure {
                Failure::Refused(_) if group.len() > 1 => {
                    groups.push(group.split_off(group.len() / 2));
                    groups.push(group);
                    break;
                }
                Failure::Refused(error) | Failure::Failed(error) => error,
                Failure::VersionRace if group.len() > 1 && lost_races > 0 => {
                    groups.push(group.split_off(group.len() / 2));
                    groups.push(group);
                    break;
                }
                Failure::VersionRace if lost_races < LOST_RACES => {
                    lost_races += 1;
                    pause(lost_races).await;
                    continue;
                }
                Failure::VersionRace => {
                    for index in group {
                        set(&mut outcomes, index, AppendOutcome::VersionRace);
                    }
                    break;
                }
                Failure::Retry(error) | Failure::NotSent(error) => {
                    attempts += 1;
                    if attempts < ATTEMPTS {
                        tracing::debug!(%error, attempts, "retrying append");
                        pause(attempts).await;
                        continue;
                    }
                    error
                }
                Failure::Unknown(error, handle) => {
                    match commit_recovery::resolve_unknown_commit(core, &members, handle).await {
                        Ok(found) => {
                            tracing::warn!(
                                %error,
                                happened = found.iter().filter(|outcome| outcome.is_some()).count(),
                                of = members.len(),
                                "append got no answer; looked up its events"
                            );
                            let found = found
                                .into_iter()
                                .map(|outcome| outcome.unwrap_or(AppendOutcome::VersionRace))
                                .collect();
                            group = file(group, found, &mut outcomes, false);
                            attempts += 1;
                            if attempts < ATTEMPTS {
                                continue;
                            }
                            error
                        }
                        Err(lookup) => StoreError::OutcomeUnknown {
                            reason: format!("{error}; looking up the events failed: {lookup}"),
                            source: Some(Arc::new(error)),
                        },
                    }
                }
            };
            for index in group {
                set(&mut outcomes, index, AppendOutcome::Failed(error.clone()));
            }
            break;
        }
    }
    let missing = || StoreError::Corrupt { reason: "an append received no outcome".into() };
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| AppendOutcome::Failed(missing()))).collect()
}

fn set(outcomes: &mut [Option<AppendOutcome>], index: usize, outcome: AppendOutcome) {
    if let Some(place) = outcomes.get_mut(index) {
        *place = Some(outcome);
    }
}

/// Stores the outcomes of a group; returns the units to retry. With `all`, it returns none.
fn file(
    group: Vec<usize>,
    found: Vec<AppendOutcome>,
    outcomes: &mut [Option<AppendOutcome>],
    all: bool,
) -> Vec<usize> {
    let mut rest = Vec::new();
    for (index, outcome) in group.into_iter().zip(found) {
        match outcome {
            AppendOutcome::VersionRace if !all => rest.push(index),
            outcome => set(outcomes, index, outcome),
        }
    }
    rest
}

/// Waits before a retry: longer with each retry, with jitter between competing writers.
async fn pause(times: u32) {
    let jitter = f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    let longest = Duration::from_micros(500) * times.min(60);
    tokio::time::sleep(longest.mul_f64(jitter)).await;
}

/// The reason why a call returned no outcome for its units.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was written: the server refuses the content of the call.
    Refused(StoreError),
    /// Nothing was written: the state of the server does not allow it.
    Failed(StoreError),
    /// Nothing was written; the server asks for a retry.
    Retry(StoreError),
    /// Nothing was written: the connection broke before the commit.
    NotSent(StoreError),
    /// Nothing was written: another writer was faster.
    VersionRace,
    /// The events may have been written.
    Unknown(StoreError, CommitHandle),
}

impl Failure {
    /// Classifies a definite answer of the server.
    fn answered(error: sqlx::Error) -> Self {
        if error::is_version_race(&error) {
            return Failure::VersionRace;
        }
        let class = class_of(&error);
        let error = failed(DOING, error);
        match class {
            ErrorClass::Retry => Failure::Retry(error),
            ErrorClass::Refused => Failure::Refused(error),
            ErrorClass::Failed | ErrorClass::Unknown => Failure::Failed(error),
        }
    }
}

async fn call(core: &Arc<PgInner>, units: &[&AppendGroup<'_>]) -> Result<Vec<AppendOutcome>, Failure> {
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
    let Some(&[position, ref told @ ..]) = answer.as_deref() else { return Ok(None) };
    let (before, position) = (Version::new(from_sql(expected)), Position::new(from_sql(position)));
    let settled = match *told {
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
            let mut places = Vec::with_capacity(unit.parts.len());
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
                places.push((version, own));
            }
            outcomes.push(refused.unwrap_or(AppendOutcome::Appended(places)));
        }
        Ok(Self { outcomes, transaction: row.try_get(3)?, settled: None })
    }
}
