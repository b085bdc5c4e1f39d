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
//!
//! A reader of several event types decodes them as an [`EventSet`].

mod coding;
mod error;
mod metadata;
mod name;
mod position;
mod recorded;
mod serialized;
mod set;
mod stream;
mod tags;
mod types;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::error::{DecodeError, DecodeErrorKind, EncodeError};
pub use self::metadata::Metadata;
pub(crate) use self::name::check as check_name;
pub use self::name::{Category, EventName, InvalidName};
pub use self::position::{Position, Version};
pub use self::recorded::{NewEvent, RecordedEvent};
pub use self::set::{AnyEvent, EventDecoder, EventSet};
pub use self::stream::StreamId;
pub(crate) use self::stream::{id_problem, text_problem};
pub use self::tags::{InvalidTag, Tag, Tags};
pub(crate) use self::types::EventTypes;
use crate::codec::Upcasters;

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

    /// Returns the tags by which decisions over several streams find the event. Default: none.
    ///
    /// The tags are stored beside the event when it is appended. Another version of this method
    /// does not change the tags of stored events.
    fn tags(&self) -> Tags {
        Tags::new()
    }
}
#[cfg(test)]
pub(crate) mod tests {
    use bytes::Bytes;
    use chrono::DateTime;
    use ciborium::Value;
    use serde::Deserialize;
    use uuid::Uuid;

    use super::*;
    use crate::codec::Codec;

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
