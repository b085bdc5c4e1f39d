//! The router of one target: admits commands, and passes them to the target's actor.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use ractor::concurrency::oneshot;
use ractor::{ActorCell, ActorRef, ActorRuntime, ActorStatus, MessagingErr, SpawnErr};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use uuid::Uuid;

use super::admission::Admission;
use super::hooks::{AfterHooks, CommandHooks};
use super::target::{Message, Routed, RoutedCommand, TargetStatus};
use super::{Dispatched, NotExecutedKind};

/// The router of one target.
pub(crate) struct Router<T: Routed> {
    shared: Arc<T::Shared>,
    /// Current actor. A restart replaces it.
    actor: RwLock<ActorRef<Message<T>>>,
    /// Supervisor of the actor. It ends with the node.
    supervisor: ActorCell,
    /// Tokio runtime of the node.
    executor: Handle,
    admission: Admission,
}

fn spawn<T: Routed>(
    shared: &Arc<T::Shared>,
    supervisor: &ActorCell,
) -> Result<ActorRef<Message<T>>, SpawnErr> {
    let actor = T::actor(shared.clone());
    Ok(ActorRuntime::spawn_linked_instant(None, actor, (), supervisor.clone())?.0)
}

impl<T: Routed> Router<T> {
    /// Starts the actor under `supervisor`, in the current tokio runtime.
    pub(crate) fn start(shared: T::Shared, supervisor: ActorCell) -> Result<Self, SpawnErr> {
        let shared = Arc::new(shared);
        let actor = RwLock::new(spawn::<T>(&shared, &supervisor)?);
        let (limit, timeout) = T::limits(&shared);
        let (executor, admission) = (Handle::current(), Admission::new(limit, timeout, T::LIMITED));
        Ok(Self { shared, actor, supervisor, executor, admission })
    }

    /// Returns the current actor.
    pub(crate) fn actor(&self) -> ActorRef<Message<T>> {
        self.actor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Acquires a permit for the command `id`, see [`Admission::admit`].
    pub(super) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, NotExecutedKind> {
        self.admission.admit(id, deadline).await
    }

    /// Passes an admitted command to the actor. `started`: start of the command's duration.
    pub(super) fn submit(
        &self,
        hooks: &CommandHooks,
        command: RoutedCommand<T>,
        permit: OwnedSemaphorePermit,
        started: Instant,
    ) -> Result<Dispatched<T::Answer, T::Error>, NotExecutedKind> {
        let (id, deadline) = (command.id, command.deadline);
        let after = AfterHooks::of(hooks, &command.info());
        let (reply, answer) = oneshot();
        let (message, guard) = T::message(hooks, command, permit, reply)?;
        self.send(message)?;
        let answer = async move {
            let _guard = guard;
            answer.await
        };
        let dispatched = Dispatched::here(id, deadline, started, answer);
        Ok(match after {
            Some(after) => after.over(dispatched),
            None => dispatched,
        })
    }

    fn send(&self, message: Message<T>) -> Result<(), NotExecutedKind> {
        let error = match self.actor().cast(message) {
            Err(MessagingErr::SendErr(message)) => self.restarted().cast(message).err(),
            other => other.err(),
        };
        match error {
            None => Ok(()),
            Some(_) if self.is_running() => Err(NotExecutedKind::Restarting { name: T::NAME }),
            Some(_) => Err(NotExecutedKind::ShuttingDown),
        }
    }

    fn is_running(&self) -> bool {
        !self.admission.is_closing() && self.supervisor.get_status() < ActorStatus::Draining
    }

    /// Returns the current actor. If it has ended and the node runs, starts a new one.
    fn restarted(&self) -> ActorRef<Message<T>> {
        let mut actor = self.actor.write().unwrap_or_else(PoisonError::into_inner);
        if actor.get_status() == ActorStatus::Stopped && self.is_running() {
            tracing::error!(name = T::NAME, "restarting an actor that ended");
            // The caller may run in another tokio runtime, which may end before the node.
            let _executor = self.executor.enter();
            match spawn::<T>(&self.shared, &self.supervisor) {
                Ok(new) => *actor = new,
                Err(error) => tracing::error!(name = T::NAME, %error, "restarting an actor failed"),
            }
        }
        actor.clone()
    }

    pub(super) fn status(&self) -> TargetStatus {
        T::status(&self.shared, self.admission.in_flight())
    }

    /// Stops admission, waits for the commands in flight, and stops the actor.
    ///
    /// Waits until all commands are answered, or until `deadline`. Returns the number of unanswered
    /// commands.
    pub(super) async fn shut_down(&self, deadline: Instant) -> usize {
        let unanswered = self.admission.shut_down(deadline).await;
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        if let Err(error) = self.actor().stop_and_wait(None, Some(left)).await {
            tracing::warn!(name = T::NAME, %error, "actor did not stop in time");
        }
        unanswered
    }
}

impl<T: Routed> fmt::Debug for Router<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router").field("name", &T::NAME).finish_non_exhaustive()
    }
}
