//! The aggregates and handlers of this process. They are fixed after the start of the runtime.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;

use chrono::Utc;
use ractor::concurrency::oneshot;
use ractor::{ActorCell, ActorId};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::ExecuteError;
use super::bus::Dispatcher;
use super::envelope::Deadline;
use super::handler::{Handled, Handler, HandlerJob, HandlerRouter, HandlerStatus};
use super::hooks::CommandInfo;
use super::wire::{Code, CommandFrame, Done, Failure, Kind, Outcome, lost_reply, tell_receipt};
use crate::aggregate::{Aggregate, CommandRequest, Router, RouterStatus};
use crate::codec::{fingerprint, from_cbor, to_cbor};
use crate::event::{Event, Metadata};
use crate::future::BoxFuture;
use crate::telemetry::trace::CommandSpan;

/// A component of the runtime that the supervisor can restart.
pub(crate) trait Respawn: Send + Sync {
    fn name(&self) -> &'static str;
    /// Returns the current actor.
    fn actor(&self) -> Option<ActorId>;
    /// Replaces the actor by a new one.
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

/// The aggregates and handlers of a node.
#[derive(Default)]
pub(crate) struct Registry {
    by_type: HashMap<TypeId, (Kind, &'static str)>,
    endpoints: HashMap<(Kind, &'static str), Box<dyn Endpoint>>,
}

/// The future outcome of a command.
pub(super) type Answering = BoxFuture<'static, Outcome>;

/// An aggregate or handler for commands of one name, without its types.
pub(super) trait Endpoint: Send + Sync {
    fn as_any(&self) -> &dyn Any;
    fn aggregate(&self) -> Option<RouterStatus>;
    fn handler(&self) -> Option<HandlerStatus>;
    fn shut_down(&self, deadline: Instant) -> BoxFuture<'_, usize>;
    /// Accepts a command, or refuses it. Waits for a permit until `admit_by` at most.
    fn accept<'a>(
        &'a self,
        commands: &'a Dispatcher,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>>;
}

impl Registry {
    pub(crate) fn aggregate<A: Aggregate>(&mut self, router: Router<A>) {
        self.register::<A>(Kind::Aggregate, <A::Event as Event>::CATEGORY, Box::new(router));
    }

    pub(crate) fn add_handler<H: Handler>(&mut self, router: HandlerRouter<H>) {
        self.register::<H>(Kind::Handler, H::NAME, Box::new(router));
    }

    fn register<T: 'static>(&mut self, kind: Kind, name: &'static str, endpoint: Box<dyn Endpoint>) {
        self.by_type.insert(TypeId::of::<T>(), (kind, name));
        self.endpoints.insert((kind, name), endpoint);
    }

    fn of<T: 'static, R: 'static>(&self) -> Option<&R> {
        self.endpoints.get(self.by_type.get(&TypeId::of::<T>())?)?.as_any().downcast_ref()
    }

    pub(crate) fn router<A: Aggregate>(&self) -> Option<&Router<A>> {
        self.of::<A, Router<A>>()
    }

    pub(super) fn handler<H: Handler>(&self) -> Option<&HandlerRouter<H>> {
        self.of::<H, HandlerRouter<H>>()
    }

    pub(super) fn endpoint(&self, kind: Kind, name: &str) -> Option<&dyn Endpoint> {
        // Names from other nodes are not `'static`, so they are compared as text.
        let found = self.endpoints.iter().find(|((of, called), _)| *of == kind && *called == name);
        found.map(|(_, endpoint)| &**endpoint)
    }

    /// Returns the names of one kind that this node handles.
    pub(super) fn names(&self, kind: Kind) -> impl Iterator<Item = &'static str> {
        self.endpoints.keys().filter(move |(of, _)| *of == kind).map(|(_, name)| *name)
    }

    pub(crate) fn aggregates(&self) -> Vec<RouterStatus> {
        let mut status: Vec<_> =
            self.endpoints.values().filter_map(|endpoint| endpoint.aggregate()).collect();
        status.sort_by(|a, b| a.category.cmp(&b.category));
        status
    }

    pub(crate) fn handlers(&self) -> Vec<HandlerStatus> {
        let mut status: Vec<_> = self.endpoints.values().filter_map(|endpoint| endpoint.handler()).collect();
        status.sort_by_key(|handler| handler.name);
        status
    }

    /// Stops admission of all endpoints, and waits for the commands in flight.
    ///
    /// Returns the number of commands without an answer at the deadline.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        // Stop handlers first: their running attempts need the aggregates.
        let mut unanswered = 0;
        for kind in [Kind::Handler, Kind::Aggregate] {
            let all = self.endpoints.iter().filter(|((of, _), _)| *of == kind);
            let all = all.map(|(_, endpoint)| endpoint.shut_down(deadline));
            unanswered += futures_util::future::join_all(all).await.into_iter().sum::<usize>();
        }
        unanswered
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.endpoints.keys()).finish()
    }
}

/// Decodes the command and the metadata of a frame.
fn contents<C: serde::de::DeserializeOwned>(frame: &CommandFrame) -> Result<(C, Metadata), Failure> {
    let unreadable = |error| Failure::new(Code::Refused, format!("the command does not decode: {error}"));
    if frame.metadata.len() > Metadata::MAX_BYTES {
        let (bytes, limit) = (frame.metadata.len(), Metadata::MAX_BYTES);
        return Err(Failure::new(
            Code::Refused,
            format!("metadata too large: {bytes} bytes (limit {limit} bytes)"),
        ));
    }
    let command = from_cbor(&frame.payload).map_err(unreadable)?;
    Ok((command, Metadata::decode(&frame.metadata).map_err(unreadable)?))
}

/// Marks the command's span as refused.
fn marked(span: &CommandSpan) -> impl Fn(Failure) -> Failure + use<'_> {
    move |failure| {
        span.ended(Some("not_accepted"));
        failure
    }
}

/// Computes the fingerprint of the command as sent.
///
/// The decoded command is not used: another version of the program may know more fields.
fn content(frame: &CommandFrame) -> Result<u128, Failure> {
    let unreadable = |error: String| Failure::new(Code::Refused, error);
    let sent: ciborium::Value = from_cbor(&frame.payload).map_err(|error| unreadable(error.to_string()))?;
    fingerprint(&sent).map_err(|error| unreadable(error.to_string()))
}

/// Applies the filters of this node to a command.
fn filtered(commands: &Dispatcher, info: &CommandInfo<'_>) -> Result<(), Failure> {
    let refused = || Failure::new(Code::Refused, format!("a filter does not accept command {}", info.id));
    let takes = commands.hooks().accepts(info).map_err(|reason| Failure::new(Code::Refused, reason))?;
    takes.then_some(()).ok_or_else(refused)
}

/// Answers an error that every node would give; refuses a command that another node may execute.
fn refused<E: std::error::Error + serde::Serialize>(
    span: &CommandSpan,
    error: ExecuteError<E>,
) -> Result<Answering, Failure> {
    span.ended(Some(error.kind()));
    match error {
        ExecuteError::Overloaded { .. } | ExecuteError::ShuttingDown | ExecuteError::Store(_) => {
            Err(Failure::of(&error))
        }
        error => answered(Outcome::Error(Failure::of(&error))),
    }
}

fn answered(outcome: Outcome) -> Result<Answering, Failure> {
    Ok(Box::pin(std::future::ready(outcome)))
}

const STOPPED: &str = "the actor stopped before it answered";

impl<A: Aggregate> Endpoint for Router<A> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn aggregate(&self) -> Option<RouterStatus> {
        Some(self.status())
    }

    fn handler(&self) -> Option<HandlerStatus> {
        None
    }

    fn shut_down(&self, deadline: Instant) -> BoxFuture<'_, usize> {
        Box::pin(self.shut_down(deadline))
    }

    fn accept<'a>(
        &'a self,
        commands: &'a Dispatcher,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>> {
        Box::pin(async move {
            let (command, mut metadata) = contents::<A::Command>(&frame)?;
            let key = frame.key.clone().unwrap_or_default();
            let span = CommandSpan::taken(&frame.name, Some(&key), frame.id, &mut metadata);
            let info = CommandInfo { name: &frame.name, key: Some(&key), id: frame.id, metadata: &metadata };
            filtered(commands, &info).map_err(marked(&span))?;
            let stream = match self.stream(&key) {
                Ok(stream) => stream,
                Err(error) => return refused(&span, error),
            };
            let permit = match self.admit(frame.id, deadline.instant().min(admit_by)).await {
                Ok(permit) => permit,
                Err(error) => return refused(&span, error),
            };
            if let Err(reason) = commands.hooks().before(&info) {
                return refused(&span, ExecuteError::<A::Error>::NotAccepted { reason });
            }
            let (reply, answer) = oneshot();
            let order = Box::new(CommandRequest {
                content: content(&frame).map_err(marked(&span))? as u64,
                command,
                command_id: frame.id,
                metadata: metadata.clone(),
                expected: frame.expected.into(),
                deadline: deadline.instant(),
                now: Utc::now(),
                attempts: 0,
                span: span.clone(),
                _permit: permit,
                reply: reply.into(),
            });
            if let Err(error) = self.route(stream, order) {
                return refused(&span, error);
            }
            let (id, hooks, started) = (frame.id, commands.hooks().clone(), Instant::now());
            Ok(Box::pin(async move {
                let answer = answer.await.unwrap_or_else(|_| {
                    Err(ExecuteError::OutcomeUnknown { command_id: id, reason: STOPPED.into() })
                });
                span.ended(answer.as_ref().err().map(ExecuteError::kind));
                let info = CommandInfo { name: &frame.name, key: Some(&key), id, metadata: &metadata };
                hooks.after(&info, started.elapsed(), &answer);
                tell_receipt(answer)
            }) as Answering)
        })
    }
}

impl<H: Handler> Endpoint for HandlerRouter<H> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn aggregate(&self) -> Option<RouterStatus> {
        None
    }

    fn handler(&self) -> Option<HandlerStatus> {
        Some(self.status())
    }

    fn shut_down(&self, deadline: Instant) -> BoxFuture<'_, usize> {
        Box::pin(self.shut_down(deadline))
    }

    fn accept<'a>(
        &'a self,
        commands: &'a Dispatcher,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>> {
        Box::pin(async move {
            let (command, mut metadata) = contents::<H::Command>(&frame)?;
            let key =
                super::handler::key_of::<H>(&command).map_err(|error| Failure::new(Code::Refused, error))?;
            let span = CommandSpan::taken(H::NAME, key.as_deref(), frame.id, &mut metadata);
            let info = CommandInfo { name: H::NAME, key: key.as_deref(), id: frame.id, metadata: &metadata };
            filtered(commands, &info).map_err(marked(&span))?;
            let fingerprint = Uuid::from_u128(content(&frame).map_err(marked(&span))?);
            let permit = match self.admit(frame.id, deadline.instant().min(admit_by)).await {
                Ok(permit) => permit,
                Err(error) => return refused(&span, error),
            };
            let job = HandlerJob {
                command,
                id: frame.id,
                metadata: metadata.clone(),
                fingerprint,
                key: key.clone(),
                deadline: deadline.instant(),
                span: span.clone(),
            };
            let answer = match self.hand_over(job, permit) {
                Ok(answer) => answer,
                Err(error) => return refused(&span, error),
            };
            let (id, hooks, started) = (frame.id, commands.hooks().clone(), Instant::now());
            Ok(Box::pin(async move {
                // After the deadline, the attempt continues without its caller and the caller's
                // permit is released.
                let answer = match timeout_at(deadline.instant(), answer).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(_stopped)) => {
                        Err(ExecuteError::OutcomeUnknown { command_id: id, reason: STOPPED.into() })
                    }
                    Err(_elapsed) => Err(ExecuteError::timed_out(id, started.elapsed())),
                };
                span.ended(answer.as_ref().err().map(ExecuteError::kind));
                let info = CommandInfo { name: H::NAME, key: key.as_deref(), id, metadata: &metadata };
                hooks.after(&info, started.elapsed(), &answer);
                tell_handled(answer)
            }) as Answering)
        })
    }
}

/// Encodes the answer of a handler for another node.
fn tell_handled<R: serde::Serialize, E: std::error::Error + serde::Serialize>(
    answer: Result<Handled<R>, ExecuteError<E>>,
) -> Outcome {
    let told = answer.as_ref().map_err(Failure::of).and_then(|handled| {
        let reply = to_cbor(&handled.reply).map_err(lost_reply)?;
        Ok(Done { reply, duplicate: handled.duplicate, ..Done::default() })
    });
    told.map_or_else(Outcome::Error, Outcome::Done)
}
