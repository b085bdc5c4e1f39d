//! When what has come is applied.

use tokio::time::Instant;

use super::{Role, Run, Source};
use crate::event::Position;
use crate::lease::View;
use crate::projection::{Projection, ProjectionState, ReadModel, Schedule};
use crate::store::StoreError;
use crate::time::after;

/// What a schedule has to remember.
#[derive(Debug, Default)]
pub(super) struct Timing {
    /// What is pending waits since, and until.
    hold: Option<(Instant, Instant)>,
    /// When something was last applied.
    last: Option<Instant>,
    /// How often it was triggered, as far as is known; `None` before the first look.
    triggers: Option<u64>,
    /// It was triggered, and it is still to be found out how far that goes.
    triggered: bool,
    /// How far it goes when it is triggered by hand.
    goal: Position,
}

impl Timing {
    /// Something has come at the tip of the log.
    pub(super) fn arrived(&mut self, schedule: Schedule) {
        let now = Instant::now();
        let first = self.hold.map_or(now, |(first, _)| first);
        self.hold = match schedule {
            Schedule::Immediate | Schedule::Manual => None,
            // Whatever follows, the first one's time does not begin anew.
            Schedule::Debounced { quiet, cap } => {
                Some((first, after(quiet).min(first + cap.min(crate::time::FAR))))
            }
            Schedule::Every(time) => {
                Some((first, self.last.map_or(now, |last| last + time.min(crate::time::FAR))))
            }
        };
    }

    /// What it was triggered for is over.
    pub(super) fn forget(&mut self) {
        self.goal = Position::START;
    }

    /// Nothing is pending any more.
    pub(super) fn let_go(&mut self) {
        self.hold = None;
    }

    pub(super) fn applied(&mut self) {
        self.hold = None;
        self.last = Some(Instant::now());
    }

    /// Until when what is pending waits.
    pub(super) fn until(&self) -> Option<Instant> {
        self.hold.map(|(_, until)| until)
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Somebody on any node has triggered it.
    pub(super) fn heed_triggers(&mut self, view: &View) {
        let triggers = view.leases.get(&self.context.shape.trigger()).map_or(0, |posted| posted.epoch);
        if self.timing.triggers.is_some_and(|known| known < triggers) {
            self.timing.triggered = true;
            self.timing.hold = None;
        }
        self.timing.triggers = Some(triggers);
    }

    /// Whether what is pending is to wait for more.
    pub(super) fn holds(&self) -> bool {
        let Some(pending) = &self.pending else { return false };
        self.source == Source::Feed
            && self.suspect.is_none()
            && pending.events.len() < self.context.options.batch
            && self.timing.until().is_some_and(|until| until > Instant::now())
    }

    /// Whether it is to go on at all.
    pub(super) async fn is_due(&mut self) -> Result<bool, StoreError> {
        if self.context.options.schedule != Schedule::Manual || self.context.role == Role::Rebuild {
            return Ok(true);
        }
        if self.timing.triggered {
            self.timing.goal = self.context.store.frontier().await?;
            self.timing.triggered = false;
        }
        Ok(self.pending.is_some() || self.applied < self.timing.goal)
    }

    /// Waits for a trigger.
    pub(super) async fn rest(&mut self) {
        self.restart();
        self.context.set(ProjectionState::Waiting);
        self.idle(self.tick_at).await;
    }
}
