//! Counts the events that no snapshot has, and holds the write in progress.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::{JoinError, JoinSet};

use super::context::TaskConfig;
use crate::event::{StreamId, Version};
use crate::projection::ReadModel;
use crate::projection::layout::Role;
use crate::projection::snapshot::{Snapshots, snapshot_stream};
use crate::store::{EventStore, Snapshot, StoreError};

/// The snapshot state of a task.
pub(super) struct Snapshotting<'a> {
    pub(super) snapshots: &'a Snapshots,
    pub(super) stream: StreamId,
    /// Number of events in the state that are in no snapshot.
    pub(super) unsaved: u64,
    /// Number of parked events in the last snapshot.
    pub(super) parked: usize,
    /// The write in progress, if any; its result is whether it succeeded. Aborted with the task.
    pub(super) saving: JoinSet<bool>,
}

impl<'a> Snapshotting<'a> {
    /// Creates the state, if the read model keeps snapshots.
    pub(super) fn new(context: &TaskConfig, read_model: &'a impl ReadModel) -> Option<Self> {
        let snapshots = read_model.snapshots().filter(|_| !read_model.shared())?;
        let Some(stream) = snapshot_stream(&context.name) else {
            tracing::warn!(
                projection = context.name,
                "disabling snapshots: the name must have 1 to 400 bytes and no control characters"
            );
            return None;
        };
        let live = context.role == Role::Live;
        live.then(|| Self { snapshots, stream, unsaved: 0, parked: 0, saving: JoinSet::new() })
    }

    pub(super) fn written(&mut self, written: Result<bool, JoinError>) {
        if !matches!(written, Ok(true)) {
            self.unsaved = self.unsaved.max(1);
        }
    }

    /// Waits for the write in progress.
    pub(super) async fn finish_write(&mut self) {
        while let Some(written) = self.saving.join_next().await {
            self.written(written);
        }
    }

    /// Replaces the stored snapshot by an empty one, which no start uses and any snapshot replaces.
    pub(super) async fn discard(&mut self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        // The write in progress would come after this one.
        self.finish_write().await;
        self.unsaved = self.unsaved.max(1);
        // With another revision: a newer snapshot of the same revision would not be replaced. The
        // empty one does not block later snapshots either.
        let revision = self.snapshots.revision.wrapping_add(1);
        let nothing = Snapshot { version: Version::NONE, revision, state: Bytes::new() };
        store.save_snapshot(&self.stream, nothing).await
    }
}
