use super::{EventName, InvalidName, RecordedEvent, StreamId, Version};
use crate::codec::SerializeError;

/// A value that cannot be written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// `E` is no enum in serde's default form, so its events have no names.
    #[error(
        "{type_name} cannot be an event: {reason}; an event is a serde enum in the default, externally tagged form (no #[serde(tag)], #[serde(untagged)] or #[serde(from)] on it)"
    )]
    NoEnum {
        /// The Rust type.
        type_name: &'static str,
        /// What was found instead.
        reason: String,
    },
    /// What was encoded cannot be read again, so it is not stored: a reader would meet the same bytes.
    #[error("{what} would be stored in a form that cannot be read again, at {field}: {reason}; {remedy}")]
    NotReadable {
        /// The event's name, or the type of a reply.
        what: String,
        /// Where in it, as `line.prices[2]`; as far as serde says.
        field: String,
        /// What the decoder says.
        reason: String,
        /// What to change.
        remedy: &'static str,
    },
    /// An upcaster would change events that are written today, or has no end.
    #[error("the upcasters of category {category:?} cannot be used: {reason}")]
    Upcasters {
        /// The category.
        category: &'static str,
        /// Which rule, why, and what to do.
        reason: String,
    },
    /// The category or a variant has a name that no event can have.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The metadata is larger than [`Metadata::MAX_BYTES`](super::Metadata::MAX_BYTES).
    #[error(
        "the metadata is too large: {bytes} bytes encoded (limit {limit}), {largest} is the largest part; keep large values in the event and references to them in the metadata"
    )]
    MetadataTooLarge {
        /// Its size in bytes, encoded.
        bytes: usize,
        /// The limit in bytes.
        limit: usize,
        /// The largest field, or the key of the largest of the user's entries.
        largest: String,
    },
    /// serde refused.
    #[error(transparent)]
    Serialize(#[from] SerializeError),
}

/// Why stored bytes are not what the reader asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The event type has no such variant, alias or upcaster.
    UnknownName,
    /// The event belongs to another category than the type asked for.
    OtherCategory {
        /// The category of the type.
        expected: &'static str,
    },
    /// The payload does not have the shape of the variant; says what the decoder said.
    Payload(String),
    /// An upcaster refused the payload; says what it said.
    Upcast(String),
    /// The metadata does not decode.
    Metadata(String),
}

/// A recorded event that cannot be read. Never dropped: an aggregate refuses the command, a projection stops or parks.
#[derive(Debug, Clone, thiserror::Error)]
#[error("event {name} (version {version} of {stream}) cannot be read: {}", self.reason())]
pub struct DecodeError {
    /// What is wrong.
    pub kind: DecodeErrorKind,
    /// The stream of the event.
    pub stream: StreamId,
    /// Its version.
    pub version: Version,
    /// Its stored name.
    pub name: EventName,
}

impl DecodeError {
    pub(crate) fn new(event: &RecordedEvent, kind: DecodeErrorKind) -> Self {
        Self { kind, stream: event.stream.clone(), version: event.version, name: event.name.clone() }
    }

    pub(crate) fn payload(event: &RecordedEvent, reason: String) -> Self {
        Self::new(event, DecodeErrorKind::Payload(reason))
    }

    pub(crate) fn metadata(event: &RecordedEvent, reason: String) -> Self {
        Self::new(event, DecodeErrorKind::Metadata(reason))
    }

    fn reason(&self) -> String {
        match &self.kind {
            DecodeErrorKind::UnknownName => {
                "the event type has no variant of that name; keep a renamed variant's old name with #[serde(alias)], a removed one with an upcaster".into()
            }
            DecodeErrorKind::OtherCategory { expected } => format!("the type asked for has category {expected:?}"),
            DecodeErrorKind::Payload(reason) => format!("its payload does not decode: {reason}"),
            DecodeErrorKind::Upcast(reason) => format!("its upcaster refused: {reason}"),
            DecodeErrorKind::Metadata(reason) => format!("its metadata does not decode: {reason}"),
        }
    }
}
