//! Finds the events that match a query.

use futures_util::TryStreamExt;
use sqlx::error::BoxDynError;
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments, AssertSqlSafe, Row};
use uuid::Uuid;

use super::super::connection::Readers;
use super::super::convert::to_sql;
use super::super::error::{encoding, failed};
use super::super::number_cache::{Anchor, NumberCache};
use super::super::tag_query::add_page;
use super::decoder::Decoder;
use crate::codec::Codec;
use crate::event::{Position, RecordedEvent};
use crate::store::{Query, StoreError};

const DOING: &str = "reading the events of a query";

/// Returns a page of the events; fewer than `limit` only at the end.
pub(in crate::store::sqlite) async fn matching(
    readers: &Readers,
    cache: &NumberCache,
    codec: Codec,
    query: &Query,
    after: Position,
    limit: usize,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let anchor = cache.anchor();
    let (sql, arguments) = statement(query, anchor, after, limit).map_err(|error| encoding(DOING, error))?;
    let mut reader = readers.get(DOING).await?;
    let mut rows = sqlx::query_with(AssertSqlSafe(sql), arguments).fetch(&mut reader.connection);
    let mut decoder = Decoder::new(DOING, codec, cache)?;
    let mut events: Vec<RecordedEvent> = Vec::new();
    while let Some(row) = rows.try_next().await.map_err(|error| failed(DOING, error))? {
        if events.is_empty() {
            let found: Option<Uuid> = row.try_get(9).map_err(|error| failed(DOING, error))?;
            if anchor.is_some_and(|(_, id)| found != Some(id)) {
                cache.clear();
            }
        }
        let position = Position::new(decoder.number(&row, 0)?);
        let number = decoder.optional_number(&row, 1)?.unwrap_or_default();
        events.push(decoder.event(&row, number, position, events.len())?);
    }
    drop(rows);
    if let Some(event) = events.last() {
        cache.read_log((event.position, event.id));
    }
    decoder.resolve(&mut reader.connection, &mut events).await?;
    reader.give_back();
    Ok(events)
}

/// Returns the statement for a page, with its arguments.
///
/// `CROSS JOIN` keeps the order of the joins.
fn statement(
    query: &Query,
    anchor: Option<Anchor>,
    after: Position,
    limit: usize,
) -> Result<(String, SqliteArguments), BoxDynError> {
    let mut sql = String::from(
        "SELECT event.position, event.stream, event.version, event.name, event.id, event.command_id,
             event.payload, event.metadata, event.recorded_at,
             (SELECT id FROM storied_events WHERE position = ?)
         FROM (",
    );
    let mut arguments = SqliteArguments::default();
    arguments.add(anchor.map(|(position, _)| to_sql(position.get())))?;
    add_page(&mut sql, &mut arguments, query, after, limit)?;
    sql += "
         ) AS found CROSS JOIN storied_events AS event ON event.position = found.position
         ORDER BY found.position";
    Ok((sql, arguments))
}
