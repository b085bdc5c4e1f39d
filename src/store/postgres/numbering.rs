//! Gives names their numbers, and replaces the numbers of events by names and streams.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::{Append, StoreError};
use super::connection::Session;
use super::error::failed;
use super::inner::PgInner;
use super::numbers::NumberedEvents;
use crate::event::{Category, EventName, RecordedEvent, StreamId};

const NUMBERING: &str = "numbering event names";

/// Ensures that all names and categories of appends have numbers; most often they do.
///
/// The numbers are committed before an append uses them.
pub(super) async fn number_names(core: &Arc<PgInner>, appends: &[&Append]) -> Result<(), NumberingError> {
    let (names, categories) = core.numbers.unnumbered(appends);
    if names.is_empty() && categories.is_empty() {
        return Ok(());
    }
    let texts: Vec<&str> =
        names.iter().map(EventName::as_str).chain(categories.iter().map(Category::as_str)).collect();
    let session = core.connections.get(NUMBERING).await;
    let mut session = session.map_err(NumberingError::Store)?;
    let query = sqlx::query(core.sql.number_names.clone())
        .bind(texts)
        .persistent(core.connections.persistent())
        .fetch_one(&mut *session);
    let row = core.timed(query).await.map_err(NumberingError::Database)?;
    let columns = || -> Result<(Vec<i32>, i64), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
    let (numbers, server) = columns().map_err(NumberingError::Database)?;
    core.timed(session.done()).await.map_err(NumberingError::Database)?;
    let (of_names, of_categories) = numbers.split_at(names.len().min(numbers.len()));
    let names = names.into_iter().zip(of_names.iter().copied());
    core.numbers.learn_names(server, names, categories.into_iter().zip(of_categories.iter().copied()));
    Ok(())
}

/// Replaces the numbers of events by their names and streams.
///
/// An event whose stream does not exist is ignored. Only a program that calls `storied.append()`
/// by hand can write one; it must not stop the readers of the log.
///
/// # Errors
/// `Corrupt` if a name has no row.
pub(super) async fn resolve(
    core: &Arc<PgInner>,
    doing: &str,
    numbered: NumberedEvents,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let NumberedEvents { mut events, numbers } = numbered;
    let (names, streams) = core.numbers.fill(&mut events, &numbers);
    if !names.is_empty() || !streams.is_empty() {
        let mut session = core.connections.get(doing).await?;
        if !names.is_empty() {
            read_names(core, &mut session, doing, &names).await?;
        }
        let found = if streams.is_empty() {
            HashMap::new()
        } else {
            read_streams(core, &mut session, doing, &streams).await?
        };
        session.finish(doing).await?;
        let mut strays = HashSet::new();
        for (event, (_, stream)) in events.iter_mut().zip(&numbers) {
            let Some(number) = stream.filter(|number| streams.contains(number)) else { continue };
            match found.get(&number) {
                Some(stream) => event.stream = stream.clone(),
                None => _ = strays.insert(event.position),
            }
        }
        if let Some(number) = core.numbers.fill_names(&mut events, &numbers).first() {
            return Err(corrupt(doing, &format!("name {number} has no text")));
        }
        if let Some(first) = strays.iter().min() {
            tracing::error!(
                %first, count = strays.len(),
                "ignored events without a stream: a program has called storied.append() by hand"
            );
        }
        events.retain(|event| !strays.contains(&event.position));
    }
    Ok(events)
}

async fn read_names(
    core: &PgInner,
    session: &mut Session,
    doing: &str,
    numbers: &[i32],
) -> Result<(), StoreError> {
    let rows = sqlx::query(core.sql.names.clone())
        .bind(numbers)
        .persistent(core.connections.persistent())
        .fetch_all(&mut **session)
        .await
        .map_err(|error| failed(doing, error))?;
    let mut names = Vec::with_capacity(rows.len());
    for row in &rows {
        let columns = || -> Result<(i32, String), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        let (number, name) = columns().map_err(|error| failed(doing, error))?;
        names.push((number, EventName::new(name).map_err(|error| corrupt(doing, &error.to_string()))?));
    }
    core.numbers.learn_texts(names.into_iter());
    Ok(())
}

async fn read_streams(
    core: &PgInner,
    session: &mut Session,
    doing: &str,
    numbers: &[i64],
) -> Result<HashMap<i64, StreamId>, StoreError> {
    let rows = sqlx::query(core.sql.streams.clone())
        .bind(numbers)
        .persistent(core.connections.persistent())
        .fetch_all(&mut **session)
        .await
        .map_err(|error| failed(doing, error))?;
    learn_streams(core, doing, &rows, [0, 1, 2])
}

/// Records the streams of rows, whose number, category and id are in `columns`; an event without a
/// stream has no category and id.
pub(super) fn learn_streams<'r>(
    core: &PgInner,
    doing: &str,
    rows: &'r [PgRow],
    columns: [usize; 3],
) -> Result<HashMap<i64, StreamId>, StoreError> {
    let mut categories: HashMap<&str, Category> = HashMap::new();
    let mut found = HashMap::with_capacity(rows.len());
    let [number, category, id] = columns;
    let text = |row: &'r PgRow, column| {
        row.try_get::<Option<&'r str>, _>(column).map_err(|error| failed(doing, error))
    };
    for row in rows {
        let number = row.try_get(number).map_err(|error| failed(doing, error))?;
        let (category, id) = (text(row, category)?, text(row, id)?);
        let (Some(category), Some(id)) = (category, id) else { continue };
        let category = match categories.get(category) {
            Some(category) => category.clone(),
            None => {
                let checked = Category::new(category).map_err(|error| corrupt(doing, &error.to_string()))?;
                categories.entry(category).or_insert(checked).clone()
            }
        };
        found.insert(number, StreamId::stored(category, id.into()));
    }
    core.numbers.learn_streams(&found);
    Ok(found)
}

fn corrupt(doing: &str, reason: &str) -> StoreError {
    StoreError::Corrupt { reason: format!("{doing}: {reason}") }
}

/// The reason why names could not be numbered. Nothing else was written.
#[derive(Debug)]
pub(super) enum NumberingError {
    Store(StoreError),
    Database(sqlx::Error),
}
