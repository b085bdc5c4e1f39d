//! Encoded commands, for senders that do not know their type.

use std::time::Duration;

use uuid::Uuid;

use super::NotExecutedKind;
use super::dispatcher::Dispatcher;
use super::envelope::{Envelope, RECEIVE_TIMEOUT};
use super::hooks::CommandInfo;
use super::route::Route;
use super::wire::{Code, CommandFrame, Done, Expected, FORMAT, Failure, Kind, Outcome};
use crate::aggregate::{ExecuteError, NeverRejects};
use crate::event::Metadata;

/// Time after which an attempt at a command has ended: no node decides on it after its deadline.
///
/// The part above the deadline covers the transit of a message.
pub(crate) const ATTEMPT_LIFETIME: Duration = RECEIVE_TIMEOUT.saturating_add(Duration::from_secs(2));

/// A command with its target, encoded.
#[derive(Debug, Clone)]
pub(crate) struct ErasedCommand {
    pub(crate) id: Uuid,
    pub(crate) kind: Kind,
    /// Category of the aggregate, or name of the handler.
    pub(crate) name: String,
    /// Id of the aggregate, or key from the handler.
    pub(crate) key: Option<String>,
    pub(crate) payload: Vec<u8>,
    pub(crate) metadata: Metadata,
    pub(crate) expected: Expected,
}

/// The end of an encoded command.
pub(crate) enum ErasedAnswer {
    /// It took effect, with this reply.
    Done { reply: Vec<u8> },
    /// The aggregate or handler rejected it.
    Rejected { message: String, details: Vec<u8> },
    /// The same command may succeed later, without intervention. `uncertain`: the attempt may still
    /// take effect.
    Transient { reason: String, uncertain: bool },
    /// No node handles such commands.
    Unhandled { reason: String },
    /// The command had no effect, and the next attempt probably has none either.
    Failed { reason: String },
}

impl Dispatcher {
    /// Executes a command on the node that owns its target, with the default timeouts.
    pub(crate) async fn execute_erased(&self, command: ErasedCommand) -> ErasedAnswer {
        let name = command.name.clone();
        match self.run_erased(command).await {
            None => ErasedAnswer::Unhandled { reason: format!("no node handles commands for {name:?}") },
            Some(Outcome::Done(Done { reply, omitted: None, .. })) => ErasedAnswer::Done { reply },
            // It took effect. The reply does not fit into a message.
            Some(Outcome::Done(_)) => ErasedAnswer::Done { reply: Vec::new() },
            Some(Outcome::Error(failure)) => answer(failure),
        }
    }

    /// Returns the outcome, or `None` if no node handles such commands.
    async fn run_erased(&self, command: ErasedCommand) -> Option<Outcome> {
        let ErasedCommand { id, kind, name, key, payload, metadata, expected } = command;
        let envelope = Envelope::of(id, metadata);
        let info = CommandInfo { name: &name, key: key.as_deref(), id, metadata: &envelope.metadata };
        let endpoint = self.registry().endpoint(kind, &name);
        let accepts = endpoint.map_or(Ok(false), |_| self.hooks.accepts(&info));
        let able = match accepts {
            Ok(able) => able,
            Err(reason) => return Some(Outcome::Error(Failure::new(Code::Refused, reason))),
        };
        let route = match self.route(kind, &name, &info, &envelope, able) {
            Ok(route) => route?,
            Err(kind) => return Some(Outcome::Error(Failure::of(&error(kind)))),
        };
        let encoded = match envelope.metadata.encode() {
            Ok(encoded) => encoded,
            Err(reason) => return Some(Outcome::Error(Failure::of(&error(NotExecutedKind::Encode(reason))))),
        };
        let deadline = envelope.deadline();
        let frame = CommandFrame {
            format: FORMAT,
            id,
            kind,
            name,
            key,
            payload,
            metadata: encoded.into(),
            expected,
            left: deadline.left_millis(),
            sent: None,
            attempt: 1,
            prompt: false,
        };
        Some(match (route, endpoint) {
            (Route::Local { .. }, Some(endpoint)) => {
                let accepted = endpoint.accept(&self.hooks, frame, deadline, deadline.instant()).await;
                match accepted {
                    Ok(answering) => answering.await,
                    Err(failure) => Outcome::Error(failure),
                }
            }
            _ => match self.send(frame, &envelope, deadline).await {
                Ok(answering) => answering.await.0,
                Err(failure) => Outcome::Error(failure),
            },
        })
    }
}

fn error(kind: NotExecutedKind) -> ExecuteError<NeverRejects> {
    kind.into()
}

fn answer(failure: Failure) -> ErasedAnswer {
    let Failure { code, message, details, outage, .. } = failure;
    if outage {
        return ErasedAnswer::Transient { reason: message, uncertain: false };
    }
    match code {
        Code::Rejected => ErasedAnswer::Rejected { message, details },
        // The command was handled. Only its reply is lost.
        Code::ReplyUnreadable => ErasedAnswer::Done { reply: Vec::new() },
        Code::RetriesExhausted
        | Code::Overloaded
        | Code::StoreUnavailable
        | Code::NoHandler
        | Code::Unavailable
        | Code::ShuttingDown => ErasedAnswer::Transient { reason: message, uncertain: false },
        Code::OutcomeUnknown => ErasedAnswer::Transient { reason: message, uncertain: true },
        Code::ExpectedVersion
        | Code::Panicked
        | Code::Refused
        | Code::CommandIdReused
        | Code::IdAhead
        | Code::CommandTooLarge
        | Code::Failed => ErasedAnswer::Failed { reason: message },
    }
}
