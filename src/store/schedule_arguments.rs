//! Checked arguments and sorted answers of the calls on scheduled commands and schedules.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::error::StoreError;
use super::scheduled::{
    DueCommands, DueSchedules, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledOutcome,
    ScheduledQuery, StoredSchedule,
};
use super::timer::{check_text, storable};
use crate::event::text_problem;
use crate::invalid_option::DAY;

pub(super) const SCHEDULING: &str = "scheduling commands";
pub(super) const STARTING: &str = "starting due commands";
pub(super) const ENDING: &str = "ending commands";
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(super) const CANCELLING: &str = "cancelling a scheduled command";
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(super) const RETRYING: &str = "retrying a parked command";
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(super) const READING_COMMAND: &str = "reading a scheduled command";
pub(super) const LISTING_COMMANDS: &str = "listing scheduled commands";
pub(super) const WRITING_SCHEDULE: &str = "writing a schedule";
pub(super) const REMOVING_SCHEDULE: &str = "removing a schedule";
pub(super) const READING_SCHEDULE: &str = "reading a schedule";
pub(super) const LISTING_SCHEDULES: &str = "listing schedules";
pub(super) const READING_DUE_SCHEDULES: &str = "reading due schedules";

/// Maximum size of a target in bytes: a category, a slash and an id fit.
const MAX_TARGET: usize = 1_000;

/// Maximum size of a reason for parking in bytes.
const MAX_REASON: usize = 4_000;

fn invalid<T>(reason: String) -> Result<T, StoreError> {
    Err(StoreError::Invalid { reason })
}

/// Checked commands to store.
#[derive(Debug)]
pub(super) struct CommandBatch {
    /// Commands by id: the databases lock them in this order.
    pub(super) commands: BTreeMap<Uuid, NewScheduledCommand>,
    /// Ids in the order of the input.
    pub(super) input: Vec<Uuid>,
}

impl CommandBatch {
    /// Checks commands; of several with the same id, the first one counts.
    ///
    /// # Errors
    /// `Invalid`.
    pub(super) fn new(doing: &str, commands: Vec<NewScheduledCommand>) -> Result<Self, StoreError> {
        const BODY: usize = ScheduledCommand::MAX_BODY;
        const BODIES: usize = ScheduledCommand::MAX_BODIES;
        check_limit(doing, commands.len(), ScheduledCommand::MAX_LIMIT, "make several calls")?;
        let (mut bodies, mut batch) = (0, Self { commands: BTreeMap::new(), input: Vec::new() });
        for command in commands {
            if let Some(problem) = text_problem("target", &command.target, MAX_TARGET) {
                return invalid(format!("{doing}: {problem}"));
            }
            if let Some(schedule) = &command.schedule {
                check_text(doing, "schedule", schedule)?;
            }
            let size = command.body.len();
            if size > BODY {
                return invalid(format!(
                    "{doing}: the command {} to {} is too large: {size} bytes (limit {BODY}); store large content elsewhere and refer to it",
                    command.id, command.target
                ));
            }
            bodies += size;
            batch.input.push(command.id);
            batch.commands.entry(command.id).or_insert(command);
        }
        if bodies > BODIES {
            return invalid(format!(
                "{doing}: the commands are too large: {bodies} bytes (limit {BODIES}); make several calls"
            ));
        }
        Ok(batch)
    }

    /// Returns the stored commands in the order of the input.
    ///
    /// # Errors
    /// `Corrupt` if a command is missing.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(super) fn sort(&self, stored: Vec<ScheduledCommand>) -> Result<Vec<ScheduledCommand>, StoreError> {
        if stored.len() == self.input.len() && stored.iter().map(|it| it.id).eq(self.input.iter().copied()) {
            return Ok(stored);
        }
        let stored: BTreeMap<_, _> = stored.into_iter().map(|command| (command.id, command)).collect();
        let missing =
            |id| StoreError::Corrupt { reason: format!("{SCHEDULING}: the command {id} is missing") };
        self.input.iter().map(|id| stored.get(id).cloned().ok_or_else(|| missing(id))).collect()
    }
}

/// Checks the number of items of a call.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_limit(doing: &str, count: usize, limit: usize, advice: &str) -> Result<(), StoreError> {
    if count > limit {
        return invalid(format!("{doing}: too many at once: {count} (limit {limit}); {advice}"));
    }
    Ok(())
}

/// Checks the number of commands that a call reads.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_commands(doing: &str, limit: usize) -> Result<(), StoreError> {
    check_limit(doing, limit, ScheduledCommand::MAX_LIMIT, "read several pages")
}

/// Checks a call that lists commands.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_query(query: &ScheduledQuery, limit: usize) -> Result<(), StoreError> {
    if let Some(schedule) = &query.schedule {
        check_text(LISTING_COMMANDS, "schedule", schedule)?;
    }
    check_commands(LISTING_COMMANDS, limit)
}

/// Checks a call that lists schedules.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_schedules(doing: &str, after: Option<&str>, limit: usize) -> Result<(), StoreError> {
    if let Some(after) = after {
        check_text(doing, "schedule", after)?;
    }
    check_limit(doing, limit, StoredSchedule::MAX_LIMIT, "read several pages")
}

/// Checks a schedule to write, and returns it with a time that every database can hold.
///
/// # Errors
/// `Invalid`.
pub(super) fn checked_schedule(schedule: StoredSchedule) -> Result<StoredSchedule, StoreError> {
    const DEFINITION: usize = StoredSchedule::MAX_DEFINITION;
    check_text(WRITING_SCHEDULE, "schedule", &schedule.name)?;
    let size = schedule.definition.len();
    if size > DEFINITION {
        return invalid(format!(
            "{WRITING_SCHEDULE}: the definition of {} is too large: {size} bytes (limit {DEFINITION}); use a smaller command",
            schedule.name
        ));
    }
    if schedule.revision == 0 || i64::try_from(schedule.revision).is_err() {
        return invalid(format!(
            "{WRITING_SCHEDULE}: invalid revision {} of {}; use the stored revision + 1, from 1 on",
            schedule.revision, schedule.name
        ));
    }
    Ok(StoredSchedule { next_at: schedule.next_at.map(storable), ..schedule })
}

/// Checks the ends of commands, and returns the outcome of each command as the store keeps it.
///
/// If a command is there twice, its first end counts.
///
/// # Errors
/// `Invalid`.
pub(super) fn checked_ends(ends: Vec<ScheduledEnd>) -> Result<BTreeMap<Uuid, ScheduledOutcome>, StoreError> {
    check_limit(ENDING, ends.len(), ScheduledCommand::MAX_LIMIT, "make several calls")?;
    let mut checked = BTreeMap::new();
    for ScheduledEnd { id, outcome } in ends {
        checked.entry(id).or_insert_with(|| match outcome {
            ScheduledOutcome::Parked(reason) => ScheduledOutcome::Parked(storable_reason(reason)),
            ScheduledOutcome::Postponed(wait) => ScheduledOutcome::Postponed(wait.min(DAY)),
            ScheduledOutcome::Executed => ScheduledOutcome::Executed,
        });
    }
    Ok(checked)
}

/// Returns a reason without NUL, which PostgreSQL cannot store, and of limited size.
fn storable_reason(reason: String) -> String {
    let mut reason = if reason.contains('\0') { reason.replace('\0', "\u{fffd}") } else { reason };
    reason.truncate(reason.floor_char_boundary(MAX_REASON));
    reason
}

/// Returns how many of the first commands belong to a page, by the sizes of their bodies.
pub(super) fn page_length(sizes: impl Iterator<Item = usize>) -> usize {
    sizes
        .scan(0, |before, size| {
            let fits = *before < ScheduledCommand::PAGE_BODIES;
            *before += size;
            fits.then_some(())
        })
        .count()
}

/// Sorts commands in the order in which they are due and listed.
pub(super) fn sort_by_due(commands: &mut [ScheduledCommand]) {
    commands.sort_unstable_by_key(|command| (command.due_at, command.id));
}

impl DueCommands {
    /// Returns started commands in their order, with the time until the next one.
    pub(super) fn new(
        mut commands: Vec<ScheduledCommand>,
        now: DateTime<Utc>,
        next_at: Option<DateTime<Utc>>,
    ) -> Self {
        sort_by_due(&mut commands);
        Self { commands, next_in: next_at.map(|next| (next - now).to_std().unwrap_or_default()) }
    }
}

impl DueSchedules {
    /// Divides schedules in the order of their ticks into those that are due and the next one.
    ///
    /// `earliest` contains at least `limit` + 1 schedules with a due tick, or all of them and the
    /// next one.
    pub(super) fn divide(earliest: Vec<StoredSchedule>, now: DateTime<Utc>, limit: usize) -> Self {
        let is_due = |schedule: &&StoredSchedule| schedule.next_at.is_some_and(|next| next <= now);
        let due = earliest.iter().take(limit).take_while(is_due).count();
        let next = earliest.get(due).and_then(|schedule| schedule.next_at);
        let next_in = next.map(|next| (next - now).to_std().unwrap_or_default());
        let mut schedules = earliest;
        schedules.truncate(due);
        Self { now, schedules, next_in }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_can_be_stored() {
        assert_eq!(storable_reason("a\0b".into()), "a\u{fffd}b");
        let long = storable_reason("ü".repeat(MAX_REASON));
        assert_eq!(long.len(), MAX_REASON);
        let odd = storable_reason(format!("x{}", "ü".repeat(MAX_REASON)));
        assert_eq!(odd.len(), MAX_REASON - 1);
    }

    #[test]
    fn a_page_has_a_command_at_least() {
        const PAGE: usize = ScheduledCommand::PAGE_BODIES;
        assert_eq!(page_length([PAGE + 1, 1].into_iter()), 1);
        assert_eq!(page_length([PAGE - 1, PAGE, 0].into_iter()), 2);
        assert_eq!(page_length([0; 3].into_iter()), 3);
        assert_eq!(page_length(std::iter::empty()), 0);
    }
}
