use std::fmt;

use crate::event::{NewEvent, Position, StreamId, Version};

/// What an append expects of its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedVersion {
    /// The stream is exactly at this version; [`Version::NONE`] is the same as [`NoStream`](Self::NoStream).
    Exact(Version),
    /// The stream has no events.
    NoStream,
    /// The stream has events, however many.
    StreamExists,
    /// Nothing: append behind whatever is there.
    Any,
}

impl ExpectedVersion {
    /// Whether a stream at `actual` is as expected.
    pub fn allows(self, actual: Version) -> bool {
        match self {
            ExpectedVersion::Exact(version) => actual == version,
            ExpectedVersion::NoStream => actual == Version::NONE,
            ExpectedVersion::StreamExists => actual > Version::NONE,
            ExpectedVersion::Any => true,
        }
    }
}

impl fmt::Display for ExpectedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExpectedVersion::Exact(version) => write!(f, "version {version}"),
            ExpectedVersion::NoStream => f.write_str("no stream"),
            ExpectedVersion::StreamExists => f.write_str("an existing stream"),
            ExpectedVersion::Any => f.write_str("anything"),
        }
    }
}

/// Events for one stream.
#[derive(Debug, Clone)]
pub struct StreamAppend {
    /// Where to.
    pub stream: StreamId,
    /// What is expected of it.
    pub expected: ExpectedVersion,
    /// At least one event, in order.
    pub events: Vec<NewEvent>,
}

/// One atomic append, to one stream or to several: all of it happens or nothing.
#[derive(Debug, Clone)]
pub struct Append {
    /// The parts, decided in this order; at least one. A stream may appear only once.
    pub streams: Vec<StreamAppend>,
}

impl Append {
    /// An append to one stream.
    pub fn one(stream: StreamId, expected: ExpectedVersion, events: Vec<NewEvent>) -> Self {
        Self { streams: vec![StreamAppend { stream, expected, events }] }
    }

    /// An atomic append to several streams.
    pub fn all(streams: Vec<StreamAppend>) -> Self {
        Self { streams }
    }

    /// Checks what every back end demands before it touches anything.
    pub(crate) fn validate(&self) -> Result<(), super::StoreError> {
        let invalid = |reason: String| Err(super::StoreError::Invalid { reason });
        if self.streams.is_empty() {
            return invalid("an append names no stream".into());
        }
        for (index, part) in self.streams.iter().enumerate() {
            if part.events.is_empty() {
                return invalid(format!("an append to {} has no events", part.stream));
            }
            if self.streams[..index].iter().any(|other| other.stream == part.stream) {
                return invalid(format!(
                    "an append names {} twice; put its events into one part",
                    part.stream
                ));
            }
        }
        Ok(())
    }
}

/// Where the events of an append are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// The versions of the streams now, in the order of the append's parts.
    pub versions: Vec<Version>,
    /// The position of every event, in the order of the append (all of the first part, then all of the second …).
    pub positions: Vec<Position>,
}

/// A stream was not as an append expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "conflict on {stream}: expected {expected}, found version {actual}; read what happened since and decide again"
)]
pub struct Conflict {
    /// Which stream.
    pub stream: StreamId,
    /// What was expected.
    pub expected: ExpectedVersion,
    /// The version that it has.
    pub actual: Version,
}
