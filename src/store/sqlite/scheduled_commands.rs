//! Scheduled commands.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::schedule_arguments::{
    CANCELLING, CommandBatch, ENDING, LISTING_COMMANDS, RETRYING, STARTING, sort_by_due,
};
use super::super::scheduled::{
    DueCommands, ScheduledCommand, ScheduledOutcome, ScheduledQuery, ScheduledState,
};
use super::super::timer::{DueTime, cursor_time};
use super::super::{Lease, StoreError};
use super::convert::now;
use super::error::failed;
use super::leases;

/// Parameters: a list of id, target, due time, schedule, and start and length of the body; all bodies.
///
/// JSON has no bytes, so the bodies are one parameter, and ids are hexadecimal. SQLite cuts nothing
/// from no bytes.
const INSERT: &str = "
    INSERT INTO storied_scheduled_commands (id, target, due_at, schedule, state, body)
    SELECT unhex(value ->> 0), value ->> 1, value ->> 2, value ->> 3, 'waiting',
        coalesce(substr(?2, value ->> 4, value ->> 5), x'')
    FROM json_each(?1) WHERE true
    ON CONFLICT (id) DO NOTHING";

/// Parameter: a list of ids.
const STORED: &str = "
    SELECT c.id, c.target, c.body, c.due_at, c.schedule, c.state, c.reason
    FROM json_each(?1) AS wanted CROSS JOIN storied_scheduled_commands AS c
    WHERE c.id = unhex(wanted.value)";

const COMMAND: &str = "
    SELECT id, target, body, due_at, schedule, state, reason FROM storied_scheduled_commands WHERE id = ?1";

const NEXT: &str = "
    SELECT due_at FROM storied_scheduled_commands INDEXED BY storied_scheduled_commands_by_due
    WHERE state = 'waiting' ORDER BY due_at, id LIMIT 1";

/// Parameters: time, limit, and size of the bodies after which a page ends.
const START: &str = "
    UPDATE storied_scheduled_commands SET state = 'started' WHERE id IN (
        SELECT id FROM (
            SELECT id, sum(bytes) OVER (ORDER BY due_at, id ROWS UNBOUNDED PRECEDING) - bytes AS bytes_before
            FROM (
                SELECT id, due_at, length(body) AS bytes
                FROM storied_scheduled_commands INDEXED BY storied_scheduled_commands_by_due
                WHERE state = 'waiting' AND due_at <= ?1 ORDER BY due_at, id LIMIT ?2))
        WHERE bytes_before < ?3)
    RETURNING id, target, body, due_at, schedule, state, reason";

/// Parameter: a list of ids.
const DELETE_ENDED: &str = "
    DELETE FROM storied_scheduled_commands
    WHERE id IN (SELECT unhex(value) FROM json_each(?1)) AND +state <> 'waiting'";

/// Parameter: a list of id and reason.
const PARK: &str = "
    UPDATE storied_scheduled_commands SET state = 'parked', reason = ended.reason
    FROM (SELECT unhex(value ->> 0) AS id, value ->> 1 AS reason FROM json_each(?1)) AS ended
    WHERE storied_scheduled_commands.id = ended.id AND +state = 'started'";

/// Parameter: a list of id and due time.
const POSTPONE: &str = "
    UPDATE storied_scheduled_commands SET state = 'waiting', due_at = ended.due_at
    FROM (SELECT unhex(value ->> 0) AS id, value ->> 1 AS due_at FROM json_each(?1)) AS ended
    WHERE storied_scheduled_commands.id = ended.id AND +state = 'started'";

const CANCEL: &str = "DELETE FROM storied_scheduled_commands WHERE id = ?1 AND +state <> 'started'";

/// Parameters: id and time.
const RETRY: &str = "
    UPDATE storied_scheduled_commands SET state = 'waiting', due_at = ?2, reason = NULL
    WHERE id = ?1 AND +state = 'parked'";

/// The commands of a page in one state. Parameters as in [`page`]; the condition selects the schedule.
macro_rules! part_of_page {
    ($state:literal, $index:literal, $condition:literal) => {
        concat!(
            "SELECT * FROM (SELECT id, due_at, length(body) AS bytes FROM storied_scheduled_commands INDEXED BY ",
            $index,
            " WHERE (?1 IS NULL OR ?1 = '", $state, "') AND ", $condition, "state = '", $state,
            "' AND (due_at, id) > (?2, ?3) ORDER BY due_at, id LIMIT ?4)"
        )
    };
}

/// A page, as one statement, because a command may change its state between two. Parameters: state or
/// NULL; due time and id of the last command; limit; size of the bodies after which a page ends.
macro_rules! page {
    ($index:literal, $condition:literal) => {
        concat!(
            "SELECT c.id, c.target, c.body, c.due_at, c.schedule, c.state, c.reason FROM (
                SELECT id, sum(bytes) OVER (ORDER BY due_at, id ROWS UNBOUNDED PRECEDING) - bytes AS bytes_before
                FROM (SELECT * FROM (",
            part_of_page!("waiting", $index, $condition),
            " UNION ALL ",
            part_of_page!("started", $index, $condition),
            " UNION ALL ",
            part_of_page!("parked", $index, $condition),
            ") ORDER BY due_at, id LIMIT ?4)
            ) AS page CROSS JOIN storied_scheduled_commands AS c
            WHERE page.bytes_before < ?5 AND c.id = page.id"
        )
    };
}

const PAGE: &str = page!("storied_scheduled_commands_by_due", "");

/// A page of the commands of a schedule, which is the sixth parameter.
const PAGE_OF_SCHEDULE: &str = page!("storied_scheduled_commands_by_schedule", "schedule = ?6 AND ");

/// Encodes a list as one parameter for `json_each`: the statement is the same for every length.
fn json(doing: &str, list: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(list).map_err(|error| StoreError::Invalid { reason: format!("{doing}: {error}") })
}

/// Stores the commands that are not stored yet.
pub(super) async fn insert(
    connection: &mut SqliteConnection,
    doing: &str,
    batch: &CommandBatch,
) -> Result<(), StoreError> {
    let now = Utc::now();
    let (mut rows, mut bodies) = (Vec::with_capacity(batch.commands.len()), Vec::new());
    for (id, command) in &batch.commands {
        let (start, length) = (bodies.len() + 1, command.body.len());
        bodies.extend_from_slice(&command.body);
        let due_at = command.due.time(now).timestamp_micros();
        rows.push((hex(id), &command.target, due_at, &command.schedule, start, length));
    }
    sqlx::query(INSERT)
        .bind(json(doing, &rows)?)
        .bind(bodies)
        .execute(connection)
        .await
        .map_err(|error| failed(doing, error))?;
    Ok(())
}

fn hex(id: &Uuid) -> String {
    id.simple().to_string()
}

pub(super) async fn schedule_commands(
    connection: &mut SqliteConnection,
    doing: &str,
    batch: CommandBatch,
) -> Result<Vec<ScheduledCommand>, StoreError> {
    insert(connection, doing, &batch).await?;
    let ids: Vec<_> = batch.commands.keys().map(hex).collect();
    let stored = sqlx::query(STORED)
        .bind(json(doing, &ids)?)
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(command).collect())
        .map_err(|error| failed(doing, error))?;
    batch.sort(stored)
}

/// Returns the due time of the earliest waiting command.
pub(super) async fn next(connection: &mut SqliteConnection) -> Result<Option<DateTime<Utc>>, StoreError> {
    sqlx::query(NEXT)
        .fetch_optional(connection)
        .await
        .and_then(|row| row.map(|row| Columns::of("storied_scheduled_commands", &row).time(0)).transpose())
        .map_err(|error| failed(STARTING, error))
}

pub(super) async fn start_due_commands(
    connection: &mut SqliteConnection,
    limit: usize,
) -> Result<DueCommands, StoreError> {
    let now = Utc::now();
    let commands = sqlx::query(START)
        .bind(now.timestamp_micros())
        .bind(to_limit(limit))
        .bind(to_limit(ScheduledCommand::PAGE_BODIES))
        .fetch_all(&mut *connection)
        .await
        .and_then(|rows| rows.iter().map(command).collect())
        .map_err(|error| failed(STARTING, error))?;
    Ok(DueCommands::new(commands, now, next(connection).await?))
}

fn to_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

pub(super) async fn end_commands(
    connection: &mut SqliteConnection,
    ends: BTreeMap<Uuid, ScheduledOutcome>,
    lease: Option<Lease>,
) -> Result<(), StoreError> {
    let is_stale = match &lease {
        Some(lease) => !leases::is_current(connection, ENDING, lease).await?,
        None => false,
    };
    let (mut deleted, mut parked, mut postponed) = (Vec::new(), Vec::new(), Vec::new());
    let now = Utc::now();
    for (id, outcome) in &ends {
        match outcome {
            ScheduledOutcome::Executed => deleted.push(hex(id)),
            _ if is_stale => {}
            ScheduledOutcome::Parked(reason) => parked.push((hex(id), reason)),
            ScheduledOutcome::Postponed(wait) => {
                postponed.push((hex(id), DueTime::After(*wait).time(now).timestamp_micros()));
            }
        }
    }
    let lists = [json(ENDING, &deleted)?, json(ENDING, &parked)?, json(ENDING, &postponed)?];
    for (statement, list) in [DELETE_ENDED, PARK, POSTPONE].into_iter().zip(lists) {
        sqlx::query(statement)
            .bind(list)
            .execute(&mut *connection)
            .await
            .map_err(|error| failed(ENDING, error))?;
    }
    Ok(())
}

pub(super) async fn cancel_command(
    connection: &mut SqliteConnection,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, StoreError> {
    let before = scheduled_command(connection, CANCELLING, id).await?;
    sqlx::query(CANCEL).bind(id).execute(connection).await.map_err(|error| failed(CANCELLING, error))?;
    Ok(before)
}

pub(super) async fn retry_command(
    connection: &mut SqliteConnection,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, StoreError> {
    let before = scheduled_command(connection, RETRYING, id).await?;
    let retried = sqlx::query(RETRY).bind(id).bind(now()).execute(connection).await;
    retried.map_err(|error| failed(RETRYING, error))?;
    Ok(before)
}

pub(super) async fn scheduled_command(
    connection: &mut SqliteConnection,
    doing: &str,
    id: Uuid,
) -> Result<Option<ScheduledCommand>, StoreError> {
    sqlx::query(COMMAND)
        .bind(id)
        .fetch_optional(connection)
        .await
        .and_then(|row| row.as_ref().map(command).transpose())
        .map_err(|error| failed(doing, error))
}

pub(super) async fn scheduled_commands(
    connection: &mut SqliteConnection,
    query: &ScheduledQuery,
    after: Option<&ScheduledCommand>,
    limit: usize,
) -> Result<Vec<ScheduledCommand>, StoreError> {
    let after_due = after.map_or(i64::MIN, |after| cursor_time(after.due_at).timestamp_micros());
    let statement = if query.schedule.is_some() { PAGE_OF_SCHEDULE } else { PAGE };
    let mut page = sqlx::query(statement)
        .bind(query.state.map(ScheduledState::as_str))
        .bind(after_due)
        .bind(after.map_or(Uuid::nil(), |after| after.id))
        .bind(to_limit(limit))
        .bind(to_limit(ScheduledCommand::PAGE_BODIES));
    if let Some(schedule) = &query.schedule {
        page = page.bind(schedule);
    }
    let mut commands: Vec<_> = page
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(command).collect())
        .map_err(|error| failed(LISTING_COMMANDS, error))?;
    sort_by_due(&mut commands);
    Ok(commands)
}

fn command(row: &SqliteRow) -> Result<ScheduledCommand, sqlx::Error> {
    let row = Columns::of("storied_scheduled_commands", row);
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

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection, Row};

    use super::*;

    /// Returns the steps of a statement's plan that read commands.
    async fn plan(connection: &mut SqliteConnection, statement: &str) -> Vec<String> {
        let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
        let steps = sqlx::query(explain).fetch_all(connection).await.unwrap();
        let steps = steps.iter().map(|step| step.get::<String, _>(3));
        steps.filter(|step| step.contains("SCAN") || step.contains("SEARCH")).collect()
    }

    #[tokio::test]
    async fn each_statement_reads_only_its_commands() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::raw_sql(include_str!("../../../migrations/sqlite/0001_events.sql"))
            .execute(&mut connection)
            .await
            .unwrap();
        for (statement, searches) in [
            (INSERT, vec![]),
            (STORED, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (COMMAND, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (NEXT, vec!["by_due (state=?)"]),
            (START, vec!["autoindex_storied_scheduled_commands_1 (id=?)", "by_due (state=? AND due_at<?)"]),
            (DELETE_ENDED, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (PARK, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (POSTPONE, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (CANCEL, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (RETRY, vec!["autoindex_storied_scheduled_commands_1 (id=?)"]),
            (PAGE, vec!["by_due (state=? AND (due_at,id)>(?,?))"; 3]),
            (PAGE_OF_SCHEDULE, vec!["by_schedule (schedule=? AND state=? AND (due_at,id)>(?,?))"; 3]),
        ] {
            let steps = plan(&mut connection, statement).await;
            let of_table = |step: &&String| step.contains(" USING ");
            let mut found: Vec<_> = steps.iter().filter(of_table).collect();
            if searches.len() == 3 {
                let last = found.pop().unwrap();
                assert!(last.contains("autoindex_storied_scheduled_commands_1 (id=?)"), "{last}");
            }
            assert_eq!(found.len(), searches.len(), "{statement}: {steps:?}");
            for (step, search) in found.iter().zip(searches) {
                assert!(step.starts_with("SEARCH") && step.ends_with(search), "{statement}: {steps:?}");
            }
            assert!(!steps.iter().any(|step| step.starts_with("SCAN storied")), "{statement}: {steps:?}");
        }
    }
}
