//! A recurring schedule as callers see it.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::change::{ATTEMPTS, change, store_time};
use super::definition::Definition;
use super::error::ScheduleError;
use super::recurrence::Overlap;
use super::ticks::{backfill, count_missed};
use crate::command_id;
use crate::store::{DueTime, EventStore, StoredSchedule};

/// A recurring schedule, on any node. Cheap to clone.
///
/// [`Runtime::schedule`](crate::Runtime::schedule) creates it. It uses the store, and needs no node
/// that executes the commands. A change is durable when its call returns.
#[derive(Clone)]
pub struct ScheduleHandle {
    store: Arc<dyn EventStore>,
    name: String,
}

/// Status of a recurring schedule. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ScheduleStatus {
    /// Name of the schedule.
    pub name: String,
    /// Timing: the cron line with its time zone, or the interval.
    pub timing: String,
    /// Target of the commands: `category/id`, or the name of a handler.
    pub target: String,
    /// Treatment of a tick while a command of the schedule has no answer.
    pub overlap: Overlap,
    /// How late a tick may create its command.
    #[serde(rename = "catch_up_seconds", serialize_with = "crate::serde_forms::seconds")]
    pub catch_up: Duration,
    /// Whether it is paused.
    pub paused: bool,
    /// Time of the next tick; `None` while it is paused.
    pub next_at: Option<DateTime<Utc>>,
    /// Time of the last tick that has become a command.
    pub last_at: Option<DateTime<Utc>>,
    /// Number of commands that ticks and triggers have created.
    pub created: u64,
    /// Number of ticks that created no command: too late, before a newer due tick, or due when the
    /// schedule was paused or replaced.
    pub missed: u64,
    /// Number of ticks that came while a command of the schedule had no answer.
    pub skipped: u64,
}

impl ScheduleStatus {
    /// Reads the status of a stored schedule.
    ///
    /// # Errors
    /// If its definition does not decode.
    pub fn of(stored: &StoredSchedule) -> Result<Self, ScheduleError> {
        let definition = Definition::decode(stored)?;
        let (timing, target, catch_up) =
            (definition.timing.text(), definition.command.target(), definition.catch_up());
        let Definition { overlap, paused, last_at, created, missed, skipped, .. } = definition;
        let (name, next_at) = (stored.name.clone(), stored.next_at);
        Ok(Self {
            name,
            timing,
            target,
            overlap,
            catch_up,
            paused,
            next_at,
            last_at,
            created,
            missed,
            skipped,
        })
    }
}

impl ScheduleHandle {
    /// Returns the handle of a schedule in a store, for tools that have no runtime.
    pub fn new(store: Arc<dyn EventStore>, name: impl Into<String>) -> Self {
        Self { store, name: name.into() }
    }

    /// Returns the name of the schedule.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads the status; `None` if there is no such schedule.
    ///
    /// # Errors
    /// If the store failed, the name is invalid, or the definition does not decode.
    pub async fn status(&self) -> Result<Option<ScheduleStatus>, ScheduleError> {
        let stored = self.store.schedule(&self.name).await?;
        stored.as_ref().map(ScheduleStatus::of).transpose()
    }

    /// Pauses the schedule. It has no ticks until [`resume`](Self::resume).
    ///
    /// Its commands that are stored already are executed. Ticks that are due and have not run count
    /// as missed. A paused schedule stays as it is.
    ///
    /// # Errors
    /// If the schedule does not exist or the store failed.
    pub async fn pause(&self) -> Result<(), ScheduleError> {
        let now = store_time(&*self.store).await?;
        self.change(|definition| {
            if definition.paused {
                return Ok(false);
            }
            definition.paused = true;
            count_missed(definition, now).map(|()| true)
        })
        .await
    }

    /// Resumes the schedule with its next tick from now on.
    ///
    /// Ticks during the pause do not run, and do not count as missed. A schedule that is not paused
    /// stays as it is.
    ///
    /// # Errors
    /// If the schedule does not exist or the store failed.
    pub async fn resume(&self) -> Result<(), ScheduleError> {
        let now = store_time(&*self.store).await?;
        self.change(|definition| {
            let paused = std::mem::replace(&mut definition.paused, false);
            if paused {
                definition.done_to = now;
            }
            Ok(paused)
        })
        .await
    }

    async fn change(
        &self,
        mut edit: impl FnMut(&mut Definition) -> Result<bool, ScheduleError>,
    ) -> Result<(), ScheduleError> {
        change(&*self.store, &self.name, |definition| Ok(edit(definition)?.then(Vec::new))).await
    }

    /// Executes the command once, now, also while the schedule is paused. Returns the command's id.
    ///
    /// # Errors
    /// If the schedule does not exist or the store failed. If the outcome is unknown, the command
    /// may be stored.
    pub async fn trigger(&self) -> Result<Uuid, ScheduleError> {
        let id = command_id::new();
        change(&*self.store, &self.name, |definition| {
            definition.created += 1;
            let due = DueTime::After(Duration::ZERO);
            Ok(Some(vec![definition.command.to_store(id, due, Some(&self.name))?]))
        })
        .await?;
        Ok(id)
    }

    /// Executes the command for each tick in a time range, at most 1,000.
    ///
    /// A tick has the same command id as when it ran, so an aggregate takes no second effect, and
    /// neither does a handler within
    /// [`command_retention`](crate::CommandBus::command_retention). If the command of the schedule
    /// was replaced since, such a tick is parked: its id belongs to the older command. Ticks after
    /// the store's clock are left out, and a command that is stored already stays as it is. Returns
    /// the number of ticks.
    ///
    /// # Errors
    /// If the schedule does not exist, the range has too many ticks, or the store failed. The call
    /// may be repeated.
    pub async fn backfill(&self, range: RangeInclusive<DateTime<Utc>>) -> Result<usize, ScheduleError> {
        // The first tick may be at the start of the range.
        let tiny = chrono::TimeDelta::microseconds(1);
        let before = range.start().checked_sub_signed(tiny).unwrap_or(*range.start());
        let end = (*range.end()).min(store_time(&*self.store).await?);
        let mut count = 0;
        change(&*self.store, &self.name, |definition| {
            let commands = backfill(definition, &self.name, before, end)?;
            count = commands.len();
            Ok(Some(commands).filter(|commands| !commands.is_empty()))
        })
        .await?;
        Ok(count)
    }

    /// Removes the schedule with its waiting commands. Returns whether it existed.
    ///
    /// # Errors
    /// If the store failed. The call may be repeated.
    pub async fn remove(&self) -> Result<bool, ScheduleError> {
        for _ in 0..ATTEMPTS {
            let Some(stored) = self.store.schedule(&self.name).await? else { return Ok(false) };
            if self.store.remove_schedule(&self.name, stored.revision).await? {
                return Ok(true);
            }
        }
        Err(ScheduleError::RetriesExhausted { name: self.name.clone() })
    }
}

impl fmt::Debug for ScheduleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScheduleHandle").field("name", &self.name).finish_non_exhaustive()
    }
}
