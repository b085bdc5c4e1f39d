//! Queries of the store in memory.

use super::super::query_store::QueryStore;
use super::super::{BoxFuture, Query, StoreError};
use super::MemoryStore;
use crate::event::{Position, RecordedEvent};

impl QueryStore for MemoryStore {
    fn mark_before_read(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        Box::pin(async move { Ok(self.data().head()) })
    }

    fn matching<'a>(
        &'a self,
        query: &'a Query,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        Box::pin(async move {
            query.check()?;
            let data = self.data();
            let event = |position: Position| {
                let index = usize::try_from(position.get()).ok()?.checked_sub(1)?;
                data.events.get(index).cloned()
            };
            Ok(data.tags.matching(query, after, limit).into_iter().filter_map(event).collect())
        })
    }
}
