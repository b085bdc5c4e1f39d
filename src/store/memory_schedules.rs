//! Scheduled commands and schedules in memory.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::error::StoreError;
use super::memory_clock::MemoryClock;
use super::schedule_arguments::{
    CommandBatch, LISTING_SCHEDULES, READING_DUE_SCHEDULES, READING_SCHEDULE, REMOVING_SCHEDULE, SCHEDULING,
    STARTING, WRITING_SCHEDULE, check_commands, check_query, check_schedules, checked_ends, checked_schedule,
    page_length, sort_by_due,
};
use super::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledOutcome,
    ScheduledQuery, ScheduledState, StoredSchedule,
};
use super::timer::{DueTime, check_text, storable};

/// The scheduled commands and schedules of a store in memory, with the checks of the databases.
#[derive(Debug, Default)]
pub(super) struct MemorySchedules {
    clock: MemoryClock,
    commands: BTreeMap<Uuid, ScheduledCommand>,
    /// Waiting commands by due time and id.
    waiting: BTreeSet<(DateTime<Utc>, Uuid)>,
    schedules: BTreeMap<String, StoredSchedule>,
}

impl MemorySchedules {
    pub(super) fn new(clock: MemoryClock) -> Self {
        Self { clock, ..Self::default() }
    }

    pub(super) fn schedule_commands(
        &mut self,
        commands: Vec<NewScheduledCommand>,
    ) -> Result<Vec<ScheduledCommand>, StoreError> {
        let CommandBatch { commands, input } = CommandBatch::new(SCHEDULING, commands)?;
        self.insert(commands);
        Ok(input.iter().filter_map(|id| self.commands.get(id)).cloned().collect())
    }

    fn insert(&mut self, commands: BTreeMap<Uuid, NewScheduledCommand>) {
        let now = self.clock.now();
        for (id, NewScheduledCommand { target, body, due, schedule, .. }) in commands {
            if let Entry::Vacant(entry) = self.commands.entry(id) {
                let (due_at, state) = (due.time(now), ScheduledState::Waiting);
                entry.insert(ScheduledCommand { id, target, body, due_at, schedule, state, reason: None });
                self.waiting.insert((due_at, id));
            }
        }
    }

    pub(super) fn start_due_commands(&mut self, limit: usize) -> Result<DueCommands, StoreError> {
        check_commands(STARTING, limit)?;
        let now = self.clock.now();
        let due: Vec<_> = self.waiting.range(..=(now, Uuid::max())).take(limit).copied().collect();
        let size = |(_, id): &(_, Uuid)| self.commands.get(id).map_or(0, |command| command.body.len());
        let started = page_length(due.iter().map(size));
        let mut commands = Vec::with_capacity(started);
        for key in due.into_iter().take(started) {
            self.waiting.remove(&key);
            if let Some(command) = self.commands.get_mut(&key.1) {
                command.state = ScheduledState::Started;
                commands.push(command.clone());
            }
        }
        Ok(DueCommands::new(commands, now, self.waiting.first().map(|(due_at, _)| *due_at)))
    }

    /// `is_stale`: whether another holder has the lease.
    pub(super) fn end_commands(&mut self, ends: Vec<ScheduledEnd>, is_stale: bool) -> Result<(), StoreError> {
        for (id, outcome) in checked_ends(ends)? {
            let Some(command) = self.commands.get_mut(&id) else { continue };
            match (command.state, outcome) {
                (ScheduledState::Started | ScheduledState::Parked, ScheduledOutcome::Executed) => {
                    self.commands.remove(&id);
                }
                _ if is_stale => {}
                (ScheduledState::Started, ScheduledOutcome::Parked(reason)) => {
                    command.state = ScheduledState::Parked;
                    command.reason = Some(reason);
                }
                (ScheduledState::Started, ScheduledOutcome::Postponed(wait)) => {
                    command.state = ScheduledState::Waiting;
                    command.due_at = DueTime::After(wait).time(self.clock.now());
                    self.waiting.insert((command.due_at, id));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn cancel_command(&mut self, id: Uuid) -> Option<ScheduledCommand> {
        let command = self.commands.get(&id)?.clone();
        if command.state != ScheduledState::Started {
            self.waiting.remove(&(command.due_at, id));
            self.commands.remove(&id);
        }
        Some(command)
    }

    pub(super) fn retry_command(&mut self, id: Uuid) -> Option<ScheduledCommand> {
        let command = self.commands.get_mut(&id)?;
        let before = command.clone();
        if command.state == ScheduledState::Parked {
            command.due_at = storable(self.clock.now());
            command.state = ScheduledState::Waiting;
            command.reason = None;
            self.waiting.insert((command.due_at, id));
        }
        Some(before)
    }

    pub(super) fn scheduled_command(&self, id: Uuid) -> Option<ScheduledCommand> {
        self.commands.get(&id).cloned()
    }

    pub(super) fn scheduled_commands(
        &self,
        query: &ScheduledQuery,
        after: Option<&ScheduledCommand>,
        limit: usize,
    ) -> Result<Vec<ScheduledCommand>, StoreError> {
        check_query(query, limit)?;
        let selected = |command: &&ScheduledCommand| {
            query.state.is_none_or(|state| command.state == state)
                && query.schedule.as_ref().is_none_or(|name| command.schedule.as_ref() == Some(name))
                && after.is_none_or(|after| (command.due_at, command.id) > (after.due_at, after.id))
        };
        let mut commands: Vec<_> = self.commands.values().filter(selected).cloned().collect();
        sort_by_due(&mut commands);
        commands.truncate(limit);
        commands.truncate(page_length(commands.iter().map(|command| command.body.len())));
        Ok(commands)
    }

    pub(super) fn write_schedule(
        &mut self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> Result<bool, StoreError> {
        let schedule = checked_schedule(schedule)?;
        let CommandBatch { commands, .. } = CommandBatch::new(WRITING_SCHEDULE, commands)?;
        let stored = self.schedules.get(&schedule.name).map_or(0, |stored| stored.revision);
        if stored != schedule.revision - 1 {
            return Ok(false);
        }
        self.schedules.insert(schedule.name.clone(), schedule);
        self.insert(commands);
        Ok(true)
    }

    pub(super) fn remove_schedule(&mut self, name: &str, revision: u64) -> Result<bool, StoreError> {
        check_text(REMOVING_SCHEDULE, "schedule", name)?;
        if self.schedules.get(name).is_none_or(|stored| stored.revision != revision) {
            return Ok(false);
        }
        self.schedules.remove(name);
        let waiting = |command: &ScheduledCommand| {
            command.schedule.as_deref() == Some(name) && command.state == ScheduledState::Waiting
        };
        for (id, command) in self.commands.extract_if(.., |_, command| waiting(command)) {
            self.waiting.remove(&(command.due_at, id));
        }
        Ok(true)
    }

    pub(super) fn schedule(&self, name: &str) -> Result<Option<StoredSchedule>, StoreError> {
        check_text(READING_SCHEDULE, "schedule", name)?;
        Ok(self.schedules.get(name).cloned())
    }

    pub(super) fn schedules(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<StoredSchedule>, StoreError> {
        check_schedules(LISTING_SCHEDULES, after, limit)?;
        let later = |schedule: &&StoredSchedule| after.is_none_or(|after| *schedule.name > *after);
        Ok(self.schedules.values().filter(later).take(limit).cloned().collect())
    }

    pub(super) fn due_schedules(&self, limit: usize) -> Result<DueSchedules, StoreError> {
        check_schedules(READING_DUE_SCHEDULES, None, limit)?;
        let mut schedules: Vec<_> =
            self.schedules.values().filter(|schedule| schedule.next_at.is_some()).cloned().collect();
        schedules.sort_unstable_by(|a, b| (a.next_at, &a.name).cmp(&(b.next_at, &b.name)));
        Ok(DueSchedules::divide(schedules, self.clock.now(), limit))
    }
}
