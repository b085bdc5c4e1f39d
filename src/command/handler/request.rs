use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;

use super::actor::Job;
use super::{GiveWay, Handled, Handler, give_way, key_of};
use crate::codec::fingerprint;
use crate::command::bus::{Commands, Way, watched};
use crate::command::dispatched::Watched;
use crate::command::envelope::{Envelope, envelope_setters};
use crate::command::wire::{About, Done, Kind, Outcome, read_reply};
use crate::command::{CommandInfo, Dispatched, ExecuteError};
use crate::event::EncodeError;
use crate::future::BoxFuture;
use crate::store::ExpectedVersion;
use crate::telemetry::trace::CommandSpan;

/// A command for a handler that is about to be executed: await it for the answer, or set more before.
///
/// Made by [`Runtime::command`](crate::Runtime::command). Nothing happens before it is awaited or
/// [dispatched](Self::dispatch). Dropping the future while it waits does not take the command back.
#[must_use = "a command does nothing until it is awaited"]
pub struct Request<H: Handler> {
    commands: Arc<Commands>,
    command: H::Command,
    envelope: Envelope,
    /// The worker's place of the handler that gives this command.
    place: Option<Arc<dyn GiveWay>>,
}

type Pending<H> = Dispatched<Handled<<H as Handler>::Reply>, <H as Handler>::Error>;

impl<H: Handler> Request<H> {
    pub(crate) fn new(commands: Arc<Commands>, command: H::Command, envelope: Envelope) -> Self {
        Self { commands, command, envelope, place: None }
    }

    pub(super) fn within(mut self, place: Arc<dyn GiveWay>) -> Self {
        self.place = Some(place);
        self
    }

    envelope_setters!();

    /// Hands the command over, and returns as soon as a handler has accepted it: it has its place there, and will be
    /// handled. Await what this returns for the answer.
    ///
    /// # Errors
    /// When nobody took the command; then nothing happened, unless the error says that the outcome is unknown.
    pub async fn dispatch(mut self) -> Result<Pending<H>, ExecuteError<H::Error>> {
        let place = self.place.take();
        Ok(give_way(place.clone(), self.hand_over(true)).await?.within(place))
    }

    async fn hand_over(mut self, prompt: bool) -> Result<Pending<H>, ExecuteError<H::Error>> {
        let key = key_of::<H>(&self.command).map_err(|reason| ExecuteError::Refused { reason })?;
        let watched = Watched::new(&self.commands, H::NAME, key.as_deref(), &mut self.envelope);
        let given = self.send(key, prompt, watched.span()).await;
        watched.over(given)
    }

    async fn send(
        self,
        key: Option<String>,
        prompt: bool,
        span: CommandSpan,
    ) -> Result<Pending<H>, ExecuteError<H::Error>> {
        let Self { commands, command, envelope, place: _ } = self;
        let (started, deadline) = (Instant::now(), envelope.deadline());
        // A command within this process is not encoded: the limit is the same.
        envelope.metadata.encode()?;
        let info =
            CommandInfo { name: H::NAME, key: key.as_deref(), id: envelope.id, metadata: &envelope.metadata };
        let takes = || commands.policy().takes(&info).map_err(|reason| ExecuteError::Refused { reason });
        let local = match commands.registry().handler::<H>() {
            Some(local) => takes()?.then_some(local),
            None => None,
        };
        let way = commands.way(Kind::Handler, H::NAME, &info, &envelope, local.is_some())?;
        if let (Way::Here { .. }, Some(local)) = (&way, local) {
            match local.admit(envelope.id, deadline.instant()).await {
                Ok(permit) => {
                    let job = Job {
                        fingerprint: Uuid::from_u128(fingerprint(&command).map_err(EncodeError::from)?),
                        command,
                        id: envelope.id,
                        metadata: envelope.metadata.clone(),
                        key,
                        deadline: deadline.instant(),
                        span,
                    };
                    let watch = watched(&commands, &job.metadata, H::NAME, job.key.as_deref());
                    let answer = local.hand_over(job, permit)?;
                    return Ok(watch.over(Dispatched::here(&envelope, deadline, started, answer)));
                }
                Err(busy) if matches!(way, Way::Here { others: false }) => return Err(busy),
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
        let place = self.place.take();
        Box::pin(give_way(place, async move { self.hand_over(false).await?.await }))
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
