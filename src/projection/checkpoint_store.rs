//! Access to checkpoints without writing to the read model, independent of its transaction type.

use super::ReadModel;
use super::layout::{Layout, Versions, bump};
use crate::event::Position;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, CheckpointRecord, EventStore, ParkedEvent, StoreError,
};
use std::sync::Arc;

/// Maximum number of attempts while other writers move the same checkpoint.
pub(super) const ATTEMPTS: u32 = 20;

pub(super) trait DynCheckpointStore: Send + Sync {
    fn prepare<'a>(&'a self, store: &'a Arc<dyn EventStore>) -> BoxFuture<'a, Result<(), StoreError>>;
    /// Returns whether nodes share the read model, so that another node may reset it.
    fn shared(&self) -> bool;
    fn records(&self) -> BoxFuture<'_, Result<Vec<CheckpointRecord>, StoreError>>;
    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;
    fn versions<'a>(&'a self, layout: &'a Layout) -> BoxFuture<'a, Result<Versions, StoreError>>;
    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;
    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;
    /// Stores a parked event beside a checkpoint that has no other purpose.
    ///
    /// Returns `false` if other writers moved the checkpoint in all [`ATTEMPTS`].
    fn post<'a>(&'a self, name: &'a str, what: &'a ParkedEvent) -> BoxFuture<'a, Result<bool, StoreError>>;
}

impl<R: ReadModel> DynCheckpointStore for R {
    fn prepare<'a>(&'a self, store: &'a Arc<dyn EventStore>) -> BoxFuture<'a, Result<(), StoreError>> {
        ReadModel::prepare(self, store, "operator")
    }

    fn shared(&self) -> bool {
        ReadModel::shared(self)
    }

    fn records(&self) -> BoxFuture<'_, Result<Vec<CheckpointRecord>, StoreError>> {
        ReadModel::records(self)
    }

    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        ReadModel::checkpoint(self, name)
    }

    fn versions<'a>(&'a self, layout: &'a Layout) -> BoxFuture<'a, Result<Versions, StoreError>> {
        Box::pin(layout.versions(self))
    }

    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        ReadModel::parked(self, name, limit)
    }

    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        ReadModel::remove_parked(self, name, position)
    }

    fn post<'a>(&'a self, name: &'a str, what: &'a ParkedEvent) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                let mut open = self.begin(name, Checkpoint::default()).await?;
                // Also in a read model of another store that is to be reset.
                let found = self.adopt(&mut open, name).await?;
                match self.commit(open, name, found, bump(found), Some(what.clone())).await {
                    Ok(()) => return Ok(true),
                    Err(CheckpointError::Stale { .. }) => {}
                    Err(CheckpointError::Store(error)) => return Err(error),
                }
            }
            Ok(false)
        })
    }
}
