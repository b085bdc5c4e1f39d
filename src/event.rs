//! Events: facts about one aggregate, recorded in the log.
//!
//! The events of an aggregate are one serde enum. The serde name of a variant, prefixed by the
//! category of the enum, *is* the name of the event: in the store, on the bus, in filters and in
//! tools. `#[serde(rename)]` fixes a name, `#[serde(alias)]` keeps an old name readable, and
//! [`Upcasters`] convert old payloads.
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use storied::Event;
//!
//! #[derive(Debug, Serialize, Deserialize)]
//! #[serde(rename_all = "snake_case")]
//! enum OrderEvent {
//!     Placed { customer: String },          // order.placed
//!     #[serde(alias = "shipped")]
//!     Dispatched,                           // order.dispatched; also reads order.shipped
//! }
//!
//! impl Event for OrderEvent {
//!     const CATEGORY: &'static str = "order";
//! }
//! ```

mod error;
mod metadata;
mod name;
mod stream;
mod types;

use std::fmt;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

pub use self::error::{DecodeError, DecodeErrorKind, EncodeError};
pub use self::metadata::Metadata;
pub(crate) use self::name::check as check_name;
pub use self::name::{Category, EventName, InvalidName};
pub use self::stream::StreamId;
pub(crate) use self::types::EventTypes;
use crate::codec::{Codec, Upcasters};

/// The events of one aggregate type: an enum in the default (externally tagged) form of serde.
///
/// The *variants* of the enum name the events, see the [module](self). If a type is no such enum,
/// registering the aggregate returns a typed error, before anything is written.
pub trait Event: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The category of the streams of these events.
    ///
    /// One or more tokens of ASCII letters, digits, `_` and `-`, separated by dots (`order`,
    /// `shop.order`). It is part of every stored event: a changed category is a new category.
    const CATEGORY: &'static str;

    /// Returns the rules that convert events of older program versions. Default: none.
    fn upcasters() -> Upcasters {
        Upcasters::new()
    }
}

/// A position in the log of a store.
///
/// Positions increase strictly, may have gaps, and are above [`Position::START`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position(u64);

/// A position in a stream: 1, 2, 3 … without gaps. [`Version::NONE`] is an empty stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(u64);

impl Position {
    /// The position before the first event.
    pub const START: Position = Position(0);
}

impl Version {
    /// The version of a stream without events.
    pub const NONE: Version = Version(0);

    /// Returns the version of the following event.
    #[must_use]
    pub const fn next(self) -> Version {
        Version(self.0 + 1)
    }

    /// Returns the version `events` later.
    #[must_use]
    pub const fn plus(self, events: u64) -> Version {
        Version(self.0 + events)
    }
}

macro_rules! number {
    ($type:ident) => {
        impl $type {
            /// Wraps a number.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// Returns the number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}
number!(Position);
number!(Version);

/// An encoded and named event that has no position and version yet.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// Identity of the event (UUIDv7).
    ///
    /// The store uses it to resolve an append of unknown outcome (I4).
    pub id: Uuid,
    /// `category.variant`.
    pub name: EventName,
    /// The encoded payload, see [`Codec`].
    pub payload: Bytes,
    /// Id of the command that caused the event.
    ///
    /// Stored beside the metadata, so that folding does not decode these.
    pub command_id: Uuid,
    /// Encoded [`Metadata`].
    pub metadata: Bytes,
}

impl NewEvent {
    /// Encodes `event` for a store that keeps payloads in `codec`, with a new id and command id.
    ///
    /// # Errors
    /// If the event does not serialize, cannot be read back, or is no externally tagged enum.
    pub fn encode<E: Event>(event: &E, codec: Codec, metadata: &Metadata) -> Result<Self, EncodeError> {
        let (name, payload, _) = EventTypes::of::<E>()?.encode(event, codec)?;
        Ok(Self {
            id: Uuid::now_v7(),
            name,
            payload,
            command_id: Uuid::now_v7(),
            metadata: metadata.encode()?,
        })
    }
}

/// An event in the log.
#[derive(Debug, Clone)]
pub struct RecordedEvent {
    /// Identity of the event (UUIDv7).
    pub id: Uuid,
    /// Stream of the event.
    pub stream: StreamId,
    /// Version of the event in its stream.
    pub version: Version,
    /// Position of the event in the log.
    pub position: Position,
    /// `category.variant` as written. Only [`decode`](Self::decode) translates an alias.
    pub name: EventName,
    /// Encoding of `payload`.
    pub codec: Codec,
    /// The encoded payload.
    pub payload: Bytes,
    /// Id of the command that caused the event (causation).
    pub command_id: Uuid,
    /// Encoded [`Metadata`]; decoded on demand, because most readers do not use it.
    pub metadata: Bytes,
    /// Time of the append by the clock of the store.
    ///
    /// Not necessarily in log order across streams; order by `position`.
    pub recorded_at: DateTime<Utc>,
}

impl RecordedEvent {
    /// Returns the approximate size in memory, in bytes.
    pub(crate) fn size(&self) -> usize {
        const ALL_BUT_CONTENT: usize = 256;
        self.payload.len() + self.metadata.len() + ALL_BUT_CONTENT
    }

    /// Decodes the event as `E`, after upcasting.
    ///
    /// # Errors
    /// If the event is of another category, `E` has no such name, or the bytes do not decode. The
    /// error names stream, version and event.
    pub fn decode<E: Event>(&self) -> Result<E, DecodeError> {
        EventTypes::of::<E>()
            .map_err(|error| DecodeError::payload(self, error.to_string()))
            .and_then(|types| types.decode(self))
    }

    /// Decodes the event as `E`, or returns `None` if it belongs to another category.
    ///
    /// For projections over several aggregates.
    ///
    /// # Errors
    /// As [`decode`](Self::decode), except for the category.
    pub fn decode_if<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        if self.stream.category() == E::CATEGORY { self.decode().map(Some) } else { Ok(None) }
    }

    /// Decodes correlation, trace context and the entries of the user.
    ///
    /// # Errors
    /// If the stored bytes are no metadata.
    pub fn decode_metadata(&self) -> Result<Metadata, DecodeError> {
        Metadata::decode(&self.metadata).map_err(|error| DecodeError::metadata(self, error))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use ciborium::Value;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum OrderEvent {
        Placed {
            customer: String,
            lines: Vec<(String, u32)>,
            note: Option<String>,
        },
        Paid(i64),
        Weighed(f64, bool),
        #[serde(alias = "sent")]
        Dispatched,
    }

    impl Event for OrderEvent {
        const CATEGORY: &'static str = "order";

        fn upcasters() -> Upcasters {
            Upcasters::new().rename("billed", "charged").upcast("charged", "paid", |payload| {
                let Value::Map(fields) = payload else { return Err("no map".into()) };
                fields.into_iter().next().map(|(_, amount)| amount).ok_or_else(|| "no amount".into())
            })
        }
    }

    /// Returns an event at `position` with a payload of `size` bytes, in one of two streams.
    pub(crate) fn recorded(position: u64, size: usize) -> RecordedEvent {
        RecordedEvent {
            id: Uuid::nil(),
            stream: StreamId::new("test", position % 2).unwrap(),
            version: Version::new(position),
            position: Position::new(position),
            name: EventName::new("test.happened").unwrap(),
            codec: Codec::Cbor,
            payload: Bytes::from(vec![0; size]),
            command_id: Uuid::nil(),
            metadata: Bytes::new(),
            recorded_at: DateTime::UNIX_EPOCH,
        }
    }

    /// Parses the codec, the name, a line end and the payload.
    fn read(bytes: &[u8]) -> Option<RecordedEvent> {
        let (codec, rest) = bytes.split_first()?;
        let (name, payload) = rest.split_at(rest.iter().position(|byte| *byte == b'\n')?);
        Some(RecordedEvent {
            id: Uuid::nil(),
            stream: StreamId::new("order", "1").ok()?,
            version: Version::new(1),
            position: Position::new(1),
            name: EventName::new(std::str::from_utf8(name).ok()?).ok()?,
            codec: if *codec == b'j' { Codec::Json } else { Codec::Cbor },
            payload: Bytes::copy_from_slice(&payload[1..]),
            command_id: Uuid::nil(),
            metadata: Bytes::new(),
            recorded_at: DateTime::UNIX_EPOCH,
        })
    }

    #[test]
    fn no_payload_makes_the_reader_panic() {
        let lines = vec![("a".to_owned(), 1)];
        let events = [
            OrderEvent::Placed { customer: "é".into(), lines, note: Some("n".into()) },
            OrderEvent::Paid(-1),
            OrderEvent::Weighed(0.5, true),
            OrderEvent::Dispatched,
        ];
        let mut seeds = vec![b"corder.billed\n\xa1\x61a\x07".to_vec(), b"jorder.charged\n{\"a\":7}".to_vec()];
        for (codec, first) in [(Codec::Cbor, b"c"), (Codec::Json, b"j")] {
            for event in &events {
                let new = NewEvent::encode(event, codec, &Metadata::default()).unwrap();
                seeds.push([first, new.name.as_str().as_bytes(), b"\n", &new.payload].concat());
            }
        }
        crate::fuzz::fuzz("payloads", seeds, |bytes| {
            let Some(event) = read(bytes) else { return "no event".into() };
            event.decode::<OrderEvent>().map_or_else(|error| error.to_string(), |event| format!("{event:?}"))
        });
    }
}
