//! Appending: one round trip for a batch, and what to do when it does not come back.

use std::sync::Arc;
use std::time::Duration;

use chrono::DateTime;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::super::{Append, AppendError, Appended, Conflict, ExpectedVersion, StoreError};
use super::connection::Session;
use super::durability;
use super::error::{self, Verdict, failed, verdict};
use super::outcome::{self, Trace};
use super::plan::{self, Part, Unit};
use super::{Core, from_sql, to_sql};
use crate::event::{NewEvent, Position, RecordedEvent, Version};

pub(super) const DOING: &str = "appending events";

/// How often the same events are sent again when the server asked for it, or when they were lost on the way for certain.
const ATTEMPTS: u32 = 8;
/// How often an append that expects nothing in particular may be overtaken by others: each time, one of them succeeds.
const OVERTAKEN: u32 = 1_000;

/// What became of a unit.
#[derive(Debug)]
pub(super) enum Fate {
    /// Its events are in the log; for each part, the version before them and their positions.
    Appended(Vec<(Version, Vec<Position>)>),
    /// Its part of that index found another version.
    Conflict(usize, Version),
    /// Somebody else was faster, but it would fit again.
    Overtaken,
    Failed(StoreError),
}

/// Appends a batch. Must run to its end once it was begun.
pub(super) async fn append(core: &Arc<Core>, batch: &[Append]) -> Vec<Result<Appended, AppendError>> {
    let _appending = core.frontier.appending();
    let mut answers: Vec<Option<Result<Appended, AppendError>>> = Vec::with_capacity(batch.len());
    let mut todo = Vec::with_capacity(batch.len());
    for (index, append) in batch.iter().enumerate() {
        answers.push(match plan::check(append) {
            Ok(()) => {
                todo.push(index);
                None
            }
            Err(error) => Some(Err(error.into())),
        });
    }
    let mut merge = true;
    while !todo.is_empty() {
        let plan = plan::plan(batch, &todo, merge);
        todo = plan.later;
        for call in &plan.calls {
            for (unit, fate) in call.iter().zip(settle(core, call).await) {
                if let Fate::Failed(StoreError::Invalid { .. }) = &fate
                    && unit.appends.len() > 1
                {
                    // Which of them it is shows when each goes alone.
                    merge = false;
                    todo.extend(&unit.appends);
                    continue;
                }
                tell(batch, unit, fate, &mut answers, &mut todo);
            }
        }
        todo.sort_unstable();
    }
    let missing = || StoreError::Corrupt { reason: "an append got no answer".into() };
    let answers: Vec<_> =
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(missing().into()))).collect();
    let last = answers.iter().flatten().filter_map(|appended| appended.positions.last()).max();
    if let Some(&last) = last {
        core.frontier.announce(last);
    }
    answers
}

/// Answers the appends of a unit; those that are to be decided again go back to `todo`.
fn tell(
    batch: &[Append],
    unit: &Unit<'_>,
    fate: Fate,
    answers: &mut [Option<Result<Appended, AppendError>>],
    todo: &mut Vec<usize>,
) {
    let mut answer = |index: usize, result| {
        if let Some(answer) = answers.get_mut(index) {
            *answer = Some(result);
        }
    };
    match fate {
        Fate::Appended(places) => {
            if let ([_, _, ..], [(base, positions)]) = (unit.appends.as_slice(), places.as_slice()) {
                // Several appends to one stream: each has its share.
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
        Fate::Conflict(part, actual) => {
            let mut appends = unit.appends.iter().copied();
            let (Some(first), Some(part)) = (appends.next(), unit.parts.get(part)) else { return };
            let conflict = Conflict { stream: part.stream.clone(), expected: part.expected, actual };
            answer(first, Err(conflict.into()));
            // They were joined to the first on the assumption that it succeeds.
            todo.extend(appends);
        }
        Fate::Overtaken => {
            let reason = format!("{DOING}: other writers were faster every time; try again");
            for &index in &unit.appends {
                answer(index, Err(StoreError::Unavailable { reason: reason.clone(), source: None }.into()));
            }
        }
        Fate::Failed(error) => {
            for &index in &unit.appends {
                answer(index, Err(error.clone().into()));
            }
        }
    }
}

/// Calls until every unit has its fate. A call that the server refuses as a whole is split, so that what cannot be stored
/// is left alone with its refusal.
async fn settle(core: &Arc<Core>, units: &[Unit<'_>]) -> Vec<Fate> {
    let mut fates: Vec<Option<Fate>> = units.iter().map(|_| None).collect();
    let mut groups: Vec<Vec<usize>> = vec![(0..units.len()).collect()];
    while let Some(mut group) = groups.pop() {
        let (mut attempts, mut overtaken) = (0, 0);
        while !group.is_empty() {
            let members: Vec<&Unit<'_>> = group.iter().filter_map(|&index| units.get(index)).collect();
            let failure = match call(core, &members).await {
                Ok(found) => {
                    group = file(group, found, &mut fates, overtaken >= OVERTAKEN);
                    if !group.is_empty() {
                        overtaken += 1;
                        pause(overtaken).await;
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
                Failure::Overtaken if group.len() > 1 && overtaken > 0 => {
                    groups.push(group.split_off(group.len() / 2));
                    groups.push(group);
                    break;
                }
                Failure::Overtaken if overtaken < OVERTAKEN => {
                    overtaken += 1;
                    pause(overtaken).await;
                    continue;
                }
                Failure::Overtaken => {
                    for index in group {
                        set(&mut fates, index, Fate::Overtaken);
                    }
                    break;
                }
                Failure::Retry(error) | Failure::Lost(error) => {
                    attempts += 1;
                    if attempts < ATTEMPTS {
                        tracing::debug!(%error, attempts, "appending again");
                        pause(attempts).await;
                        continue;
                    }
                    error
                }
                Failure::Unknown(error, trace) => match outcome::resolve(core, &members, trace).await {
                    Ok(found) => {
                        tracing::warn!(
                            %error,
                            happened = found.iter().filter(|fate| fate.is_some()).count(),
                            of = members.len(),
                            "an append got no answer; looked up whether it happened"
                        );
                        let found = found.into_iter().map(|fate| fate.unwrap_or(Fate::Overtaken)).collect();
                        group = file(group, found, &mut fates, false);
                        attempts += 1;
                        if attempts < ATTEMPTS {
                            continue;
                        }
                        error
                    }
                    Err(lookup) => StoreError::OutcomeUnknown {
                        reason: format!("{error}; and then: {lookup}"),
                        source: Some(Arc::new(error)),
                    },
                },
            };
            for index in group {
                set(&mut fates, index, Fate::Failed(error.clone()));
            }
            break;
        }
    }
    let missing = || StoreError::Corrupt { reason: "an append was forgotten".into() };
    fates.into_iter().map(|fate| fate.unwrap_or_else(|| Fate::Failed(missing()))).collect()
}

fn set(fates: &mut [Option<Fate>], index: usize, fate: Fate) {
    if let Some(place) = fates.get_mut(index) {
        *place = Some(fate);
    }
}

/// Notes what was found of a group; what is left of it. With `all`, nothing is.
fn file(group: Vec<usize>, found: Vec<Fate>, fates: &mut [Option<Fate>], all: bool) -> Vec<usize> {
    let mut rest = Vec::new();
    for (index, fate) in group.into_iter().zip(found) {
        match fate {
            Fate::Overtaken if !all => rest.push(index),
            fate => set(fates, index, fate),
        }
    }
    rest
}

/// Longer each time, and never as long as that of the others who were told the same.
async fn pause(times: u32) {
    let jitter = f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    let longest = Duration::from_micros(500) * times.min(60);
    tokio::time::sleep(longest.mul_f64(jitter)).await;
}

/// Why a call brought no answer for each of its units.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was written, and nothing else would have been: something in it cannot be stored.
    Refused(StoreError),
    /// Nothing was written, since the server is not in a state to.
    Failed(StoreError),
    /// Nothing was written; the server wants it to be tried again.
    Retry(StoreError),
    /// Nothing was written, as the connection broke before it could be.
    Lost(StoreError),
    /// Nothing was written, because of somebody who was faster.
    Overtaken,
    /// It may have been written.
    Unknown(StoreError, Trace),
}

impl Failure {
    /// For an answer of the server that leaves no doubt.
    fn answered(error: sqlx::Error) -> Self {
        if error::overtaken(&error) {
            return Failure::Overtaken;
        }
        let verdict = verdict(&error);
        let error = failed(DOING, error);
        match verdict {
            Verdict::Retry => Failure::Retry(error),
            Verdict::Refused => Failure::Refused(error),
            Verdict::Failed | Verdict::Unknown => Failure::Failed(error),
        }
    }
}

async fn call(core: &Arc<Core>, units: &[&Unit<'_>]) -> Result<Vec<Fate>, Failure> {
    core.stuck.check()?;
    let explicit = core.connections.appends_in_transactions();
    let server = core.connections.begun();
    let session =
        if explicit { core.connections.begin(DOING).await } else { core.connections.acquire(DOING).await };
    let mut session = session.map_err(Failure::Failed)?;
    let (reply, mut cancelled) = core.watched(core.timed(execute(core, &mut session, units))).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) if verdict(&error) == Verdict::Unknown => {
            core.connections.purge();
            let backend = session.backend();
            drop(session);
            let error = failed(DOING, error);
            return Err(match backend {
                // Without a commit, the server takes it back as soon as it notices.
                _ if explicit => Failure::Lost(error),
                Some(backend) => Failure::Unknown(error, Trace::Backend(backend)),
                None => Failure::Failed(StoreError::OutcomeUnknown {
                    reason: format!("{error}; and the server process is not known"),
                    source: Some(Arc::new(error)),
                }),
            });
        }
        Err(error) => {
            if verdict(&error) == Verdict::Failed {
                // Perhaps another server is the primary by now: the next attempt asks for a connection anew.
                core.connections.purge();
            } else {
                session.roll_back().await;
            }
            return Err(Failure::answered(error));
        }
    };
    let Reply { fates, transaction, settled } = reply;
    let (done, cancelled_at_end) = core.watched(core.timed(session.done())).await;
    if explicit {
        // A warning before the commit is not about the wait that follows it.
        cancelled = cancelled_at_end;
    }
    match done {
        // I3: answered as a success, and perhaps on no standby.
        Ok(()) if cancelled => Err(Failure::Unknown(durability::cancelled(), Trace::Committed)),
        Ok(()) => {
            // Not if this connection was made since: perhaps to another server.
            if let Some((previous, event)) = settled
                && core.connections.begun() == server
            {
                core.frontier.settled(server, previous, event);
            }
            Ok(fates)
        }
        Err(error) if verdict(&error) == Verdict::Unknown => {
            core.connections.purge();
            let error = failed(DOING, error);
            Err(match transaction {
                Some(transaction) => Failure::Unknown(error, Trace::Transaction(transaction)),
                None => Failure::Lost(error),
            })
        }
        Err(error) => Err(Failure::answered(error)),
    }
}

async fn execute(core: &Core, session: &mut Session, units: &[&Unit<'_>]) -> Result<Reply, sqlx::Error> {
    // Not in an explicit transaction: how that ended is found out by its id, which only the other one tells.
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

/// The version that a part expects, where there is only one. It needs no look: either the event that it names is the
/// stream's last, or the next one is not free.
fn exact(part: &Part<'_>) -> Option<i64> {
    match part.expected {
        ExpectedVersion::Exact(version) => Some(to_sql(version.get())),
        ExpectedVersion::NoStream => Some(0),
        ExpectedVersion::Any | ExpectedVersion::StreamExists => None,
    }
}

/// None if the event cannot have the version behind the expected one.
async fn execute_one(
    core: &Core,
    session: &mut Session,
    part: &Part<'_>,
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
        .bind(core.frontier.may_tell())
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
    let fates = vec![Fate::Appended(vec![(before, vec![position])])];
    Ok(Some(Reply { fates, transaction: None, settled }))
}

async fn execute_many(core: &Core, session: &mut Session, units: &[&Unit<'_>]) -> Result<PgRow, sqlx::Error> {
    let parts =
        || units.iter().enumerate().flat_map(|(unit, it)| it.parts.iter().map(move |part| (unit, part)));
    let events = || parts().flat_map(|(_, part)| part.events.iter());
    let look_up = !units.iter().all(|unit| matches!(unit.parts.as_slice(), [only] if exact(only).is_some()));
    let expected = |part: &Part<'_>| {
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

/// What became of a call's units, and the id of its transaction, if it wrote anything and that had to be known.
struct Reply {
    fates: Vec<Fate>,
    transaction: Option<String>,
    /// The only event, and the position of the one before it in the log, if everything up to there is decided.
    settled: Option<(Position, RecordedEvent)>,
}

impl Reply {
    /// What `storied.append()` answers; see there.
    fn decode(row: &PgRow, units: &[&Unit<'_>]) -> Result<Self, sqlx::Error> {
        let versions: Vec<i64> = row.try_get(0)?;
        let lost: Option<Vec<bool>> = row.try_get(1)?;
        let positions: Option<Vec<i64>> = row.try_get(2)?;
        let mut positions =
            positions.unwrap_or_default().into_iter().map(|position| Position::new(from_sql(position)));
        let mut index = 0;
        let mut fates = Vec::with_capacity(units.len());
        for unit in units {
            let mut places = Vec::with_capacity(unit.parts.len());
            let mut refused = None;
            for (number, part) in unit.parts.iter().enumerate() {
                let version = Version::new(versions.get(index).copied().map_or(0, from_sql));
                let lost = lost.as_ref().and_then(|lost| lost.get(index)).copied().unwrap_or_default();
                index += 1;
                let own = positions.by_ref().take(part.events.len()).collect();
                if lost && part.expected.allows(version) {
                    refused.get_or_insert(Fate::Overtaken);
                } else if lost || !part.expected.allows(version) {
                    refused.get_or_insert(Fate::Conflict(number, version));
                }
                places.push((version, own));
            }
            fates.push(refused.unwrap_or(Fate::Appended(places)));
        }
        Ok(Self { fates, transaction: row.try_get(3)?, settled: None })
    }
}
