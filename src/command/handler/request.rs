use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;

use super::job::HandlerJob;
use super::yield_slot::{YieldSlot, yield_slot_while};
use super::{Handled, Handler, key_of};
use crate::codec::fingerprint;
use crate::command::dispatched::Watched;
use crate::command::dispatcher::Dispatcher;
use crate::command::envelope::{Envelope, envelope_setters};
use crate::command::hooks::watched;
use crate::command::route::Route;
use crate::command::wire::{About, Done, Kind, Outcome, read_reply};
use crate::command::{CommandInfo, Dispatched, ExecuteError, NotExecutedKind};
use crate::event::EncodeError;
use crate::future::BoxFuture;
use crate::store::ExpectedVersion;
use crate::telemetry::trace::CommandSpan;

/// A command for a handler. Set its options, then await it for the answer.
///
/// [`Runtime::execute_handler`](crate::Runtime::execute_handler) creates it. The command starts when it is awaited
/// or [dispatched](Self::dispatch). Dropping the waiting future does not cancel the command.
#[must_use = "a command does nothing until it is awaited"]
pub struct Request<H: Handler> {
    commands: Arc<Dispatcher>,
    command: H::Command,
    envelope: Envelope,
    /// Worker slot of the handler that sends this command.
    slot: Option<Arc<dyn YieldSlot>>,
}

type Pending<H> = Dispatched<Handled<<H as Handler>::Reply>, <H as Handler>::Error>;

impl<H: Handler> Request<H> {
    pub(crate) fn new(commands: Arc<Dispatcher>, command: H::Command, envelope: Envelope) -> Self {
        Self { commands, command, envelope, slot: None }
    }

    pub(super) fn within(mut self, slot: Arc<dyn YieldSlot>) -> Self {
        self.slot = Some(slot);
        self
    }

    envelope_setters!();

    /// Sends the command, and returns as soon as a handler has accepted it.
    ///
    /// The handler has admitted the command then, and will handle it. Await the returned handle for
    /// the answer.
    ///
    /// # Errors
    /// If no node accepted the command. Nothing happened then, unless the error is
    /// `OutcomeUnknown`.
    pub async fn dispatch(mut self) -> Result<Pending<H>, ExecuteError<H::Error>> {
        let slot = self.slot.take();
        Ok(yield_slot_while(slot.clone(), self.hand_over(true)).await?.within(slot))
    }

    async fn hand_over(mut self, prompt: bool) -> Result<Pending<H>, ExecuteError<H::Error>> {
        let key = key_of::<H>(&self.command)
            .map_err(|reason| ExecuteError::from(NotExecutedKind::NotAccepted { reason }))?;
        let watched = Watched::new(self.commands.metrics(), H::NAME, key.as_deref(), &mut self.envelope);
        let given = self.send(key, prompt, watched.span()).await;
        watched.over(given)
    }

    async fn send(
        self,
        key: Option<String>,
        prompt: bool,
        span: CommandSpan,
    ) -> Result<Pending<H>, ExecuteError<H::Error>> {
        let Self { commands, command, envelope, slot: _ } = self;
        let (started, deadline) = (Instant::now(), envelope.deadline());
        // Commands within this process are not encoded. Encode the metadata to apply the same
        // limit.
        envelope.metadata.encode()?;
        let info =
            CommandInfo { name: H::NAME, key: key.as_deref(), id: envelope.id, metadata: &envelope.metadata };
        let takes = || {
            commands
                .hooks()
                .accepts(&info)
                .map_err(|reason| ExecuteError::from(NotExecutedKind::NotAccepted { reason }))
        };
        let local = match commands.registry().handler::<H>() {
            Some(local) => takes()?.then_some(local),
            None => None,
        };
        let route = commands.route(Kind::Handler, H::NAME, &info, &envelope, local.is_some())?;
        if let (Route::Local { .. }, Some(local)) = (&route, local) {
            match local.admit(envelope.id, deadline.instant()).await {
                Ok(permit) => {
                    let job = HandlerJob {
                        fingerprint: Uuid::from_u128(fingerprint(&command).map_err(EncodeError::from)?),
                        command,
                        id: envelope.id,
                        metadata: envelope.metadata.clone(),
                        key,
                        deadline: deadline.instant(),
                        span,
                    };
                    let watch = watched(commands.hooks(), &job.metadata, H::NAME, job.key.as_deref());
                    let answer = local.hand_over(job, permit)?;
                    return Ok(watch.over(Dispatched::here(&envelope, deadline, started, answer)));
                }
                Err(busy) if matches!(route, Route::Local { others: false }) => return Err(busy),
                Err(_busy) => {}
            }
        }
        let frame = commands.frame(Kind::Handler, &info, &command, &envelope, prompt, deadline)?;
        let id = envelope.id;
        let answered = commands.send(frame, &envelope, deadline).await;
        let about = move || About { id, name: H::NAME, stream: None, expected: ExpectedVersion::Any };
        let answered = answered.map_err(|failure| failure.into_error(&about()))?;
        Ok(Dispatched::new(id, async move {
            let (outcome, runtime) = answered.await;
            let result = match outcome {
                Outcome::Done(Done { omitted: Some(omitted), .. }) => Err(omitted.into_error(id, None)),
                Outcome::Done(Done { reply, duplicate, .. }) => {
                    read_reply(&reply, id).map(|reply| Handled { command_id: id, reply, duplicate })
                }
                Outcome::Error(failure) => Err(failure.into_error(&about())),
            };
            (result, runtime)
        }))
    }
}

impl<H: Handler> IntoFuture for Request<H> {
    type Output = Result<Handled<H::Reply>, ExecuteError<H::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(mut self) -> Self::IntoFuture {
        let slot = self.slot.take();
        Box::pin(yield_slot_while(slot, async move { self.hand_over(false).await?.await }))
    }
}

impl<H: Handler> fmt::Debug for Request<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("name", &H::NAME)
            .field("command_id", &self.envelope.id)
            .finish_non_exhaustive()
    }
}
