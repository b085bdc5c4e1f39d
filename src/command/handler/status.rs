//! The status of a handler.

use serde::Serialize;

/// The status of a handler. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HandlerStatus {
    /// Name of the handler.
    pub name: &'static str,
    /// Number of commands in flight, including queued ones.
    pub in_flight: usize,
}
