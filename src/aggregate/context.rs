use std::cell::Cell;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::event::{Metadata, StreamId, Version};

/// The inputs of a decision beside the state: the command's metadata, a clock and new ids.
///
/// A decision uses no other clock and no other randomness.
#[derive(Debug)]
pub struct Context<'a> {
    stream: &'a StreamId,
    version: Version,
    command_id: Uuid,
    metadata: &'a Metadata,
    now: DateTime<Utc>,
    /// Number of ids generated so far. It makes each id distinct and the sequence repeatable.
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

    /// Returns the id of the aggregate, or of the stream that gets the decision's events.
    pub fn id(&self) -> &str {
        self.stream.id()
    }

    /// Returns the stream of the aggregate, or the one that gets the decision's events.
    pub fn stream(&self) -> &StreamId {
        self.stream
    }

    /// Returns the version that the decision is based on, or [`Version::NONE`] without events.
    ///
    /// Always [`Version::NONE`] in a [decision over several streams](crate::Decide).
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the id of the command.
    pub fn command_id(&self) -> Uuid {
        self.command_id
    }

    /// Returns the metadata of the command: correlation, trace context and the user's map.
    pub fn metadata(&self) -> &Metadata {
        self.metadata
    }

    /// Returns the arrival time of the command. It is the same in every attempt.
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }

    /// Generates an id from the command id and the stream.
    ///
    /// Every attempt at the command gets the same sequence of ids. Another aggregate that gets the
    /// same command id gets another sequence.
    pub fn new_id(&self) -> Uuid {
        let count = self.ids.get();
        self.ids.set(count + 1);
        Uuid::new_v5(&self.command_id, format!("{} {count}", self.stream).as_bytes())
    }
}
