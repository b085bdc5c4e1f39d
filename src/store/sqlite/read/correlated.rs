//! Finds the events with a correlation id.

use futures_util::TryStreamExt;
use sqlx::Row;
use uuid::Uuid;

use super::super::connection::Readers;
use super::super::convert::to_sql;
use super::super::error::failed;
use super::super::number_cache::NumberCache;
use super::decoder::Decoder;
use crate::codec::Codec;
use crate::event::{Position, RecordedEvent};
use crate::store::StoreError;
use crate::store::page_size::PageSizer;

const DOING: &str = "looking up a correlation id";

/// `INDEXED BY` and `CROSS JOIN` leave one plan. The events of a command have no order by position:
/// they are few.
const STATEMENT: &str = "
    SELECT event.position, event.stream, event.version, event.name, event.id, event.command_id,
        event.payload, event.metadata, event.recorded_at,
        (SELECT id FROM storied_events WHERE position = ?4)
    FROM (
        SELECT position FROM storied_events INDEXED BY storied_events_by_command
        WHERE command_id = ?1 AND position > ?2
        UNION
        SELECT position FROM (
            SELECT position FROM storied_events INDEXED BY storied_events_by_correlation
            WHERE correlation_id = ?1 AND position > ?2 ORDER BY position LIMIT ?3)
        ORDER BY position LIMIT ?3
    ) AS found CROSS JOIN storied_events AS event ON event.position = found.position
    ORDER BY found.position";

/// Returns a page of the events; empty at the end only.
pub(in crate::store::sqlite) async fn correlated(
    readers: &Readers,
    page_sizer: &PageSizer,
    cache: &NumberCache,
    codec: Codec,
    (id, after, limit): (Uuid, Position, usize),
) -> Result<Vec<RecordedEvent>, StoreError> {
    let limit = page_sizer.events(limit);
    let anchor = cache.anchor();
    let mut reader = readers.get(DOING).await?;
    let mut rows = sqlx::query(STATEMENT)
        .bind(id)
        .bind(to_sql(after.get()))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .bind(anchor.map(|(position, _)| to_sql(position.get())))
        .fetch(&mut reader.connection);
    let mut decoder = Decoder::new(DOING, codec, cache)?;
    let mut events: Vec<RecordedEvent> = Vec::new();
    let mut budget = page_sizer.page(limit);
    while let Some(row) = rows.try_next().await.map_err(|error| failed(DOING, error))? {
        if events.is_empty() {
            let found: Option<Uuid> = row.try_get(9).map_err(|error| failed(DOING, error))?;
            if anchor.is_some_and(|(_, id)| found != Some(id)) {
                cache.clear();
            }
        }
        if budget.is_full() {
            continue;
        }
        let position = Position::new(decoder.number(&row, 0)?);
        let number = decoder.optional_number(&row, 1)?.unwrap_or_default();
        let event = decoder.event(&row, number, position, events.len())?;
        budget.take(&event);
        events.push(event);
    }
    drop(rows);
    if let Some(event) = events.last() {
        cache.read_log((event.position, event.id));
    }
    decoder.resolve(&mut reader.connection, &mut events).await?;
    reader.give_back();
    Ok(events)
}
