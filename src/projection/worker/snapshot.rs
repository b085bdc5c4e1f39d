//! Snapshots of in-memory state: loaded before the first event, taken after a commit.
//!
//! Only then is the state exactly the result of the log up to the checkpoint.

use tokio::task::spawn_blocking;

use super::context::TaskConfig;
use super::task::{Preparation, ProjectionTask};
use crate::event::{Position, Version};
use crate::projection::interruption::Interruption;
use crate::projection::{Projection, ReadModel};
use crate::store::{Checkpoint, ParkedEvent, ProgressWrite, Snapshot, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Starts from the snapshot, if there is one.
    ///
    /// If it is unusable for any reason, the log is applied from its start.
    pub(super) async fn load_snapshot(&mut self) -> Result<(), Interruption> {
        if self.snapshotting.is_none() {
            return Ok(());
        }
        let floor = self.floor().await?;
        let Some(snapshotting) = &mut self.snapshotting else { return Ok(()) };
        let (TaskConfig { name, filter, store, .. }, snapshots) = (self.context, snapshotting.snapshots);
        if self.read_model.checkpoint(&self.key).await? != Checkpoint::default() {
            // The task panicked; the state still has the applied events.
            snapshotting.unsaved = 1;
            return Ok(());
        }
        let unusable = match store.snapshot(&snapshotting.stream).await {
            Ok(None) => return Ok(()),
            // The snapshot was discarded.
            Ok(Some(snapshot)) if snapshot.state.is_empty() => return Ok(()),
            Ok(Some(Snapshot { revision, .. })) if revision != snapshots.revision => {
                tracing::warn!(
                    projection = name,
                    revision,
                    "ignoring a snapshot of another revision; applying the log from its start"
                );
                return Ok(());
            }
            Ok(Some(Snapshot { version, state, .. })) => {
                let position = Position::new(version.get());
                if position > Position::START && store.event_id_at(position).await?.is_none() {
                    format!("the snapshot is at position {position}, where the log has no event")
                } else {
                    let (snapshots, filter) = (snapshots.clone(), filter.clone());
                    let unpacked = spawn_blocking(move || snapshots.unpack(&state, &filter, floor)).await;
                    match unpacked.unwrap_or_else(|error| Err(error.to_string())) {
                        Ok(parked) => {
                            snapshotting.parked = parked.len();
                            tracing::info!(projection = name, %position, "starting from a snapshot");
                            return self.start_at(position, parked).await;
                        }
                        Err(reason) => reason,
                    }
                }
            }
            Err(error) if error.may_pass() => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            projection = name,
            unusable,
            "ignoring an unusable snapshot; applying the log from its start"
        );
        // Also so that it does not count as newer than the snapshots of this log with this filter.
        Ok(snapshotting.discard(store).await?)
    }

    async fn start_at(&mut self, position: Position, parked: Vec<ParkedEvent>) -> Result<(), Interruption> {
        let none = Checkpoint::default();
        let to = Checkpoint { position, ..none };
        let key = || self.key.clone();
        let mut writes = vec![ProgressWrite::Checkpoint { key: key(), from: none, to }];
        writes.extend(parked.into_iter().map(|event| ProgressWrite::Park { key: key(), event }));
        let open = self.read_model.begin(&self.context.name, none, None).await?;
        Ok(self.read_model.commit(open, writes).await?)
    }

    /// Counts applied events and takes a snapshot if it is due.
    ///
    /// The write runs in the background, one at a time.
    pub(super) async fn snapshot_behind(&mut self, events: u64) {
        let Some(snapshotting) = &mut self.snapshotting else { return };
        snapshotting.unsaved = snapshotting.unsaved.saturating_add(events);
        while let Some(written) = snapshotting.saving.try_join_next() {
            snapshotting.written(written);
        }
        if snapshotting.unsaved < snapshotting.snapshots.every || !snapshotting.saving.is_empty() {
            return;
        }
        if let Some(writing) = self.take_snapshot().await
            && let Some(snapshotting) = &mut self.snapshotting
        {
            snapshotting.saving.spawn(writing);
        }
    }

    /// Takes a last snapshot if the state has changed, and waits for its write.
    pub(super) async fn last_snapshot(&mut self) {
        let Some(snapshotting) = &mut self.snapshotting else { return };
        snapshotting.finish_write().await;
        if self.preparation == Preparation::Needed {
            return;
        }
        let parked = self
            .read_model
            .parked(&self.key, Position::START, usize::MAX)
            .await
            .map_or(0, |parked| parked.len());
        // Also if a parked event was discarded meanwhile: the old snapshot would restore it.
        if (snapshotting.unsaved > 0 || snapshotting.parked != parked)
            && let Some(writing) = self.take_snapshot().await
        {
            writing.await;
        }
    }

    /// Discards the snapshot, because the read model is reset.
    pub(super) async fn discard_snapshot(&mut self) -> Result<(), StoreError> {
        match &mut self.snapshotting {
            Some(snapshotting) => snapshotting.discard(&self.context.store).await,
            None => Ok(()),
        }
    }

    /// Encodes a snapshot between two transactions; returns the write, which reports success.
    async fn take_snapshot(&mut self) -> Option<impl Future<Output = bool> + Send + 'static> {
        let floor = self.context.floor.get().copied().unwrap_or_default();
        let snapshotting = self.snapshotting.as_mut()?;
        // Also after a failure: no attempt with every event.
        snapshotting.unsaved = 0;
        let TaskConfig { name, filter, store, metrics, .. } = self.context;
        let taken = async {
            let position =
                self.read_model.checkpoint(&self.key).await.map_err(|error| error.to_string())?.position;
            let parked = self
                .read_model
                .parked(&self.key, Position::START, usize::MAX)
                .await
                .map_err(|error| error.to_string())?;
            let (snapshots, filter, count) = (snapshotting.snapshots.clone(), filter.clone(), parked.len());
            // Encoding a large state takes long; other tasks keep this thread meanwhile.
            let packing = spawn_blocking(move || snapshots.pack(&filter, floor, &parked)).await;
            Ok::<_, String>((position, count, packing.map_err(|error| error.to_string())??))
        };
        let (position, parked, state) = match taken.await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(projection = name, error, "could not take a snapshot of the state in memory");
                metrics.snapshot(name, Some("not_taken"));
                return None;
            }
        };
        snapshotting.parked = parked;
        let (version, revision) = (Version::new(position.get()), snapshotting.snapshots.revision);
        let snapshot = Snapshot { version, revision, state: state.into() };
        let (name, store, metrics, stream) =
            (name.clone(), store.clone(), metrics.clone(), snapshotting.stream.clone());
        Some(async move {
            match store.save_snapshot(&stream, snapshot).await {
                Ok(()) => {
                    metrics.snapshot(&name, None);
                    true
                }
                Err(error) => {
                    tracing::warn!(projection = name, %position, %error, "could not save a snapshot; retrying with the next one");
                    metrics.snapshot(&name, Some(error.kind()));
                    false
                }
            }
        })
    }
}
