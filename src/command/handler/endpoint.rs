//! Handlers as endpoints: a router accepts the commands of other nodes.

use std::any::Any;

use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::job::HandlerJob;
use super::router::HandlerRouter;
use super::status::HandlerStatus;
use super::{Handled, Handler, key_of};
use crate::aggregate::RouterStatus;
use crate::codec::to_cbor;
use crate::command::ExecuteError;
use crate::command::endpoint::{Answering, Endpoint, STOPPED, content, contents, filtered, marked, refused};
use crate::command::envelope::Deadline;
use crate::command::hooks::{CommandHooks, CommandInfo};
use crate::command::registry::Registry;
use crate::command::wire::{Code, CommandFrame, Done, Failure, Kind, Outcome, lost_reply};
use crate::future::BoxFuture;
use crate::telemetry::trace::CommandSpan;

impl Registry {
    pub(crate) fn add_handler<H: Handler>(&mut self, router: HandlerRouter<H>) {
        self.register::<H>(Kind::Handler, H::NAME, Box::new(router));
    }

    pub(in crate::command) fn handler<H: Handler>(&self) -> Option<&HandlerRouter<H>> {
        self.of::<H, HandlerRouter<H>>()
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
        hooks: &'a CommandHooks,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>> {
        Box::pin(async move {
            let (command, mut metadata) = contents::<H::Command>(&frame)?;
            let key = key_of::<H>(&command).map_err(|error| Failure::new(Code::Refused, error))?;
            let span = CommandSpan::taken(H::NAME, key.as_deref(), frame.id, &mut metadata);
            let info = CommandInfo { name: H::NAME, key: key.as_deref(), id: frame.id, metadata: &metadata };
            filtered(hooks, &info).map_err(marked(&span))?;
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
            let (id, hooks, started) = (frame.id, hooks.clone(), Instant::now());
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
                encode_handled(answer)
            }) as Answering)
        })
    }
}

/// Encodes the answer of a handler for another node.
fn encode_handled<R: serde::Serialize, E: std::error::Error + serde::Serialize>(
    answer: Result<Handled<R>, ExecuteError<E>>,
) -> Outcome {
    let encoded = answer.as_ref().map_err(Failure::of).and_then(|handled| {
        let reply = to_cbor(&handled.reply).map_err(lost_reply)?;
        Ok(Done { reply, duplicate: handled.duplicate, ..Done::default() })
    });
    encoded.map_or_else(Outcome::Error, Outcome::Done)
}
