use crate::store::StoredRequest;

/// Result of a [`Request`](super::Request).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// No node has acted on it yet.
    ///
    /// It waits until one does, or until it is [withdrawn](super::Operator::withdraw).
    Waiting,
    /// A node has completed it (a rebuild: has begun it), or it was withdrawn.
    Taken,
    /// A node refused it, with the reason. Nothing was changed.
    ///
    /// Exception: a rebuild may be cancelled while its data still exists; the reason then says so.
    Refused(String),
}

impl From<StoredRequest> for Answer {
    fn from(stored: StoredRequest) -> Self {
        stored.refused_reason.map_or(Self::Waiting, Self::Refused)
    }
}
