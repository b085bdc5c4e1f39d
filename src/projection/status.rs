use crate::event::Position;

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
    /// Told to stand still; on all nodes, also after a restart, until it is resumed.
    Paused,
    /// An event cannot be applied, or the read model does not fit. Stands still until it is resumed, reset or restarted.
    Failed,
    /// Ended.
    Stopped,
}

/// How a projection is doing on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionStatus {
    /// What it is doing.
    pub state: ProjectionState,
    /// Everything up to here is applied.
    pub position: Position,
    /// The last event of the log that this node knows of.
    pub head: Position,
    /// Which ownership of a shared read model this is; 0 on a node that does not own it, or if nobody has to.
    pub epoch: u64,
    /// Events applied on this node since the start, those of a transaction that was rolled back not counted.
    pub events_applied: u64,
    /// Events parked on this node since the start.
    pub events_parked: u64,
    /// What last went wrong. Stays when it goes well again.
    pub last_error: Option<String>,
    /// Whether the read model can be read, as far as this node knows.
    pub(super) prepared: bool,
}

impl ProjectionStatus {
    pub(super) fn new() -> Self {
        Self {
            state: ProjectionState::Starting,
            position: Position::START,
            head: Position::START,
            epoch: 0,
            events_applied: 0,
            events_parked: 0,
            last_error: None,
            prepared: false,
        }
    }

    /// How far it is behind, in positions of the log. Some may be empty, and some not for this projection: 0 is exact, more
    /// is an upper bound of the events.
    pub fn lag(&self) -> u64 {
        self.head.get().saturating_sub(self.position.get())
    }
}
