//! The endpoint of a command on this node, and the steps that aggregates and handlers share.

use std::any::Any;

use tokio::time::Instant;

use super::envelope::Deadline;
use super::handler::HandlerStatus;
use super::hooks::{CommandHooks, CommandInfo};
use super::wire::{Code, CommandFrame, Failure, Outcome};
use super::{ExecuteError, NotExecutedKind};
use crate::aggregate::RouterStatus;
use crate::codec::{fingerprint, from_cbor};
use crate::event::Metadata;
use crate::future::BoxFuture;
use crate::telemetry::trace::CommandSpan;

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
        hooks: &'a CommandHooks,
        frame: CommandFrame,
        deadline: Deadline,
        admit_by: Instant,
    ) -> BoxFuture<'a, Result<Answering, Failure>>;
}

/// Decodes the command and the metadata of a frame.
pub(super) fn contents<C: serde::de::DeserializeOwned>(
    frame: &CommandFrame,
) -> Result<(C, Metadata), Failure> {
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
pub(super) fn marked(span: &CommandSpan) -> impl Fn(Failure) -> Failure + use<'_> {
    move |failure| {
        span.ended(Some("not_accepted"));
        failure
    }
}

/// Computes the fingerprint of the command as sent.
///
/// The decoded command is not used: another version of the program may know more fields.
pub(super) fn content(frame: &CommandFrame) -> Result<u128, Failure> {
    let unreadable = |error: String| Failure::new(Code::Refused, error);
    let sent: ciborium::Value = from_cbor(&frame.payload).map_err(|error| unreadable(error.to_string()))?;
    fingerprint(&sent).map_err(|error| unreadable(error.to_string()))
}

/// Applies the filters of this node to a command.
pub(super) fn filtered(hooks: &CommandHooks, info: &CommandInfo<'_>) -> Result<(), Failure> {
    let refused = || Failure::new(Code::Refused, format!("a filter does not accept command {}", info.id));
    let takes = hooks.accepts(info).map_err(|reason| Failure::new(Code::Refused, reason))?;
    takes.then_some(()).ok_or_else(refused)
}

/// Answers an error that every node would give; refuses a command that another node may execute.
pub(super) fn refused<E: std::error::Error + serde::Serialize>(
    span: &CommandSpan,
    error: ExecuteError<E>,
) -> Result<Answering, Failure> {
    span.ended(Some(error.kind()));
    match error {
        ExecuteError::NotExecuted {
            kind:
                NotExecutedKind::Overloaded { .. }
                | NotExecutedKind::ShuttingDown
                | NotExecutedKind::Restarting { .. }
                | NotExecutedKind::Store(_),
            ..
        } => Err(Failure::of(&error)),
        error => answered(Outcome::Error(Failure::of(&error))),
    }
}

fn answered(outcome: Outcome) -> Result<Answering, Failure> {
    Ok(Box::pin(std::future::ready(outcome)))
}

/// Cause of an unknown outcome without an answer.
pub(super) const STOPPED: &str = "the actor stopped before it answered";
