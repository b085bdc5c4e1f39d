//! Layout: the partitions of a projection, and the names of its leases.
//!
//! No two projections share a name, and no name of a lease equals one of the runtime's own.

use super::ReadModel;
use crate::event::Position;
use crate::partition::Partition;
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, ProgressWrite, StoreError, StoredProgress, StoredProjection,
};

/// Maximum number of attempts while other writers change the same projection.
pub(super) const ATTEMPTS: u32 = 20;

/// Role of a task for its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Keeps the live version up to date.
    Live,
    /// Builds the next version beside the live one, during a rebuild.
    Rebuild,
}

impl Role {
    /// Returns the version for the role.
    pub(super) fn version(self, projection: &StoredProjection) -> Option<u64> {
        match self {
            Self::Live => Some(projection.live_version),
            Self::Rebuild => projection.building_version,
        }
    }
}

/// Returns the name of the lease of a projection's owner; it is not partitioned.
pub(crate) fn owner_lease(projection: &str) -> String {
    Layout::new(projection, 0).lease(None, Role::Live)
}

/// A projection's name, and its number of partitions; 0 if it is not partitioned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    name: String,
    partitions: u16,
}

impl Layout {
    pub(super) fn new(name: &str, partitions: u16) -> Self {
        Self { name: name.to_owned(), partitions }
    }

    /// Returns the key of a checkpoint.
    pub(super) fn key(&self, partition: Option<Partition>, version: u64) -> CheckpointKey {
        let partition = partition.map_or(0, Partition::index);
        CheckpointKey { projection: self.name.clone(), version, partition }
    }

    /// Returns the keys of all checkpoints of a version.
    pub(super) fn keys(&self, version: u64) -> impl Iterator<Item = CheckpointKey> {
        keys(&self.name, self.partitions, version)
    }

    /// Returns the name of a durable consumer of a version.
    pub(super) fn consumer(&self, partition: Option<Partition>, version: u64) -> String {
        let version = if version == 0 { String::new() } else { format!("@{version}") };
        match partition {
            None => format!("projection{version}/{}", self.name),
            Some(partition) => format!("partition{version}/{}/{}", partition.index(), self.name),
        }
    }

    /// Returns the name of the lease that permits to move the checkpoint.
    pub(super) fn lease(&self, partition: Option<Partition>, role: Role) -> String {
        let name = self.consumer(partition, 0);
        match role {
            Role::Live => name,
            Role::Rebuild => format!("rebuild-{name}"),
        }
    }

    /// Returns the lease for changes that stop all owners, held by one node at a time.
    pub(super) fn order(&self) -> String {
        format!("order/{}", self.name)
    }

    /// Returns a membership lease: its holder shares the partitions.
    pub(super) fn member(&self, slot: usize) -> String {
        format!("member/{slot}/{}", self.name)
    }

    /// Checks that the read model has this layout, or records it. Returns its versions.
    ///
    /// # Errors
    /// `Incompatible` if it has another number of partitions: its checkpoints do not fit these
    /// partitions.
    pub(super) async fn check(&self, read_model: &impl ReadModel) -> Result<StoredProjection, StoreError> {
        for _ in 0..ATTEMPTS {
            let found = read_model.projection(&self.name).await?;
            if found.partitions == self.partitions {
                return Ok(found);
            }
            let Some(first) = self.keys(found.live_version).next().filter(|_| found.partitions == 0) else {
                return Err(self.mismatch(found.partitions));
            };
            let checkpoint = read_model.checkpoint(&first).await?;
            if checkpoint.position > Position::START || found.building_version.is_some() {
                return Err(self.mismatch(0));
            }
            let open = read_model.begin(&self.name, checkpoint, None).await?;
            let ours = StoredProjection { partitions: self.partitions, ..found };
            let writes = vec![
                // I7: an owner of the whole is fenced.
                ProgressWrite::Checkpoint { key: first, from: checkpoint, to: checkpoint.next_generation() },
                ProgressWrite::Projection { name: self.name.clone(), from: found, to: ours },
            ];
            if let Err(CheckpointError::Store(error)) = read_model.commit(open, writes).await {
                return Err(error);
            }
            // If another node was faster, the next read shows its layout.
        }
        Err(contended(&self.name))
    }

    fn pieces(&self, partitions: u16) -> String {
        match partitions {
            0 => format!("the read model of projection {} without partitions", self.name),
            _ => format!("the read model of projection {} in {partitions} partitions", self.name),
        }
    }

    /// A rebuild has checkpoints of its own, of one number of partitions only.
    fn being_rebuilt(&self, found: u16, version: u64) -> StoreError {
        StoreError::Incompatible {
            expected: self.pieces(self.partitions),
            found: format!("{}, and a rebuild of version {version} in progress", self.pieces(found)),
            advice: "cancel the rebuild, or restore that number of partitions until the cut-over; then reset the projection".into(),
        }
    }

    fn mismatch(&self, found: u16) -> StoreError {
        StoreError::Incompatible {
            expected: self.pieces(self.partitions),
            found: self.pieces(found),
            advice: "the first start fixes the number of partitions: restore that number, or reset the projection to rebuild it".into(),
        }
    }

    /// Returns the writes that move the live version to the start in this layout, from any layout.
    ///
    /// `start` is a new start position, if there is one.
    pub(super) fn restart(
        &self,
        found: &StoredProgress,
        start: Option<Position>,
        rolls_back: bool,
    ) -> Result<Vec<ProgressWrite>, StoreError> {
        let from = found.projection;
        let changed = from.partitions != self.partitions;
        if let Some(version) = from.building_version.filter(|_| changed) {
            return Err(self.being_rebuilt(from.partitions, version));
        }
        let delivered = |checkpoint: Checkpoint| checkpoint.delivered.max(checkpoint.position);
        // If the layout changes, only the position that all old parts delivered is known to be
        // delivered.
        let old = keys(&self.name, from.partitions, from.live_version);
        let floor = old.map(|key| delivered(found.checkpoint(&key))).min().filter(|_| changed);
        let mut writes = Vec::new();
        for key in keys(&self.name, from.partitions.max(self.partitions), from.live_version) {
            let from = found.checkpoint(&key);
            let delivered = if rolls_back { Position::START } else { floor.unwrap_or(delivered(from)) };
            let to = Checkpoint { position: Position::START, delivered, ..from.next_generation() };
            writes.push(ProgressWrite::Checkpoint { key, from, to });
        }
        let start_position = start.or(from.start_position);
        let to = StoredProjection { partitions: self.partitions, start_position, ..from };
        if to != from {
            writes.push(ProgressWrite::Projection { name: self.name.clone(), from, to });
        }
        Ok(writes)
    }
}

fn keys(name: &str, partitions: u16, version: u64) -> impl Iterator<Item = CheckpointKey> {
    (0..partitions.max(1)).map(move |partition| CheckpointKey {
        projection: name.to_owned(),
        version,
        partition,
    })
}

/// Returns the write that undoes a write of [`Layout::restart`].
pub(super) fn undo(write: ProgressWrite) -> ProgressWrite {
    match write {
        // No generation repeats: it identifies the replay.
        ProgressWrite::Checkpoint { key, from, to } => {
            let back = Checkpoint { generation: to.next_generation().generation, ..from };
            ProgressWrite::Checkpoint { key, from: to, to: back }
        }
        ProgressWrite::Projection { name, from, to } => {
            let written = StoredProjection { revision: from.revision + 1, ..to };
            ProgressWrite::Projection { name, from: written, to: from }
        }
        other => other,
    }
}

/// Returns the error after [`ATTEMPTS`] that met other changes.
pub(super) fn contended(projection: &str) -> StoreError {
    let reason =
        format!("changing projection {projection} failed: concurrent changes in {ATTEMPTS} attempts");
    StoreError::Unavailable { reason, source: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(partitions: u16, checkpoints: &[(u64, u64)]) -> StoredProgress {
        let projection = StoredProjection { partitions, live_version: 1, ..StoredProjection::default() };
        let keys = keys("x", partitions, 1).zip(checkpoints);
        let checkpoints = keys.map(|(key, (position, delivered))| {
            let (position, delivered) = (Position::new(*position), Position::new(*delivered));
            (key, Checkpoint { position, delivered, epoch: 7, generation: 3 })
        });
        StoredProgress { projection, checkpoints: checkpoints.collect() }
    }

    fn moves(writes: &[ProgressWrite]) -> Vec<(u16, Checkpoint)> {
        let moves = writes.iter().filter_map(|write| match write {
            ProgressWrite::Checkpoint { key, to, .. } => Some((key.partition, *to)),
            _ => None,
        });
        moves.collect()
    }

    #[test]
    fn a_restart_keeps_the_delivered_positions() {
        let found = progress(2, &[(5, 9), (7, 0)]);
        let to = |generation, epoch, delivered| Checkpoint {
            position: Position::START,
            epoch,
            generation,
            delivered: Position::new(delivered),
        };
        let same = Layout::new("x", 2).restart(&found, None, false).unwrap();
        assert_eq!(moves(&same), [(0, to(4, 7, 9)), (1, to(4, 7, 7))]);
        assert_eq!(same.len(), 2);
        // In another layout, a stream may be in another partition than before.
        let more = Layout::new("x", 3).restart(&found, None, false).unwrap();
        assert_eq!(moves(&more), [(0, to(4, 7, 7)), (1, to(4, 7, 7)), (2, to(1, 0, 7))]);
        let whole = Layout::new("x", 0).restart(&found, None, true).unwrap();
        // The checkpoints of the old layout move too: their owners are fenced.
        assert_eq!(moves(&whole), [(0, to(4, 7, 0)), (1, to(4, 7, 0))]);
        assert_eq!(whole.len(), 3);
    }

    #[test]
    fn an_undone_restart_fences_as_well() {
        let found = progress(1, &[(5, 0)]);
        let writes = Layout::new("x", 1).restart(&found, None, false).unwrap();
        let back: Vec<_> = writes.into_iter().map(undo).collect();
        let was = found.checkpoints[0].1;
        assert_eq!(moves(&back), [(0, Checkpoint { generation: was.generation + 2, ..was })]);
    }

    #[test]
    fn a_rebuild_prevents_another_layout() {
        let mut found = progress(2, &[(5, 0), (5, 0)]);
        found.projection.building_version = Some(2);
        Layout::new("x", 2).restart(&found, None, true).unwrap();
        Layout::new("x", 4).restart(&found, None, true).unwrap_err();
    }
}
