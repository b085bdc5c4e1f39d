//! The status of a handler.

/// The status of a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandlerStatus {
    /// Name of the handler.
    pub name: &'static str,
    /// Number of commands in flight, including queued ones.
    pub in_flight: usize,
}
