use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::ReadModel;
use super::layout::delivered;
use crate::event::{Position, RecordedEvent};
use crate::store::{BoxFuture, Checkpoint, CheckpointError, EventStore, ParkedEvent, StoreError};

/// A read model in another system: a search index, a mailbox, another service.
///
/// The checkpoint is kept in the event store. Every event is applied at least once: again if the
/// process dies between `apply` and the checkpoint, or if another node takes over. The position of
/// the event, together with the [`Delivery`]'s epoch, is the idempotency key.
#[derive(Default)]
pub struct AtLeastOnce {
    /// Set by the first call.
    store: OnceLock<Arc<dyn EventStore>>,
    /// Position of each checkpoint before its last reset, and the number of that reset.
    ///
    /// Never locked across an await.
    replayed: Mutex<HashMap<String, (u64, Position)>>,
}

/// Context of `apply` for an [`AtLeastOnce`] read model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Delivery {
    /// Fencing token: the epoch of the owner.
    ///
    /// A system that remembers the highest epoch can reject stale owners: their deliveries have a
    /// lower epoch.
    pub epoch: u64,
    /// Position up to which all events were durably applied at the start of this batch.
    ///
    /// Later events may be delivered again.
    pub confirmed: Position,
    /// Position up to which all events were delivered before the last reset.
    ///
    /// Up to here, deliveries are a [replay](Self::is_replay).
    pub replayed: Position,
    /// Parked events to delete after the commit: by name, one event or all.
    unpark: Vec<(String, Option<Position>)>,
}

impl Delivery {
    /// Returns whether the event was delivered before and is replayed only because of a reset.
    ///
    /// Its external effects, such as a mail, must not happen again.
    #[must_use]
    pub fn is_replay(&self, event: &RecordedEvent) -> bool {
        event.position <= self.replayed
    }
}

impl AtLeastOnce {
    /// Creates a read model for one or more projections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    async fn replayed(&self, name: &str, resets: u64) -> Result<Position, StoreError> {
        let known = || self.replayed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, position)) = known().get(name).copied()
            && of == resets
        {
            return Ok(position);
        }
        let position = self.store()?.checkpoint(&delivered(name)).await?.position;
        known().insert(name.to_owned(), (resets, position));
        Ok(position)
    }

    fn store(&self) -> Result<&Arc<dyn EventStore>, StoreError> {
        self.store
            .get()
            .ok_or_else(|| StoreError::Invalid { reason: "using a read model failed: not prepared".into() })
    }
}

async fn forget_all(store: &Arc<dyn EventStore>, name: &str) -> Result<(), StoreError> {
    loop {
        let parked = store.parked(name, 1_000).await?;
        if parked.is_empty() {
            return Ok(());
        }
        for event in parked {
            store.remove_parked(name, event.position).await?;
        }
    }
}

impl fmt::Debug for AtLeastOnce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtLeastOnce").field("store", &self.store.get().map(|store| store.info())).finish()
    }
}

impl ReadModel for AtLeastOnce {
    type Transaction = Delivery;
    type Open = Delivery;

    fn shared(&self) -> bool {
        true
    }

    fn rolls_back(&self) -> bool {
        false
    }

    fn prepare<'a>(
        &'a self,
        store: &'a Arc<dyn EventStore>,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let known = self.store.get_or_init(|| store.clone());
            if known.info().id != store.info().id {
                let reason =
                    "preparing an AtLeastOnce failed: already in use for another event store; create one per store".into();
                return Err(StoreError::Invalid { reason });
            }
            Ok(())
        })
    }

    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async move { self.store()?.checkpoint(name).await })
    }

    fn begin<'a>(&'a self, name: &'a str, from: Checkpoint) -> BoxFuture<'a, Result<Delivery, StoreError>> {
        Box::pin(async move {
            // The mark grows with every reset.
            let replayed = match from.mark {
                0 => Position::START,
                resets => self.replayed(name, resets).await?,
            };
            Ok(Delivery { epoch: from.epoch, confirmed: from.position, replayed, unpark: Vec::new() })
        })
    }

    fn transaction<'a>(&self, open: &'a mut Delivery) -> &'a mut Delivery {
        open
    }

    fn save<'a>(
        &'a self,
        _open: &'a mut Delivery,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move { self.store()?.save_checkpoint(name, from, to, None).await })
    }

    fn commit<'a>(
        &'a self,
        open: Delivery,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            let store = self.store()?;
            store.save_checkpoint(name, from, to, parked).await?;
            for (name, position) in open.unpark {
                let Some(position) = position else {
                    forget_all(store, &name).await?;
                    continue;
                };
                store.remove_parked(&name, position).await?;
            }
            Ok(())
        })
    }

    fn rollback(&self, _open: Delivery) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(async move { self.store()?.parked(name, limit).await })
    }

    fn unpark<'a>(
        &'a self,
        open: &'a mut Delivery,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            open.unpark.push((name.to_owned(), Some(position)));
            let mut limit = 1_000;
            loop {
                let parked = self.store()?.parked(name, limit).await?;
                if parked.iter().any(|event| event.position == position) {
                    return Ok(true);
                }
                // Parked events are listed oldest first: a later one proves that there is none at
                // `position`.
                if parked.len() < limit || parked.last().is_some_and(|last| last.position > position) {
                    return Ok(false);
                }
                limit *= 2;
            }
        })
    }

    fn unpark_all<'a>(
        &'a self,
        open: &'a mut Delivery,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            open.unpark.push((name.to_owned(), None));
            Ok(())
        })
    }

    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { self.store()?.remove_parked(name, position).await })
    }
}
