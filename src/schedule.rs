//! Scheduled commands and recurring schedules: commands that run later, without their caller.
//!
//! [`Execute::after`](crate::command::Execute::after) and [`at`](crate::command::Execute::at) store
//! a command until it is due. [`repeat`](crate::command::Execute::repeat) stores a recurring
//! schedule with its [`Recurrence`]. Each tick creates such a command. Its id depends on the name
//! of the schedule and the time of the tick.
//!
//! Due times are by the clock of the store. The holder of the lease `scheduler` starts due
//! commands, and sends each to the node that owns its target. If this node ends, another node
//! continues. A started command is sent with the same id until its outcome is known, so it takes
//! effect once (I8).
//!
//! A command that its target rejects is parked until an operator retries or cancels it. So is a
//! command that fails permanently, for example because its aggregate panics. A command whose target
//! is unavailable or slow is postponed: it waits again. So is a command to a handler that fails,
//! panics or reaches its time limit.
//!
//! The [`Schedule`](crate::projection::Schedule) of a projection is something else: the times at
//! which it applies events.

mod change;
mod command;
mod command_handle;
mod definition;
mod error;
mod execute_later;
mod executor;
mod recurrence;
mod schedule_handle;
mod scheduler;
mod status;
mod ticks;

pub use self::change::ScheduleChange;
pub use self::command_handle::{Cancellation, ScheduledCommandHandle, ScheduledCommandStatus};
pub use self::error::{InvalidRecurrence, ScheduleError};
pub use self::recurrence::{Overlap, Recurrence};
pub use self::schedule_handle::{ScheduleHandle, ScheduleStatus};
pub(crate) use self::scheduler::{Scheduler, SchedulerServices};
pub use self::status::{SchedulerState, SchedulerStatus};
