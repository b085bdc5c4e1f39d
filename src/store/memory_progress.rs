//! Progress of projections in memory.

use std::collections::BTreeMap;

use super::progress::{
    Checkpoint, CheckpointError, CheckpointKey, ParkedEvent, ProgressWrite, StoredProjection,
};
use super::request::{Request, StoredRequest};
use crate::event::Position;

/// The progress of projections in memory, with the checks of the databases.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryProgress {
    projections: BTreeMap<String, StoredProjection>,
    checkpoints: BTreeMap<CheckpointKey, Checkpoint>,
    parked: BTreeMap<(CheckpointKey, Position), ParkedEvent>,
    requests: BTreeMap<(String, Request), StoredRequest>,
}

impl MemoryProgress {
    pub(crate) fn projection(&self, name: &str) -> StoredProjection {
        self.projections.get(name).copied().unwrap_or_default()
    }

    pub(crate) fn checkpoint(&self, key: &CheckpointKey) -> Checkpoint {
        self.checkpoints.get(key).copied().unwrap_or_default()
    }

    pub(crate) fn checkpoints(&self, projection: &str) -> Vec<(CheckpointKey, Checkpoint)> {
        let of = self.checkpoints.iter().filter(|(key, _)| key.projection == projection);
        of.map(|(key, checkpoint)| (key.clone(), *checkpoint)).collect()
    }

    pub(crate) fn parked(&self, key: &CheckpointKey, from: Position, limit: usize) -> Vec<ParkedEvent> {
        let parked = self.parked.range((key.clone(), from)..);
        parked.take_while(|((of, _), _)| of == key).take(limit).map(|(_, event)| event.clone()).collect()
    }

    pub(crate) fn requests(&self, projection: &str, from: Request, limit: usize) -> Vec<StoredRequest> {
        let requests = self.requests.range((projection.to_owned(), from)..);
        let of = requests.take_while(|((of, _), _)| of == projection);
        of.take(limit).map(|(_, request)| request.clone()).collect()
    }

    /// Makes all writes, or none.
    pub(crate) fn write(&mut self, writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        // A single write that fails changes nothing.
        let before = (writes.len() > 1).then(|| self.clone());
        let written = writes.into_iter().try_for_each(|write| self.write_one(write));
        if let (Err(_), Some(before)) = (&written, before) {
            *self = before;
        }
        written
    }

    fn write_one(&mut self, write: ProgressWrite) -> Result<(), CheckpointError> {
        match write {
            ProgressWrite::Checkpoint { key, from, to } => {
                let found = self.checkpoint(&key);
                if found != from || to.epoch < found.epoch {
                    return Err(CheckpointError::Stale { key, expected: from, found });
                }
                self.checkpoints.insert(key, to);
            }
            ProgressWrite::Projection { name, from, to } => {
                if self.projection(&name) != from {
                    return Err(CheckpointError::Changed { projection: name });
                }
                self.projections.insert(name, StoredProjection { revision: from.revision + 1, ..to });
            }
            ProgressWrite::Park { key, event } => _ = self.parked.insert((key, event.position), event),
            ProgressWrite::Unpark { key, position } => {
                let removed = self.parked.remove(&(key.clone(), position));
                removed.ok_or_else(|| CheckpointError::not_parked(&key, position))?;
            }
            ProgressWrite::UnparkAll { key } => self.parked.retain(|(of, _), _| *of != key),
            ProgressWrite::AddRequest { projection, request } => {
                self.requests.insert((projection, request.request), request);
            }
            ProgressWrite::RemoveRequest { projection, request, id } => {
                self.requested(&projection, request, id)?;
                self.requests.remove(&(projection, request));
            }
            ProgressWrite::RefuseRequest { projection, request, id, reason } => {
                self.requested(&projection, request, Some(id))?.refused_reason = Some(reason);
            }
        }
        Ok(())
    }

    fn requested(
        &mut self,
        projection: &str,
        request: Request,
        id: Option<uuid::Uuid>,
    ) -> Result<&mut StoredRequest, CheckpointError> {
        let found = self.requests.get_mut(&(projection.to_owned(), request));
        found
            .filter(|found| id.is_none_or(|id| id == found.id))
            .ok_or_else(|| CheckpointError::not_requested(projection, request))
    }
}
