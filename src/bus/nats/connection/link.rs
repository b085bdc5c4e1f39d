//! The session and overflow counters of a connection.

/// Session and overflow counters of a connection.
/// A reader compares them with the last seen values: after a new session or overflow, messages may
/// be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bus::nats) struct Link {
    pub(in crate::bus::nats) up: bool,
    /// Number of times that the connection was established.
    pub(in crate::bus::nats) sessions: u64,
    /// Number of times that the buffer of a subscription was full.
    pub(in crate::bus::nats) overflows: u64,
    /// Whether the owner has closed the connection.
    pub(in crate::bus::nats) closed: bool,
}
