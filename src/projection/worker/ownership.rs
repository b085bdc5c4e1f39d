//! Lease handling: standby, takeover, handover, loss.

use tokio::time::Instant;

use super::context::TaskConfig;
use super::operators::{NewChanges, Operators, Pause};
use super::takeover::Takeover;
use super::task::ProjectionTask;
use crate::event::Position;
use crate::lease::{HeldLease, LeaseView, Observation};
use crate::projection::interruption::Interruption;
use crate::projection::{Projection, ProjectionState, ReadModel};
use crate::store::{Checkpoint, CheckpointError, ProgressWrite, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Processes the lease view: pauses, owners, and changes by other nodes.
    pub(super) async fn process_lease_view(&mut self) {
        let Observation { view, error } = self.news.observations.borrow_and_update().clone();
        if let Some(permit) = &mut self.news.permit {
            permit.mark_unchanged();
        }
        if let Some(error) = error {
            if self.operators.pause == Pause::Unknown {
                return self.schedule_retry(&error);
            }
            let error = format!("reading the pauses failed: {error}");
            self.context.status.send_modify(|status| status.last_error = Some(error));
        }
        if self.state.lease().is_some() && !self.news.permits() {
            self.hand_over().await;
        }
        let Some(view) = view else { return };
        let paused = view.control(&self.context.name).paused;
        let Operators { pause, paused_at, .. } = self.operators;
        if pause != paused.into() && paused_at.is_none_or(|paused_at| paused_at <= view.asked) {
            self.set_paused(paused).await;
        }
        if self.read_model.shared() {
            self.heed(&view);
        }
        self.heed_triggers(&view).await;
    }

    /// Processes a change on any node: reads the state again and retries failures.
    fn heed(&mut self, view: &LeaseView) {
        let in_progress = view.owner(&self.context.layout.order()).is_some();
        let changes = view.control(&self.context.name).changes;
        let operators = &mut self.operators;
        match operators.changes.observe(in_progress, changes) {
            NewChanges::None => return,
            NewChanges::Own => operators.expect_requests(),
            NewChanges::Foreign => operators.request_now(),
        }
        self.reload();
        self.retry_now();
    }

    /// Continues from the stored checkpoint.
    pub(super) fn reload(&mut self) {
        // The lag is unknown until the checkpoint is read.
        self.context.status.send_if_modified(|status| std::mem::take(&mut status.located));
        self.state.reload();
        self.timing.forget();
    }

    /// Waits while another node owns, or should own, the read model.
    pub(super) async fn stand_by(&mut self) {
        let context = self.context;
        let mut free = self.news.permits() && self.looks_free();
        let permit = match free && self.takeover.acquire_at <= Instant::now() {
            true => context.lease_watcher.permit_to_acquire().await,
            false => None,
        };
        // The wait for the permit may have been long.
        free = self.news.permits() && self.looks_free();
        if let Some(_permit) = permit.filter(|_| free) {
            let (ttl, metrics) = (context.options.lease, &context.metrics);
            self.takeover.leave_alone(ttl);
            let view = context.lease_watcher.view();
            let abandoned = view.as_ref().and_then(|view| view.abandoned(&context.lease));
            let renewer = context.lease_watcher.renewer();
            let taken = HeldLease::take(renewer, &context.lease, context.node, ttl, abandoned, metrics).await;
            match taken {
                Ok(Some(lease)) => {
                    tracing::info!(
                        projection = context.name,
                        lease = context.lease,
                        epoch = lease.epoch(),
                        "became the owner"
                    );
                    if let Some(term) = &context.options.term {
                        term.set(lease.term());
                    }
                    self.state.acquired(lease);
                    // A request that came while no node was responsible.
                    self.operators.expect_requests();
                    return context.lease_watcher.hint();
                }
                Ok(None) => context.lease_watcher.hint(),
                Err(error) => return self.on_unavailable(&error),
            }
        }
        if self.takeover.read_owner_at <= Instant::now() {
            match self.read_model.checkpoint(&self.key).await {
                Ok(checkpoint) => {
                    self.context.status.send_if_modified(|status| {
                        let known = (status.position, status.generation);
                        status.generation = checkpoint.generation;
                        status.moved_to(checkpoint.position, None);
                        known != (checkpoint.position, checkpoint.generation)
                    });
                    self.measures_from(checkpoint.position);
                    self.date().await;
                }
                // After any error: the owner may fix the cause, for example with a reset.
                Err(error) => return self.schedule_retry(&error),
            }
            self.takeover.read_owner_at = Instant::now() + context.lease_watcher.poll_interval();
        }
        self.show();
        self.retry.succeeded();
        let Takeover { acquire_at, read_owner_at, .. } = self.takeover;
        self.idle(if free { acquire_at.min(read_owner_at) } else { read_owner_at }).await;
    }

    /// Returns whether no other node holds the lease; this node may hold it since before a panic.
    pub(super) fn looks_free(&self) -> bool {
        let view = self.context.lease_watcher.view();
        view.is_some_and(|view| {
            view.owner(&self.context.lease).is_none_or(|owner| owner == self.context.node)
        })
    }

    /// Releases the lease, because another node should own the read model.
    async fn hand_over(&mut self) {
        self.flush().await;
        // The work in progress is dropped first: otherwise a durable consumer would still deliver to
        // this node after another one has begun.
        let Some(lease) = self.state.leave() else { return };
        lease.release().await;
        tracing::info!(
            projection = self.context.name,
            lease = self.context.lease,
            "handed the ownership over to another node"
        );
        self.context.lease_watcher.hint();
        self.forget();
        self.context.status.send_modify(|status| {
            status.epoch = 0;
            status.state = ProjectionState::Standby;
        });
    }

    /// Stops as the owner, because another node is or may be the owner.
    pub(super) fn step_down(&mut self, reason: &str) {
        tracing::warn!(
            projection = self.context.name,
            lease = self.context.lease,
            reason,
            "lost the ownership"
        );
        drop(self.state.leave());
        self.forget();
        self.takeover.leave_alone(self.context.options.lease);
        self.context.lease_watcher.hint();
        self.context.status.send_modify(|status| {
            status.epoch = 0;
            status.state = ProjectionState::Standby;
            status.last_error = Some(reason.to_owned());
        });
    }

    fn forget(&mut self) {
        self.reload();
        self.takeover.read_owner_at = Instant::now();
    }

    /// Reads the checkpoint and, as a new owner, claims it: this fences the previous owner.
    pub(super) async fn load(&mut self) {
        match self.claim().await {
            Ok(Some(checkpoint)) => self.begin_at(checkpoint),
            Ok(None) => {
                self.operators.changes.in_progress = true;
                self.context.lease_watcher.hint();
            }
            Err(error) => self.on_checkpoint_error(error),
        }
    }

    /// Starts from the claimed checkpoint.
    fn begin_at(&mut self, checkpoint: Checkpoint) {
        let shared = self.state.lease().is_some();
        self.state.begin_at(checkpoint);
        self.context.status.send_modify(|status| {
            status.epoch = if shared { checkpoint.epoch } else { 0 };
            status.generation = checkpoint.generation;
            status.moved_to(checkpoint.position, None);
        });
        self.measures_from(checkpoint.position);
    }

    /// Claims the checkpoint; `None` if a node is emptying the read model, unknown to the view so
    /// far.
    async fn claim(&mut self) -> Result<Option<Checkpoint>, Interruption> {
        let TaskConfig { name, layout, role, store, .. } = self.context;
        let key = &self.key.clone();
        let found = self.read_model.checkpoint(key).await?;
        if self.read_model.shared() {
            // After reading the checkpoint: a change of the layout moves it too, so that the
            // compare-and-set below fails.
            let projection = layout.check(self.read_model).await?;
            if role.version(&projection) != Some(self.instance.version) {
                return Err(CheckpointError::Changed { projection: name.clone() }.into());
            }
        }
        // Events written to an external read model during a reset would be lost. After reading the
        // checkpoint, which moves under the order lease.
        if self.outside() && self.context.ordered().await? {
            return Ok(None);
        }
        // I1: another process may have applied events beyond this process's high-water mark. Only a
        // missing event proves that the log lost it. (A start position is an event's position,
        // too.)
        let position = found.position;
        if position > Position::START && store.event_id_at(position).await?.is_none() {
            let head = store.high_water_mark().await?;
            return Err(Interruption::Store(StoreError::Incompatible {
                expected: format!("a log with an event at position {position}, the checkpoint of projection {name}"),
                found: format!("none there, and the end of the log at position {head}"),
                advice: "the event store lost events or was restored from a backup: restore the read model of the same time, or reset the projection".into(),
            }));
        }
        let epoch = match self.state.lease() {
            None => found.epoch,
            Some(lease) => match lease.epoch_above(found.epoch).await? {
                Some(epoch) => epoch,
                None => {
                    let expected = Checkpoint { epoch: lease.epoch(), ..found };
                    return Err(CheckpointError::Stale { key: key.clone(), expected, found }.into());
                }
            },
        };
        // A new version, a reset and a first start begin at the start position.
        let position = found.position.max(self.floor().await?);
        let claimed = Checkpoint { epoch, position, ..found };
        // I3: also without a change: the checkpoint may be visible only because its wait for a
        // standby was cut short. Once this commit is durable, so is the earlier one.
        let open = self.read_model.begin(name, found, None).await?;
        let claim = ProgressWrite::Checkpoint { key: key.clone(), from: found, to: claimed };
        self.read_model.commit(open, vec![claim]).await?;
        Ok(Some(claimed))
    }
}
