//! State of a rebuild: the progress of its parts, and the wait for its cut-over.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::event::Position;
use crate::store::Lease;

/// Time within which a lagging part must advance; the live version waits for no other part.
const GETS_ON: Duration = Duration::from_secs(2);

/// Pause after a failed cut-over.
pub(super) const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// First and maximum pause between repeated cut-over attempts.
const SWITCH_BACKOFF: (Duration, Duration) = (RETRY_PAUSE, Duration::from_secs(60));

/// A rebuild, on its way to the cut-over.
pub(super) struct Rebuild {
    /// Progress of the parts.
    pub(super) progress: Vec<RebuildProgress>,
    pub(super) switch: Switch,
    /// Backoff after a failed cut-over.
    pub(super) backoff: Backoff,
}

impl Rebuild {
    pub(super) fn new() -> Self {
        let (first, max) = SWITCH_BACKOFF;
        Self { progress: Vec::new(), switch: Switch::None, backoff: Backoff::new(first, max) }
    }
}

/// The state of a cut-over.
pub(super) enum Switch {
    /// The rebuilt version is not near the live one.
    None,
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
