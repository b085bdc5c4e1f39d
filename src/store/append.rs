use std::fmt;

use super::error::StoreError;
use crate::event::{NewEvent, Position, StreamId, Version};

/// The version that an append expects of its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedVersion {
    /// The stream is at exactly this version; [`Version::NONE`] equals
    /// [`NoStream`](Self::NoStream).
    Exact(Version),
    /// The stream has no events.
    NoStream,
    /// The stream has at least one event.
    StreamExists,
    /// Any version: appends after the last event.
    Any,
}

impl ExpectedVersion {
    /// Returns whether a stream at `actual` meets the expectation.
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
            ExpectedVersion::Any => f.write_str("any version"),
        }
    }
}

/// Events for one stream.
#[derive(Debug, Clone)]
pub struct StreamAppend {
    /// Target stream.
    pub stream: StreamId,
    /// Expected version of the stream.
    pub expected: ExpectedVersion,
    /// Events in order; at least one.
    pub events: Vec<NewEvent>,
}

/// An atomic append to one stream or several: all of it takes effect, or nothing.
#[derive(Debug, Clone)]
pub struct Append {
    /// Parts, decided in this order; at least one. Each stream may appear only once.
    pub streams: Vec<StreamAppend>,
}

impl Append {
    /// Creates an append to one stream.
    pub fn one(stream: StreamId, expected: ExpectedVersion, events: Vec<NewEvent>) -> Self {
        Self { streams: vec![StreamAppend { stream, expected, events }] }
    }

    /// Creates an atomic append to several streams.
    pub fn all(streams: Vec<StreamAppend>) -> Self {
        Self { streams }
    }

    /// Checks the requirements of every back end before any work starts.
    pub(crate) fn validate(&self) -> Result<(), StoreError> {
        let invalid = |reason: String| Err(StoreError::Invalid { reason });
        if self.streams.is_empty() {
            return invalid("the append has no streams; add at least one part".into());
        }
        for (index, part) in self.streams.iter().enumerate() {
            if part.events.is_empty() {
                return invalid(format!("the append to {} has no events; add at least one", part.stream));
            }
            if self.streams[..index].iter().any(|other| other.stream == part.stream) {
                return invalid(format!(
                    "the append contains stream {} twice; put its events into one part",
                    part.stream
                ));
            }
        }
        Ok(())
    }
}

/// The versions and positions that an append received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// New versions of the streams, in the order of the append's parts.
    pub versions: Vec<Version>,
    /// Position of every event: all of the first part, then all of the second, and so on.
    pub positions: Vec<Position>,
}

/// A stream was not at the version that an append expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "conflict on {stream}: expected {expected}, found {}; read the newer events and decide again",
    actual.map_or_else(|| "another version".to_owned(), |version| format!("version {version}"))
)]
pub struct Conflict {
    /// Conflicting stream.
    pub stream: StreamId,
    /// Expected version.
    pub expected: ExpectedVersion,
    /// Actual version; `None` if only the append before this one learned it.
    pub actual: Option<Version>,
}

/// The reason why an append failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// A stream was not at the expected version; nothing of the append was written.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
