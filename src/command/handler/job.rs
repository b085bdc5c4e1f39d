//! A command for a handler, the state that its attempts share, and their result.

use std::sync::{Arc, Weak};

use tokio::time::Instant;
use uuid::Uuid;

use super::options::HandlerOptions;
use super::{Handled, Handler};
use crate::command::dispatcher::Dispatcher;
use crate::command::wire::{About, Done, Outcome, read_reply};
use crate::command::{ExecuteError, NotExecutedKind};
use crate::event::Metadata;
use crate::store::{EventStore, ExpectedVersion, StoreError};
use crate::telemetry::trace::CommandSpan;

/// The answer to a handler's command.
pub(crate) type Answer<H> = Result<Handled<<H as Handler>::Reply>, ExecuteError<<H as Handler>::Error>>;

/// A command for a handler.
pub(crate) struct HandlerJob<H: Handler> {
    pub(crate) command: H::Command,
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    pub(crate) fingerprint: Uuid,
    pub(crate) key: Option<String>,
    /// Time until which its caller waits.
    ///
    /// A command that has not started by the latest deadline of its callers is dropped.
    pub(crate) deadline: Instant,
    pub(crate) span: CommandSpan,
}

/// The shared state of all attempts of one handler.
pub(super) struct Shared<H> {
    pub(super) handler: H,
    pub(super) options: HandlerOptions,
    pub(super) store: Arc<dyn EventStore>,
    /// Dispatcher for nested commands. It owns this handler, so this reference is weak.
    pub(super) commands: Weak<Dispatcher>,
}

/// The result of an attempt. All callers of the command get it.
#[derive(Debug)]
pub(super) enum AttemptResult {
    /// The outcome is recorded, by this attempt or before it.
    Recorded { outcome: Outcome, before: bool },
    /// The outcome is recorded, but the record does not decode.
    Unreadable(String),
    /// A hook refused the command; nothing happened.
    Refused(String),
    /// The id belongs to another command.
    CommandIdReused,
    /// The store could not look up an earlier record; nothing happened.
    Store(StoreError),
    /// The attempt ended without a record.
    Unknown(String),
}

impl AttemptResult {
    /// Creates the answer for one caller. `repeated`: whether it is not the first caller.
    pub(super) fn answer<H: Handler>(&self, id: Uuid, repeated: bool) -> Answer<H> {
        let unknown = |reason| ExecuteError::OutcomeUnknown { command_id: id, reason };
        match self {
            AttemptResult::Recorded { outcome: Outcome::Done(Done { reply, .. }), before } => {
                let reply = read_reply(reply, id)?;
                Ok(Handled { command_id: id, reply, duplicate: *before || repeated })
            }
            AttemptResult::Recorded { outcome: Outcome::Error(failure), .. } => {
                let expected = ExpectedVersion::Any;
                Err(failure.clone().into_error(&About { id, name: H::NAME, stream: None, expected }))
            }
            AttemptResult::Unreadable(error) => {
                Err(unknown(format!("it was handled, but its record does not decode: {error}")))
            }
            AttemptResult::Refused(reason) => {
                Err(NotExecutedKind::NotAccepted { reason: reason.clone() }.into())
            }
            AttemptResult::CommandIdReused => Err(NotExecutedKind::CommandIdReused { command_id: id }.into()),
            AttemptResult::Store(error) => Err(NotExecutedKind::Store(error.clone()).into()),
            AttemptResult::Unknown(reason) => Err(unknown(reason.clone())),
        }
    }
}
