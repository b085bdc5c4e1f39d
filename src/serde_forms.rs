//! Serializes durations and results in forms for readers of JSON.

use std::fmt::Display;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// Writes a duration as seconds. The field's name ends in `_seconds`.
pub(crate) fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// As [`seconds`], for a duration that may be absent.
pub(crate) fn optional_seconds<S: Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
}

/// Writes the value, or `{"error": "text"}`.
pub(crate) fn value_or_error<T, E, S>(result: &Result<T, E>, serializer: S) -> Result<S::Ok, S::Error>
where
    T: Serialize,
    E: Display,
    S: Serializer,
{
    match result {
        Ok(value) => value.serialize(serializer),
        Err(error) => serializer.collect_map([("error", error.to_string())]),
    }
}
