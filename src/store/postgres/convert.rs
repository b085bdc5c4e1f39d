//! Converts values to and from those of PostgreSQL.

use std::time::Duration;

/// Converts a number: PostgreSQL has no unsigned ones.
///
/// Stored numbers are far below the signed maximum.
pub(super) fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn from_sql(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Converts a duration to microseconds, which the database adds to its own clock.
pub(super) fn micros(ttl: Duration) -> i64 {
    // The limit of 1,000 years keeps every sum in the range of a timestamp.
    const LONGEST: i64 = 1_000 * 366 * 86_400 * 1_000_000;
    i64::try_from(ttl.as_micros()).unwrap_or(LONGEST).min(LONGEST)
}
