//! Schedule: when waiting events are applied.

use tokio::time::Instant;

use super::change::ATTEMPTS;
use super::context::TaskConfig;
use super::task::{ProjectionTask, Source};
use crate::event::Position;
use crate::lease::LeaseView;
use crate::projection::layout::{Role, bump};
use crate::projection::{ControlError, Projection, ProjectionState, ReadModel, Schedule};
use crate::store::{Checkpoint, CheckpointError, StoreError};

impl TaskConfig {
    /// Records the current end of the log as the target of a trigger.
    ///
    /// The target is in the event store: later owners know it too, and a target that was reached is
    /// not pursued twice.
    pub(super) async fn set_goal(&self) -> Result<(), ControlError> {
        let Self { name, store, layout, .. } = self;
        let (row, head) = (layout.goal(), store.high_water_mark().await?);
        let mut found = store.checkpoint(&row).await?;
        for _ in 0..ATTEMPTS {
            let goal = Checkpoint { position: head.max(found.position), ..bump(found) };
            match store.save_checkpoint(&row, found, goal, None).await {
                Ok(()) => return Ok(()),
                // A concurrent trigger has set the same target or a later one.
                Err(CheckpointError::Stale { found, .. }) if found.position >= head => return Ok(()),
                Err(CheckpointError::Stale { found: now, .. }) => found = now,
                Err(CheckpointError::Store(error)) => return Err(error.into()),
            }
        }
        Err(ControlError::Overloaded { name: name.clone() })
    }

    /// Returns the target and the number of triggers.
    pub(super) async fn goal(&self) -> Result<Checkpoint, StoreError> {
        self.store.checkpoint(&self.layout.goal()).await
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Processes a trigger on any node.
    pub(super) async fn heed_triggers(&mut self, view: &LeaseView) {
        let triggers = view.leases.get(&self.context.layout.trigger()).map_or(0, |posted| posted.epoch);
        if self.timing.triggers.is_some_and(|known| known != triggers) {
            self.timing.forget();
            self.timing.hold = None;
            if self.goes_by_hand() && self.saved.is_some() {
                // Race: an append was in flight when the trigger read the end of the log, and hid
                // an event that already had its receipt. Reading the end again is best effort:
                // without an answer, the recorded target suffices.
                self.timing.head_at_trigger = self.context.store.high_water_mark().await.unwrap_or_default();
            }
        }
        self.timing.triggers = Some(triggers);
    }

    /// Withdraws the target `goal` after a reset: the projection waits for a later trigger.
    pub(super) async fn give_up_goal(&mut self, goal: Checkpoint) -> Result<(), StoreError> {
        let TaskConfig { store, layout, .. } = self.context;
        if !self.read_model.shared() {
            self.timing.over = goal.mark;
            return Ok(());
        }
        if goal.position == Position::START {
            return Ok(());
        }
        let none = Checkpoint { position: Position::START, ..goal };
        match store.save_checkpoint(&layout.goal(), goal, none, None).await {
            // A concurrent trigger has set a new target.
            Ok(()) | Err(CheckpointError::Stale { .. }) => Ok(()),
            Err(CheckpointError::Store(error)) => Err(error),
        }
    }

    /// Returns whether the pending events wait for more.
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

    /// Returns whether the projection may continue.
    pub(super) async fn is_due(&mut self) -> Result<bool, StoreError> {
        if !self.goes_by_hand() {
            return Ok(true);
        }
        let goal = match self.timing.goal {
            Some(goal) => goal,
            None => {
                let kept = self.context.goal().await?;
                let is_unreached = kept.mark > self.timing.over;
                let goal = if is_unreached {
                    kept.position.max(self.timing.head_at_trigger)
                } else {
                    Position::START
                };
                // The live source might lead beyond the target.
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
