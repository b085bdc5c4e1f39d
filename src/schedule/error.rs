//! Errors of scheduled commands and recurring schedules.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::command::NotExecutedKind;
use crate::event::EncodeError;
use crate::invalid_option::InvalidOption;
use crate::store::StoreError;

/// An invalid cron line, time zone or option of a recurrence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRecurrence {
    /// The cron line is invalid.
    #[error("invalid cron line {line:?}: {reason}")]
    Cron {
        /// The line.
        line: String,
        /// The cause.
        reason: String,
    },
    /// The cron line matches no time.
    #[error("invalid cron line {line:?}: no time matches; check day and month")]
    Never {
        /// The line.
        line: String,
    },
    /// The time zone is not in the IANA database of this program.
    #[error("unknown time zone {name:?}; use a name of the IANA database, for example Europe/Berlin")]
    TimeZone {
        /// The name.
        name: String,
    },
    /// The interval or an option is out of its range.
    #[error(transparent)]
    Option(#[from] InvalidOption),
}

/// A command or schedule that was not stored, read or changed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// The command cannot be executed: its id is invalid, or no node handles it.
    #[error("storing command {id} failed: {kind}")]
    NotExecutable {
        /// Id of the command.
        id: Uuid,
        /// The cause.
        kind: NotExecutedKind,
    },
    /// A different command, or the same one with another time, is scheduled under this id.
    #[error(
        "storing command {id} failed: another request with this id is due at {due_at}; use a new id, or cancel the stored command"
    )]
    CommandIdReused {
        /// Id of both commands.
        id: Uuid,
        /// Due time of the stored command.
        due_at: DateTime<Utc>,
    },
    /// An option of the schedule is invalid.
    #[error(transparent)]
    Invalid(#[from] InvalidRecurrence),
    /// No schedule has this name.
    #[error("unknown schedule {name:?}; list the names with `storied schedule list`")]
    UnknownSchedule {
        /// The name.
        name: String,
    },
    /// Other writers changed the schedule before each attempt of this change. Retryable.
    #[error("changing schedule {name:?} failed: concurrent changes came first; retry")]
    RetriesExhausted {
        /// Name of the schedule.
        name: String,
    },
    /// The schedule with its command is too large.
    #[error(
        "storing schedule {name:?} failed: {size} bytes with its command (limit {limit}); use a smaller command"
    )]
    TooLarge {
        /// Name of the schedule.
        name: String,
        /// Size of the definition, in bytes.
        size: usize,
        /// Maximum size.
        limit: usize,
    },
    /// A backfill contains too many ticks.
    #[error("backfilling schedule {name:?} failed: more than {limit} ticks; divide the time range")]
    TooManyTicks {
        /// Name of the schedule.
        name: String,
        /// Maximum number of ticks.
        limit: usize,
    },
    /// The stored definition does not decode, for example because a newer version wrote it.
    #[error("decoding schedule {name:?} failed: {reason}")]
    Undecodable {
        /// Name of the schedule.
        name: String,
        /// The cause.
        reason: String,
    },
    /// The command or definition cannot be stored.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
