//! The endpoint of one target on this node: accepts commands of other nodes.

use std::any::Any;

use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::envelope::Deadline;
use super::hooks::{CommandHooks, CommandInfo};
use super::router::Router;
use super::target::{Routed, RoutedCommand, TargetStatus};
use super::wire::{Code, CommandFrame, Failure, Outcome};
use super::{ExecuteError, NotExecutedKind};
use crate::codec::{fingerprint, from_cbor};
use crate::event::Metadata;
use crate::future::BoxFuture;
use crate::telemetry::trace::CommandSpan;

/// The future outcome of a command.
pub(super) type Answering = BoxFuture<'static, Outcome>;

/// A router without its types.
pub(super) trait Endpoint: Any + Send + Sync {
    fn status(&self) -> TargetStatus;
    fn shut_down(&self, deadline: Instant) -> BoxFuture<'_, usize>;
    /// Accepts a command, or refuses it. Waits for a permit until `admit_by` at most.
    fn accept<'a>(
        &'a self,
        hooks: &'a CommandHooks,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>>;
}

impl<T: Routed> Endpoint for Router<T> {
    fn status(&self) -> TargetStatus {
        self.status()
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
            let (started, deadline) = (Instant::now(), deadline.instant());
            let (command, mut metadata) = contents::<T::Command>(&frame)?;
            let CommandFrame { id, key, expected, payload, .. } = frame;
            let key = T::key(key, &command).map_err(|kind| Failure::of(&error::<T>(kind)))?;
            let span = CommandSpan::taken(T::NAME, key.as_deref(), id, &mut metadata);
            let info = CommandInfo { name: T::NAME, key: key.as_deref(), id, metadata: &metadata };
            let fingerprint = filtered(hooks, &info).and_then(|()| content(&payload)).inspect_err(|_| {
                span.ended(Some("not_accepted"));
            })?;
            let expected = expected.into();
            let submitted = async {
                let address = T::address(key.as_deref())?;
                let permit = self.admit(id, deadline.min(admit_by)).await?;
                let span = span.clone();
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
                self.submit(hooks, command, permit, started)
            };
            let dispatched = match submitted.await {
                Ok(dispatched) => dispatched,
                Err(kind) => return refused::<T>(&span, kind),
            };
            Ok(Box::pin(async move {
                let answer = dispatched.report().await.result;
                span.ended(answer.as_ref().err().map(ExecuteError::kind));
                let done = answer.as_ref().map_err(Failure::of).and_then(T::encode);
                done.map_or_else(Outcome::Error, Outcome::Done)
            }) as Answering)
        })
    }
}

/// Decodes the command and the metadata of a frame.
fn contents<C: DeserializeOwned>(frame: &CommandFrame) -> Result<(C, Metadata), Failure> {
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

/// Computes the fingerprint of the command as sent.
///
/// The decoded command is not used: another version of the program may know more fields.
fn content(payload: &[u8]) -> Result<u128, Failure> {
    let sent = from_cbor::<ciborium::Value>(payload);
    let content = sent.and_then(|sent| fingerprint(&sent).map_err(|error| error.to_string()));
    content.map_err(|error| Failure::new(Code::Refused, error))
}

/// Applies the filters of this node to a command.
fn filtered(hooks: &CommandHooks, info: &CommandInfo<'_>) -> Result<(), Failure> {
    let refused = || Failure::new(Code::Refused, format!("a filter does not accept command {}", info.id));
    let takes = hooks.accepts(info).map_err(|reason| Failure::new(Code::Refused, reason))?;
    takes.then_some(()).ok_or_else(refused)
}

fn error<T: Routed>(kind: NotExecutedKind) -> ExecuteError<T::Error> {
    kind.into()
}

/// Answers an error that every node would give; refuses a command that another node may execute.
fn refused<T: Routed>(span: &CommandSpan, kind: NotExecutedKind) -> Result<Answering, Failure> {
    let retry_elsewhere = matches!(
        kind,
        NotExecutedKind::Overloaded { .. }
            | NotExecutedKind::ShuttingDown
            | NotExecutedKind::Restarting { .. }
            | NotExecutedKind::Store(_)
    );
    let error = error::<T>(kind);
    span.ended(Some(error.kind()));
    let failure = Failure::of(&error);
    if retry_elsewhere { Err(failure) } else { Ok(Box::pin(std::future::ready(Outcome::Error(failure)))) }
}
