//! Scheduled commands and schedules of the store in memory.

use uuid::Uuid;

use super::super::schedule_store::ScheduleStore;
use super::super::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledQuery,
    StoredSchedule,
};
use super::super::{BoxFuture, Lease, StoreError};
use super::MemoryStore;

impl ScheduleStore for MemoryStore {
    fn schedule_commands(
        &self,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<Vec<ScheduledCommand>, StoreError>> {
        Box::pin(async move { self.data().schedules.schedule_commands(commands) })
    }

    fn start_due_commands(&self, limit: usize) -> BoxFuture<'_, Result<DueCommands, StoreError>> {
        Box::pin(async move { self.data().schedules.start_due_commands(limit) })
    }

    fn end_commands(
        &self,
        ends: Vec<ScheduledEnd>,
        lease: Option<Lease>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let mut data = self.data();
            let is_stale = lease.is_some_and(|lease| !data.leases.is_current(&lease));
            data.schedules.end_commands(ends, is_stale)
        })
    }

    fn cancel_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        Box::pin(async move { Ok(self.data().schedules.cancel_command(id)) })
    }

    fn retry_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        Box::pin(async move { Ok(self.data().schedules.retry_command(id)) })
    }

    fn scheduled_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        Box::pin(async move { Ok(self.data().schedules.scheduled_command(id)) })
    }

    fn scheduled_commands<'a>(
        &'a self,
        query: &'a ScheduledQuery,
        after: Option<&'a ScheduledCommand>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ScheduledCommand>, StoreError>> {
        Box::pin(async move { self.data().schedules.scheduled_commands(query, after, limit) })
    }

    fn write_schedule(
        &self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move { self.data().schedules.write_schedule(schedule, commands) })
    }

    fn remove_schedule<'a>(
        &'a self,
        name: &'a str,
        revision: u64,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { self.data().schedules.remove_schedule(name, revision) })
    }

    fn schedule<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoredSchedule>, StoreError>> {
        Box::pin(async move { self.data().schedules.schedule(name) })
    }

    fn schedules<'a>(
        &'a self,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredSchedule>, StoreError>> {
        Box::pin(async move { self.data().schedules.schedules(after, limit) })
    }

    fn due_schedules(&self, limit: usize) -> BoxFuture<'_, Result<DueSchedules, StoreError>> {
        Box::pin(async move { self.data().schedules.due_schedules(limit) })
    }
}
