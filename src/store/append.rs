use std::collections::HashSet;
use std::fmt;
use std::future::Future;

use super::boundary::Boundary;
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
    /// Condition: no event crosses this boundary.
    pub unless: Option<Boundary>,
}

impl Append {
    /// Maximum number of different tags of all events of an append.
    pub const MAX_TAGS: usize = 64;

    /// Creates an append to one stream.
    pub fn one(stream: StreamId, expected: ExpectedVersion, events: Vec<NewEvent>) -> Self {
        Self { streams: vec![StreamAppend { stream, expected, events }], unless: None }
    }

    /// Creates an atomic append to several streams.
    pub fn all(streams: Vec<StreamAppend>) -> Self {
        Self { streams, unless: None }
    }

    /// Appends only if no event crosses the boundary: none that matches its query, except those that
    /// the decision has read (I13).
    ///
    /// Otherwise the append fails with [`AppendError::Changed`], or with [`AppendError::Exists`] if
    /// the boundary comes from [`Query::exists`](super::Query::exists).
    #[must_use]
    pub fn unless(mut self, boundary: Boundary) -> Self {
        self.unless = Some(boundary);
        self
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
    /// An event that the decision has not read matches its query; nothing was written.
    #[error("conflict: the event at position {position} matches the query; read again and decide again")]
    Changed {
        /// Position of the event.
        position: Position,
    },
    /// An event that must not exist does; nothing was written.
    #[error("the event at position {position} matches the query, and must not exist")]
    Exists {
        /// Position of the event.
        position: Position,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl AppendError {
    /// Returns the error of an append whose boundary the event at `position` has crossed.
    pub(super) fn crossed(boundary: &Boundary, position: Position) -> Self {
        if boundary.expects_none() { Self::Exists { position } } else { Self::Changed { position } }
    }
}

/// Maximum sizes of payload and metadata that a back end can store, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct SizeLimits {
    pub(super) event: usize,
    /// Limit of a batch, which becomes one call.
    pub(super) batch: usize,
}

impl SizeLimits {
    pub(super) const NONE: Self = Self { event: usize::MAX, batch: usize::MAX };
}

/// Writes the valid appends of a batch with `write`; returns one result for each append.
///
/// An append that can never be stored joins no transaction with others.
pub(super) async fn append_valid<F>(
    batch: Vec<Append>,
    limits: SizeLimits,
    write: impl FnOnce(Vec<Append>) -> F,
) -> Vec<Result<Appended, AppendError>>
where
    F: Future<Output = Vec<Result<Appended, AppendError>>>,
{
    let mut bytes = 0;
    let mut streams = HashSet::new();
    let mut valid = Vec::with_capacity(batch.len());
    let checked: Vec<Result<(), StoreError>> = batch
        .into_iter()
        .map(|append| {
            check(&append, limits, &mut bytes, &mut streams)?;
            valid.push(append);
            Ok(())
        })
        .collect();
    let mut written = if valid.is_empty() { Vec::new() } else { write(valid).await }.into_iter();
    let missing = || StoreError::Corrupt { reason: "an append received no result".into() };
    let result = |check: Result<(), StoreError>| {
        check?;
        written.next().unwrap_or_else(|| Err(missing().into()))
    };
    checked.into_iter().map(result).collect()
}

/// Checks an append; adds it to the `bytes` and `streams` of its batch.
fn check(
    append: &Append,
    limits: SizeLimits,
    bytes: &mut usize,
    streams: &mut HashSet<StreamId>,
) -> Result<(), StoreError> {
    let invalid = |reason: String| Err(StoreError::Invalid { reason });
    if append.streams.is_empty() {
        return invalid("the append has no streams; add at least one part".into());
    }
    if let Some(boundary) = &append.unless {
        boundary.query().check()?;
    }
    let tags = append.streams.iter().flat_map(|part| &part.events).flat_map(|event| event.tags.iter());
    // The tag of a command, which storied adds to decisions, does not count.
    let tags = tags.filter(|tag| !tag.is_reserved()).collect::<HashSet<_>>().len();
    if tags > Append::MAX_TAGS {
        let limit = Append::MAX_TAGS;
        return invalid(format!("too many tags in an append: {tags} (limit {limit}); divide it"));
    }
    let mut all = *bytes;
    for (index, part) in append.streams.iter().enumerate() {
        let stream = &part.stream;
        if part.events.is_empty() {
            return invalid(format!("the append to {stream} has no events; add at least one"));
        }
        if append.streams[..index].iter().any(|other| other.stream == *stream) {
            return invalid(format!(
                "the append contains stream {stream} twice; put its events into one part"
            ));
        }
        if streams.contains(stream) {
            return invalid(format!(
                "an earlier append of the batch has stream {stream}; await its result, then append again"
            ));
        }
        for event in &part.events {
            let (size, limit) = (event.payload.len().saturating_add(event.metadata.len()), limits.event);
            if size > limit {
                return invalid(format!(
                    "the event {} of {stream} is too large: {size} bytes (limit {limit}); store large content elsewhere and refer to it",
                    event.name
                ));
            }
            all = all.saturating_add(size);
            if let Err(error) = event.tags.check() {
                return invalid(format!("invalid tags of the event {} of {stream}: {error}", event.name));
            }
        }
    }
    if all > limits.batch {
        return invalid(format!(
            "the batch is too large: {all} bytes of events (limit {}); split it, or store large content elsewhere",
            limits.batch
        ));
    }
    *bytes = all;
    streams.extend(append.streams.iter().map(|part| part.stream.clone()));
    Ok(())
}
