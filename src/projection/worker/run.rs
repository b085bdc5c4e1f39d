//! Runs a task: does the next due step, handles messages between steps, and ticks.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::operators::Pause;
use super::reading::{Pending, Source};
use super::state::{Activity, Owning, State};
use super::task::{Preparation, ProjectionTask};
use super::wait::{WaitOutcome, wait_for_input};
use crate::lease::HeldLease;
use crate::partition::Partition;
use crate::projection::interruption::Interruption;
use crate::projection::layout::Role;
use crate::projection::{Projection, ReadModel};
use crate::store::{Checkpoint, ProgressWrite};
use crate::telemetry::trace;

/// Interval of saving a checkpoint that moved only over events of other projections.
const TICK: Duration = Duration::from_secs(1);

/// The same interval for a partition.
///
/// Shorter, because another node may wait for all partitions, most of which the events do not
/// concern.
const PARTITION_TICK: Duration = Duration::from_millis(200);

/// Minimum of that interval for each partition of a projection.
///
/// The partitions of a node share one database.
const PARTITION_SHARE: Duration = Duration::from_millis(4);

/// Poll interval of the head of the log until it is known.
const HEAD_TICK: Duration = Duration::from_millis(50);

/// Time limit at the shutdown for the current transaction or operator request.
const STOPPING: Duration = Duration::from_secs(5);

const LOST: &str = "the lease was lost, or was not renewed in time";

/// Waits for the loss; never returns if there is no lease. Cancel-safe.
async fn lost(loss: Option<impl Future<Output = ()>>) {
    match loss {
        Some(loss) => loss.await,
        None => std::future::pending().await,
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    pub(super) async fn run(mut self) {
        let stopping = self.inbox.stop_signal();
        let in_order = tokio::select! {
            biased;
            () = self.work() => true,
            () = async {
                stopping.await;
                sleep(STOPPING).await;
            } => false,
        };
        if in_order {
            // As for any transaction: a hung read model must not delay the shutdown of its node.
            let flushed = timeout(STOPPING, self.flush()).await;
            if flushed.is_err() {
                tracing::warn!(projection = self.context.name, "could not write the last checkpoint in time");
            }
            self.last_snapshot().await;
        } else {
            tracing::warn!(
                projection = self.context.name, limit = ?STOPPING,
                "aborted the work in progress at the shutdown: time limit exceeded; it is repeated after the next start"
            );
        }
        self.give_up_switching().await;
        for lease in [self.state.leave(), self.takeover.released.take()].into_iter().flatten() {
            lease.release().await;
        }
    }

    /// Works until the task must end.
    async fn work(&mut self) {
        while !self.inbox.is_stopping() {
            if self.news.has_changed() {
                self.process_lease_view().await;
            }
            if self.tick_at <= Instant::now() {
                self.tick().await;
            }
            self.step().await;
        }
    }

    /// Does the next due step. Short, except for the user's own code.
    async fn step(&mut self) {
        if let Some(until) = self.retry.waits_until() {
            return self.idle(until).await;
        }
        if let Some(lease) = self.takeover.released.take() {
            lease.release().await;
        }
        if self.operators.changes.in_progress && self.context.role == Role::Live {
            return self.idle(self.tick_at).await;
        }
        // Before the check whether the read model fits, and also if it does not: a reset may make
        // it fit.
        if self.operators.requests.is_due()
            && let Err(error) = self.see_to_requests().await
        {
            self.operators.requests = self.put_off(&error);
        }
        // In the same step: a pause on standby shows the position of the owner, which is read first.
        if let State::Starting { .. } = self.state
            && let Err(interruption) = self.prepare().await
        {
            return self.on_interruption(&interruption);
        }
        match self.state {
            State::Standby => self.stand_by().await,
            State::Claiming { .. } => self.load().await,
            State::Owning(Owning { activity: Activity::Stopped, .. })
            | State::Failed { .. }
            | State::Dormant
            | State::Starting { .. } => {
                self.show();
                self.idle(self.tick_at).await;
            }
            State::Owning(_) => self.own().await,
        }
    }

    /// Does the next due step as the owner.
    async fn own(&mut self) {
        if self.operators.retries.is_due()
            && let Err(error) = self.see_to_retries().await
        {
            self.operators.retries = self.put_off(&error);
        }
        if self.state.owning().is_none() {
            // A retry has found that another version became live.
            return;
        }
        match self.operators.pause {
            Pause::Running => {}
            Pause::Paused => {
                self.state.pause();
                self.show();
                return self.idle(self.tick_at).await;
            }
            Pause::Unknown => return self.idle(self.tick_at).await,
        }
        match self.is_due().await {
            Ok(true) => {}
            Ok(false) => return self.rest().await,
            Err(error) => return self.on_unavailable(&error),
        }
        if self.holds() {
            return self.follow().await;
        }
        // Not below: if the lease is lost there, the work in progress is dropped, which must not be
        // a control call.
        if let Some(due) = self.left_alone() {
            return self.idle(due).await;
        }
        let State::Owning(Owning { saved, activity, .. }) = &mut self.state else { return };
        let Activity::Reading(reading) = activity else { return self.begin_reading().await };
        match (reading.pending.take(), &reading.source) {
            (Some(pending), _) => {
                let saved = *saved;
                self.apply_in_time(saved, pending).await;
            }
            (None, Source::CatchingUp { .. }) => self.read().await,
            (None, Source::Live) => self.follow().await,
        }
    }

    /// Applies pending events. Aborts at the time limit of a transaction or a loss of the lease.
    async fn apply_in_time(&mut self, saved: Checkpoint, pending: Pending) {
        let events = pending.events.iter().take(self.batching.size.get());
        let span = trace::apply(&self.context.name, events.len(), events);
        // If the database hangs longer than the other nodes wait for this one, abort.
        let loss = self.state.lease().map(HeldLease::loss);
        let limit = self.context.options.transaction_timeout;
        tokio::select! {
            biased;
            done = timeout(limit, self.apply_pending(saved, pending).instrument(span)) => {
                if done.is_err() {
                    self.overran(limit);
                }
            }
            () = lost(loss) => self.step_down(LOST),
        }
    }

    /// Ensures that the read model exists and has the right layout, and finds its version.
    async fn prepare(&mut self) -> Result<(), Interruption> {
        self.create().await?;
        let (shared, mut has_version) = (self.read_model.shared(), true);
        if shared {
            let projection = self.context.layout.check(self.read_model).await?;
            has_version = self.find_version(&projection)?;
        }
        self.context.status.send_modify(|status| status.fits = true);
        if has_version {
            self.state.prepared(shared);
        } else if let Some(lease) = self.state.sleep() {
            lease.release().await;
        }
        Ok(())
    }

    pub(super) async fn create(&mut self) -> Result<(), Interruption> {
        if self.preparation == Preparation::Needed {
            self.read_model.prepare(&self.context.store).await?;
            self.empty_memory().await?;
            self.load_snapshot().await?;
            self.preparation = Preparation::Done;
            self.context.status.send_modify(|status| status.prepared = true);
        }
        Ok(())
    }

    /// Waits for control messages, a loss of the lease and news, until a deadline.
    pub(super) async fn idle(&mut self, until: Instant) {
        let until = until.min(self.tick_at);
        let outcome = wait_for_input(
            &mut self.inbox,
            self.state.lease_mut(),
            Some(&mut self.news),
            Some(until),
            std::future::pending::<()>(),
        )
        .await;
        self.attend(outcome).await;
    }

    /// Handles any result other than the input; returns the input.
    pub(super) async fn attend<T>(&mut self, outcome: WaitOutcome<T>) -> Option<T> {
        match outcome {
            WaitOutcome::Input(input) => return Some(input),
            WaitOutcome::Round => {}
            WaitOutcome::News => self.process_lease_view().await,
            WaitOutcome::Control(control) => self.control(control).await,
            WaitOutcome::LeaseLost => self.step_down(LOST),
        }
        None
    }

    /// Does the periodic work.
    async fn tick(&mut self) {
        let others_wait = self.context.partition.is_some() || self.context.role == Role::Rebuild;
        let every = match self.context.status.borrow().head {
            // The lag is unknown until then, although there may be nothing to read.
            None => HEAD_TICK,
            Some(_) if others_wait => {
                let partitions = self.context.partition.map_or(1, Partition::count);
                (PARTITION_SHARE * u32::from(partitions)).clamp(PARTITION_TICK, TICK)
            }
            Some(_) => TICK,
        };
        self.tick_at = Instant::now() + every;
        // The task may have ignored the lease view as too old after its last control call.
        self.process_lease_view().await;
        let loss = self.state.lease().map(HeldLease::loss);
        tokio::select! {
            biased;
            () = async {
                self.flush().await;
                if let Some(head) = self.context.feed.status().position {
                    self.context.knows_of(head);
                }
                if self.state.lease().is_some() || !self.read_model.shared() {
                    self.date().await;
                }
            } => {}
            () = lost(loss) => return self.step_down(LOST),
        }
        if let Some(Owning { applied, activity: Activity::Reading(reading), .. }) = self.state.owning_mut()
            && reading.follower.is_durable()
            && reading.pending.is_none()
            && self.context.feed.position() > *applied
        {
            // The selected events of the bus do not show the end of the log. A page that the partitions
            // share must reach it.
            reading.read_to(self.context.feed.position());
        }
        if self.context.role == Role::Rebuild {
            self.consider_switching().await;
        }
    }

    /// Records the age of the first pending event, which is the oldest unapplied one.
    pub(super) fn waits_since(&self, pending: &Pending) {
        let Some(first) = pending.events.front() else { return };
        self.context.status.send_if_modified(|status| {
            status.knows_of(first.position);
            status.behind_since = Some(first.recorded_at);
            false
        });
    }

    /// Reads the age of the next event, if it stays unread for a while.
    pub(super) async fn date(&mut self) {
        let (position, behind) = {
            let status = self.context.status.borrow();
            (status.position, status.lag().is_some_and(|lag| lag > 0))
        };
        let pending = self.state.reading().is_some_and(|reading| reading.pending.is_some());
        if !behind || pending || self.age_checked_at == Some(position) {
            return;
        }
        match self.context.log.next_recorded_at(position).await {
            Ok(Some(recorded_at)) => {
                self.age_checked_at = Some(position);
                self.context.status.send_if_modified(|status| {
                    status.moved_to(position, Some(recorded_at));
                    false
                });
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(projection = self.context.name, %error, "could not read the age of the next event");
            }
        }
    }

    /// Writes a checkpoint that has moved only over events of other projections.
    pub(super) async fn flush(&mut self) {
        let Some(&Owning { saved, applied, .. }) = self.state.owning() else { return };
        if saved.position >= applied {
            return;
        }
        let to = Checkpoint { position: applied, ..saved };
        let write = ProgressWrite::Checkpoint { key: self.key.clone(), from: saved, to };
        let flushed = match self.read_model.begin(&self.context.name, saved, None).await {
            Ok(open) => self.read_model.commit(open, vec![write]).await,
            Err(error) => Err(error.into()),
        };
        match flushed {
            Ok(()) => {
                if let Some(owning) = self.state.owning_mut() {
                    owning.saved = to;
                }
            }
            Err(error) => self.on_checkpoint_error(error),
        }
    }
}
