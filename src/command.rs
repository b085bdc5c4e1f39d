//! Commands: an intent with an id, addressed to one aggregate, brought to the one actor that owns it.
//!
//! Within one process a command goes straight to its actor. Its id, deadline, receipt and errors are the same as they are
//! when the owner lives on another node, so that a distributed bus only replaces the way there.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use ractor::concurrency::{OneshotReceiver, oneshot};
use ractor::{ActorCell, ActorId};
use tokio::time::Instant;
use uuid::Uuid;

use crate::aggregate::{Aggregate, Answer, Order, Router, RouterStatus};
pub use crate::aggregate::{ExecuteError, Receipt};
pub(crate) use crate::aggregate::{SHUTDOWN, StartRouterError};
use crate::event::{Event, Metadata};
use crate::store::{BoxFuture, ExpectedVersion};
use crate::time::after;

/// How long a caller waits for its receipt unless it says otherwise.
pub const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Who handles which kind of command in this process. Fixed when the runtime has started.
#[derive(Default)]
pub(crate) struct Handlers {
    routers: HashMap<TypeId, Box<dyn Handler>>,
}

/// A router without its type.
trait Handler: Send + Sync {
    fn as_any(&self) -> &dyn Any;
    fn status(&self) -> RouterStatus;
    fn shut_down(&self, deadline: Instant) -> BoxFuture<'_, usize>;
}

/// A part of the runtime that can be started again.
pub(crate) trait Respawn: Send + Sync {
    fn name(&self) -> &'static str;
    /// The actor that runs now.
    fn actor(&self) -> Option<ActorId>;
    /// Starts a new one in its place.
    fn respawn(&self, supervisor: ActorCell) -> Result<ActorId, String>;
}

impl<A: Aggregate> Respawn for Router<A> {
    fn name(&self) -> &'static str {
        <A::Event as Event>::CATEGORY
    }

    fn actor(&self) -> Option<ActorId> {
        Some(self.actor().get_id())
    }

    fn respawn(&self, supervisor: ActorCell) -> Result<ActorId, String> {
        self.respawn(supervisor).map_err(|error| error.to_string())
    }
}

impl<A: Aggregate> Handler for Router<A> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn status(&self) -> RouterStatus {
        self.status()
    }

    fn shut_down(&self, deadline: Instant) -> BoxFuture<'_, usize> {
        Box::pin(self.shut_down(deadline))
    }
}

impl Handlers {
    pub(crate) fn register<A: Aggregate>(&mut self, router: Router<A>) {
        self.routers.insert(TypeId::of::<A>(), Box::new(router));
    }

    pub(crate) fn router<A: Aggregate>(&self) -> Option<&Router<A>> {
        self.routers.get(&TypeId::of::<A>()).and_then(|handler| handler.as_any().downcast_ref())
    }

    pub(crate) fn status(&self) -> Vec<RouterStatus> {
        let mut status: Vec<_> = self.routers.values().map(|handler| handler.status()).collect();
        status.sort_by(|a, b| a.category.cmp(&b.category));
        status
    }

    /// Stops the intake of all, waits for what is under way. The number of commands that had no answer at the deadline.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        let all = self.routers.values().map(|handler| handler.shut_down(deadline));
        futures_util::future::join_all(all).await.into_iter().sum()
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.status()).finish()
    }
}

/// A command that is about to be executed: await it for the receipt, or set more before.
///
/// Made by [`Runtime::execute`](crate::Runtime::execute). Nothing happens before it is awaited or
/// [dispatched](Self::dispatch). Dropping the future while it waits does not take the command back.
#[must_use = "a command does nothing until it is awaited"]
pub struct Execute<A: Aggregate> {
    handlers: Arc<Handlers>,
    id: String,
    command: A::Command,
    command_id: Uuid,
    metadata: Metadata,
    expected: ExpectedVersion,
    timeout: Duration,
}

impl<A: Aggregate> Execute<A> {
    pub(crate) fn new(handlers: Arc<Handlers>, id: impl fmt::Display, command: A::Command) -> Self {
        Self {
            handlers,
            id: id.to_string(),
            command,
            command_id: Uuid::now_v7(),
            metadata: Metadata::default(),
            expected: ExpectedVersion::Any,
            timeout: RECEIVE_TIMEOUT,
        }
    }

    /// The id under which the command takes effect at most once. A new one by default; give it one that is derived from
    /// the request, and the request can be repeated safely.
    pub fn command_id(mut self, id: Uuid) -> Self {
        self.command_id = id;
        self
    }

    /// Ties the events to what set the command off; the command's own id by default.
    pub fn correlation_id(mut self, id: Uuid) -> Self {
        self.metadata.correlation_id = Some(id);
        self
    }

    /// The W3C `traceparent` of the caller.
    pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
        self.metadata.traceparent = Some(traceparent.into());
        self
    }

    /// An entry for the events' metadata.
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.user.insert(key.into(), value.into());
        self
    }

    /// Refuses the command unless the aggregate is at this version when it is decided. Anything by default.
    pub fn expect_version(mut self, expected: ExpectedVersion) -> Self {
        self.expected = expected;
        self
    }

    /// How long to wait for the receipt; 10 seconds by default. A command that is not decided by then is dropped; one that
    /// is on its way into the store is answered `OutcomeUnknown`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Hands the command over, and returns as soon as the aggregate's queue has it. Commands that are dispatched one after
    /// the other to one aggregate are decided in that order, without waiting for each other's disk. Await what this
    /// returns for the receipt; dropping it does not take the command back.
    ///
    /// # Errors
    /// When the command could not be handed over; then nothing happened.
    pub async fn dispatch(self) -> Result<Dispatched<A>, ExecuteError<A::Error>> {
        let (command_id, timeout) = (self.command_id, self.timeout);
        let (deadline, answer) = self.hand_over().await?;
        Ok(Dispatched { command_id, deadline, timeout, answer })
    }

    async fn hand_over(self) -> Result<(Instant, OneshotReceiver<Answer<A>>), ExecuteError<A::Error>> {
        let deadline = after(self.timeout);
        let router = self
            .handlers
            .router::<A>()
            .ok_or(ExecuteError::NoHandler { category: <A::Event as Event>::CATEGORY })?;
        let stream = router.stream(&self.id)?;
        let permit = router.admit(deadline).await?;
        let (reply, answer) = oneshot();
        let order = Order {
            command: self.command,
            command_id: self.command_id,
            metadata: self.metadata,
            expected: self.expected,
            deadline,
            now: Utc::now(),
            attempts: 0,
            _permit: permit,
            reply: reply.into(),
        };
        router.route(stream, order)?;
        Ok((deadline, answer))
    }
}

impl<A: Aggregate> IntoFuture for Execute<A> {
    type Output = Result<Receipt<A::Reply>, ExecuteError<A::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.dispatch().await?.receipt().await })
    }
}

/// A command that was handed over: await it for the receipt. Made by [`Execute::dispatch`].
#[must_use = "await it for the receipt; a refusal that nobody hears only leaves a log line"]
pub struct Dispatched<A: Aggregate> {
    command_id: Uuid,
    deadline: Instant,
    timeout: Duration,
    answer: OneshotReceiver<Answer<A>>,
}

impl<A: Aggregate> Dispatched<A> {
    /// The id under which the command takes effect.
    pub fn command_id(&self) -> Uuid {
        self.command_id
    }

    async fn receipt(self) -> Answer<A> {
        let Self { command_id, deadline, timeout, answer } = self;
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_dropped)) => Err(ExecuteError::OutcomeUnknown {
                command_id,
                reason: "its actor was stopped before it answered".into(),
            }),
            Err(_elapsed) => Err(ExecuteError::timed_out(command_id, timeout)),
        }
    }
}

impl<A: Aggregate> IntoFuture for Dispatched<A> {
    type Output = Result<Receipt<A::Reply>, ExecuteError<A::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.receipt())
    }
}

impl<A: Aggregate> fmt::Debug for Dispatched<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatched").field("command_id", &self.command_id).finish_non_exhaustive()
    }
}

impl<A: Aggregate> fmt::Debug for Execute<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execute")
            .field("category", &<A::Event as Event>::CATEGORY)
            .field("id", &self.id)
            .field("command_id", &self.command_id)
            .finish_non_exhaustive()
    }
}
