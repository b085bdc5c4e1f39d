//! Finds the events that match a query.

use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::Row;

use super::super::query_store::QueryStore;
use super::super::{BoxFuture, EventStore, Query, StoreError};
use super::PostgresStore;
use super::convert::{from_sql, to_sql};
use super::error::failed;
use super::inner::PgInner;
use super::numbering::resolve;
use super::numbers::NumberedEvents;
use super::query_arguments::QueryArguments;
use super::read::Decoder;
use crate::event::{Position, RecordedEvent};

const DOING: &str = "reading the events of a query";

impl QueryStore for PostgresStore {
    fn mark_before_read(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        self.high_water_mark()
    }

    fn matching<'a>(
        &'a self,
        query: &'a Query,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        self.call(DOING, matching(&self.shared.core, query, after, limit))
    }
}

/// Reads pages until there are `limit` events, or no further ones.
async fn matching(
    core: &Arc<PgInner>,
    query: &Query,
    after: Position,
    limit: usize,
) -> Result<Vec<RecordedEvent>, StoreError> {
    query.check()?;
    let arguments = QueryArguments::of(query);
    let (mut events, mut after) = (Vec::new(), after);
    while events.len() < limit {
        let page = page(core, &arguments, after, limit - events.len()).await?;
        // I13: a server that takes over without this event must not accept the decision.
        if let Some(event) = page.found.events.last() {
            core.high_water_mark.record(event.position, event.id);
        }
        events.extend(resolve(core, DOING, page.found).await?);
        match page.last {
            Some(last) if page.has_more => after = last,
            _ => break,
        }
    }
    Ok(events)
}

#[derive(Debug, Default)]
struct Page {
    found: NumberedEvents,
    /// Position of the last entry, also if it has no event.
    last: Option<Position>,
    has_more: bool,
}

async fn page(
    core: &Arc<PgInner>,
    arguments: &QueryArguments<'_>,
    after: Position,
    limit: usize,
) -> Result<Page, StoreError> {
    let limit = core.page_sizer.events(limit);
    let mut session = core.connections.get(DOING).await?;
    let mut decoder = Decoder::new(DOING, core.info.codec)?;
    let mut budget = core.page_sizer.page(limit);
    let (mut page, mut entries) = (Page::default(), 0);
    {
        let mut rows = arguments
            .bind(sqlx::query(core.sql.matching.clone()))
            .bind(to_sql(after.get()))
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .persistent(core.connections.persistent())
            .fetch(&mut *session);
        while !budget.is_cut()
            && let Some(row) = rows.try_next().await.map_err(|error| failed(DOING, error))?
        {
            let columns =
                || -> Result<(Option<i64>, i64), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(9)?)) };
            let (event, position) = columns().map_err(|error| failed(DOING, error))?;
            page.last = Some(Position::new(from_sql(position)));
            entries += 1;
            if event.is_some() {
                let (event, numbers) = decoder.of_log(&row)?;
                budget.take(&event);
                page.found.events.push(event);
                page.found.numbers.push(numbers);
            }
        }
    }
    page.has_more = budget.is_cut() || entries == limit;
    // If rows are left unread, the connection is closed, as for a page of the log.
    if budget.is_cut() {
        drop(session);
    } else {
        session.finish(DOING).await?;
    }
    Ok(page)
}
