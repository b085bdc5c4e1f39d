//! One command of a caller: its options, its destination and its answer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::bus::CommandBusStatus;
use super::dispatched::Watched;
use super::dispatcher::Dispatcher;
use super::envelope::{Envelope, envelope_options};
use super::erased::ErasedCommand;
use super::handler::{YieldSlot, yield_slot_while};
use super::route::Route;
use super::target::{Answer, Routed, RoutedCommand, Target, ToAggregate};
use super::wire::{About, CommandFrame, FORMAT, Failure, Outcome};
use super::{CommandInfo, Dispatched, ExecuteError, NotExecutedKind};
use crate::aggregate::Aggregate;
use crate::codec::{fingerprint, to_cbor};
use crate::event::EncodeError;
use crate::future::BoxFuture;
use crate::store::ExpectedVersion;
use crate::telemetry::trace::CommandSpan;

/// A command for an aggregate or a handler. Set its options, then await it for the answer.
///
/// [`Runtime::execute`](crate::Runtime::execute) and
/// [`Runtime::execute_handler`](crate::Runtime::execute_handler) create it. The answer of an
/// aggregate is a [`Receipt`](super::Receipt), that of a handler is [`Handled`](super::Handled). The
/// command starts when it is awaited or [dispatched](Self::dispatch). Dropping the waiting future
/// does not cancel the command.
#[must_use = "a command does nothing until it is awaited"]
pub struct Execute<T: Target> {
    pub(super) commands: Arc<Dispatcher>,
    /// Id of the aggregate. The key of a handler is in the command.
    id: Option<String>,
    command: T::Command,
    pub(super) envelope: Envelope,
    expected: ExpectedVersion,
    /// Worker slot of the handler that sends this command.
    slot: Option<Arc<dyn YieldSlot>>,
}

type Pending<T> = Dispatched<<T as Target>::Answer, <T as Target>::Error>;

#[allow(private_bounds, reason = "`Routed` is the part of the sealed `Target` for this crate")]
impl<T: Routed> Execute<T> {
    pub(crate) fn new(
        commands: Arc<Dispatcher>,
        id: Option<String>,
        command: T::Command,
        envelope: Envelope,
    ) -> Self {
        Self { commands, id, command, envelope, expected: ExpectedVersion::Any, slot: None }
    }

    pub(super) fn within(mut self, slot: Arc<dyn YieldSlot>) -> Self {
        self.slot = Some(slot);
        self
    }

    envelope_options!();

    /// Sets how long to wait until a node accepts the command.
    ///
    /// Default: 5 s. Zero waits as long as [`timeout`](Self::timeout). It has no effect within
    /// one process.
    pub fn assign_timeout(mut self, timeout: Duration) -> Self {
        self.envelope.assign = timeout;
        self
    }

    /// Sends the command, and returns as soon as its target has accepted it.
    ///
    /// Commands that are dispatched in sequence to one aggregate are decided in that order while no
    /// node joins or leaves. They do not wait for each other's append. Await the returned handle
    /// for the answer. Dropping it does not cancel the command.
    ///
    /// # Errors
    /// If no node accepted the command. Nothing happened then, unless the error is
    /// `OutcomeUnknown`.
    pub async fn dispatch(mut self) -> Result<Pending<T>, ExecuteError<T::Error>> {
        let slot = self.slot.take();
        Ok(yield_slot_while(slot.clone(), self.hand_over(true)).await?.within(slot))
    }

    pub(crate) fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// Checks and encodes the command, for an execution without this caller.
    pub(crate) fn erase(mut self) -> Result<(Arc<Dispatcher>, ErasedCommand), NotExecutedKind> {
        let key = T::key(self.id.take(), &self.command)?;
        T::address(key.as_deref())?;
        let Self { commands, command, envelope, expected, .. } = self;
        let here = commands.registry().router::<T>().is_some();
        if !here && matches!(commands.status(), CommandBusStatus::Local) {
            return Err(NotExecutedKind::NoHandler { name: T::NAME, retryable: false });
        }
        let Envelope { id, metadata, .. } = envelope;
        let payload = to_cbor(&command).map_err(|error| NotExecutedKind::Encode(error.into()))?;
        let (kind, name, expected) = (T::KIND, T::NAME.to_owned(), expected.into());
        Ok((commands, ErasedCommand { id, kind, name, key, payload, metadata, expected }))
    }

    async fn hand_over(mut self, prompt: bool) -> Result<Pending<T>, ExecuteError<T::Error>> {
        let key = T::key(self.id.take(), &self.command)?;
        let watched = Watched::new(&self.commands.metrics, T::NAME, key.as_deref(), &mut self.envelope);
        let given = self.send(key, prompt, watched.span()).await;
        watched.over(given)
    }

    async fn send(
        self,
        key: Option<String>,
        prompt: bool,
        span: CommandSpan,
    ) -> Result<Pending<T>, ExecuteError<T::Error>> {
        let Self { commands, command, envelope, expected, .. } = self;
        let (id, started, deadline) = (envelope.id, Instant::now(), envelope.deadline());
        let address = T::address(key.as_deref())?;
        let info = CommandInfo { name: T::NAME, key: key.as_deref(), id, metadata: &envelope.metadata };
        let accepts = || {
            let accepts = commands.hooks.accepts(&info);
            accepts.map_err(|reason| NotExecutedKind::NotAccepted { reason })
        };
        let local = match commands.registry().router::<T>() {
            Some(local) => accepts()?.then_some(local),
            None => None,
        };
        let route = commands.route(T::KIND, T::NAME, &info, &envelope, local.is_some())?;
        let route = route.ok_or(NotExecutedKind::NoHandler { name: T::NAME, retryable: false })?;
        if let (Route::Local { others }, Some(router)) = (route, local) {
            let deadline = deadline.instant();
            match router.admit(id, deadline).await {
                Ok(permit) => {
                    let fingerprint = fingerprint(&command).map_err(EncodeError::from)?;
                    let metadata = envelope.metadata;
                    let command = RoutedCommand {
                        command,
                        id,
                        metadata,
                        fingerprint,
                        key,
                        address,
                        expected,
                        deadline,
                        span,
                    };
                    return Ok(router.submit(&commands.hooks, command, permit, started)?);
                }
                Err(busy) if !others => return Err(busy.into()),
                Err(_busy) => {}
            }
        }
        let frame = CommandFrame {
            format: FORMAT,
            id,
            kind: T::KIND,
            name: T::NAME.to_owned(),
            payload: to_cbor(&command).map_err(EncodeError::from)?,
            metadata: envelope.metadata.encode()?.into(),
            key,
            expected: expected.into(),
            left: deadline.left_millis(),
            sent: None,
            attempt: 1,
            prompt,
        };
        let to_error = move |failure: Failure, address: &T::Address| {
            failure.into_error(&About { id, name: T::NAME, stream: T::stream(address), expected })
        };
        let answered = commands.send(frame, &envelope, deadline).await;
        let answered = answered.map_err(|failure| to_error(failure, &address))?;
        Ok(Dispatched::new(id, async move {
            let (outcome, runtime) = answered.await;
            let result: Answer<T> = match outcome {
                Outcome::Done(done) => T::decode(done, id, address),
                Outcome::Error(failure) => Err(to_error(failure, &address)),
            };
            (result, runtime)
        }))
    }
}

impl<A: Aggregate> Execute<ToAggregate<A>> {
    /// Sets the version that the aggregate must have when the command is decided. Default: any.
    pub fn expect_version(mut self, expected: ExpectedVersion) -> Self {
        self.expected = expected;
        self
    }
}

impl<T: Routed> IntoFuture for Execute<T> {
    type Output = Answer<T>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(mut self) -> Self::IntoFuture {
        let slot = self.slot.take();
        Box::pin(yield_slot_while(slot, async move { self.hand_over(false).await?.await }))
    }
}

impl<T: Routed> fmt::Debug for Execute<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execute")
            .field("name", &T::NAME)
            .field("id", &self.id)
            .field("command_id", &self.envelope.id)
            .finish_non_exhaustive()
    }
}
