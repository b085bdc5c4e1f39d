//! The work in progress of an owner: the sources of events, and the events to be applied.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::live::Follower;
use super::page_ahead::PageAhead;
use crate::event::{Position, RecordedEvent};
use crate::projection::ProjectionState;

/// Maximum number of positions in a page of the store, regardless of matches.
///
/// A scan for rare events is split into pieces. Between them, the projection receives messages,
/// does due work and saves its checkpoint.
pub(super) const SCAN: u64 = 50_000;

/// The work in progress of an owner.
pub(super) struct Reading<F = Follower> {
    /// The live source, subscribed before the store is read, so that no event is lost in between.
    pub(super) follower: F,
    pub(super) source: Source,
    /// Position up to which the store is read before the follower, which may have lost earlier
    /// events.
    pub(super) live_after: Position,
    pub(super) pending: Option<Pending>,
    /// Whether the last items of the live source had events for this projection.
    pub(super) matched: bool,
    /// Start and end of the wait of the pending events.
    pub(super) hold: Option<(Instant, Instant)>,
    /// Position of the event in the user's code, if any.
    pub(super) applying: Option<Position>,
    /// The event that failed last, until it is applied or given up.
    pub(super) suspect: Option<Suspect>,
}

/// Source of the next events.
pub(super) enum Source {
    /// The store.
    CatchingUp {
        /// The page after the current one: the database reads ahead while the task applies.
        ahead: Option<PageAhead>,
        /// Maximum number of positions in the next page: above [`SCAN`] only to cross a gap in the
        /// log.
        scan: u64,
    },
    /// The live source.
    Live,
}

/// Events to be applied: all events for this projection between its position and `upto`.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) events: VecDeque<RecordedEvent>,
    pub(super) upto: Position,
}

/// An event that has failed.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) position: Position,
    /// Number of attempts.
    pub(super) attempts: u32,
    /// Error of the last attempt.
    pub(super) error: String,
    /// Whether a retry cannot succeed.
    pub(super) permanent: bool,
    /// Whether only its name is unknown, which is no failure here.
    pub(super) unknown_event: bool,
    /// Time of the next attempt.
    pub(super) retry_at: Instant,
}

impl Source {
    fn store() -> Self {
        Self::CatchingUp { ahead: None, scan: SCAN }
    }
}

impl<F> Reading<F> {
    pub(super) fn new(follower: F, live_after: Position) -> Self {
        Self {
            follower,
            source: Source::store(),
            live_after,
            pending: None,
            matched: true,
            hold: None,
            applying: None,
            suspect: None,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.source, Source::Live)
    }

    /// A page ended at the end of the log.
    pub(super) fn reached_end(&mut self) {
        self.source = Source::Live;
    }

    /// Reads the store next.
    pub(super) fn catch_up(&mut self) {
        if self.is_live() {
            self.source = Source::store();
        }
    }

    /// Reads the store next, up to the position `feed` of the feed.
    pub(super) fn read_to(&mut self, feed: Position) {
        self.catch_up();
        self.live_after = feed;
    }

    /// A transaction has moved the checkpoint to this position.
    pub(super) fn committed(&mut self, to: Position) {
        self.hold = None;
        self.suspect.take_if(|suspect| suspect.position <= to);
    }

    /// Returns the state in the status of the projection.
    pub(super) fn shown(&self) -> ProjectionState {
        match self.source {
            _ if self.suspect.is_some() => ProjectionState::Retrying,
            Source::CatchingUp { .. } => ProjectionState::CatchingUp,
            Source::Live => ProjectionState::Following,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn catches_up_and_follows() {
        let mut reading = Reading::new((), Position::new(9));
        assert_eq!(reading.shown(), ProjectionState::CatchingUp);
        reading.reached_end();
        assert_eq!(reading.shown(), ProjectionState::Following);
        reading.read_to(Position::new(20));
        assert_eq!((reading.live_after, reading.is_live()), (Position::new(20), false));
        // The scan of a gap in the log continues.
        reading.source = Source::CatchingUp { ahead: None, scan: 2 * SCAN };
        reading.catch_up();
        assert!(matches!(reading.source, Source::CatchingUp { scan, .. } if scan == 2 * SCAN));
    }

    #[test]
    fn a_commit_clears_the_suspect_that_it_includes() {
        let mut reading = Reading::new((), Position::START);
        let (position, retry_at) = (Position::new(10), Instant::now());
        let (permanent, unknown_event) = (false, false);
        let error = "test".to_owned();
        reading.suspect = Some(Suspect { position, attempts: 1, error, permanent, unknown_event, retry_at });
        reading.committed(Position::new(9));
        assert_eq!(reading.shown(), ProjectionState::Retrying);
        reading.committed(position);
        assert_eq!(reading.shown(), ProjectionState::CatchingUp);
    }
}
