//! When what has come is applied.

use tokio::time::Instant;

use super::orders::ATTEMPTS;
use super::{Context, Role, Run, Source};
use crate::event::Position;
use crate::lease::View;
use crate::projection::shape::fenced;
use crate::projection::{ControlError, Projection, ProjectionState, ReadModel, Schedule};
use crate::store::{Checkpoint, CheckpointError, StoreError};
use crate::time::after;

/// What a schedule has to remember.
#[derive(Debug, Default)]
pub(super) struct Timing {
    /// What is pending waits since, and until.
    hold: Option<(Instant, Instant)>,
    /// When something was last applied.
    last: Option<Instant>,
    /// What was last told of triggers; `None` before the first look.
    triggers: Option<u64>,
    /// How far it goes when it is triggered by hand; `None` when that is to be looked up (again).
    goal: Option<Position>,
    /// Where the log ended when this, at work on it, heard that it was triggered.
    heard: Position,
    /// How often it had been triggered when this node's own read model was reset: for those it does not go any more.
    over: u64,
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

    /// Not beyond this it goes, if it is triggered by hand.
    pub(super) fn goal(&self) -> Option<Position> {
        self.goal
    }

    /// How far it goes when it is triggered by hand is looked up again.
    pub(super) fn forget(&mut self) {
        self.goal = None;
        self.heard = Position::START;
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

impl Context {
    /// It is to go as far as the log goes now. That is kept in the event store: whoever works on it later knows of it, too, and
    /// what was reached is not gone for twice.
    pub(super) async fn set_goal(&self) -> Result<(), ControlError> {
        let Self { name, store, shape, .. } = self;
        let (row, head) = (shape.goal(), store.frontier().await?);
        let mut found = store.checkpoint(&row).await?;
        for _ in 0..ATTEMPTS {
            let goal = Checkpoint { position: head.max(found.position), ..fenced(found) };
            match store.save_checkpoint(&row, found, goal, None).await {
                Ok(()) => return Ok(()),
                // Somebody else has triggered it just now, which is as good.
                Err(CheckpointError::Stale { found, .. }) if found.position >= head => return Ok(()),
                Err(CheckpointError::Stale { found: now, .. }) => found = now,
                Err(CheckpointError::Store(error)) => return Err(error.into()),
            }
        }
        Err(ControlError::Overloaded { name: name.clone() })
    }

    /// How far, and how often, it was triggered to go.
    pub(super) async fn goal(&self) -> Result<Checkpoint, StoreError> {
        self.store.checkpoint(&self.shape.goal()).await
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Somebody on any node has triggered it.
    pub(super) async fn heed_triggers(&mut self, view: &View) {
        let triggers = view.leases.get(&self.context.shape.trigger()).map_or(0, |posted| posted.epoch);
        if self.timing.triggers.is_some_and(|known| known != triggers) {
            self.timing.forget();
            self.timing.hold = None;
            if self.goes_by_hand() && self.saved.is_some() {
                // What had its receipt when it was triggered may have been behind an append that was still under way. It is a
                // service only: without an answer it goes as far as it has to.
                self.timing.heard = self.context.store.frontier().await.unwrap_or_default();
            }
        }
        self.timing.triggers = Some(triggers);
    }

    /// It was reset: it waits for a trigger that comes behind those that led to `goal`.
    pub(super) async fn give_up_goal(&mut self, goal: Checkpoint) -> Result<(), StoreError> {
        let Context { store, shape, .. } = self.context;
        if !self.read_model.shared() {
            self.timing.over = goal.mark;
            return Ok(());
        }
        if goal.position == Position::START {
            return Ok(());
        }
        let none = Checkpoint { position: Position::START, ..goal };
        match store.save_checkpoint(&shape.goal(), goal, none, None).await {
            // It was triggered meanwhile.
            Ok(()) | Err(CheckpointError::Stale { .. }) => Ok(()),
            Err(CheckpointError::Store(error)) => Err(error),
        }
    }

    /// Whether what is pending is to wait for more.
    pub(super) fn holds(&self) -> bool {
        let Some(pending) = &self.pending else { return false };
        self.source == Source::Feed
            && self.suspect.is_none()
            && pending.events.len() < self.context.options.batch
            && self.timing.until().is_some_and(|until| until > Instant::now())
    }

    fn goes_by_hand(&self) -> bool {
        self.context.options.schedule == Schedule::Manual && self.context.role == Role::Live
    }

    /// Whether it is to go on at all.
    pub(super) async fn is_due(&mut self) -> Result<bool, StoreError> {
        if !self.goes_by_hand() {
            return Ok(true);
        }
        let goal = match self.timing.goal {
            Some(goal) => goal,
            None => {
                let kept = self.context.goal().await?;
                let ours = kept.mark > self.timing.over;
                let goal = if ours { kept.position.max(self.timing.heard) } else { Position::START };
                // What it follows might lead it beyond.
                self.source = Source::Store;
                *self.timing.goal.insert(goal)
            }
        };
        Ok(self.pending.is_some() || self.applied < goal)
    }

    /// Waits for a trigger.
    pub(super) async fn rest(&mut self) {
        self.restart();
        self.context.set(ProjectionState::Waiting);
        self.idle(self.tick_at).await;
    }
}
