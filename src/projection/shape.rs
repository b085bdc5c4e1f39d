//! How a projection is cut into partitions, and what its rows and leases are called: nothing of the runtime's own, and no
//! two projections, have the same.

use super::ReadModel;
use super::worker::Role;
use crate::event::Position;
use crate::partition::Partition;
use crate::store::{Checkpoint, CheckpointError, StoreError};

/// As `found`, but so that whoever knows only `found` is refused, even at the start of the log.
pub(super) fn fenced(found: Checkpoint) -> Checkpoint {
    Checkpoint { mark: found.mark + 1, ..found }
}

/// Where a read model that cannot be rolled back remembers how far a row was delivered before its resets.
pub(super) fn delivered(row: &str) -> String {
    format!("delivered/{row}")
}

/// Which version of a read model is live, and which is being built beside it.
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
    /// What the record of them is.
    pub(super) fn record(self, found: Checkpoint) -> Checkpoint {
        Checkpoint { epoch: self.live, mark: self.rebuilt.unwrap_or(0), ..found }
    }

    /// The one that is built when somebody wants that.
    pub(super) fn next(self) -> u64 {
        self.live + 1
    }

    /// The one to work on.
    pub(super) fn of(self, role: Role) -> Option<u64> {
        match role {
            Role::Live => Some(self.live),
            Role::Rebuild => self.rebuilt,
        }
    }
}

/// What the name of a checkpoint says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row<'a> {
    pub(super) name: &'a str,
    /// The index of the partition, if it is one's.
    pub(super) partition: Option<u16>,
    pub(super) version: u64,
}

impl<'a> Row<'a> {
    /// Reads what [`Shape::row`] has made; `None` for other checkpoints.
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

/// A projection's name, and its number of partitions if it is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    name: String,
    partitions: Option<u16>,
}

impl Shape {
    pub(super) fn whole(name: &str) -> Self {
        Self { name: name.to_owned(), partitions: None }
    }

    pub(super) fn cut(name: &str, partitions: u16) -> Self {
        Self { name: name.to_owned(), partitions: Some(partitions) }
    }

    /// What a checkpoint of a version is called.
    pub(super) fn row(&self, partition: Option<Partition>, version: u64) -> String {
        let version = if version == 0 { String::new() } else { format!("@{version}") };
        match partition {
            None => format!("projection{version}/{}", self.name),
            Some(partition) => format!("partition{version}/{}/{}", partition.index(), self.name),
        }
    }

    /// What the lease is called of who may move it.
    pub(super) fn lease(&self, partition: Option<Partition>, role: Role) -> String {
        let row = self.row(partition, 0);
        match role {
            Role::Live => row,
            Role::Rebuild => format!("rebuild-{row}"),
        }
    }

    /// A checkpoint whose epoch is the version that is live, and whose mark is the one that is being built, or 0.
    pub(super) fn version(&self) -> String {
        format!("version/{}", self.name)
    }

    /// The parts that there are in this shape.
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

    /// The version that is live, also in a read model of another store's, whose it is then no more.
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

    /// Where requests of a kind are kept: a checkpoint that means nothing, with what is put aside beside it.
    pub(super) fn request(&self, kind: &str) -> String {
        format!("request/{kind}/{}", self.name)
    }

    /// The lease under which one node at a time changes what all of them own; its end tells them to look again.
    pub(super) fn order(&self) -> String {
        format!("order/{}", self.name)
    }

    /// A checkpoint whose position is the last that is never applied; its mark is 1 once that is found.
    pub(super) fn start(&self) -> String {
        format!("start/{}", self.name)
    }

    /// The checkpoint, in the event store, of how far it is to go when it is triggered by hand; whose mark counts how often it was.
    pub(super) fn goal(&self) -> String {
        format!("goal/{}", self.name)
    }

    /// The lease whose epoch says that it was triggered once more.
    pub(super) fn trigger(&self) -> String {
        format!("trigger/{}", self.name)
    }

    /// One of the leases that say which nodes share the partitions.
    pub(super) fn member(&self, slot: usize) -> String {
        format!("member/{slot}/{}", self.name)
    }

    /// A checkpoint whose mark is the number of partitions, 0 if it was never cut.
    pub(super) fn record(&self) -> String {
        format!("partitions/{}", self.name)
    }

    fn mark(&self) -> u64 {
        self.partitions.map_or(0, u64::from)
    }

    /// Checks that the read model was built in this shape, or begins it.
    ///
    /// # Errors
    /// `Incompatible` when it was cut otherwise: its checkpoints say nothing about these partitions.
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
            // Another node was quicker.
            Err(CheckpointError::Stale { found, .. }) if found.mark == self.mark() => Ok(()),
            Err(CheckpointError::Stale { found, .. }) => Err(self.mismatch(found.mark)),
            Err(CheckpointError::Store(error)) => Err(error),
        }
    }

    fn of(mark: u64, name: &str) -> Self {
        let partitions = u16::try_from(mark).ok().filter(|&partitions| partitions > 0);
        Self { name: name.to_owned(), partitions }
    }

    /// As the read model was cut when it was begun.
    pub(super) async fn as_recorded(&self, read_model: &impl ReadModel) -> Result<Self, StoreError> {
        Ok(Self::of(read_model.checkpoint(&self.record()).await?.mark, &self.name))
    }

    /// What is recorded of how far a row was delivered, and how far it was.
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
            0 => format!("the read model of projection {} in one piece", self.name),
            _ => format!("the read model of projection {} in {partitions} partitions", self.name),
        }
    }

    /// What is rebuilt has rows of its own, and knows of no other number of partitions.
    fn being_rebuilt(&self, found: u64, version: u64) -> StoreError {
        StoreError::Incompatible {
            expected: self.pieces(self.mark()),
            found: format!("{}, and version {version} of it being rebuilt", self.pieces(found)),
            advice: "cancel the rebuild, or go back to that number of partitions until it is done, and reset the projection then".into(),
        }
    }

    fn mismatch(&self, found: u64) -> StoreError {
        StoreError::Incompatible {
            expected: self.pieces(self.mark()),
            found: self.pieces(found),
            advice: "the number of partitions is fixed when a projection is first started: go back to it, or reset the projection so that it is built anew".into(),
        }
    }

    /// Where everything begins anew in this shape, whatever it was before: every row that there may be, with where it is to
    /// be put, from where it is. Within a transaction that is to empty the read model; the last one is left to its commit.
    pub(super) async fn begin_anew<R: ReadModel>(
        &self,
        read_model: &R,
        open: &mut R::Open,
        version: u64,
    ) -> Result<Vec<(String, Checkpoint, Checkpoint)>, StoreError> {
        let anew = |found: Checkpoint| Checkpoint { position: Position::START, ..fenced(found) };
        if !read_model.shared() {
            let row = self.row(None, 0);
            let found = read_model.adopt(open, &row).await?;
            return Ok(vec![(row, found, anew(found))]);
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
        // Of another shape, nothing is known to be delivered but what every part of it had.
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
                // First: where this is not one transaction, it must not be forgotten what was delivered.
                let (known, upto) = self.delivered(read_model, open, &row).await?;
                let to = Checkpoint { position: floor.unwrap_or(upto), ..known };
                rows.push((delivered(&row), known, to));
            }
            if used || found != Checkpoint::default() {
                rows.push((row, found, anew(found)));
            }
        }
        if found.mark != self.mark() && !read_model.rolls_back() {
            // Its own last: in another shape, a row that is not at the start yet would stand for what it never had.
            rows.rotate_left(1);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::projection::External;
    use crate::store::EventStore;
    use crate::store::MemoryStore;

    #[test]
    fn rows_are_read_as_they_are_named() {
        for name in ["revenue", "a/b", "x@2/0/y"] {
            for version in [0, 1, 12] {
                let row = Shape::whole(name).row(None, version);
                assert_eq!(Row::parse(&row), Some(Row { name, partition: None, version }));
                for partition in Partition::all(11) {
                    let row = Shape::cut(name, 11).row(Some(partition), version);
                    assert_eq!(
                        Row::parse(&row),
                        Some(Row { name, partition: Some(partition.index()), version })
                    );
                }
            }
            let shape = Shape::whole(name);
            for other in [
                shape.version(),
                shape.record(),
                shape.request("reset"),
                shape.goal(),
                shape.start(),
                delivered(&shape.row(None, 0)),
                "publisher".into(),
            ] {
                assert_eq!(Row::parse(&other), None, "{other}");
            }
        }
    }
    /// Dying between two of them, nothing is in another shape that is not at the start.
    #[tokio::test]
    async fn where_nothing_is_rolled_back_the_shape_changes_behind_the_checkpoints() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let outside = External::new();
        outside.prepare(&store, "x").await.unwrap();
        Shape::cut("x", 4).check(&outside).await.unwrap();
        let mut open = outside.begin("x", Checkpoint::default()).await.unwrap();
        let two = Shape::cut("x", 2);
        let rows = two.begin_anew(&outside, &mut open, 0).await.unwrap();
        let names: Vec<_> = rows.iter().map(|(row, ..)| row.as_str()).collect();
        let [parts @ .., last] = &names[..] else { panic!("{names:?}") };
        assert_eq!(*last, two.record());
        assert!(parts.contains(&"partition/1/x") && !parts.contains(&"partitions/x"), "{names:?}");
    }
}
