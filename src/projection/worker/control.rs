//! Control calls: pause, resume, reset, retry of parked events.
//!
//! They work on any node, owner or not. Checkpoints move by compare-and-set, and a stale owner is
//! fenced (I7).

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::change::{Change, ORDER, blame, interrupted, is_momentary, refused};
use super::context::TaskConfig;
use super::task::{Preparation, ProjectionTask};
use super::user_code::{apply, catch_panic};
use crate::backoff::Backoff;
use crate::event::{Position, RecordedEvent};
use crate::lease::{self, HeldLease};
use crate::projection::control::{Control, Reply};
use crate::projection::error::NoReset;
use crate::projection::layout::{ATTEMPTS, undo};
use crate::projection::{ApplyError, ControlError, Projection, ProjectionState, ReadModel};
use crate::store::{CheckpointError, ControlChange, Lease, ProgressWrite, StoredRequest};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    pub(super) async fn control(&mut self, control: Control) {
        let (reply, result): (Reply, _) = match control {
            Control::Pause(reply) => (reply, self.persist_paused(ControlChange::Pause).await),
            Control::Resume(reply) => (reply, self.persist_paused(ControlChange::Resume).await),
            Control::Paused(paused, reply) => (reply, self.take_paused(paused).await),
            Control::Reset(reply) => (reply, self.reset(None).await),
            Control::BeginAnew(reply) => {
                self.begin_anew();
                (reply, Ok(()))
            }
            Control::Trigger(reply) => (reply, self.trigger().await),
            Control::Rebuild(reply) => (reply, self.rebuild(None).await),
            Control::CancelRebuild(reply) => (reply, self.cancel_rebuild(None).await),
            Control::RetryParked(event, reply) => (reply, self.retry_parked(&event, None).await),
        };
        // The caller may have dropped its future.
        let _ = reply.send(result);
    }

    /// Pauses or resumes the projection. Other nodes retry what failed there after a resumption.
    async fn persist_paused(&mut self, change: ControlChange) -> Result<(), ControlError> {
        self.change_control(change).await?;
        self.take_paused(change == ControlChange::Pause).await
    }

    async fn take_paused(&mut self, paused: bool) -> Result<(), ControlError> {
        self.operators.paused_at = Some(Instant::now());
        self.set_paused(paused).await;
        if !paused {
            self.retry_now();
        }
        Ok(())
    }

    pub(super) async fn set_paused(&mut self, paused: bool) {
        self.operators.pause = paused.into();
        if paused {
            self.state.pause();
            self.flush().await;
        } else {
            self.state.resume();
        }
        if self.preparation == Preparation::Done && self.state.shows_pause(self.read_model.shared()) {
            match paused {
                true => self.show(),
                // The next step shows more.
                false => self.context.set(ProjectionState::Starting),
            }
        }
    }

    /// Retries after an operator's action: a permanent failure may be resolved.
    pub(super) fn retry_now(&mut self) {
        self.retry.now();
        if self.state.retry() {
            self.show();
        }
    }

    /// Triggers all tasks of the projection.
    async fn trigger(&mut self) -> Result<(), ControlError> {
        let head = self.context.store.high_water_mark().await?;
        self.change_control(ControlChange::Trigger(head)).await
    }

    /// Makes all tasks on all nodes read their state again.
    pub(super) async fn notify_tasks(&mut self) -> Result<(), ControlError> {
        self.change_control(ControlChange::Announce).await
    }

    /// Announces a change that was made under the order lease, before the release of that lease.
    ///
    /// Returns whether it is announced. Otherwise the lease must not be released: other nodes notice
    /// the change when it expires.
    pub(super) async fn announce(&mut self, change: &str) -> bool {
        let announced = self.notify_tasks().await;
        if let Err(error) = &announced {
            tracing::warn!(
                projection = self.context.name, change, %error,
                "could not announce a change; other nodes notice it when the order lease expires"
            );
        }
        announced.is_ok()
    }

    async fn change_control(&mut self, change: ControlChange) -> Result<(), ControlError> {
        let TaskConfig { store, name, lease_watcher, .. } = self.context;
        let changed = store.control(name, change).await?;
        if matches!(change, ControlChange::Announce | ControlChange::Resume) {
            self.operators.changes.own.push(changed.changes);
        }
        lease_watcher.hint();
        Ok(())
    }

    /// Acquires the order lease, which holds up all tasks of the projection; one node at a time.
    pub(super) async fn order(&mut self) -> Result<Lease, ControlError> {
        let TaskConfig { store, name, layout, lease_watcher, .. } = self.context;
        let order = layout.order();
        let give_up = Instant::now() + ORDER;
        loop {
            let view = lease_watcher.view();
            let abandoned = view.as_ref().and_then(|view| view.abandoned(&order));
            // A new owner each time, so that no other task of this node can acquire it as well.
            if let Some(lease) = lease::acquire(&**store, &order, Uuid::new_v4(), ORDER, abandoned).await? {
                lease_watcher.hint();
                return Ok(lease);
            }
            if Instant::now() >= give_up {
                return Err(ControlError::Overloaded { name: name.clone() });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Resets the projection, regardless of its checkpoint.
    ///
    /// The checkpoint may belong to another store or another number of partitions, or be beyond the
    /// end of the log. With `requested`, only if that request still exists.
    pub(super) async fn reset(&mut self, requested: Option<&StoredRequest>) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        let context = self.context;
        let TaskConfig { name, store, lease_watcher, .. } = context;
        let triggers = context.control_state().await?.triggers;
        let mut order = if self.read_model.shared() { Some(self.order().await?) } else { None };
        self.discard_snapshot().await?;
        let held = match order.take_if(|_| self.outside()) {
            Some(order) => Some(hold(context, order).await?),
            None => None,
        };
        let change = async {
            let emptied = self.patiently(Change::Reset, requested).await?;
            // The read model is empty: other nodes must learn of it in any case.
            if emptied && let Err(error) = self.withdraw_triggers(triggers).await {
                tracing::warn!(projection = name, %error, "could not withdraw the triggers; the projection applies up to them at once");
            }
            Ok(emptied)
        };
        let emptied = match &held {
            Some(held) => while_held(context, held, change).await,
            None => change.await,
        };
        let changed = self.read_model.shared() && matches!(emptied, Ok(true));
        if !changed || self.announce("reset").await {
            if let Some(held) = held {
                held.release().await;
            }
            if let Some(order) = order
                && let Err(error) = store.release_lease(&order).await
            {
                tracing::warn!(projection = name, %error, "could not release the order lease; the projection is held up until it expires");
            }
        }
        lease_watcher.hint();
        if emptied? {
            tracing::info!(projection = name, "reset the projection; applying the log from its start");
            self.begin_anew();
        }
        Ok(())
    }

    /// Restarts from the emptied read model.
    fn begin_anew(&mut self) {
        self.reload();
        self.context.moved_to(Position::START);
        self.retry_now();
    }

    /// Makes a change; retries while other nodes move the same checkpoints.
    ///
    /// Returns whether the request still existed.
    pub(super) async fn patiently(
        &mut self,
        change: Change,
        requested: Option<&StoredRequest>,
    ) -> Result<bool, ControlError> {
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(500));
        let mut attempt = 1;
        loop {
            let changed = match change {
                Change::Reset if self.outside() => self.empty_outside(requested).await,
                Change::Reset => self.empty(requested).await,
                Change::BeginRebuild => self.begin_rebuild(requested).await,
                Change::EndRebuild => self.end_rebuild(requested).await,
                Change::DropVersion => self.drop_version(requested).await,
            };
            match changed {
                Err(error) if attempt < ATTEMPTS && is_momentary(&error) => {
                    let projection = &self.context.name;
                    tracing::info!(projection, %error, attempt, ?change, "retrying a change of the projection");
                    attempt += 1;
                    sleep(backoff.next()).await;
                }
                result => return result,
            }
        }
    }

    /// Returns whether each call changes the shared read model at once, without a common
    /// transaction.
    pub(super) fn outside(&self) -> bool {
        self.read_model.shared() && !self.read_model.rolls_back()
    }

    /// Opens a transaction for a change. An unreadable checkpoint does not prevent a reset.
    async fn open(&mut self) -> Result<R::Open, ControlError> {
        let known = self.read_model.checkpoint(&self.key).await.unwrap_or_default();
        Ok(self.read_model.begin(&self.context.name, known, None).await?)
    }

    /// Deletes a request with the commit of the transaction; returns whether it still existed.
    pub(super) async fn remove_request(
        &mut self,
        open: &mut R::Open,
        requested: Option<&StoredRequest>,
    ) -> Result<bool, ControlError> {
        let Some(StoredRequest { request, id, .. }) = requested else { return Ok(true) };
        let projection = self.context.name.clone();
        let write = ProgressWrite::RemoveRequest { projection, request: *request, id: Some(*id) };
        match self.read_model.write(open, write).await {
            Err(CheckpointError::Missing { .. }) => Ok(false),
            written => written.map(|()| true).map_err(refused(self.context)),
        }
    }

    /// Commits a change; rolls back after an error, or if there is nothing to commit.
    ///
    /// Returns whether it has committed.
    pub(super) async fn end(
        &mut self,
        open: R::Open,
        change: Result<Option<Vec<ProgressWrite>>, ControlError>,
    ) -> Result<bool, ControlError> {
        match change {
            Ok(Some(writes)) => {
                self.read_model.commit(open, writes).await.map_err(refused(self.context))?;
                Ok(true)
            }
            other => {
                self.roll_back(open).await;
                other.map(|_| false)
            }
        }
    }

    /// Empties the read model and moves every checkpoint to the start of the log.
    ///
    /// Runs in one transaction. Returns whether the request still existed.
    async fn empty(&mut self, requested: Option<&StoredRequest>) -> Result<bool, ControlError> {
        let start = self.floor_after_reset().await.map_err(interrupted(self.context))?;
        let mut open = self.open().await?;
        let change = async {
            if !self.remove_request(&mut open, requested).await? {
                return Ok(None);
            }
            let moves = self.restart_writes(&mut open, start).await?;
            // Before the user's part: owners then wait for this transaction, instead of blocking it
            // in vain.
            for write in &moves {
                self.read_model.write(&mut open, write.clone()).await.map_err(refused(self.context))?;
            }
            let emptied = self.users_reset(&mut open).await;
            emptied.map_err(|error| blame(self.context, &error))?;
            Ok(Some(unpark_all(&moves)))
        };
        let change = change.await;
        self.end(open, change).await
    }

    async fn restart_writes(
        &mut self,
        open: &mut R::Open,
        start: Option<Position>,
    ) -> Result<Vec<ProgressWrite>, ControlError> {
        let TaskConfig { layout, name, .. } = self.context;
        let found = self.read_model.adopt(open, name).await?;
        self.use_version(found.projection.live_version)?;
        Ok(layout.restart(&found, start, self.read_model.rolls_back())?)
    }

    pub(super) async fn users_reset(&mut self, open: &mut R::Open) -> Result<(), ApplyError> {
        let transaction = self.read_model.transaction(open);
        catch_panic(async { self.instance.projection.reset(transaction).await }).await
    }

    /// Moves the checkpoints to the start first, then empties the read model.
    ///
    /// If this stops at any step, events are repeated and none is lost.
    async fn empty_outside(&mut self, requested: Option<&StoredRequest>) -> Result<bool, ControlError> {
        let start = self.floor_after_reset().await.map_err(interrupted(self.context))?;
        if let Some(requested) = requested
            && !self.is_waiting(requested).await?
        {
            return Ok(false);
        }
        let mut open = self.open().await?;
        let moves = self.restart_writes(&mut open, start).await?;
        self.read_model.commit(open, moves.clone()).await.map_err(refused(self.context))?;
        let mut open = self.open().await?;
        if let Err(error) = self.users_reset(&mut open).await {
            // After any other error, the remaining data is unknown.
            let back = error.is::<NoReset>().then(|| moves.into_iter().map(undo).collect());
            if let Err(error) = self.end(open, Ok(back)).await {
                tracing::warn!(
                    projection = self.context.name, %error,
                    "could not undo a failed reset; applying the log from its start"
                );
            }
            return Err(blame(self.context, &error));
        }
        // Once more: an owner that was not held up in time may have written events into the emptied
        // read model.
        let mut writes = unpark_all(&moves);
        writes.extend(moves.into_iter().filter_map(|write| match write {
            ProgressWrite::Checkpoint { key, to, .. } => {
                Some(ProgressWrite::Checkpoint { key, from: to, to: to.next_generation() })
            }
            _ => None,
        }));
        self.remove_request(&mut open, requested).await?;
        self.end(open, Ok(Some(writes))).await
    }

    pub(super) async fn retry_parked(
        &mut self,
        event: &RecordedEvent,
        requested: Option<&StoredRequest>,
    ) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        let mut attempt = 1;
        loop {
            match self.apply_parked(event, requested).await {
                // The owner has moved the checkpoint meanwhile.
                Err(error) if attempt < ATTEMPTS && is_momentary(&error) => attempt += 1,
                result => return result,
            }
        }
    }

    async fn apply_parked(
        &mut self,
        event: &RecordedEvent,
        requested: Option<&StoredRequest>,
    ) -> Result<(), ControlError> {
        let TaskConfig { name, role, .. } = self.context;
        let found = self.read_model.checkpoint(&self.key).await?;
        // After reading the checkpoint: a cut-over moves it, so that the compare-and-set below
        // would fail.
        let projection = self.read_model.projection(name).await?;
        if role.version(&projection) != Some(self.instance.version) {
            self.reload();
            self.find_version(&projection)?;
            let reason = "retrying a parked event failed: another version became live".into();
            return Err(ControlError::Conflict { name: name.clone(), reason });
        }
        let mut open = self.read_model.begin(name, found, None).await?;
        let change = async {
            let (key, position) = (self.key.clone(), event.position);
            let unpark = ProgressWrite::Unpark { key: key.clone(), position };
            self.read_model.write(&mut open, unpark).await.map_err(|error| match error {
                CheckpointError::Missing { .. } => ControlError::NotParked { name: name.clone(), position },
                error => refused(self.context)(error),
            })?;
            if !self.remove_request(&mut open, requested).await? {
                return Ok(None);
            }
            let transaction = self.read_model.transaction(&mut open);
            apply(&mut self.instance.projection, event, transaction)
                .await
                .map_err(|error| blame(self.context, &error))?;
            // The checkpoint stays unchanged, but this commit conflicts with a concurrent move of it.
            Ok(Some(vec![ProgressWrite::Checkpoint { key, from: found, to: found }]))
        };
        let change = change.await;
        if self.end(open, change).await? {
            self.context.status.send_modify(|status| status.events_applied += 1);
            self.snapshot_behind(1).await;
        }
        Ok(())
    }
}

/// Returns the writes that delete the parked events of the moved checkpoints.
fn unpark_all(moves: &[ProgressWrite]) -> Vec<ProgressWrite> {
    let keys = moves.iter().filter_map(|write| match write {
        ProgressWrite::Checkpoint { key, .. } => Some(key.clone()),
        _ => None,
    });
    keys.map(|key| ProgressWrite::UnparkAll { key }).collect()
}

/// Renews the order lease until it is released.
async fn hold(context: &TaskConfig, order: Lease) -> Result<HeldLease, ControlError> {
    let TaskConfig { lease_watcher, name, metrics, store, .. } = context;
    let renewer = lease_watcher.renewer();
    let held = HeldLease::take(renewer, &order.name, order.owner, ORDER, None, metrics).await;
    if let Ok(Some(held)) = held {
        return Ok(held);
    }
    if let Err(error) = store.release_lease(&order).await {
        tracing::warn!(projection = name, %error, "could not release the order lease; the projection is held up until it expires");
    }
    lease_watcher.hint();
    match held {
        Err(error) => Err(error.into()),
        Ok(_) => Err(ControlError::Overloaded { name: name.clone() }),
    }
}

/// Runs a change while the order lease holds up all tasks; aborts it if the lease is lost.
async fn while_held(
    context: &TaskConfig,
    order: &HeldLease,
    change: impl Future<Output = Result<bool, ControlError>>,
) -> Result<bool, ControlError> {
    tokio::select! {
        changed = change => changed,
        () = order.loss() => {
            let reason = "changing the projection failed: the order lease was lost".into();
            Err(ControlError::Conflict { name: context.name.clone(), reason })
        }
    }
}
