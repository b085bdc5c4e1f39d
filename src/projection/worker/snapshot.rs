//! Snapshots of what a projection holds in memory: loaded before the first event, taken behind a commit, when the state is what
//! the log up to the checkpoint makes of it, and nothing else.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::{JoinError, JoinSet, spawn_blocking};

use super::{Context, Role, Run};
use crate::event::{Position, StreamId, Version};
use crate::projection::snapshot::{Snapshots, place};
use crate::projection::{Projection, ReadModel};
use crate::store::{Checkpoint, CheckpointError, EventStore, ParkedEvent, Snapshot, StoreError};

/// A task's part in it.
pub(super) struct Snapshotting<'a> {
    snapshots: &'a Snapshots,
    stream: StreamId,
    /// How many events are in the state, and in no snapshot.
    unsaved: u64,
    /// How many events were parked in the last snapshot.
    parked: usize,
    /// The one that is being written, if any; whether it was. Given up with the task.
    saving: JoinSet<bool>,
}

impl<'a> Snapshotting<'a> {
    /// If the read model keeps any.
    pub(super) fn new(context: &Context, read_model: &'a impl ReadModel) -> Option<Self> {
        let snapshots = read_model.snapshots().filter(|_| !read_model.shared())?;
        let Some(stream) = place(&context.name) else {
            tracing::warn!(
                projection = context.name,
                "no snapshot can be kept under this name: it is to have 1 to 400 bytes, and no control characters"
            );
            return None;
        };
        let live = context.role == Role::Live;
        live.then(|| Self { snapshots, stream, unsaved: 0, parked: 0, saving: JoinSet::new() })
    }

    fn written(&mut self, written: Result<bool, JoinError>) {
        if !matches!(written, Ok(true)) {
            self.unsaved = self.unsaved.max(1);
        }
    }

    /// Waits for the one that is being written.
    async fn settle(&mut self) {
        while let Some(written) = self.saving.join_next().await {
            self.written(written);
        }
    }

    /// Nobody starts from what is there, and it is in nobody's way.
    async fn discard(&mut self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        // It would come behind this one.
        self.settle().await;
        self.unsaved = self.unsaved.max(1);
        // Of another revision, since a newer one of its own would not be replaced; nor does this one keep another from its place.
        let revision = self.snapshots.revision.wrapping_add(1);
        let nothing = Snapshot { version: Version::NONE, revision, state: Bytes::new() };
        store.save_snapshot(&self.stream, nothing).await
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Starts from the snapshot, if there is one. Whatever is wrong with it, the log is the truth, and applied from its start.
    pub(super) async fn load_snapshot(&mut self) -> Result<(), StoreError> {
        if self.snapshotting.is_none() {
            return Ok(());
        }
        let floor = self.floor().await?;
        let Some(ours) = &mut self.snapshotting else { return Ok(()) };
        let (Context { name, filter, store, .. }, snapshots) = (self.context, ours.snapshots);
        if self.read_model.checkpoint(&self.row).await? != Checkpoint::default() {
            // The task panicked; what was applied before is still there.
            ours.unsaved = 1;
            return Ok(());
        }
        let unusable = match store.snapshot(&ours.stream).await {
            Ok(None) => return Ok(()),
            // It was discarded.
            Ok(Some(snapshot)) if snapshot.state.is_empty() => return Ok(()),
            Ok(Some(Snapshot { revision, .. })) if revision != snapshots.revision => {
                tracing::warn!(
                    projection = name,
                    revision,
                    "the snapshot is of another revision; applying the log from its start"
                );
                return Ok(());
            }
            Ok(Some(Snapshot { version, state, .. })) => {
                let position = Position::new(version.get());
                if position > Position::START && store.event_id_at(position).await?.is_none() {
                    format!("it is at position {position}, where the log has no event")
                } else {
                    let (snapshots, filter) = (snapshots.clone(), filter.clone());
                    let unpacked = spawn_blocking(move || snapshots.unpack(&state, &filter, floor)).await;
                    match unpacked.unwrap_or_else(|error| Err(error.to_string())) {
                        Ok(parked) => {
                            ours.parked = parked.len();
                            tracing::info!(projection = name, %position, "starting from a snapshot");
                            return self.start_at(position, parked).await;
                        }
                        Err(reason) => reason,
                    }
                }
            }
            Err(error) if error.is_transient() => return Err(error),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            projection = name,
            unusable,
            "the snapshot is of no use; applying the log from its start"
        );
        // Also so that it is not taken for a newer one than those of this log, with this filter.
        ours.discard(store).await
    }

    async fn start_at(&mut self, position: Position, parked: Vec<ParkedEvent>) -> Result<(), StoreError> {
        let none = Checkpoint::default();
        let to = Checkpoint { position, ..none };
        // Last of all the checkpoint: it says that everything is there.
        let steps = parked.into_iter().map(|event| (none, Some(event))).chain([(to, None)]);
        for (to, parked) in steps {
            let open = self.read_model.begin(&self.row, none).await?;
            let done = self.read_model.commit(open, &self.row, none, to, parked).await;
            done.map_err(|error| match error {
                CheckpointError::Store(error) => error,
                stale @ CheckpointError::Stale { .. } => {
                    StoreError::Unavailable { reason: stale.to_string(), source: None }
                }
            })?;
        }
        Ok(())
    }

    /// So many events more are in the state: takes a snapshot if it is time for one. Nothing waits for it to be written; while it
    /// is, there is no other.
    pub(super) async fn snapshot_behind(&mut self, events: u64) {
        let Some(ours) = &mut self.snapshotting else { return };
        ours.unsaved = ours.unsaved.saturating_add(events);
        while let Some(written) = ours.saving.try_join_next() {
            ours.written(written);
        }
        if ours.unsaved < ours.snapshots.every || !ours.saving.is_empty() {
            return;
        }
        if let Some(writing) = self.take_snapshot().await
            && let Some(ours) = &mut self.snapshotting
        {
            ours.saving.spawn(writing);
        }
    }

    /// At the end: takes one if something has changed since the last one, and waits for it to be written.
    pub(super) async fn last_snapshot(&mut self) {
        let Some(ours) = &mut self.snapshotting else { return };
        ours.settle().await;
        if !self.prepared {
            return;
        }
        let parked = self.read_model.parked(&self.row, usize::MAX).await.map_or(0, |parked| parked.len());
        // Also when one was discarded meanwhile: it would be parked again.
        if (ours.unsaved > 0 || ours.parked != parked)
            && let Some(writing) = self.take_snapshot().await
        {
            writing.await;
        }
    }

    /// The read model is to be empty, and nobody to start from what it was.
    pub(super) async fn discard_snapshot(&mut self) -> Result<(), StoreError> {
        match &mut self.snapshotting {
            Some(ours) => ours.discard(&self.context.store).await,
            None => Ok(()),
        }
    }

    /// Between two transactions. What is left is to write it; whether that was done.
    async fn take_snapshot(&mut self) -> Option<impl Future<Output = bool> + Send + 'static> {
        let floor = self.context.floor.get().copied().unwrap_or_default();
        let ours = self.snapshotting.as_mut()?;
        // Also if that fails: not again with every event.
        ours.unsaved = 0;
        let Context { name, filter, store, metrics, .. } = self.context;
        let taken = async {
            let position =
                self.read_model.checkpoint(&self.row).await.map_err(|error| error.to_string())?.position;
            let parked =
                self.read_model.parked(&self.row, usize::MAX).await.map_err(|error| error.to_string())?;
            let (snapshots, filter, count) = (ours.snapshots.clone(), filter.clone(), parked.len());
            // A large state takes its time, and others have the thread to themselves meanwhile.
            let packing = spawn_blocking(move || snapshots.pack(&filter, floor, &parked)).await;
            Ok::<_, String>((position, count, packing.map_err(|error| error.to_string())??))
        };
        let (position, parked, state) = match taken.await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(
                    projection = name,
                    error,
                    "no snapshot can be taken of what it holds in memory"
                );
                metrics.snapshot(name, Some("not_taken"));
                return None;
            }
        };
        ours.parked = parked;
        let (version, revision) = (Version::new(position.get()), ours.snapshots.revision);
        let snapshot = Snapshot { version, revision, state: state.into() };
        let (name, store, metrics, stream) =
            (name.clone(), store.clone(), metrics.clone(), ours.stream.clone());
        Some(async move {
            match store.save_snapshot(&stream, snapshot).await {
                Ok(()) => {
                    metrics.snapshot(&name, None);
                    true
                }
                Err(error) => {
                    tracing::warn!(projection = name, %position, %error, "a snapshot was not saved; the next one will be");
                    metrics.snapshot(&name, Some(error.kind()));
                    false
                }
            }
        })
    }
}
