use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use tokio::time::Instant;
use uuid::Uuid;

use crate::event::Position;
use crate::partition::Partition;

/// State of a projection on this node. Serializes in snake case: `"catching_up"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ProjectionState {
    /// Preparing the read model, or finding its owner.
    Starting,
    /// Another node owns the read model; this node can take over.
    Standby,
    /// Catch-up: reading unapplied events from the store.
    CatchingUp,
    /// Live: at the end of the log.
    Following,
    /// Retrying after a failure.
    Retrying,
    /// Before the end of the log, waiting for a trigger: see
    /// [`Schedule::Manual`](super::Schedule::Manual).
    Waiting,
    /// Paused on all nodes, also after a restart, until it is resumed.
    Paused,
    /// Stopped because an event cannot be applied or the read model does not fit.
    ///
    /// Ends with a resume, a reset or a restart.
    Failed,
    /// Stopped.
    Stopped,
}

impl ProjectionState {
    /// Returns the rank of a state in the total status: the highest rank wins.
    ///
    /// A state that needs attention comes first. While a part works on this node, parts on other
    /// nodes do not count.
    fn severity(self) -> u8 {
        match self {
            Self::Standby => 0,
            Self::Stopped => 1,
            Self::Following => 2,
            Self::Waiting => 3,
            Self::CatchingUp => 3,
            Self::Starting => 4,
            Self::Paused => 5,
            Self::Retrying => 6,
            Self::Failed => 7,
        }
    }
}

/// Status of a projection on this node.
///
/// Serializes as a map of its fields, with [`lag`](Self::lag) and
/// [`lag_time_seconds`](Self::lag_time).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionStatus {
    /// State of the projection.
    pub state: ProjectionState,
    /// Position up to which everything is applied.
    ///
    /// [`Position::START`] until the checkpoint is read.
    pub position: Position,
    /// High-water mark of the log at this node's last read.
    ///
    /// `None` until the first read since the start. `Some(Position::START)` is an empty log.
    pub head: Option<Position>,
    /// Recorded time of the oldest unapplied event, by the store's clock; `None` at the head.
    ///
    /// Between two reads, it is the recorded time of the last applied event. Right after the node
    /// notices the lag, it is that moment. The node checks within 1 s; on standby, whenever it
    /// reads the owner's checkpoint.
    pub behind_since: Option<DateTime<Utc>>,
    /// Epoch of the owner of a shared read model; 0 on other nodes, or if the read model is not
    /// shared.
    pub epoch: u64,
    /// Number of events applied on this node since the start, without those that were rolled back.
    pub events_applied: u64,
    /// Number of events parked on this node since the start.
    pub events_parked: u64,
    /// Number of events skipped on this node since the start because of their name.
    ///
    /// See [`UnknownNames`](super::UnknownNames).
    pub events_skipped: u64,
    /// Last error. Stays after recovery.
    pub last_error: Option<String>,
    /// Version of the read model to write to: 0 before the first rebuild.
    pub version: u64,
    /// Status of each partition, in order; empty if the projection is not partitioned.
    ///
    /// For a partitioned projection, the fields above are totals: the worst state, the lowest
    /// position, sums.
    pub partitions: Vec<PartitionStatus>,
    /// Whether the read model can be read, as far as this node knows.
    pub(super) prepared: bool,
    /// Whether the read model has the layout that this program wants.
    pub(super) fits: bool,
    /// Whether the task has nothing to build.
    pub(super) dormant: bool,
    /// Whether the checkpoint was read, so that the position is valid.
    pub(super) located: bool,
    /// Generation of that checkpoint: another one in the read model means that it was reset since.
    pub(super) generation: u64,
    /// Start time and start position of the speed measurement on this node.
    pub(super) measured: Option<(Instant, Position)>,
}

/// Status of one partition of a projection on this node. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PartitionStatus {
    /// The partition.
    pub partition: Partition,
    /// The node that owns the partition, as far as this node knows.
    pub owner: Option<Uuid>,
    /// Status of the partition.
    pub status: ProjectionStatus,
}

impl ProjectionStatus {
    /// Returns the total of the parts; there is at least one.
    pub(super) fn sum(partitions: Vec<PartitionStatus>) -> Self {
        let all = || partitions.iter().map(|partition| &partition.status);
        let state = all().map(|status| status.state).max_by_key(|state| state.severity());
        Self {
            state: state.unwrap_or(ProjectionState::Starting),
            position: all().map(|status| status.position).min().unwrap_or_default(),
            head: all()
                .map(|status| status.head)
                .collect::<Option<Vec<_>>>()
                .and_then(|heads| heads.into_iter().max()),
            behind_since: all().filter_map(|status| status.behind_since).min(),
            epoch: 0,
            events_applied: all().map(|status| status.events_applied).sum(),
            events_parked: all().map(|status| status.events_parked).sum(),
            events_skipped: all().map(|status| status.events_skipped).sum(),
            last_error: all().find_map(|status| status.last_error.clone()),
            prepared: all().all(|status| status.prepared),
            fits: all().all(|status| status.fits),
            version: all().map(|status| status.version).max().unwrap_or(0),
            dormant: all().all(|status| status.dormant),
            located: all().all(|status| status.located),
            generation: 0,
            measured: None,
            partitions,
        }
    }

    pub(super) fn new() -> Self {
        Self {
            state: ProjectionState::Starting,
            position: Position::START,
            head: None,
            behind_since: None,
            epoch: 0,
            events_applied: 0,
            events_parked: 0,
            events_skipped: 0,
            last_error: None,
            partitions: Vec::new(),
            prepared: false,
            fits: false,
            version: 0,
            dormant: false,
            located: false,
            generation: 0,
            measured: None,
        }
    }

    /// Returns the distance to the head in log positions.
    ///
    /// `None` until this node has read both the checkpoint and the high-water mark since the start.
    /// Some positions are empty, and some events are not for this projection. `Some(0)` is exact:
    /// everything up to [`head`](Self::head) is applied. A higher value is an upper bound of the
    /// number of events.
    pub fn lag(&self) -> Option<u64> {
        let head = self.head.filter(|_| self.located)?;
        Some(head.get().saturating_sub(self.position.get()))
    }

    /// Returns the lag in time: the age of the oldest unapplied event, zero at the head.
    ///
    /// `None` as long as [`lag`](Self::lag) is `None`. Its accuracy is that of
    /// [`behind_since`](Self::behind_since) and of the clocks of the store and this node.
    pub fn lag_time(&self) -> Option<Duration> {
        self.lag()?;
        let age = |since: DateTime<Utc>| (Utc::now() - since).to_std().unwrap_or_default();
        Some(self.behind_since.map_or(Duration::ZERO, age))
    }

    /// Records `position`, and `oldest`, the recorded time of the next event or of one before it,
    /// if known.
    pub(super) fn moved_to(&mut self, position: Position, oldest: Option<DateTime<Utc>>) {
        self.position = position;
        self.located = true;
        // A head that was read is never below the applied position.
        self.head = self.head.map(|head| head.max(position));
        if oldest.is_some() {
            self.behind_since = oldest;
        }
        self.update_behind_since();
    }

    /// Records that the log reaches `head`.
    pub(super) fn knows_of(&mut self, head: Position) {
        self.head = self.head.max(Some(head));
        self.update_behind_since();
    }

    fn update_behind_since(&mut self) {
        if self.lag().is_none_or(|lag| lag == 0) {
            self.behind_since = None;
        } else {
            // Until the recorded time is read.
            self.behind_since.get_or_insert_with(Utc::now);
        }
    }
}

impl Serialize for ProjectionStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut form = serializer.serialize_struct("ProjectionStatus", 13)?;
        form.serialize_field("state", &self.state)?;
        form.serialize_field("position", &self.position)?;
        form.serialize_field("head", &self.head)?;
        form.serialize_field("lag", &self.lag())?;
        form.serialize_field("lag_time_seconds", &self.lag_time().map(|lag| lag.as_secs_f64()))?;
        form.serialize_field("behind_since", &self.behind_since)?;
        form.serialize_field("epoch", &self.epoch)?;
        form.serialize_field("events_applied", &self.events_applied)?;
        form.serialize_field("events_parked", &self.events_parked)?;
        form.serialize_field("events_skipped", &self.events_skipped)?;
        form.serialize_field("last_error", &self.last_error)?;
        form.serialize_field("version", &self.version)?;
        form.serialize_field("partitions", &self.partitions)?;
        form.end()
    }
}

/// Progress of a rebuild beside the live read model.
///
/// Serializes as a map of its fields, with `left_seconds`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RebuildStatus {
    /// The version that is being built.
    pub version: u64,
    /// Number of log positions done, of all partitions together.
    pub done: u64,
    /// Total number of log positions.
    pub of: u64,
    /// Positions per second, measured on this node; 0 before the first measurement.
    pub per_second: f64,
    /// Remaining time at that speed; `None` without a speed.
    #[serde(rename = "left_seconds", serialize_with = "crate::serde_forms::optional_seconds")]
    pub left: Option<Duration>,
    /// Last error.
    pub last_error: Option<String>,
}

impl RebuildStatus {
    /// Returns the progress of parts that build the same version; `None` if there is no rebuild.
    pub(super) fn of(parts: &[ProjectionStatus]) -> Option<Self> {
        let parts = || parts.iter().filter(|status| !status.dormant && status.version > 0);
        let version = parts().map(|status| status.version).max()?;
        let done: u64 = parts().map(|status| status.position.get()).sum();
        let of: u64 = parts().map(|status| status.head.unwrap_or_default().max(status.position).get()).sum();
        let pace = |status: &ProjectionStatus| {
            let (since, from) = status.measured?;
            let moved = status.position.get().saturating_sub(from.get());
            Some(moved as f64 / since.elapsed().as_secs_f64().max(0.001))
        };
        let per_second = parts().filter_map(pace).sum();
        let left = Duration::try_from_secs_f64((of - done) as f64 / per_second).ok();
        let last_error = parts().find_map(|status| status.last_error.clone());
        Some(Self { version, done, of, per_second, left, last_error })
    }
}
