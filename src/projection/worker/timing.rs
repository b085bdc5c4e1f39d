//! Records when pending events are due and up to which position a trigger permits them.

use tokio::time::Instant;

use crate::event::Position;
use crate::projection::Schedule;
use crate::time::after;

/// State of a schedule.
#[derive(Debug, Default)]
pub(super) struct Timing {
    /// Time of the last apply.
    last: Option<Instant>,
    /// Number of triggers in the last lease view; `None` before the first one.
    pub(super) triggers: Option<u64>,
    /// Target of manual triggers; `None` if it must be read (again).
    pub(super) goal: Option<Position>,
    /// End of the log when this task, at work, noticed the trigger.
    pub(super) head_at_trigger: Position,
    /// Number of triggers at the last reset of this node's own read model: these no longer count.
    pub(super) over: u64,
}

impl Timing {
    /// Returns start and end of the wait of the pending events after the arrival of live ones.
    ///
    /// `hold` is the wait before.
    pub(super) fn hold(
        &self,
        hold: Option<(Instant, Instant)>,
        schedule: Schedule,
    ) -> Option<(Instant, Instant)> {
        let now = Instant::now();
        let first = hold.map_or(now, |(first, _)| first);
        match schedule {
            Schedule::Immediate | Schedule::Manual => None,
            // Later events do not extend the wait of the first one.
            Schedule::Debounced { quiet, cap } => {
                Some((first, after(quiet).min(first + cap.min(crate::time::FAR))))
            }
            Schedule::Every(time) => {
                Some((first, self.last.map_or(now, |last| last + time.min(crate::time::FAR))))
            }
        }
    }

    /// Returns the target of manual triggers, beyond which nothing is applied.
    pub(super) fn goal(&self) -> Option<Position> {
        self.goal
    }

    /// Forces a new read of the target.
    pub(super) fn forget(&mut self) {
        self.goal = None;
        self.head_at_trigger = Position::START;
    }

    pub(super) fn applied(&mut self) {
        self.last = Some(Instant::now());
    }
}
