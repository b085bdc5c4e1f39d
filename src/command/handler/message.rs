//! The messages of a handler's actor, and the worker slots that it grants.

use std::sync::Arc;

use ractor::ActorRef;
use ractor::concurrency::OneshotSender;
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use super::Handler;
use super::caller::Caller;
use super::job::AttemptResult;
use crate::command::target::{RoutedCommand, ToHandler};

/// A message to a handler's actor.
pub(crate) enum Message<H: Handler> {
    /// Run a command for a caller.
    Run(RoutedCommand<ToHandler<H>>, Caller<H>, Arc<OwnedSemaphorePermit>),
    /// An attempt has ended. `freed`: whether it returned its worker slot.
    Ended { id: Uuid, key: Option<String>, ran: AttemptResult, freed: bool },
    /// A worker slot is free.
    Freed,
    /// An attempt that released its worker slot needs one again.
    Enter(OneshotSender<WorkerPermit<H>>),
}

/// A worker slot. Dropping it frees the slot.
pub(crate) struct WorkerPermit<H: Handler> {
    actor: ActorRef<Message<H>>,
    /// Whether another message reports that the slot is free.
    reported: bool,
}

impl<H: Handler> WorkerPermit<H> {
    pub(super) fn new(actor: ActorRef<Message<H>>) -> Self {
        Self { actor, reported: false }
    }

    pub(super) fn actor(&self) -> ActorRef<Message<H>> {
        self.actor.clone()
    }

    /// Returns the slot without a separate message: the message about the attempt's end reports it.
    pub(super) fn end(mut self) {
        self.reported = true;
    }
}

impl<H: Handler> Drop for WorkerPermit<H> {
    fn drop(&mut self) {
        if !self.reported {
            // Without the actor there are no slots.
            let _ = self.actor.cast(Message::Freed);
        }
    }
}
