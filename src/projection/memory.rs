use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ReadModel;
use crate::event::Position;
use crate::store::{BoxFuture, Checkpoint, CheckpointError, EventStore, ParkedEvent, StoreError};

/// A read model in the projection's own memory: every node builds its own, from the start of the log, at every start.
///
/// Nothing can be rolled back there, so an `apply` that may fail should do so before it changes anything.
#[derive(Debug, Default)]
pub struct InMemory {
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    checkpoint: Checkpoint,
    parked: BTreeMap<Position, ParkedEvent>,
}

impl InMemory {
    /// For one projection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Nothing below can panic half-way through a change.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadModel for InMemory {
    type Transaction = ();
    /// The parked events to forget at the commit, and what `apply` is given.
    type Open = (BTreeSet<Position>, ());

    fn shared(&self) -> bool {
        false
    }

    fn rolls_back(&self) -> bool {
        false
    }

    fn prepare<'a>(
        &'a self,
        _store: &'a Arc<dyn EventStore>,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn checkpoint<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async { Ok(self.progress().checkpoint) })
    }

    fn begin<'a>(
        &'a self,
        _name: &'a str,
        _from: Checkpoint,
    ) -> BoxFuture<'a, Result<Self::Open, StoreError>> {
        Box::pin(async { Ok((BTreeSet::new(), ())) })
    }

    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut () {
        &mut open.1
    }

    fn commit<'a>(
        &'a self,
        open: Self::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            let mut progress = self.progress();
            let found = progress.checkpoint;
            if found != from {
                return Err(CheckpointError::Stale { name: name.to_owned(), expected: from, found });
            }
            progress.checkpoint = to;
            progress.parked.retain(|position, _| !open.0.contains(position));
            progress.parked.extend(parked.map(|event| (event.position, event)));
            Ok(())
        })
    }

    fn rollback(&self, _open: Self::Open) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn parked<'a>(
        &'a self,
        _name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(async move { Ok(self.progress().parked.values().take(limit).cloned().collect()) })
    }

    fn unpark<'a>(
        &'a self,
        open: &'a mut Self::Open,
        _name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            open.0.insert(position);
            Ok(self.progress().parked.contains_key(&position))
        })
    }

    fn unpark_all<'a>(
        &'a self,
        open: &'a mut Self::Open,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            open.0.extend(self.progress().parked.keys());
            Ok(())
        })
    }

    fn remove_parked<'a>(
        &'a self,
        _name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { Ok(self.progress().parked.remove(&position).is_some()) })
    }
}
