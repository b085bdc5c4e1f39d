//! Finds the events with a correlation id.

use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::Row;
use uuid::Uuid;

use super::super::StoreError;
use super::convert::{from_sql, to_sql};
use super::error::failed;
use super::inner::PgInner;
use super::numbering::resolve;
use super::numbers::NumberedEvents;
use super::read::Decoder;
use crate::event::{Position, RecordedEvent};

pub(super) const DOING: &str = "looking up a correlation id";

/// Returns a page of the events, up to the current mark; empty at the end only.
pub(super) async fn correlated(
    core: &Arc<PgInner>,
    id: Uuid,
    after: Position,
    limit: usize,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let head = core.high_water_mark.refresh(&core.connections, &core.sql).await?;
    let mut after = after;
    loop {
        let (found, last) = page(core, id, after, head, limit.max(1)).await?;
        let events = resolve(core, DOING, found).await?;
        let Some(last) = last.filter(|_| events.is_empty()) else { return Ok(events) };
        // The page had only entries without an event, or events without a stream. Only a program
        // that calls the functions by hand can write one.
        after = last;
    }
}

/// Returns a page of the events, and the position of the last entry.
async fn page(
    core: &Arc<PgInner>,
    id: Uuid,
    after: Position,
    head: Position,
    limit: usize,
) -> Result<(NumberedEvents, Option<Position>), StoreError> {
    let limit = core.page_sizer.events(limit);
    let mut session = core.connections.get(DOING).await?;
    let mut decoder = Decoder::new(DOING, core.info.codec)?;
    let mut budget = core.page_sizer.page(limit);
    let (mut found, mut last) = (NumberedEvents::default(), None);
    {
        let mut rows = sqlx::query(core.sql.correlated.clone())
            .bind(id)
            .bind(to_sql(after.get()))
            .bind(to_sql(head.get()))
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .persistent(core.connections.persistent())
            .fetch(&mut *session);
        while !budget.is_cut()
            && let Some(row) = rows.try_next().await.map_err(|error| failed(DOING, error))?
        {
            let columns =
                || -> Result<(Option<i64>, i64), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(9)?)) };
            let (event, position) = columns().map_err(|error| failed(DOING, error))?;
            last = Some(Position::new(from_sql(position)));
            if event.is_some() {
                let (event, numbers) = decoder.of_log(&row)?;
                budget.take(&event);
                found.events.push(event);
                found.numbers.push(numbers);
            }
        }
    }
    // If rows are left unread, the connection is closed, as for a page of the log.
    if budget.is_cut() {
        drop(session);
    } else {
        session.finish(DOING).await?;
    }
    Ok((found, last))
}
