use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ractor::SpawnErr;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::control::{Control, ControlError, Reply};
use super::worker::{ProjectionWork, Surroundings, row};
use super::{Projection, ProjectionOptions, ProjectionState, ProjectionStatus, ReadModel};
use crate::event::Position;
use crate::store::{BoxFuture, Checkpoint, EventStore, Filter, ParkedEvent, StoreError};
use crate::supervised::{AskError, StopError, Supervised};
use crate::time::after;

/// How long [`ProjectionHandle::caught_up_to`] waits.
const CAUGHT_UP: Duration = Duration::from_secs(10);

/// How long a control call waits for the projection to come to it.
const CONTROL: Duration = Duration::from_secs(30);

/// How often somebody who waits on a node that does not own the projection looks at the shared checkpoint.
const SHARED_POLL: Duration = Duration::from_millis(25);

/// A running projection. Cheap to clone; dropping it changes nothing.
#[derive(Clone)]
pub struct ProjectionHandle {
    name: Arc<str>,
    /// What its checkpoint is called.
    row: Arc<str>,
    actor: Supervised<Control>,
    status: watch::Receiver<ProjectionStatus>,
    progress: Arc<dyn Progress>,
    store: Arc<dyn EventStore>,
}

/// Why a projection has not applied what somebody waits for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// It may still do so. This says nothing about the command that wrote the event.
    #[error("projection {name} has not come to position {wanted} within {waited:?}; it is at {reached}")]
    TimedOut {
        /// The projection.
        name: String,
        /// What was waited for.
        wanted: Position,
        /// How far it was.
        reached: Position,
        /// How long was waited.
        waited: Duration,
    },
    /// It stands still before it, on this node, until somebody acts.
    #[error("projection {name} failed at position {reached}: {error}")]
    Failed {
        /// The projection.
        name: String,
        /// How far it was.
        reached: Position,
        /// What went wrong.
        error: String,
    },
    /// It was stopped, and the runtime with it.
    #[error("projection {name} has ended")]
    Stopped {
        /// The projection.
        name: String,
    },
    /// The end of the log could not be found out.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a handle needs of a read model, whatever its transactions are.
trait Progress: Send + Sync {
    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;
    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;
    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;
}

impl<R: ReadModel> Progress for R {
    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        ReadModel::checkpoint(self, name)
    }

    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        ReadModel::parked(self, name, limit)
    }

    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        ReadModel::remove_parked(self, name, position)
    }
}

/// Starts a projection. Reaches store and read model in the background, for as long as it takes.
pub(crate) async fn spawn<P, R>(
    projection: P,
    filter: Filter,
    read_model: R,
    options: ProjectionOptions,
    surroundings: Surroundings,
) -> Result<ProjectionHandle, SpawnErr>
where
    P: Projection,
    R: ReadModel<Transaction = P::Transaction>,
{
    let name = Arc::from(projection.name());
    let row = Arc::from(row(projection.name()));
    let read_model = Arc::new(read_model);
    let Surroundings { store, supervisor, .. } = surroundings.clone();
    let (work, status) = ProjectionWork::new(projection, filter, read_model.clone(), options, surroundings);
    let actor = Supervised::spawn(work, supervisor).await?;
    Ok(ProjectionHandle { name, row, actor, status, progress: read_model, store })
}

impl ProjectionHandle {
    /// The projection's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is doing on this node.
    pub fn status(&self) -> ProjectionStatus {
        let mut status = self.status.borrow().clone();
        // Torn down: it had no chance to say so.
        if self.status.has_changed().is_err() {
            status.state = ProjectionState::Stopped;
        }
        status
    }

    /// How it is doing on this node, whenever that changes. Closed when it was torn down.
    pub fn watch(&self) -> watch::Receiver<ProjectionStatus> {
        self.status.clone()
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
        let waited = timeout_at(after(patience), self.reached(position)).await;
        waited.unwrap_or_else(|_| {
            let reached = self.status.borrow().position;
            Err(WaitError::TimedOut { name: name(), wanted: position, reached, waited: patience })
        })
    }

    async fn reached(&self, position: Position) -> Result<(), WaitError> {
        let mut status = self.status.clone();
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
                () = sleep(SHARED_POLL), if state == ProjectionState::Standby => {
                    // What cannot be read now is read later: the wait has an end.
                    if self.progress.checkpoint(&self.row).await.is_ok_and(|found| found.position >= position) {
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
        self.ask(Control::Pause).await
    }

    /// Goes on, on all nodes. A projection that failed on this node tries again.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.ask(Control::Resume).await
    }

    /// Empties the read model (see [`Projection::reset`]), forgets what is parked, and applies the log from its start: all
    /// in one transaction, on the node that owns it. Also when the read model belongs to another event store, or is ahead of
    /// the log. A failed projection tries again; a paused one stays paused.
    ///
    /// # Errors
    /// When this node does not own the read model, or the projection refuses: then nothing was changed. Otherwise as
    /// [`pause`](Self::pause).
    pub async fn reset(&self) -> Result<(), ControlError> {
        self.ask(Control::Reset).await
    }

    /// The parked events, oldest first, at most `limit`. From any node.
    ///
    /// # Errors
    /// When the read model cannot be read.
    pub async fn parked(&self, limit: usize) -> Result<Vec<ParkedEvent>, StoreError> {
        self.prepared().await?;
        self.progress.parked(&self.row, limit).await
    }

    /// Applies a parked event after all, and forgets that it was parked in the same transaction.
    ///
    /// # Errors
    /// When there is none, this node does not own the read model, or the event still fails: it stays parked then. Otherwise
    /// as [`pause`](Self::pause).
    pub async fn retry_parked(&self, position: Position) -> Result<(), ControlError> {
        self.ask(|reply| Control::RetryParked(position, reply)).await
    }

    /// Forgets a parked event for good. From any node.
    ///
    /// # Errors
    /// When there is none, or the read model cannot be written.
    pub async fn discard_parked(&self, position: Position) -> Result<(), ControlError> {
        self.prepared().await?;
        if self.progress.remove_parked(&self.row, position).await? {
            return Ok(());
        }
        Err(ControlError::NotParked { name: self.name.to_string(), position })
    }

    /// Waits until the read model can be read, right after the start.
    async fn prepared(&self) -> Result<(), StoreError> {
        let mut status = self.status.clone();
        let done = |status: &ProjectionStatus| {
            status.prepared || matches!(status.state, ProjectionState::Failed | ProjectionState::Stopped)
        };
        if let Ok(Ok(status)) = timeout(CONTROL, status.wait_for(done)).await
            && status.prepared
        {
            return Ok(());
        }
        let error = self.status.borrow().last_error.clone();
        let reason = format!(
            "the read model of projection {} is not prepared: {}",
            self.name,
            error.as_deref().unwrap_or("it does not answer")
        );
        Err(StoreError::Unavailable { reason, source: None })
    }

    /// Saves the checkpoint, gives the lease back and ends; or ends without, when `patience` is over.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        self.actor.stop(patience).await
    }

    /// Ends as a crash of the process would end it.
    pub(crate) fn kill(&self) {
        self.actor.kill();
    }

    async fn ask(&self, control: impl FnOnce(Reply) -> Control) -> Result<(), ControlError> {
        let name = || self.name.to_string();
        self.actor.ask(control, CONTROL).await.unwrap_or_else(|error| {
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
