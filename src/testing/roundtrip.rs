use std::fmt::Debug;

use chrono::DateTime;
use uuid::Uuid;

use crate::codec::Codec;
use crate::event::{Event, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};

/// Checks that a store returns your events as they were written, in both codecs.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use storied::Event;
/// # #[derive(Debug, PartialEq, Serialize, Deserialize)] enum DoorEvent { Opened { by: String } }
/// # impl Event for DoorEvent { const CATEGORY: &'static str = "door"; }
/// storied::testing::roundtrip([DoorEvent::Opened { by: "Ada".into() }]);
/// ```
///
/// # Panics
/// If a store rejects an event, cannot read it, or returns another event than was written.
pub fn roundtrip<E: Event + Debug + PartialEq>(events: impl IntoIterator<Item = E>) {
    for event in events {
        for codec in [Codec::Cbor, Codec::Json] {
            match read_back(&event, codec) {
                ReadBack::Event(read) => {
                    assert_eq!(read, event, "a {codec} store returns another event than was written");
                }
                ReadBack::Refused(reason) => panic!("a {codec} store rejects {event:?}: {reason}"),
                ReadBack::Unreadable(reason) => {
                    panic!("a {codec} store cannot read {event:?}: {reason}")
                }
            }
        }
    }
}

/// The result of storing an event and reading it.
#[derive(Debug)]
pub(super) enum ReadBack<E> {
    /// The event as a reader decodes it.
    Event(E),
    /// The event is not stored.
    Refused(String),
    /// The event is stored, but no reader can decode it.
    Unreadable(String),
}

/// Encodes an event, and decodes it as a reader does.
pub(super) fn read_back<E: Event>(event: &E, codec: Codec) -> ReadBack<E> {
    let new = match NewEvent::encode(event, codec, &Metadata::default()) {
        Ok(new) => new,
        Err(error) => return ReadBack::Refused(error.to_string()),
    };
    let recorded = RecordedEvent {
        id: new.id,
        stream: StreamId::new(E::CATEGORY, "test").expect("a valid category"),
        version: Version::new(1),
        position: Position::new(1),
        name: new.name,
        codec,
        payload: new.payload,
        command_id: Uuid::nil(),
        metadata: new.metadata,
        recorded_at: DateTime::UNIX_EPOCH,
    };
    match recorded.decode() {
        Ok(read) => ReadBack::Event(read),
        Err(error) => ReadBack::Unreadable(error.to_string()),
    }
}
