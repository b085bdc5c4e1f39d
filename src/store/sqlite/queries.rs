//! Queries.

use super::super::query_store::QueryStore;
use super::super::{BoxFuture, Query, StoreError};
use super::shared::Shared;
use super::{SqliteStore, read};
use crate::event::{Position, RecordedEvent};

impl QueryStore for SqliteStore {
    fn mark_before_read(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        Box::pin(read::high_water_mark(&self.shared.readers))
    }

    fn matching<'a>(
        &'a self,
        query: &'a Query,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        Box::pin(async move {
            query.check()?;
            let Shared { readers, numbers, info, .. } = &*self.shared;
            read::matching(readers, numbers, info.codec, query, after, limit).await
        })
    }
}
