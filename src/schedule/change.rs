//! Changes of a recurring schedule, each one write if no other write came between.

use chrono::{DateTime, Utc};

use super::command::StoredCommand;
use super::definition::Definition;
use super::error::ScheduleError;
use super::recurrence::Recurrence;
use super::ticks::count_missed;
use crate::store::{EventStore, NewScheduledCommand};

/// Number of attempts at a change while others change the schedule.
pub(super) const ATTEMPTS: usize = 10;

/// The effect of [`Execute::repeat`](crate::command::Execute::repeat).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScheduleChange {
    /// The schedule is new.
    Created,
    /// The schedule was stored already, with the same timing, options and command.
    Unchanged,
    /// The schedule has replaced one with other contents.
    Replaced,
}

/// Returns the time by the store's clock.
pub(super) async fn store_time(store: &dyn EventStore) -> Result<DateTime<Utc>, ScheduleError> {
    Ok(store.due_schedules(1).await?.now)
}

/// Stores a schedule, or replaces the one with its name.
pub(super) async fn put(
    store: &dyn EventStore,
    name: &str,
    recurrence: Recurrence,
    command: StoredCommand,
) -> Result<ScheduleChange, ScheduleError> {
    recurrence.validate()?;
    for _ in 0..ATTEMPTS {
        let new = Definition::new(recurrence.clone(), command.clone(), store_time(store).await?);
        new.check_size(name)?;
        let (written, revision, change) = match store.schedule(name).await? {
            None => (new, 0, ScheduleChange::Created),
            Some(stored) => match Definition::decode(&stored) {
                Ok(old) if old.is_same(&new) => return Ok(ScheduleChange::Unchanged),
                Ok(mut old) => {
                    if !old.paused && old.timing != new.timing {
                        count_missed(&mut old, new.done_to)?;
                    }
                    (new.replacing(&old), stored.revision, ScheduleChange::Replaced)
                }
                Err(error) => return Err(error),
            },
        };
        if store.write_schedule(written.to_store(name, revision)?, Vec::new()).await? {
            return Ok(change);
        }
    }
    Err(ScheduleError::RetriesExhausted { name: name.to_owned() })
}

/// Changes a stored schedule, and stores the commands that `change` returns in the same
/// transaction.
///
/// If `change` returns `None`, nothing is written.
pub(super) async fn change(
    store: &dyn EventStore,
    name: &str,
    mut change: impl FnMut(&mut Definition) -> Result<Option<Vec<NewScheduledCommand>>, ScheduleError>,
) -> Result<(), ScheduleError> {
    for _ in 0..ATTEMPTS {
        let stored = store.schedule(name).await?;
        let stored = stored.ok_or_else(|| ScheduleError::UnknownSchedule { name: name.to_owned() })?;
        let mut definition = Definition::decode(&stored)?;
        let Some(commands) = change(&mut definition)? else { return Ok(()) };
        let written = definition.to_store(name, stored.revision)?;
        if store.write_schedule(written, commands).await? {
            return Ok(());
        }
    }
    Err(ScheduleError::RetriesExhausted { name: name.to_owned() })
}
