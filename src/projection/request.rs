//! What nodes are asked to do by those who do not have the projection's code: an operator's tool.
//!
//! A request is kept where the read model is, in the form of a parked event: so it is removed in the transaction that does what
//! it asks for, whatever dies meanwhile, and one that was refused can say why. The owner of the projection looks for requests
//! when it takes over, and whenever somebody has held the lease `order/…`.

use std::fmt;

use chrono::Utc;
use uuid::Uuid;

use crate::event::{EventName, Position, StreamId, Version};
use crate::store::{ParkedEvent, StoreError};

/// What a node is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Request {
    /// To empty the read model and to apply the log from its start, as [`ProjectionHandle::reset`](super::ProjectionHandle::reset) does.
    Reset,
    /// To build the next version of the read model beside the live one, as
    /// [`ProjectionHandle::rebuild`](super::ProjectionHandle::rebuild) does.
    Rebuild,
    /// To give up what is being built, as [`ProjectionHandle::cancel_rebuild`](super::ProjectionHandle::cancel_rebuild) does.
    CancelRebuild,
    /// To apply the parked event at this position after all, as
    /// [`ProjectionHandle::retry_parked`](super::ProjectionHandle::retry_parked) does.
    Retry(Position),
}

/// What became of a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// No node has taken it yet. It stands until one does, or until it is [withdrawn](super::Operator::withdraw).
    Waiting,
    /// A node has done it (of a rebuild: has begun it), or somebody has withdrawn it.
    Taken,
    /// A node could not do it: why. Nothing was changed; but a rebuild may be cancelled and what it had built still be there, and
    /// then the reason says so.
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

    /// Where it is kept among those of its kind.
    pub(super) fn position(self) -> Position {
        match self {
            Self::Reset | Self::CancelRebuild | Self::Rebuild => Position::START,
            Self::Retry(position) => position,
        }
    }

    /// What was kept under this kind.
    pub(super) fn of(kind: &str, kept: &ParkedEvent) -> Option<Self> {
        match kind {
            "reset" => Some(Self::Reset),
            "cancel_rebuild" => Some(Self::CancelRebuild),
            "rebuild" => Some(Self::Rebuild),
            "retry" => Some(Self::Retry(kept.position)),
            _ => None,
        }
    }

    /// As it is kept.
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
    /// Of what is kept.
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
