//! Layout: the partitions of a projection and the names of its rows and leases.
//!
//! No two projections share a name, and no name equals one of the runtime's own.

use super::ReadModel;
use crate::event::Position;
use crate::partition::Partition;
use crate::store::{Checkpoint, CheckpointError, StoreError};

/// I7: returns `found` with a new mark.
///
/// Writers that know only `found` are fenced, also at the start of the log.
pub(super) fn bump(found: Checkpoint) -> Checkpoint {
    Checkpoint { mark: found.mark + 1, ..found }
}

/// Returns the row that records the position delivered before a reset, without rollback.
pub(super) fn delivered(row: &str) -> String {
    format!("delivered/{row}")
}

/// Role of a task for its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Keeps the live version up to date.
    Live,
    /// Builds the next version beside the live one, during a rebuild.
    Rebuild,
}

/// The live version of a read model and the version that is being built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Versions {
    pub(super) live: u64,
    pub(super) rebuilt: Option<u64>,
}

impl From<Checkpoint> for Versions {
    fn from(record: Checkpoint) -> Self {
        Self { live: record.epoch, rebuilt: (record.mark > 0).then_some(record.mark) }
    }
}

impl Versions {
    /// Encodes the versions as a checkpoint.
    pub(super) fn record(self, found: Checkpoint) -> Checkpoint {
        Checkpoint { epoch: self.live, mark: self.rebuilt.unwrap_or(0), ..found }
    }

    /// Returns the version of the next rebuild.
    pub(super) fn next(self) -> u64 {
        self.live + 1
    }

    /// Returns the version for a role.
    pub(super) fn of(self, role: Role) -> Option<u64> {
        match role {
            Role::Live => Some(self.live),
            Role::Rebuild => self.rebuilt,
        }
    }
}

/// The parts of a checkpoint name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CheckpointKey<'a> {
    pub(super) name: &'a str,
    /// Index of the partition, if there is one.
    pub(super) partition: Option<u16>,
    pub(super) version: u64,
}

impl<'a> CheckpointKey<'a> {
    /// Parses a name made by [`Layout::row`]; `None` for other checkpoints.
    pub(super) fn parse(row: &'a str) -> Option<Self> {
        let (kind, rest) = row.split_once('/')?;
        let (kind, version) = match kind.split_once('@') {
            Some((kind, version)) => (kind, version.parse().ok()?),
            None => (kind, 0),
        };
        match kind {
            "projection" => Some(Self { name: rest, partition: None, version }),
            "partition" => {
                let (index, name) = rest.split_once('/')?;
                Some(Self { name, partition: Some(index.parse().ok()?), version })
            }
            _ => None,
        }
    }
}

/// A projection's name, and its number of partitions if it is partitioned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    name: String,
    partitions: Option<u16>,
}

impl Layout {
    pub(super) fn single(name: &str) -> Self {
        Self { name: name.to_owned(), partitions: None }
    }

    pub(super) fn partitioned(name: &str, partitions: u16) -> Self {
        Self { name: name.to_owned(), partitions: Some(partitions) }
    }

    /// Returns the checkpoint name of a version.
    pub(super) fn row(&self, partition: Option<Partition>, version: u64) -> String {
        let version = if version == 0 { String::new() } else { format!("@{version}") };
        match partition {
            None => format!("projection{version}/{}", self.name),
            Some(partition) => format!("partition{version}/{}/{}", partition.index(), self.name),
        }
    }

    /// Returns the name of the lease that permits to move the checkpoint.
    pub(super) fn lease(&self, partition: Option<Partition>, role: Role) -> String {
        let row = self.row(partition, 0);
        match role {
            Role::Live => row,
            Role::Rebuild => format!("rebuild-{row}"),
        }
    }

    /// Returns the checkpoint of the versions.
    ///
    /// Its epoch is the live version, its mark the version being built, or 0.
    pub(super) fn version(&self) -> String {
        format!("version/{}", self.name)
    }

    /// Returns the parts of this layout.
    pub(super) fn parts(&self) -> impl Iterator<Item = Option<Partition>> {
        let whole = self.partitions.is_none().then_some(None);
        Partition::all(self.partitions.unwrap_or(0)).map(Some).chain(whole)
    }

    pub(super) async fn versions(&self, read_model: &impl ReadModel) -> Result<Versions, StoreError> {
        if !read_model.shared() {
            return Ok(Versions::from(Checkpoint::default()));
        }
        Ok(Versions::from(read_model.checkpoint(&self.version()).await?))
    }

    /// Returns the live version, also in a read model that still belongs to another store.
    pub(super) async fn live<R: ReadModel>(
        &self,
        read_model: &R,
        open: &mut R::Open,
    ) -> Result<u64, StoreError> {
        if !read_model.shared() {
            return Ok(0);
        }
        Ok(Versions::from(read_model.adopt(open, &self.version()).await?).live)
    }

    /// Returns the row of the requests of a kind: a checkpoint without meaning, with parked events.
    pub(super) fn request(&self, kind: &str) -> String {
        format!("request/{kind}/{}", self.name)
    }

    /// Returns the lease for changes that affect all owners, held by one node at a time.
    ///
    /// Its release makes all owners re-read their state.
    pub(super) fn order(&self) -> String {
        format!("order/{}", self.name)
    }

    /// Returns the checkpoint of the start position: the last position that is never applied.
    ///
    /// Its mark is 1 once the position is known.
    pub(super) fn start(&self) -> String {
        format!("start/{}", self.name)
    }

    /// Returns the checkpoint, in the event store, of the target of manual triggers.
    ///
    /// Its mark is the number of triggers.
    pub(super) fn goal(&self) -> String {
        format!("goal/{}", self.name)
    }

    /// Returns the lease with the epoch that counts the triggers.
    pub(super) fn trigger(&self) -> String {
        format!("trigger/{}", self.name)
    }

    /// Returns a membership lease: its holder shares the partitions.
    pub(super) fn member(&self, slot: usize) -> String {
        format!("member/{slot}/{}", self.name)
    }

    /// Returns the checkpoint of the layout: its mark is the number of partitions, or 0.
    pub(super) fn record(&self) -> String {
        format!("partitions/{}", self.name)
    }

    fn mark(&self) -> u64 {
        self.partitions.map_or(0, u64::from)
    }

    /// Checks that the read model has this layout, or records it.
    ///
    /// # Errors
    /// `Incompatible` if it has another number of partitions: its checkpoints do not fit these
    /// partitions.
    pub(super) async fn check(&self, read_model: &impl ReadModel) -> Result<(), StoreError> {
        let found = read_model.checkpoint(&self.record()).await?.mark;
        if found == self.mark() {
            return Ok(());
        }
        if found > 0 {
            return Err(self.mismatch(found));
        }
        if read_model.checkpoint(&self.row(None, 0)).await?.position > Position::START {
            return Err(self.mismatch(0));
        }
        let none = Checkpoint::default();
        let open = read_model.begin(&self.record(), none).await?;
        let ours = Checkpoint { mark: self.mark(), ..none };
        match read_model.commit(open, &self.record(), none, ours, None).await {
            Ok(()) => Ok(()),
            // Another node was faster.
            Err(CheckpointError::Stale { found, .. }) if found.mark == self.mark() => Ok(()),
            Err(CheckpointError::Stale { found, .. }) => Err(self.mismatch(found.mark)),
            Err(CheckpointError::Store(error)) => Err(error),
        }
    }

    fn of(mark: u64, name: &str) -> Self {
        let partitions = u16::try_from(mark).ok().filter(|&partitions| partitions > 0);
        Self { name: name.to_owned(), partitions }
    }

    /// Returns the layout that is recorded in the read model.
    pub(super) async fn as_recorded(&self, read_model: &impl ReadModel) -> Result<Self, StoreError> {
        Ok(Self::of(read_model.checkpoint(&self.record()).await?.mark, &self.name))
    }

    /// Returns the record of delivered positions of a row, and its delivered position.
    async fn delivered<R: ReadModel>(
        &self,
        read_model: &R,
        open: &mut R::Open,
        row: &str,
    ) -> Result<(Checkpoint, Position), StoreError> {
        let known = read_model.adopt(open, &delivered(row)).await?;
        let now = read_model.adopt(open, row).await?.position;
        Ok((known, known.position.max(now)))
    }

    fn pieces(&self, partitions: u64) -> String {
        match partitions {
            0 => format!("the read model of projection {} without partitions", self.name),
            _ => format!("the read model of projection {} in {partitions} partitions", self.name),
        }
    }

    /// A rebuild has rows of its own, of one number of partitions only.
    fn being_rebuilt(&self, found: u64, version: u64) -> StoreError {
        StoreError::Incompatible {
            expected: self.pieces(self.mark()),
            found: format!("{}, and a rebuild of version {version} in progress", self.pieces(found)),
            advice: "cancel the rebuild, or restore that number of partitions until the cut-over; then reset the projection".into(),
        }
    }

    fn mismatch(&self, found: u64) -> StoreError {
        StoreError::Incompatible {
            expected: self.pieces(self.mark()),
            found: self.pieces(found),
            advice: "the first start fixes the number of partitions: restore that number, or reset the projection to rebuild it".into(),
        }
    }

    /// Returns the moves that reset all rows to the start in this layout, from any other layout.
    ///
    /// Each move has the row, its checkpoint and its target. Runs in a transaction that empties the
    /// read model; the commit of that transaction makes the last move.
    pub(super) async fn begin_anew<R: ReadModel>(
        &self,
        read_model: &R,
        open: &mut R::Open,
        version: u64,
    ) -> Result<Vec<(String, Checkpoint, Checkpoint)>, StoreError> {
        let restarted = |found: Checkpoint| Checkpoint { position: Position::START, ..bump(found) };
        if !read_model.shared() {
            let row = self.row(None, 0);
            let found = read_model.adopt(open, &row).await?;
            return Ok(vec![(row, found, restarted(found))]);
        }
        let record = self.record();
        let found = read_model.adopt(open, &record).await?;
        let most = u16::try_from(found.mark).unwrap_or(u16::MAX).max(self.partitions.unwrap_or(0));
        let mut rows = Vec::with_capacity(usize::from(most) + 2);
        if found.mark != self.mark() {
            let versions = Versions::from(read_model.adopt(open, &self.version()).await?);
            if let Some(rebuilt) = versions.rebuilt {
                return Err(self.being_rebuilt(found.mark, rebuilt));
            }
            rows.push((record, found, Checkpoint { mark: self.mark(), ..found }));
        }
        // If the layout changes, only the position that all old parts delivered is known to be
        // delivered.
        let mut floor = None;
        if found.mark != self.mark() && !read_model.rolls_back() {
            for part in Self::of(found.mark, &self.name).parts() {
                let upto = self.delivered(read_model, open, &self.row(part, version)).await?.1;
                floor = Some(floor.map_or(upto, |floor: Position| floor.min(upto)));
            }
        }
        for partition in Partition::all(most).map(Some).chain([None]) {
            let row = self.row(partition, version);
            let found = read_model.adopt(open, &row).await?;
            let used = match partition {
                Some(_) => self.partitions.is_some(),
                None => self.partitions.is_none(),
            };
            if used && !read_model.rolls_back() {
                // First: without one common transaction, the delivered positions must not be lost.
                let (known, upto) = self.delivered(read_model, open, &row).await?;
                let to = Checkpoint { position: floor.unwrap_or(upto), ..known };
                rows.push((delivered(&row), known, to));
            }
            if used || found != Checkpoint::default() {
                rows.push((row, found, restarted(found)));
            }
        }
        if found.mark != self.mark() && !read_model.rolls_back() {
            // The layout record comes last: in another layout, a row that is not at the start yet
            // would claim events that it never applied.
            rows.rotate_left(1);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::projection::AtLeastOnce;
    use crate::store::EventStore;
    use crate::store::MemoryStore;

    #[test]
    fn rows_are_read_as_they_are_named() {
        for name in ["revenue", "a/b", "x@2/0/y"] {
            for version in [0, 1, 12] {
                let row = Layout::single(name).row(None, version);
                assert_eq!(
                    CheckpointKey::parse(&row),
                    Some(CheckpointKey { name, partition: None, version })
                );
                for partition in Partition::all(11) {
                    let row = Layout::partitioned(name, 11).row(Some(partition), version);
                    assert_eq!(
                        CheckpointKey::parse(&row),
                        Some(CheckpointKey { name, partition: Some(partition.index()), version })
                    );
                }
            }
            let layout = Layout::single(name);
            for other in [
                layout.version(),
                layout.record(),
                layout.request("reset"),
                layout.goal(),
                layout.start(),
                delivered(&layout.row(None, 0)),
                "publisher".into(),
            ] {
                assert_eq!(CheckpointKey::parse(&other), None, "{other}");
            }
        }
    }
    /// If it stops between two moves, every row of the new layout is at the start.
    #[tokio::test]
    async fn without_rollback_the_layout_changes_after_the_checkpoints() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let outside = AtLeastOnce::new();
        outside.prepare(&store, "x").await.unwrap();
        Layout::partitioned("x", 4).check(&outside).await.unwrap();
        let mut open = outside.begin("x", Checkpoint::default()).await.unwrap();
        let two = Layout::partitioned("x", 2);
        let rows = two.begin_anew(&outside, &mut open, 0).await.unwrap();
        let names: Vec<_> = rows.iter().map(|(row, ..)| row.as_str()).collect();
        let [parts @ .., last] = &names[..] else { panic!("{names:?}") };
        assert_eq!(*last, two.record());
        assert!(parts.contains(&"partition/1/x") && !parts.contains(&"partitions/x"), "{names:?}");
    }
}
