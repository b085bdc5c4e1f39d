//! Aggregates as endpoints: a router accepts the commands of other nodes.

use std::any::Any;

use chrono::Utc;
use ractor::concurrency::oneshot;
use tokio::time::Instant;

use super::endpoint::{Answering, Endpoint, STOPPED, content, contents, filtered, marked, refused};
use super::envelope::Deadline;
use super::handler::HandlerStatus;
use super::hooks::{CommandHooks, CommandInfo};
use super::registry::Registry;
use super::wire::{CommandFrame, Failure, Kind, encode_receipt};
use super::{ExecuteError, NotExecutedKind};
use crate::aggregate::{Aggregate, CommandRequest, Router, RouterStatus};
use crate::event::Event;
use crate::future::BoxFuture;
use crate::telemetry::trace::CommandSpan;

impl Registry {
    pub(crate) fn aggregate<A: Aggregate>(&mut self, router: Router<A>) {
        self.register::<A>(Kind::Aggregate, <A::Event as Event>::CATEGORY, Box::new(router));
    }

    pub(crate) fn router<A: Aggregate>(&self) -> Option<&Router<A>> {
        self.of::<A, Router<A>>()
    }
}

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
        hooks: &'a CommandHooks,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>> {
        Box::pin(async move {
            let (command, mut metadata) = contents::<A::Command>(&frame)?;
            let key = frame.key.clone().unwrap_or_default();
            let span = CommandSpan::taken(&frame.name, Some(&key), frame.id, &mut metadata);
            let info = CommandInfo { name: &frame.name, key: Some(&key), id: frame.id, metadata: &metadata };
            filtered(hooks, &info).map_err(marked(&span))?;
            let stream = match self.stream(&key) {
                Ok(stream) => stream,
                Err(error) => return refused(&span, error),
            };
            let permit = match self.admit(frame.id, deadline.instant().min(admit_by)).await {
                Ok(permit) => permit,
                Err(error) => return refused(&span, error),
            };
            if let Err(reason) = hooks.before(&info) {
                return refused(
                    &span,
                    ExecuteError::<A::Error>::from(NotExecutedKind::NotAccepted { reason }),
                );
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
            let (id, hooks, started) = (frame.id, hooks.clone(), Instant::now());
            Ok(Box::pin(async move {
                let answer = answer.await.unwrap_or_else(|_| {
                    Err(ExecuteError::OutcomeUnknown { command_id: id, reason: STOPPED.into() })
                });
                span.ended(answer.as_ref().err().map(ExecuteError::kind));
                let info = CommandInfo { name: &frame.name, key: Some(&key), id, metadata: &metadata };
                hooks.after(&info, started.elapsed(), &answer);
                encode_receipt(answer)
            }) as Answering)
        })
    }
}
