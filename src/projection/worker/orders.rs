//! What a projection is told: pause, resume, reset, retry what was parked.

use tokio::time::Instant;

use super::apply::{apply, contained};
use super::{Context, Run};
use crate::event::Position;
use crate::lease::HeldLease;
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

    fn not_owner(&self) -> ControlError {
        ControlError::NotOwner { name: self.context.name.clone() }
    }

    /// The checkpoint under which this node may write.
    fn owned(&self) -> Result<Checkpoint, ControlError> {
        let name = &self.context.name;
        if self.read_model.shared() && self.lease.is_none() {
            return Err(self.not_owner());
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

    /// Makes this node the owner if nobody is, also where there is nothing that it could go on from.
    async fn take_over(&mut self) -> Result<(), ControlError> {
        let Context { row, store, node, options, .. } = self.context;
        if !self.prepared {
            self.read_model.prepare(store, row).await?;
            self.is_prepared();
        }
        if self.read_model.shared() && self.lease.is_none() {
            let lease = HeldLease::take(store, row, *node, options.lease).await?;
            self.lease = Some(lease.ok_or_else(|| self.not_owner())?);
            self.saved = None;
        }
        Ok(())
    }

    /// The epoch under which this node replaces what was written under `found`.
    async fn epoch_above(&mut self, found: u64) -> Result<u64, ControlError> {
        match &self.lease {
            Some(lease) => lease.epoch_above(found).await?.ok_or_else(|| self.not_owner()),
            None => Ok(found),
        }
    }

    /// Whatever the checkpoint is: also another store's, or one that the log does not reach.
    async fn reset(&mut self) -> Result<(), ControlError> {
        self.take_over().await?;
        let Context { name, row, .. } = self.context;
        // What cannot be read here is another store's, or cannot be read below either.
        let found = self.read_model.checkpoint(row).await.unwrap_or_default();
        let known = Checkpoint { epoch: self.epoch_above(found.epoch).await?, ..found };
        let mut open = self.read_model.begin(row, known).await?;
        match self.empty(&mut open).await {
            Ok((found, to)) => {
                self.commit_control(open, found, to).await?;
                tracing::info!(
                    projection = name,
                    "the projection was reset and applies the log from its start"
                );
                self.begin_at(to);
                self.try_again();
                Ok(())
            }
            Err(error) => {
                self.roll_back(open).await;
                Err(error)
            }
        }
    }

    /// Empties the read model in a transaction; the checkpoint that it leads on from, and the one that it leads to.
    async fn empty(&mut self, open: &mut R::Open) -> Result<(Checkpoint, Checkpoint), ControlError> {
        let Context { name, row, .. } = self.context;
        let found = self.read_model.adopt(open, row).await?;
        let to =
            Checkpoint { position: Position::START, epoch: self.epoch_above(found.epoch).await?, mark: 0 };
        let transaction = self.read_model.transaction(open);
        let emptied = contained(async { self.projection.reset(transaction).await }).await;
        emptied.map_err(|error| ControlError::Refused { name: name.clone(), reason: error.to_string() })?;
        self.read_model.unpark_all(open, row).await?;
        Ok((found, to))
    }

    async fn retry_parked(&mut self, position: Position) -> Result<(), ControlError> {
        let saved = self.owned()?;
        let Context { name, row, store, .. } = self.context;
        let not_parked = || ControlError::NotParked { name: name.clone(), position };
        let before = Position::new(position.get().checked_sub(1).ok_or_else(not_parked)?);
        let page = store.read_log(ReadLog::after(before).upto(position).limit(1)).await?;
        let event = page.events.first().filter(|event| event.position == position).ok_or_else(not_parked)?;
        let mut open = self.read_model.begin(row, saved).await?;
        if !self.read_model.unpark(&mut open, row, position).await? {
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
        let row = &self.context.row;
        let Err(error) = self.read_model.commit(open, row, saved, to, None).await else { return Ok(()) };
        self.refused(&error);
        Err(match error {
            CheckpointError::Stale { .. } => self.not_owner(),
            CheckpointError::Store(error) => ControlError::Store(error),
        })
    }
}
