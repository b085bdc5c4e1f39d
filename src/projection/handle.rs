use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::control::{Control, ControlError, Reply};
use super::group::{Group, Never, sum};
use super::progress::Progress;
use super::shape::Shape;
use super::{ProjectionState, ProjectionStatus, RebuildStatus, WaitError};
use crate::event::{Position, RecordedEvent};
use crate::partition::Partition;
use crate::store::{EventStore, Filter, ParkedEvent, ReadLog, StoreError};
use crate::supervised::{AskError, StopError, Supervised};
use crate::time::after;

/// How long [`ProjectionHandle::caught_up_to`] waits.
const CAUGHT_UP: Duration = Duration::from_secs(10);

/// How long a control call waits for the projection to come to it.
const CONTROL: Duration = Duration::from_secs(30);

/// How often somebody who waits on a node that does not own the projection looks at the shared checkpoint.
const SHARED_POLL: Duration = Duration::from_millis(25);

/// How often after a while.
const SLOWEST_POLL: Duration = Duration::from_millis(200);

/// A running projection. Cheap to clone; dropping it changes nothing.
#[derive(Clone)]
pub struct ProjectionHandle {
    pub(super) name: Arc<str>,
    pub(super) shape: Shape,
    /// One, or one for each partition, in order.
    pub(super) parts: Arc<[Working]>,
    /// As many, or none if it cannot be rebuilt beside the live one.
    pub(super) rebuilds: Arc<[Working]>,
    pub(super) group: Option<Grouped>,
    pub(super) progress: Arc<dyn Progress>,
    pub(super) store: Arc<dyn EventStore>,
}

/// What works on a projection, or on a partition of one.
pub(super) struct Working {
    pub(super) actor: Supervised<Control>,
    pub(super) status: watch::Receiver<ProjectionStatus>,
}

/// What holds the partitions together.
#[derive(Clone)]
pub(super) struct Grouped {
    pub(super) group: Arc<Group>,
    pub(super) actor: Supervised<Never>,
    /// Of all partitions.
    pub(super) status: watch::Receiver<ProjectionStatus>,
}

impl ProjectionHandle {
    /// The projection's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is doing on this node.
    pub fn status(&self) -> ProjectionStatus {
        let mut status = match &self.group {
            Some(Grouped { group, .. }) => sum(&group.seats, group.board.view().as_deref()),
            None => self.of_all().borrow().clone(),
        };
        // Torn down: it had no chance to say so.
        if self.of_all().has_changed().is_err() {
            status.state = ProjectionState::Stopped;
        }
        status
    }

    /// Of the whole.
    fn of_all(&self) -> &watch::Receiver<ProjectionStatus> {
        match &self.group {
            Some(group) => &group.status,
            None => &self.parts[0].status,
        }
    }

    /// How it is doing on this node, whenever that changes. Closed when it was torn down.
    pub fn watch(&self) -> watch::Receiver<ProjectionStatus> {
        self.of_all().clone()
    }

    /// Waits until everything up to `position` is applied, for at most 10 s: read your own writes with the position of a
    /// receipt. Cancel-safe.
    ///
    /// # Errors
    /// As [`caught_up_to_within`](Self::caught_up_to_within).
    pub async fn caught_up_to(&self, position: Position) -> Result<(), WaitError> {
        self.caught_up_to_within(position, CAUGHT_UP).await
    }

    /// As [`caught_up_to`](Self::caught_up_to), for at most `patience`.
    ///
    /// # Errors
    /// When the time is over, or at once when the projection stands still before `position` because it failed or ended.
    pub async fn caught_up_to_within(&self, position: Position, patience: Duration) -> Result<(), WaitError> {
        let name = || self.name.to_string();
        let reached = try_join_all((0..self.count()).map(|part| self.reached(part, position)));
        let waited = timeout_at(after(patience), reached).await;
        waited.map(|reached| reached.map(drop)).unwrap_or_else(|_| {
            let status = self.status();
            let (name, wanted, reached, waited) = (name(), position, status.position, patience);
            // In partitions, one that is paused is enough to wait for.
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

    /// Which part of the projection it is.
    fn partition(&self, part: u16) -> Option<Partition> {
        self.group.as_ref().map(|group| group.group.seats[usize::from(part)].partition)
    }

    /// What the checkpoint of a part is called.
    fn row(&self, part: u16) -> String {
        self.shape.row(self.partition(part), self.parts[usize::from(part)].status.borrow().version)
    }

    async fn reached(&self, part: u16, position: Position) -> Result<(), WaitError> {
        let mut status = self.parts[usize::from(part)].status.clone();
        let mut poll = SHARED_POLL;
        loop {
            let state = {
                let status = status.borrow_and_update();
                if status.position >= position {
                    return Ok(());
                }
                let name = self.name.to_string();
                match status.state {
                    ProjectionState::Failed => {
                        let error = status.last_error.clone().unwrap_or_default();
                        return Err(WaitError::Failed { name, reached: status.position, error });
                    }
                    ProjectionState::Stopped => return Err(WaitError::Stopped { name }),
                    state => state,
                }
            };
            tokio::select! {
                changed = status.changed() => if changed.is_err() {
                    return Err(WaitError::Stopped { name: self.name.to_string() });
                },
                // The owner's progress reaches this node through the checkpoint only.
                () = sleep(poll), if state == ProjectionState::Standby => {
                    poll = (poll * 5 / 4).min(SLOWEST_POLL);
                    // What cannot be read now is read later: the wait has an end.
                    if self.progress.checkpoint(&self.row(part)).await.is_ok_and(|found| found.position >= position) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Waits until everything is applied that is in the log now, for at most `patience`. Cancel-safe.
    ///
    /// # Errors
    /// As [`caught_up_to_within`](Self::caught_up_to_within), and when the store cannot be asked.
    pub async fn wait_until_live(&self, patience: Duration) -> Result<(), WaitError> {
        let deadline = after(patience);
        let head = self.store.frontier().await?;
        self.caught_up_to_within(head, deadline.saturating_duration_since(Instant::now())).await
    }

    /// Stands still from now on: on all nodes (others notice within a second), also after a restart, until it is resumed.
    ///
    /// # Errors
    /// When the store cannot remember it, or the projection does not answer within 30 s.
    pub async fn pause(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Pause).await?;
        self.tell_others(|reply| Control::Paused(true, reply)).await
    }

    /// Goes on, on all nodes (others notice within a second). A projection that failed tries again.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Resume).await?;
        self.tell_others(|reply| Control::Paused(false, reply)).await
    }

    /// Empties the read model (see [`Projection::reset`](super::Projection::reset)), forgets what is parked, and applies the log from its start: all
    /// in one transaction where the read model has them, from any node. Also when the read model belongs to another event
    /// store, is ahead of the log, or was built in another number of partitions. A failed projection tries again; a paused one
    /// stays paused; one that is [triggered](super::Schedule::Manual) waits for the next trigger. The owners, if others, notice within
    /// a second; until then their status is of before.
    ///
    /// # Errors
    /// When the projection has no reset, or another node is at it: then nothing was changed. Nor when its reset fails, where the
    /// read model has transactions; to an [`External`](super::External) one, of which nobody knows then what is left, the log is applied
    /// once more. Otherwise as [`pause`](Self::pause).
    pub async fn reset(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Reset).await?;
        self.tell_others(Control::BeginAnew).await
    }

    /// Applies now what its [schedule](super::Schedule) would have wait: everything that is in the log by the time that its owners
    /// hear of it, which is within a second. To begin from the start of the log, [`reset`](Self::reset) it before.
    ///
    /// How far the log goes now is kept in the event store, and with [`Schedule::Manual`](super::Schedule::Manual) so far it goes,
    /// whatever becomes of its owners, until it is reset. In memory every node goes so far, also one that starts later; but not the
    /// one that was reset since.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub async fn trigger(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Trigger).await
    }

    /// [Triggers](Self::trigger) it if something waits for it that matches `filter`; whether that is so. The filter decides whether,
    /// and not what: what lies between is applied as well, since what is passed over would never be.
    ///
    /// # Errors
    /// As [`trigger`](Self::trigger), and when the read model or the log cannot be read.
    pub async fn trigger_for(&self, filter: Filter) -> Result<bool, ControlError> {
        self.prepared().await?;
        let mut after = None;
        for part in 0..self.count() {
            let position = self.progress.checkpoint(&self.row(part)).await?.position;
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

    /// Builds the read model anew beside the live one, in its next [version](super::Target::version): from any node, also after
    /// the node that does it has died. When it has caught up it takes the place of the live one at once (see
    /// [`Projection::go_live`](super::Projection::go_live)); the tables of the old one stay, and are yours to drop. Nothing happens if one is being built
    /// already; [`rebuilding`](Self::rebuilding) tells how it is getting on.
    ///
    /// # Errors
    /// When the projection was not registered as rebuildable or partitioned, or cannot create the new version's tables
    /// ([`Projection::reset`](super::Projection::reset)). Otherwise as [`pause`](Self::pause).
    pub async fn rebuild(&self) -> Result<(), ControlError> {
        self.ask(0, Control::Rebuild).await
    }

    /// Gives up a rebuild beside the live read model: from any node, whichever one does it, and whether that one lives. Nobody
    /// writes to the version that was being built any more, and what it has is dropped ([`Projection::discard`](super::Projection::discard)); a
    /// later [`rebuild`](Self::rebuild) builds that version from the start of the log. Nothing else happens if none is being built: a
    /// rebuild that was put in place at the same moment stays there.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild). When only the dropping failed, the rebuild is over nevertheless; a second call drops it.
    pub async fn cancel_rebuild(&self) -> Result<(), ControlError> {
        self.ask(0, Control::CancelRebuild).await
    }

    /// How a rebuild beside the live read model is getting on, as far as this node knows; `None` when there is none.
    pub fn rebuilding(&self) -> Option<RebuildStatus> {
        let parts: Vec<_> = self.rebuilds.iter().map(|part| part.status.borrow().clone()).collect();
        RebuildStatus::of(&parts)
    }

    /// Everything that works on it.
    fn all(&self) -> impl Iterator<Item = &Working> {
        self.parts.iter().chain(&*self.rebuilds)
    }

    /// The parked events, oldest first, at most `limit`. From any node.
    ///
    /// # Errors
    /// When the read model cannot be read.
    pub async fn parked(&self, limit: usize) -> Result<Vec<ParkedEvent>, StoreError> {
        self.prepared().await?;
        let mut parked = Vec::new();
        for row in self.live_rows().await? {
            parked.extend(self.progress.parked(&row, limit).await?);
        }
        parked.sort_by_key(|event| event.position);
        parked.truncate(limit);
        Ok(parked)
    }

    /// Applies a parked event after all, and forgets that it was parked in the same transaction. From any node.
    ///
    /// # Errors
    /// When there is none, or the event still fails: it stays parked then. Otherwise as [`pause`](Self::pause).
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

    /// The checkpoints of the version that is live, which this node may not have heard of yet.
    async fn live_rows(&self) -> Result<Vec<String>, StoreError> {
        let live = self.progress.versions(&self.shape).await?.live;
        Ok(self.shape.parts().map(|part| self.shape.row(part, live)).collect())
    }

    fn count(&self) -> u16 {
        u16::try_from(self.parts.len()).unwrap_or(u16::MAX)
    }

    /// Forgets a parked event for good. From any node.
    ///
    /// # Errors
    /// When there is none, or the read model cannot be written.
    pub async fn discard_parked(&self, position: Position) -> Result<(), ControlError> {
        self.prepared().await?;
        for row in self.live_rows().await? {
            if self.progress.remove_parked(&row, position).await? {
                return Ok(());
            }
        }
        Err(ControlError::NotParked { name: self.name.to_string(), position })
    }

    /// Waits until the read model can be read, right after the start.
    async fn prepared(&self) -> Result<(), StoreError> {
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
        let reason = format!(
            "the read model of projection {} is not prepared: {}",
            self.name,
            error.as_deref().unwrap_or("it does not answer")
        );
        Err(StoreError::Unavailable { reason, source: None })
    }

    /// Saves the checkpoint, gives the lease back and ends; or ends without, when `patience` is over.
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

    /// Ends as a crash of the process would end it.
    #[cfg(feature = "testing")]
    pub(crate) fn kill(&self) {
        for part in self.all() {
            part.actor.kill();
        }
        if let Some(group) = &self.group {
            group.actor.kill();
        }
    }

    /// Tells all partitions but the first, which has done what was to be done for all.
    async fn tell_others(&self, control: impl Fn(Reply) -> Control) -> Result<(), ControlError> {
        try_join_all((1..self.count()).map(|part| self.ask(part, &control))).await.map(drop)
    }

    async fn ask(&self, part: u16, control: impl FnOnce(Reply) -> Control) -> Result<(), ControlError> {
        let name = || self.name.to_string();
        let part = &self.parts[usize::from(part)];
        part.actor.ask(control, CONTROL).await.unwrap_or_else(|error| {
            Err(match error {
                AskError::Overloaded => ControlError::Overloaded { name: name() },
                AskError::TimedOut => ControlError::TimedOut { name: name(), waited: CONTROL },
                AskError::Gone => ControlError::Stopped { name: name() },
            })
        })
    }
}

impl fmt::Debug for ProjectionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProjectionHandle").field("name", &self.name).field("status", &self.status()).finish()
    }
}
