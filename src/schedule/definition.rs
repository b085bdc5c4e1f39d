//! The definition and the progress of a recurring schedule, as stored.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::command::StoredCommand;
use super::error::ScheduleError;
use super::recurrence::{Overlap, Recurrence, Timing};
use crate::codec::{from_cbor, to_cbor};
use crate::event::EncodeError;
use crate::store::StoredSchedule;

/// Version number of this format.
const FORMAT: u32 = 1;

/// Namespace of the ids of ticks.
const TICKS: Uuid = Uuid::from_u128(0x7a0f_5c1e_93d8_4b52_8e46_2d9b_61f3_c07a);

/// The definition and the progress of a schedule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Definition {
    format: u32,
    pub(super) timing: Timing,
    pub(super) overlap: Overlap,
    catch_up_micros: u64,
    pub(super) command: StoredCommand,
    pub(super) paused: bool,
    /// Ticks up to this time are done: they have become commands, were skipped, or were missed.
    pub(super) done_to: DateTime<Utc>,
    /// Time of the last tick that has become a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) last_at: Option<DateTime<Utc>>,
    /// Number of commands that ticks and triggers have created.
    pub(super) created: u64,
    /// Number of ticks that created no command: too late, before a newer due tick, or due when the
    /// schedule was paused or replaced.
    pub(super) missed: u64,
    /// Number of ticks that came while a command of the schedule had no answer.
    pub(super) skipped: u64,
}

impl Definition {
    pub(super) fn new(recurrence: Recurrence, command: StoredCommand, now: DateTime<Utc>) -> Self {
        let Recurrence { timing, overlap, catch_up } = recurrence;
        let catch_up_micros = u64::try_from(catch_up.as_micros()).unwrap_or(u64::MAX);
        Self {
            format: FORMAT,
            timing,
            overlap,
            catch_up_micros,
            command,
            paused: false,
            done_to: now,
            last_at: None,
            created: 0,
            missed: 0,
            skipped: 0,
        }
    }

    pub(super) fn catch_up(&self) -> Duration {
        Duration::from_micros(self.catch_up_micros)
    }

    /// Returns whether both have the same timing, options and command.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let timing = |it: &Self| (it.timing.clone(), it.overlap, it.catch_up_micros);
        timing(self) == timing(other) && self.command.is_same_request(&other.command)
    }

    /// Adopts the progress of the definition that this one replaces.
    pub(super) fn replacing(self, old: &Self) -> Self {
        let Self { paused, last_at, created, missed, skipped, done_to, .. } = *old;
        // With the same timing, the ticks that are due run with the new command.
        let done_to = if self.timing == old.timing { done_to } else { done_to.max(self.done_to) };
        Self { paused, last_at, created, missed, skipped, done_to, ..self }
    }

    pub(super) fn decode(stored: &StoredSchedule) -> Result<Self, ScheduleError> {
        let undecodable = |reason| ScheduleError::Undecodable { name: stored.name.clone(), reason };
        let definition: Self = from_cbor(&stored.definition).map_err(undecodable)?;
        match definition.format {
            FORMAT => Ok(definition),
            other => {
                Err(undecodable(format!("unknown format {other} (expected {FORMAT}); update this node")))
            }
        }
    }

    /// Checks that the definition can be stored, also when its counters and times have grown.
    pub(super) fn check_size(&self, name: &str) -> Result<(), ScheduleError> {
        const LIMIT: usize = StoredSchedule::MAX_DEFINITION - 256;
        let size = to_cbor(self).map_err(EncodeError::from)?.len();
        if size > LIMIT {
            return Err(ScheduleError::TooLarge { name: name.to_owned(), size, limit: LIMIT });
        }
        Ok(())
    }

    /// Returns the schedule as the store writes it after `revision`.
    pub(super) fn to_store(&self, name: &str, revision: u64) -> Result<StoredSchedule, ScheduleError> {
        let next_at = match self.paused {
            true => None,
            false => self.timing.ticker()?.next_after(self.done_to),
        };
        let definition = to_cbor(self).map_err(EncodeError::from)?;
        Ok(StoredSchedule {
            name: name.to_owned(),
            definition,
            revision: revision.saturating_add(1),
            next_at,
        })
    }
}

/// Returns the id of the command of a tick.
pub(super) fn tick_id(schedule: &str, at: DateTime<Utc>) -> Uuid {
    let name = [&at.timestamp_micros().to_be_bytes()[..], schedule.as_bytes()].concat();
    Uuid::new_v5(&TICKS, &name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_ticks_differ_and_stay() {
        let at = DateTime::from_timestamp(1_767_225_600, 0).unwrap();
        let ids = [
            tick_id("close", at),
            tick_id("close", at + chrono::TimeDelta::microseconds(1)),
            tick_id("closed", at),
        ];
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), 3);
        // Stored commands have these ids: a change would execute ticks twice.
        assert_eq!(ids[0].to_string(), "facb357a-33b8-5314-8406-7a625603cdb8");
    }
}
