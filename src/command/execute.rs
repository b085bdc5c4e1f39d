use std::fmt;
use std::sync::Arc;

use chrono::Utc;
use ractor::concurrency::oneshot;
use tokio::time::Instant;

use super::dispatched::Watched;
use super::dispatcher::Dispatcher;
use super::envelope::{Envelope, envelope_setters};
use super::handler::{YieldSlot, yield_slot_while};
use super::hooks::watched;
use super::route::Route;
use super::wire::{About, Kind, Outcome};
use super::{CommandInfo, Dispatched, ExecuteError, NotExecutedKind, Receipt};
use crate::aggregate::{Aggregate, CommandRequest};
use crate::codec::fingerprint;
use crate::event::{EncodeError, Event, StreamId};
use crate::future::BoxFuture;
use crate::store::ExpectedVersion;
use crate::telemetry::trace::CommandSpan;

/// A command for an aggregate. Set its options, then await it for the receipt.
///
/// [`Runtime::execute`](crate::Runtime::execute) creates it. The command starts when it is awaited
/// or [dispatched](Self::dispatch). Dropping the waiting future does not cancel the command.
#[must_use = "a command does nothing until it is awaited"]
pub struct Execute<A: Aggregate> {
    pub(super) commands: Arc<Dispatcher>,
    id: String,
    command: A::Command,
    pub(super) envelope: Envelope,
    expected: ExpectedVersion,
    /// Worker slot of the handler that sends this command.
    slot: Option<Arc<dyn YieldSlot>>,
}

type Pending<A> = Dispatched<Receipt<<A as Aggregate>::Reply>, <A as Aggregate>::Error>;

impl<A: Aggregate> Execute<A> {
    pub(crate) fn new(
        commands: Arc<Dispatcher>,
        id: String,
        command: A::Command,
        envelope: Envelope,
    ) -> Self {
        Self { commands, id, command, envelope, expected: ExpectedVersion::Any, slot: None }
    }

    pub(super) fn within(mut self, slot: Arc<dyn YieldSlot>) -> Self {
        self.slot = Some(slot);
        self
    }

    envelope_setters!();

    /// Sets the version that the aggregate must have when the command is decided. Default: any.
    pub fn expect_version(mut self, expected: ExpectedVersion) -> Self {
        self.expected = expected;
        self
    }

    /// Sends the command, and returns as soon as its aggregate has accepted it.
    ///
    /// Commands that are dispatched in sequence to one aggregate are decided in that order while no
    /// node joins or leaves. They do not wait for each other's append. Await the returned handle
    /// for the receipt. Dropping it does not cancel the command.
    ///
    /// # Errors
    /// If no node accepted the command. Nothing happened then, unless the error is
    /// `OutcomeUnknown`.
    pub async fn dispatch(mut self) -> Result<Pending<A>, ExecuteError<A::Error>> {
        let slot = self.slot.take();
        Ok(yield_slot_while(slot.clone(), self.hand_over(true)).await?.within(slot))
    }

    async fn hand_over(mut self, prompt: bool) -> Result<Pending<A>, ExecuteError<A::Error>> {
        let name = <A::Event as Event>::CATEGORY;
        let watched = Watched::new(self.commands.metrics(), name, Some(&self.id), &mut self.envelope);
        let given = self.send(prompt, watched.span()).await;
        watched.over(given)
    }

    async fn send(self, prompt: bool, span: CommandSpan) -> Result<Pending<A>, ExecuteError<A::Error>> {
        let Self { commands, id: key, command, envelope, expected, slot: _ } = self;
        let category = <A::Event as Event>::CATEGORY;
        let (started, deadline) = (Instant::now(), envelope.deadline());
        let stream = StreamId::new(category, &key)
            .map_err(|error| ExecuteError::from(NotExecutedKind::InvalidId { reason: error.to_string() }))?;
        let info =
            CommandInfo { name: category, key: Some(&key), id: envelope.id, metadata: &envelope.metadata };
        let takes = || {
            commands
                .hooks()
                .accepts(&info)
                .map_err(|reason| ExecuteError::from(NotExecutedKind::NotAccepted { reason }))
        };
        let local = match commands.registry().router::<A>() {
            Some(local) => takes()?.then_some(local),
            None => None,
        };
        let route = commands.route(Kind::Aggregate, category, &info, &envelope, local.is_some())?;
        if let (Route::Local { .. }, Some(router)) = (&route, local) {
            match router.admit(envelope.id, deadline.instant()).await {
                Ok(permit) => {
                    commands
                        .hooks()
                        .before(&info)
                        .map_err(|reason| ExecuteError::from(NotExecutedKind::NotAccepted { reason }))?;
                    let watch = watched(commands.hooks(), &envelope.metadata, category, Some(&key));
                    let (reply, answer) = oneshot();
                    let order = Box::new(CommandRequest {
                        content: fingerprint(&command).map_err(EncodeError::from)? as u64,
                        command,
                        command_id: envelope.id,
                        metadata: envelope.metadata.clone(),
                        expected,
                        deadline: deadline.instant(),
                        now: Utc::now(),
                        attempts: 0,
                        span,
                        _permit: permit,
                        reply: reply.into(),
                    });
                    router.route(stream, order)?;
                    return Ok(watch.over(Dispatched::here(&envelope, deadline, started, answer)));
                }
                Err(busy) if matches!(route, Route::Local { others: false }) => return Err(busy),
                Err(_busy) => {}
            }
        }
        let mut frame = commands.frame(Kind::Aggregate, &info, &command, &envelope, prompt, deadline)?;
        frame.expected = expected.into();
        let id = envelope.id;
        let answered = Box::pin(commands.send(frame, &envelope, deadline)).await;
        let to_error = move |failure: super::wire::Failure, stream: &StreamId| {
            failure.into_error(&About { id, name: category, stream: Some(stream), expected })
        };
        let answered = answered.map_err(|failure| to_error(failure, &stream))?;
        Ok(Dispatched::new(id, async move {
            let (outcome, runtime) = answered.await;
            let result = match outcome {
                Outcome::Done(done) => done.into_receipt(id, stream),
                Outcome::Error(failure) => Err(to_error(failure, &stream)),
            };
            (result, runtime)
        }))
    }
}

impl<A: Aggregate> IntoFuture for Execute<A> {
    type Output = Result<Receipt<A::Reply>, ExecuteError<A::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(mut self) -> Self::IntoFuture {
        let slot = self.slot.take();
        Box::pin(yield_slot_while(slot, async move { self.hand_over(false).await?.await }))
    }
}

impl<A: Aggregate> fmt::Debug for Execute<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execute")
            .field("category", &<A::Event as Event>::CATEGORY)
            .field("id", &self.id)
            .field("command_id", &self.envelope.id)
            .finish_non_exhaustive()
    }
}
