//! Timers.

use std::cmp::Ordering;

use chrono::Utc;
use serde::Serialize;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::super::StoreError;
use super::super::columns::Columns;
use super::super::timer::{
    DueTimers, LISTING, READING_DUE, StoredTimer, TimerChanges, WRITING, check_read, cursor,
};
use super::convert::to_sql;
use super::error::failed;
use crate::event::Version;

/// Parameters: process, and a list of instance, name and highest version.
///
/// `CROSS JOIN` leaves one plan.
const REMOVE: &str = "
    DELETE FROM storied_timers WHERE (process, instance, name) IN (
        SELECT timer.process, timer.instance, timer.name
        FROM json_each(?2) AS removed CROSS JOIN storied_timers AS timer
        WHERE timer.process = ?1 AND timer.instance = removed.value ->> 0 AND timer.name = removed.value ->> 1
            AND timer.version <= removed.value ->> 2)";

/// Parameters: process, and a list of instance, name, version and due time.
const PUT: &str = "
    INSERT INTO storied_timers (process, instance, name, version, due_at)
    SELECT ?1, value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(?2) WHERE true
    ON CONFLICT (process, instance, name) DO UPDATE SET version = excluded.version, due_at = excluded.due_at
    WHERE version < excluded.version OR (version = excluded.version AND name = '')";

/// The due timers, and the next one. Parameters: process, time and limit.
///
/// One statement, so that both are of one state.
const DUE: &str = "
    SELECT * FROM (
        SELECT process, instance, name, version, due_at FROM storied_timers INDEXED BY storied_timers_by_due
        WHERE process = ?1 AND due_at <= ?2 ORDER BY due_at, instance, name LIMIT ?3)
    UNION ALL
    SELECT * FROM (
        SELECT process, instance, name, version, due_at FROM storied_timers INDEXED BY storied_timers_by_due
        WHERE process = ?1 AND due_at > ?2 ORDER BY due_at, instance, name LIMIT 1)";

/// Returns the processes with timers, or only that of the parameter.
const PROCESSES: &str = "
    WITH RECURSIVE processes (process) AS (
        SELECT coalesce(?1, (SELECT min(process) FROM storied_timers))
        UNION ALL
        SELECT (SELECT min(process) FROM storied_timers WHERE process > processes.process)
        FROM processes WHERE processes.process IS NOT NULL AND ?1 IS NULL)
    SELECT process FROM processes WHERE process IS NOT NULL";

/// A page of a process. Parameters: process; due time, instance and name of the last timer; limit.
const PAGE: &str = "
    SELECT process, instance, name, version, due_at FROM storied_timers INDEXED BY storied_timers_by_due
    WHERE process = ?1 AND (due_at, instance, name) > (?2, ?3, ?4) ORDER BY due_at, instance, name LIMIT ?5";

pub(super) async fn write_timers(
    connection: &mut SqliteConnection,
    process: String,
    changes: TimerChanges,
) -> Result<(), StoreError> {
    let now = Utc::now();
    let (mut removed, mut put) = (Vec::new(), Vec::new());
    for ((instance, name), change) in &changes {
        if let Some(version) = change.removed {
            removed.push((instance, name, to_sql(version.get())));
        }
        if let Some((version, due)) = change.put {
            put.push((instance, name, to_sql(version.get()), due.time(now).timestamp_micros()));
        }
    }
    for (statement, list) in [(REMOVE, json(&removed)?), (PUT, json(&put)?)] {
        sqlx::query(statement)
            .bind(process.as_str())
            .bind(list)
            .execute(&mut *connection)
            .await
            .map_err(|error| failed(WRITING, error))?;
    }
    Ok(())
}

/// Encodes a list as one parameter for `json_each`: the statement is the same for every length.
fn json(list: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(list).map_err(|error| StoreError::Invalid { reason: format!("{WRITING}: {error}") })
}

pub(super) async fn due_timers(
    connection: &mut SqliteConnection,
    process: &str,
    limit: usize,
) -> Result<DueTimers, StoreError> {
    check_read(READING_DUE, Some(process), limit)?;
    let now = Utc::now();
    let earliest = sqlx::query(DUE)
        .bind(process)
        .bind(now.timestamp_micros())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1))
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(timer).collect())
        .map_err(|error| failed(READING_DUE, error))?;
    Ok(DueTimers::divide(earliest, now, limit))
}

pub(super) async fn timers(
    connection: &mut SqliteConnection,
    process: Option<&str>,
    after: Option<&StoredTimer>,
    limit: usize,
) -> Result<Vec<StoredTimer>, StoreError> {
    check_read(LISTING, process, limit)?;
    let listing = |error| failed(LISTING, error);
    let processes: Vec<String> =
        sqlx::query_scalar(PROCESSES).bind(process).fetch_all(&mut *connection).await.map_err(listing)?;
    let (after_due, [after_process, after_instance, after_name]) = cursor(after);
    let after_due = after_due.map_or(i64::MIN, |time| time.timestamp_micros());
    let mut timers: Vec<StoredTimer> = Vec::new();
    for process in processes {
        // At the due time of the last timer, only processes after its own have more timers.
        let (due, instance, name) = match process.as_str().cmp(after_process) {
            Ordering::Less => (after_due.saturating_add(1), "", ""),
            Ordering::Equal => (after_due, after_instance, after_name),
            Ordering::Greater => (after_due, "", ""),
        };
        let page = sqlx::query(PAGE)
            .bind(&process)
            .bind(due)
            .bind(instance)
            .bind(name)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(&mut *connection)
            .await
            .and_then(|rows| rows.iter().map(timer).collect::<Result<Vec<_>, _>>())
            .map_err(listing)?;
        timers.extend(page);
        timers.sort_unstable_by(|a, b| a.order().cmp(&b.order()));
        timers.truncate(limit);
    }
    Ok(timers)
}

fn timer(row: &SqliteRow) -> Result<StoredTimer, sqlx::Error> {
    let row = Columns::of("storied_timers", row);
    Ok(StoredTimer {
        process: row.get(0)?,
        instance: row.get(1)?,
        name: row.get(2)?,
        version: Version::new(row.number(3)?),
        due_at: row.time(4)?,
    })
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection, Row};

    use super::*;

    /// Returns the steps of a statement's plan that read timers.
    async fn plan(connection: &mut SqliteConnection, statement: &str) -> Vec<String> {
        let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
        let steps = sqlx::query(explain).fetch_all(connection).await.unwrap();
        let steps = steps.iter().map(|step| step.get::<String, _>(3));
        steps.filter(|step| step.contains("timer") || step.contains("TEMP B-TREE")).collect()
    }

    #[tokio::test]
    async fn each_statement_reads_only_its_timers() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::raw_sql(include_str!("../../../migrations/sqlite/0001_events.sql"))
            .execute(&mut connection)
            .await
            .unwrap();
        let by_due = |condition| {
            format!("SEARCH storied_timers USING INDEX storied_timers_by_due (process=? AND {condition})")
        };
        assert_eq!(plan(&mut connection, DUE).await, [by_due("due_at<?"), by_due("due_at>?")]);
        let page = plan(&mut connection, PAGE).await;
        assert!(
            page.len() == 1 && page[0].starts_with(&by_due("(due_at,instance,name)>(?,?,?)")[..80]),
            "{page:?}"
        );
        let remove = plan(&mut connection, REMOVE).await;
        assert!(!remove.is_empty(), "{remove:?}");
        for step in remove {
            assert!(step.contains("PRIMARY KEY (process=? AND instance=? AND name=?)"), "{step}");
        }
    }
}
