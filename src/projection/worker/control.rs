//! Control calls: pause, resume, reset, retry of parked events.
//!
//! They work on any node, owner or not. Checkpoints move by compare-and-set, and a stale owner is
//! fenced (I7).

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::change::{ATTEMPTS, Change, ORDER, blame, interrupted, is_momentary, refused};
use super::context::TaskConfig;
use super::task::ProjectionTask;
use super::user_code::{apply, catch_panic};
use crate::backoff::Backoff;
use crate::event::{Position, RecordedEvent};
use crate::lease::{self, HeldLease};
use crate::projection::control::{Control, Reply};
use crate::projection::error::NoReset;
use crate::projection::layout::{CheckpointKey, bump};
use crate::projection::start_position::recorded;
use crate::projection::{ApplyError, ControlError, Projection, ProjectionState, ReadModel};
use crate::store::{Checkpoint, Lease};

/// A checkpoint name, its current value and its target.
type Move = (String, Checkpoint, Checkpoint);

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    pub(super) async fn control(&mut self, control: Control) {
        let (reply, result): (Reply, _) = match control {
            Control::Pause(reply) => (reply, self.persist_paused(true).await),
            Control::Resume(reply) => (reply, self.persist_paused(false).await),
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

    async fn persist_paused(&mut self, paused: bool) -> Result<(), ControlError> {
        let TaskConfig { store, name, lease_watcher, .. } = self.context;
        store.set_paused(name, paused).await?;
        if !paused && self.read_model.shared() {
            // Other nodes must retry what failed there.
            let order = self.order().await?;
            store.release_lease(&order).await?;
        }
        lease_watcher.hint();
        self.take_paused(paused).await
    }

    async fn take_paused(&mut self, paused: bool) -> Result<(), ControlError> {
        self.paused_at = Some(Instant::now());
        self.set_paused(paused).await;
        if !paused {
            self.retry_now();
        }
        Ok(())
    }

    pub(super) async fn set_paused(&mut self, paused: bool) {
        self.paused = Some(paused);
        if paused {
            self.restart();
            self.flush().await;
        }
        // A starting or failed task reports its own state.
        let standby = self.read_model.shared() && self.lease.is_none();
        if self.prepared && !self.failed && (self.saved.is_some() || standby) {
            self.context.set(if paused { ProjectionState::Paused } else { ProjectionState::Starting });
        }
    }

    /// Retries after an operator's action: a permanent failure may be resolved.
    pub(super) fn retry_now(&mut self) {
        self.wait_until = Instant::now();
        self.backoff.succeeded();
        if self.failed {
            self.failed = false;
            self.context.set(ProjectionState::Starting);
        }
    }

    /// Triggers all tasks of the projection.
    async fn trigger(&mut self) -> Result<(), ControlError> {
        // First: the tasks read the target when they are notified.
        self.context.set_goal().await?;
        let lease = self.hold(&self.context.layout.trigger()).await?;
        self.context.store.release_lease(&lease).await?;
        self.context.lease_watcher.hint();
        Ok(())
    }

    /// Acquires the order lease, which holds up all tasks of the projection; one node at a time.
    pub(super) async fn order(&mut self) -> Result<Lease, ControlError> {
        let order = self.hold(&self.context.layout.order()).await?;
        self.own_epochs.push(order.epoch);
        Ok(order)
    }

    /// Makes all tasks on all nodes re-read their state.
    pub(super) async fn notify_tasks(&mut self) -> Result<(), ControlError> {
        let order = self.order().await?;
        self.context.store.release_lease(&order).await?;
        self.context.lease_watcher.hint();
        Ok(())
    }

    async fn hold(&mut self, lease: &str) -> Result<Lease, ControlError> {
        let TaskConfig { store, name, lease_watcher, .. } = self.context;
        let give_up = Instant::now() + ORDER;
        loop {
            let view = lease_watcher.view();
            let abandoned = view.as_ref().and_then(|view| view.abandoned(lease));
            // A new owner each time, so that the epoch counts the holds.
            if let Some(order) = lease::acquire(&**store, lease, Uuid::new_v4(), ORDER, abandoned).await? {
                return Ok(order);
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
    pub(super) async fn reset(&mut self, requested: Option<&str>) -> Result<(), ControlError> {
        self.create().await.map_err(interrupted(self.context))?;
        let context = self.context;
        let TaskConfig { name, store, lease_watcher, .. } = context;
        let goal = context.goal().await?;
        let mut order = if self.read_model.shared() { Some(self.order().await?) } else { None };
        lease_watcher.hint();
        self.discard_snapshot().await?;
        let outside = self.outside();
        let change = async {
            let emptied = self.patiently(Change::Empty { requested }).await?;
            if emptied {
                self.give_up_goal(goal).await?;
            }
            Ok(emptied)
        };
        let emptied = match order.take_if(|_| outside) {
            Some(order) => while_held(context, order, change).await,
            None => change.await,
        };
        if let Some(order) = order
            && let Err(error) = store.release_lease(&order).await
        {
            tracing::warn!(projection = name, %error, "could not release the order lease; the projection is held up until it expires");
        }
        lease_watcher.hint();
        if !emptied? {
            return Ok(());
        }
        tracing::info!(projection = name, "reset the projection; applying the log from its start");
        self.begin_anew();
        Ok(())
    }

    /// Restarts from the emptied read model.
    fn begin_anew(&mut self) {
        self.reload();
        self.moved_to(Position::START);
        self.retry_now();
    }

    /// Makes a change; retries while other nodes move the same checkpoints.
    ///
    /// Returns whether the request still existed.
    pub(super) async fn patiently(&mut self, change: Change<'_>) -> Result<bool, ControlError> {
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(500));
        let mut attempt = 1;
        loop {
            let changed = match change {
                Change::Empty { requested } => self.empty(requested).await,
                Change::BeginRebuild { requested } => self.begin_rebuild(requested).await,
                Change::EndRebuild { requested } => self.end_rebuild(requested).await,
                Change::Discard { asked } => self.drop_version(asked).await.map(|()| true),
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

    /// Empties the read model and moves every checkpoint to the start of the log.
    ///
    /// Runs in one transaction, if the read model has transactions. Returns whether the request
    /// still existed.
    async fn empty(&mut self, requested: Option<&str>) -> Result<bool, ControlError> {
        let TaskConfig { layout, .. } = self.context;
        let row = &self.row.clone();
        // An unreadable checkpoint belongs to another store, or is unreadable below as well.
        let known = self.read_model.checkpoint(row).await.unwrap_or_default();
        let floor = self.floor_after_reset().await.map_err(interrupted(self.context))?;
        let mut open = self.read_model.begin(row, known).await?;
        let result = async {
            if let Some(request) = requested
                && !self.read_model.unpark(&mut open, request, Position::START).await?
            {
                return Ok(None);
            }
            let version = layout.live(self.read_model, &mut open).await?;
            self.use_version(version)?;
            let mut rows = layout.begin_anew(self.read_model, &mut open, version).await?;
            if let Some(floor) = floor {
                let record = layout.start();
                let found = self.read_model.adopt(&mut open, &record).await?;
                rows.insert(0, (record, found, recorded(found, floor)));
            }
            if self.outside() {
                self.empty_outside(&mut open, &mut rows).await?;
            }
            let last = rows.pop();
            // Before the user's part: owners then wait for this transaction, instead of blocking it
            // in vain.
            for (row, found, to) in &rows {
                self.read_model.save(&mut open, row, *found, *to).await.map_err(refused(self.context))?;
            }
            if !self.outside() {
                let emptied = self.users_reset(&mut open).await;
                emptied.map_err(|error| blame(self.context, self.read_model, &error))?;
            }
            for (row, ..) in rows.iter().chain(&last) {
                self.read_model.unpark_all(&mut open, row).await?;
            }
            Ok(last)
        };
        match result.await {
            Ok(Some((row, found, to))) => {
                self.read_model.commit(open, &row, found, to, None).await.map_err(refused(self.context))?;
                Ok(true)
            }
            Ok(None) => {
                self.roll_back(open).await;
                Ok(false)
            }
            Err(error) => {
                self.roll_back(open).await;
                Err(error)
            }
        }
    }

    pub(super) async fn users_reset(&mut self, open: &mut R::Open) -> Result<(), ApplyError> {
        let transaction = self.read_model.transaction(open);
        catch_panic(async { self.instance.projection.reset(transaction).await }).await
    }

    /// Moves the checkpoints to the start first, then empties the read model.
    ///
    /// If this stops at any step, events are repeated and none is lost. Leaves the event rows in
    /// `rows` for a second move: an owner that was not held up in time may have written events into
    /// the emptied read model.
    async fn empty_outside(&mut self, open: &mut R::Open, rows: &mut Vec<Move>) -> Result<(), ControlError> {
        for (index, (row, found, to)) in rows.iter().enumerate() {
            if let Err(error) = self.read_model.save(open, row, *found, *to).await {
                self.put_back(open, &rows[..index]).await;
                return Err(refused(self.context)(error));
            }
        }
        if let Err(error) = self.users_reset(open).await {
            // After any other error, the remaining data is unknown.
            if error.is::<NoReset>() {
                self.put_back(open, rows).await;
            }
            return Err(blame(self.context, self.read_model, &error));
        }
        rows.retain(|(row, ..)| CheckpointKey::parse(row).is_some());
        for (_, found, to) in rows {
            *found = *to;
            *to = bump(*to);
        }
        Ok(())
    }

    /// Moves the checkpoints back after a reset that emptied nothing.
    async fn put_back(&mut self, open: &mut R::Open, moved: &[Move]) {
        for (row, found, to) in moved.iter().rev() {
            // No mark repeats: the mark identifies the replay.
            let back =
                CheckpointKey::parse(row).map_or(*found, |_| Checkpoint { mark: bump(*to).mark, ..*found });
            if let Err(error) = self.read_model.save(open, row, *to, back).await {
                tracing::warn!(
                    projection = self.context.name, %error,
                    "could not undo a failed reset; applying the log from its start"
                );
                return;
            }
        }
    }

    pub(super) async fn retry_parked(
        &mut self,
        event: &RecordedEvent,
        requested: Option<&str>,
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
        requested: Option<&str>,
    ) -> Result<(), ControlError> {
        let TaskConfig { name, .. } = self.context;
        let found = self.read_model.checkpoint(&self.row).await?;
        // After reading the checkpoint: a cut-over moves it, so that the compare-and-set below
        // would fail.
        if self.context.version(self.read_model).await? != Some(self.instance.version) {
            self.reload();
            self.find_version().await?;
            let reason = "retrying a parked event failed: another version became live".into();
            return Err(ControlError::Conflict { name: name.clone(), reason });
        }
        let row = &self.row;
        let mut open = self.read_model.begin(row, found).await?;
        if !self.read_model.unpark(&mut open, row, event.position).await? {
            self.roll_back(open).await;
            return Err(ControlError::NotParked { name: name.clone(), position: event.position });
        }
        if let Some(request) = requested
            && !self.read_model.unpark(&mut open, request, event.position).await?
        {
            self.roll_back(open).await;
            return Ok(());
        }
        let transaction = self.read_model.transaction(&mut open);
        if let Err(error) = apply(&mut self.instance.projection, event, transaction).await {
            self.roll_back(open).await;
            return Err(blame(self.context, self.read_model, &error));
        }
        // The checkpoint stays unchanged, but this commit conflicts with a concurrent move of it.
        self.read_model.commit(open, row, found, found, None).await.map_err(refused(self.context))?;
        self.context.status.send_modify(|status| status.events_applied += 1);
        self.snapshot_behind(1).await;
        Ok(())
    }
}

/// Runs a change while the order lease holds up all tasks; aborts it if the lease is lost.
async fn while_held(
    context: &TaskConfig,
    order: Lease,
    change: impl Future<Output = Result<bool, ControlError>>,
) -> Result<bool, ControlError> {
    let TaskConfig { lease_watcher, name, metrics, .. } = context;
    let Some(order) =
        HeldLease::take(lease_watcher.renewer(), &order.name, order.owner, ORDER, None, metrics).await?
    else {
        return Err(ControlError::Overloaded { name: name.clone() });
    };
    let changed = tokio::select! {
        changed = change => changed,
        () = order.loss() => {
            let reason = "changing the projection failed: the order lease was lost".into();
            Err(ControlError::Conflict { name: name.clone(), reason })
        }
    };
    order.release().await;
    changed
}
