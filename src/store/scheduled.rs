//! Scheduled commands, and the recurring schedules that create them.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::timer::DueTime;

/// A command to store until it is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewScheduledCommand {
    /// Id of the command.
    pub id: Uuid,
    /// Target in clear, for operators: an aggregate as `category/id`, or the name of a handler.
    ///
    /// 1 to 1,000 bytes of text without control characters.
    pub target: String,
    /// Encoded command, opaque to the store; at most 1 MiB ([`ScheduledCommand::MAX_BODY`]).
    pub body: Vec<u8>,
    /// Time at which the command is due.
    pub due: DueTime,
    /// Name of the recurring schedule of which the command is a tick.
    ///
    /// Any text that the id of a stream may be.
    pub schedule: Option<String>,
}

/// A stored command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledCommand {
    /// Id of the command.
    pub id: Uuid,
    /// Target in clear, for operators.
    pub target: String,
    /// Encoded command.
    pub body: Vec<u8>,
    /// Time at which the command is due, by the store's clock.
    pub due_at: DateTime<Utc>,
    /// Name of the recurring schedule of which the command is a tick.
    pub schedule: Option<String>,
    /// State of the command.
    pub state: ScheduledState,
    /// Reason for parking; `None` in every other state.
    pub reason: Option<String>,
}

/// The state of a stored command.
///
/// Serializes as its name in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduledState {
    /// Not due yet, or due and not started.
    Waiting,
    /// Returned to a caller that executes it.
    Started,
    /// Rejected or failed, with a reason; only an operator changes it.
    Parked,
}

/// The started commands of a call, and the time until the next one is due.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DueCommands {
    /// Started commands, in the order of due time and id.
    pub commands: Vec<ScheduledCommand>,
    /// Time until the earliest waiting command that is not in `commands` is due; `None` if there is
    /// none.
    ///
    /// Zero if it is due already. At most one second if concurrent calls are about to start the
    /// commands that are due.
    pub next_in: Option<Duration>,
}

/// The end of a started command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledEnd {
    /// Id of the command.
    pub id: Uuid,
    /// What becomes of it.
    pub outcome: ScheduledOutcome,
}

/// What becomes of a started command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScheduledOutcome {
    /// The command took effect: it is deleted, also if an earlier lease holder has parked it.
    Executed,
    /// The command is parked for this reason.
    ///
    /// The store cuts it at 4,000 bytes and replaces NUL characters.
    Parked(String),
    /// The command waits again, for this long, at most 1 day.
    Postponed(Duration),
}

/// A selection of stored commands; the default selects all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScheduledQuery {
    /// State of the commands; `None` selects every state.
    pub state: Option<ScheduledState>,
    /// Name of the recurring schedule; `None` selects all commands, also those without a schedule.
    pub schedule: Option<String>,
}

/// A stored recurring schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSchedule {
    /// Name of the schedule: any text that the id of a stream may be.
    pub name: String,
    /// Encoded definition, opaque to the store; at most 64 KiB ([`Self::MAX_DEFINITION`]).
    pub definition: Vec<u8>,
    /// Number of writes of this schedule: 1, 2, 3 …
    pub revision: u64,
    /// Time of the next tick; `None` if the schedule is paused or has ended.
    ///
    /// Stored as [`DueTime::At`].
    pub next_at: Option<DateTime<Utc>>,
}

/// The schedules with a due tick, and the time until the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueSchedules {
    /// Time of the read, by the store's clock.
    pub now: DateTime<Utc>,
    /// Schedules with a due tick, in the order of `next_at` and name.
    pub schedules: Vec<StoredSchedule>,
    /// Time until the earliest tick of a schedule that is not in `schedules`; `None` if there is
    /// none.
    ///
    /// Zero if it is due already.
    pub next_in: Option<Duration>,
}

impl ScheduledCommand {
    /// Maximum number of commands that a call reads, starts, writes or ends.
    pub const MAX_LIMIT: usize = 10_000;
    /// Maximum size of a command's body in bytes: 1 MiB.
    pub const MAX_BODY: usize = 1 << 20;
    /// Maximum size in bytes of all bodies that a call writes: 64 MiB.
    pub const MAX_BODIES: usize = 64 << 20;
    /// Size in bytes of the bodies after which a page ends: 16 MiB.
    pub const PAGE_BODIES: usize = 16 << 20;
}

impl StoredSchedule {
    /// Maximum number of schedules that a call reads.
    pub const MAX_LIMIT: usize = 1_000;
    /// Maximum size of a definition in bytes: 64 KiB.
    pub const MAX_DEFINITION: usize = 64 << 10;
}

impl ScheduledState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Waiting, Self::Started, Self::Parked];

    /// Returns the name of the state in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Started => "started",
            Self::Parked => "parked",
        }
    }

    /// Returns the state with this name.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl fmt::Display for ScheduledState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
