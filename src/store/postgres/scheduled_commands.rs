//! Scheduled commands.

use std::sync::Arc;

use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::{Row, SqlStr, ValueRef};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::schedule_arguments::{
    CANCELLING, CommandBatch, ENDING, LISTING_COMMANDS, READING_COMMAND, RETRYING, SCHEDULING, STARTING,
    check_commands, check_query, checked_ends,
};
use super::super::scheduled::{
    DueCommands, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledOutcome, ScheduledQuery,
    ScheduledState,
};
use super::super::timer::{DueTime, cursor_time, storable};
use super::super::{Lease, StoreError};
use super::connection::Session;
use super::convert::{micros, to_sql};
use super::durability;
use super::error::{failed, failed_write};
use super::inner::PgInner;

const TABLE: &str = "scheduled_commands";

/// Binds the columns of commands, each as one array.
pub(super) fn bind_commands<'q>(
    query: Query<'q, Postgres, PgArguments>,
    batch: &CommandBatch,
) -> Query<'q, Postgres, PgArguments> {
    let commands = || batch.commands.values();
    let at = |due| if let DueTime::At(time) = due { Some(storable(time)) } else { None };
    let after = |due| if let DueTime::After(wait) = due { Some(micros(wait)) } else { None };
    query
        .bind(commands().map(|it| it.id).collect::<Vec<_>>())
        .bind(commands().map(|it| it.target.as_str()).collect::<Vec<_>>())
        .bind(commands().map(|it| it.body.as_slice()).collect::<Vec<_>>())
        .bind(commands().map(|it| at(it.due)).collect::<Vec<_>>())
        .bind(commands().map(|it| after(it.due)).collect::<Vec<_>>())
        .bind(commands().map(|it| it.schedule.as_deref()).collect::<Vec<_>>())
}

pub(super) async fn schedule_commands(
    core: &Arc<PgInner>,
    commands: Vec<NewScheduledCommand>,
) -> Result<Vec<ScheduledCommand>, StoreError> {
    let batch = CommandBatch::new(SCHEDULING, commands)?;
    if batch.commands.is_empty() {
        return Ok(Vec::new());
    }
    let scheduling = |error| failed_write(SCHEDULING, error);
    let mut session = core.connections.get(SCHEDULING).await?;
    let rows = bind_commands(sqlx::query(core.sql.schedule_commands.clone()), &batch)
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(scheduling)?;
    let added = rows.first().map_or(Ok(0), |row| Columns::of(TABLE, row).number(7)).map_err(scheduling)?;
    confirm_unless(added > 0, core, &mut session).await?;
    session.finish(SCHEDULING).await?;
    let stored = rows.iter().map(command).collect::<Result<_, _>>().map_err(scheduling)?;
    batch.sort(stored)
}

/// Confirms that the answer of a call is durable, unless the call changed a row.
///
/// I3: without a change, the answer rests on a read of rows that an earlier call wrote or deleted. Its
/// commit may be visible although no standby has it. A change waits for the standbys itself, and the
/// write-ahead log is replicated in order.
pub(super) async fn confirm_unless(
    changed: bool,
    core: &Arc<PgInner>,
    session: &mut Session,
) -> Result<(), StoreError> {
    if changed { Ok(()) } else { durability::confirm(core, session).await }
}

pub(super) async fn start_due_commands(core: &Arc<PgInner>, limit: usize) -> Result<DueCommands, StoreError> {
    check_commands(STARTING, limit)?;
    let mut session = core.connections.get(STARTING).await?;
    let rows = sqlx::query(core.sql.start_due_commands.clone())
        .bind(to_limit(limit))
        .bind(to_limit(ScheduledCommand::PAGE_BODIES))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(STARTING, error))?;
    session.finish(STARTING).await?;
    started(&rows).map_err(|error| failed(STARTING, error))
}

/// Decodes the rows of started commands, and the one without a command, which has the clock.
fn started(rows: &[PgRow]) -> Result<DueCommands, sqlx::Error> {
    let (mut commands, mut times) = (Vec::with_capacity(rows.len()), None);
    for row in rows {
        let is_command = !row.try_get_raw(0)?.is_null();
        let row = Columns::of(TABLE, row);
        if is_command {
            commands.push(ScheduledCommand {
                id: row.get(0)?,
                target: row.get(1)?,
                body: row.get(2)?,
                due_at: row.time(3)?,
                schedule: row.get(4)?,
                state: ScheduledState::Started,
                reason: None,
            });
        } else {
            times = Some((row.time(5)?, row.optional_time(6)?));
        }
    }
    let (now, next) = times.ok_or(sqlx::Error::RowNotFound)?;
    Ok(DueCommands::new(commands, now, next))
}

fn to_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

pub(super) async fn end_commands(
    core: &Arc<PgInner>,
    ends: Vec<ScheduledEnd>,
    lease: Option<Lease>,
) -> Result<(), StoreError> {
    let ends = checked_ends(ends)?;
    if ends.is_empty() {
        return Ok(());
    }
    let reason = |outcome: &_| match outcome {
        ScheduledOutcome::Parked(reason) => Some(reason.clone()),
        _ => None,
    };
    let wait = |outcome: &_| match outcome {
        ScheduledOutcome::Postponed(wait) => Some(micros(*wait)),
        _ => None,
    };
    let mut session = core.connections.get(ENDING).await?;
    let changed: i64 = sqlx::query_scalar(core.sql.end_commands.clone())
        .bind(ends.keys().copied().collect::<Vec<_>>())
        .bind(ends.values().map(reason).collect::<Vec<_>>())
        .bind(ends.values().map(wait).collect::<Vec<_>>())
        .bind(lease.as_ref().map(|lease| lease.name.as_str()))
        .bind(lease.as_ref().map(|lease| lease.owner))
        .bind(lease.as_ref().map(|lease| to_sql(lease.epoch)))
        .persistent(core.connections.persistent())
        .fetch_one(&mut *session)
        .await
        .map_err(|error| failed(ENDING, error))?;
    confirm_unless(changed > 0, core, &mut session).await?;
    session.finish(ENDING).await
}

pub(super) async fn cancel_command(
    core: &Arc<PgInner>,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, StoreError> {
    let changed = |state| state != ScheduledState::Started;
    change(core, CANCELLING, &core.sql.cancel_command, id, changed).await
}

pub(super) async fn retry_command(
    core: &Arc<PgInner>,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, StoreError> {
    let changed = |state| state == ScheduledState::Parked;
    change(core, RETRYING, &core.sql.retry_command, id, changed).await
}

/// Changes a command and returns it as it was; `changed` shows in which states the call changes it.
async fn change(
    core: &Arc<PgInner>,
    doing: &str,
    statement: &SqlStr,
    id: Uuid,
    changed: impl Fn(ScheduledState) -> bool,
) -> Result<Option<ScheduledCommand>, StoreError> {
    let mut session = core.connections.get(doing).await?;
    let before = fetch(core, &mut session, statement, id).await.map_err(|error| failed(doing, error))?;
    let changed = before.as_ref().is_some_and(|before| changed(before.state));
    confirm_unless(changed, core, &mut session).await?;
    session.finish(doing).await?;
    Ok(before)
}

async fn fetch(
    core: &Arc<PgInner>,
    session: &mut Session,
    statement: &SqlStr,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, sqlx::Error> {
    let row = sqlx::query(statement.clone())
        .bind(id)
        .persistent(core.connections.persistent())
        .fetch_optional(&mut **session)
        .await?;
    row.as_ref().map(command).transpose()
}

pub(super) async fn scheduled_command(
    core: &Arc<PgInner>,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, StoreError> {
    let mut session = core.connections.get(READING_COMMAND).await?;
    let found = fetch(core, &mut session, &core.sql.scheduled_command, id).await;
    let found = found.map_err(|error| failed(READING_COMMAND, error))?;
    session.finish(READING_COMMAND).await?;
    Ok(found)
}

pub(super) async fn scheduled_commands(
    core: &Arc<PgInner>,
    query: &ScheduledQuery,
    after: Option<&ScheduledCommand>,
    limit: usize,
) -> Result<Vec<ScheduledCommand>, StoreError> {
    check_query(query, limit)?;
    let states = query.state.map_or(ScheduledState::ALL.to_vec(), |state| vec![state]);
    let sql = &core.sql;
    let statement =
        if query.schedule.is_some() { &sql.scheduled_commands_of } else { &sql.scheduled_commands };
    let mut page = sqlx::query(statement.clone())
        .bind(states.into_iter().map(ScheduledState::as_str).collect::<Vec<_>>())
        .bind(after.map(|after| cursor_time(after.due_at)))
        .bind(after.map_or(Uuid::nil(), |after| after.id))
        .bind(to_limit(limit))
        .bind(to_limit(ScheduledCommand::PAGE_BODIES));
    if let Some(schedule) = &query.schedule {
        page = page.bind(schedule.as_str());
    }
    let mut session = core.connections.get(LISTING_COMMANDS).await?;
    let commands = page
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .and_then(|rows| rows.iter().map(command).collect())
        .map_err(|error| failed(LISTING_COMMANDS, error))?;
    session.finish(LISTING_COMMANDS).await?;
    Ok(commands)
}

fn command(row: &PgRow) -> Result<ScheduledCommand, sqlx::Error> {
    let row = Columns::of(TABLE, row);
    Ok(ScheduledCommand {
        id: row.get(0)?,
        target: row.get(1)?,
        body: row.get(2)?,
        due_at: row.time(3)?,
        schedule: row.get(4)?,
        state: row.state(5)?,
        reason: row.get(6)?,
    })
}
