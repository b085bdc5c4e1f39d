//! Recurring schedules, and the port of scheduled commands and schedules.

use chrono::Utc;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::schedule_arguments::{
    CANCELLING, CommandBatch, ENDING, LISTING_COMMANDS, LISTING_SCHEDULES, READING_COMMAND,
    READING_DUE_SCHEDULES, READING_SCHEDULE, REMOVING_SCHEDULE, RETRYING, SCHEDULING, STARTING,
    WRITING_SCHEDULE, check_commands, check_query, check_schedules, checked_ends, checked_schedule,
};
use super::super::schedule_store::ScheduleStore;
use super::super::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledQuery,
    StoredSchedule,
};
use super::super::timer::check_text;
use super::super::{BoxFuture, Lease, StoreError};
use super::convert::to_sql;
use super::error::failed;
use super::{SqliteStore, scheduled_commands};

/// Parameters: name, definition, revision and next tick.
const INSERT: &str = "
    INSERT INTO storied_schedules (name, definition, revision, next_at) VALUES (?1, ?2, ?3, ?4)
    ON CONFLICT (name) DO NOTHING";

const UPDATE: &str = "
    UPDATE storied_schedules SET definition = ?2, revision = ?3, next_at = ?4
    WHERE name = ?1 AND revision = ?3 - 1";

const REMOVE: &str = "DELETE FROM storied_schedules WHERE name = ?1 AND revision = ?2";

const REMOVE_WAITING: &str = "
    DELETE FROM storied_scheduled_commands INDEXED BY storied_scheduled_commands_by_schedule
    WHERE schedule = ?1 AND state = 'waiting'";

const SCHEDULE: &str = "SELECT name, definition, revision, next_at FROM storied_schedules WHERE name = ?1";

const PAGE: &str = "
    SELECT name, definition, revision, next_at FROM storied_schedules WHERE name > ?1 ORDER BY name LIMIT ?2";

/// The schedules with a due tick, and the next one. Parameters: time and limit.
///
/// One statement, so that both are of one state.
const DUE: &str = "
    SELECT * FROM (
        SELECT name, definition, revision, next_at FROM storied_schedules INDEXED BY storied_schedules_by_next
        WHERE next_at <= ?1 ORDER BY next_at, name LIMIT ?2)
    UNION ALL
    SELECT * FROM (
        SELECT name, definition, revision, next_at FROM storied_schedules INDEXED BY storied_schedules_by_next
        WHERE next_at > ?1 ORDER BY next_at, name LIMIT 1)";

async fn write_schedule(
    connection: &mut SqliteConnection,
    schedule: StoredSchedule,
    batch: CommandBatch,
) -> Result<bool, StoreError> {
    let written = sqlx::query(if schedule.revision == 1 { INSERT } else { UPDATE })
        .bind(schedule.name)
        .bind(schedule.definition)
        .bind(to_sql(schedule.revision))
        .bind(schedule.next_at.map(|next| next.timestamp_micros()))
        .execute(&mut *connection)
        .await
        .map_err(|error| failed(WRITING_SCHEDULE, error))?;
    if written.rows_affected() == 0 {
        return Ok(false);
    }
    scheduled_commands::insert(connection, WRITING_SCHEDULE, &batch).await?;
    Ok(true)
}

async fn remove_schedule(
    connection: &mut SqliteConnection,
    name: String,
    revision: u64,
) -> Result<bool, StoreError> {
    let removing = |error| failed(REMOVING_SCHEDULE, error);
    let removed = sqlx::query(REMOVE).bind(name.as_str()).bind(to_sql(revision));
    if removed.execute(&mut *connection).await.map_err(removing)?.rows_affected() == 0 {
        return Ok(false);
    }
    sqlx::query(REMOVE_WAITING).bind(name).execute(connection).await.map_err(removing)?;
    Ok(true)
}

async fn schedule(
    connection: &mut SqliteConnection,
    name: &str,
) -> Result<Option<StoredSchedule>, StoreError> {
    sqlx::query(SCHEDULE)
        .bind(name)
        .fetch_optional(connection)
        .await
        .and_then(|row| row.as_ref().map(decoded).transpose())
        .map_err(|error| failed(READING_SCHEDULE, error))
}

async fn schedules(
    connection: &mut SqliteConnection,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<StoredSchedule>, StoreError> {
    sqlx::query(PAGE)
        .bind(after.unwrap_or_default())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(decoded).collect())
        .map_err(|error| failed(LISTING_SCHEDULES, error))
}

async fn due_schedules(connection: &mut SqliteConnection, limit: usize) -> Result<DueSchedules, StoreError> {
    let now = Utc::now();
    let earliest = sqlx::query(DUE)
        .bind(now.timestamp_micros())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1))
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(decoded).collect())
        .map_err(|error| failed(READING_DUE_SCHEDULES, error))?;
    Ok(DueSchedules::divide(earliest, now, limit))
}

fn decoded(row: &SqliteRow) -> Result<StoredSchedule, sqlx::Error> {
    let row = Columns::of("storied_schedules", row);
    Ok(StoredSchedule {
        name: row.get(0)?,
        definition: row.get(1)?,
        revision: row.number(2)?,
        next_at: row.optional_time(3)?,
    })
}

/// Runs a call on a connection for reading.
macro_rules! on_reader {
    ($self:ident, $doing:expr, $reader:ident => $call:expr) => {{
        let mut session = $self.shared.readers.get($doing).await?;
        let $reader = &mut session.connection;
        let found = $call.await?;
        session.give_back();
        Ok(found)
    }};
}

impl ScheduleStore for SqliteStore {
    fn schedule_commands(
        &self,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<Vec<ScheduledCommand>, StoreError>> {
        Box::pin(async move {
            let batch = CommandBatch::new(SCHEDULING, commands)?;
            if batch.commands.is_empty() {
                return Ok(Vec::new());
            }
            self.transaction(SCHEDULING, move |connection| {
                Box::pin(scheduled_commands::schedule_commands(connection, SCHEDULING, batch))
            })
            .await
        })
    }

    fn start_due_commands(&self, limit: usize) -> BoxFuture<'_, Result<DueCommands, StoreError>> {
        Box::pin(async move {
            check_commands(STARTING, limit)?;
            // A caller that polls takes no write lock while no command is due.
            let next: Result<_, StoreError> =
                on_reader!(self, STARTING, reader => scheduled_commands::next(reader));
            let (next, now) = (next?, Utc::now());
            if limit == 0 || next.is_none_or(|next| next > now) {
                return Ok(DueCommands::new(Vec::new(), now, next));
            }
            self.transaction(STARTING, move |connection| {
                Box::pin(scheduled_commands::start_due_commands(connection, limit))
            })
            .await
        })
    }

    fn end_commands(
        &self,
        ends: Vec<ScheduledEnd>,
        lease: Option<Lease>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let ends = checked_ends(ends)?;
            if ends.is_empty() {
                return Ok(());
            }
            self.transaction(ENDING, move |connection| {
                Box::pin(scheduled_commands::end_commands(connection, ends, lease))
            })
            .await
        })
    }

    fn cancel_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        Box::pin(self.transaction(CANCELLING, move |connection| {
            Box::pin(scheduled_commands::cancel_command(connection, id))
        }))
    }

    fn retry_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        Box::pin(self.transaction(RETRYING, move |connection| {
            Box::pin(scheduled_commands::retry_command(connection, id))
        }))
    }

    fn scheduled_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        Box::pin(async move {
            on_reader!(self, READING_COMMAND, reader =>
                scheduled_commands::scheduled_command(reader, READING_COMMAND, id))
        })
    }

    fn scheduled_commands<'a>(
        &'a self,
        query: &'a ScheduledQuery,
        after: Option<&'a ScheduledCommand>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ScheduledCommand>, StoreError>> {
        Box::pin(async move {
            check_query(query, limit)?;
            on_reader!(self, LISTING_COMMANDS, reader =>
                scheduled_commands::scheduled_commands(reader, query, after, limit))
        })
    }

    fn write_schedule(
        &self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let schedule = checked_schedule(schedule)?;
            let batch = CommandBatch::new(WRITING_SCHEDULE, commands)?;
            self.transaction(WRITING_SCHEDULE, move |connection| {
                Box::pin(write_schedule(connection, schedule, batch))
            })
            .await
        })
    }

    fn remove_schedule<'a>(
        &'a self,
        name: &'a str,
        revision: u64,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            check_text(REMOVING_SCHEDULE, "schedule", name)?;
            let name = name.to_owned();
            self.transaction(REMOVING_SCHEDULE, move |connection| {
                Box::pin(remove_schedule(connection, name, revision))
            })
            .await
        })
    }

    fn schedule<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoredSchedule>, StoreError>> {
        Box::pin(async move {
            check_text(READING_SCHEDULE, "schedule", name)?;
            on_reader!(self, READING_SCHEDULE, reader => schedule(reader, name))
        })
    }

    fn schedules<'a>(
        &'a self,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredSchedule>, StoreError>> {
        Box::pin(async move {
            check_schedules(LISTING_SCHEDULES, after, limit)?;
            on_reader!(self, LISTING_SCHEDULES, reader => schedules(reader, after, limit))
        })
    }

    fn due_schedules(&self, limit: usize) -> BoxFuture<'_, Result<DueSchedules, StoreError>> {
        Box::pin(async move {
            check_schedules(READING_DUE_SCHEDULES, None, limit)?;
            on_reader!(self, READING_DUE_SCHEDULES, reader => due_schedules(reader, limit))
        })
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection, Row};

    use super::*;

    #[tokio::test]
    async fn each_statement_reads_only_its_schedules() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::raw_sql(include_str!("../../../migrations/sqlite/0001_events.sql"))
            .execute(&mut connection)
            .await
            .unwrap();
        let by_name = "autoindex_storied_schedules_1 (name";
        for (statement, searches) in [
            (UPDATE, vec![by_name]),
            (REMOVE, vec![by_name]),
            (REMOVE_WAITING, vec!["by_schedule (schedule=? AND state=?)"]),
            (SCHEDULE, vec![by_name]),
            (PAGE, vec![by_name]),
            (DUE, vec!["by_next (next_at<?)", "by_next (next_at>?)"]),
        ] {
            let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let steps = sqlx::query(explain).fetch_all(&mut connection).await.unwrap();
            let steps: Vec<String> = steps.iter().map(|step| step.get(3)).collect();
            let found: Vec<_> = steps.iter().filter(|step| step.contains(" storied_")).collect();
            assert_eq!(found.len(), searches.len(), "{statement}: {steps:?}");
            for (step, search) in found.iter().zip(searches) {
                assert!(step.starts_with("SEARCH") && step.contains(search), "{statement}: {steps:?}");
            }
        }
    }
}
