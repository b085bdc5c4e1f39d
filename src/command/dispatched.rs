use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::ExecuteError;
use super::envelope::Envelope;
use super::handler::{YieldSlot, yield_slot_while};
use crate::future::BoxFuture;
use crate::telemetry::Metrics;
use crate::telemetry::trace::CommandSpan;

/// An accepted command. Await it for the receipt.
///
/// Dropping it does not cancel the command.
#[must_use = "await it for the receipt; an error that is not awaited only leaves a log line"]
pub struct Dispatched<T, E> {
    command_id: Uuid,
    answer: BoxFuture<'static, (Result<T, ExecuteError<E>>, Duration)>,
    /// Worker slot of the handler that sent the command.
    slot: Option<Arc<dyn YieldSlot>>,
    watched: Option<Watched>,
}

/// The telemetry of a command: its span and its duration.
pub(super) struct Watched {
    name: &'static str,
    span: CommandSpan,
    metrics: Metrics,
    started: Instant,
}

impl Watched {
    /// Starts the span. The command's metadata carries it from here on.
    pub(super) fn new(
        metrics: &Metrics,
        name: &'static str,
        key: Option<&str>,
        envelope: &mut Envelope,
    ) -> Self {
        let span = CommandSpan::given(name, key, envelope.id, &mut envelope.metadata);
        Self { name, span, metrics: metrics.clone(), started: Instant::now() }
    }

    pub(super) fn span(&self) -> CommandSpan {
        self.span.clone()
    }

    /// Attaches the telemetry to an accepted command, or ends it after an error.
    pub(super) fn over<T, E>(
        self,
        given: Result<Dispatched<T, E>, ExecuteError<E>>,
    ) -> Result<Dispatched<T, E>, ExecuteError<E>> {
        match given {
            Ok(dispatched) => Ok(Dispatched { watched: Some(self), ..dispatched }),
            Err(error) => {
                self.ended(Some(error.kind()));
                Err(error)
            }
        }
    }

    fn ended(self, error: Option<&'static str>) {
        self.span.ended(error);
        self.metrics.command(self.name, self.started.elapsed(), error);
    }
}

/// The result of a command and its duration.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report<T, E> {
    /// Id of the command.
    pub command_id: Uuid,
    /// Duration on the executing node. If that is unknown, the time until the answer arrived.
    pub runtime: Duration,
    /// Receipt, or the error of a command without one.
    pub result: Result<T, ExecuteError<E>>,
}

impl<T, E> Dispatched<T, E> {
    pub(super) fn new(
        command_id: Uuid,
        answer: impl Future<Output = (Result<T, ExecuteError<E>>, Duration)> + Send + 'static,
    ) -> Self {
        Self { command_id, answer: Box::pin(answer), slot: None, watched: None }
    }

    pub(super) fn within(mut self, slot: Option<Arc<dyn YieldSlot>>) -> Self {
        self.slot = slot;
        self
    }

    /// Creates the handle of a command that an actor or a task of this process executes.
    pub(super) fn here<S: Send>(
        id: Uuid,
        deadline: Instant,
        started: Instant,
        answer: impl Future<Output = Result<Result<T, ExecuteError<E>>, S>> + Send + 'static,
    ) -> Self
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        Self::new(id, async move {
            let unknown = |reason| Err(ExecuteError::OutcomeUnknown { command_id: id, reason });
            let result = match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_dropped)) => unknown("its actor or task stopped before it answered".into()),
                Err(_elapsed) => Err(ExecuteError::timed_out(id, deadline - started)),
            };
            (result, started.elapsed())
        })
    }

    /// Returns the id of the command.
    pub fn command_id(&self) -> Uuid {
        self.command_id
    }

    /// Waits for the result, and returns it with the duration.
    pub async fn report(self) -> Report<T, E> {
        let (result, runtime) = yield_slot_while(self.slot, self.answer).await;
        if let Some(watched) = self.watched {
            watched.ended(result.as_ref().err().map(ExecuteError::kind));
        }
        Report { command_id: self.command_id, runtime, result }
    }
}

impl<T: Send + 'static, E: Send + 'static> IntoFuture for Dispatched<T, E> {
    type Output = Result<T, ExecuteError<E>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.report().await.result })
    }
}

impl<T, E> fmt::Debug for Dispatched<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatched").field("command_id", &self.command_id).finish_non_exhaustive()
    }
}
