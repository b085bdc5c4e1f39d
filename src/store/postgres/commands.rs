//! Command records and command events. Concurrent requests share a statement and a commit.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::{CommandEvents, CommandRecord, StoreError};
use super::convert::micros;
use super::durability;
use super::error::failed;
use super::inner::PgInner;
use crate::event::{Position, StreamId, Version};

const READING: &str = "reading a command record";
const RECORDING: &str = "recording a command";

const FINDING: &str = "looking up the events of a command";

/// Assumed size in bytes of a look-up, whose result has an unknown size; 64 of them fit in a call.
const LOOK_UP: usize = 16 << 10;

pub(super) async fn events(
    core: &Arc<PgInner>,
    stream: &StreamId,
    command: Uuid,
) -> Result<Option<CommandEvents>, StoreError> {
    let store = core.clone();
    let find = move |commands| find(store.clone(), commands);
    let size = size_of::<CommandEvents>() + stream.id().len();
    core.commands.events.submit((stream.clone(), command), size, find).await
}

async fn find(
    core: Arc<PgInner>,
    commands: Vec<(StreamId, Uuid)>,
) -> Vec<Result<Option<CommandEvents>, StoreError>> {
    match core.timed_call(FINDING, find_events(&core, &commands)).await {
        Ok(found) => found.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error); commands.len()],
    }
}

/// Returns one result for each pair of stream and command.
async fn find_events(
    core: &Arc<PgInner>,
    commands: &[(StreamId, Uuid)],
) -> Result<Vec<Option<CommandEvents>>, StoreError> {
    let mut session = core.connections.get(FINDING).await?;
    let rows = sqlx::query(core.sql.command_events.clone())
        .bind(commands.iter().map(|(stream, _)| stream.category()).collect::<Vec<_>>())
        .bind(commands.iter().map(|(stream, _)| stream.id()).collect::<Vec<_>>())
        .bind(commands.iter().map(|(_, id)| *id).collect::<Vec<_>>())
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(FINDING, error))?;
    session.finish(FINDING).await?;
    let mut found = vec![None; commands.len()];
    for row in &rows {
        let row = Columns::of("events", row);
        let number = |column| row.number(column).map_err(|error| failed(FINDING, error));
        let events = CommandEvents {
            first: Version::new(number(1)?),
            last: Version::new(number(2)?),
            position: Position::new(number(3)?),
        };
        let index = usize::try_from(number(0)?).ok().and_then(|n| n.checked_sub(1));
        if let Some(slot) = index.and_then(|index| found.get_mut(index)) {
            *slot = Some(events);
        }
    }
    Ok(found)
}

pub(super) async fn command(core: &Arc<PgInner>, id: Uuid) -> Result<Option<CommandRecord>, StoreError> {
    let store = core.clone();
    let look_up = move |ids| look_up(store.clone(), ids);
    core.commands.looked_up.submit(id, LOOK_UP, look_up).await
}

async fn look_up(core: Arc<PgInner>, ids: Vec<Uuid>) -> Vec<Result<Option<CommandRecord>, StoreError>> {
    match core.timed_call(READING, read(&core, &ids)).await {
        // One call may contain the same id twice.
        Ok(found) => ids.iter().map(|id| Ok(found.get(id).cloned())).collect(),
        Err(error) => vec![Err(error); ids.len()],
    }
}

pub(super) async fn record_command(
    core: &Arc<PgInner>,
    command: CommandRecord,
) -> Result<CommandRecord, StoreError> {
    let bytes = command.name.len() + command.outcome.len();
    let store = core.clone();
    let record = move |commands| record(store.clone(), commands);
    core.commands.recorded.submit(command, bytes, record).await
}

async fn record(
    core: Arc<PgInner>,
    mut commands: Vec<CommandRecord>,
) -> Vec<Result<CommandRecord, StoreError>> {
    let recorded = match core.commit_call(RECORDING, insert(&core, &commands)).await {
        Ok(recorded) => recorded,
        Err(StoreError::Invalid { .. }) if commands.len() > 1 => {
            // The batch is split in halves until each command that cannot be stored is alone.
            let rest = commands.split_off(commands.len() / 2);
            let mut answers = Box::pin(record(core.clone(), commands)).await;
            answers.append(&mut Box::pin(record(core, rest)).await);
            return answers;
        }
        Err(error) => return vec![Err(error); commands.len()],
    };
    // Another node's record came first. A new statement reads it: it sees the commit that the first
    // statement waited for.
    let rest: Vec<_> = commands.iter().map(|it| it.id).filter(|id| !recorded.contains_key(id)).collect();
    let others =
        if rest.is_empty() { Ok(HashMap::new()) } else { core.timed_call(READING, read(&core, &rest)).await };
    let answer = |id: Uuid| match (recorded.get(&id), &others) {
        (Some(first), _) => Ok(first.clone()),
        (None, Ok(others)) => others.get(&id).cloned().ok_or_else(|| StoreError::Unavailable {
            reason: format!("{RECORDING}: the record of {id} was deleted at the same time"),
            source: None,
        }),
        (None, Err(error)) => Err(error.clone()),
    };
    commands.iter().map(|command| answer(command.id)).collect()
}

/// Reads the existing records of `ids`; they are durable.
///
/// A command with a record is not handled again.
async fn read(core: &Arc<PgInner>, ids: &[Uuid]) -> Result<HashMap<Uuid, CommandRecord>, StoreError> {
    let fetched = fetch(core, READING, sqlx::query(core.sql.commands.clone()).bind(ids), true);
    durability::uncancelled(core, fetched).await
}

/// Inserts the records and returns those that were the first of their command.
async fn insert(
    core: &Arc<PgInner>,
    commands: &[CommandRecord],
) -> Result<HashMap<Uuid, CommandRecord>, StoreError> {
    let insert = sqlx::query(core.sql.record_commands.clone())
        .bind(commands.iter().map(|it| it.id).collect::<Vec<_>>())
        .bind(commands.iter().map(|it| it.name.as_str()).collect::<Vec<_>>())
        .bind(commands.iter().map(|it| it.fingerprint).collect::<Vec<_>>())
        .bind(commands.iter().map(|it| &*it.outcome).collect::<Vec<&[u8]>>());
    fetch(core, RECORDING, insert, false).await
}

/// Runs a statement and returns its records by command id; with `confirm` they are durable.
async fn fetch(
    core: &Arc<PgInner>,
    doing: &str,
    statement: Query<'_, Postgres, PgArguments>,
    confirm: bool,
) -> Result<HashMap<Uuid, CommandRecord>, StoreError> {
    let mut session = core.connections.get(doing).await?;
    let rows = statement.persistent(core.connections.persistent()).fetch_all(&mut *session).await;
    let rows = rows.map_err(|error| failed(doing, error))?;
    if confirm && !rows.is_empty() {
        durability::confirm(core, &mut session).await?;
    }
    session.finish(doing).await?;
    let records = rows.iter().map(|row| command_record(row).map(|record| (record.id, record)));
    records.collect::<Result<_, _>>().map_err(|error| failed(doing, error))
}

fn command_record(row: &PgRow) -> Result<CommandRecord, sqlx::Error> {
    let row = Columns::of("commands", row);
    Ok(CommandRecord {
        id: row.get(0)?,
        name: row.get(1)?,
        fingerprint: row.get(2)?,
        outcome: Bytes::from(row.get::<Vec<u8>>(3)?),
        recorded_at: row.time(4)?,
    })
}

pub(super) async fn forget_commands(
    core: &Arc<PgInner>,
    age: Duration,
    limit: usize,
) -> Result<usize, StoreError> {
    const DOING: &str = "deleting old command records";
    let mut session = core.connections.get(DOING).await?;
    let forgotten = sqlx::query(core.sql.forget_commands.clone())
        .bind(micros(age))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .persistent(core.connections.persistent())
        .execute(&mut *session)
        .await
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    Ok(usize::try_from(forgotten.rows_affected()).unwrap_or(usize::MAX))
}
