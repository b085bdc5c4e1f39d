//! The part of the store port that finds events by their tags.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::boundary::Boundary;
use super::error::StoreError;
use super::query::Query;
use crate::event::{Position, RecordedEvent};
use crate::future::BoxFuture;

/// Number of events in a page of a read.
const PAGE: usize = 1_000;

/// Longest wait for a high-water mark that is high enough.
const PATIENCE: Duration = Duration::from_secs(10);

/// The part of an event store that finds events by their [tags](crate::event::Tags).
pub trait QueryStore: Send + Sync + 'static {
    /// Returns the high-water mark; see
    /// [`EventStore::high_water_mark`](super::EventStore::high_water_mark).
    ///
    /// May return an older mark: [`read`](Self::read) needs one that was reached before it.
    fn mark_before_read(&self) -> BoxFuture<'_, Result<Position, StoreError>>;

    /// Reads events that match a query: at most `limit` after `after`, in the order of the log.
    ///
    /// The page has all events that are committed before the call, also those above the high-water
    /// mark. Fewer than `limit` events mean that there were no further ones.
    ///
    /// # Errors
    /// `Invalid` if the query is [invalid](Query::check).
    fn matching<'a>(
        &'a self,
        query: &'a Query,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>>;

    /// Reads all events that match a query, with the boundary of the read.
    ///
    /// The events are in the order of the log.
    ///
    /// # Errors
    /// `Invalid` if the query is [invalid](Query::check), or more than [`Query::MAX_EVENTS`] events
    /// match it; `Unavailable` if an open transaction holds back the high-water mark, and more than
    /// [`Boundary::MAX_SEEN`] events match above it.
    fn read(&self, query: Query) -> BoxFuture<'_, Result<(Vec<RecordedEvent>, Boundary), StoreError>> {
        Box::pin(async move {
            query.check()?;
            let give_up = Instant::now() + PATIENCE;
            // First, so that each event which is not read has a position above it.
            let mut mark = self.mark_before_read().await?;
            let mut events: Vec<RecordedEvent> = Vec::new();
            let mut after = Position::START;
            loop {
                let page = self.matching(&query, after, PAGE).await?;
                let is_last = page.len() < PAGE;
                after = page.last().map_or(after, |event| event.position);
                events.extend(page);
                if events.len() > Query::MAX_EVENTS {
                    let reason = format!(
                        "too many events match the query (limit {}); choose a smaller boundary, by further tags or fewer variants",
                        Query::MAX_EVENTS
                    );
                    return Err(StoreError::Invalid { reason });
                }
                if !is_last {
                    continue;
                }
                let seen: Vec<_> =
                    events.iter().map(|event| event.position).filter(|position| *position > mark).collect();
                if seen.len() <= Boundary::MAX_SEEN {
                    return Ok((events, Boundary::of_read(query, mark, seen)));
                }
                if Instant::now() >= give_up {
                    let reason = format!(
                        "{} events match above the high-water mark {mark}; end the transaction that holds it back",
                        seen.len()
                    );
                    return Err(StoreError::Unavailable { reason, source: None });
                }
                sleep(Duration::from_millis(20)).await;
                // Events that the pages above have missed may be at or below the new mark.
                mark = self.mark_before_read().await?;
                events.clear();
                after = Position::START;
            }
        })
    }
}
