use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use tokio::time::Instant;
use uuid::Uuid;

use super::yield_slot::YieldSlot;
use crate::command::dispatcher::Dispatcher;
use crate::command::envelope::Envelope;
use crate::command::wire::Kind;
use crate::command_id;
use crate::event::Metadata;

/// The context of an attempt: the command's metadata, and the means to send nested commands.
pub struct HandlerContext {
    pub(super) commands: Arc<Dispatcher>,
    id: Uuid,
    metadata: Metadata,
    now: DateTime<Utc>,
    /// End of the attempt's time limit.
    deadline: Instant,
    /// Number of commands sent to each target, and of steps of each name. It makes their ids the
    /// same in every attempt.
    given: Mutex<HashMap<String, u64>>,
    pub(super) slot: Arc<dyn YieldSlot>,
}

impl HandlerContext {
    pub(super) fn new(
        commands: Arc<Dispatcher>,
        id: Uuid,
        metadata: Metadata,
        deadline: Instant,
        slot: Arc<dyn YieldSlot>,
    ) -> Self {
        Self { commands, id, metadata, now: Utc::now(), deadline, given: Mutex::default(), slot }
    }

    /// Returns the id of the command.
    pub fn command_id(&self) -> Uuid {
        self.id
    }

    /// Returns the metadata of the command: correlation, trace context and the user's map.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Returns the start of this attempt. Every attempt has its own time.
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }

    /// Ends the attempt. Returns whether that frees a worker slot.
    pub(super) fn end(self) -> bool {
        self.slot.end()
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Returns the name of the next command to a target, or step of a name.
    pub(super) fn next_of(&self, what: String) -> String {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let count = given.entry(what.clone()).or_default();
        *count += 1;
        format!("{count} {what}")
    }

    /// Creates the envelope of the next nested command to a target.
    pub(super) fn envelope(&self, kind: Kind, name: &str, key: &str) -> Envelope {
        let id = command_id::derived(self.id, &self.next_of(format!("{kind:?} {name} {key}")));
        let metadata = Metadata {
            correlation_id: Some(self.metadata.correlation_id.unwrap_or(self.id)),
            causation_id: Some(self.id),
            ..self.metadata.clone()
        };
        Envelope::within(id, metadata, self.deadline)
    }
}

impl fmt::Debug for HandlerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerContext").field("command_id", &self.id).finish_non_exhaustive()
    }
}
