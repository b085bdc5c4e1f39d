use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;
use uuid::Uuid;

use crate::event::Position;
use crate::partition::Partition;

/// What a projection is doing on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProjectionState {
    /// Preparing the read model, or finding out who owns it.
    Starting,
    /// Another node owns the read model; this one would take over.
    Standby,
    /// Reading what it has not applied yet from the store.
    CatchingUp,
    /// At the tip of the log.
    Following,
    /// Something failed, and is tried again.
    Retrying,
    /// Behind the tip of the log, until it is triggered: see [`Schedule::Manual`](super::Schedule::Manual).
    Waiting,
    /// Told to stand still; on all nodes, also after a restart, until it is resumed.
    Paused,
    /// An event cannot be applied, or the read model does not fit. Stands still until it is resumed, reset or restarted.
    Failed,
    /// Ended.
    Stopped,
}

impl ProjectionState {
    /// What a whole is when its parts differ: what somebody has to know first, and as long as a part works, not that others
    /// are elsewhere.
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

/// How a projection is doing on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionStatus {
    /// What it is doing.
    pub state: ProjectionState,
    /// Everything up to here is applied. [`Position::START`] until the checkpoint is read.
    pub position: Position,
    /// The high-water mark of the log as this node last read it; `None` until this node has read it since the start.
    /// `Some(Position::START)` is an empty log.
    pub head: Option<Position>,
    /// When the oldest event was recorded that is not applied yet, by the clock of the store; `None` at the head. Between two
    /// reads it is that of the last event that was applied, and right after the node noticed that it is behind, that moment: the
    /// node looks within a second, or where it is on standby, whenever it looks how far the owner is.
    pub behind_since: Option<DateTime<Utc>>,
    /// Which ownership of a shared read model this is; 0 on a node that does not own it, or if nobody has to.
    pub epoch: u64,
    /// Events applied on this node since the start, those of a transaction that was rolled back not counted.
    pub events_applied: u64,
    /// Events parked on this node since the start.
    pub events_parked: u64,
    /// Events passed over on this node since the start because of their name: see [`UnknownNames`](super::UnknownNames).
    pub events_passed_over: u64,
    /// What last went wrong. Stays when it goes well again.
    pub last_error: Option<String>,
    /// The version of the read model that it writes to: 0 before the first rebuild.
    pub version: u64,
    /// The same of each partition, in order; empty if it is not partitioned. Otherwise what stands above is of all of them: the
    /// worst state, the lowest position, sums.
    pub partitions: Vec<PartitionStatus>,
    /// Whether the read model can be read, as far as this node knows.
    pub(super) prepared: bool,
    /// Whether it was found to be in the shape that this program wants.
    pub(super) fits: bool,
    /// Whether nobody wants what it would do.
    pub(super) dormant: bool,
    /// Whether the checkpoint was read, so that the position means something.
    pub(super) located: bool,
    /// Since when, and from where, this node sees it move.
    pub(super) measured: Option<(Instant, Position)>,
}

/// How one partition of a projection is doing on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartitionStatus {
    /// Which one.
    pub partition: Partition,
    /// The node that owns it, as far as this one knows.
    pub owner: Option<Uuid>,
    /// How it is doing.
    pub status: ProjectionStatus,
}

impl ProjectionStatus {
    /// Of a whole, from its parts; there is at least one.
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
            events_passed_over: all().map(|status| status.events_passed_over).sum(),
            last_error: all().find_map(|status| status.last_error.clone()),
            prepared: all().all(|status| status.prepared),
            fits: all().all(|status| status.fits),
            version: all().map(|status| status.version).max().unwrap_or(0),
            dormant: all().all(|status| status.dormant),
            located: all().all(|status| status.located),
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
            events_passed_over: 0,
            last_error: None,
            partitions: Vec::new(),
            prepared: false,
            fits: false,
            version: 0,
            dormant: false,
            located: false,
            measured: None,
        }
    }

    /// How far it is from the head, in positions of the log; `None` until this node has read both its checkpoint and the
    /// high-water mark since the start.
    ///
    /// Some positions are empty, and some events are not for this projection. `Some(0)` is exact: everything up to
    /// [`head`](Self::head) is applied. More is an upper bound of the events.
    pub fn lag(&self) -> Option<u64> {
        let head = self.head.filter(|_| self.located)?;
        Some(head.get().saturating_sub(self.position.get()))
    }

    /// How far it is from the head in time: the age of the oldest event that is not applied yet, zero at the head; `None` as
    /// long as [`lag`](Self::lag) is. As good as [`behind_since`](Self::behind_since), and as the clocks of the store and of
    /// this node agree.
    pub fn lag_time(&self) -> Option<Duration> {
        self.lag()?;
        let age = |since: DateTime<Utc>| (Utc::now() - since).to_std().unwrap_or_default();
        Some(self.behind_since.map_or(Duration::ZERO, age))
    }

    /// It is at `position`, and `oldest` is when the first event behind that was recorded, or one before it, where that is known.
    pub(super) fn moved_to(&mut self, position: Position, oldest: Option<DateTime<Utc>>) {
        self.position = position;
        self.located = true;
        // A head that was read is never below what is applied.
        self.head = self.head.map(|head| head.max(position));
        if oldest.is_some() {
            self.behind_since = oldest;
        }
        self.tell_behind();
    }

    /// The log goes as far as `head`.
    pub(super) fn knows_of(&mut self, head: Position) {
        self.head = self.head.max(Some(head));
        self.tell_behind();
    }

    fn tell_behind(&mut self) {
        if self.lag().is_none_or(|lag| lag == 0) {
            self.behind_since = None;
        } else {
            // Until it is looked for.
            self.behind_since.get_or_insert_with(Utc::now);
        }
    }
}

/// How a rebuild beside the live read model is getting on.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RebuildStatus {
    /// The version that is being built.
    pub version: u64,
    /// How many positions of the log are done, of all partitions together.
    pub done: u64,
    /// … of how many.
    pub of: u64,
    /// How many a second, as this node sees it; 0 until it has seen it move.
    pub per_second: f64,
    /// How long it takes at that pace; `None` when there is none.
    pub left: Option<Duration>,
    /// What last went wrong.
    pub last_error: Option<String>,
}

impl RebuildStatus {
    /// Of parts that build the same version; `None` if nothing is being built.
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
