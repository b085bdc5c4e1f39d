//! Stored events as JSON, without their types.

use std::io;

use serde_json::Value;
use storied::RecordedEvent;

use crate::failure::Failure;

/// Returns an event as JSON.
pub(crate) fn event(event: &RecordedEvent) -> Result<Value, Failure> {
    Ok(serde_json::to_value(event).map_err(io::Error::from)?)
}

/// Returns whether payload and metadata decode.
pub(crate) fn is_readable(event: &RecordedEvent) -> bool {
    event.codec.decode_value(&event.payload).is_ok() && event.decode_metadata().is_ok()
}
