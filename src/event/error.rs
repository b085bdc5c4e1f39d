//! Errors of encoding and decoding events.

use super::name::{EventName, InvalidName};
use super::position::Version;
use super::recorded::RecordedEvent;
use super::stream::StreamId;
use super::tags::InvalidTag;
use crate::codec::SerializeError;

/// A value that cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The type is no enum in the default form of serde, so its events have no names.
    #[error(
        "{type_name} cannot be an event: {reason}; an event is a serde enum in the default, externally tagged form (no #[serde(tag)], #[serde(untagged)] or #[serde(from)] on it)"
    )]
    NoEnum {
        /// The Rust type.
        type_name: &'static str,
        /// The form that was found instead.
        reason: String,
    },
    /// The encoded value cannot be read back. It is not stored, because every reader would fail.
    #[error("encoding {what} failed: reading it back stops at {field}: {reason}; {remedy}")]
    NotReadable {
        /// The name of the event, or the type of a reply.
        what: String,
        /// Path of the failing field, as `line.prices[2]`, as far as serde reports it.
        field: String,
        /// The error of the decoder.
        reason: String,
        /// The required change.
        remedy: &'static str,
    },
    /// An upcaster would change new events, or the chain has no end.
    #[error("invalid upcasters of category {category:?}: {reason}")]
    Upcasters {
        /// The category.
        category: &'static str,
        /// The rule, the cause and the remedy.
        reason: String,
    },
    /// Two event types of an [`EventSet`](super::EventSet) have the same category.
    #[error("two event types of {type_name} have category {category:?}; list one type per category")]
    SameCategory {
        /// The Rust type of the set.
        type_name: &'static str,
        /// The category.
        category: &'static str,
    },
    /// The category or a variant has an invalid name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The metadata is larger than [`Metadata::MAX_BYTES`](super::Metadata::MAX_BYTES).
    #[error(
        "metadata too large: {bytes} bytes encoded (limit {limit}), {largest} is the largest part; keep large values in the event and references to them in the metadata"
    )]
    MetadataTooLarge {
        /// Encoded size in bytes.
        bytes: usize,
        /// Limit in bytes.
        limit: usize,
        /// The largest field, or the key of the largest entry of the user.
        largest: String,
    },
    /// A tag is invalid, or there are too many.
    #[error(transparent)]
    Tag(#[from] InvalidTag),
    /// serde failed.
    #[error("serializing a value of type {type_name} failed: {reason}")]
    Serialize {
        /// The Rust type.
        type_name: &'static str,
        /// The error of serde.
        reason: String,
    },
}

impl From<SerializeError> for EncodeError {
    fn from(SerializeError { type_name, reason }: SerializeError) -> Self {
        Self::Serialize { type_name, reason }
    }
}

/// The cause of a decoding error.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The event type has no such variant, alias or upcaster.
    UnknownName,
    /// The event belongs to another category than the type.
    OtherCategory {
        /// The category of the type, or those of an [`EventSet`](super::EventSet).
        expected: Vec<&'static str>,
    },
    /// The payload does not match the variant; holds the error of the decoder.
    Payload(String),
    /// An upcaster failed; holds its error.
    Upcast(String),
    /// The metadata does not decode.
    Metadata(String),
    /// A query of a decision found the event by tags that its type does not give it any more.
    OtherTags,
}

/// A recorded event that cannot be decoded.
///
/// Such an event is never dropped: an aggregate rejects the command, a projection stops or parks
/// the event.
#[derive(Debug, Clone, thiserror::Error)]
#[error("reading event {name} (version {version} of {stream}) failed: {}", self.reason())]
pub struct DecodeError {
    /// The cause.
    pub kind: DecodeErrorKind,
    /// The stream of the event.
    pub stream: StreamId,
    /// The version of the event.
    pub version: Version,
    /// The stored name of the event.
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
                "the event type has no variant of that name; keep the old name of a renamed variant with #[serde(alias)], that of a removed variant with an upcaster".into()
            }
            DecodeErrorKind::OtherCategory { expected } => match &expected[..] {
                [expected] => format!("the requested type has category {expected:?}"),
                all => format!("the requested types have the categories {all:?}"),
            },
            DecodeErrorKind::Payload(reason) => format!("the payload does not decode: {reason}"),
            DecodeErrorKind::Upcast(reason) => format!("the upcaster failed: {reason}"),
            DecodeErrorKind::Metadata(reason) => format!("the metadata does not decode: {reason}"),
            DecodeErrorKind::OtherTags => {
                "a query found it by tags that its type does not give it any more; keep in Event::tags the tags that decisions query".into()
            }
        }
    }
}
