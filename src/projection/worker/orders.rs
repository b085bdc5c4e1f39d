//! What a projection is told: pause, resume, reset, retry what was parked.

use tokio::time::Instant;

use super::apply::{apply, contained};
use super::{Context, Run};
use crate::event::Position;
use crate::projection::control::{Control, Reply};
use crate::projection::{ControlError, Projection, ProjectionState, ReadModel};
use crate::store::{Checkpoint, CheckpointError, ReadLog, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    pub(super) async fn control(&mut self, control: Control) {
        let (reply, result): (Reply, _) = match control {
            Control::Pause(reply) => (reply, self.persist_paused(true).await),
            Control::Resume(reply) => (reply, self.persist_paused(false).await),
            Control::Reset(reply) => (reply, self.reset().await),
            Control::RetryParked(position, reply) => (reply, self.retry_parked(position).await),
        };
        // Who went away meanwhile does not want to know.
        let _ = reply.send(result);
    }

    async fn persist_paused(&mut self, paused: bool) -> Result<(), ControlError> {
        self.context.store.set_paused(&self.context.name, paused).await?;
        self.set_paused(paused).await;
        if !paused {
            self.try_again();
        }
        Ok(())
    }

    pub(super) async fn set_paused(&mut self, paused: bool) {
        self.paused = Some(paused);
        if paused {
            self.restart();
            self.flush().await;
        }
        // What is still starting, or failed, says so itself.
        let standby = self.read_model.shared() && self.lease.is_none();
        if self.prepared && !self.failed && (self.saved.is_some() || standby) {
            self.context.set(if paused { ProjectionState::Paused } else { ProjectionState::Starting });
        }
    }

    /// Somebody acted: what failed for good may work now.
    fn try_again(&mut self) {
        self.wait_until = Instant::now();
        self.backoff.succeeded();
        if self.failed {
            self.failed = false;
            self.context.set(ProjectionState::Starting);
        }
    }

    /// The checkpoint under which this node may write.
    fn owned(&self) -> Result<Checkpoint, ControlError> {
        let name = self.context.name.clone();
        if self.read_model.shared() && self.lease.is_none() {
            return Err(ControlError::NotOwner { name });
        }
        self.saved.ok_or_else(|| {
            let error = self.context.status.borrow().last_error.clone();
            let reason = format!(
                "projection {name} has not read its checkpoint yet{}",
                error.map_or_else(String::new, |error| format!(" ({error})"))
            );
            ControlError::Store(StoreError::Unavailable { reason, source: None })
        })
    }

    async fn reset(&mut self) -> Result<(), ControlError> {
        let saved = self.owned()?;
        let Context { name, .. } = self.context;
        let mut open = self.read_model.begin(name, saved).await?;
        let transaction = self.read_model.transaction(&mut open);
        if let Err(error) = contained(async { self.projection.reset(transaction).await }).await {
            self.roll_back(open).await;
            return Err(ControlError::Refused { name: name.clone(), reason: error.to_string() });
        }
        self.read_model.unpark_all(&mut open, name).await?;
        let to = Checkpoint { position: Position::START, mark: 0, ..saved };
        self.commit_control(open, saved, to).await?;
        tracing::info!(projection = name, "the projection was reset and applies the log from its start");
        self.saved = Some(to);
        self.applied = Position::START;
        self.moved_to(Position::START);
        self.restart();
        self.try_again();
        Ok(())
    }

    async fn retry_parked(&mut self, position: Position) -> Result<(), ControlError> {
        let saved = self.owned()?;
        let Context { name, store, .. } = self.context;
        let not_parked = || ControlError::NotParked { name: name.clone(), position };
        let before = Position::new(position.get().checked_sub(1).ok_or_else(not_parked)?);
        let page = store.read_log(ReadLog::after(before).upto(position).limit(1)).await?;
        let event = page.events.first().filter(|event| event.position == position).ok_or_else(not_parked)?;
        let mut open = self.read_model.begin(name, saved).await?;
        if !self.read_model.unpark(&mut open, name, position).await? {
            self.roll_back(open).await;
            return Err(not_parked());
        }
        let transaction = self.read_model.transaction(&mut open);
        if let Err(error) = apply(self.projection, event, transaction).await {
            self.roll_back(open).await;
            return Err(ControlError::Refused { name: name.clone(), reason: error.to_string() });
        }
        self.commit_control(open, saved, saved).await?;
        self.context.status.send_modify(|status| status.events_applied += 1);
        Ok(())
    }

    async fn commit_control(
        &mut self,
        open: R::Open,
        saved: Checkpoint,
        to: Checkpoint,
    ) -> Result<(), ControlError> {
        let name = &self.context.name;
        let Err(error) = self.read_model.commit(open, name, saved, to, None).await else { return Ok(()) };
        self.refused(&error);
        Err(match error {
            CheckpointError::Stale { .. } => ControlError::NotOwner { name: name.clone() },
            CheckpointError::Store(error) => ControlError::Store(error),
        })
    }
}
