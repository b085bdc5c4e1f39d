//! Looks up whether an append without an answer happened (I4) and whether it is durable (I3).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::Row;
use tokio::time::Instant;

use super::super::{Append, Appended, ExpectedVersion, StoreError, StreamAppend};
use super::append_failure::CommitHandle;
use super::connection::Session;
use super::convert::{from_sql, to_sql};
use super::durability;
use super::error::failed;
use super::inner::PgInner;
use crate::event::{Position, Version};

const DOING: &str = "looking up an append without an answer";

/// Counts the append as stuck until its server process has ended.
fn await_standby(core: &Arc<PgInner>, handle: CommitHandle) {
    core.stuck.0.fetch_add(1, Ordering::AcqRel);
    tokio::spawn(is_over(core.clone(), handle));
}

async fn is_over(core: Arc<PgInner>, handle: CommitHandle) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let query = async {
            let mut session = core.connections.get(DOING).await?;
            let state = query_state(&core, &mut session, &handle).await?;
            session.finish(DOING).await?;
            Ok::<_, StoreError>(state)
        };
        if matches!(core.timed_call(DOING, query).await, Ok(State::Over)) {
            break;
        }
    }
    core.stuck.0.fetch_sub(1, Ordering::AcqRel);
}

/// Returns the result of each append; `None` if it did not happen and never will.
///
/// Events that are found are durable.
///
/// # Errors
/// If the outcome cannot be determined in time.
pub(super) async fn resolve_unknown_commit(
    core: &Arc<PgInner>,
    appends: &[&Append],
    handle: CommitHandle,
) -> Result<Vec<Option<Appended>>, StoreError> {
    // The limit is twice the usual one, because the answer is worth more.
    let limit = core.connections.patience.acquire * 2;
    let deadline = Instant::now() + limit;
    // The reason for a missing answer at the deadline.
    let mut waits_for = WaitsFor::Server;
    loop {
        let attempt = async {
            let mut session = core.connections.get(DOING).await?;
            fence_backend(core, &mut session, &handle, &mut waits_for).await?;
            let mut found = Vec::with_capacity(appends.len());
            for append in appends {
                found.push(find_events(core, &mut session, append).await?);
            }
            // I3: perhaps the commit became visible because its wait for a standby was cut short.
            if found.iter().any(Option::is_some) {
                waits_for = WaitsFor::Confirmation;
                durability::confirm(core, &mut session).await?;
            }
            session.finish(DOING).await?;
            Ok(found)
        };
        let attempt = durability::uncancelled(core, attempt);
        let error: StoreError = match tokio::time::timeout_at(deadline, attempt).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => error,
            Err(_) => {
                return Err(match waits_for {
                    WaitsFor::Server => StoreError::Unavailable {
                        reason: format!("{DOING}: no result in time"),
                        source: None,
                    },
                    WaitsFor::Confirmation => durability::unconfirmed(limit),
                    WaitsFor::Standby => {
                        await_standby(core, handle);
                        durability::unconfirmed(limit)
                    }
                });
            }
        };
        let transient = error.is_transient();
        if !transient || Instant::now() >= deadline {
            return Err(error);
        }
        core.connections.purge();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The event that a look-up waits for.
#[derive(Debug, Clone, Copy)]
enum WaitsFor {
    /// An answer of the server, or the end of the append there.
    Server,
    /// A synchronous standby: the append is committed on the primary and waits for it.
    Standby,
    /// A synchronous standby, to confirm the events found.
    Confirmation,
}

/// The state of an append on the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// Committed on the primary, invisible to others, waiting for a synchronous standby.
    WaitsForStandby,
    /// Finished: if the append has not happened, it never will.
    Over,
}

/// Returns when the append has finished: if it has not happened by then, it never will.
async fn fence_backend(
    core: &PgInner,
    session: &mut Session,
    handle: &CommitHandle,
    waits_for: &mut WaitsFor,
) -> Result<(), StoreError> {
    let mut pause = Duration::from_millis(1);
    loop {
        *waits_for = match query_state(core, session, handle).await? {
            State::Over => return Ok(()),
            State::WaitsForStandby => WaitsFor::Standby,
            State::Running => WaitsFor::Server,
        };
        // The caller limits the time.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Queries the state of the append on the server.
///
/// Terminates a server process of this store, unless it waits for a standby. Terminating a waiting
/// process would make its commit visible before it is durable: readers would see events that a
/// failover can lose.
async fn query_state(
    core: &PgInner,
    session: &mut Session,
    handle: &CommitHandle,
) -> Result<State, StoreError> {
    match handle {
        CommitHandle::Committed => Ok(State::Over),
        // The server process serves only this lost connection. It may still be at work, or may not
        // have received the append yet. Once terminated, it can do neither.
        CommitHandle::Backend(backend) => {
            // `IS NULL` yields false and keeps the call. PostgreSQL would fold `AND false` to false,
            // and make no call.
            let waits: Option<bool> = sqlx::query_scalar(
                "SELECT CASE WHEN wait_event IS DISTINCT FROM 'SyncRep' THEN pg_terminate_backend(pid) IS NULL ELSE true END
                 FROM pg_stat_activity
                 WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2",
            )
            .bind(backend.pid)
            .bind(backend.started)
            .persistent(core.connections.persistent())
            .fetch_optional(&mut **session)
            .await
            .map_err(|error| failed(DOING, error))?;
            Ok(match waits {
                None => State::Over,
                Some(true) => State::WaitsForStandby,
                Some(false) => State::Running,
            })
        }
        CommitHandle::Transaction(id) => {
            let status: Option<String> = sqlx::query_scalar("SELECT pg_xact_status($1::text::xid8)")
                .bind(id)
                .persistent(core.connections.persistent())
                .fetch_one(&mut **session)
                .await
                .map_err(|error| failed(DOING, error))?;
            // The commit was sent: without a standby to wait for, it takes no time.
            Ok(match status.as_deref() {
                Some("in progress") if core.high_water_mark.has_standbys() => State::WaitsForStandby,
                Some("in progress") => State::Running,
                _ => State::Over,
            })
        }
    }
}

/// Looks up the events of an append in the log, by stream, version and id.
///
/// One transaction wrote them, so either all of them are present or none.
async fn find_events(
    core: &PgInner,
    session: &mut Session,
    append: &Append,
) -> Result<Option<Appended>, StoreError> {
    let mut appended = Appended { versions: Vec::new(), positions: Vec::new() };
    for part in &append.streams {
        let Some((version, positions)) = find_part(core, session, part).await? else { return Ok(None) };
        appended.versions.push(version);
        appended.positions.extend(positions);
    }
    Ok(Some(appended))
}

/// Returns the version of the last event of a part, and the positions of all.
async fn find_part(
    core: &PgInner,
    session: &mut Session,
    part: &StreamAppend,
) -> Result<Option<(Version, Vec<Position>)>, StoreError> {
    let events = part.events.len() as u64;
    // Without an expected version, the whole stream has to be searched.
    let (after, upto) = match part.expected {
        ExpectedVersion::Exact(version) => (version, version.plus(events)),
        ExpectedVersion::NoStream => (Version::NONE, Version::new(events)),
        ExpectedVersion::Any | ExpectedVersion::StreamExists => (Version::NONE, Version::new(u64::MAX)),
    };
    let rows = sqlx::query(core.sql.find.clone())
        .bind(part.stream.category())
        .bind(part.stream.id())
        .bind(to_sql(after.get()))
        .bind(to_sql(upto.get()))
        .bind(part.events.iter().map(|event| event.id).collect::<Vec<_>>())
        .persistent(core.connections.persistent())
        .fetch_all(&mut **session)
        .await
        .map_err(|error| failed(DOING, error))?;
    let mut last = Version::NONE;
    let mut positions = Vec::with_capacity(rows.len());
    for row in &rows {
        let columns = || -> Result<(i64, i64), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        let (version, position) = columns().map_err(|error| failed(DOING, error))?;
        last = Version::new(from_sql(version));
        positions.push(Position::new(from_sql(position)));
    }
    Ok((positions.len() as u64 == events).then_some((last, positions)))
}
