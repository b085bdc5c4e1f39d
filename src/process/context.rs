use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::event::Trail;
use crate::event::RecordedEvent;

/// The circumstances of an input: the instance, the recorded event and its metadata.
#[derive(Debug)]
pub struct ProcessContext<'a> {
    pub(super) id: &'a str,
    pub(super) input_id: Uuid,
    pub(super) recorded: Option<&'a RecordedEvent>,
    pub(super) trail: &'a Trail,
    pub(super) now: DateTime<Utc>,
}

impl ProcessContext<'_> {
    /// Returns the id of the instance.
    pub fn id(&self) -> &str {
        self.id
    }

    /// Returns the id of the input: of the event, of the command, or of the timer.
    ///
    /// It is the same in every attempt.
    pub fn input_id(&self) -> Uuid {
        self.input_id
    }

    /// Returns the event of the input, with its stream, position and time; `None` for other inputs.
    ///
    /// Its metadata is empty: see [`correlation_id`](Self::correlation_id) and
    /// [`metadata`](Self::metadata).
    pub fn event(&self) -> Option<&RecordedEvent> {
        self.recorded
    }

    /// Returns the correlation id, which the commands of the reaction carry.
    pub fn correlation_id(&self) -> Uuid {
        self.trail.correlation
    }

    /// Returns an entry of the user's map in the metadata, which the commands carry too.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.trail.user.get(key).map(String::as_str)
    }

    /// Returns the time of the reaction, by the clock of this node.
    ///
    /// Timers use the clock of the store.
    pub fn now(&self) -> DateTime<Utc> {
        self.now
    }
}
