//! The times at which a schedule ticks.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Datelike, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;
use croner::Cron;
use serde::{Deserialize, Serialize};

use super::error::InvalidRecurrence;
use crate::invalid_option::{DAY, within};

/// Maximum interval, and maximum time of catching up.
const LONGEST: Duration = Duration::from_secs(366 * DAY.as_secs());

/// Number of hours that a search may skip: the longest gap of a time zone is a day.
const GAP_HOURS: i64 = 30;

/// First time that is searched, in seconds since 1970: 0001-01-02. And the last year.
const EARLIEST: i64 = -62_135_510_400;
const LATEST_YEAR: i32 = 9_998;

/// The times at which a recurring schedule ticks, and what happens to ticks that come late.
///
/// # Time zones
/// A cron line is read in a time zone of the IANA database that this program contains. If clocks go
/// forward over a fixed time, such as `30 2 * * *`, it ticks once, at the end of the gap. If the
/// gap ends at midnight, a line for one day of the week may have no tick. If clocks go back over a
/// fixed time, it ticks once, the first time. A line with several minutes or hours (`*`, lists,
/// steps) ticks at every time that matches, and at none that does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a schedule ticks after Execute::repeat"]
pub struct Recurrence {
    pub(super) timing: Timing,
    pub(super) overlap: Overlap,
    pub(super) catch_up: Duration,
}

/// The treatment of a tick while a command of the schedule has no answer.
///
/// Commands of triggers and backfills count as well; parked ones do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Overlap {
    /// The tick is skipped, and counted. After an outage, only the newest tick within `catch_up`
    /// runs.
    Skip,
    /// The commands run side by side. After an outage, every tick within `catch_up` runs.
    Allow,
}

/// The timing of a schedule as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Timing {
    Cron { line: String, zone: String },
    EveryMicros(u64),
}

/// A timing that is ready to compute ticks.
pub(super) enum Ticker {
    Cron(Box<Cron>, Tz),
    EveryMicros(i64),
}

impl Recurrence {
    /// Returns a recurrence that ticks when a cron line matches in a time zone.
    ///
    /// The line has 5 fields (minute, hour, day of the month, month, day of the week), 6 with the
    /// second as the first one, or 7 with the year as the last one. `*`, lists, ranges, steps,
    /// names of months and days, `L`, `W`, `#` and nicknames such as `@daily` are valid. If both
    /// days are restricted, either may match.
    ///
    /// # Errors
    /// If the line is invalid or matches no time, or the time zone is unknown.
    pub fn cron(line: impl Into<String>, zone: impl Into<String>) -> Result<Self, InvalidRecurrence> {
        Self::of(Timing::Cron { line: line.into(), zone: zone.into() })
    }

    /// Returns a recurrence that ticks at each multiple of an interval since 1970, in UTC.
    ///
    /// Range: 1 s to 366 days.
    ///
    /// # Errors
    /// If the interval is out of its range.
    pub fn every(interval: Duration) -> Result<Self, InvalidRecurrence> {
        within("Recurrence::every", interval, Duration::from_secs(1)..=LONGEST)?;
        // The range fits.
        Self::of(Timing::EveryMicros(u64::try_from(interval.as_micros()).unwrap_or(u64::MAX)))
    }

    fn of(timing: Timing) -> Result<Self, InvalidRecurrence> {
        let ticker = timing.ticker()?;
        if let (Timing::Cron { line, .. }, None) = (&timing, ticker.search(Utc::now())) {
            return Err(InvalidRecurrence::Never { line: line.clone() });
        }
        Ok(Self { timing, overlap: Overlap::Skip, catch_up: Duration::from_secs(60 * 60) })
    }

    /// Sets the treatment of a tick while a command of the schedule has no answer.
    ///
    /// Default: [`Overlap::Skip`].
    pub fn overlap(mut self, overlap: Overlap) -> Self {
        self.overlap = overlap;
        self
    }

    /// Sets how late a tick may create its command, after an outage of the store or of all nodes.
    ///
    /// A tick that is later counts as missed. A command that exists is executed, however late.
    /// Default: 1 h. Range: 10 s to 366 days.
    pub fn catch_up(mut self, time: Duration) -> Self {
        self.catch_up = time;
        self
    }

    pub(super) fn validate(&self) -> Result<(), InvalidRecurrence> {
        Ok(within("Recurrence::catch_up", self.catch_up, Duration::from_secs(10)..=LONGEST)?)
    }
}

impl Timing {
    pub(super) fn ticker(&self) -> Result<Ticker, InvalidRecurrence> {
        match self {
            Self::EveryMicros(micros) => {
                Ok(Ticker::EveryMicros(i64::try_from(*micros).unwrap_or(i64::MAX).max(1)))
            }
            Self::Cron { line, zone } => {
                let invalid = |error: croner::errors::CronError| InvalidRecurrence::Cron {
                    line: line.clone(),
                    reason: error.to_string(),
                };
                let cron = Cron::from_str(line).map_err(invalid)?;
                let unknown = |_| InvalidRecurrence::TimeZone { name: zone.clone() };
                Ok(Ticker::Cron(Box::new(cron), Tz::from_str(zone).map_err(unknown)?))
            }
        }
    }

    /// Returns the timing as text, for operators.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Cron { line, zone } => format!("{line} {zone}"),
            Self::EveryMicros(micros) => format!("every {:?}", Duration::from_micros(*micros)),
        }
    }
}

impl Ticker {
    /// Returns the first tick after a time, in whole microseconds.
    pub(super) fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        // The search fails at a gap that removes whole days, as when a zone crosses the date line.
        (0..=GAP_HOURS).find_map(|hours| self.search(time.checked_add_signed(TimeDelta::hours(hours))?))
    }

    fn search(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::EveryMicros(every) => {
                let next = time.timestamp_micros().div_euclid(*every).checked_add(1)?.checked_mul(*every)?;
                DateTime::from_timestamp_micros(next)
            }
            Self::Cron(cron, zone) => {
                // Local times outside of this range may not exist.
                let earliest = DateTime::from_timestamp(EARLIEST, 0)?;
                if time.year() > LATEST_YEAR {
                    return None;
                }
                let from = zone.from_utc_datetime(&time.max(earliest).naive_utc());
                let next = cron.find_next_occurrence(&from, false).ok()?;
                Some(next.with_timezone(&Utc))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(line: &str, zone: &str, from: &str, count: usize) -> Vec<String> {
        let schedule = Recurrence::cron(line, zone).unwrap();
        let ticker = schedule.timing.ticker().unwrap();
        let from = from.parse::<DateTime<Utc>>().unwrap();
        let next = |at: &DateTime<Utc>| ticker.next_after(*at);
        let ticks = std::iter::successors(Some(from), next).skip(1).take(count);
        ticks.map(|at| at.format("%d %H:%M").to_string()).collect()
    }

    #[test]
    fn a_fixed_time_ticks_once_on_both_days_of_a_change() {
        let spring = ticks("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00:00Z", 3);
        assert_eq!(spring, ["28 01:30", "29 01:00", "30 00:30"]);
        let autumn = ticks("30 2 * * *", "Europe/Berlin", "2026-10-24T00:00:00Z", 3);
        assert_eq!(autumn, ["24 00:30", "25 00:30", "26 01:30"]);
        // The clocks of Lord Howe change by half an hour.
        let half = ticks("30 1 * * *", "Australia/Lord_Howe", "2026-04-04T00:00:00Z", 2);
        assert_eq!(half, ["04 14:30", "05 15:00"]);
    }

    #[test]
    fn several_times_tick_whenever_they_match() {
        let autumn = ticks("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:00:00Z", 4);
        assert_eq!(autumn, ["25 00:30", "25 01:00", "25 01:30", "25 02:00"]);
        let spring = ticks("0 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2);
        assert_eq!(spring, ["29 01:00", "30 00:00"]);
    }

    #[test]
    fn a_day_that_does_not_exist_is_passed() {
        // Samoa had no 30 December 2011.
        let samoa = ticks("0 12 * * *", "Pacific/Apia", "2011-12-28T00:00:00Z", 3);
        assert_eq!(samoa, ["28 22:00", "29 22:00", "30 22:00"]);
    }

    #[test]
    fn intervals_are_multiples_since_1970() {
        let every = Timing::EveryMicros(90_000_000).ticker().unwrap();
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        assert_eq!(every.next_after(at("2026-01-01T00:00:00Z")), Some(at("2026-01-01T00:01:30Z")));
        assert_eq!(every.next_after(at("1969-12-31T23:59:59Z")), Some(at("1970-01-01T00:00:00Z")));
        assert_eq!(every.next_after(DateTime::<Utc>::MAX_UTC), None);
    }

    #[test]
    fn no_time_makes_the_search_panic() {
        let line = Recurrence::cron("0 0 * * *", "America/New_York").unwrap().timing.ticker().unwrap();
        assert_eq!(line.next_after(DateTime::<Utc>::MAX_UTC), None);
        assert!(line.next_after(DateTime::<Utc>::MIN_UTC).is_some());
    }

    #[test]
    fn an_invalid_recurrence_is_refused() {
        let refused = |line, zone| Recurrence::cron(line, zone).unwrap_err().to_string();
        assert!(refused("61 * * * *", "UTC").starts_with("invalid cron line \"61 * * * *\": "));
        assert!(refused("* * *", "UTC").starts_with("invalid cron line"));
        assert!(refused("0 0 30 2 *", "UTC").ends_with(": no time matches; check day and month"));
        assert!(refused("@daily", "Europe/Bern").starts_with("unknown time zone \"Europe/Bern\"; "));
        for wrong in [Duration::ZERO, Duration::from_millis(999), Duration::MAX] {
            assert!(Recurrence::every(wrong).is_err());
        }
        let hourly = Recurrence::cron("@hourly", "UTC").unwrap();
        for wrong in [Duration::ZERO, Duration::MAX] {
            assert!(hourly.clone().catch_up(wrong).validate().is_err());
        }
    }
}
