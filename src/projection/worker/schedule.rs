//! Schedule: when waiting events are applied.

use tokio::time::Instant;

use super::context::TaskConfig;
use super::task::ProjectionTask;
use crate::event::Position;
use crate::lease::LeaseView;
use crate::projection::layout::Role;
use crate::projection::{Projection, ReadModel, Schedule};
use crate::store::{ControlChange, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Processes a trigger on any node.
    pub(super) async fn heed_triggers(&mut self, view: &LeaseView) {
        let triggers = view.control(&self.context.name).triggers;
        if self.timing.triggers.is_some_and(|known| known != triggers) {
            self.timing.forget();
            if let Some(reading) = self.state.reading_mut() {
                reading.hold = None;
            }
            if self.goes_by_hand() && self.state.owning().is_some() {
                // Race: an append was in flight when the trigger read the end of the log, and hid
                // an event that already had its receipt. Reading the end again is best effort:
                // without an answer, the recorded target suffices.
                self.timing.head_at_trigger = self.context.store.high_water_mark().await.unwrap_or_default();
            }
        }
        self.timing.triggers = Some(triggers);
    }

    /// Withdraws the target of so many triggers after a reset: the projection waits for a later one.
    pub(super) async fn withdraw_triggers(&mut self, triggers: u64) -> Result<(), StoreError> {
        let TaskConfig { store, name, .. } = self.context;
        if !self.read_model.shared() {
            self.timing.over = triggers;
        } else if triggers > 0 {
            store.control(name, ControlChange::WithdrawTriggers(triggers)).await?;
        }
        Ok(())
    }

    /// Returns whether the pending events wait for more.
    pub(super) fn holds(&self) -> bool {
        let Some(reading) = self.state.reading() else { return false };
        reading.is_live()
            && reading.suspect.is_none()
            && reading
                .pending
                .as_ref()
                .is_some_and(|pending| pending.events.len() < self.context.options.batch)
            && reading.hold.is_some_and(|(_, until)| until > Instant::now())
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
                let control = self.context.control_state().await?;
                let is_unreached = control.triggers > self.timing.over;
                let goal = if is_unreached {
                    control.trigger_position.max(self.timing.head_at_trigger)
                } else {
                    Position::START
                };
                // The live source might lead beyond the target.
                if let Some(reading) = self.state.reading_mut() {
                    reading.catch_up();
                }
                *self.timing.goal.insert(goal)
            }
        };
        let pending = self.state.reading().is_some_and(|reading| reading.pending.is_some());
        Ok(pending || self.state.owning().is_some_and(|owning| owning.applied < goal))
    }

    /// Waits for a trigger.
    pub(super) async fn rest(&mut self) {
        self.state.wait_for_trigger();
        self.show();
        self.idle(self.tick_at).await;
    }
}
