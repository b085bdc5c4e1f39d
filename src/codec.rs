//! How events become bytes and come back: CBOR (or JSON) payloads, names from serde, upcasting of old shapes.

mod types;
mod upcast;

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use self::types::EventTypes;
pub use self::upcast::Upcasters;
use crate::event::{EventName, InvalidName, RecordedEvent, StreamId, Version};

/// How a store keeps payloads. Chosen when the store is created and remembered by it; metadata is always CBOR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Codec {
    /// RFC 8949, the default: compact, and readable by tools without the types.
    #[default]
    Cbor,
    /// RFC 8259, for stores whose payloads people want to query with SQL.
    Json,
}

impl Codec {
    /// The name that a store remembers.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::Cbor => "cbor",
            Codec::Json => "json",
        }
    }

    /// The codec of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Codec::Cbor, Codec::Json].into_iter().find(|codec| codec.name() == name)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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
    /// The category or a variant has a name that no event can have.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// serde refused.
    #[error("a value of type {type_name} does not serialize: {reason}")]
    Serialize {
        /// The Rust type.
        type_name: &'static str,
        /// What serde said.
        reason: String,
    },
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

/// Any value as CBOR: snapshots, replies, metadata.
pub(crate) fn to_cbor<T: Serialize>(value: &T) -> Result<Vec<u8>, EncodeError> {
    // Most of what is written is between 60 and 250 bytes.
    let mut bytes = Vec::with_capacity(128);
    ciborium::into_writer(value, &mut bytes).map_err(|error| EncodeError::Serialize {
        type_name: std::any::type_name::<T>(),
        reason: error.to_string(),
    })?;
    Ok(bytes)
}

/// Reads one CBOR value and insists that nothing follows it.
pub(crate) fn from_cbor<T: DeserializeOwned>(mut bytes: &[u8]) -> Result<T, String> {
    let value = ciborium::from_reader(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.is_empty() { Ok(value) } else { Err(format!("{} bytes too many", bytes.len())) }
}

/// A `Vec<u8>` field as a CBOR byte string; serde alone would write an array of numbers.
pub(crate) mod byte_string {
    use ciborium::Value;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(D::Error::custom("expected a byte string")),
        }
    }
}
