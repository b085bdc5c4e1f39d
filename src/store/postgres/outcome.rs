//! Finding out whether an append happened that got no answer (I4).

use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;
use tokio::time::Instant;

use super::super::{ExpectedVersion, StoreError};
use super::append::Fate;
use super::connection::{Backend, Session};
use super::error::failed;
use super::plan::{Part, Unit};
use super::{Core, from_sql, to_sql};
use crate::event::{Position, Version};

const DOING: &str = "finding out whether an append happened";

/// What is left of an append without an answer.
#[derive(Debug)]
pub(super) enum Trace {
    /// The server process that had it, and works for nobody else.
    Backend(Backend),
    /// The transaction's id, while the process may serve others by now.
    Transaction(String),
}

/// For each unit what became of it; `None` if it did not happen and never will.
///
/// # Errors
/// When that cannot be found out in time.
pub(super) async fn resolve(
    core: &Arc<Core>,
    units: &[&Unit<'_>],
    trace: Trace,
) -> Result<Vec<Option<Fate>>, StoreError> {
    // Twice as long as for anything else, as the answer is worth more.
    let deadline = Instant::now() + core.connections.patience.acquire * 2;
    loop {
        let attempt = async {
            let mut session = core.connections.get(DOING).await?;
            end(core, &mut session, &trace).await?;
            let mut found = Vec::with_capacity(units.len());
            for unit in units {
                found.push(find(core, &mut session, unit).await?);
            }
            session.finish(DOING).await?;
            Ok(found)
        };
        let error: StoreError = match tokio::time::timeout_at(deadline, attempt).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => error,
            Err(_) => {
                return Err(StoreError::Unavailable {
                    reason: format!("{DOING}: it took too long"),
                    source: None,
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

/// Returns when the append can no longer happen, if it has not.
async fn end(core: &Core, session: &mut Session, trace: &Trace) -> Result<(), StoreError> {
    let mut pause = Duration::from_millis(1);
    loop {
        let over: bool = match trace {
            // The process has no other purpose than this lost connection. It may still be at work, or not even have
            // received what is on its way; ended, it can do neither.
            Trace::Backend(backend) => {
                let running: Option<bool> = sqlx::query_scalar(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2",
                )
                .bind(backend.pid)
                .bind(backend.started)
                .persistent(core.connections.persistent())
                .fetch_optional(&mut **session)
                .await
                .map_err(|error| failed(DOING, error))?;
                running.is_none()
            }
            Trace::Transaction(id) => {
                let status: Option<String> = sqlx::query_scalar("SELECT pg_xact_status($1::text::xid8)")
                    .bind(id)
                    .persistent(core.connections.persistent())
                    .fetch_one(&mut **session)
                    .await
                    .map_err(|error| failed(DOING, error))?;
                status.as_deref() != Some("in progress")
            }
        };
        if over {
            return Ok(());
        }
        // Bounded by the caller.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Whether the events of a unit are in the log, by stream, version and id. It was written by one transaction: all of them
/// are, or none.
async fn find(core: &Core, session: &mut Session, unit: &Unit<'_>) -> Result<Option<Fate>, StoreError> {
    let mut places = Vec::with_capacity(unit.parts.len());
    for part in &unit.parts {
        let Some(place) = find_part(core, session, part).await? else { return Ok(None) };
        places.push(place);
    }
    Ok(Some(Fate::Appended(places)))
}

async fn find_part(
    core: &Core,
    session: &mut Session,
    part: &Part<'_>,
) -> Result<Option<(Version, Vec<Position>)>, StoreError> {
    let events = part.events.len() as u64;
    // Without an expected version, the whole stream has to be looked through.
    let (after, upto) = match part.expected {
        ExpectedVersion::Exact(version) => (version, version.plus(events)),
        ExpectedVersion::NoStream => (Version::NONE, Version::new(events)),
        ExpectedVersion::Any | ExpectedVersion::StreamExists => (Version::NONE, Version::new(u64::MAX)),
    };
    let rows = sqlx::query(core.sql.find.clone())
        .bind(part.key)
        .bind(to_sql(after.get()))
        .bind(to_sql(upto.get()))
        .bind(part.events.iter().map(|event| event.id).collect::<Vec<_>>())
        .persistent(core.connections.persistent())
        .fetch_all(&mut **session)
        .await
        .map_err(|error| failed(DOING, error))?;
    let mut first = None;
    let mut positions = Vec::with_capacity(rows.len());
    for row in &rows {
        let columns = || -> Result<(i64, i64), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        let (version, position) = columns().map_err(|error| failed(DOING, error))?;
        first.get_or_insert(from_sql(version));
        positions.push(Position::new(from_sql(position)));
    }
    Ok(match first {
        Some(first) if positions.len() as u64 == events => {
            Some((Version::new(first.saturating_sub(1)), positions))
        }
        _ => None,
    })
}
