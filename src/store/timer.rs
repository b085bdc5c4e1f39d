//! Durable timers: wake-ups of the instances of a process, by the store's clock.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::error::StoreError;
use crate::event::{Version, id_problem};
use crate::time::later;

pub(super) const WRITING: &str = "writing timers";
pub(super) const READING_DUE: &str = "reading due timers";
pub(super) const LISTING: &str = "listing timers";

/// The time at which a timer is due.
///
/// Stored in microseconds. A time outside of the limits becomes the nearest time within them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueTime {
    /// This long after the store's clock at the write, at most 1,000 years.
    After(Duration),
    /// This time, from the beginning of the year 1 to the beginning of 9999-12-31.
    At(DateTime<Utc>),
}

/// A timer to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTimer {
    /// Instance of the process: any text that the id of a stream may be.
    pub instance: String,
    /// Name within the instance: as `instance`, or empty for the resumption of the instance itself.
    pub name: String,
    /// Version of the instance's stream that sets the timer.
    pub version: Version,
    /// Time at which the timer is due.
    pub due: DueTime,
}

/// The identity of a timer to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimerRef {
    /// Instance of the process.
    pub instance: String,
    /// Name within the instance; empty for the resumption of the instance itself.
    pub name: String,
    /// Highest version that is removed; a timer with a higher version stays.
    pub version: Version,
}

/// A stored timer.
///
/// Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredTimer {
    /// Process that the timer wakes up.
    pub process: String,
    /// Instance of the process.
    pub instance: String,
    /// Name within the instance; empty for the resumption of the instance itself.
    pub name: String,
    /// Version of the write that set the timer.
    pub version: Version,
    /// Time at which the timer is due, by the store's clock.
    pub due_at: DateTime<Utc>,
}

/// The due timers of a process, and the time until the next timer is due.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DueTimers {
    /// Due timers, in the order of due time, instance and name.
    pub timers: Vec<StoredTimer>,
    /// Time until the earliest timer that is not in `timers` is due; `None` if there is none.
    ///
    /// Zero if it is due already.
    pub next_in: Option<Duration>,
}

/// Longest time until a timer is due: every sum stays in the range of a time.
const LONGEST: Duration = Duration::from_secs(1_000 * 366 * 86_400);

/// Earliest and latest due time in seconds since 1970: 0001-01-01 and 9999-12-31.
const RANGE: [i64; 2] = [-62_135_596_800, 253_402_214_400];

impl DueTime {
    /// Returns the due time, if the store's clock shows `now` at the write.
    pub(super) fn time(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::At(time) => storable(time),
            Self::After(wait) => storable(later(now, wait.min(LONGEST))),
        }
    }
}

/// Returns the nearest time that every database can hold, in whole microseconds.
pub(super) fn storable(time: DateTime<Utc>) -> DateTime<Utc> {
    let [earliest, latest] = RANGE.map(|seconds| seconds * 1_000_000);
    let micros = time.timestamp_micros().clamp(earliest, latest);
    DateTime::from_timestamp_micros(micros).unwrap_or(DateTime::UNIX_EPOCH)
}

/// Returns the due time, process, instance and name after which a page of timers starts.
///
/// Without a due time, it starts at the first timer.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(super) fn cursor(after: Option<&StoredTimer>) -> (Option<DateTime<Utc>>, [&str; 3]) {
    let Some(after) = after else { return (None, [""; 3]) };
    (Some(cursor_time(after.due_at)), [&after.process, &after.instance, &after.name])
}

/// Returns the time of a cursor as one that every database can compare with.
///
/// A time before the first or after the last due time stays there.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub(super) fn cursor_time(time: DateTime<Utc>) -> DateTime<Utc> {
    let [earliest, latest] = RANGE.map(|seconds| DateTime::from_timestamp(seconds, 0).unwrap_or_default());
    let beyond = chrono::TimeDelta::seconds(1);
    time.clamp(earliest - beyond, latest + beyond)
}

impl StoredTimer {
    /// Maximum number of timers that a call reads.
    pub const MAX_LIMIT: usize = 10_000;

    /// Returns the key of the order in which timers are listed.
    pub(super) fn order(&self) -> (DateTime<Utc>, &str, &str, &str) {
        (self.due_at, &self.process, &self.instance, &self.name)
    }
}

impl DueTimers {
    /// Divides timers in the order of their due times into those that are due and the next one.
    ///
    /// `earliest` contains at least `limit` + 1 due timers, or all of them and the next one.
    pub(super) fn divide(earliest: Vec<StoredTimer>, now: DateTime<Utc>, limit: usize) -> Self {
        let due = earliest.iter().take(limit).take_while(|timer| timer.due_at <= now).count();
        let wait = |timer: &StoredTimer| (timer.due_at - now).to_std().unwrap_or_default();
        let next_in = earliest.get(due).map(wait);
        let mut timers = earliest;
        timers.truncate(due);
        Self { timers, next_in }
    }
}

/// Checks the arguments of a call that reads timers.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_read(doing: &str, process: Option<&str>, limit: usize) -> Result<(), StoreError> {
    const MAX: usize = StoredTimer::MAX_LIMIT;
    if let Some(process) = process {
        check_text(doing, "process", process)?;
    }
    if limit > MAX {
        let reason = format!("{doing}: too many at once: {limit} (limit {MAX}); read several pages");
        return Err(StoreError::Invalid { reason });
    }
    Ok(())
}

/// Checks a text that must be one that the id of a stream may be.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_text(doing: &str, what: &str, text: &str) -> Result<(), StoreError> {
    match id_problem(what, text) {
        None => Ok(()),
        Some(problem) => Err(StoreError::Invalid { reason: format!("{doing}: {problem}") }),
    }
}

/// The changes of one timer by a call, in this order.
#[derive(Debug, Default)]
pub(super) struct TimerChange {
    /// Highest version that is removed.
    pub(super) removed: Option<Version>,
    /// Version and due time that are put.
    pub(super) put: Option<(Version, DueTime)>,
}

/// The changes of a call, by instance and name.
pub(super) type TimerChanges = BTreeMap<(String, String), TimerChange>;

/// Checks the arguments of a call that writes timers, and merges them by timer.
///
/// # Errors
/// `Invalid`.
pub(super) fn timer_changes(
    process: &str,
    put: Vec<NewTimer>,
    remove: Vec<TimerRef>,
) -> Result<TimerChanges, StoreError> {
    check_text(WRITING, "process", process)?;
    let mut changes = TimerChanges::new();
    for TimerRef { instance, name, version } in remove {
        let change = changes.entry(checked(instance, name)?).or_default();
        change.removed = change.removed.max(Some(version));
    }
    for NewTimer { instance, name, version, due } in put {
        let key = checked(instance, name)?;
        let repeatable = is_repeatable(&key.1);
        let change = changes.entry(key).or_default();
        if change.put.is_none_or(|(earlier, _)| replaces(version, earlier, repeatable)) {
            change.put = Some((version, due));
        }
    }
    Ok(changes)
}

fn checked(instance: String, name: String) -> Result<(String, String), StoreError> {
    check_text(WRITING, "instance", &instance)?;
    if !name.is_empty() {
        check_text(WRITING, "timer name", &name)?;
    }
    Ok((instance, name))
}

/// Returns whether writing a timer of this name again moves its due time.
pub(super) fn is_repeatable(name: &str) -> bool {
    name.is_empty()
}

/// Returns whether a timer of version `new` replaces the one of version `old`.
pub(super) fn replaces(new: Version, old: Version, repeatable: bool) -> bool {
    new > old || (repeatable && new == old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_due_time_can_be_stored() {
        let now = Utc::now();
        let year = |due: DueTime| due.time(now).format("%Y-%m-%d").to_string();
        assert_eq!(year(DueTime::At(DateTime::<Utc>::MIN_UTC)), "0001-01-01");
        assert_eq!(year(DueTime::At(DateTime::<Utc>::MAX_UTC)), "9999-12-31");
        assert_eq!(DueTime::After(Duration::MAX).time(now), storable(now + LONGEST));
        assert_eq!(
            DueTime::After(Duration::ZERO).time(DateTime::<Utc>::MAX_UTC),
            storable(DateTime::<Utc>::MAX_UTC)
        );
        assert_eq!(DueTime::At(now).time(now).timestamp_micros(), now.timestamp_micros());
    }
}
