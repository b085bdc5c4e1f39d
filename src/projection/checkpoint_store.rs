//! Access to the progress without writing to the read model, independent of its transaction type.

use std::sync::Arc;

use super::{ProgressRecords, ReadModel};
use crate::event::Position;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, CheckpointKey, EventStore, ParkedEvent, ProgressWrite, Request,
    StoreError, StoredProjection, StoredRequest,
};

pub(super) trait DynCheckpointStore: Send + Sync {
    fn prepare<'a>(&'a self, store: &'a Arc<dyn EventStore>) -> BoxFuture<'a, Result<(), StoreError>>;
    /// Returns whether nodes share the read model, so that another node may reset it.
    fn shared(&self) -> bool;
    fn records(&self) -> BoxFuture<'_, Result<ProgressRecords, StoreError>>;
    /// Returns the layout and the versions, also if they belong to another store.
    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>>;
    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;
    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;
    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>>;
    /// Makes a write in a transaction of its own; returns whether what it deletes existed.
    fn write<'a>(
        &'a self,
        projection: &'a str,
        write: ProgressWrite,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;
}

impl<R: ReadModel> DynCheckpointStore for R {
    fn prepare<'a>(&'a self, store: &'a Arc<dyn EventStore>) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(ReadModel::prepare(self, store))
    }

    fn shared(&self) -> bool {
        ReadModel::shared(self)
    }

    fn records(&self) -> BoxFuture<'_, Result<ProgressRecords, StoreError>> {
        Box::pin(ReadModel::records(self))
    }

    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>> {
        Box::pin(self.projection_of_any_store(name))
    }

    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(ReadModel::checkpoint(self, key))
    }

    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(ReadModel::parked(self, key, Position::START, limit))
    }

    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>> {
        Box::pin(ReadModel::requests(self, projection, from, limit))
    }

    fn write<'a>(
        &'a self,
        projection: &'a str,
        write: ProgressWrite,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            let open = self.begin(projection, Checkpoint::default(), None).await?;
            match self.commit(open, vec![write]).await {
                Ok(()) => Ok(true),
                Err(CheckpointError::Missing { .. }) => Ok(false),
                Err(CheckpointError::Store(error)) => Err(error),
                Err(error) => Err(StoreError::Unavailable { reason: error.to_string(), source: None }),
            }
        })
    }
}
