use std::cell::Cell;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::event::{Metadata, StreamId, Version};

/// What a decision may know beside the state: who asks, and the only clock and randomness that it may use.
#[derive(Debug)]
pub struct Context<'a> {
    stream: &'a StreamId,
    version: Version,
    command_id: Uuid,
    metadata: &'a Metadata,
    now: DateTime<Utc>,
    /// How many ids were made: each is another one, and the same ones come when the command is decided again.
    ids: Cell<u64>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(
        stream: &'a StreamId,
        version: Version,
        command_id: Uuid,
        metadata: &'a Metadata,
        now: DateTime<Utc>,
    ) -> Self {
        Self { stream, version, command_id, metadata, now, ids: Cell::new(0) }
    }

    /// The id of the aggregate.
    pub fn id(&self) -> &str {
        self.stream.id()
    }

    /// The stream of the aggregate.
    pub fn stream(&self) -> &StreamId {
        self.stream
    }

    /// The version that the decision is made on; [`Version::NONE`] if nothing has happened yet.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The id of the command.
    pub fn command_id(&self) -> Uuid {
        self.command_id
    }

    /// What came with the command: correlation, trace context, the user's map.
    pub fn metadata(&self) -> &Metadata {
        self.metadata
    }

    /// When the command arrived. The same when it is decided again.
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }

    /// A new id, derived from the command's and the aggregate's: the same sequence when the command is decided again, and
    /// another one when another aggregate gets the same command id.
    pub fn new_id(&self) -> Uuid {
        let count = self.ids.get();
        self.ids.set(count + 1);
        Uuid::new_v5(&self.command_id, format!("{} {count}", self.stream).as_bytes())
    }
}
