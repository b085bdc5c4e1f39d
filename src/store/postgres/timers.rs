//! Timers.

use std::sync::Arc;

use sqlx::postgres::PgRow;
use sqlx::{Row, ValueRef};

use super::super::StoreError;
use super::super::columns::Columns;
use super::super::timer::{
    DueTime, DueTimers, LISTING, NewTimer, READING_DUE, StoredTimer, TimerRef, WRITING, check_read, cursor,
    storable, timer_changes,
};
use super::convert::{micros, to_sql};
use super::durability;
use super::error::failed;
use super::inner::PgInner;
use crate::event::Version;

pub(super) async fn write_timers(
    core: &Arc<PgInner>,
    process: &str,
    put: Vec<NewTimer>,
    remove: Vec<TimerRef>,
) -> Result<(), StoreError> {
    let changes = timer_changes(process, put, remove)?;
    if changes.is_empty() {
        return Ok(());
    }
    let put = || changes.values().map(|change| change.put);
    let due = || put().map(|put| put.map(|(_, due)| due));
    let at = |due| if let DueTime::At(time) = due { Some(storable(time)) } else { None };
    let after = |due| if let DueTime::After(wait) = due { Some(micros(wait)) } else { None };
    let mut session = core.connections.get(WRITING).await?;
    let changed: i64 = sqlx::query_scalar(core.sql.write_timers.clone())
        .bind(process)
        .bind(changes.keys().map(|(instance, _)| instance.as_str()).collect::<Vec<_>>())
        .bind(changes.keys().map(|(_, name)| name.as_str()).collect::<Vec<_>>())
        .bind(changes.values().map(|it| it.removed.map(|it| to_sql(it.get()))).collect::<Vec<_>>())
        .bind(put().map(|put| put.map(|(version, _)| to_sql(version.get()))).collect::<Vec<_>>())
        .bind(due().map(|due| due.and_then(at)).collect::<Vec<_>>())
        .bind(due().map(|due| due.and_then(after)).collect::<Vec<_>>())
        .persistent(core.connections.persistent())
        .fetch_one(&mut *session)
        .await
        .map_err(|error| failed(WRITING, error))?;
    // I3: without a change, the answer rests on a read of rows that an earlier call wrote. Its commit
    // may be visible although no standby has it. A change waits for the standbys itself, and the
    // write-ahead log is replicated in order.
    if changed == 0 {
        durability::confirm(core, &mut session).await?;
    }
    session.finish(WRITING).await
}

pub(super) async fn due_timers(
    core: &Arc<PgInner>,
    process: &str,
    limit: usize,
) -> Result<DueTimers, StoreError> {
    check_read(READING_DUE, Some(process), limit)?;
    let mut session = core.connections.get(READING_DUE).await?;
    let rows = sqlx::query(core.sql.due_timers.clone())
        .bind(process)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(READING_DUE, error))?;
    session.finish(READING_DUE).await?;
    divide(&rows, limit).map_err(|error| failed(READING_DUE, error))
}

fn divide(rows: &[PgRow], limit: usize) -> Result<DueTimers, sqlx::Error> {
    // A single row without a timer: there is none.
    let Some(first) = rows.first().filter(|row| !row.try_get_raw(0).is_ok_and(|process| process.is_null()))
    else {
        return Ok(DueTimers::default());
    };
    let now = Columns::of("timers", first).time(5)?;
    Ok(DueTimers::divide(rows.iter().map(timer).collect::<Result<_, _>>()?, now, limit))
}

pub(super) async fn timers(
    core: &Arc<PgInner>,
    process: Option<&str>,
    after: Option<&StoredTimer>,
    limit: usize,
) -> Result<Vec<StoredTimer>, StoreError> {
    check_read(LISTING, process, limit)?;
    let (after_due, [after_process, after_instance, after_name]) = cursor(after);
    let mut session = core.connections.get(LISTING).await?;
    let timers = sqlx::query(core.sql.timers.clone())
        .bind(process)
        .bind(after_due)
        .bind(after_process)
        .bind(after_instance)
        .bind(after_name)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .and_then(|rows| rows.iter().map(timer).collect())
        .map_err(|error| failed(LISTING, error))?;
    session.finish(LISTING).await?;
    Ok(timers)
}

fn timer(row: &PgRow) -> Result<StoredTimer, sqlx::Error> {
    let row = Columns::of("timers", row);
    Ok(StoredTimer {
        process: row.get(0)?,
        instance: row.get(1)?,
        name: row.get(2)?,
        version: Version::new(row.number(3)?),
        due_at: row.time(4)?,
    })
}
