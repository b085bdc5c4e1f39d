use std::fmt;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::event::Position;

/// A request of an operator to the nodes of a projection.
///
/// It is stored in the database of the read model. The transaction that acts on a request also
/// deletes it, so a crash loses nothing. A refused request keeps its reason.
// The order is that of the kinds as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Request {
    /// Cancels a rebuild, as
    /// [`ProjectionHandle::cancel_rebuild`](crate::projection::ProjectionHandle::cancel_rebuild).
    CancelRebuild,
    /// Rebuilds the read model, as
    /// [`ProjectionHandle::rebuild`](crate::projection::ProjectionHandle::rebuild).
    Rebuild,
    /// Resets the read model, as
    /// [`ProjectionHandle::reset`](crate::projection::ProjectionHandle::reset).
    Reset,
    /// Retries the parked event at this position.
    ///
    /// As [`ProjectionHandle::retry_parked`](crate::projection::ProjectionHandle::retry_parked).
    Retry(Position),
}

impl Request {
    /// The first request in the order of the kinds as stored.
    pub(crate) const FIRST: Self = Self::CancelRebuild;

    /// Returns the kind as stored.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::CancelRebuild => "cancel_rebuild",
            Self::Rebuild => "rebuild",
            Self::Reset => "reset",
            Self::Retry(_) => "retry",
        }
    }

    /// Returns the position of the event that the request concerns.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(super) fn position(self) -> Position {
        match self {
            Self::CancelRebuild | Self::Rebuild | Self::Reset => Position::START,
            Self::Retry(position) => position,
        }
    }

    /// Decodes a request as stored.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(super) fn of(kind: &str, position: Position) -> Option<Self> {
        match kind {
            "cancel_rebuild" => Some(Self::CancelRebuild),
            "rebuild" => Some(Self::Rebuild),
            "reset" => Some(Self::Reset),
            "retry" => Some(Self::Retry(position)),
            _ => None,
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("reset"),
            Self::Rebuild => f.write_str("rebuild"),
            Self::CancelRebuild => f.write_str("cancelled rebuild"),
            Self::Retry(position) => write!(f, "retry of {position}"),
        }
    }
}

/// A request as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRequest {
    /// The request.
    pub request: Request,
    /// Id of the request; a repeated request has another one.
    pub id: Uuid,
    /// Time of the request.
    pub requested_at: DateTime<Utc>,
    /// Reason of the refusal; `None` while the request waits.
    pub refused_reason: Option<String>,
}

impl StoredRequest {
    /// Creates a request that waits.
    pub fn new(request: Request) -> Self {
        Self { request, id: Uuid::now_v7(), requested_at: Utc::now(), refused_reason: None }
    }
}
