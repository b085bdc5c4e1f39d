//! Scheduled commands and recurring schedules: commands that run later, without their caller.
//!
//! [`Execute::after`](crate::command::Execute::after) and [`at`](crate::command::Execute::at) store
//! a command until it is due. [`repeat`](crate::command::Execute::repeat) stores a recurring
//! [`Recurrence`]: each of its ticks is such a command, with an id that depends on the name of the
//! schedule and the time of the tick.
//!
//! Due times are by the clock of the store. One node at a time, the holder of the lease
//! `scheduler`, starts what is due, and executes it on whatever node owns the target. If it ends,
//! another node continues. A started command is sent with the same id until it has an answer, so it
//! takes effect once (I8). A command that is rejected, or that fails permanently, is parked until an
//! operator retries or cancels it.

mod change;
mod command;
mod definition;
mod delayed;
mod error;
mod execution;
mod handle;
mod recurring;
mod scheduler;
mod status;
mod ticks;
mod timing;

pub use self::change::ScheduleChange;
pub use self::delayed::Scheduled;
pub use self::error::{InvalidRecurrence, ScheduleError};
pub use self::handle::{Cancellation, ScheduledHandle, ScheduledStatus};
pub use self::recurring::{ScheduleHandle, ScheduleStatus};
pub(crate) use self::scheduler::{Scheduler, SchedulerServices};
pub use self::status::{SchedulerState, SchedulerStatus};
pub use self::timing::{Overlap, Recurrence};
