//! The state that the attempts of a handler share, and the result of an attempt.

use std::sync::{Arc, Weak};

use uuid::Uuid;

use super::options::HandlerOptions;
use super::{Handled, Handler};
use crate::command::dispatcher::Dispatcher;
use crate::command::target::{Answer, ToHandler};
use crate::command::wire::{About, Done, Outcome, read_reply};
use crate::command::{ExecuteError, NotExecutedKind};
use crate::store::{EventStore, ExpectedVersion, StoreError};

/// The shared state of all attempts of one handler.
pub(crate) struct Shared<H> {
    pub(crate) handler: H,
    pub(crate) options: HandlerOptions,
    pub(crate) store: Arc<dyn EventStore>,
    /// Dispatcher for nested commands. It owns this handler, so this reference is weak.
    pub(crate) commands: Weak<Dispatcher>,
}

/// The result of an attempt. All callers of the command get it.
#[derive(Debug)]
pub(crate) enum AttemptResult {
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
    pub(super) fn answer<H: Handler>(&self, id: Uuid, repeated: bool) -> Answer<ToHandler<H>> {
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
