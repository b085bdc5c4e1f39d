//! Log source of a task: the store, or the pages that the partitions of its node share.

use std::future::Future;
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::page_cache::PageCache;
use crate::event::Position;
use crate::partition::Partition;
use crate::projection::interruption::Interruption;
use crate::store::{EventStore, LogPage, ReadLog, StoreError};

/// The log, as one task reads it. Cheap to clone.
#[derive(Clone)]
pub(super) struct LogSource {
    store: Arc<dyn EventStore>,
    /// The pages that the partitions of this node share, and the partition of the task.
    shared: Option<(PageCache, Partition)>,
}

impl LogSource {
    pub(super) fn new(store: Arc<dyn EventStore>, shared: Option<(PageCache, Partition)>) -> Self {
        Self { store, shared }
    }

    /// Reads a page, of which a partition receives its own part.
    ///
    /// A shared page may be older than the call. If it ended at the head of the log, it reaches
    /// `reach`.
    pub(super) fn read(
        &self,
        read: ReadLog,
        reach: Position,
    ) -> impl Future<Output = Result<LogPage, Interruption>> + Send + use<> {
        let Self { store, shared } = self.clone();
        async move {
            match shared {
                Some((pages, partition)) => pages.read(&store, read, partition, reach).await,
                None => store.read_log(read).await.map_err(Interruption::from),
            }
        }
    }

    /// Discards shared pages, so that the next page is read from the store.
    pub(super) fn forget(&self) {
        if let Some((pages, _)) = &self.shared {
            pages.clear();
        }
    }

    /// Returns when the first event after a position was recorded.
    pub(super) async fn next_recorded_at(
        &self,
        after: Position,
    ) -> Result<Option<DateTime<Utc>>, StoreError> {
        if let Some((pages, _)) = &self.shared {
            return pages.next_recorded_at(&self.store, after).await;
        }
        let page = self.store.read_log(ReadLog::after(after).limit(1)).await?;
        Ok(page.events.first().map(|event| event.recorded_at))
    }
}
