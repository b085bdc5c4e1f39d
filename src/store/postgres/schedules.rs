//! Recurring schedules, and the port of scheduled commands and schedules.

use std::sync::Arc;

use sqlx::postgres::PgRow;
use sqlx::{Row, ValueRef};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::schedule_arguments::{
    CANCELLING, CommandBatch, ENDING, LISTING_COMMANDS, LISTING_SCHEDULES, READING_COMMAND,
    READING_DUE_SCHEDULES, READING_SCHEDULE, REMOVING_SCHEDULE, RETRYING, SCHEDULING, STARTING,
    WRITING_SCHEDULE, check_schedules, checked_schedule,
};
use super::super::schedule_store::ScheduleStore;
use super::super::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledQuery,
    StoredSchedule,
};
use super::super::timer::check_text;
use super::super::{BoxFuture, Lease, StoreError};
use super::PostgresStore;
use super::convert::to_sql;
use super::error::{failed, failed_write};
use super::inner::PgInner;
use super::scheduled_commands::{self, bind_commands, confirm_unless};

async fn write_schedule(
    core: &Arc<PgInner>,
    schedule: StoredSchedule,
    commands: Vec<NewScheduledCommand>,
) -> Result<bool, StoreError> {
    let writing = |error| failed_write(WRITING_SCHEDULE, error);
    let schedule = checked_schedule(schedule)?;
    let batch = CommandBatch::new(WRITING_SCHEDULE, commands)?;
    let mut session = core.connections.get(WRITING_SCHEDULE).await?;
    let write = sqlx::query(core.sql.write_schedule.clone())
        .bind(schedule.name)
        .bind(schedule.definition)
        .bind(to_sql(schedule.revision))
        .bind(schedule.next_at);
    let row = bind_commands(write, &batch)
        .persistent(core.connections.persistent())
        .fetch_one(&mut *session)
        .await
        .map_err(writing)?;
    let written = Columns::of("schedules", &row).get(0).map_err(writing)?;
    confirm_unless(written, core, &mut session).await?;
    session.finish(WRITING_SCHEDULE).await?;
    Ok(written)
}

async fn remove_schedule(core: &Arc<PgInner>, name: &str, revision: u64) -> Result<bool, StoreError> {
    check_text(REMOVING_SCHEDULE, "schedule", name)?;
    let mut session = core.connections.get(REMOVING_SCHEDULE).await?;
    let removed = sqlx::query_scalar(core.sql.remove_schedule.clone())
        .bind(name)
        .bind(to_sql(revision))
        .persistent(core.connections.persistent())
        .fetch_one(&mut *session)
        .await
        .map_err(|error| failed(REMOVING_SCHEDULE, error))?;
    confirm_unless(removed, core, &mut session).await?;
    session.finish(REMOVING_SCHEDULE).await?;
    Ok(removed)
}

async fn schedule(core: &Arc<PgInner>, name: &str) -> Result<Option<StoredSchedule>, StoreError> {
    check_text(READING_SCHEDULE, "schedule", name)?;
    let mut session = core.connections.get(READING_SCHEDULE).await?;
    let found = sqlx::query(core.sql.schedule.clone())
        .bind(name)
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .and_then(|row| row.as_ref().map(decoded).transpose())
        .map_err(|error| failed(READING_SCHEDULE, error))?;
    session.finish(READING_SCHEDULE).await?;
    Ok(found)
}

async fn schedules(
    core: &Arc<PgInner>,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<StoredSchedule>, StoreError> {
    check_schedules(LISTING_SCHEDULES, after, limit)?;
    let mut session = core.connections.get(LISTING_SCHEDULES).await?;
    let found = sqlx::query(core.sql.schedules.clone())
        .bind(after.unwrap_or_default())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .and_then(|rows| rows.iter().map(decoded).collect())
        .map_err(|error| failed(LISTING_SCHEDULES, error))?;
    session.finish(LISTING_SCHEDULES).await?;
    Ok(found)
}

async fn due_schedules(core: &Arc<PgInner>, limit: usize) -> Result<DueSchedules, StoreError> {
    check_schedules(READING_DUE_SCHEDULES, None, limit)?;
    let mut session = core.connections.get(READING_DUE_SCHEDULES).await?;
    let rows = sqlx::query(core.sql.due_schedules.clone())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(READING_DUE_SCHEDULES, error))?;
    session.finish(READING_DUE_SCHEDULES).await?;
    divide(&rows, limit).map_err(|error| failed(READING_DUE_SCHEDULES, error))
}

fn divide(rows: &[PgRow], limit: usize) -> Result<DueSchedules, sqlx::Error> {
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let now = Columns::of("schedules", first).time(4)?;
    // A single row without a schedule: there is none.
    let earliest = match first.try_get_raw(0)?.is_null() {
        true => Vec::new(),
        false => rows.iter().map(decoded).collect::<Result<_, _>>()?,
    };
    Ok(DueSchedules::divide(earliest, now, limit))
}

fn decoded(row: &PgRow) -> Result<StoredSchedule, sqlx::Error> {
    let row = Columns::of("schedules", row);
    Ok(StoredSchedule {
        name: row.get(0)?,
        definition: row.get(1)?,
        revision: row.number(2)?,
        next_at: row.optional_time(3)?,
    })
}

impl ScheduleStore for PostgresStore {
    fn schedule_commands(
        &self,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<Vec<ScheduledCommand>, StoreError>> {
        self.commit(SCHEDULING, scheduled_commands::schedule_commands(&self.shared.core, commands))
    }

    fn start_due_commands(&self, limit: usize) -> BoxFuture<'_, Result<DueCommands, StoreError>> {
        self.commit(STARTING, scheduled_commands::start_due_commands(&self.shared.core, limit))
    }

    fn end_commands(
        &self,
        ends: Vec<ScheduledEnd>,
        lease: Option<Lease>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        self.commit(ENDING, scheduled_commands::end_commands(&self.shared.core, ends, lease))
    }

    fn cancel_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        self.commit(CANCELLING, scheduled_commands::cancel_command(&self.shared.core, id))
    }

    fn retry_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        self.commit(RETRYING, scheduled_commands::retry_command(&self.shared.core, id))
    }

    fn scheduled_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        self.call(READING_COMMAND, scheduled_commands::scheduled_command(&self.shared.core, id))
    }

    fn scheduled_commands<'a>(
        &'a self,
        query: &'a ScheduledQuery,
        after: Option<&'a ScheduledCommand>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ScheduledCommand>, StoreError>> {
        let list = scheduled_commands::scheduled_commands(&self.shared.core, query, after, limit);
        self.call(LISTING_COMMANDS, list)
    }

    fn write_schedule(
        &self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        self.commit(WRITING_SCHEDULE, write_schedule(&self.shared.core, schedule, commands))
    }

    fn remove_schedule<'a>(
        &'a self,
        name: &'a str,
        revision: u64,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.commit(REMOVING_SCHEDULE, remove_schedule(&self.shared.core, name, revision))
    }

    fn schedule<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoredSchedule>, StoreError>> {
        self.call(READING_SCHEDULE, schedule(&self.shared.core, name))
    }

    fn schedules<'a>(
        &'a self,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredSchedule>, StoreError>> {
        self.call(LISTING_SCHEDULES, schedules(&self.shared.core, after, limit))
    }

    fn due_schedules(&self, limit: usize) -> BoxFuture<'_, Result<DueSchedules, StoreError>> {
        self.call(READING_DUE_SCHEDULES, due_schedules(&self.shared.core, limit))
    }
}
