//! The status of the scheduler on a node.

use serde::Serialize;

/// The state of the scheduler on a node.
///
/// Serializes in snake case: `"running"`, `{"retrying": {"error": …}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SchedulerState {
    /// The node executes no commands, so it runs no scheduler.
    Idle,
    /// Another node holds the lease, or this node is about to acquire it.
    Standby,
    /// This node starts what is due.
    Running,
    /// Retrying after a failure.
    Retrying {
        /// The failure.
        error: String,
    },
    /// The store [does not belong](crate::store::Adoption) to its database. Nothing is started.
    Incompatible {
        /// The cause, and what to do.
        reason: String,
    },
    /// Stopped.
    Stopped,
}

/// The status of the scheduler on a node. Serializes as a map of its fields.
///
/// The numbers count since the start of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SchedulerStatus {
    /// State.
    pub state: SchedulerState,
    /// Number of started commands without an answer.
    pub started: usize,
    /// Number of commands that took effect.
    pub executed: u64,
    /// Number of commands that were parked: rejected, or failed permanently.
    pub parked: u64,
    /// Number of times that a command was postponed, because its target was unavailable or busy.
    pub postponed: u64,
    /// Number of ticks of recurring schedules that became commands.
    pub ticks: u64,
    /// Last failure; `None` if there was none. A later success does not clear it.
    pub last_error: Option<String>,
}

impl SchedulerStatus {
    pub(crate) fn new(state: SchedulerState) -> Self {
        Self { state, started: 0, executed: 0, parked: 0, postponed: 0, ticks: 0, last_error: None }
    }
}
