//! State of a rebuild: the progress of its parts, and the wait for its cut-over.

use std::time::Duration;

use tokio::time::Instant;

use crate::event::Position;
use crate::store::Lease;

/// Time within which a lagging part must advance; the live version waits for no other part.
const GETS_ON: Duration = Duration::from_secs(2);

/// Pause after a failed cut-over.
pub(super) const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// First and maximum pause between repeated cut-over attempts.
pub(super) const SWITCH_BACKOFF: (Duration, Duration) = (RETRY_PAUSE, Duration::from_secs(60));

pub(super) enum Switch {
    /// The live version waits.
    Waits { order: Lease, since: Instant },
    /// The wait was in vain; earliest time of the next one.
    Later(Instant),
}

/// Last known position of a part of the rebuild, and the time when it last advanced.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RebuildProgress {
    position: Option<Position>,
    moved: Option<Instant>,
}

impl RebuildProgress {
    pub(super) fn at(&mut self, position: Position) {
        if self.position.replace(position).is_some_and(|before| before != position) {
            self.moved = Some(Instant::now());
        }
    }

    /// Returns whether the part advanced lately. During a wait, the time counts from its start.
    pub(super) fn is_advancing(&self, since: Option<Instant>) -> bool {
        self.moved.max(since).is_some_and(|moved| moved.elapsed() < GETS_ON)
    }
}
