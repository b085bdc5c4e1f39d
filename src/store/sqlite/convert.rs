//! Converts values to and from those of SQLite.

use chrono::Utc;

use crate::event::StreamId;

/// Converts a number: SQLite has no unsigned ones.
///
/// Stored numbers are far below the signed maximum.
pub(super) fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn from_sql(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Returns the current time in microseconds since 1970.
pub(super) fn now() -> i64 {
    Utc::now().timestamp_micros()
}

/// Encodes a list as one parameter for `json_each`: the statement is the same for every length.
pub(super) fn json_list<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    serde_json::Value::from_iter(items).to_string()
}

/// Encodes streams as `[[category, id], …]` for `json_each`.
pub(super) fn json_streams<'a>(streams: impl IntoIterator<Item = &'a StreamId>) -> String {
    serde_json::Value::from_iter(streams.into_iter().map(|stream| vec![stream.category(), stream.id()]))
        .to_string()
}
