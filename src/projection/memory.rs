use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::sealed::Sealed;
use super::{ReadModel, SnapshotState, Snapshots};
use crate::event::Position;
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, EventStore, MemoryProgress, ParkedEvent, ProgressWrite,
    Request, SnapshotRevision, StoreError, StoredProgress, StoredProjection, StoredRequest,
};

/// A read model in the projection's own memory.
///
/// Every node builds its own at every start, from the start of the log or from its last
/// [snapshot](Self::snapshot_every).
///
/// The projection must implement [`reset`](super::Projection::reset). It is called at every start
/// before the first event, so that state that outlives its runtime, for example in an [`Arc`], is
/// empty again. A projection without it stops. Two runtimes of one process need separate states;
/// storied detects a shared state only with snapshots.
///
/// Nothing can be rolled back, so an `apply` or `reset` that may fail should do so before it
/// changes anything. With snapshots it must: its changes are saved and remain after a restart.
#[derive(Debug, Default)]
pub struct InMemory {
    progress: Mutex<MemoryProgress>,
    snapshots: Option<Snapshots>,
}

impl InMemory {
    /// Creates a read model for one projection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps a snapshot of `state` in the event store, for a faster start.
    ///
    /// A snapshot is taken every `events` applied events and at an orderly stop. The next start
    /// continues from the snapshot. Only events that pass the filter count: with a rare filter, a
    /// start scans the log since the snapshot. Default: off. Range of `events`: at least 1.
    ///
    /// `state` is shared by the projection and its readers, and contains everything that `apply`
    /// changes. One runtime of a process at a time folds into it; a second one does not start. An
    /// `Arc<RwLock<T>>` of a serde type suffices. `revision` identifies the format: raise it with
    /// every change of the type, or of the effect of `apply`, also for events that it ignored
    /// before. If a snapshot has another revision or another filter, cannot be loaded, or is ahead
    /// of the log, it is unusable: a warning is logged, and the log is applied from its start.
    ///
    /// A snapshot depends only on the log up to its position. All nodes share one, under the name
    /// of the projection: the newest that any node has taken. It includes the events parked by
    /// then. A [reset](super::ProjectionHandle::reset) discards it; other nodes, which were not
    /// reset, continue to take theirs.
    ///
    /// While the state is encoded, no event is applied and the state cannot change; for a large
    /// state, choose `events` accordingly. While the snapshot is written, the projection continues.
    /// A failed snapshot is logged and counted (`storied.projection.snapshots`); the projection
    /// continues.
    ///
    /// ```
    /// # use std::collections::BTreeMap;
    /// # use std::sync::{Arc, RwLock};
    /// # use serde::{Deserialize, Serialize};
    /// # use storied::{Event, Filter, MemoryStore, Projection, RecordedEvent, Runtime, SnapshotRevision};
    /// # use storied::projection::{ApplyError, InMemory};
    /// # #[derive(Serialize, Deserialize)]
    /// # #[serde(rename_all = "snake_case")]
    /// # enum Sale { Made { country: String, pence: i64 } }
    /// # impl Event for Sale { const CATEGORY: &'static str = "sale"; }
    /// #[derive(Clone, Default)]
    /// struct Revenue(Arc<RwLock<BTreeMap<String, i64>>>);
    ///
    /// impl Projection for Revenue {
    ///     const NAME: &'static str = "revenue";
    ///     type Event = Sale;
    ///     type Transaction = ();
    ///     async fn apply(&mut self, event: Sale, _: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
    ///         let Sale::Made { country, pence } = event;
    ///         *self.0.write().map_err(|_| "poisoned")?.entry(country).or_default() += pence;
    ///         Ok(())
    ///     }
    ///     async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
    ///         self.0.write().map_err(|_| "poisoned")?.clear();
    ///         Ok(())
    ///     }
    /// }
    ///
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let revenue = Revenue::default();
    /// let in_memory = InMemory::new().snapshot_every(10_000, SnapshotRevision(1), revenue.0.clone());
    /// let runtime = Runtime::builder().store(MemoryStore::new()).projection(revenue, in_memory).start().await?;
    /// # runtime.shutdown().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn snapshot_every(
        self,
        events: u64,
        revision: SnapshotRevision,
        state: Arc<impl SnapshotState>,
    ) -> Self {
        Self { snapshots: Some(Snapshots::new(events, revision, state)), ..self }
    }

    /// Creates a read model with these snapshots, if any.
    pub(super) fn with(snapshots: Option<Snapshots>) -> Self {
        Self { snapshots, ..Self::default() }
    }

    fn progress(&self) -> MutexGuard<'_, MemoryProgress> {
        // No code below can panic half-way through a change.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sealed for InMemory {}

impl ReadModel for InMemory {
    type Transaction = ();
    /// The writes for the commit, and the handle of `apply`.
    type Open = (Vec<ProgressWrite>, ());

    fn shared(&self) -> bool {
        false
    }

    fn rolls_back(&self) -> bool {
        false
    }

    fn snapshots(&self) -> Option<&Snapshots> {
        self.snapshots.as_ref()
    }

    async fn prepare(&self, _store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        Ok(())
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        Ok(self.progress().projection(name))
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        Ok(self.progress().checkpoint(key))
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        Ok(self.progress().parked(key, from, limit))
    }

    async fn requests(
        &self,
        _projection: &str,
        _from: Request,
        _limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        Ok(Vec::new())
    }

    async fn begin(
        &self,
        _projection: &str,
        _from: Checkpoint,
        _limit: Option<Duration>,
    ) -> Result<Self::Open, StoreError> {
        Ok((Vec::new(), ()))
    }

    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut () {
        &mut open.1
    }

    async fn adopt(&self, _open: &mut Self::Open, name: &str) -> Result<StoredProgress, StoreError> {
        let progress = self.progress();
        Ok(StoredProgress { projection: progress.projection(name), checkpoints: progress.checkpoints(name) })
    }

    async fn write(&self, open: &mut Self::Open, write: ProgressWrite) -> Result<(), CheckpointError> {
        if let ProgressWrite::Unpark { key, position } = &write
            && self
                .progress()
                .parked(key, *position, 1)
                .first()
                .is_none_or(|event| event.position != *position)
        {
            return Err(CheckpointError::not_parked(key, *position));
        }
        open.0.push(write);
        Ok(())
    }

    async fn commit(&self, open: Self::Open, writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        let (mut all, ()) = open;
        all.extend(writes);
        self.progress().write(all)
    }

    async fn rollback(&self, _open: Self::Open) -> Result<(), StoreError> {
        Ok(())
    }
}
