//! Operator requests to nodes, from programs without the projection's code.
//!
//! A request is stored in the database of the read model, in the form of a parked event. The
//! transaction that acts on the request also deletes it, so a crash loses nothing, and a refused
//! request keeps its reason. The owner of the projection checks for requests at takeover, and after
//! each hold of the lease `order/…`.

use std::fmt;

use chrono::Utc;
use uuid::Uuid;

use crate::event::{EventName, Position, StreamId, Version};
use crate::store::{ParkedEvent, StoreError};

/// A request to the nodes of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Request {
    /// Resets the read model, as [`ProjectionHandle::reset`](super::ProjectionHandle::reset).
    Reset,
    /// Rebuilds the read model, as [`ProjectionHandle::rebuild`](super::ProjectionHandle::rebuild).
    Rebuild,
    /// Cancels a rebuild, as
    /// [`ProjectionHandle::cancel_rebuild`](super::ProjectionHandle::cancel_rebuild).
    CancelRebuild,
    /// Retries the parked event at this position.
    ///
    /// As [`ProjectionHandle::retry_parked`](super::ProjectionHandle::retry_parked).
    Retry(Position),
}

/// Result of a [`Request`].
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

impl Request {
    pub(super) const KINDS: [&'static str; 4] = ["reset", "cancel_rebuild", "rebuild", "retry"];

    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Reset => Self::KINDS[0],
            Self::CancelRebuild => Self::KINDS[1],
            Self::Rebuild => Self::KINDS[2],
            Self::Retry(_) => Self::KINDS[3],
        }
    }

    /// Returns the position under which the request is stored among those of its kind.
    pub(super) fn position(self) -> Position {
        match self {
            Self::Reset | Self::CancelRebuild | Self::Rebuild => Position::START,
            Self::Retry(position) => position,
        }
    }

    /// Decodes a stored request of this kind.
    pub(super) fn of(kind: &str, kept: &ParkedEvent) -> Option<Self> {
        match kind {
            "reset" => Some(Self::Reset),
            "cancel_rebuild" => Some(Self::CancelRebuild),
            "rebuild" => Some(Self::Rebuild),
            "retry" => Some(Self::Retry(kept.position)),
            _ => None,
        }
    }

    /// Encodes the request for storage.
    pub(super) fn to_keep(self) -> Result<ParkedEvent, StoreError> {
        let invalid = |error: &dyn fmt::Display| StoreError::Invalid { reason: error.to_string() };
        let id = Uuid::now_v7();
        Ok(ParkedEvent {
            position: self.position(),
            event_id: id,
            stream: StreamId::new("storied.request", id).map_err(|error| invalid(&error))?,
            version: Version::NONE,
            name: EventName::new(format!("storied.request.{}", self.kind()))
                .map_err(|error| invalid(&error))?,
            error: String::new(),
            attempts: 0,
            parked_at: Utc::now(),
        })
    }
}

impl Answer {
    /// Decodes the result of a stored request.
    pub(super) fn of(kept: &ParkedEvent) -> Self {
        if kept.attempts == 0 { Self::Waiting } else { Self::Refused(kept.error.clone()) }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset | Self::Rebuild => f.write_str(self.kind()),
            Self::CancelRebuild => f.write_str("cancelled rebuild"),
            Self::Retry(position) => write!(f, "retry of {position}"),
        }
    }
}
