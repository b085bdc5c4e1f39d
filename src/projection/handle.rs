use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::checkpoint_store::DynCheckpointStore;
use super::control::{Control, ControlError, Reply};
use super::layout::Layout;
use super::partition::sum;
use super::task_handles::{Grouped, Working};
use super::{ProjectionState, ProjectionStatus, RebuildStatus, WaitError};
use crate::event::{Position, RecordedEvent};
use crate::partition::Partition;
use crate::store::{CheckpointKey, EventStore, Filter, ParkedEvent, ProgressWrite, ReadLog, StoreError};
use crate::supervised::{AskError, StopError};
use crate::time::after;

/// Timeout of [`ProjectionHandle::caught_up_to`].
const CAUGHT_UP: Duration = Duration::from_secs(10);

/// Timeout of a control call.
const CONTROL: Duration = Duration::from_secs(30);

/// First poll interval of the shared checkpoint on a node that does not own the projection.
const SHARED_POLL: Duration = Duration::from_millis(25);

/// Maximum poll interval, reached after a while.
const SLOWEST_POLL: Duration = Duration::from_millis(200);

/// A handle of a running projection. Cheap to clone; dropping it has no effect.
#[derive(Clone)]
pub struct ProjectionHandle {
    pub(super) name: Arc<str>,
    pub(super) layout: Layout,
    /// One task, or one for each partition, in order.
    pub(super) parts: Arc<[Working]>,
    /// As many tasks, or none if the projection cannot be rebuilt.
    pub(super) rebuilds: Arc<[Working]>,
    pub(super) group: Option<Grouped>,
    pub(super) progress: Arc<dyn DynCheckpointStore>,
    pub(super) store: Arc<dyn EventStore>,
}

impl ProjectionHandle {
    /// Returns the projection's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the status on this node.
    pub fn status(&self) -> ProjectionStatus {
        let mut status = match &self.group {
            Some(Grouped { group, .. }) => sum(&group.slots, group.lease_watcher.view().as_deref()),
            None => self.of_all().borrow().clone(),
        };
        // The task was torn down before it could report the end.
        if self.of_all().has_changed().is_err() {
            status.state = ProjectionState::Stopped;
        }
        status
    }

    /// Returns the total status.
    fn of_all(&self) -> &watch::Receiver<ProjectionStatus> {
        match &self.group {
            Some(group) => &group.status,
            None => &self.parts[0].status,
        }
    }

    /// Returns a receiver of the status on this node. Closed after the projection was torn down.
    pub fn watch(&self) -> watch::Receiver<ProjectionStatus> {
        self.of_all().clone()
    }

    /// Waits until everything up to `position` is applied.
    ///
    /// To read your own writes, use the position of a receipt. Timeout: 10 s. Cancel-safe.
    ///
    /// # Errors
    /// As [`caught_up_to_within`](Self::caught_up_to_within).
    pub async fn caught_up_to(&self, position: Position) -> Result<(), WaitError> {
        self.caught_up_to_within(position, CAUGHT_UP).await
    }

    /// Waits as [`caught_up_to`](Self::caught_up_to), with the timeout `patience`. Cancel-safe.
    ///
    /// # Errors
    /// After the timeout, or at once if the projection failed or stopped before `position`.
    pub async fn caught_up_to_within(&self, position: Position, patience: Duration) -> Result<(), WaitError> {
        let name = || self.name.to_string();
        let reached = try_join_all((0..self.count()).map(|part| self.reached(part, position)));
        let waited = timeout_at(after(patience), reached).await;
        waited.map(|reached| reached.map(drop)).unwrap_or_else(|_| {
            let status = self.status();
            let (name, wanted, reached, waited) = (name(), position, status.position, patience);
            // One paused partition makes the whole wait fail.
            let any = |state| {
                self.parts.iter().any(|part| {
                    let part = part.status.borrow();
                    part.state == state && part.position < position
                })
            };
            Err(if any(ProjectionState::Paused) {
                WaitError::Paused { name, wanted, reached, waited }
            } else if any(ProjectionState::Waiting) {
                WaitError::NotTriggered { name, wanted, reached, waited }
            } else {
                WaitError::TimedOut { name, wanted, reached, waited }
            })
        })
    }

    /// Returns the partition with this index.
    fn partition(&self, part: u16) -> Option<Partition> {
        self.group.as_ref().map(|group| group.group.slots[usize::from(part)].partition)
    }

    /// Returns the key of the checkpoint of a partition.
    fn key(&self, part: u16) -> CheckpointKey {
        self.layout.key(self.partition(part), self.parts[usize::from(part)].status.borrow().version)
    }

    async fn reached(&self, part: u16, position: Position) -> Result<(), WaitError> {
        let mut status = self.parts[usize::from(part)].status.clone();
        let mut poll = SHARED_POLL;
        loop {
            let (state, cached, ended) = {
                let status = status.borrow_and_update();
                // Before the checkpoint is read, the position is START and says nothing. The
                // position of a refused checkpoint (`fits` is false) says nothing either.
                let known = status.fits && (status.located || status.position > Position::START);
                let name = self.name.to_string();
                let ended = match status.state {
                    ProjectionState::Failed => {
                        let error = status.last_error.clone().unwrap_or_default();
                        Some(WaitError::Failed { name, reached: status.position, error })
                    }
                    ProjectionState::Stopped => Some(WaitError::Stopped { name }),
                    _ => None,
                };
                (status.state, (known && status.position >= position).then_some(status.generation), ended)
            };
            if let Some(generation) = cached
                && self.is_current(part, generation).await
            {
                return Ok(());
            }
            if let Some(error) = ended {
                return Err(error);
            }
            tokio::select! {
                changed = status.changed() => if changed.is_err() {
                    return Err(WaitError::Stopped { name: self.name.to_string() });
                },
                // The owner's progress reaches this node only through the checkpoint.
                () = sleep(poll), if cached.is_some() || state == ProjectionState::Standby => {
                    poll = (poll * 5 / 4).min(SLOWEST_POLL);
                    // A failed read is repeated: the wait has a timeout.
                    if state == ProjectionState::Standby
                        && self.progress.checkpoint(&self.key(part)).await.is_ok_and(|found| found.position >= position)
                    {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Returns whether the read model was not reset since its checkpoint had this generation.
    ///
    /// Another node may have reset a shared read model; this node notices only within 1 s. The
    /// stored position proves nothing: it is below the applied one until the checkpoint is written.
    async fn is_current(&self, part: u16, generation: u64) -> bool {
        !self.progress.shared()
            || self
                .progress
                .checkpoint(&self.key(part))
                .await
                .is_ok_and(|found| found.generation == generation)
    }

    /// Waits until everything that is in the log now is applied.
    ///
    /// Timeout: `patience`. Cancel-safe.
    ///
    /// # Errors
    /// As [`caught_up_to_within`](Self::caught_up_to_within), and if the store cannot be read.
    pub async fn wait_until_caught_up(&self, patience: Duration) -> Result<(), WaitError> {
        let deadline = after(patience);
        let head = self.store.high_water_mark().await?;
        self.caught_up_to_within(head, deadline.saturating_duration_since(Instant::now())).await
    }

    /// Pauses the projection until it is resumed, on all nodes, also after a restart.
    ///
    /// Other nodes notice within 1 s.
    ///
    /// # Errors
    /// If the store cannot record the pause, or the projection does not answer within 30 s.
    pub async fn pause(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Pause).await?;
        self.ask_others(|reply| Control::Paused(true, reply)).await
    }

    /// Resumes the projection on all nodes. A failed projection retries.
    ///
    /// Other nodes notice within 1 s.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Resume).await?;
        self.ask_others(|reply| Control::Paused(false, reply)).await
    }

    /// Empties the read model, deletes parked events, and applies the log from its start.
    ///
    /// See [`Projection::reset`](super::Projection::reset). Works from any node, in one transaction
    /// if the read model has transactions. Works also if the read model belongs to another event
    /// store, is ahead of the log, or has another number of partitions. A failed projection
    /// retries, a paused one stays paused, and a [triggered](super::Schedule::Manual) one waits for
    /// the next trigger. Owners on other nodes notice within 1 s; until then, their status is old.
    ///
    /// # Errors
    /// If the projection has no reset, or another node resets it: nothing was changed. If the reset
    /// fails on a read model with transactions, nothing was changed either. On an
    /// [`AtLeastOnce`](super::AtLeastOnce) read model, the remaining data is then unknown, and the log is
    /// applied once more. Otherwise as [`pause`](Self::pause).
    pub async fn reset(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Reset).await?;
        self.ask_others(Control::BeginAnew).await
    }

    /// Applies the events that the [schedule](super::Schedule) holds back, without waiting for it.
    ///
    /// Covers everything in the log at the time when its owners notice, which is within 1 s. To
    /// begin from the start of the log, call [`reset`](Self::reset) first.
    ///
    /// The end of the log is recorded in the event store as the target. With
    /// [`Schedule::Manual`](super::Schedule::Manual), the projection reaches this target even if
    /// its owners change, unless it is reset. In memory, every node applies up to the target, also
    /// a node that starts later; a node that was reset since does not.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub async fn trigger(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Trigger).await
    }

    /// [Triggers](Self::trigger) the projection if a waiting event matches `filter`.
    ///
    /// Returns whether an event matched. The filter decides only whether to trigger: events in
    /// between are applied as well, because they could not be applied later.
    ///
    /// # Errors
    /// As [`trigger`](Self::trigger), and if the filter is invalid, or a read fails.
    pub async fn trigger_if(&self, filter: Filter) -> Result<bool, ControlError> {
        self.prepared().await?;
        let mut after = None;
        for part in 0..self.count() {
            let position = self.progress.checkpoint(&self.key(part)).await?.position;
            after = Some(after.map_or(position, |after: Position| after.min(position)));
        }
        let mut after = after.unwrap_or_default();
        loop {
            let read = ReadLog::after(after).filter(filter.clone()).limit(1);
            let page = self.store.read_log(read).await?;
            if !page.events.is_empty() {
                self.trigger().await?;
                return Ok(true);
            }
            if !page.has_more() {
                return Ok(false);
            }
            after = page.scanned_to;
        }
    }

    /// Rebuilds the read model beside the live one, in its next [version](super::BuildTarget::version).
    ///
    /// Works from any node, and continues after the death of the node that builds. After catch-up,
    /// the new version replaces the live one in one step (see
    /// [`Projection::cut_over`](super::Projection::cut_over)). The application drops the old tables.
    /// If a rebuild is already in progress, the call has no effect.
    /// [`rebuilding`](Self::rebuilding) reports the progress.
    ///
    /// # Errors
    /// If the projection was not registered [by target](super::PerTarget), or cannot create the new
    /// version's tables ([`Projection::reset`](super::Projection::reset)). Otherwise as
    /// [`pause`](Self::pause).
    pub async fn rebuild(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Rebuild).await
    }

    /// Cancels a rebuild beside the live read model.
    ///
    /// Works from any node, regardless of the node that builds and whether it lives. All tasks stop
    /// writing to the version, and its data is dropped
    /// ([`Projection::drop_version`](super::Projection::drop_version)). A later [`rebuild`](Self::rebuild)
    /// builds that version from the start of the log. Without a rebuild, the call only drops
    /// left-over data. A version that was cut over at the same moment stays live.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild). If only the drop failed, the rebuild is cancelled
    /// nevertheless; a second call drops the data.
    pub async fn cancel_rebuild(&self) -> Result<(), ControlError> {
        self.ask(0, Control::CancelRebuild).await
    }

    /// Returns the progress of a rebuild, as far as this node knows; `None` if there is none.
    pub fn rebuilding(&self) -> Option<RebuildStatus> {
        let parts: Vec<_> = self.rebuilds.iter().map(|part| part.status.borrow().clone()).collect();
        RebuildStatus::of(&parts)
    }

    /// Returns all tasks of the projection.
    fn all(&self) -> impl Iterator<Item = &Working> {
        self.parts.iter().chain(&*self.rebuilds)
    }

    /// Returns at most `limit` parked events, oldest first. Works from any node.
    ///
    /// # Errors
    /// If the read model cannot be read; [`Unavailable`](ControlError::Unavailable) if it is not
    /// prepared within 30 s, or the projection failed or stopped before that.
    pub async fn parked(&self, limit: usize) -> Result<Vec<ParkedEvent>, ControlError> {
        self.prepared().await?;
        let mut parked = Vec::new();
        for key in self.live_keys().await? {
            parked.extend(self.progress.parked(&key, limit).await?);
        }
        parked.sort_by_key(|event| event.position);
        parked.truncate(limit);
        Ok(parked)
    }

    /// Applies a parked event and deletes it from the parked events in the same transaction.
    ///
    /// Works from any node.
    ///
    /// # Errors
    /// If there is no such event, or it still fails: it then stays parked. Otherwise as
    /// [`pause`](Self::pause).
    pub async fn retry_parked(&self, position: Position) -> Result<(), ControlError> {
        let event = self.event(position).await?;
        let part = match &self.group {
            Some(_) => Partition::of(&event.stream, self.count()).index(),
            None => 0,
        };
        self.ask(part, |reply| Control::RetryParked(Box::new(event), reply)).await
    }

    async fn event(&self, position: Position) -> Result<RecordedEvent, ControlError> {
        let not_parked = || ControlError::NotParked { name: self.name.to_string(), position };
        let before = Position::new(position.get().checked_sub(1).ok_or_else(not_parked)?);
        let page = self.store.read_log(ReadLog::after(before).upto(position).limit(1)).await?;
        page.events.into_iter().find(|event| event.position == position).ok_or_else(not_parked)
    }

    /// Returns the checkpoints of the live version, of which this node may not know yet.
    async fn live_keys(&self) -> Result<Vec<CheckpointKey>, StoreError> {
        let live = self.progress.projection(&self.name).await?.live_version;
        Ok(self.layout.keys(live).collect())
    }

    fn count(&self) -> u16 {
        u16::try_from(self.parts.len()).unwrap_or(u16::MAX)
    }

    /// Deletes a parked event permanently. Works from any node.
    ///
    /// # Errors
    /// If there is no such event, or the read model cannot be written.
    pub async fn discard_parked(&self, position: Position) -> Result<(), ControlError> {
        self.prepared().await?;
        for key in self.live_keys().await? {
            if self.progress.write(&self.name, ProgressWrite::Unpark { key, position }).await? {
                return Ok(());
            }
        }
        Err(ControlError::NotParked { name: self.name.to_string(), position })
    }

    /// Waits until the read model can be read, right after the start.
    async fn prepared(&self) -> Result<(), ControlError> {
        let mut status = self.of_all().clone();
        let done = |status: &ProjectionStatus| {
            status.prepared || matches!(status.state, ProjectionState::Failed | ProjectionState::Stopped)
        };
        if let Ok(Ok(status)) = timeout(CONTROL, status.wait_for(done)).await
            && status.prepared
        {
            return Ok(());
        }
        let error = self.status().last_error;
        let reason = format!("its read model is not prepared: {}", error.as_deref().unwrap_or("no answer"));
        Err(ControlError::Unavailable { name: self.name.to_string(), reason })
    }

    /// Saves the checkpoint, releases the lease and stops; without saving after `patience`.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        let group = async {
            match &self.group {
                Some(group) => group.actor.stop(patience).await,
                None => Ok(()),
            }
        };
        let parts = join_all(self.all().map(|part| part.actor.stop(patience)));
        let (group, parts) = tokio::join!(group, parts);
        parts.into_iter().chain([group]).collect()
    }

    /// Stops as a crash of the process would.
    #[cfg(feature = "testing")]
    pub(crate) fn kill(&self) {
        for part in self.all() {
            part.actor.kill();
        }
        if let Some(group) = &self.group {
            group.actor.kill();
        }
    }

    /// Sends a control message to all partitions except the first, which has done the shared work.
    async fn ask_others(&self, control: impl Fn(Reply) -> Control) -> Result<(), ControlError> {
        try_join_all((1..self.count()).map(|part| self.ask(part, &control))).await.map(drop)
    }

    async fn ask(&self, part: u16, control: impl FnOnce(Reply) -> Control) -> Result<(), ControlError> {
        let name = || self.name.to_string();
        let part = &self.parts[usize::from(part)];
        part.actor.ask(control, CONTROL).await.unwrap_or_else(|error| {
            Err(match error {
                AskError::Overloaded => ControlError::Overloaded { name: name() },
                AskError::TimedOut => ControlError::TimedOut { name: name(), waited: CONTROL },
                AskError::Ended => ControlError::Stopped { name: name() },
            })
        })
    }
}

impl fmt::Debug for ProjectionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProjectionHandle").field("name", &self.name).field("status", &self.status()).finish()
    }
}
