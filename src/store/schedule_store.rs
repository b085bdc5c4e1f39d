//! The port of scheduled commands and recurring schedules.

use uuid::Uuid;

use super::error::StoreError;
use super::lease::Lease;
use super::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledQuery,
    StoredSchedule,
};
use crate::future::BoxFuture;

/// The part of an event store that keeps scheduled commands and recurring schedules.
///
/// A command is *waiting* until it is due, then *started* by one caller. The end of its execution
/// deletes it, or *parks* it for an operator. A command that cannot be executed yet waits again.
/// A command that was started and never ended stays started:
/// [`scheduled_commands`](Self::scheduled_commands) finds it, and executing it again is safe because
/// its id stays the same.
///
/// All times are by the store's clock, which is the one of its leases. An answer is durable, as that
/// of an append. The methods that only read may return what a failover loses; see
/// [`EventStore::confirm_durable`](super::EventStore::confirm_durable).
pub trait ScheduleStore: Send + Sync + 'static {
    /// Stores commands, and returns the stored ones in the order of the input.
    ///
    /// A command with an id that is stored already stays unchanged, in whatever state it is; it is
    /// returned. If a call contains an id twice, the first one counts. All commands are stored in one
    /// transaction, or none.
    ///
    /// The call is idempotent until a command ends: after an error without a known outcome, repeat
    /// it.
    ///
    /// # Errors
    /// `Invalid` for more than 10,000 commands ([`ScheduledCommand::MAX_LIMIT`]), a body above 1 MiB
    /// ([`ScheduledCommand::MAX_BODY`]), bodies above 64 MiB together
    /// ([`ScheduledCommand::MAX_BODIES`]), or an invalid target or name of a schedule.
    fn schedule_commands(
        &self,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<Vec<ScheduledCommand>, StoreError>>;

    /// Starts waiting commands that are due, at most `limit`, and returns them.
    ///
    /// The oldest due time is first. Each command is started by one call only, also under concurrent
    /// calls of several processes. If the bodies exceed 16 MiB
    /// ([`ScheduledCommand::PAGE_BODIES`]), the call starts fewer commands, at least one. It also
    /// returns when the next command is due. The cost does not depend on the number of commands
    /// that are not due.
    ///
    /// After an error without a known outcome, or if the future is dropped, commands may be started:
    /// find them by their state.
    ///
    /// # Errors
    /// `Invalid` if `limit` is above 10,000 ([`ScheduledCommand::MAX_LIMIT`]).
    fn start_due_commands(&self, limit: usize) -> BoxFuture<'_, Result<DueCommands, StoreError>>;

    /// Deletes, parks or postpones started commands, all in one transaction or none.
    ///
    /// Ignores a command that is not started or does not exist; an executed one is deleted although
    /// it is parked. If a call contains an id twice, the first end counts. The call is idempotent:
    /// after an error without a known outcome, repeat it.
    ///
    /// With a `lease`, the call parks and postpones only if the stored lease has the same owner and
    /// epoch. So the ends of a stale holder only delete commands that took effect.
    ///
    /// # Errors
    /// `Invalid` for more than 10,000 ends ([`ScheduledCommand::MAX_LIMIT`]).
    fn end_commands(
        &self,
        ends: Vec<ScheduledEnd>,
        lease: Option<Lease>,
    ) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Deletes a waiting or parked command, and returns it as it was before.
    ///
    /// A started command stays, and is returned as it is. `None` if there is no such command.
    fn cancel_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>>;

    /// Makes a parked command wait and due now, and returns it as it was before.
    ///
    /// A command in another state stays, and is returned as it is. `None` if there is no such
    /// command.
    fn retry_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>>;

    /// Returns a command, if it is stored.
    fn scheduled_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>>;

    /// Returns the commands of a query after the last command of the previous page, at most `limit`.
    ///
    /// Their order is that of due time and id. Returns fewer if the bodies exceed 16 MiB
    /// ([`ScheduledCommand::PAGE_BODIES`]), and none only at the end. Only the due time and the id of
    /// `after` matter.
    ///
    /// # Errors
    /// `Invalid` if `limit` is above 10,000 ([`ScheduledCommand::MAX_LIMIT`]), or the name of the
    /// schedule is invalid.
    fn scheduled_commands<'a>(
        &'a self,
        query: &'a ScheduledQuery,
        after: Option<&'a ScheduledCommand>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ScheduledCommand>, StoreError>>;

    /// Writes a schedule, if the stored revision is the one before `schedule.revision`.
    ///
    /// Revision 1 is written if no schedule of this name is stored. `commands` are stored in the same
    /// transaction, as by [`schedule_commands`](Self::schedule_commands). Returns `false`, and writes
    /// nothing, if another revision is stored.
    ///
    /// The call is not idempotent: after an error without a known outcome, read the schedule.
    ///
    /// # Errors
    /// `Invalid` for an invalid name, a definition above 64 KiB
    /// ([`StoredSchedule::MAX_DEFINITION`]), revision 0, or commands that
    /// [`schedule_commands`](Self::schedule_commands) refuses.
    fn write_schedule(
        &self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// Removes a schedule of this revision together with its waiting commands.
    ///
    /// Its started and parked commands stay. Returns `false`, and removes nothing, if another
    /// revision or none is stored.
    ///
    /// # Errors
    /// `Invalid` for an invalid name.
    fn remove_schedule<'a>(&'a self, name: &'a str, revision: u64)
    -> BoxFuture<'a, Result<bool, StoreError>>;

    /// Returns a schedule, if it is stored.
    ///
    /// # Errors
    /// `Invalid` for an invalid name.
    fn schedule<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoredSchedule>, StoreError>>;

    /// Returns the schedules after a name, at most `limit`, in the order of the bytes of their names.
    ///
    /// Returns fewer than `limit` only at the end.
    ///
    /// # Errors
    /// `Invalid` if `limit` is above 1,000 ([`StoredSchedule::MAX_LIMIT`]), or for an invalid name.
    fn schedules<'a>(
        &'a self,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredSchedule>, StoreError>>;

    /// Returns the schedules with a tick that is due, at most `limit`, the oldest tick first.
    ///
    /// Also returns the store's clock, and when the next tick is due.
    ///
    /// # Errors
    /// `Invalid` if `limit` is above 1,000 ([`StoredSchedule::MAX_LIMIT`]).
    fn due_schedules(&self, limit: usize) -> BoxFuture<'_, Result<DueSchedules, StoreError>>;
}
