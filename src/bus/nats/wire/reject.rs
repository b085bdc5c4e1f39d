//! The reason why a message is not accepted.

/// The reason why a message is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::bus::nats) enum Reject {
    /// The message is of the log of another store.
    OtherStore(String),
    /// The message does not have the format of storied.
    Malformed(String),
}

pub(super) fn malformed(what: String) -> Reject {
    Reject::Malformed(what)
}
