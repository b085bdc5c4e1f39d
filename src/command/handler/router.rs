//! The handle to a handler's actor: it admits commands and hands them over.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use ractor::ActorRef;
use ractor::concurrency::oneshot;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use super::Handler;
use super::caller::{Caller, CallerPermit, ReleaseOnDrop};
use super::job::{Answer, HandlerJob, Shared};
use super::message::Message;
use super::status::HandlerStatus;
use crate::aggregate::SHUTDOWN;
use crate::command::{ExecuteError, NotExecutedKind};
use crate::time::after;

/// A handle to a handler's actor. Cloning is cheap.
pub(crate) struct HandlerRouter<H: Handler> {
    /// Current actor. A restart replaces it.
    pub(super) actor: Arc<RwLock<ActorRef<Message<H>>>>,
    pub(super) shared: Arc<Shared<H>>,
    pub(super) admission: Arc<Semaphore>,
    /// Set at the start of a shutdown. No command is admitted afterwards.
    pub(super) closing: Arc<AtomicBool>,
}

impl<H: Handler> Clone for HandlerRouter<H> {
    fn clone(&self) -> Self {
        let Self { actor, shared, admission, closing } = self;
        Self {
            actor: actor.clone(),
            shared: shared.clone(),
            admission: admission.clone(),
            closing: closing.clone(),
        }
    }
}

impl<H: Handler> fmt::Debug for HandlerRouter<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerRouter").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl<H: Handler> HandlerRouter<H> {
    pub(super) fn actor(&self) -> ActorRef<Message<H>> {
        self.actor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn status(&self) -> HandlerStatus {
        let limit = self.shared.options.in_flight;
        HandlerStatus { name: H::NAME, in_flight: limit.saturating_sub(self.admission.available_permits()) }
    }

    /// Acquires a permit for the command `id` within the limit of commands in flight.
    ///
    /// Waits for the admission timeout of the options, or until `deadline` if that is earlier.
    pub(crate) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, ExecuteError<H::Error>> {
        NotExecutedKind::check_id(id)?;
        if self.closing.load(Ordering::Acquire) {
            return Err(NotExecutedKind::ShuttingDown.into());
        }
        let until = deadline.min(after(self.shared.options.admission));
        match tokio::time::timeout_at(until, self.admission.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(NotExecutedKind::ShuttingDown.into()),
            Err(_elapsed) => Err(NotExecutedKind::Overloaded {
                what: "commands in flight for this handler".into(),
                limit: self.shared.options.in_flight,
            }
            .into()),
        }
    }

    /// Sends an admitted command to the actor. The answer fails only if the actor stopped.
    pub(crate) fn hand_over(
        &self,
        job: HandlerJob<H>,
        permit: OwnedSemaphorePermit,
    ) -> Result<impl Future<Output = Result<Answer<H>, Stopped>> + Send + use<H>, ExecuteError<H::Error>>
    {
        let (reply, answer) = oneshot();
        let permit = Arc::new(permit);
        let waiting = CallerPermit::new(permit.clone());
        let caller = Caller { reply, permit: waiting.clone() };
        match self.actor().cast(Message::Run(job, caller, permit)) {
            Ok(()) => Ok(async move {
                let _waiting = ReleaseOnDrop(waiting);
                answer.await.map_err(|_dropped| Stopped)
            }),
            Err(_) if self.closing.load(Ordering::Acquire) => Err(NotExecutedKind::ShuttingDown.into()),
            Err(_) => Err(NotExecutedKind::Restarting { name: H::NAME }.into()),
        }
    }

    /// Stops admission, waits for the commands in flight, and stops the actor with its tasks.
    ///
    /// Waits until all commands are answered, or until `deadline`. Returns the number of unanswered
    /// commands.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        self.closing.store(true, Ordering::Release);
        let all = u32::try_from(self.shared.options.in_flight).unwrap_or(u32::MAX);
        let drained = tokio::time::timeout_at(deadline, self.admission.acquire_many(all)).await;
        let unanswered = if drained.is_ok() { 0 } else { self.status().in_flight };
        self.admission.close();
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        if let Err(error) = self.actor().stop_and_wait(Some(SHUTDOWN.into()), Some(left)).await {
            tracing::warn!(handler = H::NAME, %error, "handler did not stop in time");
        }
        unanswered
    }
}

/// The actor stopped before it answered.
#[derive(Debug)]
pub(crate) struct Stopped;
